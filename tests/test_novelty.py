"""Which recordings are said to be no piano: pianos, other instruments, noise, speech; and what
moves no rating.

Cost: 5 minutes; needs PercePiano and soundfonts, and for speech espeak-ng.
"""

import shutil
import subprocess

import numpy as np
import pytest
import soundfile
import soxr

from percepiano_ast import audio
from percepiano_ast.data import percepiano
from percepiano_ast.inference.rate import RatingModelFile
from percepiano_ast.music import synth
from percepiano_ast.music.midi import read_midi, trimmed

pytestmark = [pytest.mark.slow, pytest.mark.real_data]
RATE = 22_050
PIANOS = ("musescore-small", "fluidr3mono", "timgm6mb", "builtin")
INSTRUMENTS = {
    "electric piano": 4,
    "harpsichord": 6,
    "vibraphone": 11,
    "organ": 19,
    "guitar": 24,
    "violin": 40,
    "strings": 48,
    "choir": 52,
    "trumpet": 56,
    "flute": 73,
    "synthesizer": 80,
}
LANGUAGES = ("en", "de", "fr", "it", "es", "pl", "sv", "pt", "nl", "cs")
CLIPS = 20


@pytest.fixture(scope="module")
def model():
    return RatingModelFile.read()


@pytest.fixture(scope="module")
def performances(percepiano_dir):
    files = percepiano.find_midi(percepiano_dir)
    names = np.random.default_rng(0).choice(sorted(files), CLIPS, replace=False)
    return [trimmed(read_midi(files[name])) for name in names]


def share(model, waves) -> float:
    """Of recordings that are said to be unlike a piano."""
    said = []
    for wave in waves:
        warnings = model.rate_wave(np.asarray(wave, np.float32), with_course=False).warnings
        said.append(any("unlike" in one or "no piano note" in one for one in warnings))
    return float(np.mean(said))


def played_by(program, performance, monkeypatch):
    """On another instrument of a General MIDI soundfont."""
    plain = synth._open

    def opened(path, sample_rate):
        synth = plain(path, sample_rate)
        synth.program_select(0, 1, 0, program)
        return synth

    piano = synth.FluidSynth("musescore-small")
    with monkeypatch.context() as patch:
        patch.setattr(synth, "_open", opened)
        return piano.render(performance, RATE)


@pytest.mark.parametrize("piano", PIANOS)
def test_pianos_rarely_get_the_warning(model, performances, piano):
    synthesizer = synth.make_synthesizer(piano)
    found = share(model, [synthesizer.render(one, RATE) for one in performances])
    print(f"{piano}: {found:.2f}")
    assert found <= 0.1


def test_other_instruments_mostly_are(model, performances, monkeypatch):
    found = {
        name: share(model, [played_by(program, one, monkeypatch) for one in performances])
        for name, program in INSTRUMENTS.items()
    }
    print(found)
    # Struck and plucked strings come near a piano.
    near = {"electric piano", "guitar", "harpsichord"}
    assert np.mean([value for name, value in found.items() if name not in near]) >= 0.8


def test_noise_and_tones_always_are(model):
    rng, time = np.random.default_rng(0), np.arange(12 * RATE) / RATE
    clicks = np.zeros(12 * RATE)
    clicks[:: RATE // 3] = 0.5
    waves = [
        0.1 * rng.normal(size=12 * RATE),
        0.3 * np.sin(2 * np.pi * 440 * time),
        0.3 * np.sin(2 * np.pi * 1200 * time),
        clicks,
    ]
    assert share(model, waves) == 1.0


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng")
def test_speech_always_is(model, tmp_path):
    text = (
        "Two performances of one piece are compared, and whatever the answer is, it is written"
        " down. " * 2
    )
    waves = []
    for language in LANGUAGES:
        subprocess.run(
            ["espeak-ng", "-v", language, "-w", tmp_path / "speech.wav", text], check=True
        )
        wave, rate = soundfile.read(tmp_path / "speech.wav", dtype="float32")
        waves.append(soxr.resample(wave, rate, RATE))
    assert share(model, waves) == 1.0


def test_rate_compression_gain_and_silence_in_front_do_not_move_a_rating(
    model, performances, tmp_path
):
    moved = {}
    for number, performance in enumerate(performances[:12]):
        wave = synth.make_synthesizer(PIANOS[2 * (number % 2)]).render(performance, RATE)
        wave *= 0.5 / np.abs(wave).max()
        soundfile.write(tmp_path / "plain.wav", wave, RATE)
        soundfile.write(tmp_path / "48k.wav", soxr.resample(wave, RATE, 48_000), 48_000)
        soundfile.write(tmp_path / "soft.wav", wave / 4, RATE)
        soundfile.write(
            tmp_path / "late.wav", np.concatenate([np.zeros(2 * RATE, np.float32), wave]), RATE
        )
        small = soxr.resample(wave, RATE, 44_100)
        soundfile.write(
            tmp_path / "small.mp3", small, 44_100, bitrate_mode="CONSTANT", compression_level=0.0
        )
        plain = model.rate(tmp_path / "plain.wav").ratings
        for name in ("48k.wav", "soft.wav", "late.wav", "small.mp3"):
            other = model.rate(tmp_path / name).ratings
            moved[name] = max(
                moved.get(name, 0.0), *(abs(other[key] - plain[key]) for key in plain)
            )
    print({name: round(value, 4) for name, value in moved.items()})
    assert max(moved.values()) <= 0.02


# 8 is A4 = 442 Hz, as European concert pianos are tuned
@pytest.mark.parametrize("cents", [-20, 8, 20])
def test_tuning_hardly_moves_a_rating(model, performances, cents):
    moved = []
    for number, performance in enumerate(performances[:12]):
        wave = synth.make_synthesizer(PIANOS[number % 3]).render(performance, RATE)
        plain, other = (
            model.rate_wave(one, with_course=False).ratings
            for one in (wave, audio.retune(wave, RATE, cents))
        )
        moved.append([abs(other[key] - plain[key]) for key in plain])
    print(f"{cents:+} cents: {np.mean(moved):.4f} in the mean, {np.max(moved):.4f} at most")
    assert np.max(moved) <= 0.05 and np.mean(moved) <= 0.01
