"""Step 3: rated clips to shards, and what learns to rate them, fold by fold; step 4: how well."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from percepiano_ast import report, switches
from percepiano_ast.baselines import run as floor
from percepiano_ast.config import KALDI, FinetuneConfig, InputError, as_path, say, write_json
from percepiano_ast.data import augment, batches, demo, percepiano, predictions, shards, splits, variants
from percepiano_ast.data.build import Work
from percepiano_ast.dimensions import KEYS
from percepiano_ast.evaluation import reliability
from percepiano_ast.evaluation.table import load_index
from percepiano_ast.models import convert
from percepiano_ast.suite.run import MADE_BY_FINETUNE, Run, Start, start_of, workers
from percepiano_ast.training import finetune as finetuning
from percepiano_ast.training import folds, losses

# Windows of a rated clip that go through the encoder at once.
EMBED_BATCH = 32



def percepiano_source(run: Run, folder: str = "", log: Callable[[str], None] = say) -> Path:
    """PercePiano's folder, by default that of the preset's source: made (the embedded one) or fetched where it is not there."""
    folder = folder or run.preset.percepiano
    if folder == "demo":
        log("writing the embedded PercePiano-shaped data (simulated performances and ratings)")
        return demo.write_percepiano(run.root / "demo" / "percepiano")
    if "://" in str(folder):
        return percepiano.fetch(folder, run.root / "percepiano_source", log)
    return Path(folder)


def preprocess_percepiano(
    run: Run,
    folder: str = "",
    synthesizers: tuple[str, ...] = (),
    *,
    init: str = "",
    recordings: str = "",
    partial: bool = False,
    log: Callable[[str], None] = say,
) -> Path:
    """Step 3a: rated MIDI clips -> log-mel shards.

    Args:
        folder: PercePiano's checkout; by default the preset's source.
        init: where fine-tuning will start; ``audioset`` needs shards in the papers' front end beside those in ours.
        recordings: a folder with a recording of each clip by an instrument of one's own, instead of synthesizers.
        partial: whether it may lack clips, which are listed then.

    Returns:
        the folder of the shards in our front end.
    """
    folder = percepiano_source(run, folder, log)
    for front_end in [run.preset.front_end] + [KALDI] * (init == "audioset"):
        percepiano.preprocess(
            folder,
            run.percepiano_in(front_end),
            front_end,
            # What cannot be rendered is listed; every table counts the clips that it rests on.
            Work(workers(), max_bad=None, log=log),
            synthesizers=tuple(synthesizers) or ((percepiano.OWN,) if recordings else run.preset.synthesizers),
            recordings=recordings,
            partial=partial,
        )
    if (Path(folder) / "index.csv").exists() and (Path(folder) / reliability.RATERS).exists():
        agreement = reliability.split_half(reliability.read_raters(folder), percepiano.load_index(folder))
        reliability.ceiling(agreement).to_csv(run.percepiano / "noise_ceiling.csv", float_format="%.4f", lineterminator="\n")
    return run.percepiano


class _Rated:
    """Rated clips and the encoder that listens to them: what fine-tuning and a study of switches share."""

    def __init__(self, run: Run, start: Start, config: FinetuneConfig):
        self.run, self.start, self.config = run, start, config
        self.home = run.percepiano_in(start.front_end)
        self.shards = shards.open_shards(self.home, percepiano.SPLIT, made_by=percepiano.MADE_BY)
        self.clips = batches.rated_clips(self.shards)
        self.index = load_index(self.home / "index.csv")

    def trainer(self, steps: int) -> finetuning.Finetuning:
        """For so many steps in all."""
        front_end, statistics = self.shards.front_end, self.start.statistics
        return finetuning.Finetuning(self.start.model, self.config, front_end, statistics, steps, self.run.preset.execution)

    @functools.cached_property
    def params(self) -> dict:
        """Of encoder and heads before fine-tuning."""
        return _first_params(self.trainer(1), self.start)

    def embed(self, params: dict, which: np.ndarray) -> np.ndarray:
        """Embeddings of whole renderings at positions ``which``."""
        codes = [self.clips.codes[number] for number in which]
        windows = batches.clip_windows(codes, n_frames=self.start.model.n_frames, batch_size=EMBED_BATCH)
        return self.trainer(1).embed(params, windows, len(codes))

    @functools.cached_property
    def embeddings(self) -> np.ndarray:
        """Of all renderings, by the encoder before fine-tuning."""
        return self.embed(self.params, np.arange(len(self.clips.codes)))

    @functools.cached_property
    def raters(self) -> np.ndarray | None:
        """How many ratings the mean of each rendering's clip rests on, (n,); None where the data set does not say."""
        path = self.home / "raters.csv"
        return pd.read_csv(path, index_col="clip").loc[self.clips.clip, "n_ratings"].to_numpy() if path.exists() else None

    def windows(self, train: np.ndarray) -> tuple[Callable, int]:
        """Augmented batches from a step on, and the steps of an epoch."""
        config = self.config
        windows, steps = batches.finetune_batches(
            self.clips, train, n_frames=self.start.model.n_frames, max_windows=config.max_windows, batch_size=config.batch_size,
            seed=config.seed,
        )  # fmt: skip
        changes = augment.Augmentation(config.mask_bands, config.mask_frames, config.mixup, config.gain_db)
        stream = functools.partial(batches.from_step, windows)
        return augment.augmented(stream, changes, config.seed, self.shards.front_end.step_db), steps


def finetune(run: Run, init: str = "ssast", source: str = "", log: Callable[[str], None] = say) -> pd.DataFrame:
    """Step 3b: train all folds of the preset's protocol; returns (and writes) the out-of-fold predictions.

    Args:
        init, source: where the encoder's weights come from, see `start_of`.
    """
    rated = _Rated(run, start_of(run, init, source, log), _config_for(run, init))
    name, clips = rated.start.name, rated.clips
    fold, held_out = _folds(run, rated.home, clips)
    said, deviations = (np.full((len(held_out), len(KEYS)), np.nan, np.float32) for _ in range(2))
    folds.say_room(rated.trainer(1), rated.params, len(set(fold.values())), run.kept(run.finetune(name)), log)
    for number in sorted(set(fold.values())):
        train = np.flatnonzero((held_out != number) & (held_out >= 0))
        # Variants are for training: what is held out is heard as it was played.
        test = np.flatnonzero((held_out == number) & variants.plain(clips.synthesizer))
        log(f"{name}, fold {number}: {len(train)} renderings to train on, {len(test)} held out")
        settings = {"init": init, "pretrained": rated.start.weights, "fold": number, **_source(rated.shards)}
        said[test], deviations[test] = _fold(rated, train, test, run.finetune(name) / f"fold_{number}", settings, log)
    plain = np.isfinite(said).all(axis=1)
    uncertainty = _calibrated(run, name, said - clips.ratings, deviations, held_out)
    return _write_predictions(
        run, name, clips.clip[plain], clips.ratings[plain], said[plain], fold,
        None if uncertainty is None else uncertainty[plain],
    )  # fmt: skip


def _fold(rated: _Rated, train, test, home: Path, settings: dict, log) -> tuple[np.ndarray, np.ndarray]:
    """Ratings of the held-out renderings by a model of the others, and their standard deviations, NaN where it says none."""
    windows, steps = rated.windows(train)
    trainer = rated.trainer(rated.config.epochs * steps)
    trained, scaler = folds.finetune_fold(
        trainer, rated.params, rated.embeddings, ratings=rated.clips.ratings, raters=rated.raters, train=train, windows=windows,
        steps_per_epoch=steps, directory=home, store=rated.run.kept(home), settings=settings, log=log,
    )  # fmt: skip
    # An encoder that was trained has other embeddings.
    heard = rated.embed(trained, test) if rated.config.trains_encoder else rated.embeddings[test]
    return trainer.distribution(trained, scaler, heard)


def study(
    run: Run, init: str = "ssast", source: str = "", *, n_seeds: int = 3, inner: int | None = None, log: Callable[[str], None] = say
) -> Path:
    """Does each switch of the rating heads help on this encoder, frozen: ``switches.md`` and what it was made from.

    Args:
        init, source: see `start_of`.
        n_seeds: from 0 on, at least two.
        inner: an outer fold that is left out, so that a choice may be tested on it.
    """
    rated = _Rated(run, start_of(run, init, source, log), dataclasses.replace(run.preset.finetune, strategy="frozen"))
    clips, name = rated.clips, rated.start.name
    given = rated.embeddings, clips.clip, clips.ratings, rated.raters, rated.index
    predicted = switches.study(switches.Material(rated.trainer(1), *given), seeds=tuple(range(n_seeds)), inner=inner, log=log)
    title = f"Switches of the rating heads on {name}, frozen{' (simulated ratings)' * rated.shards.metadata['simulated']}"
    return switches.write(switches.results(predicted, rated.index), predicted, run.root / "switches" / name, title)


def _config_for(run: Run, init: str) -> FinetuneConfig:
    """The preset's; a CNN has no pre-training to keep."""
    config = run.preset.finetune
    return dataclasses.replace(config, strategy="full", encoder_rate=1.0) if init == "cnn" else config


def _calibrated(run: Run, name: str, errors, deviations, held_out) -> np.ndarray | None:
    """Predicted standard deviations of the held-out renderings, calibrated, and for what is rated later the factor in
    ``temperature.json`` beside the folds; None where none are predicted."""
    known = np.isfinite(deviations).all(axis=1)
    if not known.any():
        return None
    factor = losses.temperature(errors[known], deviations[known])
    write_json(as_path(run.kept(run.finetune(name))) / "temperature.json", {"temperature": factor})
    found = np.full_like(deviations, np.nan)
    found[known] = losses.calibrated(deviations[known], errors[known], held_out[known])
    return found


def _first_params(trainer: finetuning.Finetuning, start: Start) -> dict:
    """Parameters of encoder and heads before fine-tuning."""
    params = trainer.init(trainer.config.seed)
    if start.encoder is not None:
        convert.require_same_shapes(start.encoder, params["encoder"], f"the encoder of {start.name}")
        params["encoder"] = start.encoder
    return params


def _folds(run: Run, home: Path, clips: batches.RatedClips) -> tuple[dict[str, int], np.ndarray]:
    """Fold of every clip that the protocol evaluates, and that of every rendering, -1 where it is in none."""
    fold = splits.fold_of_clip(load_index(home / "index.csv"), run.preset.finetune.protocol)
    return fold, np.array([fold.get(clip, -1) for clip in clips.clip])


def _source(shard_set: shards.ShardSet) -> dict:
    return {"data": shard_set.metadata["licence"], "simulated": shard_set.metadata["simulated"]}


def baselines(run: Run, log: Callable[[str], None] = say) -> pd.DataFrame:
    """Step 3c: the floor of every table, over the same folds; returns (and writes) the predictions of all of them.

    ``mlp`` and ``audio-stats`` on classic features of the same renderings, and what is known without hearing anything
    (``identity-*``), as far as the protocol leaves anything known of a held-out clip. See `baselines`.
    """
    shard_set = shards.open_shards(run.percepiano, percepiano.SPLIT, made_by=percepiano.MADE_BY)
    clips, index = batches.rated_clips(shard_set), load_index(run.percepiano / "index.csv")
    table = pd.read_csv(run.percepiano / "classic_features.csv").set_index(["clip", "synthesizer"])
    features = table.loc[list(zip(clips.clip, clips.synthesizer))].to_numpy(np.float32)
    fold, held_out = _folds(run, run.percepiano, clips)
    groups = index.set_index("clip").loc[clips.clip, "content_group"].to_numpy()
    data = floor.Renderings(features, clips.ratings, groups, held_out)
    made = floor.floor(data, clips.clip, index, run.preset.finetune.seed, log)
    return pd.concat([_write_predictions(run, name, *rated, fold) for name, rated in made.items()], ignore_index=True)


def _write_predictions(run: Run, model: str, clips, ratings, rated, fold, uncertainty=None) -> pd.DataFrame:
    """Average the renderings of each clip and write the tidy table: one row per clip and dimension."""
    name = model, run.preset.finetune.protocol, run.preset.finetune.seed
    table = predictions.tidy(name, fold, clips, ratings, rated, uncertainty)
    predictions.write(table, run.predictions(model))
    return table


def evaluate(run: Run) -> Path:
    """Step 4: metrics, comparisons, figures and report from all predictions of the run; returns ``report.html``.

    Raises:
        InputError: there are no predictions yet.
    """
    paths = sorted(run.root.glob("predictions_*.csv"))
    if not paths:
        raise InputError(f"no predictions_*.csv in {run.root}. Run {MADE_BY_FINETUNE} first")
    shard_set = shards.open_shards(run.percepiano, percepiano.SPLIT, made_by=percepiano.MADE_BY)
    index = run.percepiano / "index.csv"
    rendered = pd.read_csv(run.percepiano / "classic_features.csv", usecols=["clip"])["clip"].nunique()
    return report.evaluate_files(
        paths,
        run.evaluation,
        index=index,
        partial=rendered < len(load_index(index)),  # the report lists what is not covered
        simulated=shard_set.metadata["simulated"],
        ceiling=ceiling_of(run),
    )


def ceiling_of(run: Run) -> Path | None:
    """The noise ceiling of a data set with raters of its own; PercePiano's own comes with the package."""
    path = run.percepiano / "noise_ceiling.csv"
    return path if path.exists() else None
