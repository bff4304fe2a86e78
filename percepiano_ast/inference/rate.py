"""Rate recordings: by a model file, such as the bundled `piano-rater`, or by the folds of a
fine-tuned run.

A model file transcribes a recording and rates it by regressors on the transcription and the sound.
The clips that people rated last 4 to 100 s: a recording up to that length is rated as a whole, a
longer one in equal stretches of about a minute, whose ratings are averaged by their length.
"""

from __future__ import annotations

import functools
import json
import math
import re
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import pandas as pd
from safetensors.numpy import save_file

from percepiano_ast import audio
from percepiano_ast.config import (
    FinetuneConfig,
    FrontEnd,
    LevelStats,
    ModelConfig,
    from_json,
    lookup,
)
from percepiano_ast.data import sources
from percepiano_ast.dimensions import DIMENSIONS, KEYS, PERCEPIANO, Dimension, RatingScale
from percepiano_ast.errors import InputError
from percepiano_ast.files import as_path, download, sha256_of
from percepiano_ast.inference.regressors import CalibratedRegressors, below
from percepiano_ast.inference.transcribe import (
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
from percepiano_ast.music.score_features import score_features

if TYPE_CHECKING:
    from percepiano_ast.training.finetune import Finetuning, Scaler

NAME = "piano-rater"  # the bundled model in file, card, help and tables
BUNDLED = Path(__file__).parents[1] / "weights" / f"{NAME}.safetensors"
CACHE = Path.home() / ".cache" / "percepiano_ast"
MADE_BY = "notebook 03_finetune_percepiano_gpu or `percepiano finetune`"
LONGEST_SECONDS = 100  # of PercePiano's clips
SHORTEST_SECONDS, LONGEST_HOURS, LOWEST_RATE = 3.0, 1.0, 16_000  # limits of what is rated
STRETCH_SECONDS = 60.0
WINDOW_SECONDS = 8.0  # of the course over time
_HOP_SECONDS, _MOST_WINDOWS = 2.0, 80  # no gap in ten minutes
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
_NEARER = 10.0  # percentiles from the middle, from which words name the closer pole
_TRANSCRIBER, _REGRESSORS = "ear/", "judge/"  # prefixes of tensor names
# A difference of at least SURE standard deviations of its error is reported, one of at least LIKELY
# as probable. SHARES: of pairs of performances of one passage that differ by as much, people's
# ratings order this share the same way, for works left out of training on a held-out soundfont
# (tests/test_results.py, which also has the shares for the works of the training).
SURE, LIKELY = 1.0, 0.5
SHARES = (0.86, 0.75)
WIDTH = 80  # columns of the text
_CELLS = 15  # of a bar
_ASCII = str.maketrans("·─│●±", ".-|o~")

Progress = Callable[[str], None]


# --- Ratings --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """A stretch of a recording, in seconds, with its own rating, 0 to 1, and its percentile."""

    start: float
    stop: float
    rating: float
    percentile: float


@dataclass(frozen=True, eq=False)
class Rating:
    """The rating of a recording.

    Attributes:
        file, seconds: its name and length.
        ratings, uncertainty: by dimension, 0 to 1: the predicted mean rating by people, and the
            standard deviation of its error for works, soundfonts and rooms that were left out of
            training.
        percentiles: by dimension, percentage of PercePiano's human performances that people rated
            lower than ``ratings``.
        bands: by dimension, the percentiles of ``ratings`` minus and plus ``uncertainty``.
        times: middles of the windows of the course over time, seconds (m,).
        course: ratings of the windows (m, 19), NaN where fewer than three notes start.
        course_percentiles: percentiles of ``course`` (m, 19).
        performance: transcribed notes and pedals; None if no note was detected.
        warnings: reasons to doubt the ratings, in sentences.
        informed: whether the score was given.
        within: by dimension, standard deviation of errors among performances of one passage.
        tuning: cents above A4 = 440 Hz, see `audio.estimate_tuning`; the sound is retuned to
            within 4 cents of it before it is rated.
        limits: what the model was validated on and what it must not be used for, in two sentences.
        performances: number of human performances that the percentiles refer to.
    """

    file: str
    seconds: float
    ratings: dict[str, float]
    uncertainty: dict[str, float]
    percentiles: dict[str, float]
    bands: dict[str, tuple[float, float]]
    times: np.ndarray
    course: np.ndarray
    course_percentiles: np.ndarray
    performance: Performance | None
    warnings: list[str] = field(default_factory=list)
    informed: bool = False
    within: dict[str, float] = field(default_factory=dict)
    tuning: float = 0.0
    limits: str = ""
    performances: int = 0

    def words(self, key: str) -> str:
        """One dimension in words, see `in_words`."""
        return in_words(DIMENSIONS[KEYS.index(key)], self.percentiles[key], self.bands[key])

    def sentence(self, key: str) -> str:
        """One dimension in words, with its group: ``Timing: rather unstable ...``."""
        return f"{DIMENSIONS[KEYS.index(key)].family}: {self.words(key)}"

    def moments(self, key: str) -> tuple[Moment, ...]:
        """The window with the highest rating and that with the lowest; none if no window is
        rated."""
        k = KEYS.index(key)
        column = self.course[:, k]
        if np.isnan(column).all():  # also without a course
            return ()
        half, found = min(WINDOW_SECONDS, self.seconds) / 2, []
        for i in (int(np.nanargmax(column)), int(np.nanargmin(column))):
            start, stop = max(self.times[i] - half, 0.0), min(self.times[i] + half, self.seconds)
            percentile = float(self.course_percentiles[i, k])
            found.append(Moment(start, stop, float(column[i]), percentile))
        return tuple(found)

    def as_json(self) -> dict:
        """``{"file", "ratings", "uncertainty", "percentiles", "warnings"}``."""
        names = ("file", "ratings", "uncertainty", "percentiles", "warnings")
        return {name: getattr(self, name) for name in names}


def in_words(dimension: Dimension, percentile: float, band: tuple[float, float]) -> str:
    """Where a rating lies between the poles of its dimension.

    Args:
        percentile: of the rating among people's ratings of PercePiano's human performances.
        band: percentiles of the rating minus and plus its standard deviation. If it holds the
            middle (50), no side is claimed.
    """
    degree, pole, share = _side(dimension, percentile)
    if band[0] <= 50 <= band[1]:
        closer = f", closer to {pole}" if share >= 50 + _NEARER else ""
        return f"between {dimension.low} and {dimension.high}{closer}"
    most = "any" if share > 99.5 else f"{math.floor(share)} %"
    return f"{degree} {pole}, more so than {most} of the human performances"


def _side(dimension: Dimension, percentile: float) -> tuple[str, str, float]:
    """Degree (``rather``, ``clearly``, ``very``), pole, and percentage of human performances that
    are further from that pole."""
    pole, share = dimension.high, percentile
    if percentile < 50:
        pole, share = dimension.low, 100 - percentile
    return "very" if share >= 95 else "clearly" if share >= 80 else "rather", pole, share


# --- By a model file ------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class RatingModelFile:
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

    def rate(
        self,
        path: str | Path,
        score: str | Path | Score | None = None,
        progress: Progress | None = None,
    ) -> Rating:
        """Rate a recording.

        Args:
            path: WAV, FLAC, OGG, MP3 or M4A; 16 kHz and up, 3 s to an hour.
            score: its score, MIDI or MusicXML, for the score-informed regressors.
            progress: called with the name of each stage.

        Raises:
            InputError: it cannot be rated; the message says why.
        """
        written = score if isinstance(score, Score) else read_score(score) if score else None
        if progress:
            progress("reading")
        recording = audio.Recording(path, min_rate=LOWEST_RATE)
        blocks = recording.blocks(self.sample_rate, max_seconds=3600 * LONGEST_HOURS + 1)
        rating = self.rate_wave(np.concatenate(list(blocks)), written, str(path), progress=progress)
        if recording.full_scale > _DISTORTED:
            rating.warnings.append(
                f"{recording.full_scale:.2%} of the samples are at full scale: the recording is"
                " probably distorted"
            )
        return rating

    def rate_wave(
        self,
        wave: np.ndarray,
        score: Score | None = None,
        name: str = "this sound",
        *,
        with_course: bool = True,
        progress: Progress | None = None,
    ) -> Rating:
        """Rate a waveform.

        Args:
            wave: float32 (n,) at ``sample_rate``.
            score, progress: see `rate`.
            name: of the sound, in the rating and in messages.
            with_course: whether to rate its windows too; else ``times`` and ``course`` are empty.

        Raises:
            InputError: see `rate`.
        """
        front_end, rate = self.transcriber.front_end, self.sample_rate
        seconds, say = len(wave) / rate, progress or (lambda stage: None)
        if seconds < SHORTEST_SECONDS:
            least = f"Give a recording of at least {SHORTEST_SECONDS:g} s."
            raise InputError(f"{name}: {seconds:.2f} s long. {least}")
        if seconds > 3600 * LONGEST_HOURS:
            raise InputError(
                f"{name}: longer than {LONGEST_HOURS:g} hour. Cut it into movements and rate these."
            )
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
                start = max(float(starts.min()) - _LEAD_SECONDS, first)
                stop = max(float(notes["offset"].max()) + _TAIL_SECONDS, start + SHORTEST_SECONDS)
                played = min(start, max(last - SHORTEST_SECONDS, first)), min(stop, last)

            def n_onsets(part: tuple[float, float]) -> int:
                return int(((starts >= part[0]) & (starts < part[1])).sum())

            def features(part: tuple[float, float], score: Score | None = None) -> np.ndarray:
                notes = None if performance is None else excerpt(performance, *part)
                first, last = (round((at - begins) * slower * rate) for at in part)
                return self.features(notes, wave[first:last], score)

            # --- Rate the whole
            regressors = self.regressors["alone" if score is None else "score"]
            parts = [part for part in stretches(*played) if n_onsets(part)] or [played]
            say("rating")
            rated, novelty = regressors.rate(np.stack([features(part, score) for part in parts]))
        except InputError as reason:
            raise InputError(f"{name}: {reason}") from reason
        lengths = np.array([stop - start for start, stop in parts])
        ratings, deviation = lengths / sum(lengths.tolist()) @ rated, regressors.deviation
        edges = regressors.percentiles(np.stack([ratings - deviation, ratings + deviation]))

        # --- Rate its course over time, without the score, whose features need more than a few
        # seconds
        spans = windows(*played) if with_course else []
        course, found = np.full((len(spans), len(KEYS)), np.nan, np.float32), {}
        for k, span in enumerate(spans):
            if n_onsets(span) >= _FEWEST_NOTES:
                say(f"rating over time, {k + 1} of {len(spans)}")
                found[k] = features(span)
        if found:
            course[[*found]] = self.regressors["alone"].rate(np.stack([*found.values()]))[0]
        percentiles = self.regressors["alone"].percentiles(course)

        # --- Warn
        long, warnings = played[1] - played[0], []
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
            file=name,
            seconds=seconds,
            ratings=by_key(ratings),
            uncertainty=by_key(deviation),
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

    @property
    def sample_rate(self) -> int:
        """Hz, of the transcriber's front end."""
        return self.transcriber.front_end.sample_rate

    @property
    def limits(self) -> str:
        """What the bundled model was validated on and what it must not be used for, in two
        sentences; empty for other models."""
        if self.description["model"] != NAME:
            return ""
        known, works = (self.description[name]["mean"] for name in ("r", "r_works"))
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
            if performance is None:
                raise InputError(
                    "no notes were detected, so it cannot be aligned with the score. Rate it"
                    " without the score"
                )
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
        # safetensors writes an array's memory as it is, whatever its strides are.
        tensors = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata)
        return Path(path)

    @classmethod
    def read(cls, path: str | Path = BUNDLED) -> Self:
        """Load a file that `write` saved, by default the bundled model.

        Raises:
            InputError: no such file, a damaged one, another kind of model, or one of another
                version.
        """
        try:
            tensors, metadata = read_tensors(path)
            regressors = {
                name: CalibratedRegressors.from_tensors(below(tensors, f"{_REGRESSORS}{name}/"))
                for name in json.loads(metadata["judges"])
            }
            transcriber = Transcriber.from_tensors(below(tensors, _TRANSCRIBER), metadata)
            description = json.loads(metadata["description"])
            names = description["descriptors"]
            if unknown := [name for name in names if name not in PERFORMANCE_FEATURES]:
                raise ValueError(
                    f"made by another version, with the descriptors {', '.join(unknown)}"
                )
            return cls(transcriber, tensors["unheard"], regressors, description)
        except NOT_A_MODEL as error:
            raise InputError(
                f"{path}: not a rating model of this version ({error!r}). Give a file made by this"
                " version's `percepiano package`"
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


def load_model(path: str | Path = BUNDLED) -> RatingModelFile:
    """Load a rating model: ``load_model().rate("take.m4a")``.

    Args:
        path: a file that ``percepiano package`` made, or ``https://...#sha256=...``, see `fetched`;
            by default the bundled model, `piano-rater`.

    Raises:
        InputError: no such file, or not a rating model of this version; see `fetched`.
    """
    return RatingModelFile.read(fetched(str(path)))


def fetched(place: str, cache: str | Path = CACHE) -> Path:
    """Path of a model file; one at ``https://...#sha256=...`` is downloaded into ``cache`` once.

    Raises:
        InputError: a URL without a checksum, or a file with another one.
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
    if (found := download(url, path)) != wanted:
        path.unlink()
        raise InputError(
            f"{url}: its SHA-256 is {found}, not {wanted}, so it was deleted. Check the URL and the"
            " checksum"
        )
    return path


def rate_file(
    path: str | Path, score: str | Path | None = None, weights: str | Path | None = None
) -> Rating:
    """Rate a recording, as `RatingModelFile.rate` does, with the bundled model or that in
    ``weights``, see `load_model`; `percepiano_ast.rate`."""
    return load_model(weights or BUNDLED).rate(path, score)


# --- As text and tables ---------------------------------------------------------------------------


def recordings_in(places: Iterable[str | Path]) -> tuple[list[str | Path], list[Path]]:
    """The recordings that files and folders name, in order, and the other files in these folders.

    A folder without a recording is among the former: rating it raises an error that says so.
    """
    found: list[str | Path] = []
    others: list[Path] = []
    for place in places:
        inside = sorted(path for path in Path(place).rglob("*") if path.is_file())
        recordings = [path for path in inside if sources.is_audio(path.name)]
        found += recordings or [place]
        others += [path for path in inside if path not in recordings]
    return found, others


def to_table(ratings: Iterable[Rating]) -> pd.DataFrame:
    """One row per recording and dimension:
    ``file,dimension,rating,uncertainty,percentile,words``."""
    rows = [
        (one.file, key, value, one.uncertainty[key], one.percentiles[key], one.sentence(key))
        for one in ratings
        for key, value in one.ratings.items()
    ]
    columns = ["file", "dimension", "rating", "uncertainty", "percentile", "words"]
    return pd.DataFrame(rows, columns=columns)


def to_text(rating: Rating, colour: bool = False, ascii_only: bool = False) -> str:
    """A recording for a terminal of 80 columns: one line per dimension, from one pole to the other.

    The bar is the scale of percentiles: its middle is the median of people's ratings of
    PercePiano's human performances. The marker is the rating, the line through it one standard
    deviation to each side.
    """

    def styled(text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if colour else text

    name = rating.file if len(rating.file) <= WIDTH else f"...{rating.file[3 - WIDTH :]}"
    wrap = functools.partial(textwrap.wrap, width=WIDTH, subsequent_indent="  ")
    lines = [name, f"  {in_short(rating)}"]
    for warning in rating.warnings:
        lines += wrap(f"Note: {warning}.", initial_indent="  ")
    lines.append(f"{'':24} {'0    median 100':15} {'':19}    %  rating")
    sides, group = [], ""
    for dimension in DIMENSIONS:
        key, family, low, high = dimension
        percentile, band, code = rating.percentiles[key], rating.bands[key], "2"
        if family != group:
            lines.append(styled(family, "1"))
            group = family
        if not band[0] <= 50 <= band[1]:
            code = "33" if percentile > 50 else "34"
            degree, pole, share = _side(dimension, percentile)
            sides.append(f"{degree} {pole} ({share:.0f} %)")
        at, first, last = (min(int(x * _CELLS / 100), _CELLS - 1) for x in (percentile, *band))
        cells = [
            "─" if first <= k <= last else "│" if k == _CELLS // 2 else "·" for k in range(_CELLS)
        ]
        cells[at] = "●"
        numbers = f"{percentile:4.0f}  {rating.ratings[key]:.2f}±{rating.uncertainty[key]:.2f}"
        lines.append(f"{low:>24} {styled(''.join(cells), code)} {high:19} {numbers}")
    text = "No dimension is clearly on one side of the median."
    if sides:
        text = f"More so than most human performances: {', '.join(sides)}."
    lines += wrap(text)
    return "\n".join(lines).translate(_ASCII) if ascii_only else "\n".join(lines)


def in_short(rating: Rating) -> str:
    """Length, number of notes and tuning of a recording."""
    if rating.performance is None:
        return f"{clock(rating.seconds)}, no notes detected"
    a4 = 440 * 2 ** (rating.tuning / 1200)
    notes = len(rating.performance.notes)
    return f"{clock(rating.seconds)}, {notes:,} notes transcribed, A4 = {a4:.0f} Hz"


def clock(seconds: float) -> str:
    """Minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def compare(one: Rating, other: Rating) -> pd.DataFrame:
    """Two performances of one piece, by dimension: ``difference`` (other - one), its ``deviation``,
    ``reported``, ``words``.

    Errors that the music causes are common to both and cancel, so the deviation is that of errors
    within passages, smaller than that of either rating.
    """
    rows = []
    for key, _, low, high in DIMENSIONS:
        difference, deviation = other.ratings[key] - one.ratings[key], 2**0.5 * one.within[key]
        sure, likely = (abs(difference) >= far * deviation for far in (SURE, LIKELY))
        words = "no difference beyond the error"
        if likely:
            probably, pole = "" if sure else "probably ", high if difference > 0 else low
            words = f"the second is {probably}closer to {pole}"
        rows.append((key, round(difference, 4), round(deviation, 4), likely, words))
    columns = ["dimension", "difference", "deviation", "reported", "words"]
    return pd.DataFrame(rows, columns=columns).set_index("dimension")


def comparison_text(one: Rating, other: Rating) -> str:
    """Two performances of one piece for a terminal: the differences that exceed their error."""
    found = compare(one, other)
    names = f"{Path(other.file).name} against {Path(one.file).name}"
    lines = textwrap.wrap(f"{names}, if both are of the same music:", WIDTH)
    for key, _, low, high in DIMENSIONS:
        if found.reported[key]:
            poles = f"{low} to {high}"
            lines.append(f"  {poles:44} {one.ratings[key]:.2f} -> {other.ratings[key]:.2f}")
            lines.append(f"    {found.words[key]}")
    if not found.reported.any():
        lines.append("  no difference exceeds its error in any dimension")
    return "\n".join(lines)


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
        """The finished model in ``folder``.

        Raises:
            InputError: it was written by another version.
        """
        # local: the modules that read a run take a second to import, and rating by a file needs
        # none of them
        from percepiano_ast.training.checkpoints import open_latest
        from percepiano_ast.training.finetune import Finetuning, Scaler

        tree, meta = open_latest(folder, made_by=MADE_BY)
        written = f"{folder} was written by version {meta['code_version']},"
        again = f"Run {MADE_BY} again in a new directory, or rate with that version"
        if odd := meta["finetune"].keys() - {one.name for one in fields(FinetuneConfig)}:
            raise InputError(f"{written} with other settings ({', '.join(sorted(odd))}). {again}")
        name = meta["model"]["name"]
        kind = ENCODERS[name].config if name in ENCODERS else ModelConfig
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
        self, codes: np.ndarray, beside: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `rate`, and the predicted standard deviations (K,), not calibrated; NaN if the heads
        predict none.

        Args:
            beside: the result of `beside`, if it is already known.
        """
        from percepiano_ast.data import batches  # local: grain, see `open`

        windows = batches.clip_windows([codes], n_frames=self.run.model.n_frames, batch_size=16)
        embedding = self.run.embed(self.params, windows, 1)
        if self.run.config.transcription_features:
            given = self.beside(codes) if beside is None else beside
            embedding = np.concatenate([embedding, np.asarray(given)[None, :]], axis=1)
        found = self.run.distribution(self.params, self.scaler, embedding)
        return found[0][0], found[1][0]

    def beside(self, codes: np.ndarray) -> np.ndarray | None:
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


class FoldEnsemble:
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
        finished = sorted({marker.parent for marker in home.glob("fold_*/model/step_*.json")})
        if not finished:
            raise InputError(f"no fold in {home} is finished. Run {MADE_BY} to resume")
        self.models = [FoldModel.open(folder) for folder in finished]
        self.questionnaire = self.models[0].run.questionnaire
        file = home / "temperature.json"
        self.temperature = json.loads(file.read_text())["temperature"] if file.exists() else None
        names = [path.parent.name for path in finished]
        self.folds = [int(name.removeprefix("fold_")) for name in names]  # held out for each model
        self.unfinished = sorted({path.name for path in home.glob("fold_*")} - {*names})

    def rate(self, file: str | Path) -> dict:
        """``{"file", "ratings", "uncertainty", "warnings"}`` for one recording, with values on the
        questionnaire's scales.

        Raises:
            InputError: see ``audio.load``.
        """
        first, asked = self.models[0], self.questionnaire
        front_end = first.run.front_end
        wave = audio.load(file, front_end.sample_rate)
        codes, clipped = audio.quantize(audio.log_mel(wave, front_end), front_end)
        beside = first.beside(codes)  # the encoder is frozen, so this is the same for all folds
        found = [model.distribution(codes, beside) for model in self.models]
        # In float64, so that rounded values print with four digits.
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
        if first.simulated:
            warnings.append(
                "this model was trained on simulated ratings: its values are meaningless for real"
                " performances"
            )
        if (seconds := len(wave) / front_end.sample_rate) > first.longest:
            warnings.append(
                f"{seconds:.0f} s long; the longest training clip has {first.longest:.0f} s"
            )
        # Ratings are rounded to a ten-thousandth of the scale, and not clipped to it.
        ratings, uncertainty = {}, {}
        scales = zip(asked.names, asked.lowest, asked.highest)
        for (name, low, high), value, spread in zip(scales, mean, np.sqrt(variance)):
            digits = _digits(low, high) + 2
            ratings[name], uncertainty[name] = (float(x.round(digits)) for x in (value, spread))
            if not low <= ratings[name] <= high:
                warnings.append(
                    f"{name} is {ratings[name]:g}, outside the scale of the training ratings,"
                    f" {low:g} to {high:g}"
                )
        return {
            "file": str(file),
            "ratings": ratings,
            "uncertainty": uncertainty,
            "warnings": warnings,
        }

    def rate_or_explain(self, file: str | Path) -> dict:
        """``rate``, or ``{"file", "error"}`` if the file cannot be rated."""
        try:
            return self.rate(file)
        except InputError as error:
            return {"file": str(file), "error": str(error)}


def names_of_models(home: Path) -> list[str]:
    """Names of all fine-tuned models in ``home``, the folder ``finetune`` of a run or its store."""
    return sorted(path.name for path in home.glob("*") if path.is_dir())


def require_percepiano(ensemble: FoldEnsemble, what: str) -> None:
    """Raises InputError if the models predict custom ratings, which the command ``what`` does not
    support."""
    if (asked := ensemble.models[0].run.questionnaire) != PERCEPIANO:
        raise InputError(
            f"{ensemble.name} predicts custom ratings ({', '.join(asked.names)}), but {what}"
            f" supports only PercePiano's {len(PERCEPIANO.names)} dimensions. Choose a run that was"
            " fine-tuned on PercePiano"
        )


def require_explained(ensemble: FoldEnsemble) -> None:
    """Raises InputError if ratings depend on inputs that ``explain`` does not cover."""
    require_percepiano(ensemble, "explain")
    if ensemble.models[0].run.config.transcription_features:
        raise InputError(
            f"{ensemble.name} uses transcription descriptors besides its embedding, but explain"
            " covers only the embedding. Choose a model that was fine-tuned without"
            " `transcription_features=true`"
        )


def ensemble_text(results: list[dict], questionnaire: RatingScale = PERCEPIANO) -> str:
    """Results of `FoldEnsemble` as text: one line per dimension, with the two ends of its scale."""
    lines, width = [], max(17, *(len(dimension.family) for dimension in questionnaire.dimensions))
    for result in results:
        lines.append(result["file"])
        if "error" in result:
            lines.append(f"  not rated: {result['error']}")
            continue
        lines += [f"  note: {warning}" for warning in result["warnings"]]
        scales = zip(questionnaire.dimensions, questionnaire.lowest, questionnaire.highest)
        for (key, family, low, high), lowest, highest in scales:
            value, digits = result["ratings"][key], _digits(lowest, highest)
            bar = "." * round(20 * min(max((value - lowest) / (highest - lowest), 0), 1))
            numbers = f"{value:.{digits}f} +- {result['uncertainty'][key]:.{digits}f}"
            lines.append(f"  {family:{width}} {low:>23} {bar + '|':21} {high:20} {numbers}")
    return "\n".join(lines)


def _digits(low: float, high: float) -> int:
    """Number of decimals for a resolution of a hundredth of the scale."""
    return max(2 - math.floor(math.log10(high - low)), 0)
