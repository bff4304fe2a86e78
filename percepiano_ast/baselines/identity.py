"""Baselines without audio: predictions from the identity of passage and player, and from human
versus deadpan.

A rating is modelled as the mean of all training clips plus one effect per known factor (least
squares, one dummy variable per level). Each effect is shrunk as if one more clip without it had
been rated, so that a level without training clips has effect zero. The information in a baseline
therefore depends on the protocol:

* ``leave_one_out``: all other clips are known. ``identity-segment`` is the mean of the other clips
  of the passage.
* ``leave_player_out``: all clips of one player of a composition are held out, so that only *other*
  players of the passage are known.
* ``random``: four fifths of passages and players are known.
* ``segment``, ``content``, ``movement``, ``composition``: no passage of a held-out clip is known;
  ``identity-additive`` uses the player's other clips, ``identity-segment-deadpan`` the deadpan
  flag.
* ``performer``: passages are known, players are not.

If no factor of any held-out clip is known, the baseline would be a constant and its correlation
meaningless; such protocols are rejected. Players are identified within a composition, as
PercePiano's ``player`` numbers are.
"""

import numpy as np
import pandas as pd

from percepiano_ast.errors import InputError
from percepiano_ast.evaluation.predictions import fold_column

# Factors of each baseline.
BASELINES = {
    "identity-segment": ("segment",),
    "identity-segment-deadpan": ("segment", "human"),
    "identity-player": ("player",),
    "identity-additive": ("segment", "player"),
}
LEAVE_ONE_OUT, LEAVE_PLAYER_OUT = "leave_one_out", "leave_player_out"
EXHAUSTIVE = (LEAVE_ONE_OUT, LEAVE_PLAYER_OUT)  # too many folds to train a model in each
_SHRINKAGE = 1.0  # clips


class NothingKnown(InputError):
    """The protocol holds out all factors of the baseline; the message names them."""


def with_exhaustive(index: pd.DataFrame) -> pd.DataFrame:
    """The index with additional folds for the protocols ``EXHAUSTIVE``, so that they are evaluated
    like any other.

    An index without player identities gets no ``leave_player_out``.
    """
    index = index.assign(**{fold_column(LEAVE_ONE_OUT): np.arange(len(index))})
    if not _lacking(index):
        index[fold_column(LEAVE_PLAYER_OUT)] = pd.factorize(_levels(index, "player"), sort=True)[0]
    return index


def _lacking(index: pd.DataFrame) -> list[str]:
    """The columns for identifying players that the index lacks."""
    return [name for name in ("composition", "player") if name not in index]


def _levels(index: pd.DataFrame, what: str) -> np.ndarray:
    """Passage, player or human/deadpan flag of each clip, (n,)."""
    if what != "player":
        return index[what].to_numpy()
    if missing := _lacking(index):
        raise InputError(
            f"the index lacks {', '.join(missing)} for identifying players. Add these columns, or"
            " leave out identity-player and identity-additive."
        )
    return (index["composition"].astype(str) + " " + index["player"].astype(str)).to_numpy()


def predict(name: str, index: pd.DataFrame, folds: np.ndarray, ratings: np.ndarray) -> np.ndarray:
    """Out-of-fold predictions (n, 19).

    Args:
        name: in ``BASELINES``.
        index: of the n clips.
        folds: (n,) fold of each; clips with a negative fold are neither used for training nor
            predicted (NaN).
        ratings: (n, 19).

    Raises:
        NothingKnown: the protocol holds out all factors of the baseline.
        InputError: the index lacks player identities.
    """
    known, levels = (
        np.zeros(len(index), dtype=bool),
        [_levels(index, what) for what in BASELINES[name]],
    )
    for level in levels:
        table = pd.DataFrame({"level": level, "fold": folds})[folds >= 0]
        elsewhere = table.groupby("level")["fold"].nunique()
        known |= np.isin(level, elsewhere.index[elsewhere > 1])
    if not known[folds >= 0].any():
        raise NothingKnown(
            f"{name} is undefined: no {' or '.join(BASELINES[name])} of a held-out clip is in the"
            " training data under this protocol"
        )
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
