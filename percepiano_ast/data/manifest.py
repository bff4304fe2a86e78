"""Checksums of a finished data set: what it should hold to the byte, and what of it is wrong."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path, PurePosixPath

import tensorflow_datasets as tfds
from array_record.python import array_record_module

from percepiano_ast.config import InputError, RunFailed, write_json
from percepiano_ast.data.download import sha256_of
from percepiano_ast.data.shards import MANIFEST, VERSION, chunk_count, size_of


def _files(directory: Path, below: str = "") -> Iterator[str]:
    """Names of all files that belong to the data set, also at ``gs://``, which knows no recursive listing."""
    for path in sorted(directory.iterdir(), key=lambda path: path.name):
        name = below + path.name
        if path.is_dir():
            if name != "staged":
                yield from _files(path, f"{name}/")
        elif name != MANIFEST and path.suffix != ".partial":
            yield name


def write(directory: Path, data_set: str) -> None:
    """Declare the data set below ``directory`` complete, with length and SHA-256 of its every file."""
    # The shards were summed when they were written; reading 9 GB again would take minutes on a mounted Drive.
    shards = {f"{data_set}/{VERSION}/{record['file']}": record for record in _records(directory).values()}
    files = {}
    for name in _files(directory):
        path = directory / name
        known = shards.get(name) or {"bytes": size_of(path), "sha256": sha256_of(path)}
        files[name] = {"bytes": known["bytes"], "sha256": known["sha256"]}
    write_json(directory / MANIFEST, {"data_set": data_set, "version": VERSION, "files": files})


def _records(directory: Path, damaged: Collection[str] = frozenset()) -> dict[str, dict]:
    """What is known of every shard, but of those whose record is damaged itself."""
    paths = sorted((directory / "records").glob("*.json"))
    return {path.stem: json.loads(path.read_text()) for path in paths if f"records/{path.name}" not in damaged}


def recordings(directory: Path) -> list[dict]:
    """Facts of every recording of a data set, in the order of its shards, with the ``shard`` that each lies in."""
    known = _records(directory)
    return [facts | {"shard": shard} for shard, record in known.items() for facts in record["recordings"]]


def read(directory: Path) -> dict:
    """The manifest of a complete data set.

    Raises:
        InputError: there is none, it is damaged, or it names what cannot be a file of a data set.
    """
    path = directory / MANIFEST
    if not path.exists():
        raise InputError(
            f"{directory} holds no {MANIFEST}: the data set is incomplete; run notebook 01 or `preprocess`, it continues"
        )
    try:
        manifest = json.loads(path.read_text())
        files = manifest["files"].items()
        # Data sets are passed on: a stranger's must not write or read elsewhere, nor more than it says.
        odd = [name for name, known in files if not _is_below(name) or type(known["bytes"]) is not int or known["bytes"] < 0]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is damaged ({error}); delete it and run preprocess again, it is written anew") from error
    if odd:
        raise InputError(f"{path} names {odd[0]!r}, which no data set of this package has: do not use it")
    return manifest


def _is_below(name: str) -> bool:
    """Whether a name stays in the folder that it is looked up in."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and "\\" not in name and ".." not in parts


def shortcomings(directory: Path) -> list[str]:
    """Files of the manifest that are missing or have another length: found without reading them."""
    found = []
    for name, known in read(directory)["files"].items():
        path = directory / name
        if not path.is_file():
            found.append(f"{name}: missing")
        elif size_of(path) != known["bytes"]:
            found.append(f"{name}: {size_of(path):,} bytes instead of {known['bytes']:,}")
    return found


def verify(directory: Path, log: Callable[[str], None] = print) -> list[str]:
    """Read every file again; what is wrong, one line each, down to the recordings that a damage hits.

    Raises:
        InputError: nothing complete is there.
    """
    manifest = read(directory)
    home = f"{manifest['data_set']}/{VERSION}"
    wrong = shortcomings(directory)
    short = {line.partition(": ")[0] for line in wrong}
    for number, (name, known) in enumerate(manifest["files"].items(), start=1):
        if name not in short and not _is(directory / name, known):
            wrong.append(f"{name}: its SHA-256 is not the manifest's")
        if number % 20 == 0:
            log(f"  {number} of {len(manifest['files'])} files read")
    damaged = {line.partition(": ")[0] for line in wrong}
    for record in _records(directory, damaged).values():
        name = f"{home}/{record['file']}"
        if name in damaged and (directory / name).is_file():
            wrong += [f"{name}: {line}" for line in _damaged_recordings(directory / name, record)]
    stray = sorted(set(_files(directory)) - set(manifest["files"]))
    return wrong + [f"{name}: not in the manifest" for name in stray]


def copy(directory: Path, target: Path, log: Callable[[str], None] = print) -> Path:
    """Copy a data set, file by file, comparing checksums; what is there already and right is kept.

    Raises:
        InputError: nothing complete to copy, or too little room for it.
        RunFailed: a file does not arrive as the manifest has it.
    """
    files = read(directory)["files"]
    todo = {name: known for name, known in files.items() if not _is(target / name, known)}
    size = sum(known["bytes"] for known in todo.values())
    target.mkdir(parents=True, exist_ok=True)
    (target / MANIFEST).unlink(missing_ok=True)
    if (free := shutil.disk_usage(target).free) < size:
        raise InputError(f"{target} has {free / 1e9:.1f} GB free, the shards need {size / 1e9:.1f} GB; free them")
    for number, (name, known) in enumerate(todo.items(), start=1):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        partial = (target / name).with_suffix(".partial")
        if size_of(directory / name) != known["bytes"]:
            raise RunFailed(f"{directory / name} has not the length that was written; check it with preprocess --verify")
        shutil.copyfile(directory / name, partial)
        if not _is(partial, known):
            raise RunFailed(f"{directory / name} does not arrive as it was written; check it with preprocess --verify")
        partial.replace(target / name)
        if number % 10 == 0 or number == len(todo):
            log(f"  {number}/{len(todo)} files of {size / 1e9:.1f} GB copied to {target}")
    shutil.copyfile(directory / MANIFEST, target / MANIFEST)
    return target


def _is(path: Path, known: dict) -> bool:
    return path.is_file() and size_of(path) == known["bytes"] and sha256_of(path) == known["sha256"]


def _damaged_recordings(path: Path, record: dict) -> list[str]:
    """Recordings of a shard that do not come out as they went in."""
    try:
        reader = array_record_module.ArrayRecordReader(str(path))
    except (RuntimeError, ValueError, OSError) as error:
        return [f"cannot be opened ({error})"]
    metadata = json.loads((path.parent / "metadata.json").read_text())
    features = tfds.builder_from_directory(path.parent).info.features
    found, first = [], 0
    for facts in record["recordings"]:
        count = chunk_count(facts["n_frames"], metadata["chunk_frames"])
        digest = hashlib.sha256()
        try:
            for raw in reader.read(list(range(first, first + count))):
                digest.update(features.deserialize_example_np(raw)["log_mel"])
            if digest.hexdigest() != facts["sha256"]:
                found.append(f"{facts['key']} is not as it was written")
        except (RuntimeError, ValueError, IndexError) as error:
            found.append(f"{facts['key']} cannot be read ({error})")
        first += count
    with contextlib.suppress(RuntimeError):  # it says once more what is named already
        reader.close()
    return found
