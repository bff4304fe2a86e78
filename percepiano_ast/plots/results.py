"""Figures of an evaluation: models with intervals and the noise ceiling, errors, and training."""

from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.ticker import PercentFormatter

from percepiano_ast.dimensions import KEYS
from percepiano_ast.errors import InputError
from percepiano_ast.plots.style import (
    COLOURS,
    GREY,
    LABELS,
    MARKERS,
    SLANTED,
    Figure,
    canvas,
    cells,
    dimension_rows,
    finish,
    grid,
    offsets,
    require,
    stripes,
    styles,
)

SCOPE_NAMES = {
    "overall": "overall",
    "humans_only": "humans only",
    "within_segment": "within segment",
    "within_segment_humans": "within segment,\nhumans only",
}
ERROR_PARTS = {
    "noise": ("#999999", "rater noise"),
    "passage": (COLOURS[0], "level of the passage"),
    "player": (COLOURS[2], "level of the player"),
    "clip": (COLOURS[1], "individual performance"),
}
_MEAN = "mean Pearson r over 19 dimensions"

# --- One row per dimension ------------------------------------------------------------------------


def pearson_by_dimension(
    metrics: pd.DataFrame, scope: str = "overall", ceiling: pd.Series | None = None, title: str = ""
) -> Figure:
    """Pearson r per dimension with its interval, one colour and marker per model, the best mean
    first; the noise ceiling of each dimension as a tick. ``metrics``: of one protocol and seed,
    from `evaluation.metrics.metric_table`."""
    table = _pearson(metrics, scope)
    label = "Pearson r, held-out clips (95 % interval over content groups)"
    line = {"color": GREY, "linewidth": 0.8}
    return _by_dimension(table, _best_first(table), 0, line, label, title, ceiling=ceiling)


def gains(pairs: pd.DataFrame, title: str = "") -> Figure:
    """Differences in Pearson's r from a reference model per dimension, with intervals; filled marks
    are significant after Holm's correction over the 19 dimensions (p below 0.05). ``pairs``: rows
    of `evaluation.compare.between` of one protocol, scope and metric."""
    models, reference = list(dict.fromkeys(pairs["model_a"])), pairs["model_b"].iloc[0]
    table = pairs.rename(columns={"model_a": "model", "difference": "value"})
    table = table.assign(filled=pairs["p_holm"] < 0.05)
    label = f"Pearson r minus that of {reference} (95 % interval)"
    label += "\nfilled: significant after Holm's correction"
    # the same styles as in figures with the reference
    return _by_dimension(table, models, 0, {}, label, title, styled=[*models, reference])


def pairwise(table: pd.DataFrame, title: str = "") -> Figure:
    """Share of correctly ordered pairs of performances of a segment, per dimension. ``table``:
    `evaluation.analysis.pairwise_accuracy` of one protocol, seed, scope and minimum difference."""
    percent = table.assign(**(100 * table[["value", "low", "high"]]))
    label = "correctly ordered pairs of performances (%; chance is 50; 95 % interval)"
    return _by_dimension(percent, _best_first(table), 50, {}, label, title)


def _by_dimension(
    table: pd.DataFrame,
    models: list[str],
    middle: float,
    line: dict,
    label: str,
    title: str,
    *,
    styled: list[str] | None = None,
    ceiling: pd.Series | None = None,
) -> Figure:
    """Values and intervals of models, one row per dimension and the mean last, and a line at
    ``middle``; open marks where ``filled``, if given, is False. ``styled``: the models that share
    out the styles."""
    rows, looks = [*KEYS, "mean"], styles(styled or models)
    figure, axes = canvas(9.5, 9.5)
    stripes(axes.axhspan, len(rows))
    for model, offset in zip(models, offsets(len(models), 0.28)):
        part = table[table["model"] == model].set_index("dimension").loc[rows]
        y, (colour, marker) = np.arange(len(rows)) + offset, looks[model]
        axes.hlines(y, part["low"], part["high"], color=colour, linewidth=1.5)
        filled = part["filled"].to_numpy(bool) if "filled" in part else np.ones(len(rows), bool)
        for chosen, face in ((~filled, "white"), (filled, colour)):
            look = {"color": colour, "markerfacecolor": face, "markersize": 5.5}
            axes.plot(part["value"][chosen], y[chosen], marker, **look)
        axes.plot([], [], marker, color=colour, label=model)
    axes.axhline(len(KEYS) - 0.5, color="black", linewidth=0.8)
    if ceiling is not None:
        look = {"color": "black", "markersize": 14, "label": "noise ceiling"}
        axes.plot(ceiling.loc[list(KEYS)], range(len(KEYS)), "|", **look)
    axes.axvline(middle, **{"color": "black", "linewidth": 1} | line)
    dimension_rows(axes, with_mean=True)
    axes.set_xlabel(label)
    return finish(figure, title, 3)


def deadpan(table: pd.DataFrame, title: str = "") -> Figure:
    """Human minus deadpan renderings of the same segment: ratings as bars, predictions of each
    model as marks. ``table``: `evaluation.analysis.deadpan_gap` of one protocol and seed."""
    gaps = table[table["part"] == "gap"]
    models = list(dict.fromkeys(gaps["model"]))
    gaps = gaps.set_index(["metric", "model", "dimension"]).sort_index()
    rated = gaps.loc[("rating", models[0])].loc[list(KEYS)]
    figure, axes = canvas(9.5, 8.6)
    y = np.arange(len(KEYS))
    axes.barh(y, rated["value"], 0.62, color="#D9D9D9", label="ratings")
    axes.hlines(y, rated["low"], rated["high"], color="#555555", linewidth=1.4)
    for model in models:
        colour, marker = styles(models)[model]
        values = gaps.loc[("prediction", model), "value"].loc[list(KEYS)]
        axes.plot(values, y, marker, color=colour, markersize=5.5, label=model)
    dimension_rows(axes)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(xlabel="human minus deadpan, same segment (ratings from 0 to 1; 95 % interval)")
    return finish(figure, title, 4)


def noise_ceiling(ceiling: pd.DataFrame, title: str = "") -> Figure:
    """The noise ceiling: highest Pearson r given inter-rater agreement, (19 dimensions, scopes)."""
    figure, axes = canvas(9.5, 8.2)
    stripes(axes.axhspan, len(KEYS))
    scopes = [scope for scope in SCOPE_NAMES if scope in ceiling]
    for scope, colour, marker in zip(scopes, COLOURS, MARKERS):
        name = f"{SCOPE_NAMES[scope]} (mean {ceiling[scope].mean():.2f})".replace("\n", " ")
        values = ceiling.loc[list(KEYS), scope]
        axes.plot(values, range(len(KEYS)), marker, color=colour, markersize=6, label=name)
    dimension_rows(axes)
    axes.set(xlabel="noise ceiling (Pearson r)", xlim=(-0.02, 1))
    return finish(figure, title, 2)


def heatmap(metrics: pd.DataFrame, title: str = "") -> Figure:
    """Pearson r, overall, dimensions by models (best mean first), for one protocol and seed."""
    table = _pearson(metrics, "overall")
    wide = table.pivot(index="dimension", columns="model", values="value")
    wide = wide.loc[[*KEYS, "mean"], _best_first(table)]
    figure, axes = canvas(4.6 + 1.15 * len(wide.columns), 8)
    image = cells(axes, wide.to_numpy(), ".2f")
    axes.axhline(len(KEYS) - 0.5, color="black", linewidth=1.5)
    axes.set_xticks(range(len(wide.columns)), wide.columns, rotation=30, **SLANTED)
    dimension_rows(axes, with_mean=True)
    figure.colorbar(image, ax=axes, label="Pearson r")
    return finish(figure, title)


def parts_of_error(table: pd.DataFrame, title: str = "") -> Figure:
    """Unexplained share of the ratings' variance by part, one bar per dimension, largest error at
    the top. ``table``: rows of one run of `evaluation.analysis.error_components`."""
    rows = table.set_index("dimension").loc[list(KEYS)].sort_values("all")
    figure, axes = canvas(8, 6.4)
    left = 0.0 * rows["all"]
    for name, (colour, label) in ERROR_PARTS.items():
        axes.barh(range(len(rows)), rows[name], left=left, color=colour, label=label)
        left = left + rows[name]
    axes.set_yticks(range(len(rows)), [LABELS[key] for key in rows.index], fontsize=9)
    axes.set(xlabel="mean squared error / variance of the ratings", ylim=(-0.6, len(rows) - 0.4))
    axes.set_xlim(0, max(1.0, float(left.max()) * 1.02))
    axes.legend(loc="lower right", fontsize=9)
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


def _best_first(table: pd.DataFrame) -> list[str]:
    means = table[table["dimension"] == "mean"]
    return list(means.sort_values("value", ascending=False)["model"])


# --- Means over dimensions, and single dimensions -------------------------------------------------


def by_scope(summary: pd.DataFrame, ceiling: pd.DataFrame | None = None, title: str = "") -> Figure:
    """Mean Pearson r of each model in each scope, as bars with intervals, and the noise ceiling (19
    dimensions, scopes). ``summary``: of one protocol, see `evaluation.compare.summary`."""
    scopes = [scope for scope in SCOPE_NAMES if scope in set(summary["scope"])]
    tables = [_pearson(summary, scope) for scope in scopes]
    models = _best_first(tables[0])
    figure, axes = canvas(9.5, 4.4)
    width, looks, x = 0.8 / len(models), styles(models), np.arange(len(scopes))
    means = pd.concat(table[table["dimension"] == "mean"] for table in tables)
    for number, model in enumerate(models):
        rows = means[means["model"] == model].set_index("scope").loc[scopes]
        places = x - 0.4 + width * (number + 0.5)
        axes.bar(places, rows["value"], 0.92 * width, color=looks[model][0], label=model)
        axes.vlines(places, rows["low"], rows["high"], color="#333333", linewidth=1.2)
    if ceiling is not None:
        limits = [ceiling[scope].mean() if scope in ceiling else np.nan for scope in scopes]
        look = {"color": "black", "linewidth": 2, "label": "noise ceiling"}
        axes.hlines(limits, x - 0.45, x + 0.45, **look)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(x, [SCOPE_NAMES[scope] for scope in scopes])
    axes.set(ylabel=f"{_MEAN}\n(95 % interval)")
    return finish(figure, title, 3)


def by_protocol(
    summary: pd.DataFrame, protocols: dict[str, str], ceiling: float | None = None, title: str = ""
) -> Figure:
    """Mean Pearson r, overall, of each model under each protocol, with intervals, and the mean
    noise ceiling. ``summary``: see `evaluation.compare.summary`; ``protocols``: those to draw, in
    order -> tick labels."""
    rows = summary[(summary["metric"] == "pearson") & (summary["scope"] == "overall")]
    rows = rows[rows["dimension"] == "mean"]
    models = list(rows.groupby("model")["value"].max().sort_values(ascending=False).index)
    figure, axes = canvas(max(6.0, 1.9 + 1.25 * len(protocols)), 4.8)
    looks = styles(models)
    for model, offset in zip(models, offsets(len(models), 0.3)):
        part = rows[rows["model"] == model].set_index("protocol").reindex(protocols)
        x, (colour, marker) = np.arange(len(protocols)) + offset, looks[model]
        axes.vlines(x, part["low"], part["high"], color=colour, linewidth=1.4)
        axes.plot(x, part["value"], marker, color=colour, markersize=5, label=model)
    stripes(axes.axvspan, len(protocols))
    if ceiling is not None:
        axes.axhline(ceiling, color="black", linewidth=1.5, label="noise ceiling")
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_xticks(range(len(protocols)), list(protocols.values()), fontsize=8)
    axes.set(xlim=(-0.5, len(protocols) - 0.5), ylabel=f"{_MEAN}\n(95 % interval)")
    return finish(figure, title, 3)


def scatter(predictions: pd.DataFrame, dimension: str, title: str = "") -> Figure:
    """Prediction against rating of one dimension, one panel per model; ``predictions`` of one
    protocol and seed."""
    if dimension not in KEYS:
        raise InputError(f"unknown dimension {dimension!r}; choose one of: {', '.join(KEYS)}.")
    table = predictions[predictions["dimension"] == dimension]
    models = list(table["model"].unique())
    figure, panels = grid(len(models), (3.0, 3.2), (0, 0.9), sharex=True, sharey=True)
    figure.set(figwidth=max(5.0, figure.get_figwidth()), layout_engine="compressed")
    values = table[["rating", "prediction"]]
    limits = (values.min().min() - 0.02, values.max().max() + 0.02)
    for axes, model in zip(panels, models):
        part, look = table[table["model"] == model], {"alpha": 0.45, "linewidths": 0}
        axes.plot(limits, limits, color=GREY, linewidth=1, zorder=0)
        axes.scatter(part["rating"], part["prediction"], 10, styles(models)[model][0], **look)
        axes.set(title=model, xlim=limits, ylim=limits, aspect="equal")
    figure.supxlabel(f"rating, 0 to 1 ({LABELS[dimension]})", fontsize="medium")
    figure.supylabel("prediction", fontsize="medium")
    return finish(figure, title)


def calibration(table: pd.DataFrame, title: str = "") -> Figure:
    """Calibration of the uncertainty: coverage of prediction intervals, and correlation with the
    absolute error. ``table``: `evaluation.analysis.calibration` of one protocol and seed."""
    mean = table[table["dimension"] == "mean"]
    models = list(dict.fromkeys(mean["model"]))
    figure, (left, right) = canvas(9.5, 4.2, 1, 2, width_ratios=(1, 1.2))
    left.plot([0, 100], [0, 100], color=GREY, linewidth=1)
    for row, model in enumerate(models):
        colour, marker = styles(models)[model]
        part = mean[mean["model"] == model].set_index("metric")
        covered = part["value"][part.index.str.startswith("coverage_")]
        shares = [int(name.removeprefix("coverage_")) for name in covered.index]
        left.plot(shares, 100 * covered, marker, linestyle="-", color=colour, label=model)
        known = part.loc["error_correlation"]
        right.hlines(row, known["low"], known["high"], color=colour, linewidth=1.6)
        right.plot(known["value"], row, marker, color=colour)
    left.set(xlabel="nominal coverage of the interval (%)", ylabel="observed coverage (%)")
    left.set(xlim=(40, 100), ylim=(0, 102))
    right.axvline(0, color=GREY, linewidth=0.8)
    right.set_yticks(range(len(models)), models, fontsize=8)
    right.set(xlabel="Pearson r of absolute error and uncertainty (95 % interval)")
    right.set_ylim(len(models) - 0.5, -0.5)
    return finish(figure, title, 3)


# --- Training -------------------------------------------------------------------------------------


def training_curves(
    history: pd.DataFrame, columns: list[str] | None = None, title: str = ""
) -> Figure:
    """Training curves, one panel with its own scale per column: by default every column with "loss"
    in its name. ``history`` also has the column ``step`` or ``epoch``; NaN is not drawn."""
    x = next((name for name in ("step", "epoch") if name in history), None)
    columns = [name for name in history.columns if "loss" in name] if columns is None else columns
    if x is None or not columns:
        raise InputError(
            f"history has the columns {list(history.columns)}; give step or epoch, and a loss."
        )
    require(history, columns)
    figure, panels = canvas(max(5.0, 3.6 * len(columns)), 3.2, 1, len(columns), squeeze=False)
    for axes, name, colour in zip(panels[0], columns, cycle(COLOURS)):
        part = history[[x, name]].dropna()
        mark = "o" if len(part) <= 30 else ""
        axes.plot(part[x], part[name], color=colour, marker=mark, markersize=4)
        if "accuracy" in name:  # in percent as in the training log
            axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        axes.set(title=name.replace("_", " "), xlabel=x)
    return finish(figure, title)


def learning_curve(table: pd.DataFrame, title: str = "") -> Figure:
    """Mean r against the share of passages, players and clips in training; error bars: standard
    deviation over draws. ``table``: ``unit,share,draw,r``, from `pipeline.learning_curve`; the row
    with share 1 is the end point of every line."""
    figure, axes = canvas(6.4, 4.4)
    whole = float(table.loc[table["share"] == 1, "r"].iloc[0])
    parts = table[table["share"] < 1].groupby(["unit", "share"], sort=False)["r"]
    parts = parts.agg(["mean", "std"])
    colours = (COLOURS[0], COLOURS[2], COLOURS[1])
    for unit, colour in zip(parts.index.unique("unit"), colours, strict=True):
        rows, look = parts.loc[unit], {"color": colour, "marker": "o", "capsize": 3}
        x, y, bars = [*rows.index, 1.0], [*rows["mean"], whole], [*rows["std"], 0.0]
        axes.errorbar(x, y, bars, label=f"of {unit}", **look)
    shares = sorted(table["share"].unique())
    axes.set_xscale("log", base=2)
    axes.set_xticks(shares, [f"{100 * share:g} %" for share in shares])
    axes.minorticks_off()
    axes.set(xlabel="share of the training data", ylabel=_MEAN)
    axes.grid(alpha=0.3)
    axes.legend(title="random share")
    figure.suptitle(title)
    return figure
