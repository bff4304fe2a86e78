"""The predictions table: how any model's ratings of held-out clips are written, so that evaluation never touches a model."""

import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

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


def write(table: pd.DataFrame, path: Path) -> None:
    """Write a predictions table whole or not at all; gzipped, without time stamp, where the name ends with ``.gz``."""
    content = table.to_csv(index=False, float_format="%.6f", lineterminator="\n").encode()
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    partial.replace(path)
