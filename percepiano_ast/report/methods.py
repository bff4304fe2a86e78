"""How an evaluation was done: a paragraph that can go into a paper, the command that repeats it, and the versions."""

import hashlib
import platform
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import pandas as pd

import percepiano_ast
from percepiano_ast.dimensions import KEYS, PRIMARY
from percepiano_ast.evaluation import Settings, intervals, significance
from percepiano_ast.evaluation.table import FEWEST_IN_SEGMENT, fold_column
from percepiano_ast.report.page import Page
from percepiano_ast.report.sections import Results
from percepiano_ast.report.wording import PROTOCOLS, in_order

LIBRARIES = ("numpy", "scipy", "pandas", "matplotlib")


def write(page: Page, results: Results, index: pd.DataFrame, settings: Settings, command: str, files: dict[str, str]) -> None:
    """The section "Methods".

    Args:
        command: that repeats the evaluation, or nothing where a program made it.
        files: name -> SHA-256 of the predictions files.
    """
    page.heading("Methods")
    for text in (_data(results, index), _models(results), _measures(), _inference(settings), _ceiling(results)):
        page.text(text)
    if command:
        page.text("The command:")
        page.code(command)
    if files:
        rows = pd.DataFrame({"SHA-256": [f"`{digest[:16]}`" for digest in files.values()]}, list(files))
        page.table("files", "Predictions that were evaluated, with the first 16 digits of their checksums", rows)
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    page.text(f"Versions: percepiano_ast {percepiano_ast.__version__}, Python {platform.python_version()}, {versions}.")


def _data(results: Results, index: pd.DataFrame) -> str:
    clips = index[index["clip"].isin(results.predictions["clip"])]
    people = int(clips["human"].sum())
    protocols = []
    for protocol in in_order(results.predictions["protocol"]):
        folds = index[fold_column(protocol)]
        words = PROTOCOLS.get(protocol, "as the index says").replace("**", "")
        protocols.append(f"Protocol `{protocol}` ({folds[folds >= 0].nunique()} folds): {words}.")
    names = "; ".join(f"{name}: {', '.join(f'`{key}`' for key in keys)}" for name, keys in PRIMARY.items())
    return f"""
        **Data.** {len(clips):,} clips, {people:,} performances by people and {len(clips) - people:,} deadpan renderings of the
        score, of {clips["segment"].nunique()} segments in {clips["content_group"].nunique()} content groups (segments that share
        music), each with mean ratings from 0 to 1 on {len(KEYS)} dimensions. {"The ratings are simulated." * results.simulated}
        {" ".join(protocols)} Primary dimensions: {names}; musical expression is no column of PercePiano, two dimensions stand
        for it."""


def _models(results: Results) -> str:
    seeds = results.predictions.groupby("model")["seed"].nunique()
    names = ", ".join(f"`{model}` ({n} seed{'s' * (n > 1)})" for model, n in seeds.items())
    return f"""
        **Models.** {names}. Every clip is predicted once by a model that was not trained on its fold; the held-out folds of a run
        are pooled before a metric is taken."""


def _measures() -> str:
    return f"""
        **Metrics.** Pearson's r, Spearman's rho, R2 against the mean of the ratings, mean absolute error (unit of the ratings)
        and Lin's concordance, per dimension; `mean` is their plain mean over the 19. Scopes: all clips; people only; within
        segment, where ratings and predictions are centred on the mean of their segment and pooled, over segments of at least
        {FEWEST_IN_SEGMENT} clips; and both. What is constant has no correlation: it is reported as such, never as zero."""


def _inference(settings: Settings) -> str:
    return f"""
        **Inference.** {100 * intervals.LEVEL:.0f} % intervals come from the jackknife over content groups with Satterthwaite's
        degrees of freedom, for correlations on Fisher's scale; in simulations with the sizes of PercePiano's groups they held the
        true value in 95.0 to 95.7 % (Pearson's r), 93.0 to 94.4 % (mean absolute error) and 95.0 to 96.3 % (R2), a percentile
        bootstrap over groups in 90.0 to 92.8 %. Models are compared on the clips that both rate by a studentised permutation test
        that exchanges whole content groups ({settings.n_permutations:,} exchanges, seed {settings.seed}; its level in simulations
        is 4.9 to 5.4 % where errors are equally clustered, up to 8.1 % where they are not: a p near .05 between very different
        models is weak), corrected over the 19 dimensions after Holm. Models with several seeds are compared by a t test whose
        error allows for content groups and seeds. The smallest difference that is found in {100 * significance.POWER:.0f} % of
        such experiments stands beside each. Pairs of performances count where their ratings differ by at least
        {settings.min_difference:.3f}."""


def _ceiling(results: Results) -> str:
    if results.ceiling is None:
        return "**Noise ceiling.** Not known for these ratings."
    return f"""
        **Noise ceiling.** Square root of the split-half reliability of the mean rating, Spearman-Brown corrected: the raters of a
        clip are dealt at random into two halves (mean over the dimensions, overall: {results.ceiling["overall"].mean():.2f})."""


def command_of(files: Sequence[str | Path], options: list[str]) -> str:
    """The command line that evaluates these files."""
    return shlex.join(["python", "-m", "percepiano_ast", "evaluate", *map(str, files), *options])


def checksums(files: Sequence[str | Path]) -> dict[str, str]:
    """SHA-256 of files by name."""
    return {Path(file).name: hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files}
