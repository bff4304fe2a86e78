"""Descriptive statistics of PercePiano: raters, the published means recomputed from them, and
summary tables.

`evaluation.reliability.read_raters` reads the rater table. This module reports the rows that it
excludes, the number and spread of ratings per clip, and the contents of each composition.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from percepiano_ast.data.percepiano_files import LABELS, RATERS, find_midi, read_labels
from percepiano_ast.dimensions import KEYS
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation import reliability
from percepiano_ast.evaluation.table import read_csv
from percepiano_ast.music.midi import read_midi, trimmed

# D960 was rated first, by other raters than WoO80 and D935 (Park et al. 2024, section 3): rater and
# music are confounded.
_FIRST_ROUND = "D960"
_EXACT = 1e-9  # smaller differences between means are rounding errors
_HIGHEST = 7  # of the rating scale


def raters(folder: str | Path) -> pd.DataFrame:
    """Every valid rating, one row per rater and clip: ``rater``, ``clip``, ``round`` and the 19
    dimensions.

    Values are 1 to 7, NaN if missing. See `reliability.read_raters` for the validity rules and
    `counts` for the number of excluded rows. ``round`` is 1 for the clips of D960 and 2 for all
    others.

    Raises:
        InputError: see `reliability.read_raters`.
    """
    table = reliability.read_raters(folder)
    table.insert(2, "round", np.where(table["clip"].str.contains(_FIRST_ROUND), 1, 2))
    return table


def counts(folder: str | Path) -> dict[str, int]:
    """Row counts of the rater table: ``rows``, ``blank`` (no rating), ``too_high`` (a value above
    the scale, which excludes the whole row), ``valid``, ``missing`` (zeros and empty cells in valid
    rows), ``raters`` and ``clips``.

    Raises:
        InputError: see `reliability.read_raters`.
    """
    valid = reliability.read_raters(folder)
    rows = read_csv(Path(folder) / RATERS, "rater")
    # the last one asks for free text
    questions = rows.filter(like="Question_").iloc[:, : len(KEYS)]
    blank = int(questions.isna().all(axis=1).sum())
    return {
        "rows": len(rows),
        "blank": blank,
        "too_high": len(rows) - blank - len(valid),
        "valid": len(valid),
        "missing": int(valid[list(KEYS)].isna().sum().sum()),
        "raters": valid["rater"].nunique(),
        "clips": valid["clip"].nunique(),
    }


def agreement(table: pd.DataFrame) -> pd.DataFrame:
    """Number and spread of the ratings of each clip, one row per clip: ``n_ratings``, ``n_raters``,
    and for each dimension the standard deviation of the ratings in units of the labels (0 to 1; NaN
    for a single rating).

    Many raters of PercePiano rated a clip more than once: 12.2 ratings per clip come from 9.2
    people. The published means count each rating. ``table``: see `raters`.
    """
    by_clip = table.groupby("clip")
    found = by_clip[list(KEYS)].std(ddof=1) / _HIGHEST
    found.insert(0, "n_raters", by_clip["rater"].nunique())
    found.insert(0, "n_ratings", by_clip.size())
    return found


class Rebuilt(NamedTuple):
    """Means over raters, compared with the published labels.

    Attributes:
        means: (clips, 19), 0 to 1.
        largest: largest absolute difference from a published label.
        sentence: a summary of the comparison.
    """

    means: pd.DataFrame
    largest: float
    sentence: str


def rebuild(folder: str | Path) -> Rebuilt:
    """Recompute the published labels from the individual ratings.

    Raises:
        InputError: files missing, a rated clip without label or a label without ratings (named), or
            means that differ from the published ones.
    """
    means, labels = reliability.mean_ratings(reliability.read_raters(folder)), read_labels(folder)
    for clip in sorted(set(means.index) ^ set(labels)):
        lacks = f"no label in {LABELS}" if clip in means.index else f"no valid rating in {RATERS}"
        raise InputError(
            f"{folder}: clip {clip} has {lacks}. Use both files from one version of the data."
        )
    stated = _wide({clip: values[: len(KEYS)] for clip, values in labels.items()})
    off = (means - stated.loc[means.index]).abs()
    largest = float(off.max(axis=None))
    if not largest < _EXACT:
        clip = off.max(axis=1).idxmax()
        raise InputError(
            f"{folder}: the raters' mean of clip {clip} differs from its label by {largest:.4f},"
            " the most of all clips. Use both files from one version of the data."
        )
    n = counts(folder)
    sentence = (
        f"{n['valid']:,} ratings of {n['raters']} raters reproduce the published means of"
        f" {len(means):,} clips exactly (largest difference {largest:.0g}). {n['blank']} blank rows"
        f" and {n['too_high']} rows with a value above {_HIGHEST} are excluded; {n['missing']:,}"
        " zeros and empty cells count as missing."
    )
    return Rebuilt(means, largest, sentence)


def seconds(folder: str | Path, index: pd.DataFrame) -> pd.Series:
    """Duration of each clip of the index in seconds, as of `midi.trimmed`.

    Raises:
        InputError: a clip without a readable MIDI file.
    """
    midi = find_midi(folder)
    if lacking := sorted(set(index["clip"]) - set(midi)):
        raise InputError(
            f"{len(lacking)} clips of the index have no MIDI file in {folder}, such as"
            f" {lacking[0]}. Download the data again."
        )
    lengths = {clip: trimmed(read_midi(midi[clip])).duration for clip in index["clip"]}
    return pd.Series(lengths, name="seconds").rename_axis("clip")


def compositions(folder: str | Path, index: pd.DataFrame) -> pd.DataFrame:
    """Contents of each composition, one row each and ``all``: ``human_clips``, ``players``,
    ``deadpan_clips``, ``segments``, ``median_seconds``, ``raters`` and ``ratings_per_clip``.

    Players and seconds: of human performances. ``index`` needs ``composition`` and ``player``.

    Raises:
        InputError: see `seconds` and `raters`.
    """
    facts = index.merge(seconds(folder, index).reset_index(), on="clip")
    ratings = raters(folder).merge(index[["clip", "composition"]], on="clip")

    def row(part: pd.DataFrame, rated: pd.DataFrame) -> dict:
        humans = part[part["human"]]
        return {
            "human_clips": len(humans),
            "players": humans["player"].nunique(),
            "deadpan_clips": len(part) - len(humans),
            "segments": part["segment"].nunique(),
            "median_seconds": round(float(humans["seconds"].median()), 1),
            "raters": rated["rater"].nunique(),
            "ratings_per_clip": round(len(rated) / rated["clip"].nunique(), 2),
        }

    rows = {
        name: row(part, ratings[ratings["composition"] == name])
        for name, part in facts.groupby("composition")
    }
    return pd.DataFrame.from_dict(rows | {"all": row(facts, ratings)}, orient="index").rename_axis(
        "composition"
    )


def distributions(ratings: dict[str, np.ndarray], index: pd.DataFrame) -> pd.DataFrame:
    """Distribution of each dimension's ratings, one row each: ``mean, std, min, median, max`` over
    clips, and ``deadpan``, the mean of deadpan renderings minus that of human performances, in
    standard deviations of the latter (NaN without deadpan ones).

    ``ratings``: clip -> (19,), see `percepiano.read_ratings`.
    """
    values = _wide(ratings)
    human = index.set_index("clip").loc[values.index, "human"].to_numpy(bool)
    found = values.agg(["mean", "std", "min", "median", "max"]).T
    people = values[human]
    found["deadpan"] = (values[~human].mean() - people.mean()) / people.std()
    return found.rename_axis("dimension")


def correlations(ratings: dict[str, np.ndarray]) -> pd.DataFrame:
    """Pearson's r between the mean ratings of all pairs of dimensions over clips, (19, 19)."""
    return _wide(ratings).corr()


def feature_correlations(features: pd.DataFrame, ratings: dict[str, np.ndarray]) -> pd.DataFrame:
    """Pearson's r of features with ratings over clips, (features, 19); NaN for a constant feature.

    Args:
        features: one row per clip or rendering, with the column ``clip`` and numeric columns, such
            as ``classic_features.csv``; renderings of a clip are averaged.

    Raises:
        InputError: no clip of the table is rated.
    """
    means = features.groupby("clip").mean(numeric_only=True)
    values = _wide(ratings)
    values = values.loc[values.index.intersection(means.index)]
    if values.empty:
        raise InputError(
            f"none of the clips of the features, such as {means.index[0]!r}, is rated. Give"
            " features of rated clips."
        )
    x, y = means.loc[values.index], values
    x, y = (x - x.mean()) / x.std(ddof=0).replace(0, np.nan), (y - y.mean()) / y.std(ddof=0)
    return (x.T @ y / len(values)).rename_axis("feature")


def _wide(ratings: Mapping[str, np.ndarray | list[float]]) -> pd.DataFrame:
    return pd.DataFrame.from_dict(
        ratings, orient="index", columns=list(KEYS), dtype=float
    ).rename_axis("clip")
