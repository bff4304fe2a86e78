"""The Audio Spectrogram Transformer (AST): encoder and supervised classifier.

Source: Gong, Chung and Glass, "AST: Audio Spectrogram Transformer", Interspeech 2021 (arXiv 2104.01778), section 2,
and its published PyTorch code (``ast_models.py`` on timm's distilled DeiT). Spectrograms are (batch, time, mel),
normalised. Patches are counted along time first: patch ``f * T' + t`` of a grid of ``F' x T'``.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from percepiano_ast.config import InputError, ModelConfig

PREFIX_TOKENS = 2  # cls and distillation token stand before the patches

# Scales with the width, so that the narrow presets train too. The published .02 is meant for width 768.
_kernel_init = nn.initializers.xavier_uniform()
_token_init = nn.initializers.normal(0.02)


Mask = jax.Array | None  # Bool; None is no mask


def windows(x: jax.Array, axis: int, size: int, stride: int) -> jax.Array:
    """Cut ``axis`` of n values into 1 + (n - size) // stride windows: (..., n, ...) -> (..., windows, size, ...)."""
    count = (x.shape[axis] - size) // stride + 1
    if size == stride:  # a reshape: no gather, which is dear on a TPU
        kept = jax.lax.slice_in_dim(x, 0, count * size, axis=axis)
        return kept.reshape(x.shape[:axis] + (count, size) + x.shape[axis + 1 :])
    index = jnp.arange(count)[:, None] * stride + jnp.arange(size)[None, :]
    return jnp.take(x, index, axis=axis)


def patch_grid(log_mel: jax.Array, patch_size: tuple[int, int], stride: tuple[int, int]) -> tuple[int, int]:
    """Patches along (frequency, time) of a (B, T, F) spectrogram.

    Raises:
        InputError: not three axes, or smaller than one patch.
    """
    if log_mel.ndim != 3:
        raise InputError(f"spectrograms of shape {log_mel.shape} are not (batch, time, mel); add or drop an axis.")
    sizes = (log_mel.shape[2], log_mel.shape[1])
    if any(size < patch for size, patch in zip(sizes, patch_size)):
        raise InputError(
            f"a spectrogram of {sizes[1]} frames x {sizes[0]} bands is smaller than one patch of "
            f"{patch_size[1]} x {patch_size[0]}; pad it at the log floor."
        )
    return tuple((size - patch) // step + 1 for size, patch, step in zip(sizes, patch_size, stride))


def patchify(log_mel: jax.Array, patch_size: tuple[int, int], stride: tuple[int, int]) -> jax.Array:
    """Cut (B, T, F) into (B, N, p_f * p_t) patches; values within a patch run along time first, as ``nn.Unfold`` does.

    Raises:
        InputError: see `patch_grid`.
    """
    grid = patch_grid(log_mel, patch_size, stride)
    x = jnp.swapaxes(log_mel, 1, 2)
    x = windows(x, 1, patch_size[0], stride[0])  # (B, F', p_f, T)
    x = windows(x, 3, patch_size[1], stride[1])  # (B, F', p_f, T', p_t)
    return x.transpose(0, 1, 3, 2, 4).reshape(x.shape[0], grid[0] * grid[1], patch_size[0] * patch_size[1])


def resize_positions(table: jax.Array, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> jax.Array:
    """Fit a position table (1, 2 + N, D) to another (frequency, time) grid: (1, 2 + N', D).

    Each axis is cut around its centre when it gets shorter and interpolated (bilinear, half-pixel centres) when it gets
    longer; the two prefix tokens keep their rows (AST section 2.2 and ``ast_models.py``).

    Raises:
        InputError: the table does not hold ``old_grid``.
    """
    if table.shape[1] != PREFIX_TOKENS + old_grid[0] * old_grid[1]:
        raise InputError(
            f"a position table of {table.shape[1]} rows does not hold 2 + {old_grid[0]} x {old_grid[1]} tokens; "
            "give the grid that it was trained with."
        )
    prefix, patches = table[:, :PREFIX_TOKENS], table[:, PREFIX_TOKENS:]
    patches = patches.reshape(1, *old_grid, table.shape[2])
    for axis, (old, new) in enumerate(zip(old_grid, new_grid), start=1):
        if new < old:
            start = old // 2 - new // 2
            patches = jax.lax.slice_in_dim(patches, start, start + new, axis=axis)
        elif new > old:
            shape = patches.shape[:axis] + (new,) + patches.shape[axis + 1 :]
            patches = jax.image.resize(patches, shape, "linear", antialias=False)
    return jnp.concatenate([prefix, patches.reshape(1, -1, table.shape[2])], axis=1)


class Attention(nn.Module):
    """Multi-head self-attention; logits and softmax in float32 whatever the compute ``dtype``."""

    num_heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array, key_valid: Mask) -> tuple[jax.Array, jax.Array]:
        """(B, L, D), Bool (B, L) or None -> (B, L, D), weights float32 (B, H, L, L); invalid keys get weight 0."""
        batch, length, width = x.shape
        head_dim = width // self.num_heads
        # One product for query, key and value; columns are q | k | v, each head-major, as in timm.
        qkv = nn.Dense(3 * width, dtype=self.dtype, kernel_init=_qkv_init, name="qkv")(x)
        query, key, value = jnp.unstack(qkv.reshape(batch, length, 3, self.num_heads, head_dim), axis=2)
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32) * head_dim**-0.5
        if key_valid is not None:
            logits = jnp.where(key_valid[:, None, None, :], logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1)
        out = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(self.dtype), value).reshape(batch, length, width)
        return nn.Dense(width, dtype=self.dtype, kernel_init=_kernel_init, name="proj")(out), weights


def _qkv_init(rng: jax.Array, shape: tuple[int, int], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Initialise the fused kernel (D, 3D) as three (D, D) ones: Xavier must not see the fused width."""
    width = shape[0]
    parts = [_kernel_init(key, (width, width), dtype) for key in jax.random.split(rng, 3)]
    return jnp.concatenate(parts, axis=1)


class Block(nn.Module):
    """Pre-LN transformer block with exact (erf) GELU and no dropout, as published."""

    num_heads: int
    mlp_ratio: int
    dtype: jnp.dtype
    norm_epsilon: float

    @nn.compact
    def __call__(self, x: jax.Array, key_valid: Mask) -> tuple[jax.Array, jax.Array]:
        """(B, L, D), Bool (B, L) or None -> (B, L, D), attention weights (B, H, L, L)."""
        width = x.shape[-1]
        normed = _layer_norm(self.norm_epsilon, self.dtype, "norm1")(x)
        attended, weights = Attention(self.num_heads, self.dtype, name="attention")(normed, key_valid)
        x = x + attended
        hidden = _layer_norm(self.norm_epsilon, self.dtype, "norm2")(x)
        hidden = nn.Dense(self.mlp_ratio * width, dtype=self.dtype, kernel_init=_kernel_init, name="mlp_in")(hidden)
        hidden = nn.gelu(hidden, approximate=False)
        return x + nn.Dense(width, dtype=self.dtype, kernel_init=_kernel_init, name="mlp_out")(hidden), weights


def _layer_norm(epsilon: float, dtype: jnp.dtype, name: str) -> nn.LayerNorm:
    """LayerNorm with float32 statistics by the two-pass formula: E[x^2] - E[x]^2 costs parity its last digits."""
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


class Encoder(nn.Module):
    """AST encoder of spectrograms of any length; see the module docstring for the order of tokens.

    Attributes:
        config: geometry. Its ``n_frames`` and ``n_mels`` set the size of the learned position table only: for another
            input the table is resized as `resize_positions` does.
        dtype: compute dtype. Parameters, LayerNorm statistics and softmax are float32 always.
        norm_epsilon: of every LayerNorm (1e-6 as published).
    """

    config: ModelConfig
    dtype: jnp.dtype = jnp.float32
    norm_epsilon: float = 1e-6

    @nn.compact
    def __call__(
        self, log_mel: jax.Array, *, patch_valid: Mask = None, masked: Mask = None, need_attention: bool = False
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Encode normalised log-mel spectrograms.

        Args:
            log_mel: (B, T, F).
            patch_valid: Bool (B, N); False patches are no attention keys for any token.
            masked: Bool (B, N); True patches are replaced by the learned ``mask_embed`` before positions are added.
            need_attention: also return the attention weights.

        Returns:
            tokens (B, 2 + N, D) after the final LayerNorm: cls, distillation, patches; and intermediates
            ``patch_embed``, ``with_pos``, ``block0`` ... and, if asked for, ``attention0`` ... (B, H, 2 + N, 2 + N).

        Raises:
            InputError: see `patch_grid`.
        """
        config = self.config
        grid = patch_grid(log_mel, config.patch_size, config.stride)
        patches = patchify(log_mel, config.patch_size, config.stride).astype(self.dtype)
        x = nn.Dense(config.width, dtype=self.dtype, name="patch_embed")(patches)
        intermediates = {"patch_embed": x}
        # Created also where nothing is masked: the same parameters fit pre-training and rating.
        mask_embed = self.param("mask_embed", _token_init, (1, 1, config.width))
        if masked is not None:
            x = jnp.where(masked[:, :, None], mask_embed.astype(self.dtype), x)
        x = intermediates["with_pos"] = self._with_positions(x, grid)
        if patch_valid is not None:  # the prefix tokens are keys always
            patch_valid = jnp.pad(patch_valid, ((0, 0), (PREFIX_TOKENS, 0)), constant_values=True)
        for index in range(config.depth):
            block = Block(config.num_heads, config.mlp_ratio, self.dtype, self.norm_epsilon, name=f"block{index}")
            x, weights = block(x, patch_valid)
            intermediates[f"block{index}"] = x
            if need_attention:
                intermediates[f"attention{index}"] = weights
        return _layer_norm(self.norm_epsilon, self.dtype, "norm")(x), intermediates

    def _with_positions(self, x: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """Put the prefix tokens before the patches (B, N, D) and add the position table, resized to ``grid``."""
        config = self.config
        width = config.width
        prefix = [self.param(name, _token_init, (1, 1, width)) for name in ("cls_token", "dist_token")]
        prefix = jnp.concatenate(prefix, axis=1).astype(self.dtype)
        positions = self.param("pos_embed", _token_init, (1, PREFIX_TOKENS + config.num_patches, width))
        if grid != config.grid:
            positions = resize_positions(positions, config.grid, grid)
        prefix = jnp.broadcast_to(prefix, (x.shape[0], PREFIX_TOKENS, width))
        return jnp.concatenate([prefix, x], axis=1) + positions.astype(self.dtype)


class Classifier(nn.Module):
    """Supervised AST: pooled tokens -> LayerNorm -> Linear.

    Attributes:
        config: geometry of the encoder.
        num_classes: outputs.
        pool: ``prefix``, the mean of cls and distillation token (AST); ``mean``, that of the patches (SSAST).
        dtype: compute dtype.
        norm_epsilon, head_epsilon: LayerNorms of the encoder and of the head, as published.
    """

    config: ModelConfig
    num_classes: int
    pool: str = "prefix"
    dtype: jnp.dtype = jnp.float32
    norm_epsilon: float = 1e-6
    head_epsilon: float = 1e-5

    @nn.compact
    def __call__(self, log_mel: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(B, T, F) -> float32 logits (B, num_classes), intermediates of the encoder and ``tokens``, ``pooled``.

        Raises:
            InputError: unknown ``pool``.
        """
        if self.pool not in ("prefix", "mean"):
            raise InputError(f"unknown pool {self.pool!r}. Choose one of: prefix, mean.")
        tokens, intermediates = Encoder(self.config, self.dtype, self.norm_epsilon, name="encoder")(log_mel)
        tokens = tokens.astype(jnp.float32)
        chosen = tokens[:, :PREFIX_TOKENS] if self.pool == "prefix" else tokens[:, PREFIX_TOKENS:]
        pooled = chosen.mean(axis=1)
        logits = nn.Dense(self.num_classes, name="head")(_layer_norm(self.head_epsilon, jnp.float32, "norm")(pooled))
        return logits, intermediates | {"tokens": tokens, "pooled": pooled}
