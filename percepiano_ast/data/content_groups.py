"""Content groups: which segments share music, found in the MIDI of their deadpan renderings.

Segments of 16 bars hold ones of 8, movements repeat whole passages. Two segments are linked where the overlap coefficient
of their pitch 8-grams, shared ones over those of the smaller set, exceeds .3; connected segments form a group. The pitches
are those of the score rendering in order of onset, chords from the lowest note up.
"""

from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from percepiano_ast.config import InputError
from percepiano_ast.data import percepiano
from percepiano_ast.performance import Performance, read_midi

GRAM = 8
THRESHOLD = 0.3


def find_groups(folder: str | Path, index: pd.DataFrame) -> pd.Series:
    """Content group of each segment of the index, by the MIDI in ``folder`` (PercePiano's layout).

    A group is named by one of its segments. The first deadpan rendering of a segment, by name, stands for it.

    Raises:
        InputError: no MIDI folder, a segment without a deadpan rendering, a missing file, or one of fewer than 8 notes.
    """
    midi = percepiano.find_midi(folder)
    grams = {}
    for segment, clips in index.groupby("segment"):
        deadpan = sorted(clips["clip"][~clips["human"]])
        if not deadpan:
            raise InputError(
                f"segment {segment!r} has no deadpan rendering in the index, and players differ in their "
                "notes; add one, or write its content group by hand."
            )
        if deadpan[0] not in midi:
            raise InputError(f"no MIDI file {deadpan[0]}.mid in {folder}; fetch the data again.")
        grams[segment] = pitch_grams(read_midi(midi[deadpan[0]]))
        if not grams[segment]:
            raise InputError(f"{midi[deadpan[0]]} has fewer than {GRAM} notes; too few to find shared music by.")
    return connected(grams)


def pitch_grams(performance: Performance) -> set[tuple[int, ...]]:
    """Every run of 8 pitches; onsets within the same millisecond are a chord."""
    notes = performance.notes
    pitches = notes["pitch"][np.lexsort((notes["pitch"], np.round(notes["onset"], 3)))].tolist()
    return {tuple(pitches[first : first + GRAM]) for first in range(len(pitches) - GRAM + 1)}


def connected(grams: dict[str, set]) -> pd.Series:
    """Segment -> the segment that names its group: connected components of overlaps above ``THRESHOLD``."""
    leader = {segment: segment for segment in grams}

    def group(segment: str) -> str:
        while leader[segment] != segment:
            segment = leader[segment]
        return segment

    for one, other in combinations(grams, 2):
        shared = len(grams[one] & grams[other])
        if shared > THRESHOLD * min(len(grams[one]), len(grams[other])):
            leader[group(one)] = group(other)
    return pd.Series({segment: group(segment) for segment in grams}, name="content_group").rename_axis("segment")


def differences(found: pd.Series, index: pd.DataFrame) -> list[str]:
    """A sentence for each segment whose group in the index has other members than the one found; names do not matter."""
    stated = index.drop_duplicates("segment").set_index("segment")["content_group"]
    lines = []
    for segment in found.index:
        one, other = (set(groups.index[groups == groups[segment]]) for groups in (found, stated))
        if one != other:
            lines.append(
                f"segment {segment!r} shares music with {sorted(one - {segment})} by its MIDI, with "
                f"{sorted(other - {segment})} by the index"
            )
    return lines
