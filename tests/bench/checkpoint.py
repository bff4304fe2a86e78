"""Checkpoints of AST-base: cost of saving in time and memory, and time to resume."""

import dataclasses
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from bench import medians, result
from percepiano_ast.config import PRESETS, ComputeConfig, LevelStats
from percepiano_ast.errors import InputError, RunFailed
from percepiano_ast.training.checkpoints import Checkpoints, shown, size_of
from percepiano_ast.training.pretrain import Pretraining

CPU_BATCH, ACCELERATOR_BATCH = 1, 32
RUNS = 3  # each of four windows of steps, which take almost half a minute on two cores
EPOCH = 60.0  # costs are shares of an epoch of this many seconds, the shortest expected
ROOM = 8  # largest number of states on the disk: local, saved, replaced, and those of the peers
STATISTICS = LevelStats(-40.0, 20.0, 1, 0.0, 0.0)


def checkpoint() -> Iterator[dict]:
    """Save the state of AST-base with its SSAST heads, AdamW's moments and the moving average,
    during real training steps.

    ``checkpoint-wait``: seconds that training waits in `Checkpoints.save`, which is the total cost
    if an accelerator computes the steps. ``checkpoint-cost``: additional time of a window of steps
    with one save, compared with the same steps without, as a share of an epoch of one minute. The
    window includes writing, copying and reading back, so on a CPU it counts the time that writing
    takes from the steps. The peers write to the same folder, once, and read nothing back: Orbax's
    manager, synchronous, and the same with its default, saving in the background. Windows are
    interleaved. ``checkpoint-resume``: from the start of a process to the end of its first step,
    without opening a data set. ``checkpoint-memory``: peak memory of a process that saves at every
    other step, minus the peak of the steps alone, in states.

    Raises:
        InputError: the temporary directory has too little space.
        RunFailed: a child process failed, for example because the system does not report memory
            usage.
    """
    with tempfile.TemporaryDirectory(prefix="percepiano_ast-bench-") as directory:
        yield from _saving(Path(directory))
        for what, arguments in (("resume", (directory, time.time())), ("memory", (directory,))):
            code = f"import sys; sys.path[:] = {sys.path!r}; from bench import checkpoint"
            code += f"; checkpoint._{what}(*{arguments!r})"
            done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
            if done.returncode:
                raise RunFailed(f"the process that measures {what!r} failed; see its output above")
            yield json.loads(done.stdout)


class _Training:
    """Pre-training steps of the base model on one random batch."""

    def __init__(self):
        preset = PRESETS["base"]
        on_cpu = jax.default_backend() == "cpu"
        batch = CPU_BATCH if on_cpu else ACCELERATOR_BATCH * jax.device_count()
        config = dataclasses.replace(preset.pretrain, batch_size=batch, ema_decay=0.999)
        self.run = Pretraining(
            preset.model, config, preset.front_end, STATISTICS, 1000, ComputeConfig()
        )
        shape = (batch, preset.model.n_frames, preset.model.n_mels)
        codes = np.random.default_rng(0).integers(0, 255, shape, np.uint8)
        self.batch = self.run.put({"codes": codes})
        self.size = size_of(self.run.abstract_state)
        self.state = None

    def steps(self, number: int = 1) -> None:
        """Take ``number`` steps and wait for each."""
        for _ in range(number):
            self.state, metrics = self.run.step(self.state, self.batch)
            jax.block_until_ready(metrics)

    def start(self) -> None:
        """Make the initial state, and take two steps so that everything is compiled."""
        self.state = self.run.init()
        self.steps(2)


class _Saver:
    """A save function, called with a step and a tree, and a function that waits until it is
    written; records save times."""

    def __init__(self, save: Callable[[int, dict], object], finish: Callable[[], object]):
        self.save, self.finish = save, finish
        self.waits: list[float] = []

    def window(self, training: _Training, steps: int) -> None:
        """One save, ``steps`` training steps, and the rest of the writing."""
        start = time.perf_counter()
        self.save(len(self.waits) + 1, {"state": training.state})
        self.waits.append(time.perf_counter() - start)
        training.steps(steps)
        self.finish()

    @property
    def wait(self) -> float:
        """Median seconds of a save, excluding the first."""
        return statistics.median(self.waits[1:])


def _orbax(folder: Path, in_background: bool) -> tuple[ocp.CheckpointManager, _Saver]:
    """Orbax's manager with its defaults, as in most projects."""
    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=in_background)
    manager = ocp.CheckpointManager(folder, options=options)
    return manager, _Saver(
        lambda step, tree: manager.save(step, args=ocp.args.StandardSave(tree)),
        manager.wait_until_finished,
    )


def _saving(directory: Path) -> Iterator[dict]:
    training = _Training()
    if (free := shutil.disk_usage(directory).free) < ROOM * training.size:
        raise InputError(
            f"{directory} has {shown(free)} free, but {shown(ROOM * training.size)} are needed. Set"
            " TMPDIR"
        )
    training.start()
    (waiting, plain), (going_on, behind) = (
        _orbax(directory / name, name == "behind") for name in ("plain", "behind")
    )
    with Checkpoints(directory / "ours", keep=1) as checkpoints, waiting, going_on:
        checkpoints.prepare()
        ours = _Saver(lambda step, tree: checkpoints.save(step, tree, {}), checkpoints.finish)
        # The number of steps during the writing of a checkpoint; the window waits for the rest of
        # the writing at its end.
        start, steps = time.perf_counter(), 0
        checkpoints.save(0, {"state": training.state}, {})
        while checkpoints.busy:
            training.steps()
            steps += 1
        checkpoints.finish()
        written, steps = time.perf_counter() - start, math.ceil(1.3 * steps)  # for slower writes
        without, with_ours, _, with_behind = medians(
            lambda: training.steps(steps),
            lambda: ours.window(training, steps),
            lambda: plain.window(training, 0),
            lambda: behind.window(training, steps),
            runs=RUNS,
        )
    peer = "Orbax's manager, synchronous"
    yield result(
        "checkpoint-wait",
        round(ours.wait, 3),
        "s",
        peer=peer,
        ratio=round(plain.wait / ours.wait, 2),
        percent_of_epoch=round(100 * ours.wait / EPOCH, 2),
        orbax_synchronous=round(plain.wait, 3),
        orbax_in_background=round(behind.wait, 3),
        gigabytes=round(training.size / 1e9, 2),
    )
    cost = with_ours - without
    yield result(
        "checkpoint-cost",
        round(100 * cost / EPOCH, 2),
        "% of an epoch of a minute",
        peer=peer,
        ratio=round(plain.wait / max(cost, ours.wait), 2),  # step times vary by more than the cost
        seconds=round(cost, 2),
        orbax_in_background=round(with_behind - without, 2),
        steps=steps,
        seconds_per_step=round(without / steps, 2),
        written_after=round(written, 1),
    )


# ---------------------------------------------------------------- in a separate process


def _resume(directory: str, started: float) -> None:
    """Resume from the checkpoint as training does; ``started`` is the time when this process was
    started."""
    times = {"imports": time.time()}
    training = _Training()
    found = Checkpoints(Path(directory, "ours")).load({"state": training.run.abstract_state})
    assert found is not None, "the parent process has saved no checkpoint"
    tree, _ = found
    times["load"] = time.time()
    training.state = training.run.layout.put_state(tree["state"])
    del tree, found
    jax.block_until_ready(training.state)
    times["to_device"] = time.time()
    compiled = training.run.step.lower(training.state, training.batch).compile()
    times["compile"] = time.time()
    jax.block_until_ready(compiled(training.state, training.batch))
    times["step"] = end = time.time()
    line = result("checkpoint-resume", round(end - started, 1), "s")
    for name, until in times.items():
        line[name], started = round(until - started, 1), until
    print(json.dumps(line))


def _memory(directory: str) -> None:
    """Steps alone, then with saves so close that they overlap."""
    training = _Training()
    training.start()
    alone = _peak_while(lambda: training.steps(2))
    with Checkpoints(Path(directory, "twice"), keep=1) as checkpoints:
        checkpoints.prepare()

        def saving() -> None:
            for step in (1, 2):
                checkpoints.save(step, {"state": training.state}, {})
                training.steps()
            checkpoints.finish()

        extra = (_peak_while(saving) - alone) / training.size
    print(json.dumps(result("checkpoint-memory", round(extra, 2), "states more")))


def _peak_while(work: Callable[[], object]) -> int:
    """Peak memory of this process during ``work``, in bytes; Linux only."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    work()
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
