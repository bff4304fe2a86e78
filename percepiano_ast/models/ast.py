"""The Audio Spectrogram Transformer (AST): encoder and supervised classifier.

Source: Gong, Chung and Glass, "AST: Audio Spectrogram Transformer", Interspeech 2021 (arXiv
2104.01778), section 2, and its PyTorch code (``ast_models.py`` on timm's distilled DeiT).
Spectrograms are (batch, time, mel), normalised. Patch ``f * T' + t`` is that at (f, t) of a grid of
``F' x T'``.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from percepiano_ast.config import ModelConfig, lookup
from percepiano_ast.errors import InputError
from percepiano_ast.models.transformer import (
    Compute,
    Mask,
    gelu,
    layer_norm,
    per_token,
    run_blocks,
    token_init,
)

PREFIX_TOKENS = 2  # cls and distillation token, before the patches


def windows(x: jax.Array, axis: int, size: int, stride: int) -> jax.Array:
    """(..., n, ...) -> (..., 1 + (n - size) // stride, size, ...): windows of ``axis``."""
    count = (x.shape[axis] - size) // stride + 1
    if size == stride:  # a reshape avoids a gather, which is slow on a TPU
        whole = jax.lax.slice_in_dim(x, 0, count * size, axis=axis)
        return whole.reshape(x.shape[:axis] + (count, size) + x.shape[axis + 1 :])
    index = jnp.arange(count)[:, None] * stride + jnp.arange(size)[None, :]
    return jnp.take(x, index, axis=axis)


def patch_grid(
    log_mel: jax.Array, patch_size: tuple[int, int], stride: tuple[int, int]
) -> tuple[int, int]:
    """Number of patches along (frequency, time) of a (B, T, F) spectrogram; InputError if it has
    other axes or is smaller than one patch."""
    if log_mel.ndim != 3:
        raise InputError(
            f"spectrograms of shape {log_mel.shape} are not (batch, time, mel); change the axes."
        )
    _, frames, bands = log_mel.shape
    if bands < patch_size[0] or frames < patch_size[1]:
        raise InputError(
            f"a spectrogram of {frames} frames x {bands} bands is smaller than one patch of"
            f" {patch_size[1]} x {patch_size[0]}; pad it at the log floor."
        )
    return (bands - patch_size[0]) // stride[0] + 1, (frames - patch_size[1]) // stride[1] + 1


def patchify(log_mel: jax.Array, patch_size: tuple[int, int], stride: tuple[int, int]) -> jax.Array:
    """Cut (B, T, F) into (B, N, p_f * p_t) patches, with values along time first as in
    ``nn.Unfold``; errors as in `patch_grid`."""
    grid = patch_grid(log_mel, patch_size, stride)
    x = jnp.swapaxes(log_mel, 1, 2)
    x = windows(x, 1, patch_size[0], stride[0])  # (B, F', p_f, T)
    x = windows(x, 3, patch_size[1], stride[1])  # (B, F', p_f, T', p_t)
    shape = (x.shape[0], grid[0] * grid[1], patch_size[0] * patch_size[1])
    return x.transpose(0, 1, 3, 2, 4).reshape(shape)


def resize_pos_embed(
    table: jax.Array, old_grid: tuple[int, int], new_grid: tuple[int, int]
) -> jax.Array:
    """Resize a position table (1, 2 + N, D) to another (frequency, time) grid: (1, 2 + N', D).

    An axis that gets shorter is cropped around its centre; one that gets longer is interpolated
    (bilinear, half-pixel centres). The rows of the two prefix tokens do not change (AST section 2.2
    and ``ast_models.py``). InputError if the number of rows does not match ``old_grid``.
    """
    if table.shape[1] != PREFIX_TOKENS + old_grid[0] * old_grid[1]:
        raise InputError(
            f"a position table of {table.shape[1]} rows does not match 2 + {old_grid[0]} x"
            f" {old_grid[1]} tokens; give the grid that it was trained with."
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


class Stem(nn.Module):
    """Convolutions before the patches: filters for partials that are shared by all keys and times.

    Early convolutions improve transformers (Xiao et al. 2021, arXiv 2106.14881). Each is followed
    by a GELU and halves the frequency axis, and also the time axis until a step is one patch wide.
    """

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, log_mel: jax.Array) -> jax.Array:
        """(B, T, F) -> (B, T', values), the inputs of the patch embedding."""
        wide = self.config.patch_size[1]
        x = log_mel[:, : log_mel.shape[1] // wide * wide, :, None].astype(self.dtype)
        for number, channels in enumerate(self.config.stem):
            kernel, stride = (5, 5) if number == 0 else (3, 3), (2 if wide > 1 else 1, 2)
            x = gelu(nn.Conv(channels, kernel, stride, dtype=self.dtype, name=f"conv{number}")(x))
            wide = max(wide // 2, 1)
        return x.reshape(*x.shape[:2], -1)


class Encoder(nn.Module):
    """AST encoder for spectrograms of any length: ``n_frames`` and ``n_mels`` of ``config`` only
    set the size of the learned position table, which `resize_pos_embed` resizes."""

    config: ModelConfig
    compute: Compute = Compute()
    norm_epsilon: float = 1e-6

    @nn.compact
    def __call__(
        self,
        log_mel: jax.Array,
        *,
        patch_valid: Mask = None,
        masked: Mask = None,
        visible_index: jax.Array | None = None,
        need_attention: bool = False,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Encode spectrograms.

        Args:
            log_mel: (B, T, F), normalised.
            patch_valid: Bool (B, N); False patches are excluded as attention keys. Not with
                ``visible_index``.
            masked: Bool (B, N); True patches are replaced by the learned ``mask_embed``.
            visible_index: Int (B, V); only these patches are embedded, each with its own position.
            need_attention: also return the attention weights.

        Returns:
            tokens (B, 2 + N, D) after the final LayerNorm: cls, distillation, patches (V of them
            with ``visible_index``, in its order); and intermediates ``patch_embed``, ``with_pos``,
            ``block0`` ... and, if requested, ``attention0`` ... (B, H, 2 + N, 2 + N).

        Raises:
            InputError: see `patch_grid`; or masked patches, with a stem that reaches beyond them.
        """
        config, dtype = self.config, self.compute.dtype
        grid = patch_grid(log_mel, config.patch_size, config.stride)
        if config.stem:
            if masked is not None or visible_index is not None:
                raise InputError(
                    "convolutions before the patches leak masked patches; choose a model without."
                )
            patches = Stem(config, dtype, name="stem")(log_mel)
        else:
            patches = patchify(log_mel, config.patch_size, config.stride).astype(dtype)
        if visible_index is not None:
            patches = jnp.take_along_axis(patches, visible_index[:, :, None], axis=1)
        x = per_token(nn.Dense(config.width, dtype=dtype, name="patch_embed"), patches)
        intermediates = {"patch_embed": x}
        # Created even without masking, so that pre-training and rating have the same parameters.
        mask_embed = self.param("mask_embed", token_init, (1, 1, config.width))
        if masked is not None:
            x = jnp.where(masked[:, :, None], mask_embed.astype(dtype), x)
        names, size = ("cls_token", "dist_token"), (1, 1, config.width)
        tokens = [self.param(name, token_init, size) for name in names]
        shape = (1, PREFIX_TOKENS + config.num_patches, config.width)
        table = self.param("pos_embed", token_init, shape)
        if grid != config.grid:
            table = resize_pos_embed(table, config.grid, grid)
        prefix = (jnp.concatenate(tokens, axis=1) + table[:, :PREFIX_TOKENS]).astype(dtype)
        prefix = jnp.broadcast_to(prefix, (x.shape[0], PREFIX_TOKENS, config.width))
        positions = table[:, PREFIX_TOKENS:].astype(dtype)
        if visible_index is not None:
            positions = positions[0][visible_index]
        x = intermediates["with_pos"] = jnp.concatenate([prefix, x + positions], axis=1)
        if patch_valid is not None:  # the prefix tokens are always valid keys
            patch_valid = jnp.pad(patch_valid, ((0, 0), (PREFIX_TOKENS, 0)), constant_values=True)
        x, states = run_blocks(
            x,
            patch_valid,
            depth=config.depth,
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_ratio,
            compute=self.compute,
            norm_epsilon=self.norm_epsilon,
            need_attention=need_attention,
        )
        return layer_norm(self.norm_epsilon, dtype, "norm")(x), intermediates | states


class Classifier(nn.Module):
    """Supervised AST: pooled tokens -> LayerNorm -> Linear. ``pool`` is ``prefix``, the mean of cls
    and distillation token (AST), or ``mean``, that of the patches (SSAST)."""

    config: ModelConfig
    num_classes: int
    pool: str = "prefix"
    compute: Compute = Compute()
    norm_epsilon: float = 1e-6
    head_epsilon: float = 1e-5

    @nn.compact
    def __call__(self, log_mel: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(B, T, F) -> float32 logits (B, num_classes), intermediates of the encoder and
        ``tokens``, ``pooled``; InputError for an unknown ``pool``."""
        lookup({"prefix": 0, "mean": 0}, self.pool, "pool")
        encoder = Encoder(self.config, self.compute, self.norm_epsilon, name="encoder")
        tokens, intermediates = encoder(log_mel)
        tokens = tokens.astype(jnp.float32)
        chosen = tokens[:, :PREFIX_TOKENS] if self.pool == "prefix" else tokens[:, PREFIX_TOKENS:]
        pooled = chosen.mean(axis=1)
        normed = layer_norm(self.head_epsilon, jnp.float32, "norm")(pooled)
        logits = nn.Dense(self.num_classes, name="head")(normed)
        return logits, intermediates | {"tokens": tokens, "pooled": pooled}
