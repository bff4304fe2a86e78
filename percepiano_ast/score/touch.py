"""Articulation, velocity, extra and missing notes, and pedalling, relative to the score.

Articulation as played relative to notated duration: Bresin and Battel (2000), J. New Music Research
29(3). Accents by metre and melody: Sloboda (1983), QJEP 35A; Palmer (1997), Annual Review of
Psychology 48.
"""

import numpy as np

from percepiano_ast.descriptors.pedals import pedalling
from percepiano_ast.descriptors.view import Descriptor
from percepiano_ast.score.view import View, arch, correlation, mean, pattern, quantile, slope, std

_SHORT, _LONG = 0.5, 1.0  # quarters: maximum length of a short note, minimum length of a long note
_MIDDLE_C = 60
_FINAL = 0.2  # share of a clip that counts as its end
_NEAR = 0.25  # quarters: maximum distance of a pedal change from its beat or harmony
# seconds: a chord struck this shortly before a pedal change belongs to the next pedalling
_CATCH = 0.1
_SLIP = 0.1  # seconds: a shorter extra note counts as brushed
_CLOSE = 0.3  # seconds: maximum distance in time of an extra note from a neighbouring key

TABLE = {
    "held": Descriptor(
        "log",
        "articulation (key-down time relative to the notated duration at the smooth tempo), mean",
    ),
    "held_std": Descriptor("log", "articulation, standard deviation"),
    "held_q10": Descriptor("log", "articulation, 0.1 quantile"),
    "held_q50": Descriptor("log", "articulation, median"),
    "held_q90": Descriptor("log", "articulation, 0.9 quantile"),
    "held_melody": Descriptor("log", "articulation of the melody relative to the other notes"),
    "held_bass": Descriptor("log", "articulation of the bass relative to the other notes"),
    "held_low": Descriptor("log", "articulation below middle C relative to the other notes"),
    "held_short": Descriptor("log", "articulation of notes of an eighth or shorter"),
    "held_long": Descriptor("log", "articulation of notes of a quarter or longer"),
    "held_of_length": Descriptor("", "correlation of articulation with log notated duration"),
    "held_of_pitch": Descriptor("", "correlation of articulation with pitch"),
    "held_final": Descriptor("log", "articulation of the last fifth relative to the rest"),
    "held_changes": Descriptor(
        "log", "mean absolute change of articulation from one melody note to the next"
    ),
    "detached_share": Descriptor(
        "", "share of notes held for less than half of the notated duration"
    ),
    "overheld_share": Descriptor(
        "", "share of notes held for more than 1.1 of the notated duration"
    ),
    "melody_overlap": Descriptor(
        "", "overlap of successive melody notes relative to their interval, within 1, mean"
    ),
    "melody_overlap_std": Descriptor("", "overlap of successive melody notes, standard deviation"),
    "force_downbeat": Descriptor("velocity", "velocity at downbeats minus that of other onsets"),
    "force_beat": Descriptor("velocity", "velocity on beats minus that between beats"),
    "force_bar_pattern": Descriptor(
        "", "share of the variance of velocity explained by the position in the bar"
    ),
    "force_melody": Descriptor(
        "velocity", "velocity of the melody minus that of the rest of its chord"
    ),
    "force_melody_std": Descriptor("velocity", "standard deviation of this difference"),
    "force_bass": Descriptor(
        "velocity", "velocity of the bass minus that of the rest of its chord"
    ),
    "force_hands": Descriptor("velocity", "velocity of the upper minus that of the lower staff"),
    "force_melody_varies": Descriptor("velocity", "standard deviation of the melody's velocity"),
    "force_rest_varies": Descriptor("velocity", "standard deviation of the other notes' velocity"),
    "force_of_pitch": Descriptor("", "correlation of velocity with pitch"),
    "force_of_melody": Descriptor("", "correlation of the melody's velocity with its pitch"),
    "force_of_length": Descriptor("", "correlation of velocity with log notated duration"),
    "force_of_notated": Descriptor(
        "", "correlation of velocity with the notated dynamics; 0 if they are constant"
    ),
    "force_notated_range": Descriptor(
        "velocity", "change of velocity from the softest to the loudest notated, linear fit"
    ),
    "force_trend": Descriptor("velocity", "change of velocity from beginning to end, linear fit"),
    "force_arch": Descriptor(
        "velocity", "velocity in the middle relative to the ends, quadratic fit"
    ),
    "force_final": Descriptor("velocity", "velocity of the last fifth minus that of the rest"),
    "force_bars": Descriptor("velocity", "standard deviation of the mean velocity of bars"),
    "force_bar_changes": Descriptor("velocity", "mean absolute change of velocity from bar to bar"),
    "force_within_bars": Descriptor(
        "velocity", "standard deviation of onsets' velocity from their bar's mean"
    ),
    "force_of_tempo": Descriptor("", "correlation of velocity with the smooth tempo"),
    "force_of_held": Descriptor("", "correlation of velocity with articulation"),
    "extra_share": Descriptor("", "share of played notes that are not in the score"),
    "extra_brushed": Descriptor(
        "", "share of played notes that are not in the score and shorter than 0.1 s"
    ),
    "extra_beside": Descriptor(
        "",
        "share of played notes that are not in the score and within 2 semitones of a matched note",
    ),
    "missing_share": Descriptor("", "share of score notes that are not played"),
    "missing_bass": Descriptor("", "share of the score's lowest notes that are not played"),
    "missing_grace": Descriptor("", "share of grace notes among the missing notes"),
    "pedal_per_beat": Descriptor("", "number of pedal presses per beat"),
    "pedal_per_bar": Descriptor("", "number of pedal presses per bar"),
    "pedal_on_beats": Descriptor("", "share of pedal presses within a sixteenth of a beat"),
    "pedal_on_bars": Descriptor("", "share of pedal presses within a sixteenth of a downbeat"),
    "pedal_late": Descriptor(
        "quarters", "mean time from the last score onset to the pedal press, at most 1"
    ),
    "pedal_of_harmony": Descriptor(
        "", "share of new bass notes with a pedal press within a sixteenth"
    ),
    "pedal_harmonies": Descriptor("notes", "mean number of different bass notes per pedalling"),
    "pedal_downbeats": Descriptor(
        "", "share of downbeats with the pedal down just after them, minus that of other onsets"
    ),
}


def measure(view: View) -> dict[str, float]:
    """The features of ``TABLE``; NaN for features without an instance in this clip."""
    return (
        _length(view)
        | _overlap(view)
        | _accents(view)
        | _course(view)
        | _slips(view)
        | _pedal(view)
    )


def _over(values: np.ndarray, which: np.ndarray) -> float:
    """Mean of ``values`` selected by ``which``, minus that of the rest."""
    return mean(values[which]) - mean(values[~which])


def _final(view: View, quarters: np.ndarray) -> np.ndarray:
    return quarters >= view.quarters[-1] - _FINAL * np.ptp(view.quarters)


def _length(view: View) -> dict[str, float]:
    held, top = view.articulation, view.top
    melody = held[top][np.argsort(view.at[top], kind="stable")]
    return {
        "held": mean(held),
        "held_std": std(held),
        "held_q10": quantile(held, 0.1),
        "held_q50": quantile(held, 0.5),
        "held_q90": quantile(held, 0.9),
        "held_melody": _over(held, top),
        "held_bass": _over(held, view.bottom),
        "held_low": _over(held, view.pitch < _MIDDLE_C),
        "held_short": mean(held[view.length <= _SHORT + 0.02]),
        "held_long": mean(held[view.length >= _LONG - 0.1]),
        "held_of_length": correlation(held, np.log(np.maximum(view.length, 1 / 16))),
        "held_of_pitch": correlation(held, view.pitch),
        "held_final": _over(held, _final(view, view.at)),
        "held_changes": mean(np.abs(np.diff(melody))),
        "detached_share": mean((held < np.log(0.5)).astype(float)),
        "overheld_share": mean((held > np.log(1.1)).astype(float)),
    }


def _overlap(view: View) -> dict[str, float]:
    """Overlap of melody notes whose notated end reaches the next melody note."""
    onset, end = view.onset[view.top], (view.onset + view.held)[view.top]
    at, until = view.at[view.top], (view.at + view.length)[view.top]
    between = np.diff(onset)
    reaching = (between > 0.05) & (until[:-1] >= at[1:] - 0.26) & (np.diff(at) > 0)
    overlap = np.clip((end[:-1] - onset[1:])[reaching] / between[reaching], -1, 1)
    return {"melody_overlap": mean(overlap), "melody_overlap_std": std(overlap)}


def _accents(view: View) -> dict[str, float]:
    force, top, together = view.velocity, view.top, view.together

    def over_rest(voice: np.ndarray) -> np.ndarray:
        return view.of_moments(force, together & voice) - view.of_moments(force, together & ~voice)

    moments = view.of_moments(force)
    bars, places = view.beats
    melody, hands = (
        over_rest(top),
        view.of_moments(force, view.staff == 1) - view.of_moments(force, view.staff > 1),
    )
    return {
        "force_downbeat": _over(moments, view.downbeat),
        "force_beat": _over(moments, view.on_beat),
        "force_bar_pattern": pattern(bars, moments, places),
        "force_melody": mean(melody),
        "force_melody_std": std(melody),
        "force_bass": mean(over_rest(view.bottom)),
        "force_hands": mean(hands),
        "force_melody_varies": std(force[top]),
        "force_rest_varies": std(force[~top]),
        "force_of_pitch": correlation(force, view.pitch),
        "force_of_melody": correlation(force[top], view.pitch[top]),
        "force_of_length": correlation(force, np.log(np.maximum(view.length, 1 / 16))),
        "force_of_notated": correlation(force, view.notated),
        "force_notated_range": slope(view.notated, force),
    }


def _course(view: View) -> dict[str, float]:
    moments = view.of_moments(view.velocity)
    numbers = np.unique(view.beats[0], return_inverse=True)[1]
    bars = np.bincount(numbers, moments) / np.bincount(numbers)
    return {
        "force_trend": slope(view.quarters, moments),
        "force_arch": arch(view.quarters, moments),
        "force_final": _over(moments, _final(view, view.quarters)),
        "force_bars": std(bars),
        "force_bar_changes": mean(np.abs(np.diff(bars))),
        "force_within_bars": std(moments - bars[numbers]),
        "force_of_tempo": correlation(moments, view.smooth(view.quarters)),
        "force_of_held": correlation(view.velocity, view.articulation),
    }


def _slips(view: View) -> dict[str, float]:
    match, notes, written = view.match, view.performance.notes, view.score.notes
    extra, missing = notes[match.extra], written[match.missing]
    beside = np.zeros(len(extra), bool)
    for i, note in enumerate(extra):
        near = np.abs(view.onset - note["onset"]) < _CLOSE
        beside[i] = np.any(np.abs(view.pitch[near] - float(note["pitch"])) <= 2)
    # sorted by pitch within an onset: the lowest notes
    starts = np.flatnonzero(np.r_[True, np.diff(written["onset"]) > 0])
    return {
        "extra_share": len(extra) / len(notes),
        "extra_brushed": np.sum(extra["offset"] - extra["onset"] < _SLIP) / len(notes),
        "extra_beside": beside.sum() / len(notes),
        "missing_share": len(missing) / len(written),
        "missing_bass": mean(np.isin(starts, match.missing).astype(float)),
        "missing_grace": mean(missing["grace"].astype(float)),
    }


def _pedal(view: View) -> dict[str, float]:
    """Pedal presses relative to the metre and the harmony; NaN without any."""
    ups, downs = pedalling(view.performance)
    played, written = view.steps.T
    bars, places = view.score.position(np.array([written[0], written[-1]]))
    quarters = np.interp(downs, played, written, left=np.nan, right=np.nan)
    known = quarters[np.isfinite(quarters)]
    position = view.score.position(known)[1]
    unit = view.score.metres[-1][2]
    near_beat = np.abs(position - np.round(position)) * unit < _NEAR
    before = view.quarters[np.maximum(np.searchsorted(view.quarters, known, side="right") - 1, 0)]
    new = view.quarters[1:][np.diff(view.bass) != 0]
    change = np.abs(new[:, None] - known).min(axis=1) if len(known) and len(new) else np.zeros(0)
    under = [
        len(np.unique(view.bass[(view.seconds >= down - _CATCH) & (view.seconds < up - _CATCH)]))
        for up, down in zip(ups, downs, strict=True)
    ]
    after = view.seconds + 0.1
    sounding = (np.searchsorted(downs, after) > np.searchsorted(ups, after)).astype(float)
    span = written[-1] - written[0]
    return {
        "pedal_per_beat": len(known) / max(span / unit, 1.0),
        "pedal_per_bar": len(known) / max(bars[1] - bars[0], 1.0),
        "pedal_on_beats": mean(near_beat.astype(float)),
        "pedal_on_bars": mean(
            (near_beat & (np.round(position) % max(view.score.metres[-1][1], 1) == 0)).astype(float)
        ),
        "pedal_late": mean(np.clip(known - before, 0, 1)),
        "pedal_of_harmony": mean((change < _NEAR).astype(float)),
        "pedal_harmonies": mean(np.array(under, float)),
        "pedal_downbeats": _over(sounding, view.downbeat),
    }
