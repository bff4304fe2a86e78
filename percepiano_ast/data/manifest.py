"""The manifest of a complete data set: lengths and checksums of its files, and their
verification."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path, PurePosixPath

import tensorflow_datasets as tfds
from array_record.python import array_record_module

from percepiano_ast.data.shards import MANIFEST, VERSION, chunk_count, size_of
from percepiano_ast.errors import InputError, RunFailed
from percepiano_ast.files import sha256_of, write_json


def _files(directory: Path, below: str = "") -> Iterator[str]:
    """Names of all files of the data set; also at ``gs://``, which has no recursive listing."""
    for path in sorted(directory.iterdir(), key=lambda path: path.name):
        name = below + path.name
        if path.is_dir():
            if name != "staged":
                yield from _files(path, f"{name}/")
        elif name != MANIFEST and path.suffix != ".partial":
            yield name


def write(directory: Path, data_set: str) -> None:
    """Write the manifest, which marks the data set in ``directory`` as complete, with length and
    SHA-256 of every file."""
    # The checksums of shards were computed when they were written; reading 9 GB again takes minutes
    # on a mounted Drive.
    shards = {
        f"{data_set}/{VERSION}/{record['file']}": record for record in _records(directory).values()
    }
    files = {}
    for name in _files(directory):
        path = directory / name
        known = shards.get(name) or {"bytes": size_of(path), "sha256": sha256_of(path)}
        files[name] = {"bytes": known["bytes"], "sha256": known["sha256"]}
    write_json(directory / MANIFEST, {"data_set": data_set, "version": VERSION, "files": files})


def _records(directory: Path, damaged: Collection[str] = frozenset()) -> dict[str, dict]:
    """The record of every shard, except damaged records."""
    paths = sorted((directory / "records").glob("*.json"))
    return {
        path.stem: json.loads(path.read_text())
        for path in paths
        if f"records/{path.name}" not in damaged
    }


def recordings(directory: Path) -> list[dict]:
    """Facts of every recording of a data set, in the order of its shards, with the ``shard`` of
    each."""
    known = _records(directory)
    return [
        facts | {"shard": shard}
        for shard, record in known.items()
        for facts in record["recordings"]
    ]


def read(directory: Path) -> dict:
    """The manifest of a complete data set.

    Raises:
        InputError: it is missing, damaged, or lists an invalid file.
    """
    path = directory / MANIFEST
    if not path.exists():
        raise InputError(
            f"{directory} has no {MANIFEST}: the data set is incomplete. Run notebook 01 or"
            " `percepiano preprocess` to resume."
        )
    try:
        manifest = json.loads(path.read_text())
        files = manifest["files"].items()
        # Untrusted input: a name must stay inside the directory, and a length must be a valid
        # number.
        odd = [
            name
            for name, known in files
            if not _is_below(name) or type(known["bytes"]) is not int or known["bytes"] < 0
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} is damaged ({error}). Delete it and run preprocess again to restore it."
        ) from error
    if odd:
        raise InputError(
            f"{path} lists {odd[0]!r}, which is not a valid file of a data set. Do not use this"
            " data set."
        )
    return manifest


def _is_below(name: str) -> bool:
    """Whether a relative name stays inside its folder."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and "\\" not in name and ".." not in parts


def shortcomings(directory: Path) -> list[str]:
    """Files of the manifest that are missing or have another length; does not read their
    contents."""
    found = []
    for name, known in read(directory)["files"].items():
        path = directory / name
        if not path.is_file():
            found.append(f"{name}: missing")
        elif size_of(path) != known["bytes"]:
            found.append(f"{name}: {size_of(path):,} bytes, expected {known['bytes']:,}")
    return found


def verify(directory: Path, log: Callable[[str], None] = print) -> list[str]:
    """Verify every file by its checksum; returns one line per fault, including the affected
    recordings.

    Raises:
        InputError: no complete data set.
    """
    manifest = read(directory)
    home = f"{manifest['data_set']}/{VERSION}"
    wrong = shortcomings(directory)
    short = {line.partition(": ")[0] for line in wrong}
    for number, (name, known) in enumerate(manifest["files"].items(), start=1):
        if name not in short and not _is(directory / name, known):
            wrong.append(f"{name}: its SHA-256 does not match the manifest")
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
    """Copy a data set file by file and verify the checksums; files that match already are kept.

    Raises:
        InputError: no complete data set, or too little disk space.
        RunFailed: a file does not match the manifest.
    """
    files = read(directory)["files"]
    todo = {name: known for name, known in files.items() if not _is(target / name, known)}
    size = sum(known["bytes"] for known in todo.values())
    target.mkdir(parents=True, exist_ok=True)
    (target / MANIFEST).unlink(missing_ok=True)
    if (free := shutil.disk_usage(target).free) < size:
        raise InputError(
            f"{target} has {free / 1e9:.1f} GB free, the shards need {size / 1e9:.1f} GB. Free disk"
            " space there."
        )
    for number, (name, known) in enumerate(todo.items(), start=1):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        partial = (target / name).with_suffix(".partial")
        if size_of(directory / name) != known["bytes"]:
            raise RunFailed(
                f"{directory / name} has the wrong length. Check it with `percepiano preprocess"
                " --verify`."
            )
        shutil.copyfile(directory / name, partial)
        if not _is(partial, known):
            raise RunFailed(
                f"the copy of {directory / name} has the wrong checksum. Check it with `percepiano"
                " preprocess --verify`."
            )
        partial.replace(target / name)
        if number % 10 == 0 or number == len(todo):
            log(f"  {number}/{len(todo)} files of {size / 1e9:.1f} GB copied to {target}")
    shutil.copyfile(directory / MANIFEST, target / MANIFEST)
    return target


def _is(path: Path, known: dict) -> bool:
    return path.is_file() and size_of(path) == known["bytes"] and sha256_of(path) == known["sha256"]


def _damaged_recordings(path: Path, record: dict) -> list[str]:
    """Recordings of a shard whose contents do not match their checksums."""
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
                found.append(f"{facts['key']} does not match its checksum")
        except (RuntimeError, ValueError, IndexError) as error:
            found.append(f"{facts['key']} cannot be read ({error})")
        first += count
    with contextlib.suppress(RuntimeError):  # repeats a fault that is listed already
        reader.close()
    return found
