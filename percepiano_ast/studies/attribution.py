"""Attribution of a rating to parts of a spectrogram.

The embeddings of a clip's windows add up, and the rating of a clip (T, F) is a function of that
sum. The gradient of the rating with respect to the sum is therefore the same for all windows, and
is backpropagated through each of them. Maps are (T, F) over the whole clip, in units of the rating.
Frames in two windows get the sum of both attributions, because they count twice in the rating.
Padded frames get 0, because they do not affect the rating.
"""

import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from percepiano_ast.config import ModelConfig
from percepiano_ast.errors import InputError
from percepiano_ast.models.ast import PREFIX_TOKENS, patchify
from percepiano_ast.models.heads import patch_validity

# frames computed at once: about 4 GB for the base size, including the backward pass
FRAMES = 8 * 1024
STEPS = 32  # Gauss-Legendre points on the path from the baseline
STAGES = 4  # of randomised blocks

Tree = dict | tuple | jax.Array


@dataclass(frozen=True)
class ModelFunctions:
    """A rating model's functions, as attribution needs them.

    Attributes:
        embed: (params, log-mel (B, T, F), valid frames Bool (B, T)) -> arrays (B, ...) that add up
            over a clip's windows.
        rate: (params, these sums (C, ...) of C clips) -> ratings (C, D).
        n_frames: T, of a window.
        attend: (params, log-mel, valid frames, shift (depth, B, H, L, L)) -> the result of
            ``embed``, the attention weights of all layers (depth, B, H, L, L) with ``shift`` added,
            and valid patches Bool (B, N). Only for attention maps, as ``config``.
    """

    embed: Callable[[Tree, jax.Array, jax.Array], Tree]
    rate: Callable[[Tree, Tree], jax.Array]
    n_frames: int
    attend: Callable | None = None
    config: ModelConfig | None = None


class Attribution(NamedTuple):
    """Integrated gradients of one clip.

    Attributes:
        maps: float32 (D, T, F): contribution of each point to each rating, positive or negative,
            compared with the baseline.
        ratings, baseline: float32 (D,) of the clip and of the baseline.
        gap: float32 (D,), ``ratings - baseline - sum of the map``: the error of the numerical
            integration.
    """

    maps: np.ndarray
    ratings: np.ndarray
    baseline: np.ndarray
    gap: np.ndarray


# --- Windows and batches --------------------------------------------------------------------------


def rate_variants(
    functions: ModelFunctions, params: Tree, variants: list[np.ndarray], starts: Iterable[int]
) -> np.ndarray:
    """Ratings float32 (V, D) of V normalised clips of equal shape (T, F), with windows that start
    at ``starts``."""
    rows = (
        (number, *row)
        for number, clip in enumerate(variants)
        for row in zip(*_cut(clip, starts, functions.n_frames))
    )
    return np.asarray(_rate(functions, params, _embed(functions, params, rows)))


def _cut(clip: np.ndarray, starts: Iterable[int], n: int) -> tuple[np.ndarray, np.ndarray]:
    """(T, F) -> windows float32 (W, n, F), padded with 0 at the end, and their valid frames Bool
    (W, n)."""
    frames = np.array([*starts])[:, None] + np.arange(n)
    padded = np.pad(clip, ((0, max(n - len(clip), 0)), (0, 0)))
    return padded[frames].astype(np.float32), frames < len(clip)


def _overlap_add(windows: np.ndarray, starts: Iterable[int], length: int) -> np.ndarray:
    """Windows (..., W, n, F) -> clip (..., T, F)."""
    *shape, _, n, bands = windows.shape
    clip = np.zeros((*shape, max(length, n), bands), np.float32)
    for number, start in enumerate(starts):
        clip[..., start : start + n, :] += windows[..., number, :, :]
    return clip[..., :length, :]


def _batches(rows: Iterable[tuple], n_frames: int) -> Iterator[tuple]:
    """Rows of (number, arrays ...) -> numbers and arrays (B, ...); the last batch is padded with
    copies of its last row."""
    rows, size = iter(rows), max(FRAMES // n_frames, 1)
    while batch := list(itertools.islice(rows, size)):
        numbers = [row[0] for row in batch]
        batch += batch[-1:] * (size - len(batch))
        _, *columns = zip(*batch)
        yield numbers, *(jax.tree.map(lambda *x: np.stack(x), *column) for column in columns)


def _embed(functions: ModelFunctions, params: Tree, rows: Iterable[tuple]) -> Tree:
    """Rows (clip number, window (n, F), valid frames (n,)) -> sums (C, ...); clips are numbered
    from 0, in order."""
    parts, clips = [], []
    for numbers, *batch in _batches(rows, functions.n_frames):
        parts.append(jax.tree.map(np.asarray, _embed_rows(functions, params, *batch)))
        clips += numbers

    def total(*arrays):
        values = np.concatenate(arrays)[: len(clips)]
        sums = np.zeros((clips[-1] + 1, *values.shape[1:]), values.dtype)
        np.add.at(sums, clips, values)
        return sums

    return jax.tree.map(total, *parts)


_embed_rows = jax.jit(lambda functions, *inputs: functions.embed(*inputs), static_argnums=0)
_rate = jax.jit(lambda functions, *inputs: functions.rate(*inputs), static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _rating_gradients(functions: ModelFunctions, params: Tree, sums: Tree, dimensions) -> Tree:
    """Sums (C, ...), Int (D,) -> d rating / d sums, (C, D, ...); each clip's rating depends only on
    its own sums."""
    _, pull = jax.vjp(lambda sums: functions.rate(params, sums)[:, dimensions], sums)
    n_clips, n = jax.tree.leaves(sums)[0].shape[0], len(dimensions)
    wanted = jnp.broadcast_to(jnp.eye(n)[:, None, :], (n, n_clips, n))
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), jax.vmap(lambda row: pull(row)[0])(wanted))


# --- Integrated gradients -------------------------------------------------------------------------


def integrated_gradients(
    functions: ModelFunctions,
    params: Tree,
    clip: np.ndarray,
    baseline: np.ndarray,
    *,
    starts: Sequence[int],
    dimensions: Sequence[int],
    steps: int = STEPS,
) -> Attribution:
    """Integrated gradients of whole-clip ratings (Sundararajan, Taly and Yan 2017, equation 1).

    ``(x - b) * integral over a from 0 to 1 of the gradient at b + a (x - b)``, by Gauss-Legendre
    quadrature. The sum of a map is the rating of the clip minus that of the baseline (their
    proposition 1, completeness); ``gap`` is the numerical error.

    Cost: ``steps`` x windows rows, each two forward passes and one backward pass per dimension,
    ``FRAMES`` frames at a time.

    Args:
        clip, baseline: (T, F), normalised.
        starts: first frames of the windows.
        dimensions: positions of the ratings to explain.
        steps: points of the quadrature.

    Raises:
        InputError: ``clip`` and ``baseline`` of different shapes, or fewer than one step.
    """
    if clip.shape != baseline.shape or steps < 1:
        raise InputError(
            f"clip {clip.shape}, baseline {baseline.shape}, {steps} steps: give equal shapes, and"
            " at least one step."
        )
    first, valid = _cut(baseline, starts, functions.n_frames)
    difference, _ = _cut(clip - baseline, starts, functions.n_frames)
    points, weights = np.polynomial.legendre.leggauss(steps)
    # The end points come last: only their ratings are needed, not their gradients.
    path = np.array([*(points + 1) / 2, 0, 1], np.float32)
    rows: Iterable[tuple] = (  # clip number, window, valid frames
        (step, first[window] + at * difference[window], valid[window])
        for step, at in enumerate(path)
        for window in range(len(first))
    )
    sums = _embed(functions, params, rows)
    ratings = np.asarray(_rate(functions, params, sums))[:, list(dimensions)]
    on_path = jax.tree.map(lambda x: x[:steps], sums)
    positions = jnp.asarray(dimensions, jnp.int32)
    gradients = jax.tree.map(np.asarray, _rating_gradients(functions, params, on_path, positions))
    rows = (
        (
            (step, window),
            first[window] + path[step] * difference[window],
            valid[window],
            jax.tree.map(operator.itemgetter(step), gradients),
        )
        for step in range(steps)
        for window in range(len(first))
    )
    total = np.zeros((len(first), len(dimensions), *first.shape[1:]), np.float64)
    for numbers, *batch in _batches(rows, functions.n_frames):
        found = np.asarray(_input_gradients(functions, params, *batch))
        for (step, window), gradient in zip(numbers, found):
            total[window] += weights[step] / 2 * gradient
    maps = _overlap_add(np.swapaxes(total * difference[:, None], 0, 1), starts, len(clip))
    gap = ratings[steps + 1] - ratings[steps] - maps.sum(axis=(1, 2), dtype=np.float64)
    return Attribution(maps, ratings[steps + 1], ratings[steps], gap.astype(np.float32))


@functools.partial(jax.jit, static_argnums=0)
def _input_gradients(functions: ModelFunctions, params: Tree, log_mel, valid, gradients: Tree):
    """Gradients (B, D, ...) w.r.t. the sums -> gradients (B, D, T, F) w.r.t. windows (B, T, F); one
    forward pass for all D."""
    _, pull = jax.vjp(lambda log_mel: functions.embed(params, log_mel, valid), log_mel)
    return jnp.swapaxes(jax.vmap(lambda row: pull(row)[0], in_axes=1)(gradients), 0, 1)


# --- Attention ------------------------------------------------------------------------------------


def rollout(attention: jax.Array) -> jax.Array:
    """Attention rollout (Abnar and Zuidema 2020, equation 1): (depth, B, H, L, L) -> (B, L, L).

    Heads are averaged, the identity of the residual connection gets weight 1/2 in every layer, and
    layers are multiplied. Row i holds the shares of the inputs in token i, if only attention mixed
    tokens; it sums to 1.
    """
    identity = total = jnp.eye(attention.shape[-1])[None, :, :]
    for weights in attention:
        total = (0.5 * weights.mean(axis=1) + 0.5 * identity) @ total
    return total


def relevance(attention: jax.Array, gradients: jax.Array) -> jax.Array:
    """Relevance through self-attention (Chefer, Gur and Wolf 2021, equations 5 and 6): twice
    (depth, B, H, L, L) -> (B, L, L).

    Each layer adds the mean over heads of the positive part of gradient x attention, multiplied by
    the relevance so far. The initial identity, which is the same for every patch, is subtracted at
    the end.
    """
    identity = total = jnp.eye(attention.shape[-1])[None, :, :]
    for weights, gradient in zip(attention, gradients):
        total = total + jax.nn.relu(weights * gradient).mean(axis=1) @ total
    return total - identity


def attention_maps(
    functions: ModelFunctions,
    params: Tree,
    clip: np.ndarray,
    *,
    starts: Sequence[int],
    dimensions: Sequence[int],
    towards: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Rollout (T, F), one for all dimensions, and relevance (D, T, F), both non-negative, of a
    normalised clip (T, F).

    The rating pools over patch tokens, so the maps are means over the rows of valid patches.
    Rollout sums to 1 minus the share of the two prefix tokens. A patch's value is distributed over
    its points. Cost per window: one forward pass for rollout, two forward passes and one backward
    pass per dimension for relevance.

    Args:
        towards: (D,) of +1 or -1: relevance for an increase or a decrease of the rating.

    Raises:
        InputError: a model without ``attend``.
    """
    if functions.attend is None or functions.config is None:
        raise InputError("this model has no attention weights; use integrated gradients")
    windows, valid = _cut(clip, starts, functions.n_frames)
    positions, signs = jnp.asarray(dimensions, jnp.int32), jnp.asarray(towards, jnp.float32)
    sums = _embed(functions, params, ((0, *row) for row in zip(windows, valid)))
    gradients = jax.tree.map(lambda x: x[0], _rating_gradients(functions, params, sums, positions))
    maps = [  # one window at a time: (depth, H, L, L) is large
        np.asarray(_window_maps(functions, params, *row, gradients, signs))
        for row in zip(windows, valid)
    ]
    whole = _overlap_add(np.stack(maps, axis=1), starts, len(clip))
    rows = int(patch_validity(jnp.asarray(valid), functions.config).sum())
    return whole[0] / max(rows, 1), whole[1:]


@functools.partial(jax.jit, static_argnums=0)
def _window_maps(functions: ModelFunctions, params: Tree, window, valid, gradients: Tree, towards):
    """One window (T, F) -> (1 + D, T, F): rollout, then relevance for each dimension, summed over
    the rows of valid patches."""
    model_attend, config = functions.attend, functions.config
    assert model_attend is not None and config is not None  # checked by `attention_maps`

    def attend(shift):
        sums, weights, patch_valid = model_attend(params, window[None], valid[None], shift)
        return sums, (weights, patch_valid[0])

    shape = jax.eval_shape(attend, None)[1][0]
    _, pull, (weights, patch_valid) = jax.vjp(attend, jnp.zeros(shape.shape), has_aux=True)
    found = [rollout(weights)[0]]
    for number in range(len(towards)):
        (gradient,) = pull(jax.tree.map(operator.itemgetter((None, number)), gradients))
        found.append(relevance(weights, gradient * towards[number])[0])
    between_patches = jnp.stack(found)[:, PREFIX_TOKENS:, PREFIX_TOKENS:]
    rows = jnp.where(patch_valid[None, :, None], between_patches, 0.0).sum(axis=1)
    spread = spread_patches(jnp.where(patch_valid[None, :], rows, 0.0), config)
    return spread * valid[None, :, None]


def spread_patches(values: jax.Array, config: ModelConfig) -> jax.Array:
    """Values (B, N) of patches -> (B, T, F), each distributed evenly over its patch; overlapping
    patches are added."""
    empty = jnp.zeros((values.shape[0], config.n_frames, config.n_mels))
    _, pull = jax.vjp(lambda x: patchify(x, config.patch_size, config.stride), empty)
    shares = values[:, :, None] / config.patch_dim
    return pull(jnp.broadcast_to(shares, (*values.shape, config.patch_dim)))[0]


# --- Randomised weights ---------------------------------------------------------------------------


def randomised(params: dict, fresh: dict) -> Iterator[tuple[str, dict]]:
    """Parameters of a `heads.RatingModel`, ``head`` and ``encoder``, randomised from the top down
    (cascading, Adebayo et al. 2018, section 3).

    ``fresh`` is the same tree with random values. Yields the name of the randomised part, and the
    parameters: the head, then more and more blocks, the last one first, at last everything.
    """
    yield "head", params | {"head": fresh["head"]}
    blocks, fresh_blocks = (tree["encoder"]["blocks"] for tree in (params, fresh))
    depth = jax.tree.leaves(blocks)[0].shape[0]
    trained = {round(depth * (1 - stage / STAGES)) for stage in range(1, STAGES + 1)} - {depth}
    for n in sorted(trained, reverse=True):
        mixed = jax.tree.map(lambda *x: jnp.concatenate([x[0][:n], x[1][n:]]), blocks, fresh_blocks)  # noqa: B023
        encoder = params["encoder"] | {"blocks": mixed, "norm": fresh["encoder"]["norm"]}
        yield f"{depth - n} of {depth} blocks", {"head": fresh["head"], "encoder": encoder}
    yield "everything", fresh
