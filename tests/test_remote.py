"""Files at addresses, read by ranges from real servers that break off, refuse, change and fall
silent. Cost: 12 s."""

import concurrent.futures
import io
import itertools
import json
import multiprocessing
import os
import pickle
import random
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from percepiano_ast.data.remote import RemoteFile, Unreachable
from servers import RangeServer, StorageEmulator

from percepiano_ast.data import retry, stores
from percepiano_ast.errors import InputError

REPOSITORY = Path(__file__).resolve().parent.parent
END = 65_557  # bytes of the first request
MB = 2**20


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """A zip archive of six members of 400 kB to 3 MB, stored and deflated."""
    path = tmp_path_factory.mktemp("archive") / "six members.zip"
    noise = random.Random(0)
    with zipfile.ZipFile(path, "w") as file:
        for number in range(6):
            content = noise.randbytes(400_000 + 500_000 * number) + bytes(10_000)
            file.writestr(
                f"folder/{number}.wav",
                content,
                zipfile.ZIP_DEFLATED if number % 2 else zipfile.ZIP_STORED,
            )
    return path


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """40 MiB: numbers of eight bytes, counting up."""
    path = tmp_path_factory.mktemp("large") / "large.bin"
    path.write_bytes(np.arange(40 * MB // 8).astype(">u8").tobytes())
    return path


@pytest.fixture
def server(archive):
    with RangeServer(archive) as server:
        yield server


@pytest.fixture
def large_server(large):
    with RangeServer(large) as server:
        yield server


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.005)


@pytest.fixture(autouse=True)
def no_thread_stays():
    yield
    assert not reading_threads()


def reading_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


def spans(file: zipfile.ZipFile) -> dict[str, tuple[int, int]]:
    """Where each member lies, header included."""
    starts = [info.header_offset for info in file.infolist()] + [file.start_dir]
    return dict(zip(file.namelist(), itertools.pairwise(starts)))


class TestZip:
    """zipfile over a remote file: the right bytes, and hardly any twice."""

    def test_opening_costs_one_request(self, server, archive):
        with RemoteFile(server.url) as source, zipfile.ZipFile(source) as file:
            assert len(file.namelist()) == 6
            assert source.size == archive.stat().st_size and source.name == server.url
            assert server.asked == [f"bytes=-{END}"] and source.fetched == server.sent == END

    def test_a_large_directory_costs_one_more(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "many.zip", "w") as file:
            for number in range(1500):
                file.writestr(f"folder/recording_{number:05d}.wav", b"x" * 100)
        many = tmp_path / "many.zip"
        with (
            RangeServer(many) as server,
            RemoteFile(server.url) as source,
            zipfile.ZipFile(source) as file,
        ):
            assert len(file.namelist()) == 1500
            assert server.asked[1:] == [f"bytes={file.start_dir}-{source.size - END - 1}"]
            assert source.fetched == source.size - file.start_dir

    def test_members_in_spans_are_one_request_each(self, server, archive):
        with (
            zipfile.ZipFile(archive) as local,
            RemoteFile(server.url) as source,
            zipfile.ZipFile(source) as file,
        ):
            for name, (start, stop) in spans(file).items():
                with source.span(start, stop), file.open(name) as member:
                    parts = list(iter(lambda: member.read(10_000), b""))
                assert b"".join(parts) == local.read(name)
                assert server.asked[-1] == f"bytes={start}-{min(stop, source.size - END) - 1}"
            assert len(server.asked) == 7
            assert source.fetched == server.sent == archive.stat().st_size

    @pytest.mark.parametrize("backwards", [False, True])
    def test_members_without_spans(self, server, archive, backwards):
        with (
            zipfile.ZipFile(archive) as local,
            RemoteFile(server.url) as source,
            zipfile.ZipFile(source) as file,
        ):
            for name in sorted(file.namelist(), reverse=backwards):
                assert file.read(name) == local.read(name)
            assert len(server.asked) <= 1 + 2 * 6
            assert source.fetched == server.sent <= 1.05 * archive.stat().st_size

    def test_a_small_archive_comes_whole_with_the_first_request(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "small.zip", "w") as file:
            file.writestr("table.csv", "a,b\n")
        with RangeServer(tmp_path / "small.zip") as server, RemoteFile(server.url) as source:
            with zipfile.ZipFile(source) as file, source.span(0, file.start_dir):
                assert file.read("table.csv") == b"a,b\n"
            assert len(server.asked) == 1

    def test_no_archive(self, large_server):
        with RemoteFile(large_server.url) as source, pytest.raises(zipfile.BadZipFile):
            zipfile.ZipFile(source)


LEAVE_EARLY = f"""
import sys, threading, time
from percepiano_ast.data.remote import RemoteFile
with RemoteFile(sys.argv[1]) as source:
    with source.span(0, source.size):
        assert source.read(16) == (1).to_bytes(16, "big")
        while source.fetched < {END + 5 * MB}:
            time.sleep(0.01)
        time.sleep(0.1)
        began = time.monotonic()
    assert time.monotonic() - began < 1 and threading.active_count() == 1
    print(source.fetched)
"""


class TestFile:
    """What Python's files do, and how far ahead a span reads."""

    def test_reads_what_a_local_file_reads(self, server, archive):
        choose = random.Random(1)
        with archive.open("rb") as local, RemoteFile(server.url) as source:
            for start, stop in (
                (0, 0),
                (1_000_000, 3_000_000),
                (source.size - 100_000, source.size + 9),
            ):
                with source.span(start, stop):
                    for _ in range(60):
                        whence = choose.choice([io.SEEK_SET, io.SEEK_END])
                        at = choose.choice(
                            [choose.randrange(start, stop + 1), choose.randrange(source.size + 10)]
                        )
                        at -= source.size if whence == io.SEEK_END else 0
                        at = max(at, -source.size if whence == io.SEEK_END else 0)
                        size = choose.choice([0, 1, 30, 5000, 70_000])
                        assert source.seek(at, whence) == local.seek(at, whence)
                        assert source.read(size) == local.read(size)
                        assert source.tell() == local.tell()
            assert source.seek(-100, io.SEEK_CUR) == local.seek(source.tell())
            assert source.readall() == local.read() and source.read() == b""
            buffer = bytearray(50)
            assert source.seek(-20, io.SEEK_END) and source.readinto(buffer) == 20
            assert source.readable() and source.seekable() and not source.writable()
            with pytest.raises(ValueError, match="before the beginning"):
                source.seek(-1)
            with source.span(0, 10), pytest.raises(ValueError, match="nested"), source.span(5, 7):
                pass
        with pytest.raises(ValueError, match="closed"):
            source.read(1)

    def test_a_span_reads_ahead_within_bounds(self, large_server, large):
        with RemoteFile(large_server.url) as source, source.span(100, 39 * MB):
            source.seek(100)
            assert source.read(4) == large.read_bytes()[100:104]
            deadline = time.monotonic() + 5
            while source.fetched < 16 * MB and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.1)
            assert 16 * MB <= source.fetched <= 18 * MB
            assert source.read(39 * MB - 104) == large.read_bytes()[104 : 39 * MB]
            assert len(large_server.asked) == 2

    def test_skipping_forward_and_outside_of_a_span(self, large_server, large):
        content = large.read_bytes()
        with RemoteFile(large_server.url) as source, source.span(10 * MB, 30 * MB):
            for at in (
                10 * MB,
                10 * MB + 5,
                20 * MB,
                5 * MB,
                20 * MB + 10,
                15 * MB,
                31 * MB,
                29 * MB,
            ):
                source.seek(at)
                assert source.read(3) == content[at : at + 3]
            # Five, fifteen and thirty-one lie outside, or behind.
            assert large_server.asked[2:] == [
                f"bytes={at * MB}-{at * MB + 4095}" for at in (5, 15, 31)
            ]
            source.seek(10 * MB - 5)
            with pytest.raises(ValueError, match="nested"), source.span(0, 1):
                pass
        with RemoteFile(large_server.url) as source, source.span(10 * MB, 30 * MB):
            source.seek(10 * MB - 5)
            assert source.read(10) == content[10 * MB - 5 : 10 * MB + 5]
            assert f"bytes={10 * MB - 5}-{10 * MB - 1}" in large_server.asked

    def test_a_span_left_early_ends_at_once(self, large_server, large, monkeypatch):
        server = large_server
        with RemoteFile(server.url) as source:
            server.silent_after = [3 * MB]
            for at in (0, 20 * MB):  # while it waits for bytes; while the queue is full
                source.seek(at)
                with source.span(at, 39 * MB):
                    assert source.read(100) == large.read_bytes()[at : at + 100]
                    time.sleep(0.2)
                    began = time.monotonic()
                assert time.monotonic() - began < 1 and not reading_threads()
            server.broken = (0, 39 * MB)
            monkeypatch.setattr(retry, "FIRST_WAIT", 60.0)
            with source.span(MB, 39 * MB):  # while it waits to try again
                time.sleep(0.2)
                began = time.monotonic()
            assert time.monotonic() - began < 1 and not reading_threads()
            assert source.fetched < 25 * MB

    def test_an_encrypted_span_left_early(self, large, certificate):
        # In a process of its own: urllib reads the trusted certificates once.
        with RangeServer(large, certificate=certificate) as server:
            server.silent_after = [END, 5 * MB]
            environment = os.environ | {"SSL_CERT_FILE": str(certificate)}
            command = [sys.executable, "-W", "error", "-c", LEAVE_EARLY, server.url]
            run = subprocess.run(
                command, cwd=REPOSITORY, env=environment, capture_output=True, text=True
            )
        assert run.returncode == 0 and not run.stderr, run.stderr
        assert int(run.stdout) == END + 5 * MB


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> Path:
    """Key and certificate of 127.0.0.1, signed by itself."""
    path = tmp_path_factory.mktemp("certificate") / "both.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test -addext"
        " subjectAltName=IP:127.0.0.1"
    )
    try:
        made = subprocess.run(
            [*command.split(), "-keyout", "-", "-out", "-"], capture_output=True, check=True
        )
    except FileNotFoundError:
        pytest.skip("no openssl to make a certificate with")
    path.write_bytes(made.stdout)
    return path


class TestFailures:
    """Servers that refuse, break off, fall silent, change or do not exist."""

    def test_what_passes_is_tried_again(self, server, archive):
        server.failures = [408, 425, 429, 500, 503]
        with RemoteFile(server.url) as source:
            server.failures = [502, 504]
            assert source.read() == archive.read_bytes()
        assert len(server.asked) == 6 + 3

    def test_follows_redirects(self, server, archive):
        with RangeServer(archive) as moved:
            moved.moved_to = server.url
            with RemoteFile(moved.url) as source, source.span(0, source.size):
                assert source.read() == archive.read_bytes()
        assert moved.asked == server.asked and moved.sent == 0

    def test_waits_as_long_as_the_server_asks_within_limits(self, server, monkeypatch):
        monkeypatch.setattr(retry, "LONGEST_WAIT", 0.3)
        in_an_hour = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 3600))
        for asked, least in (("3600", 0.3), (in_an_hour, 0.3), ("0", 0.0), ("soon", 0.0)):
            server.failures, server.retry_after = [503], asked
            began = time.monotonic()
            RemoteFile(server.url).close()
            assert least <= time.monotonic() - began < least + 0.25

    @pytest.mark.parametrize("spanned", [False, True])
    def test_continues_with_the_byte_after_the_last(self, server, archive, spanned):
        # never six failures without a byte
        cuts = [100_000, 1, 0, 0, 1_200_000, 0, 0, 0, 0, 7, 300_000]
        with RemoteFile(server.url) as source:
            server.asked.clear()
            server.cut_after = list(cuts)
            stop = source.size - END
            if spanned:
                with source.span(1000, stop):
                    source.seek(1000)
                    content = source.read(stop - 1000)
            else:
                source.seek(1000)
                content = source.read(stop - 1000)
            assert content == archive.read_bytes()[1000:stop]
            starts = itertools.accumulate(cuts, initial=1000)
            assert server.asked == [f"bytes={start}-{stop - 1}" for start in starts]
            assert source.fetched == server.sent == source.size - 1000

    def test_continues_after_resets_and_silence(self, server, archive, monkeypatch):
        monkeypatch.setattr(retry, "TIMEOUT", 0.2)
        server.reset, server.cut_after = True, [30_000]
        with RemoteFile(server.url) as source:
            server.cut_after, server.silent_after = (
                [900_000, 0, 50_000],
                [10_000_000, 10_000_000, 10_000_000, 40_000],
            )
            with source.span(0, source.size):
                assert source.read() == archive.read_bytes()
        assert len(server.asked) == 2 + 5
        assert source.fetched == source.size

    def test_silence_loses_no_byte_that_came(self, server, archive, monkeypatch):
        monkeypatch.setattr(retry, "TIMEOUT", 0.1)
        with RemoteFile(server.url) as source:
            server.asked.clear()
            server.silent_after = [50_000] * 7
            assert source.read(500_000) == archive.read_bytes()[:500_000]
        assert server.asked == [f"bytes={start}-499999" for start in range(0, 350_001, 50_000)]

    @pytest.mark.parametrize("spanned", [False, True])
    def test_gives_up_in_the_end_and_says_so_every_time(self, server, archive, spanned):
        with RemoteFile(server.url) as source:
            server.broken = (2_000_000, 2_000_001)
            server.asked.clear()
            span = (0, source.size) if spanned else (0, 0)
            # the whole span is one request, which would be refused; it may be sent before anything
            # is read
            if spanned:
                server.broken, server.cut_after = (0, 0), [1_000_000, *[0] * 9]
            with source.span(*span):
                if spanned:
                    assert source.read(1_000_000) == archive.read_bytes()[:1_000_000]
                for _ in range(2):
                    with pytest.raises(
                        Unreachable, match="six members.zip|six%20members.zip"
                    ) as raised:
                        source.seek(1_999_990)
                        source.read(100)
            reason = "lost .* bytes early" if spanned else "503: Service Unavailable"
            assert len(server.asked) == (6 if spanned else 12)
            raised.match(f"does not respond: .*{reason}, 6 times in a row. Run again later")
            again = pickle.loads(pickle.dumps(raised.value))
            assert type(again) is Unreachable and str(again) == str(raised.value)
            server.broken, server.cut_after = (0, 0), []
            source.seek(0)
            assert source.read() == archive.read_bytes()

    def test_nobody_listens(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with pytest.raises(
            Unreachable, match=f"127.0.0.1:{port}/a.zip does not respond: .*refused.*6 times"
        ):
            RemoteFile(f"http://127.0.0.1:{port}/a.zip")

    def test_nobody_answers(self, server, monkeypatch):
        monkeypatch.setattr(retry, "TIMEOUT", 0.1)
        server.delay = 0.5
        with pytest.raises(Unreachable, match="timed out, 6 times"):
            RemoteFile(server.url)
        assert len(server.asked) == 6

    def test_a_span_left_before_its_answer(self, large_server, monkeypatch):
        with RemoteFile(large_server.url) as source:
            large_server.delay = 0.5
            with source.span(0, 39 * MB):
                pass
            assert not reading_threads() and source.fetched == END

    @pytest.mark.parametrize(
        ("status", "advice"),
        [
            (401, "Give a public address"),
            (403, "Give a public address"),
            (404, "Check the address"),
            (410, "Check the address"),
            (416, "empty or became shorter"),
        ],
    )
    def test_a_refusal_is_final(self, server, status, advice):
        server.failures = [status]
        with pytest.raises(
            InputError, match=f"six%20members.zip: HTTP Error {status}: .*{advice}.*copy on disk"
        ):
            RemoteFile(server.url)
        assert len(server.asked) == 1
        with RemoteFile(server.url) as source:
            # What was opened is no bad input: a run must end, not list its recordings as bad.
            server.failures = [status]
            with (
                source.span(0, source.size),
                pytest.raises(Unreachable, match=f"{status}.*{advice}"),
            ):
                source.read(10)
        assert len(server.asked) == 3

    def test_a_server_without_ranges_is_refused_unread(self, large):
        refused = pytest.raises(
            InputError, match="large.bin cannot be read by ranges .*returns 200.*copy on disk"
        )
        with RangeServer(large, ranges=False) as server, refused:
            RemoteFile(server.url)
        assert server.sent < MB

    def test_a_server_that_counts_from_the_beginning_only(self, server, archive):
        server.suffixes = False
        with RemoteFile(server.url) as source:
            assert source.read() == archive.read_bytes()
        assert len(server.asked) == 4 and server.asked[1] == "bytes=0-0"

    @pytest.mark.parametrize("known", ["ETag", "Last-Modified", "bytes"])
    def test_a_file_that_changes(self, tmp_path, known):
        path = tmp_path / "changing.zip"
        path.write_bytes(bytes(300_000))
        with RangeServer(path) as server:
            server.headers = {name: None for name in ("ETag", "Last-Modified") if name != known}
            with RemoteFile(server.url) as source:
                path.write_bytes(bytes(300_001) if known == "bytes" else b"1" * 300_000)
                os.utime(path, (1, 1))
                with pytest.raises(
                    OSError, match=f"changing.zip changed while it was read .*{known}.*Start again"
                ):
                    source.read()
        assert len(server.asked) == 2

    @pytest.mark.parametrize("content_range", [None, "bytes 0-9/*", "bytes 3-9/100"])
    def test_answers_that_make_no_sense(self, server, content_range):
        server.headers = {"Content-Range": content_range}
        with pytest.raises(InputError, match="cannot be read by ranges|other bytes than requested"):
            RemoteFile(server.url)

    @pytest.mark.parametrize(
        "url",
        [
            "ftp://a/b.zip",
            "s3://a/b.zip",
            "a/b.zip",
            "gs://bucket",
            "gs:///b.zip",
            "https:///b.zip",
            "",
        ],
    )
    def test_addresses_of_other_kinds(self, url):
        with pytest.raises(
            InputError, match=r"cannot read '.*': .*https://, http:// or gs://BUCKET/OBJECT"
        ):
            RemoteFile(url)

    def test_an_address_that_is_none(self):
        with pytest.raises(InputError, match="port.*Check the address"):
            RemoteFile("http://127.0.0.1:port/b.zip")


def open_impatiently(url: str) -> None:
    """Runs in a worker process."""
    retry.FIRST_WAIT = 0.005
    with RemoteFile(url) as source, source.span(0, source.size):
        source.read()


def test_failures_cross_process_borders(server):
    server.failures = [503] * 6
    with concurrent.futures.ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn")
    ) as pool:
        with pytest.raises(Unreachable, match="503.*6 times"):
            pool.submit(open_impatiently, server.url).result()
        server.failures = [404]
        with pytest.raises(InputError, match="404"):
            pool.submit(open_impatiently, server.url).result()
        pool.submit(open_impatiently, server.url).result()


def test_importing_is_light():
    heavy = ["aiohttp", "fsspec", "gcsfs", "google", "numpy", "requests"]
    code = (
        f"import sys, percepiano_ast.data.remote\nprint([name for name in {heavy} if name in"
        " sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def emulator():
    pytest.importorskip("gcsfs", reason="gcsfs is not installed")
    pytest.importorskip("gcp_storage_emulator", reason="gcp-storage-emulator is not installed")
    with StorageEmulator() as emulator:
        yield emulator


class TestGoogle:
    """``gs://`` addresses: Google's store emulated, a private file, and no gcsfs."""

    def test_reads_an_archive(self, emulator, archive):
        url = emulator.upload("folder/six members #1?.zip", archive.read_bytes())
        with (
            zipfile.ZipFile(archive) as local,
            RemoteFile(url) as source,
            zipfile.ZipFile(source) as file,
        ):
            for name, span in spans(file).items():
                with source.span(*span):
                    assert file.read(name) == local.read(name)
            assert source.size <= source.fetched <= source.size + 1

    def test_what_is_not_there(self, emulator):
        for url in (f"gs://{emulator.bucket}/none.zip", "gs://none/none.zip"):
            with pytest.raises(
                InputError, match=f"cannot read {url}: HTTP Error 404.*Check the address"
            ):
                RemoteFile(url)

    def test_resumes_where_it_broke_off_and_says_nothing(self, archive, monkeypatch, capfd):
        pytest.importorskip("gcsfs", reason="gcsfs is not installed")
        with RangeServer(archive) as server:
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url.rpartition("/")[0])
            server.failures, server.cut_after = [503, 429], [10_000]
            with RemoteFile("gs://bucket/it.zip") as source:
                server.cut_after = [1_000_000]
                with source.span(0, source.size):
                    assert source.read() == archive.read_bytes()
            assert len(server.asked) == 2 + 2 + 2 and source.fetched == source.size
        assert capfd.readouterr() == ("", "")

    # gcsfs 2025.3.0 asks for the time in a way that Python 3.12 deprecates.
    @pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning:gcsfs")
    def test_a_private_file_is_read_with_credentials(
        self, archive, tmp_path, certificate, monkeypatch
    ):
        pytest.importorskip("gcsfs", reason="gcsfs is not installed")
        with RangeServer(archive) as server:
            host = server.url.rpartition("/")[0]
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", host)
            monkeypatch.setenv("NO_GCE_CHECK", "true")
            monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
            server.token = "of this test"
            with pytest.raises(
                InputError, match="401.*Log in .on Colab .*GOOGLE_APPLICATION_CREDENTIALS"
            ):
                RemoteFile("gs://bucket/it.zip")
            key = certificate.read_text().partition("-----BEGIN CERTIFICATE-----")[0]
            account = {
                "type": "service_account",
                "client_email": "a@b.c",
                "token_uri": f"{host}/token",
            }
            account["private_key"] = key
            (tmp_path / "account.json").write_text(json.dumps(account))
            monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "account.json"))
            server.asked.clear()
            with RemoteFile("gs://bucket/it.zip") as source:
                assert source.read() == archive.read_bytes()
            assert len(server.asked) == 3 and server.tokens[-3:] == [
                None,
                *["Bearer of this test"] * 2,
            ]
            with RangeServer(archive) as other:  # whoever it redirects to is told no secret
                server.moved_to = other.url
                RemoteFile("gs://bucket/it.zip").close()
                assert other.asked == [f"bytes=-{END}"] and other.tokens == [None]
            server.moved_to = ""
            # Credentials are not needed for what is open to all, and wrong ones do no harm.
            server.token = None
            (tmp_path / "account.json").write_text("{}")
            RemoteFile("gs://bucket/it.zip").close()

    def test_without_gcsfs_a_public_file_comes_over_https(self, archive, monkeypatch, capfd):
        monkeypatch.setitem(sys.modules, "gcsfs", None)
        with RangeServer(archive) as server:
            monkeypatch.setattr(stores, "_GOOGLE", server.url.rpartition("/")[0])
            with RemoteFile("gs://bucket/folder/six members #1?.zip") as source:
                assert source.read() == archive.read_bytes()
            server.failures = [403]
            with pytest.raises(InputError, match="403.*install gcsfs, or give a copy"):
                RemoteFile("gs://bucket/folder/six members.zip")
        assert capfd.readouterr() == ("", "")
