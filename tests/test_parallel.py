"""One device, eight devices and two processes compute the same; precision and accumulation change only rounding. 60 s.

Devices and processes are real: eight devices of the CPU in a child process, two processes that `jax.distributed` joins.
"""

import contextlib
import dataclasses
import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import (
    FRONT_END,
    MODEL,
    PRETRAIN,
    STATISTICS,
    be_killed,
    bits,
    codes_of,
    compiled_once,
    pretrain_to,
    without_seconds,
)

from percepiano_ast.config import Execution, InputError
from percepiano_ast.data.batches import pretrain_batches
from percepiano_ast.data.shards import ShardSet
from percepiano_ast.training import parallel
from percepiano_ast.training.checkpoints import open_latest
from percepiano_ast.training.pretrain import Pretraining

# As many blocks as devices: parameters split along the blocks would divide evenly, and must not be split so.
DEEP = dataclasses.replace(MODEL, depth=8)
BATCH, STEPS = 16, 4
# Float32 rounding, grown over a few steps of Adam.
CLOSE = {"rtol": 2e-4, "atol": 2e-5}


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory) -> dict:
    """Of child processes that find what is compiled already, and of which none is told to be distributed."""
    with compiled_once(tmp_path_factory.mktemp("compiled")) as variables:
        yield os.environ | variables | {"PYTHONPATH": f"{Path(__file__).parent.parent}{os.pathsep}{Path(__file__).parent}"}


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
        outputs = [child.communicate(timeout=240)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    for child, output in zip(children, outputs):
        assert child.returncode == code, output


def eight(environment: dict, call: str) -> None:
    finish(start(environment, call, XLA_FLAGS="--xla_force_host_platform_device_count=8"))


def pretraining(batch: int = BATCH, *, model=DEEP, devices=None, **execution) -> Pretraining:
    execution = Execution(**execution)
    layout = parallel.Layout.over(devices, execution.shard_params)
    config = dataclasses.replace(PRETRAIN, batch_size=batch)
    return Pretraining(model, config, FRONT_END, STATISTICS, 20, execution, layout)


def few_steps(run: Pretraining, steps: int = STEPS) -> tuple[dict, list[dict]]:
    """State after a few steps, on the host, and the metrics of each."""
    state, metrics = run.init(), []
    for step in range(steps):
        state, one = run.step(state, run.layout.put_batch(codes_of(step, batch=run.config.batch_size)))
        metrics.append(jax.device_get(one))
    return run.layout.to_host(state), metrics


def compared(state, metrics: list[dict]) -> dict[str, np.ndarray]:
    """What has to agree, by name: metrics, and every leaf of parameters and optimiser.

    But for the biases of keys, which softmax cancels: their gradient is nothing but rounding, and Adam makes whole steps
    of it.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path({"params": state.params, "opt_state": state.opt_state})
    found = {f"{name} {step}": one[name] for step, one in enumerate(metrics) for name in one}
    for path, leaf in leaves:
        name, leaf = jax.tree_util.keystr(path), np.asarray(leaf)
        if name.endswith("['qkv']['bias']"):
            leaf = np.delete(leaf.reshape(leaf.shape[0], 3, -1), 1, axis=1)
        found[name] = leaf
    return found


def assert_close(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(one[name], other[name], **CLOSE, err_msg=name)


# --- Eight devices ----------------------------------------------------------------------------------------------------


def steps_on_eight(directory: str) -> None:
    """In a child process: a few steps in several layouts, and where the leaves of a spread state lie."""
    assert jax.device_count() == 8
    for name, execution in {
        "copied": {},
        "spread": {"shard_params": True},
        "accumulated": {"accumulate": 2},
    }.items():
        np.savez(f"{directory}/{name}.npz", **compared(*few_steps(pretraining(**execution))))
    state = pretraining(shard_params=True).init()
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
    @pytest.mark.parametrize("layout", ["copied", "spread", "accumulated"])
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
                assert all(size % 8 for size in shape[1 if "['blocks']" in name else 0 :]), f"{name} could be spread"
            else:
                assert np.prod(shape) == 8 * np.prod(shard), name
        assert kept_whole < 0.01 * sum(np.prod(shape) for _, shape, _ in leaves)
