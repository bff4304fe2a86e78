"""Estimate a piano's deviation from A4 = 440 Hz, and change the tuning of a recording.

Models trained on pianos at 440 Hz transcribe other tunings less accurately: a fifth of a semitone
falls between mel bands.
"""

import warnings

import librosa
import numpy as np
import soxr

# at 22,050 Hz: error up to 5 cents, most of it the soundfonts' own tuning; shorter FFTs resolve low
# tones worse
_FFT = 4096
_PIECES, _PIECE_SECONDS = 12, 10.0  # excerpts of a long recording: two minutes in total


def tuning(wave: np.ndarray, sample_rate: int) -> float:
    """Tuning in cents relative to A4 = 440 Hz, from -50 to 50; 0 if no tone is found.

    The most frequent deviation of spectral peaks from equal temperament
    (`librosa.estimate_tuning`), including octave stretch and inharmonicity. A piano that is a
    semitone off counts as transposed, with a tuning of 0.

    Args:
        wave: float (n,).
    """
    length = round(_PIECE_SECONDS * sample_rate)
    if len(wave) > _PIECES * length:
        starts = np.linspace(0, len(wave) - length, _PIECES).astype(int)
        wave = np.concatenate([wave[start : start + length] for start in starts])
    with warnings.catch_warnings():
        # the result is 0, as documented
        warnings.filterwarnings("ignore", "Trying to estimate tuning from empty|n_fft=")
        return 100 * float(librosa.estimate_tuning(y=wave, sr=sample_rate, n_fft=_FFT))


def retuned(wave: np.ndarray, sample_rate: int, cents: float) -> np.ndarray:
    """The wave float32 (n,) resampled to sound higher by ``cents``, which shortens it by the same
    factor."""
    if not cents:
        return wave
    return soxr.resample(wave, sample_rate * 2 ** (cents / 1200), sample_rate, quality="HQ")
