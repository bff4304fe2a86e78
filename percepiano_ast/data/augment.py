"""Augmentation: of batches while training (SpecAugment, mixup, level) and of clips while shards are made (variants).

Everything is a pure function of its seed and of the step or the clip, so a resumed run sees the same. A rating is a rating of
the playing, so each augmentation has to answer whether it survives: `ANSWERS`.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from percepiano_ast.config import InputError

_MIX = 10.0  # both parameters of the Beta distribution of mixup, as AST has it: mostly near a half

# Does the rating survive? Figures are shifts in standard deviations of a model's held-out ratings of clips that people played
# (PercePiano, ``content`` folds); nobody rated the changed clips. Playing: 65 MIDI statistics, 100 clips, `listen --model
# midi-stats --clips 100`. Sound: audio statistics that heard one piano, musescore-small, 40 clips of `listening.run.sample`;
# where a change that a listener sees through leads them astray, it belongs into training.
ANSWERS = {
    "specaugment": ("Yes, as far as what is left tells it: nothing is changed, something is hidden. Not measured."),
    "mixup": (
        "By construction: the rating of two at once is taken to be the mean of theirs. Nobody rated two pianists at once; "
        "it regularises. Not measured."
    ),
    "gain": (
        "Not by itself: at fixed gain level tells force. 12 dB more move mellow-raw and energy by 1.4, soft-hard by 1.3; "
        "10 velocities more move energy by .6. Only for a model that shall be deaf to the recording's level."
    ),
    "stretch": (
        "Nearly, up to 5 %: at 10 % pace moves by .14, energy by .12, soft-loud by .11, all others by less than .1; at 25 "
        "% pace by .37 and energy by .31. So 5 % is drawn at most."
    ),
    "transpose": (
        "Nearly, up to a semitone: at 2 semitones bright-dark moves by .17, optimistic-dark by .13, all others by less "
        "than .1; at 5 by .43 and .34. So one is drawn at most."
    ),
    "soundfont": (
        "Yes for a listener, who hears the playing through the piano; the statistics do not: fluidr3mono moves them by 1 "
        "and more in 16 dimensions, even-colorful by 4.1."
    ),
    "room": (
        "All but pedal: 1.2 s of reverberation move clean-blurred by 1.0, dry-wet by .8, dynamic range by .7, all others "
        "by .5 at most; a listener too may take it for pedal."
    ),
    "noise": (
        "Yes for a listener; the statistics are led astray: 40 dB below the clip it moves even-colorful by 1.3, pure- "
        "dramatic by 1.2, timing by 1.1."
    ),
}


@dataclass(frozen=True)
class Augmentation:
    """What happens to batches. The defaults do nothing; `AST` is what AST's recipe has.

    Attributes:
        mel_width: bands that a mask hides at most (SpecAugment, Park et al. 2019; one mask, as in AST).
        time_width: frames that a mask hides at most (likewise).
        mixup: share of windows that are mixed with another of the batch.
        gain_db: level is moved by so much at most, up or down.
    """

    mel_width: int = 0
    time_width: int = 0
    mixup: float = 0.0
    gain_db: float = 0.0

    def __post_init__(self) -> None:
        if self.mel_width < 0 or self.time_width < 0 or self.gain_db < 0:
            raise InputError(f"{self}: widths and gain are 0 or more.")
        if not 0 <= self.mixup <= 1:
            raise InputError(f"mixup is {self.mixup:g}; it is the share of windows that are mixed, from 0 to 1.")


# Gong et al. (2021), section 3.1 and egs/audioset/run.sh: masks of 48 bands and 192 of 1,024 frames, half of the clips mixed.
AST = Augmentation(mel_width=48, time_width=192, mixup=0.5)


def augmented(
    batches: Callable[[int], Iterable[dict]], config: Augmentation, seed: int, step_db: float = 0.5
) -> Callable[[int], Iterator[dict]]:
    """``batches`` with ``config`` applied: called with a step, it yields the batches of that step, the next one, ...

    Args:
        batches: such as ``functools.partial(batches.from_step, dataset)``: ``batches(k)`` yields the batch of step k first.
            Batches have ``codes`` uint8 (batch, time, mel) or (batch, windows, time, mel) and ``n_valid`` (batch,) or (batch,
            windows); what else they hold passes unchanged. Mixup adds ``mixed_with`` int32 (batch,), the row that a clip was
            mixed with, and ``share`` float32 (batch,), its own part, so that whoever holds its targets mixes them alike;
            ``ratings`` (batch, dimensions) in the batch are mixed here.
        seed: of all draws; those of a step depend on seed and step alone.
        step_db: decibels of one code, see `FrontEnd`.
    """

    def from_step(step: int) -> Iterator[dict]:
        for number, batch in enumerate(batches(step), step):
            yield augment(batch, config, np.random.default_rng([seed, number]), step_db)

    return from_step


def augment(batch: dict, config: Augmentation, rng: np.random.Generator, step_db: float = 0.5) -> dict:
    """One batch, see `augmented`: mixed, then louder or softer, then masked; the one given is left as it is."""
    batch = dict(batch)
    # All draws are made whatever the configuration, so that one augmentation's do not depend on another's being on.
    mixing, levels, masks = rng.spawn(3)
    if config.mixup:
        batch |= _mixed(batch, config.mixup, mixing)
    if config.gain_db:
        batch["codes"] = _moved(batch["codes"], config.gain_db / step_db, levels)
    if config.mel_width or config.time_width:
        batch["codes"] = _masked(batch["codes"], batch["n_valid"], config, masks)
    return batch


def _mixed(batch: dict, share: float, rng: np.random.Generator) -> dict:
    """Mixup of log-mel levels and ratings (Zhang et al. 2018; on log-mel as in PANNs, Kong et al. 2020, section IV-B).

    All windows of a clip are mixed with those of one other, and frames that only one of the two has are valid no more.
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
    found = {"codes": mixed, "n_valid": valid, "mixed_with": other.astype(np.int32), "share": weight}
    if "ratings" in batch:
        ratings, weight = batch["ratings"], weight[:, None]
        found["ratings"] = (weight * ratings + (1 - weight) * ratings[other]).astype(ratings.dtype)
    return found


def _moved(codes: np.ndarray, most: float, rng: np.random.Generator) -> np.ndarray:
    """Every clip louder or softer by a number of codes of its own; what is at the floor stays there, as padding does."""
    shift = np.rint(rng.uniform(-most, most, len(codes))).astype(np.int16).reshape(-1, *[1] * (codes.ndim - 1))
    return np.where(codes > 0, np.clip(codes.astype(np.int16) + shift, 0, 255), 0).astype(np.uint8)


def _masked(codes: np.ndarray, n_valid: np.ndarray, config: Augmentation, rng: np.random.Generator) -> np.ndarray:
    """One band and one stretch of time of each window at the window's mean level (about 0 to the model, as in SpecAugment)."""
    codes = codes.copy()
    for window, length in zip(codes.reshape(-1, *codes.shape[-2:]), n_valid.ravel().tolist(), strict=True):
        heard = window[:length]  # padding is masked out by the model already
        mean = np.rint(heard.mean()) if length else 0
        for axis, most in ((1, config.mel_width), (0, config.time_width)):
            extent = heard.shape[axis]
            width = int(rng.integers(min(most, extent) + 1))
            first = int(rng.integers(extent - width + 1))
            hidden = [slice(None), slice(None)]
            hidden[axis] = slice(first, first + width)
            heard[tuple(hidden)] = mean
    return codes
