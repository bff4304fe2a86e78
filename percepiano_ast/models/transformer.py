"""The transformer in AST: pre-LN blocks with exact GELU (timm's ViT), with three implementations of
attention. Tokens are (batch, length, width)."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

Mask = jax.Array | None  # Bool; None: no mask

Kernel = Literal["xla", "cudnn", "heads"]

# Scales with the width, so that narrow presets train too; the published 0.02 is for width 768.
_kernel_init = nn.initializers.xavier_uniform()
token_init = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class Compute:
    """Implementation options of the encoder; results are equal up to rounding.

    Attributes:
        dtype: of activations and products; parameters, norms and softmax are always float32.
        remat: keep only the input of every block and recompute the rest in the backward pass.
        attention: ``xla``; ``cudnn``, fused (16-bit types on Ampere and newer); ``heads``, one head
            of one clip at a time, recomputed in the backward pass, which fits a CPU's cache.
    """

    dtype: jnp.dtype = jnp.float32
    remat: bool = False
    attention: Kernel = "xla"


class Attention(nn.Module):
    """Multi-head self-attention. ``need_weights`` returns the weights too, computed as with
    ``xla``; ``weights`` of the collection ``perturbations`` is added to them (zeros give the
    gradient with respect to attention)."""

    num_heads: int
    compute: Compute
    need_weights: bool

    @nn.compact
    def __call__(self, x: jax.Array, key_valid: Mask) -> tuple[jax.Array, Mask]:
        """(B, L, D), Bool (B, L) -> (B, L, D), weights float32 (B, H, L, L) or None; invalid keys
        get 0."""
        batch, length, width = x.shape
        dtype = self.compute.dtype
        # one product; columns are q | k | v, each head-major, as in timm
        qkv = per_token(nn.Dense(3 * width, dtype=dtype, kernel_init=_qkv_init, name="qkv"), x)
        query, key, value = jnp.unstack(
            qkv.reshape(batch, length, 3, self.num_heads, width // self.num_heads), axis=2
        )
        weights = None
        if self.need_weights or self.compute.attention == "xla":
            logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
            logits = logits * query.shape[-1] ** -0.5
            if key_valid is not None:
                logits = jnp.where(key_valid[:, None, None, :], logits, jnp.finfo(jnp.float32).min)
            weights = jax.nn.softmax(logits, axis=-1)
            if self.need_weights:
                weights = self.perturb("weights", weights)
            out = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(dtype), value)
        elif self.compute.attention == "heads":
            out = _attend_by_head(query, key, value, key_valid)
        else:
            # cuDNN broadcasts the mask over heads, but not over queries.
            mask = None if key_valid is None else key_valid[:, None, None, :].repeat(length, axis=2)
            out = jax.nn.dot_product_attention(
                query, key, value, mask=mask, implementation=self.compute.attention
            )
        project = nn.Dense(width, dtype=dtype, kernel_init=_kernel_init, name="proj")
        out = per_token(project, out.reshape(batch, length, width))
        return out, weights if self.need_weights else None


def _attend_by_head(
    query: jax.Array, key: jax.Array, value: jax.Array, key_valid: Mask
) -> jax.Array:
    """Three (B, L, H, hd) -> (B, L, H, hd), see `Compute`."""
    batch, length, heads, head_dim = query.shape

    @jax.checkpoint
    def one_head(operands):
        query, key, value, valid = operands
        # Keys along the first axis: the softmax then sums over rows, which vectorises.
        logits = jnp.einsum(
            "kd,qd->kq", key, query * head_dim**-0.5, preferred_element_type=jnp.float32
        )
        if valid is not None:
            logits = jnp.where(valid[:, None], logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=0).astype(value.dtype)
        return jnp.einsum("kq,kd->qd", weights, value)

    flat = [x.swapaxes(1, 2).reshape(batch * heads, length, head_dim) for x in (query, key, value)]
    valid = None if key_valid is None else jnp.repeat(key_valid, heads, axis=0)
    out = jax.lax.map(one_head, (*flat, valid))
    return out.reshape(batch, heads, length, head_dim).swapaxes(1, 2)


def per_token(layer: nn.Module, x: jax.Array) -> jax.Array:
    """A layer of (B, L, D) as B * L rows: the weights' gradient is then a plain matrix product."""
    return layer(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU, x Phi(x) (Hendrycks and Gimpel 2016)."""
    if x.dtype == jnp.float32:  # erf is cheaper than JAX's erfc, and as exact only in this type
        return x * (0.5 + 0.5 * jax.lax.erf(x * np.float32(0.5**0.5)))
    return nn.gelu(x, approximate=False)


def _qkv_init(rng: jax.Array, shape: tuple[int, int], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    # three (D, D) kernels, because Xavier's scale depends on the width
    parts = [_kernel_init(key, (shape[0],) * 2, dtype) for key in jax.random.split(rng, 3)]
    return jnp.concatenate(parts, axis=1)


class _Affine(nn.Module):
    """Kernel (width, features) and bias (features,) of a dense layer, as in `nn.Dense`."""

    features: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, width: int) -> tuple[jax.Array, jax.Array]:
        kernel = self.param("kernel", _kernel_init, (width, self.features))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
        return kernel.astype(self.dtype), bias.astype(self.dtype)


class Mlp(nn.Module):
    """Dense - GELU - Dense, the hidden layer ``ratio`` times as wide as the model. GELU is
    recomputed in the backward pass, which saves three arrays of the hidden layer's size."""

    ratio: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(rows, D) -> (rows, D)."""
        width = x.shape[-1]
        kernel, bias = _Affine(self.ratio * width, self.dtype, name="in")(width)
        kernel_out, bias_out = _Affine(width, self.dtype, name="out")(self.ratio * width)
        narrow = jax.checkpoint(lambda hidden, kernel: gelu(hidden) @ kernel)
        return narrow(x @ kernel + bias[None, :], kernel_out) + bias_out[None, :]


class Block(nn.Module):
    """Pre-LN transformer block with exact (erf) GELU and no dropout, as published."""

    num_heads: int
    mlp_ratio: int
    compute: Compute
    norm_epsilon: float
    need_weights: bool

    @nn.compact
    def __call__(self, x: jax.Array, key_valid: Mask) -> tuple[jax.Array, tuple[jax.Array, Mask]]:
        """(B, L, D), Bool (B, L) -> (B, L, D), and as intermediates the same and the weights."""
        width, dtype = x.shape[-1], self.compute.dtype
        normed = layer_norm(self.norm_epsilon, dtype, "norm1")(x)
        attention = Attention(self.num_heads, self.compute, self.need_weights, name="attention")
        attended, weights = attention(normed, key_valid)
        x = x + attended
        hidden = layer_norm(self.norm_epsilon, dtype, "norm2")(x)
        x = x + Mlp(self.mlp_ratio, dtype, name="mlp")(hidden.reshape(-1, width)).reshape(x.shape)
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
    """A stack of `Block` with one compiled body, as submodule ``blocks`` of the calling compact
    method; the first axis of every parameter is the depth. Returns (B, L, D), and intermediates
    ``block0`` ... and, if requested, ``attention0`` ..."""
    stack = nn.scan(
        nn.remat(Block, prevent_cse=False) if compute.remat else Block,
        variable_axes={"params": 0, "perturbations": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=depth,
    )
    x, (states, weights) = stack(
        num_heads, mlp_ratio, compute, norm_epsilon, need_attention, name="blocks"
    )(x, key_valid)
    intermediates = {f"block{index}": states[index] for index in range(depth)}
    if weights is not None:
        intermediates |= {f"attention{index}": weights[index] for index in range(depth)}
    return x, intermediates


def layer_norm(epsilon: float, dtype: jnp.dtype, name: str) -> nn.LayerNorm:
    """LayerNorm with float32 statistics from the two-pass formula, for parity with PyTorch."""
    return nn.LayerNorm(epsilon=epsilon, dtype=dtype, use_fast_variance=False, name=name)
