"""Content groups: segments that share music, computed from the MIDI of their deadpan renderings.

Segments of 16 bars contain segments of 8 bars, and movements repeat whole passages. Two segments
are linked if the overlap coefficient of their pitch 8-grams (shared n-grams divided by the size of
the smaller set) exceeds 0.3. Connected segments form a group. Pitches are those of the deadpan
rendering in order of onset, chords from the lowest note up.
"""

from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from percepiano_ast.data import percepiano
from percepiano_ast.errors import InputError
from percepiano_ast.music.midi import Performance, read_midi

GRAM = 8
THRESHOLD = 0.3


def find_groups(folder: str | Path, index: pd.DataFrame) -> pd.Series:
    """Content group of each segment of the index, from the MIDI in ``folder`` (PercePiano's
    layout).

    A group is named after one of its segments. Each segment is represented by its first deadpan
    rendering by name.

    Raises:
        InputError: no MIDI folder, a segment without a deadpan rendering, a missing file, or one of
            fewer than 8 notes.
    """
    midi = percepiano.find_midi(folder)
    grams = {}
    for segment, clips in index.groupby("segment"):
        deadpan = sorted(clips["clip"][~clips["human"]])
        if not deadpan:
            raise InputError(
                f"segment {segment!r} has no deadpan rendering in the index, and the notes of human"
                " performances differ. Add one, or write its content group by hand."
            )
        if deadpan[0] not in midi:
            raise InputError(f"no MIDI file {deadpan[0]}.mid in {folder}. Download the data again.")
        grams[segment] = pitch_grams(read_midi(midi[deadpan[0]]))
        if not grams[segment]:
            raise InputError(
                f"{midi[deadpan[0]]} has fewer than {GRAM} notes, too few to detect shared music."
                " Write its content group by hand."
            )
    return connected(grams)


def pitch_grams(performance: Performance) -> set[tuple[int, ...]]:
    """Every sequence of 8 pitches; onsets within the same millisecond form a chord."""
    notes = performance.notes
    pitches = notes["pitch"][np.lexsort((notes["pitch"], np.round(notes["onset"], 3)))].tolist()
    return {tuple(pitches[first : first + GRAM]) for first in range(len(pitches) - GRAM + 1)}


def connected(grams: dict[str, set]) -> pd.Series:
    """Segment -> the segment its group is named after: connected components of overlaps above
    ``THRESHOLD``."""
    leader = {segment: segment for segment in grams}

    def group(segment: str) -> str:
        while leader[segment] != segment:
            segment = leader[segment]
        return segment

    for one, other in combinations(grams, 2):
        shared = len(grams[one] & grams[other])
        if shared > THRESHOLD * min(len(grams[one]), len(grams[other])):
            leader[group(one)] = group(other)
    return pd.Series(
        {segment: group(segment) for segment in grams}, name="content_group"
    ).rename_axis("segment")


def differences(found: pd.Series, index: pd.DataFrame) -> list[str]:
    """A sentence for each segment whose computed group differs from the index in its members; group
    names are ignored."""
    stated = index.drop_duplicates("segment").set_index("segment")["content_group"]
    lines = []
    for segment in found.index:
        one, other = (set(groups.index[groups == groups[segment]]) for groups in (found, stated))
        if one != other:
            lines.append(
                f"segment {segment!r} shares music with {sorted(one - {segment})} according to its"
                f" MIDI, with {sorted(other - {segment})} according to the index"
            )
    return lines
