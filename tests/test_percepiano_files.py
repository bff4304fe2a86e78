"""PercePiano's files: names, traps of the published data, fetching and comparing. Cost: 10 s."""

import functools
import http.server
import io
import json
import threading
import zipfile
from pathlib import Path

import pytest
from percepiano_folder import CLIPS, write_clip, write_folder

from percepiano_ast.data import percepiano
from percepiano_ast.data.percepiano import COMMIT, ClipName
from percepiano_ast.errors import InputError


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "data")


def test_a_name_says_piece_player_and_segment():
    name = ClipName.of(" Schubert_D935_no.3_4bars_2_1")
    assert name == ("Schubert_D935_no.3_4bars", "2", "1") and not name.deadpan
    assert name.passage == "Schubert_D935_no.3_4bars_1"
    assert ClipName.of("Beethoven_WoO80_var10_8bars_Score2_8").deadpan
    for wrong in ("", "take", "take_1", "_1_1"):
        with pytest.raises(InputError, match=f"{wrong!r} is not a valid clip name"):
            ClipName.of(wrong)


def test_a_clip_twice_is_refused_by_name(folder):
    # there is one with a space before it
    write_clip(folder / percepiano.MIDI_FOLDER / f"{CLIPS[1]}.mid")
    with pytest.raises(InputError, match=f"all_2rounds has '{CLIPS[1]}' twice"):
        percepiano.find_midi(folder)
    path = folder / percepiano.LABELS
    for second in (CLIPS[0], f"{CLIPS[0]} "):  # JSON itself would keep the last one in silence
        path.write_text(json.dumps({CLIPS[0]: [0.5] * 20})[:-1] + f', "{second}": []}}')
        with pytest.raises(InputError, match=f"'{CLIPS[0]}' twice"):
            percepiano.read_labels(folder)


def test_equal_files_are_found_and_scores_must_be_there(folder):
    midi, found = percepiano.find_midi(folder), percepiano.fingerprints(folder)
    (folder / percepiano.MIDI_FOLDER / f"._{CLIPS[0]}.mid").write_bytes(b"\0\5\x16\7")
    assert percepiano.find_midi(folder) == midi and percepiano.fingerprints(folder) == found
    assert percepiano.identical_midi(folder) == []
    midi[CLIPS[2]].write_bytes(midi[CLIPS[0]].read_bytes())
    assert percepiano.identical_midi(folder) == [sorted([CLIPS[0], CLIPS[2]])]
    with pytest.raises(InputError, match="no scores in"):
        percepiano.find_scores(folder)


class TestFetch:
    """Download from a real server."""

    @pytest.fixture
    def url(self, tmp_path):
        served = tmp_path / "served"
        served.mkdir()
        quiet = type(
            "Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None}
        )
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
            archive.writestr(
                f"PercePiano-e672299/{percepiano.SCORE_FOLDER}/Piece_8bars_Score_1.mid", b"score"
            )
            archive.writestr(f"PercePiano-e672299/{percepiano.RATERS}", b"user")
            archive.writestr("PercePiano-e672299/virtuoso/features.py", b"not needed")
            archive.writestr(
                f"PercePiano-e672299/{percepiano.MIDI_FOLDER}/../../../../../outside.mid", b"no"
            )
        return content.getvalue()

    def test_what_is_needed_arrives_and_is_kept(self, url, folder, tmp_path, logged):
        address, served = url
        (served / "e672299.zip").write_bytes(self.archive(folder))
        got = percepiano.fetch(f"{address}/e672299.zip", tmp_path / "runs" / "source")
        assert "files not compared" in logged[-1]
        assert list(got.parent.iterdir()) == [got]
        files = {path.relative_to(got).as_posix() for path in got.rglob("*") if path.is_file()}
        midi = {
            f"{percepiano.MIDI_FOLDER}/{path.name}"
            for path in (folder / percepiano.MIDI_FOLDER).iterdir()
        }
        score = f"{percepiano.SCORE_FOLDER}/Piece_8bars_Score_1.mid"
        assert files == {percepiano.LABELS, percepiano.RATERS, "LICENSE", score, *midi}
        assert percepiano.find_midi(got).keys() == set(CLIPS)
        assert not list(tmp_path.rglob("outside.mid"))
        (served / "e672299.zip").unlink()
        assert percepiano.fetch(f"{address}/e672299.zip", got) == got

    @pytest.mark.parametrize("what", ["wrong", "scheme", "half", "no labels", "no midi", "damaged"])
    def test_what_cannot_be_used_is_refused(self, url, folder, tmp_path, what):
        address, served = url
        content = self.archive(
            folder, {"no labels": percepiano.LABELS, "no midi": "all_2rounds"}.get(what, "nothing")
        )
        content = content[: len(content) // 2] if what == "half" else content
        if what == "damaged":
            at = content.index(b"MThd")
            content = content[:at] + bytes(20) + content[at + 20 :]
        (served / "some.zip").write_bytes(content)
        asked = {"wrong": f"{address}/none.zip", "scheme": "nothing://here"}.get(
            what, f"{address}/some.zip"
        )
        message = {
            "wrong": f"cannot download {asked}: HTTP Error 404: .* Give a local copy",
            "scheme": f"cannot download '{asked}': give an http:// or https:// address",
        }.get(what, f"cannot download PercePiano from {asked}: .* Give a local copy")
        with pytest.raises(InputError, match=message):
            percepiano.fetch(asked, tmp_path / "source")
        assert not (tmp_path / "source").exists()

    def test_a_bomb_is_not_unpacked(self, url, tmp_path, monkeypatch):
        address, served = url
        with zipfile.ZipFile(served / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"x/{percepiano.LABELS}", bytes(600))
            archive.writestr(f"x/{percepiano.MIDI_FOLDER}/a.mid", bytes(600))
        monkeypatch.setattr(percepiano, "MAX_UNPACKED", 1000)
        with pytest.raises(InputError, match="expands to more than 1,000 bytes. Give a local copy"):
            percepiano.fetch(f"{address}/bomb.zip", tmp_path / "source")

    @pytest.mark.real_data
    def test_the_pinned_commit_must_be_the_pinned_commit(self, url, percepiano_dir, tmp_path):
        address, served = url
        address = f"{address}/{COMMIT}.zip"
        parts = (
            percepiano.LABELS,
            percepiano.RATERS,
            percepiano.MIDI_FOLDER,
            percepiano.SCORE_FOLDER,
        )
        files = [
            path
            for part in parts
            for path in sorted(percepiano_dir.glob(f"{part}/*")) or [percepiano_dir / part]
        ]

        def serve(changed: str = "") -> None:
            with zipfile.ZipFile(served / f"{COMMIT}.zip", "w") as archive:
                for path in files:
                    content = path.read_bytes() + b" " * (path.name == changed)
                    archive.writestr(
                        f"PercePiano/{path.relative_to(percepiano_dir).as_posix()}", content
                    )

        serve(changed="Beethoven_WoO80_var10_8bars_2_8.mid")
        with pytest.raises(
            InputError, match="all_2rounds in .* has different contents: .* commit e672299"
        ):
            percepiano.fetch(address, tmp_path / "source")
        assert not (tmp_path / "source").exists()
        serve()
        got = percepiano.fetch(address, tmp_path / "source")
        assert percepiano.fetch(address, got) == got
        (got / percepiano.RATERS).unlink()
        with pytest.raises(InputError, match="total_2rounds.csv in .* has 0 of 1 files"):
            percepiano.fetch(address, got)


class TestTraps:
    """What the published files have in store."""

    pytestmark = pytest.mark.real_data

    def test_names_have_player_before_segment(self, percepiano_dir):
        """The index, which was made apart, agrees with every name; and 129 clips are deadpan."""
        index = percepiano.load_index(percepiano_dir)
        names = [ClipName.of(clip) for clip in index["clip"]]
        assert [name.piece for name in names] == index["piece"].tolist()
        assert [name.player for name in names] == index["player"].tolist()
        assert [name.passage for name in names] == index["segment"].tolist()
        assert [not name.deadpan for name in names] == index["human"].tolist()
        assert sum(name.deadpan for name in names) == 129

    def test_one_name_starts_with_a_space(self, percepiano_dir):
        odd = [
            path
            for path in percepiano.find_midi(percepiano_dir).values()
            if path.name.startswith(" ")
        ]
        assert len(odd) == 1 and odd[0].stem.strip() in percepiano.read_labels(percepiano_dir)

    def test_labels_have_nineteen_values_and_a_token(self, percepiano_dir):
        assert {len(values) for values in percepiano.read_labels(percepiano_dir).values()} == {20}

    def test_equal_files_under_two_names_share_a_content_group(self, percepiano_dir):
        group = percepiano.load_index(percepiano_dir).set_index("clip")["content_group"]
        found = percepiano.identical_midi(percepiano_dir)
        assert len(found) == 21 and sum(map(len, found)) == 46
        assert all(group[clips].nunique() == 1 for clips in found)

    def test_every_passage_has_a_score(self, percepiano_dir):
        scores = percepiano.find_scores(percepiano_dir)
        assert set(percepiano.load_index(percepiano_dir)["segment"]) <= set(scores)

    def test_the_files_are_the_published_ones(self, percepiano_dir):
        assert percepiano.fingerprints(percepiano_dir) == percepiano.PUBLISHED
