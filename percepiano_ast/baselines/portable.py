"""Fitted regressors as plain arrays, saved without executable code and evaluated without
scikit-learn.

Large tables are saved in half precision: features are standardised and clipped at four standard
deviations, and leaves are standardised ratings. The rounding error is below a hundredth of a
rating's standard deviation.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from percepiano_ast.errors import InputError

# standard deviations at which features are clipped, to avoid extrapolation from outliers
_EXTREME = 4.0
_ROWS = 256  # rows per batch; limits the memory of the forest
_LEAF = -1  # in the place of a feature number


def standard(values: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """Standardised and clipped features (n, n_features), the regressors' input."""
    return np.clip((values - mean) / std, -_EXTREME, _EXTREME)


def pack(fitted) -> dict[str, np.ndarray]:
    """Arrays of a `statistics.Fitted` with all its regressors, named ``ridge/coef`` ...;
    `Regressors` reads them."""
    moments = {
        name: getattr(fitted, name)
        for name in ("feature_mean", "feature_std", "rating_mean", "rating_std")
    }
    arrays = {name: values.astype(np.float32) for name, values in moments.items()}
    ridges, kernels = fitted.models["ridge"].models_, fitted.models["kernel"].models_
    # The mean of linear models is a linear model; the mean of kernel models of equal width is a
    # kernel model.
    arrays["ridge/coef"] = np.mean([one.coef_.T for one in ridges], axis=0).astype(np.float32)
    arrays["ridge/intercept"] = np.mean([one.intercept_ for one in ridges], axis=0).astype(
        np.float32
    )
    gammas = sorted({one.gamma for one in kernels})
    duals = [
        sum(one.dual_coef_ for one in kernels if one.gamma == gamma) / len(kernels)
        for gamma in gammas
    ]
    arrays |= {
        "kernel/gamma": np.array(gammas, np.float32),
        "kernel/dual": np.array(duals, np.float32),
    }
    arrays["kernel/known"] = kernels[0].X_fit_.astype(np.float16)
    return arrays | _forest([one.tree_ for one in fitted.models["extratrees"].estimators_])


def _forest(trees: list) -> dict[str, np.ndarray]:
    """The nodes of all trees, concatenated. Trees are stored depth first, so that the left child is
    the next node. ``other`` is the position of the right child, or, for a leaf, the row of its
    value."""
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
    return {"trees/start": starts.astype(np.int32)} | {
        f"trees/{name}": np.concatenate(parts) for name, parts in columns.items()
    }


@dataclass(frozen=True)
class Regressors:
    """The regressors in arrays of `pack`."""

    arrays: Mapping[str, np.ndarray]

    def predict(self, features: np.ndarray) -> np.ndarray:
        """(n, n_features) -> ratings float32 (3, n, n_dimensions) of ridge, kernel ridge and trees;
        the caller averages them.

        Raises:
            InputError: another number of features than in training.
        """
        arrays = self.arrays
        if features.shape[1] != len(arrays["feature_mean"]):
            raise InputError(
                f"{features.shape[1]} features per clip, but the model was fitted on"
                f" {len(arrays['feature_mean'])}"
            )
        x = self.standardised(features)
        rated = np.stack([self._ridge(x), self._kernel(x), self._trees(x)])
        return (rated * arrays["rating_std"] + arrays["rating_mean"]).astype(np.float32)

    def standardised(self, features: np.ndarray) -> np.ndarray:
        """Standardised features, the regressors' input, float32."""
        return standard(features, self.arrays["feature_mean"], self.arrays["feature_std"]).astype(
            np.float32
        )

    def distances(self, x: np.ndarray) -> np.ndarray:
        """Squared distances of standardised features (n, n_features) from those of each training
        clip, (n, n_training)."""
        known = self.arrays["kernel/known"].astype(np.float32)
        squares = (
            np.square(x).sum(axis=1)[:, None]
            - 2 * x @ known.T
            + np.square(known).sum(axis=1)[None, :]
        )
        return np.maximum(squares, 0)

    def _ridge(self, x: np.ndarray) -> np.ndarray:
        return x @ self.arrays["ridge/coef"] + self.arrays["ridge/intercept"]

    def _kernel(self, x: np.ndarray) -> np.ndarray:
        distances, widths = (
            self.distances(x),
            zip(self.arrays["kernel/gamma"], self.arrays["kernel/dual"], strict=True),
        )
        return sum(np.exp(-gamma * distances) @ dual for gamma, dual in widths)

    def _trees(self, x: np.ndarray) -> np.ndarray:
        feature, threshold, other, value = (
            self.arrays[f"trees/{name}"] for name in ("feature", "threshold", "other", "value")
        )
        parts = []
        for first in range(0, len(x), _ROWS):
            rows = x[first : first + _ROWS]
            node = np.tile(self.arrays["trees/start"], (len(rows), 1))
            while (inner := feature[node] != _LEAF).any():
                asked = np.take_along_axis(
                    rows, np.maximum(feature[node], 0).astype(np.intp), axis=1
                )
                below = np.where(asked <= threshold[node], node + 1, other[node])
                node = np.where(inner, below, node)
            parts.append(value[other[node]].astype(np.float32).mean(axis=1))
        return np.concatenate(parts)
