"""All metrics of all runs, with intervals: the table ``metrics.csv`` and related tables.

* The held-out folds of a run are pooled, then each metric is computed per dimension; the row
  ``mean`` is the plain mean over the 19 dimensions, the row of a head group the mean over its
  dimensions.
* Scopes: ``overall``; ``humans_only`` (without deadpan renderings); ``within_segment`` (rating and
  prediction both centred on the mean of their segment, then pooled: differences between
  performances without differences between pieces); ``within_segment_humans``.
* Intervals: see ``intervals``. With a single content group ``low`` and ``high`` are NaN.
"""

import numpy as np
import pandas as pd

from percepiano_ast.dimensions import KEYS, group_indices
from percepiano_ast.evaluation import intervals, metrics
from percepiano_ast.evaluation.table import RUN, SCOPES, Run, in_scope

GROUPS = tuple(group_indices())
ROWS = [*KEYS, *GROUPS, "mean"]  # the columns of every array below


def evaluate(runs: list[Run]) -> pd.DataFrame:
    """``model,protocol,seed,scope,metric,dimension,value,low,high``; ``dimension`` includes the
    head groups and ``mean``."""
    tables = []
    for run in runs:
        for scope in SCOPES:
            for metric, values in without_each_group(run, scope).items():
                estimate = intervals.jackknife(values, intervals.SCALES[metric])
                tables.append(rows(run, {"scope": scope, "metric": metric}, estimate))
    return pd.concat(tables, ignore_index=True)


def per_fold(runs: list[Run]) -> pd.DataFrame:
    """``model,protocol,seed,fold,scope,metric,dimension,value,clips``: each held-out fold
    separately, without intervals.

    The spread over folds does not estimate the error of the pooled value: folds differ in their
    music and are smaller.
    """
    tables = []
    for run in runs:
        for fold in np.unique(run.fold):
            part = run.take(run.fold == fold)
            for scope in SCOPES:
                for metric, values in without_each_group(part, scope).items():
                    facts = {
                        "fold": fold,
                        "scope": scope,
                        "metric": metric,
                        "dimension": ROWS,
                        "value": values[0],
                    }
                    clips = len(in_scope(part, scope).clip)
                    tables.append(pd.DataFrame(dict(zip(RUN, run.name)) | facts | {"clips": clips}))
    return pd.concat(tables, ignore_index=True)


def without_each_group(
    run: Run, scope: str, names: tuple[str, ...] = metrics.METRICS
) -> dict[str, np.ndarray]:
    """Metric -> (1 + groups, rows of ``ROWS``): over all clips in scope, then without each content
    group."""
    part = cleaned(run, scope)
    sums = {kind: group_sums(part, kind) for kind in {metrics.kind_of(name) for name in names}}
    return {
        name: summarised(
            metrics.from_sums(name, intervals.leave_one_out(sums[metrics.kind_of(name)]))
        )
        for name in names
    }


def cleaned(run: Run, scope: str) -> Run:
    """The clips in scope; predictions that vary only by rounding, relative to their size before
    centring, become constant."""
    size = np.abs(run.prediction).max(axis=0, initial=0.0)
    part = in_scope(run, scope)
    return part._replace(prediction=metrics.without_rounding(part.prediction, size))


def group_sums(part: Run, kind: str) -> np.ndarray:
    """Sums of the terms of a kind of metric over the clips of each content group, (8, groups,
    19)."""
    return by_group(
        part.content_group, metrics.features(*metrics.prepared(part.rating, part.prediction, kind))
    )


def by_group(groups: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Sums over the clips of each content group: (..., clips, columns) -> (..., groups,
    columns)."""
    names, codes = np.unique(groups, return_inverse=True)
    members = (np.arange(len(names))[:, None] == codes).astype(float)
    return members @ values


def summarised(values: np.ndarray) -> np.ndarray:
    """Append the means over each head group and over all dimensions: (..., 19) -> (..., rows of
    ``ROWS``)."""
    means = [values[..., list(which)].mean(axis=-1) for which in group_indices().values()]
    return np.concatenate([values, np.stack([*means, values.mean(axis=-1)], axis=-1)], axis=-1)


def rows(
    run: Run, facts: dict, estimate: intervals.Estimate, names: list[str] = ROWS
) -> pd.DataFrame:
    """An estimate as rows of a table: the run, ``facts``, ``dimension,value,low,high``."""
    numbers = {
        "dimension": names,
        "value": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
    }
    return pd.DataFrame(dict(zip(RUN, run.name)) | facts | numbers)


def undefined(values: pd.DataFrame) -> list[str]:
    """One sentence for each run, scope and metric of ``evaluate`` that is undefined in some
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
