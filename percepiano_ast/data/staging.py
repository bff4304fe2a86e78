"""Make shards resumably and reproducibly: recordings are staged one by one, then joined into
shards.

A finished recording is written atomically as one file in ``staged/``. When all recordings of a
shard are staged, the shard is written and its staged files are deleted. An interrupted run
therefore loses only the recordings in progress, the disk never holds the data twice, and the result
is identical to an uninterrupted run: a staged file depends only on its recording, a shard only on
its staged files.
"""

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from array_record.python import array_record_module
from etils import epath

from percepiano_ast.config import FrontEnd
from percepiano_ast.data import records, shards
from percepiano_ast.data.progress import Progress
from percepiano_ast.data.remote import Unreachable
from percepiano_ast.data.shards import Item, Shard
from percepiano_ast.data.sources import Damaged
from percepiano_ast.errors import InputError, RunFailed
from percepiano_ast.files import end_with_parent, sha256_of, write_json

GIVE_UP_AFTER = 3  # consecutive recordings that the source did not deliver

_AT_ONCE = 100  # examples
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _disk_is_full(error: Exception) -> bool:
    """ArrayRecord's writer raises a RuntimeError with the system's error message, everything else
    an OSError."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    return isinstance(error, RuntimeError) and any(
        os.strerror(number) in str(error) for number in _FULL
    )


@dataclass(frozen=True)
class Job:
    """Everything that a local or remote process needs to make a shard.

    Attributes:
        produce: ``produce(item, facts)`` yields the recording in blocks (time, mel) as stored, and
            may add JSON-serialisable metadata to ``facts``. It raises ``InputError`` for an
            unusable recording. It must be picklable: a module-level function, or a
                ``functools.partial`` of one.
        directory: of the data set, ``records/`` and ``staged/``.
    """

    builder: type[shards.LogMelBuilder]
    produce: Callable[[Item, dict], Iterator[np.ndarray]]
    directory: Path
    front_end: FrontEnd
    stored: str = "uint8"

    def staged(self, shard: Shard, position: int) -> Path:
        """Staged file of one recording of a shard, without its extension."""
        return self.directory / "staged" / shard.name / f"{position:04d}"

    def record(self, shard: Shard) -> Path:
        """File with the record of a written shard: its checksum, and the facts of its
        recordings."""
        return self.directory / "records" / f"{shard.name}.json"

    def file_of(self, shard: Shard) -> Path:
        """File of the shard."""
        return self.builder.file_of(self.directory, shard)

    def written(self, shard: Shard) -> dict | None:
        """The record of a shard if its file exists with the right length, otherwise None."""
        path, file = self.record(shard), self.file_of(shard)
        if not path.exists() or not file.exists():
            return None
        record = json.loads(path.read_text())
        return record if shards.size_of(file) == record["bytes"] else None

    def stage(self, shard: Shard, position: int) -> dict:
        """Compute one recording, unless it is staged already; returns its facts.

        Raises:
            InputError: the recording is unusable.
        """
        path = self.staged(shard, position)
        done = path.with_suffix(".json")
        if done.exists():
            return json.loads(done.read_text())
        item = shard.items[position]
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            try:
                facts = self._stage(item, partial)
            except Damaged:  # possibly a transfer error: retry once
                facts = self._stage(item, partial)
            partial.replace(path.with_suffix(".array_record"))
        finally:
            partial.unlink(missing_ok=True)
        write_json(done, facts)
        return facts

    def _stage(self, item: Item, path: Path) -> dict:
        """Write the recording's examples, in order, and return its facts."""
        facts: dict = {"key": item.key}
        levels, digest, frames = shards.Levels(self.front_end), hashlib.sha256(), 0
        features = self.builder.features_of(self.stored, self.front_end.n_mels)
        writer = array_record_module.ArrayRecordWriter(str(path), shards.WRITER_OPTIONS)
        try:
            for start, chunk in shards.chunks(self.produce(item, facts), self.builder.CHUNK_FRAMES):
                levels.add(chunk)
                digest.update(np.ascontiguousarray(chunk).data)
                frames += len(chunk)
                place = {"start_frame": start} if self.builder.CHUNK_FRAMES else {}
                writer.write(
                    records.serialise(features, {"log_mel": chunk, **place, **item.fields})
                )
        finally:
            writer.close()
        return facts | {"n_frames": frames, "sha256": digest.hexdigest(), **levels.facts()}

    def write(self, shard: Shard, bad: dict[str, str]) -> None:
        """Join a shard's staged recordings, except the ``bad`` ones, into its file, then write its
        record."""
        file = self.file_of(shard)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
        facts = []
        try:
            writer = array_record_module.ArrayRecordWriter(str(partial), shards.WRITER_OPTIONS)
            for position, item in enumerate(shard.items):
                if item.key not in bad:
                    facts.append(self._append(writer, shard, position))
            writer.close()
            record = {
                "file": file.name,
                "bytes": partial.stat().st_size,
                "sha256": sha256_of(partial),
            }
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)
        self.record(shard).parent.mkdir(exist_ok=True)
        write_json(self.record(shard), record | {"recordings": facts, "bad": bad})
        shutil.rmtree(self.staged(shard, 0).parent)

    def _append(self, writer, shard: Shard, position: int) -> dict:
        """Copy the examples of one staged recording; returns its facts."""
        path = self.staged(shard, position)
        try:
            reader = array_record_module.ArrayRecordReader(str(path.with_suffix(".array_record")))
            # in batches: hours of audio would not fit in memory
            for first in range(0, reader.num_records(), _AT_ONCE):
                for example in reader.read(first, min(first + _AT_ONCE, reader.num_records())):
                    writer.write(example)
            reader.close()
            return json.loads(path.with_suffix(".json").read_text())
        except (ValueError, RuntimeError, OSError) as error:
            if _disk_is_full(error):
                raise
            path.with_suffix(".json").unlink(missing_ok=True)  # so that it is computed again
            raise RunFailed(
                f"{path} was damaged after staging ({error}). Run again to make it again."
            ) from error

    def make(self, shard: Shard) -> None:
        """Make a whole shard in a temporary folder and copy it to its directory, which may be at
        ``gs://``."""
        with tempfile.TemporaryDirectory() as scratch:
            local = replace(self, directory=Path(scratch))
            bad = {}
            for position, item in enumerate(shard.items):
                try:
                    local.stage(shard, position)
                except InputError as error:
                    bad[item.key] = str(error)
            local.staged(shard, 0).parent.mkdir(parents=True, exist_ok=True)
            local.write(shard, bad)
            # the record last: it marks the shard as complete
            for path in (local.file_of(shard), local.record(shard)):
                target = self.directory / path.relative_to(scratch)
                target.parent.mkdir(parents=True, exist_ok=True)
                epath.Path(path).copy(target, overwrite=True)


# ---------------------------------------------------------------- on this machine


@dataclass
class _Outcome:
    """Result of one recording in a worker process."""

    facts: dict | None = None
    bad: str = ""
    unreachable: str = ""
    disk: str = ""


def _attempt(job: Job, shard: Shard, position: int) -> _Outcome:
    try:
        return _Outcome(facts=job.stage(shard, position))
    except InputError as error:
        return _Outcome(bad=str(error))
    except Unreachable as error:
        return _Outcome(unreachable=str(error))
    except (OSError, RuntimeError) as error:
        if not _disk_is_full(error):
            raise
        return _Outcome(disk=str(error))


class LocalRun:
    """Makes the shards of a plan with local worker processes.

    Args:
        bytes_per_second: of stored levels per second of audio, to estimate the disk space needed.
    """

    def __init__(self, job: Job, workers: int, bytes_per_second: float, log: Callable[[str], None]):
        self.job, self.workers, self.log = job, workers, log
        self.bytes_per_second = bytes_per_second
        self.bad: dict[str, str] = {}
        self.unreachable: dict[str, str] = {}
        self.stop = ""  # reason to submit no more work

    def run(self, plan: list[Shard], max_bad: int) -> dict[str, str]:
        """Make all missing shards; returns the unusable recordings with their reasons.

        Raises:
            InputError: not enough disk space.
            RunFailed: the disk is full, the source stopped responding, or a worker was killed;
                finished work is kept.
        """
        missing = [shard for shard in plan if not self.job.written(shard)]
        todo = [
            (shard, k)
            for shard in missing
            for k in range(len(shard.items))
            if not self._is_staged(shard, k)
        ]
        self._clean()
        self.left = {shard.name: sum(s.name == shard.name for s, _ in todo) for shard in missing}
        everything = [item for shard in plan for item in shard.items]
        self.progress = Progress(
            everything, [shard.items[k] for shard, k in todo], self.job.directory, self.log
        )
        self._require_room(sum(shard.items[k].seconds for shard, k in todo))
        # Fork is unsafe with JAX's threads; spawned workers import only the front end's
        # dependencies.
        context = multiprocessing.get_context("spawn")
        size = max(min(self.workers, len(todo) + len(missing)), 1)
        try:
            with ProcessPoolExecutor(
                size, mp_context=context, initializer=end_with_parent
            ) as self.pool:
                try:
                    self._stage_all(missing, todo)
                    if not self.stop and len(self.bad) <= max_bad:
                        self._finish(
                            [self._write(shard) for shard in missing if not self.job.written(shard)]
                        )
                finally:
                    self.pool.shutdown(cancel_futures=True)
        except BrokenProcessPool as error:
            raise RunFailed(
                f"a worker process was killed ({error}), perhaps for lack of memory. Run again to"
                " resume."
            ) from error
        if self.stop:
            raise RunFailed(self.stop)
        return self.bad

    def _is_staged(self, shard: Shard, position: int) -> bool:
        return self.job.staged(shard, position).with_suffix(".json").exists()

    def _clean(self) -> None:
        """Remove partial files of a killed run."""
        for litter in list(self.job.directory.rglob("*.partial")):
            litter.unlink(missing_ok=True)

    def _stage_all(self, missing: list[Shard], todo: list[tuple[Shard, int]]) -> None:
        queue = iter(todo)
        running: dict[Future, tuple[Shard, int]] = {}
        writing = [self._write(shard) for shard in missing if not self.left[shard.name]]
        while True:
            while not self.stop and len(running) < self.workers and (task := next(queue, None)):
                self._keep_room()
                if not self.stop:
                    running[self.pool.submit(_attempt, self.job, *task)] = task
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                shard, position = running.pop(future)
                if self._note(shard, position, future.result()):
                    writing.append(self._write(shard))
        self._finish(writing)

    def _write(self, shard: Shard) -> Future:
        keys = {item.key for item in shard.items}
        bad = {key: reason for key, reason in self.bad.items() if key in keys}
        return self.pool.submit(self.job.write, shard, bad)

    def _finish(self, writing: list[Future]) -> None:
        for future in writing:
            try:
                future.result()
            except (OSError, RuntimeError) as error:
                if not _disk_is_full(error):
                    raise
                self.stop = self._full(str(error))

    def _note(self, shard: Shard, position: int, outcome: _Outcome) -> bool:
        """Register a recording's result; returns whether its shard can be written now."""
        item = shard.items[position]
        self.progress.done(item, outcome.facts)
        if outcome.disk:
            self.stop = self.stop or self._full(outcome.disk)
            return False
        if outcome.bad:
            self.bad[item.key] = outcome.bad
            return False
        if outcome.unreachable:
            self.bad[item.key] = outcome.unreachable
            self.unreachable[item.key] = outcome.unreachable
            if len(self.unreachable) >= GIVE_UP_AFTER:
                self.stop = (
                    f"the source stopped delivering (run again to resume): {outcome.unreachable}"
                )
            return False
        self.unreachable.clear()
        self.left[shard.name] -= 1
        return not self.left[shard.name]

    # Disk space for work in progress: one staged recording per worker, and a shard next to its
    # staged files.
    def _reserve(self) -> float:
        return (shards.SHARD_SECONDS + 3600 * self.workers) * self.bytes_per_second

    def _require_room(self, seconds: float) -> None:
        need = seconds * self.bytes_per_second
        need += min(need, self._reserve())
        free = shutil.disk_usage(self.job.directory).free
        if free < need:
            raise InputError(
                f"{self.job.directory} has {free / 1e9:.2f} GB free, the shards need"
                f" {need / 1e9:.2f} GB: {(need - free) / 1e9:.2f} GB are missing. Free disk space,"
                " choose another directory, or limit the hours."
            )

    def _keep_room(self) -> None:
        need = min(self._reserve(), self.progress.seconds_left * self.bytes_per_second * 2)
        if (free := shutil.disk_usage(self.job.directory).free) < need:
            self.stop = self._full(f"{free / 1e9:.2f} GB are left")

    def _full(self, what: str) -> str:
        missing = self.progress.seconds_left * self.bytes_per_second / 1e9
        return (
            f"the disk of {self.job.directory} is full ({what}); about {missing:.2f} GB are needed"
            " for the rest. Free them and run again to resume."
        )
