"""Checkpoints: what was saved comes back bit for bit; what a disk, a kill or a mount did is
noticed. About 15 s."""

import contextlib
import hashlib
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from failing import other_lock
from safetensors import safe_open

from percepiano_ast.config import FinetuneConfig
from percepiano_ast.errors import InputError, RunFailed
from percepiano_ast.files import cached_arrays, read_signed_json, write_signed_json
from percepiano_ast.training import lock
from percepiano_ast.training.checkpoints import (
    Background,
    Checkpoints,
    Storage,
    check_disk_space,
    join_shards,
    listing,
    open_latest,
)
from percepiano_ast.training.lock import Lock
from percepiano_ast.training.state import TrainState, make_optimizer, new_state, train_step

OPTIMIZER = make_optimizer(FinetuneConfig(4, 1, 1e-2, weight_decay=0.1), 10)


def trained_state(steps: int) -> TrainState:
    """A state whose moments, counters and parameters are all away from zero."""
    state = new_state(
        {"dense": {"kernel": jnp.full((3, 4), 0.3), "bias": jnp.arange(4.0)}}, OPTIMIZER, ema=True
    )
    for step in range(steps):
        state = advanced(state, step)
    return state


def advanced(state: TrainState, shift: float) -> TrainState:
    """One step on a loss whose gradient is a sine of the parameters."""

    def objective(params, batch):
        loss = -sum(jnp.cos(leaf + batch["shift"]).sum() for leaf in jax.tree.leaves(params))
        return loss, {"loss": loss}

    return train_step(state, {"shift": jnp.float32(shift)}, objective, OPTIMIZER, ema_decay=0.5)[0]


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert left.dtype == right.dtype
        assert np.asarray(left).tobytes() == np.asarray(right).tobytes()


def save(directory, step: int, tree=None, description=None, **options):
    """One checkpoint, written and arrived."""
    with Checkpoints(directory) as checkpoints:
        checkpoints.load()
        checkpoints.save(
            step,
            tree or {"state": trained_state(step)},
            description or {"licence": "CC BY"},
            **options,
        )


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """Three saves with ``keep=2``; tests damage copies of it."""
    directory = tmp_path_factory.mktemp("checkpoints") / "run"
    for step in (1, 2, 3):
        save(directory, step, description={"licence": "CC BY", "epoch": step})
    return directory


@pytest.fixture
def saved(template, tmp_path, logged) -> tuple[Checkpoints, list[str], Path]:
    """The last two checkpoints, what is logged, and where they lie."""
    directory = tmp_path / "run"
    shutil.copytree(template, directory)
    return Checkpoints(directory), logged, directory


def file(directory: Path, step: int, kind: str = "safetensors") -> Path:
    (path,) = directory.glob(f"step_{step:08d}.*.{kind}")
    return path


def files(directory: Path) -> list[str]:
    """Steps and endings of everything that is there, without the names' random parts and the
    process."""
    return sorted(f"{int(path.name[5:13])}{path.suffix}" for path in directory.iterdir())


def flip_a_bit(path: Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path):
    path.write_bytes(b"")


def truncate(path: Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


class TestWhole:
    def test_state_optimiser_and_step_come_back_bit_for_bit(self, saved):
        checkpoints, lines, _ = saved
        tree, found = checkpoints.load({"state": trained_state(0)})
        assert found["step"] == 3 and lines == []
        assert_same_bits(tree["state"], trained_state(3))
        # The next step from it is the next step of the run.
        assert_same_bits(advanced(tree["state"], 3), advanced(trained_state(3), 3))

    def test_without_a_template_it_is_a_tree_of_numpy_arrays(self, saved):
        tree, _ = saved[0].load()
        assert {type(leaf) for leaf in jax.tree.leaves(tree)} == {np.ndarray}
        assert_same_bits(tree["state"]["params"], jax.device_get(trained_state(3).params))

    def test_16_bit_numbers_and_flags_too(self, tmp_path):
        tree = {"half": jnp.arange(3, dtype=jnp.bfloat16), "flag": np.array(True), "none": None}
        save(tmp_path, 1, tree)
        found, _ = open_latest(tmp_path, made_by="")
        assert found["none"] is None
        (
            assert_same_bits(found["half"], np.asarray(tree["half"])),
            assert_same_bits(found["flag"], tree["flag"]),
        )

    def test_what_is_saved_is_what_was_there_when_it_was_saved(self, tmp_path):
        """The state goes on, in the same memory, while it is written; so does the history."""
        step = jax.jit(lambda state: advanced(state, 1.0), donate_argnums=0)
        state, rows = jax.tree.map(jnp.array, trained_state(1)), [1]
        wanted = jax.tree.map(lambda leaf: np.array(leaf), state)
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, {"state": state}, {"history": rows})
            rows.append(2)
            for _ in range(50):
                state = step(state)
        tree, description = open_latest(tmp_path, made_by="")
        assert_same_bits(jax.tree.leaves(tree["state"]["params"]), jax.tree.leaves(wanted.params))
        assert description["history"] == [1]

    def test_the_two_newest_stay_and_the_best(self, template, tmp_path):
        assert files(template) == ["2.json", "2.safetensors", "3.json", "3.safetensors"]
        with Checkpoints(tmp_path) as checkpoints:
            for step, score in enumerate((0.9, 0.2, 0.5, float("inf"), 0.3), start=1):
                checkpoints.save(step, {"a": np.ones(3)}, {}, score)
        assert files(tmp_path) == [
            "2.json",
            "2.safetensors",
            "4.json",
            "4.safetensors",
            "5.json",
            "5.safetensors",
        ]
        with Checkpoints(tmp_path) as checkpoints:  # another process knows the best too
            checkpoints.prepare()
            checkpoints.save(6, {"a": np.ones(3)}, {}, 0.4)
        assert files(tmp_path) == [
            "2.json",
            "2.safetensors",
            "5.json",
            "5.safetensors",
            "6.json",
            "6.safetensors",
        ]

    def test_a_checkpoint_describes_itself(self, template):
        description = json.loads(file(template, 3, "json").read_text())
        assert (
            description["licence"] == "CC BY"
            and description["bytes"] == file(template, 3).stat().st_size
        )
        assert description["code_version"] and len(description["dimensions"]) == 19
        assert datetime.now(UTC) - datetime.fromisoformat(description["saved"]) < timedelta(hours=1)
        tree = description["tree"]["state"]
        assert tree["params"]["dense"]["kernel"] == "state.params.dense.kernel"
        with safe_open(file(template, 3), "np") as arrays:
            assert set(jax.tree.leaves(tree)) == set(arrays.keys())

    def test_they_can_be_listed_without_being_read(self, saved):
        _, lines, directory = saved
        file(directory, 2).unlink()
        assert [one["step"] for one in listing(directory)] == [2, 3]
        truncate(file(directory, 3, "json"))
        assert [one["step"] for one in listing(directory)] == [2] and "step_00000003" in lines[0]
        assert len(listing(directory, damaged := [])) == 1 and "step_00000003" in damaged[0]
        assert listing(directory / "none") == []

    def test_one_that_a_training_deletes_meanwhile_is_no_error(self, saved, monkeypatch):
        names = Storage.names

        def names_before(storage):
            found = names(storage)
            file(saved[2], 2, "json").unlink()
            return found

        monkeypatch.setattr(Storage, "names", names_before)
        assert [one["step"] for one in listing(saved[2])] == [3] and saved[1] == []

    def test_what_is_deleted_is_emptied_first(self, saved):
        # Drive's trash keeps what a file held when it was deleted: a second name of the file shows
        # it.
        trash = saved[2].parent / "trash"
        os.link(file(saved[2], 2), trash)
        save(saved[2], 4)
        assert (
            files(saved[2]) == ["3.json", "3.safetensors", "4.json", "4.safetensors"]
            and trash.stat().st_size == 0
        )

    def test_what_others_put_there_stays(self, saved):
        others = [
            "step_00000001.safetensors",
            "step_00000003.safetensors.partial",
            "step_00000001.0123abcd.p0 (1).safetensors",
            "step_00000001.0123abcd.p0.tar",
            "notes.json",
        ]
        for name in others:
            (saved[2] / name).write_text("mine")
        with Checkpoints(saved[2]) as checkpoints:
            checkpoints.prepare()
            checkpoints.save(4, {"a": np.ones(3)}, {})
        Checkpoints(saved[2]).clear()
        assert sorted(path.name for path in saved[2].iterdir()) == sorted(others)
        assert all((saved[2] / name).read_text() == "mine" for name in others)

    def test_weights_from_another_device_can_be_opened(self, tmp_path):
        """Pre-trained on a TPU, fine-tuned on a GPU: here, saved from a device that this process
        does not have."""
        code = (
            "import sys, jax, jax.numpy as jnp; from percepiano_ast.training.checkpoints import"
            " Checkpoints\narray = jax.device_put(jnp.arange(4.0), jax.devices()[1])\nwith"
            " Checkpoints(sys.argv[1]) as checkpoints: checkpoints.save(1, {'a': array}, {})"
        )
        flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], env=os.environ | flags, check=True
        )
        tree, _ = open_latest(tmp_path, made_by="step 2")
        np.testing.assert_array_equal(tree["a"], np.arange(4.0))

    def test_before_the_run_it_says_what_it_will_need(self, tmp_path, logged):
        check_disk_space(tmp_path, 2_000_000_000, "8.00 GB")
        assert (
            "checkpoints of 2.00 GB in " in logged[0]
            and "at most 8.00 GB" in logged[0]
            and "GB free" in logged[0]
        )
        with pytest.raises(InputError, match=r"one checkpoint needs 90000000.00 GB. Free space"):
            check_disk_space(tmp_path, 9 * 10**16, "")


class TestDamaged:
    @pytest.mark.parametrize("kind", ["safetensors", "json"])
    @pytest.mark.parametrize("damage", [flip_a_bit, truncate, empty, Path.unlink])
    def test_the_one_before_is_used_and_the_log_says_so(self, saved, damage, kind):
        checkpoints, lines, directory = saved
        name = file(directory, 3).name.removesuffix(".p0.safetensors")
        damage(file(directory, 3, kind))
        tree, found = checkpoints.load({"state": trained_state(0)})
        assert found["step"] == 2
        assert_same_bits(tree["state"], trained_state(2))
        if (damage, kind) == (Path.unlink, "json"):
            assert lines == []  # without its manifest it was never complete
        else:
            assert len(lines) == 1 and name in lines[0] and "damaged or missing" in lines[0]

    def test_every_bit_of_a_manifest_counts(self, saved):
        checkpoints, _, directory = saved
        path = file(directory, 3, "json")
        content = path.read_bytes()
        for position in range(0, len(content), 37):
            path.write_bytes(
                content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :]
            )
            _, found = checkpoints.load()
            assert found["step"] == 2 or found["epoch"] == 3 and chr(content[position]).isspace()

    @pytest.mark.parametrize("left", ["", '{"step": 3, "sha', "{}", "[1]", "[" * 100_000, "null"])
    def test_so_does_a_manifest_that_is_none(self, saved, left):
        checkpoints, lines, directory = saved
        file(directory, 3, "json").write_text(left)
        assert checkpoints.load()[1]["step"] == 2
        assert len(lines) == 1 and "step_00000003" in lines[0]

    def test_nothing_whole_names_the_way_out(self, saved):
        checkpoints, _, directory = saved
        flip_a_bit(file(directory, 2))
        empty(file(directory, 3, "json"))
        with pytest.raises(
            InputError, match="no usable checkpoint in .*; delete the directory to start over"
        ):
            checkpoints.load()

    def test_the_damaged_one_is_replaced_by_the_next_save(self, saved):
        directory = saved[2]
        truncate(file(directory, 3))
        save(directory, 3)
        assert files(directory) == ["2.json", "2.safetensors", "3.json", "3.safetensors"]
        assert Checkpoints(directory).load()[1]["step"] == 3

    def test_another_configuration_is_refused_with_the_difference(self, saved):
        with pytest.raises(
            InputError,
            match='another configuration .licence: found "CC BY", requested "MIT".*Choose',
        ):
            saved[0].load(settings={"licence": "MIT"})
        assert saved[0].load(settings={"licence": "CC BY"})[1]["step"] == 3

    @pytest.mark.parametrize(
        "like, message",
        [
            ({"a": np.zeros(4, np.float32)}, "a is float32.3. in it, but float32.4. in this run"),
            ({"a": np.zeros(3, np.float64)}, "a is float32.3. in it, but float64.3. in this run"),
            ({"a": np.zeros(3, np.float32), "b": np.zeros(3)}, "b is missing from it"),
            ({}, "a is in it, but not in this run"),
        ],
    )
    def test_a_state_of_another_shape_is_not_stretched(self, tmp_path, logged, like, message):
        save(tmp_path, 1, {"a": np.ones(3, np.float32)})
        with pytest.raises(InputError, match="no usable checkpoint in"):
            Checkpoints(tmp_path).load(like)
        assert re.search(message, logged[0])

    def test_checkpoints_of_an_earlier_version_are_refused(self, tmp_path, logged):
        """Those were Orbax's output in a tar archive."""
        name = "step_00000004.0123abcd"
        part = {"name": f"{name}.p0.tar", "bytes": 4, "sha256": "0", "files": []}
        marker = {"step": 4, "score": None, "bytes": 4, "sha256": "0", "parts": [part]}
        (tmp_path / f"{name}.json").write_text(json.dumps(marker | {"marker": "0"}))
        (tmp_path / f"{name}.p0.tar").write_bytes(b"tar")
        Checkpoints(tmp_path).prepare()
        with pytest.raises(InputError, match="no usable checkpoint in .*; delete the directory"):
            Checkpoints(tmp_path).load()
        assert "it was saved by an earlier version" in logged[0]
        assert len(list(tmp_path.iterdir())) == 2


class TestIncomplete:
    def test_files_of_killed_saves_neither_disturb_nor_stay(self, saved, tmp_path):
        checkpoints, lines, directory = saved
        left = [
            directory / "step_00000004.0123abcd.p0.safetensors.partial",  # killed while copying
            directory / "step_00000004.0123abce.p0.safetensors",  # killed before the manifest
            directory / "step_00000004.0123abce.p1.safetensors",
            directory / "step_00000004.0123abce.p1.json",
            directory / "step_00000004.0123abce.json.partial",
            directory / "step_00000001.0123abcf.p0.safetensors",  # killed between the deletions
        ]
        for path in left:
            path.write_bytes(b"half")
        assert checkpoints.load()[1]["step"] == 3 and lines == []
        checkpoints.prepare()
        assert not any(path.exists() for path in left) and len(files(directory)) == 4

    def test_local_files_of_a_killed_run_go_too(self, tmp_path, monkeypatch):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        killed = Checkpoints(tmp_path / "run")
        killed.save(1, {"a": np.ones(3)}, {})
        killed.finish()
        folder = [path for path in tmp_path.iterdir() if path.name.startswith("percepiano_ast-")]
        assert len(folder) == 1
        Checkpoints(tmp_path / "run").prepare()
        assert not folder[0].exists()

    def test_killed_before_the_first_manifest_is_a_fresh_start(self, saved):
        for manifest in saved[2].glob("*.json"):
            manifest.unlink()
        assert saved[0].load() is None


class TestSignedJson:
    """Small files of a run hold the checksum of their content."""

    def test_every_bit_counts(self, tmp_path):
        value = {"temperature": 1.25, "folds": {10: [1], 2: []}}
        write_signed_json(tmp_path / "x.json", value)
        content = (tmp_path / "x.json").read_bytes()
        found = read_signed_json(content, {"temperature": float})
        assert found == {"temperature": 1.25, "folds": {"10": [1], "2": []}}
        for position, byte in enumerate(content):
            flipped = content[:position] + bytes([byte ^ 4]) + content[position + 1 :]
            with pytest.raises(InputError, match="x.json is damaged .*Train it again"):
                read_signed_json(
                    flipped, {"temperature": float}, name="x.json", advice="Train it again."
                )

    def test_one_of_an_earlier_version_has_no_checksum(self, tmp_path):
        (tmp_path / "x.json").write_text('{"temperature": 1.25}')
        schema = {"temperature": float}
        assert read_signed_json(tmp_path / "x.json", schema, unsigned=True) == {"temperature": 1.25}
        with pytest.raises(InputError, match="checksum differs"):
            read_signed_json(tmp_path / "x.json", schema)


def test_a_damaged_cache_of_arrays_is_computed_again(tmp_path, logged):
    path, calls = tmp_path / "new" / "a.npz", []

    def compute():
        calls.append(1)
        return {"a": np.arange(50.0), "b": np.array("text")}

    whole = cached_arrays(path, "ab", compute)
    content = path.read_bytes()
    assert (
        cached_arrays(path, "ab", compute).keys() == whole.keys() and calls == [1] and logged == []
    )
    for position in range(0, len(content), 13):
        path.write_bytes(
            content[:position] + bytes([content[position] ^ 8]) + content[position + 1 :]
        )
        found = cached_arrays(path, "ab", compute)
        assert found["a"].tobytes() == whole["a"].tobytes() and found["b"] == "text"
    assert len(calls) > 25 and "a.npz is damaged (" in logged[0]
    for damaged in (b"", content[:100], b"\x93NUMPY", pickle.dumps([1])):
        path.write_bytes(damaged)
        assert cached_arrays(path, "ab", compute)["a"].tobytes() == whole["a"].tobytes()


class TestNoCheckpoint:
    @pytest.mark.parametrize("name", ["", "missing"])
    def test_the_message_names_the_step_to_run(self, tmp_path, name):
        with pytest.raises(
            InputError, match=f"no checkpoint in {tmp_path / name}. Run notebook 02 first"
        ):
            open_latest(tmp_path / name, made_by="notebook 02")

    def test_one_of_another_kind_is_refused(self, saved):
        with pytest.raises(InputError, match="no 'pretrain': it is of another kind .*of notebook"):
            open_latest(saved[2], made_by="notebook 02", fields=("licence", "pretrain"))


# --- From a stranger ----------------------------------------------------------------------------


class Boom:
    """Its pickle runs a command."""

    def __reduce__(self):
        return os.system, ("touch boom",)


def forge(directory: Path, content: bytes, **changes) -> None:
    """A checkpoint of step 9 whose file has this content; every checksum fits."""
    directory.mkdir(exist_ok=True)
    name = "step_00000009.00000000"
    (directory / f"{name}.p0.safetensors").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    entry = {"name": f"{name}.p0.safetensors", "bytes": len(content), "sha256": digest}
    manifest = {"step": 9, "score": None, "bytes": len(content), "sha256": "", "files": [entry]}
    sign(directory / f"{name}.json", manifest | {"tree": {"a": "a"}} | changes)


def sign(path: Path, manifest: dict) -> None:
    """Write a manifest whose own checksum fits."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(manifest | {"manifest_sha256": digest}))


def safetensors(header: dict | bytes, data: bytes = b"") -> bytes:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
A = safetensors({"a": ONE}, bytes(8))


def refused(directory: Path, logged: list[str]) -> str:
    """What the log says of the only checkpoint there, which must not be read."""
    logged.clear()
    with pytest.raises(InputError, match="no usable checkpoint in"):
        Checkpoints(directory).load()
    return logged[0]


class TestStrangers:
    def test_what_is_forged_here_can_be_read_otherwise(self, tmp_path):
        forge(tmp_path, A)
        assert Checkpoints(tmp_path).load()[0]["a"].tolist() == [0, 0]

    @pytest.mark.parametrize(
        "name",
        ["../escaped", "a/../../escaped", "{absolute}", "a/./x", "a//x", "@../escaped", "a@1_-2"],
    )
    def test_nothing_is_written_outside(self, tmp_path, logged, name):
        name = name.format(absolute=tmp_path / "escaped")
        forge(tmp_path / "run", safetensors({name: ONE}, bytes(8)))
        assert re.search("missing from it|invalid name", refused(tmp_path / "run", logged))
        forge(tmp_path / "run", safetensors({name: ONE}, bytes(8)), tree={name: name})
        with contextlib.suppress(InputError):
            Checkpoints(tmp_path / "run").load()
        assert not list(tmp_path.rglob("escaped"))

    def test_what_the_manifest_does_not_name_is_refused(self, tmp_path, logged):
        forge(tmp_path, A, tree={})
        assert "the array 'a' is not in its manifest" in refused(tmp_path, logged)

    @pytest.mark.parametrize(
        "tree",
        [{"a": "b"}, {"a": "a", "b": "a"}, {"a": 1}, {"a": True}, {"a": ["a", "b"]}, {"a": None}],
    )
    def test_a_manifest_of_other_arrays_is_refused(self, tmp_path, logged, tree):
        forge(tmp_path, A, tree=tree)
        assert re.search(
            "missing from it|not in its manifest|not describe a valid", refused(tmp_path, logged)
        )

    def test_so_is_one_that_is_deeper_than_python_reads(self, tmp_path, logged):
        forge(tmp_path, A)
        path = tmp_path / "step_00000009.00000000.json"
        deep = '{"a": ' * 900 + '"a"' + "}" * 900
        manifest = json.loads(path.read_text())
        del manifest["manifest_sha256"]
        sign(path, manifest | {"tree": json.loads(deep)})
        with contextlib.suppress(InputError):
            Checkpoints(tmp_path).load()

    def test_a_pickle_is_never_loaded(self, tmp_path, logged, monkeypatch):
        monkeypatch.chdir(tmp_path)
        boom = pickle.dumps(Boom())
        for content in (boom, safetensors(boom), safetensors({"a": ONE}, boom), A + boom):
            forge(tmp_path / "run", content)
            refused(tmp_path / "run", logged)
        (tmp_path / "run" / "step_00000009.00000000.json").write_bytes(boom)
        refused(tmp_path / "run", logged)
        assert not (tmp_path / "boom").exists()

    @pytest.mark.parametrize(
        "change",
        [
            {"shape": [10**12]},
            {"shape": [10**12], "data_offsets": [0, 4 * 10**12]},
            {"shape": [2**62, 2**62]},
            {"shape": [-3, -4]},
            {"shape": [1]},
            {"data_offsets": [4, 12]},
            {"dtype": "O"},
            {"dtype": "V1000000000"},
            {"dtype": [["a", "<f4", [10**9]]]},
        ],
    )
    def test_a_bomb_is_not_inflated(self, tmp_path, logged, change):
        forge(tmp_path, safetensors({"a": ONE | change}, bytes(8)))
        assert "safetensors cannot read it" in refused(tmp_path, logged)

    @pytest.mark.parametrize(
        "name",
        [
            "../step_00000009.00000000.p0.safetensors",
            "/etc/passwd",
            "step_00000008.00000000.p0.safetensors",
            7,
        ],
    )
    def test_a_manifest_names_no_other_files(self, tmp_path, logged, name):
        forge(tmp_path / "run", A, files=[{"name": name, "bytes": 1, "sha256": ""}])
        said = refused(tmp_path / "run", logged)
        assert "its JSON file does not describe a valid checkpoint" in said

    def test_more_bytes_than_the_manifest_admits_are_not_fetched(self, saved):
        _, lines, directory = saved
        with file(directory, 3).open("ab") as archive:
            archive.write(bytes(10_000))
        assert saved[0].load()[1]["step"] == 2
        assert "it is larger than" in lines[0]


# --- Two runs -----------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """A lock that looks often."""
    for name, seconds in (("HEARTBEAT", 0.1), ("STALE", 1.0), ("POLL", 0.05)):
        monkeypatch.setattr(lock, name, seconds)


def locks(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("lock*"))


class TestLock:
    """One run at a time; real trainings are in `test_kills`."""

    OTHER = "process 7 on elsewhere since 2026-11-30 08:15 UTC"

    @pytest.mark.parametrize("age", [0, 7200, -(10**9)])
    def test_that_of_a_machine_that_is_gone_is_taken_over(self, quick, tmp_path, logged, age):
        """Its clock may be wrong."""
        other_lock(tmp_path, age)
        with Lock(tmp_path) as one:
            one.check()
            assert len(locks(tmp_path)) == 1
        assert locks(tmp_path) == []
        waited = [f"  {tmp_path} was in use by {self.OTHER}. Waiting up to 1 s to see whether"]
        assert [line[: len(waited[0])] for line in logged[:-1]] == waited * (age < 3600)
        assert logged[-1] == f"  the run of {self.OTHER} has ended: taking over"

    @pytest.mark.parametrize(
        "content", [b"", b"[", b"{}", b"[" * 9999, b'{"beat": "now", "process": [1]}', b"\xff"]
    )
    def test_a_damaged_one_is_watched(self, quick, tmp_path, logged, content):
        other_lock(tmp_path).write_bytes(content)
        with Lock(tmp_path):
            assert len(locks(tmp_path)) == 1
        assert "was in use by another run. Waiting" in logged[0]

    def test_a_sign_of_life_refuses(self, quick, tmp_path, monkeypatch):
        monkeypatch.setattr(lock, "STALE", 60)
        other_lock(tmp_path, age=90)
        threading.Timer(0.3, other_lock, (tmp_path,)).start()
        with pytest.raises(InputError, match=f"in use by {self.OTHER}. Wait until .* or choose an"):
            Lock(tmp_path).__enter__()
        assert locks(tmp_path) == ["lock.0000000000000000.json"]

    def test_one_that_ends_meanwhile_is_no_obstacle(self, quick, tmp_path, logged, monkeypatch):
        monkeypatch.setattr(lock, "STALE", 60)
        threading.Timer(0.3, other_lock(tmp_path).unlink).start()
        with Lock(tmp_path):
            assert len(logged) == 1

    def test_on_this_machine_the_process_decides_at_once(self, tmp_path, logged):
        child = subprocess.Popen(["sleep", "60"])
        facts = {"process": child.pid, "machine": lock._machine(), "host": "here"}
        started = lock._start_of(child.pid)
        other_lock(tmp_path, 10**6, **facts, started=started)
        with pytest.raises(InputError, match=f"in use by process {child.pid} on here"):
            Lock(tmp_path).__enter__()
        child.kill()
        while lock._start_of(child.pid):  # a zombie, as nobody has asked how it ended
            pass
        with Lock(tmp_path):
            assert len(locks(tmp_path)) == 1
        child.wait()
        other_lock(tmp_path, 0, **facts | {"process": os.getppid()}, started=started)
        with Lock(tmp_path):  # a later process with that number
            assert len(locks(tmp_path)) == 1
        assert [line.split()[-1] for line in logged] == ["over", "over"]

    def test_it_shows_signs_of_life(self, quick, tmp_path, monkeypatch):
        times = iter(range(10**6))
        monkeypatch.setattr(lock, "_now", lambda: f"{next(times):08d}")
        with Lock(tmp_path):
            (path,) = tmp_path.glob("lock*")
            first, deadline = path.read_bytes(), time.monotonic() + 20
            while path.read_bytes() == first:
                assert time.monotonic() < deadline
            assert len(path.read_bytes()) == len(first) and locks(tmp_path) == [path.name]

    def test_taken_over_nothing_is_written_or_deleted(self, template, tmp_path, logged):
        shutil.copytree(template, tmp_path / "run")
        with (
            pytest.raises(RunFailed, match=f"was taken over by {self.OTHER}: this run stops"),
            Lock(tmp_path) as one,
            Checkpoints(tmp_path / "run", check=one.check) as saving,
        ):
            saving.prepare()
            Path(tmp_path, one._name).unlink()
            other_lock(tmp_path)
            before = {path: path.read_bytes() for path in tmp_path.rglob("step*")}
            saving.save(4, {"a": np.ones(3)}, {})
        assert {path: path.read_bytes() for path in tmp_path.rglob("step*")} == before
        assert locks(tmp_path) == ["lock.0000000000000000.json"]

    def test_of_two_that_see_each_other_late_one_stops(self, quick, tmp_path):
        with Lock(tmp_path) as one:
            deadline, age = time.monotonic() + 20, 0
            while not one.lost and time.monotonic() < deadline:
                other_lock(tmp_path, age := age + 1)
                time.sleep(0.05)
            assert self.OTHER in one.lost and not Path(tmp_path, one._name).exists()
        Path(tmp_path, "lock.0000000000000000.json").unlink()
        with Lock(tmp_path) as one:  # the other one's name comes later: it stops
            for age in range(20):
                other_lock(tmp_path, age, name="f" * 16)
                time.sleep(0.05)
            one.check()

    def test_deleted_by_somebody_it_is_written_again(self, tmp_path):
        with Lock(tmp_path / "run") as one:
            shutil.rmtree(tmp_path / "run")
            one.check()
            assert locks(tmp_path / "run") == [one._name]
        with pytest.raises(RunFailed, match="the run has ended"):
            one.check()

    def test_a_place_that_cannot_be_written_is_refused(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match="cannot list .*Choose another output directory"):
            Lock(tmp_path / "file" / "run").__enter__()


def test_what_a_manifest_names_is_not_deleted_as_left_over(tmp_path):
    """That of a run that did not know of the lock."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.prepare()
        for step in (1, 2):
            save(tmp_path, 10 + step)
            checkpoints.save(step, {"a": np.ones(3)}, {})
            checkpoints._background.wait()
        (tmp_path / "step_00000001.0123abcd.p0.safetensors").write_bytes(b"being written")
        for step in (3, 4):
            checkpoints.save(step, {"a": np.ones(3)}, {})
            checkpoints._background.wait()
    assert [one["step"] for one in listing(tmp_path)] == [3, 4, 11, 12]
    assert files(tmp_path).count("1.safetensors") == 1
    assert open_latest(tmp_path, made_by="")[1]["step"] == 12


# --- In the background --------------------------------------------------------------------------


class TestBackground:
    def test_only_the_newest_of_what_waits_is_done(self):
        done, gate, background = [], threading.Event(), Background(pytest.fail)
        background.submit(lambda: gate.wait() and done.append(1))
        while background.seconds == 0:
            pass
        background.submit(lambda: done.append(2))
        background.submit(lambda: done.append(3))
        assert background.busy
        gate.set()
        assert background.finish() and done in ([1, 3], [3]) and not background.busy

    def test_what_failed_is_done_again_at_the_end_unless_replaced(self, monkeypatch):
        monkeypatch.setattr("percepiano_ast.training.checkpoints.FINAL_WAITS", (0, 0))
        asked, errors = [], []
        background = Background(errors.append)

        def fail(name: str, times: int):
            asked.append(name)
            if asked.count(name) <= times:
                raise OSError(name)

        background.submit(lambda: fail("replaced", 9))
        background.wait()
        background.submit(lambda: fail("twice", 2))
        assert background.finish() and asked == ["replaced", "twice", "twice", "twice"]
        assert background.error is None and len(errors) == 3
        background.submit(lambda: fail("always", 9))
        assert not background.finish() and str(background.error) == "always"

    def test_another_error_is_raised_where_it_is_waited_for(self):
        background = Background(pytest.fail)
        background.submit(lambda: 1 / 0)
        for call in (background.wait, background.finish, lambda: background.submit(print)):
            with pytest.raises(ZeroDivisionError):
                call()


# --- Several processes --------------------------------------------------------------------------


class TestShards:
    """Arrays that are spread over processes come together again; see `test_parallel.py` for real
    processes."""

    def test_pieces_are_joined_where_they_belong(self):
        whole = np.arange(24.0).reshape(4, 6)
        arrays = join_shards(
            {
                "a@0_0": whole[:2],
                "a@2_0": whole[2:, :3],
                "a@2_3": whole[2:, 3:],
                "b@": np.float32(7),
                "d": np.ones(2),
            }
        )
        np.testing.assert_array_equal(arrays["a"], whole)
        assert arrays["b"] == 7 and arrays["b"].shape == () and arrays["d"].tolist() == [1, 1]

    @pytest.mark.parametrize(
        "other, message",
        [
            ({"a@0": np.ones(2)}, "a piece of a is missing"),
            ({"a@0": np.ones(2), "a@999999999999": np.ones(1)}, "a piece of a is missing"),
            ({"a@0": np.ones(2), "a@2": np.ones(2, np.int8)}, "do not fit together"),
            ({"a@0": np.ones((2, 2))}, "do not fit together"),
            ({"a@0_0": np.ones((2, 2))}, "do not fit together"),
            ({"a": np.ones(2)}, "do not fit together"),
        ],
    )
    def test_pieces_that_are_not_of_one_array_are_refused(self, other, message):
        with pytest.raises(InputError, match=message):
            join_shards({"a@3": np.ones(2)} | other)
