"""The predictions table, the only input of evaluation, and the index of clips.

A predictions table has one row per clip and dimension, with the columns ``COLUMNS`` and optionally
``uncertainty`` (a standard deviation, in all rows of a run). A *run* is one (model, protocol,
seed). The index lists the clips, their segments and content groups, and the fold in which each
protocol holds them out.
"""

import gzip
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from percepiano_ast.dimensions import KEYS
from percepiano_ast.errors import InputError
from percepiano_ast.files import write_atomic
from percepiano_ast.tables import MISSING, numbers, read_csv, to_csv

SCOPES = ("overall", "within_segment", "humans_only", "within_segment_humans")
RUN = ["model", "protocol", "seed"]
COLUMNS = [*RUN, "fold", "clip", "dimension", "rating", "prediction"]
# Protocols that hold out music: each content group must be in one fold.
HELD_OUT_MUSIC = ("content", "movement", "composition")
# In a segment of two clips the centred values are x and -x: a prediction is either right or wrong.
MIN_IN_SEGMENT = 3
LONGEST_NAME = 200  # characters of a model, protocol or clip
# Weights of the checksum of a clip: fractional parts of multiples of the golden ratio, which are
# distinct, so that swapped dimensions change the sum.
WEIGHTS = 1 + np.arange(1, len(KEYS) + 1) * (np.sqrt(5) - 1) / 2 % 1

_DATA = resources.files("percepiano_ast") / "data"
_SAME_RATING = 1e-3  # tolerance for labels with fewer digits
_ROUNDING = 5e-4  # largest rounding error of a rating with three decimals
_HIGHEST = 2**31  # of a seed or fold
_FARTHEST = 1e6  # prediction or uncertainty; squares of larger ones may not be finite
_FILE_NAME = re.compile(r"[\w+@-][\w+@.-]*")


class RunPredictions(NamedTuple):
    """Predictions of one (model, protocol, seed), with one row per clip in the order of the index;
    ``rating``, ``prediction`` and ``uncertainty`` (or NaN) are (clips, 19)."""

    model: str
    protocol: str
    seed: int
    clip: np.ndarray
    segment: np.ndarray
    content_group: np.ndarray
    human: np.ndarray
    fold: np.ndarray
    rating: np.ndarray
    prediction: np.ndarray
    uncertainty: np.ndarray

    @property
    def name(self) -> tuple[str, str, int]:
        """Model, protocol and seed."""
        return self[:3]

    def take(self, rows: np.ndarray) -> "RunPredictions":
        """The clips at ``rows`` (positions or a mask)."""
        return RunPredictions(*self.name, *(column[rows] for column in self[3:]))


# --- Index and protocols --------------------------------------------------------------------------


def fold_column(protocol: str) -> str:
    """Name of the index column with a protocol's folds; a negative fold is never held out."""
    return protocol if protocol.startswith("upstream_") else f"fold_{protocol}"


def protocols(index: pd.DataFrame) -> list[str]:
    """The protocols of an index, from its fold columns."""
    columns = [name for name in index.columns if name.startswith(("fold_", "upstream_"))]
    return [name.removeprefix("fold_") for name in columns]


def load_index(path: str | Path | None = None) -> pd.DataFrame:
    """Read an index of clips; without ``path`` the bundled one of PercePiano (folds, no ratings).

    Raises:
        InputError: missing file or column, an empty, repeated or invalid value, or a segment in two
            content groups.
    """
    required = ["clip", "segment", "content_group", "human"]
    index = read_csv(_DATA / "percepiano_index.csv" if path is None else path, "index", required)
    name = f"index {'percepiano_index.csv' if path is None else path}"
    folds = [fold_column(protocol) for protocol in protocols(index)]
    missing = [column for column in required if column not in index.columns]
    if missing or not folds:
        raise InputError(f"{name} lacks the columns {missing or ['fold_<protocol>']}; add them.")
    for protocol in protocols(index):
        if not _FILE_NAME.fullmatch(protocol):  # reports name files by it
            raise InputError(
                f"{name} has the protocol {protocol!r:.60}; name it with letters, digits, _ - + @ ."
            )
    if (empty := index[required + folds].isna().any(axis=1)).any():
        raise InputError(f"{name}, line {empty.idxmax()}: a value is empty; fill every column.")

    def refuse(wrong: pd.Series, column: str, action: str) -> None:
        if wrong.any():
            line = wrong.idxmax()
            value = index[column][line]
            raise InputError(f"{name}, line {line}: {column} is {value!r:.60}; {action}.")

    if (repeated := index["clip"].duplicated()).any():
        clip = index["clip"][repeated].iloc[0]
        raise InputError(f"{name} lists clip {clip!r:.60} twice; keep one line per clip.")
    human = index["human"].str.lower()  # spreadsheets write TRUE
    refuse(~human.isin(["true", "false"]), "human", "write True or False")
    index["human"] = human == "true"
    for column, given in numbers(index, folds).items():
        refuse(~((given % 1 == 0) & (given.abs() < _HIGHEST)), column, "write whole numbers")
        index[column] = given.astype(int)
    groups = index.groupby("segment")["content_group"].nunique()
    if (n := groups.max()) > 1:
        segment = groups.idxmax()
        raise InputError(f"{name}: segment {segment!r} is in {n} content groups; put it into one.")
    return index.reset_index(drop=True)


def check_protocol(index: pd.DataFrame, protocol: str) -> pd.DataFrame:
    """The clips of the index that a protocol holds out.

    Raises:
        InputError: unknown protocol, fewer than two folds, or a content group in two folds of a
            protocol that holds out music (``HELD_OUT_MUSIC``).
    """
    column = fold_column(protocol)
    if column not in index.columns:
        raise InputError(
            f"the index has no protocol {protocol!r}; choose one of {', '.join(protocols(index))},"
            " or give another index with --index."
        )
    held_out = index[index[column] >= 0]
    if (folds := held_out[column].nunique()) < 2:
        raise InputError(
            f"protocol {protocol!r} has {folds or 'no'} fold in the index; give at least two."
        )
    crossing = held_out.groupby("content_group")[column].unique()
    crossing = crossing[crossing.str.len() > 1]
    if protocol in HELD_OUT_MUSIC and len(crossing):
        folds = " and ".join(map(str, sorted(crossing.iloc[0])[:2]))
        raise InputError(
            f"content group {crossing.index[0]!r} is in folds {folds} of protocol {protocol!r}, so"
            " its music would leak into training. Put the group into one fold."
        )
    return held_out


# --- Read and validate predictions ----------------------------------------------------------------


def read_predictions(path: str | Path) -> pd.DataFrame:
    """Read a predictions table; an `InputError` names the line of an invalid value."""
    table = read_csv(path, "predictions", COLUMNS)
    return _typed(table, lambda line: f"{path}, line {line}").reset_index(drop=True)


def _typed(table: pd.DataFrame, where) -> pd.DataFrame:
    """Check columns, types and ranges of a table; ``where(row)`` names a row in messages."""

    def refuse(wrong: pd.Series, name: str, action: str):
        if wrong.any():
            value = table[name][row := wrong.idxmax()]
            shown = f"{value!r:.60}" if isinstance(value, str) else value
            raise InputError(f"{where(row)}: {name} is {shown}; {action}.")

    if missing := [column for column in COLUMNS if column not in table.columns]:
        raise InputError(f"predictions lack the columns {missing}; give {', '.join(COLUMNS)}.")
    if table.empty:
        raise InputError("the predictions table has no rows; run the fine-tuning that writes it.")
    table = table.copy()
    for name in ("model", "protocol", "clip", "dimension"):
        refuse(table[name].isna(), name, "write a name")
        table[name] = table[name].astype(str)
        long = table[name].str.len() > LONGEST_NAME
        refuse(long, name, f"write a name of at most {LONGEST_NAME} characters")
    known = f"choose one of: {', '.join(KEYS)}. For custom ratings use `finetune --ratings`"
    refuse(~table["dimension"].isin(KEYS), "dimension", known)
    names = ("seed", "fold", "rating", "prediction", "uncertainty")
    for name, given in numbers(table, [name for name in names if name in table.columns]).items():
        wrong = ~np.isfinite(given)
        if name == "uncertainty":  # optional per run, see validate_predictions
            wrong &= table[name].notna() & ~table[name].isin(MISSING)
        refuse(wrong, name, "write a finite number")
        if name in ("seed", "fold"):
            whole = (given % 1 == 0) & (given >= 0) & (given < _HIGHEST)
            refuse(~whole, name, "write a whole number from 0")
            given = given.astype(int)
        elif name == "rating":
            outside = (given < 0) | (given > 1)
            refuse(outside, name, "ratings are 0 to 1: divide raw ratings by 7")
        else:
            far = given.abs() > _FARTHEST
            refuse(far, name, "ratings are 0 to 1: give the same unit")
        if name == "uncertainty":
            refuse(given < 0, name, "write a standard deviation, 0 or more")
        table[name] = given
    return table


def describe(run) -> str:
    """Text for a run (model, protocol, seed) or a clip of a run."""
    model, protocol, seed, *clip = run
    return f"{model}, protocol {protocol}, seed {seed}" + (f", clip {clip[0]!r}" if clip else "")


def validate_predictions(
    table: pd.DataFrame, index: pd.DataFrame | None = None, *, partial: bool = False
) -> pd.DataFrame:
    """Check a predictions table against an index and return it with clean types.

    Without ``index``, PercePiano's is used and the ratings must be those that PercePiano published.
    Without ``partial``, each run must cover every clip that its protocol holds out.

    Raises:
        InputError: anything that would make a metric wrong; names the value and the next action.
    """
    table = _typed(table.reset_index(drop=True), lambda row: f"row {row}")
    clip_of_run = [*RUN, "clip"]

    # Each run has each clip once, in one fold, with all dimensions.
    folds = table.groupby(clip_of_run)["fold"].nunique()
    if (folds > 1).any():
        raise InputError(
            f"{describe(folds.idxmax())} has predictions in {folds.max()} folds; give the held-out"
            " one."
        )
    if (repeated := table.duplicated([*clip_of_run, "dimension"])).any():
        row = table[repeated].iloc[0]
        raise InputError(
            f"{describe(row[clip_of_run])}: {row['dimension']} is predicted twice. Give each run"
            " once, or change the model name or seed."
        )
    counts = table.groupby(clip_of_run)["dimension"].count()
    if (counts < len(KEYS)).any():
        rows = (table[clip_of_run] == list(counts.idxmin())).all(axis=1)
        lacking = sorted(set(KEYS) - set(table["dimension"][rows]))
        raise InputError(
            f"{describe(counts.idxmin())} lacks {len(lacking)} of {len(KEYS)} dimensions, first"
            f" {lacking[0]!r}; give all dimensions."
        )

    # Uncertainties are in all rows of a run or in none; all runs have the same labels.
    if "uncertainty" in table.columns:
        given = table["uncertainty"].notna().groupby([table[name] for name in RUN]).mean()
        if (some := (given > 0) & (given < 1)).any():
            raise InputError(
                f"{describe(some.idxmax())} has an uncertainty in some rows only; give all or none."
            )
    same = table.groupby(["clip", "dimension"])["rating"]
    spread = same.max() - same.min()
    if (spread > _SAME_RATING).any():
        clip, dimension = spread.idxmax()
        raise InputError(
            f"clip {clip!r}: ratings of {dimension} differ by {spread.max():.3f} between runs;"
            " evaluate only runs with the same labels together."
        )

    # Clips are in the index, in the fold of the index, and (unless ``partial``) complete.
    facts = load_index() if index is None else index
    for protocol, part in table.groupby("protocol"):
        held_out = set(check_protocol(facts, protocol)["clip"])
        expected = facts.set_index("clip")[fold_column(protocol)]
        if len(unknown := part["clip"][~part["clip"].isin(expected.index)]):
            clip = unknown.iloc[0]
            raise InputError(f"clip {clip!r} is not in the index; give the right one by --index.")
        if len(wrong := part[part["fold"] != part["clip"].map(expected)]):
            row = wrong.iloc[0]
            raise InputError(
                f"{describe(row[clip_of_run])} is in fold {row['fold']}, but in fold"
                f" {expected[row['clip']]} of the index; use the folds of the index."
            )
        for run, clips in part.groupby(RUN)["clip"]:
            if (lacking := sorted(held_out - set(clips))) and not partial:
                raise InputError(
                    f"{describe(run)} covers {len(held_out) - len(lacking)} of {len(held_out)}"
                    f" held-out clips, not {lacking[0]!r}. Finish its folds, or give --partial."
                )
    if index is None:
        check_ratings(table)
    return table


def check_ratings(predictions: pd.DataFrame) -> None:
    """Compare the ratings of a validated predictions table with those that PercePiano published, by
    checksums: sums of the 19 ratings times `WEIGHTS`, from which no rating can be recovered.

    Raises:
        InputError: a clip's ratings differ by more than rounding to three decimals.
    """
    expected = pd.read_csv(_DATA / "percepiano_checksums.csv", index_col="clip")["checksum"]
    ratings = predictions.groupby(["clip", "dimension"])["rating"].first().unstack()
    found = ratings[list(KEYS)] @ WEIGHTS
    off = (found - expected.loc[found.index]).abs()
    if (wrong := off > _ROUNDING * WEIGHTS.sum()).any():
        raise InputError(
            f"the ratings of {wrong.sum()} of {len(found)} clips differ from those that PercePiano"
            f" published, {off.idxmax()!r} the most. Use PercePiano's label file (means divided by"
            " 7), or give another index with --index."
        )


def runs(predictions: pd.DataFrame, index: pd.DataFrame) -> list[RunPredictions]:
    """Split a predictions table, which may be partial, into runs, sorted by model, protocol and
    seed; raises as `validate_predictions`."""
    table = validate_predictions(predictions, index, partial=True)
    if "uncertainty" not in table.columns:
        table["uncertainty"] = np.nan
    facts, numbers = index.set_index("clip"), ["rating", "prediction", "uncertainty"]
    result = []
    for (model, protocol, seed), part in table.groupby(RUN):
        wide = part.pivot(index="clip", columns="dimension", values=numbers)
        wide = wide.reindex(facts.index[facts.index.isin(wide.index)])
        names = ["segment", "content_group", "human", fold_column(protocol)]
        columns = [facts.loc[wide.index, name].to_numpy() for name in names]
        values = [wide[name][list(KEYS)].to_numpy(float) for name in numbers]
        run = model, protocol, int(seed)
        result.append(RunPredictions(*run, wide.index.to_numpy(), *columns, *values))
    return result


# --- Make and write predictions -------------------------------------------------------------------


def to_table(
    run: tuple[str, str, int],
    fold: dict[str, int],
    clips: np.ndarray,
    ratings: np.ndarray,
    rated: np.ndarray,
    uncertainty: np.ndarray | None = None,
    dimensions: Sequence[str] = KEYS,
) -> pd.DataFrame:
    """One row per clip and dimension, in ``COLUMNS``; the renderings of a clip are averaged.

    Args:
        run: model, protocol and seed.
        fold: of each clip that the protocol evaluates; other clips are excluded.
        clips: clip name of each rendering, (n,).
        ratings, rated: human ratings and predictions, (n, ``dimensions``).
        uncertainty: (n, ``dimensions``), a further column. A clip's is the plain mean over its
            renderings, whose errors are not independent.
    """
    table = pd.DataFrame(ratings, columns=dimensions).groupby(clips).first()
    table = table.stack().rename("rating").to_frame()
    for name, values in (("prediction", rated), ("uncertainty", uncertainty)):
        if values is not None:
            means = pd.DataFrame(values, columns=dimensions).groupby(clips).mean()
            table = table.join(means.stack().rename(name))
    table = table.rename_axis(["clip", "dimension"]).reset_index()
    table = table[table["clip"].isin(fold)].sort_values("clip", kind="stable")
    table["fold"] = table["clip"].map(fold)
    columns = COLUMNS if uncertainty is None else [*COLUMNS, "uncertainty"]
    return table.assign(**dict(zip(RUN, run)))[columns].reset_index(drop=True)


def ensemble(table: pd.DataFrame, word: str) -> pd.DataFrame:
    """The mean over seeds as a separate model, for every model with several seeds, under each
    protocol; its name has ``-ensemble`` after ``word``, its seed is the lowest.

    Raises:
        InputError: the seeds of a model rated different clips.
    """
    tables = [table.iloc[:0][COLUMNS]]
    for (model, protocol), part in table.groupby(["model", "protocol"]):
        if (seeds := part["seed"].nunique()) < 2:
            continue
        one = part.groupby(["fold", "clip", "dimension"], as_index=False).agg(
            rating=("rating", "first"), prediction=("prediction", "mean"), count=("seed", "nunique")
        )
        if len(short := one[one["count"] < seeds]):
            raise InputError(
                f"{model}, {protocol}: {short['clip'].iloc[0]} is not rated by all {seeds} seeds. "
                "Finish the missing seed, or exclude it."
            )
        name = model.replace(word, f"{word}-ensemble")
        tables.append(one.assign(model=name, protocol=protocol, seed=part["seed"].min())[COLUMNS])
    return pd.concat(tables, ignore_index=True)


def write(table: pd.DataFrame, path: Path) -> None:
    """Write a predictions table atomically; gzipped if the name ends with ``.gz``."""
    content = to_csv(table, "%.6f")
    write_atomic(path, gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
