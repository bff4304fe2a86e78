"""One checkpoint on its way to a store: names, the file of each process, and the marker that makes it count.

``step_00000100.0123abcd.p0.tar`` is what process 0 keeps of step 100; the middle part is drawn anew whenever a run starts, since
Google Drive makes "x (1)" of a name that comes twice. ``step_00000100.0123abcd.json`` is the marker. The other processes tell
the first one about their files in a ``...p1.json`` of their own: the store is their meeting place, so that no thread of a
checkpoint comes between the steps of training.
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

from percepiano_ast.config import InputError
from percepiano_ast.training import packing
from percepiano_ast.training.stores import Store, StoreFailed

_NAME = re.compile(r"(step_(\d{8})\.[0-9a-f]{8})(\.p\d+)?\.(tar|json)(\.partial)?")
PATIENCE = 300.0  # seconds that the first process waits for the files of the others
_LOOK = 0.2  # seconds between two looks for them
_PART = {"name": str, "bytes": int, "sha256": str, "files": list}


def stem_of(step: int, run: str) -> str:
    """What the names of all files of a checkpoint begin with."""
    return f"step_{step:08d}.{run}"


def step_of(stem: str) -> int:
    """The step that a checkpoint is of."""
    found = _NAME.fullmatch(f"{stem}.json")
    assert found, f"{stem!r} is no stem"
    return int(found[2])


def probe_name(run: str) -> str:
    """Of a small file that only shows whether a place takes one; left behind, it is litter like any other."""
    return f"{stem_of(0, run)}.p0.json"


def stem_in(name: str) -> str | None:
    """The stem of a file that this package writes; None for a file of somebody else."""
    found = _NAME.fullmatch(name)
    return found and found[1]


def is_marker(name: str) -> bool:
    """Whether a name is that of a marker, written to the end."""
    found = _NAME.fullmatch(name)
    return found is not None and found[4] == "json" and not found[3] and not found[5]


def whole_stems(names: Iterable[str]) -> list[str]:
    """Stems, in order, of the checkpoints whose marker is among the names of files: they are whole."""
    return sorted(stem for name in names if is_marker(name) and (stem := stem_in(name)))


def _checksum(description: dict) -> str:
    """Of what a marker says, however it is written."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _signed(description: dict) -> bytes:
    return json.dumps(description | {"marker": _checksum(description)}, indent=1).encode()


def _checked(content: bytes, kinds: dict[str, type]) -> dict:
    """The description in a JSON file, if it is whole and has these fields.

    Raises:
        InputError: it is not.
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
    """What the marker of a checkpoint says.

    Raises:
        InputError: the marker is damaged.
        StoreFailed: it cannot be read.
    """
    description = _checked(store.read(f"{stem}.json"), {"step": int, "sha256": str, "bytes": int, "parts": list})
    names = [f"{stem}.p{number}.tar" for number in range(len(description["parts"]))]
    parts = [part if isinstance(part, dict) else {} for part in description["parts"]]
    whole = all({name: type(part.get(name)) for name in _PART} == _PART for part in parts)
    if not names or not whole or [part["name"] for part in parts] != names or description["step"] != step_of(stem):
        raise InputError("its JSON file says what no checkpoint's does")
    return description


def fetch(store: Store, part: dict, folder: Path) -> dict:
    """The tree in one file of a checkpoint; ``folder``, on the local disk, is for what lies between.

    Raises:
        InputError: the file is not what its marker says.
        StoreFailed: it cannot be read.
    """
    archive = folder / "state.tar"
    if store.get(part["name"], archive, part["bytes"]) != part["sha256"]:
        raise InputError("checksum differs")
    packing.unpack(archive, part["files"], folder)
    archive.unlink()
    return packing.restore(folder)


class Parcel:
    """A tree in memory, then an archive on the local disk, then in the store.

    Args:
        tree: this process's share of the state, in numpy.
        marker: what the marker will say beside the files; only the first process's counts.
        folder: on the local disk.
        arrived: told, in the first process, when the marker is there.
    """

    def __init__(self, store: Store, run: str, tree, marker: dict, folder: Path, arrived: Callable[[str, dict], None]):
        self.store, self.tree, self.marker, self._arrived = store, tree, marker, arrived
        self.stem = stem_of(marker["step"], run)
        self.part: dict = {"name": f"{self.stem}.p{jax.process_index()}.tar"}
        self.archive = folder / self.part["name"]

    @property
    def packed(self) -> bool:
        """Whether its memory is free."""
        return self.tree is None

    def pack(self) -> None:
        """Tree to archive."""
        try:
            self.part["files"] = packing.pack(self.tree, self.archive)
        except OSError as error:
            self.discard()
            here = tempfile.gettempdir()
            raise OSError(error.errno, f"it cannot be packed in {here} ({error}): make room there, or set TMPDIR") from error
        self.tree = None

    def deliver(self) -> None:
        """Archive to store; what counts is that the marker is there.

        Raises:
            StoreFailed: it did not get there, or the file of another process did not.
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
        """What the other processes say of their files."""
        wanted = [f"{self.stem}.p{number}.json" for number in range(1, jax.process_count())]
        end = time.monotonic() + PATIENCE
        while wanted and (missing := set(wanted) - set(self.store.names())):
            if time.monotonic() > end:
                raise StoreFailed(
                    f"cannot complete {self.store.path_of(self.stem)}: {min(missing)} of another process did not come within "
                    f"{PATIENCE:g} s; all processes must see the same place"
                )
            time.sleep(_LOOK)
        return [_checked(self.store.read(name), _PART) for name in wanted]

    def discard(self) -> None:
        """Nothing of it stays on the local disk."""
        with contextlib.suppress(OSError):  # the next start removes it
            self.archive.unlink(missing_ok=True)
        # Orbax writes beside its folder first.
        for folder in self.archive.parent.glob(f"{self.archive.stem}.orbax*"):
            shutil.rmtree(folder, ignore_errors=True)
