"""Point metrics of two arrays, with the interface of mir_eval: ``validate``, one function per
metric, ``evaluate``.

Conventions:

* ``rating`` and ``prediction`` are (clips, dimensions); each metric is computed per dimension over
  the clips.
* Population moments (divisor n) throughout. R2 uses the mean of the given ratings as reference,
  like scikit-learn.
* An undefined metric (r of a constant) is NaN, never zero. CCC of a constant prediction is defined
  and 0.
* Every metric is a function of sums over clips (``features``): sums per content group give any
  resample, jackknife or permutation without another pass over the clips. Spearman is Pearson of
  ranks that are computed once, on all clips: ranking within each resample would cost a hundred
  times more for a negligible difference.
"""

import numpy as np
import pandas as pd

from percepiano_ast.errors import InputError

METRICS = ("pearson", "spearman", "r2", "mae", "ccc")

_CONSTANT = 1e-6  # a spread below this share of the values' magnitude is rounding error


def validate(rating: np.ndarray, prediction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both arrays as float64 (clips, dimensions).

    Raises:
        InputError: unequal or wrong shapes, fewer than two clips, NaN or infinity.
    """
    tables = []
    for name, values in (("rating", rating), ("prediction", prediction)):
        values = np.asarray(values, float)
        if values.ndim != 2 or len(values) < 2:
            raise InputError(
                f"{name} has shape {values.shape}; give (clips, dimensions) with at least two"
                " clips."
            )
        if len(wrong := np.argwhere(~np.isfinite(values))):
            row, column = wrong[0]
            raise InputError(
                f"{name}, row {row}, column {column} is {values[row, column]}; write finite"
                " numbers."
            )
        tables.append(values)
    if tables[0].shape != tables[1].shape:
        raise InputError(
            f"rating has shape {tables[0].shape}, prediction {tables[1].shape}; give arrays of"
            " equal shape."
        )
    return tables[0], tables[1]


def pearson(rating: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Pearson's r per dimension, (dimensions,); NaN where either is constant."""
    return evaluate(rating, prediction, ("pearson",))["pearson"]


def spearman(rating: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation per dimension, (dimensions,): Pearson's r of average ranks."""
    return evaluate(rating, prediction, ("spearman",))["spearman"]


def r2(rating: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Explained share of the ratings' variance per dimension, (dimensions,); below 0: worse than
    their mean."""
    return evaluate(rating, prediction, ("r2",))["r2"]


def mae(rating: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Mean absolute error per dimension, (dimensions,), in the unit of the ratings."""
    return evaluate(rating, prediction, ("mae",))["mae"]


def ccc(rating: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Concordance correlation per dimension, (dimensions,): Lin (1989), 2 cov / (var + var +
    bias^2)."""
    return evaluate(rating, prediction, ("ccc",))["ccc"]


def evaluate(
    rating: np.ndarray, prediction: np.ndarray, names: tuple[str, ...] = METRICS
) -> dict[str, np.ndarray]:
    """Every metric per dimension: metric -> (dimensions,).

    Raises:
        InputError: see ``validate``.
    """
    rating, prediction = validate(rating, prediction)
    prediction = without_rounding(prediction, np.abs(prediction).max(axis=0))
    inputs = {
        kind: features(*prepared(rating, prediction, kind)).sum(axis=1)
        for kind in map(kind_of, names)
    }
    return {name: from_sums(name, inputs[kind_of(name)]) for name in names}


# ---------------------------------------------------------------- metrics as functions of sums


def kind_of(metric: str) -> str:
    """Kind of input of a metric (see ``prepared``)."""
    return {"pearson": "standardised", "spearman": "ranks"}.get(metric, "values")


def prepared(
    rating: np.ndarray, prediction: np.ndarray, kind: str
) -> tuple[np.ndarray, np.ndarray]:
    """Ratings and predictions as a kind of metric needs them: ``values``, ``standardised`` or
    ``ranks``.

    Correlations do not depend on the scale of a prediction. Standardising makes the predictions of
    two models exchangeable and preserves the precision that variances from sums would lose.
    """
    if not len(rating):
        return rating, prediction
    # a common shift does not affect these metrics, and sums of squares are more precise near zero
    if kind == "values":
        return rating - rating.mean(axis=0), prediction - rating.mean(axis=0)
    if kind == "ranks":
        # Rounding errors would break ties of centred values.
        rating, prediction = (
            pd.DataFrame(np.round(values, 9)).rank().to_numpy() for values in (rating, prediction)
        )
    return _standard(rating), _standard(prediction)


def without_rounding(prediction: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Predictions with columns that vary only by rounding, relative to ``size``, made constant."""
    if not len(prediction):
        return prediction
    return np.where(np.ptp(prediction, axis=0) <= _CONSTANT * size, prediction[:1], prediction)


def features(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Terms to sum over clips: (8, clips, dimensions) of x, the ratings, and y, the predictions."""
    error = y - x
    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y, error**2, np.abs(error)])


def from_sums(metric: str, sums: np.ndarray) -> np.ndarray:
    """A metric from sums of ``features``, (8, ..., dimensions) -> (..., dimensions)."""
    n, x, y, xx, yy, xy, squared, absolute = sums
    n = np.where(n > 0, n, np.nan)
    if metric == "mae":
        return absolute / n
    x, y = x / n, y / n
    of_x = _variance(xx / n, x)
    if metric == "r2":
        return 1 - squared / n / of_x
    of_y, together = _variance(yy / n, y), xy / n - x * y
    if metric == "ccc":  # a constant prediction has a concordance of 0
        varies = np.isfinite(of_y)
        return 2 * np.where(varies, together, 0) / (of_x + np.where(varies, of_y, 0) + (y - x) ** 2)
    return together / np.sqrt(of_x * of_y)


def _variance(square: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Variance from the mean square and the mean; NaN where it is only rounding error."""
    variance = square - mean**2
    return np.where(variance > 1e-12 * square, variance, np.nan)


def _standard(values: np.ndarray) -> np.ndarray:
    """Columns with mean 0 and variance 1; a constant column is 0."""
    centred = values - values.mean(axis=0)
    spread = centred.std(axis=0)
    varies = np.ptp(values, axis=0) > 0
    return np.where(varies, centred / np.where(varies & (spread > 0), spread, 1), 0.0)
