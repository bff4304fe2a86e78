"""Timing descriptors: onset rate, irregularity, asynchrony of chords.

Without a score the tempo is unknown, so irregularity is measured on inter-onset intervals (IOIs)
between chords. Their spread mixes rhythm and rubato, their local variability less so. nPVI: Grabe
and Low (2002); asynchrony and melody lead: Goebl (2001), JASA 110(1).
"""

import numpy as np

from percepiano_ast.descriptors.view import Descriptor, View, mean

_TOGETHER = 0.01  # seconds: a chord with a larger spread counts as spread
_STRETCH = 2.0  # seconds; window of the local onset rate
_FINAL = 0.2  # share of a clip that counts as its end

TABLE = {
    "chord_rate": Descriptor("1/s", "chords and single notes per second"),
    "note_rate": Descriptor("1/s", "notes per second"),
    "ioi_log_std": Descriptor("log s", "standard deviation of log IOIs between chords"),
    "ioi_log_q10": Descriptor("log s", "0.1 quantile of log IOIs between chords"),
    "ioi_log_q50": Descriptor("log s", "median of log IOIs between chords"),
    "ioi_log_q90": Descriptor("log s", "0.9 quantile of log IOIs between chords"),
    "ioi_npvi": Descriptor("", "mean relative difference of successive IOIs (nPVI / 100)"),
    "rubato": Descriptor(
        "log s", "root mean square log ratio of successive IOIs that are about equal"
    ),
    "grid_deviation": Descriptor(
        "octaves", "mean distance of successive IOI ratios from 1:1, 1:2, 1:3 and their inverses"
    ),
    "pace_std": Descriptor("log", "standard deviation of the log onset rate in windows of 2 s"),
    "final_slowing": Descriptor(
        "log", "log of the median IOI in the last fifth relative to the rest"
    ),
    "asynchrony": Descriptor(
        "s", "standard deviation of onsets from their chord's mean; 0 without chords"
    ),
    "asynchrony_spread": Descriptor(
        "s", "mean time from the first to the last note of a chord; 0 without chords"
    ),
    "asynchrony_q90": Descriptor(
        "s", "0.9 quantile of the time from first to last note of a chord; 0 without chords"
    ),
    "spread_share": Descriptor("", "share of chords spread by more than 10 ms; 0 without chords"),
    "melody_lead": Descriptor(
        "s", "mean lead of the highest note of chords over the others; 0 without chords"
    ),
}
_RATIOS = np.log2([1 / 3, 1 / 2, 1, 2, 3])
_ALIKE = 0.35  # octaves: successive IOIs closer than this are taken as the same written value


def measure(view: View) -> dict[str, float]:
    """The descriptors of ``TABLE``."""
    steps = np.log(view.between)
    low, median, high = np.quantile(steps, (0.1, 0.5, 0.9))
    ratios = np.diff(steps) / np.log(2)
    relative = np.abs(np.tanh(np.diff(steps) / 2)) * 2  # 2 |a - b| / (a + b)
    cut = view.start[-1] - _FINAL * (view.start[-1] - view.start[0])
    late = view.start[: len(steps)] >= cut
    slowing = (
        np.median(steps[late]) - np.median(steps[~late]) if late.any() and not late.all() else 0.0
    )
    return {
        "chord_rate": len(view.start) / view.seconds,
        "note_rate": len(view.onset) / view.seconds,
        "ioi_log_std": steps.std(),
        "ioi_log_q10": low,
        "ioi_log_q50": median,
        "ioi_log_q90": high,
        "ioi_npvi": mean(relative),
        "rubato": np.sqrt(mean((ratios[np.abs(ratios) < _ALIKE] * np.log(2)) ** 2)),
        "grid_deviation": (
            mean(np.abs(ratios[:, None] - _RATIOS).min(axis=1)) if len(ratios) else 0.0
        ),
        "pace_std": _pace_std(view),
        "final_slowing": slowing,
        **_spread(view),
    }


def _pace_std(view: View) -> float:
    """Standard deviation of the log number of chords per window, with half-overlapping windows; 0
    for fewer than three."""
    edges = np.arange(view.start[0], view.start[-1] - _STRETCH, _STRETCH / 2)
    if len(edges) < 3:
        return 0.0
    counts = np.searchsorted(view.start, edges + _STRETCH) - np.searchsorted(view.start, edges)
    return float(np.log(counts + 1.0).std())


def _spread(view: View) -> dict[str, float]:
    """Asynchrony of the notes of chords."""
    away = view.onset - view.mean_of_chords(view.onset)[view.chord]
    width = view.of_chords(np.maximum, view.onset) - view.start
    width = width[view.size > 1]
    lead = mean(
        view.onset[view.together & ~view.top] - view.start[view.chord][view.together & ~view.top]
    )
    lead -= mean(
        view.onset[view.together & view.top] - view.start[view.chord][view.together & view.top]
    )
    return {
        "asynchrony": np.sqrt(mean(away[view.together] ** 2)),
        "asynchrony_spread": mean(width),
        "asynchrony_q90": np.quantile(width, 0.9) if len(width) else 0.0,
        "spread_share": mean(width > _TOGETHER),
        "melody_lead": lead,
    }
