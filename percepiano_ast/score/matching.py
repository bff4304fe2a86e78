"""Note alignment of a performance with its score."""

from dataclasses import dataclass

import numpy as np

from percepiano_ast import alignment
from percepiano_ast.performance import Performance
from percepiano_ast.score.reading import Score


@dataclass(frozen=True, eq=False)
class Match:
    """Note alignment of a performance and its score.

    Attributes:
        played, written: indices of the matched notes, int (n,), in the order of the performance.
        extra: indices of played notes that are not in the score, int: wrong notes, ornaments,
            slips.
        missing: indices of score notes that are not played, int.
    """

    played: np.ndarray
    written: np.ndarray
    extra: np.ndarray
    missing: np.ndarray

    @property
    def share(self) -> float:
        """Share of the played notes that are in the score."""
        return len(self.played) / (len(self.played) + len(self.extra))


def match(performance: Performance, score: Score) -> Match:
    """Align note by note, see `alignment.match`; the notes may come from a MIDI file or a
    transcription.

    A performance of other music is not refused here: check ``share``.
    """
    played, written = alignment.match(performance.notes, score.notes).T
    extra = np.setdiff1d(np.arange(len(performance.notes)), played)
    return Match(played, written, extra, np.setdiff1d(np.arange(len(score.notes)), written))
