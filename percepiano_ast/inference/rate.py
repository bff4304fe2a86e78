"""Rate recordings by a model in one file, such as the bundled `piano-rater`, or by the folds of a
fine-tuned run: ``load_model(file or run).rate(recording)``.

The clips that people rated last 4 to 100 s: a model in one file rates a recording up to that length
as a whole, a longer one in equal stretches of about a minute, whose ratings are averaged by their
length.
"""

from __future__ import annotations

import abc
import functools
import io
import json
import math
import numbers
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import numpy as np
import soundfile

from percepiano_ast import audio
from percepiano_ast.config import (
    FinetuneConfig,
    FrontEnd,
    LevelStats,
    ModelConfig,
    from_json,
    lookup,
)
from percepiano_ast.dimensions import KEYS, PERCEPIANO, RatingScale
from percepiano_ast.errors import InputError
from percepiano_ast.files import (
    MAX_MODEL,
    as_path,
    as_text,
    check_tensors,
    download,
    matching,
    one_line,
    printable,
    read_json,
    read_signed_json,
    sha256_of,
    write_tensors,
)
from percepiano_ast.inference import page
from percepiano_ast.inference.rating import WINDOW_SECONDS, Rating, decimals, to_table
from percepiano_ast.inference.regressors import CalibratedRegressors, below
from percepiano_ast.inference.transcribe import (
    METADATA,
    NOT_A_MODEL,
    Transcriber,
    read_tensors,
    transcription_features,
)
from percepiano_ast.models.cnn import ENCODERS
from percepiano_ast.music.midi import Performance, excerpt
from percepiano_ast.music.performance_features import PERFORMANCE_FEATURES
from percepiano_ast.music.piano_roll import ONSET_FROM, frames_to_notes
from percepiano_ast.music.score import Score, read_score

if TYPE_CHECKING:
    from percepiano_ast.training.finetune import Finetuning, Scaler

NAME = "piano-rater"  # the bundled model in file, card, help and tables
BUNDLED = Path(__file__).parents[1] / "weights" / f"{NAME}.safetensors"
CACHE = Path.home() / ".cache" / "percepiano_ast"
MADE_BY = "notebook 03_finetune_percepiano_gpu or `percepiano finetune`"
LONGEST_SECONDS = 100  # of PercePiano's clips
SHORTEST_SECONDS, LOWEST_RATE = 3.0, 16_000  # limits of models in one file
STRETCH_SECONDS = 60.0
_HOP_SECONDS, _MOST_WINDOWS = 2.0, 80  # of the course over time; no gap in ten minutes
# Thresholds of the warning that a sound is unlike a piano. Measured (tests/test_novelty.py): none
# of 80 recordings of four pianos exceeds them, all noise and speech does, and five in six
# instruments that sustain or ring; electric pianos and guitars rarely do.
NOVEL = 1.15  # novelty, see `CalibratedRegressors.rate`
UNCLEAR = 0.5  # mean onset probability of detected onsets, about 0.6 for pianos
_FEW_NOTES = 0.5  # notes per second
_FEWEST_NOTES = 3  # in a window of the course; with fewer it is not rated
# before the first onset and behind the last offset, as clips are rendered
_LEAD_SECONDS, _TAIL_SECONDS = 0.05, 1.5
# Cents. Resampling by any ratio moves ratings by some hundredths. With this step a piano in tune is
# not resampled, and small errors of the estimated tuning change nothing.
_TUNING_STEP = 7.0
_SILENT_DB = -50.0  # below the peak, before the first onset
_DISTORTED = 1e-4  # share of samples at full scale, above that of any mastering
_SAMPLES = {"int16": "PCM_16", "int32": "PCM_32", "float32": "FLOAT", "float64": "DOUBLE"}
_MOST_CHANNELS, _HIGHEST_RATE = 32, 1_000_000  # of arrays
_THREADS = min(os.cpu_count() or 1, 8)
_TRANSCRIBER, _REGRESSORS = "ear/", "judge/"  # prefixes of tensor names

Recording = str | os.PathLike | BinaryIO | np.ndarray
Progress = Callable[[str], None]


class Rater(abc.ABC):
    """What both kinds of model have in common; ``sample_rate`` is that of the front end, in Hz."""

    sample_rate: int
    _lowest_rate = 1

    def rate(
        self,
        recording: Recording | list[Recording],
        sample_rate: float | None = None,
        *,
        score: str | Path | Score | None = None,
        progress: Progress | None = None,
    ) -> Any:
        """Rate a recording: a `Rating`; a list of them for a list.

        Args:
            recording: path (WAV, FLAC, OGG, MP3 or M4A), binary file object, array, or list of
                these, up to an hour. Models in one file take 16 kHz and up, from 3 s on. An array
                is (n,), (n, channels) as in soundfile, or (channels, n) as in librosa, of floats
                with full scale at 1, int16 or int32.
            sample_rate: of an array, in Hz: ``rate(*soundfile.read(path))``.
            score: its score, MIDI or MusicXML, for the score-informed regressors.
            progress: called with the name of each stage.

        Raises:
            InputError: it cannot be rated; the message says why.
        """
        written = self.read_score(score)
        if isinstance(recording, (list, tuple)):
            return [self.rate(r, sample_rate, score=written, progress=progress) for r in recording]
        if progress:
            progress("reading")
        name: str | None = None
        source: Any = recording
        if isinstance(recording, np.ndarray):
            name, source = "the array", self._as_file(recording, sample_rate)
        elif sample_rate is not None:
            raise InputError(
                f"sample_rate={sample_rate!r}: for arrays only. Omit it; give a score as score="
            )
        elif isinstance(recording, io.TextIOBase):
            raise InputError(f"{recording!r} is open as text. Open it with mode 'rb'")
        elif isinstance(recording, os.PathLike):
            source = os.fspath(recording)
        elif not (isinstance(recording, str) or hasattr(recording, "read")):
            raise InputError(
                f"{type(recording).__name__} is not a recording. Give a path, a binary file object,"
                " or an array with its sample rate"
            )
        opened = audio.Recording(source, name=name, min_rate=self._lowest_rate)
        wave = opened.read(self.sample_rate)
        rating = self.rate_wave(wave, written, opened.name, progress=progress)
        if isinstance(source, str):
            rating = replace(rating, file=source)  # messages have its name on one line
        rating.warnings.extend(opened.remarks)
        if opened.full_scale > _DISTORTED:
            rating.warnings.append(
                f"{opened.full_scale:.2%} of the samples are at full scale: the recording is"
                " probably distorted"
            )
        return rating

    @abc.abstractmethod
    def rate_wave(
        self,
        wave: np.ndarray,
        score: Score | None = None,
        name: str = "this sound",
        *,
        with_course: bool = True,
        progress: Progress | None = None,
    ) -> Rating:
        """Rate a waveform, float32 (n,) at ``sample_rate``, see `rate`.

        Args:
            name: of the sound, in the rating and in messages.
            with_course: whether a model in one file rates windows too.
        """

    def read_score(self, score: str | Path | Score | None) -> Score | None:
        """The score in a MIDI or MusicXML file; InputError if this model does not use scores."""
        if score and "score" not in getattr(self, "regressors", ()):
            given = "a score" if isinstance(score, Score) else f"score {score}"
            raise InputError(
                f"{given}: this model rates from audio alone. Omit it, or use the bundled model"
            )
        return score if isinstance(score, Score) else read_score(score) if score else None

    def _as_file(self, samples: np.ndarray, sample_rate: float | None) -> BinaryIO:
        """An array of `rate` as a sound file."""
        if not isinstance(sample_rate, numbers.Real) or not (
            self._lowest_rate <= sample_rate <= _HIGHEST_RATE and sample_rate == int(sample_rate)
        ):
            raise InputError(
                f"sample_rate={sample_rate!r}: give the array's sampling rate, an integer from"
                f" {self._lowest_rate:,} to {_HIGHEST_RATE:,} Hz"
            )
        if (subtype := _SAMPLES.get(samples.dtype.name)) is None:
            raise InputError(
                f"an array of {samples.dtype}. Give float32 or float64 (full scale 1), int16, int32"
            )
        channels = min(samples.shape) if samples.ndim == 2 else samples.ndim
        if samples.ndim not in (1, 2) or not 1 <= channels <= _MOST_CHANNELS:
            raise InputError(
                f"an array of shape {samples.shape}. Give (n,), (n, channels) or (channels, n), at"
                f" most {_MOST_CHANNELS} channels"
            )
        long = samples.T if samples.shape[-1] > len(samples) else samples
        content = io.BytesIO()
        soundfile.write(content, long, int(sample_rate), format="RF64", subtype=subtype)
        return content


# --- By a model file ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class RatingModelFile(Rater):
    """A rating model in one ``.safetensors`` file, made by `percepiano package`: a transcriber and
    regressors on its output and the sound. Reading it executes nothing.

    Attributes:
        transcriber: of notes and pedals.
        mean_features: features that are used when no note is transcribed, (features,).
        regressors: two sets; ``alone``: on features of the transcription, then statistics of the
            sound; ``score``: on these and on features of the transcription aligned with the score.
        description: data, protocol, figures, licence; ``descriptors``: names of the features of
            the transcription.
    """

    transcriber: Transcriber
    mean_features: np.ndarray
    regressors: dict[str, CalibratedRegressors]
    description: dict

    _lowest_rate = LOWEST_RATE

    def rate_wave(
        self, wave, score=None, name="this sound", *, with_course=True, progress=None
    ) -> Rating:
        """See `Rater.rate_wave`."""
        front_end, rate = self.transcriber.front_end, self.sample_rate
        seconds, say = len(wave) / rate, progress or (lambda stage: None)
        if seconds < SHORTEST_SECONDS:
            raise InputError(f"{name}: {seconds:.2f} s long. Give at least {SHORTEST_SECONDS:g} s.")
        # --- Level, tune and transcribe. Leading silence would change the transcription: the wave
        # begins shortly before its first sound. Sound that begins at once gets a little silence.
        try:
            say("transcribing")
            loud = int(np.argmax(np.abs(wave) > np.abs(wave).max() * 10 ** (_SILENT_DB / 20)))
            begin = loud - round(_LEAD_SECONDS * rate)
            wave = np.concatenate([np.zeros(max(-begin, 0), np.float32), wave[max(begin, 0) :]])
            begins, ends = begin / rate, begin / rate + len(wave) / rate  # seconds
            tuning = audio.estimate_tuning(wave, rate)
            off = _TUNING_STEP * round(tuning / _TUNING_STEP)
            slower = 2 ** (off / 1200)  # seconds of the retuned wave per second of the recording
            wave = audio.normalize_loudness(audio.retune(wave, rate, -off), rate)
            codes, _ = audio.quantize(audio.log_mel(wave, front_end), front_end)
            predicted = self.transcriber.predict(codes)
            onsets = predicted.onset[predicted.onset >= ONSET_FROM]
            clearness = float(onsets.mean()) if len(onsets) else 0.0
            performance = frames_to_notes(predicted)
            starts = np.zeros(0)
            # From the first onset to the decay of the last note, as PercePiano's clips are cut.
            played = first, last = max(begins, 0.0), ends
            if performance is not None:
                notes, pedals = performance.notes.copy(), performance.pedals.copy()
                for table, column in ((notes, "onset"), (notes, "offset"), (pedals, "time")):
                    table[column] = np.maximum(table[column] / slower + begins, 0.0)
                performance, starts = Performance(notes, pedals), notes["onset"]
                start = max(float(notes["onset"].min()) - _LEAD_SECONDS, first)
                stop = max(float(notes["offset"].max()) + _TAIL_SECONDS, start + SHORTEST_SECONDS)
                played = min(start, max(last - SHORTEST_SECONDS, first)), min(stop, last)

            def n_onsets(part: tuple[float, float]) -> int:
                return int(((starts >= part[0]) & (starts < part[1])).sum())

            def features(parts: list[tuple[float, float]], score: Score | None = None) -> Iterator:
                def one(part: tuple[float, float]) -> np.ndarray:
                    notes = None if performance is None else excerpt(performance, *part)
                    first, last = (round((at - begins) * slower * rate) for at in part)
                    return self.features(notes, wave[first:last], score)

                with ThreadPoolExecutor(_THREADS) as pool:
                    yield from pool.map(one, parts)

            # --- Rate the whole
            regressors = self.regressors["alone" if score is None else "score"]
            parts = [part for part in stretches(*played) if n_onsets(part)] or [played]
            say("rating")
            rated, novelty = regressors.rate(np.stack([*features(parts, score)]))
        except InputError as reason:
            raise InputError(f"{name}: {reason}") from reason
        lengths = np.array([stop - start for start, stop in parts])
        ratings, deviation = lengths / sum(lengths.tolist()) @ rated, regressors.deviation
        edges = regressors.percentiles(np.stack([ratings - deviation, ratings + deviation]))

        # --- Rate its course over time, without the score, whose features need more than a few
        # seconds
        spans = windows(*played) if with_course else []
        course = np.full((len(spans), len(KEYS)), np.nan, np.float32)
        rated_spans = [k for k, span in enumerate(spans) if n_onsets(span) >= _FEWEST_NOTES]
        found = []
        for row in features([spans[k] for k in rated_spans]):
            found.append(row)
            say(f"rating over time, {len(found)} of {len(rated_spans)}")
        if found:
            course[rated_spans] = self.regressors["alone"].rate(np.stack(found))[0]
        percentiles = self.regressors["alone"].percentiles(course)

        # --- Warn
        long, warnings = played[1] - played[0], []
        if score is not None and score.remarks:
            warnings.append(f"the score was read with remarks: {'; '.join(score.remarks)}")
        if performance is None:
            warnings.append(
                "no piano notes were detected: the ratings rest on sound statistics alone and say"
                " nothing about a performance"
            )
        elif (pace := len(performance.notes) / long) < _FEW_NOTES:
            warnings.append(
                f"few piano notes were detected, {pace:.2f} per second: check that a piano is"
                " playing alone"
            )
        if (novel := float(np.median(novelty))) > NOVEL or clearness < UNCLEAR:
            warnings.append(
                f"the sound is unlike the pianos in training (novelty {novel:.1f}, at most"
                f" {NOVEL:g} for pianos; mean onset probability {clearness:.2f}, about 0.6 for"
                " pianos): the ratings may be meaningless"
            )
        if len(parts) > 1:
            warnings.append(
                f"{long:.0f} s long, so it is rated in {len(parts)} stretches; the clips that"
                f" people rated last at most {LONGEST_SECONDS} s"
            )

        def by_key(values: np.ndarray, digits: int = 4) -> dict[str, float]:
            return dict(zip(KEYS, (round(float(value), digits) for value in values)))

        return Rating(
            name,
            seconds,
            by_key(ratings),
            by_key(deviation),
            percentiles=by_key(regressors.percentiles(ratings), 1),
            bands=dict(zip(KEYS, map(tuple, edges.T.round(1).tolist()))),
            times=np.array(spans).reshape(-1, 2).mean(axis=1),
            course=course,
            course_percentiles=np.where(np.isnan(course), np.nan, percentiles),
            performance=performance,
            warnings=warnings,
            informed=score is not None,
            within=by_key(regressors.within),
            tuning=round(tuning, 1),
            limits=self.limits,
            performances=len(regressors.reference),
        )

    @functools.cached_property
    def sample_rate(self) -> int:  # type: ignore[override]
        """Hz, of the transcriber's front end."""
        return self.transcriber.front_end.sample_rate

    @property
    def limits(self) -> str:
        """See `Rating`; empty for other models than the bundled one."""
        known, works = (self.description[name].get("mean") for name in ("r", "r_works"))
        if self.description["model"] != NAME or None in (known, works):
            return ""
        return (
            "The model was trained on renderings of three works by Beethoven and Schubert: its"
            f" mean correlation with people's ratings is {known:.2f} on held-out passages of these"
            f" works and {works:.2f} on works left out of training, and the onset F1 of its"
            " transcription of a real Disklavier is 0.74. It does not measure quality (on 83"
            " learners' performances rated by ten people each, “doubtful to convincing” ordered"
            " better from worse at chance) and is not for judging people."
        )

    def features(
        self, performance: Performance | None, wave: np.ndarray, score: Score | None = None
    ) -> np.ndarray:
        """Features of a recording or a stretch of it, float32 (n_features,).

        Args:
            performance: its transcription; None if no note was detected.
            wave: float32 (n,) at the loudness of training, see `audio.normalize_loudness`.
            score: for the score-informed regressors.

        Raises:
            InputError: the transcription does not match the score.
        """
        notes = self.mean_features
        if performance is not None:
            notes = transcription_features(performance, self.description["descriptors"])
        sound = audio.audio_features(wave, self.sample_rate)
        parts = [notes, np.array(list(sound.values()), np.float32)]
        if score is not None:
            from percepiano_ast.music.score_features import score_features  # here: pandas

            if performance is None:
                raise InputError("no notes were detected to align with the score. Omit the score")
            matched = [*score_features(performance, score).values(), 0.0]  # 0: a match was found
            parts.append(np.array(matched, np.float32))
        return np.concatenate(parts)

    def write(self, path: str | Path) -> Path:
        """Save as a ``.safetensors`` file, which `read` loads."""
        tensors, metadata = self.transcriber.tensors()
        tensors = {_TRANSCRIBER + name: values for name, values in tensors.items()}
        tensors["unheard"] = self.mean_features.astype(np.float32)
        for name, regressors in self.regressors.items():
            found = regressors.tensors().items()
            tensors |= {f"{_REGRESSORS}{name}/{key}": values for key, values in found}
        metadata["description"] = json.dumps(self.description)
        metadata["judges"] = json.dumps([*self.regressors])
        write_tensors(path, tensors, metadata)
        return Path(path)

    @classmethod
    def read(cls, path: str | Path = BUNDLED) -> Self:
        """Load a file that `write` saved, by default the bundled model.

        Raises:
            InputError: missing, damaged, another kind of model, or one of another version.
        """
        signed = check_tensors(path)
        try:
            tensors, metadata = read_tensors(path, (*METADATA, "judges"), signed)
            known = {"model": str, "descriptors": [str], "r": {str: float}, "r_works": {str: float}}
            description = read_json(
                metadata["description"].encode(), known, name="its description", advice=""
            )
            regressors = {
                name: CalibratedRegressors.from_tensors(below(tensors, f"{_REGRESSORS}{name}/"))
                for name in read_json(metadata["judges"].encode(), [str], name="judges", advice="")
            }
            transcriber = Transcriber.from_tensors(below(tensors, _TRANSCRIBER), metadata)
            if unknown := [n for n in description["descriptors"] if n not in PERFORMANCE_FEATURES]:
                names = ", ".join(unknown)
                raise ValueError(f"made by another version, with the descriptors {names}")
            if tensors["unheard"].shape != (len(description["descriptors"]),):
                raise ValueError("as many mean features as descriptors are needed")
            if "alone" not in regressors:
                raise ValueError("no regressors without a score")
            return cls(transcriber, tensors["unheard"], regressors, description)
        except NOT_A_MODEL as error:
            raise InputError(
                f"{path}: not a rating model of this version ({one_line(error)}). Give a file made"
                " by this version's `percepiano package`"
            ) from error


def stretches(start: float, stop: float) -> list[tuple[float, float]]:
    """The stretches that are rated as wholes, starts and ends in seconds."""
    seconds = stop - start
    number = 1 if seconds <= LONGEST_SECONDS else math.ceil(seconds / STRETCH_SECONDS)
    edges = np.linspace(start, stop, number + 1).tolist()
    return list(zip(edges[:-1], edges[1:]))


def windows(start: float, stop: float) -> list[tuple[float, float]]:
    """Windows of the course over time: 8 s every 2 s, further apart in a long recording; a single
    one in a short recording."""
    seconds = stop - start
    if seconds <= WINDOW_SECONDS:
        return [(start, stop)]
    number = min(math.ceil((seconds - WINDOW_SECONDS) / _HOP_SECONDS) + 1, _MOST_WINDOWS)
    firsts = np.linspace(start, stop - WINDOW_SECONDS, number).tolist()
    return [(first, first + WINDOW_SECONDS) for first in firsts]


# --- By the folds of a fine-tuned run -------------------------------------------------------------


@dataclass(frozen=True)
class FoldModel:
    """One fold's self-contained model; ``longest`` is the longest training clip, in seconds."""

    run: Finetuning
    params: dict
    scaler: Scaler
    simulated: bool
    longest: float = LONGEST_SECONDS

    @classmethod
    def open(cls, folder: Path) -> Self:
        """The finished model in ``folder``; InputError if another version wrote it."""
        # here: what reads a run takes a second to import, and rating by a file needs none of it
        from percepiano_ast.training.checkpoints import open_latest
        from percepiano_ast.training.finetune import Finetuning, Scaler

        tree, meta = open_latest(folder, made_by=MADE_BY)
        written = f"{folder} was written by version {meta['code_version']},"
        again = f"Run {MADE_BY} again in a new directory, or rate with that version"
        if odd := meta["finetune"].keys() - {one.name for one in fields(FinetuneConfig)}:
            raise InputError(f"{written} with other settings ({', '.join(sorted(odd))}). {again}")
        encoder = ENCODERS.get(meta["model"]["name"])
        kind = encoder.config if encoder else ModelConfig
        model, config = from_json(kind, meta["model"]), from_json(FinetuneConfig, meta["finetune"])
        beside = len(PERFORMANCE_FEATURES) if config.transcription_features else 0
        if config.transcription_features and (used := len(tree["params"]["unheard"])) != beside:
            raise InputError(f"{written} whose heads use {used} descriptors, not {beside}. {again}")
        front_end, statistics = FrontEnd(**meta["front_end"]), LevelStats(**meta["statistics"])
        asked = RatingScale.from_settings(meta)
        run = Finetuning(
            model, config, front_end, statistics, 1, questionnaire=asked, extra_features=beside
        )
        longest = meta.get("longest", LONGEST_SECONDS)
        return cls(run, tree["params"], Scaler(**tree["scaler"]), meta["simulated"], longest)

    def rate(self, codes: np.ndarray) -> np.ndarray:
        """Ratings (K,) of a whole recording, uint8 codes (time, mel)."""
        return self.distribution(codes)[0]

    def distribution(
        self, codes: np.ndarray, extra: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `rate`, and the predicted standard deviations (K,), not calibrated; NaN if the heads
        predict none. ``extra``: the result of `extra_features`, if it is known."""
        from percepiano_ast.data import batches  # here: grain, see `open`

        windows = batches.clip_windows([codes], n_frames=self.run.model.n_frames, batch_size=16)
        embedding = self.run.embed(self.params, windows, 1)
        if self.run.config.transcription_features:
            given = self.extra_features(codes) if extra is None else extra
            embedding = np.concatenate([embedding, np.asarray(given)[None, :]], axis=1)
        found = self.run.distribution(self.params, self.scaler, embedding)
        return found[0][0], found[1][0]

    def extra_features(self, codes: np.ndarray) -> np.ndarray | None:
        """Extra inputs of the heads: features of the transcription, or their mean without notes;
        None for other models."""
        if not self.run.config.transcription_features:
            return None
        performance = self._transcriber.transcribe(codes)
        if performance is None:
            return self.params["unheard"]
        return transcription_features(performance)

    @functools.cached_property
    def _transcriber(self) -> Transcriber:
        run = self.run
        assert isinstance(run.model, ModelConfig)  # the only encoder that can transcribe
        return Transcriber(self.params, run.model, run.front_end, run.statistics, run.compute)


class FoldEnsemble(Rater):
    """All fold models of a run: the rating is their mean, the uncertainty their standard deviation.

    If the heads predict an uncertainty, the result is the standard deviation of the mixture of
    their normal distributions: its variance is the mean of the calibrated predicted variances plus
    the variance between folds (Lakshminarayanan et al. 2017, section 2.4).

    Args:
        run: directory of a run, or the store of its models.
        model: its name below ``run/finetune``; by default the only one, or the pre-trained one.

    Attributes:
        models, folds: of the finished folds, and their numbers; each is held out for its model.

    Raises:
        InputError: no such model, or no finished fold.
    """

    def __init__(self, run: str | Path, model: str = ""):
        home = as_path(run) / "finetune"
        if not (names := names_of_models(home)):
            raise InputError(f"no model in {home}. Run {MADE_BY} first")
        if model:
            home = lookup({name: home / name for name in names}, model, "model")
        else:
            wanted = [name for name in names if name.endswith("-ssast")] or names
            if len(wanted) > 1:
                raise InputError(
                    f"{home} has several models: {', '.join(wanted)}. Choose one with --model"
                )
            home = home / wanted[0]
        self.name = home.name
        markers = home.glob("fold_*/model/step_*.json")
        finished = sorted(
            {m.parent for m in markers if re.search(r"/fold_\d+/model/", m.as_posix())}
        )
        if not finished:
            raise InputError(f"no fold in {home} is finished. Run {MADE_BY} to resume")
        self.models = [FoldModel.open(folder) for folder in finished]
        self.scale = self.models[0].run.questionnaire
        self.sample_rate = self.models[0].run.front_end.sample_rate
        file, self.temperature = home / "temperature.json", None
        if file.exists():
            advice = "Delete it and run `percepiano finetune` again, which writes it."
            known = read_signed_json(file, {"temperature": float}, advice=advice, unsigned=True)
            self.temperature = float(known["temperature"])
            if not 0 < self.temperature < math.inf:
                raise InputError(f"{file}: a temperature of {self.temperature}. {advice}")
        names = [path.parent.name for path in finished]
        self.folds = [int(name.removeprefix("fold_")) for name in names]
        self.unfinished = sorted({path.name for path in home.glob("fold_*")} - {*names})

    def rate_wave(
        self, wave, score=None, name="this sound", *, with_course=True, progress=None
    ) -> Rating:
        """See `Rater.rate_wave`; there is no course."""
        self.read_score(score)  # refused
        if progress:
            progress("rating")
        first = self.models[0]
        codes, clipped = audio.quantize(
            audio.log_mel(wave, first.run.front_end), first.run.front_end
        )
        extra = first.extra_features(codes)  # the encoder is frozen, so all folds have the same
        found = [model.distribution(codes, extra) for model in self.models]
        # In float64, so that rounded values print with four digits.
        rated, predicted = np.stack(found, axis=1).astype(np.float64)
        variance = rated.var(axis=0)
        seconds, warnings = len(wave) / self.sample_rate, []
        if np.isfinite(predicted).all():
            variance += np.square((self.temperature or 1.0) * predicted).mean(axis=0)
            if self.temperature is None:
                warnings.append(
                    "the uncertainty is not calibrated: that needs all folds; finish training them"
                )
        if self.unfinished:
            warnings.append(
                f"{', '.join(self.unfinished)} of {self.name} not finished: rated with the other"
                " folds only"
            )
        if clipped:
            level = "above the model's loudest level"
            warnings.append(f"{clipped:.2%} of it is {level}; export it within full scale")
        if first.simulated:
            warnings.append(
                "this model was trained on simulated ratings: its values are meaningless for real"
                " performances"
            )
        if seconds > first.longest:
            longest = f"the longest training clip has {first.longest:.0f} s"
            warnings.append(f"{seconds:.0f} s long; {longest}")
        # Ratings are rounded to a ten-thousandth of the scale, and not clipped to it.
        ratings, uncertainty = {}, {}
        columns = (self.scale.lowest, self.scale.highest, rated.mean(axis=0), np.sqrt(variance))
        for key, low, high, value, spread in zip(self.scale.names, *columns):
            digits = decimals(low, high) + 2
            ratings[key], uncertainty[key] = (float(x.round(digits)) for x in (value, spread))
            if not low <= ratings[key] <= high:
                warnings.append(
                    f"{key} is {ratings[key]:g}, outside the scale of the training ratings,"
                    f" {low:g} to {high:g}"
                )
        return Rating(name, seconds, ratings, uncertainty, warnings=warnings, scale=self.scale)


def names_of_models(home: Path) -> list[str]:
    """Names of all fine-tuned models in ``home``, the folder ``finetune`` of a run or its store."""
    return [path.name for path in matching(home, "*") if path.is_dir()]


def require_percepiano(ensemble: FoldEnsemble, what: str) -> None:
    """Raises InputError if the models predict custom ratings, which the command ``what`` does not
    support."""
    if (scale := ensemble.models[0].run.questionnaire) != PERCEPIANO:
        raise InputError(
            f"{ensemble.name} predicts custom ratings ({', '.join(scale.names)}), but {what}"
            f" supports only PercePiano's {len(KEYS)} dimensions. Choose a run that was fine-tuned"
            " on PercePiano"
        )


def require_explained(ensemble: FoldEnsemble) -> None:
    """Raises InputError if ratings depend on inputs that ``explain`` does not cover."""
    require_percepiano(ensemble, "explain")
    if ensemble.models[0].run.config.transcription_features:
        raise InputError(
            f"{ensemble.name} uses transcription descriptors besides its embedding, which explain"
            " does not cover. Choose a model that was fine-tuned without transcription_features"
        )


# --- Load and rate --------------------------------------------------------------------------------


def load_model(path: str | Path = BUNDLED, model: str = "") -> Rater:
    """Load a model: ``load_model().rate("take.m4a")``.

    Args:
        path: a file that ``percepiano package`` made, or ``https://...#sha256=...``, see `fetched`;
            or the directory of a fine-tuned run, or its store (a folder or ``gs://``). By default
            the bundled model, `piano-rater`.
        model: of a run with several, a name below its folder ``finetune``.

    Raises:
        InputError: no such file or run, or not a rating model of this version; see `fetched`.
    """
    name = str(path)
    if "://" in name and (".safetensors" in name or not name.startswith("gs://")):
        return RatingModelFile.read(fetched(name))
    if Path(path).is_file() or Path(path).suffix == ".safetensors":
        return RatingModelFile.read(path)
    return FoldEnsemble(path, model)


def rate(
    recording: Recording | list[Recording],
    sample_rate: float | None = None,
    *,
    score: str | Path | None = None,
    model: str | Path = BUNDLED,
) -> Any:
    """Rate a recording by the bundled model or that of `load_model`, see `Rater.rate`: a
    path, a binary file object, an array with its ``sample_rate``, or a list of these."""
    return load_model(model).rate(recording, sample_rate, score=score)


def recordings_in(places: Iterable[str | Path]) -> tuple[list[str | Path], dict[Path, str]]:
    """The recordings that files and folders name, in order, and what is left out of the folders,
    see `audio.find_recordings`. A folder without a recording is among the former: rating it raises
    an error that says so."""
    found: list[str | Path] = []
    left: dict[Path, str] = {}
    for place in places:
        inside: list[Path] = []
        if os.path.isdir(place):
            inside, others = audio.find_recordings(place)
            left |= others
        found += inside or [place]
    return found, left


def rate_files(
    files: Iterable[str | Path],
    *,
    weights: str | Path = "",
    run: str | Path = "",
    model: str = "",
    score: str | Path = "",
    csv: str | Path = "",
    html: str | Path = "",
    progress: Callable[[str, str], None] | None = None,
    show: Callable[[Rating | dict], None] | None = None,
) -> list[Rating | dict]:
    """The command ``rate``: rate files, and write a table and a page of those that can be rated.

    Args:
        weights, run, model: see `load_model`: a file or URL, or a run and its model.
        progress: called with the file and the name of each stage, empty after the last.
        show: called with each result.

    Returns:
        for each file a `Rating`, or ``{"file", "error"}``, see `files.as_text`.

    Raises:
        InputError: before rating: options that exclude each other, a page or table that cannot be
            written.
    """
    for option, given, suffix in (("--csv", csv, ""), ("--html", html, ".html")):
        if not given:
            continue
        path = Path(given)
        if not path.name.lower().endswith(suffix):
            raise InputError(f"{option} {given}: the name of a page ends with {suffix}. Add it")
        if path.is_dir() or not path.parent.is_dir():
            fault = "a folder" if path.is_dir() else f"there is no folder {path.parent}"
            raise InputError(f"{option} {given}: {fault}. Name a file in an existing folder")
    if weights and run:
        raise InputError(f"--weights {weights} and --run {run}: two models. Give one of them")
    if model and not run:
        raise InputError(f"--model {model}: names a model of a run. Give the run with --run")
    rater = FoldEnsemble(run, model) if run else load_model(weights or BUNDLED)
    written = rater.read_score(score)
    results: list[Rating | dict] = []
    sounds = []
    with ThreadPoolExecutor(1) as encoder:
        for file in map(str, files):
            sound = encoder.submit(page.sound, file) if html else None
            say = functools.partial(progress, file) if progress else None
            try:
                results.append(rater.rate(file, score=written, progress=say))
                sounds.append(sound)
            except InputError as error:
                reason = str(error).removeprefix(f"{printable(file)}: ")
                results.append({"file": as_text(file), "error": reason})
            finally:
                if say:
                    say("")
            if show:
                show(results[-1])
        rated = [one for one in results if isinstance(one, Rating)]
        if csv:
            from percepiano_ast.tables import to_csv  # here, because pandas takes 0.2 s to import

            Path(csv).write_bytes(to_csv(to_table(rated)))
        if html and rated:
            page.write_page(rated, html, [one.result() for one in sounds if one])
    return results


def fetched(place: str, cache: str | Path = CACHE) -> Path:
    """Path of a model file; one at ``https://...#sha256=...`` is downloaded into ``cache`` once.

    Raises:
        InputError: a URL without a checksum, or a file with another one; see `download`.
    """
    if "://" not in place:
        return Path(place)
    url, _, wanted = place.partition("#sha256=")
    if not re.fullmatch(r"[0-9a-f]{64}", wanted):
        raise InputError(
            f"{place}: a URL without a checksum. Append #sha256= and the file's 64-digit SHA-256"
        )
    path = Path(cache) / f"{wanted[:16]}.safetensors"
    if path.exists() and sha256_of(path) == wanted:
        return path
    if (found := download(url, path, MAX_MODEL)) != wanted:
        path.unlink()
        raise InputError(
            f"{url}: its SHA-256 is {found}, not {wanted}, so it was deleted. Check the URL and the"
            " checksum"
        )
    return path
