"""Arrays and tables -> matplotlib Figures, without pyplot's global state: save the figure, or let a notebook show it.

Colours are Okabe and Ito's palette and the maps ``magma`` and ``RdBu``: readable with any colour vision.
"""

import functools
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from percepiano_ast.config import FrontEnd, InputError
from percepiano_ast.dimensions import DIMENSIONS, KEYS

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX"
GREY = "#9A9A9A"
FREQUENCIES = (100, 500, 1000, 2000, 4000, 8000)  # Hz, ticks of the mel axis

LABELS = {
    dimension.key: f"{dimension.family}: {dimension.low} \N{EN DASH} {dimension.high}" for dimension in DIMENSIONS
}


def spectrogram(log_mel_db: np.ndarray, front_end: FrontEnd, title: str = "") -> Figure:
    """A log-mel spectrogram: ``log_mel_db`` is (frames, mels) in dB."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots()
    image = _mel_image(axes, log_mel_db, front_end, _levels(log_mel_db))
    axes.set(title=title, xlabel="time (s)")
    figure.colorbar(image, ax=axes, label="level (dB)", pad=0.01)
    return figure


def masking(original: np.ndarray, masked: np.ndarray, reconstructed: np.ndarray, front_end: FrontEnd) -> Figure:
    """What the encoder saw and what it filled in: (frames, mels) arrays in dB; NaN in ``masked`` is drawn grey."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True, sharey=True)
    titles = ("original", "masked: what the encoder sees", "reconstructed from the rest")
    for axes, values, title in zip(panels, (original, masked, reconstructed), titles):
        image = _mel_image(axes, values, front_end, _levels(original))
        axes.set_title(title, loc="left")
    panels[-1].set_xlabel("time (s)")
    figure.colorbar(image, ax=list(panels), label="level (dB)", pad=0.01, aspect=45)
    return figure


def collection(table: pd.DataFrame, title: str = "", composers: int = 12) -> Figure:
    """Hours of a collection by composer, by year and by length, each stacked by split.

    Args:
        table: a row a recording with the columns ``split``, ``seconds``, ``composer`` and ``year``.
        composers: so many with the most hours get a bar of their own.
    """
    _require(table, ("split", "seconds", "composer", "year"))
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    hours = table.assign(hours=table["seconds"] / 3600)
    most = hours.groupby("composer")["hours"].sum().sort_values(ascending=False).index[:composers]
    named = hours["composer"].where(hours["composer"].isin(most), "all others")
    by_composer = hours.assign(composer=named).pivot_table(
        index="composer", columns="split", values="hours", aggfunc="sum", fill_value=0.0
    )
    by_composer = by_composer.reindex([*most, *({"all others"} & set(named))][::-1])
    by_year = hours.pivot_table(index="year", columns="split", values="hours", aggfunc="sum", fill_value=0.0)
    splits = _splits(table)
    colours = dict(zip(splits, COLOURS))
    axes = left.subplots()
    _stacked(axes.barh, by_composer, splits, colours, "left")
    axes.set(xlabel="hours")
    upper, lower = right.subplots(2, 1)
    _stacked(upper.bar, by_year.set_axis(by_year.index.astype(str)), splits, colours, "bottom")
    upper.set(xlabel="year of the recording", ylabel="hours")
    upper.tick_params("x", rotation=45 if len(by_year) > 6 else 0)
    minutes = [table["seconds"][table["split"] == split] / 60 for split in splits]
    bins = np.histogram_bin_edges(table["seconds"] / 60, bins=min(40, max(10, len(table) // 5)))
    labels = [f"{split}: {len(part):,} recordings, {_hours(60 * part.sum())}" for split, part in zip(splits, minutes)]
    lower.hist(minutes, bins=bins, stacked=True, label=labels, color=_colours(len(splits)))
    lower.set(xlabel="length (min)", ylabel="recordings")
    lower.legend(frameon=False, fontsize=8)
    for panel in (axes, upper, lower):
        _clean(panel)
    figure.suptitle(title)
    return figure


def _splits(table: pd.DataFrame) -> list[str]:
    """The splits of a table, always in one order, so that a split keeps its colour from figure to figure."""
    order = {name: place for place, name in enumerate(("train", "validation", "test"))}
    return sorted(table["split"].unique(), key=lambda name: order.get(name, len(order)))


def _stacked(bar, hours: pd.DataFrame, splits: list[str], colours: dict[str, str], base: str) -> None:
    """Bars of (category x split) hours, one split upon the other; ``base`` is where ``bar`` takes their foot."""
    foot = np.zeros(len(hours))
    for split in splits:
        if split in hours:
            bar(hours.index, hours[split], color=colours[split], **{base: foot})
            foot = foot + hours[split].to_numpy()


def shard_layout(table: pd.DataFrame, title: str = "") -> Figure:
    """How recordings lie in the files of a data set: a row a file, a block a recording, its width its length.

    Args:
        table: in order, with the columns ``split``, ``shard`` (a file's name) and ``seconds``.
    """
    _require(table, ("split", "shard", "seconds"))
    names = list(dict.fromkeys(table["shard"]))
    height = min(0.6 + 0.22 * len(names), 9.0)
    figure = Figure(figsize=(9, max(height, 1.8)), layout="constrained")
    axes = figure.subplots()
    for split, colour in zip(_splits(table), COLOURS):
        for name, part in table[table["split"] == split].groupby("shard", sort=False):
            start = part["seconds"].cumsum() - part["seconds"]
            blocks = list(zip(start / 60, part["seconds"] / 60))
            row = (names.index(name) - 0.4, 0.8)
            axes.broken_barh(blocks, row, facecolor=colour, edgecolor="white", linewidth=0.5, label=split)
    step = max(1, len(names) // 40)
    axes.set_yticks(range(0, len(names), step), names[::step], fontsize=7)
    axes.set(title=title, xlabel="minutes of sound in the file", ylim=(len(names) - 0.5, -0.5))
    handles = dict(zip(*reversed(axes.get_legend_handles_labels())))
    axes.legend(handles.values(), handles.keys(), frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    _clean(axes)
    return figure


def training_curves(history: pd.DataFrame, columns: list[str] | None = None, title: str = "") -> Figure:
    """Curves over training, one panel per column so that each keeps its scale.

    Args:
        history: has the column ``step`` or ``epoch``, and the columns to draw. NaN (not measured there) is left out.
        columns: what to draw; every column with "loss" in its name by default.
    """
    x = next((name for name in ("step", "epoch") if name in history), None)
    columns = [name for name in history.columns if "loss" in name] if columns is None else columns
    if x is None or not columns:
        raise InputError(f"history has the columns {list(history.columns)}; it needs step or epoch, and a loss.")
    _require(history, columns)
    figure = Figure(figsize=(max(5.0, 3.6 * len(columns)), 3.2), layout="constrained")
    panels = figure.subplots(1, len(columns), squeeze=False)[0]
    for axes, name, colour in zip(panels, columns, cycle(COLOURS)):
        part = history[[x, name]].dropna()
        axes.plot(part[x], part[name], color=colour, marker="o" if len(part) <= 30 else "", markersize=4)
        axes.set(title=name.replace("_", " "), xlabel=x)
        _clean(axes)
    figure.suptitle(title)
    return figure


def pearson_by_dimension(
    metrics: pd.DataFrame, scope: str = "overall", ceiling: pd.Series | None = None, title: str = ""
) -> Figure:
    """Pearson r per dimension with its interval, one colour and marker per model, the best mean first.

    Args:
        metrics: metrics of one protocol and seed, as ``evaluation.metrics.evaluate`` returns them.
        scope: one of its scopes.
        ceiling: noise ceiling per dimension key, drawn as a tick: what agreement between raters allows.
    """
    table = _pearson(metrics, scope)
    models = list(table[table["dimension"] == "mean"].sort_values("value", ascending=False)["model"])
    rows = [*KEYS, "mean"]
    figure = Figure(figsize=(9.5, 9.5), layout="constrained")
    axes = figure.subplots()
    offsets = np.linspace(-0.28, 0.28, len(models)) if len(models) > 1 else [0.0]
    styles = _styles(models)
    for model, offset in zip(models, offsets):
        colour, marker = styles[model]
        part = table[table["model"] == model].set_index("dimension").loc[rows]
        y = np.arange(len(rows)) + offset
        axes.hlines(y, part["low"], part["high"], color=colour, linewidth=1.6)
        axes.plot(part["value"], y, marker, color=colour, markersize=5, label=model)
    if ceiling is not None:
        axes.plot(ceiling.loc[list(KEYS)], range(len(KEYS)), "|", color="black", markersize=14, label="noise ceiling")
    for row in range(0, len(rows), 2):
        axes.axhspan(row - 0.5, row + 0.5, color="#F3F3F3", zorder=0)
    axes.axhline(len(KEYS) - 0.5, color="black", linewidth=0.8)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [*LABELS.values(), "mean of the 19"], fontsize=9)
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlabel="Pearson r, held-out clips (95 % interval over content groups)")
    _clean(axes)
    figure.suptitle(title)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def heatmap(metrics: pd.DataFrame, scope: str = "overall", title: str = "") -> Figure:
    """Pearson r, dimensions by models (best mean first), for one protocol and seed."""
    rows = [*KEYS, "mean"]
    wide = _pearson(metrics, scope).pivot(index="dimension", columns="model", values="value").loc[rows]
    wide = wide[wide.loc["mean"].sort_values(ascending=False).index]
    figure = Figure(figsize=(4.6 + 1.15 * len(wide.columns), 8), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(wide, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(wide.to_numpy()):
        text = "n/a" if np.isnan(value) else f"{value:.2f}"
        axes.text(column, row, text, ha="center", va="center", color="white" if abs(value) > 0.6 else "black")
    axes.axhline(len(KEYS) - 0.5, color="black", linewidth=1.5)
    axes.set_xticks(range(len(wide.columns)), wide.columns, rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), [*LABELS.values(), "mean of the 19"], fontsize=9)
    figure.colorbar(image, ax=axes, label="Pearson r")
    figure.suptitle(title)
    return figure


def scatter(predictions: pd.DataFrame, dimension: str, title: str = "") -> Figure:
    """Prediction against rating of one dimension, one panel per model; ``predictions`` of one protocol and seed."""
    if dimension not in KEYS:
        raise InputError(f"unknown dimension {dimension!r}; choose one of: {', '.join(KEYS)}.")
    table = predictions[predictions["dimension"] == dimension]
    models = list(table["model"].unique())
    columns = min(4, len(models))
    rows = -(-len(models) // columns)
    figure = Figure(figsize=(max(5.0, 3.0 * columns), 3.2 * rows + 0.9), layout="compressed")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    values = table[["rating", "prediction"]]
    limits = (values.min().min() - 0.02, values.max().max() + 0.02)
    styles = _styles(models)
    for axes, model in zip(panels.flat, models):
        part = table[table["model"] == model]
        axes.plot(limits, limits, color=GREY, linewidth=1, zorder=0)
        axes.scatter(part["rating"], part["prediction"], s=10, color=styles[model][0], alpha=0.45, linewidths=0)
        axes.set(title=model, xlim=limits, ylim=limits, aspect="equal")
        _clean(axes)
    for axes in panels.flat[len(models):]:
        axes.set_visible(False)
    figure.supxlabel(f"rating, 0 to 1 ({LABELS[dimension]})", fontsize="medium")
    figure.supylabel("prediction", fontsize="medium")
    figure.suptitle(title)
    return figure


def rating_profile(ratings: dict[str, float], uncertainty: dict[str, float] | None = None, title: str = "") -> Figure:
    """The 19 ratings (0 to 1) of one recording, as bars from the middle towards either pole.

    ``uncertainty``: standard deviations, drawn as whiskers of one deviation to each side.
    """
    _require(ratings, KEYS)
    figure = Figure(figsize=(8.5, 7), layout="constrained")
    axes = figure.subplots()
    values = np.array([ratings[key] for key in KEYS])
    families = list(dict.fromkeys(dimension.family for dimension in DIMENSIONS))
    colour_of = dict(zip(families, _colours(len(families))))
    colours = [colour_of[dimension.family] for dimension in DIMENSIONS]
    errors = None if uncertainty is None else [uncertainty[key] for key in KEYS]
    axes.barh(range(len(KEYS)), values - 0.5, left=0.5, color=colours, height=0.62, xerr=errors,
              error_kw={"ecolor": "#333333", "elinewidth": 1.2, "capsize": 3})  # fmt: skip
    axes.axvline(0.5, color="black", linewidth=0.8)
    axes.set_yticks(range(len(KEYS)), [dimension.low for dimension in DIMENSIONS])
    axes.set(xlim=(0, 1), ylim=(len(KEYS) - 0.4, -0.6), xlabel="rating (0 to 1; 0.5 is the middle of the scale)")
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(KEYS)), [dimension.high for dimension in DIMENSIONS])
    right.tick_params(length=0)
    axes.tick_params(axis="y", length=0)
    _clean(axes)
    _name_families(axes, colour_of)
    figure.suptitle(title)
    return figure


def _name_families(axes: Axes, colour_of: dict[str, str]):
    """Separate the families by thin lines and name each inside its first row."""
    order = [dimension.family for dimension in DIMENSIONS]
    for family, colour in colour_of.items():
        first = order.index(family)
        if first:
            axes.axhline(first - 0.5, color="#CCCCCC", linewidth=0.8)
        axes.text(0.008, first - 0.33, family, color=colour, fontsize=8, va="center", weight="bold")


def _mel_image(axes: Axes, values: np.ndarray, front_end: FrontEnd, levels: tuple[float, float]):
    """Draw (frames, mels) with time in seconds and the mel axis labelled in Hz."""
    import librosa  # here, as it takes a second to load and the other figures do not need it

    end = front_end.seconds(len(values))
    image = axes.imshow(
        np.ma.masked_invalid(values.T), origin="lower", aspect="auto", interpolation="nearest",
        extent=(0, end, -0.5, front_end.n_mels - 0.5), vmin=levels[0], vmax=levels[1], cmap="magma",
    )  # fmt: skip
    axes.set_facecolor(GREY)  # hidden patches
    # band k is centred on point k + 1 of n_mels + 2 equal steps in mel
    to_mel = functools.partial(librosa.hz_to_mel, htk=front_end.kind == "kaldi")
    low, high = to_mel([front_end.fmin, front_end.fmax])
    ticks = [hz for hz in FREQUENCIES if front_end.fmin < hz < front_end.fmax]
    places = (to_mel(ticks) - low) / (high - low) * (front_end.n_mels + 1) - 1
    axes.set_yticks(places, [f"{hz:,}" for hz in ticks])
    axes.set_ylabel("frequency (Hz)")
    return image


def _levels(values: np.ndarray) -> tuple[float, float]:
    """Colour scale: the loudest 80 dB of ``values``, less where they span less."""
    top = float(np.nanmax(values))
    return max(top - 80.0, float(np.nanmin(values)) - 1e-3), top


def _pearson(metrics: pd.DataFrame, scope: str) -> pd.DataFrame:
    table = metrics[(metrics["metric"] == "pearson") & (metrics["scope"] == scope)]
    if table.empty:
        raise InputError(f"metrics have no pearson in scope {scope!r}; evaluate first.")
    if table.duplicated(["model", "dimension"]).any():
        raise InputError("metrics hold several protocols or seeds; choose one of each before drawing.")
    return table


def _require(table, columns):
    if missing := [name for name in columns if name not in table]:
        raise InputError(f"cannot draw: {missing} missing; give {', '.join(columns)}.")


def _styles(models: list[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each model, by name: the same in every figure of the same models."""
    return dict(zip(sorted(models), zip(cycle(COLOURS), cycle(MARKERS))))


def _colours(n: int) -> list[str]:
    return [colour for colour, _ in zip(cycle(COLOURS), range(n))]


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


def _clean(axes: Axes):
    axes.spines[["top", "right"]].set_visible(False)
