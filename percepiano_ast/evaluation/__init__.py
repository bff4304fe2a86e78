"""Evaluation of predicted ratings: tables in, tables out, without models or audio.

``evaluate`` turns any predictions table into every table of results. Modules: ``table`` (reading
and validation), ``metrics`` (two arrays -> numbers), ``scores`` (runs -> metrics with intervals),
``intervals``, ``significance`` and ``seeds`` (comparisons), ``summary`` (one row per model),
``contrasts``, ``calibration``, ``errors``, ``others`` (published results), ``own`` (custom
ratings), ``listening`` (sensitivity and robustness) and ``reliability`` (of the raters).
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from percepiano_ast.errors import InputError
from percepiano_ast.evaluation import (
    calibration,
    contrasts,
    errors,
    scores,
    seeds,
    significance,
    summary,
)
from percepiano_ast.evaluation.table import FEWEST_IN_SEGMENT, Run, describe, runs


@dataclass(frozen=True)
class Settings:
    """Options of an evaluation; ``seed`` determines all random choices."""

    n_permutations: int = 2000
    seed: int = 0
    min_difference: float = contrasts.MIN_DIFFERENCE

    def __post_init__(self):
        if self.n_permutations < 1:
            raise InputError(
                f"{self.n_permutations} permutations are too few; give at least 1, better 1,000."
            )


def evaluate(
    predictions: pd.DataFrame,
    index: pd.DataFrame,
    settings: Settings = Settings(),
    ceiling: pd.DataFrame | None = None,
) -> dict[str, pd.DataFrame]:
    """Every table of results by name; the report writes each as a CSV.

    ``metrics`` and ``head_groups`` (``scores.evaluate``), ``folds`` (``scores.per_fold``),
    ``comparisons`` (``significance.compare``), ``seeds`` and ``seed_comparisons`` (``seeds``),
    ``deadpan``, ``pairwise`` and, with a noise ceiling, ``ceiling_share`` (``contrasts``),
    ``calibration`` (``calibration.evaluate``), ``errors``, ``errors_by_kind`` and ``shared_errors``
    (``errors``). A table is empty where it does not apply: one model, one seed, no uncertainty.
    ``summary`` and ``differences`` (``summary``) have one row per model or pair, for any number of
    seeds.

    Raises:
        InputError: see ``table.validate_predictions``; runs may be partial.
    """
    found = runs(predictions, index)
    values = scores.evaluate(found)
    in_group = values["dimension"].isin(scores.GROUPS)
    tables = {
        "metrics": values[~in_group].reset_index(drop=True),
        "head_groups": values[in_group].reset_index(drop=True),
        "folds": scores.per_fold(found),
        "comparisons": significance.compare(
            found, n_permutations=settings.n_permutations, seed=settings.seed
        ),
        "seeds": seeds.evaluate(found),
        "seed_comparisons": seeds.compare(found),
        "deadpan": contrasts.deadpan(found),
        "pairwise": contrasts.pairwise(found, settings.min_difference),
        "calibration": calibration.evaluate(found),
        "errors": errors.evaluate(found, index, ceiling),
        "errors_by_kind": errors.by_kind(found, index),
        "shared_errors": errors.shared(found),
    }
    if ceiling is not None:
        tables["ceiling_share"] = contrasts.ceiling_share(found, ceiling)
    return tables | {"summary": summary.values(tables), "differences": summary.differences(tables)}


def remarks(predictions: pd.DataFrame, index: pd.DataFrame, values: pd.DataFrame) -> list[str]:
    """Caveats about these predictions, one sentence each.

    They concern runs of a single fold, segments too small for within-segment metrics, and constant
    predictions.

    Args:
        values: the table ``metrics``.
    """
    said: dict[str, list[str]] = {}
    for run in runs(predictions, index):
        lines = _small_segments(run)
        if len(folds := np.unique(run.fold)) == 1:
            lines.append(
                f"only fold {folds[0]} ({len(run.clip)} clips): not comparable with complete runs."
            )
        for line in lines:
            said.setdefault(line, []).append(describe(run.name))
    lines = [
        f"{names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)}: {line}"
        for line, names in said.items()
    ]
    return lines + scores.undefined(values)


def _small_segments(run: Run) -> list[str]:
    """One sentence for each within-segment scope that excludes segments."""
    lines = []
    for scope, part in (("within_segment", run), ("within_segment_humans", run.take(run.human))):
        names, sizes = np.unique(part.segment, return_counts=True)
        small = names[sizes < FEWEST_IN_SEGMENT]
        if len(small):
            lines.append(
                f"{len(small)} segments have fewer than {FEWEST_IN_SEGMENT} clips and are excluded"
                f" from {scope}, for example {small[0]!r}."
            )
    return lines
