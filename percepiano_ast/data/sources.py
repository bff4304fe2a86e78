"""Recordings in a zip archive (local, ``https://`` or ``gs://``, read by ranges: MAESTRO's has 108
GB) or in a folder, and the table that lists them."""

import contextlib
import http.client
import io
import os
import re
import shutil
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd

from percepiano_ast import audio, files
from percepiano_ast.errors import InputError, RunFailed
from percepiano_ast.tables import clean_name, numbers, read_csv

COLUMNS = tuple(
    "canonical_composer canonical_title split year midi_filename audio_filename duration".split()
)
TEXT = ("canonical_composer", "canonical_title", "split", "midi_filename", "audio_filename")
SPLITS = ("train", "validation", "test")
MAESTRO_LICENCE = "MAESTRO v3: CC BY-NC-SA 4.0, https://magenta.tensorflow.org/datasets/maestro"
OWN_LICENCE = "recordings of your own: you know under which terms"
_REQUEST = 2**24  # bytes, at most
_PIECE = 2**20


class Damaged(InputError):
    """The bytes of a member do not match its checksum."""


class Unreachable(RunFailed):
    """The server stopped responding, or the file was removed or changed."""


def unsafe(name: str) -> str:
    """The fault of a name that escapes its source on any system; empty for a valid one."""
    if "\\" in name:
        return f"its name {name!r} has a backslash; write / between folders"
    if ".." in name.split("/") or name.startswith("/") or ":" in name.split("/")[0]:
        return f"its name {name!r} points outside the source"
    return ""


# --- Archives and folders -------------------------------------------------------------------------


class Folder:
    """The files below a folder.

    Attributes:
        names: relative paths, with ``/``, see `files.printable` and `tables.clean_name`.
        recordings: those of recordings, see `audio.find_recordings`.
        left: the others, with the reason.
    """

    def __init__(self, where: str):
        self.where, self._path = where, Path(where)
        recordings, left = audio.find_recordings(where)
        self._paths: dict[str, Path] = {}
        for path in sorted([*recordings, *left]):
            name = clean_name(files.printable(path.relative_to(where).as_posix()))
            while name in self._paths:  # of another file, with the same letters
                name = f"{name} again"
            self._paths[name] = path
        names = {path: name for name, path in self._paths.items()}
        self.names, self.recordings = list(self._paths), [names[path] for path in recordings]
        self.left = {names[path]: reason for path, reason in left.items()}

    def path(self, name: str) -> Path:
        """Of a file, also one behind a link that `files.walk` does not follow."""
        return self._paths.get(name, self._path / name)

    def __contains__(self, name: str) -> bool:
        return self.path(name).is_file()

    def size(self, name: str) -> int:
        """Bytes of a file, 0 if it is missing."""
        return self.path(name).stat().st_size if name in self else 0

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[Path]:
        """The path of one file; InputError if it is missing."""
        if name not in self:
            raise InputError(f"{name} is listed but not in {self.where}")
        yield self.path(name)


class Archive:
    """The members of a zip archive at a path, ``https://`` or ``gs://``; ``names``: of the files,
    except those of the operating system, ``recordings`` and ``left``: see `Folder`, but by the
    suffix alone.

    Raises:
        InputError: no such file, no support for ranges, or not a complete zip archive.
        Unreachable: the server stopped responding.
    """

    def __init__(self, where: str):
        self.where = where
        self.remote = RemoteFile(where) if "://" in where else None
        # The buffer is what one request fetches.
        file: Any = io.BufferedReader(self.remote, _REQUEST) if self.remote else where
        try:
            self._zip = zipfile.ZipFile(file)
        except zipfile.BadZipFile as error:
            message = f"{where} is not a complete zip archive ({error}). Download it again."
            raise InputError(message) from error
        except OSError as error:
            message = f"cannot open {where} ({error}). Give another address or a local copy."
            raise InputError(message) from error
        members = (info for info in self._zip.infolist() if not info.is_dir())
        self._members = {clean_name(files.printable(info.filename)): info for info in members}
        self.names = [name for name in self._members if not files.of_the_system(name)]
        self.recordings = [name for name in self.names if audio.is_audio(name)]
        others = sorted(set(self.names) - set(self.recordings))
        self.left = dict.fromkeys(others, audio.NO_RECORDING)
        # A member ends at the start of the next one, or of the central directory.
        starts = sorted(info.header_offset for info in self._members.values())
        self._stops = dict(zip(starts, [*starts[1:], self._zip.start_dir]))

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def size(self, name: str) -> int:
        """Compressed bytes of a member, 0 if it is missing."""
        return self._members[name].compress_size if name in self._members else 0

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[Path]:
        """The path of a scratch copy of one member, which is deleted afterwards. A damaged member
        is read once more: the damage may be one of the transfer.

        Raises:
            InputError: the member is missing, unreadable, or damaged.
            Unreachable: the server stopped responding.
        """
        if name not in self:
            raise InputError(f"{name} is listed but not in {self.where}")
        info = self._members[name]
        if self.remote:
            self.remote.stop = self._stops[info.header_offset]
        with files.scratch_folder() as folder:
            # its own name may be too long for the disk, or have letters that its locale lacks
            suffix = PurePosixPath(name).suffix
            path = folder / f"member{suffix if audio.is_audio(name) else ''}"
            try:
                self._copy(info, path)
            except Damaged:
                self._copy(info, path)
            yield path

    def _copy(self, info: zipfile.ZipInfo, path: Path) -> None:
        try:
            assert self._zip.fp  # it is open
            self._zip.fp.seek(0, io.SEEK_END)  # empties the buffer: what is in it may be damaged
            with self._zip.open(info) as member, path.open("wb") as file:
                shutil.copyfileobj(member, file, _PIECE)  # compares the CRC at the end
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise Damaged(f"{info.filename} is damaged in {self.where}: {error}") from error
        except NotImplementedError as error:  # a compression method that this Python lacks
            message = f"{info.filename} cannot be read from {self.where}: {error}"
            raise InputError(message) from error


def open_source(where: str) -> Archive | Folder:
    """The recordings at a path, ``https://`` or ``gs://`` address.

    Raises:
        InputError: neither an archive nor a folder; see `Archive`.
    """
    path = Path(where)
    if path.suffix.lower() == ".csv" and path.is_file():
        raise InputError(f"{where}: a table, not recordings. Give its folder, {path.parent}.")
    if "://" in where or path.is_file():
        return Archive(where)
    if not path.is_dir():
        advice = "Give a path, https:// or gs:// address."
        raise InputError(f"{where!r}: no such archive or folder of recordings. {advice}")
    return Folder(where)


class RemoteFile(io.RawIOBase):
    """A file at ``https://``, ``http://`` or ``gs://``, read by ranges after `files.retrying`; a
    request that broke off continues with the first missing byte.

    Attributes:
        stop: no request exceeds this position.
        fetched: bytes received.

    Raises:
        InputError: invalid address, or the server refuses or does not support ranges.
        Unreachable: the server does not respond; while reading also if it refuses or the file has
            changed.
    """

    def __init__(self, where: str):
        self.where, self.size, self.fetched, self._position = where, 0, 0, 0
        self._version: dict[str, str] = {}  # as the first response states it
        self._credentials: Any = None
        self._opener = urllib.request.build_opener(files.Redirects())
        self._advice = "Give a public address"
        bucket, _, key = where.removeprefix("gs://").partition("/")
        if where.startswith("gs://") and bucket and key:
            host = os.environ.get("STORAGE_EMULATOR_HOST", "https://storage.googleapis.com")
            key = urllib.parse.quote(key, safe="")
            self.url = f"{host}/download/storage/v1/b/{bucket}/o/{key}?alt=media"
        elif re.match(r"https?://[^/]", where):
            self.url = files.quoted(where)
        else:
            kinds = "https://, http:// or gs://BUCKET/OBJECT"
            raise InputError(f"cannot read {where!r}: give an address that starts with {kinds}")
        self.stop = 1
        self.readinto(bytearray(1))  # learns the size
        self.stop = self.size

    def readable(self) -> bool:
        """Always."""
        return True

    seekable = readable

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position; sends no request."""
        self._position = offset + (0, self._position, self.size)[whence]
        return self._position

    def readinto(self, buffer) -> int:
        """Fill ``buffer`` from the position on; fewer bytes only at ``stop``."""
        start, view = self._position, memoryview(buffer)
        stop = min(start + len(view), self.stop)
        try:
            for attempt in files.retrying():
                with attempt:
                    if self._position >= stop:
                        break
                    with self._request(self._position, stop) as answer:
                        while piece := answer.read1(min(_PIECE, stop - self._position)):
                            view[self._position - start :][: len(piece)] = piece
                            self._position += len(piece)
                            self.fetched += len(piece)
                            attempt.retry_state.attempt_number = 1  # there is progress
                            if self._position == stop:
                                break
                    if self._position < stop:
                        lost = stop - self._position
                        raise ConnectionError(f"the connection was lost {lost:,} bytes early")
        except (OSError, http.client.HTTPException) as error:
            self._position, reason = start, files.one_line(error)
            if files.may_pass(error):
                raise Unreachable(
                    f"{self.where} does not respond: {reason}, {files.ATTEMPTS} times in a row. Run"
                    " again later, or give a copy on disk."
                ) from error
            advice = {401: self._advice, 403: self._advice}
            advice[416] = "Check the file, which is empty or became shorter"
            found = advice.get(getattr(error, "code", 0), "Check the address")
            raise self._failure(f"cannot read {self.where}: {reason}. {found}") from error
        return max(stop - start, 0)

    def _request(self, start: int, stop: int) -> http.client.HTTPResponse:
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={start}-{stop - 1}"}
        request = urllib.request.Request(self.url, headers=headers)
        if self._credentials:  # not sent to the targets of redirects
            request.add_unredirected_header("Authorization", f"Bearer {self._token()}")
        try:
            answer = self._opener.open(request, timeout=files.TIMEOUT)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (401, 403) and self._log_in():
                return self._request(start, stop)
            raise
        try:
            self._check(answer, start)
        except BaseException:
            answer.close()
            raise
        return answer

    def _check(self, answer: http.client.HTTPResponse, start: int) -> None:
        """Raise unless a response has the requested bytes of the file that was opened."""
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
        if answer.status != 206 or not found:
            raise self._failure(
                f"{self.where} cannot be read by ranges (its server returns {answer.status} for a"
                " range request). Give another address"
            )
        version = {mark: answer.headers[mark] for mark in ("ETag", "Last-Modified")}
        version = {"bytes": found[2], **version}
        # Servers behind one address may report different dates for a file; the ETag identifies it.
        for mark, now in version.items():
            before = self._version.get(mark)
            if now and before and now != before:
                raise Unreachable(
                    f"{self.where} changed while it was read ({mark} {now}, was {before}). Start"
                    " again with a file that does not change."
                )
            if now and before and mark == "ETag":
                break
        if int(found[1]) != start:
            raise self._failure(f"{self.where}: its server sends other bytes than requested")
        self.size, self._version = int(found[2]), self._version or version

    def _failure(self, message: str) -> Exception:
        kind = Unreachable if self._version else InputError
        return kind(f"{message}, or give a copy on disk.")

    def _log_in(self) -> bool:
        """Whether there are Google credentials that have not been tried. Public files are read
        without: with the invalid ones of a Colab runtime without a login, Google refuses them."""
        if not self.where.startswith("gs://") or self._credentials:
            return False
        try:
            import google.auth.exceptions
        except ImportError:  # it comes with gcsfs
            self._advice = "Without gcsfs only public files can be read: install gcsfs"
            return False
        colab = "on Colab google.colab.auth.authenticate_user()"
        self._advice = f"Log in ({colab}, elsewhere GOOGLE_APPLICATION_CREDENTIALS)"
        with contextlib.suppress(google.auth.exceptions.GoogleAuthError):
            scope = "https://www.googleapis.com/auth/devstorage.read_only"
            self._credentials, _ = google.auth.default(scopes=[scope])
        return self._credentials is not None

    def _token(self) -> str:
        from google.auth.exceptions import GoogleAuthError, TransportError
        from google.auth.transport.requests import Request

        try:
            if not self._credentials.valid:
                self._credentials.refresh(Request())
        except TransportError as error:
            raise ConnectionError(f"no access token: {error}") from error
        except GoogleAuthError as error:
            message = f"cannot read {self.where}: no access token ({error}). {self._advice}"
            raise self._failure(message) from error
        return self._credentials.token


# --- Tables ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Recordings of a source: ``rows`` of `COLUMNS`, ordered by file name, ``duration`` in seconds;
    ``root``, the folder that file names are relative to, empty or with a final slash; ``refused``,
    unusable recordings with the reason; ``others``, files that are not recordings, see
    `files.summary`."""

    rows: pd.DataFrame
    root: str
    fingerprint: str
    refused: dict[str, str]
    licence: str
    others: dict[str, str]


def read_table(source: Archive | Folder) -> Table:
    """Read the source's table in MAESTRO's format, at the top or below; for a folder without one,
    make a table of its recordings.

    Raises:
        InputError: no table and no recordings, more than one table, not MAESTRO's columns and
            values, or a folder that is part of a data set with a table or has MAESTRO's recordings.
    """
    # --- The table: the only one that is nearest to the top
    tables, meant = [], []
    for name in source.left:
        hidden = any(part.startswith(".") for part in name.split("/"))
        made_here = f"{name[: name.rfind('/') + 1]}skipped.csv" in source.left  # by `preprocess`
        if name.lower().endswith(".csv") and name in source and not hidden and not made_here:
            tables.append(name)
            with source.open(name) as path:
                if _is_meant_as_table(path, name):
                    meant.append(name)
    if not meant and isinstance(source, Folder) and source.recordings:
        return _table_of_folder(source, tables)
    found = meant or (tables if len(tables) == 1 else [])
    top = min((name.count("/") for name in found), default=0)
    found = [name for name in found if name.count("/") == top]
    if len(found) > 1:
        raise InputError(
            f"{source.where} holds {len(found)} tables like maestro-v3.0.0.csv:"
            f" {', '.join(found[:5])}. Give a source with one of them."
        )
    if not found and source.recordings:
        advice = "Unpack it and give the folder, or give MAESTRO's archive."
        raise InputError(f"{source.where} has no CSV table like maestro-v3.0.0.csv. {advice}")
    if not found:
        archives = [name for name in source.left if name.lower().endswith(".zip")]
        advice = f"Give the archive {archives[0]}" if archives else "Give a folder of recordings"
        raise InputError(
            f"{source.where} has neither a CSV table like maestro-v3.0.0.csv nor a recording."
            f" {advice}, or MAESTRO's archive."
        )
    (name,) = found
    label = f"{name} in {source.where}"
    with source.open(name) as path:
        rows, digest = read_csv(path, "MAESTRO", COLUMNS, name=label), files.sha256_of(path)
    if missing := ", ".join(column for column in COLUMNS if column not in rows):
        raise InputError(f"{label} lacks the columns {missing}. Use the columns of MAESTRO v3.")
    if rows.empty:
        raise InputError(f"{label} lists no recordings. Download it again.")
    given = numbers(rows, ["year", "duration"])
    for column in [column for column in (*TEXT, "year", "duration") if column != "midi_filename"]:
        bad = ~given[column].between(-1e9, 1e9) if column in given else rows[column].isna()
        if bad.any():
            value = f"{column} is {rows[column][line := bad.idxmax()]!r:.60}"
            raise InputError(f"{label}, line {line}: {value}. Correct the value.")
    rows = rows.assign(year=given["year"].astype(int), duration=given["duration"])
    if unknown := sorted(set(rows["split"]) - set(SPLITS)):
        raise InputError(f"{label}: unknown split {unknown[0]!r}. Use one of: {', '.join(SPLITS)}.")
    listed = rows["audio_filename"]
    if (repeated := listed.duplicated()).any():
        twice = listed[repeated].iloc[0]
        raise InputError(f"{label} lists {twice} twice. Keep one line per recording.")
    # Unsafe names, rows without a file, files without a row.
    rows = rows.sort_values("audio_filename", ignore_index=True)
    listed, present = rows["audio_filename"], set(source.names)
    root, table = name[: name.rfind("/") + 1], name
    refused = {name: what for name in listed if (what := unsafe(name))}
    for name in listed:
        if name not in refused and root + name not in present and root + name not in source:
            refused[name] = f"{name} is listed but not in {source.where}"
    known = {root + name for name in listed}
    strays = (name for name in source.recordings if name not in known)
    refused |= dict.fromkeys(strays, "not listed in the table")
    known |= {table, *(root + rows["midi_filename"].dropna())}
    others = {name: reason for name, reason in source.left.items() if name not in known}
    rows = rows[~listed.isin(refused)]
    return Table(rows, root, digest[:16], refused, MAESTRO_LICENCE, others)


def _is_meant_as_table(path: Path, name: str) -> bool:
    """Whether a CSV is in MAESTRO's format, or was: a damaged table is not to be ignored."""
    with path.open("rb") as file:
        content = file.read(2**16).replace(b"\0", b"")  # UTF-16
    words = rb"canonical_|audio_filename|midi_filename|\.midi\b|MID--AUDIO"
    return "maestro" in PurePosixPath(name).name.lower() or bool(re.search(words, content))


def _table_of_folder(source: Folder, tables: list[str]) -> Table:
    """One row per recording of a folder; the folder's name serves as composer, the file's as
    title. ``tables``: CSV files that are not used."""
    home = Path(source.where).resolve()
    for parent in home.parents[:2]:
        for path in sorted(parent.glob("*.[cC][sS][vV]")):
            if files.of_the_system(path.name) or not path.is_file():
                continue
            below = f"{home.relative_to(parent).as_posix()}/".encode(errors="replace")
            if _is_meant_as_table(path, path.name) and below in path.read_bytes():
                raise InputError(
                    f"{source.where} is part of the data set of {path}: without this table its"
                    f" splits, MIDI and works are unknown. Give {parent}."
                )
    names, rows, refused = source.recordings, [], {}
    if of_maestro := [name for name in names if "MID--AUDIO" in name.upper()]:
        raise InputError(
            f"{source.where} has {len(of_maestro)} recordings of MAESTRO, such as {of_maestro[0]},"
            " without the table of their MIDI, splits and works. Give the folder with"
            " maestro-v3.0.0.csv, or remove them."
        )
    for name in names:
        path = Path(name)
        try:
            seconds = audio.duration(source.path(name))
        except InputError as error:
            refused[name] = str(error)
        else:
            composer, title = path.parent.name or "own recording", audio.stem(path.name)
            rows.append((composer, title, "", 0, "", name, seconds))
    if not rows:
        what = f"none of the {len(names)} recordings in {source.where} can be read"
        raise InputError(f"{what}; {next(iter(refused.values()))}")
    table = pd.DataFrame(rows, columns=COLUMNS)
    # A tenth for validation and a tenth for test, at least one of each if there are three or more.
    # With three or more folders, recordings of a folder share a split: takes of one piece are often
    # in one folder.
    folders = table["audio_filename"].map(lambda name: Path(name).parent.as_posix())
    groups = folders if folders.nunique() >= 3 else table["audio_filename"]
    ordered = sorted(groups.unique(), key=files.sha256_of)  # random, independent of other names
    tenth = max(len(ordered) // 10, 1)
    split = dict.fromkeys(ordered, "train")
    if len(ordered) >= 2:
        split |= dict.fromkeys(ordered[:tenth], "validation")
    if len(ordered) >= 3:
        split |= dict.fromkeys(ordered[tenth : 2 * tenth], "test")
    table["split"] = groups.map(split)
    sizes = "".join(f"{name} {source.size(name)}\n" for name in names)
    others = source.left | dict.fromkeys(tables, "CSV tables are not like MAESTRO's and not used")
    return Table(table, "", files.sha256_of(sizes)[:16], refused, OWN_LICENCE, others)


def limited(rows: pd.DataFrame, hours: float) -> pd.DataFrame:
    """About ``hours`` of the recordings, in proportion to the splits, at least one of each; a
    higher limit includes all recordings of a lower one. InputError: ``hours`` of 0 or less."""
    if hours <= 0:
        advice = "Give more, or 0 for no limit."
        raise InputError(f"a limit of {hours:g} hours selects no recordings. {advice}")
    share = hours * 3600 / rows["duration"].sum()
    parts = []
    for _, part in rows.groupby("split", sort=False):
        part = part.sort_values("audio_filename", key=lambda names: names.map(files.sha256_of))
        before = part["duration"].cumsum() - part["duration"]
        parts.append(part[before < share * part["duration"].sum()])
    return pd.concat(parts).sort_index()
