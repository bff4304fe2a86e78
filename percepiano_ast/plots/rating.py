"""Figures of the ratings of one recording."""

import numpy as np
from matplotlib.axes import Axes

from percepiano_ast.dimensions import DIMENSIONS, KEYS
from percepiano_ast.plots.style import DIVERGING, Figure, clean, colours, require


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
