"""Renderings of one's own (a sampled grand, a Disklavier in a hall) in the place of a synthesizer's."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from percepiano_ast import audio
from percepiano_ast.config import InputError
from percepiano_ast.data import sources
from percepiano_ast.performance import LEAD, Performance
from percepiano_ast.synthesis import TAIL

OWN = "own"  # what they are called in the place of a synthesizer's name
_QUIET = 50.0  # dB below the peak: what is softer before the first stroke is the room, not the playing
_SHORTER, _LONGER = 0.8, 10.0  # share of the playing, and seconds beyond it, that a recording of it may have
_SHOWN = 5  # names in a message


class OwnRenderings:
    """A folder with one recording per clip, WAV, FLAC, MP3 or what else `audio.load` reads, named as the clip.

    Args:
        folder: of the recordings; files that are none are not looked at.
        clips: that are wanted.
        partial: whether clips may be missing; they are in ``missing`` then.

    Attributes:
        files: clip -> recording.
        missing: clips without a recording.
        strangers: recordings that are of no clip.

    Raises:
        InputError: no such folder, no recording in it, two of one clip, or clips missing that may not be.
    """

    def __init__(self, folder: str | Path, clips: Iterable[str], partial: bool = False):
        folder, clips = Path(folder), set(clips)
        if not folder.is_dir():
            raise InputError(f"no folder of recordings at {folder}; give one with a file per clip, named as the clip")
        found: dict[str, Path] = {}
        for path in sorted(path for path in folder.iterdir() if sources.is_audio(path.name)):
            if (clip := path.stem.strip()) in found:
                raise InputError(f"{found[clip].name} and {path.name} in {folder} are both of clip {clip!r}; keep one of them")
            found[clip] = path
        self.files = {clip: path for clip, path in found.items() if clip in clips}
        self.strangers = sorted(set(found) - clips)
        lacking = sorted(clips - set(found))
        if not self.files:
            raise InputError(
                f"{folder} holds no recording of any of {len(clips):,} clips; name each file as its clip, "
                f"such as {min(clips, default='CLIP')}.wav"
            )
        if lacking and not partial:
            raise InputError(
                f"{folder} lacks recordings of {len(lacking):,} of {len(clips):,} clips: "
                f"{', '.join(lacking[:_SHOWN])}{' ...' if len(lacking) > _SHOWN else ''}. Add them, or allow "
                "partial renderings, which are listed"
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
        """The recording float32 (n,) at its own gain, laid out as a rendering: ``LEAD`` seconds before the first sound, and
        ending ``TAIL`` seconds after the last key release.

        Raises:
            InputError: unreadable, silent, or so much shorter or longer than the playing that it must be of another clip.
        """
        path = self.files[clip]
        wave = audio.load(path, sample_rate)
        loud = np.flatnonzero(np.abs(wave) > np.abs(wave).max() * 10 ** (-_QUIET / 20))
        sounding, playing = (loud[-1] - loud[0]) / sample_rate, performance.duration - LEAD
        if not _SHORTER * playing <= sounding <= playing + _LONGER:
            raise InputError(
                f"{path}: sounds for {sounding:.1f} s, the playing of {clip} lasts {playing:.1f} s; is "
                "it of another clip, or cut off?"
            )
        first = loud[0] - round(LEAD * sample_rate)
        wave = np.concatenate([np.zeros(max(-first, 0), np.float32), wave[max(first, 0) :]])
        return wave[: int(np.ceil((performance.duration + TAIL) * sample_rate))]
