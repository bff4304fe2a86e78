"""Ratings as text for a terminal and as tables; two performances of one piece compared."""

import textwrap
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from percepiano_ast.data import sources
from percepiano_ast.dimensions import DIMENSIONS
from percepiano_ast.recording.rating import Rating, on_one_side, side

# A difference of at least SURE standard deviations of its error is reported, one of at least LIKELY
# as probable. SHARES: of pairs of performances of one passage that differ by as much, people's
# ratings order this share the same way, for works left out of training on a held-out soundfont
# (tests/test_results.py, which also has the shares for the works of the training).
SURE, LIKELY = 1.0, 0.5
SHARES = (0.86, 0.75)

WIDTH = 80  # columns of the text
_CELLS = 15  # of a bar
_ASCII = str.maketrans("·─│●±", ".-|o~")


def recordings_in(places: Iterable[str | Path]) -> tuple[list[str | Path], list[Path]]:
    """The recordings that files and folders name, in order, and the other files in these folders.

    A folder without a recording is among the former: rating it raises an error that says so.
    """
    found: list[str | Path] = []
    others: list[Path] = []
    for place in places:
        inside = sorted(path for path in Path(place).rglob("*") if path.is_file())
        recordings = [path for path in inside if sources.is_audio(path.name)]
        found += recordings or [place]
        others += [path for path in inside if path not in recordings]
    return found, others


def as_table(ratings: Iterable[Rating]) -> pd.DataFrame:
    """One row per recording and dimension:
    ``file,dimension,rating,uncertainty,percentile,words``."""
    rows = [
        (
            one.file,
            key,
            one.ratings[key],
            one.uncertainty[key],
            one.percentiles[key],
            one.sentence(key),
        )
        for one in ratings
        for key in one.ratings
    ]
    return pd.DataFrame(
        rows, columns=["file", "dimension", "rating", "uncertainty", "percentile", "words"]
    )


def as_text(rating: Rating, colour: bool = False, ascii_only: bool = False) -> str:
    """A recording for a terminal of 80 columns: one line per dimension, from one pole to the other.

    The bar is the scale of percentiles: its middle is the median of people's ratings of
    PercePiano's human performances. The marker is the rating, the line through it one standard
    deviation to each side.
    """
    name = rating.file if len(rating.file) <= WIDTH else f"...{rating.file[3 - WIDTH :]}"
    lines = [name, f"  {in_short(rating)}"]
    for warning in rating.warnings:
        lines += textwrap.wrap(
            f"Note: {warning}.", WIDTH, initial_indent="  ", subsequent_indent="  "
        )
    lines.append(f"{'':24} {'0    median 100':15} {'':19}    %  rating")
    sides, group = [], ""
    for dimension in DIMENSIONS:
        key, family, low, high = dimension
        if family != group:
            lines.append(_styled(family, "1", colour))
            group = family
        code = "2"
        if on_one_side(rating.bands[key]):
            code = "33" if rating.percentiles[key] > 50 else "34"
            degree, pole, share = side(dimension, rating.percentiles[key])
            sides.append(f"{degree} {pole} ({share:.0f} %)")
        bar = _styled(_bar(rating.percentiles[key], rating.bands[key]), code, colour)
        numbers = (
            f"{rating.percentiles[key]:4.0f} "
            f" {rating.ratings[key]:.2f}±{rating.uncertainty[key]:.2f}"
        )
        lines.append(f"{low:>24} {bar} {high:19} {numbers}")
    text = (
        f"More so than most human performances: {', '.join(sides)}."
        if sides
        else "No dimension is clearly on one side of the median."
    )
    lines += textwrap.wrap(text, WIDTH, subsequent_indent="  ")
    return "\n".join(lines).translate(_ASCII) if ascii_only else "\n".join(lines)


def _bar(percentile: float, band: tuple[float, float]) -> str:
    """A scale of 0 to 100 in ``_CELLS`` cells: band, median, marker."""
    at, first, last = (min(int(value * _CELLS / 100), _CELLS - 1) for value in (percentile, *band))
    cells = ["─" if first <= k <= last else "│" if k == _CELLS // 2 else "·" for k in range(_CELLS)]
    cells[at] = "●"
    return "".join(cells)


def _styled(text: str, code: str, colour: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if colour else text


def comparison_text(one: Rating, other: Rating) -> str:
    """Two performances of one piece for a terminal: the differences that exceed their error."""
    found = compare(one, other)
    lines = textwrap.wrap(
        f"{Path(other.file).name} against {Path(one.file).name}, if both are of the same music:",
        WIDTH,
    )
    for key, _, low, high in DIMENSIONS:
        if found.reported[key]:
            lines.append(
                f"  {low + ' to ' + high:44} {one.ratings[key]:.2f} -> {other.ratings[key]:.2f}"
            )
            lines.append(f"    {found.words[key]}")
    if not found.reported.any():
        lines.append("  no difference exceeds its error in any dimension")
    return "\n".join(lines)


def in_short(rating: Rating) -> str:
    """Length, number of notes and tuning of a recording."""
    if rating.performance is None:
        return f"{clock(rating.seconds)}, no notes detected"
    a4 = 440 * 2 ** (rating.tuning / 1200)
    return (
        f"{clock(rating.seconds)}, {len(rating.performance.notes):,} notes transcribed, A4 ="
        f" {a4:.0f} Hz"
    )


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def compare(one: Rating, other: Rating) -> pd.DataFrame:
    """Two performances of one piece, by dimension: ``difference`` (other - one), its ``deviation``,
    ``reported``, ``words``.

    Errors that the music causes are common to both and cancel, so the deviation is that of errors
    within passages, smaller than that of either rating.
    """
    rows = []
    for dimension in DIMENSIONS:
        key = dimension.key
        difference, deviation = other.ratings[key] - one.ratings[key], 2**0.5 * one.within[key]
        pole = dimension.high if difference > 0 else dimension.low
        sure, likely = (abs(difference) >= far * deviation for far in (SURE, LIKELY))
        words = (
            f"the second is {'' if sure else 'probably '}closer to {pole}"
            if likely
            else "no difference beyond the error"
        )
        rows.append((key, round(difference, 4), round(deviation, 4), likely, words))
    return pd.DataFrame(
        rows, columns=["dimension", "difference", "deviation", "reported", "words"]
    ).set_index("dimension")
