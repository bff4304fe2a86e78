"""Fine-tuning on PercePiano: grouped rating heads on an encoder, frozen or trained with them, fold by fold.

Nothing is selected: a fold trains for the configured epochs on everything outside it and predicts its own clips once,
from all windows of the whole clip. Batches come in as iterators; see ``data/batches.py``.
"""

import functools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from percepiano_ast.config import Execution, FinetuneConfig, FrontEnd, ModelConfig, Statistics, claim_directory
from percepiano_ast.models.heads import Rater, combine_moments, moments_to_embedding
from percepiano_ast.training import history
from percepiano_ast.training.checkpoints import Checkpoints
from percepiano_ast.training.state import (
    TrainState,
    compute_for,
    make_optimizer,
    new_state,
    normalise,
    require_finite,
    train_step,
)


@dataclass(frozen=True)
class Finetuning:
    """Everything that the functions of one run depend on; folds of a run share its compiled functions."""

    model: ModelConfig
    config: FinetuneConfig
    front_end: FrontEnd
    statistics: Statistics
    total_steps: int
    execution: Execution = Execution()

    @functools.cached_property
    def module(self) -> Rater:
        """The Flax module, computing in the hardware's type."""
        compute = compute_for(self.execution, jax.devices()[0])
        return Rater(self.model, compute, hidden=self.config.hidden, dropout=self.config.dropout)

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """AdamW; the encoder, where it is trained, learns at ``encoder_rate`` times the heads' rate."""
        rate = self.config.encoder_rate

        def is_encoder(params):
            return {name: jax.tree.map(lambda _: name == "encoder", part) for name, part in params.items()}

        slower = optax.masked(optax.scale(rate), is_encoder)
        return optax.chain(make_optimizer(self.config, self.total_steps), slower)

    def init(self, seed: int) -> dict:
        """Random parameters of encoder and head."""
        codes = jnp.zeros((1, self.model.n_frames, self.model.n_mels), jnp.uint8)
        valid = jnp.ones((1, self.model.n_frames), bool)
        log_mel = normalise(codes, self.front_end, self.statistics)
        return jax.jit(self.module.init)(jax.random.key(seed), log_mel, valid)["params"]

    def moments(self, params: dict, codes: jax.Array, n_valid: jax.Array) -> tuple[jax.Array, ...]:
        """Pooling moments of windows: uint8 (B, T, F), real frames (B,) -> see ``heads.pool_moments``."""
        valid = jnp.arange(codes.shape[1])[None, :] < n_valid[:, None]
        log_mel = normalise(codes, self.front_end, self.statistics)
        return self.module.apply({"params": params}, log_mel, valid, method=Rater.embed)

    def embed(self, params: dict, windows: Iterable[dict[str, np.ndarray]], n_clips: int) -> np.ndarray:
        """Embeddings float32 (n_clips, 2 F' D) of whole clips: mean and deviation over time for each band."""
        total = None
        for batch in windows:
            moments = _moments(self, {"encoder": params["encoder"]}, batch["codes"], batch["n_valid"])
            # Windows that only fill the last batch carry the clip number -1: they go to a clip of their own.
            by_clip = combine_moments(moments, jnp.where(batch["clip"] < 0, n_clips, batch["clip"]), n_clips + 1)
            total = by_clip if total is None else jax.tree.map(jnp.add, total, by_clip)
        return np.asarray(moments_to_embedding(*total))[:n_clips]

    def rate(self, params: dict, scaler: "Scaler", embeddings: np.ndarray) -> np.ndarray:
        """Ratings float32 (n, 19) of embeddings (n, 2 F' D)."""
        return np.asarray(_rate(self, params["head"], scaler, embeddings))

    def loss(self, params: dict, batch: dict, scaler: "Scaler", rng: jax.Array) -> jax.Array:
        """Mean squared error of a batch of ratings with either ``embeddings`` or windows (``codes``, ``n_valid``)."""
        if "embeddings" in batch:
            embeddings = batch["embeddings"]
        else:
            embeddings = moments_to_embedding(*self.moments(params, batch["codes"], batch["n_valid"]))
        rated = self.module.apply(
            {"params": {"head": params["head"]}},
            scaler.apply(embeddings),
            deterministic=False,
            method=Rater.rate,
            rngs={"dropout": rng},
        )
        return jnp.square(rated - batch["ratings"]).mean()


# Compiled once for equal runs: the folds of a cross-validation share them.
_moments = jax.jit(Finetuning.moments, static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _rate(run: Finetuning, head: dict, scaler: "Scaler", embeddings: jax.Array) -> jax.Array:
    return run.module.apply({"params": {"head": head}}, scaler.apply(embeddings), method=Rater.rate)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _step(run: Finetuning, state: TrainState, batch: dict, scaler: "Scaler") -> tuple[TrainState, jax.Array]:
    rng = jax.random.fold_in(jax.random.key(run.config.seed), state.step)

    def objective(params, batch):
        loss = run.loss(params, batch, scaler, rng)
        return loss, {"loss": loss}

    state, metrics = train_step(
        state, batch, objective, run.optimizer, half=run.module.compute.dtype == jnp.float16
    )
    return state, metrics["loss"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scaler:
    """Standardises embeddings by the training clips of a fold, before any step: small differences become visible."""

    mean: jax.Array
    std: jax.Array

    @classmethod
    def fit(cls, embeddings: np.ndarray) -> "Scaler":
        """Mean and deviation of (n, 2 F' D); a constant value is left at zero."""
        std = embeddings.std(axis=0)
        return cls(jnp.asarray(embeddings.mean(axis=0)), jnp.asarray(np.where(std > 1e-6, std, 1.0)))

    def apply(self, embeddings: jax.Array) -> jax.Array:
        """(n, 2 F' D) -> the same shape."""
        return (embeddings - self.mean[None, :]) / self.std[None, :]


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
    log: Callable[[str], None] = print,
) -> tuple[dict, Scaler]:
    """Train one fold, checkpoint every epoch, resume; returns its parameters and scaler.

    Args:
        params: of encoder and head, before training.
        embeddings: (n, 2 F' D) of all renderings by that encoder; ``ratings`` (n, 19).
        train: positions of the renderings outside the fold.
        windows: ``windows(k)`` yields random windows with ratings from step k on; used when the encoder is trained.
        directory: of this fold; holds ``checkpoints``, ``history.csv`` and, at the end, ``model``.
        settings: what else makes this run what it is; kept with every checkpoint.
    """
    settings = {"model": asdict(run.model), "finetune": asdict(run.config), **settings}
    settings |= {"front_end": asdict(run.front_end), "statistics": asdict(run.statistics)}
    claim_directory(directory, settings)
    finished = Checkpoints(directory / "model", keep=1, log=log)
    if found := finished.latest():
        tree = finished.restore(found["step"])
        return tree["params"], Scaler(**tree["scaler"])
    scaler = Scaler.fit(embeddings[train])
    trained, batches = jax.tree.map(jnp.array, params), windows
    if not run.config.train_encoder:
        trained = {"head": trained["head"]}
        batches = functools.partial(_embedding_batches, embeddings, ratings, train, run.config)
    state = _train(run, new_state(trained, run.optimizer), scaler, batches, steps_per_epoch, directory, settings, log)
    params = params | state.params
    tree = {"params": params, "scaler": {"mean": scaler.mean, "std": scaler.std}}
    finished.save(int(state.step), tree, settings)
    return params, scaler


def _embedding_batches(embeddings, ratings, train, config: FinetuneConfig, step: int) -> Iterator[dict]:
    per_epoch = max(len(train) // config.batch_size, 1)
    while True:
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng([config.seed, epoch]).permutation(train)
        chosen = order[place * config.batch_size : (place + 1) * config.batch_size]
        yield {"embeddings": embeddings[chosen], "ratings": ratings[chosen]}
        step += 1


def _train(run, state, scaler, batches, steps_per_epoch, directory, settings, log) -> TrainState:
    checkpoints = Checkpoints(directory / "checkpoints", log=log)
    rows, config = [], run.config
    if found := checkpoints.latest():
        log(f"  resuming after epoch {found['epoch']}")
        state, rows = checkpoints.restore(found["step"], {"state": state})["state"], found["history"]
        history.write(directory / "history.csv", rows)
    started, shown = time.monotonic(), 0.0
    stream = batches(len(rows) * steps_per_epoch)
    for epoch in range(len(rows), config.epochs):
        losses = []
        for _ in range(steps_per_epoch):
            state, loss = _step(run, state, next(stream), scaler)
            losses.append(loss)
        losses = [float(loss) for loss in losses]
        require_finite(losses, epoch * steps_per_epoch + 1)
        mean = float(np.mean(losses))
        rows.append({"epoch": epoch + 1, "step": int(state.step), "loss": mean})
        checkpoints.save(int(state.step), {"state": state}, {**settings, "epoch": epoch + 1, "history": rows})
        history.write(directory / "history.csv", rows)
        elapsed = time.monotonic() - started
        if elapsed - shown > 10:
            shown = elapsed
            log(f"  epoch {epoch + 1}/{config.epochs}: mean squared error {mean:.4f}, {elapsed:.0f} s")
    return state
