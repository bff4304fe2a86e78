"""Training curves."""

from itertools import cycle

import pandas as pd
from matplotlib.ticker import PercentFormatter

from percepiano_ast.errors import InputError
from percepiano_ast.plots.style import COLOURS, Figure, clean, require


def training_curves(
    history: pd.DataFrame, columns: list[str] | None = None, title: str = ""
) -> Figure:
    """Training curves, one panel with its own scale per column.

    Args:
        history: with the column ``step`` or ``epoch`` and the columns to draw; NaN (not measured)
            is not drawn.
        columns: columns to draw, by default every column with "loss" in its name.
    """
    x = next((name for name in ("step", "epoch") if name in history), None)
    columns = [name for name in history.columns if "loss" in name] if columns is None else columns
    if x is None or not columns:
        raise InputError(
            f"history has the columns {list(history.columns)}; give step or epoch, and a loss."
        )
    require(history, columns)
    figure = Figure(figsize=(max(5.0, 3.6 * len(columns)), 3.2), layout="constrained")
    panels = figure.subplots(1, len(columns), squeeze=False)[0]
    for axes, name, colour in zip(panels, columns, cycle(COLOURS)):
        part = history[[x, name]].dropna()
        axes.plot(
            part[x], part[name], color=colour, marker="o" if len(part) <= 30 else "", markersize=4
        )
        if "accuracy" in name:  # in percent as in the training log
            axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        axes.set(title=name.replace("_", " "), xlabel=x)
        clean(axes)
    figure.suptitle(title)
    return figure
