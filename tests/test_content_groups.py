"""Content groups, segments that share music, computed from the MIDI of their deadpan renderings.
The shipped index holds the result.

``python tests/test_content_groups.py FOLDER`` prints them as CSV for PercePiano's folder, or one
with its layout and an ``index.csv``; ``--check`` compares them with the index.

Segments of 16 bars contain segments of 8 bars, and movements repeat whole passages. Two segments
are linked if the overlap coefficient of their pitch 8-grams (shared n-grams divided by the size of
the smaller set) exceeds 0.3. Connected segments form a group. Pitches are those of the deadpan
rendering in order of onset, chords from the lowest note up. Cost: 3 s.
"""

import argparse
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from percepiano_ast.data import percepiano
from percepiano_ast.errors import InputError, exit_code
from percepiano_ast.evaluation import predictions
from percepiano_ast.music.midi import NOTE, PEDAL, Performance, read_midi, write_midi

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


def main(arguments: list[str] | None = None) -> int:
    """Print or check the content groups of a folder; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "folder", help="PercePiano's folder, or one with its layout and an index.csv"
    )
    parser.add_argument(
        "--check", action="store_true", help="compare with the index instead of printing"
    )
    given = parser.parse_args(arguments)

    def run() -> int:
        index = percepiano.load_index(given.folder)
        found = find_groups(given.folder, index)
        if not given.check:
            print(found.to_csv(lineterminator="\n"), end="")
            return 0
        for line in (wrong := differences(found, index)):
            print(f"error: {line}", file=sys.stderr)
        if not wrong:
            print(
                f"{found.nunique()} content groups of {len(found)} segments, consistent with the"
                " index"
            )
        return 1 if wrong else 0

    return exit_code(run)


# ---------------------------------------------------------------- tests

FIRST, SECOND, THIRD = (list(np.random.default_rng(seed).integers(40, 90, 30)) for seed in range(3))
MELODIES = {"a": FIRST, "b": SECOND, "long": FIRST[10:] + SECOND, "c": THIRD}


def performance(pitches):
    notes = np.zeros(len(pitches), NOTE)
    notes["onset"] = 0.5 * np.arange(len(pitches))
    notes["offset"], notes["pitch"], notes["velocity"] = notes["onset"] + 0.4, pitches, 70
    return Performance(notes, np.zeros(0, PEDAL))


@pytest.fixture
def folder(tmp_path):
    """Four segments with a deadpan rendering each; ``long`` holds most of a and all of b."""
    (tmp_path / percepiano.MIDI_FOLDER).mkdir(parents=True)
    rows = []
    for name, pitches in MELODIES.items():
        write_midi(performance(pitches), tmp_path / percepiano.MIDI_FOLDER / f"{name}_Score_1.mid")
        group = "c" if name == "c" else "music"
        for clip, human in ((f"{name}_Score_1", False), (f"{name}_1_1", True)):
            rows.append(
                {
                    "clip": clip,
                    "segment": name,
                    "content_group": group,
                    "human": human,
                    "fold_content": 0,
                }
            )
    pd.DataFrame(rows).to_csv(tmp_path / "index.csv", index=False)
    return tmp_path


def test_segments_that_share_music_are_one_group(folder, capsys):
    found = find_groups(folder, predictions.load_index(folder / "index.csv"))
    assert found["a"] == found["b"] == found["long"] != found["c"]
    assert main([str(folder), "--check"]) == 0
    assert "2 content groups of 4 segments" in capsys.readouterr().out
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out.startswith("segment,content_group\na,")


def test_a_chord_is_read_from_the_lowest_note_up():
    one, other = performance(FIRST), performance(FIRST)
    for notes in (one.notes, other.notes):
        notes["onset"][4:6] = notes["onset"][4]
    other.notes[[4, 5]] = other.notes[[5, 4]]
    assert pitch_grams(one) == pitch_grams(other)
    assert len(pitch_grams(performance(FIRST[:8]))) == 1


def test_an_index_that_says_otherwise_is_named(folder, capsys):
    index = pd.read_csv(folder / "index.csv")
    index.assign(content_group=index["segment"]).to_csv(folder / "index.csv", index=False)
    assert main([str(folder), "--check"]) == 1
    errors = capsys.readouterr().err
    assert (
        "segment 'a' shares music with ['b', 'long'] according to its MIDI, with [] according to"
        " the index" in errors
    )
    assert "segment 'c'" not in errors


@pytest.mark.parametrize(
    "case, message",
    [
        ("no deadpan", "segment 'a' has no deadpan rendering"),
        ("no file", "no MIDI file c_Score_1.mid"),
        ("short", "has fewer than 8 notes"),
    ],
)
def test_what_cannot_be_grouped_is_refused(folder, case, message):
    index, midi = predictions.load_index(folder / "index.csv"), folder / percepiano.MIDI_FOLDER
    if case == "no deadpan":
        index = index[(index["segment"] != "a") | index["human"]]
    elif case == "no file":
        (midi / "c_Score_1.mid").unlink()
    else:
        write_midi(performance(THIRD[:7]), midi / "c_Score_1.mid")
    with pytest.raises(InputError, match=message):
        find_groups(folder, index)


@pytest.mark.real_data
def test_percepiano_has_the_47_groups_of_its_index(percepiano_dir):
    index = predictions.load_index()
    found = find_groups(percepiano_dir, index)
    assert found.nunique() == 47 and not differences(found, index)
    assert (index["segment"].map(found) == index["content_group"]).all()


if __name__ == "__main__":
    sys.exit(main())
