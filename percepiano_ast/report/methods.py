"""The section "Methods": text for a paper, the command that repeats the evaluation, and the
versions."""

import hashlib
import platform
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import pandas as pd

import percepiano_ast
from percepiano_ast.dimensions import KEYS, PRIMARY
from percepiano_ast.evaluation import EvaluationOptions, compare, intervals
from percepiano_ast.evaluation.predictions import MIN_IN_SEGMENT, fold_column
from percepiano_ast.report.page import Page
from percepiano_ast.report.sections import Results
from percepiano_ast.report.wording import PROTOCOLS, in_order

LIBRARIES = ("numpy", "scipy", "pandas", "matplotlib")


def write(
    page: Page,
    results: Results,
    index: pd.DataFrame,
    settings: EvaluationOptions,
    command: str,
    files: dict[str, str],
) -> None:
    """The section "Methods".

    Args:
        command: that repeats the evaluation; empty if it was called from Python.
        files: name -> SHA-256 of the predictions files.
    """
    page.heading("Methods")
    for text in (
        _data(results, index),
        _models(results),
        _measures(),
        _inference(settings),
        _ceiling(results),
    ):
        page.text(text)
    if command:
        page.text("Command:")
        page.code(command)
    if files:
        rows = pd.DataFrame(
            {"SHA-256": [f"`{digest[:16]}`" for digest in files.values()]}, list(files)
        )
        page.table(
            "files", "Evaluated predictions, with the first 16 digits of their checksums", rows
        )
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    page.text(
        f"Versions: percepiano_ast {percepiano_ast.__version__}, Python"
        f" {platform.python_version()}, {versions}."
    )


def _data(results: Results, index: pd.DataFrame) -> str:
    clips = index[index["clip"].isin(results.predictions["clip"])]
    people = int(clips["human"].sum())
    protocols = []
    for protocol in in_order(results.predictions["protocol"]):
        folds = index[fold_column(protocol)]
        words = PROTOCOLS.get(protocol, "defined by the index").replace("**", "")
        protocols.append(f"Protocol `{protocol}` ({folds[folds >= 0].nunique()} folds): {words}.")
    names = "; ".join(
        f"{name}: {', '.join(f'`{key}`' for key in keys)}" for name, keys in PRIMARY.items()
    )
    return f"""
        **Data.** {len(clips):,} clips ({people:,} human performances and {len(clips) - people:,} deadpan renderings of the
        score) of {clips["segment"].nunique()} segments in {clips["content_group"].nunique()} content groups (segments that share
        music), each with mean ratings from 0 to 1 on {len(KEYS)} dimensions. {"The ratings are simulated." * results.simulated}
        {" ".join(protocols)} Primary dimensions: {names}. PercePiano does not rate musical expression; two of its
        dimensions represent it."""


def _models(results: Results) -> str:
    seeds = results.predictions.groupby("model")["seed"].nunique()
    names = ", ".join(f"`{model}` ({n} seed{'s' * (n > 1)})" for model, n in seeds.items())
    return f"""
        **Models.** {names}. Every clip is predicted once, by a model that was not trained on its fold; the held-out folds of a
        run are pooled before metrics are computed."""


def _measures() -> str:
    return f"""
        **Metrics.** Pearson's r, Spearman's rho, R2 relative to the mean of the ratings, mean absolute error (unit of the
        ratings) and Lin's concordance correlation, per dimension; `mean` is the plain mean over the 19 dimensions. Scopes: all
        clips; human performances only; within segment, where ratings and predictions are centred on the mean of their segment
        and pooled, over segments of at least {MIN_IN_SEGMENT} clips; and within segment for human performances only. The
        correlation of a constant is reported as undefined, never as zero."""


def _inference(settings: EvaluationOptions) -> str:
    return f"""
        **Inference.** {100 * intervals.LEVEL:.0f} % intervals are from the jackknife over content groups with Satterthwaite's
        degrees of freedom, for correlations on Fisher's z scale. In simulations with PercePiano's group sizes their coverage was
        95.0 to 95.7 % (Pearson's r), 93.0 to 94.4 % (mean absolute error) and 95.0 to 96.3 % (R2); that of a percentile bootstrap
        over groups was 90.0 to 92.8 %. Models are compared on their common clips by a studentised permutation test that exchanges
        entire content groups ({settings.n_permutations:,} exchanges, seed {settings.seed}), with Holm's correction over the 19
        dimensions. In simulations its level was 4.9 to 5.4 % for equally clustered errors and up to 8.1 % otherwise: a p near
        0.05 between very different models is weak evidence. Models with several seeds are compared by a t test whose error
        includes content groups and seeds. The minimum detectable difference is for {100 * compare.POWER:.0f} % power. Pairs
        of performances are compared if their ratings differ by at least {settings.min_difference:.3f}."""


def _ceiling(results: Results) -> str:
    if results.ceiling is None:
        return "**Noise ceiling.** Unknown for these ratings."
    return f"""
        **Noise ceiling.** Square root of the split-half reliability of the mean rating, Spearman-Brown corrected: the raters of a
        clip are split at random into two halves (mean over the dimensions, overall: {results.ceiling["overall"].mean():.2f})."""


def command_of(files: Sequence[str | Path], options: list[str]) -> str:
    """The command line that evaluates these files."""
    return shlex.join(["python", "-m", "percepiano_ast", "evaluate", *map(str, files), *options])


def checksums(files: Sequence[str | Path]) -> dict[str, str]:
    """SHA-256 of files by name."""
    return {Path(file).name: hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files}
