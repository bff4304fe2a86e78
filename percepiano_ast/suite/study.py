"""Ablations of fine-tuning on one encoder: options of the heads on its frozen embeddings, or
options that train the encoder."""

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from percepiano_ast import switches
from percepiano_ast.config import lookup
from percepiano_ast.data import shards
from percepiano_ast.evaluation import predictions
from percepiano_ast.files import claim_directory, echo
from percepiano_ast.suite.rated import Rated, cross_validate
from percepiano_ast.suite.rating import rated_clips_of
from percepiano_ast.suite.run import Run, start_of


def study(
    run: Run,
    init: str = "ssast",
    source: str = "",
    *,
    n_seeds: int = 3,
    inner: int | None = None,
    log: Callable[[str], None] = echo,
) -> Path:
    """Ablations of the rating heads on this encoder, frozen: writes ``switches.md`` and the tables
    behind it.

    Args:
        init, source: see `start_of`.
        n_seeds: number of seeds, from 0, at least two.
        inner: an outer fold to exclude, so that a choice can be tested on it.
    """
    frozen = dataclasses.replace(run.preset.finetune, strategy="frozen")
    rated, shard_set = rated_clips_of(run, start_of(run, init, source, log), frozen, log)
    clips = rated.clips
    given = rated.embeddings, clips.clip, clips.ratings, rated.raters, rated.index
    predicted = switches.study(
        switches.Material(rated.trainer(1), *given),
        seeds=tuple(range(n_seeds)),
        inner=inner,
        log=log,
    )
    title = _title("Ablations of the rating heads", rated, shard_set, ", frozen")
    return switches.write(
        switches.results(predicted, rated.index),
        predicted,
        run.root / "switches" / rated.name,
        title,
    )


def study_trained(
    run: Run,
    init: str = "ssast",
    source: str = "",
    *,
    only: Sequence[str] = (),
    n_seeds: int = 1,
    log: Callable[[str], None] = echo,
) -> Path:
    """Ablations of strategies that train the encoder, and of augmentations: writes ``switches.md``
    and the tables behind it.

    Interrupted training is resumed, and completed training is not repeated. Predictions are saved,
    models are not.

    Args:
        init, source: see `start_of`.
        only: choices in `switches.TRAINED`, such as ``lora``; by default all. Their references are
            trained too.
        n_seeds: number of seeds, from 0; one seed gives no estimate of the variation between seeds.

    Raises:
        InputError: unknown choice; see `start_of`.
    """
    start = start_of(run, init, source, log)
    frozen = dataclasses.replace(run.preset.finetune, strategy="frozen")
    home, tables = run.root / "switches" / f"{start.name}-trained", []
    for name, changes in _wanted(only).items():
        for seed in range(n_seeds):
            config = dataclasses.replace(frozen, **changes, seed=seed)
            one = dataclasses.replace(
                run, root=home / name.replace(" ", "_") / f"seed_{seed}", store=""
            )
            rated, shard_set = rated_clips_of(run, start, config, log)
            tables.append(
                _predicted(dataclasses.replace(rated, run=one), name, init, shard_set, log)
            )
    predicted = pd.concat(tables, ignore_index=True)
    title = _title("Strategies and augmentations", rated, shard_set)
    return switches.write(switches.results(predicted, rated.index), predicted, home, title)


def _wanted(only: Sequence[str]) -> dict[str, dict]:
    """Names and changes of the variants to train, each after its reference."""
    every = {f"{switch} {choice}": found for (switch, choice), found in switches.TRAINED.items()}
    by_choice = {choice: f"{switch} {choice}" for switch, choice in switches.TRAINED}
    names = [lookup(by_choice, choice, "strategy or augmentation") for choice in only] or list(
        every
    )
    wanted: dict[str, dict] = {switches.REFERENCE: {}}
    for name in names:
        for needed in (every[name][1], name):
            wanted.setdefault(needed, every[needed][0] if needed in every else {})
    return wanted


def _predicted(
    rated: Rated, name: str, init: str, shard_set: shards.ShardSet, log: Callable[[str], None]
) -> pd.DataFrame:
    """Out-of-fold predictions of one variant with one seed; its models are deleted afterwards."""
    clips, config, home = rated.clips, rated.config, rated.run.root
    claim_directory(
        home, {"finetune": dataclasses.asdict(config), "pretrained": rated.start.weights}
    )
    path = home / "predictions.csv.gz"
    if path.exists():
        log(f"{name}, seed {config.seed}: already done")
        return pd.read_csv(path)
    log(f"{name}, seed {config.seed}")
    metadata = shard_set.metadata
    found = cross_validate(
        rated, {"init": init, "data": metadata["licence"], "simulated": metadata["simulated"]}, log
    )
    seen = ~rated.unseen[found.which]
    which = found.which[seen]
    said = clips.clip[which], clips.ratings[which], found.rated[seen]
    table = predictions.to_table((name, config.protocol, config.seed), found.fold, *said)
    predictions.write(table, path)
    shutil.rmtree(home / "finetune")
    return table


def _title(what: str, rated: Rated, shard_set: shards.ShardSet, more: str = "") -> str:
    return f"{what} on {rated.name}{more}{' (simulated ratings)' * shard_set.metadata['simulated']}"
