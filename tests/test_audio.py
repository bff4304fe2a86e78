"""Recordings become the log-mel spectrograms that the contract promises, or are refused in words.
About 10 s."""

import dataclasses
import io
import subprocess
import sys
import time

import librosa
import numpy as np
import pytest
import soundfile

from percepiano_ast import audio
from percepiano_ast.config import AUDIOSET, KALDI, FrontEnd
from percepiano_ast.errors import InputError
from percepiano_ast.music import synth
from percepiano_ast.music.midi import NOTE, PEDAL, Performance, read_midi

FRONT_END = FrontEnd()
RATE = FRONT_END.sample_rate


def sine(frequency=440.0, seconds=2.0, sample_rate=RATE, amplitude=0.5):
    return (
        amplitude
        * np.sin(2 * np.pi * frequency * np.arange(round(seconds * sample_rate)) / sample_rate)
    ).astype(np.float32)


def wav(wave, sample_rate=RATE, subtype="PCM_16", kind="WAV"):
    file = io.BytesIO()
    soundfile.write(file, wave, sample_rate, subtype=subtype, format=kind)
    file.seek(0)
    return file


@pytest.mark.parametrize(
    ("kind", "subtype", "tolerance"),
    [
        ("WAV", "PCM_U8", 0.01),
        ("WAV", "PCM_16", 1e-3),
        ("WAV", "PCM_24", 1e-3),
        ("WAV", "PCM_32", 1e-3),
        ("WAV", "FLOAT", 1e-3),
        ("WAV", "DOUBLE", 1e-3),
        ("FLAC", "PCM_24", 1e-3),
        ("OGG", "VORBIS", 0.05),
        ("MP3", "MPEG_LAYER_III", 0.05),
    ],
)
@pytest.mark.parametrize("sample_rate", [22_050, 44_100, 48_000])
def test_a_sine_keeps_frequency_level_and_length_in_every_format(
    kind, subtype, tolerance, sample_rate
):
    wave = audio.load(wav(sine(sample_rate=sample_rate), sample_rate, subtype, kind))
    assert wave.dtype == np.float32 and wave.ndim == 1
    assert len(wave) == pytest.approx(2 * RATE, abs=0 if kind == "WAV" else 2500)
    middle = wave[RATE // 2 : RATE // 2 + RATE]  # one second: bin k of its spectrum is k Hz
    assert np.argmax(np.abs(np.fft.rfft(middle))) == 440
    assert np.sqrt(2 * np.mean(middle**2)) == pytest.approx(0.5, abs=tolerance)


def test_a_96_khz_24_bit_stereo_recording_from_a_path_is_read_as_the_mean_of_its_channels(tmp_path):
    left, right = sine(440, sample_rate=96_000), sine(1000, sample_rate=96_000, amplitude=0.25)
    path = tmp_path / "hires.wav"
    soundfile.write(path, np.stack([left, right], axis=1), 96_000, subtype="PCM_24")
    expected = 0.5 * (sine(440) + sine(1000, amplitude=0.25))
    difference = (audio.load(path) - expected)[500:-500]
    assert np.abs(difference).max() < 1e-3  # right phase too: resampling does not shift


def test_more_than_two_channels_are_averaged():
    channels = np.stack([sine(amplitude=a) for a in (0.1, 0.2, 0.6)], axis=1)
    np.testing.assert_allclose(
        audio.load(wav(channels, subtype="FLOAT")), sine(amplitude=0.3), atol=1e-6
    )


def test_block_by_block_resampling_equals_resampling_at_once():
    import soxr

    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 700_000).astype(np.float32)  # three blocks
    whole = soxr.resample(noise, 48_000, RATE, quality="HQ")
    loaded = audio.load(wav(noise, 48_000, "FLOAT"))
    assert len(loaded) == len(whole)
    np.testing.assert_allclose(loaded, whole, atol=1e-5)


def test_only_the_first_seconds_are_read_where_asked():
    assert len(audio.load(wav(sine(seconds=10)), max_seconds=3)) == 3 * RATE


def test_a_missing_file_is_named():
    with pytest.raises(InputError, match="nowhere.wav: no such file"):
        audio.load("nowhere.wav")


@pytest.mark.parametrize("content", [b"", b"RIFF", b"This is a text. " * 100])
def test_what_is_no_audio_is_refused(tmp_path, content):
    path = tmp_path / "notes.wav"
    path.write_bytes(content)
    fault = "cannot be read as audio" if content else "empty, it has 0 bytes"
    with pytest.raises(InputError, match=f"notes.wav: {fault}"):
        audio.load(path)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "FLOAT"])
def test_a_half_written_wav_says_how_much_is_missing(tmp_path, subtype):
    path = tmp_path / "half.wav"
    content = wav(sine(seconds=4), subtype=subtype).getvalue()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(
        InputError, match=r"half.wav: truncated, [\d,]+ of [\d,]+ bytes .*about 2\.0 s"
    ):
        audio.load(path)


def test_a_half_written_flac_is_refused(tmp_path):
    path = tmp_path / "half.flac"
    content = wav(np.random.default_rng(0).uniform(-0.5, 0.5, 4 * RATE), kind="FLAC").getvalue()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="half.flac"):
        audio.load(path)


def test_a_wav_from_a_pipe_has_no_length_in_its_header_and_is_read():
    content = bytearray(wav(sine()).getvalue())
    at = content.index(b"data") + 4
    content[at : at + 4] = content[4:8] = b"\xff\xff\xff\xff"
    assert len(audio.load(io.BytesIO(bytes(content)))) == 2 * RATE


@pytest.mark.parametrize(
    ("wave", "message"),
    [
        (np.zeros(0), "empty"),
        (sine(seconds=0.5), r"0\.50 s long.*at least 1 s"),
        (np.zeros(2 * RATE), "silent, it holds zeros only"),
        (sine(amplitude=5e-5), "silent, it peaks at -86 dBFS"),
        (
            np.where(np.arange(2 * RATE) == RATE, np.nan, sine()),
            r"NaN or infinity, first near 1\.00 s",
        ),
        (
            np.where(np.arange(2 * RATE) == RATE, np.inf, sine()),
            r"NaN or infinity, first near 1\.00 s",
        ),
    ],
)
def test_what_cannot_be_rated_is_refused_with_the_file_and_the_reason(tmp_path, wave, message):
    path = tmp_path / "take.wav"
    soundfile.write(path, wave.astype(np.float32), RATE, subtype="FLOAT")
    with pytest.raises(InputError, match=f"take.wav: .*{message}"):
        audio.load(path)


def test_nan_is_found_after_resampling_too():
    wave = sine(sample_rate=48_000)
    wave[48_000] = np.nan
    with pytest.raises(InputError, match="NaN or infinity"):
        audio.load(wav(wave, 48_000, "FLOAT"))


def test_a_quiet_recording_is_not_silent():
    assert len(audio.load(wav(sine(amplitude=2e-4), subtype="FLOAT")))


def music_like(seconds=5, seed=0):
    """Decaying harmonic tones over a noise floor at -60 dB."""
    rng = np.random.default_rng(seed)
    wave = 1e-3 * rng.standard_normal(seconds * RATE)
    for onset in range(0, seconds * RATE - RATE, RATE // 4):
        time_ = np.arange(RATE) / RATE
        f0 = 440 * 2 ** (rng.integers(-24, 24) / 12)
        partials = sum(
            np.sin(2 * np.pi * f0 * k * time_) / k for k in range(1, 6) if f0 * k < RATE / 2
        )
        wave[onset : onset + RATE] += 0.1 * partials * np.exp(-3 * time_)
    return wave.astype(np.float32)


def chords() -> np.ndarray:
    """Twelve seconds of piano."""
    notes = [
        (start, start + 0.8, key, 70)
        for start in range(12)
        for key in (36 + 5 * start % 12, 60 + start, 67 + start)
    ]
    return synth.BuiltinPiano().render(Performance(np.array(notes, NOTE), np.zeros(0, PEDAL)), RATE)


def librosa_log_mel(wave):
    mel = librosa.feature.melspectrogram(
        y=wave,
        sr=RATE,
        n_fft=FRONT_END.n_fft,
        win_length=FRONT_END.win_length,
        hop_length=FRONT_END.hop_length,
        n_mels=FRONT_END.n_mels,
        fmin=FRONT_END.fmin,
        fmax=FRONT_END.fmax,
        center=True,
        pad_mode="constant",
        power=2.0,
    )
    return 10 * np.log10(np.maximum(mel, FRONT_END.amin)).T


@pytest.mark.parametrize(
    "n", [RATE, 220 * 300, 220 * 300 - 1, 220 * 300 + 1, 220 * 256 + 7, 5 * RATE]
)
def test_log_mel_agrees_with_librosa(n):
    wave = music_like()[:n]
    ours, theirs = audio.log_mel(wave, FRONT_END), librosa_log_mel(wave)
    assert ours.dtype == np.float32 and ours.shape == theirs.shape == (FRONT_END.n_frames(n), 128)
    assert np.abs(ours - theirs)[theirs > FRONT_END.floor_db].max() < 1e-3


def worst(wave):
    """Largest difference from librosa in dB: where the level is at the uint8 floor or more, and
    below."""
    theirs = librosa_log_mel(wave)
    difference = np.abs(audio.log_mel(wave, FRONT_END) - theirs)
    return difference[theirs >= FRONT_END.floor_db].max(), difference[
        theirs < FRONT_END.floor_db
    ].max(initial=0)


def test_log_mel_agrees_with_librosa_on_loud_tones_and_noise():
    noise = np.random.default_rng(0).uniform(-1, 1, 5 * RATE).astype(np.float32)
    tones = [sine(frequency, amplitude=1.0) for frequency in (27.5, 440, 4186, 10_000)]
    quiet_beside_loud = sine(55, amplitude=1.0) + sine(8000, amplitude=1e-6)
    for wave in (noise, 1e-4 * noise, quiet_beside_loud, *tones):
        assert max(worst(wave)) < 1e-3


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["builtin", "fluidr3mono", "musescore-small"])
def test_log_mel_agrees_with_librosa_on_rendered_piano(name, percepiano_dir):
    try:
        synthesizer = synth.make_synthesizer(name)
    except InputError as error:
        pytest.skip(str(error))
    path = min((percepiano_dir / "virtuoso" / "data" / "all_2rounds").glob("*.mid"))
    assert max(worst(synthesizer.render(read_midi(path), RATE))) < 1e-3


def test_the_bank_is_librosas():
    for front_end in (
        FRONT_END,
        dataclasses.replace(FRONT_END, n_mels=64, fmin=0.0, fmax=8000.0, n_fft=2048),
    ):
        expected = librosa.filters.mel(
            sr=RATE,
            n_fft=front_end.n_fft,
            n_mels=front_end.n_mels,
            fmin=front_end.fmin,
            fmax=front_end.fmax,
        )
        np.testing.assert_allclose(
            audio.slaney_mel_bank(front_end), expected, rtol=1e-6, atol=1e-12
        )


SPARSE = dataclasses.replace(FRONT_END, hop_length=1000)  # most samples are in no window


@pytest.mark.parametrize("front_end", [FRONT_END, KALDI, SPARSE], ids=["slaney", "kaldi", "sparse"])
@pytest.mark.parametrize(
    "sizes", [[1], [100], [220], [551, 3], [20_000], [56_651], [56_320], [200_000], [0, 70_000]]
)
def test_log_mel_of_blocks_is_log_mel_of_the_whole(front_end, sizes):
    for n in (7 * len(sizes) * 220, 56_320, 57_000, 4 * RATE, 300_000) if sizes != [1] else (2000,):
        wave, blocks, start = music_like(15)[:n], [], 0
        while start < n:
            blocks.append(wave[start : start + sizes[len(blocks) % len(sizes)]])
            start += len(blocks[-1])
        whole = audio.log_mel(wave, front_end)
        assert whole.shape == (front_end.n_frames(n), 128)
        np.testing.assert_array_equal(
            np.concatenate(list(audio.log_mel_blocks(blocks, front_end))), whole
        )


def test_levels_are_there_as_soon_as_their_sound_is():
    heard = 0

    def blocks():
        nonlocal heard
        for block in np.split(music_like(20), 20):
            heard += len(block)
            yield block

    done = 0
    for levels in audio.log_mel_blocks(blocks(), FRONT_END):
        done += len(levels)
        assert heard - done * FRONT_END.hop_length < 4 * RATE
    assert done == FRONT_END.n_frames(20 * RATE)


@pytest.mark.parametrize("k", [0, 1, 57, 299])
def test_a_click_at_sample_220_k_peaks_at_frame_k(k):
    wave = np.zeros(220 * 300, dtype=np.float32)
    wave[220 * k] = 1
    assert np.argmax(audio.log_mel(wave, FRONT_END).mean(axis=1)) == k


def test_loudness_is_kept():
    wave = music_like()
    np.testing.assert_allclose(audio.log_mel(wave) - audio.log_mel(0.1 * wave), 20, atol=0.05)


def test_silence_lies_at_the_floor_of_the_logarithm():
    np.testing.assert_allclose(audio.log_mel(np.zeros(RATE, dtype=np.float32)), -100, rtol=1e-6)


def test_no_mel_band_is_empty():
    noise = np.random.default_rng(0).standard_normal(RATE).astype(np.float32)
    assert audio.log_mel(noise).min(axis=0).min() > -40


def test_codes_are_within_a_quarter_of_a_db():
    levels = np.linspace(-80, 47.5, 10_001, dtype=np.float32)
    codes, clipped = audio.quantize(levels)
    assert codes.dtype == np.uint8 and clipped == 0
    assert np.abs(audio.dequantize(codes) - levels).max() <= 0.25 + 1e-5


def test_what_lies_above_the_range_is_counted_and_what_lies_below_becomes_the_floor():
    codes, clipped = audio.quantize(np.array([-100, -80, 0, 60], dtype=np.float32))
    np.testing.assert_array_equal(audio.dequantize(codes), [-80, -80, 0, 47.5])
    assert clipped == 0.25


def test_full_scale_sound_fits_the_range():
    square = np.sign(sine(55, seconds=2)).astype(np.float32)
    for loudest in (square, sine(amplitude=1.0), sine(30, amplitude=1.0)):
        assert audio.quantize(audio.log_mel(loudest))[1] == 0


class TestKaldi:
    """Whether the numbers are torchaudio's is the parity tests' work; here is what follows from the
    definition."""

    WAVE = music_like(12)[: 11 * 16_000]  # of any sampling rate

    @pytest.mark.parametrize(
        ("n", "frames"), [(400, 1), (559, 1), (560, 2), (160_000, 998), (176_000, 1098)]
    )
    def test_whole_windows_only(self, n, frames):
        assert audio.fbank(self.WAVE[:n]).shape == (frames, 128)
        assert KALDI.n_frames(n) == frames

    def test_one_window_by_the_definition(self):
        wave = self.WAVE[:400].astype(np.float64)
        wave = wave - wave.mean()
        emphasised = np.array([x - 0.97 * (wave[k - 1] if k else x) for k, x in enumerate(wave)])
        emphasised *= 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)
        basis = np.exp(-2j * np.pi * np.outer(np.arange(256), np.arange(400)) / 512)
        mel = 1127 * np.log(1 + np.arange(256) * 16_000 / 512 / 700)
        edges = np.linspace(1127 * np.log(1 + 20 / 700), 1127 * np.log(1 + 8000 / 700), 130)
        weights = np.array([np.interp(mel, edges[k : k + 3], [0, 1, 0]) for k in range(128)])
        expected = np.log(
            np.maximum(weights @ np.abs(basis @ emphasised) ** 2, 1.1920928955078125e-07)
        )
        np.testing.assert_allclose(audio.fbank(self.WAVE[:400])[0], expected, atol=1e-3)

    def test_decibels_are_the_natural_logarithm_rescaled(self):
        np.testing.assert_allclose(
            audio.log_mel(self.WAVE, KALDI), 10 / np.log(10) * audio.fbank(self.WAVE), rtol=1e-6
        )
        assert audio.log_mel(self.WAVE, KALDI).dtype == np.float32
        assert (AUDIOSET.mean_db, AUDIOSET.std_db) == pytest.approx((-18.534, 19.843), abs=1e-3)

    def test_silence_lies_at_the_floor(self):
        levels = audio.log_mel(np.zeros(16_000, dtype=np.float32), KALDI)
        np.testing.assert_allclose(levels, 10 * np.log10(KALDI.amin), rtol=1e-6)

    def test_a_constant_offset_is_not_heard(self):
        heard = audio.fbank(self.WAVE)
        # the offset costs the samples their last digits
        loud = heard > heard.max(axis=1, keepdims=True) - 7
        np.testing.assert_allclose(
            audio.fbank(self.WAVE + np.float32(0.25))[loud], heard[loud], atol=2e-3
        )

    def test_ten_times_the_amplitude_is_20_db(self):
        quiet, loud = (audio.log_mel(np.float32(gain) * self.WAVE, KALDI) for gain in (0.1, 1))
        above = quiet > 10 * np.log10(KALDI.amin) + 6
        assert above.mean() > 0.3
        np.testing.assert_allclose((loud - quiet)[above], 20, atol=0.01)

    def test_a_frame_is_the_same_alone_and_within_a_recording(self):
        wave = self.WAVE - self.WAVE.mean()
        whole = audio.fbank(wave)
        np.testing.assert_array_equal(audio.fbank(wave), whole)
        for k in (0, 255, 256, 700):  # about the ends of the blocks that it is computed in
            loud = whole[k] > whole[k].max() - 12
            # its own mean, not the clip's, goes first
            alone = audio.fbank(wave[160 * k : 160 * k + 400])[0]
            np.testing.assert_allclose(alone[loud], whole[k][loud], atol=1e-3)

    def test_codes_are_within_a_quarter_of_a_db(self):
        levels = audio.log_mel(self.WAVE, KALDI)
        codes, clipped = audio.quantize(levels, KALDI)
        assert clipped == 0
        assert np.abs(audio.dequantize(codes, KALDI) - levels).max() <= 0.25 + 1e-4

    @pytest.mark.parametrize("rate", [8000, 22_050, 44_100])
    def test_other_sampling_rates_hear_a_tone_in_its_band(self, rate):
        win_length = rate * 25 // 1000
        size = {
            "n_fft": 1 << (win_length - 1).bit_length(),
            "win_length": win_length,
            "hop_length": rate // 100,
        }
        front_end = dataclasses.replace(KALDI, sample_rate=rate, fmax=rate / 2, **size)
        band = np.argmax(audio.fbank(sine(2000, sample_rate=rate), front_end).mean(axis=0))
        low, high = (1127 * np.log(1 + hertz / 700) for hertz in (20, rate / 2))
        assert band + 1 == pytest.approx(
            (1127 * np.log(1 + 2000 / 700) - low) / (high - low) * 129, abs=1
        )

    @pytest.mark.parametrize("n", [0, 1, 100, 399])
    def test_less_than_one_window_is_refused(self, n):
        with pytest.raises(InputError, match=rf"^{n} samples .*one window of 400 \(25 ms\)"):
            audio.log_mel(self.WAVE[:n], KALDI)

    def test_an_unknown_front_end_is_refused(self):
        with pytest.raises(InputError, match="'htk'.*Choose one of: slaney, kaldi"):
            audio.log_mel(self.WAVE, dataclasses.replace(KALDI, kind="htk"))


def test_a_process_that_makes_spectrograms_loads_little():
    code = (
        "import sys, numpy as np; from percepiano_ast import audio; audio.log_mel(np.zeros(30_000,"
        " np.float32))\nassert not (loaded := {'numba', 'scipy.signal', 'librosa.core', 'jax'} &"
        " set(sys.modules)), loaded"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_log_mel_is_faster_than_librosa():
    wave = music_like(60)

    def seconds(function):
        function(wave)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            function(wave)
            times.append(time.perf_counter() - start)
        return np.median(times)

    assert seconds(audio.log_mel) < seconds(librosa_log_mel)


@pytest.mark.parametrize("cents", [-45, -20, 0, 8, 20, 45])
def test_the_tuning_of_a_piano_is_found_within_five_cents(cents):
    wave = audio.retune(chords(), RATE, cents)
    assert len(wave) == pytest.approx(len(chords()) / 2 ** (cents / 1200), abs=2)
    assert abs((audio.estimate_tuning(wave, RATE) - cents + 50) % 100 - 50) <= 5
    # A semitone higher is in tune, and transposed.
    assert audio.estimate_tuning(audio.retune(wave, RATE, 100), RATE) == pytest.approx(
        audio.estimate_tuning(wave, RATE), abs=2
    )


def test_the_tuning_of_a_long_recording_is_of_all_of_it():
    wave = np.concatenate(
        [np.zeros(300 * RATE, np.float32), np.tile(audio.retune(chords(), RATE, 20), 20)]
    )
    assert audio.estimate_tuning(wave, RATE) == pytest.approx(20, abs=5)


def test_what_has_no_tone_has_no_tuning():
    assert (
        audio.estimate_tuning(np.zeros(5 * RATE, np.float32), RATE)
        == 0
        == audio.estimate_tuning(np.zeros(0, np.float32), RATE)
    )


def test_audio_features_are_named_ordered_and_finite():
    names = audio.audio_feature_names()
    assert len(set(names)) == len(names) == 397
    click = np.zeros(2 * RATE, dtype=np.float32)
    click[RATE] = 1
    for wave in (music_like(3), sine(), click):
        features = audio.audio_features(wave)
        assert tuple(features) == names
        assert np.isfinite(list(features.values())).all()


def test_audio_features_hear_level_brightness_pitch_class_and_onsets():
    low, high = (audio.audio_features(sine(440)), audio.audio_features(sine(3520, amplitude=0.05)))
    assert low["level_db_mean"] - high["level_db_mean"] == pytest.approx(20, abs=1)
    assert low["spectral_centroid_q50"] == pytest.approx(440, rel=0.05)
    assert high["spectral_centroid_q50"] == pytest.approx(3520, rel=0.05)
    chroma = [low[f"chroma_{band}_mean"] for band in range(12)]
    assert np.argmax(chroma) == 9  # A, counted from C
    slow, fast = (
        np.concatenate(
            [sine(440, seconds) * np.exp(-np.arange(round(seconds * RATE)) / 2000)]
            * round(6 / seconds)
        )
        for seconds in (1.0, 0.25)
    )
    assert audio.audio_features(fast)["onset_rate"] > 2.5 * audio.audio_features(slow)["onset_rate"]
