"""The pre-training loop: take steps, check and log their metrics, save checkpoints, resume."""

import collections
import contextlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from percepiano_ast.training import flops, history, parallel
from percepiano_ast.training.checkpoints import Checkpoints, require_room, shown
from percepiano_ast.training.pieces import size_of
from percepiano_ast.training.state import TrainState, count_parameters
from percepiano_ast.training.stores import StoreFailed

CHECKED = ("loss", "gradient_norm", "update_norm")  # must be finite after every step
HEALTH = ("gradient_norm", "update_norm", "skipped")
# Steps between two reads of the metrics, which block until the device is done. Rows of steps.csv
# are means over as many steps.
LOOK_EVERY = 20
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
        self.looks: list[dict] = []  # metrics of the current epoch, one entry per read
        device, dtype = run.layout.device, run.module.compute.dtype
        self.clip_flops = flops.pretrain_flops(run.model, run.config)
        self.peak = run.layout.size * flops.matrix_peak(dtype, device)
        # Clips of the batches whose metrics have not been read yet, and those metrics.
        self.unseen: collections.deque[tuple[list[str], dict]] = collections.deque()
        self.looked, self.waited = time.monotonic(), 0.0
        self.record: history.Record | None = None  # in the first process
        self.step: Callable | None = None  # compiled with the first batch

    def run_epochs(self, batches, steps_per_epoch: int, validation) -> list[dict]:
        """Train the remaining epochs; returns the whole history."""
        run, epochs = self.run, self.run.config.epochs
        _ = run.step  # raises an error now if the batch cannot be divided
        state, done = self._resume()
        parameters, precision = (
            count_parameters(state.params),
            jnp.dtype(run.module.compute.dtype).name,
        )
        self.log(
            f"{run.config.objective} {run.model.name}: {parameters:,} parameters, {run.total_steps}"
            f" steps on {run.layout.size} x {run.layout.device.device_kind} in {precision}"
        )
        started, first = time.monotonic(), done
        stream = batches(done) if done < run.total_steps else iter(())
        for epoch in range(done // steps_per_epoch, epochs):
            end = (epoch + 1) * steps_per_epoch
            state, means = self._epoch(state, stream, done, end, steps_per_epoch)
            done = end
            row = {"epoch": epoch + 1, "step": done, **means}
            row |= run.validate(state.params, validation())
            self.rows.append(row | {"seconds": round(time.monotonic() - started, 1)})
            self._save(state, done, row["validation_loss"])
            left = (time.monotonic() - started) / (done - first) * (run.total_steps - done)
            self.log(f"  epoch {epoch + 1}/{epochs}: {_show(row)}, about {left:.0f} s left")
        return self.rows

    def _resume(self) -> tuple[TrainState, int]:
        """The state to resume from, and its number of steps."""
        checkpoints, one = self.checkpoints, size_of(self.run.abstract_state)
        most = (
            f"{shown((checkpoints.keep + 2) * one)} (the last {checkpoints.keep}, the best, one"
            " being saved)"
        )
        require_room(checkpoints.place, one, most, self.log)
        checkpoints.prepare()
        parallel.wait_for_all("old files deleted")
        found = checkpoints.load({"state": self.run.abstract_state}, self.settings)
        tree, kept = found or (
            None,
            {"step": 0, "epoch": 0, "history": [], "looks": [], "steps": []},
        )
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
        progress = {
            "epoch": len(self.rows),
            "history": self.rows,
            "looks": self.looks,
            "steps": steps,
        }
        description = {**self.settings, "seed": self.run.config.seed, **progress}
        self.checkpoints.save(step, {"state": state}, description, score)
        if self.record:
            self.record.send(self.rows)
        self.saved = time.monotonic()

    def _is_due(self) -> bool:
        """Whether a checkpoint within the epoch is due; False while the previous one is being
        saved."""
        due = time.monotonic() - self.saved >= 60 * self.save_minutes and not self.checkpoints.busy
        return bool(parallel.as_lead_says(due))

    def _epoch(
        self, state: TrainState, stream: Iterator, done: int, end: int, steps: int
    ) -> tuple[TrainState, dict]:
        self.looked, self.waited = time.monotonic(), 0.0
        for number in range(done + 1, end + 1):
            asked = time.monotonic()
            batch = next(stream)
            self.waited += time.monotonic() - asked
            placed = self.run.put(batch)
            step = self.step or self._compile(state, placed)
            state, metrics = step(state, placed)
            self.unseen.append((batch["clip"], metrics))
            if number % LOOK_EVERY == 0 or number == end:
                self.looks.append(self._look(state, number))
                if number < end and self._is_due():
                    self._save(state, number)
        looks, self.looks = self.looks, []
        weights = [look["steps"] for look in looks]
        means = {
            name: float(np.average([look[name] for look in looks], weights=weights))
            for name in looks[0]
            if name != "steps"
        }
        means["skipped"] = round(means["skipped"] * steps)
        return state, means

    def _compile(self, state: TrainState, batch: dict) -> Callable:
        """Compile the step before the first call, so that compile time does not count in the first
        speed."""
        start = time.monotonic()
        self.step = step = self.run.step.lower(state, batch).compile()
        self.looked, self.waited = time.monotonic(), 0.0
        self.log(f"  compiled the training step in {self.looked - start:.0f} s")
        return step

    def _look(self, state: TrainState, last: int) -> dict:
        """Wait for the steps up to ``last``, check their metrics, and record the means."""
        values = jax.device_get([metrics for _, metrics in self.unseen])
        for number, one in enumerate(values, start=last - len(values) + 1):
            if not one["skipped"] and not np.isfinite([one[name] for name in CHECKED]).all():
                self._stop(state, number, one, self.unseen[number - last - 1][0])
        seconds = time.monotonic() - self.looked
        waited, self.waited = self.waited, 0.0
        self.looked = time.monotonic()
        self.unseen.clear()
        means = {
            name: float(np.mean([one[name] for one in values]))
            for name in (*self.run.objective.names, *HEALTH)
        }
        means["learning_rate"] = float(self.run.schedule(last - 1))
        speed = len(values) * self.run.config.batch_size / seconds
        means |= {"clips_per_second": speed, "mfu": speed * self.clip_flops / self.peak}
        means["input_wait"] = waited / len(values)
        if self.record:
            self.record.add(
                {"step": last, **{name: f"{value:.6g}" for name, value in means.items()}}
            )
        return {"steps": len(values), **means}

    def _stop(self, state: TrainState, number: int, metrics: dict, clips: list[str]) -> None:
        """Save the last finite state, and raise an error with the step and the clips of its
        batch."""
        good = number - 1
        home = self.directory / "stopped"
        named = {"clips": list(clips), **{name: str(metrics[name]) for name in CHECKED}}
        with Checkpoints(home, keep=1, log=self.log) as stopped:
            stopped.save(
                good, {"state": state}, {**self.settings, "broke_at_step": number, **named}
            )
        if self.record:
            self.record.send(self.rows)
            with contextlib.suppress(StoreFailed):  # already logged
                self.record.finish()
        shown = ", ".join(clips[:4]) + (
            f" and {len(clips) - 4} more, listed in {home}" if len(clips) > 4 else ""
        )
        raise FloatingPointError(
            f"the loss is {metrics['loss']:.4g}, the gradient norm {metrics['gradient_norm']:.4g}"
            f" and the update norm {metrics['update_norm']:.4g} at step {number}, on the clips"
            f" {shown}. The state after {good} steps is saved in {home}. Lower the learning rate,"
            " or check those clips"
        )


def _show(row: dict) -> str:
    """The most important metrics of a row, as text, for any objective."""
    shown = f"loss {row['loss']:.3f} (validation {row['validation_loss']:.3f})"
    for name, (text, scale) in _SHOWN.items():
        if name in row:
            shown += f", {text.format(scale * row[name])}"
    return f"{shown}, {row['clips_per_second']:.3g} clips/s"
