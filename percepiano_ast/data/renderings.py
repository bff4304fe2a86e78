"""Renderings of performances, made once, by all cores, and kept as FLAC; and what is known of a rendering's level.

Whatever hears a rendering (shards, tables of statistics, listening tests) hears it through `Renderings`, so that a clip is
synthesized once, by whichever asks first.
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
from percepiano_ast.config import InputError, RunFailed
from percepiano_ast.performance import Performance
from percepiano_ast.workers import die_with_parent

# A performance made louder may exceed full scale, so the files hold half of it: nothing is cut off below twice full scale.
_HEADROOM = 2.0
_SUBTYPE = "PCM_24"
_FEW = 8  # renderings that are not worth the start of worker processes
_EVERY = 10.0  # seconds between lines of progress

_synthesizer = functools.lru_cache(maxsize=None)(synthesis.make_synthesizer)  # a soundfont takes seconds to load


@functools.cache
def _instrument(synthesizer: str) -> str:
    """Hash of everything but the performance that the sound depends on."""
    piano = _synthesizer(synthesizer)
    content = hashlib.sha256(Path(piano.path).read_bytes() if isinstance(piano, synthesis.FluidSynth) else b"")
    for file in sorted(Path(synthesis.__file__).parent.glob("*.py")):
        content.update(file.read_bytes())
    return content.hexdigest()


class Renderings:
    """What a synthesizer makes of performances: 24-bit FLAC files that a musician can listen to as well (16
    bits would be heard in the log-mel codes of soft passages).

    A file is named by the hash of everything that its sound depends on (notes, pedals, soundfont, sampling rate, the
    rendering code), so it is never stale, and an interrupted run continues.

    Args:
        folder: of the files.
        synthesizer: see `synthesis.make_synthesizer`.
        sample_rate: in Hz.

    Attributes:
        key: of everything but the performance that a rendering depends on.

    Raises:
        InputError: the synthesizer is unknown, not installed or silent.
    """

    def __init__(self, folder: str | Path, synthesizer: str, sample_rate: int):
        self.folder, self.synthesizer, self.sample_rate = Path(folder), synthesizer, sample_rate
        self.key = hashlib.sha256(f"{synthesizer} {sample_rate} {_SUBTYPE} {_instrument(synthesizer)}".encode()).hexdigest()

    def path(self, performance: Performance) -> Path:
        """Where the rendering of a performance is, or will be."""
        content = hashlib.sha256(self.key.encode())
        content.update(performance.notes.tobytes())
        content.update(performance.pedals.tobytes())
        return self.folder / f"{content.hexdigest()[:32]}.flac"

    def prepare(self, performances: Iterable[Performance], workers: int, log: Callable[[str], None] = print) -> None:
        """Render those that are not there yet, by ``workers`` processes.

        Raises:
            InputError: see `wave`.
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

    def wave(self, performance: Performance, name: str = "this performance") -> np.ndarray:
        """The rendering float32 (n,), full scale at 1; it is made where it is not there yet.

        Raises:
            InputError: more than an hour long, silent throughout, or louder than twice full scale; ``name`` is what the
                message calls it. A damaged file is named too.
        """
        path = self.path(performance)
        if not path.exists():
            _render(self.synthesizer, self.sample_rate, (path, performance), name)
        try:
            return soundfile.read(path, dtype="float32")[0] * np.float32(_HEADROOM)
        except soundfile.LibsndfileError as error:
            raise InputError(f"{path} is damaged ({error}); delete it, it is rendered anew") from error


def level(wave: np.ndarray) -> dict[str, float]:
    """How loud a wave float (n,) is: ``level_db`` and ``peak_db`` re full scale, ``over`` samples beyond full scale."""
    magnitude = np.abs(wave)
    peak_db, level_db = (20 * np.log10(max(value, 1e-10)) for value in (magnitude.max(), np.sqrt(np.mean(magnitude**2))))
    return {"level_db": round(float(level_db), 2), "peak_db": round(float(peak_db), 2), "over": int((magnitude > 1).sum())}


def _render(synthesizer: str, sample_rate: int, item: tuple[Path, Performance], name: str = "this performance") -> None:
    path, performance = item
    synthesis.check_length(performance, name)
    wave = _synthesizer(synthesizer).render(performance, sample_rate)
    audio.check_waveform(wave, sample_rate, f"{name} as {synthesizer} plays it")
    if (peak := np.abs(wave).max()) >= _HEADROOM:
        raise InputError(
            f"{synthesizer} plays {name} at {peak:.1f} times full scale, {_HEADROOM:g} at most can be kept; leave out "
            "clips of so many notes at full force."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")  # of two processes that make the same, each writes its own
    soundfile.write(partial, wave / _HEADROOM, sample_rate, format="FLAC", subtype=_SUBTYPE)
    partial.replace(path)
