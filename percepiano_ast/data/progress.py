"""Text progress of long work on recordings: count, rate, time left and free disk space."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

from percepiano_ast.data.shards import Item

EVERY_SECONDS = 5.0


class Progress:
    """Counts recordings and logs the progress every few seconds.

    Args:
        everything: all recordings; ``todo``: those not done yet.
        directory: its disk is monitored.
    """

    def __init__(
        self, everything: list[Item], todo: list[Item], directory: Path, log: Callable[[str], None]
    ):
        self.total, self.hours = len(everything), sum(item.seconds for item in everything) / 3600
        self.measured = all(item.measured for item in everything)
        self.count = self.total - len(todo)
        self.seconds_left = sum(item.seconds for item in todo)
        self.directory, self.log = directory, log
        self.bytes = self.seconds = 0.0
        self.started: float | None = None
        self.shown = 0.0
        if self.count:
            log(f"  {self.count} of {self.total} are done already")

    def done(self, item: Item, facts: dict | None) -> None:
        """Count one more recording, successful or not."""
        self.count += 1
        self.seconds_left -= item.seconds
        now = time.monotonic()
        if self.started is None:
            # The first result also waited for the workers to start.
            self.started, self.shown = now, now - EVERY_SECONDS
        else:
            self.seconds += item.seconds
            self.bytes += (facts or {}).get("source_bytes", 0)
        if now - self.shown >= EVERY_SECONDS or self.count == self.total:
            self.shown = now
            self._say(now - self.started)

    def _say(self, elapsed: float) -> None:
        free = shutil.disk_usage(self.directory).free / 1e9
        line = f"  {self.count}/{self.total} recordings"
        if self.measured:
            line += f", {self.hours - self.seconds_left / 3600:.2f} of {self.hours:.2f} h"
        if elapsed > 0 and self.seconds:
            left = self.seconds_left / self.seconds * elapsed
            rate = f", {self.bytes / elapsed / 1e6:.1f} MB/s" if self.bytes else ""
            line += f"{rate}, about {_duration(left)} left"
        self.log(f"{line}, {free:.1f} GB of disk free")


def _duration(seconds: float) -> str:
    seconds = max(seconds, 0.0)  # negative if recordings were longer than expected
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
