"""Where a model's errors are."""

import pandas as pd
from matplotlib.figure import Figure

from percepiano_ast.dimensions import KEYS
from percepiano_ast.plots.style import LABELS

_PARTS = {
    "noise": ("#999999", "raters disagree"), "passage": ("#0072B2", "level of the passage"),
    "player": ("#009E73", "level of the player"), "clip": ("#D55E00", "this playing of this passage"),
}  # fmt: skip


def parts_of_error(table: pd.DataFrame, title: str = "") -> Figure:
    """Bars a dimension, largest error on top: shares of the ratings' variance that a model does not explain.

    Args:
        table: rows of one run of `evaluation.errors.evaluate`.
    """
    rows = table.set_index("dimension").loc[list(KEYS)].sort_values("all")
    figure = Figure(figsize=(8, 6.4), layout="constrained")
    axes = figure.subplots()
    left = 0.0 * rows["all"]
    for name, (colour, label) in _PARTS.items():
        axes.barh(range(len(rows)), rows[name], left=left, color=colour, label=label)
        left = left + rows[name]
    axes.set_yticks(range(len(rows)), [LABELS[key] for key in rows.index], fontsize=9)
    axes.set(
        xlabel="mean squared error / variance of the ratings",
        xlim=(0, max(1.0, float(left.max()) * 1.02)),
        ylim=(-0.6, len(rows) - 0.4),
    )
    axes.legend(loc="lower right", fontsize=9)
    figure.suptitle(title)
    return figure
