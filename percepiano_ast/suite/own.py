"""Custom ratings: train on a folder of recordings and a CSV with ratings, as on PercePiano, with at
least 20 clips.

With so few clips the encoder stays frozen, and all dimensions share one hidden layer with strong
weight decay. Such heads were compared with ridge regression on random subsets of PercePiano's
clips, treated as custom ratings (0 to 100, embeddings of ``ast-micro-ssast``, twelve draws, up to
five folds of content groups). The ridge penalty was chosen by leave-one-out on each training part.
The heads were no worse, and better for the smallest number of clips. Means over the 19 dimensions;
the difference in r with its standard error over draws:

======  =======  =======  ==========  =========  =========  =============
clips   r ridge  r heads  difference  MAE ridge  MAE heads  MAE of mean
======  =======  =======  ==========  =========  =========  =============
20      -.15     .02      +.17 (.05)  11.0       11.2       10.6
50      .21      .25      +.04 (.02)  9.8        9.8        10.2
100     .36      .36      +.00 (.01)  9.5        9.4        10.4
======  =======  =======  ==========  =========  =========  =============

So the same heads are used for all data, with the same checkpoints, uncertainty and options. Of
eleven choices of width, decay, learning rate, batch size and epochs on these draws, a learning rate
of 3e-4 was clearly worse. The others differ by at most 0.07 (20 clips), 0.05 (50) and 0.02 (100);
`FEW_SHOT` is a fast choice from the better half. With a small encoder, 20 clips are not enough to
predict these dimensions.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from percepiano_ast.data import custom_ratings, demo, percepiano, sources
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation import analysis, predictions
from percepiano_ast.files import echo
from percepiano_ast.suite.rated import Rated, cross_validate
from percepiano_ast.suite.rating import config_for
from percepiano_ast.suite.run import Run, start_of
from percepiano_ast.training.stores import open_bucket

HOME = "own"
PROTOCOL = "content"
FEW_SHOT: dict[str, Any] = {
    "strategy": "frozen",
    "head": "joint",
    "rating_scale": "dimension",
    "weighting": "equal",
    "weigh_by_raters": False,
    "hidden": 128,
    "weight_decay": 10.0,
    "learning_rate": 2e-3,
    "batch_size": 16,
    "epochs": 20,
    "protocol": PROTOCOL,
    "unseen": "",  # recordings have no synthesizer
}


class OwnResult(NamedTuple):
    """Result of training on custom ratings.

    Attributes:
        home: run with the models, for `rate.FoldEnsemble` and ``rate --run``.
        predictions: out of fold, with the columns of `predictions.COLUMNS`.
        result: one row per dimension, see `evaluation.analysis.few_shot_table`.
        remarks: limitations of the result.
        simulated: whether the ratings are simulated.
    """

    home: str
    predictions: pd.DataFrame
    result: pd.DataFrame
    remarks: list[str]
    simulated: bool

    def label(self, title: str) -> str:
        """The title, marked if ratings are simulated."""
        return f"{title} (simulated ratings)" if self.simulated else title


def few_shot(run: Run) -> Run:
    """The run with heads and training for few clips; all options may still be changed."""
    finetune = dataclasses.replace(run.preset.finetune, **FEW_SHOT)
    return dataclasses.replace(run, preset=dataclasses.replace(run.preset, finetune=finetune))


def own_run(run: Run, csv: str | Path) -> Run:
    """The run for the models of a CSV of ratings: ``own/<name of the file>`` below the run and its
    store."""
    place = f"{HOME}/{Path(csv).stem}"
    return dataclasses.replace(
        run, root=run.root / place, store=f"{run.store.rstrip('/')}/{place}" if run.store else ""
    )


def own_runs(run: Run) -> list[Run]:
    """All runs of custom ratings below this run."""
    home = run.kept(run.root / HOME)
    if "://" in home:  # buckets have no folders, only file names
        names = {
            file.split(f"/{HOME}/")[1].split("/")[0] for file in open_bucket(home).system.find(home)
        }
    else:
        names = {path.name for path in Path(home).glob("*") if path.is_dir()}
    return [own_run(run, f"{name}.csv") for name in sorted(names)]


def own_source(run: Run, recordings: str, csv: str, group: str) -> tuple[Path, Path, str]:
    """Check the given recordings, ratings and grouping column; the ratings ``demo`` are embedded
    and simulated.

    Raises:
        InputError: one of the three is missing.
    """
    if csv == "demo" and not recordings and not group:
        return *demo.write_ratings(run.root / "demo" / "own"), "tune"
    given = {
        "folder of recordings": recordings,
        "CSV of ratings": csv,
        "column that groups clips": group,
    }
    if missing := [name for name, value in given.items() if not value]:
        raise InputError(
            "custom ratings need a folder of recordings, a CSV of ratings and a column that groups"
            f" clips; missing: {', '.join(missing)}. For the embedded example, give only 'demo' as"
            " the ratings"
        )
    return Path(recordings), Path(csv), group


def finetune_own(
    run: Run,
    recordings: str | Path,
    csv: str | Path,
    group: str,
    *,
    dimensions: Sequence[str] = (),
    init: str = "ssast",
    source: str = "",
    log: Callable[[str], None] = echo,
) -> OwnResult:
    """Train on custom ratings, fold by fold, with the run's encoder; writes predictions and the
    result to `own_run`.

    Args:
        run: with the pre-training to start from; its fine-tuning options are those of `few_shot`,
            possibly changed.
        recordings, csv, group, dimensions: see `custom_ratings.read_ratings`.
        init, source: the encoder's weights, see `start_of`.

    Raises:
        InputError: see `custom_ratings.read_ratings`; a ``rating_scale`` other than ``dimension``;
            earlier models here are for other ratings.
    """
    config = config_for(run, init)
    if config.rating_scale != "dimension":
        raise InputError(
            f"rating_scale={config.rating_scale}: custom ratings may have a different unit for each"
            " dimension. Leave it at 'dimension', which standardises each one separately"
        )
    found = custom_ratings.read_ratings(recordings, csv, group, dimensions)
    start, here = start_of(run, init, source, log), own_run(run, csv)
    groups = found.index["content_group"].nunique()
    log(f"{len(found.files)} clips, {groups} groups by {group}: {', '.join(found.dimensions)}")
    clips, checksum = found.load(start.front_end, log)
    rated = Rated(
        here,
        start,
        config,
        clips,
        start.front_end,
        found.index,
        questionnaire=found.questionnaire,
        log=log,
    )
    simulated = percepiano.is_simulated(recordings)
    settings = {
        "init": init,
        "data": sources.OWN_LICENCE,
        "simulated": simulated,
        "ratings": checksum,
    }
    settings |= {"longest": max(start.front_end.seconds(len(codes)) for codes in clips.codes)}
    held_out = cross_validate(rated, settings, log)
    table = predictions.to_table(
        (rated.name, config.protocol, config.seed),
        held_out.fold,
        clips.clip[held_out.which],
        clips.ratings[held_out.which],
        held_out.rated,
        held_out.uncertainty,
        found.dimensions,
    )
    predictions.write(table, here.predictions(rated.name))
    result = analysis.few_shot_table(table, found.index)
    result.to_csv(here.root / f"result_{rated.name}.csv", index=False, float_format="%.4f")
    return OwnResult(
        str(here.store or here.root),
        table,
        result,
        analysis.few_shot_remarks(result, found.index),
        simulated,
    )
