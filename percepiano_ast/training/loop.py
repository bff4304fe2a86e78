"""The training loop of pre-training and of folds, and the history that it writes."""

import contextlib
import csv
import importlib.util
import io
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from percepiano_ast.errors import RunFailed
from percepiano_ast.training import mesh
from percepiano_ast.training.checkpoints import (
    SAVE_MINUTES,
    Background,
    Checkpoints,
    Storage,
    StorageError,
    watched,
)
from percepiano_ast.training.lock import Lock
from percepiano_ast.training.state import TrainState

logger = logging.getLogger(__name__)

CHECKED = ("loss", "gradient_norm", "update_norm")  # must be finite after every step
# Steps of pre-training between two reads of the metrics, which block until the device is done.
# Rows of steps.csv are means over as many steps.
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
    "clips_per_second": ("{:.3g} clips/s", 1),
}


def fit(
    init: Callable[[], TrainState],
    compile_step: Callable[[TrainState, dict], Callable],
    batches: Callable[[int], Iterator[dict]],
    prepare: Callable[[dict, list[dict]], dict],
    *,
    put_state: Callable[[TrainState], TrainState] = lambda state: state,
    epochs: int,
    steps_per_epoch: int,
    names: Sequence[str],
    log_every: int = 1,
    log_seconds: float = 0.0,
    measure: Callable[[int, float], dict[str, float]] | None = None,
    validate: Callable[[dict], dict[str, float]] = lambda params: {},
    directory: Path | None = None,
    place: str = "",
    settings: dict | None = None,
    save_minutes: float = SAVE_MINUTES,
    lock: Lock | None = None,
) -> tuple[TrainState, list[dict]]:
    """Train from the newest intact checkpoint on; returns the last state and the history, one row
    per epoch.

    Args:
        init: makes the state before the first step.
        compile_step: returns the step, (state, prepared batch) -> (state, metrics), for arrays like
            these; the metrics are those of `state.train_step`.
        batches: ``batches(k)`` yields the batches of steps k, k + 1, ...
        prepare: batch and history -> inputs of the step.
        put_state: puts a loaded state on the devices.
        names: of the metrics whose means are reported.
        log_every: steps between two reads of the metrics, and so between checkpoints.
        log_seconds: seconds between two progress messages.
        measure: number of steps, seconds per step -> further metrics; their means are written to
            ``steps.csv`` and TensorBoard.
        validate: parameters -> further columns of the history; the checkpoint with the smallest
            ``validation_loss`` is not deleted.
        directory: for ``history.csv`` and ``steps.csv``, and for ``stopped``, the state before a
            loss that is not finite; None to write nothing.
        place: storage location of the checkpoints.
        settings: saved with every checkpoint, and compared when a run is resumed.
        save_minutes: minutes between checkpoints within a long epoch.
        lock: of the directory and the place; held by one of the processes.

    Raises:
        InputError: ``place`` holds checkpoints of other settings.
        RunFailed: the lock is lost.
        FloatingPointError: loss, gradient or update is not finite; the message names the step and
            the clips of its batch.
        StorageError: training is complete, but the last checkpoint or the history was not saved.
    """
    settings, total, history = settings or {}, epochs * steps_per_epoch, None
    check = lock.check if lock else lambda: None
    done, rows, reads, steps, state = 0, [], [], [], None
    with Checkpoints(place, check=check) if directory else contextlib.nullcontext() as checkpoints:
        # --- Resume
        if checkpoints and directory:
            checkpoints.prepare()
            mesh.wait_for_all("old files deleted")
            if found := checkpoints.load({"state": jax.eval_shape(init)}, settings):
                state, known = put_state(found[0]["state"]), found[1]
                done, rows, reads = known["step"], known["history"], known["reads"]
                steps = known["steps"]
                within = f" and {sum(one['steps'] for one in reads)} steps" if reads else ""
                logger.info(f"  resuming after epoch {len(rows)}{within}")
            mesh.require_same(done, "the step of the newest checkpoint")
            if mesh.is_lead():
                history = History(directory, steps, check)
                if rows:
                    history.send(rows)
        if state is None:
            state = init()

        def save(score: float = math.inf) -> float:
            """Save the state and the history; returns the time."""
            if checkpoints:
                progress = {"epoch": len(rows), "history": rows, "reads": reads}
                progress["steps"] = history.steps if history else []
                checkpoints.save(done, {"state": state}, settings | progress, score)
            if history:
                history.send(rows)
            return time.monotonic()

        started, first, step, logged, saved = time.monotonic(), done, None, 0.0, time.monotonic()
        stream = batches(done) if done < total else iter(())
        for epoch in range(done // steps_per_epoch, epochs):
            end = (epoch + 1) * steps_per_epoch
            since, waited, unread = time.monotonic(), 0.0, []
            while done < end:
                # --- Step
                asked = time.monotonic()
                batch = next(stream)
                waited += time.monotonic() - asked
                inputs = prepare(batch, rows)
                if step is None:  # compile now, so that the time does not count in the first speed
                    step = compile_step(state, inputs)
                    since, waited = time.monotonic(), 0.0
                state, metrics = step(state, inputs)
                unread.append((batch["clip"], metrics))
                done += 1
                if done % log_every and done < end:
                    continue

                # --- Check
                if lock and lock.lost:
                    raise RunFailed(lock.lost)
                values = jax.device_get([one for _, one in unread])
                good = done - len(values)  # number of steps before a value
                for (clips, _), one in zip(unread, values):
                    checked = [float(one[name]) for name in CHECKED]
                    if one["skipped"] or np.isfinite(checked).all():
                        good += 1
                        continue
                    clips = [str(clip) for clip in clips]
                    loss, gradient, update = (f"{value:.4g}" for value in checked)
                    text = (
                        f"the loss is {loss}, the gradient norm {gradient} and the update norm"
                        f" {update} at step {good + 1}, on the clips {', '.join(clips[:4])}"
                    )
                    if directory:
                        home = directory / "stopped"
                        facts = {"broke_at_step": good + 1, "clips": clips}
                        facts |= dict(zip(CHECKED, map(str, checked)))
                        with Checkpoints(home, keep=1) as stopped:
                            stopped.save(good, {"state": state}, settings | facts)
                        text += f" and {len(clips) - 4} more" if len(clips) > 4 else ""
                        text += f". The state after {good} steps is saved in {home}"
                    if history:
                        history.send(rows)
                        with contextlib.suppress(StorageError):  # already logged
                            history.finish()
                    raise FloatingPointError(
                        f"{text}. Lower the learning rate, or check those clips"
                    )

                # --- Log and save
                means = {name: float(np.mean([one[name] for one in values])) for name in names}
                if measure:
                    means |= measure(done, (time.monotonic() - since) / len(values))
                    means["input_wait"] = waited / len(values)
                    if history:
                        texts = {name: f"{value:.6g}" for name, value in means.items()}
                        history.add({"step": done, **texts})
                reads.append({"steps": len(values), **means})
                since, waited, unread = time.monotonic(), 0.0, []
                due = time.monotonic() - saved >= 60 * save_minutes
                if checkpoints and done < end and mesh.from_lead(due and not checkpoints.busy):
                    saved = save()

            # --- End of the epoch
            columns = [name for name in reads[0] if name != "steps"]
            table = [[one[name] for name in columns] for one in reads]
            values = np.average(table, axis=0, weights=[one["steps"] for one in reads]).tolist()
            row = {"epoch": epoch + 1, "step": done, **dict(zip(columns, values))}
            if "skipped" in row:
                row["skipped"] = round(row["skipped"] * steps_per_epoch)
            rows.append(row | validate(state.params))
            row, reads = rows[-1], []
            saved = save(row.get("validation_loss", math.inf))
            elapsed = time.monotonic() - started
            if elapsed - logged >= log_seconds:
                logged, left = elapsed, elapsed / (done - first) * (total - done)
                loss = f"loss {row['loss']:.4f}"
                if "validation_loss" in row:
                    loss = f"loss {row['loss']:.3f} (validation {row['validation_loss']:.3f})"
                shown = {name: _SHOWN[name] for name in _SHOWN if name in row}
                others = [text.format(by * row[name]) for name, (text, by) in shown.items()]
                logger.info(
                    f"  epoch {epoch + 1}/{epochs}: {', '.join([loss, *others])},"
                    f" about {left:.0f} s left"
                )
    if history:
        history.finish()
    return state, rows


class History:
    """``history.csv`` (a row per epoch) and ``steps.csv`` (a row per few steps) in ``directory``,
    and TensorBoard files of the steps if tensorboard is installed.

    They are written in the background: a directory that fails or hangs, as a mounted Drive may,
    does not stop training. Every checkpoint also holds the rows, so a resumed run rewrites the
    files.

    Args:
        steps: earlier rows of ``steps.csv``, from the checkpoint that the run resumes from.
        check: see `Checkpoints`.
    """

    def __init__(
        self, directory: Path, steps: Sequence[dict] = (), check: Callable[[], None] = lambda: None
    ):
        self.steps, self._check = list(steps), check
        self._storage, self._background = Storage(directory), Background(self._warn)
        self._sent = time.monotonic()
        found = importlib.util.find_spec("tensorboard") is not None
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

    def _warn(self, error: OSError) -> None:
        logger.warning(
            f"  warning: {error}. Training continues; the history is written when the directory is"
            " writable again"
        )

    def _write(self, files: dict[str, bytes], steps: list[dict]) -> None:
        self._check()
        for name, content in files.items():
            self._storage.write(name, content)
        if steps and (events := self._events):
            self._events = None
            watched(lambda beat: self._write_events(events, steps))
            self._events = events

    def _write_events(self, directory: Path, steps: list[dict]) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        def write(step: int, **content) -> None:
            self._writer.add_event(event_pb2.Event(wall_time=time.time(), step=step, **content))

        if self._writer is None:
            self._writer = EventFileWriter(str(directory))
            # TensorBoard discards an interrupted run's events from this step on.
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            write(self._last + 1, session_log=start)
        for row in steps:
            if row["step"] > self._last:
                values = [
                    summary_pb2.Summary.Value(tag=name, simple_value=float(value))
                    for name, value in row.items()
                    if name != "step"
                ]
                write(row["step"], summary=summary_pb2.Summary(value=values))
                self._last = row["step"]
        self._writer.flush()
