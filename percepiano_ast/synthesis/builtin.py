"""A small piano in numpy, for demonstrations and tests."""

import functools

import numpy as np
import scipy.signal

from percepiano_ast.performance import SUSTAIN, UNA_CORDA, Performance
from percepiano_ast.synthesis.lengths import faded, n_samples

_BLOCK = 256  # samples per row when a string's partials are summed as one matrix product
_LONGEST = 8.0  # maximum seconds of a string's sound
# of one note at velocity 127; the loudest of the 100 clips described at GAIN peaks at 0.78 of full
# scale
_LEVEL = 0.14
_TOP_DAMPER = 88  # MIDI pitch of the highest string with a damper (E6), as on most grands
# share of the sound that excites the room and, with raised dampers, the other strings
_ROOM, _RESONANCE = 0.05, 0.12


class BuiltinPiano:
    """A small additive piano in numpy, for demonstrations and tests without a soundfont.

    Inharmonic partials with two-stage decay, velocity-dependent level and brightness,
    register-dependent decay, dampers with half pedal (partial damping at controller values between
    32 and 88), una corda (softer and darker), hammer noise, a short room, and string resonance
    while the dampers are raised. Sostenuto (controller 66) is not modelled.

    Args:
        seed: of phases, hammer noise and room: another seed is another instrument of the same
            model.
    """

    name = "builtin"

    def __init__(self, seed: int = 0):
        self.seed = seed

    def render(self, performance: Performance, sample_rate: int = 22_050) -> np.ndarray:
        """Mono float32 ``(n,)``; see ``Synthesizer.render``."""
        n = n_samples(performance, sample_rate)
        lift = np.clip((_controller(performance, SUSTAIN, n, sample_rate) - 32) / (88 - 32), 0, 1)
        # seconds of full damper contact so far
        contact = np.cumsum((1 - lift) ** 2, dtype=np.float64) / sample_rate
        soft = _controller(performance, UNA_CORDA, n, sample_rate) / 127
        dry = np.zeros(n, dtype=np.float32)
        starts = np.round(performance.notes["onset"] * sample_rate).astype(int)
        releases = np.round(performance.notes["offset"] * sample_rate).astype(int)
        stops = _next_strokes(performance.notes["pitch"], starts, n)
        for note, start, release, stop in zip(
            performance.notes, starts, releases, stops, strict=True
        ):
            string = _string(int(note["pitch"]), sample_rate, self.seed)
            weights = _touch(note["velocity"] / 127, soft[start])
            rate = 0.0 if note["pitch"] > _TOP_DAMPER else 30.0 + 0.5 * note["pitch"]
            _strike(dry, string, weights, contact, rate, start, release, stop)
        excitation = dry * (_ROOM + _RESONANCE * lift)
        wet = scipy.signal.oaconvolve(excitation, _room(sample_rate, self.seed))[:n]
        return faded(dry + wet, sample_rate)


def _controller(performance: Performance, number: int, n: int, sample_rate: int) -> np.ndarray:
    """Value of a controller at every sample, float32 ``(n,)``; zero before its first event."""
    events = performance.pedals[performance.pedals["number"] == number]
    edges = np.clip(np.round(events["time"] * sample_rate).astype(int), 0, n)
    lengths = np.diff(np.concatenate([[0], edges, [n]]))
    return np.repeat(np.concatenate([[0], events["value"]]).astype(np.float32), lengths)


def _next_strokes(pitches: np.ndarray, starts: np.ndarray, n: int) -> np.ndarray:
    """Sample at which each note's string is struck again, or ``n``. Notes are sorted by onset."""
    stops = np.full(len(starts), n)
    upcoming: dict[int, int] = {}
    for i in range(len(starts) - 1, -1, -1):
        stops[i] = upcoming.get(pitches[i], n)
        upcoming[pitches[i]] = starts[i]
    return stops


def _touch(velocity: float, soft: float) -> np.ndarray:
    """Weights float32 (2,) of the soft and the hard hammer's sound, given velocity and soft pedal,
    both 0 to 1."""
    level = _LEVEL * velocity**1.7 * (1 - 0.2 * soft)
    hardness = velocity**1.3 * (1 - 0.4 * soft)
    return np.array([level * (1 - hardness), level * hardness], dtype=np.float32)


def _strike(dry, string, weights, contact, rate, start, release, stop) -> None:
    """Add one note to ``dry`` in place.

    After ``release`` the string decays by ``exp(-rate * damper contact)``, with the pedal up, half
    down or down.
    """
    length = min(string.shape[1], stop - start)
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


@functools.lru_cache(maxsize=256)
def _string(pitch: int, sample_rate: int, seed: int) -> np.ndarray:
    """An undamped string struck by a soft and by a hard hammer, float32 (2, n), each of unit
    initial energy.

    Partials ``f_n = n f_0 sqrt(1 + B n^2)`` with B over the keyboard as fitted by Rigaud et al.
    (2011), "A parametric model of piano tuning", eq. 9. Each decays in two stages (prompt sound and
    slightly detuned aftersound).
    """
    rng = np.random.default_rng((seed, pitch))
    f0 = 440 * 2 ** ((pitch - 69) / 12)
    stiffness = np.exp(0.0926 * pitch - 13.64) + np.exp(-0.0847 * pitch - 5.82)
    order = np.arange(1, 61)
    frequency = order * f0 * np.sqrt(1 + stiffness * order**2)
    order, frequency = (values[frequency < 0.45 * sample_rate] for values in (order, frequency))
    comb = 0.1 + np.abs(np.sin(np.pi * order / 8))  # the hammer strikes at an eighth of the string
    spectra = (
        np.stack([order**-1.3 * np.exp(-frequency / 600), order**-0.7 * np.exp(-frequency / 2500)])
        * comb
    )
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
    blocks = int(min(_LONGEST, t60) * sample_rate) // _BLOCK
    rows = np.exp(np.outer(np.arange(blocks) * _BLOCK / sample_rate, exponent))
    columns = amplitudes[:, :, None] * np.exp(np.outer(exponent, np.arange(_BLOCK) / sample_rate))
    sound = (rows.astype(np.complex64) @ columns.astype(np.complex64)).real.reshape(2, -1)
    return _struck(sound, sample_rate, rng)


def _struck(sound: np.ndarray, sample_rate: int, rng: np.random.Generator) -> np.ndarray:
    """Add attack, hammer noise and a final fade to the string ``(2, n)``."""
    time = np.arange(sound.shape[1]) / sample_rate
    noise = scipy.signal.lfilter([0.3], [1, -0.7], rng.standard_normal(sound.shape[1])) * np.exp(
        -time / 0.012
    )
    sound = sound * np.minimum(1, time / np.array([[0.004], [0.0015]]))
    sound += np.array([[0.04], [0.15]]) * noise
    sound *= np.minimum(1, (time[-1] - time) / 0.3)
    return sound.astype(np.float32)


@functools.lru_cache(maxsize=4)
def _room(sample_rate: int, seed: int) -> np.ndarray:
    """Impulse response float32 of room and soundboard: one second of decaying noise of unit
    energy."""
    time = np.arange(sample_rate) / sample_rate
    noise = np.random.default_rng((seed, 128)).standard_normal(sample_rate) * np.exp(-time / 0.18)
    noise = scipy.signal.lfilter([0.5], [1, -0.5], noise)
    return (noise / np.linalg.norm(noise)).astype(np.float32)
