"""Shards -> batches, with grain. Every batch is a pure function of (seed, step), so resuming needs
no iterator state. Batches hold levels as stored, uint8 codes or float16 dB; the training step
normalises them on the device."""

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from absl import logging

from percepiano_ast.audio.mel import pad_window, window_starts
from percepiano_ast.data.shards import (
    Performances,
    Recordings,
    ShardSet,
    open_performances,
    require_performances,
)
from percepiano_ast.errors import InputError
from percepiano_ast.music.midi import excerpt
from percepiano_ast.music.performance_features import WINDOW_FEATURES, performance_features
from percepiano_ast.music.piano_roll import FrameTargets, PianoRoll

# On import grain warns about the profiling of worker processes; none are used here.
_verbosity = logging.get_verbosity()
logging.set_verbosity(logging.ERROR)
import grain  # noqa: E402

logging.set_verbosity(_verbosity)

# Reading is cheap: two threads and a short queue overlap it with the training step.
READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)
DESCRIBE_EVERY = 4  # windows: descriptors, which take seven times as long as targets, are of one


# --- Pre-training ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class TranscriptionTargets:
    """Transcription targets of the windows of one split; ``mean, std`` of every descriptor over
    windows of the training split, float64 (descriptors,)."""

    shards: ShardSet
    performances: Performances
    mean: np.ndarray
    std: np.ndarray
    _rolls: dict[str, PianoRoll] = field(default_factory=dict)

    @classmethod
    def open(cls, directory: Path, train: ShardSet, n_frames: int) -> "TranscriptionTargets":
        """The targets of the training split of the data set in ``directory``, with windows of
        ``n_frames``; InputError if a recording has no performance."""
        performances, keys = open_performances(directory), Recordings(train).keys()
        require_performances(performances, keys, "train")
        counts = train.n_frames // n_frames
        ends = np.cumsum(counts)
        rows = []
        for window in np.linspace(0, ends[-1] - 1, min(256, ends[-1])).astype(int):
            recording = int(np.searchsorted(ends, window, side="right"))
            start = (window - (ends[recording] - counts[recording])) * n_frames
            rows.append(_described(performances, keys[recording], start, n_frames, train))
        std = np.nanstd(rows, axis=0)
        return cls(train, performances, np.nanmean(rows, axis=0), np.where(std > 1e-6, std, 1.0))

    def of(self, shards: ShardSet, split: str) -> "TranscriptionTargets":
        """The targets of another split, with the scale of this one; InputError if a recording has
        no performance."""
        require_performances(self.performances, Recordings(shards).keys(), split)
        return replace(self, shards=shards, _rolls={})

    @property
    def description(self) -> dict:
        """Names, means and standard deviations of the descriptors, saved with a model."""
        scale = {"mean": self.mean.tolist(), "std": self.std.tolist()}
        return {"names": list(WINDOW_FEATURES), **scale}

    def batch(self, keys: list[str], starts: list[int], n_frames: int) -> dict:
        """``targets``: `FrameTargets` of (batch, ...); ``descriptors`` float32 (batch,
        descriptors), standardised; NaN for a window without onsets, and in all but one of
        `DESCRIBE_EVERY` rows."""
        targets = []
        for key, start in zip(keys, starts):
            if key not in self._rolls:  # two threads may both compute it
                self._rolls[key] = PianoRoll(self.performances[key], self.shards.front_end)
            targets.append(self._rolls[key].frames(start, n_frames))
        descriptors = np.full((len(keys), len(WINDOW_FEATURES)), np.nan, np.float32)
        for row in range(0, len(keys), DESCRIBE_EVERY):
            values = _described(self.performances, keys[row], starts[row], n_frames, self.shards)
            # larger values are artefacts of short windows
            descriptors[row] = np.clip((values - self.mean) / self.std, -5, 5)
        return {"targets": FrameTargets(*map(np.stack, zip(*targets))), "descriptors": descriptors}


def _described(
    performances: Performances, key: str, start: int, n_frames: int, shards: ShardSet
) -> np.ndarray:
    """Descriptors of a window, float64 (descriptors,); NaN for a window without onsets."""
    begin, end = (shards.front_end.seconds(frame) for frame in (start, start + n_frames))
    window = excerpt(performances[key], begin, end)
    if window is None:
        return np.full(len(WINDOW_FEATURES), np.nan)
    return np.array(list(performance_features(window, WINDOW_FEATURES).values()))


@dataclass(frozen=True)
class PretrainBatches:
    """Windows of a split in random order, see `pretrain_batches`: ``batch(step)``, and the number
    of full batches per epoch; an epoch's remaining windows are dropped."""

    steps_per_epoch: int
    batch: Callable[[int], dict]

    def from_step(self, step: int, stop: int = sys.maxsize) -> grain.DatasetIterator:
        """Endless batches from ``step`` on, the same as in an uninterrupted run."""
        steps = grain.MapDataset.range(step, stop).map(self.batch)
        return iter(steps.to_iter_dataset(READ_OPTIONS))

    def one_epoch(self) -> grain.DatasetIterator:
        """The batches of the first epoch."""
        return self.from_step(0, self.steps_per_epoch)


def pretrain_batches(
    shards: ShardSet,
    *,
    n_frames: int,
    batch_size: int,
    seed: int,
    process: tuple[int, int] = (0, 1),
    targets: TranscriptionTargets | None = None,
) -> PretrainBatches:
    """Windows of ``n_frames`` as dicts: ``codes`` (batch, time, mel) as stored, and ``clip``, the
    source of each window; with ``targets`` also `TranscriptionTargets.batch`.

    Windows of a recording are contiguous, as many as fit for any start of the first one, which is
    drawn again in every epoch: windows do not overlap, and all alignments are equally likely.

    Args:
        process: index of this process and number of processes. Each process reads its own rows of
            every batch; stacked, the rows of all processes equal the batch of a single process.
        targets: of the same split, if any.

    Raises:
        InputError: a recording shorter than a window, fewer windows than one batch, or a batch size
            that is not a multiple of the number of processes; from the iterators: a damaged record.
    """
    number, count = process
    if batch_size % count:
        advice = f"Choose a multiple of {count}."
        raise InputError(f"batch size {batch_size} is not divisible by {count} processes. {advice}")
    if (shortest := shards.n_frames.min()) < n_frames:
        window = f"the model's window of {n_frames}"
        raise InputError(
            f"a recording of {shortest} frames is shorter than {window}. Use longer recordings."
        )
    recordings = Recordings(shards)
    counts = np.maximum(shards.n_frames // n_frames - 1, 1)
    n_windows = int(counts.sum())
    if n_windows < batch_size:
        windows = f"{n_windows} windows of {n_frames} frames"
        raise InputError(
            f"{windows} do not fill one batch of {batch_size}. Choose a smaller batch size."
        )
    steps_per_epoch = n_windows // batch_size
    recording_of = np.repeat(np.arange(len(counts)), counts)
    after_first = n_frames * (np.arange(n_windows) - np.repeat(np.cumsum(counts) - counts, counts))

    # Two epochs are in use when one ends while the next is prefetched.
    @functools.lru_cache(maxsize=2)
    def windows_of(epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Recording and first frame of every window, in the epoch's order."""
        rng = np.random.default_rng([seed, epoch])
        first = rng.integers(shards.n_frames - counts * n_frames, endpoint=True)
        order = rng.permutation(n_windows)
        recording = recording_of[order]
        return recording, first[recording] + after_first[order]

    def batch(step: int) -> dict:
        epoch, within = divmod(step, steps_per_epoch)
        begin = within * batch_size + number * batch_size // count
        rows = slice(begin, begin + batch_size // count)
        windows, starts = (column[rows].tolist() for column in windows_of(epoch))
        codes = np.empty((len(starts), n_frames, recordings.n_mels), recordings.dtype)
        keys = [recordings.read(*window) for window in zip(windows, starts, codes)]
        clip = [f"{key} from frame {start}" for key, start in zip(keys, starts)]
        more = targets.batch(keys, starts, n_frames) if targets else {}
        return {"codes": codes, "clip": clip, **more}

    return PretrainBatches(steps_per_epoch, batch)


# --- Fine-tuning ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class RatedClips:
    """Whole clips with their ratings (n, 19), in memory as uint8 (1,202 clips with two pianos: 0.5
    GB)."""

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


def clip_windows(
    clips: list[np.ndarray], *, n_frames: int, batch_size: int
) -> Iterator[dict[str, np.ndarray]]:
    """Cut every clip into windows, see `window_starts`, in batches: ``codes`` uint8 (batch, time,
    mel), ``n_valid`` int32 (batch,) valid frames, ``clip`` int32 (batch,) position in ``clips``, or
    -1 for padding rows of the last batch."""
    windows = [
        (number, start)
        for number, codes in enumerate(clips)
        for start in window_starts(len(codes), n_frames)
    ]
    for first in range(0, len(windows), batch_size):
        part = windows[first : first + batch_size]
        part += [(-1, 0)] * (batch_size - len(part))
        pieces = [clips[max(number, 0)][start : start + n_frames] for number, start in part]
        yield {
            "codes": np.stack([pad_window(piece, n_frames) for piece in pieces]),
            "n_valid": np.array([len(piece) for piece in pieces], np.int32),
            "clip": np.array([number for number, _ in part], np.int32),
        }


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
    batches per epoch.

    A clip has as many windows as at inference (`window_starts`), at most ``max_windows``. Each
    starts at random within its own part of the clip. Batches hold ``codes`` (batch, max_windows,
    time, mel) as stored, ``n_valid`` int32 (batch, max_windows) valid frames, 0 for windows that a
    clip lacks, and ``clip`` int32 (batch,), its position.

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
        for part in range(count):
            start = rng.integers(part * last // count, (part + 1) * last // count, endpoint=True)
            piece = codes[start : start + n_frames]
            pieces[part, : len(piece)], n_valid[part] = piece, len(piece)
        return {"codes": pieces, "n_valid": n_valid, "clip": np.int32(number)}

    dataset = grain.MapDataset.source(members.tolist()).seed(seed).shuffle().random_map(cut)
    dataset = dataset.batch(min(batch_size, len(members)), drop_remainder=True)
    return dataset, len(dataset)


def from_step(dataset: grain.MapDataset, step: int) -> Iterator:
    """Endless batches from ``step`` on, the same as in an uninterrupted run."""
    return iter(dataset.repeat()[step:].to_iter_dataset(READ_OPTIONS))
