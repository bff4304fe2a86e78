"""Fitted regressors as plain arrays: kept in a file that nothing is run from, and evaluated without scikit-learn.

Large tables are kept in half precision: features are standardised and cut off at four deviations, leaves are standardised
ratings, and what the rounding costs is under a thousandth of a rating's deviation.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from percepiano_ast.baselines.statistics import REGRESSORS, Fitted, standard
from percepiano_ast.config import InputError

_ROWS = 256  # rated at once: bounds the memory of the forest


def pack(fitted: Fitted) -> dict[str, np.ndarray]:
    """Arrays of a model with all of ``REGRESSORS``, named ``ridge/coef`` ...; `Regressors` reads them.

    Raises:
        InputError: it lacks one of them.
    """
    if missing := [name for name in REGRESSORS if name not in fitted.models]:
        raise InputError(f"only a model of {', '.join(REGRESSORS)} is packed; this one lacks {', '.join(missing)}")
    moments = {name: getattr(fitted, name) for name in ("feature_mean", "feature_std", "rating_mean", "rating_std")}
    arrays = {name: values.astype(np.float32) for name, values in moments.items()}
    ridge, svr = fitted.models["ridge"], fitted.models["svr"]
    arrays |= {"ridge/coef": ridge.coef_.T.astype(np.float32), "ridge/intercept": ridge.intercept_.astype(np.float32)}
    dual = np.zeros((len(svr.x_), len(svr.models_)), np.float32)
    for number, one in enumerate(svr.models_):
        dual[one.support_, number] = one.dual_coef_[0]
    arrays |= {"svr/x": svr.x_.astype(np.float16), "svr/dual": dual, "svr/width": np.array([svr.width], np.float32)}
    arrays["svr/intercept"] = np.array([one.intercept_[0] for one in svr.models_], np.float32)
    arrays |= _forest([one.tree_ for one in fitted.models["extratrees"].estimators_])
    # safetensors writes the memory of an array as it lies, whatever its strides say.
    return {name: np.ascontiguousarray(values) for name, values in arrays.items()}


def _forest(trees: list) -> dict[str, np.ndarray]:
    """All nodes of all trees in one row, children by their place in it; a leaf is its own child."""
    starts = np.cumsum([0] + [tree.node_count for tree in trees[:-1]])
    columns = {"feature": [], "threshold": [], "left": [], "right": [], "value": []}
    for start, tree in zip(starts, trees, strict=True):
        here, leaf = np.arange(tree.node_count), tree.children_left < 0
        columns["feature"].append(np.where(leaf, 0, tree.feature).astype(np.int16))
        # Halves would send a value that lies beside a threshold to the other side.
        columns["threshold"].append(tree.threshold.astype(np.float32))
        for name, child in (("left", tree.children_left), ("right", tree.children_right)):
            columns[name].append((start + np.where(leaf, here, child)).astype(np.int32))
        columns["value"].append(np.where(leaf[:, None], tree.value[:, :, 0], 0.0).astype(np.float16))
    return {"trees/start": starts.astype(np.int32)} | {f"trees/{name}": np.concatenate(parts) for name, parts in columns.items()}


@dataclass(frozen=True)
class Regressors:
    """What `pack` made."""

    arrays: Mapping[str, np.ndarray]

    def predict(self, features: np.ndarray) -> np.ndarray:
        """(n, n_features) -> ratings float32 (n, n_dimensions): the average of ridge, support vectors and trees.

        Raises:
            InputError: another number of features than in training.
        """
        arrays = self.arrays
        if features.shape[1] != len(arrays["feature_mean"]):
            raise InputError(f"{features.shape[1]} features per clip, the model was fitted on {len(arrays['feature_mean'])}")
        x = standard(features, arrays["feature_mean"], arrays["feature_std"]).astype(np.float32)
        rated = (self._ridge(x) + self._svr(x) + self._trees(x)) / 3
        return (rated * arrays["rating_std"] + arrays["rating_mean"]).astype(np.float32)

    def _ridge(self, x: np.ndarray) -> np.ndarray:
        return x @ self.arrays["ridge/coef"] + self.arrays["ridge/intercept"]

    def _svr(self, x: np.ndarray) -> np.ndarray:
        known = self.arrays["svr/x"].astype(np.float32)
        distance = np.square(x).sum(axis=1)[:, None] - 2 * x @ known.T + np.square(known).sum(axis=1)[None, :]
        kernel = np.exp(-np.maximum(distance, 0) / (self.arrays["svr/width"][0] * x.shape[1]))
        return kernel @ self.arrays["svr/dual"] + self.arrays["svr/intercept"]

    def _trees(self, x: np.ndarray) -> np.ndarray:
        feature, threshold, left, right, value = (
            self.arrays[f"trees/{name}"] for name in ("feature", "threshold", "left", "right", "value")
        )
        parts = []
        for first in range(0, len(x), _ROWS):
            rows = x[first : first + _ROWS]
            node = np.broadcast_to(self.arrays["trees/start"], (len(rows), len(self.arrays["trees/start"])))
            while True:
                below = np.take_along_axis(rows, feature[node].astype(np.intp), axis=1) <= threshold[node]
                after = np.where(below, left[node], right[node])
                if np.array_equal(after, node):
                    break
                node = after
            parts.append(value[node].astype(np.float32).mean(axis=1))
        return np.concatenate(parts)
