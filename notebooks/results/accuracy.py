"""Accuracy of a transcription model on real pianos and on renderings, as in publications.

Notes: `mir_eval.transcription` (Raffel et al. 2014) with an onset tolerance of 50 ms; note ends are
key releases. Sustain pedal: at steps of 20 ms against MIDI controller 64.
"""

import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from percepiano_ast import audio
from percepiano_ast.audio.effects import HELD_OUT_ROOM, PHONE, draw_phone, draw_room
from percepiano_ast.config import lookup
from percepiano_ast.data import percepiano
from percepiano_ast.errors import InputError
from percepiano_ast.files import matching
from percepiano_ast.inference.rate import RatingModelFile
from percepiano_ast.inference.transcribe import Transcriber
from percepiano_ast.music.midi import (
    NOTE,
    PEDAL,
    PEDAL_DOWN,
    SUSTAIN,
    Performance,
    read_midi,
    trimmed,
)
from percepiano_ast.music.synth import make_synthesizer

_STEP = 0.02  # seconds
# Recordings and their MIDI differ by a delay of the instrument, and start at different moments.
_LAGS = np.arange(-0.1, 0.101, 0.01)


class Clip(NamedTuple):
    """A wave float32 (n,), what was played, and whether a delay between them is to be estimated."""

    wave: np.ndarray
    played: Performance
    delayed: bool


def read_transcriber(path: str | Path) -> Transcriber:
    """The model in a file of `Transcriber.write` or of a rating model; InputError if it is none."""
    try:
        return Transcriber.read(path)
    except InputError:
        return RatingModelFile.read(path).transcriber


def transcribe(transcriber: Transcriber, wave: np.ndarray) -> Performance | None:
    """The transcription of a wave at any gain, which is brought to one loudness."""
    front_end = transcriber.front_end
    wave = audio.normalize_loudness(wave, front_end.sample_rate)
    codes, _ = audio.quantize(audio.log_mel(wave, front_end), front_end)
    return transcriber.transcribe(codes)


# --- Conditions -----------------------------------------------------------------------------------


def maps(folder: str | Path, sample_rate: int) -> Iterator[Clip]:
    """Excerpts of MAPS (Emiya et al. 2010): ``*.flac`` with the notes in a ``.tsv`` each (onset,
    offset, pitch, velocity, below a header), without pedals."""
    paths = matching(Path(folder), "*.flac")
    if not paths:
        raise InputError(f"no *.flac in {folder}. Give a folder of excerpts of MAPS with .tsv.")
    for path in paths:
        table = np.loadtxt(path.with_suffix(".tsv"), skiprows=1, ndmin=2)
        notes = np.array([tuple(row) for row in table], NOTE)
        yield Clip(audio.load(path, sample_rate), Performance(notes, np.zeros(0, PEDAL)), True)


def recordings(folder: str | Path, sample_rate: int) -> Iterator[Clip]:
    """PercePiano's published recordings, with their MIDI."""
    midi = percepiano.find_midi(folder)
    for path in matching(Path(folder) / "examples", "*.wav"):
        played = trimmed(read_midi(midi[path.stem]))
        wave = percepiano.aligned_recording(path, played, sample_rate)
        yield Clip(wave, played, True)


# None changes the tuning, which would move the notes.
RECORDED = {
    "phone": lambda rng: PHONE,
    "phones": draw_phone,  # another one for each clip
    "rooms": draw_room,
    "livingroom": lambda rng: HELD_OUT_ROOM,
}


def renderings(
    folder: str | Path, synthesizer: str, count: int, sample_rate: int
) -> Iterator[Clip]:
    """``count`` PercePiano clips, drawn from as many content groups as possible, always the same,
    by a synthesizer; with a suffix, as in ``fluidr3mono+phone``, as `RECORDED`."""
    drawn = percepiano.load_index(folder).sample(frac=1, random_state=0)
    drawn = drawn.iloc[np.argsort(drawn.groupby("content_group").cumcount(), kind="stable")[:count]]
    midi = percepiano.find_midi(folder)
    name, _, condition = synthesizer.partition(percepiano.SEPARATOR)
    record = lookup(RECORDED, condition, "condition") if condition else None
    piano = make_synthesizer(name)
    for clip in drawn["clip"]:
        played, rng = trimmed(read_midi(midi[clip])), percepiano.augmentation_rng(clip, condition)
        wave = piano.render(played, sample_rate)
        if record:
            wave = record(rng).apply(wave, sample_rate, int(rng.integers(2**31)))
        yield Clip(wave, played, False)


# --- Metrics --------------------------------------------------------------------------------------


def note_scores(played: np.ndarray, found: np.ndarray) -> dict[str, float]:
    """Scores of one clip, both of dtype ``NOTE``: F1 of onsets; of onsets and offsets (20 % of the
    duration, at least 50 ms); of these with velocities (after mir_eval's linear fit, within 10 %).

    Over the notes with matched onsets: mean absolute error of the velocity in MIDI units, its
    correlation, and mean and standard deviation of the onset errors in seconds (NaN for under 3
    notes).

    Raises:
        InputError: mir_eval is not installed.
    """
    try:
        from mir_eval import transcription, transcription_velocity
    except ModuleNotFoundError as error:
        raise InputError("mir_eval is not installed. Run: pip install mir_eval") from error

    def arrays(notes: np.ndarray) -> list[np.ndarray]:
        hertz = 440 * 2 ** ((notes["pitch"].astype(float) - 69) / 12)
        ends = np.maximum(notes["offset"], notes["onset"] + 1e-3)
        # a second later: a shift may have made times negative, which mir_eval refuses
        return [np.column_stack([notes["onset"], ends]) + 1, hertz]

    ours, theirs = arrays(played), arrays(found)
    velocities = played["velocity"].astype(float), found["velocity"].astype(float)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of no notes: all scores are 0
        pairs = transcription.match_notes(*ours, *theirs, offset_ratio=None)
        with_offset = transcription.precision_recall_f1_overlap(*ours, *theirs)
        with_velocity = transcription_velocity.precision_recall_f1_overlap(
            *ours, velocities[0], *theirs, velocities[1]
        )
    scores = {"onset_f1": 2 * len(pairs) / (len(played) + len(found))}
    scores |= {"offset_f1": with_offset[2], "velocity_f1": with_velocity[2]}
    scores |= dict.fromkeys(("velocity_error", "velocity_r", "onset_bias", "onset_sd"), np.nan)
    if len(pairs) > 2:
        i, j = np.array(pairs).T
        ours, theirs = velocities[0][i], velocities[1][j]
        scores["velocity_error"] = np.abs(ours - theirs).mean()
        scores["velocity_r"] = _correlation(ours, theirs)
        late = found["onset"][j] - played["onset"][i]
        scores |= {"onset_bias": late.mean(), "onset_sd": late.std()}
    return scores


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's r; NaN if one of them is constant."""
    return float(np.corrcoef(x, y)[0, 1]) if np.ptp(x) and np.ptp(y) else np.nan


def measure(transcribe, clips: Iterator[Clip], sample_rate: int) -> dict[str, float]:
    """Means over clips of `note_scores`; of all steps together, the share with the same state of
    the sustain pedal and the correlation of its value; ``speed``: seconds of sound per second.

    Args:
        transcribe: of a wave float32 (n,), returns a `Performance`, or None without notes.
    """
    rows, pedals, speeds = [], [], []
    for wave, played, delayed in clips:
        begun = time.perf_counter()
        found = transcribe(wave) or Performance(np.zeros(0, NOTE), np.zeros(0, PEDAL))
        speeds.append(len(wave) / sample_rate / (time.perf_counter() - begun))
        scored = []
        for lag in _LAGS if delayed else [0.0]:
            later = played.notes.copy()
            later["onset"] += lag
            later["offset"] += lag
            scored.append(note_scores(later, found.notes) | {"lag": lag})
        # Within the tolerance many delays match as many notes; a hundredth of F1 is worth 10 ms.
        late = [abs(np.nan_to_num(scores["onset_bias"])) for scores in scored]
        rows.append(scored[np.argmax([scores["onset_f1"] for scores in scored] - np.array(late))])
        times = np.arange(0, played.duration, _STEP)
        if len(played.pedals):
            late = times + rows[-1]["lag"]
            pedals.append([played.pedal_at(SUSTAIN, times), found.pedal_at(SUSTAIN, late)])
    scores = {"clips": len(rows)} | pd.DataFrame(rows).mean().to_dict()
    scores |= {"pedal_agreement": np.nan, "pedal_r": np.nan, "speed": float(np.median(speeds))}
    if pedals:
        ours, theirs = np.concatenate(pedals, axis=1)
        scores["pedal_agreement"] = ((ours >= PEDAL_DOWN) == (theirs >= PEDAL_DOWN)).mean()
        scores["pedal_r"] = _correlation(ours, theirs)
    return scores


def accuracy(
    model: str | Path, folder: str | Path, real: str | Path, synthesizers: list[str], count: int
) -> Iterator[dict]:
    """`measure` of a model file on the excerpts in ``real`` (empty: without), PercePiano's
    recordings and ``count`` clips by each synthesizer; ``folder``: PercePiano's."""
    transcriber = read_transcriber(model)
    rate = transcriber.front_end.sample_rate
    conditions = {"maps": maps(real, rate)} if real else {}
    conditions["percepiano recording"] = recordings(folder, rate)
    conditions |= {name: renderings(folder, name, count, rate) for name in synthesizers}
    for name, clips in conditions.items():
        scores = measure(partial(transcribe, transcriber), clips, rate)
        yield {"model": Path(model).name, "condition": name} | scores
