"""Small indexes and predictions tables that the tests of the evaluation share."""

import numpy as np
import pandas as pd

from percepiano_ast.dimensions import KEYS
from percepiano_ast.evaluation import metrics
from percepiano_ast.evaluation.predictions import fold_column, runs


def make_index(n_groups=12, players=6):
    """A small index: two segments a group; the last player of each segment is a deadpan
    rendering."""
    rows = [
        {
            "clip": f"g{g:02d}s{s}p{p}",
            "segment": f"g{g:02d}s{s}",
            "content_group": f"g{g:02d}",
            "human": p < players - 1,
            "fold_content": g % 4,
            "fold_random": (g + p) % 4,
            "upstream_piece": g % 4 - 1,
        }
        for g in range(n_groups)
        for s in range(2)
        for p in range(players)
    ]
    return pd.DataFrame(rows)


def make_predictions(index, noise, protocol="content", seed=0, rng=0):
    """One run per entry of ``noise`` (model -> noise of its predictions), on the same ratings."""
    draw = np.random.default_rng(rng)
    music = draw.normal(size=(index["segment"].nunique(), len(KEYS)))[
        pd.factorize(index["segment"])[0]
    ]
    playing = draw.normal(size=music.shape) - 1.0 * (~index["human"].to_numpy())[:, None]
    rating = np.clip(0.5 + 0.08 * music + 0.08 * playing, 0, 1)
    tables = []
    for model, scale in noise.items():
        prediction = rating + scale * draw.normal(size=rating.shape)
        rows = pd.DataFrame(
            {
                "model": model,
                "protocol": protocol,
                "seed": seed,
                "fold": np.repeat(index[fold_column(protocol)], len(KEYS)),
                "clip": np.repeat(index["clip"], len(KEYS)),
                "dimension": list(KEYS) * len(index),
                "rating": rating.ravel(),
                "prediction": prediction.ravel(),
            }
        )
        tables.append(rows[rows["fold"] >= 0])
    return pd.concat(tables, ignore_index=True)


def scored(predictions, index):
    """``metrics.metric_table`` of a predictions table."""
    return metrics.metric_table(runs(predictions, index))


def value(values, metric, scope="overall", dimension=KEYS[0], column="value", model="mlp"):
    """One cell of ``metrics.metric_table``."""
    rows = values[
        (values["model"] == model) & (values["metric"] == metric) & (values["scope"] == scope)
    ]
    return rows.set_index("dimension").loc[dimension, column]


def pair(predictions, dimension=KEYS[0], model="mlp"):
    """Ratings and predictions of one model and dimension."""
    rows = predictions[(predictions["model"] == model) & (predictions["dimension"] == dimension)]
    return rows["rating"].to_numpy(), rows["prediction"].to_numpy()
