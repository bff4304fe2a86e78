"""Folds: which clips are held out together. The table is the index; nothing is drawn at run time.

``content`` is primary: no content group (clips that share music) crosses its folds. ``random`` and ``segment`` leak and are
shown only as such.
"""

import pandas as pd

from percepiano_ast.evaluation.table import check_protocol, fold_column


def fold_of_clip(index: pd.DataFrame, protocol: str) -> dict[str, int]:
    """Fold of every clip that the protocol evaluates (fold >= 0).

    Raises:
        InputError: unknown protocol, fewer than two folds, or a content group in two folds of a protocol that promises
            unheard music.
    """
    folds = check_protocol(index, protocol)
    return dict(zip(folds["clip"], folds[fold_column(protocol)].astype(int)))
