"""Decode recordings to mono, in blocks and bounded memory, or refuse them with the reason.

Sound is decoded until its decoder is at the end; a length in a header is a hint. What libsndfile
does not read, or not reliably, is decoded by ffmpeg.
"""

import contextlib
import ctypes
import functools
import io
import logging
import math
import mmap
import os
import re
import shutil
import stat
import struct
import subprocess
import tempfile
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import soundfile
import soxr

from percepiano_ast.errors import InputError
from percepiano_ast.files import printable

logger = logging.getLogger(__name__)

SILENCE_DB = -80.0  # dBFS: a recording whose peak is below this is silent
MIN_SECONDS = 1.0
LONGEST_HOURS = 1.0  # of a recording that is loaded as a whole

Source = str | Path | BinaryIO | io.RawIOBase

_READ_FRAMES = 1 << 17  # frames per block: 3 s at 44.1 kHz, 1 MB
# full scale and the last 16-bit step below it, by the type of the samples
_FULL_SCALE = {"int16": (32_768, 32_767), "float32": (1, 32_767 / 32_768)}
_LOWEST_RATE, _HIGHEST_RATE, _MOST_CHANNELS = 4_000, 1_000_000, 32
_MOST_HOURS = 8.0  # that are decoded
_MOST_BYTES = 16 << 30  # copied from a file object
_DEAD = 1e-3  # range of a silent channel relative to the loudest
_CANCELLED = 0.1  # peak of the sum of the channels relative to the loudest channel
_LEAST_OFFSET = 1e-4  # full scale at 1; it moves ratings by about 0.001
_CUTOFF = 0.1  # Hz
_SILENT_RUN = 32  # zeros in a row are digital silence
_NO_LENGTH = 1 << 46  # frames: at least this many mean that the header has no length
_AGAIN = "Copy or export it again."


class Recording:
    """A recording, decoded once in order, in constant memory: formats of libsndfile (WAV, FLAC,
    OGG, MP3), and of ffmpeg (M4A, AAC, WMA) if it is installed; of streams joined in one file, all.

    Args:
        source: path, or binary file object, which is copied to a temporary file; its exceptions
            pass unchanged.
        name: in messages.
        min_rate: lowest accepted sampling rate in Hz.

    Attributes:
        peak: largest magnitude of the blocks so far, full scale at 1.

    Raises:
        InputError: missing, no file, not audio, truncated, below ``min_rate``, or of a sampling
            rate or number of channels that is not read.
    """

    def __init__(self, source: Source, *, name: str | None = None, min_rate: int = 0):
        with contextlib.ExitStack() as copies:  # an open decoder outlives the copy's name
            if isinstance(source, (str, Path)):
                self.name, path = printable(name or source), source
                _check_exists(source, self.name)
            else:
                self.name = printable(name or str(getattr(source, "name", None) or "audio data"))
                copy = copies.enter_context(tempfile.NamedTemporaryFile())
                with contextlib.suppress(AttributeError, OSError):  # not a file of the system
                    if stat.S_ISCHR(os.fstat(source.fileno()).st_mode):
                        raise InputError(f"{self.name}: a device. Copy the recording to a file.")
                if source.seekable():
                    source.seek(0)
                while part := source.read(1 << 20):
                    if copy.tell() > _MOST_BYTES:
                        size = f"more than {_MOST_BYTES >> 30} GB"
                        raise InputError(f"{self.name}: {size}. Give a recording that ends.")
                    copy.write(part)
                copy.flush()
                path = copy.name
            self._decoder: _Libsndfile | _Ffmpeg | _Chain
            try:
                if not os.path.getsize(path):
                    raise InputError(
                        f"{self.name}: empty, it has 0 bytes. Record or copy it again."
                    )
                starts = _links(path, self.name)
                if len(starts) > 1:
                    self._decoder = _Chain(path, self.name, starts)
                else:
                    self._decoder = _open(path, self.name)
            except OSError as error:
                raise _unreadable(self.name, str(error.strerror)) from error
        self.sample_rate, self.channels = self._decoder.samplerate, self._decoder.channels
        self.peak = 0.0
        self._frames = self._loudest = 0
        self._remarks: list[str] = []
        least = max(min_rate, _LOWEST_RATE)
        if not least <= self.sample_rate <= _HIGHEST_RATE:
            self._decoder.close()
            low = self.sample_rate < least
            limit = f"at least {least:,}" if low else f"at most {_HIGHEST_RATE:,}"
            rates = f"recorded at {self.sample_rate:,} Hz; {limit} Hz is needed."
            raise InputError(f"{self.name}: {rates}")
        if not 1 <= self.channels <= _MOST_CHANNELS:
            self._decoder.close()
            what = f"{self.channels:,} channels, at most {_MOST_CHANNELS} are read"
            raise InputError(f"{self.name}: {what}. Export it in stereo.")

    @property
    def seconds(self) -> float:
        """Duration decoded so far."""
        return self._frames / self.sample_rate

    @property
    def full_scale(self) -> float:
        """Share of samples decoded so far that are clipped: with a magnitude of 32767/32768 or
        more, and in files of floats, which may exceed full scale, a repeated extreme."""
        return self._loudest / max(self._frames * self.channels, 1)

    @property
    def remarks(self) -> list[str]:
        """What was removed or left out, complete after the last block."""
        return [*self._decoder.remarks, *self._remarks]

    def blocks(self, sample_rate: int, *, max_seconds: float | None = None) -> Iterator[np.ndarray]:
        """Decode the recording or its first ``max_seconds``: the mean of its channels without a
        constant offset, resampled by soxr at high quality, in float32 blocks (n,), full scale at 1.

        Raises:
            InputError: truncated, damaged, too long, or, after the last block, short, silent, or
                with channels that cancel each other.
        """
        limit = math.inf if max_seconds is None else round(max_seconds * self.sample_rate)
        resampler, offset = None, OffsetFilter(self.sample_rate)
        if sample_rate != self.sample_rate:
            rates = self.sample_rate, sample_rate
            resampler = soxr.ResampleStream(*rates, 1, dtype="float32", quality="HQ")
        lowest, highest = np.full(self.channels, np.inf), np.full(self.channels, -np.inf)
        n, last = 0, False
        try:
            while not last:
                self._check_length(_MOST_HOURS)
                samples = self._decoder.next(int(min(_READ_FRAMES, limit - self._frames)))
                self._frames += len(samples)
                last = not len(samples)
                scale, loudest = _FULL_SCALE[samples.dtype.name]
                if not last and (samples.max() >= loudest or samples.min() <= -loudest):
                    beyond = (samples >= loudest) | (samples <= -loudest)
                    if self._decoder.floats:  # where they are cut off, the extreme is repeated
                        beyond &= (samples == samples.max()) | (samples == samples.min())
                        equal = np.pad(samples[1:] == samples[:-1], ((1, 1), (0, 0)))
                        beyond &= equal[1:] | equal[:-1]
                    self._loudest += int(np.count_nonzero(beyond))
                if self.channels > 1 and not last:
                    some = np.ascontiguousarray(samples[::64].T)  # enough for a channel's range
                    lowest = np.minimum(lowest, some.min(axis=1) / scale)
                    highest = np.maximum(highest, some.max(axis=1) / scale)
                # Adding columns is about twenty times faster than a mean over the last axis.
                samples = samples.astype(np.float32, copy=False)
                block = samples[:, 0].copy()
                for channel in range(1, self.channels):
                    block += samples[:, channel]
                block /= np.float32(self.channels * scale)
                block = offset(block, last=last)
                if resampler:
                    block = resampler.resample_chunk(block, last=last)
                if len(block):
                    self.peak = max(self.peak, _peak(block, n, sample_rate, self.name))
                    n += len(block)
                    yield block
            ranges = highest - lowest
            if self.peak * 2 * self.channels < _CANCELLED * ranges.max():
                opposite = "the channels cancel each other, as with one of inverted polarity"
                raise InputError(f"{self.name}: {opposite}. Export one channel.")
            if len(dead := np.flatnonzero(ranges < _DEAD * ranges.max()) + 1):
                which = f"channel {', '.join(map(str, dead))} of {self.channels} is silent"
                lower = 20 * math.log10(self.channels / (self.channels - len(dead)))
                what = f"the mean of the channels is {lower:.0f} dB lower than the sound"
                self._remarks.append(f"{which}: {what}")
            if offset.removed:
                what = f"a constant offset of {offset.removed:+.1g} of full scale was removed"
                self._remarks.append(what)
            _check(n, self.peak, sample_rate, self.name, self.remarks)
        finally:
            self._decoder.close()

    def read(self, sample_rate: int, *, max_seconds: float | None = None) -> np.ndarray:
        """The `blocks` in one array, float32 (n,). InputError: see there, or longer than
        ``LONGEST_HOURS``."""
        blocks = []
        try:
            for block in self.blocks(sample_rate, max_seconds=max_seconds):
                blocks.append(block)
                self._check_length(LONGEST_HOURS)
        finally:
            self.close()
        return np.concatenate(blocks)

    @property
    def declared(self) -> int | None:
        """Frames that the header declares, if decoding verifies that."""
        return self._decoder.declared

    def close(self) -> None:
        """Stop decoding."""
        self._decoder.close()

    def _check_length(self, hours: float) -> None:
        """Raise InputError if more than ``hours`` are decoded."""
        if self.seconds > 3600 * hours:
            unit = "hour" if hours == 1 else "hours"
            raise InputError(f"{self.name}: longer than {hours:g} {unit}. Give its parts.")


class OffsetFilter:
    """Removes a constant offset (DC) from a wave that is given in blocks.

    A wave without an offset passes unchanged. To others a first-order high-pass at 0.1 Hz is
    applied, except to digital silence; it starts settled, so that there is no transient.

    Attributes:
        removed: the offset, full scale at 1; 0 if there is none.
    """

    def __init__(self, sample_rate: int):
        self.removed = 0.0
        self._rate, self._decided = sample_rate, False
        self._held = np.zeros(0, np.float32)
        self._state = np.zeros(1)

    def __call__(self, block: np.ndarray, *, last: bool = False) -> np.ndarray:
        """Samples float32 (m,) for the next block float32 (n,); the first second of sound is held
        back until it is complete."""
        sound = block if len(block) >= self._rate else block[:0]
        if not self._decided and (len(self._held) or block.any()):
            block = np.concatenate([self._held, block])
            sound = block[block != 0]
            short = len(sound) < self._rate and len(block) < 16 * self._rate
            self._held = block if short and not last else block[:0]
            if len(self._held):
                return block[:0]
            self._decided = True
        pole = math.exp(-2 * math.pi * _CUTOFF / self._rate)
        gain = (1 + pole) / 2
        if not self.removed and (size := len(sound) // 8):
            # The mean of each eighth: an offset is in all of them, low tones and noise are not.
            means = sound[: 8 * size].reshape(8, size) @ _window(size)
            found = float(means.mean())
            if _LEAST_OFFSET < abs(found) < math.inf and abs(found) > 4 * means.std():
                self.removed, self._state = found, np.array([-gain * found])
        if not self.removed:
            return block
        from scipy import ndimage, signal  # here: most recordings need neither

        silent = ndimage.binary_opening(block == 0, np.ones(_SILENT_RUN))
        result = np.zeros_like(block)
        result[~silent], self._state = signal.lfilter(
            [gain, -gain], [1, -pole], block[~silent].astype(np.float64), zi=self._state
        )
        return result


@functools.lru_cache(maxsize=4)
def _window(size: int) -> np.ndarray:
    """Weights of a mean, float32 (size,), in which the phase of a tone does not matter."""
    window = np.hanning(size + 2)[1:-1]
    return (window / window.sum()).astype(np.float32)


def load(
    source: Source, sample_rate: int = 22_050, *, max_seconds: float | None = None
) -> np.ndarray:
    """The blocks of a `Recording` in one array, see `Recording.read`; its remarks are logged."""
    recording = Recording(source)
    wave = recording.read(sample_rate, max_seconds=max_seconds)
    for remark in recording.remarks:
        logger.info(f"  {recording.name}: {remark}")
    return wave


def duration(path: str | Path) -> float:
    """Duration of a recording in seconds: of a length that decoding verifies, else decoded.

    Raises:
        InputError: see `Recording` and `Recording.blocks`.
    """
    recording = Recording(path)
    if recording.declared is not None:
        recording.close()
        return recording.declared / recording.sample_rate
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


def _check(n: int, peak: float, sample_rate: int, name: str, remarks: Iterable[str] = ()) -> None:
    """Refuse a recording of ``n`` samples that is short or silent."""
    if not n:
        raise InputError(f"{name}: empty, it holds no samples. Record or copy it again.")
    if (seconds := n / sample_rate) < MIN_SECONDS:
        least = f"Give a recording of at least {MIN_SECONDS:g} s."
        raise InputError(f"{name}: {seconds:.2f} s long. {least}")
    if peak < 10 ** (SILENCE_DB / 20):
        level = f"peaks at {20 * np.log10(peak):.0f} dBFS" if peak else "holds zeros only"
        level += "".join(f" ({remark})" for remark in remarks)
        raise InputError(f"{name}: silent, it {level}. Check microphone and level, record again.")


def _check_exists(path: str | Path, name: str) -> None:
    if "://" in str(path):
        raise InputError(f"{name}: an address. Download the recording and name the file.")
    try:
        kind = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: no such file. Check the path.") from error
    if stat.S_ISDIR(kind):
        raise InputError(f"{name}: a folder without a recording. Name a recording.")
    if not stat.S_ISREG(kind):
        raise InputError(f"{name}: a device or pipe, not a file. Copy the recording to a file.")


def _unreadable(name: str, reason: str) -> InputError:
    reason = reason.rstrip(".")
    return InputError(f"{name}: cannot be read as audio ({reason}). Copy or export it again.")


def _without_ffmpeg(name: str, reason: str) -> InputError:
    return InputError(
        f"{name}: cannot be read as audio ({reason.rstrip('.')}) without ffmpeg, which was not"
        " found. Install it (pip install imageio-ffmpeg; Debian, Ubuntu: sudo apt-get install -y"
        " ffmpeg; macOS: brew install ffmpeg), or give a WAV, FLAC, OGG or MP3 file."
    )


# --- Headers: joined recordings, placeholders for lengths -----------------------------------------

_FIRST_PAGE = b"OggS\0\2"
# the first frame of an MP3 file, with the number of frames and of bytes (flags 1 and 2)
_XING = re.compile(
    rb"\xff[\xe2-\xff].{2,4}\0{9,32}(?:Xing|Info)\0\0\0[\3\7\x0b\x0f](....)(....)", re.DOTALL
)
_TAGS = 4096  # bytes of tags that may follow an MP3 file
_MOST_CHUNKS, _MOST_LINKS = 100_000, 1_000  # that are looked for in a file
# What libsndfile reads reliably.
_CONTAINERS = "WAV WAVEX RF64 W64 AIFF AU CAF FLAC OGG".split()
_CODECS = "PCM_S8 PCM_U8 PCM_16 PCM_24 PCM_32 FLOAT DOUBLE ULAW ALAW IMA_ADPCM MS_ADPCM".split()
_CODECS += "VORBIS OPUS".split()
# Formats of ffmpeg's that hold sound themselves, unlike playlists.
_FORMATS = (
    "aac,ac3,aiff,amr,amrnb,amrwb,ape,asf,au,avi,caf,dsf,dts,dtshd,eac3,flac,flv,iff,loas,"
    "matroska,mov,mp3,mpc,mpc8,mpeg,mpegts,nist,nut,ogg,rm,shn,sox,tak,truehd,tta,voc,w64,wav,wv"
)
_RESYNCHRONIZED = ("mp1", "mp2", "mp3", "mp1float", "mp2float", "mp3float")
_ERROR = re.compile(r"^(?:\[[^\]]*\] *)*?\[(?:error|fatal|panic)\] (.*)$", re.MULTILINE)
_PATIENCE = 15.0  # seconds without output after which ffmpeg is stopped
_LOCK = threading.Lock()


def _is_placeholder(length: int) -> bool:
    """Whether a length is what encoders write if they cannot go back to the header: 0, or next to a
    round number of at least 1 GB, such as 7FFFF000, 80000024 and FFFFFFFF."""
    step = 1 << 24
    return not length or (length > 0x3FFF0000 and min(length % step, -length % step) <= 4096)


def _links(path: str | Path, name: str) -> list[int]:
    """Starts of the recordings that are joined in a file of Ogg, FLAC, WAV, AIFF or MP4."""
    size, starts = os.path.getsize(path), [0]
    with open(path, "rb") as file:

        def read(at: int, count: int) -> bytes:
            file.seek(at)
            return file.read(count)

        def search(marker: bytes, at: int) -> int:
            """The next position of a marker of a few bytes, else the end of the file."""
            while len(part := read(at, 1 << 16)) >= len(marker):
                if (found := part.find(marker)) >= 0:
                    return at + found
                at += len(part) - len(marker) + 1
            return size

        at = _sound_start(file)
        mark = 4 if read(at + 4, 4) == b"ftyp" else 0
        magic = read(at + mark, 4)
        for _ in range(_MOST_CHUNKS):
            joined = True
            if magic == b"OggS":  # the first pages of streams that belong together are adjacent
                segments = read(at, 27 + 255)[26:] or b"\0"
                end = at + 27 + sum(segments[: 1 + segments[0]])
                at = search(_FIRST_PAGE, at + 1)
                joined = at != end
            elif magic == b"fLaC":
                at = search(magic, at + 1)
                joined = read(at + 4, 4) in (b"\0\0\0\x22", b"\x80\0\0\x22")  # STREAMINFO
            elif magic in (b"RIFF", b"FORM") and read(at, 4) == magic:
                length = int.from_bytes(read(at + 4, 4), "little" if magic == b"RIFF" else "big")
                at += 8 + length + length % 2
                joined = read(at, 4) == magic
            elif magic == b"ftyp":
                length, head = int.from_bytes(read(at, 4), "big"), 8
                if length == 1:
                    length, head = int.from_bytes(read(at + 8, 8), "big"), 16
                at += length if length >= head else size
                joined = read(at + 4, 4) == magic
            else:
                break
            if at >= size:
                break
            if joined:
                starts.append(at)
            if len(starts) > _MOST_LINKS:
                raise InputError(f"{name}: more than {_MOST_LINKS:,} recordings joined. Split it.")
    return starts


class _FileInMemory(mmap.mmap):
    def seek(self, offset: int, whence: Any = os.SEEK_SET) -> None:
        """As in files, a position behind the end is allowed."""
        try:
            super().seek(offset, whence)
        except ValueError:
            super().seek(0, os.SEEK_END)


def _mended(path: str | Path) -> _FileInMemory | None:
    """The file in memory with the length of its sound in the header, where an encoder that wrote to
    a pipe left a placeholder: WAV, RF64, AIFF, AU, CAF; else None."""
    if (size := os.path.getsize(path)) < 48:
        return None
    with open(path, "rb") as file:
        # the file itself stays as it is
        content = _FileInMemory(file.fileno(), 0, access=mmap.ACCESS_COPY)
    kind = content[:4]
    order: Literal["big", "little"] = "little" if kind in (b"RIFF", b"RF64") else "big"
    field = 8 if kind == b"caff" else 4  # bytes of a length

    def walk(at: int, *names: bytes) -> int:
        """Start of the next chunk of these names, else where the chunks end."""
        for _ in range(_MOST_CHUNKS):
            chunk = content[at : at + 4 + field]
            if len(chunk) < 4 + field or not chunk[:4].isascii() or chunk[:4] in names:
                break
            length = int.from_bytes(chunk[4:], order)
            at += 4 + field + length + (length % 2 if field == 4 else 0)
        return at

    if kind == b".snd" and _is_placeholder(int.from_bytes(content[8:12], order)):
        content[8:12] = b"\xff" * 4  # to the end, for libsndfile
        return content
    if kind in (b"RIFF", b"RIFX", b"RF64", b"FORM", b"caff"):
        at = walk(8 if kind == b"caff" else 12, b"data", b"SSND")
        length = int.from_bytes(content[at + 4 : at + 4 + field], order)
        if content[12:16] == b"ds64" and length == 0xFFFFFFFF:  # that chunk has the length
            length = int.from_bytes(content[28:36], order)
        start = at + 4 + field
        present, least = size - start, {b"FORM": 8, b"caff": 4}.get(kind, 0)
        if content[at : at + 4] in (b"data", b"SSND") and (
            # empty, although something else than chunks follows, or longer than the file
            (
                length in (0, least)
                and present > least
                and walk(start + length) not in (size, size + 1)
            )
            or (length > present and _is_placeholder(length))
        ):
            content[at + 4 : start] = min(present, 0xFFFFFFFE).to_bytes(field, order)
            if content[12:16] == b"ds64":
                content[:4], content[12:16] = b"RIFF", b"JUNK"
            return content
    content.close()
    return None


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Discard what libraries print by C's stderr (libmpg123's notes); Python's is not affected."""
    with _LOCK:
        try:
            library = ctypes.CDLL(None)
            names = ("stderr", "__stderrp")  # Linux, macOS
            name = next(one for one in names if hasattr(library, one))
            stream = ctypes.c_void_p.in_dll(library, name)
            library.fopen.restype = ctypes.c_void_p
            null = library.fopen(os.devnull.encode(), b"w")
        except (OSError, TypeError, StopIteration):  # another C library: they are printed
            yield
            return
        saved, stream.value = stream.value, null
        try:
            yield
        finally:
            stream.value = saved
            library.fclose(ctypes.c_void_p(null))


# --- Decoders: samplerate, channels, declared (frames or None), floats, remarks, next, close ------


class _Libsndfile(soundfile.SoundFile):
    """Decodes by libsndfile; ``reliable`` is whether it reads the whole of this kind of file.

    Args:
        path: of the file.
        name: in messages.
        unsized: read MP3 through a pipe, so that libmpg123 does not estimate its length from the
            bit rate of the first frame, and decodes to the end.
    """

    def __init__(self, path: str | Path, name: str, *, unsized: bool = False):
        source: Any
        if unsized:
            source, feeding = os.pipe()
            threading.Thread(target=_feed, args=(path, feeding), daemon=True).start()
        elif (source := _mended(path)) is None:
            source = os.open(path, os.O_RDONLY)  # without a name, from which a format is guessed
        with _quiet_libraries():
            super().__init__(source)
        self._recording, self._done, self.remarks = name, 0, list[str]()
        self.floats = self.subtype in ("FLOAT", "DOUBLE")
        log = self.extra_info
        self.declared = None if self.frames >= _NO_LENGTH else self.frames
        # Behind FLAC without a length there may be tags, at which libsndfile fails.
        self.reliable = (
            self.format in _CONTAINERS
            and self.subtype in _CODECS
            and not (self.format == "FLAC" and self.declared is None)
        )
        if self.format == "OGG":  # whose header has no length
            with open(path, "rb") as file:
                file.seek(max(os.path.getsize(path) - (1 << 17), 0))
                _, found, page = file.read().rpartition(b"OggS\0")
            if found and not (page and page[0] & 4):
                self.remarks.append("it does not end with a last page, and may be cut off")
        if self.format == "MP3":
            behind = _behind_mp3(path)
            self.reliable = behind is not None and behind <= _TAGS
            if behind is None and _is_free_format(path):  # ffmpeg does not read it
                self.reliable, self.declared = True, None
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
        if declared > present and not _is_placeholder(declared):
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
        """(n, channels), int16 for 16-bit files, else float32; none only at the end.

        Raises:
            InputError: damaged, or the sound ends before the declared length.
        """
        dtype = "int16" if self.subtype == "PCM_16" else "float32"
        quiet = _quiet_libraries() if self.format == "MP3" else contextlib.nullcontext()
        if self.declared is not None:  # behind it there may be tags
            frames = min(frames, self.declared - self._done)
        try:
            with quiet:
                samples = self.read(frames, dtype=dtype, always_2d=True)
        except soundfile.LibsndfileError as error:
            if self.declared is None:
                raise _without_ffmpeg(self._recording, error.error_string) from error
            raise InputError(
                f"{self._recording}: damaged or truncated,"
                f" {(self.declared - self.tell()) / self.samplerate:.1f} s before the length it"
                f" declares ({error.error_string.rstrip('.')}). {_AGAIN}"
            ) from error
        self._done += len(samples)
        if frames and not len(samples) and self.declared is not None:
            raise InputError(
                f"{self._recording}: truncated, the audio ends"
                f" {(self.declared - self._done) / self.samplerate:.1f} s before the length it"
                f" declares ({self.declared / self.samplerate:.1f} s). {_AGAIN}"
            )
        return samples


class _Ffmpeg:
    """Decodes the first audio stream through a pipe, as AU."""

    declared = None  # the length that a compressed file declares is approximate

    def __init__(self, path: str | Path, name: str, program: str):
        self._name, self._path, self.remarks = name, f"file:{os.fspath(path)}", list[str]()
        # The prefix and the lists prevent that a name or a playlist opens another file or address.
        command = [program, *"-nostdin -nostats -hide_banner -loglevel level+info".split()]
        command += ["-protocol_whitelist", "file,pipe", "-format_whitelist", _FORMATS]
        command += ["-i", self._path]
        command += "-map 0:a:0 -f au -c:a pcm_f32be -".split()
        # a file, because an unread pipe could fill up and block ffmpeg
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115, `close` closes it
        try:
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._messages)
        except OSError:
            self._messages.close()
            raise
        assert self._process.stdout is not None  # as it is a pipe
        self._sound, self._stopped, self._resynchronized = self._process.stdout, False, False
        header = self._read(24)  # six numbers, followed by samples until the pipe ends
        if len(header) < 24:
            fault = self._fault()
            self.close()
            raise _unreadable(name, fault or "no audio")
        _, start, _, _, self.samplerate, self.channels = struct.unpack(">6I", header)
        self._read(start - len(header))
        found = self._log().partition("Output #0")[0]
        codecs = re.findall(r"Stream #0.* Audio: (\w+)", found) or [""]
        self._codec = codecs[0]
        if len(codecs) > 1:
            self.remarks.append(f"the first of its {len(codecs)} audio tracks was taken")
        self.floats = self._codec.startswith(("pcm_f32", "pcm_f64"))

    def next(self, frames: int) -> np.ndarray:
        """float32 (n, channels), fewer frames only at the end, where ffmpeg's error is raised."""
        content = self._read(4 * frames * self.channels)
        if len(content) < 4 * frames * self.channels and (fault := self._fault()):
            # MPEG audio has no length, and is decoded from frame to frame.
            if self._stopped or self._process.returncode or self._codec not in _RESYNCHRONIZED:
                raise InputError(f"{self._name}: damaged or truncated (ffmpeg: {fault}). {_AGAIN}")
            if not self._resynchronized:
                self._resynchronized = True
                what = "what is not MPEG audio in the file was left out"
                self.remarks.append(f"{what} (ffmpeg: {fault})")
        return np.frombuffer(content, ">f4").astype(np.float32).reshape(-1, self.channels)

    def close(self) -> None:
        self._process.kill()
        self._sound.close()
        self._process.wait()
        self._messages.close()

    def _read(self, size: int) -> bytes:
        """Output of ffmpeg, which is stopped if there is none for too long."""

        def stop() -> None:
            self._stopped = True
            self._process.kill()

        watchdog = threading.Timer(_PATIENCE, stop)
        watchdog.start()
        try:
            return self._sound.read(size)
        finally:
            watchdog.cancel()

    def _log(self) -> str:
        # without moving the position, at which ffmpeg writes; a path may have several lines
        log = os.pread(self._messages.fileno(), 1 << 24, 0)
        return log.replace(os.fsencode(f"{self._path}: "), b"").decode(errors="replace")

    def _fault(self) -> str:
        """The first error in ffmpeg's output, else its exit code, else nothing."""
        try:
            code = self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._stopped = True
        if self._stopped:
            return f"no sound within {_PATIENCE:g} s"
        # [aac @ 0x55fb1cf68f40] [error] its message
        for found in _ERROR.finditer(self._log()):
            if "Format not on whitelist" in found[1]:
                return "no format of recordings, such as a playlist"
            if "matches no streams" in found[1]:
                return "it has no audio track"
            if "non monoton" not in found[1]:  # where a stream's sampling rate changes
                return found[1].strip()
        return f"it ends with code {code}" if code else ""


class _Chain:
    """Decodes recordings that are joined in one file, one after the other."""

    declared = None

    def __init__(self, path: str | Path, name: str, starts: list[int]):
        self._name, self._earlier = name, list[str]()
        self._file = open(path, "rb")  # noqa: SIM115, `close` closes it
        self._parts = list(zip(starts, [*starts[1:], os.path.getsize(path)]))
        self._number = len(self._parts)
        self._decoder = self._open_next()
        self.samplerate, self.channels = self._decoder.samplerate, self._decoder.channels
        self.floats = self._decoder.floats

    @property
    def remarks(self) -> list[str]:
        return [*self._earlier, *self._decoder.remarks]

    def next(self, frames: int) -> np.ndarray:
        samples = self._decoder.next(frames)
        while frames and not len(samples) and self._parts:
            self._decoder.close()
            left = f"{len(self._parts)} of {self._number} recordings joined in the file"
            try:
                following = self._open_next()
            except InputError as error:
                fault = str(error).removeprefix(f"{self._name}: ")
            else:
                found = following.samplerate, following.channels
                if found == (self.samplerate, self.channels):
                    self._earlier += self._decoder.remarks
                    self._decoder = following
                    samples = following.next(frames)
                    continue
                following.close()
                fault = f"{found[0]:,} Hz, channels: {found[1]}"
            self._earlier.append(f"{left} were left out ({fault})")
            self._parts = []
        return samples

    def close(self) -> None:
        self._decoder.close()
        self._file.close()

    def _open_next(self) -> "_Libsndfile | _Ffmpeg":
        start, stop = self._parts.pop(0)
        with tempfile.NamedTemporaryFile() as copy:  # an open decoder outlives the copy's name
            self._file.seek(start)
            while part := self._file.read(min(1 << 20, stop - self._file.tell())):
                copy.write(part)
            copy.flush()
            return _open(copy.name, self._name)


def _open(path: str | Path, name: str) -> _Libsndfile | _Ffmpeg:
    """The decoder of one recording: libsndfile, or ffmpeg where that cannot read it, or not
    reliably.

    Raises:
        InputError: no decoder reads it, or it is truncated.
    """
    known, reason, refusal = None, "", None
    try:
        known = _Libsndfile(path, name)
        if known.reliable:
            return known
    except soundfile.LibsndfileError as error:
        reason = error.error_string
    if program := _ffmpeg():
        try:
            decoder = _Ffmpeg(path, name, program)
        except InputError as error:
            refusal = error
        else:
            if known:
                known.close()
            return decoder
    if known and known.format == "MP3":
        if (behind := _behind_mp3(path)) is not None:
            what = f"{behind:,} bytes behind the length that the MP3 file declares were left out"
            known.remarks.append(f"{what}; install ffmpeg to decode them")
            return known
        known.close()
        try:
            return _Libsndfile(path, name, unsized=True)
        except soundfile.LibsndfileError as error:
            known, reason = None, error.error_string
    if not known:
        raise refusal or _without_ffmpeg(name, reason)
    return known


def _sound_start(file: BinaryIO) -> int:
    """Where the ID3v2 tags at the beginning of a file end."""
    at = 0
    for _ in range(100):
        file.seek(at)
        tag = file.read(10)
        if len(tag) < 10 or tag[:3] != b"ID3":
            break
        at += 10 + sum((tag[6 + k] & 127) << (7 * (3 - k)) for k in range(4))
        at += 10 * bool(tag[5] & 16)  # a footer
    return at


def _behind_mp3(path: str | Path) -> int | None:
    """Bytes behind the length that the first frame of an MP3 file declares; None if it declares
    none."""
    with open(path, "rb") as file:
        start = _sound_start(file)
        file.seek(start)
        found = _XING.search(file.read(_TAGS))
    if not found or not int.from_bytes(found[1], "big"):
        return None
    end = start + found.start() + int.from_bytes(found[2], "big")
    return os.path.getsize(path) - end


def _is_free_format(path: str | Path) -> bool:
    """Whether the first frame of an MP3 file has a bit rate of its own."""
    with open(path, "rb") as file:
        file.seek(_sound_start(file))
        frame = file.read(3)
    return frame[:1] == b"\xff" and frame[2] < 16


def _feed(path: str | Path, target: int) -> None:
    """Write an MP3 file without its ID3v2 tag to a pipe, until its reader closes it."""
    with contextlib.suppress(BrokenPipeError), open(target, "wb") as out, open(path, "rb") as file:
        file.seek(_sound_start(file))
        shutil.copyfileobj(file, out)


def _ffmpeg() -> str:
    """The system's ffmpeg, else that of the package imageio-ffmpeg, else an empty string."""
    if program := shutil.which("ffmpeg"):
        return program
    try:
        import imageio_ffmpeg

        return imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError):  # RuntimeError: no binary for this platform
        return ""
