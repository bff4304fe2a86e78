"""Evaluate predictions files and write the report folder: the command ``evaluate``."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from percepiano_ast.errors import InputError
from percepiano_ast.evaluation import EvaluationOptions, evaluate, reliability, remarks
from percepiano_ast.evaluation.predictions import (
    RUN,
    fold_column,
    load_index,
    read_predictions,
    validate_predictions,
)
from percepiano_ast.report import comparison, errors, methods
from percepiano_ast.report.page import Page
from percepiano_ast.report.sections import Results, protocol_section
from percepiano_ast.report.wording import PROTOCOLS, headlines, in_order

# With fewer groups the intervals themselves are uncertain.
FEW_GROUPS = 20


def evaluate_files(
    paths: Sequence[str | Path],
    out: str | Path,
    index: str | Path | None = None,
    partial: bool = False,
    simulated: bool = False,
    settings: EvaluationOptions = EvaluationOptions(),
    ceiling: str | Path | None = None,
    reference: str = "",
) -> Path:
    """Evaluate predictions files together and write the report: the command ``evaluate``.

    Without ``index`` the clips must be PercePiano's with the published ratings.

    Args:
        reference: reference model of the comparison page, see `comparison.reference_of`.

    Raises:
        InputError: see ``predictions.read_predictions``, ``predictions.load_index``,
            ``predictions.validate_predictions`` and ``reliability.load_ceiling``; an unknown reference.
    """
    if not paths:
        raise InputError("no predictions to evaluate; give at least one predictions CSV.")
    rows = pd.concat([read_predictions(path) for path in paths], ignore_index=True)
    facts = load_index(index)
    rows = validate_predictions(rows, None if index is None else facts, partial=partial)
    known = None if simulated and ceiling is None else reliability.load_ceiling(facts, ceiling)
    options = ["--out", str(out)]
    for name, value in (("index", index), ("ceiling", ceiling), ("reference", reference)):
        options += [f"--{name}", str(value)] if value else []
    standard = EvaluationOptions()
    for name, flag in (
        ("n_permutations", "permutations"),
        ("seed", "seed"),
        ("min_difference", "min-difference"),
    ):
        value = getattr(settings, name)
        options += [f"--{flag}", str(value)] if value != getattr(standard, name) else []
    command = methods.command_of(paths, options + ["--partial"] * partial)
    return write(
        rows,
        facts,
        out,
        simulated=simulated,
        settings=settings,
        ceiling=known,
        reference=reference,
        command=command,
        files=methods.checksums(paths),
    )


def write(
    predictions: pd.DataFrame,
    index: pd.DataFrame,
    out_dir: str | Path,
    *,
    simulated: bool = False,
    settings: EvaluationOptions = EvaluationOptions(),
    ceiling: pd.DataFrame | None = None,
    reference: str = "",
    command: str = "",
    files: dict[str, str] | None = None,
    title: str = "Evaluation of predicted performance ratings",
) -> Path:
    """Evaluate and write report, comparison page, figures and tables into ``out_dir``.

    Files of these names from an earlier report are overwritten; other files in ``out_dir`` are not
    changed.

    Args:
        simulated: whether the ratings are simulated; title, captions and figures are marked.
        ceiling: the noise ceiling (19 dimensions, scopes), None if unknown.
        reference: see `comparison.reference_of`.
        command, files: see `methods.write`.

    Returns:
        The path of report.html, which embeds its figures.

    Raises:
        InputError: see ``predictions.validate_predictions`` (runs may be partial); ``out_dir`` is a file;
            an unknown reference.
    """
    out = Path(out_dir)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a directory for the report.")
    predictions = validate_predictions(predictions, index, partial=True)
    if reference:
        comparison.reference_of(sorted(predictions["model"].unique()), reference)
    results = Results(
        evaluate(predictions, index, settings, ceiling), predictions, ceiling, simulated
    )
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in results.tables.items():
        rows.to_csv(out / f"{name}.csv", index=False, float_format="%.6f", lineterminator="\n")
    mark = " (simulated ratings)" * simulated
    beside = Page(out, f"Comparison of models{mark}")
    comparison.write(beside, results, reference)
    beside.write("comparison")
    page = Page(out, title + mark)
    _summary(page, results, index)
    for number, protocol in enumerate(in_order(predictions["protocol"])):
        protocol_section(page, results, protocol, whole=number == 0)
        if number == 0:
            errors.write(page, results, protocol)
    methods.write(page, results, index, settings, command, files or {})
    return page.write("report")


def _summary(page: Page, results: Results, index: pd.DataFrame) -> None:
    """Headlines, notes on the numbers, and warnings."""
    predictions, tables = results.predictions, results.tables
    names = in_order(predictions["protocol"])
    if results.simulated:
        page.text(
            "**The ratings are simulated**: the results show that the pipeline works, not how well"
            " models rate real performances."
        )
    page.heading("Summary")
    page.list(
        [
            line
            for name in names
            for line in headlines(tables["summary"], tables["differences"], name)
        ]
    )
    page.text(
        "Comparison of all models, with published results: [comparison.html](comparison.html)."
    )
    page.heading("Notes")
    groups = index[index["clip"].isin(predictions["clip"])]["content_group"].nunique()
    notes = [
        *(f"Protocol `{name}`: {PROTOCOLS.get(name, 'defined by the index')}." for name in names),
        (
            "Intervals are 95 % over content groups; p is two-sided and not corrected for the"
            " number of models. See Methods for procedures and their simulated coverage."
        ),
    ]
    if groups < FEW_GROUPS:
        notes.append(
            f"With only {groups} content group{'s' * (groups != 1)}, intervals are uncertain or"
            " undefined: interpret differences with care."
        )
    if (tables["summary"]["seeds"] == 1).all():
        notes.append(
            "Single seed: the intervals do not include the variation between training runs."
        )
    if any(model.startswith("identity-") for model in predictions["model"]):
        notes.append(
            "`identity-segment` predicts each clip from the other clips of its segment: if those"
            " are in training, its r within segment is negative by construction and not meaningful."
        )
    page.list(notes + _incomplete(predictions, index))
    if warnings := remarks(predictions, index, tables["metrics"]):
        page.heading("Warnings")
        page.list(warnings)


def _incomplete(predictions: pd.DataFrame, index: pd.DataFrame) -> list[str]:
    """One sentence for each run that does not cover its protocol."""
    lines = []
    for (model, protocol, seed), clips in predictions.groupby(RUN)["clip"]:
        of = int((index[fold_column(protocol)] >= 0).sum())
        if (n := clips.nunique()) < of:
            lines.append(
                f"**Partial**: `{model}`, `{protocol}`, seed {seed} covers {n} of {of} held-out"
                " clips."
            )
    return lines
