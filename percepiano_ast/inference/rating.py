"""The rating of a recording: in words, as text, table, JSON and HTML."""

from __future__ import annotations

import functools
import math
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from percepiano_ast.dimensions import PERCEPIANO, Dimension, RatingScale
from percepiano_ast.errors import InputError
from percepiano_ast.files import as_text, printable
from percepiano_ast.music.midi import Performance

if TYPE_CHECKING:
    import pandas as pd

WINDOW_SECONDS = 8.0  # of the course over time
_NEARER = 10.0  # percentiles from the middle, from which words name the closer pole
# A difference of at least SURE standard deviations of its error is reported, one of at least LIKELY
# as probable. SHARES: of pairs of performances of one passage that differ by as much, people's
# ratings order this share the same way, for works left out of training on a held-out soundfont
# (tests/test_results.py, which also has the shares for the works of the training).
SURE, LIKELY = 1.0, 0.5
SHARES = (0.86, 0.75)
WIDTH = 80  # columns of the text
_CELLS = 15  # of a bar
_ASCII = str.maketrans("·─│●±", ".-|o~")


@dataclass(frozen=True)
class Moment:
    """A stretch of a recording, in seconds, with its own rating, 0 to 1, and its percentile."""

    start: float
    stop: float
    rating: float
    percentile: float


@dataclass(frozen=True, eq=False)
class Rating:
    """The rating of a recording. A model in one file gives all attributes, the folds of a run give
    those without a default, ``warnings`` and ``scale``.

    Attributes:
        file, seconds: its path or name as given, and length; what is shown of the name is
            `files.printable`.
        ratings, uncertainty: by dimension, on ``scale``: the predicted mean rating by people, and
            the standard deviation of its error (of a model in one file: for works, soundfonts and
            rooms that were left out of training).
        percentiles: by dimension, percentage of PercePiano's human performances that people rated
            lower than ``ratings``.
        bands: by dimension, the percentiles of ``ratings`` minus and plus ``uncertainty``.
        times: middles of the windows of the course over time, seconds (m,).
        course: ratings of the windows (m, 19), NaN where fewer than three notes start.
        course_percentiles: percentiles of ``course`` (m, 19).
        performance: transcribed notes and pedals; None if no note was detected.
        warnings: reasons to doubt the ratings, in sentences.
        informed: whether the score was given.
        within: by dimension, standard deviation of errors among performances of one passage.
        tuning: cents above A4 = 440 Hz, see `audio.estimate_tuning`; the sound is retuned to
            within 4 cents of it before it is rated.
        limits: what the model was validated on and what it must not be used for, in two sentences.
        performances: number of human performances that the percentiles refer to.
        scale: the dimensions, their poles and the ends of their scales.
    """

    file: str
    seconds: float
    ratings: dict[str, float]
    uncertainty: dict[str, float]
    percentiles: dict[str, float] = field(default_factory=dict)
    bands: dict[str, tuple[float, float]] = field(default_factory=dict)
    times: np.ndarray = field(default_factory=lambda: np.zeros(0))
    course: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    course_percentiles: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    performance: Performance | None = None
    warnings: list[str] = field(default_factory=list)
    informed: bool = False
    within: dict[str, float] = field(default_factory=dict)
    tuning: float | None = None
    limits: str = ""
    performances: int = 0
    scale: RatingScale = field(default_factory=lambda: PERCEPIANO)

    def position(self, key: str) -> tuple[float, float, float]:
        """The rating, and it minus and plus its uncertainty, on a bar from 0 to 100: percentiles,
        or without them percentages of the scale."""
        if self.percentiles:
            return self.percentiles[key], *self.bands[key]
        k, value, spread = self.scale.names.index(key), self.ratings[key], self.uncertainty[key]
        low, high = self.scale.lowest[k], self.scale.highest[k]
        at = np.clip((np.array([value, value - spread, value + spread]) - low) / (high - low), 0, 1)
        return tuple((100 * at).tolist())

    def number(self, key: str) -> str:
        """Rating and uncertainty of one dimension, to a hundredth of the scale."""
        k = self.scale.names.index(key)
        digits = decimals(self.scale.lowest[k], self.scale.highest[k])
        return f"{self.ratings[key]:.{digits}f} ± {self.uncertainty[key]:.{digits}f}"

    def words(self, key: str) -> str:
        """One dimension in words, see `in_words`."""
        dimension, (at, *band) = (
            self.scale.dimensions[self.scale.names.index(key)],
            self.position(key),
        )
        if self.percentiles:
            return in_words(dimension, at, (band[0], band[1]))
        if band[0] <= 50 <= band[1]:
            return f"between {dimension.low} and {dimension.high}"
        return f"closer to {dimension.high if at > 50 else dimension.low}"

    def sentence(self, key: str) -> str:
        """One dimension in words, with its group: ``Timing: rather unstable ...``."""
        return f"{self.scale.dimensions[self.scale.names.index(key)].family}: {self.words(key)}"

    def moments(self, key: str) -> tuple[Moment, ...]:
        """The window with the highest rating and that with the lowest; none if no window is
        rated."""
        k = self.scale.names.index(key)
        if not len(self.course) or np.isnan(column := self.course[:, k]).all():
            return ()
        half, found = min(WINDOW_SECONDS, self.seconds) / 2, []
        for i in (int(np.nanargmax(column)), int(np.nanargmin(column))):
            start, stop = max(self.times[i] - half, 0.0), min(self.times[i] + half, self.seconds)
            percentile = float(self.course_percentiles[i, k])
            found.append(Moment(start, stop, float(column[i]), percentile))
        return tuple(found)

    def as_json(self) -> dict:
        """``{"file", "ratings", "uncertainty", "percentiles", "warnings"}``, without percentiles if
        there are none; for ``file`` see `files.as_text`."""
        found: dict = {"file": as_text(self.file)}
        found |= {"ratings": self.ratings, "uncertainty": self.uncertainty}
        if self.percentiles:
            found["percentiles"] = self.percentiles
        return found | {"warnings": self.warnings}

    def rows(self) -> list[dict]:
        """What the page and the card show of each dimension: poles, numbers, words, and the bar."""
        return [
            {
                "number": k,
                "family": family,
                "low": low if family != key else f"{family} {low}",
                "high": high,
                "rating": self.ratings[key],
                "figures": self.number(key),
                "percentile": self.percentiles.get(key),
                "at": self.position(key)[0],
                "band": self.position(key)[1:],
                "words": self.words(key),
            }
            for k, (key, family, low, high) in enumerate(self.scale.dimensions)
        ]

    def __repr__(self) -> str:
        """Five lines: file, length, the two most distinctive ratings, warnings."""
        far = sorted(self.ratings, key=lambda key: -abs(self.position(key)[0] - 50))
        lines = [f"Rating of {printable(self.file)}", in_short(self)]
        for key in far[:2]:
            percentile = f", percentile {self.percentiles[key]:.0f}" if self.percentiles else ""
            lines.append(f"{self.sentence(key)} ({self.number(key)}{percentile})")
        lines.append(f"warnings: {'; '.join(self.warnings) or 'none'}")
        return "\n  ".join(lines)

    def _repr_html_(self) -> str:
        """The card of the rating page, for notebooks."""
        return str(templates().get_template("rating_card.html.j2").module.card(self))


def in_words(dimension: Dimension, percentile: float, band: tuple[float, float]) -> str:
    """Where a rating lies between the poles of its dimension.

    Args:
        percentile: of the rating among people's ratings of PercePiano's human performances.
        band: percentiles of the rating minus and plus its standard deviation. If it holds the
            middle (50), no side is claimed.
    """
    degree, pole, share = _side(dimension, percentile)
    if band[0] <= 50 <= band[1]:
        closer = f", closer to {pole}" if share >= 50 + _NEARER else ""
        return f"between {dimension.low} and {dimension.high}{closer}"
    most = "any" if share > 99.5 else f"{math.floor(share)} %"
    return f"{degree} {pole}, more so than {most} of the human performances"


def _side(dimension: Dimension, percentile: float) -> tuple[str, str, float]:
    """Degree (``rather``, ``clearly``, ``very``), pole, and percentage of human performances that
    are further from that pole."""
    pole, share = dimension.high, percentile
    if percentile < 50:
        pole, share = dimension.low, 100 - percentile
    return "very" if share >= 95 else "clearly" if share >= 80 else "rather", pole, share


def decimals(low: float, high: float) -> int:
    """Number of decimals for a resolution of a hundredth of the scale."""
    return max(2 - math.floor(math.log10(high - low)), 0)


def in_short(rating: Rating) -> str:
    """Length of a recording, and of one that was transcribed, number of notes and tuning."""
    if rating.tuning is None:
        return clock(rating.seconds)
    if rating.performance is None:
        return f"{clock(rating.seconds)}, no notes detected"
    a4, notes = 440 * 2 ** (rating.tuning / 1200), len(rating.performance.notes)
    return f"{clock(rating.seconds)}, {notes:,} notes transcribed, A4 = {a4:.0f} Hz"


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


# --- As text, tables and HTML ---------------------------------------------------------------------


def to_table(ratings: Iterable[Rating]) -> pd.DataFrame:
    """One row per recording and dimension:
    ``file,dimension,rating,uncertainty,percentile,words``."""
    import pandas as pd  # here, because it takes 0.2 s to import

    rows = [
        (file, key, value, one.uncertainty[key], one.percentiles.get(key), one.sentence(key))
        for one, file in ((one, printable(one.file)) for one in ratings)
        for key, value in one.ratings.items()
    ]
    columns = ["file", "dimension", "rating", "uncertainty", "percentile", "words"]
    return pd.DataFrame(rows, columns=columns)


def to_text(rating: Rating, colour: bool = False, ascii_only: bool = False) -> str:
    """A recording for a terminal of 80 columns: one line per dimension, from one pole to the other.

    The bar is the scale of percentiles, with the median in its middle; without percentiles that of
    the ratings. The marker is the rating, the line through it one standard deviation to each side.
    """

    def styled(text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if colour else text

    name = printable(rating.file)
    name = name if len(name) <= WIDTH else f"...{name[3 - WIDTH :]}"
    wrap = functools.partial(textwrap.wrap, width=WIDTH, subsequent_indent="  ")
    lines = [name, f"  {in_short(rating)}"]
    for warning in rating.warnings:
        lines += wrap(f"Note: {warning}.", initial_indent="  ")
    rows, sides = rating.rows(), []
    width = max(24, *(len(row["low"]) for row in rows))
    if rating.percentiles:
        lines.append(f"{'':24} {'0    median 100':15} {'':19}    %  rating")
    for family, group in groupby(rows, lambda row: row["family"]):
        if family not in rating.ratings:
            lines.append(styled(family, "1"))
        for row in group:
            at, band, code = row["at"], row["band"], "2"
            if not band[0] <= 50 <= band[1]:
                code = "33" if at > 50 else "34"
                degree, pole, share = _side(rating.scale.dimensions[row["number"]], at)
                sides.append(f"{degree} {pole} ({share:.0f} %)")
            mark, first, last = (min(int(x * _CELLS / 100), _CELLS - 1) for x in (at, *band))
            cells = [
                "─" if first <= k <= last else "│" if k == _CELLS // 2 else "·"
                for k in range(_CELLS)
            ]
            cells[mark] = "●"
            numbers = f"{at:4.0f}  " if rating.percentiles else ""
            numbers += row["figures"].replace(" ", "")
            lines.append(
                f"{row['low']:>{width}} {styled(''.join(cells), code)} {row['high']:19} {numbers}"
            )
    if rating.percentiles:
        text = "No dimension is clearly on one side of the median."
        if sides:
            text = f"More so than most human performances: {', '.join(sides)}."
        lines += wrap(text)
    return "\n".join(lines).translate(_ASCII) if ascii_only else "\n".join(lines)


def compare(one: Rating, other: Rating) -> pd.DataFrame:
    """Two performances of one piece, by dimension: ``difference`` (other - one), its ``deviation``,
    ``reported``, ``words``.

    Errors that the music causes are common to both and cancel, so the deviation is that of errors
    within passages, smaller than that of either rating.

    Raises:
        InputError: the model states no errors within passages.
    """
    import pandas as pd  # see `to_table`

    if not (one.within and other.within):
        raise InputError(
            f"{printable(one.file)} and {printable(other.file)}: their model states no errors"
            " within a passage. Compare ratings by the bundled model"
        )
    rows = []
    for key, _, low, high in one.scale.dimensions:
        difference, deviation = other.ratings[key] - one.ratings[key], 2**0.5 * one.within[key]
        sure, likely = (abs(difference) >= far * deviation for far in (SURE, LIKELY))
        words = "no difference beyond the error"
        if likely:
            probably, pole = "" if sure else "probably ", high if difference > 0 else low
            words = f"the second is {probably}closer to {pole}"
        rows.append((key, round(difference, 4), round(deviation, 4), likely, words))
    columns = ["dimension", "difference", "deviation", "reported", "words"]
    return pd.DataFrame(rows, columns=columns).set_index("dimension")


def comparison_text(one: Rating, other: Rating) -> str:
    """Two performances of one piece for a terminal: the differences that exceed their error."""
    found = compare(one, other)
    names = " against ".join(printable(Path(rating.file).name) for rating in (other, one))
    lines = textwrap.wrap(f"{names}, if both are of the same music:", WIDTH)
    for key, _, low, high in one.scale.dimensions:
        if found.reported[key]:
            poles = f"{low} to {high}"
            lines.append(f"  {poles:44} {one.ratings[key]:.2f} -> {other.ratings[key]:.2f}")
            lines.append(f"    {found.words[key]}")
    if not found.reported.any():
        lines.append("  no difference exceeds its error in any dimension")
    return "\n".join(lines)


@functools.cache
def templates():
    """The package's HTML templates."""
    from jinja2 import Environment, PackageLoader, StrictUndefined  # not needed for other output

    jinja = Environment(
        loader=PackageLoader("percepiano_ast"),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
    )
    jinja.filters["filename"] = lambda file: printable(Path(file).name)
    jinja.globals |= {"clock": clock, "in_short": in_short}
    return jinja
