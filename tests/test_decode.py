"""Recordings are decoded from front to back in bounded memory, whole or not at all. About 8 s.

The tests of M4A run with the ffmpeg on PATH, if there is one, and with that of the package
imageio-ffmpeg.
"""

import io
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
    assert capfd.readouterr() == ("", "")


def test_a_seekable_source_may_fail_too(capfd):
    class Breaks(io.BytesIO):
        def read(self, size=-1):
            if self.tell() > 100_000:
                raise ConnectionError("gone")
            return super().read(size)

    for kind in ("WAV", "FLAC"):
        with pytest.raises(ConnectionError, match="gone"):
            audio.load(Breaks(sound_file(noise(), kind=kind)))
    assert capfd.readouterr() == ("", "")


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
