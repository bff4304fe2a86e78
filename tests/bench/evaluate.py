"""All tables of an evaluation of PercePiano's size: six models, 1,202 clips, 2,000 permutations."""

from collections.abc import Iterator

import numpy as np
import pandas as pd

from bench import medians, result
from percepiano_ast.dimensions import KEYS
from percepiano_ast.evaluation import EvaluationOptions, evaluate, reliability
from percepiano_ast.evaluation.predictions import load_index

MODELS, PERMUTATIONS = 6, 2000


def evaluation() -> Iterator[dict]:
    """Seconds from predictions to all tables, for random ratings and predictions on PercePiano's
    index; the models have an uncertainty, so that all parts of the evaluation run."""
    index, rng = load_index(), np.random.default_rng(0)
    rating = rng.uniform(size=(len(index), len(KEYS)))
    rows = {
        "protocol": "content",
        "fold": np.repeat(index["fold_content"].to_numpy(), len(KEYS)),
        "clip": np.repeat(index["clip"].to_numpy(), len(KEYS)),
        "dimension": list(KEYS) * len(index),
        "rating": rating.ravel(),
        "seed": 0,
        "uncertainty": 0.2,
    }
    tables = []
    for model in range(MODELS):
        prediction = (rating + rng.normal(0, 0.2, rating.shape)).ravel()
        tables.append(pd.DataFrame(rows | {"model": f"model-{model}", "prediction": prediction}))
    predictions = pd.concat(tables, ignore_index=True)
    ceiling, settings = (
        reliability.load_ceiling(index),
        EvaluationOptions(n_permutations=PERMUTATIONS),
    )
    (seconds,) = medians(lambda: evaluate(predictions, index, settings, ceiling), runs=3)
    sizes = {"clips": len(index), "dimensions": len(KEYS), "models": MODELS}
    yield result("evaluate", round(seconds, 1), "s", **sizes, permutations=PERMUTATIONS)
