"""Run the sensitivity test: sample clips, vary, render and rate them, and write tables, figures and
a summary."""

import hashlib
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from percepiano_ast.audio.effects import EFFECTS
from percepiano_ast.data import demo, percepiano
from percepiano_ast.dimensions import KEYS
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation import analysis
from percepiano_ast.evaluation.analysis import ChangedRatings
from percepiano_ast.files import write_json
from percepiano_ast.listening import raters
from percepiano_ast.listening.raters import Rate
from percepiano_ast.music.edits import EDITS, PARAMETERS, Edit, NotApplicable, same
from percepiano_ast.music.midi import Performance, read_midi, trimmed
from percepiano_ast.music.synth import SOUNDFONTS, BuiltinPiano, RenderCache, make_synthesizer
from percepiano_ast.plots import studies as listening_plots

_EVERY = 10.0  # seconds between progress lines
SYNTHESIZER = "musescore-small"  # the soundfont in which velocity changes the timbre too
OTHERS = (*SOUNDFONTS, BuiltinPiano.name)


@dataclass(frozen=True, eq=False)
class Settings:
    """Options of a sensitivity test.

    Attributes:
        clips: number of clips to draw.
        synthesizer: renders the original and varied clips.
        others: further synthesizers for the robustness test; None for all of the package.
        seed: for all random choices: clips, noise, rooms, fit of the statistics baselines.
        workers: number of rendering processes.
    """

    clips: int = 100
    synthesizer: str = SYNTHESIZER
    others: tuple[str, ...] | None = None
    seed: int = 0
    workers: int = 1

    @property
    def other_pianos(self) -> tuple[str, ...]:
        """``others`` without ``synthesizer``."""
        names = OTHERS if self.others is None else self.others
        return tuple(name for name in names if name != self.synthesizer)


@dataclass(frozen=True, eq=False)
class Material:
    """One clip: its performance, its variations, and the variations that do not apply to it, with
    the reason."""

    clip: str
    group: str
    played: Performance
    varied: dict[Edit, Performance]
    left_out: dict[Edit, str]


def sample(index: pd.DataFrame, n: int, seed: int) -> pd.DataFrame:
    """Draw ``n`` human performances, balanced over compositions and, within each, over players.

    Args:
        index: with the columns ``clip``, ``composition``, ``player`` and ``human``.

    Raises:
        InputError: a column is missing, or there are fewer than ``n`` such clips.
    """
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
    turn = played.groupby(["composition", "player"]).cumcount()
    played = played.iloc[np.argsort(turn, kind="stable")]
    turn = played.groupby("composition").cumcount()
    return (
        played.iloc[np.argsort(turn, kind="stable")[:n]].sort_values("clip").reset_index(drop=True)
    )


class _Folder:
    """PercePiano's folder, or one with its layout: performances, the scores of their segments,
    ratings."""

    def __init__(self, folder: str | Path):
        self.index = percepiano.load_index(folder)
        self.ratings = percepiano.read_ratings(folder, self.index)
        self.simulated = percepiano.is_simulated(folder)
        self._midi = percepiano.find_midi(folder)
        deadpan = self.index[~self.index["human"]].sort_values("clip").drop_duplicates("segment")
        self._score = dict(zip(deadpan["segment"], deadpan["clip"]))

    def play(self, clip: str) -> Performance:
        """The clip's performance, trimmed."""
        if clip not in self._midi:
            raise InputError(
                f"no MIDI file {clip}.mid, which the index lists; download the data again."
            )
        return trimmed(read_midi(self._midi[clip]))

    def score(self, segment: str) -> Performance | None:
        """The deadpan rendering of a segment, or None."""
        return self.play(self._score[segment]) if segment in self._score else None

    def material(self, chosen: pd.DataFrame) -> list[Material]:
        """The drawn clips with all their variations."""
        found = []
        for clip, segment, group in zip(
            chosen["clip"], chosen["segment"], chosen["content_group"], strict=True
        ):
            played, score, varied, left_out = self.play(clip), self.score(segment), {}, {}
            for variation in EDITS:
                try:
                    varied[variation] = variation.apply(played, score)
                except NotApplicable as error:
                    left_out[variation] = str(error)
            found.append(Material(clip, group, played, varied, left_out))
        return found

    def experts(self) -> pd.DataFrame:
        """`evaluation.analysis.expert_correlations` of all human performances."""
        played = self.index[self.index["human"]]
        rows = [
            _measures(self.play(clip), self.score(segment))
            for clip, segment in zip(played["clip"], played["segment"])
        ]
        ratings = np.stack([self.ratings[clip] for clip in played["clip"]]).astype(float)
        return analysis.expert_correlations(
            pd.DataFrame(rows), ratings, played["segment"].to_numpy()
        )


def _measures(performance: Performance, score: Performance | None) -> dict[str, float]:
    values = {}
    for name, parameter in PARAMETERS.items():
        try:
            known = score is not None or not parameter.needs_score
            values[name] = parameter.measure(performance, score) if known else np.nan
        except NotApplicable:
            values[name] = np.nan
    return values


class _Session:
    """State shared by the models of one test: clips, renderings and cached ratings."""

    def __init__(self, folder: _Folder, out: Path, settings: Settings, log: Callable[[str], None]):
        self.folder, self.out, self.settings, self.log = folder, out, settings, log
        self.chosen = sample(folder.index, settings.clips, settings.seed)
        self.material = folder.material(self.chosen)
        self.groups = self.chosen["content_group"].to_numpy()

    def renderings(self, synthesizer: str, sample_rate: int) -> RenderCache:
        """Renderings by one synthesizer at one sampling rate."""
        return RenderCache(self.out / "renderings", synthesizer, sample_rate)

    def rater(self, model: str) -> Rate:
        """The rating function of ``model``: a statistics baseline (fitted here), a single-file
        model or a fine-tuned run."""
        if model == "packaged" or model.endswith(".safetensors"):
            return raters.PackagedRater(raters.BUNDLED if model == "packaged" else model)
        if model not in raters.STATISTICS:
            return raters.RunRater(model, self.folder.index)
        features = self._statistics(model)
        self.log(f"{model}: fitting on {len(features):,} clips")
        ratings = np.stack([self.folder.ratings[clip] for clip in features.index])
        return raters.fit_statistics(
            model, features, ratings, self.folder.index, self.settings.seed
        )

    def _statistics(self, model: str) -> pd.DataFrame:
        """Features of a statistics baseline for all rated clips, one row per clip."""
        hears, hear, code = raters.STATISTICS[model]
        clips = sorted(self.folder.index["clip"])
        takes = [self.folder.play(clip) for clip in clips]
        if hears == "midi":
            return pd.DataFrame([hear(take) for take in takes], index=clips)
        sound = self.renderings(self.settings.synthesizer, raters.SAMPLE_RATE)
        sound.prepare(takes, self.settings.workers, self.log)
        self.log(f"{model}: extracting features of {len(clips):,} clips")
        names = [code, *(sound.path(take).name for take in takes)]
        found = self._kept(
            names, lambda: {"features": np.stack([hear(sound.wave(take)) for take in takes])}
        )
        return pd.DataFrame(found["features"], index=clips)

    def _kept(
        self, names: list[str], compute: Callable[[], dict[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        """The result of ``compute``, cached under the hash of ``names``."""
        path = (
            self.out / "kept" / f"{hashlib.sha256(' '.join(names).encode()).hexdigest()[:32]}.npz"
        )
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            with partial.open("wb") as file:
                np.savez(file, **compute())
            partial.replace(path)
        with np.load(path) as file:
            return dict(file)

    def tables(self, rater: Rate) -> tuple[pd.DataFrame, pd.DataFrame | None]:
        """Sensitivity, and robustness for a model with audio input."""
        if rater.hears not in ("audio", "midi"):
            raise InputError(f"{rater.name}: `hears` is {rater.hears!r}; set it to audio or midi.")
        pianos = self._pianos(rater) if rater.hears == "audio" else []
        rated, start = [], time.monotonic()
        shown = start
        for one in self.material:
            rated.append(self._rated(rater, pianos, one))
            if (now := time.monotonic()) - shown > _EVERY:
                shown = now
                left = (now - start) / len(rated) * (len(self.material) - len(rated))
                self.log(
                    f"  {rater.name}: {len(rated)} of {len(self.material)} clips, about {left:.0f}"
                    " s left"
                )
        self.log(f"{rater.name}: {len(rated)} clips rated")
        before = np.stack([values[0] for values, _ in rated])
        varied = {variation: self._comparison(rated, before, variation) for variation in EDITS}
        sensitivity = analysis.sensitivity(rater.name, self.groups, varied)
        if not pianos:
            return sensitivity, None
        labels = [f"piano {one.synthesizer}" for one in pianos[1:]] + [
            condition.label for condition in EFFECTS
        ]
        after = {
            label: np.stack([values[i - len(labels)] for values, _ in rated])
            for i, label in enumerate(labels)
        }
        same_sound = np.zeros(len(rated), dtype=bool)
        found = {
            label: ChangedRatings(before, values, same_sound) for label, values in after.items()
        }
        return sensitivity, analysis.robustness(rater.name, self.groups, found)

    def _pianos(self, rater: Rate) -> list[RenderCache]:
        """Renderings by the synthesizer of the test and by the others, with all needed audio
        rendered."""
        names = (self.settings.synthesizer, *self.settings.other_pianos)
        pianos = [self.renderings(name, rater.sample_rate) for name in names]
        played = [one.played for one in self.material]
        pianos[0].prepare(
            [*played, *(p for one in self.material for p in one.varied.values())],
            self.settings.workers,
            self.log,
        )
        for piano in pianos[1:]:
            piano.prepare(played, self.settings.workers, self.log)
        return pianos

    def _rated(
        self, rater: Rate, pianos: list[RenderCache], one: Material
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ratings (takes, 19) of one clip - original, varied, by other synthesizers, under all
        conditions - and which of the varied takes equal the original; cached between runs."""
        performances = [one.played, *one.varied.values()]
        names = [
            str(pianos[0].path(p).name if pianos else (p.notes.tobytes(), p.pedals.tobytes()))
            for p in performances
        ]
        names += [piano.path(one.played).name for piano in pianos[1:]]
        names += [rater.key, str(self.settings.seed), *(condition.label for condition in EFFECTS)]

        def compute() -> dict[str, np.ndarray]:
            takes: Sequence[raters.Take] = (
                self._sounds(pianos, one, performances) if pianos else performances
            )
            alike: Callable[[raters.Take, raters.Take], bool] = np.array_equal if pianos else same
            values = np.asarray(rater.rate(one.clip, takes), float)
            _check_ratings(values, len(takes), rater, one.clip)
            return {
                "ratings": values,
                "alike": np.array([alike(takes[0], take) for take in takes[: len(performances)]]),
            }

        found = self._kept(names, compute)
        return found["ratings"], found["alike"]

    def _sounds(
        self, pianos: list[RenderCache], one: Material, performances: list[Performance]
    ) -> list[np.ndarray]:
        waves = [pianos[0].wave(performance) for performance in performances]
        seed = zlib.crc32(f"{self.settings.seed} {one.clip}".encode())
        conditions = [
            condition.apply(waves[0], pianos[0].sample_rate, seed) for condition in EFFECTS
        ]
        return waves + [piano.wave(one.played) for piano in pianos[1:]] + conditions

    def _comparison(
        self, rated: list[tuple], before: np.ndarray, variation: Edit
    ) -> ChangedRatings:
        after, alike = np.full_like(before, np.nan), np.zeros(len(before), dtype=bool)
        for i, (one, (values, same_take)) in enumerate(zip(self.material, rated, strict=True)):
            if variation in one.varied:
                place = 1 + list(one.varied).index(variation)
                after[i], alike[i] = values[place], same_take[place]
        return ChangedRatings(before, after, alike)

    def left_out(self) -> pd.DataFrame:
        """Variations that do not apply to a clip, and why."""
        rows = [
            (one.clip, variation.label, why)
            for one in self.material
            for variation, why in one.left_out.items()
        ]
        return pd.DataFrame(rows, columns=["clip", "variation", "reason"])


def _check_ratings(values: np.ndarray, takes: int, rater: Rate, clip: str) -> None:
    if values.shape != (takes, len(KEYS)) or not np.isfinite(values).all():
        raise InputError(
            f"{rater.name} returned ratings of shape {values.shape} for {takes} takes of {clip};"
            f" return {len(KEYS)} finite numbers per take."
        )


def listen(
    folder: str | Path,
    out: str | Path,
    models: Sequence[str | Rate],
    settings: Settings = Settings(),
    log: Callable[[str], None] = print,
) -> Path:
    """Test models; writes ``sensitivity.csv``, ``robustness.csv`` (models with audio input),
    ``experts.csv``, ``clips.csv``, ``left_out.csv``, ``summary.txt`` and ``figures/`` into ``out``.
    Renderings and ratings are cached there, so an interrupted test resumes.

    Args:
        folder: PercePiano's, one with its layout, or ``demo`` for the embedded data.
        models: names in `raters.STATISTICS`, ``packaged`` for the bundled model, a model file,
            directories of fine-tuned runs, rating functions, or ``module:attribute`` of one.

    Returns:
        ``out``.

    Raises:
        InputError: invalid data or model, a synthesizer that is not installed, too few clips.
    """
    out = Path(out)
    models = [
        raters.imported(one) if isinstance(one, str) and ":" in one and "://" not in one else one
        for one in models
    ]
    if any(_hears(model) == "audio" for model in models):
        for name in (settings.synthesizer, *settings.other_pianos):
            make_synthesizer(name)  # report a missing soundfont before the work starts
    if str(folder) == "demo":
        folder = demo.write_percepiano(out / "demo" / "percepiano")
    session = _Session(_Folder(folder), out, settings, log)
    found = [
        session.tables(session.rater(model) if isinstance(model, str) else model)
        for model in models
    ]
    sensitivity = pd.concat([one for one, _ in found], ignore_index=True)
    robust = [one for _, one in found if one is not None]
    tables = {
        "sensitivity": sensitivity,
        "experts": session.folder.experts(),
        "clips": session.chosen[["clip", "composition", "player", "content_group"]],
        "left_out": session.left_out(),
    }
    if robust:
        tables["robustness"] = pd.concat(robust, ignore_index=True)
    for name, table in tables.items():
        table.to_csv(out / f"{name}.csv", index=False, float_format="%.5f", lineterminator="\n")
    write_json(
        out / "settings.json",
        {
            "clips": settings.clips,
            "synthesizer": settings.synthesizer,
            "others": settings.other_pianos,
            "seed": settings.seed,
            "simulated": session.folder.simulated,
        },
    )
    _draw(tables, out / "figures", " (simulated ratings)" * session.folder.simulated)
    lines = _summary(tables, session)
    (out / "summary.txt").write_text("\n".join(lines) + "\n")
    log("\n".join(lines))
    return out


def _hears(model: str | Rate) -> str:
    """Type of input, ``audio`` or ``midi``; audio for fine-tuned runs and model files."""
    if isinstance(model, str):
        return raters.STATISTICS[model].hears if model in raters.STATISTICS else "audio"
    return model.hears


def _draw(tables: dict[str, pd.DataFrame], folder: Path, remark: str) -> None:
    folder.mkdir(exist_ok=True)
    clips = len(tables["clips"])
    figures = {
        f"sensitivity_{model}": listening_plots.sensitivity(
            part, f"{model}: {clips} performances, one change each{remark}"
        )
        for model, part in tables["sensitivity"].groupby("model", sort=False)
    }
    if "robustness" in tables:
        figures["robustness"] = listening_plots.robustness(
            tables["robustness"], f"{clips} performances under other recording conditions{remark}"
        )
    for name, figure in figures.items():
        for suffix in ("svg", "png"):
            figure.savefig(folder / f"{name}.{suffix}", dpi=150)


def _summary(tables: dict[str, pd.DataFrame], session: _Session) -> list[str]:
    """The results in sentences."""
    lines = (
        ["Ratings are simulated: the results do not apply to real performances."]
        if session.folder.simulated
        else []
    )
    lines += analysis.sensitivity_summary(tables["sensitivity"])
    if "robustness" in tables:
        lines += analysis.robustness_summary(tables["robustness"])
    for model in tables["sensitivity"]["model"].unique():
        if "robustness" not in tables or model not in set(tables["robustness"]["model"]):
            lines.append(
                f"{model} has MIDI input, so its robustness to recording conditions is not tested."
            )
    differing = tables["experts"][tables["experts"]["differs"]]
    if differing.empty:
        lines.append(
            f"People's ratings contradict no expected sign (|r| of {analysis.CLEAR} within"
            " segment)."
        )
    for parameter, part in differing.groupby("parameter", sort=False):
        cells = ", ".join(
            f"{row.dimension} (r {row.r_within:+.2f} within segment)" for row in part.itertuples()
        )
        lines.append(
            f"People's ratings have the opposite sign of the expected for more {parameter}:"
            f" {cells}."
        )
    if len(tables["left_out"]):
        lines.append(
            f"{len(tables['left_out'])} variations did not apply to a clip: see left_out.csv."
        )
    return lines
