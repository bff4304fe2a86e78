"""Command line: ``python -m percepiano_ast COMMAND``. Exit codes: 0 done, 2 bad input or usage, 1 the run failed."""

import argparse
import json
import sys
from pathlib import Path

from percepiano_ast.config import PRESETS, PRETRAININGS, InputError, RunFailed, as_path, choose

EXECUTION = ("precision", "accumulate", "remat", "attention", "shard_params")


def _run(arguments):
    from percepiano_ast.suite import Run

    preset = choose(PRESETS, arguments.preset, "preset")
    return Run(preset, as_path(arguments.out or f"runs/{preset.name}"), store=getattr(arguments, "store", ""))


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

    run = _run(arguments)
    if arguments.verify:
        return _verify(run.percepiano if arguments.percepiano else run.maestro)
    if arguments.percepiano:
        synthesizers = tuple(arguments.synthesizers)
        print(suite.preprocess_percepiano(run, arguments.percepiano, synthesizers, init=arguments.init))
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

    run = _run(arguments).for_pretraining(arguments.pretraining)
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

    run = _run(arguments).changed("finetune", epochs=arguments.epochs)
    run = run.changed("execution", precision=arguments.precision, attention=arguments.attention)
    if arguments.init == "baseline":
        suite.baseline(run)
    else:
        suite.finetune(run, arguments.init, arguments.weights)


def _evaluate(arguments):
    from percepiano_ast import report

    index = arguments.index or None
    print(report.evaluate_files(arguments.predictions, arguments.out, index, partial=arguments.partial))


def _rate(arguments):
    from percepiano_ast import rating

    rater = rating.Rater(arguments.run, arguments.model)
    results = [rater.rate_or_explain(file) for file in arguments.files]
    print(json.dumps(results, indent=1) if arguments.json else rating.as_text(results))
    for result in results:
        if "error" in result:
            print(f"{result['file']}: {result['error']}", file=sys.stderr)
    return 2 if any("error" in result for result in results) else 0


def _status(arguments):
    from percepiano_ast import views

    run = _run(arguments)
    table = views.kept(run)
    if table.empty:
        raise InputError(f"nothing of a run in {run.root}{f' and {run.store}' if run.store else ''}: name its --out and --store")
    print(table.to_string(index=False))


def _bench(arguments):
    from percepiano_ast import bench

    for line in choose(bench.BENCHMARKS, arguments.name, "benchmark")():
        print(json.dumps(line), flush=True)


def _render(arguments):
    from percepiano_ast.data import asap

    print(asap.render_archive(arguments.midi, arguments.to, hours=arguments.hours, synthesizers=arguments.synthesizers))


def _convert(arguments):
    from percepiano_ast import exchange

    print(exchange.convert(arguments.source, arguments.to, arguments.kind))


def _add_run(parser):
    parser.add_argument("--preset", default="demo", help=f"one of {', '.join(PRESETS)} (default: demo)")
    parser.add_argument("--out", default="", metavar="DIR", help="directory of the run (default: runs/PRESET)")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m percepiano_ast",
        description="Listen to a piano performance and say how it is played.",
        epilog="Steps in order: preprocess, pretrain, preprocess --percepiano, finetune, evaluate. Each resumes.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name, function, text):
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(function=function)
        return command

    _add_steps(add)
    _add_tools(add)
    return parser


def _add_steps(add):
    command = add("notebooks", _notebooks, "Run the four notebooks headless.")
    _add_run(command)
    command.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="fill in a row of the forms")
    command.add_argument("--keep-outputs", action="store_true", help="put the outputs into the shipped notebooks")

    command = add("preprocess", _preprocess, "Recordings, or PercePiano's MIDI, to log-mel shards.")
    _add_run(command)
    command.add_argument("--source", default="", help="MAESTRO's archive (path, https://, gs://) or any folder of recordings")
    command.add_argument("--percepiano", default="", metavar="FOLDER", help="render PercePiano instead (or: demo)")
    command.add_argument("--synthesizers", nargs="+", default=[], help="builtin, soundfont names or .sf2/.sf3 files")
    command.add_argument("--init", default="", help="audioset: in the papers' front end too, which its weights need")
    command.add_argument("--limit-hours", type=float, default=0.0, metavar="H", help="about so many hours (default: all)")
    command.add_argument("--stored", default="uint8", help="uint8 (steps of half a dB) or float16, twice as large")
    command.add_argument("--max-bad", type=int, default=0, metavar="N", help="bad recordings to do without (default: 0)")
    command.add_argument("--workers", type=int, default=0, help="processes (default: one per core)")
    command.add_argument("--verify", action="store_true", help="read the finished shards again, compare their checksums")
    command.add_argument("--beam-runner", default="", help="Apache Beam's DirectRunner, DataflowRunner ... make the shards")
    command.add_argument("--beam-option", action="append", default=[], metavar="NAME=VALUE", help="of Beam's pipeline")

    command = add("pretrain", _pretrain, "SSAST pre-training on the shards; a checkpoint every epoch.")
    _add_run(command)
    _add_store(command)
    _add_pretraining(command)

    command = add("finetune", _finetune, "Rating heads on PercePiano, fold by fold; writes out-of-fold predictions.")
    _add_run(command)
    _add_store(command)
    starts = f"{', '.join(PRETRAININGS)} (my pre-training), scratch, audioset, or baseline (the feed-forward one)"
    command.add_argument("--init", default="ssast", help=f"where the encoder starts: {starts}")
    command.add_argument("--weights", default="", metavar="FILE", help="published weights for audioset (default: fetched)")
    command.add_argument("--epochs", type=int, default=0, help="instead of the preset's")
    _add_precision(command)


def _add_store(command):
    command.add_argument("--store", default="", metavar="PLACE", help="checkpoints go to this folder or gs://BUCKET/PREFIX instead")


def _add_pretraining(command):
    command.add_argument(
        "--pretraining",
        default="ssast",
        help="ssast (400 of 512 patches masked), ssast15 (15 %%), ssastframe (frames for patches), visible (the encoder sees "
        "visible patches alone: faster)",
    )
    command.add_argument("--epochs", type=int, default=0, help="instead of the preset's")
    command.add_argument("--batch-size", type=int, default=0, help="over all devices, instead of the preset's")
    command.add_argument("--accumulate", type=int, default=0, help="micro-batches that a batch is cut into (default: 1)")
    command.add_argument("--remat", action=argparse.BooleanOptionalAction, help="compute activations twice to save memory")
    command.add_argument("--shard-params", action="store_true", default=None, help="spread parameters over the devices")
    _add_precision(command)
    command.add_argument("--dry-run", action="store_true", help="compile for the targets, say what fits, train nothing")
    command.add_argument("--target", nargs="+", default=["v5e-1"], help="of a dry run: v5e-1, v6e-1, v5e-8, v3-8")


def _add_precision(command):
    command.add_argument("--precision", default="", help="float32, bfloat16, float16 (default: the device's fastest)")
    command.add_argument("--attention", default="", help="xla, cudnn or heads (default: the fastest)")


def _add_tools(add):
    command = add("evaluate", _evaluate, "Metrics, comparisons and a report from predictions.")
    command.add_argument("predictions", nargs="+", metavar="PREDICTIONS", help="predictions*.csv or .csv.gz")
    command.add_argument("--out", required=True, metavar="DIR", help="directory of the report")
    command.add_argument("--index", default="", metavar="FILE", help="index of clips (default: PercePiano's)")
    command.add_argument("--partial", action="store_true", help="allow predictions that do not cover the protocol")

    command = add("status", _status, "What of a run is where, how far it is, how old, and whether it is whole.")
    _add_run(command)
    _add_store(command)

    command = add("rate", _rate, "Rate recordings on the 19 dimensions, with a fine-tuned run.")
    command.add_argument("files", nargs="+", metavar="FILE", help="WAV, FLAC, OGG or MP3")
    command.add_argument("--run", required=True, metavar="DIR", help="a run that was fine-tuned, or its --store")
    command.add_argument("--model", default="", help="model below DIR/finetune (default: the pre-trained one)")
    command.add_argument("--json", action="store_true", help="one JSON array on standard output")

    command = add("convert", _convert, "Weights in and out: ours, the authors' AST and SSAST, Hugging Face's AST.")
    command.add_argument("source", help="directory of a pre-training, .safetensors, .pth, or Hugging Face's folder")
    command.add_argument("--to", required=True, help=".safetensors file to write; for hf_ast a folder")
    command.add_argument("--kind", default="", help="ast or hf_ast (default: as it is)")

    command = add("render", _render, "Render MIDI performances into an archive in MAESTRO's shape.")
    command.add_argument("midi", help="ASAP's folder or tar archive, with metadata.csv in it")
    command.add_argument("--to", required=True, metavar="ZIP", help="the archive to write")
    command.add_argument("--hours", type=float, default=4.0, help="how much to render (default: 4)")
    command.add_argument("--synthesizers", nargs="+", default=["builtin"], help="used in turn")

    command = add("bench", _bench, "Measure a speed against a peer in the same run; JSON lines.")
    command.add_argument("name", metavar="NAME", help="log-mel, preprocess, batches, pretrain-step, model or checkpoint")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parsed = _parser().parse_args(arguments)
    try:
        return parsed.function(parsed) or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 1
    except (FloatingPointError, OSError, RunFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
