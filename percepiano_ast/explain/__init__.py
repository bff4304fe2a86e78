"""Why a recording got its rating: maps over time and frequency, the seconds and the notes that moved it, and checks.

A map compares the recording with a baseline that has nothing to say and shares the difference of the two ratings out among
the points of the spectrogram: +.004 at a point says that what is heard there raised the rating by .004. The baseline
decides what "nothing" is. ``mean`` is the recording's own mean level in every band: the same loudness and colour, and no
event in time. Pauses differ from it most, so an end without resonance counts. ``silence`` is the floor of the front end:
then loudness itself is explained and pauses get nothing, but holes of silence are sounds that no model was trained on
(with the demo's, cells silenced at random often took a rating beyond that of silence itself).

What a map says is true of the model and its baseline; whether it points at what matters is measured, see `explain.checks`.

Cost: integrated gradients of one dimension take 32 steps x windows x fold models, 128 where the model is uneven. With the
base size that is about 5 seconds a step and window on two busy CPU cores, in 6 GB: half an hour for 20 seconds of music and
four folds. A GPU is the place for it.
"""

from percepiano_ast.explain.maps import BASELINES, METHODS, SECONDS, Excerpt, Explainer, Explanation, Recording
from percepiano_ast.explain.notes import note_table

__all__ = ["BASELINES", "METHODS", "SECONDS", "Excerpt", "Explainer", "Explanation", "Recording", "note_table"]
