"""Decomposition of a model's errors, and learning curves."""

import pandas as pd

from percepiano_ast.dimensions import KEYS
from percepiano_ast.plots.style import LABELS, Figure

_PARTS = {
    "noise": ("#999999", "rater noise"),
    "passage": ("#0072B2", "level of the passage"),
    "player": ("#009E73", "level of the player"),
    "clip": ("#D55E00", "individual performance"),
}


def parts_of_error(table: pd.DataFrame, title: str = "") -> Figure:
    """Unexplained share of the ratings' variance by part, one bar per dimension, largest error at
    the top.

    Args:
        table: rows of one run of `evaluation.analysis.error_components`.
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


def learning_curve(table: pd.DataFrame, title: str = "") -> Figure:
    """Mean r against the share of passages, players and clips in training; error bars: standard
    deviation over draws.

    Args:
        table: ``unit,share,draw,r``, from `suite.learning_curve`; the row with share 1 is the end
            point of every line.
    """
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    whole = float(table.loc[table["share"] == 1, "r"].iloc[0])
    parts = (
        table[table["share"] < 1].groupby(["unit", "share"], sort=False)["r"].agg(["mean", "std"])
    )
    for unit, colour in zip(
        parts.index.unique("unit"), ("#0072B2", "#009E73", "#D55E00"), strict=True
    ):
        rows = parts.loc[unit]
        shares, means = [*rows.index, 1.0], [*rows["mean"], whole]
        axes.errorbar(
            shares,
            means,
            [*rows["std"], 0.0],
            color=colour,
            marker="o",
            capsize=3,
            label=f"of {unit}",
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(
        sorted(table["share"].unique()),
        [f"{100 * share:g} %" for share in sorted(table["share"].unique())],
    )
    axes.minorticks_off()
    axes.set(xlabel="share of the training data", ylabel="mean Pearson r over 19 dimensions")
    axes.grid(alpha=0.3)
    axes.legend(title="random share")
    figure.suptitle(title)
    return figure
