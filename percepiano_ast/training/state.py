"""Training state, optimisers, precision, and the training step of pre-training and fine-tuning."""

from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import optax
from flax import struct

from percepiano_ast.config import (
    ComputeConfig,
    FinetuneConfig,
    FrontEnd,
    LevelStats,
    PretrainConfig,
)
from percepiano_ast.errors import InputError
from percepiano_ast.models.transformer import Compute, Kernel

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}

# Loss scaling for float16 (Micikevicius et al. 2018, section 3.2), with the usual constants: halved
# after an overflow, doubled after `GROW_AFTER` steps without one.
FIRST_SCALE, GROW_AFTER, LARGEST_SCALE = 2.0**15, 2000, 2.0**24


@struct.dataclass
class TrainState:
    """The content of a checkpoint. The random stream is ``fold_in(key(seed), step)``, so it needs
    no state besides the step.

    Attributes:
        step: number of steps taken.
        params, opt_state: in the structures of Flax and optax.
        ema: moving average of the parameters, or None.
        loss_scale: ``scale`` and ``finite`` (steps since it last changed) for float16, in every
            precision: a run may resume in another one.
        healthy: False after the first loss, gradient or update that is not finite; further steps
            then change nothing.
    """

    step: jax.Array
    params: dict
    opt_state: optax.OptState
    ema: dict | None
    loss_scale: dict[str, jax.Array]
    healthy: jax.Array


def compute_for(config: ComputeConfig, device: jax.Device, devices: int = 1) -> Compute:
    """Precision and attention kernel on so many ``devices``, with ``auto`` resolved: bfloat16 on
    TPUs and GPUs since Ampere, float16 on older GPUs such as the T4, and float32 on a CPU.

    Raises:
        InputError: unknown precision or attention, or one that the device does not support.
    """
    gpu = float(getattr(device, "compute_capability", 0)) if device.platform == "gpu" else 0.0
    precision, attention = config.precision, config.attention
    if precision == "auto":
        modern = device.platform == "tpu" or gpu >= 8
        precision = "bfloat16" if modern else "float16" if gpu >= 7 else "float32"
    if precision not in DTYPES:
        raise InputError(
            f"unknown precision {precision!r}. Choose one of: auto, {', '.join(DTYPES)}"
        )
    fused = gpu >= 8 and precision != "float32"
    # "heads" loops over heads and clips, so it cannot be sharded over devices
    if attention == "auto":
        single = device.platform == "cpu" and devices == 1
        attention = "cudnn" if fused else "heads" if single else "xla"
    if attention not in ("xla", "cudnn", "heads"):
        raise InputError(f"unknown attention {attention!r}. Choose one of: auto, xla, cudnn, heads")
    if attention == "cudnn" and not fused:
        raise InputError(
            "attention 'cudnn' needs a GPU from Ampere on and a 16-bit precision, not"
            f" {device.device_kind} in {precision}. Choose 'xla' or 'auto'"
        )
    return Compute(DTYPES[precision], config.remat, cast(Kernel, attention))


def normalise(codes: jax.Array, front_end: FrontEnd, statistics: LevelStats) -> jax.Array:
    """uint8 codes or float16 dB (..., time, mel) -> model input ``(dB - mean) / (2 std)`` (Gong et
    al. 2021)."""
    level = codes.astype(jnp.float32)
    if codes.dtype == jnp.uint8:
        level = level * front_end.step_db + front_end.floor_db
    return (level - statistics.mean_db) / (2 * statistics.std_db)


def learning_rate(config: PretrainConfig | FinetuneConfig, total_steps: int) -> optax.Schedule:
    """Linear warm-up (at most a tenth of the run), then cosine decay to zero."""
    warmup = min(config.warmup_steps, max(total_steps // 10, 1))
    return optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, warmup, max(total_steps, warmup + 1)
    )


def make_optimizer(
    config: PretrainConfig | FinetuneConfig, total_steps: int
) -> optax.GradientTransformation:
    """AdamW with clipping by global norm; weight decay on kernels only."""

    def decays(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)

    def clip(updates, params=None):
        # optax.clip_by_global_norm with `norm_of`, which the step computes in any case
        norm = norm_of(updates)
        scale = jnp.where(norm < config.clip_norm, 1.0, config.clip_norm / norm)
        return jax.tree.map(lambda leaf: leaf * scale, updates)

    rate = learning_rate(config, total_steps)
    return optax.chain(
        optax.stateless(clip),
        optax.adamw(rate, *config.betas, weight_decay=config.weight_decay, mask=decays),
    )


def norm_of(tree) -> jax.Array:
    """Global L2 norm, with dot products, which are faster than ``optax.tree.norm`` on a CPU."""
    return jnp.sqrt(sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(tree)))


def published_optimizer(
    rate: float | optax.Schedule, *, b1=0.95, b2=0.999, eps=1e-8, weight_decay=5e-7
) -> optax.GradientTransformation:
    """Adam with L2 regularisation in the gradient, as in SSAST's published training code
    (``traintest_mask.py``)."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_adam(b1, b2, eps),
        optax.scale_by_learning_rate(rate),
    )


def new_state(
    params: dict, optimizer: optax.GradientTransformation, *, ema: bool = False
) -> TrainState:
    """State before the first step."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        loss_scale={"scale": jnp.float32(FIRST_SCALE), "finite": jnp.zeros((), jnp.int32)},
        healthy=jnp.ones((), bool),
    )


def train_step(
    state: TrainState,
    batch: dict,
    objective: Callable[[dict, dict], tuple[jax.Array, dict]],
    optimizer: optax.GradientTransformation,
    *,
    accum_steps: int = 1,
    half: bool = False,
    ema_decay: float = 0.0,
) -> tuple[TrainState, dict]:
    """One optimiser step; returns the next state, and the objective's metrics with
    ``gradient_norm``, ``update_norm`` and ``skipped`` (1 after a float16 overflow).

    After an overflow the step counts, but its update is skipped and the loss scale halved. After
    any other loss, gradient or update that is not finite, parameters and step are unchanged and the
    state is no longer ``healthy``.

    Args:
        objective: (params, batch) -> the mean loss over the clips, and metrics that are means too.
        accum_steps: number of micro-batches. One takes every ``accum_steps``-th clip, so that clips
            stay on their devices.
        half: scale the loss for float16 in the backward pass.
    """
    loss_scale, overflow = state.loss_scale, jnp.zeros((), bool)
    scale = loss_scale["scale"]

    def scaled(params, part):
        loss, metrics = objective(params, part)
        return loss * scale if half else loss, metrics

    # --- Gradients
    grad = jax.grad(scaled, has_aux=True)
    if accum_steps == 1:
        gradients, metrics = grad(state.params, batch)
    else:
        parts = jax.tree.map(
            lambda x: x.reshape(-1, accum_steps, *x.shape[1:]).swapaxes(0, 1), batch
        )
        first = jax.tree.map(lambda x: x[0], parts)
        zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(grad, state.params, first))

        def add(total, part):
            return jax.tree.map(jnp.add, total, grad(state.params, part)), None

        total, _ = jax.lax.scan(add, zero, parts)
        gradients, metrics = jax.tree.map(lambda x: x / accum_steps, total)
    if half:
        gradients = jax.tree.map(lambda g: g / scale, gradients)

    # --- Update
    norm = norm_of(gradients)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    moved = norm_of(updates)
    finite = jnp.isfinite(norm) & jnp.isfinite(metrics["loss"]) & jnp.isfinite(moved)
    if half:
        # At scale 1 the loss scale cannot be the cause.
        overflow = ~finite & jnp.isfinite(metrics["loss"]) & (scale > 1)
        count = jnp.where(finite, loss_scale["finite"] + 1, 0)
        grow = count >= GROW_AFTER
        grown = jnp.where(grow, jnp.minimum(2 * scale, LARGEST_SCALE), scale)
        loss_scale = {
            "scale": jnp.where(finite, grown, jnp.maximum(scale / 2, 1.0)),
            "finite": jnp.where(grow, 0, count),
        }
    healthy = state.healthy & (finite | overflow)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        ema = jax.tree.map(lambda old, new: old + (1 - ema_decay) * (new - old), ema, params)
    updated = {"params": params, "opt_state": opt_state, "ema": ema}
    before = {name: getattr(state, name) for name in updated}
    updated = jax.tree.map(lambda new, old: jnp.where(healthy & finite, new, old), updated, before)
    skipped = (healthy & overflow).astype(jnp.float32)
    metrics |= {"gradient_norm": norm, "update_norm": moved, "skipped": skipped}
    step = state.step + healthy.astype(jnp.int32)
    return TrainState(step=step, **updated, loss_scale=loss_scale, healthy=healthy), metrics
