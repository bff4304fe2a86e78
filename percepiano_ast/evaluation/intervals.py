"""95 % intervals for clustered clips: cluster jackknife over content groups (Efron & Stein 1981;
MacKinnon, Nielsen & Webb 2023), with Satterthwaite's degrees of freedom.

Clips that share music are not independent, so the jackknife leaves out entire content groups. The
interval is symmetric on a scale on which the metric is nearly normal and is transformed back. In
simulations with PercePiano's 47 group sizes (within-group correlation of 0.2 or 0.5, true r of 0.3
to 0.8, 4,000 tables each) it covers 95.0 to 95.7 % for Pearson's r, 94.0 to 95.5 % for Spearman's,
95.0 to 96.3 % for R2, 93.0 to 94.4 % for MAE and 94.6 to 95.2 % for CCC; the percentile bootstrap
90.0 to 92.8 %, BCa 85.5 to 91.1 %.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95

_EDGE = 1e-12  # keeps metrics at the end of their range finite on the transformed scale


class Estimate(NamedTuple):
    """Value, interval, standard error and degrees of freedom (on the interval's scale) of each
    column; NaN where undefined."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    error: np.ndarray
    freedom: np.ndarray


class IntervalScale(NamedTuple):
    """A scale on which a metric is nearly normal, and its inverse; ``tails`` is 2 k / (k - 1) for
    deviations of kurtosis k: 3 for normal deviations, near 2 for the skewed ones of errors."""

    to: Callable[[np.ndarray], np.ndarray]
    back: Callable[[np.ndarray], np.ndarray]
    tails: float = 3.0


FISHER = IntervalScale(lambda r: np.arctanh(np.clip(r, _EDGE - 1, 1 - _EDGE)), np.tanh)
LOG = IntervalScale(lambda v: np.log(np.maximum(v, _EDGE)), np.exp, tails=2.0)
LOG_UNEXPLAINED = IntervalScale(
    lambda v: -np.log(np.maximum(1 - v, _EDGE)), lambda z: 1 - np.exp(-z)
)
ARCSINE = IntervalScale(
    lambda p: np.arcsin(np.sqrt(np.clip(p, 0, 1))), lambda z: np.sin(np.clip(z, 0, np.pi / 2)) ** 2
)
PLAIN = IntervalScale(lambda values: values, lambda values: values)
SCALES = {"pearson": FISHER, "spearman": FISHER, "ccc": FISHER, "r2": LOG_UNEXPLAINED, "mae": LOG}


def leave_one_out(sums: np.ndarray) -> np.ndarray:
    """Sums over all content groups, then without each group, (..., 1 + groups, columns)."""
    total = sums.sum(axis=-2, keepdims=True)
    return np.concatenate([total, total - sums], axis=-2)


def spread(values: np.ndarray, tails: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Standard error and degrees of freedom of each column of ``values`` (1 + groups, columns); NaN
    for fewer than two groups or an undefined value.

    Satterthwaite's degrees of freedom of a sum of squared deviations d^2 are 2 (sum d^2)^2 / sum
    var(d^2), with var(d^2) = 2 / ``tails`` of the mean d^4, limited to 1 to groups - 1.
    """
    groups = len(values) - 1
    if groups < 2:
        nothing = np.full(values.shape[1], np.nan)
        return nothing, nothing
    squares = (values[1:] - values[1:].mean(axis=0)) ** 2
    squares[:, ~np.isfinite(values).all(axis=0)] = np.nan
    total, fourth = squares.sum(axis=0), (squares**2).sum(axis=0)
    freedom = np.where(fourth > 0, tails * total**2 / np.where(fourth > 0, fourth, 1), groups - 1.0)
    return np.sqrt((groups - 1) / groups * total), np.clip(freedom, 1, groups - 1)


def jackknife(values: np.ndarray, scale: IntervalScale = PLAIN) -> Estimate:
    """Estimate of each column of ``values`` (1 + groups, columns), see ``spread``."""
    moved = scale.to(values)
    return around(values[0], moved[0], *spread(moved, scale.tails), scale)


def around(value, centre, error, freedom, scale: IntervalScale) -> Estimate:
    """Estimate of ``value`` with the interval ``centre`` +- t ``error`` on ``scale``."""
    reach = stats.t.ppf((1 + LEVEL) / 2, freedom) * error
    ends = np.where(np.isfinite(reach), [centre - reach, centre + reach], np.nan)
    low, high = scale.back(ends)
    return Estimate(value, low, high, error, freedom)
