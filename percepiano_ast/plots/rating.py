"""The ratings of one recording."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from percepiano_ast.dimensions import DIMENSIONS, KEYS
from percepiano_ast.plots.style import DIVERGING, clean, colours, require


def rating_profile(ratings: dict[str, float], uncertainty: dict[str, float] | None = None, title: str = "") -> Figure:
    """The 19 ratings (0 to 1) of one recording, as bars from the middle towards either pole.

    ``uncertainty``: standard deviations, drawn as whiskers of one deviation to each side.
    """
    require(ratings, KEYS)
    figure = Figure(figsize=(8.5, 7), layout="constrained")
    axes = figure.subplots()
    values = np.array([ratings[key] for key in KEYS])
    families = list(dict.fromkeys(dimension.family for dimension in DIMENSIONS))
    colour_of = dict(zip(families, colours(len(families))))
    bar_colours = [colour_of[dimension.family] for dimension in DIMENSIONS]
    errors = None if uncertainty is None else [uncertainty[key] for key in KEYS]
    axes.barh(range(len(KEYS)), values - 0.5, left=0.5, color=bar_colours, height=0.62, xerr=errors,
              error_kw={"ecolor": "#333333", "elinewidth": 1.2, "capsize": 3})  # fmt: skip
    axes.axvline(0.5, color="black", linewidth=0.8)
    axes.set_yticks(range(len(KEYS)), [dimension.low for dimension in DIMENSIONS])
    axes.set(xlim=(0, 1), ylim=(len(KEYS) - 0.4, -0.6), xlabel="rating (0 to 1; 0.5 is the middle of the scale)")
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
        axes.text(0.008, first - 0.33, family, color=colour, fontsize=8, va="center", weight="bold")


def rating_course(times: np.ndarray, course: np.ndarray, ratings: dict[str, float], title: str = "") -> Figure:
    """How each rating of a recording changes while it is played, against its rating as a whole.

    Args:
        times: middles of the windows, seconds (m,); course: their ratings (m, 19), NaN where nothing is said.
        ratings: of the whole.
    """
    require(ratings, KEYS)
    aside = np.asarray(course).T - np.array([ratings[key] for key in KEYS])[:, None]
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    axes = figure.subplots()
    most = max(float(np.nanmax(np.abs(aside))) if np.isfinite(aside).any() else 0.0, 0.05)
    step = times[1] - times[0] if len(times) > 1 else 1.0
    edges = np.append(times - step / 2, times[-1] + step / 2)
    mesh = axes.pcolormesh(edges, np.arange(len(KEYS) + 1) - 0.5, aside, cmap=DIVERGING, vmin=-most, vmax=most)
    axes.set_yticks(range(len(KEYS)), [dimension.low for dimension in DIMENSIONS])
    axes.set(ylim=(len(KEYS) - 0.5, -0.5), xlabel="seconds (middle of each stretch)")
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(len(KEYS)), [dimension.high for dimension in DIMENSIONS])
    for one in (axes, right):
        one.tick_params(axis="y", length=0)
    figure.colorbar(mesh, ax=axes, label="towards the left (blue) or right (vermilion) pole, against the whole", shrink=0.8)
    figure.suptitle(title)
    return figure
