"""The score as a second input: what is written, where the playing is in it, and how the playing differs from it.

``read(path)`` takes a score from MIDI or MusicXML, ``match(performance, score)`` says which note is which, and
``features.describe(performance, score)`` gives numbers that are told only with the score. A model that is given them sees
more than sound: its name ends in ``+score`` and it stands beside audio alone, never instead.
"""

from percepiano_ast.score import features
from percepiano_ast.score.matching import Match, match
from percepiano_ast.score.reading import Score, read

__all__ = ["Match", "Score", "features", "match", "read"]
