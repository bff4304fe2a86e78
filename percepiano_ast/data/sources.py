"""Sources of recordings: the members of a local or remote zip archive, or the files of a folder.

A member of an archive is streamed once while its spectrogram is computed; it is never stored.
"""

import contextlib
import io
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from percepiano_ast.data.remote import RemoteFile, Unreachable
from percepiano_ast.errors import InputError

# Formats of libsndfile and of ffmpeg.
AUDIO_SUFFIXES = frozenset(
    ".wav .flac .mp3 .ogg .opus .aif .aiff .aifc .au .w64 .rf64 .caf .m4a .aac .mp4 .wma".split()
)


class Damaged(InputError):
    """The bytes do not match the source's checksum; reading again may succeed."""


def is_audio(name: str) -> bool:
    """Whether a file name has an audio extension and is not hidden."""
    path = PurePosixPath(name)
    return path.suffix.lower() in AUDIO_SUFFIXES and not path.name.startswith(".")


def unsafe(name: str) -> str:
    """The fault of a name that escapes its source on any system; empty for a valid one."""
    if "\\" in name:
        return f"its name {name!r} has a backslash; write / between folders"
    if ".." in name.split("/") or name.startswith("/") or ":" in name.split("/")[0]:
        return f"its name {name!r} points outside the source"
    return ""


class Archive:
    """Members of a zip archive at a path, ``https://`` or ``gs://``.

    Attributes:
        names: of the members, without folders.

    Raises:
        InputError: no such file, no support for ranges, or not a complete zip archive.
        Unreachable: the server stopped responding.
    """

    def __init__(self, where: str):
        self.where = where
        self._remote = RemoteFile(where) if "://" in where else None
        try:
            self._zip = zipfile.ZipFile(self._remote or where)
        except zipfile.BadZipFile as error:
            raise InputError(
                f"{where} is not a complete zip archive ({error}). Download it again."
            ) from error
        except OSError as error:
            if isinstance(error, Unreachable):
                raise
            raise InputError(
                f"cannot open {where} ({error}). Give another address or a local copy."
            ) from error
        self._members = {info.filename: info for info in self._zip.infolist() if not info.is_dir()}
        self.names = list(self._members)
        # A member ends at the start of the next one, or of the central directory.
        starts = sorted(info.header_offset for info in self._members.values())
        self._stops = dict(zip(starts, [*starts[1:], self._zip.start_dir]))

    def size(self, name: str) -> int:
        """Compressed size of a member in bytes."""
        return self._members[name].compress_size if name in self._members else 0

    def read(self, name: str) -> bytes:
        """All of a file; raises like `open`."""
        with self.open(name) as file:
            return file.read()

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[io.RawIOBase]:
        """Open one member to be read once; its checksum is verified at its end.

        Raises:
            InputError: the member is missing, unreadable or damaged; also raised within the
                context.
            Unreachable: the server stopped responding.
        """
        info = self._members.get(name)
        if info is None:
            raise InputError(f"{name} is listed but not in {self.where}")
        stop = self._stops[info.header_offset]
        span = (
            self._remote.span(info.header_offset, stop)
            if self._remote
            else contextlib.nullcontext()
        )
        try:
            with span, self._zip.open(info) as file:
                yield _Member(file, name, info.file_size)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise Damaged(f"{name} is damaged in {self.where}: {error}") from error
        # a compression method that this Python does not support
        except NotImplementedError as error:
            raise InputError(f"{name} cannot be read from {self.where}: {error}") from error


class _Member(io.RawIOBase):
    """A forward-only member: rewinding would fetch it again."""

    def __init__(self, file, name: str, size: int):
        self.file, self.name, self.size = file, name, size

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return self.file.read(size)


class Folder:
    """Files below a folder.

    Attributes:
        names: relative paths of its files, with ``/``.
    """

    def __init__(self, where: str):
        self.where, self._path = where, Path(where)
        files = (path for path in sorted(self._path.rglob("*")) if path.is_file())
        self.names = [path.relative_to(self._path).as_posix() for path in files]

    def size(self, name: str) -> int:
        """Bytes of the file."""
        path = self._path / name
        return path.stat().st_size if path.is_file() else 0

    def read(self, name: str) -> bytes:
        """All of a file."""
        return (self._path / name).read_bytes()

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[Path]:
        """The path of one file.

        Raises:
            InputError: it is not there.
        """
        path = self._path / name
        if not path.is_file():
            raise InputError(f"{name} is listed but not in {self.where}")
        yield path


def open_source(where: str) -> Archive | Folder:
    """The files at a path, ``https://`` or ``gs://`` address.

    Raises:
        InputError: neither an archive nor a folder; see `Archive`.
    """
    path = Path(where)
    if "://" in where or path.is_file():
        return Archive(where)
    if not path.is_dir():
        raise InputError(
            f"{where!r}: no such archive or folder of recordings. Give a path, https:// or gs://"
            " address."
        )
    return Folder(where)
