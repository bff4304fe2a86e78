"""What was said of recordings as text and as tables; and two performances of one piece beside each other."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from percepiano_ast.data import sources
from percepiano_ast.dimensions import DIMENSIONS
from percepiano_ast.recording.rating import Rating

# Deviations from which on two performances are said to differ, or to differ probably. Of pairs of held-out performances of one
# passage that lie as far apart, people's ratings order 92 % and 81 % the same way, on an unseen piano 91 % and 81 %, in rooms
# 90 % and 78 % (tests/test_results.py); of all pairs 62 %.
SURE, LIKELY = 1.0, 0.5


def recordings_in(places: Iterable[str | Path]) -> tuple[list[str | Path], list[Path]]:
    """The recordings that files and folders name, in order, and what else lies in these folders.

    A folder without a recording is among the former: rating it says what is wrong, and the others are rated all the same.
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
    """A row a recording and dimension: ``file,dimension,rating,uncertainty,percentile,words``."""
    rows = [
        (one.file, key, one.ratings[key], one.uncertainty[key], one.percentiles[key], one.sentence(key))
        for one in ratings
        for key in one.ratings
    ]
    return pd.DataFrame(rows, columns=["file", "dimension", "rating", "uncertainty", "percentile", "words"])


def as_text(rating: Rating) -> str:
    """A recording for a person: a line a dimension, from one pole to the other, and where among PercePiano's clips it is."""
    lines = [f"{rating.file}: {in_short(rating)}"]
    lines += [f"  note: {warning}" for warning in rating.warnings]
    for key, family, low, high in DIMENSIONS:
        value, spread = rating.ratings[key], rating.uncertainty[key]
        bar = "." * round(20 * min(max(value, 0), 1))
        numbers = f"{value:.2f} +- {spread:.2f}"
        lines.append(f"  {family:17} {low:>23} {bar + '|':21} {high:20} {numbers}  {rating.percentiles[key]:3.0f} %")
    return "\n".join(lines)


def in_short(rating: Rating) -> str:
    """Length, notes and tuning of a recording."""
    if rating.performance is None:
        return f"{clock(rating.seconds)}, no notes heard"
    a4 = 440 * 2 ** (rating.tuning / 1200)
    return f"{clock(rating.seconds)}, {len(rating.performance.notes):,} notes heard, tuned to A4 = {a4:.0f} Hz"


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def compare(one: Rating, other: Rating) -> pd.DataFrame:
    """Two performances of one piece: by dimension ``difference`` (other - one), ``deviation`` of it, and ``words``.

    What the piece adds to both is the same, so that the deviation is that of errors within passages, smaller than that of
    either rating.
    """
    rows = []
    for dimension in DIMENSIONS:
        key = dimension.key
        difference, deviation = other.ratings[key] - one.ratings[key], 2**0.5 * one.within[key]
        pole = dimension.high if difference > 0 else dimension.low
        sure, likely = (abs(difference) >= far * deviation for far in (SURE, LIKELY))
        words = f"the second is {'' if sure else 'probably '}more {pole}" if likely else "no difference that could be told"
        rows.append((key, round(difference, 4), round(deviation, 4), words))
    return pd.DataFrame(rows, columns=["dimension", "difference", "deviation", "words"]).set_index("dimension")
