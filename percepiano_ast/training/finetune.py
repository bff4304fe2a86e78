"""The rater (an encoder with rating heads), its loss and its training step. `folds` trains it, fold
by fold."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from percepiano_ast.config import POOLINGS, Execution, FinetuneConfig, FrontEnd, Statistics, lookup
from percepiano_ast.dimensions import PERCEPIANO, Questionnaire
from percepiano_ast.models.cnn import Geometry
from percepiano_ast.models.heads import Moments, RatingModel, combine_moments, moments_to_embedding
from percepiano_ast.training import losses, strategies
from percepiano_ast.training.state import (
    TrainState,
    compute_for,
    make_optimizer,
    normalise,
    train_step,
)


@dataclass(frozen=True)
class Finetuning:
    """Configuration and functions of one run; the folds of a run share its compiled functions.

    Attributes:
        beside: number of extra inputs of the heads, appended to every embedding; only `embed`
            returns embeddings without them.

    Raises:
        InputError: an unknown choice, or two choices that are incompatible.
    """

    model: Geometry
    config: FinetuneConfig
    front_end: FrontEnd
    statistics: Statistics
    total_steps: int
    execution: Execution = Execution()
    questionnaire: Questionnaire = PERCEPIANO
    beside: int = 0

    def __post_init__(self) -> None:
        lookup(dict.fromkeys(POOLINGS), self.config.pooling, "pooling")
        losses.check(self.config)
        strategies.check(self.config, self.model)

    @functools.cached_property
    def module(self) -> RatingModel:
        """The Flax module, computing in the hardware's type."""
        compute, config = compute_for(self.execution, jax.devices()[0]), self.config
        options: dict[str, Any] = {
            "hidden": config.hidden,
            "dropout": config.dropout,
            "kind": config.head,
        }
        options |= {
            "pooling": config.pooling,
            "uncertain": config.predict_uncertainty,
            "questionnaire": self.questionnaire,
            "beside": self.beside,
        }
        return RatingModel(self.model, compute, **options)

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """AdamW with the learning rates of the strategy."""
        return strategies.optimizer(
            self.config, make_optimizer(self.config, self.total_steps), self.total_steps
        )

    @functools.cached_property
    def seedless(self) -> "Finetuning":
        """The same run with seed 0; runs that differ only in their seed share its compiled
        functions."""
        return replace(self, config=replace(self.config, seed=0))

    def init(self, seed: int) -> dict:
        """Random parameters of encoder and head."""
        codes = jnp.zeros((1, self.model.n_frames, self.model.n_mels), jnp.uint8)
        valid = jnp.ones((1, self.model.n_frames), bool)
        log_mel = normalise(codes, self.front_end, self.statistics)
        return jax.jit(self.module.init)(jax.random.key(seed), log_mel, valid)["params"]

    def init_head(self, seed: int) -> dict:
        """The random parameters of the head as in `init`, without those of the encoder."""
        embedding = jnp.zeros((1, 2 * self.model.grid[0] * self.model.width + self.beside))
        make = jax.jit(functools.partial(self.module.init, method=RatingModel.rate))
        return make(jax.random.key(seed), embedding)["params"]["head"]

    def apply(self, params: dict, *inputs: jax.Array, **options: Any) -> Any:
        """Call a method of the module; Flax's annotations give no return type."""
        return self.module.apply({"params": params}, *inputs, **options)

    def moments(self, params: dict, codes: jax.Array, n_valid: jax.Array) -> Moments:
        """Pooling moments of windows: uint8 (B, T, F), number of valid frames (B,) -> see
        ``heads.pool_moments``."""
        valid = jnp.arange(codes.shape[1])[None, :] < n_valid[:, None]
        log_mel = normalise(codes, self.front_end, self.statistics)
        return self.apply(params, log_mel, valid, method=RatingModel.embed)

    def embed(
        self, params: dict, windows: Iterable[dict[str, np.ndarray]], n_clips: int
    ) -> np.ndarray:
        """Embeddings float32 (n_clips, 2 F' D) of whole clips: mean and standard deviation over
        time for each band."""
        total: Moments | None = None
        for batch in windows:
            moments = _moments(
                self, {"encoder": params["encoder"]}, batch["codes"], batch["n_valid"]
            )
            # Padding windows in the last batch have clip number -1; they are collected in an extra
            # clip.
            by_clip = combine_moments(
                moments, jnp.where(batch["clip"] < 0, n_clips, batch["clip"]), n_clips + 1
            )
            total = by_clip if total is None else jax.tree.map(jnp.add, total, by_clip)
        assert total is not None  # every clip has a window
        return np.asarray(moments_to_embedding(*total))[:n_clips]

    def rate(self, params: dict, scaler: "Scaler", embeddings: np.ndarray) -> np.ndarray:
        """Ratings float32 (n, K) of embeddings (n, 2 F' D)."""
        return np.asarray(_distribution(self, params["head"], scaler, embeddings)[0])

    def distribution(
        self, params: dict, scaler: "Scaler", embeddings: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """`rate`, and the predicted standard deviations (n, K), not calibrated; NaN if the heads
        predict none."""
        rated, log_variance = _distribution(self, params["head"], scaler, embeddings)
        rated = np.asarray(rated)
        return rated, (
            np.full_like(rated, np.nan)
            if log_variance is None
            else np.exp(0.5 * np.asarray(log_variance))
        )

    def loss(
        self, trained: dict, encoder: dict, batch: dict, scaler: "Scaler", rng: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The training loss, and the losses of the groups (G,).

        Args:
            trained, encoder: see ``strategies.join``.
            batch: ``ratings`` (B, K), ``weights`` (B,), ``group_weights`` (G,), and either
                ``embeddings`` or the clips' windows: ``codes`` (B, W, T, F) and their number of
                valid frames ``n_valid`` (B, W), 0 for padding windows.
        """
        params = strategies.join(self.config, encoder, trained)
        embeddings = (
            batch["embeddings"] if "embeddings" in batch else self._of_windows(params, batch)
        )
        rated, log_variance = self.apply(
            {"head": params["head"]},
            scaler.apply(embeddings),
            deterministic=False,
            method=RatingModel.distribution,
            rngs={"dropout": rng},
        )
        errors = losses.errors(rated, log_variance, batch["ratings"])
        groups = losses.by_group(errors, batch["weights"], self.questionnaire)
        learned = trained["groups"]["log_variance"] if "groups" in trained else None
        return losses.total(groups, batch["group_weights"], learned, self.questionnaire), groups

    def _of_windows(self, params: dict, batch: dict) -> jax.Array:
        """Embeddings (B, 2 F' D) of clips from the summed moments of their windows."""
        clips, windows = batch["n_valid"].shape
        codes = batch["codes"].reshape(clips * windows, *batch["codes"].shape[2:])
        moments = self.moments(params, codes, batch["n_valid"].reshape(-1))
        return moments_to_embedding(
            *combine_moments(moments, jnp.repeat(jnp.arange(clips), windows), clips)
        )


# Compiled once for equal runs, so that the folds of a cross-validation share the compiled function.
_moments = jax.jit(Finetuning.moments, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _distribution(
    run: Finetuning, head: dict, scaler: "Scaler", embeddings: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    return run.apply({"head": head}, scaler.apply(embeddings), method=RatingModel.distribution)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def step(
    run: Finetuning, state: TrainState, encoder: dict, batch: dict, scaler: "Scaler", rng: jax.Array
) -> tuple[TrainState, jax.Array]:
    """One training step; returns the next state, and the total and group losses, float32 (1 + G,).

    Arguments as in `Finetuning.loss`. ``rng`` is the run's key, an argument so that runs that
    differ only in their seed share the compiled step, see `Finetuning.seedless`.
    """
    rng = jax.random.fold_in(rng, state.step)

    def objective(trained, batch):
        loss, groups = run.loss(trained, encoder, batch, scaler, rng)
        return loss, {"loss": loss, "groups": groups}

    state, metrics = train_step(
        state, batch, objective, run.optimizer, half=run.module.compute.dtype == jnp.float16
    )
    return state, jnp.concatenate([metrics["loss"][None], metrics["groups"]])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scaler:
    """Standardises embeddings with the mean and standard deviation of a fold's training clips,
    fitted before training."""

    mean: jax.Array
    std: jax.Array

    @classmethod
    def fit(cls, embeddings: np.ndarray) -> "Scaler":
        """Mean and standard deviation of (n, 2 F' D); a constant column becomes 0."""
        std = embeddings.std(axis=0)
        return cls(
            jnp.asarray(embeddings.mean(axis=0)), jnp.asarray(np.where(std > 1e-6, std, 1.0))
        )

    def apply(self, embeddings: jax.Array) -> jax.Array:
        """(n, 2 F' D) -> the same shape."""
        return (embeddings - self.mean[None, :]) / self.std[None, :]
