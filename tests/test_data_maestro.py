"""MAESTRO-shaped sources to shards, whatever the source and whatever interrupts it.

Cost: 30 s, most of it worker processes that start.
"""

import http.server
import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import tensorflow_datasets as tfds

from percepiano_ast import audio
from percepiano_ast.config import FrontEnd, InputError
from percepiano_ast.data import maestro, shards

RATE = 22_050
FRONT_END = FrontEnd()
SECONDS = {"train": [12, 50, 13, 11], "validation": [12], "test": [14]}
ROOT = "maestro-v3.0.0"


def sound(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise with a slow swell, mono float32 at ``RATE``."""
    n = round(seconds * RATE)
    swell = 0.15 + 0.1 * np.sin(np.arange(n) / RATE)
    return (swell * np.random.default_rng(seed).normal(size=n)).clip(-1, 1).astype(np.float32)


def row(split: str = "train", title: str = "Sonata", composer: str = "Nobody") -> dict:
    """What ``write_archive`` asks to know of a recording."""
    return {"canonical_composer": composer, "canonical_title": title, "split": split, "year": 2026}


def wav(wave: np.ndarray, rate: int = RATE, subtype: str = "PCM_16") -> bytes:
    """A WAV file."""
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format="WAV", subtype=subtype)
    return file.getvalue()


def preprocess(source, out, **options) -> list[str]:
    """Run with one worker; the lines of the log."""
    lines = []
    maestro.preprocess(str(source), out, FRONT_END, workers=1, log=lines.append, **options)
    return lines


def shard_bytes(out: Path) -> dict[str, bytes]:
    """Every file of the data set."""
    home = out / maestro.MaestroLogMel.name
    return {str(path.relative_to(home)): path.read_bytes() for path in sorted(home.rglob("*")) if path.is_file()}


def table_of(archive: Path) -> pd.DataFrame:
    with zipfile.ZipFile(archive) as file:
        return pd.read_csv(io.BytesIO(file.read(f"{ROOT}/{ROOT}.csv")))


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """Six recordings in three splits, and one of a work that PercePiano rates."""
    recordings = [(row(split), seconds) for split, lengths in SECONDS.items() for seconds in lengths]
    recordings.append((row("test", "Sonata in B-flat Major, D. 961", "Franz Schubert"), 12))
    parts = ((fields, sound(seconds, number), b"MThd") for number, (fields, seconds) in enumerate(recordings))
    return maestro.write_archive(tmp_path_factory.mktemp("source") / "maestro.zip", parts, RATE)


@pytest.fixture(scope="module")
def folder(archive, tmp_path_factory) -> Path:
    """The same source unpacked, beside other folders."""
    place = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(archive) as file:
        file.extractall(place)
    return place / ROOT


@pytest.fixture(scope="module")
def run(archive, tmp_path_factory) -> tuple[Path, list[str]]:
    """The output of an uninterrupted run on the archive, and its log."""
    out = tmp_path_factory.mktemp("out") / "maestro"
    return out, preprocess(archive, out)


def test_shards_read_with_plain_tfds(run):
    builder = tfds.builder_from_directory(run[0] / "maestro_log_mel" / "1.0.0")
    train = builder.as_data_source(split="train")
    levels = np.concatenate([example["log_mel"] for example in train])
    assert levels.dtype == np.uint8 and levels.shape[1] == 128
    assert all(len(example["log_mel"]) >= maestro.MIN_FRAMES for example in train)
    assert builder.info.metadata["front_end"] == asdict(FRONT_END)
    statistics = builder.info.metadata["statistics"]
    decibels = FRONT_END.floor_db + FRONT_END.step_db * levels.astype(np.float64)
    assert statistics["mean_db"] == pytest.approx(decibels.mean(), abs=1e-6)
    assert statistics["std_db"] == pytest.approx(decibels.std(), abs=1e-6)
    assert statistics["count"] == levels.size
    assert "CC BY-NC-SA" in builder.info.metadata["licence"] and not builder.info.metadata["simulated"]


def test_chunks_join_to_the_recording_in_the_split_of_the_table(archive, run):
    with zipfile.ZipFile(archive) as source:
        for split, rows in table_of(archive).query("canonical_composer == 'Nobody'").groupby("split"):
            examples = list(shards.open_shards(run[0], split, made_by="it").examples)
            names = {example["recording"].decode() for example in examples}
            assert names == set(rows["audio_filename"])
            for name in names:
                parts = [example for example in examples if example["recording"].decode() == name]
                parts.sort(key=lambda example: example["start_frame"])
                joined = np.concatenate([part["log_mel"] for part in parts])
                wave = audio.load(io.BytesIO(source.read(f"{ROOT}/{name}")))
                expected, _ = audio.quantize(audio.log_mel(wave, FRONT_END), FRONT_END)
                np.testing.assert_array_equal(joined, expected)
                lengths = np.cumsum([0] + [len(part["log_mel"]) for part in parts])[:-1]
                assert [part["start_frame"] for part in parts] == lengths.tolist()
    assert max(len(list(shards.open_shards(run[0], s, made_by="it").examples)) for s in ("validation", "test")) == 1


def test_works_of_percepiano_are_left_out_and_said(run):
    out, log = run
    skipped = pd.read_csv(out / "skipped.csv")
    assert skipped["reason"].tolist() == ["a work that PercePiano rates"]
    assert any("1 left out as PercePiano's works" in line for line in log)
    assert any("1 of 7 recordings skipped" in line for line in log)
    recordings = pd.read_csv(out / "recordings.csv")
    assert len(recordings) == 6 and not set(recordings["audio_filename"]) & set(skipped["key"])


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


SCRIPT = """
import sys
from percepiano_ast.config import FrontEnd
from percepiano_ast.data import maestro
if __name__ == "__main__":
    maestro.preprocess(sys.argv[1], sys.argv[2], FrontEnd(), workers=1)
"""


def test_a_killed_run_on_the_folder_ends_with_the_same_bytes(folder, run, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    command = [sys.executable, str(tmp_path / "script.py"), str(folder), str(out)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (ready := list((out / "staged").glob("*.npz"))) and time.monotonic() < deadline:
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert ready and not shards.is_complete(out)
    with pytest.raises(InputError, match="is incomplete. Run this first"):
        shards.open_shards(out, "train", made_by="this")
    # What a run leaves that is killed while it packs.
    half = out / "maestro_log_mel" / "1.0.0.incompleteABCDEF"
    half.mkdir(parents=True)
    (half / "maestro_log_mel-train.array_record-00000-of-00001").write_bytes(b"half")
    log = preprocess(folder, out)
    assert any(re.search(r"[1-6] of 6 were ready already", line) for line in log)
    assert shard_bytes(out) == shard_bytes(run[0])
    assert not (out / "staged").exists()


class Ranges(http.server.BaseHTTPRequestHandler):
    """Serves one file with Range requests; ``server.broken`` is a span of bytes that answers 503."""

    def do_HEAD(self):
        self._head(200, len(self.server.content))

    def do_GET(self):
        content = self.server.content
        first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"]).groups()
        start, stop = int(first), min(int(last or len(content)) + 1, len(content))
        broken = self.server.broken
        if start < broken[1] and stop > broken[0]:
            self.send_error(503)
            return
        self.server.sent += stop - start
        self._head(206, stop - start, ("Content-Range", f"bytes {start}-{stop - 1}/{len(content)}"))
        self.wfile.write(content[start:stop])

    def _head(self, status, length, *headers):
        self.send_response(status)
        for name, value in (("Accept-Ranges", "bytes"), ("Content-Length", str(length)), *headers):
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(archive):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ranges) as server:
        server.content, server.sent, server.broken = archive.read_bytes(), 0, (0, 0)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_an_address_gives_the_same_bytes_and_sends_little_twice_even_when_it_breaks(server, archive, run, tmp_path):
    url, out = f"http://127.0.0.1:{server.server_port}/maestro.zip", tmp_path / "out"
    with zipfile.ZipFile(archive) as file:
        third = file.infolist()[4].header_offset
    server.broken = (third + 300_000, third + 300_001)
    with pytest.raises(OSError, match="recording_0002.wav from .* failed .* run again"):
        preprocess(url, out)
    assert not shards.is_complete(out) and not (out / "skipped.csv").exists()
    server.broken = (0, 0)
    log = preprocess(url, out)
    assert any(re.search(r"[2-5] of 6 were ready already", line) for line in log)
    assert shard_bytes(out) == shard_bytes(run[0])
    assert server.sent <= 1.2 * len(server.content)


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/none.zip", "nothing://here/maestro.zip"])
def test_an_address_that_does_not_answer(address, tmp_path):
    with pytest.raises(InputError, match="cannot open"):
        preprocess(address, tmp_path / "out")


def tone(rate: int) -> np.ndarray:
    """Twelve seconds of 1 kHz at full scale."""
    return np.sin(2 * np.pi * 1000 * np.arange(12 * rate) / rate)


def write_odd_archive(source: Path) -> None:
    """One fine recording, stereo of 24 bits at 96 kHz, among everything that cannot be used."""
    fine = np.stack([0.5 * tone(96_000), np.zeros(12 * 96_000)], axis=1)
    holed = sound(12)
    holed[1000] = np.nan
    files = {
        "fine.wav": wav(fine, 96_000, "PCM_24"),
        "damaged.wav": wav(sound(12)),
        "silent.wav": wav(np.zeros(12 * RATE)),
        "short.wav": wav(sound(0.5)),
        "below_a_window.wav": wav(sound(9)),
        "nan.wav": wav(holed, subtype="FLOAT"),
        "truncated.wav": wav(sound(12))[:100_000],
        "no_audio.wav": b"<html>not found</html>",
        "empty.wav": wav(np.zeros(0)),
        "missing.wav": None,
    }
    rows = [{**row(), "midi_filename": "none.midi", "audio_filename": name, "duration": 12} for name in files]
    with zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("odd.csv", pd.DataFrame(rows).to_csv(index=False))
        for name, content in files.items():
            if content is not None:
                archive.writestr(name, content)
        offset = archive.getinfo("damaged.wav").header_offset
    content = bytearray(source.read_bytes())
    for at in range(offset + 5000, offset + 5200):
        content[at] ^= 0xFF
    source.write_bytes(content)


def test_every_unusable_recording_is_listed_and_odd_formats_come_through(tmp_path):
    source = tmp_path / "odd.zip"
    write_odd_archive(source)
    log = preprocess(source, tmp_path / "out")
    skipped = pd.read_csv(tmp_path / "out" / "skipped.csv").set_index("key")["reason"]
    reasons = {
        "damaged": "is damaged in", "silent": "silent", "short": "0.50 s long", "below_a_window": "shorter than one window",
        "nan": "NaN", "truncated": "half written", "no_audio": "cannot be read as audio", "empty": "empty",
        "missing": "is listed but not in",
    }  # fmt: skip
    assert set(skipped.index) == {f"{name}.wav" for name in reasons}
    for name, reason in reasons.items():
        assert reason in skipped[f"{name}.wav"]
        assert any(f"skipped {name}.wav: " in line for line in log)
    assert any("9 of 10 recordings skipped" in line for line in log)
    (example,) = shards.open_shards(tmp_path / "out", "train", made_by="it").examples
    expected, _ = audio.quantize(audio.log_mel(0.25 * tone(RATE).astype(np.float32), FRONT_END), FRONT_END)
    assert len(example["log_mel"]) == len(expected)
    loud = expected[10:-10] > 100
    assert loud.any() and np.abs(example["log_mel"][10:-10].astype(int) - expected[10:-10])[loud].max() <= 1


GOOD = ",".join(maestro.COLUMNS) + "\nA,B,train,2004,a.midi,a.wav,12\n"


@pytest.mark.parametrize(
    ("csv", "message"),
    [
        (GOOD.replace("split", "part"), "lacks the columns split"),
        (GOOD.replace("train", "dev"), "split 'dev' is none of train, validation, test"),
        (GOOD.replace("train", ""), "line 2: split is nan"),
        (GOOD.replace(",2004", ",MMIV"), "line 2: year is 'MMIV'"),
        (GOOD.replace("B,", ","), "line 2: canonical_title is nan"),
        (GOOD + GOOD.splitlines()[1], "lists a.wav twice"),
        (GOOD.splitlines()[0], "lists no recordings"),
        ("", "no readable CSV"),
        ("\xff\xfe", "no readable CSV"),
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
        "empty": "should hold one CSV",
        "none.zip": "no MAESTRO archive or folder",
        "table.zip": "is damaged",
    }.items():
        with pytest.raises(InputError, match=message):
            preprocess(tmp_path / name, tmp_path / "out")


def test_output_of_another_configuration_is_refused_and_a_complete_one_kept(archive, run, tmp_path):
    out, _ = run
    before = shard_bytes(out)
    assert preprocess(archive, out) == [f"shards in {out} are complete"]
    with pytest.raises(InputError, match="another configuration .*front_end.* Choose another output"):
        maestro.preprocess(str(archive), out, FrontEnd(fmin=30.0), workers=1)
    # Another source of the same name and size is another source.
    other = maestro.write_archive(tmp_path / "maestro.zip", [(row("test"), sound(11), b"MThd")] * 7, RATE)
    with pytest.raises(InputError, match="another configuration .*table"):
        preprocess(other, out)
    assert shard_bytes(out) == before


def test_opening_shards_says_what_is_missing(run, tmp_path):
    with pytest.raises(InputError, match="does not exist. Run notebook 01"):
        shards.open_shards(tmp_path / "none", "train", made_by="notebook 01")
    with pytest.raises(InputError, match="no split 'rated', only test, train, validation"):
        shards.open_shards(run[0], "rated", made_by="notebook 01")
    (tmp_path / "complete.json").write_text("{}")
    with pytest.raises(InputError, match="should hold one data set, holds 0. Delete it, run notebook 01"):
        shards.open_shards(tmp_path, "train", made_by="notebook 01")
