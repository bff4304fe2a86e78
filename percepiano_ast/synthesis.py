"""MIDI to audio: a small piano of our own, and FluidSynth with a soundfont.

Every synthesizer renders mono at a fixed gain, because loudness is a rated quality, and its output depends on the
performance alone, never on what was rendered before.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import scipy.signal

from percepiano_ast.config import InputError, choose
from percepiano_ast.performance import SUSTAIN, UNA_CORDA, Performance, read_midi, trimmed, write_midi

__all__ = [
    "SOUNDFONTS",
    "TAIL",
    "BuiltinPiano",
    "FluidSynth",
    "Performance",
    "Soundfont",
    "Synthesizer",
    "make_synthesizer",
    "read_midi",
    "trimmed",
    "write_midi",
]

TAIL = 1.5  # seconds rendered after the last key release
_FADE = 0.05  # seconds at the very end, so that a pedalled last chord is not cut with a click


class Synthesizer(Protocol):
    """Anything that turns a performance into sound."""

    name: str

    def render(self, performance: Performance, sample_rate: int = 22_050) -> np.ndarray:
        """Mono float32 ``(n,)`` at a fixed gain, from time zero to ``TAIL`` seconds after the last key release."""


def make_synthesizer(name: str) -> Synthesizer:
    """The synthesizer called ``name``: ``builtin``, a name in ``SOUNDFONTS``, or a path to an .sf2 or .sf3 file.

    Raises:
        InputError: unknown name, or FluidSynth or the soundfont is not installed.
    """
    if name == BuiltinPiano.name:
        return BuiltinPiano()
    if Path(name).suffix.lower() not in (".sf2", ".sf3"):
        choose({BuiltinPiano.name: None, **SOUNDFONTS}, name, "synthesizer")
    return FluidSynth(name)


def _n_samples(performance: Performance, sample_rate: int) -> int:
    """Samples of a rendering."""
    return int(np.ceil((performance.duration + TAIL) * sample_rate))


def _faded(wave: np.ndarray, sample_rate: int) -> np.ndarray:
    """``wave`` with a linear fade over its last ``_FADE`` seconds, in place."""
    fade = round(_FADE * sample_rate)
    wave[-fade:] *= np.linspace(1, 0, fade, dtype=np.float32)
    return wave


# --- The built-in piano -----------------------------------------------------------------------------------------------

_BLOCK = 256  # samples per row when a string's partials are summed as one matrix product
_LONGEST = 8.0  # seconds that a string is kept for
_LEVEL = 0.14  # of one note at velocity 127; the loudest of the 100 clips named at GAIN peaks at .78 of full scale
_TOP_DAMPER = 88  # MIDI pitch of the highest string with a damper (E6), as on most grands
_ROOM, _RESONANCE = 0.05, 0.12  # share of the sound that excites room and, with the dampers up, the other strings


class BuiltinPiano:
    """A small additive piano in numpy, for demonstrations and tests where no soundfont is installed.

    Inharmonic partials with two-stage decay, level and brightness by velocity, decay by register, dampers with half
    pedal (a controller value between 32 and 88 damps in part), una corda (softer and darker), hammer noise, a short
    room, and string resonance while the dampers are up. Sostenuto (controller 66) is not modelled.

    Args:
        seed: draws phases, hammer noise and room: another seed is another instrument of the same make.
    """

    name = "builtin"

    def __init__(self, seed: int = 0):
        self.seed = seed

    def render(self, performance: Performance, sample_rate: int = 22_050) -> np.ndarray:
        """Mono float32 ``(n,)``; see ``Synthesizer.render``."""
        n = _n_samples(performance, sample_rate)
        lift = np.clip((_controller(performance, SUSTAIN, n, sample_rate) - 32) / (88 - 32), 0, 1)
        contact = np.cumsum((1 - lift) ** 2, dtype=np.float64) / sample_rate  # seconds of full damper contact so far
        soft = _controller(performance, UNA_CORDA, n, sample_rate) / 127
        dry = np.zeros(n, dtype=np.float32)
        starts = np.round(performance.notes["onset"] * sample_rate).astype(int)
        releases = np.round(performance.notes["offset"] * sample_rate).astype(int)
        stops = _next_strokes(performance.notes["pitch"], starts, n)
        for note, start, release, stop in zip(performance.notes, starts, releases, stops, strict=True):
            string = _string(int(note["pitch"]), sample_rate, self.seed)
            weights = _touch(note["velocity"] / 127, soft[start])
            rate = 0.0 if note["pitch"] > _TOP_DAMPER else 30.0 + 0.5 * note["pitch"]
            _strike(dry, string, weights, contact, rate, start, release, stop)
        excitation = dry * (_ROOM + _RESONANCE * lift)
        wet = scipy.signal.oaconvolve(excitation, _room(sample_rate, self.seed))[:n]
        return _faded(dry + wet, sample_rate)


def _controller(performance: Performance, number: int, n: int, sample_rate: int) -> np.ndarray:
    """Value of one controller at every sample, float32 ``(n,)``; zero before its first event."""
    events = performance.pedals[performance.pedals["number"] == number]
    edges = np.clip(np.round(events["time"] * sample_rate).astype(int), 0, n)
    lengths = np.diff(np.concatenate([[0], edges, [n]]))
    return np.repeat(np.concatenate([[0], events["value"]]).astype(np.float32), lengths)


def _next_strokes(pitches: np.ndarray, starts: np.ndarray, n: int) -> np.ndarray:
    """Sample at which each note's string is struck again, or ``n``. Notes come sorted by onset."""
    stops, upcoming = np.full(len(starts), n), {}
    for i in range(len(starts) - 1, -1, -1):
        stops[i] = upcoming.get(pitches[i], n)
        upcoming[pitches[i]] = starts[i]
    return stops


def _touch(velocity: float, soft: float) -> np.ndarray:
    """Weights float32 (2,) of the soft and the hard hammer's sound for a velocity and a soft pedal, both 0 to 1."""
    level = _LEVEL * velocity**1.7 * (1 - 0.2 * soft)
    hardness = velocity**1.3 * (1 - 0.4 * soft)
    return np.array([level * (1 - hardness), level * hardness], dtype=np.float32)


def _strike(dry, string, weights, contact, rate, start, release, stop) -> None:
    """Add one note to ``dry`` in place.

    After ``release`` the string decays by ``exp(-rate * damper contact)``, which covers up, down and half pedal alike.
    """
    length = min(string.shape[1], stop - start)
    if rate:
        silent = np.searchsorted(contact, contact[release] + 9 / rate)  # 78 dB down
        length = min(length, silent - start)
    sound = weights @ string[:, :length]
    if start + length > release:
        damped = contact[release : start + length] - contact[release]
        sound[release - start :] *= np.exp((-rate * damped).astype(np.float32))
    if length == stop - start:  # the hammer meets a string that still moves: hand over without a click
        fade = min(length, 64)
        sound[length - fade :] *= np.linspace(1, 0, fade, dtype=np.float32)
    dry[start : start + length] += sound


@functools.lru_cache(maxsize=256)
def _string(pitch: int, sample_rate: int, seed: int) -> np.ndarray:
    """An undamped string struck by a soft and by a hard hammer, float32 (2, n), each of unit initial energy.

    Partials ``f_n = n f_0 sqrt(1 + B n^2)`` with B over the keyboard as fitted by Rigaud et al. (2011), "A parametric
    model of piano tuning", eq. 9. Each decays in two stages (prompt sound and slightly detuned aftersound).
    """
    rng = np.random.default_rng((seed, pitch))
    f0 = 440 * 2 ** ((pitch - 69) / 12)
    stiffness = np.exp(0.0926 * pitch - 13.64) + np.exp(-0.0847 * pitch - 5.82)
    order = np.arange(1, 61)
    frequency = order * f0 * np.sqrt(1 + stiffness * order**2)
    order, frequency = (values[frequency < 0.45 * sample_rate] for values in (order, frequency))
    comb = 0.1 + np.abs(np.sin(np.pi * order / 8))  # the hammer strikes at an eighth of the string
    spectra = np.stack([order**-1.3 * np.exp(-frequency / 600), order**-0.7 * np.exp(-frequency / 2500)]) * comb
    spectra /= np.linalg.norm(spectra, axis=1, keepdims=True)

    t60 = min(14.0, 12 * 2 ** ((40 - pitch) / 16))
    decay = np.log(1000) / t60 * (1 + 0.12 * (order - 1))
    exponent = np.concatenate([-1.6 * decay + 2j * np.pi * frequency, -0.5 * decay + 2j * np.pi * 1.0004 * frequency])
    phases = np.exp(2j * np.pi * rng.random(len(order)))
    amplitudes = np.concatenate([0.85 * spectra * phases, 0.15 * spectra * phases], axis=1)

    # exp(s (b K + k)) = exp(s b K) exp(s k): the sum over partials of all samples is one matrix product.
    blocks = int(min(_LONGEST, t60) * sample_rate) // _BLOCK
    rows = np.exp(np.outer(np.arange(blocks) * _BLOCK / sample_rate, exponent))
    columns = amplitudes[:, :, None] * np.exp(np.outer(exponent, np.arange(_BLOCK) / sample_rate))
    sound = (rows.astype(np.complex64) @ columns.astype(np.complex64)).real.reshape(2, -1)
    return _struck(sound, sample_rate, rng)


def _struck(sound: np.ndarray, sample_rate: int, rng: np.random.Generator) -> np.ndarray:
    """Give the string ``(2, n)`` its attack, its hammer noise and an end without a click."""
    time = np.arange(sound.shape[1]) / sample_rate
    noise = scipy.signal.lfilter([0.3], [1, -0.7], rng.standard_normal(sound.shape[1])) * np.exp(-time / 0.012)
    sound = sound * np.minimum(1, time / np.array([[0.004], [0.0015]]))
    sound += np.array([[0.04], [0.15]]) * noise
    sound *= np.minimum(1, (time[-1] - time) / 0.3)
    return sound.astype(np.float32)


@functools.lru_cache(maxsize=4)
def _room(sample_rate: int, seed: int) -> np.ndarray:
    """Impulse response float32 of room and soundboard: one second of decaying noise of unit energy."""
    time = np.arange(sample_rate) / sample_rate
    noise = np.random.default_rng((seed, 128)).standard_normal(sample_rate) * np.exp(-time / 0.18)
    noise = scipy.signal.lfilter([0.5], [1, -0.5], noise)
    return (noise / np.linalg.norm(noise)).astype(np.float32)


# --- FluidSynth -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Soundfont:
    """A General MIDI soundfont that Debian and Ubuntu package.

    ``velocity_timbre`` tells whether its piano gets brighter with velocity (measured with FluidSynth 2.3.1) or only
    louder, in which case its renderings carry no timbre of touch.
    """

    package: str
    files: tuple[str, ...]
    licence: str
    velocity_timbre: bool


SOUNDFONTS = {
    "timgm6mb": Soundfont("timgm6mb-soundfont", ("TimGM6mb.sf2",), "GPL-2", False),
    "fluidr3mono": Soundfont("fluidr3mono-gm-soundfont", ("FluidR3Mono_GM.sf3",), "MIT", False),
    "musescore-small": Soundfont("musescore-general-soundfont-small", ("MuseScore_General_Lite.sf3",), "MIT", True),
}

_FOLDERS = ("/usr/share/sounds/sf2", "/usr/share/sounds/sf3", "/usr/share/soundfonts")
_FLUID_BLOCK = 64  # samples: FluidSynth starts events on its own blocks of this size (2.9 ms at 22,050 Hz)
# One gain for all. Of 100 PercePiano clips, 60 of them chosen for the most force in a tenth of a second, the loudest
# peaks at .66 (fluidr3mono), .70 (musescore-small) and .71 (timgm6mb) of full scale.
GAIN = 1.0

# Everything that shapes the sound is set here, so that another FluidSynth's defaults cannot change it.
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


class FluidSynth:
    """FluidSynth with the piano (bank 0, program 0) of a soundfont.

    FluidSynth switches the sustain pedal at controller value 64 (no half pedal) and has no una corda.

    A rendering never depends on the ones before it. ``fluid_synth_system_reset`` does not give that: after it, the same
    clip came out up to 6 % of its peak different (FluidSynth 2.3.1). So every clip gets a fresh synthesizer, and one
    that stays open per process and soundfont keeps the samples in FluidSynth's cache, so that a fresh one costs 10 to
    40 ms. Instances hold a path alone, so they pickle, and each process opens its own.

    Args:
        soundfont: a name in ``SOUNDFONTS`` or a path to an .sf2 or .sf3 file.

    Raises:
        InputError: FluidSynth or the soundfont is not installed, or the file is no soundfont with a piano.
    """

    def __init__(self, soundfont: str | Path):
        self.path = _find_soundfont(str(soundfont))
        self.name = str(soundfont) if str(soundfont) in SOUNDFONTS else self.path.stem
        _resident(self.path, 22_050)

    def render(self, performance: Performance, sample_rate: int = 22_050) -> np.ndarray:
        """Mono ``.5 * (left + right)`` float32 ``(n,)``; see ``Synthesizer.render``."""
        _resident(self.path, sample_rate)
        n = _n_samples(performance, sample_rate)
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
        return _faded(0.5 * (stereo[0, :n] + stereo[1, :n]), sample_rate)


def _fluidsynth():
    """The pyfluidsynth module.

    Raises:
        InputError: the library or its Python binding is not installed.
    """
    try:
        import fluidsynth  # here, because it fails on machines without the system library
    except ImportError as error:
        raise InputError(
            f"FluidSynth is not installed ({error}). Run: sudo apt-get install -y fluidsynth && "
            "pip install pyfluidsynth - or choose the synthesizer 'builtin', which needs neither."
        ) from error
    return fluidsynth


def _find_soundfont(soundfont: str) -> Path:
    """Path of a soundfont given by name or path."""
    if Path(soundfont).suffix.lower() in (".sf2", ".sf3"):
        if not Path(soundfont).is_file():
            raise InputError(f"soundfont {soundfont}: no such file. Give a path that exists or one of: {_names()}.")
        return Path(soundfont)
    known = choose(SOUNDFONTS, soundfont, "soundfont")
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
    """A fresh ``fluidsynth.Synth`` with the soundfont's piano on channel 0."""
    synth = _fluidsynth().Synth(gain=GAIN, samplerate=sample_rate, channels=16, **_FLUID_SETTINGS)
    font = synth.sfload(str(path))
    if font == -1 or synth.program_select(0, font, 0, 0) == -1:
        synth.delete()
        raise InputError(f"{path}: not a soundfont with a piano at bank 0, program 0. Choose one of: {_names()}.")
    return synth


@functools.cache
def _resident(path: Path, sample_rate: int):
    """A synthesizer that is never played: while it is open, FluidSynth keeps the soundfont's samples in memory."""
    return _open(path, sample_rate)


def _events(performance: Performance, sample_rate: int) -> list[tuple[int, tuple]]:
    """(block, call on the synthesizer) in order of time; within a block releases, then pedals, then strokes."""

    def block(seconds):
        return np.round(seconds * sample_rate / _FLUID_BLOCK).astype(int)

    notes, pedals = performance.notes, performance.pedals
    starts = block(notes["onset"])
    ends = np.maximum(block(notes["offset"]), starts + 1)  # a note never ends in the block that strikes it
    pitches, velocities = notes["pitch"].tolist(), notes["velocity"].tolist()
    events = [(end, 0, ("noteoff", pitch)) for end, pitch in zip(ends.tolist(), pitches, strict=True)]
    events += [
        (time, 1, ("cc", number, value))
        for time, (_, number, value) in zip(block(pedals["time"]).tolist(), pedals.tolist(), strict=True)
    ]
    events += [
        (start, 2, ("noteon", pitch, velocity))
        for start, pitch, velocity in zip(starts.tolist(), pitches, velocities, strict=True)
    ]
    events.sort(key=lambda event: event[:2])  # stable: pedals of one block keep their order
    return [(time, send) for time, _, send in events]


@functools.cache
def _write_float():
    """``fluid_synth_write_float``, which pyfluidsynth does not wrap: 16-bit output would be dithered and clipped."""
    from ctypes import c_int, c_void_p

    left, right = ([(f"{side}out", c_void_p, 1), (f"{side}off", c_int, 1), (f"{side}incr", c_int, 1)] for side in "lr")
    synth = ("synth", c_void_p, 1)
    return _fluidsynth().cfunc("fluid_synth_write_float", c_int, synth, ("len", c_int, 1), *left, *right)


def _write(synth, stereo: np.ndarray, start: int, stop: int) -> None:
    """Render blocks ``start`` to ``stop`` into ``stereo`` float32 (2, n), in place."""
    stop = min(stop, stereo.shape[1] // _FLUID_BLOCK)
    if stop > start:
        left, right = (channel.ctypes.data for channel in stereo)
        offset = start * _FLUID_BLOCK
        _write_float()(synth.synth, (stop - start) * _FLUID_BLOCK, left, offset, 1, right, offset, 1)
