"""How good are the ratings: tables in, tables out. No model and no audio is touched here.

``evaluate`` turns a predictions table, ours or a stranger's, into every table of results. The rooms: ``table`` (what is
read and refused), ``metrics`` (two arrays -> numbers), ``scores`` (runs -> metrics with intervals), ``intervals``,
``significance`` and ``seeds`` (comparisons), ``summary`` (a row a model), ``contrasts``, ``calibration``, ``others`` (what
is published), and ``reliability`` (of the raters).
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from percepiano_ast.config import InputError
from percepiano_ast.evaluation import calibration, contrasts, errors, scores, seeds, significance, summary
from percepiano_ast.evaluation.table import FEWEST_IN_SEGMENT, Run, describe, runs


@dataclass(frozen=True)
class Settings:
    """What an evaluation may choose; the seed is the one source of its random choices."""

    n_permutations: int = 2000
    seed: int = 0
    min_difference: float = contrasts.MIN_DIFFERENCE

    def __post_init__(self):
        if self.n_permutations < 1:
            raise InputError(f"{self.n_permutations} permutations test nothing; give at least 1, better 1,000.")


def evaluate(
    predictions: pd.DataFrame, index: pd.DataFrame, settings: Settings = Settings(), ceiling: pd.DataFrame | None = None
) -> dict[str, pd.DataFrame]:
    """Every table of results, by name; each is a CSV of the report.

    ``metrics`` and ``head_groups`` (``scores.evaluate``), ``folds`` (``scores.per_fold``), ``comparisons``
    (``significance.compare``), ``seeds`` and ``seed_comparisons`` (``seeds``), ``deadpan``, ``pairwise`` and, with a
    noise ceiling, ``ceiling_share`` (``contrasts``), ``calibration`` (``calibration.evaluate``), ``errors``,
    ``errors_by_kind`` and ``shared_errors`` (``errors``). A table without rows says that nothing in the predictions asks for
    it: one model, one seed, no uncertainty. ``summary`` and ``differences`` (``summary``) hold a row a model or pair, whatever
    the number of seeds.

    Raises:
        InputError: see ``table.validate_predictions``; coverage is not asked for here.
    """
    found = runs(predictions, index)
    values = scores.evaluate(found)
    in_group = values["dimension"].isin(scores.GROUPS)
    tables = {
        "metrics": values[~in_group].reset_index(drop=True),
        "head_groups": values[in_group].reset_index(drop=True),
        "folds": scores.per_fold(found),
        "comparisons": significance.compare(found, n_permutations=settings.n_permutations, seed=settings.seed),
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
    """What a reader must know about these predictions before trusting a figure, a sentence each.

    Runs of one fold, segments too small to tell playing apart, predictions that do not vary; ``values`` is the table
    ``metrics``.
    """
    said: dict[str, list[str]] = {}
    for run in runs(predictions, index):
        lines = _small_segments(run)
        if len(folds := np.unique(run.fold)) == 1:
            lines.append(f"fold {folds[0]} alone, {len(run.clip)} clips: these figures do not compare with those of whole runs.")
        for line in lines:
            said.setdefault(line, []).append(describe(run.name))
    lines = [f"{names[0]}{f' and {len(names) - 1} more' * (len(names) > 1)}: {line}" for line, names in said.items()]
    return lines + scores.undefined(values)


def _small_segments(run: Run) -> list[str]:
    """A sentence for each within-segment scope that leaves segments out."""
    lines = []
    for scope, part in (("within_segment", run), ("within_segment_humans", run.take(run.human))):
        names, sizes = np.unique(part.segment, return_counts=True)
        small = names[sizes < FEWEST_IN_SEGMENT]
        if len(small):
            lines.append(
                f"{len(small)} segments have fewer than {FEWEST_IN_SEGMENT} clips and are left out of {scope}, "
                f"{small[0]!r} for one."
            )
    return lines
