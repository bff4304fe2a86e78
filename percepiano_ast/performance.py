"""Piano performances: notes and pedals, read from and written to MIDI.

Times are in seconds, pitches and controllers are MIDI numbers. A piano key is either up or down, so
notes of one pitch never overlap: if a key is struck again while down, the earlier note ends at the
new onset.
"""

import contextlib
import io
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import mido
import numpy as np

from percepiano_ast.errors import InputError

# pretty_midi imports pyfluidsynth if installed, which prints the path of its library; standard
# output is reserved for results.
with contextlib.redirect_stdout(None):
    import pretty_midi

NOTE = np.dtype(
    [("onset", np.float64), ("offset", np.float64), ("pitch", np.uint8), ("velocity", np.uint8)]
)
PEDAL = np.dtype([("time", np.float64), ("number", np.uint8), ("value", np.uint8)])

SUSTAIN, SOSTENUTO, UNA_CORDA = 64, 66, 67
PEDALS = (SUSTAIN, SOSTENUTO, UNA_CORDA)

# seconds before the first onset of a trimmed performance: one window of silence before the attack
LEAD = 0.1
_DRUM_CHANNEL = 9
_RESOLUTION = 1000  # ticks per quarter at 120 quarters per minute: half a millisecond


@dataclass(frozen=True, eq=False)
class Performance:
    """Notes and pedals of one piano.

    Attributes:
        notes: structured array of dtype ``NOTE``, sorted by onset, then pitch.
        pedals: structured array of dtype ``PEDAL`` (controllers 64, 66 and 67, values 0 to 127),
            sorted by time.
        remarks: notes merged, shortened or ignored in reading; empty for a clean file.
    """

    notes: np.ndarray
    pedals: np.ndarray
    remarks: tuple[str, ...] = ()

    @property
    def duration(self) -> float:
        """Seconds from zero to the last key release."""
        return float(self.notes["offset"].max())


def read_midi(source: str | Path | bytes, name: str | None = None) -> Performance:
    """Read the notes and pedals of a Standard MIDI File, with all tracks except drums merged into
    one piano.

    Notes of zero length, notes that are never released and drums are ignored and counted in
    ``remarks``.

    Args:
        source: path, or the file's bytes.
        name: the file's name in messages; by default its path.

    Raises:
        InputError: missing, unreadable, or without piano notes of non-zero length.
    """
    name = name or ("MIDI bytes" if isinstance(source, bytes) else str(source))
    midi, remarks = _parse(source, name)
    piano = [instrument for instrument in midi.instruments if not instrument.is_drum]
    notes = np.array(
        [
            (note.start, note.end, note.pitch, note.velocity)
            for track in piano
            for note in track.notes
        ],
        dtype=NOTE,
    )
    if not len(notes):
        why = f" ({'; '.join(remarks)})" if remarks else ""
        raise InputError(
            f"{name}: no piano notes in this MIDI file{why}. Give a file with at least one note."
        )
    notes, changes = _one_note_per_key(notes)
    controls = [
        change for track in piano for change in track.control_changes if change.number in PEDALS
    ]
    pedals = np.array(
        [(change.time, change.number, change.value) for change in controls], dtype=PEDAL
    )
    return Performance(
        notes, pedals[np.argsort(pedals["time"], kind="stable")], tuple(remarks + changes)
    )


def _parse(source, name: str) -> tuple[pretty_midi.PrettyMIDI, list[str]]:
    """The parsed file and remarks on it (pretty_midi's warnings, ignored notes)."""
    if not isinstance(source, bytes):
        if not Path(source).is_file():
            raise InputError(f"{name}: no such file. Check the path.")
        source = Path(source).read_bytes()
    try:
        midi = mido.MidiFile(file=io.BytesIO(source))
        empty = sum(_drop_empty_notes(track) for track in midi.tracks)
        strokes = [m for track in midi.tracks for m in track if m.type == "note_on" and m.velocity]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            parsed = pretty_midi.PrettyMIDI(mido_object=midi)
    except Exception as error:  # parsers raise exceptions of any type: each means a damaged file
        reason = str(error) or type(error).__name__
        raise InputError(
            f"{name}: not a readable MIDI file ({reason}). Export or download it again."
        ) from error
    drums = sum(message.channel == _DRUM_CHANNEL for message in strokes)
    read = sum(len(track.notes) for track in parsed.instruments if not track.is_drum)
    counts = {
        "of zero length were ignored": empty,
        "never released were ignored": len(strokes) - drums - read,
        "of drums were ignored": drums,
    }
    remarks = [str(warning.message) for warning in caught]
    return parsed, remarks + [f"{count} notes {what}" for what, count in counts.items() if count]


def _drop_empty_notes(track: mido.MidiTrack) -> int:
    """Remove notes that are released at the tick of their onset from ``track``, in place; return
    their number.

    32 PercePiano files contain such notes (ornaments of the score, keys brushed by a player).
    pretty_midi would wrongly extend them to the next release of the key.
    """
    tick, dropped = 0, set()
    down: dict[tuple[int, int], tuple[int, int]] = {}
    for i, message in enumerate(track):
        tick += message.time
        if message.type not in ("note_on", "note_off"):
            continue
        key = (message.channel, message.note)
        if message.type == "note_on" and message.velocity:
            # of two onsets, a release at this tick belongs to the earlier
            down.setdefault(key, (tick, i))
        else:
            struck, at = down.pop(key, (None, None))
            if struck == tick:
                dropped |= {at, i}
    if not dropped:
        return 0
    delay, kept = 0, []
    for i, message in enumerate(track):
        delay += message.time
        if i not in dropped:
            kept.append(message.copy(time=delay))
            delay = 0
    track[:] = kept
    return len(dropped) // 2


def _one_note_per_key(notes: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Merge simultaneous notes of one key (the louder is kept); end a note at the next onset of its
    key."""
    notes = notes[np.lexsort((-notes["velocity"].astype(int), notes["onset"], notes["pitch"]))]
    first = np.ones(len(notes), dtype=bool)
    first[1:] = (np.diff(notes["pitch"].astype(int)) != 0) | (np.diff(notes["onset"]) != 0)
    merged = notes[first].copy()
    merged["offset"] = np.maximum.reduceat(notes["offset"], np.flatnonzero(first))
    overlaps = (merged["pitch"][1:] == merged["pitch"][:-1]) & (
        merged["offset"][:-1] > merged["onset"][1:]
    )
    merged["offset"][:-1][overlaps] = merged["onset"][1:][overlaps]
    changes = []
    if len(merged) < len(notes):
        changes.append(
            f"{len(notes) - len(merged)} duplicate notes (same key, same onset) were merged"
        )
    if overlaps.any():
        changes.append(
            f"{int(overlaps.sum())} notes were shortened to the next onset of the same key"
        )
    return merged[np.lexsort((merged["pitch"], merged["onset"]))], changes


def trimmed(performance: Performance) -> Performance:
    """The performance with its first onset at ``LEAD`` seconds and no events after the last key
    release.

    Raw PercePiano files have up to 1.6 s of leading and 15 s of trailing silence. Pedal events
    before time zero are replaced by their final state at time zero.
    """
    shift = LEAD - performance.notes["onset"].min()
    notes, pedals = performance.notes.copy(), performance.pedals.copy()
    notes["onset"] += shift
    notes["offset"] += shift
    pedals["time"] += shift
    before = pedals[pedals["time"] < 0]
    state = np.concatenate([before[before["number"] == number][-1:] for number in PEDALS])
    state["time"] = 0
    inside = pedals[(pedals["time"] >= 0) & (pedals["time"] <= notes["offset"].max())]
    return replace(performance, notes=notes, pedals=np.concatenate([state, inside]))


def write_midi(performance: Performance, file: str | Path | io.BytesIO) -> None:
    """Write a Standard MIDI File with a resolution of half a millisecond; the output is
    deterministic."""
    tick = 0.5 / _RESOLUTION
    piano = pretty_midi.Instrument(program=0, name="Piano")
    for onset, offset, pitch, velocity in performance.notes.tolist():
        # A note shorter than a tick would be written with zero length.
        piano.notes.append(pretty_midi.Note(velocity, pitch, onset, max(offset, onset + tick)))
    for time, number, value in performance.pedals.tolist():
        piano.control_changes.append(pretty_midi.ControlChange(number, value, time))
    midi = pretty_midi.PrettyMIDI(resolution=_RESOLUTION, initial_tempo=120)
    midi.instruments.append(piano)
    midi.write(file if isinstance(file, io.BytesIO) else str(file))
