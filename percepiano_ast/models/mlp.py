"""Feed-forward baselines on the classic features of a clip: in tables, ``mlp`` is one network for
all dimensions (multi-task), ``mlp-single`` one network per dimension."""

import functools
from collections.abc import Callable
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
    """A fitted network, with the training statistics that standardise its inputs and outputs."""

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
        features = finite_table(features, "features")
        if features.shape[1] != len(self.feature_mean):
            raise InputError(
                f"{features.shape[1]} features per clip, but the baseline was fitted on"
                f" {len(self.feature_mean)}. Extract them with the version used for fitting."
            )
        standard = (features - self.feature_mean) / self.feature_std
        out = self.network.apply({"params": self.params}, standard, deterministic=True)
        return np.asarray(out) * self.rating_std + self.rating_mean


@dataclass(frozen=True)
class SingleTasks:
    """One network per dimension, in the order of dimensions."""

    models: tuple[MLP, ...]

    def predict(self, features: np.ndarray) -> np.ndarray:
        """As `MLP.predict`."""
        return np.concatenate([model.predict(features) for model in self.models], axis=1)


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
        features, ratings: (n_clips, n_features) and (n_clips, n_dimensions), 0 to 1.
        seed: for the inner validation set, the weights, the order of clips and the dropout.
        groups: (n_clips,) labels such as the content group; the inner validation set (15 %)
            consists of whole groups. By default every clip is its own group.
        patience: epochs without a lower validation error before stopping at the best epoch.

    Raises:
        InputError: NaN, tables of different lengths, or fewer than two groups.
    """
    features, ratings = finite_table(features, "features"), finite_table(ratings, "ratings")
    groups = np.arange(len(features)) if groups is None else np.asarray(groups)
    if not len(features) == len(ratings) == len(groups):
        raise InputError(
            f"{len(features)} rows of features, {len(ratings)} of ratings and {len(groups)} groups"
            " do not match; give one row of each per clip."
        )
    rng = np.random.default_rng(seed)
    held_out = _hold_out(groups, rng)
    statistics = _statistics(features[~held_out]) + _statistics(ratings[~held_out])
    x = (features - statistics[0]) / statistics[1]
    y = (ratings - statistics[2]) / statistics[3]
    (x, x_val), (y, y_val) = ((table[~held_out], table[held_out]) for table in (x, y))

    network = _Network(tuple(hidden), ratings.shape[1], dropout)
    start, train_step, validation_error = _compiled(network, learning_rate, weight_decay)
    init_key, dropout_key = jax.random.split(jax.random.key(int(rng.integers(2**31))))
    params, opt_state = start(init_key, x[:1])
    steps = max(1, len(x) // BATCH_SIZE)  # full batches only: one shape, one compilation
    best, best_error, best_epoch = params, np.inf, 0
    for epoch in range(1, max_epochs + 1):
        order = rng.permutation(len(x))
        for step in range(steps):
            rows = order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
            step_key = jax.random.fold_in(dropout_key, epoch * steps + step)
            params, opt_state = train_step(params, opt_state, step_key, x[rows], y[rows])
        error = float(validation_error(params, x_val, y_val))
        if error < best_error:
            best, best_error, best_epoch = params, error, epoch
        elif epoch - best_epoch >= patience:
            break
    return MLP(network, best, *statistics, best_epoch)


def fit_single_tasks(features: np.ndarray, ratings: np.ndarray, **options) -> SingleTasks:
    """`fit_mlp` with its options and errors for each dimension separately: early stopping differs,
    the inner validation set is the same."""
    columns = np.hsplit(finite_table(ratings, "ratings"), np.shape(ratings)[1])
    return SingleTasks(tuple(fit_mlp(features, column, **options) for column in columns))


@functools.cache  # so that the folds of a cross-validation share one compilation
def _compiled(
    network: _Network, learning_rate: float, weight_decay: float
) -> tuple[Callable, Callable, Callable]:
    """Initialisation, AdamW step, and mean squared error without dropout."""
    optimizer = optax.adamw(learning_rate, weight_decay=weight_decay)

    def start(rng: jax.Array, x: jax.Array) -> tuple:
        params = network.init(rng, x, deterministic=True)["params"]
        return params, optimizer.init(params)

    def error(params: dict, x: jax.Array, y: jax.Array, rng: jax.Array | None = None) -> jax.Array:
        rngs = None if rng is None else {"dropout": rng}
        out = network.apply({"params": params}, x, deterministic=rng is None, rngs=rngs)
        return jnp.square(cast(jax.Array, out) - y).mean()

    def step(params: dict, opt_state: tuple, rng: jax.Array, x: jax.Array, y: jax.Array) -> tuple:
        gradient = jax.grad(error)(params, x, y, rng)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return jax.jit(start), jax.jit(step), jax.jit(error)


def finite_table(values: np.ndarray, what: str, dtype: type = np.float32) -> np.ndarray:
    """``values`` as an array (clips, columns) of ``dtype``.

    Raises:
        InputError: another shape, or NaN or infinity; the message calls the values ``what``.
    """
    values = np.asarray(values, dtype)
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
