"""Decomposition of the squared error: rater noise, passage, player and clip.

Squared errors of a run, in units of the ratings' variance, are decomposed by a two-way analysis of
variance without interaction (Searle, Casella and McCulloch 1992, chapter 4): the mean error of each
content group, then the additional error of each player, then the remainder. The noise of the mean
rating (1 - ceiling squared) is the irreducible part of the remainder.
"""

import numpy as np
import pandas as pd

from percepiano_ast.dimensions import KEYS
from percepiano_ast.evaluation.table import RUN, Run

PARTS = ("noise", "passage", "player", "clip")  # sum to ``all`` except for the overall bias


def evaluate(
    runs: list[Run], index: pd.DataFrame, ceiling: pd.DataFrame | None = None
) -> pd.DataFrame:
    """``model,protocol,seed,dimension,all,noise,passage,player,clip``: shares of the ratings'
    variance; and a row ``mean``.

    The parts are variance components, which removes the bias from small numbers of clips per player
    or passage. Without a ceiling, ``noise`` is 0 and its share is in ``clip``; without players in
    the index, ``player`` is 0 and its share in ``clip``.
    """
    player = index.set_index("clip")["player"].astype(str) if "player" in index else None
    noise = (
        1 - ceiling["overall"].to_numpy() ** 2
        if ceiling is not None and "overall" in ceiling
        else np.zeros(len(KEYS))
    )
    rows = []
    for run in runs:
        groups = [run.content_group] + ([] if player is None else [player.loc[run.clip].to_numpy()])
        found = _components(standardised(run), groups, noise)
        found = pd.DataFrame(found).assign(dimension=list(KEYS))
        mean = found[["all", *PARTS]].mean().to_frame().T.assign(dimension="mean")
        rows.append(
            pd.concat([found, mean], ignore_index=True).assign(
                **dict(zip(RUN, run.name, strict=True))
            )
        )
    return pd.concat(rows, ignore_index=True)[[*RUN, "dimension", "all", *PARTS]]


def shared(runs: list[Run]) -> pd.DataFrame:
    """``protocol,seed,model_a,model_b,correlation``: correlation of the errors of two runs on their
    common clips, mean over dimensions.

    Near 1, the two models make the same errors and do not complement each other.
    """
    rows = []
    for number, a in enumerate(runs):
        for b in runs[number + 1 :]:
            if a.name[1:] != b.name[1:]:
                continue
            _, ours, theirs = np.intersect1d(a.clip, b.clip, return_indices=True)
            x, y = (
                each - each.mean(axis=0)
                for each in (standardised(a)[ours], standardised(b)[theirs])
            )
            with np.errstate(invalid="ignore"):
                r = (x * y).sum(axis=0) / np.sqrt((x**2).sum(axis=0) * (y**2).sum(axis=0))
            rows.append([*a.name[1:], a.model, b.model, float(np.mean(r))])
    return pd.DataFrame(rows, columns=["protocol", "seed", "model_a", "model_b", "correlation"])


def by_kind(runs: list[Run], index: pd.DataFrame) -> pd.DataFrame:
    """``model,protocol,seed,kind,value,clips,error``: root mean squared error in standard
    deviations of the ratings, mean over dimensions, for each composition (if the index has them),
    for human performances and for deadpan renderings."""
    rows = []
    for run in runs:
        squared = (standardised(run) ** 2).mean(axis=1)
        kinds = {"played by": np.where(run.human, "people", "nobody (deadpan)")}
        if "composition" in index:
            kinds["composition"] = index.set_index("clip")["composition"].loc[run.clip].to_numpy()
        for kind, values in kinds.items():
            for value in sorted(set(values)):
                part = squared[values == value]
                rows.append([*run.name, kind, value, len(part), float(np.sqrt(part.mean()))])
    return pd.DataFrame(rows, columns=[*RUN, "kind", "value", "clips", "error"])


def standardised(run: Run) -> np.ndarray:
    """Errors in standard deviations of the ratings, (clips, 19)."""
    return (run.prediction - run.rating) / run.rating.std(axis=0)


def _components(
    error: np.ndarray, groups: list[np.ndarray], noise: np.ndarray
) -> dict[str, np.ndarray]:
    """Share of each part, (19,) each."""
    n, total = len(error), (error**2).mean(axis=0)
    rest, known = error - error.mean(axis=0), np.ones((n, 1))
    shares, degrees = [], []
    for labels in groups:
        more = np.column_stack([known, pd.get_dummies(labels).to_numpy(float)])
        left = error - more @ np.linalg.lstsq(more, error, rcond=None)[0]
        degrees.append(np.linalg.matrix_rank(more) - np.linalg.matrix_rank(known))
        shares.append(((rest**2).sum(axis=0) - (left**2).sum(axis=0)) / n)
        rest, known = left, more
    free = n - np.linalg.matrix_rank(known)
    each = (rest**2).sum(axis=0) / free if free else np.zeros(error.shape[1])
    # Negative estimates of a variance component are set to 0.
    found = [
        np.maximum(share - df * each / n, 0.0) for share, df in zip(shares, degrees, strict=True)
    ]
    passage, player = [*found, np.zeros_like(total)][:2]
    return {
        "all": total,
        "noise": noise,
        "passage": passage,
        "player": player,
        "clip": np.maximum(each - noise, 0.0),
    }
