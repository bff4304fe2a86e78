"""Storage locations for checkpoints: a folder, which may be a mounted Drive, or ``gs://``. They may
be small, slow or unreliable.

Storage errors must not stop training. Every operation has a time limit without progress, is tried
`ATTEMPTS` times, and then fails with one exception that holds the system's message. Written files
are read back and compared.
"""

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from percepiano_ast.errors import InputError

BLOCK = 2**22
# seconds without progress before an operation is given up; a hanging mount never returns
PATIENCE = 120.0
ATTEMPTS = 3
FIRST_WAIT = 0.5  # seconds, doubled with every attempt
# Errors for which an immediate retry does not help; the next checkpoint tries again.
_LASTING = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EFBIG,
}

Beat = Callable[[], None]


class StoreFailed(OSError):
    """A storage operation failed; the message holds the file and the system's message.

    Attributes:
        number: the system's error number, see ``errno``, or None.
    """

    def __init__(self, message: str, number: int | None = None):
        super().__init__(message)
        self.number = number


def _blocks(file: BinaryIO, beat: Beat) -> Iterator[bytes]:
    while block := file.read(BLOCK):
        beat()
        yield block


def sha256_of(file: BinaryIO, beat: Beat = lambda: None) -> str:
    """SHA-256 of the rest of an open file, in hexadecimal."""
    digest = hashlib.sha256()
    for block in _blocks(file, beat):
        digest.update(block)
    return digest.hexdigest()


def watched(work: Callable[[Beat], object], patience: float):
    """Run ``work(beat)`` in a thread; returns its result, or raises TimeoutError after ``patience``
    s without a ``beat``.

    A thread in a system call that never returns cannot be stopped; it keeps running.
    """
    alive, over = [time.monotonic()], threading.Event()
    outcome: dict[str, Any] = {}

    def beat() -> None:
        alive[0] = time.monotonic()

    def run() -> None:
        try:
            outcome["result"] = work(beat)
        except BaseException as error:  # raised again in the caller
            outcome["error"] = error
        over.set()

    threading.Thread(target=run, name="store", daemon=True).start()
    while not over.wait(min(patience, max(alive[0] + patience - time.monotonic(), 0.01))):
        if time.monotonic() - alive[0] >= patience:
            raise TimeoutError(errno.ETIMEDOUT, f"no response for {patience:g} s")
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]


class Store:
    """Files by name in one storage location. Names may include a folder; `names` does not list the
    content of folders.

    Attributes:
        place: path or address.
        patience: seconds without progress after which an operation is given up.
    """

    failures: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, place: str):
        self.place, self.patience = place, PATIENCE

    def path_of(self, name: str) -> str:
        """Path or address of a file, for messages."""
        return f"{self.place.rstrip('/')}/{name}"

    def put(self, name: str, local: Path) -> str:
        """Copy a local file to the store, read it back and compare; returns its SHA-256.

        Raises:
            StoreFailed: it could not be written, or reads back differently.
        """

        def blocks(beat: Beat) -> Iterator[bytes]:
            with local.open("rb") as source:
                yield from _blocks(source, beat)

        return self._put(name, blocks)

    def write(self, name: str, content: bytes) -> None:
        """Write a small file from memory, read it back and compare."""
        self._put(name, lambda beat: iter([content]))

    def _put(self, name: str, blocks: Callable[[Beat], Iterator[bytes]]) -> str:
        def whole(beat: Beat) -> str:
            digest = hashlib.sha256()

            def hashed() -> Iterator[bytes]:
                for block in blocks(beat):
                    digest.update(block)
                    yield block

            self._write(name, hashed())
            with self._open(name) as file:
                if sha256_of(file, beat) != digest.hexdigest():
                    raise OSError(
                        errno.EIO, "the content read back differs; the disk or the mount is failing"
                    )
            return digest.hexdigest()

        return self._attempt("write", name, whole)

    def get(self, name: str, local: Path, largest: int) -> str:
        """Copy a file of at most ``largest`` bytes to a local file; returns its SHA-256.

        Raises:
            StoreFailed: it cannot be read, or is larger.
        """

        def copy(beat: Beat) -> str:
            left, digest = largest, hashlib.sha256()
            with self._open(name) as source, local.open("wb") as target:
                for block in _blocks(source, beat):
                    left -= len(block)
                    if left < 0:
                        raise OSError(errno.EFBIG, f"it is larger than {largest:,} bytes")
                    digest.update(block)
                    target.write(block)
            return digest.hexdigest()

        return self._attempt("read", name, copy)

    def read(self, name: str, largest: int = 2**26) -> bytes:
        """The content of a small file.

        Raises:
            StoreFailed: it cannot be read, or is larger than ``largest`` bytes.
        """

        def fetch(beat: Beat) -> bytes:
            with self._open(name) as file:
                content = file.read(largest + 1)
            if len(content) > largest:
                raise OSError(errno.EFBIG, f"it is larger than {largest:,} bytes")
            return content

        return self._attempt("read", name, fetch)

    def require_writable(self, probe: str) -> None:
        """Write a small file of this name, read it back and delete it.

        Raises:
            StoreFailed: the file cannot be written, read or deleted.
        """
        self.write(probe, b"?")
        self.remove(probe)

    def names(self) -> list[str]:
        """All files, sorted; an empty list if the storage location does not exist yet."""
        return sorted(self._attempt("list", "", lambda beat: self._names()))

    def remove(self, name: str, *, emptied: bool = False) -> None:
        """Delete a file; a missing file is not an error. ``emptied`` truncates it first, for
        storage locations with a trash."""
        self._attempt("delete", name, lambda beat: self._remove(name, emptied))

    def free(self) -> int | None:
        """Free bytes; None if unknown."""
        return self._attempt("get the free space of", "", lambda beat: self._free())

    def _attempt(self, what: str, name: str, work: Callable[[Beat], object]):
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return watched(work, self.patience)
            except self.failures as error:
                # A hanging call leaves a thread behind, so it is not retried.
                number = error.errno if isinstance(error, OSError) else None
                if isinstance(error, FileNotFoundError):  # those of gcsfs have no errno
                    number = errno.ENOENT
                lasting = isinstance(error, TimeoutError) or number in _LASTING
                if lasting or attempt == ATTEMPTS:
                    words = str(error) or type(error).__name__
                    raise StoreFailed(
                        f"cannot {what} {self.path_of(name)}: {words}", number
                    ) from error
                time.sleep(FIRST_WAIT * 2 ** (attempt - 1))

    def _write(self, name: str, blocks: Iterator[bytes]) -> None:
        raise NotImplementedError

    def _open(self, name: str) -> BinaryIO:
        raise NotImplementedError

    def _names(self) -> list[str]:
        raise NotImplementedError

    def _remove(self, name: str, emptied: bool) -> None:
        raise NotImplementedError

    def _free(self) -> int | None:
        return None


class FolderStore(Store):
    """A directory on this machine, such as a mounted Drive."""

    def __init__(self, place: str | Path):
        super().__init__(str(place))
        self.folder = Path(place)

    def _write(self, name: str, blocks: Iterator[bytes]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f"{name}.partial"
        try:
            with partial.open("wb") as file:
                for block in blocks:
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
                # so that the file is read back from disk, not from the page cache
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            partial.replace(self.folder / name)
        except OSError:
            self._discard(partial)
            raise

    def _discard(self, partial: Path) -> None:
        # storage is failing; the next start deletes the remaining file
        with contextlib.suppress(OSError):
            self._remove(partial.name, True)

    def _open(self, name: str) -> BinaryIO:
        return (self.folder / name).open("rb")

    def _names(self) -> list[str]:
        return (
            [path.name for path in self.folder.iterdir() if path.is_file()]
            if self.folder.is_dir()
            else []
        )

    def _remove(self, name: str, emptied: bool) -> None:
        path = self.folder / name
        try:
            if emptied:
                os.truncate(path, 0)
            path.unlink()
        except FileNotFoundError:
            pass

    def _free(self) -> int:
        there = self.folder
        while not there.exists():
            there = there.parent
        return shutil.disk_usage(there).free


class Bucket(Store):
    """A prefix in Google Cloud Storage, with gcsfs. Objects are written atomically."""

    # gcsfs, aiohttp and google-auth have no common exception class.
    failures = (Exception,)

    def __init__(self, place: str):
        super().__init__(place)
        try:
            from gcsfs.core import GCSFileSystem
        except ImportError as error:
            raise InputError(
                f"{place} needs gcsfs: pip install gcsfs, or save checkpoints in a folder"
            ) from error
        # gcsfs logs every failed attempt with a traceback; the exception holds the final error.
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
        # An emulator needs no credentials; otherwise gcsfs finds those of Google's tools.
        token = "anon" if os.environ.get("STORAGE_EMULATOR_HOST") else None
        # Not `gcsfs.GCSFileSystem`: since 2026 it queries another service for the kind of bucket,
        # and hangs if that does not respond. Plain objects are sufficient here.
        self.system = GCSFileSystem(token=token, use_listings_cache=False, skip_instance_cache=True)

    def _write(self, name: str, blocks: Iterator[bytes]) -> None:
        with self.system.open(self.path_of(name), "wb", block_size=2 * BLOCK) as file:
            for block in blocks:
                file.write(block)

    def _open(self, name: str) -> BinaryIO:
        return self.system.open(self.path_of(name), "rb", block_size=BLOCK, cache_type="readahead")

    def _names(self) -> list[str]:
        try:
            found = self.system.ls(self.place, detail=True)
        except FileNotFoundError:
            return []
        return [entry["name"].rpartition("/")[2] for entry in found if entry["type"] == "file"]

    def _remove(self, name: str, emptied: bool) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.system.rm_file(self.path_of(name))


def open_store(place: str | Path) -> Store:
    """The store at a folder's path or a ``gs://`` address, without accessing it.

    Raises:
        InputError: another kind of address, or gcsfs is missing.
    """
    return open_bucket(str(place)) if "://" in str(place) else FolderStore(Path(place))


def open_bucket(address: str) -> Bucket:
    """The store at a ``gs://`` address, without accessing it.

    Raises:
        InputError: another kind of address, or gcsfs is missing.
    """
    scheme, _, rest = address.partition("://")
    if scheme != "gs" or not rest.strip("/"):
        raise InputError(
            f"cannot save checkpoints at {address}: give a folder, or gs://BUCKET/PREFIX"
        )
    return Bucket(address)
