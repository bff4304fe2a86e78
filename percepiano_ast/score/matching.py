"""Which played note is which written one."""

from dataclasses import dataclass

import numpy as np

from percepiano_ast import alignment
from percepiano_ast.performance import Performance
from percepiano_ast.score.reading import Score


@dataclass(frozen=True, eq=False)
class Match:
    """The notes of a performance and of its score that belong together.

    Attributes:
        played, written: indices of the matched notes, int (n,), in order of playing.
        extra: indices of played notes that are not written, int; wrong notes, ornaments, slips.
        missing: indices of written notes that are not played, int.
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
    """Align note by note, see `alignment.match`; the notes may be a MIDI file's or decoded from sound.

    A performance of something else is matched badly and not refused here: look at ``share``.
    """
    played, written = alignment.match(performance.notes, score.notes).T
    extra = np.setdiff1d(np.arange(len(performance.notes)), played)
    return Match(played, written, extra, np.setdiff1d(np.arange(len(score.notes)), written))
