"""Servers of big files, asked for ranges: ``https://``, ``http://``, ``gs://``.

Google's ``gs://`` is the same HTTP at another address and, where a file is not open to all, with a token; gcsfs knows
both. Its own requests are not used: they cannot be streamed, and wait by rules of their own before they give up.
"""

import contextlib
import http.client
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator

from percepiano_ast.config import InputError
from percepiano_ast.data import retry

SCHEMES = "https://, http:// or gs://BUCKET/OBJECT"
_GOOGLE = "https://storage.googleapis.com"  # serves what is open to all, without gcsfs


class Unreachable(OSError):
    """A file that does not come: its server stopped answering, or no longer serves what it had served.

    The message names the address, what happened, how often, and what to do.
    """


@contextlib.contextmanager
def network() -> Iterator[None]:
    """A network that goes away raises more kinds of OSError than `retry.BROKEN` lists."""
    try:
        yield
    except OSError as error:
        if isinstance(error, retry.BROKEN):
            raise
        raise ConnectionError(*error.args) from error


def open_store(url: str) -> "Store":
    """The server's side of a file at one of ``SCHEMES``; nothing is asked yet.

    Raises:
        InputError: another kind of address.
    """
    if url.startswith("gs://"):
        bucket, _, key = url.removeprefix("gs://").partition("/")
        if bucket and key:
            return _google_store(url, bucket, key)
    elif re.match(r"https?://[^/]", url):
        # Spaces and letters beyond ASCII are written as servers read them; what is quoted stays as it is.
        return Store(url, urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]"))
    raise InputError(f"cannot read {url!r}: give an address that begins with {SCHEMES}")


def _google_store(url: str, bucket: str, key: str) -> "Store":
    try:
        import gcsfs
    except ImportError:
        store = Store(url, f"{_GOOGLE}/{bucket}/{urllib.parse.quote(key)}")
        store.advice = "Without gcsfs only a file that is open to all can be read: install gcsfs"
        return store
    # Asynchronous: no event loop is started for two strings.
    anonymous = gcsfs.GCSFileSystem(token="anon", asynchronous=True, use_listings_cache=False)
    return _GoogleStore(url, anonymous.url(f"{bucket}/{key}"))


class Store:
    """A server's side of one file.

    Attributes:
        size: bytes; known after the first answer.
        advice: what helps where the server wants to know who asks.
    """

    advice = "Give an address that is open to all"

    def __init__(self, name: str, address: str):
        self.name, self.address = name, address
        self.size: int | None = None
        self._version: dict[str, str] = {}

    @property
    def known_size(self) -> int:
        """``size``, after the first answer."""
        assert self.size is not None, "nothing has been asked yet"
        return self.size

    def ask(self, start: int, stop: int) -> http.client.HTTPResponse:
        """The answer with the bytes ``[start, stop)``, or with the last ``-start`` bytes; to be closed.

        Raises:
            InputError: the server does not serve ranges.
            Unreachable: it serves another file than before.
            retry.BROKEN: anything else.
        """
        answer = self._request(f"bytes={start}-{stop - 1}" if start >= 0 else f"bytes={start}")
        if start < 0 and answer.status == 200:
            # Azure's store, and emulators of Google's, know ranges but those that count from the end.
            answer.close()
            with self._request("bytes=0-0") as first:
                self._check(first, 0)
            return self.ask(max(self.known_size + start, 0), self.known_size)
        try:
            self._check(answer, start)
        except BaseException:
            answer.close()
            raise
        return answer

    def refusal(self, error: Exception) -> Exception:
        """What to raise for a final refusal: of the file, or, when it had been opened, of going on."""
        code = error.code if isinstance(error, urllib.error.HTTPError) else 0
        special = {401: self.advice, 403: self.advice, 416: "It is empty or became shorter: check it"}
        advice = special.get(code, "Check the address")
        return self._failure(f"cannot read {self.name}: {error}. {advice}, or give a copy on disk")

    def _failure(self, message: str) -> Exception:
        return InputError(message) if self.size is None else Unreachable(message)

    def _request(self, asked: str) -> http.client.HTTPResponse:
        request = urllib.request.Request(self.address, headers={"Accept-Encoding": "identity", "Range": asked})
        self._sign(request)
        try:
            with network():
                return urllib.request.urlopen(request, timeout=retry.TIMEOUT)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code not in (401, 403) or not self._log_in():
                raise
        return self._request(asked)

    def _log_in(self) -> bool:
        """Whether there are credentials that have not been tried."""
        return False

    def _sign(self, request: urllib.request.Request) -> None:
        """Add credentials to a request."""

    def _check(self, answer: http.client.HTTPResponse, start: int) -> None:
        """Raise unless the answer begins at ``start`` of a file that is the same as before."""
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
        if answer.status != 206 or not found:
            what = f"{self.name} cannot be read in parts (its server answers {answer.status} when asked for some bytes)"
            raise self._failure(f"{what}. Give another address, or a copy on disk")
        first, size = int(found[1]), int(found[2])
        expected = start if start >= 0 else max(size + start, 0)
        version = {name: answer.headers[name] for name in ("ETag", "Last-Modified") if name in answer.headers}
        # Servers that share an address may date a file differently; the tag then says that it is the same.
        mark = next((name for name in ("ETag", "Last-Modified") if name in version and name in self._version), None)
        if self.size not in (None, size) or (mark and version[mark] != self._version[mark]):
            now = f"{mark} {version[mark]}, was {self._version[mark]}" if mark else f"{size:,} bytes, was {self.size:,}"
            raise Unreachable(f"{self.name} changed while it was read ({now}). Start anew with a file that stays")
        if first != expected:
            raise self._failure(f"{self.name}: its server sends other bytes than asked for. Give a copy on disk")
        self.size, self._version = size, self._version or version


class _GoogleStore(Store):
    """A file of Google Cloud Storage; credentials are looked for when it is not open to all.

    Not before: a Colab machine without a login has credentials that fail, which would shut out public files.
    """

    advice = "Log in (on Colab google.colab.auth.authenticate_user(), elsewhere GOOGLE_APPLICATION_CREDENTIALS)"
    _credentials = None
    _searched = False

    def _log_in(self) -> bool:
        if self._searched:
            return False
        self._searched = True
        import gcsfs
        from google.auth.exceptions import GoogleAuthError

        with contextlib.suppress(GoogleAuthError):
            options = {"token": "google_default", "access": "read_only", "use_listings_cache": False}
            self._credentials = gcsfs.GCSFileSystem(asynchronous=True, **options).credentials
        return self._credentials is not None

    def _sign(self, request: urllib.request.Request) -> None:
        if self._credentials is None:
            return
        from google.auth.exceptions import TransportError

        headers: dict[str, str] = {}
        try:
            self._credentials.apply(headers)
        except TransportError as error:
            raise ConnectionError(f"no access token: {error}") from error
        except Exception as error:  # gcsfs and google-auth have many ways to say no
            raise self._failure(f"cannot read {self.name}: no access token ({error}). {self.advice}") from error
        for name, value in headers.items():
            request.add_unredirected_header(name, value)  # whoever it redirects to is not meant
