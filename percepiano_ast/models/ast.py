"""The Audio Spectrogram Transformer (AST): encoder and supervised classifier.

Source: Gong, Chung and Glass, "AST: Audio Spectrogram Transformer", Interspeech 2021 (arXiv 2104.01778), section 2,
and its published PyTorch code (``ast_models.py`` on timm's distilled DeiT). Spectrograms are (batch, time, mel),
normalised. Patches are counted along time first: patch ``f * T' + t`` of a grid of ``F' x T'``.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from percepiano_ast.config import InputError, ModelConfig

PREFIX_TOKENS = 2  # cls and distillation token stand before the patches

# Scales with the width, so that the narrow presets train too. The published .02 is meant for width 768.
_kernel_init = nn.initializers.xavier_uniform()
token_init = nn.initializers.normal(0.02)


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


@dataclasses.dataclass(frozen=True)
class Compute:
    """How the encoder computes; what it computes is the same but for rounding.

    Attributes:
        dtype: of activations and matrix products. Parameters, LayerNorm statistics and softmax are float32 always.
        remat: keep only the input of every block and compute the rest again in the backward pass.
        attention: ``xla``, or ``cudnn`` for its fused kernel (16-bit types on Ampere and newer).
    """

    dtype: jnp.dtype = jnp.float32
    remat: bool = False
    attention: str = "xla"


class Attention(nn.Module):
    """Multi-head self-attention; logits and softmax in float32 whatever the compute type.

    Attributes:
        num_heads: must divide the width.
        compute: see `Compute`.
        need_weights: return the attention weights too; they are always computed by XLA then.
    """

    num_heads: int
    compute: Compute
    need_weights: bool

    @nn.compact
    def __call__(self, x: jax.Array, key_valid: Mask) -> tuple[jax.Array, Mask]:
        """(B, L, D), Bool (B, L) or None -> (B, L, D), weights float32 (B, H, L, L) or None; invalid keys get 0."""
        batch, length, width = x.shape
        dtype = self.compute.dtype
        # One product for query, key and value; columns are q | k | v, each head-major, as in timm.
        qkv = nn.Dense(3 * width, dtype=dtype, kernel_init=_qkv_init, name="qkv")(x)
        qkv = jnp.unstack(qkv.reshape(batch, length, 3, self.num_heads, width // self.num_heads), axis=2)
        weights = None
        if self.compute.attention == "cudnn" and not self.need_weights:
            mask = None if key_valid is None else key_valid[:, None, None, :]
            out = jax.nn.dot_product_attention(*qkv, mask=mask, implementation="cudnn")
        else:
            out, weights = _attend(*qkv, key_valid)
        out = nn.Dense(width, dtype=dtype, kernel_init=_kernel_init, name="proj")(out.reshape(batch, length, width))
        return out, weights if self.need_weights else None


def _attend(query: jax.Array, key: jax.Array, value: jax.Array, key_valid: Mask) -> tuple[jax.Array, jax.Array]:
    """Three (B, L, H, hd) -> (B, L, H, hd) and the weights (B, H, L, L)."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32) * query.shape[-1] ** -0.5
    if key_valid is not None:
        logits = jnp.where(key_valid[:, None, None, :], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value), weights


def _qkv_init(rng: jax.Array, shape: tuple[int, int], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    """Initialise the fused kernel (D, 3D) as three (D, D) ones: Xavier must not see the fused width."""
    width = shape[0]
    parts = [_kernel_init(key, (width, width), dtype) for key in jax.random.split(rng, 3)]
    return jnp.concatenate(parts, axis=1)


class Block(nn.Module):
    """Pre-LN transformer block with exact (erf) GELU and no dropout, as published."""

    num_heads: int
    mlp_ratio: int
    compute: Compute
    norm_epsilon: float
    need_weights: bool

    @nn.compact
    def __call__(self, x: jax.Array, key_valid: Mask) -> tuple[jax.Array, tuple[jax.Array, Mask]]:
        """(B, L, D), Bool (B, L) or None -> (B, L, D), and for the record that again and the attention weights."""
        width, dtype = x.shape[-1], self.compute.dtype
        normed = layer_norm(self.norm_epsilon, dtype, "norm1")(x)
        attention = Attention(self.num_heads, self.compute, self.need_weights, name="attention")
        attended, weights = attention(normed, key_valid)
        x = x + attended
        hidden = layer_norm(self.norm_epsilon, dtype, "norm2")(x)
        hidden = nn.Dense(self.mlp_ratio * width, dtype=dtype, kernel_init=_kernel_init, name="mlp_in")(hidden)
        hidden = nn.gelu(hidden, approximate=False)
        x = x + nn.Dense(width, dtype=dtype, kernel_init=_kernel_init, name="mlp_out")(hidden)
        return x, (x, weights)


def run_blocks(
    x: jax.Array,
    key_valid: Mask = None,
    *,
    depth: int,
    num_heads: int,
    mlp_ratio: int,
    compute: Compute,
    norm_epsilon: float,
    need_attention: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """A stack of `Block` in the calling module, as submodule ``blocks``; one compiled body serves all of them.

    Every parameter has a leading axis, the depth. Must be called in a compact method.

    Returns:
        (B, L, D), and intermediates ``block0`` ... and, if wanted, ``attention0`` ...
    """
    stack = nn.scan(
        nn.remat(Block, prevent_cse=False) if compute.remat else Block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=depth,
    )
    x, (states, weights) = stack(num_heads, mlp_ratio, compute, norm_epsilon, need_attention, name="blocks")(x, key_valid)
    intermediates = {f"block{index}": states[index] for index in range(depth)}
    if need_attention:
        intermediates |= {f"attention{index}": weights[index] for index in range(depth)}
    return x, intermediates


def layer_norm(epsilon: float, dtype: jnp.dtype, name: str) -> nn.LayerNorm:
    """LayerNorm with float32 statistics by the two-pass formula: E[x^2] - E[x]^2 costs parity its last digits."""
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)


class Encoder(nn.Module):
    """AST encoder of spectrograms of any length; see the module docstring for the order of tokens.

    Attributes:
        config: geometry. Its ``n_frames`` and ``n_mels`` set the size of the learned position table only: for another
            input the table is resized as `resize_positions` does.
        compute: see `Compute`.
        norm_epsilon: of every LayerNorm (1e-6 as published).
    """

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
        """Encode normalised log-mel spectrograms.

        Args:
            log_mel: (B, T, F).
            patch_valid: Bool (B, N); False patches are no attention keys for any token. Not with ``visible_index``.
            masked: Bool (B, N); True patches are replaced by the learned ``mask_embed`` before positions are added.
            visible_index: Int (B, V); only these patches are embedded, each with its own position.
            need_attention: also return the attention weights.

        Returns:
            tokens (B, 2 + N, D) after the final LayerNorm: cls, distillation, patches (V of them with
            ``visible_index``, in its order); and intermediates ``patch_embed``, ``with_pos``, ``block0`` ... and, if
            asked for, ``attention0`` ... (B, H, 2 + N, 2 + N).

        Raises:
            InputError: see `patch_grid`.
        """
        config, dtype = self.config, self.compute.dtype
        grid = patch_grid(log_mel, config.patch_size, config.stride)
        patches = patchify(log_mel, config.patch_size, config.stride).astype(dtype)
        if visible_index is not None:
            patches = jnp.take_along_axis(patches, visible_index[:, :, None], axis=1)
        x = nn.Dense(config.width, dtype=dtype, name="patch_embed")(patches)
        intermediates = {"patch_embed": x}
        # Created also where nothing is masked: the same parameters fit pre-training and rating.
        mask_embed = self.param("mask_embed", token_init, (1, 1, config.width))
        if masked is not None:
            x = jnp.where(masked[:, :, None], mask_embed.astype(dtype), x)
        x = intermediates["with_pos"] = self._with_positions(x, grid, visible_index)
        if patch_valid is not None:  # the prefix tokens are keys always
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

    def _with_positions(self, x: jax.Array, grid: tuple[int, int], visible_index: jax.Array | None) -> jax.Array:
        """Put the prefix tokens before the patches (B, N, D) and add the position table, resized to ``grid``."""
        config = self.config
        width, dtype = config.width, self.compute.dtype
        prefix = [self.param(name, token_init, (1, 1, width)) for name in ("cls_token", "dist_token")]
        table = self.param("pos_embed", token_init, (1, PREFIX_TOKENS + config.num_patches, width))
        if grid != config.grid:
            table = resize_positions(table, config.grid, grid)
        prefix = (jnp.concatenate(prefix, axis=1) + table[:, :PREFIX_TOKENS]).astype(dtype)
        positions = table[:, PREFIX_TOKENS:].astype(dtype)
        if visible_index is not None:
            positions = positions[0][visible_index]
        prefix = jnp.broadcast_to(prefix, (x.shape[0], PREFIX_TOKENS, width))
        return jnp.concatenate([prefix, x + positions], axis=1)


class Classifier(nn.Module):
    """Supervised AST: pooled tokens -> LayerNorm -> Linear.

    Attributes:
        config: geometry of the encoder.
        num_classes: outputs.
        pool: ``prefix``, the mean of cls and distillation token (AST); ``mean``, that of the patches (SSAST).
        compute: see `Compute`.
        norm_epsilon, head_epsilon: LayerNorms of the encoder and of the head, as published.
    """

    config: ModelConfig
    num_classes: int
    pool: str = "prefix"
    compute: Compute = Compute()
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
        tokens, intermediates = Encoder(self.config, self.compute, self.norm_epsilon, name="encoder")(log_mel)
        tokens = tokens.astype(jnp.float32)
        chosen = tokens[:, :PREFIX_TOKENS] if self.pool == "prefix" else tokens[:, PREFIX_TOKENS:]
        pooled = chosen.mean(axis=1)
        logits = nn.Dense(self.num_classes, name="head")(layer_norm(self.head_epsilon, jnp.float32, "norm")(pooled))
        return logits, intermediates | {"tokens": tokens, "pooled": pooled}
