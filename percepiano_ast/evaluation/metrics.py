"""Metrics of a predictions table, with intervals that respect how the clips belong together.

Conventions:

* A *run* is one (model, protocol, seed). Its held-out folds are pooled, then each metric is taken per dimension; the
  row ``mean`` is the plain mean over the 19 dimensions.
* Scopes: ``overall``; ``humans_only`` (without deadpan score renderings); ``within_segment`` (rating and prediction
  both centred on the mean of their segment, then pooled: is the playing told apart, not the music?);
  ``within_segment_humans``. A clip alone in its segment has nothing to be compared with and is left out of the
  within-segment scopes.
* Intervals: 95 % percentile bootstrap over ``content_group``. Clips that share music are not independent, so whole
  groups are drawn. Every metric is a function of sums, so a resample is a weighted sum of the groups' sums.
* Spearman ranks once, on all clips of the scope, and treats the ranks as values in every resample; re-ranking each
  resample would cost a hundred times more and change nothing that matters.
* A metric that does not exist (r of a constant) is NaN and named by ``undefined``; it is never set to zero.
"""

import io
import logging
import warnings
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from percepiano_ast.config import InputError
from percepiano_ast.dimensions import KEYS
from percepiano_ast.evaluation.reading import content_of

METRICS = ("pearson", "spearman", "r2", "mae", "ccc")
SCOPES = ("overall", "within_segment", "humans_only", "within_segment_humans")
RUN = ["model", "protocol", "seed"]
COLUMNS = [*RUN, "fold", "clip", "dimension", "rating", "prediction"]
LEVEL = 0.95

_CONSTANT = 1e-6  # spread below this share of the values' size is rounding, not variation
_SAME_RATING = 1e-3  # labels written with fewer digits are still the same labels
_logger = logging.getLogger(__name__)


class Run(NamedTuple):
    """One (model, protocol, seed) as arrays: ``rating`` and ``prediction`` are (clips, 19) in the order of ``KEYS``."""

    model: str
    protocol: str
    seed: int
    clip: np.ndarray
    segment: np.ndarray
    content_group: np.ndarray
    human: np.ndarray
    rating: np.ndarray
    prediction: np.ndarray

    def take(self, rows: np.ndarray) -> "Run":
        """The clips at ``rows`` (positions or a mask)."""
        return Run(*self[:3], *(column[rows] for column in self[3:]))


def fold_column(protocol: str) -> str:
    """Name of the index column that holds a protocol's folds; -1 and below: not in its validation folds."""
    return protocol if protocol.startswith("upstream_") else f"fold_{protocol}"


def load_index(path: str | Path | None = None) -> pd.DataFrame:
    """Read an index of clips; without ``path`` PercePiano's, which the package ships (folds, no ratings).

    Raises:
        InputError: missing file or column, an empty or repeated value, a fold that is no integer, or a segment that
            lies in two content groups.
    """
    default = resources.files("percepiano_ast") / "data" / "percepiano_index.csv"
    index = _read_csv(default if path is None else Path(path), "index")
    name = "percepiano_index.csv" if path is None else str(path)
    folds = [column for column in index.columns if column.startswith(("fold_", "upstream_"))]
    required = ["clip", "segment", "content_group", "human"]
    missing = [column for column in required if column not in index.columns]
    if missing or not folds:
        raise InputError(f"index {name} lacks the columns {missing or ['fold_<protocol>']}; "
                         "it needs clip, segment, content_group, human and a fold_* column per protocol.")
    empty = index[required + folds].isna().any(axis=1)
    if empty.any():
        raise InputError(f"index {name}, line {empty.idxmax() + 2}: an empty value; fill every column.")
    index["clip"] = index["clip"].str.strip()
    if (repeated := index["clip"].duplicated()).any():
        raise InputError(f"index {name} lists clip {index['clip'][repeated].iloc[0]!r} twice; keep one line of each.")
    if not index["human"].isin(["True", "False"]).all():
        wrong = index["human"][~index["human"].isin(["True", "False"])].iloc[0]
        raise InputError(f"index {name}: human is {wrong!r}; write True or False.")
    index["human"] = index["human"] == "True"
    for column in folds:
        index[column] = _whole(index[column], f"index {name}", column)
    groups = index.groupby("segment")["content_group"].nunique()
    if (groups > 1).any():
        raise InputError(f"index {name}: segment {groups.idxmax()!r} lies in {groups.max()} content groups; "
                         "put all clips of a segment into one.")
    return index


def read_predictions(path: str | Path) -> pd.DataFrame:
    """Read ``predictions*.csv`` or ``.csv.gz`` and check columns and values (not coverage: ``validate_predictions``).

    Raises:
        InputError: no such file, no CSV, or a value that cannot be; names the line.
    """
    return _typed(_read_csv(Path(path), "predictions"), lambda row: f"{path}, line {row + 2}")


def validate_predictions(
    table: pd.DataFrame, index: pd.DataFrame | None = None, *, partial: bool = False
) -> pd.DataFrame:
    """Check a predictions table against an index (PercePiano's by default) and return it with clean types.

    Predictions are in the unit of the ratings and may leave 0..1; ratings may not. Without ``partial``, each run must
    cover every clip that its protocol holds out; folds must be the index's in either case.

    Raises:
        InputError: anything that would make a metric wrong; names the value and the next action.
    """
    index = load_index() if index is None else index
    table = _typed(table.reset_index(drop=True), lambda row: f"row {row}")
    folds = table.groupby([*RUN, "clip"])["fold"].nunique()
    if (folds > 1).any():
        raise InputError(f"{_name(folds.idxmax())} has predictions in {folds.max()} folds; "
                         "a clip is held out once: keep the fold in which it was not trained on.")
    repeated = table.duplicated([*RUN, "clip", "dimension"])
    if repeated.any():
        row = table[repeated].iloc[0]
        raise InputError(f"{_name(row[[*RUN, 'clip']])}: {row['dimension']} is predicted twice; "
                         "is the same run in two files? Give it once, or another model name or seed.")
    counts = table.groupby([*RUN, "clip"])["dimension"].count()
    if (counts < len(KEYS)).any():
        clip = counts.idxmin()
        rows = (table[[*RUN, "clip"]] == list(clip)).all(axis=1)
        lacking = sorted(set(KEYS) - set(table["dimension"][rows]))
        raise InputError(f"{_name(clip)} lacks {len(lacking)} of {len(KEYS)} dimensions, first {lacking[0]!r}; "
                         "write all of them.")
    same = table.groupby(["clip", "dimension"])["rating"]
    spread = same.max() - same.min()
    if (spread > _SAME_RATING).any():
        clip, dimension = spread.idxmax()
        raise InputError(f"clip {clip!r} has ratings of {dimension} that differ by {spread.max():.3f} between runs; "
                         "evaluate only runs on the same labels together.")
    for protocol, part in table.groupby("protocol"):
        _check_folds(protocol, part, index, partial)
    return table


def runs(predictions: pd.DataFrame, index: pd.DataFrame) -> list[Run]:
    """Split a predictions table into runs, sorted by model, protocol and seed, clips in the order of the index.

    Raises:
        InputError: see ``validate_predictions``; coverage is not asked for.
    """
    table = validate_predictions(predictions, index, partial=True)
    facts = index.set_index("clip")
    result = []
    for (model, protocol, seed), part in table.groupby(RUN):
        wide = part.pivot(index="clip", columns="dimension", values=["rating", "prediction"])
        wide = wide.reindex(facts.index[facts.index.isin(wide.index)])
        columns = (facts.loc[wide.index, name].to_numpy() for name in ("segment", "content_group", "human"))
        values = (wide[name][list(KEYS)].to_numpy(float) for name in ("rating", "prediction"))
        result.append(Run(model, protocol, int(seed), wide.index.to_numpy(), *columns, *values))
    return result


def in_scope(run: Run, scope: str) -> Run:
    """The clips of ``run`` that belong to ``scope``; within segment, both tables are centred on the segment's mean."""
    if "humans" in scope:
        run = run.take(run.human.astype(bool))
    if not scope.startswith("within_segment"):
        return run
    _, codes, sizes = np.unique(run.segment, return_inverse=True, return_counts=True)
    run, codes = run.take(sizes[codes] > 1), codes[sizes[codes] > 1]
    return run._replace(rating=_centred(run.rating, codes), prediction=_centred(run.prediction, codes))


def resample(groups: np.ndarray, n_bootstrap: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw content groups with replacement.

    Returns:
        names (groups,) and weights (1 + n_bootstrap, groups): how often each group is drawn; row 0 is the data itself.
    """
    names = np.unique(groups)
    if not len(names):
        return names, np.ones((1 + n_bootstrap, 0))
    draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), n_bootstrap)
    return names, np.vstack([np.ones(len(names)), draws])


def scores(run: Run, scope: str, names: np.ndarray, weights: np.ndarray, metrics=METRICS) -> dict[str, np.ndarray]:
    """Every metric in every resample: metric -> (resamples, 19 + 1); the last column is the mean over dimensions."""
    size = np.abs(run.prediction).max(axis=0, initial=0.0)
    part = in_scope(run, scope)
    members = (names[:, None] == part.content_group[None, :]).astype(float)
    constant = np.ptp(part.prediction, axis=0) <= _CONSTANT * size if len(part.clip) else np.ones(len(KEYS), bool)
    prediction = np.where(constant, part.prediction[:1], part.prediction)  # rounding must not pass for variation
    sums = _sums(part.rating, prediction, members, weights)
    result = {}
    for metric in metrics:
        if metric == "spearman":
            values = _pearson(_sums(_ranks(part.rating), _ranks(prediction), members, weights))
        else:
            values = _FROM_SUMS[metric](sums)
        result[metric] = np.column_stack([values, values.mean(axis=1)])
    return result


def interval(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Percentile interval of each column of ``samples`` (resamples, columns).

    Resamples without a value are left out; where they are more than 5 %, the interval is NaN.
    """
    bounds = np.full((2, samples.shape[1]), np.nan)
    for column, values in enumerate(samples.T):
        kept = values[np.isfinite(values)]
        if len(kept) and len(kept) >= 0.95 * len(values):
            bounds[:, column] = np.quantile(kept, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return bounds[0], bounds[1]


def evaluate(
    predictions: pd.DataFrame, index: pd.DataFrame, *, n_bootstrap: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Every metric of every run, tidy: ``model,protocol,seed,scope,metric,dimension,value,low,high``.

    ``dimension`` is also ``mean``. Seeds are reported one by one. With a single content group there is no
    interval: ``low`` and ``high`` are NaN.

    Raises:
        InputError: see ``validate_predictions``; coverage is not asked for here.
    """
    tables = []
    for run in runs(predictions, index):
        names, weights = resample(run.content_group, n_bootstrap, seed)
        for scope in SCOPES:
            for metric, values in scores(run, scope, names, weights).items():
                low, high = interval(values[1:] if len(names) > 1 else values[:0])
                tables.append(pd.DataFrame({
                    "model": run.model, "protocol": run.protocol, "seed": run.seed, "scope": scope, "metric": metric,
                    "dimension": [*KEYS, "mean"], "value": values[0], "low": low, "high": high,
                }))  # fmt: skip
    table = pd.concat(tables, ignore_index=True)
    for line in undefined(table):
        _logger.warning(line)
    return table


def undefined(metrics: pd.DataFrame) -> list[str]:
    """One sentence for each run, scope and metric that has no value in some dimension."""
    missing = metrics[metrics["value"].isna() & (metrics["dimension"] != "mean")]
    lines = []
    for (model, protocol, seed, scope, metric), part in missing.groupby([*RUN, "scope", "metric"]):
        which = "all dimensions" if len(part) == len(KEYS) else ", ".join(part["dimension"])
        lines.append(f"{model}, {protocol}, seed {seed}: {metric} ({scope}) is undefined for {which}: "
                     "predictions or ratings are constant, or no clips are in this scope.")
    return lines


def _read_csv(path, what: str) -> pd.DataFrame:
    """Read a CSV as text cells, so that a bad value can be named as it stands in the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # a line that is too long
            return pd.read_csv(io.BytesIO(content_of(path)), dtype=str, index_col=False)
    except FileNotFoundError:
        raise InputError(f"no {what} file {path}; check the path, or run the command that writes it.") from None
    except (ValueError, EOFError, OSError, pd.errors.ParserWarning) as error:  # pandas' own errors are ValueErrors
        raise InputError(f"{path} is no readable CSV ({error}); write it again.") from None


def _whole(column: pd.Series, where: str, name: str) -> pd.Series:
    """A column as integers."""
    numbers = pd.to_numeric(column, errors="coerce")
    wrong = ~(numbers % 1 == 0)
    if wrong.any():
        raise InputError(f"{where}: {name} is {column[wrong].iloc[0]!r}; write whole numbers.")
    return numbers.astype(int)


def _typed(table: pd.DataFrame, where) -> pd.DataFrame:
    """Check columns, types and ranges of a predictions table; ``where(row)`` names a row in messages."""
    if missing := [column for column in COLUMNS if column not in table.columns]:
        raise InputError(f"predictions lack the columns {missing}; they need {', '.join(COLUMNS)}.")
    if table.empty:
        raise InputError("the predictions table has no rows; run the fine-tuning that writes it.")
    table = table.copy()
    for name in ("model", "protocol", "clip", "dimension"):
        _refuse(table[name].isna(), table[name], where, "write a name")
        table[name] = table[name].astype(str).str.strip()
    _refuse(~table["dimension"].isin(KEYS), table["dimension"], where, f"choose one of: {', '.join(KEYS)}")
    for name in ("seed", "fold", "rating", "prediction", "uncertainty"):
        if name not in table.columns:
            continue
        numbers = pd.to_numeric(table[name], errors="coerce")
        _refuse(~np.isfinite(numbers), table[name], where, "write a finite number")
        if name in ("seed", "fold"):
            _refuse((numbers % 1 != 0) | (numbers < 0), table[name], where, "write a whole number from 0")
            numbers = numbers.astype(int)
        elif name == "rating":
            _refuse((numbers < 0) | (numbers > 1), table[name], where, "ratings are 0 to 1: divide raw ones by 7")
        elif name == "uncertainty":
            _refuse(numbers < 0, table[name], where, "a standard deviation is not negative")
        table[name] = numbers
    return table


def _refuse(wrong: pd.Series, values: pd.Series, where, action: str):
    """Raise for the first row that is wrong."""
    if wrong.any():
        row = wrong.idxmax()
        shown = repr(values[row]) if isinstance(values[row], str) else values[row]
        raise InputError(f"{where(row)}: {values.name} is {shown}; {action}.")


def _check_folds(protocol: str, part: pd.DataFrame, index: pd.DataFrame, partial: bool):
    """Clips must be in the index, in the fold that the index gives them, and (unless ``partial``) all there."""
    column = fold_column(protocol)
    if column not in index.columns:
        known = [name.removeprefix("fold_") for name in index.columns if name.startswith(("fold_", "upstream_"))]
        raise InputError(f"the index has no protocol {protocol!r}; choose one of {', '.join(known)}, "
                         "or give the index these predictions were made with.")
    expected = index.set_index("clip")[column]
    unknown = part["clip"][~part["clip"].isin(expected.index)]
    if len(unknown):
        raise InputError(f"clip {unknown.iloc[0]!r} is not in the index; give the index it belongs to.")
    wrong = part[part["fold"] != part["clip"].map(expected)]
    if len(wrong):
        row = wrong.iloc[0]
        raise InputError(f"{_name(row[[*RUN, 'clip']])} is in fold {row['fold']}, but the index says "
                         f"{expected[row['clip']]}; predict each clip in the index's folds.")
    held_out = set(expected.index[expected >= 0])
    for run, clips in part.groupby(RUN)["clip"]:
        lacking = sorted(held_out - set(clips))
        if lacking and not partial:
            raise InputError(f"{_name(run)} covers {len(held_out) - len(lacking)} of {len(held_out)} held-out clips; "
                             f"first missing: {lacking[0]!r}. Finish its folds, or evaluate as partial.")


def _name(run) -> str:
    """A run, or a clip of a run, in words."""
    model, protocol, seed, *clip = run
    return f"{model}, protocol {protocol}, seed {seed}" + (f", clip {clip[0]!r}" if clip else "")


def _centred(values: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return values - pd.DataFrame(values).groupby(codes).transform("mean").to_numpy()


def _ranks(values: np.ndarray) -> np.ndarray:
    """Average ranks of each column. Ties of centred values are split by rounding errors, so those are rounded away."""
    return pd.DataFrame(np.round(values, 9)).rank().to_numpy()


def _sums(x: np.ndarray, y: np.ndarray, members: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Sums over the clips of each resample, (resamples, 19) each: all that the metrics need.

    x and y are shifted to zero mean first: variances from sums lose digits otherwise.
    """
    if not len(x):
        x = y = np.full((1, len(KEYS)), np.nan)
        members = np.ones((len(members), 1))
    shift = y.mean(axis=0) - x.mean(axis=0)
    error, x, y = y - x, x - x.mean(axis=0), y - y.mean(axis=0)
    features = {"n": np.ones_like(x), "x": x, "y": y, "xx": x * x, "yy": y * y, "xy": x * y,
                "squared": error**2, "absolute": np.abs(error)}  # fmt: skip
    sums = {name: weights @ (members @ values) for name, values in features.items()}
    n = np.where(sums["n"] > 0, sums["n"], np.nan)
    variance = {v: sums[v * 2] / n - (sums[v] / n) ** 2 for v in "xy"}
    enough = {v: variance[v] > 1e-12 * sums[v * 2] / n for v in "xy"}
    return {
        "x": np.where(enough["x"], variance["x"], np.nan),
        "y": np.where(enough["y"], variance["y"], np.nan),
        "xy": sums["xy"] / n - sums["x"] * sums["y"] / n**2,
        "bias": (sums["y"] - sums["x"]) / n + shift,
        "squared": sums["squared"] / n,
        "absolute": sums["absolute"] / n,
    }


def _pearson(sums: dict) -> np.ndarray:
    return sums["xy"] / np.sqrt(sums["x"] * sums["y"])


def _ccc(sums: dict) -> np.ndarray:
    """Lin (1989): 2 cov / (var + var + bias^2), population moments; 0, not undefined, for a constant prediction."""
    return 2 * sums["xy"] / (sums["x"] + np.nan_to_num(sums["y"]) + sums["bias"] ** 2)


_FROM_SUMS = {
    "pearson": _pearson,
    "r2": lambda sums: 1 - sums["squared"] / sums["x"],
    "mae": lambda sums: sums["absolute"],
    "ccc": _ccc,
}
