"""Frame-wise transcription targets of a performance: onsets, keys, sounding strings, velocity and
pedals.

Frames are those of the front end: row t of a target describes the performance at the centre of row
t of the log-mel spectrogram. The five kinds of targets are those of Onsets and Frames (Hawthorne et
al. 2018, arXiv 1710.11153: onset, frame, velocity) and of high-resolution transcription with pedals
(Kong et al. 2021, arXiv 2010.01815). Pedals keep their continuous values, which include half pedal,
where Kong et al. use binary targets.
"""

from typing import NamedTuple

import numpy as np

from percepiano_ast.config import FrontEnd
from percepiano_ast.performance import PEDALS, SUSTAIN, UNA_CORDA, Performance

LOWEST, KEYS = 21, 88  # MIDI pitch of the lowest key (A0), and the number of keys
# Detection thresholds of outputs between 0 and 1: of the regressed onset (Kong et al.), and of keys
# and strings.
ONSET_FROM, HELD_FROM = 0.3, 0.5
# value from which the sustain pedal holds strings, as in MIDI, synthesizers and `descriptors`
DOWN_FROM = 64


class Targets(NamedTuple):
    """Targets of T frames; columns are the piano's keys from A0 up.

    Attributes:
        onset: Bool (T, 88), in the frame whose centre is nearest to the onset.
        down: Bool (T, 88), the key is held.
        sounding: Bool (T, 88), key or sustain pedal keeps the damper off the struck string.
        velocity: float32 (T, 88), MIDI velocity / 127 at onsets, else 0.
        sustain: float32 (T,), controller 64 / 127.
        una_corda: float32 (T,), controller 67 / 127.
    """

    onset: np.ndarray
    down: np.ndarray
    sounding: np.ndarray
    velocity: np.ndarray
    sustain: np.ndarray
    una_corda: np.ndarray


def frame_times(start: int, n_frames: int, front_end: FrontEnd) -> np.ndarray:
    """Seconds at the centres of ``n_frames`` frames from frame ``start`` on, (n_frames,)."""
    return (
        np.arange(start, start + n_frames) * front_end.hop_length + _centre(front_end)
    ) / front_end.sample_rate


def _centre(front_end: FrontEnd) -> float:
    """Sample at the centre of frame 0; Kaldi's frames start at multiples of the hop, librosa's are
    centred there."""
    return front_end.win_length / 2 if front_end.kind == "kaldi" else 0.0


def frames(performance: Performance, start: int, n_frames: int, front_end: FrontEnd) -> Targets:
    """Targets of the frames ``start`` to ``start + n_frames`` of a recording that starts with the
    performance.

    Notes outside the 88 keys and the sostenuto pedal are ignored.
    """
    return Roll(performance, front_end).frames(start, n_frames)


class Roll:
    """A performance quantised to the front end's frames: computed once per recording, so that
    `frames` of any window is fast.

    Args:
        performance, front_end: see `frames`.
    """

    def __init__(self, performance: Performance, front_end: FrontEnd):
        self.front_end, notes = front_end, performance.notes
        of_piano = (notes["pitch"] >= LOWEST) & (notes["pitch"] < LOWEST + KEYS)
        onset, release, silent = (
            self._nearest(seconds[of_piano])
            for seconds in (notes["onset"], notes["offset"], damped(performance))
        )
        self._key = notes["pitch"][of_piano].astype(np.int32) - LOWEST
        self._velocity = notes["velocity"][of_piano] / np.float32(127)
        # each lasts at least one frame
        self._onset, self._release = onset, np.maximum(release, onset + 1)
        self._silent = np.maximum(silent, self._release)
        pedals = performance.pedals
        self._pedals = [pedals[pedals["number"] == number] for number in (SUSTAIN, UNA_CORDA)]

    def _nearest(self, seconds: np.ndarray) -> np.ndarray:
        """Frames whose centres are nearest to the given times, int32."""
        frame = (
            seconds * self.front_end.sample_rate - _centre(self.front_end)
        ) / self.front_end.hop_length
        return np.minimum(np.rint(frame), 2**30).astype(np.int32)

    def frames(self, start: int, n_frames: int) -> Targets:
        """See the function `frames`."""
        shape = (n_frames, KEYS)
        onset, down, sounding = (np.zeros(shape, bool) for _ in range(3))
        velocity = np.zeros(shape, np.float32)
        near = np.flatnonzero((self._onset < start + n_frames) & (self._silent > start))
        columns = (
            self._key[near],
            *(np.maximum(at[near] - start, 0) for at in (self._onset, self._release, self._silent)),
        )
        for key, begin, up, end in zip(*(column.tolist() for column in columns)):
            down[begin:up, key] = True
            sounding[begin:end, key] = True
        struck = near[self._onset[near] >= start]
        place = (self._onset[struck] - start, self._key[struck])
        onset[place] = True
        velocity[place] = self._velocity[struck]
        times = frame_times(start, n_frames, self.front_end)
        return Targets(
            onset, down, sounding, velocity, *(_values_at(events, times) for events in self._pedals)
        )


def damped(performance: Performance) -> np.ndarray:
    """Time in seconds at which each note's string is damped or struck again, (n_notes,).

    A string is damped at the key's release or, if the sustain pedal is down then, at the pedal's
    release; infinite without one.
    """
    notes = performance.notes
    events = performance.pedals[performance.pedals["number"] == SUSTAIN]
    # before the first event, after each
    holds = np.concatenate([[False], events["value"] >= DOWN_FROM])
    # After event i the pedal is next up at event lifted[i] (or never).
    up = np.where(holds, len(holds), np.arange(len(holds)))
    lifted = np.minimum.accumulate(up[::-1])[::-1]
    when = np.concatenate([[-np.inf], events["time"], [np.inf]])
    # A pedal event at the time of the release counts as before it.
    end = np.maximum(
        notes["offset"],
        when[lifted[np.searchsorted(events["time"], notes["offset"], side="right")]],
    )
    order = np.lexsort((notes["onset"], notes["pitch"]))
    again = np.full(len(notes), np.inf)
    same = np.diff(notes["pitch"][order].astype(int)) == 0
    again[order[:-1][same]] = notes["onset"][order[1:][same]]
    return np.minimum(end, again)


def _values_at(events: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Value / 127 of one pedal at ``times``, float32; 0 before the first event."""
    values = np.concatenate([[0], events["value"]]).astype(np.float32) / np.float32(127)
    return values[np.searchsorted(events["time"], times, side="right")]


def excerpt(performance: Performance, start: float, stop: float) -> Performance | None:
    """The notes with onsets from ``start`` to ``stop`` seconds, and the pedals, with times relative
    to ``start``.

    Releases after ``stop`` are moved to ``stop``; pedals start in their state at ``start``. None
    without onsets.
    """
    notes = performance.notes[
        (performance.notes["onset"] >= start) & (performance.notes["onset"] < stop)
    ].copy()
    if not len(notes):
        return None
    notes["offset"] = np.minimum(notes["offset"], stop) - start
    notes["onset"] -= start
    pedals = performance.pedals
    before = pedals[pedals["time"] < start]
    state = np.concatenate([before[before["number"] == number][-1:] for number in PEDALS])
    inside = pedals[(pedals["time"] >= start) & (pedals["time"] < stop)].copy()
    state["time"] = 0.0
    inside["time"] -= start
    return Performance(notes, np.concatenate([state, inside]))
