"""Recordings are decoded from front to back in bounded memory, whole or not at all. About 40 s.

The tests of M4A run with the ffmpeg on PATH, if there is one, and with that of the package
imageio-ffmpeg.
"""

import contextlib
import functools
import io
import os
import re
import shutil
import struct
import subprocess
import sys
import tracemalloc
import zipfile

import imageio_ffmpeg
import numpy as np
import pytest
import soundfile

from percepiano_ast import audio
from percepiano_ast.config import FrontEnd
from percepiano_ast.errors import InputError

RATE = FrontEnd().sample_rate


class Forward:
    """A file object that is read once, and may fail."""

    def __init__(self, content: bytes, *, fails_at: int = -1, error: Exception | None = None):
        self.file, self.fails_at, self.error = io.BytesIO(content), fails_at, error

    def seekable(self) -> bool:
        return False

    def read(self, size: int = -1) -> bytes:
        if self.error and self.file.tell() >= self.fails_at:
            raise self.error
        # a short read is not the end
        return self.file.read(min(size, 50_000) if size >= 0 else size)

    def at_end(self) -> bool:
        return not self.file.read(1)


def noise(seconds=3.0, rate=44_100, channels=2, seed=0):
    shape = round(seconds * rate), channels
    return np.random.default_rng(seed).uniform(-0.5, 0.5, shape).astype(np.float32)


def sound_file(wave, rate=44_100, kind="WAV", subtype="PCM_16") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=kind, subtype=subtype)
    return file.getvalue()


def chunk(name: bytes, content: bytes, declared: int | None = None) -> bytes:
    length = len(content) if declared is None else declared
    return name + struct.pack("<I", length) + content + b"\0" * (len(content) % 2)


def wav_file(wave, *, before=b"", after=b"", declared=None, riff=None, subtype="PCM_16") -> bytes:
    """A WAV file with chunks before and behind its sound, and with lengths of one's own in its
    header."""
    plain = sound_file(wave, subtype=subtype)
    at = plain.index(b"data")
    (length,) = struct.unpack("<I", plain[at + 4 : at + 8])
    body = plain[12:at] + before + chunk(b"data", plain[at + 8 : at + 8 + length], declared) + after
    return chunk(b"RIFF", b"WAVE" + body, riff)


SUBTYPES = {
    "WAV": "PCM_U8 PCM_16 PCM_24 PCM_32 FLOAT DOUBLE ALAW ULAW IMA_ADPCM MS_ADPCM".split(),
    "WAVEX": "PCM_16 PCM_24 FLOAT".split(),
    "RF64": "PCM_16 PCM_24 FLOAT".split(),
    "W64": "PCM_16 PCM_24 FLOAT".split(),
    "FLAC": "PCM_S8 PCM_16 PCM_24".split(),
    "AIFF": ["PCM_24"],
    "OGG": ["VORBIS"],
    "MP3": ["MPEG_LAYER_III"],
}


@pytest.mark.parametrize(
    ("kind", "subtype"), [(kind, subtype) for kind, all_ in SUBTYPES.items() for subtype in all_]
)
def test_what_comes_once_is_decoded_as_from_a_path(tmp_path, kind, subtype):
    content = sound_file(noise(), kind=kind, subtype=subtype)
    path = tmp_path / "take"
    path.write_bytes(content)
    expected = audio.load(path)
    np.testing.assert_array_equal(audio.load(io.BytesIO(content)), expected)
    source = Forward(content)
    np.testing.assert_array_equal(audio.load(source), expected)
    assert source.at_end()


@pytest.mark.parametrize(
    ("kind", "subtype"), [("MP3", "MPEG_LAYER_III"), ("OGG", "VORBIS"), ("FLAC", "PCM_24")]
)
def test_blocks_leave_no_seams(kind, subtype):
    wave = np.sin(np.arange(15 * RATE) / 20)
    content = sound_file(0.5 * wave, RATE, kind, subtype)
    whole, _ = soundfile.read(io.BytesIO(content), dtype="float32")
    np.testing.assert_allclose(audio.load(io.BytesIO(content)), whole, atol=1e-6)


TEXT = chunk(b"LIST", b"INFOINAM" + struct.pack("<I", 7) + b"Sonata\0\0")


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
@pytest.mark.parametrize(
    "before", [b"", TEXT, chunk(b"junk", b"odd"), chunk(b"JUNK", bytes(200_001))]
)
@pytest.mark.parametrize("after", [b"", TEXT + chunk(b"id3 ", bytes(3001)), b"no chunk" * 100])
def test_chunks_around_the_sound_do_not_matter(before, after, subtype):
    wave = noise(seconds=1.1, channels=1)[:-1]  # an odd number of bytes with 24 bits
    expected = audio.load(io.BytesIO(sound_file(wave, subtype=subtype)))
    content = wav_file(wave, before=before, after=after, subtype=subtype)
    for source in (io.BytesIO(content), Forward(content)):
        np.testing.assert_array_equal(audio.load(source), expected)


def test_chunks_behind_long_sound_do_not_matter():
    wave = noise(seconds=40)  # 7 MB
    content = wav_file(wave, before=TEXT, after=TEXT)
    source = Forward(content)
    blocks = audio.Recording(source).blocks(RATE)
    first = next(blocks)
    assert len(first) + sum(map(len, blocks)) == 40 * RATE and source.at_end()
    np.testing.assert_array_equal(audio.load(Forward(content)), audio.load(io.BytesIO(content)))


@pytest.mark.parametrize("kind", ["WAV", "WAVEX", "RF64", "W64", "FLAC", "AIFF", "AU"])
def test_half_written_files_are_refused_wherever_they_come_from(kind, tmp_path):
    content = sound_file(noise(), kind=kind)
    half = content[: len(content) // 2]
    path = tmp_path / "half"
    path.write_bytes(half)
    for source in (path, io.BytesIO(half), Forward(half)):
        with pytest.raises(
            InputError, match=r"truncated, .*(1\.\d s before the length it declares|about 1\.\d s)"
        ):
            audio.load(source)


def test_wav_without_a_length_is_read_to_the_end():
    wave = noise()
    expected = audio.load(io.BytesIO(sound_file(wave)))
    # a pipe; never closed
    for lengths in ({"declared": 0xFFFFFFFF, "riff": 0xFFFFFFFF}, {"declared": 0, "riff": 8}):
        content = wav_file(wave, before=TEXT, **lengths)
        for source in (io.BytesIO(content), Forward(content)):
            np.testing.assert_array_equal(audio.load(source), expected)


def test_flac_without_a_length_is_read_to_the_end(tmp_path):
    content = bytearray(sound_file(noise(), kind="FLAC"))
    content[21] &= 0xF0  # 36 bits of STREAMINFO
    content[22:26] = bytes(4)
    path = tmp_path / "take.flac"
    path.write_bytes(content)
    for source in (path, io.BytesIO(content), Forward(bytes(content))):
        np.testing.assert_array_equal(
            audio.load(source), audio.load(io.BytesIO(sound_file(noise(), kind="FLAC")))
        )
    assert audio.duration(path) == 3


class LongWav:
    """A stereo WAV file of 44.1 kHz that is made while it is read."""

    def __init__(self, minutes: float):
        n = round(minutes * 60 * 44_100) * 4
        header = sound_file(np.zeros((1, 2)))[:44]
        self.ready = header[:4] + struct.pack("<I", n + 36) + header[8:40] + struct.pack("<I", n)
        self.left = len(self.ready) + n
        self.sound = (16_000 * noise(seconds=1)).astype("<i2").tobytes()

    def seekable(self) -> bool:
        return False

    def read(self, size: int) -> bytes:
        size = min(size, self.left)
        while len(self.ready) < size:
            self.ready += self.sound
        part, self.ready = self.ready[:size], self.ready[size:]
        self.left -= size
        return part


def test_half_an_hour_becomes_a_spectrogram_in_little_memory():
    front_end = FrontEnd()
    frames = 0
    tracemalloc.start()
    try:
        recording = audio.Recording(LongWav(minutes=30))
        for levels in audio.log_mel_blocks(recording.blocks(front_end.sample_rate), front_end):
            frames += len(levels)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert frames == front_end.n_frames(30 * 60 * RATE) and recording.seconds == 1800
    assert peak < 40e6  # the waveform would be 159 MB, the file is 318 MB


# --- What the source says -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG"])
@pytest.mark.parametrize(
    "error", [OSError("unplugged"), zipfile.BadZipFile("Bad CRC-32"), KeyError("its own")]
)
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_what_the_source_raises_comes_out_as_it_is(kind, error, share, capfd):
    content = sound_file(noise(), kind=kind, subtype="VORBIS" if kind == "OGG" else "PCM_16")
    with pytest.raises(type(error)) as caught:
        audio.load(Forward(content, fails_at=int(share * len(content)), error=error))
    assert caught.value is error
    assert capfd.readouterr().err == ""


def test_a_seekable_source_may_fail_too(capfd):
    class Breaks(io.BytesIO):
        def read(self, size=-1):
            if self.tell() > 100_000:
                raise ConnectionError("gone")
            return super().read(size)

    for kind in ("WAV", "FLAC"):
        with pytest.raises(ConnectionError, match="gone"):
            audio.load(Breaks(sound_file(noise(), kind=kind)))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", ["WAV", "FLAC"])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_member_of_an_archive_is_reported_by_the_archive(kind, method, tmp_path):
    path = tmp_path / "archive.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("take", sound_file(noise(), kind=kind))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x55
    path.write_bytes(content)
    with zipfile.ZipFile(path) as archive, archive.open("take") as member:
        member.seekable = lambda: False
        with pytest.raises(Exception, match="Bad CRC-32|decompressing") as caught:
            audio.load(member)
    assert not isinstance(caught.value, InputError)


def test_a_refused_recording_is_read_to_its_end():
    silent = Forward(sound_file(np.zeros((200_000, 2))))
    with pytest.raises(InputError, match="silent"):
        audio.load(silent)
    wave = noise(seconds=60)
    wave[0] = np.nan
    broken = Forward(sound_file(wave, subtype="FLOAT"))
    with pytest.raises(InputError, match="NaN"):
        audio.load(broken)
    assert silent.at_end() and broken.at_end()


# --- What a recording knows of itself -----------------------------------------------------------


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
def test_length_peak_and_share_at_full_scale(subtype):
    wave = noise(seconds=2)
    wave[1000:2000, 0] = 32767 / 32768
    wave[3000:3500, 1] = -1
    wave[5000:9000] = 32766 / 32768
    recording = audio.Recording(io.BytesIO(sound_file(wave, subtype=subtype)))
    assert (recording.sample_rate, recording.channels) == (44_100, 2)
    whole = np.concatenate(list(recording.blocks(44_100)))
    assert recording.seconds == 2.0
    assert recording.full_scale == 1500 / wave.size
    assert recording.peak == np.abs(whole).max() == pytest.approx(32766 / 32768)


def test_a_recording_of_too_low_a_rate_is_refused_where_asked():
    content = sound_file(noise(rate=8000), rate=8000)
    with pytest.raises(
        InputError, match="take.wav: recorded at 8,000 Hz; at least 16,000 Hz is needed"
    ):
        audio.Recording(io.BytesIO(content), name="take.wav", min_rate=16_000)
    assert audio.Recording(io.BytesIO(content)).sample_rate == 8000


def test_only_the_first_seconds_are_decoded_where_asked():
    recording = audio.Recording(Forward(sound_file(noise(seconds=60))))
    assert sum(map(len, recording.blocks(RATE, max_seconds=2))) == 2 * RATE
    assert recording.seconds == 2


# --- ffmpeg -------------------------------------------------------------------------------------


@pytest.fixture(params=["system", "package"])
def ffmpeg(request, monkeypatch) -> str:
    """The system's ffmpeg, and that of the package imageio-ffmpeg, which serves where the system
    has none."""
    if request.param == "system":
        return shutil.which("ffmpeg") or pytest.skip("no ffmpeg on PATH")
    monkeypatch.setenv("PATH", "")
    return imageio_ffmpeg.get_ffmpeg_exe()


def encoded(ffmpeg: str, folder, name: str, *options: str):
    """A stereo recording of three notes in a format of ffmpeg's, and the same as WAV."""
    time = np.arange(4 * 44_100) / 44_100
    left = sum(0.2 * np.sin(2 * np.pi * f * time) for f in (220, 277, 330)) * np.exp(-time)
    plain, coded = folder / "plain.wav", folder / name
    soundfile.write(plain, np.stack([left, 0.5 * left], axis=1), 44_100)
    subprocess.run([ffmpeg, "-v", "error", "-y", "-i", plain, *options, coded], check=True)
    return coded, plain


FAST_START = ("-movflags", "+faststart", "-b:a", "192k")


def test_m4a_sounds_like_the_wav(ffmpeg, tmp_path):
    coded, plain = encoded(ffmpeg, tmp_path, "take.m4a", "-b:a", "192k")
    heard, expected = audio.load(coded), audio.load(plain)
    assert len(heard) == pytest.approx(len(expected), abs=1024)  # whole frames of AAC
    difference = (heard[: len(expected)] - expected)[RATE // 10 :]
    assert np.sqrt(np.mean(difference**2)) < 0.02 * np.sqrt(np.mean(expected**2))
    assert audio.duration(coded) == pytest.approx(4, abs=0.05)


@pytest.mark.parametrize("name", ["take.aac", "take.wma", "take.mka"])
def test_what_else_ffmpeg_reads(ffmpeg, tmp_path, name):
    coded, plain = encoded(ffmpeg, tmp_path, name, "-b:a", "192k")
    heard, expected = audio.load(coded), audio.load(plain)
    # an encoder's run-up stays in
    assert len(heard) == pytest.approx(len(expected), abs=0.1 * RATE)
    assert np.sum(heard**2) == pytest.approx(np.sum(expected**2), rel=0.15)
    assert audio.duration(coded) == pytest.approx(4, abs=1)  # of raw AAC a guess


def test_lossless_m4a_gives_the_samples_of_the_wav(ffmpeg, tmp_path):
    coded, plain = encoded(ffmpeg, tmp_path, "-take %d.m4a", "-c:a", "alac")
    np.testing.assert_array_equal(audio.load(coded), audio.load(plain))
    recording = audio.Recording(coded)
    assert (recording.sample_rate, recording.channels) == (44_100, 2)
    assert sum(map(len, recording.blocks(RATE, max_seconds=1.5))) == 1.5 * RATE
    assert recording.seconds == 1.5


@pytest.mark.parametrize("options", [(), FAST_START])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_a_cut_off_m4a_is_refused(ffmpeg, tmp_path, options, share):
    coded, _ = encoded(ffmpeg, tmp_path, "take.m4a", *options)
    coded.write_bytes(coded.read_bytes()[: int(share * coded.stat().st_size)])
    with pytest.raises(
        InputError, match=r"take.m4a: (cannot be read as audio|damaged or truncated)"
    ):
        audio.load(coded)


def test_a_damaged_m4a_is_refused(ffmpeg, tmp_path):
    coded, _ = encoded(ffmpeg, tmp_path, "take.m4a", *FAST_START)
    content = bytearray(coded.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 400] = b"?" * 400
    coded.write_bytes(content)
    with pytest.raises(InputError, match=r"take.m4a: damaged or truncated \(ffmpeg: "):
        audio.load(coded)


def test_a_text_is_no_recording_for_ffmpeg_either(ffmpeg, tmp_path):
    path = tmp_path / "notes.m4a"
    path.write_text("This is a text. " * 100)
    for function in (audio.load, audio.duration):
        with pytest.raises(InputError, match=r"notes.m4a: cannot be read as audio \("):
            function(path)


def test_where_ffmpeg_is_missing_the_message_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    path = tmp_path / "take.m4a"
    path.write_bytes(b"\0\0\0\x1cftypM4A \0\0\2\0" + bytes(100))
    for function in (audio.load, audio.duration):
        with pytest.raises(
            InputError,
            match=(
                "take.m4a: .*ffmpeg, which was not found.*pip install imageio-ffmpeg.*apt-get"
                " install -y ffmpeg"
            ),
        ):
            function(path)


@pytest.mark.parametrize(
    ("kind", "subtype"), [("WAV", "PCM_24"), ("FLAC", "PCM_16"), ("OGG", "VORBIS")]
)
def test_duration_is_read_from_the_header(tmp_path, kind, subtype):
    path = tmp_path / "take"
    path.write_bytes(sound_file(noise(), kind=kind, subtype=subtype))
    assert audio.duration(path) == pytest.approx(3)
    with pytest.raises(InputError, match="nowhere.wav: no such file"):
        audio.duration(tmp_path / "nowhere.wav")


# --- Lengths that encoders could not write ------------------------------------------------------


@pytest.fixture
def no_ffmpeg(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)


def with_lengths(kind: str, **lengths: int | None) -> bytes:
    """A sound file whose lengths are replaced."""
    content = bytearray(sound_file(noise(seconds=1.5), kind=kind))
    order = "big" if kind in ("AIFF", "AU", "CAF") else "little"
    data = content.find(b"SSND" if kind == "AIFF" else b"data")
    places = {
        "file": (16, 8) if kind == "W64" else (4, 4),
        "sound": {"W64": (data + 16, 8), "CAF": (data + 4, 8), "AU": (8, 4)}.get(
            kind, (data + 4, 4)
        ),
        "frames": (content.find(b"COMM") + 10, 4),
        "ds64": (20, 24),
    }
    for name, value in lengths.items():
        if value is not None:
            at, size = places[name]
            if name == "ds64":
                content[at : at + size] = (value % 2**64).to_bytes(8, order) * 3
            else:
                content[at : at + size] = (value % 256**size).to_bytes(size, order)
    return bytes(content)


PIPED = (0, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFDB, 0xFFFFFFFF)
PLACEHOLDERS = [
    *[("WAV", {"file": a, "sound": b}) for a in (*PIPED, 8, 36, 0x7FFFF024) for b in PIPED],
    *[("WAV", {"sound": b}) for b in (*PIPED, 0x80000024, 0xFFFFFFFC, 0x7F000000)],
    *[("WAVEX", {"file": 0, "sound": b}) for b in PIPED],
    *[("RF64", {"ds64": value}) for value in (0, -1, 2**63 - 1, 0xFFFFFFFF)],
    *[("W64", {"file": value, "sound": value}) for value in (0, 24, -1, 2**63 - 1)],
    *[("AU", {"sound": value}) for value in PIPED],
    ("AIFF", {"file": 0x7F00002E, "frames": 0x7F000000 // 4, "sound": 2_130_706_440}),  # SoX
    *[("AIFF", {"file": a, "frames": a, "sound": a}) for a in (0, 0x7FFFFFFF, -1)],
    ("AIFF", {"file": 46, "frames": 0, "sound": 8}),
    ("AIFF", {"frames": 0}),
    ("AIFF", {"sound": 0}),
    ("AIFF", {"sound": -1}),
    *[("CAF", {"sound": value}) for value in (0, 4, -1)],
]


@pytest.mark.parametrize(("kind", "lengths"), PLACEHOLDERS)
def test_placeholders_for_lengths_do_not_matter(tmp_path, no_ffmpeg, kind, lengths):
    expected = audio.load(io.BytesIO(sound_file(noise(seconds=1.5))))
    path = tmp_path / "take"
    path.write_bytes(with_lengths(kind, **lengths))
    np.testing.assert_array_equal(audio.load(path), expected)
    assert audio.duration(path) == 1.5


def test_damaged_headers_with_placeholders_end_in_a_result_or_a_refusal(no_ffmpeg, tmp_path, capfd):
    rng, path = np.random.default_rng(0), tmp_path / "take"
    for _ in range(300):
        kind, lengths = PLACEHOLDERS[rng.integers(len(PLACEHOLDERS))]
        content = bytearray(with_lengths(kind, **lengths))
        for at in rng.integers(120, size=5):
            content[at] = rng.integers(256)
        path.write_bytes(content[: rng.integers(100, len(content))])
        with contextlib.suppress(InputError):
            audio.load(path)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("length", [None, 0, 0xFFFFFFFF])
def test_chunks_behind_an_empty_recording_are_not_its_sound(length):
    content = wav_file(noise(seconds=0.0), after=TEXT + chunk(b"JUNK", bytes(200_000)), riff=length)
    with pytest.raises(InputError, match="empty"):
        audio.load(io.BytesIO(content))


@pytest.mark.parametrize("declared", [0x00500000, 0x10000000, 0x70123456, 0xC0DE0000 - 0x123456])
def test_a_length_that_is_no_placeholder_means_a_cut_recording(declared):
    with pytest.raises(InputError, match="truncated"):
        audio.load(io.BytesIO(with_lengths("WAV", sound=declared)))


# --- MP3 ----------------------------------------------------------------------------------------


@functools.cache
def mp3(mode="VARIABLE", tag=True) -> bytes:
    """Soft, then loud, so that the bit rate of the first frames is not that of the others."""
    wave = noise(seconds=8, rate=RATE, channels=1)
    wave[: 2 * RATE] *= 1e-4
    file = io.BytesIO()
    soundfile.write(file, wave, RATE, format="MP3", bitrate_mode=mode, compression_level=0.5)
    content = file.getvalue()
    assert content.count(b"Xing") + content.count(b"Info") == 1
    return content if tag else content.replace(b"Xing", bytes(4)).replace(b"Info", bytes(4))


def id3(size: int) -> bytes:
    digits = bytes((size >> shift) & 127 for shift in (21, 14, 7, 0))
    return b"ID3\3\0\0" + digits + np.random.default_rng(1).bytes(size)


ID3V1 = b"TAG" + b"a" * 125
APE = b"APETAGEX" + struct.pack("<4I8x", 2000, 64, 1, 0) + b"z" * 64


@pytest.mark.parametrize("mode", ["CONSTANT", "AVERAGE", "VARIABLE"])
@pytest.mark.parametrize(
    ("before", "after", "by"),
    [
        pytest.param(b"", b"", "ffmpeg", id="plain"),
        pytest.param(b"", b"", "no_ffmpeg", id="plain, no ffmpeg"),
        pytest.param(id3(300_000), b"", "ffmpeg", id="ID3v2"),
        pytest.param(id3(300_000), b"", "no_ffmpeg", id="ID3v2, no ffmpeg"),
        pytest.param(b"", APE + ID3V1, "ffmpeg", id="APE and ID3v1"),
        pytest.param(b"", APE + ID3V1, "no_ffmpeg", id="APE and ID3v1, no ffmpeg"),
        pytest.param(b"", bytes(5000), "ffmpeg", id="zeros behind"),
        pytest.param(bytes(3000), b"", "ffmpeg", id="zeros before"),
    ],
)
def test_mp3_without_a_length_is_decoded_to_its_end(
    tmp_path, request, capfd, mode, before, after, by
):
    if by == "no_ffmpeg":
        request.getfixturevalue("no_ffmpeg")
    path = tmp_path / "take.mp3"
    path.write_bytes(before + mp3(mode, tag=False) + after)
    wave = audio.load(path)
    assert len(wave) == pytest.approx(8 * RATE, abs=0.12 * RATE)
    assert audio.duration(path) == len(wave) / RATE
    known = audio.load(io.BytesIO(mp3(mode)))
    assert np.sum(wave**2) == pytest.approx(np.sum(known**2), rel=0.01)
    assert capfd.readouterr().err == ""


def test_mp3_with_a_length_is_decoded_as_before(tmp_path, no_ffmpeg, capfd):
    with soundfile.SoundFile(io.BytesIO(mp3())) as file:
        expected = file.read(dtype="float32")
    for content in (mp3(), id3(300_000) + mp3(), mp3() + APE + ID3V1):
        np.testing.assert_array_equal(audio.load(io.BytesIO(content)), expected)
    with pytest.raises(InputError, match=r"truncated, the audio ends [234]\.\d s before"):
        audio.load(io.BytesIO(mp3()[: len(mp3()) // 2]))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("between", [b"", ID3V1 + id3(2000)], ids=["", "tags between"])
@pytest.mark.parametrize("tags", [(True, True), (True, False), (False, True), (False, False)])
def test_joined_mp3_is_decoded_whole(ffmpeg, tags, between):
    first, second = (mp3(tag=tag) for tag in tags)
    recording = audio.Recording(io.BytesIO(first + between + second))
    wave = recording.read(RATE)
    assert len(wave) == pytest.approx(16 * RATE, abs=0.3 * RATE)
    middles = [np.abs(wave[round((k + 0.3) * RATE) :][: RATE // 2]).max() for k in range(16)]
    assert [peak > 0.1 for peak in middles] == 2 * [False, False, *6 * [True]]
    assert bool(recording.remarks) <= bool(between)


def test_mp3_with_a_bit_rate_of_its_own_is_decoded_whole(ffmpeg, tmp_path):
    options = "-ar 48000 -b:a 128k -write_xing 0 -id3v2_version 0".split()
    coded, _ = encoded(ffmpeg, tmp_path, "take.mp3", *options)
    expected, content = audio.load(coded), bytearray(coded.read_bytes())
    assert len(content) % 384 == 0
    content[2::384] = bytes(value & 0x0F for value in content[2::384])
    np.testing.assert_allclose(audio.load(io.BytesIO(content)), expected, atol=2e-4)


def test_without_ffmpeg_what_was_left_out_of_joined_mp3_is_said(no_ffmpeg):
    recording = audio.Recording(io.BytesIO(mp3() + mp3()))
    assert len(recording.read(RATE)) == 8 * RATE
    assert (
        "bytes behind the length that the MP3 file declares were left out" in (recording.remarks[0])
    )


# --- Joined recordings, and what libsndfile does not read ---------------------------------------


@pytest.mark.parametrize(
    ("kind", "subtype"),
    [("OGG", "VORBIS"), ("OGG", "OPUS"), ("FLAC", "PCM_16"), ("FLAC", "PCM_24"), ("WAV", "PCM_16")]
    + [("AIFF", "PCM_16")],
)
def test_joined_recordings_are_decoded_one_after_the_other(tmp_path, no_ffmpeg, kind, subtype):
    rate = 24_000
    parts = [
        sound_file(noise(seconds, rate, 1, seed=seed), rate, kind, subtype)
        for seed, seconds in enumerate((1.5, 7.0, 2.0))
    ]
    path = tmp_path / "take"
    path.write_bytes(b"".join(parts))
    expected = [audio.load(io.BytesIO(part), rate) for part in parts]
    np.testing.assert_array_equal(audio.load(path, rate), np.concatenate(expected))
    assert audio.duration(path) == pytest.approx(10.5, abs=0.001)


@pytest.mark.parametrize(("kind", "subtype"), [("OGG", "VORBIS"), ("FLAC", "PCM_16")])
@pytest.mark.parametrize(("rate", "channels"), [(48_000, 1), (24_000, 2)])
def test_what_is_left_out_of_joined_recordings_is_said(kind, subtype, rate, channels):
    first = sound_file(noise(1.5, 24_000, 1), 24_000, kind, subtype)
    other = sound_file(noise(1.5, rate, channels), rate, kind, subtype)
    recording = audio.Recording(io.BytesIO(first + first + other + first))
    assert len(recording.read(24_000)) == 72_000
    what = (
        rf"2 of 4 recordings joined in the file were left out \({rate:,} Hz, channels: {channels}"
    )
    assert re.match(what, recording.remarks[0])


def test_joined_m4a_is_decoded_whole(ffmpeg, tmp_path):
    coded, _ = encoded(ffmpeg, tmp_path, "take.m4a", "-c:a", "alac")
    once = audio.load(coded)
    coded.write_bytes(2 * coded.read_bytes())
    np.testing.assert_array_equal(
        audio.load(coded, 44_100)[: 4 * 44_100], audio.load(coded, 44_100)[4 * 44_100 :]
    )
    assert len(audio.load(coded)) == 2 * len(once)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("take.oga", ("-c:a", "flac")),
        ("take.ogg", ("-c:a", "flac")),
        ("take.mka", ("-c:a", "flac")),
        ("take.caf", ("-c:a", "alac")),
        ("take.wv", ()),
        ("take.tta", ()),
        ("take.mov", ("-c:a", "pcm_s16be")),
        ("take.aiff", ("-c:a", "pcm_s16le")),
        ("take.avi", ("-c:a", "pcm_s16le")),
    ],
)
def test_lossless_formats_give_the_samples_of_the_wav(ffmpeg, tmp_path, name, options):
    coded, plain = encoded(ffmpeg, tmp_path, name, *options)
    np.testing.assert_array_equal(audio.load(coded), audio.load(plain))
    assert audio.duration(coded) == 4


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("take.wav", ("-c:a", "adpcm_ima_wav")),
        ("take.wav", ("-c:a", "adpcm_ms")),
        ("take.wav", ("-c:a", "pcm_alaw")),
        ("take.au", ("-c:a", "pcm_mulaw")),
        ("take.opus", ("-c:a", "libopus", "-b:a", "160k")),
        ("take.wav", ("-c:a", "libmp3lame", "-b:a", "192k")),
    ],
)
def test_lossy_formats_sound_like_the_wav(ffmpeg, tmp_path, name, options):
    coded, plain = encoded(ffmpeg, tmp_path, name, *options)
    found, expected = audio.load(coded), audio.load(plain)
    assert len(found) == pytest.approx(len(expected), abs=0.1 * RATE)
    assert np.sum(found**2) == pytest.approx(np.sum(expected**2), rel=0.1)


def test_a_text_named_au_is_not_taken_for_raw_samples(ffmpeg, tmp_path):
    for suffix in ("au", "vox", "gsm", "raw"):
        path = tmp_path / f"notes.{suffix}"
        path.write_text("This is a text. " * 5000)
        with pytest.raises(InputError, match="cannot be read as audio"):
            audio.load(path)


def test_tags_around_flac_do_not_matter(ffmpeg):
    plain = sound_file(noise(), kind="FLAC")
    expected = audio.load(io.BytesIO(plain))
    unsized = bytearray(plain)
    unsized[21] &= 0xF0  # 36 bits of STREAMINFO
    unsized[22:26] = bytes(4)
    for content in (plain + ID3V1, bytes(unsized)):
        np.testing.assert_array_equal(audio.load(io.BytesIO(content)), expected)
    np.testing.assert_array_equal(audio.load(io.BytesIO(id3(3000) + plain)), expected)


# --- A constant offset --------------------------------------------------------------------------


def tones(rate=RATE, seconds=9.0):
    time = np.arange(round(rate * seconds)) / rate
    wave = sum(np.sin(2 * np.pi * f * time) for f in (55, 220, 277, 1330)) * np.exp(-(time % 1.5))
    return (0.1 * wave).astype(np.float32)


@pytest.mark.parametrize("offset", [0.003, -0.01, 0.03, -0.1, 0.3, -0.3])
@pytest.mark.parametrize(
    ("subtype", "rate"), [("PCM_16", RATE), ("FLOAT", RATE), ("FLOAT", 48_000)]
)
def test_a_constant_offset_is_removed_and_said(offset, subtype, rate):
    wave = tones(rate)
    clean = audio.Recording(io.BytesIO(sound_file(wave, rate, subtype=subtype)))
    shifted = audio.Recording(io.BytesIO(sound_file(wave + offset, rate, subtype=subtype)))
    expected, found = clean.read(RATE), shifted.read(RATE)
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert abs(found.mean()) < 2e-5 and shifted.peak == pytest.approx(clean.peak, abs=1e-3)
    assert clean.remarks == []
    assert shifted.remarks == [f"a constant offset of {offset:+.1g} of full scale was removed"]


def test_an_offset_of_one_channel_or_between_silence_is_removed():
    wave = np.stack([tones(), tones()], axis=1)
    expected = audio.load(io.BytesIO(sound_file(wave, RATE, subtype="FLOAT")))
    shifted = wave + np.array([0, 0.1], np.float32)
    found = audio.load(io.BytesIO(sound_file(shifted, RATE, subtype="FLOAT")))
    np.testing.assert_allclose(found, expected, atol=1e-3)
    pause = np.zeros((round(2.7 * RATE), 2), np.float32)
    around = np.concatenate([pause, shifted, pause, shifted, pause])
    found = audio.load(io.BytesIO(sound_file(around, RATE, subtype="FLOAT")))
    parts = [pause[:, 0], expected, pause[:, 0], expected, pause[:, 0]]
    np.testing.assert_allclose(found, np.concatenate(parts), atol=1e-3)


@pytest.mark.parametrize("length", [1000, 5000, RATE, 100_000])
def test_a_wave_without_an_offset_passes_unchanged_in_blocks_of_any_length(length):
    wave = np.concatenate([np.zeros(30_000, np.float32), tones()])
    offset = audio.OffsetFilter(RATE)
    blocks = [wave[start : start + length] for start in range(0, len(wave), length)]
    found = [offset(block) for block in blocks] + [offset(wave[:0], last=True)]
    np.testing.assert_array_equal(np.concatenate(found), wave)


def test_an_offset_alone_is_silence_and_hides_no_clipping():
    with pytest.raises(InputError, match="silent"):
        audio.load(io.BytesIO(sound_file(np.full((RATE * 3, 2), 0.1), RATE)))
    wave = np.clip(20 * tones() + 0.2, -1, 1)
    recording = audio.Recording(io.BytesIO(sound_file(wave, RATE)))
    recording.read(RATE)
    assert recording.full_scale > 0.1


# --- Channels and full scale --------------------------------------------------------------------


@pytest.mark.parametrize("other", [-1.0, -0.95])
@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
def test_channels_that_cancel_each_other_are_refused_with_the_cause(other, subtype):
    wave = np.stack([tones(), np.float32(other) * tones()], axis=1)
    with pytest.raises(InputError, match="the channels cancel each other"):
        audio.load(io.BytesIO(sound_file(wave, RATE, subtype=subtype)))


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_an_ogg_file_without_its_last_page_is_said(subtype):
    content = sound_file(noise(6, 24_000, 1), 24_000, "OGG", subtype)
    for part, remarks in ((content, []), (content[: len(content) * 2 // 3], ["may be cut off"])):
        recording = audio.Recording(io.BytesIO(part))
        assert 2 < len(recording.read(24_000)) / 24_000 <= 6
        assert [remark.rpartition("and ")[2] for remark in recording.remarks] == remarks


def test_other_audio_tracks_are_said(ffmpeg, tmp_path):
    silence = [*"-f lavfi -i anullsrc=d=4".split(), *"-c:a flac -map".split()]
    coded, plain = encoded(ffmpeg, tmp_path, "take.mka", *silence, "0", "-map", "1")
    recording = audio.Recording(coded)
    np.testing.assert_array_equal(recording.read(RATE), audio.load(plain))
    assert recording.remarks == ["the first of its 2 audio tracks was taken"]
    coded, _ = encoded(ffmpeg, tmp_path, "other.mka", *silence, "1", "-map", "0")
    with pytest.raises(InputError, match=r"zeros only \(the first of its 2 audio tracks was taken"):
        audio.load(coded)
    pictures = "-f lavfi -i testsrc=d=1:s=64x64 -map 1 -c:v mjpeg".split()
    coded, _ = encoded(ffmpeg, tmp_path, "mute.mov", *pictures)
    with pytest.raises(InputError, match=r"cannot be read as audio \(it has no audio track\)"):
        audio.load(coded)


@pytest.mark.parametrize("level", [0.0, 0.01])
def test_a_silent_channel_is_said(level):
    wave = np.stack([tones(), np.full_like(tones(), level)], axis=1)
    recording = audio.Recording(io.BytesIO(sound_file(wave, RATE, subtype="FLOAT")))
    np.testing.assert_allclose(recording.read(RATE), tones() / 2, atol=1e-3)
    assert recording.remarks[0] == (
        "channel 2 of 2 is silent: the mean of the channels is 6 dB lower than the sound"
    )


@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_floats_beyond_full_scale_are_clipped_only_where_they_are_cut_off(subtype):
    loud = audio.Recording(io.BytesIO(sound_file(10 * tones(), RATE, subtype=subtype)))
    assert np.abs(loud.read(RATE)).max() > 2 and loud.full_scale == 0
    whole = np.round(32_768 * tones())  # floats on the scale of 16-bit integers
    wrong = audio.Recording(io.BytesIO(sound_file(whole, RATE, subtype=subtype)))
    np.testing.assert_allclose(wrong.read(RATE), whole, atol=1)
    assert wrong.full_scale < 1e-4
    for limit in (1.0, 2.0):
        wave = np.clip(10 * tones(), -limit, limit)
        cut = audio.Recording(io.BytesIO(sound_file(wave, RATE, subtype=subtype)))
        cut.read(RATE)
        assert cut.full_scale == pytest.approx(np.mean(np.abs(wave) == limit), rel=0.2)


# --- Strangers ----------------------------------------------------------------------------------

PLAYLISTS = {
    "hls": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n",
    "ffconcat": "ffconcat version 1.0\nfile '{}'\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nt=0 0\nm=audio 5004 RTP/AVP 0\n",
    "dash": (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"'
        ' mediaPresentationDuration="PT9S" ><Period>'
        '<AdaptationSet mimeType="audio/mp4"><Representation id="1" bandwidth="1"><BaseURL>{}'
        "</BaseURL></Representation></AdaptationSet></Period></MPD>"
    ),
    "subtitles": "1\n00:00:01,000 --> 00:00:02,000\n{}\n",
}


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [*[(kind, "m4a") for kind in PLAYLISTS], ("hls", "wav"), ("hls", "m3u8"), ("ffconcat", "mp3")],
)
def test_a_playlist_opens_no_other_file(ffmpeg, tmp_path, kind, suffix):
    other, _ = encoded(ffmpeg, tmp_path, "other.m4a")
    path = tmp_path / f"take.{suffix}"
    path.write_text(PLAYLISTS[kind].format(other.name))
    with pytest.raises(InputError, match=r"take\.\w+: cannot be read as audio"):
        audio.load(path)


@pytest.mark.parametrize("name", ["concat:a.wav|b.m4a", "take%03d.m4a", "pipe:0.m4a", "a,b.m4a"])
def test_special_names_are_names_of_files(ffmpeg, tmp_path, monkeypatch, name):
    coded, plain = encoded(ffmpeg, tmp_path, "plain.m4a", "-c:a", "alac")
    coded.rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(audio.load(name), audio.load(plain))


def test_what_is_no_file_is_refused_at_once(tmp_path):
    fifo = tmp_path / "take.wav"
    os.mkfifo(fifo)
    for path in (fifo, "/dev/zero"):
        for function in (audio.load, audio.duration):
            with pytest.raises(InputError, match="a device or pipe, not a file"):
                function(path)


@pytest.mark.parametrize("suffix", ["wav", "mp3", "m4a"])
def test_a_file_of_0_bytes_is_refused_as_empty(tmp_path, suffix):
    path = tmp_path / f"take.{suffix}"
    path.touch()
    with pytest.raises(InputError, match="empty, it has 0 bytes"):
        audio.load(path)


def test_an_ffmpeg_that_gives_no_sound_is_stopped(tmp_path, monkeypatch):
    program = tmp_path / "ffmpeg"
    program.write_text("#!/bin/sh\nexec sleep 1000\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("percepiano_ast.audio.io._PATIENCE", 0.5)
    path = tmp_path / "take.m4a"
    path.write_bytes(b"\0\0\0\x1cftypM4A " + bytes(1000))
    with pytest.raises(InputError, match=r"take.m4a: cannot be read as audio \(no sound within"):
        audio.load(path)


@pytest.mark.parametrize(
    ("rate", "channels", "message"),
    [
        (1, 1, "recorded at 1 Hz; at least 4,000 Hz"),
        (2_000_000, 1, "recorded at 2,000,000 Hz; at most"),
        (44_100, 1024, "1,024 channels, at most 32"),
    ],
)
def test_extreme_rates_and_numbers_of_channels_are_refused(rate, channels, message):
    content = sound_file(np.zeros((4000, channels)), rate)
    with pytest.raises(InputError, match=message):
        audio.load(io.BytesIO(content))


def test_a_rate_of_768_khz_is_read():
    content = sound_file(tones(768_000, seconds=1.5), 768_000)
    assert len(audio.load(io.BytesIO(content))) == pytest.approx(1.5 * RATE, abs=1)


@pytest.mark.slow
def test_a_small_file_that_lasts_two_hours_is_refused_in_little_memory(tmp_path):
    path = tmp_path / "long.flac"
    with soundfile.SoundFile(path, "w", 44_100, 1, "PCM_16") as file:
        for _ in range(120):
            file.write(np.zeros(60 * 44_100, np.int16))
    assert path.stat().st_size < 2_000_000
    tracemalloc.start()
    with pytest.raises(InputError, match="longer than 1 hour. Give its parts"):
        audio.load(path)
    assert tracemalloc.get_traced_memory()[1] < 4e8
    tracemalloc.stop()
