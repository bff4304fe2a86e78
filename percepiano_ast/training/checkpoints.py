"""Checkpoints that describe and prove themselves: a run continues from the last one that reached its store.

Training waits for a copy of the state in memory. Orbax then writes it to the local disk, `packing` makes one file of it,
and that file is copied to the store under a name of its own (Google Drive makes "x (1)" of a name that comes twice), read
back and compared. Only then its JSON marker appears, which holds the checksums of everything in the file, and what a user
of the weights needs: configuration, normalisation, licence. Orbax itself does not notice flipped bits.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from percepiano_ast import __version__
from percepiano_ast.config import InputError, difference
from percepiano_ast.dimensions import KEYS
from percepiano_ast.training import packing
from percepiano_ast.training.courier import Courier
from percepiano_ast.training.stores import Store, StoreFailed, open_store

SAVE_MINUTES = 10.0  # between checkpoints within a long epoch
_OURS = re.compile(r"(step_(\d{8})\.[0-9a-f]{8})\.(tar|json)(\.partial)?")


def size_of(tree) -> int:
    """Bytes of all arrays, or of what they will be, in a tree."""
    return sum(int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def _own_copy(tree):
    """The tree as numpy arrays that nobody else writes to: on a CPU ``device_get`` shares the device's memory, which the
    next step reuses."""

    def own(leaf):
        leaf = np.asarray(leaf)
        return leaf if leaf.flags.owndata else leaf.copy()

    return jax.tree.map(own, jax.device_get(tree))


def _shown(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


def _require_local(size: int) -> None:
    """Raises OSError where the disk that checkpoints are packed on has not so many bytes free."""
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(f"{folder} has {_shown(free)} free, a checkpoint needs {_shown(size)} there: set TMPDIR to a larger disk")


def _checksum(description: dict) -> str:
    """Of what a marker says, however it is written."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _number(score: float | None) -> float:
    return math.inf if score is None else score


def _step(stem: str) -> int:
    return int(_OURS.fullmatch(f"{stem}.json")[2])


class Checkpoints:
    """The checkpoints of one run at one place; the last ``keep`` stay, and the best where saves have a score.

    One process writes there at a time. As a context manager it waits at the end for what is on its way, and raises if the
    last state did not arrive.

    Args:
        place: a folder, or ``gs://BUCKET/PREFIX``.
    """

    def __init__(self, place: str | Path, *, keep: int = 2, log: Callable[[str], None] = print):
        self.store: Store = open_store(place)
        self.place, self.keep, self.log = place, keep, log
        self._scores: dict[str, float] = {}  # by stem, of all whose marker is there
        self._bad: set[str] = set()
        self._courier = Courier(self._complain)
        where = str(place) if "://" in str(place) else os.path.abspath(place)
        self._prefix = f"percepiano_ast-{hashlib.sha256(where.encode()).hexdigest()[:12]}-"  # of what the next start removes
        self._writes = False
        self._local: Path | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self.finish()
            else:  # what has been copied still arrives, if the store answers
                self._courier.wait()
        finally:
            if self._local:
                shutil.rmtree(self._local, ignore_errors=True)

    # ------------------------------------------------------------ reading

    def load(self, like: dict | None = None, settings: dict | None = None) -> tuple[dict, dict] | None:
        """Tree and description of the newest checkpoint that verifies, or None when there is none at all.

        Args:
            like: gives structure, shapes and types; without it the tree is one of dicts, lists and numpy arrays.
            settings: what the run that asks is made of; it must be what the checkpoint was made of.

        Raises:
            InputError: there are checkpoints, but none of them is whole; or the settings differ.
            StoreFailed: the place cannot be looked into.
        """
        stems, unread = self._look(), None
        for stem in reversed(stems):
            try:
                description = self._describe(stem)
                changed = difference({name: description.get(name) for name in settings or {}}, settings or {})
                tree = None if changed else self._read(stem, description, like)
            except (InputError, StoreFailed) as error:
                self._bad.add(stem)
                unread = unread or (error if isinstance(error, StoreFailed) and error.number != errno.ENOENT else None)
                self.log(f"  {self.store.path_of(stem + '.tar')} is damaged or missing ({error}): trying the one before it")
                continue
            if changed:
                raise InputError(
                    f"{self.place} holds the checkpoints of another configuration ({changed}). "
                    "Choose another output directory, or delete this one to start over"
                )
            return tree, description
        if unread:  # they may be whole: nobody shall delete them
            raise StoreFailed(f"no checkpoint can be read ({unread}). Mend {self.place} and run again")
        if stems:
            raise InputError(f"no checkpoint in {self.place} is whole; delete the directory to start over")
        return None

    def _look(self) -> list[str]:
        """Stems of all that have a marker, oldest first."""
        found = [_OURS.fullmatch(name) for name in self.store.names()]
        stems = sorted(one[1] for one in found if one and one[3] == "json" and not one[4])
        self._scores = {stem: self._scores.get(stem, math.inf) for stem in stems}
        return stems

    def _describe(self, stem: str) -> dict:
        try:
            description = json.loads(self.store.read(f"{stem}.json"))
            own = description.pop("marker")
            known = {name: type(description[name]) for name in ("step", "bytes", "sha256", "files")}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError("its JSON file is damaged") from error
        whole = own == _checksum(description) and known == {"step": int, "bytes": int, "sha256": str, "files": list}
        if not whole or description["step"] != _step(stem):
            raise InputError("its JSON file is damaged (checksum differs)")
        return description

    def _read(self, stem: str, description: dict, like: dict | None) -> dict:
        _require_local(2 * description["bytes"])
        # A training that starts removes what begins with its own prefix, but not what others read.
        prefix = self._prefix if self._writes else "percepiano_ast-reading-"
        with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as local:
            archive = Path(local) / "state.tar"
            if self.store.get(f"{stem}.tar", archive, description["bytes"]) != description["sha256"]:
                raise InputError("checksum differs")
            packing.unpack(archive, description["files"], Path(local))
            archive.unlink()
            return packing.restore(Path(local), like)

    # ------------------------------------------------------------ writing

    def prepare(self, state_bytes: int) -> None:
        """Before a run: remove what killed ones left behind, and say what the checkpoints will need.

        Raises:
            InputError: there is no room for one.
            StoreFailed: the place does not answer.
        """
        self._writes = True
        for path in Path(tempfile.gettempdir()).glob(f"{self._prefix}*"):
            shutil.rmtree(path, ignore_errors=True)
        complete = self._look()
        for name in self.store.names():
            ours = _OURS.fullmatch(name)
            if ours and (ours[4] or ours[1] not in complete):
                self._remove(name)
        for stem in complete:
            with contextlib.suppress(InputError, StoreFailed):  # `load` says so
                self._scores[stem] = _number(self._describe(stem)["score"])
        free, most = self.store.free(), _shown((self.keep + 2) * state_bytes)
        self.log(
            f"checkpoints of {_shown(state_bytes)} in {self.place}, at most {most} (the last {self.keep}, the best, one on its "
            f"way){'' if free is None else f', where {_shown(free)} are free'}"
        )
        if free is not None and free < state_bytes:
            raise InputError(
                f"{self.place} has {_shown(free)} free, one checkpoint needs {_shown(state_bytes)}: make room, or choose "
                "another directory"
            )
        _require_local(2 * state_bytes)

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is on its way."""
        return self._courier.busy

    def save(self, step: int, tree: dict, description: dict, score: float = math.inf) -> None:
        """Copy the tree, and write it while training goes on.

        Waits while the copy of the save before is in memory: there is one at most. A store that fails stops nothing: it is
        logged, tried again with the next save, and raised by `finish`.

        Args:
            score: lower is better; the best one stays.
        """
        self._courier.wait_for_turn()
        if trouble := self._courier.trouble:
            self.log(f"  checkpoints do not reach {self.place} ({trouble}): training goes on, the next one is tried now")
        if self._local is None:
            self._local = Path(tempfile.mkdtemp(prefix=self._prefix))
        marker = {"step": step, "score": score if math.isfinite(score) else None}
        marker |= {"code_version": __version__, "dimensions": list(KEYS), **description}
        marker = json.loads(json.dumps(marker))  # as it is now: a history grows while it is written
        self._courier.send(_Parcel(self, _own_copy(tree), marker, self._local))

    def finish(self) -> None:
        """Wait until the last save is in the store; a store that failed is asked again.

        Raises:
            StoreFailed: it did not get there; older ones are as they were.
        """
        if self._courier.insist():
            return
        last = max(self._scores.keys() - self._bad, default="")
        before = f"the last that did is of step {_step(last)}" if last else "none did"
        raise StoreFailed(
            f"checkpoint of step {self._courier.waiting.marker['step']} did not reach {self.place} ({self._courier.trouble}); "
            f"{before}. Make room or mend the mount and run again: it continues from there"
        )

    def _complain(self, error: OSError) -> None:
        self.log(f"  warning: the checkpoint is not in {self.place} yet: {error}. Older ones stay; training goes on")

    def arrived(self, stem: str, score: float | None) -> None:
        """Note a checkpoint whose marker is there, and delete those that need not stay."""
        if self._courier.trouble:
            self.log(f"  {self.place} takes checkpoints again: step {_step(stem)} is there")
            self._courier.trouble = None
        self._scores[stem] = _number(score)
        good = sorted(self._scores.keys() - self._bad)
        best = min(reversed(good), key=self._scores.get)
        kept = {*good[-self.keep :], *([best] if math.isfinite(self._scores[best]) else [])}
        for old in sorted(self._scores.keys() - kept):
            # The marker first: what has none is litter, and what has one is whole.
            if self._remove(f"{old}.json") and self._remove(f"{old}.tar"):
                del self._scores[old]
                self._bad.discard(old)

    def _remove(self, name: str) -> bool:
        try:
            # Drive counts what lies in its trash: leave an empty file there, not a gigabyte.
            self.store.remove(name, emptied=".tar" in name)
        except StoreFailed as error:
            self.log(f"  {error}: it takes room, and is tried again later")
            return False
        return True


class _Parcel:
    """One checkpoint on its way: a tree in memory, then an archive on the local disk, then in the store."""

    def __init__(self, home: Checkpoints, tree: dict, marker: dict, folder: Path):
        self.home, self.tree, self.marker = home, tree, marker
        self.stem = f"step_{marker['step']:08d}.{secrets.token_hex(4)}"
        self.archive = folder / f"{self.stem}.tar"

    @property
    def packed(self) -> bool:
        """Whether its memory is free."""
        return self.tree is None

    def pack(self) -> None:
        """Tree to archive."""
        try:
            self.marker["files"] = packing.pack(self.tree, self.archive)
        except OSError:
            self.discard()
            raise
        self.tree = None

    def deliver(self) -> None:
        """Archive to store; what counts is that the marker is there."""
        size = self.archive.stat().st_size
        digest = self.home.store.put(self.archive.name, self.archive)
        marker = {**self.marker, "bytes": size, "sha256": digest}
        marker["marker"] = _checksum(marker)
        self.home.store.write(f"{self.stem}.json", json.dumps(marker, indent=1).encode())
        self.home.arrived(self.stem, marker["score"])

    def discard(self) -> None:
        """Nothing of it stays on the local disk."""
        with contextlib.suppress(OSError):  # the next start removes it
            self.archive.unlink(missing_ok=True)
        shutil.rmtree(self.archive.with_suffix(".orbax"), ignore_errors=True)


def open_latest(
    place: str | Path, *, made_by: str, log: Callable[[str], None] = print
) -> tuple[dict, dict]:
    """Tree and description of the newest whole checkpoint; damage on the way to it is told to ``log``.

    Raises:
        InputError: there is none; the message names the step that makes one.
        StoreFailed: the place cannot be looked into.
    """
    found = Checkpoints(place, log=log).load()
    if found is None:
        raise InputError(f"no checkpoint in {place}. Run {made_by} first")
    return found
