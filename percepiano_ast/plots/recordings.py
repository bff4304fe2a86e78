"""Collections of recordings: their contents and their layout in shards."""

import numpy as np
import pandas as pd

from percepiano_ast.plots.style import COLOURS, Figure, clean, colours, require


def collection(table: pd.DataFrame, title: str = "", composers: int = 12) -> Figure:
    """Hours of a collection by composer, by year and by length, each stacked by split.

    Args:
        table: one row per recording with the columns ``split``, ``seconds``, ``composer`` and
            ``year``.
        composers: number of composers with their own bar, those with the most hours.
    """
    require(table, ("split", "seconds", "composer", "year"))
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    hours = table.assign(hours=table["seconds"] / 3600)
    most = hours.groupby("composer")["hours"].sum().sort_values(ascending=False).index[:composers]
    named = hours["composer"].where(hours["composer"].isin(most), "all others")
    by_composer = hours.assign(composer=named).pivot_table(
        index="composer", columns="split", values="hours", aggfunc="sum", fill_value=0.0
    )
    by_composer = by_composer.reindex([*most, *({"all others"} & set(named))][::-1])
    by_year = hours.pivot_table(
        index="year", columns="split", values="hours", aggfunc="sum", fill_value=0.0
    )
    splits = _splits(table)
    colour_of = dict(zip(splits, COLOURS))
    axes = left.subplots()
    _stacked(axes.barh, by_composer, splits, colour_of, "left")
    axes.set(xlabel="hours")
    upper, lower = right.subplots(2, 1)
    _stacked(upper.bar, by_year.set_axis(by_year.index.astype(str)), splits, colour_of, "bottom")
    upper.set(xlabel="year of the recording", ylabel="hours")
    upper.tick_params("x", rotation=45 if len(by_year) > 6 else 0)
    minutes = [table["seconds"][table["split"] == split] / 60 for split in splits]
    bins = np.histogram_bin_edges(table["seconds"] / 60, bins=min(40, max(10, len(table) // 5)))
    labels = [
        f"{split}: {len(part):,} recordings, {_hours(60 * part.sum())}"
        for split, part in zip(splits, minutes)
    ]
    lower.hist(minutes, bins=bins, stacked=True, label=labels, color=colours(len(splits)))
    lower.set(xlabel="length (min)", ylabel="recordings")
    lower.legend(frameon=False, fontsize=8)
    for panel in (axes, upper, lower):
        clean(panel)
    figure.suptitle(title)
    return figure


def shard_layout(table: pd.DataFrame, title: str = "") -> Figure:
    """Layout of recordings in the files of a data set: one row per file, one block per recording as
    wide as its duration.

    Args:
        table: in order, with the columns ``split``, ``shard`` (file name) and ``seconds``.
    """
    require(table, ("split", "shard", "seconds"))
    names = list(dict.fromkeys(table["shard"]))
    height = min(0.6 + 0.22 * len(names), 9.0)
    figure = Figure(figsize=(9, max(height, 1.8)), layout="constrained")
    axes = figure.subplots()
    for split, colour in zip(_splits(table), COLOURS):
        for name, part in table[table["split"] == split].groupby("shard", sort=False):
            start = part["seconds"].cumsum() - part["seconds"]
            blocks = list(zip(start / 60, part["seconds"] / 60))
            row = (names.index(name) - 0.4, 0.8)
            axes.broken_barh(
                blocks, row, facecolor=colour, edgecolor="white", linewidth=0.5, label=split
            )
    step = max(1, len(names) // 40)
    axes.set_yticks(range(0, len(names), step), names[::step], fontsize=7)
    axes.set(title=title, xlabel="minutes of audio in the file", ylim=(len(names) - 0.5, -0.5))
    handles = dict(zip(*reversed(axes.get_legend_handles_labels())))
    axes.legend(
        handles.values(), handles.keys(), frameon=False, loc="upper left", bbox_to_anchor=(1, 1)
    )
    clean(axes)
    return figure


def _splits(table: pd.DataFrame) -> list[str]:
    """The splits of a table in a fixed order, so that a split has the same colour in every
    figure."""
    order = {name: place for place, name in enumerate(("train", "validation", "test"))}
    return sorted(table["split"].unique(), key=lambda name: order.get(name, len(order)))


def _stacked(
    bar, hours: pd.DataFrame, splits: list[str], colour_of: dict[str, str], base: str
) -> None:
    """Stacked bars of (category x split) hours; ``base`` is the argument of ``bar`` for their
    start."""
    foot = np.zeros(len(hours))
    for split in splits:
        if split in hours:
            bar(hours.index, hours[split], color=colour_of[split], **{base: foot})
            foot = foot + hours[split].to_numpy()


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"
