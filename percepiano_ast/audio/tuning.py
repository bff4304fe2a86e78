"""How far a piano is tuned from A4 = 440 Hz, and the same sound at another tuning.

A model that was trained on pianos at 440 Hz hears others worse: a fifth of a semitone falls between the bands of its spectrograms.
"""

import warnings

import librosa
import numpy as np
import soxr

_FFT = 4096  # at 22,050 Hz: within 5 cents of the truth, most of it the soundfonts' own tuning; shorter ones find low tones worse
_PIECES, _PIECE_SECONDS = 12, 10.0  # of a long recording: one of an hour is measured on two minutes


def tuning(wave: np.ndarray, sample_rate: int) -> float:
    """Cents above A4 = 440 Hz, from -50 to 50; 0 where no tone is found.

    The commonest deviation of spectral peaks from the equal temperament (`librosa.estimate_tuning`), octave stretch and
    inharmonicity of strings included. A piano a semitone off is in tune, and transposed.

    Args:
        wave: float (n,).
    """
    length = round(_PIECE_SECONDS * sample_rate)
    if len(wave) > _PIECES * length:
        starts = np.linspace(0, len(wave) - length, _PIECES).astype(int)
        wave = np.concatenate([wave[start : start + length] for start in starts])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Trying to estimate tuning from empty|n_fft=")  # which is 0, as promised
        return 100 * float(librosa.estimate_tuning(y=wave, sr=sample_rate, n_fft=_FFT))


def retuned(wave: np.ndarray, sample_rate: int, cents: float) -> np.ndarray:
    """The wave float32 (n,) higher by so many cents, and shorter by the same share, as a tape that runs faster."""
    if not cents:
        return wave
    return soxr.resample(wave, sample_rate * 2 ** (cents / 1200), sample_rate, quality="HQ")
