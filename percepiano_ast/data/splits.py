"""Cross-validation folds. They are columns of the index; none are drawn at run time.

``content`` is the primary protocol: no content group (clips that share music) is split over its
folds. ``random`` and ``segment`` leak music between folds and are reported for comparison only.
"""

import pandas as pd

from percepiano_ast.evaluation.predictions import check_protocol, fold_column


def fold_of_clip(index: pd.DataFrame, protocol: str) -> dict[str, int]:
    """Fold of every clip that the protocol evaluates (fold >= 0).

    Raises:
        InputError: unknown protocol, fewer than two folds, or a content group in two folds of a
            protocol with held-out music.
    """
    folds = check_protocol(index, protocol)
    return dict(zip(folds["clip"], folds[fold_column(protocol)].astype(int)))
