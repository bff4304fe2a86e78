"""Checkpoints that describe and prove themselves, one file per step.

Orbax writes the state to the local disk; the files are bundled into one uniquely named archive, which is what reaches
the run's directory (Google Drive uploads single files and may lose them). It is read back and compared by SHA-256, and
only then its JSON marker appears, which also holds configuration, normalisation and licence. ``latest`` verifies the
checksum: Orbax itself does not notice flipped bits.
"""

import hashlib
import json
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from percepiano_ast.config import InputError, write_json

BLOCK = 2**22


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _alone() -> ocp.StandardCheckpointer:
    """Orbax without its barriers between processes: one of them saves, and each may read for itself."""
    here = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"process{here}"
    )
    return ocp.StandardCheckpointer(multiprocessing_options=options)


def _bundle(tree: dict, folder: Path) -> Path:
    """Write ``tree`` as one tar file into ``folder``, on the local disk.

    Raises:
        OSError: that disk is full.
    """
    try:
        with _alone() as checkpointer:
            # As numpy: an array of JAX could be restored only where the device that held it exists.
            checkpointer.save(folder / "state", jax.device_get(tree))
    except ValueError as error:  # what Orbax makes of every failed write
        if "os_error_code" in str(error):
            raise OSError(str(error).partition(" [")[0]) from error
        raise
    bundle = folder / "state.tar"
    with tarfile.open(bundle, "w") as archive:
        archive.add(folder / "state", "state")
    return bundle


def _read_marker(marker: Path) -> dict:
    """The description in a JSON marker; empty where the file is: a mount may keep the name and lose the bytes."""
    try:
        return json.loads(marker.read_text())
    except ValueError:
        return {}


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run below ``directory``; the last ``keep`` stay."""

    directory: Path
    keep: int = 2
    log: Callable[[str], None] = print

    def save(self, step: int, tree: dict, description: dict) -> Path:
        """Write one checkpoint; when this returns it has been read back and found whole.

        Raises:
            OSError: the bytes that arrived are not those that were written, or a disk is full; older ones stay.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        final = self.directory / f"step_{step:08d}.tar"
        partial = final.with_suffix(".partial")
        try:
            with tempfile.TemporaryDirectory() as local:
                bundle = _bundle(tree, Path(local))
                digest, size = _sha256(bundle), bundle.stat().st_size
                shutil.copyfile(bundle, partial)
            if _sha256(partial) != digest:
                raise OSError("it reads back differently; the disk or the mount is failing")
            partial.replace(final)
            write_json(final.with_suffix(".json"), {"step": step, "sha256": digest, "bytes": size, **description})
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise OSError(
                f"checkpoint {final} could not be written ({error}). "
                "Make room or mend the mount and run again: it continues from the checkpoint before"
            ) from error
        self._remove_old()
        return final

    def _remove_old(self) -> None:
        """Delete all but the last ``keep``, and what killed saves left behind."""
        kept = self._markers()[-self.keep :]
        for marker in self._markers()[: -self.keep]:
            marker.unlink()
        orphans = [bundle for bundle in self.directory.glob("step_*.tar") if bundle.with_suffix(".json") not in kept]
        for file in [*orphans, *self.directory.glob("step_*.partial")]:
            # Drive counts what lies in its trash: leave an empty file there, not a gigabyte.
            file.write_bytes(b"")
            file.unlink()

    def _markers(self) -> list[Path]:
        return sorted(self.directory.glob("step_*.json"))

    def latest(self) -> dict | None:
        """Description of the newest checkpoint that verifies, or None when there is no checkpoint at all.

        Raises:
            InputError: there are checkpoints, but none of them is whole.
        """
        markers = self._markers()
        for marker in reversed(markers):
            description, bundle = _read_marker(marker), marker.with_suffix(".tar")
            if bundle.exists() and _sha256(bundle) == description.get("sha256"):
                return description
            self.log(f"  {bundle} or its JSON file is damaged or missing (checksum differs): trying the one before it")
        if markers:
            raise InputError(f"no checkpoint in {self.directory} is whole; delete the directory to start over")
        return None

    def restore(self, step: int, like: dict | None = None) -> dict:
        """The tree saved at ``step``; ``like`` gives structure, shapes and types, without it arrays come as numpy."""
        with tempfile.TemporaryDirectory() as local:
            with tarfile.open(self.directory / f"step_{step:08d}.tar") as archive:
                archive.extractall(local, filter="data")
            with _alone() as checkpointer:
                abstract = None if like is None else jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
                return checkpointer.restore(Path(local) / "state", abstract)


def open_latest(
    directory: str | Path, *, made_by: str, log: Callable[[str], None] = print
) -> tuple[dict, dict]:
    """Tree and description of the newest whole checkpoint; damage on the way to it is told to ``log``.

    Raises:
        InputError: there is none; the message names the step that makes one.
    """
    checkpoints = Checkpoints(Path(directory), log=log)
    description = checkpoints.latest() if Path(directory).is_dir() else None
    if description is None:
        raise InputError(f"no checkpoint in {directory}. Run {made_by} first")
    return checkpoints.restore(description["step"]), description
