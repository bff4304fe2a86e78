"""Ratings of one's own, a few clips in a few groups: what their held-out predictions are worth.

The same measures as everywhere (`metrics`, `intervals`), with two things in front that few clips ask for: how many groups an
interval rests on, and whether the model errs less than somebody who always says the mean of the clips it learned from. For
that somebody no r is given: in pooled folds it is below zero whatever the ratings, as a fold that is rated high leaves
a low mean behind. For the same reason the r of a model that hears nothing is not 0 here but a little below.
"""

import numpy as np
import pandas as pd

from percepiano_ast.evaluation import intervals, metrics, scores
from percepiano_ast.evaluation.table import FEWEST_IN_SEGMENT, Run

COLUMNS = ["dimension", "clips", "groups", "r", "low", "high", "r_within_groups", "mae", "mae_of_mean"]
FEW_GROUPS = 10


def evaluate(predictions: pd.DataFrame, index: pd.DataFrame) -> pd.DataFrame:
    """``COLUMNS``, a row a dimension.

    ``r`` is Pearson's over all held-out clips, ``low`` and ``high`` its 95 % interval over groups; ``r_within_groups`` the same
    after ratings and predictions were centred on the mean of their group, over groups of `FEWEST_IN_SEGMENT` and more; ``mae``
    the mean absolute error in the unit of the ratings, ``mae_of_mean`` that of the mean rating of the other folds. NaN where
    there is no such number: a prediction that does not vary, an interval of less than two groups.

    Args:
        predictions: of one run, the columns of `table.COLUMNS`; dimensions and units of any kind.
        index: of the clips: ``clip, segment, content_group, human``.
    """
    run, names = _run(predictions, index)
    values = {scope: _pearson(run, scope) for scope in ("overall", "within_segment")}
    found = values["overall"]
    facts = {"dimension": names, "clips": len(run.clip), "groups": len(np.unique(run.content_group))}
    facts |= {"r": found.value, "low": found.low, "high": found.high, "r_within_groups": values["within_segment"].value}
    facts |= {"mae": metrics.mae(run.rating, run.prediction), "mae_of_mean": metrics.mae(run.rating, _means_of_others(run))}
    return pd.DataFrame(facts, columns=COLUMNS)


def _run(predictions: pd.DataFrame, index: pd.DataFrame) -> tuple[Run, list[str]]:
    """One row per clip, in the order of the index, and the names of the dimensions in their own."""
    names = list(predictions["dimension"].unique())
    wide = predictions.pivot(index="clip", columns="dimension", values=["rating", "prediction"])
    facts = index.set_index("clip").loc[[clip for clip in index["clip"] if clip in wide.index]]
    wide = wide.loc[facts.index]
    rating, prediction = (wide[name][names].to_numpy(float) for name in ("rating", "prediction"))
    fold = predictions.groupby("clip")["fold"].first().loc[facts.index].to_numpy()
    model, protocol, seed = predictions[["model", "protocol", "seed"]].iloc[0]
    segment, group, human = (facts[name].to_numpy() for name in ("segment", "content_group", "human"))
    clips = facts.index.to_numpy()
    nothing = np.full_like(rating, np.nan)
    return Run(model, protocol, int(seed), clips, segment, group, human, fold, rating, prediction, nothing), names


def _pearson(run: Run, scope: str) -> intervals.Estimate:
    sums = scores.group_sums(scores.cleaned(run, scope), metrics.kind_of("pearson"))
    return intervals.jackknife(metrics.from_sums("pearson", intervals.leave_one_out(sums)), intervals.SCALES["pearson"])


def _means_of_others(run: Run) -> np.ndarray:
    """(clips, K): the mean rating of the clips outside each clip's fold."""
    means = {fold: run.rating[run.fold != fold].mean(axis=0) for fold in np.unique(run.fold)}
    return np.stack([means[fold] for fold in run.fold])


def remarks(result: pd.DataFrame, index: pd.DataFrame) -> list[str]:
    """What a reader must know before trusting `evaluate`'s table, a sentence each."""
    heard = result["dimension"][result["low"] > 0]
    better = result["dimension"][result["mae"] < result["mae_of_mean"]]
    clips, groups = result[["clips", "groups"]].iloc[0]
    lines = [
        f"{len(heard)} of {len(result)} dimensions are told on held-out groups (interval of r above 0): {_list(heard)}.",
        f"{len(better)} of {len(result)} are closer to the ratings than always saying the mean: {_list(better)}.",
    ]
    if groups < FEW_GROUPS:
        lines.append(
            f"{clips} clips in {groups} groups: from so few groups an interval may be too narrow by luck, and one "
            "more group may change it."
        )
    if len(below := result["dimension"][result["high"] < 0]):
        lines.append(
            f"{_list(below)}: an interval of r below 0 is no knowledge turned round. A group that is rated "
            "high leaves a low mean to learn from, which shows where little is heard and groups are few."
        )
    for name in result["dimension"][result["r"].isna()]:
        lines.append(f"{name} has no r: its predictions are all alike.")
    sizes = index["content_group"].value_counts()
    if few := int((sizes < FEWEST_IN_SEGMENT).sum()):
        lines.append(f"{few} groups have fewer than {FEWEST_IN_SEGMENT} clips and are left out of r_within_groups.")
    return lines


def _list(names: pd.Series) -> str:
    return ", ".join(names) or "none"
