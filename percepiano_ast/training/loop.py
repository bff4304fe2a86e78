"""The pre-training loop: take steps, check and log their metrics, save checkpoints, resume."""

import contextlib
import csv
import importlib.util
import io
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from percepiano_ast.config import ModelConfig, PretrainConfig
from percepiano_ast.models import transcription
from percepiano_ast.models.ast import PREFIX_TOKENS
from percepiano_ast.music.piano_roll import N_KEYS
from percepiano_ast.training import mesh
from percepiano_ast.training.checkpoints import (
    Background,
    Checkpoints,
    Storage,
    StorageError,
    check_disk_space,
    shown,
    size_of,
    watched,
)
from percepiano_ast.training.state import TrainState

CHECKED = ("loss", "gradient_norm", "update_norm")  # must be finite after every step
# Steps between two reads of the metrics, which block until the device is done. Rows of steps.csv
# are means over as many steps.
LOG_EVERY = 20
FLUSH_SECONDS = 10.0
# Metrics in an epoch's log line, if the objective has them: format and factor.
_SHOWN = {
    "nce": ("InfoNCE {:.3f}", 1),
    "mse": ("MSE {:.4f}", 1),
    "accuracy": ("accuracy {:.1f} %", 100),
    "validation_onset_f1": ("onset F1 {:.3f}", 1),
    "validation_down_f1": ("key F1 {:.3f}", 1),
    "validation_velocity_mae": ("velocity MAE {:.1f}", 1),
    "validation_sustain_r": ("pedal r {:.3f}", 1),
    "masked_accuracy": ("accuracy {:.1f} %", 100),
    "validation_heard_onset_f1": ("onset F1 {:.3f}", 1),
    "validation_heard_sustain_r": ("pedal r {:.3f}", 1),
}
# Sides of the square matrices for measuring a device's peak: large enough to saturate it, small
# enough to be quick.
_PEAK_SIDE = {"cpu": 1024, "gpu": 8192, "tpu": 8192}


class Loop:
    """The loop of a `pretrain.Pretraining` run, with everything it carries between steps except the
    training state."""

    def __init__(
        self, run, directory: Path, settings: dict, checkpoints: Checkpoints, save_minutes, log
    ):
        self.run, self.directory, self.settings, self.log = run, directory, settings, log
        self.checkpoints, self.save_minutes = checkpoints, save_minutes
        self.saved = time.monotonic()
        self.rows: list[dict] = []  # of the completed epochs
        self.means: list[dict] = []  # of the current epoch, one entry per read of the metrics
        self.unread: list[tuple[list[str], dict]] = []  # clips and metrics of steps since then
        self.since, self.waited = time.monotonic(), 0.0  # that read; seconds waited for batches
        self.clip_flops = pretrain_flops(run.model, run.config)
        self.peak = run.layout.size * matrix_peak(run.module.compute.dtype, run.layout.device)
        self.history: History | None = None  # in the first process

    def run_epochs(self, batches, steps_per_epoch: int, validation) -> list[dict]:
        """Train the remaining epochs; returns the whole history."""
        run, epochs, checkpoints = self.run, self.run.config.epochs, self.checkpoints
        step = run.step  # raises an error now if the batch cannot be divided

        # --- Resume
        one = size_of(run.abstract_state)
        most = (
            f"{shown((checkpoints.keep + 2) * one)} (the last {checkpoints.keep}, the best, one"
            " being saved)"
        )
        check_disk_space(checkpoints.place, one, most)
        checkpoints.prepare()
        mesh.wait_for_all("old files deleted")
        found = checkpoints.load({"state": run.abstract_state}, self.settings)
        tree, kept = found or (None, {"step": 0, "history": [], "looks": [], "steps": []})
        done = kept["step"]
        mesh.require_same(done, "the step of the newest checkpoint")
        self.rows, self.means = kept["history"], kept["looks"]
        if mesh.is_lead():
            self.history = History(self.directory, self.log, kept["steps"], tensorboard=True)
        if tree is None:
            state = run.init()
        else:
            within = f" and {sum(one['steps'] for one in self.means)} steps" if self.means else ""
            self.log(f"  resuming after epoch {kept['epoch']}{within}")
            if self.history:
                self.history.send(self.rows)
            state = run.layout.put_state(tree["state"])
        parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        self.log(
            f"{run.config.objective} {run.model.name}: {parameters:,} parameters, {run.total_steps}"
            f" steps on {run.layout.size} x {run.layout.device.device_kind} in"
            f" {jnp.dtype(run.module.compute.dtype).name}"
        )

        # --- Train
        started, first, compiled = time.monotonic(), done, None
        stream = batches(done) if done < run.total_steps else iter(())
        for epoch in range(done // steps_per_epoch, epochs):
            end = (epoch + 1) * steps_per_epoch
            self.since, self.waited = time.monotonic(), 0.0
            for number in range(done + 1, end + 1):
                asked = time.monotonic()
                batch = next(stream)
                self.waited += time.monotonic() - asked
                on_devices = run.put(batch)
                if compiled is None:  # now, so that compile time does not count in the first speed
                    start = time.monotonic()
                    compiled = step.lower(state, on_devices).compile()
                    self.since, self.waited = time.monotonic(), 0.0
                    self.log(f"  compiled the training step in {self.since - start:.0f} s")
                state, metrics = compiled(state, on_devices)
                self.unread.append((batch["clip"], metrics))
                if number % LOG_EVERY == 0 or number == end:
                    self._read_metrics(state, number)
                    due = time.monotonic() - self.saved >= 60 * self.save_minutes
                    if number < end and mesh.from_lead(due and not checkpoints.busy):
                        self._save(state, number)
            done = end
            read, self.means = self.means, []
            weights = [one["steps"] for one in read]
            means = {
                name: float(np.average([one[name] for one in read], weights=weights))
                for name in read[0]
                if name != "steps"
            }
            means["skipped"] = round(means["skipped"] * steps_per_epoch)
            row = {"epoch": epoch + 1, "step": done, **means}
            row |= run.validate(state.params, validation())
            self.rows.append(row | {"seconds": round(time.monotonic() - started, 1)})
            self._save(state, done, row["validation_loss"])
            left = (time.monotonic() - started) / (done - first) * (run.total_steps - done)
            metrics_shown = [
                f"loss {row['loss']:.3f} (validation {row['validation_loss']:.3f})",
                *(
                    text.format(by * row[name])
                    for name, (text, by) in _SHOWN.items()
                    if name in row
                ),
                f"{row['clips_per_second']:.3g} clips/s",
            ]
            self.log(
                f"  epoch {epoch + 1}/{epochs}: {', '.join(metrics_shown)}, about {left:.0f} s left"
            )
        return self.rows

    def _save(self, state: TrainState, step: int, score: float = math.inf) -> None:
        progress = {
            "epoch": len(self.rows),
            "history": self.rows,
            "looks": self.means,
            "steps": self.history.steps if self.history else [],
        }
        description = {**self.settings, "seed": self.run.config.seed, **progress}
        self.checkpoints.save(step, {"state": state}, description, score)
        if self.history:
            self.history.send(self.rows)
        self.saved = time.monotonic()

    def _read_metrics(self, state: TrainState, last: int) -> None:
        """Wait for the steps up to ``last``, check their metrics, and log the means.

        Raises:
            FloatingPointError: a metric is not finite. The last finite state is saved; the message
                names the step and the clips of its batch.
        """
        clips = [names for names, _ in self.unread]
        values = jax.device_get([metrics for _, metrics in self.unread])
        self.unread.clear()
        for good, one in enumerate(values, start=last - len(values)):  # steps before this one
            if one["skipped"] or np.isfinite([one[name] for name in CHECKED]).all():
                continue
            names, home = clips[good - last], self.directory / "stopped"
            settings = self.settings | {"broke_at_step": good + 1, "clips": list(names)}
            settings |= {name: str(one[name]) for name in CHECKED}
            with Checkpoints(home, keep=1) as stopped:
                stopped.save(good, {"state": state}, settings)
            if self.history:
                self.history.send(self.rows)
                with contextlib.suppress(StorageError):  # already logged
                    self.history.finish()
            more = f" and {len(names) - 4} more, listed in {home}" if len(names) > 4 else ""
            raise FloatingPointError(
                f"the loss is {one['loss']:.4g}, the gradient norm {one['gradient_norm']:.4g} and"
                f" the update norm {one['update_norm']:.4g} at step {good + 1}, on the clips"
                f" {', '.join(names[:4])}{more}. The state after {good} steps is saved in {home}."
                " Lower the learning rate, or check those clips"
            )
        count, seconds = len(values), time.monotonic() - self.since
        measured = (*self.run.objective.names, "gradient_norm", "update_norm", "skipped")
        means = {name: float(np.mean([one[name] for one in values])) for name in measured}
        means["learning_rate"] = float(self.run.schedule(last - 1))
        speed = count * self.run.config.batch_size / seconds
        means |= {"clips_per_second": speed, "mfu": speed * self.clip_flops / self.peak}
        means["input_wait"] = self.waited / count
        self.since, self.waited = time.monotonic(), 0.0
        if self.history:
            self.history.add(
                {"step": last, **{name: f"{value:.6g}" for name, value in means.items()}}
            )
        self.means.append({"steps": count, **means})


def pretrain_flops(model: ModelConfig, config: PretrainConfig) -> float:
    """FLOPs of one training clip, forward and backward (3 x forward), without the recomputation of
    remat; 2 per multiply-add. Norms and the descriptor head are negligible."""

    def blocks(width: int, depth: int, tokens: int) -> int:
        weights = (4 + 2 * model.mlp_ratio) * width**2
        return depth * tokens * (2 * weights + 4 * tokens * width)

    def encoder(patches: int) -> int:
        tokens = PREFIX_TOKENS + patches
        return 2 * patches * model.patch_dim * model.width + blocks(
            model.width, model.depth, tokens
        )

    forward, patches = 0, model.num_patches
    if config.objective != "transcription":
        masked, width = config.num_masked(model), model.width
        visible = patches - masked if config.decoder_depth else patches
        forward += encoder(visible)
        if config.decoder_depth:
            width //= 2
            forward += 2 * (PREFIX_TOKENS + visible) * model.width * width
            forward += blocks(width, config.decoder_depth, PREFIX_TOKENS + patches)
        forward += 2 * 2 * masked * width * (width + model.patch_dim)  # two heads
        forward += 2 * masked**2 * model.patch_dim  # InfoNCE
    if config.objective != "ssast":
        steps = transcription.steps_of(model) * model.grid[1]
        outputs = len(transcription.ROLLS) * N_KEYS + len(transcription.PEDALS)
        forward += encoder(patches)
        forward += 2 * steps * transcription.HIDDEN * (model.grid[0] * model.width + outputs)
    return 3.0 * forward


def matrix_peak(dtype: jnp.dtype, device: jax.Device) -> float:
    """Measured FLOP/s of ``device`` in one large matrix product of ``dtype``, the best of five;
    the denominator of the model FLOPs utilisation (MFU)."""
    side = _PEAK_SIDE.get(device.platform, _PEAK_SIDE["cpu"])
    with jax.default_device(device):
        matrix = jnp.ones((side, side), dtype)
        multiply = jax.jit(lambda x: x @ x).lower(matrix).compile()
        multiply(matrix).block_until_ready()
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            multiply(matrix).block_until_ready()
            best = min(best, time.perf_counter() - start)
    return 2.0 * side**3 / best


class History:
    """``history.csv`` (a row per epoch) and ``steps.csv`` (a row per few steps) in ``directory``,
    and TensorBoard files if tensorboard is installed.

    They are written in the background: a directory that fails or hangs, as a mounted Drive may,
    does not stop training. Every checkpoint also holds the rows, so a resumed run rewrites the
    files.

    Args:
        steps: earlier rows of ``steps.csv``, from the checkpoint that the run resumes from.
        tensorboard: write TensorBoard files too, with tensorboard's own writer.
    """

    def __init__(
        self,
        directory: Path,
        log: Callable[[str], None],
        steps: Sequence[dict] = (),
        *,
        tensorboard: bool = False,
    ):
        self.steps = list(steps)
        self._storage, self._log = Storage(directory), log
        self._background = Background(self._complain)
        self._sent = time.monotonic()
        found = tensorboard and importlib.util.find_spec("tensorboard") is not None
        self._events = directory / "tensorboard" if found else None  # None after a failure
        self._writer: Any = None
        self._last = steps[-1]["step"] if steps else 0  # step of the last TensorBoard event

    def add(self, row: dict) -> None:
        """Add one row to ``steps.csv``, whose first column is ``step``; it is written within
        seconds."""
        self.steps.append(row)
        if time.monotonic() - self._sent > FLUSH_SECONDS:
            self.send()

    def send(self, history: Sequence[dict] = ()) -> None:
        """Write all rows in the background. A failure is logged, and the next call tries again."""
        self._sent = time.monotonic()
        files = {}
        for name, rows in (("history.csv", history), ("steps.csv", self.steps)):
            if rows:
                text = io.StringIO(newline="")
                writer = csv.DictWriter(text, rows[0].keys())
                writer.writeheader()
                writer.writerows(rows)
                files[name] = text.getvalue().encode()
        steps = list(self.steps)
        self._background.submit(lambda: self._write(files, steps))

    def finish(self) -> None:
        """Wait until everything is written.

        Raises:
            StorageError: writing failed repeatedly.
        """
        if not self._background.finish():
            raise StorageError(f"the history of the run was not written: {self._background.error}")

    def _complain(self, error: OSError) -> None:
        self._log(
            f"  warning: {error}. Training continues; the history is written when the directory is"
            " writable again"
        )

    def _write(self, files: dict[str, bytes], steps: list[dict]) -> None:
        for name, content in files.items():
            self._storage.write(name, content)
        if events := self._events:
            self._events = None
            watched(lambda beat: self._write_events(events, steps))
            self._events = events

    def _write_events(self, directory: Path, steps: list[dict]) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        if self._writer is None:
            self._writer = EventFileWriter(str(directory))
            # TensorBoard discards an interrupted run's events from this step on.
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._writer.add_event(
                event_pb2.Event(wall_time=time.time(), step=self._last + 1, session_log=start)
            )
        for row in steps:
            if row["step"] > self._last:
                values = [
                    summary_pb2.Summary.Value(tag=name, simple_value=float(value))
                    for name, value in row.items()
                    if name != "step"
                ]
                summary = summary_pb2.Summary(value=values)
                self._writer.add_event(
                    event_pb2.Event(wall_time=time.time(), step=row["step"], summary=summary)
                )
                self._last = row["step"]
        self._writer.flush()
