"""The whole experiment: from raw MIDI to the page of results, in stages that each go on where they were interrupted."""

import dataclasses
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import pandas as pd

from percepiano_ast import report
from percepiano_ast.baselines import run as floor
from percepiano_ast.config import PRETRAININGS, InputError, Preset, choose, claim_directory, say, write_json
from percepiano_ast.data import asap, percepiano, predictions
from percepiano_ast.data.variants import SEPARATOR
from percepiano_ast.models.encoders import ENCODERS
from percepiano_ast.suite import hearing, rating
from percepiano_ast.suite.judged import JUDGED, SCORE, judge
from percepiano_ast.suite.packaging import package
from percepiano_ast.suite.run import Run, workers
from percepiano_ast.training.checkpoints import SAVE_MINUTES
from percepiano_ast.transcription import Listener

STARTS = (*PRETRAININGS, "scratch", *ENCODERS)
STAGES = ["stage", "minutes", "machine"]
_WORK = 1.0  # seconds below which a stage found its work done


@dataclass(frozen=True)
class Experiment:
    """What is compared, and on what.

    Attributes:
        midi: ASAP's folder or archive, ``percepiano``: PercePiano's folder.
        hours: of ASAP that are rendered, ``voices``: synthesizers that take turns in it.
        pianos: that play what is rated, ``unseen``: one more, which no model has heard, or none.
        starts: names in `STARTS`; ``judged``: those of them that hear notes and are judged under every protocol.
        seeds: of pre-training, heads, regressors.
        protocols: of what is judged and of the baselines, ``content`` among them; empty for all.
        epochs: by start, where it is not the preset's, of pre-training, or where there is none of fine-tuning: a comparison at
            equal cost gives more to those that cost less.
    """

    midi: str
    percepiano: str
    hours: float = 18.0
    voices: tuple[str, ...] = ("musescore-small", "fluidr3mono", "musescore-small", "fluidr3mono", "builtin")
    pianos: tuple[str, ...] = ("musescore-small", "fluidr3mono")
    unseen: str = "timgm6mb"
    starts: tuple[str, ...] = ("transcriptionstem",)
    judged: tuple[str, ...] = ("transcriptionstem",)
    seeds: tuple[int, ...] = (0,)
    protocols: tuple[str, ...] = ()
    epochs: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (*self.starts, *self.epochs):
            choose(dict.fromkeys(STARTS), name, "start")
        if self.unseen in (*self.voices, *self.pianos):
            raise InputError(f"{self.unseen} is to be unseen and is among the synthesizers that are heard; name another one")
        if strangers := set(self.judged) - set(self.starts):
            raise InputError(f"judged: {', '.join(sorted(strangers))} is not among the starts {', '.join(self.starts)}")


def run_experiment(
    preset: Preset, out: str | Path, experiment: Experiment, minutes: float = 0.0, log: Callable[[str], None] = say
) -> Path | None:
    """Everything that is not there yet; returns the report, or None where the time was over before.

    Below ``out``: ``asap.zip``, ``maestro`` and ``percepiano`` (shards), ``seed_<k>`` (a run each), ``packaged`` (the model for
    recordings of any gain), ``baselines`` and ``results``: ``predictions_<protocol>.csv.gz``, what `report` makes of them,
    ``experiment.json`` and ``stages.csv``.

    Args:
        minutes: no stage is begun after so many; 0 for as many as it takes. The same call goes on. A call that may be killed
            then loses little: pre-training keeps a checkpoint every quarter of them.

    Raises:
        InputError: a synthesizer that is not installed, ``out`` of another experiment, and what the stages refuse.
    """
    out, begun = Path(out), time.monotonic()
    settings = {"preset": asdict(preset), "experiment": asdict(experiment)}
    # Where data lie may change between machines.
    for name in ("midi", "percepiano"):
        settings["experiment"].pop(name)
    claim_directory(out, settings)
    save_minutes = min(minutes / 4 or SAVE_MINUTES, SAVE_MINUTES)
    for name, stage in _stages(preset, out, experiment, save_minutes, log):
        if minutes and time.monotonic() - begun > 60 * minutes:
            log(f"{minutes:g} minutes are over before {name}; the same command continues")
            return None
        started = time.monotonic()
        log(f"== {name}")
        made = stage()
        if (seconds := time.monotonic() - started) > _WORK:
            _note(out, name, seconds)
    return made


def _stages(preset: Preset, out: Path, given: Experiment, save_minutes: float, log) -> Iterator[tuple[str, Callable]]:
    first = _run(preset, out, given, given.seeds[0])
    folder = str(rating.percepiano_source(dataclasses.replace(first, root=out), given.percepiano, log))
    archive = out / "asap.zip"
    if not archive.exists():
        options = {"hours": given.hours, "synthesizers": list(given.voices), "workers": workers(), "log": log}
        yield "render performances", lambda: asap.render_archive(given.midi, archive, **options)
    yield "shards for pre-training", lambda: hearing.preprocess_maestro(first, str(archive))
    pianos = (*given.pianos, *([given.unseen] if given.unseen else []))
    yield (
        "shards of rated clips",
        lambda: rating.preprocess_percepiano(dataclasses.replace(first, root=out, clips=None), folder, pianos, log=log),
    )
    for seed in given.seeds:
        run = _run(preset, out, given, seed)
        for start in given.starts:
            heads, epochs = run, given.epochs.get(start, 0)
            if start in PRETRAININGS:
                longer = run.changed("pretrain", epochs=epochs).for_pretraining(start)
                yield f"pre-train {start}, seed {seed}", lambda run=longer: hearing.pretrain(run, log, save_minutes)
            else:
                heads = run.changed("finetune", epochs=epochs)
            yield f"rate by heads {start}, seed {seed}", lambda run=heads, start=start: _rated(run, start, log)
            if start in given.judged:
                yield (
                    f"judge {start}, seed {seed}",
                    lambda run=run, start=start: judge(run, start, folder, protocols=given.protocols, log=log),
                )
    if given.judged:
        yield "package", lambda: _package(first, given, folder, pianos, log)
    settings = floor.Settings(given.protocols, synthesizers=given.pianos, seed=given.seeds[0], workers=workers())
    yield "baselines", lambda: floor.run(folder, out / "baselines", settings, log)
    yield "results", lambda: _results(out, given, percepiano.is_simulated(folder), log)


def _run(preset: Preset, out: Path, given: Experiment, seed: int) -> Run:
    heads = dataclasses.replace(preset.finetune, seed=seed, unseen=given.unseen)
    preset = dataclasses.replace(preset, pretrain=dataclasses.replace(preset.pretrain, seed=seed), finetune=heads)
    return Run(preset, out / f"seed_{seed}", shards=out / "maestro", clips=out / "percepiano")


def _rated(run: Run, start: str, log) -> None:
    """Predictions of the heads; those that are there are not made again."""
    done = run.root / f"rated_{start}.json"
    if not done.exists():
        made = rating.finetune(run, start, log=log)
        write_json(done, {"models": sorted(made["model"].unique())})


def _package(first: Run, given: Experiment, folder: str, pianos: tuple[str, ...], log) -> None:
    """The first encoder that is judged in a file of its own, and the model that rates, at one loudness, with its predictions."""
    out, start = first.root.parent, given.judged[0]
    home = out / "packaged"
    level = dataclasses.replace(first, root=home, clips=out / "percepiano_levelled")
    ear, model = (home / f"ast-{first.preset.model.name}-{name}.safetensors" for name in (start, "judged"))
    if not model.exists():
        # A recording is made in a room, which a model of dry pianos takes for pedal.
        rooms = tuple(f"{piano}{SEPARATOR}room" for piano in given.pianos)
        rating.preprocess_percepiano(level, folder, (*pianos, *rooms), one_loudness=True, log=log)
        home.mkdir(exist_ok=True)
        pretrained = first.for_pretraining(start).pretrain
        Listener.open(pretrained, log).write(ear, {"pretraining": start, "seed": given.seeds[0]})
        package(level, start, model, folder=folder, source=str(ear), log=log)


def _results(out: Path, given: Experiment, simulated: bool, log) -> Path:
    """One file of predictions a protocol, and the report on all of them."""
    home = out / "results"
    home.mkdir(exist_ok=True)
    found = [*out.glob("seed_*/predictions_*.csv"), *out.glob("baselines/predictions_*.csv.gz")]
    found += [*out.glob(f"seed_*/{JUDGED}/*/predictions_*.csv.gz"), *out.glob("packaged/packaged/predictions_*.csv.gz")]
    rows = pd.concat([pd.read_csv(path) for path in sorted(found)], ignore_index=True)
    # Single regressors, and sets that were not chosen, are of interest under the main protocol alone.
    whole = rows["model"].isin([*floor.BASELINES]) | rows["model"].str.contains(rf"-{JUDGED}(?:\{SCORE})?(?:@|$)")
    rows = rows[whole | (rows["protocol"] == "content")]
    rows = pd.concat([rows, predictions.ensemble(rows[rows["model"].str.contains(f"-{JUDGED}")], JUDGED)], ignore_index=True)
    paths = []
    for protocol, part in rows.groupby("protocol"):
        paths.append(home / f"predictions_{protocol}.csv.gz")
        predictions.write(part, paths[-1])
    write_json(home / "experiment.json", asdict(given) | {"machine": _machine(), "jax": jax.__version__})
    # Models that see the score leave out who does not play it; the report lists them.
    options: dict[str, Any] = {"partial": True, "simulated": simulated, "reference": "audio-stats"}
    made = report.evaluate_files(paths, home, index=out / "baselines" / "index.csv", **options)
    log(f"{made}: {rows['model'].nunique()} models, {rows['protocol'].nunique()} protocols")
    return made


def _note(out: Path, name: str, seconds: float) -> None:
    """A line in ``stages.csv``: what took how long, where; a stage that was interrupted has one for each time that it ran."""
    row = pd.DataFrame([[name, round(seconds / 60, 2), _machine()]], columns=STAGES)
    path = out / "stages.csv"
    row.to_csv(path, mode="a", header=not path.exists(), index=False)


def _machine() -> str:
    device = jax.devices()[0]
    return f"{os.cpu_count()} cores {platform.machine()}" + f", {device.device_kind}" * (device.platform != "cpu")
