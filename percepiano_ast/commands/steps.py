"""The steps of the suite: notebooks, preprocess, pretrain, finetune; and status."""

import argparse
import sys
from pathlib import Path

from percepiano_ast.commands.shared import add_run, add_set, add_store, run_of
from percepiano_ast.config import PRESETS, PRETRAININGS, InputError, choose

EXECUTION = ("precision", "accumulate", "remat", "attention", "shard_params")


def _notebooks(arguments):
    from percepiano_ast import notebooks

    choose(PRESETS, arguments.preset, "preset")
    out = Path(arguments.out or f"runs/{arguments.preset}").resolve()
    home = notebooks.FOLDER.parent
    # Notebooks run in the repository: what they show needs no more of this machine's paths than that.
    shown = out.relative_to(home) if out.is_relative_to(home) else out
    values = {"PRESET": arguments.preset, "KEEP_IN": str(shown)}
    for pair in arguments.set:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"--set {pair!r} is not NAME=VALUE")
        values[name] = int(value) if value.isdigit() else value
    notebooks.run(out, values, keep=arguments.keep_outputs)
    if values["KEEP_IN"] == str(shown):  # else the last notebook has said where it is
        print(f"report: {out / 'evaluation' / 'report.html'}")


def _preprocess(arguments):
    from percepiano_ast import suite

    run = run_of(arguments)
    if arguments.verify:
        return _verify(run.percepiano if arguments.percepiano else run.maestro)
    if arguments.percepiano:
        synthesizers = tuple(arguments.synthesizers)
        options = {"init": arguments.init, "recordings": arguments.renderings, "partial": arguments.partial}
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
    from percepiano_ast.data import manifest

    wrong = manifest.verify(directory)
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    if wrong:
        print(f"error: {len(wrong)} faults. Delete the files named, run preprocess again: it makes them anew", file=sys.stderr)
        return 1
    print(f"{directory}: every file is as it was written")
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

    run = _rating_run(arguments).changed("execution", precision=arguments.precision, attention=arguments.attention)
    if _own(arguments):
        _finetune_own(run, arguments)
    elif arguments.init == "baseline":
        suite.baselines(run)
    else:
        suite.finetune(run, arguments.init, arguments.weights)


def _judge(arguments):
    from percepiano_ast import suite

    run, options = run_of(arguments).switched(arguments.set), {"protocols": tuple(arguments.protocol), "source": arguments.weights}
    if arguments.curve:
        print(suite.learning_curve(run, arguments.init, arguments.percepiano, source=arguments.weights))
        return
    for path in suite.judge(run, arguments.init, arguments.percepiano, **options):
        print(path)


def _package(arguments):
    from percepiano_ast import packaged, suite

    run = run_of(arguments).switched(arguments.set)
    options = {"folder": arguments.percepiano, "source": arguments.weights}
    print(suite.package(run, arguments.init, arguments.to or packaged.SHIPPED, **options))


def _own(arguments) -> bool:
    """Whether ratings of one's own are meant."""
    return any(getattr(arguments, name, None) for name in ("ratings", "recordings", "group", "dimensions"))


def _finetune_own(run, arguments):
    from percepiano_ast import suite

    given = suite.own_source(run, arguments.recordings, arguments.ratings, arguments.group)
    found = suite.finetune_own(run, *given, dimensions=arguments.dimensions, init=arguments.init, source=arguments.weights)
    print(found.result.round(3).to_string(index=False))
    for line in found.remarks:
        print(line)
    print(f"to rate another recording: python -m percepiano_ast rate FILE --run {found.home}")


def _switches(arguments):
    from percepiano_ast import suite

    run, start = _rating_run(arguments), (arguments.init, arguments.weights)
    if arguments.trained is None:
        print(suite.study(run, *start, n_seeds=arguments.seeds or 3, inner=arguments.inner))
    elif arguments.inner is not None:
        raise InputError("--inner is of the heads' switches; --trained studies all folds")
    else:
        print(suite.study_trained(run, *start, only=arguments.trained, n_seeds=arguments.seeds or 1))


def _rating_run(arguments):
    """The run with ``--epochs`` and every ``--set NAME=VALUE`` in its fine-tuning, which for own ratings is for few clips."""
    from percepiano_ast import suite

    run = run_of(arguments)
    run = suite.few_shot(run) if _own(arguments) else run
    return run.changed("finetune", epochs=arguments.epochs).switched(arguments.set)


def _status(arguments):
    from percepiano_ast import views

    run = run_of(arguments)
    table = views.kept(run)
    if table.empty:
        raise InputError(f"nothing of a run in {run.root}{f' and {run.store}' if run.store else ''}: name its --out and --store")
    print(table.to_string(index=False))


def add_commands(add) -> None:
    """Put the commands of this module into a parser by ``add(name, function, text)``."""
    command = add("notebooks", _notebooks, "Run the notebooks headless.")
    add_run(command)
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="fill in a row of the forms")
    command.add_argument("--keep-outputs", action="store_true", help="put the outputs into the shipped notebooks")

    _add_preprocess(add("preprocess", _preprocess, "Recordings, or PercePiano's MIDI, to log-mel shards."))

    command = add("pretrain", _pretrain, "Pre-training on the shards; a checkpoint every epoch.")
    add_run(command)
    add_store(command)
    _add_pretraining(command)

    text = "Rating heads on PercePiano, or on ratings of your own, fold by fold; writes out-of-fold predictions."
    command = add("finetune", _finetune, text)
    add_run(command)
    _add_own(command)
    add_store(command)
    _add_start(command, "scratch, audioset, cnn (another encoder, from scratch), or baseline (what learns no hearing)")
    _add_precision(command)

    _add_judge(add)

    command = add("switches", _switches, "Does each switch of the rating heads help: one at a time, on the frozen encoder.")
    add_run(command)
    _add_start(command, "scratch or audioset")
    command.add_argument("--seeds", type=int, default=0, metavar="N", help="trainings of each choice (default: 3; trained: 1)")
    command.add_argument("--inner", type=int, metavar="FOLD", help="leave this outer fold out: a choice may be tested on it")
    command.add_argument(
        "--trained", nargs="*", metavar="CHOICE",
        help="instead strategies that train the encoder, and augmentations: last gradual full lora SpecAugment mixup gain "
        "(default: all); resumes",
    )  # fmt: skip

    command = add("status", _status, "What of a run is where, how far it is, how old, and whether it is whole.")
    add_run(command)
    add_store(command)


def _add_judge(add):
    text = "Regressors on what a pre-trained encoder hears (notes, pedals, embeddings, sound), under every protocol; what they "
    text += "are given is chosen inside the training folds. Those named +score see the score as well."
    command = add("judge", _judge, text)
    add_run(command)
    _add_ear(command)
    command.add_argument("--protocol", nargs="+", default=[], metavar="P", help="protocols of the index (default: all)")
    command.add_argument("--curve", action="store_true", help="instead: r by the share of passages, players, clips learned from")
    add_set(command, "seed=1 or unseen=timgm6mb")

    text = "The model that comes along: fitted on all rated clips of a run made by preprocess --one-loudness; writes it, its card, "
    text += "and what it says of held-out clips."
    command = add("package", _package, text)
    add_run(command)
    _add_ear(command)
    command.add_argument("--to", default="", metavar="FILE", help=".safetensors to write (default: in the package)")
    add_set(command, "unseen=timgm6mb")


def _add_ear(command):
    command.add_argument("--init", default="transcription", help="a pre-training that hears notes (default: transcription)")
    command.add_argument("--weights", default="", metavar="FILE", help="it, kept in a .safetensors file (default: this run's)")
    command.add_argument("--percepiano", default="", metavar="FOLDER", help="for its scores (default: the preset's source)")


def _add_preprocess(command):
    add_run(command)
    command.add_argument("--source", default="", help="MAESTRO's archive (path, https://, gs://) or any folder of recordings")
    command.add_argument("--percepiano", default="", metavar="FOLDER", help="render PercePiano instead (or: demo)")
    command.add_argument("--synthesizers", nargs="+", default=[], help="builtin, soundfont names or .sf2/.sf3 files")
    command.add_argument("--renderings", default="", metavar="DIR", help="a recording of each clip, taken instead of rendering")
    command.add_argument("--partial", action="store_true", help="DIR may lack clips, which are listed then")
    command.add_argument(
        "--one-loudness", action="store_true", help="every clip at -23 LUFS, give or take 3 dB: for models that rate at any gain"
    )
    command.add_argument("--init", default="", help="audioset: in the papers' front end too, which its weights need")
    command.add_argument("--limit-hours", type=float, default=0.0, metavar="H", help="about so many hours (default: all)")
    command.add_argument("--stored", default="uint8", help="uint8 (steps of half a dB) or float16, twice as large")
    command.add_argument("--max-bad", type=int, default=0, metavar="N", help="bad recordings to do without (default: 0)")
    command.add_argument("--workers", type=int, default=0, help="processes (default: one per core)")
    command.add_argument("--verify", action="store_true", help="read the finished shards again, compare their checksums")
    command.add_argument("--beam-runner", default="", help="Apache Beam's DirectRunner, DataflowRunner ... make the shards")
    command.add_argument("--beam-option", action="append", default=[], metavar="NAME=VALUE", help="of Beam's pipeline")


def _add_pretraining(command):
    command.add_argument(
        "--pretraining",
        default="ssast",
        help="ssast (400 of 512 patches masked), ssast15 (15 %%), ssastframe (frames for patches), visible (the encoder sees "
        "visible patches alone: faster), transcription (hear what is played), joint (that and visible), transcriptionstem "
        "(convolutions before the patches)",
    )
    command.add_argument("--epochs", type=int, default=0, help="instead of the preset's")
    command.add_argument("--batch-size", type=int, default=0, help="over all devices, instead of the preset's")
    command.add_argument("--accumulate", type=int, default=0, help="micro-batches that a batch is cut into (default: 1)")
    command.add_argument("--remat", action=argparse.BooleanOptionalAction, help="compute activations twice to save memory")
    command.add_argument("--shard-params", action="store_true", default=None, help="spread parameters over the devices")
    _add_precision(command)
    command.add_argument("--dry-run", action="store_true", help="compile for the targets, say what fits, train nothing")
    command.add_argument("--target", nargs="+", default=["v5e-1"], help="of a dry run: v5e-1, v6e-1, v5e-8, v3-8")


def _add_start(command, others: str):
    names = ", ".join(PRETRAININGS)
    command.add_argument("--init", default="ssast", help=f"where the encoder starts: {names} (my pre-training), {others}")
    command.add_argument("--weights", default="", metavar="FILE", help="published weights for audioset (default: fetched)")
    command.add_argument("--epochs", type=int, default=0, help="instead of the preset's")
    add_set(command, "strategy=lora or predict_uncertainty=true")


def _add_own(command):
    command.add_argument(
        "--ratings", default="", metavar="CSV", help="your ratings: clip, a column that groups, numbers (or: demo)"
    )
    command.add_argument("--recordings", default="", metavar="DIR", help="the recordings that they are of")
    command.add_argument("--group", default="", metavar="COLUMN", help="whose clips stay together: piece, pianist")
    command.add_argument("--dimensions", nargs="+", default=[], metavar="COLUMN", help="that are ratings (default: all others)")


def _add_precision(command):
    command.add_argument("--precision", default="", help="float32, bfloat16, float16 (default: the device's fastest)")
    command.add_argument("--attention", default="", help="xla, cudnn or heads (default: the fastest)")
