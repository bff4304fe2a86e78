"""Decode recordings to mono waveforms: streamed in blocks and validated, with a message for each
unusable file."""

import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soxr

from percepiano_ast.audio import ffmpeg, sndfile
from percepiano_ast.errors import InputError

SILENCE_DB = -80.0  # dBFS: a recording whose peak is below this is silent
MIN_SECONDS = 1.0

Source = str | Path | BinaryIO | io.RawIOBase

_READ_FRAMES = 1 << 17  # frames per block: 3 s at 44.1 kHz, 1 MB
_PIECE = 1 << 20  # bytes
_INT16 = 32768  # full scale of 16-bit samples
# samples of at least this magnitude are at full scale: the last 16-bit step on either side
_LOUDEST = (_INT16 - 1) / _INT16


class Recording:
    """A recording, decoded once in order, in constant memory.

    Formats: those of libsndfile (WAV of 8 to 32 bits or float, FLAC, OGG, MP3); from a path also
    those of ffmpeg (M4A, AAC, WMA).

    Args:
        source: path, seekable binary file object, or forward-only binary object (``seekable()`` is
            False). From the latter, WAV and FLAC are decoded as a stream, other formats are read
            completely first; its attribute ``size`` in bytes is used if present.
        name: the recording's name in messages.
        min_rate: lowest accepted sampling rate in Hz.

    Attributes:
        sample_rate, channels: of the source.
        peak: largest magnitude of the blocks so far, full scale at 1; of the whole recording after
            the last block.

    Raises:
        InputError: missing, not audio, truncated, or below ``min_rate``.
    """

    def __init__(self, source: Source, *, name: str | None = None, min_rate: int = 0):
        stream = None if isinstance(source, (str, Path)) else source
        self.name = name or str(
            source if stream is None else getattr(stream, "name", None) or "audio data"
        )
        self._once = None if stream is None or stream.seekable() else stream
        try:
            self._decoder = _decoder(source, self.name)
        except InputError:
            self._read_to_end()
            raise
        self.sample_rate, self.channels = self._decoder.sample_rate, self._decoder.channels
        self.peak = 0.0
        self._frames = self._loudest = 0
        if self.sample_rate < min_rate:
            self._decoder.close()
            raise InputError(
                f"{self.name}: recorded at {self.sample_rate:,} Hz; at least {min_rate:,} Hz is"
                " needed."
            )

    @property
    def seconds(self) -> float:
        """Duration decoded so far; of the whole recording after the last block."""
        return self._frames / self.sample_rate

    @property
    def full_scale(self) -> float:
        """Share of samples decoded so far, over all channels, with a magnitude of 32767/32768 or
        more."""
        return self._loudest / max(self._frames * self.channels, 1)

    def blocks(self, sample_rate: int, *, max_seconds: float | None = None) -> Iterator[np.ndarray]:
        """Decode the recording, possible only once: the mean of its channels, resampled by soxr at
        high quality.

        A forward-only source is always read to its end, where it may verify a checksum; also if the
        recording is refused, so that damage is reported as damage. Exceptions of the source pass
        unchanged.

        Args:
            max_seconds: decode only the first ``max_seconds``.

        Yields:
            float32 (n,) at ``sample_rate``, full scale at 1.

        Raises:
            InputError: truncated, damaged, or refused by `check_waveform`; a short or silent
                recording is detected after the last block.
        """
        n = 0
        try:
            for block in self._resampled(sample_rate, max_seconds):
                self.peak = max(self.peak, _peak(block, n, sample_rate, self.name))
                n += len(block)
                yield block
            _check_length(n, sample_rate, self.name)
            _check_level(self.peak, self.name)
        except InputError:
            self._read_to_end()
            raise
        finally:
            self._decoder.close()

    def _resampled(self, sample_rate: int, max_seconds: float | None) -> Iterator[np.ndarray]:
        """Non-empty mono blocks at ``sample_rate``."""
        mono = map(_mono, self._samples(max_seconds))
        if sample_rate == self.sample_rate:
            yield from mono
            return
        stream = soxr.ResampleStream(
            self.sample_rate, sample_rate, 1, dtype="float32", quality="HQ"
        )
        for block in mono:
            if len(part := stream.resample_chunk(block)):
                yield part
        if len(part := stream.resample_chunk(np.empty(0, dtype=np.float32), last=True)):
            yield part

    def _samples(self, max_seconds: float | None) -> Iterator[np.ndarray]:
        """Blocks (n, channels) as decoded, int16 or float32; counts their frames and detects
        truncation."""
        limit = math.inf if max_seconds is None else round(max_seconds * self.sample_rate)
        declared = math.inf if self._decoder.frames is None else self._decoder.frames
        wanted = min(declared, limit)
        while self._frames < wanted:
            block = self._decoder.read(int(min(_READ_FRAMES, wanted - self._frames)))
            if not len(block):
                break
            self._frames += len(block)
            self._loudest += _at_full_scale(block)
            yield block
        if self._frames < wanted and declared < math.inf:
            raise InputError(
                f"{self.name}: truncated, the audio ends"
                f" {(wanted - self._frames) / self.sample_rate:.1f} s before the length it declares"
                f" ({wanted / self.sample_rate:.1f} s). Copy or export it again."
            )
        if self._frames < limit:
            self._read_to_end()

    def _read_to_end(self) -> None:
        while self._once and self._once.read(_PIECE):
            pass


def _decoder(source: Source, name: str) -> sndfile.Decoder | ffmpeg.Decoder:
    """libsndfile's decoder; ffmpeg's for a path of a format that libsndfile does not support."""
    if not isinstance(source, (str, Path)):
        return sndfile.Decoder(source, name)
    _check_exists(source, name)
    try:
        return sndfile.Decoder(source, name)
    except sndfile.UnknownFormat:
        return ffmpeg.Decoder(source, name)


def _check_exists(path: str | Path, name: str) -> None:
    if "://" in str(path):
        raise InputError(f"{name}: an address. Download the recording and name the file.")
    if Path(path).is_dir():
        raise InputError(
            f"{name}: a folder without a recording. Name a recording, or a folder that holds some."
        )
    if not Path(path).is_file():
        raise InputError(f"{name}: no such file. Check the path.")


def load(
    source: Source, sample_rate: int = 22_050, *, max_seconds: float | None = None
) -> np.ndarray:
    """Load a recording as mono at ``sample_rate``: the blocks of `Recording` in one array.

    Args:
        source: path or binary file object, see `Recording`.
        max_seconds: load only the first ``max_seconds``.

    Returns:
        float32 (n,), full scale at 1.

    Raises:
        InputError: missing, not audio, truncated, or refused by `check_waveform`.
    """
    return np.concatenate(list(Recording(source).blocks(sample_rate, max_seconds=max_seconds)))


def duration(path: str | Path) -> float:
    """Duration in seconds from a recording's header; a recording whose header has no length is
    decoded.

    Raises:
        InputError: missing, not audio, or of a format that needs ffmpeg if ffmpeg is not installed.
    """
    _check_exists(path, str(path))
    try:
        seconds = sndfile.duration(path)
    except sndfile.UnknownFormat:
        return ffmpeg.duration(path)
    if seconds is None:
        recording = Recording(path)
        for _ in recording.blocks(recording.sample_rate):
            pass
        seconds = recording.seconds
    return seconds


def check_waveform(wave: np.ndarray, sample_rate: int, name: str) -> None:
    """Refuse a waveform that is unusable for rating and training.

    Args:
        wave: float (n,), full scale at 1.
        name: the recording's name in messages.

    Raises:
        InputError: empty, shorter than ``MIN_SECONDS``, with NaN or infinity, or silent throughout.
    """
    _check_length(len(wave), sample_rate, name)
    _check_level(_peak(wave, 0, sample_rate, name), name)


def _check_length(n: int, sample_rate: int, name: str) -> None:
    if not n:
        raise InputError(f"{name}: empty, it holds no samples. Record or copy it again.")
    if n < MIN_SECONDS * sample_rate:
        raise InputError(
            f"{name}: {n / sample_rate:.2f} s long. Give a recording of at least {MIN_SECONDS:g} s."
        )


def _peak(block: np.ndarray, start: int, sample_rate: int, name: str) -> float:
    """Largest magnitude of a block that starts at sample ``start``; NaN and infinity are
    refused."""
    peak = max(float(block.max()), -float(block.min()))
    if not np.isfinite(peak):  # the maximum of NaN and anything is NaN
        seconds = (start + np.argmin(np.isfinite(block))) / sample_rate
        raise InputError(
            f"{name}: holds NaN or infinity, first near {seconds:.2f} s. Export it again."
        )
    return peak


def _check_level(peak: float, name: str) -> None:
    if peak < 10 ** (SILENCE_DB / 20):
        level = f"peaks at {20 * np.log10(peak):.0f} dBFS" if peak else "holds zeros only"
        raise InputError(
            f"{name}: silent, it {level}. Check microphone and level, and record it again."
        )


def _mono(block: np.ndarray) -> np.ndarray:
    """Mean of the channels of int16 or float32 (n, channels): float32 (n,), full scale at 1."""
    full_scale = _INT16 if block.dtype == np.int16 else 1
    samples = block.astype(np.float32, copy=False)
    # Adding columns is about twenty times faster than a mean over the last axis.
    mono = samples[:, 0].copy()
    for channel in range(1, samples.shape[1]):
        mono += samples[:, channel]
    mono /= np.float32(samples.shape[1] * full_scale)
    return mono


def _at_full_scale(block: np.ndarray) -> int:
    """Number of samples of a block, int16 or float32, at full scale."""
    loudest = _INT16 - 1 if block.dtype == np.int16 else np.float32(_LOUDEST)
    if block.max() < loudest and block.min() > -loudest:  # the usual case
        return 0
    return int(np.count_nonzero((block >= loudest) | (block <= -loudest)))
