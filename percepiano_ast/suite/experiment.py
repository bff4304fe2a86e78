"""The whole experiment: from raw MIDI to the report, in stages that can be interrupted and
resumed."""

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
from percepiano_ast.config import PRETRAININGS, Preset, lookup
from percepiano_ast.data import asap, percepiano, predictions
from percepiano_ast.data.variants import SEPARATOR
from percepiano_ast.errors import InputError
from percepiano_ast.files import claim_directory, echo, write_json
from percepiano_ast.models.cnn import ENCODERS
from percepiano_ast.suite import hearing, rating
from percepiano_ast.suite.judged import JUDGED, SCORE, judge
from percepiano_ast.suite.packaging import package
from percepiano_ast.suite.run import Run, workers
from percepiano_ast.training.checkpoints import SAVE_MINUTES
from percepiano_ast.transcription import Listener

STARTS = (*PRETRAININGS, "scratch", *ENCODERS)
STAGES = ["stage", "minutes", "machine"]
_WORK = 1.0  # a stage that took fewer seconds had nothing to do


@dataclass(frozen=True)
class Experiment:
    """Models and data of a comparison.

    Attributes:
        midi: ASAP's folder or archive, ``percepiano``: PercePiano's folder.
        hours: of ASAP to render; ``voices``: synthesizers, used in turn.
        pianos: synthesizers for the rated clips; ``unseen``: a held-out soundfont, or empty.
        starts: names in `STARTS`; ``judged``: those with transcription, for which regressors are
            fitted under every protocol.
        seeds: for pre-training, heads, regressors.
        protocols: for regressors and baselines, including ``content``; empty for all.
        epochs: by start, if different from the preset's: epochs of pre-training, or of fine-tuning
            without pre-training. A comparison at equal cost gives more epochs to cheaper models.
    """

    midi: str
    percepiano: str
    hours: float = 18.0
    voices: tuple[str, ...] = (
        "musescore-small",
        "fluidr3mono",
        "musescore-small",
        "fluidr3mono",
        "builtin",
    )
    pianos: tuple[str, ...] = ("musescore-small", "fluidr3mono")
    unseen: str = "timgm6mb"
    starts: tuple[str, ...] = ("transcriptionstem",)
    judged: tuple[str, ...] = ("transcriptionstem",)
    seeds: tuple[int, ...] = (0,)
    protocols: tuple[str, ...] = ()
    epochs: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (*self.starts, *self.epochs):
            lookup(dict.fromkeys(STARTS), name, "start")
        if self.unseen in (*self.voices, *self.pianos):
            raise InputError(
                f"the held-out soundfont {self.unseen} is also used for training; choose"
                " another one"
            )
        if strangers := set(self.judged) - set(self.starts):
            raise InputError(
                f"judged: {', '.join(sorted(strangers))} is not among the starts"
                f" {', '.join(self.starts)}"
            )


def run_experiment(
    preset: Preset,
    out: str | Path,
    experiment: Experiment,
    minutes: float = 0.0,
    log: Callable[[str], None] = echo,
) -> Path | None:
    """Run all stages that are not complete; returns the report, or None if the time limit was
    reached before.

    Below ``out``: ``asap.zip``, ``maestro`` and ``percepiano`` (shards), ``seed_<k>`` (one run
    each), ``packaged`` (the model for recordings of any gain), ``baselines`` and ``results``:
    ``predictions_<protocol>.csv.gz``, the report on them, and ``experiment.json``; and
    ``stages.csv``.

    Args:
        minutes: time after which no new stage starts; 0 for no limit. The same call resumes.
            Pre-training saves a checkpoint at least every quarter of this time, so that an
            interrupted call loses little.

    Raises:
        InputError: a synthesizer that is not installed, ``out`` of another experiment, and errors
            of the stages.
    """
    out, begun = Path(out), time.monotonic()
    settings = {"preset": asdict(preset), "experiment": asdict(experiment)}
    # Data paths may differ between machines.
    for name in ("midi", "percepiano"):
        settings["experiment"].pop(name)
    claim_directory(out, settings)
    save_minutes = min(minutes / 4 or SAVE_MINUTES, SAVE_MINUTES)
    for name, stage in _stages(preset, out, experiment, save_minutes, log):
        if minutes and time.monotonic() - begun > 60 * minutes:
            log(
                f"time limit of {minutes:g} minutes reached before: {name}. Run the same command"
                " again to continue"
            )
            return None
        started = time.monotonic()
        log(f"== {name}")
        made = stage()
        if (seconds := time.monotonic() - started) > _WORK:
            _note(out, name, seconds)
    return made


def _stages(
    preset: Preset, out: Path, given: Experiment, save_minutes: float, log
) -> Iterator[tuple[str, Callable]]:
    first = _run(preset, out, given, given.seeds[0])
    folder = str(
        rating.percepiano_source(dataclasses.replace(first, root=out), given.percepiano, log)
    )
    archive = out / "asap.zip"
    if not archive.exists():
        options = {
            "hours": given.hours,
            "synthesizers": list(given.voices),
            "workers": workers(),
            "log": log,
        }
        yield "render performances", lambda: asap.render_archive(given.midi, archive, **options)
    yield "shards for pre-training", lambda: hearing.preprocess_maestro(first, str(archive))
    pianos = (*given.pianos, *([given.unseen] if given.unseen else []))
    yield (
        "shards of rated clips",
        lambda: rating.preprocess_percepiano(
            dataclasses.replace(first, root=out, clips=None), folder, pianos, log=log
        ),
    )
    for seed in given.seeds:
        run = _run(preset, out, given, seed)
        for start in given.starts:
            heads, epochs = run, given.epochs.get(start, 0)
            if start in PRETRAININGS:
                longer = run.changed("pretrain", epochs=epochs).for_pretraining(start)
                yield (
                    f"pre-train {start}, seed {seed}",
                    lambda run=longer: hearing.pretrain(run, log, save_minutes),
                )
            else:
                heads = run.changed("finetune", epochs=epochs)
            yield (
                f"fine-tune rating heads {start}, seed {seed}",
                lambda run=heads, start=start: _rated(run, start, log),
            )
            if start in given.judged:
                yield (
                    f"regress {start}, seed {seed}",
                    lambda run=run, start=start: judge(
                        run, start, folder, protocols=given.protocols, log=log
                    ),
                )
    if given.judged:
        yield "package", lambda: _package(first, given, folder, pianos, log)
    settings = floor.Settings(
        given.protocols, synthesizers=given.pianos, seed=given.seeds[0], workers=workers()
    )
    yield "baselines", lambda: floor.run(folder, out / "baselines", settings, log)
    yield "results", lambda: _results(out, given, percepiano.is_simulated(folder), log)


def _run(preset: Preset, out: Path, given: Experiment, seed: int) -> Run:
    heads = dataclasses.replace(preset.finetune, seed=seed, unseen=given.unseen)
    preset = dataclasses.replace(
        preset, pretrain=dataclasses.replace(preset.pretrain, seed=seed), finetune=heads
    )
    return Run(preset, out / f"seed_{seed}", shards=out / "maestro", clips=out / "percepiano")


def _rated(run: Run, start: str, log) -> None:
    """Predictions of the rating heads, unless they exist."""
    done = run.root / f"rated_{start}.json"
    if not done.exists():
        made = rating.finetune(run, start, log=log)
        write_json(done, {"models": sorted(made["model"].unique())})


def _package(first: Run, given: Experiment, folder: str, pianos: tuple[str, ...], log) -> None:
    """The first encoder of ``judged`` as a file, and a rating model on clips of equal loudness,
    with its predictions."""
    out, start = first.root.parent, given.judged[0]
    home = out / "packaged"
    level = dataclasses.replace(first, root=home, clips=out / "percepiano_levelled")
    ear, model = (
        home / f"ast-{first.preset.model.name}-{start}.safetensors",
        home / f"{first.preset.model.name}-rater.safetensors",
    )
    if not model.exists():
        # Recordings have reverberation, which a model trained on dry pianos mistakes for the pedal.
        rooms = [f"{piano}{SEPARATOR}room" for piano in given.pianos]
        # for the uncertainty alone
        rooms += [f"{given.unseen}{SEPARATOR}livingroom"] if given.unseen else []
        rating.preprocess_percepiano(level, folder, (*pianos, *rooms), one_loudness=True, log=log)
        home.mkdir(exist_ok=True)
        pretrained = first.for_pretraining(start).pretrain
        Listener.open(pretrained, log).write(ear, {"pretraining": start, "seed": given.seeds[0]})
        package(level, start, model, folder=folder, source=str(ear), log=log)


def _results(out: Path, given: Experiment, simulated: bool, log) -> Path:
    """One file of predictions per protocol, and the report on all of them."""
    home = out / "results"
    home.mkdir(exist_ok=True)
    found = [*out.glob("seed_*/predictions_*.csv"), *out.glob("baselines/predictions_*.csv.gz")]
    found += [
        *out.glob(f"seed_*/{JUDGED}/*/predictions_*.csv.gz"),
        *out.glob("packaged/packaged/predictions_*.csv.gz"),
    ]
    rows = pd.concat([pd.read_csv(path) for path in sorted(found)], ignore_index=True)
    # Single regressors, and feature sets that were not chosen, are reported under the main protocol
    # only.
    whole = rows["model"].isin([*floor.BASELINES]) | rows["model"].str.contains(
        rf"-{JUDGED}(?:\{SCORE})?(?:@|$)"
    )
    rows = rows[whole | (rows["protocol"] == "content")]
    rows = pd.concat(
        [rows, predictions.ensemble(rows[rows["model"].str.contains(f"-{JUDGED}")], JUDGED)],
        ignore_index=True,
    )
    paths = []
    for protocol, part in rows.groupby("protocol"):
        paths.append(home / f"predictions_{protocol}.csv.gz")
        predictions.write(part, paths[-1])
    write_json(
        home / "experiment.json", asdict(given) | {"machine": _machine(), "jax": jax.__version__}
    )
    # Score-informed models skip clips that do not match their score; the report lists them.
    options: dict[str, Any] = {"partial": True, "simulated": simulated, "reference": "audio-stats"}
    made = report.evaluate_files(paths, home, index=out / "baselines" / "index.csv", **options)
    log(f"{made}: {rows['model'].nunique()} models, {rows['protocol'].nunique()} protocols")
    return made


def _note(out: Path, name: str, seconds: float) -> None:
    """Add a row to ``stages.csv``: stage, duration, machine. An interrupted stage has one row per
    run."""
    row = pd.DataFrame([[name, round(seconds / 60, 2), _machine()]], columns=STAGES)
    path = out / "stages.csv"
    row.to_csv(path, mode="a", header=not path.exists(), index=False)


def _machine() -> str:
    device = jax.devices()[0]
    return f"{os.cpu_count()} cores {platform.machine()}" + f", {device.device_kind}" * (
        device.platform != "cpu"
    )
