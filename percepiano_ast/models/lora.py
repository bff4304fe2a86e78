"""Low-rank adapters of the encoder's attention: W becomes W + (alpha / r) A B with A (D, r) and B (r, D).

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022 (arXiv 2106.09685), section 4.1: A starts
random, B at zero, so training starts from the encoder as it is. Here q, k, v and o of every block have one. The product is
added to the weights before they are used, in training as for rating: the encoder runs as it does without adapters, and
what is saved over training everything is the state of the optimiser, the checkpoints, and the freedom to overfit.
"""

import jax
import jax.numpy as jnp

_ADAPTED = {"qkv": 3, "proj": 1}  # products of D x D that lie side by side in each kernel


def init(encoder: dict, rank: int, rng: jax.Array) -> dict:
    """Adapters of stacked blocks: ``down`` (depth, m, D, rank) and ``up`` (depth, m, rank, D), m products in each kernel."""
    adapters = {}
    for name, key in zip(_ADAPTED, jax.random.split(rng, len(_ADAPTED))):
        depth, width, _ = encoder["blocks"]["attention"][name]["kernel"].shape
        down = jax.random.normal(key, (depth, _ADAPTED[name], width, rank)) * width**-0.5
        adapters[name] = {"down": down, "up": jnp.zeros((depth, _ADAPTED[name], rank, width))}
    return adapters


def merge(encoder: dict, adapters: dict, scale: float) -> dict:
    """The encoder's parameters with ``scale`` times the adapters' products added, in the encoder's own structure."""
    attention = dict(encoder["blocks"]["attention"])
    for name, adapter in adapters.items():
        product = scale * jnp.einsum("lmdr,lmre->ldme", adapter["down"], adapter["up"])
        kernel = attention[name]["kernel"]
        attention[name] = attention[name] | {"kernel": kernel + product.reshape(kernel.shape)}
    return encoder | {"blocks": encoder["blocks"] | {"attention": attention}}
