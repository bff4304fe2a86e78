"""A folder in PercePiano's shape with four short clips, for tests that do not need the published
data."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from percepiano_ast.data import percepiano
from percepiano_ast.dimensions import KEYS
from percepiano_ast.music.midi import NOTE, PEDAL, Performance, write_midi

CLIPS = ("Piece_8bars_1_1", "Piece_8bars_2_1", "Other_8bars_1_1", "Other_8bars_Score_1")


def write_clip(path: Path, pitch: int = 60) -> None:
    """Three seconds of notes."""
    notes = np.zeros(6, NOTE)
    notes["onset"] = 0.5 + 0.5 * np.arange(6)
    notes["offset"], notes["pitch"], notes["velocity"] = (
        notes["onset"] + 0.4,
        pitch + np.arange(6),
        70,
    )
    write_midi(Performance(notes, np.zeros(0, PEDAL)), path)


def ratings_of(number: int) -> list[float]:
    return [round(0.2 + 0.01 * dimension + 0.1 * number, 4) for dimension in range(len(KEYS))]


def index_row(clip: str, fold: int) -> dict:
    group = clip.split("_")[0]
    return {
        "clip": clip,
        "segment": group,
        "content_group": group,
        "human": "Score" not in clip,
        "fold_content": fold,
    }


def write_folder(folder: Path) -> Path:
    """Four clips with ratings, one of them with a space before its file name, and an index of their
    own."""
    (folder / percepiano.MIDI_FOLDER).mkdir(parents=True)
    for number, clip in enumerate(CLIPS):
        name = f" {clip}.mid" if number == 1 else f"{clip}.mid"
        write_clip(folder / percepiano.MIDI_FOLDER / name, 55 + number)
    names = [f" {CLIPS[1]}" if number == 1 else clip for number, clip in enumerate(CLIPS)]
    write_labels(folder, {name: ratings_of(number) + [3] for number, name in enumerate(names)})
    pd.DataFrame([index_row(clip, number // 2) for number, clip in enumerate(CLIPS)]).to_csv(
        folder / "index.csv"
    )
    return folder


def write_labels(folder: Path, labels: dict) -> None:
    (folder / percepiano.LABELS).write_text(json.dumps(labels))


def change_labels(folder: Path, **values) -> None:
    labels = json.loads((folder / percepiano.LABELS).read_text()) | values
    write_labels(folder, {name: value for name, value in labels.items() if value != "gone"})
