"""Accuracy of transcriptions, as on the results page. Cost: 10 s."""

import csv
import io

import accuracy
import numpy as np
import pytest
from reproduce import main

from percepiano_ast.errors import InputError
from percepiano_ast.inference.rate import BUNDLED
from percepiano_ast.music.midi import NOTE, PEDAL, SUSTAIN, Performance


def played_and_pedal():
    notes = [(0.5 + 0.4 * k, 0.8 + 0.4 * k, 50 + 3 * (k % 7), 30 + 4 * k) for k in range(20)]
    pedals = [(0.6 + k, SUSTAIN, 127 * (k % 2)) for k in range(8)]
    return Performance(np.array(notes, NOTE), np.array(pedals, PEDAL))


def test_scores_of_notes_are_those_of_mir_eval():
    played = played_and_pedal().notes
    perfect = accuracy.note_scores(played, played)
    names = ("onset_f1", "offset_f1", "velocity_f1", "velocity_r")
    assert [perfect[name] for name in names] == pytest.approx([1, 1, 1, 1])
    assert perfect["velocity_error"] == perfect["onset_sd"] == 0

    found = played[:15].copy()  # five notes are missed, four end too late, all are too soft
    found["velocity"] -= 10
    found["offset"][:4] += 0.1
    found["onset"] += 0.02
    scores = accuracy.note_scores(played, found)
    assert scores["onset_f1"] == pytest.approx(2 * 15 / 35)
    assert scores["offset_f1"] == scores["velocity_f1"] == pytest.approx(2 * 11 / 35)
    assert scores["velocity_error"] == 10 and scores["velocity_r"] == pytest.approx(1)
    nothing = accuracy.note_scores(played, played[:0])
    assert nothing["onset_f1"] == nothing["offset_f1"] == 0 and np.isnan(nothing["velocity_r"])


@pytest.mark.parametrize("delayed", [True, False])
def test_the_delay_of_a_recording_is_estimated_and_that_of_a_rendering_counts(delayed):
    played = played_and_pedal()
    notes, pedals = played.notes.copy(), played.pedals.copy()
    for table, column in ((notes, "onset"), (notes, "offset"), (pedals, "time")):
        table[column] += 0.08
    later = Performance(notes, pedals)
    clip = accuracy.Clip(np.zeros(22_050 * 10, np.float32), played, delayed)
    scores = accuracy.measure(lambda wave: later, iter([clip, clip]), 22_050)
    assert scores["clips"] == 2 and scores["onset_f1"] == delayed
    assert scores["lag"] == pytest.approx(0.08 if delayed else 0)
    assert (scores["pedal_agreement"] > 0.99) == (scores["pedal_r"] > 0.99) == delayed


@pytest.mark.real_data
def test_the_bundled_model_is_measured_on_a_recording_and_on_renderings(percepiano_dir, capsys):
    arguments = ["transcription", str(BUNDLED), "--percepiano", str(percepiano_dir)]
    assert main([*arguments, "--synthesizers", "builtin+phone", "--clips", "1"]) == 0
    recording, rendering = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert recording["condition"] == "percepiano recording" and recording["clips"] == "1"
    assert rendering["condition"] == "builtin+phone" and rendering["clips"] == "1"
    for row in (recording, rendering):
        assert 0.5 < float(row["onset_f1"]) < 1 and 0.5 < float(row["pedal_agreement"]) <= 1
        assert float(row["velocity_f1"]) <= float(row["offset_f1"]) < float(row["onset_f1"])
    assert float(recording["lag"]) and not float(rendering["lag"])


@pytest.mark.real_data
def test_what_cannot_be_measured_is_refused(percepiano_dir, tmp_path, capsys):
    arguments = ["transcription", str(BUNDLED), "--percepiano", str(tmp_path)]
    assert main([*arguments, "--real", str(tmp_path)]) == 2
    assert f"no *.flac in {tmp_path}. Give a folder of excerpts" in capsys.readouterr().err
    assert main(["transcription", str(tmp_path / "none.safetensors"), *arguments[2:]]) == 2
    assert "none.safetensors" in capsys.readouterr().err
    with pytest.raises(InputError, match="unknown condition 'phne'. Did you mean 'phone'"):
        next(accuracy.renderings(percepiano_dir, "builtin+phne", 1, 22_050))
