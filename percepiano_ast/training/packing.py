"""A state as one file: Orbax's output in a tar archive, with a manifest of all members.

Arrays are stored uncompressed (Zarr, one chunk per array), so that the content cannot be larger
than the file. Archives may be untrusted, so everything is checked before it is read.
"""

import asyncio
import hashlib
import json
import logging
import math
import re
import tarfile
from pathlib import Path
from typing import BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from percepiano_ast.errors import InputError

_FOLDER = "state"
_ARRAY = ".zarray"
_PART = re.compile(r"[\w\-. ]+")  # one part of a member's name
_DTYPE = re.compile(r"bfloat16|[<|][biuf][1248]")
_BLOCK = 2**22
_MOST_MEMBERS = 100_000


def _quiet(record: logging.LogRecord) -> bool:
    """Drop Orbax's warnings about the missing OCDBT database and jax.Array handler; both are
    intended."""
    return not any(
        words in str(record.msg)
        for words in ("Skipping merge of OCDBT", "No jax.Array in TypeHandlerRegistry")
    )


class _Arrays(ocp.type_handlers.NumpyHandler):
    """Writes numpy arrays as Orbax does, but in every process and without a copy. Orbax's own
    handler writes in the first process only, after copying the whole state."""

    async def serialize(self, values, infos, args=None) -> list:
        """Write all arrays; returns no futures, because the writes are complete."""
        await asyncio.gather(*(self._write(value, info) for value, info in zip(values, infos)))
        return []

    async def _write(self, value: np.ndarray, info) -> None:
        await info.await_path_creation()
        dtype = "bfloat16" if value.dtype == jnp.bfloat16 else value.dtype.str
        array = {
            "shape": value.shape,
            "chunks": value.shape,
            "dtype": dtype,
            "compressor": None,
            "dimension_separator": ".",
        }
        store = {"driver": "file", "path": f"{info.parent_dir / info.name}/"}
        spec = ts.Spec({"driver": "zarr", "kvstore": store, "metadata": array})
        target = await ts.open(spec, create=True, context=info.ts_context)
        await target.write(value, can_reference_source_data_indefinitely=True)


def _orbax() -> ocp.Checkpointer:
    """Orbax without barriers between processes: each process saves its own share and reads by
    itself."""
    logging.getLogger("absl").addFilter(_quiet)
    here = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"process{here}"
    )
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False,
        use_compression=False,
        multiprocessing_options=options,
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(
            (np.ndarray, _Arrays())
        ),
    )
    return ocp.Checkpointer(handler, multiprocessing_options=options)


class _Hashed:
    """A file that computes its checksum while it is read."""

    def __init__(self, file: BinaryIO):
        self._file, self.digest = file, hashlib.sha256()

    def read(self, size: int) -> bytes:
        """The next bytes."""
        block = self._file.read(size)
        self.digest.update(block)
        return block


def pack(tree: dict, archive: Path) -> list[dict]:
    """Write a tree of numpy arrays as one tar file; returns its manifest, ``{"name", "bytes",
    "sha256"}`` per member.

    Raises:
        OSError: the disk is full.
    """
    folder = archive.with_suffix(".orbax")
    try:
        with _orbax() as checkpointer:
            checkpointer.save(folder, args=ocp.args.PyTreeSave(tree))
    except ValueError as error:  # Orbax raises it for every failed write
        if "os_error_code" in str(error):
            raise OSError(str(error).partition(" [")[0]) from error
        raise
    manifest = []
    with tarfile.open(archive, "w", copybufsize=_BLOCK) as target:  # type: ignore[call-overload]  # typeshed lacks copybufsize
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            member = tarfile.TarInfo(f"{_FOLDER}/{path.relative_to(folder).as_posix()}")
            member.size = path.stat().st_size
            with path.open("rb") as file:
                read = _Hashed(file)
                target.addfile(member, read)
            manifest.append(
                {"name": member.name, "bytes": member.size, "sha256": read.digest.hexdigest()}
            )
            path.unlink()  # so that the local disk does not hold the state twice
    return manifest


def unpack(archive: Path, manifest: list[dict], folder: Path) -> None:
    """Extract an archive into ``folder``; its members must be regular files with the names and
    sizes in the manifest.

    Raises:
        InputError: the archive has another member, or a member is damaged; the message names it.
    """
    wanted = _admitted(manifest)
    try:
        with tarfile.open(archive, "r:") as source:
            for member in source:
                if member.name not in wanted or not member.isreg():
                    raise InputError(
                        f"{member.name!r} is not in its manifest, or not a regular file"
                    )
                entry = wanted.pop(member.name)
                if member.size != entry["bytes"] or member.issparse():
                    raise InputError(
                        f"{member.name!r} has {member.size:,} bytes, but {entry['bytes']:,} in its"
                        " manifest"
                    )
                _extract(source, member, entry, folder)
    except InputError:
        raise
    except (tarfile.TarError, EOFError, ValueError) as error:  # ValueError: invalid headers
        raise InputError(f"incomplete or invalid tar archive: {error}") from error
    if wanted:
        raise InputError(f"{min(wanted)!r} is missing from the archive")


def _admitted(manifest: list[dict]) -> dict[str, dict]:
    """The entries of a valid manifest, by name."""
    if not isinstance(manifest, list) or len(manifest) > _MOST_MEMBERS:
        raise InputError("its manifest is invalid")
    for entry in manifest:
        shape = isinstance(entry, dict) and {name: type(value) for name, value in entry.items()}
        if shape != {"name": str, "bytes": int, "sha256": str}:
            raise InputError(f"its manifest has an invalid entry: {str(entry)[:80]}")
        parts = entry["name"].split("/")
        plain = all(_PART.fullmatch(part) and part.strip(".") for part in parts)
        if parts[0] != _FOLDER or not plain or not 0 <= entry["bytes"] < 2**45:
            raise InputError(f"its manifest has an invalid name or size: {entry['name'][:80]!r}")
    return {entry["name"]: entry for entry in manifest}


def _extract(source: tarfile.TarFile, member: tarfile.TarInfo, entry: dict, folder: Path) -> None:
    path, digest = folder / member.name, hashlib.sha256()
    path.parent.mkdir(parents=True, exist_ok=True)
    content = source.extractfile(member)
    assert content is not None  # `unpack` has checked that it is a regular file
    with content, path.open("xb") as target:
        while block := content.read(_BLOCK):
            digest.update(block)
            target.write(block)
    if digest.hexdigest() != entry["sha256"]:
        raise InputError(f"{member.name!r} is damaged (checksum differs)")


def restore(folder: Path) -> dict:
    """The tree in an unpacked archive, as dicts, lists and numpy arrays.

    Raises:
        InputError: its files do not hold the described arrays, or Orbax cannot read it.
    """
    state = folder / _FOLDER
    _check_arrays(state)
    try:
        with _orbax() as checkpointer:
            return checkpointer.restore(state)
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        raise InputError(f"Orbax cannot read it: {str(error)[:300]}") from error


def _check_arrays(state: Path) -> None:
    """Check that every array is uncompressed, is stored in its own folder, and has the size that
    its shape requires.

    Orbax itself would allocate any shape, decompress any content, and follow any path.
    """
    try:
        metadata = json.loads((state / "_METADATA").read_bytes())
        if metadata["use_ocdbt"] or metadata["use_zarr3"]:
            raise InputError("its arrays are not plain Zarr")
        leaves = metadata["tree_metadata"].values()
        names = [".".join(str(key["key"]) for key in leaf["key_metadata"]) for leaf in leaves]
        stored = {path.parent.name for path in state.glob(f"*/{_ARRAY}")}
        if wrong := [name for name in names if "/" in name or name in (".", "..")]:
            raise InputError(f"it has an array with an invalid name: {wrong[0][:80]!r}")
        for name in stored:
            _check_array(state / name)
        # Only arrays have files; None and empty containers do not.
        with_bytes = (leaf["value_metadata"] for leaf in leaves)
        for name, value in zip(names, with_bytes):
            if not value.get("skip_deserialize") and name not in stored:
                raise InputError(f"the array {name[:80]!r} is missing from it")
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"its array metadata are invalid ({type(error).__name__}: {error})"
        ) from error


def _check_array(folder: Path) -> None:
    array = json.loads((folder / _ARRAY).read_bytes())
    shape, chunks = array["shape"], array["chunks"]
    if array["compressor"] is not None or array["filters"] or len(shape) != len(chunks):
        raise InputError(
            f"the array {folder.name!r} is compressed; checkpoints hold uncompressed arrays only"
        )
    if not all(isinstance(size, int) and size > 0 for size in [*shape, *chunks]):
        raise InputError(f"the array {folder.name!r} has an invalid shape: {shape}")
    if not _DTYPE.fullmatch(array["dtype"]):
        raise InputError(f"the array {folder.name!r} has an invalid type: {array['dtype'][:40]}")
    size = 2 if array["dtype"] == "bfloat16" else np.dtype(array["dtype"]).itemsize
    chunk, files = (
        math.prod(chunks) * size,
        [path for path in folder.iterdir() if path.name != _ARRAY],
    )
    count = math.prod(-(-whole // part) for whole, part in zip(shape, chunks))
    if len(files) != count or any(path.stat().st_size != chunk for path in files):
        raise InputError(
            f"the array {folder.name!r} has shape {shape}, which does not match the size of its"
            " files"
        )
