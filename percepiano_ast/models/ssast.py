"""Self-supervised AST (SSAST): masked spectrogram patches are discriminated and reconstructed.

Source: Gong et al., "SSAST: Self-Supervised Audio Spectrogram Transformer", AAAI 2022 (arXiv
2110.09784), section 2. Unlike in its published code, both heads share one forward pass, masks have
no edge bias, and the InfoNCE softmax is over the targets, as in the paper's equation 1.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from percepiano_ast.config import ModelConfig, lookup
from percepiano_ast.errors import InputError
from percepiano_ast.models.ast import PREFIX_TOKENS, Encoder, patch_grid, patchify
from percepiano_ast.models.transformer import Compute, layer_norm, per_token, run_blocks, token_init


class PredictionHead(nn.Module):
    """Linear(D) - ReLU - Linear(patch values), SSAST section 2.3."""

    patch_dim: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """(B, M, D) -> float32 (B, M, patch_dim)."""
        hidden = nn.Dense(tokens.shape[-1], dtype=self.dtype, name="hidden")
        out = nn.Dense(self.patch_dim, dtype=self.dtype, name="out")
        return per_token(out, nn.relu(per_token(hidden, tokens))).astype(jnp.float32)


def visible_index(mask_index: jax.Array, num_patches: int) -> jax.Array:
    """Int (B, M), masked ones of N patches -> Int32 (B, N - M), visible ones, ascending."""
    rows = jnp.arange(mask_index.shape[0])[:, None]
    masked = jnp.zeros((mask_index.shape[0], num_patches), jnp.int32).at[rows, mask_index].set(1)
    order = jnp.argsort(masked, axis=1, stable=True).astype(jnp.int32)
    return order[:, : num_patches - mask_index.shape[1]]


class Decoder(nn.Module):
    """A few blocks on mask tokens and the encoder's tokens of visible patches (MAE-AST, Baade et
    al. 2022), with half the width and heads of the encoder, as in MAE (He et al. 2022, table 1b).
    """

    config: ModelConfig
    depth: int
    compute: Compute

    @nn.compact
    def __call__(self, tokens: jax.Array, visible: jax.Array, masked: jax.Array) -> jax.Array:
        """(B, 2 + V, D), Int (B, V), Int (B, M) -> (B, M, D / 2), the tokens of the masked patches
        in their order."""
        config, dtype = self.config, self.compute.dtype
        width = config.width // 2
        tokens = per_token(nn.Dense(width, dtype=dtype, name="embed"), tokens)
        mask_token = self.param("mask_token", token_init, (1, 1, width)).astype(dtype)
        table = self.param("pos_embed", token_init, (1, config.num_patches, width)).astype(dtype)[0]
        known = tokens[:, PREFIX_TOKENS:] + table[visible]
        # Attention does not depend on the order of tokens.
        x = jnp.concatenate([tokens[:, :PREFIX_TOKENS], known, mask_token + table[masked]], axis=1)
        x, _ = run_blocks(
            x,
            depth=self.depth,
            num_heads=max(config.num_heads // 2, 1),
            mlp_ratio=config.mlp_ratio,
            compute=self.compute,
            norm_epsilon=1e-6,
        )
        return layer_norm(1e-6, dtype, "norm")(x[:, -masked.shape[1] :])


class SSAST(nn.Module):
    """Encoder with a discriminative and a generative head.

    ``decoder_depth`` 0 is SSAST, whose encoder processes mask tokens. Above 0, the encoder
    processes only visible patches, and a `Decoder` all tokens, at about a third of the cost.
    """

    config: ModelConfig
    compute: Compute = Compute()
    decoder_depth: int = 0

    @nn.compact
    def __call__(
        self, log_mel: jax.Array, mask_index: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Predict the masked patches.

        Args:
            log_mel: (B, T, F), normalised; with a decoder, of the configured size.
            mask_index: Int (B, M), distinct patch indices of every clip.

        Returns:
            ``discriminative``, ``generative`` and ``target`` (the raw patches), float32 (B, M,
            patch_dim) in the order of ``mask_index``; and the encoder's intermediates with
            ``tokens`` (B, 2 + N, D), with a decoder (B, 2 + N - M, D).
        """
        config = self.config
        patches = patchify(log_mel, config.patch_size, config.stride)
        encoder = Encoder(config, self.compute, name="encoder")
        if self.decoder_depth:
            visible = visible_index(mask_index, patches.shape[1])
            tokens, intermediates = encoder(log_mel, visible_index=visible)
            decoder = Decoder(config, self.decoder_depth, self.compute, name="decoder")
            chosen = decoder(tokens, visible, mask_index)
        else:
            rows = jnp.arange(log_mel.shape[0])[:, None]
            masked = jnp.zeros(patches.shape[:2], bool).at[rows, mask_index].set(True)
            tokens, intermediates = encoder(log_mel, masked=masked)
            # Gathered before the heads, so that they process M tokens instead of N.
            chosen = jnp.take_along_axis(tokens, mask_index[:, :, None] + PREFIX_TOKENS, axis=1)
        outputs = {
            name: PredictionHead(config.patch_dim, self.compute.dtype, name=name)(chosen)
            for name in ("discriminative", "generative")
        }
        target = jnp.take_along_axis(patches, mask_index[:, :, None], axis=1)
        outputs["target"] = target.astype(jnp.float32)
        return outputs, intermediates | {"tokens": tokens}


def losses(
    outputs: dict[str, jax.Array], *, generative_weight: float = 10.0, softmax_over: str = "targets"
) -> dict[str, jax.Array]:
    """Joint objective of SSAST, equations 1 to 3: InfoNCE within each clip + ``generative_weight``
    (lambda) x MSE.

    Args:
        outputs: of `SSAST`.
        softmax_over: ``targets`` (the paper: each prediction is matched to one of the clip's masked
            patches) or ``predictions`` (the published code); InputError for others.

    Returns:
        float32 scalars ``loss``, ``nce``, ``mse`` and ``accuracy``, the share of correct matches.
    """
    axis = lookup({"targets": 1, "predictions": 2}, softmax_over, "softmax_over")
    target = outputs["target"].astype(jnp.float32)
    discriminative = outputs["discriminative"].astype(jnp.float32)
    # Target i, prediction j. In bfloat16, a TPU's default, similar patches are indistinguishable.
    logits = jnp.einsum("bid,bjd->bij", target, discriminative, precision="highest")
    log_probs = jax.nn.log_softmax(logits, axis=axis)
    nce = -jnp.diagonal(log_probs, axis1=1, axis2=2).mean()
    mse = jnp.square(outputs["generative"].astype(jnp.float32) - target).mean()
    # the target chosen by each prediction; the published code chooses after its own softmax
    picked = jnp.argmax(logits if softmax_over == "targets" else log_probs, axis=1)
    accuracy = (picked == jnp.arange(target.shape[1])[None, :]).mean(dtype=jnp.float32)
    return {"loss": nce + generative_weight * mse, "nce": nce, "mse": mse, "accuracy": accuracy}


def sample_mask_index(
    rng: jax.Array,
    batch: int,
    grid: tuple[int, int],
    num_masked: int,
    cluster: tuple[int, int] = (3, 5),
) -> jax.Array:
    """Draw a clustered mask for every clip, SSAST section 2.2: Int32 (B, M) distinct patch indices.

    A cluster size C is drawn for each clip. Blocks of C x C patches are placed in random order
    until M patches are masked. Blocks may extend over every edge, so that each patch, also at an
    edge, is covered by C x C possible blocks. All arguments but ``rng`` are static in jit.
    InputError for ``num_masked`` outside 1 to the number of patches, or ``cluster`` not a range.
    """
    patches = grid[0] * grid[1]
    if not 1 <= num_masked <= patches:
        raise InputError(f"cannot mask {num_masked} of {patches} patches; choose 1 to {patches}.")
    if not 1 <= cluster[0] <= cluster[1]:
        raise InputError(f"cluster sizes {cluster} are not a range above 0; give (least, most).")
    largest = cluster[1]

    def one_clip(clip: jax.Array) -> jax.Array:
        size_key, order_key, tie_key = jax.random.split(jax.random.fold_in(rng, clip), 3)
        size = jax.random.randint(size_key, (), cluster[0], largest + 1)
        # index s of an axis is the position s - (largest - 1)
        starts = tuple(side + largest - 1 for side in grid)
        # order in which blocks are placed
        turn = jax.random.permutation(order_key, starts[0] * starts[1]).reshape(starts)
        first_hit = jnp.full(grid, turn.size)
        for back_f in range(largest):
            for back_t in range(largest):
                low_f, low_t = largest - 1 - back_f, largest - 1 - back_t
                falls = turn[low_f : low_f + grid[0], low_t : low_t + grid[1]]
                covers = (back_f < size) & (back_t < size)
                first_hit = jnp.where(covers, jnp.minimum(first_hit, falls), first_hit)
        # Patches of one block tie; of the last block a random part is masked.
        tie = jax.random.uniform(tie_key, (first_hit.size,))
        score = first_hit.reshape(-1).astype(jnp.float32) + tie
        return jax.lax.top_k(-score, num_masked)[1].astype(jnp.int32)

    return jax.vmap(one_clip)(jnp.arange(batch))


def reconstruct(
    log_mel: jax.Array, generative: jax.Array, mask_index: jax.Array, config: ModelConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Spectrograms for figures, float32 (B, T, F): the masked input (NaN), and the input with the
    predicted patches filled in. Frames after the last complete patch are copied in both.

    Args:
        log_mel: (B, T, F).
        generative: (B, M, patch_dim) predictions of `SSAST`.
        mask_index: Int (B, M).

    Raises:
        InputError: overlapping patches, for which the reconstruction is not unique.
    """
    size = config.patch_size
    if config.stride != size:
        raise InputError(
            f"stride {config.stride} differs from patch_size {size}; give a model without overlap."
        )
    grid = patch_grid(log_mel, size, size)
    patches = np.array(patchify(log_mel, size, size), np.float32)
    rows, masked = np.arange(len(patches))[:, None], np.asarray(mask_index)
    images = []
    for filling in (np.nan, np.asarray(generative, np.float32)):
        patches[rows, masked] = filling
        whole = patches.reshape(-1, *grid, *size).transpose(0, 2, 4, 1, 3)
        whole = whole.reshape(-1, grid[1] * size[1], grid[0] * size[0])
        image = np.array(log_mel, np.float32)
        image[:, : whole.shape[1], : whole.shape[2]] = whole
        images.append(image)
    return images[0], images[1]
