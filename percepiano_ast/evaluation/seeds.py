"""Training seeds as a random factor: variation between seeds, and comparisons that generalise to
other seeds.

A model trained with several seeds has two sources of error: the sample of content groups and the
sample of seeds. Their variances add: the jackknife variance of the mean over seeds, and the
variance between seeds divided by their number. Degrees of freedom are Satterthwaite's.
"""

from itertools import combinations

import numpy as np
import pandas as pd
from scipy import stats

from percepiano_ast.dimensions import KEYS
from percepiano_ast.evaluation import intervals, metrics
from percepiano_ast.evaluation.scores import ROWS, without_each_group
from percepiano_ast.evaluation.significance import common, detectable, holm
from percepiano_ast.evaluation.table import SCOPES, Run

COLUMNS = [
    "model",
    "protocol",
    "scope",
    "metric",
    "dimension",
    "seeds",
    "value",
    "seed_sd",
    "low",
    "high",
]
PAIR_COLUMNS = [
    "model_a",
    "model_b",
    "protocol",
    "scope",
    "metric",
    "dimension",
    "seeds_a",
    "seeds_b",
    "difference",
    "low",
    "high",
    "p",
    "p_holm",
    "detectable",
]


def evaluate(
    runs: list[Run], names: tuple[str, ...] = metrics.METRICS, *, least: int = 2
) -> pd.DataFrame:
    """Mean over seeds of every metric for each model with at least ``least`` seeds: the columns
    ``COLUMNS``.

    ``seed_sd`` is the standard deviation between seeds; the interval ``low`` to ``high`` covers
    variation of content groups and seeds. For a single seed (``least`` 1) ``seed_sd`` is NaN and
    the interval covers content groups only.
    """
    tables = []
    for (model, protocol), same in _by_model(runs).items():
        for scope in SCOPES if len(same) >= least else ():
            for name, values in _values(same, scope, names).items():
                scale = intervals.SCALES[name]
                moved = scale.to(values)
                error, freedom = _added(
                    [intervals.spread(moved.mean(axis=0), scale.tails), _between(moved[:, 0])]
                )
                value = values[:, 0].mean(axis=0)
                estimate = intervals.around(value, moved[:, 0].mean(axis=0), error, freedom, scale)
                tables.append(
                    pd.DataFrame(
                        {
                            "model": model,
                            "protocol": protocol,
                            "scope": scope,
                            "metric": name,
                            "dimension": ROWS,
                            "seeds": len(same),
                            "value": value,
                            "seed_sd": _deviation(values[:, 0]),
                            "low": estimate.low,
                            "high": estimate.high,
                        }
                    )
                )
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=COLUMNS)


def compare(
    runs: list[Run], names: tuple[str, ...] = metrics.METRICS, *, least: int = 2
) -> pd.DataFrame:
    """Difference of the means over seeds of every two models with at least ``least`` seeds: the
    columns ``PAIR_COLUMNS``.

    ``p`` is from a t test whose error includes content groups and seeds (for a single seed: content
    groups only); ``p_holm`` is corrected over the 19 dimensions.
    """
    tables = []
    models = {key: same for key, same in _by_model(runs).items() if len(same) >= least}
    for (a, b), scope in ((pair, scope) for pair in combinations(models, 2) for scope in SCOPES):
        if a[1] == b[1]:
            tables.append(_compare(models[a], models[b], scope, names))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=PAIR_COLUMNS)


def _compare(a: list[Run], b: list[Run], scope: str, names) -> pd.DataFrame:
    shared = common([*a, *b])
    of_a, of_b = _values(shared[: len(a)], scope, names), _values(shared[len(a) :], scope, names)
    tables = []
    for name in names:
        value = of_a[name].mean(axis=0) - of_b[name].mean(axis=0)
        errors = [intervals.spread(value), _between(of_a[name][:, 0]), _between(of_b[name][:, 0])]
        error, freedom = _added(errors)
        estimate = intervals.around(value[0], value[0], error, freedom, intervals.PLAIN)
        with np.errstate(divide="ignore", invalid="ignore"):
            p = np.where(error > 0, 2 * stats.t.sf(np.abs(value[0]) / error, freedom), np.nan)
        tables.append(
            pd.DataFrame(
                {
                    "model_a": a[0].model,
                    "model_b": b[0].model,
                    "protocol": a[0].protocol,
                    "scope": scope,
                    "metric": name,
                    "dimension": ROWS,
                    "seeds_a": len(a),
                    "seeds_b": len(b),
                    "difference": value[0],
                    "low": estimate.low,
                    "high": estimate.high,
                    "p": p,
                    "p_holm": np.concatenate([holm(p[: len(KEYS)]), p[len(KEYS) :]]),
                    "detectable": detectable(error, freedom),
                }
            )
        )
    return pd.concat(tables, ignore_index=True)


def _by_model(runs: list[Run]) -> dict[tuple[str, str], list[Run]]:
    """(model, protocol) -> its runs, one per seed."""
    found: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        found.setdefault(run.name[:2], []).append(run)
    return found


def _values(runs: list[Run], scope: str, names) -> dict[str, np.ndarray]:
    """Metric -> (seeds, 1 + groups, rows of ``ROWS``), on the clips common to all seeds."""
    each = [without_each_group(run, scope, names) for run in common(runs)]
    return {name: np.stack([values[name] for values in each]) for name in names}


def _between(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Standard error of the mean over seeds of ``values`` (seeds, columns), and its degrees of
    freedom."""
    seeds = len(values)
    error = np.nan_to_num(_deviation(values)) / np.sqrt(seeds)  # unknown for one seed
    return error, np.full(values.shape[1], max(seeds - 1.0, 1.0))


def _deviation(values: np.ndarray) -> np.ndarray:
    """Standard deviation over seeds of ``values`` (seeds, columns); NaN for one seed."""
    return values.std(axis=0, ddof=1) if len(values) > 1 else np.full(values.shape[1], np.nan)


def _added(parts: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Standard error and degrees of freedom of a sum of independent errors (Satterthwaite 1946)."""
    variances = np.stack([error**2 for error, _ in parts])
    total = variances.sum(axis=0)
    weights = (variances**2 / np.stack([freedom for _, freedom in parts])).sum(axis=0)
    return np.sqrt(total), np.where(
        weights > 0, total**2 / np.where(weights > 0, weights, 1), parts[0][1]
    )
