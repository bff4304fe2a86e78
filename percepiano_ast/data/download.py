"""Download large files over HTTP with resuming, retries and checksums.

Hugging Face states the SHA-256 of a large file in its first response, the redirect to the object
store (``X-Linked-ETag``). Other servers state only a length.
"""

import email.message
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from percepiano_ast.data import retry
from percepiano_ast.errors import InputError
from percepiano_ast.files import sha256_of

_BLOCK = 2**20
_LOG_EVERY = 5.0  # seconds


def download(url: str, path: str | Path, *, log: Callable[[str], None] = print) -> str:
    """Download ``url`` to ``path`` and return its SHA-256; resumes an interrupted call.

    The file gets its final name after its length, and its SHA-256 if the server states one, are
    verified.

    Raises:
        InputError: the server refuses or does not respond, or the file does not match the stated
            checksum.
    """
    if not url.startswith(("http://", "https://")):
        raise InputError(f"cannot download {url!r}: give an http:// or https:// address.")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    patience = retry.Patience()
    while True:
        before = _size(partial)
        try:
            promised = _transfer(url, partial, log)
            break
        except retry.BROKEN as error:
            if retry.is_final(error):
                raise InputError(
                    f"cannot download {url}: {error}. Give a local copy instead."
                ) from error
            wait = patience.wait_after(error, progress=_size(partial) > before)
            if wait is None:
                what = f"cannot download {url}: {error}, {patience.failures} times"
                raise InputError(
                    f"{what}. Run again later to resume, or give a local copy."
                ) from error
            log(f"  {path.name}: {error}; retrying in {wait:.0f} s")
            time.sleep(wait)
    digest = sha256_of(partial)
    if promised not in (None, digest):
        partial.unlink()
        raise InputError(
            f"{url} has SHA-256 {digest}, expected {promised}. Run again to download it from the"
            " start."
        )
    partial.replace(path)
    return digest


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects and keeps the headers of the redirecting responses."""

    def __init__(self) -> None:
        self.answers: list[email.message.Message] = []

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        """As in the parent class; called for every redirect."""
        self.answers.append(headers)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _transfer(url: str, partial: Path, log: Callable[[str], None]) -> str | None:
    """Complete ``partial``; returns the SHA-256 that the server states, if any."""
    start = _size(partial)
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    redirects = _Redirects()
    try:
        request = urllib.request.Request(url, headers=headers)
        answer = urllib.request.build_opener(redirects).open(request, timeout=retry.TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not start:
            raise
        # no bytes after the end of the partial file: it is complete, or longer than the file is now
        with error:
            if _total(error.headers) == start:
                return _promised([*redirects.answers, error.headers])
        partial.unlink()
        return _transfer(url, partial, log)
    with answer:
        if start and answer.status != 206:  # the server does not support ranges
            start = 0
        total = _total(answer.headers) if answer.status == 206 else _length(answer.headers)
        _receive(answer, partial, start, total, log)
        return _promised([*redirects.answers, answer.headers])


def _receive(
    answer, partial: Path, start: int, total: int | None, log: Callable[[str], None]
) -> None:
    began = shown = time.monotonic()
    done = start
    with partial.open("ab" if start else "wb") as file:
        while block := answer.read(_BLOCK):
            file.write(block)
            done += len(block)
            now = time.monotonic()
            if total and (now - shown > _LOG_EVERY or done == total):
                shown = now
                left = (now - began) / (done - start) * (total - done)
                name = partial.name.removesuffix(".partial")
                log(f"  {name}: {done / 1e6:.1f} of {total / 1e6:.1f} MB, about {left:.0f} s left")
    if total is not None and done < total:
        raise ConnectionError(f"the connection was lost after {done:,} of {total:,} bytes")


def _length(headers: email.message.Message) -> int | None:
    length = headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None


def _total(headers: email.message.Message) -> int | None:
    """The total length in ``Content-Range: bytes 10-19/20`` or ``bytes */20``."""
    found = re.search(r"/(\d+)$", headers.get("Content-Range", ""))
    return int(found[1]) if found else None


def _promised(answers: list[email.message.Message]) -> str | None:
    for headers in answers:
        found = re.fullmatch(r'"?([0-9a-f]{64})"?', headers.get("X-Linked-ETag", ""))
        if found:
            return found[1]
    return None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
