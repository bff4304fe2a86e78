"""Hand-crafted audio statistics of a recording: the input of the baselines without a trained
encoder.

Series over time (log-mel, MFCC, chroma, spectral shape, level, onset strength) are summarised by
moments and quantiles. Events (onsets, and the level between them) and the slow level curve have
their own statistics. All levels are absolute, because loudness is a rated quality. The duration of
a recording is not included: it depends on where a clip was cut.
"""

from typing import Any

import librosa
import numpy as np
from scipy.ndimage import uniform_filter1d

_N_FFT, _HOP = 2048, 512  # librosa's defaults: 93 and 23 ms at 22,050 Hz
_MEL_BANDS = 32  # each of four of librosa's 128 bands
_WIDE_BANDS = 8  # each of 16 of them, for rises and falls
_LAGS = (0.25, 0.5, 1.0, 2.0)  # seconds; lags of the chroma autocorrelation
_SLOW = (1.0, 3.0)  # seconds; smoothing windows of the slow level curve
_QUIET_DB = 40.0  # frames this far below the loudest frame count as silent
_AROUND_ONSET = 4  # frames before and after an onset in which its rise is measured (93 ms)

# Fine-grained onsets use windows short enough to separate the notes of a chord: 23 ms, every 5.8
# ms.
_FINE: dict[str, Any] = {"n_fft": 512, "hop_length": 128, "n_mels": 32}
_APART = 0.03  # minimum seconds between two onsets
# octaves: successive inter-onset intervals closer than this are taken as the same written value
_ALIKE = 0.35
_PULSE = (0.15, 2.0)  # seconds; range of lags in which the pulse is searched

# Series over time: (name, bands, statistics). Quantiles are written q10, q50, q90.
_MEAN_STD = ("mean", "std")
_WIDE = ("mean", "std", "q10", "q90")
_FULL = ("mean", "std", "q10", "q50", "q90")
_SERIES = (
    ("mel_db", _MEL_BANDS, _WIDE),
    ("mel_rise", _WIDE_BANDS, ("mean",)),
    ("mel_fall", _WIDE_BANDS, ("mean", "std", "q90")),
    ("mfcc", 20, _WIDE),
    ("mfcc_delta", 20, ("std",)),
    ("chroma", 12, _MEAN_STD),
    ("tonnetz", 6, _MEAN_STD),
    ("spectral_contrast", 7, _MEAN_STD),
    ("spectral_centroid", 1, _FULL),
    ("spectral_bandwidth", 1, _FULL),
    ("spectral_flatness_db", 1, _FULL),
    ("spectral_rolloff", 1, _FULL),
    ("zero_crossing_rate", 1, _FULL),
    ("level_db", 1, ("mean", "std", "q5", "q10", "q25", "q50", "q75", "q90", "q95")),
    ("level_db_delta", 1, ("std", "q5", "q25", "q75", "q95")),
    ("onset_strength", 1, _FULL),
)
_SINGLE = (
    "onset_rate",
    "tempo",
    *(f"ioi_log_{statistic}" for statistic in ("std", "q10", "q50", "q90")),
    *(
        f"{name}_{statistic}"
        for name in ("attack_db", "dip_db", "decay_db")
        for statistic in _MEAN_STD
    ),
    *(
        f"strokes_{name}"
        for name in (
            "rate",
            "ioi_log_std",
            "ioi_log_q50",
            "npvi",
            "rubato",
            "pulse_clarity",
            "pulse_log_lag",
        )
    ),
    *(
        f"strokes_{name}_{statistic}"
        for name in ("strength", "width")
        for statistic in (*_MEAN_STD, "q10", "q90")
    ),
    *(f"strokes_between_q{percent}" for percent in (10, 50, 75)),
    "silent_share",
    *(
        f"level_slow_{seconds:g}s_{statistic}"
        for seconds in _SLOW
        for statistic in ("std", "range", "trend")
    ),
    *(f"chroma_kept_{lag:g}s" for lag in _LAGS),
    "key_clarity",
    "majorness",
)
# Key profiles of C major and C minor: Krumhansl and Kessler (1982).
_MAJOR = (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88)
_MINOR = (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17)


def audio_feature_names() -> tuple[str, ...]:
    """Names of ``audio_features``, in its order: ``series[_band]_statistic``, then single
    values."""
    series = (
        f"{name}_{band}_{statistic}" if bands > 1 else f"{name}_{statistic}"
        for name, bands, statistics in _SERIES
        for statistic in statistics
        for band in range(bands)
    )
    return (*series, *_SINGLE)


def audio_features(wave: np.ndarray, sample_rate: int = 22_050) -> dict[str, float]:
    """Features of a recording, summarised over time: the input of the audio-statistics and
    feed-forward baselines.

    All series share one STFT. Chroma assumes the tuning A4 = 440 Hz.

    Args:
        wave: float32 (n,), checked by ``check_waveform``; ``sample_rate`` at least 12,800 Hz.

    Returns:
        Finite values in the order of ``audio_feature_names``; in dB, Hz, seconds, or without
        unit, according to the name.
    """
    magnitude = np.abs(librosa.stft(wave, n_fft=_N_FFT, hop_length=_HOP))
    mel = librosa.feature.melspectrogram(S=magnitude**2, sr=sample_rate, n_fft=_N_FFT)
    mel_db = librosa.power_to_db(mel, ref=1.0, top_db=None)
    onset_strength = librosa.onset.onset_strength(S=mel_db, sr=sample_rate, hop_length=_HOP)
    series = _series(wave, sample_rate, magnitude, mel, mel_db)
    series["onset_strength"] = onset_strength
    values = []
    for name, _, statistics in _SERIES:
        rows = np.atleast_2d(series[name])
        values += [value for statistic in statistics for value in _summary(rows, statistic)]
    rate = sample_rate / _HOP
    at: dict[str, Any] = {"onset_envelope": onset_strength, "sr": sample_rate, "hop_length": _HOP}
    onsets, level = librosa.onset.onset_detect(**at), np.ravel(series["level_db"])
    values += [len(onsets) * sample_rate / len(wave), librosa.feature.tempo(**at)[0]]
    values += _between_onsets(onsets, level, rate) + _strokes(wave, sample_rate)
    values += _course(level, rate) + _harmony(series["chroma"], rate)
    return dict(zip(audio_feature_names(), map(float, values), strict=True))


def _series(wave, sample_rate, magnitude, mel, mel_db) -> dict[str, np.ndarray]:
    """All series of ``_SERIES`` except onset strength: (bands, n_frames) or (n_frames,)."""
    feature, bins = librosa.feature, {"S": magnitude, "sr": sample_rate}
    centroid = feature.spectral_centroid(**bins)
    mfcc = feature.mfcc(S=mel_db, n_mfcc=20)
    chroma = feature.chroma_stft(S=magnitude**2, sr=sample_rate, tuning=0.0)
    rms = feature.rms(S=magnitude, frame_length=_N_FFT)
    level = librosa.amplitude_to_db(rms, ref=1.0, top_db=None)
    steps = np.diff(_banded_db(mel, _WIDE_BANDS), axis=1)
    return {
        "mel_db": _banded_db(mel, _MEL_BANDS),
        "mel_rise": np.maximum(steps, 0),
        "mel_fall": np.maximum(-steps, 0),
        "mfcc": mfcc,
        "mfcc_delta": np.diff(mfcc, axis=1),
        "chroma": chroma,
        "tonnetz": feature.tonnetz(chroma=chroma),
        "spectral_contrast": feature.spectral_contrast(**bins),
        "spectral_centroid": centroid,
        "spectral_bandwidth": feature.spectral_bandwidth(**bins, centroid=centroid),
        "spectral_flatness_db": librosa.power_to_db(
            feature.spectral_flatness(S=magnitude), ref=1.0, top_db=None
        ),
        "spectral_rolloff": feature.spectral_rolloff(**bins),
        "zero_crossing_rate": feature.zero_crossing_rate(
            wave, frame_length=_N_FFT, hop_length=_HOP
        ),
        "level_db": level,
        "level_db_delta": np.diff(level),
    }


def _banded_db(mel: np.ndarray, bands: int) -> np.ndarray:
    """Power mel (128, n_frames) -> level of ``bands`` groups of equally many bands, dB (bands,
    n_frames)."""
    return librosa.power_to_db(
        mel.reshape(bands, -1, mel.shape[1]).mean(axis=1), ref=1.0, top_db=None
    )


def _summary(rows: np.ndarray, statistic: str) -> np.ndarray:
    """One statistic over time of (bands, n_frames): ``mean``, ``std`` or ``q`` and a percentage;
    (bands,)."""
    if statistic.startswith("q"):
        return np.quantile(rows, int(statistic[1:]) / 100, axis=1)
    return getattr(np, statistic)(rows, axis=1)


def _between_onsets(onsets: np.ndarray, level: np.ndarray, rate: float) -> list[float]:
    """Inter-onset intervals (log seconds): std, quantiles; rise at onsets, fall before the next
    (dB), its rate (dB/s): mean, std.

    With fewer than two onsets, the interval is the duration of the recording.

    Args:
        onsets: frames, ascending; ``level``: dB (n_frames,); ``rate``: frames per second.
    """
    if len(onsets) < 2:
        onsets = np.array([0, len(level) - 1])
    between = np.log(np.maximum(np.diff(onsets), 1) / rate)
    attacks, dips, decays = [], [], []
    for onset, following in zip(onsets[:-1], onsets[1:], strict=True):
        before = level[max(onset - _AROUND_ONSET, 0) : onset + 1]
        peak = onset + np.argmax(level[onset : min(onset + _AROUND_ONSET, following) + 1])
        attacks.append(level[peak] - before.min())
        lowest = peak + np.argmin(level[peak : following + 1])
        dips.append(level[peak] - level[lowest])
        decays.append(dips[-1] / max(lowest - peak, 1) * rate)
    quantiles = np.quantile(between, (0.1, 0.5, 0.9)).tolist()
    return [
        between.std(),
        *quantiles,
        *(f(values) for values in (attacks, dips, decays) for f in (np.mean, np.std)),
    ]


def _strokes(wave: np.ndarray, sample_rate: int) -> list[float]:
    """Timing and evenness of onsets, from spectral flux in short windows.

    Onset rate; standard deviation and median of log inter-onset intervals; their variability from
    one to the next, overall (nPVI / 100) and between similar intervals; height and log lag of the
    flux's autocorrelation peak; mean, standard deviation and deciles of onset strength and width
    (seconds; wide for spread chords); flux quantiles.
    """
    # Imported here: it takes half a second to load and spectrograms do not need it.
    from scipy.signal import find_peaks, peak_widths

    flux = librosa.onset.onset_strength(y=wave, sr=sample_rate, **_FINE)
    rate = sample_rate / _FINE["hop_length"]
    loud = max(float(np.quantile(flux, 0.99)), 1e-6)
    peaks, _ = find_peaks(
        flux, height=0.15 * loud, prominence=0.1 * loud, distance=round(_APART * rate)
    )
    strengths, widths = flux[peaks] / loud, peak_widths(flux, peaks)[0] / rate
    if len(peaks) < 2:
        peaks = np.array([0, len(flux) - 1])
        strengths, widths = np.ones(1), np.zeros(1)
    steps = np.log(np.diff(peaks) / rate)
    changes = np.diff(steps) if len(steps) > 1 else np.zeros(1)
    alike = changes[np.abs(changes) < _ALIKE * np.log(2)]
    values = [
        len(peaks) * rate / len(flux),
        steps.std(),
        np.median(steps),
        2 * np.abs(np.tanh(changes / 2)).mean(),
    ]
    values += [np.sqrt(np.mean(alike**2)) if len(alike) else 0.0, *_pulse(flux, rate)]
    for one in (strengths, widths):
        values += [one.mean(), one.std(), *np.quantile(one, (0.1, 0.9))]
    return [*values, *np.quantile(flux / loud, (0.1, 0.5, 0.75))]


def _pulse(flux: np.ndarray, rate: float) -> tuple[float, float]:
    """Height and log lag (log seconds) of the autocorrelation peak of ``flux`` within
    ``_PULSE``."""
    first, last = (round(seconds * rate) for seconds in _PULSE)
    centred = flux - flux.mean()
    from scipy.signal import correlate  # imported here as above

    # Not librosa's, which warns with NumPy 2.5 (numba casts an uninitialised output).
    together = correlate(centred, centred, method="fft")[len(centred) - 1 :][: last + 1]
    if together[0] < 1e-9 or len(together) <= first:
        return 0.0, 0.0
    lag = first + int(np.argmax(together[first:]))
    return float(together[lag] / together[0]), float(np.log(lag / rate))


def _course(level: np.ndarray, rate: float) -> list[float]:
    """Share of silent frames; of the smoothed level: standard deviation, range between deciles 1
    and 9 (dB), total trend (dB)."""
    loud = level.max() - _QUIET_DB
    values = [(level < loud).mean()]
    for seconds in _SLOW:
        slow = uniform_filter1d(
            np.maximum(level, loud), max(round(seconds * rate), 1), mode="nearest"
        )
        low, high = np.quantile(slow, (0.1, 0.9))
        values += [slow.std(), high - low, np.polyfit(np.linspace(0, 1, len(slow)), slow, 1)[0]]
    return values


def _harmony(chroma: np.ndarray, rate: float) -> list[float]:
    """Chroma similarity at each of ``_LAGS`` (cosine; high with blurred pedal), key clarity, and
    majorness."""
    unit = chroma / np.maximum(np.linalg.norm(chroma, axis=0), 1e-9)
    frames = [min(round(lag * rate), unit.shape[1] - 1) for lag in _LAGS]
    kept = [np.sum(unit[:, lag:] * unit[:, : unit.shape[1] - lag], axis=0).mean() for lag in frames]
    return [*kept, *key_fit(chroma.mean(axis=1))]


def key_fit(pitch_classes: np.ndarray) -> tuple[float, float]:
    """Key clarity and majorness of pitch-class weights: (best correlation, best major - best
    minor).

    The Krumhansl-Schmuckler key-finding algorithm: Krumhansl (1990), *Cognitive Foundations of
    Musical Pitch*, chapter 4.

    Args:
        pitch_classes: (12,) from C; equal weights have no key and give (0, 0).
    """
    spread = pitch_classes - pitch_classes.mean()
    size = np.linalg.norm(spread)
    if size < 1e-9:
        return 0.0, 0.0
    best = []
    for profile in (_MAJOR, _MINOR):
        fit = np.array(profile) - np.mean(profile)
        best.append(
            max(float(np.roll(fit, key) @ spread) for key in range(12))
            / (np.linalg.norm(fit) * size)
        )
    return float(max(best)), float(best[0] - best[1])
