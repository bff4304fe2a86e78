"""The files of one checkpoint in a store: their names, one archive per process, and the marker that
makes it valid.

``step_00000100.0123abcd.p0.tar`` is the share of process 0 at step 100. The middle part is a random
identifier, new at every start, because Google Drive renames a second file of the same name to "x
(1)". ``step_00000100.0123abcd.json`` is the marker. The other processes describe their files to the
first one in ``...p1.json`` and so on. They communicate through the store, so that saving needs no
collective operation between training steps.
"""

import contextlib
import hashlib
import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path

import jax

from percepiano_ast.errors import InputError
from percepiano_ast.training import packing
from percepiano_ast.training.stores import Store, StoreFailed

_NAME = re.compile(r"(step_(\d{8})\.[0-9a-f]{8})(\.p\d+)?\.(tar|json)(\.partial)?")
PATIENCE = 300.0  # seconds that the first process waits for the files of the others
_LOOK = 0.2  # seconds between two checks for them
_PART = {"name": str, "bytes": int, "sha256": str, "files": list}


def stem_of(step: int, run: str) -> str:
    """The common beginning of the names of a checkpoint's files."""
    return f"step_{step:08d}.{run}"


def step_of(stem: str) -> int:
    """The training step of a checkpoint."""
    found = _NAME.fullmatch(f"{stem}.json")
    assert found, f"{stem!r} is not a stem"
    return int(found[2])


def probe_name(run: str) -> str:
    """Name of a small file for testing whether a storage location is writable; leftovers are
    deleted like incomplete files."""
    return f"{stem_of(0, run)}.p0.json"


def stem_in(name: str) -> str | None:
    """The stem of a checkpoint file; None for any other file."""
    found = _NAME.fullmatch(name)
    return found and found[1]


def is_marker(name: str) -> bool:
    """Whether a name is that of a completely written marker."""
    found = _NAME.fullmatch(name)
    return found is not None and found[4] == "json" and not found[3] and not found[5]


def whole_stems(names: Iterable[str]) -> list[str]:
    """Stems, in order, of the complete checkpoints: those with a marker among these file names."""
    return sorted(stem for name in names if is_marker(name) and (stem := stem_in(name)))


def _checksum(description: dict) -> str:
    """Checksum of a marker's content, independent of its formatting."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _signed(description: dict) -> bytes:
    return json.dumps(description | {"marker": _checksum(description)}, indent=1).encode()


def _checked(content: bytes, kinds: dict[str, type]) -> dict:
    """The description in a JSON file, after checking its checksum and the types of these fields.

    Raises:
        InputError: the file is damaged.
    """
    try:
        description = json.loads(content)
        own = description.pop("marker")
        known = {name: type(description[name]) for name in kinds}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError("its JSON file is damaged") from error
    if own != _checksum(description) or known != kinds:
        raise InputError("its JSON file is damaged (checksum differs)")
    return description


def describe(store: Store, stem: str) -> dict:
    """The content of a checkpoint's marker.

    Raises:
        InputError: the marker is damaged.
        StoreFailed: it cannot be read.
    """
    description = _checked(
        store.read(f"{stem}.json"), {"step": int, "sha256": str, "bytes": int, "parts": list}
    )
    names = [f"{stem}.p{number}.tar" for number in range(len(description["parts"]))]
    parts = [part if isinstance(part, dict) else {} for part in description["parts"]]
    whole = all({name: type(part.get(name)) for name in _PART} == _PART for part in parts)
    if (
        not names
        or not whole
        or [part["name"] for part in parts] != names
        or description["step"] != step_of(stem)
    ):
        raise InputError("its JSON file does not describe a valid checkpoint")
    return description


def fetch(store: Store, part: dict, folder: Path) -> dict:
    """The tree in one archive of a checkpoint; temporary files go to ``folder`` on the local disk.

    Raises:
        InputError: the archive does not match its marker.
        StoreFailed: it cannot be read.
    """
    archive = folder / "state.tar"
    if store.get(part["name"], archive, part["bytes"]) != part["sha256"]:
        raise InputError("checksum differs")
    packing.unpack(archive, part["files"], folder)
    archive.unlink()
    return packing.restore(folder)


class Parcel:
    """A checkpoint to save: first a tree in memory, then an archive on the local disk, then a file
    in the store.

    Args:
        tree: this process's share of the state, in numpy.
        marker: content of the marker besides the files; only the first process's is used.
        folder: on the local disk.
        arrived: called with stem and marker in the first process, after the marker is written.
    """

    def __init__(
        self,
        store: Store,
        run: str,
        tree,
        marker: dict,
        folder: Path,
        arrived: Callable[[str, dict], None],
    ):
        self.store, self.tree, self.marker, self._arrived = store, tree, marker, arrived
        self.stem = stem_of(marker["step"], run)
        self.part: dict = {"name": f"{self.stem}.p{jax.process_index()}.tar"}
        self.archive = folder / self.part["name"]

    @property
    def packed(self) -> bool:
        """Whether the tree is packed and its memory is freed."""
        return self.tree is None

    def pack(self) -> None:
        """Write the tree to an archive, and free its memory."""
        try:
            self.part["files"] = packing.pack(self.tree, self.archive)
        except OSError as error:
            self.discard()
            here = tempfile.gettempdir()
            raise OSError(
                error.errno,
                f"it cannot be packed in {here} ({error}). Free space there, or set TMPDIR",
            ) from error
        self.tree = None

    def deliver(self) -> None:
        """Copy the archive to the store, then write the marker.

        Raises:
            StoreFailed: a file could not be written, or the file of another process is missing.
        """
        self.part["bytes"] = self.archive.stat().st_size
        self.part["sha256"] = self.store.put(self.part["name"], self.archive)
        if jax.process_index():
            self.store.write(f"{self.stem}.p{jax.process_index()}.json", _signed(self.part))
            return
        parts = [self.part, *self._others()]
        digest = hashlib.sha256("".join(part["sha256"] for part in parts).encode()).hexdigest()
        marker = self.marker | {"saved": datetime.now(UTC).isoformat(timespec="seconds")}
        marker |= {"bytes": sum(part["bytes"] for part in parts), "sha256": digest, "parts": parts}
        self.store.write(f"{self.stem}.json", _signed(marker))
        self._arrived(self.stem, marker)

    def _others(self) -> list[dict]:
        """The other processes' descriptions of their files."""
        wanted = [f"{self.stem}.p{number}.json" for number in range(1, jax.process_count())]
        end = time.monotonic() + PATIENCE
        while wanted and (missing := set(wanted) - set(self.store.names())):
            if time.monotonic() > end:
                raise StoreFailed(
                    f"cannot complete {self.store.path_of(self.stem)}: {min(missing)} of another"
                    f" process is missing after {PATIENCE:g} s. All processes need the same storage"
                    " location"
                )
            time.sleep(_LOOK)
        return [_checked(self.store.read(name), _PART) for name in wanted]

    def discard(self) -> None:
        """Delete all local files of this checkpoint."""
        with contextlib.suppress(OSError):  # the next start deletes it
            self.archive.unlink(missing_ok=True)
        # Orbax first writes to a temporary folder next to its target.
        for folder in self.archive.parent.glob(f"{self.archive.stem}.orbax*"):
            shutil.rmtree(folder, ignore_errors=True)
