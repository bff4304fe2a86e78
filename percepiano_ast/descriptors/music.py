"""Descriptors of the music rather than its performance: register, texture, key. Ratings depend on
the music too.

Key by the Krumhansl-Schmuckler algorithm, see `audio.features.key_fit`.
"""

import numpy as np
from scipy.special import entr

from percepiano_ast.audio.features import key_fit
from percepiano_ast.descriptors.view import Descriptor, View, mean

TABLE = {
    "pitch_mean": Descriptor("MIDI pitch", "mean pitch of all notes"),
    "pitch_std": Descriptor("semitones", "standard deviation of pitch"),
    "pitch_melody": Descriptor("MIDI pitch", "mean pitch of the highest notes"),
    "pitch_bass": Descriptor("MIDI pitch", "mean pitch of the lowest notes"),
    "pitch_highest": Descriptor("MIDI pitch", "0.95 quantile of pitch"),
    "pitch_lowest": Descriptor("MIDI pitch", "0.05 quantile of pitch"),
    "melody_steps": Descriptor(
        "semitones", "mean size of the melody's intervals; 0 for a single note"
    ),
    "melody_pitch_std": Descriptor("semitones", "standard deviation of the melody's pitch"),
    "chord_size": Descriptor("notes", "mean number of notes per chord"),
    "chord_size_std": Descriptor("notes", "standard deviation of the number of notes per chord"),
    "single_share": Descriptor("", "share of chords of one note"),
    "chord_width": Descriptor(
        "semitones", "mean interval from the lowest to the highest note of chords; 0 without chords"
    ),
    "repeated_share": Descriptor("", "share of chords that repeat the previous melody note"),
    "majorness": Descriptor("", "fit of the best major key minus that of the best minor key"),
    "key_clarity": Descriptor("", "fit of the best key"),
    "pitch_classes": Descriptor("bits", "entropy of the twelve pitch classes"),
    "seconds_share": Descriptor(
        "", "share of semitones and whole tones among the intervals within chords; 0 without chords"
    ),
}


def measure(view: View) -> dict[str, float]:
    """The descriptors of ``TABLE``."""
    pitch = view.pitch
    low, high = np.quantile(pitch, (0.05, 0.95))
    melody = view.of_chords(np.maximum, pitch)
    bass = view.of_chords(np.minimum, pitch)
    steps = np.diff(melody)
    classes = np.bincount(
        pitch.astype(int) % 12, weights=np.minimum(view.offset - view.onset, 1.0), minlength=12
    )
    shares = classes / classes.sum()
    clarity, majorness = key_fit(shares)
    return {
        "pitch_mean": pitch.mean(),
        "pitch_std": pitch.std(),
        "pitch_melody": melody.mean(),
        "pitch_bass": bass.mean(),
        "pitch_highest": high,
        "pitch_lowest": low,
        "melody_steps": mean(np.abs(steps)),
        "melody_pitch_std": melody.std(),
        "chord_size": view.size.mean(),
        "chord_size_std": view.size.std(),
        "single_share": (view.size == 1).mean(),
        "chord_width": mean((melody - bass)[view.size > 1]),
        "repeated_share": mean(steps == 0),
        "majorness": majorness,
        "key_clarity": clarity,
        "pitch_classes": entr(shares).sum() / np.log(2),
        "seconds_share": _seconds_share(view),
    }


def _seconds_share(view: View) -> float:
    """Share of seconds, sevenths and their compounds (1, 2, 10 or 11 semitones mod 12) among
    intervals of adjacent chord notes."""
    order = np.lexsort((view.pitch, view.chord))
    same = np.diff(view.chord[order]) == 0
    intervals = np.diff(view.pitch[order])[same] % 12
    return mean((intervals == 1) | (intervals == 2) | (intervals >= 10))
