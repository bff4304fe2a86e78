"""Public-domain tunes as notes, for the built-in demo data.

Melodies are bars of ``pitch:beats`` (default one beat, R is a rest), with one or two chords per
bar. Every tune is traditional or by a composer who died before 1900.
"""

import re
from dataclasses import dataclass

import numpy as np

_STEPS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
_QUALITIES = {"": (0, 4, 7), "m": (0, 3, 7), "7": (0, 4, 10), "m7": (0, 3, 10)}
# Chord tones, start and duration, as shares of the chord's duration.
_PATTERNS = {
    "block": (((0, 1, 2), 0.0, 1.0),),
    "alberti": (((0,), 0.0, 0.25), ((2,), 0.25, 0.25), ((1,), 0.5, 0.25), ((2,), 0.75, 0.25)),
    "waltz": (((0,), 0.0, 1 / 3), ((1, 2), 1 / 3, 1 / 3), ((1, 2), 2 / 3, 1 / 3)),
    "arpeggio": tuple(((tone,), k / 6, 1 / 6) for k, tone in enumerate((0, 1, 2, 0, 2, 1))),
}


@dataclass(frozen=True)
class Tune:
    """A melody with chords. ``beats`` per bar, ``bpm`` of an average performance, ``minor`` for the
    simulated mood."""

    title: str
    composer: str
    beats: int
    bpm: float
    pattern: str
    minor: bool
    melody: str
    chords: str

    def notes(self) -> np.ndarray:
        """Rows (onset in beats, duration in beats, MIDI pitch, hand 1 = melody, 0 = accompaniment),
        by onset."""
        rows = self._melody() + self._accompaniment()
        return np.array(sorted(rows))

    def _melody(self) -> list[tuple]:
        rows, at = [], 0.0
        for token in self.melody.replace("|", " ").split():
            name, _, length = token.partition(":")
            beats = float(length or 1)
            if name != "R":
                rows.append((at, beats, _pitch(name), 1))
            at += beats
        return rows

    def _accompaniment(self) -> list[tuple]:
        rows = []
        for bar, names in enumerate(self.chords.split()):
            chords = names.split(",")
            span = self.beats / len(chords)
            for place, name in enumerate(chords):
                tones, start = _chord(name), bar * self.beats + place * span
                for which, offset, share in _PATTERNS[self.pattern]:
                    rows += [
                        (start + offset * span, share * span, tones[tone], 0) for tone in which
                    ]
        return rows


def _pitch(name: str) -> int:
    found = re.fullmatch(r"([A-G])([#b]?)(\d)", name)
    assert found, f"{name!r} is not a pitch"
    step, accidental, octave = found.groups()
    return 12 * (int(octave) + 1) + _STEPS[step] + {"": 0, "#": 1, "b": -1}[accidental]


def _chord(name: str) -> list[int]:
    found = re.fullmatch(r"([A-G][#b]?)(.*)", name)
    assert found, f"{name!r} is not a chord"
    root, quality = found.groups()
    bass = _pitch(root + "3")
    bass -= 12 if bass > 53 else 0
    return [bass + interval for interval in _QUALITIES[quality]]


# Rated tunes (in PercePiano's format): eight bars or sixteen short ones each.
RATED = (
    Tune(
        "Ode to Joy",
        "Ludwig van Beethoven",
        4,
        132,
        "alberti",
        False,
        "E5 E5 F5 G5 | G5 F5 E5 D5 | C5 C5 D5 E5 | E5:1.5 D5:.5 D5:2 | E5 E5 F5 G5 | G5 F5 E5 D5 |"
        " C5 C5 D5 E5 | D5:1.5 C5:.5 C5:2",
        "C G C G C G C,G G,C",
    ),
    Tune(
        "Ah vous dirai-je, maman",
        "traditional",
        4,
        132,
        "block",
        False,
        "C5 C5 G5 G5 | A5 A5 G5:2 | F5 F5 E5 E5 | D5 D5 C5:2 | G5 G5 F5 F5 | E5 E5 D5:2 | G5 G5 F5"
        " F5 | E5 E5 D5:2",
        "C F,C F,C G,C C,F C,G C,F C,G",
    ),
    Tune(
        "Minuet in G",
        "Christian Petzold",
        3,
        126,
        "waltz",
        False,
        "D5 G4:.5 A4:.5 B4:.5 C5:.5 | D5 G4 G4 | E5 C5:.5 D5:.5 E5:.5 F#5:.5 | G5 G4 G4 | C5 D5:.5"
        " C5:.5 B4:.5 A4:.5 | B4 C5:.5 B4:.5 A4:.5 G4:.5 | F#4 G4:.5 A4:.5 B4:.5 G4:.5 | A4:3",
        "G G C G Am G D7 D",
    ),
    Tune(
        "Für Elise",
        "Ludwig van Beethoven",
        3,
        138,
        "arpeggio",
        True,
        "E5:.5 D#5:.5 E5:.5 D#5:.5 E5:.5 B4:.5 | D5:.5 C5:.5 A4:2 | C4:.5 E4:.5 A4:.5 B4:1.5 |"
        " E4:.5 G#4:.5 B4:.5 C5:1.5 | E5:.5 D#5:.5 E5:.5 D#5:.5 E5:.5 B4:.5 | D5:.5 C5:.5 A4:2 |"
        " C4:.5 E4:.5 A4:.5 B4:1.5 | E4:.5 C5:.5 B4:.5 A4:1.5",
        "Am Am Am E Am Am Am E",
    ),
    Tune(
        "Greensleeves",
        "traditional",
        3,
        132,
        "waltz",
        True,
        "A4:2 C5 | D5:1.5 E5:.5 D5:1 | C5:2 A4 | F4:1.5 G4:.5 A4 | B4:2 G4 | E4:1.5 F#4:.5 G4 |"
        " A4:2 E4 | G#4:2 E4",
        "Am Dm F F G Em Am E",
    ),
    Tune(
        "Wiegenlied",
        "Johannes Brahms",
        3,
        92,
        "waltz",
        False,
        "E5:.5 E5:.5 G5:2 | E5:.5 E5:.5 G5:2 | E5:.5 G5:.5 C6 B5 | A5 A5 G5 | D5:.5 E5:.5 F5 D5 |"
        " D5:.5 E5:.5 F5:2 | D5:.5 F5:.5 B5:.5 A5:.5 G5 | B5 C6:2",
        "C C C F G G G C",
    ),
    Tune(
        "Frère Jacques",
        "traditional",
        4,
        126,
        "block",
        False,
        "F4 G4 A4 F4 | F4 G4 A4 F4 | A4 Bb4 C5:2 | A4 Bb4 C5:2 | C5:.5 D5:.5 C5:.5 Bb4:.5 A4 F4 | "
        "C5:.5 D5:.5 C5:.5 Bb4:.5 A4 F4 | F4 C4 F4:2 | F4 C4 F4:2",
        "F F F F F F F,C F,C",
    ),
    Tune(
        "Auld Lang Syne",
        "traditional",
        4,
        104,
        "alberti",
        False,
        "F4:1.5 F4:.5 F4 A4 | G4:1.5 F4:.5 G4 A4 | F4:1.5 F4:.5 A4 C5 | D5:3 D5 | C5:1.5 A4:.5 A4"
        " F4 | G4:1.5 F4:.5 G4 A4 | F4:1.5 D4:.5 D4 C4 | F4:4",
        "F C F Bb F C Bb,C F",
    ),
    Tune(
        "Amazing Grace",
        "traditional",
        3,
        92,
        "arpeggio",
        False,
        "G4:2 B4:.5 G4:.5 | B4:2 A4 | G4:2 E4 | D4:2 D4 | G4:2 B4:.5 G4:.5 | B4:2 A4 | D5:2 B4 |"
        " D5:3",
        "G G C G G Em D D",
    ),
    Tune(
        "Scarborough Fair",
        "traditional",
        3,
        120,
        "arpeggio",
        True,
        "D4:2 D4 | A4:2 A4 | E4:1.5 F4:.5 E4 | D4:3 | A4 C5:2 | D5 C5 A4 | B4 G4 A4 | A4:3",
        "Dm Dm C Dm F C G Dm",
    ),
    Tune(
        "La Folia",
        "traditional",
        3,
        100,
        "block",
        True,
        "D4 D4:1.5 E4:.5 | C#4:2 C#4 | D4 D4:1.5 E4:.5 | C4:2 C4 | F4 F4:1.5 G4:.5 | E4:2 E4 | D4"
        " D4:1.5 E4:.5 | C#4:3",
        "Dm A Dm C F C Dm A",
    ),
    Tune(
        "Moonlight",
        "Ludwig van Beethoven",
        4,
        84,
        "arpeggio",
        True,
        "G#4:3 G#4 | G#4:3 G#4 | A4:3 A4 | G#4:2 F#4 B4 | E4:3 G#4 | G#4:2 F#4:2 | E4:2 D#4:2 |"
        " C#4:4",
        "C#m C#m A D,B7 E B7 C#m,G# C#m",
    ),
    Tune(
        "Deck the Halls",
        "traditional",
        4,
        144,
        "alberti",
        False,
        "C5:1.5 Bb4:.5 A4 G4 | F4 G4 A4 F4 | G4:.5 A4:.5 Bb4:.5 G4:.5 A4:1.5 G4:.5 | F4 E4 F4:2 |"
        " C5:1.5 Bb4:.5 A4 G4 | F4 G4 A4 F4 | G4:.5 A4:.5 Bb4:.5 G4:.5 A4:1.5 G4:.5 | F4 E4 F4:2",
        "F F C,F C,F F F C,F C,F",
    ),
    Tune(
        "Clementine",
        "traditional",
        3,
        120,
        "waltz",
        False,
        "F4 F4 C4 | A4 A4 F4 | F4 A4 C5 | C5 Bb4 A4 | G4:2 G4 | A4 Bb4 Bb4 | A4 G4 A4 | F4:3",
        "F F F F C C F F",
    ),
    Tune(
        "Aura Lee",
        "George Poulton",
        4,
        96,
        "arpeggio",
        False,
        "G4 C5 B4 C5 | D5 A4 D5:2 | C5 B4 A4 B4 | C5:4 | G4 C5 B4 C5 | D5 A4 D5:2 | C5 B4 A4 B4 |"
        " C5:4",
        "C Dm G7 C C Dm G7 C",
    ),
    Tune(
        "Pavane",
        "traditional",
        4,
        88,
        "block",
        True,
        "G4:2 G4 F#4 | G4:2 A4:2 | Bb4 A4 G4 F4 | G4:2 D4:2 | Bb4:2 Bb4 A4 | Bb4:2 C5:2 | D5 C5 Bb4"
        " A4 | G4:4",
        "Gm Gm,D Gm,F Gm Gm Gm,F Gm,D Gm",
    ),
)

# Tunes for pre-training (in MAESTRO's format), without the rated ones.
UNRATED = (
    Tune(
        "Au clair de la lune",
        "traditional",
        4,
        126,
        "alberti",
        False,
        "C5 C5 C5 D5 | E5:2 D5:2 | C5 E5 D5 D5 | C5:4 | D5 D5 D5 D5 | A4:2 A4:2 | D5 C5 B4 A4 |"
        " G4:4",
        "C C,G C,G C G F G,D7 G",
    ),
    Tune(
        "Oh! Susanna",
        "Stephen Foster",
        4,
        150,
        "block",
        False,
        "C4:.5 D4:.5 E4 G4 G4:1 | A4 G4 E4:1.5 C4:.5 | D4 E4 E4 D4 | C4 D4:3 | C4:.5 D4:.5 E4 G4 G4"
        " | A4 G4 E4:1.5 C4:.5 | D4 E4 E4 D4 | D4 C4:3",
        "C F,C G G C F,C G C",
    ),
    Tune(
        "Yankee Doodle",
        "traditional",
        4,
        152,
        "alberti",
        False,
        "G4 G4 A4 B4 | G4 B4 A4 D4 | G4 G4 A4 B4 | G4:2 F#4:2 | G4 G4 A4 B4 | C5 B4 A4 G4 | F#4 D4"
        " E4 F#4 | G4:2 G4:2",
        "G D G D G C D G",
    ),
    Tune(
        "When the Saints",
        "traditional",
        4,
        132,
        "block",
        False,
        "R C4 E4 F4 | G4:4 | R C4 E4 F4 | G4:4 | R C4 E4 F4 | G4:2 E4:2 | C4:2 E4:2 | D4:4",
        "C C C C C C C G",
    ),
    Tune(
        "Alouette",
        "traditional",
        4,
        138,
        "alberti",
        False,
        "F4:1.5 G4:.5 A4 A4 | G4:.5 F4:.5 G4:.5 A4:.5 F4 C4 | F4:1.5 G4:.5 A4 A4 | G4:.5 F4:.5"
        " G4:.5 A4:.5 F4:2 | F4 F4 F4 C5 | C5 C5 C5:2 | C5:.5 D5:.5 C5:.5 Bb4:.5 A4:.5 G4:.5 F4 |"
        " C4 C5:3",
        "F C,F F C,F F F Bb,F C",
    ),
    Tune(
        "Canon",
        "Johann Pachelbel",
        4,
        88,
        "arpeggio",
        False,
        "F#5:2 E5:2 | D5:2 C#5:2 | B4:2 A4:2 | B4:2 C#5:2 | D5 F#5 A5 G5 | F#5 D5 F#5 E5 | D5 B4 D5"
        " A4 | G4 B4 A4 G4",
        "D,A Bm,F#m G,D G,A D,A Bm,F#m G,D G,A",
    ),
    Tune(
        "Sakura",
        "traditional",
        4,
        92,
        "block",
        True,
        "A4 A4 B4:2 | A4 A4 B4:2 | A4 B4 C5 B4 | A4 B4:.5 A4:.5 F4:2 | E4 C4 E4 F4 | E4 E4:.5 C4:.5"
        " B3:2 | A4 B4 C5 B4 | A4 B4:.5 A4:.5 F4:2",
        "Am Am Am F Am E Am F",
    ),
    Tune(
        "Swing Low",
        "traditional",
        4,
        92,
        "arpeggio",
        False,
        "A4:1.5 F4:.5 A4:.5 F4:1.5 | F4:.5 D4:.5 C4:3 | F4 F4:.5 F4:.5 A4 C5 | C5:1.5 D5:.5 C5:2 | "
        "D5:1.5 C5:.5 A4:.5 F4:1.5 | F4:.5 D4:.5 C4:3 | F4 F4:.5 F4:.5 A4:.5 G4:1.5 | F4:4",
        "F Bb,F F C Bb,F Bb,F C F",
    ),
    Tune(
        "Prelude in C",
        "Johann Sebastian Bach",
        4,
        72,
        "block",
        False,
        "G4:.5 C5:.5 E5:.5 G4:.5 C5:.5 E5:.5 G4:.5 C5:.5 | A4:.5 D5:.5 F5:.5 A4:.5 D5:.5 F5:.5"
        " A4:.5 D5:.5 | G4:.5 D5:.5 F5:.5 G4:.5 D5:.5 F5:.5 G4:.5 D5:.5 | G4:.5 C5:.5 E5:.5 G4:.5"
        " C5:.5 E5:.5 G4:.5 C5:.5 | A4:.5 E5:.5 A5:.5 A4:.5 E5:.5 A5:.5 A4:.5 E5:.5 | F#4:.5 A4:.5"
        " D5:.5 F#4:.5 A4:.5 D5:.5 F#4:.5 A4:.5 | G4:.5 D5:.5 G5:.5 G4:.5 D5:.5 G5:.5 G4:.5 D5:.5 |"
        " E4:.5 G4:.5 C5:.5 E4:.5 G4:.5 C5:.5 E4:.5 G4:.5",
        "C Dm G7 C Am D7 G C",
    ),
    Tune(
        "Bunessan",
        "traditional",
        3,
        112,
        "waltz",
        False,
        "C4 E4 G4 | C5:3 | D5:3 | B4 A4 G4 | A4 B4 A4 | G4:3 | C4 D4 E4 | G4:3",
        "C C G G F C Am G",
    ),
)
