"""The steps: 1 preprocess recordings, 2 pre-train an encoder, 3 preprocess rated clips and train
rating models fold by fold, 4 evaluate."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pandas as pd

from percepiano_ast.config import KALDI, FinetuneConfig, FrontEnd, ModelConfig
from percepiano_ast.data import augment, batches, demo, maestro, percepiano, shards
from percepiano_ast.data.batches import TranscriptionTargets
from percepiano_ast.data.build import BuildOptions
from percepiano_ast.dimensions import PERCEPIANO, RatingScale
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation import predictions, reliability
from percepiano_ast.evaluation.predictions import load_index
from percepiano_ast.files import as_path, write_signed_json
from percepiano_ast.inference import transcribe
from percepiano_ast.models.cnn import ENCODERS
from percepiano_ast.models.weights import require_same_shapes
from percepiano_ast.music.performance_features import PERFORMANCE_FEATURES, WINDOW_FEATURES
from percepiano_ast.pipeline.baselines import IDENTITY, fold_by_fold, predict_identity
from percepiano_ast.pipeline.run import MADE_BY_FINETUNE, EncoderInit, Run, load_encoder, workers
from percepiano_ast.studies import report
from percepiano_ast.tables import read_own
from percepiano_ast.training import finetune as finetuning
from percepiano_ast.training import mesh
from percepiano_ast.training import pretrain as pretraining
from percepiano_ast.training.checkpoints import SAVE_MINUTES
from percepiano_ast.training.lock import Lock

logger = logging.getLogger(__name__)

EMBED_BATCH = 32  # windows per batch when rated clips are embedded

# --- Steps 1 and 2: pre-training ------------------------------------------------------------------


def maestro_source(run: Run, source: str = "") -> str:
    """Address or path of the recordings; ``demo`` writes the embedded ones first."""
    source = source or run.preset.maestro
    if source == "demo":
        return str(demo.write_maestro(run.root / "demo" / "maestro.zip"))
    return source


def preprocess_maestro(
    run: Run, source: str = "", work: BuildOptions | None = None, **options
) -> Path:
    """Step 1: recordings -> log-mel shards; the source is by default the preset's.

    Args:
        options: of `maestro.preprocess`.
    """
    simulated = (source or run.preset.maestro) == "demo"
    work = work or BuildOptions(workers())
    given = maestro_source(run, source), run.maestro, run.preset.front_end, work
    return maestro.preprocess(*given, simulated=simulated, **options)


def pretrain(
    run: Run, save_minutes: float = SAVE_MINUTES, distributed: bool = False
) -> pd.DataFrame:
    """Step 2: pre-training on the shards of step 1; returns the history, one row per epoch.

    Args:
        distributed: whether this is one of several processes, see `mesh.initialize`.
    """
    mesh.initialize(distributed)
    preset, n_frames = run.preset, run.preset.model.n_frames
    train = shards.open_shards(run.maestro, "train", made_by=maestro.MADE_BY)
    held_out = shards.open_shards(run.maestro, "validation", made_by=maestro.MADE_BY)
    make = functools.partial(
        batches.pretrain_batches,
        n_frames=n_frames,
        batch_size=preset.pretrain.batch_size,
        seed=preset.pretrain.seed,
        process=(jax.process_index(), jax.process_count()),
    )
    targets = None
    if preset.pretrain.objective != "ssast":
        targets = TranscriptionTargets.open(run.maestro, train, n_frames)
    training = make(train, targets=targets)
    validation = make(held_out, targets=targets and targets.of(held_out, "validation"))
    rows = pretraining.pretrain(
        preset.model,
        preset.pretrain,
        train.front_end,
        train.statistics,
        batches=training.from_step,
        steps_per_epoch=training.steps_per_epoch,
        validation=validation.one_epoch,
        directory=run.pretrain,
        store=run.kept(run.pretrain),
        description={"data": train.metadata["licence"]}
        | ({"descriptors": targets.description} if targets else {}),
        num_descriptors=len(WINDOW_FEATURES) if targets else 0,
        compute=preset.compute,
        save_minutes=save_minutes,
    )
    return pd.DataFrame(rows)


# --- Step 3: rated clips --------------------------------------------------------------------------


def percepiano_source(run: Run, folder: str = "") -> Path:
    """PercePiano's folder, by default the preset's; ``demo`` writes the embedded data first, an
    address is downloaded."""
    folder = folder or run.preset.percepiano
    if folder == "demo":
        logger.info("writing the embedded demo data (simulated performances and ratings)")
        return demo.write_percepiano(run.root / "demo" / "percepiano")
    if "://" in str(folder):
        return percepiano.fetch(folder, run.root / "percepiano_source")
    return Path(folder)


def preprocess_percepiano(
    run: Run,
    folder: str = "",
    synthesizers: tuple[str, ...] = (),
    *,
    init: str = "",
    recordings: str = "",
    partial: bool = False,
    normalize_loudness: bool = False,
) -> Path:
    """Step 3a: rated MIDI clips -> log-mel shards; returns their folder.

    Args:
        folder: PercePiano's checkout; by default the preset's source.
        init: start of fine-tuning; ``audioset`` also needs shards with the papers' front end.
        recordings, partial, normalize_loudness: see `percepiano.preprocess`.
    """
    checkout = percepiano_source(run, folder)
    default = (percepiano.OWN,) if recordings else run.preset.synthesizers
    for front_end in [run.preset.front_end] + [KALDI] * (init == "audioset"):
        percepiano.preprocess(
            checkout,
            run.percepiano_in(front_end),
            front_end,
            BuildOptions(workers(), max_errors=None),
            synthesizers=tuple(synthesizers) or default,
            recordings=recordings,
            partial=partial,
            normalize_loudness=normalize_loudness,
        )
    if (checkout / "index.csv").exists() and (checkout / reliability.RATERS).exists():
        raters, index = reliability.read_raters(checkout), percepiano.load_index(checkout)
        reliability.noise_ceiling(reliability.split_half(raters, index)).to_csv(
            run.percepiano / "noise_ceiling.csv", float_format="%.4f", lineterminator="\n"
        )
    return run.percepiano


@dataclass(frozen=True, eq=False)
class CrossValidation:
    """Rated clips with their index, encoder and configuration, for fine-tuning and ablations.

    Attributes:
        run: its root holds the folds.
        clips: n renderings, with ratings (n, K) in the order of the scale.
        raters: number of raters of each rendering's clip, (n,); None if unknown.
    """

    run: Run
    start: EncoderInit
    config: FinetuneConfig
    clips: batches.RatedClips
    front_end: FrontEnd
    index: pd.DataFrame
    raters: np.ndarray | None = None
    questionnaire: RatingScale = PERCEPIANO

    @property
    def name(self) -> str:
        """Name of the model in tables."""
        return f"{self.start.name}-heard" if self.config.transcription_features else self.start.name

    def trainer(self, steps: int) -> finetuning.Finetuning:
        """The training functions for this total number of steps."""
        return finetuning.Finetuning(
            self.start.model,
            self.config,
            self.front_end,
            self.start.statistics,
            steps,
            self.run.preset.compute,
            self.questionnaire,
            len(PERFORMANCE_FEATURES) if self.config.transcription_features else 0,
        )

    @property
    def transcriber(self) -> transcribe.Transcriber:
        """The encoder with its transcription head; InputError if it has none."""
        start, model = self.start, self.start.model
        if start.transcription is None or not isinstance(model, ModelConfig):
            raise InputError(
                f"{start.name} was not pre-trained to transcribe; start from transcription, joint"
                " or transcriptionstem"
            )
        params = {"encoder": start.encoder, "transcription": start.transcription}
        execution = self.run.preset.compute
        return transcribe.Transcriber(params, model, self.front_end, start.statistics, execution)

    @functools.cached_property
    def note_features(self) -> transcribe.TranscriptionFeatures:
        """Features of the transcription of every rendering."""
        return transcribe.features_of(self.transcriber.transcribe_all(self.clips.codes))

    @functools.cached_property
    def params(self) -> dict:
        """Parameters of encoder and heads before fine-tuning."""
        params = self.trainer(1).init(self.config.seed)
        if self.start.encoder is not None:
            what = f"the encoder of {self.start.name}"
            require_same_shapes(self.start.encoder, params["encoder"], what)
            params["encoder"] = self.start.encoder
        if self.config.transcription_features:
            features = self.note_features.mean
            params |= {"transcription": self.start.transcription, "unheard": features}
        return params

    def embed(self, params: dict, which: np.ndarray) -> np.ndarray:
        """Embeddings of whole renderings at positions ``which``."""
        codes, n_frames = [self.clips.codes[row] for row in which], self.start.model.n_frames
        windows = batches.clip_windows(codes, n_frames=n_frames, batch_size=EMBED_BATCH)
        return self.trainer(1).embed(params, windows, len(codes))

    @functools.cached_property
    def embeddings(self) -> np.ndarray:
        """Embeddings of all renderings before fine-tuning, with the features of the transcription
        appended if they are used."""
        logger.info(f"{self.name}: embedding {len(self.clips.codes):,} renderings")
        found = self.embed(self.params, np.arange(len(self.clips.codes)))
        return (
            np.hstack([found, self.note_features.values])
            if self.config.transcription_features
            else found
        )

    def folds_of(self, protocol: str) -> np.ndarray:
        """Fold of each rendering under a protocol, (n,); -1 if it is not evaluated."""
        fold = percepiano.fold_of_clip(self.index, protocol)
        return np.array([fold.get(clip, -1) for clip in self.clips.clip])

    @property
    def unseen(self) -> np.ndarray:
        """Whether a rendering is by the held-out synthesizer, (n,).

        Raises:
            InputError: there are no renderings by it, or no others.
        """
        pianos, held_out = (
            percepiano.without_augmentation(self.clips.synthesizer),
            self.config.held_out_synthesizer,
        )
        found = sorted(set(pianos))
        if held_out and (held_out not in found or len(found) < 2):
            raise InputError(
                f"held_out_synthesizer={held_out}: the clips are rendered by {', '.join(found)}."
                " Choose one of at least two, or run preprocess with more --synthesizers"
            )
        return pianos == held_out

    def windows(self, train: np.ndarray) -> tuple[Callable, int]:
        """A function that yields augmented batches from a step on, and the steps per epoch."""
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

    def table(
        self, model: str, rows: np.ndarray, rated: np.ndarray, protocol: str = "", **more
    ) -> pd.DataFrame:
        """The table of predictions of some renderings, see `predictions.to_table`.

        Args:
            rows: positions (m,) or bool (n,).
            rated: predicted ratings, (m, K).
        """
        protocol = protocol or self.config.protocol
        fold = percepiano.fold_of_clip(self.index, protocol)
        known = self.clips.ratings[rows].astype(float)
        name = model, protocol, self.config.seed
        return predictions.to_table(name, fold, self.clips.clip[rows], known, rated, **more)


class HeldOut(NamedTuple):
    """Out-of-fold predictions: positions of the renderings (m,), ratings (m, K), and calibrated
    standard deviations (m, K) if the heads predict them."""

    which: np.ndarray
    rated: np.ndarray
    uncertainty: np.ndarray | None


def cross_validate(rated: CrossValidation, settings: dict) -> HeldOut:
    """Train every fold of the protocol, unless it is trained, and predict its held-out clips.

    Predicted deviations are calibrated by the factor in ``temperature.json``.

    Args:
        settings: saved with every model, besides the configuration.
    """
    clips, unseen, home = rated.clips, rated.unseen, rated.run.finetune(rated.name)
    held_out = rated.folds_of(rated.config.protocol)
    numbers = sorted(set(percepiano.fold_of_clip(rated.index, rated.config.protocol).values()))
    predicted, deviations = (np.full(clips.ratings.shape, np.nan, np.float32) for _ in range(2))
    with Lock(rated.run.kept(home)) as lock:
        finetuning.check_room(rated.trainer(1), rated.params, len(numbers), rated.run.kept(home))
        for number in numbers:
            train = np.flatnonzero((held_out != number) & (held_out >= 0) & ~unseen)
            # Variants are for training only: held-out clips are rated in their original form.
            test = np.flatnonzero((held_out == number) & percepiano.is_plain(clips.synthesizer))
            counts = f"{len(train)} training renderings, {len(test)} held out"
            logger.info(f"{rated.name}, fold {number}: {counts}")
            windows, steps = rated.windows(train)
            trainer = rated.trainer(rated.config.epochs * steps)
            fold_home = home / f"fold_{number}"
            trained, scaler = finetuning.finetune_fold(
                trainer,
                rated.params,
                rated.embeddings,
                ratings=clips.ratings,
                raters=rated.raters,
                train=train,
                windows=windows,
                steps_per_epoch=steps,
                directory=fold_home,
                store=rated.run.kept(fold_home),
                lock=lock,
                settings={
                    "init": settings["init"],
                    "pretrained": rated.start.weights,
                    "fold": number,
                }
                | settings,
            )
            # A fine-tuned encoder has different embeddings.
            tuned = rated.config.trains_encoder
            embeddings = rated.embed(trained, test) if tuned else rated.embeddings[test]
            predicted[test], deviations[test] = trainer.distribution(trained, scaler, embeddings)
    which = np.flatnonzero(np.isfinite(predicted).all(axis=1))
    known = np.isfinite(deviations).all(axis=1)
    if not known.any():
        return HeldOut(which, predicted[which], None)
    errors, uncertainty = (predicted - clips.ratings)[known], np.full_like(deviations, np.nan)
    factor = finetuning.temperature(errors, deviations[known])
    write_signed_json(as_path(rated.run.kept(home)) / "temperature.json", {"temperature": factor})
    uncertainty[known] = finetuning.calibrated(deviations[known], errors, held_out[known])
    return HeldOut(which, predicted[which], uncertainty[which])


def rated_clips_of(
    run: Run, start: EncoderInit, config: FinetuneConfig
) -> tuple[CrossValidation, dict]:
    """PercePiano's clips with the encoder's front end, and the metadata of their shards."""
    home = run.percepiano_in(start.front_end)
    shard_set = shards.open_shards(home, percepiano.SPLIT, made_by=percepiano.MADE_BY)
    clips, path, raters = batches.rated_clips(shard_set), home / "raters.csv", None
    if path.exists():
        raters = read_own(path, ["clip"]).set_index("clip").loc[clips.clip, "n_ratings"].to_numpy()
    given = run, start, config, clips, shard_set.front_end, load_index(home / "index.csv"), raters
    return CrossValidation(*given), shard_set.metadata


def config_for(run: Run, init: str) -> FinetuneConfig:
    """The preset's configuration; alternative encoders, which are not pre-trained, train fully."""
    config = run.preset.finetune
    if init not in ENCODERS:
        return config
    return dataclasses.replace(config, strategy="full", encoder_rate=1.0)


def finetune(run: Run, init: str = "ssast", source: str = "") -> pd.DataFrame:
    """Step 3b: train all folds of the preset's protocol; writes and returns the out-of-fold
    predictions, those for the held-out synthesizer as the model ``<model>@<synthesizer>``.

    Args:
        init, source: see `load_encoder`.
    """
    mesh.initialize()
    start, config = load_encoder(run, init, source), config_for(run, init)
    rated, metadata = rated_clips_of(run, start, config)
    settings = {"init": init, "data": metadata["licence"], "simulated": metadata["simulated"]}
    which, values, uncertainty = cross_validate(rated, settings)
    unseen = rated.unseen[which]
    tables: list[pd.DataFrame] = []
    for name, rows in (
        (rated.name, ~unseen),
        (f"{rated.name}@{config.held_out_synthesizer}", unseen),
    ):
        if rows.any() or not tables:
            deviations = None if uncertainty is None else uncertainty[rows]
            table = rated.table(name, which[rows], values[rows], uncertainty=deviations)
            predictions.write(table, run.predictions(name))
            tables.append(table)
    return pd.concat(tables, ignore_index=True)


def predict_baselines(run: Run) -> pd.DataFrame:
    """Step 3c: the baselines ``mlp``, ``audio-stats`` and ``identity-*`` over the same folds,
    without the held-out synthesizer; writes and returns their predictions.

    ``identity-*`` are skipped if the protocol holds out the identities that they need.
    """
    config, home, tables = run.preset.finetune, run.percepiano, []
    shard_set = shards.open_shards(home, percepiano.SPLIT, made_by=percepiano.MADE_BY)
    clips, index = batches.rated_clips(shard_set), load_index(home / "index.csv")
    fold = percepiano.fold_of_clip(index, config.protocol)
    seen = percepiano.without_augmentation(clips.synthesizer) != config.held_out_synthesizer
    names, ratings = clips.clip[seen], clips.ratings[seen]
    folds = np.array([fold.get(clip, -1) for clip in names])

    def write(model: str, rated: np.ndarray) -> None:
        name = model, config.protocol, config.seed
        tables.append(predictions.to_table(name, fold, names, ratings, rated))
        predictions.write(tables[-1], run.predictions(model))

    features = sound_features(home, clips)[seen]
    for model in ("mlp", "audio-stats"):
        write(model, fold_by_fold(model, features, ratings, folds, config.seed)[model])
    names, first = np.unique(names, return_index=True)
    ratings, folds = ratings[first].astype(float), folds[first]
    facts = index.set_index("clip").loc[names].reset_index()
    for model in IDENTITY:
        try:
            rated = predict_identity(model, facts, folds, ratings)
        # undefined under this protocol, or an index without player identities
        except InputError as reason:
            logger.info(f"skipped: {reason}")
        else:
            write(model, rated)
    return pd.concat(tables, ignore_index=True)


def sound_features(home: Path, clips: batches.RatedClips) -> np.ndarray:
    """Classic audio features of the renderings, (n, features), from the folder of their shards."""
    table = read_own(home / "classic_features.csv", percepiano.KEY).set_index(percepiano.KEY)
    return table.loc[list(zip(clips.clip, clips.synthesizer))].to_numpy(np.float32)


# --- Step 4: evaluation ---------------------------------------------------------------------------


def evaluate(run: Run) -> Path:
    """Step 4: metrics, comparisons, figures and ``report.html`` (returned) of all predictions of
    the run; InputError if there are none."""
    paths = predicted(run)
    if not paths:
        raise InputError(f"no predictions_*.csv in {run.root}. Run {MADE_BY_FINETUNE} first")
    home = run.percepiano
    shard_set = shards.open_shards(home, percepiano.SPLIT, made_by=percepiano.MADE_BY)
    rendered = read_own(home / "classic_features.csv", percepiano.KEY)["clip"].nunique()
    return report.evaluate_files(
        paths,
        run.evaluation,
        index=home / "index.csv",
        partial=rendered < len(load_index(home / "index.csv")),  # the report lists missing clips
        simulated=shard_set.metadata["simulated"],
        ceiling=ceiling_of(run),
    )


def predicted(run: Run) -> list[Path]:
    """All predictions under the preset's protocol; of the regressors, only the chosen sets."""
    judged = f"judged/*/predictions_*-judged*_{run.preset.finetune.protocol}.csv.gz"
    return [*sorted(run.root.glob("predictions_*.csv")), *sorted(run.root.glob(judged))]


def ceiling_of(run: Run) -> Path | None:
    """The noise ceiling, if it is not that of PercePiano, which is part of the package."""
    path = run.percepiano / "noise_ceiling.csv"
    return path if path.exists() else None
