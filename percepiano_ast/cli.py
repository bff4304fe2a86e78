"""Command line: ``percepiano COMMAND``. Exit codes: 0 done, 2 bad input or usage, 1 the run
failed.

What a command needs is imported when it is called, so that ``--help`` is quick.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from percepiano_ast import __version__
from percepiano_ast.config import PRESETS, PRETRAININGS, lookup
from percepiano_ast.errors import InputError, exit_code
from percepiano_ast.files import as_path, show_progress


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    text = "Rate how a piano performance is played, and train and evaluate models that do."
    steps_in_order = "preprocess, pretrain, preprocess --percepiano, finetune, evaluate"
    epilog = f"Training, in order: {steps_in_order}. Each step resumes."
    parser = argparse.ArgumentParser(prog="percepiano", description=text, epilog=epilog)
    parser.add_argument("--version", action="version", version=f"percepiano {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name, function, text, example=""):
        epilog = f"Example: {example}" if example else None
        command = commands.add_parser(name, help=text, description=text, epilog=epilog)
        command.set_defaults(function=function)
        return option_of(command)

    for add_commands in (_add_steps, _add_evaluation, _add_recordings):
        add_commands(add)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parsed = parser().parse_args(arguments)
    show_progress()
    return exit_code(lambda: parsed.function(parsed))


# --- Options of several commands ------------------------------------------------------------------


def option_of(command: argparse.ArgumentParser) -> Callable[..., None]:
    """``add_argument`` with a help text second and a type that follows from the default: False is a
    flag, a list takes one value or more."""

    def option(name: str, text: str, metavar: str = "", default="", **more) -> None:
        if default is False:
            more["action"] = "store_true"
        elif isinstance(default, list) and "action" not in more:
            more.setdefault("nargs", "+")
        elif default is not None and "action" not in more:
            more.setdefault("type", type(default))
        if metavar:
            more["metavar"] = metavar
        command.add_argument(name, help=text, default=default, **more)

    return option


def run_of(arguments):
    """The run given by ``--preset``, ``--out`` and ``--store``."""
    from percepiano_ast.pipeline import Run

    preset = lookup(PRESETS, arguments.preset, "preset")
    out = as_path(arguments.out or f"runs/{preset.name}")
    return Run(preset, out, store=getattr(arguments, "store", ""))


def add_run(option) -> None:
    """Options ``--preset`` and ``--out``."""
    names = ", ".join(PRESETS)
    option("--preset", f"size and schedule: {names} (default: demo)", default="demo")
    option("--out", "directory of the run (default: runs/PRESET)", "DIR")


def add_store(option) -> None:
    """Option ``--store``."""
    option(
        "--store",
        "storage location of checkpoints: a folder or gs://BUCKET/PREFIX (default: the directory of"
        " the run)",
        "LOCATION",
    )


def add_set(option, such_as: str) -> None:
    """Option ``--set``."""
    text = f"setting of fine-tuning, such as {such_as}; repeatable; see config.FinetuneConfig"
    option("--set", text, "NAME=VALUE", [], action="append")


# --- Steps of the training, and the state of a run ------------------------------------------------


def _notebooks(arguments):
    from percepiano_ast import run_notebooks

    lookup(PRESETS, arguments.preset, "preset")
    out = Path(arguments.out or f"runs/{arguments.preset}").resolve()
    home = run_notebooks.FOLDER.parent
    # Notebooks run in the repository and show paths relative to it.
    shown = str(out.relative_to(home) if out.is_relative_to(home) else out)
    values = {"PRESET": arguments.preset, "KEEP_IN": shown}
    for pair in arguments.set:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"--set {pair!r} is not NAME=VALUE; write for example SEED=1.")
        values[name] = int(value) if value.isdigit() else value
    run_notebooks.run(out, values, keep=arguments.keep_outputs)
    if values["KEEP_IN"] == shown:  # otherwise the last notebook has printed the path
        print(f"report: {out / 'evaluation' / 'report.html'}")


def _preprocess(arguments):
    from percepiano_ast import pipeline

    run = run_of(arguments)
    if arguments.verify:
        from percepiano_ast.data import build

        directory = run.percepiano if arguments.percepiano else run.maestro
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
    elif arguments.percepiano:
        made = pipeline.preprocess_percepiano(
            run,
            arguments.percepiano,
            tuple(arguments.synthesizers),
            init=arguments.init,
            recordings=arguments.renderings,
            partial=arguments.partial,
            normalize_loudness=arguments.one_loudness,
        )
        print(made)
    else:
        beam = (arguments.beam_runner, tuple(f"--{option}" for option in arguments.beam_option))
        work = pipeline.BuildOptions(
            arguments.workers or pipeline.workers(), arguments.max_bad, *beam
        )
        options = {"max_hours": arguments.limit_hours, "dtype": arguments.stored}
        print(pipeline.preprocess_maestro(run, arguments.source, work, **options))
    return 0


def _pretrain(arguments):
    from percepiano_ast import pipeline

    run = run_of(arguments).for_pretraining(arguments.pretraining)
    run = run.changed("pretrain", epochs=arguments.epochs, batch_size=arguments.batch_size)
    names = ("precision", "accumulate", "remat", "attention", "shard_params")
    run = run.changed("execution", **{name: getattr(arguments, name) for name in names})
    if not arguments.dry_run:
        pipeline.pretrain(run)
        return
    from percepiano_ast.training import dryrun

    for target in arguments.target:
        print(dryrun.dry_run(run.preset, target), flush=True)


def _finetune(arguments):
    from percepiano_ast import pipeline

    run, own = run_of(arguments), (arguments.ratings, arguments.recordings, arguments.group)
    custom = any((*own, arguments.dimensions))
    run = _rating_settings(pipeline.few_shot_run(run) if custom else run, arguments)
    run = run.changed("execution", precision=arguments.precision, attention=arguments.attention)
    if custom:
        given = pipeline.custom_source(
            run, arguments.recordings, arguments.ratings, arguments.group
        )
        options = {"init": arguments.init, "source": arguments.weights}
        found = pipeline.finetune_custom(run, *given, dimensions=arguments.dimensions, **options)
        print(found.result.round(3).to_string(index=False))
        for line in found.remarks:
            print(line)
        print(f"to rate another recording: percepiano rate FILE --run {found.home}")
    elif arguments.init == "baseline":
        pipeline.predict_baselines(run)
    else:
        pipeline.finetune(run, arguments.init, arguments.weights)


def _judge(arguments):
    from percepiano_ast import pipeline

    run = run_of(arguments).switched(arguments.set)
    given, source = (run, arguments.init, arguments.percepiano), arguments.weights
    if arguments.curve:
        print(pipeline.learning_curve(*given, source=source))
        return
    for path in pipeline.fit_regressors(*given, protocols=tuple(arguments.protocol), source=source):
        print(path)


def _package(arguments):
    from percepiano_ast import pipeline
    from percepiano_ast.inference.rate import BUNDLED

    run = run_of(arguments).switched(arguments.set)
    options = {"folder": arguments.percepiano, "source": arguments.weights}
    print(pipeline.package_model(run, arguments.init, arguments.to or BUNDLED, **options))


def _switches(arguments):
    from percepiano_ast import pipeline

    given = (_rating_settings(run_of(arguments), arguments), arguments.init, arguments.weights)
    if arguments.trained is None:
        print(pipeline.ablate_heads(*given, n_seeds=arguments.seeds or 3, inner=arguments.inner))
    elif arguments.inner is not None:
        raise InputError(
            "--inner does not apply to --trained, which uses all folds; omit one of them."
        )
    else:
        only, seeds = arguments.trained, arguments.seeds or 1
        print(pipeline.ablate_training(*given, only=only, n_seeds=seeds))


def _rating_settings(run, arguments):
    """The run with ``--epochs`` and every ``--set NAME=VALUE`` in its fine-tuning."""
    return run.changed("finetune", epochs=arguments.epochs).switched(arguments.set)


def _status(arguments):
    from percepiano_ast import notebook

    run = run_of(arguments)
    table = notebook.kept(run)
    if table.empty:
        where = f"{run.root} and {run.store}" if run.store else run.root
        raise InputError(f"no run in {where}; give its --out and --store.")
    print(table.to_string(index=False))


def _add_steps(add) -> None:
    option = add("notebooks", _notebooks, "Run the notebooks without a browser.")
    add_run(option)
    text = "value of a form field, such as SEED=1; repeatable"
    option("--set", text, "NAME=VALUE", [], action="append")
    text = "save the outputs in the notebooks of the repository"
    option("--keep-outputs", text, default=False)

    text = "Convert recordings, or renderings of PercePiano's MIDI, to log-mel shards."
    option = add("preprocess", _preprocess, text)
    add_run(option)
    text = "MAESTRO's archive (path, https://, gs://) or a folder of recordings"
    option("--source", f"{text} (default: from the preset)")
    option("--percepiano", "render PercePiano instead: its folder, or demo", "FOLDER")
    text = "builtin, soundfont names or .sf2/.sf3 files (default: from the preset)"
    option("--synthesizers", text, default=[])
    option("--renderings", "recordings of all clips, used instead of rendering", "DIR")
    text = "allow clips without a recording in DIR, and list them"
    option("--partial", text, default=False)
    text = "normalise clips to -23 LUFS, varied by up to 3 dB, to rate at any gain"
    option("--one-loudness", text, default=False)
    text = "audioset: also write shards with AST's front end, which its weights need"
    option("--init", text)
    option("--limit-hours", "use about H hours (default: all)", "H", 0.0)
    text = "uint8 (0.5 dB steps) or float16, twice as large (default: uint8)"
    option("--stored", text, default="uint8")
    option("--max-bad", "unreadable recordings to tolerate (default: 0)", "N", 0)
    option("--workers", "number of processes (default: one per core)", default=0)
    option("--verify", "verify the checksums of finished shards", default=False)
    text = "Apache Beam runner for the shards: DirectRunner, DataflowRunner, ..."
    option("--beam-runner", text)
    option("--beam-option", "Beam option; repeatable", "NAME=VALUE", [], action="append")

    text = "Pre-train on the shards; saves a checkpoint every epoch and resumes."
    option = add("pretrain", _pretrain, text)
    add_run(option)
    add_store(option)
    option(
        "--pretraining",
        "ssast (400 of 512 patches masked), ssast15 (15 %% masked), ssastframe (frames as patches),"
        " visible (faster: the encoder input is visible patches only), transcription (notes and"
        " pedals), joint (transcription and visible), transcriptionstem (transcription with"
        " convolutions before the patches); default: ssast",
        default="ssast",
    )
    _add_epochs(option)
    option("--batch-size", "batch size over all devices (default: from the preset)", default=0)
    option("--accumulate", "micro-batches per batch (default: 1)", default=0)
    remat = {"action": argparse.BooleanOptionalAction, "default": None}
    option("--remat", "recompute activations to save memory", **remat)
    text = "shard parameters over the devices"
    option("--shard-params", text, default=None, action="store_true")
    _add_precision(option)
    text = "compile for the targets and report whether the model fits"
    option("--dry-run", text, default=False)
    text = "targets of --dry-run: v5e-1, v6e-1, v5e-8, v3-8 (default: v5e-1)"
    option("--target", text, default=["v5e-1"])

    option = add(
        "finetune",
        _finetune,
        "Train rating heads on PercePiano or on custom ratings, fold by fold; writes out-of-fold"
        " predictions.",
    )
    add_run(option)
    text = "custom ratings: a clip column, a group column and ratings; or demo"
    option("--ratings", text, "CSV")
    option("--recordings", "recordings of the custom ratings", "DIR")
    option("--group", "column of held-out groups, such as piece or pianist", "COLUMN")
    option("--dimensions", "rating columns (default: all others)", "COLUMN", [])
    add_store(option)
    text = "scratch, audioset, cnn (a CNN from scratch), or baseline"
    _add_start(option, f"{text} (models without a learned audio encoder)")
    _add_precision(option)

    option = add(
        "judge",
        _judge,
        "Train regressors on the transcription and features of a pre-trained encoder (notes,"
        " pedals, embeddings, sound statistics) under every protocol; features are selected within"
        " the training folds. Models named +score are score-informed.",
    )
    _add_ear(option)
    option("--protocol", "protocols of the index (default: all)", "P", [])
    text = "instead: learning curve over passages, players and clips"
    option("--curve", text, default=False)
    add_set(option, "seed=1 or unseen=timgm6mb")

    option = add(
        "package",
        _package,
        "Build the bundled model: fit it on all rated clips of a run with shards from preprocess"
        " --one-loudness; writes the model, its card and held-out predictions.",
    )
    _add_ear(option)
    option("--to", "output .safetensors file (default: that of the package)", "FILE")
    add_set(option, "unseen=timgm6mb")

    text = "Ablations of the rating heads on the frozen encoder, one setting at a time."
    option = add("switches", _switches, text)
    add_run(option)
    _add_start(option, "scratch or audioset")
    option("--seeds", "seeds per setting (default: 3; with --trained: 1)", "N", 0)
    text = "exclude this outer fold, to test the selected settings on it"
    option("--inner", text, "FOLD", None, type=int)
    text = "instead compare strategies that train the encoder, and augmentations: last gradual full"
    text += " lora SpecAugment mixup gain (default: all); resumes"
    option("--trained", text, "CHOICE", None, nargs="*")

    text = "List the shards, checkpoints and results of a run: location, progress, age, integrity."
    option = add("status", _status, text)
    add_run(option)
    add_store(option)


def _add_ear(option):
    add_run(option)
    text = "pre-training with a transcription objective (default: transcription)"
    option("--init", text, default="transcription")
    option("--weights", ".safetensors file of the encoder (default: from the run)", "FILE")
    option("--percepiano", "PercePiano's folder (default: from the preset)", "FOLDER")


def _add_start(option, others: str):
    names = ", ".join(PRETRAININGS)
    text = f"initial encoder: {names} (pre-training of this run), {others}; default: ssast"
    option("--init", text, default="ssast")
    option("--weights", "published weights for audioset (default: downloaded)", "FILE")
    _add_epochs(option)
    add_set(option, "strategy=lora or predict_uncertainty=true")


def _add_epochs(option):
    option("--epochs", "number of epochs (default: from the preset)", default=0)


def _add_precision(option):
    option("--precision", "float32, bfloat16 or float16 (default: the fastest of the device)")
    option("--attention", "attention kernel: xla, cudnn or heads (default: the fastest)")


# --- Evaluation -----------------------------------------------------------------------------------


def _evaluate(arguments):
    from percepiano_ast.evaluation import EvaluationOptions
    from percepiano_ast.studies import report

    given = {"n_permutations": arguments.permutations, "seed": arguments.seed}
    given |= {"min_difference": arguments.min_difference}
    made = report.evaluate_files(
        arguments.predictions,
        arguments.out,
        arguments.index or None,
        partial=arguments.partial,
        settings=EvaluationOptions(
            **{name: value for name, value in given.items() if value is not None}
        ),
        ceiling=arguments.ceiling or None,
        reference=arguments.reference,
    )
    print(made)


def _baseline(arguments):
    from percepiano_ast import pipeline
    from percepiano_ast.pipeline.baselines import BaselineOptions, run_baselines

    settings = BaselineOptions(
        tuple(arguments.protocol),
        tuple(arguments.baselines),
        tuple(arguments.synthesizers),
        arguments.seed,
        arguments.workers or pipeline.workers(),
    )
    print(run_baselines(arguments.percepiano, arguments.out, settings))


def _reliability(arguments):
    from percepiano_ast.data.percepiano import load_index
    from percepiano_ast.evaluation import predictions, reliability

    index = (
        predictions.load_index(arguments.index) if arguments.index else load_index(arguments.raters)
    )
    raters = reliability.read_raters(arguments.raters)
    tables = reliability.evaluate(raters, index, arguments.splits, arguments.seed)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    for name, one in tables.items():
        one.to_csv(out / f"{name}.csv", float_format="%.4f", lineterminator="\n")
    print(f"{out}: {', '.join(f'{name}.csv' for name in tables)}")


def _listen(arguments):
    from percepiano_ast import pipeline
    from percepiano_ast.studies import sensitivity

    others = arguments.other_synthesizers
    options = sensitivity.SensitivityOptions(
        arguments.clips,
        arguments.synthesizer or sensitivity.SYNTHESIZER,
        None if others is None else tuple(others),
        arguments.seed,
        arguments.workers or pipeline.workers(),
    )
    run = sensitivity.run_sensitivity
    print(run(arguments.percepiano, arguments.out, arguments.model, options))


def _add_evaluation(add) -> None:
    must = {"required": True}
    folder = "PercePiano's folder, or demo"
    clips = "CSV index of clips (default: PercePiano's)"

    option = add("evaluate", _evaluate, "Evaluate predictions: metrics, comparisons and a report.")
    option("predictions", "predictions*.csv or .csv.gz", "PREDICTIONS", nargs="+")
    option("--out", "output directory of the report", "DIR", **must)
    option("--index", clips, "FILE")
    option("--partial", "allow predictions that do not cover the protocol", default=False)
    option("--permutations", "permutations per comparison (default: 2000)", "N", None, type=int)
    option("--seed", "seed of the permutations (default: 0)", default=None, type=int)
    text = "compare pairs of performances whose ratings, from 0 to 1, differ by at least D"
    option("--min-difference", f"{text} (default: 0.074, a standard error)", "D", None, type=float)
    text = "CSV of the noise ceiling from `reliability` (default: PercePiano's)"
    option("--ceiling", text, "FILE")
    text = "reference model of the comparison page"
    text += " (default: the best audio-only model that is not an encoder)"
    option("--reference", text, "MODEL")

    option = add(
        "baseline",
        _baseline,
        "Baselines without a learned audio encoder, fold by fold; writes out-of-fold predictions."
        " Models named +score are score-informed; clips that do not match their score are listed in"
        " without_score.csv.",
    )
    option("--percepiano", folder, "FOLDER", **must)
    option("--out", "output directory of predictions and features", "DIR", **must)
    option("--protocol", "protocols of the index (default: all)", "P", [])
    text = "baselines, such as audio-stats or midi-stats+score (default: all)"
    option("--baselines", text, "NAME", [])
    text = "synthesizers of the audio (default: musescore-small)"
    option("--synthesizers", text, default=["musescore-small"])
    option("--seed", "seed of trees and networks (default: 0)", default=0)
    option("--workers", "feature extraction processes (default: one per core)", default=0)

    text = "Inter-rater agreement: ICC, split-half reliability, noise ceiling."
    option = add("reliability", _reliability, text)
    option("raters", "PercePiano's folder, or a rater CSV")
    option("--out", "output directory of icc.csv, split_half.csv, ceiling.csv", "DIR", **must)
    option("--index", clips, "FILE")
    option("--splits", "random splits of the raters (default: 500)", "N", 500)
    option("--seed", "seed of the splits (default: 0)", default=0)

    text = "Sensitivity test: rate real performances before and after one change each."
    option = add("listen", _listen, text)
    option("--percepiano", folder, "FOLDER", **must)
    text = "audio-stats and midi-stats (fitted here), packaged (the bundled model), a model file,"
    text += " directories of fine-tuned runs, or module:attribute of a rating function"
    option("--model", text, "MODEL", nargs="+", **must)
    text = "output directory of tables, figures, summary and renderings"
    option("--out", text, "DIR", **must)
    option("--clips", "number of performances to draw (default: 100)", "N", 100)
    option("--synthesizer", "synthesizer of the test (default: musescore-small)")
    text = "further synthesizers for the robustness test (default: all)"
    option("--other-synthesizers", text, "NAME", None, nargs="*")
    option("--seed", "seed of clips, noise and rooms (default: 0)", default=0)
    option("--workers", "rendering processes (default: one per core)", default=0)


# --- Recordings and weights -----------------------------------------------------------------------


def _rate(arguments):
    from percepiano_ast.inference import rate

    files, others = rate.recordings_in(arguments.files)
    if others:
        names = ", ".join(path.name for path in others[:5])
        print(f"{len(others)} other files are not recordings: {names}", file=sys.stderr)
    if not arguments.run:
        return _rate_packaged(arguments, files)
    if given := [name for name in ("csv", "html", "score", "weights") if getattr(arguments, name)]:
        raise InputError(
            f"--{given[0]} is an option of the bundled model and does not go with --run. Omit one"
            " of the two"
        )
    rater = rate.FoldEnsemble(arguments.run, arguments.model)
    results = [rater.rate_or_explain(str(file)) for file in files]
    as_json = json.dumps(results, indent=1) if arguments.json else ""
    print(as_json or rate.ensemble_text(results, rater.questionnaire))
    return _errors([result for result in results if "error" in result])


def _rate_packaged(arguments, files: list[str | Path]) -> int:
    """With the bundled model, or that of ``--weights``."""
    from percepiano_ast.inference import page, rate
    from percepiano_ast.music.score import read_score

    model = rate.load_model(arguments.weights or rate.BUNDLED)
    written = read_score(arguments.score) if arguments.score else None
    rated, sounds, results, errors = [], [], [], []
    executor = ThreadPoolExecutor(1)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    ascii_only = "utf" not in (sys.stdout.encoding or "").lower()
    for number, file in enumerate(files, 1):
        encoding = [executor.submit(page.sound, file)] if arguments.html else []
        progress = partial(_show_stage, f"{number}/{len(files)} {Path(file).name}"[:44])
        try:
            rated.append(model.rate(file, written, progress))
            sounds += encoding
            results.append(rated[-1].as_json())
        except InputError as error:
            errors.append({"file": str(file), "error": str(error).removeprefix(f"{file}: ")})
            results.append(errors[-1])
        finally:
            progress("")
        if not arguments.json and results[-1] not in errors:
            print(rate.to_text(rated[-1], colour, ascii_only) + "\n", flush=True)
    if arguments.json:
        print(json.dumps(results, indent=1))
    elif len(rated) == len(files) == 2:
        print(rate.comparison_text(*rated) + "\n")
    output = sys.stderr if arguments.json else sys.stdout
    if arguments.csv:
        rate.to_table(rated).to_csv(arguments.csv, index=False, lineterminator="\n")
        print(f"table: {Path(arguments.csv).resolve().as_uri()}", file=output)
    if arguments.html and rated:
        path = page.write_page(rated, arguments.html, [encoded.result() for encoded in sounds])
        print(f"page: {path.resolve().as_uri()}", file=output)
    return _errors(errors)


def _show_stage(name: str, stage: str) -> None:
    """On a terminal, show the current stage of a recording in one line, or erase it."""
    if sys.stderr.isatty():
        line = f"{name}: {stage}" if stage else ""
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


def _errors(errors: list[dict]) -> int:
    """Print one line per error; returns the exit code."""
    for one in errors:
        print(f"{one['file']}: {one['error']}", file=sys.stderr)
    return 2 if errors else 0


def _explain(arguments):
    from percepiano_ast.studies import explain

    names = ("run", "out", "model", "midi", "baseline", "seconds")
    options = {name: getattr(arguments, name) for name in names}
    options |= {"dimensions": arguments.dimension, "with_checks": arguments.checks}
    explain.explain_files(arguments.files, **options)


def _convert(arguments):
    from percepiano_ast.pipeline import run

    print(run.convert(arguments.source, arguments.to, arguments.kind))


def _add_recordings(add) -> None:
    model = "model below DIR/finetune (default: the pre-trained one)"

    option = add(
        "rate",
        _rate,
        "Rate recordings on 19 dimensions, by the bundled model piano-rater or a run of your own."
        " Nothing leaves this machine.",
        "percepiano rate take.m4a --html page.html",
    )
    option("files", "WAV, FLAC, OGG, MP3 or M4A, or a folder of them", "FILE", nargs="+")
    option("--json", "print one JSON array to standard output", default=False)
    option("--csv", "write a table with one row per recording and dimension", "FILE")
    option("--html", "write a page with the sound; two recordings are compared", "FILE")
    option("--score", "score of the music, MIDI or MusicXML: timing is rated better", "FILE")
    option("--weights", "another rating model, a file or URL#sha256=...", "FILE")
    option("--run", "use a fine-tuned run instead: its folder, --store or own/NAME", "DIR")
    option("--model", model)

    text = "Convert weights: ours, the authors' AST and SSAST, Hugging Face's AST."
    option = add("convert", _convert, text)
    text = "directory of a pre-training, .safetensors, .pth, or Hugging Face's folder"
    option("source", text)
    option("--to", ".safetensors file to write; for hf_ast a folder", required=True)
    option("--kind", "ast or hf_ast (default: unchanged)")

    text = "Attribute a rating to time, frequency and notes, and check the attribution."
    option = add("explain", _explain, text)
    option("files", "WAV, FLAC, OGG or MP3", "FILE", nargs="+")
    option("--run", "a run that was fine-tuned, or its --store", "DIR", required=True)
    option("--model", model)
    option("--dimension", "such as timing_stable_unstable", "KEY", nargs="+", required=True)
    option("--midi", "MIDI of the (single) recording: contributions of its notes too", "FILE")
    text = "output folder: figures, tables and excerpts of each file"
    option("--out", text, "DIR", required=True)
    text = "baseline of the attribution: mean (the mean spectrum) or silence (default: mean)"
    option("--baseline", text, default="mean")
    option("--seconds", "length of the excerpt (default: 5)", "S", 5.0)
    text = "deletion curves and randomised weights over all FILEs"
    option("--checks", text, default=False)
