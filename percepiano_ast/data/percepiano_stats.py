"""Descriptive statistics of PercePiano."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from percepiano_ast.data.percepiano import LABELS, RATERS, find_midi, read_labels
from percepiano_ast.dimensions import KEYS
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation import reliability
from percepiano_ast.music.midi import read_midi, trimmed
from percepiano_ast.tables import read_csv


def raters(folder: str | Path) -> pd.DataFrame:
    """Every valid rating, see `reliability.read_raters`, with the column ``round``: 1 for D960,
    which was rated first, by other raters (Park et al. 2024, section 3), else 2."""
    table = reliability.read_raters(folder)
    table.insert(2, "round", np.where(table["clip"].str.contains("D960"), 1, 2))
    return table


def rater_counts(folder: str | Path) -> dict[str, int]:
    """Row counts of the rater table: ``rows``, ``blank`` (no rating), ``too_high`` (a value above
    the scale, which excludes the whole row), ``valid``, ``missing`` (zeros and empty cells in valid
    rows), ``raters`` and ``clips``."""
    valid = reliability.read_raters(folder)
    rows = read_csv(Path(folder) / RATERS, "rater", ["user", "filename"])
    questions = rows.filter(like="Question_").iloc[:, : len(KEYS)]  # the last asks for free text
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


class RebuiltMeans(NamedTuple):
    """Means over raters (clips, 19), 0 to 1, the largest absolute difference from a published
    label, and a summary of the comparison."""

    means: pd.DataFrame
    largest: float
    sentence: str


def rebuild_means(folder: str | Path) -> RebuiltMeans:
    """Recompute the published labels from the individual ratings.

    Raises:
        InputError: files missing, a rated clip without label or a label without ratings (named), or
            means that differ from the published ones.
    """
    means, labels = reliability.mean_ratings(reliability.read_raters(folder)), read_labels(folder)
    advice = "Use both files from one version of the data."
    for clip in sorted(set(means.index) ^ set(labels)):
        lacks = f"no label in {LABELS}" if clip in means.index else f"no valid rating in {RATERS}"
        raise InputError(f"{folder}: clip {clip} has {lacks}. {advice}")
    stated = _wide({clip: values[: len(KEYS)] for clip, values in labels.items()})
    off = (means - stated.loc[means.index]).abs()
    largest = float(off.max(axis=None))
    if not largest < 1e-9:  # smaller differences are rounding errors
        clip = off.max(axis=1).idxmax()
        raise InputError(
            f"{folder}: the raters' mean of clip {clip} differs from its label by {largest:.4f},"
            f" the most of all clips. {advice}"
        )
    n = rater_counts(folder)
    sentence = (
        f"{n['valid']:,} ratings of {n['raters']} raters reproduce the published means of"
        f" {len(means):,} clips exactly (largest difference {largest:.0g}). {n['blank']} blank rows"
        f" and {n['too_high']} rows with a value above 7 are excluded; {n['missing']:,} zeros and"
        " empty cells count as missing."
    )
    return RebuiltMeans(means, largest, sentence)


def compositions(folder: str | Path, index: pd.DataFrame) -> pd.DataFrame:
    """Contents of each composition, one row each and ``all``: ``human_clips``, ``players``,
    ``deadpan_clips``, ``segments``, ``median_seconds``, ``raters`` and ``ratings_per_clip``;
    players and seconds of human performances. InputError: a clip without a readable MIDI file."""
    midi = find_midi(folder)
    if lacking := sorted(set(index["clip"]) - set(midi)):
        what = f"{len(lacking)} clips of the index have no MIDI file in {folder}"
        raise InputError(f"{what}, such as {lacking[0]}. Download the data again.")
    seconds = [trimmed(read_midi(midi[clip])).duration for clip in index["clip"]]
    facts = index.assign(seconds=seconds)
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
    found = pd.DataFrame.from_dict(rows | {"all": row(facts, ratings)}, orient="index")
    return found.rename_axis("composition")


def distributions(ratings: dict[str, np.ndarray], index: pd.DataFrame) -> pd.DataFrame:
    """Distribution of each dimension's ratings (see `percepiano.read_ratings`), one row each:
    ``mean, std, min, median, max`` over clips, and ``deadpan``, the mean of deadpan renderings
    minus that of human performances, in standard deviations of the latter."""
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
    ``features``: rows with the column ``clip`` and numeric columns, such as
    ``classic_features.csv``, averaged per clip. InputError: no clip of the table is rated."""
    means, y = features.groupby("clip").mean(numeric_only=True), _wide(ratings)
    y = y.loc[y.index.intersection(means.index)]
    if y.empty:
        what = f"none of the clips of the features, such as {means.index[0]!r}, is rated"
        raise InputError(f"{what}. Give features of rated clips.")
    x = means.loc[y.index]
    x, y = (x - x.mean()) / x.std(ddof=0).replace(0, np.nan), (y - y.mean()) / y.std(ddof=0)
    return (x.T @ y / len(y)).rename_axis("feature")


def _wide(ratings: Mapping[str, np.ndarray | list[float]]) -> pd.DataFrame:
    wide = pd.DataFrame.from_dict(ratings, orient="index", columns=list(KEYS), dtype=float)
    return wide.rename_axis("clip")
