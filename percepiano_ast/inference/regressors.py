"""Regressors on features of clips: the mean of ridge, kernel ridge (Saunders, Gammerman and Vovk
1998) and extremely randomised trees (Geurts, Ernst and Wehenkel 2006).

No hyperparameters are tuned: ridge and kernel ridge are averaged over a grid that spans one to
three decades around common values. On PercePiano's folds, the average is as good as the best point
of the grid (kernel ridge on transcription and sound: r 0.67, single points 0.64 to 0.67), and
better than the point chosen by an inner cross-validation. Trees try half of the features at each
split, which has lower inner errors than a tenth or a third.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np

from percepiano_ast.dimensions import KEYS
from percepiano_ast.errors import InputError

REGRESSORS = ("ridge", "kernel", "extratrees")
RIDGE_ALPHAS = np.logspace(1, 4, 7).tolist()
KERNEL_ALPHAS, KERNEL_WIDTHS = (0.1, 0.3, 1.0), (1.0, 3.0, 10.0)
FOREST = {"n_estimators": 300, "max_features": 0.5, "min_samples_leaf": 2, "n_jobs": -1}
INNER_FOLDS = 3
_RATINGS = len(KEYS)
NEIGHBOURS = 10  # nearest training clips that a recording's distance is measured to
_EXTREME = 4.0  # standard deviations at which features are clipped, against outliers
_ROWS = 256  # rows per batch; limits the memory of the forest
_LEAF = -1  # in the place of a feature number
_REGRESSORS = "regressors/"  # prefix of tensor names
_MOMENTS = ("feature_mean", "feature_std", "rating_mean", "rating_std")
_TABLES = ("calibration", "reference", "deviation", "within")  # names of tensors


def standard(values: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Standardised and clipped features (n, n_features), the regressors' input."""
    return np.clip((values - mean) / std, -_EXTREME, _EXTREME)


# --- Fit ------------------------------------------------------------------------------------------


def gaussian_ridge(n_features: int, alpha: float = 1.0, width: float = 1.0):
    """scikit-learn's ridge regression with the kernel ``exp(-|x - y|^2 / (width * n_features))``,
    unfitted; ``alpha`` is for standardised targets."""
    from sklearn.kernel_ridge import KernelRidge  # here: not needed for rating

    return KernelRidge(alpha=alpha, kernel="rbf", gamma=1 / (width * n_features))


@dataclass(frozen=True)
class FittedRegressors:
    """scikit-learn's regressors by name in ``REGRESSORS``, fitted on standardised features and
    ratings, and the moments of the training clips."""

    models: dict[str, list]
    feature_mean: np.ndarray
    feature_std: np.ndarray
    rating_mean: np.ndarray
    rating_std: np.ndarray

    def predict(self, features: np.ndarray) -> np.ndarray:
        """(n, n_features) -> ratings (n, n_dimensions): the average of the regressors."""
        return np.mean(list(self.predict_each(features).values()), axis=0)

    def predict_each(self, features: np.ndarray) -> dict[str, np.ndarray]:
        """The ratings predicted by each regressor.

        Raises:
            InputError: NaN, or another number of features than in training.
        """
        features = finite_table(features, "features")
        if features.shape[1] != len(self.feature_mean):
            raise InputError(
                f"{features.shape[1]} features per clip, but the baseline was fitted on"
                f" {len(self.feature_mean)}. Extract them with the version used for fitting."
            )
        x = standard(features, self.feature_mean, self.feature_std)
        return {
            name: np.mean([model.predict(x) for model in models], axis=0) * self.rating_std
            + self.rating_mean
            for name, models in self.models.items()
        }


def fit(
    features: np.ndarray,
    ratings: np.ndarray,
    *,
    seed: int,
    forest: dict | None = None,
    least: np.ndarray | None = None,
) -> FittedRegressors:
    """Fit all of ``REGRESSORS``.

    Args:
        features, ratings: (n_clips, n_features), (n_clips, n_dimensions).
        seed: for the trees.
        forest: other settings than ``FOREST``, for a small model.
        least: smallest standard deviation per feature, so that features that hardly vary in the
            training data are not amplified in other data.

    Raises:
        InputError: NaN, or tables of different lengths.
    """
    from sklearn.ensemble import ExtraTreesRegressor
    from sklearn.linear_model import Ridge

    features, ratings = check_tables(features, ratings)
    feature_mean, feature_std, rating_mean, rating_std = *_moments(features), *_moments(ratings)
    feature_std = feature_std if least is None else np.maximum(feature_std, least)
    x, y = standard(features, feature_mean, feature_std), (ratings - rating_mean) / rating_std
    grid = product(KERNEL_ALPHAS, KERNEL_WIDTHS)
    unfitted = {
        "ridge": [Ridge(alpha=alpha) for alpha in RIDGE_ALPHAS],
        "kernel": [gaussian_ridge(x.shape[1], *point) for point in grid],
        "extratrees": [ExtraTreesRegressor(random_state=seed, **FOREST | (forest or {}))],
    }
    models = {name: [model.fit(x, y) for model in unfitted[name]] for name in REGRESSORS}
    return FittedRegressors(models, feature_mean, feature_std, rating_mean, rating_std)


def inner_error(
    features: np.ndarray, ratings: np.ndarray, groups: np.ndarray, *, seed: int
) -> float:
    """Mean squared error of standardised ratings in a cross-validation over whole content
    ``groups`` (n_clips,), to compare feature tables on music outside the training data.

    Raises:
        InputError: see `fit`; fewer than two content groups.
    """
    from sklearn.model_selection import GroupKFold

    features, ratings = check_tables(features, ratings)
    if (found := len(np.unique(groups))) < 2:
        raise InputError(
            f"{found} content group is not enough for an inner cross-validation; give clips of two"
            " or more."
        )
    errors = np.zeros_like(ratings)
    for train, test in GroupKFold(min(INNER_FOLDS, found)).split(features, ratings, groups):
        fitted = fit(features[train], ratings[train], seed=seed)
        errors[test] = fitted.predict(features[test]) - ratings[test]
    return float(np.square(errors / _moments(ratings)[1]).mean())


def finite_table(values: np.ndarray, what: str) -> np.ndarray:
    """``values`` as a float64 array (clips, columns).

    Raises:
        InputError: another shape, or NaN or infinity; the message calls the values ``what``.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or not values.size:
        raise InputError(
            f"{what} of shape {values.shape} are not a table (clips, columns); give one row per"
            " clip."
        )
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        raise InputError(
            f"{what} hold {len(bad)} values that are NaN or infinite, the first in row {bad[0][0]},"
            f" column {bad[0][1]}. Remove those clips or repair their recordings."
        )
    return values


def check_tables(features: np.ndarray, ratings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as `finite_table`; InputError for different numbers of rows."""
    features, ratings = finite_table(features, "features"), finite_table(ratings, "ratings")
    if (one := len(features)) != (other := len(ratings)):
        raise InputError(
            f"{one} rows of features and {other} of ratings do not match; give one of each per"
            " clip."
        )
    return features, ratings


def _moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per column; 1 for constant columns, which become 0."""
    std = values.std(axis=0)
    return values.mean(axis=0), np.where(std > 1e-9, std, 1.0)


# --- Save and evaluate without scikit-learn -------------------------------------------------------
# Large tables are in half precision: features are standardised and clipped, and leaves are
# standardised ratings. The rounding error is below a hundredth of a rating's standard deviation.


def pack(fitted: FittedRegressors) -> dict[str, np.ndarray]:
    """Arrays of all regressors, named ``ridge/coef`` ..., for `RegressorEnsemble`."""
    ridges, kernels = fitted.models["ridge"], fitted.models["kernel"]
    # The mean of linear models is a linear model; the mean of kernel models of equal width is a
    # kernel model.
    gammas = sorted({one.gamma for one in kernels})
    duals = [
        sum(one.dual_coef_ for one in kernels if one.gamma == gamma) / len(kernels)
        for gamma in gammas
    ]
    arrays = {name: getattr(fitted, name).astype(np.float32) for name in _MOMENTS} | {
        "ridge/coef": np.mean([one.coef_.T for one in ridges], axis=0).astype(np.float32),
        "ridge/intercept": np.mean([one.intercept_ for one in ridges], axis=0).astype(np.float32),
        "kernel/gamma": np.array(gammas, np.float32),
        "kernel/dual": np.array(duals, np.float32),
        "kernel/known": kernels[0].X_fit_.astype(np.float16),
    }
    # The nodes of all trees, concatenated, each tree depth first: the left child is the next node.
    # ``other`` is the position of the right child, or, for a leaf, the row of its value.
    trees = [one.tree_ for one in fitted.models["extratrees"][0].estimators_]
    starts = np.cumsum([0] + [tree.node_count for tree in trees[:-1]])
    leaves = 0
    columns: dict[str, list] = {"feature": [], "threshold": [], "other": [], "value": []}
    for start, tree in zip(starts, trees, strict=True):
        leaf = tree.children_left < 0
        if not (tree.children_left[~leaf] == np.flatnonzero(~leaf) + 1).all():
            raise ValueError("this version of scikit-learn does not store its trees depth first")
        columns["feature"].append(np.where(leaf, _LEAF, tree.feature).astype(np.int16))
        # Not in half precision: rounding could move a value to the other side of its threshold.
        columns["threshold"].append(tree.threshold.astype(np.float32))
        row = leaves + np.cumsum(leaf) - 1
        columns["other"].append(np.where(leaf, row, start + tree.children_right).astype(np.int32))
        columns["value"].append(tree.value[leaf, :, 0].astype(np.float16))
        leaves += int(leaf.sum())
    arrays["trees/start"] = starts.astype(np.int32)
    return arrays | {f"trees/{name}": np.concatenate(parts) for name, parts in columns.items()}


@dataclass(frozen=True)
class RegressorEnsemble:
    """The regressors in arrays of `pack`."""

    arrays: Mapping[str, np.ndarray]

    def predict(self, features: np.ndarray) -> np.ndarray:
        """(n, n_features) -> ratings float32 (3, n, n_dimensions) of ridge, kernel ridge and trees.

        Raises:
            InputError: another number of features than in training.
        """
        arrays = self.arrays
        if features.shape[1] != len(arrays["feature_mean"]):
            raise InputError(
                f"{features.shape[1]} features per clip, but the model was fitted on"
                f" {len(arrays['feature_mean'])}"
            )
        x = self._standardised(features)
        ridge = x @ arrays["ridge/coef"] + arrays["ridge/intercept"]
        distances = self._distances(x)
        kernels = zip(arrays["kernel/gamma"], arrays["kernel/dual"], strict=True)
        kernel = sum(np.exp(-gamma * distances) @ dual for gamma, dual in kernels)
        names = ("feature", "threshold", "other", "value")
        feature, threshold, other, value = (arrays[f"trees/{name}"] for name in names)
        trees = []
        for first in range(0, len(x), _ROWS):
            rows = x[first : first + _ROWS]
            node = np.tile(arrays["trees/start"], (len(rows), 1))
            while (inner := feature[node] != _LEAF).any():
                tested = np.maximum(feature[node], 0).astype(np.intp)
                below = np.take_along_axis(rows, tested, axis=1) <= threshold[node]
                node = np.where(inner, np.where(below, node + 1, other[node]), node)
            trees.append(value[other[node]].astype(np.float32).mean(axis=1))
        rated = np.stack([ridge, kernel, np.concatenate(trees)])
        return (rated * arrays["rating_std"] + arrays["rating_mean"]).astype(np.float32)

    def distance(self, features: np.ndarray) -> np.ndarray:
        """Mean distance of standardised features (n, n_features) from their nearest training clips,
        in standard deviations, (n,)."""
        x = self._standardised(features)
        nearest = np.partition(self._distances(x), NEIGHBOURS - 1, axis=1)[:, :NEIGHBOURS]
        return np.sqrt(nearest / x.shape[1]).mean(axis=1)

    def _standardised(self, features: np.ndarray) -> np.ndarray:
        mean, std = self.arrays["feature_mean"], self.arrays["feature_std"]
        return standard(features, mean, std).astype(np.float32)

    def _distances(self, x: np.ndarray) -> np.ndarray:
        """Squared distances of standardised features from those of the training clips, (n,
        n_training)."""
        known = self.arrays["kernel/known"].astype(np.float32)
        own, theirs = np.square(x).sum(axis=1)[:, None], np.square(known).sum(axis=1)[None, :]
        return np.maximum(own - 2 * x @ known.T + theirs, 0)


@dataclass(frozen=True, eq=False)
class CalibratedRegressors:
    """Regressors with their calibration, and what their ratings are compared with.

    Attributes:
        ensemble: on features of a recording.
        calibration: intercept and slope, (2, 19), of the rating on the mean of the regressors;
            fitted on works that were left out of training.
        reference: mean ratings by people of PercePiano's human performances, ascending for each
            dimension, (performances, 19).
        deviation: standard deviation of the errors for works, a soundfont and a room that were left
            out of training, (19,).
        within: standard deviation of the errors among performances of one passage, (19,): errors
            that two performances share cancel in their difference.
        novelty_threshold: distance from the training clips that one in a hundred held-out clips
            exceeds; ``farthest`` in files.
    """

    ensemble: RegressorEnsemble
    calibration: np.ndarray
    reference: np.ndarray
    deviation: np.ndarray
    within: np.ndarray
    novelty_threshold: float

    def rate(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of features (n, n_features) -> ratings float32 (n, 19), 0 to 1, and their novelty
        (n,): the distance from the training clips; 1 is the 99th percentile of held-out clips."""
        predicted = self.ensemble.predict(features).mean(axis=0)
        ratings = self.calibration[0] + self.calibration[1] * predicted
        novelty = self.ensemble.distance(features) / self.novelty_threshold
        return ratings.astype(np.float32), novelty

    def percentiles(self, ratings: np.ndarray) -> np.ndarray:
        """Percentage of PercePiano's human performances that people rated lower, (..., 19) -> (...,
        19)."""
        return 100 * (self.reference < np.asarray(ratings)[..., None, :]).mean(axis=-2)

    def tensors(self) -> dict[str, np.ndarray]:
        """Tensors of a file, which `from_tensors` reads."""
        own = {name: getattr(self, name).astype(np.float32) for name in _TABLES}
        own["farthest"] = np.array([self.novelty_threshold], np.float32)
        return own | {_REGRESSORS + name: values for name, values in self.ensemble.arrays.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, np.ndarray]) -> CalibratedRegressors:
        """The inverse of `tensors`.

        Raises:
            KeyError, ValueError: missing, of other shapes, or a path through a tree without a leaf.
        """
        arrays = below(tensors, _REGRESSORS)
        n_features, n_known = arrays["kernel/known"].shape[::-1]
        n_nodes, n_leaves, n_kernels = (
            len(arrays[name]) for name in ("trees/feature", "trees/value", "kernel/gamma")
        )
        shapes = {
            "feature_mean": (n_features,),
            "feature_std": (n_features,),
            "rating_mean": (_RATINGS,),
            "rating_std": (_RATINGS,),
            "ridge/coef": (n_features, _RATINGS),
            "ridge/intercept": (_RATINGS,),
            "kernel/known": (n_known, n_features),
            "kernel/gamma": (n_kernels,),
            "kernel/dual": (n_kernels, n_known, _RATINGS),
            "trees/start": arrays["trees/start"].shape[:1],
            "trees/feature": (n_nodes,),
            "trees/threshold": (n_nodes,),
            "trees/other": (n_nodes,),
            "trees/value": (n_leaves, _RATINGS),
        }
        found = {name: arrays[name].shape for name in shapes}
        tables = {name: tensors[name] for name in _TABLES}
        found |= {name: table.shape for name, table in tables.items()}
        shapes |= {"calibration": (2, _RATINGS), "deviation": (_RATINGS,), "within": (_RATINGS,)}
        shapes["reference"] = len(tables["reference"]), _RATINGS
        if odd := [name for name in shapes if found[name] != shapes[name]]:
            raise ValueError(f"{odd[0]} is {found[odd[0]]}, not {shapes[odd[0]]}")
        # The path through a tree leads to later nodes and ends in a leaf.
        feature, other, start = (arrays[f"trees/{name}"] for name in ("feature", "other", "start"))
        node, leaf = np.arange(n_nodes), feature == _LEAF
        limit = np.where(leaf, n_leaves, n_nodes)
        forward = (
            (other < limit) & (other > np.where(leaf, -1, node)) & (leaf | (node + 1 < n_nodes))
        )
        if (
            any(array.dtype.kind != "i" for array in (feature, other, start))
            or not (forward & (feature >= _LEAF) & (feature < n_features)).all()
            or not ((start >= 0) & (start < n_nodes)).all()
            or not len(start)
            or n_known < NEIGHBOURS
        ):
            raise ValueError("its trees or training clips are incomplete")
        return cls(
            RegressorEnsemble(arrays), **tables, novelty_threshold=float(tensors["farthest"][0])
        )


def below(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The tensors whose names begin with ``prefix``, without it."""
    found = {name: values for name, values in tensors.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): values for name, values in found.items()}
