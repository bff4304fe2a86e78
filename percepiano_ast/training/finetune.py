"""The rater (an encoder with rating heads), its losses, and its training on one fold.

There is no model selection: a fold's rater is trained on all clips outside it for the configured
number of epochs, and predicts the fold's clips once.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from percepiano_ast.config import (
    POOLINGS,
    SCALES,
    WEIGHTINGS,
    ComputeConfig,
    FinetuneConfig,
    FrontEnd,
    LevelStats,
    lookup,
)
from percepiano_ast.dimensions import PERCEPIANO, RatingScale
from percepiano_ast.errors import InputError
from percepiano_ast.files import lock_config
from percepiano_ast.models import heads
from percepiano_ast.models.cnn import Geometry
from percepiano_ast.training import loop, strategies
from percepiano_ast.training.checkpoints import (
    SAVE_MINUTES,
    Checkpoints,
    check_disk_space,
    saved_settings,
    shown,
    size_of,
)
from percepiano_ast.training.lock import Lock
from percepiano_ast.training.state import (
    TrainState,
    compute_for,
    make_optimizer,
    new_state,
    normalise,
    train_step,
)

# --- Losses -------------------------------------------------------------------------------------
# G groups of the K dimensions (three for PercePiano) are tasks on one encoder. Their weights:
#
# * ``equal``: a group's share of the K dimensions.
# * ``uncertainty``: a learned log variance s of each group; its loss L becomes (exp(-s) L + s) / 2
#   (Kendall, Gal and Cipolla 2018, equation 7, in the stable form of section 3.2's end).
# * ``dwa``, dynamic weight averaging: a group whose loss decreased less gets a larger weight (Liu,
#   Johns and Davison 2019, equation 7).


def loss_columns(questionnaire: RatingScale = PERCEPIANO) -> tuple[str, ...]:
    """Names of the history's loss columns, one per group."""
    return tuple(f"loss_{group}" for group, _ in questionnaire.groups)


def rating_errors(
    rated: jax.Array, log_variance: jax.Array | None, ratings: jax.Array
) -> jax.Array:
    """Squared errors (B, K), or with ``log_variance`` negative log likelihoods without the constant
    term (Nix and Weigend 1994, equation 5)."""
    squared = jnp.square(rated - ratings)
    if log_variance is None:
        return squared
    return 0.5 * (log_variance + squared * jnp.exp(-log_variance))


def group_losses(
    errors: jax.Array, weights: jax.Array, questionnaire: RatingScale = PERCEPIANO
) -> jax.Array:
    """Mean over clips (weighted, (B,)) and over each group's dimensions: (B, K) -> (G,)."""
    means = (errors * weights[:, None]).mean(axis=0)
    return jnp.stack([means[jnp.asarray(indices)].mean() for _, indices in questionnaire.groups])


def total_loss(
    groups: jax.Array,
    group_weights: jax.Array,
    log_variance: jax.Array | None,
    questionnaire: RatingScale = PERCEPIANO,
) -> jax.Array:
    """The training loss from `group_losses` (G,), `dynamic_weights` (G,), and learned log variances
    (G,) or None."""
    if log_variance is not None:
        groups = 0.5 * (jnp.exp(-log_variance) * groups + log_variance)
    sizes = [len(indices) for _, indices in questionnaire.groups]
    shares = np.array([size / len(questionnaire.dimensions) for size in sizes], np.float32)
    return jnp.sum(groups * group_weights * shares)


def dynamic_weights(
    config: FinetuneConfig, history: list[dict], questionnaire: RatingScale = PERCEPIANO
) -> np.ndarray:
    """Weights (G,) of the groups in the epoch after ``history``, which has `loss_columns`.

    With r the ratio of a group's losses in the last two epochs, its weight is G softmax(r /
    temperature); it is 1 in the first two epochs.
    """
    names = loss_columns(questionnaire)
    if config.weighting != "dwa" or len(history) < 2:
        return np.ones(len(names), np.float32)
    last, before = (np.array([row[name] for name in names]) for row in (history[-1], history[-2]))
    powers = np.exp(last / before / config.dwa_temperature)
    return (len(names) * powers / powers.sum()).astype(np.float32)


# --- Scales ---------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scaler:
    """Standardises embeddings with mean and standard deviation of a fold's training clips."""

    mean: jax.Array
    std: jax.Array

    @classmethod
    def fit(cls, embeddings: np.ndarray) -> "Scaler":
        """Mean and standard deviation of (n, 2 F' D); a constant column becomes 0."""
        mean, std = embeddings.mean(axis=0), embeddings.std(axis=0)
        return cls(jnp.asarray(mean), jnp.asarray(np.where(std > 1e-6, std, 1.0)))

    def apply(self, embeddings: jax.Array) -> jax.Array:
        """(n, 2 F' D) -> the same shape."""
        return (embeddings - self.mean[None, :]) / self.std[None, :]


@dataclass(frozen=True, eq=False)
class RatingTargets:
    """Training targets of one fold: ratings on the heads' scale, and clip weights.

    Attributes:
        ratings: (n, K), standardised.
        weights: (n,), with mean 1 over the training clips.
        mean, std: (K,), for the standardisation.
    """

    ratings: np.ndarray
    weights: np.ndarray
    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def fit(
        cls,
        config: FinetuneConfig,
        ratings: np.ndarray,
        raters: np.ndarray | None,
        train: np.ndarray,
        questionnaire: RatingScale = PERCEPIANO,
    ) -> "RatingTargets":
        """Fit scale and weights on the training clips; a constant dimension is only centred.

        Raises:
            InputError: an unknown scale, or weights by number of raters without these numbers.
        """
        lookup(dict.fromkeys(SCALES), config.rating_scale, "scale of ratings")
        known, dimensions = ratings[train], range(ratings.shape[1])
        mean, std = np.zeros(len(dimensions), np.float32), np.ones(len(dimensions), np.float32)
        parts = {
            "none": (),
            "group": dict(questionnaire.groups).values(),
            "dimension": [(i,) for i in dimensions],
        }
        for indices in map(list, parts[config.rating_scale]):
            mean[indices], std[indices] = known[:, indices].mean(), known[:, indices].std()
        # "Constant" is relative to the size of the ratings, so that it works in any unit.
        std = np.where(std > 1e-6 * np.abs(known).max(axis=0), std, 1.0)
        weights = np.ones(len(ratings), np.float32)
        if config.weigh_by_raters:
            if raters is None or not np.all(np.asarray(raters)[train] > 0):
                raise InputError(
                    "weigh_by_raters needs the number of raters of every clip, at least 1. Supply"
                    " it, or turn it off"
                )
            weights = (raters / np.mean(raters[train])).astype(np.float32)
        return cls(((ratings - mean) / std).astype(np.float32), weights, mean, std)

    def of(self, batch: dict) -> dict:
        """Replace ``clip``, positions (B,), in a batch by ``ratings`` and ``weights``; ratings are
        mixed as the clips were (``mixed_with``, ``share``, see ``data/augment.py``)."""
        batch = dict(batch)
        clip = batch.pop("clip")
        ratings = self.ratings[clip]
        if "mixed_with" in batch:
            share = batch.pop("share")[:, None]
            ratings = share * ratings + (1 - share) * ratings[batch.pop("mixed_with")]
        return batch | {"ratings": ratings, "weights": self.weights[clip]}


def temperature(errors: np.ndarray, deviations: np.ndarray) -> float:
    """Maximum-likelihood factor for all predicted standard deviations: temperature scaling (Guo et
    al. 2017, section 4.2), in closed form for a normal distribution (Laves et al. 2020, equation
    8)."""
    return float(np.sqrt(np.mean(np.square(np.float64(errors) / deviations))))


def calibrated(deviations: np.ndarray, errors: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Calibrated standard deviations (n, K) of held-out clips: each fold's, times the `temperature`
    of the other folds, whose predictions come from models that were not trained on them; a fold's
    ratings do not affect its own uncertainty."""
    result = np.full_like(deviations, np.nan)
    for number in np.unique(fold[fold >= 0]):
        others = (fold >= 0) & (fold != number)
        factor = temperature(errors[others], deviations[others])
        result[fold == number] = deviations[fold == number] * factor
    return result


# --- Rating model ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finetuning:
    """Configuration and functions of one run; the folds of a run share its compiled functions.

    Attributes:
        extra_features: number of extra inputs of the heads, appended to every embedding; `embed`
            returns embeddings without them.

    Raises:
        InputError: an unknown choice, or two choices that are incompatible.
    """

    model: Geometry
    config: FinetuneConfig
    front_end: FrontEnd
    statistics: LevelStats
    total_steps: int
    compute: ComputeConfig = ComputeConfig()
    questionnaire: RatingScale = PERCEPIANO
    extra_features: int = 0

    def __post_init__(self) -> None:
        lookup(dict.fromkeys(POOLINGS), self.config.pooling, "pooling")
        lookup(dict.fromkeys(WEIGHTINGS), self.config.weighting, "weighting of losses")
        if self.config.weighting != "equal" and self.config.predict_uncertainty:
            raise InputError(
                f"weighting {self.config.weighting!r} compares squared errors, but a predicted"
                " uncertainty minimises negative log likelihoods, which already weight every"
                " rating. Choose weighting 'equal', or no predicted uncertainty"
            )
        strategies.check(self.config, self.model)

    @functools.cached_property
    def module(self) -> heads.RatingModel:
        """The Flax module, computing in the hardware's type."""
        config = self.config
        return heads.RatingModel(
            self.model,
            compute_for(self.compute, jax.devices()[0]),
            hidden=config.hidden,
            dropout=config.dropout,
            kind=config.head,
            pooling=config.pooling,
            uncertain=config.predict_uncertainty,
            questionnaire=self.questionnaire,
            extra_features=self.extra_features,
        )

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """AdamW with the learning rates of the strategy."""
        base = make_optimizer(self.config, self.total_steps)
        return strategies.optimizer(self.config, base, self.total_steps)

    def init(self, seed: int) -> dict:
        """Random parameters of encoder and head."""
        codes = jnp.zeros((1, self.model.n_frames, self.model.n_mels), jnp.uint8)
        valid = jnp.ones((1, self.model.n_frames), bool)
        log_mel = normalise(codes, self.front_end, self.statistics)
        return jax.jit(self.module.init)(jax.random.key(seed), log_mel, valid)["params"]

    def init_head(self, seed: int) -> dict:
        """The random parameters of the head as in `init`, without those of the encoder."""
        embedding = jnp.zeros((1, 2 * self.model.grid[0] * self.model.width + self.extra_features))
        make = jax.jit(functools.partial(self.module.init, method=heads.RatingModel.rate))
        return make(jax.random.key(seed), embedding)["params"]["head"]

    def apply(self, params: dict, *inputs: jax.Array, **options: Any) -> Any:
        """Call a method of the module; Flax's annotations give no return type."""
        return self.module.apply({"params": params}, *inputs, **options)

    def moments(self, params: dict, codes: jax.Array, n_valid: jax.Array) -> heads.Moments:
        """`heads.pool_moments` of windows uint8 (B, T, F) with ``n_valid`` (B,) frames."""
        valid = jnp.arange(codes.shape[1])[None, :] < n_valid[:, None]
        log_mel = normalise(codes, self.front_end, self.statistics)
        return self.apply(params, log_mel, valid, method=heads.RatingModel.embed)

    def embed(
        self, params: dict, windows: Iterable[dict[str, np.ndarray]], n_clips: int
    ) -> np.ndarray:
        """Embeddings float32 (n_clips, 2 F' D) of whole clips: `heads.moments_to_embedding`."""
        total: heads.Moments | None = None
        for batch in windows:
            encoder = {"encoder": params["encoder"]}
            moments = _moments(self, encoder, batch["codes"], batch["n_valid"])
            # Padding windows in the last batch have clip number -1: collected in an extra clip.
            clips = jnp.where(batch["clip"] < 0, n_clips, batch["clip"])
            by_clip = heads.combine_moments(moments, clips, n_clips + 1)
            total = by_clip if total is None else jax.tree.map(jnp.add, total, by_clip)
        assert total is not None  # every clip has a window
        return np.asarray(heads.moments_to_embedding(*total))[:n_clips]

    def rate(self, params: dict, scaler: Scaler, embeddings: np.ndarray) -> np.ndarray:
        """Ratings float32 (n, K) of embeddings (n, 2 F' D)."""
        return self.distribution(params, scaler, embeddings)[0]

    def distribution(
        self, params: dict, scaler: Scaler, embeddings: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """`rate`, and the predicted standard deviations (n, K), not calibrated; NaN if the heads
        predict none."""
        rated, log_variance = _distribution(self, params["head"], scaler, embeddings)
        rated = np.asarray(rated)
        if log_variance is None:
            return rated, np.full_like(rated, np.nan)
        return rated, np.exp(0.5 * np.asarray(log_variance))


# Compiled once for equal runs, so that the folds of a cross-validation share the compiled function.
_moments = jax.jit(Finetuning.moments, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _distribution(
    run: Finetuning, head: dict, scaler: Scaler, embeddings: jax.Array
) -> tuple[jax.Array, jax.Array | None]:
    return run.apply(
        {"head": head}, scaler.apply(embeddings), method=heads.RatingModel.distribution
    )


@functools.lru_cache  # equal runs share the compiled step
def _step_of(run: Finetuning) -> jax.stages.Wrapped:
    """The jitted training step, (state, batch) -> (state, metrics), for any seed.

    The batch holds ``ratings`` (B, K), ``weights`` (B,), ``group_weights`` (G,), the run's ``key``,
    ``encoder`` (see ``strategies.join``), ``scaler``, and either ``embeddings`` or the clips'
    windows: ``codes`` (B, W, T, F) and their number of valid frames ``n_valid`` (B, W), 0 for
    padding windows.
    """

    def objective(trained: dict, batch: dict) -> tuple[jax.Array, dict]:
        params = strategies.join(run.config, batch["encoder"], trained)
        if "embeddings" in batch:
            embeddings = batch["embeddings"]
        else:  # of clips, from the summed moments of their windows
            clips, windows = batch["n_valid"].shape
            codes = batch["codes"].reshape(clips * windows, *batch["codes"].shape[2:])
            moments = run.moments(params, codes, batch["n_valid"].reshape(-1))
            clip = jnp.repeat(jnp.arange(clips), windows)
            embeddings = heads.moments_to_embedding(*heads.combine_moments(moments, clip, clips))
        rated, log_variance = run.apply(
            {"head": params["head"]},
            batch["scaler"].apply(embeddings),
            deterministic=False,
            method=heads.RatingModel.distribution,
            rngs={"dropout": batch["key"]},
        )
        errors = rating_errors(rated, log_variance, batch["ratings"])
        groups = group_losses(errors, batch["weights"], run.questionnaire)
        learned = trained["groups"]["log_variance"] if "groups" in trained else None
        loss = total_loss(groups, batch["group_weights"], learned, run.questionnaire)
        return loss, {"loss": loss, **dict(zip(loss_columns(run.questionnaire), groups))}

    def step(state: TrainState, batch: dict) -> tuple[TrainState, dict]:
        batch = batch | {"key": jax.random.fold_in(batch["key"], state.step)}
        half = run.module.compute.dtype == jnp.float16
        return train_step(state, batch, objective, run.optimizer, half=half)

    return jax.jit(step, donate_argnums=0)


# --- Training -------------------------------------------------------------------------------------


def finetune_fold(
    run: Finetuning,
    params: dict,
    embeddings: np.ndarray,
    *,
    ratings: np.ndarray,
    train: np.ndarray,
    windows: Callable[[int], Iterator[dict]],
    steps_per_epoch: int,
    directory: Path,
    settings: dict,
    raters: np.ndarray | None = None,
    store: str | Path = "",
    save_minutes: float = SAVE_MINUTES,
    lock: Lock | None = None,
) -> tuple[dict, Scaler]:
    """Train one fold with a checkpoint per epoch, or resume it; returns its parameters and scaler.

    Args:
        params: of encoder and head, before training; the model keeps other entries unchanged.
        embeddings: (n, 2 F' D + extra_features) of all renderings, computed by that encoder;
            ``ratings`` (n, K).
        train: positions of the renderings outside the fold.
        windows: ``windows(k)`` yields clips as windows from step k on, see
            `batches.finetune_batches`; used if the encoder is trained.
        directory: of this fold; holds ``checkpoints`` during training, ``history.csv`` and, at the
            end, ``model``.
        settings: the rest of the run's configuration; saved with every checkpoint.
        raters: (n,) number of raters of each rendering's clip; for ``weigh_by_raters``.
        store: another folder for ``checkpoints`` and ``model``, or ``gs://BUCKET/PREFIX``.
        save_minutes: minutes between checkpoints within a long epoch.
        lock: of the folds of this run.

    Raises:
        InputError: ``directory`` or ``store`` holds a run of another configuration; see
            `RatingTargets.fit`.
        FloatingPointError, StorageError: see `loop.fit`.
    """
    config = run.config
    settings = {"model": asdict(run.model), "finetune": asdict(config), **settings}
    settings |= {"front_end": asdict(run.front_end), "statistics": asdict(run.statistics)}
    settings |= run.questionnaire.as_settings()
    targets = RatingTargets.fit(config, ratings, raters, train, run.questionnaire)
    place, home = f"{store or directory}/checkpoints", f"{store or directory}/model"
    lock_config(directory, settings, lambda: saved_settings(home, place))
    check = lock.check if lock else lambda: None
    model = Checkpoints(home, keep=1, check=check)
    model.prepare()
    if found := model.load(settings=settings):
        params, scaler = found[0]["params"], Scaler(**found[0]["scaler"])
    else:
        params, scaler, rows = _fit(
            run,
            params,
            embeddings,
            train,
            targets,
            windows if config.trains_encoder else None,
            steps_per_epoch,
            directory=directory,
            place=place,
            settings=settings | {"seed": config.seed},
            save_minutes=save_minutes,
            lock=lock,
        )
        tree = {"params": params, "scaler": {"mean": scaler.mean, "std": scaler.std}}
        with model:
            made = {"seed": config.seed, "epoch": config.epochs, "history": rows}
            model.save(config.epochs * steps_per_epoch, tree, settings | made)
    # the store may have room for one fold's checkpoints only
    Checkpoints(place, check=check).clear()
    return params, scaler


def fit_heads(
    run: Finetuning,
    params: dict,
    embeddings: np.ndarray,
    *,
    ratings: np.ndarray,
    train: np.ndarray,
    raters: np.ndarray | None = None,
) -> tuple[dict, Scaler]:
    """As `finetune_fold` with a frozen encoder, in memory only.

    Raises:
        InputError: a strategy other than ``frozen``; see `RatingTargets.fit`.
        FloatingPointError: see `loop.fit`.
    """
    if run.config.trains_encoder:
        raise InputError(
            f"strategy {run.config.strategy!r} trains the encoder; choose 'frozen' to fit the heads"
            " only"
        )
    targets = RatingTargets.fit(run.config, ratings, raters, train, run.questionnaire)
    steps = steps_of_epoch(run.config, len(train))
    return _fit(run, params, embeddings, train, targets, None, steps)[:2]


def _fit(
    run: Finetuning,
    params: dict,
    embeddings: np.ndarray,
    train: np.ndarray,
    targets: RatingTargets,
    windows: Callable[[int], Iterator[dict]] | None,
    steps_per_epoch: int,
    **saving: Any,
) -> tuple[dict, Scaler, list[dict]]:
    """Train on windows, or without them on embeddings; returns the parameters of the complete
    rater, which predicts in the unit of the ratings, the scaler and the history."""
    config, scaler = run.config, Scaler.fit(embeddings[train])
    # otherwise all of the encoder is part of the training state, or none is used
    encoder = params["encoder"] if config.strategy in ("last", "lora") else {}
    common = {"encoder": encoder, "scaler": scaler, "key": jax.random.key(config.seed)}

    def embedding_batches(step: int) -> Iterator[dict]:
        while True:
            epoch, batch = divmod(step, steps_of_epoch(config, len(train)))
            order = np.random.default_rng([config.seed, epoch]).permutation(train)
            chosen = order[batch * config.batch_size : (batch + 1) * config.batch_size]
            yield {"embeddings": embeddings[chosen], "clip": chosen}
            step += 1

    def prepare(batch: dict, history: list[dict]) -> dict:
        weights = dynamic_weights(config, history, run.questionnaire)
        return targets.of(batch) | common | {"group_weights": weights}

    step = _step_of(replace(run, config=replace(config, seed=0)))
    state, rows = loop.fit(
        lambda: new_state(strategies.split(config, params, run.questionnaire), run.optimizer),
        lambda state, batch: step,
        windows or embedding_batches,
        prepare,
        epochs=config.epochs,
        steps_per_epoch=steps_per_epoch,
        names=("loss", *loss_columns(run.questionnaire)),
        log_seconds=10.0,
        **saving,
    )
    params = params | strategies.join(config, params["encoder"], state.params)
    head = heads.in_rating_units(
        params["head"], config.head, targets.mean, targets.std, run.questionnaire
    )
    return params | {"head": head}, scaler, rows


def steps_of_epoch(config: FinetuneConfig, clips: int) -> int:
    """Steps per epoch for training heads on a frozen encoder; an incomplete last batch is
    dropped."""
    return max(clips // config.batch_size, 1)


def check_room(run: Finetuning, params: dict, folds: int, place: str) -> None:
    """Before the first fold: check the disk space for all folds, see `check_disk_space`."""

    def first_state() -> TrainState:
        return new_state(strategies.split(run.config, params, run.questionnaire), run.optimizer)

    state, model = size_of(jax.eval_shape(first_state)), size_of(params)
    most = (
        f"{shown(3 * state + (folds + 1) * model)} (three checkpoints during a fold's training, and"
        f" a final model of each of {folds} folds)"
    )
    check_disk_space(place, max(state, model), most)
