"""Archives at addresses, read by ranges from real servers that break off, refuse, change and fall
silent. Cost: 12 s."""

import concurrent.futures
import itertools
import json
import multiprocessing
import os
import pickle
import random
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import pytest
from servers import RangeServer, StorageEmulator

from percepiano_ast import files
from percepiano_ast.data.sources import Archive, Damaged, RemoteFile, Unreachable
from percepiano_ast.errors import InputError

MB = 2**20
REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """A zip archive of six members of 400 kB to 3 MB, stored and deflated."""
    path = tmp_path_factory.mktemp("archive") / "six members.zip"
    noise = random.Random(0)
    with zipfile.ZipFile(path, "w") as file:
        for number in range(6):
            content = noise.randbytes(400_000 + 500_000 * number) + bytes(10_000)
            method = zipfile.ZIP_DEFLATED if number % 2 else zipfile.ZIP_STORED
            file.writestr(f"folder/{number}.wav", content, method)
    return path


@pytest.fixture
def server(archive):
    with RangeServer(archive) as server:
        yield server


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(files, "FIRST_WAIT", 0.005)


def read_all(file: RemoteFile) -> bytes:
    """The whole file, in requests of 2 MB."""
    file.seek(0)
    content, block = b"", bytearray(2 * MB)
    while length := file.readinto(block):
        content += block[:length]
    return content


class TestArchive:
    """The right members, each fetched once."""

    @pytest.mark.parametrize("backwards", [False, True])
    def test_members_are_fetched_once(self, server, archive, backwards):
        source = Archive(server.url)
        assert len(source.names) == 6 and len(server.asked) <= 6
        with zipfile.ZipFile(archive) as local:
            for name in sorted(source.names, reverse=backwards):
                with source.open(name) as path:
                    assert path.read_bytes() == local.read(name) and path.suffix == ".wav"
                assert not path.exists()
                assert source.size(name) == local.getinfo(name).compress_size
        assert len(server.asked) <= 6 + 6
        assert source.remote.fetched == server.sent <= 1.001 * archive.stat().st_size

    def test_a_large_directory_is_fetched_once(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "many.zip", "w") as file:
            for number in range(1500):
                file.writestr(f"folder/recording_{number:05d}.wav", b"x" * 100)
            directory = file.start_dir
        with RangeServer(tmp_path / "many.zip") as server:
            assert len(Archive(server.url).names) == 1500
            assert server.sent <= 1.02 * ((tmp_path / "many.zip").stat().st_size - directory)

    @pytest.mark.parametrize("place", ["remote", "local"])
    def test_a_damaged_member_is_refused_and_others_are_read(self, archive, tmp_path, place):
        content = bytearray(archive.read_bytes())
        with zipfile.ZipFile(archive) as local:
            content[local.getinfo("folder/2.wav").header_offset + 9000] ^= 1
        damaged = tmp_path / "damaged.zip"
        damaged.write_bytes(content)
        with RangeServer(damaged) as server:
            source = Archive(server.url if place == "remote" else str(damaged))
            with (
                pytest.raises(Damaged, match="folder/2.wav is damaged in .*damaged.zip"),
                source.open("folder/2.wav"),
            ):
                pass
            with source.open("folder/3.wav") as path:
                assert path.stat().st_size == 1_910_000
        with (
            pytest.raises(InputError, match="none.wav is listed but not in"),
            source.open("none.wav"),
        ):
            pass

    def test_bytes_that_were_damaged_on_the_way_are_fetched_again(self, server, archive):
        source = Archive(server.url)
        with zipfile.ZipFile(archive) as local:
            for name in source.names:
                server.flips = [9000]
                with source.open(name) as path:
                    assert path.read_bytes() == local.read(name)
                assert not server.flips

    def test_scratch_files_of_a_killed_process_are_deleted(self, archive, tmp_path, monkeypatch):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        code = (
            "import os, signal; from percepiano_ast.data.sources import Archive\n"
            f"with Archive({str(archive)!r}).open('folder/1.wav'): os.kill(os.getpid(), 9)"
        )
        variables = {**os.environ, "TMPDIR": str(tmp_path)}
        assert subprocess.run([sys.executable, "-c", code], env=variables).returncode == -9
        (left,) = tmp_path.glob("percepiano_*/member.wav")
        source = Archive(str(archive))
        with source.open("folder/2.wav") as path, source.open("folder/3.wav"):
            assert path.exists() and not left.exists()
        assert not list(tmp_path.iterdir())

    def test_no_archive(self, tmp_path):
        (tmp_path / "no.zip").write_bytes(bytes(300_000))
        refused = pytest.raises(InputError, match="not a complete zip archive.*Download it again")
        with RangeServer(tmp_path / "no.zip") as server, refused:
            Archive(server.url)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> Path:
    """Key and certificate of 127.0.0.1, signed by itself."""
    path = tmp_path_factory.mktemp("certificate") / "both.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test"
    command += " -addext subjectAltName=IP:127.0.0.1 -keyout - -out -"
    try:
        made = subprocess.run(command.split(), capture_output=True, check=True)
    except FileNotFoundError:
        pytest.skip("no openssl to make a certificate with")
    path.write_bytes(made.stdout)
    return path


def test_an_encrypted_connection_that_breaks_off_is_continued(archive, certificate):
    # In a process of its own: urllib reads the trusted certificates once.
    code = """if True:
        import sys
        from percepiano_ast.data.sources import Archive
        source = Archive(sys.argv[1])
        for name in source.names:
            with source.open(name) as path:
                print(len(path.read_bytes()))
    """
    with RangeServer(archive, certificate=certificate) as server:
        server.cut_after = [2**30, 2**30, 200_000]
        command = [sys.executable, "-W", "error", "-c", code, server.url]
        environment = os.environ | {"SSL_CERT_FILE": str(certificate)}
        run = subprocess.run(
            command, cwd=REPOSITORY, env=environment, capture_output=True, text=True
        )
    assert run.returncode == 0 and not run.stderr, run.stderr
    with zipfile.ZipFile(archive) as file:
        assert run.stdout.split() == [str(one.file_size) for one in file.infolist()]
    assert server.url.startswith("https://") and not server.cut_after


def test_a_redirect_from_https_to_http_is_not_followed(archive, certificate, tmp_path):
    code = """if True:
        import sys
        from percepiano_ast.data.sources import RemoteFile
        from percepiano_ast.errors import InputError
        from percepiano_ast.files import download
        for call in (RemoteFile, lambda url: download(url, sys.argv[2])):
            for url in sys.argv[3:]:
                try:
                    call(url)
                    print("read")
                except InputError as error:
                    print(error)
    """
    with (
        RangeServer(archive) as plain,
        RangeServer(archive, certificate=certificate) as encrypted,
        RangeServer(archive) as upgrading,
        RangeServer(archive, certificate=certificate) as whole,
    ):
        encrypted.moved_to, upgrading.moved_to = plain.url, whole.url
        command = [sys.executable, "-W", "error", "-c", code, encrypted.url]
        command[-1:] = [encrypted.url, str(tmp_path / "copy"), encrypted.url, upgrading.url]
        run = subprocess.run(
            command,
            cwd=REPOSITORY,
            env=os.environ | {"SSL_CERT_FILE": str(certificate)},
            capture_output=True,
            text=True,
        )
    assert run.returncode == 0 and not run.stderr, run.stderr
    refused = f"{encrypted.url} redirects from https to http ({plain.url}), which is not followed."
    advice = "Give an address without this redirect, or a local copy."
    assert run.stdout.splitlines() == [f"{refused} {advice}", "read"] * 2
    assert not plain.asked


class TestFailures:
    """Servers that refuse, break off, fall silent, change or do not exist."""

    def test_what_passes_is_tried_again(self, server, archive):
        server.failures = [408, 425, 429, 500, 503]
        source = RemoteFile(server.url)
        server.failures = [502, 504]
        assert read_all(source) == archive.read_bytes()
        assert len(server.asked) == 6 + 2 + -(-archive.stat().st_size // (2 * MB))

    def test_follows_redirects(self, server, archive):
        with RangeServer(archive) as moved:
            moved.moved_to = server.url
            assert read_all(RemoteFile(moved.url)) == archive.read_bytes()
        assert moved.asked == server.asked and moved.sent == 0

    def test_waits_as_long_as_the_server_asks_within_limits(self, server, monkeypatch):
        monkeypatch.setattr(files, "LONGEST_WAIT", 0.3)
        in_an_hour = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 3600))
        for asked, least in (("3600", 0.3), (in_an_hour, 0.3), ("0", 0.0), ("soon", 0.0)):
            server.failures, server.retry_after = [503], asked
            began = time.monotonic()
            RemoteFile(server.url)
            assert least <= time.monotonic() - began

    def test_continues_with_the_byte_after_the_last(self, server, archive):
        # never six failures without a byte
        cuts = [100_000, 1, 0, 0, 1_200_000, 0, 0, 0, 0, 7, 300_000]
        source = RemoteFile(server.url)
        server.asked.clear()
        server.cut_after = list(cuts)
        source.seek(1000)
        content = bytearray(2 * MB)
        assert source.readinto(content) == 2 * MB
        assert content == archive.read_bytes()[1000 : 1000 + 2 * MB]
        starts = itertools.accumulate(cuts, initial=1000)
        assert server.asked == [f"bytes={start}-{999 + 2 * MB}" for start in starts]
        assert source.fetched == server.sent == 2 * MB + 1

    def test_continues_after_resets_and_silence(self, server, archive, monkeypatch):
        monkeypatch.setattr(files, "TIMEOUT", 0.2)
        source = RemoteFile(server.url)
        server.asked.clear()
        server.reset, server.cut_after = True, [900_000, 0, 50_000]
        server.silent_after = [10_000_000, 10_000_000, 10_000_000, 40_000]
        assert read_all(source) == archive.read_bytes()
        requests = -(-archive.stat().st_size // (2 * MB))
        assert len(server.asked) == 4 + requests

    def test_silence_loses_no_byte_that_came(self, server, archive, monkeypatch):
        monkeypatch.setattr(files, "TIMEOUT", 0.1)
        source = RemoteFile(server.url)
        server.asked.clear()
        server.silent_after = [50_000] * 7
        content = bytearray(500_000)
        source.readinto(content)
        assert content == archive.read_bytes()[1:500_001]
        assert server.asked == [f"bytes={start}-500000" for start in range(1, 350_002, 50_000)]

    def test_gives_up_in_the_end_and_says_so_every_time(self, server, archive):
        source = Archive(server.url)
        with zipfile.ZipFile(archive) as local:
            member = local.getinfo("folder/3.wav")
        server.broken = (member.header_offset, member.header_offset + 1)
        server.asked.clear()
        for _ in range(2):
            with (
                pytest.raises(Unreachable, match="six%20members.zip does not respond") as raised,
                source.open("folder/3.wav"),
            ):
                pass
        assert len(server.asked) == 2 * files.ATTEMPTS
        raised.match("503: Service Unavailable, 6 times in a row. Run again later")
        again = pickle.loads(pickle.dumps(raised.value))
        assert type(again) is Unreachable and str(again) == str(raised.value)
        server.broken = (0, 0)
        with source.open("folder/3.wav") as path:
            assert path.stat().st_size == member.file_size

    def test_nobody_listens(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with pytest.raises(
            Unreachable, match=f"127.0.0.1:{port}/a.zip does not respond: .*refused.*6 times"
        ):
            Archive(f"http://127.0.0.1:{port}/a.zip")

    def test_nobody_answers(self, server, monkeypatch):
        monkeypatch.setattr(files, "TIMEOUT", 0.1)
        server.delay = 0.5
        with pytest.raises(Unreachable, match="timed out.*, 6 times"):
            Archive(server.url)
        assert len(server.asked) == 6

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
            Archive(server.url)
        assert len(server.asked) == 1
        source = Archive(server.url)
        # What was opened is no bad input: a run must end, not list its recordings as bad.
        server.failures, opened = [status], len(server.asked)
        with pytest.raises(Unreachable, match=f"{status}.*{advice}"), source.open("folder/1.wav"):
            pass
        assert len(server.asked) == opened + 1

    def test_a_server_without_ranges_is_refused_unread(self, tmp_path):
        (tmp_path / "large.bin").write_bytes(bytes(40 * MB))
        refused = pytest.raises(
            InputError, match="large.bin cannot be read by ranges .*returns 200.*copy on disk"
        )
        with RangeServer(tmp_path / "large.bin", ranges=False) as server, refused:
            Archive(server.url)
        assert server.sent < 4 * MB

    @pytest.mark.parametrize("known", ["ETag", "Last-Modified", "bytes"])
    def test_a_file_that_changes(self, tmp_path, known):
        path = tmp_path / "changing.zip"
        path.write_bytes(bytes(300_000))
        with RangeServer(path) as server:
            server.headers = {name: None for name in ("ETag", "Last-Modified") if name != known}
            source = RemoteFile(server.url)
            path.write_bytes(bytes(300_001) if known == "bytes" else b"1" * 300_000)
            os.utime(path, (1, 1))
            with pytest.raises(
                Unreachable, match=f"changing.zip changed while it was read .*{known}.*Start again"
            ):
                read_all(source)
        assert len(server.asked) == 2

    @pytest.mark.parametrize("content_range", [None, "bytes 0-9/*", "bytes 3-9/100"])
    def test_answers_that_make_no_sense(self, server, content_range):
        server.headers = {"Content-Range": content_range}
        with pytest.raises(InputError, match="cannot be read by ranges|other bytes than requested"):
            Archive(server.url)

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
            Archive("http://127.0.0.1:port/b.zip")


def open_impatiently(url: str) -> None:
    """Runs in a worker process."""
    files.FIRST_WAIT = 0.005
    Archive(url)


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


class TestGoogle:
    """``gs://`` addresses: Google's store emulated, a private file, and no credentials library."""

    def test_reads_an_archive_and_names_what_is_missing(self, archive):
        pytest.importorskip("gcp_storage_emulator", reason="gcp-storage-emulator is not installed")
        with StorageEmulator() as emulator, zipfile.ZipFile(archive) as local:
            source = Archive(emulator.upload("folder/six members #1?.zip", archive.read_bytes()))
            for name in source.names:
                with source.open(name) as path:
                    assert path.read_bytes() == local.read(name)
            assert source.remote.fetched <= 1.001 * archive.stat().st_size
            for url in (f"gs://{emulator.bucket}/none.zip", "gs://none/none.zip"):
                with pytest.raises(
                    InputError, match=f"cannot read {url}: HTTP Error 404.*Check the address"
                ):
                    Archive(url)

    def test_resumes_where_it_broke_off_and_says_nothing(self, archive, monkeypatch, capfd):
        with RangeServer(archive) as server:
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url.rpartition("/")[0])
            server.failures = [503, 429]
            source = RemoteFile("gs://bucket/it.zip")
            server.cut_after = [1_000_000]
            assert read_all(source) == archive.read_bytes()
            assert source.fetched == archive.stat().st_size + 1
        assert capfd.readouterr() == ("", "")

    def test_a_private_file_is_read_with_credentials(self, archive, tmp_path, monkeypatch):
        pytest.importorskip("google.auth", reason="google-auth is not installed")
        make_key = "openssl genpkey -algorithm RSA -pkeyopt rsa_keygen_bits:2048"
        try:
            key = subprocess.run(
                make_key.split(), capture_output=True, text=True, check=True
            ).stdout
        except FileNotFoundError:
            pytest.skip("no openssl to make a key with")
        with RangeServer(archive) as server:
            host = server.url.rpartition("/")[0]
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", host)
            monkeypatch.setenv("NO_GCE_CHECK", "true")
            monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
            server.token = "of this test"
            with pytest.raises(
                InputError, match="401.*Log in .on Colab .*GOOGLE_APPLICATION_CREDENTIALS"
            ):
                Archive("gs://bucket/it.zip")
            account = {"type": "service_account", "client_email": "a@b.c", "private_key": key}
            account["token_uri"] = f"{host}/token"
            (tmp_path / "account.json").write_text(json.dumps(account))
            monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "account.json"))
            server.asked.clear()
            server.tokens.clear()
            assert read_all(RemoteFile("gs://bucket/it.zip")) == archive.read_bytes()
            assert server.tokens[0] is None and set(server.tokens[1:]) == {"Bearer of this test"}
            with RangeServer(archive) as other:  # the target of a redirect gets no token
                server.moved_to = other.url
                RemoteFile("gs://bucket/it.zip")
                assert other.tokens == [None]
            server.moved_to = ""
            # Credentials are not needed for what is open to all, and wrong ones do no harm.
            server.token = None
            (tmp_path / "account.json").write_text("{}")
            RemoteFile("gs://bucket/it.zip")

    def test_without_gcsfs_a_public_file_is_read(self, archive, monkeypatch, capfd):
        monkeypatch.setitem(sys.modules, "google.auth.exceptions", None)
        with RangeServer(archive) as server:
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url.rpartition("/")[0])
            source = RemoteFile("gs://bucket/folder/six members #1?.zip")
            assert read_all(source) == archive.read_bytes()
            server.failures = [403]
            with pytest.raises(InputError, match="403.*install gcsfs, or give a copy"):
                RemoteFile("gs://bucket/folder/six members.zip")
        assert capfd.readouterr() == ("", "")
