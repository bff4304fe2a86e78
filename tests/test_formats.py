"""Which files of a folder are recordings, what is left out, and names of any kind. Cost: 10 s."""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile

from percepiano_ast import audio, files

RATE = 44_100
# Formats by who makes them here. ffmpeg: more options; soundfile: format and subtype.
BY_FFMPEG = {
    "wav": "", "wave": "-f wav", "bwf": "-f wav", "rf64": "-f wav -rf64 always", "w64": "",
    "flac": "", "mp3": "", "mp2": "", "mpga": "-f mp3", "ogg": "", "oga": "",
    "spx": "-c:a libspeex", "ogx": "-f ogg -c:a libvorbis", "ogv": "", "opus": "", "aif": "",
    "aiff": "",
    "aifc": "-f aiff -c:a pcm_s16le", "au": "", "snd": "-f au", "caf": "", "m4a": "", "m4b": "",
    "m4r": "-f ipod", "aac": "", "adts": "-f adts", "latm": "", "ac3": "", "eac3": "",
    "dts": "-c:a dca -strict -2", "thd": "-f truehd -c:a truehd -strict -2", "wma": "", "asf": "",
    "wv": "", "tta": "", "ra": "-c:a ac3 -f rm", "voc": "", "sox": "", "nut": "",
    "weba": "-f webm", "mka": "", "mp4": "", "m4v": "", "f4v": "", "mov": "", "qt": "-f mov",
    "3gp": "-c:a aac", "3g2": "-c:a aac", "webm": "", "mkv": "", "avi": "", "wmv": "", "flv": "",
    "mpg": "", "vob": "", "mts": "-f mpegts", "m2ts": "-f mpegts -mpegts_m2ts_mode 1",
}  # fmt: skip
BY_SOUNDFILE = {"sph": "NIST", "nist": "NIST", "ircam": "IRCAM", "8svx": "SVX", "pvf": "PVF"}


@pytest.fixture(scope="module")
def takes(tmp_path_factory) -> Path:
    """One sound of two seconds in every format that can be made here."""
    if not shutil.which("ffmpeg"):
        pytest.skip("no ffmpeg to make recordings with")
    home = tmp_path_factory.mktemp("takes")
    wave = 0.2 * np.sin(np.arange(2 * RATE) / 20)
    for suffix, kind in BY_SOUNDFILE.items():
        soundfile.write(home / f"take.{suffix}", wave, RATE, format=kind, subtype="PCM_16")
    soundfile.write(home / "it.wav", wave, RATE)
    command = ["ffmpeg", "-v", "error", "-i", str(home / "it.wav")]
    for suffix, options in BY_FFMPEG.items():
        command += [*options.split(), str(home / f"take.{suffix}")]
    subprocess.run(command, check=True)
    (home / "it.wav").unlink()
    return home


@pytest.mark.parametrize("suffix", [*BY_FFMPEG, *BY_SOUNDFILE])
def test_what_rate_reads_when_named_is_found_in_a_folder(takes, tmp_path, suffix):
    """With its suffix in any case, with another one, and without; and it is what `load` reads."""
    content = (takes / f"take.{suffix}").read_bytes()
    names = [f"a.{suffix}", f"B.{suffix.upper()}", "c", "d.rec", "e.bin", f"f.{suffix}.1"]
    for name in names:
        (tmp_path / name).write_bytes(content)
    found, left = audio.find_recordings(tmp_path)
    assert [path.name for path in found] == sorted(names) and not left
    assert len(audio.load(found[0], RATE)) == pytest.approx(2 * RATE, rel=0.05)


def test_every_format_that_can_be_made_is_among_the_suffixes(takes):
    found, left = audio.find_recordings(takes)
    assert len(found) == len(BY_FFMPEG) + len(BY_SOUNDFILE) and not left


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"%PDF-1.7",
        b"MThd\0\0\0\6",
        b"RIFF\x24\0\0\0RMIDdata",
        b"RIFF\x24\0\0\0WEBPVP8 ",
        b"\xff\xd8\xff\xe0\0\x10JFIF",
        b"\x89PNG\r\n\x1a\n",
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
        b"\0\0\0\x1cftypavif\0\0\0\0",
        b"PK\3\4\x14\0\0\0",
        b"The wide sound of a piano",
        b"MAC addresses",
        b"ID3 tags are no music",
        b"<?xml version='1.0'?><score-partwise/>",
        "\ufefftext".encode("utf-16-le"),
        b"Gnu's not Unix. " * 30,
        b"\0" * 1000,
    ],
)
def test_what_does_not_begin_like_a_recording_is_none(tmp_path, content):
    for name in ("noname", "a.dat", "a.xyz", "a.mid", "a.pdf", "a.txt"):
        (tmp_path / name).write_bytes(content)
    found, left = audio.find_recordings(tmp_path)
    assert not found and set(left.values()) == {"other files are not recordings"} and len(left) == 6


def test_files_of_another_known_type_are_not_opened(tmp_path):
    """A folder on Drive may hold thousands of pictures."""
    for name in ("a.jpg", "b.png", "c.pdf", "d.zip", "e.txt", "f.csv", "g.mid", "h.midi", "i.json"):
        (tmp_path / name).write_bytes(b"RIFF\x24\0\0\0WAVE")
    assert not audio.find_recordings(tmp_path)[0]


def test_what_is_left_out_is_listed_by_its_reason(tmp_path):
    wave = b"RIFF\x24\0\0\0WAVE"
    names = {
        "take.wav.mp3": "",
        "take.wav.crdownload": "unfinished downloads",
        "take.mp3.part": "unfinished downloads",
        "take.wav~": "unfinished downloads",
        "Takes.gshortcut": "shortcuts hold no sound",
        "Notes.gdoc": "shortcuts hold no sound",
        "take.wav.lnk": "shortcuts hold no sound",
        ".take.wav": "hidden files",
        ".take.wav.icloud": "hidden files",
        "._take.wav": None,
        ".DS_Store": None,
        "Thumbs.db": None,
        "desktop.ini": None,
        "__MACOSX/take.wav": None,
        ".ipynb_checkpoints/take.wav": None,
        "@eaDir/take.wav": None,
        ".Trash-0/take.wav": "",
    }
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(wave)
    os.mkfifo(tmp_path / "pipe.wav")
    found, left = audio.find_recordings(tmp_path)
    assert [path.name for path in found] == ["take.wav.mp3"]
    reasons = {path.name: reason for path, reason in left.items()}
    expected = {name: reason for name, reason in names.items() if reason}
    expected |= {"pipe.wav": "devices or pipes", ".Trash-0": "hidden files or folders"}
    assert reasons.keys() == expected.keys()
    assert all(reasons[name].startswith(reason) for name, reason in expected.items())
    lines = files.summary(left)
    assert len(lines) == 4 and any(line.startswith("3 unfinished downloads or") for line in lines)


class TestLinks:
    """Links are followed, and nothing is found twice."""

    @pytest.fixture
    def home(self, tmp_path) -> Path:
        home = tmp_path / "home"
        for name in ("home/Bach/one.wav", "home/two.wav", "store/deep/three.wav", "store/4.wav"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"RIFF")
        return home

    def names(self, home: Path) -> tuple[list[str], list[str]]:
        found, left = audio.find_recordings(home)
        relative = [[path.relative_to(home).as_posix() for path in part] for part in (found, left)]
        return relative[0], relative[1]

    def test_folders_outside_are_followed_once(self, home):
        for name in ("all", "again"):
            (home / name).symlink_to(home.parent / "store")
        (home / "Bach" / "deep").symlink_to(home.parent / "store" / "deep")
        found, left = self.names(home)
        assert sorted(Path(name).name for name in found) == [
            "4.wav",
            "one.wav",
            "three.wav",
            "two.wav",
        ]
        assert not left

    def test_loops_end_and_files_have_their_own_names(self, home):
        (home / "Bach" / "up").symlink_to("..")
        (home / "Bach" / "here").symlink_to(".")
        (home / "a link to Bach").symlink_to("Bach")
        (home / "a.wav").symlink_to("two.wav")
        (home / "Bach" / "two again.wav").symlink_to("../two.wav")
        assert self.names(home) == (["Bach/one.wav", "two.wav"], [])

    def test_the_folder_around_is_not_followed_but_listed(self, home):
        (home / "around").symlink_to(home.parent)
        assert self.names(home) == (["Bach/one.wav", "two.wav"], ["around"])

    def test_links_to_files_have_the_name_of_the_link(self, home):
        (home / "b.wav").symlink_to(home.parent / "store" / "4.wav")
        (home / "c.wav").symlink_to(home.parent / "store" / "4.wav")
        assert self.names(home) == (["Bach/one.wav", "b.wav", "two.wav"], [])

    def test_links_to_nothing_are_listed(self, home):
        (home / "gone.wav").symlink_to("nowhere.wav")
        (home / "self.wav").symlink_to("self.wav")
        (home / "gone").symlink_to("/nowhere/at all")
        found, left = self.names(home)
        assert len(found) == 2 and left == ["gone", "gone.wav", "self.wav"]

    def test_the_folder_itself_may_be_a_link(self, home):
        (home.parent / "link").symlink_to(home)
        assert self.names(home.parent / "link") == (["Bach/one.wav", "two.wav"], [])

    @pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
    def test_unreadable_folders_are_listed(self, home):
        (home / "Bach").chmod(0)
        found, left = audio.find_recordings(home)
        (home / "Bach").chmod(0o700)
        assert [path.name for path in found] == ["two.wav"]
        assert left == {home / "Bach": "folders cannot be read (Permission denied)"}


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        (b"plain \xc3\xa9 \xe2\x99\xad %s {} <b>.wav", "plain é ♭ %s {} <b>.wav", None),
        (b"caf\xe9.wav", "caf\\xe9.wav", None),
        (b"\xff\xfe\x80", "\\xff\\xfe\\x80", None),
        (b"\xed\xa0\x80.wav", "\\xed\\xa0\\x80.wav", None),
        (b"a\nb\r\tc.wav", "a\nb\r\tc.wav", "a\\nb\\r\\tc.wav"),
        (b"\x1b[31mred\x7f.wav", "\x1b[31mred\x7f.wav", "\\x1b[31mred\\x7f.wav"),
        (
            "a\u2028b\u202ec\x85.wav".encode(),
            "a\u2028b\u202ec\x85.wav",
            "a\\u2028b\\u202ec\\x85.wav",
        ),
        ("e\u0301\u200d\u3000.wav".encode(), "e\u0301\u200d\u3000.wav", None),
    ],
)
def test_names_are_shown_on_one_line_of_utf8(name, text, line):
    name = os.fsdecode(name)
    assert files.as_text(name) == text and files.printable(Path(name)) == (line or text)
    assert files.printable(name).encode() and len(files.printable(name).splitlines()) == 1


def test_names_with_surrogates_that_stand_for_no_byte_are_shown_too():
    assert files.printable("a\ud800\udc80.wav") == "a\\ud800\\udc80.wav"


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("take.wav", "take"),
        ("Take.01.FLAC", "Take.01"),
        ("take.wav.mp3", "take.wav"),
        ("take.3gp", "take"),
        ("take.rec", "take"),
        ("Sonata D. 960", "Sonata D. 960"),
        ("K.331", "K.331"),
        ("Op. 27 No. 2", "Op. 27 No. 2"),
        ("take", "take"),
    ],
)
def test_the_suffix_of_a_recording_is_no_part_of_its_name(name, stem):
    assert audio.stem(name) == stem
