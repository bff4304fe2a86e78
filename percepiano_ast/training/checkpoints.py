"""Verified checkpoints: a run resumes from the newest complete one in its store.

Training waits only for a copy of the state in memory. Orbax then writes the copy to the local disk,
`packing` makes one archive of it, and the archive is copied to the store, read back and compared.
The checkpoint's JSON marker is written last. It holds all checksums (Orbax does not detect flipped
bits) and what a user of the weights needs: configuration, normalisation, licence. With several
processes, each saves its share in its own file; see `parcels`.

The random stream and the position in the data follow from the seed and the step. Resuming needs
only these two.
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
from percepiano_ast.dimensions import KEYS
from percepiano_ast.errors import InputError
from percepiano_ast.files import difference, echo
from percepiano_ast.training import mesh, parcels, pieces
from percepiano_ast.training.courier import Courier
from percepiano_ast.training.stores import Store, StoreFailed, open_store

SAVE_MINUTES = 10.0  # between checkpoints within a long epoch
LONG = 20.0  # an upload that takes longer, in seconds, is logged


def shown(size: int) -> str:
    """Format a number of bytes: ``1.38 GB``."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


def require_room(place: str | Path, one: int, most: str, log: Callable[[str], None] = echo) -> None:
    """Before a run: log the disk space that its checkpoints need, and check that one fits.

    Args:
        place: storage location: a folder, or ``gs://BUCKET/PREFIX``.
        one: bytes of one checkpoint.
        most: largest total size, as text.

    Raises:
        InputError: the storage location has no room for one checkpoint.
        OSError: the local disk, where checkpoints are packed, has no room for one.
        StoreFailed: the storage location does not respond, or is not writable.
    """
    store = open_store(place)
    free = store.free()
    log(
        f"checkpoints of {shown(one)} in {place}:\n  at most"
        f" {most}{'' if free is None else f'; {shown(free)} free'}"
    )
    if free is not None and free < one:
        raise InputError(
            f"{place} has {shown(free)} free, but one checkpoint needs {shown(one)}. Free space, or"
            " choose another directory"
        )
    store.require_writable(parcels.probe_name(secrets.token_hex(4)))
    _require_local(2 * one)


def _require_local(size: int) -> None:
    """Raises OSError when the local disk, where checkpoints are packed, has fewer free bytes than
    ``size``."""
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(
            f"{folder} has {shown(free)} free, but a checkpoint needs {shown(size)}. Set TMPDIR to"
            " a larger disk"
        )


def _number(score: float | None) -> float:
    return math.inf if score is None else score


class Checkpoints:
    """The checkpoints of one run in one storage location: the last ``keep``, and the best one if
    saves have a score.

    Only one run may write to a storage location at a time. All its processes make the same calls.
    On exit, the context manager waits for pending checkpoints and raises an error if the last state
    was not saved.

    Args:
        place: a folder, or ``gs://BUCKET/PREFIX``, visible to all processes.
    """

    def __init__(self, place: str | Path, *, keep: int = 2, log: Callable[[str], None] = echo):
        self.store: Store = open_store(place)
        self.place, self.keep, self.log = place, keep, log
        self._scores: dict[str, float] = {}  # by stem, of all checkpoints with a marker
        self._bad: set[str] = set()
        self._courier: Courier[parcels.Parcel] = Courier(self._complain)
        where = str(place) if "://" in str(place) else os.path.abspath(place)
        # Prefix of the local files that the next start of this process deletes.
        digest = hashlib.sha256(where.encode()).hexdigest()[:12]
        self._prefix = f"percepiano_ast-{digest}-{jax.process_index()}-"
        self._copies: dict = {}  # of the state at the last save
        self._writes = False
        self._local: Path | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self.finish()
            else:  # a state that has been copied is still saved, if the store responds
                self._courier.wait()
        finally:
            if self._local:
                shutil.rmtree(self._local, ignore_errors=True)

    @functools.cached_property
    def _run(self) -> str:
        """Random identifier of this start, the same in all processes; makes file names unique."""
        return f"{mesh.from_lead(secrets.randbits(31)):08x}"

    # ------------------------------------------------------------ reading

    def load(
        self, like: dict | None = None, settings: dict | None = None
    ) -> tuple[dict, dict] | None:
        """Load the newest checkpoint that passes verification; returns tree and description, or
        None without checkpoints.

        Args:
            like: gives structure, shapes and types; without it the tree consists of dicts, lists
                and numpy arrays.
            settings: configuration of the calling run; must equal the checkpoint's.

        Raises:
            InputError: none of the checkpoints is usable, or the settings differ.
            StoreFailed: the storage location cannot be read.
        """
        stems, unread = self._look(), None
        for stem in reversed(stems):
            try:
                description = parcels.describe(self.store, stem)
                changed = difference(
                    {name: description.get(name) for name in settings or {}}, settings or {}
                )
                tree = {} if changed else self._read(description, like)
            except (InputError, StoreFailed) as error:
                self._bad.add(stem)
                unread = unread or (
                    error
                    if isinstance(error, StoreFailed) and error.number != errno.ENOENT
                    else None
                )
                self.log(
                    f"  {self.store.path_of(stem)} is damaged or missing ({error}). Trying the"
                    " previous checkpoint"
                )
                continue
            if changed:
                raise InputError(
                    f"{self.place} holds checkpoints of another configuration ({changed}). "
                    "Choose another output directory, or delete this one to start over"
                )
            return tree, description
        if unread:  # they may be intact, so the message must not suggest deleting them
            raise StoreFailed(
                f"no checkpoint can be read ({unread}). Restore access to {self.place} and run"
                " again"
            )
        if stems:
            raise InputError(
                f"no usable checkpoint in {self.place}; delete the directory to start over"
            )
        return None

    def _look(self) -> list[str]:
        """Stems of all checkpoints with a marker, oldest first."""
        stems = parcels.whole_stems(self.store.names())
        self._scores = {stem: self._scores.get(stem, math.inf) for stem in stems}
        return stems

    def _read(self, description: dict, like: dict | None) -> dict:
        # Room for one archive and its unpacked content; files are read one after the other.
        _require_local(2 * max(part["bytes"] for part in description["parts"]))
        # A training run deletes files with its own prefix at the start; readers use another prefix.
        prefix = self._prefix if self._writes else "percepiano_ast-reading-"
        shares = []
        for part in description["parts"]:
            with tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as local:
                shares.append(parcels.fetch(self.store, part, Path(local)))
        tree = pieces.join(shares)
        return tree if like is None else pieces.fit(tree, like)

    # ------------------------------------------------------------ writing

    def prepare(self) -> None:
        """Before a run: delete the incomplete files of killed runs.

        Raises:
            StoreFailed: the storage location does not respond.
        """
        self._writes = True
        for path in Path(tempfile.gettempdir()).glob(f"{self._prefix}*"):
            shutil.rmtree(path, ignore_errors=True)
        if jax.process_index():
            return
        complete = self._look()
        self._remove_litter()
        for stem in complete:
            with contextlib.suppress(InputError, StoreFailed):  # `load` reports it
                self._scores[stem] = _number(parcels.describe(self.store, stem)["score"])

    def _remove_litter(self, before: float = math.inf) -> None:
        """Delete incomplete files, those without a marker, of steps up to ``before``."""
        for name in self.store.names():
            stem = parcels.stem_in(name)
            complete = stem in self._scores and name.endswith(".tar") or parcels.is_marker(name)
            if stem and not complete and parcels.step_of(stem) <= before:
                self._remove(name)

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being saved."""
        return self._courier.busy

    def save(self, step: int, tree: dict, description: dict, score: float = math.inf) -> None:
        """Copy the tree, and save the copy in the background.

        Waits while the previous copy is in memory; there is at most one. Storage errors do not stop
        training: they are logged, the next save tries again, and `finish` raises the last error.

        Args:
            score: lower is better; the best checkpoint is not deleted.
        """
        self._courier.wait_for_turn()
        if (seconds := self._courier.seconds_in_hand) > LONG:
            self.log(
                f"  saving a checkpoint to {self.place} has taken {seconds:.0f} s so far; training"
                " continues"
            )
        if trouble := self._courier.trouble:
            self.log(
                f"  checkpoints cannot be saved in {self.place} ({trouble}); training continues,"
                " trying the next one now"
            )
        if self._local is None:
            self._local = Path(tempfile.mkdtemp(prefix=self._prefix))
        marker: dict[str, Any] = {"step": step, "score": score if math.isfinite(score) else None}
        marker |= {"code_version": __version__, "dimensions": list(KEYS), **description}
        marker = json.loads(json.dumps(marker))  # a copy: the history grows during the save
        share = pieces.own_share(tree, self._copies)
        self._courier.send(
            parcels.Parcel(self.store, self._run, share, marker, self._local, self._note)
        )

    def finish(self) -> None:
        """Wait until the last save is in the store; try again after a storage error.

        Raises:
            StoreFailed: the last checkpoint was not saved; older ones are unchanged.
        """
        if self._courier.insist() or (late := self._courier.waiting) is None:
            return
        last = max(self._scores.keys() - self._bad, default="")
        before = (
            f"the last saved checkpoint is of step {parcels.step_of(last)}"
            if last
            else "no checkpoint was saved"
        )
        raise StoreFailed(
            f"the checkpoint of step {late.marker['step']} was not saved in {self.place}"
            f" ({self._courier.trouble}); {before}. Fix the storage location and run again to"
            " resume from there"
        )

    def clear(self) -> None:
        """Delete all checkpoints in this storage location, when they are no longer needed."""
        stems = self._look()
        for stem in stems:
            self._remove(f"{stem}.json")
        self._scores.clear()
        self._remove_litter()

    def _complain(self, error: OSError) -> None:
        self.log(
            f"  warning: the checkpoint is not in {self.place} yet: {error}. Older ones are not"
            " deleted; training continues"
        )

    def _note(self, stem: str, marker: dict) -> None:
        """Register a saved checkpoint, and delete those that are no longer needed."""
        if self._courier.trouble:
            self.log(
                f"  {self.place} is writable again: the checkpoint of step {marker['step']} is"
                " saved"
            )
            self._courier.trouble = None
        self._scores[stem] = _number(marker["score"])
        good = sorted(self._scores.keys() - self._bad)
        best = min(reversed(good), key=self._scores.__getitem__)
        kept = {*good[-self.keep :], *([best] if math.isfinite(self._scores[best]) else [])}
        for old in sorted(self._scores.keys() - kept):
            # The marker first: a checkpoint with a marker is complete, files without one are
            # deleted later.
            if self._remove(f"{old}.json"):
                del self._scores[old]
                self._bad.discard(old)
        with contextlib.suppress(StoreFailed):  # the next start deletes them
            self._remove_litter(before=marker["step"])

    def _remove(self, name: str) -> bool:
        try:
            # Files in Drive's trash count against the quota: truncate the file first.
            self.store.remove(name, emptied=".tar" in name)
        except StoreFailed as error:
            self.log(f"  {error}. The file still takes up space; deletion is tried again later")
            return False
        return True


def listing(place: str | Path, log: Callable[[str], None] = echo) -> list[dict]:
    """Read the markers of all checkpoints in a storage location, oldest first, without their
    archives.

    Fields of each: ``step``, ``bytes``, ``saved`` (UTC), and the saved description. Damaged markers
    are reported to ``log``.

    Raises:
        StoreFailed: the storage location cannot be read.
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
            # A running training has deleted the checkpoint since it was listed.
    return found


def open_latest(
    place: str | Path, *, made_by: str, log: Callable[[str], None] = echo
) -> tuple[dict, dict]:
    """Tree and description of the newest intact checkpoint; damaged newer ones are reported to
    ``log``.

    Args:
        made_by: the command or notebook that makes checkpoints, for the message.

    Raises:
        InputError: there is none; the message names ``made_by``.
        StoreFailed: the storage location cannot be read.
    """
    found = Checkpoints(place, log=log).load()
    if found is None:
        raise InputError(f"no checkpoint in {place}. Run {made_by} first")
    return found
