"""Places that break and are mended, for real: file systems by the kernel, and a server before
Google's store, emulated."""

import contextlib
import ctypes
import errno
import http.client
import http.server
import os
import select
import shutil
import socket
import struct
import subprocess
import threading
from pathlib import Path

from servers import StorageEmulator

LIBC = ctypes.CDLL(None, use_errno=True)
MNT_DETACH = 2


class Fuse:
    """A file system over a folder whose every call fails, or never ends. This process must not look
    into it.

    Args:
        error: what calls fail with: ``EIO`` is answered, ``ENOTCONN`` comes from the system as
            nobody answers any more; 0: they are never answered.
    """

    def __init__(self, folder: Path, error: int):
        self.folder, self.error = folder, error
        self._device, self._over, self._thread = None, threading.Event(), None

    def begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._device = os.open("/dev/fuse", os.O_RDWR)
        options = b"fd=%d,rootmode=40000,user_id=0,group_id=0" % self._device
        if LIBC.mount(b"fuse", os.fsencode(self.folder), b"fuse", 0, options):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        if self.error == errno.ENOTCONN:
            self._close()
        elif self.error:
            self._thread = threading.Thread(target=self._answer)
            self._thread.start()

    def end(self) -> None:
        self._over.set()
        if self._thread:
            self._thread.join()
        LIBC.umount2(os.fsencode(self.folder), MNT_DETACH)
        self._close()  # whoever waits in a call gets an error

    def _close(self) -> None:
        if self._device is not None:
            os.close(self._device)
        self._device = None

    def _answer(self) -> None:
        poll = select.poll()
        poll.register(self._device, select.POLLIN)
        while not self._over.is_set():
            if not poll.poll(50):
                continue
            try:
                request = os.read(self._device, 2**18)
            except OSError:  # taken back, or unmounted
                continue
            _, kind, unique = struct.unpack_from("<IIQ", request)
            # The first request settles a version: 7.31, nothing optional, 128 KB a write.
            content = (
                struct.pack("<IIIIHHIIHHI28x", 7, 31, 2**17, 0, 16, 12, 2**17, 1, 32, 0, 0)
                if kind == 26
                else b""
            )
            head = struct.pack("<IiQ", 16 + len(content), 0 if content else -self.error, unique)
            with contextlib.suppress(OSError):
                os.write(self._device, head + content)


class Small:
    """A disk of a few MB in memory; ``breaks`` names how: it is filled up, or becomes read-only."""

    def __init__(self, folder: Path, breaks: str):
        self.folder, self.breaks, self.filler = folder, breaks, folder / "others"
        folder.mkdir(parents=True, exist_ok=True)
        _mount("-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder))

    def begin(self) -> None:
        if self.breaks == "full":
            self.filler.write_bytes(bytes(shutil.disk_usage(self.folder).free))
        else:
            _mount("-o", "remount,ro", str(self.folder))

    def end(self) -> None:
        if self.breaks == "full":
            self.filler.unlink(missing_ok=True)
        else:
            _mount("-o", "remount,rw", str(self.folder))

    def unmount(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


def _mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise OSError(done.stderr)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """Say nothing: clients that leave early are what is tested."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"  # a connection for each request
    server: _Server

    def do_GET(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        status, headers, content = self.server.front.answer(
            self.command, self.path, dict(self.headers), body
        )
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in (
                "transfer-encoding",
                "connection",
                "content-length",
                "date",
                "server",
            ):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = do_GET

    def log_message(self, *_):
        """Say nothing."""


class Front:
    """Stands before the emulator, and answers 503, refuses connections or says nothing when
    ``mode`` is that."""

    def __init__(self, emulator: StorageEmulator):
        self.behind, self.mode, self.over = (
            emulator.url.removeprefix("http://"),
            "",
            threading.Event(),
        )
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self._server = f"http://127.0.0.1:{self.port}", None

    def __enter__(self) -> "Front":
        self._listen()
        return self

    def __exit__(self, *_) -> None:
        self.over.set()
        self._close()

    def _listen(self) -> None:
        self._server = _Server(("127.0.0.1", self.port), _Handler)
        self._server.front = self
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}
        )
        self._thread.start()

    def _close(self) -> None:
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None

    def begin(self, mode: str = "503") -> None:
        self.mode = mode
        if mode == "refuses":
            self._close()

    def end(self) -> None:
        if not self._server:
            self._listen()
        self.mode = ""

    def answer(self, method: str, path: str, headers: dict, body: bytes) -> tuple[int, list, bytes]:
        if self.mode == "hangs":
            self.over.wait(30)
        if self.mode in ("503", "500"):
            return (
                int(self.mode),
                [],
                b'{"error": {"code": %s, "message": "backend error"}}' % self.mode.encode(),
            )
        connection = http.client.HTTPConnection(self.behind, timeout=30)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
