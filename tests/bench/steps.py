"""Pre-training steps: against PyTorch on a CPU, relative to the matrix peak on an accelerator."""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import numpy as np

from bench import medians, result
from percepiano_ast.config import (
    PRESETS,
    PRETRAININGS,
    ComputeConfig,
    LevelStats,
    ModelConfig,
    PretrainConfig,
)
from percepiano_ast.pipeline import workers
from percepiano_ast.training.pretrain import Pretraining, matrix_peak, pretrain_flops

CPU_BATCH = 8
CPU_RUNS = 3  # a round takes half a minute on two cores
ACCELERATOR_BATCHES = (512, 256, 128, 64, 32, 16)  # the largest that fits is used
FORMS = ("ssast", "visible")
STATISTICS = LevelStats(-40.0, 20.0, 1, 0.0, 0.0)


def pretrain_step() -> Iterator[dict]:
    """One pre-training step of the demo preset: windows per second on this machine's devices."""
    preset = PRESETS["demo"]
    (seconds,) = medians(_step(preset.model, preset.pretrain, preset.compute)[1])
    yield result("pretrain-step", round(preset.pretrain.batch_size / seconds, 1), "windows/s")


def model() -> Iterator[dict]:
    """Steps of AST-base in SSAST's published form and in the visible-only form: clips per second on
    this machine's devices.

    On a CPU the peer is the published algorithm in PyTorch (`torch_ssast`), with the same batch and
    threads. On an accelerator the result includes the share of its measured matrix peak (MFU), with
    the largest batch that fits.
    """
    geometry = PRESETS["base"].model
    if jax.default_backend() == "cpu":
        from bench import torch_ssast  # here: only this benchmark needs PyTorch

        threads = workers()
        peer = torch_ssast.Peer(geometry, _config("ssast", CPU_BATCH), threads)
        ours = [_step(geometry, _config(form, CPU_BATCH), ComputeConfig())[1] for form in FORMS]
        theirs, *ours = medians(peer.step, *ours, runs=CPU_RUNS)
        for form, seconds in zip(FORMS, ours):
            yield result(
                f"model-{form}-step",
                round(CPU_BATCH / seconds, 3),
                "clips/s",
                peer="SSAST as published, two passes, PyTorch",
                ratio=round(theirs / seconds, 2),
                batch=CPU_BATCH,
                threads=threads,
            )
        return
    for form in FORMS:
        run, step = _largest(geometry, form)
        device, batch, compute = run.layout.device, run.config.batch_size, run.module.compute
        (seconds,) = medians(step)
        peak = matrix_peak(compute.dtype, device)
        used = batch / seconds * pretrain_flops(geometry, run.config)
        yield result(
            f"model-{form}-step",
            round(batch / seconds, 1),
            "clips/s",
            mfu=round(used / (peak * run.layout.size), 3),
            peak_tflops=round(peak / 1e12, 1),
            device=device.device_kind,
            devices=run.layout.size,
            batch=batch,
            tokens=batch * geometry.num_patches,
            attention=compute.attention,
            peak_memory_gib=round(device.memory_stats()["peak_bytes_in_use"] / 2**30, 2),
        )


def _config(form: str, batch: int) -> PretrainConfig:
    return dataclasses.replace(PRESETS["base"].pretrain, batch_size=batch, **PRETRAININGS[form][0])


def _step(
    geometry: ModelConfig, config: PretrainConfig, compute: ComputeConfig
) -> tuple[Pretraining, Callable[[], None]]:
    """A run on random spectrograms, and a function that takes one step of it and waits for the
    result."""
    run = Pretraining(geometry, config, PRESETS["base"].front_end, STATISTICS, 1000, compute)
    shape = (config.batch_size, geometry.n_frames, geometry.n_mels)
    batch = run.put({"codes": np.random.default_rng(0).integers(0, 255, shape, np.uint8)})
    state = run.init()

    def step() -> None:
        nonlocal state
        state, metrics = run.step(state, batch)
        jax.block_until_ready(metrics)

    return run, step


def _largest(geometry: ModelConfig, form: str) -> tuple[Pretraining, Callable[[], None]]:
    """The largest batch whose step fits into the device's memory, without remat."""

    def tried(batch: int) -> tuple[Pretraining, Callable[[], None]]:
        run, step = _step(geometry, _config(form, batch), ComputeConfig())
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
