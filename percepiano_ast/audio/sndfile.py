"""Decode sound files with libsndfile: from a path, a seekable file object, or a forward-only
stream."""

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile

from percepiano_ast.errors import InputError

_UNKNOWN_SIZE = (0, 0xFFFFFFFF)  # data lengths declared by encoders that write to a pipe
_UNKNOWN_FORMAT = (1, 4)  # libsndfile's error codes for an unknown container or codec
_STREAMS = (b"RIFF", b"RF64", b"fLaC")  # WAV and FLAC: decoded as a stream
# also decoded as a stream if the size of the file is known, which is needed to detect truncation
_W64 = b"riff"
_AHEAD = 1 << 22  # maximum bytes between the parts of a header, such as a picture
_ENDLESS = 1 << 62  # size reported to libsndfile for a file of unknown size
_NO_LENGTH = 1 << 46  # frames: at least this many mean that the header has no length
_PIECE = 1 << 20  # bytes

_File = BinaryIO | io.RawIOBase


class UnknownFormat(InputError):
    """A format that libsndfile does not support; another decoder may."""


class Decoder:
    """Decode a recording with libsndfile in one pass.

    Attributes:
        sample_rate, channels: of the file.
        frames: the declared length, or None.

    Raises:
        UnknownFormat: a format or codec that libsndfile does not support.
        InputError: not a complete sound file.
    """

    def __init__(self, source: str | Path | _File, name: str):
        self._name = name
        self._stream = None if isinstance(source, (str, Path)) else _stream(source)
        with self._refusing():
            self._file = _SoundFile(self._stream or str(source))
        if self._stream:
            self._stream.opening = False
        self.sample_rate, self.channels = self._file.samplerate, self._file.channels
        self._dtype = "int16" if self._file.subtype == "PCM_16" else "float32"
        self.frames = self._file.frames
        if self.frames >= _NO_LENGTH or f"\ndata : {max(_UNKNOWN_SIZE)}\n" in self._file.extra_info:
            self.frames = None
        self._check_whole()

    def read(self, frames: int) -> np.ndarray:
        """The next samples: (n, channels), int16 for 16-bit files, else float32; fewer than
        requested only at the end.

        Raises:
            InputError: damaged.
        """
        with self._refusing():
            return self._file.read(frames, dtype=self._dtype, always_2d=True)

    def close(self) -> None:
        """Close the file; repeated calls have no effect."""
        self._file.close()

    def _check_whole(self) -> None:
        """Detect truncation: libsndfile reads truncated files without an error, but its log has the
        declared length.

        Raises:
            InputError: the data are shorter than declared.
        """
        declared, present = _data_bytes(self._file)
        if declared > present and declared not in _UNKNOWN_SIZE:
            self.close()
            seconds = self._file.frames / self.sample_rate * (declared - present) / max(present, 1)
            raise InputError(
                f"{self._name}: truncated, {declared - present:,} of {declared:,} bytes of audio"
                f" are missing (about {seconds:.1f} s at the end). Copy or export it again."
            )

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        """Re-raise the source's exceptions at the end of the context, and libsndfile's as
        InputError."""
        failure = None
        try:
            yield
        except soundfile.LibsndfileError as error:
            failure = error
        if self._stream and self._stream.error:
            raise self._stream.error
        if failure:
            raise _refusal(self._name, failure) from failure


class _SoundFile(soundfile.SoundFile):
    def seekable(self) -> bool:
        # Otherwise soundfile seeks to its own position after every read. Decoders of MP3, FLAC and
        # ADPCM go back for that, which in MP3 causes an audible discontinuity.
        return False


def duration(path: str | Path) -> float | None:
    """Declared duration of a file in seconds, or None.

    Raises:
        UnknownFormat, InputError: as `Decoder`.
    """
    try:
        info = soundfile.info(str(path))
    except soundfile.LibsndfileError as error:
        raise _refusal(str(path), error) from error
    return info.duration if info.frames < _NO_LENGTH else None


def _refusal(name: str, error: soundfile.LibsndfileError) -> InputError:
    kind = UnknownFormat if error.code in _UNKNOWN_FORMAT else InputError
    return kind(
        f"{name}: cannot be read as audio ({error.error_string.rstrip('.')}). "
        "Give a complete WAV, FLAC, OGG or MP3 file, or copy it again."
    )


def _data_bytes(file: soundfile.SoundFile) -> tuple[int, int]:
    """Bytes of audio data declared in an uncompressed file's header, and bytes present; (0, 0) if
    the file is complete."""
    log = file.extra_info
    if file.format in ("RF64", "W64"):
        declared = re.search(r"^(?:  Data size|data) : (\d+)", log, re.MULTILINE)
        frame = re.search(r"^  Block Align +: (\d+)", log, re.MULTILINE)
        header = 24 if file.format == "W64" else 0  # included in W64's sizes
        return (
            (int(declared[1]) - header, file.frames * int(frame[1]))
            if declared and frame
            else (0, 0)
        )
    # WAV, AIFF, AU
    sizes = re.search(r"^ *(?:data|SSND|Data Size) *: (\d+) \(should be (\d+)\)", log, re.MULTILINE)
    return (int(sizes[1]), int(sizes[2])) if sizes else (0, 0)


# --- File objects -------------------------------------------------------------------------------


def _stream(file: _File) -> "_Stream":
    """Wrap a file object for libsndfile."""
    if file.seekable():
        return _Stream(file)
    head = _read(file, 4)
    size = getattr(file, "size", None)
    if head in _STREAMS or (head == _W64 and size):
        return _Once(file, head, size or _ENDLESS)
    return _Stream(io.BytesIO(head + b"".join(iter(lambda: file.read(_PIECE), b""))))


def _read(file: Any, size: int) -> bytes:
    """``size`` bytes, fewer only at the end of the file: libsndfile treats a short read as the
    end."""
    parts = [file.read(size)]
    while parts[-1] and (size := size - len(parts[-1])):
        parts.append(file.read(size))
    return b"".join(parts)


class _Stream:
    """A file object for libsndfile.

    Attributes:
        error: the file's exception, for the caller; raised within a callback of libsndfile it would
            be printed and lost.
        opening: whether libsndfile is still parsing the header.
    """

    def __init__(self, file: _File):
        self.error: BaseException | None = None
        self.opening = True
        self._file = file

    def tell(self) -> int:
        """Position in bytes."""
        return self._guarded(0, self._file.tell)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position."""
        return self._guarded(0, self._file.seek, offset, whence)

    def read(self, size: int) -> bytes:
        """``size`` bytes; fewer at the end and after an error."""
        return self._guarded(b"", _read, self._file, size)

    def _guarded(self, otherwise, function, *arguments):
        if self.error is None:
            try:
                return function(*arguments)
            except BaseException as error:
                self.error = error
        return otherwise


class _Once(_Stream):
    """A forward-only file for libsndfile, which seeks while it parses the header.

    The bytes read while parsing are buffered. Seeks of more than `_AHEAD` bytes are attempts to
    read behind the audio data; they return no bytes, because all required parts precede the data.
    """

    def __init__(self, file: _File, head: bytes, size: int):
        super().__init__(file)
        self._size = size
        self._head = bytearray(head)
        self._taken = len(head)
        self._at = 0

    def tell(self) -> int:
        """Position in bytes from libsndfile's point of view."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position; the underlying file does not seek."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int) -> bytes:
        """``size`` bytes; fewer at the end, after an error, and far ahead while opening."""
        if self.opening and self._at <= self._taken + _AHEAD:
            self._head += self._take(self._at + size - self._taken)
        part = bytes(self._head[self._at : self._at + size])
        if not self.opening and self._at + len(part) == self._taken:
            part += self._take(size - len(part))
        self._at += len(part)
        return part

    def _take(self, size: int) -> bytes:
        part = self._guarded(b"", _read, self._file, size) if size > 0 else b""
        self._taken += len(part)
        return part
