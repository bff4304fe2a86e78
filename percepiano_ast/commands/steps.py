"""Commands for the steps of the suite: notebooks, preprocess, pretrain, finetune, judge, package,
switches; and status."""

import argparse
import sys
from pathlib import Path

from percepiano_ast.commands.shared import add_run, add_set, add_store, run_of
from percepiano_ast.config import PRESETS, PRETRAININGS, lookup
from percepiano_ast.errors import InputError

EXECUTION = ("precision", "accumulate", "remat", "attention", "shard_params")


def _notebooks(arguments):
    from percepiano_ast import notebooks

    lookup(PRESETS, arguments.preset, "preset")
    out = Path(arguments.out or f"runs/{arguments.preset}").resolve()
    home = notebooks.FOLDER.parent
    # Notebooks run in the repository and show paths relative to it.
    shown = out.relative_to(home) if out.is_relative_to(home) else out
    values = {"PRESET": arguments.preset, "KEEP_IN": str(shown)}
    for pair in arguments.set:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"--set {pair!r} is not NAME=VALUE; write for example SEED=1.")
        values[name] = int(value) if value.isdigit() else value
    notebooks.run(out, values, keep=arguments.keep_outputs)
    if values["KEEP_IN"] == str(shown):  # otherwise the last notebook has printed the path
        print(f"report: {out / 'evaluation' / 'report.html'}")


def _preprocess(arguments):
    from percepiano_ast import suite

    run = run_of(arguments)
    if arguments.verify:
        return _verify(run.percepiano if arguments.percepiano else run.maestro)
    if arguments.percepiano:
        synthesizers = tuple(arguments.synthesizers)
        options = {
            "init": arguments.init,
            "recordings": arguments.renderings,
            "partial": arguments.partial,
        }
        options |= {"one_loudness": arguments.one_loudness}
        print(suite.preprocess_percepiano(run, arguments.percepiano, synthesizers, **options))
        return 0
    beam_options = tuple(f"--{option}" for option in arguments.beam_option)
    workers = arguments.workers or suite.workers()
    work = suite.Work(workers, arguments.max_bad, arguments.beam_runner, beam_options)
    options = {"limit_hours": arguments.limit_hours, "stored": arguments.stored}
    print(suite.preprocess_maestro(run, arguments.source, work, **options))
    return 0


def _verify(directory: Path) -> int:
    from percepiano_ast.data import build

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
    return 0


def _pretrain(arguments):
    from percepiano_ast import suite

    run = run_of(arguments).for_pretraining(arguments.pretraining)
    run = run.changed("pretrain", epochs=arguments.epochs, batch_size=arguments.batch_size)
    run = run.changed("execution", **{name: getattr(arguments, name) for name in EXECUTION})
    if not arguments.dry_run:
        suite.pretrain(run)
        return
    from percepiano_ast.training import dryrun

    for target in arguments.target:
        print(dryrun.dry_run(run.preset, target), flush=True)


def _finetune(arguments):
    from percepiano_ast import suite

    run = _rating_run(arguments).changed(
        "execution", precision=arguments.precision, attention=arguments.attention
    )
    if _own(arguments):
        _finetune_own(run, arguments)
    elif arguments.init == "baseline":
        suite.baselines(run)
    else:
        suite.finetune(run, arguments.init, arguments.weights)


def _judge(arguments):
    from percepiano_ast import suite

    run, options = (
        run_of(arguments).switched(arguments.set),
        {"protocols": tuple(arguments.protocol), "source": arguments.weights},
    )
    if arguments.curve:
        print(
            suite.learning_curve(
                run, arguments.init, arguments.percepiano, source=arguments.weights
            )
        )
        return
    for path in suite.judge(run, arguments.init, arguments.percepiano, **options):
        print(path)


def _package(arguments):
    from percepiano_ast import packaged, suite

    run = run_of(arguments).switched(arguments.set)
    options = {"folder": arguments.percepiano, "source": arguments.weights}
    print(suite.package(run, arguments.init, arguments.to or packaged.SHIPPED, **options))


def _own(arguments) -> bool:
    """Whether an option of custom ratings is given."""
    return any(
        getattr(arguments, name, None) for name in ("ratings", "recordings", "group", "dimensions")
    )


def _finetune_own(run, arguments):
    from percepiano_ast import suite

    given = suite.own_source(run, arguments.recordings, arguments.ratings, arguments.group)
    found = suite.finetune_own(
        run, *given, dimensions=arguments.dimensions, init=arguments.init, source=arguments.weights
    )
    print(found.result.round(3).to_string(index=False))
    for line in found.remarks:
        print(line)
    print(f"to rate another recording: percepiano rate FILE --run {found.home}")


def _switches(arguments):
    from percepiano_ast import suite

    run, start = _rating_run(arguments), (arguments.init, arguments.weights)
    if arguments.trained is None:
        print(suite.study(run, *start, n_seeds=arguments.seeds or 3, inner=arguments.inner))
    elif arguments.inner is not None:
        raise InputError(
            "--inner does not apply to --trained, which uses all folds; omit one of them."
        )
    else:
        print(
            suite.study_trained(run, *start, only=arguments.trained, n_seeds=arguments.seeds or 1)
        )


def _rating_run(arguments):
    """The run with ``--epochs`` and every ``--set NAME=VALUE`` in its fine-tuning; few-shot
    settings for custom ratings."""
    from percepiano_ast import suite

    run = run_of(arguments)
    run = suite.few_shot(run) if _own(arguments) else run
    return run.changed("finetune", epochs=arguments.epochs).switched(arguments.set)


def _status(arguments):
    from percepiano_ast import views

    run = run_of(arguments)
    table = views.kept(run)
    if table.empty:
        raise InputError(
            f"no run in {run.root}{f' and {run.store}' if run.store else ''}; give its --out and"
            " --store."
        )
    print(table.to_string(index=False))


def add_commands(add) -> None:
    """Add the commands of this module to a parser by ``add(name, function, text)``."""
    command = add("notebooks", _notebooks, "Run the notebooks without a browser.")
    add_run(command)
    text = "value of a form field, such as SEED=1; repeatable"
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help=text)
    command.add_argument(
        "--keep-outputs",
        action="store_true",
        help="save the outputs in the notebooks of the repository",
    )

    _add_preprocess(
        add(
            "preprocess",
            _preprocess,
            "Convert recordings, or renderings of PercePiano's MIDI, to log-mel shards.",
        )
    )

    command = add(
        "pretrain",
        _pretrain,
        "Pre-train on the shards; saves a checkpoint every epoch and resumes.",
    )
    add_run(command)
    add_store(command)
    _add_pretraining(command)

    text = (
        "Train rating heads on PercePiano or on custom ratings, fold by fold; writes out-of-fold"
        " predictions."
    )
    command = add("finetune", _finetune, text)
    add_run(command)
    _add_own(command)
    add_store(command)
    _add_start(
        command,
        "scratch, audioset, cnn (a CNN from scratch), or baseline (models without a learned audio"
        " encoder)",
    )
    _add_precision(command)

    _add_judge(add)

    command = add(
        "switches",
        _switches,
        "Ablations of the rating heads on the frozen encoder, one setting at a time.",
    )
    add_run(command)
    _add_start(command, "scratch or audioset")
    command.add_argument(
        "--seeds",
        type=int,
        default=0,
        metavar="N",
        help="seeds per setting (default: 3; with --trained: 1)",
    )
    command.add_argument(
        "--inner",
        type=int,
        metavar="FOLD",
        help="exclude this outer fold, to test the selected settings on it",
    )
    command.add_argument(
        "--trained",
        nargs="*",
        metavar="CHOICE",
        help=(
            "instead compare strategies that train the encoder, and augmentations: last gradual"
            " full lora SpecAugment mixup gain (default: all); resumes"
        ),
    )

    command = add(
        "status",
        _status,
        "List the shards, checkpoints and results of a run: location, progress, age and integrity.",
    )
    add_run(command)
    add_store(command)


def _add_judge(add):
    text = (
        "Train regressors on the transcription and features of a pre-trained encoder (notes,"
        " pedals, embeddings, sound "
    )
    text += (
        "statistics) under every protocol; features are selected within the training folds. Models"
        " named +score are "
    )
    text += "score-informed."
    command = add("judge", _judge, text)
    add_run(command)
    _add_ear(command)
    command.add_argument(
        "--protocol",
        nargs="+",
        default=[],
        metavar="P",
        help="protocols of the index (default: all)",
    )
    command.add_argument(
        "--curve",
        action="store_true",
        help="instead: learning curve over passages, players and clips",
    )
    add_set(command, "seed=1 or unseen=timgm6mb")

    text = (
        "Build the bundled model: fit it on all rated clips of a run with shards from preprocess"
        " --one-loudness; writes the "
    )
    text += "model, its card and held-out predictions."
    command = add("package", _package, text)
    add_run(command)
    _add_ear(command)
    command.add_argument(
        "--to",
        default="",
        metavar="FILE",
        help="output .safetensors file (default: that of the package)",
    )
    add_set(command, "unseen=timgm6mb")


def _add_ear(command):
    init = "pre-training with a transcription objective (default: transcription)"
    command.add_argument("--init", default="transcription", help=init)
    command.add_argument(
        "--weights",
        default="",
        metavar="FILE",
        help=".safetensors file of the encoder (default: from the run)",
    )
    command.add_argument(
        "--percepiano",
        default="",
        metavar="FOLDER",
        help="PercePiano's folder (default: from the preset)",
    )


def _add_preprocess(command):
    add_run(command)
    source = (
        "MAESTRO's archive (path, https://, gs://) or a folder of recordings (default: from the"
        " preset)"
    )
    command.add_argument("--source", default="", help=source)
    command.add_argument(
        "--percepiano",
        default="",
        metavar="FOLDER",
        help="render PercePiano instead: its folder, or demo",
    )
    synthesizers = "builtin, soundfont names or .sf2/.sf3 files (default: from the preset)"
    command.add_argument("--synthesizers", nargs="+", default=[], help=synthesizers)
    command.add_argument(
        "--renderings",
        default="",
        metavar="DIR",
        help="recordings of all clips, used instead of rendering",
    )
    command.add_argument(
        "--partial",
        action="store_true",
        help="allow clips without a recording in DIR, and list them",
    )
    command.add_argument(
        "--one-loudness",
        action="store_true",
        help="normalise clips to -23 LUFS, varied by up to 3 dB, to rate at any gain",
    )
    command.add_argument(
        "--init",
        default="",
        help="audioset: also write shards with AST's front end, which its weights need",
    )
    command.add_argument(
        "--limit-hours",
        type=float,
        default=0.0,
        metavar="H",
        help="use about H hours (default: all)",
    )
    command.add_argument(
        "--stored",
        default="uint8",
        help="uint8 (0.5 dB steps) or float16, twice as large (default: uint8)",
    )
    command.add_argument(
        "--max-bad",
        type=int,
        default=0,
        metavar="N",
        help="unreadable recordings to tolerate (default: 0)",
    )
    command.add_argument(
        "--workers", type=int, default=0, help="number of processes (default: one per core)"
    )
    command.add_argument(
        "--verify", action="store_true", help="verify the checksums of finished shards"
    )
    command.add_argument(
        "--beam-runner",
        default="",
        help="Apache Beam runner for the shards: DirectRunner, DataflowRunner, ...",
    )
    command.add_argument(
        "--beam-option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="Beam option; repeatable",
    )


def _add_pretraining(command):
    command.add_argument(
        "--pretraining",
        default="ssast",
        help=(
            "ssast (400 of 512 patches masked), ssast15 (15 %% masked), ssastframe (frames as"
            " patches), visible (faster: the encoder input is visible patches only), transcription"
            " (notes and pedals), joint (transcription and visible), transcriptionstem"
            " (transcription with convolutions before the patches); default: ssast"
        ),
    )
    command.add_argument(
        "--epochs", type=int, default=0, help="number of epochs (default: from the preset)"
    )
    command.add_argument(
        "--batch-size",
        type=int,
        default=0,
        help="batch size over all devices (default: from the preset)",
    )
    command.add_argument(
        "--accumulate", type=int, default=0, help="micro-batches per batch (default: 1)"
    )
    command.add_argument(
        "--remat",
        action=argparse.BooleanOptionalAction,
        help="recompute activations to save memory",
    )
    command.add_argument(
        "--shard-params",
        action="store_true",
        default=None,
        help="shard parameters over the devices",
    )
    _add_precision(command)
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="compile for the targets and report whether the model fits",
    )
    targets = "targets of --dry-run: v5e-1, v6e-1, v5e-8, v3-8 (default: v5e-1)"
    command.add_argument("--target", nargs="+", default=["v5e-1"], help=targets)


def _add_start(command, others: str):
    names = ", ".join(PRETRAININGS)
    init = f"initial encoder: {names} (pre-training of this run), {others}; default: ssast"
    command.add_argument("--init", default="ssast", help=init)
    command.add_argument(
        "--weights",
        default="",
        metavar="FILE",
        help="published weights for audioset (default: downloaded)",
    )
    command.add_argument(
        "--epochs", type=int, default=0, help="number of epochs (default: from the preset)"
    )
    add_set(command, "strategy=lora or predict_uncertainty=true")


def _add_own(command):
    command.add_argument(
        "--ratings",
        default="",
        metavar="CSV",
        help="custom ratings: a clip column, a group column and ratings; or demo",
    )
    command.add_argument(
        "--recordings", default="", metavar="DIR", help="recordings of the custom ratings"
    )
    command.add_argument(
        "--group",
        default="",
        metavar="COLUMN",
        help="column of held-out groups, such as piece or pianist",
    )
    command.add_argument(
        "--dimensions",
        nargs="+",
        default=[],
        metavar="COLUMN",
        help="rating columns (default: all others)",
    )


def _add_precision(command):
    command.add_argument(
        "--precision",
        default="",
        help="float32, bfloat16 or float16 (default: the fastest of the device)",
    )
    command.add_argument(
        "--attention",
        default="",
        help="attention kernel: xla, cudnn or heads (default: the fastest)",
    )
