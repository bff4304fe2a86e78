"""One device, eight devices and two processes compute the same; precision and accumulation change
only rounding. 100 s.

Devices and processes are real: eight devices of the CPU in a child process, two processes that
`jax.distributed` joins.
"""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import (
    FRONT_END,
    MODEL,
    PRETRAIN,
    STATISTICS,
    be_killed_after,
    bits,
    codes_of,
    compiled_once,
    pretrain_to,
    shard_set,
    without_seconds,
)

from percepiano_ast.config import ComputeConfig
from percepiano_ast.data.batches import pretrain_batches
from percepiano_ast.data.shards import ShardSet
from percepiano_ast.errors import InputError
from percepiano_ast.training import mesh
from percepiano_ast.training.checkpoints import open_latest
from percepiano_ast.training.pretrain import Pretraining

# As many blocks as devices: parameters split along the blocks would divide evenly, and must not be
# split so.
DEEP = dataclasses.replace(MODEL, depth=8)
BATCH, STEPS = 16, 4
# Float32 rounding, grown over a few steps of Adam.
CLOSE = {"rtol": 2e-4, "atol": 2e-5}


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory) -> dict:
    """Of child processes that find what is compiled already, and of which none is told to be
    distributed."""
    with compiled_once(tmp_path_factory.getbasetemp() / "compiled") as variables:
        here = Path(__file__).resolve().parent
        yield os.environ | variables | {"PYTHONPATH": f"{here.parent}{os.pathsep}{here}"}


def start(environment: dict, call: str, **variables: str) -> subprocess.Popen:
    """A child process that calls a function of this file."""
    return subprocess.Popen(
        [sys.executable, "-c", f"import test_parallel; test_parallel.{call}"],
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*children: subprocess.Popen, code: int = 0) -> None:
    """Wait until all have ended, every one with ``code``."""
    try:
        outputs = [child.communicate(timeout=120)[0] for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    for child, output in zip(children, outputs):
        assert child.returncode == code, output


def eight(environment: dict, call: str) -> None:
    finish(start(environment, call, XLA_FLAGS="--xla_force_host_platform_device_count=8"))


def pretraining(batch: int = BATCH, *, model=DEEP, devices=None, **compute) -> Pretraining:
    compute = ComputeConfig(**compute)
    layout = mesh.Layout.over(devices, compute.fsdp)
    config = dataclasses.replace(PRETRAIN, batch_size=batch)
    return Pretraining(model, config, FRONT_END, STATISTICS, 20, compute, layout)


def few_steps(run: Pretraining, steps: int = STEPS) -> tuple[dict, list[dict]]:
    """State after a few steps, on the host, and the metrics of each."""
    state, metrics = run.init(), []
    for step in range(steps):
        state, one = run.step(
            state, run.put({"codes": codes_of(step, batch=run.config.batch_size)})
        )
        metrics.append(jax.device_get(one))
    return jax.device_get(state), metrics


def leaves_of(tree) -> dict[str, np.ndarray]:
    """Leaves by name, without the biases of keys.

    Softmax cancels those: their gradient is nothing but rounding, and Adam makes whole steps of it.
    """
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name, leaf = jax.tree_util.keystr(path), np.asarray(leaf)
        if name.endswith("['qkv']['bias']"):
            leaf = np.delete(leaf.reshape(leaf.shape[0], 3, -1), 1, axis=1)
        found[name] = leaf
    return found


def compared(state, metrics: list[dict]) -> dict[str, np.ndarray]:
    """What has to agree, by name: metrics, parameters and optimiser."""
    found = {f"{name} {step}": one[name] for step, one in enumerate(metrics) for name in one}
    return found | leaves_of({"params": state.params, "opt_state": state.opt_state})


def assert_close(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(one[name], other[name], **CLOSE, err_msg=name)


# --- Eight devices ------------------------------------------------------------------------------


def steps_on_eight(directory: str) -> None:
    """In a child process: a few steps in several layouts, and where the leaves of a spread state
    lie."""
    assert jax.device_count() == 8
    for name, compute in {"copied": {}, "spread": {"fsdp": True, "accum_steps": 2}}.items():
        run = pretraining(**compute)
        np.savez(f"{directory}/{name}.npz", **compared(*few_steps(run)))
    state = run.init()  # of the spread one
    rows = [
        (jax.tree_util.keystr(path), leaf.shape, leaf.addressable_shards[0].data.shape)
        for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
    ]
    np.save(f"{directory}/leaves.npy", np.array(rows, object))


@pytest.fixture(scope="module")
def one_device() -> dict:
    return compared(*few_steps(pretraining()))


@pytest.fixture(scope="module")
def on_eight(environment, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("eight")
    eight(environment, f"steps_on_eight({str(directory)!r})")
    return directory


class TestEightDevices:
    @pytest.mark.slow
    @pytest.mark.parametrize("layout", ["copied", "spread"])
    def test_they_compute_what_one_does(self, one_device, on_eight, layout):
        assert_close(dict(np.load(on_eight / f"{layout}.npz")), one_device)

    def test_a_spread_state_lies_in_eighths_and_blocks_stay_whole(self, on_eight):
        leaves = np.load(on_eight / "leaves.npy", allow_pickle=True)
        kept_whole = 0
        for name, shape, shard in leaves:
            if "['blocks']" in name:
                assert shard[0] == shape[0] == 8, f"{name} is split along its blocks"
            if np.prod(shard) == np.prod(shape):
                kept_whole += np.prod(shape)
                assert all(size % 8 for size in shape[1 if "['blocks']" in name else 0 :]), (
                    f"{name} could be spread"
                )
            else:
                assert np.prod(shape) == 8 * np.prod(shard), name
        assert kept_whole < 0.01 * sum(np.prod(shape) for _, shape, _ in leaves)


# --- Runs that move from one device to eight, and to two processes ------------------------------

# Slow, so that rounding does not grow over 36 steps of Adam.
RUN = dataclasses.replace(PRETRAIN, batch_size=8, learning_rate=2e-3)
EPOCH = 12  # steps


def shards() -> ShardSet:
    """Three recordings of stripes, 32 windows each."""
    return shard_set(
        {f"recording {k}": codes_of(k, 33 * MODEL.n_frames, 1)[0] for k in range(3)}, 100
    )


def run_to(
    directory: str | Path, stop_at: int | None = None, spread: bool = False, accum_steps: int = 1
) -> list[dict]:
    """Pre-train on this process's rows of all batches; it is killed when it asks for those of step
    ``stop_at``.

    ``spread``: parameters are spread over the devices. ``accum_steps``: so many batches of 8 make
    one.
    """
    process, batch = (jax.process_index(), jax.process_count()), 8 * accum_steps
    made = pretrain_batches(
        shards(), n_frames=MODEL.n_frames, batch_size=batch, seed=0, process=process
    )
    steps = EPOCH // accum_steps
    assert made.steps_per_epoch == steps

    def stream(first: int):
        for step, batch in enumerate(made.from_step(first), first):
            if step == stop_at:
                be_killed_after(directory, stop_at // steps * steps)
            yield batch

    # One kind of attention wherever it runs: one device alone would go head by head, and rounding
    # grows over 36 steps.
    compute = ComputeConfig(attention="xla", fsdp=spread, accum_steps=accum_steps)
    config = dataclasses.replace(RUN, batch_size=batch)
    return pretrain_to(
        directory, config, batches=stream, validation=made.one_epoch, steps=steps, compute=compute
    )


def in_one_of_two(directory: str, stop_at: int | None = None) -> None:
    """In each of two child processes: what the command line does."""
    mesh.initialize(distributed=True)
    assert jax.process_count() == 2 and jax.device_count() == 2 and jax.local_device_count() == 1
    run_to(directory, stop_at, spread=True)


def two(environment: dict, calls: list[str]) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    # With XLA's optimisations: without them a step of two processes is a little off that of one.
    common = {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "False",
    }
    return [
        start(environment, call, **common, JAX_PROCESS_ID=str(number))
        for number, call in enumerate(calls)
    ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[Path, list[dict]]:
    """The run on one device, in one process."""
    directory = tmp_path_factory.mktemp("one")
    return directory, run_to(directory)


def assert_same_run(directory: Path, uninterrupted: tuple[Path, list[dict]]) -> None:
    """Histories and last states agree but for rounding, and the history on disk is the
    checkpoint's."""
    (tree, found), (wanted_tree, wanted) = (
        open_latest(one / "checkpoints", made_by="") for one in (directory, uninterrupted[0])
    )
    assert found["step"] == wanted["step"] == 3 * EPOCH
    for row, other in zip(
        without_seconds(found["history"]), without_seconds(uninterrupted[1]), strict=True
    ):
        # Rounding reaches the gradient's norm most, and turns a guess or two of 2,400 that are
        # nearly a tie.
        near = {
            name: pytest.approx(value, rel=5e-3, abs=1e-3 * ("accuracy" in name))
            for name, value in other.items()
        }
        assert row == near
    assert len((directory / "history.csv").read_text().splitlines()) == 1 + 3
    one, other = (leaves_of(whole["state"]["params"]) for whole in (tree, wanted_tree))
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=1e-3, err_msg=name)


class TestMovingRuns:
    @pytest.mark.slow
    def test_resumed_on_eight_devices_equals_uninterrupted_bit_for_bit(self, environment, tmp_path):
        """Parameters and optimiser spread over the devices, and micro-batches."""
        whole, cut, options = tmp_path / "whole", tmp_path / "cut", "spread=True, accum_steps=2"
        eight(environment, f"run_to({str(whole)!r}, {options})")
        killed = f"run_to({str(cut)!r}, {EPOCH // 2 + 4}, {options})"
        finish(
            start(environment, killed, XLA_FLAGS="--xla_force_host_platform_device_count=8"),
            code=-signal.SIGKILL,
        )
        assert open_latest(cut / "checkpoints", made_by="")[1]["epoch"] == 1
        eight(environment, f"run_to({str(cut)!r}, {options})")
        (tree, found), (wanted_tree, wanted) = (
            open_latest(one / "checkpoints", made_by="") for one in (cut, whole)
        )
        assert bits(tree) == bits(wanted_tree) and found["step"] == 3 * EPOCH // 2
        assert without_seconds(found["history"]) == without_seconds(wanted["history"])

    @pytest.mark.slow
    def test_from_one_device_to_eight_and_back(self, environment, uninterrupted, tmp_path):
        for stop_at, variables in (
            (EPOCH + 1, ""),
            (2 * EPOCH + 1, "--xla_force_host_platform_device_count=8"),
        ):
            killed = start(
                environment, f"run_to({str(tmp_path)!r}, {stop_at})", XLA_FLAGS=variables
            )
            finish(killed, code=-signal.SIGKILL)
        run_to(tmp_path)
        assert_same_run(tmp_path, uninterrupted)

    @pytest.mark.slow
    def test_two_processes_are_one_run_and_each_keeps_its_share(
        self, environment, uninterrupted, tmp_path
    ):
        children = two(environment, 2 * [f"in_one_of_two({str(tmp_path)!r}, {EPOCH + 1})"])
        try:
            children[0].wait(timeout=120)
        finally:  # the other may wait for the one that is gone
            for child in children:
                child.kill()
                child.communicate()
        _, found = open_latest(tmp_path / "checkpoints", made_by="")
        assert found["epoch"] == 1
        # The state is spread: half of it is in either file, and neither file is all.
        assert [file["name"].split(".", 2)[2] for file in found["files"]] == [
            "p0.safetensors",
            "p1.safetensors",
        ]
        assert max(file["bytes"] for file in found["files"]) < 0.7 * found["bytes"]
        finish(*two(environment, 2 * [f"in_one_of_two({str(tmp_path)!r})"]))
        assert_same_run(tmp_path, uninterrupted)
        left = [
            path.name
            for path in (tmp_path / "checkpoints").iterdir()
            if ".p" in path.name and path.suffix == ".json"
        ]
        assert left == []

    @pytest.mark.slow
    def test_from_two_processes_to_one(self, environment, uninterrupted, tmp_path):
        children = two(environment, 2 * [f"in_one_of_two({str(tmp_path)!r}, {2 * EPOCH + 1})"])
        try:
            children[0].wait(timeout=120)
        finally:
            for child in children:
                child.kill()
                child.communicate()
        run_to(tmp_path)
        assert_same_run(tmp_path, uninterrupted)


# --- Description of the processes -----------------------------------------------------------------

BY_HAND = {"JAX_COORDINATOR_ADDRESS": "node0:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "0"}


@pytest.fixture
def only(monkeypatch):
    """Set the variables that describe processes to these, and unset all others."""
    for name in list(os.environ):
        if name.startswith(("JAX_COORD", "JAX_NUM_PROC", "JAX_PROCESS", "SLURM_", "OMPI_", "TPU_")):
            monkeypatch.delenv(name)

    def put(variables: dict) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    put({"TPU_SKIP_MDS_QUERY": "1"})  # as JAX does without a TPU
    return put


def describe_incompletely() -> None:
    """In a child process, which has not used any device yet."""
    wanted = r"--distributed: .*\. Set JAX_COORDINATOR_ADDRESS .* in every process"
    for left_out in BY_HAND:
        os.environ.update({name: BY_HAND[name] for name in BY_HAND if name != left_out})
        os.environ.pop(left_out, None)
        with pytest.raises(InputError, match=wanted):
            mesh.initialize(distributed=True)


class TestDistributed:
    def test_an_incomplete_description_is_refused(self, only):
        only({})
        here = Path(__file__).resolve().parent
        path = f"{here.parent}{os.pathsep}{here}"
        finish(start({**os.environ, "PYTHONPATH": path}, "describe_incompletely()"))

    def test_no_number_is_refused(self, only):
        only(BY_HAND | {"JAX_NUM_PROCESSES": "four"})
        with pytest.raises(InputError, match="JAX_NUM_PROCESSES='four' is not a number"):
            mesh.initialize(distributed=True)

    @pytest.mark.parametrize(
        "name", ["JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"]
    )
    def test_several_processes_without_the_option_are_refused(self, only, name):
        only({name: "4"})
        with pytest.raises(InputError, match=f"{name}=4, .* Use pretrain --distributed"):
            mesh.initialize()

    @pytest.mark.parametrize(
        "variables",
        [
            {},
            {"JAX_NUM_PROCESSES": "1"},
            {"SLURM_STEP_NUM_TASKS": "1"},
            # sbatch and salloc without srun: one process in an allocation for several
            {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
        ],
    )
    def test_one_process_waits_for_no_other(self, only, variables):
        only(variables)
        mesh.initialize()
        mesh.wait_for_all("nobody")
        assert not jax.distributed.is_initialized() and mesh.is_lead()


# --- Micro-batches and precision ----------------------------------------------------------------


class TestAccumulation:
    @pytest.mark.slow
    def test_an_effective_batch_of_512_is_the_same_in_parts(self):
        whole, parts = (
            compared(*few_steps(pretraining(512, model=MODEL, accum_steps=n), 2)) for n in (1, 8)
        )
        assert_close(parts, whole)

    @pytest.mark.parametrize("batch, accum_steps", [(6, 4), (4, 0), (2, 4)])
    def test_a_batch_that_cannot_be_divided_is_refused(self, batch, accum_steps):
        parts = f"1 devices x {accum_steps} micro-batches"
        message = f"a batch of {batch} is not divisible by {parts}; choose"
        with pytest.raises(InputError, match=message):
            _ = pretraining(batch, accum_steps=accum_steps).step


class TestPrecision:
    def test_float16_learns_and_skips_what_overflows(self):
        run = pretraining(4, model=MODEL, precision="float16")
        state = run.init()
        scale = state.loss_scale["scale"]
        state, metrics = run.step(
            state.replace(loss_scale=state.loss_scale | {"scale": 2.0**15 * scale}),
            {"codes": codes_of(0)},
        )
        assert metrics["skipped"] == 1 and np.isfinite(metrics["loss"])
        untouched = run.init()
        assert bits((state.params, state.opt_state)) == bits(
            (untouched.params, untouched.opt_state)
        )
        assert state.step == 1 and state.healthy and state.loss_scale["scale"] == 2.0**14 * scale

        losses, skipped = [], []
        for step in range(1, 60):
            state, metrics = run.step(state, {"codes": codes_of(step)})
            losses.append(float(metrics["loss"]))
            skipped.append(int(metrics["skipped"]))
        # Skipped until the scale fits, and never again.
        assert 0 < sum(skipped) < 30 and skipped == sorted(skipped, reverse=True)
        assert (
            state.healthy
            and state.step == 60
            and state.loss_scale["scale"] == 2.0 ** (14 - sum(skipped)) * scale
        )
        assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])

    @pytest.mark.slow
    def test_bfloat16_is_near_float32(self):
        (_, exact), (_, near) = (
            few_steps(pretraining(4, model=MODEL, precision=p)) for p in ("float32", "bfloat16")
        )
        for one, other in zip(near, exact):
            assert (
                one["loss"] == pytest.approx(other["loss"], rel=0.02)
                and one["loss"] != other["loss"]
            )
