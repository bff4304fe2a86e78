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


def test_tempo_changes_of_any_track_count():
    slow, slower = (mido.MetaMessage("set_tempo", tempo=tempo) for tempo in (1_000_000, 2_000_000))
    notes = [on(60, 80, 480), on(60, 0, 480)]
    read = midi.read_midi(midi_bytes([slow], [slower.copy(time=480)], notes))
    assert read.notes.tolist() == [(1.0, 3.0, 60, 80)] and read.remarks == ()
    read = midi.read_midi(midi_bytes([slow], [slower, *notes]))
    assert read.notes.tolist() == [(2.0, 4.0, 60, 80)]
    assert read.remarks == ("1 tempi of one time differ between tracks: the last track's count",)
    # The tracks of format 2 have their own tempo, or that of the file.
    read = midi.read_midi(midi_bytes([slow, on(62, 9), on(62, 0, 480)], [slower, *notes], type=2))
    assert read.notes.tolist() == [(0.0, 1.0, 62, 9), (2.0, 4.0, 60, 80)]
    assert read.remarks == ("the independent tracks of format 2 are taken to start together",)


def pedal(value, delay=0, channel=0, control=64):
    return mido.Message("control_change", control=control, value=value, time=delay, channel=channel)


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("channel", [0, 1])
def test_a_pedal_counts_on_whatever_track_or_channel_it_is(kind, channel):
    notes = [on(60, 80), on(60, 0, 480)]
    pedals = [pedal(127, 240, channel), pedal(0, 480, channel)]
    if kind == 0:
        tracks = [[on(60, 80), pedals[0], on(60, 0, 240), pedal(0, 240, channel)]]
    else:
        tracks = [notes, pedals]
    read = midi.read_midi(midi_bytes(*tracks, type=kind))
    assert read.pedals.tolist() == [(0.25, 64, 127), (0.75, 64, 0)]
    assert read.notes.tolist() == [(0.0, 0.5, 60, 80)] and read.remarks == ()


def test_pedals_of_several_channels_are_combined_and_those_of_drums_are_not():
    notes = [on(60, 80), on(48, 80, channel=1), on(60, 0, 480), on(48, 0, 480, channel=1)]
    one = [pedal(127), pedal(0, 480)]
    two = [pedal(0, channel=1), pedal(90, 240, 1), pedal(0, 720, 1)]
    read = midi.read_midi(midi_bytes(notes, one, two, [pedal(127, 900, 9)]))
    assert read.pedals.tolist() == [(0.0, 64, 127), (0.5, 64, 90), (1.0, 64, 0)]
    what = "pedals (controller 64) of 2 channels were combined: the highest value counts"
    assert read.remarks == (what,)
    # A Disklavier repeats its pedals on a second channel, and others reset each channel.
    same = [pedal(127, channel=1), pedal(0, 480, 1)]
    read = midi.read_midi(midi_bytes(notes, one, same, [pedal(0, channel=2)]))
    assert read.pedals.tolist() == [(0.0, 64, 127), (0.5, 64, 0)] and read.remarks == ()


def test_channel_mode_messages_release_keys_and_pedals():
    begin = [pedal(127, control=64), pedal(99, control=67), on(60, 80), on(62, 80, channel=1)]
    for control, pedals, ends in (
        (121, [(0.0, 64, 127), (0.0, 67, 99), (0.5, 64, 0), (0.5, 67, 0)], [1.0, 1.0]),
        (123, [(0.0, 64, 127), (0.0, 67, 99)], [0.5, 1.0]),
        (120, [(0.0, 64, 127), (0.0, 67, 99), (0.5, 64, 0), (0.5, 67, 0)], [0.5, 1.0]),
    ):
        rest = [pedal(0, 480, control=control), on(60, 0, 480), on(62, 0, channel=1)]
        read = midi.read_midi(midi_bytes([*begin, *rest]))
        assert read.pedals.tolist() == pedals and read.notes["offset"].tolist() == ends
    # At the beginning of another track they undo nothing.
    read = midi.read_midi(midi_bytes([*begin, *rest[1:]], [pedal(0, control=120)]))
    assert read.pedals.tolist() == pedals[:2] and len(read.notes) == 2


@pytest.mark.parametrize(
    ("frames", "per_second"), [(24, 24), (25, 25), (29, 30_000 / 1001), (30, 30)]
)
def test_smpte_times_are_seconds_whatever_the_tempo(frames, per_second):
    tempo = mido.MetaMessage("set_tempo", tempo=1_000_000)
    content = midi_bytes([tempo, on(60, 80, 500), on(60, 0, 1000)])
    content = content[:12] + bytes([256 - frames, 40]) + content[14:]
    read = midi.read_midi(content)
    assert read.notes["onset"] == pytest.approx(500 / 40 / per_second)
    assert read.notes["offset"] == pytest.approx(1500 / 40 / per_second) and read.remarks == ()


NOTES = b"\x00\x90\x3c\x50\x83\x60\x3c\x00"
END = b"\x00\xff\x2f\x00"


def raw_midi(*tracks, length=None, count=None, header=b"", kind=1):
    """A file of raw tracks; ``length`` replaces that of the last track."""
    out = b"MThd" + (6 + len(header)).to_bytes(4) + kind.to_bytes(2)
    out += (len(tracks) if count is None else count).to_bytes(2) + (480).to_bytes(2) + header
    for number, track in enumerate(tracks, 1):
        size = len(track) if length is None or number < len(tracks) else length
        out += b"MTrk" + size.to_bytes(4) + track
    return out


WHOLE = raw_midi(NOTES + END)


@pytest.mark.parametrize(
    ("content", "remark"),
    [
        (b"RIFF\x30\0\0\0RMIDdata\x2a\0\0\0" + WHOLE, "20 bytes outside its tracks"),
        (b"\0" * 128 + WHOLE + b"\0" * 100, "228 bytes outside its tracks were skipped"),
        (WHOLE + WHOLE, "another MIDI file behind it was ignored"),
        (raw_midi(NOTES + END, header=b"more"), ""),
        (raw_midi(b"XFIH", NOTES + END, count=1).replace(b"MTrk", b"XFIH", 1), "12 bytes outside"),
        (raw_midi(NOTES), "1 missing ends of tracks were added"),
        (raw_midi(END + NOTES + END), "1 ends of a track before its last event were ignored"),
        (raw_midi(NOTES + END, length=0), "1 wrong lengths of tracks were corrected"),
        (raw_midi(NOTES + END, length=2**32 - 1), "1 wrong lengths of tracks were corrected"),
        (raw_midi(NOTES + END, length=9), "1 wrong lengths of tracks were corrected"),
        (raw_midi(END, NOTES + END, count=1), "all of its 2 tracks were read; its header names 1"),
        (raw_midi(b"\0\xff\x59\x02\xf8\0" + NOTES + END), "1 impossible key signatures were"),
        (raw_midi(b"\0\xff\x59\x02\0\x07" + NOTES + END), "1 impossible key signatures were"),
        (raw_midi(b"\0\xff\x51\x03\0\0\0" + NOTES + END), "1 impossible tempi were dropped"),
        (raw_midi(b"\0\xff\x58\x04\x04\xff\0\0" + NOTES + END), "1 impossible time signatures"),
        (raw_midi(b"\0\xff\x01\x03\xff\xfe\x80" + NOTES + END), ""),  # text in no encoding
        (raw_midi(b"\0\xff\x6e\x01\0\0\xf0\x02\x43\xf7" + NOTES + END), ""),  # unknown
        (raw_midi(b"\0\xb0\x40\xff" + NOTES + END), "1 values over 127 were set to 127"),
    ],
)
def test_what_sequencers_accept_is_read_with_a_remark(content, remark):
    read = midi.read_midi(content)
    assert read.notes.tolist() == [(0.0, 0.5, 60, 80)]
    assert remark in "; ".join(read.remarks) and bool(remark) == bool(read.remarks)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (WHOLE[:10], "cut off in its header"),
        (WHOLE[:-6], "cut off after"),
        (raw_midi(NOTES + END, count=2), "cut off: 1 of its 2 tracks"),
        (raw_midi(b"\0\x90\xbc\x50" + NOTES + END), "key or controller number 188"),
        (raw_midi(b"\0\xf4" + NOTES + END), "undefined status byte 0xf4"),
        (raw_midi(NOTES + END, kind=5), "names format 5"),
        (WHOLE.replace(b"\x01\xe0", b"\0\0"), "0 ticks per quarter"),
        (WHOLE.replace(b"\x01\xe0", b"\xe6\x28"), "26 frames per second"),
        (b"<score-partwise/>", "no MIDI header"),
    ],
)
def test_damage_is_refused_by_its_reason(content, reason):
    with pytest.raises(InputError, match=f"take.mid: not a readable MIDI file .*{reason}"):
        midi.read_midi(content, "take.mid")


def test_too_much_is_refused_while_reading():
    with pytest.raises(InputError, match="take.mid: more than 50,000 notes. Give a part"):
        midi.read_midi(raw_midi(NOTES * 50_001 + END), "take.mid")
    with pytest.raises(InputError, match="take.mid: more than 5 MB"):
        midi.read_midi(raw_midi(NOTES * 700_000 + END), "take.mid")


def test_pedals_at_one_moment_keep_their_order():
    pressed = [mido.Message("control_change", control=64, value=value) for value in (90, 0, 70)]
    read = midi.read_midi(midi_bytes([*pressed, on(60, 80), on(60, 0, 480)]))
    assert read.pedals["value"].tolist() == [90, 0, 70]


def test_a_release_ends_all_notes_of_its_key():
    read = midi.read_midi(midi_bytes([on(60, 80), on(60, 70, 240), on(60, 0, 240), on(60, 0, 9)]))
    assert read.notes.tolist() == [(0.0, 0.25, 60, 80), (0.25, 0.5, 60, 70)]


def test_times_that_cannot_be_right_are_refused():
    content = midi_bytes([on(60, 80), on(60, 0, 20_000_000)])
    message = "take.mid: not a readable MIDI file .*its last tick is 20,000,000, at 5.8 hours"
    with pytest.raises(InputError, match=message):
        midi.read_midi(content, "take.mid")
    content = content[:12] + (15_360).to_bytes(2) + content[14:]  # fine ticks are no damage
    assert midi.read_midi(content).duration == pytest.approx(651, abs=0.1)


def test_names_of_pitches():
    assert [midi.note_name(pitch) for pitch in (21, 60, 61, 108)] == ["A0", "C4", "C#4", "C8"]
