"""Renderings of MIDI: FluidSynth with a soundfont, a piano in numpy, and a cache.

Every synthesizer renders mono at a fixed gain, because loudness is a rated quality. The output
depends only on the performance, not on earlier renderings.
"""

import ctypes
import functools
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.signal
import soundfile

from percepiano_ast import audio
from percepiano_ast.config import lookup
from percepiano_ast.errors import InputError
from percepiano_ast.files import TimeLeft, atomic, process_map, sha256_of
from percepiano_ast.music.midi import NOTE, PEDAL, SUSTAIN, UNA_CORDA, Performance, next_onsets

TAIL = 1.5  # seconds rendered after the last key release
LONGEST = 3600.0  # seconds; more indicates a wrong tempo or a stray event
_FADE = 0.05  # seconds at the end, to avoid a click if the last chord is pedalled

logger = logging.getLogger(__name__)


def make_synthesizer(name: str) -> "BuiltinPiano | FluidSynth":
    """The synthesizer ``builtin``, or see `FluidSynth`."""
    if name == BuiltinPiano.name:
        return BuiltinPiano()
    if Path(name).suffix.lower() not in (".sf2", ".sf3"):
        lookup({BuiltinPiano.name: None, **SOUNDFONTS}, name, "synthesizer")
    return FluidSynth(name)


def n_samples(performance: Performance, sample_rate: int) -> int:
    """Number of samples of a rendering."""
    return int(np.ceil((performance.duration + TAIL) * sample_rate))


def check_length(performance: Performance, name: str) -> None:
    """Raise an `InputError` for ``name`` if the performance has more than ``LONGEST`` seconds."""
    if performance.duration > LONGEST:
        raise InputError(
            f"{name}: {performance.duration / 3600:.1f} h long; the limit is {LONGEST / 3600:g} h."
            " Check its tempo, and remove stray notes at its end."
        )


def _faded(wave: np.ndarray, sample_rate: int) -> np.ndarray:
    """``wave`` with a linear fade over its last ``_FADE`` seconds, in place."""
    fade = round(_FADE * sample_rate)
    wave[-fade:] *= np.linspace(1, 0, fade, dtype=np.float32)
    return wave


# --- A piano in numpy -----------------------------------------------------------------------------

_BLOCK = 256  # samples per row when a string's partials are summed as one matrix product
_STRING_SECONDS = 8.0  # maximum length of a string's sound
# of one note at velocity 127; the loudest of the 100 clips described at GAIN peaks at 0.78
_LEVEL = 0.14
_TOP_DAMPER = 88  # MIDI pitch of the highest string with a damper (E6), as on most grands
_ROOM, _RESONANCE = 0.05, 0.12  # share of the sound that excites the room, undamped strings


class BuiltinPiano:
    """A small additive piano in numpy, for demonstrations and tests without a soundfont; another
    ``seed`` is another instrument of the same model.

    Inharmonic partials with two-stage decay, velocity-dependent level and brightness,
    register-dependent decay, dampers with half pedal (controller values 32 to 88), una corda
    (softer and darker), hammer noise, a short room, and string resonance while the dampers are
    raised. Sostenuto is not modelled.
    """

    name = "builtin"

    def __init__(self, seed: int = 0):
        self.seed = seed

    def render(self, performance: Performance, sample_rate: int = 22_050) -> np.ndarray:
        """Mono float32 ``(n,)``, from time zero to ``TAIL`` seconds after the last key release."""
        n, notes = n_samples(performance, sample_rate), performance.notes
        lift = np.clip((_controller(performance, SUSTAIN, n, sample_rate) - 32) / (88 - 32), 0, 1)
        # seconds of full damper contact so far
        contact = np.cumsum((1 - lift) ** 2, dtype=np.float64) / sample_rate
        soft = _controller(performance, UNA_CORDA, n, sample_rate) / 127
        starts = np.round(notes["onset"] * sample_rate).astype(int)
        releases = np.round(notes["offset"] * sample_rate).astype(int)
        again = next_onsets(notes, np.inf) * sample_rate  # the string is struck again
        stops = np.minimum(np.round(again), n).astype(int)

        dry = np.zeros(n, dtype=np.float32)
        for note, start, release, stop in zip(notes, starts, releases, stops, strict=True):
            # weights of the sounds of a soft and of a hard hammer
            velocity = note["velocity"] / 127
            level = _LEVEL * velocity**1.7 * (1 - 0.2 * soft[start])
            hardness = velocity**1.3 * (1 - 0.4 * soft[start])
            weights = np.array([level * (1 - hardness), level * hardness], dtype=np.float32)
            string = _string(int(note["pitch"]), sample_rate, self.seed)
            length = min(string.shape[1], stop - start)
            # After its release a string decays by exp(-rate * damper contact).
            rate = 0.0 if note["pitch"] > _TOP_DAMPER else 30.0 + 0.5 * note["pitch"]
            if rate:
                silent = np.searchsorted(contact, contact[release] + 9 / rate)  # 78 dB down
                length = min(length, silent - start)
            sound = weights @ string[:, :length]
            if start + length > release:
                damped = contact[release : start + length] - contact[release]
                sound[release - start :] *= np.exp((-rate * damped).astype(np.float32))
            # the string is struck again while it sounds: fade out to avoid a click
            if length == stop - start:
                fade = min(length, 64)
                sound[length - fade :] *= np.linspace(1, 0, fade, dtype=np.float32)
            dry[start : start + length] += sound
        excitation = dry * (_ROOM + _RESONANCE * lift)
        wet = scipy.signal.oaconvolve(excitation, _room(sample_rate, self.seed))[:n]
        return _faded(dry + wet, sample_rate)


def _controller(performance: Performance, number: int, n: int, sample_rate: int) -> np.ndarray:
    """Value of a controller at every sample, float32 ``(n,)``; zero before its first event."""
    events = performance.pedal(number)
    edges = np.clip(np.round(events["time"] * sample_rate).astype(int), 0, n)
    lengths = np.diff(np.concatenate([[0], edges, [n]]))
    return np.repeat(np.concatenate([[0], events["value"]]).astype(np.float32), lengths)


@functools.lru_cache(maxsize=256)
def _string(pitch: int, sample_rate: int, seed: int) -> np.ndarray:
    """An undamped string struck by a soft and by a hard hammer, float32 (2, n), each of unit
    initial energy.

    Partials ``f_n = n f_0 sqrt(1 + B n^2)`` with B as fitted by Rigaud et al. (2011), "A parametric
    model of piano tuning", eq. 9. Each decays in two stages (prompt sound and detuned aftersound).
    """
    rng = np.random.default_rng((seed, pitch))
    f0 = 440 * 2 ** ((pitch - 69) / 12)
    stiffness = np.exp(0.0926 * pitch - 13.64) + np.exp(-0.0847 * pitch - 5.82)
    order = np.arange(1, 61)
    frequency = order * f0 * np.sqrt(1 + stiffness * order**2)
    order, frequency = (values[frequency < 0.45 * sample_rate] for values in (order, frequency))
    comb = 0.1 + np.abs(np.sin(np.pi * order / 8))  # the hammer strikes at an eighth of the string
    soft = order**-1.3 * np.exp(-frequency / 600)
    hard = order**-0.7 * np.exp(-frequency / 2500)
    spectra = np.stack([soft, hard]) * comb
    spectra /= np.linalg.norm(spectra, axis=1, keepdims=True)

    t60 = min(14.0, 12 * 2 ** ((40 - pitch) / 16))
    decay = np.log(1000) / t60 * (1 + 0.12 * (order - 1))
    exponent = np.concatenate(
        [-1.6 * decay + 2j * np.pi * frequency, -0.5 * decay + 2j * np.pi * 1.0004 * frequency]
    )
    phases = np.exp(2j * np.pi * rng.random(len(order)))
    amplitudes = np.concatenate([0.85 * spectra * phases, 0.15 * spectra * phases], axis=1)

    # exp(s (b K + k)) = exp(s b K) exp(s k): the sum over partials for all samples is one matrix
    # product.
    blocks = int(min(_STRING_SECONDS, t60) * sample_rate) // _BLOCK
    rows = np.exp(np.outer(np.arange(blocks) * _BLOCK / sample_rate, exponent))
    columns = amplitudes[:, :, None] * np.exp(np.outer(exponent, np.arange(_BLOCK) / sample_rate))
    sound = (rows.astype(np.complex64) @ columns.astype(np.complex64)).real.reshape(2, -1)

    # Attack, hammer noise and a final fade
    time = np.arange(sound.shape[1]) / sample_rate
    noise = scipy.signal.lfilter([0.3], [1, -0.7], rng.standard_normal(sound.shape[1]))
    noise *= np.exp(-time / 0.012)
    sound = sound * np.minimum(1, time / np.array([[0.004], [0.0015]]))
    sound += np.array([[0.04], [0.15]]) * noise
    sound *= np.minimum(1, (time[-1] - time) / 0.3)
    return sound.astype(np.float32)


@functools.lru_cache(maxsize=4)
def _room(sample_rate: int, seed: int) -> np.ndarray:
    """Impulse response of room and soundboard: one second of decaying noise of unit energy."""
    time = np.arange(sample_rate) / sample_rate
    noise = np.random.default_rng((seed, 128)).standard_normal(sample_rate) * np.exp(-time / 0.18)
    noise = scipy.signal.lfilter([0.5], [1, -0.5], noise)
    return (noise / np.linalg.norm(noise)).astype(np.float32)


# --- FluidSynth -----------------------------------------------------------------------------------


class Soundfont(NamedTuple):
    """A General MIDI soundfont packaged by Debian and Ubuntu, and whether its piano gets brighter,
    not only louder, with velocity (measured with FluidSynth 2.3.1)."""

    package: str
    file: str
    licence: str
    velocity_timbre: bool


SOUNDFONTS = {
    "timgm6mb": Soundfont("timgm6mb-soundfont", "TimGM6mb.sf2", "GPL-2", False),
    "fluidr3mono": Soundfont("fluidr3mono-gm-soundfont", "FluidR3Mono_GM.sf3", "MIT", False),
    "musescore-small": Soundfont(
        "musescore-general-soundfont-small", "MuseScore_General_Lite.sf3", "MIT", True
    ),
}

_FOLDERS = ("/usr/share/sounds/sf2", "/usr/share/sounds/sf3", "/usr/share/soundfonts")
_FLUID_BLOCK = 64  # samples to which FluidSynth quantises events (2.9 ms at 22,050 Hz)
# The same gain for all soundfonts. The loudest of 100 PercePiano clips, 60 of them chosen for the
# highest sum of velocities within 0.1 s, peaks at 0.66 (fluidr3mono), 0.70 (musescore-small) and
# 0.71 (timgm6mb) of full scale.
GAIN = 1.0

# All settings that affect the sound are explicit: defaults differ between FluidSynth versions.
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

_CHORD = np.array([(0.0, 0.2, pitch, 80) for pitch in (36, 60, 84)], NOTE)  # must be audible


class FluidSynth:
    """FluidSynth with the piano (bank 0, program 0) of a soundfont: a name in ``SOUNDFONTS`` or a
    path to an .sf2 or .sf3 file. It has no half pedal and no una corda.

    Every clip uses a new synthesizer, so that renderings are independent of earlier ones: after
    ``fluid_synth_system_reset`` the same clip differed by up to 6 % of its peak (FluidSynth 2.3.1).
    Instances store only a path, so they can be pickled.

    Raises:
        InputError: FluidSynth or the soundfont is not installed, the file is not a soundfont with a
            piano, or the piano is silent.
    """

    def __init__(self, soundfont: str | Path):
        name, names = str(soundfont), ", ".join(SOUNDFONTS)
        if Path(name).suffix.lower() in (".sf2", ".sf3"):
            self.name, self.path = Path(name).stem, Path(name)
            if not self.path.is_file():
                raise InputError(
                    f"soundfont {name}: no such file. Give an existing path or one of: {names}."
                )
        else:
            known = lookup(SOUNDFONTS, name, "soundfont")
            paths = [Path(folder, known.file) for folder in _FOLDERS]
            if not (found := [path for path in paths if path.is_file()]):
                raise InputError(
                    f"soundfont {name!r} is not installed: no {known.file} in"
                    f" {', '.join(_FOLDERS)}. Run: sudo apt-get install -y {known.package}"
                )
            self.name, self.path = name, found[0]
        _keep_loaded(self.path, 22_050)
        peak = np.abs(self.render(Performance(_CHORD, np.zeros(0, PEDAL)))).max()
        if peak < 10 ** (audio.SILENCE_DB / 20):
            raise InputError(
                f"{self.path}: the soundfont's piano is silent. Choose another one: {names}."
            )

    def render(self, performance: Performance, sample_rate: int = 22_050) -> np.ndarray:
        """Mono ``0.5 * (left + right)``, see `BuiltinPiano.render`."""
        _keep_loaded(self.path, sample_rate)
        n = n_samples(performance, sample_rate)
        blocks = -(-n // _FLUID_BLOCK)
        stereo = np.zeros((2, blocks * _FLUID_BLOCK), dtype=np.float32)
        left, right = (channel.ctypes.data for channel in stereo)

        def block(seconds: np.ndarray) -> list[int]:
            return np.round(seconds * sample_rate / _FLUID_BLOCK).astype(int).tolist()

        # (block, order, method and arguments): in a block releases, then pedals, then strokes; a
        # note never ends in the block of its onset
        notes, pedals = performance.notes, performance.pedals
        events: list[tuple[int, int, tuple]] = [(blocks, 3, ())]
        spans = zip(block(notes["onset"]), block(notes["offset"]), strict=True)
        for (start, end), (_, _, key, velocity) in zip(spans, notes.tolist(), strict=True):
            events.append((max(end, start + 1), 0, ("noteoff", key)))
            events.append((start, 2, ("noteon", key, velocity)))
        for at, (_, number, value) in zip(block(pedals["time"]), pedals.tolist(), strict=True):
            events.append((at, 1, ("cc", number, value)))
        synth, done = _open(self.path, sample_rate), 0
        try:
            # a stable sort: pedal events of one block keep their order
            for at, _, call in sorted(events, key=lambda event: event[:2]):
                if (size := min(at, blocks) - done) > 0:
                    ends = [(side, done * _FLUID_BLOCK, 1) for side in (left, right)]
                    _write_float()(synth.synth, size * _FLUID_BLOCK, *ends[0], *ends[1])
                    done += size
                if call:
                    getattr(synth, call[0])(0, *call[1:])
        finally:
            synth.delete()
        return _faded(0.5 * (stereo[0, :n] + stereo[1, :n]), sample_rate)


def _open(path: Path, sample_rate: int):
    """A new ``fluidsynth.Synth`` with the soundfont's piano on channel 0."""
    try:
        from fluidsynth import Synth  # imported here: it fails without the system library
    except ImportError as error:
        raise InputError(
            f"FluidSynth is not installed ({error}). Run: sudo apt-get install -y fluidsynth && pip"
            " install pyfluidsynth - or choose the synthesizer 'builtin', which does not need it."
        ) from error
    synth = Synth(gain=GAIN, samplerate=sample_rate, channels=16, **_FLUID_SETTINGS)
    font = synth.sfload(str(path))
    if font == -1 or synth.program_select(0, font, 0, 0) == -1:
        synth.delete()
        raise InputError(
            f"{path}: not a soundfont with a piano at bank 0, program 0. Choose one of:"
            f" {', '.join(SOUNDFONTS)}."
        )
    return synth


# one stays open, so that FluidSynth keeps the samples: others then open in 10 to 40 ms
_keep_loaded = functools.cache(_open)


@functools.cache
def _write_float():
    """``fluid_synth_write_float``, which pyfluidsynth does not wrap: 16-bit output would be
    dithered and clipped."""
    from fluidsynth import cfunc

    channel = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]  # buffer, offset, increment
    kinds = [ctypes.c_void_p, ctypes.c_int, *channel, *channel]  # synthesizer, samples, left, right
    arguments = [(f"argument_{i}", kind, 1) for i, kind in enumerate(kinds)]
    return cfunc("fluid_synth_write_float", ctypes.c_int, *arguments)


# --- Cached renderings ----------------------------------------------------------------------------

_HEADROOM = 2.0  # files are scaled by its inverse: louder variants may exceed full scale
_SUBTYPE = "PCM_24"
_FEW = 8  # up to this many renderings, starting worker processes takes longer

_synthesizer = functools.cache(make_synthesizer)  # a soundfont takes seconds to load


class RenderCache:
    """Renderings by one synthesizer (see `make_synthesizer`), cached as 24-bit FLAC files in
    ``folder`` (16 bits would change the log-mel codes of soft passages).

    A file is named after the hash of all inputs of the rendering (notes, pedals, soundfont,
    sampling rate, rendering code), so the cache is never stale, and an interrupted run resumes.
    """

    def __init__(self, folder: str | Path, synthesizer: str, sample_rate: int):
        self.folder, self.synthesizer, self.sample_rate = Path(folder), synthesizer, sample_rate
        piano = _synthesizer(synthesizer)
        font = [piano.path] if isinstance(piano, FluidSynth) else []
        code = sha256_of(*font, Path(__file__))
        self.key = sha256_of(f"{synthesizer} {sample_rate} {_SUBTYPE} {code}")

    def path(self, performance: Performance) -> Path:
        """Path of a performance's rendering, whether or not it exists."""
        name = sha256_of(self.key, performance.notes, performance.pedals)[:32]
        return self.folder / f"{name}.flac"

    def prepare(self, performances: Iterable[Performance], workers: int) -> None:
        """Render the missing ones with ``workers`` processes; raises as `wave`."""
        paths = {self.path(performance): performance for performance in performances}
        todo = [item for item in paths.items() if not item[0].exists()]
        if not todo:
            return
        logger.info(f"{self.synthesizer}: rendering {len(todo):,} performances")
        render = functools.partial(_render, self.synthesizer, self.sample_rate)
        left = TimeLeft(len(todo))
        workers = 1 if len(todo) <= _FEW else workers
        for count, _ in enumerate(process_map(render, todo, workers, chunksize=_FEW), 1):
            left(count)

    def wave(self, performance: Performance, name: str = "this performance") -> np.ndarray:
        """The rendering float32 (n,), full scale at 1; it is made if missing.

        Raises:
            InputError: longer than an hour, silent throughout, or louder than twice full scale,
                with ``name`` in the message; or a damaged file.
        """
        path = self.path(performance)
        if not path.exists():
            _render(self.synthesizer, self.sample_rate, (path, performance), name)
        try:
            return soundfile.read(path, dtype="float32")[0] * np.float32(_HEADROOM)
        except soundfile.LibsndfileError as error:
            raise InputError(
                f"{path} is damaged ({error}). Delete it and run again to render it again."
            ) from error


def _render(
    synthesizer: str, rate: int, item: tuple[Path, Performance], name: str = "this performance"
) -> None:
    path, performance = item
    check_length(performance, name)
    wave = _synthesizer(synthesizer).render(performance, rate)
    audio.check_waveform(wave, rate, f"{name} rendered by {synthesizer}")
    if (peak := np.abs(wave).max()) >= _HEADROOM:
        raise InputError(
            f"{synthesizer} renders {name} at {peak:.1f} times full scale; the limit is"
            f" {_HEADROOM:g}. Exclude clips with so many notes at full force."
        )
    with atomic(path, unique=True) as partial:  # two processes may render the same clip
        soundfile.write(partial, wave / _HEADROOM, rate, format="FLAC", subtype=_SUBTYPE)


def wave_level(wave: np.ndarray) -> dict[str, float]:
    """Level of a wave float (n,): ``level_db`` and ``peak_db`` re full scale, and ``over``, the
    samples beyond full scale."""
    magnitude = np.abs(wave)

    def db(value: float) -> float:
        return round(float(20 * np.log10(max(value, 1e-10))), 2)

    level = db(np.sqrt(np.mean(magnitude**2)))
    return {"level_db": level, "peak_db": db(magnitude.max()), "over": int((magnitude > 1).sum())}
