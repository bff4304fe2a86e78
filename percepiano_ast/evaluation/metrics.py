"""Metrics of two arrays (clips, dimensions), with the interface of mir_eval, and the tables of all
metrics of all runs.

* Each metric is computed per dimension over the clips, with population moments (divisor n). R2 uses
  the mean of the given ratings as reference, like scikit-learn.
* An undefined metric (r of a constant) is NaN, never zero. CCC of a constant prediction is 0.
* In the tables the held-out folds of a run are pooled first; the row ``mean`` is the plain mean
  over the 19 dimensions, the row of a head group the mean over its dimensions.
* Every metric is a function of sums over clips (``terms``): sums per content group give any
  resample, jackknife or permutation without another pass over the clips. Spearman is Pearson of
  ranks that are computed once, on all clips: ranking within each resample would cost a hundred
  times more for a negligible difference.
* Scopes: ``overall``; ``humans_only`` (without deadpan renderings); ``within_segment`` (rating and
  prediction both centred on the mean of their segment, then pooled: differences between
  performances without differences between pieces); ``within_segment_humans``.
"""

import numpy as np
import pandas as pd

from percepiano_ast.dimensions import KEYS, group_indices
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation import intervals
from percepiano_ast.evaluation.predictions import MIN_IN_SEGMENT, RUN, SCOPES, RunPredictions

METRICS = ("pearson", "spearman", "r2", "mae", "ccc")
GROUPS = tuple(group_indices())
ROWS = [*KEYS, *GROUPS, "mean"]  # the columns of `with_means`

_CONSTANT = 1e-6  # a spread below this share of the values' magnitude is rounding error


# ---------------------------------------------------------------- metrics of two arrays


def validate(rating: np.ndarray, prediction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both arrays as float64 (clips, dimensions).

    Raises:
        InputError: unequal or wrong shapes, fewer than two clips, NaN or infinity.
    """
    rating, prediction = np.asarray(rating, float), np.asarray(prediction, float)
    for name, values in (("rating", rating), ("prediction", prediction)):
        if values.ndim != 2 or len(values) < 2:
            raise InputError(
                f"{name} has shape {values.shape}; give (clips, dimensions), at least two clips."
            )
        if len(wrong := np.argwhere(~np.isfinite(values))):
            row, column = wrong[0]
            raise InputError(
                f"{name}, row {row}, column {column} is {values[row, column]}; give finite numbers."
            )
    if rating.shape != prediction.shape:
        raise InputError(
            f"rating has shape {rating.shape}, prediction {prediction.shape}; give equal shapes."
        )
    return rating, prediction


def evaluate(
    rating: np.ndarray, prediction: np.ndarray, names: tuple[str, ...] = METRICS
) -> dict[str, np.ndarray]:
    """Every metric per dimension: metric -> (dimensions,).

    Raises:
        InputError: see ``validate``.
    """
    rating, prediction = validate(rating, prediction)
    prediction = without_rounding(prediction, np.abs(prediction).max(axis=0))
    parts = {name: prepared(rating, prediction, kind_of(name)) for name in names}
    return {name: from_sums(name, terms(*part).sum(axis=1)) for name, part in parts.items()}


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
    standard = []
    for values in (rating, prediction):  # mean 0 and variance 1; a constant column is 0
        centred = values - values.mean(axis=0)
        spread = centred.std(axis=0)
        varies = np.ptp(values, axis=0) > 0
        scale = np.where(varies & (spread > 0), spread, 1)
        standard.append(np.where(varies, centred / scale, 0.0))
    return standard[0], standard[1]


def without_rounding(prediction: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Predictions with columns that vary only by rounding, relative to ``size``, made constant."""
    if not len(prediction):
        return prediction
    return np.where(np.ptp(prediction, axis=0) <= _CONSTANT * size, prediction[:1], prediction)


def terms(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Terms to sum over clips: (8, clips, dimensions) of x, the ratings, and y, the predictions."""
    error = y - x
    return np.stack([np.ones_like(x), x, y, x * x, y * y, x * y, error**2, np.abs(error)])


def from_sums(metric: str, sums: np.ndarray) -> np.ndarray:
    """A metric from sums of ``terms``, (8, ..., dimensions) -> (..., dimensions)."""

    def variance(square: np.ndarray, mean: np.ndarray) -> np.ndarray:
        found = square - mean**2
        return np.where(found > 1e-12 * square, found, np.nan)  # NaN where only rounding error

    n, x, y, xx, yy, xy, squared, absolute = sums
    n = np.where(n > 0, n, np.nan)
    if metric == "mae":
        return absolute / n
    x, y = x / n, y / n
    of_x = variance(xx / n, x)
    if metric == "r2":
        return 1 - squared / n / of_x
    of_y, together = variance(yy / n, y), xy / n - x * y
    if metric == "ccc":  # a constant prediction has a concordance of 0
        varies = np.isfinite(of_y)
        return 2 * np.where(varies, together, 0) / (of_x + np.where(varies, of_y, 0) + (y - x) ** 2)
    return together / np.sqrt(of_x * of_y)


def by_group(groups: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Sums over the clips of each content group, (..., clips or groups, columns)."""
    names, codes = np.unique(groups, return_inverse=True)
    return (np.arange(len(names))[:, None] == codes).astype(float) @ values


def group_sums(
    groups: np.ndarray, rating: np.ndarray, prediction: np.ndarray, kind: str
) -> np.ndarray:
    """Sums of ``terms`` for a kind of metric over the clips of each content group, (8, groups,
    dimensions)."""
    return by_group(groups, terms(*prepared(rating, prediction, kind)))


def pearson_without_each_group(groups: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's r per dimension, (1 + groups, dimensions): over all clips, then without each
    content group."""
    return from_sums("pearson", intervals.leave_one_out(group_sums(groups, x, y, "standardised")))


# ---------------------------------------------------------------- metrics of runs


def in_scope(run: RunPredictions, scope: str) -> RunPredictions:
    """The clips of ``run`` in ``scope``, without segments of fewer than ``MIN_IN_SEGMENT`` clips if
    within segment; predictions that vary only by rounding, relative to their size before centring,
    become constant."""
    size = np.abs(run.prediction).max(axis=0, initial=0.0)
    if "humans" in scope:
        run = run.take(run.human.astype(bool))
    if scope.startswith("within_segment"):
        _, codes, sizes = np.unique(run.segment, return_inverse=True, return_counts=True)
        kept = sizes[codes] >= MIN_IN_SEGMENT
        run, codes = run.take(kept), codes[kept]
        rating, prediction = (
            values - pd.DataFrame(values).groupby(codes).transform("mean").to_numpy()
            for values in (run.rating, run.prediction)
        )
        run = run._replace(rating=rating, prediction=prediction)
    return run._replace(prediction=without_rounding(run.prediction, size))


def without_each_group(
    run: RunPredictions, scope: str, names: tuple[str, ...] = METRICS
) -> dict[str, np.ndarray]:
    """Metric -> (1 + groups, rows of ``ROWS``): over all clips in scope, then without each content
    group."""
    part = in_scope(run, scope)
    sums = {}
    for kind in {kind_of(name) for name in names}:
        of_groups = group_sums(part.content_group, part.rating, part.prediction, kind)
        sums[kind] = intervals.leave_one_out(of_groups)
    return {name: with_means(from_sums(name, sums[kind_of(name)])) for name in names}


def with_means(values: np.ndarray) -> np.ndarray:
    """Append means over each head group and all dimensions: (..., 19) -> (..., ``ROWS``)."""
    means = [values[..., list(which)].mean(axis=-1) for which in group_indices().values()]
    return np.concatenate([values, np.stack([*means, values.mean(axis=-1)], axis=-1)], axis=-1)


def estimate_rows(
    run: RunPredictions, facts: dict, values: np.ndarray, scale=intervals.PLAIN, names=ROWS
) -> pd.DataFrame:
    """Estimates from ``values`` (1 + groups, ``names``), see `intervals.jackknife`, as rows of a
    table: the run, ``facts``, ``dimension,value,low,high``."""
    value, low, high, _, _ = intervals.jackknife(values, scale)
    numbers = {"dimension": names, "value": value, "low": low, "high": high}
    return pd.DataFrame(dict(zip(RUN, run.name)) | facts | numbers)


def metric_table(runs: list[RunPredictions]) -> pd.DataFrame:
    """``model,protocol,seed,scope,metric,dimension,value,low,high`` of all runs, scopes and
    metrics; ``dimension`` includes the head groups and ``mean``. Intervals: see ``intervals``."""
    tables = []
    for run in runs:
        for scope in SCOPES:
            for metric, values in without_each_group(run, scope).items():
                facts = {"scope": scope, "metric": metric}
                tables.append(estimate_rows(run, facts, values, intervals.SCALES[metric]))
    return pd.concat(tables, ignore_index=True)


def fold_table(runs: list[RunPredictions]) -> pd.DataFrame:
    """``model,protocol,seed,fold,scope,metric,dimension,value,clips`` of each held-out fold. The
    spread over folds is not the error of the pooled value: folds differ in music and are smaller.
    """
    tables = []
    for run in runs:
        for fold in np.unique(run.fold):
            part = run.take(run.fold == fold)
            for scope in SCOPES:
                clips = len(in_scope(part, scope).clip)
                for metric, values in without_each_group(part, scope).items():
                    facts = {"fold": fold, "scope": scope, "metric": metric, "dimension": ROWS}
                    facts |= {"value": values[0], "clips": clips}
                    tables.append(pd.DataFrame(dict(zip(RUN, run.name)) | facts))
    return pd.concat(tables, ignore_index=True)


def undefined_metrics(values: pd.DataFrame) -> list[str]:
    """One sentence for each run, scope and metric of ``metric_table`` that is undefined in some
    dimension."""
    missing = values[values["value"].isna() & values["dimension"].isin(KEYS)]
    lines = []
    for (model, protocol, seed, scope, metric), part in missing.groupby([*RUN, "scope", "metric"]):
        which = "all dimensions" if len(part) == len(KEYS) else ", ".join(part["dimension"])
        lines.append(
            f"{model}, {protocol}, seed {seed}: {metric} ({scope}) is undefined for {which}: "
            "predictions or ratings are constant, or the scope has no clips."
        )
    return lines
