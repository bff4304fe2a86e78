"""Inter-rater agreement and the resulting upper bound for predictions: ICC, split-half reliability,
noise ceiling.

The rater table is PercePiano's ``labels/total_2rounds.csv``: one row per rater and clip, values 1
to 7. A 0 is a missing value; blank rows and rows with a value above 7 are discarded. After this
cleaning, the means over raters divided by 7 equal the published labels exactly.
"""

from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from percepiano_ast.dimensions import KEYS
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation.predictions import MIN_IN_SEGMENT, SCOPES, load_index, read_csv

RATERS = "labels/total_2rounds.csv"
N_SPLITS = 500

_HIGHEST = 7.1  # as in PercePiano's own cleaning


def read_raters(path: str | Path) -> pd.DataFrame:
    """All valid ratings: columns ``rater``, ``clip`` and the 19 dimensions, 1 to 7, NaN where
    missing.

    Args:
        path: the rater CSV, or the PercePiano folder that contains it.

    Raises:
        InputError: missing file or columns, a value that is not a number, or no valid row.
    """
    path = Path(path) / RATERS if Path(path).is_dir() else Path(path)
    table = read_csv(path, "rater")
    questions = [name for name in table.columns if name.startswith("Question_")][: len(KEYS)]
    if len(questions) < len(KEYS) or not {"user", "filename"} <= set(table.columns):
        raise InputError(
            f"{path} lacks user, filename or some of the {len(KEYS)} Question_ columns; give"
            f" PercePiano's {RATERS}."
        )
    values = table[questions].apply(pd.to_numeric, errors="coerce")
    wrong = values.isna() & table[questions].notna() | (values < 0)
    if len(places := np.argwhere(wrong.to_numpy())):
        row, column = places[0]
        raise InputError(
            f"{path}, line {row + 2}: {questions[column]} is"
            f" {table[questions].iloc[row, column]!r}; write a number from 1 to 7, or 0 for a"
            " missing value."
        )
    valid = ~(values > _HIGHEST).any(axis=1) & values.notna().any(axis=1)
    if not valid.any():
        raise InputError(f"{path} has no valid rating; give PercePiano's {RATERS}.")
    names = table["filename"].str.strip().str.removesuffix(".wav").str.strip()
    ratings = values.where(values > 0).set_axis(list(KEYS), axis=1)
    ratings.insert(0, "clip", names)
    ratings.insert(0, "rater", table["user"])
    return ratings[valid].reset_index(drop=True)


def mean_ratings(raters: pd.DataFrame) -> pd.DataFrame:
    """The labels: mean rating of each clip divided by 7, (clips, 19)."""
    return raters.groupby("clip")[list(KEYS)].mean() / 7


def icc(values: np.ndarray, clips: np.ndarray, raters: np.ndarray) -> dict[str, float]:
    """Intraclass correlations of one dimension (Shrout & Fleiss 1979): ``icc1, icc2, icc3, icc1k,
    icc2k, icc3k, k``.

    Case 1: each clip has different raters; 2: raters are a random sample; 3: fixed raters. ``icc1``
    to ``icc3`` are for a single rating, those with k for the mean of ``k`` ratings, where ``k`` is
    the harmonic mean of ratings per clip.

    Not every rater rates every clip, so the variance components are estimated for unbalanced data:
    by one-way analysis of variance for case 1, by reductions in sums of squares of the crossed
    random model without interaction for cases 2 and 3 (Henderson 1953, method 3; Searle, Casella &
    McCulloch 1992, ch. 5.5). For complete data both equal Shrout & Fleiss's formulas. Components
    may be negative.

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
    k = len(counts) / (1 / counts.sum(axis=1)).sum()
    signal, noise = _one_way(values, clip, counts)
    of_clips, of_raters, rest = _two_way(values, clip, rater, counts)
    return {
        "icc1": signal / (signal + noise),
        "icc2": of_clips / (of_clips + of_raters + rest),
        "icc3": of_clips / (of_clips + rest),
        "icc1k": signal / (signal + noise / k),
        "icc2k": of_clips / (of_clips + (of_raters + rest) / k),
        "icc3k": of_clips / (of_clips + rest / k),
        "k": k,
    }


def _one_way(values: np.ndarray, clip: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Variance between and within clips; ``values`` have mean 0, ``counts`` is (clips, raters)."""
    n, per_clip = len(values), counts.sum(axis=1)
    between = (np.bincount(clip, values) ** 2 / per_clip).sum()
    within = ((values**2).sum() - between) / (n - len(counts))
    typical = (n - (per_clip**2).sum() / n) / (len(counts) - 1)
    return (between / (len(counts) - 1) - within) / typical, within


def _two_way(values, clip, rater, counts) -> tuple[float, float, float]:
    """Variance of clips, raters and residual, crossed without interaction."""
    n, per_clip, per_rater = len(values), counts.sum(axis=1), counts.sum(axis=0)
    of_clips, of_raters = np.bincount(clip, values), np.bincount(rater, values)
    by_clip, by_rater = (of_clips**2 / per_clip).sum(), (of_raters**2 / per_rater).sum()
    # Eliminating the clips from the normal equations leaves one equation per rater.
    left = np.diag(per_rater) - counts.T @ (counts / per_clip[:, None])
    right = of_raters - counts.T @ (of_clips / per_clip)
    solution, _, rank, _ = np.linalg.lstsq(left, right, rcond=1e-10)
    both = by_clip + right @ solution
    rest = ((values**2).sum() - both) / (n - len(counts) - rank)
    parts = len(counts) + rank  # rank of the full model
    clips = (both - by_rater - rest * (parts - len(per_rater))) / (
        n - (counts**2 / per_rater).sum()
    )
    raters = (both - by_clip - rest * rank) / (n - (counts**2 / per_clip[:, None]).sum())
    return clips, raters, rest


def split_half(
    raters: pd.DataFrame, index: pd.DataFrame, n_splits: int = N_SPLITS, seed: int = 0
) -> pd.DataFrame:
    """Reliability of the mean rating by scope, (19 dimensions, ``SCOPES``): split-half,
    Spearman-Brown corrected.

    In each split the raters of every clip are assigned at random to two halves; all ratings of a
    rater for a clip are in one half. The halves' means are correlated over the clips of the scope,
    the correlations are averaged over splits, and r becomes 2 r / (1 + r), the reliability of both
    halves together. A value below 0 means no reliable signal.

    Raises:
        InputError: fewer than one split, or no rated clip in the index.
    """
    if n_splits < 1:
        raise InputError(f"{n_splits} splits are too few; give at least 1.")
    facts = index.set_index("clip")
    ratings = raters[raters["clip"].isin(facts.index)]
    if ratings.empty:
        raise InputError(
            f"no clip of the rater table (for example {raters['clip'].iloc[0]!r}) is in the index;"
            " give the matching index."
        )
    clips, clip = np.unique(ratings["clip"], return_inverse=True)
    pair, pair_of = np.unique(
        np.stack([clip, pd.factorize(ratings["rater"])[0]]), axis=1, return_inverse=True
    )
    scopes = {scope: _Scope(facts.loc[clips], scope) for scope in SCOPES}
    values = ratings[list(KEYS)].to_numpy()
    given = np.isfinite(values)
    table = np.concatenate([np.where(given, values, 0), given], axis=1)
    adder = sparse.csr_array(
        (np.ones(len(clip)), (clip, np.arange(len(clip)))), shape=(len(clips), len(clip))
    )
    total, rng = adder @ table, np.random.default_rng(seed)
    sums: dict[str, np.ndarray | float] = dict.fromkeys(SCOPES, 0.0)
    for _ in range(n_splits):
        one = adder @ (table * _dealt(pair[0], rng)[pair_of.ravel()][:, None])
        halves = [
            part[:, : len(KEYS)] / np.where(part[:, len(KEYS) :] > 0, part[:, len(KEYS) :], np.nan)
            for part in (one, total - one)
        ]
        for scope, chosen in scopes.items():
            sums[scope] = sums[scope] + chosen.correlation(*halves)
    r = pd.DataFrame(sums, index=pd.Index(KEYS, name="dimension")) / n_splits
    return 2 * r / (1 + r)


def noise_ceiling(reliability: pd.DataFrame) -> pd.DataFrame:
    """Noise ceiling, the highest possible r with the mean rating: square root of the reliability, 0
    if that is negative."""
    return np.sqrt(reliability.clip(lower=0))


def evaluate(
    raters: pd.DataFrame, index: pd.DataFrame, n_splits: int = N_SPLITS, seed: int = 0
) -> dict[str, pd.DataFrame]:
    """All tables: ``icc`` (19 dimensions, see ``icc``), ``split_half`` and ``ceiling`` (19
    dimensions, ``SCOPES``).

    Raises:
        InputError: see ``icc`` and ``split_half``.
    """
    clips, names = raters["clip"].to_numpy(), raters["rater"].to_numpy()
    correlations = {key: icc(raters[key].to_numpy(), clips, names) for key in KEYS}
    halves = split_half(raters, index, n_splits, seed)
    table = pd.DataFrame.from_dict(correlations, orient="index").rename_axis("dimension")
    return {"icc": table, "split_half": halves, "ceiling": noise_ceiling(halves)}


def load_ceiling(index: pd.DataFrame, path: str | Path | None = None) -> pd.DataFrame | None:
    """The noise ceiling (19 dimensions, scopes) from ``path``; without it PercePiano's if all clips
    are PercePiano's, else None.

    Raises:
        InputError: the file is missing, lacks a dimension or a scope, or has a value outside 0 to
            1.
    """
    if path is None and not set(index["clip"]) <= set(load_index()["clip"]):
        return None
    source = (
        resources.files("percepiano_ast") / "data" / "percepiano_noise_ceiling.csv"
        if path is None
        else path
    )
    table = read_csv(source, "noise ceiling")
    scopes = [scope for scope in SCOPES if scope in table.columns]
    if "dimension" not in table.columns or not scopes or set(KEYS) - set(table["dimension"]):
        raise InputError(
            f"noise ceiling {source} lacks the column dimension, a scope ({', '.join(SCOPES)}) or a"
            " row of the 19 dimensions; create it with `percepiano reliability`."
        )
    table = (
        table.set_index("dimension").loc[list(KEYS), scopes].apply(pd.to_numeric, errors="coerce")
    )
    if not table.apply(lambda column: column.between(0, 1)).all(axis=None):
        raise InputError(
            f"noise ceiling {source} has a value that is not from 0 to 1; write correlations."
        )
    return table


class _Scope:
    """The clips of one scope and the correlation of halves over them."""

    def __init__(self, facts: pd.DataFrame, scope: str):
        keep = (
            facts["human"].to_numpy(bool, copy=True)
            if "humans" in scope
            else np.ones(len(facts), bool)
        )
        self.members = None
        if scope.startswith("within_segment"):
            _, codes, sizes = np.unique(
                facts["segment"][keep], return_inverse=True, return_counts=True
            )
            keep[keep] = sizes[codes] >= MIN_IN_SEGMENT
            names, codes = np.unique(facts["segment"][keep], return_inverse=True)
            shape = (len(names), len(codes))
            self.members = sparse.csr_array(
                (np.ones(len(codes)), (codes, np.arange(len(codes)))), shape=shape
            )
        self.keep = keep

    def correlation(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Pearson's r per dimension, (19,), over the clips with both halves, (clips, 19) each."""
        one, other = one[self.keep], other[self.keep]
        both = np.isfinite(one) & np.isfinite(other)
        x, y = (self._centred(np.where(both, values, 0), both) for values in (one, other))
        with np.errstate(invalid="ignore", divide="ignore"):
            return (x * y).sum(axis=0) / np.sqrt((x * x).sum(axis=0) * (y * y).sum(axis=0))

    def _centred(self, values: np.ndarray, both: np.ndarray) -> np.ndarray:
        """Values minus their mean, or their segment's, over the clips with both halves; 0
        elsewhere."""
        if self.members is None:
            return np.where(both, values - values.sum(axis=0) / both.sum(axis=0), 0)
        means = (self.members @ values) / np.maximum(self.members @ both.astype(float), 1)
        return np.where(both, values - self.members.T @ means, 0)


def _dealt(clip: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """1.0 for a random half of the (clip, rater) pairs of each clip, (pairs,), sorted by clip; an
    odd pair gets 0."""
    order = np.lexsort((rng.random(len(clip)), clip))
    first = np.searchsorted(clip, clip)
    half = np.empty(len(clip))
    half[order] = (np.arange(len(clip)) - first) % 2
    return half
