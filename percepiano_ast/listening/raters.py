"""Rating functions for the sensitivity test: any object with the interface of `Rate`.

Ratings of the statistics baselines and of fine-tuned runs are held out: each clip is rated by a
model fitted without its content group.
"""

import hashlib
import importlib
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd

from percepiano_ast import audio, inference
from percepiano_ast.audio import features as audio_features
from percepiano_ast.data import percepiano
from percepiano_ast.dimensions import KEYS
from percepiano_ast.errors import InputError
from percepiano_ast.inference import rate, regressors
from percepiano_ast.inference.rate import BUNDLED, RatingModelFile
from percepiano_ast.music import performance_features as midi_features

PROTOCOL = "content"
SAMPLE_RATE = 22_050

Take = Any  # a wave or a `Performance`, depending at run time on the attribute `hears`


class Rate(Protocol):
    """Anything that rates performances.

    Attributes:
        name: model name in tables.
        `hears`: type of input, ``audio`` or ``midi``.
        sample_rate: of the audio input in Hz; not used for ``midi``.
        key: cache key of the ratings; must change whenever the ratings would.
    """

    name: str
    hears: str
    sample_rate: int
    key: str

    def rate(self, clip: str, takes: Sequence[Take]) -> np.ndarray:
        """Ratings (n, 19), 0 to 1, of takes of one clip: waves float32 (n_samples,), or
        performances."""


def imported(name: str) -> Rate:
    """Import a rating function: ``module:attribute`` names a `Rate`, such as ``my_model:rater`` in
    ``my_model.py``.

    Raises:
        InputError: no such module or attribute, or it lacks a member of `Rate`.
    """
    module, _, attribute = name.partition(":")
    try:
        rate = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"cannot import {name!r} ({error}); write module:attribute with a module on Python's"
            " path."
        ) from error
    if missing := [
        member
        for member in ("name", "hears", "sample_rate", "key", "rate")
        if not hasattr(rate, member)
    ]:
        needed = "`name`, `hears`, `sample_rate`, `key` and `rate`"
        raise InputError(f"{name} has no {', '.join(missing)}; a rating function needs {needed}.")
    return rate


class StatisticsRater:
    """A statistics baseline: features, and for each fold a model fitted on the clips outside it.
    Implements `Rate`.

    Args:
        `name, hears, key`: see `Rate`.
        `hear`: feature extractor, a take -> (n_features,).
        fold: fold of each clip.
        models: fold -> anything with ``predict(features) -> ratings``.
    """

    sample_rate = SAMPLE_RATE

    def __init__(
        self, name: str, hears: str, key: str, hear: Callable, fold: dict[str, int], models: dict
    ):
        self.name, self.hears, self.key = name, hears, key
        self._hear, self._fold, self._models = hear, fold, models

    def rate(self, clip: str, takes: Sequence[Take]) -> np.ndarray:
        """See `Rate.rate`."""
        return self._models[self._fold[clip]].predict(
            np.stack([self._hear(take) for take in takes])
        )


class Statistics(NamedTuple):
    """Input of a statistics baseline: type (audio or midi), feature extractor, and hash of its
    source code."""

    hears: str
    hear: Callable[[Take], np.ndarray]
    code: str


def _code(*modules: ModuleType) -> str:
    """Hash of the source of modules and packages."""
    content = hashlib.sha256()
    for path in (Path(inspect.getfile(module)) for module in modules):
        for file in sorted(path.parent.glob("*.py")) if path.name == "__init__.py" else [path]:
            content.update(file.read_bytes())
    return content.hexdigest()


STATISTICS = {
    "audio-stats": Statistics(
        "audio",
        lambda wave: np.array(list(audio.audio_features(wave, SAMPLE_RATE).values())),
        _code(audio_features),
    ),
    "midi-stats": Statistics(
        "midi",
        lambda performance: np.array(
            list(midi_features.performance_features(performance).values())
        ),
        _code(midi_features),
    ),
}


def fit_statistics(
    name: str, features: pd.DataFrame, ratings: np.ndarray, index: pd.DataFrame, seed: int
) -> StatisticsRater:
    """Fit a statistics baseline (a name in ``STATISTICS``) fold by fold.

    Args:
        features: one row per clip, with the clips as index.
        ratings: (n_clips, 19), in the same order.
        index: its ``content`` folds are held out; clips without a fold are not used for training.

    Raises:
        InputError: the index has no such folds, or a content group in two folds; see
            `regressors.fit`.
    """
    fold = percepiano.fold_of_clip(index, PROTOCOL)
    folds = np.array([fold.get(clip, -1) for clip in features.index])
    x, y, models = features.to_numpy(), np.asarray(ratings), {}
    for held_out in sorted(set(fold.values())):
        train = (folds != held_out) & (folds >= 0)
        models[held_out] = regressors.fit(x[train], y[train], seed=seed)
    content = hashlib.sha256(x.tobytes() + y.tobytes() + folds.tobytes())
    key = f"{name} {seed} {content.hexdigest()} {STATISTICS[name].code} {_code(regressors)}"
    return StatisticsRater(name, STATISTICS[name].hears, key, STATISTICS[name].hear, fold, models)


class RunRater:
    """The fold models of a fine-tuned run; each clip is rated by the model that held it out.

    Args:
        run: its directory or storage location.
        index: index of the training, with its folds.
        model: name below ``run/finetune``, see `rate.FoldEnsemble`.

    Raises:
        InputError: no such model, none finished, or folds that are not in the index.
    """

    hears = "audio"

    def __init__(self, run: str | Path, index: pd.DataFrame, model: str = ""):
        rater = rate.FoldEnsemble(run, model)
        rate.require_percepiano(rater, "listen")
        self.name, self._models = rater.name, dict(zip(rater.folds, rater.models, strict=True))
        self._front_end = rater.models[0].run.front_end
        self.sample_rate = self._front_end.sample_rate
        self._fold = percepiano.fold_of_clip(index, rater.models[0].run.config.protocol)
        if missing := sorted(set(self._fold.values()) - set(self._models)):
            raise InputError(
                f"fold {missing[0]} of {self.name} in {run} is not finished, so its clips have no"
                f" held-out model. Run {rate.MADE_BY} again; it resumes."
            )
        content = hashlib.sha256()
        for fold, one in sorted(self._models.items()):
            content.update(
                f"{fold} {one.run.model} {one.run.front_end} {_digest(one.params)}"
                f" {_digest(one.scaler)}".encode()
            )
        self.key = f"{self.name} {content.hexdigest()}"

    def rate(self, clip: str, takes: Sequence[Take]) -> np.ndarray:
        """See `Rate.rate`."""
        model, front_end = self._models[self._fold[clip]], self._front_end
        codes = (audio.quantize(audio.log_mel(wave, front_end), front_end)[0] for wave in takes)
        return np.stack([model.rate(one) for one in codes]).astype(np.float64)


class PackagedRater:
    """A single-file model (`RatingModelFile`). Implements `Rate`.

    Its ratings are not held out: the bundled model was trained on all clips of PercePiano. Its
    sensitivity to changes of the playing is informative nevertheless.

    Args:
        path: by default the bundled model.

    Raises:
        InputError: missing or wrong file.
    """

    hears = "audio"

    def __init__(self, path: str | Path = BUNDLED):
        self._model = RatingModelFile.read(path)
        self.name, self.sample_rate = Path(path).stem, self._model.sample_rate
        self.key = (
            f"{self.name} {hashlib.sha256(Path(path).read_bytes()).hexdigest()}"
            f" {_code(inference, audio_features)}"
        )

    def rate(self, clip: str, takes: Sequence[Take]) -> np.ndarray:
        """See `Rate.rate`."""
        said = (self._model.rate_wave(wave, with_course=False).ratings for wave in takes)
        return np.array([[one[key] for key in KEYS] for one in said])


def _digest(tree) -> str:
    import jax

    content = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        content.update(np.asarray(leaf).tobytes())
    return content.hexdigest()
