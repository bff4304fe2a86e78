"""Scores from metronomic MIDI and MusicXML: notes in score time, metre, key, tempo."""

import codecs
import contextlib
import io
import itertools
import operator
import re
import unicodedata
import urllib.parse
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from xml.parsers import expat

import mido
import numpy as np

from percepiano_ast.errors import InputError
from percepiano_ast.files import one_line
from percepiano_ast.music.midi import DRUM_CHANNEL, MOST_NOTES, WRAPPER_BYTES, parse_midi

SCORE_NOTE = np.dtype(
    [("onset", "f8"), ("duration", "f8")]
    + [("pitch", "u1"), ("velocity", "u1"), ("staff", "u2"), ("grace", "?")]
)
MIDI, MUSICXML = (".mid", ".midi"), (".xml", ".musicxml", ".mxl")
_TOGETHER = 1 / 48  # quarters: closer onsets are simultaneous (triplets and 32nds are not)
_EXPORT = f"Export the score as MusicXML or MIDI ({', '.join((*MIDI, *MUSICXML))})."

# Limits of what is read: a sonata has 20,000 notes, in 20 MB and 400,000 elements of MusicXML.
_MOST_BYTES, _MOST_ELEMENTS, _MOST_PARTS, _MOST_REPEATS = 50_000_000, 1_500_000, 255, 100
_DEEPEST, _MOST_ATTRIBUTES, _LONGEST_TEXT = 50, 100, 100_000
_MOST_BARS = 4_000  # of one part: music21's time grows with their square
# Range of numbers in elements: music21 counts up to some of them.
_LIMITS = {
    "staves": (1, 255),
    "octave": (-1, 9),
    "alter": (-4, 4),
    "divisions": (1e-6, 1e6),
    "duration": (0, 1e9),
    "fifths": (-40, 40),
    "beats": (1, 255),
    "beat-type": (1, 256),
    "actual-notes": (1, 1000),
    "normal-notes": (1, 1000),
    "chromatic": (-128, 128),
    "diatonic": (-128, 128),
    "octave-change": (-10, 10),
    "per-minute": (1e-3, 1e5),
    "multiple-rest": (0, 10_000),
}
_OTHER_FORMATS = {
    b"%PDF": "a PDF",
    b"\x1f\x8b": "a gzip archive",
    b"X:": "ABC notation",
    b"!!": "Humdrum",
    b"**": "Humdrum",
    b"\\version": "LilyPond",
    b"\x0fSIBELIUS": "a Sibelius file",
    b"ENIGMA BINARY FILE": "a Finale file",
    b"\x18FICHIER GUITAR PRO": "a Guitar Pro file",
}
_ROOTS = {
    "score-timewise": "a score-timewise document; only score-partwise is read",
    "opus": "an opus document, a list of scores",
    "museScore": "a MuseScore file",
    "mei": "an MEI file",
    "html": "a web page",
}


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
    """Read a score; its content determines the format, not the file extension.

    Repeats are expanded (MIDI contains them already; music21 follows repeat signs, voltas, D.C. and
    D.S.).

    Raises:
        InputError: missing, of an unsupported format, too large, damaged, or without notes.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such score. Check the path.")
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    start = content[:200].removeprefix(codecs.BOM_UTF8).lstrip()
    xml_or_zip = (b"<", b"\0<", codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, b"PK")
    try:
        if len(content) > _MOST_BYTES:
            raise InputError(f"more than {_MOST_BYTES / 1e6:g} MB. {_EXPORT}")
        if found := [name for begin, name in _OTHER_FORMATS.items() if start.startswith(begin)]:
            raise InputError(f"not a readable score: {found[0]}. {_EXPORT}")
        if start.startswith(xml_or_zip):
            rows, metres, keys, tempi, remarks = _read_musicxml(content)
        elif b"MThd" in content[:WRAPPER_BYTES]:
            rows, metres, keys, tempi, remarks = _read_midi(content)
        elif path.suffix.lower() in (*MIDI, *MUSICXML):
            raise ValueError("it is neither MIDI nor MusicXML")
        else:
            suffix = path.suffix or "a file without extension"
            raise InputError(f"{suffix} is not a supported score format. {_EXPORT}")
        if len(rows) > MOST_NOTES:
            raise InputError(f"more than {MOST_NOTES:,} notes. Give a part of it.")
    except ImportError as error:
        raise InputError(
            f'{path}: reading MusicXML needs music21. Run pip install "percepiano_ast[formats]", or'
            " give the score as MIDI."
        ) from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except Exception as error:  # parsers raise exceptions of any type: each means a damaged file
        raise InputError(
            f"{path}: not a readable score ({one_line(error)}). Export or download it again."
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


def _read_midi(content: bytes) -> tuple[list, list, list, list, list]:
    """Rows of ``SCORE_NOTE``, metres, keys, tempi and remarks; each track with notes is a staff."""
    events, _, division, repaired = parse_midi(content)
    if division < 0:
        raise InputError(f"its times are in SMPTE frames, not in beats. {_EXPORT}")
    rows, metres, keys, tempi = [], [], [], []
    staff = empty = drums = unreleased = 0
    events.sort(key=operator.attrgetter("track"))
    for _, track in itertools.groupby(events, operator.attrgetter("track")):
        found = []
        down: dict[tuple[int, int], tuple[float, int]] = {}
        for tick, _, kind, channel, number, value in track:
            at = tick / division
            if kind == "metre":
                metres.append((at, number, 4 / value))
            elif kind == "key":
                keys.append((at, number))
            elif kind == "tempo":
                tempi.append((at, mido.tempo2bpm(number)))
            elif kind != "note":
                continue
            elif channel == DRUM_CHANNEL:
                drums += value > 0
            else:
                key = channel, number
                if key in down:  # released, or struck again
                    onset, velocity = down.pop(key)
                    if at > onset:
                        found.append((onset, at - onset, number, velocity))
                    else:  # MuseScore writes some ornaments this way
                        empty += 1
                if value:
                    down[key] = at, value
        staff += bool(found)
        unreleased += len(down)
        rows += [(*note, staff, False) for note in found]
    counts = {"of zero length": empty, "of drums": drums, "never released": unreleased}
    remarks = [f"{count} notes {what} were ignored" for what, count in counts.items() if count]
    return rows, metres, keys, tempi, repaired + remarks


def _from_archive(content: bytes, remarks: list[str]) -> bytes:
    """The MusicXML document of an ``.mxl``: the one that META-INF/container.xml names, whatever its
    name, else the only one."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {one.filename: one for one in archive.infolist() if not one.is_dir()}

        def inflated(name: str, most: int) -> bytes:
            one = members[name]
            # zipfile inflates other methods without a limit
            if one.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{name} is not compressed by deflate")
            with archive.open(one) as file:
                document = file.read(most + 1)
            if len(document) > most:
                raise InputError(f"{name} has more than {most / 1e6:g} MB. {_EXPORT}")
            return document

        if any(name.lower().endswith(".mscx") for name in members):
            raise InputError(f"not a readable score: a MuseScore file. {_EXPORT}")
        named: list[str] = []
        folder = ""  # that was archived as a whole
        for name in members:
            if _plain(name).lower().endswith("meta-inf/container.xml"):
                folder = _plain(name)[: -len("meta-inf/container.xml")]
                parser = _safe_parser()

                def start(tag: str, attributes: dict[str, str]) -> None:
                    kind = attributes.get("media-type") or "xml"
                    if tag.split(":")[-1] == "rootfile" and "xml" in kind:
                        named.append(attributes.get("full-path", ""))

                parser.StartElementHandler = start
                parser.Parse(inflated(name, 1_000_000), True)
                break
        plain = {_plain(name): name for name in members}
        for name in (named[0], urllib.parse.unquote(named[0])) if named else ():
            if (member := plain.get(folder + _plain(name))) is not None:
                return inflated(member, _MOST_BYTES)
        documents = [
            name
            for name in members
            if name.lower().endswith((".xml", ".musicxml"))
            and not name.startswith((".", f"{folder}META-INF/", "__MACOSX/"))
            and "/." not in name
        ]
        lacking = f"its container names {named[0]}, which is missing" if named else "none is named"
        if len(documents) != 1:
            raise ValueError(f"{len(documents)} MusicXML documents in the archive, and {lacking}")
        if named:
            remarks.append(f"{lacking}: {documents[0]} is read")
        return inflated(documents[0], _MOST_BYTES)


def _plain(name: str) -> str:
    """One form of the names in an archive and in its container."""
    with contextlib.suppress(UnicodeError):
        # zipfile decodes names without the flag for UTF-8 as code page 437.
        name = name.encode("cp437").decode()
    name = unicodedata.normalize("NFC", name.replace("\\", "/"))
    return name.removeprefix("./").removeprefix("/")


def _decoded(content: bytes, remarks: list[str]) -> str:
    """An XML document in its declared encoding; expat knows few."""
    declared = re.match(rb"\s*<\?xml[^>]{,200}?\sencoding\s*=\s*[\"']([\w.:-]+)", content[:500])
    encoding = declared[1].decode("ascii", "replace").lower() if declared else "utf-8"
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    elif content.startswith((b"<\0", b"\0<")):
        encoding = "utf-16-le" if content[0] else "utf-16-be"
    elif content.startswith(codecs.BOM_UTF8) or encoding.startswith(("utf-16", "utf-8")):
        encoding = "utf-8"  # UTF-16 would not begin with ASCII
    try:
        if encoding in ("idna", "punycode", "undefined"):  # no encodings of documents, and slow
            raise LookupError
        text = content.decode(encoding, "replace")
    except (LookupError, UnicodeError) as error:
        raise InputError(f"its encoding {encoding} is unknown. {_EXPORT}") from error
    if wrong := text.count("\ufffd"):
        remarks.append(f"{wrong} characters that are not {encoding} were replaced")
    # Without the declaration, which would make the parser decode the text again.
    return re.sub(r"^\ufeff?\s*(<\?xml[^>]*\?>)?", "", text, count=1)


def _safe_parser() -> expat.XMLParserType:
    """A parser that refuses entities, which may expand without limit; expat does not load external
    ones."""

    def entity(name: str, *_) -> None:
        raise ValueError(f"it declares the entity {name}")

    parser = expat.ParserCreate("utf-8")
    parser.EntityDeclHandler = entity
    return parser


def _integers(text: str) -> list[int]:
    return [int(digits[:9]) for digits in re.findall(r"\d+", text[:1000])]


def _check_document(text: str) -> None:
    """Refuse other documents than scores, and those that would take music21 too long or too much
    memory."""
    depth = elements = parts = bars = work = size = since = highest = 0
    value: list[str] = []

    def start(tag: str, attributes: dict[str, str]) -> None:
        nonlocal depth, elements, parts, bars, work, size, since, highest
        if not depth and tag != "score-partwise":
            what = _ROOTS.get(tag, f"an XML document of type {tag:.40}")
            raise InputError(f"not a readable score: {what}. {_EXPORT}")
        depth, elements = depth + 1, elements + 1
        if depth > _DEEPEST or elements > _MOST_ELEMENTS or len(attributes) > _MOST_ATTRIBUTES:
            raise InputError(
                f"more than {_MOST_ELEMENTS:,} elements, {_DEEPEST} nested ones, or"
                f" {_MOST_ATTRIBUTES} attributes of one. {_EXPORT}"
            )
        value.clear()
        if tag == "part":
            since = 0
            parts, bars = parts + 1, 0
            if parts > _MOST_PARTS:
                raise InputError(f"more than {_MOST_PARTS} parts. Export that of the piano.")
        elif tag in ("note", "measure"):
            size, since = size + 1, since + 1
            bars += tag == "measure"
            work += bars if tag == "measure" else 0
        elif tag == "ending":
            highest = max([highest, *_integers(attributes.get("number", ""))])
        elif tag == "repeat" and attributes.get("direction") == "backward":
            highest = max([2, highest, *_integers(attributes.get("times", ""))])
            size += (highest - 1) * since
        if highest > _MOST_REPEATS:
            raise InputError(f"{highest:,} repeats, at most {_MOST_REPEATS} are read. {_EXPORT}")
        if tag == "repeat":
            since = highest = 0
        if size > MOST_NOTES or work > _MOST_BARS**2 / 2:
            raise InputError(
                f"more than {MOST_NOTES:,} notes with repeats, or {_MOST_BARS:,} bars. Give a part"
                " of it."
            )

    def end(tag: str) -> None:
        nonlocal depth
        depth -= 1
        content = "".join(value).strip()
        value.clear()
        if len(content) > (50 if tag in _LIMITS else _LONGEST_TEXT):
            raise ValueError(f"{tag:.40} has {len(content):,} characters")
        if tag in _LIMITS and re.fullmatch(
            r"[-+]?[.\d]+([eE][-+]?\d+)?|nan|inf", content
        ):  # not 3+2 beats
            low, high = _LIMITS[tag]
            if not low <= float(content) <= high:
                raise ValueError(f"{tag} is {content:.20}")

    parser = _safe_parser()
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.CharacterDataHandler = value.append
    parser.buffer_text = True
    parser.Parse(text.encode(), True)


def _read_musicxml(content: bytes) -> tuple[list, list, list, list, list]:
    """The same from MusicXML by music21 (Cuthbert and Ariza 2010, ISMIR), which handles ties,
    tuplets, grace notes and transposition; each part, or each staff of a part, is a staff."""
    remarks: list[str] = []
    if content.startswith(b"PK"):
        content = _from_archive(content, remarks)
    text = _decoded(content, remarks)
    _check_document(text)
    # music21 writes warnings to standard error.
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("always")
        found = _by_music21(text, remarks)
    if caught:
        first = " ".join(str(caught[0].message).split())
        remarks.append(f"music21 has {len(caught)} warnings: {first:.100}")
    return found


def _by_music21(text: str, remarks: list[str]) -> tuple[list, list, list, list, list]:
    from music21 import bar, converter, dynamics, repeat, stream, tempo  # slow to import
    from music21.note import NotRest

    written = converter.parseData(text, format="musicxml")
    if not isinstance(written, stream.Score):
        raise ValueError("not a single score")
    parts = list(written.parts)
    if any(part.recurse().getElementsByClass(("RepeatMark", "Repeat")) for part in parts):
        for part in parts:
            # music21 repeats from the beginning if no sign opens a repeat: exponentially many bars
            # for sections that only close. They begin after the previous end or bracket.
            opened, begin = True, None
            for measure in part.getElementsByClass("Measure"):
                begin, left, right = begin or measure, measure.leftBarline, measure.rightBarline
                bracketed = bool(measure.getSpannerSites("RepeatBracket"))
                opened |= isinstance(left, bar.Repeat) and left.direction == "start"
                closes = isinstance(right, bar.Repeat) and right.direction == "end"
                if closes and not opened and not bracketed:
                    begin.leftBarline = bar.Repeat("start")
                if closes or bracketed:
                    opened, begin = opened and not closes, None
        try:
            parts = [part.expandRepeats() for part in parts]
            remarks.append("repeats are expanded as marked")
        except repeat.ExpanderException as error:
            raise ValueError(f"unmatched repeat signs: {error}") from error

    first = parts[0].flatten() if parts else written.flatten()
    signatures = first.getElementsByClass("TimeSignature")
    metres = [(float(one.offset), one.numerator, 4 / one.denominator) for one in signatures]
    # A short first bar has a metre of its own, so that an upbeat does not shift the downbeats.
    bars = list(parts[0].getElementsByClass("Measure")) if parts else []
    if metres and len(bars) > 1:
        length, (at, beats, unit) = float(bars[1].offset - bars[0].offset), metres[0]
        if not at and 0 < length < beats * unit - 1e-6:
            metres[:1] = [(0.0, 1, length), (length, beats, unit)]
    signatures = first.getElementsByClass("KeySignature")
    keys = [(float(one.offset), one.sharps) for one in signatures if abs(one.sharps) <= 7]
    if dropped := len(signatures) - len(keys):
        remarks.append(f"{dropped} impossible key signatures were dropped")
    tempi = [
        (float(one.offset), float(speed))
        for part in parts
        for one in part.flatten().getElementsByClass(tempo.MetronomeMark)
        if (speed := one.getQuarterBPM())
    ]
    if dropped := sum(not 1 <= speed <= 1000 for _, speed in tempi):
        remarks.append(f"{dropped} impossible tempi were dropped")
        tempi = [(at, speed) for at, speed in tempi if 1 <= speed <= 1000]

    rows: list[tuple] = []
    ignored = 0
    for staff, part in enumerate(parts, 1):
        # In place: copies would take half of the time.
        part.toSoundingPitch(inPlace=True)
        part.stripTies(inPlace=True)
        dynamic: dynamics.Dynamic | bool = True
        # Passed on, because music21 would search the whole part for every note.
        for note in part.flatten():
            if isinstance(note, dynamics.Dynamic):
                dynamic = note
            if not isinstance(note, NotRest):
                continue
            pitches = [one.midi for one in note.pitches if 0 <= one.ps <= 127]
            if "ChordSymbol" in note.classes or not pitches:
                ignored += 1
                continue
            onset, length = float(note.offset), float(note.duration.quarterLength)
            velocity, grace = round(127 * note.volume.getRealized(dynamic)), note.duration.isGrace
            rows += [(onset, length, pitch, velocity, staff, grace) for pitch in pitches]
    if ignored:
        remarks.append(f"{ignored} chord symbols and unpitched notes were ignored")
    return rows, metres, keys, tempi, remarks
