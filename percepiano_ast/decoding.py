"""Decode a network's frame-wise outputs to notes and pedals, and score the transcription.

Notes start at peaks of the regressed onset, with a resolution finer than a step (Kong et al. 2021,
arXiv 2010.01815, section III-E), and end when the key is released. The result is a `Performance` as
if read from MIDI; once ``trimmed``, `descriptors.describe` accepts it.
"""

from typing import NamedTuple

import numpy as np

from percepiano_ast.performance import NOTE, PEDAL, SUSTAIN, UNA_CORDA, Performance
from percepiano_ast.targets import HELD_FROM, LOWEST, ONSET_FROM

_PEDAL_MOVES = 4  # controller values: smaller changes are treated as noise
TOLERANCE = 0.05  # seconds, as in mir_eval


class Heard(NamedTuple):
    """Transcription outputs of S steps; all values 0 to 1, columns are keys from A0 up.

    Attributes:
        onset, down, sounding, velocity: float (S, 88).
        sustain, una_corda: float (S,).
        times: seconds at the middle of each step, (S,), evenly spaced.
    """

    onset: np.ndarray
    down: np.ndarray
    sounding: np.ndarray
    velocity: np.ndarray
    sustain: np.ndarray
    una_corda: np.ndarray
    times: np.ndarray


def cross_fade(pieces: list[np.ndarray], starts: list[int], length: int) -> np.ndarray:
    """Cross-fade overlapping pieces (steps, ...) that start at ``starts`` into one of ``length``
    steps.

    Weights are highest in the middle of a piece and lowest at its ends, where the network has
    context on one side only.
    """
    total = np.zeros((length, *pieces[0].shape[1:]), np.float32)
    weight = np.zeros(length, np.float32)
    for piece, start in zip(pieces, starts, strict=True):
        size = min(len(piece), length - start)
        ramp = np.minimum(np.arange(1, len(piece) + 1), np.arange(len(piece), 0, -1))[:size].astype(
            np.float32
        )
        total[start : start + size] += piece[:size] * ramp.reshape(-1, *[1] * (piece.ndim - 1))
        weight[start : start + size] += ramp
    return total / weight.reshape(-1, *[1] * (total.ndim - 1))


def decode(heard: Heard, onset_from: float = ONSET_FROM) -> Performance | None:
    """The transcribed performance, in the time of the recording; None without notes.

    Args:
        onset_from: minimum height of an onset peak.
    """
    step = float(heard.times[1] - heard.times[0]) if len(heard.times) > 1 else 0.0
    padded = np.pad(heard.onset, ((1, 1), (0, 0)))
    before, at, after = padded[:-2], padded[1:-1], padded[2:]
    steps, keys = np.nonzero((at >= onset_from) & (at >= before) & (at > after))
    if not len(steps):
        return None
    left, right, height = before[steps, keys], after[steps, keys], at[steps, keys]
    # For symmetric slopes the peak is this fraction of a step towards the higher neighbour.
    aside = 0.5 * (right - left) / np.maximum(height - np.minimum(left, right), 1e-6)
    notes = np.empty(len(steps), NOTE)
    notes["onset"] = np.maximum(heard.times[steps] + step * np.clip(aside, -0.5, 0.5), 0.0)
    last = _last_steps(heard.down, steps, keys)
    notes["offset"] = np.maximum(heard.times[last] + step / 2, notes["onset"] + step)
    notes["pitch"] = keys + LOWEST
    notes["velocity"] = np.clip(np.rint(127 * heard.velocity[steps, keys]), 1, 127)
    notes = _one_at_a_time(notes)
    pedals = [
        _events(heard.times, curve, number)
        for number, curve in ((SUSTAIN, heard.sustain), (UNA_CORDA, heard.una_corda))
    ]
    events = np.concatenate(pedals)
    return Performance(notes, events[np.argsort(events["time"], kind="stable")])


def _last_steps(down: np.ndarray, steps: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The last step in which each note's key is down; at least the step of its onset."""
    last = len(down) - 1
    # For every step, the next one in which the key is up.
    number = np.arange(len(down))[:, None]
    up = np.where(down < HELD_FROM, number, last + 1)
    next_up = np.minimum.accumulate(up[::-1], axis=0)[::-1]
    # In the step of the onset itself the key may not yet be detected as down.
    return np.maximum(next_up[np.minimum(steps + 1, last), keys] - 1, steps)


def _one_at_a_time(notes: np.ndarray) -> np.ndarray:
    """Notes by onset, each ending no later than the next onset of its key."""
    notes = notes[np.lexsort((notes["onset"], notes["pitch"]))]
    same = np.diff(notes["pitch"].astype(int)) == 0
    notes["offset"][:-1][same] = np.minimum(notes["offset"][:-1], notes["onset"][1:])[same]
    return notes[np.lexsort((notes["pitch"], notes["onset"]))]


def _events(times: np.ndarray, curve: np.ndarray, number: int) -> np.ndarray:
    """Pedal events at changes of the curve by `_PEDAL_MOVES` or across the value 64."""
    values = np.clip(np.rint(127 * curve), 0, 127).astype(int)
    kept, now = [], 0
    for k, value in enumerate(values.tolist()):
        if abs(value - now) >= _PEDAL_MOVES or (value >= 64) != (now >= 64):
            kept.append((times[k], number, value))
            now = value
    return np.array(kept, PEDAL)


def note_scores(
    played: Performance, heard: Performance | None, tolerance: float = TOLERANCE
) -> dict[str, float]:
    """Note onset scores as in mir_eval: same pitch, within ``tolerance`` seconds, each note matched
    at most once.

    For each pitch, the earliest note within the tolerance is matched, in order of time. In one
    dimension this gives a matching of maximum size, as does mir_eval's bipartite graph.

    Args:
        `heard`: the transcription, in the time of ``played``, or None without notes.

    Returns:
        ``precision``, ``recall``, ``f1``, and ``velocity_mae`` in MIDI units over the matched notes
        (NaN without any).
    """
    if heard is None:
        return {"precision": 0.0, "recall": 0.0, "f1": 0.0, "velocity_mae": np.nan}
    errors = []
    for pitch in np.unique(played.notes["pitch"]):
        ours, theirs = (notes[notes["pitch"] == pitch] for notes in (played.notes, heard.notes))
        k = 0
        for note in ours:
            while k < len(theirs) and theirs["onset"][k] < note["onset"] - tolerance:
                k += 1
            if k < len(theirs) and theirs["onset"][k] <= note["onset"] + tolerance:
                errors.append(abs(int(theirs["velocity"][k]) - int(note["velocity"])))
                k += 1
    precision, recall = len(errors) / len(heard.notes), len(errors) / len(played.notes)
    f1 = 2 * precision * recall / (precision + recall) if errors else 0.0
    return {
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "velocity_mae": float(np.mean(errors)) if errors else np.nan,
    }
