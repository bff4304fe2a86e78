"""Pre-training and fine-tuning on a tiny model: they learn, repeat bit for bit, and go on after a
kill. About 40 s."""

import csv
import dataclasses
import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
    CLIPS,
    FRONT_END,
    MODEL,
    PRETRAIN,
    RATINGS,
    STATISTICS,
    STEPS,
    TRAIN,
    batch_of,
    be_interrupted,
    bits,
    codes_of,
    compiled_once,
    embed,
    finetuning,
    fold_to,
    pretrain_to,
    pretrained_bits,
    stream,
    validation_batches,
    wait_until_arrived,
    windows_from,
    without_seconds,
)

from percepiano_ast.audio import dequantize, quantize
from percepiano_ast.config import ComputeConfig, FrontEnd, LevelStats
from percepiano_ast.data.batches import clip_windows
from percepiano_ast.errors import InputError
from percepiano_ast.training.checkpoints import Checkpoints, open_latest
from percepiano_ast.training.loop import History
from percepiano_ast.training.pretrain import Pretraining, reconstruction
from percepiano_ast.training.state import compute_for, learning_rate, make_optimizer, normalise


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory):
    """Of child processes that find what is compiled already."""
    with compiled_once(tmp_path_factory.getbasetemp() / "compiled") as variables:
        yield os.environ | variables


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> tuple[Path, list[dict]]:
    """An uninterrupted run: its directory and history."""
    directory = tmp_path_factory.mktemp("pretrain") / "run"
    return directory, pretrain_to(directory)


def waiting(directory: Path, after: dict[int, int], batches):
    """After so many steps, wait until the checkpoint of such a step has arrived, and the one who
    brought it is free."""
    for step, batch in enumerate(batches):
        if step in after:
            wait_until_arrived(directory, after[step])
            time.sleep(0.5)
        yield batch


def test_a_weight_that_is_updated_in_place_is_multiplied_by_as_it_is():
    """What XLA does wrong on a CPU in jaxlib 0.7.2 to 0.8.1, but for a flag that the package sets;
    see its ``__init__``."""

    def step(weight, x):
        value, gradient = jax.value_and_grad(lambda weight: jnp.square(x @ weight).mean())(weight)
        return weight - gradient, value

    x, first = (
        jax.random.normal(jax.random.key(0), (128, 256)),
        jax.random.normal(jax.random.key(1), (256, 512)),
    )
    values = []
    for donated in ((), (0,)):
        run, weight = jax.jit(step, donate_argnums=donated), jnp.copy(first)
        values.append([])
        for _ in range(4):
            weight, value = run(weight, x)
            values[-1].append(float(value))
    assert values[0] == values[1]


class TestPretrain:
    def test_it_learns_what_can_be_learned(self, pretrained):
        first, last = pretrained[1][0], pretrained[1][-1]
        for name in ("loss", "mse", "validation_loss", "validation_mse"):
            assert last[name] < 0.8 * first[name], name

    def test_history_is_a_row_an_epoch(self, pretrained):
        directory, rows = pretrained
        assert [(row["epoch"], row["step"]) for row in rows] == [(1, 20), (2, 40), (3, 60)]
        with (directory / "history.csv").open(newline="") as file:
            written = [
                {key: float(value) for key, value in row.items()} for row in csv.DictReader(file)
            ]
        assert written == rows

    def test_checkpoint_tells_all_that_a_user_of_the_weights_needs(self, pretrained):
        _, description = open_latest(pretrained[0] / "checkpoints", made_by="")
        assert description["data"] == "made here"
        assert LevelStats(**description["statistics"]) == STATISTICS
        assert FrontEnd(**description["front_end"]) == FRONT_END
        assert description["model"]["width"] == 16 and description["pretrain"]["seed"] == 0

    def test_killed_then_interrupted_and_resumed_equals_uninterrupted(
        self, pretrained, environment, tmp_path
    ):
        code = (
            "import sys; sys.path.insert(0, sys.argv[1]); import tiny; home = sys.argv[2];"
            " tiny.pretrain_to(home, batches=lambda start: tiny.stream(start, 29, lambda:"
            " tiny.be_killed_after(home, 20)))"
        )
        command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)]
        assert subprocess.run(command, env=environment).returncode == -signal.SIGKILL
        asked = []
        with pytest.raises(KeyboardInterrupt):
            pretrain_to(
                tmp_path,
                batches=lambda start: asked.append(start) or stream(start, 49, be_interrupted),
            )
        rows = pretrain_to(tmp_path, batches=lambda start: asked.append(start) or stream(start))
        assert asked == [STEPS, 2 * STEPS]
        assert without_seconds(rows) == without_seconds(pretrained[1])
        assert pretrained_bits(tmp_path) == pretrained_bits(pretrained[0])

    def test_interrupted_within_an_epoch_it_goes_on_there(self, tmp_path, logged):
        """Long epochs have checkpoints in between; what is known of the epoch so far comes back
        too. With accumulation."""
        options = {
            "steps": 50,
            "config": dataclasses.replace(PRETRAIN, epochs=2),
            "compute": ComputeConfig(accum_steps=2),
        }
        rows = pretrain_to(tmp_path / "whole", **options)
        asked = []
        with pytest.raises(KeyboardInterrupt):
            interrupted = stream(0, 73, be_interrupted)
            cut = {
                "batches": lambda start: waiting(tmp_path / "cut", {55: 50}, interrupted),
                "save_minutes": 0,
            }
            pretrain_to(tmp_path / "cut", **options | cut)
        cut = {"batches": lambda start: asked.append(start) or stream(start)}
        assert without_seconds(pretrain_to(tmp_path / "cut", **options | cut)) == without_seconds(
            rows
        )
        assert asked == [60]
        assert f"  resuming after epoch 1 and {asked[0] - 50} steps" in logged
        assert pretrained_bits(tmp_path / "cut") == pretrained_bits(tmp_path / "whole")

    def test_a_finished_run_trains_nothing(self, pretrained):
        directory, rows = pretrained
        before = pretrained_bits(directory)
        assert (
            pretrain_to(directory, batches=lambda start: pytest.fail("asked for batches")) == rows
        )
        assert pretrained_bits(directory) == before

    @pytest.mark.parametrize("what", ["pretrain", "statistics"])
    def test_another_configuration_is_refused(self, pretrained, what):
        changed = {
            "pretrain": {"config": dataclasses.replace(PRETRAIN, learning_rate=1.0)},
            "statistics": {"statistics": dataclasses.replace(STATISTICS, mean_db=-21.0)},
        }
        with pytest.raises(
            InputError, match=rf"another configuration \({what}: .*Choose another output directory"
        ):
            pretrain_to(pretrained[0], **changed[what])

    @pytest.mark.parametrize(
        "damage",
        [
            lambda path: path.write_bytes(b""),
            lambda path: path.write_bytes(path.read_bytes()[:200]),
            lambda path: path.write_bytes(b"\xff"),
            lambda path: path.write_text("[1]"),
            lambda path: path.write_text("[" * 99999),
            lambda path: path.write_text(path.read_text().replace('"depth": 1', '"depth": 0')),
            Path.unlink,
        ],
    )
    def test_damaged_settings_are_those_of_the_checkpoints(
        self, pretrained, tmp_path, damage, logged
    ):
        out = shutil.copytree(pretrained[0], tmp_path / "run")
        before = (out / "settings.json").read_bytes()
        damage(out / "settings.json")
        assert (out / "settings.json").exists() == (damage is not Path.unlink)
        with pytest.raises(InputError, match="another configuration .statistics: found"):
            pretrain_to(out, statistics=dataclasses.replace(STATISTICS, mean_db=-21.0))
        assert pretrain_to(out) == pretrained[1]
        assert (out / "settings.json").read_bytes() == before
        assert any("settings.json was damaged or missing: written again" in line for line in logged)

    def test_damaged_settings_without_checkpoints_are_refused_and_nothing_is_to_be_deleted(
        self, tmp_path
    ):
        (tmp_path / "settings.json").write_bytes(b"")
        with pytest.raises(InputError, match="settings.json is damaged .*Rename the dir") as error:
            pretrain_to(tmp_path)
        assert "delete" not in str(error.value) and not (tmp_path / "checkpoints").exists()

    @pytest.mark.parametrize("rate, broken", [(1e30, 2), (1e17, 3)])
    def test_what_is_no_number_names_its_step_and_keeps_the_state_before(
        self, tmp_path, rate, broken
    ):
        # Warm-up: the first step does not move. At 1e30 the second update overflows, at 1e17 the
        # loss after it.
        with pytest.raises(
            FloatingPointError,
            match=f"at step {broken}, on the clips clip 0 of batch {broken - 1}, ",
        ) as error:
            pretrain_to(tmp_path, dataclasses.replace(PRETRAIN, learning_rate=rate))
        assert f"after {broken - 1} steps is saved in" in str(
            error.value
        ) and "Lower the learning rate" in str(error.value)
        assert Checkpoints(tmp_path / "checkpoints").load() is None
        tree, kept = open_latest(tmp_path / "stopped", made_by="")
        assert (
            kept["step"] == tree["state"]["step"] == broken - 1
            and kept["clips"] == batch_of(broken - 1)["clip"]
        )
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))

    def test_masks_are_new_in_training_and_the_same_in_validation(self, tmp_path):
        # Nothing moves at rate 0, and every step sees the same clips: only the masks can make a
        # difference.
        frozen = dataclasses.replace(PRETRAIN, learning_rate=0.0, epochs=2)
        first, second = pretrain_to(
            tmp_path, frozen, batches=lambda start: itertools.repeat(batch_of(0))
        )
        assert first["mse"] != second["mse"]
        assert {key: first[key] for key in first if "validation" in key} == {
            key: second[key] for key in second if "validation" in key
        }

    def test_every_clip_and_step_has_its_own_mask(self):
        run = Pretraining(MODEL, PRETRAIN, FRONT_END, STATISTICS, 10)
        masks = np.sort(
            np.concatenate([run.draw(jax.random.key(step), 4)["mask"] for step in range(2)]), axis=1
        )
        assert masks.shape == (8, 25) and len(np.unique(masks, axis=0)) == 8

    def test_steps_are_noted_with_all_that_tells_a_healthy_run(self, pretrained):
        with (pretrained[0] / "steps.csv").open(newline="") as file:
            rows = [
                {key: float(value) for key, value in row.items()} for row in csv.DictReader(file)
            ]
        assert [row["step"] for row in rows] == [20, 40, 60]
        assert [row["loss"] for row in rows] == pytest.approx(
            [row["loss"] for row in pretrained[1]], rel=1e-5
        )
        for row in rows:
            assert row["gradient_norm"] > 0 and row["update_norm"] > 0 and row["skipped"] == 0
            assert 0 < row["mfu"] < 1 and row["clips_per_second"] > 0 and 0 <= row["accuracy"] <= 1
            assert 0 < row["input_wait"] < PRETRAIN.batch_size / row["clips_per_second"]
        assert rows[1]["learning_rate"] == pytest.approx(
            float(learning_rate(PRETRAIN, 60)(39)), rel=1e-5
        )

    def test_a_run_tells_how_long_it_waits_for_batches(self, tmp_path):
        def slow(start):
            for batch in stream(start):
                time.sleep(0.05)
                yield batch

        (row,) = pretrain_to(
            tmp_path, dataclasses.replace(PRETRAIN, epochs=1), batches=slow, steps=5
        )
        # The first batch is waited for before the step is compiled, which no row counts.
        assert 4 / 5 * 0.05 <= row["input_wait"] < PRETRAIN.batch_size / row["clips_per_second"]

    def test_float16_levels_train_as_uint8_codes_do(self, pretrained, tmp_path):
        def as_levels(batch):
            return batch | {"codes": dequantize(batch["codes"], FRONT_END).astype(np.float16)}

        rows = pretrain_to(
            tmp_path,
            batches=lambda start: map(as_levels, stream(start)),
            validation=lambda: map(as_levels, validation_batches()),
        )
        # The codes' steps of 0.5 dB are float16 numbers.
        assert without_seconds(rows) == without_seconds(pretrained[1])

    def test_tensorboard_gets_the_same_numbers(self, pretrained):
        pytest.importorskip("tensorboard")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        board = EventAccumulator(str(pretrained[0] / "tensorboard"))
        board.Reload()
        points = [(event.step, event.value) for event in board.Scalars("loss")]
        assert points == [
            (row["step"], pytest.approx(row["loss"], rel=1e-5)) for row in pretrained[1]
        ]

    def test_a_moving_average_of_the_parameters(self, pretrained, tmp_path):
        pretrain_to(tmp_path, dataclasses.replace(PRETRAIN, ema_decay=0.5, epochs=1))
        state = open_latest(tmp_path / "checkpoints", made_by="")[0]["state"]
        gaps = [
            np.abs(a - b).max()
            for a, b in zip(jax.tree.leaves(state["ema"]), jax.tree.leaves(state["params"]))
        ]
        assert 0 < max(gaps) < 0.1  # behind, but not far: the rate has fallen to nearly nothing
        assert open_latest(pretrained[0] / "checkpoints", made_by="")[0]["state"]["ema"] is None

    def test_the_published_optimiser_learns_too(self, tmp_path):
        published = dataclasses.replace(
            PRETRAIN, optimizer="published", learning_rate=3e-3, epochs=2
        )
        first, last = pretrain_to(tmp_path, published)
        assert last["loss"] < first["loss"]
        with pytest.raises(InputError, match="unknown optimizer 'sgd'.* adamw, published"):
            Pretraining(
                MODEL, dataclasses.replace(PRETRAIN, optimizer="sgd"), FRONT_END, STATISTICS, 1
            ).init()

    @pytest.mark.parametrize("ratio, masked", [(0.01, 0), (0.99, 32)])
    def test_a_mask_that_leaves_nothing_to_see_or_to_guess_is_refused(
        self, tmp_path, ratio, masked
    ):
        with pytest.raises(
            InputError, match=f"masks {masked} of 32 patches. Choose one from 0.0312 to 0.969"
        ):
            pretrain_to(tmp_path, dataclasses.replace(PRETRAIN, mask_ratio=ratio))

    @pytest.mark.slow
    def test_the_visible_form_learns(self, tmp_path):
        first, *_, last = pretrain_to(
            tmp_path, dataclasses.replace(PRETRAIN, decoder_depth=1, epochs=5)
        )
        assert last["validation_mse"] < 0.8 * first["validation_mse"]

    def test_no_validation_batch_is_said(self, tmp_path):
        with pytest.raises(
            InputError,
            match="validation split does not fill one batch; choose a smaller batch size",
        ):
            pretrain_to(tmp_path, validation=list)

    def test_reconstruction_is_in_decibels_and_leaves_visible_patches_alone(self, pretrained):
        run = Pretraining(MODEL, PRETRAIN, FRONT_END, STATISTICS, 1)
        params = open_latest(pretrained[0] / "checkpoints", made_by="")[0]["state"]["params"]
        codes = codes_of(5)
        original, masked, rebuilt = reconstruction(run, params, codes)
        np.testing.assert_allclose(original, codes * 0.5 - 80, atol=1e-4)
        hidden = np.isnan(masked)
        assert hidden.mean() == 25 / 32
        np.testing.assert_allclose(rebuilt[~hidden], original[~hidden], atol=1e-4)
        assert np.isfinite(rebuilt).all() and not np.allclose(rebuilt[hidden], original[hidden])


# --- Fine-tuning --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start() -> tuple[dict, np.ndarray]:
    """Untrained parameters and the embeddings of all clips by them."""
    params = finetuning().init(0)
    return params, embed(finetuning(), params, CLIPS)


@pytest.fixture(scope="module")
def frozen(start, tmp_path_factory) -> tuple:
    """Directory, parameters and scaler of a fold whose encoder was frozen."""
    directory = tmp_path_factory.mktemp("frozen") / "fold_0"
    return directory, *fold_to(directory, start, finetuning())


@pytest.fixture(scope="module")
def moved(start, tmp_path_factory) -> tuple:
    """The same, trained through."""
    directory = tmp_path_factory.mktemp("moved") / "fold_0"
    return directory, *fold_to(directory, start, finetuning(strategy="full"))


class TestFinetune:
    def test_a_frozen_encoder_keeps_every_bit(self, start, frozen):
        assert bits(frozen[1]["encoder"]) == bits(start[0]["encoder"])
        assert all(a != b for a, b in zip(bits(frozen[1]["head"]), bits(start[0]["head"])))

    def test_training_brings_ratings_nearer(self, start, frozen):
        params, embeddings = start
        before = finetuning().rate(params, frozen[2], embeddings[TRAIN])
        after = finetuning().rate(frozen[1], frozen[2], embeddings[TRAIN])
        assert (
            np.square(after - RATINGS[TRAIN]).mean()
            < 0.95 * np.square(before - RATINGS[TRAIN]).mean()
        )

    def test_damaged_settings_of_a_fold_are_those_of_its_model(self, start, frozen, tmp_path):
        home = shutil.copytree(frozen[0], tmp_path / "fold_0")
        before = (home / "settings.json").read_bytes()
        (home / "settings.json").write_bytes(b"")
        with pytest.raises(InputError, match="holds the output of another configuration .finetune"):
            fold_to(home, start, finetuning(learning_rate=1.0))
        again = fold_to(home, start, finetuning(), lambda step: pytest.fail("it is finished"))
        assert bits(again) == bits(frozen[1:])
        assert (home / "settings.json").read_bytes() == before

    def test_only_training_clips_set_the_scale(self, start, frozen):
        scaled = np.asarray(frozen[2].apply(jnp.asarray(start[1])))
        np.testing.assert_allclose(scaled[TRAIN].mean(axis=0), 0, atol=1e-3)
        assert not np.allclose(scaled.mean(axis=0), 0, atol=1e-3)

    def test_a_trained_encoder_changes(self, start, moved):
        before, after = start[0]["encoder"], moved[1]["encoder"]
        changed = [a != b for a, b in zip(bits(before), bits(after))]
        assert np.mean(changed) > 0.8

    def test_the_encoder_learns_at_its_own_rate(self):
        params = {
            part: {"kernel": jnp.arange(1.0, 7.0).reshape(2, 3)} for part in ("encoder", "head")
        }
        gradients = jax.tree.map(lambda leaf: jnp.cos(leaf + 1), params)

        def update(rate):
            optimizer = finetuning(strategy="full", encoder_rate=rate, warmup_steps=0).optimizer
            return optimizer.update(gradients, optimizer.init(params), params)[0]

        still, slow, full = update(0.0), update(0.25), update(1.0)
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(still["encoder"]))
        assert all(np.any(leaf) for leaf in jax.tree.leaves(full["encoder"]))
        assert bits(slow["encoder"]) == bits(
            jax.tree.map(lambda leaf: leaf * 0.25, full["encoder"])
        )
        assert bits(still["head"]) == bits(slow["head"]) == bits(full["head"])

    @pytest.mark.parametrize("epoch", [2, 3])
    def test_resumed_with_frozen_encoder_equals_uninterrupted(
        self, start, frozen, tmp_path, epoch, logged
    ):
        """Interrupted between the checkpoint of an epoch and its row of history."""

        def cut(record, rows):
            send(record, rows) if len(rows) < epoch else be_interrupted()

        send = History.send
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(History, "send", cut)
            fold_to(tmp_path / "fold_0", start, finetuning())
        logged.clear()
        params, scaler = fold_to(tmp_path / "fold_0", start, finetuning())
        assert logged == [f"  resuming after epoch {epoch}"]
        assert bits((params, scaler)) == bits(frozen[1:])
        name = "history.csv"
        assert (tmp_path / "fold_0" / name).read_text() == (frozen[0] / name).read_text()

    def test_resumed_within_an_epoch_equals_uninterrupted(self, start, moved, tmp_path, logged):
        run = finetuning(strategy="full")
        with pytest.raises(KeyboardInterrupt):
            fold_to(
                tmp_path,
                start,
                run,
                lambda step: waiting(tmp_path, {2: 2}, windows_from(step, stop_at=3)),
                save_minutes=0,
            )
        asked = []
        logged.clear()
        again = fold_to(tmp_path, start, run, lambda step: asked.append(step) or windows_from(step))
        assert asked == [3] and logged == ["  resuming after epoch 1 and 1 steps"]
        assert bits(again) == bits(moved[1:])
        assert (tmp_path / "history.csv").read_text() == (moved[0] / "history.csv").read_text()

    def test_when_the_model_is_there_its_checkpoints_go(self, moved, start, tmp_path):
        """Five folds with the states of their optimisers would not fit beside the shards."""
        assert (
            list((moved[0] / "checkpoints").iterdir()) == []
            and len(list((moved[0] / "model").iterdir())) == 2
        )
        shutil.copytree(moved[0], tmp_path / "fold_0")  # as a kill just before that leaves it
        shutil.copytree(moved[0] / "model", tmp_path / "fold_0" / "checkpoints", dirs_exist_ok=True)
        fold_to(tmp_path / "fold_0", start, finetuning(strategy="full"))
        assert list((tmp_path / "fold_0" / "checkpoints").iterdir()) == []

    def test_resumed_with_trained_encoder_equals_uninterrupted(self, start, moved, tmp_path):
        run = finetuning(strategy="full")
        with pytest.raises(KeyboardInterrupt):
            fold_to(tmp_path, start, run, lambda step: windows_from(step, stop_at=3))
        assert not (tmp_path / "model").exists()
        asked = []
        result = fold_to(
            tmp_path, start, run, lambda step: asked.append(step) or windows_from(step)
        )
        assert asked == [2]
        assert bits(result) == bits(moved[1:])

    def test_a_finished_fold_is_read_not_trained(self, start, moved):
        directory, params, scaler = moved
        run = finetuning(strategy="full")
        again = fold_to(directory, start, run, lambda step: pytest.fail("asked for windows"))
        assert bits(again) == bits((params, scaler))

    def test_another_configuration_is_refused(self, start, frozen):
        with pytest.raises(InputError, match="another configuration"):
            fold_to(frozen[0], start, finetuning(learning_rate=1.0))

    def test_a_loss_that_is_no_number_names_its_step(self, start, tmp_path):
        broken = (
            start[0],
            np.where(np.arange(12)[:, None] == 4, np.nan, start[1]).astype(np.float32),
        )
        with pytest.raises(
            FloatingPointError, match="the loss is nan, .* at step 1, on .* Lower the learning rate"
        ):
            fold_to(tmp_path, broken, finetuning())

    def test_an_embedding_depends_on_its_clip_alone(self, start):
        params, together = start
        run = finetuning()
        alone = np.concatenate([embed(run, params, [clip]) for clip in CLIPS])
        # A deviation near zero is the root of a difference of two sums: rounding shows there, and
        # differs by version.
        np.testing.assert_allclose(alone, together, atol=1e-4)
        np.testing.assert_allclose(
            embed(run, params, CLIPS[::-1], batch_size=3)[::-1], together, atol=1e-4
        )
        assert (
            np.abs(together[:, None] - together[None]).max(axis=-1)[~np.eye(12, dtype=bool)].min()
            > 1e-2
        )

    def test_what_stands_behind_the_end_of_a_clip_is_not_heard(self, start):
        params, together = start
        (batch,) = clip_windows([CLIPS[1]], n_frames=64, batch_size=8)
        loud = np.where(
            np.arange(64)[None, :, None] >= batch["n_valid"][:, None, None], 255, batch["codes"]
        )
        heard = finetuning().embed(params, [batch | {"codes": loud.astype(np.uint8)}], 1)
        np.testing.assert_allclose(heard, together[1:2], atol=1e-5)


class TestState:
    def test_the_model_hears_deviations_from_the_mean_in_two_standard_deviations(self):
        codes = jnp.asarray([0, 120, 255], jnp.uint8)
        np.testing.assert_allclose(
            normalise(codes, FRONT_END, STATISTICS), [-60 / 24, 0.0, 67.5 / 24], rtol=1e-6
        )

    def test_float16_levels_are_heard_as_their_codes_within_half_a_step(self):
        levels = np.random.default_rng(0).uniform(-80, 47, (2, 64, 128)).astype(np.float16)
        codes, _ = quantize(levels.astype(np.float32), FRONT_END)
        heard = [
            normalise(jnp.asarray(stored), FRONT_END, STATISTICS) for stored in (levels, codes)
        ]
        assert heard[0].dtype == jnp.float32
        np.testing.assert_allclose(
            *heard, rtol=0, atol=FRONT_END.step_db / 2 / (2 * STATISTICS.std_db) + 1e-6
        )

    def test_rate_warms_up_and_falls_to_zero(self):
        config = dataclasses.replace(PRETRAIN, warmup_steps=10, learning_rate=0.5)
        schedule = learning_rate(config, 210)
        np.testing.assert_allclose(
            [schedule(k) for k in (0, 5, 10, 110, 210)], [0, 0.25, 0.5, 0.25, 0], atol=1e-6
        )
        # A run too short for the warm-up spends a tenth on it.
        np.testing.assert_allclose(
            [learning_rate(config, 20)(k) for k in (0, 1, 2, 20)], [0, 0.25, 0.5, 0], atol=1e-6
        )

    def test_only_kernels_decay(self):
        # of stacked blocks a bias has two axes
        params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones((3, 2))}
        optimizer = make_optimizer(
            dataclasses.replace(PRETRAIN, warmup_steps=0, weight_decay=0.1), 10
        )
        updates, _ = optimizer.update(
            jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
        )
        np.testing.assert_allclose(updates["kernel"], -0.1 * PRETRAIN.learning_rate, rtol=1e-5)
        np.testing.assert_array_equal(updates["bias"], 0.0)

    def test_what_a_device_cannot_do_is_refused(self):
        cpu, *_ = jax.devices()
        with pytest.raises(
            InputError, match="unknown precision 'fp8'.* float32, bfloat16, float16"
        ):
            compute_for(ComputeConfig(precision="fp8"), cpu)
        with pytest.raises(
            InputError, match="'cudnn' needs a GPU from Ampere on .* not cpu in float32"
        ):
            compute_for(ComputeConfig(attention="cudnn"), cpu)
        with pytest.raises(InputError, match="unknown attention 'flash'"):
            compute_for(ComputeConfig(attention="flash"), cpu)

    def test_a_cpu_computes_in_float32(self):
        assert compute_for(ComputeConfig(), jax.devices()[0]).dtype == jnp.float32
