"""The lock of a training: one run at a time writes to a storage location, which may be a mounted
Drive or at ``gs://``.

A run has a file with a random name there, ``lock.0123456789abcdef.json``, and rewrites it every
minute. To get the lock, a run writes its file and then lists all: if another run's file is there,
it deletes its own and tries again. So of two runs at least one sees the other, without an atomic
operation, which Drive does not have. Where a mount shows the files of other machines late, two runs
may start; each looks again every minute, and one of them stops.

A lock is stale if its process has ended, as seen on the same machine. Clocks of other machines may
be wrong: their lock is stale if the file does not change while it is watched.
"""

import contextlib
import errno
import json
import logging
import os
import random
import re
import secrets
import socket
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

from percepiano_ast.errors import InputError, RunFailed
from percepiano_ast.files import read_json
from percepiano_ast.training.checkpoints import Storage, StorageError

HEARTBEAT = 60.0  # seconds between two changes of the file
STALE = 180.0  # seconds of watching another machine's file; Drive may show a change a minute late
POLL = 2.0  # seconds between two looks
OLD = 3600.0  # seconds: a file of this age is stale without being watched
_NAME = re.compile(r"lock\.[0-9a-f]{16}\.json")
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}
_FACTS = {"host": str, "process": int, "started": str, "machine": str, "since": str, "beat": str}

logger = logging.getLogger(__name__)


class Lock:
    """Exclusive use of ``place``, a folder or ``gs://BUCKET/PREFIX``, within a ``with`` block.

    Raises:
        InputError: another run uses it, or it is not writable.
        StorageError: the storage location fails.

    Attributes:
        lost: empty, or how another run has taken the place over; nothing may be written then.
    """

    def __init__(self, place: str | Path):
        self.place, self.lost = place, ""
        self._storage, self._name = Storage(place), f"lock.{secrets.token_hex(8)}.json"
        self._since, self._over, self._alone = _now(), threading.Event(), threading.RLock()

    def __enter__(self) -> "Lock":
        try:
            while True:
                for name in self._others():
                    self._remove_stale(name)
                self._storage.write(self._name, self._content())
                if not self._others():
                    break
                self._storage.remove(self._name)
                time.sleep(random.uniform(0.1, 1.0))
        except StorageError as error:
            if error.errno not in _NOT_WRITABLE:
                raise
            raise InputError(f"{error}. Choose another output directory") from error
        threading.Thread(target=self._beat, name="lock", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        if self._alone.acquire(timeout=10):  # the other thread may hang in a call
            with contextlib.suppress(OSError):
                self._storage.remove(self._name)
            self._alone.release()

    def check(self) -> None:
        """Call this before anything is overwritten or deleted.

        Raises:
            RunFailed: another run has taken the place over.
            StorageError: unknown, the storage location fails.
        """
        with self._alone:
            if self._over.is_set():  # a thread that has hung since
                raise RunFailed(f"{self.place}: the run has ended")
            if not self.lost and self._name not in self._storage.names():
                if not self._others():  # somebody has deleted the file, or unmounted the folder
                    self._storage.write(self._name, self._content())
                self._yield_to(self._others())
            if self.lost:
                raise RunFailed(self.lost)

    def _yield_to(self, others: list[str]) -> None:
        """Give up if there are others."""
        for name in others:
            content = self._read(name)
            if content is not None:
                self.lost = (
                    f"{self.place} was taken over by {_owner(content)}: this run stops, and leaves"
                    " everything there as it is. Stop the other run to resume this one"
                )
                self._storage.remove(self._name)
                return

    def _beat(self) -> None:
        seen: dict[str, bytes | None] = {}
        while not self._over.wait(HEARTBEAT):
            try:
                with self._alone:
                    self.check()
                    self._storage.overwrite(self._name, self._content())
                    found = {name: self._read(name) for name in self._others()}
                    alive = [one for one in found if one in seen and found[one] != seen[one]]
                    self._yield_to([one for one in alive if one < self._name])
                    seen = found
            except RunFailed:
                return
            except OSError:  # saving warns about the storage location
                continue

    def _others(self) -> list[str]:
        names = self._storage.names()
        return [name for name in names if _NAME.fullmatch(name) and name != self._name]

    def _read(self, name: str) -> bytes | None:
        try:
            return self._storage.read(name)
        except StorageError as error:
            if error.errno != errno.ENOENT:
                raise
            return None

    def _content(self) -> bytes:
        """JSON, always of the same length."""
        process = os.getpid()
        facts = {"host": socket.gethostname(), "process": process, "started": _start_of(process)}
        facts |= {"machine": _machine(), "since": self._since, "beat": _now()}
        return json.dumps(facts, indent=1).encode()

    def _remove_stale(self, name: str) -> None:
        """Remove the lock of a run that has ended; InputError if it goes on."""
        before = self._read(name)
        if before is None:
            return
        owner = _owner(before)
        in_use = InputError(
            f"{self.place} is in use by {owner}. Wait until that run has ended or stop it, or"
            " choose another output directory"
        )
        try:
            facts = read_json(before, _FACTS)
            age = (datetime.now(UTC) - datetime.fromisoformat(facts["beat"])).total_seconds()
        except (ValueError, TypeError):  # damaged, or not completely there
            facts, age = {"machine": ""}, 0.0
        if facts["machine"] == _machine():
            started = _start_of(facts["process"])
            if started and started == facts["started"] and facts["process"] != os.getpid():
                raise in_use
        elif age < OLD:
            logger.info(
                f"  {self.place} was in use by {owner}. Waiting up to {STALE:.0f} s to see whether"
                " that run goes on"
            )
            end = time.monotonic() + STALE
            while (left := end - time.monotonic()) > 0:
                time.sleep(min(POLL, left))
                now = self._read(name)
                if now is None:
                    return
                if now != before:
                    raise in_use
        logger.info(f"  the run of {owner} has ended: taking over")
        self._storage.remove(name)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _owner(content: bytes) -> str:
    try:
        facts = read_json(content, _FACTS)
    except InputError:
        return "another run"
    since = facts["since"][:16].replace("T", " ")
    return f"process {facts['process']} on {facts['host']} since {since} UTC"


def _machine() -> str:
    """Identifies the machine since its start, and the container, whose processes have numbers of
    their own."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # Linux only
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _start_of(process: int) -> str:
    """When a process started, which tells it from a later one of the same number; empty if there is
    none."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return "" if state[0] in "ZX" else state[19]  # a zombie has ended
    except OSError:
        if Path("/proc/self/stat").exists():
            return ""
    try:
        os.kill(process, 0)  # signal 0 tests whether a process exists
    except ProcessLookupError:
        return ""
    except (OSError, OverflowError):
        pass
    return "unknown"
