"""Baselines without an encoder, under all protocols. Their predictions have the same format as
those of the models.

- ``identity-segment``: no audio, the mean of the other clips of the passage
- ``identity-segment-deadpan``: no audio, the same plus human versus deadpan (additive)
- ``identity-player``: no audio, the mean of the player's other clips
- ``identity-additive``: no audio, passage and player (additive)
- ``audio-stats``: statistics of the sound (`audio.audio_features`); the mean of ridge, kernel ridge
  and trees, which are also separate models, ``audio-stats-ridge``, ``-kernel`` and ``-extratrees``
- ``midi-stats``: the same regressors on MIDI descriptors (`performance_features`)
- ``midi-stats+score``: ``midi-stats`` plus score features (`score_features`), score-informed
- ``mlp``: a rating head on the statistics of the sound (feed-forward), for all dimensions
- ``mlp-single``: the same network, one for each dimension
"""

import functools
import itertools
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from percepiano_ast import audio
from percepiano_ast.config import AUDIOSET, KALDI, FinetuneConfig
from percepiano_ast.data import demo, percepiano
from percepiano_ast.dimensions import RatingScale
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation import predictions
from percepiano_ast.evaluation.predictions import fold_column
from percepiano_ast.files import TimeLeft, lock_config, process_map, sha256_of, write_atomic
from percepiano_ast.inference import regressors
from percepiano_ast.models.cnn import CNNConfig
from percepiano_ast.music import align, midi, performance_features, score, score_features
from percepiano_ast.music.synth import RenderCache
from percepiano_ast.tables import read_own, to_csv
from percepiano_ast.training.finetune import Finetuning, fit_heads, steps_of_epoch

# Identity baselines and their factors.
IDENTITY = {
    "identity-segment": ("segment",),
    "identity-segment-deadpan": ("segment", "human"),
    "identity-player": ("player",),
    "identity-additive": ("segment", "player"),
}
STATISTICS = ("audio-stats", "midi-stats", "midi-stats+score")
NETWORKS = ("mlp", "mlp-single")
BASELINES = (*IDENTITY, *STATISTICS, *NETWORKS)
LEAVE_ONE_OUT, LEAVE_PLAYER_OUT = "leave_one_out", "leave_player_out"
EXHAUSTIVE = (LEAVE_ONE_OUT, LEAVE_PLAYER_OUT)  # too many folds to train a model in each
MLP = FinetuneConfig(
    batch_size=64, epochs=80, learning_rate=1e-3, head="joint", rating_scale="dimension"
)
SAMPLE_RATE = 22_050
_SHRINKAGE = 1.0  # clips
_FEW = 8  # up to this number of clips, no worker processes are started
_SAVE_SECONDS = 10.0  # between saves of a feature table
_READING = [midi, audio.features]
_CODE = [*_READING, align, performance_features]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaselineOptions:
    """Choices of a run of baselines.

    Attributes:
        protocols: names in the index or in ``EXHAUSTIVE``; empty for all.
        baselines: names in ``BASELINES``; empty for all.
        synthesizers: for the renderings of the audio baselines; predictions for a clip's renderings
            are averaged.
        seed: for trees and mlp.
        workers: processes for computing feature tables.
    """

    protocols: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ()
    synthesizers: tuple[str, ...] = ("musescore-small",)
    seed: int = 0
    workers: int = 1


class BaselineUndefined(InputError):
    """A baseline is undefined or infeasible under a protocol; the message names the reason."""


# --- All baselines under all protocols ------------------------------------------------------------


def run_baselines(folder: str | Path, out: str | Path, options: BaselineOptions) -> Path:
    """Write ``predictions_<model>_<protocol>.csv.gz`` for every baseline and protocol to ``out``;
    returns ``out``. Every result is saved, so the same call resumes an interrupted run.

    Further output: ``index.csv`` (with the folds of ``EXHAUSTIVE``, for ``evaluate --index``),
    ``features/`` (feature tables), ``left_out.csv`` (baselines that are undefined under a protocol,
    with the reason) and ``without_score.csv`` (clips without a matching score).

    Args:
        folder: PercePiano's, or ``demo`` for the embedded data.

    Raises:
        InputError: unknown protocol or baseline; a requested baseline that is undefined under a
            requested protocol; invalid data; or ``out`` of another configuration.
    """
    # --- Data
    out = Path(out)
    demonstrate = str(folder) == "demo"
    folder = demo.write_percepiano(out / "demo" / "percepiano") if demonstrate else Path(folder)
    for name in options.baselines:
        if name not in BASELINES:
            raise InputError(f"unknown baseline {name!r}; choose from {', '.join(BASELINES)}.")
    index = with_exhaustive(percepiano.load_index(folder))
    for protocol in options.protocols:
        predictions.check_protocol(index, protocol)
    clips, known = index["clip"].to_numpy(), percepiano.read_ratings(folder, index)
    ratings = np.stack([known[clip] for clip in clips]).astype(float)
    found = percepiano.find_midi(folder)
    if lacking := [clip for clip in clips if clip not in found]:
        raise InputError(
            f"{folder} lacks the MIDI files of {len(lacking)} clips, such as {lacking[0]};"
            " download it again."
        )
    files = {clip: found[clip] for clip in clips}
    settings = {
        "ratings": sha256_of(ratings)[:16],
        "index": sha256_of(index.to_csv())[:16],
        "synthesizers": list(options.synthesizers),
        "seed": options.seed,
        "simulated": percepiano.is_simulated(folder),
    }
    lock_config(out, settings)
    (out / "index.csv").write_bytes(to_csv(index))

    def tables(baseline: str) -> list[pd.DataFrame]:
        """The features of a baseline: one table per synthesizer, or one of the MIDI files."""
        where = out / "features", options.workers
        if not baseline.startswith("midi-stats"):
            return [audio_table(files, name, *where) for name in options.synthesizers]
        played = midi_table(files, *where)
        if baseline == "midi-stats":
            return [played]
        written = percepiano.find_scores(folder)
        passage = dict(zip(clips, index["segment"], strict=True)) | percepiano.MISNAMED
        scores = {clip: written[passage[clip]] for clip in files if passage[clip] in written}
        informed, unmatched = score_table(files, scores, *where)
        if unmatched:
            rows = pd.DataFrame(unmatched.items(), columns=["clip", "reason"])
            (out / "without_score.csv").write_bytes(to_csv(rows))
            logger.info(
                f"skipped {len(unmatched)} clips without a matching score, see without_score.csv"
            )
        return [played.join(informed.add_prefix("score_"), how="inner")]

    # --- Predictions
    left_out = []
    pairs = itertools.product(
        options.protocols or predictions.protocols(index), options.baselines or BASELINES
    )
    for protocol, baseline in pairs:
        each = regressors.REGRESSORS if baseline in STATISTICS else ()
        names = [baseline, *(f"{baseline}-{regressor}" for regressor in each)]
        paths = {name: out / f"predictions_{name}_{protocol}.csv.gz" for name in names}
        if all(path.exists() for path in paths.values()):
            logger.info(f"{baseline}, {protocol}: already done")
            continue
        started, fold = time.monotonic(), percepiano.fold_of_clip(index, protocol)
        folds, rows = np.array([fold.get(clip, -1) for clip in clips]), np.arange(len(clips))
        try:
            if baseline in IDENTITY:
                predicted = {baseline: predict_identity(baseline, index, folds, ratings)}
            elif protocol in EXHAUSTIVE:
                raise BaselineUndefined(
                    f"{baseline}: {protocol} has {len(set(folds))} folds, too many to fit one model"
                    " per fold"
                )
            else:
                features = tables(baseline)
                complete = np.flatnonzero(np.isin(clips, features[0].index))
                rows = np.tile(complete, len(features))
                x = np.concatenate([one.loc[clips[complete]].to_numpy() for one in features])
                predicted = fold_by_fold(baseline, x, ratings[rows], folds[rows], options.seed)
        except BaselineUndefined as error:
            reason = f"{error}. Leave it out, or choose another protocol."
            if options.protocols and options.baselines:
                raise BaselineUndefined(reason) from error
            left_out.append({"baseline": baseline, "protocol": protocol, "reason": reason})
            continue
        for name, values in predicted.items():
            run = name, protocol, options.seed
            table = predictions.to_table(run, fold, clips[rows], ratings[rows], values)
            predictions.write(table, paths[name])
        logger.info(f"{baseline}, {protocol}: done in {time.monotonic() - started:.0f} s")
    if left_out:
        (out / "left_out.csv").write_bytes(to_csv(pd.DataFrame(left_out)))
        logger.info(
            f"skipped {len(left_out)} combinations of baseline and protocol, see left_out.csv"
        )
    return out


def fold_by_fold(
    baseline: str, features: np.ndarray, ratings: np.ndarray, folds: np.ndarray, seed: int
) -> dict[str, np.ndarray]:
    """For each fold, fit a baseline in ``STATISTICS`` or ``NETWORKS`` on the other folds and
    predict the fold.

    Args:
        features, ratings: (n, n_features) and (n, K), one row per rendering of a clip.
        folds: (n,); rows with a negative fold are neither used for training nor predicted.

    Returns:
        model -> (n, K), NaN outside the folds; a statistics baseline is several models.
    """
    predicted: dict[str, np.ndarray] = {}
    for number in sorted(set(folds[folds >= 0].tolist())):
        train, test = (folds != number) & (folds >= 0), folds == number
        logger.info(
            f"{baseline}, fold {number}: {train.sum():,} training renderings, {test.sum():,} held"
            " out"
        )
        if baseline in NETWORKS:
            parts = np.hsplit(ratings, ratings.shape[1]) if baseline == "mlp-single" else [ratings]
            x, new = features[train], features[test]
            each = [predict_mlp(x, part[train], new, seed=seed) for part in parts]
            values = {baseline: np.hstack(each)}
        else:
            fitted = regressors.fit(features[train], ratings[train], seed=seed)
            by_name = fitted.predict_each(features[test])
            values = {baseline: np.mean(list(by_name.values()), axis=0)}
            values |= {f"{baseline}-{name}": one for name, one in by_name.items()}
        for name, one in values.items():
            predicted.setdefault(name, np.full(ratings.shape, np.nan))[test] = one
    return predicted


def predict_mlp(
    features: np.ndarray, ratings: np.ndarray, new: np.ndarray, *, seed: int
) -> np.ndarray:
    """Ratings float32 (m, K) of the clips ``new`` (m, n_features), predicted by a joint
    `heads.RatingHead` without embedding, trained on ``features`` (n, n_features) and ``ratings``
    (n, K); InputError for NaN, or tables of different sizes."""
    features, ratings = regressors.check_tables(features, ratings)
    new = regressors.finite_table(new, "features")
    if new.shape[1] != (extra := features.shape[1]):
        raise InputError(f"{new.shape[1]} features per clip, but {extra} in the training clips.")
    count, config = ratings.shape[1], replace(MLP, seed=seed)
    scale = RatingScale.own([str(k) for k in range(count)], [0.0] * count, [1.0] * count)
    steps = config.epochs * steps_of_epoch(config, len(features))
    model = CNNConfig(channels=(0,)), config, KALDI, AUDIOSET, steps  # an embedding of width 0
    run = Finetuning(*model, questionnaire=scale, extra_features=extra)
    head = {"encoder": {}, "head": run.init_head(seed)}
    x, every = features.astype(np.float32), np.arange(len(features))
    params, scaler = fit_heads(run, head, x, ratings=ratings, train=every)
    return run.rate(params, scaler, new)


# --- Identity baselines ---------------------------------------------------------------------------


def with_exhaustive(index: pd.DataFrame) -> pd.DataFrame:
    """The index with additional folds for the protocols ``EXHAUSTIVE``, so that they are evaluated
    like any other; without player identities, there is no ``leave_player_out``."""
    index = index.assign(**{fold_column(LEAVE_ONE_OUT): np.arange(len(index))})
    if {"composition", "player"} <= set(index):
        index[fold_column(LEAVE_PLAYER_OUT)] = pd.factorize(_levels(index, "player"), sort=True)[0]
    return index


def predict_identity(
    name: str, index: pd.DataFrame, folds: np.ndarray, ratings: np.ndarray
) -> np.ndarray:
    """Out-of-fold predictions (n, 19) from the identity of passage and player, and from human
    versus deadpan, without audio.

    A rating is modelled as the mean of all training clips plus one effect per known factor (least
    squares, one dummy variable per level). Each effect is shrunk as if one more clip without it had
    been rated, so that a level without training clips has effect zero. What is known therefore
    depends on the protocol: all other clips (``leave_one_out``), only other players of the passage
    (``leave_player_out``; players are identified within a composition), four fifths of both
    (``random``), passages only (``performer``), or no passage (``segment``, ``content``,
    ``movement``, ``composition``). If no factor of any held-out clip is known, the prediction would
    be a constant and its correlation meaningless.

    Args:
        name: in ``IDENTITY``.
        index: of the n clips.
        folds: (n,) fold of each; clips with a negative fold are neither used for training nor
            predicted (NaN).
        ratings: (n, 19).

    Raises:
        BaselineUndefined: the protocol holds out all factors of the baseline.
        InputError: the index lacks player identities.
    """
    known, used = np.zeros(len(index), dtype=bool), folds >= 0
    levels = [_levels(index, what) for what in IDENTITY[name]]
    for level in levels:
        table = pd.DataFrame({"level": level, "fold": folds})[used]
        elsewhere = table.groupby("level")["fold"].nunique()
        known |= np.isin(level, elsewhere.index[elsewhere > 1])
    if not known[used].any():
        raise BaselineUndefined(
            f"{name} is undefined: no {' or '.join(IDENTITY[name])} of a held-out clip is in the"
            " training data under this protocol"
        )
    dummies = [(level[:, None] == np.unique(level)).astype(float) for level in levels]
    design = np.hstack([np.ones((len(index), 1)), *dummies])
    penalty = np.diag([0.0, *[_SHRINKAGE] * (design.shape[1] - 1)])
    gram, target = design[used].T @ design[used], design[used].T @ ratings[used]
    rated = np.full(ratings.shape, np.nan)
    for fold in np.unique(folds[used]):
        held = folds == fold
        x, y = design[held], ratings[held]
        rated[held] = x @ np.linalg.solve(gram - x.T @ x + penalty, target - x.T @ y)
    return rated


def _levels(index: pd.DataFrame, what: str) -> np.ndarray:
    """Passage, player or human/deadpan flag of each clip, (n,)."""
    if what != "player":
        return index[what].to_numpy()
    if missing := [name for name in ("composition", "player") if name not in index]:
        raise InputError(
            f"the index lacks {', '.join(missing)} for identifying players. Add these columns, or"
            " leave out identity-player and identity-additive."
        )
    return (index["composition"].astype(str) + " " + index["player"].astype(str)).to_numpy()


# --- Feature tables -------------------------------------------------------------------------------


def midi_table(files: dict[str, Path], folder: Path, workers: int) -> pd.DataFrame:
    """`performance_features` of every MIDI clip, a table with clips as its index."""
    given = {clip: (path,) for clip, path in files.items()}
    names = tuple(performance_features.PERFORMANCE_FEATURES)
    return _table(folder / "midi.csv", given, midi_statistics, names, _CODE, workers)


def audio_table(
    files: dict[str, Path], synthesizer: str, folder: Path, workers: int
) -> pd.DataFrame:
    """`audio.audio_features` of every MIDI clip, rendered by one synthesizer, a table with clips as
    its index.

    Raises:
        InputError: the synthesizer is unknown or not installed, or a MIDI file is unreadable or
            silent.
        RunFailed: a worker was killed; completed rows are saved.
    """
    renderings = RenderCache(folder / "renderings", synthesizer, SAMPLE_RATE)
    path, names = folder / f"audio_{Path(synthesizer).stem}.csv", audio.audio_feature_names()
    given = {clip: (path,) for clip, path in files.items()}
    function = functools.partial(_audio_statistics, renderings)
    return _table(path, given, function, names, _READING, workers, renderings.key)


def score_table(
    files: dict[str, Path], scores: dict[str, Path], folder: Path, workers: int
) -> tuple[pd.DataFrame, dict[str, str]]:
    """`score_features` of every MIDI clip that has a score and matches it; and excluded clips ->
    reason. A clip without a score is absent from ``scores``."""
    left_out = {clip: "it has no score" for clip in files if clip not in scores}
    given = {clip: (path, scores[clip]) for clip, path in files.items() if clip in scores}
    names = tuple(score_features.SCORE_FEATURES)
    code, path = [*_CODE, score, score_features], folder / "score.csv"
    table = _table(path, given, _score_statistics_or_nan, names, code, workers)
    for clip in table.index[table.isna().any(axis=1)]:
        try:
            _score_statistics(*given[clip])
        except InputError as reason:
            left_out[clip] = str(reason)
    return table.drop(index=[clip for clip in left_out if clip in given]), left_out


def midi_statistics(path: Path) -> dict[str, float]:
    """`performance_features` of one clip."""
    return performance_features.performance_features(midi.trimmed(midi.read_midi(path)))


def _audio_statistics(renderings: RenderCache, path: Path) -> dict[str, float]:
    wave = renderings.wave(midi.trimmed(midi.read_midi(path)), path.name)
    return audio.audio_features(wave, renderings.sample_rate)


def _score_statistics(played: Path, written: Path) -> dict[str, float]:
    return score_features.score_features(midi.read_midi(played), score.read_score(written))


def _score_statistics_or_nan(played: Path, written: Path) -> dict[str, float]:
    # so that one clip does not stop the others
    try:
        return _score_statistics(played, written)
    except InputError:
        return dict.fromkeys(score_features.SCORE_FEATURES, np.nan)


def _values(function: Callable, names: tuple[str, ...], paths: tuple[Path, ...]) -> list[float]:
    values = function(*paths)
    return [values[name] for name in names]


def _table(
    path: Path,
    files: Mapping[str, tuple[Path, ...]],
    function: Callable,
    names: tuple[str, ...],
    code: list,
    workers: int,
    more: str = "",
) -> pd.DataFrame:
    """The table in ``path``, with missing and outdated rows computed.

    Each row has a hash of everything that it depends on (its files, the modules ``code``, and
    ``more``), so that outdated rows are detected and an interrupted run can resume.
    """
    key = sha256_of(more, *(Path(name) for name in sorted({one.__file__ for one in code})))
    keys = {clip: sha256_of(key, *given)[:16] for clip, given in files.items()}

    def saved() -> dict[str, tuple]:
        """clip -> values, for rows with a valid key."""
        if not path.exists():
            return {}
        try:
            table = read_own(path, ["clip", "key"])
        except InputError as error:
            raise InputError(
                f"{path} is not a readable table; delete it to recompute it."
            ) from error
        if list(table.columns) != ["clip", "key", *names]:
            return {}
        valid = table[table["clip"].map(keys) == table["key"]]
        return {row[0]: row[2:] for row in valid.itertuples(index=False, name=None)}

    rows = saved()
    todo = [clip for clip in files if clip not in rows]
    if todo:
        logger.info(
            f"{path.stem}: computing {len(names)} statistics of {len(todo):,} clips ({len(rows):,}"
            " cached)"
        )
    compute, progress = functools.partial(_values, function, names), TimeLeft(len(todo))
    workers = workers if len(todo) > _FEW else 1
    results = process_map(compute, [files[clip] for clip in todo], workers)
    last = time.monotonic()
    for done, (clip, values) in enumerate(zip(todo, results, strict=True), 1):
        rows[clip] = values
        progress(done)
        if time.monotonic() - last > _SAVE_SECONDS or done == len(todo):
            last = time.monotonic()
            table = pd.DataFrame.from_dict(rows, orient="index", columns=names)
            table.insert(0, "key", [keys[one] for one in rows])
            write_atomic(path, to_csv(table.rename_axis("clip").reset_index(), "%.7g"))
    # Always read back, so that new and cached rows have the same rounding.
    table = pd.DataFrame.from_dict(saved(), orient="index", columns=names)
    return table.loc[list(files)]
