"""Build a data set from recordings: plan, make the shards locally or on a cluster, list skipped
recordings, write the manifest."""

import csv
import io
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from percepiano_ast.data import beam, manifest, shards
from percepiano_ast.data.shards import Item, Shard
from percepiano_ast.data.staging import Job, LocalRun
from percepiano_ast.errors import InputError, RunFailed


@dataclass(frozen=True)
class Work:
    """How the shards are made.

    Attributes:
        workers: number of local processes.
        max_bad: maximum number of unusable recordings; None for no limit.
        beam_runner, beam_options: of Apache Beam, instead of local processes.
        log: called with every line of progress.
    """

    workers: int = 1
    max_bad: int | None = 0
    beam_runner: str = ""
    beam_options: tuple[str, ...] = ()
    log: Callable[[str], None] = print


@dataclass(frozen=True)
class Contents:
    """Contents of a data set, and recordings that are known to be excluded.

    Attributes:
        left_out: excluded on purpose, with the reason.
        refused: unusable according to the source's listing, with the reason.
        statistics_of: split whose level statistics normalise all splits.
        description: added to the data set's metadata.
        tables: returns file name -> table, given the facts of the included recordings.
        sidecars: returns file name -> content, given the same facts.
    """

    items: list[Item]
    left_out: dict[str, str]
    refused: dict[str, str]
    statistics_of: str
    description: dict
    tables: Callable[[list[dict]], dict[str, pd.DataFrame]] = field(default=lambda facts: {})
    sidecars: Callable[[list[dict]], dict[str, bytes]] = field(default=lambda facts: {})


def is_whole(directory: Path, log: Callable[[str], None]) -> bool:
    """Whether ``directory`` holds a complete data set; if files are missing, it is marked as
    incomplete."""
    if not shards.is_complete(directory):
        return False
    lost = manifest.shortcomings(directory)
    if not lost:
        log(f"shards in {directory} are complete")
        return True
    for line in lost[:20]:
        log(f"  {line}")
    log(f"{len(lost)} files in {directory} do not match the manifest; making them again")
    (directory / shards.MANIFEST).unlink()
    return False


def build(job: Job, contents: Contents, work: Work) -> None:
    """Make the data set; resumes an interrupted call.

    Raises:
        InputError: no readable recording at all or in the split ``statistics_of``, or too little
            disk space.
        RunFailed: more unusable recordings than ``work.max_bad``, or see `LocalRun.run`; finished
            work is kept.
    """
    plan = shards.plan(contents.items)
    limit = len(contents.items) + len(contents.refused) if work.max_bad is None else work.max_bad
    if work.beam_runner:
        bad = beam.run(job, plan, work.beam_runner, work.beam_options, work.log)
    else:
        rate = job.front_end.sample_rate / job.front_end.hop_length * job.front_end.n_mels
        rate *= np.dtype(shards.DTYPES[job.stored]).itemsize
        bad = LocalRun(job, work.workers, rate, work.log).run(plan, limit - len(contents.refused))
    bad = contents.refused | bad
    total = len(contents.items) + len(contents.left_out) + len(contents.refused)
    _list_skipped(job.directory / "skipped.csv", contents.left_out, bad, total, work.log)
    if len(contents.items) + len(contents.refused) == len(bad):
        raise InputError(
            f"none of the {len(bad)} recordings could be read. The reasons are in"
            f" {job.directory}/skipped.csv."
        )
    if len(bad) > limit:
        raise RunFailed(
            f"{len(bad)} unusable recordings, {limit} allowed; the reasons are in"
            f" {job.directory}/skipped.csv. All others are done: run again with --max-bad"
            f" {len(bad)} (MAX_BAD in the notebook) to skip them, or with a repaired source."
        )
    _finish(job, plan, contents, work)


def _list_skipped(
    path: Path, left_out: dict, bad: dict, total: int, log: Callable[[str], None]
) -> None:
    """List skipped recordings in a CSV file, and count them in the log."""
    rows = [(key, "left out", reason) for key, reason in left_out.items()]
    rows += [(key, "bad", reason) for key, reason in bad.items()]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["key", "kind", "reason"])
    writer.writerows(rows)
    path.write_text(text.getvalue())
    for key, _, reason in rows[:20]:
        log(f"  skipped {key}: {reason}")
    if rows:
        log(f"  {len(rows)} of {total} recordings skipped ({len(bad)} unusable); see {path}")


def _finish(job: Job, plan: list[Shard], contents: Contents, work: Work) -> None:
    """Write the metadata, and then the manifest that marks the data set as complete."""
    records = []
    for shard in plan:
        if (record := job.written(shard)) is None:
            raise RunFailed(
                f"shard {shard.name} of {job.directory} has disappeared. Run again to make it"
                " again."
            )
        records.append(record)
    size = job.builder.CHUNK_FRAMES
    n_frames: dict[str, list[int]] = {}
    lengths: dict[str, list[int]] = {}
    num_bytes: dict[str, int] = {}
    for shard, record in zip(plan, records):
        frames = [facts["n_frames"] for facts in record["recordings"]]
        n_frames.setdefault(shard.split, []).extend(frames)
        lengths.setdefault(shard.split, []).append(sum(shards.chunk_count(n, size) for n in frames))
        num_bytes[shard.split] = num_bytes.get(shard.split, 0) + record["bytes"]
    n_frames = {split: frames for split, frames in n_frames.items() if frames}
    if contents.statistics_of not in n_frames:
        raise InputError(
            f"no readable recording in the split {contents.statistics_of!r}. Give a source with"
            " recordings for this split."
        )
    facts = [one for record in records for one in record["recordings"]]
    of_split = [
        record for shard, record in zip(plan, records) if shard.split == contents.statistics_of
    ]
    statistics = shards.level_statistics(one for record in of_split for one in record["recordings"])
    metadata: dict[str, Any] = {
        "front_end": asdict(job.front_end),
        "statistics": asdict(statistics),
        "stored": job.stored,
    }
    metadata |= {"n_frames": n_frames, "chunk_frames": size, **contents.description}
    for split in lengths.keys() - n_frames:  # no readable recording in it
        del lengths[split], num_bytes[split]
    # TFDS would reuse the description of an earlier, damaged data set.
    (job.builder.home(job.directory) / "dataset_info.json").unlink(missing_ok=True)
    job.builder(data_dir=job.directory, stored=job.stored, metadata=metadata).write_info(
        lengths, num_bytes
    )
    for name, table in contents.tables(facts).items():
        (job.directory / name).write_text(table.to_csv(index=False))
    for name, content in contents.sidecars(facts).items():
        (job.directory / name).write_bytes(content)
    shutil.rmtree(job.directory / "staged", ignore_errors=True)
    manifest.write(job.directory, job.builder.name)
    hours = sum(n for frames in n_frames.values() for n in frames) * job.front_end.seconds(1) / 3600
    files = f"{len(plan)} shard{'s' * (len(plan) > 1)}"
    work.log(
        f"{len(facts)} recordings, {hours:.2f} h, {sum(num_bytes.values()) / 1e9:.3f} GB in {files}"
    )
