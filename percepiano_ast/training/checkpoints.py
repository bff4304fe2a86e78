"""Checkpoints that describe and prove themselves: a run continues from the last one that reached its store.

Training waits for a copy of the state in memory. Orbax then writes it to the local disk, `packing` makes one file of it,
and that file is copied to the store, read back and compared. Only then the checkpoint's JSON marker appears, which holds the
checksums of everything, and what a user of the weights needs: configuration, normalisation, licence. Orbax itself does not
notice flipped bits. Where several processes train, each keeps its own pieces in a file of its own; see `parcels`.

The random stream and the place in the data follow from the seed and the step, so these two are all that resuming needs.
"""

import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from percepiano_ast import __version__
from percepiano_ast.config import InputError, difference, say
from percepiano_ast.dimensions import KEYS
from percepiano_ast.training import parallel, parcels, pieces
from percepiano_ast.training.courier import Courier
from percepiano_ast.training.stores import Store, StoreFailed, open_store

SAVE_MINUTES = 10.0  # between checkpoints within a long epoch
LONG = 20.0  # seconds on the way that are worth a line


def shown(size: int) -> str:
    """Bytes in words: ``1.38 GB``."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


def require_room(place: str | Path, one: int, most: str, log: Callable[[str], None] = say) -> None:
    """Before a run: say what its checkpoints will need, and refuse where not even one fits.

    Args:
        one: bytes of one checkpoint.
        most: how much there will be at most, in words.

    Raises:
        InputError: there is no room for one.
        OSError: there is none on the local disk, where it is packed.
        StoreFailed: the place does not answer, or takes no file.
    """
    store = open_store(place)
    free = store.free()
    log(f"checkpoints of {shown(one)} in {place}:\n  at most {most}{'' if free is None else f'; {shown(free)} are free'}")
    if free is not None and free < one:
        raise InputError(
            f"{place} has {shown(free)} free, one checkpoint needs {shown(one)}: make room, or choose another directory"
        )
    store.require_writable(parcels.probe_name(secrets.token_hex(4)))
    _require_local(2 * one)


def _require_local(size: int) -> None:
    """Raises OSError where the disk that checkpoints are packed on has not so many bytes free."""
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(f"{folder} has {shown(free)} free, a checkpoint needs {shown(size)} there: set TMPDIR to a larger disk")


def _number(score: float | None) -> float:
    return math.inf if score is None else score


class Checkpoints:
    """The checkpoints of one run at one place; the last ``keep`` stay, and the best where saves have a score.

    One run writes there at a time; all its processes make the same calls. As a context manager it waits at the end for what
    is on its way, and raises if the last state did not arrive.

    Args:
        place: a folder, or ``gs://BUCKET/PREFIX``, which all processes see.
    """

    def __init__(self, place: str | Path, *, keep: int = 2, log: Callable[[str], None] = say):
        self.store: Store = open_store(place)
        self.place, self.keep, self.log = place, keep, log
        self._scores: dict[str, float] = {}  # by stem, of all whose marker is there
        self._bad: set[str] = set()
        self._courier: Courier[parcels.Parcel] = Courier(self._complain)
        where = str(place) if "://" in str(place) else os.path.abspath(place)
        # Of what the next start of this process removes from the local disk.
        self._prefix = f"percepiano_ast-{hashlib.sha256(where.encode()).hexdigest()[:12]}-{jax.process_index()}-"
        self._copies: dict = {}  # of the state, as of the last save
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

    @functools.cached_property
    def _run(self) -> str:
        """Drawn for this start, the same in all processes: no two files ever have one name."""
        return f"{parallel.as_lead_says(secrets.randbits(31)):08x}"

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
                description = parcels.describe(self.store, stem)
                changed = difference({name: description.get(name) for name in settings or {}}, settings or {})
                tree = {} if changed else self._read(description, like)
            except (InputError, StoreFailed) as error:
                self._bad.add(stem)
                unread = unread or (error if isinstance(error, StoreFailed) and error.number != errno.ENOENT else None)
                self.log(f"  {self.store.path_of(stem)} is damaged or missing ({error}): trying the one before it")
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
        stems = parcels.whole_stems(self.store.names())
        self._scores = {stem: self._scores.get(stem, math.inf) for stem in stems}
        return stems

    def _read(self, description: dict, like: dict | None) -> dict:
        # Archive and what is unpacked from it, one file after the other.
        _require_local(2 * max(part["bytes"] for part in description["parts"]))
        # A training that starts removes what begins with its own prefix, but not what others read.
        prefix = self._prefix if self._writes else "percepiano_ast-reading-"
        shares = []
        for part in description["parts"]:
            with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as local:
                shares.append(parcels.fetch(self.store, part, Path(local)))
        tree = pieces.join(shares)
        return tree if like is None else pieces.fit(tree, like)

    # ------------------------------------------------------------ writing

    def prepare(self) -> None:
        """Before a run: remove what killed ones left behind.

        Raises:
            StoreFailed: the place does not answer.
        """
        self._writes = True
        for path in Path(tempfile.gettempdir()).glob(f"{self._prefix}*"):
            shutil.rmtree(path, ignore_errors=True)
        if jax.process_index():
            return
        complete = self._look()
        self._remove_litter()
        for stem in complete:
            with contextlib.suppress(InputError, StoreFailed):  # `load` says so
                self._scores[stem] = _number(parcels.describe(self.store, stem)["score"])

    def _remove_litter(self, before: float = math.inf) -> None:
        """Delete files of ours without a marker, of steps before this one."""
        for name in self.store.names():
            stem = parcels.stem_in(name)
            complete = stem in self._scores and name.endswith(".tar") or parcels.is_marker(name)
            if stem and not complete and parcels.step_of(stem) <= before:
                self._remove(name)

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
        if (seconds := self._courier.seconds_in_hand) > LONG:
            self.log(f"  a checkpoint has been on its way to {self.place} for {seconds:.0f} s: training goes on")
        if trouble := self._courier.trouble:
            self.log(f"  checkpoints do not reach {self.place} ({trouble}): training goes on, the next one is tried now")
        if self._local is None:
            self._local = Path(tempfile.mkdtemp(prefix=self._prefix))
        marker: dict[str, Any] = {"step": step, "score": score if math.isfinite(score) else None}
        marker |= {"code_version": __version__, "dimensions": list(KEYS), **description}
        marker = json.loads(json.dumps(marker))  # as it is now: a history grows while it is written
        share = pieces.own_share(tree, self._copies)
        self._courier.send(parcels.Parcel(self.store, self._run, share, marker, self._local, self._note))

    def finish(self) -> None:
        """Wait until the last save is in the store; a store that failed is asked again.

        Raises:
            StoreFailed: it did not get there; older ones are as they were.
        """
        if self._courier.insist() or (late := self._courier.waiting) is None:
            return
        last = max(self._scores.keys() - self._bad, default="")
        before = f"the last that did is of step {parcels.step_of(last)}" if last else "none did"
        raise StoreFailed(
            f"checkpoint of step {late.marker['step']} did not reach {self.place} ({self._courier.trouble}); "
            f"{before}. Mend that and run again: it continues from there"
        )

    def clear(self) -> None:
        """Delete all checkpoints of this place: they have served their purpose."""
        stems = self._look()
        for stem in stems:
            self._remove(f"{stem}.json")
        self._scores.clear()
        self._remove_litter()

    def _complain(self, error: OSError) -> None:
        self.log(f"  warning: the checkpoint is not in {self.place} yet: {error}. Older ones stay; training goes on")

    def _note(self, stem: str, marker: dict) -> None:
        """A checkpoint whose marker is there: delete those that need not stay."""
        if self._courier.trouble:
            self.log(f"  {self.place} takes checkpoints again: step {marker['step']} is there")
            self._courier.trouble = None
        self._scores[stem] = _number(marker["score"])
        good = sorted(self._scores.keys() - self._bad)
        best = min(reversed(good), key=self._scores.__getitem__)
        kept = {*good[-self.keep :], *([best] if math.isfinite(self._scores[best]) else [])}
        for old in sorted(self._scores.keys() - kept):
            # The marker first: what has none is litter, and what has one is whole.
            if self._remove(f"{old}.json"):
                del self._scores[old]
                self._bad.discard(old)
        with contextlib.suppress(StoreFailed):  # the next start removes it
            self._remove_litter(before=marker["step"])

    def _remove(self, name: str) -> bool:
        try:
            # Drive counts what lies in its trash: leave an empty file there, not a gigabyte.
            self.store.remove(name, emptied=".tar" in name)
        except StoreFailed as error:
            self.log(f"  {error}: it takes room, and is tried again later")
            return False
        return True


def listing(place: str | Path, log: Callable[[str], None] = say) -> list[dict]:
    """What the markers of all checkpoints at a place say, oldest first; their files are not read.

    Fields of each: ``step``, ``bytes``, ``saved`` (UTC), and what was saved with it; damaged markers are told to ``log``.

    Raises:
        StoreFailed: the place cannot be looked into.
    """
    store, found = open_store(place), []
    for stem in parcels.whole_stems(store.names()):
        try:
            found.append(parcels.describe(store, stem))
        except InputError as error:
            log(f"  {store.path_of(stem)}: {error}")
        except StoreFailed as error:
            if error.number != errno.ENOENT:
                raise
            # A training that goes on has deleted it since it was listed.
    return found


def open_latest(place: str | Path, *, made_by: str, log: Callable[[str], None] = say) -> tuple[dict, dict]:
    """Tree and description of the newest whole checkpoint; damage on the way to it is told to ``log``.

    Raises:
        InputError: there is none; the message names the step that makes one.
        StoreFailed: the place cannot be looked into.
    """
    found = Checkpoints(place, log=log).load()
    if found is None:
        raise InputError(f"no checkpoint in {place}. Run {made_by} first")
    return found
