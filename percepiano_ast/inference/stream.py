"""Rate live sound: it arrives in blocks, and every second the last ten seconds are rated."""

from typing import NamedTuple

import numpy as np
import soxr

from percepiano_ast import audio
from percepiano_ast.errors import InputError
from percepiano_ast.inference.rate import LOWEST_RATE, SHORTEST_SECONDS, Rater, load_model
from percepiano_ast.inference.rating import Rating

SECONDS = 10.0  # length of the window that is rated
EVERY = 1.0  # seconds from one rating to the next


class LiveRating(NamedTuple):
    """The rating of the last seconds ``at`` seconds after the beginning, as by
    `Rater.rate_wave` without a course; None with the ``reason`` if it cannot be rated."""

    at: float
    rating: Rating | None
    reason: str = ""


class Stream:
    """Rates live sound once a second, from the third second on.

    Args:
        sample_rate: of the sound, in Hz.
        model: see `load_model`; by default the bundled model.

    Attributes:
        window: the last ten seconds, float32 (n,) at the model's sampling rate.

    Raises:
        InputError: a sampling rate below 16 kHz.
    """

    def __init__(self, sample_rate: int, model: Rater | None = None):
        if sample_rate < LOWEST_RATE:
            raise InputError(f"sound at {sample_rate:,} Hz; at least {LOWEST_RATE:,} Hz is needed")
        self.model = model or load_model()
        self._rate = self.model.sample_rate
        self._resampler = soxr.ResampleStream(
            sample_rate, self._rate, 1, dtype="float32", quality="HQ"
        )
        self._offset = audio.OffsetFilter(sample_rate)
        self.window = np.zeros(0, np.float32)
        self._received = self._waiting = 0

    def push(self, block: np.ndarray) -> list[LiveRating]:
        """Append a block, float (n,) or (n, channels), full scale at 1; returns the ratings that
        became due.

        Raises:
            InputError: NaN or infinity in it.
        """
        block = np.asarray(block, np.float32)
        if not np.isfinite(block).all():
            raise InputError(
                f"NaN or infinity in the sound at {self._received / self._rate:.1f} s; leave that"
                " block out"
            )
        mono = block if block.ndim == 1 else block.mean(axis=1)
        sound, due = self._resampler.resample_chunk(self._offset(np.ascontiguousarray(mono))), []
        while len(sound):
            size = round(EVERY * self._rate) - self._waiting
            part, sound = sound[:size], sound[size:]
            self.window = np.concatenate([self.window, part])[-round(SECONDS * self._rate) :]
            self._received, self._waiting = self._received + len(part), self._waiting + len(part)
            if len(part) < size:
                break
            self._waiting = 0
            if len(self.window) >= SHORTEST_SECONDS * self._rate:
                at, name = self._received / self._rate, f"the last {SECONDS:g} s"
                try:
                    rating = self.model.rate_wave(self.window, name=name, with_course=False)
                    due.append(LiveRating(at, rating))
                except InputError as reason:
                    due.append(LiveRating(at, None, str(reason)))
        return due
