"""The download of published weights, from real servers that break off, refuse and lie. 8 s."""

import hashlib
import http.server
import threading
import time

import pytest
from servers import answering

from percepiano_ast import files
from percepiano_ast.data.sources import RemoteFile
from percepiano_ast.errors import InputError
from percepiano_ast.files import download
from percepiano_ast.models.weights import AUDIOSET_FILES, fetch_audioset


class Server(http.server.BaseHTTPRequestHandler):
    """Stands in for Hugging Face: redirects to a store that serves ranges, and misbehaves as its
    attributes say."""

    files: dict[str, bytes]
    requests: list[tuple[str, str | None]]
    break_after: list[int]  # bytes of one answer each, large files only
    failures: list[int]  # codes of one answer each
    promised: str | None = None
    ranges = True

    def do_GET(self):
        """Redirect ``/main/FILE`` to ``/store/FILE`` and serve that."""
        where, _, name = self.path[1:].partition("/")
        content, asked = self.files.get(name), self.headers["Range"]
        self.requests.append((self.path, asked))
        if content is None or (where == "store" and self.failures):
            self.send_error(404 if content is None else self.failures.pop())
        elif where == "main":
            self.send_response(302)
            self.send_header(
                "X-Linked-ETag", f'"{self.promised or hashlib.sha256(content).hexdigest()}"'
            )
            self.send_header("Location", f"/store/{name}")
            self.end_headers()
        else:
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and self.ranges else 0
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            if start:
                self.send_header(
                    "Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}"
                )
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            stop = (
                start + self.break_after.pop()
                if self.break_after and len(content) > 100
                else len(content)
            )
            self.wfile.write(content[start:stop])

    def log_message(self, *_):
        """Say nothing."""


class TestDownload:
    """`fetch_audioset` from a real server."""

    @pytest.fixture
    def served(self):
        files = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 5000}
        handler = type(
            "Handler",
            (Server,),
            {"files": files, "requests": [], "break_after": [], "failures": []},
        )
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield handler, f"http://127.0.0.1:{server.server_port}/main"
            server.shutdown()

    @pytest.fixture(autouse=True)
    def impatient(self, monkeypatch):
        monkeypatch.setattr(files, "FIRST_WAIT", 0.01)

    def test_arrives_once_and_is_checked_after(self, served, tmp_path, logged):
        handler, url = served
        folder = fetch_audioset(tmp_path / "weights" / "audioset", url)
        assert {path.name for path in folder.iterdir()} == {*AUDIOSET_FILES, "SHA256SUMS"}
        assert (folder / "model.safetensors").read_bytes() == handler.files["model.safetensors"]
        assert any("1.3 of 1.3 MB, about 0 s left" in line for line in logged)
        asked = len(handler.requests)
        fetch_audioset(folder, url)
        assert len(handler.requests) == asked
        (folder / "model.safetensors").write_bytes(b"spoilt")
        fetch_audioset(folder, url)
        assert handler.requests[asked:] == [
            ("/main/model.safetensors", None),
            ("/store/model.safetensors", None),
        ]
        assert (folder / "model.safetensors").read_bytes() == handler.files["model.safetensors"]
        (folder / "SHA256SUMS").write_text("half")
        with pytest.raises(InputError, match="SHA256SUMS is damaged. Delete it"):
            fetch_audioset(folder, url)

    @pytest.mark.parametrize("ranges", [True, False])
    def test_continues_where_it_broke_off(self, served, tmp_path, ranges, logged):
        handler, url = served
        handler.ranges, handler.break_after, handler.failures = (
            ranges,
            [400_000, 500_000],
            [503, 429],
        )
        folder = fetch_audioset(tmp_path, url)
        assert (folder / "model.safetensors").read_bytes() == handler.files["model.safetensors"]
        asked = [wanted for path, wanted in handler.requests if path == "/store/model.safetensors"]
        assert asked == [None, "bytes=500000-", "bytes=900000-" if ranges else "bytes=400000-"]
        assert sum("the connection was lost after" in line for line in logged) == 2
        assert sum("retrying" in line for line in logged) == 4

    def test_an_interrupted_call_is_continued(self, served, tmp_path):
        handler, url = served
        content = handler.files["model.safetensors"]
        for kept in (content[:1_000_000], content, content + b"older and longer"):
            (tmp_path / "model.safetensors.partial").write_bytes(kept)
            (tmp_path / "model.safetensors").unlink(missing_ok=True)
            handler.requests.clear()
            fetch_audioset(tmp_path, url)
            assert ("/store/model.safetensors", f"bytes={len(kept)}-") in handler.requests
            assert (tmp_path / "model.safetensors").read_bytes() == content

    def test_wrong_bytes_are_refused_and_not_kept(self, served, tmp_path):
        handler, url = served
        handler.files["config.json"] = b"{}"
        fetch_audioset(tmp_path, url)
        (tmp_path / "model.safetensors").unlink()
        handler.promised = "0" * 64
        with pytest.raises(
            InputError, match=f"model.safetensors has SHA-256 .*, expected {'0' * 64}"
        ):
            fetch_audioset(tmp_path, url)
        assert {path.name for path in tmp_path.iterdir()} == {"config.json", "SHA256SUMS"}

    def test_what_does_not_answer_is_refused(self, served, tmp_path):
        handler, url = served
        del handler.files["model.safetensors"]
        with pytest.raises(InputError, match="404.*Give a local copy"):
            fetch_audioset(tmp_path, url)
        handler.files["model.safetensors"] = b"here"
        handler.failures = [503] * 9
        with pytest.raises(InputError, match="503.*6 times. Run again later"):
            fetch_audioset(tmp_path, url)
        assert not (tmp_path / "model.safetensors").exists()
        with pytest.raises(InputError, match="give an http"):
            fetch_audioset(tmp_path / "new", "file:///etc")


def answer(handler, *headers: tuple[str, str], status: int = 200) -> None:
    handler.send_response(status)
    for name, value in headers:
        handler.send_header(name, value)
    handler.end_headers()


class TestHostile:
    """`download` from servers of others: one line, and nothing that later counts as complete."""

    @pytest.fixture(autouse=True)
    def impatient(self, monkeypatch):
        monkeypatch.setattr(files, "FIRST_WAIT", 0.01)
        monkeypatch.setattr(files, "RATE_SECONDS", 0.5)

    @staticmethod
    def refused(url: str, path, message: str, limit: int = 2**20) -> None:
        with pytest.raises(InputError, match=message) as error:
            download(url, path, limit)
        assert len(str(error.value).splitlines()) == 1 and not path.exists()

    @pytest.mark.parametrize("chunked", [False, True])
    def test_an_endless_body_ends_at_the_limit(self, tmp_path, chunked):
        def endless(handler):
            handler.protocol_version = "HTTP/1.1"
            answer(handler, *([("Transfer-Encoding", "chunked")] if chunked else []))
            while True:
                handler.wfile.write(b"10000\r\n%s\r\n" % bytes(2**16) if chunked else bytes(2**16))

        with answering(endless) as url:
            self.refused(url, tmp_path / "m", "has more than 1 MB. Check the address")
        assert not any(tmp_path.iterdir())

    @pytest.mark.parametrize("length", [2**20 + 1, 10**30])
    def test_a_stated_length_above_the_limit_is_refused_before_the_transfer(self, tmp_path, length):
        with answering(lambda handler: answer(handler, ("Content-Length", str(length)))) as url:
            self.refused(url, tmp_path / "m", "has more than 1 MB. Check the address")
        assert not any(tmp_path.iterdir())

    @pytest.mark.parametrize("length", [[], [("Content-Length", "1000000")]])
    def test_a_trickle_is_given_up(self, tmp_path, length):
        def trickle(handler):
            answer(handler, *length)
            while True:
                handler.wfile.write(b"a")
                time.sleep(0.02)

        with answering(trickle) as url:
            self.refused(url, tmp_path / "m", "sends less than 1,000 bytes per second. Run again")

    @pytest.mark.parametrize("line", [b"HTTP/1.1 100 Continue\r\n\r\n", b"x"])
    def test_an_answer_that_never_begins_is_given_up(self, tmp_path, monkeypatch, line):
        monkeypatch.setattr(files, "TIMEOUT", 0.3)

        def begin(handler):
            while True:
                handler.wfile.write(line)
                time.sleep(0.02)

        with answering(begin) as url:
            self.refused(url, tmp_path / "m", "sends no complete answer. Give a local copy")

    def test_a_byte_per_connection_is_given_up(self, tmp_path):
        def one(handler):
            start = (handler.headers["Range"] or "bytes=0-").removeprefix("bytes=").rstrip("-")
            fields = ("Content-Range", f"bytes {start}-999/1000"), ("Content-Length", "900")
            answer(handler, *fields, status=206)
            handler.wfile.write(b"a")

        with answering(one) as url:
            self.refused(
                url, tmp_path / "m", "the connection was lost after .*, 6 times. Run again"
            )

    def test_a_slow_connection_is_waited_for(self, tmp_path):
        def slow(handler):
            answer(handler, ("Content-Length", "20000"))
            for _ in range(100):
                handler.wfile.write(bytes(200))
                time.sleep(0.02)

        with answering(slow) as url:
            download(url, tmp_path / "m")
        assert (tmp_path / "m").read_bytes() == bytes(20_000)

    @pytest.mark.parametrize(
        "fields, message",
        [
            ([("Content-Type", "text/html; charset=utf-8")], "is a web page, not the file itself"),
            ([("Content-Encoding", "gzip")], r"is compressed \(gzip\), not the file itself"),
        ],
    )
    def test_something_other_than_the_file_is_refused(self, tmp_path, fields, message):
        def other(handler):
            answer(handler, *fields)
            handler.wfile.write(b"<html>log in</html>")

        with answering(other) as url:
            self.refused(url, tmp_path / "m", message)

    def test_other_bytes_than_the_missing_ones_are_refused(self, tmp_path):
        (tmp_path / "m.partial").write_bytes(bytes(100))

        def other(handler):
            answer(handler, ("Content-Range", "bytes 0-9/200"), status=206)
            handler.wfile.write(bytes(10))

        with answering(other) as url:
            self.refused(url, tmp_path / "m", "sends other bytes than asked")

    @pytest.mark.parametrize(
        "address, message",
        [
            ("file:///etc/passwd", "file:///etc/passwd' is not allowed. Give a local copy"),
            ("data:,model", "is not allowed. Give a local copy"),
            ("ftp://127.0.0.1:1/m", "redirects from http to ftp .*, which is not followed"),
            ("/model.safetensors", "redirect error that would lead to an infinite loop"),
        ],
    )
    def test_redirects_to_another_scheme_are_not_followed(self, tmp_path, address, message):
        with answering(lambda handler: answer(handler, ("Location", address), status=302)) as url:
            self.refused(url, tmp_path / "m", message)
            with pytest.raises(InputError) as error:
                RemoteFile(url)
        assert len(str(error.value).splitlines()) == 1

    @pytest.mark.parametrize("address", ["http://[::1/m", "http://127.0.0.1:port/m", "http:///m"])
    def test_addresses_that_are_none_are_refused(self, tmp_path, address):
        self.refused(address, tmp_path / "m", "cannot download http:")
