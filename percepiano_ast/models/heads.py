"""From tokens to ratings: pooling over real patches, the head in three groups, and the whole rater.

A clip longer than one window is pooled exactly: every window gives its count, sum and sum of squares over real patches,
and those moments add up. Mean and standard deviation together rate better than the mean alone. They are taken
over time for each band of patches, so that bass and treble stay apart.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from percepiano_ast.config import ModelConfig
from percepiano_ast.dimensions import group_indices
from percepiano_ast.models.ast import PREFIX_TOKENS, Encoder, windows
from percepiano_ast.models.transformer import Compute

Moments = tuple[jax.Array, jax.Array, jax.Array]

_VARIANCE_FLOOR = 1e-6  # LayerNorm's epsilon; keeps the gradient of the square root finite where all tokens agree


def patch_validity(frame_valid: jax.Array, config: ModelConfig) -> jax.Array:
    """Bool (B, T), True for recorded frames -> Bool (B, N) for ``config.n_mels`` bands.

    A patch is valid when at least half of its frames are recorded.
    """
    size, stride = config.patch_size[1], config.stride[1]
    columns = 2 * windows(frame_valid, 1, size, stride).sum(axis=-1) >= size  # (B, T')
    shape = (columns.shape[0], config.grid[0], columns.shape[1])
    return jnp.broadcast_to(columns[:, None, :], shape).reshape(shape[0], -1)


def pool_moments(tokens: jax.Array, patch_valid: jax.Array) -> Moments:
    """(B, N, D), Bool (B, N) -> float32 count (B,), sum (B, D), sum of squares (B, D) over the valid ones of N."""
    tokens = jnp.where(patch_valid[:, :, None], tokens.astype(jnp.float32), 0.0)
    return patch_valid.sum(axis=1).astype(jnp.float32), tokens.sum(axis=1), jnp.square(tokens).sum(axis=1)


def combine_moments(moments: Moments, clip_index: jax.Array, num_clips: int) -> Moments:
    """Moments of W windows, Int (W,) saying whose window it is -> moments of ``num_clips`` clips, by adding up."""
    return tuple(jax.ops.segment_sum(moment, clip_index, num_segments=num_clips) for moment in moments)


def moments_to_embedding(count: jax.Array, total: jax.Array, total_squared: jax.Array) -> jax.Array:
    """Count (B,), sum (B, D), sum of squares (B, D) -> mean and standard deviation (B, 2 D), float32.

    A clip without a valid patch gets mean 0. The gradient is finite also where all tokens are equal.
    """
    number = jnp.maximum(count, 1.0)[:, None]
    mean = total / number
    variance = jnp.maximum(total_squared / number - jnp.square(mean), 0.0)
    return jnp.concatenate([mean, jnp.sqrt(variance + _VARIANCE_FLOOR)], axis=1)


def _columns(tokens: jax.Array, patch_valid: jax.Array, bands: int) -> tuple[jax.Array, jax.Array]:
    """(B, F' * T', D) -> (B, T', F' * D): what all bands say at one time, as one vector; and Bool (B, T')."""
    batch, number, width = tokens.shape
    grid = tokens.reshape(batch, bands, number // bands, width).transpose(0, 2, 1, 3)
    return grid.reshape(batch, number // bands, bands * width), patch_valid.reshape(batch, bands, -1)[:, 0]


class RatingHead(nn.Module):
    """LayerNorm, then for each group of dimensions Dense - GELU - Dropout - Dense; ratings are on the 0 to 1 scale.

    Attributes:
        hidden: width of each group's hidden layer.
        dropout: rate.
    """

    hidden: int = 64
    dropout: float = 0.1

    @nn.compact
    def __call__(self, embedding: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """(B, 2 D) -> float32 ratings (B, 19) in the order of ``dimensions.KEYS``.

        Needs a ``dropout`` rng unless deterministic.
        """
        normed = nn.LayerNorm(name="norm")(embedding.astype(jnp.float32))
        groups = group_indices()
        parts = []
        for group, indices in groups.items():
            hidden = nn.gelu(nn.Dense(self.hidden, name=f"{group}_hidden")(normed), approximate=False)
            hidden = nn.Dropout(self.dropout, deterministic=deterministic)(hidden)
            # Training starts near the middle of the scale, not a standard deviation of its own away.
            out = nn.Dense(
                len(indices),
                kernel_init=nn.initializers.variance_scaling(0.01, "fan_in", "truncated_normal"),
                bias_init=nn.initializers.constant(0.5),
                name=f"{group}_out",
            )
            parts.append(out(hidden))
        order = np.argsort(np.concatenate(list(groups.values())))
        return jnp.concatenate(parts, axis=1)[:, order]


class Rater(nn.Module):
    """Encoder and rating head: ``params['encoder']`` is that of `ssast.SSAST` and can be exchanged with it.

    Attributes:
        config: geometry.
        compute: of the encoder, see `transformer.Compute`; pooling and head are float32.
        hidden, dropout: of the head.
    """

    config: ModelConfig
    compute: Compute = Compute()
    hidden: int = RatingHead.hidden
    dropout: float = RatingHead.dropout

    def setup(self) -> None:
        self.encoder = Encoder(self.config, self.compute)
        self.head = RatingHead(self.hidden, self.dropout)

    def __call__(
        self, log_mel: jax.Array, frame_valid: jax.Array, *, deterministic: bool = True
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Rate clips of one window each.

        Args:
            log_mel: (B, T, F), normalised.
            frame_valid: Bool (B, T), False where the clip is padded; what stands there has no influence.
            deterministic: without dropout; otherwise a ``dropout`` rng is needed.

        Returns:
            ratings float32 (B, 19) in the order of ``dimensions.KEYS``, and the encoder's intermediates with ``tokens``
            (B, 2 + N, D), ``patch_valid`` (B, N) and ``embedding`` (B, 2 F' D).
        """
        moments, intermediates = self._encode(log_mel, frame_valid)
        embedding = moments_to_embedding(*moments)
        return self.head(embedding, deterministic=deterministic), intermediates | {"embedding": embedding}

    def embed(self, log_mel: jax.Array, frame_valid: jax.Array) -> Moments:
        """Moments of every window (arguments as in a call), to be added up with `combine_moments`."""
        return self._encode(log_mel, frame_valid)[0]

    def attend(self, log_mel: jax.Array, frame_valid: jax.Array) -> tuple[Moments, dict[str, jax.Array]]:
        """As `embed`, and the encoder's intermediates with ``attention0`` ... and ``patch_valid``."""
        return self._encode(log_mel, frame_valid, need_attention=True)

    def rate(self, embedding: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Ratings float32 (B, 19) of pooled clips (B, 2 F' D), see `moments_to_embedding`."""
        return self.head(embedding, deterministic=deterministic)

    def _encode(
        self, log_mel: jax.Array, frame_valid: jax.Array, *, need_attention: bool = False
    ) -> tuple[Moments, dict[str, jax.Array]]:
        # A patch at the border holds padded frames: they are put at the training mean, whatever they were.
        log_mel = jnp.where(frame_valid[:, :, None], log_mel, 0.0)
        patch_valid = patch_validity(frame_valid, self.config)
        tokens, intermediates = self.encoder(log_mel, patch_valid=patch_valid, need_attention=need_attention)
        moments = pool_moments(*_columns(tokens[:, PREFIX_TOKENS:], patch_valid, self.config.grid[0]))
        return moments, intermediates | {"tokens": tokens, "patch_valid": patch_valid}
