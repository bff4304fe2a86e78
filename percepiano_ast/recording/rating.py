"""Rate a recording: 19 ratings with uncertainty and percentiles, their course over time, and its
extremes.

The clips that people rated last 4 to 100 s. A recording up to that length is rated as a whole, a
longer one in equal stretches of about a minute, whose ratings are averaged by their length.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from percepiano_ast import audio
from percepiano_ast.dimensions import DIMENSIONS, KEYS, Dimension
from percepiano_ast.errors import InputError
from percepiano_ast.music.midi import Performance, excerpt
from percepiano_ast.music.score import Score, read_score
from percepiano_ast.packaged import SHIPPED, Packaged, fetched

LONGEST_SECONDS = 100.0  # of PercePiano's clips
SHORTEST_SECONDS, LONGEST_HOURS, LOWEST_RATE = 3.0, 1.0, 16_000  # limits of what is rated
STRETCH_SECONDS = 60.0
WINDOW_SECONDS = 8.0  # of the course over time
_HOP_SECONDS, _MOST_WINDOWS = 2.0, 80  # no gap in ten minutes
# Thresholds of the warning that a sound is unlike a piano. Measured (tests/test_novelty.py): none
# of 80 recordings of four pianos exceeds them, all noise and speech does, and five in six
# instruments that sustain or ring; electric pianos and guitars rarely do.
STRANGE = 1.15  # novelty, see `packaged.Said`
UNCLEAR = 0.5  # mean onset probability
_FEW_NOTES = 0.5  # notes per second
_FEWEST_NOTES = 3  # in a window of the course; with fewer it is not rated
# before the first onset and behind the last offset, as clips are rendered
_LEAD_SECONDS, _TAIL_SECONDS = 0.05, 1.5
# Cents. Resampling by any ratio moves ratings by some hundredths: with this step a piano in tune is
# not resampled, and a tuning that is estimated slightly differently in a softer or compressed file
# of the same sound changes nothing.
_TUNING_STEP = 7.0
_SILENT_DB = -50.0  # below the peak, before the first onset
_DISTORTED = 1e-4  # share of samples at full scale, above that of any mastering
_NEARER = 10.0  # percentiles from the middle, from which words name the closer pole

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Moment:
    """A stretch of a recording that is rated higher or lower than the whole.

    Attributes:
        start, stop: seconds.
        rating: of the stretch alone, 0 to 1.
        percentile: of that rating.
    """

    start: float
    stop: float
    rating: float
    percentile: float


@dataclass(frozen=True, eq=False)
class Rating:
    """The rating of a recording.

    Attributes:
        file: its name.
        seconds: its length.
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
        half = min(WINDOW_SECONDS, self.seconds) / 2

        def at(i: int) -> Moment:
            start, stop = max(self.times[i] - half, 0.0), min(self.times[i] + half, self.seconds)
            return Moment(start, stop, float(column[i]), float(self.course_percentiles[i, k]))

        return at(int(np.nanargmax(column))), at(int(np.nanargmin(column)))

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
    degree, pole, share = side(dimension, percentile)
    if not on_one_side(band):
        return f"between {dimension.low} and {dimension.high}" + (
            f", closer to {pole}" if share >= 50 + _NEARER else ""
        )
    return (
        f"{degree} {pole}, more so than {'any' if share > 99.5 else f'{math.floor(share)} %'} of"
        " the human performances"
    )


def on_one_side(band: tuple[float, float]) -> bool:
    """Whether a band of percentiles lies above or below the median."""
    return not band[0] <= 50 <= band[1]


def side(dimension: Dimension, percentile: float) -> tuple[str, str, float]:
    """Degree (``rather``, ``clearly``, ``very``), pole, and percentage of human performances that
    are further from that pole."""
    pole, share = (
        (dimension.high, percentile) if percentile >= 50 else (dimension.low, 100 - percentile)
    )
    return "very" if share >= 95 else "clearly" if share >= 80 else "rather", pole, share


def load_model(path: str | Path = SHIPPED) -> "PianoRater":
    """Load a rating model: ``load_model().rate("take.m4a")``.

    Args:
        path: a file that ``percepiano package`` made, or ``https://...#sha256=...``; by default the
            bundled model, `piano-rater`.

    Raises:
        InputError: no such file, or not a rating model of this version.
    """
    return PianoRater.read(fetched(str(path)))


class PianoRater(Packaged):
    """A rating model with its one public method, `rate`."""

    def rate(
        self, path: str | Path, score: str | Path | None = None, progress: Progress | None = None
    ) -> Rating:
        """Rate a recording.

        Args:
            path: WAV, FLAC, OGG, MP3 or M4A; 16 kHz and up, 3 s to an hour.
            score: its score, MIDI or MusicXML, for the score-informed regressors.
            progress: called with the name of each stage.

        Raises:
            InputError: it cannot be rated; the message says why.
        """
        return rate(self, path, read_score(score) if score else None, progress)


def rate_file(
    path: str | Path, score: str | Path | None = None, weights: str | Path | None = None
) -> Rating:
    """Rate a recording with the bundled model: `percepiano_ast.rate`.

    Args:
        path, score: see `PianoRater.rate`.
        weights: path or URL of another model, see `load_model`.

    Raises:
        InputError: it cannot be rated; the message says why.
    """
    return load_model(weights or SHIPPED).rate(path, score)


def rate(
    model: Packaged,
    file: str | Path,
    written: Score | None = None,
    progress: Progress | None = None,
) -> Rating:
    """Rate a recording by a loaded model.

    Args:
        written: its score, for the score-informed regressors.
        progress: called with the name of each stage.

    Raises:
        InputError: the file cannot be read, see `audio.load`; it is shorter than 3 s or longer than
            an hour; it does not match the score.
    """
    say = progress or (lambda stage: None)
    say("reading")
    recording = audio.Recording(file, min_rate=LOWEST_RATE)
    sample_rate = model.listener.front_end.sample_rate
    wave = np.concatenate(list(recording.blocks(sample_rate, max_seconds=3600 * LONGEST_HOURS + 1)))
    rating = rate_wave(model, wave, written, str(file), progress=say)
    if recording.full_scale > _DISTORTED:
        rating.warnings.append(
            f"{recording.full_scale:.2%} of the samples are at full scale: the recording is"
            " probably distorted"
        )
    return rating


def rate_wave(
    model: Packaged,
    wave: np.ndarray,
    written: Score | None = None,
    name: str = "this sound",
    with_course: bool = True,
    progress: Progress | None = None,
) -> Rating:
    """Rate a waveform.

    Args:
        wave: float32 (n,) at the sampling rate of the model's front end.
        written, name, progress: see `rate`.
        with_course: whether its windows are rated too; without, ``times`` and ``course`` are empty.

    Raises:
        InputError: see `rate`.
    """
    say = progress or (lambda stage: None)
    seconds = len(wave) / model.listener.front_end.sample_rate
    _check_length(seconds, name)
    try:
        say("transcribing")
        sound = _Sound(model, wave)
        judge = model.judges["alone" if written is None else "score"]
        parts = [part for part in stretches(*sound.played) if sound.notes(part)] or [sound.played]
        say("rating")
        said = judge.rate(np.stack([sound.features(part, written) for part in parts]))
    except InputError as reason:
        raise InputError(f"{name}: {reason}") from reason
    weights = np.array([stop - start for start, stop in parts]) / sum(
        stop - start for start, stop in parts
    )
    ratings = weights @ said.ratings
    edges = judge.percentiles(np.stack([ratings - judge.deviation, ratings + judge.deviation]))
    times, course = (
        _course(sound, say) if with_course else (np.zeros(0), np.zeros((0, len(KEYS)), np.float32))
    )
    # The course is rated without the score, whose features need more than a few seconds.
    course_percentiles = np.where(
        np.isnan(course), np.nan, model.judges["alone"].percentiles(course)
    )
    return Rating(
        file=name,
        seconds=seconds,
        ratings=_by_key(ratings),
        uncertainty=_by_key(judge.deviation),
        percentiles=_by_key(judge.percentiles(ratings), 1),
        bands=dict(zip(KEYS, map(tuple, edges.T.round(1).tolist()))),
        times=times,
        course=course,
        course_percentiles=course_percentiles,
        performance=sound.performance,
        warnings=_warnings(sound, len(parts), said.novelty),
        informed=written is not None,
        within=_by_key(judge.within),
        tuning=round(sound.tuning, 1),
        limits=model.limits,
        performances=len(judge.reference),
    )


class _Sound:
    """A recording at the loudness and tuning of the training clips, and its transcription in the
    recording's own time.

    Attributes:
        tuning: estimated cents above 440 Hz.
        performance: notes and pedals; None if no note is detected.
        clearness: mean onset probability, see `Packaged.hear`.
        played: start and end in seconds, from the first onset to the decay of the last note, as
            PercePiano's clips are cut.
    """

    def __init__(self, model: Packaged, wave: np.ndarray):
        self.model, self.rate = model, model.listener.front_end.sample_rate
        wave, self.begins = _from_first_sound(wave, self.rate)
        self.tuning = audio.estimate_tuning(wave, self.rate)
        off = _TUNING_STEP * round(self.tuning / _TUNING_STEP)
        self.slower = 2 ** (off / 1200)  # seconds of ``self.wave`` per second of the recording
        self.wave = model.level(audio.retune(wave, self.rate, -off))
        heard, self.clearness = model.hear(self.wave)
        self.performance = None if heard is None else _moved(heard, self.begins, self.slower)
        self.played = first, last = (max(self.begins, 0.0), self.begins + len(wave) / self.rate)
        if self.performance is not None:
            notes = self.performance.notes
            start = max(float(notes["onset"].min()) - _LEAD_SECONDS, first)
            stop = max(float(notes["offset"].max()) + _TAIL_SECONDS, start + SHORTEST_SECONDS)
            self.played = (min(start, max(last - SHORTEST_SECONDS, first)), min(stop, last))

    def notes(self, part: tuple[float, float]) -> int:
        """Number of onsets in a stretch."""
        if self.performance is None:
            return 0
        return int(
            np.logical_and(
                self.performance.notes["onset"] >= part[0],
                self.performance.notes["onset"] < part[1],
            ).sum()
        )

    def features(self, part: tuple[float, float], written: Score | None = None) -> np.ndarray:
        """Features of a stretch."""
        start, stop = part
        heard = None if self.performance is None else excerpt(self.performance, start, stop)
        first, last = (round((at - self.begins) * self.slower * self.rate) for at in part)
        return self.model.features(heard, self.wave[first:last], written)


def _from_first_sound(wave: np.ndarray, rate: int) -> tuple[np.ndarray, float]:
    """The wave from shortly before its first sound, and the time of its first sample in seconds, so
    that leading silence does not change the transcription. If the sound begins at once, a little
    silence is put before it."""
    loud = int(np.argmax(np.abs(wave) > np.abs(wave).max() * 10 ** (_SILENT_DB / 20)))
    begin = loud - round(_LEAD_SECONDS * rate)
    return (
        np.concatenate([np.zeros(max(-begin, 0), np.float32), wave[max(begin, 0) :]]),
        begin / rate,
    )


def _moved(performance: Performance, seconds: float, slower: float) -> Performance:
    notes, pedals = performance.notes.copy(), performance.pedals.copy()
    for column in ("onset", "offset"):
        notes[column] = np.maximum(notes[column] / slower + seconds, 0.0)
    pedals["time"] = np.maximum(pedals["time"] / slower + seconds, 0.0)
    return Performance(notes, pedals)


def _check_length(seconds: float, name: str) -> None:
    if seconds < SHORTEST_SECONDS:
        raise InputError(
            f"{name}: {seconds:.2f} s long. Give a recording of at least {SHORTEST_SECONDS:g} s."
        )
    if seconds > 3600 * LONGEST_HOURS:
        raise InputError(
            f"{name}: longer than {LONGEST_HOURS:g} hour. Cut it into movements and rate these."
        )


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
    return [
        (first, first + WINDOW_SECONDS)
        for first in np.linspace(start, stop - WINDOW_SECONDS, number).tolist()
    ]


def _course(sound: _Sound, say: Progress) -> tuple[np.ndarray, np.ndarray]:
    """Middles of the windows (m,) and their ratings (m, 19), NaN where fewer than three notes
    start."""
    parts = windows(*sound.played)
    course = np.full((len(parts), len(KEYS)), np.nan, np.float32)
    rows = [k for k, part in enumerate(parts) if sound.notes(part) >= _FEWEST_NOTES]
    features = []
    for k in rows:
        say(f"rating over time, {k + 1} of {len(parts)}")
        features.append(sound.features(parts[k]))
    if features:
        course[rows] = sound.model.judges["alone"].rate(np.stack(features)).ratings
    return np.array(parts).mean(axis=1), course


def _warnings(sound: _Sound, n_parts: int, novelty: np.ndarray) -> list[str]:
    found, seconds = [], sound.played[1] - sound.played[0]
    if sound.performance is None:
        found.append(
            "no piano notes were detected: the ratings rest on sound statistics alone and say"
            " nothing about a performance"
        )
    elif (pace := len(sound.performance.notes) / seconds) < _FEW_NOTES:
        found.append(
            f"few piano notes were detected, {pace:.2f} per second: check that a piano is playing"
            " alone"
        )
    if (distance := float(np.median(novelty))) > STRANGE or sound.clearness < UNCLEAR:
        found.append(
            f"the sound is unlike the pianos in training (novelty {distance:.1f}, at most"
            f" {STRANGE:g} for pianos; mean onset probability {sound.clearness:.2f}, about 0.6 for"
            " pianos): the ratings may be meaningless"
        )
    if n_parts > 1:
        found.append(
            f"{seconds:.0f} s long, so it is rated in {n_parts} stretches; the clips that people"
            f" rated last at most {LONGEST_SECONDS:.0f} s"
        )
    return found


def _by_key(values: np.ndarray, digits: int = 4) -> dict[str, float]:
    return {key: round(float(value), digits) for key, value in zip(KEYS, values)}
