"""PercePiano-shaped folders to rated shards, folds, and the simulated data.

Cost: 50 s, most of it soundfonts that load and worker processes that start.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
from conftest import log_lines
from percepiano_folder import (
    CLIPS,
    change_labels,
    index_row,
    ratings_of,
    write_clip,
    write_folder,
    write_labels,
)

from percepiano_ast import audio
from percepiano_ast.config import FrontEnd
from percepiano_ast.data import batches, build, demo, percepiano, percepiano_stats, shards, sources
from percepiano_ast.data.percepiano import ClipName, fold_of_clip
from percepiano_ast.dimensions import KEYS
from percepiano_ast.errors import InputError
from percepiano_ast.music import synth
from percepiano_ast.music.midi import read_midi, trimmed, write_midi

FRONT_END = FrontEnd()


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "data")


def preprocess(folder, out, synthesizers=("builtin",), workers=1) -> list[str]:
    how = build.BuildOptions(workers, max_errors=None)
    with log_lines() as lines:
        percepiano.preprocess(folder, out, FRONT_END, how, synthesizers=synthesizers)
    return lines


def test_rated_shards_and_everything_left_out_is_listed(folder, tmp_path):
    midi = folder / percepiano.MIDI_FOLDER
    write_clip(midi / "Stray_8bars_1_1.mid")
    (midi / f"{CLIPS[2]}.mid").write_bytes(b"MThd, and then nothing of the kind")
    (midi / f"{CLIPS[3]}.mid").unlink()
    change_labels(folder, Unlisted_8bars_1_1=ratings_of(0) + [0])
    out = tmp_path / "out"
    log = preprocess(folder, out)
    skipped = pd.read_csv(out / "skipped.csv").set_index("key")["reason"]
    assert skipped["Stray_8bars_1_1"] == "no label"
    assert skipped["Unlisted_8bars_1_1"] == "not in the index"
    assert "not a readable MIDI file" in skipped[f"{CLIPS[2]}@builtin"]
    assert skipped[f"{CLIPS[3]}@builtin"] == f"no MIDI file {CLIPS[3]}.mid"
    assert len(skipped) == 4 and any("4 of 6 recordings skipped" in line for line in log)
    rated = batches.rated_clips(shards.open_shards(out, percepiano.SPLIT, made_by="it"))
    assert rated.clip.tolist() == list(CLIPS[:2]) and rated.synthesizer.tolist() == ["builtin"] * 2
    np.testing.assert_array_equal(rated.ratings, np.float32([ratings_of(0), ratings_of(1)]))
    # First onset at .1 s, last release 2.9 s later, and the tail.
    expected = FRONT_END.n_frames(int(np.ceil((0.1 + 2.9 + synth.TAIL) * FRONT_END.sample_rate)))
    assert all(abs(len(codes) - expected) <= 1 and codes.dtype == np.uint8 for codes in rated.codes)
    features = pd.read_csv(out / "classic_features.csv")
    assert (
        features["clip"].tolist() == list(CLIPS[:2])
        and np.isfinite(features.iloc[:, 2:].to_numpy()).all()
    )
    levels = pd.read_csv(out / "levels.csv")
    assert (levels["peak_db"] > levels["level_db"]).all() and (levels["over"] == 0).all()
    assert any("builtin: " in line and "0 of 2 renderings exceed it" in line for line in log)
    # The same again is kept; other ratings are another configuration.
    assert preprocess(folder, out) == [f"shards in {out} are complete"]
    change_labels(folder, **{CLIPS[0]: ratings_of(3)})
    with pytest.raises(InputError, match="another configuration .*ratings"):
        preprocess(folder, out)


def test_renderings_are_cached_and_augmentations_differ_from_them(folder, tmp_path):
    names = ("builtin", "builtin+stretch", "builtin+room")
    preprocess(folder, tmp_path / "one" / "out", names)
    made = sorted((tmp_path / "one" / "renderings").iterdir())
    # of four clips as they are and stretched; a room is added to what is there
    assert len(made) == 8
    rated = batches.rated_clips(
        shards.open_shards(tmp_path / "one" / "out", percepiano.SPLIT, made_by="it")
    )
    assert (
        rated.synthesizer.tolist() == sorted(names) * 4
        and percepiano.is_plain(rated.synthesizer).sum() == 4
    )
    for plain, room, stretched in zip(*(rated.codes[k::3] for k in range(3))):
        # a room comes with a recorder that runs up to 15 cents too fast or too slow
        assert abs(len(room) / len(plain) - 1) < 0.01 and (plain[:400] != room[:400]).any()
        assert abs(len(stretched) / len(plain) - 1) < 0.06
    # Another run beside it hears what was rendered.
    stamps = [path.stat().st_mtime_ns for path in made]
    preprocess(folder, tmp_path / "one" / "again")
    assert [path.stat().st_mtime_ns for path in made] == stamps
    assert sorted((tmp_path / "one" / "renderings").iterdir()) == made


class TestOwnRenderings:
    """A recording of each clip in a synthesizer's place."""

    @pytest.fixture
    def recordings(self, folder, tmp_path) -> Path:
        """The four clips as the built-in piano plays them, after two seconds of nothing."""
        where = tmp_path / "grand"
        where.mkdir()
        for clip, path in percepiano.find_midi(folder).items():
            wave = synth.BuiltinPiano().render(trimmed(read_midi(path)), 22_050)
            soundfile.write(
                where / f"{clip}.flac",
                np.concatenate([np.zeros(44_100), wave, np.zeros(22_050)]),
                22_050,
            )
        return where

    def make(self, folder, out, recordings, **options) -> list[str]:
        how = build.BuildOptions(max_errors=None)
        with log_lines() as lines:
            percepiano.preprocess(folder, out, FRONT_END, how, recordings=recordings, **options)
        return lines

    def test_recordings_sound_as_a_synthesizer_would(self, folder, recordings, tmp_path):
        (recordings / "notes.txt").write_text("not a recording")
        shutil.copy(recordings / f"{CLIPS[0]}.flac", recordings / "Stranger.flac")
        (recordings / f"{CLIPS[1]}.flac").rename(recordings / f"{CLIPS[1]}.sound")
        (recordings.parent / "more").mkdir()
        (recordings / "link").symlink_to(recordings.parent / "more")
        (recordings / f"{CLIPS[2]}.flac").rename(recordings.parent / "more" / CLIPS[2])
        log = self.make(folder, tmp_path / "out", recordings, synthesizers=("own", "builtin"))
        assert any("1 recordings match no clip and are ignored: Stranger" in line for line in log)
        assert any("1 other files are not recordings: notes.txt" in line for line in log)
        skipped = pd.read_csv(tmp_path / "out" / "skipped.csv")
        assert skipped.query("kind == 'other'")["key"].tolist() == ["notes.txt", "Stranger.flac"]
        # nobody knows how long before
        assert any(line.startswith("  8/8 recordings, ") and " h, " not in line for line in log)
        rated = batches.rated_clips(
            shards.open_shards(tmp_path / "out", percepiano.SPLIT, made_by="it")
        )
        assert rated.synthesizer.tolist() == ["builtin", "own"] * 4
        for rendered, recorded in zip(rated.codes[::2], rated.codes[1::2]):
            assert len(rendered) == len(recorded)  # silence at both ends is gone
            onsets = [
                np.argmax(codes.mean(axis=1) > codes.mean()) for codes in (rendered, recorded)
            ]
            assert abs(onsets[0] - onsets[1]) <= 2 and abs(rendered.mean() - recorded.mean()) < 2

    def test_missing_ones_are_listed_and_refused_unless_partial(self, folder, recordings, tmp_path):
        (recordings / f"{CLIPS[2]}.flac").unlink()
        with pytest.raises(InputError, match=f"lacks recordings of 1 of 4 clips: {CLIPS[2]}"):
            self.make(folder, tmp_path / "out", recordings)
        assert not (tmp_path / "out").exists()
        log = self.make(folder, tmp_path / "out", recordings, partial=True)
        assert any("1 clips have no recording" in line for line in log)
        skipped = pd.read_csv(tmp_path / "out" / "skipped.csv").set_index("key")["reason"]
        assert skipped.to_dict() == {f"{CLIPS[2]}@own": "no recording of this clip"}
        assert len(shards.open_shards(tmp_path / "out", percepiano.SPLIT, made_by="it")) == 3

    def test_what_is_no_recording_of_the_clip_is_listed_by_name(self, folder, recordings, tmp_path):
        wave, rate = soundfile.read(recordings / f"{CLIPS[0]}.flac")
        soundfile.write(recordings / f"{CLIPS[0]}.flac", np.tile(wave, 5), rate)
        soundfile.write(recordings / f"{CLIPS[1]}.flac", 0 * wave, rate)
        self.make(folder, tmp_path / "out", recordings)
        skipped = pd.read_csv(tmp_path / "out" / "skipped.csv").set_index("key")["reason"]
        assert (
            "Check that it is the right clip" in skipped[f"{CLIPS[0]}@own"]
            and f"{CLIPS[0]}.flac" in skipped[f"{CLIPS[0]}@own"]
        )
        assert "silent" in skipped[f"{CLIPS[1]}@own"] and len(skipped) == 2

    @pytest.mark.parametrize(
        ("harm", "options", "message"),
        [
            (shutil.rmtree, {}, "no such folder"),
            (
                lambda f: [path.unlink() for path in f.iterdir()],
                {},
                "has no recording of any of 4 clips",
            ),
            (
                lambda f: shutil.copy(f / f"{CLIPS[0]}.flac", f / f"{CLIPS[0]}.wav"),
                {},
                "both of clip",
            ),
            (
                lambda f: None,
                {"synthesizers": ("builtin",)},
                "synthesizer 'own' and a folder of recordings require each other",
            ),
        ],
    )
    def test_bad_folders_are_refused(self, folder, recordings, tmp_path, harm, options, message):
        harm(recordings)
        with pytest.raises(InputError, match=message):
            self.make(folder, tmp_path / "out", recordings, **options)
        assert not (tmp_path / "out").exists()


def test_a_performance_of_hours_is_listed_by_name(folder, tmp_path):
    path = folder / percepiano.MIDI_FOLDER / f"{CLIPS[0]}.mid"
    performance = read_midi(path)
    performance.notes["onset"][-1] += 4_600
    performance.notes["offset"][-1] += 4_600
    write_midi(performance, path)
    preprocess(folder, tmp_path / "out")
    skipped = pd.read_csv(tmp_path / "out" / "skipped.csv").set_index("key")["reason"]
    assert f"{CLIPS[0]}: 1.3 h long; the limit is 1 h" in skipped[f"{CLIPS[0]}@builtin"]


def test_ratings_come_in_the_order_of_the_index(folder):
    ratings = percepiano.read_ratings(folder, percepiano.load_index(folder))
    assert list(ratings) == list(CLIPS)
    for number, clip in enumerate(CLIPS):
        np.testing.assert_array_equal(ratings[clip], np.float32(ratings_of(number)))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("gone", f"4 are expected; 1 lack a label, {CLIPS[0]} among them"),
        ([0.5] * 18 + [1.01, 0], f"{CLIPS[0]} has {KEYS[-1]} = 1.01"),
        ([-0.1] + [0.5] * 19, f"{KEYS[0]} = -0.1"),
        ([float("nan")] + [0.5] * 19, f"{KEYS[0]} = nan"),
        (["4"] + [0.5] * 19, f"{KEYS[0]} = '4'"),
        ([True] + [0.5] * 19, f"{KEYS[0]} = True"),
        ([0.5] * 18, "should have 19 ratings"),
        ([0.5] * 21, "should have 19 ratings"),
        (0.5, "should have 19 ratings"),
    ],
)
def test_bad_ratings_are_refused_by_name(folder, tmp_path, value, message):
    change_labels(folder, **{CLIPS[0]: value})
    with pytest.raises(InputError, match=message):
        preprocess(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: halve(f / percepiano.LABELS), "is damaged"),
        (lambda f: (f / percepiano.LABELS).write_bytes(b""), "is damaged"),
        (lambda f: (f / percepiano.LABELS).write_bytes(b"{\xff"), "is damaged .*0xff"),
        (lambda f: (f / percepiano.LABELS).write_text("[" * 99999), "nested too deeply"),
        (lambda f: (f / percepiano.LABELS).write_text('{"a": %s}' % ("7" * 5000)), "is damaged"),
        (lambda f: (f / percepiano.LABELS).write_text("[1, 2]"), "is .1, 2., not dict"),
        (lambda f: (f / percepiano.LABELS).unlink(), f"no {percepiano.LABELS} in"),
        (lambda f: shutil.rmtree(f / percepiano.MIDI_FOLDER), "no MIDI files in"),
        (lambda f: (f / "dataset.json").write_text('{"simulated"'), "dataset.json is damaged"),
        (lambda f: (f / "index.csv").write_text("clip\nx\n"), "lacks the columns"),
        (shutil.rmtree, "no MIDI files in"),
    ],
)
def test_half_written_folders_are_refused(folder, tmp_path, harm, message):
    harm(folder)
    with pytest.raises(InputError, match=message):
        preprocess(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [("fluidr3", "Did you mean 'fluidr3mono'"), ("none.sf2", "none.sf2: no such file")],
)
def test_a_missing_soundfont_is_said_before_anything_is_made(folder, tmp_path, name, message):
    with pytest.raises(InputError, match=message):
        preprocess(folder, tmp_path / "out", ("builtin", name))
    assert not (tmp_path / "out").exists()


def test_no_readable_clip_is_an_error(folder, tmp_path):
    for path in (folder / percepiano.MIDI_FOLDER).iterdir():
        path.rename(path.with_name("Stray_8bars_1_1.mid"))
    with pytest.raises(InputError, match="none of the 5 recordings could be read"):
        preprocess(folder, tmp_path / "out")


def test_only_a_folder_that_says_so_is_simulated(folder):
    assert not percepiano.is_simulated(folder)
    (folder / "dataset.json").write_text('{"name": "something"}')
    assert not percepiano.is_simulated(folder)
    (folder / "dataset.json").write_text('{"simulated": true}')
    assert percepiano.is_simulated(folder)


class TestFolds:
    """Folds come from the index."""

    def test_content_groups_stay_together_in_the_shipped_index(self):
        index = percepiano.load_index("/nowhere")
        assert len(index) == 1202
        folds = fold_of_clip(index, "content")
        assert len(folds) == 1202
        fold = index["clip"].map(folds)
        assert fold.groupby(index["content_group"]).nunique().eq(1).all() and fold.nunique() >= 4
        partial = fold_of_clip(index, "upstream_piece")
        assert 0 < len(partial) < 1202 and min(partial.values()) >= 0

    def test_what_cannot_be_split_is_refused(self):
        index = pd.DataFrame([index_row(clip, number // 2) for number, clip in enumerate(CLIPS)])
        assert fold_of_clip(index, "content") == dict(zip(CLIPS, [0, 0, 1, 1]))
        with pytest.raises(InputError, match="no protocol 'contents'; choose one of content"):
            fold_of_clip(index, "contents")
        with pytest.raises(InputError, match="has 1 fold"):
            fold_of_clip(index.assign(fold_content=0), "content")
        with pytest.raises(InputError, match="'Piece' is in folds 0 and 1"):
            fold_of_clip(index.assign(fold_content=[0, 1, 1, 1]), "content")


class TestRealData:
    """The published files."""

    pytestmark = pytest.mark.real_data

    @pytest.fixture
    def linked(self, percepiano_dir, tmp_path) -> Path:
        """A folder with the real MIDI files and no label file."""
        folder = tmp_path / "linked"
        (folder / percepiano.MIDI_FOLDER).parent.mkdir(parents=True)
        os.symlink(
            (percepiano_dir / percepiano.MIDI_FOLDER).resolve(), folder / percepiano.MIDI_FOLDER
        )
        return folder

    def test_every_clip_has_ratings_and_midi(self, percepiano_dir):
        index = percepiano.load_index(percepiano_dir)
        ratings = percepiano.read_ratings(percepiano_dir, index)
        assert len(index) == len(ratings) == 1202
        assert percepiano.find_midi(percepiano_dir).keys() == set(index["clip"])
        assert percepiano.read_labels(percepiano_dir).keys() == set(index["clip"])
        values = np.stack(list(ratings.values()))
        assert values.shape == (1202, 19) and 0 <= values.min() and values.max() <= 1
        assert not percepiano.is_simulated(percepiano_dir)

    def test_the_wrong_label_file_is_refused(self, percepiano_dir, linked, tmp_path):
        """In labels/ 13 clips of Score were merged into those of Score2."""
        shutil.copy(percepiano_dir / "labels" / percepiano.LABELS, linked / percepiano.LABELS)
        lacking = set(percepiano.read_labels(percepiano_dir)) - set(percepiano.read_labels(linked))
        assert len(lacking) == 13 and {ClipName.of(clip).player for clip in lacking} == {"Score"}
        with pytest.raises(
            InputError,
            match="rates 1,189 clips, 1,202 are expected; 13 lack.* not the one in labels/",
        ):
            preprocess(linked, tmp_path / "out")

    def test_ratings_of_another_version_are_refused_under_the_shipped_index(
        self, percepiano_dir, linked
    ):
        labels = json.loads((percepiano_dir / percepiano.LABELS).read_text())
        labels["Beethoven_WoO80_var10_8bars_2_8"][3] = 0.5
        write_labels(linked, labels)
        with pytest.raises(
            InputError,
            match="ratings of 1 of 1202 clips differ from those .*Beethoven_WoO80_var10_8bars_2_8",
        ):
            percepiano.read_ratings(linked, percepiano.load_index(linked))

    def test_real_clips_with_two_soundfonts(self, percepiano_dir, linked, tmp_path):
        try:
            names = ("fluidr3mono", "musescore-small")
            for name in names:
                synth.make_synthesizer(name)
        except InputError as error:
            (pytest.fail if os.environ.get("CI") else pytest.skip)(str(error))
        clips = [
            "Schubert_D935_no.3_4bars_2_1",
            "Beethoven_WoO80_thema_8bars_11_1",
            "Beethoven_WoO80_thema_8bars_14_1",
        ]
        shutil.copy(percepiano_dir / percepiano.LABELS, linked / percepiano.LABELS)
        index = percepiano.load_index(percepiano_dir)
        index[index["clip"].isin(clips)].to_csv(linked / "index.csv", index=False)
        log = preprocess(linked, tmp_path / "out", names)
        assert any(
            "3 clips with fluidr3mono, musescore-small: 6 renderings" in line for line in log
        )
        rated = batches.rated_clips(
            shards.open_shards(tmp_path / "out", percepiano.SPLIT, made_by="it")
        )
        assert rated.clip.tolist() == [clip for clip in sorted(clips) for _ in names]
        assert rated.synthesizer.tolist() == [*names] * 3
        labels = json.loads((percepiano_dir / percepiano.LABELS).read_text())
        labels = {name.strip(): values[:19] for name, values in labels.items()}
        np.testing.assert_array_equal(
            rated.ratings, np.float32([labels[clip] for clip in rated.clip])
        )
        for first, second in zip(rated.codes[::2], rated.codes[1::2]):
            assert first.shape == second.shape and np.abs(first.astype(int) - second).mean() > 2
        skipped = pd.read_csv(tmp_path / "out" / "skipped.csv")
        assert len(skipped) == 1199 and set(skipped["reason"]) == {"not in the index"}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """The embedded PercePiano-shaped folder."""
    return demo.write_percepiano(tmp_path_factory.mktemp("demo") / "a", seed=0)


class TestDemo:
    """Simulated data: a function of the seed, and said to be simulated."""

    def files(self, folder: Path) -> dict[str, bytes]:
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }

    def test_same_seed_same_bytes(self, tmp_path):
        first, again, other = (
            self.files(demo.write_percepiano(tmp_path / name, seed=seed, performers=1))
            for name, seed in (("a", 5), ("b", 5), ("c", 6))
        )
        assert first == again and first.keys() == other.keys()
        human = next(name for name in first if name.endswith("_0_1.mid"))
        assert first[human] != other[human] and first[percepiano.LABELS] != other[percepiano.LABELS]

    def test_recordings_follow_the_seed(self, tmp_path):
        made = [
            demo.write_maestro(tmp_path / f"{n}.zip", seed=s, recordings_per_tune=1)
            for n, s in ((1, 0), (2, 0))
        ]
        assert made[0].read_bytes() == made[1].read_bytes()
        rows = sources.read_table(sources.open_source(str(made[0]))).rows
        assert set(rows["split"]) == set(sources.SPLITS) and rows["duration"].min() > 10.3
        rated = set(
            pd.read_csv(demo.write_percepiano(tmp_path / "p", performers=1) / "index.csv")["piece"]
        )
        titles = {
            "".join(t.capitalize() for t in title.split()) for title in rows["canonical_title"]
        }
        assert not {piece.removesuffix("_8bars") for piece in rated} & titles

    def test_it_says_that_it_is_simulated_and_is_whole(self, made):
        assert percepiano.is_simulated(made)
        index = percepiano.load_index(made)
        ratings = percepiano.read_ratings(made, index)
        assert percepiano.find_midi(made).keys() == set(ratings) == set(index["clip"])
        assert len(fold_of_clip(index, "content")) == len(index)
        values = np.stack(list(ratings.values()))
        assert 0 < values.min() and values.max() <= 1 and (values.std(axis=0) > 0.03).all()
        with pytest.raises(InputError, match="another configuration .*seed"):
            demo.write_percepiano(made, seed=1)

    def test_raters_agree_as_little_as_percepianos(self, made):
        table = percepiano_stats.raters(made)
        grouped = table.groupby("clip")[list(KEYS)]
        raters = len(table) / grouped.ngroups
        between = raters * grouped.mean().var()
        within = grouped.var().mean()
        icc = (between - within) / (between + (raters - 1) * within)
        assert 0.2 < icc.mean() < 0.33
        assert percepiano_stats.rebuild_means(made).means.shape == (192, len(KEYS))

    def test_every_passage_has_its_score(self, made):
        assert percepiano.find_scores(made).keys() == set(percepiano.load_index(made)["segment"])


def test_one_loudness_for_all_give_or_take_what_a_model_must_bear(folder, tmp_path):
    given = folder, tmp_path / "level", FRONT_END, build.BuildOptions(max_errors=None)
    percepiano.preprocess(*given, synthesizers=("builtin",), normalize_loudness=True)
    preprocess(folder, tmp_path / "played")
    peak, levels = {}, {}
    for name in ("level", "played"):
        rated = batches.rated_clips(
            shards.open_shards(tmp_path / name, percepiano.SPLIT, made_by="it")
        )
        peak[name] = np.array([codes.max() for codes in rated.codes]) * FRONT_END.step_db
        levels[name] = (
            pd.read_csv(tmp_path / name / "levels.csv")
            .set_index("clip")
            .loc[rated.clip, "level_db"]
            .to_numpy()
        )
    assert 0.2 < np.ptp(levels["level"]) < 2 * audio.JITTER_DB + 1
    # What is stored was moved by as much as the sound was.
    np.testing.assert_allclose(
        peak["level"] - peak["played"], levels["level"] - levels["played"], atol=1
    )
    with pytest.raises(InputError, match="another configuration .*loudness"):
        percepiano.preprocess(*given, synthesizers=("builtin",))
