"""Distributions and correlations of people's ratings, and predictions against custom ratings."""

from typing import Any

import numpy as np
import pandas as pd

from percepiano_ast.dimensions import KEYS
from percepiano_ast.plots.style import COLOURS, GREY, LABELS, MARKERS, Figure, clean, require


def rating_distributions(ratings: pd.DataFrame, human: pd.Series, title: str = "") -> Figure:
    """Mean ratings of all clips, one row per dimension: human performances, and deadpan renderings
    below them.

    Boxes span the middle half of the clips, whiskers 95 % of them.

    Args:
        ratings: (clips, 19), 0 to 1, with the clips as index.
        human: bool by clip.
    """
    figure = Figure(figsize=(9.5, 9), layout="constrained")
    axes = figure.subplots()
    is_human = human.loc[ratings.index].to_numpy(bool)
    parts = [
        ("human performances", ratings[is_human], -0.17, COLOURS[0]),
        ("deadpan renderings", ratings[~is_human], 0.2, COLOURS[1]),
    ]
    for name, part, offset, colour in parts:
        if part.empty:
            continue
        drawn = axes.boxplot(
            part[list(KEYS)].to_numpy(),
            positions=np.arange(len(KEYS)) + offset,
            widths=0.28,
            whis=(2.5, 97.5),
            showfliers=False,
            orientation="horizontal",
            patch_artist=True,
            manage_ticks=False,
            medianprops={"color": "white", "linewidth": 1.6},
            boxprops={"facecolor": colour, "edgecolor": colour},
            whiskerprops={"color": colour},
            capprops={"color": colour},
        )
        drawn["boxes"][0].set_label(f"{name} ({len(part):,} clips)")
    axes.axvline(0.5, color=GREY, linewidth=0.8)
    axes.set_yticks(range(len(KEYS)), LABELS.values(), fontsize=9)
    axes.set(
        xlim=(0, 1),
        ylim=(len(KEYS) - 0.4, -0.6),
        xlabel="mean rating of a clip (0 to 1: from the first pole to the second)",
    )
    clean(axes)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.suptitle(title)
    return figure


def correlations(table: pd.DataFrame, title: str = "") -> Figure:
    """Heatmap of Pearson's r: any rows, the 19 dimensions as columns."""
    rows = [LABELS.get(name, name) for name in table.index]
    figure = Figure(figsize=(11, 2.6 + 0.33 * len(rows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(table[list(KEYS)], cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(table[list(KEYS)].to_numpy()):
        ink = "white" if abs(value) > 0.6 else "black"
        axes.text(
            column,
            row,
            f"{value:z.1f}".replace("0.", "."),
            ha="center",
            va="center",
            color=ink,
            fontsize=7,
        )
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_xticks(
        range(len(KEYS)),
        LABELS.values(),
        rotation=50,
        ha="right",
        rotation_mode="anchor",
        fontsize=8,
    )
    figure.colorbar(image, ax=axes, label="Pearson r over clips", pad=0.01)
    figure.suptitle(title)
    return figure


def own_ratings(predictions: pd.DataFrame, title: str = "", most: int = 12) -> Figure:
    """Predictions against ratings, one panel per dimension, in the unit of the ratings; colours are
    held-out folds.

    Args:
        predictions: out-of-fold predictions of one run: ``fold, dimension, rating, prediction``,
            any dimension names.
        most: maximum number of panels; the title says how many dimensions are not drawn.
    """
    require(predictions, ("fold", "dimension", "rating", "prediction"))
    names = list(predictions["dimension"].unique())
    shown = names[:most]
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(2.9 * columns + 0.6, 2.7 * rows + 1.1), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for name, axes in zip(shown, panels):
        part = predictions[predictions["dimension"] == name]
        ends = part[["rating", "prediction"]].to_numpy()
        axes.axline((ends.mean(), ends.mean()), slope=1, color=GREY, linewidth=1, zorder=0)
        for number, (fold, clips) in enumerate(part.groupby("fold")):
            look: dict[str, Any] = {
                "color": COLOURS[number % len(COLOURS)],
                "marker": MARKERS[number % len(MARKERS)],
                "linestyle": "",
            }
            look |= {
                "markersize": 5,
                "alpha": 0.8,
                "markeredgewidth": 0,
                "label": f"held out in fold {fold}",
            }
            axes.plot(clips["rating"], clips["prediction"], **look)
        margin = 0.04 * np.ptp(ends)
        limits = (ends.min() - margin, ends.max() + margin)
        axes.set(
            title=name,
            xlim=limits,
            ylim=limits,
            aspect="equal",
            xlabel="rating",
            ylabel="prediction",
        )
        clean(axes)
    for axes in panels:
        axes.set_visible(False)
    left_out = f"; {len(names) - most} more dimensions are not drawn" * (len(names) > most)
    figure.suptitle(f"{title}{left_out}")
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )
    return figure
