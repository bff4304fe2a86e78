"""What every family of score features looks at: the matched notes, side by side as written and as played."""

from functools import cached_property

import numpy as np

from percepiano_ast import alignment
from percepiano_ast.descriptors.view import correlation as _correlation
from percepiano_ast.performance import Performance
from percepiano_ast.score.matching import Match
from percepiano_ast.score.reading import Score

LOCAL = 4.0  # quarters, standard deviation of the bell that the tempo of a phrase is taken over
_STEP = 0.2  # quarters between moments that tell of tempo: closer ones are ornaments
_SLACK = 0.05  # quarters: what ends within this of a moment does not sound any more
_SHORTEST = 0.02  # seconds: no logarithm is taken of less


class View:
    """A performance and its score, note by matched note in order of the score; grace notes, which have no time, apart.

    Attributes:
        performance, score, match: what is looked at.
        plain: the score's notes without grace notes.
        at, length: onset and duration in quarters, float (n_matched,).
        onset, held: onset and time that the key is down in seconds, float (n_matched,).
        pitch, velocity, notated: pitch, velocity played and velocity in the score, float (n_matched,).
        staff: int (n_matched,).
        moment: number of the written moment of each note, int (n_matched,), into ``quarters``.
        quarters, seconds: each matched moment as written and as played (mean of its notes), float (n_moments,).
    """

    def __init__(self, performance: Performance, score: Score, match: Match):
        self.performance, self.score, self.match = performance, score, match
        plain = ~score.notes["grace"]
        self.plain = score.notes[plain]
        order = np.argsort(match.written, kind="stable")
        order = order[plain[match.written[order]]]
        played, written = performance.notes[match.played[order]], score.notes[match.written[order]]
        self._index = np.cumsum(plain)[match.written[order]] - 1
        self.at, self.length, self.staff = written["onset"], written["duration"], written["staff"].astype(int)
        self.onset, self.held = played["onset"], np.maximum(played["offset"] - played["onset"], _SHORTEST)
        self.pitch, self.velocity = played["pitch"].astype(float), played["velocity"].astype(float)
        self.notated = written["velocity"].astype(float)
        self.quarters, self.moment = np.unique(self.at, return_inverse=True)
        self.seconds = self.of_moments(self.onset)

    @cached_property
    def size(self) -> np.ndarray:
        """Matched notes of each moment, int (n_moments,)."""
        return np.bincount(self.moment)

    @cached_property
    def together(self) -> np.ndarray:
        """Whether a note is written together with others, bool (n_matched,)."""
        return self.size[self.moment] > 1

    @cached_property
    def top(self) -> np.ndarray:
        """Whether a note is the highest that is written at its moment: the melody, bool (n_matched,)."""
        return self._extreme(np.maximum)

    @cached_property
    def bottom(self) -> np.ndarray:
        """Whether a note is the lowest that is written at its moment, bool (n_matched,)."""
        return self._extreme(np.minimum)

    def _extreme(self, which: np.ufunc) -> np.ndarray:
        notes = self.plain
        starts = np.flatnonzero(np.r_[True, np.diff(notes["onset"]) > 0])
        extreme = which.reduceat(notes["pitch"], starts)
        return self.pitch == extreme[np.searchsorted(starts, self._index, side="right") - 1]

    @cached_property
    def bass(self) -> np.ndarray:
        """Lowest written pitch that sounds at each moment, float (n_moments,)."""
        notes = self.plain
        onset, end, at = notes["onset"], notes["onset"] + notes["duration"], self.quarters[:, None]
        sounds = (onset <= at) & ((end > at + _SLACK) | (onset == at))
        return np.where(sounds, notes["pitch"].astype(float), np.inf).min(axis=1)

    @cached_property
    def beats(self) -> tuple[np.ndarray, np.ndarray]:
        """Bar and beat of each moment, see `Score.position`."""
        return self.score.position(self.quarters)

    @cached_property
    def downbeat(self) -> np.ndarray:
        """Whether a moment begins a bar, bool (n_moments,)."""
        return self.beats[1] < 0.02

    @cached_property
    def on_beat(self) -> np.ndarray:
        """Whether a moment begins a beat, bool (n_moments,)."""
        return np.abs(self.beats[1] - np.round(self.beats[1])) < 0.02

    @cached_property
    def steps(self) -> np.ndarray:
        """Moments that tell of tempo, (n, 2): seconds and quarters, see `alignment.spaced`; both rise."""
        return alignment.spaced(self._rising, _STEP)

    @cached_property
    def _rising(self) -> np.ndarray:
        latest = np.maximum.accumulate(self.seconds)
        kept = np.r_[True, self.seconds[1:] > latest[:-1]]
        return np.stack([self.seconds[kept], self.quarters[kept]], axis=1)

    @cached_property
    def pace(self) -> np.ndarray:
        """Logarithm of quarters per second from each of ``steps`` to the next, (n - 1,)."""
        seconds, quarters = np.diff(self.steps, axis=0).T
        return np.log(quarters / seconds)

    @cached_property
    def middle(self) -> np.ndarray:
        """Middle of each of these steps in quarters, (n - 1,)."""
        return (self.steps[1:, 1] + self.steps[:-1, 1]) / 2

    def smooth(self, quarters: np.ndarray, width: float = LOCAL) -> np.ndarray:
        """Logarithm of the tempo around ``quarters``: the steps' mean under a bell, weighted by what they last."""
        weights = np.exp(-0.5 * ((quarters[:, None] - self.middle) / width) ** 2) * np.diff(self.steps[:, 1])
        weights += 1e-12 * np.diff(self.steps[:, 1])  # far from every step the mean of all counts
        return weights @ self.pace / weights.sum(axis=1)

    @cached_property
    def late(self) -> np.ndarray:
        """How much later than its moment a note is played, seconds (n_matched,)."""
        return self.onset - self.seconds[self.moment]

    @cached_property
    def articulation(self) -> np.ndarray:
        """Logarithm of the time a key is held over what is written at the tempo of the phrase, (n_matched,)."""
        return np.log(self.held) - np.log(np.maximum(self.length, 1 / 16)) + self.smooth(self.at)

    def of_moments(self, values: np.ndarray, which: np.ndarray | None = None) -> np.ndarray:
        """Mean of ``values`` (n_matched,) at each moment, of the notes in ``which`` alone; NaN where there is none."""
        which = np.ones(len(values), bool) if which is None else which
        count = np.bincount(self.moment[which], minlength=len(self.quarters)).astype(float)
        count[count == 0] = np.nan
        return np.bincount(self.moment[which], values[which], minlength=len(self.quarters)) / count


def mean(values: np.ndarray) -> float:
    """The mean of what is finite; NaN of nothing."""
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else np.nan


def std(values: np.ndarray) -> float:
    """The standard deviation of what is finite; NaN of fewer than two."""
    values = values[np.isfinite(values)]
    return float(values.std()) if len(values) > 1 else np.nan


def quantile(values: np.ndarray, share: float) -> float:
    """The quantile of what is finite; NaN of nothing."""
    values = values[np.isfinite(values)]
    return float(np.quantile(values, share)) if len(values) else np.nan


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's r of what is finite; NaN of fewer than four, or where either does not vary."""
    both = np.isfinite(x) & np.isfinite(y)
    if both.sum() < 4 or np.ptp(x[both]) < 1e-9 or np.ptp(y[both]) < 1e-9:
        return np.nan
    return _correlation(x[both], y[both])


def slope(x: np.ndarray, y: np.ndarray) -> float:
    """Change of ``y`` from the least to the greatest ``x`` by a straight line; NaN where there is none."""
    both = np.isfinite(x) & np.isfinite(y)
    if both.sum() < 3 or np.ptp(x[both]) < 1e-9:
        return np.nan
    return float(np.polyfit(x[both], y[both], 1)[0] * np.ptp(x[both]))


def arch(x: np.ndarray, y: np.ndarray) -> float:
    """How much higher ``y`` is in the middle than at the ends, by a parabola; NaN of fewer than four."""
    both = np.isfinite(x) & np.isfinite(y)
    if both.sum() < 4 or np.ptp(x[both]) < 1e-9:
        return np.nan
    return float(-np.polyfit(2 * (x[both] - x[both].min()) / np.ptp(x[both]) - 1, y[both], 2)[0])


def pattern(bars: np.ndarray, values: np.ndarray, positions: np.ndarray) -> float:
    """Share of the variance of ``values`` that the position within the bar explains; NaN within fewer than two bars."""
    ok = np.isfinite(values)
    if len(np.unique(bars[ok])) < 2 or np.ptp(values[ok]) < 1e-9:
        return np.nan
    numbers = np.unique(np.round(positions[ok], 2), return_inverse=True)[1]
    means = np.bincount(numbers, values[ok]) / np.bincount(numbers)
    return float(means[numbers].var() / values[ok].var())
