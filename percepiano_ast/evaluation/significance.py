"""Comparison of two models: paired permutation test over content groups, with correction and effect
sizes.

The test is paired: both models rate the same clips. Under the null hypothesis the two models'
predictions for a content group are exchangeable; the test exchanges entire groups, because the
clips of a group are not independent. Correlations do not depend on the scale of a prediction, so
predictions are standardised (or ranked) before the exchange. The difference is divided by its
jackknife error; without this the test of standardised predictions is anticonservative (Chung &
Romano 2013).

Level, simulated with PercePiano's 47 group sizes (two models with true r of 0.6, 7,600 pairs each):
p is below 0.05 in 5.4, 4.9 and 5.4 % if ratings and both models' errors have a within-group
correlation of 0, 0.2 and 0.5. Models of equal r whose errors are clustered unequally are not
exchangeable, and p is too small: 6.4 % (0.2 against 0.5), 8.1 % (0.5 against 0). A p near 0.05
between very different models is weak evidence. Intervals of the difference include 0 in 94.5, 95.9,
96.3, 94.7 and 91.9 %.
"""

from itertools import combinations

import numpy as np
import pandas as pd
from scipy import stats

from percepiano_ast.dimensions import KEYS
from percepiano_ast.evaluation import intervals, metrics
from percepiano_ast.evaluation.scores import ROWS, cleaned, group_sums, summarised
from percepiano_ast.evaluation.table import RUN, SCOPES, Run

POWER = 0.8
COLUMNS = [
    "model_a",
    "model_b",
    *RUN[1:],
    "scope",
    "metric",
    "dimension",
    "difference",
    "low",
    "high",
    "p",
    "p_holm",
    "effect",
    "cohens_q",
    "detectable",
]

# (19, means): weights of the dimensions in each mean
_MEANS = summarised(np.eye(len(KEYS)))[:, len(KEYS) :]
_EQUAL = 1e-11  # differences closer than this are ties


def compare(
    runs: list[Run],
    *,
    n_permutations: int = 2000,
    seed: int = 0,
    names: tuple[str, ...] = metrics.METRICS,
) -> pd.DataFrame:
    """Difference of every metric between every two models of the same protocol and seed, on their
    common clips.

    Returns the columns ``COLUMNS``, one row per pair, scope, metric and dimension (including head
    groups and ``mean``):

    * ``difference``: a minus b, with ``low`` and ``high`` by the jackknife over content groups;
    * ``p``: two-sided, from ``n_permutations`` exchanges of entire content groups, or from all
      exchanges if there are at most as many; a sampled p is at least 1 / (n_permutations + 1)
      (Phipson & Smyth 2010);
    * ``p_holm``: corrected over the 19 dimensions (Holm 1979); a mean is a single test and not
      corrected;
    * ``effect``: the difference in standard deviations of the groups' pseudo-values, Cohen's d of
      paired groups;
    * ``cohens_q``: difference of Fisher's z (Cohen 1988: 0.1 small, 0.3 medium, 0.5 large); for
      correlations only;
    * ``detectable``: minimum detectable difference at 80 % power, (t_.975 + t_.8) standard errors
      (Bloom 1995).

    NaN where undefined: no common clips, a constant, or (except for the difference) a single
    content group.
    """
    tables = [
        _compare(a, b, scope, n_permutations, seed, names)
        for a, b in pairs(runs)
        for scope in SCOPES
    ]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=COLUMNS)


def pairs(runs: list[Run]) -> list[tuple[Run, Run]]:
    """All pairs of runs that differ only in the model."""
    return [(a, b) for a, b in combinations(runs, 2) if a.name[1:] == b.name[1:]]


def common(runs: list[Run]) -> list[Run]:
    """The runs restricted to their common clips."""
    shared = set.intersection(*(set(run.clip) for run in runs))
    if all(len(run.clip) == len(shared) for run in runs):
        return list(runs)
    return [run.take(np.array([clip in shared for clip in run.clip], bool)) for run in runs]


def holm(p: np.ndarray) -> np.ndarray:
    """p values (tests,) corrected for their number (Holm 1979, step-down); NaN stays NaN and does
    not count as a test."""
    p = np.asarray(p, float)
    tests = np.isfinite(p).sum()
    order = np.argsort(p)  # NaN last
    factors = np.maximum(tests - np.arange(len(p)), 1)
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * factors))
    return corrected


def exchanges(groups: int, n_permutations: int, seed: int) -> tuple[np.ndarray, bool]:
    """Exchanged groups as 0 or 1, (permutations, groups), and whether these are all possible
    exchanges."""
    if 2**groups <= n_permutations:
        return (np.arange(2**groups)[:, None] >> np.arange(groups) & 1).astype(float), True
    return np.random.default_rng(seed).integers(0, 2, (n_permutations, groups)).astype(float), False


def permutation_p(
    a: np.ndarray, b: np.ndarray, metric: str, swaps: np.ndarray, complete: bool
) -> np.ndarray:
    """Two-sided p of the difference of ``metric`` for each row of ``ROWS``.

    Args:
        a, b: sums of features of the two models, (8, groups, 19) each.
        swaps: (permutations, groups) of 0 and 1, see ``exchanges``.
        complete: whether ``swaps`` contains every exchange, including the identity.
    """
    swaps = np.vstack([np.zeros(a.shape[1]), swaps])
    change = swaps @ (b - a)  # one matrix product: (8, 1 + permutations, 19)
    of_a, of_b = a.sum(axis=1, keepdims=True) + change, b.sum(axis=1, keepdims=True) - change
    found = summarised(metrics.from_sums(metric, of_a) - metrics.from_sums(metric, of_b))
    if metrics.kind_of(metric) != "values":
        error = _errors(a, b, of_a, of_b, swaps)
        found = np.where(np.abs(found) <= _EQUAL, found, found / np.maximum(error, _EQUAL))
    extreme = (np.abs(found[1:]) >= np.abs(found[0]) - _EQUAL).sum(axis=0)
    p = extreme / (len(swaps) - 1) if complete else (extreme + 1) / len(swaps)
    return np.where(np.isfinite(found).all(axis=0), p, np.nan)


def _errors(
    a: np.ndarray, b: np.ndarray, of_a: np.ndarray, of_b: np.ndarray, swaps: np.ndarray
) -> np.ndarray:
    """Jackknife error of the difference in r after each exchange, up to a constant: (1 +
    permutations, rows of ``ROWS``).

    ``of_a`` and ``of_b`` are the sums after each exchange, (8, 1 + permutations, 19). This function
    dominates the run time of an evaluation, so r is written out: the terms of the ratings are the
    same for all exchanges.
    """
    n, x, xx = (a[part].sum(axis=0) - a[part] for part in (0, 1, 3))
    # r of a constant prediction is undefined for every exchange; its p becomes NaN, so its values
    # here do not matter.
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        x, spread_x = x / n, np.sqrt(xx / n - (x / n) ** 2)
        which = [2, 4, 5]  # y, yy, xy
        moved = zip(a[which].swapaxes(0, 1), b[which].swapaxes(0, 1), n, x, spread_x, swaps.T)
        of_a, of_b, total, squares = of_a[which], of_b[which], 0.0, 0.0
        for one, other, *ratings, swap in moved:
            change = swap[:, None] * (other - one)[:, None]
            value = _r(of_a - one[:, None] - change, *ratings) - _r(
                of_b - other[:, None] + change, *ratings
            )
            value = np.concatenate([value, np.nan_to_num(value) @ _MEANS], axis=1)
            total, squares = total + value, squares + value**2
        return np.sqrt(np.maximum(squares - total**2 / a.shape[1], 0))


def _r(sums: np.ndarray, n: np.ndarray, x: np.ndarray, spread_x: np.ndarray) -> np.ndarray:
    """Pearson's r from the sums of y, yy and xy, (3, permutations, 19), and the ratings' number,
    mean and deviation."""
    y, yy, xy = sums / n
    return (xy - x * y) / (spread_x * np.sqrt(yy - y * y))


def _compare(a: Run, b: Run, scope: str, n_permutations: int, seed: int, names) -> pd.DataFrame:
    parts = [cleaned(run, scope) for run in common([a, b])]
    kinds = {metrics.kind_of(name) for name in names}
    sums = {kind: [group_sums(part, kind) for part in parts] for kind in kinds}
    groups = len(np.unique(parts[0].content_group))
    swaps, complete = exchanges(groups, n_permutations, seed)
    tables = []
    for name in names:
        of_a, of_b = sums[metrics.kind_of(name)]
        values_a, values_b = (
            metrics.from_sums(name, intervals.leave_one_out(one)) for one in (of_a, of_b)
        )
        numbers = difference(values_a, values_b, name)
        p = (
            permutation_p(of_a, of_b, name, swaps, complete)
            if groups > 1
            else np.full(len(ROWS), np.nan)
        )
        corrected = np.concatenate([holm(p[: len(KEYS)]), p[len(KEYS) :]])
        facts = {
            "model_a": a.model,
            "model_b": b.model,
            "protocol": a.protocol,
            "seed": a.seed,
            "scope": scope,
        }
        facts |= {"metric": name, "dimension": ROWS, "p": p, "p_holm": corrected}
        tables.append(pd.DataFrame(facts | numbers)[COLUMNS])
    return pd.concat(tables, ignore_index=True)


def difference(of_a: np.ndarray, of_b: np.ndarray, metric: str) -> dict[str, np.ndarray]:
    """Difference, interval, effect sizes and minimum detectable difference, each for the rows of
    ``ROWS``.

    Args:
        of_a, of_b: values of ``metric``, (1 + groups, 19): over all content groups, then without
            each group.
    """
    a, b = summarised(of_a), summarised(of_b)
    estimate = intervals.jackknife(a - b)
    groups = len(a) - 1
    with np.errstate(invalid="ignore", divide="ignore"):
        effect = np.where(
            estimate.error > 0, estimate.value / (estimate.error * np.sqrt(groups)), np.nan
        )
    q = np.full(len(ROWS), np.nan)
    if metric in ("pearson", "spearman"):
        q = intervals.FISHER.to(a[0]) - intervals.FISHER.to(b[0])
    return {
        "difference": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "effect": effect,
        "cohens_q": q,
        "detectable": detectable(estimate.error, estimate.freedom),
    }


def detectable(error: np.ndarray, freedom: np.ndarray) -> np.ndarray:
    """Minimum detectable difference at ``POWER``, two-sided at 5 % (Bloom 1995, eq. 1)."""
    return (stats.t.ppf((1 + intervals.LEVEL) / 2, freedom) + stats.t.ppf(POWER, freedom)) * error
