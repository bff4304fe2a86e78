"""One row a model, whatever the number of its seeds: what a reader of results is shown.

A model trained with several seeds is shown as their mean, with an interval that allows for content groups and seeds; one
with a single seed as it is.
"""

import numpy as np
import pandas as pd

VALUES = ["model", "protocol", "scope", "metric", "dimension", "seeds", "value", "seed_sd", "low", "high"]
DIFFERENCES = ["model_a", "model_b", "protocol", "scope", "metric", "dimension", "seeds", "difference", "low", "high", "p",
               "p_holm", "detectable"]  # fmt: skip
_PAIR = ["model_a", "model_b", "protocol"]


def values(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Every metric of every model: the columns ``VALUES``, out of the tables of `evaluation.evaluate`."""
    single = pd.concat([tables["metrics"], tables["head_groups"]], ignore_index=True)
    several = tables["seeds"]
    trained_often = _names(several, ["model", "protocol"])
    alone = single[~_among(single, ["model", "protocol"], trained_often)].assign(seeds=1, seed_sd=np.nan)
    return _together([alone, several], VALUES)


def differences(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Every difference between two models: the columns ``DIFFERENCES``.

    ``seeds`` says how many of each, as ``3 and 3``. Where one of two models has a single seed, they are compared at it, by
    the permutation test of `significance`; where both have several, by the t test of `seeds`.
    """
    several = tables["seed_comparisons"].copy()
    several["seeds"] = [f"{a} and {b}" for a, b in zip(several["seeds_a"], several["seeds_b"])]
    single = tables["comparisons"]
    alone = single[~_among(single, _PAIR, _names(several, _PAIR))].assign(seeds="1 and 1")
    return _together([alone, several], DIFFERENCES)


def between(pairs: pd.DataFrame, model: str, reference: str) -> pd.DataFrame:
    """The rows of ``differences`` of two models, as ``model`` minus ``reference`` whichever way round they stand."""
    same = pairs[(pairs["model_a"] == model) & (pairs["model_b"] == reference)]
    other = pairs[(pairs["model_a"] == reference) & (pairs["model_b"] == model)]
    seeds = [" and ".join(reversed(text.split(" and "))) for text in other["seeds"]]
    turned = other.assign(model_a=model, model_b=reference, difference=-other["difference"], low=-other["high"],
                          high=-other["low"], seeds=seeds)  # fmt: skip
    return _together([same, turned], DIFFERENCES)


def _names(table: pd.DataFrame, columns: list[str]) -> set[tuple]:
    return set(table[columns].itertuples(index=False, name=None))


def _among(table: pd.DataFrame, columns: list[str], names: set[tuple]) -> np.ndarray:
    return np.array([row in names for row in table[columns].itertuples(index=False, name=None)], bool)


def _together(parts: list[pd.DataFrame], columns: list[str]) -> pd.DataFrame:
    parts = [part[columns] for part in parts if len(part)]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)
