"""Regressors on an encoder's transcription, embeddings and audio statistics, under every protocol,
and their learning curve.

In each fold, one of the `FEATURE_SETS` is chosen by its error in an inner cross-validation on the
training clips; every set is also reported by itself. Tables call the chosen set ``judged``, as
published ones do.
"""

import dataclasses
import io
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from percepiano_ast import plots
from percepiano_ast.data import percepiano, shards
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation import predictions
from percepiano_ast.files import (
    lock_config,
    read_signed_json,
    sha256_of,
    write_atomic,
    write_json,
    write_signed_json,
)
from percepiano_ast.inference import regressors, transcribe
from percepiano_ast.inference.regressors import gaussian_ridge, standard
from percepiano_ast.music.midi import NOTE, PEDAL, Performance
from percepiano_ast.music.score import read_score
from percepiano_ast.music.score_features import score_feature_table
from percepiano_ast.pipeline.run import Run, load_encoder
from percepiano_ast.pipeline.steps import (
    CrossValidation,
    percepiano_source,
    rated_clips_of,
    sound_features,
)
from percepiano_ast.tables import to_csv

logger = logging.getLogger(__name__)

# Each set is a model, ``<encoder>-<set>``. Audio statistics alone are the baseline ``audio-stats``.
FEATURE_SETS: dict[str, tuple[str, ...]] = {
    "embedding": ("embedding",),
    "notes": ("notes",),
    "notes-sound": ("notes", "sound"),
    "notes-sound-embedding": ("notes", "sound", "embedding"),
}
JUDGED = "judged"  # the set chosen by the inner cross-validation
SCORE = "+score"
CURVE_PROTOCOL = "content"
SHARES = (0.125, 0.25, 0.5, 0.75)
DRAWS = 6
# The centre of the grid that `regressors` averages over: one fit instead of seventeen, r - 0.01.
_ALPHA, _WIDTH = 0.3, 3.0
_EMPTY = Performance(np.zeros(0, NOTE), np.zeros(0, PEDAL))


@dataclass(frozen=True, eq=False)
class TranscribedClips:
    """Transcriptions of all renderings, None where no note was detected, their embeddings (n, 2 F'
    D) if requested, and a checksum of renderings and encoder."""

    key: str
    embeddings: np.ndarray | None
    played: list[Performance | None]


class RegressionData(NamedTuple):
    """Training data of the regressors: features by name (n, columns), ratings (n, 19), content
    groups (n,), and whether a rendering is by the held-out synthesizer (n,)."""

    parts: dict[str, np.ndarray]
    ratings: np.ndarray
    groups: np.ndarray
    unseen: np.ndarray

    def features(self, names: tuple[str, ...]) -> np.ndarray:
        """The named parts, concatenated."""
        return np.concatenate([self.parts[name] for name in names], axis=1)


# --- Features -------------------------------------------------------------------------------------


def transcribe_clips(rated: CrossValidation, embed: bool = True) -> TranscribedClips:
    """Transcribe all renderings; the result is cached for this encoder and these clips.

    Args:
        embed: compute embeddings too, which doubles the time.

    Raises:
        InputError: the encoder was not pre-trained to transcribe.
    """
    start, clips, transcriber = rated.start, rated.clips, rated.transcriber
    home = rated.run.root / "heard" / start.name
    parts: list = [f"{start.weights} {start.model} {rated.front_end} {start.statistics}"]
    for clip, synthesizer, codes in zip(clips.clip, clips.synthesizer, clips.codes, strict=True):
        parts += [f"{clip} {synthesizer}", codes]
    key = sha256_of(*parts)
    marker = home / "heard.json"
    known: dict[str, Any] = {"key": key, "files": {}}
    if marker.exists():
        try:
            before = read_signed_json(marker, {"key": str, "files": {str: str}})
            known = before if before["key"] == key else known
        except InputError as error:  # or of an earlier version
            logger.info(f"  {error}")

    def cached(name: str) -> bool:
        """Whether a file is the one that was written for these renderings."""
        stated = known["files"].get(name)
        return (home / name).is_file() and sha256_of(home / name) == stated

    def write(name: str, content: bytes) -> None:
        write_atomic(home / name, content)
        known["files"][name] = sha256_of(content)
        write_signed_json(marker, known)

    if not cached(shards.PERFORMANCES):
        logger.info(f"{start.name}: transcribing {len(clips.codes):,} renderings")
        packed = {
            str(row): shards.pack_performance(one or _EMPTY)
            for row, one in enumerate(transcriber.transcribe_all(clips.codes))
        }
        write(shards.PERFORMANCES, shards.join_performances(packed))
    if embed and not cached("embeddings.npy"):
        logger.info(f"{start.name}: embedding {len(clips.codes):,} renderings")
        content = io.BytesIO()
        np.save(content, rated.embed(rated.params, np.arange(len(clips.codes))))
        write("embeddings.npy", content.getvalue())
    found = shards.Performances(home / shards.PERFORMANCES, f"Delete {home} and run again.")
    played = [found[str(row)] for row in range(len(found))]
    embeddings = np.load(home / "embeddings.npy") if embed else None
    return TranscribedClips(key, embeddings, [one if len(one.notes) else None for one in played])


def regression_data(
    rated: CrossValidation, transcribed: TranscribedClips, folder: Path, home: Path
) -> RegressionData:
    """Features of the transcription, embeddings, audio statistics, and score features from the
    scores in PercePiano's ``folder``.

    Where the transcription does not match the score, score features are 0, the neutral value of
    all, and a last column is 1; such renderings are listed in ``home/without_score.csv``.
    """
    clips, scores = rated.clips, {}
    parts = {"notes": transcribe.features_of(transcribed.played).values}
    if transcribed.embeddings is not None:
        parts["embedding"] = transcribed.embeddings
    parts["sound"] = sound_features(rated.run.percepiano_in(rated.front_end), clips)
    for name, path in percepiano.find_scores(folder).items():
        try:
            scores[name] = read_score(path)
        except InputError as reason:
            logger.info(f"skipped: {reason}")
    passage = dict(zip(rated.index["clip"], rated.index["segment"], strict=True))
    passage |= percepiano.MISNAMED
    found, left_out = score_feature_table(
        {str(row): one for row, one in enumerate(transcribed.played) if one is not None},
        {str(row): scores.get(passage[clip]) for row, clip in enumerate(clips.clip)},
    )
    if left_out:
        rows = [int(row) for row in left_out]
        columns = {"clip": clips.clip[rows], "synthesizer": np.array(clips.synthesizer)[rows]}
        table = pd.DataFrame(columns | {"reason": left_out.values()})
        (home / "without_score.csv").write_bytes(to_csv(table))
        logger.info(
            f"{len(left_out)} of {len(clips.clip)} renderings do not match their score, see"
            " without_score.csv"
        )
    found.index = found.index.astype(int)
    every = found.reindex(range(len(clips.clip)))
    score = np.column_stack([every.fillna(0.0).to_numpy(), every.isna().all(axis=1)])
    parts["score"] = score.astype(np.float32)
    groups = rated.index.set_index("clip").loc[clips.clip, "content_group"].to_numpy()
    return RegressionData(parts, clips.ratings.astype(float), groups, rated.unseen)


def _prepare(
    run: Run, init: str, folder: str, source: str
) -> tuple[CrossValidation, Path, RegressionData]:
    frozen = dataclasses.replace(run.preset.finetune, strategy="frozen")
    start = load_encoder(run, init, source)
    rated, _ = rated_clips_of(run, start, frozen)
    transcribed = transcribe_clips(rated)
    settings = {
        "heard": transcribed.key,
        "seed": frozen.seed,
        "unseen": frozen.held_out_synthesizer,
    }
    home = lock_config(run.root / JUDGED / start.name, settings)
    scores = percepiano_source(run, folder)
    return rated, home, regression_data(rated, transcribed, scores, home)


# --- Predictions ----------------------------------------------------------------------------------


def fit_regressors(
    run: Run, init: str, folder: str = "", *, protocols: tuple[str, ...] = (), source: str = ""
) -> list[Path]:
    """Predict all clips under every protocol; returns the paths of the predictions.

    Writes ``judged/<model>/predictions_<model>_<protocol>.csv.gz``: for each of `FEATURE_SETS`, the
    chosen set, the chosen set with score features (``+score``), and each again for renderings by
    the held-out synthesizer. A mean over synthesizers is better than a prediction for one, so for a
    fair comparison the chosen set is also written for each training synthesizer. Existing files are
    not computed again.

    Args:
        init: a pre-training with transcription, of this run or saved in the file ``source``.
        folder: PercePiano's, for its scores; by default the preset's.
        protocols: names in the index; by default all.

    Raises:
        InputError: an encoder without transcription; an unknown protocol; see `load_encoder`.
    """
    rated, home, data = _prepare(run, init, folder, source)
    every = protocols or predictions.protocols(rated.index)
    return [path for name in every for path in regress_protocol(rated, data, home, name)]


def regress_protocol(
    rated: CrossValidation, data: RegressionData, home: Path, protocol: str
) -> list[Path]:
    """Write the predictions of all models under one protocol to ``home``, unless they exist."""
    # Kind -> renderings: all training pianos, the held-out soundfont, and, for the chosen set, each
    # training piano if there are several.
    pianos = np.array(rated.clips.synthesizer)
    kinds = {"": ~data.unseen}
    if rated.config.held_out_synthesizer:
        kinds[f"@{rated.config.held_out_synthesizer}"] = data.unseen
    seen = sorted(set(pianos[~data.unseen].tolist()))
    each = {f"@{piano}": pianos == piano for piano in seen if len(seen) > 1}
    files = {
        (name, kind): home / f"predictions_{rated.start.name}-{name}{kind}_{protocol}.csv.gz"
        for name in (*FEATURE_SETS, JUDGED, JUDGED + SCORE)
        for kind in (kinds | each if name == JUDGED else kinds)
    }
    if all(path.exists() for path in files.values()):
        return list(files.values())
    folds, seed, choices = rated.folds_of(protocol), rated.config.seed, {}
    predicted: dict[str, np.ndarray] = {}
    for number in sorted(set(folds[folds >= 0].tolist())):
        started = time.monotonic()
        train, test = (folds != number) & (folds >= 0) & ~data.unseen, folds == number
        y, groups = data.ratings[train], data.groups[train]

        def predict(parts, train=train, test=test, y=y):
            x = data.features(parts)
            return regressors.fit(x[train], y, seed=seed).predict(x[test])

        errors = {
            name: regressors.inner_error(data.features(parts)[train], y, groups, seed=seed)
            for name, parts in FEATURE_SETS.items()
        }
        best = min(errors, key=errors.__getitem__)
        made = {name: predict(parts) for name, parts in FEATURE_SETS.items()}
        made |= {JUDGED: made[best], JUDGED + SCORE: predict((*FEATURE_SETS[best], "score"))}
        for name, values in made.items():
            predicted.setdefault(name, np.full(data.ratings.shape, np.nan))[test] = values
        choices[number] = {"chosen": best} | {name: round(e, 4) for name, e in errors.items()}
        logger.info(f"{protocol}, fold {number}: chose {best}, {time.monotonic() - started:.0f} s")
    write_json(home / f"chosen_{protocol}.json", choices)
    for (name, kind), path in files.items():
        values = predicted[name]
        rows = (kinds | each)[kind] & np.isfinite(values).all(axis=1)
        model = f"{rated.start.name}-{name}{kind}"
        predictions.write(rated.table(model, rows, values[rows], protocol), path)
    return list(files.values())


# --- Learning curve -------------------------------------------------------------------------------


def learning_curve(run: Run, init: str, folder: str = "", *, source: str = "") -> Path:
    """Mean r under ``content``, from transcription and audio statistics, by the share of training
    passages (content groups), players or clips; arguments as in `fit_regressors`.

    Returns:
        ``learning_curve.csv`` (``unit,share,draw,r``) beside the predictions, with a PNG figure.
    """
    rated, home, data = _prepare(run, init, folder, source)
    clips = rated.clips.clip
    players = rated.index.set_index("clip").loc[clips, "player"].to_numpy()
    rows = [("everything", 1.0, 0, curve_point(rated, data, clips, 1.0, 0))]
    for unit, labels in {"passages": data.groups, "players": players, "clips": clips}.items():
        for share in SHARES:
            found = [curve_point(rated, data, labels, share, draw) for draw in range(DRAWS)]
            rows += [(unit, share, draw, r) for draw, r in enumerate(found)]
            logger.info(f"{share:.3g} of {unit}: r {np.mean(found):.3f}")
    path, table = (
        home / "learning_curve.csv",
        pd.DataFrame(rows, columns=["unit", "share", "draw", "r"]),
    )
    table.to_csv(path, index=False, float_format="%.4f", lineterminator="\n")
    figure = plots.learning_curve(table, f"Learning curve ({rated.start.name}, {CURVE_PROTOCOL})")
    figure.savefig(path.with_suffix(".png"), dpi=120)
    return path


def curve_point(
    rated: CrossValidation, data: RegressionData, labels: np.ndarray, share: float, draw: int
) -> float:
    """Mean r over the dimensions, trained on the clips of a random share of the ``labels`` (n,)."""
    folds, seed = rated.folds_of(CURVE_PROTOCOL), rated.config.seed
    x, y = data.features(("notes", "sound")), data.ratings
    predicted = np.full(y.shape, np.nan)
    for number in sorted(set(folds[folds >= 0].tolist())):
        train = np.flatnonzero((folds != number) & (folds >= 0) & ~data.unseen)
        names, rng = np.unique(labels[train]), np.random.default_rng([seed, draw, int(number)])
        drawn = rng.choice(names, max(1, round(share * len(names))), replace=False)
        train = train[np.isin(labels[train], drawn)]
        test = (folds == number) & ~data.unseen
        moments = x[train].mean(axis=0), np.maximum(x[train].std(axis=0), 1e-9)
        mean, spread = y[train].mean(axis=0), y[train].std(axis=0)
        model = gaussian_ridge(x.shape[1], _ALPHA, _WIDTH).fit(
            standard(x[train], *moments), (y[train] - mean) / np.maximum(spread, 1e-9)
        )
        predicted[test] = model.predict(standard(x[test], *moments)) * spread + mean
    rows = np.isfinite(predicted).all(axis=1)
    table = rated.table("curve", rows, predicted[rows], CURVE_PROTOCOL)
    wide = table.pivot(index="clip", columns="dimension", values=["rating", "prediction"])
    return float(wide["prediction"].corrwith(wide["rating"]).mean())
