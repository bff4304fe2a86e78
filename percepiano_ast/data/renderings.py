"""Renderings of performances: made in parallel, cached as FLAC, with their levels.

Shards, feature tables and sensitivity tests all read renderings through `Renderings`, so each clip
is synthesized only once.
"""

import functools
import hashlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import soundfile

from percepiano_ast import audio, synthesis
from percepiano_ast.errors import InputError, RunFailed
from percepiano_ast.files import end_with_parent
from percepiano_ast.performance import Performance

# A louder variant may exceed full scale, so files are scaled by 0.5: clipping starts at twice full
# scale.
_HEADROOM = 2.0
_SUBTYPE = "PCM_24"
_FEW = 8  # up to this many renderings, starting worker processes takes longer
_EVERY = 10.0  # seconds between lines of progress

# a soundfont takes seconds to load
_synthesizer = functools.lru_cache(maxsize=None)(synthesis.make_synthesizer)


@functools.cache
def _instrument(synthesizer: str) -> str:
    """Hash of soundfont and rendering code."""
    piano = _synthesizer(synthesizer)
    content = hashlib.sha256(
        Path(piano.path).read_bytes() if isinstance(piano, synthesis.FluidSynth) else b""
    )
    for file in sorted(Path(synthesis.__file__).parent.glob("*.py")):
        content.update(file.read_bytes())
    return content.hexdigest()


class Renderings:
    """Cached renderings by one synthesizer, as playable 24-bit FLAC files (16 bits would change the
    log-mel codes of soft passages).

    A file is named after the hash of all inputs of the rendering (notes, pedals, soundfont,
    sampling rate, rendering code), so the cache is never stale, and an interrupted run resumes.

    Args:
        folder: of the files.
        synthesizer: see `synthesis.make_synthesizer`.
        sample_rate: in Hz.

    Attributes:
        key: hash of all inputs of a rendering except the performance.

    Raises:
        InputError: the synthesizer is unknown, not installed or silent.
    """

    def __init__(self, folder: str | Path, synthesizer: str, sample_rate: int):
        self.folder, self.synthesizer, self.sample_rate = Path(folder), synthesizer, sample_rate
        self.key = hashlib.sha256(
            f"{synthesizer} {sample_rate} {_SUBTYPE} {_instrument(synthesizer)}".encode()
        ).hexdigest()

    def path(self, performance: Performance) -> Path:
        """Path of a performance's rendering, whether or not it exists."""
        content = hashlib.sha256(self.key.encode())
        content.update(performance.notes.tobytes())
        content.update(performance.pedals.tobytes())
        return self.folder / f"{content.hexdigest()[:32]}.flac"

    def prepare(
        self, performances: Iterable[Performance], workers: int, log: Callable[[str], None] = print
    ) -> None:
        """Render the missing ones with ``workers`` processes.

        Raises:
            InputError: see `wave`.
            RunFailed: a worker was killed; finished renderings are kept.
        """
        todo = {
            path: performance
            for performance in performances
            if not (path := self.path(performance)).exists()
        }
        if not todo:
            return
        log(f"{self.synthesizer}: rendering {len(todo):,} performances")
        render = functools.partial(_render, self.synthesizer, self.sample_rate)
        if len(todo) <= _FEW or workers == 1:
            for item in todo.items():
                render(item)
            return
        # Fork is unsafe with JAX's threads.
        context = multiprocessing.get_context("spawn")
        try:
            with ProcessPoolExecutor(
                workers, mp_context=context, initializer=end_with_parent
            ) as pool:
                start = shown = time.monotonic()
                for count, _ in enumerate(pool.map(render, todo.items(), chunksize=_FEW), 1):
                    if (now := time.monotonic()) - shown > _EVERY:
                        shown = now
                        left = (now - start) / count * (len(todo) - count)
                        log(f"  {count:,} of {len(todo):,}, about {left:.0f} s left")
        except BrokenProcessPool as error:
            raise RunFailed(
                f"a worker process was killed ({error}), perhaps for lack of memory. Run again to"
                " resume."
            ) from error

    def wave(self, performance: Performance, name: str = "this performance") -> np.ndarray:
        """The rendering float32 (n,), full scale at 1; it is made if missing.

        Raises:
            InputError: longer than an hour, silent throughout, or louder than twice full scale,
                with ``name`` in the message; or a damaged file.
        """
        path = self.path(performance)
        if not path.exists():
            _render(self.synthesizer, self.sample_rate, (path, performance), name)
        try:
            return soundfile.read(path, dtype="float32")[0] * np.float32(_HEADROOM)
        except soundfile.LibsndfileError as error:
            raise InputError(
                f"{path} is damaged ({error}). Delete it and run again to render it again."
            ) from error


def level(wave: np.ndarray) -> dict[str, float]:
    """Level of a wave float (n,): ``level_db`` and ``peak_db`` re full scale, and ``over``, the
    samples beyond full scale."""
    magnitude = np.abs(wave)
    peak_db, level_db = (
        20 * np.log10(max(value, 1e-10))
        for value in (magnitude.max(), np.sqrt(np.mean(magnitude**2)))
    )
    return {
        "level_db": round(float(level_db), 2),
        "peak_db": round(float(peak_db), 2),
        "over": int((magnitude > 1).sum()),
    }


def _render(
    synthesizer: str,
    sample_rate: int,
    item: tuple[Path, Performance],
    name: str = "this performance",
) -> None:
    path, performance = item
    synthesis.check_length(performance, name)
    wave = _synthesizer(synthesizer).render(performance, sample_rate)
    audio.check_waveform(wave, sample_rate, f"{name} rendered by {synthesizer}")
    if (peak := np.abs(wave).max()) >= _HEADROOM:
        raise InputError(
            f"{synthesizer} renders {name} at {peak:.1f} times full scale; the limit is"
            f" {_HEADROOM:g}. Exclude clips with so many notes at full force."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    # unique per process, as two may render the same clip
    partial = path.with_suffix(f".{os.getpid()}.partial")
    soundfile.write(partial, wave / _HEADROOM, sample_rate, format="FLAC", subtype=_SUBTYPE)
    partial.replace(path)
