"""Sensitivity tests: tables from known effects, the recording conditions, and the whole on a few
clips. About 25 s."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from tiny import CLIPS, compiled_once, embed, finetuning

from percepiano_ast.audio.effects import (
    EFFECTS,
    HELD_OUT_ROOM,
    PHONE,
    RecordingConditions,
    draw_conditions,
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


# --- Recording conditions -----------------------------------------------------------------------

DRAWN = [draw_conditions(np.random.default_rng(seed)) for seed in range(40)]


def decay_seconds(response: np.ndarray) -> float:
    """Reverberation time from the slope between -5 and -25 dB (Schroeder 1965)."""
    energy = np.cumsum(response[::-1] ** 2)[::-1]
    level = 10 * np.log10(energy / energy[0] + 1e-12)
    return 3 * (np.argmax(level < -25) - np.argmax(level < -5)) / RATE


def clicks() -> np.ndarray:
    wave = np.zeros(4 * RATE, np.float32)
    wave[RATE::RATE] = 0.5
    return wave


def test_drawn_conditions_differ_and_are_the_same_for_a_seed():
    assert len(set(DRAWN)) == len(DRAWN) and DRAWN[7] == draw_conditions(np.random.default_rng(7))
    phones = [one for one in DRAWN if one.agc > 1]
    assert 0.15 < len(phones) / len(DRAWN) < 0.55
    with pytest.raises(InputError, match="studo.*studio"):
        draw_conditions(np.random.default_rng(0), "studo")


@pytest.mark.parametrize("drawn", [*DRAWN[:8], PHONE])
def test_onsets_stay_where_they_are(drawn):
    drawn = dataclasses.replace(drawn, snr_db=np.inf, offset=0.0)
    found = np.abs(drawn.apply(clicks(), RATE, 3))
    for second in (1, 2, 3):
        start = round(second * RATE / drawn.speed) - 1000
        assert abs(int(np.argmax(found[start : start + 2000])) - 1000) <= 2


@pytest.mark.parametrize("drawn", [*DRAWN[:8], PHONE])
def test_any_sound_can_be_recorded(drawn, wave):
    for sound in (wave, 50 * wave, np.zeros(RATE, np.float32), wave[:500]):
        recorded = drawn.apply(sound, RATE, 1)
        assert recorded.dtype == np.float32 and np.isfinite(recorded).all()
        assert abs(len(recorded) - len(sound) / drawn.speed) <= 1 and np.abs(recorded).max() < 1
        np.testing.assert_array_equal(drawn.apply(sound, RATE, 1), recorded)


def test_a_recording_has_the_stated_noise_band_tuning_and_offset(wave):
    noise = np.random.default_rng(0).standard_normal(4 * RATE).astype(np.float32)
    banded = RecordingConditions(low_hz=200, high_hz=4000).apply(noise, RATE, 0)
    level = 10 * np.log10(np.abs(np.fft.rfft(banded)) ** 2)
    octaves = [level[4 * low : 8 * low].mean() for low in (25, 500, 1000, 5000)]
    assert octaves[1] == pytest.approx(octaves[2], abs=1)
    assert octaves[0] < octaves[1] - 20 and octaves[3] < octaves[1] - 15
    clean, noisy = (
        RecordingConditions(snr_db=snr).apply(wave, RATE, 0).astype(float) for snr in (np.inf, 20.0)
    )
    scale = (clean @ noisy) / (clean @ clean)
    left = noisy - scale * clean
    assert 10 * np.log10(scale**2 * (clean @ clean) / (left @ left)) == pytest.approx(20, abs=0.3)
    tuned = RecordingConditions(cents=20).apply(wave, RATE, 0)
    assert np.argmax(np.abs(np.fft.rfft(tuned, 16 * RATE))) / 16 == pytest.approx(445.1, abs=0.2)
    assert RecordingConditions(offset=0.05).apply(wave, RATE, 0).mean() == pytest.approx(
        0.05, abs=1e-3
    )


@pytest.mark.parametrize("seconds", [0.3, 1.0, 2.0])
def test_a_drawn_room_decays_as_stated(seconds):
    room = RecordingConditions(rt60=seconds, dullness=0.0, direct_db=3.0)
    response = room.apply(clicks()[: 2 * RATE], RATE, 0)[RATE:] / 0.9
    assert 10 * np.log10(1 / np.sum(response[1:] ** 2)) == pytest.approx(3.0, abs=0.7)
    assert decay_seconds(response[1:]) == pytest.approx(seconds, rel=0.25)


def test_the_held_out_room_is_a_room_as_stated():
    response = HELD_OUT_ROOM.apply(clicks()[: 2 * RATE], RATE, 0)[RATE:] / 0.5
    assert response[0] == pytest.approx(1, abs=1e-3)
    assert 10 * np.log10(1 / np.sum(response[1:] ** 2)) == pytest.approx(0, abs=0.2)
    assert decay_seconds(response[1:]) == pytest.approx(HELD_OUT_ROOM.amount, rel=0.25)


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
