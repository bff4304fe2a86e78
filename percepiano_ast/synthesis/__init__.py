"""Render MIDI to audio: a built-in piano, and FluidSynth with a soundfont.

Every synthesizer renders mono at a fixed gain, because loudness is a rated quality. The output
depends only on the performance, not on earlier renderings.
"""

from pathlib import Path
from typing import Protocol

import numpy as np

from percepiano_ast.config import lookup
from percepiano_ast.performance import Performance, read_midi, trimmed, write_midi
from percepiano_ast.synthesis import builtin, fluid, lengths
from percepiano_ast.synthesis.builtin import BuiltinPiano
from percepiano_ast.synthesis.fluid import SOUNDFONTS, FluidSynth, Soundfont
from percepiano_ast.synthesis.lengths import LONGEST, TAIL, check_length

__all__ = [
    "LONGEST",
    "SOUNDFONTS",
    "TAIL",
    "BuiltinPiano",
    "FluidSynth",
    "Performance",
    "Soundfont",
    "Synthesizer",
    "builtin",
    "check_length",
    "fluid",
    "lengths",
    "make_synthesizer",
    "read_midi",
    "trimmed",
    "write_midi",
]


class Synthesizer(Protocol):
    """Renders performances to audio."""

    name: str

    def render(self, performance: Performance, sample_rate: int = 22_050) -> np.ndarray:
        """Mono float32 ``(n,)`` at a fixed gain, from time zero to ``TAIL`` seconds after the last
        key release."""


def make_synthesizer(name: str) -> Synthesizer:
    """The synthesizer ``name``: ``builtin``, a name in ``SOUNDFONTS``, or a path to an .sf2 or .sf3
    file.

    Raises:
        InputError: unknown name, FluidSynth or the soundfont is not installed, or the soundfont is
            silent.
    """
    if name == BuiltinPiano.name:
        return BuiltinPiano()
    if Path(name).suffix.lower() not in (".sf2", ".sf3"):
        lookup({BuiltinPiano.name: None, **SOUNDFONTS}, name, "synthesizer")
    return FluidSynth(name)
