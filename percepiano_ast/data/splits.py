"""Folds: which clips are held out together. The table is the index; nothing is drawn at run time.

``content`` is primary: no content group (clips that share music) crosses its folds. ``random`` and ``segment`` leak and are
shown only as such.
"""

import pandas as pd

from percepiano_ast.config import InputError
from percepiano_ast.evaluation.metrics import fold_column


def fold_of_clip(index: pd.DataFrame, protocol: str) -> dict[str, int]:
    """Fold of every clip that the protocol evaluates (fold >= 0).

    Raises:
        InputError: unknown protocol, fewer than two folds, or a content group in two folds of ``content``.
    """
    column = fold_column(protocol)
    if column not in index:
        known = [name.removeprefix("fold_") for name in index if name.startswith(("fold_", "upstream_"))]
        raise InputError(f"unknown protocol {protocol!r}. Choose one of: {', '.join(known)}.")
    folds = index[index[column] >= 0]
    if folds[column].nunique() < 2:
        raise InputError(f"protocol {protocol!r} has {folds[column].nunique()} fold(s) in the index; it needs at least 2")
    if protocol == "content":
        crossing = folds.groupby("content_group")[column].nunique()
        if (crossing > 1).any():
            raise InputError(f"content group {crossing.idxmax()!r} lies in several folds of the index: the split leaks")
    return dict(zip(folds["clip"], folds[column].astype(int)))
