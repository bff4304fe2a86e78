"""Reading batches from shards: clips per second on one core, against plain TFDS."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bench import medians, result
from percepiano_ast.config import PRESETS, FrontEnd, LevelStats
from percepiano_ast.data import build, maestro, shards
from percepiano_ast.data.batches import pretrain_batches
from percepiano_ast.errors import InputError
from percepiano_ast.pipeline import workers

N_FRAMES, BATCH = PRESETS["base"].model.n_frames, PRESETS["base"].pretrain.batch_size
RECORDINGS, FRAMES = 60, 39_000  # 6.5 h in 300 MB of codes, larger than processor caches


def batches() -> Iterator[dict]:
    """Random windows from a temporary data set of 300 MB, which fits into the file system's cache.

    The float32 batches are normalised on the host. Training transfers the ``uint8`` batches and
    normalises them on the device. The peer decodes the same chunks with TFDS, crops, normalises and
    stacks.

    Raises:
        InputError: the system cannot pin a process to one core.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise InputError(
            "this system cannot pin a process to one core; run this benchmark on Linux"
        )
    with tempfile.TemporaryDirectory() as directory:
        _write(Path(directory))
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(allowed)})  # also of the threads that start below
        try:
            train = shards.open_shards(directory, "train", made_by="this benchmark")
            made = pretrain_batches(train, n_frames=N_FRAMES, batch_size=BATCH, seed=0)
            out = np.empty((BATCH, N_FRAMES, train.front_end.n_mels), np.float32)

            # Whole epochs, so that prefetching does not run into the next measurement.
            def as_float32() -> None:
                for batch in made.one_epoch():
                    normalised(batch["codes"], train.front_end, train.statistics, out)

            def as_stored() -> None:
                for _ in made.one_epoch():
                    pass

            ours, stored, theirs = medians(
                as_float32, as_stored, lambda: _plainly(train, made.steps_per_epoch)
            )
        finally:
            os.sched_setaffinity(0, allowed)
    clips, unit = made.steps_per_epoch * BATCH, "clips/s/core"
    peer = {"peer": "TFDS's decoding, numpy's crop, normalisation and stack"}
    peer |= {"ratio": round(theirs / ours, 2), "batch": BATCH, "frames": N_FRAMES}
    yield result("batches", round(clips / ours), unit, **peer, chunk_frames=train.chunk_frames)
    yield result("batches-uint8", round(clips / stored), unit)


def _plainly(train: shards.ShardSet, steps: int) -> None:
    """Make ``steps`` batches of random windows from decoded examples, with the simplest code."""
    rng = np.random.default_rng(0)
    counts = [shards.chunk_count(n, train.chunk_frames) for n in train.n_frames.tolist()]
    first = np.cumsum(counts) - counts
    mean, scale = np.float32(train.statistics.mean_db), np.float32(2 * train.statistics.std_db)
    step, floor = np.float32(train.front_end.step_db), np.float32(train.front_end.floor_db)
    for _ in range(steps):
        rows = []
        for _ in range(BATCH):
            recording = rng.integers(len(counts))
            start = int(rng.integers(train.n_frames[recording] - N_FRAMES, endpoint=True))
            ends = (start, start + N_FRAMES - 1)
            one, last = (min(frame // train.chunk_frames, counts[recording] - 1) for frame in ends)
            chunks = [train[int(first[recording]) + k]["log_mel"] for k in range(one, last + 1)]
            skipped = start - one * train.chunk_frames
            codes = np.concatenate(chunks)[skipped : skipped + N_FRAMES]
            rows.append((codes.astype(np.float32) * step + floor - mean) / scale)
        np.stack(rows)


def normalised(
    stored: np.ndarray, front_end: FrontEnd, statistics: LevelStats, out: np.ndarray | None = None
) -> np.ndarray:
    """The training step's normalisation of (batch, time, mel) on the host: float32 ``(dB - mean) /
    (2 std)``, up to rounding. ``out``: memory for the result; new memory for every batch takes
    longer than the arithmetic."""
    coded = stored.dtype == np.uint8
    step, floor = (front_end.step_db, front_end.floor_db) if coded else (1.0, 0.0)
    scale = np.float32(step / (2 * statistics.std_db))
    offset = np.float32((floor - statistics.mean_db) / (2 * statistics.std_db))
    out = np.empty(stored.shape, np.float32) if out is None else out
    for values, row in zip(stored, out):  # row by row, so that a row stays in the CPU cache
        np.copyto(row, values)
        row *= scale
        row += offset
    return out


def _write(directory: Path) -> None:
    """Write the data set with the writer for real data."""
    front_end = FrontEnd()
    fields = {"composer": "", "title": "", "year": 2004}
    keys = [f"{number}.wav" for number in range(RECORDINGS)]
    items = [
        shards.Item(key, "train", {"recording": key, **fields}, front_end.seconds(FRAMES))
        for key in keys
    ]
    job = build.Job(maestro.MaestroLogMel, _piano, directory, front_end)
    how, facts = build.BuildOptions(workers()), {"simulated": True}
    build.build(job, items, how, statistics_of="train", description=facts)


def _piano(item: shards.Item, facts: dict) -> Iterator[np.ndarray]:
    """Codes that compress like those of recorded piano: decaying partials over room noise."""
    rng = np.random.default_rng(int(Path(item.key).stem))
    floor = np.linspace(-50, -72, 128, dtype=np.float32)  # dB, falling with pitch
    for first in range(0, FRAMES, 4096):
        frames = min(4096, FRAMES - first)
        power = rng.standard_exponential((frames, 128), np.float32) * 10 ** (floor / 10)
        for _ in range(frames // 12):  # eight notes a second
            start, band, loudness = rng.integers(frames), rng.integers(4, 60), rng.uniform(-30, 10)
            decay = np.arange(min(300, frames - start))[:, None] * rng.uniform(0.05, 0.3)
            partials = np.arange(band, 128, 9)
            level = loudness - decay - 0.4 * (partials - band) - rng.uniform(0, 12, len(partials))
            power[start : start + len(decay), partials] += 10 ** (level / 10)
        yield np.clip((10 * np.log10(np.maximum(power, 1e-10)) + 80) * 2, 0, 255).astype(np.uint8)
