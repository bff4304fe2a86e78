"""Chords of a performance, its note alignment with a score, and its tempo curve."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from percepiano_ast.errors import InputError
from percepiano_ast.music.midi import Performance
from percepiano_ast.music.score import Score

CHORD = 0.05  # seconds: notes that start within this of a chord's first note belong to it
LEAST_MATCHED = 0.7  # minimum share of played notes that match the score
STEP = 0.2  # minimum seconds between anchors of a tempo curve: closer ones reflect ornaments
_AROUND = 4  # chords on either side that determine the expected time of a chord
# maximum seconds between a note and its expected time: from chord anchors, from note anchors
_WIDE, _NARROW = 1.0, 0.4


def chords(notes: np.ndarray) -> np.ndarray:
    """Index of the chord of each of ``notes`` (sorted by onset), int (n,), from 0.

    A chord consists of a note and the notes within ``CHORD`` seconds after its onset, each key
    once.
    """
    numbers: list[int] = []
    keys: set[int] = set()
    start, number = -np.inf, -1
    for onset, pitch in notes[["onset", "pitch"]].tolist():
        if onset - start > CHORD or pitch in keys:
            number, start, keys = number + 1, onset, set()
        keys.add(pitch)
        numbers.append(number)
    return np.array(numbers, int)


def chord_means(values: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Mean of ``values`` (n,) over each note's chord, float (n,)."""
    return (np.bincount(numbers, values) / np.bincount(numbers))[numbers]


def match_notes(played: np.ndarray, written: np.ndarray) -> np.ndarray:
    """Note alignment of a performance with its score, one to one: indices, int (n, 2), by onset.

    First whole chords are aligned, so that repeated motifs are not confused: the order-preserving
    alignment with the most common keys (Needleman and Wunsch 1970, without gap costs). It predicts
    the time of each score note. Near that time, the notes of each key are aligned separately, which
    handles arpeggios, crossed hands and grace notes (after Gingras and McAdams 2011, J. New Music
    Research 40(1); Peter et al. 2023, ISMIR).

    Args:
        played, written: with ``onset`` and ``pitch``, sorted by onset; ``written`` in any unit.
    """
    ours, theirs = chords(played), np.unique(written["onset"], return_inverse=True)[1]
    has_key = np.zeros((128, theirs.max() + 1), np.int32)  # of each chord of the score
    has_key[written["pitch"], theirs] = 1
    begins = np.searchsorted(ours, np.arange(ours[-1] + 2))  # the first note of each chord
    moments = np.unique(written["onset"])

    def common_keys(i: int) -> np.ndarray:
        return has_key[played["pitch"][begins[i] : begins[i + 1]]].sum(axis=0, dtype=np.int32)

    anchors = []
    for i, j in _in_order(common_keys, 0, (len(begins) - 1, len(moments))):
        chord = played[begins[i] : begins[i + 1]]
        anchors.append((chord["onset"][has_key[chord["pitch"], j] > 0].mean(), moments[j]))
    if not anchors:
        return np.zeros((0, 2), dtype=int)
    # Smoothing corrects chord anchors that are off by one chord in repeated notes.
    expected = _expected(_smoothed(np.array(anchors)), written["onset"])
    pairs = _by_key(played, written, expected, _WIDE)
    # A second pass uses the matched notes of all keys as anchors, not only whole chords.
    found = _moments(played, written, pairs)
    if not len(found):
        return pairs
    return _by_key(played, written, _expected(found, written["onset"]), _NARROW)


class Alignment(NamedTuple):
    """Indices, int (n,), of matched notes in the order of the performance (``played`` and
    ``written``), of played notes that are not in the score, and of score notes that are missing."""

    played: np.ndarray
    written: np.ndarray
    extra: np.ndarray
    missing: np.ndarray

    @property
    def share(self) -> float:
        """Share of the played notes that are in the score."""
        return len(self.played) / (len(self.played) + len(self.extra))


def align(performance: Performance, score: Score) -> Alignment:
    """Align note by note, see `match_notes`; other music is not refused here, see `check_share`."""
    played, written = match_notes(performance.notes, score.notes).T
    extra = np.setdiff1d(np.arange(len(performance.notes)), played)
    return Alignment(played, written, extra, np.setdiff1d(np.arange(len(score.notes)), written))


class TempoCurve(NamedTuple):
    """Aligned onsets of a performance and its metronomic score in seconds, ascending, (n,), n at
    least 3; and the share of played notes that match the score."""

    played: np.ndarray
    written: np.ndarray
    matched: float

    @property
    def rubato(self) -> float:
        """Standard deviation of log local tempo; 0 for a metronome."""
        return float(np.std(np.log(np.diff(self.written) / np.diff(self.played))))

    def stretched(self, times: np.ndarray, rubato: float) -> np.ndarray:
        """``times`` in seconds, warped so that deviations of log tempo are scaled by ``rubato``;
        those before the first and after the last anchor are unchanged."""
        steps, written = np.diff(self.played), np.diff(self.written)
        steps = written * (steps / written) ** rubato
        steps *= (self.played[-1] - self.played[0]) / steps.sum()
        moved = self.played[0] + np.concatenate([[0], np.cumsum(steps)])
        moved[-1] = self.played[-1]
        inside = np.clip(times, self.played[0], self.played[-1])
        return np.interp(inside, self.played, moved) + (times - inside)


def tempo_curve(performance: Performance, score: Performance) -> TempoCurve:
    """Align a performance with a metronomic rendering of its score, see `match_notes`; the onset of
    a chord is the mean onset of its matched notes.

    Raises:
        InputError: less than ``LEAST_MATCHED`` of the played notes are in the score, or fewer than
            three onsets remain.
    """
    written = score.notes.copy()
    written["onset"] = chord_means(written["onset"], chords(written))
    pairs = match_notes(performance.notes, written)
    check_share(share := len(pairs) / len(performance.notes))
    moments = spaced(_moments(performance.notes, written, pairs))
    if len(moments) < 3:
        raise InputError(
            f"{len(moments)} onsets of the score match the performance, a tempo curve needs 3. Give"
            " a longer clip."
        )
    return TempoCurve(moments[:, 0], moments[:, 1], share)


def check_share(share: float) -> None:
    """Raise an `InputError` if less than ``LEAST_MATCHED`` of the played notes are in the score."""
    if share < LEAST_MATCHED:
        raise InputError(
            f"{share:.1%} of the notes are in the score, {LEAST_MATCHED:.0%} are needed. Give the"
            " matching score."
        )


def spaced(moments: np.ndarray, least: float = STEP) -> np.ndarray:
    """The rows of ``moments`` (n, 2), played and written, far enough from the previous one to
    measure tempo: ``STEP`` seconds in the performance, ``least`` in the score."""
    rows = [0] if len(moments) else []
    for i in range(1, len(moments)):
        if (moments[i] - moments[rows[-1]] >= (STEP, least)).all():
            rows.append(i)
    return moments[rows]


def _in_order(
    gain: Callable[[int], np.ndarray], base: float, shape: tuple[int, int]
) -> list[tuple[int, int]]:
    """The order-preserving pairs of rows and columns with the largest sum of ``base + gain`` (pairs
    that add nothing excluded), by dynamic programming.

    Args:
        gain: of a row, (columns,); rows are computed one at a time.
        shape: numbers of rows and columns. Two bits of each pair are stored: 100 MB for 20,000 of
            both.
    """
    n, m = shape
    best = np.zeros(m + 1, gain(0).dtype)
    # whether the best sum up to a row and column is that without the row, or without the column
    without_row = np.zeros((n, m // 8 + 1), np.uint8)
    without_column = np.zeros_like(without_row)
    for i in range(n):
        paired = best[:-1] + base + gain(i)
        following = np.maximum.accumulate(np.maximum(best[1:], paired))
        without_row[i] = np.packbits(np.append(following == best[1:], False))
        before = np.concatenate([best[:1], following[:-1]])
        without_column[i] = np.packbits(np.append(following == before, False))
        best[1:] = following
    pairs, i, j = [], n, m
    while i and j:
        bit = 128 >> (j - 1) % 8
        if without_row[i - 1, (j - 1) // 8] & bit:
            i -= 1
        elif without_column[i - 1, (j - 1) // 8] & bit:
            j -= 1
        else:
            i, j = i - 1, j - 1
            pairs.append((i, j))
    return pairs[::-1]


def _smoothed(moments: np.ndarray) -> np.ndarray:
    """``moments`` (n, 2) with played onsets replaced by a local linear fit over ``_AROUND``
    neighbours on either side."""
    if len(moments) <= 2 * _AROUND:
        return moments
    windows = np.lib.stride_tricks.sliding_window_view(moments, 2 * _AROUND + 1, axis=0)
    played, written = windows.transpose(1, 0, 2)
    middles = [part.mean(axis=1, keepdims=True) for part in (played, written)]
    covariance = ((played - middles[0]) * (written - middles[1])).sum(axis=1)
    slopes = covariance / ((written - middles[1]) ** 2).sum(axis=1)
    at = np.clip(np.arange(len(moments)) - _AROUND, 0, len(slopes) - 1)
    lines = middles[0][at, 0] + slopes[at] * (moments[:, 1] - middles[1][at, 0])
    return np.stack([np.maximum.accumulate(lines), moments[:, 1]], axis=1)


def _expected(moments: np.ndarray, onsets: np.ndarray) -> np.ndarray:
    """Times of score ``onsets``: interpolated between ``moments``, beyond them at mean tempo."""
    played, written = moments.T
    inside = np.clip(onsets, written[0], written[-1])
    pace = np.ptp(played) / np.ptp(written) if len(moments) > 1 else 0.0
    return np.interp(inside, written, played) + (onsets - inside) * pace


def _moments(played, written, pairs) -> np.ndarray:
    """Mean played onset of the matched notes of each score onset, and that onset, (n, 2)."""
    if not len(pairs):
        return np.zeros((0, 2))
    at, numbers = np.unique(written["onset"][pairs[:, 1]], return_inverse=True)
    when = np.bincount(numbers, played["onset"][pairs[:, 0]]) / np.bincount(numbers)
    # Drop wrong matches that would make time run backwards.
    rising = np.r_[True, when[1:] > np.maximum.accumulate(when)[:-1]]
    return np.stack([when, at], axis=1)[rising]


def _by_key(played, written, expected: np.ndarray, reach: float) -> np.ndarray:
    """Align the notes of each key separately, in order: as many as possible within ``reach`` of
    their expected times, and as close to them as possible."""
    found = []
    for pitch in np.intersect1d(played["pitch"], written["pitch"]):
        ours, theirs = (np.flatnonzero(part["pitch"] == pitch) for part in (played, written))
        onsets, times = played["onset"][ours], expected[theirs]

        def nearness(i: int, onsets=onsets, times=times) -> np.ndarray:
            return -np.abs(onsets[i] - times)

        pairs = _in_order(nearness, reach, (len(ours), len(theirs)))
        found += [(ours[i], theirs[j]) for i, j in pairs]
    matched = np.array(found, dtype=int).reshape(-1, 2)
    return matched[np.lexsort((matched[:, 1], matched[:, 0]))]
