"""Fine-tuning strategies (``FinetuneConfig.strategy``): which parameters are trained, at which
rate, and from which step on. They are a separate tree: gradients, optimiser state and checkpoints
cover only them."""

import jax
import jax.numpy as jnp
import optax

from percepiano_ast.config import STRATEGIES, FinetuneConfig, ModelConfig, lookup
from percepiano_ast.dimensions import PERCEPIANO, RatingScale
from percepiano_ast.errors import InputError
from percepiano_ast.models import heads, lora
from percepiano_ast.models.cnn import Geometry


def check(config: FinetuneConfig, model: Geometry) -> None:
    """Raises InputError for an unknown strategy, or settings that are invalid for it."""
    lookup(dict.fromkeys(STRATEGIES), config.strategy, "strategy")
    if config.transcription_features and config.trains_encoder:
        raise InputError(
            f"strategy {config.strategy!r} changes the encoder, but the transcription for"
            " `transcription_features=true` needs 'frozen'"
        )
    if not isinstance(model, ModelConfig):
        if config.strategy not in ("full", "frozen"):
            raise InputError(
                f"strategy {config.strategy!r} works on transformer blocks only; train the"
                f" {model.name} with 'full'"
            )
    elif config.strategy == "last" and not 1 <= config.last_blocks <= model.depth:
        raise InputError(
            f"last_blocks={config.last_blocks} of a model with {model.depth} blocks: choose from 1"
            f" to {model.depth}"
        )
    if config.strategy == "lora" and config.lora_rank < 1:
        raise InputError(f"lora_rank={config.lora_rank} is too small; choose at least 1")
    if config.strategy == "gradual" and config.unfreeze_epochs < 1:
        epochs = config.unfreeze_epochs
        raise InputError(f"unfreeze_epochs={epochs} is too small; choose at least 1")


def split(config: FinetuneConfig, params: dict, questionnaire: RatingScale = PERCEPIANO) -> dict:
    """The trained part of ``params`` (``encoder``, ``head``), adapters and groups' variances."""
    head = params["head"]
    if config.rating_scale != "none":
        head = heads.standardised(head, config.head, questionnaire)
    trained = {"head": head}
    if config.weighting == "uncertainty":
        trained["groups"] = {"log_variance": jnp.zeros(len(questionnaire.groups))}
    encoder = params["encoder"]
    if config.strategy in ("gradual", "full"):
        trained["encoder"] = encoder
    elif config.strategy == "last":
        blocks = jax.tree.map(lambda leaf: leaf[-config.last_blocks :], encoder["blocks"])
        trained["encoder"] = {"blocks": blocks, "norm": encoder["norm"]}
    elif config.strategy == "lora":
        trained["lora"] = lora.init(encoder, config.lora_rank, jax.random.key(config.seed))
    return jax.tree.map(jnp.array, trained)


def join(config: FinetuneConfig, encoder: dict, trained: dict) -> dict:
    """``encoder`` and ``head`` of the rater: the original encoder with the trained part."""
    if config.strategy in ("gradual", "full"):
        encoder = trained["encoder"]
    elif config.strategy == "last":
        lower = jax.tree.map(lambda leaf: leaf[: -config.last_blocks], encoder["blocks"])
        blocks = jax.tree.map(
            lambda *parts: jnp.concatenate(parts), lower, trained["encoder"]["blocks"]
        )
        encoder = encoder | trained["encoder"] | {"blocks": blocks}
    elif config.strategy == "lora":
        encoder = lora.merge(encoder, trained["lora"], config.lora_alpha / config.lora_rank)
    return {"encoder": encoder, "head": trained["head"]}


def _ranks(encoder: dict) -> dict:
    """Depth of every parameter, counted from the top: arrays that broadcast against the parameters.
    1 for the top block; 0 above the blocks, and in an encoder without blocks."""
    lowest = jax.tree.leaves(encoder["blocks"])[0].shape[0] + 1 if "blocks" in encoder else 0

    def rank(path, leaf):
        if path[0].key == "blocks":  # stacked: the first axis is the depth
            return jnp.arange(leaf.shape[0], 0, -1).reshape(-1, *[1] * (leaf.ndim - 1))
        return jnp.full([1] * leaf.ndim, 0 if path[0].key == "norm" else lowest)

    return jax.tree_util.tree_map_with_path(rank, encoder)


def optimizer(
    config: FinetuneConfig, base: optax.GradientTransformation, total_steps: int
) -> optax.GradientTransformation:
    """``base`` with the learning rates of the strategy.

    The encoder's updates are multiplied by ``encoder_rate`` and by ``layer_decay`` to the power of
    the rank (see `_ranks`). With ``gradual``, one more block is unfrozen every ``unfreeze_epochs``,
    from the top; parameters above the blocks with the highest block, those below after the lowest.
    Gradients of the frozen part are zeroed before ``base``, for its moments, and updates after it,
    for weight decay.
    """

    def scale(updates, params=None):
        if "encoder" not in updates:
            return updates
        encoder, decay = updates["encoder"], jnp.float32(config.layer_decay)
        scaled = jax.tree.map(
            lambda leaf, rank: leaf * (config.encoder_rate * decay**rank), encoder, _ranks(encoder)
        )
        return updates | {"encoder": scaled}

    if config.strategy != "gradual":
        return optax.chain(base, optax.stateless(scale))
    steps_per_block = config.unfreeze_epochs * max(total_steps // config.epochs, 1)

    def freeze(updates, count, params=None):
        encoder, unfrozen = updates["encoder"], count // steps_per_block
        gated = jax.tree.map(
            lambda leaf, rank: jnp.where(jnp.maximum(rank, 1) <= unfrozen, leaf, 0.0),
            encoder,
            _ranks(encoder),
        )
        return updates | {"encoder": gated}, count + 1

    gate = optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), freeze)
    return optax.chain(gate, base, optax.stateless(scale), gate)
