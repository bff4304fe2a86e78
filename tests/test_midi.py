"""MIDI files are read as one piano, written, trimmed, or refused by name. About 5 s with real
data."""

import io

import mido
import numpy as np
import pytest
from test_synth import phrase, play

from percepiano_ast.errors import InputError
from percepiano_ast.music import midi
from percepiano_ast.music.midi import LEAD, NOTE, PEDAL


def midi_bytes(*tracks, **kwargs):
    """A MIDI file with tracks given as lists of mido messages (120 to the minute, 480 ticks a
    beat)."""
    file, out = mido.MidiFile(ticks_per_beat=480, **kwargs), io.BytesIO()
    for messages in tracks:
        file.tracks.append(mido.MidiTrack(messages))
    file.save(file=out)
    return out.getvalue()


def on(pitch, velocity, delay=0, channel=0):
    return mido.Message("note_on", note=pitch, velocity=velocity, time=delay, channel=channel)


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


def test_tempo_changes_of_the_first_track_count_and_others_are_ignored_with_a_remark():
    slow, slower = (mido.MetaMessage("set_tempo", tempo=tempo) for tempo in (1_000_000, 4_000_000))
    notes = [on(60, 80, 480), on(60, 0, 480)]
    changed = [mido.MetaMessage("set_tempo", tempo=2_000_000, time=480)]
    read = midi.read_midi(midi_bytes([slow, *changed], [slower, *notes]))
    assert read.notes.tolist() == [(1.0, 3.0, 60, 80)]
    assert read.remarks == ("1 tempo changes outside the first track were ignored",)


def test_pedals_at_one_moment_keep_their_order():
    pressed = [mido.Message("control_change", control=64, value=value) for value in (90, 0, 70)]
    read = midi.read_midi(midi_bytes([*pressed, on(60, 80), on(60, 0, 480)]))
    assert read.pedals["value"].tolist() == [90, 0, 70]


def test_a_release_ends_all_notes_of_its_key():
    read = midi.read_midi(midi_bytes([on(60, 80), on(60, 70, 240), on(60, 0, 240), on(60, 0, 9)]))
    assert read.notes.tolist() == [(0.0, 0.25, 60, 80), (0.25, 0.5, 60, 70)]


@pytest.mark.parametrize(
    ("division", "last", "message"),
    [(-25 * 256 + 40, 480, "SMPTE frames"), (480, 20_000_000, "its last tick is 20,000,000")],
)
def test_times_that_cannot_be_right_are_refused(division, last, message):
    content = midi_bytes([on(60, 80), on(60, 0, last)])
    content = content[:12] + division.to_bytes(2, "big", signed=True) + content[14:]
    with pytest.raises(InputError, match=f"take.mid: not a readable MIDI file .*{message}"):
        midi.read_midi(content, "take.mid")


def test_names_of_pitches():
    assert [midi.note_name(pitch) for pitch in (21, 60, 61, 108)] == ["A0", "C4", "C#4", "C8"]
