"""Colours, markers, labels, layout and alt text of all figures. Models differ in marker as well as
colour."""

import base64
import html
import io
import warnings
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.text import Text

from percepiano_ast.audio.mel import band_centres
from percepiano_ast.config import FrontEnd
from percepiano_ast.dimensions import DIMENSIONS
from percepiano_ast.errors import InputError

Look = dict[str, Any]  # keyword arguments of matplotlib
# Okabe and Ito's palette
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX"
MOST = len(MARKERS)  # maximum number of models in a figure
GREY, DARK = "#9A9A9A", "#666666"
UP, DOWN = COLOURS[1], COLOURS[0]  # vermilion, blue
DIVERGING = LinearSegmentedColormap.from_list(
    "down_up", [DOWN, "#9CC3DD", "#F7F7F7", "#EDAE86", UP]
)
FREQUENCIES = (100, 500, 1000, 2000, 4000, 8000)  # Hz, ticks of the mel axis
SLANTED: Look = {"ha": "right", "rotation_mode": "anchor"}  # tick labels that end at their tick
_NO_GLYPH = "Glyph .* missing from"
LABELS = {one.key: f"{one.family}: {one.low} \N{EN DASH} {one.high}" for one in DIMENSIONS}


class Figure(matplotlib.figure.Figure):
    """A matplotlib figure with alt text in notebooks, whose text is never mathematics: names of
    models and files may have dollar signs."""

    def draw(self, renderer) -> None:
        """Draw the figure; letters that the font lacks become boxes without a warning."""
        with rc_context({"text.parse_math": False}), warnings.catch_warnings():  # for new ticks
            warnings.filterwarnings("ignore", _NO_GLYPH)
            _as_written(self)
            super().draw(renderer)

    def _ipython_display_(self) -> None:
        # HTML instead of image/png, for which JupyterLab writes no alt attribute.
        from IPython.display import display

        file = io.BytesIO()
        self.savefig(file, format="png", bbox_inches="tight")
        image, alt = base64.b64encode(file.getvalue()).decode(), alt_text(self)
        source = f'src="data:image/png;base64,{image}" style="max-width: 100%"'
        tag = f'<img alt="{html.escape(alt)}" {source}>'
        display({"text/html": tag, "text/plain": alt}, raw=True)


def _as_written(artist: Artist) -> None:
    for text in artist.findobj(Text):
        text.set_parse_math(False)


def canvas(width: float, height: float, *shape: int, **options) -> tuple[Figure, Any]:
    """A figure (size in inches) and its panels, of ``shape`` (rows, columns); one without it."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(*shape, **options)


def grid(
    n: int, size: tuple[float, float], margin: tuple[float, float], **options
) -> tuple[Figure, np.ndarray]:
    """A figure and its ``n`` panels of ``size`` (inches), at most four in a row."""
    columns = min(4, n)
    rows = -(-n // columns)
    inches = (size[0] * columns + margin[0], size[1] * rows + margin[1])
    figure, panels = canvas(*inches, rows, columns, squeeze=False, **options)
    for axes in panels.flat[n:]:
        axes.set_visible(False)
    return figure, panels.flat[:n]


def finish(figure: Figure, title: str, columns: int = 0, **legend) -> Figure:
    """Remove upper and right spines of panels without an image; add the title and, below the
    panels, a legend of so many columns, or fewer if it would be wider than the figure; by default
    that of the first panel."""
    for axes in figure.axes:
        if not axes.images:
            axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    legend = {"handles": figure.axes[0].get_legend_handles_labels()[0]} | legend
    for n in range(columns, 0, -1):
        below = figure.legend(loc="outside lower center", ncols=n, frameon=False, **legend)
        _as_written(below)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", _NO_GLYPH)
            if n == 1 or below.get_window_extent().width <= figure.bbox.width:
                break
        below.remove()
    return figure


def save(figure: matplotlib.figure.Figure, path: Path, dpi: int = 150) -> None:
    """Write ``path``.svg and .png; by default matplotlib writes a date and random names into
    SVG files."""
    with rc_context({"svg.hashsalt": "percepiano_ast", "svg.fonttype": "none"}):
        figure.savefig(path.with_name(f"{path.name}.svg"), metadata={"Date": None})
        figure.savefig(path.with_name(f"{path.name}.png"), dpi=dpi)


def require(table, columns) -> None:
    """Raise InputError if a table or mapping lacks one of ``columns``."""
    if missing := [name for name in columns if name not in table]:
        raise InputError(f"cannot draw: {missing} missing; give {', '.join(columns)}.")


def styles(models: list[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each model by name, the same in all figures of the same models."""
    return dict(zip(sorted(models), zip(cycle(COLOURS), cycle(MARKERS))))


def offsets(n: int, reach: float) -> np.ndarray:
    """Places of ``n`` marks side by side, at most ``reach`` from the middle of their row."""
    return np.linspace(-reach, reach, n) if n > 1 else np.zeros(1)


def stripes(span, count: int) -> None:
    """Shade every second row or column; ``span`` is ``axhspan`` or ``axvspan`` of the panel."""
    for row in range(0, count, 2):
        span(row - 0.5, row + 0.5, color="#F3F3F3", zorder=0)


def cells(axes: Axes, values: np.ndarray, form: str, **text):
    """A heatmap of Pearson's r with its values (format ``form``) in the cells."""
    image = axes.imshow(values, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        words = "n/a" if np.isnan(value) else f"{value:{form}}"
        ink = "white" if abs(value) > 0.6 else "black"
        axes.text(column, row, words, ha="center", va="center", color=ink, **text)
    return image


def dimension_rows(axes: Axes, with_mean: bool = False) -> None:
    """Label the rows of a figure by dimension, with the mean as an optional last row."""
    labels = [*LABELS.values()] + ["mean of 19 dimensions"] * with_mean
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    axes.set_ylim(len(labels) - 0.5, -0.5)


def mel_axis(axes: Axes, front_end: FrontEnd) -> None:
    """Label the mel bands of an image in Hz."""
    centres = band_centres(front_end)
    ticks = [hz for hz in FREQUENCIES if centres[0] <= hz <= centres[-1]]
    places = np.interp(ticks, centres, np.arange(len(centres)))
    axes.set_yticks(places, [f"{hz:,}" for hz in ticks])
    axes.set_ylabel("frequency (Hz)")


def alt_text(figure: matplotlib.figure.Figure) -> str:
    """The alt text of a figure: its title, the title, axes and colour scale of each panel, and the
    legend."""
    sentences, legends = [figure.get_suptitle()], list(figure.legends)
    for axes in figure.axes:
        if axes.get_label() == "<colorbar>":
            sentences.append(f"Colour scale: {axes.get_ylabel() or axes.get_xlabel()}")
        else:
            sentences.append(axes.get_title() or axes.get_title("left"))
            sentences += [_axis_text("X", axes.xaxis), _axis_text("Y", axes.yaxis)]
            legends += filter(None, [axes.get_legend()])
    shared = {"X": figure.get_supxlabel(), "Y": figure.get_supylabel()}
    sentences += [f"{name} axis: {label}" for name, label in shared.items() if label]
    sentences += [
        "Legend: " + ", ".join(text.get_text() for text in legend.get_texts()) for legend in legends
    ]
    return ". ".join(" ".join(sentence.split()) for sentence in sentences if sentence) + "."


def _axis_text(name: str, axis: Axis) -> str:
    """Label of an axis; without one, the number of its named rows or columns with the first and the
    last name."""
    label = axis.get_label().get_text()
    entries = [text.get_text() for text in axis.get_ticklabels() if text.get_text()[:1].isalpha()]
    if not label and len(entries) > 1:
        label = f"{len(entries)} entries from {entries[0]} to {entries[-1]}"
    return f"{name} axis: {label}" if label else ""
