"""From tokens to ratings: pooling over valid patches, the rating head, and the complete model.

Clips longer than one window are pooled exactly: the moments of windows (count, sum and sum of
squares over valid patches) add up. Mean and standard deviation are over time, for each band of
patches, so that bass and treble stay separate.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from percepiano_ast.config import HEADS, ModelConfig, lookup
from percepiano_ast.dimensions import PERCEPIANO, RatingScale
from percepiano_ast.errors import InputError
from percepiano_ast.models.ast import PREFIX_TOKENS, Encoder, windows
from percepiano_ast.models.cnn import ENCODERS, Geometry
from percepiano_ast.models.transformer import Compute, token_init

Moments = tuple[jax.Array, jax.Array, jax.Array]

_MIDDLE = 0.5  # of the rating scale
_LOG_VARIANCE = -4.0  # about that of PercePiano's ratings, whose standard deviation is 0.13
_EXTREME = 4.0  # standard deviations at which extra inputs are clipped
_VARIANCE_FLOOR = 1e-6  # LayerNorm's epsilon; keeps the gradient of the square root finite


def patch_validity(frame_valid: jax.Array, config: Geometry) -> jax.Array:
    """Bool (B, T), recorded frames -> Bool (B, N), patches with at least half of their frames."""
    size, stride = config.patch_size[1], config.stride[1]
    columns = 2 * windows(frame_valid, 1, size, stride).sum(axis=-1) >= size  # (B, T')
    shape = (columns.shape[0], config.grid[0], columns.shape[1])
    return jnp.broadcast_to(columns[:, None, :], shape).reshape(shape[0], -1)


def pool_moments(tokens: jax.Array, patch_valid: jax.Array) -> Moments:
    """(B, N, D), Bool (B, N) -> float32 count (B,), sum and sum of squares (B, D) of the valid."""
    tokens = jnp.where(patch_valid[:, :, None], tokens.astype(jnp.float32), 0.0)
    count = patch_valid.sum(axis=1).astype(jnp.float32)
    return count, tokens.sum(axis=1), jnp.square(tokens).sum(axis=1)


def combine_moments(moments: Moments, clip_index: jax.Array, num_clips: int) -> Moments:
    """Moments of W windows and their clip numbers, Int (W,) -> moments of ``num_clips`` clips."""
    count, total, squares = (jax.ops.segment_sum(x, clip_index, num_clips) for x in moments)
    return count, total, squares


def moments_to_embedding(count: jax.Array, total: jax.Array, total_squared: jax.Array) -> jax.Array:
    """Count (B,), sum (B, D), sum of squares (B, D) -> float32 mean and standard deviation
    (B, 2 D); the mean of a clip without valid patches is 0."""
    number = jnp.maximum(count, 1.0)[:, None]
    mean = total / number
    variance = jnp.maximum(total_squared / number - jnp.square(mean), 0.0)
    return jnp.concatenate([mean, jnp.sqrt(variance + _VARIANCE_FLOOR)], axis=1)


def head_groups(head: str, questionnaire: RatingScale = PERCEPIANO) -> dict[str, tuple[int, ...]]:
    """Name and dimensions (positions) of each part of a head with its own output layer; InputError
    for an unknown ``head``."""
    lookup(dict.fromkeys(HEADS), head, "head")
    if head == "joint":
        return {"all": tuple(range(len(questionnaire.dimensions)))}
    return dict(questionnaire.groups)


class CrossTaskAttention(nn.Module):
    """One learned query token per group (like an object in DETR, Carion et al. 2020) attends to the
    pooled bands; then the groups' tokens attend to one another.

    Attention of every task to shared features follows MTAN (Liu, Johns and Davison 2019), attention
    between tasks DenseMTL (Lopes, Vu and de Charette 2023), which both work on dense maps.
    """

    width: int
    bands: int
    moments: int
    groups: int
    num_heads: int = 4

    @nn.compact
    def __call__(self, embedding: jax.Array) -> jax.Array:
        """(B, moments * F' * D) -> (B, groups, width); InputError if ``num_heads`` does not divide
        ``width``."""
        if self.width % self.num_heads:
            raise InputError(
                f"a hidden width of {self.width} is not divisible by {self.num_heads} heads; choose"
                " a multiple"
            )
        batch = embedding.shape[0]
        by_moment = embedding.reshape(batch, self.moments, self.bands, -1)
        by_band = by_moment.swapaxes(1, 2).reshape(batch, self.bands, -1)
        tokens = nn.Dense(self.width, name="band")(by_band)
        tokens = tokens + self.param("position", token_init, (1, self.bands, self.width))
        # unit variance: similar queries would attend to the same bands
        queries = self.param("queries", nn.initializers.normal(1.0), (1, self.groups, self.width))
        queries = jnp.broadcast_to(queries, (batch, self.groups, self.width))
        read = nn.MultiHeadDotProductAttention(self.num_heads, name="read")
        queries = queries + read(queries, tokens)
        normed = nn.LayerNorm(name="norm")(queries)
        exchange = nn.MultiHeadDotProductAttention(self.num_heads, name="exchange")
        return queries + exchange(normed, normed)


class RatingHead(nn.Module):
    """LayerNorm, then for each group of dimensions Dense - GELU - Dropout - Dense.

    Attributes:
        hidden: width of each group's hidden layer.
        dropout: rate.
        kind: see `FinetuneConfig.head`; ``attention`` adds the groups' tokens to their hidden
            layers before the GELU.
        pooling: ``mean`` drops the standard deviations over time.
        bands: F' of the embedding.
        uncertain: whether to predict a variance for every rating.
        extra_features: number of standardised extra inputs after the embedding.
        questionnaire: the K dimensions to rate, 19 for PercePiano.
    """

    hidden: int = 64
    dropout: float = 0.1
    kind: str = "grouped"
    pooling: str = "mean_std"
    bands: int = 1
    uncertain: bool = False
    questionnaire: RatingScale = PERCEPIANO
    extra_features: int = 0

    def __call__(self, embedding: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """(B, 2 F' D + extra_features) -> float32 ratings (B, K) in the order of the questionnaire;
        needs a ``dropout`` rng unless deterministic."""
        return self.distribution(embedding, deterministic=deterministic)[0]

    @nn.compact
    def distribution(
        self, embedding: jax.Array, *, deterministic: bool = True
    ) -> tuple[jax.Array, jax.Array | None]:
        """The ratings and, if ``uncertain``, the log of their variance (B, K) (Nix and Weigend
        1994, section 2)."""
        split = [embedding.shape[1] - self.extra_features]
        embedding, extra = jnp.split(embedding, split, axis=1)
        if self.pooling == "mean":
            embedding = embedding[:, : embedding.shape[1] // 2]
        normed = nn.LayerNorm(name="norm")(embedding.astype(jnp.float32))
        groups = head_groups(self.kind, self.questionnaire)
        tokens = None
        if self.kind == "attention":
            moments = 1 if self.pooling == "mean" else 2
            shape = self.hidden, self.bands, moments, len(groups)
            tokens = CrossTaskAttention(*shape, name="attention")(normed)
        if self.extra_features:  # the extra inputs are not part of the LayerNorm
            clipped = jnp.clip(extra.astype(jnp.float32), -_EXTREME, _EXTREME)
            normed = jnp.concatenate([normed, clipped], axis=1)
        means, variances = [], []
        for number, (group, indices) in enumerate(groups.items()):
            hidden = nn.Dense(self.hidden, name=f"{group}_hidden")(normed)
            hidden = hidden if tokens is None else hidden + tokens[:, number]
            hidden = nn.gelu(hidden, approximate=False)
            hidden = nn.Dropout(self.dropout, deterministic=deterministic)(hidden)
            means.append(_output(len(indices), _MIDDLE, f"{group}_out")(hidden))
            if self.uncertain:
                output = _output(len(indices), _LOG_VARIANCE, f"{group}_log_variance")
                variances.append(output(hidden))
        order = np.argsort(np.concatenate(list(groups.values())))
        log_variance = jnp.concatenate(variances, axis=1)[:, order] if variances else None
        return jnp.concatenate(means, axis=1)[:, order], log_variance


def _output(features: int, bias: float, name: str) -> nn.Dense:
    # small weights: initial predictions are near the middle of the scale
    small = nn.initializers.variance_scaling(0.01, "fan_in", "truncated_normal")
    bias_init = nn.initializers.constant(bias)
    return nn.Dense(features, kernel_init=small, bias_init=bias_init, name=name)


def standardised(head: dict, kind: str, questionnaire: RatingScale = PERCEPIANO) -> dict:
    """The initial head for standardised ratings, with zero biases: mean 0 and, if it predicts a
    variance, variance 1."""
    changed = {}
    for group in head_groups(kind, questionnaire):
        for name in (f"{group}_out", f"{group}_log_variance"):
            if name in head:
                changed[name] = head[name] | {"bias": jnp.zeros_like(head[name]["bias"])}
    return head | changed


def in_rating_units(
    head: dict,
    kind: str,
    mean: np.ndarray,
    std: np.ndarray,
    questionnaire: RatingScale = PERCEPIANO,
) -> dict:
    """The head with outputs rescaled to ``mean + std * output``, (K,) each, so that it predicts in
    rating units."""
    changed = {}
    for group, indices in head_groups(kind, questionnaire).items():
        shift, scale = (jnp.asarray(values[list(indices)], jnp.float32) for values in (mean, std))
        kernel, bias = (head[f"{group}_out"][name] for name in ("kernel", "bias"))
        changed[f"{group}_out"] = {"kernel": kernel * scale[None, :], "bias": bias * scale + shift}
        if (name := f"{group}_log_variance") in head:
            changed[name] = head[name] | {"bias": head[name]["bias"] + 2 * jnp.log(scale)}
    return head | changed


class RatingModel(nn.Module):
    """Encoder, float32 pooling and `RatingHead`. ``config`` is of the AST, whose parameters are
    interchangeable with those in `ssast.SSAST`, or of an alternative encoder in `ENCODERS`."""

    config: Geometry
    compute: Compute = Compute()
    hidden: int = RatingHead.hidden
    dropout: float = RatingHead.dropout
    kind: str = RatingHead.kind
    pooling: str = RatingHead.pooling
    uncertain: bool = RatingHead.uncertain
    questionnaire: RatingScale = PERCEPIANO
    extra_features: int = RatingHead.extra_features

    def setup(self) -> None:
        if isinstance(self.config, ModelConfig):
            self.encoder: nn.Module = Encoder(self.config, self.compute)
        else:
            self.encoder = ENCODERS[self.config.name].module(self.config, self.compute.dtype)
        names = "hidden dropout kind pooling uncertain questionnaire extra_features".split()
        options = {name: getattr(self, name) for name in names}
        self.head = RatingHead(bands=self.config.grid[0], **options)

    def __call__(
        self, log_mel: jax.Array, frame_valid: jax.Array, *, deterministic: bool = True
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Rate clips of one window each, with the extra inputs at their mean over clips, 0.

        Args:
            log_mel: (B, T, F), normalised.
            frame_valid: Bool (B, T), False for padded frames, whose content has no effect.

        Returns:
            ratings of `RatingHead`, and the encoder's intermediates with ``tokens`` (B, 2 + N, D),
            ``patch_valid`` (B, N) and ``embedding`` (B, 2 F' D).
        """
        moments, intermediates = self._encode(log_mel, frame_valid)
        embedding = moments_to_embedding(*moments)
        given = jnp.pad(embedding, ((0, 0), (0, self.extra_features)))
        ratings = self.head(given, deterministic=deterministic)
        return ratings, intermediates | {"embedding": embedding}

    def embed(self, log_mel: jax.Array, frame_valid: jax.Array) -> Moments:
        """Moments of every window, for `combine_moments`; arguments as in ``__call__``."""
        return self._encode(log_mel, frame_valid)[0]

    def attend(
        self, log_mel: jax.Array, frame_valid: jax.Array
    ) -> tuple[Moments, dict[str, jax.Array]]:
        """As `embed`, and the intermediates with ``attention0`` ... and ``patch_valid``."""
        return self._encode(log_mel, frame_valid, need_attention=True)

    def rate(self, embedding: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Ratings float32 (B, K) of pooled clips (B, 2 F' D + extra_features)."""
        return self.head(embedding, deterministic=deterministic)

    def distribution(
        self, embedding: jax.Array, *, deterministic: bool = True
    ) -> tuple[jax.Array, jax.Array | None]:
        """As `RatingHead.distribution`."""
        return self.head.distribution(embedding, deterministic=deterministic)

    def _encode(
        self, log_mel: jax.Array, frame_valid: jax.Array, *, need_attention: bool = False
    ) -> tuple[Moments, dict[str, jax.Array]]:
        # A patch at the border may hold padded frames: set them to the training mean, 0.
        log_mel = jnp.where(frame_valid[:, :, None], log_mel, 0.0)
        patch_valid = patch_validity(frame_valid, self.config)
        if not isinstance(self.config, ModelConfig):
            columns, intermediates = self.encoder(log_mel)
            return pool_moments(columns, patch_valid), intermediates | {"patch_valid": patch_valid}
        tokens, intermediates = self.encoder(
            log_mel, patch_valid=patch_valid, need_attention=need_attention
        )
        batch, bands, width = len(tokens), self.config.grid[0], tokens.shape[2]
        grid = tokens[:, PREFIX_TOKENS:].reshape(batch, bands, -1, width).transpose(0, 2, 1, 3)
        columns = grid.reshape(batch, -1, bands * width)  # one vector per time step, all bands
        moments = pool_moments(columns, patch_valid.reshape(batch, bands, -1)[:, 0])
        return moments, intermediates | {"tokens": tokens, "patch_valid": patch_valid}
