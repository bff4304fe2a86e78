"""Rate recordings: `load_model` and `rate_file`, `Stream` for live sound, `page` for a page with
the sound."""

from percepiano_ast.inference.rate import (
    FoldEnsemble,
    Rating,
    RatingModelFile,
    compare,
    in_short,
    load_model,
    rate_file,
)
from percepiano_ast.inference.stream import Stream

__all__ = [
    "FoldEnsemble",
    "Rating",
    "RatingModelFile",
    "Stream",
    "compare",
    "in_short",
    "load_model",
    "rate_file",
]
