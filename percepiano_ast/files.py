"""Files: atomic writes, checksums, run directories, retries, downloads, and process pools."""

import contextlib
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np

from percepiano_ast.errors import InputError, RunFailed

LOG_SECONDS = 5.0  # between two lines of progress
_BLOCK = 2**20  # bytes


# --- Writing and checking -------------------------------------------------------------------------


@contextlib.contextmanager
def atomic(path: str | Path, *, unique: bool = False) -> Iterator[Path]:
    """Path of a temporary file beside ``path``, which replaces ``path`` when the block ends.

    Readers see either the old or the new file. If the block raises, the temporary file is deleted.

    Args:
        unique: whether several processes may write the same file; the temporary file then has the
            process id in its name.
    """
    path = as_path(path)
    partial = path.with_name(
        f"{path.name}.{os.getpid()}.partial" if unique else f"{path.name}.partial"
    )
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write a file in one step: readers see either the old or the new content."""
    with atomic(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: str | Path, value) -> None:
    """Write JSON in one step, see `write_atomic`."""
    write_atomic(path, json.dumps(value, indent=1) + "\n")


def sha256_of(*parts: Path | str | bytes | np.ndarray) -> str:
    """SHA-256, in hexadecimal, of the concatenated parts: the content of a file for a `Path`, UTF-8
    for a string, the values of an array in C order."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
        elif isinstance(part, np.ndarray):
            digest.update(part.tobytes())
        else:
            digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()


def copy_verified(
    files: dict[str, dict],
    source: Path,
    target: Path,
    copy: Callable[[Path, Path], object] = shutil.copyfile,
    log: Callable[[str], None] = print,
) -> None:
    """Copy ``files``, ``{name: {"bytes", "sha256"}}``, from one folder to another; files that match
    already are kept.

    Raises:
        InputError: too little disk space.
        RunFailed: a file does not match its length or checksum.
    """
    todo = {
        name: known
        for name, known in files.items()
        if not ((target / name).is_file() and sha256_of(target / name) == known["sha256"])
    }
    size = sum(known["bytes"] for known in todo.values())
    target.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(target).free) < size:
        raise InputError(
            f"{target} has {free / 1e9:.1f} GB free, the files need {size / 1e9:.1f} GB. Free disk"
            " space there."
        )
    for number, (name, known) in enumerate(todo.items(), start=1):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        with atomic(target / name) as partial:
            copy(source / name, partial)
            if partial.stat().st_size != known["bytes"]:
                raise RunFailed(f"{source / name} has the wrong length. Make it again.")
            if sha256_of(partial) != known["sha256"]:
                raise RunFailed(
                    f"the copy of {source / name} has the wrong checksum. Copy it again."
                )
        if number % 10 == 0 or number == len(todo):
            log(f"  {number}/{len(todo)} files copied to {target}")


# --- Run directories ------------------------------------------------------------------------------


def as_path(place: str | Path) -> Path:
    """A local path, or a path object for ``gs://``.

    Raises:
        InputError: an address with another scheme.
    """
    scheme, there, _ = str(place).partition("://")
    if there and scheme != "gs":
        raise InputError(f"cannot write to {place}: give a local directory or a gs:// address")
    if there:
        from etils import epath  # not needed to rate recordings

        return epath.Path(place)
    return Path(place)


def claim_directory(directory: str | Path, settings: dict) -> Path:
    """Reserve ``directory`` for one configuration, or verify that it is already reserved for it.

    The settings are stored in ``settings.json``. A second run with the same settings resumes; other
    settings are refused.

    Raises:
        InputError: the directory holds the output of another configuration, or is not writable.
    """
    directory = as_path(directory)
    wanted = json.loads(json.dumps(settings))
    path = directory / "settings.json"
    if path.exists():
        try:
            found = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path} is damaged ({error}). Choose another output directory, or delete this one."
            ) from error
        if changed := difference(found, wanted):
            raise InputError(
                f"{directory} holds the output of another configuration ({changed}). "
                "Choose another output directory, or delete this one to start over."
            )
        return directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(path, wanted)
    except OSError as error:
        raise InputError(
            f"cannot write to {directory} ({error}). Choose another output directory."
        ) from error
    return directory


def difference(found: dict, wanted: dict) -> str:
    """The differences between existing and requested settings, compared as JSON; empty if equal."""
    found, wanted = json.loads(json.dumps([found, wanted]))
    changed = sorted(
        key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key)
    )
    return "; ".join(
        f"{key}: found {_short(found.get(key))}, requested {_short(wanted.get(key))}"
        for key in changed
    )


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


# --- Progress and worker processes ----------------------------------------------------------------


def echo(line: str) -> None:
    """Print a line atomically, also from several threads."""
    print(f"{line}\n", end="", flush=True)


class TimeLeft:
    """Logs the progress of long work every `LOG_SECONDS`: ``  12 of 40, about 90 s left``."""

    def __init__(self, total: int, log: Callable[[str], None] = print, what: str = ""):
        self.total, self.log, self.what = total, log, what
        self.started = self.shown = time.monotonic()

    def __call__(self, done: int) -> None:
        """Log that ``done`` of the items are finished, if the last line is old enough."""
        now = time.monotonic()
        if now - self.shown > LOG_SECONDS:
            self.shown = now
            left = (now - self.started) / done * (self.total - done)
            self.log(f"  {self.what}{done:,} of {self.total:,}, about {left:.0f} s left")


def process_map(
    function: Callable[[Any], Any], items: Iterable, workers: int, *, chunksize: int = 1
) -> Iterator:
    """The results of ``function`` for every item, in order, computed by ``workers`` processes.

    ``function`` and items must be picklable. With one worker, everything runs in this process. The
    workers end with this process, so that they cannot interfere with the next run.

    Raises:
        RunFailed: a worker was killed; results yielded before remain valid.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    # Fork is unsafe with JAX's threads.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent) as pool:
            try:
                yield from pool.map(function, items, chunksize=chunksize)
            finally:
                pool.shutdown(cancel_futures=True)
    except BrokenProcessPool as error:
        raise RunFailed(
            f"a worker process was killed ({error}), perhaps for lack of memory. Run again to"
            " resume."
        ) from error


def end_with_parent() -> None:
    """Initializer of a process pool: end this worker when its parent is killed."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None  # every worker has one
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
