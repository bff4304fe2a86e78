"""Performances rendered into an archive in MAESTRO's shape. Cost: 5 s."""

import io
import zipfile

import numpy as np
import pandas as pd
import pytest
import reproduce
import soundfile

from percepiano_ast.errors import InputError
from percepiano_ast.music import synth
from percepiano_ast.music.midi import NOTE, PEDAL, Performance, write_midi

PIECES, PERFORMANCES = 13, 2


def write_folder(folder):
    """Pieces of two notes, two performances each, and one that PercePiano rates."""
    rows = []
    places = [(f"Bach/Fugue/{piece}/", f"Fugue_{piece}") for piece in range(PIECES)] + [
        ("Schubert/Impromptu_op142/3/", "Impromptu_op142_3")
    ]
    for number, (place, title) in enumerate(places):
        for player in range(PERFORMANCES):
            path = folder / place / f"Player{player}.mid"
            path.parent.mkdir(parents=True, exist_ok=True)
            notes = np.array([(0.0, 0.5, 40 + number, 60 + player), (1.0, 1.5, 72, 80)], NOTE)
            write_midi(Performance(notes, np.zeros(0, PEDAL)), path)
            rows.append(
                {
                    "composer": place.split("/")[0],
                    "title": title,
                    "midi_performance": str(path.relative_to(folder)),
                }
            )
    pd.DataFrame(rows).to_csv(folder / "metadata.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("asap"))


def table_of(path):
    with zipfile.ZipFile(path) as archive:
        return pd.read_csv(io.BytesIO(archive.read("maestro-v3.0.0/maestro-v3.0.0.csv")))


def test_nothing_that_percepiano_rates_is_rendered(source, tmp_path, logged):
    made = table_of(
        reproduce.render_archive(source, tmp_path / "a.zip", hours=1, synthesizers=["builtin"])
    )
    assert len(made) == PIECES * PERFORMANCES
    assert not made["canonical_title"].str.contains("op142").any()
    assert "2 performances of PercePiano's works excluded" in logged[0]


def test_all_performances_of_a_piece_share_a_split(source, tmp_path):
    made = table_of(
        reproduce.render_archive(source, tmp_path / "a.zip", hours=1, synthesizers=["builtin"])
    )
    assert (made.groupby("canonical_title")["split"].nunique() == 1).all()
    assert set(made["split"]) == {"train", "validation", "test"}


def test_every_piece_comes_before_a_second_performance_of_one(source, tmp_path):
    hours = 0.9 * PIECES * 3 / 3600  # of three seconds each
    made = table_of(
        reproduce.render_archive(source, tmp_path / "a.zip", hours=hours, synthesizers=["builtin"])
    )
    assert made["canonical_title"].is_unique


def test_what_was_rendered_is_not_rendered_again(source, tmp_path, monkeypatch):
    first = reproduce.render_archive(
        source, tmp_path / "a.zip", hours=1, synthesizers=["builtin"]
    ).read_bytes()
    monkeypatch.setattr(synth, "_render", lambda *_: pytest.fail("rendered again"))
    assert (
        reproduce.render_archive(
            source, tmp_path / "a.zip", hours=1, synthesizers=["builtin"]
        ).read_bytes()
        == first
    )


def test_the_archive_holds_what_was_played(source, tmp_path):
    path = reproduce.render_archive(source, tmp_path / "a.zip", hours=1, synthesizers=["builtin"])
    row = table_of(path).iloc[0]
    with zipfile.ZipFile(path) as archive:
        wave, rate = soundfile.read(
            io.BytesIO(archive.read(f"maestro-v3.0.0/{row['audio_filename']}"))
        )
    assert rate == reproduce.SAMPLE_RATE and np.abs(wave).max() > 0.01
    assert len(wave) / rate == pytest.approx(row["duration"])


def test_a_folder_without_its_table_is_refused(tmp_path):
    with pytest.raises(InputError, match="metadata.csv"):
        reproduce.render_archive(tmp_path, tmp_path / "a.zip", hours=1, synthesizers=["builtin"])
