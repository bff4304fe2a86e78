"""Ridge, support vectors and extremely randomised trees on the statistics of a clip, and the average of the three.

Each is fitted on the training clips of a fold alone: features and ratings are standardised by them, and hyper-parameters are
the best of a small grid in an inner cross-validation over whole content groups, so that a choice is judged on music that
was not trained on. One choice holds for all dimensions: choosing per dimension was measured to gain nothing.

The grids span three decades around common defaults; they were not tuned on PercePiano's folds. Extremely randomised trees:
Geurts, Ernst and Wehenkel (2006); support vector regression: Smola and Schölkopf (2004).
"""

from dataclasses import dataclass

import numpy as np
from sklearn.base import BaseEstimator, RegressorMixin, clone
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.linear_model import Ridge
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.svm import SVR

from percepiano_ast.config import InputError

INNER_FOLDS = 3
TREES = 300
_FEW_TREES = 60  # are enough to compare grids of a forest
_EXTREME = 4.0  # standard deviations at which a feature is cut off, so that one odd clip is not extrapolated from


class KernelSVR(RegressorMixin, BaseEstimator):
    """Support vector regression with a Gaussian kernel for many targets; the kernel is computed once for all of them.

    Args:
        C: cost of an error, on standardised targets.
        width: the kernel is ``exp(-|x - y|^2 / (width * n_features))``.
        epsilon: errors below it cost nothing.
    """

    def __init__(self, C: float = 1.0, width: float = 1.0, epsilon: float = 0.2):  # noqa: N803 (scikit-learn's name)
        self.C, self.width, self.epsilon = C, width, epsilon

    def fit(self, x: np.ndarray, y: np.ndarray) -> "KernelSVR":
        """Fit on (n, n_features) and (n, n_targets)."""
        self.x_ = x
        kernel = self._kernel(x)
        self.models_ = [SVR(kernel="precomputed", C=self.C, epsilon=self.epsilon).fit(kernel, target) for target in y.T]
        return self

    def predict(self, x: np.ndarray) -> np.ndarray:
        """(n, n_features) -> (n, n_targets)."""
        kernel = self._kernel(x)
        return np.stack([model.predict(kernel) for model in self.models_], axis=1)

    def _kernel(self, x: np.ndarray) -> np.ndarray:
        return rbf_kernel(x, self.x_, gamma=1 / (self.width * x.shape[1]))


REGRESSORS = {
    "ridge": (Ridge(), {"alpha": np.logspace(0, 4, 9).tolist()}, {}),
    "svr": (KernelSVR(), {"C": [0.3, 1.0, 3.0], "width": [1.0, 3.0, 10.0]}, {}),
    "extratrees": (
        ExtraTreesRegressor(_FEW_TREES),
        {"max_features": [0.1, 0.3], "min_samples_leaf": [2, 5]},
        {"n_estimators": TREES},
    ),
}


@dataclass(frozen=True)
class Fitted:
    """Regressors on statistics and the training statistics that go with them.

    Attributes:
        models: regressor -> fitted on standardised features and ratings.
        chosen: regressor -> hyper-parameters that the inner cross-validation chose.
        inner_error: mean squared error on standardised ratings in that cross-validation, mean of the regressors.
        feature_mean, feature_std, rating_mean, rating_std: of the training clips.
    """

    models: dict[str, BaseEstimator]
    chosen: dict[str, dict]
    inner_error: float
    feature_mean: np.ndarray
    feature_std: np.ndarray
    rating_mean: np.ndarray
    rating_std: np.ndarray

    def predict(self, features: np.ndarray) -> np.ndarray:
        """(n, n_features) -> ratings (n, n_dimensions): the average of the regressors."""
        return np.mean(list(self.predict_each(features).values()), axis=0)

    def predict_each(self, features: np.ndarray) -> dict[str, np.ndarray]:
        """The same of every regressor.

        Raises:
            InputError: NaN, or another number of features than in training.
        """
        features = _table(features, "features")
        if features.shape[1] != len(self.feature_mean):
            raise InputError(f"{features.shape[1]} features per clip, the baseline was fitted on {len(self.feature_mean)}; "
                             "extract them with the same version.")  # fmt: skip
        x = _standard(features, self.feature_mean, self.feature_std)
        return {name: model.predict(x) * self.rating_std + self.rating_mean for name, model in self.models.items()}


def fit(
    features: np.ndarray, ratings: np.ndarray, groups: np.ndarray, *, seed: int, regressors: tuple[str, ...] = tuple(REGRESSORS)
) -> Fitted:
    """Choose hyper-parameters and fit.

    Args:
        features: (n_clips, n_features), ``ratings``: (n_clips, n_dimensions), ``groups``: content group (n_clips,).
        seed: of the trees.
        regressors: names in ``REGRESSORS``.

    Raises:
        InputError: NaN, tables of different length, fewer than two content groups.
    """
    features, ratings, groups = _table(features, "features"), _table(ratings, "ratings"), np.asarray(groups)
    if not len(features) == len(ratings) == len(groups):
        raise InputError(f"{len(features)} rows of features, {len(ratings)} of ratings and {len(groups)} groups do not "
                         "belong together; give one of each per clip.")  # fmt: skip
    if (found := len(np.unique(groups))) < 2:
        raise InputError(f"{found} content group cannot be cross-validated within; give clips of two or more.")
    feature_mean, feature_std, rating_mean, rating_std = *_moments(features), *_moments(ratings)
    x, y = _standard(features, feature_mean, feature_std), (ratings - rating_mean) / rating_std
    models, chosen, errors = {}, {}, []
    inner = GroupKFold(min(INNER_FOLDS, found))
    for name in regressors:
        model, grid, final = REGRESSORS[name]
        model = clone(model)
        if "random_state" in model.get_params():
            model.set_params(random_state=seed)
        search = GridSearchCV(model, grid, cv=inner, scoring="neg_mean_squared_error", refit=False)
        chosen[name] = search.fit(x, y, groups=groups).best_params_
        errors.append(-search.best_score_)
        models[name] = clone(model).set_params(**chosen[name], **final).fit(x, y)
    return Fitted(models, chosen, float(np.mean(errors)), feature_mean, feature_std, rating_mean, rating_std)


def _table(values: np.ndarray, what: str) -> np.ndarray:
    """``values`` as float64 (clips, columns) without NaN or infinity."""
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or not values.size:
        raise InputError(f"{what} of shape {values.shape} are no table (clips, columns); give one row per clip.")
    if len(bad := np.argwhere(~np.isfinite(values))):
        raise InputError(f"{what} hold {len(bad)} values that are NaN or infinite, first in row {bad[0][0]}, column "
                         f"{bad[0][1]}; leave those clips out or repair their recording.")  # fmt: skip
    return values


def _moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per column; a constant column is left at 0 by a deviation of 1."""
    std = values.std(axis=0)
    return values.mean(axis=0), np.where(std > 1e-9, std, 1.0)


def _standard(features: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    return np.clip((features - mean) / std, -_EXTREME, _EXTREME)
