"""Log-mel spectrograms, librosa's and Kaldi's, and their 8-bit codes."""

import functools
from collections.abc import Iterable, Iterator

import numpy as np
import scipy.sparse

from percepiano_ast.config import KALDI, FrontEnd
from percepiano_ast.errors import InputError

_MEL_FRAMES = 256  # STFT frames per block: their spectra fit in the CPU cache
_PREEMPHASIS = 0.97  # Kaldi's
_DB_PER_NEPER = np.float32(10 / np.log(10))  # of power


def log_mel(wave: np.ndarray, front_end: FrontEnd = FrontEnd()) -> np.ndarray:
    """Log-mel spectrogram of the front end's ``kind``: ``slaney`` as in librosa, ``kaldi`` see
    `fbank`.

    ``slaney``: power, bands normalised by their width, frame k centred on sample ``k *
    hop_length``, zero padding. The difference from librosa 0.11 is less than 1e-3 dB, at levels of
    -80 dB or more and also below, down to ``amin``: both compute the FFT in double precision.

    Args:
        wave: float32 (n,) at ``front_end.sample_rate``.

    Returns:
        float32 (n_frames, n_mels) in dB: ``10 log10(max(S, amin))``.

    Raises:
        InputError: unknown kind; with ``kaldi``, a wave shorter than one window.
    """
    return np.concatenate(list(log_mel_blocks([wave], front_end)))


def log_mel_blocks(
    blocks: Iterable[np.ndarray], front_end: FrontEnd = FrontEnd()
) -> Iterator[np.ndarray]:
    """`log_mel` of a wave given in blocks, in the memory of one block; the result is bit-identical
    for any block sizes.

    With ``kaldi`` the whole wave is collected first, because its mean is removed.

    Args:
        blocks: float32 (n,) at ``front_end.sample_rate``.

    Yields:
        float32 (m, n_mels), the consecutive frames of the spectrogram.

    Raises:
        InputError: as `log_mel`.
    """
    if front_end.kind == "slaney":
        yield from _slaney(blocks, front_end)
    elif front_end.kind == "kaldi":
        yield fbank(np.concatenate(list(blocks)), front_end) * _DB_PER_NEPER
    else:
        raise InputError(f"unknown front end {front_end.kind!r}. Choose one of: slaney, kaldi.")


# --- librosa's mel spectrogram ------------------------------------------------------------------


def slaney_mel_bank(front_end: FrontEnd = FrontEnd()) -> np.ndarray:
    """Triangles of area 1 on Slaney's mel scale, as in ``librosa.filters.mel``: float64 (n_mels, 1
    + n_fft // 2).

    Implemented here because importing librosa's takes a second in every worker process.
    """
    low, high = _slaney_mel(np.array([front_end.fmin, front_end.fmax]))
    edges = _hertz(np.linspace(low, high, front_end.n_mels + 2))
    bins = np.arange(1 + front_end.n_fft // 2) * (front_end.sample_rate / front_end.n_fft)
    left, centre, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    triangles = np.maximum(
        0, np.minimum((bins - left) / (centre - left), (right - bins) / (right - centre))
    )
    return triangles * 2 / (right - left)


def band_centres(front_end: FrontEnd = FrontEnd()) -> np.ndarray:
    """Centre frequency of each mel band in Hz, float64 (n_mels,), ascending."""
    ends = np.array([front_end.fmin, front_end.fmax])
    if front_end.kind == "kaldi":
        low, high = 1127 * np.log(1 + ends / 700)
        return 700 * np.expm1(np.linspace(low, high, front_end.n_mels + 2)[1:-1] / 1127)
    low, high = _slaney_mel(ends)
    return _hertz(np.linspace(low, high, front_end.n_mels + 2))[1:-1]


_LINEAR = 3 / 200  # mel per hertz up to 1 kHz; above, 27 mel for every factor of 6.4
_LOGARITHMIC = 27 / np.log(6.4)


def _slaney_mel(hertz: np.ndarray) -> np.ndarray:
    return np.where(
        hertz < 1000, _LINEAR * hertz, 15 + _LOGARITHMIC * np.log(np.maximum(hertz, 1000) / 1000)
    )


def _hertz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, mel / _LINEAR, 1000 * np.exp((mel - 15) / _LOGARITHMIC))


@functools.lru_cache(maxsize=8)
def _slaney_window_and_bank(front_end: FrontEnd):
    """Periodic Hann window float64 (win_length,) and `slaney_mel_bank` as a sparse matrix."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(front_end.win_length) / front_end.win_length)
    return window, scipy.sparse.csr_array(slaney_mel_bank(front_end))


def _slaney(blocks: Iterable[np.ndarray], front_end: FrontEnd) -> Iterator[np.ndarray]:
    """`log_mel_blocks` of kind ``slaney``, in fixed groups of ``_MEL_FRAMES`` frames, counted from
    the first."""
    hop, window = front_end.hop_length, front_end.win_length
    # Samples of a window before its centre, where librosa pads the window to n_fft.
    before = front_end.n_fft // 2 - (front_end.n_fft - window) // 2
    group = (_MEL_FRAMES - 1) * hop + max(window, hop)  # samples
    transform = _Transform(front_end)
    waiting, n_waiting, n, done = [np.zeros(before, dtype=np.float32)], before, 0, 0
    for block in blocks:
        waiting.append(np.asarray(block, dtype=np.float32))
        n_waiting, n = n_waiting + len(block), n + len(block)
        if n_waiting < group:
            continue
        samples = np.concatenate(waiting)
        start = 0
        while start + group <= len(samples):
            yield transform(samples[start:], _MEL_FRAMES)
            start, done = start + _MEL_FRAMES * hop, done + _MEL_FRAMES
        waiting, n_waiting = [samples[start:].copy()], len(samples) - start
    left = front_end.n_frames(n) - done
    samples = np.concatenate(
        [*waiting, np.zeros(max((left - 1) * hop + window - n_waiting, 0), dtype=np.float32)]
    )
    for start in range(0, left, _MEL_FRAMES):
        yield transform(samples[start * hop :], min(_MEL_FRAMES, left - start))


class _Transform:
    """Convert samples to levels, one group of frames at a time.

    This is faster than librosa for two reasons. Power does not depend on the window's position
    within the FFT, so only ``win_length`` samples are multiplied, not ``n_fft``. Each frequency bin
    contributes to few bands, so the filter bank is a sparse matrix. The large arrays are reused,
    because allocating them for every group can take longer than the FFT. A float32 FFT would be
    faster, but its error for a quiet band next to a loud one is up to 0.03 dB.
    """

    def __init__(self, front_end: FrontEnd):
        self._front_end = front_end
        self._window, self._bank = _slaney_window_and_bank(front_end)
        self._padded = np.zeros((_MEL_FRAMES, front_end.n_fft))  # zero after the window
        self._spectra = np.empty((_MEL_FRAMES, 1 + front_end.n_fft // 2), dtype=np.complex128)

    def __call__(self, samples: np.ndarray, n_frames: int) -> np.ndarray:
        """Levels in dB float32 (n_frames, n_mels) of the frames that start at ``samples[k *
        hop_length]``."""
        size, hop = self._front_end.win_length, self._front_end.hop_length
        padded, spectra = self._padded[:n_frames], self._spectra[:n_frames]
        frames = np.lib.stride_tricks.sliding_window_view(samples, size)[::hop]
        np.multiply(frames[:n_frames], self._window, out=padded[:, :size])
        np.fft.rfft(padded, out=spectra)
        power = spectra.real**2
        power += spectra.imag**2
        levels = np.empty((n_frames, self._front_end.n_mels), dtype=np.float32)
        levels[:] = (self._bank @ power.T).T
        np.maximum(levels, np.float32(self._front_end.amin), out=levels)
        np.log10(levels, out=levels)
        levels *= 10
        return levels


# --- Kaldi's filter bank ------------------------------------------------------------------------


def kaldi_mel_bank(front_end: FrontEnd = KALDI) -> np.ndarray:
    """Triangles of height 1, evenly spaced on Kaldi's mel scale ``1127 ln(1 + f / 700)``: float32
    (n_mels, n_fft // 2).

    Column k weights the power at ``k * sample_rate / n_fft`` Hz; the Nyquist bin has zero weight
    and no column. Computed in float32 like ``torchaudio.compliance.kaldi.get_mel_banks``: a
    rounding error of the mel scale changes a weight by 1e-5, and nearly all weights are
    bit-identical, which they would not be in double precision.
    """
    low, high = (1127 * np.log(1 + np.array([front_end.fmin, front_end.fmax]) / 700)).tolist()
    edges = np.float32(low) + np.arange(front_end.n_mels + 2, dtype=np.float32) * np.float32(
        (high - low) / (front_end.n_mels + 1)
    )
    left, centre, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    hertz = np.float32(front_end.sample_rate / front_end.n_fft) * np.arange(
        front_end.n_fft // 2, dtype=np.float32
    )
    ratio = (1 + hertz / np.float32(700)).astype(np.float64)
    # rounded once: float32 logarithms differ between machines
    mel = np.float32(1127) * np.log(ratio).astype(np.float32)
    return np.maximum(
        0, np.minimum((mel - left) / (centre - left), (right - mel) / (right - centre))
    )


@functools.lru_cache(maxsize=8)
def _kaldi_window_and_bank(front_end: FrontEnd):
    """Symmetric Hann window float32 (win_length,) and `kaldi_mel_bank` as a sparse matrix."""
    phase = np.arange(front_end.win_length, dtype=np.float32) * np.float32(
        2 * np.pi / (front_end.win_length - 1)
    )
    window = np.float32(0.5) - np.float32(0.5) * np.cos(phase.astype(np.float64)).astype(np.float32)
    return window, scipy.sparse.csr_array(kaldi_mel_bank(front_end))


def fbank(wave: np.ndarray, front_end: FrontEnd = KALDI) -> np.ndarray:
    """Kaldi's log filter bank with the settings of AST (Gong et al. 2021, ``dataloader.py``): no
    dither, no energy.

    The clip's mean is removed. Only complete windows are used; frame k starts at sample ``k *
    hop_length``. Per window: mean removal, pre-emphasis 0.97 (the first sample serves as its own
    predecessor), a symmetric Hann window, and the power spectrum through `kaldi_mel_bank`. Samples,
    window and bank are float32 as in ``torchaudio.compliance.kaldi.fbank``, FFT and sums double
    precision. The remaining difference is torchaudio's rounding in its float32 FFT: nine values of
    ten agree within 1e-5; a band some 70 dB below the loudest of its frame may differ by 3e-4
    (1.3e-3 dB), no more than torchaudio differs between machines.

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
            f"{len(wave)} samples are shorter than one window of {front_end.win_length}"
            f" ({1000 * front_end.win_length / front_end.sample_rate:.0f} ms). Give a longer"
            " recording."
        )
    window, bank = _kaldi_window_and_bank(front_end)
    wave = np.asarray(wave, dtype=np.float32)
    mean = wave.mean(dtype=np.float64).astype(np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(wave, front_end.win_length)[
        :: front_end.hop_length
    ]
    result = np.empty((n_frames, front_end.n_mels), dtype=np.float32)
    for start in range(0, n_frames, _MEL_FRAMES):
        block = slice(start, min(start + _MEL_FRAMES, n_frames))
        frames = windows[block] - mean
        frames -= frames.mean(axis=1, keepdims=True)
        before = np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
        frames = (frames - np.float32(_PREEMPHASIS) * before) * window
        spectra = np.fft.rfft(frames.astype(np.float64), front_end.n_fft)[:, :-1]  # without Nyquist
        result[block] = (bank @ (spectra.real**2 + spectra.imag**2).T).T
    np.maximum(result, np.float32(front_end.amin), out=result)
    return np.log(result, out=result)


# --- 8-bit codes --------------------------------------------------------------------------------


def quantize(log_mel: np.ndarray, front_end: FrontEnd = FrontEnd()) -> tuple[np.ndarray, float]:
    """Levels in dB to uint8 codes in steps of ``front_end.step_db`` from ``front_end.floor_db``.

    Returns:
        Codes of the same shape, and the share of values above the range. Values below the range are
        inaudible and set to ``floor_db``; values above are clipped, so callers report a non-zero
        share.
    """
    codes = log_mel - np.float32(front_end.floor_db)
    codes /= np.float32(front_end.step_db)
    np.rint(codes, out=codes)
    clipped = float(np.mean(codes > 255)) if codes.size else 0.0
    return np.clip(codes, 0, 255, out=codes).astype(np.uint8), clipped


def dequantize(codes: np.ndarray, front_end: FrontEnd = FrontEnd()) -> np.ndarray:
    """Codes to float32 dB; the quantization error is at most half a step."""
    return codes.astype(np.float32) * np.float32(front_end.step_db) + np.float32(front_end.floor_db)


def pad_window(codes: np.ndarray, n_frames: int) -> np.ndarray:
    """Pad (time, mel) codes at the end with code 0 (the lowest level) up to ``n_frames``."""
    return np.pad(codes, ((0, n_frames - len(codes)), (0, 0)))


def window_starts(length: int, n_frames: int) -> list[int]:
    """First frames of the windows of a clip of ``length`` frames: the hop is half a window, the
    last window ends with the clip."""
    last = max(length - n_frames, 0)
    return list(range(0, last, n_frames // 2)) + [last]
