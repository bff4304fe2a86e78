"""What the notebooks show of a run: a recording to hear, tables and arrays for ``plots``."""

import json

import numpy as np
import pandas as pd

from percepiano_ast import audio, report
from percepiano_ast.config import Statistics
from percepiano_ast.data import batches, manifest, maestro, percepiano, shards, sources, tables
from percepiano_ast.dimensions import KEYS
from percepiano_ast.suite import MADE_BY_PRETRAIN, Run, maestro_source
from percepiano_ast.training import pretrain as pretraining
from percepiano_ast.training.checkpoints import open_latest


def source_table(run: Run, source: str = "") -> pd.DataFrame:
    """What a source says that it holds, before anything of it is read: columns as `recordings` has them."""
    return _named(tables.read_table(sources.open_source(maestro_source(run, source))).rows)


def _named(table: pd.DataFrame) -> pd.DataFrame:
    table = table.rename(columns=lambda name: name.removeprefix("canonical_"))
    seconds = table["seconds"] if "seconds" in table else table["duration"]
    return table.assign(seconds=seconds, minutes=seconds / 60)


def recordings(run: Run) -> pd.DataFrame:
    """The recordings in the pre-training shards, in their order: composer, title, split, year, seconds, minutes,
    audio_filename, source_rate, channels, n_frames and ``shard``, the file that each lies in."""
    table = _named(pd.read_csv(run.maestro / "recordings.csv"))
    where = {facts["key"]: facts["shard"] for facts in manifest.recordings(run.maestro)}
    return table.assign(shard=table["audio_filename"].map(where)).sort_values(["shard", "audio_filename"])


def listen(run: Run, source: str = "", seconds: float = 20) -> tuple[str, np.ndarray]:
    """Title and beginning, float32 mono, of the shortest recording that went into the shards."""
    recording = recordings(run).sort_values("seconds").iloc[0]
    files = sources.open_source(maestro_source(run, source))
    with files.open(tables.read_table(files).root + recording["audio_filename"]) as sound:
        wave = audio.load(sound, run.preset.front_end.sample_rate, max_seconds=seconds)
    return f"{recording['composer']}: {recording['title']}", wave


def costs(run: Run) -> pd.Series:
    """What the pre-training shards cost: hours, bytes on disk, bytes that were read for them."""
    files = manifest.read(run.maestro)["files"]
    facts = manifest.recordings(run.maestro)
    hours = sum(one["seconds"] for one in facts) / 3600
    stored = sum(file["bytes"] for name, file in files.items() if ".array_record" in name)
    read = sum(one["source_bytes"] for one in facts)
    rows = {"hours": hours, "read from the source (GB)": read / 1e9, "shards (GB)": stored / 1e9}
    rows |= {"shards, MB per hour": stored / 1e6 / hours, "shards, if there were 200 h (GB)": 200 * stored / 1e9 / hours}
    return pd.Series(rows).round(3)


def shard_statistics(run: Run) -> Statistics:
    """Level statistics of the pre-training split."""
    return shards.open_shards(run.maestro, "train", made_by=maestro.MADE_BY).statistics


def reconstructions(run: Run, count: int = 3) -> tuple[np.ndarray, ...]:
    """Original, masked and reconstructed validation windows in dB, each (count, time, mel), by the newest checkpoint."""
    preset = run.preset
    tree, description = open_latest(f"{run.kept(run.pretrain)}/checkpoints", made_by=MADE_BY_PRETRAIN)
    held_out = shards.open_shards(run.maestro, "validation", made_by=maestro.MADE_BY)
    windows = batches.pretrain_batches(held_out, n_frames=preset.model.n_frames, batch_size=count, seed=1)
    statistics = Statistics(**description["statistics"])
    trained = pretraining.Pretraining(preset.model, preset.pretrain, held_out.front_end, statistics, 1)
    return pretraining.reconstruction(trained, tree["state"]["params"], next(windows.one_epoch())["codes"])


def rated_clip(run: Run) -> tuple[np.ndarray, str, dict[str, float]]:
    """The first rated clip: level in dB (time, mel), name, ratings by dimension."""
    shard_set = shards.open_shards(run.percepiano, percepiano.SPLIT, made_by=percepiano.MADE_BY)
    example = min((shard_set[i] for i in range(min(len(shard_set), 50))), key=lambda one: one["clip"])
    level = audio.dequantize(example["log_mel"], shard_set.front_end)
    return level, example["clip"].decode(), dict(zip(KEYS, example["ratings"].tolist()))


def label(run: Run, title: str) -> str:
    """The title, saying so where ratings are simulated."""
    simulated = json.loads((run.percepiano / "settings.json").read_text())["simulated"]
    return f"{title} (simulated ratings)" if simulated else title


def finetune_history(run: Run) -> pd.DataFrame:
    """Training loss by epoch, mean over folds, one column a model."""
    parts = []
    for path in sorted((run.root / "finetune").glob("*/fold_*/history.csv")):
        rows = pd.read_csv(path)
        parts.append(rows[["epoch"]].assign(loss=rows["loss"], model=path.parent.parent.name))
    return pd.concat(parts).pivot_table(index="epoch", columns="model", values="loss").add_suffix(" loss").reset_index()


def metrics_table(run: Run) -> pd.DataFrame:
    """``metrics.csv`` of the run's evaluation, the rows of its protocol."""
    return pd.read_csv(run.evaluation / "metrics.csv")


def headlines(run: Run) -> list[str]:
    """What the numbers say, in sentences."""
    config = run.preset.finetune
    comparisons = pd.read_csv(run.evaluation / "comparisons.csv")
    return report.headlines(metrics_table(run), comparisons, config.protocol, config.seed)
