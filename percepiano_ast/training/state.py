"""Training state, optimiser and what every step needs: levels from codes, step randomness, the compute type."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from percepiano_ast.config import FinetuneConfig, FrontEnd, PretrainConfig, Statistics


@struct.dataclass
class TrainState:
    """What a checkpoint holds. The random stream is ``fold_in(key(seed), step)``, so the step is all of it."""

    step: jax.Array
    params: dict
    opt_state: optax.OptState


def compute_dtype() -> jnp.dtype:
    """bfloat16 where the hardware multiplies in it (TPU, Ampere and newer), else float32; parameters stay float32."""
    device = jax.devices()[0]
    if device.platform == "tpu":
        return jnp.bfloat16
    if device.platform == "gpu" and float(getattr(device, "compute_capability", 0)) >= 8:
        return jnp.bfloat16
    return jnp.float32


def normalise(codes: jax.Array, front_end: FrontEnd, statistics: Statistics) -> jax.Array:
    """uint8 codes (..., time, mel) -> what the model hears, ``(dB - mean) / (2 std)`` (Gong et al. 2021)."""
    level = codes.astype(jnp.float32) * front_end.step_db + front_end.floor_db
    return (level - statistics.mean_db) / (2 * statistics.std_db)


def learning_rate(config: PretrainConfig | FinetuneConfig, total_steps: int) -> optax.Schedule:
    """Linear warm-up (at most a tenth of the run), then a cosine to zero."""
    warmup = min(config.warmup_steps, max(total_steps // 10, 1))
    return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, max(total_steps, warmup + 1))


def make_optimizer(config: PretrainConfig | FinetuneConfig, total_steps: int) -> optax.GradientTransformation:
    """AdamW with clipping by global norm; biases, norms and other vectors do not decay."""

    def decays(params):
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    schedule = learning_rate(config, total_steps)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(schedule, *config.betas, weight_decay=config.weight_decay, mask=decays),
    )


def new_state(params: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """State before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def apply_gradients(state: TrainState, gradients: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """One optimiser step."""
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)


def require_finite(losses: list[float], step: int) -> None:
    """Check the losses of consecutive steps, the first of which is ``step``, counted from 1.

    Raises:
        FloatingPointError: one is no number; names the first such step.
    """
    for number, loss in enumerate(losses, step):
        if not np.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {number}; lower the learning rate")


def count_parameters(params: dict) -> int:
    """Number of values in a parameter tree."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
