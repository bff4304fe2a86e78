"""Read and validate predictions tables and indexes, and split a table into runs.

A *run* is one (model, protocol, seed). A predictions table has one row per clip and dimension:
``model, protocol, seed, fold, clip, dimension, rating, prediction`` and optionally ``uncertainty``
(a standard deviation, in all rows of a run). The index lists the clips, their segments and content
groups, and the fold in which each protocol holds them out.
"""

import io
import warnings
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from percepiano_ast.dimensions import KEYS
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation import published
from percepiano_ast.evaluation.reading import content_of

SCOPES = ("overall", "within_segment", "humans_only", "within_segment_humans")
RUN = ["model", "protocol", "seed"]
COLUMNS = [*RUN, "fold", "clip", "dimension", "rating", "prediction"]
# Protocols with unseen music: each content group must be in one fold.
UNHEARD = ("content", "movement", "composition")
# In a segment of two clips the centred values are x and -x: a prediction is either right or wrong.
FEWEST_IN_SEGMENT = 3

_SAME_RATING = 1e-3  # tolerance for labels with fewer digits


class Run(NamedTuple):
    """One (model, protocol, seed) as arrays with one row per clip, in the order of the index.

    ``rating``, ``prediction`` and ``uncertainty`` are (clips, 19) in the order of ``KEYS``;
    ``uncertainty`` is NaN if the run has none.
    """

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
        return self.model, self.protocol, self.seed

    def take(self, rows: np.ndarray) -> "Run":
        """The clips at ``rows`` (positions or a mask)."""
        return Run(*self[:3], *(column[rows] for column in self[3:]))


def fold_column(protocol: str) -> str:
    """Name of the index column with a protocol's folds; a negative fold means that the clip is
    never held out."""
    return protocol if protocol.startswith("upstream_") else f"fold_{protocol}"


def protocols(index: pd.DataFrame) -> list[str]:
    """The protocols of an index, from its fold columns."""
    return [
        name.removeprefix("fold_")
        for name in index.columns
        if name.startswith(("fold_", "upstream_"))
    ]


def load_index(path: str | Path | None = None) -> pd.DataFrame:
    """Read an index of clips; without ``path`` PercePiano's, which the package includes (folds, no
    ratings).

    Raises:
        InputError: missing file or column, an empty or repeated value, a fold that is not an
            integer, or a segment in two content groups.
    """
    default = resources.files("percepiano_ast") / "data" / "percepiano_index.csv"
    index = read_csv(default if path is None else Path(path), "index")
    name = "percepiano_index.csv" if path is None else str(path)
    folds = [fold_column(protocol) for protocol in protocols(index)]
    required = ["clip", "segment", "content_group", "human"]
    missing = [column for column in required if column not in index.columns]
    if missing or not folds:
        raise InputError(
            f"index {name} lacks the columns {missing or ['fold_<protocol>']}; "
            "it needs clip, segment, content_group, human and a fold_* column per protocol."
        )
    empty = index[required + folds].isna().any(axis=1)
    if empty.any():
        raise InputError(
            f"index {name}, line {empty.idxmax() + 2}: a value is empty; fill every column."
        )
    index["clip"] = index["clip"].str.strip()
    if (repeated := index["clip"].duplicated()).any():
        raise InputError(
            f"index {name} lists clip {index['clip'][repeated].iloc[0]!r} twice; keep one line per"
            " clip."
        )
    if not index["human"].isin(["True", "False"]).all():
        wrong = index["human"][~index["human"].isin(["True", "False"])].iloc[0]
        raise InputError(f"index {name}: human is {wrong!r}; write True or False.")
    index["human"] = index["human"] == "True"
    for column in folds:
        index[column] = _whole(index[column], f"index {name}", column)
    groups = index.groupby("segment")["content_group"].nunique()
    if (groups > 1).any():
        raise InputError(
            f"index {name}: segment {groups.idxmax()!r} is in {groups.max()} content groups; put"
            " all its clips into one."
        )
    return index


def check_protocol(index: pd.DataFrame, protocol: str) -> pd.DataFrame:
    """The clips of the index that a protocol holds out.

    Raises:
        InputError: unknown protocol, fewer than two folds, or a content group in two folds of a
            protocol with unseen music (``UNHEARD``).
    """
    column = fold_column(protocol)
    if column not in index.columns:
        raise InputError(
            f"the index has no protocol {protocol!r}; choose one of {', '.join(protocols(index))}, "
            "or give the index of these predictions with --index."
        )
    held_out = index[index[column] >= 0]
    if held_out[column].nunique() < 2:
        raise InputError(
            f"protocol {protocol!r} has {held_out[column].nunique() or 'no'} fold in the index,"
            " which leaves no training data. Assign the clips to at least two folds."
        )
    crossing = held_out.groupby("content_group")[column].unique()
    crossing = crossing[crossing.str.len() > 1]
    if protocol in UNHEARD and len(crossing):
        folds = " and ".join(map(str, sorted(crossing.iloc[0])[:2]))
        raise InputError(
            f"content group {crossing.index[0]!r} is in folds {folds} of protocol {protocol!r}: its"
            " music would leak from training into evaluation. Put the group into one fold."
        )
    return held_out


def read_predictions(path: str | Path) -> pd.DataFrame:
    """Read ``predictions*.csv`` or ``.csv.gz`` and check columns and values (for coverage see
    ``validate_predictions``).

    Raises:
        InputError: missing file, invalid CSV or invalid value; names the line.
    """
    return _typed(read_csv(Path(path), "predictions"), lambda row: f"{path}, line {row + 2}")


def validate_predictions(
    table: pd.DataFrame, index: pd.DataFrame | None = None, *, partial: bool = False
) -> pd.DataFrame:
    """Check a predictions table against an index and return it with clean types.

    Without ``index``, PercePiano's is used and the ratings must be those that PercePiano published.
    Predictions are in the unit of the ratings and may be outside 0 to 1; ratings may not. Without
    ``partial``, each run must cover every clip that its protocol holds out. Folds must always match
    the index.

    Raises:
        InputError: anything that would make a metric wrong; names the value and the next action.
    """
    table = _typed(table.reset_index(drop=True), lambda row: f"row {row}")
    _check_rows(table)
    _check_labels(table)
    facts = load_index() if index is None else index
    for protocol, part in table.groupby("protocol"):
        _check_folds(protocol, part, facts, partial)
    if index is None:
        published.check_ratings(table)
    return table


def runs(predictions: pd.DataFrame, index: pd.DataFrame) -> list[Run]:
    """Split a predictions table into runs, sorted by model, protocol and seed, with clips in the
    order of the index.

    Raises:
        InputError: see ``validate_predictions``; runs may be partial.
    """
    table = validate_predictions(predictions, index, partial=True)
    if "uncertainty" not in table.columns:
        table["uncertainty"] = np.nan
    facts = index.set_index("clip")
    result = []
    for (model, protocol, seed), part in table.groupby(RUN):
        wide = part.pivot(
            index="clip", columns="dimension", values=["rating", "prediction", "uncertainty"]
        )
        wide = wide.reindex(facts.index[facts.index.isin(wide.index)])
        names = ("segment", "content_group", "human", fold_column(protocol))
        columns = (facts.loc[wide.index, name].to_numpy() for name in names)
        values = (
            wide[name][list(KEYS)].to_numpy(float)
            for name in ("rating", "prediction", "uncertainty")
        )
        result.append(Run(model, protocol, int(seed), wide.index.to_numpy(), *columns, *values))
    return result


def in_scope(run: Run, scope: str) -> Run:
    """The clips of ``run`` in ``scope``.

    Within segment, ratings and predictions are both centred on the mean of their segment; segments
    of fewer than ``FEWEST_IN_SEGMENT`` clips are excluded.
    """
    if "humans" in scope:
        run = run.take(run.human.astype(bool))
    if not scope.startswith("within_segment"):
        return run
    _, codes, sizes = np.unique(run.segment, return_inverse=True, return_counts=True)
    kept = sizes[codes] >= FEWEST_IN_SEGMENT
    run, codes = run.take(kept), codes[kept]
    return run._replace(
        rating=_centred(run.rating, codes), prediction=_centred(run.prediction, codes)
    )


def read_csv(path, what: str) -> pd.DataFrame:
    """Read a CSV as text cells, so that messages can quote a bad value as written in the file.

    Raises:
        InputError: missing file or invalid CSV.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # a line that is too long
            return pd.read_csv(io.BytesIO(content_of(path)), dtype=str, index_col=False)
    except FileNotFoundError:
        raise InputError(
            f"no {what} file {path}; check the path or run the command that writes it."
        ) from None
    # pandas' own errors are ValueErrors
    except (ValueError, EOFError, OSError, pd.errors.ParserWarning) as error:
        raise InputError(f"{path} is not a readable CSV file ({error}); write it again.") from None


def describe(run) -> str:
    """Text for a run (model, protocol, seed) or a clip of a run."""
    model, protocol, seed, *clip = run
    return f"{model}, protocol {protocol}, seed {seed}" + (f", clip {clip[0]!r}" if clip else "")


def _whole(column: pd.Series, where: str, name: str) -> pd.Series:
    """A column as integers."""
    numbers = pd.to_numeric(column, errors="coerce")
    wrong = ~(numbers % 1 == 0)
    if wrong.any():
        raise InputError(f"{where}: {name} is {column[wrong].iloc[0]!r}; write whole numbers.")
    return numbers.astype(int)


def _typed(table: pd.DataFrame, where) -> pd.DataFrame:
    """Check columns, types and ranges of a predictions table; ``where(row)`` names a row in
    messages."""
    if missing := [column for column in COLUMNS if column not in table.columns]:
        raise InputError(f"predictions lack the columns {missing}; give {', '.join(COLUMNS)}.")
    if table.empty:
        raise InputError("the predictions table has no rows; run the fine-tuning that writes it.")
    table = table.copy()
    for name in ("model", "protocol", "clip", "dimension"):
        _refuse(table[name].isna(), table[name], where, "write a name")
        table[name] = table[name].astype(str).str.strip()
    known = (
        f"choose one of: {', '.join(KEYS)}. For custom ratings use `finetune --ratings`, which"
        " trains and evaluates"
    )
    _refuse(~table["dimension"].isin(KEYS), table["dimension"], where, known)
    for name in ("seed", "fold", "rating", "prediction", "uncertainty"):
        if name not in table.columns:
            continue
        numbers = pd.to_numeric(table[name], errors="coerce")
        wrong = ~np.isfinite(numbers)
        if name == "uncertainty":  # optional per run, see _check_rows
            wrong &= table[name].notna()
        _refuse(wrong, table[name], where, "write a finite number")
        if name in ("seed", "fold"):
            _refuse(
                (numbers % 1 != 0) | (numbers < 0),
                table[name],
                where,
                "write a whole number from 0",
            )
            numbers = numbers.astype(int)
        elif name == "rating":
            _refuse(
                (numbers < 0) | (numbers > 1),
                table[name],
                where,
                "ratings are 0 to 1: divide raw ratings by 7",
            )
        elif name == "uncertainty":
            _refuse(numbers < 0, table[name], where, "write a standard deviation, 0 or more")
        table[name] = numbers
    return table


def _refuse(wrong: pd.Series, values: pd.Series, where, action: str):
    """Raise for the first wrong row."""
    if wrong.any():
        row = wrong.idxmax()
        shown = repr(values[row]) if isinstance(values[row], str) else values[row]
        raise InputError(f"{where(row)}: {values.name} is {shown}; {action}.")


def _check_rows(table: pd.DataFrame):
    """Each run must have each clip once, in one fold, with all dimensions, and uncertainties in all
    rows or none."""
    folds = table.groupby([*RUN, "clip"])["fold"].nunique()
    if (folds > 1).any():
        raise InputError(
            f"{describe(folds.idxmax())} has predictions in {folds.max()} folds; "
            "keep only the fold that was held out from training."
        )
    repeated = table.duplicated([*RUN, "clip", "dimension"])
    if repeated.any():
        row = table[repeated].iloc[0]
        raise InputError(
            f"{describe(row[[*RUN, 'clip']])}: {row['dimension']} is predicted twice, probably"
            " because two files contain the same run. Give it once, or change the model name or"
            " seed."
        )
    counts = table.groupby([*RUN, "clip"])["dimension"].count()
    if (counts < len(KEYS)).any():
        clip = counts.idxmin()
        rows = (table[[*RUN, "clip"]] == list(clip)).all(axis=1)
        lacking = sorted(set(KEYS) - set(table["dimension"][rows]))
        raise InputError(
            f"{describe(clip)} lacks {len(lacking)} of {len(KEYS)} dimensions, first"
            f" {lacking[0]!r}; give all dimensions."
        )
    if "uncertainty" in table.columns:
        given = table["uncertainty"].notna().groupby([table[name] for name in RUN]).mean()
        if (some := (given > 0) & (given < 1)).any():
            raise InputError(
                f"{describe(some.idxmax())} has an uncertainty in some rows only; give it in all"
                " rows of a run or in none."
            )


def _check_labels(table: pd.DataFrame):
    """All runs must have the same labels."""
    same = table.groupby(["clip", "dimension"])["rating"]
    spread = same.max() - same.min()
    if (spread > _SAME_RATING).any():
        clip, dimension = spread.idxmax()
        raise InputError(
            f"clip {clip!r} has ratings of {dimension} that differ by {spread.max():.3f} between"
            " runs; evaluate only runs with the same labels together."
        )


def _check_folds(protocol: str, part: pd.DataFrame, index: pd.DataFrame, partial: bool):
    """Clips must be in the index, in the fold of the index, and (unless ``partial``) complete."""
    held_out = set(check_protocol(index, protocol)["clip"])
    expected = index.set_index("clip")[fold_column(protocol)]
    unknown = part["clip"][~part["clip"].isin(expected.index)]
    if len(unknown):
        raise InputError(
            f"clip {unknown.iloc[0]!r} is not in the index; give the matching index with --index."
        )
    wrong = part[part["fold"] != part["clip"].map(expected)]
    if len(wrong):
        row = wrong.iloc[0]
        raise InputError(
            f"{describe(row[[*RUN, 'clip']])} is in fold {row['fold']}, but in fold"
            f" {expected[row['clip']]} of the index; use the folds of the index."
        )
    for run, clips in part.groupby(RUN)["clip"]:
        lacking = sorted(held_out - set(clips))
        if lacking and not partial:
            raise InputError(
                f"{describe(run)} covers {len(held_out) - len(lacking)} of {len(held_out)} held-out"
                f" clips; first missing: {lacking[0]!r}. Finish its folds, or evaluate with"
                " --partial."
            )


def _centred(values: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return values - pd.DataFrame(values).groupby(codes).transform("mean").to_numpy()
