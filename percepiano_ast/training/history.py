"""The record of a run: a CSV row per epoch and one per few steps, and TensorBoard files where tensorboard is installed."""

import csv
import importlib.util
import time
from pathlib import Path

FLUSH_SECONDS = 10.0


def write(path: Path, rows: list[dict]) -> None:
    """Write ``rows`` (all with the same keys) as CSV, old file or new one, never half."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


class StepLog:
    """Rows about single stretches of steps: ``steps.csv`` in ``directory``, and the same numbers for TensorBoard.

    A resumed run drops the rows behind the step that it starts from: none stands there twice.
    """

    def __init__(self, directory: Path, from_step: int):
        self.path = directory / "steps.csv"
        self._rows = self._until(from_step)
        self._written = time.monotonic()
        self._board = _Board(directory / "tensorboard", from_step) if importlib.util.find_spec("tensorboard") else None

    def _until(self, step: int) -> list[dict]:
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return [row for row in csv.DictReader(file) if int(row["step"]) <= step]

    def add(self, row: dict) -> None:
        """Note one row, whose first column is ``step``; it is on disk some seconds later."""
        self._rows.append(row)
        if self._board:
            self._board.add(row)
        if time.monotonic() - self._written > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what has been noted."""
        if self._rows:
            write(self.path, self._rows)
        if self._board:
            self._board.flush()
        self._written = time.monotonic()


class _Board:
    """TensorBoard's event files, written with its own writer: neither TensorFlow nor PyTorch is needed."""

    def __init__(self, directory: Path, from_step: int):
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._events = event_pb2
        self._writer = EventFileWriter(str(directory))
        # TensorBoard forgets what an interrupted run had noted behind this step.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.add_event(event_pb2.Event(wall_time=time.time(), step=from_step + 1, session_log=start))

    def add(self, row: dict) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in row.items() if name != "step"]
        event = self._events.Event(wall_time=time.time(), step=int(row["step"]), summary=Summary(value=values))
        self._writer.add_event(event)

    def flush(self) -> None:
        self._writer.flush()
