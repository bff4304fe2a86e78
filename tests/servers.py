"""Real servers for tests: one that serves a file by ranges and misbehaves on request, and Google's
store, emulated."""

import contextlib
import email.utils
import http.server
import json
import os
import re
import socket
import ssl
import struct
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock


class RangeServer:
    """Serves one file from disk at ``url``, whole or by ranges, until its context is left.

    What it shall do wrong may be changed while it runs:

    Attributes:
        ranges: whether it knows ranges; else it sends the whole file.
        failures: status codes of the next answers.
        retry_after: the ``Retry-After`` of failures.
        cut_after: bytes of body after which the next answers break off, ``reset``: with a reset
            instead of an end.
        silent_after: bytes of body after which the next answers send nothing more, and stay open.
        flips: positions in the next long bodies of a bit that is flipped.
        broken: (start, stop), bytes that always answer 503.
        delay: seconds before every answer.
        headers: sent with every answer; they replace ``ETag`` and ``Last-Modified``, and None
            leaves one out.
        moved_to: if given, the address that every GET is redirected to.
        token: if given, whoever does not send it as a bearer's is refused with 401; a POST to
            ``/token`` hands it out.

    What it saw:

    Attributes:
        asked, tokens: the ``Range`` and the ``Authorization`` of every GET, None where there was
            none.
        sent: bytes of bodies given to the system for sending.
    """

    def __init__(self, path: str | Path, *, ranges: bool = True, certificate: Path | None = None):
        self.path, self.ranges = Path(path), ranges
        self.failures: list[int] = []
        self.cut_after: list[int] = []
        self.silent_after: list[int] = []
        self.flips: list[int] = []
        self.reset = False
        self.retry_after: str | None = None
        self.broken, self.delay = (0, 0), 0.0
        self.headers: dict[str, str | None] = {}
        self.moved_to = ""
        self.token: str | None = None
        self.asked: list[str | None] = []
        self.tokens: list[str | None] = []
        self.sent = 0
        self.lock = threading.Lock()
        self.over = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.owner, self._server.certificate = self, certificate

    @property
    def url(self) -> str:
        """Address of the file."""
        scheme, port = "https" if self._server.certificate else "http", self._server.server_port
        return f"{scheme}://127.0.0.1:{port}/{urllib.parse.quote(self.path.name)}"

    def __enter__(self) -> "RangeServer":
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.over.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def next(self, faults: list[int]) -> int | None:
        """Take the next of a list of faults."""
        with self.lock:
            return faults.pop(0) if faults else None


class _Server(http.server.ThreadingHTTPServer):
    owner: RangeServer
    certificate: Path | None
    daemon_threads = False  # so that closing waits for them

    def get_request(self):
        connection, address = super().get_request()
        # A small buffer: what the system takes for a client that reads nothing counts as sent.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)
        return connection, address

    def finish_request(self, request, client_address):
        if self.certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificate)
            with context.wrap_socket(request, server_side=True) as encrypted:
                super().finish_request(encrypted, client_address)
        else:
            super().finish_request(request, client_address)

    def handle_error(self, request, client_address):
        """Say nothing: clients that leave early are what is tested."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self):
        owner = self.server.owner
        with owner.lock:
            owner.asked.append(self.headers["Range"])
            owner.tokens.append(self.headers["Authorization"])
        owner.over.wait(owner.delay)
        failure = owner.next(owner.failures)
        size = owner.path.stat().st_size
        span = self._span(size)
        if owner.token and self.headers["Authorization"] != f"Bearer {owner.token}":
            failure = 401
        if span and span[0] < owner.broken[1] and span[1] > owner.broken[0]:
            failure = failure or 503
        if owner.moved_to and not failure:
            self._answer(302, 0, {"Location": owner.moved_to})
        elif failure or (span and span[0] >= size):
            self._answer(failure or 416, 0, {"Retry-After": owner.retry_after if failure else None})
        elif span:
            self._answer(
                206, span[1] - span[0], {"Content-Range": f"bytes {span[0]}-{span[1] - 1}/{size}"}
            )
            self._send(*span)
        else:
            self._answer(200, size, {})
            self._send(0, size)

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        content = json.dumps(
            {"access_token": self.server.owner.token, "expires_in": 3600, "token_type": "Bearer"}
        )
        self._answer(200, len(content), {"Content-Type": "application/json"})
        self.wfile.write(content.encode())

    def _span(self, size: int) -> tuple[int, int] | None:
        """(start, stop) of the bytes that are asked for, None for all."""
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")
        if not found or not self.server.owner.ranges:
            return None
        return int(found[1]), min(int(found[2] or size) + 1, size)

    def _answer(self, status: int, length: int, headers: dict[str, str | None]) -> None:
        file = self.server.owner.path.stat()
        headers = {
            "ETag": f'"{file.st_mtime_ns:x}-{file.st_size:x}"',
            "Last-Modified": email.utils.formatdate(file.st_mtime, usegmt=True),
            "Content-Length": str(length),
            **headers,
            **self.server.owner.headers,
        }
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()

    def _send(self, start: int, stop: int) -> None:
        owner = self.server.owner
        cut, silent = owner.next(owner.cut_after), owner.next(owner.silent_after)
        limit = next((start + fault for fault in (cut, silent) if fault is not None), stop)
        flip = owner.next(owner.flips) if stop - start > 2**16 else None
        with owner.path.open("rb") as file:
            file.seek(start)
            while start < min(limit, stop):
                piece = file.read(min(2**16, limit - start, stop - start))
                if flip is not None and flip < len(piece):
                    piece, flip = piece[:flip] + bytes([piece[flip] ^ 1]) + piece[flip + 1 :], None
                with owner.lock:
                    owner.sent += len(piece)  # before a client can have it and look
                self.wfile.write(piece)
                start += len(piece)
        if silent is not None:
            owner.over.wait()
        elif cut is not None and owner.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()
            self.connection.close()

    def log_message(self, *_):
        """Say nothing."""


@contextlib.contextmanager
def answering(respond: Callable[[http.server.BaseHTTPRequestHandler], object]) -> Iterator[str]:
    """Address of a file on a server that answers every GET by ``respond(handler)``, until the
    context is left."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            with contextlib.suppress(OSError):  # the client left
                respond(self)

        def log_message(self, *_):
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/model.safetensors"
        server.shutdown()
        thread.join()


class StorageEmulator:
    """gcp-storage-emulator with one bucket, in memory, at ``STORAGE_EMULATOR_HOST`` while its
    context lasts."""

    bucket = "bucket"

    def __enter__(self) -> "StorageEmulator":
        from gcp_storage_emulator.server import create_server

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with contextlib.ExitStack() as stack:
            stack.enter_context(
                create_server("127.0.0.1", port, in_memory=True, default_bucket=self.bucket)
            )
            self.url = f"http://127.0.0.1:{port}"
            stack.enter_context(mock.patch.dict(os.environ, STORAGE_EMULATOR_HOST=self.url))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def upload(self, name: str, content: bytes) -> str:
        """Put an object into the bucket; its ``gs://`` address."""
        query = urllib.parse.urlencode({"uploadType": "media", "name": name})
        where = f"{self.url}/upload/storage/v1/b/{self.bucket}/o?{query}"
        request = urllib.request.Request(
            where, content, {"Content-Type": "application/octet-stream"}
        )
        urllib.request.urlopen(request, timeout=60).close()
        return f"gs://{self.bucket}/{name}"
