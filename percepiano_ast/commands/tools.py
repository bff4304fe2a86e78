"""Commands on single recordings and files: rate, explain, convert, render, bench."""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from percepiano_ast.config import lookup
from percepiano_ast.errors import InputError


def _rate(arguments):
    from percepiano_ast import recording

    files, others = recording.recordings_in(arguments.files)
    if others:
        print(
            f"{len(others)} other files are not recordings:"
            f" {', '.join(path.name for path in others[:5])}",
            file=sys.stderr,
        )
    if not arguments.run:
        return _rate_packaged(arguments, files)
    if given := [name for name in ("csv", "html", "score", "weights") if getattr(arguments, name)]:
        raise InputError(
            f"--{given[0]} is an option of the bundled model and does not go with --run. Omit one"
            " of the two"
        )
    # here, because the modules that read a run take a second to import
    from percepiano_ast import rating

    rater = rating.Rater(arguments.run, arguments.model)
    results = [rater.rate_or_explain(str(file)) for file in files]
    print(
        json.dumps(results, indent=1)
        if arguments.json
        else rating.as_text(results, rater.questionnaire)
    )
    return _errors([result for result in results if "error" in result])


def _rate_packaged(arguments, files: list[str | Path]) -> int:
    """With the bundled model, or that of ``--weights``."""
    from percepiano_ast import packaged, recording
    from percepiano_ast.music.score import read_score
    from percepiano_ast.recording import page

    model = recording.load_model(arguments.weights or packaged.SHIPPED)
    written = read_score(arguments.score) if arguments.score else None
    rated, sounds, results, errors = [], [], [], []
    executor = ThreadPoolExecutor(1)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    ascii_only = "utf" not in (sys.stdout.encoding or "").lower()
    for number, file in enumerate(files, 1):
        encoding = [executor.submit(page.sound, file)] if arguments.html else []
        progress = _Progress(f"{number}/{len(files)} {Path(file).name}")
        try:
            rated.append(recording.rate(model, file, written, progress))
            sounds += encoding
            results.append(rated[-1].as_json())
        except InputError as error:
            errors.append({"file": str(file), "error": str(error).removeprefix(f"{file}: ")})
            results.append(errors[-1])
        finally:
            progress("")
        if not arguments.json and results[-1] not in errors:
            print(recording.as_text(rated[-1], colour, ascii_only) + "\n", flush=True)
    if arguments.json:
        print(json.dumps(results, indent=1))
    elif len(rated) == len(files) == 2:
        print(recording.comparison_text(*rated) + "\n")
    output = sys.stderr if arguments.json else sys.stdout
    if arguments.csv:
        recording.as_table(rated).to_csv(arguments.csv, index=False, lineterminator="\n")
        print(f"table: {Path(arguments.csv).resolve().as_uri()}", file=output)
    if arguments.html and rated:
        path = page.write(rated, arguments.html, [encoded.result() for encoded in sounds])
        print(f"page: {path.resolve().as_uri()}", file=output)
    return _errors(errors)


class _Progress:
    """A line on a terminal that shows the current stage of a recording and is erased at the end;
    nothing elsewhere."""

    def __init__(self, name: str):
        self.name, self.shown = name[:44], sys.stderr.isatty()

    def __call__(self, stage: str) -> None:
        if self.shown:
            print(
                f"\r\x1b[K{self.name}: {stage}" if stage else "\r\x1b[K",
                end="",
                file=sys.stderr,
                flush=True,
            )


def _errors(errors: list[dict]) -> int:
    """Print one line per error; returns the exit code."""
    for one in errors:
        print(f"{one['file']}: {one['error']}", file=sys.stderr)
    return 2 if errors else 0


def _explain(arguments):
    from percepiano_ast.explain import written

    names = ("run", "out", "model", "midi", "baseline", "seconds")
    options = {name: getattr(arguments, name) for name in names}
    written.explain_files(
        arguments.files, dimensions=arguments.dimension, with_checks=arguments.checks, **options
    )


def _bench(arguments):
    from percepiano_ast import bench

    for line in lookup(bench.BENCHMARKS, arguments.name, "benchmark")():
        print(json.dumps(line), flush=True)


def _render(arguments):
    from percepiano_ast import suite
    from percepiano_ast.data import asap

    options = {
        "hours": arguments.hours,
        "synthesizers": arguments.synthesizers,
        "workers": suite.workers(),
    }
    print(asap.render_archive(arguments.midi, arguments.to, **options))


def _convert(arguments):
    from percepiano_ast import exchange

    print(exchange.convert(arguments.source, arguments.to, arguments.kind))


def add_commands(add) -> None:
    """Put the commands of this module into a parser by ``add(name, function, text)``."""
    text = (
        "Rate recordings on 19 dimensions, by the bundled model piano-rater or a run of your own."
        " Nothing leaves this machine."
    )
    command = add("rate", _rate, text, "percepiano rate take.m4a --html page.html")
    command.add_argument(
        "files", nargs="+", metavar="FILE", help="WAV, FLAC, OGG, MP3 or M4A, or a folder of them"
    )
    command.add_argument(
        "--json", action="store_true", help="print one JSON array to standard output"
    )
    command.add_argument(
        "--csv",
        default="",
        metavar="FILE",
        help="write a table with one row per recording and dimension",
    )
    command.add_argument(
        "--html",
        default="",
        metavar="FILE",
        help="write a page with the sound; two recordings are compared",
    )
    command.add_argument(
        "--score",
        default="",
        metavar="FILE",
        help="score of the music, MIDI or MusicXML: timing is rated better",
    )
    command.add_argument(
        "--weights",
        default="",
        metavar="FILE",
        help="another rating model, a file or URL#sha256=...",
    )
    command.add_argument(
        "--run",
        default="",
        metavar="DIR",
        help="use a fine-tuned run instead: its folder, --store or own/NAME",
    )
    command.add_argument(
        "--model", default="", help="model below DIR/finetune (default: the pre-trained one)"
    )

    command = add(
        "convert",
        _convert,
        "Convert weights: ours, the authors' AST and SSAST, Hugging Face's AST.",
    )
    command.add_argument(
        "source", help="directory of a pre-training, .safetensors, .pth, or Hugging Face's folder"
    )
    command.add_argument(
        "--to", required=True, help=".safetensors file to write; for hf_ast a folder"
    )
    command.add_argument("--kind", default="", help="ast or hf_ast (default: unchanged)")

    command = add(
        "render", _render, "Render MIDI performances into an archive with MAESTRO's layout."
    )
    command.add_argument("midi", help="ASAP's folder or tar archive, with metadata.csv in it")
    command.add_argument("--to", required=True, metavar="ZIP", help="the archive to write")
    command.add_argument("--hours", type=float, default=4.0, help="hours to render (default: 4)")
    command.add_argument(
        "--synthesizers", nargs="+", default=["builtin"], help="synthesizers, used in turn"
    )

    command = add(
        "bench", _bench, "Measure a speed and that of a peer in the same run; prints JSON lines."
    )
    command.add_argument(
        "name",
        metavar="NAME",
        help="log-mel, preprocess, batches, pretrain-step, model, checkpoint, evaluate or rate",
    )
    _add_explain(add)


def _add_explain(add):
    command = add(
        "explain",
        _explain,
        "Attribute a rating to time, frequency and notes, and check the attribution.",
    )
    command.add_argument("files", nargs="+", metavar="FILE", help="WAV, FLAC, OGG or MP3")
    command.add_argument(
        "--run", required=True, metavar="DIR", help="a run that was fine-tuned, or its --store"
    )
    command.add_argument(
        "--model", default="", help="model below DIR/finetune (default: the pre-trained one)"
    )
    command.add_argument(
        "--dimension",
        nargs="+",
        required=True,
        metavar="KEY",
        help="such as timing_stable_unstable",
    )
    command.add_argument(
        "--midi",
        default="",
        metavar="FILE",
        help="MIDI of the (single) recording: contributions of its notes too",
    )
    command.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="output folder: figures, tables and excerpts of each file",
    )
    command.add_argument(
        "--baseline",
        default="mean",
        help="baseline of the attribution: mean (the mean spectrum) or silence (default: mean)",
    )
    command.add_argument(
        "--seconds", type=float, default=5.0, metavar="S", help="length of the excerpt (default: 5)"
    )
    command.add_argument(
        "--checks",
        action="store_true",
        help="deletion curves and randomised weights over all FILEs",
    )
