"""Hand-crafted audio features, with absolute levels: loudness is a rated quality."""

from typing import Any

import numpy as np
import scipy

_N_FFT, _HOP = 2048, 512  # librosa's defaults: 93 and 23 ms at 22,050 Hz
_MEL_BANDS = 32  # each of four of librosa's 128 bands
_WIDE_BANDS = 8  # each of 16 of them, for rises and falls
_LAGS = (0.25, 0.5, 1.0, 2.0)  # seconds; lags of the chroma autocorrelation
_SLOW = (1.0, 3.0)  # seconds; smoothing windows of the slow level curve
_QUIET_DB = 40.0  # frames this far below the loudest frame count as silent
_AROUND_ONSET = 4  # frames before and after an onset in which its rise is measured (93 ms)

# windows short enough to separate the onsets of a chord: 23 ms, every 5.8 ms
_FINE: dict[str, Any] = {"n_fft": 512, "hop_length": 128, "n_mels": 32}
_APART = 0.03  # minimum seconds between two onsets
_ALIKE = 0.35  # octaves; inter-onset intervals closer than this have the same written value
_PULSE = (0.15, 2.0)  # seconds; range of lags in which the pulse is searched

# Series over time: (name, bands, statistics). Quantiles are written q10, q50, q90.
_SERIES = (
    ("mel_db", _MEL_BANDS, "mean std q10 q90"),
    ("mel_rise", _WIDE_BANDS, "mean"),
    ("mel_fall", _WIDE_BANDS, "mean std q90"),
    ("mfcc", 20, "mean std q10 q90"),
    ("mfcc_delta", 20, "std"),
    ("chroma", 12, "mean std"),
    ("tonnetz", 6, "mean std"),
    ("spectral_contrast", 7, "mean std"),
    ("spectral_centroid", 1, "mean std q10 q50 q90"),
    ("spectral_bandwidth", 1, "mean std q10 q50 q90"),
    ("spectral_flatness_db", 1, "mean std q10 q50 q90"),
    ("spectral_rolloff", 1, "mean std q10 q50 q90"),
    ("zero_crossing_rate", 1, "mean std q10 q50 q90"),
    ("level_db", 1, "mean std q5 q10 q25 q50 q75 q90 q95"),
    ("level_db_delta", 1, "std q5 q25 q75 q95"),
    ("onset_strength", 1, "mean std q10 q50 q90"),
)
_SINGLE = """
    onset_rate tempo ioi_log_std ioi_log_q10 ioi_log_q50 ioi_log_q90
    attack_db_mean attack_db_std dip_db_mean dip_db_std decay_db_mean decay_db_std
    strokes_rate strokes_ioi_log_std strokes_ioi_log_q50 strokes_npvi strokes_rubato
    strokes_pulse_clarity strokes_pulse_log_lag
    strokes_strength_mean strokes_strength_std strokes_strength_q10 strokes_strength_q90
    strokes_width_mean strokes_width_std strokes_width_q10 strokes_width_q90
    strokes_between_q10 strokes_between_q50 strokes_between_q75
    silent_share level_slow_1s_std level_slow_1s_range level_slow_1s_trend
    level_slow_3s_std level_slow_3s_range level_slow_3s_trend
    chroma_kept_0.25s chroma_kept_0.5s chroma_kept_1s chroma_kept_2s key_clarity majorness
""".split()
# Key profiles of C major and C minor: Krumhansl and Kessler (1982).
_MAJOR = (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88)
_MINOR = (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17)


def audio_feature_names() -> tuple[str, ...]:
    """Names of `audio_features`, in its order: ``series[_band]_statistic``, then single values."""
    series = (
        f"{name}_{band}_{statistic}" if bands > 1 else f"{name}_{statistic}"
        for name, bands, statistics in _SERIES
        for statistic in statistics.split()
        for band in range(bands)
    )
    return (*series, *_SINGLE)


def audio_features(wave: np.ndarray, sample_rate: int = 22_050) -> dict[str, float]:
    """Statistics over time of log-mel, MFCC, chroma, spectral shape, level and onset strength, all
    of one STFT; of onsets and the level between them; of the slow level curve and of harmony.

    Chroma assumes the tuning A4 = 440 Hz. With fewer than two onsets, the inter-onset interval is
    the duration, which is not a feature itself: it depends on where a clip was cut.

    Args:
        wave: float32 (n,), checked by ``check_waveform``; ``sample_rate`` at least 12,800 Hz.

    Returns:
        Finite values in the order of `audio_feature_names`, in the unit that the name states.
    """
    import librosa  # here: with numba it takes a second, and spectrograms do not need it

    feature: Any = librosa.feature
    rate = sample_rate / _HOP  # frames per second

    # --- Series over time: (bands, n_frames) or (n_frames,)
    magnitude = np.abs(librosa.stft(wave, n_fft=_N_FFT, hop_length=_HOP))
    bins: dict[str, Any] = {"S": magnitude, "sr": sample_rate}
    mel = feature.melspectrogram(S=magnitude**2, sr=sample_rate, n_fft=_N_FFT)
    mel_db = _decibel(mel)
    steps = np.diff(_banded_db(mel, _WIDE_BANDS), axis=1)
    mfcc = feature.mfcc(S=mel_db, n_mfcc=20)
    chroma = feature.chroma_stft(S=magnitude**2, sr=sample_rate, tuning=0.0)
    centroid = feature.spectral_centroid(**bins)
    rms = feature.rms(S=magnitude, frame_length=_N_FFT)
    level = librosa.amplitude_to_db(rms, ref=1.0, top_db=None)[0]
    onset_strength = librosa.onset.onset_strength(S=mel_db, sr=sample_rate, hop_length=_HOP)
    series = {
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
        "spectral_flatness_db": _decibel(feature.spectral_flatness(S=magnitude)),
        "spectral_rolloff": feature.spectral_rolloff(**bins),
        "zero_crossing_rate": feature.zero_crossing_rate(
            wave, frame_length=_N_FFT, hop_length=_HOP
        ),
        "level_db": level,
        "level_db_delta": np.diff(level),
        "onset_strength": onset_strength,
    }
    values: list[float] = []
    for name, _, statistics in _SERIES:
        rows = np.atleast_2d(series[name])
        for statistic in statistics.split():
            if statistic.startswith("q"):
                values += [*np.quantile(rows, int(statistic[1:]) / 100, axis=1)]
            else:
                values += [*getattr(np, statistic)(rows, axis=1)]

    # --- Onset rate, tempo; of log inter-onset intervals: std, quantiles; rise at onsets and fall
    # before the next (dB), its rate (dB/s)
    times: dict[str, Any] = {"sr": sample_rate, "hop_length": _HOP}
    onsets = librosa.onset.onset_detect(onset_envelope=onset_strength, **times)
    tempo = feature.tempo(onset_envelope=onset_strength, **times)[0]
    values += [len(onsets) * sample_rate / len(wave), tempo]
    if len(onsets) < 2:
        onsets = np.array([0, len(level) - 1])
    intervals = np.log(np.maximum(np.diff(onsets), 1) / rate)
    values += [intervals.std(), *np.quantile(intervals, (0.1, 0.5, 0.9))]
    attacks, dips, decays = [], [], []
    for onset, following in zip(onsets[:-1], onsets[1:], strict=True):
        before = level[max(onset - _AROUND_ONSET, 0) : onset + 1]
        peak = onset + np.argmax(level[onset : min(onset + _AROUND_ONSET, following) + 1])
        attacks.append(level[peak] - before.min())
        lowest = peak + np.argmin(level[peak : following + 1])
        dips.append(level[peak] - level[lowest])
        decays.append(dips[-1] / max(lowest - peak, 1) * rate)
    values += [f(changes) for changes in (attacks, dips, decays) for f in (np.mean, np.std)]

    # --- Timing and evenness of onsets, from spectral flux in short windows: rate; std and median
    # of log inter-onset intervals; their variability from one to the next, overall (nPVI / 100) and
    # between similar intervals
    flux = librosa.onset.onset_strength(y=wave, sr=sample_rate, **_FINE)
    fine_rate = sample_rate / _FINE["hop_length"]
    loud = max(float(np.quantile(flux, 0.99)), 1e-6)
    peaks, _ = scipy.signal.find_peaks(
        flux, height=0.15 * loud, prominence=0.1 * loud, distance=round(_APART * fine_rate)
    )
    strengths = flux[peaks] / loud
    widths = scipy.signal.peak_widths(flux, peaks)[0] / fine_rate  # wide for spread chords
    if len(peaks) < 2:
        peaks = np.array([0, len(flux) - 1])
        strengths, widths = np.ones(1), np.zeros(1)
    fine = np.log(np.diff(peaks) / fine_rate)
    changes = np.diff(fine) if len(fine) > 1 else np.zeros(1)
    alike = changes[np.abs(changes) < _ALIKE * np.log(2)]
    values += [len(peaks) * fine_rate / len(flux), fine.std(), np.median(fine)]
    rubato = np.sqrt(np.mean(alike**2)) if len(alike) else 0.0
    values += [2 * np.abs(np.tanh(changes / 2)).mean(), rubato]

    # ... height and log lag of the autocorrelation peak of the flux. Not librosa's, which warns
    # with NumPy 2.5 (numba casts an uninitialised output).
    first, last = (round(seconds * fine_rate) for seconds in _PULSE)
    centred = flux - flux.mean()
    together = scipy.signal.correlate(centred, centred, method="fft")[len(flux) - 1 :][: last + 1]
    if together[0] < 1e-9 or len(together) <= first:
        values += [0.0, 0.0]
    else:
        lag = first + int(np.argmax(together[first:]))
        values += [together[lag] / together[0], np.log(lag / fine_rate)]

    # ... of onset strengths and widths (seconds): mean, std and deciles; quantiles of the flux
    for one in (strengths, widths):
        values += [one.mean(), one.std(), *np.quantile(one, (0.1, 0.9))]
    values += [*np.quantile(flux / loud, (0.1, 0.5, 0.75))]

    # --- Share of silent frames; of the smoothed level: std, range between deciles 1 and 9 (dB),
    # total trend (dB)
    quiet = level.max() - _QUIET_DB
    values += [(level < quiet).mean()]
    for seconds in _SLOW:
        size = max(round(seconds * rate), 1)
        slow = scipy.ndimage.uniform_filter1d(np.maximum(level, quiet), size, mode="nearest")
        low, high = np.quantile(slow, (0.1, 0.9))
        values += [slow.std(), high - low, np.polyfit(np.linspace(0, 1, len(slow)), slow, 1)[0]]

    # --- Cosine similarity of the chroma at each lag (high with blurred pedal), key
    unit = chroma / np.maximum(np.linalg.norm(chroma, axis=0), 1e-9)
    for lag in (min(round(lag * rate), unit.shape[1] - 1) for lag in _LAGS):
        values += [np.sum(unit[:, lag:] * unit[:, : unit.shape[1] - lag], axis=0).mean()]
    values += key_fit(chroma.mean(axis=1))
    return dict(zip(audio_feature_names(), map(float, values), strict=True))


def _decibel(power: np.ndarray) -> np.ndarray:
    import librosa

    return librosa.power_to_db(power, ref=1.0, top_db=None)


def _banded_db(mel: np.ndarray, bands: int) -> np.ndarray:
    """Power mel (128, n_frames) -> level of groups of equally many bands, dB (bands, n_frames)."""
    return _decibel(mel.reshape(bands, -1, mel.shape[1]).mean(axis=1))


def key_fit(pitch_classes: np.ndarray) -> tuple[float, float]:
    """Key clarity and majorness of pitch-class weights (12,) from C: (best correlation, best major
    - best minor); equal weights give (0, 0). The Krumhansl-Schmuckler algorithm: Krumhansl (1990),
    *Cognitive Foundations of Musical Pitch*, chapter 4."""
    spread = pitch_classes - pitch_classes.mean()
    size = np.linalg.norm(spread)
    if size < 1e-9:
        return 0.0, 0.0
    best = []
    for profile in (_MAJOR, _MINOR):
        fit = np.array(profile) - np.mean(profile)
        correlation = max(float(np.roll(fit, key) @ spread) for key in range(12))
        best.append(correlation / (np.linalg.norm(fit) * size))
    return float(max(best)), float(best[0] - best[1])
