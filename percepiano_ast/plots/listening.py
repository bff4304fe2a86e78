"""Figures of the sensitivity test: effects of changes to the playing and to the recording on the
ratings.

Vermilion is towards the second pole of a dimension, blue towards the first (Okabe and Ito's
palette, safe for colour-blind readers).
"""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from percepiano_ast.dimensions import DIMENSIONS, KEYS
from percepiano_ast.plots.style import COLOURS, DIVERGING, GREY, MARKERS, Figure

LIMIT = 1.0  # standard deviations at the ends of the colours
_SIGNS = {1: "+", -1: "\N{MINUS SIGN}"}
# Colour of an expected sign that is found, reversed, unclear, or without a change in the sound.
_INKS = {"yes": "black", "no": "black", "unclear": "#6E6E6E", "unheard": "#B5B5B5"}


def sensitivity(table: pd.DataFrame, title: str = "") -> Figure:
    """Variations by dimensions for one model: colour is the standardised change, a sign the
    expectation of musicians.

    Cells with a significant change opposite to the expectation are framed.

    Args:
        table: `evaluation.analysis.sensitivity` of one model.
    """
    labels = list(dict.fromkeys(table["label"]))
    by_cell = table.pivot(
        index="label", columns="dimension", values=["standardised", "expected", "agrees"]
    )
    figure = Figure(figsize=(11.5, 3.2 + 0.24 * len(labels)), layout="constrained")
    axes = figure.subplots()
    values = by_cell["standardised"].loc[labels, list(KEYS)].astype(float)
    image = axes.imshow(values, cmap=DIVERGING, vmin=-LIMIT, vmax=LIMIT, aspect="auto")
    for row, label in enumerate(labels):
        for column, key in enumerate(KEYS):
            _mark(
                axes,
                row,
                column,
                *(by_cell[name].loc[label, key] for name in ("standardised", "expected", "agrees")),
            )
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    names = [f"{one.low} \N{RIGHTWARDS ARROW} {one.high}" for one in DIMENSIONS]
    axes.xaxis.tick_top()
    axes.set_xticks(
        range(len(KEYS)), names, rotation=50, ha="left", rotation_mode="anchor", fontsize=8
    )
    parameters = (
        table.drop_duplicates("label").set_index("label").loc[labels, "parameter"].to_numpy()
    )
    for row in np.flatnonzero(parameters[1:] != parameters[:-1]):
        axes.axhline(row + 0.5, color="black", linewidth=0.6)
    figure.colorbar(
        image,
        ax=axes,
        extend="both",
        pad=0.01,
        label="change (SD of the model's ratings over clips)",
    )
    handles = [
        Line2D(
            [], [], linestyle="", marker=f"${_SIGNS[1]}$", color="black", label="increase expected"
        ),
        Line2D(
            [], [], linestyle="", marker=f"${_SIGNS[-1]}$", color="black", label="decrease expected"
        ),
        Line2D(
            [], [], linestyle="", marker=f"${_SIGNS[1]}$", color=_INKS["unclear"], label="unclear"
        ),
        Line2D(
            [],
            [],
            linestyle="",
            marker=f"${_SIGNS[1]}$",
            color=_INKS["unheard"],
            label="no change in the sound",
        ),
        Rectangle((0, 0), 1, 1, fill=False, edgecolor="black", linewidth=2, label="reversed"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    figure.suptitle(title)
    return figure


def _mark(axes: Axes, row: int, column: int, value: float, expected: int, agrees: str) -> None:
    """Write the expected sign into a cell, and frame the cell if the change is reversed."""
    if not expected:
        return
    ink = "white" if agrees in ("yes", "no") and abs(value) > 0.85 * LIMIT else _INKS[agrees]
    axes.text(
        column,
        row,
        _SIGNS[expected],
        color=ink,
        ha="center",
        va="center",
        fontsize=11,
        weight="bold",
    )
    if agrees == "no":
        axes.add_patch(
            Rectangle(
                (column - 0.46, row - 0.46), 0.92, 0.92, fill=False, edgecolor="black", linewidth=2
            )
        )


def robustness(table: pd.DataFrame, title: str = "") -> Figure:
    """Recording conditions: mean absolute change and correlation; faint marks are dimensions, bold
    marks their median.

    Args:
        table: `evaluation.analysis.robustness` of any number of models.
    """
    labels = list(dict.fromkeys(table["condition"]))
    models = list(dict.fromkeys(table["model"]))
    figure = Figure(
        figsize=(10, 1.8 + 0.34 * len(labels) * max(1, len(models) / 2)), layout="constrained"
    )
    panels = figure.subplots(1, 2, sharey=True)
    offsets = np.linspace(-0.25, 0.25, len(models)) if len(models) > 1 else [0.0]
    for axes, column in zip(panels, ("standardised", "pearson")):
        for model, offset, colour, marker in zip(models, offsets, COLOURS, MARKERS):
            part = table[table["model"] == model]
            y = part["condition"].map(labels.index).to_numpy() + offset
            axes.plot(part[column], y, "|", color=colour, alpha=0.35, markersize=7)
            middle = part.groupby("condition")[column].median()
            rows = [labels.index(label) + offset for label in middle.index]
            axes.plot(middle, rows, marker, color=colour, markersize=6, label=model)
        for row in range(0, len(labels), 2):
            axes.axhspan(row - 0.5, row + 0.5, color="#F3F3F3", zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(labels)), labels, fontsize=9)
    panels[0].set(
        xlabel="mean absolute change (SD of ratings over clips)", ylim=(len(labels) - 0.5, -0.5)
    )
    panels[0].set_xlim(left=0)
    panels[1].set(xlabel="Pearson r with the ratings of the original recordings")
    panels[1].axvline(1, color=GREY, linewidth=0.8)
    handles, names = panels[0].get_legend_handles_labels()
    handles.append(Line2D([], [], linestyle="", marker="|", color=GREY, label="one dimension"))
    figure.legend(
        handles=handles,
        labels=[*names, "one dimension"],
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )
    figure.suptitle(title)
    return figure
