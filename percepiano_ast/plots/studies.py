"""Figures of explanations (attribution maps, notes, checks of both) and of the sensitivity test.

Vermilion is towards the second pole of a dimension, blue towards the first; spectrograms are grey.
"""

import numpy as np
import pandas as pd
import scipy.ndimage
import scipy.stats
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from percepiano_ast.audio.mel import band_centres
from percepiano_ast.config import FrontEnd
from percepiano_ast.dimensions import DIMENSIONS, KEYS
from percepiano_ast.errors import InputError
from percepiano_ast.plots.style import (
    COLOURS,
    DARK,
    DIVERGING,
    DOWN,
    GREY,
    LABELS,
    MARKERS,
    SLANTED,
    UP,
    Figure,
    Look,
    canvas,
    finish,
    mel_axis,
    offsets,
    stripes,
)

OCTAVES = {f"C{octave}": 440 * 2 ** ((12 * octave + 12 - 69) / 12) for octave in range(4, 9)}
INK, MARKED = "#222222", "#F0E442"
TILE = (0.1, 4)  # seconds, bands: contributions are drawn per area of this size
SMOOTH = (0.05, 1.0)  # seconds, bands: standard deviation of the Gaussian that smooths drawn maps
LIMIT = 1.0  # standard deviations at the ends of the colours of the sensitivity test
ORDER_STYLES = {
    "most relevant first": (UP, "-", "o"),
    "random": (DARK, "--", "s"),
    "least relevant first": (DOWN, "-.", "^"),
}
METHOD_NAMES = {
    "gradients": "integrated gradients",
    "relevance": "attention relevance",
    "rollout": "attention rollout",
}
SIMILARITIES = {
    "spearman": ("rank correlation of contributions", UP, "o"),
    "spearman_size": ("rank correlation of absolute contributions", COLOURS[2], "s"),
    "ssim": ("structural similarity (SSIM)", DOWN, "^"),
}
_TOWARDS = {
    one.key: f"vermilion: towards \u201c{one.high}\u201d    blue: towards \u201c{one.low}\u201d"
    for one in DIMENSIONS
}

# --- Explanations ---------------------------------------------------------------------------------


def attribution_map(
    level: np.ndarray,
    values: np.ndarray,
    *,
    front_end: FrontEnd,
    dimension: str,
    marked: tuple[float, float],
    title: str = "",
) -> Figure:
    """Contributions ``values`` to a rating over the spectrogram ``level`` in dB, both (frames,
    bands), with their sums over frequency and over time; ``marked``: start and stop of an excerpt
    (s). InputError: shapes that do not match."""
    hertz = band_centres(front_end)
    if level.shape != values.shape or level.shape[1:] != hertz.shape:
        raise InputError(
            f"cannot draw: shapes of level {level.shape}, values {values.shape} and bands"
            f" {hertz.shape} do not match"
        )
    ratios = {"width_ratios": (6, 1), "height_ratios": (3, 1.25)}
    figure, panels = canvas(11, 6.2, 2, 2, sharex="col", sharey="row", **ratios)
    (main, side), (below, corner) = panels
    corner.remove()
    seconds = front_end.seconds(len(level))
    bands = np.arange(len(hertz))

    # The map: the spectrogram in grey, contributions in colour, smaller ones fainter.
    common = {"origin": "lower", "aspect": "auto", "extent": (0, seconds, -0.5, len(hertz) - 0.5)}
    top, bottom = float(level.max()), float(level.min()) - 1e-3
    main.imshow(level.T, cmap="Greys", vmin=max(top - 80, bottom), vmax=top + 25, **common)
    per_second = len(level) / seconds
    sigma = (SMOOTH[0] * per_second, SMOOTH[1])
    smooth = scipy.ndimage.gaussian_filter(values.astype(np.float64), sigma)
    smooth = smooth * (TILE[0] * per_second * TILE[1]) * 1000
    most = max(float(np.quantile(np.abs(smooth), 0.998)), 1e-9)
    colours = DIVERGING(0.5 + 0.5 * np.sign(smooth))
    colours[..., 3] = np.clip(np.abs(smooth) / most, 0, 1) ** 0.75
    main.imshow(colours.swapaxes(0, 1), interpolation="bilinear", **common)
    mel_axis(main, front_end)

    # Its sums, over time beside it and over frequency below it.
    _filled(side, values.sum(axis=0, dtype=np.float64), bands, "x")
    side.set_xlabel("per band")
    names = {name: tick for name, tick in OCTAVES.items() if hertz[0] <= tick <= hertz[-1]}
    right = side.secondary_yaxis("right")
    right.set_yticks(np.interp(list(names.values()), hertz, bands), list(names))
    right.set_ylabel("pitch")
    hop = seconds / len(level)
    curve = values.sum(axis=1, dtype=np.float64)
    curve = scipy.ndimage.uniform_filter1d(curve, round(1 / hop), mode="constant") / hop
    _filled(below, curve, (np.arange(len(level)) + 0.5) * hop, "y")
    below.set(xlabel="time (s)", ylabel="per second", xlim=(0, seconds))

    for axes in (main, below):
        axes.axvspan(*marked, fill=False, edgecolor=INK, linewidth=1.6)
    below.axvspan(*marked, color=MARKED, alpha=0.35, linewidth=0, zorder=0)
    words = f"{marked[1] - marked[0]:.1f} s with the largest contribution"
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 1.5}
    look = {"ha": "center", "va": "top", "fontsize": 9, "color": INK, "bbox": box}
    main.text(sum(marked) / 2, len(hertz) - 3, words, **look)
    scale = ScalarMappable(Normalize(-most, most), DIVERGING)
    bar = figure.colorbar(scale, ax=side, location="right", aspect=30, pad=0.04)
    bar.set_label(f"contribution to the rating, 1/1000 per {TILE[0]:g} s and {TILE[1]} bands")
    figure.suptitle(f"{title}\n{_TOWARDS[dimension]}", fontsize=11)
    return figure


def _filled(axes: Axes, values: np.ndarray, places: np.ndarray, way: str) -> None:
    """Fill between 0 and the values, which go along the axis ``way``."""
    fill = axes.fill_betweenx if way == "x" else axes.fill_between
    for part, colour in ((np.maximum(values, 0), UP), (np.minimum(values, 0), DOWN)):
        fill(places, part, color=colour, linewidth=0, alpha=0.85)
    (axes.axvline if way == "x" else axes.axhline)(0, color=INK, linewidth=0.8)
    most = max(1.08 * float(np.abs(values).max()), 1e-9)
    axes.set(**{f"{way}lim": (-most, most)})
    getattr(axes, f"{way}axis").set_major_locator(MaxNLocator(nbins=3, symmetric=True))
    axes.spines[["top", "right"]].set_visible(False)


def note_roll(
    table: pd.DataFrame, *, dimension: str, marked: tuple[float, float], title: str = ""
) -> Figure:
    """A piano roll coloured by the contribution of each note to a rating, from
    `explain.note_table`; the title shows its last row, the contribution without a note."""
    notes, rest = table[table["note"] >= 0], table[table["note"] < 0]
    pitches = notes["pitch"].to_numpy(int)
    figure, axes = canvas(11, 5)
    low, high = pitches.min() - 3, pitches.max() + 4
    for pitch in range(low, high + 1):
        if pitch % 12 in (1, 3, 6, 8, 10):  # black keys
            axes.axhspan(pitch - 0.5, pitch + 0.5, color="#F1F1F1", zorder=0)
        if pitch % 12 == 0:
            axes.axhline(pitch - 0.5, color="#C8C8C8", linewidth=0.7, zorder=0)
    values = 1000 * notes["contribution"].to_numpy()
    most = max(float(np.quantile(np.abs(values), 0.98)), 1e-9)
    image = ScalarMappable(Normalize(-most, most), DIVERGING)
    onset, length = notes["onset"].to_numpy(), (notes["offset"] - notes["onset"]).to_numpy()
    look = {"color": image.to_rgba(values), "edgecolor": "#555555", "linewidth": 0.5}
    axes.barh(pitches, length, left=onset, height=0.86, **look)
    above = {"textcoords": "offset points", "xytext": (0, 3), "weight": "bold"}
    for _, note in notes.head(6).iterrows():
        words = f"{note['name']} {1000 * note['contribution']:+.1f}"
        axes.annotate(words, (note["onset"], note["pitch"] + 0.5), fontsize=8, color=INK, **above)
    axes.axvspan(*marked, color=MARKED, alpha=0.3, linewidth=0, zorder=0)
    octaves = [pitch for pitch in range(low, high + 1) if pitch % 12 == 0]
    axes.set_yticks(octaves, [f"C{pitch // 12 - 1}" for pitch in octaves])
    axes.set(xlabel="time (s)", ylabel="pitch", ylim=(low - 0.5, high + 0.5))
    axes.set_xlim(0, notes["offset"].max() + 0.3)
    bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=30, extend="both")
    bar.set_label("contribution to the rating (1/1000)")
    without = f"frames without a note: {1000 * rest['contribution'].sum():+.1f}/1000"
    finish(figure, "")
    title = f"{title}\n{_TOWARDS[dimension]}    (the six largest are labelled; {without})"
    figure.suptitle(title, fontsize=11)
    return figure


def deletion_curves(deletion: pd.DataFrame, title: str = "") -> Figure:
    """Change of the rating as cells are replaced by the baseline, in three orders: most relevant,
    random, least relevant first. ``deletion``: see `explain.run_checks`. Lines are means
    over recordings, bands 95 % t intervals."""
    dimensions = list(dict.fromkeys(deletion["dimension"]))
    methods = [name for name in METHOD_NAMES if name in set(deletion["method"])]
    rows, columns = len(dimensions), len(methods)
    shape = {"sharex": True, "sharey": "row", "squeeze": False}
    figure, panels = canvas(3.6 * columns + 0.8, 2.7 * rows + 1.2, rows, columns, **shape)
    for row, dimension in zip(panels, dimensions):
        for axes, method in zip(row, methods):
            part = deletion[(deletion["dimension"] == dimension) & (deletion["method"] == method)]
            for order, (colour, dash, marker) in ORDER_STYLES.items():
                curves = part[part["order"] == order]
                curves = curves.pivot(index="recording", columns="share", values="moved")
                mean, reach, n = curves.mean(), 0.0, len(curves)
                if n > 1:
                    reach = scipy.stats.t.ppf(0.975, n - 1) * curves.std() / np.sqrt(n)
                band = {"color": colour, "alpha": 0.15, "linewidth": 0}
                axes.fill_between(100 * mean.index, mean - reach, mean + reach, **band)
                look = {"color": colour, "marker": marker, "markersize": 3.5, "label": order}
                axes.plot(100 * mean.index, mean, dash, **look)
            axes.axhline(0, color=INK, linewidth=0.8)
        row[0].set_ylabel(f"{LABELS[dimension]}\nchange of the rating", fontsize=9)
    for first, last, method in zip(panels[0], panels[-1], methods):
        first.set_title(METHOD_NAMES[method])
        last.set_xlabel("cells replaced by the baseline (%)")
    return finish(figure, title, 3)


def randomisation_curves(randomisation: pd.DataFrame, threshold: float, title: str = "") -> Figure:
    """Similarity of the map to the trained model's as weights are randomised from the top layer
    down, see `explain.run_checks`; a line at the threshold above which a map counts as the same."""
    dimensions = list(dict.fromkeys(randomisation["dimension"]))
    n = len(dimensions)
    figure, panels = canvas(max(3.8 * n, 5.5), 4.4, 1, n, sharey=True, squeeze=False)
    for axes, dimension in zip(panels[0], dimensions):
        part = randomisation[randomisation["dimension"] == dimension]
        stages = list(dict.fromkeys(part["stage"]))
        for name, (label, colour, marker) in SIMILARITIES.items():
            curves = part.pivot(index="recording", columns="stage", values=name)[stages].to_numpy()
            curves = np.concatenate([np.ones((len(curves), 1)), curves], axis=1)
            x = np.arange(curves.shape[1])
            axes.plot(x, curves.T, color=colour, linewidth=0.6, alpha=0.3)
            axes.plot(x, curves.mean(axis=0), color=colour, marker=marker, linewidth=2, label=label)
        axes.axhline(0, color=INK, linewidth=0.8)
        axes.axhline(threshold, color=DARK, linewidth=0.8, linestyle=":")
        axes.set_xticks(range(len(stages) + 1), ["none", *stages], rotation=35, **SLANTED)
        axes.set(xlabel="randomised layers, from the top", ylim=(-0.4, 1.05))
        axes.set_title(LABELS[dimension], fontsize=10)
    panels[0, 0].set_ylabel("similarity to the trained model's map")
    return finish(figure, title, 3, fontsize=9)


# --- Sensitivity test -----------------------------------------------------------------------------


def sensitivity(table: pd.DataFrame, title: str = "") -> Figure:
    """Edits by dimensions for one model, from `sensitivity.sensitivity_table`: colour is the
    standardised change, a sign the expectation of musicians; cells with a significant change
    opposite to it are framed."""
    signs = {1: "+", -1: "\N{MINUS SIGN}"}
    # of an expected sign that is found, reversed, unclear, or without a change in the sound
    inks = {"yes": "black", "no": "black", "unclear": "#6E6E6E", "unheard": "#B5B5B5"}
    frame: Look = {"fill": False, "edgecolor": "black", "linewidth": 2}
    labels = list(dict.fromkeys(table["label"]))
    wide = table.pivot(index="label", columns="dimension", values="standardised")
    figure, axes = canvas(11.5, 3.2 + 0.24 * len(labels))
    values = wide.loc[labels, list(KEYS)].astype(float)
    image = axes.imshow(values, cmap=DIVERGING, vmin=-LIMIT, vmax=LIMIT, aspect="auto")
    for cell in table[table["expected"] != 0].itertuples():
        row, column = labels.index(cell.label), KEYS.index(cell.dimension)
        clear = cell.agrees in ("yes", "no") and abs(cell.standardised) > 0.85 * LIMIT
        look = {"ha": "center", "va": "center", "fontsize": 11, "weight": "bold"}
        look["color"] = "white" if clear else inks[cell.agrees]
        axes.text(column, row, signs[cell.expected], **look)
        if cell.agrees == "no":
            axes.add_patch(Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, **frame))
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    names = [f"{one.low} \N{RIGHTWARDS ARROW} {one.high}" for one in DIMENSIONS]
    axes.xaxis.tick_top()
    axes.set_xticks(range(len(KEYS)), names, rotation=50, fontsize=8, **SLANTED | {"ha": "left"})
    groups = table.drop_duplicates("label").set_index("label").loc[labels, "parameter"].to_numpy()
    for last in np.flatnonzero(groups[1:] != groups[:-1]):
        axes.axhline(last + 0.5, color="black", linewidth=0.6)
    label = "change (SD of the model's ratings over clips)"
    figure.colorbar(image, ax=axes, extend="both", pad=0.01, label=label)
    handles: list[Artist] = [
        Line2D([], [], linestyle="", marker=f"${signs[sign]}$", color=colour, label=label)
        for sign, colour, label in (
            (1, "black", "increase expected"),
            (-1, "black", "decrease expected"),
            (1, inks["unclear"], "unclear"),
            (1, inks["unheard"], "no change in the sound"),
        )
    ]
    handles.append(Rectangle((0, 0), 1, 1, label="reversed", **frame))
    return finish(figure, title, 5, handles=handles, fontsize=9)


def robustness(table: pd.DataFrame, title: str = "") -> Figure:
    """Recording conditions: mean absolute change and correlation; faint marks are dimensions, bold
    marks their median. ``table``: `sensitivity.robustness_table` of any number of models."""
    labels = list(dict.fromkeys(table["condition"]))
    models = list(dict.fromkeys(table["model"]))
    height = 1.8 + 0.34 * len(labels) * max(1, len(models) / 2)
    figure, panels = canvas(10, height, 1, 2, sharey=True)
    for axes, column in zip(panels, ("standardised", "pearson")):
        for model, offset, colour, marker in zip(
            models, offsets(len(models), 0.25), COLOURS, MARKERS
        ):
            part = table[table["model"] == model]
            y = part["condition"].map(labels.index).to_numpy() + offset
            axes.plot(part[column], y, "|", color=colour, alpha=0.35, markersize=7)
            middle = part.groupby("condition")[column].median()
            rows = [labels.index(label) + offset for label in middle.index]
            axes.plot(middle, rows, marker, color=colour, markersize=6, label=model)
        stripes(axes.axhspan, len(labels))
    panels[0].set_yticks(range(len(labels)), labels, fontsize=9)
    panels[0].set_xlabel("mean absolute change (SD of ratings over clips)")
    panels[0].set_ylim(len(labels) - 0.5, -0.5)
    panels[0].set_xlim(left=0)
    panels[1].set_xlabel("Pearson r with the ratings of the original recordings")
    panels[1].axvline(1, color=GREY, linewidth=0.8)
    handles, _ = panels[0].get_legend_handles_labels()
    handles.append(Line2D([], [], linestyle="", marker="|", color=GREY, label="one dimension"))
    return finish(figure, title, 4, handles=handles)
