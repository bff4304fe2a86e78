"""Custom ratings: a folder of recordings and a CSV of ratings by people, under any dimension names.

The CSV has one row per clip: the column ``clip`` (file name, with or without its extension), a
column that groups clips which must stay on one side of a split (the piece, the pianist), and a
numeric column per dimension, in any unit. How it is read: `tables.read_csv`.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from textwrap import shorten

import numpy as np
import pandas as pd
from sklearn.model_selection import GroupKFold

from percepiano_ast import audio
from percepiano_ast.config import FrontEnd
from percepiano_ast.data.batches import RatedClips
from percepiano_ast.data.percepiano import recordings_in
from percepiano_ast.dimensions import RatingScale
from percepiano_ast.errors import InputError
from percepiano_ast.files import printable, sha256_of, summary
from percepiano_ast.tables import clean_name, numbers, read_csv

logger = logging.getLogger(__name__)

MIN_CLIPS = 20  # with fewer, a held-out fold has three or less, too few for a correlation
MAX_FOLDS = 5


@dataclass(frozen=True, eq=False)
class CustomRatings:
    """Validated recordings, clip -> file, with ratings float32 (clips, dimensions), unscaled; the
    groups of the CSV are the content groups of ``index``."""

    dimensions: tuple[str, ...]
    index: pd.DataFrame
    ratings: np.ndarray
    files: dict[str, Path]

    @property
    def questionnaire(self) -> RatingScale:
        """The dimensions, each with the range of its given ratings."""
        low, high = self.ratings.min(axis=0).tolist(), self.ratings.max(axis=0).tolist()
        return RatingScale.own(self.dimensions, low, high)

    def load(self, front_end: FrontEnd) -> tuple[RatedClips, str]:
        """The log-mel codes of all recordings in memory, in the order of the index, and a SHA-256
        of groups, folds, ratings and audio. InputError: an unusable recording, named."""
        codes = []
        for number, path in enumerate(self.files.values(), 1):
            wave = audio.load(path, front_end.sample_rate)
            codes.append(audio.quantize(audio.log_mel(wave, front_end), front_end)[0])
            if number % 50 == 0:
                logger.info(f"  {number} of {len(self.files)} recordings")
        clips = self.index["clip"].to_numpy(str)
        rated = RatedClips(codes, clips, np.full(len(clips), "recording"), self.ratings)
        return rated, sha256_of(self.index.to_csv(index=False), self.ratings, *codes)


def read_ratings(
    folder: str | Path, csv: str | Path, group: str, dimensions: Sequence[str] = ()
) -> CustomRatings:
    """Read a folder of recordings (see `percepiano.recordings_in`) and their ratings.

    Args:
        group: the column of groups.
        dimensions: columns of ratings; by default all but ``clip`` and ``group``.

    Raises:
        InputError: columns missing, unnamed or duplicated, fewer than `MIN_CLIPS` clips or two
            groups, a duplicated clip, a missing or non-numeric rating, a constant dimension, a clip
            without a recording, a recording without a row; the message names the first fault.
    """
    # --- Columns
    group = clean_name(group)
    table = read_csv(csv, "ratings", ("clip", group))
    names = list(table.columns)
    if "" in names:
        advice = "Name it, or remove it."
        raise InputError(f"{csv}: column {names.index('') + 1} has no name. {advice}")
    chosen = map(clean_name, dimensions or (one for one in names if one not in ("clip", group)))
    dimensions = tuple(dict.fromkeys(chosen))
    if missing := [name for name in ("clip", group, *dimensions) if name not in names]:
        raise InputError(
            f"{csv} lacks the columns {', '.join(missing):.200}; it has"
            f" {shorten(', '.join(names), 60)} ({table.attrs['read']})."
            " It needs clip, a column that groups clips, and one per dimension."
        )
    if not dimensions:
        what = f"no column of ratings besides clip and {group}"
        raise InputError(f"{csv} has {what}. Add one per dimension.")

    # --- Rows
    if table.empty:
        raise InputError(f"{csv} has no rows. Give one per clip.")
    for name in ("clip", group):
        if (empty := table[name].isna()).any():
            raise InputError(f"{csv}, line {empty.idxmax()}: {name} is empty. Fill it in.")
    lines, groups = table.index, table[group].reset_index(drop=True)
    clips = table["clip"].reset_index(drop=True)
    files, left = recordings_in(folder)
    for line in summary(left):
        logger.info(f"  {line}")
    # a name with a suffix: of a file of the folder, or of a known format
    clip_of = {clean_name(printable(path.name)): clip for clip, path in files.items()}
    clips = clips.map(
        lambda name: (
            clip_of.get(name)
            or clean_name(name.rsplit(".", 1)[0] if audio.is_audio(name) else name)
        )
    )
    if (twice := clips.duplicated()).any():
        raise InputError(
            f"{csv}, line {lines[twice.idxmax()]}: clip {clips[twice.idxmax()]!r:.60} has a row"
            " already. Give one row per clip, with the mean of its ratings."
        )

    # --- Ratings
    with np.errstate(over="ignore"):  # 1e39 is refused as infinity is
        values = numbers(table, dimensions).to_numpy(np.float32)
    for row, column in np.argwhere(~np.isfinite(values)):
        cell = table[dimensions[column]].iloc[row]
        what = "is empty" if pd.isna(cell) else f"is {cell!r:.60}"
        raise InputError(
            f"{csv}, line {lines[row]}: {dimensions[column]} of {clips[row]!r:.60} {what}. Enter a"
            " number, remove the clip, or name the columns that are ratings (read as"
            f" {table.attrs['read']})."
        )
    for column in np.flatnonzero(np.ptp(values, axis=0) == 0):
        raise InputError(
            f"{csv}: {dimensions[column]} is {values[0, column]:g} for every clip, so it cannot be"
            " learned. Remove the column."
        )

    # --- Recordings
    absent = set(clips) - set(files)
    odd = {}
    for path, what in left.items():
        parts = clean_name(printable(path.name)).lstrip(".").split(".")  # take.wav.part, .take.wav
        if absent & set(accumulate(parts, "{}.{}".format)):
            odd[path] = what
    if odd:
        raise InputError(
            f"{csv} rates clips of which {folder} has no recording: {'; '.join(summary(odd))}."
            " Replace these files or remove the rows."
        )
    no_file = f"rated in {csv} but missing in {folder}. Add the recordings or remove the rows."
    no_row = f"in {folder} but not rated in {csv}. Add rows or remove the recordings."
    for one, other, what in ((clips, files, no_file), (files, clips, no_row)):
        if lacking := sorted(set(one) - set(other)):
            shown = ", ".join(f"{one:.60}" for one in lacking[:5]) + " ..." * (len(lacking) > 5)
            raise InputError(f"{len(lacking)} clips ({shown}) are {what}")

    # --- Folds of whole groups, as equal in size as the groups allow
    if len(table) < MIN_CLIPS:
        need = f"Training and testing need at least {MIN_CLIPS}."
        raise InputError(f"{csv} rates {len(table)} clips. {need}")
    if (n := groups.nunique()) < 2:
        raise InputError(
            f"{csv} has all clips in one group, {groups.iloc[0]!r:.60}. Name a column with at least"
            " two, so that one can be held out."
        )
    folds = np.empty(len(table), int)
    for fold, (_, test) in enumerate(GroupKFold(min(n, MAX_FOLDS)).split(clips, groups=groups)):
        folds[test] = fold
    facts = {"clip": clips, "segment": groups, "content_group": groups, "human": True}
    index = pd.DataFrame(facts | {"fold_content": folds})
    files = {clip: files[clip] for clip in clips}
    return CustomRatings(dimensions, index, values, files)
