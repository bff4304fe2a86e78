"""Ablations of fine-tuning on one encoder: options of the heads on its frozen embeddings, or
options that train the encoder. The folds are the same, and one option is changed at a time.

With PercePiano's 47 content groups, differences in mean r below about 0.03 are noise: another
random choice of folds changes r by 0.01. To choose a preset's options, use ``inner``.
"""

import dataclasses
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from percepiano_ast.config import FinetuneConfig, lookup
from percepiano_ast.data import percepiano
from percepiano_ast.dimensions import KEYS
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation import compare, predictions
from percepiano_ast.files import lock_config
from percepiano_ast.pipeline.run import Run, load_encoder
from percepiano_ast.pipeline.steps import CrossValidation, cross_validate, rated_clips_of
from percepiano_ast.training.finetune import fit_heads, steps_of_epoch

logger = logging.getLogger(__name__)

REFERENCE = "reference"
# Option, choice -> changes of the preset's heads, loss and pooling, which are the reference.
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
# Variants that train the encoder: changes, and the variant to compare with. Augmentations need a
# trained encoder, so they are compared with the same strategy without augmentation.
STRATEGIES: dict[tuple[str, str], tuple[dict, str]] = {
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
NOISE = 0.03  # smallest relevant difference in mean r under ``content``, see above
COLUMNS = ["switch", "choice", "r", "seed_sd"]
COLUMNS += ["against", "difference", "low", "high", "p", "verdict"]


# --- Heads on frozen embeddings -------------------------------------------------------------------


def ablate_heads(
    run: Run, init: str = "ssast", source: str = "", *, n_seeds: int = 3, inner: int | None = None
) -> Path:
    """Ablations of the rating heads on this encoder, frozen; see `write_ablations`.

    Args:
        init, source: see `load_encoder`.
        n_seeds: number of seeds, from 0, at least two.
        inner: an outer fold to exclude, so that a choice can be tested on it.

    Raises:
        InputError: only one seed, or an unknown outer fold.
    """
    frozen = dataclasses.replace(run.preset.finetune, strategy="frozen")
    rated, metadata = rated_clips_of(run, load_encoder(run, init, source), frozen)
    predicted = predict_variants(rated, n_seeds, inner)
    home, found = run.root / "switches" / rated.name, ablation_table(predicted, rated.index)
    title = f"Ablations of the rating heads on {rated.name}, frozen"
    return write_ablations(found, predicted, home, title + _simulated(metadata))


def variants(config: FinetuneConfig, raters_known: bool) -> dict[tuple[str, str], FinetuneConfig]:
    """The configurations to compare, the reference first, without duplicates."""
    found = {(REFERENCE, ""): config}
    for name, changes in SWITCHES.items():
        changed = dataclasses.replace(config, **changes)
        if changed not in found.values() and (raters_known or not changed.weigh_by_raters):
            found[name] = changed
    return found


def predict_variants(
    rated: CrossValidation, n_seeds: int = 3, inner: int | None = None
) -> pd.DataFrame:
    """Predictions of all variants of the configuration of ``rated``; see `ablate_heads`."""
    if n_seeds < 2:
        raise InputError(f"{n_seeds} seed: to compare variants, use at least 2")
    folds, tables = percepiano.fold_of_clip(rated.index, rated.config.protocol), []
    if inner is not None:
        lookup(dict.fromkeys(map(str, sorted(set(folds.values())))), str(inner), "outer fold")
        folds = {clip: number for clip, number in folds.items() if number != inner}
    for names, config in variants(rated.config, rated.raters is not None).items():
        name = " ".join(names).strip()
        for seed in range(n_seeds):
            config = dataclasses.replace(config, seed=seed)
            tables.append(cross_validate_heads(rated, config, name, folds))
        logger.info(f"{name}: {n_seeds} seeds")
    return pd.concat(tables, ignore_index=True)


def cross_validate_heads(
    rated: CrossValidation, config: FinetuneConfig, name: str, folds: dict[str, int]
) -> pd.DataFrame:
    """Out-of-fold predictions of one variant with one seed.

    Args:
        name: of the model in the table.
        folds: fold of each clip to predict.

    Raises:
        InputError: a strategy that trains the encoder, or rater weights without raters.
    """
    # One schedule for all folds, so that they share compiled functions.
    largest = len(folds) - min(np.unique(list(folds.values()), return_counts=True)[1])
    steps = config.epochs * steps_of_epoch(config, largest)
    run = dataclasses.replace(rated.trainer(1), config=config, total_steps=steps)
    clips, ratings, embeddings = rated.clips.clip, rated.clips.ratings, rated.embeddings
    member = np.array([folds.get(clip, -1) for clip in clips])
    predicted, used = np.full((len(member), len(KEYS)), np.nan, np.float32), member >= 0
    params = {"encoder": {}, "head": run.init_head(config.seed)}
    for number in sorted(set(folds.values())):
        train, test = np.flatnonzero(used & (member != number)), np.flatnonzero(member == number)
        fitted, scaler = fit_heads(
            run, params, embeddings, ratings=ratings, raters=rated.raters, train=train
        )
        predicted[test] = run.rate(fitted, scaler, embeddings[test])
    model = name, config.protocol, config.seed
    return predictions.to_table(model, folds, clips[used], ratings[used], predicted[used])


# --- Training of the encoder ----------------------------------------------------------------------


def ablate_training(
    run: Run, init: str = "ssast", source: str = "", *, only: Sequence[str] = (), n_seeds: int = 1
) -> Path:
    """Ablations of strategies that train the encoder, and of augmentations; see `write_ablations`.

    Resumes. Predictions are saved, models are not.

    Args:
        init, source: see `load_encoder`.
        only: choices in `STRATEGIES`, such as ``lora``; by default all. Their references are
            trained too.
        n_seeds: number of seeds, from 0.

    Raises:
        InputError: unknown choice; see `load_encoder`.
    """
    start = load_encoder(run, init, source)
    frozen = dataclasses.replace(run.preset.finetune, strategy="frozen")
    # Each variant comes after its reference.
    every = {" ".join(names): found for names, found in STRATEGIES.items()}
    by_choice = {choice: f"{switch} {choice}" for switch, choice in STRATEGIES}
    names = [lookup(by_choice, choice, "strategy or augmentation") for choice in only]
    wanted: dict[str, dict] = {REFERENCE: {}}
    for name in names or every:
        for needed in (every[name][1], name):
            wanted.setdefault(needed, every[needed][0] if needed in every else {})
    home, tables = run.root / "switches" / f"{start.name}-trained", []
    for name, changes in wanted.items():
        for seed in range(n_seeds):
            config = dataclasses.replace(frozen, **changes, seed=seed)
            here = home / name.replace(" ", "_") / f"seed_{seed}"
            rated, metadata = rated_clips_of(run, start, config)
            rated = dataclasses.replace(rated, run=dataclasses.replace(run, root=here, store=""))
            settings = {"finetune": dataclasses.asdict(config), "pretrained": start.weights}
            path = lock_config(here, settings) / "predictions.csv.gz"
            if path.exists():
                logger.info(f"{name}, seed {seed}: already done")
                tables.append(predictions.read_predictions(path))
                continue
            logger.info(f"{name}, seed {seed}")
            facts = {"data": metadata["licence"], "simulated": metadata["simulated"]}
            held_out = cross_validate(rated, {"init": init} | facts)
            seen = ~rated.unseen[held_out.which]
            tables.append(rated.table(name, held_out.which[seen], held_out.rated[seen]))
            predictions.write(tables[-1], path)
            shutil.rmtree(here / "finetune")
    predicted = pd.concat(tables, ignore_index=True)
    title = f"Strategies and augmentations on {rated.name}{_simulated(metadata)}"
    return write_ablations(ablation_table(predicted, rated.index), predicted, home, title)


# --- Comparison -----------------------------------------------------------------------------------


def _simulated(metadata: dict) -> str:
    return " (simulated ratings)" if metadata["simulated"] else ""


def ablation_table(predicted: pd.DataFrame, index: pd.DataFrame) -> pd.DataFrame:
    """The table of ablations, columns `COLUMNS`, one row per variant, the reference first.

    ``difference`` in mean r to the variant ``against``, with its 95 % interval and p, which account
    for content groups and seeds; ``verdict`` is ``noise`` if the interval contains 0.
    """

    def only(rows: pd.DataFrame) -> pd.DataFrame:
        wanted = {"scope": "overall", "metric": "pearson", "dimension": "mean"}
        return rows[(rows[list(wanted)] == list(wanted.values())).all(axis=1)]

    runs = predictions.runs(predicted, index)
    values = only(compare.over_seeds(runs, ("pearson",), least=1)).set_index("model")
    references = dict.fromkeys(((REFERENCE, ""), *SWITCHES), REFERENCE)
    references |= {names: against for names, (_, against) in STRATEGIES.items()}
    rows = []
    for (switch, choice), against in references.items():
        name = f"{switch} {choice}".strip()
        if name not in values.index or against not in values.index:
            continue
        r, spread = values.loc[name, ["value", "seed_sd"]]
        row = {"switch": switch, "choice": choice, "r": r, "seed_sd": spread}
        if name != REFERENCE:
            # Only this one comparison: the table needs no others.
            pair = [run for one in (name, against) for run in runs if run.model == one]
            found = only(compare.compare_over_seeds(pair, ("pearson",), least=1)).iloc[0]
            verdict = "better" if found["difference"] > 0 else "worse"
            if found["low"] <= 0 <= found["high"]:
                verdict = "noise"
            elif abs(found["difference"]) < NOISE:
                verdict += f", by less than {NOISE:g}"
            row |= found[["difference", "low", "high", "p"]].to_dict()
            row |= {"against": against, "verdict": verdict}
        rows.append(row)
    return pd.DataFrame(rows, columns=COLUMNS)


def write_ablations(
    found: pd.DataFrame, predicted: pd.DataFrame, directory: Path, title: str
) -> Path:
    """Write ``switches.csv``, ``switches.md`` and the predictions behind them; returns the path of
    the Markdown file."""
    directory.mkdir(parents=True, exist_ok=True)
    found.to_csv(directory / "switches.csv", index=False, float_format="%.4f")
    predictions.write(predicted, directory / "predictions_switches.csv.gz")
    seeds = ", ".join(map(str, sorted(predicted["seed"].unique())))
    text = f"""# {title}

Mean Pearson r over the 19 dimensions, out of fold, averaged over seeds. Differences have 95 %
intervals over content groups, and over seeds if there are several. A difference is noise if its
interval contains 0. The sign of a difference below {NOISE:g} may change with other folds.
Seeds: {seeds}.

| option | choice | r | SD between seeds | against | difference | 95 % interval | p | |
|---|---|---|---|---|---|---|---|---|
"""
    for row in found.itertuples():
        spread = "" if np.isnan(row.seed_sd) else f"{row.seed_sd:.3f}"
        compared = ["", "", "", "", ""]
        if row.switch != REFERENCE:
            interval = f"{row.low:+.3f} to {row.high:+.3f}"
            compared = [row.against, f"{row.difference:+.3f}", interval, f"{row.p:.3f}"]
            compared.append(row.verdict)
        cells = [row.switch, row.choice, f"{row.r:.3f}", spread, *compared]
        text += f"| {' | '.join(cells)} |\n"
    path = directory / "switches.md"
    path.write_text(text)
    return path
