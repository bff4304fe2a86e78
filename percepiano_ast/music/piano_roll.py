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
# Detection thresholds of outputs between 0 and 1: of the regressed onset and offset (Kong et al.),
# and of keys and strings.
ONSET_FROM, OFFSET_FROM, HELD_FROM = 0.3, 0.3, 0.5
_PEDAL_STEP = 4  # controller values: smaller changes are treated as noise


class FrameTargets(NamedTuple):
    """Targets of T frames; columns are the piano's keys from A0 up.

    Row t describes the performance at the centre of row t of the log-mel spectrogram.

    Attributes:
        onset: float16 (T, 88), in the frame whose centre is nearest to the onset: its distance
            from that centre in frames, -0.5 to 0.5; NaN elsewhere.
        offset: float16 (T, 88), the same for the release of the key.
        frame: Bool (T, 88), the key is held.
        sustained: Bool (T, 88), key or sustain pedal keeps the damper off the struck string.
        velocity: float32 (T, 88), MIDI velocity / 127 at onsets, else 0.
        sustain: float32 (T,), controller 64 / 127.
        una_corda: float32 (T,), controller 67 / 127.
    """

    onset: np.ndarray
    offset: np.ndarray
    frame: np.ndarray
    sustained: np.ndarray
    velocity: np.ndarray
    sustain: np.ndarray
    una_corda: np.ndarray


class FramePredictions(NamedTuple):
    """Predictions of the fields of `FrameTargets` for S steps, all float from 0 to 1, and
    ``times``, seconds at the middle of each step, (S,), evenly spaced."""

    onset: np.ndarray
    offset: np.ndarray
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

        def nearest(seconds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            """Frames whose centres are nearest to the given times, int32, and the distances of the
            times from these centres in frames."""
            samples = seconds[on_piano] * front_end.sample_rate - _first_centre(front_end)
            exact = np.minimum(samples / front_end.hop_length, 2**30)
            return np.rint(exact).astype(np.int32), exact - np.rint(exact)

        self._key = notes["pitch"][on_piano].astype(np.int32) - LOWEST
        self._velocity = notes["velocity"][on_piano] / np.float32(127)
        self._onset, self._onset_aside = nearest(notes["onset"])
        release, self._release_aside = nearest(notes["offset"])
        self._release = np.maximum(release, self._onset + 1)  # each lasts at least one frame
        self._silent = np.maximum(nearest(midi.damped(performance))[0], self._release)
        self._performance = performance

    def frames(self, start: int, n_frames: int) -> FrameTargets:
        """See `frame_targets`."""
        shape = (n_frames, N_KEYS)
        frame, sustained = (np.zeros(shape, bool) for _ in range(2))
        onset, offset = (np.full(shape, np.nan, np.float16) for _ in range(2))
        velocity = np.zeros(shape, np.float32)
        near = np.flatnonzero((self._onset < start + n_frames) & (self._silent > start))
        times = (self._onset, self._release, self._silent)
        columns = self._key[near], *(np.maximum(at[near] - start, 0) for at in times)
        for key, begin, up, end in zip(*(column.tolist() for column in columns), strict=True):
            frame[begin:up, key] = True
            sustained[begin:end, key] = True
        struck = near[self._onset[near] >= start]
        place = (self._onset[struck] - start, self._key[struck])
        onset[place] = self._onset_aside[struck]
        velocity[place] = self._velocity[struck]
        released = near[(self._release[near] >= start) & (self._release[near] < start + n_frames)]
        place = (self._release[released] - start, self._key[released])
        offset[place] = self._release_aside[released]
        at = frame_times(start, n_frames, self.front_end)
        pedals = (
            self._performance.pedal_at(number, at).astype(np.float32) / np.float32(127)
            for number in (SUSTAIN, UNA_CORDA)
        )
        return FrameTargets(onset, offset, frame, sustained, velocity, *pedals)


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
    than a step (Kong et al. 2021, section III-E), and end when the key is released: at the peak of
    the regressed offset within a step or two of the end of the held key, if any. Pedal events are
    changes of a pedal by 4 or more, or across the value 64.
    """

    def peaks(curve: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Steps and keys of local maxima of at least ``least``, and their distance from the middle
        of the step in steps: for symmetric slopes, that towards the higher neighbour."""
        padded = np.pad(curve, ((1, 1), (0, 0)))
        before, at, after = padded[:-2], padded[1:-1], padded[2:]
        steps, keys = np.nonzero((at >= least) & (at >= before) & (at > after))
        left, right, height = before[steps, keys], after[steps, keys], at[steps, keys]
        aside = 0.5 * (right - left) / np.maximum(height - np.minimum(left, right), 1e-6)
        return steps, keys, np.clip(aside, -0.5, 0.5)

    times, held = predictions.times, predictions.frame
    step = float(times[1] - times[0]) if len(times) > 1 else 0.0
    steps, keys, aside = peaks(predictions.onset, onset_from)
    if not len(steps):
        return None
    notes = np.empty(len(steps), midi.NOTE)
    notes["onset"] = np.maximum(times[steps] + step * aside, 0.0)

    # For every step, the next one in which the key is up. In the step of the onset itself the key
    # may not yet be detected as held.
    final = len(held) - 1
    up = np.where(held < HELD_FROM, np.arange(len(held))[:, None], final + 1)
    next_up = np.minimum.accumulate(up[::-1], axis=0)[::-1]
    last = np.maximum(next_up[np.minimum(steps + 1, final), keys] - 1, steps)
    ends = times[last] + step / 2
    released, released_keys, released_aside = peaks(predictions.offset, OFFSET_FROM)
    exact = np.full(held.shape, np.nan)
    exact[released, released_keys] = times[released] + step * released_aside
    # the key is up from ``last + 1`` on; nearer peaks overwrite farther ones
    for shift in (-1, 2, 0, 1):
        at = np.minimum(last + shift, final)
        found = exact[at, keys]
        ends = np.where(np.isnan(found) | (at <= steps), ends, found)
    notes["offset"] = np.maximum(ends, notes["onset"] + step)
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
