"""MIDI files become sound that depends on the playing alone, or are refused in words. About 25 s
with real data."""

import os
import pickle
import shutil

import mido
import numpy as np
import pytest

from percepiano_ast.audio import log_mel
from percepiano_ast.errors import InputError
from percepiano_ast.music import midi, synth
from percepiano_ast.music.midi import LEAD, NOTE, PEDAL, SUSTAIN, UNA_CORDA, Performance

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


def midi_bytes(*tracks, **kwargs):
    """A MIDI file with tracks given as lists of mido messages (120 to the minute, 480 ticks a
    beat)."""
    import io

    file, out = mido.MidiFile(ticks_per_beat=480, **kwargs), io.BytesIO()
    for messages in tracks:
        file.tracks.append(mido.MidiTrack(messages))
    file.save(file=out)
    return out.getvalue()


def on(pitch, velocity, delay=0, channel=0):
    return mido.Message("note_on", note=pitch, velocity=velocity, time=delay, channel=channel)


# --- MIDI in and out ----------------------------------------------------------------------------


def test_written_midi_reads_back_on_a_grid_of_half_a_millisecond(tmp_path):
    original = phrase()
    midi.write_midi(original, tmp_path / "a.mid")
    midi.write_midi(original, tmp_path / "b.mid")
    assert (tmp_path / "a.mid").read_bytes() == (tmp_path / "b.mid").read_bytes()
    read = midi.read_midi(tmp_path / "a.mid")
    for field in NOTE.names:
        np.testing.assert_allclose(read.notes[field], original.notes[field], atol=2.6e-4)
    for field in PEDAL.names:
        np.testing.assert_allclose(read.pedals[field], original.pedals[field], atol=2.6e-4)
    assert read.remarks == () and read.duration == pytest.approx(original.duration, abs=1e-3)


def test_bytes_and_path_read_alike(tmp_path):
    midi.write_midi(phrase(), tmp_path / "a.mid")
    content = (tmp_path / "a.mid").read_bytes()
    np.testing.assert_array_equal(
        midi.read_midi(content).notes, midi.read_midi(tmp_path / "a.mid").notes
    )


def test_tracks_and_channels_are_merged_and_drums_left_out_with_a_remark():
    right = [on(72, 80), on(72, 0, 480)]
    left = [on(48, 60, 240, channel=1), on(48, 0, 480, channel=1)]
    drums = [on(36, 100, 0, channel=9), on(36, 0, 480, channel=9)]
    read = midi.read_midi(midi_bytes(right, left, drums))
    assert read.notes["pitch"].tolist() == [72, 48]
    np.testing.assert_allclose(read.notes["onset"], [0, 0.25])
    assert read.remarks == ("1 notes of drums were ignored",)


def test_only_the_three_pedals_are_kept():
    controls = [
        mido.Message("control_change", control=c, value=v)
        for c, v in ((7, 100), (64, 33), (66, 1), (67, 90))
    ]
    read = midi.read_midi(midi_bytes([*controls, on(60, 80), on(60, 0, 480)]))
    assert read.pedals["number"].tolist() == [64, 66, 67] and read.pedals["value"].tolist() == [
        33,
        1,
        90,
    ]


def test_a_key_struck_while_down_ends_the_earlier_note():
    read = midi.read_midi(midi_bytes([on(60, 80), on(60, 70, 480), on(60, 0, 480)]))
    np.testing.assert_allclose(read.notes["onset"], [0, 0.5])
    np.testing.assert_allclose(read.notes["offset"], [0.5, 1.0])
    assert read.remarks == ("1 notes were shortened to the next onset of the same key",)


def test_doubled_notes_are_merged_and_the_louder_counts():
    read = midi.read_midi(
        midi_bytes([on(60, 50), on(60, 0, 240)], [on(60, 90, channel=1), on(60, 0, 480, 1)])
    )
    assert read.notes.tolist() == [(0.0, 0.5, 60, 90)]
    assert "merged" in read.remarks[0]


def test_a_note_of_zero_length_is_left_out_and_does_not_last_until_the_next_release():
    read = midi.read_midi(midi_bytes([on(60, 30), on(60, 0), on(60, 90, 960), on(60, 0, 480)]))
    assert read.notes.tolist() == [(1.0, 1.5, 60, 90)]
    assert read.remarks == ("1 notes of zero length were ignored",)


def test_a_note_never_released_is_left_out_with_a_remark():
    read = midi.read_midi(midi_bytes([on(60, 30), on(62, 90, 480), on(62, 0, 480)]))
    assert read.notes["pitch"].tolist() == [62]
    assert read.remarks == ("1 notes never released were ignored",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable MIDI file"),
        (b"This is a text. " * 50, "not a readable MIDI file"),
        (midi_bytes([on(60, 80), on(60, 0, 480)])[:-12], "not a readable MIDI file"),
        (midi_bytes([]), "no piano notes"),
        (midi_bytes([on(36, 80, 0, 9), on(36, 0, 480, 9)]), "no piano notes .*drums"),
        (midi_bytes([on(60, 80), on(60, 0)]), "no piano notes .*1 notes of zero length"),
    ],
)
def test_a_file_without_playing_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "take.mid"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"take.mid: {message}"):
        midi.read_midi(path)


def test_a_missing_midi_file_is_named():
    with pytest.raises(InputError, match="nowhere.mid: no such file"):
        midi.read_midi("nowhere.mid")


def test_trimming_shifts_to_the_first_onset_and_keeps_the_state_of_the_pedals():
    late = play(
        (5.0, 6.0, 60, 80),
        (6.0, 7.0, 62, 80),
        pedals=[
            (1.0, 64, 20),
            (2.0, 64, 127),
            (3.0, 67, 90),
            (4.95, 64, 40),
            (5.5, 64, 0),
            (30.0, 64, 127),
        ],
    )
    trimmed = midi.trimmed(late)
    np.testing.assert_allclose(trimmed.notes["onset"], [LEAD, 1 + LEAD])
    np.testing.assert_allclose(trimmed.pedals["time"], [0, 0, 0.05, 0.6], atol=1e-9)
    assert trimmed.pedals["number"].tolist() == [64, 67, 64, 64]
    assert trimmed.pedals["value"].tolist() == [127, 90, 40, 0]
    assert late.notes["onset"][0] == 5.0  # the original is untouched


@pytest.mark.real_data
def test_every_percepiano_file_is_read(percepiano_dir):
    paths = sorted((percepiano_dir / "virtuoso" / "data" / "all_2rounds").glob("*.mid"))
    performances = [midi.trimmed(midi.read_midi(path)) for path in paths]
    assert len(performances) == 1202
    hours = sum(performance.duration for performance in performances) / 3600
    assert hours == pytest.approx(5.65, abs=0.05)
    assert sum("zero length" in " ".join(performance.remarks) for performance in performances) == 32


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
