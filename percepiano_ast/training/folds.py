"""Fine-tuning fold by fold, and the training targets of a fold.

There is no model selection. For each fold, a rater is trained on all clips outside it for the
configured number of epochs and predicts the fold's clips once, from all windows of each clip.
Batches come in as iterators; see ``data/batches.py``.
"""

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import jax
import numpy as np

from percepiano_ast.config import SCALES, FinetuneConfig, lookup
from percepiano_ast.dimensions import PERCEPIANO, Questionnaire
from percepiano_ast.errors import InputError
from percepiano_ast.files import claim_directory, echo
from percepiano_ast.models import heads
from percepiano_ast.training import history, losses, strategies
from percepiano_ast.training.checkpoints import SAVE_MINUTES, Checkpoints, require_room, shown
from percepiano_ast.training.finetune import Finetuning, Scaler, step
from percepiano_ast.training.pieces import size_of
from percepiano_ast.training.state import TrainState, new_state, require_finite

Batches = Callable[[int], Iterator[dict]]


@dataclass(frozen=True, eq=False)
class Targets:
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
        questionnaire: Questionnaire = PERCEPIANO,
    ) -> "Targets":
        """Fit scale and weights on the training clips only.

        Raises:
            InputError: an unknown scale, or weights by number of raters without these numbers.
        """
        mean, std = _scale(config.rating_scale, ratings[train], questionnaire)
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
        """Replace ``clip``, positions (B,), in a batch by ``ratings`` and ``weights``.

        The ratings of clips that were mixed with others of the batch (``mixed_with``, ``share``,
        see ``data/augment.py``) are mixed in the same proportion.
        """
        ratings, weights = self.ratings[batch["clip"]], self.weights[batch["clip"]]
        if "mixed_with" in batch:
            share = batch["share"][:, None]
            ratings = share * ratings + (1 - share) * ratings[batch["mixed_with"]]
        rest = {
            name: values
            for name, values in batch.items()
            if name not in ("clip", "mixed_with", "share")
        }
        return rest | {"ratings": ratings, "weights": weights}


def _scale(
    kind: str, ratings: np.ndarray, questionnaire: Questionnaire
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (K,) for standardising ratings (n, K); a constant dimension is
    only centred."""
    lookup(dict.fromkeys(SCALES), kind, "scale of ratings")
    mean, std = np.zeros(ratings.shape[1], np.float32), np.ones(ratings.shape[1], np.float32)
    if kind != "none":
        parts = (
            dict(questionnaire.groups).values()
            if kind == "group"
            else [(i,) for i in range(ratings.shape[1])]
        )
        for indices in map(list, parts):
            mean[indices], std[indices] = ratings[:, indices].mean(), ratings[:, indices].std()
    # The threshold for "constant" is relative to the size of the ratings, so that it works in any
    # unit.
    return mean, np.where(std > 1e-6 * np.abs(ratings).max(axis=0), std, 1.0)


def finetune_fold(
    run: Finetuning,
    params: dict,
    embeddings: np.ndarray,
    *,
    ratings: np.ndarray,
    train: np.ndarray,
    windows: Batches,
    steps_per_epoch: int,
    directory: Path,
    settings: dict,
    raters: np.ndarray | None = None,
    store: str | Path = "",
    save_minutes: float = SAVE_MINUTES,
    log: Callable[[str], None] = echo,
) -> tuple[dict, Scaler]:
    """Train one fold with a checkpoint per epoch, or resume it; returns its parameters and scaler.

    Args:
        params: of encoder and head, before training; other entries are copied into the model
            unchanged.
        embeddings: (n, 2 F' D + beside) of all renderings, computed by that encoder; ``ratings``
            (n, K).
        train: positions of the renderings outside the fold.
        windows: ``windows(k)`` yields clips as windows from step k on, see
            `batches.finetune_batches`; used if the encoder is trained.
        directory: of this fold; holds ``checkpoints`` during training, ``history.csv`` and, at the
            end, ``model``.
        settings: the rest of the run's configuration; saved with every checkpoint.
        raters: (n,) number of raters of each rendering's clip; for ``weigh_by_raters``.
        store: another folder for ``checkpoints`` and ``model``, or ``gs://BUCKET/PREFIX``.
        save_minutes: minutes between checkpoints within a long epoch.

    Raises:
        InputError: ``directory`` or ``store`` holds a run of another configuration; see
            `Targets.fit`.
        StoreFailed: training is complete, but the model could not be saved.
    """
    settings = {"model": asdict(run.model), "finetune": asdict(run.config), **settings}
    settings |= {"front_end": asdict(run.front_end), "statistics": asdict(run.statistics)}
    settings |= run.questionnaire.as_settings()
    targets = Targets.fit(run.config, ratings, raters, train, run.questionnaire)
    claim_directory(directory, settings)
    checkpoints = Checkpoints(f"{store or directory}/checkpoints", log=log)
    finished = Checkpoints(f"{store or directory}/model", keep=1, log=log)
    finished.prepare()
    if found := finished.load(settings=settings):
        tree, _ = found
        checkpoints.clear()
        return tree["params"], Scaler(**tree["scaler"])
    keeper = _Keeper(run.config, checkpoints, directory, settings, save_minutes, log)
    with checkpoints:
        state, scaler, rows = _train(
            run, params, embeddings, targets, train, windows, steps_per_epoch, keeper
        )
    keeper.record.finish()
    params = _finished(run, params, state, targets)
    tree = {"params": params, "scaler": {"mean": scaler.mean, "std": scaler.std}}
    with finished:
        made = {"seed": run.config.seed, "epoch": run.config.epochs, "history": rows}
        finished.save(int(state.step), tree, settings | made)
    checkpoints.clear()  # the store may have room for one fold's checkpoints only
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
    """As `finetune_fold` with a frozen encoder, but in memory only, for studies that train hundreds
    of heads.

    Raises:
        InputError: a strategy other than ``frozen``; see `Targets.fit`.
    """
    if run.config.trains_encoder:
        raise InputError(
            f"strategy {run.config.strategy!r} trains the encoder; choose 'frozen' to fit the heads"
            " only"
        )
    targets = Targets.fit(run.config, ratings, raters, train, run.questionnaire)
    steps_per_epoch = steps_of_epoch(run.config, len(train))
    state, scaler, _ = _train(run, params, embeddings, targets, train, None, steps_per_epoch, None)
    return _finished(run, params, state, targets), scaler


def steps_of_epoch(config: FinetuneConfig, clips: int) -> int:
    """Steps per epoch for training heads on a frozen encoder; an incomplete last batch is
    dropped."""
    return max(clips // config.batch_size, 1)


def say_room(
    run: Finetuning, params: dict, folds: int, place: str, log: Callable[[str], None] = echo
) -> None:
    """Before the first fold: check the disk space for all folds, see `require_room`."""
    state = size_of(
        jax.eval_shape(
            lambda: new_state(
                strategies.split(run.config, params, run.questionnaire), run.optimizer
            )
        )
    )
    model = size_of(params)
    total = shown(3 * state + (folds + 1) * model)
    most = (
        f"{total} (three checkpoints during a fold's training, and a final model of each of {folds}"
        " folds)"
    )
    require_room(place, max(state, model), most, log)


def _train(
    run, params, embeddings, targets, train, windows, steps_per_epoch, keeper
) -> tuple[TrainState, Scaler, list[dict]]:
    scaler = Scaler.fit(embeddings[train])
    encoder, batches = params["encoder"], windows
    if not run.config.trains_encoder:
        encoder, batches = {}, functools.partial(_embedding_batches, embeddings, train, run.config)
    elif run.config.strategy in ("full", "gradual"):
        encoder = {}  # the whole encoder is part of the training state
    fold = _Fold(run, encoder, scaler, targets, keeper)
    state = new_state(strategies.split(run.config, params, run.questionnaire), run.optimizer)
    return fold.train(state, batches, steps_per_epoch), scaler, fold.rows


def _finished(run: Finetuning, params: dict, state: TrainState, targets: Targets) -> dict:
    """Parameters of the complete rater, trained and frozen parts joined; it predicts in the unit of
    the ratings."""
    params = params | strategies.join(run.config, params["encoder"], state.params)
    head = heads.in_rating_units(
        params["head"], run.config.head, targets.mean, targets.std, run.questionnaire
    )
    return params | {"head": head}


def _embedding_batches(embeddings, train, config: FinetuneConfig, step: int) -> Iterator[dict]:
    per_epoch = steps_of_epoch(config, len(train))
    while True:
        epoch, place = divmod(step, per_epoch)
        order = np.random.default_rng([config.seed, epoch]).permutation(train)
        chosen = order[place * config.batch_size : (place + 1) * config.batch_size]
        yield {"embeddings": embeddings[chosen], "clip": chosen}
        step += 1


@dataclass
class _Keeper:
    """Saves a fold's training state, so that it can be resumed after an interruption."""

    config: FinetuneConfig
    checkpoints: Checkpoints
    directory: Path
    settings: dict
    save_minutes: float
    log: Callable[[str], None]
    saved: float = 0.0

    @functools.cached_property
    def record(self) -> history.Record:
        """``history.csv``."""
        return history.Record(self.directory, self.log)

    def resume(self, state: TrainState) -> tuple[dict, dict] | None:
        """Tree and description of the newest checkpoint, or None."""
        self.checkpoints.prepare()
        self.saved = time.monotonic()
        found = self.checkpoints.load({"state": state}, self.settings)
        if found:
            _, kept = found
            steps = f" and {len(kept['losses'])} steps" if kept["losses"] else ""
            self.log(f"  resuming after epoch {kept['epoch']}{steps}")
            if kept["history"]:
                self.record.send(kept["history"])
        return found

    def due(self) -> bool:
        """Whether a checkpoint within the epoch is due; False while the previous one is being
        saved."""
        return time.monotonic() - self.saved >= 60 * self.save_minutes and not self.checkpoints.busy

    def save(self, state: TrainState, step: int, rows: list[dict], losses: list) -> None:
        """Copy the state, and save the copy in the background."""
        self.saved = time.monotonic()
        progress = {"epoch": len(rows), "history": rows, "losses": losses}
        self.checkpoints.save(
            step, {"state": state}, {**self.settings, "seed": self.config.seed, **progress}
        )


@dataclass
class _Fold:
    """The training of one fold, without its training state.

    Attributes:
        encoder: the frozen parameters.
        keeper: None if nothing is saved.
        rows: history of the completed epochs.
        losses: of the steps of the current epoch, see `finetune.step`.
    """

    run: Finetuning
    encoder: dict
    scaler: Scaler
    targets: Targets
    keeper: _Keeper | None
    rows: list[dict] = field(default_factory=list)
    losses: list = field(default_factory=list)

    def train(self, state: TrainState, batches: Batches, steps_per_epoch: int) -> TrainState:
        """Train the remaining epochs."""
        epochs, started, shown = self.run.config.epochs, time.monotonic(), 0.0
        state, done = self._resume(state)
        stream, columns = batches(done), losses.columns(self.run.questionnaire)
        for epoch in range(done // steps_per_epoch, epochs):
            end = (epoch + 1) * steps_per_epoch
            state = self._epoch(state, stream, done, end)
            require_finite([found[0] for found in self.losses], end - steps_per_epoch + 1)
            means = np.mean(self.losses, axis=0).tolist()
            self.rows.append(
                {"epoch": epoch + 1, "step": end} | dict(zip(("loss", *columns), means))
            )
            done, self.losses = end, []
            if self.keeper is None:
                continue
            self.keeper.save(state, done, self.rows, self.losses)
            self.keeper.record.send(self.rows)
            elapsed = time.monotonic() - started
            if elapsed - shown > 10:
                shown = elapsed
                self.keeper.log(
                    f"  epoch {epoch + 1}/{epochs}: loss {means[0]:.4f}, {elapsed:.0f} s"
                )
        return state

    def _resume(self, state: TrainState) -> tuple[TrainState, int]:
        found = self.keeper.resume(state) if self.keeper else None
        if found is None:
            return state, 0
        tree, kept = found
        self.rows, self.losses = kept["history"], kept["losses"]
        return tree["state"], kept["step"]

    def _epoch(self, state: TrainState, stream: Iterator[dict], done: int, end: int) -> TrainState:
        # Depends only on the history, which every checkpoint holds.
        group_weights = losses.dynamic_weights(self.run.config, self.rows, self.run.questionnaire)
        rng = jax.random.key(self.run.config.seed)
        for number in range(done + 1, end + 1):
            batch = self.targets.of(next(stream)) | {"group_weights": group_weights}
            state, found = step(self.run.seedless, state, self.encoder, batch, self.scaler, rng)
            self.losses.append(found)
            if self.keeper and number < end and self.keeper.due():
                self.losses = _as_numbers(self.losses)
                self.keeper.save(state, number, self.rows, self.losses)
        self.losses = _as_numbers(self.losses)
        return state


def _as_numbers(losses: list) -> list[list[float]]:
    return [[float(value) for value in np.asarray(one)] for one in losses]
