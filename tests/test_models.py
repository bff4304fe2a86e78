"""Models: numbers of the published implementations, and what training and rating rely on. About 40
s on two cores.

Without parity files (``PARITY_DIR`` or ``../shared/parity``) those tests are skipped, in CI they
fail.
"""

import dataclasses
import functools
import importlib.util
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from percepiano_ast.config import MODELS, ModelConfig
from percepiano_ast.dimensions import KEYS, group_indices
from percepiano_ast.errors import InputError
from percepiano_ast.models import ast, heads, ssast
from percepiano_ast.models.transformer import Compute

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tests" / "parity.py"
PARITY_FILES = [
    "ssast_patch_small",
    "ssast_patch_1024_400",
    "ssast_finetune_pos",
    "ast_small",
    "hf_ast_small",
    "fbank_kaldi",
]
# torchaudio computes in float32: in bands 70 dB below the loudest its logarithms are rounding, and
# differ from machine to machine by more than this.
FBANK_TOLERANCES = {"fbank_": 5e-4, "melbank_": 3e-5}
SMALL = ModelConfig("small-test", width=32, depth=2, num_heads=2, n_mels=32, n_frames=96)


@functools.cache
def parity_module():
    """tests/parity.py as a module: tests is no package."""
    spec = importlib.util.spec_from_file_location("parity", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def parity_dir() -> Path:
    folder = Path(os.environ.get("PARITY_DIR", ROOT.parent / "shared" / "parity"))
    if not folder.is_dir():
        reason = f"no parity files in {folder}; set PARITY_DIR"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return folder


def spectrograms(seed: int, frames: int = SMALL.n_frames, mels: int = SMALL.n_mels) -> jax.Array:
    return jnp.asarray(
        0.5 * np.random.default_rng(seed).normal(size=(2, frames, mels)), jnp.float32
    )


def random_params(model, *arguments) -> dict:
    """Parameters away from their initial symmetry (biases, gains and tokens count too), without
    compiling ``init``."""
    rng = np.random.default_rng(7)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        kind = path[-1].key
        if kind == "kernel":
            return noise * np.float32(leaf.shape[-2] ** -0.5)
        return 0.1 * noise + (kind == "scale")

    shapes = jax.eval_shape(model.init, jax.random.key(0), *arguments)["params"]
    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def ssast_params() -> dict:
    return random_params(ssast.SSAST(SMALL), spectrograms(0), jnp.zeros((2, 1), jnp.int32))


@functools.cache
def rater_params() -> dict:
    return random_params(
        heads.RatingModel(SMALL), spectrograms(0), jnp.ones((2, SMALL.n_frames), bool)
    )


def count(params: dict) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


class TestParity:
    @pytest.mark.parametrize(
        "name", [*PARITY_FILES, pytest.param("ssast_tiny_full", marks=pytest.mark.slow)]
    )
    def test_published_numbers(self, parity_dir, name):
        parity = parity_module()
        errors = parity.errors_of(parity_dir / f"{name}.npz")
        stored = parity.Stored(parity_dir / f"{name}.npz")
        for quantity, error in errors.items():
            if quantity == "traj":
                assert error <= 1e-3 * stored.read("traj")[:, 1:].mean(axis=0).min()
            elif quantity.startswith("grad_norms/"):
                norm = stored.meta["grad_norms"][quantity.removeprefix("grad_norms/")]
                assert error <= 1e-5 * max(1.0, norm), quantity
            else:
                tolerance = [
                    FBANK_TOLERANCES[start]
                    for start in FBANK_TOLERANCES
                    if quantity.startswith(start)
                ]
                assert error <= (tolerance or [1e-5])[0], quantity
        compared = (
            "fbank_16000",
            "logits",
            "pred_c",
            "act/block0",
            "g/v.norm.weight",
            "T100s10/cls",
        )
        assert {key for key in compared if key in stored} <= set(errors)

    def test_altered_numbers_show(self, parity_dir, tmp_path):
        with np.load(parity_dir / "hf_ast_small.npz") as archive:
            stored = dict(archive)
        stored["act/hidden2"][1, 7, 5] += 0.01
        stored["logits"][0, 0] = np.nan
        np.savez(tmp_path / "altered.npz", **stored)
        errors = parity_module().errors_of(tmp_path / "altered.npz")
        assert errors["act/hidden2"] == pytest.approx(0.01, abs=1e-4)
        assert errors["logits"] == np.inf
        with np.load(parity_dir / "fbank_kaldi.npz") as archive:
            front_end = dict(archive)
        front_end["fbank_16000"][3, 5] += 0.01
        np.savez(tmp_path / "front_end.npz", **front_end)
        assert parity_module().errors_of(tmp_path / "front_end.npz")[
            "fbank_16000"
        ] == pytest.approx(0.01, abs=1e-3)
        np.savez(tmp_path / "more.npz", **stored, surprise=np.zeros(3))
        with pytest.raises(InputError, match="surprise"):  # nothing stored is passed over
            parity_module().errors_of(tmp_path / "more.npz")

    def test_command_prints_a_line_per_file(self, parity_dir, tmp_path, capsys):
        shutil.copy(parity_dir / "hf_ast_small.npz", tmp_path / "good.npz")
        np.savez(tmp_path / "other.npz", meta_json=json.dumps({"src": "a front end"}))
        (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 cut short")
        code = parity_module().main(
            [str(tmp_path / f"{name}.npz") for name in ("other", "broken", "good")]
        )
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert code == 2
        assert [line["case"] for line in lines] == ["other", "broken", "good"]
        assert "kind None" in lines[0]["error"] and "no parity file" in lines[1]["error"]
        assert max(lines[2]["errors"].values()) < 1e-5


class TestEncoder:
    @pytest.mark.parametrize(
        "name, published", [("tiny", 5_660_288), ("small", 22_084_352), ("base", 87_225_344)]
    )
    def test_ssast_has_the_published_sizes(self, name, published):
        model = ssast.SSAST(MODELS[name])
        inputs = jnp.zeros((1, 1024, 128)), jnp.zeros((1, 400), jnp.int32)
        shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
        assert count(shapes) == published
        if name == "base":
            assert count(shapes["encoder"]) - shapes["encoder"]["mask_embed"].size == 85_649_664

    def test_supervised_ast_has_the_published_size(self):
        config = dataclasses.replace(MODELS["base"], stride=(10, 10))
        model = ast.Classifier(config, 527)
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1024, 128)))["params"]
        assert config.num_patches == 1212
        assert count(shapes) - shapes["encoder"]["mask_embed"].size == 86_594_063

    @pytest.mark.parametrize("frames, mels", [(16, 32), (50, 32), (300, 64), (97, 16)])
    def test_any_length_works(self, frames, mels):
        x = spectrograms(1, frames=frames, mels=mels)
        tokens, _ = jax.jit(ast.Encoder(SMALL).apply)({"params": rater_params()["encoder"]}, x)
        assert tokens.shape == (2, 2 + (frames // 16) * (mels // 16), SMALL.width)
        assert np.isfinite(tokens).all()

    def test_impossible_geometries_are_refused_with_the_numbers(self):
        with pytest.raises(InputError, match="width 32 is not divisible by 3 heads"):
            dataclasses.replace(SMALL, num_heads=3)
        with pytest.raises(
            InputError, match="32 bands x 10 frames is smaller than a patch of 16 x 16"
        ):
            dataclasses.replace(SMALL, n_frames=10)

    def test_attention_head_by_head_is_the_same_attention(self):
        x, valid = spectrograms(3), jnp.ones((2, SMALL.num_patches), bool).at[0, 3].set(False)

        def ratings_and_gradient(attention: str):
            model = heads.RatingModel(SMALL, compute=Compute(attention=attention))
            frames = jnp.repeat(valid[:, : SMALL.grid[1]], 16, axis=1)
            objective = lambda params: model.apply({"params": params}, x, frames)[0].sum()  # noqa: E731
            return jax.jit(jax.value_and_grad(objective))(rater_params())

        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
        jax.tree.map(close, ratings_and_gradient("heads"), ratings_and_gradient("xla"))

    def test_recomputing_activations_changes_no_gradient(self):
        x, index = spectrograms(2), jnp.array([[0, 4, 7], [1, 2, 3]])

        def gradient(remat: bool):
            model = ssast.SSAST(SMALL, Compute(remat=remat))

            def objective(params):
                return ssast.losses(model.apply({"params": params}, x, index)[0])["loss"]

            return jax.jit(jax.grad(objective))(ssast_params())

        jax.tree.map(
            functools.partial(np.testing.assert_allclose, atol=1e-5),
            gradient(True),
            gradient(False),
        )

    def test_too_short_or_wrong_shape_is_refused(self):
        params = {"params": rater_params()["encoder"]}
        with pytest.raises(InputError, match="15 frames"):
            ast.Encoder(SMALL).apply(params, jnp.zeros((1, 15, 32)))
        with pytest.raises(InputError, match="are not .batch, time, mel."):
            ast.Encoder(SMALL).apply(params, jnp.zeros((96, 32)))

    def test_patches_run_along_time_first(self):
        frame, band = jnp.meshgrid(jnp.arange(64.0), jnp.arange(32.0), indexing="ij")
        patches = ast.patchify((1000 * band + frame)[None], (16, 16), (10, 10))[0]
        assert patches.shape == (2 * 5, 256)
        # second row, fourth column; (frequency, time) within
        patch = patches[1 * 5 + 3].reshape(16, 16)
        assert patch[0, 0] == 10_030 and patch[0, 1] == 10_031 and patch[2, 0] == 12_030

    def test_attention_on_request_ignores_invalid_patches(self):
        valid = jnp.ones((2, SMALL.num_patches), bool).at[0, 3].set(False)
        apply = jax.jit(functools.partial(ast.Encoder(SMALL).apply, need_attention=True))
        tokens, intermediates = apply(
            {"params": rater_params()["encoder"]}, spectrograms(4), patch_valid=valid
        )
        weights = intermediates["attention1"]
        assert weights.shape == (2, 2, 2 + SMALL.num_patches, 2 + SMALL.num_patches)
        np.testing.assert_allclose(weights.sum(axis=-1), 1.0, rtol=1e-5)
        assert not weights[0, :, :, 2 + 3].any() and weights[1, :, :, 2 + 3].all()
        assert set(intermediates) == {
            "patch_embed",
            "with_pos",
            "block0",
            "block1",
            "attention0",
            "attention1",
        }

    def test_positions_are_cut_around_the_centre(self):
        table = jnp.arange(2 + 2 * 6, dtype=jnp.float32)[None, :, None]
        cut = ast.resize_pos_embed(table, (2, 6), (2, 3))[0, :, 0]
        assert cut.tolist() == [0, 1, 4, 5, 6, 10, 11, 12]
        assert ast.resize_pos_embed(table, (2, 6), (4, 9)).shape == (1, 2 + 36, 1)
        with pytest.raises(InputError, match="14 rows"):
            ast.resize_pos_embed(table, (3, 6), (2, 3))


class TestStem:
    config = SMALL.cut(frames=4, stem=(6, 8))

    def encode(self, log_mel, **options):
        encoder = ast.Encoder(self.config)
        params = jax.jit(encoder.init)(jax.random.key(0), log_mel)
        return jax.jit(functools.partial(encoder.apply, **options))(params, log_mel)[0]

    @pytest.mark.parametrize("frames", [96, 97, 99, 40])
    def test_one_token_for_every_whole_patch(self, frames):
        tokens = self.encode(spectrograms(5, frames=frames))
        assert tokens.shape == (2, 2 + frames // 4, SMALL.width) and np.isfinite(tokens).all()

    def test_a_patch_is_told_by_its_own_frames_and_those_beside_them(self):
        stem, log_mel = ast.Stem(self.config, jnp.float32), spectrograms(6)
        params = jax.jit(stem.init)(jax.random.key(0), log_mel)
        gradient = jax.grad(lambda x: stem.apply(params, x)[:, 10].sum())(log_mel)
        heard = np.flatnonzero(np.abs(gradient).sum(axis=(0, 2)))
        assert heard.min() < 40 and heard.max() >= 43 and 4 < len(heard) <= 12

    def test_what_is_masked_would_be_seen(self):
        log_mel = spectrograms(7)
        with pytest.raises(InputError, match="leak masked patches"):
            self.encode(log_mel, masked=jnp.zeros((2, 24), bool))
        with pytest.raises(InputError, match="leak masked patches"):
            self.encode(log_mel, visible_index=jnp.zeros((2, 3), jnp.int32))

    @pytest.mark.parametrize(
        "change", [{"stem": (6,)}, {"patch_size": (16, 4), "stride": (16, 4)}, {"stride": (32, 2)}]
    )
    def test_patches_that_do_not_suit_are_refused(self, change):
        with pytest.raises(InputError, match="a stem of"):
            dataclasses.replace(self.config, **change)


class TestSSAST:
    def test_masked_patches_do_not_leak(self):
        x = spectrograms(5)
        index = jnp.array([[0, 4, 7], [1, 2, 3]])
        apply = jax.jit(ssast.SSAST(SMALL).apply)
        before, _ = apply({"params": ssast_params()}, x, index)
        f, t = divmod(4, SMALL.grid[1])
        other = x.at[0, 16 * t : 16 * t + 16, 16 * f : 16 * f + 16].add(9.0)
        changed, _ = apply({"params": ssast_params()}, other, index)
        for head in ("discriminative", "generative"):
            np.testing.assert_array_equal(changed[head], before[head])
        np.testing.assert_allclose(changed["target"][0, 1], before["target"][0, 1] + 9.0, rtol=1e-5)
        # patch 6 is not masked
        seen, _ = apply({"params": ssast_params()}, x.at[0, :16, 16:].add(9.0), index)
        assert not np.array_equal(seen["generative"][0], before["generative"][0])
        np.testing.assert_array_equal(seen["generative"][1], before["generative"][1])

    def test_frames_for_patches(self):
        config = dataclasses.replace(SMALL, patch_size=(32, 2), stride=(32, 2))
        assert config.grid == (1, 48) and config.patch_dim == 64
        index = ssast.sample_mask_index(jax.random.key(0), 2, config.grid, 36)
        model = ssast.SSAST(config)
        x = spectrograms(5)
        params = random_params(model, x, index)
        outputs, _ = jax.jit(model.apply)({"params": params}, x, index)
        assert outputs["generative"].shape == (2, 36, 64)
        first = int(index[0, 0])  # a frame patch holds all bands of its two frames, bands first
        np.testing.assert_array_equal(
            outputs["target"][0, 0], np.asarray(x)[0, 2 * first : 2 * first + 2].T.ravel()
        )

    def test_losses_of_a_perfect_and_of_a_blind_model(self):
        target = 20 * spectrograms(0, frames=12, mels=256)
        perfect = ssast.losses({"target": target, "discriminative": target, "generative": target})
        outputs = {
            "target": target,
            "discriminative": jnp.zeros_like(target),
            "generative": target + 2.0,
        }
        blind = ssast.losses(outputs, generative_weight=3.0)
        assert perfect["accuracy"] == 1.0 and perfect["loss"] < 1e-6
        assert blind["nce"] == pytest.approx(np.log(12), rel=1e-6) and blind[
            "mse"
        ] == pytest.approx(4.0, rel=1e-5)
        assert blind["loss"] == pytest.approx(np.log(12) + 12.0, rel=1e-5)
        with pytest.raises(InputError, match="targets, predictions"):
            ssast.losses({}, softmax_over="rows")

    def test_reconstruction_replaces_masked_patches_only(self):
        x = spectrograms(6, frames=100)  # four frames more than whole patches
        index = np.array([[5], [0]])
        masked, filled = ssast.reconstruct(x, np.full((2, 1, 256), 3.0), index, SMALL)
        hidden = np.isnan(masked)
        assert (
            hidden[0, :16, :].sum() == 0 and hidden[0, 80:96, :16].all() and hidden.sum() == 2 * 256
        )
        assert (filled[hidden] == 3.0).all()
        np.testing.assert_array_equal(filled[~hidden], np.asarray(x)[~hidden])
        with pytest.raises(InputError, match="without overlap"):
            ssast.reconstruct(
                x, np.zeros((2, 1, 256)), index, dataclasses.replace(SMALL, stride=(10, 10))
            )


class TestVisibleOnly:
    model = ssast.SSAST(SMALL, decoder_depth=1)
    index = jnp.array([[0, 4, 7, 9], [1, 2, 3, 11]])

    @staticmethod
    @functools.cache
    def params() -> dict:
        return random_params(TestVisibleOnly.model, spectrograms(0), TestVisibleOnly.index)

    def test_visible_patches_are_the_others_in_order(self):
        visible = np.asarray(ssast.visible_index(jnp.array([[5, 0, 2], [1, 4, 3]]), 6))
        assert visible.tolist() == [[1, 3, 4], [0, 2, 5]] and visible.dtype == np.int32

    def test_the_encoder_sees_visible_patches_alone(self):
        _, intermediates = jax.jit(self.model.apply)(
            {"params": self.params()}, spectrograms(1), self.index
        )
        assert intermediates["tokens"].shape == (2, 2 + SMALL.num_patches - 4, SMALL.width)
        # Its token of a patch is what the whole encoder makes of the same patches when the others
        # are no keys.
        visible = ssast.visible_index(self.index, SMALL.num_patches)
        valid = (
            jnp.zeros((2, SMALL.num_patches), bool).at[jnp.arange(2)[:, None], visible].set(True)
        )
        encoder = jax.jit(ast.Encoder(SMALL).apply)
        whole, _ = encoder({"params": self.params()["encoder"]}, spectrograms(1), patch_valid=valid)
        expected = jnp.take_along_axis(whole, 2 + visible[:, :, None], axis=1)
        np.testing.assert_allclose(intermediates["tokens"][:, 2:], expected, atol=1e-5)

    def test_masked_patches_do_not_leak_and_each_has_its_place(self):
        x = spectrograms(5)
        apply = jax.jit(self.model.apply)
        before, _ = apply({"params": self.params()}, x, self.index)
        # patch 4 is masked
        changed, _ = apply({"params": self.params()}, x.at[0, 64:80, :16].add(9.0), self.index)
        for head in ("discriminative", "generative"):
            np.testing.assert_array_equal(changed[head], before[head])
        np.testing.assert_allclose(changed["target"][0, 1], before["target"][0, 1] + 9.0, rtol=1e-5)
        # patch 6 is not
        seen, _ = apply({"params": self.params()}, x.at[0, :16, 16:].add(9.0), self.index)
        assert not np.allclose(seen["generative"][0], before["generative"][0], atol=1e-4)
        # The order in which masked patches are named is that of the predictions, and of no other
        # account.
        turned, _ = apply({"params": self.params()}, x, self.index[:, ::-1])
        np.testing.assert_allclose(turned["generative"][:, ::-1], before["generative"], atol=1e-5)

    def test_its_encoder_fits_where_any_other_does(self):
        whole = ssast_params()["encoder"]
        assert jax.tree.map(jnp.shape, self.params()["encoder"]) == jax.tree.map(jnp.shape, whole)


class TestMaskSampler:
    clips, grid = 4096, (8, 64)

    @staticmethod
    def sample(seed: int, num_masked: int) -> np.ndarray:
        draw = jax.jit(ssast.sample_mask_index, static_argnums=(1, 2, 3))
        return np.asarray(
            draw(jax.random.key(seed), TestMaskSampler.clips, TestMaskSampler.grid, num_masked)
        )

    @pytest.mark.parametrize("num_masked", [77, 400])
    def test_every_patch_is_masked_equally_often(self, num_masked):
        index = self.sample(0, num_masked)
        assert index.shape == (self.clips, num_masked) and index.dtype == np.int32
        assert all(len(set(row)) == num_masked for row in index.tolist())
        frequency = np.bincount(index.ravel(), minlength=512).reshape(self.grid) / self.clips
        expected = num_masked / 512
        # 5 standard errors at 77; corners included
        assert np.abs(frequency / expected - 1).max() < 0.15
        # the published sampler: 41 % against 89 %
        assert np.abs(frequency.mean(axis=1) / expected - 1).max() < 0.05
        assert np.abs(frequency.mean(axis=0) / expected - 1).max() < 0.08

    def test_clips_differ_and_a_seed_repeats(self):
        first = self.sample(1, 77)
        assert len({tuple(sorted(row)) for row in first.tolist()}) == self.clips
        np.testing.assert_array_equal(first, self.sample(1, 77))
        assert not np.array_equal(first, self.sample(2, 77))

    def test_masks_are_clustered(self):
        masks = np.zeros((self.clips, 512), bool)
        np.put_along_axis(masks, self.sample(3, 77), True, axis=1)
        masks = masks.reshape(self.clips, *self.grid)
        neighbour = (masks[:, :, 1:] & masks[:, :, :-1]).sum() / masks[:, :, :-1].sum()
        assert neighbour > 0.6  # a mask without clusters: .15

    @pytest.mark.parametrize(
        "num_masked, cluster", [(0, (3, 5)), (129, (3, 5)), (10, (0, 5)), (10, (5, 3))]
    )
    def test_impossible_masks_are_refused(self, num_masked, cluster):
        with pytest.raises(InputError):
            ssast.sample_mask_index(jax.random.key(0), 1, (8, 16), num_masked, cluster)


class TestRater:
    apply = staticmethod(jax.jit(heads.RatingModel(SMALL).apply))

    def test_a_patch_is_valid_from_half_its_frames_on(self):
        valid = heads.patch_validity(
            jnp.arange(SMALL.n_frames)[None, :] < jnp.array([[96], [40], [39]]), SMALL
        )
        assert np.asarray(valid).reshape(3, *SMALL.grid).sum(axis=2).tolist() == [
            [6, 6],
            [3, 3],
            [2, 2],
        ]

    @pytest.mark.parametrize("length", [1, 33, 44, 96])
    def test_padded_frames_change_nothing(self, length):
        x = spectrograms(8)
        valid = jnp.broadcast_to(jnp.arange(SMALL.n_frames)[None, :] < length, x.shape[:2])
        ratings, intermediates = self.apply({"params": rater_params()}, x, valid)
        for pad in (-5.0, 1e6, np.nan):
            other = jnp.where(valid[:, :, None], x, pad)
            again, other_intermediates = self.apply({"params": rater_params()}, other, valid)
            np.testing.assert_array_equal(again, ratings)
            np.testing.assert_array_equal(
                other_intermediates["embedding"], intermediates["embedding"]
            )
        assert ratings.shape == (2, len(KEYS)) and np.isfinite(ratings).all()

    def test_windows_pooled_by_moments_equal_pooling_at_once(self):
        rng = np.random.default_rng(0)
        tokens, valid = (
            jnp.float32(1 + rng.normal(size=(1, 40, 8))),
            jnp.array(rng.random((1, 40)) < 0.7),
        )
        at_once = heads.moments_to_embedding(*heads.pool_moments(tokens, valid))
        windows = heads.pool_moments(tokens.reshape(4, 10, 8), valid.reshape(4, 10))
        combined = heads.combine_moments(windows, jnp.array([1, 1, 1, 1]), 2)
        pooled = heads.moments_to_embedding(*combined)
        np.testing.assert_allclose(pooled[1], at_once[0], rtol=1e-5)
        kept = np.asarray(tokens)[np.asarray(valid)]
        np.testing.assert_allclose(
            at_once[0], np.concatenate([kept.mean(axis=0), kept.std(axis=0)]), rtol=1e-4
        )
        assert np.isfinite(pooled[0]).all()  # a clip without windows

    def test_one_window_rates_as_its_pooled_clip(self):
        x, valid = spectrograms(9), jnp.ones((2, SMALL.n_frames), bool).at[0, 50:].set(False)
        rater, params = heads.RatingModel(SMALL), {"params": rater_params()}

        @jax.jit
        def by_moments(params):
            moments = rater.apply(params, x, valid, method="embed")
            pooled = heads.moments_to_embedding(
                *heads.combine_moments(moments, jnp.array([0, 1]), 2)
            )
            return rater.apply(params, pooled, method="rate")

        np.testing.assert_allclose(
            by_moments(params), self.apply(params, x, valid)[0], rtol=1e-5, atol=1e-5
        )

    def test_gradient_is_finite_where_all_tokens_agree(self):
        valid = jnp.ones((1, 5), bool)
        slope = jax.grad(
            lambda tokens: heads.moments_to_embedding(*heads.pool_moments(tokens, valid)).sum()
        )
        assert np.isfinite(slope(jnp.ones((1, 5, 4)))).all()

    def test_ratings_come_in_label_order(self):
        head = heads.RatingHead()
        embedding = spectrograms(0, frames=3)[0]
        params = jax.jit(head.init)(jax.random.key(1), embedding)["params"]
        apply = jax.jit(head.apply)
        before = apply({"params": params}, embedding)
        assert np.abs(before - 0.5).max() < 0.5
        for group, indices in group_indices().items():
            out = params[f"{group}_out"]
            raised = params | {
                f"{group}_out": (
                    out | {"bias": 0.5 + np.arange(1, 1 + len(indices), dtype=np.float32)}
                )
            }
            change = apply({"params": raised}, embedding) - before
            expected = [1 + indices.index(i) if i in indices else 0 for i in range(len(KEYS))]
            np.testing.assert_allclose(change, np.tile(expected, (3, 1)), atol=1e-5)

    def test_encoder_of_pretraining_fits(self):
        assert jax.tree.map(jnp.shape, ssast_params()["encoder"]) == jax.tree.map(
            jnp.shape, rater_params()["encoder"]
        )

    def test_dropout_only_when_training(self):
        apply = jax.jit(heads.RatingHead(dropout=0.5).apply, static_argnames="deterministic")
        params, embedding = (
            {"params": rater_params()["head"]},
            spectrograms(0, mels=2 * SMALL.grid[0] * SMALL.width)[0],
        )
        np.testing.assert_array_equal(apply(params, embedding), apply(params, embedding))
        noisy = apply(params, embedding, deterministic=False, rngs={"dropout": jax.random.key(0)})
        assert not np.allclose(noisy, apply(params, embedding))

    def test_bfloat16_computes_near_float32_and_keeps_parameters(self):
        x, valid = spectrograms(2), jnp.ones((2, SMALL.n_frames), bool)
        half = heads.RatingModel(SMALL, compute=Compute(dtype=jnp.bfloat16))
        shapes = jax.eval_shape(half.init, jax.random.key(0), x, valid)["params"]
        assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
        ratings, intermediates = jax.jit(half.apply)({"params": rater_params()}, x, valid)
        assert ratings.dtype == jnp.float32 and intermediates["block0"].dtype == jnp.bfloat16
        np.testing.assert_allclose(
            ratings, self.apply({"params": rater_params()}, x, valid)[0], atol=0.1
        )
        model, index = (
            ssast.SSAST(SMALL, compute=Compute(dtype=jnp.bfloat16)),
            jnp.array([[0, 1], [2, 3]]),
        )
        slope = jax.grad(
            lambda params: ssast.losses(model.apply({"params": params}, x, index)[0])["loss"]
        )
        grads = jax.jit(slope)(ssast_params())
        assert all(
            leaf.dtype == jnp.float32 and np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads)
        )
