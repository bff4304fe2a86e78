"""Build a data set of log-mel shards, here or on a Beam cluster; write and verify the manifest.

A shard depends only on its recordings: an interrupted run loses the shard in progress (two hours of
music) and ends with the same result as an uninterrupted one.
"""

import collections
import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath

from percepiano_ast import files
from percepiano_ast.config import FrontEnd
from percepiano_ast.data import shards
from percepiano_ast.data.shards import MANIFEST, VERSION, Item, Shard
from percepiano_ast.data.sources import Unreachable
from percepiano_ast.errors import InputError, RunFailed
from percepiano_ast.tables import to_csv

logger = logging.getLogger(__name__)

# the record of a shard, see `write_shard`
_RECORD: dict[str, Any] = {"file": str, "bytes": int, "sha256": str, "bad": {str: str}}
_RECORD |= {"recordings": [{"key": str, "n_frames": int, "sha256": str}]}
GIVE_UP_AFTER = 3  # consecutive recordings that the source did not deliver


@dataclass(frozen=True)
class BuildOptions:
    """How the shards are made: number of local processes, maximum number of unusable recordings
    (None for no limit), and Apache Beam's runner and options, instead of local processes."""

    workers: int = 1
    max_errors: int | None = 0
    beam_runner: str = ""
    beam_options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """Everything that a local or remote process needs to make a shard.

    Attributes:
        produce: ``produce(item, facts)`` yields the recording in blocks (time, mel) of ``dtype``,
            and may add JSON-serialisable metadata to ``facts``. It raises ``InputError`` for an
            unusable recording. It must be picklable.
        directory: of the data set and its ``records/``; Beam may write to ``gs://``.
    """

    builder: type[shards.LogMelBuilder]
    produce: Callable[[Item, dict], Iterator[np.ndarray]]
    directory: Path
    front_end: FrontEnd
    dtype: str = "uint8"

    def record(self, shard: Shard) -> Path:
        """File of a shard's record: its checksum, the facts of its recordings, and the unusable
        ones with the reasons."""
        return self.directory / "records" / f"{shard.name}.json"

    def written(self, shard: Shard) -> dict | None:
        """The record of a shard if its file exists with the right length, otherwise None."""
        path, file = self.record(shard), self.builder.file_of(self.directory, shard)
        if not path.exists() or not file.exists():
            return None
        try:
            record = files.read_json(path, _RECORD)
        except InputError as error:
            logger.info(f"  {error}: making the shard again")
            return None
        return record if files.size_of(file) == record["bytes"] else None


# --- Shards ---------------------------------------------------------------------------------------


def encode(job: Job, item: Item) -> tuple[dict, list[bytes]] | InputError | Unreachable:
    """One recording as its facts and its serialised examples; or why it is unusable."""
    facts: dict = {"key": item.key}
    levels: collections.Counter = collections.Counter()
    digest, frames = hashlib.sha256(), 0
    features = job.builder.features_of(job.dtype, job.front_end.n_mels)
    examples = []
    try:
        for start, chunk in shards.chunks(job.produce(item, facts), job.builder.CHUNK_FRAMES):
            levels.update(shards.level_facts(chunk, job.front_end))
            digest.update(np.ascontiguousarray(chunk).data)
            frames += len(chunk)
            position = {"start_frame": start} if job.builder.CHUNK_FRAMES else {}
            example = {"log_mel": chunk, **position, **item.fields}
            examples.append(shards.serialise(features, example))
    except (InputError, Unreachable) as error:
        return error
    return facts | {"n_frames": frames, "sha256": digest.hexdigest(), **levels}, examples


def write_shard(job: Job, shard: Shard, encoded: Iterable | None = None) -> None:
    """Write one shard, then its record, which marks it as complete. ``encoded``: results of
    `encode`, the next ones of which are the shard's; by default they are computed here."""
    file, facts, bad = job.builder.file_of(job.directory, shard), [], {}
    file.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        local = isinstance(file, Path)  # ArrayRecord writes local files only
        folder = file.parent if local else stack.enter_context(files.scratch_folder())
        partial = folder / f"{file.name}.{os.getpid()}.partial"
        stack.callback(partial.unlink, missing_ok=True)
        writer = array_record_module.ArrayRecordWriter(str(partial), shards.WRITER_OPTIONS)
        try:
            if encoded is None:
                encoded = (encode(job, item) for item in shard.items)
            for item, result in zip(shard.items, encoded):
                if isinstance(result, Exception):
                    bad[item.key] = str(result)
                    continue
                facts.append(result[0])
                for example in result[1]:
                    writer.write(example)
        finally:
            writer.close()
        size = partial.stat().st_size
        record = {"file": file.name, "bytes": size, "sha256": files.sha256_of(partial)}
        if local:
            partial.replace(file)
        else:
            epath.Path(partial).copy(file, overwrite=True)
    files.write_json(job.record(shard), record | {"recordings": facts, "bad": bad})


def _make_here(job: Job, plan: list[Shard], todo: list[Shard], max_workers: int) -> None:
    """Make the shards ``todo``: the processes encode their recordings, this one writes them."""
    items = [item for shard in todo for item in shard.items]
    everything = [item for shard in plan for item in shard.items]
    hours = sum(item.seconds for item in everything) / 3600
    rate = job.front_end.sample_rate / job.front_end.hop_length * job.front_end.n_mels
    rate *= np.dtype(shards.DTYPES[job.dtype]).itemsize  # bytes per second
    reserve = shards.SHARD_SECONDS * rate  # of a shard that replaces another

    def free() -> int:
        return shutil.disk_usage(job.directory).free

    left = sum(item.seconds for item in items)
    need = left * rate + min(left * rate, reserve)
    if free() < need:
        raise InputError(
            f"{job.directory} has {free() / 1e9:.2f} GB free, the shards need {need / 1e9:.2f} GB:"
            f" {(need - free()) / 1e9:.2f} GB are missing. Free disk space, choose another"
            " directory, or limit the hours."
        )
    if count := len(everything) - len(items):
        logger.info(f"  {count} of {len(everything)} are done already")

    def full(what: str) -> RunFailed:
        return RunFailed(
            f"the disk of {job.directory} is full ({what}); about {left * rate / 1e9:.2f} GB are"
            " needed for the rest. Free them and run again to resume."
        )

    def watched(encoded: Iterable) -> Generator:
        """Passes on results; logs the progress, and ends the run if it cannot continue."""
        nonlocal left, count
        lost, started, shown, seconds, read = 0, 0.0, 0.0, 0.0, 0
        for item, result in zip(items, encoded):
            lost = lost + 1 if isinstance(result, Unreachable) else 0
            if lost == GIVE_UP_AFTER:
                message = f"the source stopped delivering (run again to resume): {result}"
                raise RunFailed(message) from result
            left, count, now = left - item.seconds, count + 1, time.monotonic()
            if started:
                seconds += item.seconds
                read += 0 if isinstance(result, Exception) else result[0].get("source_bytes", 0)
            else:  # the first result also waited for the workers to start
                started, shown = now, now - files.LOG_SECONDS
            if now - shown >= files.LOG_SECONDS or count == len(everything):
                shown, line = now, f"  {count}/{len(everything)} recordings"
                if all(item.measured for item in everything):
                    line += f", {hours - left / 3600:.2f} of {hours:.2f} h"
                if now > started and seconds:
                    wait = max(left / seconds * (now - started), 0.0)
                    line += f", {read / (now - started) / 1e6:.1f} MB/s" if read else ""
                    time_left = f"{wait:.0f} s" if wait < 120 else f"{wait / 60:.0f} min"
                    line += f", about {time_left} left"
                logger.info(f"{line}, {free() / 1e9:.1f} GB of disk free")
            if free() < min(reserve, left * rate):
                raise full(f"{free() / 1e9:.2f} GB are left")
            yield result

    workers = min(max_workers, len(items))
    encoding = files.process_map(functools.partial(encode, job), items, workers)
    with contextlib.closing(encoding), contextlib.closing(watched(encoding)) as encoded:
        for shard in todo:
            try:
                write_shard(job, shard, encoded)
            except (OSError, RuntimeError) as error:
                if files.disk_is_full(error):
                    raise full(str(error)) from error
                raise


def _make_by_beam(job: Job, todo: list[Shard], runner: str, options: tuple[str, ...]) -> None:
    """Make the shards ``todo`` by Apache Beam. TFDS's own Beam writer cannot resume, and writes
    local files only."""
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise InputError(
            'Apache Beam is not installed. Run `pip install "percepiano_ast[beam]"` in a separate'
            " environment, or omit --beam-runner: local processes make the same shards."
        ) from error
    try:
        pipeline = beam.Pipeline(runner=runner, options=PipelineOptions(list(options)))
    except (ValueError, ImportError) as error:
        raise InputError(
            f"cannot start Beam's runner {runner!r}: {error}. Check --beam-runner and its options."
        ) from error
    # Without the reshuffle a runner may fuse all shards into one task of one worker.
    missing = pipeline | beam.Create(todo) | beam.Reshuffle()
    missing | "Make" >> beam.Map(functools.partial(write_shard, job))
    state = pipeline.run().wait_until_finish()
    if state != "DONE":
        raise RunFailed(f"the pipeline ended in state {state}. Run again to resume.")


# --- The data set ---------------------------------------------------------------------------------


def build(
    job: Job,
    items: list[Item],
    options: BuildOptions,
    *,
    statistics_of: str,
    description: dict,
    excluded: Mapping[str, str] = {},
    refused: Mapping[str, str] = {},
    others: Mapping[str, str] = {},
    tables: Callable[[list[dict]], Mapping[str, pd.DataFrame | bytes]] = lambda facts: {},
) -> None:
    """Make the data set of these recordings; an interrupted call is continued by the next.

    Args:
        statistics_of: split whose level statistics normalise all splits.
        description: added to the data set's metadata.
        excluded, refused: recordings excluded on purpose, and those unusable according to the
            source's listing, with the reasons; listed in ``skipped.csv``.
        others: files that are not recordings, see `files.summary`; listed there too.
        tables: more files by name, given the facts of the included recordings.

    Raises:
        InputError: no readable recording at all or in the split ``statistics_of``, or too little
            disk space.
        RunFailed: more unusable recordings than ``options.max_errors``, the disk is full, the
            source stopped responding, or a worker was killed; finished shards remain.
    """
    plan = shards.plan(items)
    # A shard that lacks recordings is made again: the source may have been repaired.
    todo = [shard for shard in plan if (found := job.written(shard)) is None or found["bad"]]
    if isinstance(job.directory, Path):
        for path in list(job.directory.rglob("*.partial")):  # of a killed run
            path.unlink(missing_ok=True)
    if runner := options.beam_runner:
        done = f"{len(plan) - len(todo)} of {len(plan)} shards are complete"
        logger.info(f"  {done}; {runner} makes the others")
        _make_by_beam(job, todo, runner, options.beam_options)
    else:
        _make_here(job, plan, todo, options.workers)
    records = []
    for shard in plan:
        if (record := job.written(shard)) is None:
            name = f"shard {shard.name} of {job.directory}"
            raise RunFailed(f"{name} has disappeared. Run again to make it again.")
        records.append(record)

    # --- What was skipped, and why
    bad = dict(refused) | {key: what for one in records for key, what in one["bad"].items()}
    rows = [(key, "left out", reason) for key, reason in excluded.items()]
    rows += [(key, "bad", reason) for key, reason in bad.items()]
    rest = [(key, "other", reason) for key, reason in others.items()]
    listing = job.directory / "skipped.csv"
    listing.write_bytes(to_csv(pd.DataFrame(rows + rest, columns=["key", "kind", "reason"])))
    total = len(items) + len(excluded) + len(refused)
    for key, _, reason in rows[:20]:
        logger.info(f"  skipped {key}: {reason}")
    if rows:
        skipped = f"{len(rows)} of {total} recordings skipped ({len(bad)} unusable)"
        logger.info(f"  {skipped}; see {listing}")
    if len(items) + len(refused) == len(bad):
        message = f"none of the {len(bad)} recordings could be read."
        raise InputError(f"{message} The reasons are in {listing}.")
    if options.max_errors is not None and len(bad) > options.max_errors:
        raise RunFailed(
            f"{len(bad)} unusable recordings, {options.max_errors} allowed; the reasons are in"
            f" {listing}. Finished shards are saved: run again with --max-errors {len(bad)}"
            " (MAX_BAD in the notebook) to skip them, or with a repaired source."
        )

    # --- Metadata
    size = job.builder.CHUNK_FRAMES
    n_frames: dict[str, list[int]] = {}
    lengths: dict[str, list[int]] = {}
    num_bytes: dict[str, int] = {}
    for shard, record in zip(plan, records):
        frames = [facts["n_frames"] for facts in record["recordings"]]
        n_frames.setdefault(shard.split, []).extend(frames)
        lengths.setdefault(shard.split, []).append(sum(shards.chunk_count(n, size) for n in frames))
        num_bytes[shard.split] = num_bytes.get(shard.split, 0) + record["bytes"]
    for split in [split for split, frames in n_frames.items() if not frames]:  # all unusable
        del n_frames[split], lengths[split], num_bytes[split]
    if statistics_of not in n_frames:
        message = f"no readable recording in the split {statistics_of!r}"
        raise InputError(f"{message}. Give a source with recordings for this split.")
    statistics = shards.level_statistics(
        facts
        for shard, record in zip(plan, records)
        for facts in record["recordings"]
        if shard.split == statistics_of
    )
    metadata: dict[str, Any] = {
        "front_end": asdict(job.front_end),
        "statistics": asdict(statistics),
        "stored": job.dtype,
        "n_frames": n_frames,
        "chunk_frames": size,
        **description,
    }
    # TFDS would reuse the description of an earlier, damaged data set.
    (job.builder.home(job.directory) / "dataset_info.json").unlink(missing_ok=True)
    builder = job.builder(data_dir=job.directory, dtype=job.dtype, metadata=metadata)
    builder.write_info(lengths, num_bytes)
    facts = [one for record in records for one in record["recordings"]]
    repaired = {
        one.get("clip", one["key"]): one["midi_remarks"] for one in facts if one.get("midi_remarks")
    }
    for name, remarks in sorted(repaired.items())[:20]:
        logger.info(f"  MIDI of {name}: {remarks}")
    if len(repaired) > 20:
        logger.info(f"  and {len(repaired) - 20} more, see midi_remarks in records/")
    for name, table in tables(facts).items():
        content = table if isinstance(table, bytes) else to_csv(table)
        (job.directory / name).write_bytes(content)
    write_manifest(job.directory, job.builder.name)
    hours = sum(n for frames in n_frames.values() for n in frames) * job.front_end.seconds(1) / 3600
    gigabytes, count = sum(num_bytes.values()) / 1e9, f"{len(plan)} shard{'s' * (len(plan) > 1)}"
    logger.info(f"{len(facts)} recordings, {hours:.2f} h, {gigabytes:.3f} GB in {count}")


def check_complete(directory: Path) -> bool:
    """Whether ``directory`` holds a complete data set with all its files; if some are missing or
    damaged, it is marked as incomplete."""
    if not shards.is_complete(directory):
        return False
    try:
        lost = shortcomings(directory)
    except InputError as error:
        lost = [str(error)]
    if not lost:
        logger.info(f"shards in {directory} are complete")
        return True
    for line in lost[:20]:
        logger.info(f"  {line}")
    logger.info(f"{len(lost)} files in {directory} do not match the manifest; making them again")
    for name in {line.partition(": ")[0] for line in lost}:
        if name.startswith("records/"):  # its shard is made again
            (directory / name).unlink(missing_ok=True)
    (directory / MANIFEST).unlink()
    return False


def lock(directory: str | Path, settings: dict) -> Path:
    """`files.lock_config` for a data set, whose manifest has the checksum of its settings."""

    def saved() -> dict | None:
        try:
            known = shards.read_manifest(directory)["files"]["settings.json"]
        except (InputError, KeyError):
            return None
        same = known["sha256"] == files.sha256_of(json.dumps(settings, indent=1) + "\n")
        return settings if same else None

    return files.lock_config(directory, settings, saved)


# --- The manifest: lengths and checksums of all files ---------------------------------------------


def _names(directory: Path, below: str = "") -> Iterator[str]:
    """Names of all files of the data set; also at ``gs://``, which has no recursive listing."""
    for path in sorted(directory.iterdir(), key=lambda path: path.name):
        if files.of_the_system(path.name):
            continue
        if path.is_dir():
            yield from _names(path, f"{below}{path.name}/")
        elif below + path.name != MANIFEST and path.suffix != ".partial" and path.name[0] != ".":
            yield below + path.name


def _records(directory: Path, damaged: Collection[str] = ()) -> dict[str, dict]:
    """The records of the shards, except damaged ones."""
    paths = files.matching(directory / "records", "*.json")
    valid = [path for path in paths if f"records/{path.name}" not in damaged]
    advice = "Run preprocess again to restore it."
    return {path.stem: files.read_json(path, _RECORD, advice=advice) for path in valid}


def recordings(directory: Path) -> list[dict]:
    """Facts of every recording of a data set, in order, with the ``shard`` of each."""
    return [
        facts | {"shard": shard}
        for shard, record in _records(directory).items()
        for facts in record["recordings"]
    ]


def write_manifest(directory: Path, data_set: str) -> None:
    """Write length and SHA-256 of every file, which marks a data set as complete."""
    # Those of shards are recorded: reading 9 GB again takes minutes on a mounted Drive.
    records = _records(directory).values()
    known = {f"{data_set}/{VERSION}/{record['file']}": record for record in records}
    found = {}
    for name in _names(directory):
        path = directory / name
        one = known.get(name) or {"bytes": files.size_of(path), "sha256": files.sha256_of(path)}
        found[name] = {"bytes": one["bytes"], "sha256": one["sha256"]}
    content = {"data_set": data_set, "version": VERSION, "files": found}
    files.write_signed_json(directory / MANIFEST, content)


def shortcomings(directory: Path) -> list[str]:
    """Files of the manifest that are missing or have another length, and others than shards with
    another checksum."""
    found = []
    for name, known in shards.read_manifest(directory)["files"].items():
        path = directory / name
        if not path.is_file():
            found.append(f"{name}: missing")
        elif files.size_of(path) != known["bytes"]:
            found.append(f"{name}: {files.size_of(path):,} bytes, expected {known['bytes']:,}")
        elif not shards.is_shard(name) and files.sha256_of(path) != known["sha256"]:
            found.append(f"{name}: its SHA-256 does not match the manifest")
    return found


def verify(directory: Path) -> list[str]:
    """Verify every file by its checksum; returns one line per fault and affected recording.

    Raises:
        InputError: no complete data set.
    """
    manifest = shards.read_manifest(directory)
    wrong = shortcomings(directory)
    damaged = {line.partition(": ")[0] for line in wrong}
    for number, (name, known) in enumerate(manifest["files"].items(), start=1):
        if name not in damaged and files.sha256_of(directory / name) != known["sha256"]:
            wrong.append(f"{name}: its SHA-256 does not match the manifest")
            damaged.add(name)
        if number % 20 == 0:
            logger.info(f"  {number} of {len(manifest['files'])} files read")
    for record in _records(directory, damaged).values():
        name = f"{manifest['data_set']}/{VERSION}/{record['file']}"
        if name in damaged and (directory / name).is_file():
            wrong += [f"{name}: {line}" for line in _damaged_recordings(directory / name, record)]
    stray = sorted(set(_names(directory)) - set(manifest["files"]))
    return wrong + [f"{name}: not in the manifest" for name in stray]


def _damaged_recordings(path: Path, record: dict) -> list[str]:
    """Recordings of a shard whose contents do not match their checksums."""
    try:
        reader = array_record_module.ArrayRecordReader(str(path))
    except (RuntimeError, ValueError, OSError) as error:
        return [f"cannot be opened ({error})"]
    metadata = files.read_json(path.parent / "metadata.json", {"chunk_frames": int})
    features = tfds.builder_from_directory(path.parent).info.features
    found, first = [], 0
    for facts in record["recordings"]:
        count = shards.chunk_count(facts["n_frames"], metadata["chunk_frames"])
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


def copy_shards(source: Path, target: Path) -> Path:
    """Copy a data set to another folder and verify the checksums; files that match already are not
    copied again. The copy is incomplete until its manifest, the last file, is there.

    Raises:
        InputError: no complete data set, or too little disk space.
        RunFailed: a file does not match the manifest.
    """
    known = shards.read_manifest(source)["files"]
    (target / MANIFEST).unlink(missing_ok=True)
    advice = "Check it with `percepiano preprocess --verify`."
    files.copy_verified(known, source, target, advice)
    files.write_atomic(target / MANIFEST, (source / MANIFEST).read_bytes())
    return target
