"""The built-in demo data, generated from a seed in the formats of MAESTRO and PercePiano: simulated
performances of public-domain tunes with simulated ratings, labelled as such in every table.

Twelve expressive parameters (standard normal: a performer effect plus a performance effect) shape a
performance. A rating is a fixed linear function of these parameters and of the tune, observed by
twelve raters with a single-rater reliability (ICC) of 0.26, the value of PercePiano.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile

from percepiano_ast.data import maestro, percepiano
from percepiano_ast.dimensions import KEYS
from percepiano_ast.files import lock_config, write_json
from percepiano_ast.music.midi import (
    NOTE,
    PEDAL,
    SUSTAIN,
    UNA_CORDA,
    Performance,
    trimmed,
    write_midi,
)
from percepiano_ast.music.synth import make_synthesizer

PARAMETERS = tuple(
    "tempo rubato jitter asynchrony legato pedal half_pedal loudness velocity_spread voicing"
    " contour una_corda".split()
)
# These parameters are correlated: they share a third of their variance.
_EXPRESSIVE = ("rubato", "asynchrony", "pedal", "velocity_spread", "voicing", "contour")
PERFORMERS = 11
RATERS = 12
ICC = 0.26
FOLDS = 4
RECORDINGS_PER_TUNE = 3
RATE = 22_050  # Hz


def _numbers(text: str) -> dict[str, float]:
    """Parse ``rubato 0.7, jitter 0.6``."""
    return {name: float(value) for name, value in map(str.split, text.split(", "))}


# Weights of the parameters in each rating, after the correlations of PercePiano's ratings with its
# MIDI; "minor" is 1 for a tune in minor, -1 in major, "touch" the tune's note rate.
_ROWS = (resources.files(__package__) / "demo_weights.txt").read_text().splitlines()
WEIGHTS = {key: _numbers(weights) for key, weights in (row.split(": ") for row in _ROWS)}
# Custom dimension names -> the rating that each one equals.
CUSTOM_DIMENSIONS = {
    "pace": "music_fast_slow",
    "force": "mood_low_high_energy",
    "would listen again": "interpretation_doubtful_convincing",
}
# In standard deviations of the parameters; the others are 0.
_PLAIN = dict.fromkeys(PARAMETERS, 0.0)
DEADPAN = _PLAIN | _numbers(
    "rubato -1.2, jitter -2, asynchrony -1, pedal -1.5, velocity_spread -2, contour -1"
)
EXAMPLES = {  # two interpretations of one tune
    "example": _numbers("rubato 1, pedal 1.5, legato 1, contour 1.5, voicing 1, tempo -0.5"),
    "second example": _numbers(
        "rubato -1.5, pedal -2, legato -1.5, contour -1, loudness 1.5, tempo 1"
    ),
}


# --- Tunes ----------------------------------------------------------------------------------------

_STEPS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11, "": 0, "#": 1, "b": -1}
_CHORDS = {"": (0, 4, 7), "m": (0, 3, 7), "7": (0, 4, 10), "m7": (0, 3, 10)}
# Chord tones, start and duration, as shares of the chord's duration.
_PATTERNS = {
    "block": (((0, 1, 2), 0.0, 1.0),),
    "alberti": (((0,), 0.0, 0.25), ((2,), 0.25, 0.25), ((1,), 0.5, 0.25), ((2,), 0.75, 0.25)),
    "waltz": (((0,), 0.0, 1 / 3), ((1, 2), 1 / 3, 1 / 3), ((1, 2), 2 / 3, 1 / 3)),
    "arpeggio": tuple(((tone,), k / 6, 1 / 6) for k, tone in enumerate((0, 1, 2, 0, 2, 1))),
}


@dataclass(frozen=True)
class Tune:
    """A tune of ``tunes.txt``, which describes the fields."""

    title: str
    composer: str
    beats: int
    bpm: float
    pattern: str
    minor: bool
    melody: str
    chords: str

    def notes(self) -> np.ndarray:
        """Rows (onset in beats, duration in beats, MIDI pitch, hand 1 = melody, 0 = accompaniment),
        by onset."""
        rows, at = [], 0.0
        for token in self.melody.replace("|", " ").split():
            name, _, length = token.partition(":")
            if name != "R":
                rows.append((at, float(length or 1), _pitch(name), 1))
            at += float(length or 1)
        for bar, names in enumerate(self.chords.split()):
            chords = names.split(",")
            span = self.beats / len(chords)
            for number, name in enumerate(chords):
                root = name[: 1 + name[1:].startswith(("#", "b"))]
                bass = _pitch(root + "3")
                bass -= 12 if bass > 53 else 0
                start = bar * self.beats + number * span
                for tones, offset, share in _PATTERNS[self.pattern]:
                    for tone in tones:
                        pitch = bass + _CHORDS[name.removeprefix(root)][tone]
                        rows.append((start + offset * span, share * span, pitch, 0))
        return np.array(sorted(rows))


def _pitch(name: str) -> int:
    return 12 * (int(name[-1]) + 1) + _STEPS[name[0]] + _STEPS[name[1:-1]]


def _read_tunes(wanted: str) -> tuple[Tune, ...]:
    tunes, text = [], (resources.files(__package__) / "tunes.txt").read_text(encoding="utf-8")
    for block in text.split("\n\n")[1:]:
        head, *melody, chords = block.strip().split("\n")
        title, composer, beats, bpm, pattern, mode, use = head.split("; ")
        if use == wanted:
            given = title, composer, int(beats), float(bpm), pattern, mode == "minor"
            tunes.append(Tune(*given, " ".join(melody), chords))
    return tuple(tunes)


RATED, UNRATED = _read_tunes("rated"), _read_tunes("unrated")


# --- Performances and ratings ---------------------------------------------------------------------


def perform(
    tune: Tune, style: dict[str, float], rng: np.random.Generator, transpose: int = 0
) -> Performance:
    """Perform ``tune`` in ``style``, each parameter in standard deviations."""
    onset_beats, beats, pitch, melody = tune.notes().T
    onset = _clock(onset_beats, tune, style)
    end = _clock(onset_beats + beats, tune, style)
    onset = onset + rng.normal(0, 0.016 * np.exp(0.8 * style["jitter"]), len(onset))
    # melody lead, as in pianists' playing
    onset -= melody * 0.015 * max(style["asynchrony"] + 1, 0)
    onset -= onset.min()
    held = (end - onset) * np.clip(0.72 + 0.24 * style["legato"], 0.2, 1.15)
    arch = np.sin(np.pi * (onset_beats % (4 * tune.beats)) / (4 * tune.beats)) - 0.5
    velocity = 62 + 17 * style["loudness"] + melody * (10 + 9 * style["voicing"])
    velocity += 16 * max(style["contour"] + 1, 0) * arch
    velocity += rng.normal(0, 6 * np.exp(0.7 * style["velocity_spread"]), len(onset))
    notes = np.zeros(len(onset), NOTE)
    notes["onset"], notes["offset"] = onset, onset + np.maximum(held, 0.05)
    notes["pitch"] = pitch + transpose
    notes["velocity"] = np.clip(np.round(velocity), 8, 125)
    notes.sort(order=["onset", "pitch"])

    # Sustain pedal changed with every harmony, deeper and longer with "pedal"; una corda on
    # throughout or off.
    depth = 127 if style["half_pedal"] < 0.3 else 64
    share = np.clip(0.45 + 0.3 * style["pedal"], 0, 0.97)
    rows = [(0.0, UNA_CORDA, 127 if style["una_corda"] > 0.7 else 0)]
    if share > 0.1:
        for beat in np.arange(0, len(tune.chords.split()) * tune.beats, tune.beats / 2):
            start, stop = _clock(np.array([beat, beat + share * tune.beats / 2]), tune, style)
            rows += [(max(start + 0.03, 0), SUSTAIN, depth), (max(stop, 0), SUSTAIN, 0)]
    pedals = np.array([row for row in rows if row[0] <= onset[-1]], PEDAL)
    return Performance(notes, pedals[np.argsort(pedals["time"], kind="stable")])


def _clock(at_beats: np.ndarray, tune: Tune, style: dict[str, float]) -> np.ndarray:
    """Times of beats in seconds: a tempo, and rubato as a sinusoid over two bars, slower at phrase
    ends."""
    per_beat = 60 / (tune.bpm * np.exp(0.22 * style["tempo"]))
    swing = 0.14 * max(style["rubato"] + 1.2, 0)
    phrase = 2 * np.pi * at_beats / (4 * tune.beats)
    return per_beat * (at_beats - swing * np.sin(phrase) * tune.beats / 3)


def _styles(rng: np.random.Generator, performers: int, pieces: int) -> np.ndarray:
    """(performers, pieces, parameters): half of the variance is between performers, half within."""
    habit = rng.normal(size=(performers, 1, len(PARAMETERS)))
    form = rng.normal(size=(performers, pieces, len(PARAMETERS)))
    own = (habit + form) / np.sqrt(2)
    common = rng.normal(size=(performers, pieces, 1))
    shared = np.sqrt([1 / 3 if name in _EXPRESSIVE else 0 for name in PARAMETERS])
    return np.clip(np.sqrt(1 - shared**2) * own + shared * common, -2, 2)


def _true_ratings(tune: Tune, style: dict[str, float]) -> np.ndarray:
    """The error-free rating, one value per dimension, in units of about one standard deviation."""
    rate = len(tune.notes()) / (tune.notes()[-1, 0] * 60 / tune.bpm)
    values = {**style, "minor": 1.0 if tune.minor else -1.0, "touch": (rate - 5) / 2}
    found = []
    for row in (WEIGHTS[key] for key in KEYS):
        norm = np.sqrt(sum(weight**2 for weight in row.values()))
        found.append(sum(weight * values[name] for name, weight in row.items()) / norm)
    return np.array(found)


# --- Data sets ------------------------------------------------------------------------------------


def write_maestro(
    path: str | Path, seed: int = 0, recordings_per_tune: int = RECORDINGS_PER_TUNE
) -> Path:
    """Write the archive in MAESTRO's format, without the rated tunes, unless it exists."""
    path = Path(path)
    if path.exists():
        return path
    rng, piano = np.random.default_rng([seed, 1]), make_synthesizer("builtin")
    midi = path.parent / "recording.mid.partial"

    def recordings() -> Iterator[tuple[dict, np.ndarray, bytes]]:
        splits = ["train"] * (len(UNRATED) - 2) + ["validation", "test"]
        for tune, split in zip(UNRATED, splits):
            for _ in range(recordings_per_tune):
                # Two takes in a row last half a minute, as long as some of MAESTRO's shortest
                # recordings.
                first, second = (
                    perform(tune, dict(zip(PARAMETERS, take)), rng, int(rng.integers(-5, 6)))
                    for take in _styles(rng, 1, 2)[0]
                )
                for times in (second.notes["onset"], second.notes["offset"], second.pedals["time"]):
                    times += first.duration + 1
                performance = Performance(
                    np.concatenate([first.notes, second.notes]),
                    np.concatenate([first.pedals, second.pedals]),
                )
                write_midi(performance, midi)
                row: dict = {"canonical_composer": tune.composer, "canonical_title": tune.title}
                row |= {"split": split, "year": 2026}
                yield row, piano.render(performance, RATE), midi.read_bytes()
        midi.unlink()

    return maestro.write_archive(path, recordings(), RATE)


def write_percepiano(folder: str | Path, seed: int = 0, performers: int = PERFORMERS) -> Path:
    """Write the folder in PercePiano's format, unless it is complete: MIDI, scores, label JSON,
    rater CSV, index."""
    settings = {"seed": seed, "performers": performers, "what": "simulated PercePiano"}
    folder = lock_config(folder, settings)
    if (folder / "dataset.json").exists():
        return folder
    for part in (percepiano.MIDI_FOLDER, percepiano.SCORE_FOLDER, "labels"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, 2])
    styles = _styles(rng, performers, len(RATED))
    true, index = {}, []
    for number, tune in enumerate(RATED):
        words = tune.title.replace(",", "").split()
        piece = "".join(word.capitalize() for word in words) + "_8bars"
        for player in [*range(performers), "Score"]:
            human = player != "Score"
            style = dict(zip(PARAMETERS, styles[player, number])) if human else DEADPAN
            clip = f"{piece}_{player}_1"
            performance = trimmed(perform(tune, style, rng))
            # as in PercePiano, deadpan clips are renderings of the scores
            for part in [percepiano.MIDI_FOLDER] + [percepiano.SCORE_FOLDER] * (not human):
                write_midi(performance, folder / part / f"{clip}.mid")
            true[clip] = _true_ratings(tune, style)
            index.append(
                {
                    "clip": clip,
                    "composition": piece,
                    "piece": piece,
                    "segment": f"{piece}_1",
                    "content_group": f"{piece}_1",
                    "player": player,
                    "human": human,
                    "fold_random": int(rng.integers(FOLDS)),
                    "fold_performer": int(player) % FOLDS if human else FOLDS - 1,
                    "fold_content": number % FOLDS,
                }
            )
    pd.DataFrame(index).to_csv(folder / "index.csv", index=False)

    # Ratings of twelve raters on a scale of 1 to 7, and their means divided by 7.
    noise = np.sqrt((1 - ICC) / ICC)
    labels, rows = {}, []
    for number, (clip, values) in enumerate(true.items()):
        rated = np.round(4 + 0.7 * (values + noise * rng.normal(size=(RATERS, len(KEYS)))))
        rated = np.clip(rated, 1, 7)
        # The last value takes the position of upstream's player token.
        labels[clip] = [*(rated.mean(axis=0) / 7).tolist(), 0]
        for rater, row in enumerate(rated):
            rows.append([100 + rater, number, f"{clip}.wav", *row, ""])
    (folder / percepiano.LABELS).write_text(json.dumps(labels))
    with (folder / percepiano.RATERS).open("w", newline="") as file:
        writer = csv.writer(file)
        questions = (f"Question_{number}" for number in range(1, len(KEYS) + 1))
        writer.writerow(["user", "dataID", "filename", *questions, "message"])
        writer.writerows(rows)
    facts = {"name": "simulated PercePiano", "simulated": True, "seed": seed}
    write_json(folder / "dataset.json", facts)
    return folder


def write_ratings(folder: str | Path, seed: int = 0) -> tuple[Path, Path]:
    """Write 24 recordings with ratings under custom dimension names, unless they are complete: four
    tunes, six simulated performances each, rated 0 to 100 by one simulated rater. Returns ``(folder
    of recordings, CSV)``."""
    folder = lock_config(folder, {"seed": seed, "what": "simulated recordings and ratings"})
    csv_file = folder / "ratings.csv"
    if csv_file.exists():
        return folder / "recordings", csv_file
    (folder / "recordings").mkdir(exist_ok=True)
    facts = {"name": "simulated recordings and ratings", "simulated": True}
    write_json(folder / "recordings" / "dataset.json", facts)
    rng = np.random.default_rng([seed, 3])
    columns = [KEYS.index(key) for key in CUSTOM_DIMENSIONS.values()]
    rows = []
    for tune in RATED[:4]:
        for number, values in enumerate(_styles(rng, 1, 6)[0], 1):
            style = dict(zip(PARAMETERS, values))
            clip = f"{tune.title.replace(',', '')}, take {number}"
            _write_sound(folder / "recordings" / f"{clip}.flac", perform(tune, style, rng))
            noise = rng.normal(size=len(columns))
            rated = 50 + 15 * (_true_ratings(tune, style)[columns] + noise)
            row = {"clip": clip, "tune": tune.title}
            rows.append(row | dict(zip(CUSTOM_DIMENSIONS, rated.clip(0, 100).round())))
    pd.DataFrame(rows).to_csv(csv_file, index=False)
    return folder / "recordings", csv_file


def write_example(folder: str | Path, name: str) -> Path:
    """Write one of `EXAMPLES`, rendered by the built-in piano, as a WAV file."""
    path = Path(folder) / f"{name.replace(' ', '_')}.wav"
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    _write_sound(path, perform(RATED[0], _PLAIN | EXAMPLES[name], rng))
    return path


def _write_sound(path: Path, performance: Performance) -> None:
    wave = make_synthesizer("builtin").render(trimmed(performance), RATE)
    soundfile.write(path, np.clip(wave, -1, 1), RATE)
