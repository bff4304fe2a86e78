"""Custom ratings: a folder of recordings and a CSV of ratings by people, under any dimension names.

The CSV has one row per clip: the column ``clip`` (file name, with or without its extension), a
column that groups clips which must stay on one side of a split (the piece, the pianist), and a
numeric column per dimension, in any unit. Twenty clips are enough for heads on a frozen encoder.
The result has the form of PercePiano's: `batches.RatedClips` and an index with folds.
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
from percepiano_ast.config import FrontEnd
from percepiano_ast.data import sources
from percepiano_ast.data.batches import RatedClips
from percepiano_ast.dimensions import Questionnaire
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation.predictions import read_csv, read_limited

FEWEST = 20  # clips: with fewer, a held-out fold has three or less, too few for a correlation
MOST_FOLDS = 5
CLIP = "clip"
SYNTHESIZER = "recording"  # in place of a synthesizer's name
_SHOWN = 5  # names in a message


@dataclass(frozen=True, eq=False)
class OwnRatings:
    """Validated recordings with ratings.

    Attributes:
        dimensions: names of the rated qualities, in the order of the columns.
        index: ``clip, segment, content_group, human, fold_content``, as in every index; groups
            serve as content groups, and no group is split over folds.
        ratings: float32 (clips, dimensions), unscaled.
        files: clip -> recording.
    """

    dimensions: tuple[str, ...]
    index: pd.DataFrame
    ratings: np.ndarray
    files: dict[str, Path]

    @property
    def questionnaire(self) -> Questionnaire:
        """The dimensions, each with the range of its given ratings."""
        return Questionnaire.own(
            self.dimensions, *(end(axis=0).tolist() for end in (self.ratings.min, self.ratings.max))
        )

    def checksum(self, clips: RatedClips) -> str:
        """SHA-256 of the training data: groups, folds, ratings and audio."""
        content = hashlib.sha256(self.index.to_csv(index=False).encode())
        for part in (self.ratings, *clips.codes):
            content.update(np.ascontiguousarray(part).data)
        return content.hexdigest()


def read(
    folder: str | Path, csv: str | Path, group: str, dimensions: Sequence[str] = ()
) -> OwnRatings:
    """Read a folder of recordings and their ratings.

    Args:
        folder: recordings in any format of `audio.load`; other files are ignored.
        csv: their ratings, see above.
        group: the column of groups.
        dimensions: columns of ratings; by default all but ``clip`` and ``group``.

    Raises:
        InputError: columns missing, unnamed or duplicated, fewer than ``FEWEST`` clips or two
            groups, a duplicated clip, a missing or non-numeric rating, a constant dimension, a clip
            without a recording, a recording without a row; the message names the first fault.
    """
    table = read_csv(csv, "ratings")
    table.columns = _header(csv)
    dimensions = tuple(
        dict.fromkeys(dimensions or (name for name in table.columns if name not in (CLIP, group)))
    )
    if missing := [name for name in (CLIP, group, *dimensions) if name not in table.columns]:
        raise InputError(
            f"{csv} lacks the columns {', '.join(missing)}; it has {', '.join(table.columns)}. It"
            f" needs {CLIP}, a column that groups clips, and one per dimension."
        )
    if not dimensions:
        raise InputError(
            f"{csv} has no column of ratings besides {CLIP} and {group}. Add one per dimension."
        )
    for name in (CLIP, group):
        if (empty := table[name].isna()).any():
            raise InputError(f"{csv}, line {empty.idxmax() + 2}: {name} is empty. Fill it in.")
    table[CLIP] = [_stem(name.strip()) for name in table[CLIP]]
    if (twice := table[CLIP].duplicated()).any():
        raise InputError(
            f"{csv}, line {twice.idxmax() + 2}: clip {table[CLIP][twice.idxmax()]!r} has a row"
            " already. Give one row per clip, with the mean of its ratings."
        )
    ratings = _ratings(table, dimensions, csv)
    files = _files(Path(folder), table[CLIP], csv)
    return OwnRatings(
        dimensions, _index(table[CLIP], table[group].str.strip(), csv), ratings, files
    )


def _header(csv) -> list[str]:
    """Column names as written in the file; pandas would rename unnamed and duplicated columns."""
    rows = csv_format.reader(io.StringIO(read_limited(csv).decode("utf-8-sig")))
    names = [name.strip() for name in next(row for row in rows if row)]
    for number, name in enumerate(names, 1):
        if not name:
            raise InputError(f"{csv}: column {number} has no name. Name it, or remove it.")
        if names.count(name) > 1:
            raise InputError(
                f"{csv} has {names.count(name)} columns named {name!r}. Keep one, or rename them."
            )
    return names


def _stem(name: str) -> str:
    """A file's name without its extension, if it is that of an audio file."""
    return name.rsplit(".", 1)[0] if sources.is_audio(name) else name


def _ratings(table: pd.DataFrame, dimensions: tuple[str, ...], csv) -> np.ndarray:
    values = table[list(dimensions)].apply(pd.to_numeric, errors="coerce").to_numpy(np.float64)
    if len(places := np.argwhere(~np.isfinite(values))):
        row, column = places[0]
        cell = table[dimensions[column]].iloc[row]
        what = "is empty" if pd.isna(cell) else f"is {cell!r}"
        raise InputError(
            f"{csv}, line {row + 2}: {dimensions[column]} of {table[CLIP].iloc[row]!r} {what}."
            " Enter a number, remove the clip, or name the columns that are ratings."
        )
    for column in np.flatnonzero(np.ptp(values, axis=0) == 0):
        raise InputError(
            f"{csv}: {dimensions[column]} is {values[0, column]:g} for every clip, so it cannot be"
            " learned. Remove the column."
        )
    return values.astype(np.float32)


def _files(folder: Path, clips: pd.Series, csv) -> dict[str, Path]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of recordings. Check the path.")
    found: dict[str, Path] = {}
    for path in sorted(path for path in folder.iterdir() if sources.is_audio(path.name)):
        if (clip := path.stem.strip()) in found:
            raise InputError(
                f"{found[clip].name} and {path.name} in {folder} are both of clip {clip!r}. Keep"
                " one of them."
            )
        found[clip] = path
    for lacking, what in (
        (
            sorted(set(clips) - set(found)),
            f"rated in {csv} but missing in {folder}. Add the recordings or remove the rows.",
        ),
        (
            sorted(set(found) - set(clips)),
            f"in {folder} but not rated in {csv}. Add rows or remove the recordings.",
        ),
    ):
        if lacking:
            names = ", ".join(lacking[:_SHOWN]) + " ..." * (len(lacking) > _SHOWN)
            raise InputError(f"{len(lacking)} clips ({names}) are {what}")
    return {clip: found[clip] for clip in clips}


def _index(clips: pd.Series, groups: pd.Series, csv) -> pd.DataFrame:
    """Folds of whole groups, as equal in size as the groups allow."""
    if len(clips) < FEWEST:
        raise InputError(
            f"{csv} rates {len(clips)} clips. Training and testing need at least {FEWEST}."
        )
    if (n := groups.nunique()) < 2:
        raise InputError(
            f"{csv} has all clips in one group, {groups.iloc[0]!r}. Name a column with at least"
            " two, so that one can be held out."
        )
    folds = np.empty(len(clips), int)
    for number, (_, held_out) in enumerate(
        GroupKFold(min(n, MOST_FOLDS)).split(clips, groups=groups)
    ):
        folds[held_out] = number
    facts = {
        "clip": clips,
        "segment": groups,
        "content_group": groups,
        "human": True,
        "fold_content": folds,
    }
    return pd.DataFrame(facts)


def rated_clips(
    own: OwnRatings, front_end: FrontEnd, log: Callable[[str], None] = print
) -> RatedClips:
    """Compute the log-mel codes of all recordings, in the order of the index; all are held in
    memory.

    Raises:
        InputError: a recording is unreadable, silent or too short; the message names it.
    """
    codes = []
    for number, path in enumerate(own.files.values(), 1):
        wave = audio.load(path, front_end.sample_rate)
        codes.append(audio.quantize(audio.log_mel(wave, front_end), front_end)[0])
        if number % 50 == 0:
            log(f"  {number} of {len(own.files)} recordings")
    clips = own.index["clip"].to_numpy(str)
    return RatedClips(codes, clips, np.full(len(clips), SYNTHESIZER), own.ratings)
