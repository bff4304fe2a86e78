"""Sensitivity tests: tables from known effects, the recording conditions, and the whole on a few
clips. About 25 s."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy
from scipy import stats
from tiny import CLIPS, compiled_once, embed, finetuning

from percepiano_ast.audio.effects import (
    EFFECTS,
    HELD_OUT_ROOM,
    PHONE,
    RecordingConditions,
    draw_conditions,
    draw_phone,
    draw_room,
)
from percepiano_ast.cli import main
from percepiano_ast.data import demo
from percepiano_ast.dimensions import KEYS
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation import predictions
from percepiano_ast.inference import rate
from percepiano_ast.music.edits import EDITS, PARAMETERS, Edit
from percepiano_ast.music.midi import NOTE, PEDAL, Performance
from percepiano_ast.music.synth import BuiltinPiano
from percepiano_ast.plots import studies as listening_plots
from percepiano_ast.studies import report, sensitivity
from percepiano_ast.studies.sensitivity import (
    EXPECTED,
    ChangedRatings,
    SensitivityOptions,
    run_sensitivity,
)
from percepiano_ast.training.finetune import Scaler

RATE = 22_050
LOUDER, SOFTER = (Edit(PARAMETERS["loudness"], strength) for strength in (20, -20))
FEW = (SOFTER, LOUDER, Edit(PARAMETERS["pedal"], -1), Edit(PARAMETERS["transposition"], 5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The embedded data in PercePiano's shape."""
    return demo.write_percepiano(tmp_path_factory.mktemp("demo") / "percepiano", performers=2)


# --- Tables -------------------------------------------------------------------------------------


def compared(change, n=60, seed=0):
    """Ratings of ``n`` clips in 12 groups, and after a change of so many SD in every dimension."""
    rng = np.random.default_rng(seed)
    before = 0.5 + 0.1 * rng.standard_normal((n, 19))
    after = before + 0.1 * (change + 0.5 * rng.standard_normal((n, 19)))
    return ChangedRatings(before, after, np.zeros(n, bool)), np.repeat(np.arange(12), n // 12)


def test_a_known_effect_is_found_in_standard_deviations_of_the_ratings():
    found, groups = compared(0.8)
    rows = sensitivity.sensitivity_table("m", groups, {LOUDER: found}).set_index("dimension")
    assert (
        rows["standardised"].between(0.5, 1.2).all()
        and (rows["low"] > 0.3).all()
        and (rows["high"] < 1.4).all()
    )
    np.testing.assert_allclose(rows["change"], (found.after - found.before).mean(axis=0))
    np.testing.assert_allclose(rows["standardised"], rows["change"] / found.before.std(axis=0))
    assert (rows["clips"] == 60).all() and (rows["alike"] == 0).all()


def test_the_interval_is_that_of_the_group_means():
    found, groups = compared(0.8)
    row = sensitivity.sensitivity_table("m", groups, {LOUDER: found}).iloc[0]
    change = (found.after - found.before)[:, 0] / found.before[:, 0].std()
    low, high = stats.t.interval(
        0.95, 11, change.mean(), stats.sem(change.reshape(12, 5).mean(axis=1))
    )
    # Satterthwaite's degrees of freedom are at most groups - 1.
    assert row["low"] <= low + 1e-9 and row["high"] >= high - 1e-9
    assert row["high"] - row["low"] < 1.2 * (high - low)


@pytest.mark.parametrize(("change", "answer"), [(0.8, "yes"), (-0.8, "no"), (0.0, "unclear")])
def test_a_sign_is_found_reversed_or_unclear(change, answer):
    found, groups = compared(change, seed=3)
    rows = sensitivity.sensitivity_table("m", groups, {LOUDER: found}).set_index("dimension")
    assert (rows["agrees"] == "").sum() == 19 - len(EXPECTED["loudness"])
    assert (
        rows.loc["timbre_soft_loud", "expected"] == 1
        and rows.loc["timbre_soft_loud", "agrees"] == answer
    )
    assert rows.loc["timbre_bright_dark", "agrees"] == {"yes": "no", "no": "yes"}.get(
        answer, answer
    )


def test_less_of_a_parameter_expects_the_opposite_sign():
    found, groups = compared(-0.8)
    rows = sensitivity.sensitivity_table("m", groups, {SOFTER: found}).set_index("dimension")
    assert (
        rows.loc["timbre_soft_loud", "expected"] == -1
        and rows.loc["timbre_soft_loud", "agrees"] == "yes"
    )


def test_what_does_not_reach_the_model_is_not_held_against_it():
    found, groups = compared(0)
    deaf = ChangedRatings(found.before, found.before, np.ones(60, bool))
    rows = sensitivity.sensitivity_table("m", groups, {LOUDER: deaf})
    assert set(rows["agrees"]) == {"", "unheard"} and (rows["alike"] == 60).all()
    assert "no change in the sound, not counted (5 signs): louder (+20 velocity)" in "\n".join(
        report.sentences("sensitivity", "sensitivity", rows)
    )


def test_clips_that_could_not_be_varied_are_left_out_and_counted():
    found, groups = compared(0.8)
    found.after[::2] = np.nan
    assert (sensitivity.sensitivity_table("m", groups, {LOUDER: found})["clips"] == 30).all()
    found.after[:] = np.nan
    with pytest.raises(InputError, match="louder .*: this change applies to no clip"):
        sensitivity.sensitivity_table("m", groups, {LOUDER: found})


def test_a_model_that_rates_all_clips_alike_is_refused():
    found, groups = compared(0.8)
    found.before[:, 3] = 0.5
    with pytest.raises(InputError, match="gives all 60 clips the same rating of pedal_dry_wet"):
        sensitivity.sensitivity_table("m", groups, {LOUDER: found})


def test_robustness_tells_a_shift_from_another_order():
    found, groups = compared(0)
    shifted = ChangedRatings(found.before, found.before + 0.05, found.alike)
    shuffled = ChangedRatings(found.before, np.roll(found.before, 7, axis=0), found.alike)
    rows = sensitivity.robustness_table("m", groups, {"gain": shifted, "chaos": shuffled}).groupby(
        "condition"
    )
    np.testing.assert_allclose(rows["absolute"].max()["gain"], 0.05)
    np.testing.assert_allclose(rows["pearson"].min()["gain"], 1, atol=1e-12)
    assert abs(rows["pearson"].median()["chaos"]) < 0.3


def test_experts_who_rate_the_other_way_are_named():
    rng = np.random.default_rng(0)
    measures = pd.DataFrame({"loudness": rng.standard_normal(200)})
    ratings = rng.standard_normal((200, 19))
    ratings[:, KEYS.index("timbre_soft_loud")] -= measures["loudness"]
    segments = np.repeat(np.arange(20), 10)
    rows = sensitivity.expert_correlations(measures, ratings, segments).set_index("dimension")
    assert rows.index[rows["differs"]].tolist() == ["timbre_soft_loud"]
    r = stats.pearsonr(measures["loudness"], ratings[:, 3]).statistic
    assert rows.loc[KEYS[3], "r"] == pytest.approx(r, abs=1e-9)


def test_expected_signs_are_of_known_parameters_and_dimensions():
    assert set(EXPECTED) == set(PARAMETERS)
    for signs in EXPECTED.values():
        assert set(signs) <= set(KEYS) and set(signs.values()) <= {1, -1}


# --- Conditions ---------------------------------------------------------------------------------


def under(label, wave, seed=0):
    return next(one for one in EFFECTS if one.label == label).apply(wave, RATE, seed)


@pytest.fixture(scope="module")
def wave():
    """A second of A4 in three."""
    at = np.arange(3 * RATE) / RATE
    return (
        0.2 * np.sin(2 * np.pi * 440 * at) * np.minimum(1, 20 * np.abs(1.5 - at)) * (at < 2.8)
    ).astype(np.float32)


@pytest.mark.parametrize("condition", EFFECTS, ids=[one.label for one in EFFECTS])
def test_a_condition_is_float32_finite_and_repeatable(condition, wave):
    untouched = wave.copy()
    changed = condition.apply(wave, RATE, 1)
    assert (
        changed.dtype == np.float32
        and np.isfinite(changed).all()
        and not np.array_equal(changed, wave)
    )
    np.testing.assert_array_equal(condition.apply(wave, RATE, 1), changed)
    np.testing.assert_array_equal(wave, untouched)


@pytest.mark.parametrize("snr", [40, 20])
def test_noise_has_the_stated_level_and_is_pink(wave, snr):
    noise = under(f"noise SNR {snr} dB", wave) - wave
    assert 10 * np.log10(np.mean(wave**2) / np.mean(noise**2)) == pytest.approx(snr, abs=0.1)
    frequency, power = np.fft.rfftfreq(len(noise), 1 / RATE), np.abs(np.fft.rfft(noise)) ** 2
    low, high = (power[(frequency > f) & (frequency < 2 * f)].sum() for f in (200, 3200))
    assert 10 * np.log10(low / high) == pytest.approx(0, abs=1)  # equal power an octave


def test_gain_is_exact_and_cut_off_at_full_scale(wave):
    np.testing.assert_allclose(under("gain -12 dB", wave), wave * 10 ** (-12 / 20), rtol=1e-5)
    assert np.abs(under("gain +12 dB", wave * 4)).max() == 1


@pytest.mark.parametrize("cents", [-20, 20])
def test_tuning_moves_the_pitch(wave, cents):
    spectrum = np.abs(np.fft.rfft(under(f"tuning {cents:+d} cents", wave), 16 * RATE))
    assert np.argmax(spectrum) / 16 == pytest.approx(440 * 2 ** (cents / 1200), abs=0.2)


def test_a_larger_room_rings_longer_and_keeps_the_direct_sound():
    click = np.zeros(3 * RATE, np.float32)
    click[100] = 1
    tails = [under(f"room RT60 {seconds:g} s", click) for seconds in (0.4, 1.2, 2.5)]
    for tail, seconds, direct in zip(tails, (0.4, 1.2, 2.5), (6, 3, 0), strict=True):
        assert tail[100] == pytest.approx(1, abs=1e-6) and np.abs(tail[101:300]).max() < 1e-6
        assert 10 * np.log10(1 / np.sum(tail[300:] ** 2)) == pytest.approx(direct, abs=0.1)
        early, late = (
            np.sum(tail[int((0.02 + share * seconds) * RATE) :][:1000] ** 2) for share in (0, 0.5)
        )
        assert 10 * np.log10(early / late) > 30


def test_mp3_of_fewer_bits_is_farther_from_the_original(wave):
    noisy = wave + 0.02 * np.random.default_rng(0).standard_normal(len(wave)).astype(np.float32)
    fine = under("mp3 80 kbit/s", noisy)
    assert len(fine) == len(noisy) and np.corrcoef(fine, noisy)[0, 1] > 0.98
    spectrum = np.abs(np.fft.rfft(under("mp3 32 kbit/s", noisy), 4 * RATE))
    # 32 kbit/s leaves the treble out
    assert spectrum[4 * 9500 :].sum() < 0.1 * spectrum[4 * 1000 : 4 * 2525].sum()


def test_mp3_at_another_sampling_rate_is_refused(wave):
    with pytest.raises(InputError, match="cannot write MP3 at 44100 Hz"):
        next(one for one in EFFECTS if one.kind == "mp3").apply(wave, 44_100, 0)


def drawn(draw, n=8):
    return [draw(np.random.default_rng(seed)) for seed in range(n)]


ONE_EACH = {
    "room": RecordingConditions(rt60=1.0, direct_db=0, reflections=6),
    "microphone": RecordingConditions(low_cut=150, high_cut=6000, resonance_db=8),
    "noise": RecordingConditions(snr=20, noise_slope=-5, hum=0.4, mains=60),
    "gain control": RecordingConditions(agc_ratio=3),
    "soft clipping": RecordingConditions(drive=9, peak_db=-3),
    "offset": RecordingConditions(offset=0.02),
    "mp3": RecordingConditions(codec="mp3", kbit=64),
    "mp3 of a low rate": RecordingConditions(codec="mp3", kbit=32),
    "vorbis": RecordingConditions(codec="vorbis", kbit=40),
    "phone": PHONE,
}


@pytest.fixture(scope="module")
def strokes():
    """Four decaying strokes, as short as a click and as long as a tone: float32 (3 s,)."""
    wave, at = np.zeros(3 * RATE), np.arange(RATE // 2) / RATE
    noise = np.random.default_rng(0).standard_normal(len(at))
    for k, pitch in enumerate((220, 330, 554, 880)):
        start = RATE // 2 * (k + 1)
        wave[start : start + len(at)] = 0.2 * np.sin(2 * np.pi * pitch * at) * np.exp(-8 * at)
        wave[start : start + len(at)] += 0.3 * noise * np.exp(-200 * at)
    return wave.astype(np.float32)


def moved(changed) -> float:
    """Seconds by which the first of the strokes, at 0.5 s, is late: when half of the peak of its
    first 4 ms is reached. Later, the room may be louder."""
    found, at = np.abs(changed), RATE // 2
    return int(np.argmax(found > found[at : at + RATE // 250].max() / 2) - at) / RATE


@pytest.mark.parametrize("name", ONE_EACH)
def test_nothing_in_a_recording_moves_onsets(name, strokes):
    untouched, conditions = strokes.copy(), ONE_EACH[name]
    changed = conditions.apply(strokes, RATE, 1)
    assert changed.dtype == np.float32 and changed.shape == strokes.shape
    assert np.abs(changed - strokes).max() > 1e-3
    assert abs(moved(changed)) < 0.002
    np.testing.assert_array_equal(conditions.apply(strokes, RATE, 1), changed)
    np.testing.assert_array_equal(strokes, untouched)


def test_a_drawn_recording_keeps_onsets_and_is_finite(strokes):
    for conditions in drawn(draw_room) + drawn(draw_phone):
        changed = conditions.apply(strokes, RATE, 0)
        assert np.isfinite(changed).all() and np.abs(changed).max() < 1.3
        assert abs(moved(changed)) < 0.002, conditions
    faster = RecordingConditions(cents=50)
    assert len(faster.apply(strokes, RATE, 0)) == pytest.approx(len(strokes) / faster.speed, abs=1)


@pytest.mark.parametrize("length", [0, 1, 30, 2000])
@pytest.mark.parametrize("level", [0, 1e-6, 50])
def test_silence_short_and_loud_sound_can_be_recorded(length, level):
    wave = np.full(length, level, np.float32)
    for conditions in [*ONE_EACH.values(), *drawn(draw_phone, 3)]:
        changed = conditions.apply(wave, RATE, 0)
        assert len(changed) == length and np.isfinite(changed).all()
        assert np.abs(changed).max(initial=0) < 1.5


def test_a_recording_has_the_conditions_that_were_asked_for(strokes):
    noise = replace(ONE_EACH["noise"], snr=25).apply(strokes, RATE, 0) - strokes
    assert 10 * np.log10(np.mean(strokes**2) / np.mean(noise**2)) == pytest.approx(25, abs=0.1)
    click = np.zeros(3 * RATE, np.float32)
    click[0] = 0.01
    tail = RecordingConditions(rt60=1.0, direct_db=4, reflections=5).apply(click, RATE, 0)[1:]
    assert 10 * np.log10(0.01**2 / np.sum(tail**2)) == pytest.approx(4, abs=0.1)
    low = scipy.signal.sosfilt(scipy.signal.butter(4, 1000, fs=RATE, output="sos"), tail)
    decay = 10 * np.log10(np.cumsum(low[::-1] ** 2)[::-1] / np.sum(low**2))
    assert 2 * (np.argmax(decay < -35) - np.argmax(decay < -5)) / RATE == pytest.approx(1, abs=0.15)
    band = RecordingConditions(low_cut=200, high_cut=5000).apply(click, RATE, 0)
    response = 20 * np.log10(np.abs(np.fft.rfft(band)) / 0.01)[[600, 3000, 15_000, 27_000]]
    np.testing.assert_allclose(response[:3], [-3, 0, -3], atol=0.2)
    assert response[3] < -20  # at 9 kHz
    steps = np.repeat([0.02, 0.2], 2 * RATE).astype(np.float32) * np.tile([1, -1], 2 * RATE)
    even = RecordingConditions(agc_ratio=2).apply(steps, RATE, 0)
    assert even[4 * RATE - 500] / even[2 * RATE - 500] == pytest.approx(10**0.5, rel=0.05)
    loud = RecordingConditions(drive=12, peak_db=-6).apply(strokes, RATE, 0)
    assert np.abs(loud).max() == pytest.approx(10 ** (-6 / 20), rel=1e-4)
    assert np.std(loud) / np.abs(loud).max() > 1.5 * np.std(strokes) / np.abs(strokes).max()
    assert np.mean(RecordingConditions(offset=0.1).apply(strokes, RATE, 0)) > 0.099


def test_draws_cover_recordings_as_they_are_rooms_and_phones():
    found = drawn(draw_conditions, 400)
    assert 0.12 < np.mean([one == RecordingConditions() for one in found]) < 0.28
    assert all(one.cents == 0 for one in found)  # times of notes hold
    changed = [one for one in found if one != RecordingConditions()]
    for name, low, high in (("rt60", 0.2, 2.5), ("direct_db", -3, 12), ("snr", 20, 65)):
        values = [getattr(one, name) for one in changed]
        assert min(values) < low and max(values) > high
    assert {one.codec for one in changed} == {"", "mp3", "vorbis"}
    assert max(abs(draw_phone(np.random.default_rng(k), cents=15).cents) for k in range(50)) > 10


def test_the_room_of_tests_has_reflections_of_walls_and_keeps_the_direct_sound():
    click = np.zeros(2 * RATE, np.float32)
    click[100] = 1
    for seed in range(3):
        heard = HELD_OUT_ROOM.apply(click, RATE, seed)
        assert heard[100] == pytest.approx(1, abs=0.05) and np.abs(heard[:100]).max() < 1e-6
        early, late = (np.sum(heard[k * RATE // 5 + 101 :][:2000] ** 2) for k in (0, 2))
        assert 15 < 10 * np.log10(early / late) < 60
    assert (heard != HELD_OUT_ROOM.apply(click, RATE, 1)).any()


# --- Rating functions ---------------------------------------------------------------------------


class LevelRater:
    """Rates by what it hears: loudness in all dimensions, a little different in each clip and
    dimension."""

    def __init__(self, hears, key="1"):
        self.name, self.hears, self.sample_rate, self.key, self.asked = (
            f"level-{hears}",
            hears,
            RATE,
            key,
            [],
        )

    def rate(self, clip, takes):
        self.asked.append(clip)
        levels = [
            np.std(take) if self.hears == "audio" else take.notes["velocity"].mean() / 127
            for take in takes
        ]
        return np.array(levels)[:, None] * np.linspace(0.9, 1, 19) + 0.001 * (
            sum(clip.encode()) % 7
        )


def test_statistics_rate_each_clip_without_its_group(folder, monkeypatch):
    index = predictions.load_index(folder / "index.csv").set_index("clip")
    learned, names = {}, sorted(set(index["content_group"]))

    def fit(x, y, *, seed):
        """A model that knows which groups it has learned from: their number is what it is given of
        a clip."""
        groups = {names[int(number)] for number in x[:, 0]}
        learned.update(dict.fromkeys(set(names) - groups, groups))
        return SimpleNamespace(predict=lambda features: np.full((len(features), 19), len(learned)))

    monkeypatch.setattr(sensitivity.regressors, "fit", fit)
    features = pd.DataFrame(
        {"group": [names.index(group) for group in index["content_group"]], "other": 0.0},
        index=index.index,
    )
    rater = sensitivity.StatisticsRater(
        "midi-stats", features, np.zeros((len(index), 19)), index.reset_index(), seed=0
    )
    for clip, row in index.iterrows():
        assert row["content_group"] not in learned[row["content_group"]]
        assert rater._fold[clip] == row["fold_content"]
    assert set(rater._models) == set(index["fold_content"])


@pytest.fixture(scope="module")
def run_of_two(tmp_path_factory):
    """What `FoldEnsemble` makes of a run of two folds, untrained."""
    with compiled_once(tmp_path_factory.getbasetemp() / "compiled"):
        models = []
        for seed in range(2):
            untrained = finetuning(seed=seed)
            params = untrained.init(seed)
            models.append(
                rate.FoldModel(untrained, params, Scaler.fit(embed(untrained, params, CLIPS)), True)
            )
        yield SimpleNamespace(name="ast-test-ssast", folds=[0, 1], models=models)


def in_folds(folder, n):
    index = predictions.load_index(folder / "index.csv")
    return index.assign(fold_content=index["fold_content"] % n)


def test_a_run_rates_a_clip_by_the_fold_that_did_not_hear_it(run_of_two, folder, wave, monkeypatch):
    monkeypatch.setattr(rate, "FoldEnsemble", lambda run: run_of_two)
    index = in_folds(folder, 2)
    rater = sensitivity.RunRater("runs/mine", index)
    fold = index.set_index("clip")["fold_content"]
    zero, one = (fold.index[fold == number][0] for number in (0, 1))
    assert not np.allclose(rater.rate(zero, [wave]), rater.rate(one, [wave]))
    assert rater.rate(zero, [wave, np.concatenate([wave, wave])]).shape == (2, 19)
    assert rater.hears == "audio" and rater.sample_rate == RATE
    assert rater.key == sensitivity.RunRater("runs/mine", index).key


def test_a_run_with_an_unfinished_fold_is_refused(run_of_two, folder, monkeypatch):
    monkeypatch.setattr(rate, "FoldEnsemble", lambda run: run_of_two)
    with pytest.raises(InputError, match="fold 2 of ast-test-ssast .* is not finished"):
        sensitivity.RunRater("runs/mine", in_folds(folder, 3))


# --- The whole ----------------------------------------------------------------------------------


def index_of(compositions=3, players=4, segments=5):
    rows = [
        {
            "clip": f"{c}_{p}_{s}",
            "composition": c,
            "player": p,
            "segment": f"{c}_{s}",
            "human": p > 0,
        }
        for c in range(compositions)
        for p in range(players + 1)
        for s in range(segments)
    ]
    return pd.DataFrame(rows)


def test_the_model_that_comes_along_rates_as_rate_does_whatever_the_gain():
    notes = np.array([(0.4 * k, 0.4 * k + 0.3, 60 + k % 12, 70) for k in range(15)], NOTE)
    wave = BuiltinPiano().render(Performance(notes, np.zeros(0, PEDAL)), 22_050)
    rater = sensitivity.ModelFileRater()
    one, softer = rater.rate("any", [wave, wave / 8])
    assert (
        rater.hears == "audio" and one.shape == (len(KEYS),) and (0 < one).all() and (one < 1).all()
    )
    np.testing.assert_allclose(one, softer, atol=0.02)


def test_clips_are_drawn_evenly_over_compositions_and_players():
    chosen = sensitivity.sample_clips(index_of(), 24, seed=1)
    assert chosen["human"].all() and chosen["clip"].is_unique
    assert set(chosen.groupby(["composition", "player"]).size()) == {2}
    pd.testing.assert_frame_equal(chosen, sensitivity.sample_clips(index_of(), 24, seed=1))
    assert set(chosen["clip"]) != set(sensitivity.sample_clips(index_of(), 24, seed=2)["clip"])
    assert set(sensitivity.sample_clips(index_of(), 12, seed=1)["clip"]) < set(chosen["clip"])


@pytest.mark.parametrize("n", [1, 61])
def test_too_few_and_too_many_clips_are_refused(n):
    with pytest.raises(InputError, match=f"{n} clips requested of 60 human performances"):
        sensitivity.sample_clips(index_of(), n, seed=0)


def test_an_index_without_players_is_refused():
    with pytest.raises(InputError, match="the index lacks player"):
        sensitivity.sample_clips(index_of().drop(columns="player"), 4, seed=0)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(sensitivity, "EDITS", FEW)
    monkeypatch.setattr(sensitivity, "EFFECTS", tuple(one for one in EFFECTS if one.kind == "gain"))


SETTINGS = SensitivityOptions(clips=6, synthesizer="builtin", others=(), seed=0)


def test_the_whole_finds_what_a_known_rater_hears(folder, tmp_path, few, logged):
    run_sensitivity(folder, tmp_path, [LevelRater("audio"), LevelRater("midi")], SETTINGS)
    rows = pd.read_csv(tmp_path / "sensitivity.csv", keep_default_na=False)
    assert len(rows) == 2 * len(FEW) * 19
    louder = rows[(rows["variation"] == "louder") & (rows["dimension"] == "timbre_soft_loud")]
    assert (louder["agrees"] == "yes").all() and (louder["clips"] == 6).all()
    dark = rows[(rows["variation"] == "louder") & (rows["dimension"] == "timbre_bright_dark")]
    assert (dark["agrees"] == "no").all()  # it knows nothing of darkness
    pedal = rows[(rows["model"] == "level-midi") & (rows["parameter"] == "pedal")]
    assert (pedal["standardised"] == 0).all()
    gains = pd.read_csv(tmp_path / "robustness.csv")
    assert set(gains["model"]) == {"level-audio"} and set(gains["condition"]) == {
        "gain -12 dB",
        "gain +12 dB",
    }
    assert (gains["change"] * np.where(gains["condition"] == "gain +12 dB", 1, -1) > 0).all()
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {
        f"{name}.{kind}"
        for name in ("sensitivity_level-audio", "sensitivity_level-midi", "robustness")
        for kind in ("svg", "png")
    }
    said = (tmp_path / "summary.txt").read_text()
    assert said in "\n".join(logged) + "\n" and said.startswith("Ratings are simulated")
    assert (
        "level-midi has MIDI input" in said
        and "reversed, louder (+20 velocity): timbre_bright_dark" in said
    )
    assert (
        len(pd.read_csv(tmp_path / "clips.csv")) == 6
        and len(pd.read_csv(tmp_path / "experts.csv")) == 13 * 19
    )


STRANGER = """
class Stranger:
    name, hears, sample_rate, key = "stranger", "midi", 0, "1"

    def rate(self, clip, takes):
        return [[take.notes["velocity"].mean() / 127 + len(clip) / 1000] * 19 for take in takes]


rater = Stranger()
half = 3
"""


def test_the_command_takes_anybodys_rating_function(folder, tmp_path, few, monkeypatch, capsys):
    (tmp_path / "stranger_model.py").write_text(STRANGER)
    monkeypatch.syspath_prepend(tmp_path)
    command = [
        "sensitivity",
        "--percepiano",
        str(folder),
        "--clips",
        "4",
        "--out",
        str(tmp_path / "out"),
        "--model",
    ]
    assert main([*command, "stranger_model:rater"]) == 0
    rows = pd.read_csv(tmp_path / "out/sensitivity.csv", keep_default_na=False)
    louder = rows[(rows["variation"] == "louder") & (rows["dimension"] == "timbre_soft_loud")]
    assert list(louder["model"]) == ["stranger"] and list(louder["agrees"]) == ["yes"]
    for name, message in (
        ("nobody:rater", "cannot import 'nobody:rater'"),
        ("stranger_model:half", "has no name, hears"),
    ):
        assert main([*command, name]) == 2
        assert message in capsys.readouterr().err


def test_what_was_rated_is_not_rated_again_unless_the_model_is_another(folder, tmp_path, few):
    first, again, other = LevelRater("midi"), LevelRater("midi"), LevelRater("midi", key="2")
    other.name = "level-2"
    run_sensitivity(folder, tmp_path, [first], SETTINGS)
    before = pd.read_csv(tmp_path / "sensitivity.csv")
    run_sensitivity(folder, tmp_path, [again, other], SETTINGS)
    after = pd.read_csv(tmp_path / "sensitivity.csv")
    assert len(first.asked) == len(other.asked) == 6 and not again.asked
    pd.testing.assert_frame_equal(after[after["model"] == "level-midi"], before)


def test_a_rater_that_returns_something_else_is_named(folder, tmp_path, few):
    rater = LevelRater("midi")
    rater.rate = lambda clip, takes: np.zeros((len(takes), 18))
    with pytest.raises(
        InputError, match=r"level-midi returned ratings of shape \(5, 18\) for 5 takes of"
    ):
        run_sensitivity(folder, tmp_path, [rater], SETTINGS)
    rater = LevelRater("feet")
    with pytest.raises(InputError, match="hears` is 'feet'"):
        run_sensitivity(folder, tmp_path, [rater], SETTINGS)


def test_a_clip_that_cannot_be_varied_is_listed(folder, tmp_path, few, monkeypatch):
    monkeypatch.setattr("percepiano_ast.music.edits.HIGHEST", 85)
    run_sensitivity(folder, tmp_path, [LevelRater("midi")], SETTINGS)
    left_out = pd.read_csv(tmp_path / "left_out.csv")
    assert 0 < len(left_out) < 6 and left_out["reason"].str.contains("exceed the keyboard").all()
    assert (
        f"{len(left_out)} variations did not apply to a clip"
        in (tmp_path / "summary.txt").read_text()
    )


def test_figures_mark_every_expected_sign_and_frame_what_is_reversed():
    found, groups = compared(0.8)
    rows = sensitivity.sensitivity_table("m", groups, {LOUDER: found, SOFTER: found})
    axes = listening_plots.sensitivity(rows, "t").axes[0]
    assert len(axes.texts) == 2 * len(EXPECTED["loudness"])
    assert len(axes.patches) == (rows["agrees"] == "no").sum() == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--synthesizer", "organ"], "unknown synthesizer 'organ'"),
        (
            ["--other-synthesizers", "organ", "--synthesizer", "builtin"],
            "unknown synthesizer 'organ'",
        ),
        (["--model", "midi-stats", "--clips", "1"], "1 clips requested"),
        (
            [
                "--synthesizer",
                "builtin",
                "--other-synthesizers",
                "--model",
                "nowhere",
                "--clips",
                "4",
            ],
            "no model in nowhere",
        ),
    ],
)
def test_bad_usage_is_refused_in_a_line(folder, tmp_path, capsys, arguments, message):
    command = [
        "sensitivity",
        "--percepiano",
        str(folder),
        "--model",
        "audio-stats",
        "--out",
        str(tmp_path / "out"),
        *arguments,
    ]
    assert main(command) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_tests_both_baselines_on_the_demo(folder, tmp_path):
    command = [
        "sensitivity",
        "--percepiano",
        str(folder),
        "--model",
        "midi-stats",
        "audio-stats",
        "--out",
        str(tmp_path),
        "--clips",
        "6",
        "--synthesizer",
        "builtin",
        "--other-synthesizers",
    ]
    assert main(command) == 0
    rows = pd.read_csv(tmp_path / "sensitivity.csv", keep_default_na=False)
    assert len(rows) == 2 * len(EDITS) * 19
    louder = rows[(rows["variation"] == "louder") & (rows["dimension"] == "timbre_soft_loud")]
    assert (louder["agrees"] == "yes").all()


@pytest.mark.slow
def test_a_killed_test_leaves_no_workers_and_continues(folder, tmp_path):
    command = [
        sys.executable,
        "-m",
        "percepiano_ast",
        "sensitivity",
        "--percepiano",
        str(folder),
        "--model",
        "audio-stats",
        "--out",
        str(tmp_path),
        "--clips",
        "4",
        "--synthesizer",
        "builtin",
        "--other-synthesizers",
        "--workers",
        "2",
    ]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    while len(list(tmp_path.glob("renderings/*.flac"))) < 5:
        assert process.poll() is None
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and _alive(process.pid):
        time.sleep(0.2)
    assert not _alive(process.pid)
    there = {path.name for path in tmp_path.glob("renderings/*.flac")}
    assert main(command[3:]) == 0 and there <= {
        path.name for path in tmp_path.glob("renderings/*.flac")
    }


def _alive(session: int) -> list[str]:
    found = subprocess.run(["ps", "-s", str(session), "-o", "pid="], capture_output=True, text=True)
    return found.stdout.split()
