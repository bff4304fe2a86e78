"""Renderings of performances, made once, by all cores, and kept as FLAC."""

import functools
import hashlib
import multiprocessing
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import soundfile

from percepiano_ast import synthesis
from percepiano_ast.config import InputError, RunFailed
from percepiano_ast.performance import Performance
from percepiano_ast.workers import die_with_parent

# A performance made louder may exceed full scale, so the files hold half of it: nothing is cut off below twice full scale.
_HEADROOM = 2.0
_FEW = 8  # renderings that are not worth the start of worker processes
_EVERY = 10.0  # seconds between lines of progress

_synthesizer = functools.lru_cache(maxsize=None)(synthesis.make_synthesizer)  # a soundfont takes seconds to load


class Renderings:
    """What a synthesizer makes of performances: 16-bit FLAC files that a musician can listen to as well.

    A file is named by the hash of everything that its sound depends on (notes, pedals, soundfont, sampling rate, the
    rendering code), so it is never stale, and an interrupted run continues.

    Args:
        folder: of the files.
        synthesizer: see `synthesis.make_synthesizer`.
        sample_rate: in Hz.

    Raises:
        InputError: the synthesizer is unknown or not installed.
    """

    def __init__(self, folder: Path, synthesizer: str, sample_rate: int):
        self.folder, self.synthesizer, self.sample_rate = Path(folder), synthesizer, sample_rate
        piano = _synthesizer(synthesizer)
        font = Path(piano.path).read_bytes() if isinstance(piano, synthesis.FluidSynth) else b""
        self._piano = hashlib.sha256(font + Path(synthesis.__file__).read_bytes()).hexdigest()
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, performance: Performance) -> Path:
        """Where the rendering of a performance is, or will be."""
        content = hashlib.sha256(f"{self.synthesizer} {self.sample_rate} {self._piano}".encode())
        content.update(performance.notes.tobytes())
        content.update(performance.pedals.tobytes())
        return self.folder / f"{content.hexdigest()[:32]}.flac"

    def prepare(self, performances: Iterable[Performance], workers: int, log: Callable[[str], None] = print) -> None:
        """Render those that are not there yet, by ``workers`` processes.

        Raises:
            InputError: louder than twice full scale.
            RunFailed: a worker was killed; what is done is kept.
        """
        todo = {path: performance for performance in performances if not (path := self.path(performance)).exists()}
        if not todo:
            return
        log(f"{self.synthesizer}: rendering {len(todo):,} performances")
        render = functools.partial(_render, self.synthesizer, self.sample_rate)
        if len(todo) <= _FEW or workers == 1:
            for item in todo.items():
                render(item)
            return
        # Fork is unsafe beside JAX's threads.
        context = multiprocessing.get_context("spawn")
        try:
            with ProcessPoolExecutor(workers, mp_context=context, initializer=die_with_parent) as pool:
                start = shown = time.monotonic()
                for count, _ in enumerate(pool.map(render, todo.items(), chunksize=_FEW), 1):
                    if (now := time.monotonic()) - shown > _EVERY:
                        shown = now
                        left = (now - start) / count * (len(todo) - count)
                        log(f"  {count:,} of {len(todo):,}, about {left:.0f} s left")
        except BrokenProcessPool as error:
            raise RunFailed(f"a worker process was killed ({error}): too little memory? Run again, it continues") from error

    def wave(self, performance: Performance) -> np.ndarray:
        """The rendering float32 (n,), full scale at 1; it is made where it is not there yet."""
        path = self.path(performance)
        if not path.exists():
            _render(self.synthesizer, self.sample_rate, (path, performance))
        return soundfile.read(path, dtype="float32")[0] * np.float32(_HEADROOM)


def _render(synthesizer: str, sample_rate: int, item: tuple[Path, Performance]) -> None:
    path, performance = item
    wave = _synthesizer(synthesizer).render(performance, sample_rate)
    if (peak := np.abs(wave).max()) >= _HEADROOM:
        raise InputError(
            f"{synthesizer} plays this performance at {peak:.1f} times full scale, {_HEADROOM:g} at most can be kept; leave out "
            "clips of so many notes at full force."
        )
    partial = path.with_suffix(".partial")
    soundfile.write(partial, wave / _HEADROOM, sample_rate, format="FLAC", subtype="PCM_16")
    partial.replace(path)
