"""Augmentation is a function of seed and step, changes what it says and nothing else. Cost: 8 s."""

import functools
import itertools
from pathlib import Path

import numpy as np
import pytest

from percepiano_ast.audio import dequantize, log_mel, quantize
from percepiano_ast.config import FrontEnd
from percepiano_ast.data import augment, batches, percepiano
from percepiano_ast.data.augment import AST, Augmentation, augmented
from percepiano_ast.errors import InputError
from percepiano_ast.music import synth
from percepiano_ast.music.midi import NOTE, PEDAL, Performance

SHAPE = (6, 200, 128)
EVERYTHING = Augmentation(mel_width=30, time_width=60, mixup=0.5, gain_db=6)


def stream(start: int):
    """Batches of noise between 40 and 200, of windows of unlike length, padded with 0, from step
    ``start`` on."""
    for step in itertools.count(start):
        rng = np.random.default_rng(step)
        codes, n_valid = (
            rng.integers(40, 200, SHAPE).astype(np.uint8),
            rng.integers(80, 201, SHAPE[0]).astype(np.int32),
        )
        for window, length in zip(codes, n_valid):
            window[length:] = 0
        yield {
            "codes": codes,
            "n_valid": n_valid,
            "ratings": rng.random((SHAPE[0], 19), np.float32),
            "other": step,
        }


def first(config: Augmentation, seed: int = 0, step: int = 0) -> tuple[dict, dict]:
    """The batch of a step as it was and as it comes out."""
    return next(stream(step)), next(augmented(stream, config, seed)(step))


def test_every_batch_is_a_function_of_seed_and_step():
    from_start = list(itertools.islice(augmented(stream, EVERYTHING, 7)(0), 4))
    resumed = next(augmented(stream, EVERYTHING, 7)(3))
    for key, value in from_start[3].items():
        np.testing.assert_array_equal(resumed[key], value)
    other = next(augmented(stream, EVERYTHING, 8)(3))
    assert (other["codes"] != resumed["codes"]).any() and resumed["other"] == 3
    given = next(stream(3))
    assert all(resumed[key].dtype == given[key].dtype for key in ("codes", "n_valid", "ratings"))


def test_nothing_changes_nothing_and_the_given_batch_is_left_alone():
    before, after = first(Augmentation())
    for key, value in before.items():
        np.testing.assert_array_equal(after[key], value)
    given = next(stream(0))
    augment.augment(given, EVERYTHING, np.random.default_rng(0))
    for key, value in next(stream(0)).items():
        np.testing.assert_array_equal(given[key], value)


def test_one_augmentation_does_not_change_the_draws_of_another():
    configs = (Augmentation(mel_width=30), Augmentation(mel_width=30, gain_db=0.1))
    masked, both = (first(config)[1]["codes"] for config in configs)
    np.testing.assert_array_equal(masked, both)  # a tenth of a decibel is no code


def test_masks_hide_one_band_and_one_stretch_of_what_is_heard():
    for step in range(5):
        before, after = first(Augmentation(mel_width=30, time_width=60), step=step)
        for old, new, length in zip(before["codes"], after["codes"], before["n_valid"]):
            hidden = old != new
            assert not hidden[length:].any()
            mean = np.rint(old[:length].mean())
            assert (new[hidden] == mean).all()
            bands = np.flatnonzero(hidden[:length].mean(axis=0) > 0.9)
            times = np.flatnonzero(hidden[:length].mean(axis=1) > 0.9)
            rest = hidden.copy()
            rest[:, bands], rest[times] = False, False
            assert not rest.any() and len(bands) <= 30 and len(times) <= 60
            assert all(len(one) == 0 or np.ptp(one) == len(one) - 1 for one in (bands, times))


def test_mixup_mixes_levels_and_ratings_alike():
    before, after = first(Augmentation(mixup=1.0))
    n = np.minimum.outer(before["n_valid"], before["n_valid"])
    for row in range(SHAPE[0]):
        # The ratings are a mean of this window's and one other's; so are the levels, with the same
        # weight.
        for other in range(SHAPE[0]):
            apart = before["ratings"][row] - before["ratings"][other]
            weight = (
                np.mean((after["ratings"][row] - before["ratings"][other]) / apart)
                if other != row
                else 1.0
            )
            mixed = weight * before["ratings"][row] + (1 - weight) * before["ratings"][other]
            if 0 < weight <= 1 and np.allclose(after["ratings"][row], mixed, atol=1e-5):
                break
        length = n[row, other]
        levels = weight * before["codes"][row] + (1 - weight) * before["codes"][other].astype(float)
        assert after["n_valid"][row] == length and not after["codes"][row, length:].any()
        assert np.abs(after["codes"][row, :length] - levels[:length]).max() <= 0.51
    assert (
        0.4
        < np.mean(
            [
                (first(Augmentation(mixup=0.5), step=step)[1]["share"] < 1).mean()
                for step in range(40)
            ]
        )
        < 0.6
    )


def test_clips_of_several_windows_are_mixed_and_moved_as_one():
    """Without ratings in the batch, whoever holds them is told what was mixed with what."""
    before = next(stream(0))
    batch = {
        "codes": before["codes"].reshape(3, 2, *SHAPE[1:]),
        "n_valid": before["n_valid"].reshape(3, 2),
    }
    mixed = next(augmented(lambda step: [batch], Augmentation(mixup=1.0), 0)(0))
    assert mixed["codes"].shape == batch["codes"].shape and "ratings" not in mixed
    for row, (other, share) in enumerate(zip(mixed["mixed_with"], mixed["share"])):
        for k in range(2):
            length = min(batch["n_valid"][row, k], batch["n_valid"][other, k])
            levels = (
                share * batch["codes"][row, k].astype(float)
                + (1 - share) * batch["codes"][other, k]
            )
            assert mixed["n_valid"][row, k] == length and not mixed["codes"][row, k, length:].any()
            assert np.abs(mixed["codes"][row, k, :length] - levels[:length]).max() <= 0.51
    moved = (
        next(augmented(lambda step: [batch], Augmentation(gain_db=6), 0)(0))["codes"].astype(int)
        - batch["codes"]
    )
    assert [len(np.unique(clip[batch["codes"][row] > 0])) for row, clip in enumerate(moved)] == [
        1,
        1,
        1,
    ]
    hidden = (
        next(augmented(lambda step: [batch], Augmentation(mel_width=30), 0)(0))["codes"]
        != batch["codes"]
    )
    assert hidden.any(axis=(2, 3)).sum() > 3  # a mask of its own for each window


def test_gain_is_decibels_and_leaves_padding_at_the_floor():
    before, after = first(Augmentation(gain_db=6))
    shift = after["codes"].astype(int) - before["codes"]
    for moved, length in zip(shift, before["n_valid"]):
        assert (
            len(np.unique(moved[:length])) == 1
            and abs(moved[0, 0]) <= 12
            and not moved[length:].any()
        )
    assert len(np.unique(shift[:, 0, 0])) > 1
    assert next(augmented(stream, Augmentation(gain_db=200), 1)(0))["codes"].max() <= 255


def test_gain_of_codes_is_gain_of_the_wave():
    front_end = FrontEnd()
    wave = 0.1 * np.random.default_rng(0).standard_normal(22_050).astype(np.float32)
    codes, louder = (quantize(log_mel(gain * wave, front_end), front_end)[0] for gain in (1, 2))
    batch = {
        "codes": codes[None],
        "n_valid": np.array([len(codes)]),
        "ratings": np.zeros((1, 19), np.float32),
    }
    moved = next(augmented(lambda step: [batch], Augmentation(gain_db=6), 0)(0))["codes"][0]
    step = int(moved[5, 50]) - int(codes[5, 50])
    assert (
        np.abs(dequantize(moved, front_end) - 0.5 * step - dequantize(codes, front_end)).max()
        < 1e-3
    )
    assert np.abs(louder.astype(int) - codes - 12).max() <= 1  # 6 dB are 12 codes


def test_it_wraps_the_batches_of_fine_tuning():
    codes = [np.full((length, 128), 90, np.uint8) for length in (50, 80, 120, 64)]
    names = np.array(list("abcd"))
    clips = batches.RatedClips(
        codes, names, names, np.random.default_rng(0).random((4, 19), np.float32)
    )
    dataset, _ = batches.finetune_batches(
        clips, np.arange(4), n_frames=64, max_windows=2, batch_size=4, seed=0
    )
    windows = augmented(functools.partial(batches.from_step, dataset), AST, seed=0)
    one, again = next(windows(5)), next(itertools.islice(windows(3), 2, None))
    for key, value in one.items():
        np.testing.assert_array_equal(again[key], value)
    assert one["codes"].shape == (4, 2, 64, 128) and one["codes"].dtype == np.uint8
    assert {"clip", "mixed_with", "share"} <= one.keys()


@pytest.mark.parametrize("wrong", [{"mixup": 1.5}, {"mel_width": -1}, {"gain_db": -3.0}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(InputError, match="0 or more|from 0 to 1"):
        Augmentation(**wrong)


def test_the_docs_state_the_effect_of_every_augmentation():
    page = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
    effects = page.partition("### Augmentation")[2]
    assert all(f"`+{name}`" in page for name in percepiano.AUGMENTATIONS)
    # the room for tests is like the rooms of training
    assert all(f"`+{name}`" in effects for name in percepiano.AUGMENTATIONS if name != "livingroom")
    assert all(name in effects for name in ("gain_db", "Masks", "mixup", "soundfont"))


# --- Augmented renderings -----------------------------------------------------------------------


def tune() -> Performance:
    notes = np.array([(0.1 + 0.5 * k, 0.5 + 0.5 * k, 60 + k, 70) for k in range(6)], NOTE)
    return Performance(notes, np.zeros(0, PEDAL))


def test_an_augmentation_is_drawn_from_the_clip_and_within_its_range():
    drawn = []
    for number in range(20):
        augmentation = percepiano.AUGMENTATIONS["stretch"]
        one, again = (
            augmentation.edit(tune(), percepiano.augmentation_rng(f"clip {number}", "stretch"))
            for _ in "ab"
        )
        assert one.duration == again.duration
        drawn.append(tune().notes["onset"][-1] / one.notes["onset"][-1])
    assert 0.94 < min(drawn) < 0.98 and 1.02 < max(drawn) < 1.06
    transpose = percepiano.AUGMENTATIONS["transpose"].edit
    assert {
        int(transpose(tune(), np.random.default_rng(k)).notes["pitch"][0]) for k in range(9)
    } == {59, 61}


def test_transposition_stays_on_the_keyboard():
    notes = tune().notes.copy()
    notes["pitch"] = 103 + np.arange(6)
    high = Performance(notes, tune().pedals)
    for seed in range(9):
        assert (
            percepiano.AUGMENTATIONS["transpose"]
            .edit(high, np.random.default_rng(seed))
            .notes["pitch"]
            .max()
            == 107
        )


@pytest.mark.parametrize("name", percepiano.AUGMENTATIONS)
def test_the_sound_of_a_recording_can_be_varied_as_well(name):
    wave = synth.BuiltinPiano().render(tune(), 22_050)
    augmentation = percepiano.AUGMENTATIONS[name]
    one, again = (
        augmentation.effect(wave, 22_050, percepiano.augmentation_rng("clip", name)) for _ in "ab"
    )
    np.testing.assert_array_equal(one, again)
    assert np.isfinite(one).all() and abs(len(one) / len(wave) - 1) < 0.06
    assert len(one) != len(wave) or np.abs(one - wave).max() > 1e-4


def test_names_of_augmentations():
    assert percepiano.split_augmentation("fluidr3mono") == ("fluidr3mono", "")
    assert percepiano.split_augmentation("fluidr3mono+room") == ("fluidr3mono", "room")
    with pytest.raises(InputError, match="unknown augmentation 'rooms'. Did you mean 'room'"):
        percepiano.split_augmentation("fluidr3mono+rooms")
    assert percepiano.is_plain(np.array(["a", "a+room"])).tolist() == [True, False]
