"""HTTP range requests to servers of large files: ``https://``, ``http://``, ``gs://``.

``gs://`` is plain HTTP at another URL, with a token for files that are not public; gcsfs provides
both. Its own requests are not used: they cannot be streamed, and have their own retry policy.
"""

import contextlib
import http.client
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator

from percepiano_ast.data import retry
from percepiano_ast.errors import InputError

SCHEMES = "https://, http:// or gs://BUCKET/OBJECT"
_GOOGLE = "https://storage.googleapis.com"  # for public files, without gcsfs


class Unreachable(OSError):
    """A file became unavailable: its server stopped responding, or the file was removed or changed.

    The message has the address, the error, the number of attempts, and the next action.
    """


@contextlib.contextmanager
def network() -> Iterator[None]:
    """Convert OSErrors of a lost network that are not in `retry.BROKEN` to ConnectionError."""
    try:
        yield
    except OSError as error:
        if isinstance(error, retry.BROKEN):
            raise
        raise ConnectionError(*error.args) from error


def open_store(url: str) -> "Store":
    """The store of a file at one of ``SCHEMES``; sends no request yet.

    Raises:
        InputError: another kind of address.
    """
    if url.startswith("gs://"):
        bucket, _, key = url.removeprefix("gs://").partition("/")
        if bucket and key:
            return _google_store(url, bucket, key)
    elif re.match(r"https?://[^/]", url):
        # Quotes spaces and non-ASCII letters; sequences that are quoted already stay.
        return Store(url, urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]"))
    raise InputError(f"cannot read {url!r}: give an address that starts with {SCHEMES}")


def _google_store(url: str, bucket: str, key: str) -> "Store":
    try:
        import gcsfs
    except ImportError:
        store = Store(url, f"{_GOOGLE}/{bucket}/{urllib.parse.quote(key)}")
        store.advice = "Without gcsfs only public files can be read: install gcsfs"
        return store
    # Asynchronous, so that no event loop is started.
    anonymous = gcsfs.GCSFileSystem(token="anon", asynchronous=True, use_listings_cache=False)
    return _GoogleStore(url, anonymous.url(f"{bucket}/{key}"))


class Store:
    """Range requests for one file.

    Attributes:
        size: bytes; known after the first response.
        advice: the next action if the server requires authentication.
    """

    advice = "Give a public address"

    def __init__(self, name: str, address: str):
        self.name, self.address = name, address
        self.size: int | None = None
        self._version: dict[str, str] = {}

    @property
    def known_size(self) -> int:
        """``size``, after the first response."""
        assert self.size is not None, "no request has been sent yet"
        return self.size

    def ask(self, start: int, stop: int) -> http.client.HTTPResponse:
        """The response with the bytes ``[start, stop)``, or with the last ``-start`` bytes; the
        caller closes it.

        Raises:
            InputError: the server does not support ranges.
            Unreachable: the file has changed.
            retry.BROKEN: any other error.
        """
        answer = self._request(f"bytes={start}-{stop - 1}" if start >= 0 else f"bytes={start}")
        if start < 0 and answer.status == 200:
            # Azure's store and emulators of Google's support ranges, but not suffix ranges.
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
        """The exception for a final refusal: InputError on opening, Unreachable after the first
        response."""
        code = error.code if isinstance(error, urllib.error.HTTPError) else 0
        special = {
            401: self.advice,
            403: self.advice,
            416: "Check the file, which is empty or became shorter",
        }
        advice = special.get(code, "Check the address")
        return self._failure(f"cannot read {self.name}: {error}. {advice}, or give a copy on disk.")

    def _failure(self, message: str) -> Exception:
        return InputError(message) if self.size is None else Unreachable(message)

    def _request(self, asked: str) -> http.client.HTTPResponse:
        request = urllib.request.Request(
            self.address, headers={"Accept-Encoding": "identity", "Range": asked}
        )
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
        """Raise unless the response starts at ``start`` and the file is unchanged."""
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
        if answer.status != 206 or not found:
            what = (
                f"{self.name} cannot be read by ranges (its server returns {answer.status} for a"
                " range request)"
            )
            raise self._failure(f"{what}. Give another address, or a copy on disk.")
        first, size = int(found[1]), int(found[2])
        expected = start if start >= 0 else max(size + start, 0)
        version = {
            name: answer.headers[name]
            for name in ("ETag", "Last-Modified")
            if name in answer.headers
        }
        # Servers behind one address may report different dates for a file; the ETag identifies it.
        mark = next(
            (
                name
                for name in ("ETag", "Last-Modified")
                if name in version and name in self._version
            ),
            None,
        )
        if self.size not in (None, size) or (mark and version[mark] != self._version[mark]):
            now = (
                f"{mark} {version[mark]}, was {self._version[mark]}"
                if mark
                else f"{size:,} bytes, was {self.size:,}"
            )
            raise Unreachable(
                f"{self.name} changed while it was read ({now}). Start again with a file that does"
                " not change."
            )
        if first != expected:
            raise self._failure(
                f"{self.name}: its server sends other bytes than requested. Give a copy on disk."
            )
        self.size, self._version = size, self._version or version


class _GoogleStore(Store):
    """A file of Google Cloud Storage; credentials are used only if it is not public.

    A Colab machine without a login has invalid credentials, with which requests for public files
    fail.
    """

    advice = (
        "Log in (on Colab google.colab.auth.authenticate_user(), elsewhere"
        " GOOGLE_APPLICATION_CREDENTIALS)"
    )
    _credentials = None
    _searched = False

    def _log_in(self) -> bool:
        if self._searched:
            return False
        self._searched = True
        import gcsfs
        from google.auth.exceptions import GoogleAuthError

        with contextlib.suppress(GoogleAuthError):
            options = {
                "token": "google_default",
                "access": "read_only",
                "use_listings_cache": False,
            }
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
        except Exception as error:  # gcsfs and google-auth raise many kinds of exceptions
            raise self._failure(
                f"cannot read {self.name}: no access token ({error}). {self.advice}"
            ) from error
        for name, value in headers.items():
            request.add_unredirected_header(name, value)  # not sent to redirect targets
