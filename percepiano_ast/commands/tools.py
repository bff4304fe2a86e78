"""One thing at a time: rate, explain, convert, render, bench."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from percepiano_ast.config import InputError, choose


def _rate(arguments):
    from percepiano_ast import recording

    files, others = recording.recordings_in(arguments.files)
    if others:
        print(f"{len(others)} other files are no recordings: {', '.join(path.name for path in others[:5])}", file=sys.stderr)
    if not arguments.run:
        return _rate_packaged(arguments, files)
    if given := [name for name in ("csv", "html", "score", "weights") if getattr(arguments, name)]:
        raise InputError(f"--{given[0]} is of the model that comes along; leave it or --run out")
    from percepiano_ast import rating  # here, as it takes a second to load what reads a run

    rater = rating.Rater(arguments.run, arguments.model)
    results = [rater.rate_or_explain(str(file)) for file in files]
    print(json.dumps(results, indent=1) if arguments.json else rating.as_text(results, rater.questionnaire))
    return _errors([result for result in results if "error" in result])


def _rate_packaged(arguments, files: list[str | Path]) -> int:
    """By a model of one file, that which comes along if no other is named."""
    from percepiano_ast import packaged, recording, score
    from percepiano_ast.recording import page

    model = packaged.Packaged.read(packaged.fetched(arguments.weights) if arguments.weights else packaged.SHIPPED)
    written = score.read(arguments.score) if arguments.score else None
    rated, sounds, results, errors = [], [], [], []
    beside = ThreadPoolExecutor(1)
    for file in files:
        encoding = [beside.submit(page.sound, file)] if arguments.html else []
        try:
            rated.append(recording.rate(model, file, written))
            sounds += encoding
            results.append(rated[-1].as_json())
        except InputError as error:
            errors.append({"file": str(file), "error": str(error).removeprefix(f"{file}: ")})
            results.append(errors[-1])
        if not arguments.json and results[-1] not in errors:
            print(recording.as_text(rated[-1]), flush=True)
    if arguments.json:
        print(json.dumps(results, indent=1))
    if arguments.csv:
        recording.as_table(rated).to_csv(arguments.csv, index=False, lineterminator="\n")
    if arguments.html and rated:
        print(page.write(rated, arguments.html, [encoded.result() for encoded in sounds]), file=sys.stderr)
    return _errors(errors)


def _errors(errors: list[dict]) -> int:
    """A line each; the exit code."""
    for one in errors:
        print(f"{one['file']}: {one['error']}", file=sys.stderr)
    return 2 if errors else 0


def _explain(arguments):
    from percepiano_ast.explain import written

    names = ("run", "out", "model", "midi", "baseline", "seconds")
    options = {name: getattr(arguments, name) for name in names}
    written.explain_files(arguments.files, dimensions=arguments.dimension, with_checks=arguments.checks, **options)


def _bench(arguments):
    from percepiano_ast import bench

    for line in choose(bench.BENCHMARKS, arguments.name, "benchmark")():
        print(json.dumps(line), flush=True)


def _render(arguments):
    from percepiano_ast import suite
    from percepiano_ast.data import asap

    options = {"hours": arguments.hours, "synthesizers": arguments.synthesizers, "workers": suite.workers()}
    print(asap.render_archive(arguments.midi, arguments.to, **options))


def _convert(arguments):
    from percepiano_ast import exchange

    print(exchange.convert(arguments.source, arguments.to, arguments.kind))


def add_commands(add) -> None:
    """Put the commands of this module into a parser by ``add(name, function, text)``."""
    text = "Rate recordings on 19 dimensions, by the model that comes along or a run of your own; nothing leaves this machine."
    command = add("rate", _rate, text)
    command.add_argument("files", nargs="+", metavar="FILE", help="WAV, FLAC, OGG, MP3 (M4A with ffmpeg), or a folder of them")
    command.add_argument("--json", action="store_true", help="one JSON array on standard output")
    command.add_argument("--csv", default="", metavar="FILE", help="a table to write, a row a recording and dimension")
    command.add_argument("--html", default="", metavar="FILE", help="a page to write, to see and hear; two files: side by side")
    command.add_argument("--score", default="", metavar="FILE", help="of what is played, MIDI or MusicXML: hears timing better")
    command.add_argument("--weights", default="", metavar="FILE", help="another model, a file or URL#sha256=...")
    command.add_argument("--run", default="", metavar="DIR", help="instead a run that was fine-tuned, its --store, or its own/NAME")
    command.add_argument("--model", default="", help="model below DIR/finetune (default: the pre-trained one)")

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
    command.add_argument(
        "name", metavar="NAME", help="log-mel, preprocess, batches, pretrain-step, model, checkpoint, evaluate or rate"
    )
    _add_explain(add)


def _add_explain(add):
    command = add("explain", _explain, "What in a recording moved a rating: maps, seconds, notes, and whether to trust them.")
    command.add_argument("files", nargs="+", metavar="FILE", help="WAV, FLAC, OGG or MP3")
    command.add_argument("--run", required=True, metavar="DIR", help="a run that was fine-tuned, or its --store")
    command.add_argument("--model", default="", help="model below DIR/finetune (default: the pre-trained one)")
    command.add_argument("--dimension", nargs="+", required=True, metavar="KEY", help="such as timing_stable_unstable")
    command.add_argument("--midi", default="", metavar="FILE", help="of the one recording: contributions of its notes too")
    command.add_argument("--out", required=True, metavar="DIR", help="figures, tables and excerpts; a folder for each file")
    command.add_argument("--baseline", default="mean", help="compare with the recording's mean spectrum, or with silence")
    command.add_argument("--seconds", type=float, default=5.0, metavar="S", help="length of the excerpt (default: 5)")
    command.add_argument("--checks", action="store_true", help="deletion curves and randomised weights over all FILEs")
