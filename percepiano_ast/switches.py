"""Ablations of the rating heads: the same folds and embeddings, with one option changed at a time.

A study trains every variant on the cached embeddings of one frozen encoder with several seeds. It
compares the mean r of each variant with the reference by `evaluation.compare`, whose intervals
account for content groups and seeds. With PercePiano's 47 groups, differences below about 0.03 are
noise: another random choice of folds changes r by 0.01. To choose a preset's options, use
``inner``: the study then runs on an outer fold's training part only, split by the other folds, so
that the clips for testing the choice do not influence it.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from percepiano_ast.config import FinetuneConfig, lookup
from percepiano_ast.dimensions import KEYS
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation import compare, predictions
from percepiano_ast.files import echo
from percepiano_ast.training.finetune import Finetuning, fit_heads, steps_of_epoch

REFERENCE = "reference"
# Option, choice -> changes relative to the reference, which has the preset's heads, loss and
# pooling.
SWITCHES: dict[tuple[str, str], dict] = {
    ("heads", "joint"): {"head": "joint"},
    ("heads", "grouped"): {"head": "grouped"},
    ("cross-task attention", "on"): {"head": "attention"},
    ("pooling", "mean"): {"pooling": "mean"},
    ("pooling", "mean_std"): {"pooling": "mean_std"},
    ("normalisation", "none"): {"rating_scale": "none"},
    ("normalisation", "dimension"): {"rating_scale": "dimension"},
    ("normalisation", "group"): {"rating_scale": "group"},
    ("weighting", "uncertainty"): {"weighting": "uncertainty"},
    ("weighting", "dwa"): {"weighting": "dwa"},
    ("rater weights", "on"): {"weigh_by_raters": True},
    ("predicted uncertainty", "on"): {"predict_uncertainty": True},
}
# Variants that train the encoder: changes, and the variant to compare with. Augmentation applies to
# windows for training the encoder, so it is compared with the same strategy without augmentation.
TRAINED: dict[tuple[str, str], tuple[dict, str]] = {
    ("strategy", "last"): ({"strategy": "last"}, REFERENCE),
    ("strategy", "gradual"): ({"strategy": "gradual"}, REFERENCE),
    ("strategy", "full"): ({"strategy": "full"}, REFERENCE),
    ("strategy", "lora"): ({"strategy": "lora"}, REFERENCE),
    ("augmentation", "SpecAugment"): (
        {"strategy": "last", "mask_bands": 24, "mask_frames": 48},
        "strategy last",
    ),
    ("augmentation", "mixup"): ({"strategy": "last", "mixup": 0.4}, "strategy last"),
    ("augmentation", "gain"): ({"strategy": "last", "gain_db": 3.0}, "strategy last"),
}
NOISE = 0.03  # smallest relevant difference in mean r under ``content``, see the module's docstring
COLUMNS = [
    "switch",
    "choice",
    "r",
    "seed_sd",
    "against",
    "difference",
    "low",
    "high",
    "p",
    "verdict",
]


@dataclasses.dataclass(frozen=True, eq=False)
class Material:
    """Embeddings of whole renderings, and the other inputs of the cross-validation.

    Attributes:
        run: of the encoder of the embeddings; its ``config`` is the reference.
        embeddings: (n, 2 F' D).
        clip: (n,) names; ``ratings`` (n, 19).
        raters: (n,) number of raters of each clip, or None if unknown.
        index: of the clips, with content groups and folds.
    """

    run: Finetuning
    embeddings: np.ndarray
    clip: np.ndarray
    ratings: np.ndarray
    raters: np.ndarray | None
    index: pd.DataFrame

    @property
    def folds(self) -> dict[str, int]:
        """Fold of each clip that the protocol evaluates."""
        protocol = self.run.config.protocol
        column = predictions.fold_column(protocol)
        return dict(
            zip(*predictions.check_protocol(self.index, protocol)[["clip", column]].to_numpy().T)
        )


def variants(config: FinetuneConfig, raters_known: bool) -> dict[tuple[str, str], FinetuneConfig]:
    """The configurations to compare, the reference first, without duplicates and without options
    that need unknown raters."""
    found = {(REFERENCE, ""): config}
    for name, changes in SWITCHES.items():
        changed = dataclasses.replace(config, **changes)
        if changed not in found.values() and (raters_known or not changed.weigh_by_raters):
            found[name] = changed
    return found


def cross_validate(
    material: Material, config: FinetuneConfig, name: str, folds: dict[str, int]
) -> pd.DataFrame:
    """Out-of-fold predictions of one variant with one seed, one row per clip and dimension.

    Args:
        name: of the model in the table.
        folds: fold of each clip to predict; the heads for a fold are trained on the other folds.

    Raises:
        InputError: a strategy that trains the encoder, or rater weights without raters.
    """
    # One schedule for all folds, for the largest training part, so that they share compiled
    # functions.
    largest = len(folds) - min(np.unique(list(folds.values()), return_counts=True)[1])
    run = dataclasses.replace(
        material.run, config=config, total_steps=config.epochs * steps_of_epoch(config, largest)
    )
    member = np.array([folds.get(clip, -1) for clip in material.clip])
    rated = np.full((len(member), len(KEYS)), np.nan, np.float32)
    params = {"encoder": {}, "head": run.init_head(config.seed)}
    for number in sorted(set(folds.values())):
        train, test = (
            np.flatnonzero((member >= 0) & (member != number)),
            np.flatnonzero(member == number),
        )
        known, raters = material.ratings, material.raters
        kept, scaler = fit_heads(
            run, params, material.embeddings, train=train, ratings=known, raters=raters
        )
        rated[test] = run.rate(kept, scaler, material.embeddings[test])
    used = member >= 0
    return predictions.to_table(
        (name, config.protocol, config.seed),
        folds,
        material.clip[used],
        material.ratings[used],
        rated[used],
    )


def study(
    material: Material,
    *,
    seeds: tuple[int, ...] = (0, 1, 2),
    inner: int | None = None,
    log: Callable[[str], None] = echo,
) -> pd.DataFrame:
    """Predictions of all variants with all seeds, in one table.

    Args:
        seeds: at least two.
        inner: an outer fold to exclude completely, so that a choice based on this study can be
            tested on it.

    Raises:
        InputError: only one seed, or an unknown outer fold.
    """
    if len(seeds) < 2:
        raise InputError(
            f"{len(seeds)} seed gives no estimate of the variation between seeds; use at least 2"
        )
    folds = material.folds
    if inner is not None:
        lookup(dict.fromkeys(map(str, sorted(set(folds.values())))), str(inner), "outer fold")
        folds = {clip: number for clip, number in folds.items() if number != inner}
    tables = []
    for (switch, choice), config in variants(
        material.run.config, material.raters is not None
    ).items():
        for seed in seeds:
            name = f"{switch} {choice}".strip()
            tables.append(
                cross_validate(material, dataclasses.replace(config, seed=seed), name, folds)
            )
        log(f"{name}: {len(seeds)} seeds")
    return pd.concat(tables, ignore_index=True)


def results(predicted: pd.DataFrame, index: pd.DataFrame) -> pd.DataFrame:
    """The table of ablations with the columns ``COLUMNS``, one row per variant, the reference
    first.

    ``difference`` is the difference in mean r to the reference, or to the variant ``against`` given
    by `TRAINED`, with its 95 % interval and p. ``verdict`` is ``noise`` if the interval contains 0,
    and notes a difference below `NOISE`, whose sign may change with other folds of the same clips.
    Intervals account for content groups, and for seeds if there are several.
    """
    runs = predictions.runs(predicted, index)
    wanted = {"scope": "overall", "metric": "pearson", "dimension": "mean"}
    values = _only(compare.over_seeds(runs, ("pearson",), least=1), wanted).set_index("model")
    rows = [
        {
            "switch": REFERENCE,
            "choice": "",
            "r": values["value"][REFERENCE],
            "seed_sd": values["seed_sd"][REFERENCE],
        }
    ]
    for (switch, choice), against in _against().items():
        if (name := f"{switch} {choice}") not in values.index or against not in values.index:
            continue
        # Only this one comparison: the study needs no others.
        pair = [run for run in runs if run.model == name] + [
            run for run in runs if run.model == against
        ]
        found = _only(compare.compare_over_seeds(pair, ("pearson",), least=1), wanted).iloc[0]
        rows.append(
            {
                "switch": switch,
                "choice": choice,
                "r": values["value"][name],
                "seed_sd": values["seed_sd"][name],
            }
            | {
                "against": against,
                **{column: found[column] for column in ("difference", "low", "high", "p")},
            }
            | {"verdict": _verdict(found)}
        )
    return pd.DataFrame(rows, columns=COLUMNS)


def _against() -> dict[tuple[str, str], str]:
    """The variant that each variant is compared with."""
    return dict.fromkeys(SWITCHES, REFERENCE) | {
        name: against for name, (_, against) in TRAINED.items()
    }


def _verdict(found: pd.Series) -> str:
    if found["low"] <= 0 <= found["high"]:
        return "noise"
    direction = "better" if found["difference"] > 0 else "worse"
    return (
        direction if abs(found["difference"]) >= NOISE else f"{direction}, by less than {NOISE:g}"
    )


def _only(rows: pd.DataFrame, wanted: dict[str, str]) -> pd.DataFrame:
    return rows[np.logical_and.reduce([rows[name] == value for name, value in wanted.items()])]


def write(found: pd.DataFrame, predicted: pd.DataFrame, directory: Path, title: str) -> Path:
    """Write ``switches.csv``, ``switches.md`` and the predictions behind them; returns the path of
    the Markdown file."""
    directory.mkdir(parents=True, exist_ok=True)
    found.to_csv(directory / "switches.csv", index=False, float_format="%.4f")
    predictions.write(predicted, directory / "predictions_switches.csv.gz")
    lines = [
        f"# {title}",
        "",
        (
            "Mean Pearson r over the 19 dimensions, out of fold, averaged over seeds. Differences"
            " have 95 % intervals over"
        ),
        (
            "content groups, and over seeds if there are several. A difference is noise if its"
            " interval contains 0. The sign"
        ),
        f"of a difference below {NOISE:g} may change with other folds.",
        f"Seeds: {', '.join(map(str, sorted(predicted['seed'].unique())))}.",
        "",
        "| option | choice | r | SD between seeds | against | difference | 95 % interval | p | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found.itertuples():
        cells = [
            row.switch,
            row.choice,
            f"{row.r:.3f}",
            "" if np.isnan(row.seed_sd) else f"{row.seed_sd:.3f}",
        ]
        interval = f"{row.low:+.3f} to {row.high:+.3f}"
        compared = [row.against, f"{row.difference:+.3f}", interval, f"{row.p:.3f}", row.verdict]
        cells += [""] * len(compared) if row.switch == REFERENCE else compared
        lines.append(f"| {' | '.join(cells)} |")
    path = directory / "switches.md"
    path.write_text("\n".join(lines) + "\n")
    return path
