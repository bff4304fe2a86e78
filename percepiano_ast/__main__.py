"""Command line: ``python -m percepiano_ast COMMAND``. Exit codes: 0 done, 2 bad input or usage, 1 the run failed."""

import argparse
import json
import sys
from pathlib import Path

from percepiano_ast.config import PRESETS, InputError, RunFailed, choose


def _run(arguments):
    from percepiano_ast.suite import Run

    preset = choose(PRESETS, arguments.preset, "preset")
    run = Run(preset, Path(arguments.out or f"runs/{preset.name}"))
    return run.with_epochs(getattr(arguments, "pretrain_epochs", 0), getattr(arguments, "finetune_epochs", 0))


def _notebooks(arguments):
    from percepiano_ast import notebooks

    choose(PRESETS, arguments.preset, "preset")
    out = Path(arguments.out or f"runs/{arguments.preset}").resolve()
    home = notebooks.FOLDER.parent
    # Notebooks run in the repository: what they show needs no more of this machine's paths than that.
    shown = out.relative_to(home) if out.is_relative_to(home) else out
    values = {"PRESET": arguments.preset, "RUN_DIR": str(shown)}
    for pair in arguments.set:
        name, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"--set {pair!r} is not NAME=VALUE")
        values[name] = int(value) if value.isdigit() else value
    notebooks.run(out, values, keep=arguments.keep_outputs)
    print(f"report: {out / 'evaluation' / 'report.html'}")


def _preprocess(arguments):
    from percepiano_ast import suite

    run = _run(arguments)
    if arguments.percepiano:
        print(suite.preprocess_percepiano(run, arguments.percepiano, tuple(arguments.synthesizers)))
    else:
        print(suite.preprocess_maestro(run, arguments.source))


def _pretrain(arguments):
    from percepiano_ast import suite

    suite.pretrain(_run(arguments))


def _finetune(arguments):
    from percepiano_ast import suite

    run = _run(arguments)
    if arguments.init == "baseline":
        suite.baseline(run)
    else:
        suite.finetune(run, arguments.init)


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


def _bench(arguments):
    from percepiano_ast import bench

    for line in choose(bench.BENCHMARKS, arguments.name, "benchmark")():
        print(json.dumps(line), flush=True)


def _render(arguments):
    from percepiano_ast.data import asap

    print(asap.render_archive(arguments.midi, arguments.to, hours=arguments.hours, synthesizers=arguments.synthesizers))


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
    command.add_argument("--source", default="", help="MAESTRO archive, folder, https:// or gs:// (default: the preset's)")
    command.add_argument("--percepiano", default="", metavar="FOLDER", help="render PercePiano instead (or: demo)")
    command.add_argument("--synthesizers", nargs="+", default=[], help="builtin, soundfont names or .sf2/.sf3 files")

    command = add("pretrain", _pretrain, "SSAST pre-training on the shards; a checkpoint every epoch.")
    _add_run(command)
    command.add_argument("--epochs", dest="pretrain_epochs", type=int, default=0, help="instead of the preset's")

    command = add("finetune", _finetune, "Rating heads on PercePiano, fold by fold; writes out-of-fold predictions.")
    _add_run(command)
    command.add_argument("--init", default="ssast", help="ssast, scratch, or baseline (the feed-forward one)")
    command.add_argument("--epochs", dest="finetune_epochs", type=int, default=0, help="instead of the preset's")


def _add_tools(add):
    command = add("evaluate", _evaluate, "Metrics, comparisons and a report from predictions.")
    command.add_argument("predictions", nargs="+", metavar="PREDICTIONS", help="predictions*.csv or .csv.gz")
    command.add_argument("--out", required=True, metavar="DIR", help="directory of the report")
    command.add_argument("--index", default="", metavar="FILE", help="index of clips (default: PercePiano's)")
    command.add_argument("--partial", action="store_true", help="allow predictions that do not cover the protocol")

    command = add("rate", _rate, "Rate recordings on the 19 dimensions, with a fine-tuned run.")
    command.add_argument("files", nargs="+", metavar="FILE", help="WAV, FLAC, OGG or MP3")
    command.add_argument("--run", required=True, metavar="DIR", help="directory of a run that was fine-tuned")
    command.add_argument("--model", default="", help="model below DIR/finetune (default: the pre-trained one)")
    command.add_argument("--json", action="store_true", help="one JSON array on standard output")

    command = add("render", _render, "Render MIDI performances into an archive in MAESTRO's shape.")
    command.add_argument("midi", help="ASAP's folder or tar archive, with metadata.csv in it")
    command.add_argument("--to", required=True, metavar="ZIP", help="the archive to write")
    command.add_argument("--hours", type=float, default=4.0, help="how much to render (default: 4)")
    command.add_argument("--synthesizers", nargs="+", default=["builtin"], help="used in turn")

    command = add("bench", _bench, "Measure a speed against a peer in the same run; JSON lines.")
    command.add_argument("name", metavar="NAME", help="log-mel or pretrain-step")


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
