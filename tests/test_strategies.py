"""What each strategy trains, at which rate and from when on; that every one of them resumes bit for
bit. About 40 s."""

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
    CLIPS,
    FINETUNE,
    FRONT_END,
    MODEL,
    STATISTICS,
    be_interrupted,
    be_killed_after,
    bits,
    compiled_once,
    embed,
    fold_to,
    windows_from,
)

from percepiano_ast.errors import InputError
from percepiano_ast.models import lora
from percepiano_ast.models.cnn import CNNConfig
from percepiano_ast.training import strategies
from percepiano_ast.training.checkpoints import size_of
from percepiano_ast.training.finetune import Finetuning
from percepiano_ast.training.loop import History

DEEP = dataclasses.replace(MODEL, depth=3)
CHANGES = {
    "last": {"last_blocks": 1},
    "gradual": {"unfreeze_epochs": 1},
    "full": {},
    "lora": {"lora_rank": 2},
}


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory):
    with compiled_once(tmp_path_factory.getbasetemp() / "compiled") as variables:
        yield variables


def deep(**changes) -> Finetuning:
    return Finetuning(DEEP, dataclasses.replace(FINETUNE, **changes), FRONT_END, STATISTICS, 6)


@pytest.fixture(scope="module")
def start() -> tuple[dict, np.ndarray]:
    params = deep().init(0)
    return params, embed(deep(), params, CLIPS)


@pytest.fixture(scope="module")
def trained(start, tmp_path_factory) -> dict:
    """Strategy -> directory, run, parameters and scaler of an uninterrupted fold."""
    found = {}
    for strategy, changes in CHANGES.items():
        directory, run = tmp_path_factory.mktemp(strategy), deep(strategy=strategy, **changes)
        found[strategy] = directory, run, *fold_to(directory, start, run)
    return found


def changed_blocks(before: dict, after: dict) -> list[bool]:
    """Which of the stacked blocks differ in any parameter."""
    pairs = list(
        zip(
            jax.tree.leaves(before["encoder"]["blocks"]),
            jax.tree.leaves(after["encoder"]["blocks"]),
        )
    )
    return [any(np.any(a[layer] != b[layer]) for a, b in pairs) for layer in range(DEEP.depth)]


class TestWhatIsTrained:
    @pytest.mark.parametrize(
        "strategy, blocks",
        [("last", [False, False, True]), ("full", [True] * 3), ("lora", [True] * 3)],
    )
    def test_blocks_that_change(self, start, trained, strategy, blocks):
        assert changed_blocks(start[0], trained[strategy][2]) == blocks

    @pytest.mark.parametrize("strategy", ["last", "lora"])
    def test_the_rest_of_the_encoder_keeps_every_bit(self, start, trained, strategy):
        for name in ("patch_embed", "pos_embed", "cls_token"):
            assert bits(trained[strategy][2]["encoder"][name]) == bits(start[0]["encoder"][name])

    def test_adapters_touch_the_attention_alone(self, start, trained):
        before, after = (params["encoder"]["blocks"] for params in (start[0], trained["lora"][2]))
        assert bits(before["mlp"]) == bits(after["mlp"])
        moved = np.asarray(
            after["attention"]["qkv"]["kernel"] - before["attention"]["qkv"]["kernel"]
        )
        for layer in range(DEEP.depth):
            for product in np.split(moved[layer], 3, axis=1):
                assert np.linalg.matrix_rank(product, tol=1e-6) <= 2

    def test_what_is_kept_while_training_is_what_is_trained(self, start):
        """The optimiser has no moments for what stays, and checkpoints do not hold it."""
        sizes = {}
        for strategy, changes in {"frozen": {}, **CHANGES}.items():
            run = deep(strategy=strategy, **changes)
            part = strategies.split(run.config, start[0])
            sizes[strategy] = size_of(part)
            moments = size_of(run.optimizer.init(part))
            assert 2 * sizes[strategy] <= moments <= 2 * sizes[strategy] + 64
        assert sizes["frozen"] < sizes["lora"] < sizes["last"] < sizes["gradual"] == sizes["full"]

    @pytest.mark.parametrize("strategy", CHANGES)
    def test_before_training_the_rater_is_the_one_that_was_given(self, start, strategy):
        config = deep(strategy=strategy, **CHANGES[strategy]).config
        joined = strategies.join(config, start[0]["encoder"], strategies.split(config, start[0]))
        assert bits(joined) == bits({name: start[0][name] for name in ("encoder", "head")})


class TestRates:
    @staticmethod
    def updates(run: Finetuning, params: dict, steps: int) -> dict:
        """Sum of updates for constant gradients of 1."""
        state, total = run.optimizer.init(params), jax.tree.map(jnp.zeros_like, params)
        for _ in range(steps):
            found, state = run.optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
            total = jax.tree.map(jnp.add, total, found)
        return total

    def test_each_block_learns_slower_than_the_one_above_it(self, start):
        run = deep(strategy="full", layer_decay=0.5, encoder_rate=1.0, weight_decay=0.0)
        found = self.updates(run, strategies.split(run.config, start[0]), 2)
        head = np.abs(found["head"]["norm"]["bias"]).max()
        blocks = np.abs(found["encoder"]["blocks"]["norm1"]["bias"]).max(axis=1)
        np.testing.assert_allclose(blocks / head, [1 / 8, 1 / 4, 1 / 2], rtol=1e-5)
        np.testing.assert_allclose(
            np.abs(found["encoder"]["pos_embed"]).max() / head, 1 / 16, rtol=1e-5
        )
        np.testing.assert_allclose(
            np.abs(found["encoder"]["norm"]["bias"]).max() / head, 1, rtol=1e-5
        )

    def test_blocks_thaw_from_the_top(self, start):
        """An epoch of two steps for each block; what is frozen does not decay either."""
        run = dataclasses.replace(
            deep(strategy="gradual", unfreeze_epochs=1, epochs=8), total_steps=16
        )
        params = strategies.split(run.config, start[0])
        for steps, moved in (
            (2, [0, 0, 0]),
            (3, [0, 0, 1]),
            (5, [0, 1, 1]),
            (6, [0, 1, 1]),
            (7, [1, 1, 1]),
        ):
            found = self.updates(run, params, steps)["encoder"]
            kernels = np.abs(found["blocks"]["attention"]["qkv"]["kernel"]).max(axis=(1, 2))
            assert (kernels > 0).astype(int).tolist() == moved
            assert bool(np.any(found["norm"]["scale"])) == (steps > 2) and not np.any(
                found["patch_embed"]["kernel"]
            )

    def test_bad_numbers_are_refused(self):
        for changes, message in (
            (
                {"strategy": "all"},
                "unknown strategy 'all'. Choose one of: frozen, last, gradual, full, lora",
            ),
            (
                {"strategy": "last", "last_blocks": 4},
                "last_blocks=4 of a model with 3 blocks: choose from 1 to 3",
            ),
            ({"strategy": "lora", "lora_rank": 0}, "lora_rank=0 is too small"),
            ({"strategy": "gradual", "unfreeze_epochs": 0}, "unfreeze_epochs=0 is too small"),
            ({"head": "separate"}, "unknown head 'separate'"),
            ({"pooling": "max"}, "unknown pooling 'max'"),
            ({"weighting": "gradnorm"}, "unknown weighting of losses 'gradnorm'"),
            ({"weighting": "dwa", "predict_uncertainty": True}, "Choose weighting 'equal'"),
        ):
            with pytest.raises(InputError, match=message):
                deep(**changes).init_head(0)
        with pytest.raises(
            InputError, match="works on transformer blocks only; train the cnn with 'full'"
        ):
            Finetuning(
                CNNConfig(),
                dataclasses.replace(FINETUNE, strategy="last"),
                FRONT_END,
                STATISTICS,
                6,
            )


class TestResume:
    @pytest.mark.parametrize("strategy", CHANGES)
    def test_interrupted_equals_uninterrupted(self, start, trained, tmp_path, strategy):
        directory, run, *expected = trained[strategy]
        with pytest.raises(KeyboardInterrupt):
            fold_to(tmp_path, start, run, lambda step: windows_from(step, stop_at=3))
        asked = []
        again = fold_to(tmp_path, start, run, lambda step: asked.append(step) or windows_from(step))
        assert asked == [2] and bits(again) == bits(expected)
        assert (tmp_path / "history.csv").read_text() == (directory / "history.csv").read_text()

    def test_killed_equals_uninterrupted(self, start, trained, environment, tmp_path, logged):
        code = (
            "import sys; sys.path.insert(0, sys.argv[1]); import test_strategies as t; from pathlib"
            " import Path; t.be_killed_in(Path(sys.argv[2]), 'lora')"
        )
        command = [sys.executable, "-c", code, str(Path(__file__).parent), str(tmp_path)]
        assert subprocess.run(command, env=os.environ | environment).returncode == -signal.SIGKILL
        logged.clear()
        again = fold_to(tmp_path, start, trained["lora"][1])
        assert logged == ["  resuming after epoch 1"] and bits(again) == bits(trained["lora"][2:])

    @pytest.mark.parametrize(
        "changes",
        [
            {"weighting": "dwa", "epochs": 5},
            {"weighting": "uncertainty", "head": "attention"},
            {"predict_uncertainty": True, "rating_scale": "dimension"},
        ],
        ids=["dwa", "uncertainty and attention", "predicted uncertainty"],
    )
    def test_the_switches_resume_too(self, start, tmp_path, changes):
        run = deep(**changes)
        begin = start[0] | {"head": run.init_head(0)}, start[1]
        whole = fold_to(tmp_path / "whole", begin, run)
        epochs = run.config.epochs
        send = History.send

        def cut(record, rows):
            send(record, rows) if len(rows) < epochs - 1 else be_interrupted()

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(History, "send", cut)
            fold_to(tmp_path / "cut", begin, run)
        assert bits(fold_to(tmp_path / "cut", begin, run)) == bits(whole)
        name = "history.csv"
        assert (tmp_path / "cut" / name).read_text() == (tmp_path / "whole" / name).read_text()


def be_killed_in(directory: Path, strategy: str):
    """Train until the checkpoint of the first epoch has arrived, then die."""
    run = deep(strategy=strategy, **CHANGES[strategy])
    params = deep().init(0)

    def windows(step):
        for number, batch in enumerate(windows_from(step)):
            if number == 3:
                be_killed_after(directory, 2)
            yield batch

    fold_to(directory, (params, embed(deep(), params, CLIPS)), run, windows)


class TestAdapters:
    def test_merged_is_low_rank_beside_the_weights(self, start):
        encoder = start[0]["encoder"]
        adapters = lora.init(encoder, 2, jax.random.key(1))
        assert bits(lora.merge(encoder, adapters, 3.0)) == bits(encoder)
        adapters["qkv"]["up"] = jax.random.normal(jax.random.key(2), adapters["qkv"]["up"].shape)
        merged = lora.merge(encoder, adapters, 3.0)["blocks"]["attention"]["qkv"]["kernel"]
        width = DEEP.width
        for part in range(3):  # q, k, v
            product = adapters["qkv"]["down"][1, part] @ adapters["qkv"]["up"][1, part]
            columns = slice(part * width, (part + 1) * width)
            expected = (
                encoder["blocks"]["attention"]["qkv"]["kernel"][1, :, columns] + 3.0 * product
            )
            np.testing.assert_allclose(merged[1, :, columns], expected, atol=1e-5)


class TestCNN:
    CNN = CNNConfig(channels=(4, 8, 8, 8), n_frames=64)

    def run(self) -> Finetuning:
        config = dataclasses.replace(FINETUNE, strategy="full", encoder_rate=1.0)
        return Finetuning(self.CNN, config, FRONT_END, STATISTICS, 6)

    def test_it_trains_and_resumes_by_the_same_fold_loop(self, tmp_path):
        run = self.run()
        params = run.init(0)
        begin = params, embed(run, params, CLIPS)
        whole = fold_to(tmp_path / "whole", begin, run)
        assert all(
            np.any(a != b)
            for a, b in zip(
                jax.tree.leaves(params["encoder"]), jax.tree.leaves(whole[0]["encoder"])
            )
        )
        with pytest.raises(KeyboardInterrupt):
            fold_to(tmp_path / "cut", begin, run, lambda step: windows_from(step, stop_at=3))
        assert bits(fold_to(tmp_path / "cut", begin, run)) == bits(whole)

    def test_how_far_a_clip_is_padded_is_not_heard(self):
        run = self.run()
        params = run.init(0)
        wide = dataclasses.replace(run, model=dataclasses.replace(self.CNN, n_frames=128))
        clip = CLIPS[0][:32]

        def heard(run, frames, behind):
            codes = np.full((1, frames, 128), behind, np.uint8)
            codes[0, :32] = clip
            batch = {
                "codes": codes,
                "n_valid": np.array([32], np.int32),
                "clip": np.array([0], np.int32),
            }
            return run.embed(params, [batch], 1)

        np.testing.assert_allclose(heard(run, 64, 0), heard(run, 64, 255), atol=1e-6)
        np.testing.assert_allclose(heard(run, 64, 0), heard(wide, 128, 7), atol=1e-5)
