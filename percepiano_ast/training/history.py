"""The log of a run: a CSV row per epoch, one per few steps, and TensorBoard files if tensorboard is
installed.

It is written in the background: a directory that fails or hangs, as a mounted Drive may, does not
stop training. Every checkpoint also holds the rows, so a resumed run rewrites the files.
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
    """The content of a CSV file with these ``rows``, which all have the same keys."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


class Record:
    """``history.csv`` and ``steps.csv`` in ``directory``, replaced atomically.

    Args:
        steps: earlier rows of ``steps.csv``, from the checkpoint that the run resumes from.
        board: write TensorBoard files too, if tensorboard is installed.
    """

    def __init__(
        self,
        directory: Path,
        log: Callable[[str], None],
        steps: Sequence[dict] = (),
        *,
        board: bool = False,
    ):
        self.steps = list(steps)
        self._store, self._log = stores.Folder(directory), log
        self._courier: Courier[_Page] = Courier(self._complain)
        self._sent = time.monotonic()
        shown = board and importlib.util.find_spec("tensorboard") is not None
        self._board = _Board(directory / "tensorboard", self.steps) if shown else None

    def add(self, row: dict) -> None:
        """Add one row to ``steps.csv``, whose first column is ``step``; it is written within
        seconds."""
        self.steps.append(row)
        if time.monotonic() - self._sent > FLUSH_SECONDS:
            self.send()

    def send(self, history: Sequence[dict] = ()) -> None:
        """Write all rows in the background. A failure is logged, and the next call tries again."""
        self._sent = time.monotonic()
        tables = {"history.csv": history, "steps.csv": self.steps}
        files = {name: as_csv(rows) for name, rows in tables.items() if rows}
        self._courier.wait_for_turn(0.0)
        self._courier.send(_Page(self._store, files, self._board, list(self.steps)))

    def finish(self) -> None:
        """Wait until everything is written.

        Raises:
            StoreFailed: writing failed repeatedly.
        """
        if not self._courier.insist():
            raise stores.StoreFailed(
                f"the history of the run was not written: {self._courier.trouble}"
            )

    def _complain(self, error: OSError) -> None:
        self._log(
            f"  warning: {error}. Training continues; the history is written when the directory is"
            " writable again"
        )


class _Page:
    """A snapshot of the rows to be written."""

    packed = True

    def __init__(
        self,
        store: stores.Store,
        files: dict[str, bytes],
        board: "_Board | None",
        steps: list[dict],
    ):
        self._store, self._files, self._board, self._steps = store, files, board, steps

    def pack(self) -> None:
        """Nothing to do: the rows are in memory."""

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
        """Nothing to do: there are no local files."""


class _Board:
    """TensorBoard event files, written with tensorboard's own writer, without TensorFlow or
    PyTorch.

    Attributes:
        failed: whether writing failed; then no more events are written.
    """

    def __init__(self, directory: Path, steps: list[dict]):
        self._directory, self.failed = directory, False
        self._writer: Any = None  # tensorboard may be missing, with its types
        self._last = steps[-1]["step"] if steps else 0

    def write(self, steps: list[dict]) -> None:
        """Write the new rows."""
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
        # TensorBoard discards an interrupted run's events from this step on.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._writer.add_event(
            event_pb2.Event(wall_time=time.time(), step=self._last + 1, session_log=start)
        )

    def _add(self, row: dict) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=name, simple_value=float(value))
            for name, value in row.items()
            if name != "step"
        ]
        event = self._events.Event(
            wall_time=time.time(), step=row["step"], summary=Summary(value=values)
        )
        self._writer.add_event(event)
