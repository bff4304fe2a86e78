"""The download of published weights, from a real server that breaks off, refuses and lies. 2 s."""

import hashlib
import http.server
import threading

import pytest

from percepiano_ast import files
from percepiano_ast.errors import InputError
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
