"""Rated clips, PercePiano's or custom ones, with an encoder, and their cross-validation."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from percepiano_ast import transcription
from percepiano_ast.config import FinetuneConfig, FrontEnd, ModelConfig
from percepiano_ast.data import augment, batches, percepiano
from percepiano_ast.dimensions import PERCEPIANO, Questionnaire
from percepiano_ast.errors import InputError
from percepiano_ast.files import as_path, echo, write_json
from percepiano_ast.models import convert
from percepiano_ast.music.performance_features import PERFORMANCE_FEATURES
from percepiano_ast.suite.run import Run, Start
from percepiano_ast.training import finetune as finetuning

# Windows per batch when rated clips are embedded.
EMBED_BATCH = 32


@dataclass(frozen=True, eq=False)
class Rated:
    """Rated clips, encoder and configuration, for fine-tuning and ablation studies.

    Attributes:
        run: its root holds the folds.
        start: the encoder.
        clips: with ratings (n, K) in the order of the questionnaire.
        front_end: of the clips.
        index: of the clips, with folds.
        raters: number of raters of each rendering's clip, (n,); None if unknown.
    """

    run: Run
    start: Start
    config: FinetuneConfig
    clips: batches.RatedClips
    front_end: FrontEnd
    index: pd.DataFrame
    raters: np.ndarray | None = None
    questionnaire: Questionnaire = PERCEPIANO
    log: Callable[[str], None] = echo

    def trainer(self, steps: int) -> finetuning.Finetuning:
        """The training functions for this total number of steps."""
        model, statistics, execution = (
            self.start.model,
            self.start.statistics,
            self.run.preset.execution,
        )
        beside = len(PERFORMANCE_FEATURES) if self.config.heard else 0
        given = (
            model,
            self.config,
            self.front_end,
            statistics,
            steps,
            execution,
            self.questionnaire,
            beside,
        )
        return finetuning.Finetuning(*given)

    @property
    def name(self) -> str:
        """Name of the model in tables."""
        return f"{self.start.name}-heard" if self.config.heard else self.start.name

    @property
    def listener(self) -> transcription.Listener:
        """The transcriber: the encoder with its transcription head.

        Raises:
            InputError: the encoder was not pre-trained to transcribe.
        """
        model = self.start.model
        if self.start.transcription is None or not isinstance(model, ModelConfig):
            raise InputError(
                f"{self.start.name} was not pre-trained to transcribe; start from transcription,"
                " joint or transcriptionstem"
            )
        params = {"encoder": self.start.encoder, "transcription": self.start.transcription}
        return transcription.Listener(
            params, model, self.front_end, self.start.statistics, self.run.preset.execution
        )

    @functools.cached_property
    def heard(self) -> transcription.Described:
        """Descriptors of the transcription of every rendering.

        Raises:
            InputError: see `listener`.
        """
        return transcription.describe_all(
            self.listener.listen_all(self.clips.codes, self.log), self.log
        )

    @functools.cached_property
    def params(self) -> dict:
        """Parameters of encoder and heads before fine-tuning."""
        params = self.trainer(1).init(self.config.seed)
        if self.start.encoder is not None:
            convert.require_same_shapes(
                self.start.encoder, params["encoder"], f"the encoder of {self.start.name}"
            )
            params["encoder"] = self.start.encoder
        if self.config.heard:
            params |= {"transcription": self.start.transcription, "unheard": self.heard.unheard}
        return params

    def embed(self, params: dict, which: np.ndarray) -> np.ndarray:
        """Embeddings of whole renderings at positions ``which``."""
        codes = [self.clips.codes[number] for number in which]
        windows = batches.clip_windows(
            codes, n_frames=self.start.model.n_frames, batch_size=EMBED_BATCH
        )
        return self.trainer(1).embed(params, windows, len(codes))

    @functools.cached_property
    def embeddings(self) -> np.ndarray:
        """Embeddings of all renderings by the encoder before fine-tuning, with the extra inputs
        appended."""
        self.log(f"{self.name}: embedding {len(self.clips.codes):,} renderings")
        embeddings = self.embed(self.params, np.arange(len(self.clips.codes)))
        return (
            np.concatenate([embeddings, self.heard.values], axis=1)
            if self.config.heard
            else embeddings
        )

    @property
    def unseen(self) -> np.ndarray:
        """Bool (n,), True for renderings by the held-out soundfont, which are not trained on.

        Raises:
            InputError: there are no renderings by the configured soundfont, or only those.
        """
        pianos = percepiano.without_variant(self.clips.synthesizer)
        found = sorted(set(pianos))
        if self.config.unseen and (self.config.unseen not in found or len(found) < 2):
            raise InputError(
                f"unseen={self.config.unseen}: the rated clips are rendered by {', '.join(found)}."
                " Choose one of at least two, or run preprocess with more --synthesizers"
            )
        return pianos == self.config.unseen

    def windows(self, train: np.ndarray) -> tuple[Callable, int]:
        """A function that yields augmented batches from a step on, and the number of steps per
        epoch."""
        config = self.config
        windows, steps = batches.finetune_batches(
            self.clips,
            train,
            n_frames=self.start.model.n_frames,
            max_windows=config.max_windows,
            batch_size=config.batch_size,
            seed=config.seed,
        )
        changes = augment.Augmentation(
            config.mask_bands, config.mask_frames, config.mixup, config.gain_db
        )
        stream = functools.partial(batches.from_step, windows)
        return augment.augmented(stream, changes, config.seed, self.front_end.step_db), steps


class HeldOut(NamedTuple):
    """Out-of-fold predictions.

    Attributes:
        fold: of each clip that the protocol evaluates.
        which: positions of the renderings, (m,).
        rated: predicted ratings (m, K).
        uncertainty: calibrated standard deviations (m, K), or None if the heads predict none.
    """

    fold: dict[str, int]
    which: np.ndarray
    rated: np.ndarray
    uncertainty: np.ndarray | None


def cross_validate(rated: Rated, settings: dict, log: Callable[[str], None]) -> HeldOut:
    """Train every fold of the protocol, unless it is trained, and predict its held-out clips.

    Args:
        settings: the run's settings besides its configuration; saved with every model.
    """
    name, clips, home = rated.name, rated.clips, rated.run.finetune(rated.name)
    fold = percepiano.fold_of_clip(rated.index, rated.config.protocol)
    held_out, unseen = np.array([fold.get(clip, -1) for clip in clips.clip]), rated.unseen
    said, deviations = (np.full(clips.ratings.shape, np.nan, np.float32) for _ in range(2))
    finetuning.check_room(
        rated.trainer(1), rated.params, len(set(fold.values())), rated.run.kept(home), log
    )
    for number in sorted(set(fold.values())):
        train = np.flatnonzero((held_out != number) & (held_out >= 0) & ~unseen)
        # Variants are for training only: held-out clips are rated in their original form.
        test = np.flatnonzero((held_out == number) & percepiano.is_plain(clips.synthesizer))
        log(f"{name}, fold {number}: {len(train)} training renderings, {len(test)} held out")
        whose = {
            "init": settings["init"],
            "pretrained": rated.start.weights,
            "fold": number,
        } | settings
        said[test], deviations[test] = _fold(
            rated, train, test, home / f"fold_{number}", whose, log
        )
    which = np.flatnonzero(np.isfinite(said).all(axis=1))
    uncertainty = _calibrated(rated.run, home, said - clips.ratings, deviations, held_out)
    return HeldOut(fold, which, said[which], None if uncertainty is None else uncertainty[which])


def _fold(
    rated: Rated, train, test, home: Path, settings: dict, log
) -> tuple[np.ndarray, np.ndarray]:
    """Predicted ratings of the held-out renderings, and their standard deviations, NaN if the model
    predicts none."""
    windows, steps = rated.windows(train)
    trainer = rated.trainer(rated.config.epochs * steps)
    trained, scaler = finetuning.finetune_fold(
        trainer,
        rated.params,
        rated.embeddings,
        ratings=rated.clips.ratings,
        raters=rated.raters,
        train=train,
        windows=windows,
        steps_per_epoch=steps,
        directory=home,
        store=rated.run.kept(home),
        settings=settings,
        log=log,
    )
    # A fine-tuned encoder has different embeddings.
    heard = rated.embed(trained, test) if rated.config.trains_encoder else rated.embeddings[test]
    return trainer.distribution(trained, scaler, heard)


def _calibrated(run: Run, home: Path, errors, deviations, held_out) -> np.ndarray | None:
    """Calibrated standard deviations of the held-out renderings, or None without predicted ones.
    Writes the factor for later ratings to ``temperature.json`` in the folder of the folds."""
    known = np.isfinite(deviations).all(axis=1)
    if not known.any():
        return None
    factor = finetuning.temperature(errors[known], deviations[known])
    write_json(as_path(run.kept(home)) / "temperature.json", {"temperature": factor})
    found = np.full_like(deviations, np.nan)
    found[known] = finetuning.calibrated(deviations[known], errors[known], held_out[known])
    return found
