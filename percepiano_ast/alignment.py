"""Chords of a performance, and where a performance is in its score: the ground that timing is measured on."""

from dataclasses import dataclass

import numpy as np

from percepiano_ast.config import InputError
from percepiano_ast.performance import Performance

CHORD = 0.05  # seconds: notes that begin within this of a chord's first note belong to it
LEAST_MATCHED = 0.7  # share of the played notes that must be found in the score
_STEP = 0.2  # seconds between anchors of a tempo curve: closer ones tell of ornaments and touch, not of tempo


def chords(notes: np.ndarray) -> np.ndarray:
    """Number of the chord that each note belongs to, int (n,), counted from 0 in order of onset.

    A chord begins with a note and takes what follows within ``CHORD`` seconds of it, each key once.

    Args:
        notes: of dtype ``performance.NOTE``, sorted by onset.
    """
    numbers, start, keys = np.zeros(len(notes), dtype=int), -np.inf, set()
    number = -1
    for i, (onset, pitch) in enumerate(zip(notes["onset"].tolist(), notes["pitch"].tolist(), strict=True)):
        if onset - start > CHORD or pitch in keys:
            number, start, keys = number + 1, onset, set()
        keys.add(pitch)
        numbers[i] = number
    return numbers


def chord_means(values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Mean of ``values`` (n,) over each note's chord, float (n,)."""
    return (np.bincount(numbers, values) / np.bincount(numbers))[numbers]


@dataclass(frozen=True)
class TempoCurve:
    """Moments of a performance and of its metronomic score that belong together, both rising.

    Attributes:
        played, written: seconds, (n,), n at least 3.
        matched: share of the played notes that were found in the score.
    """

    played: np.ndarray
    written: np.ndarray
    matched: float

    @property
    def rubato(self) -> float:
        """Standard deviation of the logarithm of local tempo; 0 for a metronome."""
        return float(np.std(np.log(np.diff(self.written) / np.diff(self.played))))

    def stretched(self, times: np.ndarray, rubato: float) -> np.ndarray:
        """``times`` in seconds moved as if rubato, the deviation of log tempo, were ``rubato`` times what it is.

        The first and the last anchor stay where they are, and so does what lies before and after them.
        """
        steps, written = np.diff(self.played), np.diff(self.written)
        steps = written * (steps / written) ** rubato
        steps *= (self.played[-1] - self.played[0]) / steps.sum()
        moved = self.played[0] + np.concatenate([[0], np.cumsum(steps)])
        moved[-1] = self.played[-1]
        inside = np.clip(times, self.played[0], self.played[-1])
        return np.interp(inside, self.played, moved) + (times - inside)


def tempo_curve(performance: Performance, score: Performance) -> TempoCurve:
    """Align a performance with a metronomic rendition of its score, chord by chord.

    The alignment is the one that keeps the order and has the most keys in common (Needleman and Wunsch 1970, no cost for
    what is left out). A chord is played where the mean of its matched notes is.

    Raises:
        InputError: less than ``LEAST_MATCHED`` of the played notes are in the score, or fewer than three moments remain.
    """
    ours, theirs = (chords(one.notes) for one in (performance, score))
    pairs, matched = _pairs(performance.notes, ours, score.notes, theirs)
    share = matched / len(performance.notes)
    if share < LEAST_MATCHED:
        raise InputError(f"{share:.0%} of the notes are in the score, {LEAST_MATCHED:.0%} are needed; give its own score.")
    kept = pairs[:1]
    for pair in pairs[1:]:
        if min(pair[0] - kept[-1][0], pair[1] - kept[-1][1]) >= _STEP:
            kept.append(pair)
    if len(kept) < 3:
        raise InputError(f"{len(kept)} moments of the score are found in it, a tempo curve needs 3; give a longer clip.")
    played, written = np.array(kept).T
    return TempoCurve(played, written, share)


def _pairs(notes, ours, score, theirs) -> tuple[list[tuple[float, float]], int]:
    """(seconds played, seconds written) of the chords that belong together, and how many notes they share."""
    keys = [[set(part["pitch"][numbers == k].tolist()) for k in range(numbers[-1] + 1)]
            for part, numbers in ((notes, ours), (score, theirs))]  # fmt: skip
    common = np.array([[len(a & b) for b in keys[1]] for a in keys[0]])
    n, m = common.shape
    best = np.zeros((n + 1, m + 1), dtype=int)
    for i in range(n):
        found = np.maximum(best[i, 1:], best[i, :-1] + common[i])
        best[i + 1, 1:] = np.maximum.accumulate(found)
    pairs, i, j = [], n, m
    while i and j:
        if best[i, j] == best[i - 1, j]:
            i -= 1
        elif best[i, j] == best[i, j - 1]:
            j -= 1
        else:
            i, j = i - 1, j - 1
            pairs.append((_moment(notes, ours, i, keys[1][j]), _moment(score, theirs, j, keys[0][i])))
    return pairs[::-1], int(best[n, m])


def _moment(notes: np.ndarray, numbers: np.ndarray, chord: int, shared: set[int]) -> float:
    """Mean onset of the notes of one chord whose key is in ``shared``."""
    members = notes[numbers == chord]
    return float(members["onset"][np.isin(members["pitch"], list(shared))].mean())
