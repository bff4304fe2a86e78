"""SSAST pre-training (Gong et al. 2022): masked spectrogram patches, discriminative and generative, on any device.

Batches come in as iterators of uint8 codes (batch, time, mel); see ``data/batches.py``.
"""

import functools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from percepiano_ast.config import FrontEnd, InputError, ModelConfig, PretrainConfig, Statistics, claim_directory
from percepiano_ast.models import ssast
from percepiano_ast.training import history
from percepiano_ast.training.checkpoints import Checkpoints
from percepiano_ast.training.state import (
    TrainState,
    apply_gradients,
    compute_dtype,
    count_parameters,
    make_optimizer,
    new_state,
    normalise,
    require_finite,
)

LOSSES = ("loss", "nce", "mse", "accuracy")


@dataclass(frozen=True)
class Pretraining:
    """Everything that one pre-training step depends on."""

    model: ModelConfig
    config: PretrainConfig
    front_end: FrontEnd
    statistics: Statistics
    total_steps: int

    @functools.cached_property
    def module(self) -> ssast.SSAST:
        """The Flax module, computing in the hardware's type."""
        return ssast.SSAST(self.model, dtype=compute_dtype())

    @functools.cached_property
    def optimizer(self):
        """AdamW with warm-up and cosine over the whole run."""
        return make_optimizer(self.config, self.total_steps)

    def init(self) -> TrainState:
        """The state before the first step, from the seed."""
        codes = jnp.zeros((1, self.model.n_frames, self.model.n_mels), jnp.uint8)
        mask = jnp.zeros((1, self.config.num_masked(self.model)), jnp.int32)
        rng = jax.random.key(self.config.seed)
        params = jax.jit(self.module.init)(rng, normalise(codes, self.front_end, self.statistics), mask)["params"]
        return new_state(params, self.optimizer)

    def losses(self, params: dict, codes: jax.Array, rng: jax.Array) -> dict[str, jax.Array]:
        """Both objectives on one batch under freshly drawn masks: float32 scalars ``LOSSES``."""
        mask = self.sample_mask(rng, codes.shape[0])
        log_mel = normalise(codes, self.front_end, self.statistics)
        outputs, _ = self.module.apply({"params": params}, log_mel, mask)
        config = self.config
        return ssast.losses(outputs, generative_weight=config.generative_weight, softmax_over=config.softmax_over)

    def sample_mask(self, rng: jax.Array, batch: int) -> jax.Array:
        """Indices of masked patches, int32 (batch, masked)."""
        masked = self.config.num_masked(self.model)
        return ssast.sample_mask_index(rng, batch, self.model.grid, masked, self.config.cluster)

    @functools.cached_property
    def step(self) -> Callable[[TrainState, jax.Array], tuple[TrainState, dict]]:
        """Jitted training step; the state that goes in is donated. Step k draws its masks from ``fold_in(key, k)``."""

        @functools.partial(jax.jit, donate_argnums=0)
        def step(state: TrainState, codes: jax.Array):
            rng = jax.random.fold_in(jax.random.key(self.config.seed), state.step)

            def objective(params):
                losses = self.losses(params, codes, rng)
                return losses["loss"], losses

            gradients, losses = jax.grad(objective, has_aux=True)(state.params)
            return apply_gradients(state, gradients, self.optimizer), losses

        return step

    @functools.cached_property
    def validation(self) -> Callable[[dict, jax.Array, jax.Array], dict]:
        """Jitted losses without a step."""
        return jax.jit(self.losses)


def pretrain(
    model: ModelConfig,
    config: PretrainConfig,
    front_end: FrontEnd,
    statistics: Statistics,
    *,
    batches: Callable[[int], Iterator[np.ndarray]],
    steps_per_epoch: int,
    validation: Callable[[], Iterable[np.ndarray]],
    directory: str | Path,
    description: dict,
    log: Callable[[str], None] = print,
) -> list[dict]:
    """Pre-train, checkpoint every epoch, resume from the newest whole checkpoint; returns the history.

    Args:
        batches: ``batches(k)`` yields the batches of step k, k + 1, ...
        validation: yields the validation batches, the same ones every time.
        description: travels with every checkpoint (source, licence, ...).

    Raises:
        InputError: ``directory`` holds a run of another configuration.
        FloatingPointError: the loss is no longer a number; names the step.
    """
    settings = {"model": asdict(model), "pretrain": asdict(config), "front_end": asdict(front_end)}
    settings |= {"statistics": asdict(statistics), **description}
    directory = claim_directory(directory, {**settings, "steps_per_epoch": steps_per_epoch})
    run = Pretraining(model, config, front_end, statistics, config.epochs * steps_per_epoch)
    state = run.init()
    log(f"SSAST {model.name}: {count_parameters(state.params):,} parameters, {run.total_steps} steps")
    checkpoints = Checkpoints(directory / "checkpoints", log=log)
    state, rows = _resume(checkpoints, state, directory / "history.csv", log)
    started, first = time.monotonic(), len(rows)
    stream = batches(first * steps_per_epoch) if first < config.epochs else iter(())
    for epoch in range(first, config.epochs):
        state, means = _epoch(run, state, stream, steps_per_epoch)
        row = {"epoch": epoch + 1, "step": int(state.step), **means, **_validate(run, state.params, validation())}
        # A last gradient that is no number would not show in the epoch's losses, but break the checkpoint.
        require_finite([row["validation_loss"]], row["step"])
        rows.append(row | {"seconds": round(time.monotonic() - started, 1)})
        checkpoints.save(row["step"], {"state": state}, {**settings, "epoch": epoch + 1, "history": rows})
        history.write(directory / "history.csv", rows)
        left = (time.monotonic() - started) / (epoch + 1 - first) * (config.epochs - epoch - 1)
        log(f"  epoch {epoch + 1}/{config.epochs}: {_show(row)}, about {left:.0f} s left")
    return rows


def _resume(checkpoints: Checkpoints, state: TrainState, path: Path, log) -> tuple[TrainState, list[dict]]:
    found = checkpoints.latest()
    if found is None:
        return state, []
    log(f"  resuming after epoch {found['epoch']}")
    history.write(path, found["history"])
    return checkpoints.restore(found["step"], {"state": state})["state"], found["history"]


def _epoch(run: Pretraining, state: TrainState, stream: Iterator, steps: int) -> tuple[TrainState, dict]:
    collected = []
    for _ in range(steps):
        state, losses = run.step(state, next(stream))
        collected.append(losses)
    values = {name: [float(losses[name]) for losses in collected] for name in LOSSES}
    require_finite(values["loss"], int(state.step) - steps + 1)
    return state, {name: float(np.mean(values[name])) for name in LOSSES}


def _validate(run: Pretraining, params: dict, batches: Iterable[np.ndarray]) -> dict[str, float]:
    # The masks of validation are the same every time, and none of training's: they come from another stream.
    key = jax.random.fold_in(jax.random.key(run.config.seed), np.uint32(2**32 - 1))
    losses = [run.validation(params, codes, jax.random.fold_in(key, k)) for k, codes in enumerate(batches)]
    if not losses:
        raise InputError("the validation split does not fill one batch; choose a smaller batch size")
    return {f"validation_{name}": float(np.mean([float(one[name]) for one in losses])) for name in LOSSES}


def _show(row: dict) -> str:
    return (
        f"loss {row['loss']:.3f} (validation {row['validation_loss']:.3f}), InfoNCE {row['nce']:.3f}, "
        f"MSE {row['mse']:.4f}, accuracy {100 * row['accuracy']:.1f} %"
    )


def reconstruction(run: Pretraining, params: dict, codes: np.ndarray, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Original, masked and reconstructed windows in dB, each (batch, time, mel), for the figure of notebook 02."""
    mask = run.sample_mask(jax.random.key(seed), len(codes))
    log_mel = normalise(jnp.asarray(codes), run.front_end, run.statistics)
    outputs, _ = jax.jit(run.module.apply)({"params": params}, log_mel, mask)
    masked, rebuilt = ssast.reconstruct(log_mel, outputs["generative"], mask, run.model)
    scale, mean = 2 * run.statistics.std_db, run.statistics.mean_db
    return tuple(np.asarray(values, np.float32) * scale + mean for values in (log_mel, masked, rebuilt))
