"""The predictions table: how any model's ratings of held-out clips are written, so that evaluation never touches a model."""

import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from percepiano_ast.config import InputError
from percepiano_ast.dimensions import KEYS
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
        fold: of each clip that the protocol evaluates; other clips are left out.
        clips: name of the clip of each rendering, (n,).
        ratings, rated: (n, K) in the order of ``dimensions``: what people and the model say.
        uncertainty: (n, K) standard deviations, which become a column of their own. Those of a clip's renderings are
            averaged as they are: their errors are one error, not independent ones.
    """
    predicted = pd.DataFrame(rated, columns=dimensions).groupby(clips).mean()
    truth = pd.DataFrame(ratings, columns=dimensions).groupby(clips).first()
    table = truth.stack().rename("rating").to_frame().join(predicted.stack().rename("prediction"))
    columns = COLUMNS
    if uncertainty is not None:
        deviations = pd.DataFrame(uncertainty, columns=dimensions).groupby(clips).mean()
        table, columns = table.join(deviations.stack().rename("uncertainty")), [*COLUMNS, "uncertainty"]
    table = table.rename_axis(["clip", "dimension"]).reset_index()
    table = table[table["clip"].isin(fold)].sort_values("clip", kind="stable")
    table["fold"] = table["clip"].map(fold)
    model, protocol, seed = run
    return table.assign(model=model, protocol=protocol, seed=seed)[columns].reset_index(drop=True)


def ensemble(table: pd.DataFrame, word: str) -> pd.DataFrame:
    """The mean of a model's seeds, as a model of its own: of every model in ``table`` that has several, under each protocol.

    Args:
        table: in ``COLUMNS``.
        word: part of the models' names behind which ``-ensemble`` is set; the seed is the lowest of them.

    Raises:
        InputError: seeds of a model that did not rate the same clips.
    """
    kept = [table.iloc[:0][COLUMNS]]
    for (model, protocol), part in table.groupby(["model", "protocol"]):
        if (seeds := part["seed"].nunique()) < 2:
            continue
        one = part.groupby(["fold", "clip", "dimension"], as_index=False).agg(
            rating=("rating", "first"), prediction=("prediction", "mean"), count=("seed", "nunique")
        )
        if len(short := one[one["count"] < seeds]):
            raise InputError(f"{model}, {protocol}: {short['clip'].iloc[0]} is not rated by all of its {seeds} seeds; "
                             "finish the seed that lacks it, or leave that seed out.")  # fmt: skip
        name = model.replace(word, f"{word}-ensemble")
        kept.append(one.assign(model=name, protocol=protocol, seed=part["seed"].min())[COLUMNS])
    return pd.concat(kept, ignore_index=True)


def write(table: pd.DataFrame, path: Path) -> None:
    """Write a predictions table whole or not at all; gzipped, without time stamp, where the name ends with ``.gz``."""
    content = table.to_csv(index=False, float_format="%.6f", lineterminator="\n").encode()
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    partial.replace(path)
