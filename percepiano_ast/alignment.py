"""Chords of a performance, and where a performance is in its score: the ground that timing is measured on."""

from dataclasses import dataclass

import numpy as np

from percepiano_ast.config import InputError
from percepiano_ast.performance import Performance

CHORD = 0.05  # seconds: notes that begin within this of a chord's first note belong to it
LEAST_MATCHED = 0.7  # share of the played notes that must be found in the score
STEP = 0.2  # seconds between anchors of a tempo curve: closer ones tell of ornaments and touch, not of tempo
_AROUND = 4  # chords on either side that say where one is expected
_WIDE, _NARROW = 1.0, 0.4  # seconds from where it is expected that a note may be: by whole chords, by notes


def chords(notes: np.ndarray) -> np.ndarray:
    """Number of the chord that each note belongs to, int (n,), counted from 0 in order of onset.

    A chord begins with a note and takes what follows within ``CHORD`` seconds of it, each key once.

    Args:
        notes: of dtype ``performance.NOTE``, sorted by onset.
    """
    numbers, start, number = np.zeros(len(notes), dtype=int), -np.inf, -1
    keys: set[int] = set()
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


def match(played: np.ndarray, written: np.ndarray) -> np.ndarray:
    """Which note of a performance is which note of its score, each of either at most once: indices, int (n, 2), by onset.

    Whole chords first, so that a motif that returns is not confused with itself: the alignment that keeps the order and has
    the most keys in common (Needleman and Wunsch 1970, no cost for what is left out). It says when a note of the score is
    about to be played; around that moment each key is aligned by itself, so that arpeggios, crossed hands and grace notes
    keep their notes (after Gingras and McAdams 2011, J. New Music Research 40(1); Peter et al. 2023, ISMIR).

    Args:
        played: fields ``onset`` in seconds and ``pitch``, sorted by onset.
        written: the same of the score; its onsets in any unit that grows with time (seconds, quarter notes).
    """
    ours, theirs = chords(played), np.unique(written["onset"], return_inverse=True)[1]
    anchors = _anchors(played, ours, written, theirs)
    if not len(anchors):
        return np.zeros((0, 2), dtype=int)
    # Where a key is struck again and again, chords are found one too early or late as well: neighbours know better.
    pairs = _by_key(played, written, _expected(_smoothed(anchors), written["onset"]), _WIDE)
    # Once more from what was found: now notes of every key tell when, each for itself, not whole chords alone.
    found = _moments(played, written, pairs)
    return _by_key(played, written, _expected(found, written["onset"]), _NARROW) if len(found) else pairs


def tempo_curve(performance: Performance, score: Performance) -> TempoCurve:
    """Align a performance with a metronomic rendition of its score, see `match`.

    A chord is played where the mean of its matched notes is.

    Raises:
        InputError: less than ``LEAST_MATCHED`` of the played notes are in the score, or fewer than three moments remain.
    """
    written = score.notes.copy()
    written["onset"] = chord_means(written["onset"], chords(written))
    pairs = match(performance.notes, written)
    check_share(share := len(pairs) / len(performance.notes))
    moments = spaced(_moments(performance.notes, written, pairs))
    if len(moments) < 3:
        raise InputError(f"{len(moments)} moments of the score are found in it, a tempo curve needs 3; give a longer clip.")
    return TempoCurve(moments[:, 0], moments[:, 1], share)


def check_share(share: float) -> None:
    """Refuse a performance of something else.

    Raises:
        InputError: less than ``LEAST_MATCHED`` of the played notes are in the score.
    """
    if share < LEAST_MATCHED:
        raise InputError(f"{share:.1%} of the notes are in the score, {LEAST_MATCHED:.0%} are needed; give its own score.")


def spaced(moments: np.ndarray, least: float = STEP) -> np.ndarray:
    """Those of ``moments`` (n, 2), played and written, that are far enough from the one before to tell of tempo.

    Args:
        least: distance in the score, in its unit; ``STEP`` is that in playing.
    """
    kept = [0] if len(moments) else []
    for i in range(1, len(moments)):
        if moments[i, 0] - moments[kept[-1], 0] >= STEP and moments[i, 1] - moments[kept[-1], 1] >= least:
            kept.append(i)
    return moments[kept]


def _anchors(played, ours, written, theirs) -> np.ndarray:
    """Moments (played, written) of the chords that belong together, (n, 2), both rising."""
    keys = []
    for part, numbers in ((played, ours), (written, theirs)):
        present = np.zeros((numbers.max() + 1, 128), np.float32)
        present[numbers, part["pitch"]] = 1
        keys.append(present)
    common = (keys[0] @ keys[1].T).astype(np.int32)
    n, m = common.shape
    best = np.zeros((n + 1, m + 1), np.int32)
    for i in range(n):
        best[i + 1, 1:] = np.maximum.accumulate(np.maximum(best[i, 1:], best[i, :-1] + common[i]))
    pairs, i, j = [], n, m
    while i and j:
        if best[i, j] == best[i - 1, j]:
            i -= 1
        elif best[i, j] == best[i, j - 1]:
            j -= 1
        else:
            i, j = i - 1, j - 1
            members = (ours == i) & (keys[1][j, played["pitch"]] > 0)
            pairs.append((played["onset"][members].mean(), written["onset"][theirs == j][0]))
    return np.array(pairs[::-1]).reshape(-1, 2)


def _smoothed(moments: np.ndarray) -> np.ndarray:
    """``moments`` (n, 2) as played on the straight lines through their neighbours, ``_AROUND`` on either side."""
    if len(moments) <= 2 * _AROUND:
        return moments
    played, written = np.lib.stride_tricks.sliding_window_view(moments, 2 * _AROUND + 1, axis=0).transpose(1, 0, 2)
    middles = [part.mean(axis=1, keepdims=True) for part in (played, written)]
    slopes = ((played - middles[0]) * (written - middles[1])).sum(axis=1) / ((written - middles[1]) ** 2).sum(axis=1)
    at = np.clip(np.arange(len(moments)) - _AROUND, 0, len(slopes) - 1)
    lines = middles[0][at, 0] + slopes[at] * (moments[:, 1] - middles[1][at, 0])
    return np.stack([np.maximum.accumulate(lines), moments[:, 1]], axis=1)


def _expected(moments: np.ndarray, onsets: np.ndarray) -> np.ndarray:
    """When notes written at ``onsets`` are about to be played: between ``moments`` in proportion, beyond them at mean tempo."""
    played, written = moments.T
    inside = np.clip(onsets, written[0], written[-1])
    pace = np.ptp(played) / np.ptp(written) if len(moments) > 1 else 0.0
    return np.interp(inside, written, played) + (onsets - inside) * pace


def _moments(played, written, pairs) -> np.ndarray:
    """Mean onset of the matched notes of each written moment and that moment, (n, 2), both rising."""
    if not len(pairs):
        return np.zeros((0, 2))
    at, numbers = np.unique(written["onset"][pairs[:, 1]], return_inverse=True)
    when = np.bincount(numbers, played["onset"][pairs[:, 0]]) / np.bincount(numbers)
    # A stray match that is played before what is written earlier would turn time back.
    rising = np.r_[True, when[1:] > np.maximum.accumulate(when)[:-1]]
    return np.stack([when, at], axis=1)[rising]


def _by_key(played, written, expected: np.ndarray, reach: float) -> np.ndarray:
    """Align the notes of each key by itself: in order, most of them, and those least far from where they are expected."""
    found = []
    for pitch in np.intersect1d(played["pitch"], written["pitch"]):
        ours, theirs = np.flatnonzero(played["pitch"] == pitch), np.flatnonzero(written["pitch"] == pitch)
        away = np.abs(played["onset"][ours][:, None] - expected[theirs])
        found += [(ours[i], theirs[j]) for i, j in _nearest(away.tolist(), reach)]
    pairs = np.array(found, dtype=int).reshape(-1, 2)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def _nearest(away: list[list[float]], reach: float) -> list[tuple[int, int]]:
    """The pairs in order of the greatest sum of ``reach - away``; pairs farther than ``reach`` never count."""
    n, m = len(away), len(away[0])
    best = [[0.0] * (m + 1) for _ in range(n + 1)]
    for i in range(n):
        for j in range(m):
            gain = best[i][j] + reach - away[i][j] if away[i][j] < reach else 0.0
            best[i + 1][j + 1] = max(gain, best[i][j + 1], best[i + 1][j])
    pairs, i, j = [], n, m
    while i and j:
        if best[i][j] == best[i - 1][j]:
            i -= 1
        elif best[i][j] == best[i][j - 1]:
            j -= 1
        else:
            i, j = i - 1, j - 1
            pairs.append((i, j))
    return pairs
