"""Steps 1 and 2: preprocess recordings into shards, and pre-train an encoder on them."""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import pandas as pd

from percepiano_ast.data import batches, demo, maestro, shards
from percepiano_ast.data.batches import TranscriptionTargets
from percepiano_ast.data.build import Work
from percepiano_ast.files import echo
from percepiano_ast.music.performance_features import WINDOW_FEATURES
from percepiano_ast.suite.run import Run, workers
from percepiano_ast.training import mesh
from percepiano_ast.training import pretrain as pretraining
from percepiano_ast.training.checkpoints import SAVE_MINUTES


def preprocess_maestro(run: Run, source: str = "", work: Work | None = None, **options) -> Path:
    """Step 1: recordings -> log-mel shards.

    Args:
        source: archive, folder or address; by default the preset's.
        work: workers and limits; by default all cores, and no unreadable recordings.
        options: ``limit_hours`` and ``stored``, see `maestro.preprocess`.
    """
    simulated = (source or run.preset.maestro) == "demo"
    where = maestro_source(run, source)
    work = work or Work(workers())
    return maestro.preprocess(
        where, run.maestro, run.preset.front_end, work, simulated=simulated, **options
    )


def maestro_source(run: Run, source: str = "") -> str:
    """Address or path of the recordings; for ``demo``, the embedded recordings are written
    first."""
    source = source or run.preset.maestro
    return (
        str(demo.write_maestro(run.root / "demo" / "maestro.zip")) if source == "demo" else source
    )


def pretrain(
    run: Run, log: Callable[[str], None] = echo, save_minutes: float = SAVE_MINUTES
) -> pd.DataFrame:
    """Step 2: pre-training on the shards of step 1; returns the history, one row per epoch.

    Args:
        save_minutes: minutes between checkpoints within a long epoch.
    """
    mesh.initialize()
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
    listens = preset.pretrain.objective != "ssast"
    heard = (
        TranscriptionTargets.open(run.maestro, train, preset.model.n_frames) if listens else None
    )
    training, validation = (
        make(train, targets=heard),
        make(held_out, targets=heard and heard.of(held_out, "validation")),
    )
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
        | ({"descriptors": heard.description} if heard else {}),
        num_descriptors=len(WINDOW_FEATURES) if heard else 0,
        execution=preset.execution,
        save_minutes=save_minutes,
        log=log,
    )
    return pd.DataFrame(rows)
