"""Step 3: preprocess rated clips into shards, and train rating models, fold by fold; step 4:
evaluate them."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from percepiano_ast.baselines import run as floor
from percepiano_ast.config import KALDI, FinetuneConfig
from percepiano_ast.data import batches, demo, percepiano, shards
from percepiano_ast.data.build import Work
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation import predictions, reliability
from percepiano_ast.evaluation.predictions import load_index
from percepiano_ast.files import echo
from percepiano_ast.models.cnn import ENCODERS
from percepiano_ast.studies import report
from percepiano_ast.suite.rated import HeldOut, Rated, cross_validate
from percepiano_ast.suite.run import MADE_BY_FINETUNE, Run, Start, start_of, workers


def percepiano_source(run: Run, folder: str = "", log: Callable[[str], None] = echo) -> Path:
    """PercePiano's folder, by default the preset's. The embedded data are written first; an address
    is downloaded first."""
    folder = folder or run.preset.percepiano
    if folder == "demo":
        log(
            "writing the embedded demo data in PercePiano's format (simulated performances and"
            " ratings)"
        )
        return demo.write_percepiano(run.root / "demo" / "percepiano")
    if "://" in str(folder):
        return percepiano.fetch(folder, run.root / "percepiano_source", log)
    return Path(folder)


def preprocess_percepiano(
    run: Run,
    folder: str = "",
    synthesizers: tuple[str, ...] = (),
    *,
    init: str = "",
    recordings: str = "",
    partial: bool = False,
    one_loudness: bool = False,
    log: Callable[[str], None] = echo,
) -> Path:
    """Step 3a: rated MIDI clips -> log-mel shards.

    Args:
        folder: PercePiano's checkout; by default the preset's source.
        init: start of fine-tuning; ``audioset`` also needs shards with the papers' front end.
        recordings: a folder with your own recording of each clip, instead of synthesizers.
        partial: whether clips may be missing from it; they are listed.
        one_loudness: see `percepiano.preprocess`.

    Returns:
        the folder of the shards with the preset's front end.
    """
    checkout = percepiano_source(run, folder, log)
    for front_end in [run.preset.front_end] + [KALDI] * (init == "audioset"):
        percepiano.preprocess(
            checkout,
            run.percepiano_in(front_end),
            front_end,
            # Clips that cannot be rendered are listed; every table reports its number of clips.
            Work(workers(), max_bad=None, log=log),
            synthesizers=tuple(synthesizers)
            or ((percepiano.OWN,) if recordings else run.preset.synthesizers),
            recordings=recordings,
            partial=partial,
            one_loudness=one_loudness,
        )
    if (checkout / "index.csv").exists() and (checkout / reliability.RATERS).exists():
        agreement = reliability.split_half(
            reliability.read_raters(checkout), percepiano.load_index(checkout)
        )
        reliability.noise_ceiling(agreement).to_csv(
            run.percepiano / "noise_ceiling.csv", float_format="%.4f", lineterminator="\n"
        )
    return run.percepiano


def rated_clips_of(
    run: Run, start: Start, config: FinetuneConfig, log: Callable[[str], None]
) -> tuple[Rated, shards.ShardSet]:
    """PercePiano's clips with the encoder's front end, and their shards."""
    home = run.percepiano_in(start.front_end)
    shard_set = shards.open_shards(home, percepiano.SPLIT, made_by=percepiano.MADE_BY)
    clips, path = batches.rated_clips(shard_set), home / "raters.csv"
    raters = (
        pd.read_csv(path, index_col="clip").loc[clips.clip, "n_ratings"].to_numpy()
        if path.exists()
        else None
    )
    return (
        Rated(
            run,
            start,
            config,
            clips,
            shard_set.front_end,
            load_index(home / "index.csv"),
            raters,
            log=log,
        ),
        shard_set,
    )


def finetune(
    run: Run, init: str = "ssast", source: str = "", log: Callable[[str], None] = echo
) -> pd.DataFrame:
    """Step 3b: train all folds of the preset's protocol; returns (and writes) the out-of-fold
    predictions.

    Predictions for renderings by the held-out soundfont ``unseen`` are written as a separate model,
    ``<model>@<synthesizer>``.

    Args:
        init, source: the encoder's weights, see `start_of`.
    """
    rated, shard_set = rated_clips_of(
        run, start_of(run, init, source, log), config_for(run, init), log
    )
    metadata = shard_set.metadata
    found = cross_validate(
        rated, {"init": init, "data": metadata["licence"], "simulated": metadata["simulated"]}, log
    )
    unseen = rated.unseen[found.which]
    tables = [_of(rated, found, ~unseen, rated.name)]
    if unseen.any():
        tables.append(_of(rated, found, unseen, f"{rated.name}@{rated.config.unseen}"))
    return pd.concat(tables, ignore_index=True)


def _of(rated: Rated, found: HeldOut, rows: np.ndarray, name: str) -> pd.DataFrame:
    """Write the predictions of some of the held-out renderings."""
    which = found.which[rows]
    uncertainty = None if found.uncertainty is None else found.uncertainty[rows]
    said = (
        rated.clips.clip[which],
        rated.clips.ratings[which],
        found.rated[rows],
        found.fold,
        uncertainty,
    )
    return _write_predictions(rated.run, name, *said)


def config_for(run: Run, init: str) -> FinetuneConfig:
    """The preset's configuration; for alternative encoders, which are not pre-trained, with full
    training."""
    config = run.preset.finetune
    return (
        dataclasses.replace(config, strategy="full", encoder_rate=1.0)
        if init in ENCODERS
        else config
    )


def baselines(run: Run, log: Callable[[str], None] = echo) -> pd.DataFrame:
    """Step 3c: baselines over the same folds; returns (and writes) the predictions of all of them.

    ``mlp`` and ``audio-stats`` use classic features of the training renderings, without those by
    the held-out soundfont ``unseen``. ``identity-*`` use no audio, and are skipped if the protocol
    holds out the identities that they need. See `percepiano_ast.baselines`.
    """
    shard_set = shards.open_shards(run.percepiano, percepiano.SPLIT, made_by=percepiano.MADE_BY)
    clips, index = batches.rated_clips(shard_set), load_index(run.percepiano / "index.csv")
    table = pd.read_csv(run.percepiano / "classic_features.csv").set_index(["clip", "synthesizer"])
    features = table.loc[list(zip(clips.clip, clips.synthesizer))].to_numpy(np.float32)
    fold = percepiano.fold_of_clip(index, run.preset.finetune.protocol)
    seen = percepiano.without_variant(clips.synthesizer) != run.preset.finetune.unseen
    names = np.array(clips.clip)[seen]
    held_out = np.array([fold.get(clip, -1) for clip in names])
    groups = index.set_index("clip").loc[names, "content_group"].to_numpy()
    data = floor.Renderings(features[seen], clips.ratings[seen], groups, held_out)
    made = floor.floor(data, names, index, run.preset.finetune.seed, log)
    return pd.concat(
        [_write_predictions(run, name, *rated, fold) for name, rated in made.items()],
        ignore_index=True,
    )


def _write_predictions(
    run: Run, model: str, clips, ratings, rated, fold, uncertainty=None
) -> pd.DataFrame:
    """Average the renderings of each clip and write the tidy table: one row per clip and
    dimension."""
    name = model, run.preset.finetune.protocol, run.preset.finetune.seed
    table = predictions.to_table(name, fold, clips, ratings, rated, uncertainty)
    predictions.write(table, run.predictions(model))
    return table


def evaluate(run: Run) -> Path:
    """Step 4: metrics, comparisons, figures and report from all predictions of the run; returns the
    path of ``report.html``.

    Raises:
        InputError: there are no predictions yet.
    """
    paths = predicted(run)
    if not paths:
        raise InputError(f"no predictions_*.csv in {run.root}. Run {MADE_BY_FINETUNE} first")
    shard_set = shards.open_shards(run.percepiano, percepiano.SPLIT, made_by=percepiano.MADE_BY)
    index = run.percepiano / "index.csv"
    rendered = pd.read_csv(run.percepiano / "classic_features.csv", usecols=["clip"])[
        "clip"
    ].nunique()
    return report.evaluate_files(
        paths,
        run.evaluation,
        index=index,
        partial=rendered < len(load_index(index)),  # the report lists missing clips
        simulated=shard_set.metadata["simulated"],
        ceiling=ceiling_of(run),
    )


def predicted(run: Run) -> list[Path]:
    """All tables of predictions under the preset's protocol; of `judge`, only the chosen set,
    without and with ``+score``."""
    judged = f"judged/*/predictions_*-judged*_{run.preset.finetune.protocol}.csv.gz"
    return [*sorted(run.root.glob("predictions_*.csv")), *sorted(run.root.glob(judged))]


def ceiling_of(run: Run) -> Path | None:
    """The noise ceiling of a data set with individual raters; that of PercePiano is part of the
    package."""
    path = run.percepiano / "noise_ceiling.csv"
    return path if path.exists() else None
