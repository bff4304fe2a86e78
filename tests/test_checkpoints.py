"""Checkpoints: what was saved comes back bit for bit; what a disk, a kill or a mount did is
noticed. About 15 s."""

import hashlib
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from percepiano_ast.config import FinetuneConfig
from percepiano_ast.errors import InputError
from percepiano_ast.training import packing, pieces
from percepiano_ast.training.checkpoints import Checkpoints, listing, open_latest, require_room
from percepiano_ast.training.courier import Courier
from percepiano_ast.training.state import TrainState, make_optimizer, new_state, train_step
from percepiano_ast.training.stores import FolderStore

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
    with Checkpoints(directory, log=options.pop("log", print)) as checkpoints:
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
def saved(template, tmp_path) -> tuple[Checkpoints, list[str], Path]:
    """The last two checkpoints, what is logged, and where they lie."""
    directory, lines = tmp_path / "run", []
    shutil.copytree(template, directory)
    return Checkpoints(directory, log=lines.append), lines, directory


def file(directory: Path, step: int, kind: str = "tar") -> Path:
    (path,) = directory.glob(f"step_{step:08d}.*.{kind}")
    return path


def stems(directory: Path) -> list[str]:
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
        assert stems(template) == ["2.json", "2.tar", "3.json", "3.tar"]
        with Checkpoints(tmp_path) as checkpoints:
            for step, score in enumerate((0.9, 0.2, 0.5, float("inf"), 0.3), start=1):
                checkpoints.save(step, {"a": np.ones(3)}, {}, score)
        assert stems(tmp_path) == ["2.json", "2.tar", "4.json", "4.tar", "5.json", "5.tar"]
        with Checkpoints(tmp_path) as checkpoints:  # another process knows the best too
            checkpoints.prepare()
            checkpoints.save(6, {"a": np.ones(3)}, {}, 0.4)
        assert stems(tmp_path) == ["2.json", "2.tar", "5.json", "5.tar", "6.json", "6.tar"]

    def test_a_checkpoint_describes_itself(self, template):
        description = json.loads(file(template, 3, "json").read_text())
        assert (
            description["licence"] == "CC BY"
            and description["bytes"] == file(template, 3).stat().st_size
        )
        assert description["code_version"] and len(description["dimensions"]) == 19
        assert datetime.now(UTC) - datetime.fromisoformat(description["saved"]) < timedelta(hours=1)
        with tarfile.open(file(template, 3)) as archive:
            assert [one["name"] for one in description["parts"][0]["files"]] == archive.getnames()

    def test_they_can_be_listed_without_being_read(self, saved):
        _, lines, directory = saved
        file(directory, 2).unlink()
        assert [one["step"] for one in listing(directory)] == [2, 3]
        truncate(file(directory, 3, "json"))
        assert [one["step"] for one in listing(directory, lines.append)] == [
            2
        ] and "step_00000003" in lines[0]
        assert listing(directory / "none") == []

    def test_one_that_a_training_deletes_meanwhile_is_no_error(self, saved, monkeypatch):
        names = FolderStore.names

        def names_before(store):
            found = names(store)
            file(saved[2], 2, "json").unlink()
            return found

        monkeypatch.setattr(FolderStore, "names", names_before)
        assert [one["step"] for one in listing(saved[2], pytest.fail)] == [3]

    def test_what_is_deleted_is_emptied_first(self, saved):
        # Drive's trash keeps what a file held when it was deleted: a second name of the file shows
        # it.
        trash = saved[2].parent / "trash"
        os.link(file(saved[2], 2), trash)
        save(saved[2], 4)
        assert (
            stems(saved[2]) == ["3.json", "3.tar", "4.json", "4.tar"] and trash.stat().st_size == 0
        )

    def test_what_others_put_there_stays(self, saved):
        others = [
            "step_00000001.tar",
            "step_00000003.tar.partial",
            "step_00000001.0123abcd.p0 (1).tar",
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

    def test_before_the_run_it_says_what_it_will_need(self, tmp_path):
        lines = []
        require_room(tmp_path, 2_000_000_000, "8.00 GB", lines.append)
        assert (
            "checkpoints of 2.00 GB in " in lines[0]
            and "at most 8.00 GB" in lines[0]
            and "GB free" in lines[0]
        )
        with pytest.raises(InputError, match=r"one checkpoint needs 90000000.00 GB. Free space"):
            require_room(tmp_path, 9 * 10**16, "", lines.append)


class TestDamaged:
    @pytest.mark.parametrize("kind", ["tar", "json"])
    @pytest.mark.parametrize("damage", [flip_a_bit, truncate, empty, Path.unlink])
    def test_the_one_before_is_used_and_the_log_says_so(self, saved, damage, kind):
        checkpoints, lines, directory = saved
        name = file(directory, 3).name.removesuffix(".p0.tar")
        damage(file(directory, 3, kind))
        tree, found = checkpoints.load({"state": trained_state(0)})
        assert found["step"] == 2
        assert_same_bits(tree["state"], trained_state(2))
        if (damage, kind) == (Path.unlink, "json"):
            assert lines == []  # without its marker it was never complete
        else:
            assert len(lines) == 1 and name in lines[0] and "damaged or missing" in lines[0]

    def test_every_bit_of_a_marker_counts(self, saved):
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
    def test_so_does_a_marker_that_is_none(self, saved, left):
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
        assert stems(directory) == ["2.json", "2.tar", "3.json", "3.tar"]
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
    def test_a_state_of_another_shape_is_not_stretched(self, tmp_path, like, message):
        save(tmp_path, 1, {"a": np.ones(3, np.float32)})
        lines = []
        with pytest.raises(InputError, match="no usable checkpoint in"):
            Checkpoints(tmp_path, log=lines.append).load(like)
        assert re.search(message, lines[0])


class TestLitter:
    def test_litter_of_killed_saves_neither_disturbs_nor_stays(self, saved, tmp_path):
        checkpoints, lines, directory = saved
        litter = [
            directory / "step_00000004.0123abcd.p0.tar.partial",  # killed while copying
            directory / "step_00000004.0123abce.p0.tar",  # killed before the marker
            directory / "step_00000004.0123abce.p1.tar",
            directory / "step_00000004.0123abce.p1.json",
            directory / "step_00000004.0123abce.json.partial",
            directory / "step_00000001.0123abcf.p0.tar",  # killed between the deletions
        ]
        for path in litter:
            path.write_bytes(b"half")
        assert checkpoints.load()[1]["step"] == 3 and lines == []
        checkpoints.prepare()
        assert not any(path.exists() for path in litter) and len(stems(directory)) == 4

    def test_what_was_packed_for_a_killed_run_goes_too(self, tmp_path, monkeypatch):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        killed = Checkpoints(tmp_path / "run")
        killed.save(1, {"a": np.ones(3)}, {})
        killed.finish()
        folder = [path for path in tmp_path.iterdir() if path.name.startswith("percepiano_ast-")]
        assert len(folder) == 1
        Checkpoints(tmp_path / "run").prepare()
        assert not folder[0].exists()

    def test_killed_before_the_first_marker_is_a_fresh_start(self, saved):
        for marker in saved[2].glob("*.json"):
            marker.unlink()
        assert saved[0].load() is None


class TestNoCheckpoint:
    @pytest.mark.parametrize("name", ["", "missing"])
    def test_the_message_names_the_step_to_run(self, tmp_path, name):
        with pytest.raises(
            InputError, match=f"no checkpoint in {tmp_path / name}. Run notebook 02 first"
        ):
            open_latest(tmp_path / name, made_by="notebook 02")


# --- From a stranger ----------------------------------------------------------------------------


class Boom:
    """Its pickle runs a command."""

    def __reduce__(self):
        return os.system, ("touch boom",)


def forge(
    directory: Path,
    members: list[tuple[tarfile.TarInfo, bytes]],
    names: list[str] | None = None,
    **changes,
) -> None:
    """A checkpoint of step 9 with these members; every checksum fits."""
    directory.mkdir(exist_ok=True)
    stem, files = directory / "step_00000009.00000000", []
    with tarfile.open(f"{stem}.p0.tar", "w") as archive:
        for info, content in members:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
            files.append(
                {
                    "name": info.name,
                    "bytes": len(content),
                    "sha256": hashlib.sha256(content).hexdigest(),
                }
            )
    whole = Path(f"{stem}.p0.tar").read_bytes()
    part = {
        "name": f"{stem.name}.p0.tar",
        "bytes": len(whole),
        "sha256": hashlib.sha256(whole).hexdigest(),
    }
    part["files"] = [
        one | {"name": name} for one, name in zip(files, names or [one["name"] for one in files])
    ]
    sign(
        Path(f"{stem}.json"),
        {"step": 9, "score": None, "bytes": len(whole), "sha256": "", "parts": [part]} | changes,
    )


def sign(path: Path, marker: dict) -> None:
    """Write a marker whose own checksum fits."""
    digest = hashlib.sha256(json.dumps(marker, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(marker | {"marker": digest}))


def members_of(directory: Path, step: int) -> dict[str, bytes]:
    with tarfile.open(file(directory, step)) as archive:
        return {one.name: archive.extractfile(one).read() for one in archive}


def refused(directory: Path) -> str:
    """What the log says of the only checkpoint there, which must not be read."""
    lines = []
    with pytest.raises(InputError, match="no usable checkpoint in"):
        Checkpoints(directory, log=lines.append).load()
    return lines[0]


class TestStrangers:
    @pytest.mark.parametrize(
        "name",
        ["../escaped", "state/../../escaped", "{absolute}", "state/./x", "state//x", "other/x"],
    )
    def test_nothing_is_written_outside(self, tmp_path, name):
        name = name.format(absolute=tmp_path / "escaped")
        forge(tmp_path / "run", [(tarfile.TarInfo(name), b"gotcha")])
        assert "its manifest has an invalid name or size" in refused(tmp_path / "run")
        assert not list(tmp_path.rglob("escaped"))

    @pytest.mark.parametrize(
        "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
    )
    def test_links_and_devices_are_refused(self, tmp_path, kind):
        info = tarfile.TarInfo("state/x")
        info.type, info.linkname = kind, "/etc/passwd"
        forge(tmp_path / "run", [(info, b"")])
        assert "'state/x' is not in its manifest, or not a regular file" in refused(
            tmp_path / "run"
        )

    def test_what_the_manifest_does_not_name_is_refused(self, tmp_path):
        forge(tmp_path / "run", [(tarfile.TarInfo("state/x"), b"1")], names=["state/y"])
        assert "'state/x' is not in its manifest" in refused(tmp_path / "run")

    def test_a_pickle_is_never_loaded(self, template, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        boom = pickle.dumps(Boom())
        for name in members_of(template, 3):
            members = members_of(template, 3) | {
                name: boom,
                "state/checkpoint": boom,
                "state/data.pkl": boom,
            }
            forge(
                tmp_path / "run",
                [(tarfile.TarInfo(one), content) for one, content in members.items()],
            )
            lines = []
            try:
                Checkpoints(tmp_path / "run", log=lines.append).load()
            except InputError:
                assert lines
        (tmp_path / "run" / "step_00000009.00000000.json").write_bytes(boom)
        refused(tmp_path / "run")
        assert not (tmp_path / "boom").exists()

    @pytest.mark.parametrize(
        "change, message",
        [
            (
                {"shape": [10**12], "chunks": [10**12]},
                "has shape .10+., which does not match the size of its files",
            ),
            (
                {"shape": [10**6, 10**6], "chunks": [3, 4]},
                "which does not match the size of its files",
            ),
            (
                {"compressor": {"id": "zstd", "level": 1}},
                "is compressed; checkpoints hold uncompressed arrays only",
            ),
            ({"compressor": {"id": "blosc"}}, "is compressed"),
            ({"filters": [{"id": "gzip"}]}, "is compressed"),
            ({"dtype": "|O"}, "has an invalid type"),
            ({"dtype": "|V1000000000"}, "has an invalid type"),
            ({"dtype": [["a", "<f4", [10**9]]]}, "its array metadata are invalid"),
            ({"shape": [-3, -4]}, "has an invalid shape"),
        ],
    )
    def test_a_bomb_is_not_inflated(self, template, tmp_path, change, message):
        members = members_of(template, 3)
        (name,) = [name for name in members if name.endswith("state.params.dense.kernel/.zarray")]
        members[name] = json.dumps(json.loads(members[name]) | change).encode()
        forge(
            tmp_path / "run", [(tarfile.TarInfo(one), content) for one, content in members.items()]
        )
        assert re.search(message, refused(tmp_path / "run"))

    def test_nor_is_a_name_followed_to_another_folder(self, template, tmp_path):
        members = members_of(template, 3)
        members["state/_METADATA"] = members["state/_METADATA"].replace(
            b'"key": "kernel"', b'"key": "../../kernel"'
        )
        forge(
            tmp_path / "run", [(tarfile.TarInfo(one), content) for one, content in members.items()]
        )
        assert "an array with an invalid name" in refused(tmp_path / "run")

    @pytest.mark.parametrize("mode", ["w:gz", "w:xz"])
    def test_a_compressed_archive_is_none(self, tmp_path, mode):
        archive = tmp_path / "bomb.tar"
        with tarfile.open(archive, mode) as target:
            info = tarfile.TarInfo("state/x")
            info.size = 10**7
            target.addfile(info, io.BytesIO(bytes(10**7)))
        with pytest.raises(InputError, match="incomplete or invalid tar archive"):
            packing.unpack(
                archive, [{"name": "state/x", "bytes": 10**7, "sha256": ""}], tmp_path / "to"
            )

    @pytest.mark.parametrize(
        "name",
        ["../step_00000009.00000000.p0.tar", "/etc/passwd", "step_00000008.00000000.p0.tar", 7],
    )
    def test_a_marker_names_no_other_files(self, tmp_path, name):
        part = {"name": name, "bytes": 1, "sha256": "", "files": []}
        forge(tmp_path / "run", [(tarfile.TarInfo("state/x"), b"1")], parts=[part])
        assert "its JSON file does not describe a valid checkpoint" in refused(tmp_path / "run")

    def test_more_bytes_than_the_marker_admits_are_not_fetched(self, saved):
        _, lines, directory = saved
        with file(directory, 3).open("ab") as archive:
            archive.write(bytes(10_000))
        assert saved[0].load()[1]["step"] == 2
        assert "it is larger than" in lines[0]


# --- On the way ---------------------------------------------------------------------------------


def test_what_was_packed_while_the_one_before_is_cleared_away_is_delivered_once():
    """The thread that clears away the first must not go on with a second that another thread has in
    hand."""

    class Slow:
        def __init__(self, pack: float, deliver: float, discard: float):
            self.packed, self.delivered, self.seconds = False, 0, (pack, deliver, discard)

        def pack(self):
            time.sleep(self.seconds[0])
            self.packed = True

        def deliver(self):
            self.delivered += 1
            time.sleep(self.seconds[1])

        def discard(self):
            time.sleep(self.seconds[2])

    courier, first, second = Courier(pytest.fail), Slow(0, 0.3, 0.4), Slow(0.4, 0.5, 0)
    courier.send(first)
    time.sleep(0.05)
    courier.send(second)  # is packed when the first has arrived and is not yet cleared away
    time.sleep(0.6)
    assert courier.insist() and (first.delivered, second.delivered) == (1, 1)


# --- Several processes --------------------------------------------------------------------------


class TestShares:
    """Arrays that are spread over processes come together again; see `test_parallel.py` for real
    processes."""

    def test_pieces_are_joined_where_they_belong(self):
        whole = np.arange(24.0).reshape(4, 6)
        shares = [
            {"a": {"at_0_0": whole[:2]}, "b": [{"at": np.float32(7)}], "c": None, "d": np.ones(2)},
            {
                "a": {"at_2_0": whole[2:, :3], "at_2_3": whole[2:, 3:]},
                "b": [{}],
                "c": None,
                "d": {},
            },
        ]
        tree = pieces.join(shares)
        np.testing.assert_array_equal(tree["a"], whole)
        assert tree["b"] == [7] and tree["c"] is None and tree["d"].tolist() == [1, 1]

    @pytest.mark.parametrize(
        "lost, message",
        [
            ({"a": {"at_0": np.ones(2)}}, "a piece of an array is missing"),
            (
                {"a": {"at_0": np.ones(2), "at_999999999999": np.ones(1)}},
                "a piece of an array is missing",
            ),
            ({"a": {"at_0": np.ones(2), "at_2": np.ones(2, np.int8)}}, "do not fit together"),
            ({"a": {"at_0": np.ones((2, 2))}}, "do not fit together"),
            ({"b": {"at_0": np.ones(2)}}, "belong to different states"),
            ({"a": [np.ones(2)]}, "belong to different states"),
        ],
    )
    def test_pieces_that_are_not_of_one_array_are_refused(self, lost, message):
        with pytest.raises(InputError, match=message):
            pieces.join([{"a": {"at_3": np.ones(2)}}, lost])
