"""Comparison of ratings with those that PercePiano published, by one checksum per clip instead of
the ratings.

The checksum of a clip is the sum of its 19 ratings (0 to 1), each times a weight from 1 to 2. The
ratings cannot be recovered from it. A cryptographic hash would reject ratings that are rounded to
fewer digits.
"""

from importlib import resources

import numpy as np
import pandas as pd

from percepiano_ast.dimensions import KEYS
from percepiano_ast.errors import InputError

# Fractional parts of multiples of the golden ratio: distinct weights, so that swapped dimensions
# change the sum.
WEIGHTS = 1 + np.arange(1, len(KEYS) + 1) * (np.sqrt(5) - 1) / 2 % 1
_ROUNDING = 5e-4  # largest rounding error of a rating with three decimals


def checksums(ratings: pd.DataFrame) -> pd.Series:
    """Checksum of each clip; ``ratings`` is (clips, 19), its columns named by ``KEYS``, values 0 to
    1."""
    return (ratings[list(KEYS)] @ WEIGHTS).rename("checksum")


def check_ratings(predictions: pd.DataFrame) -> None:
    """Compare the ratings of a validated predictions table of PercePiano's clips with the published
    ones.

    Raises:
        InputError: a clip's ratings differ by more than rounding to three decimals.
    """
    path = resources.files("percepiano_ast") / "data" / "percepiano_checksums.csv"
    expected = pd.read_csv(path, index_col="clip")["checksum"]
    found = checksums(predictions.groupby(["clip", "dimension"])["rating"].first().unstack())
    off = (found - expected.loc[found.index]).abs()
    if (wrong := off > _ROUNDING * WEIGHTS.sum()).any():
        raise InputError(
            f"the ratings of {wrong.sum()} of {len(found)} clips differ from those that PercePiano"
            f" published, {off.idxmax()!r} the most. Use the label file at the root of PercePiano"
            " (means divided by 7), or give your own index with --index."
        )
