"""Shards -> batches, with grain. Every batch is a pure function of (seed, step), so resuming needs no iterator state.

Batches carry uint8 codes of the front end; the training step turns them into levels, which moves a quarter of the bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from absl import logging

# On import grain warns about profiling of worker processes, which there are none of here.
_verbosity = logging.get_verbosity()
logging.set_verbosity(logging.ERROR)
import grain  # noqa: E402

logging.set_verbosity(_verbosity)

from percepiano_ast.config import InputError
from percepiano_ast.data.maestro import CHUNK_FRAMES
from percepiano_ast.data.shards import ShardSet

# Reading is light; two threads with a short queue hide it behind the step.
READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)


class _Crops:
    """Every chunk as often as windows fit into a chunk of usual length; each visit crops another stretch of it.

    Chunks differ a little in length, but asking each for its own would read all shards before the first step.
    """

    def __init__(self, shards: ShardSet, n_frames: int):
        self.shards, self.n_frames = shards, n_frames
        self.per_chunk = max(CHUNK_FRAMES // n_frames, 1)

    def __len__(self) -> int:
        return len(self.shards) * self.per_chunk

    def __getitem__(self, index: int) -> tuple[dict, int]:
        chunk, visit = divmod(int(index), self.per_chunk)
        return self.shards[chunk], visit

    def crop(self, element: tuple[dict, int], rng: np.random.Generator) -> dict:
        chunk, visit = element
        codes, last = chunk["log_mel"], len(chunk["log_mel"]) - self.n_frames
        if last < 0:
            raise InputError(f"a chunk of {len(codes)} frames is shorter than the model's window of {self.n_frames}")
        start = int((visit + rng.random()) / self.per_chunk * (last + 1))
        name = f"{chunk['recording'].decode()} from frame {chunk['start_frame'] + start}"
        return {"codes": codes[start : start + self.n_frames], "clip": name}


@dataclass(frozen=True)
class PretrainBatches:
    """Random crops of a split: dicts of uint8 ``codes`` (batch, time, mel), and in ``clip`` where each was cut."""

    dataset: grain.MapDataset
    steps_per_epoch: int

    def from_step(self, step: int) -> Iterator[dict]:
        """Batches of step ``step``, the next one, ... for ever: the same ones that an uninterrupted run sees."""
        return from_step(self.dataset, step)

    def one_epoch(self) -> Iterator[dict]:
        """The batches of the first epoch."""
        return iter(self.dataset.to_iter_dataset(READ_OPTIONS))


def pretrain_batches(
    shards: ShardSet, *, n_frames: int, batch_size: int, seed: int, process: tuple[int, int] = (0, 1)
) -> PretrainBatches:
    """Shuffled random crops of ``n_frames``; an epoch holds about as many crops as whole windows fit into the chunks.

    Args:
        process: number of this process and how many there are. Each reads and gets its own rows of every batch, and the
            rows of all, one below the other, are the batch that a single process gets.

    Raises:
        InputError: fewer crops than one batch, or a batch that the processes do not divide.
    """
    crops = _Crops(shards, n_frames)
    number, count = process
    if batch_size % count:
        raise InputError(f"a batch of {batch_size} is not divided by {count} processes; choose a multiple of {count}")
    if len(crops) < batch_size:
        raise InputError(f"{len(crops)} windows of {n_frames} frames do not fill one batch of {batch_size}")
    dataset = grain.MapDataset.source(crops).seed(seed).shuffle().random_map(crops.crop)
    dataset = dataset[: len(crops) // batch_size * batch_size].batch(batch_size // count)
    return PretrainBatches(dataset[number::count], len(crops) // batch_size)


def pad_window(codes: np.ndarray, n_frames: int) -> np.ndarray:
    """Pad (time, mel) codes at the end with the floor's code 0 up to ``n_frames``."""
    return np.pad(codes, ((0, n_frames - len(codes)), (0, 0)))


def clip_windows(clips: list[np.ndarray], *, n_frames: int, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Every clip cut into windows with a hop of half a window, the last one aligned with the clip's end.

    Yields:
        ``codes`` uint8 (batch, time, mel), ``n_valid`` int32 (batch,) real frames, ``clip`` int32 (batch,) position in
        ``clips`` or -1 where the last batch is filled up.
    """
    windows = []
    for number, codes in enumerate(clips):
        last = max(len(codes) - n_frames, 0)
        starts = list(range(0, last, n_frames // 2)) + [last]
        windows += [(number, start) for start in starts]
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
    clips: RatedClips, members: np.ndarray, *, n_frames: int, batch_size: int, seed: int
) -> tuple[grain.MapDataset, int]:
    """Random windows of the clips at positions ``members``, one per clip and epoch, and the steps of an epoch."""

    def crop(number: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        codes = clips.codes[number]
        start = rng.integers(0, max(len(codes) - n_frames, 0) + 1)
        piece = codes[start : start + n_frames]
        return {
            "codes": pad_window(piece, n_frames),
            "n_valid": np.int32(len(piece)),
            "ratings": clips.ratings[number],
        }

    dataset = grain.MapDataset.source(members.tolist()).seed(seed).shuffle().random_map(crop)
    dataset = dataset.batch(min(batch_size, len(members)), drop_remainder=True)
    return dataset, len(dataset)


def from_step(dataset: grain.MapDataset, step: int) -> Iterator:
    """Batches of endless epochs from ``step`` on: the same ones that an uninterrupted run sees."""
    return iter(dataset.repeat()[step:].to_iter_dataset(READ_OPTIONS))
