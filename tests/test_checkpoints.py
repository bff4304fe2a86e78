"""Checkpoints: what was saved comes back bit for bit; what a disk, a kill or a mount did is noticed. About 10 s."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from percepiano_ast.config import FinetuneConfig, InputError
from percepiano_ast.training.checkpoints import Checkpoints, open_latest
from percepiano_ast.training.state import TrainState, make_optimizer, new_state, train_step

OPTIMIZER = make_optimizer(FinetuneConfig(4, 1, 1e-2, False, weight_decay=0.1), 10)


def trained_state(steps: int) -> TrainState:
    """A state whose moments, counters and parameters are all away from zero."""
    state = new_state({"dense": {"kernel": jnp.full((3, 4), 0.3), "bias": jnp.arange(4.0)}}, OPTIMIZER, ema=True)
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


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """Three saves with ``keep=2``; tests damage copies of it."""
    directory = tmp_path_factory.mktemp("checkpoints") / "run"
    for step in (1, 2, 3):
        Checkpoints(directory).save(step, {"state": trained_state(step)}, {"licence": "CC BY", "epoch": step})
    return directory


@pytest.fixture
def saved(template, tmp_path) -> tuple[Checkpoints, list[str]]:
    """The last two checkpoints and what is logged."""
    directory, lines = tmp_path / "run", []
    directory.mkdir()
    for file in template.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return Checkpoints(directory, log=lines.append), lines


def tar(checkpoints: Checkpoints, step: int) -> Path:
    return checkpoints.directory / f"step_{step:08d}.tar"


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.directory.iterdir())


def flip_a_bit(path: Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


class TestWhole:
    def test_state_optimiser_and_step_come_back_bit_for_bit(self, saved):
        checkpoints, lines = saved
        found = checkpoints.latest()
        assert found["step"] == 3 and lines == []
        restored = checkpoints.restore(3, {"state": trained_state(0)})["state"]
        assert_same_bits(restored, trained_state(3))
        # The next step from it is the next step of the run.
        assert_same_bits(advanced(restored, 3), advanced(trained_state(3), 3))

    def test_without_a_template_it_is_a_tree_of_numpy_arrays(self, saved):
        tree = saved[0].restore(3)
        assert {type(leaf) for leaf in jax.tree.leaves(tree)} == {np.ndarray}
        assert_same_bits(tree["state"]["params"], jax.device_get(trained_state(3).params))

    def test_the_two_newest_stay(self, saved):
        stems = ["step_00000002", "step_00000003"]
        assert names(saved[0]) == [f"{stem}.{kind}" for stem in stems for kind in ("json", "tar")]

    def test_a_checkpoint_describes_itself(self, saved):
        description = json.loads(tar(saved[0], 3).with_suffix(".json").read_text())
        assert description["licence"] == "CC BY" and description["bytes"] == tar(saved[0], 3).stat().st_size

    def test_what_is_deleted_is_emptied_first(self, saved):
        # Drive's trash keeps what a file held when it was deleted: a second name of the file shows it.
        checkpoints, _ = saved
        trash = checkpoints.directory.parent / "trash"
        os.link(tar(checkpoints, 2), trash)
        checkpoints.save(4, {"state": trained_state(1)}, {})
        assert not tar(checkpoints, 2).exists() and trash.stat().st_size == 0

    def test_weights_from_another_device_can_be_opened(self, tmp_path):
        """Pre-trained on a TPU, fine-tuned on a GPU: here, saved from a device that this process does not have."""
        code = (
            "import sys, jax, jax.numpy as jnp; from percepiano_ast.training.checkpoints import Checkpoints; "
            "from pathlib import Path; array = jax.device_put(jnp.arange(4.0), jax.devices()[1]); "
            "Checkpoints(Path(sys.argv[1])).save(1, {'a': array}, {})"
        )
        flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=os.environ | flags, check=True)
        tree, _ = open_latest(tmp_path, made_by="step 2")
        np.testing.assert_array_equal(tree["a"], np.arange(4.0))


def empty(path: Path):
    path.write_bytes(b"")


def truncate(path: Path):
    path.write_bytes(path.read_bytes()[:-700])


class TestDamaged:
    @pytest.mark.parametrize("damage", [flip_a_bit, truncate, empty, Path.unlink])
    def test_the_one_before_is_used_and_the_log_says_so(self, saved, damage):
        checkpoints, lines = saved
        damage(tar(checkpoints, 3))
        assert checkpoints.latest()["step"] == 2
        assert len(lines) == 1 and "step_00000003.tar" in lines[0] and "damaged or missing" in lines[0]
        assert_same_bits(checkpoints.restore(2, {"state": trained_state(0)})["state"], trained_state(2))

    @pytest.mark.parametrize("left", ["", '{"step": 3, "sha', "{}"])
    def test_so_does_a_marker_whose_bytes_a_mount_lost(self, saved, left):
        checkpoints, lines = saved
        tar(checkpoints, 3).with_suffix(".json").write_text(left)
        assert checkpoints.latest()["step"] == 2
        assert len(lines) == 1 and "step_00000003" in lines[0]

    def test_nothing_whole_names_the_way_out(self, saved):
        checkpoints, _ = saved
        flip_a_bit(tar(checkpoints, 2))
        empty(tar(checkpoints, 3).with_suffix(".json"))
        with pytest.raises(InputError, match="no checkpoint in .* is whole; delete the directory to start over"):
            checkpoints.latest()

    def test_the_damaged_one_is_replaced_by_the_next_save(self, saved):
        checkpoints, _ = saved
        truncate(tar(checkpoints, 3))
        checkpoints.save(3, {"state": trained_state(3)}, {})
        assert checkpoints.latest()["step"] == 3 and len(names(checkpoints)) == 4


class TestKilled:
    def test_litter_of_killed_saves_neither_disturbs_nor_stays(self, saved):
        checkpoints, lines = saved
        litter = [
            tar(checkpoints, 4).with_suffix(".partial"),  # killed while copying
            tar(checkpoints, 3).with_suffix(".partial"),
            tar(checkpoints, 4),  # killed before the marker
            checkpoints.directory / "step_00000004.json.partial",
            tar(checkpoints, 1),  # killed between the deletions
        ]
        for path in litter:
            path.write_bytes(b"half")
        assert checkpoints.latest()["step"] == 3 and lines == []
        checkpoints.save(5, {"state": trained_state(1)}, {})
        assert checkpoints.latest()["step"] == 5
        assert not any(path.exists() for path in litter) and len(names(checkpoints)) == 4

    def test_killed_before_the_first_marker_is_a_fresh_start(self, saved):
        checkpoints, _ = saved
        for marker in checkpoints.directory.glob("*.json"):
            marker.unlink()
        assert checkpoints.latest() is None


class TestNoCheckpoint:
    @pytest.mark.parametrize("name", ["", "missing"])
    def test_the_message_names_the_step_to_run(self, tmp_path, name):
        with pytest.raises(InputError, match=f"no checkpoint in {tmp_path / name}. Run notebook 02 first"):
            open_latest(tmp_path / name, made_by="notebook 02")


# Saves a checkpoint of 1.6 MB where nothing larger than argv[2] bytes can be written; prints the error.
LIMITED = """
import resource, signal, sys, numpy as np; from pathlib import Path
from percepiano_ast.training.checkpoints import Checkpoints
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    Checkpoints(Path(sys.argv[1])).save(4, {"a": np.random.default_rng(0).integers(0, 2**62, 200_000)}, {})
except OSError as error:
    print(error)
"""


class TestDiskFull:
    @pytest.mark.parametrize("limit", [400_000, 1_610_000], ids=["of the state", "of the archive"])
    def test_a_write_that_fails_says_so_and_older_ones_stay(self, saved, limit):
        checkpoints, lines = saved
        before = names(checkpoints)
        command = [sys.executable, "-c", LIMITED, str(checkpoints.directory), str(limit)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "step_00000004.tar could not be written" in done.stdout and "File too large" in done.stdout
        assert "run again: it continues from the checkpoint before" in done.stdout
        assert names(checkpoints) == before and checkpoints.latest()["step"] == 3 and lines == []

    def test_a_full_directory_is_not_left_full(self, saved, tmp_path):
        checkpoints, _ = saved
        disk = tmp_path / "disk"
        disk.mkdir()
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
        if mounted.returncode:
            pytest.skip("mounting a small disk needs root")
        try:
            small = Checkpoints(disk)
            small.save(1, {"state": trained_state(1)}, {})
            with pytest.raises(OSError, match="No space left on device.*Make room"):
                small.save(2, {"a": np.random.default_rng(0).integers(0, 2**62, 200_000)}, {})
            assert names(small) == ["step_00000001.json", "step_00000001.tar"]
            assert small.latest()["step"] == 1
            assert_same_bits(small.restore(1, {"state": trained_state(0)})["state"], trained_state(1))
        finally:
            subprocess.run(["umount", str(disk)], check=True)
