"""Frame targets from notes, and notes from frame predictions. Cost: 2 s."""

import numpy as np
import pytest

from percepiano_ast.config import KALDI, FrontEnd
from percepiano_ast.models.transcription import STEP, on_steps
from percepiano_ast.music.midi import (
    NOTE,
    PEDAL,
    SUSTAIN,
    UNA_CORDA,
    Performance,
    damped,
    excerpt,
    read_midi,
    trimmed,
)
from percepiano_ast.music.performance_features import performance_features
from percepiano_ast.music.piano_roll import (
    LOWEST,
    FramePredictions,
    FrameTargets,
    PianoRoll,
    crossfade,
    frame_targets,
    frame_times,
    frames_to_notes,
)

FRONT_END = FrontEnd()
HOP = FRONT_END.hop_length / FRONT_END.sample_rate
C4, E4 = 60 - LOWEST, 64 - LOWEST


def played(notes, pedals=()) -> Performance:
    return Performance(np.array(notes, NOTE), np.array(list(pedals), PEDAL))


@pytest.fixture(scope="module")
def performance(percepiano_dir) -> Performance:
    return trimmed(
        read_midi(sorted((percepiano_dir / "virtuoso/data/all_2rounds").glob("*8bars_1_*.mid"))[0])
    )


def test_a_note_is_struck_in_the_frame_nearest_to_its_onset_and_held_to_its_release():
    targets = frame_targets(played([(10.4 * HOP, 20 * HOP, 60, 127)]), 0, 40, FRONT_END)
    assert np.argwhere(~np.isnan(targets.onset)).tolist() == [[10, C4]]
    assert targets.onset[10, C4] == pytest.approx(0.4, abs=1e-3)
    assert np.argwhere(~np.isnan(targets.offset)).tolist() == [[20, C4]]
    assert np.flatnonzero(targets.frame[:, C4]).tolist() == list(range(10, 20))
    assert np.array_equal(targets.frame, targets.sustained)
    assert targets.velocity[10, C4] == 1 and targets.velocity.sum() == 1


def test_the_pedal_holds_what_was_released_until_it_is_lifted():
    pedals = [(5 * HOP, SUSTAIN, 127), (30 * HOP, SUSTAIN, 63)]
    targets = frame_targets(played([(10 * HOP, 20 * HOP, 60, 64)], pedals), 0, 40, FRONT_END)
    assert np.flatnonzero(targets.sustained[:, C4]).tolist() == list(range(10, 30))
    assert np.flatnonzero(targets.frame[:, C4]).tolist() == list(range(10, 20))
    np.testing.assert_allclose(targets.sustain[[4, 5, 29, 30]], [0, 1, 1, 63 / 127])


def test_a_new_stroke_of_the_key_is_a_new_note_under_the_pedal():
    notes = [
        (10 * HOP, 12 * HOP, 60, 50),
        (10 * HOP, 12 * HOP, 64, 50),
        (20 * HOP, 22 * HOP, 60, 90),
    ]
    silent = damped(played(notes, [(0.0, SUSTAIN, 100)]))
    assert silent.tolist() == [20 * HOP, np.inf, np.inf]


def test_a_pedal_put_down_after_the_release_holds_nothing():
    silent = damped(played([(0.1, 0.2, 60, 50)], [(0.3, SUSTAIN, 127)]))
    assert silent.tolist() == [0.2]


def test_half_pedal_and_una_corda_keep_their_degree():
    targets = frame_targets(
        played([(0.0, 0.1, 60, 50)], [(0.0, SUSTAIN, 40), (0.0, UNA_CORDA, 90)]), 0, 4, FRONT_END
    )
    np.testing.assert_allclose(targets.sustain, 40 / 127)
    np.testing.assert_allclose(targets.una_corda, 90 / 127)


def test_a_window_is_a_slice_of_the_whole(performance):
    whole = frame_targets(performance, 0, 1200, FRONT_END)
    roll = PianoRoll(performance, FRONT_END)
    for start in (0, 1, 333, 900):
        for part, of_all in zip(roll.frames(start, 300), whole):
            np.testing.assert_array_equal(part, of_all[start : start + 300])


def test_all_that_was_played_is_there(performance):
    targets = frame_targets(
        performance, 0, FRONT_END.n_frames(int((performance.duration + 1) * 22_050)), FRONT_END
    )
    struck = ~np.isnan(targets.onset)
    assert struck.sum() == len(performance.notes)
    held = (performance.notes["offset"] - performance.notes["onset"]).sum() / HOP
    assert targets.frame.sum() == pytest.approx(held, rel=0.02)
    assert (targets.sustained >= targets.frame).all() and (targets.frame >= struck).all()


def test_kaldis_frames_start_where_ours_are_centred():
    assert frame_times(0, 2, KALDI).tolist() == [200 / 16_000, 360 / 16_000]
    assert frame_times(3, 1, FRONT_END).tolist() == [3 * 220 / 22_050]


def test_notes_beyond_the_keyboard_have_no_column():
    targets = frame_targets(
        played([(0.0, 0.1, 20, 50), (0.0, 0.1, 64, 50), (0.0, 0.1, 109, 50)]), 0, 10, FRONT_END
    )
    assert np.argwhere(~np.isnan(targets.onset)).tolist() == [[0, E4]]


def test_an_excerpt_keeps_the_state_of_the_pedals():
    whole = played(
        [(0.5, 3.0, 60, 50), (1.5, 9.0, 64, 60)],
        [(0.2, SUSTAIN, 80), (2.0, SUSTAIN, 0), (4.0, SUSTAIN, 9)],
    )
    part = excerpt(whole, 1.0, 3.0)
    assert part.notes.tolist() == [(0.5, 2.0, 64, 60)]
    assert part.pedals.tolist() == [(0.0, SUSTAIN, 80), (1.0, SUSTAIN, 0)]
    assert excerpt(whole, 2.0, 3.0) is None


# --- Notes from predictions ---------------------------------------------------------------------


def note_scores(played, found, tolerance=0.05) -> dict[str, float]:
    """Note onsets as in mir_eval: same pitch, within ``tolerance`` seconds, each matched at most
    once, the earliest first."""
    errors = []
    for pitch in np.unique(played.notes["pitch"]):
        true, ours = (one.notes[one.notes["pitch"] == pitch] for one in (played, found))
        k = 0
        for note in true:
            while k < len(ours) and ours["onset"][k] < note["onset"] - tolerance:
                k += 1
            if k < len(ours) and ours["onset"][k] <= note["onset"] + tolerance:
                errors.append(abs(int(ours["velocity"][k]) - int(note["velocity"])))
                k += 1
    precision, recall = len(errors) / len(found.notes), len(errors) / len(played.notes)
    f1 = 2 * precision * recall / (precision + recall)
    return {"precision": precision, "recall": recall, "f1": f1, "velocity_mae": np.mean(errors)}


def heard_perfectly(performance: Performance) -> FramePredictions:
    """What a network would say that had learned its targets by heart."""
    n_frames = STEP * (FRONT_END.n_frames(int((performance.duration + 1) * 22_050)) // STEP)
    targets = frame_targets(performance, 0, n_frames, FRONT_END)
    steps = {
        name: np.asarray(values)[0]
        for name, values in on_steps(FrameTargets(*(x[None] for x in targets))).items()
    }
    del steps["struck"]
    return FramePredictions(
        **steps, times=frame_times(0, n_frames, FRONT_END).reshape(-1, STEP).mean(axis=1)
    )


@pytest.fixture(scope="module")
def decoded(performance) -> Performance:
    return frames_to_notes(heard_perfectly(performance))


def test_perfect_hearing_gives_the_notes_back(performance, decoded):
    scores = note_scores(performance, decoded)
    assert scores["f1"] > 0.97 and scores["velocity_mae"] < 0.5
    assert note_scores(performance, decoded, tolerance=0.002)["f1"] > 0.95  # a tenth of a step


def test_perfect_hearing_gives_the_releases_back(performance, decoded):
    errors = []
    for onset, offset, pitch, _ in performance.notes.tolist():
        near = decoded.notes[decoded.notes["pitch"] == pitch]
        k = np.abs(near["onset"] - onset).argmin()
        errors.append(abs(near["offset"][k] - offset))
    assert np.median(errors) < 0.002 and np.quantile(errors, 0.9) < 0.03


def test_perfect_hearing_gives_the_descriptors_back(performance, decoded):
    true, heard = performance_features(performance), performance_features(trimmed(decoded))
    for name in ("pedal_share", "pedal_mean", "half_pedal_share", "una_corda_share", "pitch_mean"):
        assert heard[name] == pytest.approx(true[name], rel=0.05, abs=0.05), name


def test_silence_is_no_performance():
    quiet = np.full((50, 88), 0.05)
    nothing = FramePredictions(*[quiet] * 5, np.zeros(50), np.zeros(50), np.arange(50) * 0.02)
    assert frames_to_notes(nothing) is None


def test_a_single_heard_note_can_be_described():
    onset = np.zeros((50, 88))
    onset[49, 3] = 0.9
    still = np.zeros((50, 88))
    performance = frames_to_notes(
        FramePredictions(onset, *[still] * 4, np.zeros(50), np.ones(50), np.arange(50) * 0.02)
    )
    assert len(performance.notes) == 1 and performance.notes["velocity"][0] == 1
    assert np.isfinite(list(performance_features(trimmed(performance)).values())).all()


def test_an_onset_between_two_steps_is_found_there():
    onset = np.zeros((9, 88))
    onset[3:7, 0] = 0.5, 0.9, 0.7, 0.1
    still = np.zeros((9, 88))
    performance = frames_to_notes(
        FramePredictions(onset, *[still] * 4, np.zeros(9), np.zeros(9), np.arange(9) * 0.02)
    )
    assert 0.08 < performance.notes["onset"][0] < 0.09


def test_pieces_that_agree_join_without_a_seam():
    whole = np.random.default_rng(0).random((70, 88)).astype(np.float32)
    starts = [0, 15, 30, 40]
    np.testing.assert_allclose(
        crossfade([whole[s : s + 30] for s in starts], starts, 70), whole, rtol=1e-5
    )


def test_a_piece_counts_most_in_its_middle():
    joined = crossfade([np.zeros(8), np.ones(8)], [0, 4], 12)
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
