"""Verified checkpoints in a storage location that may be slow, full or unreachable.

Training waits only for a copy of the state in memory. A thread writes the copy to the local disk,
copies the file to the storage location, reads it back and compares. The manifest is written last.

``step_00000100.0123abcd.p0.safetensors`` holds the arrays of process 0 after step 100. The middle
part is random and new at every start, because Google Drive renames a second file of the same name
to "x (1)". The manifest, ``step_00000100.0123abcd.json``, has all checksums, the structure of the
state, and what a user of the weights needs. The other processes describe their files in
``...p1.json`` and so on, so saving needs no collective operation.

The random stream and the position in the data follow from the seed and the step. Resuming needs
only these two.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from percepiano_ast import __version__
from percepiano_ast.dimensions import KEYS
from percepiano_ast.errors import InputError
from percepiano_ast.files import difference, read_signed_json, signed_json
from percepiano_ast.training import mesh

SAVE_MINUTES = 10.0  # between checkpoints within a long epoch
SOON = 1.0  # seconds that a save waits for the previous upload
LONG = 20.0  # an upload that takes longer, in seconds, is logged
BLOCK = 2**22  # bytes
TIMEOUT = 120.0  # seconds without progress; a hanging mount never returns
PROCESS_TIMEOUT = 300.0  # seconds that the first process waits for the files of the others
ATTEMPTS = 3  # of an operation in a storage location
FIRST_WAIT = 0.5  # seconds between them, doubled with every attempt
FINAL_WAITS = (0.0, 2.0, 10.0)  # seconds before each attempt at the end of a run
# Errors for which an immediate retry does not help; the next checkpoint tries again.
_LASTING = {
    getattr(errno, name) for name in "ENOSPC EDQUOT EROFS EACCES EPERM ENOENT ENOTDIR EFBIG".split()
}
_NAME = re.compile(r"(step_\d{8}\.[0-9a-f]{8})(\.p\d+)?\.(safetensors|json)(\.partial)?")
_FILE = {"name": str, "bytes": int, "sha256": str}  # one entry of a manifest's files
_MANIFEST: dict[str, Any] = {"step": int, "score": float | None, "sha256": str, "bytes": int}
# names of files are compared, see `read_manifest`
_MANIFEST |= {"files": [_FILE | {"name": object}], "tree": dict}

logger = logging.getLogger(__name__)

# --- Storage locations --------------------------------------------------------------------------


Beat = Callable[[], None]  # reports progress


class StorageError(OSError):
    """A storage operation failed; the message holds the file and the system's message, and
    ``errno`` its number or None."""

    def __init__(self, message: str, number: int | None = None):
        super().__init__(message)
        self.errno = number


def watched(work: Callable[[Beat], Any]) -> Any:
    """Run ``work(beat)`` in a thread; returns its result, or raises TimeoutError after `TIMEOUT`
    seconds without a call of ``beat``. A thread in a system call that never returns keeps running.
    """
    alive, over, outcome = [time.monotonic()], threading.Event(), {}

    def beat() -> None:
        alive[0] = time.monotonic()

    def run() -> None:
        try:
            outcome["result"] = work(beat)
        except BaseException as error:  # raised again in the caller
            outcome["error"] = error
        over.set()

    threading.Thread(target=run, name="storage", daemon=True).start()
    while not over.wait(min(TIMEOUT, max(alive[0] + TIMEOUT - time.monotonic(), 0.01))):
        if time.monotonic() - alive[0] >= TIMEOUT:
            raise TimeoutError(errno.ETIMEDOUT, f"no response for {TIMEOUT:g} s")
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]


class Storage:
    """Files by name in a folder, which may be a mounted Drive, or at ``gs://BUCKET/PREFIX``.

    Every operation has a time limit without progress, is tried `ATTEMPTS` times, and then raises
    `StorageError`.

    Attributes:
        place: path or address.
        fs: gcsfs's file system, or None.

    Raises:
        InputError: another kind of address, or gcsfs is missing.
    """

    def __init__(self, place: str | Path):
        self.place = str(place)
        self.fs: Any = None
        self._failures: tuple[type[Exception], ...] = (OSError,)
        scheme, remote, rest = self.place.partition("://")
        if not remote:
            return
        if scheme != "gs" or not rest.strip("/"):
            raise InputError(
                f"cannot save checkpoints at {place}: give a folder, or gs://BUCKET/PREFIX"
            )
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
        self.fs = GCSFileSystem(token=token, use_listings_cache=False, skip_instance_cache=True)
        # gcsfs, aiohttp and google-auth have no common exception class.
        self._failures = (Exception,)

    def path_of(self, name: str) -> str:
        """Path or address of a file."""
        return f"{self.place.rstrip('/')}/{name}"

    def write(self, name: str, content: bytes | Path) -> str:
        """Write a file from memory or from a local file, read it back and compare; returns its
        SHA-256."""

        def work(beat: Beat) -> str:
            written, read = hashlib.sha256(), hashlib.sha256()

            def blocks() -> Iterator[bytes]:
                with content.open("rb") if isinstance(content, Path) else BytesIO(content) as file:
                    while block := file.read(BLOCK):
                        beat()
                        written.update(block)
                        yield block

            self._write(name, blocks())
            for block in self._read(name, beat):
                read.update(block)
            if read.digest() != written.digest():
                raise OSError(
                    errno.EIO, "the content read back differs; the disk or the mount is failing"
                )
            return read.hexdigest()

        return self._attempt("write", name, work)

    def get(self, name: str, local: Path, largest: int) -> str:
        """Copy a file of at most ``largest`` bytes to a local file; returns its SHA-256."""

        def work(beat: Beat) -> str:
            digest = hashlib.sha256()
            with local.open("wb") as target:
                for block in self._read(name, beat, largest):
                    digest.update(block)
                    target.write(block)
            return digest.hexdigest()

        return self._attempt("read", name, work)

    def read(self, name: str, largest: int = 2**26) -> bytes:
        """The content of a file of at most ``largest`` bytes."""
        return self._attempt("read", name, lambda beat: b"".join(self._read(name, beat, largest)))

    def overwrite(self, name: str, content: bytes) -> None:
        """Overwrite a small file by as many bytes in place; a missing one is an error in a folder.
        Drive's trash would hold every file that is replaced."""

        def work(beat: Beat) -> None:
            if self.fs:
                self.fs.pipe_file(self.path_of(name), content)
                return
            with open(self.path_of(name), "r+b") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())

        self._attempt("write", name, work)

    def require_writable(self, probe: str) -> None:
        """Write a small file of this name, read it back and delete it."""
        self.write(probe, b"?")
        self.remove(probe)

    def names(self) -> list[str]:
        """All files, sorted; an empty list if the storage location does not exist yet."""

        def work(beat: Beat) -> list[str]:
            try:
                if not self.fs:
                    with os.scandir(self.place) as entries:
                        return sorted(entry.name for entry in entries if entry.is_file())
                found = self.fs.ls(self.place, detail=True)
            except FileNotFoundError:
                return []
            files = (entry["name"] for entry in found if entry["type"] == "file")
            return sorted(file.rpartition("/")[2] for file in files)

        return self._attempt("list", "", work)

    def remove(self, name: str, *, truncate: bool = False) -> None:
        """Delete a file; a missing file is not an error. ``truncate`` empties it first: what is in
        Drive's trash counts against the quota."""
        self._attempt("delete", name, lambda beat: self._remove(name, truncate))

    def free(self) -> int | None:
        """Free bytes; None if unknown."""
        if self.fs:
            return None

        def work(beat: Beat) -> int:
            folder = Path(self.place)
            there = next(path for path in (folder, *folder.parents) if path.exists())
            return shutil.disk_usage(there).free

        return self._attempt("get the free space of", "", work)

    def _attempt(self, what: str, name: str, work: Callable[[Beat], Any]) -> Any:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return watched(work)
            except self._failures as error:
                number = error.errno if isinstance(error, OSError) else None
                if isinstance(error, FileNotFoundError):  # those of gcsfs have no errno
                    number = errno.ENOENT
                # A hanging call leaves a thread behind, so it is not retried.
                lasting = isinstance(error, TimeoutError) or number in _LASTING
                if lasting or attempt == ATTEMPTS:
                    message = str(error) or type(error).__name__
                    raise StorageError(
                        f"cannot {what} {self.path_of(name)}: {message}", number
                    ) from error
                time.sleep(FIRST_WAIT * 2 ** (attempt - 1))

    def _write(self, name: str, blocks: Iterator[bytes]) -> None:
        if self.fs:  # objects are written atomically
            with self.fs.open(self.path_of(name), "wb", block_size=2 * BLOCK) as file:
                file.writelines(blocks)
            return
        path, partial = Path(self.path_of(name)), Path(self.path_of(f"{name}.partial"))
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                file.writelines(blocks)
                file.flush()
                os.fsync(file.fileno())
                # so that the file is read back from disk, not from the page cache
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            partial.replace(path)
        except OSError:
            with contextlib.suppress(OSError):  # the next start deletes it
                self._remove(f"{name}.partial", truncate=True)
            raise

    def _read(self, name: str, beat: Beat, largest: float = math.inf) -> Iterator[bytes]:
        path, ahead = self.path_of(name), {"block_size": BLOCK, "cache_type": "readahead"}
        with self.fs.open(path, "rb", **ahead) if self.fs else open(path, "rb") as file:
            size = 0
            while block := file.read(BLOCK):
                beat()
                size += len(block)
                if size > largest:
                    raise OSError(errno.EFBIG, f"it is larger than {largest:,} bytes")
                yield block

    def _remove(self, name: str, truncate: bool) -> None:
        with contextlib.suppress(FileNotFoundError):
            if self.fs:
                self.fs.rm_file(self.path_of(name))
                return
            if truncate:
                os.truncate(self.path_of(name), 0)
            os.unlink(self.path_of(name))


# --- In the background --------------------------------------------------------------------------


class Background:
    """Runs the newest submitted work in a daemon thread, which does not block the exit of the
    process if it hangs. `finish` retries work that raised OSError, unless newer work was submitted.

    Attributes:
        error: of the last work, or None; ``warn`` was called with it.
    """

    def __init__(self, warn: Callable[[OSError], None]):
        self.error: OSError | None = None
        self._warn, self._changed = warn, threading.Condition()
        self._next: Callable[[], None] | None = None
        self._failed: Callable[[], None] | None = None
        self._started: float | None = None
        self._fault: BaseException | None = None  # an error other than those of disk and storage

    @property
    def busy(self) -> bool:
        """Whether work is being done."""
        return self._started is not None

    @property
    def seconds(self) -> float:
        """Seconds since the current work began; 0 without any."""
        started = self._started
        return 0.0 if started is None else time.monotonic() - started

    def submit(self, work: Callable[[], None]) -> None:
        """Do this work next, instead of other work that has not begun."""
        with self._changed:
            self._raise_fault()
            self._next, self._failed = work, None
            if self._started is None:
                self._started = time.monotonic()
                threading.Thread(target=self._run, name="background", daemon=True).start()

    def wait(self, seconds: float | None = None) -> None:
        """Wait until all work is done or has failed, at most this long."""
        with self._changed:
            self._changed.wait_for(lambda: self._started is None, seconds)
            self._raise_fault()

    def finish(self) -> bool:
        """Wait, and try again after errors; returns whether the newest work is done."""
        for seconds in FINAL_WAITS:
            self.wait()
            if self._failed is None:
                return True
            time.sleep(seconds)
            self.submit(self._failed)
        self.wait()
        return self._failed is None

    def _raise_fault(self) -> None:
        if self._fault is not None:
            raise self._fault

    def _run(self) -> None:
        while True:
            with self._changed:
                work, self._next = self._next, None
                if work is None or self._fault:
                    self._started = None
                    self._changed.notify_all()
                    return
                self._started = time.monotonic()
            try:
                work()
                self.error = None
            except OSError as error:
                self.error = error
                self._warn(error)
                with self._changed:
                    self._failed = None if self._next else work
            except BaseException as error:  # raised again in the caller
                self._fault = error


# --- Manifests and arrays -----------------------------------------------------------------------


def shown(size: int) -> str:
    """Format a number of bytes: ``1.38 GB``."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


def size_of(tree) -> int:
    """Bytes of all arrays, or their shape descriptions, in a tree."""
    return sum(
        math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree)
    )


def check_disk_space(place: str | Path, one: int, most: str) -> None:
    """Before a run: log the disk space that its checkpoints need, ``one`` bytes each and ``most``
    in total (text), and check that one fits.

    Raises:
        InputError: the storage location has too little space.
        OSError: the local disk has too little space, or the storage location does not respond or is
            not writable.
    """
    storage = Storage(place)
    free = storage.free()
    logger.info(
        f"checkpoints of {shown(one)} in {place}:\n  at most"
        f" {most}{'' if free is None else f'; {shown(free)} free'}"
    )
    if free is not None and free < one:
        raise InputError(
            f"{place} has {shown(free)} free, but one checkpoint needs {shown(one)}. Free space, or"
            " choose another directory"
        )
    # If the process is killed here, the next start deletes the file as incomplete.
    storage.require_writable(f"step_00000000.{secrets.token_hex(4)}.p0.json")
    _require_local(one)


def _require_local(size: int) -> None:
    folder = tempfile.gettempdir()
    if (free := shutil.disk_usage(folder).free) < size:
        raise OSError(
            f"{folder} has {shown(free)} free, but a checkpoint needs {shown(size)}. Set TMPDIR to"
            " a larger disk"
        )


def complete(files: list[str]) -> list[str]:
    """The names of the checkpoints whose manifest is among these files, oldest first."""
    found = (_NAME.fullmatch(file) for file in files)
    return sorted(match[1] for match in found if match and match[0] == f"{match[1]}.json")


def _step_of(name: str) -> int:
    return int(name[5:13])


def read_manifest(storage: Storage, name: str) -> dict:
    """The manifest of a checkpoint; InputError if it is damaged."""
    content = storage.read(f"{name}.json")
    if b'"marker"' in content:
        raise InputError("it was saved by an earlier version, which used another format")
    manifest = read_signed_json(content, _MANIFEST, name="its JSON file", advice="")
    names = [file["name"] for file in manifest["files"]]
    expected = [f"{name}.p{number}.safetensors" for number in range(max(len(names), 1))]
    if names != expected or manifest["step"] != _step_of(name):
        raise InputError("its JSON file does not describe a valid checkpoint")
    return manifest


def _structure(tree):
    """A tree with the names of its arrays as leaves, as dicts and lists."""

    def plain(node):
        if dataclasses.is_dataclass(node):
            node = {field.name: getattr(node, field.name) for field in dataclasses.fields(node)}
        elif hasattr(node, "_asdict"):  # optax's states are named tuples
            node = node._asdict()
        if isinstance(node, dict):
            return {key: plain(value) for key, value in node.items()}
        return [plain(value) for value in node] if isinstance(node, list | tuple) else node

    return plain(jax.tree.unflatten(jax.tree.structure(tree), list(_by_name(tree))))


def _by_name(tree) -> dict[str, Any]:
    """Leaves by path, such as ``state.opt_state.1.0.count``, with fields, keys and positions
    written the same way."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def own_shards(tree) -> dict[str, np.ndarray]:
    """The arrays of this process by name, on the host, where possible without a copy.

    With several processes, an array may be sharded over all of them. The first element of the piece
    ``x@0_128`` is element ``[0, 128]`` of ``x``. Arrays that all processes have are in the first.
    """
    shards: dict[str, Any] = {}
    for name, leaf in _by_name(tree).items():
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            for shard in leaf.addressable_shards:
                if shard.replica_id == 0:
                    start = "_".join(str(part.start or 0) for part in shard.index)
                    shards[f"{name}@{start}"] = shard.data
        elif jax.process_index() == 0:
            shards[name] = leaf
    return {name: np.asarray(leaf) for name, leaf in jax.device_get(shards).items()}


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a local safetensors file, which may be untrusted."""
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"safetensors cannot read it: {str(error)[:300]}") from error


def join_shards(shards: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Complete arrays by name, from the `own_shards` of all processes; InputError if pieces are
    missing or do not fit together."""
    arrays: dict[str, np.ndarray] = {}
    pieces: dict[str, list] = {}
    for key, piece in shards.items():
        name, cut, start = key.partition("@")
        if cut and not re.fullmatch(r"(\d{1,18}(_\d{1,18})*)?", start):
            raise InputError(f"it has an array with an invalid name: {key[:80]!r}")
        if cut:
            position = tuple(int(part) for part in start.split("_") if part)
            pieces.setdefault(name, []).append((position, piece))
        else:
            arrays[name] = piece
    for name, parts in pieces.items():
        _, first = parts[0]
        alike = all(len(p) == x.ndim == first.ndim and x.dtype == first.dtype for p, x in parts)
        if not alike or name in arrays:
            raise InputError(f"the pieces of {name} do not fit together")
        shape = [max(p[k] + x.shape[k] for p, x in parts) for k in range(first.ndim)]
        # Checked before anything is allocated, because names may be untrusted.
        if sum(piece.size for _, piece in parts) != math.prod(shape):
            raise InputError(f"a piece of {name} is missing")
        arrays[name] = np.zeros(shape, first.dtype)
        for position, piece in parts:
            index = tuple(slice(a, a + size) for a, size in zip(position, piece.shape))
            arrays[name][index] = piece
    return arrays


def _rebuild(node, arrays: dict[str, np.ndarray]):
    """The tree of a manifest's `_structure`; takes each array out of ``arrays``."""
    if isinstance(node, dict):
        return {key: _rebuild(value, arrays) for key, value in node.items()}
    if isinstance(node, list):
        return [_rebuild(value, arrays) for value in node]
    if isinstance(node, str) and node not in arrays:
        raise InputError(f"the array {node[:80]!r} is missing from it")
    return node if node is None else arrays.pop(node)


def fit(arrays: dict[str, np.ndarray], like):
    """Arrays by name in the structure of ``like``; InputError if one is missing or superfluous, or
    has another shape or type. Nothing is cast or broadcast."""
    wanted = _by_name(like)
    if odd := min(arrays.keys() ^ wanted.keys(), default=""):
        raise InputError(
            f"{odd} is missing from it" if odd in wanted else f"{odd} is in it, but not in this run"
        )
    for name, leaf in wanted.items():
        found = arrays[name]
        if found.shape != leaf.shape or found.dtype != leaf.dtype:
            raise InputError(
                f"{name} is {found.dtype}{list(found.shape)} in it, but"
                f" {leaf.dtype}{list(leaf.shape)} in this run"
            )
    return jax.tree.unflatten(jax.tree.structure(like), [arrays[name] for name in wanted])


# --- Checkpoints --------------------------------------------------------------------------------


class Checkpoints:
    """The checkpoints of one run in one storage location: the last ``keep``, and the best one if
    saves have a score.

    Only one run may write to a storage location at a time, see `lock.Lock`. All its processes make
    the same calls. On exit, the context manager waits for pending checkpoints and raises an error
    if the last state was not saved.

    Args:
        place: a folder, or ``gs://BUCKET/PREFIX``, visible to all processes.
        check: called before files are written or deleted; raises an error if that is not allowed.
    """

    def __init__(
        self, place: str | Path, *, keep: int = 2, check: Callable[[], None] = lambda: None
    ):
        self.storage, self.place, self.keep = Storage(place), place, keep
        self._check = check
        self._known: set[str] = set()  # names of checkpoints that were listed, and of own ones
        self._scores: dict[str, float] = {}  # by name, of all checkpoints with a manifest
        self._damaged: set[str] = set()
        self._background = Background(
            lambda error: logger.warning(
                f"  warning: the checkpoint is not in {place} yet: {error}. Older ones are not"
                " deleted; training continues"
            )
        )
        where = str(place) if "://" in str(place) else os.path.abspath(place)
        # Prefix of the local files that the next start of this process deletes.
        digest = hashlib.sha256(where.encode()).hexdigest()[:12]
        self._prefix = f"percepiano_ast-{digest}-{jax.process_index()}-"
        self._writes = False
        self._local: Path | None = None
        self._lock = threading.Lock()  # held while `_copy` is read or written
        self._copy: dict[str, np.ndarray] = {}  # of the state at the last save
        self._copied: dict = {}  # its manifest

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self.finish()
            else:  # a state that has been copied is still saved, if storage responds
                self._background.wait()
        finally:
            if self._local:
                shutil.rmtree(self._local, ignore_errors=True)

    @functools.cached_property
    def _run(self) -> str:
        """Random identifier of this start, the same in all processes."""
        return f"{mesh.from_lead(secrets.randbits(31)):08x}"

    def load(
        self, like: dict | None = None, settings: dict | None = None
    ) -> tuple[dict, dict] | None:
        """Load the newest checkpoint that passes verification; returns tree and manifest, or None
        without checkpoints.

        Args:
            like: gives structure, shapes and types; without it the tree consists of dicts, lists
                and numpy arrays.
            settings: configuration of the calling run; must equal the checkpoint's.

        Raises:
            InputError: none of the checkpoints is usable, or the settings differ.
            StorageError: the storage location cannot be read.
        """
        names, unread = self._list(), None
        for name in reversed(names):
            try:
                manifest = read_manifest(self.storage, name)
                stored = {key: manifest.get(key) for key in settings or {}}
                changed = difference(stored, settings or {})
                tree = {} if changed else self._read(manifest, like)
            except (InputError, StorageError) as error:
                if isinstance(error, StorageError) and error.errno != errno.ENOENT:
                    unread = unread or error  # it may be intact, so it is not deleted
                else:
                    self._damaged.add(name)
                logger.warning(
                    f"  {self.storage.path_of(name)} is damaged or missing ({error}). Trying the"
                    " previous checkpoint"
                )
                continue
            if changed:
                raise InputError(
                    f"{self.place} holds checkpoints of another configuration ({changed}). "
                    "Choose another output directory, or delete this one to start over"
                )
            return tree, manifest
        if unread:  # they may be intact, so the message must not suggest deleting them
            raise StorageError(
                f"no checkpoint can be read ({unread}). Restore access to {self.place} and run"
                " again"
            )
        if names:
            raise InputError(
                f"no usable checkpoint in {self.place}; delete the directory to start over"
            )
        return None

    def _list(self) -> list[str]:
        names = complete(self.storage.names())
        self._known.update(names)
        self._scores = {name: self._scores.get(name, math.inf) for name in names}
        return names

    def _read(self, manifest: dict, like: dict | None) -> dict:
        _require_local(max(file["bytes"] for file in manifest["files"]))
        # A training run deletes files with its own prefix at the start; readers use another prefix.
        prefix = self._prefix if self._writes else "percepiano_ast-reading-"
        shards: dict[str, np.ndarray] = {}
        for file in manifest["files"]:
            with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as folder:
                path = Path(folder, file["name"])
                if self.storage.get(file["name"], path, file["bytes"]) != file["sha256"]:
                    raise InputError("checksum differs")
                shards |= read_arrays(path)
        arrays = join_shards(shards)
        if like is not None:
            return fit(arrays, like)
        try:
            tree = _rebuild(manifest["tree"], arrays)
        except (TypeError, KeyError, RecursionError) as error:
            raise InputError("its JSON file does not describe a valid checkpoint") from error
        if arrays:
            raise InputError(f"the array {min(arrays)[:80]!r} is not in its manifest")
        return tree

    def prepare(self) -> None:
        """Before a run: delete the incomplete files of killed runs."""
        self._writes = True
        for path in Path(tempfile.gettempdir()).glob(f"{self._prefix}*"):
            shutil.rmtree(path, ignore_errors=True)
        if jax.process_index():
            return
        self._check()
        self._remove_incomplete()
        for name in self._list():
            with contextlib.suppress(InputError, StorageError):  # `load` reports it
                score = read_manifest(self.storage, name)["score"]
                self._scores[name] = math.inf if score is None else score

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being saved."""
        return self._background.busy

    def save(self, step: int, tree: dict, description: dict, score: float = math.inf) -> None:
        """Copy the tree, and save the copy in the background.

        Waits while the previous copy is written to the local disk. Storage errors do not stop
        training: they are logged, the next save tries again, and `finish` raises the last error.

        Args:
            score: lower is better; the best checkpoint is not deleted.
        """
        background = self._background
        if background.error is None:
            background.wait(SOON)
        if (seconds := background.seconds) > LONG:
            logger.info(
                f"  saving a checkpoint to {self.place} has taken {seconds:.0f} s so far; training"
                " continues"
            )
        if error := background.error:
            logger.warning(
                f"  checkpoints cannot be saved in {self.place} ({error}); training continues,"
                " trying the next one now"
            )
        if self._local is None:
            self._local = Path(tempfile.mkdtemp(prefix=self._prefix))
        manifest: dict[str, Any] = {"step": step, "score": score if math.isfinite(score) else None}
        manifest |= {"code_version": __version__, "dimensions": list(KEYS), **description}
        # The tree goes on, in the same memory, while it is saved, and so does the history.
        manifest = json.loads(json.dumps(manifest | {"tree": _structure(tree)}))
        name = f"step_{step:08d}.{self._run}"
        with self._lock:
            arrays, before = own_shards(tree), self._copy
            self._copy, self._copied = {}, manifest
            for key, array in arrays.items():
                # Reusing memory is several times faster than allocating it.
                copy = before.get(key)
                if copy is None or copy.shape != array.shape or copy.dtype != array.dtype:
                    copy = np.empty_like(array, order="C")
                np.copyto(copy, array)
                self._copy[key] = copy
            background.submit(functools.partial(self._save_copy, name, manifest, self._local))

    def _save_copy(self, name: str, manifest: dict, folder: Path) -> None:
        """Write the copy to the local disk, upload it, and delete what is no longer needed."""
        self._check()
        self._known.add(name)
        process = jax.process_index()
        path = folder / f"{name}.p{process}.safetensors"
        with self._lock:
            if not path.exists():  # otherwise only the upload has failed
                if manifest is not self._copied:
                    return  # a newer state has replaced it
                for other in folder.iterdir():
                    other.unlink()
                try:
                    save_file(self._copy, path)
                except (OSError, SafetensorError) as error:
                    raise OSError(
                        f"it cannot be written to {tempfile.gettempdir()} ({error}). Free space"
                        " there, or set TMPDIR"
                    ) from error
        file = {"name": path.name, "bytes": path.stat().st_size}
        file["sha256"] = self.storage.write(path.name, path)
        if process:
            self.storage.write(f"{name}.p{process}.json", signed_json(file))
        else:
            files = [file, *self._files_of_others(name)]
            digest = hashlib.sha256("".join(file["sha256"] for file in files).encode()).hexdigest()
            manifest |= {"saved": datetime.now(UTC).isoformat(timespec="seconds"), "sha256": digest}
            manifest |= {"bytes": sum(file["bytes"] for file in files), "files": files}
            self._check()  # an upload may take long
            self.storage.write(f"{name}.json", signed_json(manifest))
            if self._background.error:
                logger.info(
                    f"  {self.place} is writable again: the checkpoint of step"
                    f" {manifest['step']} is saved"
                )
            self._scores[name] = math.inf if manifest["score"] is None else manifest["score"]
            self._remove_old()
        path.unlink(missing_ok=True)

    def _files_of_others(self, name: str) -> list[dict]:
        """What the other processes wrote about their files."""
        wanted = [f"{name}.p{number}.json" for number in range(1, jax.process_count())]
        end = time.monotonic() + PROCESS_TIMEOUT
        while wanted and (missing := set(wanted) - set(self.storage.names())):
            if time.monotonic() > end:
                raise StorageError(
                    f"cannot complete {self.storage.path_of(name)}: {min(missing)} of another"
                    f" process is missing after {PROCESS_TIMEOUT:g} s. All processes need the same"
                    " storage location"
                )
            time.sleep(0.2)
        return [read_signed_json(self.storage.read(file), _FILE, name=file) for file in wanted]

    def _remove_old(self) -> None:
        """Delete the checkpoints that are no longer needed, and incomplete ones."""
        self._check()
        good = sorted(self._scores.keys() - self._damaged)
        best = min(reversed(good), key=self._scores.__getitem__)
        needed = {*good[-self.keep :], *([best] if math.isfinite(self._scores[best]) else [])}
        for name in sorted(self._scores.keys() - needed):
            # The manifest first: files without one are incomplete and are deleted later.
            if self._remove(f"{name}.json"):
                del self._scores[name]
                self._damaged.discard(name)
        with contextlib.suppress(StorageError):  # the next start deletes them
            self._remove_incomplete(self._known)

    def _remove_incomplete(self, names: set[str] | None = None) -> None:
        """Delete the files of checkpoints without a manifest; only of ``names``, if they are
        given."""
        files = self.storage.names()
        whole = complete(files)
        for file in files:
            found = _NAME.fullmatch(file)
            if not found or file == f"{found[1]}.json" or found[1] not in (names or {found[1]}):
                continue
            if found[1] not in whole or not file.endswith(".safetensors"):
                self._remove(file)

    def _remove(self, file: str) -> bool:
        try:
            self.storage.remove(file, truncate=".safetensors" in file)
        except StorageError as error:
            logger.warning(f"  {error}. The file still takes up space; deletion is tried again")
            return False
        return True

    def finish(self) -> None:
        """Wait until the last save is in the storage location; try again after an error, and raise
        StorageError in the end. Older checkpoints are unchanged."""
        if self._background.finish():
            return
        last = max(self._scores.keys() - self._damaged, default="")
        before = (
            f"the last saved checkpoint is of step {_step_of(last)}"
            if last
            else "no checkpoint was saved"
        )
        raise StorageError(
            f"the checkpoint of step {self._copied['step']} was not saved in {self.place}"
            f" ({self._background.error}); {before}. Fix the storage location and run again to"
            " resume from there"
        )

    def clear(self) -> None:
        """Delete all checkpoints in this storage location, when they are no longer needed."""
        self._check()
        for name in self._list():
            self._remove(f"{name}.json")
        self._scores.clear()
        self._remove_incomplete()


def saved_settings(*places: str | Path) -> dict | None:
    """The newest intact manifest in the first storage location that has one, which holds the
    settings of its run; None without any."""
    for place in places:
        storage = Storage(place)
        for name in reversed(complete(storage.names())):
            with contextlib.suppress(InputError):
                return read_manifest(storage, name)
    return None


def listing(place: str | Path, damaged: list[str] | None = None) -> list[dict]:
    """The manifests of all checkpoints in a storage location, oldest first: ``step``, ``bytes``,
    ``saved`` (UTC), ``files``, and the saved description. Damaged ones are added to ``damaged``, or
    logged."""
    storage, found = Storage(place), []
    for name in complete(storage.names()):
        try:
            found.append(read_manifest(storage, name))
        except InputError as error:
            problem = f"{storage.path_of(name)}: {error}"
            logger.warning(f"  {problem}") if damaged is None else damaged.append(problem)
        except StorageError as error:
            if error.errno != errno.ENOENT:
                raise
            # A running training has deleted the checkpoint since it was listed.
    return found


def open_latest(
    place: str | Path, *, made_by: str, fields: Sequence[str] = ()
) -> tuple[dict, dict]:
    """Tree and manifest of the newest intact checkpoint; damaged newer ones are logged.

    Args:
        made_by: the command or notebook that makes them, for messages.
        fields: which the manifest must have.

    Raises:
        InputError: no checkpoint, or one without a field, of another kind of training.
    """
    found = Checkpoints(place).load()
    if found is None:
        raise InputError(f"no checkpoint in {place}. Run {made_by} first")
    if missing := [field for field in fields if field not in found[1]]:
        raise InputError(
            f"the newest checkpoint in {place} has no {missing[0]!r}: it is of another kind of"
            f" training. Give the folder of {made_by}"
        )
    return found
