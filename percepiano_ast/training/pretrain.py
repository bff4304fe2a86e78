"""SSAST pre-training (Gong et al. 2022): masked spectrogram patches, discriminative and generative, on any device.

Batches come in as iterators of dicts with ``codes`` (batch, time, mel), uint8 or float16 dB, the rows of this process,
and ``clip``, a name for each row; see ``data/batches.py``.
"""

import collections
import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from percepiano_ast.config import (
    Execution,
    FrontEnd,
    InputError,
    ModelConfig,
    PretrainConfig,
    RunFailed,
    Statistics,
    choose,
    claim_directory,
    say,
)
from percepiano_ast.models import ssast
from percepiano_ast.training import flops, history, parallel
from percepiano_ast.training.checkpoints import SAVE_MINUTES, Checkpoints, require_room, shown
from percepiano_ast.training.pieces import size_of
from percepiano_ast.training.stores import StoreFailed
from percepiano_ast.training.state import (
    TrainState,
    compute_for,
    count_parameters,
    learning_rate,
    make_optimizer,
    new_state,
    normalise,
    published_optimizer,
    train_step,
)

LOSSES = ("loss", "nce", "mse", "accuracy")
CHECKED = ("loss", "gradient_norm", "update_norm")  # a step is good when they are numbers
METRICS = (*LOSSES, "gradient_norm", "update_norm", "skipped")
# Steps between two looks at the metrics, which wait for the device. Rows of steps.csv are means over as many.
LOOK_EVERY = 20


@dataclass(frozen=True)
class Pretraining:
    """Everything that one pre-training step depends on.

    Attributes:
        model, config, front_end, statistics, total_steps: what is learned.
        execution, layout: how and where it is computed; by default on all devices.
    """

    model: ModelConfig
    config: PretrainConfig
    front_end: FrontEnd
    statistics: Statistics
    total_steps: int
    execution: Execution = Execution()
    layout: parallel.Layout = field(default_factory=parallel.Layout.over)

    @functools.cached_property
    def module(self) -> ssast.SSAST:
        """The Flax module, computing in the hardware's type."""
        compute = compute_for(self.execution, self.layout.device, self.layout.size)
        return ssast.SSAST(self.model, compute, self.config.decoder_depth)

    @functools.cached_property
    def schedule(self):
        """Learning rate by step: warm-up and cosine over the whole run."""
        return learning_rate(self.config, self.total_steps)

    @functools.cached_property
    def optimizer(self):
        """As the configuration names it."""
        make = {
            "adamw": lambda: make_optimizer(self.config, self.total_steps),
            "published": lambda: published_optimizer(self.schedule),
        }
        return choose(make, self.config.optimizer, "optimizer")()

    def _first_state(self) -> TrainState:
        codes = jnp.zeros((1, self.model.n_frames, self.model.n_mels), jnp.uint8)
        mask = jnp.arange(self.config.num_masked(self.model))[None, :]
        log_mel = normalise(codes, self.front_end, self.statistics)
        params = self.module.init(jax.random.key(self.config.seed), log_mel, mask)["params"]
        return new_state(params, self.optimizer, ema=self.config.ema_decay > 0)

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes and types of the state."""
        return jax.eval_shape(self._first_state)

    def init(self) -> TrainState:
        """The state before the first step, from the seed."""
        return jax.jit(self._first_state, out_shardings=self.layout.of_state(self.abstract_state))()

    def losses(self, params: dict, codes: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
        """Both objectives on (B, T, F) codes under (B, M) masks: float32 scalars ``LOSSES``."""
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
        """Jitted training step; the state that goes in is donated. Step k draws its masks from ``fold_in(key, k)``.

        Raises:
            InputError: devices and micro-batches do not divide the batch.
        """
        layout, execution = self.layout, self.execution
        layout.check_batch(self.config.batch_size, execution.accumulate)

        def objective(params, part):
            losses = self.losses(params, part["codes"], part["mask"])
            return losses["loss"], losses

        def step(state: TrainState, codes: jax.Array):
            rng = jax.random.fold_in(jax.random.key(self.config.seed), state.step)
            batch = {"codes": codes, "mask": self.sample_mask(rng, codes.shape[0])}
            return train_step(
                state,
                batch,
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
    def validation(self) -> Callable[[dict, jax.Array, jax.Array], dict]:
        """Jitted losses without a step: params, (B, T, F) codes, rng -> ``LOSSES``."""
        return jax.jit(lambda params, codes, rng: self.losses(params, codes, self.sample_mask(rng, codes.shape[0])))


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
    log: Callable[[str], None] = say,
) -> list[dict]:
    """Pre-train, checkpoint every epoch, resume from the newest whole checkpoint; returns the history.

    Writes ``history.csv`` (a row an epoch), ``steps.csv`` (a row every few steps) and ``checkpoints`` into ``directory``,
    the latter into ``store`` where one is given.

    Args:
        batches: ``batches(k)`` yields the batches of step k, k + 1, ...
        validation: yields the validation batches, the same ones every time.
        description: travels with every checkpoint (source, licence, ...).
        store: another folder for the checkpoints, or ``gs://BUCKET/PREFIX``.
        save_minutes: within a long epoch there is a checkpoint every so many minutes.
        execution: how to compute; a run may be resumed with another one.

    Raises:
        InputError: ``directory`` holds a run of another configuration, or the batch cannot be divided as asked.
        FloatingPointError: loss or gradient is no longer a number; names the step and the clips of its batch.
        RunFailed: the batch does not fit into the device's memory.
        StoreFailed: all is trained, but the last checkpoint or the history did not reach its place.
    """
    settings = {"model": asdict(model), "pretrain": asdict(config), "front_end": asdict(front_end)}
    settings |= {"statistics": asdict(statistics), **description}
    claimed = {**settings, "steps_per_epoch": steps_per_epoch}
    if parallel.is_lead():
        claim_directory(directory, claimed)
    parallel.wait_for_all("directory claimed")
    directory = claim_directory(directory, claimed)  # the others compare with what the lead wrote
    layout = parallel.Layout.over(shard_params=execution.shard_params)
    run = Pretraining(model, config, front_end, statistics, config.epochs * steps_per_epoch, execution, layout)
    log = log if parallel.is_lead() else lambda line: None
    try:
        with Checkpoints(f"{store or directory}/checkpoints", log=log) as checkpoints:
            loop = _Loop(run, directory, claimed, checkpoints, save_minutes, log)
            rows = loop.run_epochs(batches, steps_per_epoch, validation)
        if loop.record:
            loop.record.finish()
        return rows
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise RunFailed(
            f"a batch of {config.batch_size} in {execution.accumulate} micro-batches does not fit into the memory of "
            f"{layout.size} x {layout.device.device_kind}: choose accumulate={2 * execution.accumulate}"
            f"{'' if execution.remat else ' or remat=True'}. The device says: {str(error).splitlines()[0][:200]}"
        ) from error


class _Loop:
    """What a run carries from step to step beside its state."""

    def __init__(self, run: Pretraining, directory: Path, settings: dict, checkpoints: Checkpoints, save_minutes, log):
        self.run, self.directory, self.settings, self.log = run, directory, settings, log
        self.checkpoints, self.save_minutes = checkpoints, save_minutes
        self.saved = time.monotonic()
        self.rows: list[dict] = []  # of the epochs that are over
        self.looks: list[dict] = []  # at the steps of the epoch that is not
        device, dtype = run.layout.device, run.module.compute.dtype
        self.clip_flops = flops.pretrain_flops(run.model, run.config)
        self.peak = run.layout.size * flops.matrix_peak(dtype, device)
        # The batches whose metrics nobody has looked at yet, and those metrics.
        self.unseen: collections.deque[tuple[list[str], dict]] = collections.deque()
        self.looked, self.waited = time.monotonic(), 0.0
        self.record: history.Record | None = None  # in the lead
        self.step: Callable | None = None  # compiled with the first batch

    def run_epochs(self, batches, steps_per_epoch: int, validation) -> list[dict]:
        """All epochs that are left; returns the whole history."""
        run, epochs = self.run, self.run.config.epochs
        run.step  # divides the batch, or says that it cannot, before anything is waited for
        state, done = self._resume()
        parameters, precision = count_parameters(state.params), jnp.dtype(run.module.compute.dtype).name
        self.log(
            f"SSAST {run.model.name}: {parameters:,} parameters, {run.total_steps} steps on {run.layout.size} x "
            f"{run.layout.device.device_kind} in {precision}"
        )
        started, first = time.monotonic(), done
        stream = batches(done) if done < run.total_steps else iter(())
        for epoch in range(done // steps_per_epoch, epochs):
            end = (epoch + 1) * steps_per_epoch
            state, means = self._epoch(state, stream, done, end, steps_per_epoch)
            done = end
            row = {"epoch": epoch + 1, "step": done, **means}
            row |= _validate(run, state.params, validation())
            self.rows.append(row | {"seconds": round(time.monotonic() - started, 1)})
            self._save(state, done, row["validation_loss"])
            left = (time.monotonic() - started) / (done - first) * (run.total_steps - done)
            self.log(f"  epoch {epoch + 1}/{epochs}: {_show(row)}, about {left:.0f} s left")
        return self.rows

    def _resume(self) -> tuple[TrainState, int]:
        """The state to go on from, and the steps that it took."""
        checkpoints, one = self.checkpoints, size_of(self.run.abstract_state)
        most = f"{shown((checkpoints.keep + 2) * one)} (the last {checkpoints.keep}, the best, one on its way)"
        require_room(checkpoints.place, one, most, self.log)
        checkpoints.prepare()
        parallel.wait_for_all("litter removed")
        found = checkpoints.load({"state": self.run.abstract_state}, self.settings)
        tree, kept = found or (None, {"step": 0, "epoch": 0, "history": [], "looks": [], "steps": []})
        parallel.require_same(kept["step"], "the step of the newest checkpoint")
        self.rows, self.looks = kept["history"], kept["looks"]
        if parallel.is_lead():
            self.record = history.Record(self.directory, self.log, kept["steps"], board=True)
        if tree is None:
            return self.run.init(), 0
        within = f" and {sum(look['steps'] for look in self.looks)} steps" if self.looks else ""
        self.log(f"  resuming after epoch {kept['epoch']}{within}")
        if self.record:
            self.record.send(self.rows)
        return self.run.layout.put_state(tree["state"]), kept["step"]

    def _save(self, state: TrainState, step: int, score: float = math.inf) -> None:
        steps = self.record.steps if self.record else []
        progress = {"epoch": len(self.rows), "history": self.rows, "looks": self.looks, "steps": steps}
        description = {**self.settings, "seed": self.run.config.seed, **progress}
        self.checkpoints.save(step, {"state": state}, description, score)
        if self.record:
            self.record.send(self.rows)
        self.saved = time.monotonic()

    def _is_due(self) -> bool:
        """Whether to save within the epoch; not while another checkpoint is on its way."""
        due = time.monotonic() - self.saved >= 60 * self.save_minutes and not self.checkpoints.busy
        return bool(parallel.as_lead_says(due))

    def _epoch(self, state: TrainState, stream: Iterator, done: int, end: int, steps: int) -> tuple[TrainState, dict]:
        self.looked, self.waited = time.monotonic(), 0.0
        for number in range(done + 1, end + 1):
            asked = time.monotonic()
            batch = next(stream)
            self.waited += time.monotonic() - asked
            codes = self.run.layout.put_batch(batch["codes"])
            if self.step is None:
                self._compile(state, codes)
            state, metrics = self.step(state, codes)
            self.unseen.append((batch["clip"], metrics))
            if number % LOOK_EVERY == 0 or number == end:
                self.looks.append(self._look(state, number))
                if number < end and self._is_due():
                    self._save(state, number)
        looks, self.looks = self.looks, []
        weights = [look["steps"] for look in looks]
        means = {name: float(np.average([look[name] for look in looks], weights=weights)) for name in looks[0] if name != "steps"}
        means["skipped"] = round(means["skipped"] * steps)
        return state, means

    def _compile(self, state: TrainState, codes: jax.Array) -> None:
        """Apart from the first step, whose speed would otherwise be that of the compiler."""
        start = time.monotonic()
        self.step = self.run.step.lower(state, codes).compile()
        self.looked, self.waited = time.monotonic(), 0.0
        self.log(f"  the step was compiled in {self.looked - start:.0f} s")

    def _look(self, state: TrainState, last: int) -> dict:
        """Wait for the steps up to ``last``, check them, and note their means."""
        values = jax.device_get([metrics for _, metrics in self.unseen])
        for number, one in enumerate(values, start=last - len(values) + 1):
            if not one["skipped"] and not np.isfinite([one[name] for name in CHECKED]).all():
                self._stop(state, number, one, self.unseen[number - last - 1][0])
        seconds = time.monotonic() - self.looked
        waited, self.waited = self.waited, 0.0
        self.looked = time.monotonic()
        self.unseen.clear()
        means = {name: float(np.mean([one[name] for one in values])) for name in METRICS}
        means["learning_rate"] = float(self.run.schedule(last - 1))
        speed = len(values) * self.run.config.batch_size / seconds
        means |= {"clips_per_second": speed, "mfu": speed * self.clip_flops / self.peak}
        means["input_wait"] = waited / len(values)
        if self.record:
            self.record.add({"step": last, **{name: f"{value:.6g}" for name, value in means.items()}})
        return {"steps": len(values), **means}

    def _stop(self, state: TrainState, number: int, metrics: dict, clips: list[str]) -> None:
        """Keep the last good state, and say at which step and on what the run broke."""
        good = number - 1
        home = self.directory / "stopped"
        named = {"clips": list(clips), **{name: str(metrics[name]) for name in CHECKED}}
        with Checkpoints(home, keep=1, log=self.log) as stopped:
            stopped.save(good, {"state": state}, {**self.settings, "broke_at_step": number, **named})
        if self.record:
            self.record.send(self.rows)
            with contextlib.suppress(StoreFailed):  # has been logged
                self.record.finish()
        shown = ", ".join(clips[:4]) + (f" and {len(clips) - 4} more, listed in {home}" if len(clips) > 4 else "")
        raise FloatingPointError(
            f"the loss is {metrics['loss']:.4g}, the gradient's norm {metrics['gradient_norm']:.4g} and the update's "
            f"{metrics['update_norm']:.4g} at step {number}, on the clips {shown}. The state before it, after {good} steps, is kept in {home}. Lower the learning rate, or look at "
            "those clips"
        )


def _validate(run: Pretraining, params: dict, batches: Iterable[dict]) -> dict[str, float]:
    # The masks of validation are the same every time, and none of training's: they come from another stream.
    key = jax.random.fold_in(jax.random.key(run.config.seed), np.uint32(2**32 - 1))
    losses = [
        run.validation(params, run.layout.put_batch(batch["codes"]), jax.random.fold_in(key, k))
        for k, batch in enumerate(batches)
    ]
    if not losses:
        raise InputError("the validation split does not fill one batch; choose a smaller batch size")
    return {f"validation_{name}": float(np.mean([float(one[name]) for one in losses])) for name in LOSSES}


def _show(row: dict) -> str:
    return (
        f"loss {row['loss']:.3f} (validation {row['validation_loss']:.3f}), InfoNCE {row['nce']:.3f}, "
        f"MSE {row['mse']:.4f}, accuracy {100 * row['accuracy']:.1f} %, {row['clips_per_second']:.3g} clips/s"
    )


def reconstruction(run: Pretraining, params: dict, codes: np.ndarray, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Original, masked and reconstructed windows in dB, each (batch, time, mel), for the figure of notebook 02."""
    mask = run.sample_mask(jax.random.key(seed), len(codes))
    log_mel = normalise(jnp.asarray(codes), run.front_end, run.statistics)
    outputs, _ = jax.jit(run.module.apply)({"params": params}, log_mel, mask)
    masked, rebuilt = ssast.reconstruct(log_mel, outputs["generative"], mask, run.model)
    scale, mean = 2 * run.statistics.std_db, run.statistics.mean_db
    return tuple(np.asarray(values, np.float32) * scale + mean for values in (log_mel, masked, rebuilt))
