"""Recording conditions: rooms, noise, MP3, level, tuning, silence. Ratings should be invariant to
them.

Each condition takes a waveform and returns the same performance recorded differently.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.signal
import soundfile

from percepiano_ast.audio.tuning import retuned
from percepiano_ast.errors import InputError

# MP3 at 16 to 24 kHz is MPEG-2 layer III; libsndfile takes its bit rate as a share of this range.
_MP3_RATES = (16_000, 22_050, 24_000)
_MP3_LOWEST, _MP3_HIGHEST = 8, 160  # kbit/s
_PREDELAY = 0.012  # seconds between the direct sound and the reverberation
# Direct-to-reverberant ratio in dB for each reverberation time in seconds: a small room, a hall, a
# church; and a living room recorded from some distance, which is for testing only.
_DIRECT = {0.4: 6.0, 1.2: 3.0, 2.5: 0.0, 0.7: 0.0}


@dataclass(frozen=True)
class Condition:
    """One change of a recording that leaves the performance the same.

    Attributes:
        kind: ``room``, ``noise``, ``mp3``, ``gain``, ``tuning`` or ``silence``.
        amount: in ``unit``.
        change: (wave, sample_rate, amount, rng) -> wave.
    """

    kind: str
    amount: float
    unit: str
    change: Callable[[np.ndarray, int, float, np.random.Generator], np.ndarray]

    @property
    def label(self) -> str:
        """Kind and amount with its unit."""
        return f"{self.kind} {self.unit.format(self.amount)}"

    def apply(self, wave: np.ndarray, sample_rate: int, seed: int) -> np.ndarray:
        """``wave`` float32 (n,) under this condition, float32 (m,); the same seed gives the same
        noise and room.

        Raises:
            InputError: MP3 at a sampling rate other than 16,000, 22,050 or 24,000 Hz, or libsndfile
                cannot write it.
        """
        changed = self.change(wave, sample_rate, self.amount, np.random.default_rng(seed))
        return np.ascontiguousarray(changed, dtype=np.float32)


def _room(wave, sample_rate, seconds, rng):
    """Reverberation that decays by 60 dB in ``seconds``, faster for high frequencies; the direct
    sound is unchanged."""
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    tail = rng.standard_normal(len(time)) * np.exp(-np.log(1000) * time / seconds)
    dull = scipy.signal.lfilter([0.3], [1, -0.7], tail)
    fade = np.exp(-3 * time / seconds)  # high frequencies decay first
    tail = fade * tail + (1 - fade) * dull
    tail *= 10 ** (-_DIRECT[seconds] / 20) / np.linalg.norm(tail)
    response = np.concatenate([np.zeros(round(_PREDELAY * sample_rate)), tail])
    return wave + scipy.signal.oaconvolve(wave, response)[: len(wave)]


def _noise(wave, sample_rate, snr, rng):
    """Pink noise (-3 dB per octave, as from rooms and ventilation), ``snr`` dB below the clip's
    mean power."""
    spectrum = np.fft.rfft(rng.standard_normal(len(wave)))
    # flat below 20 Hz
    spectrum /= np.sqrt(np.maximum(np.arange(len(spectrum)), 20 * len(wave) / sample_rate))
    noise = np.fft.irfft(spectrum, len(wave))
    return wave + noise * np.sqrt(np.mean(wave**2) / np.mean(noise**2) / 10 ** (snr / 10))


def _mp3(wave, sample_rate, kbit, rng):
    """Encode and decode at a constant bit rate; low rates add a delay of some ten milliseconds."""
    if sample_rate not in _MP3_RATES or "MP3" not in soundfile.available_formats():
        raise InputError(
            f"cannot write MP3 at {sample_rate} Hz with libsndfile"
            f" {soundfile.__libsndfile_version__}: it needs version 1.1 or later and one of"
            f" {', '.join(map(str, _MP3_RATES))} Hz. Run: pip install -U soundfile"
        )
    level = 1 - (kbit - _MP3_LOWEST) / (_MP3_HIGHEST - _MP3_LOWEST)
    file = io.BytesIO()
    soundfile.write(
        file, wave, sample_rate, format="MP3", bitrate_mode="CONSTANT", compression_level=level
    )
    file.seek(0)
    return soundfile.read(file, dtype="float32")[0]


def _gain(wave, sample_rate, decibel, rng):
    """Change the level; samples beyond full scale are clipped, as in a file."""
    return np.clip(wave * 10 ** (decibel / 20), -1, 1)


def _tuning(wave, sample_rate, cents, rng):
    """Change the tuning by resampling, which also changes the clip's duration by the same
    factor."""
    return retuned(wave, sample_rate, cents)


def _silence(wave, sample_rate, seconds, rng):
    return np.concatenate([np.zeros(round(seconds * sample_rate), dtype=wave.dtype), wave])


CONDITIONS = tuple(
    Condition(kind, amount, unit, change)
    for kind, unit, change, amounts in (
        ("room", "RT60 {:g} s", _room, (0.4, 1.2, 2.5)),
        ("noise", "SNR {:g} dB", _noise, (40, 20)),
        ("mp3", "{:g} kbit/s", _mp3, (80, 32)),
        ("gain", "{:+g} dB", _gain, (-12, 12)),
        ("tuning", "{:+g} cents", _tuning, (-20, 20)),
        ("silence", "{:g} s before", _silence, (1, 3)),
    )
    for amount in amounts
)
# A held-out room: not used in training or by augmentation.
HELD_OUT_ROOM = Condition("room", 0.7, "RT60 {:g} s", _room)
