"""Pre-training steps of AST-base: against PyTorch on a CPU, relative to the matrix peak on an
accelerator."""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import numpy as np

from percepiano_ast.bench.timing import medians
from percepiano_ast.config import (
    PRESETS,
    PRETRAININGS,
    Execution,
    ModelConfig,
    PretrainConfig,
    Statistics,
)
from percepiano_ast.suite import workers
from percepiano_ast.training.loop import matrix_peak, pretrain_flops
from percepiano_ast.training.pretrain import Pretraining

CPU_BATCH = 8
CPU_RUNS = 3  # a round takes half a minute on two cores
ACCELERATOR_BATCHES = (512, 256, 128, 64, 32, 16)  # the largest that fits is used
FORMS = ("ssast", "visible")
STATISTICS = Statistics(-40.0, 20.0, 1, 0.0, 0.0)


def step_function(
    geometry: ModelConfig, config: PretrainConfig, execution: Execution
) -> tuple[Pretraining, Callable[[], None]]:
    """A run on random spectrograms, and a function that takes one step of it and waits for the
    result."""
    run = Pretraining(geometry, config, PRESETS["base"].front_end, STATISTICS, 1000, execution)
    shape = (config.batch_size, geometry.n_frames, geometry.n_mels)
    batch = run.put({"codes": np.random.default_rng(0).integers(0, 255, shape, np.uint8)})
    state = run.init()

    def step() -> None:
        nonlocal state
        state, metrics = run.step(state, batch)
        jax.block_until_ready(metrics)

    return run, step


def model() -> Iterator[dict]:
    """Steps of AST-base in SSAST's published form and in the visible-only form: clips per second on
    this machine's devices.

    On a CPU the peer is the published algorithm in PyTorch (`torch_ssast`), with the same batch and
    threads. On an accelerator the result includes the share of its measured matrix peak (MFU), with
    the largest batch that fits.
    """
    return _against_torch() if jax.default_backend() == "cpu" else _on_accelerator()


def _config(form: str, batch: int) -> PretrainConfig:
    return dataclasses.replace(PRESETS["base"].pretrain, batch_size=batch, **PRETRAININGS[form][0])


def _against_torch() -> Iterator[dict]:
    from percepiano_ast.bench import torch_ssast  # here: only this benchmark needs PyTorch

    geometry = PRESETS["base"].model
    threads = workers()
    peer = torch_ssast.Peer(geometry, _config("ssast", CPU_BATCH), threads)
    runs = [step_function(geometry, _config(form, CPU_BATCH), Execution()) for form in FORMS]
    theirs, *ours = medians(peer.step, *(step for _, step in runs), runs=CPU_RUNS)
    for form, seconds in zip(FORMS, ours):
        line = {
            "name": f"model-{form}-step",
            "value": round(CPU_BATCH / seconds, 3),
            "unit": "clips/s",
        }
        line |= {
            "peer": "SSAST as published, two passes, PyTorch",
            "ratio": round(theirs / seconds, 2),
        }
        yield line | {"batch": CPU_BATCH, "threads": threads}


def _on_accelerator() -> Iterator[dict]:
    geometry = PRESETS["base"].model
    for form in FORMS:
        run, step = _largest(geometry, form)
        device, batch = run.layout.device, run.config.batch_size
        (seconds,) = medians(step)
        speed = batch / seconds
        peak = matrix_peak(run.module.compute.dtype, device)
        line = {"name": f"model-{form}-step", "value": round(speed, 1), "unit": "clips/s"}
        line |= {
            "mfu": round(speed * pretrain_flops(geometry, run.config) / (peak * run.layout.size), 3)
        }
        line |= {
            "peak_tflops": round(peak / 1e12, 1),
            "device": device.device_kind,
            "devices": run.layout.size,
        }
        line |= {
            "batch": batch,
            "tokens": batch * geometry.num_patches,
            "attention": run.module.compute.attention,
        }
        yield line | {
            "peak_memory_gib": round(device.memory_stats()["peak_bytes_in_use"] / 2**30, 2)
        }


def _largest(geometry: ModelConfig, form: str) -> tuple[Pretraining, Callable[[], None]]:
    """The largest batch whose step fits into the device's memory, without remat."""

    def tried(batch: int) -> tuple[Pretraining, Callable[[], None]]:
        run, step = step_function(geometry, _config(form, batch), Execution())
        step()
        return run, step

    *larger, smallest = ACCELERATOR_BATCHES
    for batch in larger:
        try:
            return tried(batch)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
    return tried(smallest)
