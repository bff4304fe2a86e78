"""Comparison of models: paired permutation tests, training seeds as a random factor, and one row
per model or pair for the report.

Entire content groups of predictions (standardised or ranked) are exchanged, because the clips of a
group are not independent. The difference is divided by its jackknife error; without this the test
is anticonservative (Chung & Romano 2013). In simulations with PercePiano's 47 group sizes (true r
of 0.6, 7,600 pairs each) p is below 0.05 in 4.9 to 5.4 % of cases, but in 6.4 to 8.1 % if the
errors of the two models are clustered unequally.
"""

from importlib import resources
from itertools import combinations, groupby, product

import numpy as np
import pandas as pd
from scipy import stats

from percepiano_ast.dimensions import KEYS
from percepiano_ast.evaluation import intervals, metrics
from percepiano_ast.evaluation.metrics import ROWS, with_means, without_each_group
from percepiano_ast.evaluation.predictions import SCOPES, RunPredictions

POWER = 0.8
_CELL = ["scope", "metric", "dimension"]
_MODEL, _PAIR = ["model", "protocol"], ["model_a", "model_b", "protocol"]
_DIFFERENCE = ["difference", "low", "high", "p", "p_holm"]
TEST_COLUMNS = [*_PAIR, "seed", *_CELL, *_DIFFERENCE, "effect", "cohens_q", "detectable"]
SEED_COLUMNS = [*_MODEL, *_CELL, "seeds", "value", "seed_sd", "low", "high"]
SEED_PAIR_COLUMNS = [*_PAIR, *_CELL, "seeds_a", "seeds_b", *_DIFFERENCE, "detectable"]
DIFFERENCE_COLUMNS = [*_PAIR, *_CELL, "seeds", *_DIFFERENCE, "detectable"]

_MEANS = with_means(np.eye(len(KEYS)))[:, len(KEYS) :]  # (19, means): weights of the dimensions
_EQUAL = 1e-11  # differences closer than this are ties


# --- Permutation tests ----------------------------------------------------------------------------


def paired_tests(
    runs: list[RunPredictions],
    *,
    n_permutations: int = 2000,
    seed: int = 0,
    names: tuple[str, ...] = metrics.METRICS,
) -> pd.DataFrame:
    """Difference of every metric between every two models of the same protocol and seed, on their
    common clips: ``TEST_COLUMNS``, with rows for head groups and ``mean``; NaN where undefined.

    * ``p``: two-sided, from ``n_permutations`` exchanges of content groups (Phipson & Smyth 2010),
      or from all exchanges if there are at most as many;
    * ``p_holm``: corrected over the 19 dimensions (Holm 1979); a mean is not corrected;
    * ``effect``: Cohen's d of paired groups, from their pseudo-values;
    * ``cohens_q``: difference of Fisher's z (Cohen 1988: 0.1 small, 0.3 medium, 0.5 large).
    """
    tables = []
    for (a, b), scope in product(model_pairs(runs), SCOPES):
        parts = [metrics.in_scope(run, scope) for run in common([a, b])]
        groups = len(np.unique(parts[0].content_group))
        swaps, complete = exchanges(groups, n_permutations, seed)
        data = [(part.content_group, part.rating, part.prediction) for part in parts]
        kinds = {metrics.kind_of(name) for name in names}
        sums = {kind: [metrics.group_sums(*part, kind) for part in data] for kind in kinds}
        for name in names:
            one, other = sums[metrics.kind_of(name)]
            of_a, of_b = (
                metrics.from_sums(name, intervals.leave_one_out(part)) for part in (one, other)
            )
            p = np.full(len(ROWS), np.nan)
            if groups > 1:
                p = permutation_p(one, other, name, swaps, complete)
            facts = dict(zip(TEST_COLUMNS, [a.model, b.model, *a.name[1:], scope, name, ROWS]))
            facts |= difference(of_a, of_b, name) | {"p": p, "p_holm": _holm_of_dimensions(p)}
            tables.append(pd.DataFrame(facts))
    return _joined(tables, TEST_COLUMNS)


def model_pairs(runs: list[RunPredictions]) -> list[tuple[RunPredictions, RunPredictions]]:
    """All pairs of runs that differ only in the model."""
    return [(a, b) for a, b in combinations(runs, 2) if a.name[1:] == b.name[1:]]


def common(runs: list[RunPredictions]) -> list[RunPredictions]:
    """The runs restricted to their common clips."""
    shared = set.intersection(*(set(run.clip) for run in runs))
    if all(len(run.clip) == len(shared) for run in runs):
        return list(runs)
    return [run.take(np.array([clip in shared for clip in run.clip], bool)) for run in runs]


def holm(p: np.ndarray) -> np.ndarray:
    """p values (tests,) corrected for their number (Holm 1979, step-down); NaN is not a test."""
    p = np.asarray(p, float)
    order, tests = np.argsort(p), np.isfinite(p).sum()  # NaN last
    factors = np.maximum(tests - np.arange(len(p)), 1)
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * factors))
    return corrected


def _holm_of_dimensions(p: np.ndarray) -> np.ndarray:
    """Holm's p over the 19 dimensions; the means are not corrected."""
    return np.concatenate([holm(p[: len(KEYS)]), p[len(KEYS) :]])


def exchanges(groups: int, n_permutations: int, seed: int) -> tuple[np.ndarray, bool]:
    """Exchanged groups as 0 or 1, (permutations, groups), and whether these are all exchanges."""
    if 2**groups <= n_permutations:
        return (np.arange(2**groups)[:, None] >> np.arange(groups) & 1).astype(float), True
    return np.random.default_rng(seed).integers(0, 2, (n_permutations, groups)).astype(float), False


def permutation_p(
    a: np.ndarray, b: np.ndarray, metric: str, swaps: np.ndarray, complete: bool
) -> np.ndarray:
    """Two-sided p of the difference of ``metric`` for each row of ``ROWS``, from sums of terms of
    two models, (8, groups, 19) each, and `exchanges`."""
    swaps = np.vstack([np.zeros(a.shape[1]), swaps])
    change = swaps @ (b - a)  # one matrix product: (8, 1 + permutations, 19)
    of_a, of_b = a.sum(axis=1, keepdims=True) + change, b.sum(axis=1, keepdims=True) - change
    found = with_means(metrics.from_sums(metric, of_a) - metrics.from_sums(metric, of_b))
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
    permutations, ``ROWS``). ``of_a`` and ``of_b`` are the sums after it, (8, 1 + permutations, 19).

    This dominates the run time, so r is written out: the terms of the ratings do not change.
    """

    def r(sums, n, x, spread_x):
        y, yy, xy = sums / n
        return (xy - x * y) / (spread_x * np.sqrt(yy - y * y))

    n, x, xx = (a[part].sum(axis=0) - a[part] for part in (0, 1, 3))
    # A constant prediction has no r: its p becomes NaN, so its values here do not matter.
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        x, spread_x = x / n, np.sqrt(xx / n - (x / n) ** 2)
        which = [2, 4, 5]  # y, yy, xy
        moved = zip(a[which].swapaxes(0, 1), b[which].swapaxes(0, 1), n, x, spread_x, swaps.T)
        of_a, of_b, total, squares = of_a[which], of_b[which], np.zeros(1), np.zeros(1)
        for one, other, *ratings, swap in moved:
            change = swap[:, None] * (other - one)[:, None]
            value = r(of_a - one[:, None] - change, *ratings)
            value -= r(of_b - other[:, None] + change, *ratings)
            value = np.concatenate([value, np.nan_to_num(value) @ _MEANS], axis=1)
            total, squares = total + value, squares + value**2
        return np.sqrt(np.maximum(squares - total**2 / a.shape[1], 0))


def difference(of_a: np.ndarray, of_b: np.ndarray, metric: str) -> dict[str, np.ndarray]:
    """Difference, interval, effect sizes and detectable difference for each row of ``ROWS``, from
    values of ``metric`` (1 + groups, 19)."""
    a, b = with_means(of_a), with_means(of_b)
    found = intervals.jackknife(a - b)
    with np.errstate(invalid="ignore", divide="ignore"):
        scaled = found.value / (found.error * np.sqrt(len(a) - 1))
    q = np.full(len(ROWS), np.nan)
    if metric in ("pearson", "spearman"):
        q = intervals.FISHER.to(a[0]) - intervals.FISHER.to(b[0])
    numbers = {"difference": found.value, "low": found.low, "high": found.high, "cohens_q": q}
    numbers["effect"] = np.where(found.error > 0, scaled, np.nan)
    return numbers | {"detectable": detectable(found.error, found.freedom)}


def detectable(error: np.ndarray, freedom: np.ndarray) -> np.ndarray:
    """Minimum detectable difference at ``POWER``, two-sided at 5 % (Bloom 1995, eq. 1)."""
    return (stats.t.ppf((1 + intervals.LEVEL) / 2, freedom) + stats.t.ppf(POWER, freedom)) * error


# --- Training seeds -------------------------------------------------------------------------------


def over_seeds(
    runs: list[RunPredictions], names: tuple[str, ...] = metrics.METRICS, *, least: int = 2
) -> pd.DataFrame:
    """Mean over seeds of every metric for each model with at least ``least`` seeds,
    ``SEED_COLUMNS``; the interval covers content groups and seeds (one seed: content groups)."""
    tables = []
    for (model, protocol), same in _by_model(runs, least).items():
        for scope in SCOPES:
            for name, values in _seed_values(same, scope, names).items():
                scale = intervals.SCALES[name]
                moved = scale.to(values)
                centre, value = moved.mean(axis=0), values[:, 0].mean(axis=0)
                error = _added([intervals.spread(centre, scale.tails), _between(moved[:, 0])])
                found = intervals.around(value, centre[0], *error, scale)
                facts = [model, protocol, scope, name, ROWS, len(same), value]
                facts += [_deviation(values[:, 0]), found.low, found.high]
                tables.append(pd.DataFrame(dict(zip(SEED_COLUMNS, facts, strict=True))))
    return _joined(tables, SEED_COLUMNS)


def compare_over_seeds(
    runs: list[RunPredictions], names: tuple[str, ...] = metrics.METRICS, *, least: int = 2
) -> pd.DataFrame:
    """Difference of the means over seeds of every two models with at least ``least`` seeds,
    ``SEED_PAIR_COLUMNS``; ``p`` is from a t test whose error includes content groups and seeds (one
    seed: content groups)."""
    tables = []
    models = _by_model(runs, least).items()
    pairs = [(a, b) for (x, a), (y, b) in combinations(models, 2) if x[1] == y[1]]
    for (a, b), scope in product(pairs, SCOPES):
        shared = common([*a, *b])
        of_a = _seed_values(shared[: len(a)], scope, names)
        of_b = _seed_values(shared[len(a) :], scope, names)
        for name in names:
            value = of_a[name].mean(axis=0) - of_b[name].mean(axis=0)
            between = [_between(values[name][:, 0]) for values in (of_a, of_b)]
            error, freedom = _added([intervals.spread(value), *between])
            found = intervals.around(value[0], value[0], error, freedom, intervals.PLAIN)
            with np.errstate(divide="ignore", invalid="ignore"):
                p = np.where(error > 0, 2 * stats.t.sf(np.abs(value[0]) / error, freedom), np.nan)
            facts = [a[0].model, b[0].model, a[0].protocol, scope, name, ROWS, len(a), len(b)]
            facts += [value[0], found.low, found.high, p, _holm_of_dimensions(p)]
            facts += [detectable(error, freedom)]
            tables.append(pd.DataFrame(dict(zip(SEED_PAIR_COLUMNS, facts, strict=True))))
    return _joined(tables, SEED_PAIR_COLUMNS)


def _by_model(runs: list[RunPredictions], least: int) -> dict[tuple, list[RunPredictions]]:
    """(model, protocol) -> its runs, one per seed, if there are at least ``least``."""
    models = groupby(sorted(runs, key=lambda run: run.name), lambda run: run.name[:2])
    return {name: same for name, group in models if len(same := list(group)) >= least}


def _seed_values(runs: list[RunPredictions], scope: str, names) -> dict[str, np.ndarray]:
    """Metric -> (seeds, 1 + groups, rows of ``ROWS``), on the clips common to all seeds."""
    each = [without_each_group(run, scope, names) for run in common(runs)]
    return {name: np.stack([values[name] for values in each]) for name in names}


def _between(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Standard error and degrees of freedom of the mean over seeds of (seeds, columns)."""
    error = np.nan_to_num(_deviation(values)) / np.sqrt(len(values))  # unknown for one seed
    return error, np.full(values.shape[1], max(len(values) - 1.0, 1.0))


def _deviation(values: np.ndarray) -> np.ndarray:
    """Standard deviation over seeds of ``values`` (seeds, columns); NaN for one seed."""
    return values.std(axis=0, ddof=1) if len(values) > 1 else np.full(values.shape[1], np.nan)


def _added(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Standard error and degrees of freedom of a sum of independent errors (Satterthwaite 1946)."""
    variances = np.stack([error**2 for error, _ in parts])
    total = variances.sum(axis=0)
    weights = (variances**2 / np.stack([freedom for _, freedom in parts])).sum(axis=0)
    known = weights > 0
    return np.sqrt(total), np.where(known, total**2 / np.where(known, weights, 1), parts[0][1])


# --- One row per model or pair --------------------------------------------------------------------


def summary(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """All metrics of all models, ``SEED_COLUMNS``, from the tables of `evaluation.evaluate`, for
    several seeds their mean."""
    single = pd.concat([tables["metrics"], tables["head_groups"]], ignore_index=True)
    alone = _not_in(single, tables["seeds"], _MODEL).assign(seeds=1, seed_sd=np.nan)
    return _joined([alone, tables["seeds"]], SEED_COLUMNS)


def differences(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """All differences between two models, ``DIFFERENCE_COLUMNS``: by `compare_over_seeds` if both
    have several seeds, else by `paired_tests`. ``seeds`` is their number, such as ``3 and 3``."""
    several = tables["seed_comparisons"].copy()
    several["seeds"] = [f"{a} and {b}" for a, b in zip(several["seeds_a"], several["seeds_b"])]
    alone = _not_in(tables["comparisons"], several, _PAIR).assign(seeds="1 and 1")
    return _joined([alone, several], DIFFERENCE_COLUMNS)


def between(pairs: pd.DataFrame, model: str, reference: str) -> pd.DataFrame:
    """The rows of ``differences`` of two models, as ``model`` minus ``reference`` for either order
    in the table."""
    same = pairs[(pairs["model_a"] == model) & (pairs["model_b"] == reference)]
    other = pairs[(pairs["model_a"] == reference) & (pairs["model_b"] == model)]
    seeds = [" and ".join(reversed(text.split(" and "))) for text in other["seeds"]]
    turned = other.assign(model_a=model, model_b=reference, difference=-other["difference"])
    turned = turned.assign(low=-other["high"], high=-other["low"], seeds=seeds)
    return _joined([same, turned], DIFFERENCE_COLUMNS)


def _not_in(table: pd.DataFrame, other: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """The rows of ``table`` whose values in ``columns`` do not occur in ``other``."""
    names, known = (pd.MultiIndex.from_frame(one[columns]) for one in (table, other))
    return table[~names.isin(known)]


def _joined(parts: list[pd.DataFrame], columns: list[str]) -> pd.DataFrame:
    parts = [part[columns] for part in parts if len(part)]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def published_results() -> pd.DataFrame:
    """Results of other systems on PercePiano as reported, not reproduced, means over the 19
    dimensions: ``system,source,hears`` (its input) ``,protocol,nearest`` (protocol of this package)
    ``,metric,value,why_not`` (the reason why the two are not comparable)."""
    return pd.read_csv(resources.files("percepiano_ast") / "data" / "published_results.csv")
