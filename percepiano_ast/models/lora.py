"""Low-rank adapters of q, k, v and o of every block: W becomes W + (alpha / r) A B with A (D, r),
random at first, and B (r, D), zero at first.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022 (arXiv
2106.09685), section 4.1.
"""

import jax
import jax.numpy as jnp

_ADAPTED = {"qkv": 3, "proj": 1}  # number of D x D matrices in each kernel


def init(encoder: dict, rank: int, rng: jax.Array) -> dict:
    """Adapters: ``down`` (depth, m, D, rank) and ``up`` (depth, m, rank, D) of m matrices."""
    adapters = {}
    for name, key in zip(_ADAPTED, jax.random.split(rng, len(_ADAPTED))):
        depth, width, _ = encoder["blocks"]["attention"][name]["kernel"].shape
        down = jax.random.normal(key, (depth, _ADAPTED[name], width, rank)) * width**-0.5
        adapters[name] = {"down": down, "up": jnp.zeros((depth, _ADAPTED[name], rank, width))}
    return adapters


def merge(encoder: dict, adapters: dict, scale: float) -> dict:
    """The encoder's parameters plus ``scale`` times the adapters' products."""
    attention = dict(encoder["blocks"]["attention"])
    for name, adapter in adapters.items():
        product = scale * jnp.einsum("lmdr,lmre->ldme", adapter["down"], adapter["up"])
        kernel = attention[name]["kernel"]
        attention[name] = attention[name] | {"kernel": kernel + product.reshape(kernel.shape)}
    return encoder | {"blocks": encoder["blocks"] | {"attention": attention}}
