"""Own recordings and ratings: read, listened to, refused in words. Cost: 6 s."""

import os
import re

import numpy as np
import pandas as pd
import pytest
import soundfile

from percepiano_ast.config import FrontEnd
from percepiano_ast.data import batches, custom_ratings, demo
from percepiano_ast.data.percepiano import fold_of_clip
from percepiano_ast.errors import InputError

RATE = 22_050


@pytest.fixture
def made(tmp_path):
    """Twenty-four noises of 1.2 s in two formats, and two ratings of each; six groups."""
    folder = tmp_path / "takes"
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for number in range(24):
        name = f"take {number:02d}.{'wav' if number % 2 else 'flac'}"
        soundfile.write(folder / name, 0.1 * rng.standard_normal(int(1.2 * RATE)), RATE)
        clip = name if number % 3 else name.rsplit(".", 1)[0]
        rows.append(
            {
                "clip": clip,
                "pianist": f"p{number % 6}",
                "Warmth": number / 2,
                "would go again": 10 - number,
            }
        )
    (folder / "notes.txt").write_text("nothing to hear")
    pd.DataFrame(rows).to_csv(tmp_path / "ratings.csv", index=False)
    return folder, tmp_path / "ratings.csv"


def rename(folder, table, number, file, clip=None):
    """Rename a recording, and in the table to ``clip``."""
    (old,) = folder.glob(f"take {number:02d}.*")
    (folder / os.fsdecode(file)).parent.mkdir(exist_ok=True)
    old.rename(folder / os.fsdecode(file))
    if clip:
        change(table, number, "clip", clip)


def change(path, row, column, value):
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    table.loc[row, column] = value
    table.to_csv(path, index=False)


def test_recordings_and_ratings_become_clips_with_folds(made):
    found = custom_ratings.read_ratings(*made, group="pianist")
    assert found.dimensions == ("Warmth", "would go again") and found.ratings.dtype == np.float32
    assert (
        found.ratings[5].tolist() == [2.5, 5.0]
        and list(found.files) == found.index["clip"].tolist()
    )
    folds = fold_of_clip(found.index, "content")
    fold = found.index["clip"].map(folds)
    assert fold.groupby(found.index["content_group"]).nunique().eq(1).all() and fold.nunique() == 5
    pd.testing.assert_frame_equal(
        found.index, custom_ratings.read_ratings(*made, group="pianist").index
    )
    clips, _ = found.load(FrontEnd())
    assert clips.clip.tolist() == found.index["clip"].tolist()
    assert all(codes.shape == (FrontEnd().n_frames(int(1.2 * RATE)), 128) for codes in clips.codes)
    dataset, steps = batches.finetune_batches(
        clips, np.arange(24), n_frames=64, max_windows=1, batch_size=8, seed=0
    )
    assert steps == 3 and next(batches.from_step(dataset, 0))["codes"].shape == (8, 1, 64, 128)


def test_any_recording_counts_wherever_it_is(made, tmp_path, logged):
    """Containers, unknown suffixes and none, folders below, links, and letters composed or not."""
    folder, table = made
    before = custom_ratings.read_ratings(*made, group="pianist")
    loaded = before.load(FrontEnd())[0].codes
    rename(folder, table, 1, b"take 01.MOV", "take 01.mov")
    rename(folder, table, 2, b"take 02.rec", "take 02.rec")
    rename(folder, table, 3, b"take 03", "take 03")
    rename(folder, table, 4, "pre\u0301lude.wav".encode(), "pr\u00e9lude")
    rename(folder, table, 5, "\u00e9tude.wav".encode(), "e\u0301tude.wav")
    rename(folder, table, 6, b"below/take 06.wav.mp3", "take 06.wav.mp3")
    rename(folder, table, 7, b"../take 07.wav")
    rename(folder, table, 8, b"../more/take 08.wav")
    (folder / "take 07.wav").symlink_to(tmp_path / "take 07.wav")
    (folder / "more").symlink_to(tmp_path / "more")
    (folder / "more again").symlink_to(tmp_path / "more")
    (folder / "up").symlink_to(".")
    (folder / "._take 09.wav").write_bytes(b"what macOS leaves behind")
    (folder / "take 10.wav.crdownload").write_bytes(b"RIFF")
    found = custom_ratings.read_ratings(*made, group="pianist")
    assert [path.name for path in found.files.values()][1:9] == [
        *("take 01.MOV", "take 02.rec", "take 03", "pre\u0301lude.wav", "\u00e9tude.wav"),
        *("take 06.wav.mp3", "take 07.wav", "take 08.wav"),
    ]
    assert len(found.files) == 24 and (found.ratings == before.ratings).all()
    codes = found.load(FrontEnd())[0].codes
    assert all(np.array_equal(*pair) for pair in zip(codes, loaded, strict=True))
    assert [line.split(":")[0].strip() for line in logged[1:3]] == [
        "1 other files are not recordings",
        "1 unfinished downloads or backups are left out",
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("take 03.mid", "has no recording: 2 other files are not recordings: .*take 03.mid"),
        ("take 03", "has no recording: 2 other files are not recordings: .*take 03"),
        ("take 03.wav.part", "1 unfinished downloads .*take 03.wav.part"),
        ("take 03.gshortcut", "1 shortcuts hold no sound; add the file"),
        (".take 03.wav", "1 hidden files"),
    ],
)
def test_a_file_of_a_clip_that_is_no_recording_is_named(made, name, message):
    folder, table = made
    next(folder.glob("take 03.*")).unlink()
    (folder / name).write_bytes(b"MThd")
    (folder / "take 03.txt").write_text("what was played")
    with pytest.raises(InputError, match=message):
        custom_ratings.read_ratings(*made, group="pianist")


def test_names_that_are_not_utf8_are_named(made):
    folder, table = made
    rename(folder, table, 3, b"caf\xe9.wav", "caf\u00e9")
    with pytest.raises(InputError, match=r"1 clips \(caf\u00e9\) are rated") as refused:
        custom_ratings.read_ratings(*made, group="pianist")
    assert str(refused.value).encode()
    change(table, 3, "clip", "caf\\xe9")
    found = custom_ratings.read_ratings(*made, group="pianist")
    assert found.index["clip"][3] == "caf\\xe9" and len(found.load(FrontEnd())[0].codes) == 24


def test_columns_can_be_chosen(made):
    assert custom_ratings.read_ratings(
        *made, group="pianist", dimensions=("would go again",)
    ).ratings.shape == (24, 1)


@pytest.mark.parametrize(
    ("row", "column", "value", "message"),
    [
        (3, "Warmth", "", "line 5: Warmth of 'take 03' is empty. Enter a number"),
        (3, "Warmth", "high", "line 5: Warmth of 'take 03' is 'high'. Enter a number"),
        (3, "Warmth", "inf", "line 5: Warmth of 'take 03' is 'inf'"),
        (3, "Warmth", "1e39", "line 5: Warmth of 'take 03' is '1e39'"),  # no float32
        (3, "pianist", "", "line 5: pianist is empty"),
        (3, "clip", "", "line 5: clip is empty"),
        (3, "clip", "take 02.flac", "line 5: clip 'take 02' has a row already"),
        (3, "clip", "take 99", r"1 clips \(take 99\) are rated in .* but missing in"),
        (slice(None), "Warmth", "3", "Warmth is 3 for every clip"),
        (slice(1, None), "Warmth", "1e-300", "Warmth is 0 for every clip"),
        (slice(None), "pianist", "she", "all clips in one group, 'she'"),
    ],
)
def test_bad_rows_are_named(made, row, column, value, message):
    change(made[1], row, column, value)
    with pytest.raises(InputError, match=message):
        custom_ratings.read_ratings(*made, group="pianist")


def test_tables_of_spreadsheets_and_names_of_macos_are_the_same(made):
    """Excel in German, and file names with separate accents: nothing else differs."""
    folder, csv = made
    (folder / "take 00.flac").rename(folder / "Ka\u0308se.flac")
    change(csv, 0, "clip", "K\u00e4se")
    change(csv, slice(0, 23, 6), "pianist", "NA")
    expected = custom_ratings.read_ratings(*made, group="pianist")
    assert "K\u00e4se" in expected.files and "NA" in set(expected.index["content_group"])
    text = re.sub(r"[.](\d);", r",\1;", csv.read_text().replace(",", ";")).replace("\n", "\r\n")
    csv.write_bytes(f"sep=;\r\n{text};;;\r\n\r\n".encode("cp1252"))
    found = custom_ratings.read_ratings(*made, group="pianist")
    assert (found.ratings == expected.ratings).all() and found.dimensions == expected.dimensions
    pd.testing.assert_frame_equal(found.index, expected.index)
    csv.write_bytes(csv.read_bytes().replace(b";11,5;", b";11.5;"))
    with pytest.raises(InputError, match=r"line 3: Warmth is '0,0', but line 26: Warmth is '11.5'"):
        custom_ratings.read_ratings(*made, group="pianist")
    csv.write_bytes(csv.read_bytes().replace(b";11.5;", b";1.011,5;"))
    read = r"Windows-1252, separator semicolon, decimal comma"
    with pytest.raises(InputError, match=rf"line 26: Warmth of 'take 23' is '1.011,5'.*{read}"):
        custom_ratings.read_ratings(*made, group="pianist")


def drop_rows(folder, csv):
    pd.read_csv(csv).iloc[1:].to_csv(csv, index=False)


def few(folder, csv):
    table = pd.read_csv(csv)
    table.iloc[:19].to_csv(csv, index=False)
    for path in sorted(folder.glob("take*"))[19:]:
        path.unlink()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (drop_rows, r"1 clips \(take 00\) are in .* but not rated"),
        (few, "rates 19 clips. .* at least 20"),
        (
            lambda folder, csv: (folder / "take 00.wav").write_bytes(b""),
            "00.flac and take 00.wav .* both of clip 'take 00'",
        ),
        (lambda folder, csv: csv.unlink(), "no ratings file"),
        (lambda folder, csv: csv.write_text("clip,pianist\n"), "no column of ratings"),
        (lambda folder, csv: csv.write_text("clip,pianist,Warmth\n"), "has no rows"),
        (
            lambda folder, csv: csv.write_text("clip,pianist,Warmth, Warmth\n"),
            "has 2 columns named 'Warmth'. Keep one",
        ),
        (
            lambda folder, csv: pd.read_csv(csv).to_csv(csv),
            "column 1 has no name. Name it, or remove it",
        ),
        (
            lambda folder, csv: csv.write_text("name,pianist,Warmth\n"),
            "lacks the columns clip; it has name, pianist, Warmth",
        ),
    ],
)
def test_bad_folders_and_tables_are_refused(made, harm, message):
    harm(*made)
    with pytest.raises(InputError, match=message):
        custom_ratings.read_ratings(*made, group="pianist")


def test_a_missing_folder_and_a_bad_recording_are_named(made):
    with pytest.raises(InputError, match="nowhere: no such folder of recordings"):
        custom_ratings.read_ratings("nowhere", made[1], group="pianist")
    found = custom_ratings.read_ratings(*made, group="pianist")
    (made[0] / "take 03.wav").write_bytes(b"no sound")
    with pytest.raises(InputError, match="take 03.wav"):
        found.load(FrontEnd())


def test_the_demo_has_own_ratings_of_its_own(tmp_path):
    folder, csv = demo.write_ratings(tmp_path / "own")
    found = custom_ratings.read_ratings(folder, csv, group="tune")
    assert len(found.files) == 24 and found.dimensions == ("pace", "force", "would listen again")
    assert found.index["fold_content"].nunique() == 4
    assert demo.write_ratings(tmp_path / "own") == (folder, csv)
