"""Shards -> batches, with grain. Every batch is a pure function of (seed, step), so resuming needs no iterator state.

Batches carry levels as they are stored, uint8 codes or float16 dB. The training step normalises them on the device, to
which uint8 moves a quarter of float32's bytes; `normalised` does the same on the host.
"""

import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from absl import logging

from percepiano_ast.config import FrontEnd, InputError, Statistics
from percepiano_ast.data.hearing import Hearing
from percepiano_ast.data.records import Recordings
from percepiano_ast.data.shards import ShardSet

# On import grain warns about profiling of worker processes, which there are none of here.
_verbosity = logging.get_verbosity()
logging.set_verbosity(logging.ERROR)
import grain  # noqa: E402

logging.set_verbosity(_verbosity)

# Reading is light; two threads with a short queue hide it behind the step.
READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)


class _Windows:
    """Where the windows of every epoch lie.

    A recording has as many as fit into it wherever the first one starts. They lie end to end and the first starts
    anywhere, anew in every epoch: none of them overlap, and every alignment is as likely as any other.
    """

    def __init__(self, n_frames: np.ndarray, length: int, seed: int):
        self.length, self.seed = length, seed
        counts = np.maximum(n_frames // length - 1, 1)
        self.recording = np.repeat(np.arange(len(counts)), counts)
        number = np.arange(len(self.recording)) - np.repeat(np.cumsum(counts) - counts, counts)
        self.behind_first = number * length
        self.last_phase = n_frames - counts * length
        # Two epochs are in work where one ends and the next is read ahead.
        self.epoch = functools.lru_cache(maxsize=2)(self._epoch)

    def __len__(self) -> int:
        return len(self.recording)

    def _epoch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Recording and first frame of every window, in the order of the epoch."""
        rng = np.random.default_rng([self.seed, number])
        phase = rng.integers(self.last_phase, endpoint=True)
        order = rng.permutation(len(self))
        recording = self.recording[order]
        return recording, phase[recording] + self.behind_first[order]


@dataclass(frozen=True)
class PretrainBatches:
    """Windows of a split in random order, as dicts: ``codes`` (batch, time, mel) as stored, and in ``clip`` where each
    was cut; with a `Hearing` also its ``targets`` and ``descriptors``.

    The step is the whole position: ``from_step(k)`` goes on wherever a checkpoint says that k steps were taken. The
    iterators are grain's; their ``get_state`` and ``set_state`` count the batches from where the iterator began.

    Attributes:
        steps_per_epoch: whole batches in the windows of an epoch; those that fill no batch are left out of it.
    """

    steps_per_epoch: int
    _recordings: Recordings
    _windows: _Windows
    _batch_size: int
    _rows: slice
    _hearing: Hearing | None = None

    def from_step(self, step: int) -> grain.DatasetIterator:
        """Batches of step ``step``, the next one, ... for ever: the same ones that an uninterrupted run sees."""
        return self._iterate(step, sys.maxsize)

    def one_epoch(self) -> grain.DatasetIterator:
        """The batches of the first epoch."""
        return self._iterate(0, self.steps_per_epoch)

    def _iterate(self, first: int, stop: int) -> grain.DatasetIterator:
        return iter(grain.MapDataset.range(first, stop).map(self._batch).to_iter_dataset(READ_OPTIONS))

    def _batch(self, step: int) -> dict:
        epoch, place = divmod(step, self.steps_per_epoch)
        whole = slice(place * self._batch_size, (place + 1) * self._batch_size)
        recordings, starts = (column[whole][self._rows].tolist() for column in self._windows.epoch(epoch))
        shape = (len(starts), self._windows.length, self._recordings.n_mels)
        codes = np.empty(shape, self._recordings.dtype)
        keys = [self._recordings.read(*window) for window in zip(recordings, starts, codes)]
        batch = {"codes": codes, "clip": [f"{key} from frame {start}" for key, start in zip(keys, starts)]}
        return batch | self._hearing.batch(keys, starts, self._windows.length) if self._hearing else batch


def pretrain_batches(
    shards: ShardSet,
    *,
    n_frames: int,
    batch_size: int,
    seed: int,
    process: tuple[int, int] = (0, 1),
    hearing: Hearing | None = None,
) -> PretrainBatches:
    """Windows of ``n_frames``; those of a recording do not overlap within an epoch, which visits nearly all of it.

    Args:
        process: number of this process and how many there are. Each reads and gets its own rows of every batch, and the
            rows of all, one below the other, are the batch that a single process gets.
        hearing: of the same split, where what is played is to be heard.

    Raises:
        InputError: a recording shorter than a window, fewer windows than one batch, or a batch that the processes do
            not divide; from the iterators: a damaged record.
    """
    number, count = process
    if batch_size % count:
        raise InputError(f"a batch of {batch_size} is not divided by {count} processes; choose a multiple of {count}")
    if (shortest := shards.n_frames.min()) < n_frames:
        raise InputError(f"a recording of {shortest} frames is shorter than the model's window of {n_frames}")
    windows = _Windows(shards.n_frames, n_frames, seed)
    if len(windows) < batch_size:
        raise InputError(f"{len(windows)} windows of {n_frames} frames do not fill one batch of {batch_size}")
    rows = slice(number * batch_size // count, (number + 1) * batch_size // count)
    return PretrainBatches(len(windows) // batch_size, Recordings(shards), windows, batch_size, rows, hearing)


def normalised(stored: np.ndarray, front_end: FrontEnd, statistics: Statistics, out: np.ndarray | None = None) -> np.ndarray:
    """What the training step makes of a batch, on the host: float32 ``(dB - mean) / (2 std)``, up to rounding.

    Args:
        stored: (batch, time, mel) uint8 codes or float16 dB.
        out: float32 of the same shape to write to: new memory for every batch takes longer than the arithmetic.
    """
    step, floor = (front_end.step_db, front_end.floor_db) if stored.dtype == np.uint8 else (1.0, 0.0)
    scale = np.float32(step / (2 * statistics.std_db))
    offset = np.float32((floor - statistics.mean_db) / (2 * statistics.std_db))
    out = np.empty(stored.shape, np.float32) if out is None else out
    for values, row in zip(stored, out):  # a row stays in the cache
        np.copyto(row, values)
        row *= scale
        row += offset
    return out


def pad_window(codes: np.ndarray, n_frames: int) -> np.ndarray:
    """Pad (time, mel) codes at the end with the floor's code 0 up to ``n_frames``."""
    return np.pad(codes, ((0, n_frames - len(codes)), (0, 0)))


def window_starts(length: int, n_frames: int) -> list[int]:
    """First frames of the windows of a clip of ``length`` frames: a hop of half a window, the last one ends with the clip."""
    last = max(length - n_frames, 0)
    return list(range(0, last, n_frames // 2)) + [last]


def clip_windows(clips: list[np.ndarray], *, n_frames: int, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Every clip cut into windows with a hop of half a window, the last one aligned with the clip's end.

    Yields:
        ``codes`` uint8 (batch, time, mel), ``n_valid`` int32 (batch,) real frames, ``clip`` int32 (batch,) position in
        ``clips`` or -1 where the last batch is filled up.
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
    """Whole clips with their ratings (n, 19), held in memory as uint8 (1,202 clips in two pianos: half a gigabyte)."""

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
    clips: RatedClips, members: np.ndarray, *, n_frames: int, max_windows: int, batch_size: int, seed: int
) -> tuple[grain.MapDataset, int]:
    """The clips at positions ``members`` as windows, each clip once an epoch, and the steps of an epoch.

    A clip has as many windows as a rating hears of it (`window_starts`), at most ``max_windows``; each starts anywhere in its
    own part of the clip, so that together they are spread over it and no two epochs hear the same.

    Returns:
        batches of ``codes`` (batch, max_windows, time, mel) as stored, ``n_valid`` int32 (batch, max_windows) real frames, 0
        where a clip has fewer windows, and ``clip`` int32 (batch,), its position; and their number in an epoch.

    Raises:
        InputError: no window at all.
    """
    if max_windows < 1:
        raise InputError(f"{max_windows} windows of a clip are none; choose at least 1")

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
    """Batches of endless epochs from ``step`` on: the same ones that an uninterrupted run sees."""
    return iter(dataset.repeat()[step:].to_iter_dataset(READ_OPTIONS))
