"""Commands for evaluation: evaluate, baseline, reliability, listen."""

from pathlib import Path


def _evaluate(arguments):
    from percepiano_ast.evaluation import EvaluationOptions
    from percepiano_ast.studies import report

    given = {
        "n_permutations": arguments.permutations,
        "seed": arguments.seed,
        "min_difference": arguments.min_difference,
    }
    settings = EvaluationOptions(
        **{name: value for name, value in given.items() if value is not None}
    )
    options = {
        "partial": arguments.partial,
        "settings": settings,
        "ceiling": arguments.ceiling or None,
    }
    options |= {"reference": arguments.reference}
    print(
        report.evaluate_files(
            arguments.predictions, arguments.out, arguments.index or None, **options
        )
    )


def _baseline(arguments):
    from percepiano_ast import suite
    from percepiano_ast.baselines import run

    protocols, baselines, pianos = (
        tuple(getattr(arguments, name)) for name in ("protocol", "baselines", "synthesizers")
    )
    settings = run.Settings(
        protocols, baselines, pianos, arguments.seed, arguments.workers or suite.workers()
    )
    print(run.run(arguments.percepiano, arguments.out, settings))


def _reliability(arguments):
    from percepiano_ast.data.percepiano import load_index
    from percepiano_ast.evaluation import predictions, reliability

    index = (
        predictions.load_index(arguments.index) if arguments.index else load_index(arguments.raters)
    )
    tables = reliability.evaluate(
        reliability.read_raters(arguments.raters), index, arguments.splits, arguments.seed
    )
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
    settings = run.Settings(
        arguments.clips, arguments.synthesizer or run.SYNTHESIZER, others, arguments.seed, workers
    )
    print(run.listen(arguments.percepiano, arguments.out, arguments.model, settings))


def add_commands(add) -> None:
    """Add the commands of this module to a parser by ``add(name, function, text)``."""
    command = add("evaluate", _evaluate, "Evaluate predictions: metrics, comparisons and a report.")
    command.add_argument(
        "predictions", nargs="+", metavar="PREDICTIONS", help="predictions*.csv or .csv.gz"
    )
    command.add_argument(
        "--out", required=True, metavar="DIR", help="output directory of the report"
    )
    command.add_argument(
        "--index", default="", metavar="FILE", help="CSV index of clips (default: PercePiano's)"
    )
    command.add_argument(
        "--partial", action="store_true", help="allow predictions that do not cover the protocol"
    )
    command.add_argument(
        "--permutations", type=int, metavar="N", help="permutations per comparison (default: 2000)"
    )
    command.add_argument("--seed", type=int, help="seed of the permutations (default: 0)")
    command.add_argument(
        "--min-difference",
        type=float,
        metavar="D",
        help=(
            "compare pairs of performances whose ratings, from 0 to 1, differ by at least D"
            " (default: 0.074, a standard error)"
        ),
    )
    command.add_argument(
        "--ceiling",
        default="",
        metavar="FILE",
        help="CSV of the noise ceiling from `reliability` (default: PercePiano's)",
    )
    command.add_argument(
        "--reference",
        default="",
        metavar="MODEL",
        help=(
            "reference model of the comparison page (default: the best audio-only model that is not"
            " an encoder)"
        ),
    )

    _add_baseline(add)

    command = add(
        "reliability",
        _reliability,
        "Inter-rater agreement: ICC, split-half reliability, noise ceiling.",
    )
    command.add_argument("raters", help="PercePiano's folder, or a rater CSV")
    command.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="output directory of icc.csv, split_half.csv, ceiling.csv",
    )
    command.add_argument(
        "--index", default="", metavar="FILE", help="CSV index of clips (default: PercePiano's)"
    )
    command.add_argument(
        "--splits",
        type=int,
        default=500,
        metavar="N",
        help="random splits of the raters (default: 500)",
    )
    command.add_argument("--seed", type=int, default=0, help="seed of the splits (default: 0)")
    _add_listen(add)


def _add_baseline(add):
    text = (
        "Baselines without a learned audio encoder, fold by fold; writes out-of-fold predictions."
        " Models named +score are "
    )
    text += "score-informed; clips that do not match their score are listed in without_score.csv."
    command = add("baseline", _baseline, text)
    command.add_argument(
        "--percepiano", required=True, metavar="FOLDER", help="PercePiano's folder, or demo"
    )
    command.add_argument(
        "--out", required=True, metavar="DIR", help="output directory of predictions and features"
    )
    command.add_argument(
        "--protocol",
        nargs="+",
        default=[],
        metavar="P",
        help="protocols of the index (default: all)",
    )
    names = "baselines, such as audio-stats or midi-stats+score (default: all)"
    command.add_argument("--baselines", nargs="+", default=[], metavar="NAME", help=names)
    command.add_argument(
        "--synthesizers",
        nargs="+",
        default=["musescore-small"],
        help="synthesizers of the audio (default: musescore-small)",
    )
    command.add_argument(
        "--seed", type=int, default=0, help="seed of trees and networks (default: 0)"
    )
    command.add_argument(
        "--workers",
        type=int,
        default=0,
        help="feature extraction processes (default: one per core)",
    )


def _add_listen(add):
    command = add(
        "listen",
        _listen,
        "Sensitivity test: rate real performances before and after one change each.",
    )
    command.add_argument(
        "--percepiano", required=True, metavar="FOLDER", help="PercePiano's folder, or demo"
    )
    models = (
        "audio-stats and midi-stats (fitted here), packaged (the bundled model), a model file,"
        " directories of fine-tuned "
    )
    models += "runs, or module:attribute of a rating function"
    command.add_argument("--model", nargs="+", required=True, metavar="MODEL", help=models)
    command.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="output directory of tables, figures, summary and renderings",
    )
    command.add_argument(
        "--clips",
        type=int,
        default=100,
        metavar="N",
        help="number of performances to draw (default: 100)",
    )
    command.add_argument(
        "--synthesizer", default="", help="synthesizer of the test (default: musescore-small)"
    )
    command.add_argument(
        "--other-synthesizers",
        nargs="*",
        metavar="NAME",
        help="further synthesizers for the robustness test (default: all)",
    )
    command.add_argument(
        "--seed", type=int, default=0, help="seed of clips, noise and rooms (default: 0)"
    )
    command.add_argument(
        "--workers", type=int, default=0, help="rendering processes (default: one per core)"
    )
