"""Where recordings come from: the members of a zip archive, local or remote, or the files of a folder.

A member of an archive is read once, from front to back, while it is turned into a spectrogram: it is never stored.
"""

import contextlib
import io
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from percepiano_ast.config import InputError
from percepiano_ast.data.remote import RemoteFile, Unreachable

# What libsndfile reads, and what ffmpeg reads for it where it is there.
AUDIO_SUFFIXES = frozenset(".wav .flac .mp3 .ogg .opus .aif .aiff .aifc .au .w64 .rf64 .caf .m4a .aac .mp4 .wma".split())


class Damaged(InputError):
    """Bytes that are not what the source itself says they should be; another reading may bring better ones."""


def is_audio(name: str) -> bool:
    """Whether a file's name says that it is a recording; hidden files are none."""
    path = PurePosixPath(name)
    return path.suffix.lower() in AUDIO_SUFFIXES and not path.name.startswith(".")


def unsafe(name: str) -> str:
    """What is wrong with a name that leads out of its source, or may elsewhere; empty for a good one."""
    if "\\" in name:
        return f"its name {name!r} has a backslash; write / between folders"
    if ".." in name.split("/") or name.startswith("/") or ":" in name.split("/")[0]:
        return f"its name {name!r} leads out of the source"
    return ""


class Archive:
    """Members of a zip archive at a path, ``https://`` or ``gs://``.

    Attributes:
        names: of the members, without folders.

    Raises:
        InputError: nothing there, no ranges, or not a complete zip archive.
        Unreachable: the address stopped answering.
    """

    def __init__(self, where: str):
        self.where = where
        self._remote = RemoteFile(where) if "://" in where else None
        try:
            self._zip = zipfile.ZipFile(self._remote or where)
        except zipfile.BadZipFile as error:
            raise InputError(f"{where} is not a complete zip archive ({error}); download it again") from error
        except OSError as error:
            if isinstance(error, Unreachable):
                raise
            raise InputError(f"cannot open {where} ({error}); give another address or a copy") from error
        self._members = {info.filename: info for info in self._zip.infolist() if not info.is_dir()}
        self.names = list(self._members)
        # A member ends where the next one, or the directory, begins.
        starts = sorted(info.header_offset for info in self._members.values())
        self._stops = dict(zip(starts, [*starts[1:], self._zip.start_dir]))

    def size(self, name: str) -> int:
        """Bytes that reading the file takes."""
        return self._members[name].compress_size if name in self._members else 0

    def read(self, name: str) -> bytes:
        """All of a file; raises like `open`."""
        with self.open(name) as file:
            return file.read()

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[io.RawIOBase]:
        """One member, to be read once and to its end, where its checksum is compared.

        Raises:
            InputError: the archive lacks it, cannot read it, or its bytes are damaged; from within the context too.
            Unreachable: the address stopped answering.
        """
        info = self._members.get(name)
        if info is None:
            raise InputError(f"{name} is listed but not in {self.where}")
        stop = self._stops[info.header_offset]
        span = self._remote.span(info.header_offset, stop) if self._remote else contextlib.nullcontext()
        try:
            with span, self._zip.open(info) as file:
                yield _Member(file, name, info.file_size)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise Damaged(f"{name} is damaged in {self.where}: {error}") from error
        except NotImplementedError as error:  # a compression method that this Python does not know
            raise InputError(f"{name} cannot be read from {self.where}: {error}") from error


class _Member(io.RawIOBase):
    """A member that can only be read forward, so that nobody rewinds it, which would fetch it again."""

    def __init__(self, file, name: str, size: int):
        self.file, self.name, self.size = file, name, size

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        return self.file.read(size)


class Folder:
    """Files below a folder.

    Attributes:
        names: paths of the files below it, with ``/``.
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
        InputError: neither archive nor folder; see `Archive`.
    """
    path = Path(where)
    if "://" in where or path.is_file():
        return Archive(where)
    if not path.is_dir():
        raise InputError(f"no archive or folder of recordings at {where!r}; give a path, https:// or gs:// address")
    return Folder(where)
