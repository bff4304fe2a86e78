"""Are these the ratings that PercePiano published? One checksum per clip answers it without holding the ratings.

The checksum of a clip is the sum of its 19 ratings (0 to 1), each times a weight from 1 to 2. Nineteen ratings cannot be
had back from one number; a cryptographic hash would hide them too, but it would refuse ratings that were only written
with fewer digits, and those are the same ratings.
"""

from importlib import resources

import numpy as np
import pandas as pd

from percepiano_ast.config import InputError
from percepiano_ast.dimensions import KEYS

# Fractions of multiples of the golden ratio: irregular, so that exchanged dimensions do not cancel.
WEIGHTS = 1 + np.arange(1, len(KEYS) + 1) * (np.sqrt(5) - 1) / 2 % 1
_ROUNDING = 5e-4  # of a rating that is written with three decimals


def checksums(ratings: pd.DataFrame) -> pd.Series:
    """Checksum of each clip; ``ratings`` is (clips, 19), its columns named by ``KEYS``, values 0 to 1."""
    return (ratings[list(KEYS)] @ WEIGHTS).rename("checksum")


def check_ratings(predictions: pd.DataFrame) -> None:
    """Compare the ratings of a checked predictions table, all of whose clips are PercePiano's, with the published ones.

    Raises:
        InputError: a clip's ratings differ by more than three decimals explain.
    """
    path = resources.files("percepiano_ast") / "data" / "percepiano_checksums.csv"
    expected = pd.read_csv(path, index_col="clip")["checksum"]
    found = checksums(predictions.groupby(["clip", "dimension"])["rating"].first().unstack())
    off = (found - expected.loc[found.index]).abs()
    if (wrong := off > _ROUNDING * WEIGHTS.sum()).any():
        raise InputError(
            f"the ratings of {wrong.sum()} of {len(found)} clips are not those that PercePiano published, "
            f"{off.idxmax()!r} most of all; its figures would not compare with anybody's. Take the label "
            "file at the root of PercePiano (means divided by 7), or give an index of your own."
        )
