"""Changes of a recording that leave the performance the same.

Loudness and tuning are normalised before a recording is rated. `EFFECTS` (rooms, noise, MP3, level,
tuning, silence) serve augmentation and the tests of robustness.
"""

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import librosa
import numpy as np
import scipy
import soundfile
import soxr

from percepiano_ast.errors import InputError

# --- Loudness -----------------------------------------------------------------------------------

LOUDNESS = -23.0  # LUFS: EBU R 128's
# RMS level of the white noise bed added to every recording, re full scale: 42 dB below the music,
# as in a quiet room. It masks rounding, compression, filters near the highest frequencies and
# traces of individual synthesizers. Without it, audio statistics shift by 0.1 to 0.3 standard
# deviations from WAV to MP3 or to another sampling rate, with it by 0.004.
BED_DB = -65.0
# maximum random change of the target level in training: the measured loudness depends on the
# excerpt
JITTER_DB = 3.0


def loudness(wave: np.ndarray, sample_rate: int) -> float:
    """Integrated loudness of a mono wave float (n,) in LUFS, according to ITU-R BS.1770-4
    (K-weighting, gated blocks of 400 ms).

    Raises:
        InputError: shorter than 400 ms, or all blocks are below the gate of -70 LUFS.
    """
    if len(wave) < 0.4 * sample_rate:
        raise InputError(
            f"{len(wave) / sample_rate:.2f} s are too short to measure loudness. Give at least"
            " 0.4 s."
        )
    import pyloudnorm  # imported here: it loads scipy.signal, which spectrograms do not need

    found = float(pyloudnorm.Meter(sample_rate).integrated_loudness(np.asarray(wave, np.float64)))
    if not np.isfinite(found):
        raise InputError(
            "the sound is softer than -70 LUFS throughout, so its loudness is undefined. Record it"
            " at a higher level."
        )
    return found


def normalize_loudness(wave: np.ndarray, sample_rate: int, target: float = LOUDNESS) -> np.ndarray:
    """The wave float32 (n,) at ``target`` LUFS, plus a fixed noise bed, so that ratings do not
    depend on the gain of the recording.

    No limiter is applied: peaks may exceed full scale.

    Raises:
        InputError: see `loudness`.
    """
    gain = 10 ** ((target - loudness(wave, sample_rate)) / 20)
    bed = np.random.default_rng(0).standard_normal(len(wave), np.float32)
    return (wave * gain).astype(np.float32) + bed * np.float32(10 ** (BED_DB / 20))


# --- Tuning -------------------------------------------------------------------------------------


def estimate_tuning(wave: np.ndarray, sample_rate: int) -> float:
    """Tuning of a wave float (n,) in cents relative to A4 = 440 Hz, from -50 to 50; 0 if no tone is
    found.

    The most frequent deviation of spectral peaks from equal temperament
    (`librosa.estimate_tuning`), including octave stretch and inharmonicity; of a recording of more
    than two minutes, twelve excerpts of 10 s. A piano that is a semitone off counts as transposed,
    with a tuning of 0. The error at 22,050 Hz is up to 5 cents, most of it the soundfonts' own
    tuning. Models trained at 440 Hz transcribe other tunings less accurately: a fifth of a semitone
    falls between mel bands.
    """
    pieces, length = 12, round(10 * sample_rate)
    if len(wave) > pieces * length:
        starts = np.linspace(0, len(wave) - length, pieces).astype(int)
        wave = np.concatenate([wave[start : start + length] for start in starts])
    with warnings.catch_warnings():
        # the result is 0, as documented
        warnings.filterwarnings("ignore", "Trying to estimate tuning from empty|n_fft=")
        # shorter FFTs resolve low tones worse
        return 100 * float(librosa.estimate_tuning(y=wave, sr=sample_rate, n_fft=4096))


def retune(wave: np.ndarray, sample_rate: int, cents: float) -> np.ndarray:
    """The wave float32 (n,) resampled to sound higher by ``cents``, which shortens it by the same
    factor."""
    if not cents:
        return wave
    return soxr.resample(wave, sample_rate * 2 ** (cents / 1200), sample_rate, quality="HQ")


# --- Recording conditions -----------------------------------------------------------------------

# MP3 at 16 to 24 kHz is MPEG-2 layer III; libsndfile takes its bit rate as a share of this range.
_MP3_RATES = (16_000, 22_050, 24_000)
_MP3_LOWEST, _MP3_HIGHEST = 8, 160  # kbit/s
_PREDELAY = 0.012  # seconds between the direct sound and the reverberation
# Direct-to-reverberant ratio in dB for each reverberation time in seconds: a small room, a hall, a
# church; and a living room recorded from some distance, which is for testing only.
_DIRECT = {0.4: 6.0, 1.2: 3.0, 2.5: 0.0, 0.7: 0.0}


@dataclass(frozen=True)
class Effect:
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
        """``wave`` float32 (n,) with this effect, float32 (m,); the same seed gives the same noise
        and room.

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
    """Samples beyond full scale are clipped, as in a file."""
    return np.clip(wave * 10 ** (decibel / 20), -1, 1)


def _tuning(wave, sample_rate, cents, rng):
    return retune(wave, sample_rate, cents)


def _silence(wave, sample_rate, seconds, rng):
    return np.concatenate([np.zeros(round(seconds * sample_rate), dtype=wave.dtype), wave])


EFFECTS = tuple(
    Effect(kind, amount, unit, change)
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
HELD_OUT_ROOM = Effect("room", 0.7, "RT60 {:g} s", _room)
