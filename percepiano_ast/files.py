"""Files: atomic writes, checksums, transfers, run directories, and process pools."""

import collections
import contextlib
import dataclasses
import email.utils
import errno
import hashlib
import http.client
import io
import itertools
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import re
import shutil
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import tenacity
from safetensors.numpy import save_file

from percepiano_ast.errors import InputError, RunFailed, visible

LOG_SECONDS = 5.0  # between two lines of progress
ATTEMPTS = 6  # of a transfer, without a byte of progress
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between attempts: doubled every time, at most
TIMEOUT = 60.0  # seconds without a response or a byte
# A connection that is slower over so many seconds is given up; an attempt that transfers less does
# not count as progress.
LOWEST_RATE, RATE_SECONDS = 1000, 15.0  # bytes per second
MAX_JSON = 2**24  # bytes; ours have less than 1 MB, and objects take 25 times the text
MAX_ARRAYS = 2**29  # bytes of a .npz file; the performances of MAESTRO have 0.13 GB
MAX_MODEL = 2**28  # bytes of a rating model; with an encoder of the size base 0.2 GB
MAX_HEADER = 2**20  # bytes of a safetensors file's; ours have 0.02 MB
MAX_DOWNLOAD = 2 * 10**9  # bytes; AST base has 0.35 GB
ADVICE = "Copy it again from where it was made, or make it again."  # about a damaged file
SIGNATURE = "manifest_sha256"  # name of the checksum in signed JSON
_BLOCK = 2**20  # bytes


# --- Log -----------------------------------------------------------------------------------------

logger = logging.getLogger(__name__)


class _Print(logging.Handler):
    """Prints to what `sys.stdout` is when a line is logged: a notebook replaces it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), flush=True)


def show_progress(quiet: bool = False) -> None:
    """Print the package's log to standard output: progress and warnings, or with ``quiet`` warnings
    only."""
    package = logging.getLogger("percepiano_ast")
    if not any(isinstance(handler, _Print) for handler in package.handlers):
        package.addHandler(_Print())
    package.setLevel(logging.WARNING if quiet else logging.INFO)
    package.propagate = False  # Orbax, which Flax imports, gives the root logger a handler too


# --- Writing and checking -------------------------------------------------------------------------


@contextlib.contextmanager
def atomic(path: str | Path, *, unique: bool = False) -> Iterator[Path]:
    """Path of a temporary file, which replaces ``path`` when the block ends, or is deleted if the
    block raises; missing folders are made.

    Args:
        unique: several processes may write the same file.
    """
    path = as_path(path)
    middle = f".{os.getpid()}" if unique else ""
    partial = path.with_name(f"{path.name}{middle}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Write a file in one step, see `atomic`; after a power cut it is there, old or new."""
    with atomic(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        if isinstance(partial, Path):
            _sync(partial)
    if isinstance(partial, Path):
        with contextlib.suppress(OSError):  # some mounts, as Drive's, refuse it for a folder
            _sync(partial.parent)


def _sync(path: Path) -> None:
    """Wait until a file or a folder's list of names is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_json(path: str | Path, value) -> None:
    """Write JSON in one step, see `write_atomic`."""
    write_atomic(path, json.dumps(value, indent=1) + "\n")


def signed_json(value: dict) -> bytes:
    """JSON of an object with the SHA-256 of its content, which does not depend on the formatting,
    as the last item ``manifest_sha256``. It shows damage; it does not prove the origin."""
    value = json.loads(json.dumps(value))  # keys that are numbers are sorted as text
    return (json.dumps(value | {SIGNATURE: _digest(value)}, indent=1) + "\n").encode()


def _digest(value: dict) -> str:
    return sha256_of(json.dumps(value, sort_keys=True))


def write_signed_json(path: str | Path, value: dict) -> None:
    """Write `signed_json` in one step, see `write_atomic`."""
    write_atomic(path, signed_json(value))


def read_signed_json(
    source: str | Path | bytes,
    schema: Any = dict,
    *,
    name: str = "",
    advice: str = ADVICE,
    unsigned: bool = False,
) -> dict:
    """The object in a file of `write_signed_json`, or the content, without its checksum.

    Args:
        schema, name, advice: see `read_json`.
        unsigned: accept one of exactly the schema's keys, as earlier versions wrote them.

    Raises:
        InputError: see `read_json`; or the content does not match its checksum.
    """
    name = name or ("JSON" if isinstance(source, bytes) else str(source))
    value = read_json(source, schema, name=name, advice=advice)
    if unsigned and value.keys() == schema.keys():
        return value
    if value.pop(SIGNATURE, None) != _digest(value):
        raise _fault(f"{name} is damaged (its checksum differs)", advice)
    return value


def read_json(
    source: str | Path | bytes, schema: Any = dict, *, name: str = "", advice: str = ADVICE
) -> Any:
    """Read JSON that may be damaged or of others: at most `MAX_JSON` bytes, and as
    deep as Python's parser goes.

    Args:
        source: a path, local or at ``gs://``, or the content.
        schema: what the value must be: a type or union of types (``int | None``); ``[schema]``, a
            list; ``{str: schema}``, any keys; ``{"key": schema, ...}``, these keys at least; a
            configuration of `config`, an object with all its fields.
        name: in messages; by default the path.
        advice: the next action; empty for a message that is part of another.

    Raises:
        InputError: not readable, larger or deeper than the limits, not UTF-8 or not JSON, a key
            twice, or not of the schema; infinity and NaN are allowed.
    """
    name = name or ("JSON" if isinstance(source, bytes) else str(source))
    try:
        if isinstance(source, bytes):
            content = source
        else:
            with as_path(source).open("rb") as file:
                content = file.read(MAX_JSON + 1)
        if len(content) > MAX_JSON:
            raise _fault(f"{name} has more than {MAX_JSON:,} bytes", advice)
        value = json.loads(content.decode("utf-8-sig"), object_pairs_hook=_once)
    except FileNotFoundError:
        raise _fault(f"{name} is missing", advice) from None
    except OSError as error:  # such as a folder, or links in a circle
        raise _fault(
            f"{name} cannot be read ({error.strerror or one_line(error)})", advice
        ) from None
    except RecursionError:
        raise _fault(f"{name} is damaged (nested too deeply)", advice) from None
    except ValueError as error:  # not JSON, not UTF-8, a number of thousands of digits
        if isinstance(error, InputError):
            raise
        raise _fault(f"{name} is damaged ({one_line(error)})", advice) from None
    if fault := _mismatch(value, schema, "it"):
        raise _fault(f"{name} is damaged ({fault})", advice)
    return value


def _fault(message: str, advice: str) -> InputError:
    return InputError(f"{message}. {advice}" if advice else message)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; a ValueError for a repeated key."""
    if len(found := dict(pairs)) < len(pairs):
        ((twice, _),) = collections.Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{twice!r:.60} twice")
    return found


def _mismatch(value: Any, schema: Any, where: str) -> str:
    """How a value of JSON differs from a schema of `read_json`; empty if it does not."""
    if dataclasses.is_dataclass(schema):  # tuples are of integers
        fields = dataclasses.fields(schema)
        schema = {f.name: f.type if isinstance(f.type, type) else [int] for f in fields}
    if isinstance(schema, (list, dict)):
        if not isinstance(value, type(schema)):
            return f"{where} is a {type(value).__name__}, not a {type(schema).__name__}"
        if isinstance(schema, list):
            inside = [(one, schema[0], f"{where}[{n}]") for n, one in enumerate(value)]
        elif str in schema:
            assert isinstance(value, dict)
            inside = [(one, schema[str], f"{where}[{key!r:.40}]") for key, one in value.items()]
        elif missing := [key for key in schema if key not in value]:
            return f"{where} lacks {missing[0]!r}"
        else:
            inside = [(value[key], one, f"{where}[{key!r}]") for key, one in schema.items()]
        return next((fault for one in inside if (fault := _mismatch(*one))), "")
    kinds = getattr(schema, "__args__", (schema,))  # of a union
    # True does not count as an integer; a whole number is a float
    right = type(value) in kinds or object in kinds or (type(value) is int and float in kinds)
    expected = " or ".join(kind.__name__ for kind in kinds)
    return "" if right else f"{where} is {value!r:.60}, not {expected}"


def read_npz(
    source: str | Path | bytes, *, name: str = "", advice: str = "Delete it and run again."
) -> dict[str, np.ndarray]:
    """Read the arrays of a ``.npz`` file that may be damaged or of others: at most `MAX_ARRAYS`
    bytes when expanded, and no objects. Arguments as in `read_json`.

    Raises:
        InputError: missing, larger, or damaged, which the checksums of its arrays show.
    """
    name = name or ("a .npz file" if isinstance(source, bytes) else str(source))
    try:
        size = len(source) if isinstance(source, bytes) else size_of(as_path(source))
        if size <= MAX_ARRAYS:
            content = source if isinstance(source, bytes) else as_path(source).read_bytes()
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                members = archive.infolist()
            size = sum(member.file_size for member in members)
        if size > MAX_ARRAYS:
            raise InputError(f"{name} expands to more than {MAX_ARRAYS:,} bytes. {advice}")
        # Python's readers of other methods inflate without a limit.
        known = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
        if not {member.compress_type for member in members} <= known:
            raise InputError(f"{name} is not compressed as NumPy does. {advice}")
        with np.load(io.BytesIO(content)) as arrays:
            found = dict(arrays)
        if odd := [key for key, value in found.items() if not isinstance(value, np.ndarray)]:
            raise InputError(f"{name} holds {odd[0]!r:.60}, which is not an array. {advice}")
        return found
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{name} is missing. {advice}") from None
    except Exception as error:  # any: zipfile, zlib and NumPy have no list of their errors
        raise InputError(f"{name} is damaged ({one_line(error)}). {advice}") from None


_UNSIGNED = b'"sha256":"%s"' % (b"0" * 64)  # in the header of a safetensors file


def write_tensors(
    path: str | Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]
) -> None:
    """Write a safetensors file in one step, with ``sha256`` in its metadata: the SHA-256 of the
    file in which this value is 64 zeros. `check_tensors` compares it."""
    # safetensors writes an array's memory as it is, whatever its strides are.
    tensors = {name: np.asarray(values, order="C") for name, values in tensors.items()}
    with atomic(path) as partial:
        save_file(tensors, partial, metadata | {"sha256": "0" * 64})
        digest = sha256_of(partial)
        with partial.open("r+b") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
            file.seek(8 + header.index(_UNSIGNED) + len(b'"sha256":"'))
            file.write(digest.encode())


def check_tensors(path: str | Path, limit: int = MAX_MODEL) -> bool:
    """Whether a safetensors file has the checksum of `write_tensors`; a file that is missing or
    something else has none. The caller refuses unknown metadata, so that damage to the name of the
    checksum is noticed too.

    Raises:
        InputError: more than ``limit`` bytes, or `MAX_HEADER`, or the checksum differs.
    """
    path = Path(path)
    if not path.is_file():
        return False
    if (size := path.stat().st_size) > limit:
        raise InputError(f"{path} has {size:,} bytes, and at most {limit:,} are read. Check it.")
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if MAX_HEADER < length < size:
            most = f"at most {MAX_HEADER:,} are read"
            raise InputError(f"{path} has a header of {length:,} bytes, and {most}. Check it.")
        head += file.read(min(length, MAX_HEADER))
        stated = re.search(rb'"sha256":"([^"]*)"', head)
        if not stated:
            return False
        unsigned = head[: stated.start()] + _UNSIGNED + head[stated.end() :]
        digest = hashlib.file_digest(file, lambda: hashlib.sha256(unsigned))
    if digest.hexdigest().encode() != stated[1]:
        raise InputError(f"{path} is damaged (its checksum differs). Copy or download it again.")
    return True


def one_line(error: BaseException | None) -> str:
    """The message of another library's error, in one line of at most 200 characters."""
    text = " ".join(str(error).split())[:200]
    return text if text and not isinstance(error, KeyError) else f"{type(error).__name__} {text}"


def cached_arrays(
    path: Path, names: Collection[str], compute: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The arrays of these names in an ``.npz`` file, which has a checksum of each; computed and
    written if the file is missing or damaged."""
    if path.exists():
        try:
            found = read_npz(path, advice="It is computed again")
            return {name: found[name] for name in names}
        except (InputError, KeyError) as error:
            logger.info(f"  {one_line(error)}")
    found = compute()
    with atomic(path) as partial, partial.open("wb") as file:
        np.savez(file, **found)
    return found


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder, deleted afterwards; those of killed processes are deleted first."""
    for path in Path(tempfile.gettempdir()).glob("percepiano_*_*"):
        try:
            os.kill(int(path.name.split("_")[1]), 0)  # signal 0 tests whether a process exists
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
        except (ValueError, OSError, OverflowError):  # not ours, or of another user
            pass
    with tempfile.TemporaryDirectory(prefix=f"percepiano_{os.getpid()}_") as folder:
        yield Path(folder)


def sha256_of(*parts: Path | str | bytes | np.ndarray) -> str:
    """SHA-256, in hexadecimal, of the concatenated parts: a file's content for a `Path`, UTF-8 for
    a string, the values of an array in C order."""
    digest = hashlib.sha256()
    for part in parts:
        if hasattr(part, "open"):  # also a path at gs://
            with part.open("rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
        elif isinstance(part, np.ndarray):
            digest.update(part.tobytes())
        else:
            digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()


def copy_verified(
    files: dict[str, dict],
    source: Path | str,
    target: Path,
    advice: str,
    copy: Callable[[str, Path, int], object] | None = None,
) -> None:
    """Copy ``files``, ``{name: {"bytes", "sha256"}}``, to a local folder. Files that match already
    are not copied again.

    Args:
        advice: the next action if a file does not match.
        copy: ``copy(name, path, bytes)`` brings one file; by default from the folder ``source``.

    Raises:
        InputError: too little disk space.
        RunFailed: a file does not match its length or checksum.
    """

    def copy_local(name: str, path: Path, length: int) -> None:
        if (Path(source) / name).stat().st_size != length:
            raise RunFailed(f"{source}/{name} has the wrong length. {advice}")
        shutil.copyfile(Path(source) / name, path)

    def matches(path: Path, known: dict) -> bool:
        return path.is_file() and sha256_of(path) == known["sha256"]

    todo = {name: known for name, known in files.items() if not matches(target / name, known)}
    size = sum(known["bytes"] for known in todo.values())
    target.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(target).free) < size:
        need = f"{target} has {free / 1e9:.1f} GB free, the files need {size / 1e9:.1f} GB"
        raise InputError(f"{need}. Free disk space there.")
    for number, (name, known) in enumerate(todo.items(), start=1):
        with atomic(target / name) as partial:
            (copy or copy_local)(name, partial, known["bytes"])
            if not matches(partial, known):
                raise RunFailed(f"{source}/{name} does not match its checksum. {advice}")
        if number % 10 == 0 or number == len(todo):
            logger.info(f"  {number}/{len(todo)} files of {size / 1e9:.1f} GB copied to {target}")


def size_of(path: Path) -> int:
    """Size of a local file or one at ``gs://`` in bytes."""
    stat = path.stat()
    return stat.st_size if isinstance(path, Path) else stat.length


def disk_is_full(error: Exception) -> bool:
    """Whether a full disk caused an error: an OSError, or ArrayRecord's RuntimeError with the
    system's message."""
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError):
        return error.errno in full
    return isinstance(error, RuntimeError) and any(os.strerror(n) in str(error) for n in full)


# --- Names and folders ----------------------------------------------------------------------------

# What macOS, Windows, a NAS and Jupyter put into folders and archives.
_OF_THE_SYSTEM = re.compile(
    r"\._.*|\.DS_Store|\.localized|\.Spotlight-V100|\.Trashes|\.fseventsd|Icon\r|__MACOSX"
    r"|(eh)?thumbs\.db|desktop\.ini|\$RECYCLE\.BIN|System Volume Information|@eaDir"
    r"|\.ipynb_checkpoints",
    re.IGNORECASE | re.DOTALL,
)


def as_text(name: str | os.PathLike) -> str:
    """A file name that can be encoded: bytes that are not UTF-8 as ``\\xNN``."""
    text = os.fspath(name)
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # surrogates that stand for no byte
        return text.encode("utf-8", "backslashreplace").decode()


def printable(name: str | os.PathLike) -> str:
    """A file name on one line of a text, see `as_text`, with control characters as in
    ``\\n``."""
    return visible(as_text(name))


def of_the_system(name: str) -> bool:
    """Whether a path, with ``/``, is of an operating system's own files, such as ``._a.csv``."""
    return any(_OF_THE_SYSTEM.fullmatch(part) for part in name.split("/"))


def matching(folder: Path, pattern: str) -> list[Path]:
    """What of a folder matches a pattern, sorted, except files of the operating system."""
    return sorted(path for path in folder.glob(pattern) if not of_the_system(path.name))


def walk(folder: str | Path) -> tuple[list[Path], dict[Path, str]]:
    """The files below a folder, sorted, and what is left out, with the reason in the plural, see
    `summary`. Links are followed, to every folder and file once: files have names without links
    where there are any. Files of the operating system are passed over."""
    root = os.path.realpath(folder)
    folders, links, file_links = [Path(folder)], [], []
    seen, real, found = set(), set(), []
    left: dict[Path, str] = {}
    while folders:
        home = folders.pop(0)
        here = os.path.realpath(home)
        if here not in seen:
            seen.add(here)
            try:
                for entry in list(os.scandir(home)):
                    path = Path(entry.path)
                    if of_the_system(entry.name):
                        continue
                    if entry.name.startswith("."):
                        left[path] = "hidden files or folders are left out"
                    elif entry.is_symlink():
                        links.append(path)
                    elif entry.is_dir():
                        folders.append(path)
                    elif entry.is_file():
                        found.append(path)
                        real.add(os.path.join(here, entry.name))
                    else:
                        left[path] = "devices or pipes are left out"
            except OSError as error:
                left[home] = f"folders cannot be read ({error.strerror})"
        if not folders:  # folders behind links come last
            for link in sorted(links):
                target = os.path.realpath(link)
                if os.path.isfile(link):
                    file_links.append(link)
                elif not os.path.isdir(link):
                    left[link] = "links lead to no file or folder that can be read"
                elif target != root and Path(root).is_relative_to(target):
                    left[link] = "links lead to a folder around this one and are not followed"
                else:
                    folders.append(link)
            links = []
    for link in sorted(file_links):
        if (target := os.path.realpath(link)) not in real:
            real.add(target)
            found.append(link)
    return sorted(found), left


def summary(left: Mapping[Any, str]) -> list[str]:
    """What is left out of a folder, one line per reason: ``2 other files are not recordings: ...``,
    with the first five names."""
    lines = []
    for reason in dict.fromkeys(left.values()):
        names = [printable(name) for name, why in left.items() if why == reason]
        more = " ..." * (len(names) > 5)
        lines.append(f"{len(names):,} {reason}: {', '.join(names[:5])}{more}")
    return lines


# --- Transfers ------------------------------------------------------------------------------------


def retrying(**options) -> tenacity.Retrying:
    """The policy for HTTP requests: `ATTEMPTS` attempts while an error `may_pass`. The caller sets
    ``attempt_number`` of the state back to 1 after progress; ``options`` are more of tenacity's."""
    return tenacity.Retrying(
        stop=lambda state: state.attempt_number >= ATTEMPTS,
        wait=_wait,
        retry=tenacity.retry_if_exception(may_pass),
        sleep=time.sleep,
        reraise=True,
        **options,
    )


def may_pass(error: BaseException) -> bool:
    """Whether another attempt may succeed: after a lost connection, silence, and the answers 408,
    425, 429 and 5xx."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code >= 500 or error.code in (408, 425, 429)
    if isinstance(error, http.client.InvalidURL) or not isinstance(
        error, (OSError, http.client.HTTPException)
    ):
        return False
    return not disk_is_full(error)


def _wait(state: tenacity.RetryCallState) -> float:
    """Seconds: doubled with every attempt, or as long as the server asks for (a number or a
    date)."""
    assert state.outcome is not None  # called after an attempt
    headers = getattr(state.outcome.exception(), "headers", None) or {}
    asked, seconds = headers.get("Retry-After", ""), 0.0
    if asked.isdecimal():
        seconds = float(asked)
    elif date := email.utils.parsedate_tz(asked):
        seconds = email.utils.mktime_tz(date) - time.time()
    return min(max(FIRST_WAIT * 2 ** (state.attempt_number - 1), seconds), LONGEST_WAIT)


def quoted(url: str) -> str:
    """An address without spaces and non-ASCII letters; sequences that are quoted already stay."""
    return urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")


def download(url: str, path: str | Path, limit: int = MAX_DOWNLOAD) -> str:
    """Download ``url`` to ``path`` and return its SHA-256; resumes an interrupted call.

    The file gets its final name after its length is verified, and its SHA-256 if the server states
    one: Hugging Face does, in the redirect to its object store (``X-Linked-ETag``).

    Args:
        limit: bytes; a longer file is refused, also if its server does not state its length.

    Raises:
        InputError: the server refuses, does not respond, sends less than `LOWEST_RATE`, or
            redirects to another scheme; the file is longer than ``limit``, a web page, compressed
            for transfer, or does not match the stated checksum.
    """
    if not url.startswith(("http://", "https://")):
        raise InputError(f"cannot download {url!r}: give an http:// or https:// address.")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")

    def log_error(state: tenacity.RetryCallState) -> None:
        assert state.outcome is not None  # called after an attempt
        error = one_line(state.outcome.exception())
        logger.info(f"  {path.name}: {error}; retrying in {state.upcoming_sleep:.0f} s")

    stated = None
    try:
        for attempt in retrying(before_sleep=log_error):
            with attempt:
                before = partial.stat().st_size if partial.exists() else 0
                try:
                    stated = _transfer(url, partial, path.name, limit)
                finally:
                    grown = partial.stat().st_size - before if partial.exists() else 0
                    if grown >= LOWEST_RATE * RATE_SECONDS:
                        attempt.retry_state.attempt_number = 1
    except (OSError, http.client.HTTPException) as error:
        if disk_is_full(error):
            raise
        again = f", {ATTEMPTS} times. Run again later to resume, or give a local copy."
        advice = again if may_pass(error) else ". Give a local copy instead."
        raise InputError(f"cannot download {url}: {one_line(error)}{advice}") from error
    digest = sha256_of(partial)
    if stated not in (None, digest):
        partial.unlink()
        what = f"{url} has SHA-256 {digest}, expected {stated}"
        raise InputError(f"{what}. Run again to download it from the start.")
    partial.replace(path)
    return digest


class Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to the same scheme or to https; keeps the SHA-256 that a redirecting
    response states. InputError for another scheme."""

    stated: str | None = None

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        """See `urllib.request`."""
        if (scheme := urllib.parse.urlsplit(newurl).scheme) not in ("https", req.type):
            fp.close()
            raise InputError(
                f"{req.full_url} redirects from {req.type} to {scheme} ({newurl:.100}), which is"
                " not followed. Give an address without this redirect, or a local copy."
            )
        if found := re.fullmatch(r'"?([0-9a-f]{64})"?', headers.get("X-Linked-ETag", "")):
            self.stated = found[1]
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _transfer(url: str, partial: Path, name: str, limit: int) -> str | None:
    """One attempt to complete ``partial``; returns the SHA-256 that the server states, if any."""
    start = partial.stat().st_size if partial.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    redirects = Redirects()
    try:
        request = urllib.request.Request(quoted(url), headers=headers)
        opener, answered = urllib.request.build_opener(redirects), Future[Any]()

        def ask() -> None:
            try:
                answered.set_result(opener.open(request, timeout=TIMEOUT))
            except BaseException as error:
                answered.set_exception(error)

        # TIMEOUT is without a byte; the lines before a file may come one by one, or without end.
        threading.Thread(target=ask, daemon=True).start()
        if not wait([answered], 2 * TIMEOUT).done:
            raise InputError(f"{url} sends no complete answer. Give a local copy instead.")
        answer = answered.result()
    except urllib.error.HTTPError as error:
        error.close()
        if error.code != 416 or not start:
            raise
        # No bytes after the end of the partial file: it is complete, or of an older, longer file.
        if error.headers.get("Content-Range", "").endswith(f"/{start}"):
            return redirects.stated
        partial.unlink()
        return _transfer(url, partial, name, limit)
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot download {url}: {one_line(error)}. Check the address.") from None
    with answer:
        encoding = answer.headers.get("Content-Encoding", "identity")
        kind = answer.headers.get_content_type()
        if kind == "text/html" or encoding != "identity":
            what = "a web page" if kind == "text/html" else f"compressed ({encoding:.20})"
            raise InputError(f"{url} is {what}, not the file itself. Give the file's own address.")
        if answer.status != 206:  # the server does not support ranges
            start = 0
        elif not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise InputError(f"{url}: its server sends other bytes than asked. Give a local copy.")
        total = None if answer.length is None else start + answer.length
        began, done = time.monotonic(), start
        shown, since, before = began, began, done
        with partial.open("ab" if start else "wb") as file:
            while max(done, total or 0) <= limit and (block := answer.read1(_BLOCK)):
                file.write(block)
                done += len(block)
                now = time.monotonic()
                if now - since > RATE_SECONDS:
                    if done - before < LOWEST_RATE * (now - since):
                        raise InputError(
                            f"{url} sends less than {LOWEST_RATE:,} bytes per second. Run again"
                            " later to resume, or give a local copy."
                        )
                    since, before = now, done
                if now - shown > LOG_SECONDS or done == total:
                    shown, size = now, f"{done / 1e6:.1f} MB"
                    if total:
                        left = (now - began) / (done - start) * (total - done)
                        size = f"{done / 1e6:.1f} of {total / 1e6:.1f} MB, about {left:.0f} s left"
                    logger.info(f"  {name}: {size}")
    if max(done, total or 0) > limit:
        partial.unlink()
        raise InputError(f"{url} has more than {limit / 1e6:,.0f} MB. Check the address.")
    if total is not None and done < total:
        raise ConnectionError(f"the connection was lost after {done:,} of {total:,} bytes")
    return redirects.stated


# --- Run directories ------------------------------------------------------------------------------


def as_path(path: str | Path) -> Path:
    """A local path, or a path object for ``gs://``.

    Raises:
        InputError: an address with another scheme.
    """
    scheme, remote, _ = str(path).partition("://")
    if remote and scheme != "gs":
        raise InputError(f"cannot write to {path}: give a local directory or a gs:// address")
    if remote:
        from etils import epath  # not needed to rate recordings

        return epath.Path(path)
    return Path(path)


def lock_config(
    directory: str | Path, settings: dict, saved: Callable[[], dict | None] = lambda: None
) -> Path:
    """Reserve ``directory`` for one configuration, stored in ``settings.json``, or verify that it
    is reserved for it.

    Args:
        saved: returns the settings, and perhaps more, that the output in the directory holds,
            or None. They count if ``settings.json`` is damaged, missing or another, and it is
            written again.

    Raises:
        InputError: the directory holds the output of another configuration, is not writable, or
            has a name that is not UTF-8; ``settings.json`` is damaged, and there are no others.
    """
    directory = as_path(directory)
    if (name := as_text(str(directory))) != str(directory):
        raise InputError(f"{name}: a name that is not UTF-8. Choose another output directory.")
    path = directory / "settings.json"
    advice = "Rename the directory, or choose another output directory."
    fault, damage = "", None
    if path.exists():
        try:
            if not (fault := difference(read_json(path, advice=advice), settings)):
                return directory
        except InputError as error:
            damage = error
    if known := saved():
        fault = difference({key: known.get(key) for key in settings}, settings)
    elif damage:
        raise damage
    if fault:
        raise InputError(
            f"{directory} holds the output of another configuration ({fault}). Choose another"
            " output directory, or delete this one to start over."
        )
    if known:
        logger.info(f"  {path} was damaged or missing: written again, as the output there says")
    try:
        write_json(path, settings)
    except OSError as error:
        message = f"cannot write to {directory} ({error}). Choose another output directory."
        raise InputError(message) from error
    return directory


def difference(found: dict, wanted: dict) -> str:
    """The differences between existing and requested settings, compared as JSON; empty if equal."""
    found, wanted = json.loads(json.dumps([found, wanted]))

    def short(settings: dict, key: str) -> str:
        text = json.dumps(settings.get(key))
        return text if len(text) <= 60 else text[:57] + "..."

    return "; ".join(
        f"{key}: found {short(found, key)}, requested {short(wanted, key)}"
        for key in sorted(wanted.keys() | found.keys())
        if wanted.get(key) != found.get(key)
    )


# --- Progress and worker processes ----------------------------------------------------------------


class TimeLeft:
    """Logs the progress of long work every `LOG_SECONDS`: ``  12 of 40, about 90 s left``."""

    def __init__(self, total: int, what: str = ""):
        self.total, self.what = total, what
        self.started = self.shown = time.monotonic()

    def __call__(self, done: int) -> None:
        """Log that ``done`` of the items are finished, if the last line is old enough."""
        now = time.monotonic()
        if now - self.shown > LOG_SECONDS:
            self.shown = now
            left = (now - self.started) / done * (self.total - done)
            logger.info(f"  {self.what}{done:,} of {self.total:,}, about {left:.0f} s left")


def process_map(
    function: Callable[[Any], Any], items: Iterable, workers: int, *, chunksize: int = 1
) -> Generator:
    """The results of ``function`` for every item, in order, computed by ``workers`` processes (one:
    by this process).

    ``function`` and items must be picklable. At most two chunks of ``chunksize`` items per worker
    are under way, so that results do not pile up. The workers end with this process, also if it is
    killed.

    Raises:
        RunFailed: a worker was killed; results yielded before remain valid.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    # Fork is unsafe with JAX's threads.
    context = multiprocessing.get_context("spawn")
    running: collections.deque = collections.deque()
    items = iter(items)
    try:
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
            try:
                while chunk := list(itertools.islice(items, chunksize)):
                    running.append(pool.submit(_map, function, chunk))
                    if len(running) == 2 * workers:
                        yield from running.popleft().result()
                while running:
                    yield from running.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)
    except BrokenProcessPool as error:
        what = f"a worker process was killed ({error}), perhaps for lack of memory"
        raise RunFailed(f"{what}. Run again to resume.") from error


def _map(function: Callable[[Any], Any], items: list) -> list:
    return list(map(function, items))


def _end_with_parent() -> None:
    """Initializer of a process pool: end this worker when its parent is killed."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None  # every worker has one
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
