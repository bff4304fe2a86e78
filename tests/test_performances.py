"""Notes and pedals beside the shards, and batches that say what is to be heard. Cost: 10 s."""

import io
import tracemalloc
import zipfile

import numpy as np
import pandas as pd
import pytest
from archives import FRONT_END, preprocess, row, sound, write_usual_archive

from percepiano_ast.data import maestro
from percepiano_ast.data.batches import DESCRIBE_EVERY, TranscriptionTargets, pretrain_batches
from percepiano_ast.data.shards import (
    TICK,
    Performances,
    join_performances,
    open_performances,
    open_shards,
    pack_performance,
)
from percepiano_ast.errors import InputError
from percepiano_ast.music.midi import NOTE, PEDAL, SUSTAIN, Performance, read_midi, write_midi
from percepiano_ast.music.performance_features import WINDOW_FEATURES
from percepiano_ast.music.piano_roll import frame_targets

SPLITS = {"train": 3, "validation": 1}


def midi_of(seed: int) -> bytes:
    """Sixty notes over thirty seconds, half of them under the pedal."""
    rng, onset = np.random.default_rng(seed), np.arange(60) * 0.5
    notes = np.array(
        [(t, t + 0.3, rng.integers(30, 90), rng.integers(20, 110)) for t in onset], NOTE
    )
    file = io.BytesIO()
    write_midi(Performance(notes, np.array([(0.0, SUSTAIN, 127), (15.0, SUSTAIN, 0)], PEDAL)), file)
    return file.getvalue()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("performances")
    splits = [split for split, count in SPLITS.items() for _ in range(count)]
    parts = (
        (row(split), sound(31, number), midi_of(number) + b"\0" * 9 * (number == 1))
        for number, split in enumerate(splits)
    )
    source = maestro.write_archive(folder / "maestro.zip", parts, 22_050)
    preprocess(source, folder / "out")
    return folder / "out"


def opened(directory, split):
    return open_shards(directory, split, made_by="")


def test_what_was_repaired_is_listed(made):
    recordings = pd.read_csv(made / "recordings.csv").set_index("audio_filename")
    remarks = recordings["midi_remarks"].dropna()
    assert remarks.to_dict() == {
        "2026/recording_0001.wav": "9 bytes outside its tracks were skipped"
    }


def test_what_was_played_comes_back(made):
    performances = open_performances(made)
    assert len(performances) == 4
    true, found = read_midi(midi_of(0)), performances["2026/recording_0000.wav"]
    for name in ("onset", "offset"):
        np.testing.assert_allclose(found.notes[name], true.notes[name], atol=TICK)
    for name in ("pitch", "velocity"):
        np.testing.assert_array_equal(found.notes[name], true.notes[name])
    np.testing.assert_array_equal(found.pedals["value"], true.pedals["value"])


def test_batches_say_what_is_to_be_heard_in_their_windows(made):
    train = opened(made, "train")
    targets = TranscriptionTargets.open(made, train, 1024)
    batches = pretrain_batches(train, n_frames=1024, batch_size=3, seed=0, targets=targets)
    batch = next(batches.from_step(5))
    for number, clip in enumerate(batch["clip"]):
        key, _, start = clip.rpartition(" from frame ")
        for found, true in zip(
            batch["targets"],
            frame_targets(open_performances(made)[key], int(start), 1024, FRONT_END),
        ):
            np.testing.assert_array_equal(found[number], true)
    assert batch["descriptors"].shape == (3, len(WINDOW_FEATURES))
    known = ~np.isnan(batch["descriptors"]).any(axis=1)
    assert known.tolist() == [row % DESCRIBE_EVERY == 0 for row in range(3)]


def test_a_step_has_the_same_batch_whenever_it_is_asked_for(made):
    train = opened(made, "train")
    first, again = (
        next(
            pretrain_batches(
                train,
                n_frames=512,
                batch_size=2,
                seed=1,
                targets=TranscriptionTargets.open(made, train, 512),
            ).from_step(7)
        )
        for _ in range(2)
    )
    np.testing.assert_array_equal(first["descriptors"], again["descriptors"])
    np.testing.assert_array_equal(first["targets"].onset, again["targets"].onset)


def test_every_split_is_described_by_the_scale_of_training(made):
    targets = TranscriptionTargets.open(made, opened(made, "train"), 512)
    assert targets.of(opened(made, "validation"), "validation").description == targets.description


def test_sound_without_readable_midi_is_kept_and_serves_masked_patches_alone(tmp_path):
    lines = preprocess(write_usual_archive(tmp_path / "maestro.zip"), tmp_path / "out")
    assert "  6 of 6 recordings have no readable MIDI; only ssast can use them" in lines
    assert any(
        "no MIDI for 2026/recording_0000.wav" in line and "not a readable MIDI file" in line
        for line in lines
    )
    train = opened(tmp_path / "out", "train")
    assert pretrain_batches(train, n_frames=1024, batch_size=2, seed=0).steps_per_epoch
    with pytest.raises(InputError, match="have no performances.npz, .* pre-train with ssast"):
        TranscriptionTargets.open(tmp_path / "out", train, 1024)


def test_a_recording_without_notes_among_others_is_named(tmp_path):
    parts = (
        (row("train"), sound(12, number), midi) for number, midi in enumerate((midi_of(0), b"MThd"))
    )
    preprocess(maestro.write_archive(tmp_path / "maestro.zip", parts, 22_050), tmp_path / "out")
    with pytest.raises(
        InputError,
        match=(
            "1 recordings of the split 'train' have no readable MIDI, such as 2026/recording_0001"
        ),
    ):
        TranscriptionTargets.open(tmp_path / "out", opened(tmp_path / "out", "train"), 1024)


def npz(change=None, **more) -> bytes:
    """A file of two performances, with ``more`` arrays or a changed member."""
    one = Performance(np.zeros(3, NOTE), np.zeros(2, PEDAL))
    content = join_performances({"a": pack_performance(one), "b": pack_performance(one)})
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for name, values in more.items():
        file = io.BytesIO()
        np.save(file, values, allow_pickle=True)
        members[name.replace("__", ".") + ".npy"] = file.getvalue()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, values in (members if change is None else change(members)).items():
            archive.writestr(name, values)
    return packed.getvalue()


def huge(members: dict[str, bytes]) -> dict[str, bytes]:
    """An array whose header states 2^40 values."""
    head = io.BytesIO()
    shape = {"descr": "<u4", "fortran_order": False, "shape": (2**40,)}
    np.lib.format.write_array_header_1_0(head, shape)
    return members | {"notes.onset.npy": head.getvalue()}


def flipped(content: bytes, position: int) -> bytes:
    position = int(position * len(content))
    return content[:position] + bytes([content[position] ^ 16]) + content[position + 1 :]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x05\x06" + bytes(18),
        npz()[:-40],
        flipped(npz(), 0.1),
        flipped(npz(), 0.3),
        flipped(npz(), 0.5),
        npz(huge),
        npz(key=np.array(["a", object()], object)),
        npz(key=np.array(["a", "a"])),
        npz(key=np.zeros((2, 2))),
        npz(notes__onset=np.zeros(3, np.uint32)),
        npz(notes__onset=np.zeros(6, np.float64)),
        npz(notes__count=np.array([-3, 9])),
        npz(lambda members: members | {"key.npy": b"not an array"}),
        npz(lambda members: {"key.npy": members["key.npy"]}),
    ],
    ids=map(str, range(15)),  # the time is in the archives
)
def test_damaged_performances_are_refused(tmp_path, content):
    (tmp_path / "performances.npz").write_bytes(content)
    with pytest.raises(InputError, match="performances.npz .*Run preprocess again") as refused:
        Performances(tmp_path / "performances.npz", "Run preprocess again.")
    assert len(str(refused.value).splitlines()) == 1
    (tmp_path / "performances.npz").write_bytes(npz())
    assert len(Performances(tmp_path / "performances.npz", "Run preprocess again.")["b"].notes) == 3


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_performances_that_expand_are_refused_before_they_do(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "performances.npz", "w", method) as archive:
        for name in ("key.npy", "notes.count.npy"):
            with archive.open(name, "w") as file:
                for _ in range(300 if method == zipfile.ZIP_DEFLATED else 30):
                    file.write(bytes(2**20))
    tracemalloc.start()
    with pytest.raises(
        InputError, match="expands to more than 536,870,912 bytes|is not compressed"
    ):
        Performances(tmp_path / "performances.npz", "Run preprocess again.")
    assert tracemalloc.get_traced_memory()[1] < 5e7
    tracemalloc.stop()
