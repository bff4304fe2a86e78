"""Tables for the report: one row per model, for any number of seeds.

A model trained with several seeds is summarised by their mean, with an interval that covers content
groups and seeds; a model with a single seed by its own values.
"""

import numpy as np
import pandas as pd

VALUES = [
    "model",
    "protocol",
    "scope",
    "metric",
    "dimension",
    "seeds",
    "value",
    "seed_sd",
    "low",
    "high",
]
DIFFERENCES = [
    "model_a",
    "model_b",
    "protocol",
    "scope",
    "metric",
    "dimension",
    "seeds",
    "difference",
    "low",
    "high",
    "p",
    "p_holm",
    "detectable",
]
_PAIR = ["model_a", "model_b", "protocol"]


def values(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """All metrics of all models: the columns ``VALUES``, from the tables of
    `evaluation.evaluate`."""
    single = pd.concat([tables["metrics"], tables["head_groups"]], ignore_index=True)
    several = tables["seeds"]
    trained_often = _names(several, ["model", "protocol"])
    alone = single[~_among(single, ["model", "protocol"], trained_often)].assign(
        seeds=1, seed_sd=np.nan
    )
    return _together([alone, several], VALUES)


def differences(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """All differences between two models: the columns ``DIFFERENCES``.

    ``seeds`` is the number of seeds of each, such as ``3 and 3``. If one of the models has a single
    seed, the two are compared at that seed by the permutation test of `significance`; if both have
    several, by the t test of `seeds`.
    """
    several = tables["seed_comparisons"].copy()
    several["seeds"] = [f"{a} and {b}" for a, b in zip(several["seeds_a"], several["seeds_b"])]
    single = tables["comparisons"]
    alone = single[~_among(single, _PAIR, _names(several, _PAIR))].assign(seeds="1 and 1")
    return _together([alone, several], DIFFERENCES)


def between(pairs: pd.DataFrame, model: str, reference: str) -> pd.DataFrame:
    """The rows of ``differences`` of two models, as ``model`` minus ``reference`` for either order
    in the table."""
    same = pairs[(pairs["model_a"] == model) & (pairs["model_b"] == reference)]
    other = pairs[(pairs["model_a"] == reference) & (pairs["model_b"] == model)]
    seeds = [" and ".join(reversed(text.split(" and "))) for text in other["seeds"]]
    turned = other.assign(
        model_a=model,
        model_b=reference,
        difference=-other["difference"],
        low=-other["high"],
        high=-other["low"],
        seeds=seeds,
    )
    return _together([same, turned], DIFFERENCES)


def _names(table: pd.DataFrame, columns: list[str]) -> set[tuple]:
    return set(table[columns].itertuples(index=False, name=None))


def _among(table: pd.DataFrame, columns: list[str], names: set[tuple]) -> np.ndarray:
    return np.array(
        [row in names for row in table[columns].itertuples(index=False, name=None)], bool
    )


def _together(parts: list[pd.DataFrame], columns: list[str]) -> pd.DataFrame:
    parts = [part[columns] for part in parts if len(part)]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)
