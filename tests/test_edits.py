"""A variation changes its parameter, in its direction, and nothing else. About 5 s; 25 s with real
data."""

from dataclasses import replace

import numpy as np
import pytest

from percepiano_ast.data import demo, percepiano
from percepiano_ast.data.demo import RATED
from percepiano_ast.errors import InputError
from percepiano_ast.music import align, edits
from percepiano_ast.music.edits import EDITS, PARAMETERS, Edit, NotApplicable
from percepiano_ast.music.midi import (
    NOTE,
    PEDAL,
    SUSTAIN,
    UNA_CORDA,
    Performance,
    read_midi,
    trimmed,
)

IDS = [variation.label for variation in EDITS]


def played(tune=0, seed=1, **style):
    """A demo performance with every habit a little above the plain one, and the deadpan one of the
    same tune."""
    habits = dict.fromkeys(demo.PARAMETERS, 0.5) | {"una_corda": 1.0, "half_pedal": 0.0} | style
    rng = np.random.default_rng(seed)
    deadpan = demo.DEADPAN
    return tuple(trimmed(demo.perform(RATED[tune], one, rng)) for one in (habits, deadpan))


def play(*notes, pedals=()):
    """A performance of (onset, offset, pitch, velocity) and (time, controller, value)."""
    return Performance(np.array(list(notes), dtype=NOTE), np.array(list(pedals), dtype=PEDAL))


def vary(name, strength, performance, score=None):
    return Edit(PARAMETERS[name], strength).apply(performance, score)


def parts(performance):
    """What `Parameter.changes` names; notes key by key, an order that no variation changes."""
    notes = np.sort(performance.notes, order=["pitch", "onset"])
    sustain, soft = (
        performance.pedals[performance.pedals["number"] == number]
        for number in (SUSTAIN, UNA_CORDA)
    )
    return {
        "onset": notes["onset"],
        "offset": notes["offset"],
        "velocity": notes["velocity"],
        "pitch": notes["pitch"],
        "sustain": sustain["value"],
        "una_corda": soft["value"],
        "pedal_time": performance.pedals["time"],
    }


def check_unchanged(before, after, changes):
    """Everything that a parameter does not name is equal to the last bit."""
    changed = set(changes) | ({"pedal_time"} if {"sustain", "una_corda"} & set(changes) else set())
    assert len(before.notes) == len(after.notes) and before.remarks == after.remarks
    for name, values in parts(before).items():
        if name not in changed:
            np.testing.assert_array_equal(parts(after)[name], values, err_msg=name)
    for number, name in ((SUSTAIN, "sustain"), (UNA_CORDA, "una_corda")):
        if "pedal_time" not in changes and name not in changes:
            one, other = (p.pedals[p.pedals["number"] == number] for p in (before, after))
            np.testing.assert_array_equal(one, other)


def check_playable(performance):
    """What `Performance` promises: sorted, no key struck while it is down, nothing before zero."""
    notes = performance.notes
    assert np.array_equal(notes, notes[np.lexsort((notes["pitch"], notes["onset"]))])
    assert (np.diff(performance.pedals["time"]) >= 0).all()
    assert notes["onset"].min() >= 0 and (notes["offset"] > notes["onset"]).all()
    assert notes["velocity"].min() >= 1 and notes["velocity"].max() <= 127
    by_key = np.sort(notes, order=["pitch", "onset"])
    repeated = by_key["pitch"][1:] == by_key["pitch"][:-1]
    assert (by_key["offset"][:-1] <= by_key["onset"][1:] + 1e-9)[repeated].all()


# --- Every variation ----------------------------------------------------------------------------


@pytest.mark.parametrize("variation", EDITS, ids=IDS)
@pytest.mark.parametrize("tune", [0, 3])
def test_a_variation_changes_what_it_names_and_nothing_else(variation, tune):
    performance, score = played(tune)
    notes, pedals = performance.notes.copy(), performance.pedals.copy()
    changed = variation.apply(performance, score)
    assert not edits.same(changed, performance)
    check_unchanged(performance, changed, variation.parameter.changes)
    check_playable(changed)
    assert np.array_equal(performance.notes, notes) and np.array_equal(performance.pedals, pedals)


@pytest.mark.parametrize("parameter", PARAMETERS.values(), ids=PARAMETERS)
def test_more_strength_is_more_of_the_parameter(parameter):
    performance, score = played(half_pedal=-1.0)
    unchanged = parameter.measure(performance, score)
    amounts = {0.0: unchanged}
    for strength in parameter.strengths:
        amounts[strength] = parameter.measure(
            Edit(parameter, strength).apply(performance, score), score
        )
    if parameter.name == "soft pedal":  # it was down already
        assert amounts[-1] == 0 and amounts[1] == 1 and amounts[0.0] > 0.9
    else:
        values = [amount for _, amount in sorted(amounts.items())]
        assert values == sorted(values) and len(set(values)) == len(values)


@pytest.mark.real_data
def test_real_performances_stay_playable(percepiano_dir):
    index = percepiano.load_index(percepiano_dir)
    midi = percepiano.find_midi(percepiano_dir)
    score = index[~index["human"]].drop_duplicates("segment").set_index("segment")["clip"]
    some = index[index["human"]].iloc[::40]
    for clip, segment in zip(some["clip"], some["segment"], strict=True):
        performance, deadpan = (trimmed(read_midi(midi[name])) for name in (clip, score[segment]))
        for variation in EDITS:
            changed = variation.apply(performance, deadpan)
            check_playable(changed)
            if (
                "pitch" not in variation.parameter.changes
                and "onset" not in variation.parameter.changes
            ):
                check_unchanged(performance, changed, variation.parameter.changes)


# --- One by one ---------------------------------------------------------------------------------


def test_softer_subtracts_from_every_velocity_down_to_one():
    changed = vary("loudness", -20, play((0.1, 0.5, 60, 90), (0.6, 1.0, 62, 15)))
    assert changed.notes["velocity"].tolist() == [70, 1]


def test_slower_stretches_notes_and_pedals_alike():
    performance = play((0.1, 0.5, 60, 90), (0.6, 1.0, 62, 80), pedals=[(0.2, SUSTAIN, 127)])
    changed = vary("tempo", -0.25, performance)
    np.testing.assert_allclose(changed.notes["onset"], performance.notes["onset"] / 0.75)
    np.testing.assert_allclose(changed.notes["offset"], performance.notes["offset"] / 0.75)
    np.testing.assert_allclose(changed.pedals["time"], performance.pedals["time"] / 0.75)


PEDALLED = play(
    (0.1, 4.0, 60, 90),
    pedals=[
        (0.5, SUSTAIN, 100),
        (1.0, SUSTAIN, 127),
        (1.5, SUSTAIN, 20),
        (2.5, SUSTAIN, 90),
        (3.5, SUSTAIN, 0),
    ],
)


@pytest.mark.parametrize(
    ("strength", "events"),
    [
        (-1, []),
        (-0.5, [(0.5, 100), (1.0, 0), (1.5, 20), (2.5, 90), (3.0, 0), (3.5, 0)]),
        (0.5, [(0.5, 100), (1.0, 127), (2.0, 20), (2.5, 90), (3.75, 0)]),
        (1, [(0.0, 127)]),
    ],
)
def test_the_pedal_is_lifted_earlier_or_later_by_a_share_of_the_stretch(strength, events):
    pedals = vary("pedal", strength, PEDALLED).pedals
    assert list(zip(pedals["time"].tolist(), pedals["value"].tolist())) == events


def test_half_pedal_keeps_the_pedal_down_but_not_deep():
    assert vary("pedal depth", -1, PEDALLED).pedals["value"].tolist() == [64, 64, 20, 64, 0]


def test_flat_dynamics_are_the_mean_and_wider_ones_keep_it():
    performance = play(*[(0.1 + i, 0.9 + i, 60, v) for i, v in enumerate((40, 60, 80))])
    assert vary("dynamics", -1, performance).notes["velocity"].tolist() == [60, 60, 60]
    assert vary("dynamics", 0.5, performance).notes["velocity"].tolist() == [30, 60, 90]


def test_accents_go_while_a_crescendo_stays():
    swell = np.linspace(30, 100, 40)
    accents = swell + 12 * (np.arange(40) % 4 == 0)
    flat, plain = (
        vary(
            "accents",
            -1,
            play(*[(0.1 + 0.5 * i, 0.5 + 0.5 * i, 60, round(v)) for i, v in enumerate(velocity)]),
        )
        for velocity in (accents, swell)
    )
    assert np.abs(np.diff(flat.notes["velocity"].astype(int))).max() <= 4
    assert (
        np.abs(flat.notes["velocity"].astype(int) - plain.notes["velocity"].astype(int) - 3).max()
        <= 4
    )


def test_voicing_and_melody_are_told_within_chords():
    performance = play((0.1, 1, 48, 50), (0.1, 1, 55, 60), (0.12, 1, 72, 100), (1.1, 2, 60, 33))
    assert vary("voicing", -1, performance).notes["velocity"].tolist() == [70, 70, 70, 33]
    assert vary("melody", 15, performance).notes["velocity"].tolist() == [45, 55, 110, 33]


def test_legato_ends_at_the_next_stroke_of_the_key_and_at_the_end():
    performance = play((0.1, 0.5, 60, 80), (0.7, 1.1, 60, 80), (0.7, 1.3, 64, 80))
    np.testing.assert_allclose(
        vary("articulation", 1, performance).notes["offset"], [0.7, 1.3, 1.3]
    )
    np.testing.assert_allclose(
        vary("articulation", -0.6, performance).notes["offset"], [0.26, 0.86, 0.94]
    )


def test_chords_together_begin_at_one_moment():
    performance = play((0.1, 1, 48, 50), (0.12, 1, 55, 60), (0.14, 1, 72, 100), (1.1, 2, 60, 33))
    np.testing.assert_allclose(
        vary("asynchrony", -1, performance).notes["onset"], [0.12, 0.12, 0.12, 1.1]
    )


def test_transposition_stops_at_the_ends_of_the_keyboard():
    assert vary("transposition", 5, play((0.1, 1, 60, 50))).notes["pitch"].tolist() == [65]
    with pytest.raises(NotApplicable, match="exceed the keyboard .pitches 110 to 110"):
        vary("transposition", 5, play((0.1, 1, 105, 50)))


def test_without_rubato_the_score_is_played_at_one_tempo_in_the_same_time():
    performance, score = played(rubato=2.0, jitter=-2.0, asynchrony=-1.0)
    flat = vary("rubato", -1, performance, score)
    curve = align.tempo_curve(flat, score)
    assert curve.rubato < 0.25 * align.tempo_curve(performance, score).rubato
    assert flat.duration == pytest.approx(performance.duration, abs=0.02)
    line = np.polyval(np.polyfit(curve.written, curve.played, 1), curve.written)
    assert np.abs(curve.played - line).max() < 0.05


def test_rubato_needs_the_score_of_the_clip():
    performance, _ = played()
    with pytest.raises(NotApplicable, match="rubato needs a deadpan rendering of the score"):
        vary("rubato", -1, performance)
    other = replace(performance, notes=performance.notes[::3].copy())
    other.notes["pitch"] = 21 + np.arange(len(other.notes)) % 5
    with pytest.raises(NotApplicable, match="of the notes are in the score"):
        vary("rubato", -1, performance, other)


def test_a_performance_without_pedal_has_none_to_lift():
    dry = play((0.1, 1, 60, 50), (1.1, 2, 62, 50))
    for strength in (-1, -0.5, 0.5):
        assert edits.same(vary("pedal", strength, dry), dry)


# --- Chords and tempo ---------------------------------------------------------------------------


def test_a_chord_takes_each_key_once_and_what_follows_its_first_note_closely():
    notes = play(
        (0.0, 1, 60, 9),
        (0.03, 1, 64, 9),
        (0.049, 1, 67, 9),
        (0.06, 1, 72, 9),
        (0.07, 0.08, 60, 9),
        (0.09, 1, 60, 9),
    )
    assert align.chords(notes.notes).tolist() == [0, 0, 0, 1, 1, 2]


def test_a_tempo_curve_survives_wrong_and_missing_notes():
    performance, score = played(rubato=1.0)
    true = align.tempo_curve(performance, score)
    notes = np.delete(performance.notes, np.arange(5, len(performance.notes), 11))
    notes["pitch"][3::17] += 1
    damaged = align.tempo_curve(replace(performance, notes=notes), score)
    assert true.matched > 0.95 > damaged.matched > 0.8
    shared = np.interp(damaged.written, true.written, true.played)
    assert np.quantile(np.abs(shared - damaged.played), 0.9) < 0.03


def test_a_clip_of_two_moments_has_no_tempo_curve():
    short = play((0.1, 1, 60, 50), (1.1, 2, 62, 50))
    with pytest.raises(InputError, match="2 onsets .* needs 3"):
        align.tempo_curve(short, short)
