"""Inter-rater agreement and the resulting upper bound for predictions: ICC, split-half reliability,
noise ceiling."""

from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from percepiano_ast.dimensions import KEYS
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation.predictions import MIN_IN_SEGMENT, SCOPES, load_index
from percepiano_ast.tables import MISSING, numbers, read_csv

RATERS = "labels/total_2rounds.csv"
N_SPLITS = 500

_HIGHEST = 7.1  # as in PercePiano's own cleaning


def read_raters(path: str | Path) -> pd.DataFrame:
    """Valid ratings of PercePiano's ``RATERS`` (or of the folder with it): ``rater``, ``clip`` and
    the 19 dimensions, 1 to 7, NaN where missing.

    A 0 is a missing value; blank rows and rows with a value above 7 are discarded. After this, the
    means over raters divided by 7 equal the published labels exactly.

    Raises:
        InputError: missing file or columns, a value that is not a number, or no valid row.
    """
    path = Path(path) / RATERS if Path(path).is_dir() else Path(path)
    table = read_csv(path, "rater", ["user", "filename"])
    questions = [name for name in table.columns if name.startswith("Question_")][: len(KEYS)]
    if len(questions) < len(KEYS) or not {"user", "filename"} <= set(table.columns):
        raise InputError(
            f"{path} lacks user, filename or some of the {len(KEYS)} Question_ columns; give"
            f" PercePiano's {RATERS}."
        )
    values, given = numbers(table, questions), table[questions]
    wrong = ~np.isfinite(values) & given.notna() & ~given.isin(MISSING) | (values < 0)
    if wrong.any(axis=None):
        row, column = np.argwhere(wrong)[0]
        name, value = questions[column], given.iloc[row, column]
        raise InputError(
            f"{path}, line {table.index[row]}: {name} is {value!r:.60}; write 1 to 7, or 0 for a"
            " missing value."
        )
    valid = ~(values > _HIGHEST).any(axis=1) & values.notna().any(axis=1)
    if not valid.any():
        raise InputError(f"{path} has no valid rating; give PercePiano's {RATERS}.")
    for name in ("user", "filename"):
        if (empty := table[name].isna() & valid).any():
            raise InputError(f"{path}, line {empty.idxmax()}: {name} is empty; write a name.")
    clips = table["filename"].str.removesuffix(".wav").str.strip()
    names = pd.DataFrame({"rater": table["user"], "clip": clips})
    ratings = names.join(values.where(values > 0).set_axis(list(KEYS), axis=1))
    return ratings[valid].reset_index(drop=True)


def mean_ratings(raters: pd.DataFrame) -> pd.DataFrame:
    """The labels: mean rating of each clip divided by 7, (clips, 19)."""
    return raters.groupby("clip")[list(KEYS)].mean() / 7


def icc(values: np.ndarray, clips: np.ndarray, raters: np.ndarray) -> dict[str, float]:
    """Intraclass correlations of one dimension (Shrout & Fleiss 1979) of a single rating (``icc1``,
    ``icc2``, ``icc3``) and of the mean of ``k`` ratings, the harmonic mean per clip (``icc1k``...).

    Case 1: each clip has different raters; 2: raters are a random sample; 3: fixed raters. For
    unbalanced data, the variance components are estimated by one-way analysis of variance (case 1)
    or by reductions in sums of squares of the crossed random model without interaction (Henderson
    1953, method 3; Searle, Casella & McCulloch 1992, ch. 5.5). They may be negative.

    Args:
        values: (ratings,), NaN where missing.
        clips, raters: (ratings,) labels; a rater may rate a clip more than once.

    Raises:
        InputError: fewer than two clips or raters, or no clip with two ratings.
    """
    given = np.isfinite(values)
    values = values[given]
    clip, rater = (np.unique(labels[given], return_inverse=True)[1] for labels in (clips, raters))
    counts = sparse.coo_array((np.ones(len(values)), (clip, rater))).toarray()
    if min(counts.shape) < 2 or counts.sum(axis=1).max() < 2:
        raise InputError(
            f"{counts.shape[0]} clips and {counts.shape[1]} raters; reliability needs two of each"
            " and clips with two ratings."
        )
    values = values - values.mean()
    n, per_clip, per_rater = len(values), counts.sum(axis=1), counts.sum(axis=0)
    k = len(counts) / (1 / per_clip).sum()
    clip_sums, rater_sums = np.bincount(clip, values), np.bincount(rater, values)
    total, by_clip = (values**2).sum(), (clip_sums**2 / per_clip).sum()
    by_rater = (rater_sums**2 / per_rater).sum()

    # One-way: variance between and within clips.
    noise = (total - by_clip) / (n - len(counts))
    typical = (n - (per_clip**2).sum() / n) / (len(counts) - 1)
    signal = (by_clip / (len(counts) - 1) - noise) / typical

    # Two-way: eliminating the clips from the normal equations leaves one equation per rater.
    left = np.diag(per_rater) - counts.T @ (counts / per_clip[:, None])
    right = rater_sums - counts.T @ (clip_sums / per_clip)
    solution, _, rank, _ = np.linalg.lstsq(left, right, rcond=1e-10)
    both = by_clip + right @ solution
    rest = (total - both) / (n - len(counts) - rank)
    of_clips = both - by_rater - rest * (len(counts) + rank - len(per_rater))
    of_clips /= n - (counts**2 / per_rater).sum()
    of_raters = (both - by_clip - rest * rank) / (n - (counts**2 / per_clip[:, None]).sum())
    return {
        "icc1": signal / (signal + noise),
        "icc2": of_clips / (of_clips + of_raters + rest),
        "icc3": of_clips / (of_clips + rest),
        "icc1k": signal / (signal + noise / k),
        "icc2k": of_clips / (of_clips + (of_raters + rest) / k),
        "icc3k": of_clips / (of_clips + rest / k),
        "k": k,
    }


def split_half(
    raters: pd.DataFrame, index: pd.DataFrame, n_splits: int = N_SPLITS, seed: int = 0
) -> pd.DataFrame:
    """Split-half reliability of the mean rating, Spearman-Brown corrected, (19 dimensions,
    ``SCOPES``); below 0: no reliable signal.

    In each split the raters of every clip are assigned at random to two halves. The halves' means
    are correlated over the clips of the scope, and the mean r over splits becomes 2 r / (1 + r).

    Raises:
        InputError: fewer than one split, or no rated clip in the index.
    """
    if n_splits < 1:
        raise InputError(f"{n_splits} splits are too few; give at least 1.")
    facts = index.set_index("clip")
    ratings = raters[raters["clip"].isin(facts.index)]
    if ratings.empty:
        clip = raters["clip"].iloc[0]
        raise InputError(f"no rated clip is in the index, such as {clip!r}; give the matching one.")
    clips, clip = np.unique(ratings["clip"], return_inverse=True)
    names = np.stack([clip, pd.factorize(ratings["rater"])[0]])
    pair, pair_of = np.unique(names, axis=1, return_inverse=True)
    half_of = (np.arange(len(pair[0])) - np.searchsorted(pair[0], pair[0])) % 2

    # The clips of each scope, and the membership of clips in segments for centring.
    facts, scopes = facts.loc[clips], {}
    _, segment = np.unique(facts["segment"], return_inverse=True)
    for scope in SCOPES:
        chosen, members = np.ones(len(clips), bool), None
        if "humans" in scope:
            chosen = facts["human"].to_numpy(bool)
        if scope.startswith("within_segment"):
            chosen = chosen & (np.bincount(segment, chosen)[segment] >= MIN_IN_SEGMENT)
            members = _adder(segment[chosen])
        scopes[scope] = chosen, members

    values = ratings[list(KEYS)].to_numpy()
    given = np.isfinite(values)
    table = np.concatenate([np.where(given, values, 0), given], axis=1)
    adder = _adder(clip)
    total, rng = adder @ table, np.random.default_rng(seed)
    sums: dict[str, np.ndarray | float] = dict.fromkeys(SCOPES, 0.0)
    for _ in range(n_splits):
        half = np.empty(len(half_of))  # the pairs of each clip in random order, every other one
        half[np.lexsort((rng.random(len(half)), pair[0]))] = half_of
        one = adder @ (table * half[pair_of.ravel()][:, None])
        first, second = (
            part[:, : len(KEYS)] / np.where(part[:, len(KEYS) :] > 0, part[:, len(KEYS) :], np.nan)
            for part in (one, total - one)
        )
        for scope, (chosen, members) in scopes.items():
            sums[scope] = sums[scope] + _correlation(first[chosen], second[chosen], members)
    r = pd.DataFrame(sums, index=pd.Index(KEYS, name="dimension")) / n_splits
    return 2 * r / (1 + r)


def _adder(codes: np.ndarray) -> sparse.csr_array:
    """Matrix that sums rows with the same code: (codes, rows)."""
    shape = (codes.max(initial=-1) + 1, len(codes))
    return sparse.csr_array((np.ones(len(codes)), (codes, np.arange(len(codes)))), shape=shape)


def _correlation(x: np.ndarray, y: np.ndarray, members: sparse.csr_array | None) -> np.ndarray:
    """Pearson's r per dimension of (clips, 19) over the clips with both halves, centred on the
    means of the segments with ``members``."""
    both = np.isfinite(x) & np.isfinite(y)
    centred = []
    for values in (np.where(both, x, 0), np.where(both, y, 0)):
        if members is None:
            means = values.sum(axis=0) / both.sum(axis=0)
        else:
            counts = np.maximum(members @ both.astype(float), 1)
            means = members.T @ ((members @ values) / counts)
        centred.append(np.where(both, values - means, 0))
    x, y = centred
    with np.errstate(invalid="ignore", divide="ignore"):
        return (x * y).sum(axis=0) / np.sqrt((x * x).sum(axis=0) * (y * y).sum(axis=0))


def noise_ceiling(reliability: pd.DataFrame) -> pd.DataFrame:
    """The highest possible r with the mean rating: square root of the reliability, at least 0."""
    return np.sqrt(reliability.clip(lower=0))


def evaluate(
    raters: pd.DataFrame, index: pd.DataFrame, n_splits: int = N_SPLITS, seed: int = 0
) -> dict[str, pd.DataFrame]:
    """All tables: ``icc``, ``split_half`` and ``ceiling``; raises as `icc` and `split_half`."""
    clips, names = raters["clip"].to_numpy(), raters["rater"].to_numpy()
    correlations = {key: icc(raters[key].to_numpy(), clips, names) for key in KEYS}
    halves = split_half(raters, index, n_splits, seed)
    table = pd.DataFrame.from_dict(correlations, orient="index").rename_axis("dimension")
    return {"icc": table, "split_half": halves, "ceiling": noise_ceiling(halves)}


def load_ceiling(index: pd.DataFrame, path: str | Path | None = None) -> pd.DataFrame | None:
    """The noise ceiling (19 dimensions, scopes) from ``path``; without it PercePiano's if all clips
    are PercePiano's, else None.

    Raises:
        InputError: the file is missing or incomplete, or has a value outside 0 to 1.
    """
    if path is None and not set(index["clip"]) <= set(load_index()["clip"]):
        return None
    bundled = resources.files("percepiano_ast") / "data" / "percepiano_noise_ceiling.csv"
    table = read_csv(source := path or bundled, "noise ceiling", ["dimension"])
    scopes = [scope for scope in SCOPES if scope in table.columns]
    if "dimension" not in table.columns or not scopes or set(KEYS) - set(table["dimension"]):
        raise InputError(
            f"noise ceiling {source} lacks the column dimension, a scope ({', '.join(SCOPES)}) or a"
            " row of the 19 dimensions; create it with `percepiano reliability`."
        )
    if (repeated := table["dimension"].duplicated()).any():
        twice = f"line {repeated.idxmax()}: {table['dimension'][repeated].iloc[0]!r:.60}"
        raise InputError(f"noise ceiling {source}, {twice} has a row already; keep one.")
    table = numbers(table, scopes).set_index(table["dimension"]).loc[list(KEYS)]
    if not ((table >= 0) & (table <= 1)).all(axis=None):
        raise InputError(f"noise ceiling {source}: a value is not from 0 to 1; write correlations.")
    return table
