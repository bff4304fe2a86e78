"""Augmentation of batches during fine-tuning: mixup, level and SpecAugment. ``docs/data.md`` states
whether the ratings stay valid."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from percepiano_ast.errors import InputError


@dataclass(frozen=True)
class Augmentation:
    """Augmentation of batches. The defaults change nothing; `AST` is AST's recipe.

    Attributes:
        mel_width, time_width: maximum width of the frequency mask in bands and of the time mask in
            frames (SpecAugment, Park et al. 2019; one mask each, as in AST).
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
            raise InputError(f"mixup is {self.mixup:g}. Give a share of windows from 0 to 1.")


# Gong et al. (2021), section 3.1 and egs/audioset/run.sh: masks of 48 bands and 192 of 1,024
# frames, half of the clips mixed.
AST = Augmentation(mel_width=48, time_width=192, mixup=0.5)


def augmented(
    batches: Callable[[int], Iterable[dict]], config: Augmentation, seed: int, step_db: float = 0.5
) -> Callable[[int], Iterator[dict]]:
    """``batches`` with ``config`` applied; ``batches(k)`` and the result start with the batch of
    step k. The draws of a step depend only on seed and step, so that a resumed run is the same.

    Args:
        batches: with ``codes`` uint8 (batch, ..., time, mel) and ``n_valid`` (batch, ...). Mixup
            mixes ``ratings`` (batch, dimensions), if any, and adds ``mixed_with`` int32 (batch,),
            the row that a clip was mixed with, and ``share`` float32 (batch,), the clip's own
            weight, to mix targets that are stored elsewhere.
        step_db: decibels per code, see `FrontEnd`.
    """

    def from_step(step: int) -> Iterator[dict]:
        for number, batch in enumerate(batches(step), step):
            yield augment(batch, config, np.random.default_rng([seed, number]), step_db)

    return from_step


def augment(
    batch: dict, config: Augmentation, rng: np.random.Generator, step_db: float = 0.5
) -> dict:
    """Augment one batch, see `augmented`; the input is not modified."""
    codes, n_valid, n = batch["codes"], batch["n_valid"], len(batch["codes"])
    batch = dict(batch)
    # One generator per augmentation: the draws of each do not depend on which others are enabled.
    mixing, levels, masks = rng.spawn(3)

    # --- Mixup (Zhang et al. 2018) of log-mel levels, as in PANNs (Kong et al. 2020, section IV-B).
    # All windows of a clip are mixed with those of one other clip; frames that only one of the two
    # has become invalid.
    if config.mixup:
        other = mixing.permutation(n)
        # both parameters of the Beta distribution as in AST: mostly near a half
        drawn = mixing.random(n) < config.mixup, mixing.beta(10, 10, n)
        weight = np.where(*drawn, 1).astype(np.float32)
        given, lengths, codes, n_valid = codes, n_valid, codes.copy(), n_valid.copy()
        for row in np.flatnonzero(weight < 1):
            mixed = weight[row] * given[row].astype(np.float32)
            mixed += (1 - weight[row]) * given[other[row]]
            n_valid[row] = np.minimum(lengths[row], lengths[other[row]])
            valid = np.arange(codes.shape[-2]) < n_valid[row, ..., None]
            codes[row] = np.where(valid[..., None], np.rint(mixed), 0)
        batch |= {"n_valid": n_valid, "mixed_with": other.astype(np.int32), "share": weight}
        if "ratings" in batch:
            ratings, weight = batch["ratings"], weight[:, None]
            mean = weight * ratings + (1 - weight) * ratings[other]
            batch["ratings"] = mean.astype(ratings.dtype)

    # --- Level of each clip; values at code 0, and so padding, stay
    if config.gain_db:
        most = config.gain_db / step_db
        shift = np.rint(levels.uniform(-most, most, n)).astype(np.int16)
        moved = codes.astype(np.int16) + shift.reshape(-1, *[1] * (codes.ndim - 1))
        codes = np.where(codes > 0, np.clip(moved, 0, 255), 0).astype(np.uint8)

    # --- One band and one time span of each window at its mean level (about 0 in the model's input)
    if config.mel_width or config.time_width:
        codes = codes.copy()
        for window, length in zip(codes.reshape(-1, *codes.shape[-2:]), n_valid.ravel().tolist()):
            valid = window[:length]  # the model masks padding itself
            mean = np.rint(valid.mean()) if length else 0
            for part, most in ((valid.T, config.mel_width), (valid, config.time_width)):
                width = int(masks.integers(min(most, len(part)) + 1))
                first = int(masks.integers(len(part) - width + 1))
                part[first : first + width] = mean
    return batch | {"codes": codes}
