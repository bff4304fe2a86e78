"""The predictions table: the format of all models' ratings of held-out clips, and the only input of
evaluation."""

import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from percepiano_ast.dimensions import KEYS
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation.table import COLUMNS


def tidy(
    run: tuple[str, str, int],
    fold: dict[str, int],
    clips: np.ndarray,
    ratings: np.ndarray,
    rated: np.ndarray,
    uncertainty: np.ndarray | None = None,
    dimensions: Sequence[str] = KEYS,
) -> pd.DataFrame:
    """One row per clip and dimension, in ``COLUMNS``; the renderings of a clip are averaged.

    Args:
        run: model, protocol and seed.
        fold: of each clip that the protocol evaluates; other clips are excluded.
        clips: clip name of each rendering, (n,).
        ratings, rated: (n, K) in the order of ``dimensions``: human ratings and predictions.
        uncertainty: (n, K) standard deviations, written as a further column. Those of a clip's
            renderings are averaged without shrinkage: their errors are not independent.
    """
    predicted = pd.DataFrame(rated, columns=dimensions).groupby(clips).mean()
    truth = pd.DataFrame(ratings, columns=dimensions).groupby(clips).first()
    table = truth.stack().rename("rating").to_frame().join(predicted.stack().rename("prediction"))
    columns = COLUMNS
    if uncertainty is not None:
        deviations = pd.DataFrame(uncertainty, columns=dimensions).groupby(clips).mean()
        table, columns = (
            table.join(deviations.stack().rename("uncertainty")),
            [*COLUMNS, "uncertainty"],
        )
    table = table.rename_axis(["clip", "dimension"]).reset_index()
    table = table[table["clip"].isin(fold)].sort_values("clip", kind="stable")
    table["fold"] = table["clip"].map(fold)
    model, protocol, seed = run
    return table.assign(model=model, protocol=protocol, seed=seed)[columns].reset_index(drop=True)


def ensemble(table: pd.DataFrame, word: str) -> pd.DataFrame:
    """The mean over seeds as a separate model, for every model in ``table`` with several seeds,
    under each protocol.

    Args:
        table: in ``COLUMNS``.
        word: part of the model names after which ``-ensemble`` is inserted; the lowest seed is used
            as seed.

    Raises:
        InputError: the seeds of a model rated different clips.
    """
    kept = [table.iloc[:0][COLUMNS]]
    for (model, protocol), part in table.groupby(["model", "protocol"]):
        if (seeds := part["seed"].nunique()) < 2:
            continue
        one = part.groupby(["fold", "clip", "dimension"], as_index=False).agg(
            rating=("rating", "first"), prediction=("prediction", "mean"), count=("seed", "nunique")
        )
        if len(short := one[one["count"] < seeds]):
            raise InputError(
                f"{model}, {protocol}: {short['clip'].iloc[0]} is not rated by all {seeds} seeds. "
                "Finish the missing seed, or exclude it."
            )
        name = model.replace(word, f"{word}-ensemble")
        kept.append(one.assign(model=name, protocol=protocol, seed=part["seed"].min())[COLUMNS])
    return pd.concat(kept, ignore_index=True)


def write(table: pd.DataFrame, path: Path) -> None:
    """Write a predictions table atomically; gzipped without timestamp if the name ends with
    ``.gz``."""
    content = table.to_csv(index=False, float_format="%.6f", lineterminator="\n").encode()
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    partial.replace(path)
