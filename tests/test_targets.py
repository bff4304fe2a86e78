"""Targets of frames: what is said to be heard, and when. Cost: 1 s."""

import numpy as np
import pytest

from percepiano_ast.config import KALDI, FrontEnd
from percepiano_ast.performance import (
    NOTE,
    PEDAL,
    SUSTAIN,
    UNA_CORDA,
    Performance,
    read_midi,
    trimmed,
)
from percepiano_ast.targets import LOWEST, Roll, damped, excerpt, frame_times, frames

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
    targets = frames(played([(10.4 * HOP, 20 * HOP, 60, 127)]), 0, 40, FRONT_END)
    assert np.argwhere(targets.onset).tolist() == [[10, C4]]
    assert np.flatnonzero(targets.down[:, C4]).tolist() == list(range(10, 20))
    assert np.array_equal(targets.down, targets.sounding)
    assert targets.velocity[10, C4] == 1 and targets.velocity.sum() == 1


def test_the_pedal_holds_what_was_released_until_it_is_lifted():
    pedals = [(5 * HOP, SUSTAIN, 127), (30 * HOP, SUSTAIN, 63)]
    targets = frames(played([(10 * HOP, 20 * HOP, 60, 64)], pedals), 0, 40, FRONT_END)
    assert np.flatnonzero(targets.sounding[:, C4]).tolist() == list(range(10, 30))
    assert np.flatnonzero(targets.down[:, C4]).tolist() == list(range(10, 20))
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
    targets = frames(
        played([(0.0, 0.1, 60, 50)], [(0.0, SUSTAIN, 40), (0.0, UNA_CORDA, 90)]), 0, 4, FRONT_END
    )
    np.testing.assert_allclose(targets.sustain, 40 / 127)
    np.testing.assert_allclose(targets.una_corda, 90 / 127)


def test_a_window_is_a_slice_of_the_whole(performance):
    whole = frames(performance, 0, 1200, FRONT_END)
    roll = Roll(performance, FRONT_END)
    for start in (0, 1, 333, 900):
        for part, of_all in zip(roll.frames(start, 300), whole):
            np.testing.assert_array_equal(part, of_all[start : start + 300])


def test_all_that_was_played_is_there(performance):
    targets = frames(
        performance, 0, FRONT_END.n_frames(int((performance.duration + 1) * 22_050)), FRONT_END
    )
    assert targets.onset.sum() == len(performance.notes)
    held = (performance.notes["offset"] - performance.notes["onset"]).sum() / HOP
    assert targets.down.sum() == pytest.approx(held, rel=0.02)
    assert (targets.sounding >= targets.down).all() and (targets.down >= targets.onset).all()


def test_kaldis_frames_start_where_ours_are_centred():
    assert frame_times(0, 2, KALDI).tolist() == [200 / 16_000, 360 / 16_000]
    assert frame_times(3, 1, FRONT_END).tolist() == [3 * 220 / 22_050]


def test_notes_beyond_the_keyboard_have_no_column():
    targets = frames(
        played([(0.0, 0.1, 20, 50), (0.0, 0.1, 64, 50), (0.0, 0.1, 109, 50)]), 0, 10, FRONT_END
    )
    assert np.argwhere(targets.onset).tolist() == [[0, E4]]


def test_an_excerpt_keeps_the_state_of_the_pedals():
    whole = played(
        [(0.5, 3.0, 60, 50), (1.5, 9.0, 64, 60)],
        [(0.2, SUSTAIN, 80), (2.0, SUSTAIN, 0), (4.0, SUSTAIN, 9)],
    )
    part = excerpt(whole, 1.0, 3.0)
    assert part.notes.tolist() == [(0.5, 2.0, 64, 60)]
    assert part.pedals.tolist() == [(0.0, SUSTAIN, 80), (1.0, SUSTAIN, 0)]
    assert excerpt(whole, 2.0, 3.0) is None
