"""Attribution maps of recordings, one per dimension, averaged over all fold models of a run."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pandas as pd

from percepiano_ast import audio
from percepiano_ast.audio.mel import window_starts
from percepiano_ast.config import Execution, FrontEnd, ModelConfig, lookup
from percepiano_ast.dimensions import KEYS
from percepiano_ast.errors import InputError
from percepiano_ast.inference.rate import FoldEnsemble, FoldModel, require_explained
from percepiano_ast.models import attribution
from percepiano_ast.models.heads import RatingModel, moments_to_embedding
from percepiano_ast.training.finetune import Finetuning
from percepiano_ast.training.state import normalise

SECONDS = 5.0  # of an excerpt
FADE = 0.03  # seconds at both ends of an excerpt
BASELINES = ("mean", "silence")
# integrated gradients (signed); the others from attention, 0 or more
METHODS = ("gradients", "relevance", "rollout")
# on the rating's scale: steps are doubled until the unexplained remainder is smaller
TOLERANCE = 0.005
MOST_STEPS = 4 * attribution.STEPS


@dataclass(frozen=True, eq=False)
class Recording:
    """A recording and its spectrogram, the input of the models.

    Attributes:
        name: file name without suffix.
        wave: float32 (n,), mono.
        level: float32 (T, F) in dB, quantised by the front end.
    """

    name: str
    wave: np.ndarray
    level: np.ndarray
    front_end: FrontEnd

    @property
    def seconds(self) -> float:
        """Duration."""
        return len(self.wave) / self.front_end.sample_rate


@dataclass(frozen=True, eq=False)
class Excerpt:
    """The excerpt of a recording with the largest contribution to a rating.

    Attributes:
        start, stop: seconds.
        wave: float32 (n,), faded at both ends.
        contribution: signed contribution to the rating (sum of the map).
    """

    start: float
    stop: float
    wave: np.ndarray
    contribution: float


@dataclass(frozen=True, eq=False)
class Explanation:
    """Attribution of one rating of one recording; all values on the rating's scale of 0 to 1.

    Attributes:
        recording, dimension: the explained rating.
        rating, baseline: ratings of the recording and of the baseline, means over the fold models.
        gap: ``rating - baseline`` minus the sum of ``maps["gradients"]``.
        maps: method -> float32 (T, F), see `METHODS`.
    """

    recording: Recording
    dimension: str
    rating: float
    baseline: float
    gap: float
    maps: dict[str, np.ndarray]

    @property
    def map(self) -> np.ndarray:
        """Integrated gradients, signed."""
        return self.maps["gradients"]

    def over_time(self) -> np.ndarray:
        """Contribution of every frame, float64 (T,)."""
        return self.map.sum(axis=1, dtype=np.float64)

    def seconds_table(self) -> pd.DataFrame:
        """Contribution of every second: ``start`` (s), ``contribution``."""
        per_second = self.recording.front_end.sample_rate / self.recording.front_end.hop_length
        number = (np.arange(len(self.map)) / per_second).astype(int)
        return pd.DataFrame(
            {"start": np.unique(number), "contribution": np.bincount(number, self.over_time())}
        )

    def bands_table(self) -> pd.DataFrame:
        """Contribution of every mel band: ``hertz`` (its centre), ``contribution``."""
        hertz = audio.band_centres(self.recording.front_end)
        return pd.DataFrame(
            {"hertz": hertz.round(1), "contribution": self.map.sum(axis=0, dtype=np.float64)}
        )

    def stretch(self, seconds: float = SECONDS) -> tuple[float, float, float]:
        """The excerpt of ``seconds`` with the largest absolute contribution, or the entire
        recording if it is shorter.

        Returns:
            start and stop in seconds, and the contribution.

        Raises:
            InputError: ``seconds`` is not above 0.
        """
        if not seconds > 0:
            raise InputError(f"excerpt length is {seconds:g} seconds; give a number above 0.")
        front_end = self.recording.front_end
        n = min(
            max(round(seconds * front_end.sample_rate / front_end.hop_length), 1), len(self.map)
        )
        sums = np.concatenate([[0.0], np.cumsum(self.over_time())])
        contributions = sums[n:] - sums[:-n]
        first = int(np.argmax(np.abs(contributions)))
        return front_end.seconds(first), front_end.seconds(first + n), float(contributions[first])

    def excerpt(self, seconds: float = SECONDS) -> Excerpt:
        """The audio of `stretch`.

        Raises:
            InputError: ``seconds`` is not above 0.
        """
        start, stop, contribution = self.stretch(seconds)
        rate, wave = self.recording.front_end.sample_rate, self.recording.wave
        first = round(start * rate)
        piece = wave[first : min(round(stop * rate), len(wave))].copy()
        fade = min(round(FADE * rate), len(piece) // 2)
        slope = (0.5 - 0.5 * np.cos(np.pi * (np.arange(fade) + 0.5) / max(fade, 1))).astype(
            np.float32
        )
        piece[:fade] *= slope
        piece[len(piece) - fade :] *= slope[::-1]
        return Excerpt(start, (first + len(piece)) / rate, piece, contribution)


class Explainer:
    """Explains the ratings of the fold models of ``rater``, averaged over folds, in float32.

    Args:
        rater: fold models of a fine-tuned run.
        baseline: see the package docstring.
        steps, most_steps: initial and maximum number of steps of integrated gradients, doubled
            while ``Explanation.gap`` is above `TOLERANCE`.

    Raises:
        InputError: unknown baseline, or a model of custom ratings.
    """

    def __init__(
        self,
        rater: FoldEnsemble,
        baseline: str = "mean",
        steps: int = attribution.STEPS,
        most_steps: int = MOST_STEPS,
    ):
        lookup(dict.fromkeys(BASELINES), baseline, "baseline")
        require_explained(rater)
        self.models, self.name, self.baseline = rater.models, rater.name, baseline
        self.steps, self.most_steps = steps, most_steps
        self.front_end = rater.models[0].run.front_end
        self.simulated = rater.models[0].simulated

    @staticmethod
    def listen(run: Finetuning) -> attribution.Listener:
        """The run's model in the form that attribution needs."""
        return listener(run)

    def hear(self, file: str | Path) -> Recording:
        """Load a recording as `FoldEnsemble.rate` does.

        Raises:
            InputError: see ``audio.load``.
        """
        wave = audio.load(file, self.front_end.sample_rate)
        codes, _ = audio.quantize(audio.log_mel(wave, self.front_end), self.front_end)
        return Recording(
            Path(file).stem.strip(), wave, audio.dequantize(codes, self.front_end), self.front_end
        )

    def excerpt(
        self, recording: str | Path | Recording, dimension: str, seconds: float = SECONDS
    ) -> Excerpt:
        """The audio excerpt with the largest contribution to this rating.

        Raises:
            InputError: unreadable file or unknown dimension.
        """
        heard = recording if isinstance(recording, Recording) else self.hear(recording)
        return self.explain(heard, [dimension], methods=("gradients",))[0].excerpt(seconds)

    def baseline_of(self, level: np.ndarray) -> np.ndarray:
        """Levels in dB (T, F) -> those of the baseline."""
        mean = (
            level.mean(axis=0)
            if self.baseline == "mean"
            else np.full(level.shape[1], self.front_end.floor_db)
        )
        return np.broadcast_to(mean.astype(np.float32), level.shape)

    def rate(self, variants: Iterable[np.ndarray]) -> np.ndarray:
        """Ratings (V, 19) of V variants of a recording, levels in dB (T, F) of equal shape; means
        over the fold models."""
        rated = []
        for part in _parts(variants):  # in batches: the variants of a long recording are large
            starts = window_starts(len(part[0]), self.models[0].run.model.n_frames)
            each = []
            for model in self.models:
                heard = [_heard(model, level) for level in part]
                each.append(
                    attribution.rate_variants(self.listen(model.run), _params(model), heard, starts)
                )
            rated.append(np.mean(each, axis=0))
        return np.concatenate(rated)

    def explain(
        self, recording: Recording, dimensions: Iterable[str], methods: tuple[str, ...] = METHODS
    ) -> list[Explanation]:
        """One explanation for each of ``dimensions``.

        Cost per fold model: integrated gradients take ``steps`` x windows x (two forward passes and
        one backward pass per dimension), attention maps three passes per window.

        Raises:
            InputError: unknown dimension.
        """
        dimensions = list(dimensions)
        chosen = [
            lookup({key: i for i, key in enumerate(KEYS)}, key, "dimension") for key in dimensions
        ]
        found = self._integrate(recording.level, chosen)
        ratings, baselines, gaps = (
            np.mean([one[part] for one in found], axis=0) for part in range(1, 4)
        )
        maps = {"gradients": np.mean([one.maps for one in found], axis=0)}
        if set(methods) - {"gradients"}:
            maps |= self._attention(
                recording.level, chosen, np.where(ratings >= baselines, 1.0, -1.0)
            )
        return [
            Explanation(
                recording,
                key,
                float(ratings[i]),
                float(baselines[i]),
                float(gaps[i]),
                {name: maps[name][i] for name in methods},
            )
            for i, key in enumerate(dimensions)
        ]

    def _integrate(self, level: np.ndarray, chosen: list[int]) -> list[attribution.Attribution]:
        """Integrated gradients of every fold model."""
        steps, baseline = self.steps, self.baseline_of(level)
        while True:
            found = []
            for model in self.models:
                (listener, params, clip), where = self._asked(model, level, chosen)
                silent = _heard(model, baseline)
                found.append(
                    attribution.integrated_gradients(
                        listener, params, clip, silent, **where, steps=steps
                    )
                )
            gap = np.mean([one.gap for one in found], axis=0)
            if np.abs(gap).max() <= TOLERANCE or 2 * steps > self.most_steps:
                return found
            steps *= 2

    def _attention(
        self, level: np.ndarray, chosen: list[int], towards: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Attention maps, (D, T, F) each, means over the fold models."""
        each = []
        for model in self.models:
            asked, where = self._asked(model, level, chosen)
            each.append(attribution.attention_maps(*asked, **where, towards=towards))
        rollout, relevance = (np.mean(maps, axis=0) for maps in zip(*each))
        return {"rollout": np.broadcast_to(rollout, relevance.shape), "relevance": relevance}

    def _asked(self, model: FoldModel, level: np.ndarray, chosen: list[int]) -> tuple[tuple, dict]:
        """The first arguments of every function of `attribution`."""
        starts = window_starts(len(level), model.run.model.n_frames)
        return (self.listen(model.run), _params(model), _heard(model, level)), {
            "starts": starts,
            "dimensions": chosen,
        }

    def randomised(self, seed: int, steps: int) -> Iterator[tuple[str, "Explainer"]]:
        """This explainer with ``steps`` steps and weights randomised from the top layer down, see
        ``attribution.randomised``."""
        stages = [
            attribution.randomised(model.params, model.run.init(seed + i))
            for i, model in enumerate(self.models)
        ]
        for parts in zip(*stages):
            other = object.__new__(type(self))
            models = [
                dataclasses.replace(model, params=params)
                for model, (_, params) in zip(self.models, parts)
            ]
            other.__dict__ = self.__dict__ | {"models": models, "steps": steps, "most_steps": steps}
            yield parts[0][0], other


def _parts(values: Iterable[np.ndarray], size: int = 32) -> Iterator[list[np.ndarray]]:
    values = iter(values)
    while part := list(itertools.islice(values, size)):
        yield part


def _heard(model: FoldModel, level: np.ndarray) -> np.ndarray:
    """Levels in dB (T, F), normalised for the model."""
    return np.asarray(normalise(jnp.asarray(level), model.run.front_end, model.run.statistics))


def _params(model: FoldModel) -> dict:
    return {"params": model.params, "scaler": model.scaler}


@functools.cache
def listener(run: Finetuning) -> attribution.Listener:
    """A run's model in the form that attribution needs, in float32; equal runs share one and its
    compiled functions.

    Raises:
        InputError: a model without attention.
    """
    model = run.model
    if not isinstance(model, ModelConfig):
        raise InputError(
            f"{model.name} has no attention, which explanations need; choose an ast-* model."
        )
    run = dataclasses.replace(run, execution=Execution(precision="float32", attention="xla"))
    module, depth = run.module, model.depth

    def embed(params, log_mel, valid):
        return module.apply({"params": params["params"]}, log_mel, valid, method=RatingModel.embed)

    def rate(params, sums):
        embeddings = params["scaler"].apply(moments_to_embedding(*sums))
        return module.apply({"params": params["params"]}, embeddings, method=RatingModel.rate)

    def attend(params, log_mel, valid, shift):
        variables = {"params": params["params"]}
        if shift is not None:
            variables["perturbations"] = {"encoder": {"blocks": {"attention": {"weights": shift}}}}
        sums, states = module.apply(variables, log_mel, valid, method=RatingModel.attend)
        return (
            sums,
            jnp.stack([states[f"attention{layer}"] for layer in range(depth)]),
            states["patch_valid"],
        )

    return attribution.Listener(embed, rate, model.n_frames, attend, model)
