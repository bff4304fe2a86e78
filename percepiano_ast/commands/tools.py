"""Commands on single recordings and files: rate, explain, convert."""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from percepiano_ast.errors import InputError


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
    from percepiano_ast import exchange

    print(exchange.convert(arguments.source, arguments.to, arguments.kind))


def add_commands(add) -> None:
    """Put the commands of this module into a parser by ``add(name, function, text)``."""
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
