"""What all figures share: colours, markers, names of dimensions.

Colours are Okabe and Ito's palette: told apart with any colour vision, and never the only thing that tells models apart.
"""

from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap

from percepiano_ast.config import InputError
from percepiano_ast.dimensions import DIMENSIONS

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = "osD^vPX"
MOST = len(MARKERS)  # models in a figure that can be told apart
GREY = "#9A9A9A"
# Two directions: vermilion up, blue down.
UP, DOWN = COLOURS[1], COLOURS[0]
DIVERGING = LinearSegmentedColormap.from_list("down_up", [DOWN, "#9CC3DD", "#F7F7F7", "#EDAE86", UP])
FREQUENCIES = (100, 500, 1000, 2000, 4000, 8000)  # Hz, ticks of the mel axis

LABELS = {dimension.key: f"{dimension.family}: {dimension.low} \N{EN DASH} {dimension.high}" for dimension in DIMENSIONS}


def require(table, columns) -> None:
    """Refuse to draw a table, or anything with names in it, that lacks one of ``columns``."""
    if missing := [name for name in columns if name not in table]:
        raise InputError(f"cannot draw: {missing} missing; give {', '.join(columns)}.")


def styles(models: list[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each model, by name: the same in every figure of the same models."""
    return dict(zip(sorted(models), zip(cycle(COLOURS), cycle(MARKERS))))


def colours(n: int) -> list[str]:
    """The first ``n`` colours, over again where there are not so many."""
    return [colour for colour, _ in zip(cycle(COLOURS), range(n))]


def clean(axes: Axes) -> None:
    """Take the frame's upper and right line away."""
    axes.spines[["top", "right"]].set_visible(False)
