"""PercePiano-shaped folders to rated shards, folds, and the simulated data.

Cost: 35 s, most of it soundfonts that load and worker processes that start.
"""

import functools
import http.server
import io
import json
import os
import shutil
import threading
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from percepiano_ast import synthesis
from percepiano_ast.config import FrontEnd, InputError
from percepiano_ast.data import batches, build, demo, percepiano, shards, sources, tables
from percepiano_ast.data.splits import fold_of_clip
from percepiano_ast.dimensions import KEYS
from percepiano_ast.evaluation import reliability
from percepiano_ast.performance import NOTE, PEDAL, Performance, write_midi

FRONT_END = FrontEnd()
CLIPS = ("Piece_8bars_1_1", "Piece_8bars_2_1", "Other_8bars_1_1", "Other_8bars_Score_1")


def write_clip(path: Path, pitch: int = 60) -> None:
    """Three seconds of notes."""
    notes = np.zeros(6, NOTE)
    notes["onset"] = 0.5 + 0.5 * np.arange(6)
    notes["offset"], notes["pitch"], notes["velocity"] = notes["onset"] + 0.4, pitch + np.arange(6), 70
    write_midi(Performance(notes, np.zeros(0, PEDAL)), path)


def ratings_of(number: int) -> list[float]:
    return [round(0.2 + 0.01 * dimension + 0.1 * number, 4) for dimension in range(len(KEYS))]


def index_row(clip: str, fold: int) -> dict:
    group = clip.split("_")[0]
    return {"clip": clip, "segment": group, "content_group": group, "human": "Score" not in clip, "fold_content": fold}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Four clips with ratings, one of them with a space before its file name, and an index of their own."""
    folder = tmp_path / "data"
    (folder / percepiano.MIDI_FOLDER).mkdir(parents=True)
    for number, clip in enumerate(CLIPS):
        name = f" {clip}.mid" if number == 1 else f"{clip}.mid"
        write_clip(folder / percepiano.MIDI_FOLDER / name, 55 + number)
    names = [f" {CLIPS[1]}" if number == 1 else clip for number, clip in enumerate(CLIPS)]
    write_labels(folder, {name: ratings_of(number) + [3] for number, name in enumerate(names)})
    pd.DataFrame([index_row(clip, number // 2) for number, clip in enumerate(CLIPS)]).to_csv(folder / "index.csv")
    return folder


def write_labels(folder: Path, labels: dict) -> None:
    (folder / percepiano.LABELS).write_text(json.dumps(labels))


def change_labels(folder: Path, **values) -> None:
    labels = json.loads((folder / percepiano.LABELS).read_text()) | values
    write_labels(folder, {name: value for name, value in labels.items() if value != "gone"})


def preprocess(folder, out, synthesizers=("builtin",), workers=1) -> list[str]:
    lines = []
    work = build.Work(workers, max_bad=None, log=lines.append)
    percepiano.preprocess(folder, out, FRONT_END, work, synthesizers=synthesizers)
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
    expected = FRONT_END.n_frames(int(np.ceil((0.1 + 2.9 + synthesis.TAIL) * FRONT_END.sample_rate)))
    assert all(abs(len(codes) - expected) <= 1 and codes.dtype == np.uint8 for codes in rated.codes)
    features = pd.read_csv(out / "classic_features.csv")
    assert features["clip"].tolist() == list(CLIPS[:2]) and np.isfinite(features.iloc[:, 2:].to_numpy()).all()
    # The same again is kept; other ratings are another configuration.
    assert preprocess(folder, out) == [f"shards in {out} are complete"]
    change_labels(folder, **{CLIPS[0]: ratings_of(3)})
    with pytest.raises(InputError, match="another configuration .*ratings"):
        preprocess(folder, out)


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
        (lambda f: halve(f / percepiano.LABELS), "damaged or half written"),
        (lambda f: (f / percepiano.LABELS).write_bytes(b""), "damaged or half written"),
        (lambda f: (f / percepiano.LABELS).write_text("[1, 2]"), "should hold a JSON object"),
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
    ("name", "message"), [("fluidr3", "Did you mean 'fluidr3mono'"), ("none.sf2", "none.sf2: no such file")]
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


class TestFetch:
    """Download from a real server."""

    @pytest.fixture
    def url(self, tmp_path):
        served = tmp_path / "served"
        served.mkdir()
        quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
        handler = functools.partial(quiet, directory=served)
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield f"http://127.0.0.1:{server.server_port}", served
            server.shutdown()

    def archive(self, folder: Path, leave_out: str = "nothing") -> bytes:
        """The folder as GitHub packs a commit, with files that nobody needs."""
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:
            for path in sorted(folder.rglob("*")):
                inner = path.relative_to(folder).as_posix()
                if path.is_file() and path.name != "index.csv" and leave_out not in inner:
                    archive.write(path, f"PercePiano-e672299/{inner}")
            archive.writestr("PercePiano-e672299/LICENSE", "MIT")
            archive.writestr("PercePiano-e672299/virtuoso/data/score_midi/Piece.mid", b"score")
            archive.writestr(f"PercePiano-e672299/{percepiano.MIDI_FOLDER}/../../../../../outside.mid", b"no")
        return content.getvalue()

    def test_what_is_needed_arrives_and_is_kept(self, url, folder, tmp_path):
        address, served = url
        (served / "e672299.zip").write_bytes(self.archive(folder))
        got = percepiano.fetch(f"{address}/e672299.zip", tmp_path / "runs" / "source")
        files = {path.relative_to(got).as_posix() for path in got.rglob("*") if path.is_file()}
        midi = {f"{percepiano.MIDI_FOLDER}/{path.name}" for path in (folder / percepiano.MIDI_FOLDER).iterdir()}
        assert files == {percepiano.LABELS, "LICENSE", *midi}
        assert percepiano.find_midi(got).keys() == set(CLIPS)
        assert not list(tmp_path.rglob("outside.mid"))
        (served / "e672299.zip").unlink()
        assert percepiano.fetch(f"{address}/e672299.zip", got) == got

    @pytest.mark.parametrize("what", ["wrong", "scheme", "half", "no labels", "no midi", "damaged"])
    def test_what_cannot_be_used_is_refused(self, url, folder, tmp_path, what):
        address, served = url
        content = self.archive(folder, {"no labels": percepiano.LABELS, "no midi": "all_2rounds"}.get(what, "nothing"))
        content = content[: len(content) // 2] if what == "half" else content
        if what == "damaged":
            at = content.index(b"MThd")
            content = content[:at] + bytes(20) + content[at + 20 :]
        (served / "some.zip").write_bytes(content)
        asked = {"wrong": f"{address}/none.zip", "scheme": "nothing://here"}.get(what, f"{address}/some.zip")
        with pytest.raises(InputError, match=f"cannot fetch PercePiano from {asked}: .* Give a local copy"):
            percepiano.fetch(asked, tmp_path / "source")
        assert not (tmp_path / "source").exists()


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
        with pytest.raises(InputError, match="'Piece' lies in folds 0 and 1"):
            fold_of_clip(index.assign(fold_content=[0, 1, 1, 1]), "content")


class TestRealData:
    """The published files."""

    pytestmark = pytest.mark.real_data

    @pytest.fixture
    def linked(self, percepiano_dir, tmp_path) -> Path:
        """A folder with the real MIDI files and no label file."""
        folder = tmp_path / "linked"
        (folder / percepiano.MIDI_FOLDER).parent.mkdir(parents=True)
        os.symlink((percepiano_dir / percepiano.MIDI_FOLDER).resolve(), folder / percepiano.MIDI_FOLDER)
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
        shutil.copy(percepiano_dir / "labels" / percepiano.LABELS, linked / percepiano.LABELS)
        with pytest.raises(InputError, match="rates 1,189 clips, 1,202 are expected; .* not the one in labels/"):
            preprocess(linked, tmp_path / "out")

    def test_real_clips_with_two_soundfonts(self, percepiano_dir, linked, tmp_path):
        try:
            names = ("fluidr3mono", "musescore-small")
            for name in names:
                synthesis.make_synthesizer(name)
        except InputError as error:
            (pytest.fail if os.environ.get("CI") else pytest.skip)(str(error))
        clips = ["Schubert_D935_no.3_4bars_2_1", "Beethoven_WoO80_thema_8bars_11_1", "Beethoven_WoO80_thema_8bars_14_1"]
        shutil.copy(percepiano_dir / percepiano.LABELS, linked / percepiano.LABELS)
        index = percepiano.load_index(percepiano_dir)
        index[index["clip"].isin(clips)].to_csv(linked / "index.csv", index=False)
        log = preprocess(linked, tmp_path / "out", names)
        assert any("3 clips with fluidr3mono, musescore-small: 6 renderings" in line for line in log)
        rated = batches.rated_clips(shards.open_shards(tmp_path / "out", percepiano.SPLIT, made_by="it"))
        assert rated.clip.tolist() == [clip for clip in sorted(clips) for _ in names]
        assert rated.synthesizer.tolist() == [*names] * 3
        labels = json.loads((percepiano_dir / percepiano.LABELS).read_text())
        labels = {name.strip(): values[:19] for name, values in labels.items()}
        np.testing.assert_array_equal(rated.ratings, np.float32([labels[clip] for clip in rated.clip]))
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
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def test_same_seed_same_bytes(self, tmp_path):
        first, again, other = (
            self.files(demo.write_percepiano(tmp_path / name, seed=seed, performers=1))
            for name, seed in (("a", 5), ("b", 5), ("c", 6))
        )
        assert first == again and first.keys() == other.keys()
        human = next(name for name in first if name.endswith("_0_1.mid"))
        assert first[human] != other[human] and first[percepiano.LABELS] != other[percepiano.LABELS]

    def test_recordings_follow_the_seed(self, tmp_path):
        made = [demo.write_maestro(tmp_path / f"{n}.zip", seed=s, recordings_per_tune=1) for n, s in ((1, 0), (2, 0))]
        assert made[0].read_bytes() == made[1].read_bytes()
        rows = tables.read_table(sources.open_source(str(made[0]))).rows
        assert set(rows["split"]) == set(tables.SPLITS) and rows["duration"].min() > 10.3
        rated = set(pd.read_csv(demo.write_percepiano(tmp_path / "p", performers=1) / "index.csv")["piece"])
        titles = {"".join(t.capitalize() for t in title.split()) for title in rows["canonical_title"]}
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
        table = reliability.read_raters(made)
        grouped = table.groupby("clip")[list(KEYS)]
        raters = len(table) / grouped.ngroups
        between = raters * grouped.mean().var()
        within = grouped.var().mean()
        icc = (between - within) / (between + (raters - 1) * within)
        assert 0.2 < icc.mean() < 0.33
        labels = percepiano.read_ratings(made, percepiano.load_index(made))
        means = grouped.mean() / 7
        for clip, values in labels.items():
            np.testing.assert_allclose(means.loc[clip], values, atol=1e-6)
