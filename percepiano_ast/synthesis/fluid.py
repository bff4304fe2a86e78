"""FluidSynth with a General MIDI soundfont."""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from percepiano_ast.audio import SILENCE_DB
from percepiano_ast.config import lookup
from percepiano_ast.errors import InputError
from percepiano_ast.performance import NOTE, PEDAL, Performance
from percepiano_ast.synthesis.lengths import faded, n_samples


@dataclass(frozen=True)
class Soundfont:
    """A General MIDI soundfont packaged by Debian and Ubuntu.

    ``velocity_timbre``: whether its piano gets brighter with velocity (measured with FluidSynth
    2.3.1). If it only gets louder, playing force does not change the timbre of its renderings.
    """

    package: str
    files: tuple[str, ...]
    licence: str
    velocity_timbre: bool


SOUNDFONTS = {
    "timgm6mb": Soundfont("timgm6mb-soundfont", ("TimGM6mb.sf2",), "GPL-2", False),
    "fluidr3mono": Soundfont("fluidr3mono-gm-soundfont", ("FluidR3Mono_GM.sf3",), "MIT", False),
    "musescore-small": Soundfont(
        "musescore-general-soundfont-small", ("MuseScore_General_Lite.sf3",), "MIT", True
    ),
}

_FOLDERS = ("/usr/share/sounds/sf2", "/usr/share/sounds/sf3", "/usr/share/soundfonts")
# samples: FluidSynth quantises events to its blocks of this size (2.9 ms at 22,050 Hz)
_FLUID_BLOCK = 64
# The same gain for all soundfonts. The loudest of 100 PercePiano clips, 60 of them chosen for the
# highest sum of velocities within 0.1 s, peaks at 0.66 (fluidr3mono), 0.70 (musescore-small) and
# 0.71 (timgm6mb) of full scale.
GAIN = 1.0

# All settings that affect the sound are explicit, so that the defaults of other FluidSynth versions
# have no effect.
_FLUID_SETTINGS = {
    "synth.chorus.active": 0,
    "synth.reverb.active": 1,
    "synth.reverb.room-size": 0.2,
    "synth.reverb.damp": 0.0,
    "synth.reverb.width": 0.5,
    "synth.reverb.level": 0.9,
    "synth.polyphony": 256,
    "synth.cpu-cores": 1,
}


# A chord in the middle of the keyboard, to test that a soundfont sounds.
_TRIAL = Performance(
    np.array([(0.0, 0.2, pitch, 80) for pitch in (36, 60, 84)], NOTE), np.zeros(0, PEDAL)
)


class FluidSynth:
    """FluidSynth with the piano (bank 0, program 0) of a soundfont.

    FluidSynth switches the sustain pedal at controller value 64 (no half pedal) and has no una
    corda.

    Renderings are independent of earlier ones. ``fluid_synth_system_reset`` does not ensure that:
    after it, the same clip differed by up to 6 % of its peak (FluidSynth 2.3.1). Therefore every
    clip uses a new synthesizer. Another one stays open per process and soundfont and keeps the
    samples in FluidSynth's cache, so a new one takes 10 to 40 ms. Instances store only a path, so
    they can be pickled, and each process opens its own synthesizer.

    Args:
        soundfont: a name in ``SOUNDFONTS`` or a path to an .sf2 or .sf3 file.

    Raises:
        InputError: FluidSynth or the soundfont is not installed, the file is not a soundfont with a
            piano, or the piano is silent.
    """

    def __init__(self, soundfont: str | Path):
        self.path = _find_soundfont(str(soundfont))
        self.name = str(soundfont) if str(soundfont) in SOUNDFONTS else self.path.stem
        _resident(self.path, 22_050)
        if np.abs(self.render(_TRIAL)).max() < 10 ** (SILENCE_DB / 20):
            raise InputError(
                f"{self.path}: the soundfont's piano is silent. Choose another one, such as:"
                f" {_names()}."
            )

    def render(self, performance: Performance, sample_rate: int = 22_050) -> np.ndarray:
        """Mono ``0.5 * (left + right)`` float32 ``(n,)``; see ``Synthesizer.render``."""
        _resident(self.path, sample_rate)
        n = n_samples(performance, sample_rate)
        blocks = -(-n // _FLUID_BLOCK)
        stereo = np.zeros((2, blocks * _FLUID_BLOCK), dtype=np.float32)
        synth = _open(self.path, sample_rate)
        try:
            done = 0
            for block, send in _events(performance, sample_rate):
                _write(synth, stereo, done, block)
                getattr(synth, send[0])(0, *send[1:])
                done = block
            _write(synth, stereo, done, blocks)
        finally:
            synth.delete()
        return faded(0.5 * (stereo[0, :n] + stereo[1, :n]), sample_rate)


def _fluidsynth():
    """The pyfluidsynth module.

    Raises:
        InputError: the library or its Python binding is not installed.
    """
    try:
        import fluidsynth  # imported here: it fails on machines without the system library
    except ImportError as error:
        raise InputError(
            f"FluidSynth is not installed ({error}). Run: sudo apt-get install -y fluidsynth && pip"
            " install pyfluidsynth - or choose the synthesizer 'builtin', which does not need it."
        ) from error
    return fluidsynth


def _find_soundfont(soundfont: str) -> Path:
    """Path of a soundfont given by name or path."""
    if Path(soundfont).suffix.lower() in (".sf2", ".sf3"):
        if not Path(soundfont).is_file():
            raise InputError(
                f"soundfont {soundfont}: no such file. Give an existing path or one of: {_names()}."
            )
        return Path(soundfont)
    known = lookup(SOUNDFONTS, soundfont, "soundfont")
    for path in (Path(folder, file) for folder in _FOLDERS for file in known.files):
        if path.is_file():
            return path
    raise InputError(
        f"soundfont {soundfont!r} is not installed: no {known.files[0]} in {', '.join(_FOLDERS)}. "
        f"Run: sudo apt-get install -y {known.package}"
    )


def _names() -> str:
    return ", ".join(SOUNDFONTS)


def _open(path: Path, sample_rate: int):
    """A new ``fluidsynth.Synth`` with the soundfont's piano on channel 0."""
    synth = _fluidsynth().Synth(gain=GAIN, samplerate=sample_rate, channels=16, **_FLUID_SETTINGS)
    font = synth.sfload(str(path))
    if font == -1 or synth.program_select(0, font, 0, 0) == -1:
        synth.delete()
        raise InputError(
            f"{path}: not a soundfont with a piano at bank 0, program 0. Choose one of: {_names()}."
        )
    return synth


@functools.cache
def _resident(path: Path, sample_rate: int):
    """A synthesizer that only keeps the soundfont's samples in FluidSynth's cache."""
    return _open(path, sample_rate)


def _events(performance: Performance, sample_rate: int) -> list[tuple[int, tuple]]:
    """(block, synthesizer call) in order of time; within a block releases, then pedals, then
    note-ons."""

    def block(seconds):
        return np.round(seconds * sample_rate / _FLUID_BLOCK).astype(int)

    notes, pedals = performance.notes, performance.pedals
    starts = block(notes["onset"])
    # a note never ends in the block of its onset
    ends = np.maximum(block(notes["offset"]), starts + 1)
    pitches, velocities = notes["pitch"].tolist(), notes["velocity"].tolist()
    events: list[tuple[int, int, tuple]] = [
        (end, 0, ("noteoff", pitch)) for end, pitch in zip(ends.tolist(), pitches, strict=True)
    ]
    events += [
        (time, 1, ("cc", number, value))
        for time, (_, number, value) in zip(
            block(pedals["time"]).tolist(), pedals.tolist(), strict=True
        )
    ]
    events += [
        (start, 2, ("noteon", pitch, velocity))
        for start, pitch, velocity in zip(starts.tolist(), pitches, velocities, strict=True)
    ]
    events.sort(key=lambda event: event[:2])  # stable: pedal events of one block keep their order
    return [(time, send) for time, _, send in events]


@functools.cache
def _write_float():
    """``fluid_synth_write_float``, which pyfluidsynth does not wrap: 16-bit output would be
    dithered and clipped."""
    from ctypes import c_int, c_void_p

    left, right = (
        [(f"{side}out", c_void_p, 1), (f"{side}off", c_int, 1), (f"{side}incr", c_int, 1)]
        for side in "lr"
    )
    synth = ("synth", c_void_p, 1)
    return _fluidsynth().cfunc(
        "fluid_synth_write_float", c_int, synth, ("len", c_int, 1), *left, *right
    )


def _write(synth, stereo: np.ndarray, start: int, stop: int) -> None:
    """Render blocks ``start`` to ``stop`` into ``stereo`` float32 (2, n), in place."""
    stop = min(stop, stereo.shape[1] // _FLUID_BLOCK)
    if stop > start:
        left, right = (channel.ctypes.data for channel in stereo)
        offset = start * _FLUID_BLOCK
        _write_float()(
            synth.synth, (stop - start) * _FLUID_BLOCK, left, offset, 1, right, offset, 1
        )
