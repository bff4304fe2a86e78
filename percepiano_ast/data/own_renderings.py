"""Custom renderings (a sampled grand, a Disklavier in a hall) instead of a synthesizer's."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from percepiano_ast import audio
from percepiano_ast.data import sources
from percepiano_ast.errors import InputError
from percepiano_ast.music.midi import LEAD, Performance
from percepiano_ast.music.synth import TAIL

OWN = "own"  # used in place of a synthesizer's name
_QUIET = 50.0  # dB below the peak: softer sound before the first onset is background noise
# minimum share of the performance's duration, and maximum seconds beyond it
_SHORTER, _LONGER = 0.8, 10.0
_SHOWN = 5  # names in a message


class OwnRenderings:
    """A folder with one recording per clip, in any format of `audio.load`, named after the clip.

    Args:
        folder: of the recordings; other files are ignored.
        clips: required clips.
        partial: whether clips may be missing; they are listed in ``missing``.

    Attributes:
        files: clip -> recording.
        missing: clips without a recording.
        `strangers`: recordings that match no clip.

    Raises:
        InputError: no such folder, no recording in it, two recordings of one clip, or missing clips
            without ``partial``.
    """

    def __init__(self, folder: str | Path, clips: Iterable[str], partial: bool = False):
        folder, clips = Path(folder), set(clips)
        if not folder.is_dir():
            raise InputError(
                f"{folder}: no such folder. Give one with one recording per clip, named after the"
                " clip."
            )
        found: dict[str, Path] = {}
        for path in sorted(path for path in folder.iterdir() if sources.is_audio(path.name)):
            if (clip := path.stem.strip()) in found:
                raise InputError(
                    f"{found[clip].name} and {path.name} in {folder} are both of clip {clip!r}."
                    " Keep one of them."
                )
            found[clip] = path
        self.files = {clip: path for clip, path in found.items() if clip in clips}
        self.strangers = sorted(set(found) - clips)
        lacking = sorted(clips - set(found))
        if not self.files:
            raise InputError(
                f"{folder} has no recording of any of {len(clips):,} clips. Name each file after"
                f" its clip, such as {min(clips, default='CLIP')}.wav."
            )
        if lacking and not partial:
            raise InputError(
                f"{folder} lacks recordings of {len(lacking):,} of {len(clips):,} clips:"
                f" {', '.join(lacking[:_SHOWN])}{' ...' if len(lacking) > _SHOWN else ''}. Add"
                " them, or allow partial renderings; missing clips are then listed."
            )
        self.missing = lacking

    def fingerprint(self) -> str:
        """Hash of the names and contents of the recordings."""
        content = hashlib.sha256()
        for clip, path in sorted(self.files.items()):
            with path.open("rb") as file:
                content.update(f"{clip} {hashlib.file_digest(file, 'sha256').hexdigest()}".encode())
        return content.hexdigest()[:16]

    def wave(self, clip: str, performance: Performance, sample_rate: int) -> np.ndarray:
        """The recording float32 (n,) at its own gain, aligned like a rendering: it starts ``LEAD``
        seconds before the first sound and ends ``TAIL`` seconds after the last key release.

        Raises:
            InputError: unreadable, silent, or its duration does not match the clip's performance.
        """
        path = self.files[clip]
        wave = audio.load(path, sample_rate)
        loud = np.flatnonzero(np.abs(wave) > np.abs(wave).max() * 10 ** (-_QUIET / 20))
        sounding, playing = (loud[-1] - loud[0]) / sample_rate, performance.duration - LEAD
        if not _SHORTER * playing <= sounding <= playing + _LONGER:
            raise InputError(
                f"{path}: {sounding:.1f} s of sound, but the performance of {clip} lasts"
                f" {playing:.1f} s. Check that it is the right clip and not cut off."
            )
        first = loud[0] - round(LEAD * sample_rate)
        wave = np.concatenate([np.zeros(max(-first, 0), np.float32), wave[max(first, 0) :]])
        return wave[: int(np.ceil((performance.duration + TAIL) * sample_rate))]
