"""Rate a recording: 19 ratings with uncertainty and percentiles, their course over time, and which moments speak for them.

What people rated are clips of 4 to 100 s. A recording that is no longer is rated as a whole, a longer one in equal stretches of
about a minute, whose ratings are averaged by their length.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from percepiano_ast import audio
from percepiano_ast import score as scores
from percepiano_ast.config import InputError
from percepiano_ast.dimensions import DIMENSIONS, KEYS, Dimension
from percepiano_ast.packaged import SHIPPED, Packaged, fetched
from percepiano_ast.performance import Performance
from percepiano_ast.targets import excerpt

LONGEST_SECONDS = 100.0  # of PercePiano's clips
SHORTEST_SECONDS, LONGEST_HOURS, LOWEST_RATE = 3.0, 1.0, 16_000  # of what is rated at all
STRETCH_SECONDS = 60.0
WINDOW_SECONDS = 8.0  # of the course over time: shorter ones are rated less surely
_HOP_SECONDS, _MOST_WINDOWS = 2.0, 80  # which leave no gap in ten minutes
# From where on a recording is said to be unlike a piano. Measured (tests/test_strangers.py): of 80 recordings of four pianos none
# is, all noise and speech is, and of instruments that sustain or ring nine in ten; electric pianos and guitars hardly ever.
STRANGE = 1.15  # times as far from all training clips as one in a hundred of PercePiano's clips while it was held out
UNCLEAR = 0.5  # clearness of strokes
_FEW_NOTES = 0.5  # a second, below which a piano is hardly playing
_FEWEST_NOTES = 3  # in a window of the course, below which it says nothing
_LEAD_SECONDS, _TAIL_SECONDS = 0.05, 1.5  # of sound before the first stroke and behind the last release, as clips are rendered
# Cents. Any other ratio of resampling moves ratings by some hundredths: a piano in tune stays as it is, and a tuning that is found
# a little otherwise in a softer or compressed file of the same changes nothing.
_TUNING_STEP = 7.0
_SILENT_DB = -50.0  # below the peak, before the first stroke
_DISTORTED = 1e-4  # share of samples at full scale that no mastering leaves


@dataclass(frozen=True)
class Moment:
    """A stretch of a recording that is rated higher or lower than the whole.

    Attributes:
        start, stop: seconds.
        rating: of it alone, 0 to 1.
    """

    start: float
    stop: float
    rating: float


@dataclass(frozen=True, eq=False)
class Rating:
    """What is said of a recording.

    Attributes:
        file: its name.
        seconds: its length.
        ratings, uncertainty: by dimension, 0 to 1: the mean rating that people would give, and its standard deviation.
        percentiles: by dimension, percentage of PercePiano's performances that are rated lower.
        times: middles of the windows of the course over time, seconds (m,).
        course: ratings of the windows (m, 19), NaN where hardly a note is struck.
        performance: notes and pedals that were heard; None where no note was.
        warnings: what should be known before any of it is believed, in sentences.
        informed: whether the score was given.
        within: by dimension, standard deviation of errors among performances of one passage.
        tuning: cents above A4 = 440 Hz, see `audio.tuning`; what is rated is the same sound within 4 cents of it.
    """

    file: str
    seconds: float
    ratings: dict[str, float]
    uncertainty: dict[str, float]
    percentiles: dict[str, float]
    times: np.ndarray
    course: np.ndarray
    performance: Performance | None
    warnings: list[str] = field(default_factory=list)
    informed: bool = False
    within: dict[str, float] = field(default_factory=dict)
    tuning: float = 0.0

    def sentence(self, key: str) -> str:
        """One dimension in words."""
        dimension = DIMENSIONS[KEYS.index(key)]
        return f"{dimension.family}: {in_words(dimension, self.percentiles[key])}"

    def moments(self, key: str) -> tuple[Moment, ...]:
        """The stretch that is rated highest by itself, and the one that is rated lowest; none where no stretch is rated."""
        column = self.course[:, KEYS.index(key)]
        if np.isnan(column).all():  # also where there is none
            return ()
        half = min(WINDOW_SECONDS, self.seconds) / 2

        def at(k: int) -> Moment:
            return Moment(max(self.times[k] - half, 0.0), min(self.times[k] + half, self.seconds), float(column[k]))

        return at(int(np.nanargmax(column))), at(int(np.nanargmin(column)))

    def as_json(self) -> dict:
        """``{"file", "ratings", "uncertainty", "percentiles", "warnings"}``."""
        names = ("file", "ratings", "uncertainty", "percentiles", "warnings")
        return {name: getattr(self, name) for name in names}


def in_words(dimension: Dimension, percentile: float) -> str:
    """Where among PercePiano's performances a percentile lies, from one pole to the other."""
    pole, share = (dimension.high, percentile) if percentile >= 50 else (dimension.low, 100 - percentile)
    if share < 60:
        return f"about in the middle between {dimension.low} and {dimension.high}"
    degree = "very" if share >= 95 else "clearly" if share >= 80 else "rather"
    than = f"than {math.floor(share)} %" if share < 99.5 else "than any"
    return f"{degree} {pole}, more so {than} of PercePiano's performances"


def rate(model: Packaged, file: str | Path, written: scores.Score | None = None) -> Rating:
    """Rate a recording by a model of one file.

    Args:
        written: its score, where it is at hand: the model that sees the score rates then.

    Raises:
        InputError: no recording that can be read, see `audio.load`; shorter than 3 s or longer than an hour; it does not play
            the score.
    """
    sample_rate = model.listener.front_end.sample_rate
    recording = audio.Recording(file, min_rate=LOWEST_RATE)
    wave = np.concatenate(list(recording.blocks(sample_rate, max_seconds=3600 * LONGEST_HOURS + 1)))
    rating = rate_wave(model, wave, written, str(file))
    if recording.full_scale > _DISTORTED:
        rating.warnings.append(f"{recording.full_scale:.2%} of its samples are at full scale: it is probably distorted")
    return rating


def rate_wave(
    model: Packaged, wave: np.ndarray, written: scores.Score | None = None, name: str = "this sound", with_course: bool = True
) -> Rating:
    """Rate sound that is there already.

    Args:
        wave: float32 (n,) at the sampling rate of the model's front end.
        written, name: see `rate`.
        with_course: whether its windows are rated too; without, ``times`` and ``course`` are empty.

    Raises:
        InputError: see `rate`.
    """
    seconds = len(wave) / model.listener.front_end.sample_rate
    _check_length(seconds, name)
    try:
        sound = _Sound(model, wave)
        judge = model.judges["alone" if written is None else "score"]
        parts = [part for part in stretches(*sound.played) if sound.notes(part)] or [sound.played]
        said = judge.rate(np.stack([sound.features(part, written) for part in parts]))
    except InputError as reason:
        raise InputError(f"{name}: {reason}") from reason
    weights = np.array([stop - start for start, stop in parts]) / sum(stop - start for start, stop in parts)
    ratings, deviations = weights @ said.ratings, weights @ said.deviations
    starts, course = _course(sound) if with_course else (np.zeros(0), np.zeros((0, len(KEYS))))
    return Rating(
        name, seconds, _by_key(ratings), _by_key(deviations), _by_key(judge.percentiles(ratings), 1),
        starts, course, sound.performance, _warnings(sound, len(parts), said.strangeness), written is not None,
        _by_key(judge.within), round(sound.tuning, 1),
    )  # fmt: skip


def rate_file(path: str | Path, score: str | Path | None = None, weights: str | Path | None = None) -> Rating:
    """Rate a recording with the model that comes along: `percepiano_ast.rate`.

    Args:
        path: WAV, FLAC, OGG or MP3, M4A where ffmpeg is; 16 kHz and up, 3 s to an hour.
        score: path of the score that is played, MIDI or MusicXML, where it is at hand.
        weights: path of another model, or ``https://...#sha256=...``.

    Raises:
        InputError: it cannot be rated; the message says why.
    """
    model = Packaged.read(fetched(str(weights)) if weights else SHIPPED)
    return rate(model, path, scores.read(score) if score else None)


class _Sound:
    """A recording at one loudness and one tuning, and what is heard in it, on the recording's clock.

    Attributes:
        tuning: cents above 440 Hz that it was found at.
        performance: notes and pedals; None where no note is heard.
        clearness: see `Packaged.hear`.
        played: seconds from the first stroke until the last note has rung, as PercePiano's clips are cut.
    """

    def __init__(self, model: Packaged, wave: np.ndarray):
        self.model, self.rate = model, model.listener.front_end.sample_rate
        wave, self.begins = _from_first_sound(wave, self.rate)
        self.tuning = audio.tuning(wave, self.rate)
        off = _TUNING_STEP * round(self.tuning / _TUNING_STEP)
        self.slower = 2 ** (off / 1200)  # seconds of ``self.wave`` that one of the recording takes
        self.wave = model.level(audio.retuned(wave, self.rate, -off))
        heard, self.clearness = model.hear(self.wave)
        self.performance = None if heard is None else _moved(heard, self.begins, self.slower)
        self.played = first, last = (max(self.begins, 0.0), self.begins + len(wave) / self.rate)
        if self.performance is not None:
            notes = self.performance.notes
            start = max(float(notes["onset"].min()) - _LEAD_SECONDS, first)
            stop = max(float(notes["offset"].max()) + _TAIL_SECONDS, start + SHORTEST_SECONDS)
            self.played = (min(start, max(last - SHORTEST_SECONDS, first)), min(stop, last))

    def notes(self, part: tuple[float, float]) -> int:
        """How many are struck in it."""
        if self.performance is None:
            return 0
        return int(np.logical_and(self.performance.notes["onset"] >= part[0], self.performance.notes["onset"] < part[1]).sum())

    def features(self, part: tuple[float, float], written: scores.Score | None = None) -> np.ndarray:
        """What a judge is given of it."""
        start, stop = part
        heard = None if self.performance is None else excerpt(self.performance, start, stop)
        first, last = (round((at - self.begins) * self.slower * self.rate) for at in part)
        return self.model.features(heard, self.wave[first:last], written)


def _from_first_sound(wave: np.ndarray, rate: int) -> tuple[np.ndarray, float]:
    """The wave from shortly before its first sound on, and when that begins in seconds; silence in front does not move what is
    heard then. Where sound begins at once, a little silence is put before it."""
    loud = int(np.argmax(np.abs(wave) > np.abs(wave).max() * 10 ** (_SILENT_DB / 20)))
    begin = loud - round(_LEAD_SECONDS * rate)
    return np.concatenate([np.zeros(max(-begin, 0), np.float32), wave[max(begin, 0) :]]), begin / rate


def _moved(performance: Performance, seconds: float, slower: float) -> Performance:
    notes, pedals = performance.notes.copy(), performance.pedals.copy()
    for column in ("onset", "offset"):
        notes[column] = np.maximum(notes[column] / slower + seconds, 0.0)
    pedals["time"] = np.maximum(pedals["time"] / slower + seconds, 0.0)
    return Performance(notes, pedals)


def _check_length(seconds: float, name: str) -> None:
    if seconds < SHORTEST_SECONDS:
        raise InputError(f"{name}: {seconds:.2f} s long. Give a recording of at least {SHORTEST_SECONDS:g} s.")
    if seconds > 3600 * LONGEST_HOURS:
        raise InputError(f"{name}: longer than {LONGEST_HOURS:g} hour. Cut it into movements and rate these.")


def stretches(start: float, stop: float) -> list[tuple[float, float]]:
    """What is rated as a whole between two moments, starts and ends in seconds."""
    seconds = stop - start
    number = 1 if seconds <= LONGEST_SECONDS else math.ceil(seconds / STRETCH_SECONDS)
    edges = np.linspace(start, stop, number + 1).tolist()
    return list(zip(edges[:-1], edges[1:]))


def windows(start: float, stop: float) -> list[tuple[float, float]]:
    """Of the course over time: 8 s every 2 s, or further apart in a long recording; one where it is no longer."""
    seconds = stop - start
    if seconds <= WINDOW_SECONDS:
        return [(start, stop)]
    number = min(math.ceil((seconds - WINDOW_SECONDS) / _HOP_SECONDS) + 1, _MOST_WINDOWS)
    return [(first, first + WINDOW_SECONDS) for first in np.linspace(start, stop - WINDOW_SECONDS, number).tolist()]


def _course(sound: _Sound) -> tuple[np.ndarray, np.ndarray]:
    """Middles of the windows (m,) and their ratings (m, 19), NaN where hardly a note is struck."""
    parts = windows(*sound.played)
    course = np.full((len(parts), len(KEYS)), np.nan, np.float32)
    if told := [k for k, part in enumerate(parts) if sound.notes(part) >= _FEWEST_NOTES]:
        course[told] = sound.model.judges["alone"].rate(np.stack([sound.features(parts[k]) for k in told])).ratings
    return np.array(parts).mean(axis=1), course


def _warnings(sound: _Sound, n_parts: int, strangeness: np.ndarray) -> list[str]:
    found, seconds = [], sound.played[1] - sound.played[0]
    if sound.performance is None:
        found.append("no piano note is heard in it: the ratings rest on the mere sound and mean nothing about a performance")
    elif (pace := len(sound.performance.notes) / seconds) < _FEW_NOTES:
        found.append(f"few piano notes are heard in it, {pace:.2f} a second: is a piano playing alone?")
    if (aside := float(np.median(strangeness))) > STRANGE or sound.clearness < UNCLEAR:
        found.append(
            f"it sounds unlike the pianos that the model knows ({aside:.1f} times as far from them as one in a hundred of "
            f"PercePiano's clips; strokes heard at {sound.clearness:.2f}, pianos about .6): the ratings may mean nothing"
        )
    if n_parts > 1:
        found.append(f"{seconds:.0f} s long: rated in {n_parts} stretches; the clips that people rated last "
                     f"{LONGEST_SECONDS:.0f} s at most")  # fmt: skip
    return found


def _by_key(values: np.ndarray, digits: int = 4) -> dict[str, float]:
    return {key: round(float(value), digits) for key, value in zip(KEYS, values)}
