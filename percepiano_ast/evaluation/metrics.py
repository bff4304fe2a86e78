"""Metrics of two arrays (clips, dimensions), with the interface of mir_eval, and the tables of all
metrics of all runs.

* Metrics are computed per dimension over the clips with population moments. An undefined one (r of
  a constant) is NaN, never zero; CCC of a constant prediction is 0.
* In the tables the held-out folds of a run are pooled first; the row ``mean`` is the plain mean
  over the 19 dimensions, the row of a head group the mean over its dimensions.
* Every metric is a function of sums over clips (``terms``): sums per content group give any
  resample, jackknife or permutation without another pass over the clips. Spearman is Pearson of
  ranks that are computed once, on all clips.
* Scopes: ``overall``; ``humans_only`` (without deadpan renderings); ``within_segment`` (rating and
  prediction both centred on the mean of their segment: differences between performances of the same
  music); ``within_segment_humans``.
"""

import numpy as np
import pandas as pd
from scipy import stats

from percepiano_ast.dimensions import KEYS, group_indices
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation import intervals
from percepiano_ast.evaluation.predictions import MIN_IN_SEGMENT, RUN, SCOPES, RunPredictions

METRICS = ("pearson", "spearman", "r2", "mae", "ccc")
GROUPS = tuple(group_indices())
ROWS = [*KEYS, *GROUPS, "mean"]  # the columns of `with_means`

_CONSTANT = 1e-6  # a spread below this share of the values' magnitude is rounding error


# --- Metrics of two arrays ------------------------------------------------------------------------


def validate(rating: np.ndarray, prediction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both arrays as float64 (clips, dimensions); an `InputError` for unequal or wrong shapes,
    fewer than two clips, NaN or infinity."""
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
    """Every metric per dimension: metric -> (dimensions,); raises as `validate`."""
    rating, prediction = validate(rating, prediction)
    prediction = without_rounding(prediction, np.abs(prediction).max(axis=0))
    parts = {name: prepared(rating, prediction, kind_of(name)) for name in names}
    return {name: from_sums(name, terms(*part).sum(axis=1)) for name, part in parts.items()}


def pearson(rating: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Pearson's r per dimension."""
    return evaluate(rating, prediction, ("pearson",))["pearson"]


def spearman(rating: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation per dimension: Pearson's r of average ranks."""
    return evaluate(rating, prediction, ("spearman",))["spearman"]


def r2(rating: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Explained share of the ratings' variance per dimension; below 0: worse than their mean."""
    return evaluate(rating, prediction, ("r2",))["r2"]


def mae(rating: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Mean absolute error per dimension, in the unit of the ratings."""
    return evaluate(rating, prediction, ("mae",))["mae"]


def ccc(rating: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Concordance correlation per dimension (Lin 1989): 2 cov / (var + var + bias^2)."""
    return evaluate(rating, prediction, ("ccc",))["ccc"]


# --- Metrics as functions of sums -----------------------------------------------------------------


def kind_of(metric: str) -> str:
    """Kind of input of a metric (see ``prepared``)."""
    return {"pearson": "standardised", "spearman": "ranks"}.get(metric, "values")


def prepared(
    rating: np.ndarray, prediction: np.ndarray, kind: str
) -> tuple[np.ndarray, np.ndarray]:
    """Ratings and predictions as a kind of metric needs them: ``values``, ``ranks``, or
    ``standardised``, which makes the predictions of two models exchangeable and preserves the
    precision that variances from sums would lose."""
    if not len(rating):
        return rating, prediction
    if kind == "values":  # a common shift affects no metric; sums are more precise near zero
        return rating - rating.mean(axis=0), prediction - rating.mean(axis=0)

    def standardised(values: np.ndarray) -> np.ndarray:
        """Mean 0 and variance 1; a constant column is 0."""
        if kind == "ranks":  # rounding errors would break ties of centred values
            values = stats.rankdata(np.round(values, 9), axis=0)
        centred = values - values.mean(axis=0)
        spread = centred.std(axis=0)
        varies = np.ptp(values, axis=0) > 0
        return np.where(varies, centred / np.where(varies & (spread > 0), spread, 1), 0.0)

    return standardised(rating), standardised(prediction)


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
    """Sums of ``terms`` of `prepared` values of each content group, (8, groups, dimensions)."""
    return by_group(groups, terms(*prepared(rating, prediction, kind)))


def pearson_without_each_group(groups: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson's r over all clips, then without each content group, (1 + groups, dimensions)."""
    return from_sums("pearson", intervals.leave_one_out(group_sums(groups, x, y, "standardised")))


# --- Metrics of runs ------------------------------------------------------------------------------


def in_scope(run: RunPredictions, scope: str) -> RunPredictions:
    """The clips of ``run`` in ``scope``, within segments those of segments with at least
    ``MIN_IN_SEGMENT``; predictions that vary only by rounding become constant."""
    size = np.abs(run.prediction).max(axis=0, initial=0.0)
    if "humans" in scope:
        run = run.take(run.human.astype(bool))
    if scope.startswith("within_segment"):
        _, codes, sizes = np.unique(run.segment, return_inverse=True, return_counts=True)
        large = sizes[codes] >= MIN_IN_SEGMENT
        run, codes = run.take(large), codes[large]
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
    data = part.content_group, part.rating, part.prediction
    kinds = {kind_of(name) for name in names}
    sums = {kind: intervals.leave_one_out(group_sums(*data, kind)) for kind in kinds}
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
    """``model,protocol,seed,scope,metric,dimension,value,low,high``; ``dimension`` includes the
    head groups and ``mean``."""
    tables = []
    for run in runs:
        for scope in SCOPES:
            for metric, values in without_each_group(run, scope).items():
                facts = {"scope": scope, "metric": metric}
                tables.append(estimate_rows(run, facts, values, intervals.SCALES[metric]))
    return pd.concat(tables, ignore_index=True)


def fold_table(runs: list[RunPredictions]) -> pd.DataFrame:
    """``model,protocol,seed,fold,scope,metric,dimension,value,clips`` of each held-out fold."""
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
    """A sentence for each run, scope and metric of `metric_table` undefined in some dimension."""
    missing = values[values["value"].isna() & values["dimension"].isin(KEYS)]
    lines = []
    for (model, protocol, seed, scope, metric), part in missing.groupby([*RUN, "scope", "metric"]):
        which = "all dimensions" if len(part) == len(KEYS) else ", ".join(part["dimension"])
        lines.append(
            f"{model}, {protocol}, seed {seed}: {metric} ({scope}) is undefined for {which}: "
            "predictions or ratings are constant, or the scope has no clips."
        )
    return lines
