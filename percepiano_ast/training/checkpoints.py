"""Checkpoints that describe and prove themselves, one file per step.

Orbax writes the state to the local disk; the files are bundled into one uniquely named archive, which is what reaches the
run's directory (Google Drive uploads single files and may lose them). It is read back and compared by SHA-256, and only then
its JSON marker appears, which also holds configuration, normalisation and licence. Restoring verifies the checksum first:
Orbax itself does not notice flipped bits.
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


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run below ``directory``; the last ``keep`` stay."""

    directory: Path
    keep: int = 2
    log: Callable[[str], None] = print

    def save(self, step: int, tree: dict, description: dict) -> Path:
        """Write one checkpoint; when this returns it has been read back and found whole.

        Raises:
            OSError: the bytes that arrived are not those that were written, or the disk is full; older ones stay.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        final = self.directory / f"step_{step:08d}.tar"
        with tempfile.TemporaryDirectory() as local:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(Path(local) / "state", tree)
            bundle = Path(local) / final.name
            with tarfile.open(bundle, "w") as archive:
                archive.add(Path(local) / "state", "state")
            digest, size = _sha256(bundle), bundle.stat().st_size
            partial = final.with_suffix(".partial")
            shutil.copyfile(bundle, partial)
        if _sha256(partial) != digest:
            raise OSError(f"{partial} was written but reads back differently; the disk or the mount is failing")
        partial.replace(final)
        write_json(final.with_suffix(".json"), {"step": step, "sha256": digest, "bytes": size, **description})
        self._remove_old()
        return final

    def _remove_old(self) -> None:
        for marker in self._markers()[: -self.keep]:
            marker.unlink()
            # Drive counts what lies in its trash: leave an empty file there, not a gigabyte.
            bundle = marker.with_suffix(".tar")
            bundle.write_bytes(b"")
            bundle.unlink()

    def _markers(self) -> list[Path]:
        return sorted(self.directory.glob("step_*.json"))

    def latest(self) -> dict | None:
        """Description of the newest checkpoint that verifies, or None when there is no checkpoint at all.

        Raises:
            InputError: there are checkpoints, but none of them is whole.
        """
        markers = self._markers()
        for marker in reversed(markers):
            description = json.loads(marker.read_text())
            bundle = marker.with_suffix(".tar")
            if bundle.exists() and _sha256(bundle) == description["sha256"]:
                return description
            self.log(f"  {bundle} is damaged or missing (checksum differs): trying the one before it")
        if markers:
            raise InputError(f"no checkpoint in {self.directory} is whole; delete the directory to start over")
        return None

    def restore(self, step: int, like: dict | None = None) -> dict:
        """The tree saved at ``step``; ``like`` gives structure, shapes and types, without it arrays come as numpy."""
        with tempfile.TemporaryDirectory() as local:
            with tarfile.open(self.directory / f"step_{step:08d}.tar") as archive:
                archive.extractall(local, filter="data")
            with ocp.StandardCheckpointer() as checkpointer:
                abstract = None if like is None else jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
                return checkpointer.restore(Path(local) / "state", abstract)


def open_latest(directory: str | Path, *, made_by: str) -> tuple[dict, dict]:
    """Tree and description of the newest whole checkpoint.

    Raises:
        InputError: there is none; the message names the step that makes one.
    """
    checkpoints = Checkpoints(Path(directory))
    description = checkpoints.latest() if Path(directory).is_dir() else None
    if description is None:
        raise InputError(f"no checkpoint in {directory}. Run {made_by} first")
    return checkpoints.restore(description["step"]), description
