"""The four steps of the suite, as notebooks and command line call them. Each starts from what the one before wrote.

Below a run's root: ``maestro/`` (shards), ``pretrain/``, ``percepiano/`` (shards), ``finetune/<model>/fold_<k>/``,
``predictions_<model>.csv`` and ``evaluation/``. Every step resumes; none overwrites the output of another configuration.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from percepiano_ast import report
from percepiano_ast.config import InputError, Preset, Statistics, choose
from percepiano_ast.data import batches, demo, maestro, percepiano, shards, splits
from percepiano_ast.dimensions import KEYS
from percepiano_ast.evaluation import metrics
from percepiano_ast.models.baselines import fit_mlp
from percepiano_ast.training import finetune as finetuning
from percepiano_ast.training import pretrain as pretraining
from percepiano_ast.training.checkpoints import open_latest

MADE_BY_PRETRAIN = "notebook 02_ssast_pretrain_tpu or `python -m percepiano_ast pretrain`"
MADE_BY_FINETUNE = "notebook 03_finetune_percepiano_gpu or `python -m percepiano_ast finetune`"

# Windows of a rated clip that go through the encoder at once.
EMBED_BATCH = 32
INITS = {"ssast": "our pre-training", "scratch": "random weights"}


@dataclass(frozen=True)
class Run:
    """A preset and the directory that its outputs live in."""

    preset: Preset
    root: Path

    @property
    def maestro(self) -> Path:
        """Shards for pre-training."""
        return self.root / "maestro"

    @property
    def pretrain(self) -> Path:
        """Pre-training: settings, history, checkpoints."""
        return self.root / "pretrain"

    @property
    def percepiano(self) -> Path:
        """Shards of rated clips, classic features, index."""
        return self.root / "percepiano"

    @property
    def evaluation(self) -> Path:
        """Metrics, report and figures."""
        return self.root / "evaluation"

    def finetune(self, model: str) -> Path:
        """Folds of one fine-tuned model."""
        return self.root / "finetune" / model

    def predictions(self, model: str) -> Path:
        """Out-of-fold predictions of one model."""
        return self.root / f"predictions_{model}.csv"

    def model_name(self, init: str) -> str:
        """Name in tables, such as ``ast-base-ssast``."""
        return f"ast-{self.preset.model.name}-{init}"

    def with_epochs(self, pretrain: int = 0, finetune: int = 0) -> "Run":
        """The same run with other numbers of epochs; 0 keeps the preset's."""
        preset = self.preset
        if pretrain:
            preset = dataclasses.replace(preset, pretrain=dataclasses.replace(preset.pretrain, epochs=pretrain))
        if finetune:
            preset = dataclasses.replace(preset, finetune=dataclasses.replace(preset.finetune, epochs=finetune))
        return dataclasses.replace(self, preset=preset)


def workers() -> int:
    """Worker processes: one per core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def preprocess_maestro(run: Run, source: str = "", log: Callable[[str], None] = print) -> Path:
    """Step 1: recordings -> log-mel shards. ``source``: archive, folder or address; by default the preset's."""
    where = maestro_source(run, source)
    simulated = (source or run.preset.maestro) == "demo"
    return maestro.preprocess(
        where, run.maestro, run.preset.front_end, workers=workers(), simulated=simulated, log=log
    )


def maestro_source(run: Run, source: str = "") -> str:
    """Address or path of the recordings; the embedded ones are written when they are asked for."""
    source = source or run.preset.maestro
    return str(demo.write_maestro(run.root / "demo" / "maestro.zip")) if source == "demo" else source


def pretrain(run: Run, log: Callable[[str], None] = print) -> pd.DataFrame:
    """Step 2: SSAST on the shards of step 1; returns the history, a row an epoch."""
    preset = run.preset
    train = shards.open_shards(run.maestro, "train", made_by=maestro.MADE_BY)
    held_out = shards.open_shards(run.maestro, "validation", made_by=maestro.MADE_BY)
    make = functools.partial(
        batches.pretrain_batches,
        n_frames=preset.model.n_frames,
        batch_size=preset.pretrain.batch_size,
        seed=preset.pretrain.seed,
    )
    training, validation = make(train), make(held_out)
    rows = pretraining.pretrain(
        preset.model,
        preset.pretrain,
        train.front_end,
        train.statistics,
        batches=training.from_step,
        steps_per_epoch=training.steps_per_epoch,
        validation=validation.one_epoch,
        directory=run.pretrain,
        description={"data": train.metadata["licence"]},
        log=log,
    )
    return pd.DataFrame(rows)


def preprocess_percepiano(
    run: Run, folder: str = "", synthesizers: tuple[str, ...] = (), log: Callable[[str], None] = print
) -> Path:
    """Step 3a: rated MIDI clips -> log-mel shards. ``folder``: PercePiano's checkout; by default the preset's source."""
    folder = folder or run.preset.percepiano
    if folder == "demo":
        log("writing the embedded PercePiano-shaped data (simulated performances and ratings)")
        folder = demo.write_percepiano(run.root / "demo" / "percepiano")
    elif "://" in folder:
        folder = percepiano.fetch(folder, run.root / "percepiano_source", log)
    return percepiano.preprocess(
        folder,
        run.percepiano,
        run.preset.front_end,
        synthesizers=tuple(synthesizers) or run.preset.synthesizers,
        workers=workers(),
        log=log,
    )


def finetune(run: Run, init: str = "ssast", log: Callable[[str], None] = print) -> pd.DataFrame:
    """Step 3b: train all folds of the preset's protocol; returns (and writes) the out-of-fold predictions.

    Args:
        init: where the encoder's weights come from, one of ``INITS``.
    """
    choose(INITS, init, "start of the encoder")
    config, name = run.preset.finetune, run.model_name(init)
    shard_set = shards.open_shards(run.percepiano, percepiano.SPLIT, made_by=percepiano.MADE_BY)
    tree, pretrained = open_latest(run.pretrain / "checkpoints", made_by=MADE_BY_PRETRAIN)
    clips, fold = batches.rated_clips(shard_set), _folds(run)
    held_out = np.array([fold.get(clip, -1) for clip in clips.clip])
    cut = functools.partial(batches.clip_windows, n_frames=run.preset.model.n_frames, batch_size=EMBED_BATCH)
    # One normalisation for both starts: the statistics of the pre-training split.
    trainer = functools.partial(
        finetuning.Finetuning, run.preset.model, config, shard_set.front_end, Statistics(**pretrained["statistics"])
    )
    params, weights = trainer(1).init(config.seed), None
    if init == "ssast":
        params["encoder"], weights = tree["state"]["params"]["encoder"], pretrained["sha256"]
    embeddings = trainer(1).embed(params, cut(clips.codes), len(clips.codes))
    rated = np.full((len(held_out), len(KEYS)), np.nan, np.float32)
    for number in sorted(set(fold.values())):
        train, test = np.flatnonzero(held_out != number), np.flatnonzero(held_out == number)
        log(f"{name}, fold {number}: {len(train)} renderings to train on, {len(test)} held out")
        windows, steps = batches.finetune_batches(
            clips, train, n_frames=run.preset.model.n_frames, batch_size=config.batch_size, seed=config.seed
        )
        fold_run = trainer(config.epochs * steps)
        trained, scaler = finetuning.finetune_fold(
            fold_run,
            params,
            embeddings,
            ratings=clips.ratings,
            train=train,
            windows=functools.partial(batches.from_step, windows),
            steps_per_epoch=steps,
            directory=run.finetune(name) / f"fold_{number}",
            settings={"init": init, "pretrained": weights, "fold": number, **_source(shard_set)},
            log=log,
        )
        heard = embeddings[test]
        if config.train_encoder:
            heard = fold_run.embed(trained, cut([clips.codes[i] for i in test]), len(test))
        rated[test] = fold_run.rate(trained, scaler, heard)
    return _write_predictions(run, name, clips, rated, fold)


def _folds(run: Run) -> dict[str, int]:
    index = metrics.load_index(run.percepiano / "index.csv")
    return splits.fold_of_clip(index, run.preset.finetune.protocol)


def _source(shard_set: shards.ShardSet) -> dict:
    return {"data": shard_set.metadata["licence"], "simulated": shard_set.metadata["simulated"]}


def baseline(run: Run, log: Callable[[str], None] = print) -> pd.DataFrame:
    """Step 3c: the feed-forward baseline (``mlp``) on classic features, over the same folds."""
    config = run.preset.finetune
    shard_set = shards.open_shards(run.percepiano, percepiano.SPLIT, made_by=percepiano.MADE_BY)
    clips, index = batches.rated_clips(shard_set), metrics.load_index(run.percepiano / "index.csv")
    table = pd.read_csv(run.percepiano / "classic_features.csv").set_index(["clip", "synthesizer"])
    features = table.loc[list(zip(clips.clip, clips.synthesizer))].to_numpy(np.float32)
    fold = _folds(run)
    held_out = np.array([fold.get(clip, -1) for clip in clips.clip])
    groups = index.set_index("clip").loc[clips.clip, "content_group"].to_numpy()
    rated = np.full((len(held_out), len(KEYS)), np.nan, np.float32)
    for number in sorted(set(fold.values())):
        train, test = held_out != number, held_out == number
        fitted = fit_mlp(features[train], clips.ratings[train], seed=config.seed, groups=groups[train])
        rated[test] = fitted.predict(features[test])
        log(f"mlp, fold {number}: {train.sum()} renderings to train on, stopped after epoch {fitted.epochs}")
    return _write_predictions(run, "mlp", clips, rated, fold)


def _write_predictions(run: Run, model: str, clips: batches.RatedClips, rated, folds: dict[str, int]) -> pd.DataFrame:
    """Average the renderings of each clip and write the tidy table: one row per clip and dimension."""
    rated = pd.DataFrame(rated, columns=KEYS).groupby(clips.clip).mean()
    truth = pd.DataFrame(clips.ratings, columns=KEYS).groupby(clips.clip).first()
    table = truth.stack().rename("rating").to_frame().join(rated.stack().rename("prediction"))
    table = table.rename_axis(["clip", "dimension"]).reset_index()
    table = table[table["clip"].isin(folds)].sort_values("clip", kind="stable")
    table["fold"] = table["clip"].map(folds)
    fixed = {"model": model, "protocol": run.preset.finetune.protocol, "seed": run.preset.finetune.seed}
    columns = ["model", "protocol", "seed", "fold", "clip", "dimension", "rating", "prediction"]
    table = table.assign(**fixed)[columns].reset_index(drop=True)
    partial = run.predictions(model).with_suffix(".partial")
    table.to_csv(partial, index=False, float_format="%.6f")
    partial.replace(run.predictions(model))
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
        partial=rendered < len(metrics.load_index(index)),  # the report lists what is not covered
        simulated=shard_set.metadata["simulated"],
    )
