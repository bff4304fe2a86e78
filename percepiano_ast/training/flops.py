"""Model FLOPs of a training step, and a device's matrix-product peak, for the model FLOPs
utilisation (MFU)."""

import time

import jax
import jax.numpy as jnp

from percepiano_ast.config import ModelConfig, PretrainConfig
from percepiano_ast.models import transcription
from percepiano_ast.models.ast import PREFIX_TOKENS
from percepiano_ast.music.piano_roll import N_KEYS

# Sides of the square matrices for measuring the peak: large enough to saturate the device, small
# enough to be quick.
_PEAK_SIDE = {"cpu": 1024, "gpu": 8192, "tpu": 8192}
_PEAK_RUNS = 5


def block_flops(width: int, mlp_ratio: int, depth: int, tokens: int) -> float:
    """Forward FLOPs of ``depth`` transformer blocks for one clip: weight products and attention; 2
    per multiply-add."""
    weights = (4 + 2 * mlp_ratio) * width**2
    return depth * tokens * (2 * weights + 4 * tokens * width)


def pretrain_flops(model: ModelConfig, config: PretrainConfig) -> float:
    """FLOPs of one training clip, forward and backward (3 x forward), without the recomputation of
    remat."""
    parts = {
        "ssast": (_masked_flops,),
        "transcription": (_heard_flops,),
        "joint": (_masked_flops, _heard_flops),
    }
    return 3.0 * sum(part(model, config) for part in parts[config.objective])


def _heard_flops(model: ModelConfig, config: PretrainConfig) -> float:
    """Forward FLOPs of transcribing one window; the descriptor head is negligible."""
    patches, steps = model.num_patches, transcription.steps_of(model) * model.grid[1]
    forward: float = 2 * patches * model.patch_dim * model.width
    forward += block_flops(model.width, model.mlp_ratio, model.depth, PREFIX_TOKENS + patches)
    outputs = len(transcription.ROLLS) * N_KEYS + len(transcription.PEDALS)
    return forward + 2 * steps * transcription.HIDDEN * (model.grid[0] * model.width + outputs)


def _masked_flops(model: ModelConfig, config: PretrainConfig) -> float:
    """Forward FLOPs of predicting the masked patches of one window."""
    masked, patches = config.num_masked(model), model.num_patches
    seen = patches - masked if config.decoder_depth else patches
    forward: float = 2 * seen * model.patch_dim * model.width
    forward += block_flops(model.width, model.mlp_ratio, model.depth, PREFIX_TOKENS + seen)
    width = model.width
    if config.decoder_depth:
        width //= 2
        forward += 2 * (PREFIX_TOKENS + seen) * model.width * width
        forward += block_flops(
            width, model.mlp_ratio, config.decoder_depth, PREFIX_TOKENS + patches
        )
    forward += 2 * 2 * masked * width * (width + model.patch_dim)  # two heads
    return forward + 2 * masked**2 * model.patch_dim  # InfoNCE


def matrix_peak(dtype: jnp.dtype, device: jax.Device) -> float:
    """Measured FLOP/s of ``device`` in one large matrix product of ``dtype``, the best of
    `_PEAK_RUNS` runs."""
    side = _PEAK_SIDE.get(device.platform, _PEAK_SIDE["cpu"])
    with jax.default_device(device):
        matrix = jnp.ones((side, side), dtype)
        multiply = jax.jit(lambda x: x @ x).lower(matrix).compile()
        multiply(matrix).block_until_ready()
        best = float("inf")
        for _ in range(_PEAK_RUNS):
            start = time.perf_counter()
            multiply(matrix).block_until_ready()
            best = min(best, time.perf_counter() - start)
    return 2.0 * side**3 / best
