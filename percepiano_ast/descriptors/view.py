"""The common input of all descriptors: notes, chords and voices of a performance, computed once."""

from functools import cached_property
from typing import NamedTuple

import numpy as np

from percepiano_ast.alignment import chords
from percepiano_ast.performance import Performance

SHORTEST = 0.02  # seconds; lower limit of times in ratios and logarithms


class Descriptor(NamedTuple):
    """Unit and meaning of a descriptor; ``unit`` is empty for shares, ratios and correlations."""

    unit: str
    words: str


class View:
    """A performance with its chords (see `alignment.chords`) and voices.

    Attributes:
        performance: the input.
        onset, offset: seconds, float (n_notes,).
        pitch, velocity: MIDI numbers, float (n_notes,).
        chord: index of each note's chord, int (n_notes,).
    """

    def __init__(self, performance: Performance):
        self.performance = performance
        notes = performance.notes
        self.onset, self.offset = notes["onset"], notes["offset"]
        self.pitch, self.velocity = notes["pitch"].astype(float), notes["velocity"].astype(float)
        self.chord = chords(notes)

    @cached_property
    def size(self) -> np.ndarray:
        """Number of notes of each chord, (n_chords,)."""
        return np.bincount(self.chord)

    @cached_property
    def start(self) -> np.ndarray:
        """First onset of each chord in seconds, (n_chords,)."""
        return self.of_chords(np.minimum, self.onset)

    @cached_property
    def between(self) -> np.ndarray:
        """Seconds from each chord to the next, (n_chords - 1,); for a single chord, its duration,
        (1,)."""
        steps = (
            np.diff(self.start)
            if len(self.start) > 1
            else np.array([self.offset.max() - self.onset.min()])
        )
        return np.maximum(steps, SHORTEST)

    @cached_property
    def seconds(self) -> float:
        """Seconds from the first onset to the last release."""
        return float(self.offset.max() - self.onset.min())

    @cached_property
    def top(self) -> np.ndarray:
        """Whether a note is the highest of its chord: the melody, bool (n_notes,)."""
        return self.pitch == self.of_chords(np.maximum, self.pitch)[self.chord]

    @cached_property
    def bottom(self) -> np.ndarray:
        """Whether a note is the lowest of its chord, bool (n_notes,)."""
        return self.pitch == self.of_chords(np.minimum, self.pitch)[self.chord]

    @cached_property
    def together(self) -> np.ndarray:
        """Whether a note is in a chord of several notes, bool (n_notes,)."""
        return self.size[self.chord] > 1

    def of_chords(self, reduce: np.ufunc, values: np.ndarray) -> np.ndarray:
        """``reduce`` (``np.maximum``, ``np.add`` ...) of ``values`` (n_notes,) over each chord,
        (n_chords,)."""
        order = np.argsort(self.chord, kind="stable")
        return reduce.reduceat(
            values[order], np.concatenate([[0], np.cumsum(np.bincount(self.chord))[:-1]])
        )

    def mean_of_chords(self, values: np.ndarray) -> np.ndarray:
        """Mean of ``values`` (n_notes,) over each chord, (n_chords,)."""
        return self.of_chords(np.add, values) / self.size


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's r, 0 if either input is constant."""
    if len(x) < 2 or np.ptp(x) < 1e-9 or np.ptp(y) < 1e-9:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def mean(values: np.ndarray, neutral: float = 0.0) -> float:
    """The mean; ``neutral`` for no values."""
    return float(np.mean(values)) if len(values) else neutral
