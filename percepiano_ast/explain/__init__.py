"""Explanations of ratings: attribution maps over time and frequency, contributions of seconds and
notes, and checks.

A map attributes the difference between the ratings of the recording and of a baseline to the points
of the spectrogram: +0.004 at a point means that it raised the rating by 0.004. The map depends on
the baseline. ``mean`` is the recording's mean level in every band: the same loudness and timbre,
without events in time. Pauses differ from it most, so an ending without resonance contributes.
``silence`` is the lowest level of the front end: it attributes loudness itself, and pauses
contribute nothing, but spectrograms with silent holes are outside the training distribution (for
the demo's model, silencing random cells often moved the rating beyond that of complete silence).

A map describes the model relative to the baseline; `explain.checks` measures whether it points at
the relevant sounds.

Cost: integrated gradients of one dimension take 32 steps x windows x fold models, and up to 128
steps for a highly non-linear model. The base size takes about 5 seconds per step and window on two
busy CPU cores, and 6 GB of memory: half an hour for 20 seconds of music and four folds. Use a GPU.
"""

from percepiano_ast.explain.maps import (
    BASELINES,
    METHODS,
    SECONDS,
    Excerpt,
    Explainer,
    Explanation,
    Recording,
)
from percepiano_ast.explain.notes import note_table

__all__ = [
    "BASELINES",
    "METHODS",
    "SECONDS",
    "Excerpt",
    "Explainer",
    "Explanation",
    "Recording",
    "note_table",
]
