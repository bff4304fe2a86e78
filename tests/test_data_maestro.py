"""Sources of recordings to shards: what is in them, what is not, and why. Cost: 40 s, most of it
workers that start."""

import io
import json
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import tensorflow_datasets as tfds
from archives import (
    FRONT_END,
    RATE,
    ROOT,
    SECONDS,
    data_set_bytes,
    preprocess,
    row,
    sound,
    table_of,
    tone,
    wav,
    write_archive_of,
    write_usual_archive,
)

from percepiano_ast import audio
from percepiano_ast.config import FrontEnd
from percepiano_ast.data import maestro, shards, sources
from percepiano_ast.data.batches import grain  # imported without its warning
from percepiano_ast.errors import InputError, RunFailed
from percepiano_ast.files import write_signed_json


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """Six recordings in three splits, and one of a work of PercePiano."""
    return write_usual_archive(tmp_path_factory.mktemp("source") / "maestro.zip")


@pytest.fixture(scope="module")
def run(archive, tmp_path_factory) -> tuple[Path, list[str]]:
    """The output of a run on the archive, and its log."""
    out = tmp_path_factory.mktemp("out") / "maestro"
    return out, preprocess(archive, out)


def examples_of(out: Path, split: str = "train") -> list[dict]:
    return list(shards.open_shards(out, split, made_by="it").examples)


def levels_of(content: bytes) -> np.ndarray:
    return audio.log_mel(audio.load(io.BytesIO(content)), FRONT_END)


def test_shards_read_with_plain_tfds(run):
    builder = tfds.builder_from_directory(run[0] / "maestro_log_mel" / shards.VERSION)
    train = builder.as_data_source(split="train")
    levels = np.concatenate([example["log_mel"] for example in train])
    assert levels.dtype == np.uint8 and levels.shape[1] == 128
    assert builder.info.metadata["front_end"] == asdict(FRONT_END)
    statistics = builder.info.metadata["statistics"]
    decibels = FRONT_END.floor_db + FRONT_END.step_db * levels.astype(np.float64)
    assert statistics["mean_db"] == pytest.approx(decibels.mean(), abs=1e-9)
    assert statistics["std_db"] == pytest.approx(decibels.std(), abs=1e-9)
    assert statistics["count"] == levels.size
    assert statistics["at_floor"] == np.mean(levels == 0) and statistics["at_ceiling"] == np.mean(
        levels == 255
    )
    assert (
        "CC BY-NC-SA" in builder.info.metadata["licence"] and not builder.info.metadata["simulated"]
    )


def test_shards_read_with_grain(run):
    source = tfds.builder_from_directory(
        run[0] / "maestro_log_mel" / shards.VERSION
    ).as_data_source(split="train")
    dataset = (
        grain.MapDataset.source(source)
        .seed(0)
        .shuffle()
        .map(lambda example: example["log_mel"][:512])
        .batch(2)
    )
    assert next(iter(dataset.to_iter_dataset())).shape == (2, 512, 128)


def test_chunks_join_to_the_recording_in_the_split_and_order_of_the_table(archive, run):
    with zipfile.ZipFile(archive) as source:
        for split, rows in (
            table_of(archive).query("canonical_composer == 'Nobody'").groupby("split")
        ):
            shard_set = shards.open_shards(run[0], split, made_by="it")
            names = [example["recording"].decode() for example in shard_set.examples]
            assert list(dict.fromkeys(names)) == sorted(rows["audio_filename"])
            for name, n_frames in zip(dict.fromkeys(names), shard_set.n_frames):
                parts = [
                    example
                    for example in shard_set.examples
                    if example["recording"].decode() == name
                ]
                joined = np.concatenate([part["log_mel"] for part in parts])
                expected, _ = audio.quantize(levels_of(source.read(f"{ROOT}/{name}")), FRONT_END)
                np.testing.assert_array_equal(joined, expected)
                assert (
                    len(parts) == max(n_frames // shard_set.chunk_frames, 1)
                    and len(joined) == n_frames
                )
                assert [part["start_frame"] for part in parts] == [
                    k * shard_set.chunk_frames for k in range(len(parts))
                ]


def test_works_of_percepiano_are_left_out_and_said(run):
    out, log = run
    skipped = pd.read_csv(out / "skipped.csv")
    assert skipped[["kind", "reason"]].values.tolist() == [["left out", "a work of PercePiano"]]
    assert any("1 of PercePiano's works excluded" in line for line in log)
    assert any("1 of 7 recordings skipped (0 unusable)" in line for line in log)
    recordings = pd.read_csv(out / "recordings.csv")
    assert len(recordings) == 6 and not set(recordings["audio_filename"]) & set(skipped["key"])
    assert recordings["seconds"].round().astype(int).tolist() == [
        s for lengths in SECONDS.values() for s in lengths
    ]
    assert set(recordings["source_rate"]) == {RATE} and set(recordings["channels"]) == {1}


def test_progress_says_recordings_hours_speed_time_and_room(run):
    line = next(line for line in run[1] if "6/6" in line)
    assert pytest.approx(
        sum(sum(lengths) for lengths in SECONDS.values()) / 3600, abs=0.01
    ) == float(line.split(" of ")[1].split()[0])
    assert all(word in line for word in ("recordings", " h,", "MB/s", "left", "GB of disk free"))


# Titles as MAESTRO v3.0.0 writes them; it counts the catalogue number up over a sonata's movements.
@pytest.mark.parametrize(
    ("composer", "title", "rated"),
    [
        ("Franz Schubert", "Sonata in B-flat Major, D960", True),
        ("Franz Schubert", "Son. in Bb D.960", True),
        ("Franz Schubert", "Son. in Bb D.961", True),
        ("Franz Schubert", "Sonata in B-flat Major D. 962", True),
        ("Franz Schubert", "Sonata in B-flat Major, D. 963", True),
        ("Franz Schubert", "Sonata No. 21, D. 960", True),
        ("Franz Schubert", "Sonata in A D960", False),
        ("Franz Schubert", "Sonata in C  Minor, D. 960", False),
        ("Franz Schubert", "Sonata in C Minor, D. 961", False),
        ("Franz Schubert", "Impromptu Op. 142 No. 3, in B-flat Major", True),
        ("Franz Schubert", "Impromptu Op.142 No.3, in B-Flat Major, D935", True),
        ("Franz Schubert", "Impromptu Op. 142 No. 3 in B-flat Major, D. 935", True),
        ("Franz Schubert", "Impromptus, Op. 142, D. 935", True),
        ("Schubert", "Impromptu_op142_3", True),
        ("Schubert", "Impromptu_op142_1", False),
        ("Franz Schubert", "Impromptu Op. 142 No.1 in F Minor", False),
        ("Franz Schubert", "Impromptu Op. 142 No. 1 in F Minor, D. 935", False),
        ("Franz Schubert", "Impromptu Op. 142 No. 4, in F Minor, D935", False),
        ("Franz Schubert", "Impromptu Op. 90 No. 3 in G-flat Major, D. 899", False),
        ("Franz Schubert", "Impromptus Op. 90, No. 3", False),
        ("Franz Schubert", "Moment Musicaux in F Minor, Op. 94 No. 3", False),
        ("Ludwig van Beethoven", "32 Variations in C Minor, WoO 80", True),
        ("Ludwig van Beethoven", "Andante favori in F Major, WoO 57", False),
        ("Ludwig van Beethoven", "Sonata No. 31 in A-flat Major, Op. 110, First movement", False),
        ("Johannes Brahms", "32 Variations", False),
    ],
)
def test_works_of_percepiano_by_their_titles(composer, title, rated):
    assert maestro.is_percepiano_work(composer, title) is rated


def test_a_folder_gives_the_same_shards(archive, run, tmp_path):
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path)
    preprocess(tmp_path / ROOT, tmp_path / "out", workers=2)
    mine, reference = data_set_bytes(tmp_path / "out"), data_set_bytes(run[0])
    read_more = [name for name in mine if name.startswith("records/")]  # the files are not deflated
    for name in read_more:
        assert _without(mine.pop(name), "source_bytes") == _without(
            reference.pop(name), "source_bytes"
        )
    assert mine == reference


def _without(record: bytes, name: str) -> dict:
    content = json.loads(record)
    for facts in content["recordings"]:
        del facts[name]
    return content


def test_float16_holds_levels_as_they_are(archive, run, tmp_path):
    preprocess(archive, tmp_path / "out", dtype="float16")
    exact, coarse = examples_of(tmp_path / "out"), examples_of(run[0])
    assert exact[0]["log_mel"].dtype == np.float16
    expected = audio.dequantize(coarse[0]["log_mel"], FRONT_END)
    inside = expected > FRONT_END.floor_db
    assert np.abs(exact[0]["log_mel"].astype(np.float32) - expected)[inside].max() <= 0.25 + 0.032
    statistics = [
        shards.open_shards(out, "train", made_by="it").statistics
        for out in (tmp_path / "out", run[0])
    ]
    assert statistics[0].mean_db == pytest.approx(statistics[1].mean_db, abs=0.02)
    with pytest.raises(InputError, match="another configuration .*stored"):
        preprocess(archive, tmp_path / "out")
    with pytest.raises(InputError, match="unknown storage format of levels 'int8'"):
        preprocess(archive, tmp_path / "other", dtype="int8")


def test_a_limit_takes_each_splits_share_and_grows(tmp_path):
    names = [f"{k}.wav" for k in range(200)]
    rows = pd.DataFrame(
        {"audio_filename": names, "split": ["train"] * 160 + ["validation"] * 40, "duration": 360.0}
    )
    few, more = sources.limited(rows, 2), sources.limited(rows, 5)
    assert few["duration"].sum() == pytest.approx(2 * 3600, rel=0.1)
    assert (few["split"] == "train").sum() == 16 and (few["split"] == "validation").sum() == 4
    assert set(few["audio_filename"]) < set(more["audio_filename"])
    assert len(sources.limited(rows, 0.01)) == 2 and len(sources.limited(rows, 1000)) == 200
    with pytest.raises(InputError, match="a limit of -1 hours"):
        sources.limited(rows, -1)


def test_limited_shards_hold_some_of_all_splits(archive, tmp_path):
    log = preprocess(archive, tmp_path / "out", max_hours=0.005)
    recordings = pd.read_csv(tmp_path / "out" / "recordings.csv")
    assert set(recordings["split"]) == {"train", "validation", "test"} and len(recordings) < 6
    assert any("limited to about 0.005 h" in line for line in log)


class TestOwnRecordings:
    """A folder of recordings without a table."""

    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        for number, name in enumerate(
            ["Bach/one.wav", "Bach/two.flac", "Chopin/three.ogg", "Chopin/four.mp3", "five.WAV"]
        ):
            path = tmp_path / "mine" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, sound(12, number, 44_100), 44_100)
        (tmp_path / "mine" / "notes.txt").write_text("not a recording")
        (tmp_path / "mine" / "._five.wav").write_bytes(b"what a Mac leaves behind")
        return tmp_path / "mine"

    def test_go_the_same_way(self, folder, tmp_path):
        preprocess(folder, tmp_path / "out")
        recordings = pd.read_csv(tmp_path / "out" / "recordings.csv").set_index("audio_filename")
        assert set(recordings["split"]) == {"train", "validation", "test"}
        assert recordings.loc[
            "Bach/two.flac", ["canonical_composer", "canonical_title"]
        ].tolist() == ["Bach", "two"]
        assert recordings["seconds"].between(11.9, 12.2).all() and len(recordings) == 5
        # Three folders: what shares one shares a split.
        assert recordings.groupby("canonical_composer")["split"].nunique().max() == 1
        assert (
            "CC BY"
            not in shards.open_shards(tmp_path / "out", "train", made_by="it").metadata["licence"]
        )

    def test_what_cannot_be_read_is_named(self, folder, tmp_path):
        (folder / "broken.wav").write_bytes(b"RIFF")
        with pytest.raises(RunFailed, match="1 unusable recordings, 0 allowed"):
            preprocess(folder, tmp_path / "out")
        skipped = pd.read_csv(tmp_path / "out" / "skipped.csv").set_index("key")
        assert skipped.loc["broken.wav", "kind"] == "bad"

    def test_a_folder_without_any_is_refused(self, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(InputError, match="neither a CSV table .* nor a recording"):
            preprocess(tmp_path / "empty", tmp_path / "out")


ODD = {
    "damaged.wav": ("is damaged in", lambda: wav(sound(12))),
    "silent.wav": ("silent", lambda: wav(np.zeros(12 * RATE))),
    "short.wav": ("0.50 s long", lambda: wav(sound(0.5))),
    "below_a_window.wav": ("shorter than one window", lambda: wav(sound(9))),
    "nan.wav": (
        "NaN",
        lambda: wav(np.where(np.arange(12 * RATE) == 1000, np.nan, sound(12)), subtype="FLOAT"),
    ),
    "truncated.wav": ("truncated", lambda: wav(sound(12))[:100_000]),
    "no_audio.wav": ("cannot be read as audio", lambda: b"<html>not found</html>"),
    "empty.wav": ("empty", lambda: wav(np.zeros(0))),
    "clipped.wav": ("clipped: 6", lambda: wav(np.clip(4 * tone(RATE), -1, 1))),
    "telephone.wav": ("at least 16,000 Hz", lambda: wav(sound(12, rate=8000), 8000)),
    "missing.wav": ("is listed but not in", lambda: None),
    "../outside.wav": ("points outside the source", lambda: None),
    "back\\slash.wav": ("has a backslash", lambda: wav(sound(12))),
}


def test_every_unusable_recording_is_listed_and_odd_formats_come_through(tmp_path):
    fine = {
        "96kHz_24bit_stereo.wav": wav(
            np.stack([tone(96_000), 0 * tone(96_000)], axis=1), 96_000, "PCM_24"
        ),
        "odd_rate.wav": wav(0.5 * tone(44_056), 44_056),
        "float.wav": wav(0.5 * tone(48_000), 48_000, "FLOAT"),
    }
    source = tmp_path / "odd.zip"
    write_archive_of(
        source,
        {**fine, **{name: make() for name, (_, make) in ODD.items()}, "stray.wav": wav(sound(12))},
        [*fine, *ODD],
    )
    _damage(source, "damaged.wav")
    reasons = {name: reason for name, (reason, _) in ODD.items()} | {
        "stray.wav": "not listed in the table"
    }
    with pytest.raises(
        RunFailed,
        match=rf"{len(reasons)} unusable recordings, 0 allowed; .* --max-errors {len(reasons)}",
    ):
        preprocess(source, tmp_path / "out")
    assert not shards.is_complete(tmp_path / "out")
    log = preprocess(source, tmp_path / "out", max_errors=len(reasons))
    # The only shard of these lacks recordings: it is made again.
    assert not any("done already" in line for line in log), log
    skipped = pd.read_csv(tmp_path / "out" / "skipped.csv").set_index("key")["reason"]
    assert set(skipped.index) == set(reasons)
    for name, reason in reasons.items():
        assert reason in skipped[name], name
        assert any(f"skipped {name}: " in line for line in log)
    expected, _ = audio.quantize(
        audio.log_mel(0.5 * tone(RATE).astype(np.float32), FRONT_END), FRONT_END
    )
    loud = expected[10:-10] > 100
    assert loud.any()
    examples = examples_of(tmp_path / "out")
    assert {example["recording"].decode() for example in examples} == set(fine)
    for name in fine:
        stored = np.concatenate(
            [example["log_mel"] for example in examples if example["recording"].decode() == name]
        )
        assert len(stored) == len(expected)
        assert np.abs(stored[10:-10].astype(int) - expected[10:-10])[loud].max() <= 1


def _damage(archive: Path, name: str) -> None:
    """Turn bits of a member over."""
    with zipfile.ZipFile(archive) as file:
        offset = file.getinfo(name).header_offset
    content = bytearray(archive.read_bytes())
    for at in range(offset + 5000, offset + 5200):
        content[at] ^= 0xFF
    archive.write_bytes(content)


GOOD = ",".join(sources.COLUMNS) + "\nA,B,train,2004,a.midi,a.wav,12\n"


@pytest.mark.parametrize(
    ("csv", "message"),
    [
        (GOOD.replace("split", "part"), "lacks the columns split"),
        (GOOD.replace("train", "dev"), "unknown split 'dev'. Use one of: train, validation, test"),
        (GOOD.replace("train", ""), "line 2: split is nan"),
        (GOOD.replace(",2004", ",MMIV"), "line 2: year is 'MMIV'"),
        (GOOD.replace("B,", ","), "line 2: canonical_title is nan"),
        (GOOD + GOOD.splitlines()[1], "lists a.wav twice"),
        (GOOD.splitlines()[0], "lists no recordings"),
        ("", "not a readable CSV"),
        ("\xff\xfe", "not a readable CSV"),
    ],
)
def test_unusable_tables_are_refused(csv, message, tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "table.csv").write_bytes(csv.encode("latin-1"))
    with pytest.raises(InputError, match=message):
        preprocess(tmp_path / "source", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unusable_sources_are_refused(archive, tmp_path):
    (tmp_path / "half.zip").write_bytes(archive.read_bytes()[:500_000])
    (tmp_path / "empty").mkdir()
    damaged = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as file:
        at = file.getinfo(f"{ROOT}/{ROOT}.csv").header_offset
    damaged[at + 80 : at + 120] = bytes(40)
    (tmp_path / "table.zip").write_bytes(damaged)
    for name, message in {
        "half.zip": "is not a complete zip archive",
        "empty": "neither a CSV table",
        "none.zip": "no such archive or folder of recordings",
        "table.zip": "is damaged",
    }.items():
        with pytest.raises(InputError, match=message):
            preprocess(tmp_path / name, tmp_path / "out")


def test_output_of_another_configuration_is_refused_and_a_complete_one_kept(archive, run, tmp_path):
    out, _ = run
    before = data_set_bytes(out)
    assert preprocess(archive, out) == [f"shards in {out} are complete"]
    with pytest.raises(
        InputError, match="another configuration .*front_end.* Choose another output"
    ):
        preprocess(archive, out, front_end=FrontEnd(fmin=30.0))
    # Another source of the same name and size is another source.
    other = maestro.write_archive(
        tmp_path / "maestro.zip", [(row("test"), sound(11), b"MThd")] * 7, RATE
    )
    with pytest.raises(InputError, match="another configuration .*table"):
        preprocess(other, out)
    assert data_set_bytes(out) == before


def test_opening_shards_says_what_is_missing(run, tmp_path):
    with pytest.raises(InputError, match="does not exist. Run notebook 01"):
        shards.open_shards(tmp_path / "none", "train", made_by="notebook 01")
    with pytest.raises(
        InputError, match="no split 'rated'. Choose one of: test, train, validation"
    ):
        shards.open_shards(run[0], "rated", made_by="notebook 01")
    (tmp_path / shards.MANIFEST).write_text("{}")
    with pytest.raises(InputError, match="is damaged .it lacks 'data_set'.. Run preprocess again"):
        shards.open_shards(tmp_path, "train", made_by="notebook 01")
    none = {"data_set": "maestro_log_mel", "version": shards.VERSION, "files": {}}
    write_signed_json(tmp_path / shards.MANIFEST, none)
    with pytest.raises(
        InputError, match="should hold one data set, holds 0. Delete it and run notebook 01"
    ):
        shards.open_shards(tmp_path, "train", made_by="notebook 01")
