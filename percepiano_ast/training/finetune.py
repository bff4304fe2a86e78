"""Fine-tuning on PercePiano: grouped rating heads on an encoder, frozen or trained with them, fold by fold.

Nothing is selected: a fold trains for the configured epochs on everything outside it and predicts its own clips once,
from all windows of the whole clip. Batches come in as iterators; see ``data/batches.py``.
"""

import functools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from percepiano_ast.config import Execution, FinetuneConfig, FrontEnd, ModelConfig, Statistics, claim_directory, say
from percepiano_ast.models.heads import Rater, combine_moments, moments_to_embedding
from percepiano_ast.training import history
from percepiano_ast.training.checkpoints import SAVE_MINUTES, Checkpoints, require_room, shown
from percepiano_ast.training.pieces import size_of
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
    store: str | Path = "",
    save_minutes: float = SAVE_MINUTES,
    log: Callable[[str], None] = say,
) -> tuple[dict, Scaler]:
    """Train one fold, checkpoint every epoch, resume; returns its parameters and scaler.

    Args:
        params: of encoder and head, before training.
        embeddings: (n, 2 F' D) of all renderings by that encoder; ``ratings`` (n, 19).
        train: positions of the renderings outside the fold.
        windows: ``windows(k)`` yields random windows with ratings from step k on; used when the encoder is trained.
        directory: of this fold; holds ``checkpoints`` while it is trained, ``history.csv`` and, at the end, ``model``.
        settings: what else makes this run what it is; kept with every checkpoint.
        store: another folder for ``checkpoints`` and ``model``, or ``gs://BUCKET/PREFIX``.
        save_minutes: within a long epoch there is a checkpoint every so many minutes.

    Raises:
        InputError: ``directory`` or ``store`` holds a run of another configuration.
        StoreFailed: all is trained, but the model did not reach its store.
    """
    settings = {"model": asdict(run.model), "finetune": asdict(run.config), **settings}
    settings |= {"front_end": asdict(run.front_end), "statistics": asdict(run.statistics)}
    claim_directory(directory, settings)
    checkpoints = Checkpoints(f"{store or directory}/checkpoints", log=log)
    finished = Checkpoints(f"{store or directory}/model", keep=1, log=log)
    finished.prepare()
    if found := finished.load(settings=settings):
        tree, _ = found
        checkpoints.clear()
        return tree["params"], Scaler(**tree["scaler"])
    scaler = Scaler.fit(embeddings[train])
    trained, batches = jax.tree.map(jnp.array, params), windows
    if not run.config.train_encoder:
        trained = {"head": trained["head"]}
        batches = functools.partial(_embedding_batches, embeddings, ratings, train, run.config)
    with checkpoints:
        fold = _Fold(run, scaler, checkpoints, directory, settings, save_minutes, log)
        state = fold.train(new_state(trained, run.optimizer), batches, steps_per_epoch)
    fold.record.finish()
    params = params | state.params
    tree = {"params": params, "scaler": {"mean": scaler.mean, "std": scaler.std}}
    with finished:
        made = {"seed": run.config.seed, "epoch": run.config.epochs, "history": fold.rows}
        finished.save(int(state.step), tree, settings | made)
    checkpoints.clear()  # a store has room for those of one fold, not of all
    return params, scaler


def say_room(run: Finetuning, params: dict, folds: int, place: str, log: Callable[[str], None] = say) -> None:
    """Before the first fold: what all of them will need, see `require_room`."""
    trained = params if run.config.train_encoder else {"head": params["head"]}
    state, model = size_of(jax.eval_shape(lambda: new_state(trained, run.optimizer))), size_of(params)
    most = f"{shown(3 * state + (folds + 1) * model)} (while a fold is trained three, and at the end a model of each of {folds} folds)"
    require_room(place, max(state, model), most, log)


def _embedding_batches(embeddings, ratings, train, config: FinetuneConfig, step: int) -> Iterator[dict]:
    per_epoch = max(len(train) // config.batch_size, 1)
    while True:
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng([config.seed, epoch]).permutation(train)
        chosen = order[place * config.batch_size : (place + 1) * config.batch_size]
        yield {"embeddings": embeddings[chosen], "ratings": ratings[chosen]}
        step += 1


@dataclass
class _Fold:
    """What the training of a fold carries beside its state.

    Attributes:
        rows: history of the epochs that are over.
        losses: of the steps of the epoch that is not.
    """

    run: Finetuning
    scaler: Scaler
    checkpoints: Checkpoints
    directory: Path
    settings: dict
    save_minutes: float
    log: Callable[[str], None]
    rows: list[dict] = field(default_factory=list)
    losses: list = field(default_factory=list)

    @functools.cached_property
    def record(self) -> history.Record:
        """``history.csv``."""
        return history.Record(self.directory, self.log)

    def train(self, state: TrainState, batches: Callable[[int], Iterator[dict]], steps_per_epoch: int) -> TrainState:
        """All epochs that are left."""
        epochs, started, shown = self.run.config.epochs, time.monotonic(), 0.0
        state, done = self._resume(state)
        stream = batches(done)
        for epoch in range(done // steps_per_epoch, epochs):
            end = (epoch + 1) * steps_per_epoch
            state = self._epoch(state, stream, done, end)
            require_finite(self.losses, end - steps_per_epoch + 1)
            self.rows.append({"epoch": epoch + 1, "step": end, "loss": float(np.mean(self.losses))})
            done, self.losses = end, []
            self._save(state, done)
            self.record.send(self.rows)
            elapsed = time.monotonic() - started
            if elapsed - shown > 10:
                shown = elapsed
                self.log(f"  epoch {epoch + 1}/{epochs}: mean squared error {self.rows[-1]['loss']:.4f}, {elapsed:.0f} s")
        return state

    def _resume(self, state: TrainState) -> tuple[TrainState, int]:
        self.checkpoints.prepare()
        found = self.checkpoints.load({"state": state}, self.settings)
        if found is None:
            return state, 0
        tree, kept = found
        self.rows, self.losses = kept["history"], kept["losses"]
        self.log(f"  resuming after epoch {kept['epoch']}" + (f" and {len(self.losses)} steps" if self.losses else ""))
        if self.rows:
            self.record.send(self.rows)
        return tree["state"], kept["step"]

    def _epoch(self, state: TrainState, stream: Iterator[dict], done: int, end: int) -> TrainState:
        saved = time.monotonic()
        for number in range(done + 1, end + 1):
            state, loss = _step(self.run, state, next(stream), self.scaler)
            self.losses.append(loss)
            due = time.monotonic() - saved >= 60 * self.save_minutes and number < end
            if due and not self.checkpoints.busy:
                saved = time.monotonic()
                self.losses = [float(one) for one in self.losses]
                self._save(state, number)
        self.losses = [float(one) for one in self.losses]
        return state

    def _save(self, state: TrainState, step: int) -> None:
        progress = {"epoch": len(self.rows), "history": self.rows, "losses": self.losses}
        self.checkpoints.save(step, {"state": state}, {**self.settings, "seed": self.run.config.seed, **progress})
