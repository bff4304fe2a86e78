"""Augmentation of batches during fine-tuning: SpecAugment, mixup and level.

Each augmentation is a pure function of seed and step, so a resumed run draws the same values.
Whether the ratings stay valid is stated in ``docs/data.md``.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from percepiano_ast.errors import InputError

_MIX = 10.0  # both parameters of mixup's Beta distribution, as in AST: mostly near a half


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of batches. The defaults change nothing; `AST` is AST's recipe.

    Attributes:
        mel_width: maximum width of the frequency mask in bands (SpecAugment, Park et al. 2019; one
            mask, as in AST).
        time_width: maximum width of the time mask in frames (likewise).
        mixup: share of windows that are mixed with another window of the batch.
        gain_db: maximum level change in dB, up or down.
    """

    mel_width: int = 0
    time_width: int = 0
    mixup: float = 0.0
    gain_db: float = 0.0

    def __post_init__(self) -> None:
        if self.mel_width < 0 or self.time_width < 0 or self.gain_db < 0:
            raise InputError(f"{self}: mask widths and gain must be 0 or more.")
        if not 0 <= self.mixup <= 1:
            raise InputError(
                f"mixup is {self.mixup:g}. Give the share of windows to mix, from 0 to 1."
            )


# Gong et al. (2021), section 3.1 and egs/audioset/run.sh: masks of 48 bands and 192 of 1,024
# frames, half of the clips mixed.
AST = Augmentation(mel_width=48, time_width=192, mixup=0.5)


def augmented(
    batches: Callable[[int], Iterable[dict]], config: Augmentation, seed: int, step_db: float = 0.5
) -> Callable[[int], Iterator[dict]]:
    """``batches`` with ``config`` applied; the result takes a step and yields batches from that
    step on.

    Args:
        batches: such as ``functools.partial(batches.from_step, dataset)``: ``batches(k)`` starts
            with the batch of step k. Batches have ``codes`` uint8 (batch, time, mel) or (batch,
            windows, time, mel) and ``n_valid`` (batch,) or (batch, windows); other entries pass
            unchanged. Mixup adds ``mixed_with`` int32 (batch,), the row that a clip was mixed with,
            and ``share`` float32 (batch,), the clip's own weight, so that targets stored elsewhere
            can be mixed in the same way; ``ratings`` (batch, dimensions) in the batch are mixed
            here.
        seed: of all draws; the draws of a step depend only on seed and step.
        step_db: decibels per code, see `FrontEnd`.
    """

    def from_step(step: int) -> Iterator[dict]:
        for number, batch in enumerate(batches(step), step):
            yield augment(batch, config, np.random.default_rng([seed, number]), step_db)

    return from_step


def augment(
    batch: dict, config: Augmentation, rng: np.random.Generator, step_db: float = 0.5
) -> dict:
    """Augment one batch, see `augmented`: mixup, then gain, then masks; the input is not
    modified."""
    batch = dict(batch)
    # One generator per augmentation: the draws of each do not depend on which others are enabled.
    mixing, levels, masks = rng.spawn(3)
    if config.mixup:
        batch |= _mixed(batch, config.mixup, mixing)
    if config.gain_db:
        batch["codes"] = _moved(batch["codes"], config.gain_db / step_db, levels)
    if config.mel_width or config.time_width:
        batch["codes"] = _masked(batch["codes"], batch["n_valid"], config, masks)
    return batch


def _mixed(batch: dict, share: float, rng: np.random.Generator) -> dict:
    """Mixup of log-mel levels and ratings (Zhang et al. 2018; on log-mel as in PANNs, Kong et al.
    2020, section IV-B).

    All windows of a clip are mixed with those of one other clip. Frames that only one of the two
    has become invalid.
    """
    codes, n_valid, n = batch["codes"], batch["n_valid"], len(batch["codes"])
    other = rng.permutation(n)
    weight = np.where(rng.random(n) < share, rng.beta(_MIX, _MIX, n), 1).astype(np.float32)
    mixed, valid = codes.copy(), n_valid.copy()
    for row in np.flatnonzero(weight < 1):
        levels = weight[row] * codes[row].astype(np.float32) + (1 - weight[row]) * codes[other[row]]
        valid[row] = np.minimum(n_valid[row], n_valid[other[row]])
        heard = np.arange(codes.shape[-2]) < valid[row, ..., None]
        mixed[row] = np.where(heard[..., None], np.rint(levels), 0)
    found = {
        "codes": mixed,
        "n_valid": valid,
        "mixed_with": other.astype(np.int32),
        "share": weight,
    }
    if "ratings" in batch:
        ratings, weight = batch["ratings"], weight[:, None]
        found["ratings"] = (weight * ratings + (1 - weight) * ratings[other]).astype(ratings.dtype)
    return found


def _moved(codes: np.ndarray, most: float, rng: np.random.Generator) -> np.ndarray:
    """Shift each clip's level by a random number of codes; values at code 0, and so padding,
    stay."""
    shift = (
        np.rint(rng.uniform(-most, most, len(codes)))
        .astype(np.int16)
        .reshape(-1, *[1] * (codes.ndim - 1))
    )
    return np.where(codes > 0, np.clip(codes.astype(np.int16) + shift, 0, 255), 0).astype(np.uint8)


def _masked(
    codes: np.ndarray, n_valid: np.ndarray, config: Augmentation, rng: np.random.Generator
) -> np.ndarray:
    """Set one band and one time span of each window to its mean level (about 0 in the model's
    input, as in SpecAugment)."""
    codes = codes.copy()
    for window, length in zip(
        codes.reshape(-1, *codes.shape[-2:]), n_valid.ravel().tolist(), strict=True
    ):
        heard = window[:length]  # the model masks padding itself
        mean = np.rint(heard.mean()) if length else 0
        for axis, most in ((1, config.mel_width), (0, config.time_width)):
            extent = heard.shape[axis]
            width = int(rng.integers(min(most, extent) + 1))
            first = int(rng.integers(extent - width + 1))
            hidden = [slice(None), slice(None)]
            hidden[axis] = slice(first, first + width)
            heard[tuple(hidden)] = mean
    return codes
