"""Contrasts within a run: human versus deadpan, pairs of performances of one segment, share of the
noise ceiling."""

import numpy as np
import pandas as pd

from percepiano_ast.dimensions import KEYS
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation import intervals
from percepiano_ast.evaluation.scores import by_group, rows, without_each_group
from percepiano_ast.evaluation.table import SCOPES, Run

# One standard error of the difference of two mean ratings of PercePiano: ratings of one clip have
# an SD of 1.27 on the 7-point scale (mean over dimensions), and a clip has 12. Pairs that differ by
# more are in their true order more than five times in six.
MIN_DIFFERENCE = 0.074


def deadpan(runs: list[Run]) -> pd.DataFrame:
    """Human versus deadpan: ``model,protocol,seed,part,metric,dimension,value,low,high``.

    ``part`` is ``humans`` or ``deadpan`` with the five metrics, or ``gap`` with ``rating`` and
    ``prediction``: the mean of human performances minus the mean of deadpan renderings of the same
    segment, averaged over the segments with both. A perfect model has the same gap in its
    predictions as in the ratings.
    """
    tables = []
    for run in runs:
        for part, chosen in (("humans", run.human), ("deadpan", ~run.human)):
            for metric, values in without_each_group(run.take(chosen), "overall").items():
                estimate = intervals.jackknife(values, intervals.SCALES[metric])
                tables.append(rows(run, {"part": part, "metric": metric}, estimate))
        groups, gaps = _gaps(run)
        for metric, gap in gaps.items():
            sums = intervals.leave_one_out(by_group(groups, np.stack([gap, np.ones_like(gap)])))
            tables.append(
                rows(
                    run, {"part": "gap", "metric": metric}, intervals.jackknife(_mean(sums)), _NAMES
                )
            )
    return pd.concat(tables, ignore_index=True)


def pairwise(runs: list[Run], min_difference: float = MIN_DIFFERENCE) -> pd.DataFrame:
    """Share of pairs of performances of one segment whose predictions are in the order of their
    ratings.

    Columns ``model,protocol,seed,scope,min_difference,dimension,pairs,value,low,high``. Pairs with
    equal ratings, or ratings that differ by less than ``min_difference``, are excluded: their order
    is noise of the raters. Computed with ``min_difference`` and with 0, for all clips
    (``within_segment``) and for humans only. Equal predictions count as 0.5, the chance level. The
    mean is over the dimensions.

    Raises:
        InputError: ``min_difference`` is not a number from 0 to 1.
    """
    if not 0 <= min_difference < 1:
        raise InputError(
            f"the minimum difference is {min_difference}; give a number from 0 to 1 in units of the"
            " ratings."
        )
    tables = []
    for run in runs:
        for scope in ("within_segment", "within_segment_humans"):
            part = run.take(run.human) if "humans" in scope else run
            groups, rated, predicted = _pairs(part)
            correct = np.where(predicted == 0, 0.5, np.sign(predicted) == np.sign(rated))
            for least in sorted({0.0, min_difference}):
                counted = ((rated != 0) & (np.abs(rated) >= least)).astype(float)
                sums = by_group(groups, np.stack([correct * counted, counted]))
                estimate = intervals.jackknife(
                    _mean(intervals.leave_one_out(sums)), intervals.ARCSINE
                )
                counts = counted.sum(axis=0)
                table = rows(run, {"scope": scope, "min_difference": least}, estimate, _NAMES)
                table.insert(
                    table.columns.get_loc("value"),
                    "pairs",
                    np.append(counts, counts.sum()).astype(int),
                )
                tables.append(table)
    return pd.concat(tables, ignore_index=True)


def ceiling_share(runs: list[Run], ceiling: pd.DataFrame) -> pd.DataFrame:
    """Pearson's r as a share of the noise ceiling:
    ``model,protocol,seed,scope,ceiling,dimension,value,low,high``.

    The intervals treat the ceiling as exact. A ceiling of 0 means that the ratings carry no
    reliable signal: the share is NaN and the dimension is excluded from the mean, which is mean r
    divided by the mean ceiling.

    Args:
        ceiling: (19 dimensions, scopes), see ``reliability.load_ceiling``.
    """
    tables = []
    for run in runs:
        for scope in ceiling.columns.intersection(SCOPES, sort=False):
            above = ceiling.loc[list(KEYS), scope].to_numpy(float)
            exists = above > 0
            r = without_each_group(run, scope, ("pearson",))["pearson"][:, : len(KEYS)]
            mean = above[exists].mean() if exists.any() else np.nan
            average = r[:, exists].sum(axis=1) / max(exists.sum(), 1) / mean
            share = np.column_stack([r / np.where(exists, above, np.nan), average])
            facts = {"scope": scope, "ceiling": np.append(above, mean)}
            tables.append(rows(run, facts, intervals.jackknife(share), _NAMES))
    return pd.concat(tables, ignore_index=True)


_NAMES = [*KEYS, "mean"]


def _mean(sums: np.ndarray) -> np.ndarray:
    """Means from (totals, counts): (2, rows, 19) -> (rows, 19 + 1), the last column their mean; NaN
    where the count is 0."""
    means = sums[0] / np.where(sums[1] > 0.5, sums[1], np.nan)
    return np.column_stack([means, means.mean(axis=1)])


def _gaps(run: Run) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Content group and, for rating and prediction, human minus deadpan mean (19,) of each segment
    with both."""
    groups = []
    gaps: dict[str, list[np.ndarray]] = {"rating": [], "prediction": []}
    for segment in np.unique(run.segment):
        human, other = (
            run.take((run.segment == segment) & chosen) for chosen in (run.human, ~run.human)
        )
        if len(human.clip) and len(other.clip):
            groups.append(human.content_group[0])
            for name, gap in gaps.items():
                gap.append(getattr(human, name).mean(axis=0) - getattr(other, name).mean(axis=0))
    return np.array(groups, object), {
        name: np.reshape(gap, (-1, len(KEYS))) for name, gap in gaps.items()
    }


def _pairs(run: Run) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Content group, rating difference and prediction difference, (pairs, 19), of all pairs of
    clips of one segment."""
    first, second = [np.zeros(0, int)], [np.zeros(0, int)]
    for segment in np.unique(run.segment):
        rows_of = np.flatnonzero(run.segment == segment)
        one, other = np.triu_indices(len(rows_of), 1)
        first.append(rows_of[one])
        second.append(rows_of[other])
    one, other = np.concatenate(first), np.concatenate(second)
    # Means of equal ratings can differ by rounding.
    rated, predicted = (
        np.round(values[one] - values[other], 9) for values in (run.rating, run.prediction)
    )
    return run.content_group[one], rated, predicted
