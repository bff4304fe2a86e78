"""What the notebooks show of a run: a recording to hear, tables and arrays for ``plots``."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from percepiano_ast import audio, plots, report, targets, transcription
from percepiano_ast.config import PRETRAININGS, InputError, Statistics, as_path
from percepiano_ast.data import batches, maestro, manifest, percepiano, percepiano_tables, records, shards, sources, tables
from percepiano_ast.data.performances import open_performances
from percepiano_ast.dimensions import KEYS, PRIMARY
from percepiano_ast.evaluation import reliability, summary
from percepiano_ast.evaluation.table import fold_column, load_index
from percepiano_ast.explain import maps
from percepiano_ast.models.transcription import STEP
from percepiano_ast.plots import explain as explain_plots
from percepiano_ast.rating import Rater, names_of_models
from percepiano_ast.suite import MADE_BY_FINETUNE, MADE_BY_PRETRAIN, Run, ceiling_of, maestro_source, own_runs
from percepiano_ast.training import pretrain as pretraining
from percepiano_ast.training.checkpoints import listing, open_latest
from percepiano_ast.training.stores import open_bucket, open_store

# What to look at beside the losses, by objective.
_CURVES = {
    "ssast": ["accuracy"],
    "transcription": ["validation_onset_f1", "validation_sustain_r"],
    "joint": ["masked_accuracy", "validation_heard_onset_f1", "validation_heard_sustain_r"],
}
KEPT = ["what", "step", "epoch", "MB", "age", "whole", "where"]


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


def task(run: Run) -> str:
    """What the run's pre-training asks of the encoder, in a line."""
    model, config = run.preset.model, run.preset.pretrain
    parts = [f"{model.num_patches} patches of {model.patch_size[0]} bands x {model.patch_size[1]} frames"]
    if config.objective != "transcription":
        parts.append(f"{config.num_masked(model)} of them masked")
    if config.objective != "ssast":
        parts.append(f"what is played in each {1000 * run.preset.front_end.seconds(STEP):.0f} ms")
    return "; ".join(parts)


def learned(run: Run, history: pd.DataFrame) -> Figure:
    """Curves over a pre-training, those that say most of its objective."""
    return plots.training_curves(history, ["loss", "validation_loss", *_CURVES[run.preset.pretrain.objective]], "Pre-training")


def gained(run: Run, history: pd.DataFrame) -> str:
    """What a pre-training came to, in lines: on recordings of the validation split."""
    config, last = run.preset.pretrain, history.iloc[-1]
    lines = [f"validation loss {history.iloc[0].validation_loss:.2f} -> {last.validation_loss:.2f} in {int(last.epoch)} epochs"]
    prefix = {"ssast": "validation_", "joint": "validation_masked_"}.get(config.objective)
    if prefix:
        chance = 100 / config.num_masked(run.preset.model)
        lines.append(f"patches told apart {100 * last[f'{prefix}accuracy']:.1f} %, by chance {chance:.1f} %")
    prefix = {"transcription": "validation_", "joint": "validation_heard_"}.get(config.objective)
    if prefix:
        lines.append(f"onsets F1 {last[f'{prefix}onset_f1']:.2f}, keys F1 {last[f'{prefix}down_f1']:.2f}, velocity off by "
                     f"{last[f'{prefix}velocity_mae']:.1f} of 127, sustain pedal r {last[f'{prefix}sustain_r']:.2f}")  # fmt: skip
    return "\n".join(lines)


def filled_in(run: Run) -> Figure | None:
    """A validation window as recorded, masked, and as the newest checkpoint paints it; None where nothing is masked."""
    if run.preset.pretrain.objective == "transcription":
        return None
    preset = run.preset
    tree, description = open_latest(f"{run.kept(run.pretrain)}/checkpoints", made_by=MADE_BY_PRETRAIN)
    held_out = shards.open_shards(run.maestro, "validation", made_by=maestro.MADE_BY)
    windows = batches.pretrain_batches(held_out, n_frames=preset.model.n_frames, batch_size=1, seed=1)
    statistics = Statistics(**description["statistics"])
    trained = pretraining.Pretraining(preset.model, preset.pretrain, held_out.front_end, statistics, 1)
    codes = next(windows.one_epoch())["codes"]
    painted = pretraining.reconstruction(trained, tree["state"]["params"], codes)
    original, masked, filled = (levels[0] for levels in painted)
    return plots.masking(original, masked, filled, preset.front_end)


def heard(run: Run) -> Figure | None:
    """A validation window, what was played in it, and what the newest checkpoint hears; None where it hears no notes."""
    if run.preset.pretrain.objective == "ssast":
        return None
    held_out = shards.open_shards(run.maestro, "validation", made_by=maestro.MADE_BY)
    recordings = records.Recordings(held_out)
    codes = np.empty((run.preset.model.n_frames, recordings.n_mels), recordings.dtype)
    start = (int(held_out.n_frames[0]) - len(codes)) // 2  # where there is music surely
    performance = open_performances(run.maestro)[recordings.read(0, start, codes)]
    said = transcription.Listener.open(run.kept(run.pretrain), log=lambda line: None).hear(codes)
    levels = audio.dequantize(codes, held_out.front_end) if codes.dtype == np.uint8 else codes.astype(np.float32)
    played = targets.frames(performance, start, len(codes), held_out.front_end)
    return plots.hearing(levels, played, said._asdict(), held_out.front_end)


def rated_data(folder: str | Path) -> dict:
    """What PercePiano's folder, or one in its shape, says of itself before anything of it is rendered.

    Returns:
        ``said`` (a sentence: are the published means those of the raters?), and the tables ``compositions``,
        ``ratings`` (clips, 19), ``human`` (clips,), ``correlations`` (19, 19), ``icc`` and ``ceiling`` of `reliability`.
    """
    index = percepiano.load_index(folder)
    ratings = percepiano.read_ratings(folder, index)
    agreement = reliability.evaluate(percepiano_tables.raters(folder), index)
    return {
        "said": percepiano_tables.rebuild(folder).sentence,
        "compositions": percepiano_tables.compositions(folder, index),
        "ratings": pd.DataFrame.from_dict(ratings, orient="index", columns=list(KEYS)),
        "human": index.set_index("clip")["human"],
        "correlations": percepiano_tables.correlations(ratings),
        "icc": agreement["icc"],
        "ceiling": agreement["ceiling"],
    }


def feature_correlations(run: Run, folder: str | Path, most: int = 20) -> pd.DataFrame:
    """Pearson's r of classic features with ratings over clips, (features, 19): those that go with any rating most."""
    ratings = percepiano.read_ratings(folder, percepiano.load_index(folder))
    found = percepiano_tables.feature_correlations(pd.read_csv(run.percepiano / "classic_features.csv"), ratings)
    return found.loc[found.abs().max(axis=1).sort_values(ascending=False).index[:most]]


def rated_clip(run: Run) -> tuple[np.ndarray, str, dict[str, float]]:
    """The first rated clip: level in dB (time, mel), name, ratings by dimension."""
    shard_set = shards.open_shards(run.percepiano, percepiano.SPLIT, made_by=percepiano.MADE_BY)
    example = min((shard_set[i] for i in range(min(len(shard_set), 50))), key=lambda one: one["clip"])
    level = audio.dequantize(example["log_mel"], shard_set.front_end)
    return level, example["clip"].decode(), dict(zip(KEYS, example["ratings"].tolist()))


def label_of(folder: str | Path, title: str) -> str:
    """The title, saying so where the ratings of a PercePiano-shaped folder are simulated."""
    return f"{title} (simulated ratings)" if percepiano.is_simulated(folder) else title


def label(run: Run, title: str) -> str:
    """The title, saying so where ratings are simulated."""
    simulated = json.loads((run.percepiano / "settings.json").read_text())["simulated"]
    return f"{title} (simulated ratings)" if simulated else title


def finetune_history(run: Run) -> pd.DataFrame:
    """Training loss by epoch, mean over folds, one column a model."""
    parts = []
    for model, fold, place in _folds(run):
        own = run.root / "finetune" / model / fold / "history.csv"
        if own.exists():
            rows = pd.read_csv(own)[["epoch", "loss"]]
        elif made := listing(f"{place}/model") or listing(f"{place}/checkpoints"):  # trained on another machine
            rows = pd.DataFrame(made[-1].get("history") or [{"epoch": made[-1]["epoch"], "loss": np.nan}])[["epoch", "loss"]]
        else:
            continue
        parts.append(rows.assign(model=model))
    table = pd.concat(parts).pivot_table(index="epoch", columns="model", values="loss", dropna=False)
    return table.add_suffix(" loss").reset_index()


def results(run: Run) -> dict[str, pd.DataFrame]:
    """The tables of the run's evaluation by name, see `evaluation.evaluate`: the rows of its protocol, nothing of others.

    ``ceiling`` is among them where the noise ceiling is known: (19 dimensions, scopes).
    """
    protocol = run.preset.finetune.protocol
    tables = {path.stem: pd.read_csv(path) for path in sorted(run.evaluation.glob("*.csv"))}
    tables = {name: table[table["protocol"] == protocol].reset_index(drop=True) for name, table in tables.items()}
    ceiling = reliability.load_ceiling(load_index(run.percepiano / "index.csv"), ceiling_of(run))
    return tables if ceiling is None else tables | {"ceiling": ceiling}


def headlines(run: Run) -> list[str]:
    """What the numbers say, in sentences."""
    found = results(run)
    return report.headlines(found["summary"], found["differences"], run.preset.finetune.protocol)


def gains(run: Run) -> pd.DataFrame:
    """Differences of Pearson's r, overall, between every model and the reference, as `plots.gains` draws them.

    The reference is the best model that hears audio alone and is no audio encoder.
    """
    found = results(run)
    models = list(report.wording.ranking(found["summary"]).index)
    reference = report.comparison.reference_of(models)
    pairs = found["differences"]
    pairs = pairs[(pairs["scope"] == "overall") & (pairs["metric"] == "pearson")]
    each = [summary.between(pairs, model, reference) for model in models if model != reference]
    return pd.concat(each[: plots.MOST], ignore_index=True)


def pairs(run: Run) -> pd.DataFrame:
    """How often performances by people are put in the right order, as `plots.pairwise` draws it."""
    table = results(run)["pairwise"]
    table = table[table["scope"] == "within_segment_humans"]
    return table[table["min_difference"] == table["min_difference"].max()]


def explained(run: Run, dimension: str) -> Figure:
    """What raised and lowered a rating of `rated_clip`, by the best encoder's model that has not heard its music; regressors on
    what is heard (`suite.judge`) have no gradients to follow."""
    models = report.wording.ranking(results(run)["summary"]).index
    home = as_path(run.store or run.root)
    tuned = names_of_models(home / "finetune")
    encoders = [name for name in models if report.wording.is_encoder(name) and name in tuned]
    if not encoders:
        raise InputError(f"no audio encoder (ast-*) was fine-tuned in {home}. Run {MADE_BY_FINETUNE} first")
    level, clip, _ = rated_clip(run)
    held_out = load_index(run.percepiano / "index.csv").set_index("clip").loc[clip, fold_column(run.preset.finetune.protocol)]
    rater = Rater(home, encoders[0])
    rater.models = [model for fold, model in zip(rater.folds, rater.models) if fold == held_out]
    front_end = rater.models[0].run.front_end
    recording = maps.Recording(clip, np.zeros(0, np.float32), level, front_end)
    explanation = maps.Explainer(rater).explain(recording, [dimension], methods=("gradients",))[0]
    start, stop, _ = explanation.stretch()
    return explain_plots.attribution_map(
        level, explanation.map, hertz=audio.band_centres(front_end), front_end=front_end, dimension=dimension, marked=(start, stop),
        title=label(run, f"{clip}: rated {explanation.rating:.2f} by {encoders[0]}"),
    )  # fmt: skip


def primary(run: Run) -> pd.DataFrame:
    """Pearson's r of the primary dimensions, overall: a row a dimension, a column a model, and the noise ceiling if known."""
    found = results(run)
    rows = found["summary"][(found["summary"]["scope"] == "overall") & (found["summary"]["metric"] == "pearson")]
    wide = rows.pivot(index="dimension", columns="model", values="value")
    keys = [key for keys in PRIMARY.values() for key in keys]
    table = wide.loc[keys].rename_axis(columns=None)
    if "ceiling" in found:
        table["noise ceiling"] = found["ceiling"].loc[keys, "overall"]
    return table.round(2)


def kept(run: Run) -> pd.DataFrame:
    """What of a run is where, how far it is, how old, and whether it is whole, as manifests and markers say.

    Names and lengths are compared, nothing big is read. At a mounted Drive it is what this machine sees, not what has been
    uploaded.

    Returns:
        columns ``KEPT``, empty where one means nothing; no rows for an empty run.
    """
    places = dict.fromkeys([str(run.root / "maestro"), run.kept(run.root / "maestro")])
    rows = [row for place in places for row in _shard_rows("shards for pre-training", place)]
    for name in PRETRAININGS:
        rows += _checkpoint_rows(f"pre-training {name}", f"{run.kept(run.root / 'pretrain' / name)}/checkpoints")
    for home in sorted(run.root.glob("percepiano*/records")):
        rows += _shard_rows("shards of rated clips", str(home.parent))
    own = own_runs(run)
    for whose, one in [("", run), *((f"{one.root.name}: ", one) for one in own)]:
        for model, fold, place in _folds(one):
            title = f"{whose}{model}, {fold.replace('_', ' ')}"
            finished = _checkpoint_rows(title, f"{place}/model")
            rows += finished or _checkpoint_rows(f"{title}, in training", f"{place}/checkpoints")
    tables = [path for one in (run, *own) for path in sorted(one.root.glob("predictions_*.csv"))]
    for path in [*tables, *run.evaluation.glob("report.html")]:
        size, saved = _stat(str(path))
        rows.append({"what": path.name, "bytes": size, "saved": saved, "where": str(path.parent)})
    return pd.DataFrame([_in_words(row) for row in rows], columns=KEPT)


def _folds(run: Run) -> list[tuple[str, str, str]]:
    """Model, fold and place of all folds that were begun."""
    home = run.kept(run.root / "finetune")
    if "://" in home:  # buckets have no folders, only names of files
        names = open_bucket(home).system.find(home)
        found = {tuple(name.split("/finetune/")[1].split("/")[:2]) for name in names}
    else:
        found = {(path.parent.name, path.name) for path in Path(home).glob("*/fold_*")}
    return [(model, fold, f"{home}/{model}/{fold}") for model, fold in sorted(found)]


def _stat(file: str) -> tuple[int, datetime]:
    """Bytes of a file and when it was written, here or at ``gs://``.

    Raises:
        FileNotFoundError: it is not there.
    """
    if "://" in file:
        known = open_bucket(file).system.info(file)
        return known["size"], known["mtime"]
    known = Path(file).stat()
    return known.st_size, datetime.fromtimestamp(known.st_mtime, UTC)


def _shard_rows(what: str, place: str) -> list[dict]:
    """One row about a data set, none where nothing of it is there."""
    store = open_store(place)
    if shards.MANIFEST not in store.names():
        return [{"what": what, "whole": "no: not finished", "where": place}] if store.names() else []
    row = {"what": what, "saved": _stat(store.path_of(shards.MANIFEST))[1], "where": place}
    try:
        if "://" in place:  # it is written last
            files, lost = json.loads(store.read(shards.MANIFEST))["files"], []
        else:
            files, lost = manifest.read(Path(place))["files"], manifest.shortcomings(Path(place))
    except (InputError, ValueError) as error:
        return [row | {"whole": f"no: {error}"}]
    whole = f"no: {len(lost)} files are not as its manifest says, such as {lost[0]}" if lost else "yes, by its manifest"
    return [row | {"bytes": sum(known["bytes"] for known in files.values()), "whole": whole}]


def _checkpoint_rows(what: str, place: str) -> list[dict]:
    """A row for each checkpoint at a place, the newest first, and for each damaged one."""
    damaged: list[str] = []
    rows = []
    for made in reversed(listing(place, damaged.append)):
        row = {name: made.get(name) for name in ("step", "epoch", "bytes")} | {"what": what, "where": place}
        lost = [part["name"] for part in made["parts"] if not _has_length(f"{place}/{part['name']}", part["bytes"])]
        whole = f"no: {lost[0]} is not as its marker says" if lost else "yes, by its marker"
        rows.append(row | {"saved": datetime.fromisoformat(made["saved"]), "whole": whole})
    return rows + [{"what": what, "whole": f"no: {line.strip()}", "where": place} for line in damaged]


def _has_length(file: str, size: int) -> bool:
    try:
        return _stat(file)[0] == size
    except FileNotFoundError:
        return False


def _in_words(row: dict) -> dict:
    if "bytes" in row:
        row["MB"] = round(row["bytes"] / 1e6, 1)
    if "saved" in row:
        row["age"] = _age(datetime.now(UTC) - row["saved"])
    return {name: row.get(name, "") for name in KEPT}


def _age(age: timedelta) -> str:
    """Such as ``3 minutes``."""
    for unit, seconds in {"day": 86_400, "hour": 3_600, "minute": 60}.items():
        if count := int(age.total_seconds() // seconds):
            return f"{count} {unit}{'s' * (count > 1)}"
    return "under a minute"
