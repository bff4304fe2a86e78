"""Making shards, whatever interrupts it: killed, out of room, cut off, damaged. Cost: 60 s, most of
it workers that start."""

import functools
import hashlib
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from archives import (
    FRONT_END,
    ROOT,
    data_set_bytes,
    preprocess,
    sound,
    wav,
    write_archive_of,
    write_usual_archive,
)
from servers import RangeServer, StorageEmulator

from percepiano_ast import files
from percepiano_ast.cli import main
from percepiano_ast.data import build, maestro, shards
from percepiano_ast.errors import InputError, RunFailed

# Shards of half a minute, so that there are several; servers are asked again soon. Workers run this
# file too.
SCRIPT = """
import sys
from percepiano_ast import files
from percepiano_ast.cli import main
from percepiano_ast.data import shards
shards.SHARD_SECONDS, files.FIRST_WAIT = 25, 0.01
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    return write_usual_archive(tmp_path_factory.mktemp("source") / "maestro.zip")


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("script") / "script.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture(scope="module")
def run(script, archive, tmp_path_factory) -> Path:
    """The output of an uninterrupted run, with several shards in the training split."""
    out = tmp_path_factory.mktemp("run")
    done = start(script, archive, out, capture_output=True, text=True).communicate()
    assert len(list((out / "maestro" / "records").glob("train-*"))) == 2, done
    return out / "maestro"


def start(
    script: Path, source, out: Path, *options: str, capture_output=False, text=False
) -> subprocess.Popen:
    """The command, in a process group of its own."""
    repository = Path(__file__).resolve().parent.parent
    command = [
        sys.executable,
        script,
        "preprocess",
        "--source",
        str(source),
        "--out",
        str(out),
        *options,
    ]
    pipe = subprocess.PIPE if capture_output else subprocess.DEVNULL
    environment = os.environ | {"PYTHONPATH": str(repository)}
    return subprocess.Popen(
        command, env=environment, stdout=pipe, stderr=pipe, text=text, start_new_session=True
    )


def finish(script: Path, source, out: Path, *options: str) -> tuple[int, str]:
    """Run the command to its end; exit code, and all that it printed."""
    process = start(script, source, out, *options, capture_output=True, text=True)
    printed = "".join(process.communicate(timeout=120))
    return process.returncode, printed


def wait_for(condition, process: subprocess.Popen, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)


def test_killed_at_any_moment_it_ends_with_the_same_bytes(script, archive, run, tmp_path):
    """Killed when the first shard is being written, when it is, and when the second is."""
    home = tmp_path / "out" / "maestro"
    moments = [
        lambda: list(home.glob("maestro_log_mel/*/*.partial")),
        lambda: list(home.glob("records/*.json")),
        lambda: len(list(home.glob("records/*.json"))) > 1,
    ]
    kept = []
    for moment in moments:
        process = start(script, archive, tmp_path / "out")
        wait_for(moment, process)
        time.sleep(random.Random(len(kept)).uniform(0, 0.02))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not shards.is_complete(home)
        with pytest.raises(InputError, match="is incomplete. Run this first"):
            shards.open_shards(home, "train", made_by="this")
        records = [json.loads(path.read_text()) for path in home.glob("records/*.json")]
        kept.append(sum(len(record["recordings"]) for record in records))
    assert kept[1] >= 1 and kept == sorted(kept), "a finished shard was lost"
    code, printed = finish(script, archive, tmp_path / "out")
    assert code == 0 and f"{kept[-1]} of 6 are done already" in printed, printed
    assert data_set_bytes(home) == data_set_bytes(run)
    assert not list(home.rglob("*.partial"))


def test_when_the_command_is_killed_its_workers_end(script, archive, tmp_path):
    process = start(script, archive, tmp_path / "out", "--workers", "2")
    wait_for(lambda: list((tmp_path / "out").rglob("*.json")), process)
    time.sleep(1.0)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while alive := _members(process.pid):
        assert time.monotonic() < deadline, f"{alive} are still at work"
        time.sleep(0.05)


def _members(group: int) -> list[str]:
    """Processes of a group that are not dead."""
    listed = subprocess.run(
        ["ps", "-eww", "-o", "pgid=,pid=,stat=,args="], capture_output=True, text=True
    ).stdout
    return [
        line
        for line in listed.splitlines()
        if line.split()[0] == str(group) and "Z" not in line.split()[2]
    ]


def test_a_killed_worker_is_said_and_the_next_run_continues(script, archive, run, tmp_path):
    with RangeServer(archive) as server:
        server.delay = 0.3  # so that the worker is at work when it is killed
        process = start(
            script, server.url, tmp_path / "out", "--workers", "2", capture_output=True, text=True
        )
        opened = len(server.asked)
        wait_for(lambda: len(server.asked) > opened + 12, process)
        worker, _ = [line.split()[1] for line in _members(process.pid) if "spawn_main" in line]
        os.kill(int(worker), signal.SIGKILL)
        _, error = process.communicate(timeout=60)
    assert (
        process.returncode == 1
        and "a worker process was killed" in error
        and "Traceback" not in error
    )
    assert finish(script, archive, tmp_path / "out")[0] == 0
    assert data_set_bytes(tmp_path / "out" / "maestro") == data_set_bytes(run)


class TestRemote:
    """The archive at an address: a real server by ranges, and Google's store, emulated."""

    def test_every_byte_is_fetched_once_whatever_breaks(self, script, archive, run, tmp_path):
        with RangeServer(archive) as server, zipfile.ZipFile(archive) as file:
            members = sum(
                i.compress_size
                for i in file.infolist()
                if i.filename.endswith(("_0000.wav", ".csv"))
            )
            members += sum(
                i.compress_size for i in file.infolist() if re.search(r"_000[1-5].wav", i.filename)
            )
            server.cut_after, server.failures = [2000, 300_000, 5000, 40_000], [503, 500, 429]
            code, printed = finish(script, server.url, tmp_path / "out", "--workers", "2")
            assert code == 0, printed
            assert data_set_bytes(tmp_path / "out" / "maestro") == data_set_bytes(run)
            directory = 65_557 * 3  # the archive's end, for the command and each of its workers
            assert members < server.sent <= 1.05 * members + directory

    def test_a_source_that_goes_away_ends_the_run_and_it_continues(
        self, script, archive, run, tmp_path
    ):
        with RangeServer(archive) as server, zipfile.ZipFile(archive) as file:
            # its end still comes
            server.broken = (file.infolist()[4].header_offset, archive.stat().st_size - 70_000)
            code, printed = finish(script, server.url, tmp_path / "out", "--workers", "1")
            assert code == 1 and "the source stopped delivering" in printed and "503" in printed
            assert "Traceback" not in printed and "run again to resume" in printed
            server.broken = (0, 0)
            code, printed = finish(script, server.url, tmp_path / "out")
            assert code == 0 and "2 of 6 are done already" in printed, printed
        assert data_set_bytes(tmp_path / "out" / "maestro") == data_set_bytes(run)

    def test_one_recording_that_does_not_come_is_listed(self, script, archive, tmp_path):
        with RangeServer(archive) as server, zipfile.ZipFile(archive) as file:
            offset = file.getinfo(f"{ROOT}/2026/recording_0002.wav").header_offset
            server.broken = (offset + 100_000, offset + 100_001)
            code, printed = finish(script, server.url, tmp_path / "out")
            assert (
                code == 1
                and "skipped 2026/recording_0002.wav" in printed
                and "1 unusable recordings, 0 allowed" in printed
            )
            code, printed = finish(script, server.url, tmp_path / "out", "--max-errors", "1")
            assert code == 0 and "4 of 6 are done already" in printed, printed

    @pytest.mark.parametrize(
        "fault, message",
        [
            ({"ranges": False}, "cannot be read by ranges"),
            ({"failures": [403]}, "403"),
            ({"failures": [404]}, "404"),
        ],
    )
    def test_what_no_patience_helps_is_said_at_once(
        self, fault, message, archive, tmp_path, capsys
    ):
        with RangeServer(archive) as server:
            for name, value in fault.items():
                setattr(server, name, value)
            began = time.monotonic()
            assert main(["preprocess", "--source", server.url, "--out", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err and time.monotonic() - began < 20

    def test_googles_store(self, script, archive, run, tmp_path):
        pytest.importorskip("gcsfs", reason="gcsfs is optional: Colab's TPU runtime has none")
        with StorageEmulator() as emulator:
            code, printed = finish(
                script, emulator.upload("maestro.zip", archive.read_bytes()), tmp_path / "out"
            )
        assert code == 0, printed
        assert data_set_bytes(tmp_path / "out" / "maestro") == data_set_bytes(run)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 4 MB; needs root."""
    place = tmp_path / "disk"
    place.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", place]).returncode
    ):
        pytest.skip("mounting a small disk needs root")
    yield place
    subprocess.run(["umount", place], check=True)


class TestRoom:
    """A disk that is small, or fills up."""

    def test_too_small_a_disk_is_said_before_anything_is_read(self, small_disk, tmp_path):
        source = write_archive_of(
            tmp_path / "long.zip", {f"{k}.wav": wav(sound(12)) for k in range(1)}
        )
        _claim_hours(source, 1.0)
        with pytest.raises(
            InputError, match=r"0\.00 GB free, the shards need 0\.09 GB: 0\.09 GB are missing"
        ):
            preprocess(source, small_disk / "out")

    def test_a_disk_that_fills_up_stops_the_run_with_all_shards_kept(
        self, archive, small_disk, run, monkeypatch, request, logged
    ):
        monkeypatch.setattr(shards, "SHARD_SECONDS", 25)
        monkeypatch.setattr(files, "LOG_SECONDS", -1)  # a line for every recording

        class Filling(logging.Handler):
            def emit(self, record):
                if "4/6" in record.getMessage():
                    (small_disk / "others").write_bytes(bytes(shutil.disk_usage(small_disk).free))

        logger, filling = logging.getLogger("percepiano_ast"), Filling()
        logger.addHandler(filling)
        request.addfinalizer(functools.partial(logger.removeHandler, filling))
        how = build.BuildOptions()
        with pytest.raises(
            RunFailed, match="is full .* GB are needed for the rest. Free them and run again"
        ):
            maestro.preprocess(str(archive), small_disk / "out", FRONT_END, how)
        logger.removeHandler(filling)
        assert len(list((small_disk / "out").glob("records/*.json"))) == 1
        assert not list(small_disk.rglob("*.partial"))
        (small_disk / "others").unlink()
        log = preprocess(archive, small_disk / "out")
        assert any("2 of 6 are done already" in line for line in log)
        assert data_set_bytes(small_disk / "out") == data_set_bytes(run)

    def test_a_disk_that_is_full_at_once_leaves_nothing_half_written(self, small_disk):
        fields = {"recording": "n", "composer": "", "title": "", "year": 0}
        (shard,) = shards.plan([shards.Item("noise", "train", fields, 60.0)])
        job = build.Job(maestro.MaestroLogMel, _noise, small_disk, FRONT_END)
        with pytest.raises((OSError, RuntimeError), match="No space left") as raised:
            build.write_shard(job, shard)
        assert files.disk_is_full(raised.value) and not job.written(shard)
        assert not [path for path in small_disk.rglob("*") if path.is_file()]


def _noise(item: shards.Item, facts: dict):
    rng = np.random.default_rng(0)
    for _ in range(60):
        yield rng.integers(0, 256, (1000, 128), np.uint8)


def _claim_hours(archive: Path, hours: float) -> None:
    """Rewrite the table of an archive: each recording is said to last so long."""
    with zipfile.ZipFile(archive) as file:
        contents = {name: file.read(name) for name in file.namelist()}
    contents["odd.csv"] = contents["odd.csv"].replace(b",12\n", f",{3600 * hours:.0f}\n".encode())
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in contents.items():
            file.writestr(name, content)


def test_a_place_where_nothing_may_be_written_is_said(archive, tmp_path, capsys):
    if os.geteuid():
        pytest.skip("becoming somebody else needs root")
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:  # another user may look for the source
        if parent.is_relative_to("/tmp") and parent != Path("/tmp"):
            parent.chmod(parent.stat().st_mode | 0o055)
    archive.parent.chmod(0o755)
    os.seteuid(65_534)
    try:
        code = main(["preprocess", "--source", str(archive), "--out", str(tmp_path / "closed")])
    finally:
        os.seteuid(0)
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2 and "cannot write" in line and "Choose another" in line


class TestVerify:
    """``preprocess --verify``, and what a damaged data set is mended by."""

    @pytest.fixture
    def copy(self, run, tmp_path) -> Path:
        return shutil.copytree(run, tmp_path / "run" / "maestro")

    def test_a_whole_one_is_said_to_be(self, copy, capsys):
        assert main(["preprocess", "--verify", "--out", str(copy.parent)]) == 0
        assert "all files match their checksums" in capsys.readouterr().out

    @pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "delete", "stray"])
    def test_every_damage_is_named_and_mended(self, damage, copy, archive, script, run, capsys):
        path = sorted(copy.glob("maestro_log_mel/*/*train*"))[1]
        content, name = path.read_bytes(), path.relative_to(copy).as_posix()
        if damage == "flip":
            half = len(content) // 2
            path.write_bytes(content[:half] + bytes([content[half] ^ 4]) + content[half + 1 :])
        elif damage == "stray":
            path = path.with_name("maestro_log_mel-train.array_record-00007-of-00002")
            path.write_bytes(b"?")
        elif damage == "delete":
            path.unlink()
        else:
            path.write_bytes(content[: len(content) // 2] if damage == "truncate" else b"")
        assert main(["preprocess", "--verify", "--out", str(copy.parent)]) == 1
        said = capsys.readouterr().err
        expected = {
            "flip": "its SHA-256 does not match the manifest",
            "stray": "not in the manifest",
            "delete": "missing",
        }
        assert expected.get(damage, "bytes, expected") in said
        if damage == "flip":
            assert name in said and re.search(r"2026/recording_000\d.wav cannot be read", said)
        path.unlink(missing_ok=True)
        code, printed = finish(script, archive, copy.parent)
        assert code == 0, printed
        assert build.verify(copy) == [] and data_set_bytes(copy) == data_set_bytes(run)

    def test_what_was_never_finished_cannot_be_verified(self, tmp_path, capsys):
        assert main(["preprocess", "--verify", "--out", str(tmp_path)]) == 2
        assert "the data set is incomplete" in capsys.readouterr().err


def flip(path: Path) -> None:
    """Another digit or letter, so that JSON and CSV can still be read."""
    content = bytearray(path.read_bytes())
    places = [at for at, byte in enumerate(content) if chr(byte).isalnum()]
    content[places[len(places) // 2]] ^= 1
    path.write_bytes(content)


SMALL = [
    "maestro_log_mel/2.0.0/metadata.json",
    "maestro_log_mel/2.0.0/features.json",
    "maestro_log_mel/2.0.0/dataset_info.json",
    "recordings.csv",
    "settings.json",
    "records/train-00001-of-00002.json",
    "manifest.json",
]


class TestSmallFiles:
    """What describes the shards is compared with the manifest before it is used."""

    @pytest.fixture
    def copy(self, run, tmp_path, monkeypatch) -> Path:
        monkeypatch.setattr(shards, "SHARD_SECONDS", 25)
        return shutil.copytree(run, tmp_path / "maestro")

    @pytest.mark.parametrize("damage", [flip, Path.unlink, lambda path: path.write_bytes(b"")])
    def test_damage_is_named_when_it_is_opened_and_mended_by_the_same_call(
        self, copy, archive, run, damage
    ):
        for name in SMALL:
            damage(copy / name)
            if not name.startswith("records"):  # they are for resuming
                words = "is damaged|does not match manifest.json|is missing|is incomplete"
                with pytest.raises(InputError, match=words) as error:
                    shards.open_shards(copy, "train", made_by="this")
                assert re.search("[Rr]un (this|preprocess) ", str(error.value))
                assert "elete" not in str(error.value)
            preprocess(archive, copy)
            assert data_set_bytes(copy) == data_set_bytes(run), name
            assert len(shards.open_shards(copy, "train", made_by="this"))

    def test_a_data_set_of_an_earlier_version_opens(self, copy):
        manifest = json.loads((copy / "manifest.json").read_text())
        del manifest[files.SIGNATURE]
        (copy / "manifest.json").write_text(json.dumps(manifest))
        assert len(shards.open_shards(copy, "train", made_by="this"))

    def test_settings_of_another_configuration_are_refused(self, copy, archive):
        with pytest.raises(InputError, match="another configuration .limit_hours: found 0.0"):
            preprocess(archive, copy, max_hours=0.001)


class TestCopy:
    """Shards brought to a faster disk."""

    def test_arrives_whole_and_only_once(self, run, tmp_path):
        build.copy_shards(run, tmp_path / "here")
        assert data_set_bytes(tmp_path / "here") == data_set_bytes(run)
        assert len(shards.open_shards(tmp_path / "here", "train", made_by="it"))
        before = {
            path: path.stat().st_mtime_ns for path in (tmp_path / "here").rglob("*array_record*")
        }
        damaged, *_ = before
        damaged.write_bytes(b"half")
        build.copy_shards(run, tmp_path / "here")
        changed = [path for path, time in before.items() if path.stat().st_mtime_ns != time]
        assert changed == [damaged] and data_set_bytes(tmp_path / "here") == data_set_bytes(run)

    def test_what_is_damaged_or_unfinished_is_not_passed_on(self, run, tmp_path):
        source = shutil.copytree(run, tmp_path / "source")
        path = next(source.rglob("*train*array_record*"))
        content = bytearray(path.read_bytes())
        content[5000] ^= 1
        path.write_bytes(content)
        with pytest.raises(
            RunFailed,
            match="does not match its checksum. Check it with `percepiano preprocess --verify`",
        ):
            build.copy_shards(source, tmp_path / "here")
        assert not shards.is_complete(tmp_path / "here")
        (source / shards.MANIFEST).unlink()
        with pytest.raises(InputError, match="Run notebook 01"):
            build.copy_shards(source, tmp_path / "here")

    @pytest.mark.parametrize(
        "name", ["../escaped", "/tmp/escaped", "a/../../escaped", "a\\..\\escaped", "", "."]
    )
    def test_a_manifest_from_a_stranger_leads_nowhere_else(self, tmp_path, name):
        source = tmp_path / "source"
        source.mkdir()
        (tmp_path / "escaped").write_text("mine")
        known = {"bytes": 4, "sha256": hashlib.sha256(b"mine").hexdigest()}
        (source / shards.MANIFEST).write_text(
            json.dumps({"data_set": "x", "version": "2.0.0", "files": {name: known}})
        )
        with pytest.raises(InputError, match="which is not a valid file of a data set. Do not use"):
            build.copy_shards(source, tmp_path / "a" / "b")
        assert (tmp_path / "escaped").read_text() == "mine" and not (tmp_path / "a").exists()

    def test_no_more_is_copied_than_the_manifest_admits(self, run, tmp_path):
        source = shutil.copytree(run, tmp_path / "source")
        with next(source.rglob("*train*array_record*")).open("ab") as file:
            file.write(bytes(10**6))
        with pytest.raises(RunFailed, match="has the wrong length"):
            build.copy_shards(source, tmp_path / "here")

    def test_no_room_is_said(self, run, small_disk):
        (small_disk / "others").write_bytes(bytes(shutil.disk_usage(small_disk).free - 100_000))
        with pytest.raises(InputError, match="GB free, the files need"):
            build.copy_shards(run, small_disk / "here")


def test_a_record_is_the_same_in_every_process():
    features = maestro.MaestroLogMel.features_of("uint8", 128)
    names = ["composer", "log_mel", "recording", "start_frame", "title", "year"]
    values = dict.fromkeys(names, "x") | {
        "log_mel": np.zeros((3, 128), np.uint8),
        "start_frame": 1,
        "year": 2,
    }
    record = shards.serialise(features, values)
    places = [record.index(name.encode()) for name in names]
    assert places == sorted(places), (
        "protobuf's own order of features changes from process to process"
    )


def test_chunks_lose_no_frame():
    frames = np.arange(10_000)[:, None]
    for size in (0, 256, 1024):
        for length in (1, 255, 256, 511, 512, 2047, 2048, 5000):
            blocks = np.array_split(frames[:length], 1 + length // 190)
            made = list(shards.chunks(blocks, size))
            np.testing.assert_array_equal(
                np.concatenate([chunk for _, chunk in made]), frames[:length]
            )
            assert [start for start, _ in made] == [size * k for k in range(len(made))]
            assert len(made) == shards.chunk_count(length, size)
            assert all(len(chunk) == size for _, chunk in made[:-1])


def test_no_thread_or_process_is_left(archive, tmp_path):
    before = threading.active_count()
    preprocess(archive, tmp_path / "out", max_hours=0.001)
    assert threading.active_count() == before
