"""Pre-training with any of `objectives.OBJECTIVES`, on any device.

Batches come in as iterators of dicts. They hold ``codes`` (batch, time, mel), uint8 or float16 dB,
this process's rows; ``clip``, a name for each row; and further inputs of the objective, see
``data/batches.py``. `loop` runs the training steps.
"""

import collections
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from percepiano_ast.config import (
    Execution,
    FrontEnd,
    ModelConfig,
    PretrainConfig,
    Statistics,
    lookup,
)
from percepiano_ast.errors import InputError, RunFailed
from percepiano_ast.files import claim_directory, echo
from percepiano_ast.models import ssast
from percepiano_ast.training import augment, parallel
from percepiano_ast.training.checkpoints import SAVE_MINUTES, Checkpoints
from percepiano_ast.training.loop import Loop
from percepiano_ast.training.objectives import Objective, objective_of
from percepiano_ast.training.state import (
    TrainState,
    compute_for,
    learning_rate,
    make_optimizer,
    new_state,
    normalise,
    published_optimizer,
    train_step,
)

# Folded into a key; steps, batches and clips use small numbers, so this one does not collide.
_OTHER_STREAM = np.uint32(2**32 - 1)


@dataclass(frozen=True)
class Pretraining:
    """Configuration and functions of a pre-training run.

    Attributes:
        model, config, front_end, statistics, total_steps: determine the training.
        execution, layout: how and where it is computed; by default on all devices.
        num_descriptors: number of descriptors of a window to predict along with the notes; 0 for
            none.
    """

    model: ModelConfig
    config: PretrainConfig
    front_end: FrontEnd
    statistics: Statistics
    total_steps: int
    execution: Execution = Execution()
    layout: parallel.Layout = field(default_factory=parallel.Layout.over)
    num_descriptors: int = 0

    @functools.cached_property
    def objective(self) -> Objective:
        """The objective, computing in the precision chosen for the hardware."""
        compute = compute_for(self.execution, self.layout.device, self.layout.size)
        return objective_of(self.model, self.config, compute, self.num_descriptors)

    @property
    def module(self) -> nn.Module:
        """The objective's Flax module; for the joint objective, the SSAST."""
        return self.objective.module

    @functools.cached_property
    def schedule(self):
        """Learning rate by step: warm-up and cosine over the whole run."""
        return learning_rate(self.config, self.total_steps)

    @functools.cached_property
    def optimizer(self):
        """The optimiser named in the configuration."""
        make = {
            "adamw": lambda: make_optimizer(self.config, self.total_steps),
            "published": lambda: published_optimizer(self.schedule),
        }
        return lookup(make, self.config.optimizer, "optimizer")()

    def _first_state(self) -> TrainState:
        codes = jnp.zeros((1, self.model.n_frames, self.model.n_mels), jnp.uint8)
        params = self.objective.init(
            jax.random.key(self.config.seed), normalise(codes, self.front_end, self.statistics)
        )
        return new_state(params, self.optimizer, ema=self.config.ema_decay > 0)

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes and types of the state."""
        return jax.eval_shape(self._first_state)

    def init(self) -> TrainState:
        """The state before the first step, initialised from the seed."""
        return jax.jit(self._first_state, out_shardings=self.layout.of_state(self.abstract_state))()

    def hear(self, batch: dict) -> jax.Array:
        """Normalised windows (B, T, F) of a batch's ``codes``, augmented if the batch has
        ``augment``."""
        log_mel = normalise(batch["codes"], self.front_end, self.statistics)
        seconds = self.front_end.seconds(1)
        return (
            augment.apply(log_mel, batch["augment"], self.statistics, seconds)
            if "augment" in batch
            else log_mel
        )

    def draw(self, rng: jax.Array, batch: int) -> dict:
        """All random values for the clips of one step."""
        drawn = self.objective.draw(rng, batch)
        return (
            drawn | {"augment": augment.draw(jax.random.fold_in(rng, _OTHER_STREAM), batch)}
            if self.config.augment
            else drawn
        )

    @functools.cached_property
    def step(self) -> jax.stages.Wrapped:
        """Jitted training step, (state, batch) -> (state, metrics); the input state is donated.

        Step k draws from ``fold_in(key, k)``.

        The batch is a dict without its ``clip``.

        Raises:
            InputError: devices and micro-batches do not divide the batch.
        """
        layout, execution = self.layout, self.execution
        layout.check_batch(self.config.batch_size, execution.accumulate)

        def objective(params, part):
            losses = self.objective.losses(params, self.hear(part), part)
            return losses["loss"], losses

        def step(state: TrainState, batch: dict):
            rng = jax.random.fold_in(jax.random.key(self.config.seed), state.step)
            return train_step(
                state,
                batch | self.draw(rng, len(batch["codes"])),
                objective,
                self.optimizer,
                accumulate=execution.accumulate,
                half=self.module.compute.dtype == jnp.float16,
                ema_decay=self.config.ema_decay,
            )

        shardings = layout.of_state(self.abstract_state)
        return jax.jit(
            step,
            donate_argnums=0,
            in_shardings=(shardings, layout.sharding(parallel.DATA)),
            out_shardings=(shardings, layout.sharding()),
        )

    @functools.cached_property
    def measure(self) -> Callable[[dict, dict, jax.Array], dict]:
        """Jitted `Objective.measure` of a batch without augmentation: params, batch, rng -> scalars
        to be summed."""

        def measure(params, batch, rng):
            batch = batch | self.objective.draw(rng, len(batch["codes"]))
            return self.objective.measure(params, self.hear(batch), batch)

        return jax.jit(measure)

    def validate(self, params: dict, batches: Iterable[dict]) -> dict[str, float]:
        """The objective's scores over validation batches, named ``validation_...``.

        Raises:
            InputError: there are no batches.
        """
        # The random values are the same in every validation, and independent of those in training.
        key = jax.random.fold_in(jax.random.key(self.config.seed), _OTHER_STREAM)
        total: dict[str, float] = collections.defaultdict(float)
        count = 0
        for count, batch in enumerate(batches, 1):
            part = self.measure(params, self.put(batch), jax.random.fold_in(key, count - 1))
            for name, value in part.items():
                total[name] += float(value)
        if not count:
            raise InputError(
                "the validation split does not fill one batch; choose a smaller batch size"
            )
        return {
            f"validation_{name}": value
            for name, value in self.objective.scores(total, count).items()
        }

    def put(self, batch: dict) -> dict:
        """This process's rows of a batch -> the global batch on the devices, without ``clip``."""
        return jax.tree.map(
            self.layout.put_batch, {name: value for name, value in batch.items() if name != "clip"}
        )


def pretrain(
    model: ModelConfig,
    config: PretrainConfig,
    front_end: FrontEnd,
    statistics: Statistics,
    *,
    batches: Callable[[int], Iterator[dict]],
    steps_per_epoch: int,
    validation: Callable[[], Iterable[dict]],
    directory: str | Path,
    description: dict,
    store: str | Path = "",
    save_minutes: float = SAVE_MINUTES,
    execution: Execution = Execution(),
    num_descriptors: int = 0,
    log: Callable[[str], None] = echo,
) -> list[dict]:
    """Pre-train with a checkpoint per epoch, or resume from the newest intact checkpoint; returns
    the history.

    Writes ``history.csv`` (one row per epoch), ``steps.csv`` (one row every few steps) and
    ``checkpoints`` to ``directory``, the checkpoints to ``store`` if it is given.

    Args:
        batches: ``batches(k)`` yields the batches of steps k, k + 1, ...
        validation: yields the validation batches, the same ones every time.
        description: saved with every checkpoint (source, licence, ...).
        store: another folder for the checkpoints, or ``gs://BUCKET/PREFIX``.
        save_minutes: minutes between checkpoints within a long epoch.
        execution: how to compute; may differ when a run is resumed.
        num_descriptors: number of columns of the batches' ``descriptors``; 0 for none.

    Raises:
        InputError: ``directory`` holds a run of another configuration, or the batch cannot be
            divided as requested.
        FloatingPointError: loss, gradient or update is not finite; the message names the step and
            the clips of its batch.
        RunFailed: the batch does not fit into the device's memory.
        StoreFailed: training is complete, but the last checkpoint or the history could not be
            saved.
    """
    settings = {"model": asdict(model), "pretrain": asdict(config), "front_end": asdict(front_end)}
    settings |= {"statistics": asdict(statistics), **description}
    claimed = {**settings, "steps_per_epoch": steps_per_epoch}
    if parallel.is_lead():
        claim_directory(directory, claimed)
    parallel.wait_for_all("directory claimed")
    # the other processes compare with the first one's file
    directory = claim_directory(directory, claimed)
    layout = parallel.Layout.over(shard_params=execution.shard_params)
    run = Pretraining(
        model,
        config,
        front_end,
        statistics,
        config.epochs * steps_per_epoch,
        execution,
        layout,
        num_descriptors,
    )
    log = log if parallel.is_lead() else lambda line: None
    try:
        with Checkpoints(f"{store or directory}/checkpoints", log=log) as checkpoints:
            loop = Loop(run, directory, claimed, checkpoints, save_minutes, log)
            rows = loop.run_epochs(batches, steps_per_epoch, validation)
        if loop.record:
            loop.record.finish()
        return rows
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise RunFailed(
            f"a batch of {config.batch_size} in {execution.accumulate} micro-batches does not fit"
            f" into the memory of {layout.size} x {layout.device.device_kind}: choose"
            f" accumulate={2 * execution.accumulate}{'' if execution.remat else ' or remat=True'}."
            f" The device reports: {str(error).splitlines()[0][:200]}"
        ) from error


def reconstruction(
    run: Pretraining, params: dict, codes: np.ndarray, seed: int = 0
) -> tuple[np.ndarray, ...]:
    """Original, masked and reconstructed windows in dB, each (batch, time, mel), for the figure of
    notebook 02.

    Raises:
        InputError: the objective does not mask patches.
    """
    mask = run.objective.draw(jax.random.key(seed), len(codes)).get("mask")
    if mask is None:
        raise InputError(
            f"pre-training with objective {run.config.objective!r} does not mask patches, so there"
            " is no reconstruction to show. Choose a checkpoint with objective ssast or joint"
        )
    log_mel = normalise(jnp.asarray(codes), run.front_end, run.statistics)
    outputs, _ = jax.jit(run.module.apply)({"params": params}, log_mel, mask)
    masked, rebuilt = ssast.reconstruct(log_mel, outputs["generative"], mask, run.model)
    scale, mean = 2 * run.statistics.std_db, run.statistics.mean_db
    return tuple(
        np.asarray(values, np.float32) * scale + mean for values in (log_mel, masked, rebuilt)
    )
