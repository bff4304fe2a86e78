"""Transcription targets of pre-training windows: note and pedal targets per frame, descriptors per
window."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from percepiano_ast.data.performances import Performances, open_performances, require_all
from percepiano_ast.data.records import Recordings
from percepiano_ast.data.shards import ShardSet
from percepiano_ast.music.midi import excerpt
from percepiano_ast.music.performance_features import WINDOW_FEATURES, performance_features
from percepiano_ast.music.piano_roll import FrameTargets, PianoRoll

# Descriptors take seven times as long as targets: they are computed for one window in this many,
# the others have NaN.
DESCRIBE_EVERY = 4
# standard deviations: descriptors are clipped here, larger values are artefacts of short windows
FURTHEST = 5.0
_SCALE_WINDOWS = 256


class Scale(NamedTuple):
    """Mean and standard deviation of every descriptor over windows of the training split, float64
    (descriptors,)."""

    mean: np.ndarray
    std: np.ndarray


@dataclass(frozen=True)
class Hearing:
    """Transcription targets of the windows of one split.

    Attributes:
        scale: of the training split, used for all splits.
    """

    shards: ShardSet
    performances: Performances
    scale: Scale
    _rolls: dict[str, PianoRoll] = field(default_factory=dict)

    @classmethod
    def open(cls, directory: Path, train: ShardSet, n_frames: int) -> "Hearing":
        """Open the targets of the training split of the data set in ``directory``, with windows of
        ``n_frames``.

        Raises:
            InputError: no performances, or a recording without one.
        """
        performances = open_performances(directory)
        keys = Recordings(train).keys()
        require_all(performances, keys, "train")
        ends = np.cumsum(train.n_frames // n_frames)
        rows = []
        for place in np.linspace(0, ends[-1] - 1, min(_SCALE_WINDOWS, ends[-1])).astype(int):
            recording = int(np.searchsorted(ends, place, side="right"))
            number = place - (ends[recording] - train.n_frames[recording] // n_frames)
            rows.append(
                _described(performances, keys[recording], number * n_frames, n_frames, train)
            )
        values = np.array(rows)
        deviation = np.nanstd(values, axis=0)
        scale = Scale(np.nanmean(values, axis=0), np.where(deviation > 1e-6, deviation, 1.0))
        return cls(train, performances, scale)

    def of(self, shards: ShardSet, split: str) -> "Hearing":
        """The targets of another split, with the scale of this one.

        Raises:
            InputError: a recording without a performance.
        """
        require_all(self.performances, Recordings(shards).keys(), split)
        return replace(self, shards=shards, _rolls={})

    @property
    def description(self) -> dict:
        """Metadata of the predicted descriptors, saved with a model: names, mean, std."""
        return {
            "names": list(WINDOW_FEATURES),
            "mean": self.scale.mean.tolist(),
            "std": self.scale.std.tolist(),
        }

    def batch(self, keys: list[str], starts: list[int], n_frames: int) -> dict:
        """``targets``: `FrameTargets` of (batch, ...); ``descriptors`` float32
        (batch, descriptors), standardised.

        A row of ``descriptors`` is NaN for a window without onsets, and in all but one of
        `DESCRIBE_EVERY` rows.
        """
        targets = [self._roll(key).frames(start, n_frames) for key, start in zip(keys, starts)]
        descriptors = np.full((len(keys), len(WINDOW_FEATURES)), np.nan, np.float32)
        for row in range(0, len(keys), DESCRIBE_EVERY):
            values = _described(self.performances, keys[row], starts[row], n_frames, self.shards)
            descriptors[row] = np.clip(
                (values - self.scale.mean) / self.scale.std, -FURTHEST, FURTHEST
            )
        return {"targets": FrameTargets(*map(np.stack, zip(*targets))), "descriptors": descriptors}

    def _roll(self, key: str) -> PianoRoll:
        if key not in self._rolls:  # two threads may both compute it
            self._rolls[key] = PianoRoll(self.performances[key], self.shards.front_end)
        return self._rolls[key]


def _described(
    performances: Performances, key: str, start: int, n_frames: int, shards: ShardSet
) -> np.ndarray:
    """Descriptors of a window, float64 (descriptors,); NaN for a window without onsets."""
    begin, end = (shards.front_end.seconds(frame) for frame in (start, start + n_frames))
    window = excerpt(performances[key], begin, end)
    return (
        np.full(len(WINDOW_FEATURES), np.nan)
        if window is None
        else np.array(list(performance_features(window, WINDOW_FEATURES).values()))
    )
