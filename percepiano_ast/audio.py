"""Recordings to log-mel spectrograms: load, check, resample, log-mel, 8-bit codes.

Levels are absolute (dB of full-scale power), never normalised per recording: loudness is a rated quality. There are two
front ends: ours, as librosa computes it, and Kaldi's, with which the published AST and SSAST models were trained.
"""

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import librosa
import numpy as np
import scipy.fft
import scipy.sparse
import soundfile
import soxr

from percepiano_ast.config import KALDI, FrontEnd, InputError

SILENCE_DB = -80.0  # dBFS: a recording that never rises above this is silent
MIN_SECONDS = 1.0

_READ_FRAMES = 1 << 18  # frames decoded at a time: 6 s at 44.1 kHz, a few MB
_MEL_FRAMES = 256  # STFT frames at a time: their spectra stay in the cache
_PREEMPHASIS = 0.97  # Kaldi's
_DB_PER_NEPER = np.float32(10 / np.log(10))  # of power
_UNKNOWN_SIZE = (0, 0xFFFFFFFF)  # what encoders that write to a pipe declare as the length of WAV data


def load(
    source: str | Path | BinaryIO, sample_rate: int = 22_050, *, max_seconds: float | None = None
) -> np.ndarray:
    """Read a recording as mono at ``sample_rate``: the mean of its channels, resampled by soxr at high quality.

    Reads what libsndfile reads: WAV of 8 to 32 bits or float, FLAC, OGG, MP3. Decodes block by block, so that memory
    grows with the mono result alone.

    Args:
        source: path, or a seekable binary file object.
        max_seconds: read the first so many seconds only.

    Returns:
        float32 (n,), full scale at 1.

    Raises:
        InputError: missing, not audio, cut off before its end, or refused by ``check_waveform``.
    """
    name = str(source) if isinstance(source, (str, Path)) else str(getattr(source, "name", None) or "audio data")
    if isinstance(source, (str, Path)) and not Path(source).is_file():
        raise InputError(f"{name}: no such file. Check the path.")
    try:
        with soundfile.SoundFile(source) as file:
            wave = _resampled(file, name, sample_rate, max_seconds)
    except soundfile.LibsndfileError as error:
        raise InputError(
            f"{name}: cannot be read as audio ({error.error_string.rstrip('.')}). "
            "Give a complete WAV, FLAC, OGG or MP3 file, or copy it again."
        ) from error
    check_waveform(wave, sample_rate, name)
    return wave


def _resampled(file: soundfile.SoundFile, name: str, sample_rate: int, max_seconds: float | None) -> np.ndarray:
    """The open file as float32 mono (n,) at ``sample_rate``."""
    _check_complete_wav(file, name)
    wanted = file.frames if max_seconds is None else min(file.frames, round(max_seconds * file.samplerate))
    if not wanted:
        raise InputError(f"{name}: empty, it holds no samples. Record or copy it again.")
    blocks = _mono_blocks(file, name, wanted)
    if file.samplerate == sample_rate:
        return np.concatenate(list(blocks))
    stream = soxr.ResampleStream(file.samplerate, sample_rate, 1, dtype="float32", quality="HQ")
    parts = [stream.resample_chunk(block) for block in blocks]
    parts.append(stream.resample_chunk(np.empty(0, dtype=np.float32), last=True))
    return np.concatenate(parts)


def _check_complete_wav(file: soundfile.SoundFile, name: str) -> None:
    """libsndfile reads a half-written WAV file to its end without complaint; its log tells what the header declared.

    Raises:
        InputError: the data are shorter than the header says.
    """
    declared = re.search(r"^data : (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)
    if not declared:
        return
    size, present = map(int, declared.groups())
    if size > present and size not in _UNKNOWN_SIZE:
        seconds = file.frames / file.samplerate * (size - present) / max(present, 1)
        raise InputError(
            f"{name}: half written, {size - present:,} of {size:,} bytes of sound are missing"
            f" (about {seconds:.1f} s at the end). Copy or export it again."
        )


def _mono_blocks(file: soundfile.SoundFile, name: str, wanted: int) -> Iterator[np.ndarray]:
    """The first ``wanted`` frames as float32 mono blocks (m,)."""
    done = 0
    while done < wanted:
        block = file.read(min(_READ_FRAMES, wanted - done), dtype="float32", always_2d=True)
        if not len(block):
            missing = (wanted - done) / file.samplerate
            raise InputError(
                f"{name}: half written, sound ends {missing:.1f} s before the length it declares"
                f" ({wanted / file.samplerate:.1f} s). Copy or export it again."
            )
        done += len(block)
        # Adding columns is some twenty times faster than a mean over the last axis.
        mono = block[:, 0].copy()
        for channel in range(1, block.shape[1]):
            mono += block[:, channel]
        mono /= block.shape[1]
        yield mono


def check_waveform(wave: np.ndarray, sample_rate: int, name: str) -> None:
    """Refuse what cannot be rated or learned from.

    Args:
        wave: float (n,), full scale at 1.
        name: what the message calls the recording.

    Raises:
        InputError: empty, shorter than ``MIN_SECONDS``, with NaN or infinity, or silent throughout.
    """
    if not len(wave):
        raise InputError(f"{name}: empty, it holds no samples. Record or copy it again.")
    if len(wave) < MIN_SECONDS * sample_rate:
        seconds = len(wave) / sample_rate
        raise InputError(f"{name}: {seconds:.2f} s long. Give a recording of at least {MIN_SECONDS:g} s.")
    finite = np.isfinite(wave)
    if not finite.all():
        seconds = np.argmin(finite) / sample_rate
        raise InputError(f"{name}: holds NaN or infinity, first near {seconds:.2f} s. Export it again.")
    peak = max(float(wave.max()), -float(wave.min()))
    if peak < 10 ** (SILENCE_DB / 20):
        level = f"peaks at {20 * np.log10(peak):.0f} dBFS" if peak else "holds zeros only"
        raise InputError(f"{name}: silent, it {level}. Check microphone and level, and record it again.")


# --- Log-mel ----------------------------------------------------------------------------------------------------------


def log_mel(wave: np.ndarray, front_end: FrontEnd = FrontEnd()) -> np.ndarray:
    """Log-mel spectrogram of the front end's ``kind``: ``slaney`` as librosa computes it, ``kaldi`` see `fbank`.

    Args:
        wave: float32 (n,) at ``front_end.sample_rate``.

    Returns:
        float32 (n_frames, n_mels) in dB: ``10 log10(max(S, amin))``.

    Raises:
        InputError: unknown kind; with ``kaldi``, a wave shorter than one window.
    """
    if front_end.kind == "slaney":
        return _slaney(wave, front_end)
    if front_end.kind == "kaldi":
        return fbank(wave, front_end) * _DB_PER_NEPER
    raise InputError(f"unknown front end {front_end.kind!r}. Choose one of: slaney, kaldi.")


@functools.lru_cache(maxsize=8)
def _window_and_basis(front_end: FrontEnd):
    """Hann window float32 (win_length,) and mel filters as a sparse float32 matrix (n_mels, 1 + n_fft // 2)."""
    window = librosa.filters.get_window("hann", front_end.win_length, fftbins=True).astype(np.float32)
    basis = librosa.filters.mel(
        sr=front_end.sample_rate,
        n_fft=front_end.n_fft,
        n_mels=front_end.n_mels,
        fmin=front_end.fmin,
        fmax=front_end.fmax,
    )
    return window, scipy.sparse.csr_array(basis.astype(np.float32))


def _slaney(wave: np.ndarray, front_end: FrontEnd) -> np.ndarray:
    """Log-mel spectrogram as librosa computes it (power, Slaney-normalised bands, centred frames, zero padding).

    Frame k is centred on sample ``k * hop_length``. This outruns the reference for two reasons. Power does not depend
    on where the window lies in the transform, so only ``win_length`` samples are multiplied, not ``n_fft``. And a
    frequency bin takes part in few filters, so the filter bank is a sparse product. The price is a transform
    in float32: over five minutes of rendered piano the largest difference from librosa was .0016 dB above -80 dB.
    """
    window, basis = _window_and_basis(front_end)
    # Samples of a window before its centre, where librosa pads the window to n_fft.
    before = front_end.n_fft // 2 - (front_end.n_fft - front_end.win_length) // 2
    n_frames = front_end.n_frames(len(wave))
    last = (n_frames - 1) * front_end.hop_length
    padded = np.zeros(max(last + front_end.win_length, before + len(wave)), dtype=np.float32)
    padded[before : before + len(wave)] = wave
    frames = np.lib.stride_tricks.sliding_window_view(padded, front_end.win_length)[:: front_end.hop_length]
    result = np.empty((n_frames, front_end.n_mels), dtype=np.float32)
    for start in range(0, n_frames, _MEL_FRAMES):
        block = slice(start, min(start + _MEL_FRAMES, n_frames))
        spectra = scipy.fft.rfft(frames[block] * window, front_end.n_fft)
        power = spectra.real**2 + spectra.imag**2
        result[block] = (basis @ power.T).T
    np.maximum(result, front_end.amin, out=result)
    np.log10(result, out=result)
    result *= 10
    return result


# --- Kaldi's filter bank ----------------------------------------------------------------------------------------------


def kaldi_mel_bank(front_end: FrontEnd = KALDI) -> np.ndarray:
    """Triangles of height 1, evenly spaced on Kaldi's mel scale ``1127 ln(1 + f / 700)``: float32 (n_mels, n_fft // 2).

    Column k weighs the power at ``k * sample_rate / n_fft`` Hz; the bin at Nyquist has no weight and no column. In
    float32, as ``torchaudio.compliance.kaldi.get_mel_banks`` has it: at these magnitudes one rounding of the mel scale
    moves a weight by 1e-5, and nearly all agree bit by bit, which double precision would not.
    """
    low, high = (1127 * np.log(1 + np.array([front_end.fmin, front_end.fmax]) / 700)).tolist()
    edges = np.float32(low) + np.arange(front_end.n_mels + 2, dtype=np.float32) * np.float32(
        (high - low) / (front_end.n_mels + 1)
    )
    left, centre, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    hertz = np.float32(front_end.sample_rate / front_end.n_fft) * np.arange(front_end.n_fft // 2, dtype=np.float32)
    ratio = (1 + hertz / np.float32(700)).astype(np.float64)
    mel = np.float32(1127) * np.log(ratio).astype(np.float32)  # rounded once: float32 logarithms differ by machine
    return np.maximum(0, np.minimum((mel - left) / (centre - left), (right - mel) / (right - centre)))


@functools.lru_cache(maxsize=8)
def _kaldi_window_and_bank(front_end: FrontEnd):
    """Symmetric Hann window float32 (win_length,) and `kaldi_mel_bank` as a sparse matrix."""
    phase = np.arange(front_end.win_length, dtype=np.float32) * np.float32(2 * np.pi / (front_end.win_length - 1))
    window = np.float32(0.5) - np.float32(0.5) * np.cos(phase.astype(np.float64)).astype(np.float32)
    return window, scipy.sparse.csr_array(kaldi_mel_bank(front_end))


def fbank(wave: np.ndarray, front_end: FrontEnd = KALDI) -> np.ndarray:
    """Kaldi's log filter bank with the settings of AST (Gong et al. 2021, ``dataloader.py``): no dither, no energy.

    The clip's mean is removed; whole windows only, frame k starting at sample ``k * hop_length``; in each the mean is
    removed, then pre-emphasis .97 (the first sample stands for its own predecessor), a symmetric Hann window, and
    the power spectrum into `kaldi_mel_bank`. Samples, window and bank are float32 as in
    ``torchaudio.compliance.kaldi.fbank``, transforms and sums in double precision. What remains between the two is the
    rounding of that float32 transform: nine values of ten agree within 1e-5; a band some 70 dB below the loudest of its
    frame may differ by 3e-4 (1.3e-3 dB), no more than torchaudio does from one machine to another.

    Args:
        wave: float32 (n,) at ``front_end.sample_rate``, full scale at 1.

    Returns:
        float32 (n_frames, n_mels): natural logarithm of ``max(energy, amin)``.

    Raises:
        InputError: shorter than one window.
    """
    n_frames = front_end.n_frames(len(wave)) if len(wave) >= front_end.win_length else 0
    if not n_frames:
        raise InputError(
            f"{len(wave)} samples are shorter than one window of {front_end.win_length} "
            f"({1000 * front_end.win_length / front_end.sample_rate:.0f} ms); give a longer recording."
        )
    window, bank = _kaldi_window_and_bank(front_end)
    wave = np.asarray(wave, dtype=np.float32)
    mean = wave.mean(dtype=np.float64).astype(np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(wave, front_end.win_length)[:: front_end.hop_length]
    result = np.empty((n_frames, front_end.n_mels), dtype=np.float32)
    for start in range(0, n_frames, _MEL_FRAMES):
        block = slice(start, min(start + _MEL_FRAMES, n_frames))
        frames = windows[block] - mean
        frames -= frames.mean(axis=1, keepdims=True)
        before = np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
        frames = (frames - np.float32(_PREEMPHASIS) * before) * window
        spectra = scipy.fft.rfft(frames.astype(np.float64), front_end.n_fft)[:, :-1]  # without Nyquist
        result[block] = (bank @ (spectra.real**2 + spectra.imag**2).T).T
    np.maximum(result, np.float32(front_end.amin), out=result)
    return np.log(result, out=result)


# --- 8-bit codes ------------------------------------------------------------------------------------------------------


def quantize(log_mel: np.ndarray, front_end: FrontEnd = FrontEnd()) -> tuple[np.ndarray, float]:
    """Levels in dB to uint8 codes in steps of ``front_end.step_db`` from ``front_end.floor_db``.

    Returns:
        Codes of the same shape, and the share of values above the range. What lies below it is inaudible and becomes
        the floor; what lies above would be lost, so a caller reports the share where it is not zero.
    """
    codes = np.rint((log_mel - np.float32(front_end.floor_db)) / np.float32(front_end.step_db))
    clipped = float(np.mean(codes > 255)) if codes.size else 0.0
    return np.clip(codes, 0, 255).astype(np.uint8), clipped


def dequantize(codes: np.ndarray, front_end: FrontEnd = FrontEnd()) -> np.ndarray:
    """Codes to float32 dB; within half a step of what was quantized."""
    return codes.astype(np.float32) * np.float32(front_end.step_db) + np.float32(front_end.floor_db)


# --- Classic features -------------------------------------------------------------------------------------------------

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
