"""Custom ratings: train on a folder of recordings and a CSV of ratings, as on PercePiano.

The encoder stays frozen, and all dimensions share one hidden layer with strong weight decay. Such
heads were compared with ridge regression (penalty by leave-one-out) on twelve random subsets of
PercePiano's clips, with embeddings of ``ast-micro-ssast``. Mean r, ridge and heads: -0.15 and 0.02
with 20 clips, 0.21 and 0.25 with 50, 0.36 and 0.36 with 100 (standard error of the difference 0.05,
0.02, 0.01). `FEW_SHOT` is a fast one from the better half of eleven configurations.
"""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from percepiano_ast.data import custom_ratings, demo, percepiano, sources
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation import analysis, predictions
from percepiano_ast.files import matching
from percepiano_ast.pipeline.run import Run, load_encoder
from percepiano_ast.pipeline.steps import CrossValidation, config_for, cross_validate
from percepiano_ast.tables import to_csv
from percepiano_ast.training.checkpoints import Storage

logger = logging.getLogger(__name__)

HOME = "own"
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
    "protocol": "content",
    "held_out_synthesizer": "",  # recordings have no synthesizer
}


class CustomResult(NamedTuple):
    """Result of training on custom ratings.

    Attributes:
        home: run with the models, for `rate.FoldEnsemble` and ``rate --run``.
        predictions: out of fold, see `predictions.COLUMNS`.
        result: see `analysis.few_shot_table`.
        remarks: limitations of the result.
    """

    home: str
    predictions: pd.DataFrame
    result: pd.DataFrame
    remarks: list[str]
    simulated: bool

    def label(self, title: str) -> str:
        """The title, marked if ratings are simulated."""
        return f"{title} (simulated ratings)" if self.simulated else title


def few_shot_run(run: Run) -> Run:
    """The run with heads and training for few clips; all options may still be changed."""
    finetune = dataclasses.replace(run.preset.finetune, **FEW_SHOT)
    return dataclasses.replace(run, preset=dataclasses.replace(run.preset, finetune=finetune))


def custom_run(run: Run, csv: str | Path) -> Run:
    """The run of a CSV of ratings: ``own/<name of the file>`` below the run and its store."""
    place = f"{HOME}/{Path(csv).stem}"
    store = f"{run.store.rstrip('/')}/{place}" if run.store else ""
    return dataclasses.replace(run, root=run.root / place, store=store)


def custom_runs(run: Run) -> list[Run]:
    """All runs of custom ratings below this run."""
    home = run.kept(run.root / HOME)
    if "://" in home:  # buckets have no folders, only file names
        files = Storage(home).fs.find(home)
        names = {file.split(f"/{HOME}/")[1].split("/")[0] for file in files}
    else:
        names = {path.name for path in matching(Path(home), "*") if path.is_dir()}
    return [custom_run(run, f"{name}.csv") for name in sorted(names)]


def custom_source(run: Run, recordings: str, csv: str, group: str) -> tuple[Path, Path, str]:
    """Recordings, ratings and grouping column; the ratings ``demo`` are embedded and simulated.

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


def finetune_custom(
    run: Run,
    recordings: str | Path,
    csv: str | Path,
    group: str,
    *,
    dimensions: Sequence[str] = (),
    init: str = "ssast",
    source: str = "",
) -> CustomResult:
    """Train on custom ratings, fold by fold; writes predictions and the result to `custom_run`.

    Args:
        run: see `few_shot_run`.
        recordings, csv, group, dimensions: see `custom_ratings.read_ratings`.
        init, source: see `load_encoder`.

    Raises:
        InputError: see `custom_ratings.read_ratings`; a ``rating_scale`` other than ``dimension``;
            the run holds models of other ratings.
    """
    config = config_for(run, init)
    if config.rating_scale != "dimension":
        raise InputError(
            f"rating_scale={config.rating_scale}: dimensions of custom ratings may have different"
            " units. Leave it at 'dimension'"
        )
    found = custom_ratings.read_ratings(recordings, csv, group, dimensions)
    start, here = load_encoder(run, init, source), custom_run(run, csv)
    groups = found.index["content_group"].nunique()
    logger.info(
        f"{len(found.files)} clips, {groups} groups by {group}: {', '.join(found.dimensions)}"
    )
    clips, checksum = found.load(start.front_end)
    given = here, start, config, clips, start.front_end, found.index
    rated = CrossValidation(*given, questionnaire=found.questionnaire)
    simulated = percepiano.is_simulated(recordings)
    settings = {
        "init": init,
        "data": sources.OWN_LICENCE,
        "simulated": simulated,
        "ratings": checksum,
        "longest": max(start.front_end.seconds(len(codes)) for codes in clips.codes),
    }
    which, values, uncertainty = cross_validate(rated, settings)
    more: dict[str, Any] = {"uncertainty": uncertainty, "dimensions": found.dimensions}
    table = rated.table(rated.name, which, values, **more)
    predictions.write(table, here.predictions(rated.name))
    result = analysis.few_shot_table(table, found.index)
    (here.root / f"result_{rated.name}.csv").write_bytes(to_csv(result, "%.4f"))
    remarks = analysis.few_shot_remarks(result, found.index)
    return CustomResult(str(here.store or here.root), table, result, remarks, simulated)
