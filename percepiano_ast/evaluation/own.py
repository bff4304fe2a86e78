"""Evaluation of held-out predictions of custom ratings: few clips in few groups.

The metrics are those of `metrics` and `intervals`, with two additions for small data: the number of
groups behind an interval, and the error of a baseline that predicts the mean of the training folds.
The baseline has no r: over pooled folds it is always below 0, because holding out a highly rated
fold lowers the mean of the others. For the same reason the r of an uninformative model is slightly
below 0 here.
"""

import numpy as np
import pandas as pd

from percepiano_ast.evaluation import intervals, metrics, scores
from percepiano_ast.evaluation.table import FEWEST_IN_SEGMENT, Run

COLUMNS = [
    "dimension",
    "clips",
    "groups",
    "r",
    "low",
    "high",
    "r_within_groups",
    "mae",
    "mae_of_mean",
]
FEW_GROUPS = 10


def evaluate(predictions: pd.DataFrame, index: pd.DataFrame) -> pd.DataFrame:
    """``COLUMNS``, one row per dimension.

    ``r`` is Pearson's r over all held-out clips, ``low`` and ``high`` its 95 % interval over
    groups; ``r_within_groups`` is r of ratings and predictions centred on the mean of their group,
    over groups of at least `FEWEST_IN_SEGMENT` clips; ``mae`` is the mean absolute error in the
    unit of the ratings, ``mae_of_mean`` that of the mean rating of the other folds. NaN where
    undefined: a constant prediction, an interval from fewer than two groups.

    Args:
        predictions: of one run, with the columns of `table.COLUMNS`; any dimensions and units.
        index: of the clips, with ``clip, segment, content_group, human``.
    """
    run, names = _run(predictions, index)
    values = {scope: _pearson(run, scope) for scope in ("overall", "within_segment")}
    found = values["overall"]
    facts = {
        "dimension": names,
        "clips": len(run.clip),
        "groups": len(np.unique(run.content_group)),
    }
    facts |= {
        "r": found.value,
        "low": found.low,
        "high": found.high,
        "r_within_groups": values["within_segment"].value,
    }
    facts |= {
        "mae": metrics.mae(run.rating, run.prediction),
        "mae_of_mean": metrics.mae(run.rating, _means_of_others(run)),
    }
    return pd.DataFrame(facts, columns=COLUMNS)


def _run(predictions: pd.DataFrame, index: pd.DataFrame) -> tuple[Run, list[str]]:
    """The run with one row per clip in the order of the index, and the dimension names in the order
    of the table."""
    names = list(predictions["dimension"].unique())
    wide = predictions.pivot(index="clip", columns="dimension", values=["rating", "prediction"])
    facts = index.set_index("clip").loc[[clip for clip in index["clip"] if clip in wide.index]]
    wide = wide.loc[facts.index]
    rating, prediction = (wide[name][names].to_numpy(float) for name in ("rating", "prediction"))
    fold = predictions.groupby("clip")["fold"].first().loc[facts.index].to_numpy()
    model, protocol, seed = predictions[["model", "protocol", "seed"]].iloc[0]
    segment, group, human = (
        facts[name].to_numpy() for name in ("segment", "content_group", "human")
    )
    clips = facts.index.to_numpy()
    nothing = np.full_like(rating, np.nan)
    return (
        Run(
            model,
            protocol,
            int(seed),
            clips,
            segment,
            group,
            human,
            fold,
            rating,
            prediction,
            nothing,
        ),
        names,
    )


def _pearson(run: Run, scope: str) -> intervals.Estimate:
    sums = scores.group_sums(scores.cleaned(run, scope), metrics.kind_of("pearson"))
    return intervals.jackknife(
        metrics.from_sums("pearson", intervals.leave_one_out(sums)), intervals.SCALES["pearson"]
    )


def _means_of_others(run: Run) -> np.ndarray:
    """(clips, K): the mean rating of the clips outside each clip's fold."""
    means = {fold: run.rating[run.fold != fold].mean(axis=0) for fold in np.unique(run.fold)}
    return np.stack([means[fold] for fold in run.fold])


def remarks(result: pd.DataFrame, index: pd.DataFrame) -> list[str]:
    """Summary and caveats of the table of `evaluate`, one sentence each."""
    heard = result["dimension"][result["low"] > 0]
    better = result["dimension"][result["mae"] < result["mae_of_mean"]]
    clips, groups = result[["clips", "groups"]].iloc[0]
    chance = "are predicted above chance on held-out groups (interval of r above 0)"
    lines = [
        f"{len(heard)} of {len(result)} dimensions {chance}: {_list(heard)}.",
        (
            f"{len(better)} of {len(result)} dimensions have a lower mean absolute error than"
            f" predicting the mean: {_list(better)}."
        ),
    ]
    if groups < FEW_GROUPS:
        lines.append(
            f"{clips} clips in {groups} groups: with so few groups an interval may be too narrow by"
            " chance, and one more group may change it."
        )
    if len(below := result["dimension"][result["high"] < 0]):
        lines.append(
            f"{_list(below)}: the interval of r is below 0, an artefact of cross-validation with"
            " few groups. Holding out a highly rated group lowers the mean of the training clips."
        )
    for name in result["dimension"][result["r"].isna()]:
        lines.append(f"{name}: r is undefined because the predictions are constant.")
    sizes = index["content_group"].value_counts()
    if few := int((sizes < FEWEST_IN_SEGMENT).sum()):
        lines.append(
            f"{few} groups have fewer than {FEWEST_IN_SEGMENT} clips and are excluded from"
            " r_within_groups."
        )
    return lines


def _list(names: pd.Series) -> str:
    return ", ".join(names) or "none"
