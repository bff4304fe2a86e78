"""Ridge, kernel ridge and extremely randomised trees on the statistics of a clip, and the average
of the three.

Each is fitted on the training clips of a fold, which also standardise features and ratings. No
hyperparameters are tuned: ridge and kernel ridge are averaged over a grid that spans one to three
decades around common values. On PercePiano's folds, the average is as good as the best point of the
grid (kernel ridge on transcription and sound: r 0.67 for the average, 0.64 to 0.67 for single
points), and better than the point chosen by an inner cross-validation. The error in an inner
cross-validation over whole content groups serves to compare feature tables on music outside the
training data.

Extremely randomised trees: Geurts, Ernst and Wehenkel (2006), with half of the features tried at
each split, which has lower inner errors than a tenth or a third; kernel ridge: Saunders, Gammerman
and Vovk (1998).
"""

from dataclasses import dataclass

import numpy as np
from sklearn.base import BaseEstimator, RegressorMixin, clone
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold, ParameterGrid

from percepiano_ast.baselines.portable import standard
from percepiano_ast.errors import InputError

INNER_FOLDS = 3
TREES = 300


class GaussianRidge(KernelRidge):
    """Ridge regression with a Gaussian kernel.

    Args:
        alpha: of the ridge, on standardised targets.
        width: the kernel is ``exp(-|x - y|^2 / (width * n_features))``.
    """

    def __init__(self, alpha: float = 1.0, width: float = 1.0):
        super().__init__(alpha=alpha, kernel="rbf")
        self.width = width

    def fit(self, x: np.ndarray, y: np.ndarray) -> "GaussianRidge":
        """Fit on (n, n_features) and (n, n_targets)."""
        self.gamma = 1 / (self.width * x.shape[1])
        return super().fit(x, y)


class Averaged(RegressorMixin, BaseEstimator):
    """A regressor fitted at every point of a grid, with the mean of the predictions.

    Args:
        model: the regressor.
        grid: its parameters, as in scikit-learn's `ParameterGrid`.
    """

    def __init__(self, model: BaseEstimator, grid: dict):
        self.model, self.grid = model, grid

    def fit(self, x: np.ndarray, y: np.ndarray) -> "Averaged":
        """Fit on (n, n_features) and (n, n_targets)."""
        self.models_ = [
            clone(self.model).set_params(**point).fit(x, y) for point in ParameterGrid(self.grid)
        ]
        return self

    def predict(self, x: np.ndarray) -> np.ndarray:
        """(n, n_features) -> (n, n_targets)."""
        return np.mean([model.predict(x) for model in self.models_], axis=0)


REGRESSORS: dict[str, BaseEstimator] = {
    "ridge": Averaged(Ridge(), {"alpha": np.logspace(1, 4, 7).tolist()}),
    "kernel": Averaged(GaussianRidge(), {"alpha": [0.1, 0.3, 1.0], "width": [1.0, 3.0, 10.0]}),
    "extratrees": ExtraTreesRegressor(TREES, max_features=0.5, min_samples_leaf=2, n_jobs=-1),
}


@dataclass(frozen=True)
class Fitted:
    """Regressors on clip statistics, and the training statistics for standardisation.

    Attributes:
        models: regressor -> fitted on standardised features and ratings.
        feature_mean, feature_std, rating_mean, rating_std: of the training clips.
    """

    models: dict[str, BaseEstimator]
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
        features = _table(features, "features")
        if features.shape[1] != len(self.feature_mean):
            raise InputError(
                f"{features.shape[1]} features per clip, but the baseline was fitted on"
                f" {len(self.feature_mean)}. Extract them with the version used for fitting."
            )
        x = standard(features, self.feature_mean, self.feature_std)
        return {
            name: model.predict(x) * self.rating_std + self.rating_mean
            for name, model in self.models.items()
        }


def fit(
    features: np.ndarray,
    ratings: np.ndarray,
    *,
    seed: int,
    forest: dict | None = None,
    least: np.ndarray | None = None,
) -> Fitted:
    """Fit all of ``REGRESSORS``.

    Args:
        features: (n_clips, n_features), ``ratings``: (n_clips, n_dimensions).
        seed: for the trees.
        forest: other settings of the trees, for a small model.
        least: smallest standard deviation per feature, (n_features,), so that features that hardly
            vary in the training data are not amplified in other data.

    Raises:
        InputError: NaN, or tables of different lengths.
    """
    features, ratings = _tables(features, ratings)
    feature_mean, feature_std, rating_mean, rating_std = *_moments(features), *_moments(ratings)
    feature_std = feature_std if least is None else np.maximum(feature_std, least)
    x, y = standard(features, feature_mean, feature_std), (ratings - rating_mean) / rating_std
    models = {}
    for name, model in REGRESSORS.items():
        model = clone(model)
        if "random_state" in model.get_params():
            model.set_params(random_state=seed, **(forest or {}))
        models[name] = model.fit(x, y)
    return Fitted(models, feature_mean, feature_std, rating_mean, rating_std)


def inner_error(
    features: np.ndarray, ratings: np.ndarray, groups: np.ndarray, *, seed: int
) -> float:
    """Mean squared error of standardised ratings in a cross-validation over whole content groups.

    Args:
        features, ratings, seed: see `fit`; ``groups``: content group (n_clips,).

    Raises:
        InputError: see `fit`; fewer than two content groups.
    """
    features, ratings = _tables(features, ratings)
    if (found := len(np.unique(groups))) < 2:
        raise InputError(
            f"{found} content group is not enough for an inner cross-validation; give clips of two"
            " or more."
        )
    errors = np.zeros_like(ratings)
    for train, test in GroupKFold(min(INNER_FOLDS, found)).split(features, ratings, groups):
        errors[test] = (
            fit(features[train], ratings[train], seed=seed).predict(features[test]) - ratings[test]
        )
    return float(np.square(errors / _moments(ratings)[1]).mean())


def _tables(features: np.ndarray, ratings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    features, ratings = _table(features, "features"), _table(ratings, "ratings")
    if len(features) != len(ratings):
        raise InputError(
            f"{len(features)} rows of features and {len(ratings)} of ratings do not match; "
            "give one of each per clip."
        )
    return features, ratings


def _table(values: np.ndarray, what: str) -> np.ndarray:
    """``values`` as float64 (clips, columns) without NaN or infinity."""
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or not values.size:
        raise InputError(
            f"{what} of shape {values.shape} are not a table (clips, columns); give one row per"
            " clip."
        )
    if len(bad := np.argwhere(~np.isfinite(values))):
        raise InputError(
            f"{what} hold {len(bad)} values that are NaN or infinite, the first in row {bad[0][0]},"
            f" column {bad[0][1]}. Remove those clips or repair their recordings."
        )
    return values


def _moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per column; 1 for constant columns, which become 0."""
    std = values.std(axis=0)
    return values.mean(axis=0), np.where(std > 1e-9, std, 1.0)
