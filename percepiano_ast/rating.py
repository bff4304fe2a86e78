"""Rate a recording with the models of a fine-tuned run, on the 19 dimensions or on those of custom
ratings."""

import functools
import json
import math
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from percepiano_ast import audio
from percepiano_ast.config import (
    FinetuneConfig,
    FrontEnd,
    ModelConfig,
    Statistics,
    from_json,
    lookup,
)
from percepiano_ast.data import batches
from percepiano_ast.dimensions import PERCEPIANO, Questionnaire
from percepiano_ast.errors import InputError
from percepiano_ast.files import as_path
from percepiano_ast.models.cnn import ENCODERS
from percepiano_ast.music.performance_features import PERFORMANCE_FEATURES
from percepiano_ast.training.checkpoints import open_latest
from percepiano_ast.training.finetune import Finetuning, Scaler
from percepiano_ast.transcription import Listener

LONGEST_SECONDS = 100  # of PercePiano's clips
MADE_BY = "notebook 03_finetune_percepiano_gpu or `percepiano finetune`"


@dataclass(frozen=True)
class FoldModel:
    """One fold's self-contained model; ``longest`` is the longest training clip, in seconds."""

    run: Finetuning
    params: dict
    scaler: Scaler
    simulated: bool
    longest: float = LONGEST_SECONDS

    def rate(self, codes: np.ndarray) -> np.ndarray:
        """Ratings (K,) of a whole recording, uint8 codes (time, mel)."""
        return self.distribution(codes)[0]

    def distribution(
        self, codes: np.ndarray, beside: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `rate`, and the predicted standard deviations (K,), not calibrated; NaN if the heads
        predict none.

        Args:
            beside: the result of `beside`, if it is already known.
        """
        windows = batches.clip_windows([codes], n_frames=self.run.model.n_frames, batch_size=16)
        embedding = self.run.embed(self.params, windows, 1)
        beside = self.beside(codes) if beside is None else beside
        if self.run.config.heard and beside is not None:
            embedding = np.concatenate([embedding, beside[None, :]], axis=1)
        found = self.run.distribution(self.params, self.scaler, embedding)
        return found[0][0], found[1][0]

    def beside(self, codes: np.ndarray) -> np.ndarray | None:
        """Extra inputs of the heads: descriptors of the transcription, or their mean without notes;
        None for other models."""
        if not self.run.config.heard:
            return None
        found = self._listener.describe(codes)
        return self.params["unheard"] if found is None else found

    @functools.cached_property
    def _listener(self) -> Listener:
        run = self.run
        assert isinstance(run.model, ModelConfig)  # the only encoder that can transcribe
        return Listener(self.params, run.model, run.front_end, run.statistics, run.execution)


class Rater:
    """All fold models of a run: the rating is their mean, the uncertainty their standard deviation.

    If the heads predict an uncertainty, the result is the standard deviation of the mixture of
    their normal distributions: its variance is the mean of the calibrated predicted variances plus
    the variance between folds (Lakshminarayanan et al. 2017, section 2.4).

    Args:
        run: directory of a run, or the store of its models.
        model: its name below ``run/finetune``; by default the only one, or the pre-trained one.

    Raises:
        InputError: no such model, or no finished fold.
    """

    def __init__(self, run: str | Path, model: str = ""):
        home = _model_directory(as_path(run) / "finetune", model)
        self.name = home.name
        finished = sorted({marker.parent for marker in home.glob("fold_*/model/step_*.json")})
        if not finished:
            raise InputError(f"no fold in {home} is finished. Run {MADE_BY} to resume")
        self.models = [_load(folder) for folder in finished]
        self.questionnaire = self.models[0].run.questionnaire
        factor = home / "temperature.json"
        self.temperature = (
            json.loads(factor.read_text())["temperature"] if factor.exists() else None
        )
        # held out for each model
        self.folds = [int(path.parent.name.removeprefix("fold_")) for path in finished]
        self.unfinished = sorted(
            {path.name for path in home.glob("fold_*")} - {path.parent.name for path in finished}
        )

    def rate(self, file: str | Path) -> dict:
        """``{"file", "ratings", "uncertainty", "warnings"}`` for one recording, with values on the
        questionnaire's scales.

        Raises:
            InputError: see ``audio.load``.
        """
        front_end = self.models[0].run.front_end
        wave = audio.load(file, front_end.sample_rate)
        codes, clipped = audio.quantize(audio.log_mel(wave, front_end), front_end)
        # In float64, so that rounded values print with four digits.
        # the encoder is frozen, so this is the same for all folds
        beside = self.models[0].beside(codes)
        found = [model.distribution(codes, beside) for model in self.models]
        rated, predicted = np.stack(found, axis=1).astype(np.float64)
        mean, variance = rated.mean(axis=0), rated.var(axis=0)
        warnings = []
        if np.isfinite(predicted).all():
            variance += np.square((self.temperature or 1.0) * predicted).mean(axis=0)
            if self.temperature is None:
                warnings.append(
                    "the uncertainty is not calibrated: calibration needs all folds; finish"
                    " training them"
                )
        if self.unfinished:
            warnings.append(
                f"{', '.join(self.unfinished)} of {self.name} not finished: rated with the other"
                " folds only"
            )
        if clipped:
            warnings.append(
                f"{clipped:.2%} of it is above the model's loudest level; export it within full"
                " scale"
            )
        if self.models[0].simulated:
            warnings.append(
                "this model was trained on simulated ratings: its values are meaningless for real"
                " performances"
            )
        if (seconds := len(wave) / front_end.sample_rate) > (longest := self.models[0].longest):
            warnings.append(f"{seconds:.0f} s long; the longest training clip has {longest:.0f} s")
        ratings, uncertainty = (
            _rounded(mean, self.questionnaire),
            _rounded(np.sqrt(variance), self.questionnaire),
        )
        warnings += self._beyond(ratings)
        return {
            "file": str(file),
            "ratings": ratings,
            "uncertainty": uncertainty,
            "warnings": warnings,
        }

    def _beyond(self, ratings: dict[str, float]) -> list[str]:
        """A warning for each rating outside its scale; ratings are not clipped."""
        asked = self.questionnaire
        return [
            f"{name} is {ratings[name]:g}, outside the scale of the training ratings, {low:g} to"
            f" {high:g}"
            for name, low, high in zip(asked.names, asked.lowest, asked.highest)
            if not low <= ratings[name] <= high
        ]

    def rate_or_explain(self, file: str | Path) -> dict:
        """``rate``, or ``{"file", "error"}`` if the file cannot be rated."""
        try:
            return self.rate(file)
        except InputError as error:
            return {"file": str(file), "error": str(error)}


def require_percepiano(rater: Rater, what: str) -> None:
    """Raises InputError if the models predict custom ratings, which the command ``what`` does not
    support."""
    if (asked := rater.models[0].run.questionnaire) != PERCEPIANO:
        raise InputError(
            f"{rater.name} predicts custom ratings ({', '.join(asked.names)}), but {what} supports"
            f" only PercePiano's {len(PERCEPIANO.names)} dimensions. Choose a run that was"
            " fine-tuned on PercePiano"
        )


def require_explained(rater: Rater) -> None:
    """Raises InputError if ratings depend on inputs that ``explain`` does not cover."""
    require_percepiano(rater, "explain")
    if rater.models[0].run.config.heard:
        raise InputError(
            f"{rater.name} uses transcription descriptors besides its embedding, but explain covers"
            " only the embedding. Choose a model that was fine-tuned without `heard=true`"
        )


def _digits(low: float, high: float) -> int:
    """Number of decimals for a resolution of a hundredth of the scale."""
    return max(2 - math.floor(math.log10(high - low)), 0)


def _rounded(values: np.ndarray, asked: Questionnaire) -> dict[str, float]:
    """Values by dimension, rounded to a ten-thousandth of the scale."""
    digits = (_digits(low, high) + 2 for low, high in zip(asked.lowest, asked.highest))
    return {
        name: float(value.round(places)) for name, value, places in zip(asked.names, values, digits)
    }


def names_of_models(home: Path) -> list[str]:
    """Names of all fine-tuned models in ``home``, the folder ``finetune`` of a run or its store."""
    return sorted(path.name for path in home.glob("*") if path.is_dir())


def _model_directory(home: Path, model: str) -> Path:
    names = names_of_models(home)
    if not names:
        raise InputError(f"no model in {home}. Run {MADE_BY} first")
    if model:
        return lookup({name: home / name for name in names}, model, "model")
    wanted = [name for name in names if name.endswith("-ssast")] or names
    if len(wanted) > 1:
        raise InputError(f"{home} has several models: {', '.join(wanted)}. Choose one with --model")
    return home / wanted[0]


def _say(line: str) -> None:
    print(line, file=sys.stderr)  # standard output is for ratings only


def _load(folder: Path) -> FoldModel:
    tree, meta = open_latest(folder, made_by=MADE_BY, log=_say)
    front_end, statistics = FrontEnd(**meta["front_end"]), Statistics(**meta["statistics"])
    if odd := meta["finetune"].keys() - {field.name for field in fields(FinetuneConfig)}:
        raise InputError(
            f"{folder} was written by version {meta['code_version']}, with other settings"
            f" ({', '.join(sorted(odd))}). Run {MADE_BY} again in a new directory, or rate with"
            " that version"
        )
    name = meta["model"]["name"]
    kind = ENCODERS[name].config if name in ENCODERS else ModelConfig
    model, config = from_json(kind, meta["model"]), from_json(FinetuneConfig, meta["finetune"])
    beside = len(PERFORMANCE_FEATURES) if config.heard else 0
    if config.heard and (told := len(tree["params"]["unheard"])) != beside:
        raise InputError(
            f"{folder} was written by version {meta['code_version']}, whose heads use {told}"
            f" descriptors, not {beside}. Run {MADE_BY} again in a new directory, or rate with that"
            " version"
        )
    questionnaire = Questionnaire.from_settings(meta)
    run = Finetuning(
        model, config, front_end, statistics, 1, questionnaire=questionnaire, beside=beside
    )
    longest = meta.get("longest", LONGEST_SECONDS)
    return FoldModel(run, tree["params"], Scaler(**tree["scaler"]), meta["simulated"], longest)


def as_text(results: list[dict], questionnaire: Questionnaire = PERCEPIANO) -> str:
    """The results as readable text: one line per dimension, with the two ends of its scale."""
    lines, width = [], max(17, *(len(dimension.family) for dimension in questionnaire.dimensions))
    for result in results:
        lines.append(result["file"])
        if "error" in result:
            lines.append(f"  not rated: {result['error']}")
            continue
        lines += [f"  note: {warning}" for warning in result["warnings"]]
        scales = zip(questionnaire.dimensions, questionnaire.lowest, questionnaire.highest)
        for (key, family, low, high), lowest, highest in scales:
            value, spread, digits = (
                result["ratings"][key],
                result["uncertainty"][key],
                _digits(lowest, highest),
            )
            bar = "." * round(20 * min(max((value - lowest) / (highest - lowest), 0), 1))
            numbers = f"{value:.{digits}f} +- {spread:.{digits}f}"
            lines.append(f"  {family:{width}} {low:>23} {bar + '|':21} {high:20} {numbers}")
    return "\n".join(lines)
