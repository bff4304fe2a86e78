"""How far a piano is tuned from A4 = 440 Hz, and the same sound at another tuning.

A model that was trained on pianos at 440 Hz hears others worse: a fifth of a semitone falls between the bands of its spectrograms.
"""

import librosa
import numpy as np
import soxr

_FFT = 4096  # at 22,050 Hz: within 2 cents of the truth, most of it the soundfonts' own tuning; shorter ones find low tones worse
_RESOLUTION = 0.01  # of a semitone
_PIECES, _PIECE_SECONDS = 12, 10.0  # over a whole recording: one of an hour is measured on two minutes


def tuning(wave: np.ndarray, sample_rate: int) -> float:
    """Cents above A4 = 440 Hz, from -50 to 50; 0 where no tone is found.

    The commonest deviation of spectral peaks from the equal temperament (`librosa.pitch_tuning`), octave stretch and inharmonicity
    of strings included. A piano a semitone off is in tune, and transposed.

    Args:
        wave: float (n,).
    """
    length = round(_PIECE_SECONDS * sample_rate)
    starts = np.linspace(0, max(len(wave) - length, 0), min(_PIECES, -(-len(wave) // length))).astype(int)
    found = [_peaks(wave[start : start + length], sample_rate) for start in starts]
    pitches = np.concatenate(found) if found else np.zeros(0)
    return 100 * float(librosa.pitch_tuning(pitches, resolution=_RESOLUTION)) if len(pitches) else 0.0


def _peaks(wave: np.ndarray, sample_rate: int) -> np.ndarray:
    """Frequencies of spectral peaks that are louder than half of them, Hz; as `librosa.estimate_tuning` takes them."""
    pitches, magnitudes = librosa.piptrack(y=wave, sr=sample_rate, n_fft=_FFT)
    tones = pitches > 0
    return pitches[tones & (magnitudes >= np.median(magnitudes[tones]))] if tones.any() else np.zeros(0)


def retuned(wave: np.ndarray, sample_rate: int, cents: float) -> np.ndarray:
    """The wave float32 (n,) higher by so many cents, and shorter by the same share, as a tape that runs faster."""
    if not cents:
        return wave
    return soxr.resample(wave, sample_rate * 2 ** (cents / 1200), sample_rate, quality="HQ")
