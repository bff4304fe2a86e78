"""Variants of a clip: the same playing a little faster, higher, in a room, with noise, as further renderings in the shards.

A rendering of a variant is called by its synthesizer and the variant, ``fluidr3mono+room``. Where the playing is known as
MIDI it is changed there and rendered again, which leaves no trace; a recording of one's own is stretched and shifted by
librosa. What the rating makes of each change: `augment.ANSWERS`.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import librosa
import numpy as np

from percepiano_ast.audio.conditions import CONDITIONS
from percepiano_ast.config import choose
from percepiano_ast.performance import Performance
from percepiano_ast.variations import HIGHEST, LOWEST, PARAMETERS

SEPARATOR = "+"
_FASTER = 0.05  # of the tempo, at most, up or down
_HIGHER = 1  # semitones, at most, up or down


@dataclass(frozen=True)
class Variant:
    """One kind of variant. ``playing`` changes a performance, ``sound`` a wave; a variant of the playing has both.

    Attributes:
        playing: (performance, rng) -> performance, or None where only the sound changes.
        sound: (wave, sample_rate, rng) -> wave.
    """

    name: str
    playing: Callable[[Performance, np.random.Generator], Performance] | None
    sound: Callable[[np.ndarray, int, np.random.Generator], np.ndarray]


def _tempo(rng: np.random.Generator) -> float:
    """Share by which the tempo is faster."""
    return float(rng.uniform(-_FASTER, _FASTER))


def _stretched(performance: Performance, rng: np.random.Generator) -> Performance:
    return PARAMETERS["tempo"].change(performance, _tempo(rng), None)


def _transposed(performance: Performance, rng: np.random.Generator) -> Performance:
    """Up or down, where the keyboard ends in the direction that it allows."""
    pitch = performance.notes["pitch"].astype(int)
    steps = [step for step in (-_HIGHER, _HIGHER) if LOWEST <= pitch.min() + step and pitch.max() + step <= HIGHEST]
    return PARAMETERS["transposition"].change(performance, rng.choice(steps), None) if steps else performance


def _shifted(wave: np.ndarray, sample_rate: int, rng: np.random.Generator) -> np.ndarray:
    return librosa.effects.pitch_shift(wave, sr=sample_rate, n_steps=float(rng.choice((-_HIGHER, _HIGHER))))


def _one_of(kind: str):
    """A condition of that kind, drawn."""
    conditions = [condition for condition in CONDITIONS if condition.kind == kind]

    def sound(wave: np.ndarray, sample_rate: int, rng: np.random.Generator) -> np.ndarray:
        return conditions[rng.integers(len(conditions))].apply(wave, sample_rate, int(rng.integers(2**31)))

    return sound


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("stretch", _stretched, lambda wave, sample_rate, rng: librosa.effects.time_stretch(wave, rate=1 + _tempo(rng))),
        Variant("transpose", _transposed, _shifted),
        Variant("room", None, _one_of("room")),
        Variant("noise", None, _one_of("noise")),
    )
}


def named(synthesizer: str) -> tuple[str, Variant | None]:
    """The synthesizer and the variant of ``fluidr3mono+room``; no variant of a plain synthesizer.

    Raises:
        InputError: an unknown variant.
    """
    synthesizer, _, variant = synthesizer.partition(SEPARATOR)
    return synthesizer, choose(VARIANTS, variant, "variant") if variant else None


def rng_of(clip: str, variant: Variant, seed: int = 0) -> np.random.Generator:
    """What a clip's variant is drawn from: the same one with every piano."""
    return np.random.default_rng([seed, zlib.crc32(f"{clip} {variant.name}".encode())])


def pianos(synthesizers: np.ndarray) -> np.ndarray:
    """The synthesizer of each rendering, of a variant that of what it is a variant of, (n,)."""
    return np.array([name.split(SEPARATOR)[0] for name in synthesizers])


def plain(synthesizers: np.ndarray) -> np.ndarray:
    """Which renderings are no variants, bool (n,): what is held out is rated by them alone."""
    return np.array([SEPARATOR not in name for name in synthesizers], bool)
