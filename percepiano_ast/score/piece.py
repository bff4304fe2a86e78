"""Features of the score alone: key, metre, tempo, register, texture, rhythm."""

import numpy as np
from scipy.special import entr

from percepiano_ast.audio.features import key_fit
from percepiano_ast.descriptors.view import Descriptor
from percepiano_ast.score.reading import Score
from percepiano_ast.score.view import mean, std

# quarters: sixteenths and shorter; quarters (written to nine tenths in MIDI) and longer
_SHORT, _LONG = 0.3, 0.9
# pitch classes of C major; a minor key uses those of its relative major
_SCALE = np.array([0, 2, 4, 5, 7, 9, 11])

TABLE = {
    "written_sharps": Descriptor(
        "", "sharps of the first key signature, flats negative; 0 without one"
    ),
    "written_major": Descriptor("", "fit of the best major key minus that of the best minor key"),
    "written_key_clarity": Descriptor("", "fit of the best key"),
    "written_chromatic": Descriptor(
        "", "share of notes outside the scale of the key signature; 0 without one"
    ),
    "written_classes": Descriptor("bits", "entropy of the twelve pitch classes"),
    "written_beats": Descriptor("", "beats per bar"),
    "written_triple": Descriptor("", "1 if the beats per bar are a multiple of three, else 0"),
    "written_bar": Descriptor("log2 quarters", "log length of a bar"),
    "written_tempo": Descriptor(
        "log", "log of the notated quarters per second; 0 without a notated tempo"
    ),
    "written_quarters": Descriptor("log", "log of the length in quarters"),
    "written_pitch": Descriptor("MIDI pitch", "mean pitch"),
    "written_pitch_std": Descriptor("semitones", "standard deviation of pitch"),
    "written_melody": Descriptor("MIDI pitch", "mean pitch of the highest notes"),
    "written_bass": Descriptor("MIDI pitch", "mean pitch of the lowest notes"),
    "written_intervals": Descriptor("semitones", "mean size of the melody's intervals"),
    "written_repeats": Descriptor("", "share of melody notes that repeat the previous one"),
    "written_rise": Descriptor("semitones", "interval from the first to the last melody note"),
    "written_density": Descriptor("1/quarter", "notes per quarter"),
    "written_moments": Descriptor("1/quarter", "distinct onsets per quarter"),
    "written_chord": Descriptor("notes", "mean number of notes with the same onset"),
    "written_sounding": Descriptor("notes", "mean number of simultaneous notes"),
    "written_length": Descriptor("log2 quarters", "mean log note value"),
    "written_length_std": Descriptor("log2 quarters", "standard deviation of log note values"),
    "written_rhythm": Descriptor("bits", "entropy of the inter-onset intervals"),
    "written_short": Descriptor("", "share of notes of a sixteenth or shorter"),
    "written_long": Descriptor("", "share of notes of a quarter or longer"),
    "written_offbeat": Descriptor("", "share of onsets between beats"),
    "written_force": Descriptor("velocity", "mean of the notated dynamics, as velocity"),
    "written_force_std": Descriptor("velocity", "standard deviation of the notated dynamics"),
}


def measure(score: Score) -> dict[str, float]:
    """The features of ``TABLE``; NaN for features that this score does not define."""
    return _harmony(score) | _time(score) | _texture(score)


def _entropy(counts: np.ndarray) -> float:
    return float(entr(counts / counts.sum()).sum() / np.log(2))


def _harmony(score: Score) -> dict[str, float]:
    pitch = score.notes["pitch"].astype(int)
    clarity, major = key_fit(np.bincount(pitch % 12, weights=score.notes["duration"], minlength=12))
    sharps = score.keys[0][1] if score.keys else np.nan
    scale = (_SCALE + 7 * score.keys[0][1]) % 12 if score.keys else _SCALE
    return {
        "written_sharps": sharps,
        "written_major": major,
        "written_key_clarity": clarity,
        "written_chromatic": (
            mean((~np.isin(pitch % 12, scale)).astype(float)) if score.keys else np.nan
        ),
        "written_classes": _entropy(np.bincount(pitch % 12)),
    }


def _time(score: Score) -> dict[str, float]:
    notes = score.notes
    moments = np.unique(notes["onset"])
    _, beats, unit = score.metres[-1]
    length = np.log2(np.maximum(notes["duration"], 1 / 16))
    places = score.position(moments)[1]
    quarters = (notes["onset"] + notes["duration"]).max() - moments[0]
    between = np.unique(np.round(np.diff(moments) * 24), return_counts=True)[1]
    return {
        "written_beats": float(beats),
        "written_triple": float(beats % 3 == 0),
        "written_bar": float(np.log2(beats * unit)),
        "written_tempo": float(np.log(score.tempo / 60)) if score.tempo else np.nan,
        "written_quarters": float(np.log(max(quarters, 1 / 16))),
        "written_length": mean(length),
        "written_length_std": std(length),
        "written_rhythm": _entropy(between) if len(between) else np.nan,
        "written_short": mean((notes["duration"] <= _SHORT).astype(float)),
        "written_long": mean((notes["duration"] >= _LONG).astype(float)),
        "written_offbeat": mean((np.abs(places - np.round(places)) > 0.02).astype(float)),
    }


def _texture(score: Score) -> dict[str, float]:
    notes, pitch = score.notes, score.notes["pitch"].astype(float)
    starts = np.flatnonzero(np.r_[True, np.diff(notes["onset"]) > 0])
    melody, bass = np.maximum.reduceat(pitch, starts), np.minimum.reduceat(pitch, starts)
    quarters = max((notes["onset"] + notes["duration"]).max() - notes["onset"][0], 1 / 16)
    return {
        "written_pitch": mean(pitch),
        "written_pitch_std": std(pitch),
        "written_melody": mean(melody),
        "written_bass": mean(bass),
        "written_intervals": mean(np.abs(np.diff(melody))),
        "written_repeats": mean((np.diff(melody) == 0).astype(float)),
        "written_rise": melody[-1] - melody[0],
        "written_density": len(notes) / quarters,
        "written_moments": len(starts) / quarters,
        "written_chord": len(notes) / len(starts),
        "written_sounding": float(notes["duration"].sum() / quarters),
        "written_force": mean(notes["velocity"].astype(float)),
        "written_force_std": std(notes["velocity"].astype(float)),
    }
