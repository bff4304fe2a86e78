"""Is one model better than another: paired cluster bootstrap of the difference in Pearson r."""

from itertools import combinations

import numpy as np
import pandas as pd

from percepiano_ast.dimensions import KEYS
from percepiano_ast.evaluation import metrics


def compare(predictions: pd.DataFrame, index: pd.DataFrame, *, n_bootstrap: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Difference in Pearson r between every two models of the same protocol and seed, on the clips both rate.

    Both models are scored on the same resamples of content groups, so what makes a resample hard for both cancels
    (paired bootstrap, Efron & Tibshirani 1993, ch. 16). ``p`` is two-sided: twice the smaller share of resamples on
    either side of zero, at least 2 / (n_bootstrap + 1); it is not corrected for the number of comparisons.

    Returns:
        ``model_a,model_b,protocol,seed,scope,metric,dimension,difference,low,high,p`` with ``difference`` = r of a
        minus r of b, per dimension and ``mean``. NaN where a difference has no value: no common clips, a constant, or
        (interval and p) a single content group.

    Raises:
        InputError: see ``metrics.validate_predictions``.
    """
    tables = [_compare(a, b, n_bootstrap, seed) for a, b in pairs(metrics.runs(predictions, index))]
    columns = ["model_a", "model_b", *metrics.RUN[1:], "scope", "metric", "dimension", "difference", "low", "high", "p"]
    return pd.concat(tables, ignore_index=True)[columns] if tables else pd.DataFrame(columns=columns)


def pairs(runs: list[metrics.Run]) -> list[tuple[metrics.Run, metrics.Run]]:
    """Every two runs that differ in the model alone."""
    return [(a, b) for a, b in combinations(runs, 2) if (a.protocol, a.seed) == (b.protocol, b.seed)]


def _compare(a: metrics.Run, b: metrics.Run, n_bootstrap: int, seed: int) -> pd.DataFrame:
    a, b = a.take(np.isin(a.clip, b.clip)), b.take(np.isin(b.clip, a.clip))  # both follow the order of the index
    names, weights = metrics.resample(a.content_group, n_bootstrap, seed)
    tables = []
    for scope in metrics.SCOPES:
        of_a, of_b = (metrics.scores(run, scope, names, weights, ("pearson",))["pearson"] for run in (a, b))
        difference = of_a - of_b
        samples = difference[1:] if len(names) > 1 else difference[:0]
        low, high = metrics.interval(samples)
        tables.append(pd.DataFrame({
            "model_a": a.model, "model_b": b.model, "protocol": a.protocol, "seed": a.seed, "scope": scope,
            "metric": "pearson", "dimension": [*KEYS, "mean"], "difference": difference[0], "low": low, "high": high,
            "p": np.where(np.isnan(low), np.nan, _two_sided(samples)),
        }))  # fmt: skip
    return pd.concat(tables, ignore_index=True)


def _two_sided(samples: np.ndarray) -> np.ndarray:
    """Bootstrap p of each column of ``samples`` (resamples, columns); a resample without a value is on neither side."""
    counts = np.minimum((samples <= 0).sum(axis=0), (samples >= 0).sum(axis=0))
    return np.minimum(1.0, 2 * (counts + 1) / (np.isfinite(samples).sum(axis=0) + 1))
