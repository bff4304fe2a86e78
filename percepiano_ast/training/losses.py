"""Rating losses, and the weights of the groups of dimensions: G tasks on one encoder (three for
PercePiano), weighted in one of three ways.

* ``equal``: all dimensions have the same weight, so a group is weighted by its share of the K
  dimensions.
* ``uncertainty``: a learned log variance s of each group; its loss L becomes (exp(-s) L + s) / 2
  (Kendall, Gal and Cipolla 2018, "Multi-Task Learning Using Uncertainty to Weigh Losses", equation
  7, in the stable form of section 3.2's end).
* ``dwa``, dynamic weight averaging: a group whose loss decreased less gets a larger weight. With r
  the ratio of a group's losses in the last two epochs and K groups, its weight is K softmax(r /
  temperature), and 1 in the first two epochs (Liu, Johns and Davison 2019, "End-to-End Multi-Task
  Learning with Attention", equation 7). The losses come from the history, which every checkpoint
  holds, so a resumed run computes the same weights as an uninterrupted one.
"""

import jax
import jax.numpy as jnp
import numpy as np

from percepiano_ast.config import WEIGHTINGS, FinetuneConfig, lookup
from percepiano_ast.dimensions import PERCEPIANO, Questionnaire
from percepiano_ast.errors import InputError


def columns(questionnaire: Questionnaire = PERCEPIANO) -> tuple[str, ...]:
    """Names of the history's loss columns, one per group."""
    return tuple(f"loss_{group}" for group, _ in questionnaire.groups)


def check(config: FinetuneConfig) -> None:
    """Raises InputError for an unknown weighting, or one that is incompatible with a predicted
    uncertainty."""
    lookup(dict.fromkeys(WEIGHTINGS), config.weighting, "weighting of losses")
    if config.weighting != "equal" and config.predict_uncertainty:
        raise InputError(
            f"weighting {config.weighting!r} compares squared errors, but a predicted uncertainty"
            " minimises negative log likelihoods, which already weight every rating. Choose"
            " weighting 'equal', or no predicted uncertainty"
        )


def errors(rated: jax.Array, log_variance: jax.Array | None, ratings: jax.Array) -> jax.Array:
    """Squared errors (B, K), or with ``log_variance`` negative log likelihoods without the constant
    term (Nix and Weigend 1994, equation 5)."""
    squared = jnp.square(rated - ratings)
    return (
        squared if log_variance is None else 0.5 * (log_variance + squared * jnp.exp(-log_variance))
    )


def by_group(
    errors: jax.Array, weights: jax.Array, questionnaire: Questionnaire = PERCEPIANO
) -> jax.Array:
    """Mean over clips (weighted, (B,)) and over each group's dimensions: (B, K) -> (G,)."""
    of_dimensions = (errors * weights[:, None]).mean(axis=0)
    return jnp.stack(
        [of_dimensions[jnp.asarray(indices)].mean() for _, indices in questionnaire.groups]
    )


def total(
    groups: jax.Array,
    group_weights: jax.Array,
    log_variance: jax.Array | None,
    questionnaire: Questionnaire = PERCEPIANO,
) -> jax.Array:
    """The training loss.

    Args:
        groups: losses (G,), see `by_group`.
        group_weights: (G,) of this epoch, see `dynamic_weights`.
        log_variance: (G,), learned, or None; see the module's docstring.
    """
    if log_variance is not None:
        groups = 0.5 * (jnp.exp(-log_variance) * groups + log_variance)
    shares = np.array(
        [len(indices) / len(questionnaire.dimensions) for _, indices in questionnaire.groups],
        np.float32,
    )
    return jnp.sum(groups * group_weights * shares)


def dynamic_weights(
    config: FinetuneConfig, history: list[dict], questionnaire: Questionnaire = PERCEPIANO
) -> np.ndarray:
    """Weights (G,) of the groups in the epoch after ``history``, which has one row per epoch with
    `columns`."""
    names = columns(questionnaire)
    if config.weighting != "dwa" or len(history) < 2:
        return np.ones(len(names), np.float32)
    last, before = (np.array([row[name] for name in names]) for row in (history[-1], history[-2]))
    powers = np.exp(last / before / config.dwa_temperature)
    return (len(names) * powers / powers.sum()).astype(np.float32)


def temperature(errors: np.ndarray, deviations: np.ndarray) -> float:
    """Maximum-likelihood factor for the predicted standard deviations, one for all clips and
    dimensions.

    Temperature scaling (Guo et al. 2017, section 4.2). It has a closed form for a normal
    distribution: the root mean square of the standardised errors (Laves et al. 2020, equation 8).
    """
    return float(np.sqrt(np.mean(np.square(np.float64(errors) / deviations))))


def calibrated(deviations: np.ndarray, errors: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Calibrated standard deviations (n, K) of held-out clips: each fold's, times the `temperature`
    of the other folds.

    The other folds' clips all belong to this fold's training part, and their predictions come from
    models that were not trained on them. They serve as validation data without further training,
    and a fold's ratings do not affect its own uncertainty.
    """
    result = np.full_like(deviations, np.nan)
    for number in np.unique(fold[fold >= 0]):
        others = (fold >= 0) & (fold != number)
        result[fold == number] = deviations[fold == number] * temperature(
            errors[others], deviations[others]
        )
    return result
