"""A big file at an address, read by ranges while it is worked on: MAESTRO's archive is 108 GB, a free disk is smaller.

Every byte is fetched once, and a transfer that breaks off continues with the byte after the last.
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

_END = 65_557  # bytes; a zip archive's end record, at its longest, lies within them
_LEAST = 4096  # bytes of a request outside a span: a zip member's header with its name costs one
_PIECE = 2**20  # bytes, at most, that come at once
_AHEAD = 16 * 2**20  # bytes that wait to be read


class RemoteFile(io.RawIOBase):
    """A file at ``https://``, ``http://`` or ``gs://``, read by ranges; seekable, for reading only.

    A read returns all bytes that it asks for, but for the end of the file. It serves one thread.

    Attributes:
        name: its address.
        size: bytes.
        fetched: bytes received so far, those read ahead too.

    Raises:
        InputError: no such address, the server refuses, or it does not serve ranges.
        Unreachable: it does not answer; from reading also when it stopped, refuses, or serves another file than before.
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
        # What is kept, (position, bytes): the end of the file, and what the last small request brought.
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
        """Go to a position, in bytes from the beginning, here or the end; nothing is fetched."""
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        if position < 0:
            raise ValueError(f"position {position} is before the beginning")
        self._position = position
        return position

    def read(self, size: int | None = -1) -> bytes:
        """The next ``size`` bytes, all that are left without one; fewer only at the end of the file.

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
        """All bytes that are left."""
        return self.read()

    def readinto(self, buffer) -> int:
        """Fill ``buffer``; fewer bytes only at the end of the file."""
        view = memoryview(buffer).cast("B")
        content = self.read(len(view))
        view[: len(content)] = content
        return len(content)

    @contextlib.contextmanager
    def span(self, start: int, stop: int) -> Iterator[None]:
        """Announce that the bytes ``[start, stop)`` are read next, front to back.

        One request brings them, some MiB ahead of the reader; leaving the context ends it.
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
        """Forget what is kept; a second time does nothing."""
        self._end = self._block = (0, b"")
        super().close()

    def _some(self, position: int, stop: int) -> bytes:
        """At least one byte from ``position`` on, at most up to ``stop``: of what is kept, of the span, or fetched."""
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
        """The bytes ``[start, stop)`` as they come; after a failure another request brings the rest.

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
                    raise ConnectionError(f"the connection broke off {stop - start:,} bytes early")
            except retry.BROKEN as error:
                if retry.is_final(error):
                    raise self._store.refusal(error) from error
                wait = patience.wait_after(error, progress=progress)
                if wait is None:
                    what = f"{self.name} does not answer: {error}, {patience.failures} times in a row"
                    raise Unreachable(f"{what}. Run again later, or give a copy on disk") from error
                pause(wait)


def _piece(answer: http.client.HTTPResponse, size: int) -> bytes:
    # read() would lose what it has when the connection is reset before it has all.
    with stores.network():
        return answer.read1(size) if size else b""


# ---------------------------------------------------------------- reading ahead


class _Left(Exception):
    """Nobody reads the span any more."""


class _ReadAhead:
    """The bytes ``[start, stop)``, received by a thread of its own while they are worked on.

    Attributes:
        position: of the first byte that can still be taken.
    """

    def __init__(self, receive: Callable[..., Generator[bytes, None, None]], start: int, stop: int):
        self.position, self.stop = start, stop
        self._changed = threading.Condition()
        self._pieces: deque[bytes] = deque()
        self._waiting = 0  # bytes
        self._left = False
        self._error: BaseException | None = None
        self._connection: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, args=(receive,), name="read-ahead", daemon=True)
        if start < stop:
            self._thread.start()

    def take(self, position: int, size: int) -> bytes:
        """At least one byte from ``position`` on, at most ``size``; waits for it, and drops what lies before it."""
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
                # Wakes a thread that waits for bytes; closing would not.
                with contextlib.suppress(OSError):
                    self._connection.shutdown(socket.SHUT_RDWR)
        if self._thread.ident:
            # One that still waits for an answer to begin cannot be woken; it ends with it, or with retry.TIMEOUT.
            self._thread.join(1.0)

    def _run(self, receive: Callable[..., Generator[bytes, None, None]]) -> None:
        try:
            with contextlib.closing(receive(self.position, self.stop, self._pause, self._opened)) as pieces:
                for piece in pieces:
                    self._put(piece)
        except _Left:
            pass
        except BaseException as error:  # the reader gets it
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
            # A second handle: the answer closes its own when it ends, at any moment.
            self._connection = socket.fromfd(answer.fileno(), socket.AF_INET, socket.SOCK_STREAM)

    def _stay(self) -> None:
        if self._left:
            raise _Left

    def _forget_connection(self) -> None:
        if self._connection:
            self._connection.close()
            self._connection = None
