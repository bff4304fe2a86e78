"""Decode recordings to mono, in blocks and bounded memory, or refuse them with the reason."""

import contextlib
import io
import math
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from percepiano_ast.errors import InputError
from percepiano_ast.files import printable

SILENCE_DB = -80.0  # dBFS: a recording whose peak is below this is silent
MIN_SECONDS = 1.0

Source = str | Path | BinaryIO | io.RawIOBase

_READ_FRAMES = 1 << 17  # frames per block: 3 s at 44.1 kHz, 1 MB
# full scale and the last 16-bit step below it, by the type of the samples
_FULL_SCALE = {"int16": (32_768, 32_767), "float32": (1, 32_767 / 32_768)}
_UNKNOWN_SIZE = (0, 0xFFFFFFFF)  # data lengths that encoders write to a pipe
_UNKNOWN_FORMAT = (1, 4)  # libsndfile's error codes for an unknown container or codec
_NO_LENGTH = 1 << 46  # frames: at least this many mean that the header has no length
_AGAIN = "Copy or export it again."


class Recording:
    """A recording, decoded once in order, in constant memory: formats of libsndfile (WAV, FLAC,
    OGG, MP3), and of ffmpeg (M4A, AAC, WMA) if it is installed.

    Args:
        source: path, or binary file object, which is copied to a temporary file; its exceptions
            pass unchanged.
        name: in messages.
        min_rate: lowest accepted sampling rate in Hz.

    Attributes:
        peak: largest magnitude of the blocks so far, full scale at 1.

    Raises:
        InputError: missing, not audio, truncated, or below ``min_rate``.
    """

    def __init__(self, source: Source, *, name: str | None = None, min_rate: int = 0):
        self._decoder: _Libsndfile | _Ffmpeg
        with contextlib.ExitStack() as copies:  # an open decoder outlives the copy's name
            if isinstance(source, (str, Path)):
                self.name, path = printable(name or source), source
                _check_exists(source, self.name)
            else:
                self.name = printable(name or str(getattr(source, "name", None) or "audio data"))
                copy = copies.enter_context(tempfile.NamedTemporaryFile())
                if source.seekable():
                    source.seek(0)
                shutil.copyfileobj(source, copy)
                copy.flush()
                path = copy.name
            try:
                self._decoder = _Libsndfile(path, self.name)
            except soundfile.LibsndfileError as error:
                if error.code not in _UNKNOWN_FORMAT:
                    raise _unreadable(self.name, error.error_string) from error
                self._decoder = _Ffmpeg(path, self.name)
        self.sample_rate, self.channels = self._decoder.samplerate, self._decoder.channels
        self.peak = 0.0
        self._frames = self._loudest = 0
        if self.sample_rate < min_rate:
            self._decoder.close()
            rates = f"recorded at {self.sample_rate:,} Hz; at least {min_rate:,} Hz is needed."
            raise InputError(f"{self.name}: {rates}")

    @property
    def seconds(self) -> float:
        """Duration decoded so far."""
        return self._frames / self.sample_rate

    @property
    def full_scale(self) -> float:
        """Share of samples decoded so far with a magnitude of 32767/32768 or more."""
        return self._loudest / max(self._frames * self.channels, 1)

    def blocks(self, sample_rate: int, *, max_seconds: float | None = None) -> Iterator[np.ndarray]:
        """Decode the recording or its first ``max_seconds``: the mean of its channels, resampled
        by soxr at high quality, in float32 blocks (n,), full scale at 1.

        Raises:
            InputError: truncated, damaged, or, after the last block, short or silent.
        """
        declared = math.inf if self._decoder.declared is None else self._decoder.declared
        limit = math.inf if max_seconds is None else round(max_seconds * self.sample_rate)
        wanted, resampler = min(declared, limit), None
        if sample_rate != self.sample_rate:
            rates = self.sample_rate, sample_rate
            resampler = soxr.ResampleStream(*rates, 1, dtype="float32", quality="HQ")
        n, last = 0, False
        try:
            while not last:
                samples = self._decoder.next(int(min(_READ_FRAMES, wanted - self._frames)))
                self._frames += len(samples)
                last = not len(samples)
                if last and self._frames < wanted and declared < math.inf:
                    raise InputError(
                        f"{self.name}: truncated, the audio ends"
                        f" {(wanted - self._frames) / self.sample_rate:.1f} s before the length it"
                        f" declares ({wanted / self.sample_rate:.1f} s). {_AGAIN}"
                    )
                scale, loudest = _FULL_SCALE[samples.dtype.name]
                if not last and (samples.max() >= loudest or samples.min() <= -loudest):
                    beyond = (samples >= loudest) | (samples <= -loudest)
                    self._loudest += int(np.count_nonzero(beyond))
                # Adding columns is about twenty times faster than a mean over the last axis.
                samples = samples.astype(np.float32, copy=False)
                block = samples[:, 0].copy()
                for channel in range(1, self.channels):
                    block += samples[:, channel]
                block /= np.float32(self.channels * scale)
                if resampler:
                    block = resampler.resample_chunk(block, last=last)
                if len(block):
                    self.peak = max(self.peak, _peak(block, n, sample_rate, self.name))
                    n += len(block)
                    yield block
            _check(n, self.peak, sample_rate, self.name)
        finally:
            self._decoder.close()


def load(
    source: Source, sample_rate: int = 22_050, *, max_seconds: float | None = None
) -> np.ndarray:
    """The blocks of a `Recording` in one array, float32 (n,), full scale at 1."""
    return np.concatenate(list(Recording(source).blocks(sample_rate, max_seconds=max_seconds)))


def duration(path: str | Path) -> float:
    """Duration in seconds from a recording's header (of raw AAC, ffmpeg's estimate from the bit
    rate); a recording without a length there is decoded.

    Raises:
        InputError: missing, not audio, or of a format that needs ffmpeg, which is not installed.
    """
    name = printable(path)
    _check_exists(path, name)
    try:
        info = soundfile.info(os.fsencode(path))
        if info.frames < _NO_LENGTH:
            return info.duration
    except soundfile.LibsndfileError as error:
        if error.code not in _UNKNOWN_FORMAT:
            raise _unreadable(name, error.error_string) from error
        # without an output, ffmpeg describes its input and ends with code 1
        run = subprocess.run(_ffmpeg(path, name), capture_output=True)
        text = _without_path(run.stderr, path)
        found = re.search(r"^  Duration: (\d+):(\d\d):([\d.]+)", text, re.MULTILINE)
        if not found or "Audio:" not in text:
            fault = _without_address(text.splitlines()[-1]) if text else "no output from ffmpeg"
            raise _unreadable(name, fault) from error
        return 3600 * int(found[1]) + 60 * int(found[2]) + float(found[3])
    recording = Recording(path)
    for _ in recording.blocks(recording.sample_rate):
        pass
    return recording.seconds


def check_waveform(wave: np.ndarray, sample_rate: int, name: str) -> None:
    """Raise InputError for a wave float (n,), full scale at 1, that is empty, shorter than
    `MIN_SECONDS`, silent throughout, or holds NaN or infinity."""
    peak = _peak(wave, 0, sample_rate, name) if len(wave) else 0.0
    _check(len(wave), peak, sample_rate, name)


def _peak(block: np.ndarray, start: int, sample_rate: int, name: str) -> float:
    """Largest magnitude of a block that starts at sample ``start``."""
    peak = max(float(block.max()), -float(block.min()))
    if not np.isfinite(peak):  # the maximum of NaN and anything is NaN
        seconds = (start + np.argmin(np.isfinite(block))) / sample_rate
        raise InputError(f"{name}: NaN or infinity, first near {seconds:.2f} s. Export it again.")
    return peak


def _check(n: int, peak: float, sample_rate: int, name: str) -> None:
    """Refuse a recording of ``n`` samples that is short or silent."""
    if not n:
        raise InputError(f"{name}: empty, it holds no samples. Record or copy it again.")
    if (seconds := n / sample_rate) < MIN_SECONDS:
        least = f"Give a recording of at least {MIN_SECONDS:g} s."
        raise InputError(f"{name}: {seconds:.2f} s long. {least}")
    if peak < 10 ** (SILENCE_DB / 20):
        level = f"peaks at {20 * np.log10(peak):.0f} dBFS" if peak else "holds zeros only"
        raise InputError(f"{name}: silent, it {level}. Check microphone and level, record again.")


def _check_exists(path: str | Path, name: str) -> None:
    if "://" in str(path):
        raise InputError(f"{name}: an address. Download the recording and name the file.")
    if Path(path).is_dir():
        raise InputError(f"{name}: a folder without a recording. Name a recording.")
    if not Path(path).is_file():
        raise InputError(f"{name}: no such file. Check the path.")


def _unreadable(name: str, reason: str) -> InputError:
    reason = reason.rstrip(".")
    return InputError(f"{name}: cannot be read as audio ({reason}). Copy or export it again.")


# --- Decoders: samplerate, channels, declared (frames or None), next, close ---------------------


class _Libsndfile(soundfile.SoundFile):
    def __init__(self, path: str | Path, name: str):
        super().__init__(os.fsencode(path))  # a string would have to be UTF-8
        self._recording = name
        log = self.extra_info
        unknown = self.frames >= _NO_LENGTH or f"\ndata : {max(_UNKNOWN_SIZE)}\n" in log
        self.declared = None if unknown else self.frames
        # libsndfile reads truncated files without an error, but its log has the declared length.
        declared = present = 0
        if self.format in ("RF64", "W64"):
            size = re.search(r"^(?:  Data size|data) : (\d+)", log, re.M)
            frame = re.search(r"^  Block Align +: (\d+)", log, re.M)
            if size and frame:
                declared = int(size[1]) - (24 if self.format == "W64" else 0)  # with its header
                present = self.frames * int(frame[1])
        else:  # WAV, AIFF, AU
            size = re.search(r"^ *(?:data|SSND|Data Size) *: (\d+) \(should be (\d+)\)", log, re.M)
            declared, present = map(int, size.groups()) if size else (0, 0)
        if declared > present and declared not in _UNKNOWN_SIZE:
            self.close()
            seconds = self.frames / self.samplerate * (declared - present) / max(present, 1)
            raise InputError(
                f"{name}: truncated, {declared - present:,} of {declared:,} bytes of audio"
                f" are missing (about {seconds:.1f} s at the end). {_AGAIN}"
            )

    def seekable(self) -> bool:
        # Otherwise soundfile seeks to its own position after every read. Decoders of MP3, FLAC and
        # ADPCM go back for that, which in MP3 causes an audible discontinuity.
        return False

    def next(self, frames: int) -> np.ndarray:
        """(n, channels), int16 for 16-bit files, else float32; fewer frames only at the end."""
        try:
            dtype = "int16" if self.subtype == "PCM_16" else "float32"
            return self.read(frames, dtype=dtype, always_2d=True)
        except soundfile.LibsndfileError as error:
            if self.declared is None:
                raise _unreadable(self._recording, error.error_string) from error
            seconds = (self.declared - self.tell()) / self.samplerate
            raise InputError(
                f"{self._recording}: damaged or truncated, {seconds:.1f} s before the length it"
                f" declares ({error.error_string.rstrip('.')}). {_AGAIN}"
            ) from error


class _Ffmpeg:
    """Decodes the first audio stream through a pipe, as AU."""

    declared = None  # the length that a compressed file declares is approximate

    def __init__(self, path: str | Path, name: str):
        self._name, self._path = name, path
        command = [*_ffmpeg(path, name), *"-v error -map 0:a:0 -f au -c:a pcm_f32be -".split()]
        # a file, because an unread pipe could fill up and block ffmpeg
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115, `close` closes it
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._messages)
        assert self._process.stdout is not None  # as it is a pipe
        self._sound = self._process.stdout
        header = self._sound.read(24)  # six numbers, followed by samples until the pipe ends
        if len(header) < 24:
            fault = self._fault()
            self.close()
            raise _unreadable(name, fault or "no audio")
        _, start, _, _, self.samplerate, self.channels = struct.unpack(">6I", header)
        self._sound.read(start - len(header))

    def next(self, frames: int) -> np.ndarray:
        """float32 (n, channels), fewer frames only at the end, where ffmpeg's error is raised."""
        content = self._sound.read(4 * frames * self.channels)
        if len(content) < 4 * frames * self.channels and (fault := self._fault()):
            raise InputError(f"{self._name}: damaged or truncated (ffmpeg: {fault}). {_AGAIN}")
        return np.frombuffer(content, ">f4").astype(np.float32).reshape(-1, self.channels)

    def close(self) -> None:
        self._process.kill()
        self._sound.close()
        self._process.wait()
        self._messages.close()

    def _fault(self) -> str:
        """The first line of ffmpeg's error output, else its exit code, else nothing."""
        code = self._process.wait()
        self._messages.seek(0)
        lines = _without_path(self._messages.read(), self._path).splitlines()
        message = _without_address(lines[0]) if lines else ""
        return message or (f"it ends with code {code}" if code else "")


def _ffmpeg(path: str | Path, name: str) -> list[str]:
    """The command up to its input: the system's ffmpeg, else that of the package imageio-ffmpeg."""
    if not (program := shutil.which("ffmpeg")):
        try:
            import imageio_ffmpeg

            program = imageio_ffmpeg.get_ffmpeg_exe()
        except (ImportError, RuntimeError) as error:  # RuntimeError: no binary for this platform
            raise InputError(
                f"{name}: cannot be read as audio without ffmpeg, which was not found. Install it"
                " (pip install imageio-ffmpeg; Debian, Ubuntu: sudo apt-get install -y ffmpeg;"
                " macOS: brew install ffmpeg), or give a WAV, FLAC, OGG or MP3 file."
            ) from error
    # The prefix and the whitelist prevent network access through a file's name or contents.
    options = "-nostdin -hide_banner -protocol_whitelist file,pipe -i".split()
    return [program, *options, f"file:{path}"]


def _without_path(output: bytes, path: str | Path) -> str:
    """ffmpeg's output without the file's path, which may have several lines."""
    return output.replace(os.fsencode(f"file:{path}: "), b"").decode(errors="replace")


def _without_address(line: str) -> str:
    """A line of ffmpeg's output without its leading component name: ``[aac @ 0x55fb1cf68f40]``."""
    return re.sub(r"^(\[[^\]]*\] *)+", "", line).strip()
