"""Run all baselines under all protocols. Every result is saved, so the same command resumes an
interrupted run."""

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from percepiano_ast.baselines import features, identity
from percepiano_ast.data import demo, percepiano
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation import predictions
from percepiano_ast.files import claim_directory
from percepiano_ast.inference import regressors
from percepiano_ast.models import baselines as networks

STATISTICS = ("audio-stats", "midi-stats", "midi-stats+score")
NETWORKS: dict[str, Callable] = {"mlp": networks.fit_mlp, "mlp-single": networks.fit_single_tasks}
BASELINES = (*identity.BASELINES, *STATISTICS, *NETWORKS)


@dataclass(frozen=True)
class Settings:
    """Choices of a run of baselines.

    Attributes:
        protocols: names in the index or in `identity.EXHAUSTIVE`; empty for all.
        baselines: names in ``BASELINES``; empty for all.
        synthesizers: for the renderings of the audio baselines; predictions for a clip's renderings
            are averaged.
        seed: for trees and networks.
        workers: processes for computing feature tables.
    """

    protocols: tuple[str, ...] = ()
    baselines: tuple[str, ...] = ()
    synthesizers: tuple[str, ...] = ("musescore-small",)
    seed: int = 0
    workers: int = 1


def run(
    folder: str | Path, out: str | Path, settings: Settings, log: Callable[[str], None] = print
) -> Path:
    """Write ``predictions_<model>_<protocol>.csv.gz`` for every baseline and protocol to ``out``;
    returns ``out``.

    Further output: ``index.csv`` (with the folds of `identity.EXHAUSTIVE`, for ``evaluate
    --index``), ``features/`` (feature tables) and ``left_out.csv`` (baselines that are undefined
    under a protocol, with the reason).

    Args:
        folder: PercePiano's, or ``demo`` for the embedded data.

    Raises:
        InputError: unknown protocol or baseline; a requested baseline that is undefined under a
            requested protocol; invalid data; or ``out`` of another configuration.
    """
    out = Path(out)
    folder = (
        demo.write_percepiano(out / "demo" / "percepiano")
        if str(folder) == "demo"
        else Path(folder)
    )
    work = _Work(folder, out, settings, log)
    left_out = []
    for protocol in settings.protocols or predictions.protocols(work.index):
        for baseline in settings.baselines or BASELINES:
            try:
                work.make(baseline, protocol)
            except NotMade as reason:
                if settings.protocols and settings.baselines:
                    raise InputError(str(reason)) from reason
                left_out.append({"baseline": baseline, "protocol": protocol, "reason": str(reason)})
    if left_out:
        pd.DataFrame(left_out).to_csv(out / "left_out.csv", index=False, lineterminator="\n")
        log(f"skipped {len(left_out)} combinations of baseline and protocol, see left_out.csv")
    return out


class Renderings(NamedTuple):
    """Data of a baseline, one row per rendering of a clip.

    Attributes:
        features: (n, n_features); ratings: (n, 19); groups: content group (n,).
        folds: (n,); rows with a negative fold are neither used for training nor predicted.
    """

    features: np.ndarray
    ratings: np.ndarray
    groups: np.ndarray
    folds: np.ndarray


def fold_by_fold(
    baseline: str, data: Renderings, seed: int, log: Callable[[str], None]
) -> dict[str, np.ndarray]:
    """For each fold, fit a baseline in ``STATISTICS`` or ``NETWORKS`` on the other folds and
    predict the fold.

    Returns:
        model -> (n, 19), NaN outside the folds; a statistics baseline is several models, see
        `baselines`.
    """
    rated: dict[str, np.ndarray] = {}
    for number in sorted(set(data.folds[data.folds >= 0].tolist())):
        train, test = (data.folds != number) & (data.folds >= 0), data.folds == number
        log(f"fold {number}: {train.sum():,} training renderings, {test.sum():,} held out")
        learned = data.features[train], data.ratings[train]
        if baseline in NETWORKS:
            fitted = NETWORKS[baseline](*learned, seed=seed, groups=data.groups[train])
            said = {baseline: fitted.predict(data.features[test])}
        else:
            fitted = regressors.fit(*learned, seed=seed)
            each = fitted.predict_each(data.features[test])
            said = {baseline: np.mean(list(each.values()), axis=0)}
            said |= {f"{baseline}-{name}": values for name, values in each.items()}
        for name, values in said.items():
            rated.setdefault(name, np.full(data.ratings.shape, np.nan))[test] = values
    return rated


def floor(
    data: Renderings, clips: np.ndarray, index: pd.DataFrame, seed: int, log: Callable[[str], None]
) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The baselines for comparison with a fine-tuned model: ``mlp``, ``audio-stats`` and the
    identity baselines without audio.

    Args:
        clips: name of the clip of each rendering, (n,).

    Returns:
        model -> clips (m,), ratings (m, 19) and predictions (m, 19). Identity baselines that are
        undefined under the protocol are skipped; the reason is logged.
    """

    def log_of(name: str) -> Callable[[str], None]:
        return lambda line: log(f"{name}, {line}")

    made = {}
    for name in ("mlp", "audio-stats"):
        rated = fold_by_fold(name, data, seed, log_of(name))
        made[name] = (clips, data.ratings, rated[name])
    names, first = np.unique(clips, return_index=True)
    facts, ratings = (
        index.set_index("clip").loc[names].reset_index(),
        data.ratings[first].astype(float),
    )
    for name in identity.BASELINES:
        try:
            made[name] = (names, ratings, identity.predict(name, facts, data.folds[first], ratings))
        # undefined under this protocol, or an index without player identities
        except InputError as reason:
            log(f"skipped: {reason}")
    return made


class NotMade(Exception):
    """A baseline is undefined or infeasible under a protocol; the message holds the reason."""


class _Work:
    """Data and output directory of a run."""

    def __init__(self, folder: Path, out: Path, settings: Settings, log: Callable[[str], None]):
        for name in settings.baselines:
            if name not in BASELINES:
                raise InputError(f"unknown baseline {name!r}; choose from {', '.join(BASELINES)}.")
        self.settings, self.log, self.out, self.folder = settings, log, out, folder
        self.index = identity.with_exhaustive(percepiano.load_index(folder))
        for protocol in settings.protocols:
            predictions.check_protocol(self.index, protocol)
        rated = percepiano.read_ratings(folder, self.index)
        self.ratings = np.stack([rated[clip] for clip in self.index["clip"]]).astype(float)
        files = percepiano.find_midi(folder)
        if lacking := [clip for clip in self.index["clip"] if clip not in files]:
            raise InputError(
                f"{folder} lacks the MIDI files of {len(lacking)} clips, such as {lacking[0]};"
                " download it again."
            )
        self.midi = {clip: files[clip] for clip in self.index["clip"]}
        claim_directory(
            out,
            {
                "ratings": hashlib.sha256(self.ratings.tobytes()).hexdigest()[:16],
                "index": hashlib.sha256(self.index.to_csv().encode()).hexdigest()[:16],
                "synthesizers": list(settings.synthesizers),
                "seed": settings.seed,
                "simulated": percepiano.is_simulated(folder),
            },
        )
        self.index.to_csv(out / "index.csv", index=False, lineterminator="\n")

    def make(self, baseline: str, protocol: str) -> None:
        """Write the predictions of one baseline under one protocol, unless they exist.

        Raises:
            NotMade: the baseline is undefined, or there are too many folds to fit it.
        """
        names = [baseline]
        if baseline in STATISTICS:
            names += [f"{baseline}-{regressor}" for regressor in regressors.REGRESSORS]
        paths = {name: self.out / f"predictions_{name}_{protocol}.csv.gz" for name in names}
        if all(path.exists() for path in paths.values()):
            self.log(f"{baseline}, {protocol}: already done")
            return
        started, fold = time.monotonic(), percepiano.fold_of_clip(self.index, protocol)
        clips, ratings, rated = self._rate(baseline, protocol, fold)
        for name, values in rated.items():
            made = predictions.to_table(
                (name, protocol, self.settings.seed), fold, clips, ratings, values
            )
            predictions.write(made, paths[name])
        self.log(f"{baseline}, {protocol}: done in {time.monotonic() - started:.0f} s")

    def _rate(
        self, baseline: str, protocol: str, fold: dict[str, int]
    ) -> tuple[np.ndarray, np.ndarray, dict]:
        """Clip and ratings of each row, and the predictions of each model of the baseline."""
        clips = self.index["clip"].to_numpy()
        folds = np.array([fold.get(clip, -1) for clip in clips])
        if baseline in identity.BASELINES:
            try:
                return (
                    clips,
                    self.ratings,
                    {baseline: identity.predict(baseline, self.index, folds, self.ratings)},
                )
            except identity.NothingKnown as error:
                raise NotMade(f"{error}. Leave it out, or choose another protocol.") from error
        if protocol in identity.EXHAUSTIVE:
            raise NotMade(
                f"{baseline}: {protocol} has {len(set(folds))} folds, too many to fit one model per"
                " fold. Choose another protocol."
            )
        heard = self._heard(baseline)
        told = np.flatnonzero(np.isin(clips, heard[0].index))
        rows = np.tile(told, len(heard))
        x = np.concatenate([one.loc[clips[told]].to_numpy() for one in heard])
        groups = self.index["content_group"].to_numpy()[rows]
        data = Renderings(x, self.ratings[rows], groups, folds[rows])
        rated = fold_by_fold(
            baseline,
            data,
            self.settings.seed,
            lambda line: self.log(f"{baseline}, {protocol}, {line}"),
        )
        return clips[rows], self.ratings[rows], rated

    def _heard(self, baseline: str) -> list[pd.DataFrame]:
        """The features of a baseline: one table per synthesizer, or one of the MIDI files."""
        folder, workers = self.out / "features", self.settings.workers
        if not baseline.startswith("midi-stats"):
            return [
                features.audio_table(self.midi, name, folder, workers, self.log)
                for name in self.settings.synthesizers
            ]
        midi = features.midi_table(self.midi, folder, workers, self.log)
        return [
            (
                midi
                if baseline == "midi-stats"
                else midi.join(self._with_score().add_prefix("score_"), how="inner")
            )
        ]

    def _with_score(self) -> pd.DataFrame:
        """Score features of the clips that match their score; the others are listed in
        ``without_score.csv``."""
        known = percepiano.find_scores(self.folder)
        passage = (
            dict(zip(self.index["clip"], self.index["segment"], strict=True)) | percepiano.MISNAMED
        )
        scores = {clip: known[passage[clip]] for clip in self.midi if passage[clip] in known}
        found, left_out = features.score_table(
            self.midi, scores, self.out / "features", self.settings.workers, self.log
        )
        if left_out:
            rows = pd.DataFrame(left_out.items(), columns=["clip", "reason"])
            rows.to_csv(self.out / "without_score.csv", index=False, lineterminator="\n")
            self.log(
                f"skipped {len(left_out)} clips without a matching score, see without_score.csv"
            )
        return found
