"""Figures of recordings, their ratings and collections of them."""

import functools
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from percepiano_ast.config import FrontEnd
from percepiano_ast.dimensions import DIMENSIONS, KEYS
from percepiano_ast.plots.style import (
    COLOURS,
    DIVERGING,
    FREQUENCIES,
    GREY,
    LABELS,
    MARKERS,
    Figure,
    clean,
    colours,
    require,
)
from percepiano_ast.targets import KEYS as PIANO_KEYS
from percepiano_ast.targets import LOWEST, Targets


def spectrogram(log_mel_db: np.ndarray, front_end: FrontEnd, title: str = "") -> Figure:
    """A log-mel spectrogram: ``log_mel_db`` is (frames, mels) in dB."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots()
    image = _mel_image(axes, log_mel_db, front_end, _levels(log_mel_db))
    axes.set(title=title, xlabel="time (s)")
    figure.colorbar(image, ax=axes, label="level (dB)", pad=0.01)
    return figure


def masking(
    original: np.ndarray, masked: np.ndarray, reconstructed: np.ndarray, front_end: FrontEnd
) -> Figure:
    """Original, masked input and reconstruction: (frames, mels) arrays in dB; NaN in ``masked`` is
    drawn grey."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True, sharey=True)
    titles = ("original", "masked: input of the encoder", "reconstruction")
    for axes, values, title in zip(panels, (original, masked, reconstructed), titles):
        image = _mel_image(axes, values, front_end, _levels(original))
        axes.set_title(title, loc="left")
    panels[-1].set_xlabel("time (s)")
    figure.colorbar(image, ax=list(panels), label="level (dB)", pad=0.01, aspect=45)
    return figure


def hearing(
    log_mel_db: np.ndarray, played: Targets, heard: dict[str, np.ndarray], front_end: FrontEnd
) -> Figure:
    """A window of a recording, its reference and transcribed keys, and the sustain pedal.

    Args:
        log_mel_db: (T, mels).
        played: ground truth of its frames.
        `heard`: the transcription: ``down`` (S, 88), ``onset`` (S, 88) and ``sustain`` (S,), each 0
            to 1, for S steps of T / S frames.
    """
    figure = Figure(figsize=(9, 8), layout="constrained")
    top, truth, said, pedal = figure.subplots(4, 1, sharex=True, height_ratios=(3, 3, 3, 1))
    figure.colorbar(
        _mel_image(top, log_mel_db, front_end, _levels(log_mel_db)),
        ax=top,
        label="level (dB)",
        pad=0.01,
    )
    top.set_title("recording", loc="left")
    end = front_end.seconds(len(log_mel_db))
    rows = (
        (truth, "reference: keys, onsets brighter", played.down, played.onset),
        (said, "transcription", heard["down"], heard["onset"]),
    )
    for axes, title, down, onset in rows:
        image = axes.imshow(
            (0.5 * down + 0.5 * onset).T,
            origin="lower",
            aspect="auto",
            interpolation="nearest",
            extent=(0, end, LOWEST - 0.5, LOWEST + PIANO_KEYS - 0.5),
            vmin=0,
            vmax=1,
            cmap="magma",
        )
        axes.set_title(title, loc="left")
        axes.set(ylabel="MIDI pitch", yticks=range(24, 109, 12))
        figure.colorbar(image, ax=axes, label="activation", pad=0.01)
    for values, colour, name in (
        (played.sustain, GREY, "reference"),
        (heard["sustain"], COLOURS[1], "transcription"),
    ):
        pedal.plot(
            np.linspace(0, end, len(values), endpoint=False),
            values,
            color=colour,
            label=name,
            drawstyle="steps-post",
        )
    pedal.set(xlabel="time (s)", ylabel="sustain pedal", ylim=(-0.05, 1.05))
    pedal.legend(loc="upper right", ncols=2, fontsize="small")
    clean(pedal)
    return figure


def _mel_image(axes: Axes, values: np.ndarray, front_end: FrontEnd, levels: tuple[float, float]):
    """Draw (frames, mels) with time in seconds and the mel axis labelled in Hz."""
    import librosa  # imported here: it takes a second to load and other figures do not need it

    end = front_end.seconds(len(values))
    image = axes.imshow(
        np.ma.masked_invalid(values.T),
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        extent=(0, end, -0.5, front_end.n_mels - 0.5),
        vmin=levels[0],
        vmax=levels[1],
        cmap="magma",
    )
    axes.set_facecolor(GREY)  # hidden patches
    # band k is centred on point k + 1 of n_mels + 2 equal steps in mel
    to_mel = functools.partial(librosa.hz_to_mel, htk=front_end.kind == "kaldi")
    low, high = np.asarray(to_mel([front_end.fmin, front_end.fmax]))
    ticks = [hz for hz in FREQUENCIES if front_end.fmin < hz < front_end.fmax]
    places = (to_mel(ticks) - low) / (high - low) * (front_end.n_mels + 1) - 1
    axes.set_yticks(places, [f"{hz:,}" for hz in ticks])
    axes.set_ylabel("frequency (Hz)")
    return image


def _levels(values: np.ndarray) -> tuple[float, float]:
    """Colour scale: the top 80 dB of ``values``, or their full range if that is smaller."""
    top = float(np.nanmax(values))
    return max(top - 80.0, float(np.nanmin(values)) - 1e-3), top


def rating_profile(
    ratings: dict[str, float], uncertainty: dict[str, float] | None = None, title: str = ""
) -> Figure:
    """The 19 ratings (0 to 1) of one recording, as bars from the middle of the scale towards either
    pole.

    ``uncertainty``: standard deviations, drawn as whiskers of one deviation to each side.
    """
    require(ratings, KEYS)
    values = np.array([ratings[key] for key in KEYS])
    errors = None if uncertainty is None else np.tile([uncertainty[key] for key in KEYS], (2, 1))
    return _profile(values, errors, 0.5, "rating (0 to 1; 0.5 is the middle of the scale)", title)


def percentile_profile(
    percentiles: dict[str, float], bands: dict[str, tuple[float, float]], title: str = ""
) -> Figure:
    """Percentiles (0 to 100) of the 19 ratings of one recording, as bars from the median towards
    either pole.

    ``bands``: percentiles of the ratings minus and plus one standard deviation, drawn as whiskers.
    """
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
    figure = Figure(figsize=(8.5, 7), layout="constrained")
    axes = figure.subplots()
    families = list(dict.fromkeys(dimension.family for dimension in DIMENSIONS))
    colour_of = dict(zip(families, colours(len(families))))
    bar_colours = [colour_of[dimension.family] for dimension in DIMENSIONS]
    axes.barh(
        range(len(KEYS)),
        values - middle,
        left=middle,
        color=bar_colours,
        height=0.62,
        xerr=errors,
        error_kw={"ecolor": "#333333", "elinewidth": 1.2, "capsize": 3},
    )
    axes.axvline(middle, color="black", linewidth=0.8)
    axes.set_yticks(range(len(KEYS)), [dimension.low for dimension in DIMENSIONS])
    axes.set(xlim=(0, 2 * middle), ylim=(len(KEYS) - 0.4, -0.6), xlabel=label)
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(KEYS)), [dimension.high for dimension in DIMENSIONS])
    right.tick_params(length=0)
    axes.tick_params(axis="y", length=0)
    clean(axes)
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
        axes.text(
            0.008 * axes.get_xlim()[1],
            first - 0.33,
            family,
            color=colour,
            fontsize=8,
            va="center",
            weight="bold",
        )


def rating_course(
    times: np.ndarray, course: np.ndarray, percentiles: dict[str, float], title: str = ""
) -> Figure:
    """How each rating of a recording changes over time, relative to the rating of the whole
    recording.

    Args:
        times: middles of the windows, seconds (m,); course: percentiles of their ratings (m, 19),
            NaN if not rated.
        percentiles: of the whole recording.
    """
    require(percentiles, KEYS)
    aside = np.asarray(course).T - np.array([percentiles[key] for key in KEYS])[:, None]
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots()
    most = max(float(np.nanmax(np.abs(aside))) if np.isfinite(aside).any() else 0.0, 5.0)
    step = times[1] - times[0] if len(times) > 1 else 1.0
    edges = np.append(times - step / 2, times[-1] + step / 2)
    mesh = axes.pcolormesh(
        edges, np.arange(len(KEYS) + 1) - 0.5, aside, cmap=DIVERGING, vmin=-most, vmax=most
    )
    axes.set_yticks(range(len(KEYS)), [dimension.low for dimension in DIMENSIONS])
    axes.set(ylim=(len(KEYS) - 0.5, -0.5), xlabel="seconds (middle of each window)")
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(KEYS)), [dimension.high for dimension in DIMENSIONS])
    for one in (axes, right):
        one.tick_params(axis="y", length=0)
    figure.colorbar(
        mesh,
        ax=axes,
        label="percentiles towards the left (blue) or right (vermilion) pole",
        shrink=0.8,
    )
    figure.suptitle(title)
    return figure


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
