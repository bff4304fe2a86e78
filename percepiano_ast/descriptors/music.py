"""What is played rather than how: register, texture, key. Ratings go with the music as well, so a model must be given it.

Key by Krumhansl and Schmuckler, see `audio.features.key_fit`.
"""

import numpy as np
from scipy.special import entr

from percepiano_ast.audio.features import key_fit
from percepiano_ast.descriptors.view import Descriptor, View, mean

TABLE = {
    "pitch_mean": Descriptor("MIDI pitch", "mean pitch of the notes"),
    "pitch_std": Descriptor("semitones", "deviation of the pitches"),
    "pitch_melody": Descriptor("MIDI pitch", "mean pitch of the highest notes"),
    "pitch_bass": Descriptor("MIDI pitch", "mean pitch of the lowest notes"),
    "pitch_highest": Descriptor("MIDI pitch", "pitch that a twentieth of the notes exceed"),
    "pitch_lowest": Descriptor("MIDI pitch", "pitch that a twentieth of the notes stay below"),
    "melody_steps": Descriptor("semitones", "mean size of the melody's intervals; 0 of a single note"),
    "melody_pitch_std": Descriptor("semitones", "deviation of the melody's pitch"),
    "chord_size": Descriptor("notes", "mean number of notes struck together"),
    "chord_size_std": Descriptor("notes", "deviation of that number"),
    "single_share": Descriptor("", "share of moments at which one note is struck"),
    "chord_width": Descriptor("semitones", "mean distance of the highest from the lowest note of chords; 0 without"),
    "repeated_share": Descriptor("", "share of chords with the melody note of the one before"),
    "majorness": Descriptor("", "how much better a major key fits than a minor one"),
    "key_clarity": Descriptor("", "how well the best key fits"),
    "pitch_classes": Descriptor("bits", "entropy of the twelve pitch classes"),
    "seconds_share": Descriptor("", "semitones and whole tones among the intervals within chords; 0 without chords"),
}


def measure(view: View) -> dict[str, float]:
    """The descriptors of ``TABLE``."""
    pitch = view.pitch
    low, high = np.quantile(pitch, (0.05, 0.95))
    melody = view.of_chords(np.maximum, pitch)
    bass = view.of_chords(np.minimum, pitch)
    steps = np.diff(melody)
    classes = np.bincount(pitch.astype(int) % 12, weights=np.minimum(view.offset - view.onset, 1.0), minlength=12)
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
    """Share of seconds (1 or 2 semitones, in any octave but the unison's) among the neighbouring intervals of chords."""
    order = np.lexsort((view.pitch, view.chord))
    same = np.diff(view.chord[order]) == 0
    intervals = np.diff(view.pitch[order])[same] % 12
    return mean((intervals == 1) | (intervals == 2) | (intervals >= 10))
