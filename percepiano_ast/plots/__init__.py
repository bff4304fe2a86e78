"""Arrays and tables -> matplotlib Figures, without pyplot's global state: save them or display them
in a notebook.

Colours are Okabe and Ito's palette and the maps ``magma`` and ``RdBu``, which are safe for
colour-blind readers.
"""

# ruff: noqa: F401
from percepiano_ast.plots.music import (
    collection,
    correlations,
    custom_ratings,
    masking,
    percentile_profile,
    rating_course,
    rating_distributions,
    rating_profile,
    shard_layout,
    spectrogram,
    transcription,
)
from percepiano_ast.plots.results import (
    by_protocol,
    by_scope,
    calibration,
    deadpan,
    gains,
    heatmap,
    learning_curve,
    noise_ceiling,
    pairwise,
    parts_of_error,
    pearson_by_dimension,
    scatter,
    training_curves,
)
from percepiano_ast.plots.style import MOST
