"""Piano performances: notes and pedals, read from and written to MIDI."""

import bisect
import collections
import io
from dataclasses import dataclass, replace
from pathlib import Path

import mido
import numpy as np

from percepiano_ast.errors import InputError

NOTE = np.dtype(
    [("onset", np.float64), ("offset", np.float64), ("pitch", np.uint8), ("velocity", np.uint8)]
)
PEDAL = np.dtype([("time", np.float64), ("number", np.uint8), ("value", np.uint8)])

SUSTAIN, SOSTENUTO, UNA_CORDA = 64, 66, 67
PEDALS = (SUSTAIN, SOSTENUTO, UNA_CORDA)
PEDAL_DOWN = 64  # value from which a pedal is down, as in the MIDI standard and FluidSynth

# seconds before the first onset of a trimmed performance: one window of silence before the attack
LEAD = 0.1
DRUM_CHANNEL = 9
_RESOLUTION = 1000  # ticks per quarter at 120 quarters per minute: half a millisecond
_LAST_TICK = 10_000_000  # several hours; a file with later events is damaged


@dataclass(frozen=True, eq=False)
class Performance:
    """Notes and pedals of one piano; times in seconds.

    Attributes:
        notes: of dtype ``NOTE``, sorted by onset, then pitch. Notes of one pitch never overlap: a
            note ends at the next onset of its key at the latest.
        pedals: of dtype ``PEDAL`` (controllers 64, 66 and 67, values 0 to 127), sorted by time.
        remarks: notes merged, shortened or ignored in reading; empty for a clean file.
    """

    notes: np.ndarray
    pedals: np.ndarray
    remarks: tuple[str, ...] = ()

    @property
    def duration(self) -> float:
        """Seconds from zero to the last key release."""
        return float(self.notes["offset"].max())

    def pedal(self, number: int) -> np.ndarray:
        """The events of one pedal."""
        return self.pedals[self.pedals["number"] == number]

    def pedal_at(self, number: int, times: np.ndarray) -> np.ndarray:
        """Value of a pedal, 0 to 127, at ``times``; 0 before its first event."""
        events = self.pedal(number)
        values = np.concatenate([[0.0], events["value"]])
        return values[np.searchsorted(events["time"], times, side="right")]


def read_midi(source: str | Path | bytes, name: str | None = None) -> Performance:
    """Read a Standard MIDI File (a path or bytes), with all tracks except drums merged into one
    piano.

    Tempo changes are those of the first track. Notes of zero length, notes that are never released
    and drums are ignored and counted in ``remarks``; pedals of channels without notes are ignored.

    Args:
        name: the file's name in messages; by default its path.

    Raises:
        InputError: missing, unreadable, or without piano notes of non-zero length.
    """
    name = name or ("MIDI bytes" if isinstance(source, bytes) else str(source))
    if not isinstance(source, bytes):
        if not Path(source).is_file():
            raise InputError(f"{name}: no such file. Check the path.")
        source = Path(source).read_bytes()
    try:
        rows, events, remarks = _parse(mido.MidiFile(file=io.BytesIO(source)))
    except Exception as error:  # parsers raise exceptions of any type: each means a damaged file
        reason = str(error) or type(error).__name__
        raise InputError(
            f"{name}: not a readable MIDI file ({reason}). Export or download it again."
        ) from error
    if not rows:
        why = f" ({'; '.join(remarks)})" if remarks else ""
        raise InputError(
            f"{name}: no piano notes in this MIDI file{why}. Give a file with at least one note."
        )

    # Simultaneous notes of one key are merged into the loudest.
    notes = np.array(rows, dtype=NOTE)
    notes = notes[np.lexsort((-notes["velocity"].astype(int), notes["onset"], notes["pitch"]))]
    first = np.ones(len(notes), dtype=bool)
    first[1:] = (np.diff(notes["pitch"].astype(int)) != 0) | (np.diff(notes["onset"]) != 0)
    merged = notes[first].copy()
    merged["offset"] = np.maximum.reduceat(notes["offset"], np.flatnonzero(first))
    if doubled := len(notes) - len(merged):
        remarks.append(f"{doubled} duplicate notes (same key, same onset) were merged")

    latest = next_onsets(merged, np.inf)
    if overlaps := np.sum(merged["offset"] > latest):
        remarks.append(f"{overlaps} notes were shortened to the next onset of the same key")
    merged["offset"] = np.minimum(merged["offset"], latest)

    pedals = np.array(events, dtype=PEDAL)
    return Performance(
        merged[np.lexsort((merged["pitch"], merged["onset"]))],
        pedals[np.argsort(pedals["time"], kind="stable")],
        tuple(remarks),
    )


def _parse(midi: mido.MidiFile) -> tuple[list[tuple], list[tuple], list[str]]:
    """Rows of ``NOTE`` and ``PEDAL`` in seconds, and remarks on what was ignored."""
    if midi.ticks_per_beat < 1:
        raise ValueError("its times are in SMPTE frames, not in beats")
    # Tempo: ticks and seconds at which it changes, and seconds per tick from there on
    ticks, begins, scales = [0], [0.0], [60.0 / (120.0 * midi.ticks_per_beat)]
    tick = 0
    for message in midi.tracks[0] if midi.tracks else ():
        tick += message.time
        if message.type == "set_tempo":
            scale = 60.0 / (6e7 / message.tempo * midi.ticks_per_beat)
            if tick == 0:
                scales[0] = scale
            elif scale != scales[-1]:
                begins.append(begins[-1] + scales[-1] * (tick - ticks[-1]))
                ticks.append(tick)
                scales.append(scale)

    def seconds(tick: int) -> float:
        k = bisect.bisect_right(ticks, tick) - 1
        return begins[k] + scales[k] * (tick - ticks[k])

    notes, pedals = [], []
    struck = drums = empty = elsewhere = 0
    for number, track in enumerate(midi.tracks):
        tick, played, events = 0, {}, collections.defaultdict(list)
        # By channel and key: (onset, velocity) of the notes that are down, and (onset, index) of
        # the first of them since the last release
        down: dict[tuple, list[tuple[int, int]]] = collections.defaultdict(list)
        first: dict[tuple, tuple[int, int]] = {}
        for message in track:
            tick += message.time
            if message.type == "control_change" and message.control in PEDALS:
                events[message.channel].append((tick, message.control, message.value))
            elif message.type == "set_tempo":
                elsewhere += number > 0
            if message.type not in ("note_on", "note_off"):
                continue
            key, is_drum = (message.channel, message.note), message.channel == DRUM_CHANNEL
            if message.type == "note_on" and message.velocity:
                first.setdefault(key, (tick, len(down[key])))
                down[key].append((tick, message.velocity))
                struck, drums = struck + 1, drums + is_drum
                continue
            onset, index = first.pop(key, (None, 0))
            if onset == tick:
                # 32 PercePiano files contain notes of zero length: ornaments of the score, keys
                # brushed by a player. They must not last until the next release of the key.
                del down[key][index]
                struck, drums, empty = struck - 1, drums - is_drum, empty + 1
                continue
            ended = [one for one in down[key] if one[0] != tick]
            down[key] = [one for one in down[key] if one[0] == tick and ended]
            if ended and not is_drum:
                played[message.channel] = True
                end = seconds(tick)
                notes += [(seconds(start), end, message.note, force) for start, force in ended]
        if tick >= _LAST_TICK:
            raise ValueError(f"its last tick is {tick:,}")
        for channel in played:
            pedals += [(seconds(at), *event) for at, *event in events[channel]]
    counts = {
        "notes of zero length": empty,
        "notes never released": struck - drums - len(notes),
        "notes of drums": drums,
        "tempo changes outside the first track": elsewhere,
    }
    return notes, pedals, [f"{n} {what} were ignored" for what, n in counts.items() if n]


def trimmed(performance: Performance) -> Performance:
    """The performance with its first onset at ``LEAD`` seconds and no events after the last key
    release (PercePiano's files have up to 1.6 s of leading and 15 s of trailing silence)."""
    shift = LEAD - performance.notes["onset"].min()
    notes, pedals = performance.notes.copy(), performance.pedals.copy()
    notes["onset"] += shift
    notes["offset"] += shift
    pedals["time"] += shift
    pedals = _from_zero(pedals[pedals["time"] <= notes["offset"].max()])
    return replace(performance, notes=notes, pedals=pedals)


def excerpt(performance: Performance, start: float, stop: float) -> Performance | None:
    """The notes with onsets from ``start`` to ``stop`` seconds, released at ``stop`` at the latest,
    and the pedals, with times relative to ``start``; None without onsets."""
    onset = performance.notes["onset"]
    if not len(notes := performance.notes[(onset >= start) & (onset < stop)]):
        return None
    notes["offset"] = np.minimum(notes["offset"], stop) - start
    notes["onset"] -= start
    pedals = performance.pedals[performance.pedals["time"] < stop]
    pedals["time"] -= start
    return Performance(notes, _from_zero(pedals))


def _from_zero(pedals: np.ndarray) -> np.ndarray:
    """Pedal events from time zero on, preceded by the state of each pedal at time zero."""
    before = pedals[pedals["time"] < 0]
    state = np.concatenate([before[before["number"] == number][-1:] for number in PEDALS])
    state["time"] = 0
    return np.concatenate([state, pedals[pedals["time"] >= 0]])


def note_name(pitch: int) -> str:
    """Name of a MIDI pitch: 60 is ``C4``, 61 ``C#4``."""
    octave, step = divmod(int(pitch), 12)
    return f"{'C C# D D# E F F# G G# A A# B'.split()[step]}{octave - 1}"


def next_onsets(notes: np.ndarray, otherwise: float) -> np.ndarray:
    """Seconds at which each note's key is struck next, (n_notes,); ``otherwise`` for the last."""
    order = np.lexsort((notes["onset"], notes["pitch"]))
    found = np.full(len(notes), otherwise)
    same = np.diff(notes["pitch"][order].astype(int)) == 0
    found[order[:-1][same]] = notes["onset"][order[1:][same]]
    return found


def damped(performance: Performance) -> np.ndarray:
    """Seconds at which each note's string is damped or struck again, (n_notes,).

    A string is damped at the key's release or, if the sustain pedal is down then, at the pedal's
    release; infinite without one.
    """
    notes, events = performance.notes, performance.pedal(SUSTAIN)
    holds = np.concatenate([[False], events["value"] >= PEDAL_DOWN])  # after each event
    # After event i the pedal is next up at event lifted[i] (or never).
    up = np.where(holds, len(holds), np.arange(len(holds)))
    lifted = np.minimum.accumulate(up[::-1])[::-1]
    when = np.concatenate([[-np.inf], events["time"], [np.inf]])
    # A pedal event at the time of the release counts as before it.
    after = np.searchsorted(events["time"], notes["offset"], side="right")
    end = np.maximum(notes["offset"], when[lifted[after]])
    return np.minimum(end, next_onsets(notes, np.inf))


def write_midi(performance: Performance, file: str | Path | io.BytesIO) -> None:
    """Write a Standard MIDI File with a resolution of half a millisecond; deterministic."""
    step = 0.5 / _RESOLUTION
    events = [(time, 0, number, value) for time, number, value in performance.pedals.tolist()]
    for onset, offset, pitch, velocity in performance.notes.tolist():
        events.append((onset, 1, pitch, velocity))
        # A note shorter than a tick would be written with zero length.
        events.append((max(offset, onset + step), 1, pitch, 0))
    # At one tick pedals come before notes, and the release of a key before its stroke.
    events = sorted((max(round(time / step), 0), *event) for time, *event in events)
    head = [mido.MetaMessage("set_tempo"), mido.MetaMessage("time_signature")]
    piano = [mido.MetaMessage("track_name", name="Piano"), mido.Message("program_change")]
    now = 0
    for tick, is_note, number, value in events:
        data = (
            {"note": number, "velocity": value} if is_note else {"control": number, "value": value}
        )
        kind = "note_on" if is_note else "control_change"
        piano.append(mido.Message(kind, **data, time=tick - now))
        now = tick
    midi = mido.MidiFile(ticks_per_beat=_RESOLUTION)
    for track in (head, piano):
        midi.tracks.append(mido.MidiTrack([*track, mido.MetaMessage("end_of_track", time=1)]))
    midi.save(**{"file" if isinstance(file, io.BytesIO) else "filename": file})
