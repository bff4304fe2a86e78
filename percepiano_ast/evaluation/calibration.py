"""Calibration of predicted uncertainty: interval coverage, correlation with the errors, CRPS and
NLL.

Each prediction is a normal distribution with the uncertainty as its standard deviation. The rating
is the mean of about a dozen raters and is noisy itself: a model certain of the true value appears
overconfident.
"""

import numpy as np
import pandas as pd
from scipy import stats

from percepiano_ast.evaluation import intervals, metrics
from percepiano_ast.evaluation.scores import ROWS, by_group, rows, summarised
from percepiano_ast.evaluation.table import RUN, Run

SHARES = (0.5, 0.8, 0.95)
COLUMNS = [*RUN, "metric", "dimension", "value", "low", "high"]


def evaluate(runs: list[Run]) -> pd.DataFrame:
    """``model,protocol,seed,metric,dimension,value,low,high`` of the runs with an uncertainty.

    Metrics: ``coverage_50``, ``coverage_80``, ``coverage_95`` (share of ratings inside the central
    interval), ``error_correlation`` (Pearson's r of the absolute error and the uncertainty),
    ``crps`` (Gneiting & Raftery 2007, eq. 5, in the unit of the ratings, like MAE) and ``nll``
    (natural logarithm; NaN where an uncertainty is 0).
    """
    tables = []
    for run in runs:
        if np.isfinite(run.uncertainty).all():
            for name, (values, scale) in _values(run).items():
                tables.append(
                    rows(
                        run, {"metric": name}, intervals.jackknife(summarised(values), scale), ROWS
                    )
                )
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=COLUMNS)


def crps(rating: np.ndarray, prediction: np.ndarray, uncertainty: np.ndarray) -> np.ndarray:
    """Continuous ranked probability score of normal predictions, elementwise; the absolute error
    where the uncertainty is 0."""
    error = rating - prediction
    certain = uncertainty == 0
    z = error / np.where(certain, 1, uncertainty)
    score = uncertainty * (
        z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / np.sqrt(np.pi)
    )
    return np.where(certain, np.abs(error), score)


def nll(rating: np.ndarray, prediction: np.ndarray, uncertainty: np.ndarray) -> np.ndarray:
    """Negative log likelihood of normal predictions, elementwise; NaN where the uncertainty is
    0."""
    spread = np.where(uncertainty > 0, uncertainty, np.nan)
    return -stats.norm.logpdf(rating, prediction, spread)


def _values(run: Run) -> dict[str, tuple[np.ndarray, intervals.Scale]]:
    """Metric -> values (1 + groups, 19) and the scale of its interval."""
    parts = run.rating, run.prediction, run.uncertainty
    error = np.abs(run.rating - run.prediction)
    of_clips = {}
    for share in SHARES:
        inside = error <= stats.norm.ppf((1 + share) / 2) * run.uncertainty
        of_clips[f"coverage_{100 * share:.0f}"] = inside.astype(float), intervals.ARCSINE
    of_clips |= {"crps": (crps(*parts), intervals.LOG), "nll": (nll(*parts), intervals.PLAIN)}
    result = {name: (_means(run, values), scale) for name, (values, scale) in of_clips.items()}
    constant = metrics.without_rounding(run.uncertainty, run.uncertainty.max(axis=0))
    sums = by_group(
        run.content_group, metrics.features(*metrics.prepared(error, constant, "standardised"))
    )
    result["error_correlation"] = (
        metrics.from_sums("pearson", intervals.leave_one_out(sums)),
        intervals.FISHER,
    )
    return result


def _means(run: Run, values: np.ndarray) -> np.ndarray:
    """Mean over clips of ``values`` (clips, 19): over all content groups, then without each
    group."""
    totals, counts = intervals.leave_one_out(
        by_group(run.content_group, np.stack([values, np.ones_like(values)]))
    )
    return totals / np.where(counts > 0.5, counts, np.nan)
