"""Piano performances: notes and pedals, read from and written to MIDI."""

import bisect
import collections
import io
import itertools
import operator
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

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

# Limits of what is read: a recital of an hour has 30,000 notes in 0.5 MB.
MOST_NOTES, MOST_MIDI_BYTES, _MOST_HOURS = 50_000, 5_000_000, 4
WRAPPER_BYTES = 65_536  # before the header: RIFF (RMID), MacBinary, junk
_END_OF_TRACK = b"\xff\x2f\x00"
_SYSTEM = {0xF1: 1, 0xF2: 2, 0xF3: 1} | dict.fromkeys((0xF6, 0xF8, 0xFA, 0xFB, 0xFC, 0xFE), 0)
# Channel mode messages: all sound off, reset all controllers; all notes off and the later ones,
# which imply it
_SOUND_OFF, _RESET, _NOTES_OFF = 120, 121, 123


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


# --- Standard MIDI Files --------------------------------------------------------------------------


class MidiEvent(NamedTuple):
    """An event of a Standard MIDI File.

    Attributes:
        tick, track: absolute time, and the number of the track, from 0.
        kind: ``note``, ``control``, ``tempo``, ``metre`` or ``key``.
        channel: from 0; -1 for the last three kinds.
        number: key; controller; microseconds per quarter; beats; sharps (flats negative).
        value: velocity, 0 for a release; value of the controller; 0; denominator; 1 for minor.
    """

    tick: int
    track: int
    kind: str
    channel: int
    number: int
    value: int


class MidiContent(NamedTuple):
    """The events of a file by tick, then track; its format (0, 1 or 2); its division, in ticks per
    quarter, or negative for SMPTE: -256 times frames per second plus ticks per frame; and remarks
    on what was repaired or dropped."""

    events: list[MidiEvent]
    format: int
    division: int
    remarks: list[str]


def parse_midi(content: bytes) -> MidiContent:
    """The notes, pedals, channel mode messages, tempi, time and key signatures of a Standard MIDI
    File.

    Sequencers accept more than the standard allows. What is unambiguous is read, with a remark:
    bytes around the tracks (RIFF, MacBinary), a wrong length of a track, a missing or early end of
    track, velocities and values over 127, impossible tempi and signatures.

    Raises:
        InputError: too many notes.
        ValueError: cut off or damaged.
    """
    header = content.find(b"MThd", 0, WRAPPER_BYTES)
    if header < 0:
        raise ValueError("it has no MIDI header")
    if len(content) < header + 14:
        raise ValueError("it is cut off in its header")
    length, form, expected, division = struct.unpack_from(">IHHh", content, header + 4)
    if length < 6 or form > 2:
        raise ValueError(f"its header has {length} bytes and names format {form}")
    if not division:
        raise ValueError("its header names 0 ticks per quarter")

    events: list[MidiEvent] = []
    repaired: collections.Counter = collections.Counter()
    position, notes, tracks = header + 8 + length, 0, 0
    outside = header

    def variable() -> int:
        """A number of variable length at ``position``."""
        nonlocal position
        number = 0
        for _ in range(4):
            byte = content[position]
            position += 1
            number = number << 7 | byte & 127
            if byte < 128:
                return number
        raise ValueError("a time or length has more than four bytes")

    while (chunk := content.find(b"MTrk", position)) >= 0:
        if content.find(b"MThd", position, chunk) >= 0:  # another file behind this one
            break
        outside += chunk - position
        position = chunk + 8
        end = position + int.from_bytes(content[chunk + 4 : position])
        # The declared length is right if the track ends there; else its end of track counts.
        declared = end <= len(content) and (
            content[end - 3 : end] == _END_OF_TRACK or content[end : end + 4] in (b"", b"MTrk")
        )
        tick, status, ended = 0, 0, False
        try:
            while position < end if declared else not ended:
                tick += variable()
                byte = content[position]
                if byte >= 0x80:
                    position += 1
                    status = byte if byte < 0xF0 else status
                elif not status:
                    raise ValueError("data precede the first status byte")
                else:
                    byte = status
                if byte == 0xFF:
                    kind, position = content[position], position + 1
                    size = variable()
                    data, position = content[position : position + size], position + size
                    if kind == 0x51:
                        tempo = int.from_bytes(data)
                        if size == 3 and tempo:
                            events.append(MidiEvent(tick, tracks, "tempo", -1, tempo, 0))
                        else:
                            repaired["impossible tempi were dropped"] += 1
                    elif kind == 0x58:
                        if size >= 2 and data[0] and data[1] <= 7:
                            metre = data[0], 2 ** data[1]
                            events.append(MidiEvent(tick, tracks, "metre", -1, *metre))
                        else:
                            repaired["impossible time signatures were dropped"] += 1
                    elif kind == 0x59:
                        sharps = int.from_bytes(data[:1], signed=True)
                        if size >= 2 and -7 <= sharps <= 7 and data[1] <= 1:
                            events.append(MidiEvent(tick, tracks, "key", -1, sharps, data[1]))
                        else:
                            repaired["impossible key signatures were dropped"] += 1
                    elif kind == 0x2F:
                        early = declared and position < end
                        repaired["ends of a track before its last event were ignored"] += early
                        ended = True
                elif byte in (0xF0, 0xF7):
                    size = variable()
                    position += size
                elif byte >= 0xF0:
                    if byte not in _SYSTEM:
                        raise ValueError(f"it contains the undefined status byte {byte:#x}")
                    position += _SYSTEM[byte]
                else:
                    kind, channel = byte & 0xF0, byte & 0x0F
                    size = 1 if kind in (0xC0, 0xD0) else 2
                    number, value = content[position], content[position + size - 1]
                    position += size
                    if number > 127 and kind < 0xC0:
                        raise ValueError(f"it contains the key or controller number {number}")
                    if value > 127 or number > 127:
                        repaired["values over 127 were set to 127"] += 1
                        value = 127
                    if kind in (0x80, 0x90):
                        velocity = value if kind == 0x90 else 0
                        events.append(MidiEvent(tick, tracks, "note", channel, number, velocity))
                        if velocity and (notes := notes + 1) > MOST_NOTES:
                            raise InputError(f"more than {MOST_NOTES:,} notes. Give a part of it.")
                    elif kind == 0xB0 and (number in PEDALS or number >= _SOUND_OFF):
                        events.append(MidiEvent(tick, tracks, "control", channel, number, value))
        except IndexError:
            raise ValueError(f"it is cut off after {len(content):,} bytes") from None
        if position > len(content):
            raise ValueError(f"it is cut off after {len(content):,} bytes")
        if declared and position != end:
            raise ValueError("an event crosses the end of its track")
        repaired["wrong lengths of tracks were corrected"] += not declared
        repaired["missing ends of tracks were added"] += not ended
        tracks += 1
    if tracks < expected:
        raise ValueError(f"it is cut off: {tracks} of its {expected} tracks are there")
    behind = content.find(b"MThd", position)
    outside += (behind if behind >= 0 else len(content)) - position
    remarks = [f"{count} {what}" for what, count in repaired.items() if count]
    if outside:
        remarks.append(f"{outside:,} bytes outside its tracks were skipped")
    if behind >= 0:
        remarks.append(f"another MIDI file behind it was ignored ({len(content) - behind:,} bytes)")
    if tracks > expected:
        remarks.append(f"all of its {tracks} tracks were read; its header names {expected}")
    if form == 2 and len({event.track for event in events if event.kind == "note"}) > 1:
        remarks.append("the independent tracks of format 2 are taken to start together")
    events.sort(key=operator.attrgetter("tick"))
    tempi = [event for event in events if event.kind == "tempo"]
    clashes = sum(
        a.tick == b.tick and a.track != b.track and a.number != b.number
        for a, b in itertools.pairwise(tempi)
    )
    if clashes and form < 2:
        remarks.append(f"{clashes} tempi of one time differ between tracks: the last track's count")
    return MidiContent(events, form, division, remarks)


def _clock(division: int, tempi: Iterable[MidiEvent]) -> Callable[[int], float]:
    """Seconds at a tick. SMPTE frames are of constant length; 29 means 30000 / 1001 per second."""
    if division < 0:
        frames, per_frame = -(division >> 8), division & 255
        if frames not in (24, 25, 29, 30) or not per_frame:
            raise ValueError(f"its header names {frames} frames per second of {per_frame} ticks")
        per_second = per_frame * (30_000 / 1001 if frames == 29 else frames)
        return lambda tick: tick / per_second
    # ticks and seconds at which the tempo changes, and seconds per tick from there on
    ticks, begins, scales = [0], [0.0], [60.0 / (120.0 * division)]
    for event in tempi:
        scale = 60.0 / (6e7 / event.number * division)
        if event.tick == ticks[-1]:
            scales[-1] = scale
        elif scale != scales[-1]:
            begins.append(begins[-1] + scales[-1] * (event.tick - ticks[-1]))
            ticks.append(event.tick)
            scales.append(scale)

    def seconds(tick: int) -> float:
        k = bisect.bisect_right(ticks, tick) - 1
        return begins[k] + scales[k] * (tick - ticks[k])

    return seconds


def read_midi(source: str | Path | bytes, name: str | None = None) -> Performance:
    """Read a Standard MIDI File (a path or bytes), with all tracks and channels except drums merged
    into one piano.

    Tempo changes of any track count; in format 2 those of a note's own track, if it has any. SMPTE
    times are read as seconds. A pedal counts on whatever track or channel it is; where several
    channels have one, the highest of their values counts. All notes off and all sound off release
    the keys of their channel; all sound off and reset all controllers lift its pedals. Notes of
    zero length, notes that are never released and drums are ignored and counted in ``remarks``, as
    are the repairs of `parse_midi`.

    Args:
        name: the file's name in messages; by default its path.

    Raises:
        InputError: missing, unreadable, too large, or without piano notes of non-zero length.
    """
    name = name or ("MIDI bytes" if isinstance(source, bytes) else str(source))
    if not isinstance(source, bytes):
        if not Path(source).is_file():
            raise InputError(f"{name}: no such file. Check the path.")
        with Path(source).open("rb") as file:
            source = file.read(MOST_MIDI_BYTES + 1)
    if len(source) > MOST_MIDI_BYTES:
        raise InputError(
            f"{name}: more than {MOST_MIDI_BYTES / 1e6:g} MB, too large for the MIDI file of a"
            " performance. Check that it is one."
        )
    try:
        rows, events, remarks = _parse(parse_midi(source))
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    except ValueError as error:
        raise InputError(
            f"{name}: not a readable MIDI file ({error}). Export or download it again."
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

    order = np.lexsort((merged["pitch"], merged["onset"]))
    return Performance(merged[order], np.array(events, dtype=PEDAL), tuple(remarks))


def _parse(midi: MidiContent) -> tuple[list[tuple], list[tuple], list[str]]:
    """Rows of ``NOTE``, and of ``PEDAL`` by time, in seconds, and remarks on what was repaired or
    ignored."""
    tempi = [event for event in midi.events if event.kind == "tempo"]
    clock, own = _clock(midi.division, tempi), {}
    for track in {event.track for event in tempi} if midi.format == 2 else ():
        own[track] = _clock(midi.division, (event for event in tempi if event.track == track))
    timed = [
        (own.get(event.track, clock)(event.tick), event)
        for event in midi.events
        if event.kind in ("note", "control")
    ]
    # Mode messages come before what else is at their time: a reset at the beginning of a track must
    # not undo what another track has there.
    timed.sort(key=lambda one: (one[0], one[1].kind == "note" or one[1].number < _SOUND_OFF))
    if timed and timed[-1][0] > 3600 * _MOST_HOURS:
        seconds, last = timed[-1]
        raise ValueError(f"its last tick is {last.tick:,}, at {seconds / 3600:,.1f} hours")

    notes: list[tuple] = []
    struck = drums = empty = 0
    # By track, channel and key: (tick, onset, velocity) of the notes that are down, and (tick,
    # index) of the first of them since the last release
    down: dict[tuple, list[tuple[int, float, int]]] = collections.defaultdict(list)
    first: dict[tuple, tuple[int, int]] = {}
    # Events of each pedal by channel: (index in time, value)
    moved: dict[int, dict[int, list[tuple[int, int]]]] = {number: {} for number in PEDALS}

    for index, (now, (tick, track, kind, channel, number, value)) in enumerate(timed):
        key, is_drum = (track, channel, number), channel == DRUM_CHANNEL
        if kind == "control":
            if number >= _NOTES_OFF or number == _SOUND_OFF:
                for one in [one for one in down if one[1] == channel]:
                    first.pop(one, None)
                    held = down.pop(one)
                    if not is_drum:
                        notes += [(onset, now, one[2], force) for _, onset, force in held]
            if number in PEDALS and not is_drum:
                moved[number].setdefault(channel, []).append((index, value))
            elif number in (_SOUND_OFF, _RESET):
                for by_channel in moved.values():
                    if (its := by_channel.get(channel)) and its[-1][1]:
                        its.append((index, 0))
        elif value:
            first.setdefault(key, (tick, len(down[key])))
            down[key].append((tick, now, value))
            struck, drums = struck + 1, drums + is_drum
        else:
            start, which = first.pop(key, (None, 0))
            if start == tick:
                # 32 PercePiano files contain notes of zero length: ornaments of the score, keys
                # brushed by a player. They must not last until the next release of the key.
                del down[key][which]
                struck, drums, empty = struck - 1, drums - is_drum, empty + 1
                continue
            held = down.pop(key, [])
            ended = [one for one in held if one[0] != tick]
            if ended and len(ended) < len(held):
                down[key] = held[len(ended) :]
            if not is_drum:
                notes += [(onset, now, number, force) for _, onset, force in ended]
    counts = {
        "notes of zero length": empty,
        "notes never released": struck - drums - len(notes),
        "notes of drums": drums,
    }
    remarks = [f"{n} {what} were ignored" for what, n in counts.items() if n]
    changes: list[tuple[int, int, int]] = []
    for number, by_channel in moved.items():
        # The same values on several channels, as a Disklavier writes, count once.
        every = {
            tuple((timed[i][0], value) for i, value in one): one for one in by_channel.values()
        }
        used = [one for one in every.values() if any(value for _, value in one)]
        used = used or [*every.values()][:1]
        if len(used) <= 1:
            changes += [(i, number, value) for one in used for i, value in one]
            continue
        remarks.append(
            f"pedals (controller {number}) of {len(used)} channels were combined: the highest"
            " value counts"
        )
        values, highest = [0] * len(used), 0
        for i, which, value in sorted((i, j, v) for j, one in enumerate(used) for i, v in one):
            values[which] = value
            if max(values) != highest:
                highest = max(values)
                changes.append((i, number, highest))
    pedals = [(timed[i][0], number, value) for i, number, value in sorted(changes)]
    return notes, pedals, [*midi.remarks, *remarks]


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
