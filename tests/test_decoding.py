"""Steps to notes and pedals, and how they are judged. Cost: 1 s."""

import numpy as np
import pytest

from percepiano_ast.config import FrontEnd
from percepiano_ast.decoding import Heard, cross_fade, decode, note_scores
from percepiano_ast.descriptors import describe
from percepiano_ast.models.transcription import STEP, on_steps
from percepiano_ast.performance import NOTE, PEDAL, Performance, read_midi, trimmed
from percepiano_ast.targets import Targets, frame_times, frames

FRONT_END = FrontEnd()


def heard_perfectly(performance: Performance) -> Heard:
    """What a network would say that had learned its targets by heart."""
    n_frames = STEP * (FRONT_END.n_frames(int((performance.duration + 1) * 22_050)) // STEP)
    targets = frames(performance, 0, n_frames, FRONT_END)
    steps = {
        name: np.asarray(values)[0]
        for name, values in on_steps(Targets(*(x[None] for x in targets))).items()
    }
    del steps["struck"]
    return Heard(**steps, times=frame_times(0, n_frames, FRONT_END).reshape(-1, STEP).mean(axis=1))


@pytest.fixture(scope="module")
def performance(percepiano_dir) -> Performance:
    return trimmed(
        read_midi(sorted((percepiano_dir / "virtuoso/data/all_2rounds").glob("*8bars_1_*.mid"))[0])
    )


@pytest.fixture(scope="module")
def decoded(performance) -> Performance:
    return decode(heard_perfectly(performance))


def test_perfect_hearing_gives_the_notes_back(performance, decoded):
    scores = note_scores(performance, decoded)
    assert scores["f1"] > 0.97 and scores["velocity_mae"] < 0.5
    assert note_scores(performance, decoded, tolerance=0.011)["f1"] > 0.95  # half a step


def test_perfect_hearing_gives_the_descriptors_back(performance, decoded):
    true, heard = describe(performance), describe(trimmed(decoded))
    for name in ("pedal_share", "pedal_mean", "half_pedal_share", "una_corda_share", "pitch_mean"):
        assert heard[name] == pytest.approx(true[name], rel=0.05, abs=0.05), name


def test_silence_is_no_performance():
    quiet = np.full((50, 88), 0.05)
    nothing = Heard(quiet, quiet, quiet, quiet, np.zeros(50), np.zeros(50), np.arange(50) * 0.02)
    assert decode(nothing) is None
    assert (
        note_scores(Performance(np.array([(0, 1, 60, 60)], NOTE), np.array([], PEDAL)), None)["f1"]
        == 0
    )


def test_a_single_heard_note_can_be_described():
    onset = np.zeros((50, 88))
    onset[49, 3] = 0.9
    still = np.zeros((50, 88))
    performance = decode(
        Heard(onset, still, still, still, np.zeros(50), np.ones(50), np.arange(50) * 0.02)
    )
    assert len(performance.notes) == 1 and performance.notes["velocity"][0] == 1
    assert np.isfinite(list(describe(trimmed(performance)).values())).all()


def test_an_onset_between_two_steps_is_found_there():
    onset = np.zeros((9, 88))
    onset[3:7, 0] = 0.5, 0.9, 0.7, 0.1
    still = np.zeros((9, 88))
    performance = decode(
        Heard(onset, still, still, still, np.zeros(9), np.zeros(9), np.arange(9) * 0.02)
    )
    assert 0.08 < performance.notes["onset"][0] < 0.09


def test_pieces_that_agree_join_without_a_seam():
    whole = np.random.default_rng(0).random((70, 88)).astype(np.float32)
    starts = [0, 15, 30, 40]
    np.testing.assert_allclose(
        cross_fade([whole[s : s + 30] for s in starts], starts, 70), whole, rtol=1e-5
    )


def test_a_piece_counts_most_in_its_middle():
    joined = cross_fade([np.zeros(8), np.ones(8)], [0, 4], 12)
    assert (
        np.all(np.diff(joined[3:9]) >= 0)
        and joined[3] == 0
        and joined[8] == 1
        and 0.1 < joined[5] < joined[6] < 0.9
    )


def test_each_note_is_matched_once_within_the_tolerance():
    def of(*onsets):
        return Performance(
            np.array([(t, t + 0.1, 60, 60) for t in onsets], NOTE), np.array([], PEDAL)
        )

    scores = note_scores(of(1.0, 2.0, 3.0), of(1.04, 1.05, 2.06, 3.0))
    assert scores["recall"] == pytest.approx(2 / 3) and scores["precision"] == 0.5
