"""The common input of all score-informed features: matched notes as notated and as played."""

from functools import cached_property

import numpy as np

from percepiano_ast import alignment
from percepiano_ast.descriptors.view import correlation as _correlation
from percepiano_ast.performance import Performance
from percepiano_ast.score.matching import Match
from percepiano_ast.score.reading import Score

LOCAL = 4.0  # quarters; standard deviation of the Gaussian kernel for the smooth tempo
_STEP = 0.2  # quarters; minimum distance of onsets used for tempo: closer ones are ornaments
_SLACK = 0.05  # quarters: notes that end this shortly after an onset do not count as sounding
_SHORTEST = 0.02  # seconds; lower limit before taking logarithms


class View:
    """A performance and its score, by matched note in score order, without grace notes, which have
    no duration.

    Attributes:
        performance, score, match: the inputs.
        plain: the score's notes without grace notes.
        at, length: notated onset and duration in quarters, float (n_matched,).
        onset, held: onset and key-down time in seconds, float (n_matched,).
        pitch, velocity, notated: pitch, played velocity and velocity in the score, float
            (n_matched,).
        staff: int (n_matched,).
        moment: index of each note's score onset in ``quarters``, int (n_matched,).
        quarters, seconds: each matched onset as notated and as played (mean of its notes), float
            (n_moments,).
    """

    def __init__(self, performance: Performance, score: Score, match: Match):
        self.performance, self.score, self.match = performance, score, match
        plain = ~score.notes["grace"]
        self.plain = score.notes[plain]
        order = np.argsort(match.written, kind="stable")
        order = order[plain[match.written[order]]]
        played, written = performance.notes[match.played[order]], score.notes[match.written[order]]
        self._index = np.cumsum(plain)[match.written[order]] - 1
        self.at, self.length, self.staff = (
            written["onset"],
            written["duration"],
            written["staff"].astype(int),
        )
        self.onset, self.held = (
            played["onset"],
            np.maximum(played["offset"] - played["onset"], _SHORTEST),
        )
        self.pitch, self.velocity = played["pitch"].astype(float), played["velocity"].astype(float)
        self.notated = written["velocity"].astype(float)
        self.quarters, self.moment = np.unique(self.at, return_inverse=True)
        self.seconds = self.of_moments(self.onset)

    @cached_property
    def size(self) -> np.ndarray:
        """Number of matched notes of each onset, int (n_moments,)."""
        return np.bincount(self.moment)

    @cached_property
    def together(self) -> np.ndarray:
        """Whether a note shares its score onset with others, bool (n_matched,)."""
        return self.size[self.moment] > 1

    @cached_property
    def top(self) -> np.ndarray:
        """Whether a note is the highest in the score at its onset: the melody, bool
        (n_matched,)."""
        return self._extreme(np.maximum)

    @cached_property
    def bottom(self) -> np.ndarray:
        """Whether a note is the lowest in the score at its onset, bool (n_matched,)."""
        return self._extreme(np.minimum)

    def _extreme(self, which: np.ufunc) -> np.ndarray:
        notes = self.plain
        starts = np.flatnonzero(np.r_[True, np.diff(notes["onset"]) > 0])
        extreme = which.reduceat(notes["pitch"], starts)
        return self.pitch == extreme[np.searchsorted(starts, self._index, side="right") - 1]

    @cached_property
    def bass(self) -> np.ndarray:
        """Lowest pitch in the score that sounds at each onset, float (n_moments,)."""
        notes = self.plain
        onset, end, at = notes["onset"], notes["onset"] + notes["duration"], self.quarters[:, None]
        sounds = (onset <= at) & ((end > at + _SLACK) | (onset == at))
        return np.where(sounds, notes["pitch"].astype(float), np.inf).min(axis=1)

    @cached_property
    def beats(self) -> tuple[np.ndarray, np.ndarray]:
        """Bar and beat of each onset, see `Score.position`."""
        return self.score.position(self.quarters)

    @cached_property
    def downbeat(self) -> np.ndarray:
        """Whether an onset is a downbeat, bool (n_moments,)."""
        return self.beats[1] < 0.02

    @cached_property
    def on_beat(self) -> np.ndarray:
        """Whether an onset is on a beat, bool (n_moments,)."""
        return np.abs(self.beats[1] - np.round(self.beats[1])) < 0.02

    @cached_property
    def steps(self) -> np.ndarray:
        """Onsets used for tempo, (n, 2): seconds and quarters, see `alignment.spaced`; both
        ascending."""
        return alignment.spaced(self._rising, _STEP)

    @cached_property
    def _rising(self) -> np.ndarray:
        latest = np.maximum.accumulate(self.seconds)
        kept = np.r_[True, self.seconds[1:] > latest[:-1]]
        return np.stack([self.seconds[kept], self.quarters[kept]], axis=1)

    @cached_property
    def pace(self) -> np.ndarray:
        """Local tempo: log of quarters per second from each of ``steps`` to the next, (n - 1,)."""
        seconds, quarters = np.diff(self.steps, axis=0).T
        return np.log(quarters / seconds)

    @cached_property
    def middle(self) -> np.ndarray:
        """Midpoint of each of these steps in quarters, (n - 1,)."""
        return (self.steps[1:, 1] + self.steps[:-1, 1]) / 2

    def smooth(self, quarters: np.ndarray, width: float = LOCAL) -> np.ndarray:
        """Smooth log tempo at ``quarters``: the steps' mean under a Gaussian kernel, weighted by
        their duration."""
        weights = np.exp(-0.5 * ((quarters[:, None] - self.middle) / width) ** 2) * np.diff(
            self.steps[:, 1]
        )
        weights += 1e-12 * np.diff(self.steps[:, 1])  # far from all steps, use the overall mean
        return weights @ self.pace / weights.sum(axis=1)

    @cached_property
    def late(self) -> np.ndarray:
        """Delay of each note relative to the mean of its onset, seconds (n_matched,)."""
        return self.onset - self.seconds[self.moment]

    @cached_property
    def articulation(self) -> np.ndarray:
        """Log of the key-down time relative to the notated duration at the smooth tempo,
        (n_matched,)."""
        return np.log(self.held) - np.log(np.maximum(self.length, 1 / 16)) + self.smooth(self.at)

    def of_moments(self, values: np.ndarray, which: np.ndarray | None = None) -> np.ndarray:
        """Mean of ``values`` (n_matched,) at each onset over the notes selected by ``which``; NaN
        without notes."""
        which = np.ones(len(values), bool) if which is None else which
        count = np.bincount(self.moment[which], minlength=len(self.quarters)).astype(float)
        count[count == 0] = np.nan
        return np.bincount(self.moment[which], values[which], minlength=len(self.quarters)) / count


def mean(values: np.ndarray) -> float:
    """The mean of finite values; NaN without any."""
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else np.nan


def std(values: np.ndarray) -> float:
    """The standard deviation of finite values; NaN for fewer than two."""
    values = values[np.isfinite(values)]
    return float(values.std()) if len(values) > 1 else np.nan


def quantile(values: np.ndarray, share: float) -> float:
    """The quantile of finite values; NaN without any."""
    values = values[np.isfinite(values)]
    return float(np.quantile(values, share)) if len(values) else np.nan


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's r of finite pairs; NaN for fewer than four, or if either input is constant."""
    both = np.isfinite(x) & np.isfinite(y)
    if both.sum() < 4 or np.ptp(x[both]) < 1e-9 or np.ptp(y[both]) < 1e-9:
        return np.nan
    return _correlation(x[both], y[both])


def slope(x: np.ndarray, y: np.ndarray) -> float:
    """Change of ``y`` from the smallest to the largest ``x`` in a linear fit; NaN for fewer than
    three points or constant ``x``."""
    both = np.isfinite(x) & np.isfinite(y)
    if both.sum() < 3 or np.ptp(x[both]) < 1e-9:
        return np.nan
    return float(np.polyfit(x[both], y[both], 1)[0] * np.ptp(x[both]))


def arch(x: np.ndarray, y: np.ndarray) -> float:
    """Height of ``y`` in the middle above the ends in a quadratic fit; NaN for fewer than four
    points."""
    both = np.isfinite(x) & np.isfinite(y)
    if both.sum() < 4 or np.ptp(x[both]) < 1e-9:
        return np.nan
    return float(-np.polyfit(2 * (x[both] - x[both].min()) / np.ptp(x[both]) - 1, y[both], 2)[0])


def pattern(bars: np.ndarray, values: np.ndarray, positions: np.ndarray) -> float:
    """Share of the variance of ``values`` explained by the position in the bar; NaN for fewer than
    two bars."""
    ok = np.isfinite(values)
    if len(np.unique(bars[ok])) < 2 or np.ptp(values[ok]) < 1e-9:
        return np.nan
    numbers = np.unique(np.round(positions[ok], 2), return_inverse=True)[1]
    means = np.bincount(numbers, values[ok]) / np.bincount(numbers)
    return float(means[numbers].var() / values[ok].var())
