"""Pedal descriptors: amount, depth, frequency of changes, and blurring.

Controller values are 0 to 127. At half pedal, the dampers touch the strings partially. The pedal
counts as down from 64 on, as for PercePiano's authors and Liang, Fazekas and Sandler (2019), "Piano
sustain-pedal detection".
"""

import numpy as np

from percepiano_ast.descriptors.view import Descriptor, View, mean
from percepiano_ast.performance import SUSTAIN, UNA_CORDA, Performance

_DOWN = 64
_HALF = (20, 107)  # between these values, the pedal is neither fully up nor fully down
_GRID = 0.05  # seconds; time grid for counting sounding notes
_RING = 4.0  # seconds; an undamped string is assumed to be inaudible afterwards

TABLE = {
    "pedal_share": Descriptor("", "share of time with the sustain pedal down"),
    "pedal_mean": Descriptor("value", "mean value of the sustain pedal over time"),
    "pedal_std": Descriptor("value", "standard deviation of the sustain pedal over time"),
    "pedal_depth": Descriptor(
        "value", "mean value while the sustain pedal is down; 0 if it never is"
    ),
    "half_pedal_share": Descriptor("", "share of time at half pedal"),
    "half_pedal_of_down": Descriptor(
        "", "share of half pedal in the time that the pedal is not up"
    ),
    "pedal_changes": Descriptor("1/s", "pedal presses per second"),
    "pedal_movement": Descriptor("value/s", "total pedal movement per second, up and down"),
    "pedal_held": Descriptor("s", "mean duration of a pedalling; 0 without pedal"),
    "pedal_lag": Descriptor(
        "s", "mean time from the last chord to the pedal press, at most 1; 0 without pedal"
    ),
    "pedalled_notes": Descriptor("", "share of notes struck with the pedal down"),
    "una_corda_share": Descriptor("", "share of time with the soft pedal down"),
    "una_corda_mean": Descriptor("value", "mean value of the soft pedal over time"),
    "ringing_mean": Descriptor(
        "log s", "mean log sounding time of notes, held by key or pedal, at most 4 s"
    ),
    "ringing_notes": Descriptor("notes", "mean number of notes sounding simultaneously"),
    "blur": Descriptor("", "number of simultaneous semitones and whole tones per sounding note"),
}


def measure(view: View) -> dict[str, float]:
    """The descriptors of ``TABLE``."""
    time = np.arange(view.onset.min(), view.offset.max(), _GRID)
    value = _value_at(view, SUSTAIN, time)
    soft = _value_at(view, UNA_CORDA, time)
    down, half = value >= _DOWN, (value > _HALF[0]) & (value < _HALF[1])
    ups, downs = pedalling(view.performance)
    before = view.start[np.maximum(np.searchsorted(view.start, downs) - 1, 0)]
    off_floor = (value > _HALF[0]).mean()
    return {
        "pedal_share": down.mean(),
        "pedal_mean": value.mean(),
        "pedal_std": value.std(),
        "pedal_depth": mean(value[down]),
        "half_pedal_share": half.mean(),
        "half_pedal_of_down": half.mean() / off_floor if off_floor else 0.0,
        "pedal_changes": len(downs) / view.seconds,
        "pedal_movement": np.abs(np.diff(value)).sum() / view.seconds,
        "pedal_held": mean(ups - downs),
        "pedal_lag": mean(np.clip(downs - before, 0.0, 1.0)),
        "pedalled_notes": (_value_at(view, SUSTAIN, view.onset) >= _DOWN).mean(),
        "una_corda_share": (soft >= _DOWN).mean(),
        "una_corda_mean": soft.mean(),
        **_ringing(view, time, ups, downs),
    }


def _value_at(view: View, number: int, time: np.ndarray) -> np.ndarray:
    """Value of a pedal at times ``time``; 0 before its first event."""
    events = view.performance.pedals[view.performance.pedals["number"] == number]
    values = np.concatenate([[0.0], events["value"]])
    return values[np.searchsorted(events["time"], time, side="right")]


def pedalling(performance: Performance) -> tuple[np.ndarray, np.ndarray]:
    """Release and press times of the sustain pedal, one of each per pedalling; it is released at
    the end at the latest."""
    events = performance.pedals[performance.pedals["number"] == SUSTAIN]
    turns = np.diff(np.concatenate([[0], (events["value"] >= _DOWN).astype(int)]))
    downs, ups = events["time"][turns > 0], events["time"][turns < 0]
    return np.append(ups, performance.duration)[: len(downs)], downs


def _ringing(view: View, time: np.ndarray, ups: np.ndarray, downs: np.ndarray) -> dict[str, float]:
    """Sounding time and number of sounding notes, and the number of simultaneous seconds."""
    end = view.offset.copy()
    for up, down in zip(ups, downs, strict=True):
        caught = (view.offset >= down) & (view.offset < up)
        end[caught] = up
    end = np.minimum(end, view.onset + _RING)
    sounding = np.zeros((128, len(time)), dtype=bool)
    for pitch, first, last in zip(
        view.pitch.astype(int), *np.searchsorted(time, (view.onset, end)), strict=True
    ):
        sounding[pitch, first:last] = True
    clashes = sum((sounding[step:] & sounding[:-step]).sum() for step in (1, 2))
    return {
        "ringing_mean": np.log(np.maximum(end - view.onset, _GRID)).mean(),
        "ringing_notes": sounding.sum(axis=0).mean(),
        "blur": clashes / max(sounding.sum(), 1),
    }
