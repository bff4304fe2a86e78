"""Storage locations of the notebooks: Drive (simulated), folders, a bucket (emulated); and the
status table.

``google.colab`` cannot be installed off Colab: the tests use a fake module, and a folder instead of
the mount.
"""

import os
import re
import shutil
import sys
import types
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from servers import StorageEmulator

from percepiano_ast import colab, notebook, pipeline
from percepiano_ast.cli import main
from percepiano_ast.config import PRESETS
from percepiano_ast.data import build
from percepiano_ast.errors import InputError, RunFailed
from percepiano_ast.files import read_signed_json, write_signed_json
from percepiano_ast.training.checkpoints import Checkpoints, Storage, listing

BUCKET = "gs://bucket/mine"
RED = "\033[31m"


class FakeColab:
    """``google.colab``: its Drive appears as a folder when it is mounted and is gone when it is
    not.

    Attributes:
        calls: what was asked of it.
        refusal: raised by the next call.
        chosen: files that are uploaded, name -> content.
    """

    def __init__(self, drive: Path):
        self.drive, self.calls, self.refusal, self.chosen = drive, [], None, {}
        self._aside = drive.with_name("cloud")
        (self._aside / "MyDrive").mkdir(parents=True)

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if self.refusal:
            raise self.refusal

    def mount(self, mountpoint: str) -> None:
        self._note("mount")
        assert Path(mountpoint) == self.drive
        self._aside.rename(self.drive)

    def flush_and_unmount(self) -> None:
        self._note("flush")
        self.drive.rename(self._aside)

    def authenticate_user(self) -> None:
        self._note("sign in")

    def upload(self) -> dict[str, bytes]:
        self._note("upload")
        return self.chosen

    def eval_js(self, code: str) -> str:
        self._note("microphone")
        assert "getUserMedia" in code
        return "data:audio/webm;base64,c291bmQ="


@pytest.fixture
def at_colab(tmp_path, monkeypatch) -> FakeColab:
    """A runtime of Colab whose ``/content`` is a temporary folder."""
    fake = FakeColab(tmp_path / "content" / "drive")
    module = types.ModuleType("google.colab")
    module.drive = module.auth = module.files = module.output = fake
    monkeypatch.setitem(sys.modules, "google.colab", module)
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    monkeypatch.setattr(colab, "DRIVE", fake.drive)
    monkeypatch.setattr(colab, "RUNTIME", tmp_path / "content" / "percepiano_ast")
    monkeypatch.setattr(colab, "SHARDS", tmp_path / "content" / "shards")
    return fake


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """A machine that is no runtime of Colab, and its working folder."""
    monkeypatch.delenv("COLAB_RELEASE_TAG", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def bucket():
    with StorageEmulator() as emulator:
        yield emulator


def make_shards(run) -> Path:
    """Something with a manifest at the place of the run's shards."""
    for name, content in {
        "maestro_log_mel/2.0.0/one.array_record": b"one" * 999,
        "recordings.csv": b"title\n",
    }.items():
        path = run.maestro / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    build.write_manifest(run.maestro, "maestro_log_mel")
    return run.maestro


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


class TestDrive:
    def test_is_mounted_once_and_used(self, at_colab, logged):
        runs = [colab.open_run("demo", "Google Drive") for _ in range(2)]
        assert at_colab.calls == ["mount"]
        assert (
            runs[0] == runs[1]
            and runs[0].root == at_colab.drive / "MyDrive" / "percepiano_ast" / "demo"
        )
        assert not runs[0].store and not any(RED in line for line in logged)
        assert not list(runs[0].root.iterdir())  # the trial of writing leaves nothing

    def test_is_mounted_for_a_folder_of_it_too(self, at_colab):
        place = at_colab.drive / "MyDrive" / "elsewhere"
        assert colab.open_run("demo", str(place)).root == place and at_colab.calls == ["mount"]

    def test_refused_permission_is_said_with_the_other_choices(self, at_colab):
        at_colab.refusal = ValueError("mount failed: access was not granted")
        with pytest.raises(
            InputError, match="access was not granted.*Run the cell again.*this runtime only.*gs://"
        ):
            colab.open_run("demo", "Google Drive")

    def test_a_mount_that_takes_nothing_is_said(self, at_colab):
        at_colab.mount(str(at_colab.drive))
        (at_colab.drive / "MyDrive" / "percepiano_ast").write_text("in the way of every folder")
        with pytest.raises(
            InputError,
            match=(
                "is not writable .*Drive is mounted: check at drive.google.com that it is not full"
            ),
        ):
            colab.open_run("demo", "Google Drive")

    def test_shards_are_copied_to_the_fast_disk(self, at_colab):
        run = colab.open_run("demo", "Google Drive")
        there = make_shards(run)
        fast = colab.download_shards(run)
        assert fast.maestro == colab.SHARDS / "demo" and contents(fast.maestro) == contents(there)

    def test_flush_uploads_and_mounts_again(self, at_colab, logged):
        run = colab.open_run("demo", "Google Drive")
        (run.root / "kept").touch()
        colab.flush(run)
        assert at_colab.calls == ["mount", "flush", "mount"] and (run.root / "kept").exists()
        assert (
            "uploading pending files to Google Drive" in logged[1]
            and "drive.google.com" in logged[-1]
        )

    def test_a_flush_that_fails_ends_nothing(self, at_colab, logged):
        run = colab.open_run("demo", "Google Drive")
        at_colab.refusal = ValueError("timed out")
        colab.flush(run)
        assert run.root.is_dir()
        assert [
            line
            for line in logged
            if RED in line and "timed out" in line and "drive.google.com" in line
        ]


class TestElsewhereInColab:
    @pytest.mark.parametrize("save_to", ["this runtime only", "{tmp}/folder"])
    def test_a_red_line_says_that_nothing_will_be_kept(self, save_to, at_colab, tmp_path, logged):
        run = colab.open_run("mini", save_to.format(tmp=tmp_path))
        (warning,) = [line for line in logged if RED in line]
        assert "NOTHING WILL BE KEPT" in warning
        assert str(run.root) in warning and "Google Drive" in warning and "gs://" in warning
        assert "\n" not in warning and warning.endswith("\033[0m")
        colab.flush(run)
        assert not at_colab.calls and len(logged) == 2

    def test_the_default_opens_no_dialog_and_the_demo_needs_no_red_line(self, at_colab, logged):
        run = colab.open_run("demo")
        assert run.root == colab.RUNTIME / "demo" and not at_colab.calls
        assert logged[-1] == f"{run.root} is deleted with this runtime"

    def test_a_bucket_is_signed_in_to_and_needs_no_red_line(self, at_colab, bucket, logged):
        run = colab.open_run("demo", BUCKET + "/")
        assert at_colab.calls == ["sign in"] and (run.root, run.store) == (
            colab.RUNTIME / "demo",
            BUCKET,
        )
        assert BUCKET in logged[-1] and not any(RED in line for line in logged)

    def test_a_bucket_without_permission_is_said(self, at_colab, bucket):
        at_colab.refusal = RuntimeError("popup was closed")
        with pytest.raises(InputError, match="popup was closed"):
            colab.open_run("demo", BUCKET)


class TestOffColab:
    def test_the_choices_of_the_form_mean_a_folder(self, elsewhere, logged):
        assert colab.open_run("demo", "Google Drive").root == Path("runs/demo")
        assert "Google Drive is available on Colab only" in logged[0] and "runs/demo" in logged[0]
        assert colab.open_run("demo", "this runtime only").root == Path("runs/demo")
        assert len(logged) == 3 and not any(RED in line for line in logged)

    def test_a_folder_is_used_as_given(self, elsewhere, logged):
        run = colab.open_run("demo", "my/folder")
        assert run.root == Path("my/folder") and run.root.is_dir() and len(logged) == 1
        make_shards(run)
        assert colab.download_shards(run) == run
        colab.upload_shards(run)
        colab.flush(run)
        assert len(logged) == 1

    @pytest.mark.parametrize(
        "save_to, message",
        [
            ("", "SAVE_TO is empty: choose"),
            ("s3://bucket/run", "s3://bucket/run: give a folder, or gs://"),
            ("gs://", "gs://: give a folder, or gs://BUCKET/PREFIX"),
            ("a file", "'a file' is a file: enter a folder"),
            ("a file/below", "a file/below is not writable .*Choose another SAVE_TO"),
            ("/content/drive/MyDrive/x", "available on Colab only"),
        ],
    )
    def test_what_cannot_be_used_is_refused(self, save_to, message, elsewhere):
        Path("a file").touch()
        with pytest.raises(InputError, match=message):
            colab.open_run("demo", save_to)

    def test_a_bucket_that_is_not_there_is_refused(self, elsewhere, bucket):
        with pytest.raises(
            InputError, match="gs://nobodys/run is not writable.*Check that the bucket exists"
        ):
            colab.open_run("demo", "gs://nobodys/run")


class TestDemo:
    """Each Colab notebook has its own runtime: with ``this runtime only``, outputs of the notebooks
    before are missing."""

    STEPS = (
        "preprocess_maestro",
        "pretrain",
        "preprocess_percepiano",
        "finetune",
        "predict_baselines",
    )

    @pytest.fixture
    def steps(self, monkeypatch) -> list[tuple]:
        """Calls of the steps, which write nothing."""
        calls = []
        for name in self.STEPS:
            monkeypatch.setattr(
                pipeline,
                name,
                lambda run, *given, name=name, **options: calls.append((name, *given)),
            )
        return calls

    @pytest.mark.parametrize(
        ("needs", "number"), [("shards", 1), ("encoder", 2), ("predictions", 6)]
    )
    def test_missing_outputs_of_earlier_notebooks_are_made(
        self, needs, number, steps, elsewhere, logged
    ):
        colab.prepare_demo(pipeline.Run(PRESETS["demo"], elsewhere), needs)
        wanted = [
            ("preprocess_maestro",),
            ("pretrain",),
            ("preprocess_percepiano",),
            ("finetune", "ssast"),
            ("finetune", "scratch"),
            ("predict_baselines",),
        ]
        assert steps == wanted[:number] and len(logged) == min(number, 3)

    def test_existing_outputs_and_other_presets_are_left_alone(self, steps, run):
        for needs in ("shards", "encoder", "predictions"):
            colab.prepare_demo(run, needs)
            colab.prepare_demo(pipeline.Run(PRESETS["mini"], run.root / "empty"), needs)
            colab.prepare_demo(
                pipeline.Run(PRESETS["demo"], run.root / "empty", store=BUCKET), needs
            )
        assert not steps


class TestBucket:
    def test_brings_back_the_shards_that_were_put_there(self, elsewhere, bucket, logged):
        run = colab.open_run("demo", f"{BUCKET}/shards")
        with pytest.raises(InputError, match="run notebook 01 with the same SAVE_TO"):
            colab.download_shards(run)
        before = contents(make_shards(run))
        colab.upload_shards(run)
        colab.upload_shards(run)
        assert logged[-1].startswith("shards already in gs://")
        shutil.rmtree(run.root)  # a new runtime
        assert colab.download_shards(run) == run
        assert contents(run.maestro) == before
        (run.maestro / "recordings.csv").write_text("cut")
        colab.download_shards(run)
        assert contents(run.maestro) == before and "1/1 files" in logged[-1]

    def test_shards_that_are_not_what_was_written_go_nowhere(self, elsewhere, bucket):
        run = colab.open_run("demo", f"{BUCKET}/damaged")
        (make_shards(run) / "recordings.csv").write_text("other")
        with pytest.raises(RunFailed, match="recordings.csv does not match its checksum"):
            colab.upload_shards(run)
        with pytest.raises(InputError, match="run notebook 01"):
            colab.download_shards(run)

    def test_a_file_damaged_there_is_not_taken(self, elsewhere, bucket):
        run = colab.open_run("demo", f"{BUCKET}/flipped")
        make_shards(run)
        colab.upload_shards(run)
        Storage(f"{BUCKET}/flipped/maestro").write("recordings.csv", b"Title\n")
        shutil.rmtree(run.maestro)
        with pytest.raises(
            RunFailed, match="recordings.csv does not match its checksum. Run notebook 01 again"
        ):
            colab.download_shards(run)


def table_of(run) -> dict[str, list[dict]]:
    rows: dict[str, list[dict]] = {}
    for row in notebook.status(run).to_dict("records"):
        rows.setdefault(row["item"], []).append(row)
    return rows


def save_epochs(place: Path, *epochs: int) -> None:
    """Checkpoints as a training leaves them, three steps an epoch; `test_notebooks` looks at those
    of real trainings."""
    with Checkpoints(place) as checkpoints:
        for epoch in epochs:
            history = [{"epoch": number + 1, "loss": 0.5} for number in range(epoch)]
            checkpoints.save(
                3 * epoch, {"weights": np.zeros(999)}, {"epoch": epoch, "history": history}
            )


@pytest.fixture
def run(tmp_path) -> pipeline.Run:
    """A run with shards, a pre-training, a finished fold and predictions."""
    run = pipeline.Run(PRESETS["demo"], tmp_path / "run")
    make_shards(run)
    save_epochs(run.pretrain / "checkpoints", 2, 3)
    save_epochs(run.finetune("ast-test-ssast") / "fold_0" / "model", 3)
    run.predictions("ast-test-ssast").write_text("clip\n")
    return run


class TestStatus:
    def test_says_what_is_where_and_how_far(self, run):
        rows = table_of(run)
        pretraining = rows["pre-training ssast"]
        # the newest first
        assert [(row["step"], row["epoch"]) for row in pretraining] == [(9, 3), (6, 2)]
        assert {row["location"] for row in pretraining} == {f"{run.pretrain}/checkpoints"}
        (model,) = rows["ast-test-ssast, fold 0"]
        assert model["epoch"] == 3 and model["location"].endswith("fold_0/model")
        (shards,) = rows["shards for pre-training"]
        assert shards["MB"] == 0.0 and shards["location"] == str(run.maestro)
        assert {row["integrity"] for row in [*pretraining, model]} == {"intact (manifest)"}
        assert shards["integrity"] == "intact (manifest)"
        assert rows["predictions_ast-test-ssast.csv"][0]["age"] == "under a minute"

    def test_a_notebook_shows_places_whole(self, run):
        with pd.option_context("display.max_colwidth", 50):  # of pandas, and what it is afterwards
            colab.open_run("demo", str(run.root))
            assert (
                f"<td>{run.kept(run.pretrain)}/checkpoints</td>"
                in notebook.status(run)._repr_html_()
            )

    def test_ages_are_in_words(self, run):
        then = (datetime.now(UTC) - timedelta(hours=2, minutes=50)).timestamp()
        os.utime(run.maestro / "manifest.json", (then, then))
        assert table_of(run)["shards for pre-training"][0]["age"] == "2 hours"

    def test_names_what_is_damaged(self, run):
        newest = max((run.pretrain / "checkpoints").glob("*.safetensors"))
        os.truncate(newest, 10)
        min((run.pretrain / "checkpoints").glob("step_*.json")).write_text("{}")
        (run.maestro / "recordings.csv").unlink()
        rows = table_of(run)
        cut, damaged = rows["pre-training ssast"]
        assert (
            cut["step"] == 9
            and cut["integrity"].startswith("damaged: ")
            and newest.name in cut["integrity"]
        )
        assert (
            damaged["integrity"].startswith("damaged: ") and "step_00000006" in damaged["integrity"]
        )
        assert re.match(
            "damaged: .*recordings.csv: missing", rows["shards for pre-training"][0]["integrity"]
        )

    def test_tells_unfinished_shards_and_folds(self, run):
        (run.maestro / "manifest.json").unlink()
        fold = run.finetune("ast-test-ssast") / "fold_1"
        shutil.copytree(run.pretrain / "checkpoints", fold / "checkpoints")
        rows = table_of(run)
        assert rows["shards for pre-training"][0]["integrity"] == "incomplete: no manifest yet"
        assert [row["step"] for row in rows["ast-test-ssast, fold 1, in training"]] == [9, 6]

    def test_command_prints_it_and_refuses_an_empty_place(self, run, tmp_path, capsys):
        assert main(["status", "--out", str(run.root)]) == 0
        printed = capsys.readouterr().out
        assert (
            "pre-training ssast" in printed
            and f"{run.pretrain}/checkpoints" in printed
            and "under a minute" in printed
        )
        assert main(["status", "--out", str(tmp_path / "nothing")]) == 2
        assert "no run in" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "changes, age",
        [
            ({"saved": "2099-01-01T00:00:00+00:00"}, "in the future"),
            ({"saved": "9999-12-31T23:59:59-23:00"}, "unknown"),
            ({"saved": None}, "unknown"),
            ({"saved": [1]}, "unknown"),
            ({"saved": "soon"}, "unknown"),
            ({"saved": ...}, "unknown"),
            ({"epoch": ...}, "under a minute"),
            ({"epoch": ["a\nb"], "history": 7, "score": "good"}, ""),
            ({"step": -1}, ""),
            ({"step": ...}, ""),
            ({"files": None}, ""),
            ({"files": [{}]}, ""),
        ],
    )
    def test_a_manifest_with_other_fields_is_a_row(self, run, capsys, changes, age):
        path = max((run.pretrain / "checkpoints").glob("step_*.json"))
        made = read_signed_json(path) | changes
        write_signed_json(path, {name: value for name, value in made.items() if value is not ...})
        assert main(["status", "--out", str(run.root)]) == 0
        printed = capsys.readouterr().out
        rows = table_of(run)["pre-training ssast"]
        assert len(rows) == 2 and printed.count("pre-training ssast") == 2
        if age:
            assert rows[0]["age"] == age and age in printed and rows[0]["step"] == 9
        else:
            assert rows[1]["integrity"].startswith("damaged: ") and rows[0]["step"] == 6

    @pytest.mark.parametrize("content", [b"", b"[" * 9999, b"\xff", b"7" * 5000, b"[1]", b"{}"])
    def test_any_damage_is_a_row(self, run, content):
        max((run.pretrain / "checkpoints").glob("step_*.json")).write_bytes(content)
        (run.maestro / "manifest.json").write_bytes(content)
        rows = table_of(run)
        assert [row["step"] for row in rows["pre-training ssast"]] == [6, ""]
        for row in rows["pre-training ssast"][1], rows["shards for pre-training"][0]:
            assert row["integrity"].startswith("damaged: ") and "\n" not in row["integrity"]

    def test_reads_a_bucket(self, run, bucket, logged):
        """What was trained there is shown on a machine that has nothing of it."""
        here = pipeline.Run(run.preset, run.root.with_name("empty"), store=f"{BUCKET}/status")
        save_epochs(here.kept(here.pretrain / "checkpoints"), 2, 3)
        save_epochs(here.kept(here.finetune("ast-test-ssast") / "fold_0" / "model"), 3)
        rows = table_of(here)
        assert [row["step"] for row in rows["pre-training ssast"]] == [9, 6]
        assert (
            rows["ast-test-ssast, fold 0"][0]["location"]
            == f"{BUCKET}/status/finetune/ast-test-ssast/fold_0/model"
        )
        assert {row["integrity"] for part in rows.values() for row in part} == {"intact (manifest)"}
        place = here.kept(here.pretrain / "checkpoints")
        Storage(place).remove(listing(place)[0]["files"][0]["name"])
        assert [row["integrity"][:6] for row in table_of(here)["pre-training ssast"]] == [
            "intact",
            "damage",
        ]
        copied = pipeline.Run(run.preset, run.root, store=f"{BUCKET}/status")
        colab.upload_shards(copied)
        both = table_of(copied)["shards for pre-training"]
        assert [row["location"] for row in both] == [str(run.maestro), f"{BUCKET}/status/maestro"]

    def test_curves_of_another_machine_come_from_its_checkpoints(self, run):
        save_epochs(run.finetune("ast-test-ssast") / "fold_1" / "checkpoints", 1)
        curves = notebook.finetune_history(run)
        assert curves.to_dict("list") == {
            "epoch": [1, 2, 3],
            "ast-test-ssast loss": [0.5, 0.5, 0.5],
        }


class TestRecordings:
    """What notebook 05 rates."""

    def test_a_path_is_taken_as_it_is_and_examples_are_two_ways_to_play(self, tmp_path):
        assert colab.receive("mine/a.wav", tmp_path) == Path("mine/a.wav")
        paths = [colab.receive(name, tmp_path) for name in ("example", "second example")]
        assert (
            all(path.is_file() for path in paths) and paths[0].read_bytes() != paths[1].read_bytes()
        )
        again = colab.receive("example", tmp_path / "again")
        assert again.read_bytes() == paths[0].read_bytes()

    def test_uploads_and_the_microphone_are_colabs(self, at_colab, tmp_path):
        at_colab.chosen = {"folder/mine.wav": b"RIFF"}
        path = colab.receive("upload", tmp_path)
        assert path == tmp_path / "mine.wav" and path.read_bytes() == b"RIFF"
        assert colab.receive("record", tmp_path).read_bytes() == b"sound"
        assert at_colab.calls == ["upload", "microphone"]

    def test_nothing_chosen_and_nothing_heard_are_said(self, at_colab, tmp_path):
        with pytest.raises(InputError, match="no file was chosen"):
            colab.receive("upload", tmp_path)
        at_colab.refusal = RuntimeError("NotAllowedError")
        with pytest.raises(InputError, match="NotAllowedError.*allow it in the browser"):
            colab.receive("record", tmp_path)

    def test_elsewhere_they_are_refused(self, elsewhere, tmp_path):
        with pytest.raises(InputError, match="'upload' works on Colab only: enter the path"):
            colab.receive("upload", tmp_path)
