"""Figures of explanations and of the sensitivity test."""

from typing import Any

import numpy as np
import pandas as pd
import scipy.ndimage
import scipy.stats
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from percepiano_ast.config import FrontEnd
from percepiano_ast.dimensions import DIMENSIONS, KEYS
from percepiano_ast.errors import InputError
from percepiano_ast.plots.style import (
    COLOURS,
    DIVERGING,
    DOWN,
    FREQUENCIES,
    GREY,
    MARKERS,
    UP,
    Figure,
)

OCTAVES = {f"C{octave}": 440 * 2 ** ((12 * octave + 12 - 69) / 12) for octave in range(4, 9)}
INK, FAINT = "#222222", "#C8C8C8"
TILE = (0.1, 4)  # seconds, bands: contributions are drawn per area of this size
SMOOTH = (0.05, 1.0)  # seconds, bands: standard deviation of the Gaussian that smooths drawn maps
_BLACK_KEYS = (1, 3, 6, 8, 10)
ORDER_STYLES = {
    "most relevant first": (UP, "-", "o"),
    "random": ("#666666", "--", "s"),
    "least relevant first": (DOWN, "-.", "^"),
}
METHOD_NAMES = {
    "gradients": "integrated gradients",
    "relevance": "attention relevance",
    "rollout": "attention rollout",
}
LIKENESSES = {
    "spearman": ("rank correlation of contributions", UP, "o"),
    "spearman_size": ("rank correlation of absolute contributions", "#009E73", "s"),
    "ssim": ("structural similarity (SSIM)", DOWN, "^"),
}


def attribution_map(
    level: np.ndarray,
    values: np.ndarray,
    *,
    hertz: np.ndarray,
    front_end: FrontEnd,
    dimension: str,
    marked: tuple[float, float] | None = None,
    title: str = "",
) -> Figure:
    """Contributions to a rating over the spectrogram, with their sums over frequency and over time.

    Args:
        level: (frames, bands) in dB.
        values: (frames, bands), contributions on the rating's scale.
        hertz: (bands,), band centres, rising.
        dimension: key of the rating.
        marked: start and stop in seconds of the excerpt to mark.

    Raises:
        InputError: shapes that do not match.
    """
    if level.shape != values.shape or level.shape[1:] != hertz.shape:
        raise InputError(
            f"cannot draw: shapes of level {level.shape}, values {values.shape} and bands"
            f" {hertz.shape} do not match"
        )
    figure = Figure(figsize=(11, 6.2), layout="constrained")
    panels = figure.subplots(
        2, 2, width_ratios=(6, 1), height_ratios=(3, 1.25), sharex="col", sharey="row"
    )
    (main, side), (below, corner) = panels
    corner.remove()
    seconds = front_end.seconds(len(level))
    image = _overlay(main, level, values, front_end, seconds)
    _frequency_axis(main, hertz)
    _filled(side, values.sum(axis=0, dtype=np.float64), np.arange(len(hertz)), vertical=True)
    side.set_xlabel("per band")
    _pitch_axis(side, hertz)
    hop = seconds / len(level)
    width = round(1 / hop)
    curve = (
        scipy.ndimage.uniform_filter1d(values.sum(axis=1, dtype=np.float64), width, mode="constant")
        / hop
    )
    _filled(below, curve, (np.arange(len(level)) + 0.5) * hop)
    below.set(xlabel="time (s)", ylabel="per second", xlim=(0, seconds))
    if marked is not None:
        for axes in (main, below):
            axes.axvspan(*marked, fill=False, edgecolor=INK, linewidth=1.6)
        below.axvspan(*marked, color="#F0E442", alpha=0.35, linewidth=0, zorder=0)
        main.text(
            sum(marked) / 2,
            len(hertz) - 3,
            f"{marked[1] - marked[0]:.1f} s with the largest contribution",
            ha="center",
            va="top",
            fontsize=9,
            color=INK,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1.5},
        )
    bar = figure.colorbar(image, ax=side, location="right", aspect=30, pad=0.04)
    bar.set_label(f"contribution to the rating, 1/1000 per {TILE[0]:g} s and {TILE[1]} bands")
    low, high = _poles(dimension)
    figure.suptitle(
        f"{title}\nvermilion: towards \u201c{high}\u201d    blue: towards \u201c{low}\u201d",
        fontsize=11,
    )
    return figure


def _overlay(
    axes: Axes, level: np.ndarray, values: np.ndarray, front_end: FrontEnd, seconds: float
) -> ScalarMappable:
    """Draw the spectrogram in grey and contributions in colour, smaller ones fainter; returns the
    mappable of the colour bar."""
    extent = (0, seconds, -0.5, level.shape[1] - 0.5)
    common: dict[str, Any] = {"origin": "lower", "aspect": "auto", "extent": extent}
    top = float(level.max())
    axes.imshow(
        level.T,
        cmap="Greys",
        vmin=max(top - 80, float(level.min()) - 1e-3),
        vmax=top + 25,
        **common,
    )
    per_second = len(level) / seconds
    area = TILE[0] * per_second * TILE[1]
    smooth = (
        scipy.ndimage.gaussian_filter(
            values.astype(np.float64), (SMOOTH[0] * per_second, SMOOTH[1])
        )
        * area
        * 1000
    )
    most = max(float(np.quantile(np.abs(smooth), 0.998)), 1e-9)
    colours = DIVERGING(0.5 + 0.5 * np.sign(smooth))
    colours[..., 3] = np.clip(np.abs(smooth) / most, 0, 1) ** 0.75
    axes.imshow(colours.swapaxes(0, 1), interpolation="bilinear", **common)
    return ScalarMappable(Normalize(-most, most), DIVERGING)


def _filled(axes: Axes, values: np.ndarray, places: np.ndarray, vertical: bool = False) -> None:
    fill = axes.fill_betweenx if vertical else axes.fill_between
    for part, colour in ((np.maximum(values, 0), UP), (np.minimum(values, 0), DOWN)):
        fill(places, part, color=colour, linewidth=0, alpha=0.85)
    (axes.axvline if vertical else axes.axhline)(0, color=INK, linewidth=0.8)
    most = max(1.08 * float(np.abs(values).max()), 1e-9)
    (axes.set_xlim if vertical else axes.set_ylim)(-most, most)
    (axes.xaxis if vertical else axes.yaxis).set_major_locator(MaxNLocator(nbins=3, symmetric=True))
    axes.spines[["top", "right"]].set_visible(False)


def _frequency_axis(axes: Axes, hertz: np.ndarray) -> None:
    ticks = [tick for tick in FREQUENCIES if hertz[0] <= tick <= hertz[-1]]
    axes.set_yticks(np.interp(ticks, hertz, np.arange(len(hertz))), [f"{tick:,}" for tick in ticks])
    axes.set_ylabel("frequency (Hz)")


def _pitch_axis(axes: Axes, hertz: np.ndarray) -> None:
    """Pitch names on the right of a panel whose y axis is in bands."""
    names = {name: tick for name, tick in OCTAVES.items() if hertz[0] <= tick <= hertz[-1]}
    right = axes.secondary_yaxis("right")
    right.set_yticks(np.interp(list(names.values()), hertz, np.arange(len(hertz))), list(names))
    right.set_ylabel("pitch")


def note_roll(
    table: pd.DataFrame,
    *,
    dimension: str,
    marked: tuple[float, float] | None = None,
    title: str = "",
) -> Figure:
    """A piano roll coloured by the contribution of each note to a rating.

    Args:
        table: from ``explain.note_table``; the title shows its last row, the contribution without a
            note.
        dimension, marked: as in `attribution_map`.
    """
    notes, rest = table[table["note"] >= 0], table[table["note"] < 0]
    pitches = notes["pitch"].to_numpy(int)
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.subplots()
    low, high = pitches.min() - 3, pitches.max() + 4
    for pitch in range(low, high + 1):
        if pitch % 12 in _BLACK_KEYS:
            axes.axhspan(pitch - 0.5, pitch + 0.5, color="#F1F1F1", zorder=0)
        if pitch % 12 == 0:
            axes.axhline(pitch - 0.5, color=FAINT, linewidth=0.7, zorder=0)
    values = 1000 * notes["contribution"].to_numpy()
    most = max(float(np.quantile(np.abs(values), 0.98)), 1e-9)
    image = ScalarMappable(Normalize(-most, most), DIVERGING)
    onset, length = notes["onset"].to_numpy(), (notes["offset"] - notes["onset"]).to_numpy()
    axes.barh(
        pitches,
        length,
        left=onset,
        height=0.86,
        color=image.to_rgba(values),
        edgecolor="#555555",
        linewidth=0.5,
    )
    for _, note in notes.head(6).iterrows():
        axes.annotate(
            f"{note['name']} {1000 * note['contribution']:+.1f}",
            (note["onset"], note["pitch"] + 0.5),
            textcoords="offset points",
            xytext=(0, 3),
            fontsize=8,
            weight="bold",
            color=INK,
        )
    if marked is not None:
        axes.axvspan(*marked, color="#F0E442", alpha=0.3, linewidth=0, zorder=0)
    octaves = [pitch for pitch in range(low, high + 1) if pitch % 12 == 0]
    axes.set_yticks(octaves, [f"C{pitch // 12 - 1}" for pitch in octaves])
    axes.set(
        xlabel="time (s)",
        ylabel="pitch",
        ylim=(low - 0.5, high + 0.5),
        xlim=(0, notes["offset"].max() + 0.3),
    )
    axes.spines[["top", "right"]].set_visible(False)
    bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=30, extend="both")
    bar.set_label("contribution to the rating (1/1000)")
    poles = _poles(dimension)
    share = (
        "the six largest are labelled; frames without a note:"
        f" {1000 * rest['contribution'].sum():+.1f}/1000"
    )
    towards = f"vermilion: towards \u201c{poles[1]}\u201d    blue: towards \u201c{poles[0]}\u201d"
    figure.suptitle(f"{title}\n{towards}    ({share})", fontsize=11)
    return figure


def deletion_curves(deletion: pd.DataFrame, title: str = "") -> Figure:
    """Change of the rating as cells are replaced by the baseline, in three orders: most relevant,
    random, least relevant first.

    Args:
        deletion: as ``explain.checks.Checks.deletion``. Lines are means over recordings, bands 95 %
            t intervals.
    """
    dimensions = list(dict.fromkeys(deletion["dimension"]))
    methods = [name for name in METHOD_NAMES if name in set(deletion["method"])]
    figure = Figure(
        figsize=(3.6 * len(methods) + 0.8, 2.7 * len(dimensions) + 1.2), layout="constrained"
    )
    panels = figure.subplots(
        len(dimensions), len(methods), sharex=True, sharey="row", squeeze=False
    )
    for axes, method in zip(panels[0], methods):
        axes.set_title(METHOD_NAMES[method])
    for row, dimension in zip(panels, dimensions):
        for axes, method in zip(row, methods):
            part = deletion[(deletion["dimension"] == dimension) & (deletion["method"] == method)]
            for order, (colour, dash, marker) in ORDER_STYLES.items():
                curves = part[part["order"] == order].pivot(
                    index="recording", columns="share", values="moved"
                )
                mean, reach = curves.mean(), _reach(curves.to_numpy())
                axes.fill_between(
                    100 * mean.index,
                    mean - reach,
                    mean + reach,
                    color=colour,
                    alpha=0.15,
                    linewidth=0,
                )
                axes.plot(
                    100 * mean.index,
                    mean,
                    dash,
                    color=colour,
                    marker=marker,
                    markersize=3.5,
                    label=order,
                )
            axes.axhline(0, color=INK, linewidth=0.8)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(f"{_label(dimension)}\nchange of the rating", fontsize=9)
    for axes in panels[-1]:
        axes.set_xlabel("cells replaced by the baseline (%)")
    figure.legend(
        *panels[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    figure.suptitle(title)
    return figure


def randomisation_curves(randomisation: pd.DataFrame, threshold: float, title: str = "") -> Figure:
    """Similarity of the map to the trained model's as weights are randomised from the top layer
    down.

    Args:
        randomisation: as ``explain.checks.Checks.randomisation``.
        threshold: similarity above which a map counts as the same, drawn as a line.
    """
    dimensions = list(dict.fromkeys(randomisation["dimension"]))
    figure = Figure(figsize=(max(3.8 * len(dimensions), 5.5), 4.4), layout="constrained")
    panels = figure.subplots(1, len(dimensions), sharey=True, squeeze=False)[0]
    for axes, dimension in zip(panels, dimensions):
        part = randomisation[randomisation["dimension"] == dimension]
        stages = list(dict.fromkeys(part["stage"]))
        for name, (label, colour, marker) in LIKENESSES.items():
            curves = part.pivot(index="recording", columns="stage", values=name)[stages].to_numpy()
            curves = np.concatenate([np.ones((len(curves), 1)), curves], axis=1)
            x = np.arange(curves.shape[1])
            axes.plot(x, curves.T, color=colour, linewidth=0.6, alpha=0.3)
            axes.plot(x, curves.mean(axis=0), color=colour, marker=marker, linewidth=2, label=label)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.axhline(threshold, color="#666666", linewidth=0.8, linestyle=":")
        axes.set_xticks(
            range(len(stages) + 1),
            ["none", *stages],
            rotation=35,
            ha="right",
            rotation_mode="anchor",
        )
        axes.set(
            title=_label(dimension), xlabel="randomised layers, from the top", ylim=(-0.4, 1.05)
        )
        axes.title.set_fontsize(10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("similarity to the trained model's map")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=9,
    )
    figure.suptitle(title)
    return figure


def _reach(curves: np.ndarray) -> np.ndarray:
    """Half of a 95 % interval of the mean over rows; 0 for a single row."""
    n = len(curves)
    if n < 2:
        return np.zeros(curves.shape[1])
    return scipy.stats.t.ppf(0.975, n - 1) * curves.std(axis=0, ddof=1) / np.sqrt(n)


def _poles(key: str) -> tuple[str, str]:
    return next((one.low, one.high) for one in DIMENSIONS if one.key == key)


def _label(key: str) -> str:
    return next(
        f"{one.family}: {one.low} \u2013 {one.high}" for one in DIMENSIONS if one.key == key
    )


LIMIT = 1.0  # standard deviations at the ends of the colours
_SIGNS = {1: "+", -1: "\N{MINUS SIGN}"}
# Colour of an expected sign that is found, reversed, unclear, or without a change in the sound.
_INKS = {"yes": "black", "no": "black", "unclear": "#6E6E6E", "unheard": "#B5B5B5"}


def sensitivity(table: pd.DataFrame, title: str = "") -> Figure:
    """Variations by dimensions for one model: colour is the standardised change, a sign the
    expectation of musicians.

    Cells with a significant change opposite to the expectation are framed.

    Args:
        table: `evaluation.listening.sensitivity` of one model.
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
        table: `evaluation.listening.robustness` of any number of models.
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
