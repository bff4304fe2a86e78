"""Large files over HTTP: resumed where they broke off, tried again, and checked.

Hugging Face names the SHA-256 of a large file on the first of its answers, the one that redirects to a store
(``X-Linked-ETag``); other servers promise a length only.
"""

import email.message
import hashlib
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from percepiano_ast.config import InputError
from percepiano_ast.data import retry

_BLOCK = 2**20
_LOG_EVERY = 5.0  # seconds


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(url: str, path: str | Path, *, log: Callable[[str], None] = print) -> str:
    """Fetch ``url`` into ``path`` and return its SHA-256; what an interrupted call left is continued.

    The file stands under its name only when its length, and its SHA-256 where the server says it, are right.

    Raises:
        InputError: the address is refused or does not answer, or what it sends is not what it promised.
    """
    if not url.startswith(("http://", "https://")):
        raise InputError(f"cannot fetch {url!r}: give an http:// or https:// address.")
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
                raise InputError(f"cannot fetch {url}: {error}. Give a local copy instead.") from error
            wait = patience.wait_after(error, progress=_size(partial) > before)
            if wait is None:
                what = f"cannot fetch {url}: {error}, {patience.failures} times"
                raise InputError(f"{what}. Run again later, it continues, or give a local copy.") from error
            log(f"  {path.name}: {error}; trying again in {wait:.0f} s")
            time.sleep(wait)
    digest = sha256_of(partial)
    if promised not in (None, digest):
        partial.unlink()
        raise InputError(f"{url} sent SHA-256 {digest}, {promised} was promised. Run again, it starts over.")
    partial.replace(path)
    return digest


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects and keeps what the redirecting answers said."""

    def __init__(self) -> None:
        self.answers: list[email.message.Message] = []

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        """As its parent; called for every redirect."""
        self.answers.append(headers)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _transfer(url: str, partial: Path, log: Callable[[str], None]) -> str | None:
    """Bring ``partial`` to the full length; the SHA-256 that the server promised, if it did."""
    start = _size(partial)
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    redirects = _Redirects()
    try:
        request = urllib.request.Request(url, headers=headers)
        answer = urllib.request.build_opener(redirects).open(request, timeout=retry.TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not start:
            raise
        with error:  # nothing lies behind the end of the partial file: it is whole, or longer than the file is now
            if _total(error.headers) == start:
                return _promised([*redirects.answers, error.headers])
        partial.unlink()
        return _transfer(url, partial, log)
    with answer:
        if start and answer.status != 206:  # the server knows no ranges
            start = 0
        total = _total(answer.headers) if answer.status == 206 else _length(answer.headers)
        _receive(answer, partial, start, total, log)
        return _promised([*redirects.answers, answer.headers])


def _receive(answer, partial: Path, start: int, total: int | None, log: Callable[[str], None]) -> None:
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
        raise ConnectionError(f"the connection broke off after {done:,} of {total:,} bytes")


def _length(headers: email.message.Message) -> int | None:
    length = headers.get("Content-Length", "")
    return int(length) if length.isdecimal() else None


def _total(headers: email.message.Message) -> int | None:
    """Of ``Content-Range: bytes 10-19/20`` or ``bytes */20``."""
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
