"""Read a large remote file by HTTP ranges while it is processed: MAESTRO's archive has 108 GB, more
than most free disks.

Every byte is fetched once. An interrupted transfer resumes after the last byte received.
"""

import contextlib
import http.client
import io
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator

from percepiano_ast.data import retry, stores
from percepiano_ast.data.stores import Unreachable

_END = 65_557  # bytes; maximum length of a zip archive's end record
# minimum bytes of a request outside a span: a zip member's header with its name needs one request
_LEAST = 4096
_PIECE = 2**20  # maximum bytes per read
_AHEAD = 16 * 2**20  # maximum bytes of read-ahead


class RemoteFile(io.RawIOBase):
    """A file at ``https://``, ``http://`` or ``gs://``, read by ranges; seekable and read-only.

    A read returns all requested bytes, except at the end of the file. Not thread-safe.

    Attributes:
        name: its URL.
        size: bytes.
        fetched: bytes received so far, including read-ahead.

    Raises:
        InputError: invalid URL, or the server refuses or does not support ranges.
        Unreachable: the server does not respond; while reading also if it refuses or the file has
            changed.
    """

    def __init__(self, url: str):
        super().__init__()
        self.name = url
        self.fetched = 0
        self._position = 0
        self._span: _ReadAhead | None = None
        self._counting = threading.Lock()
        self._store = stores.open_store(url)
        end = b"".join(self._receive(-_END, 0))
        self.size = self._store.known_size
        # Cached as (position, bytes): the end of the file, and the last small request.
        self._end, self._block = (self.size - len(end), end), (0, b"")

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Position in bytes."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position in bytes, relative to the start, the current position or the end; sends
        no request."""
        position = (
            offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        )
        if position < 0:
            raise ValueError(f"position {position} is before the beginning")
        self._position = position
        return position

    def read(self, size: int | None = -1) -> bytes:
        """The next ``size`` bytes, by default all remaining ones; fewer only at the end of the
        file.

        Raises:
            Unreachable: see the class.
        """
        if self.closed:
            raise ValueError("the file is closed")
        stop = self.size if size is None or size < 0 else min(self._position + size, self.size)
        parts = []
        while self._position < stop:
            parts.append(self._some(self._position, stop))
            self._position += len(parts[-1])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def readall(self) -> bytes:
        """All remaining bytes."""
        return self.read()

    def readinto(self, buffer) -> int:
        """Fill ``buffer``; fewer bytes only at the end of the file."""
        view = memoryview(buffer).cast("B")
        content = self.read(len(view))
        view[: len(content)] = content
        return len(content)

    @contextlib.contextmanager
    def span(self, start: int, stop: int) -> Iterator[None]:
        """Announce that the bytes ``[start, stop)`` are read next, in order.

        A single request fetches them, some MiB ahead of the reader; leaving the context ends it.
        """
        if self._span is not None:
            raise ValueError("spans of one file cannot be nested")
        self._span = _ReadAhead(self._receive, start, min(stop, self._end[0]))
        try:
            yield
        finally:
            span, self._span = self._span, None
            span.close()

    def close(self) -> None:
        """Drop the cached bytes; repeated calls have no effect."""
        self._end = self._block = (0, b"")
        super().close()

    def _some(self, position: int, stop: int) -> bytes:
        """At least one byte from ``position`` on, at most up to ``stop``: from the cache, the span,
        or a new request."""
        for start, content in (self._end, self._block):
            if start <= position < start + len(content):
                return content[position - start : stop - start]
        span = self._span
        if span and span.position <= position < span.stop:
            return span.take(position, stop - position)
        until = min(max(stop, position + _LEAST), self._end[0])
        if span and position < span.position:
            until = min(until, span.position)
        content = b"".join(self._receive(position, until))
        if until > stop:
            self._block = (position, content)
        return content[: stop - position]

    def _receive(
        self,
        start: int,
        stop: int,
        pause: Callable[[float], None] = time.sleep,
        opened: Callable[[http.client.HTTPResponse], None] = lambda answer: None,
    ) -> Generator[bytes, None, None]:
        """Yield the bytes ``[start, stop)`` as they arrive; after a failure a new request fetches
        the rest.

        Positions below 0 count from the end of the file.
        """
        patience = retry.Patience()
        while start < stop:
            progress = False
            try:
                with self._store.ask(start, stop) as answer:
                    opened(answer)
                    if start < 0:
                        stop = self._store.known_size
                        start = max(stop + start, 0)
                    while piece := _piece(answer, min(_PIECE, stop - start)):
                        start, progress = start + len(piece), True
                        with self._counting:
                            self.fetched += len(piece)
                        yield piece
                if start < stop:
                    raise ConnectionError(f"the connection was lost {stop - start:,} bytes early")
            except retry.BROKEN as error:
                if retry.is_final(error):
                    raise self._store.refusal(error) from error
                wait = patience.wait_after(error, progress=progress)
                if wait is None:
                    what = (
                        f"{self.name} does not respond: {error}, {patience.failures} times in a row"
                    )
                    raise Unreachable(
                        f"{what}. Run again later, or give a copy on disk."
                    ) from error
                pause(wait)


def _piece(answer: http.client.HTTPResponse, size: int) -> bytes:
    # read() would lose the bytes already received if the connection is reset.
    with stores.network():
        return answer.read1(size) if size else b""


# ---------------------------------------------------------------- reading ahead


class _Left(Exception):
    """The span has been closed."""


class _ReadAhead:
    """The bytes ``[start, stop)``, received by a separate thread while they are processed.

    Attributes:
        position: of the first byte that is still available.
    """

    def __init__(self, receive: Callable[..., Generator[bytes, None, None]], start: int, stop: int):
        self.position, self.stop = start, stop
        self._changed = threading.Condition()
        self._pieces: deque[bytes] = deque()
        self._waiting = 0  # bytes
        self._left = False
        self._error: BaseException | None = None
        self._connection: socket.socket | None = None
        self._thread = threading.Thread(
            target=self._run, args=(receive,), name="read-ahead", daemon=True
        )
        if start < stop:
            self._thread.start()

    def take(self, position: int, size: int) -> bytes:
        """At least one byte from ``position`` on, at most ``size``; waits for it and drops earlier
        bytes."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._pieces or self._error)
                if self._error and not self._pieces:
                    raise self._error
                start, piece = position - self.position, self._pieces[0]
                part = piece[start : start + size]
                if start + len(part) >= len(piece):
                    self._drop()
                if part:
                    return part

    def _drop(self) -> None:
        piece = self._pieces.popleft()
        self.position += len(piece)
        self._waiting -= len(piece)
        self._changed.notify_all()

    def close(self) -> None:
        """End the thread and its connection."""
        with self._changed:
            self._left = True
            self._changed.notify_all()
            if self._connection:
                # Wakes the thread if it waits for bytes; closing the socket would not.
                with contextlib.suppress(OSError):
                    self._connection.shutdown(socket.SHUT_RDWR)
        if self._thread.ident:
            # A thread that waits for a response to start cannot be woken; it ends with the response
            # or after retry.TIMEOUT.
            self._thread.join(1.0)

    def _run(self, receive: Callable[..., Generator[bytes, None, None]]) -> None:
        try:
            with contextlib.closing(
                receive(self.position, self.stop, self._pause, self._opened)
            ) as pieces:
                for piece in pieces:
                    self._put(piece)
        except _Left:
            pass
        except BaseException as error:  # raised in the reader's thread
            with self._changed:
                self._error = error
                self._changed.notify_all()
        finally:
            with self._changed:
                self._forget_connection()

    def _put(self, piece: bytes) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._left or self._waiting < _AHEAD)
            self._stay()
            self._pieces.append(piece)
            self._waiting += len(piece)
            self._changed.notify_all()

    def _pause(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._left, seconds)
            self._stay()

    def _opened(self, answer: http.client.HTTPResponse) -> None:
        with self._changed:
            self._stay()
            self._forget_connection()
            # A second handle: the response may close its own at any time.
            self._connection = socket.fromfd(answer.fileno(), socket.AF_INET, socket.SOCK_STREAM)

    def _stay(self) -> None:
        if self._left:
            raise _Left

    def _forget_connection(self) -> None:
        if self._connection:
            self._connection.close()
            self._connection = None
