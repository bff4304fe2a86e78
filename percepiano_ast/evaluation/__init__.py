"""Evaluation of predicted ratings: tables in, tables out, without models or audio."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from percepiano_ast.errors import InputError
from percepiano_ast.evaluation import analysis, compare, metrics
from percepiano_ast.evaluation.predictions import MIN_IN_SEGMENT, describe, runs


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of an evaluation; ``seed`` determines all random choices."""

    n_permutations: int = 2000
    seed: int = 0
    min_difference: float = analysis.MIN_DIFFERENCE

    def __post_init__(self):
        if self.n_permutations < 1:
            raise InputError(
                f"{self.n_permutations} permutations are too few; give at least 1, better 1,000."
            )


def evaluate(
    predictions: pd.DataFrame,
    index: pd.DataFrame,
    options: EvaluationOptions = EvaluationOptions(),
    ceiling: pd.DataFrame | None = None,
) -> dict[str, pd.DataFrame]:
    """Every table of results by name; the report writes each as a CSV.

    Runs may be partial. A table is empty where it does not apply (one model, one seed, no
    uncertainty); ``ceiling_share`` needs a noise ceiling. Raises as `validate_predictions`.
    """
    found = runs(predictions, index)
    values = metrics.metric_table(found)
    in_group = values["dimension"].isin(metrics.GROUPS)
    tables = {
        "metrics": values[~in_group].reset_index(drop=True),
        "head_groups": values[in_group].reset_index(drop=True),
        "folds": metrics.fold_table(found),
        "comparisons": compare.paired_tests(
            found, n_permutations=options.n_permutations, seed=options.seed
        ),
        "seeds": compare.over_seeds(found),
        "seed_comparisons": compare.compare_over_seeds(found),
        "deadpan": analysis.deadpan_gap(found),
        "pairwise": analysis.pairwise_accuracy(found, options.min_difference),
        "calibration": analysis.calibration(found),
        "errors": analysis.error_components(found, index, ceiling),
        "errors_by_kind": analysis.errors_by_kind(found, index),
        "shared_errors": analysis.shared_errors(found),
    }
    if ceiling is not None:
        tables["ceiling_share"] = analysis.ceiling_share(found, ceiling)
    return tables | {"summary": compare.summary(tables), "differences": compare.differences(tables)}


def remarks(predictions: pd.DataFrame, index: pd.DataFrame, values: pd.DataFrame) -> list[str]:
    """Caveats about these predictions, one sentence each: runs of a single fold, segments too small
    for within-segment metrics, and (from the table ``metrics``) constant predictions."""
    found: dict[str, list[str]] = {}
    for run in runs(predictions, index):
        lines = []
        for scope in ("within_segment", "within_segment_humans"):
            part = run.take(run.human) if "humans" in scope else run
            names, sizes = np.unique(part.segment, return_counts=True)
            if len(small := names[sizes < MIN_IN_SEGMENT]):
                lines.append(
                    f"{len(small)} segments have fewer than {MIN_IN_SEGMENT} clips and are excluded"
                    f" from {scope}, for example {small[0]!r}."
                )
        if len(folds := np.unique(run.fold)) == 1:
            lines.append(
                f"only fold {folds[0]} ({len(run.clip)} clips): not comparable with complete runs."
            )
        for line in lines:
            found.setdefault(line, []).append(describe(run.name))
    lines = [
        f"{names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)}: {line}"
        for line, names in found.items()
    ]
    return lines + metrics.undefined_metrics(values)
