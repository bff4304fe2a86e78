"""Rate while somebody plays: sound comes in blocks, and every second the last ten are rated."""

from typing import NamedTuple

import numpy as np
import soxr

from percepiano_ast.config import InputError
from percepiano_ast.packaged import Packaged
from percepiano_ast.recording.rating import LOWEST_RATE, SHORTEST_SECONDS, Rating, rate_wave

SECONDS = 10.0  # that a rating hears
EVERY = 1.0  # seconds from one rating to the next


class Live(NamedTuple):
    """A rating of the last seconds.

    Attributes:
        at: seconds since the stream began.
        rating: as `rate_wave` gives it for the same window, without a course; None where that cannot be rated.
        reason: why not; empty where it is rated.
    """

    at: float
    rating: Rating | None
    reason: str = ""


class Stream:
    """Sound in, ratings out. The first comes after three seconds, of what there is by then.

    Args:
        sample_rate: of the sound, in Hz.
        model: by default the one that comes along.

    Attributes:
        window: what the next rating would hear, float32 (n,) at the model's sampling rate.

    Raises:
        InputError: a sampling rate below 16 kHz.
    """

    def __init__(self, sample_rate: int, model: Packaged | None = None):
        if sample_rate < LOWEST_RATE:
            raise InputError(f"sound at {sample_rate:,} Hz; at least {LOWEST_RATE:,} Hz is needed")
        self.model = model or Packaged.read()
        self._rate = self.model.listener.front_end.sample_rate
        self._resampler = soxr.ResampleStream(sample_rate, self._rate, 1, dtype="float32", quality="HQ")
        self.window = np.zeros(0, np.float32)
        self._heard = self._waiting = 0

    def push(self, block: np.ndarray) -> list[Live]:
        """Take the next sound, float (n,) or (n, channels), full scale at 1; what became due is rated.

        Raises:
            InputError: NaN or infinity in it.
        """
        block = np.asarray(block, np.float32)
        if not np.isfinite(block).all():
            raise InputError(f"NaN or infinity in the sound at {self._heard / self._rate:.1f} s; leave that block out")
        mono = block if block.ndim == 1 else block.mean(axis=1)
        sound, due = self._resampler.resample_chunk(np.ascontiguousarray(mono)), []
        while len(sound):
            size = round(EVERY * self._rate) - self._waiting
            part, sound = sound[:size], sound[size:]
            self.window = np.concatenate([self.window, part])[-round(SECONDS * self._rate) :]
            self._heard, self._waiting = self._heard + len(part), self._waiting + len(part)
            if len(part) == size:
                self._waiting = 0
                if len(self.window) >= SHORTEST_SECONDS * self._rate:
                    due.append(self._rated())
        return due

    def _rated(self) -> Live:
        at = self._heard / self._rate
        try:
            return Live(at, rate_wave(self.model, self.window, name=f"the last {SECONDS:g} s", with_course=False))
        except InputError as reason:
            return Live(at, None, str(reason))
