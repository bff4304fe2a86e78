"""Variants of a clip as further renderings in the shards: the same performance slightly faster,
transposed, in a room, or with noise.

A variant is named by synthesizer and variant, ``fluidr3mono+room``. If the MIDI is known, it is
changed and rendered again, without artefacts; custom recordings are stretched and shifted by
librosa. `augment.ANSWERS` states the effect of each change on the ratings.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import librosa
import numpy as np

from percepiano_ast.audio.conditions import CONDITIONS, HELD_OUT_ROOM
from percepiano_ast.config import lookup
from percepiano_ast.music.edits import HIGHEST, LOWEST, PARAMETERS
from percepiano_ast.music.midi import Performance

SEPARATOR = "+"
_FASTER = 0.05  # maximum tempo change as a share, up or down
_HIGHER = 1  # maximum transposition in semitones, up or down


@dataclass(frozen=True)
class Variant:
    """One kind of variant. ``playing`` changes a performance, ``sound`` a wave; variants of the
    performance have both.

    Attributes:
        playing: (performance, rng) -> performance, or None if only the sound changes.
        sound: (wave, sample_rate, rng) -> wave.
    """

    name: str
    playing: Callable[[Performance, np.random.Generator], Performance] | None
    sound: Callable[[np.ndarray, int, np.random.Generator], np.ndarray]


def _tempo(rng: np.random.Generator) -> float:
    """Relative tempo change."""
    return float(rng.uniform(-_FASTER, _FASTER))


def _stretched(performance: Performance, rng: np.random.Generator) -> Performance:
    return PARAMETERS["tempo"].change(performance, _tempo(rng), None)


def _transposed(performance: Performance, rng: np.random.Generator) -> Performance:
    """Up or down at random; near the ends of the keyboard only in the possible direction."""
    pitch = performance.notes["pitch"].astype(int)
    steps = [
        step
        for step in (-_HIGHER, _HIGHER)
        if LOWEST <= pitch.min() + step and pitch.max() + step <= HIGHEST
    ]
    return (
        PARAMETERS["transposition"].change(performance, rng.choice(steps), None)
        if steps
        else performance
    )


def _shifted(wave: np.ndarray, sample_rate: int, rng: np.random.Generator) -> np.ndarray:
    return librosa.effects.pitch_shift(
        wave, sr=sample_rate, n_steps=float(rng.choice((-_HIGHER, _HIGHER)))
    )


def _one_of(kind: str):
    """Apply a random condition of that kind."""
    conditions = [condition for condition in CONDITIONS if condition.kind == kind]

    def sound(wave: np.ndarray, sample_rate: int, rng: np.random.Generator) -> np.ndarray:
        return conditions[rng.integers(len(conditions))].apply(
            wave, sample_rate, int(rng.integers(2**31))
        )

    return sound


VARIANTS = {
    variant.name: variant
    for variant in (
        Variant(
            "stretch",
            _stretched,
            lambda wave, sample_rate, rng: librosa.effects.time_stretch(wave, rate=1 + _tempo(rng)),
        ),
        Variant("transpose", _transposed, _shifted),
        Variant("room", None, _one_of("room")),
        Variant(
            "livingroom",
            None,
            lambda wave, rate, rng: HELD_OUT_ROOM.apply(wave, rate, int(rng.integers(2**31))),
        ),
        Variant("noise", None, _one_of("noise")),
    )
}


def named(synthesizer: str) -> tuple[str, Variant | None]:
    """Split ``fluidr3mono+room`` into synthesizer and variant; the variant is None for a plain
    synthesizer.

    Raises:
        InputError: an unknown variant.
    """
    synthesizer, _, variant = synthesizer.partition(SEPARATOR)
    return synthesizer, lookup(VARIANTS, variant, "variant") if variant else None


def rng_of(clip: str, variant: Variant, seed: int = 0) -> np.random.Generator:
    """Random generator of a clip's variant, the same for every piano."""
    return np.random.default_rng([seed, zlib.crc32(f"{clip} {variant.name}".encode())])


def pianos(synthesizers: np.ndarray) -> np.ndarray:
    """The synthesizer of each rendering, without the variant, (n,)."""
    return np.array([name.split(SEPARATOR)[0] for name in synthesizers])


def plain(synthesizers: np.ndarray) -> np.ndarray:
    """Mask of renderings without a variant, bool (n,): held-out clips are rated on these alone."""
    return np.array([SEPARATOR not in name for name in synthesizers], bool)
