"""Tempo estimation without a score: the most likely note values and tempo curve, given the chord
onsets.

A longer inter-onset interval may be a longer note or a slower tempo. A hidden Markov model
estimates both jointly, after Raphael (2002), Artificial Intelligence 137 ("A hybrid graphical model
for rhythmic parsing"). Its state is the tempo and the note value of a step. Tempo changes little
from step to step; note values repeat or change by simple ratios, and simple values are more likely.
The Viterbi algorithm finds the most likely path. Values are relative: a half at double tempo is a
quarter.

Constants and descriptors were chosen by their agreement with score-informed tempo on PercePiano
(`score.tempo`), without using ratings.
"""

import functools
from typing import NamedTuple

import numpy as np
from scipy.special import entr

from percepiano_ast.descriptors.view import Descriptor, View

_LEAST = 4  # up to this many chords, the tempo descriptors are 0
# note values in units of the tempo
_VALUES = np.log([1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 3 / 4, 1, 1.5, 2, 3, 4, 6, 8])
# rarity of each value relative to the unit
_RARE = np.array([4, 2.5, 3, 1.2, 3.5, 3, 0, 2, 0.8, 2, 1.5, 3, 3])
_PRIOR, _AGAIN = 0.8, 0.24  # cost of rarity in nats at the first step, and at every later step
# cost of an initial unit that differs from the median interval, times the squared log ratio
_NEAR = 0.3
_DOUBLED, _OTHER = 0.9, 1.6  # cost of a change of value by a power of two; cost of any other change
_LEVEL = 0.03  # spacing of log tempo levels
_FARTHEST = 40  # maximum distance in levels of the tempo from one unit per median interval
_JUMP = 10  # maximum change in levels per step
_WANDER = 0.06  # mean change of log tempo in a quarter of a second
_LOOSE, _JITTER = 0.1, 0.012  # standard deviation of a step: relative, and per onset in seconds
_OUTLIER = 30.0  # upper limit of squared deviations
_FIRST, _FINAL = 0.2, 0.8  # shares of a clip: end of its beginning, and start of its end

TABLE = {
    "tempo_std": Descriptor(
        "log", "standard deviation of estimated log tempo over time; 0 for fewer than five chords"
    ),
    "tempo_jumps": Descriptor(
        "log", "0.9 quantile of the absolute change of estimated tempo per step; 0 as above"
    ),
    "tempo_travel": Descriptor(
        "log/s", "sum of absolute changes of estimated tempo, per second; 0 as above"
    ),
    "tempo_first": Descriptor(
        "log", "estimated tempo of the first fifth relative to the rest; 0 as above"
    ),
    "tempo_final": Descriptor(
        "log", "estimated tempo of the last fifth relative to the rest; 0 as above"
    ),
    "rhythm_likelihood": Descriptor(
        "nats", "log-likelihood of the most likely path, per step; 0 as above"
    ),
    "rhythm_variety": Descriptor("nats", "entropy of the estimated note values; 0 as above"),
    "rhythm_repeats": Descriptor(
        "", "share of steps with the same estimated value as the previous one; 0 as above"
    ),
}


class Guess(NamedTuple):
    """Estimated tempo and note values of n steps between chords.

    Attributes:
        pace: log of units per second, (n,).
        value: index of the note value in ``_VALUES``, int (n,).
        likelihood: log-likelihood of the path.
    """

    pace: np.ndarray
    value: np.ndarray
    likelihood: float


def measure(view: View) -> dict[str, float]:
    """The descriptors of ``TABLE``."""
    if len(view.start) <= _LEAST:
        return dict.fromkeys(TABLE, 0.0)
    steps = view.between
    pace, value, likelihood = guess(steps)
    weight = steps / steps.sum()
    place = np.cumsum(weight) - weight / 2
    changes = np.abs(np.diff(pace))
    shares = np.bincount(value) / len(value)
    return {
        "tempo_std": np.sqrt(weight @ (pace - weight @ pace) ** 2),
        "tempo_jumps": np.quantile(changes, 0.9),
        "tempo_travel": changes.sum() / steps.sum(),
        "tempo_first": _over(pace, place < _FIRST),
        "tempo_final": _over(pace, place > _FINAL),
        "rhythm_likelihood": likelihood / len(steps),
        "rhythm_variety": entr(shares).sum(),
        "rhythm_repeats": np.mean(value[1:] == value[:-1]),
    }


def _over(pace: np.ndarray, part: np.ndarray) -> float:
    return float(pace[part].mean() - pace[~part].mean()) if part.any() and not part.all() else 0.0


def guess(steps: np.ndarray) -> Guess:
    """The most likely tempo and note values of steps in seconds, (n,), n at least 2."""
    log, levels = np.log(steps), _LEVEL * np.arange(-_FARTHEST, _FARTHEST + 1)
    period = np.median(log) + levels  # log of seconds per unit
    change, rare = _changes()
    jumps = _jumps((steps[1:] + steps[:-1]) / 2)
    best = [_fit(log[0], steps[0], period) - rare[:, None] - _NEAR * levels**2]
    for number, jump in enumerate(jumps, 1):
        best.append(_reached(best[-1], change, jump) + _fit(log[number], steps[number], period))
    path = [np.unravel_index(best[-1].argmax(), best[-1].shape)]
    for before, jump in zip(best[-2::-1], jumps[::-1], strict=True):
        path.append(_origin(before, change, jump, *path[-1]))
    values, chosen = np.array(path[::-1]).T
    return Guess(-period[chosen], values, float(best[-1].max()))


def _fit(log: float, step: float, period: np.ndarray) -> np.ndarray:
    """Log likelihood of a step with every note value at every tempo, (values, levels)."""
    deviation = np.sqrt(_LOOSE**2 + 2 * (_JITTER / step) ** 2)
    away = (log - period - _VALUES[:, None]) / deviation
    return -np.minimum(away**2, _OUTLIER) / 2 - np.log(deviation)


def _jumps(seconds: np.ndarray) -> np.ndarray:
    """Cost of tempo changes by -_JUMP to _JUMP levels after ``seconds`` (n,), (n, 2 _JUMP + 1)."""
    wander = _WANDER * np.sqrt(np.clip(seconds / 0.25, 0.3, 4))[:, None]
    return np.abs(np.arange(-_JUMP, _JUMP + 1)) * _LEVEL / wander + np.log(2 * wander)


def _reached(best: np.ndarray, change: np.ndarray, jump: np.ndarray) -> np.ndarray:
    """Viterbi step: log-likelihood of the best path to every state, given that of the previous
    states, both (values, levels)."""
    valued = (best[:, None] - change[:, :, None]).max(axis=0)
    padded = np.full((len(valued), valued.shape[1] + 2 * _JUMP), -np.inf)
    padded[:, _JUMP:-_JUMP] = valued
    shifted = np.lib.stride_tricks.sliding_window_view(padded, valued.shape[1], axis=1)
    return (shifted - jump[:, None]).max(axis=1)


def _origin(
    best: np.ndarray, change: np.ndarray, jump: np.ndarray, value: int, level: int
) -> tuple[int, int]:
    """Viterbi backtracking: the previous state on the best path to a note value and tempo level."""
    first, end = max(level - _JUMP, 0), level + _JUMP + 1
    near = best[:, first:end]
    ways = near - change[:, value, None] - jump[first - level + _JUMP :][: near.shape[1]]
    before, away = np.unravel_index(ways.argmax(), ways.shape)
    return before, first + away


@functools.cache
def _changes() -> tuple[np.ndarray, np.ndarray]:
    """Cost of a transition between note values, (values, values), and of each initial value,
    (values,)."""
    octaves = (_VALUES[:, None] - _VALUES) / np.log(2)
    whole = np.abs(octaves - np.round(octaves)) < 1e-6
    kind = np.where(np.abs(octaves) < 1e-6, 0.0, np.where(whole, _DOUBLED, _OTHER))
    return kind + _AGAIN * _RARE, _PRIOR * _RARE
