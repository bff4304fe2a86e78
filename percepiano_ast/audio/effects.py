"""Changes of a recording's sound: loudness, tuning, and the effects of augmentation and robustness
tests."""

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy
import soundfile
import soxr

from percepiano_ast.errors import InputError

# --- Loudness -----------------------------------------------------------------------------------

LOUDNESS = -23.0  # LUFS: EBU R 128's
# RMS level of the white noise bed added to every recording, re full scale: 42 dB below the music,
# as in a quiet room. It masks rounding, compression and traces of individual synthesizers. Without
# it, audio statistics shift by 0.1 to 0.3 standard deviations from WAV to MP3, with it by 0.004.
BED_DB = -65.0
# Maximum random change of the target in training: the measured loudness depends on the excerpt.
JITTER_DB = 3.0


def loudness(wave: np.ndarray, sample_rate: int) -> float:
    """Integrated loudness of a wave float (n,) in LUFS by ITU-R BS.1770-4 (K-weighting, gated
    blocks of 400 ms).

    Raises:
        InputError: shorter than 400 ms, or all blocks are below the gate of -70 LUFS.
    """
    if len(wave) < 0.4 * sample_rate:
        seconds = f"{len(wave) / sample_rate:.2f} s"
        raise InputError(f"{seconds} are too short to measure loudness. Give at least 0.4 s.")
    import pyloudnorm  # imported here: it loads scipy.signal, which spectrograms do not need

    found = float(pyloudnorm.Meter(sample_rate).integrated_loudness(np.asarray(wave, np.float64)))
    if not np.isfinite(found):
        raise InputError("the sound is softer than -70 LUFS throughout. Record at a higher level.")
    return found


def normalize_loudness(wave: np.ndarray, sample_rate: int, target: float = LOUDNESS) -> np.ndarray:
    """The wave float32 (n,) at ``target`` LUFS, plus a fixed noise bed. No limiter is applied:
    peaks may exceed full scale.

    Raises:
        InputError: see `loudness`.
    """
    gain = 10 ** ((target - loudness(wave, sample_rate)) / 20)
    bed = np.random.default_rng(0).standard_normal(len(wave), np.float32)
    return (wave * gain).astype(np.float32) + bed * np.float32(10 ** (BED_DB / 20))


# --- Tuning -------------------------------------------------------------------------------------


def estimate_tuning(wave: np.ndarray, sample_rate: int) -> float:
    """Tuning of a wave float (n,) in cents relative to A4 = 440 Hz, from -50 to 50; 0 if no tone is
    found. A piano that is a semitone off counts as transposed, with a tuning of 0.

    The most frequent deviation of spectral peaks from equal temperament
    (`librosa.estimate_tuning`) over at most two minutes; the error at 22,050 Hz is up to 5 cents.
    """
    import librosa

    length = round(10 * sample_rate)
    if len(wave) > 12 * length:  # twelve excerpts
        starts = np.linspace(0, len(wave) - length, 12).astype(int)
        wave = np.concatenate([wave[start : start + length] for start in starts])
    with warnings.catch_warnings():  # the result is 0, as documented
        warnings.filterwarnings("ignore", "Trying to estimate tuning from empty|n_fft=")
        # shorter FFTs resolve low tones worse
        return 100 * float(librosa.estimate_tuning(y=wave, sr=sample_rate, n_fft=4096))


def retune(wave: np.ndarray, sample_rate: int, cents: float) -> np.ndarray:
    """The wave float32 (n,) resampled to sound higher by ``cents``, which shortens it."""
    if not cents:
        return wave
    return soxr.resample(wave, sample_rate * 2 ** (cents / 1200), sample_rate, quality="HQ")


# --- Effects ------------------------------------------------------------------------------------

# Direct-to-reverberant ratio in dB by reverberation time in seconds: small room, hall, church, and
# a living room from some distance, for testing only.
_DIRECT = {0.4: 6.0, 1.2: 3.0, 2.5: 0.0, 0.7: 0.0}


@dataclass(frozen=True)
class Effect:
    """An effect of an ``amount`` in ``unit``; ``change``: (wave, rate, amount, rng) -> wave."""

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
    response = np.concatenate([np.zeros(round(0.012 * sample_rate)), tail])  # 12 ms of pre-delay
    return wave + scipy.signal.oaconvolve(wave, response)[: len(wave)]


def _noise(wave, sample_rate, snr, rng):
    """Pink noise (-3 dB per octave above 20 Hz, as from rooms and ventilation), ``snr`` dB below
    the clip's mean power."""
    spectrum = np.fft.rfft(rng.standard_normal(len(wave)))
    spectrum /= np.sqrt(np.maximum(np.arange(len(spectrum)), 20 * len(wave) / sample_rate))
    noise = np.fft.irfft(spectrum, len(wave))
    return wave + noise * np.sqrt(np.mean(wave**2) / np.mean(noise**2) / 10 ** (snr / 10))


def _mp3(wave, sample_rate, kbit, rng):
    """Encode and decode at a constant bit rate; low rates add a delay of some ten milliseconds."""
    rates = (16_000, 22_050, 24_000)  # those of MPEG-2 layer III, 8 to 160 kbit/s
    if sample_rate not in rates or "MP3" not in soundfile.available_formats():
        raise InputError(
            f"cannot write MP3 at {sample_rate} Hz with libsndfile"
            f" {soundfile.__libsndfile_version__}: it needs version 1.1 or later and one of"
            f" {', '.join(map(str, rates))} Hz. Run: pip install -U soundfile"
        )
    file, options = io.BytesIO(), {"compression_level": 1 - (kbit - 8) / (160 - 8)}
    soundfile.write(file, wave, sample_rate, format="MP3", bitrate_mode="CONSTANT", **options)
    file.seek(0)
    return soundfile.read(file, dtype="float32")[0]


def _gain(wave, sample_rate, decibel, rng):
    return np.clip(wave * 10 ** (decibel / 20), -1, 1)  # clipped at full scale, as in a file


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
# not used in training or by augmentation
HELD_OUT_ROOM = Effect("room", 0.7, "RT60 {:g} s", _room)
