"""Ratings by regressors on an encoder's transcription, its embeddings and sound statistics, under
every protocol.

The regressors are those of the statistics baselines (`inference.regressors`), which are better than
networks on a thousand clips. In each fold, one of the feature sets in `SETS` is chosen by its error
in an inner cross-validation on the fold's training clips. Every set is also reported separately.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from percepiano_ast.data import percepiano
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation import predictions
from percepiano_ast.files import claim_directory, echo, write_json
from percepiano_ast.inference import regressors
from percepiano_ast.music.score import read_score
from percepiano_ast.music.score_features import score_feature_table
from percepiano_ast.suite.heard import HeardClips, hear
from percepiano_ast.suite.rated import Rated
from percepiano_ast.suite.rating import percepiano_source, rated_clips_of
from percepiano_ast.suite.run import Run, start_of

# Feature sets of the regressors; each is a separate model, ``<encoder>-<set>``. Sound alone is the
# baseline ``audio-stats``.
SETS: dict[str, tuple[str, ...]] = {
    "embedding": ("embedding",),
    "notes": ("notes",),
    "notes-sound": ("notes", "sound"),
    "notes-sound-embedding": ("notes", "sound", "embedding"),
}
JUDGED = "judged"  # the set chosen by the inner cross-validation
SCORE = "+score"


class Material(NamedTuple):
    """Training data of the regressors, one row per rendering.

    Attributes:
        parts: name -> (n, columns).
        ratings: (n, 19); groups: content group (n,).
        unseen: Bool (n,), renderings by the held-out soundfont.
    """

    parts: dict[str, np.ndarray]
    ratings: np.ndarray
    groups: np.ndarray
    unseen: np.ndarray

    def features(self, names: tuple[str, ...]) -> np.ndarray:
        """The named parts, concatenated."""
        return np.concatenate([self.parts[name] for name in names], axis=1)


def judge(
    run: Run,
    init: str,
    folder: str = "",
    *,
    protocols: tuple[str, ...] = (),
    source: str = "",
    log: Callable[[str], None] = echo,
) -> list[Path]:
    """Rate all clips under every protocol, with regressors on the encoder's output; returns the
    paths of the predictions.

    Writes ``predictions_<model>_<protocol>.csv.gz`` below ``judged`` in the run: one for each of
    `SETS`, for the chosen set, for the chosen set with score features (``+score``), and each again
    for renderings by the held-out soundfont ``unseen``. The mean over the training pianos is better
    than the prediction for a single one. For a fair comparison with the single held-out soundfont,
    predictions of the chosen set are also written for each training piano. Existing files are not
    computed again.

    Args:
        init: a pre-training with transcription, of this run or saved in the file ``source``.
        folder: PercePiano's, for its scores; by default the preset's.
        protocols: names in the index; by default all.

    Raises:
        InputError: an encoder without transcription; an unknown protocol; see `suite.start_of`.
    """
    rated, home, material = listened(run, init, folder, source, log)
    written = []
    for protocol in protocols or predictions.protocols(rated.index):
        work = _Work(rated, material, home, protocol, log)
        written += work.make()
    return written


def listened(
    run: Run, init: str, folder: str, source: str, log: Callable[[str], None]
) -> tuple[Rated, Path, Material]:
    """The rated clips, the folder of the regressors' predictions, and the regressors' training
    data; see `judge`."""
    frozen = dataclasses.replace(run.preset.finetune, strategy="frozen")
    start = start_of(run, init, source, log)
    rated = rated_clips_of(run, start, frozen, log)[0]
    heard = hear(rated)
    settings = {"heard": heard.key, "seed": frozen.seed, "unseen": frozen.unseen}
    home = claim_directory(run.root / JUDGED / start.name, settings)
    return rated, home, material_of(rated, heard, percepiano_source(run, folder, log), home, log)


def material_of(
    rated: Rated, heard: HeardClips, folder: Path, home: Path, log: Callable[[str], None] = echo
) -> Material:
    """Features of the rated clips: transcription descriptors, embeddings, sound statistics, and
    score features from the scores in PercePiano's ``folder``. Renderings that do not match their
    score are listed in ``home``."""
    clips = rated.clips
    sound = pd.read_csv(
        rated.run.percepiano_in(rated.front_end) / "classic_features.csv"
    ).set_index(["clip", "synthesizer"])
    parts = {"notes": heard.described(log).values}
    if heard.embeddings is not None:
        parts["embedding"] = heard.embeddings
    parts["sound"] = sound.loc[list(zip(clips.clip, clips.synthesizer))].to_numpy(np.float32)
    parts["score"] = _with_score(rated, heard, folder, home, log)
    groups = rated.index.set_index("clip").loc[clips.clip, "content_group"].to_numpy()
    return Material(parts, clips.ratings.astype(float), groups, rated.unseen)


def _with_score(
    rated: Rated, heard: HeardClips, folder: Path, home: Path, log: Callable[[str], None]
) -> np.ndarray:
    """Score features of every rendering (n, features + 1). If the transcription does not match the
    score, they are 0, the neutral value of all features, and the last column is 1."""
    clips, scores = rated.clips, {}
    for name, path in percepiano.find_scores(folder).items():
        try:
            scores[name] = read_score(path)
        except InputError as reason:
            log(f"skipped: {reason}")
    passage = (
        dict(zip(rated.index["clip"], rated.index["segment"], strict=True)) | percepiano.MISNAMED
    )
    found, left_out = score_feature_table(
        {str(row): one for row, one in enumerate(heard.played) if one is not None},
        {str(row): scores.get(passage[clip]) for row, clip in enumerate(clips.clip)},
    )
    if left_out:
        rows = [int(row) for row in left_out]
        pd.DataFrame(
            {
                "clip": clips.clip[rows],
                "synthesizer": np.array(clips.synthesizer)[rows],
                "reason": left_out.values(),
            }
        ).to_csv(home / "without_score.csv", index=False, lineterminator="\n")
        log(
            f"{len(left_out)} of {len(clips.clip)} renderings do not match their score, see"
            " without_score.csv"
        )
    found.index = found.index.astype(int)
    every = found.reindex(range(len(clips.clip)))
    return np.column_stack([every.fillna(0.0).to_numpy(), every.isna().all(axis=1)]).astype(
        np.float32
    )


class _Work:
    """One protocol."""

    def __init__(
        self,
        rated: Rated,
        material: Material,
        home: Path,
        protocol: str,
        log: Callable[[str], None],
    ):
        self.rated, self.material, self.home, self.protocol, self.log = (
            rated,
            material,
            home,
            protocol,
            log,
        )
        self.fold = percepiano.fold_of_clip(rated.index, protocol)
        self.folds = np.array([self.fold.get(clip, -1) for clip in rated.clips.clip])

    def make(self) -> list[Path]:
        """Write the predictions of all models."""
        which = {name: self._renderings(name) for name in (*SETS, JUDGED, JUDGED + SCORE)}
        paths = [
            self._path(self._model(name, kind)) for name, kinds in which.items() for kind in kinds
        ]
        if not all(path.exists() for path in paths):
            for name, said in self._said().items():
                for kind, rows in which[name].items():
                    self._write(said, rows & np.isfinite(said).all(axis=1), self._model(name, kind))
        return paths

    def _renderings(self, name: str) -> dict[str, np.ndarray]:
        """Kind -> renderings, bool (n,): all training pianos (``""``), the held-out soundfont, and,
        for the chosen set, each training piano if there are several."""
        pianos, unseen = np.array(self.rated.clips.synthesizer), self.material.unseen
        kinds = {"": ~unseen}
        if self.rated.config.unseen:
            kinds[self.rated.config.unseen] = unseen
        seen = sorted(set(pianos[~unseen].tolist()))
        return kinds | {
            piano: pianos == piano for piano in seen if name == JUDGED and len(seen) > 1
        }

    def _model(self, name: str, kind: str) -> str:
        return f"{self.rated.start.name}-{name}" + (f"@{kind}" if kind else "")

    def _path(self, model: str) -> Path:
        return self.home / f"predictions_{model}_{self.protocol}.csv.gz"

    def _said(self) -> dict[str, np.ndarray]:
        """Model -> ratings (n, 19), NaN outside the folds."""
        said: dict[str, np.ndarray] = {}
        choices = {}
        for number in sorted(set(self.folds[self.folds >= 0].tolist())):
            started = time.monotonic()
            train, test = (
                (self.folds != number) & (self.folds >= 0) & ~self.material.unseen,
                self.folds == number,
            )
            errors = {name: self._inner_error(parts, train) for name, parts in SETS.items()}
            best = min(errors, key=errors.__getitem__)
            rated = {name: self._rate(parts, train, test) for name, parts in SETS.items()}
            rated |= {
                JUDGED: rated[best],
                JUDGED + SCORE: self._rate((*SETS[best], "score"), train, test),
            }
            for name, values in rated.items():
                said.setdefault(name, np.full(self.material.ratings.shape, np.nan))[test] = values
            choices[number] = {"chosen": best} | {
                name: round(error, 4) for name, error in errors.items()
            }
            self.log(
                f"{self.protocol}, fold {number}: chose {best}, {time.monotonic() - started:.0f} s"
            )
        write_json(self.home / f"chosen_{self.protocol}.json", choices)
        return said

    def _inner_error(self, parts: tuple[str, ...], train: np.ndarray) -> float:
        learned = (
            self.material.features(parts)[train],
            self.material.ratings[train],
            self.material.groups[train],
        )
        return regressors.inner_error(*learned, seed=self.rated.config.seed)

    def _rate(self, parts: tuple[str, ...], train: np.ndarray, test: np.ndarray) -> np.ndarray:
        features = self.material.features(parts)
        fitted = regressors.fit(
            features[train], self.material.ratings[train], seed=self.rated.config.seed
        )
        return fitted.predict(features[test])

    def _write(self, said: np.ndarray, rows: np.ndarray, model: str) -> None:
        run = model, self.protocol, self.rated.config.seed
        of_rows = self.rated.clips.clip[rows], self.material.ratings[rows], said[rows]
        predictions.write(predictions.to_table(run, self.fold, *of_rows), self._path(model))
