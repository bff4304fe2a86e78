"""Feed-forward baselines that predict ratings from the classic features of a clip.

In tables, ``mlp`` is one network for all dimensions (multi-task) and ``mlp-single`` one network per
dimension.
"""

import functools
from dataclasses import dataclass
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from percepiano_ast.errors import InputError

BATCH_SIZE = 64
_VALIDATION_SHARE = 0.15


class _Network(nn.Module):
    """Dense - GELU - Dropout for each hidden width, then Dense."""

    hidden: tuple[int, ...]
    outputs: int
    dropout: float

    @nn.compact
    def __call__(self, features: jax.Array, *, deterministic: bool) -> jax.Array:
        x = features
        for width in self.hidden:
            x = nn.Dropout(self.dropout, deterministic=deterministic)(nn.gelu(nn.Dense(width)(x)))
        return nn.Dense(self.outputs)(x)


@dataclass(frozen=True)
class MLP:
    """A fitted baseline: the network, and the training statistics for standardising its inputs and
    outputs."""

    network: _Network
    params: dict
    feature_mean: np.ndarray
    feature_std: np.ndarray
    rating_mean: np.ndarray
    rating_std: np.ndarray
    epochs: int  # the epoch of these weights

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Features (n, n_features) -> ratings float32 (n, n_dimensions).

        Raises:
            InputError: NaN, or another number of features than in training.
        """
        features = _table(features, "features")
        if features.shape[1] != len(self.feature_mean):
            raise InputError(
                f"{features.shape[1]} features per clip, but the baseline was fitted on"
                f" {len(self.feature_mean)}. Extract them with the version used for fitting."
            )
        standard = (features - self.feature_mean) / self.feature_std
        out = self.network.apply({"params": self.params}, standard, deterministic=True)
        return np.asarray(out) * self.rating_std + self.rating_mean


def fit_mlp(
    features: np.ndarray,
    ratings: np.ndarray,
    *,
    seed: int,
    groups: np.ndarray | None = None,
    hidden: tuple[int, ...] = (128, 64),
    dropout: float = 0.3,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-2,
    max_epochs: int = 200,
    patience: int = 20,
) -> MLP:
    """Fit the baseline with AdamW on the mean squared error of standardised ratings, with early
    stopping.

    Args:
        features: (n_clips, n_features).
        ratings: (n_clips, n_dimensions), 0 to 1.
        seed: for the inner validation set, the weights, the order of clips and the dropout.
        groups: (n_clips,) labels such as the content group; the inner validation set (15 %)
            consists of whole groups. By default every clip is its own group.
        hidden: widths of the hidden layers.
        dropout, learning_rate, weight_decay: of the training.
        max_epochs: largest number of epochs.
        patience: epochs without a lower validation error before stopping; the result has the best
            epoch's weights.

    Raises:
        InputError: NaN, tables of different lengths, or fewer than two groups.
    """
    features, ratings, groups = _aligned(features, ratings, groups)
    rng = np.random.default_rng(seed)
    held_out = _hold_out(groups, rng)
    statistics = _statistics(features[~held_out]) + _statistics(ratings[~held_out])
    x = (features - statistics[0]) / statistics[1]
    y = (ratings - statistics[2]) / statistics[3]
    trainer = _Trainer(
        _Network(tuple(hidden), ratings.shape[1], dropout), learning_rate, weight_decay
    )
    train, validation = ((x[rows], y[rows]) for rows in (~held_out, held_out))
    params, epochs = _train(trainer, train, validation, rng, max_epochs, patience)
    return MLP(trainer.network, params, *statistics, epochs)


@dataclass(frozen=True)
class SingleTasks:
    """One network per dimension, in the order of dimensions."""

    models: tuple[MLP, ...]

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Features (n, n_features) -> ratings float32 (n, n_dimensions); raises as `MLP.predict`
        does."""
        return np.concatenate([model.predict(features) for model in self.models], axis=1)


def fit_single_tasks(
    features: np.ndarray,
    ratings: np.ndarray,
    *,
    seed: int,
    groups: np.ndarray | None = None,
    **options,
) -> SingleTasks:
    """`fit_mlp` for each dimension separately, with separate early stopping on the same inner
    validation set.

    Raises:
        InputError: as in `fit_mlp`.
    """
    ratings = _table(ratings, "ratings")
    columns = (ratings[:, [column]] for column in range(ratings.shape[1]))
    return SingleTasks(
        tuple(fit_mlp(features, column, seed=seed, groups=groups, **options) for column in columns)
    )


def _aligned(features, ratings, groups) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The arguments of `fit_mlp` as checked arrays with one row per clip."""
    features, ratings = _table(features, "features"), _table(ratings, "ratings")
    groups = np.arange(len(features)) if groups is None else np.asarray(groups)
    if not len(features) == len(ratings) == len(groups):
        raise InputError(
            f"{len(features)} rows of features, {len(ratings)} of ratings and {len(groups)} groups"
            " do not match; give one row of each per clip."
        )
    return features, ratings, groups


def _table(values: np.ndarray, what: str) -> np.ndarray:
    """``values`` as a float32 table without NaN or infinity."""
    values = np.asarray(values, np.float32)
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


def _statistics(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per column; 1 for constant columns, which become 0."""
    std = values.std(axis=0)
    return values.mean(axis=0), np.where(std > 1e-8, std, np.float32(1.0))


def _hold_out(groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Bool (n,), True for the inner validation set: whole groups, in random order, until it reaches
    its share."""
    names = rng.permutation(np.unique(groups))
    if len(names) < 2:
        raise InputError(
            f"{len(names)} group cannot be split into training and validation; give clips of two or"
            " more."
        )
    sizes = np.array([(groups == name).sum() for name in names])
    before = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    chosen = names[before < _VALIDATION_SHARE * len(groups)]
    return np.isin(groups, chosen[: len(names) - 1])


@dataclass(frozen=True)
class _Trainer:
    """Network and hyperparameters of a training step; hashable, so that the folds of a
    cross-validation share one compilation."""

    network: _Network
    learning_rate: float
    weight_decay: float

    @property
    def optimizer(self) -> optax.GradientTransformation:
        return optax.adamw(self.learning_rate, weight_decay=self.weight_decay)


@functools.partial(jax.jit, static_argnums=0)
def _start(trainer: _Trainer, rng: jax.Array, x: jax.Array) -> tuple:
    """Initial params, opt_state."""
    params = trainer.network.init(rng, x, deterministic=True)["params"]
    return params, trainer.optimizer.init(params)


@functools.partial(jax.jit, static_argnums=0)
def _step(
    trainer: _Trainer, params: dict, opt_state: tuple, rng: jax.Array, x: jax.Array, y: jax.Array
) -> tuple:
    """One AdamW step -> params, opt_state."""

    def objective(params: dict) -> jax.Array:
        out = cast(
            jax.Array,
            trainer.network.apply(
                {"params": params}, x, deterministic=False, rngs={"dropout": rng}
            ),
        )
        return jnp.square(out - y).mean()

    updates, opt_state = trainer.optimizer.update(jax.grad(objective)(params), opt_state, params)
    return optax.apply_updates(params, updates), opt_state


@functools.partial(jax.jit, static_argnums=0)
def _error(trainer: _Trainer, params: dict, x: jax.Array, y: jax.Array) -> jax.Array:
    """Mean squared error without dropout."""
    out = cast(jax.Array, trainer.network.apply({"params": params}, x, deterministic=True))
    return jnp.square(out - y).mean()


def _train(
    trainer, train, validation, rng: np.random.Generator, max_epochs: int, patience: int
) -> tuple[dict, int]:
    """Training with early stopping -> best params, their epoch."""
    x, y = train
    init_key, dropout_key = jax.random.split(jax.random.key(int(rng.integers(2**31))))
    params, opt_state = _start(trainer, init_key, x[:1])
    steps = max(1, len(x) // BATCH_SIZE)  # full batches only: one shape, one compilation
    best, best_error, best_epoch = params, np.inf, 0
    for epoch in range(1, max_epochs + 1):
        order = rng.permutation(len(x))
        for step in range(steps):
            rows = order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
            step_key = jax.random.fold_in(dropout_key, epoch * steps + step)
            params, opt_state = _step(trainer, params, opt_state, step_key, x[rows], y[rows])
        error = float(_error(trainer, params, *validation))
        if error < best_error:
            best, best_error, best_epoch = params, error, epoch
        elif epoch - best_epoch >= patience:
            break
    return best, best_epoch
