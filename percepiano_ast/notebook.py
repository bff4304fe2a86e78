"""Tables, arrays, figures and sentences about a run, for the notebooks."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from percepiano_ast import audio, pipeline, plots, tables
from percepiano_ast.config import PRETRAININGS, LevelStats
from percepiano_ast.data import build, maestro, percepiano, percepiano_stats, shards, sources
from percepiano_ast.data.batches import pretrain_batches
from percepiano_ast.dimensions import KEYS, PRIMARY
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation import compare, reliability
from percepiano_ast.evaluation.predictions import fold_column, load_index
from percepiano_ast.files import as_path, matching, read_json
from percepiano_ast.inference.rate import FoldEnsemble, names_of_models
from percepiano_ast.inference.transcribe import Transcriber
from percepiano_ast.models.transcription import STEP
from percepiano_ast.music.piano_roll import frame_targets
from percepiano_ast.pipeline import Run
from percepiano_ast.plots import studies as explain_plots
from percepiano_ast.studies import explain, report
from percepiano_ast.training.checkpoints import Storage, listing, open_latest
from percepiano_ast.training.pretrain import Pretraining, reconstruction

STATUS = ["item", "step", "epoch", "MB", "age", "integrity", "location"]


# --- Recordings and shards ------------------------------------------------------------------------


def source_table(run: Run, source: str = "") -> pd.DataFrame:
    """The metadata table of a source, read before any audio; columns as in `recordings`."""
    files = sources.open_source(pipeline.maestro_source(run, source))
    return _named(sources.read_table(files).rows)


def _named(table: pd.DataFrame) -> pd.DataFrame:
    table = table.rename(columns=lambda name: name.removeprefix("canonical_"))
    seconds = table["seconds"] if "seconds" in table else table["duration"]
    return table.assign(seconds=seconds, minutes=seconds / 60)


def recordings(run: Run) -> pd.DataFrame:
    """The recordings in the pre-training shards, in storage order: composer, title, split, year,
    seconds, minutes, audio_filename, source_rate, channels, n_frames, and ``shard``, its file."""
    table = _named(tables.read_own(run.maestro / "recordings.csv", sources.TEXT))
    files = {facts["key"]: facts["shard"] for facts in build.recordings(run.maestro)}
    table["shard"] = table["audio_filename"].map(files)
    return table.sort_values(["shard", "audio_filename"])


def excerpt(run: Run, source: str = "", seconds: float = 20) -> tuple[str, np.ndarray]:
    """Title and first ``seconds``, float32 mono (n,), of the shortest recording in the shards."""
    recording = recordings(run).sort_values("seconds").iloc[0]
    files = sources.open_source(pipeline.maestro_source(run, source))
    with files.open(sources.read_table(files).root + recording["audio_filename"]) as sound:
        wave = audio.load(sound, run.preset.front_end.sample_rate, max_seconds=seconds)
    return f"{recording['composer']}: {recording['title']}", wave


def shard_sizes(run: Run) -> pd.Series:
    """Hours in the pre-training shards, bytes read from the source, bytes on disk."""
    files = shards.read_manifest(run.maestro)["files"]
    facts = pd.DataFrame(build.recordings(run.maestro))
    hours = facts["seconds"].sum() / 3600
    stored = sum(file["bytes"] for name, file in files.items() if ".array_record" in name)
    rows = {
        "hours": hours,
        "read from the source (GB)": facts["source_bytes"].sum() / 1e9,
        "shards (GB)": stored / 1e9,
        "shards, MB per hour": stored / 1e6 / hours,
        "shards, extrapolated to 200 h (GB)": 200 * stored / 1e9 / hours,
    }
    return pd.Series(rows).round(3)


def shard_statistics(run: Run) -> LevelStats:
    """Level statistics of the pre-training split."""
    return shards.open_shards(run.maestro, "train", made_by=maestro.MADE_BY).statistics


# --- Pre-training ---------------------------------------------------------------------------------


def pretraining_task(run: Run) -> str:
    """The run's pre-training task in one line."""
    model, config = run.preset.model, run.preset.pretrain
    bands, frames = model.patch_size
    parts = [f"{model.num_patches} patches of {bands} bands x {frames} frames"]
    if config.objective != "transcription":
        parts.append(f"{config.num_masked(model)} of them masked")
    if config.objective != "ssast":
        step = 1000 * run.preset.front_end.seconds(STEP)
        parts.append(f"notes and pedals transcribed every {step:.0f} ms")
    return "; ".join(parts)


def pretraining_curves(run: Run, history: pd.DataFrame) -> Figure:
    """Losses and main metrics of a pre-training by epoch."""
    metrics = {
        "ssast": ["accuracy"],
        "transcription": ["validation_onset_f1", "validation_sustain_r"],
        "joint": ["masked_accuracy", "validation_heard_onset_f1", "validation_heard_sustain_r"],
    }[run.preset.pretrain.objective]
    return plots.training_curves(history, ["loss", "validation_loss", *metrics], "Pre-training")


def pretraining_summary(run: Run, history: pd.DataFrame) -> str:
    """Results of a pre-training on the validation split, one per line."""
    config, last = run.preset.pretrain, history.iloc[-1]
    losses = f"{history.iloc[0].validation_loss:.2f} -> {last.validation_loss:.2f}"
    lines = [f"validation loss {losses} in {int(last.epoch)} epochs"]
    joint = config.objective == "joint"
    if config.objective != "transcription":
        accuracy = last["validation_masked_accuracy" if joint else "validation_accuracy"]
        chance = 100 / config.num_masked(run.preset.model)
        lines.append(f"masked patches identified {100 * accuracy:.1f} %, chance {chance:.1f} %")
    if config.objective != "ssast":
        onset, key, velocity, pedal = (
            last[f"validation_heard_{name}" if joint else f"validation_{name}"]
            for name in ("onset_f1", "down_f1", "velocity_mae", "sustain_r")
        )
        lines.append(
            f"onset F1 {onset:.2f}, key F1 {key:.2f}, velocity error {velocity:.1f} of 127,"
            f" sustain pedal r {pedal:.2f}"
        )
    return "\n".join(lines)


def reconstructions(run: Run) -> Figure | None:
    """A validation window: original, masked, and reconstructed by the newest checkpoint. None
    without masked modelling."""
    model, config = run.preset.model, run.preset.pretrain
    if config.objective == "transcription":
        return None
    directory = f"{run.kept(run.pretrain)}/checkpoints"
    tree, description = open_latest(directory, made_by=pipeline.MADE_BY_PRETRAIN)
    held_out = shards.open_shards(run.maestro, "validation", made_by=maestro.MADE_BY)
    windows = pretrain_batches(held_out, n_frames=model.n_frames, batch_size=1, seed=1)
    statistics = LevelStats(**description["statistics"])
    trained = Pretraining(model, config, held_out.front_end, statistics, 1)
    codes = next(windows.one_epoch())["codes"]
    shown = reconstruction(trained, tree["state"]["params"], codes)
    original, masked, rebuilt = (levels[0] for levels in shown)
    return plots.masking(original, masked, rebuilt, run.preset.front_end)


def transcriptions(run: Run) -> Figure | None:
    """A validation window, its true notes, and the newest checkpoint's transcription. None if it
    does not transcribe."""
    if run.preset.pretrain.objective == "ssast":
        return None
    held_out = shards.open_shards(run.maestro, "validation", made_by=maestro.MADE_BY)
    recordings = shards.Recordings(held_out)
    codes = np.empty((run.preset.model.n_frames, recordings.n_mels), recordings.dtype)
    # the middle of the recording always contains music
    start = (int(held_out.n_frames[0]) - len(codes)) // 2
    performance = shards.open_performances(run.maestro)[recordings.read(0, start, codes)]
    predicted = Transcriber.open(run.kept(run.pretrain)).predict(codes)
    quantized = codes.dtype == np.uint8
    levels = audio.dequantize(codes, held_out.front_end) if quantized else codes.astype(np.float32)
    played = frame_targets(performance, start, len(codes), held_out.front_end)
    return plots.transcription(levels, played, predicted, held_out.front_end)


# --- Ratings --------------------------------------------------------------------------------------


def rated_data(folder: str | Path) -> dict:
    """Clips, ratings and rater agreement of PercePiano's folder, or of one in the same format.

    Returns:
        ``sentence``, which compares the published means with the raters' ratings, and the tables
        ``compositions``, ``ratings`` (clips, 19), ``human`` (clips,), ``correlations`` (19, 19),
        ``icc`` and ``ceiling`` of `reliability`.
    """
    index = percepiano.load_index(folder)
    ratings = percepiano.read_ratings(folder, index)
    agreement = reliability.evaluate(percepiano_stats.raters(folder), index)
    return {
        "sentence": percepiano_stats.rebuild_means(folder).sentence,
        "compositions": percepiano_stats.compositions(folder, index),
        "ratings": pd.DataFrame.from_dict(ratings, orient="index", columns=list(KEYS)),
        "human": index.set_index("clip")["human"],
        "correlations": percepiano_stats.correlations(ratings),
        "icc": agreement["icc"],
        "ceiling": agreement["ceiling"],
    }


def feature_correlations(run: Run, folder: str | Path, most: int = 20) -> pd.DataFrame:
    """Pearson's r between audio features and ratings over clips, (most, 19): the features with the
    highest absolute r."""
    ratings = percepiano.read_ratings(folder, percepiano.load_index(folder))
    features = tables.read_own(run.percepiano / "classic_features.csv", percepiano.KEY)
    found = percepiano_stats.feature_correlations(features, ratings)
    return found.loc[found.abs().max(axis=1).nlargest(most).index]


def rated_clip(run: Run) -> tuple[np.ndarray, str, dict[str, float]]:
    """The first rated clip: level in dB (time, mel), name, ratings by dimension."""
    shard_set = shards.open_shards(run.percepiano, percepiano.SPLIT, made_by=percepiano.MADE_BY)
    first = [shard_set[i] for i in range(min(len(shard_set), 50))]
    example = min(first, key=lambda one: one["clip"])
    level = audio.dequantize(example["log_mel"], shard_set.front_end)
    return level, example["clip"].decode(), dict(zip(KEYS, example["ratings"].tolist()))


def label(data: Run | str | Path, title: str) -> str:
    """The title, marked as simulated if the ratings of a run or of PercePiano's folder are."""
    if isinstance(data, Run):
        simulated = read_json(data.percepiano / "settings.json", {"simulated": bool})["simulated"]
    else:
        simulated = percepiano.is_simulated(data)
    return f"{title} (simulated ratings)" if simulated else title


# --- Fine-tuning and evaluation -------------------------------------------------------------------


def finetune_history(run: Run) -> pd.DataFrame:
    """Training loss by epoch, mean over folds, one column per model."""
    parts = []
    for model, fold, place in _folds(run):
        own = run.root / "finetune" / model / fold / "history.csv"
        if own.exists():
            rows = pd.read_csv(own)
        elif made := listing(f"{place}/model") or listing(f"{place}/checkpoints"):
            # trained on another machine
            unknown = [{"epoch": made[-1].get("epoch", 0), "loss": np.nan}]
            rows = pd.DataFrame(made[-1].get("history") or unknown)
        else:
            continue
        parts.append(rows[["epoch", "loss"]].assign(model=model))
    axes = {"index": "epoch", "columns": "model", "values": "loss"}
    table = pd.concat(parts).pivot_table(**axes, dropna=False)
    return table.add_suffix(" loss").reset_index()


def results(run: Run) -> dict[str, pd.DataFrame]:
    """The tables of the run's evaluation by name, see `evaluation.evaluate`, of the run's protocol;
    ``ceiling`` (19 dimensions, scopes) if the noise ceiling is known."""
    found = {}
    for path in matching(run.evaluation, "*.csv"):
        table = tables.read_own(path, ["model", "model_a", "model_b", "protocol"])
        of_protocol = table["protocol"] == run.preset.finetune.protocol
        found[path.stem] = table[of_protocol].reset_index(drop=True)
    index = load_index(run.percepiano / "index.csv")
    ceiling = reliability.load_ceiling(index, pipeline.ceiling_of(run))
    return found if ceiling is None else found | {"ceiling": ceiling}


def headlines(run: Run) -> list[str]:
    """The main results of the run's evaluation, one sentence each."""
    found = results(run)
    return report.headlines(found["summary"], found["differences"], run.preset.finetune.protocol)


def gains(run: Run) -> pd.DataFrame:
    """Differences in overall Pearson's r between every model and the reference, the best audio-only
    model that is not an audio encoder, for `plots.gains`."""
    found = results(run)
    models = list(report.ranking(found["summary"]).index)
    reference = report.reference_of(models)
    pairs = found["differences"].query("scope == 'overall' and metric == 'pearson'")
    each = [compare.between(pairs, model, reference) for model in models if model != reference]
    return pd.concat(each[: plots.MOST], ignore_index=True)


def pairs(run: Run) -> pd.DataFrame:
    """Share of pairs of human performances ranked as in the ratings, for `plots.pairwise`."""
    table = results(run)["pairwise"].query("scope == 'within_segment_humans'")
    return table[table["min_difference"] == table["min_difference"].max()]


def primary(run: Run) -> pd.DataFrame:
    """Pearson's r of the primary dimensions, overall: one row per dimension, one column per model,
    and the noise ceiling."""
    found = results(run)
    rows = found["summary"].query("scope == 'overall' and metric == 'pearson'")
    keys = [key for keys in PRIMARY.values() for key in keys]
    table = rows.pivot(index="dimension", columns="model", values="value").loc[keys]
    table = table.rename_axis(columns=None)
    if "ceiling" in found:
        table["noise ceiling"] = found["ceiling"].loc[keys, "overall"]
    return table.round(2)


def explained(run: Run, dimension: str) -> Figure:
    """Attribution map of one rating of `rated_clip` by the best fine-tuned encoder's model of the
    clip's fold. Regressors on the transcription have no gradients."""
    models = report.ranking(results(run)["summary"]).index
    home = as_path(run.store or run.root)
    tuned = names_of_models(home / "finetune")
    encoders = [name for name in models if report.is_encoder(name) and name in tuned]
    if not encoders:
        raise InputError(
            f"no fine-tuned audio encoder (ast-*) in {home}. Run {pipeline.MADE_BY_FINETUNE} first"
        )
    level, clip, _ = rated_clip(run)
    index = load_index(run.percepiano / "index.csv").set_index("clip")
    held_out = index.loc[clip, fold_column(run.preset.finetune.protocol)]
    rater = FoldEnsemble(home, encoders[0])
    rater.models = [model for fold, model in zip(rater.folds, rater.models) if fold == held_out]
    front_end = rater.models[0].run.front_end
    recording = explain.ExplainedRecording(clip, np.zeros(0, np.float32), level, front_end)
    explainer = explain.Explainer(rater)
    explanation = explainer.explain(recording, [dimension], methods=("gradients",))[0]
    excerpt = explanation.excerpt()
    return explain_plots.attribution_map(
        level,
        explanation.map,
        front_end=front_end,
        dimension=dimension,
        marked=(excerpt.start, excerpt.stop),
        title=label(run, f"{clip}: rated {explanation.rating:.2f} by {encoders[0]}"),
    )


# --- Status ---------------------------------------------------------------------------------------


def status(run: Run) -> pd.DataFrame:
    """List the files of a run with progress, age, integrity and location, from
    manifests.

    Names and file sizes are compared; checksums are not. On a mounted Drive, the table shows this
    machine's view, which may include files that have not been uploaded yet.

    Returns:
        columns `STATUS`, with empty cells where a column does not apply; no rows for an empty run.
    """
    rows = []
    for place in dict.fromkeys([str(run.root / "maestro"), run.kept(run.root / "maestro")]):
        rows += _shard_rows("shards for pre-training", place)
    for name in PRETRAININGS:
        place = f"{run.kept(run.root / 'pretrain' / name)}/checkpoints"
        rows += _checkpoint_rows(f"pre-training {name}", place)
    for records in sorted(run.root.glob("percepiano*/records")):
        rows += _shard_rows("shards of rated clips", str(records.parent))
    runs = {"": run} | {f"{custom.root.name}: ": custom for custom in pipeline.custom_runs(run)}
    for prefix, one in runs.items():
        for model, fold, place in _folds(one):
            title = f"{prefix}{model}, {fold.replace('_', ' ')}"
            finished = _checkpoint_rows(title, f"{place}/model")
            rows += finished or _checkpoint_rows(f"{title}, in training", f"{place}/checkpoints")
    tables = [p for one in runs.values() for p in sorted(one.root.glob("predictions_*.csv"))]
    for path in [*tables, *run.evaluation.glob("report.html")]:
        facts = dict(zip(("bytes", "saved"), _stat(str(path))))
        rows.append({"item": path.name, "location": str(path.parent)} | facts)
    for row in rows:
        if "bytes" in row:
            row["MB"] = round(row["bytes"] / 1e6, 1)
        if "saved" in row:
            row["age"] = _age(row["saved"])
    rows = [{name: row.get(name, "") for name in STATUS} for row in rows]
    return pd.DataFrame(rows, columns=STATUS)


CLOCKS = timedelta(minutes=5)  # by which the clocks of two machines may differ


def _folds(run: Run) -> list[tuple[str, str, str]]:
    """Model, fold and location of all folds with training output."""
    home = run.kept(run.root / "finetune")
    if "://" in home:  # buckets have no folders, only file names
        names = Storage(home).fs.find(home)
        found = {tuple(name.split("/finetune/")[1].split("/")[:2]) for name in names}
    else:
        found = {(path.parent.name, path.name) for path in Path(home).glob("*/fold_*")}
    return [(model, fold, f"{home}/{model}/{fold}") for model, fold in sorted(found)]


def _stat(file: str) -> tuple[int, datetime]:
    """Size in bytes and modification time of a local file or one at ``gs://``."""
    if "://" in file:
        known = Storage(file).fs.info(file)
        return known["size"], known["mtime"]
    known = Path(file).stat()
    return known.st_size, datetime.fromtimestamp(known.st_mtime, UTC)


def _shard_rows(item: str, place: str) -> list[dict]:
    """One row about a dataset, none if the location is empty."""
    store = Storage(place)
    row: dict[str, Any] = {"item": item, "location": place}
    names = store.names()
    if shards.MANIFEST not in names:
        return [row | {"integrity": "incomplete: no manifest yet"}] if names else []
    row["saved"] = _stat(store.path_of(shards.MANIFEST))[1]
    try:
        files = shards.read_manifest(place, store.read(shards.MANIFEST))["files"]
        # to a bucket, the manifest is uploaded last
        lost = [] if "://" in place else build.shortcomings(Path(place))
    except InputError as error:
        return [row | {"integrity": f"damaged: {error}"}]
    damage = f"damaged: {len(lost)} files differ from the manifest, such as {(*lost, '')[0]}"
    row["bytes"] = sum(known["bytes"] for known in files.values())
    return [row | {"integrity": damage if lost else "intact (manifest)"}]


def _checkpoint_rows(item: str, place: str) -> list[dict]:
    """One row per checkpoint in a location, newest first, then one per damaged manifest."""
    damaged: list[str] = []
    rows: list[dict] = []
    for made in reversed(listing(place, damaged)):
        integrity = "intact (manifest)"
        for file in reversed(made["files"]):
            try:
                whole = _stat(f"{place}/{file['name']}")[0] == file["bytes"]
            except FileNotFoundError:
                whole = False
            if not whole:
                integrity = f"damaged: {file['name']} differs from its manifest"
        names = [one for one in ("step", "epoch", "bytes") if type(made.get(one)) is int]
        row = {name: made[name] for name in names} | {"integrity": integrity}
        try:
            row["saved"] = datetime.fromisoformat(made["saved"]).astimezone(UTC)
        except (KeyError, TypeError, ValueError, OverflowError):
            row["saved"] = "unknown"
        rows.append(row)
    rows += [{"integrity": f"damaged: {line}"} for line in damaged]
    return [row | {"item": item, "location": place} for row in rows]


def _age(saved: datetime | str) -> str:
    """The time since then in its largest unit, such as ``3 minutes``."""
    if isinstance(saved, str):
        return saved
    age = datetime.now(UTC) - saved
    if age < -CLOCKS:
        return "in the future"
    for unit, seconds in {"day": 86_400, "hour": 3_600, "minute": 60}.items():
        if count := int(age.total_seconds() // seconds):
            return f"{count} {unit}{'s' * (count > 1)}"
    return "under a minute"
