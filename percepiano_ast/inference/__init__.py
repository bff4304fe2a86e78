"""Rate recordings: `load_model`, `Rating`, `Stream` for live sound, `page` for a page with the
sound."""

from percepiano_ast.inference.rate import FoldEnsemble, RatingModelFile, load_model
from percepiano_ast.inference.rating import Rating, compare, in_short
from percepiano_ast.inference.stream import Stream

__all__ = [
    "FoldEnsemble",
    "Rating",
    "RatingModelFile",
    "Stream",
    "compare",
    "in_short",
    "load_model",
]
