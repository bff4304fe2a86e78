"""Check without a TPU whether a pre-training step fits on one, and estimate the duration of a run:
``libtpu`` compiles for a described topology and reports the memory needed on each device. It reads
the environment when it is loaded, so every compilation runs in a separate process."""

import dataclasses
import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from percepiano_ast.config import AUDIOSET, Preset, lookup
from percepiano_ast.errors import InputError, RunFailed
from percepiano_ast.music.piano_roll import N_KEYS, FrameTargets
from percepiano_ast.training.mesh import DATA, Layout
from percepiano_ast.training.pretrain import Pretraining, pretrain_flops

GIB = 2**30
MUSIC_HOURS = 200  # MAESTRO v3
# share of the published peak that a training step on one to eight chips should reach
UTILISATION = 0.3
_LIMIT_SECONDS = 1800.0


@dataclass(frozen=True)
class TPU:
    """A TPU to compile for."""

    topology: str  # in libtpu
    chips_per_host: tuple[int, int, int]  # along x, y, z; all chips are on one host
    devices: int  # JAX devices: chips, or cores if a chip has two
    memory: int  # bytes per device that a program may use, as reported by libtpu's compiler
    peak: float  # published bfloat16 FLOP/s per device


# Peaks: cloud.google.com/tpu/docs/{v5e,v6e,v3}; a v3 chip's 123e12 FLOP/s are shared by two cores.
TARGETS = {
    "v5e-1": TPU("v5e:1x1", (1, 1, 1), 1, int(15.75 * GIB), 197e12),
    "v6e-1": TPU("v6e:1x1", (1, 1, 1), 1, int(31.25 * GIB), 918e12),
    "v5e-8": TPU("v5e:2x4", (2, 4, 1), 8, int(15.75 * GIB), 197e12),
    "v3-8": TPU("v3:2x2", (2, 2, 1), 8, int(15.48 * GIB), 61.5e12),
}


@dataclass(frozen=True)
class DryRun:
    """A pre-training step that was compiled for a target and fits into its memory."""

    preset: Preset
    target: str  # a name in `TARGETS`
    arguments: int  # bytes per device
    outputs: int  # without those that reuse the memory of arguments
    temporaries: int
    compile_seconds: float

    @property
    def peak(self) -> int:
        """Bytes per device that the step needs."""
        return self.arguments + self.outputs + self.temporaries

    @property
    def memory(self) -> int:
        """Bytes per device that are available."""
        return TARGETS[self.target].memory

    @property
    def clip_flops(self) -> float:
        """See `pretrain_flops`."""
        return pretrain_flops(self.preset.model, self.preset.pretrain)

    @property
    def hours(self) -> float:
        """Estimate: all epochs over `MUSIC_HOURS` of music at `UTILISATION` of the peak."""
        seconds = self.preset.front_end.seconds(self.preset.model.n_frames)  # of a clip
        clips = self.preset.pretrain.epochs * MUSIC_HOURS * 3600 / seconds
        tpu = TARGETS[self.target]
        return clips * self.clip_flops / (UTILISATION * tpu.peak * tpu.devices) / 3600

    def __str__(self) -> str:
        config, devices = self.preset.pretrain, TARGETS[self.target].devices
        accum_steps = self.preset.compute.accum_steps
        cut = f" in {accum_steps} micro-batches" if accum_steps > 1 else ""
        return (
            f"{self.target}: {self.preset.model.name}, batch {config.batch_size}{cut} over"
            f" {devices} device{'s' if devices > 1 else ''} fits: {self.peak / GIB:.2f} of"
            f" {self.memory / GIB:.2f} GiB per device (arguments {self.arguments / GIB:.2f},"
            f" outputs {self.outputs / GIB:.2f}, temporaries {self.temporaries / GIB:.2f}),"
            f" compiled in {self.compile_seconds:.0f} s\n  {self.clip_flops / 1e9:.4g} GFLOP per"
            f" clip: {MUSIC_HOURS} h of music x {config.epochs} epochs take about"
            f" {self.hours:.2g} h at {100 * UTILISATION:.0f} % of the published peak (an estimate"
            " from the peak, not a measurement)"
        )


def dry_run(preset: Preset, target: str) -> DryRun:
    """Compile the pre-training step of ``preset`` for ``target``, one of `TARGETS`.

    Raises:
        InputError: unknown target, no libtpu, an indivisible batch, or one that does not fit; the
            message gives the memory needed and the smallest accumulation that fits, as compiled.
        RunFailed: the compiler failed or took too long.
    """
    tpu = lookup(TARGETS, target, "target")
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            f"compiling for {target} needs libtpu. Install it with: pip install"
            f" 'jax[tpu]=={jax.__version__}'"
        )
    made = _compile(preset, tpu)
    if "refused" in made:
        raise InputError(f"{target}: {made['refused']}")
    if "exceeds" not in made:
        return DryRun(preset, target, **made)
    accum_steps, batch = preset.compute.accum_steps, preset.pretrain.batch_size
    text = (
        f"batch {batch} needs {made['exceeds']} per device on {target}, which has"
        f" {tpu.memory / GIB:.2f} GiB"
    )
    while batch % (tpu.devices * (accum_steps := 2 * accum_steps)) == 0:
        compute = dataclasses.replace(preset.compute, accum_steps=accum_steps)
        smaller = dataclasses.replace(preset, compute=compute)
        made = _compile(smaller, tpu)
        if "exceeds" not in made:
            needed = DryRun(smaller, target, **made).peak / GIB
            raise InputError(
                f"{text}. Choose --accum-steps {accum_steps} (compiled: {needed:.2f} GiB)"
            )
    hint = "a smaller batch or model"
    if not preset.compute.remat:
        hint = "--remat, a smaller batch or a smaller model"
    raise InputError(
        f"{text}, and does not fit with micro-batches of one clip per device either. Choose {hint}"
    )


def _compile(preset: Preset, tpu: TPU) -> dict:
    """Compile in a child process; returns fields of `DryRun`, or ``exceeds`` (memory needed) or
    ``refused`` (reason)."""
    environment = os.environ | {
        "TPU_ACCELERATOR_TYPE": "v5litepod-1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_SKIP_MDS_QUERY": "1",
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    code = f"from {__name__} import compile_described; compile_described()"
    try:
        child = subprocess.run(
            [sys.executable, "-c", code],
            input=pickle.dumps((preset, tpu)),
            cwd=Path(__file__).resolve().parents[2],  # so that the package can be imported
            env=environment,
            capture_output=True,
            timeout=_LIMIT_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise RunFailed(
            f"compilation did not finish within {_LIMIT_SECONDS:.0f} s; choose a smaller model"
        ) from error
    if child.returncode:
        last = child.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise RunFailed(f"compiling for {tpu.topology} failed (exit {child.returncode}): {last}")
    made = json.loads(child.stdout.splitlines()[-1])
    if "arguments" in made:
        needed = made["arguments"] + made["outputs"] + made["temporaries"]
        if needed > tpu.memory:
            return {"exceeds": f"{needed / GIB:.2f} GiB"}
    return made


def compile_described() -> None:
    """Child process of `dry_run`: compile the configuration pickled on standard input, and print
    the result as JSON."""
    from jax.experimental import topologies

    preset, tpu = pickle.load(sys.stdin.buffer)
    model, config = preset.model, preset.pretrain
    bounds = list(tpu.chips_per_host)
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name=tpu.topology, chips_per_host_bounds=bounds
    )
    layout = Layout.over(topology.devices, preset.compute.fsdp)
    # Statistics and number of steps do not affect compilation.
    run = Pretraining(model, config, preset.front_end, AUDIOSET, 1000, preset.compute, layout)

    def array(dtype, *shape) -> Any:
        shape = (config.batch_size, *shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(DATA))

    frames = model.n_frames
    batch: dict = {"codes": array(jnp.uint8, frames, model.n_mels)}
    if config.objective != "ssast":
        types = (jnp.float16, jnp.float16, bool, bool, jnp.float32)
        rolls = [array(dtype, frames, N_KEYS) for dtype in types]
        pedals = [array(jnp.float32, frames)] * 2
        batch["targets"] = FrameTargets(*rolls, *pedals)
        batch["descriptors"] = array(jnp.float32, run.num_descriptors)
    try:
        state = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            run.abstract_state,
            layout.of_state(run.abstract_state),
        )
        start = time.perf_counter()
        compiled = run.step.lower(state, batch).compile()
    except InputError as error:
        made: dict = {"refused": str(error)}
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        made = {"exceeds": _exceeded(str(error))}
    else:
        memory = compiled.memory_analysis()
        assert memory is not None  # the compilers for CPU, GPU and TPU all report it
        made = {
            "arguments": memory.argument_size_in_bytes,
            "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "compile_seconds": round(time.perf_counter() - start, 1),
        }
    print(json.dumps(made))


def _exceeded(message: str) -> str:
    """Memory needed, from the compiler's error message: in all, or for one array."""
    if used := re.search(r"Used ([\d.]+)([MGT]) of", message):
        return f"{float(used[1]) * {'M': 2**-10, 'G': 1, 'T': 2**10}[used[2]]:.2f} GiB"
    if array := re.search(r"Allocation \(size=(\d+)\)", message):
        return f"{int(array[1]) / GIB:.2f} GiB for a single array"
    raise RunFailed(
        f"the compiler ran out of memory and does not report how much it needs: {message[:300]}"
    )
