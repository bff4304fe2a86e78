"""The score as an optional second input: reading, note alignment, and score-informed features.

``read(path)`` reads a score from MIDI or MusicXML, ``match(performance, score)`` aligns notes, and
``features.describe(performance, score)`` computes the features. The names of score-informed models
end in ``+score``; they are reported in addition to audio-only models, never in place of them.
"""

from percepiano_ast.score import features
from percepiano_ast.score.matching import Match, match
from percepiano_ast.score.reading import Score, read

__all__ = ["Match", "Score", "features", "match", "read"]
