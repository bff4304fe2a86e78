"""Descriptors of performances: their meaning on playing made to order, and their agreement with the
research. About 5 s."""

import csv
import inspect
import itertools
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from percepiano_ast.data import percepiano
from percepiano_ast.dimensions import KEYS
from percepiano_ast.music.midi import (
    NOTE,
    PEDAL,
    SUSTAIN,
    UNA_CORDA,
    Performance,
    read_midi,
    trimmed,
)
from percepiano_ast.music.performance_features import (
    NOTE_VALUES,
    PERFORMANCE_FEATURES,
    WINDOW_FEATURES,
    estimate_tempo,
    read_features,
)
from percepiano_ast.music.performance_features import performance_features as describe
from percepiano_ast.music.score import read_score
from percepiano_ast.music.score_features import score_features

# Correlations of descriptors with ratings over all clips, measured before this module was written
# and by other code.
RESEARCH = {
    "velocity_mean": {
        "articulation_soft_hard": 0.6,
        "timbre_soft_loud": 0.53,
        "music_fast_slow": -0.47,
    },
    "velocity_std": {"dynamics_little_large_range": 0.59, "timbre_even_colorful": 0.48},
    "velocity_contour": {"dynamics_little_large_range": 0.58, "timbre_even_colorful": 0.38},
    "chord_rate": {"music_fast_slow": -0.74, "mood_low_high_energy": 0.5},
    "rubato": {"timing_stable_unstable": 0.23, "music_flat_spacious": 0.4},
    "legato_q50": {"articulation_short_long": 0.42, "pedal_dry_wet": 0.35},
    "held_mean": {"articulation_short_long": 0.53, "music_fast_slow": 0.65},
    "pedal_share": {
        "articulation_short_long": 0.73,
        "pedal_dry_wet": 0.63,
        "timbre_shallow_rich": 0.59,
    },
    "pedal_changes": {"timbre_shallow_rich": 0.41, "music_pure_dramatic": 0.42},
    "half_pedal_share": {"pedal_dry_wet": 0.56, "pedal_clean_blurred": 0.54},
    "una_corda_mean": {"dynamics_mellow_raw": -0.31, "interpretation_doubtful_convincing": 0.29},
    "asynchrony": {
        "mood_honest_imaginative": 0.58,
        "timbre_shallow_rich": 0.55,
        "timing_stable_unstable": 0.4,
    },
    "voicing_std": {"timbre_even_colorful": 0.48, "music_flat_spacious": 0.45},
    "pitch_mean": {"timbre_bright_dark": -0.47, "mood_low_high_energy": 0.32},
}


def play(onsets, pitches, velocities=64, held=0.2, pedals=()):
    """A performance of one note for each onset; what is given once holds for all."""
    notes = np.zeros(len(onsets), dtype=NOTE)
    notes["onset"], notes["pitch"], notes["velocity"] = onsets, pitches, velocities
    notes["offset"] = notes["onset"] + held
    return Performance(notes, np.array(list(pedals), dtype=PEDAL))


TEMPO = [name for name in PERFORMANCE_FEATURES if name not in WINDOW_FEATURES]
SCALE = np.array([60, 62, 64, 65, 67, 69, 71, 72])
STEPS = 0.1 + 0.5 * np.arange(8)


def chorale(lead=0.0, melody=64):
    """Eight triads under a melody that comes ``lead`` seconds before them."""
    onsets = np.concatenate([[time, time + lead, time + lead, time + lead] for time in STEPS])
    pitches = np.concatenate([[pitch + 12, pitch, pitch - 3, pitch - 7] for pitch in SCALE])
    velocities = np.tile([melody, 64, 64, 64], 8)
    order = np.lexsort((pitches, onsets))
    return play(onsets[order], pitches[order], velocities[order])


def test_every_descriptor_is_there_in_order_documented_and_finite():
    single, repeated = play([0.1], [60]), play(STEPS, 60)
    for performance in (single, repeated, play(STEPS, SCALE), chorale(0.02)):
        values = describe(performance)
        assert list(values) == list(PERFORMANCE_FEATURES)
        assert all(isinstance(value, float) and np.isfinite(value) for value in values.values()), (
            values
        )
    assert all(len(one.words) > 10 for one in PERFORMANCE_FEATURES.values())


@pytest.mark.parametrize("of", ["performance", "score"])
def test_the_table_names_what_is_computed(of):
    folder = Path(inspect.getfile(describe)).parent
    code = (folder / f"{of}_features.py").read_text()
    computed = re.findall(r'^ +(?:values \|= {)?"(\w+)": |\bstatistics\("([\w ]+)"', code, re.M)
    computed = " ".join(itertools.chain(*computed)).split()
    computed += ["undefined"] if of == "score" else []
    with (folder / "features.csv").open() as file:
        named = [row["name"] for row in csv.DictReader(file) if row["of"] == of]
    assert sorted(computed) == sorted(named)  # each once
    assert list(read_features(of)) == named


def test_force_and_voicing():
    rising = describe(play(STEPS, SCALE, np.arange(40, 80, 5)))
    assert rising["velocity_mean"] == 57.5 and rising["velocity_trend"] == pytest.approx(35)
    assert rising["velocity_of_pitch"] > 0.95
    many = 0.1 + 0.25 * np.arange(80)
    swell = describe(play(many, np.resize(SCALE, 80), np.round(60 + 20 * np.sin(many / 3))))
    accents = describe(play(many, np.resize(SCALE, 80), np.resize([50, 70], 80)))
    assert swell["velocity_contour"] > 4 * swell["velocity_accents"]
    assert (
        accents["velocity_accents"] > 4 * accents["velocity_contour"]
        and accents["velocity_steps"] == 20
    )
    brought_out = describe(chorale(melody=84))
    assert brought_out["voicing_melody"] == 20 and brought_out["voicing_bass"] < 0
    flat = describe(chorale())
    assert flat["voicing_std"] == flat["voicing_melody"] == flat["velocity_skew"] == 0


def test_pace_rubato_and_asynchrony():
    even = describe(play(STEPS, SCALE))
    assert even["ioi_log_std"] == pytest.approx(0, abs=1e-9) and even["rubato"] == pytest.approx(
        0, abs=1e-9
    )
    assert even["ioi_log_q50"] == pytest.approx(np.log(0.5))
    uneven = describe(play(STEPS + [0, 0.03, -0.03, 0.03, -0.03, 0.03, -0.03, 0], SCALE))
    assert uneven["rubato"] > 0.1
    dotted = describe(play(0.1 + np.cumsum([0, 0.75, 0.25, 0.75, 0.25, 0.75, 0.25, 0.75]), SCALE))
    # a rhythm, not a rubato
    assert dotted["grid_deviation"] == pytest.approx(0, abs=1e-9) and dotted["rubato"] == 0
    late = describe(chorale(lead=0.03))
    assert late["melody_lead"] == pytest.approx(0.03) and late[
        "asynchrony_spread"
    ] == pytest.approx(0.03)
    assert late["spread_share"] == 1 and describe(chorale())["asynchrony"] == 0
    slowing = describe(play(0.1 + np.cumsum([0] + [0.3] * 16 + [0.6] * 3), np.resize(SCALE, 20)))
    assert slowing["final_slowing"] == pytest.approx(np.log(2))


RHYTHM = np.tile([1, 0.5, 0.5, 1.5, 0.5, 1, 1, 0.25, 0.25, 0.5, 1], 4)


def test_tempo_is_told_apart_from_rhythm():
    slower = np.r_[np.zeros(33), 0.3 * np.linspace(0, 1, 11)]
    plain, slowing = estimate_tempo(0.5 * RHYTHM), estimate_tempo(0.5 * RHYTHM * np.exp(slower))
    ratios = np.exp(NOTE_VALUES[plain.value])
    np.testing.assert_allclose(ratios / ratios[0], RHYTHM)
    np.testing.assert_array_equal(slowing.value, plain.value)
    assert np.ptp(plain.pace) == 0
    assert slowing.pace[-1] - slowing.pace[0] == pytest.approx(-0.3, abs=0.1)


def test_descriptors_of_tempo():
    def played(steps):
        return describe(play(0.1 + np.r_[0, np.cumsum(steps)], np.resize(SCALE, len(steps) + 1)))

    plain = played(0.5 * RHYTHM)
    assert [plain[name] for name in TEMPO if name.startswith("tempo")] == pytest.approx(
        [0] * 5, abs=1e-9
    )
    assert plain["rhythm_variety"] > 1 > played(np.full(44, 0.5))["rhythm_variety"] == 0
    assert played(np.full(44, 0.5))["rhythm_repeats"] == 1
    ritardando = played(0.5 * RHYTHM * np.exp(np.r_[np.zeros(33), 0.3 * np.linspace(0, 1, 11)]))
    assert ritardando["tempo_final"] < -0.1 and ritardando["tempo_std"] > 0.05
    rubato = played(0.5 * RHYTHM * np.exp(0.2 * np.sin(np.arange(44) / 3)))
    assert rubato["tempo_travel"] > 2 * ritardando["tempo_travel"]
    assert rubato["rhythm_likelihood"] < plain["rhythm_likelihood"]
    short = describe(play(STEPS[:5] + 0.01, SCALE[:5])), describe(play(STEPS[:4], SCALE[:4]))
    assert short[0]["rhythm_repeats"] == 1 and not any(short[1][name] for name in TEMPO)


def test_an_excerpt_is_described_without_its_tempo():
    whole = describe(chorale())
    assert describe(chorale(), WINDOW_FEATURES) == {
        name: whole[name] for name in PERFORMANCE_FEATURES if name not in TEMPO
    }


@pytest.mark.real_data
def test_the_guessed_tempo_agrees_with_what_scores_tell(percepiano_dir):
    """Measured on all clips: .45 and .45."""
    midi, scores = percepiano.find_midi(percepiano_dir), percepiano.find_scores(percepiano_dir)
    index = percepiano.load_index(percepiano_dir)[::12]
    rows = [
        (
            describe(one := trimmed(read_midi(midi[clip]))),
            score_features(one, read_score(scores[segment])),
        )
        for clip, segment in zip(index["clip"], index["segment"], strict=True)
    ]
    guessed, told = (pd.DataFrame(part) for part in zip(*rows))
    assert guessed["tempo_std"].corr(told["tempo_std"]) > 0.3
    assert guessed["tempo_travel"].corr(told["tempo_changes"]) > 0.3


def test_touch():
    staccato, legato = (describe(play(STEPS, SCALE, held=held)) for held in (0.1, 0.6))
    assert staccato["legato_q50"] == pytest.approx(0.2) and staccato["staccato_share"] > 0.8
    assert legato["legato_q50"] == pytest.approx(1.2) and legato["overlap_share"] >= 7 / 8
    assert staccato["held_mean"] == pytest.approx(np.log(0.1))


def test_pedals():
    bare = describe(play(STEPS, SCALE))
    assert (
        bare["pedal_share"]
        == bare["pedal_depth"]
        == bare["pedal_held"]
        == bare["pedal_lag"]
        == bare["blur"]
        == 0
    )
    pressed = [(time + 0.1, SUSTAIN, 100) for time in STEPS[::2]] + [
        (time, SUSTAIN, 0) for time in STEPS[2::2]
    ]
    wet = describe(play(STEPS, SCALE, pedals=sorted(pressed) + [(0.1, UNA_CORDA, 127)]))
    assert wet["pedal_lag"] == pytest.approx(0.1) and wet["pedal_depth"] == 100
    assert (
        wet["pedal_held"] == pytest.approx((3 * 0.9 + 0.6) / 4) and wet["half_pedal_of_down"] == 1
    )
    assert (
        wet["blur"] > 0
        and wet["ringing_notes"] > 1.5 * bare["ringing_notes"]
        and wet["una_corda_share"] == 1
    )
    assert wet["pedal_share"] == pytest.approx(3.3 / 3.7, abs=0.03)


def test_register_texture_and_key():
    single, chords = describe(play(STEPS, SCALE)), describe(chorale())
    assert single["single_share"] == 1 and single["chord_width"] == 0
    assert chords["chord_size"] == 4 and chords["chord_width"] == 19
    assert single["pitch_mean"] == SCALE.mean() and single["melody_steps"] == pytest.approx(12 / 7)
    major = describe(play(STEPS, [60, 64, 67, 72, 67, 64, 60, 67]))
    minor = describe(play(STEPS, [60, 63, 67, 72, 67, 63, 60, 67]))
    assert major["majorness"] > 0.05 and minor["majorness"] < -0.05
    assert describe(play(STEPS, 60))["pitch_classes"] == pytest.approx(0)


@pytest.mark.real_data
@pytest.mark.slow
def test_correlations_with_ratings_are_those_of_the_research(percepiano_dir):
    """Measured: every one of these within .11, the median within .01."""
    index, midi = percepiano.load_index(percepiano_dir), percepiano.find_midi(percepiano_dir)
    values = pd.DataFrame([describe(trimmed(read_midi(midi[clip]))) for clip in index["clip"]])
    assert np.isfinite(values.to_numpy()).all()
    rated = percepiano.read_ratings(percepiano_dir, index)
    ratings = pd.DataFrame([rated[clip] for clip in index["clip"]], columns=KEYS)
    apart = [
        abs(np.corrcoef(values[name], ratings[key])[0, 1] - r)
        for name, row in RESEARCH.items()
        for key, r in row.items()
    ]
    assert np.median(apart) < 0.03 and max(apart) < 0.15
