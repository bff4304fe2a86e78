"""Frame-wise transcription targets of a performance, and performances from frame-wise predictions.

The targets are those of Onsets and Frames (Hawthorne et al. 2018, arXiv 1710.11153) and of
high-resolution transcription with pedals (Kong et al. 2021, arXiv 2010.01815), but pedals are
continuous, because half pedal exists.
"""

from typing import NamedTuple

import numpy as np

from percepiano_ast.config import FrontEnd
from percepiano_ast.music import midi
from percepiano_ast.music.midi import PEDAL_DOWN, SUSTAIN, UNA_CORDA, Performance

LOWEST, N_KEYS = 21, 88  # MIDI pitch of the lowest key (A0), and the number of keys
# Detection thresholds of outputs between 0 and 1: of the regressed onset (Kong et al.), and of keys
# and strings.
ONSET_FROM, HELD_FROM = 0.3, 0.5
_PEDAL_STEP = 4  # controller values: smaller changes are treated as noise


class FrameTargets(NamedTuple):
    """Targets of T frames; columns are the piano's keys from A0 up.

    Row t describes the performance at the centre of row t of the log-mel spectrogram.

    Attributes:
        onset: Bool (T, 88), in the frame whose centre is nearest to the onset.
        frame: Bool (T, 88), the key is held.
        sustained: Bool (T, 88), key or sustain pedal keeps the damper off the struck string.
        velocity: float32 (T, 88), MIDI velocity / 127 at onsets, else 0.
        sustain: float32 (T,), controller 64 / 127.
        una_corda: float32 (T,), controller 67 / 127.
    """

    onset: np.ndarray
    frame: np.ndarray
    sustained: np.ndarray
    velocity: np.ndarray
    sustain: np.ndarray
    una_corda: np.ndarray


class FramePredictions(NamedTuple):
    """Predictions of the fields of `FrameTargets` for S steps, all float from 0 to 1, and
    ``times``, seconds at the middle of each step, (S,), evenly spaced."""

    onset: np.ndarray
    frame: np.ndarray
    sustained: np.ndarray
    velocity: np.ndarray
    sustain: np.ndarray
    una_corda: np.ndarray
    times: np.ndarray


def frame_times(start: int, n_frames: int, front_end: FrontEnd) -> np.ndarray:
    """Seconds at the centres of ``n_frames`` frames from frame ``start`` on, (n_frames,)."""
    samples = np.arange(start, start + n_frames) * front_end.hop_length + _first_centre(front_end)
    return samples / front_end.sample_rate


def _first_centre(front_end: FrontEnd) -> float:
    """Sample at the centre of frame 0; Kaldi's frames start at multiples of the hop, librosa's are
    centred there."""
    return front_end.win_length / 2 if front_end.kind == "kaldi" else 0.0


def frame_targets(
    performance: Performance, start: int, n_frames: int, front_end: FrontEnd
) -> FrameTargets:
    """Targets of the frames ``start`` to ``start + n_frames`` of a recording that starts with the
    performance; notes outside the 88 keys and the sostenuto pedal are ignored."""
    return PianoRoll(performance, front_end).frames(start, n_frames)


class PianoRoll:
    """A performance quantised to the front end's frames, from which `frame_targets` of any window
    are fast."""

    def __init__(self, performance: Performance, front_end: FrontEnd):
        self.front_end, notes = front_end, performance.notes
        on_piano = (notes["pitch"] >= LOWEST) & (notes["pitch"] < LOWEST + N_KEYS)

        def nearest(seconds: np.ndarray) -> np.ndarray:
            """Frames whose centres are nearest to the given times, int32."""
            samples = seconds[on_piano] * front_end.sample_rate - _first_centre(front_end)
            return np.minimum(np.rint(samples / front_end.hop_length), 2**30).astype(np.int32)

        self._key = notes["pitch"][on_piano].astype(np.int32) - LOWEST
        self._velocity = notes["velocity"][on_piano] / np.float32(127)
        # each lasts at least one frame
        self._onset = nearest(notes["onset"])
        self._release = np.maximum(nearest(notes["offset"]), self._onset + 1)
        self._silent = np.maximum(nearest(midi.damped(performance)), self._release)
        self._performance = performance

    def frames(self, start: int, n_frames: int) -> FrameTargets:
        """See `frame_targets`."""
        shape = (n_frames, N_KEYS)
        onset, frame, sustained = (np.zeros(shape, bool) for _ in range(3))
        velocity = np.zeros(shape, np.float32)
        near = np.flatnonzero((self._onset < start + n_frames) & (self._silent > start))
        times = (self._onset, self._release, self._silent)
        columns = self._key[near], *(np.maximum(at[near] - start, 0) for at in times)
        for key, begin, up, end in zip(*(column.tolist() for column in columns), strict=True):
            frame[begin:up, key] = True
            sustained[begin:end, key] = True
        struck = near[self._onset[near] >= start]
        place = (self._onset[struck] - start, self._key[struck])
        onset[place] = True
        velocity[place] = self._velocity[struck]
        at = frame_times(start, n_frames, self.front_end)
        pedals = (
            self._performance.pedal_at(number, at).astype(np.float32) / np.float32(127)
            for number in (SUSTAIN, UNA_CORDA)
        )
        return FrameTargets(onset, frame, sustained, velocity, *pedals)


def crossfade(pieces: list[np.ndarray], starts: list[int], length: int) -> np.ndarray:
    """Cross-fade overlapping pieces (steps, ...) that start at ``starts`` into one of ``length``
    steps; weights are lowest at the ends of a piece, where the network has context on one side."""
    total = np.zeros((length, *pieces[0].shape[1:]), np.float32)
    weight = np.zeros(length, np.float32)
    for piece, start in zip(pieces, starts, strict=True):
        size, steps = min(len(piece), length - start), np.arange(len(piece), dtype=np.float32)
        ramp = np.minimum(steps + 1, len(piece) - steps)[:size]
        total[start : start + size] += (piece[:size].T * ramp).T
        weight[start : start + size] += ramp
    return (total.T / weight).T


def frames_to_notes(
    predictions: FramePredictions, onset_from: float = ONSET_FROM
) -> Performance | None:
    """The transcribed performance, in the time of the recording; None without notes.

    Notes start at peaks of at least ``onset_from`` of the regressed onset, with a resolution finer
    than a step (Kong et al. 2021, section III-E), and end when the key is released. Pedal events
    are changes of a pedal by 4 or more, or across the value 64.
    """
    times, held = predictions.times, predictions.frame
    step = float(times[1] - times[0]) if len(times) > 1 else 0.0
    padded = np.pad(predictions.onset, ((1, 1), (0, 0)))
    before, at, after = padded[:-2], padded[1:-1], padded[2:]
    steps, keys = np.nonzero((at >= onset_from) & (at >= before) & (at > after))
    if not len(steps):
        return None
    left, right, height = before[steps, keys], after[steps, keys], at[steps, keys]
    # For symmetric slopes the peak is this fraction of a step towards the higher neighbour.
    aside = 0.5 * (right - left) / np.maximum(height - np.minimum(left, right), 1e-6)
    notes = np.empty(len(steps), midi.NOTE)
    notes["onset"] = np.maximum(times[steps] + step * np.clip(aside, -0.5, 0.5), 0.0)

    # For every step, the next one in which the key is up. In the step of the onset itself the key
    # may not yet be detected as held.
    final = len(held) - 1
    up = np.where(held < HELD_FROM, np.arange(len(held))[:, None], final + 1)
    next_up = np.minimum.accumulate(up[::-1], axis=0)[::-1]
    last = np.maximum(next_up[np.minimum(steps + 1, final), keys] - 1, steps)
    notes["offset"] = np.maximum(times[last] + step / 2, notes["onset"] + step)
    notes["pitch"] = keys + LOWEST
    notes["velocity"] = np.clip(np.rint(127 * predictions.velocity[steps, keys]), 1, 127)

    notes["offset"] = np.minimum(notes["offset"], midi.next_onsets(notes, np.inf))
    notes = notes[np.lexsort((notes["pitch"], notes["onset"]))]

    events = []
    for number, curve in ((SUSTAIN, predictions.sustain), (UNA_CORDA, predictions.una_corda)):
        now = 0
        for k, value in enumerate(np.clip(np.rint(127 * curve), 0, 127).astype(int).tolist()):
            crossed = (value >= PEDAL_DOWN) != (now >= PEDAL_DOWN)
            if abs(value - now) >= _PEDAL_STEP or crossed:
                events.append((times[k], number, value))
                now = value
    pedals = np.array(events, midi.PEDAL)
    return Performance(notes, pedals[np.argsort(pedals["time"], kind="stable")])
