"""The four steps of the suite, as notebooks and command line call them. Each starts from what the one before wrote.

Below a run's root: ``maestro/`` (shards), ``pretrain/<pretraining>/``, ``percepiano/`` (shards; ``percepiano_kaldi/`` in the
papers' front end), ``finetune/<model>/fold_<k>/``, ``predictions_<model>.csv`` and ``evaluation/``. Every step resumes; none
overwrites the output of another configuration.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pandas as pd

from percepiano_ast import report
from percepiano_ast.baselines import run as floor
from percepiano_ast.config import KALDI, MODELS, PRETRAININGS, FrontEnd, InputError, ModelConfig, Preset, Statistics, choose, say
from percepiano_ast.data import audioset, batches, demo, maestro, percepiano, predictions, shards, splits
from percepiano_ast.data.build import Work
from percepiano_ast.dimensions import KEYS
from percepiano_ast.evaluation import reliability
from percepiano_ast.evaluation.table import load_index
from percepiano_ast.models import convert, weights
from percepiano_ast.training import checkpoints, parallel
from percepiano_ast.training import finetune as finetuning
from percepiano_ast.training import pretrain as pretraining

MADE_BY_PRETRAIN = "notebook 02_ssast_pretrain_tpu or `python -m percepiano_ast pretrain`"
MADE_BY_FINETUNE = "notebook 03_finetune_percepiano_gpu or `python -m percepiano_ast finetune`"

# Windows of a rated clip that go through the encoder at once.
EMBED_BATCH = 32
INITS = {name: "from my pre-training" for name in PRETRAININGS}
INITS |= {"scratch": "from scratch", "audioset": "from AudioSet AST"}


@dataclass(frozen=True)
class Run:
    """A preset, the directory that its outputs live in, and which pre-training (see ``config.PRETRAININGS``) is meant.

    ``shards`` may name a copy of the shards for pre-training on a faster disk, ``store`` another place for checkpoints and
    models: a folder, or ``gs://BUCKET/PREFIX``, which is more durable than a mounted Drive. What else is below ``root`` is
    made again from them in minutes, but for the shards for pre-training, which `colab` takes to a bucket and back.
    """

    preset: Preset
    root: Path
    pretraining: str = "ssast"
    shards: Path | None = None
    store: str = ""

    @property
    def maestro(self) -> Path:
        """Shards for pre-training."""
        return self.shards or self.root / "maestro"

    @property
    def pretrain(self) -> Path:
        """Pre-training: settings, history, checkpoints."""
        return self.root / "pretrain" / self.pretraining

    @property
    def percepiano(self) -> Path:
        """Shards of rated clips, classic features, index."""
        return self.percepiano_in(self.preset.front_end)

    def percepiano_in(self, front_end: FrontEnd) -> Path:
        """The same in another front end."""
        return self.root / ("percepiano" if front_end == self.preset.front_end else f"percepiano_{front_end.kind}")

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

    def kept(self, directory: Path) -> str:
        """Where what must last of a step lies whose other outputs are in ``directory``, below the run's root."""
        return f"{self.store.rstrip('/')}/{directory.relative_to(self.root)}" if self.store else str(directory)

    @property
    def in_bucket(self) -> bool:
        """Whether what must last lies at ``gs://``."""
        return self.store.startswith("gs://")

    def for_pretraining(self, name: str) -> "Run":
        """The same run with another kind of pre-training."""
        training, geometry = choose(PRETRAININGS, name, "pre-training")
        preset = dataclasses.replace(
            self.preset,
            pretrain=dataclasses.replace(self.preset.pretrain, **training),
            model=dataclasses.replace(self.preset.model, **geometry),
        )
        return dataclasses.replace(self, preset=preset, pretraining=name)

    def changed(self, part: str, **values) -> "Run":
        """The same run with other values in the preset's ``pretrain``, ``finetune`` or ``execution``.

        None, 0 and empty text keep the preset's value, as an empty row of a notebook's form does.
        """
        meant = {name: value for name, value in values.items() if value or value is False}
        changed = dataclasses.replace(getattr(self.preset, part), **meant)
        return dataclasses.replace(self, preset=dataclasses.replace(self.preset, **{part: changed}))


@dataclass(frozen=True)
class Start:
    """Where fine-tuning starts from.

    Attributes:
        name: of the model in tables, such as ``ast-base-ssast``.
        model, front_end, statistics: what the encoder expects.
        encoder: its parameters; None for random ones.
        weights: what identifies them: a checksum, or None.
    """

    name: str
    model: ModelConfig
    front_end: FrontEnd
    statistics: Statistics
    encoder: dict | None
    weights: str | None


def init_named(run: Run, label: str) -> str:
    """Which of ``INITS`` a notebook's form means: ``from my pre-training``, ``from scratch`` or ``from AudioSet AST``."""
    inits = {label: init for init, label in INITS.items()} | {INITS[run.pretraining]: run.pretraining}
    return choose(inits, label, "start")


def start_of(run: Run, init: str, source: str = "", log: Callable[[str], None] = say) -> Start:
    """Find the weights that ``init``, one of ``INITS``, names.

    Args:
        source: file or folder of published weights for ``audioset`` (see ``models.weights``); by default they are fetched
            into the run's ``weights`` folder.

    Raises:
        InputError: unknown ``init``; no pre-training yet, or one of another geometry.
    """
    choose(INITS, init, "start of the encoder")
    if init == "audioset":
        folder = source or audioset.fetch(run.root / "weights" / "audioset", log=log)
        found = weights.read_weights(folder)
        sizes = {(size.width, size.depth): name for name, size in MODELS.items()}
        encoder = found.params["encoder"]
        name = f"ast-{sizes.get((found.config.width, found.config.depth), 'custom')}-audioset"
        checksum = hashlib.sha256(b"".join(leaf.tobytes() for leaf in jax.tree.leaves(encoder))).hexdigest()
        return Start(name, found.config, found.front_end, found.statistics, encoder, checksum)
    run = run.for_pretraining(init) if init in PRETRAININGS else run
    name = f"ast-{run.preset.model.name}-{init}"
    made_before = f"{run.kept(run.pretrain)}/checkpoints"
    if init == "scratch" and not (run.pretrain.exists() or checkpoints.listing(made_before, log)):
        log(f"no pre-training in {run.kept(run.pretrain)}: levels are normalised by the statistics of the rated clips themselves")
        rated = shards.open_shards(run.percepiano, percepiano.SPLIT, made_by=percepiano.MADE_BY)
        return Start(name, run.preset.model, rated.front_end, rated.statistics, None, None)
    # One normalisation for our starts: the statistics of the pre-training split.
    tree, made = checkpoints.open_latest(made_before, made_by=MADE_BY_PRETRAIN, log=log)
    front_end, statistics = FrontEnd(**made["front_end"]), Statistics(**made["statistics"])
    if init == "scratch":
        return Start(name, run.preset.model, front_end, statistics, None, None)
    state = tree["state"]
    encoder = (state["ema"] or state["params"])["encoder"]
    return Start(name, run.preset.model, front_end, statistics, encoder, made["sha256"])


def workers() -> int:
    """Worker processes: one per core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def preprocess_maestro(run: Run, source: str = "", work: Work | None = None, **options) -> Path:
    """Step 1: recordings -> log-mel shards.

    Args:
        source: archive, folder or address; by default the preset's.
        work: how; by default with all cores, and without bad recordings.
        options: ``limit_hours`` and ``stored``, see `maestro.preprocess`.
    """
    simulated = (source or run.preset.maestro) == "demo"
    where = maestro_source(run, source)
    work = work or Work(workers())
    return maestro.preprocess(where, run.maestro, run.preset.front_end, work, simulated=simulated, **options)


def maestro_source(run: Run, source: str = "") -> str:
    """Address or path of the recordings; the embedded ones are written when they are asked for."""
    source = source or run.preset.maestro
    return str(demo.write_maestro(run.root / "demo" / "maestro.zip")) if source == "demo" else source


def pretrain(run: Run, log: Callable[[str], None] = say) -> pd.DataFrame:
    """Step 2: SSAST on the shards of step 1; returns the history, a row an epoch."""
    parallel.initialize()
    preset = run.preset
    train = shards.open_shards(run.maestro, "train", made_by=maestro.MADE_BY)
    held_out = shards.open_shards(run.maestro, "validation", made_by=maestro.MADE_BY)
    make = functools.partial(
        batches.pretrain_batches,
        n_frames=preset.model.n_frames,
        batch_size=preset.pretrain.batch_size,
        seed=preset.pretrain.seed,
        process=(jax.process_index(), jax.process_count()),
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
        store=run.kept(run.pretrain),
        description={"data": train.metadata["licence"]},
        execution=preset.execution,
        log=log,
    )
    return pd.DataFrame(rows)


def preprocess_percepiano(
    run: Run,
    folder: str = "",
    synthesizers: tuple[str, ...] = (),
    *,
    init: str = "",
    log: Callable[[str], None] = say,
) -> Path:
    """Step 3a: rated MIDI clips -> log-mel shards.

    Args:
        folder: PercePiano's checkout; by default the preset's source.
        init: where fine-tuning will start; ``audioset`` needs shards in the papers' front end beside those in ours.

    Returns:
        the folder of the shards in our front end.
    """
    folder = folder or run.preset.percepiano
    if folder == "demo":
        log("writing the embedded PercePiano-shaped data (simulated performances and ratings)")
        folder = demo.write_percepiano(run.root / "demo" / "percepiano")
    elif "://" in folder:
        folder = percepiano.fetch(folder, run.root / "percepiano_source", log)
    for front_end in [run.preset.front_end] + [KALDI] * (init == "audioset"):
        percepiano.preprocess(
            folder,
            run.percepiano_in(front_end),
            front_end,
            # What cannot be rendered is listed; every table counts the clips that it rests on.
            Work(workers(), max_bad=None, log=log),
            synthesizers=tuple(synthesizers) or run.preset.synthesizers,
        )
    if (Path(folder) / "index.csv").exists() and (Path(folder) / reliability.RATERS).exists():
        agreement = reliability.split_half(reliability.read_raters(folder), percepiano.load_index(folder))
        reliability.ceiling(agreement).to_csv(run.percepiano / "noise_ceiling.csv", float_format="%.4f", lineterminator="\n")
    return run.percepiano


def finetune(run: Run, init: str = "ssast", source: str = "", log: Callable[[str], None] = say) -> pd.DataFrame:
    """Step 3b: train all folds of the preset's protocol; returns (and writes) the out-of-fold predictions.

    Args:
        init, source: where the encoder's weights come from, see `start_of`.
    """
    config = run.preset.finetune
    start = start_of(run, init, source, log)
    name, n_frames = start.name, start.model.n_frames
    home = run.percepiano_in(start.front_end)
    shard_set = shards.open_shards(home, percepiano.SPLIT, made_by=percepiano.MADE_BY)
    clips = batches.rated_clips(shard_set)
    fold, held_out = _folds(run, home, clips)
    cut = functools.partial(batches.clip_windows, n_frames=n_frames, batch_size=EMBED_BATCH)

    def trainer(steps: int) -> finetuning.Finetuning:
        return finetuning.Finetuning(start.model, config, shard_set.front_end, start.statistics, steps, run.preset.execution)

    params = _first_params(trainer(1), start)
    embeddings = trainer(1).embed(params, cut(clips.codes), len(clips.codes))
    rated = np.full((len(held_out), len(KEYS)), np.nan, np.float32)
    finetuning.say_room(trainer(1), params, len(set(fold.values())), run.kept(run.finetune(name)), log)
    for number in sorted(set(fold.values())):
        train, test = np.flatnonzero((held_out != number) & (held_out >= 0)), np.flatnonzero(held_out == number)
        log(f"{name}, fold {number}: {len(train)} renderings to train on, {len(test)} held out")
        windows, steps = batches.finetune_batches(
            clips, train, n_frames=n_frames, batch_size=config.batch_size, seed=config.seed
        )
        fold_run, fold_home = trainer(config.epochs * steps), run.finetune(name) / f"fold_{number}"
        trained, scaler = finetuning.finetune_fold(
            fold_run,
            params,
            embeddings,
            ratings=clips.ratings,
            train=train,
            windows=functools.partial(batches.from_step, windows),
            steps_per_epoch=steps,
            directory=fold_home,
            store=run.kept(fold_home),
            settings={"init": init, "pretrained": start.weights, "fold": number, **_source(shard_set)},
            log=log,
        )
        again = config.train_encoder  # then the embeddings are those of another encoder
        heard = fold_run.embed(trained, cut([clips.codes[i] for i in test]), len(test)) if again else embeddings[test]
        rated[test] = fold_run.rate(trained, scaler, heard)
    return _write_predictions(run, name, clips.clip, clips.ratings, rated, fold)


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


def _write_predictions(run: Run, model: str, clips, ratings, rated, folds: dict[str, int]) -> pd.DataFrame:
    """Average the renderings of each clip and write the tidy table: one row per clip and dimension."""
    config = run.preset.finetune
    table = predictions.tidy((model, config.protocol, config.seed), folds, clips, ratings, rated)
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
