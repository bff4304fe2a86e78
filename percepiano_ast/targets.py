"""What is to be heard in a recording of a performance, frame by frame: onsets, keys, strings, force and pedals.

Frames are those of the front end, so that row t of a target says what is played at the centre of row t of the log-mel
spectrogram. The five kinds of targets are those of Onsets and Frames (Hawthorne et al. 2018, arXiv 1710.11153: onset, frame,
velocity) and of high-resolution transcription with pedals (Kong et al. 2021, arXiv 2010.01815), but that pedals keep their
values where the latter asks whether one is down: half pedal and una corda are degrees.
"""

from typing import NamedTuple

import numpy as np

from percepiano_ast.config import FrontEnd
from percepiano_ast.performance import PEDALS, SUSTAIN, UNA_CORDA, Performance

LOWEST, KEYS = 21, 88  # MIDI pitch of the lowest key (A0), and how many a piano has
# What counts as heard, of outputs between 0 and 1: an onset from this height of its slope on (Kong et al.'s threshold), a key
# or string from this on.
ONSET_FROM, HELD_FROM = 0.3, 0.5
DOWN_FROM = 64  # value from which the sustain pedal holds strings: as MIDI, synthesizers and `descriptors` have it


class Targets(NamedTuple):
    """Targets of T frames; columns are the piano's keys from A0 up.

    Attributes:
        onset: Bool (T, 88), in the frame whose centre is nearest to the stroke.
        down: Bool (T, 88), the key is held.
        sounding: Bool (T, 88), key or sustain pedal keeps the damper off the struck string.
        velocity: float32 (T, 88), MIDI velocity / 127 where there is an onset, else 0.
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
    return (np.arange(start, start + n_frames) * front_end.hop_length + _centre(front_end)) / front_end.sample_rate


def _centre(front_end: FrontEnd) -> float:
    """Sample that frame 0 is centred on; Kaldi's frames start, ours are centred, at multiples of the hop."""
    return front_end.win_length / 2 if front_end.kind == "kaldi" else 0.0


def frames(performance: Performance, start: int, n_frames: int, front_end: FrontEnd) -> Targets:
    """Targets of the frames ``start`` to ``start + n_frames`` of a recording whose time zero is the performance's.

    Notes outside a piano's 88 keys have no column and are left out; the sostenuto pedal is not regarded.
    """
    return Roll(performance, front_end).frames(start, n_frames)


class Roll:
    """A performance on the front end's frames: made once for a recording, from which `frames` of any window follow fast.

    Args:
        performance, front_end: see `frames`.
    """

    def __init__(self, performance: Performance, front_end: FrontEnd):
        self.front_end, notes = front_end, performance.notes
        of_piano = (notes["pitch"] >= LOWEST) & (notes["pitch"] < LOWEST + KEYS)
        onset, release, silent = (
            self._nearest(seconds[of_piano]) for seconds in (notes["onset"], notes["offset"], damped(performance))
        )
        self._key = notes["pitch"][of_piano].astype(np.int32) - LOWEST
        self._velocity = notes["velocity"][of_piano] / np.float32(127)
        self._onset, self._release = onset, np.maximum(release, onset + 1)  # each lasts a frame at least
        self._silent = np.maximum(silent, self._release)
        pedals = performance.pedals
        self._pedals = [pedals[pedals["number"] == number] for number in (SUSTAIN, UNA_CORDA)]

    def _nearest(self, seconds: np.ndarray) -> np.ndarray:
        """Frames whose centres are nearest to moments, int32."""
        frame = (seconds * self.front_end.sample_rate - _centre(self.front_end)) / self.front_end.hop_length
        return np.minimum(np.rint(frame), 2**30).astype(np.int32)

    def frames(self, start: int, n_frames: int) -> Targets:
        """See the function `frames`."""
        shape = (n_frames, KEYS)
        onset, down, sounding = (np.zeros(shape, bool) for _ in range(3))
        velocity = np.zeros(shape, np.float32)
        near = np.flatnonzero((self._onset < start + n_frames) & (self._silent > start))
        columns = (self._key[near], *(np.maximum(at[near] - start, 0) for at in (self._onset, self._release, self._silent)))
        for key, begin, up, end in zip(*(column.tolist() for column in columns)):
            down[begin:up, key] = True
            sounding[begin:end, key] = True
        struck = near[self._onset[near] >= start]
        place = (self._onset[struck] - start, self._key[struck])
        onset[place] = True
        velocity[place] = self._velocity[struck]
        times = frame_times(start, n_frames, self.front_end)
        return Targets(onset, down, sounding, velocity, *(_values_at(events, times) for events in self._pedals))


def damped(performance: Performance) -> np.ndarray:
    """Seconds at which the damper falls on each note's string, or it is struck again, (n_notes,).

    That is the release, or later, when the sustain pedal that holds at the release is lifted; infinite if it never is.
    """
    notes = performance.notes
    events = performance.pedals[performance.pedals["number"] == SUSTAIN]
    holds = np.concatenate([[False], events["value"] >= DOWN_FROM])  # before the first event, after each
    # Behind event i the pedal is next up with event lifted[i] (or never).
    up = np.where(holds, len(holds), np.arange(len(holds)))
    lifted = np.minimum.accumulate(up[::-1])[::-1]
    when = np.concatenate([[-np.inf], events["time"], [np.inf]])
    # An event at the very moment of the release counts as before it.
    end = np.maximum(notes["offset"], when[lifted[np.searchsorted(events["time"], notes["offset"], side="right")]])
    order = np.lexsort((notes["onset"], notes["pitch"]))
    again = np.full(len(notes), np.inf)
    same = np.diff(notes["pitch"][order].astype(int)) == 0
    again[order[:-1][same]] = notes["onset"][order[1:][same]]
    return np.minimum(end, again)


def _values_at(events: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Value / 127 of one pedal's events at moments ``times``, float32; 0 before the first event."""
    values = np.concatenate([[0], events["value"]]).astype(np.float32) / np.float32(127)
    return values[np.searchsorted(events["time"], times, side="right")]


def excerpt(performance: Performance, start: float, stop: float) -> Performance | None:
    """The notes struck from ``start`` to ``stop`` seconds, with their pedals, on a clock that begins at ``start``.

    Releases behind ``stop`` come at ``stop``; pedals begin in the state that they were in. None if nothing is struck.
    """
    notes = performance.notes[(performance.notes["onset"] >= start) & (performance.notes["onset"] < stop)].copy()
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
