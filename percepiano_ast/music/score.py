"""Scores from metronomic MIDI and MusicXML: notes in score time, metre, key, tempo."""

import io
import itertools
import zipfile
from dataclasses import dataclass
from pathlib import Path

import mido
import numpy as np

from percepiano_ast.errors import InputError
from percepiano_ast.music.midi import DRUM_CHANNEL

SCORE_NOTE = np.dtype(
    [("onset", "f8"), ("duration", "f8")]
    + [("pitch", "u1"), ("velocity", "u1"), ("staff", "u1"), ("grace", "?")]
)
MIDI, MUSICXML = (".mid", ".midi"), (".xml", ".musicxml", ".mxl")
_TOGETHER = 1 / 48  # quarters: closer onsets are simultaneous (triplets and 32nds are not)


@dataclass(frozen=True, eq=False)
class Score:
    """The contents of a score; times in quarter notes.

    Attributes:
        notes: of dtype ``SCORE_NOTE``, sorted by onset, then pitch; velocity from the file's
            dynamics; staves are numbered from 1, the upper one.
        metres: (onset, beats, quarters per beat) of each time signature; never empty.
        keys: (onset, sharps) of each key signature, flats negative; may be empty.
        tempi: (onset, quarters per minute) of each tempo; may be empty.
        remarks: omissions and assumptions made in reading.
    """

    notes: np.ndarray
    metres: tuple[tuple[float, int, float], ...]
    keys: tuple[tuple[float, int], ...]
    tempi: tuple[tuple[float, float], ...]
    remarks: tuple[str, ...] = ()

    def position(self, onsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bar (counted from the start of each metre) and beat in it (0 is the downbeat), floats."""
        starts, beats, unit = (np.array(column, float) for column in zip(*self.metres, strict=True))
        which = np.maximum(np.searchsorted(starts, onsets + _TOGETHER, side="right") - 1, 0)
        since = (onsets - starts[which]) / unit[which] + _TOGETHER / 2
        bar = np.floor(since / beats[which])
        lengths = np.diff(starts) / (beats * unit)[:-1]  # in bars
        before = np.concatenate([[0], np.cumsum(np.ceil(lengths - _TOGETHER))])
        return before[which] + bar, np.maximum(since - bar * beats[which] - _TOGETHER / 2, 0.0)

    @property
    def tempo(self) -> float | None:
        """Notated quarters per minute, mean over the score's duration; None if not notated."""
        if not self.tempi:
            return None
        at, speed = np.array(self.tempi).T
        first, last = self.notes["onset"][0], (self.notes["onset"] + self.notes["duration"]).max()
        ends = np.clip(np.append(at[1:], np.inf), first, last)
        spans = ends - np.clip(np.append(-np.inf, at[1:]), first, last)
        return float(spans.sum() / (spans / speed).sum())


def read_score(path: str | Path) -> Score:
    """Read a score; the file extension determines the format.

    Repeats are expanded (MIDI contains them already; music21 follows repeat signs, voltas, D.C. and
    D.S.).

    Raises:
        InputError: missing, of an unsupported format, damaged, or without notes.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such score. Check the path.")
    if path.suffix.lower() not in (*MIDI, *MUSICXML):
        raise InputError(
            f"{path}: {path.suffix or 'a file without extension'} is not a supported score format. "
            f"Export the score as MusicXML or MIDI ({', '.join((*MIDI, *MUSICXML))})."
        )
    reader = _read_midi if path.suffix.lower() in MIDI else _read_musicxml
    try:
        rows, metres, keys, tempi, remarks = reader(path)
    except ImportError as error:
        raise InputError(
            f'{path}: reading MusicXML needs music21. Run pip install "percepiano_ast[formats]", or'
            " give the score as MIDI."
        ) from error
    except Exception as error:  # parsers raise exceptions of any type: each means a damaged file
        reason = str(error) or type(error).__name__
        raise InputError(
            f"{path}: not a readable score ({reason:.200}). Export or download it again."
        ) from error
    if not rows:
        why = f" ({'; '.join(remarks)})" if remarks else ""
        raise InputError(f"{path}: no notes in this score{why}. Give the score of the performance.")
    # Each key at most once per onset: the longest note.
    notes = np.array(rows, dtype=SCORE_NOTE)
    notes = notes[np.lexsort((-notes["duration"], notes["grace"], notes["onset"], notes["pitch"]))]
    same = (np.diff(notes["onset"]) < 1e-6) & (np.diff(notes["pitch"].astype(int)) == 0)
    notes = notes[np.r_[True, ~same]]
    notes = notes[np.lexsort((notes["pitch"], notes["onset"]))]
    if same.any():
        remarks.append(f"{same.sum()} duplicate notes (same key, same onset) were merged")
    if not metres or metres[0][0] > notes["onset"][0] + _TOGETHER:
        metres = [(0.0, 4, 1.0), *metres]
        remarks.append("no time signature at the beginning: 4/4 is assumed")
    return Score(notes, _in_force(metres), _in_force(keys), _in_force(tempi), tuple(remarks))


def _in_force(entries: list[tuple]) -> tuple[tuple, ...]:
    """Changes of value in order of onset; of several entries at one onset the last."""
    at = {entry[0]: entry for entry in sorted(entries, key=lambda entry: entry[0])}
    return tuple(next(same) for _, same in itertools.groupby(at.values(), lambda entry: entry[1:]))


def _read_midi(path: Path) -> tuple[list, list, list, list, list]:
    """Rows of ``SCORE_NOTE``, metres, keys, tempi and remarks; each track with notes is a staff."""
    midi = mido.MidiFile(str(path))
    rows, metres, keys, tempi = [], [], [], []
    staff = empty = drums = unreleased = 0
    for track in midi.tracks:
        tick, found = 0, []
        down: dict[tuple[int, int], tuple[float, int]] = {}
        for message in track:
            tick += message.time
            at = tick / midi.ticks_per_beat
            if message.type == "time_signature":
                metres.append((at, message.numerator, 4 / message.denominator))
            elif message.type == "key_signature":  # in mido's notation: Eb, F#m
                name = message.key
                fifths = {"F": -1, "C": 0, "G": 1, "D": 2, "A": 3, "E": 4, "B": 5}[name[0]]
                shift = 7 * (name.count("#") - name.count("b")) - 3 * name.endswith("m")
                keys.append((at, fifths + shift))
            elif message.type == "set_tempo":
                tempi.append((at, mido.tempo2bpm(message.tempo)))
            elif message.type not in ("note_on", "note_off"):
                continue
            elif message.channel == DRUM_CHANNEL:
                drums += message.type == "note_on" and message.velocity > 0
            else:
                key = message.channel, message.note
                if key in down:  # released, or struck again
                    onset, velocity = down.pop(key)
                    if at > onset:
                        found.append((onset, at - onset, message.note, velocity))
                    else:  # MuseScore writes some ornaments this way
                        empty += 1
                if message.type == "note_on" and message.velocity:
                    down[key] = at, message.velocity
        staff += bool(found)
        unreleased += len(down)
        rows += [(*note, staff, False) for note in found]
    counts = {"of zero length": empty, "of drums": drums, "never released": unreleased}
    remarks = [f"{count} notes {what} were ignored" for what, count in counts.items() if count]
    return rows, metres, keys, tempi, remarks


def _read_musicxml(path: Path) -> tuple[list, list, list, list, list]:
    """The same from MusicXML by music21 (Cuthbert and Ariza 2010, ISMIR), which handles ties,
    tuplets, grace notes and transposition; each part, or each staff of a part, is a staff."""
    from music21 import converter, repeat, stream, tempo  # slow to import

    content = path.read_bytes()
    if path.suffix.lower() == ".mxl":
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = [name for name in archive.namelist() if name.endswith((".xml", ".musicxml"))]
            names = [name for name in names if not name.startswith(("META-INF", "__MACOSX"))]
            if not names:
                raise ValueError("no MusicXML document in the archive")
            content = archive.read(names[0])
    text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    written = converter.parseData(text, format="musicxml")
    if not isinstance(written, stream.Score):
        raise ValueError("not a single score")
    remarks = []
    parts = list(written.parts)
    if any(part.recurse().getElementsByClass(("RepeatMark", "Repeat")) for part in parts):
        try:
            parts = [part.expandRepeats() for part in parts]
            remarks.append("repeats are expanded as marked")
        except repeat.ExpanderException as error:
            raise ValueError(f"unmatched repeat signs: {error}") from error

    rows, ignored = [], 0
    for staff, part in enumerate(parts, 1):
        for note in part.toSoundingPitch().stripTies().flatten().notes:
            if "ChordSymbol" in note.classes or not note.pitches:
                ignored += 1
                continue
            onset, length = float(note.offset), float(note.duration.quarterLength)
            velocity, grace = round(127 * note.volume.getRealized()), note.duration.isGrace
            rows += [(onset, length, one.midi, velocity, staff, grace) for one in note.pitches]
    if ignored:
        remarks.append(f"{ignored} chord symbols and unpitched notes were ignored")

    first = parts[0].flatten() if parts else written.flatten()
    signatures = first.getElementsByClass("TimeSignature")
    metres = [(float(one.offset), one.numerator, 4 / one.denominator) for one in signatures]
    # A short first bar has a metre of its own, so that an upbeat does not shift the downbeats.
    bars = list(parts[0].getElementsByClass("Measure")) if parts else []
    if metres and len(bars) > 1:
        length, (at, beats, unit) = float(bars[1].offset - bars[0].offset), metres[0]
        if not at and 0 < length < beats * unit - 1e-6:
            metres[:1] = [(0.0, 1, length), (length, beats, unit)]
    keys = [(float(one.offset), one.sharps) for one in first.getElementsByClass("KeySignature")]
    tempi = [
        (float(one.offset), float(speed))
        for part in parts
        for one in part.flatten().getElementsByClass(tempo.MetronomeMark)
        if (speed := one.getQuarterBPM())
    ]
    return rows, metres, keys, tempi, remarks
