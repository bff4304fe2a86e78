"""The record of a run: a CSV row per epoch and one per few steps, and TensorBoard files where tensorboard is installed.

It is written beside training: a directory that fails or hangs, as a mounted Drive may, stops nothing. What it holds is in
every checkpoint too, so a run that is resumed writes it anew.
"""

import csv
import importlib.util
import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from percepiano_ast.training import stores
from percepiano_ast.training.courier import Courier

FLUSH_SECONDS = 10.0


def as_csv(rows: Sequence[dict]) -> bytes:
    """``rows``, all with the same keys, as the content of a CSV file."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


class Record:
    """``history.csv`` and ``steps.csv`` in ``directory``, old files or new ones, never half.

    Args:
        steps: rows of ``steps.csv`` that there are already, from the checkpoint that the run goes on from.
        board: keep TensorBoard's files too, if tensorboard is installed.
    """

    def __init__(self, directory: Path, log: Callable[[str], None], steps: Sequence[dict] = (), *, board: bool = False):
        self.steps = list(steps)
        self._store, self._log = stores.Folder(directory), log
        self._courier: Courier[_Page] = Courier(self._complain)
        self._sent = time.monotonic()
        shown = board and importlib.util.find_spec("tensorboard") is not None
        self._board = _Board(directory / "tensorboard", self.steps) if shown else None

    def add(self, row: dict) -> None:
        """Note one row of ``steps.csv``, whose first column is ``step``; it is on disk some seconds later."""
        self.steps.append(row)
        if time.monotonic() - self._sent > FLUSH_SECONDS:
            self.send()

    def send(self, history: Sequence[dict] = ()) -> None:
        """Have all that is known written; returns at once. A failure is logged, and tried again with the next call."""
        self._sent = time.monotonic()
        tables = {"history.csv": history, "steps.csv": self.steps}
        files = {name: as_csv(rows) for name, rows in tables.items() if rows}
        self._courier.wait_for_turn(0.0)
        self._courier.send(_Page(self._store, files, self._board, list(self.steps)))

    def finish(self) -> None:
        """Wait until all is written.

        Raises:
            StoreFailed: it cannot be, after another try.
        """
        if not self._courier.insist():
            raise stores.StoreFailed(f"the history of the run was not written: {self._courier.trouble}")

    def _complain(self, error: OSError) -> None:
        self._log(f"  warning: {error}; training goes on, and the history of the run is written when the place is mended")


class _Page:
    """What is to be written, as of one moment."""

    packed = True

    def __init__(self, store: stores.Store, files: dict[str, bytes], board: "_Board | None", steps: list[dict]):
        self._store, self._files, self._board, self._steps = store, files, board, steps

    def pack(self) -> None:
        """It is in memory already."""

    def deliver(self) -> None:
        """Write the files."""
        for name, content in self._files.items():
            self._store.write(name, content)
        board = self._board
        if board and not board.failed:
            try:
                stores.watched(lambda beat: board.write(self._steps), self._store.patience)
            except OSError:
                board.failed = True
                raise

    def discard(self) -> None:
        """Nothing of it is on the local disk."""


class _Board:
    """TensorBoard's event files, written with its own writer: neither TensorFlow nor PyTorch is needed.

    Attributes:
        failed: the writer was lost with its file; it is not tried again.
    """

    def __init__(self, directory: Path, steps: list[dict]):
        self._directory, self.failed = directory, False
        self._writer: Any = None  # tensorboard may be missing, with its types
        self._last = steps[-1]["step"] if steps else 0

    def write(self, steps: list[dict]) -> None:
        """Write the rows that are new."""
        if self._writer is None:
            self._open()
        for row in (row for row in steps if row["step"] > self._last):
            self._add(row)
            self._last = row["step"]
        self._writer.flush()

    def _open(self) -> None:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._events = event_pb2
        self._writer = EventFileWriter(str(self._directory))
        # TensorBoard forgets what an interrupted run had noted behind this step.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.add_event(event_pb2.Event(wall_time=time.time(), step=self._last + 1, session_log=start))

    def _add(self, row: dict) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in row.items() if name != "step"]
        event = self._events.Event(wall_time=time.time(), step=row["step"], summary=Summary(value=values))
        self._writer.add_event(event)
