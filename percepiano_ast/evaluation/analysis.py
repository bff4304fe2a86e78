"""Analyses beyond the metrics, with 95 % jackknife intervals over content groups."""

import numpy as np
import pandas as pd
from scipy import stats

from percepiano_ast.dimensions import KEYS
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation import intervals, metrics
from percepiano_ast.evaluation.compare import model_pairs
from percepiano_ast.evaluation.metrics import by_group, estimate_rows, without_each_group
from percepiano_ast.evaluation.predictions import MIN_IN_SEGMENT, RUN, SCOPES, RunPredictions

# One standard error of the difference of two mean ratings of PercePiano (SD of 1.27 on the 7-point
# scale, 12 raters). Pairs that differ by more are in their true order more than five times in six.
MIN_DIFFERENCE = 0.074
SHARES = (0.5, 0.8, 0.95)  # nominal coverage of the intervals of a prediction
PARTS = ("noise", "passage", "player", "clip")  # sum to ``all`` except for the overall bias
FEW_SHOT_COLUMNS = "dimension clips groups r low high r_within_groups mae mae_of_mean".split()
FEW_GROUPS = 10

_NAMES = [*KEYS, "mean"]


# --- Contrasts within a run -----------------------------------------------------------------------


def deadpan_gap(runs: list[RunPredictions]) -> pd.DataFrame:
    """Human versus deadpan: ``model,protocol,seed,part,metric,dimension,value,low,high``.

    ``part`` is ``humans`` or ``deadpan`` with the five metrics, or ``gap`` with ``rating`` and
    ``prediction``: human minus deadpan means of a segment, averaged over the segments with both.
    """
    tables = []
    for run in runs:
        for part, chosen in (("humans", run.human), ("deadpan", ~run.human)):
            for metric, values in without_each_group(run.take(chosen), "overall").items():
                facts = {"part": part, "metric": metric}
                tables.append(estimate_rows(run, facts, values, intervals.SCALES[metric]))
        numbers = pd.DataFrame(np.column_stack([run.rating, run.prediction]))
        human, deadpan = (
            numbers[part].groupby(run.segment[part]).mean() for part in (run.human, ~run.human)
        )
        gap = (human - deadpan).dropna(how="all")  # of segments with both
        groups = pd.Series(run.content_group, run.segment).groupby(level=0).first()[gap.index]
        for metric, values in zip(("rating", "prediction"), np.hsplit(gap.to_numpy(), 2)):
            means = group_means(groups.to_numpy(), values, mean=True)
            facts = {"part": "gap", "metric": metric}
            tables.append(estimate_rows(run, facts, means, names=_NAMES))
    return pd.concat(tables, ignore_index=True)


def pairwise_accuracy(
    runs: list[RunPredictions], min_difference: float = MIN_DIFFERENCE
) -> pd.DataFrame:
    """Share of pairs of performances of one segment whose predictions are in the order of their
    ratings: ``model,protocol,seed,scope,min_difference,dimension,pairs,value,low,high``.

    Pairs with ratings that are equal or differ by less than ``min_difference`` (computed for this
    and for 0) are excluded. Equal predictions count as 0.5.

    Raises:
        InputError: ``min_difference`` is not a number from 0 to 1.
    """
    if not 0 <= min_difference < 1:
        raise InputError(
            f"the minimum difference is {min_difference}; give a rating difference from 0 to 1."
        )
    tables = []
    for run in runs:
        for scope in ("within_segment", "within_segment_humans"):
            part = run.take(run.human) if "humans" in scope else run
            codes = np.unique(part.segment, return_inverse=True)[1]
            one, other = np.nonzero(np.triu(codes[:, None] == codes, 1))
            # Means of equal ratings can differ by rounding.
            rated, predicted = (
                np.round(values[one] - values[other], 9)
                for values in (part.rating, part.prediction)
            )
            correct = np.where(predicted == 0, 0.5, np.sign(predicted) == np.sign(rated))
            for least in sorted({0.0, min_difference}):
                counted = ((rated != 0) & (np.abs(rated) >= least)).astype(float)
                shares = group_means(part.content_group[one], correct * counted, counted, True)
                facts = {"scope": scope, "min_difference": least}
                table = estimate_rows(run, facts, shares, intervals.ARCSINE, _NAMES)
                pairs = np.append(counted.sum(axis=0), counted.sum()).astype(int)
                table.insert(table.columns.get_loc("value"), "pairs", pairs)
                tables.append(table)
    return pd.concat(tables, ignore_index=True)


def ceiling_share(runs: list[RunPredictions], ceiling: pd.DataFrame) -> pd.DataFrame:
    """Pearson's r as a share of the noise ceiling, (19 dimensions, scopes), which is taken as
    exact: ``model,protocol,seed,scope,ceiling,dimension,value,low,high``.

    The mean is mean r divided by the mean ceiling. Where the ceiling is 0, the share is NaN and the
    dimension is excluded from the mean.
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
            tables.append(estimate_rows(run, facts, share, names=_NAMES))
    return pd.concat(tables, ignore_index=True)


def group_means(
    groups: np.ndarray, values: np.ndarray, counts: np.ndarray | None = None, mean: bool = False
) -> np.ndarray:
    """Mean of ``values`` (n, columns), weighted by ``counts``, over all content groups, then
    without each, (1 + groups, columns); NaN where the count is 0. ``mean`` appends the mean."""
    counts = np.ones_like(values) if counts is None else counts
    total, count = intervals.leave_one_out(by_group(groups, np.stack([values, counts])))
    means = total / np.where(count > 0.5, count, np.nan)
    return np.column_stack([means, means.mean(axis=1)]) if mean else means


# --- Calibration of the uncertainty ---------------------------------------------------------------


def calibration(runs: list[RunPredictions]) -> pd.DataFrame:
    """``model,protocol,seed,metric,dimension,value,low,high`` of the runs with an uncertainty, the
    standard deviation of a normal prediction.

    Metrics: ``coverage_50``, ``coverage_80``, ``coverage_95`` (share of ratings inside the central
    interval), ``error_correlation`` (Pearson's r of the absolute error and the uncertainty),
    ``crps`` (in the unit of the ratings, like MAE) and ``nll`` (NaN where an uncertainty is 0).
    """
    tables = [pd.DataFrame(columns=[*RUN, "metric", "dimension", "value", "low", "high"])]
    for run in runs:
        if not np.isfinite(run.uncertainty).all():
            continue
        parts = run.rating, run.prediction, run.uncertainty
        groups, error = run.content_group, np.abs(run.rating - run.prediction)
        found = {}
        for share in SHARES:
            inside = error <= stats.norm.ppf((1 + share) / 2) * run.uncertainty
            means = group_means(groups, inside.astype(float))
            found[f"coverage_{100 * share:.0f}"] = means, intervals.ARCSINE
        found["crps"] = group_means(groups, crps(*parts)), intervals.LOG
        found["nll"] = group_means(groups, nll(*parts)), intervals.PLAIN
        known = metrics.without_rounding(run.uncertainty, run.uncertainty.max(axis=0))
        r = metrics.pearson_without_each_group(groups, error, known)
        found["error_correlation"] = r, intervals.FISHER
        for name, (values, scale) in found.items():
            values = metrics.with_means(values)
            tables.append(estimate_rows(run, {"metric": name}, values, scale))
    return pd.concat(tables[1:] or tables, ignore_index=True)


def crps(rating: np.ndarray, prediction: np.ndarray, uncertainty: np.ndarray) -> np.ndarray:
    """Continuous ranked probability score of normal predictions (Gneiting & Raftery 2007, eq. 5),
    elementwise; the absolute error where the uncertainty is 0."""
    error = rating - prediction
    certain = uncertainty == 0
    z = error / np.where(certain, 1, uncertainty)
    score = uncertainty * (
        z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / np.sqrt(np.pi)
    )
    return np.where(certain, np.abs(error), score)


def nll(rating: np.ndarray, prediction: np.ndarray, uncertainty: np.ndarray) -> np.ndarray:
    """Negative log likelihood of normal predictions, elementwise; NaN for an uncertainty of 0."""
    return -stats.norm.logpdf(rating, prediction, np.where(uncertainty > 0, uncertainty, np.nan))


# --- Errors ---------------------------------------------------------------------------------------


def error_components(
    runs: list[RunPredictions], index: pd.DataFrame, ceiling: pd.DataFrame | None = None
) -> pd.DataFrame:
    """``model,protocol,seed,dimension,all,noise,passage,player,clip``: squared errors as shares of
    the ratings' variance; and a row ``mean``.

    Variance components of a two-way analysis of variance without interaction (Searle, Casella and
    McCulloch 1992, chapter 4): the mean error of each content group, the additional error of each
    player, the noise of the mean rating (1 - ceiling squared), and the rest, ``clip``. Without a
    ceiling or players in the index that part is 0.
    """
    players = index.set_index("clip")["player"].astype(str) if "player" in index else None
    noise = np.zeros(len(KEYS))
    if ceiling is not None and "overall" in ceiling:
        noise = 1 - ceiling["overall"].to_numpy() ** 2
    tables = []
    for run in runs:
        error, n = _standardised_errors(run), len(run.clip)
        rest, known = error - error.mean(axis=0), np.ones((n, 1))
        shares, degrees = [], []
        of_clips = [] if players is None else [players.loc[run.clip].to_numpy()]
        for labels in [run.content_group, *of_clips]:
            more = np.column_stack([known, pd.get_dummies(labels).to_numpy(float)])
            left = error - more @ np.linalg.lstsq(more, error, rcond=None)[0]
            degrees.append(np.linalg.matrix_rank(more) - np.linalg.matrix_rank(known))
            shares.append(((rest**2).sum(axis=0) - (left**2).sum(axis=0)) / n)
            rest, known = left, more
        free = n - np.linalg.matrix_rank(known)
        each = (rest**2).sum(axis=0) / free if free else np.zeros(len(KEYS))
        # Negative estimates of a variance component are set to 0.
        found = [np.maximum(share - df * each / n, 0.0) for share, df in zip(shares, degrees)]
        passage, player = [*found, np.zeros(len(KEYS))][:2]
        clip = np.maximum(each - noise, 0.0)
        values = [(error**2).mean(axis=0), noise, passage, player, clip]
        table = pd.DataFrame(dict(zip(["all", *PARTS], values)))
        mean = table.mean().to_frame().T.assign(dimension="mean")
        table = pd.concat([table.assign(dimension=list(KEYS)), mean], ignore_index=True)
        tables.append(table.assign(**dict(zip(RUN, run.name))))
    return pd.concat(tables, ignore_index=True)[[*RUN, "dimension", "all", *PARTS]]


def shared_errors(runs: list[RunPredictions]) -> pd.DataFrame:
    """``protocol,seed,model_a,model_b,correlation``: correlation of the errors of two runs on their
    common clips, mean over dimensions."""
    rows = []
    for a, b in model_pairs(runs):
        _, ours, theirs = np.intersect1d(a.clip, b.clip, return_indices=True)
        x, y = _standardised_errors(a)[ours], _standardised_errors(b)[theirs]
        r = metrics.pearson_without_each_group(a.content_group[ours], x, y)[0]
        rows.append([*a.name[1:], a.model, b.model, float(np.mean(r))])
    return pd.DataFrame(rows, columns=["protocol", "seed", "model_a", "model_b", "correlation"])


def errors_by_kind(runs: list[RunPredictions], index: pd.DataFrame) -> pd.DataFrame:
    """``model,protocol,seed,kind,value,clips,error``: root mean squared error in standard
    deviations of the ratings for each composition, for human and for deadpan performances."""
    rows = []
    for run in runs:
        squared = (_standardised_errors(run) ** 2).mean(axis=1)
        kinds = {"played by": np.where(run.human, "people", "nobody (deadpan)")}
        if "composition" in index:
            kinds["composition"] = index.set_index("clip")["composition"].loc[run.clip].to_numpy()
        for kind, values in kinds.items():
            for value in sorted(set(values)):
                part = squared[values == value]
                rows.append([*run.name, kind, value, len(part), float(np.sqrt(part.mean()))])
    return pd.DataFrame(rows, columns=[*RUN, "kind", "value", "clips", "error"])


def _standardised_errors(run: RunPredictions) -> np.ndarray:
    """Errors in standard deviations of the ratings, (clips, 19)."""
    return (run.prediction - run.rating) / run.rating.std(axis=0)


# --- Custom ratings: few clips --------------------------------------------------------------------


def few_shot_table(predictions: pd.DataFrame, index: pd.DataFrame) -> pd.DataFrame:
    """``FEW_SHOT_COLUMNS`` of the held-out predictions of one run, of any dimensions and units, one
    row per dimension; NaN where undefined.

    ``low`` and ``high`` are the interval of Pearson's ``r`` over ``groups``; ``r_within_groups`` is
    r of values centred on the mean of their group, over groups of at least `MIN_IN_SEGMENT` clips;
    ``mae`` is the mean absolute error, ``mae_of_mean`` that of the mean rating of the other folds
    (whose r would be below 0: holding out a highly rated fold lowers the mean of the others).
    """
    names = list(predictions["dimension"].unique())
    wide = predictions.pivot(index="clip", columns="dimension", values=["rating", "prediction"])
    facts = index[index["clip"].isin(wide.index)].set_index("clip")
    clips = facts.index
    rating, prediction = (
        wide.loc[clips, name][names].to_numpy(float) for name in ("rating", "prediction")
    )
    fold = predictions.groupby("clip")["fold"].first().loc[clips].to_numpy()
    model, protocol, seed = predictions[RUN].iloc[0]
    columns = [facts[name].to_numpy() for name in ("segment", "content_group", "human")]
    columns += [fold, rating, prediction, np.full_like(rating, np.nan)]
    run = RunPredictions(model, protocol, int(seed), clips.to_numpy(), *columns)
    found = {}
    for scope in ("overall", "within_segment"):
        part = metrics.in_scope(run, scope)
        r = metrics.pearson_without_each_group(part.content_group, part.rating, part.prediction)
        found[scope] = intervals.jackknife(r, intervals.FISHER)
    means = {one: rating[fold != one].mean(axis=0) for one in np.unique(fold)}
    facts = [names, len(clips), len(np.unique(run.content_group))]
    facts += [found["overall"].value, found["overall"].low, found["overall"].high]
    facts += [found["within_segment"].value, metrics.mae(rating, prediction)]
    facts += [metrics.mae(rating, np.stack([means[one] for one in fold]))]
    return pd.DataFrame(dict(zip(FEW_SHOT_COLUMNS, facts, strict=True)))


def few_shot_remarks(result: pd.DataFrame, index: pd.DataFrame) -> list[str]:
    """Summary and caveats of the table of `few_shot_table`, one sentence each."""
    names = result["dimension"]
    above, better = names[result["low"] > 0], names[result["mae"] < result["mae_of_mean"]]
    n, (clips, groups) = len(result), result[["clips", "groups"]].iloc[0]
    chance = "are predicted above chance on held-out groups (interval of r above 0)"
    mean = "have a lower mean absolute error than predicting the mean"
    lines = [f"{len(above)} of {n} dimensions {chance}: {', '.join(above) or 'none'}."]
    lines += [f"{len(better)} of {n} dimensions {mean}: {', '.join(better) or 'none'}."]
    if groups < FEW_GROUPS:
        lines.append(
            f"{clips} clips in {groups} groups: with so few an interval may be too narrow by chance"
        )
    if len(below := names[result["high"] < 0]):
        lines.append(
            f"{', '.join(below)}: the interval of r is below 0, an artefact of cross-validation"
            " with few groups."
        )
    for name in names[result["r"].isna()]:
        lines.append(f"{name}: r is undefined because the predictions are constant.")
    if few := int((index["content_group"].value_counts() < MIN_IN_SEGMENT).sum()):
        lines.append(
            f"{few} groups have fewer than {MIN_IN_SEGMENT} clips, excluded from r_within_groups."
        )
    return lines
