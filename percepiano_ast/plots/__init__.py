"""Arrays and tables -> matplotlib Figures, without pyplot's global state: save them or display them
in a notebook.

Colours are Okabe and Ito's palette and the maps ``magma`` and ``RdBu``, which are safe for
colour-blind readers.
"""

from percepiano_ast.plots.errors import learning_curve, parts_of_error
from percepiano_ast.plots.rating import percentile_profile, rating_course, rating_profile
from percepiano_ast.plots.ratings import correlations, own_ratings, rating_distributions
from percepiano_ast.plots.recordings import collection, shard_layout
from percepiano_ast.plots.results import (
    by_protocol,
    by_scope,
    calibration,
    deadpan,
    gains,
    heatmap,
    noise_ceiling,
    pairwise,
    pearson_by_dimension,
    scatter,
)
from percepiano_ast.plots.sound import hearing, masking, spectrogram
from percepiano_ast.plots.style import MOST
from percepiano_ast.plots.training import training_curves

__all__ = [
    "MOST",
    "by_protocol",
    "by_scope",
    "calibration",
    "collection",
    "correlations",
    "deadpan",
    "gains",
    "hearing",
    "heatmap",
    "learning_curve",
    "masking",
    "noise_ceiling",
    "own_ratings",
    "pairwise",
    "parts_of_error",
    "pearson_by_dimension",
    "rating_distributions",
    "percentile_profile",
    "rating_course",
    "rating_profile",
    "scatter",
    "shard_layout",
    "spectrogram",
    "training_curves",
]
