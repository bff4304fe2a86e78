"""Figures of recordings, their ratings, and collections of them."""

from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from percepiano_ast.config import FrontEnd
from percepiano_ast.dimensions import DIMENSIONS, KEYS
from percepiano_ast.music.piano_roll import LOWEST, FramePredictions, FrameTargets
from percepiano_ast.music.piano_roll import N_KEYS as PIANO_KEYS
from percepiano_ast.plots.style import (
    COLOURS,
    DIVERGING,
    GREY,
    LABELS,
    MARKERS,
    SLANTED,
    Figure,
    Look,
    canvas,
    cells,
    dimension_rows,
    finish,
    grid,
    mel_axis,
    require,
)

# --- Spectrograms and transcriptions --------------------------------------------------------------


def spectrogram(log_mel_db: np.ndarray, front_end: FrontEnd, title: str = "") -> Figure:
    """A log-mel spectrogram: ``log_mel_db`` is (frames, mels) in dB."""
    figure, axes = canvas(9, 3.4)
    image = _mel_image(axes, log_mel_db, front_end, log_mel_db)
    axes.set(title=title, xlabel="time (s)")
    figure.colorbar(image, ax=axes, label="level (dB)", pad=0.01)
    return figure


def masking(
    original: np.ndarray, masked: np.ndarray, reconstructed: np.ndarray, front_end: FrontEnd
) -> Figure:
    """Original, masked input and reconstruction: (frames, mels) arrays in dB; NaN in ``masked`` is
    drawn grey."""
    figure, panels = canvas(9, 7, 3, 1, sharex=True, sharey=True)
    titles = ("original", "masked: input of the encoder", "reconstruction")
    for axes, values, title in zip(panels, (original, masked, reconstructed), titles):
        image = _mel_image(axes, values, front_end, original)
        axes.set_title(title, loc="left")
    panels[-1].set_xlabel("time (s)")
    figure.colorbar(image, ax=list(panels), label="level (dB)", pad=0.01, aspect=45)
    return figure


def transcription(
    log_mel_db: np.ndarray, played: FrameTargets, predicted: FramePredictions, front_end: FrontEnd
) -> Figure:
    """A window of a recording, (T, mels) in dB, its reference and transcribed keys, and the sustain
    pedal."""
    figure, (top, truth, keys, pedal) = canvas(9, 8, 4, 1, sharex=True, height_ratios=(3, 3, 3, 1))
    image = _mel_image(top, log_mel_db, front_end, log_mel_db)
    figure.colorbar(image, ax=top, label="level (dB)", pad=0.01)
    top.set_title("recording", loc="left")
    end = front_end.seconds(len(log_mel_db))
    extent = (0, end, LOWEST - 0.5, LOWEST + PIANO_KEYS - 0.5)
    for axes, title, frames, onset, colour in (
        (truth, "reference: keys, onsets brighter", played, ~np.isnan(played.onset), GREY),
        (keys, "transcription", predicted, predicted.onset, COLOURS[1]),
    ):
        image = _image(axes, 0.5 * frames.frame + 0.5 * onset, extent, 0, 1)
        axes.set_title(title, loc="left")
        axes.set(ylabel="MIDI pitch", yticks=range(24, 109, 12))
        figure.colorbar(image, ax=axes, label="activation", pad=0.01)
        look = {"color": colour, "label": title.split(":")[0], "drawstyle": "steps-post"}
        times = np.linspace(0, end, len(frames.sustain), endpoint=False)
        pedal.plot(times, frames.sustain, **look)
    pedal.set(xlabel="time (s)", ylabel="sustain pedal", ylim=(-0.05, 1.05))
    pedal.legend(loc="upper right", ncols=2, fontsize="small")
    return finish(figure, "")


def _image(axes: Axes, values: np.ndarray, extent: tuple, low: float, high: float):
    """Draw (frames, rows) values, with time to the right."""
    look: Look = {"origin": "lower", "aspect": "auto", "interpolation": "nearest", "cmap": "magma"}
    return axes.imshow(values.T, extent=extent, vmin=low, vmax=high, **look)


def _mel_image(axes: Axes, values: np.ndarray, front_end: FrontEnd, scale: np.ndarray):
    """Draw (frames, mels) with time in seconds and the mel axis labelled in Hz; the colours cover
    the top 80 dB of ``scale``, or its full range if that is smaller."""
    top = float(np.nanmax(scale))
    bottom = max(top - 80.0, float(np.nanmin(scale)) - 1e-3)
    extent = (0, front_end.seconds(len(values)), -0.5, front_end.n_mels - 0.5)
    axes.set_facecolor(GREY)  # masked patches
    mel_axis(axes, front_end)
    return _image(axes, np.ma.masked_invalid(values), extent, bottom, top)


# --- Ratings of one recording ---------------------------------------------------------------------


def rating_profile(
    ratings: dict[str, float], uncertainty: dict[str, float] | None = None, title: str = ""
) -> Figure:
    """The 19 ratings (0 to 1) of one recording, as bars from the middle of the scale towards either
    pole, with standard deviations as whiskers."""
    require(ratings, KEYS)
    values = np.array([ratings[key] for key in KEYS])
    errors = None if uncertainty is None else np.tile([uncertainty[key] for key in KEYS], (2, 1))
    return _profile(values, errors, 0.5, "rating (0 to 1; 0.5 is the middle of the scale)", title)


def percentile_profile(
    percentiles: dict[str, float], bands: dict[str, tuple[float, float]], title: str = ""
) -> Figure:
    """Percentiles (0 to 100) of the 19 ratings of one recording, as bars from the median towards
    either pole; whiskers: percentiles of the ratings minus and plus one standard deviation."""
    require(percentiles, KEYS)
    values = np.array([percentiles[key] for key in KEYS])
    edges = np.array([bands[key] for key in KEYS])
    errors = np.maximum([values - edges[:, 0], edges[:, 1] - values], 0)
    label = (
        "percentile among people's ratings of PercePiano's human performances (50 is the median)"
    )
    return _profile(values, errors, 50, label, title)


def _profile(
    values: np.ndarray, errors: np.ndarray | None, middle: float, label: str, title: str
) -> Figure:
    """Bars from ``middle``, half of the axis, with whiskers ``errors`` (2, 19) below and above."""
    figure, axes = canvas(8.5, 7)
    order = [dimension.family for dimension in DIMENSIONS]
    colour_of = dict(zip(dict.fromkeys(order), cycle(COLOURS)))
    look = {"color": [colour_of[family] for family in order], "height": 0.62, "xerr": errors}
    whiskers = {"ecolor": "#333333", "elinewidth": 1.2, "capsize": 3}
    axes.barh(range(len(KEYS)), values - middle, left=middle, error_kw=whiskers, **look)
    axes.axvline(middle, color="black", linewidth=0.8)
    _poles(axes)
    axes.set(xlim=(0, 2 * middle), ylim=(len(KEYS) - 0.4, -0.6), xlabel=label)
    for family, colour in colour_of.items():  # its name in the first row, a line above
        first = order.index(family)
        if first:
            axes.axhline(first - 0.5, color="#CCCCCC", linewidth=0.8)
        look = {"color": colour, "fontsize": 8, "va": "center", "weight": "bold"}
        axes.text(0.016 * middle, first - 0.33, family, **look)
    return finish(figure, title)


def rating_course(
    times: np.ndarray, course: np.ndarray, percentiles: dict[str, float], title: str = ""
) -> Figure:
    """Percentiles (m, 19) of the ratings of windows, NaN if not rated, relative to those of the
    whole recording; ``times``: seconds (m,) at the middle of each window."""
    require(percentiles, KEYS)
    aside = np.asarray(course).T - np.array([percentiles[key] for key in KEYS])[:, None]
    figure, axes = canvas(9, 6.5)
    most = max(float(np.nanmax(np.abs(aside))) if np.isfinite(aside).any() else 0.0, 5.0)
    step = times[1] - times[0] if len(times) > 1 else 1.0
    edges = np.append(times - step / 2, times[-1] + step / 2), np.arange(len(KEYS) + 1) - 0.5
    mesh = axes.pcolormesh(*edges, aside, cmap=DIVERGING, vmin=-most, vmax=most)
    _poles(axes)
    axes.set(ylim=(len(KEYS) - 0.5, -0.5), xlabel="seconds (middle of each window)")
    label = "percentiles towards the left (blue) or right (vermilion) pole"
    figure.colorbar(mesh, ax=axes, label=label, shrink=0.8)
    figure.suptitle(title)
    return figure


def _poles(axes: Axes) -> None:
    """Name the rows by the poles of the dimensions: the first on the left, the second right."""
    axes.set_yticks(range(len(KEYS)), [dimension.low for dimension in DIMENSIONS])
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(KEYS)), [dimension.high for dimension in DIMENSIONS])
    for one in (axes, right):
        one.tick_params(axis="y", length=0)


# --- Ratings of many recordings -------------------------------------------------------------------


def rating_distributions(ratings: pd.DataFrame, human: pd.Series, title: str = "") -> Figure:
    """Mean ratings (clips, 19), 0 to 1, one row per dimension: human performances, and deadpan
    renderings below them. Boxes span the middle half of the clips, whiskers 95 %."""
    figure, axes = canvas(9.5, 9)
    is_human = human.loc[ratings.index].to_numpy(bool)
    for name, part, offset, colour in (
        ("human performances", ratings[is_human], -0.17, COLOURS[0]),
        ("deadpan renderings", ratings[~is_human], 0.2, COLOURS[1]),
    ):
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
    dimension_rows(axes)
    axes.set(xlim=(0, 1), ylim=(len(KEYS) - 0.4, -0.6))
    axes.set_xlabel("mean rating of a clip (0 to 1: from the first pole to the second)")
    return finish(figure, title, 2)


def correlations(table: pd.DataFrame, title: str = "") -> Figure:
    """Heatmap of Pearson's r: any rows, the 19 dimensions as columns."""
    rows = [LABELS.get(name, name) for name in table.index]
    figure, axes = canvas(11, 2.6 + 0.33 * len(rows))
    image = cells(axes, table[list(KEYS)].to_numpy(), "z.1f", fontsize=7)
    for text in axes.texts:
        text.set_text(text.get_text().replace("0.", "."))
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_xticks(range(len(KEYS)), LABELS.values(), rotation=50, fontsize=8, **SLANTED)
    figure.colorbar(image, ax=axes, label="Pearson r over clips", pad=0.01)
    return finish(figure, title)


def custom_ratings(predictions: pd.DataFrame, title: str = "", most: int = 12) -> Figure:
    """Out-of-fold predictions against custom ratings (``fold, dimension, rating, prediction``), one
    panel per dimension, at most ``most``, in the unit of the ratings; colours are folds."""
    require(predictions, ("fold", "dimension", "rating", "prediction"))
    names = list(predictions["dimension"].unique())
    figure, panels = grid(len(names[:most]), (2.9, 2.7), (0.6, 1.1))
    for name, axes in zip(names, panels):
        part = predictions[predictions["dimension"] == name]
        ends = part[["rating", "prediction"]].to_numpy()
        axes.axline((ends.mean(), ends.mean()), slope=1, color=GREY, linewidth=1, zorder=0)
        for (fold, clips), colour, marker in zip(
            part.groupby("fold"), cycle(COLOURS), cycle(MARKERS)
        ):
            look = {"color": colour, "markersize": 5, "alpha": 0.8, "markeredgewidth": 0}
            label = f"held out in fold {fold}"
            axes.plot(clips["rating"], clips["prediction"], marker, label=label, **look)
        margin = 0.04 * np.ptp(ends)
        limits = (ends.min() - margin, ends.max() + margin)
        axes.set(title=name, xlim=limits, ylim=limits, aspect="equal")
        axes.set(xlabel="rating", ylabel="prediction")
    left_out = f"; {len(names) - most} more dimensions are not drawn" * (len(names) > most)
    return finish(figure, f"{title}{left_out}", 4)


# --- Collections of recordings --------------------------------------------------------------------


def collection(table: pd.DataFrame, title: str = "") -> Figure:
    """Hours of a collection by composer (those with the most hours), by year and by length, stacked
    by split. ``table``: ``split, seconds, composer, year``, one row per recording."""
    require(table, ("split", "seconds", "composer", "year"))
    hours = table.assign(hours=table["seconds"] / 3600)
    most = hours.groupby("composer")["hours"].sum().sort_values(ascending=False).index[:12]
    named = hours["composer"].where(hours["composer"].isin(most), "all others")
    summed = {"columns": "split", "values": "hours", "aggfunc": "sum", "fill_value": 0.0}
    by_composer = hours.assign(composer=named).pivot_table(index="composer", **summed)
    by_composer = by_composer.reindex([*most, *({"all others"} & set(named))][::-1])
    by_year = hours.pivot_table(index="year", **summed)
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=(1.15, 1))
    beside, (upper, lower) = halves[0].subplots(), halves[1].subplots(2, 1)
    for bar, part, base in ((beside.barh, by_composer, "left"), (upper.bar, by_year, "bottom")):
        foot = np.zeros(len(part))
        for split, colour in _splits(table).items():
            bar(part.index.astype(str), part[split], color=colour, **{base: foot})
            foot = foot + part[split].to_numpy()
    beside.set(xlabel="hours")
    upper.set(xlabel="year of the recording", ylabel="hours")
    upper.tick_params("x", rotation=45 if len(by_year) > 6 else 0)
    minutes = {split: table["seconds"][table["split"] == split] / 60 for split in _splits(table)}
    sums = {split: part.sum() for split, part in minutes.items()}
    labels = [
        f"{split}: {len(minutes[split]):,} recordings, "
        + (f"{total / 60:.1f} h" if total >= 60 else f"{total:.0f} min")
        for split, total in sums.items()
    ]
    bins = np.histogram_bin_edges(table["seconds"] / 60, bins=min(40, max(10, len(table) // 5)))
    look = {"label": labels, "color": list(_splits(table).values())}
    lower.hist(list(minutes.values()), bins=bins, stacked=True, **look)
    lower.set(xlabel="length (min)", ylabel="recordings")
    lower.legend(frameon=False, fontsize=8)
    return finish(figure, title)


def shard_layout(table: pd.DataFrame, title: str = "") -> Figure:
    """Layout of recordings in the files of a data set: one row per file, one block per recording as
    wide as its duration. ``table``: ``split, shard`` (file name) ``, seconds``, in order."""
    require(table, ("split", "shard", "seconds"))
    names = list(dict.fromkeys(table["shard"]))
    figure, axes = canvas(9, max(min(0.6 + 0.22 * len(names), 9.0), 1.8))
    for split, colour in _splits(table).items():
        for name, part in table[table["split"] == split].groupby("shard", sort=False):
            start = part["seconds"].cumsum() - part["seconds"]
            blocks, row = list(zip(start / 60, part["seconds"] / 60)), names.index(name) - 0.4
            look = {"facecolor": colour, "edgecolor": "white", "linewidth": 0.5}
            axes.broken_barh(blocks, (row, 0.8), label=split, **look)
    step = max(1, len(names) // 40)
    axes.set_yticks(range(0, len(names), step), names[::step], fontsize=7)
    axes.set(title=title, xlabel="minutes of audio in the file", ylim=(len(names) - 0.5, -0.5))
    handles = dict(zip(*reversed(axes.get_legend_handles_labels())))
    beside = {"loc": "upper left", "bbox_to_anchor": (1, 1), "frameon": False}
    axes.legend(handles.values(), handles.keys(), **beside)
    return finish(figure, "")


def _splits(table: pd.DataFrame) -> dict[str, str]:
    """The splits of a table -> their colours, the same in every figure."""
    order = {name: place for place, name in enumerate(("train", "validation", "test"))}
    splits = sorted(table["split"].unique(), key=lambda name: order.get(name, len(order)))
    return dict(zip(splits, cycle(COLOURS)))
