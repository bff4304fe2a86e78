"""Command line: ``percepiano COMMAND``. Exit codes: 0 done, 2 bad input or usage, 1 the run failed.

What a command needs is imported when it is called, so that ``--help`` is quick.
"""

import dataclasses
import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import typer

from percepiano_ast import __version__
from percepiano_ast.config import PRESETS, PRETRAININGS, lookup
from percepiano_ast.errors import InputError, exit_code
from percepiano_ast.files import as_path, printable, show_progress, summary

app = typer.Typer(
    help="Rate how a piano performance is played, and train and evaluate models that do.",
    epilog="Training, in order: preprocess, pretrain, preprocess --percepiano, finetune, evaluate."
    " Each step resumes.",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
UsageError: Any = typer.BadParameter.__base__  # typer's own click has no public name for it
RATE, TRAIN, EVALUATE, RUNS = "Rate recordings", "Train", "Evaluate and explain", "Runs"


def command(panel: str, example: str):
    """Register a command in a group of the help, with an example."""
    return app.command(rich_help_panel=panel, epilog=f"Example: percepiano {example}")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    return run_app(app, "percepiano", arguments)


def run_app(app: typer.Typer, program: str, arguments: list[str] | None = None) -> int:
    """Run the command of an app that the arguments name (default: those of the process), with
    `current_names`; returns the exit code."""
    commands = typer.main.get_command(app)

    for stream in (sys.stdout, sys.stderr):  # any name can be printed on any console
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def run():
        given = sys.argv[1:] if arguments is None else arguments
        words = current_names(given or ["--help"], commands)
        try:
            code = commands.main(words, prog_name=program, standalone_mode=False)
            return code if given else 2
        except typer.Abort:
            raise KeyboardInterrupt from None
        except UsageError as error:
            where = error.ctx.command_path if error.ctx else program
            message = error.format_message().rstrip(".")
            raise InputError(f"{message}. See {where} --help") from None

    return exit_code(run)


# Names until version 0.1, accepted for one release.
OLD_COMMANDS = {
    "judge": "regress", "listen": "sensitivity", "switches": "ablate", "baseline": "baselines"
}  # fmt: skip
OLD_OPTIONS = {
    "--accumulate": "--accum-steps",
    "--curve": "--learning-curve",
    "--limit-hours": "--max-hours",
    "--max-bad": "--max-errors",
    "--one-loudness": "--normalize-loudness",
    "--renderings": "--recordings",
    "--shard-params": "--fsdp",
    "--stored": "--dtype",
    "--target": "--check-memory",
    "--to": "--output",
    "--trained": "--strategies",
}
# What these options mean without a value.
BARE = {"--check-memory": "v5e-1", "--other-synthesizers": "none", "--strategies": "all"}


def current_names(arguments: list[str], commands) -> list[str]:
    """Arguments in today's names; an option that takes several values gets its name before each:
    ``--protocol content performer`` becomes ``--protocol content --protocol performer``."""
    given = sorted(map(str, arguments), key=lambda word: word not in ("-q", "--quiet"))
    at = next((i for i, word in enumerate(given) if not word.startswith("-")), None)
    if at is None:
        return given
    if given[at] in OLD_COMMANDS:
        new = OLD_COMMANDS[given[at]]
        print(f"{given[at]} is now called {new}; use that name", file=sys.stderr)
        given[at] = new
    found = commands.commands.get(given[at])
    several = {
        name for param in (found.params if found else []) if param.multiple for name in param.opts
    }
    if "--dry-run" in given:
        given = [word for word in given if word != "--dry-run"]
        given += [] if "--target" in given else ["--check-memory"]
    result, option, values = given[: at + 1], "", 0
    for word in [*given[at + 1 :], None]:
        if word is None or word.startswith("-"):
            if option in BARE and not values:
                result += [BARE[option]]
            if word is None:
                break
            name, equals, value = word.partition("=")
            word = OLD_OPTIONS.get(name, name) + equals + value
            option, values = (word if word in several else ""), 0
        elif option:
            result += [option] if values else []
            values += 1
        result.append(word)
    return result


def _print_version(asked: bool) -> None:
    if asked:
        print(f"percepiano {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: bool = typer.Option(
        False, "--version", help="Print the version.", callback=_print_version, is_eager=True
    ),
    quiet: bool = typer.Option(
        False, "--quiet", "-q", help="Print results and warnings, no progress."
    ),
) -> None:
    if context.invoked_subcommand != "rate":  # its standard output is for ratings
        show_progress(quiet)


# --- Options of several commands ------------------------------------------------------------------


def option(default, text: str, metavar: str | None = None, *names: str) -> Any:
    """An option; its name and default follow from the parameter."""
    return typer.Option(default, *names, help=text, metavar=metavar)


def flag(name: str, text: str) -> Any:
    """An option without a value."""
    return typer.Option(False, name, help=text)


FILES = typer.Argument(..., metavar="FILE...", help="WAV, FLAC, OGG, MP3 or M4A")
PRESET = option("demo", f"Size and schedule: {', '.join(PRESETS)}.")
RUN = option("", "Directory of the run; default: runs/PRESET.", "DIR", "--out")
STORE = option("", "Folder or gs://BUCKET/PREFIX of checkpoints; default: the run.", "LOCATION")
FOLDER = option(..., "PercePiano's folder, or demo.", "FOLDER")
OUT = option(..., "Output directory.", "DIR", "--out")
SET = option([], "Setting of config.FinetuneConfig; repeatable.", "NAME=VALUE", "--set")
EPOCHS = option(0, "Number of epochs; 0: from the preset.", "N")
PRECISION = option("", "float32, bfloat16 or float16; default: the fastest of the device.", "TYPE")
ATTENTION = option("", "xla, cudnn or heads; default: the fastest of the device.", "KERNEL")
INIT = option(
    "ssast",
    f"Initial encoder: {', '.join(PRETRAININGS)} (pre-training of this run), scratch, audioset,"
    " cnn (a CNN from scratch), or baseline (models without a learned audio encoder).",
    "NAME",
)
WEIGHTS = option("", "Published weights for audioset; default: downloaded.", "FILE", "--weights")
TRANSCRIBER = option("transcription", "Pre-training that transcribes.", "NAME", "--init")
TRANSCRIBER_FILE = option("", "File of the encoder; default: from the run.", "FILE", "--weights")
PROTOCOLS = option([], "Protocols of the index; default: all.", "P", "--protocol")
WORKERS = option(0, "Number of processes; 0: one per core.", "N")
SEED = option(0, "Seed of every random choice.", "N")
INDEX = option("", "CSV index of clips; default: PercePiano's.", "FILE")


def run_of(preset: str, out: str, store: str = ""):
    """The run given by ``--preset``, ``--out`` and ``--store``."""
    from percepiano_ast.pipeline import Run

    known = lookup(PRESETS, preset, "preset")
    return Run(known, as_path(out or f"runs/{known.name}"), store=store)


# --- Rating ---------------------------------------------------------------------------------------


@command(RATE, "rate take.m4a --html page.html")
def rate(
    files: list[str] = typer.Argument(
        ..., metavar="FILE...", help="WAV, FLAC, OGG, MP3 or M4A, or a folder of them"
    ),
    as_json: bool = flag("--json", "Print one JSON array to standard output."),
    csv: str = option("", "Write a table with one row per recording and dimension.", "FILE"),
    html: str = option(
        "", "Write a page with the sound (.html); two recordings are compared.", "FILE"
    ),
    score: str = option(
        "", "Score of the music, MIDI or MusicXML: timing is rated better.", "FILE"
    ),
    weights: str = option("", "Another rating model, a file or URL#sha256=...", "FILE"),
    run: str = option("", "Use a fine-tuned run instead: its folder, --store or own/NAME.", "DIR"),
    model: str = option("", "Model below DIR/finetune; default: the pre-trained one.", "NAME"),
):
    """Rate recordings on 19 dimensions, by the bundled model or a run of your own.

    The bundled model is piano-rater. Nothing leaves this machine.
    """
    from percepiano_ast.inference import rate as rates
    from percepiano_ast.inference import rating

    recordings, left = rates.recordings_in(files)
    for line in summary(left):
        print(line, file=sys.stderr)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    ascii_only = "utf" not in (sys.stdout.encoding or "").lower()

    def show(result: rating.Rating | dict) -> None:
        if isinstance(result, rating.Rating) and not as_json:
            print(rating.to_text(result, colour, ascii_only) + "\n", flush=True)

    def progress(file: str, stage: str) -> None:
        """On a terminal, show the current stage of a recording in one line, or erase it."""
        if sys.stderr.isatty():
            number = [*map(str, recordings)].index(file) + 1
            name = f"{number}/{len(recordings)} {printable(Path(file).name)}"[:44]
            line = f"{name}: {stage}" if stage else ""
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)

    results = rates.rate_files(
        recordings,
        weights=weights,
        run=run,
        model=model,
        score=score,
        csv=csv,
        html=html,
        progress=progress,
        show=show,
    )
    rated = [one for one in results if isinstance(one, rating.Rating)]
    errors = [one for one in results if isinstance(one, dict)]
    if as_json:
        print(
            json.dumps(
                [one if isinstance(one, dict) else one.as_json() for one in results], indent=1
            )
        )
    elif len(rated) == len(results) == 2 and all(one.within for one in rated):
        print(rating.comparison_text(*rated) + "\n")
    for name, path in (("table", csv), ("page", html if rated else "")):
        if path:
            address = Path(path).resolve().as_uri()
            print(f"{name}: {address}", file=sys.stderr if as_json else sys.stdout)
    for error in errors:
        print(f"{printable(error['file'])}: {error['error']}", file=sys.stderr)
    return 2 if errors else 0


@command(TRAIN, "preprocess --preset base --out runs/base")
def preprocess(
    preset: str = PRESET,
    out: str = RUN,
    source: str = option(
        "", "MAESTRO's archive (path, https://, gs://) or a folder; default: from the preset."
    ),
    percepiano: str = option("", "Render PercePiano instead: its folder, or demo.", "FOLDER"),
    synthesizers: list[str] = option(
        [], "builtin, soundfonts or .sf2/.sf3 files; default: the preset's.", "NAME"
    ),
    recordings: str = option("", "Recordings of all clips, used instead of rendering.", "DIR"),
    partial: bool = flag("--partial", "Allow clips without a recording, and list them."),
    normalize_loudness: bool = flag(
        "--normalize-loudness", "Normalise to -23 LUFS plus up to 3 dB, to rate at any gain."
    ),
    init: str = option("", "audioset: also write shards with its front end.", "NAME"),
    max_hours: float = option(0.0, "Use about H hours; 0: all.", "H"),
    dtype: str = option("uint8", "uint8 (0.5 dB steps), or float16, twice as large."),
    max_errors: int = option(0, "Unreadable recordings to tolerate.", "N"),
    workers: int = WORKERS,
    verify: bool = flag("--verify", "Verify the checksums of finished shards."),
    beam_runner: str = option("", "Apache Beam runner, such as DataflowRunner."),
    beam_option: list[str] = option([], "Beam option; repeatable.", "NAME=VALUE"),
):
    """Convert recordings, or renderings of PercePiano's MIDI, to log-mel shards."""
    from percepiano_ast import pipeline

    run = run_of(preset, out)
    if verify:
        from percepiano_ast.data import build

        directory = run.percepiano if percepiano else run.maestro
        wrong = build.verify(directory)
        for line in wrong:
            print(f"error: {line}", file=sys.stderr)
        if wrong:
            print(
                f"error: {len(wrong)} faults. Delete the named files and run preprocess again to"
                " rebuild them.",
                file=sys.stderr,
            )
            return 1
        print(f"{directory}: all files match their checksums")
    elif percepiano:
        made = pipeline.preprocess_percepiano(
            run,
            percepiano,
            tuple(synthesizers),
            init=init,
            recordings=recordings,
            partial=partial,
            normalize_loudness=normalize_loudness,
        )
        print(made)
    else:
        beam = beam_runner, tuple(f"--{pair}" for pair in beam_option)
        work = pipeline.BuildOptions(workers or pipeline.workers(), max_errors, *beam)
        print(pipeline.preprocess_maestro(run, source, work, max_hours=max_hours, dtype=dtype))
    return 0


@command(TRAIN, "pretrain --preset base --out runs/base --pretraining transcription")
def pretrain(
    preset: str = PRESET,
    out: str = RUN,
    store: str = STORE,
    pretraining: str = option(
        "ssast",
        "ssast (400 of 512 patches masked), ssast15 (15 % masked), ssastframe (frames as"
        " patches), visible (faster: the encoder input is visible patches only), transcription"
        " (notes and pedals), joint (transcription and visible), transcriptionstem"
        " (transcription with convolutions before the patches).",
        "NAME",
    ),
    epochs: int = EPOCHS,
    batch_size: int = option(0, "Batch size over all devices; 0: from the preset.", "N"),
    accum_steps: int = option(0, "Micro-batches per batch; 0: one.", "N"),
    remat: bool | None = option(None, "Recompute activations.", None, "--remat/--no-remat"),
    fsdp: bool = flag("--fsdp", "Shard parameters over the devices."),
    precision: str = PRECISION,
    attention: str = ATTENTION,
    distributed: bool = flag("--distributed", "One of several processes (TPU pod, SLURM ...)."),
    check_memory: list[str] = option(
        [],
        "Compile for v5e-1, v6e-1, v5e-8 or v3-8 instead, and report whether the model fits.",
        "TARGET",
    ),
):
    """Pre-train on the shards; saves a checkpoint every epoch and resumes."""
    from percepiano_ast import pipeline

    run = run_of(preset, out, store).for_pretraining(pretraining)
    run = run.changed("pretrain", epochs=epochs, batch_size=batch_size)
    compute = {"precision": precision, "accum_steps": accum_steps, "remat": remat}
    run = run.changed("compute", **compute, attention=attention, fsdp=fsdp or None)
    if not check_memory:
        pipeline.pretrain(run, distributed=distributed)
        return
    from percepiano_ast.training import dryrun

    for target in check_memory:
        print(dryrun.dry_run(run.preset, target), flush=True)


@command(TRAIN, "finetune --preset base --out runs/base --init ssast")
def finetune(
    preset: str = PRESET,
    out: str = RUN,
    store: str = STORE,
    init: str = INIT,
    weights: str = WEIGHTS,
    epochs: int = EPOCHS,
    settings: list[str] = SET,
    precision: str = PRECISION,
    attention: str = ATTENTION,
    ratings: str = option("", "Custom ratings, one row per clip; or demo.", "CSV"),
    recordings: str = option("", "Recordings of the custom ratings.", "DIR"),
    group: str = option("", "Column of held-out groups, such as piece or pianist.", "COLUMN"),
    dimensions: list[str] = option([], "Rating columns; default: all others.", "COLUMN"),
):
    """Train rating heads on PercePiano or on custom ratings, fold by fold.

    Writes out-of-fold predictions.
    """
    from percepiano_ast import pipeline

    run, custom = run_of(preset, out, store), any((ratings, recordings, group, dimensions))
    run = pipeline.few_shot_run(run) if custom else run
    run = run.changed("finetune", epochs=epochs).switched(settings)
    run = run.changed("compute", precision=precision, attention=attention)
    if custom:
        given = pipeline.custom_source(run, recordings, ratings, group)
        found = pipeline.finetune_custom(
            run, *given, dimensions=dimensions, init=init, source=weights
        )
        print(found.result.round(3).to_string(index=False))
        for line in found.remarks:
            print(line)
        print(f"to rate another recording: percepiano rate FILE --run {found.home}")
    elif init == "baseline":
        pipeline.predict_baselines(run)
    else:
        pipeline.finetune(run, init, weights)


@command(TRAIN, "regress --preset mini --init transcriptionstem --percepiano FOLDER")
def regress(
    preset: str = PRESET,
    out: str = RUN,
    init: str = TRANSCRIBER,
    weights: str = TRANSCRIBER_FILE,
    percepiano: str = option("", "PercePiano's folder; default: from the preset.", "FOLDER"),
    protocol: list[str] = PROTOCOLS,
    learning_curve: bool = flag("--learning-curve", "Compute a learning curve instead."),
    settings: list[str] = SET,
):
    """Train regressors on the transcription and features of a pre-trained encoder.

    Features are notes, pedals, embeddings and audio statistics, selected within the training folds
    of every protocol. Models named +score are score-informed.
    """
    from percepiano_ast import pipeline

    given = run_of(preset, out).switched(settings), init, percepiano
    if learning_curve:
        print(pipeline.learning_curve(*given, source=weights))
        return
    for path in pipeline.fit_regressors(*given, protocols=tuple(protocol), source=weights):
        print(path)


@command(TRAIN, "package --preset mini --init transcriptionstem --output piano-rater.safetensors")
def package(
    preset: str = PRESET,
    out: str = RUN,
    init: str = TRANSCRIBER,
    weights: str = TRANSCRIBER_FILE,
    percepiano: str = option("", "PercePiano's folder; default: from the preset.", "FOLDER"),
    output: str = option("", "Output .safetensors file; default: the bundled model.", "FILE"),
    settings: list[str] = SET,
):
    """Build the bundled model from all rated clips of a run.

    Needs shards from preprocess --normalize-loudness; writes the model, its card and held-out
    predictions.
    """
    from percepiano_ast import pipeline
    from percepiano_ast.inference.rate import BUNDLED

    run = run_of(preset, out).switched(settings)
    made = pipeline.package_model(run, init, output or BUNDLED, folder=percepiano, source=weights)
    print(made)


@command(TRAIN, "ablate --preset base --out runs/base --strategies last lora")
def ablate(
    preset: str = PRESET,
    out: str = RUN,
    init: str = INIT,
    weights: str = WEIGHTS,
    epochs: int = EPOCHS,
    settings: list[str] = SET,
    seeds: int = option(0, "Seeds per setting; 0: 3, with --strategies 1.", "N"),
    inner: int | None = option(None, "Outer fold to exclude, to test a choice on it.", "FOLD"),
    strategies: list[str] = option(
        [],
        "Instead compare strategies that train the encoder, and augmentations: all, or some of"
        " last gradual full lora SpecAugment mixup gain; resumes.",
        "NAME",
    ),
):
    """Compare settings of the rating heads on the frozen encoder, one at a time."""
    from percepiano_ast import pipeline

    run = run_of(preset, out).changed("finetune", epochs=epochs).switched(settings)
    if not strategies:
        print(pipeline.ablate_heads(run, init, weights, n_seeds=seeds or 3, inner=inner))
    elif inner is not None:
        raise InputError("--inner does not apply to --strategies, which uses all folds; omit one")
    else:
        only = [] if strategies == ["all"] else strategies
        print(pipeline.ablate_training(run, init, weights, only=only, n_seeds=seeds or 1))


@command(TRAIN, "baselines --percepiano FOLDER --out runs/baselines")
def baselines(
    percepiano: str = FOLDER,
    out: str = OUT,
    protocol: list[str] = PROTOCOLS,
    names: list[str] = option([], "Such as midi-stats+score; default: all.", "NAME", "--baselines"),
    synthesizers: list[str] = option(["musescore-small"], "Synthesizers of the audio.", "NAME"),
    seed: int = SEED,
    workers: int = WORKERS,
):
    """Train baselines without a learned audio encoder, fold by fold.

    Writes out-of-fold predictions. Models named +score are score-informed; clips that do not match
    their score are listed in without_score.csv.
    """
    from percepiano_ast import pipeline
    from percepiano_ast.pipeline.baselines import BaselineOptions, run_baselines

    given = tuple(protocol), tuple(names), tuple(synthesizers), seed, workers or pipeline.workers()
    print(run_baselines(percepiano, out, BaselineOptions(*given)))


# --- Evaluation -----------------------------------------------------------------------------------


@command(EVALUATE, "evaluate runs/base/predictions_*.csv --out runs/base/evaluation")
def evaluate(
    predictions: list[str] = typer.Argument(
        ..., metavar="PREDICTIONS...", help="predictions*.csv or .csv.gz"
    ),
    out: str = OUT,
    index: str = INDEX,
    partial: bool = flag("--partial", "Allow predictions that do not cover the protocol."),
    permutations: int = option(2000, "Permutations per comparison.", "N"),
    seed: int = SEED,
    min_difference: float | None = option(
        None,
        "Compare pairs whose ratings differ by at least D; default: 0.074, a standard error.",
        "D",
    ),
    ceiling: str = option("", "Noise ceiling of `reliability`; default: PercePiano's.", "FILE"),
    reference: str = option(
        "",
        "Reference of the comparison page; default: the best audio-only model, no encoder.",
        "MODEL",
    ),
):
    """Evaluate predictions: metrics, comparisons and a report."""
    from percepiano_ast.evaluation import EvaluationOptions
    from percepiano_ast.studies import report

    settings = EvaluationOptions(n_permutations=permutations, seed=seed)
    if min_difference is not None:
        settings = dataclasses.replace(settings, min_difference=min_difference)
    made = report.evaluate_files(
        predictions,
        out,
        index or None,
        partial=partial,
        settings=settings,
        ceiling=ceiling or None,
        reference=reference,
    )
    print(made)


@command(EVALUATE, "reliability FOLDER --out runs/raters")
def reliability(
    raters: str = typer.Argument(..., metavar="RATERS", help="PercePiano's folder, or a rater CSV"),
    out: str = OUT,
    index: str = INDEX,
    splits: int = option(500, "Random splits of the raters.", "N"),
    seed: int = SEED,
):
    """Estimate inter-rater agreement: ICC, split-half reliability, noise ceiling."""
    from percepiano_ast.data.percepiano import load_index
    from percepiano_ast.evaluation import predictions
    from percepiano_ast.evaluation import reliability as agreement

    known = predictions.load_index(index) if index else load_index(raters)
    tables = agreement.evaluate(agreement.read_raters(raters), known, splits, seed)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for name, one in tables.items():
        one.to_csv(folder / f"{name}.csv", float_format="%.4f", lineterminator="\n")
    print(f"{folder}: {', '.join(f'{name}.csv' for name in tables)}")


@command(EVALUATE, "sensitivity --percepiano FOLDER --model runs/base --out runs/sensitivity")
def sensitivity(
    percepiano: str = FOLDER,
    model: list[str] = option(
        ...,
        "audio-stats and midi-stats (fitted here), piano-rater (bundled), a model file,"
        " directories of fine-tuned runs, or module:attribute of a rating function.",
        "MODEL",
        "--model",
    ),
    out: str = OUT,
    clips: int = option(100, "Number of performances to draw.", "N"),
    synthesizer: str = option("", "Synthesizer of the test; default: musescore-small.", "NAME"),
    other_synthesizers: list[str] = option(
        [], "Synthesizers of the robustness test, or none; default: all.", "NAME"
    ),
    seed: int = SEED,
    workers: int = WORKERS,
):
    """Rate real performances before and after one change each (sensitivity test)."""
    from percepiano_ast import pipeline
    from percepiano_ast.studies import sensitivity as test

    others = () if other_synthesizers == ["none"] else tuple(other_synthesizers) or None
    options = test.SensitivityOptions(
        clips, synthesizer or test.SYNTHESIZER, others, seed, workers or pipeline.workers()
    )
    print(test.run_sensitivity(percepiano, out, model, options))


@command(EVALUATE, "explain take.wav --run runs/base --dimension timbre_soft_loud --out why")
def explain(
    files: list[str] = FILES,
    run: str = option(..., "A run that was fine-tuned, or its --store.", "DIR"),
    dimension: list[str] = option(..., "Such as timing_stable_unstable.", "KEY"),
    out: str = OUT,
    model: str = option("", "Model below DIR/finetune; default: the pre-trained one.", "NAME"),
    midi: str = option("", "MIDI of the single recording: add contributions of notes.", "FILE"),
    baseline: str = option("mean", "Reference input: mean (the mean spectrum) or silence."),
    seconds: float = option(5.0, "Length of the excerpt.", "S"),
    checks: bool = flag("--checks", "Deletion curves and randomised weights over all FILEs."),
):
    """Attribute a rating to time, frequency and notes, and check the attribution."""
    from percepiano_ast.studies import explain as explanation

    explanation.explain_files(
        files,
        run=run,
        out=out,
        dimensions=dimension,
        model=model,
        midi=midi,
        baseline=baseline,
        seconds=seconds,
        with_checks=checks,
    )


# --- Runs -----------------------------------------------------------------------------------------


@command(RUNS, "status --preset base --out runs/base")
def status(preset: str = PRESET, out: str = RUN, store: str = STORE):
    """List the shards, checkpoints and results of a run: location, progress, age, integrity."""
    from percepiano_ast import notebook

    run = run_of(preset, out, store)
    table = notebook.status(run)
    if table.empty:
        where = f"{run.root} and {run.store}" if run.store else run.root
        raise InputError(f"no run in {where}; give its --out and --store.")
    print(table.to_string(index=False))


@command(RUNS, "notebooks --preset demo --out runs/demo")
def notebooks(
    preset: str = PRESET,
    out: str = RUN,
    settings: list[str] = option(
        [], "Form field, such as SEED=1; repeatable.", "NAME=VALUE", "--set"
    ),
    keep_outputs: bool = flag("--keep-outputs", "Save the outputs in the repository's notebooks."),
):
    """Run the notebooks without a browser."""
    from percepiano_ast import run_notebooks

    lookup(PRESETS, preset, "preset")
    folder = Path(out or f"runs/{preset}").resolve()
    home = run_notebooks.FOLDER.parent
    # Notebooks run in the repository and show paths relative to it.
    shown = str(folder.relative_to(home) if folder.is_relative_to(home) else folder)
    values: dict[str, Any] = {"PRESET": preset, "SAVE_TO": shown}
    for pair in settings:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"--set {pair!r} is not NAME=VALUE; write for example SEED=1.")
        name = run_notebooks.OLD_ROWS.get(name, name)
        values[name] = int(value) if value.isdigit() else value
    run_notebooks.run(folder, values, save_outputs=keep_outputs)
    if values["SAVE_TO"] == shown:  # otherwise the last notebook has printed the path
        print(f"report: {folder / 'evaluation' / 'report.html'}")


@command(RUNS, "convert runs/base/pretrain/ssast --output ssast.safetensors")
def convert(
    source: str = typer.Argument(
        ..., help=".safetensors, .pth, or folder of a pre-training or Hugging Face"
    ),
    output: str = option(..., ".safetensors file to write; for hf_ast a folder.", "FILE"),
    kind: str = option("", "ast or hf_ast; default: unchanged."),
    frames: int = option(0, "Frames of a window, of weights that do not state it.", "N"),
    stride: str = option("", "Their stride, or those of frequency and time.", "N[,N]"),
):
    """Convert weights: ours, the authors' AST and SSAST, Hugging Face's AST."""
    from percepiano_ast.pipeline import run

    if stride and not re.fullmatch(r"\d{1,4}(,\d{1,4})?", stride):
        raise InputError(f"--stride {stride}: give one number, or two as in 10,16.")
    strides = tuple(int(number) for number in stride.split(",") if number)
    print(run.convert(source, output, kind, frames=frames, stride=strides))
