"""Figures of an evaluation: intervals and noise ceiling, errors, training curves."""

from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from percepiano_ast.dimensions import KEYS
from percepiano_ast.errors import InputError
from percepiano_ast.plots.style import (
    COLOURS,
    GREY,
    LABELS,
    MARKERS,
    Figure,
    clean,
    require,
    styles,
)

SCOPE_NAMES = {
    "overall": "overall",
    "humans_only": "humans only",
    "within_segment": "within segment",
    "within_segment_humans": "within segment,\nhumans only",
}


def pearson_by_dimension(
    metrics: pd.DataFrame, scope: str = "overall", ceiling: pd.Series | None = None, title: str = ""
) -> Figure:
    """Pearson r per dimension with its interval, one colour and marker per model, the best mean
    first.

    Args:
        metrics: metrics of one protocol and seed, from ``evaluation.scores.evaluate``.
        scope: one of its scopes.
        ceiling: noise ceiling per dimension key, drawn as a tick: the limit from inter-rater
            agreement.
    """
    table = _pearson(metrics, scope)
    models = list(
        table[table["dimension"] == "mean"].sort_values("value", ascending=False)["model"]
    )
    figure, axes = _by_dimension(table, models, styles(models))
    if ceiling is not None:
        axes.plot(
            ceiling.loc[list(KEYS)],
            range(len(KEYS)),
            "|",
            color="black",
            markersize=14,
            label="noise ceiling",
        )
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set(xlabel="Pearson r, held-out clips (95 % interval over content groups)")
    clean(axes)
    figure.suptitle(title)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def heatmap(metrics: pd.DataFrame, scope: str = "overall", title: str = "") -> Figure:
    """Pearson r, dimensions by models (best mean first), for one protocol and seed."""
    rows = [*KEYS, "mean"]
    wide = (
        _pearson(metrics, scope).pivot(index="dimension", columns="model", values="value").loc[rows]
    )
    wide = wide[wide.loc["mean"].sort_values(ascending=False).index]
    figure = Figure(figsize=(4.6 + 1.15 * len(wide.columns), 8), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(wide, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(wide.to_numpy()):
        text = "n/a" if np.isnan(value) else f"{value:.2f}"
        axes.text(
            column,
            row,
            text,
            ha="center",
            va="center",
            color="white" if abs(value) > 0.6 else "black",
        )
    axes.axhline(len(KEYS) - 0.5, color="black", linewidth=1.5)
    axes.set_xticks(
        range(len(wide.columns)), wide.columns, rotation=30, ha="right", rotation_mode="anchor"
    )
    axes.set_yticks(range(len(rows)), [*LABELS.values(), "mean of 19 dimensions"], fontsize=9)
    figure.colorbar(image, ax=axes, label="Pearson r")
    figure.suptitle(title)
    return figure


def scatter(predictions: pd.DataFrame, dimension: str, title: str = "") -> Figure:
    """Prediction against rating of one dimension, one panel per model; ``predictions`` of one
    protocol and seed."""
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
    looks = styles(models)
    for axes, model in zip(panels.flat, models):
        part = table[table["model"] == model]
        axes.plot(limits, limits, color=GREY, linewidth=1, zorder=0)
        axes.scatter(
            part["rating"],
            part["prediction"],
            s=10,
            color=looks[model][0],
            alpha=0.45,
            linewidths=0,
        )
        axes.set(title=model, xlim=limits, ylim=limits, aspect="equal")
        clean(axes)
    for axes in panels.flat[len(models) :]:
        axes.set_visible(False)
    figure.supxlabel(f"rating, 0 to 1 ({LABELS[dimension]})", fontsize="medium")
    figure.supylabel("prediction", fontsize="medium")
    figure.suptitle(title)
    return figure


def _pearson(metrics: pd.DataFrame, scope: str) -> pd.DataFrame:
    table = metrics[(metrics["metric"] == "pearson") & (metrics["scope"] == scope)]
    if table.empty:
        raise InputError(f"metrics have no pearson in scope {scope!r}; run the evaluation first.")
    if table.duplicated(["model", "dimension"]).any():
        raise InputError(
            "metrics have several protocols or seeds; select one of each before drawing."
        )
    return table


def by_scope(summary: pd.DataFrame, ceiling: pd.DataFrame | None = None, title: str = "") -> Figure:
    """Mean Pearson r of each model in each scope, as bars with intervals, and the noise ceiling of
    the scope.

    Args:
        summary: of one protocol, see `evaluation.summary.values`.
        ceiling: (19 dimensions, scopes).
    """
    scopes = [scope for scope in SCOPE_NAMES if scope in set(summary["scope"])]
    wide = {
        scope: _pearson(summary, scope).set_index(["dimension", "model"]).loc["mean"]
        for scope in scopes
    }
    models = list(wide[scopes[0]].sort_values("value", ascending=False).index)
    figure = Figure(figsize=(9.5, 4.4), layout="constrained")
    axes = figure.subplots()
    width, looks = 0.8 / len(models), styles(models)
    for number, model in enumerate(models):
        rows = pd.DataFrame([wide[scope].loc[model] for scope in scopes])
        x = np.arange(len(scopes)) - 0.4 + width * (number + 0.5)
        axes.bar(x, rows["value"], 0.92 * width, color=looks[model][0], label=model)
        axes.vlines(x, rows["low"], rows["high"], color="#333333", linewidth=1.2)
    if ceiling is not None:
        means = [ceiling[scope].mean() if scope in ceiling else np.nan for scope in scopes]
        axes.hlines(
            means,
            np.arange(len(scopes)) - 0.45,
            np.arange(len(scopes)) + 0.45,
            color="black",
            linewidth=2,
            label="noise ceiling",
        )
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(scopes)), [SCOPE_NAMES[scope] for scope in scopes])
    axes.set(ylabel="mean Pearson r over 19 dimensions\n(95 % interval)")
    clean(axes)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title)
    return figure


def by_protocol(
    summary: pd.DataFrame,
    protocols: dict[str, str],
    ceiling: float | None = None,
    scope: str = "overall",
    title: str = "",
) -> Figure:
    """Mean Pearson r of each model under each protocol, with intervals.

    Args:
        summary: of any protocols, see `evaluation.summary.values`.
        protocols: protocols to draw in this order -> tick labels.
        ceiling: mean noise ceiling of the scope.
    """
    rows = summary[
        (summary["metric"] == "pearson")
        & (summary["scope"] == scope)
        & (summary["dimension"] == "mean")
    ]
    models = list(rows.groupby("model")["value"].max().sort_values(ascending=False).index)
    figure = Figure(figsize=(max(6.0, 1.9 + 1.25 * len(protocols)), 4.8), layout="constrained")
    axes = figure.subplots()
    looks = styles(models)
    offsets = np.linspace(-0.3, 0.3, len(models)) if len(models) > 1 else [0.0]
    for model, offset in zip(models, offsets):
        part = rows[rows["model"] == model].set_index("protocol").reindex(protocols)
        x, (colour, marker) = np.arange(len(protocols)) + offset, looks[model]
        axes.vlines(x, part["low"], part["high"], color=colour, linewidth=1.4)
        axes.plot(x, part["value"], marker, color=colour, markersize=5, label=model)
    for place in range(0, len(protocols), 2):
        axes.axvspan(place - 0.5, place + 0.5, color="#F3F3F3", zorder=0)
    if ceiling is not None:
        axes.axhline(ceiling, color="black", linewidth=1.5, label="noise ceiling")
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_xticks(range(len(protocols)), list(protocols.values()), fontsize=8)
    axes.set(
        xlim=(-0.5, len(protocols) - 0.5),
        ylabel="mean Pearson r over 19 dimensions\n(95 % interval)",
    )
    clean(axes)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title)
    return figure


def gains(pairs: pd.DataFrame, title: str = "") -> Figure:
    """Differences in Pearson's r from a reference model per dimension, with intervals.

    Filled marks are significant after Holm's correction over the 19 dimensions (p below 0.05), open
    marks are not.

    Args:
        pairs: rows of `evaluation.summary.between` of one protocol, scope and metric: each model
            minus the reference.
    """
    models = list(dict.fromkeys(pairs["model_a"]))
    table = pairs.rename(columns={"model_a": "model", "difference": "value"}).assign(
        filled=pairs["p_holm"] < 0.05
    )
    reference = pairs["model_b"].iloc[0]
    # same styles as in figures with the reference
    figure, axes = _by_dimension(table, models, styles([*models, reference]))
    axes.axvline(0, color="black", linewidth=1)
    axes.set(
        xlabel=(
            f"Pearson r minus that of {reference} (95 % interval); filled: significant after Holm's"
            " correction"
        )
    )
    clean(axes)
    figure.suptitle(title)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def deadpan(table: pd.DataFrame, title: str = "") -> Figure:
    """Human minus deadpan renderings of the same segment: ratings as bars, predictions of each
    model as marks.

    Args:
        table: `evaluation.contrasts.deadpan` of one protocol and seed.
    """
    gaps = table[table["part"] == "gap"]
    models = list(dict.fromkeys(gaps["model"]))
    rated = (
        gaps[(gaps["metric"] == "rating") & (gaps["model"] == models[0])]
        .set_index("dimension")
        .loc[list(KEYS)]
    )
    looks = styles(models)
    figure = Figure(figsize=(9.5, 8.6), layout="constrained")
    axes = figure.subplots()
    y = np.arange(len(KEYS))
    axes.barh(y, rated["value"], 0.62, color="#D9D9D9", label="ratings")
    axes.hlines(y, rated["low"], rated["high"], color="#555555", linewidth=1.4)
    for model in models:
        part = (
            gaps[(gaps["metric"] == "prediction") & (gaps["model"] == model)]
            .set_index("dimension")
            .loc[list(KEYS)]
        )
        axes.plot(
            part["value"], y, looks[model][1], color=looks[model][0], markersize=5.5, label=model
        )
    _dimension_rows(axes, len(KEYS), shaded=False)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(xlabel="human minus deadpan, same segment (ratings from 0 to 1; 95 % interval)")
    clean(axes)
    figure.suptitle(title)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    return figure


def pairwise(table: pd.DataFrame, title: str = "") -> Figure:
    """Share of correctly ordered pairs of performances of a segment, per dimension.

    Args:
        table: `evaluation.contrasts.pairwise` of one protocol, seed, scope and minimum difference.
    """
    models = list(
        table[table["dimension"] == "mean"].sort_values("value", ascending=False)["model"]
    )
    figure, axes = _by_dimension(
        table.assign(**(100 * table[["value", "low", "high"]])), models, styles(models)
    )
    axes.axvline(50, color="black", linewidth=1)
    axes.set(xlabel="correctly ordered pairs of performances (%; chance is 50; 95 % interval)")
    clean(axes)
    figure.suptitle(title)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def calibration(table: pd.DataFrame, title: str = "") -> Figure:
    """Calibration of the uncertainty: coverage of prediction intervals, and correlation with the
    absolute error.

    Args:
        table: `evaluation.calibration.evaluate` of one protocol and seed.
    """
    mean = table[table["dimension"] == "mean"]
    models = list(dict.fromkeys(mean["model"]))
    looks, figure = styles(models), Figure(figsize=(9.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.2))
    left.plot([0, 100], [0, 100], color=GREY, linewidth=1)
    for row, model in enumerate(models):
        part, (colour, marker) = mean[mean["model"] == model].set_index("metric"), looks[model]
        shares = [
            int(name.removeprefix("coverage_"))
            for name in part.index
            if name.startswith("coverage_")
        ]
        covered = [100 * part.loc[f"coverage_{share}", "value"] for share in shares]
        left.plot(shares, covered, marker, linestyle="-", color=colour, label=model)
        known = part.loc["error_correlation"]
        right.hlines(row, known["low"], known["high"], color=colour, linewidth=1.6)
        right.plot(known["value"], row, marker, color=colour)
    left.set(
        xlabel="nominal coverage of the interval (%)",
        ylabel="observed coverage (%)",
        xlim=(40, 100),
        ylim=(0, 102),
    )
    right.axvline(0, color=GREY, linewidth=0.8)
    right.set_yticks(range(len(models)), models, fontsize=8)
    right.set(
        xlabel="Pearson r of absolute error and uncertainty (95 % interval)",
        ylim=(len(models) - 0.5, -0.5),
    )
    for axes in (left, right):
        clean(axes)
    figure.suptitle(title)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def noise_ceiling(ceiling: pd.DataFrame, title: str = "") -> Figure:
    """The noise ceiling: highest Pearson r given inter-rater agreement, (19 dimensions, scopes)."""
    figure = Figure(figsize=(9.5, 8.2), layout="constrained")
    axes = figure.subplots()
    scopes = [scope for scope in SCOPE_NAMES if scope in ceiling]
    for scope, colour, marker in zip(scopes, COLOURS, MARKERS):
        name = f"{SCOPE_NAMES[scope]} (mean {ceiling[scope].mean():.2f})".replace("\n", " ")
        axes.plot(
            ceiling.loc[list(KEYS), scope],
            range(len(KEYS)),
            marker,
            color=colour,
            markersize=6,
            label=name,
        )
    _dimension_rows(axes, len(KEYS))
    axes.set(xlabel="noise ceiling (Pearson r)", xlim=(-0.02, 1))
    clean(axes)
    figure.suptitle(title)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


def _by_dimension(
    table: pd.DataFrame, models: list[str], looks: dict[str, tuple[str, str]]
) -> tuple[Figure, Axes]:
    """Values and intervals of models, one row per dimension and the mean last; open marks where
    ``filled``, if given, is False."""
    rows = [*KEYS, "mean"]
    figure = Figure(figsize=(9.5, 9.5), layout="constrained")
    axes = figure.subplots()
    offsets = np.linspace(-0.28, 0.28, len(models)) if len(models) > 1 else [0.0]
    for model, offset in zip(models, offsets):
        part = table[table["model"] == model].set_index("dimension").loc[rows]
        y, (colour, marker) = np.arange(len(rows)) + offset, looks[model]
        axes.hlines(y, part["low"], part["high"], color=colour, linewidth=1.5)
        filled = part["filled"].to_numpy(bool) if "filled" in part else np.ones(len(rows), bool)
        axes.plot(
            part["value"][~filled],
            y[~filled],
            marker,
            color=colour,
            markerfacecolor="white",
            markersize=5.5,
        )
        axes.plot(part["value"][filled], y[filled], marker, color=colour, markersize=5.5)
        axes.plot([], [], marker, color=colour, label=model)
    _dimension_rows(axes, len(rows))
    return figure, axes


def _dimension_rows(axes: Axes, count: int, shaded: bool = True) -> None:
    """Label the rows of a figure by dimension, with the mean as an optional last row, and shade
    every second row."""
    for row in range(0, count, 2) if shaded else ():
        axes.axhspan(row - 0.5, row + 0.5, color="#F3F3F3", zorder=0)
    if count > len(KEYS):
        axes.axhline(len(KEYS) - 0.5, color="black", linewidth=0.8)
    axes.set_yticks(range(count), [*LABELS.values(), "mean of 19 dimensions"][:count], fontsize=9)
    axes.set_ylim(count - 0.5, -0.5)


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
        table: rows of one run of `evaluation.errors.evaluate`.
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
