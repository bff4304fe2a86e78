"""Explanations of ratings: attribution maps over time and frequency, contributions of seconds and
notes, and checks of the maps.

A map attributes the difference between the ratings of the recording and of a baseline to the points
of the spectrogram: +0.004 at a point means that it raised the rating by 0.004. ``mean`` is the
recording's mean level in every band: the same loudness and timbre, without events in time. Pauses
differ from it most, so an ending without resonance contributes. ``silence`` is the lowest level of
the front end: it attributes loudness itself, and pauses contribute nothing, but spectrograms with
silent holes are outside the training distribution. `run_checks` measures whether maps point at the
relevant sounds.

Cost: integrated gradients of one dimension take 32 steps x windows x fold models, and up to 128
steps for a highly non-linear model. The base size takes about 5 seconds per step and window on two
busy CPU cores, and 6 GB of memory: half an hour for 20 seconds of music and four folds. Use a GPU.
"""

import copy
import dataclasses
import functools
import itertools
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pandas as pd
import scipy.ndimage
import scipy.signal
import scipy.stats
import soundfile

from percepiano_ast import audio
from percepiano_ast.audio.mel import window_starts
from percepiano_ast.config import ComputeConfig, FrontEnd, ModelConfig, lookup
from percepiano_ast.dimensions import DIMENSIONS, KEYS
from percepiano_ast.errors import InputError
from percepiano_ast.files import printable
from percepiano_ast.inference.rate import FoldEnsemble, FoldModel, require_explained
from percepiano_ast.models.heads import RatingModel, moments_to_embedding
from percepiano_ast.music.midi import Performance, damped, note_name, read_midi
from percepiano_ast.plots import studies as figures
from percepiano_ast.plots.style import save
from percepiano_ast.studies import attribution
from percepiano_ast.studies.report import sentences
from percepiano_ast.tables import to_csv
from percepiano_ast.training.finetune import Finetuning
from percepiano_ast.training.state import normalise

logger = logging.getLogger(__name__)
SECONDS = 5.0  # of an excerpt
FADE = 0.03  # seconds at both ends of an excerpt
BASELINES = {"mean": "its mean level in every band", "silence": "silence"}  # with a description
METHODS = ("gradients", "relevance", "rollout")  # signed; from attention, 0 or more
# on the rating's scale: steps are doubled until the unexplained remainder is smaller
TOLERANCE = 0.005
MOST_STEPS = 4 * attribution.STEPS

LONGEST_SILENCE = 5.0  # seconds of recording allowed after the last key release
LARGEST_SHIFT = 0.1  # seconds between MIDI and audio, beyond which notes would be confused
_SEARCHED = 2.0  # seconds to either side in which the offset of the MIDI is searched
_DECAY = 0.6  # seconds in which a note's power falls to 1 / e
_RELEASE = 0.1  # seconds that a damped string sounds
_PARTIALS = 16
# share of a note's peak power expected in every band: hammer, resonance, side lobes of the window
_SPILL = 1e-4

# of the cells replaced; symmetric
SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95, 0.98, 1.0)
ORDERS = 5  # number of random orders
CHECK_STEPS = attribution.STEPS // 2  # the order of cells converges before the sums do
ALIKE = 0.5  # rank correlation above which the map of random weights counts as unchanged
LEVEL = 0.95
FEWEST = 5  # recordings for a verdict: bootstrap intervals of fewer are too narrow
_RESAMPLES = 2000


# --- Maps ---------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ExplainedRecording:
    """A recording, named as its file without suffix, float32 (n,), and the input of the models:
    its level float32 (T, F) in dB, quantised by the front end."""

    name: str
    wave: np.ndarray
    level: np.ndarray
    front_end: FrontEnd


class Excerpt(NamedTuple):
    """An excerpt from ``start`` to ``stop`` (s), float32 (n,) faded at both ends, and its signed
    contribution to a rating (sum of the map)."""

    start: float
    stop: float
    wave: np.ndarray
    contribution: float


@dataclass(frozen=True, eq=False)
class Explanation:
    """Attribution of one rating of one recording; all values on the rating's scale of 0 to 1.

    Attributes:
        rating, baseline: ratings of the recording and of the baseline, means over the fold models.
        gap: ``rating - baseline`` minus the sum of ``map``.
        maps: method -> float32 (T, F), see `METHODS`.
    """

    recording: ExplainedRecording
    dimension: str
    rating: float
    baseline: float
    gap: float
    maps: dict[str, np.ndarray]

    @property
    def map(self) -> np.ndarray:
        """Integrated gradients, signed."""
        return self.maps["gradients"]

    def seconds_table(self) -> pd.DataFrame:
        """Contribution of every second: ``start`` (s), ``contribution``."""
        per_second = self.recording.front_end.sample_rate / self.recording.front_end.hop_length
        second = (np.arange(len(self.map)) / per_second).astype(int)
        contribution = np.bincount(second, self.map.sum(axis=1, dtype=np.float64))
        return pd.DataFrame({"start": np.unique(second), "contribution": contribution})

    def bands_table(self) -> pd.DataFrame:
        """Contribution of every mel band: ``hertz`` (its centre), ``contribution``."""
        hertz = audio.band_centres(self.recording.front_end).round(1)
        contribution = self.map.sum(axis=0, dtype=np.float64)
        return pd.DataFrame({"hertz": hertz, "contribution": contribution})

    def excerpt(self, seconds: float = SECONDS) -> Excerpt:
        """The excerpt of ``seconds`` with the largest absolute contribution, or the entire
        recording if it is shorter.

        Raises:
            InputError: ``seconds`` is not above 0.
        """
        if not seconds > 0:
            raise InputError(f"excerpt length is {seconds:g} seconds; give a number above 0.")
        front_end, wave = self.recording.front_end, self.recording.wave
        rate = front_end.sample_rate
        n = min(max(round(seconds * rate / front_end.hop_length), 1), len(self.map))
        sums = np.concatenate([[0.0], np.cumsum(self.map.sum(axis=1, dtype=np.float64))])
        contributions = sums[n:] - sums[:-n]
        first = int(np.argmax(np.abs(contributions)))
        start, stop = front_end.seconds(first), front_end.seconds(first + n)
        if len(wave):
            stop = min(stop, len(wave) / rate)
        piece = wave[round(start * rate) : round(stop * rate)].copy()
        n_faded = min(round(FADE * rate), len(piece) // 2)
        fade = 0.5 - 0.5 * np.cos(np.pi * (np.arange(n_faded) + 0.5) / max(n_faded, 1))
        piece[:n_faded] *= fade.astype(np.float32)
        piece[len(piece) - n_faded :] *= fade[::-1].astype(np.float32)
        return Excerpt(start, stop, piece, float(contributions[first]))


@functools.cache
def model_functions(run: Finetuning) -> attribution.ModelFunctions:
    """A run's model in the form that attribution needs, in float32; equal runs share one and its
    compiled functions. InputError: a model without attention."""
    model = run.model
    if not isinstance(model, ModelConfig):
        raise InputError(
            f"{model.name} has no attention, which explanations need; choose an ast-* model."
        )
    run = dataclasses.replace(run, compute=ComputeConfig(precision="float32", attention="xla"))
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
        weights = jnp.stack([states[f"attention{layer}"] for layer in range(depth)])
        return sums, weights, states["patch_valid"]

    return attribution.ModelFunctions(embed, rate, model.n_frames, attend, model)


class Explainer:
    """Explains the ratings of the fold models of ``rater``, averaged over folds, in float32.

    Args:
        baseline: see the module docstring.
        steps, most_steps: initial and maximum number of steps of integrated gradients, doubled
            while ``Explanation.gap`` is above `TOLERANCE`.

    Raises:
        InputError: unknown baseline, or a model of custom ratings.
    """

    functions = staticmethod(model_functions)

    def __init__(
        self,
        rater: FoldEnsemble,
        baseline: str = "mean",
        steps: int = attribution.STEPS,
        most_steps: int = MOST_STEPS,
    ):
        lookup(BASELINES, baseline, "baseline")
        require_explained(rater)
        self.models, self.name, self.baseline = rater.models, rater.name, baseline
        self.steps, self.most_steps = steps, most_steps
        self.front_end = rater.models[0].run.front_end
        self.simulated = rater.models[0].simulated

    def load(self, file: str | Path) -> ExplainedRecording:
        """Load a recording as `FoldEnsemble.rate` does; errors as in ``audio.load``."""
        wave = audio.load(file, self.front_end.sample_rate)
        codes, _ = audio.quantize(audio.log_mel(wave, self.front_end), self.front_end)
        level = audio.dequantize(codes, self.front_end)
        return ExplainedRecording(printable(Path(file).stem.strip()), wave, level, self.front_end)

    def excerpt(
        self, recording: str | Path | ExplainedRecording, dimension: str, seconds: float = SECONDS
    ) -> Excerpt:
        """`Explanation.excerpt` of a file or recording; raises as `load` and `explain`."""
        if not isinstance(recording, ExplainedRecording):
            recording = self.load(recording)
        return self.explain(recording, [dimension], methods=("gradients",))[0].excerpt(seconds)

    def baseline_of(self, level: np.ndarray) -> np.ndarray:
        """Levels in dB (T, F) -> those of the baseline."""
        if self.baseline == "mean":
            mean = level.mean(axis=0)
        else:
            mean = np.full(level.shape[1], self.front_end.floor_db)
        return np.broadcast_to(mean.astype(np.float32), level.shape)

    def rate(self, variants: Iterable[np.ndarray]) -> np.ndarray:
        """Ratings (V, 19) of V variants of a recording, levels in dB (T, F) of equal shape; means
        over the fold models."""
        rated, variants = [], iter(variants)
        # in batches: the variants of a long recording are large
        while part := list(itertools.islice(variants, 32)):
            found = []
            for model in self.models:
                functions, params, *clips = self._inputs(model, *part)
                starts = self._starts(part[0])
                found.append(attribution.rate_variants(functions, params, clips, starts))
            rated.append(np.mean(found, axis=0))
        return np.concatenate(rated)

    def explain(
        self,
        recording: ExplainedRecording,
        dimensions: Iterable[str],
        methods: tuple[str, ...] = METHODS,
    ) -> list[Explanation]:
        """One explanation for each of ``dimensions``; InputError: unknown dimension."""
        dimensions, level = list(dimensions), recording.level
        position = {key: i for i, key in enumerate(KEYS)}
        chosen = [lookup(position, key, "dimension") for key in dimensions]
        baseline, steps = self.baseline_of(level), self.steps
        where: dict[str, Any] = {"starts": self._starts(level), "dimensions": chosen}
        while True:
            found = [
                attribution.integrated_gradients(
                    *self._inputs(model, level, baseline), **where, steps=steps
                )
                for model in self.models
            ]
            gradients, ratings, baselines, gaps = (np.mean(part, axis=0) for part in zip(*found))
            if np.abs(gaps).max() <= TOLERANCE or 2 * steps > self.most_steps:
                break
            steps *= 2
        maps = {"gradients": gradients}
        if set(methods) - {"gradients"}:
            towards = np.where(ratings >= baselines, 1.0, -1.0)
            attended = [
                attribution.attention_maps(*self._inputs(model, level), **where, towards=towards)
                for model in self.models
            ]
            rollout, relevance = (np.mean(part, axis=0) for part in zip(*attended))
            maps |= {"relevance": relevance, "rollout": np.broadcast_to(rollout, relevance.shape)}
        values = zip(ratings.tolist(), baselines.tolist(), gaps.tolist())
        return [
            Explanation(recording, key, *numbers, {name: maps[name][i] for name in methods})
            for i, (key, numbers) in enumerate(zip(dimensions, values))
        ]

    def _inputs(self, model: FoldModel, *levels: np.ndarray) -> tuple:
        """Functions, parameters and normalised clips of ``levels`` in dB (T, F) each, for
        `attribution`."""
        run, params = model.run, {"params": model.params, "scaler": model.scaler}
        clips = [
            np.asarray(normalise(jnp.asarray(level), run.front_end, run.statistics))
            for level in levels
        ]
        return self.functions(run), params, *clips

    def _starts(self, level: np.ndarray) -> list[int]:
        return window_starts(len(level), self.models[0].run.model.n_frames)

    def randomised(self, seed: int, steps: int) -> Iterator[tuple[str, "Explainer"]]:
        """This explainer with ``steps`` steps and weights randomised from the top layer down, see
        ``attribution.randomised``."""
        stages = [
            attribution.randomised(model.params, model.run.init(seed + i))
            for i, model in enumerate(self.models)
        ]
        for parts in zip(*stages):
            other = copy.copy(self)
            other.steps = other.most_steps = steps
            other.models = [
                dataclasses.replace(model, params=params)
                for model, (_, params) in zip(self.models, parts)
            ]
            yield parts[0][0], other


# --- Notes --------------------------------------------------------------------------------------


def note_table(explanation: Explanation, performance: Performance) -> pd.DataFrame:
    """Contribution of every note, the largest first.

    A point of the map is divided among the notes that sound there in proportion to their expected
    power: fundamental and partials (amplitude 1 / k), scaled by velocity, decaying from the onset
    until key and pedal are released. Between partials it is divided among all sounding notes. The
    last row is the contribution of frames without a note: the column sums to the total of the map.

    Returns:
        ``note`` (number in order of onset, -1 for the rest), ``onset`` and ``offset`` (s),
        ``pitch, name, velocity, contribution``, ``share`` of all absolute contributions.

    Raises:
        InputError: see `check_alignment`.
    """
    check_alignment(explanation.recording, performance)
    front_end, attributed = explanation.recording.front_end, explanation.map
    hop = front_end.hop_length / front_end.sample_rate
    # half a window: a frame includes sound after its centre
    before = front_end.win_length / front_end.sample_rate / 2
    # a pedal that stays down holds to the end
    ends = np.minimum(damped(performance), performance.duration) + _RELEASE
    parts, expected = [], np.zeros(attributed.shape)
    for note, end in zip(performance.notes, ends):
        first = max(int(np.ceil((note["onset"] - before) / hop)), 0)
        frames = slice(first, min(max(int(end / hop) + 1, first + 1), len(attributed)))
        since = np.arange(frames.start, frames.stop) * hop - note["onset"]
        power = (note["velocity"] / 127) ** 2 * np.exp(-np.maximum(since, 0) / _DECAY)
        power = power[:, None] * _band_power(int(note["pitch"]), front_end)[None, :]
        expected[frames] += power
        parts.append((frames, power))
    per_power = np.divide(attributed, expected, out=np.zeros(attributed.shape), where=expected > 0)
    fields = ("onset", "offset", "pitch", "velocity")
    notes = pd.DataFrame({name: performance.notes[name] for name in fields})
    notes.insert(0, "note", np.arange(len(notes)))
    notes.insert(4, "name", [note_name(pitch) for pitch in notes["pitch"]])
    notes["contribution"] = [float((per_power[frames] * power).sum()) for frames, power in parts]
    notes = notes.sort_values("contribution", key=np.abs, ascending=False, kind="stable")
    notes = notes.astype({"pitch": "Int64", "velocity": "Int64"})
    rest = float(attributed[expected == 0].sum(dtype=np.float64))
    rest = pd.DataFrame([{"note": -1, "name": "no note", "contribution": rest}])
    table = pd.concat([notes, rest], ignore_index=True)
    sizes = table["contribution"].abs()
    return table.assign(share=sizes / max(sizes.sum(), 1e-12)).round({"onset": 4, "offset": 4})


@functools.lru_cache(maxsize=256)
def _band_power(pitch: int, front_end: FrontEnd) -> np.ndarray:
    """Relative power of a note of this pitch in each band, float64 (n_mels,), at most 1, from a
    synthesized sum of sines."""
    fundamental = 440 * 2 ** ((pitch - 69) / 12)
    time = np.arange(4 * front_end.win_length) / front_end.sample_rate
    highest = 0.95 * front_end.sample_rate / 2
    partials = [k for k in range(1, _PARTIALS + 1) if k == 1 or k * fundamental < highest]
    wave = sum(np.sin(2 * np.pi * k * fundamental * time + k) / k for k in partials)
    level = audio.log_mel(np.asarray(0.1 * wave, np.float32), front_end)
    power = 10 ** (level[len(level) // 2].astype(np.float64) / 10)
    power /= power.max()
    return np.maximum(power, _SPILL)


def check_alignment(recording: ExplainedRecording, performance: Performance) -> None:
    """InputError: notes after the end of the recording, a recording that continues long after the
    last note, or onsets that match the audio much better with an offset."""
    onset, end = performance.notes["onset"], performance.duration
    seconds = len(recording.wave) / recording.front_end.sample_rate
    if onset.max() >= seconds or seconds - end > LONGEST_SILENCE:
        raise InputError(
            f"the MIDI's notes last from {onset.min():.1f} to {end:.1f} s, the recording"
            f" {recording.name} {seconds:.1f} s. Give the MIDI of this recording, starting at the"
            " same time."
        )
    # The offset that aligns the onsets with rises in level over bands
    hop = recording.front_end.hop_length / recording.front_end.sample_rate
    audible = np.maximum(recording.level, recording.level.max() - 60)
    rise = np.maximum(np.diff(audible, axis=0, prepend=audible[:1]), 0).sum(axis=1)
    struck, n = np.zeros(len(rise)), len(rise)
    frames = np.minimum(np.round(onset / hop).astype(int), n - 1)
    np.maximum.at(struck, frames, performance.notes["velocity"] / 127)
    near = np.exp(-0.5 * (np.arange(-5, 6) / 2) ** 2)  # onsets are accurate to about 20 ms
    struck = np.convolve(struck, near, mode="same")
    largest = min(round(_SEARCHED / hop), n - 1)
    fits = scipy.signal.correlate(rise, struck)[n - 1 - largest : n + largest]
    shift = (int(np.argmax(fits)) - largest) * hop
    # Music repeats: an offset of one beat matches nearly as well as the true offset.
    if fits.max() > 1.2 * fits[largest] and abs(shift) > LARGEST_SHIFT:
        raise InputError(
            f"the MIDI's onsets match the audio of {recording.name} only when moved by {shift:+.2f}"
            " s. Trim both to start at the same time."
        )


# --- Checks -------------------------------------------------------------------------------------


def run_checks(
    explainer: Explainer, explained: Iterable[list[Explanation]], seed: int = 0
) -> dict[str, pd.DataFrame]:
    """Checks of attribution maps: deletion curves for all maps, and weight randomisation for
    integrated gradients, each with a verdict in words.

    **Deletion** (Samek et al. 2017; Petsiuk, Das and Saenko 2018): cells of the spectrogram, as
    large as the model's patches, are replaced by the baseline, most relevant cells first, and the
    recording is rated again. A faithful map moves the rating towards the baseline's rating faster
    than a random order. Insertion is the curve of the opposite order read from its end.

    **Randomised weights** (Adebayo et al. 2018): a map that does not change when the weights are
    randomised reflects the spectrogram, not the model.

    Cost per recording and fold model: 13 shares x (2 orders x maps x dimensions + 5 random orders)
    x windows forward passes, and six times integrated gradients of `CHECK_STEPS` steps.

    Args:
        explained: explanations by ``explainer``, a list with the same dimensions and methods for
            each recording.
        seed: for the random orders, the random weights and the bootstrap.

    Returns:
        - ``deletion``: ``recording, dimension, method, order, share`` of the cells replaced,
          ``moved`` (change of the rating towards that of the baseline), ``size`` (its absolute
          change). Random orders are means over `ORDERS`.
        - ``randomisation``: ``recording, dimension, stage, spearman, spearman_size, ssim``:
          rank correlations of cells and of their absolute values, and structural similarity, with
          the map of the trained model.
        - ``verdicts``: ``dimension, check, method, value, low, high, recordings, sentence``.
    """
    deletion, randomisation = [], []
    for number, explanations in enumerate(explained):
        deletion += _deletion(explainer, explanations, np.random.default_rng([seed, number]))
        randomisation += _randomisation(explainer, explanations, seed)
    deletion = pd.concat(deletion, ignore_index=True)
    randomisation = pd.DataFrame(randomisation)
    # Random orders count any movement: holes in a spectrogram can move a rating beyond both end
    # points.
    area = areas(deletion)[["most relevant first"]].assign(random=areas(deletion, "size")["random"])
    rows = []
    for (dimension, method), part in area.groupby(["dimension", "method"]):
        found = _interval(_area_ratio, part.to_numpy(), seed)
        rows.append((dimension, "deletion", method, *found, len(part)))
    everything = randomisation[randomisation["stage"] == "everything"]
    for dimension, part in everything.groupby("dimension"):
        found = _interval(np.mean, part["spearman"].to_numpy(), seed)
        rows.append((dimension, "randomisation", "gradients", *found, len(part)))
    rows.sort(key=lambda row: (*row[:2], METHODS.index(row[2])))
    names = ["dimension", "check", "method", "value", "low", "high", "recordings"]
    verdicts = pd.DataFrame(rows, columns=names)
    verdicts["sentence"] = [verdict(row[1], *row[3:]) for row in rows]
    return {"deletion": deletion, "randomisation": randomisation, "verdicts": verdicts}


def _deletion(
    explainer: Explainer, explanations: list[Explanation], rng: np.random.Generator
) -> list[pd.DataFrame]:
    """Deletion curves of one recording, one table for each dimension, method and order."""
    bands, frames = size = explainer.models[0].run.model.patch_size
    recording = explanations[0].recording
    shape = cell_sums(recording.level, size).shape
    orders = [rng.permutation(int(np.prod(shape))) for _ in range(ORDERS)]
    for explanation in explanations:
        towards = 1 if explanation.rating >= explanation.baseline else -1
        for method, values in explanation.maps.items():
            # Attention has no sign.
            sign = towards if method == "gradients" else 1
            most = np.argsort(-(cell_sums(values, size).ravel() * sign), kind="stable")
            orders += [most, most[::-1]]

    def variants():
        baseline = explainer.baseline_of(recording.level)
        for order in orders:
            for share in SHARES:
                replaced = np.zeros(shape, bool)
                replaced.flat[order[: round(share * len(order))]] = True
                points = np.kron(replaced, np.ones((frames, bands), bool))
                points = points[: baseline.shape[0], : baseline.shape[1]]
                yield np.where(points, baseline, recording.level)

    ratings = explainer.rate(variants()).reshape(len(orders), len(SHARES), -1)
    tables, position = [], ORDERS
    for explanation in explanations:
        rated = ratings[:, :, KEYS.index(explanation.dimension)]
        moved = np.sign(rated[0, 0] - rated[0, -1]) * (rated[:, :1] - rated)
        facts = {"recording": recording.name, "dimension": explanation.dimension, "share": SHARES}
        for method in explanation.maps:
            most, least = moved[[position]], moved[[position + 1]]
            position += 2
            for order, part in zip(figures.ORDER_STYLES, (most, moved[:ORDERS], least)):
                means = {"moved": part.mean(axis=0), "size": np.abs(part).mean(axis=0)}
                tables.append(pd.DataFrame({**facts, "method": method, "order": order, **means}))
    return tables


def _randomisation(explainer: Explainer, explanations: list[Explanation], seed: int) -> list[dict]:
    """Similarity of the maps of one recording to those of randomised models."""
    size, recording = explainer.models[0].run.model.patch_size, explanations[0].recording
    dimensions, rows = [explanation.dimension for explanation in explanations], []
    for stage, other in explainer.randomised(seed, CHECK_STEPS):
        random = other.explain(recording, dimensions, methods=("gradients",))
        for one, another in zip(explanations, random):
            a, b = cell_sums(one.map, size), cell_sums(another.map, size)
            facts = {"recording": recording.name, "dimension": one.dimension, "stage": stage}
            same = {"spearman": _spearman(a, b), "spearman_size": _spearman(np.abs(a), np.abs(b))}
            a, b = (values / max(np.abs(values).max(), 1e-12) for values in (a, b))
            rows.append({**facts, **same, "ssim": ssim(a, b)})
    return rows


def cell_sums(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Sums of (T, F) over cells of ``size`` = (bands, frames): (ceil(T / frames), ceil(F /
    bands))."""
    bands, frames = size
    rows = np.add.reduceat(values, np.arange(0, values.shape[0], frames), axis=0, dtype=np.float64)
    return np.add.reduceat(rows, np.arange(0, values.shape[1], bands), axis=1)


def areas(deletion: pd.DataFrame, values: str = "moved") -> pd.DataFrame:
    """Area under every curve of ``values``: index ``dimension, method, recording``, one column per
    order."""
    keys = ["dimension", "method", "recording", "order"]
    area = deletion.groupby(keys).apply(
        lambda part: np.trapezoid(part[values], part["share"]), include_groups=False
    )
    return area.unstack("order")


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0  # a constant map correlates with no other
    return float(scipy.stats.spearmanr(a.ravel(), b.ravel()).statistic)


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Mean structural similarity of two images with values from -1 to 1 (Wang et al. 2004, equation
    13): Gaussian windows with a standard deviation of 1.5, K1 = 0.01, K2 = 0.03, a range of 2."""
    blurred = functools.partial(scipy.ndimage.gaussian_filter, sigma=1.5, truncate=3.5)
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    mean_a, mean_b = blurred(a), blurred(b)
    var_a, var_b = blurred(a * a) - mean_a**2, blurred(b * b) - mean_b**2
    covariance = blurred(a * b) - mean_a * mean_b
    index = (
        (2 * mean_a * mean_b + c1)
        * (2 * covariance + c2)
        / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    )
    return float(index.mean())


def _area_ratio(pairs: np.ndarray) -> float:
    """Ratio of the summed areas (n, 2); 1 if the random order does not move the rating."""
    most, random = pairs.sum(axis=0).tolist()
    return most / random if random > 0 else 1.0


def _interval(statistic, values: np.ndarray, seed: int) -> tuple[float, float, float]:
    """Value and percentile bootstrap interval of ``statistic(values)`` over recordings, (n, ...);
    NaN for one."""
    value, n = float(statistic(values)), len(values)
    if n < 2:
        return value, np.nan, np.nan
    rng = np.random.default_rng([seed, n])
    drawn = [float(statistic(values[rng.integers(n, size=n)])) for _ in range(_RESAMPLES)]
    return value, *np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])


def verdict(check: str, value: float, low: float, high: float, recordings: int) -> str:
    """Verdict in words on the ratio of areas, most relevant first to random (``deletion``), or on
    the similarity of the maps of trained and random weights (``randomisation``)."""
    holds, fails = (low > 1, high < 1) if check == "deletion" else (high < ALIKE, low > ALIKE)
    numbers = (value, low, high, recordings)
    return sentences("explanation", f"{check}_verdict", holds, fails, FEWEST, *numbers)[0]


class SilencedExcerpt(NamedTuple):
    """Rating minus that without an excerpt; the median absolute value of the same for all other
    excerpts, half a length apart, or NaN; the rank, 1 if no other excerpt moves the rating more;
    and the result in words."""

    moved: float
    others: float
    rank: int
    sentence: str


def silence_excerpt(
    explainer: Explainer, explanation: Explanation, excerpt: Excerpt
) -> SilencedExcerpt:
    """Rate again without the excerpt, and without other excerpts of its length that overlap it by
    less than half."""
    level, front_end = explanation.recording.level, explanation.recording.front_end
    per_second = front_end.sample_rate / front_end.hop_length
    n = round((excerpt.stop - excerpt.start) * per_second)
    first = round(excerpt.start * per_second)
    grid = range(0, len(level) - n + 1, max(n // 2, 1))
    starts = [first, *(k for k in grid if abs(k - first) > n // 2)]
    baseline = explainer.baseline_of(level)

    def variants():
        yield level
        for start in starts:
            silenced = level.copy()
            silenced[start : start + n] = baseline[start : start + n]
            yield silenced

    rated = explainer.rate(variants())[:, KEYS.index(explanation.dimension)]
    moved, *others = (rated[0] - rated[1:]).tolist()
    rank = 1 + sum(abs(other) > abs(moved) for other in others)
    median = float(np.median(np.abs(others))) if others else np.nan
    found = moved, median, rank
    return SilencedExcerpt(*found, sentences("explanation", "silenced", *found, len(starts))[0])


# --- Files --------------------------------------------------------------------------------------


def explain_files(
    files: Iterable[str],
    *,
    run: str,
    out: str | Path,
    dimensions: list[str],
    model: str = "",
    midi: str = "",
    baseline: str = "mean",
    seconds: float = SECONDS,
    with_checks: bool = False,
) -> None:
    """The command ``explain``: write one folder per file below ``out`` (figures, tables, excerpts
    and a summary), and checks over all files.

    Raises:
        InputError: an unknown dimension, model or baseline, a file that is unreadable or too short,
            several files with one MIDI or with equal names, or a MIDI that does not match the
            recording.
    """
    files, rater, out = list(files), FoldEnsemble(run, model), Path(out)
    require_explained(rater)
    for key in dimensions:
        lookup(dict.fromkeys(KEYS), key, "dimension")
    if midi and len(files) > 1:
        raise InputError(
            f"one MIDI for {len(files)} recordings: give --midi with a single recording."
        )
    names = [printable(Path(file).stem.strip()) for file in files]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(
            f"two recordings are called {', '.join(sorted(twice))} and would share a folder; rename"
            " one."
        )
    explainer = Explainer(rater, baseline)
    recordings = [explainer.load(file) for file in files]
    performance = read_midi(midi) if midi else None
    if performance is not None:
        check_alignment(recordings[0], performance)
    methods, explained = METHODS if with_checks else METHODS[:1], []
    for recording in recordings:
        folder, lines = out / recording.name, [recording.name]
        folder.mkdir(parents=True, exist_ok=True)
        explained.append(explainer.explain(recording, dimensions, methods))
        for explanation in explained[-1]:
            lines += _write_explanation(explainer, explanation, performance, seconds, folder)
        _write_lines(folder / "explanation.txt", lines)
    if not with_checks:
        return
    tables = run_checks(explainer, explained)
    for name, table in tables.items():
        (out / f"{name}.csv").write_bytes(to_csv(table, "%.6f"))
    title = f"Deletion curves ({tables['deletion']['recording'].nunique()} recordings)"
    save(figures.deletion_curves(tables["deletion"], title), out / "deletion")
    curves = figures.randomisation_curves(tables["randomisation"], ALIKE, "Weight randomisation")
    save(curves, out / "randomisation")
    lines = [f"Checks over {len(recordings)} recordings"]
    for row in tables["verdicts"].itertuples():
        lines.append(f"  {row.dimension}, {figures.METHOD_NAMES[row.method]}: {row.sentence}")
    _write_lines(out / "verdicts.txt", lines)


def _write_explanation(
    explainer: Explainer,
    explanation: Explanation,
    performance: Performance | None,
    seconds: float,
    folder: Path,
) -> list[str]:
    """Write all files of one dimension of one recording; returns their summary in sentences."""
    key, recording = explanation.dimension, explanation.recording
    tables = {"seconds": explanation.seconds_table(), "bands": explanation.bands_table()}
    excerpt, front_end = explanation.excerpt(seconds), recording.front_end
    soundfile.write(folder / f"excerpt_{key}.wav", excerpt.wave, front_end.sample_rate)
    one = next(one for one in DIMENSIONS if one.key == key)
    description = BASELINES[explainer.baseline]
    title = f"{recording.name} \u2013 {one.family.lower()}: {one.low} \u2013 {one.high}, rated"
    title += f" {explanation.rating:.2f} (baseline, {description}: {explanation.baseline:.2f})"
    marked = (excerpt.start, excerpt.stop)
    words: dict[str, Any] = {"dimension": key, "marked": marked, "title": title}
    figure = figures.attribution_map(recording.level, explanation.map, front_end=front_end, **words)
    save(figure, folder / f"map_{key}")
    notes = rest = None
    if performance is not None:
        table = tables["notes"] = note_table(explanation, performance)
        save(figures.note_roll(table, **words), folder / f"notes_{key}")
        notes, rest = table[table["note"] >= 0], table[table["note"] < 0]["contribution"].sum()
    for name, table in tables.items():
        table.to_csv(folder / f"{name}_{key}.csv", index=False, float_format="%.6f")
    silenced = silence_excerpt(explainer, explanation, excerpt)
    about = (explanation, description, TOLERANCE, explainer.simulated)
    return sentences("explanation", "explanation", *about, excerpt, silenced, notes, rest)


def _write_lines(path: Path, lines: list[str]) -> None:
    path.write_text("\n".join(lines) + "\n")
    logger.info("\n".join(lines))
