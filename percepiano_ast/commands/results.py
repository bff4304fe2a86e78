"""What is measured: evaluate, experiment, baseline, index, reliability, listen."""

import argparse
import sys
from pathlib import Path

from percepiano_ast.commands.shared import add_set


def _evaluate(arguments):
    from percepiano_ast import report
    from percepiano_ast.evaluation import Settings

    given = {"n_permutations": arguments.permutations, "seed": arguments.seed, "min_difference": arguments.min_difference}
    settings = Settings(**{name: value for name, value in given.items() if value is not None})
    options = {"partial": arguments.partial, "settings": settings, "ceiling": arguments.ceiling or None}
    options |= {"reference": arguments.reference}
    print(report.evaluate_files(arguments.predictions, arguments.out, arguments.index or None, **options))


def _experiment(arguments):
    from percepiano_ast import suite
    from percepiano_ast.config import PRESETS, InputError, choose

    names = ("midi", "percepiano", "hours", "unseen")
    lists = ("voices", "pianos", "starts", "judged", "protocols")
    given = {name: getattr(arguments, name) for name in names} | {name: tuple(getattr(arguments, name)) for name in lists}
    given = {name: value for name, value in given.items() if value} | {"seeds": tuple(range(arguments.seeds))}
    if arguments.starts and not arguments.judged:
        given["judged"] = tuple(name for name in suite.Experiment.judged if name in arguments.starts)
    given["epochs"] = dict(arguments.epochs)
    if own := [pair for pair in arguments.set if pair.partition("=")[0] in ("seed", "unseen", "epochs")]:
        raise InputError(f"--set {own[0]}: experiment has an option of its own for it; use --seeds, --unseen or --epochs")
    preset = suite.Run(choose(PRESETS, arguments.preset, "preset"), Path(arguments.out)).switched(arguments.set).preset
    made = suite.run_experiment(preset, arguments.out, suite.Experiment(**given), arguments.minutes)
    if made:
        print(made)


def _baseline(arguments):
    from percepiano_ast import suite
    from percepiano_ast.baselines import run

    protocols, baselines, pianos = (tuple(getattr(arguments, name)) for name in ("protocol", "baselines", "synthesizers"))
    settings = run.Settings(protocols, baselines, pianos, arguments.seed, arguments.workers or suite.workers())
    print(run.run(arguments.percepiano, arguments.out, settings))


def _index(arguments):
    from percepiano_ast.data import content_groups
    from percepiano_ast.data.percepiano import load_index

    index = load_index(arguments.folder)
    found = content_groups.find_groups(arguments.folder, index)
    if not arguments.check:
        print(found.to_csv(lineterminator="\n"), end="")
        return 0
    for line in (wrong := content_groups.differences(found, index)):
        print(f"error: {line}", file=sys.stderr)
    if not wrong:
        print(f"{found.nunique()} content groups of {len(found)} segments, as the index has them")
    return 1 if wrong else 0


def _reliability(arguments):
    from percepiano_ast.data.percepiano import load_index
    from percepiano_ast.evaluation import reliability, table

    index = table.load_index(arguments.index) if arguments.index else load_index(arguments.raters)
    tables = reliability.evaluate(reliability.read_raters(arguments.raters), index, arguments.splits, arguments.seed)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    for name, one in tables.items():
        one.to_csv(out / f"{name}.csv", float_format="%.4f", lineterminator="\n")
    print(f"{out}: {', '.join(f'{name}.csv' for name in tables)}")


def _listen(arguments):
    from percepiano_ast import suite
    from percepiano_ast.listening import run

    others = None if arguments.other_synthesizers is None else tuple(arguments.other_synthesizers)
    workers = arguments.workers or suite.workers()
    settings = run.Settings(arguments.clips, arguments.synthesizer or run.SYNTHESIZER, others, arguments.seed, workers)
    print(run.listen(arguments.percepiano, arguments.out, arguments.model, settings))


def add_commands(add) -> None:
    """Put the commands of this module into a parser by ``add(name, function, text)``."""
    command = add("evaluate", _evaluate, "Metrics, comparisons and a report from predictions.")
    command.add_argument("predictions", nargs="+", metavar="PREDICTIONS", help="predictions*.csv or .csv.gz")
    command.add_argument("--out", required=True, metavar="DIR", help="directory of the report")
    command.add_argument("--index", default="", metavar="FILE", help="index of clips (default: PercePiano's)")
    command.add_argument("--partial", action="store_true", help="allow predictions that do not cover the protocol")
    command.add_argument("--permutations", type=int, metavar="N", help="of each comparison (default: 2000)")
    command.add_argument("--seed", type=int, help="of the permutations (default: 0)")
    command.add_argument(
        "--min-difference", type=float, metavar="D",
        help="pairs of performances rated closer than this are not told apart (default: .074, a standard error)",
    )  # fmt: skip
    command.add_argument("--ceiling", default="", metavar="FILE", help="noise ceiling, as reliability writes it")
    command.add_argument(
        "--reference", default="", metavar="MODEL",
        help="that the comparison page compares with (default: the best that hears audio and is no encoder)",
    )  # fmt: skip

    _add_experiment(add)
    _add_baseline(add)

    command = add("index", _index, "Content groups (which segments share music) from the deadpan MIDI, as CSV.")
    command.add_argument("folder", help="PercePiano's folder, or one in its layout with an index.csv")
    command.add_argument("--check", action="store_true", help="compare with the index instead of writing")

    command = add("reliability", _reliability, "How far raters agree: ICC, split-half reliability, noise ceiling.")
    command.add_argument("raters", help="PercePiano's folder, or a rater CSV")
    command.add_argument("--out", required=True, metavar="DIR", help="directory of icc.csv, split_half.csv, ceiling.csv")
    command.add_argument("--index", default="", metavar="FILE", help="index of clips (default: PercePiano's)")
    command.add_argument("--splits", type=int, default=500, metavar="N", help="random splits of the raters (default: 500)")
    command.add_argument("--seed", type=int, default=0, help="of the splits (default: 0)")
    _add_listen(add)


def _number_of(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    if not number.isdecimal() or not int(number):
        raise argparse.ArgumentTypeError(f"{text}: write NAME=N, such as visible=4")
    return name, int(number)


def _add_experiment(add):
    text = "The whole experiment: renders ASAP and PercePiano, pre-trains, rates under every protocol, evaluates. Resumes."
    command = add("experiment", _experiment, text)
    command.add_argument("--midi", required=True, metavar="ASAP", help="ASAP's folder or tar archive, with metadata.csv in it")
    command.add_argument("--percepiano", required=True, metavar="FOLDER", help="PercePiano's folder (or: demo)")
    command.add_argument("--out", required=True, metavar="DIR", help="everything that is made; the page is in DIR/results")
    command.add_argument("--preset", default="mini", help="size and schedule (default: mini)")
    command.add_argument("--hours", type=float, default=0.0, help="of ASAP to render (default: 18)")
    command.add_argument("--voices", nargs="+", default=[], metavar="NAME", help="synthesizers that take turns in it")
    command.add_argument("--pianos", nargs="+", default=[], metavar="NAME", help="synthesizers that play what is rated")
    command.add_argument("--unseen", default="", metavar="NAME", help="one more, which nothing learns from (default: timgm6mb)")
    starts = "encoders to compare: pre-trainings, scratch, cnn (default: transcriptionstem)"
    command.add_argument("--starts", nargs="+", default=[], metavar="NAME", help=starts)
    judged = "those that judge judges, under every protocol (default: transcriptionstem, where it is compared)"
    command.add_argument("--judged", nargs="+", default=[], metavar="NAME", help=judged)
    command.add_argument("--protocols", nargs="+", default=[], metavar="P", help="of judge and the baselines (default: all)")
    command.add_argument("--seeds", type=int, default=1, metavar="N", help="of everything (default: 1)")
    epochs = "of a start, instead of the preset's: more for those that cost less; of its heads where it has no pre-training"
    command.add_argument("--epochs", nargs="+", type=_number_of, default=[], metavar="NAME=N", help=epochs)
    add_set(command, "strategy=frozen")
    command.add_argument("--minutes", type=float, default=0.0, metavar="M", help="begin no stage after so many; run it again")


def _add_baseline(add):
    text = "Baselines that learn no hearing, fold by fold: predictions that are the floor of every table. Those named +score "
    text += "see the score as well; a clip that does not play its score is listed in without_score.csv."
    command = add("baseline", _baseline, text)
    command.add_argument("--percepiano", required=True, metavar="FOLDER", help="PercePiano's folder (or: demo)")
    command.add_argument("--out", required=True, metavar="DIR", help="directory of predictions and of the tables behind them")
    command.add_argument("--protocol", nargs="+", default=[], metavar="P", help="protocols of the index (default: all)")
    names = "such as audio-stats, midi-stats+score (default: all)"
    command.add_argument("--baselines", nargs="+", default=[], metavar="NAME", help=names)
    command.add_argument(
        "--synthesizers", nargs="+", default=["musescore-small"], help="that play what is heard (default: musescore-small)"
    )
    command.add_argument("--seed", type=int, default=0, help="of trees and networks (default: 0)")
    command.add_argument("--workers", type=int, default=0, help="processes that listen (default: one per core)")


def _add_listen(add):
    command = add("listen", _listen, "Listening tests by construction: one thing changed in real performances, rated again.")
    command.add_argument("--percepiano", required=True, metavar="FOLDER", help="PercePiano's folder (or: demo)")
    models = "audio-stats, midi-stats (fitted here), packaged (the model that comes along) or its file, directories of fine-tuned "
    models += "runs, module:attribute of any rating function"
    command.add_argument("--model", nargs="+", required=True, metavar="MODEL", help=models)
    command.add_argument("--out", required=True, metavar="DIR", help="tables, figures, summary, and the renderings")
    command.add_argument("--clips", type=int, default=100, metavar="N", help="performances to draw (default: 100)")
    command.add_argument("--synthesizer", default="", help="that they are heard with (default: musescore-small)")
    command.add_argument(
        "--other-synthesizers", nargs="*", metavar="NAME", help="that a rating should not depend on (default: all known)"
    )
    command.add_argument("--seed", type=int, default=0, help="of clips, noise and rooms (default: 0)")
    command.add_argument("--workers", type=int, default=0, help="processes that render (default: one per core)")
