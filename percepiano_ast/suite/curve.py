"""Learning curve: the correlation with fewer passages, players or clips in the training data."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from percepiano_ast import plots
from percepiano_ast.data import percepiano
from percepiano_ast.evaluation import predictions
from percepiano_ast.files import echo
from percepiano_ast.inference.regressors import gaussian_ridge, standard
from percepiano_ast.suite.judged import Material, listened
from percepiano_ast.suite.rated import Rated
from percepiano_ast.suite.run import Run

PROTOCOL = "content"
SHARES = (0.125, 0.25, 0.5, 0.75)
DRAWS = 6
COLUMNS = ["unit", "share", "draw", "r"]
# The centre of the grid that `inference.regressors` averages over: one fit instead of seventeen,
# with an r lower by 0.01.
_ALPHA, _WIDTH = 0.3, 3.0


def learning_curve(
    run: Run, init: str, folder: str = "", *, source: str = "", log: Callable[[str], None] = echo
) -> Path:
    """Mean r over the dimensions under ``content``, from transcription and sound statistics, by the
    amount of training data.

    In every fold, a random share of the training clips is used: of whole passages (content groups),
    of players with all their clips, or of single clips.

    Args:
        init, folder, source: see `judged.judge`.

    Returns:
        ``learning_curve.csv`` (``unit,share,draw,r``) in the folder of `judged.judge`'s
        predictions, with a figure as PNG.
    """
    rated, home, material = listened(run, init, folder, source, log)
    by_clip = rated.index.set_index("clip").loc[rated.clips.clip]
    units = {
        "passages": material.groups,
        "players": by_clip["player"].to_numpy(),
        "clips": rated.clips.clip,
    }
    rows = [("everything", 1.0, 0, _r(rated, material, rated.clips.clip, 1.0, 0))]
    for unit, labels in units.items():
        for share in SHARES:
            found = [_r(rated, material, labels, share, draw) for draw in range(DRAWS)]
            rows += [(unit, share, draw, r) for draw, r in enumerate(found)]
            log(f"{share:.3g} of {unit}: r {np.mean(found):.3f}")
    path = home / "learning_curve.csv"
    table = pd.DataFrame(rows, columns=COLUMNS)
    table.to_csv(path, index=False, float_format="%.4f", lineterminator="\n")
    plots.learning_curve(table, f"Learning curve ({rated.start.name}, {PROTOCOL})").savefig(
        path.with_suffix(".png"), dpi=120
    )
    return path


def _kept(labels: np.ndarray, share: float, seed: list[int]) -> np.ndarray:
    """Bool (n,), True for rows whose label is in a random share of the labels."""
    names = np.unique(labels)
    return np.isin(
        labels,
        np.random.default_rng(seed).choice(names, max(1, round(share * len(names))), replace=False),
    )


def _r(rated: Rated, material: Material, labels: np.ndarray, share: float, draw: int) -> float:
    """Mean r over the dimensions, for renderings by pianos in the training data."""
    fold = percepiano.fold_of_clip(rated.index, PROTOCOL)
    folds = np.array([fold.get(clip, -1) for clip in rated.clips.clip])
    x, y = material.features(("notes", "sound")), material.ratings
    said = np.full(y.shape, np.nan)
    for number in sorted(set(folds[folds >= 0].tolist())):
        train = np.flatnonzero((folds != number) & (folds >= 0) & ~material.unseen)
        train = train[_kept(labels[train], share, [rated.config.seed, draw, int(number)])]
        test = (folds == number) & ~material.unseen
        moments = x[train].mean(axis=0), np.maximum(x[train].std(axis=0), 1e-9)
        mean, spread = y[train].mean(axis=0), y[train].std(axis=0)
        model = gaussian_ridge(x.shape[1], _ALPHA, _WIDTH).fit(
            standard(x[train], *moments), (y[train] - mean) / np.maximum(spread, 1e-9)
        )
        said[test] = model.predict(standard(x[test], *moments)) * spread + mean
    rows = np.isfinite(said).all(axis=1)
    table = predictions.to_table(
        ("curve", PROTOCOL, rated.config.seed), fold, rated.clips.clip[rows], y[rows], said[rows]
    )
    wide = table.pivot(index="clip", columns="dimension", values=["rating", "prediction"])
    return float(wide["prediction"].corrwith(wide["rating"]).mean())
