"""Pre-training objectives with one interface: masked patches, transcription, or both.

An objective draws the random part of a batch (`draw`), computes losses of normalised windows
(`losses`), and in validation computes sums over batches (`measure`) and scores from these sums
(`scores`). Its parameters hold the encoder as ``encoder``.
"""

from typing import Protocol

import jax
import jax.numpy as jnp
from flax import linen as nn

from percepiano_ast.config import ModelConfig, PretrainConfig, lookup
from percepiano_ast.models import ssast, transcription
from percepiano_ast.models.transformer import Compute
from percepiano_ast.music.piano_roll import N_KEYS, FrameTargets


class Objective(Protocol):
    """One of `OBJECTIVES`.

    Attributes:
        names: of the losses, ``loss`` first.
    """

    names: tuple[str, ...]

    @property
    def module(self) -> nn.Module:
        """The Flax module; for the joint objective, the SSAST."""

    def init(self, rng: jax.Array, log_mel: jax.Array) -> dict:
        """Parameters, initialised with one window (1, T, F)."""

    def draw(self, rng: jax.Array, batch: int) -> dict[str, jax.Array]:
        """Random values for each clip of a batch, to be added to the batch."""

    def losses(self, params: dict, log_mel: jax.Array, batch: dict) -> dict[str, jax.Array]:
        """The losses ``names`` of normalised windows (B, T, F), float32 scalars."""

    def measure(self, params: dict, log_mel: jax.Array, batch: dict) -> dict[str, jax.Array]:
        """Float32 scalars of a validation batch, to be summed over batches."""

    def scores(self, total: dict[str, float], batches: int) -> dict[str, float]:
        """Validation scores from the sums over ``batches`` batches, ``loss`` first."""


class Masked:
    """SSAST (Gong et al. 2022), see `models.ssast`."""

    names = ("loss", "nce", "mse", "accuracy")

    def __init__(
        self, model: ModelConfig, config: PretrainConfig, compute: Compute, num_descriptors: int = 0
    ):
        self.model, self.config = model, config
        self.module = ssast.SSAST(model, compute, config.decoder_depth)

    def init(self, rng: jax.Array, log_mel: jax.Array) -> dict:
        """See `Objective`."""
        mask = jnp.arange(self.config.num_masked(self.model))[None, :]
        return self.module.init(rng, log_mel, mask)["params"]

    def draw(self, rng: jax.Array, batch: int) -> dict[str, jax.Array]:
        """``mask``: indices of masked patches, int32 (batch, masked)."""
        masked = self.config.num_masked(self.model)
        return {
            "mask": ssast.sample_mask_index(
                rng, batch, self.model.grid, masked, self.config.cluster
            )
        }

    def losses(self, params: dict, log_mel: jax.Array, batch: dict) -> dict[str, jax.Array]:
        """See `Objective`; reads the batch's ``mask``."""
        outputs, _ = self.module.apply({"params": params}, log_mel, batch["mask"])
        config = self.config
        return ssast.losses(
            outputs, generative_weight=config.generative_weight, softmax_over=config.softmax_over
        )

    measure = losses

    def scores(self, total: dict[str, float], batches: int) -> dict[str, float]:
        """Means of the losses."""
        return {name: total[name] / batches for name in self.names}


class Transcription:
    """Onsets, keys, strings, velocity, pedals and descriptors, see `models.transcription`."""

    names = transcription.LOSSES

    def __init__(
        self, model: ModelConfig, config: PretrainConfig, compute: Compute, num_descriptors: int = 0
    ):
        transcription.steps_of(model)
        self.module = transcription.TranscriptionModel(model, compute, num_descriptors)

    def init(self, rng: jax.Array, log_mel: jax.Array) -> dict:
        """See `Objective`."""
        return self.module.init(rng, log_mel)["params"]

    def draw(self, rng: jax.Array, batch: int) -> dict[str, jax.Array]:
        """Nothing is drawn."""
        return {}

    def losses(self, params: dict, log_mel: jax.Array, batch: dict) -> dict[str, jax.Array]:
        """See `Objective`; reads the batch's ``targets`` and ``descriptors``."""
        outputs, _ = self.module.apply({"params": params}, log_mel)
        return transcription.losses(outputs, batch["targets"], batch["descriptors"])

    def measure(self, params: dict, log_mel: jax.Array, batch: dict) -> dict[str, jax.Array]:
        """Losses, and `transcription.metric_counts`."""
        outputs, _ = self.module.apply({"params": params}, log_mel)
        known = batch["targets"], batch["descriptors"]
        return transcription.losses(outputs, *known) | {
            f"count_{k}": v for k, v in transcription.metric_counts(outputs, *known).items()
        }

    def scores(self, total: dict[str, float], batches: int) -> dict[str, float]:
        """Means of the losses, and `transcription.METRICS`."""
        counted = {
            name.removeprefix("count_"): value
            for name, value in total.items()
            if name.startswith("count_")
        }
        return {name: total[name] / batches for name in self.names} | transcription.metrics(counted)


class Joint:
    """Both objectives on one encoder: it encodes the masked window and the complete one, and the
    losses are added."""

    names = (
        "loss",
        *(f"masked_{name}" for name in Masked.names),
        *(f"heard_{name}" for name in Transcription.names),
    )

    def __init__(
        self, model: ModelConfig, config: PretrainConfig, compute: Compute, num_descriptors: int = 0
    ):
        parts = (Masked, Transcription)
        self.masked, self.heard = (part(model, config, compute, num_descriptors) for part in parts)
        self.module = self.masked.module

    def init(self, rng: jax.Array, log_mel: jax.Array) -> dict:
        """Parameters of both objectives, with one shared encoder."""
        return self.heard.init(rng, log_mel) | self.masked.init(rng, log_mel)

    def draw(self, rng: jax.Array, batch: int) -> dict[str, jax.Array]:
        """See `Masked`."""
        return self.masked.draw(rng, batch)

    def losses(self, params: dict, log_mel: jax.Array, batch: dict) -> dict[str, jax.Array]:
        """See `Objective`."""
        return self._both(
            *(part.losses(params, log_mel, batch) for part in (self.masked, self.heard))
        )

    def measure(self, params: dict, log_mel: jax.Array, batch: dict) -> dict[str, jax.Array]:
        """The sums of both objectives."""
        return self._both(
            *(part.measure(params, log_mel, batch) for part in (self.masked, self.heard))
        )

    @staticmethod
    def _both(masked: dict, heard_: dict) -> dict:
        named = {f"masked_{name}": value for name, value in masked.items()}
        named |= {f"heard_{name}": value for name, value in heard_.items()}
        return {"loss": masked["loss"] + heard_["loss"], **named}

    def scores(self, total: dict[str, float], batches: int) -> dict[str, float]:
        """The scores of both objectives."""
        parts = []
        for prefix, part in (("masked_", self.masked), ("heard_", self.heard)):
            own = {
                name.removeprefix(prefix): value
                for name, value in total.items()
                if name.startswith(prefix)
            }
            parts.append(part.scores(own, batches))
        return self._both(*parts)


OBJECTIVES = {"ssast": Masked, "transcription": Transcription, "joint": Joint}


def objective_of(
    model: ModelConfig, config: PretrainConfig, compute: Compute, num_descriptors: int
) -> Objective:
    """The objective named in the configuration.

    Raises:
        InputError: an unknown objective, or patches that are incompatible with it.
    """
    return lookup(OBJECTIVES, config.objective, "objective")(
        model, config, compute, num_descriptors
    )


def batch_shapes(model: ModelConfig, config: PretrainConfig, num_descriptors: int) -> dict:
    """Shapes and types of a full training batch, as the step expects it, with codes in uint8."""
    rows, frames = config.batch_size, model.n_frames

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct((rows, frames, *shape), dtype)

    shapes = {"codes": array(jnp.uint8, model.n_mels)}
    if config.objective == "ssast":
        return shapes
    rolls, feet = (
        (array(bool, N_KEYS),) * 3 + (array(jnp.float32, N_KEYS),),
        (array(jnp.float32),) * 2,
    )
    descriptors = jax.ShapeDtypeStruct((rows, num_descriptors), jnp.float32)
    return shapes | {"targets": FrameTargets(*rolls, *feet), "descriptors": descriptors}
