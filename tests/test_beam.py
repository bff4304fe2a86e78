"""The shards that Apache Beam makes are the shards that this machine makes. Slow: Beam gets an
environment of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from archives import sound, wav, write_archive_of, write_usual_archive
from servers import StorageEmulator

from percepiano_ast.cli import main
from percepiano_ast.data import build, shards

REPOSITORY = Path(__file__).resolve().parent.parent


def test_without_beam_the_command_says_what_to_install(tmp_path, capsys):
    archive = write_archive_of(tmp_path / "one.zip", {"a.wav": wav(sound(12))})
    command = [
        "preprocess",
        "--source",
        str(archive),
        "--out",
        str(tmp_path / "out"),
        "--beam-runner",
        "DirectRunner",
    ]
    assert main(command) == 2
    assert 'pip install "percepiano_ast[beam]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    "out, message",
    [
        ("s3://bucket/run", "cannot write to s3://bucket/run"),
        ("gs://bucket/run", "only --beam-runner"),
    ],
)
def test_without_beam_nothing_is_written_to_a_store(out, message, tmp_path, capsys):
    archive = write_archive_of(tmp_path / "one.zip", {"a.wav": wav(sound(12))})
    assert main(["preprocess", "--source", str(archive), "--out", out]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def beam(tmp_path_factory) -> Path:
    """An interpreter that has Apache Beam, and the newest versions of everything else but gcsfs.

    A newer gcsfs asks for a bucket's kind by encrypted gRPC, which the emulator does not speak, for
    a minute.
    """
    place = tmp_path_factory.mktemp("beam")
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    pip = [place / "bin" / "python", "-m", "pip", "install", "--quiet"]
    environment = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    package = f"{REPOSITORY}[beam]"
    subprocess.run([*pip, "-e", package, "gcsfs==2025.3.0"], check=True, env=environment)
    return place / "bin" / "python"


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    return write_usual_archive(tmp_path_factory.mktemp("source") / "maestro.zip")


def run(python: Path, *arguments) -> subprocess.CompletedProcess:
    command = [python, "-m", "percepiano_ast", "preprocess", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)


def recordings_of(out: Path) -> list[dict]:
    """Facts of all recordings, in order, their checksums among them."""
    paths = sorted((out / "maestro" / "records").glob("*.json"))
    return [facts for path in paths for facts in json.loads(path.read_text())["recordings"]]


@pytest.mark.slow
class TestBeam:
    """``preprocess --beam-runner DirectRunner``."""

    def test_shards_are_equal_in_content(self, beam, archive, tmp_path):
        done = run(
            beam, "--source", archive, "--out", tmp_path / "beam", "--beam-runner", "DirectRunner"
        )
        assert done.returncode == 0, done.stderr
        assert main(["preprocess", "--source", str(archive), "--out", str(tmp_path / "here")]) == 0
        assert recordings_of(tmp_path / "beam") == recordings_of(tmp_path / "here")
        for split in ("train", "validation", "test"):
            mine, theirs = (
                shards.open_shards(tmp_path / name / "maestro", split, made_by="")
                for name in ("here", "beam")
            )
            assert mine.metadata == theirs.metadata
            assert list(mine.raw) == list(theirs.raw)
        assert build.verify(tmp_path / "beam" / "maestro") == []

    def test_bad_recordings_are_listed_and_good_shards_kept(self, beam, tmp_path):
        files = {f"{k}.wav": wav(sound(12, k)) for k in range(3)} | {"bad.wav": b"no sound"}
        archive = write_archive_of(tmp_path / "odd.zip", files)
        options = ["--source", archive, "--out", tmp_path / "out", "--beam-runner", "DirectRunner"]
        done = run(beam, *options)
        assert (
            done.returncode == 1
            and "1 unusable recordings, 0 allowed" in done.stderr
            and "Traceback" not in done.stderr
        )
        done = run(beam, *options, "--max-errors", 1)
        assert done.returncode == 0, done.stderr
        assert [facts["key"] for facts in recordings_of(tmp_path / "out")] == [
            "0.wav",
            "1.wav",
            "2.wav",
        ]

    def test_an_unknown_runner_is_said(self, beam, archive, tmp_path):
        done = run(beam, "--source", archive, "--out", tmp_path, "--beam-runner", "NoRunner")
        assert done.returncode == 2 and "cannot start Beam's runner 'NoRunner'" in done.stderr

    def test_googles_store_gets_them_and_a_second_run_finds_them(self, beam, archive):
        with StorageEmulator() as emulator:
            out = f"gs://{emulator.bucket}/run"
            options = ["--source", archive, "--out", out, "--beam-runner", "DirectRunner"]
            done = run(beam, *options)
            assert done.returncode == 0, done.stderr
            assert f"shards in {out}/maestro are complete" in run(beam, *options).stdout
            done = run(beam, "--verify", "--out", out)
            assert done.returncode == 0 and "all files match their checksums" in done.stdout
