"""Contribution of each note of a MIDI performance to a rating, from an attribution map."""

import functools

import numpy as np
import pandas as pd

from percepiano_ast import audio
from percepiano_ast.config import FrontEnd
from percepiano_ast.errors import InputError
from percepiano_ast.explain.maps import Explanation, Recording
from percepiano_ast.music.midi import Performance, damped, note_name

LONGEST_SILENCE = 5.0  # seconds of recording allowed after the last key release
# seconds between MIDI and audio; beyond it contributions would go to the wrong notes
LARGEST_SHIFT = 0.1
_SEARCHED = 2.0  # seconds to either side in which the offset of the MIDI is searched
_DECAY = 0.6  # seconds in which a note's power falls to 1 / e
_RELEASE = 0.1  # seconds that a damped string sounds
_PARTIALS = 16
# share of a note's peak power expected in every band: hammer, resonance, side lobes of the window
_SPILL = 1e-4


def note_table(explanation: Explanation, performance: Performance) -> pd.DataFrame:
    """Contribution of every note, the largest first.

    A point of the map is divided among the notes that sound there in proportion to their expected
    power: fundamental and partials (amplitude 1 / k) in the bands of the front end, scaled by
    velocity, decaying from the onset until key and pedal are released. Between partials it is
    divided among all sounding notes. The last row is the contribution of frames without a note, so
    the column sums to the total of the map.

    Returns:
        ``note`` (number in order of onset, -1 for the rest), ``onset`` and ``offset`` in seconds,
        ``pitch``, ``name``, ``velocity``, ``contribution`` on the rating's scale, ``share`` of the
        sum of all absolute contributions.

    Raises:
        InputError: the performance does not match the recording, see `check_alignment`.
    """
    check_alignment(explanation.recording, performance)
    front_end, attributed = explanation.recording.front_end, explanation.map
    expected = np.zeros(attributed.shape)
    parts = list(_expected(performance, front_end, len(attributed)))
    for frames, power in parts:
        expected[frames] += power
    per_power = np.divide(attributed, expected, out=np.zeros(attributed.shape), where=expected > 0)
    notes = pd.DataFrame(
        {name: performance.notes[name] for name in ("onset", "offset", "pitch", "velocity")}
    )
    notes.insert(0, "note", np.arange(len(notes)))
    notes.insert(4, "name", [note_name(pitch) for pitch in notes["pitch"]])
    notes["contribution"] = [float((per_power[frames] * power).sum()) for frames, power in parts]
    rest = {
        "note": -1,
        "name": "no note",
        "contribution": float(attributed[expected == 0].sum(dtype=np.float64)),
    }
    notes = notes.sort_values("contribution", key=np.abs, ascending=False, kind="stable")
    table = pd.concat(
        [notes.astype({"pitch": "Int64", "velocity": "Int64"}), pd.DataFrame([rest])],
        ignore_index=True,
    )
    sizes = table["contribution"].abs()
    return table.assign(share=sizes / max(sizes.sum(), 1e-12)).round({"onset": 4, "offset": 4})


def _expected(performance: Performance, front_end: FrontEnd, n_frames: int):
    """For every note, the frames in which it sounds (a slice) and its expected power there (frames,
    bands)."""
    hop = front_end.hop_length / front_end.sample_rate
    # half a window: a frame includes sound after its centre
    before = front_end.win_length / front_end.sample_rate / 2
    # a pedal that stays down holds to the end
    ends = np.minimum(damped(performance), performance.duration) + _RELEASE
    for note, end in zip(performance.notes, ends):
        first = max(int(np.ceil((note["onset"] - before) / hop)), 0)
        frames = slice(first, min(max(int(end / hop) + 1, first + 1), n_frames))
        since = np.arange(frames.start, frames.stop) * hop - note["onset"]
        power = (note["velocity"] / 127) ** 2 * np.exp(-np.maximum(since, 0) / _DECAY)
        bands = _bands(int(note["pitch"]), front_end)
        yield frames, power[:, None] * bands[None, :]


@functools.lru_cache(maxsize=256)
def _bands(pitch: int, front_end: FrontEnd) -> np.ndarray:
    """Relative power of a note of this pitch in each band, float64 (n_mels,), at most 1, from a
    synthesized sum of sines."""
    fundamental = 440 * 2 ** ((pitch - 69) / 12)
    time = np.arange(4 * front_end.win_length) / front_end.sample_rate
    partials = [
        k
        for k in range(1, _PARTIALS + 1)
        if k == 1 or k * fundamental < 0.95 * front_end.sample_rate / 2
    ]
    wave = sum(np.sin(2 * np.pi * k * fundamental * time + k) / k for k in partials)
    level = audio.log_mel(np.asarray(0.1 * wave, np.float32), front_end)
    power = 10 ** (level[len(level) // 2].astype(np.float64) / 10)
    power /= power.max()
    return np.maximum(power, _SPILL)


def check_alignment(recording: Recording, performance: Performance) -> None:
    """Check that the notes of a performance match the audio of the recording.

    Raises:
        InputError: notes after the end of the recording, a recording that continues long after the
            last note, or onsets that match the audio much better with an offset.
    """
    first, last, end = (
        performance.notes["onset"].min(),
        performance.notes["onset"].max(),
        performance.duration,
    )
    if last >= recording.seconds or recording.seconds - end > LONGEST_SILENCE:
        raise InputError(
            f"the MIDI's notes last from {first:.1f} to {end:.1f} s, the recording {recording.name}"
            f" {recording.seconds:.1f} s. Give the MIDI of this recording, starting at the same"
            " time."
        )
    shift = _best_shift(recording, performance)
    if abs(shift) > LARGEST_SHIFT:
        raise InputError(
            f"the MIDI's onsets match the audio of {recording.name} only when moved by {shift:+.2f}"
            " s. Trim both to start at the same time."
        )


def _best_shift(recording: Recording, performance: Performance) -> float:
    """Offset in seconds that aligns the onsets with rises in level over bands; 0 if ambiguous."""
    front_end = recording.front_end
    hop = front_end.hop_length / front_end.sample_rate
    audible = np.maximum(recording.level, recording.level.max() - 60)
    rise = np.maximum(np.diff(audible, axis=0, prepend=audible[:1]), 0).sum(axis=1)
    struck = np.zeros(len(rise))
    frames = np.minimum(np.round(performance.notes["onset"] / hop).astype(int), len(rise) - 1)
    np.maximum.at(struck, frames, performance.notes["velocity"] / 127)
    near = np.exp(-0.5 * (np.arange(-5, 6) / 2) ** 2)  # onsets are accurate to about 20 ms
    struck = np.convolve(struck, near, mode="same")
    shifts = np.arange(-round(_SEARCHED / hop), round(_SEARCHED / hop) + 1)
    shifts = shifts[np.abs(shifts) < len(rise)]
    fits = [
        float(
            np.dot(
                rise[max(k, 0) : len(rise) + min(k, 0)], struck[max(-k, 0) : len(rise) - max(k, 0)]
            )
        )
        for k in shifts
    ]
    best = int(np.argmax(fits))
    # Music repeats: an offset of one beat matches nearly as well as the true offset.
    return (
        float(shifts[best] * hop)
        if fits[best] > 1.2 * fits[int(np.flatnonzero(shifts == 0)[0])]
        else 0.0
    )
