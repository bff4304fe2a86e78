"""Sensitivity test: real performances with one change each, rendered and rated by any model.

The changes of the playing are in `music.edits`, those of the recording in `audio.effects`. Ratings
of the statistics baselines and of fine-tuned runs are held out: each clip is rated by a model
fitted without its content group. All intervals are 95 % jackknife intervals over content groups.
"""

import contextlib
import importlib
import inspect
import logging
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd

from percepiano_ast import audio, inference
from percepiano_ast.audio import features as audio_features
from percepiano_ast.audio.effects import EFFECTS
from percepiano_ast.data import demo, percepiano
from percepiano_ast.dimensions import KEYS
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation import intervals, metrics
from percepiano_ast.evaluation.analysis import group_means
from percepiano_ast.files import TimeLeft, cached_arrays, sha256_of, write_json
from percepiano_ast.inference import rate, regressors
from percepiano_ast.inference.rate import BUNDLED, RatingModelFile
from percepiano_ast.music import performance_features as midi_features
from percepiano_ast.music.edits import EDITS, PARAMETERS, Edit, NotApplicable, same
from percepiano_ast.music.midi import Performance, read_midi, trimmed
from percepiano_ast.music.synth import SOUNDFONTS, BuiltinPiano, RenderCache, make_synthesizer
from percepiano_ast.plots import studies as figures
from percepiano_ast.plots.style import save
from percepiano_ast.studies.report import sentences

logger = logging.getLogger(__name__)
PROTOCOL = "content"
SAMPLE_RATE = 22_050  # of the statistics baselines
SYNTHESIZER = "musescore-small"  # the soundfont in which velocity changes the timbre too
OTHERS = (*SOUNDFONTS, BuiltinPiano.name)
UNCHANGED, UNCLEAR, YES, NO = "unheard", "unclear", "yes", "no"  # in the column ``agrees``
CLEAR = 0.2  # |r| from which experts' ratings are said to correlate with a parameter

# Expected effect of more of a parameter: 1 towards the second pole of the dimension, -1 towards the
# first. Listed only where musicians would agree for any piece. Sources: force raises loudness,
# brightness and hardness of touch (Askenfelt & Jansson 1991; Goebl et al. 2014); fast and high
# music is brighter in mood, slow and low music darker (Gabrielsson & Lindstroem 2010); the pedal
# connects, blurs and enriches (Repp 1996); tempo variation, dynamic contrast and voiced chords are
# what teachers call expression (Palmer 1997).
_SIGNS = pd.read_csv(resources.files("percepiano_ast") / "studies" / "expected_signs.csv")
EXPECTED: dict[str, dict[str, int]] = {
    name: dict(zip(part["dimension"], part["sign"].tolist()))
    for name, part in _SIGNS.groupby("parameter", sort=False)
}

RaterInput = Any  # a wave or a `Performance`, depending at run time on the attribute `hears`


# --- Rating functions -----------------------------------------------------------------------------


class RatingFunction(Protocol):
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

    def rate(self, clip: str, takes: Sequence[RaterInput]) -> np.ndarray:
        """Ratings (n, 19), 0 to 1, of takes of one clip: waves float32 (n_samples,), or
        performances."""


def imported(name: str) -> RatingFunction:
    """Import a rating function: ``module:attribute``, such as ``my_model:rater``. InputError: no
    such module or attribute, or it lacks a member of `RatingFunction`."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"cannot import {name!r} ({error}); write module:attribute with a module on Python's"
            " path."
        ) from error
    members = ("name", "hears", "sample_rate", "key", "rate")
    if missing := [member for member in members if not hasattr(found, member)]:
        needed = "`name`, `hears`, `sample_rate`, `key` and `rate`"
        raise InputError(f"{name} has no {', '.join(missing)}; a rating function needs {needed}.")
    return found


def _code(*modules: ModuleType) -> str:
    """Hash of the source of modules and packages."""
    files: list[Path] = []
    for path in (Path(inspect.getfile(module)) for module in modules):
        files += sorted(path.parent.glob("*.py")) if path.name == "__init__.py" else [path]
    return sha256_of(*files)


# Statistics baselines: type of input (audio or midi), feature extractor, and hash of its code
STATISTICS: dict[str, tuple[str, Callable[[RaterInput], dict[str, float]], str]] = {
    "audio-stats": (
        "audio",
        lambda wave: audio.audio_features(wave, SAMPLE_RATE),
        _code(audio_features),
    ),
    "midi-stats": ("midi", midi_features.performance_features, _code(midi_features)),
}


def _features(baseline: str, takes: Iterable[RaterInput]) -> np.ndarray:
    """Features of a statistics baseline, (n_takes, n_features)."""
    extract = STATISTICS[baseline][1]
    return np.stack([np.array(list(extract(take).values())) for take in takes])


class StatisticsRater:
    """`RatingFunction` of a statistics baseline: features, and for each fold a model fitted on the
    clips outside it.

    Args:
        name: in ``STATISTICS``.
        features: one row per clip, with the clips as index; ratings: (n_clips, 19), alike.
        index: its ``content`` folds are held out; clips without a fold are not used for training.

    Raises:
        InputError: the index has no such folds, or a content group in two folds; see
            `regressors.fit`.
    """

    sample_rate = SAMPLE_RATE

    def __init__(
        self, name: str, features: pd.DataFrame, ratings: np.ndarray, index: pd.DataFrame, seed: int
    ):
        self.name, (self.hears, _, code) = name, STATISTICS[name]
        self._fold = percepiano.fold_of_clip(index, PROTOCOL)
        folds = np.array([self._fold.get(clip, -1) for clip in features.index])
        x, y, self._models = features.to_numpy(), np.asarray(ratings), {}
        for held_out in sorted(set(self._fold.values())):
            train = (folds != held_out) & (folds >= 0)
            self._models[held_out] = regressors.fit(x[train], y[train], seed=seed)
        self.key = f"{name} {seed} {sha256_of(x, y, folds)} {code} {_code(regressors)}"

    def rate(self, clip: str, takes: Sequence[RaterInput]) -> np.ndarray:
        """See `RatingFunction.rate`."""
        return self._models[self._fold[clip]].predict(_features(self.name, takes))


class RunRater:
    """`RatingFunction` of a fine-tuned run, a directory or storage location: each clip is rated by
    the fold model that held it out. InputError: see `rate.FoldEnsemble`; an unfinished fold."""

    hears = "audio"

    def __init__(self, run: str | Path, index: pd.DataFrame):
        import jax

        rater = rate.FoldEnsemble(run)
        rate.require_percepiano(rater, "sensitivity")
        self.name, self._models = rater.name, dict(zip(rater.folds, rater.models, strict=True))
        self._front_end = rater.models[0].run.front_end
        self.sample_rate = self._front_end.sample_rate
        self._fold = percepiano.fold_of_clip(index, rater.models[0].run.config.protocol)
        if missing := sorted(set(self._fold.values()) - set(self._models)):
            raise InputError(
                f"fold {missing[0]} of {self.name} in {run} is not finished, so its clips have no"
                f" held-out model. Run {rate.MADE_BY} again; it resumes."
            )
        content = []
        for fold, one in sorted(self._models.items()):
            leaves = [map(np.asarray, jax.tree.leaves(tree)) for tree in (one.params, one.scaler)]
            digests = " ".join(sha256_of(*part) for part in leaves)
            content.append(f"{fold} {one.run.model} {one.run.front_end} {digests}")
        self.key = f"{self.name} {sha256_of(*content)}"

    def rate(self, clip: str, takes: Sequence[RaterInput]) -> np.ndarray:
        """See `RatingFunction.rate`."""
        model, front_end = self._models[self._fold[clip]], self._front_end
        codes = (audio.quantize(audio.log_mel(wave, front_end), front_end)[0] for wave in takes)
        return np.stack([model.rate(one) for one in codes]).astype(np.float64)


class ModelFileRater:
    """`RatingFunction` of a model file, by default the bundled model. Its ratings are not held out:
    the bundled model was trained on all clips of PercePiano. InputError: missing or wrong file."""

    hears = "audio"

    def __init__(self, path: str | Path = BUNDLED):
        self._model = RatingModelFile.read(path)
        self.name, self.sample_rate = Path(path).stem, self._model.sample_rate
        self.key = f"{self.name} {sha256_of(Path(path))} {_code(inference, audio_features)}"

    def rate(self, clip: str, takes: Sequence[RaterInput]) -> np.ndarray:
        """See `RatingFunction.rate`."""
        rated = (self._model.rate_wave(wave, with_course=False).ratings for wave in takes)
        return np.array([[one[key] for key in KEYS] for one in rated])


# --- Tables ---------------------------------------------------------------------------------------


class ChangedRatings(NamedTuple):
    """Ratings of the same clips, original and with one change.

    Attributes:
        before, after: (n, 19) in the order of ``KEYS``; NaN in ``after`` if the change does not
            apply to a clip.
        alike: bool (n,), True where the model's input did not change, for example a soft pedal that
            the synthesizer ignores.
    """

    before: np.ndarray
    after: np.ndarray
    alike: np.ndarray


def sensitivity_table(
    model: str, groups: np.ndarray, found: Mapping[Edit, ChangedRatings]
) -> pd.DataFrame:
    """Mean change of each rating with each edit of the playing, one row per edit and dimension.

    ``standardised`` is the change in standard deviations of the same model's ratings of the
    original clips, which the interval treats as exact. ``clips`` counts the clips to which the
    edit applies, ``alike`` those of them whose model input did not change. ``expected`` is the sign
    that musicians expect; ``agrees`` is ``yes`` or ``no`` if the interval excludes 0, ``unclear``
    if it does not, `UNCHANGED` if all inputs are unchanged, and empty if no sign is expected.

    Args:
        groups: (n,) content group of each clip.

    Raises:
        InputError: an edit that applies to no clip, or constant ratings.
    """
    tables = []
    for edit, ratings in found.items():
        before, after, applies = _changed(model, edit.label, ratings)
        parameter, change = edit.parameter.name, after - before
        estimate = intervals.jackknife(group_means(groups[applies], change) / before.std(axis=0))
        signs = [EXPECTED[parameter].get(key, 0) for key in KEYS]
        expected = (np.sign(edit.strength) * np.array(signs)).astype(int)
        sign = np.where(estimate.low > 0, 1, np.where(estimate.high < 0, -1, 0))
        agrees = np.where(sign == 0, UNCLEAR, np.where(sign == expected, YES, NO))
        agrees = np.where(ratings.alike[applies].all(), UNCHANGED, agrees)
        facts: dict[str, Any] = {"model": model, "parameter": parameter, "variation": edit.name}
        facts |= {"strength": float(edit.strength), "label": edit.label}
        facts |= {"dimension": KEYS, "clips": int(applies.sum())}
        facts |= {"alike": int(ratings.alike[applies].sum())}
        facts |= {"change": change.mean(axis=0), "change_sd": change.std(axis=0)}
        facts |= {"standardised": estimate.value, "low": estimate.low, "high": estimate.high}
        facts |= {"expected": expected, "agrees": np.where(expected == 0, "", agrees)}
        tables.append(pd.DataFrame(facts))
    return pd.concat(tables, ignore_index=True)


def robustness_table(
    model: str, groups: np.ndarray, found: dict[str, ChangedRatings]
) -> pd.DataFrame:
    """Change of each rating with each recording condition, ideally none, one row per condition and
    dimension: ``change`` (mean), ``absolute`` (mean), ``standardised`` (absolute in standard
    deviations of the ratings over clips), and ``pearson`` with the ratings of the original clips,
    ``low`` to ``high``. Arguments and errors as in `sensitivity_table`."""
    tables = []
    for label, ratings in found.items():
        before, after, applies = _changed(model, label, ratings)
        correlations = metrics.pearson_without_each_group(groups[applies], before, after)
        r = intervals.jackknife(correlations, intervals.FISHER)
        absolute = np.abs(after - before).mean(axis=0)
        facts = {"model": model, "condition": label, "dimension": KEYS, "clips": int(applies.sum())}
        facts |= {"change": (after - before).mean(axis=0), "absolute": absolute}
        facts |= {"standardised": absolute / before.std(axis=0)}
        facts |= {"pearson": r.value, "low": r.low, "high": r.high}
        tables.append(pd.DataFrame(facts))
    return pd.concat(tables, ignore_index=True)


def _changed(
    model: str, label: str, found: ChangedRatings
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ratings before and after of the clips to which a change applies, and these clips, bool
    (n,)."""
    applies = np.isfinite(found.after).all(axis=1)
    if not applies.any():
        raise InputError(f"{label}: this change applies to no clip; give other clips or omit it.")
    before, after = found.before[applies], found.after[applies]
    if not np.ptp(before, axis=0).all():
        which = KEYS[int(np.argmin(np.ptp(before, axis=0)))]
        raise InputError(
            f"{model} gives all {len(before)} clips the same rating of {which}: a change cannot be"
            " standardised. Give more clips or another model."
        )
    return before, after, applies


def expert_correlations(
    measures: pd.DataFrame, ratings: np.ndarray, segments: np.ndarray
) -> pd.DataFrame:
    """Correlation of people's mean ratings (n, 19) with each parameter over real clips, one row per
    parameter and dimension.

    ``r`` is over all clips; ``r_within`` is the same with both centred on their segment (n,), which
    removes the music. Players vary many parameters together, so a correlation may differ from the
    effect of one parameter: ``differs`` is True where ``r_within`` is at least ``CLEAR`` in size
    and has the opposite sign of ``expected``. ``measures``: one row per clip, one column per
    parameter; NaN if it could not be measured.
    """
    tables = []
    for parameter in measures:
        known = measures[parameter].notna().to_numpy()
        values = pd.DataFrame(ratings[known], columns=KEYS)
        values["measure"] = measures[parameter].to_numpy()[known]
        expected = np.array([EXPECTED[parameter].get(key, 0) for key in KEYS])
        facts = {"parameter": parameter, "dimension": KEYS, "clips": int(known.sum())}
        within = values - values.groupby(segments[known]).transform("mean")
        for name, one in (("r", values), ("r_within", within)):
            x, y = one[["measure"] * len(KEYS)].to_numpy(), one[list(KEYS)].to_numpy()
            facts[name] = metrics.pearson(x, y) if len(x) > 1 else np.full(len(KEYS), np.nan)
        facts |= {"expected": expected, "differs": (expected * facts["r_within"]) <= -CLEAR}
        tables.append(pd.DataFrame(facts))
    return pd.concat(tables, ignore_index=True)


# --- The test -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SensitivityOptions:
    """Options of a sensitivity test.

    Attributes:
        clips: number of clips to draw.
        synthesizer: renders the original and edited clips.
        others: further synthesizers for the robustness test; None for all of the package.
        seed: for all random choices: clips, noise, rooms, fit of the statistics baselines.
    """

    clips: int = 100
    synthesizer: str = SYNTHESIZER
    others: tuple[str, ...] | None = None
    seed: int = 0
    workers: int = 1

    @property
    def synthesizers(self) -> tuple[str, ...]:
        """``synthesizer``, then the others."""
        others = OTHERS if self.others is None else self.others
        return self.synthesizer, *(name for name in others if name != self.synthesizer)


def run_sensitivity(
    folder: str | Path,
    out: str | Path,
    models: Sequence[str | RatingFunction],
    options: SensitivityOptions = SensitivityOptions(),
) -> Path:
    """Test models; writes ``sensitivity.csv``, ``robustness.csv`` (models with audio input),
    ``experts.csv``, ``clips.csv``, ``left_out.csv``, ``summary.txt`` and ``figures/`` into ``out``,
    which it returns. Renderings and ratings are cached there, so an interrupted test resumes.

    Args:
        folder: PercePiano's, one with its layout, or ``demo`` for the embedded data.
        models: names in `STATISTICS`, ``piano-rater`` for the bundled model, a model file,
            directories of fine-tuned runs, rating functions, or ``module:attribute`` of one.

    Raises:
        InputError: invalid data or model, a synthesizer that is not installed, too few clips.
    """
    out = Path(out)
    models = [
        imported(one) if isinstance(one, str) and ":" in one and "://" not in one else one
        for one in models
    ]
    # a name that is in no table is a model file or a fine-tuned run
    inputs = [
        STATISTICS.get(one, ("audio",))[0] if isinstance(one, str) else one.hears for one in models
    ]
    if "audio" in inputs:
        for name in options.synthesizers:
            make_synthesizer(name)  # report a missing soundfont before the work starts
    if str(folder) == "demo":
        folder = demo.write_percepiano(out / "demo" / "percepiano")

    # --- Draw and edit clips
    data = _Data(folder, out, options)
    chosen = sample_clips(data.index, options.clips, options.seed)
    clips: list[tuple[str, dict[Any, Performance]]] = []  # name, performance of each edit or None
    left_out = []
    for row in chosen.itertuples():
        performance, score = data.performance(row.clip), data.score(row.segment)
        edited: dict[Any, Performance] = {None: performance}
        for edit in EDITS:
            try:
                edited[edit] = edit.apply(performance, score)
            except NotApplicable as error:
                left_out.append((row.clip, edit.label, str(error)))
        clips.append((row.clip, edited))

    # --- Render and rate them
    sensitivity, robustness, groups = [], [], chosen["content_group"].to_numpy()
    for model in models:
        rater = data.rater(model) if isinstance(model, str) else model
        if rater.hears not in ("audio", "midi"):
            raise InputError(f"{rater.name}: `hears` is {rater.hears!r}; set it to audio or midi.")
        pianos, conditions = [], []
        if rater.hears == "audio":
            where = out / "renderings"
            pianos = [RenderCache(where, name, rater.sample_rate) for name in options.synthesizers]
            everything = [performance for _, edited in clips for performance in edited.values()]
            pianos[0].prepare(everything, options.workers)
            for piano in pianos[1:]:
                piano.prepare([edited[None] for _, edited in clips], options.workers)
            conditions = [f"piano {piano.synthesizer}" for piano in pianos[1:]]
            conditions += [effect.label for effect in EFFECTS]
        changes = [None, *EDITS, *conditions]
        rated = np.full((len(clips), len(changes), len(KEYS)), np.nan)
        unchanged = np.zeros((len(clips), len(changes)), bool)
        left = TimeLeft(len(clips), what=f"{rater.name}: ")
        for row, (name, edited) in enumerate(clips):
            found, alike = _rate_clip(out, rater, pianos, name, [*edited.values()], options.seed)
            columns = [changes.index(change) for change in [*edited, *conditions]]
            rated[row, columns], unchanged[row, columns[: len(alike)]] = found, alike
            left(row + 1)
        logger.info(f"{rater.name}: {len(clips)} clips rated")
        changed: dict[Any, ChangedRatings] = {
            change: ChangedRatings(rated[:, 0], rated[:, k], unchanged[:, k])
            for k, change in enumerate(changes)
        }
        edits = {edit: changed[edit] for edit in EDITS}
        sensitivity.append(sensitivity_table(rater.name, groups, edits))
        if conditions:
            effects = {label: changed[label] for label in conditions}
            robustness.append(robustness_table(rater.name, groups, effects))

    # --- Measure the same parameters in all human performances, and correlate them with the ratings
    played, measures = data.index[data.index["human"]], []
    for clip, segment in zip(played["clip"], played["segment"]):
        performance, score = data.performance(clip), data.score(segment)
        measures.append(dict.fromkeys(PARAMETERS, np.nan))
        for name, parameter in PARAMETERS.items():
            if score is not None or not parameter.needs_score:
                with contextlib.suppress(NotApplicable):
                    measures[-1][name] = parameter.measure(performance, score)
    ratings = np.stack([data.ratings[clip] for clip in played["clip"]]).astype(float)
    experts = expert_correlations(pd.DataFrame(measures), ratings, played["segment"].to_numpy())

    # --- Write tables, figures and the summary
    tables = {
        "sensitivity": pd.concat(sensitivity, ignore_index=True),
        "experts": experts,
        "clips": chosen[["clip", "composition", "player", "content_group"]],
        "left_out": pd.DataFrame(left_out, columns=["clip", "variation", "reason"]),
    }
    if robustness:
        tables["robustness"] = pd.concat(robustness, ignore_index=True)
    for name, table in tables.items():
        table.to_csv(out / f"{name}.csv", index=False, float_format="%.5f", lineterminator="\n")
    facts = {"clips": options.clips, "synthesizer": options.synthesizer}
    facts |= {"others": options.synthesizers[1:], "seed": options.seed}
    write_json(out / "settings.json", facts | {"simulated": data.simulated})
    (out / "figures").mkdir(exist_ok=True)
    remark = " (simulated ratings)" * data.simulated
    for model, part in tables["sensitivity"].groupby("model", sort=False):
        title = f"{model}: {len(clips)} performances, one change each{remark}"
        save(figures.sensitivity(part, title), out / "figures" / f"sensitivity_{model}")
    if robustness:
        title = f"{len(clips)} performances under other recording conditions{remark}"
        save(figures.robustness(tables["robustness"], title), out / "figures" / "robustness")
    lines = sentences("sensitivity", "summary", tables, data.simulated, CLEAR)
    (out / "summary.txt").write_text("\n".join(lines) + "\n")
    logger.info("\n".join(lines))
    return out


def sample_clips(index: pd.DataFrame, n: int, seed: int) -> pd.DataFrame:
    """Draw ``n`` human performances from an index with the columns ``clip, composition, player,
    human``, balanced over compositions and, within each, over players. InputError: a column is
    missing, or there are fewer than ``n`` such clips."""
    if missing := [name for name in ("composition", "player") if name not in index]:
        raise InputError(
            f"the index lacks {', '.join(missing)}, which the selection of clips needs; add these"
            " columns."
        )
    played = index[index["human"]]
    if not 2 <= n <= len(played):
        raise InputError(
            f"{n} clips requested of {len(played)} human performances in the index; choose from 2"
            " to that number."
        )
    played = played.sample(frac=1, random_state=seed)
    # Round robin: every player's first clip before any second one, every composition's first before
    # any second.
    for columns in (["composition", "player"], ["composition"]):
        turn = played.groupby(columns).cumcount()
        played = played.iloc[np.argsort(turn, kind="stable")]
    return played[:n].sort_values("clip").reset_index(drop=True)


class _Data:
    """PercePiano's folder, or one with its layout: performances, the scores of their segments and
    ratings."""

    def __init__(self, folder: str | Path, out: Path, options: SensitivityOptions):
        self.out, self.options = out, options
        self.index = percepiano.load_index(folder)
        self.ratings = percepiano.read_ratings(folder, self.index)
        self.simulated = percepiano.is_simulated(folder)
        self._midi = percepiano.find_midi(folder)
        deadpan = self.index[~self.index["human"]].sort_values("clip").drop_duplicates("segment")
        self._score = dict(zip(deadpan["segment"], deadpan["clip"]))

    def performance(self, clip: str) -> Performance:
        """The clip's performance, trimmed."""
        if clip not in self._midi:
            raise InputError(
                f"no MIDI file {clip}.mid, which the index lists; download the data again."
            )
        return trimmed(read_midi(self._midi[clip]))

    def score(self, segment: str) -> Performance | None:
        """The deadpan rendering of a segment, or None."""
        return self.performance(self._score[segment]) if segment in self._score else None

    def rater(self, model: str) -> RatingFunction:
        """The rating function of ``model``: a statistics baseline (fitted here), a model file or a
        fine-tuned run."""
        if model in (rate.NAME, "packaged"):  # the latter is its former name
            return ModelFileRater()
        if model.endswith(".safetensors"):
            return ModelFileRater(model)
        if model not in STATISTICS:
            return RunRater(model, self.index)
        hears, _, code = STATISTICS[model]
        clips = sorted(self.index["clip"])
        takes = [self.performance(clip) for clip in clips]
        if hears == "midi":
            features = _features(model, takes)
        else:
            piano = RenderCache(self.out / "renderings", self.options.synthesizer, SAMPLE_RATE)
            piano.prepare(takes, self.options.workers)
            logger.info(f"{model}: extracting features of {len(clips):,} clips")
            features = _cached(
                self.out,
                [code, *(piano.path(take).name for take in takes)],
                ["features"],
                lambda: {"features": _features(model, map(piano.wave, takes))},
            )["features"]
        logger.info(f"{model}: fitting on {len(clips):,} clips")
        ratings = np.stack([self.ratings[clip] for clip in clips])
        features = pd.DataFrame(features, index=clips)
        return StatisticsRater(model, features, ratings, self.index, self.options.seed)


def _rate_clip(
    out: Path,
    rater: RatingFunction,
    pianos: list[RenderCache],
    clip: str,
    performances: list[Performance],
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Ratings (takes, 19) of one clip - the original, which is the first of ``performances``,
    edited, by other synthesizers, under all conditions - and which of the edited takes equal the
    original; cached between runs."""
    if pianos:
        names = [pianos[0].path(one).name for one in performances]
    else:
        names = [str((one.notes.tobytes(), one.pedals.tobytes())) for one in performances]
    names += [piano.path(performances[0]).name for piano in pianos[1:]]
    names += [rater.key, str(seed), *(effect.label for effect in EFFECTS)]

    def compute() -> dict[str, np.ndarray]:
        takes: list[RaterInput] = list(performances)
        equal: Callable[[RaterInput, RaterInput], bool] = same
        if pianos:
            takes, equal = [pianos[0].wave(one) for one in performances], np.array_equal
            effect_seed = zlib.crc32(f"{seed} {clip}".encode())
            takes += [piano.wave(performances[0]) for piano in pianos[1:]]
            takes += [one.apply(takes[0], rater.sample_rate, effect_seed) for one in EFFECTS]
        ratings = np.asarray(rater.rate(clip, takes), float)
        if ratings.shape != (len(takes), len(KEYS)) or not np.isfinite(ratings).all():
            raise InputError(
                f"{rater.name} returned ratings of shape {ratings.shape} for {len(takes)} takes of"
                f" {clip}; return {len(KEYS)} finite numbers per take."
            )
        alike = [equal(takes[0], take) for take in takes[: len(performances)]]
        return {"ratings": ratings, "alike": np.array(alike)}

    found = _cached(out, names, ["ratings", "alike"], compute)
    return found["ratings"], found["alike"]


def _cached(
    out: Path, key: list[str], names: list[str], compute: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The arrays ``names`` of ``compute``, cached below ``out`` under the hash of ``key``."""
    return cached_arrays(out / "kept" / f"{sha256_of(' '.join(key))[:32]}.npz", names, compute)
