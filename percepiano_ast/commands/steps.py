"""Commands for the steps: notebooks, preprocess, pretrain, finetune, judge, package,
switches; and status."""

import argparse
import sys
from pathlib import Path

from percepiano_ast.commands.shared import add_run, add_set, add_store, run_of
from percepiano_ast.config import PRESETS, PRETRAININGS, lookup
from percepiano_ast.errors import InputError


def _notebooks(arguments):
    from percepiano_ast import notebooks

    lookup(PRESETS, arguments.preset, "preset")
    out = Path(arguments.out or f"runs/{arguments.preset}").resolve()
    home = notebooks.FOLDER.parent
    # Notebooks run in the repository and show paths relative to it.
    shown = str(out.relative_to(home) if out.is_relative_to(home) else out)
    values = {"PRESET": arguments.preset, "KEEP_IN": shown}
    for pair in arguments.set:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"--set {pair!r} is not NAME=VALUE; write for example SEED=1.")
        values[name] = int(value) if value.isdigit() else value
    notebooks.run(out, values, keep=arguments.keep_outputs)
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
            one_loudness=arguments.one_loudness,
        )
        print(made)
    else:
        beam = (arguments.beam_runner, tuple(f"--{option}" for option in arguments.beam_option))
        work = pipeline.Work(arguments.workers or pipeline.workers(), arguments.max_bad, *beam)
        options = {"limit_hours": arguments.limit_hours, "stored": arguments.stored}
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
    from percepiano_ast import views

    run = run_of(arguments)
    table = views.kept(run)
    if table.empty:
        where = f"{run.root} and {run.store}" if run.store else run.root
        raise InputError(f"no run in {where}; give its --out and --store.")
    print(table.to_string(index=False))


def add_commands(add) -> None:
    """Add the commands of this module to a parser by ``add(name, function, text)``."""
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
