"""Commands for evaluation: evaluate, baseline, reliability, listen."""

from pathlib import Path


def _evaluate(arguments):
    from percepiano_ast.evaluation import EvaluationOptions
    from percepiano_ast.studies import report

    given = {"n_permutations": arguments.permutations, "seed": arguments.seed}
    given |= {"min_difference": arguments.min_difference}
    made = report.evaluate_files(
        arguments.predictions,
        arguments.out,
        arguments.index or None,
        partial=arguments.partial,
        settings=EvaluationOptions(
            **{name: value for name, value in given.items() if value is not None}
        ),
        ceiling=arguments.ceiling or None,
        reference=arguments.reference,
    )
    print(made)


def _baseline(arguments):
    from percepiano_ast import pipeline
    from percepiano_ast.pipeline.baselines import BaselineOptions, run_baselines

    settings = BaselineOptions(
        tuple(arguments.protocol),
        tuple(arguments.baselines),
        tuple(arguments.synthesizers),
        arguments.seed,
        arguments.workers or pipeline.workers(),
    )
    print(run_baselines(arguments.percepiano, arguments.out, settings))


def _reliability(arguments):
    from percepiano_ast.data.percepiano import load_index
    from percepiano_ast.evaluation import predictions, reliability

    index = (
        predictions.load_index(arguments.index) if arguments.index else load_index(arguments.raters)
    )
    raters = reliability.read_raters(arguments.raters)
    tables = reliability.evaluate(raters, index, arguments.splits, arguments.seed)
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    for name, one in tables.items():
        one.to_csv(out / f"{name}.csv", float_format="%.4f", lineterminator="\n")
    print(f"{out}: {', '.join(f'{name}.csv' for name in tables)}")


def _listen(arguments):
    from percepiano_ast import pipeline
    from percepiano_ast.studies import sensitivity

    others = arguments.other_synthesizers
    options = sensitivity.SensitivityOptions(
        arguments.clips,
        arguments.synthesizer or sensitivity.SYNTHESIZER,
        None if others is None else tuple(others),
        arguments.seed,
        arguments.workers or pipeline.workers(),
    )
    run = sensitivity.run_sensitivity
    print(run(arguments.percepiano, arguments.out, arguments.model, options))


def add_commands(add) -> None:
    """Add the commands of this module to a parser by ``add(name, function, text)``."""
    must = {"required": True}
    folder = "PercePiano's folder, or demo"
    clips = "CSV index of clips (default: PercePiano's)"

    option = add("evaluate", _evaluate, "Evaluate predictions: metrics, comparisons and a report.")
    option("predictions", "predictions*.csv or .csv.gz", "PREDICTIONS", nargs="+")
    option("--out", "output directory of the report", "DIR", **must)
    option("--index", clips, "FILE")
    option("--partial", "allow predictions that do not cover the protocol", default=False)
    option("--permutations", "permutations per comparison (default: 2000)", "N", None, type=int)
    option("--seed", "seed of the permutations (default: 0)", default=None, type=int)
    text = "compare pairs of performances whose ratings, from 0 to 1, differ by at least D"
    option("--min-difference", f"{text} (default: 0.074, a standard error)", "D", None, type=float)
    text = "CSV of the noise ceiling from `reliability` (default: PercePiano's)"
    option("--ceiling", text, "FILE")
    text = "reference model of the comparison page"
    text += " (default: the best audio-only model that is not an encoder)"
    option("--reference", text, "MODEL")

    option = add(
        "baseline",
        _baseline,
        "Baselines without a learned audio encoder, fold by fold; writes out-of-fold predictions."
        " Models named +score are score-informed; clips that do not match their score are listed in"
        " without_score.csv.",
    )
    option("--percepiano", folder, "FOLDER", **must)
    option("--out", "output directory of predictions and features", "DIR", **must)
    option("--protocol", "protocols of the index (default: all)", "P", [])
    text = "baselines, such as audio-stats or midi-stats+score (default: all)"
    option("--baselines", text, "NAME", [])
    text = "synthesizers of the audio (default: musescore-small)"
    option("--synthesizers", text, default=["musescore-small"])
    option("--seed", "seed of trees and networks (default: 0)", default=0)
    option("--workers", "feature extraction processes (default: one per core)", default=0)

    text = "Inter-rater agreement: ICC, split-half reliability, noise ceiling."
    option = add("reliability", _reliability, text)
    option("raters", "PercePiano's folder, or a rater CSV")
    option("--out", "output directory of icc.csv, split_half.csv, ceiling.csv", "DIR", **must)
    option("--index", clips, "FILE")
    option("--splits", "random splits of the raters (default: 500)", "N", 500)
    option("--seed", "seed of the splits (default: 0)", default=0)

    text = "Sensitivity test: rate real performances before and after one change each."
    option = add("listen", _listen, text)
    option("--percepiano", folder, "FOLDER", **must)
    text = "audio-stats and midi-stats (fitted here), packaged (the bundled model), a model file,"
    text += " directories of fine-tuned runs, or module:attribute of a rating function"
    option("--model", text, "MODEL", nargs="+", **must)
    text = "output directory of tables, figures, summary and renderings"
    option("--out", text, "DIR", **must)
    option("--clips", "number of performances to draw (default: 100)", "N", 100)
    option("--synthesizer", "synthesizer of the test (default: musescore-small)")
    text = "further synthesizers for the robustness test (default: all)"
    option("--other-synthesizers", text, "NAME", None, nargs="*")
    option("--seed", "seed of clips, noise and rooms (default: 0)", default=0)
    option("--workers", "rendering processes (default: one per core)", default=0)
