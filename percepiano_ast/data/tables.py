"""The table of a source's recordings: MAESTRO's, or one made from a folder of your own
recordings."""

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from percepiano_ast import audio
from percepiano_ast.data import sources
from percepiano_ast.data.sources import Archive, Folder
from percepiano_ast.errors import InputError

COLUMNS = (
    "canonical_composer",
    "canonical_title",
    "split",
    "year",
    "midi_filename",
    "audio_filename",
    "duration",
)
SPLITS = ("train", "validation", "test")
MAESTRO_LICENCE = "MAESTRO v3: CC BY-NC-SA 4.0, https://magenta.tensorflow.org/datasets/maestro"
OWN_LICENCE = "recordings of your own: you know under which terms"


@dataclass(frozen=True)
class Table:
    """Recordings of a source.

    Attributes:
        rows: ``COLUMNS``, ordered by file name; ``duration`` in seconds.
        root: folder within the source that file names are relative to, empty or ending with a
            slash.
        fingerprint: of the table's source.
        refused: unusable recordings, with the reason.
        licence: of the recordings.
    """

    rows: pd.DataFrame
    root: str
    fingerprint: str
    refused: dict[str, str]
    licence: str


def read_table(files: Archive | Folder) -> Table:
    """Read the source's only CSV table in MAESTRO's format; for a folder without one, make a table
    of its recordings.

    Raises:
        InputError: no table and no recordings, more than one table, or not MAESTRO's columns and
            values.
    """
    tables = [
        name
        for name in files.names
        if name.endswith(".csv") and name.count("/") <= isinstance(files, Archive)
    ]
    if not tables and isinstance(files, Folder):
        return _own(files)
    if len(tables) != 1:
        raise InputError(
            f"{files.where} should hold one CSV table like maestro-v3.0.0.csv, found"
            f" {tables or 'none'}. Give MAESTRO's archive, or a source in its format."
        )
    name, content = tables[0], files.read(tables[0])
    text = ("canonical_composer", "canonical_title", "split", "midi_filename", "audio_filename")
    try:
        rows = pd.read_csv(io.BytesIO(content), dtype=dict.fromkeys(text, str))
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise InputError(
            f"{name} in {files.where} is not a readable CSV table ({error}). Download it again."
        ) from error
    _check(rows, f"{name} in {files.where}")
    root = name[: name.rfind("/") + 1]
    rows = rows.sort_values("audio_filename", ignore_index=True)
    refused = _refused(rows["audio_filename"], root, files)
    rows = rows[~rows["audio_filename"].isin(refused)]
    return Table(rows, root, hashlib.sha256(content).hexdigest()[:16], refused, MAESTRO_LICENCE)


def _check(table: pd.DataFrame, name: str) -> None:
    missing = [column for column in COLUMNS if column not in table]
    if missing:
        raise InputError(
            f"{name} lacks the columns {', '.join(missing)}. Use the columns of MAESTRO v3."
        )
    if table.empty:
        raise InputError(f"{name} lists no recordings. Download it again.")
    numbers = table[["year", "duration"]].apply(pd.to_numeric, errors="coerce")
    for column in (
        "canonical_composer",
        "canonical_title",
        "split",
        "audio_filename",
        "year",
        "duration",
    ):
        bad = (numbers if column in numbers else table)[column].isna()
        if bad.any():
            raise InputError(
                f"{name}, line {bad.idxmax() + 2}: {column} is {table[column][bad.idxmax()]!r}."
                " Correct the value."
            )
    unknown = sorted(set(table["split"]) - set(SPLITS))
    if unknown:
        raise InputError(f"{name}: unknown split {unknown[0]!r}. Use one of: {', '.join(SPLITS)}.")
    repeated = table["audio_filename"].duplicated()
    if repeated.any():
        raise InputError(
            f"{name} lists {table['audio_filename'][repeated].iloc[0]} twice. Keep one line per"
            " recording."
        )


def _refused(listed: pd.Series, root: str, files: Archive | Folder) -> dict[str, str]:
    """Rows without a file, files without a row, and unsafe names, with the reason."""
    there = set(files.names)
    refused = {name: what for name in listed if (what := sources.unsafe(name))}
    for name in listed:
        if name not in refused and root + name not in there:
            refused[name] = f"{name} is listed but not in {files.where}"
    rows = {root + name for name in listed}
    strays = (name for name in files.names if sources.is_audio(name) and name not in rows)
    return refused | {name: sources.unsafe(name) or "not listed in the table" for name in strays}


def _own(files: Folder) -> Table:
    """One row per recording of a folder; the folder's name serves as composer, the file's as
    title."""
    names = [name for name in files.names if sources.is_audio(name)]
    if not names:
        raise InputError(
            f"{files.where} has neither a CSV table like maestro-v3.0.0.csv nor a recording. Give a"
            " folder of recordings."
        )
    rows, refused = [], {}
    for name in names:
        try:
            seconds = audio.duration(Path(files.where) / name)
        except InputError as error:
            refused[name] = str(error)
            continue
        place = Path(name)
        composer = place.parent.name or "own recording"
        rows.append((composer, place.stem, "", 0, "", name, seconds))
    if not rows:
        raise InputError(
            f"none of the {len(names)} recordings in {files.where} can be read;"
            f" {next(iter(refused.values()))}"
        )
    table = pd.DataFrame(rows, columns=COLUMNS)
    table["split"] = _splits(table["audio_filename"])
    sizes = "".join(f"{name} {files.size(name)}\n" for name in names)
    return Table(table, "", hashlib.sha256(sizes.encode()).hexdigest()[:16], refused, OWN_LICENCE)


def _order(name: str) -> str:
    """A sort key for a random but fixed order, independent of other names."""
    return hashlib.sha256(name.encode()).hexdigest()


def _splits(names: pd.Series) -> pd.Series:
    """A tenth for validation and a tenth for test, at least one of each if there are three or more.

    With three or more folders, recordings of a folder share a split: takes of one piece are often
    in one folder.
    """
    folders = names.map(lambda name: Path(name).parent.as_posix())
    groups = folders if folders.nunique() >= 3 else names
    ordered = sorted(groups.unique(), key=_order)
    tenth = max(len(ordered) // 10, 1)
    split = dict.fromkeys(ordered, "train")
    if len(ordered) >= 2:
        split |= dict.fromkeys(ordered[:tenth], "validation")
    if len(ordered) >= 3:
        split |= dict.fromkeys(ordered[tenth : 2 * tenth], "test")
    return groups.map(split)


def limited(rows: pd.DataFrame, hours: float) -> pd.DataFrame:
    """About ``hours`` of the recordings, in proportion to the splits, at least one recording of
    each.

    The random choice is fixed: a higher limit includes all recordings of a lower one.

    Raises:
        InputError: ``hours`` of 0 or less.
    """
    if hours <= 0:
        raise InputError(
            f"a limit of {hours:g} hours selects no recordings. Give more, or 0 for no limit."
        )
    share = hours * 3600 / rows["duration"].sum()
    kept = []
    for _, part in rows.groupby("split", sort=False):
        part = part.sort_values("audio_filename", key=lambda names: names.map(_order))
        before = part["duration"].cumsum() - part["duration"]
        kept.append(part[before < share * part["duration"].sum()])
    return pd.concat(kept).sort_index()
