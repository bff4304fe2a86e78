"""Classic descriptors of a recording: what the feed-forward baseline hears."""

import librosa
import numpy as np

_CLASSIC_FFT, _CLASSIC_HOP = 2048, 512  # librosa's defaults: 93 and 23 ms at 22,050 Hz

# Series over time: (name, bands, statistics). Quantiles are written q10, q50, q90.
_MEAN_STD = ("mean", "std")
_FULL = ("mean", "std", "q10", "q50", "q90")
_SERIES = (
    ("mfcc", 20, _MEAN_STD),
    ("mfcc_delta", 20, ("std",)),
    ("chroma", 12, _MEAN_STD),
    ("spectral_contrast", 7, _MEAN_STD),
    ("spectral_centroid", 1, _FULL),
    ("spectral_bandwidth", 1, _FULL),
    ("spectral_flatness_db", 1, _FULL),
    ("spectral_rolloff", 1, _FULL),
    ("zero_crossing_rate", 1, _FULL),
    ("level_db", 1, _FULL),
    ("level_db_delta", 1, ("std",)),
    ("onset_strength", 1, _FULL),
)


def classic_feature_names() -> tuple[str, ...]:
    """Names of ``classic_features``, in its order: ``series[_band]_statistic``, then onset rate and tempo."""
    series = (
        f"{name}_{band}_{statistic}" if bands > 1 else f"{name}_{statistic}"
        for name, bands, statistics in _SERIES
        for statistic in statistics
        for band in range(bands)
    )
    return (*series, "onset_rate", "tempo")


def classic_features(wave: np.ndarray, sample_rate: int = 22_050) -> dict[str, float]:
    """MFCC, chroma and spectral descriptors of a recording, summarised over time: the feed-forward baseline's input.

    One STFT serves every descriptor. Chroma assumes the tuning A4 = 440 Hz.

    Args:
        wave: float32 (n,), checked by ``check_waveform``; ``sample_rate`` at least 12,800 Hz.

    Returns:
        Finite numbers in the order of ``classic_feature_names``.
    """
    magnitude = np.abs(librosa.stft(wave, n_fft=_CLASSIC_FFT, hop_length=_CLASSIC_HOP))
    mel = librosa.feature.melspectrogram(S=magnitude**2, sr=sample_rate, n_fft=_CLASSIC_FFT)
    mel_db = librosa.power_to_db(mel, ref=1.0, top_db=None)
    onset_strength = librosa.onset.onset_strength(S=mel_db, sr=sample_rate, hop_length=_CLASSIC_HOP)
    series = _classic_series(wave, sample_rate, magnitude, mel_db, onset_strength)
    values = []
    for name, bands, statistics in _SERIES:
        rows = np.atleast_2d(series[name])
        values += [value for statistic in statistics for value in _summary(rows, statistic)]
    at = {"onset_envelope": onset_strength, "sr": sample_rate, "hop_length": _CLASSIC_HOP}
    values.append(len(librosa.onset.onset_detect(**at)) * sample_rate / len(wave))
    values.append(librosa.feature.tempo(**at)[0])
    return dict(zip(classic_feature_names(), map(float, values), strict=True))


def _classic_series(wave, sample_rate, magnitude, mel_db, onset_strength) -> dict[str, np.ndarray]:
    """Every series of ``_SERIES``: (bands, n_frames) or (n_frames,)."""
    feature, bins = librosa.feature, {"S": magnitude, "sr": sample_rate}
    centroid = feature.spectral_centroid(**bins)
    mfcc = feature.mfcc(S=mel_db, n_mfcc=20)
    rms = feature.rms(S=magnitude, frame_length=_CLASSIC_FFT)
    level = librosa.amplitude_to_db(rms, ref=1.0, top_db=None)
    return {
        "mfcc": mfcc,
        "mfcc_delta": np.diff(mfcc, axis=1),
        "chroma": feature.chroma_stft(S=magnitude**2, sr=sample_rate, tuning=0.0),
        "spectral_contrast": feature.spectral_contrast(**bins),
        "spectral_centroid": centroid,
        "spectral_bandwidth": feature.spectral_bandwidth(**bins, centroid=centroid),
        "spectral_flatness_db": librosa.power_to_db(feature.spectral_flatness(S=magnitude), ref=1.0, top_db=None),
        "spectral_rolloff": feature.spectral_rolloff(**bins),
        "zero_crossing_rate": feature.zero_crossing_rate(wave, frame_length=_CLASSIC_FFT, hop_length=_CLASSIC_HOP),
        "level_db": level,
        "level_db_delta": np.diff(level),
        "onset_strength": onset_strength,
    }


def _summary(rows: np.ndarray, statistic: str) -> np.ndarray:
    """One statistic over time of (bands, n_frames): ``mean``, ``std`` or ``q`` and a percentage; (bands,)."""
    if statistic.startswith("q"):
        return np.quantile(rows, int(statistic[1:]) / 100, axis=1)
    return getattr(np, statistic)(rows, axis=1)
