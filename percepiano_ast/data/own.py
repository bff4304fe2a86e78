"""Ratings of one's own: a folder of recordings and a CSV of what people said of them, under any dimension names.

The CSV has a row per clip: the column ``clip`` (file name, with or without its ending), a column that groups what must not be
on both sides of a split (the piece, the pianist), and a column of numbers per dimension, in whatever unit. Twenty clips are
enough for heads on a frozen encoder. The result is what PercePiano's shards give: `batches.RatedClips` and an index with folds.
"""

import csv as csv_format
import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.model_selection import GroupKFold

from percepiano_ast import audio
from percepiano_ast.config import FrontEnd, InputError
from percepiano_ast.data import sources
from percepiano_ast.data.batches import RatedClips
from percepiano_ast.dimensions import Questionnaire
from percepiano_ast.evaluation.reading import content_of
from percepiano_ast.evaluation.table import read_csv

FEWEST = 20  # clips: with fewer a held-out fold holds three or less, and its r means nothing
MOST_FOLDS = 5
CLIP = "clip"
SYNTHESIZER = "recording"  # where rendered clips name their piano
_SHOWN = 5  # names in a message


@dataclass(frozen=True, eq=False)
class OwnRatings:
    """Rated recordings, checked.

    Attributes:
        dimensions: names of the rated qualities, in the order of the columns.
        index: ``clip, segment, content_group, human, fold_content``, the form of every index: a group is a content group,
            folds hold whole groups.
        ratings: float32 (clips, dimensions), as they were given.
        files: clip -> recording.
    """

    dimensions: tuple[str, ...]
    index: pd.DataFrame
    ratings: np.ndarray
    files: dict[str, Path]

    @property
    def questionnaire(self) -> Questionnaire:
        """The dimensions, each from the lowest rating that was given to the highest."""
        return Questionnaire.own(self.dimensions, *(end(axis=0).tolist() for end in (self.ratings.min, self.ratings.max)))

    def checksum(self, clips: RatedClips) -> str:
        """SHA-256 of what is learned: groups, folds, ratings and sound."""
        content = hashlib.sha256(self.index.to_csv(index=False).encode())
        for part in (self.ratings, *clips.codes):
            content.update(np.ascontiguousarray(part).data)
        return content.hexdigest()


def read(folder: str | Path, csv: str | Path, group: str, dimensions: Sequence[str] = ()) -> OwnRatings:
    """Read a folder of recordings and the ratings of them.

    Args:
        folder: recordings as `audio.load` reads them; files of other kinds are not looked at.
        csv: their ratings, see above.
        group: the column that says what belongs together.
        dimensions: columns of ratings; by default all but ``clip`` and ``group``.

    Raises:
        InputError: columns missing, without a name or twice, fewer than ``FEWEST`` clips or two groups, a clip twice, a rating
            missing or no number, a dimension that is the same everywhere, a clip without recording, a recording without row;
            names the first of them.
    """
    table = read_csv(csv, "ratings")
    table.columns = _header(csv)
    dimensions = tuple(dict.fromkeys(dimensions or (name for name in table.columns if name not in (CLIP, group))))
    if missing := [name for name in (CLIP, group, *dimensions) if name not in table.columns]:
        raise InputError(
            f"{csv} lacks the columns {', '.join(missing)}; it has {', '.join(table.columns)}. It needs "
            f"{CLIP}, the column that groups clips, and one per dimension"
        )
    if not dimensions:
        raise InputError(f"{csv} has no column of ratings beside {CLIP} and {group}; add one per dimension")
    for name in (CLIP, group):
        if (empty := table[name].isna()).any():
            raise InputError(f"{csv}, line {empty.idxmax() + 2}: {name} is empty; fill it in")
    table[CLIP] = [_stem(name.strip()) for name in table[CLIP]]
    if (twice := table[CLIP].duplicated()).any():
        raise InputError(
            f"{csv}, line {twice.idxmax() + 2}: clip {table[CLIP][twice.idxmax()]!r} has a row already; "
            "give one row a clip, with the mean of its ratings"
        )
    ratings = _ratings(table, dimensions, csv)
    files = _files(Path(folder), table[CLIP], csv)
    return OwnRatings(dimensions, _index(table[CLIP], table[group].str.strip(), csv), ratings, files)


def _header(csv) -> list[str]:
    """Names of the columns as they stand in the file: pandas would give new ones to those that have none or are there twice."""
    rows = csv_format.reader(io.StringIO(content_of(csv).decode("utf-8-sig")))
    names = [name.strip() for name in next(row for row in rows if row)]
    for number, name in enumerate(names, 1):
        if not name:
            raise InputError(f"{csv}: column {number} has no name; name it, or take it out")
        if names.count(name) > 1:
            raise InputError(f"{csv} has {names.count(name)} columns called {name!r}; keep one, or rename them")
    return names


def _stem(name: str) -> str:
    """A file's name without its ending, where it has one of a recording."""
    return name.rsplit(".", 1)[0] if sources.is_audio(name) else name


def _ratings(table: pd.DataFrame, dimensions: tuple[str, ...], csv) -> np.ndarray:
    values = table[list(dimensions)].apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
    if len(places := np.argwhere(~np.isfinite(values))):
        row, column = places[0]
        cell = table[dimensions[column]].iloc[row]
        what = "is empty" if pd.isna(cell) else f"is {cell!r}"
        raise InputError(
            f"{csv}, line {row + 2}: {dimensions[column]} of {table[CLIP].iloc[row]!r} {what}; write a "
            "number, leave the clip out, or name the columns that are ratings"
        )
    for column in np.flatnonzero(np.ptp(values, axis=0) == 0):
        raise InputError(
            f"{csv}: {dimensions[column]} is {values[0, column]:g} for every clip, so there is nothing "
            "to learn; leave the column out"
        )
    return values.astype(np.float32)


def _files(folder: Path, clips: pd.Series, csv) -> dict[str, Path]:
    if not folder.is_dir():
        raise InputError(f"no folder of recordings at {folder}; check the path")
    found: dict[str, Path] = {}
    for path in sorted(path for path in folder.iterdir() if sources.is_audio(path.name)):
        if (clip := path.stem.strip()) in found:
            raise InputError(f"{found[clip].name} and {path.name} in {folder} are both of clip {clip!r}; keep one of them")
        found[clip] = path
    for lacking, what in (
        (sorted(set(clips) - set(found)), f"rated in {csv} and not in {folder}; add the recordings or take the rows out"),
        (sorted(set(found) - set(clips)), f"in {folder} and not rated in {csv}; add rows or take the recordings out"),
    ):
        if lacking:
            names = ", ".join(lacking[:_SHOWN]) + " ..." * (len(lacking) > _SHOWN)
            raise InputError(f"{len(lacking)} clips ({names}) are {what}")
    return {clip: found[clip] for clip in clips}


def _index(clips: pd.Series, groups: pd.Series, csv) -> pd.DataFrame:
    """Folds of whole groups, as equal in size as the groups allow."""
    if len(clips) < FEWEST:
        raise InputError(f"{csv} rates {len(clips)} clips; at least {FEWEST} are needed to learn from some and test on others")
    if (n := groups.nunique()) < 2:
        raise InputError(
            f"{csv} has all clips in one group, {groups.iloc[0]!r}; name a column with at least two, so that one can be held out"
        )
    folds = np.empty(len(clips), int)
    for number, (_, held_out) in enumerate(GroupKFold(min(n, MOST_FOLDS)).split(clips, groups=groups)):
        folds[held_out] = number
    facts = {"clip": clips, "segment": groups, "content_group": groups, "human": True, "fold_content": folds}
    return pd.DataFrame(facts)


def rated_clips(own: OwnRatings, front_end: FrontEnd, log: Callable[[str], None] = print) -> RatedClips:
    """Listen to all recordings: their codes in memory, in the order of the index.

    Raises:
        InputError: a recording cannot be read, is silent or too short; names it.
    """
    codes = []
    for number, path in enumerate(own.files.values(), 1):
        wave = audio.load(path, front_end.sample_rate)
        codes.append(audio.quantize(audio.log_mel(wave, front_end), front_end)[0])
        if number % 50 == 0:
            log(f"  {number} of {len(own.files)} recordings")
    clips = own.index["clip"].to_numpy(str)
    return RatedClips(codes, clips, np.full(len(clips), SYNTHESIZER), own.ratings)
