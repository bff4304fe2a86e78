"""What can be said of a clip without hearing it: which passage it is, who plays, and whether anybody does.

A rating is modelled as the mean of all training clips plus an effect of each thing that is known (least squares, one dummy
variable a level). An effect is shrunk as if one more clip without it had been rated, so that a level that was never trained
on has the effect zero. What a baseline says thus depends on the protocol:

* ``leave_one_out``: every other clip is known. ``identity-segment`` is the mean of the other clips of the passage.
* ``leave_player_out``: all clips of one player of a composition are held out, so that a passage is what *others* make of it.
* ``random``: four fifths of passages and players are known.
* ``segment``, ``content``, ``movement``, ``composition``: no passage of a held-out clip is known; ``identity-additive`` is
  what the player does elsewhere, ``identity-segment-deadpan`` the deadpan flag.
* ``performer``: the passages are known, the players are not.

Where no held-out clip has anything known about it the baseline would be a mean, and a correlation with it would mean
nothing: such protocols are refused. Players are counted within a composition (``player`` numbers of PercePiano are).
"""

import numpy as np
import pandas as pd

from percepiano_ast.config import InputError
from percepiano_ast.evaluation.table import fold_column

# What each knows.
BASELINES = {
    "identity-segment": ("segment",),
    "identity-segment-deadpan": ("segment", "human"),
    "identity-player": ("player",),
    "identity-additive": ("segment", "player"),
}
LEAVE_ONE_OUT, LEAVE_PLAYER_OUT = "leave_one_out", "leave_player_out"
EXHAUSTIVE = (LEAVE_ONE_OUT, LEAVE_PLAYER_OUT)  # too many folds for anything but arithmetic
_SHRINKAGE = 1.0  # clips


class NothingKnown(InputError):
    """Under this protocol nothing that the baseline knows helps with any held-out clip; the message says what."""


def with_exhaustive(index: pd.DataFrame) -> pd.DataFrame:
    """The index with folds of the protocols ``EXHAUSTIVE`` beside its own, so that they are evaluated as any other.

    An index that does not say who plays gets no ``leave_player_out``.
    """
    index = index.assign(**{fold_column(LEAVE_ONE_OUT): np.arange(len(index))})
    if not _lacking(index):
        index[fold_column(LEAVE_PLAYER_OUT)] = pd.factorize(_levels(index, "player"), sort=True)[0]
    return index


def _lacking(index: pd.DataFrame) -> list[str]:
    """The columns that a player is known by and that the index does not have."""
    return [name for name in ("composition", "player") if name not in index]


def _levels(index: pd.DataFrame, what: str) -> np.ndarray:
    """Which passage, player or sort of player each clip is of, (n,)."""
    if what != "player":
        return index[what].to_numpy()
    if missing := _lacking(index):
        raise InputError(f"the index lacks {', '.join(missing)}, by which players are known; add a column of each, or leave "
                         "identity-player and identity-additive out.")  # fmt: skip
    return (index["composition"].astype(str) + " " + index["player"].astype(str)).to_numpy()


def predict(name: str, index: pd.DataFrame, folds: np.ndarray, ratings: np.ndarray) -> np.ndarray:
    """Out-of-fold predictions (n, 19).

    Args:
        name: in ``BASELINES``.
        index: of the n clips.
        folds: (n,) fold of each; the clips of a negative one are neither learned from nor predicted (NaN).
        ratings: (n, 19).

    Raises:
        NothingKnown: the protocol holds out everything that the baseline knows.
        InputError: the index does not say who plays.
    """
    known, levels = np.zeros(len(index), dtype=bool), [_levels(index, what) for what in BASELINES[name]]
    for level in levels:
        table = pd.DataFrame({"level": level, "fold": folds})[folds >= 0]
        elsewhere = table.groupby("level")["fold"].nunique()
        known |= np.isin(level, elsewhere.index[elsewhere > 1])
    if not known[folds >= 0].any():
        raise NothingKnown(f"{name}: no {' or '.join(BASELINES[name])} of a held-out clip is in training under this protocol, "
                           "so it has nothing to say")  # fmt: skip
    dummies = [(level[:, None] == np.unique(level)).astype(float) for level in levels]
    design = np.hstack([np.ones((len(index), 1)), *dummies])
    penalty = np.diag([0.0, *[_SHRINKAGE] * (design.shape[1] - 1)])
    used = folds >= 0
    gram, target = design[used].T @ design[used], design[used].T @ ratings[used]
    rated = np.full(ratings.shape, np.nan)
    for fold in np.unique(folds[used]):
        held = folds == fold
        x, y = design[held], ratings[held]
        rated[held] = x @ np.linalg.solve(gram - x.T @ x + penalty, target - x.T @ y)
    return rated
