"""Integrated gradients, rollout and relevance against their definitions, on a model that is tiny or
known. About 15 s."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bench.batches import normalised
from tiny import CLIPS, FINETUNE, FRONT_END, MODEL, STATISTICS, compiled_once, embed

from percepiano_ast.audio.mel import window_starts
from percepiano_ast.errors import InputError
from percepiano_ast.models.heads import RatingModel
from percepiano_ast.studies import attribution
from percepiano_ast.studies.explain import model_functions
from percepiano_ast.training.finetune import Finetuning, Scaler

TWO_LAYERS = dataclasses.replace(MODEL, depth=2)
SHORT, WHOLE, LONG = CLIPS[1], CLIPS[0], CLIPS[2]  # 30, 64 and 150 frames for windows of 64


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(tmp_path_factory):
    with compiled_once(tmp_path_factory.getbasetemp() / "compiled"):
        yield


@pytest.fixture(scope="module")
def model() -> tuple[Finetuning, dict]:
    """A run and what its functions take as parameters."""
    run = Finetuning(TWO_LAYERS, FINETUNE, FRONT_END, STATISTICS, 6)
    params = run.init(0)
    return run, {"params": params, "scaler": Scaler.fit(embed(run, params, CLIPS))}


def heard(codes: np.ndarray) -> np.ndarray:
    return normalised(codes[None], FRONT_END, STATISTICS)[0]


def integrate(
    model, codes: np.ndarray, dimensions=(0, 7), steps: int = 64
) -> attribution.Attribution:
    run, params = model
    clip = heard(codes)
    baseline = np.broadcast_to(clip.mean(axis=0), clip.shape)
    where = {"starts": window_starts(len(clip), run.model.n_frames), "dimensions": dimensions}
    return attribution.integrated_gradients(
        model_functions(run), params, clip, baseline, steps=steps, **where
    )


@pytest.fixture(scope="module")
def attended(model) -> tuple:
    """Moments with and without attention maps, the weights of all layers and real patches of two
    windows."""
    run, params = model
    windows = jnp.stack(
        [jnp.asarray(heard(WHOLE)), jnp.pad(jnp.asarray(heard(SHORT)), ((0, 34), (0, 0)))]
    )
    valid = jnp.arange(64)[None, :] < jnp.array([64, 30])[:, None]
    plain = jax.jit(model_functions(run).embed)(params, windows, valid)
    return plain, *jax.jit(model_functions(run).attend)(params, windows, valid, None)


class TestIntegratedGradients:
    @pytest.mark.parametrize("codes", [SHORT, WHOLE, LONG], ids=["padded", "one window", "windows"])
    def test_the_map_adds_up_to_the_difference_of_the_ratings(self, model, codes):
        found = integrate(model, codes)
        assert (
            found.maps.shape == (2, *codes.shape)
            and np.abs(found.ratings - found.baseline).min() > 0.004
        )
        assert np.abs(found.gap).max() < 2e-3
        np.testing.assert_allclose(
            found.maps.sum((1, 2)) + found.gap, found.ratings - found.baseline, atol=1e-5
        )

    def test_more_steps_leave_a_smaller_gap(self, model):
        few, many = (np.abs(integrate(model, LONG, steps=steps).gap).max() for steps in (2, 64))
        assert many < few / 4

    def test_the_rating_is_the_one_that_the_run_gives(self, model):
        run, params = model
        expected = run.rate(
            params["params"], params["scaler"], embed(run, params["params"], [LONG])
        )[0]
        np.testing.assert_allclose(
            integrate(model, LONG, steps=1).ratings, expected[[0, 7]], atol=1e-5
        )
        clip, starts = heard(LONG), window_starts(len(LONG), MODEL.n_frames)
        variants = [clip if k % 2 else np.zeros_like(clip) for k in range(5)]
        rated = attribution.rate_variants(model_functions(run), params, variants, starts)
        np.testing.assert_allclose(rated[[1, 3]], np.stack([expected, expected]), atol=1e-5)
        assert (
            np.abs(rated[0] - rated[1]).max() > 1e-3 and np.abs(rated[::2] - rated[0]).max() < 1e-6
        )

    def test_one_step_is_the_gradient_half_way(self, model):
        """Through overlapping windows, against JAX's gradient of the whole clip's rating."""
        run, params = model
        clip, functions = jnp.asarray(heard(LONG)), model_functions(run)
        starts, n = window_starts(len(LONG), MODEL.n_frames), MODEL.n_frames

        def rating(clip):
            windows = jnp.stack([clip[start : start + n] for start in starts])
            sums = functions.embed(params, windows, jnp.ones(windows.shape[:2], bool))
            return functions.rate(params, jax.tree.map(lambda x: x.sum(axis=0)[None], sums))[0, 7]

        difference = clip - clip.mean(axis=0)[None, :]
        expected = jax.jit(jax.grad(rating))(clip - difference / 2) * difference
        np.testing.assert_allclose(
            integrate(model, LONG, [7], steps=1).maps[0], expected, atol=1e-6
        )

    def test_a_linear_model_is_explained_exactly(self):
        weights = np.random.default_rng(0).normal(size=128).astype(np.float32)

        def embed_sums(params, log_mel, valid):
            return jnp.where(valid[:, :, None], log_mel, 0.0).sum(axis=1)

        linear = attribution.ModelFunctions(
            embed_sums, lambda params, sums: sums @ params[:, None], 64
        )
        clip, baseline = heard(SHORT), np.zeros(SHORT.shape, np.float32)
        found = attribution.integrated_gradients(
            linear, weights, clip, baseline, starts=[0], dimensions=[0], steps=1
        )
        np.testing.assert_allclose(found.maps[0], clip * weights, atol=1e-5)

    def test_what_does_not_fit_is_refused(self, model):
        run, params = model
        clip, where = heard(SHORT), {"starts": [0], "dimensions": [0]}
        with pytest.raises(InputError, match="give equal shapes, and at least one step"):
            attribution.integrated_gradients(model_functions(run), params, clip, clip[1:], **where)
        with pytest.raises(InputError, match="0 steps"):
            attribution.integrated_gradients(
                model_functions(run), params, clip, clip, steps=0, **where
            )


class TestAttention:
    def test_asking_for_maps_changes_no_output(self, attended):
        plain, asked, *_ = attended
        for one, other in zip(plain, asked, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)

    def test_parameters_are_the_same_with_and_without(self, model):
        run, params = model
        args = jnp.zeros((1, 64, 128)), jnp.ones((1, 64), bool)
        init = functools.partial(run.module.init, jax.random.key(0))
        assert set(jax.eval_shape(init, *args)) == {"params"}
        asked = jax.eval_shape(functools.partial(init, method=RatingModel.attend), *args)
        assert jax.tree.structure(asked["params"]["encoder"]) == jax.tree.structure(
            params["params"]["encoder"]
        )

    def test_rows_of_rollout_sum_to_one_and_pads_hold_nothing(self, attended):
        *_, weights, patch_valid = attended
        rows = np.asarray(attribution.rollout(weights))
        np.testing.assert_allclose(rows.sum(axis=-1), 1, atol=1e-5)
        real = np.pad(np.asarray(patch_valid[1]), (2, 0), constant_values=True)
        assert rows[1][real][:, ~real].max() == 0 < rows[1][real][:, real].min()

    def test_rollout_and_relevance_follow_their_equations(self):
        rng = np.random.default_rng(1)
        weights = rng.dirichlet(np.ones(5), size=(2, 1, 3, 5)).astype(np.float32)
        gradients = rng.normal(size=weights.shape).astype(np.float32)
        mixed = [0.5 * weights[layer, 0].mean(axis=0) + 0.5 * np.eye(5) for layer in range(2)]
        np.testing.assert_allclose(attribution.rollout(weights)[0], mixed[1] @ mixed[0], atol=1e-6)
        expected = np.eye(5)
        for layer in range(2):
            expected = (
                expected
                + np.maximum(weights[layer, 0] * gradients[layer, 0], 0).mean(axis=0) @ expected
            )
        np.testing.assert_allclose(
            attribution.relevance(weights, gradients)[0], expected - np.eye(5), atol=1e-5
        )

    def test_the_gradient_by_attention_is_that_of_the_output(self, model):
        """A shift of one weight, against what a small change of it does."""
        run, params = model
        window, valid = jnp.asarray(heard(WHOLE))[None], jnp.ones((1, 64), bool)
        shape = model_functions(run).attend(params, window, valid, None)[1].shape

        weights = jax.random.normal(jax.random.key(2), (1, run.model.grid[0] * run.model.width))

        @jax.jit
        def total(shift):
            return (weights * model_functions(run).attend(params, window, valid, shift)[0][1]).sum()

        gradient = jax.grad(total)(jnp.zeros(shape))
        place = np.unravel_index(int(jnp.abs(gradient).argmax()), shape)
        step = jnp.zeros(shape).at[place].set(0.05)
        np.testing.assert_allclose((total(step) - total(-step)) / 0.1, gradient[place], rtol=0.02)

    def test_maps_cover_the_clip(self, model):
        run, params = model
        for codes in (SHORT, LONG):
            where = {"starts": window_starts(len(codes), 64), "dimensions": [0, 7]}
            common = (model_functions(run), params, heard(codes))
            rollout, relevance = attribution.attention_maps(
                *common, towards=np.array([1.0, -1.0]), **where
            )
            assert rollout.shape == codes.shape and relevance.shape == (2, *codes.shape)
            assert (
                0.8 < rollout.sum() < 1 and rollout.min() >= 0 <= relevance.min() < relevance.max()
            )
        other = attribution.attention_maps(*common, towards=np.array([1.0, 1.0]), **where)[1]
        np.testing.assert_allclose(other[0], relevance[0], atol=1e-7)
        assert np.abs(other[1] - relevance[1]).max() > 0.01 * relevance[1].max()

    def test_a_model_without_attention_says_so(self):
        blind = attribution.ModelFunctions(lambda *_: None, lambda *_: None, 64)
        with pytest.raises(InputError, match="no attention weights; use integrated gradients"):
            attribution.attention_maps(
                blind, {}, heard(SHORT), starts=[0], dimensions=[0], towards=np.ones(1)
            )

    def test_a_patch_is_spread_over_its_points(self):
        # second band of four columns each, second column
        values = jnp.zeros((1, MODEL.num_patches)).at[0, 5].set(1.0)
        spread = np.asarray(attribution.spread_patches(values, MODEL))[0]
        assert spread.sum() == pytest.approx(1) and spread[16:32, 16:32].sum() == pytest.approx(1)


class TestRandomised:
    def test_from_the_top_down(self, model):
        run, trained = model
        params, fresh = trained["params"], run.init(9)
        stages = dict(attribution.randomised(params, fresh))
        assert list(stages) == ["head", "1 of 2 blocks", "2 of 2 blocks", "everything"]
        assert (
            stages["head"]["encoder"] is params["encoder"]
            and stages["head"]["head"] is fresh["head"]
        )
        half = stages["1 of 2 blocks"]["encoder"]["blocks"]["mlp"]["in"]["kernel"]
        assert (half[0] == params["encoder"]["blocks"]["mlp"]["in"]["kernel"][0]).all()
        assert (half[1] == fresh["encoder"]["blocks"]["mlp"]["in"]["kernel"][1]).all()
        assert stages["2 of 2 blocks"]["encoder"]["patch_embed"] is params["encoder"]["patch_embed"]
        assert stages["everything"] is fresh

    def test_random_weights_change_the_map(self, model):
        run, trained = model
        other = run, trained | {"params": run.init(9)}
        maps = [integrate(one, LONG, steps=8).maps[0].ravel() for one in (model, other)]
        assert abs(np.corrcoef(maps)[0, 1]) < 0.5
