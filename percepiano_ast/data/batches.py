"""Shards -> batches, with grain. Every batch is a pure function of (seed, step), so resuming needs
no iterator state.

Batches hold levels as stored, uint8 codes or float16 dB. The training step normalises them on the
device: uint8 needs a quarter of float32's transfer. `normalised` does the same on the host.
"""

import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from absl import logging

from percepiano_ast.config import FrontEnd, Statistics
from percepiano_ast.data.hearing import Hearing
from percepiano_ast.data.shards import Recordings, ShardSet
from percepiano_ast.data.windows import pad_window, window_starts
from percepiano_ast.errors import InputError

# On import grain warns about the profiling of worker processes; none are used here.
_verbosity = logging.get_verbosity()
logging.set_verbosity(logging.ERROR)
import grain  # noqa: E402

logging.set_verbosity(_verbosity)

# Reading is cheap: two threads and a short queue overlap it with the training step.
READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)


class _Windows:
    """Window positions of every epoch.

    The number of windows per recording is the number that fits for any start of the first one.
    Windows are contiguous, and the first start is drawn again in every epoch: windows do not
    overlap, and all alignments are equally likely.
    """

    def __init__(self, n_frames: np.ndarray, length: int, seed: int):
        self.length, self.seed = length, seed
        counts = np.maximum(n_frames // length - 1, 1)
        self.recording = np.repeat(np.arange(len(counts)), counts)
        number = np.arange(len(self.recording)) - np.repeat(np.cumsum(counts) - counts, counts)
        self.behind_first = number * length
        self.last_phase = n_frames - counts * length
        # Two epochs are in use when one ends while the next is prefetched.
        self.epoch = functools.lru_cache(maxsize=2)(self._epoch)

    def __len__(self) -> int:
        return len(self.recording)

    def _epoch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Recording and first frame of every window, in the epoch's order."""
        rng = np.random.default_rng([self.seed, number])
        phase = rng.integers(self.last_phase, endpoint=True)
        order = rng.permutation(len(self))
        recording = self.recording[order]
        return recording, phase[recording] + self.behind_first[order]


@dataclass(frozen=True)
class PretrainBatches:
    """Windows of a split in random order, as dicts: ``codes`` (batch, time, mel) as stored, and
    ``clip``, the source of each window; with a `Hearing` also its ``targets`` and ``descriptors``.

    The step is the complete state: ``from_step(k)`` resumes after k steps. The iterators are
    grain's; their ``get_state`` and ``set_state`` count batches from the iterator's start.

    Attributes:
        steps_per_epoch: full batches per epoch; an epoch's remaining windows are dropped.
    """

    steps_per_epoch: int
    _recordings: Recordings
    _windows: _Windows
    _batch_size: int
    _rows: slice
    _hearing: Hearing | None = None

    def from_step(self, step: int) -> grain.DatasetIterator:
        """Endless batches from ``step`` on, the same as in an uninterrupted run."""
        return self._iterate(step, sys.maxsize)

    def one_epoch(self) -> grain.DatasetIterator:
        """The batches of the first epoch."""
        return self._iterate(0, self.steps_per_epoch)

    def _iterate(self, first: int, stop: int) -> grain.DatasetIterator:
        return iter(
            grain.MapDataset.range(first, stop).map(self._batch).to_iter_dataset(READ_OPTIONS)
        )

    def _batch(self, step: int) -> dict:
        epoch, place = divmod(step, self.steps_per_epoch)
        whole = slice(place * self._batch_size, (place + 1) * self._batch_size)
        recordings, starts = (
            column[whole][self._rows].tolist() for column in self._windows.epoch(epoch)
        )
        shape = (len(starts), self._windows.length, self._recordings.n_mels)
        codes = np.empty(shape, self._recordings.dtype)
        keys = [self._recordings.read(*window) for window in zip(recordings, starts, codes)]
        batch = {
            "codes": codes,
            "clip": [f"{key} from frame {start}" for key, start in zip(keys, starts)],
        }
        return (
            batch | self._hearing.batch(keys, starts, self._windows.length)
            if self._hearing
            else batch
        )


def pretrain_batches(
    shards: ShardSet,
    *,
    n_frames: int,
    batch_size: int,
    seed: int,
    process: tuple[int, int] = (0, 1),
    hearing: Hearing | None = None,
) -> PretrainBatches:
    """Windows of ``n_frames``; within an epoch they do not overlap and cover nearly all of each
    recording.

    Args:
        process: index of this process and number of processes. Each process reads its own rows of
            every batch; stacked, the rows of all processes equal the batch of a single process.
        hearing: transcription targets of the same split, if any.

    Raises:
        InputError: a recording shorter than a window, fewer windows than one batch, or a batch size
            that is not a multiple of the number of processes; from the iterators: a damaged record.
    """
    number, count = process
    if batch_size % count:
        raise InputError(
            f"batch size {batch_size} is not divisible by {count} processes. Choose a multiple of"
            f" {count}."
        )
    if (shortest := shards.n_frames.min()) < n_frames:
        raise InputError(
            f"a recording of {shortest} frames is shorter than the model's window of {n_frames}."
            " Preprocess longer recordings."
        )
    windows = _Windows(shards.n_frames, n_frames, seed)
    if len(windows) < batch_size:
        raise InputError(
            f"{len(windows)} windows of {n_frames} frames do not fill one batch of {batch_size}."
            " Choose a smaller batch size."
        )
    rows = slice(number * batch_size // count, (number + 1) * batch_size // count)
    return PretrainBatches(
        len(windows) // batch_size, Recordings(shards), windows, batch_size, rows, hearing
    )


def normalised(
    stored: np.ndarray, front_end: FrontEnd, statistics: Statistics, out: np.ndarray | None = None
) -> np.ndarray:
    """The training step's normalisation, computed on the host: float32 ``(dB - mean) / (2 std)``,
    up to rounding.

    Args:
        stored: (batch, time, mel) uint8 codes or float16 dB.
        out: float32 of the same shape to write to: new memory for every batch takes longer than the
            arithmetic.
    """
    step, floor = (
        (front_end.step_db, front_end.floor_db) if stored.dtype == np.uint8 else (1.0, 0.0)
    )
    scale = np.float32(step / (2 * statistics.std_db))
    offset = np.float32((floor - statistics.mean_db) / (2 * statistics.std_db))
    out = np.empty(stored.shape, np.float32) if out is None else out
    for values, row in zip(stored, out):  # row by row, so that a row stays in the CPU cache
        np.copyto(row, values)
        row *= scale
        row += offset
    return out


def clip_windows(
    clips: list[np.ndarray], *, n_frames: int, batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """Cut every clip into windows with a hop of half a window; the last window ends with the clip.

    Yields:
        ``codes`` uint8 (batch, time, mel), ``n_valid`` int32 (batch,) valid frames, ``clip`` int32
        (batch,) position in ``clips``, or -1 for padding rows of the last batch.
    """
    windows = []
    for number, codes in enumerate(clips):
        windows += [(number, start) for start in window_starts(len(codes), n_frames)]
    for first in range(0, len(windows), batch_size):
        part = windows[first : first + batch_size]
        part += [(-1, 0)] * (batch_size - len(part))
        pieces = [clips[max(number, 0)][start : start + n_frames] for number, start in part]
        yield {
            "codes": np.stack([pad_window(piece, n_frames) for piece in pieces]),
            "n_valid": np.array([len(piece) for piece in pieces], np.int32),
            "clip": np.array([number for number, _ in part], np.int32),
        }


@dataclass(frozen=True)
class RatedClips:
    """Whole clips with their ratings (n, 19), held in memory as uint8 (1,202 clips with two pianos:
    half a gigabyte)."""

    codes: list[np.ndarray]
    clip: np.ndarray
    synthesizer: np.ndarray
    ratings: np.ndarray


def rated_clips(shards: ShardSet) -> RatedClips:
    """Read all rated clips, ordered by clip and synthesizer."""
    examples = [shards[i] for i in range(len(shards))]
    examples.sort(key=lambda example: (example["clip"], example["synthesizer"]))
    return RatedClips(
        [example["log_mel"] for example in examples],
        np.array([example["clip"].decode() for example in examples]),
        np.array([example["synthesizer"].decode() for example in examples]),
        np.stack([example["ratings"] for example in examples]),
    )


def finetune_batches(
    clips: RatedClips,
    members: np.ndarray,
    *,
    n_frames: int,
    max_windows: int,
    batch_size: int,
    seed: int,
) -> tuple[grain.MapDataset, int]:
    """The clips at positions ``members`` as windows, each clip once per epoch, and the number of
    steps per epoch.

    A clip has as many windows as at inference (`window_starts`), at most ``max_windows``. Each
    starts at random within its own part of the clip, so the windows spread over the clip and differ
    between epochs.

    Returns:
        batches of ``codes`` (batch, max_windows, time, mel) as stored, ``n_valid`` int32 (batch,
        max_windows) valid frames, 0 for windows that a clip lacks, and ``clip`` int32 (batch,), its
        position; and the number of batches per epoch.

    Raises:
        InputError: ``max_windows`` below 1.
    """
    if max_windows < 1:
        raise InputError(f"{max_windows} windows per clip: choose at least 1")

    def cut(number: int, rng: np.random.Generator) -> dict[str, np.ndarray | np.int32]:
        codes = clips.codes[number]
        last = max(len(codes) - n_frames, 0)
        count = min(len(window_starts(len(codes), n_frames)), max_windows)
        pieces = np.zeros((max_windows, n_frames, codes.shape[1]), codes.dtype)
        n_valid = np.zeros(max_windows, np.int32)
        for place in range(count):
            start = rng.integers(place * last // count, (place + 1) * last // count, endpoint=True)
            piece = codes[start : start + n_frames]
            pieces[place, : len(piece)], n_valid[place] = piece, len(piece)
        return {"codes": pieces, "n_valid": n_valid, "clip": np.int32(number)}

    dataset = grain.MapDataset.source(members.tolist()).seed(seed).shuffle().random_map(cut)
    dataset = dataset.batch(min(batch_size, len(members)), drop_remainder=True)
    return dataset, len(dataset)


def from_step(dataset: grain.MapDataset, step: int) -> Iterator:
    """Endless batches from ``step`` on, the same as in an uninterrupted run."""
    return iter(dataset.repeat()[step:].to_iter_dataset(READ_OPTIONS))
