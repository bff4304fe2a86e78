"""Which segments share music: small melodies with known overlaps, and PercePiano's 47 groups. Cost:
3 s."""

import numpy as np
import pandas as pd
import pytest

from percepiano_ast.__main__ import main
from percepiano_ast.data import content_groups, percepiano
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation.table import load_index
from percepiano_ast.music.midi import NOTE, PEDAL, Performance, write_midi

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
    found = content_groups.find_groups(folder, load_index(folder / "index.csv"))
    assert found["a"] == found["b"] == found["long"] != found["c"]
    assert main(["index", str(folder), "--check"]) == 0
    assert "2 content groups of 4 segments" in capsys.readouterr().out
    assert main(["index", str(folder)]) == 0
    assert capsys.readouterr().out.startswith("segment,content_group\na,")


def test_a_chord_is_read_from_the_lowest_note_up():
    one, other = performance(FIRST), performance(FIRST)
    for notes in (one.notes, other.notes):
        notes["onset"][4:6] = notes["onset"][4]
    other.notes[[4, 5]] = other.notes[[5, 4]]
    assert content_groups.pitch_grams(one) == content_groups.pitch_grams(other)
    assert len(content_groups.pitch_grams(performance(FIRST[:8]))) == 1


def test_an_index_that_says_otherwise_is_named(folder, capsys):
    index = pd.read_csv(folder / "index.csv")
    index.assign(content_group=index["segment"]).to_csv(folder / "index.csv", index=False)
    assert main(["index", str(folder), "--check"]) == 1
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
    index, midi = load_index(folder / "index.csv"), folder / percepiano.MIDI_FOLDER
    if case == "no deadpan":
        index = index[(index["segment"] != "a") | index["human"]]
    elif case == "no file":
        (midi / "c_Score_1.mid").unlink()
    else:
        write_midi(performance(THIRD[:7]), midi / "c_Score_1.mid")
    with pytest.raises(InputError, match=message):
        content_groups.find_groups(folder, index)


@pytest.mark.real_data
def test_percepiano_has_the_47_groups_of_its_index(percepiano_dir):
    index = load_index()
    found = content_groups.find_groups(percepiano_dir, index)
    assert found.nunique() == 47 and not content_groups.differences(found, index)
    assert (index["segment"].map(found) == index["content_group"]).all()
