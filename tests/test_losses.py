"""Losses and their weights against their definitions; the heads' switches; standard deviations that
fit. About 15 s."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import FINETUNE, RATINGS, TRAIN, compiled_once

from percepiano_ast.dimensions import HEAD_GROUPS, KEYS, group_indices
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation import predictions
from percepiano_ast.models import heads
from percepiano_ast.training import finetune as finetuning
from percepiano_ast.training.finetune import RatingTargets


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(tmp_path_factory):
    with compiled_once(tmp_path_factory.getbasetemp() / "compiled"):
        yield


RNG = np.random.default_rng(0)
RATED, TRUE = RNG.uniform(0, 1, (2, 6, 19)).astype(np.float32)
ONES = np.ones(3, np.float32)


def config(**changes):
    return dataclasses.replace(FINETUNE, **changes)


class TestLosses:
    def test_equal_is_the_mean_over_all_ratings(self):
        groups = finetuning.group_losses(
            finetuning.rating_errors(RATED, None, TRUE), np.ones(6, np.float32)
        )
        np.testing.assert_allclose(
            finetuning.total_loss(groups, ONES, None), np.square(RATED - TRUE).mean(), rtol=1e-6
        )
        for loss, indices in zip(groups, group_indices().values()):
            np.testing.assert_allclose(
                loss, np.square(RATED - TRUE)[:, list(indices)].mean(), rtol=1e-6
            )

    def test_a_clip_counts_by_its_weight(self):
        weights = np.array([3, 0, 0, 0, 3, 0], np.float32)
        groups = finetuning.group_losses(finetuning.rating_errors(RATED, None, TRUE), weights)
        expected = np.square(RATED - TRUE)[[0, 4]].mean()
        np.testing.assert_allclose(finetuning.total_loss(groups, ONES, None), expected, rtol=1e-5)

    def test_a_learned_variance_settles_at_the_loss(self):
        """Kendall's optimum: the variance of a task is its mean squared error."""
        found = jnp.array([0.04, 0.5, 2.0])
        slope = jax.grad(lambda s: finetuning.total_loss(found, ONES, s))
        np.testing.assert_allclose(slope(jnp.log(found)), 0, atol=1e-7)
        assert np.all(slope(jnp.log(found) + 0.1) > 0) and np.all(slope(jnp.log(found) - 0.1) < 0)

    def test_the_likelihood_is_that_of_a_normal_distribution(self):
        log_variance = RNG.normal(-3, 1, RATED.shape).astype(np.float32)
        deviation = np.exp(0.5 * log_variance)
        density = np.exp(-0.5 * ((TRUE - RATED) / deviation) ** 2) / (
            deviation * np.sqrt(2 * np.pi)
        )
        constant = 0.5 * np.log(2 * np.pi)
        np.testing.assert_allclose(
            finetuning.rating_errors(RATED, log_variance, TRUE) + constant,
            -np.log(density),
            rtol=1e-3,
            atol=1e-3,
        )

    def test_the_group_that_falls_slowest_counts_most(self):
        history = [
            dict(zip(finetuning.loss_columns(), row))
            for row in ([9.0, 9, 9], [1.0, 1, 1], [0.9, 0.5, 0.5])
        ]
        dwa = config(weighting="dwa", dwa_temperature=2.0)
        for known in (0, 1):
            np.testing.assert_array_equal(finetuning.dynamic_weights(dwa, history[:known]), 1)
        weights = finetuning.dynamic_weights(dwa, history)
        powers = np.exp(np.array([0.9, 0.5, 0.5]) / 2)
        np.testing.assert_allclose(weights, 3 * powers / powers.sum(), rtol=1e-6)
        np.testing.assert_array_equal(finetuning.dynamic_weights(config(), history), 1)


class TestTargets:
    def test_each_dimension_is_standardised_by_the_training_clips(self):
        found = RatingTargets.fit(config(rating_scale="dimension"), RATINGS, None, TRAIN)
        np.testing.assert_allclose(found.ratings[TRAIN].mean(axis=0), 0, atol=1e-6)
        np.testing.assert_allclose(found.ratings[TRAIN].std(axis=0), 1, rtol=1e-5)
        assert abs(found.ratings.mean()) > 1e-4  # the held-out clips have no say

    def test_a_group_has_one_scale(self):
        found = RatingTargets.fit(config(rating_scale="group"), RATINGS, None, TRAIN)
        for indices in map(list, group_indices().values()):
            assert len(np.unique(found.std[indices])) == len(np.unique(found.mean[indices])) == 1
            np.testing.assert_allclose(found.ratings[TRAIN][:, indices].std(), 1, rtol=1e-5)

    def test_weights_follow_the_number_of_raters(self):
        raters = np.arange(1, 13)
        found = RatingTargets.fit(config(weigh_by_raters=True), RATINGS, raters, TRAIN).weights
        np.testing.assert_allclose(found / found[0], raters, rtol=1e-6)
        np.testing.assert_allclose(found[TRAIN].mean(), 1, rtol=1e-6)
        np.testing.assert_array_equal(
            RatingTargets.fit(config(), RATINGS, raters, TRAIN).weights, 1
        )

    @pytest.mark.parametrize("raters", [None, np.zeros(12)])
    def test_weights_without_raters_are_refused(self, raters):
        with pytest.raises(
            InputError, match="weigh_by_raters needs the number of raters of every clip"
        ):
            RatingTargets.fit(config(weigh_by_raters=True), RATINGS, raters, TRAIN)


class TestHeads:
    # mean and deviation of 4 bands, width 6
    EMBEDDING = RNG.normal(size=(5, 2 * 4 * 6)).astype(np.float32)

    def head(self, **options) -> tuple[heads.RatingHead, dict]:
        head = heads.RatingHead(hidden=8, bands=4, **options)
        return head, jax.jit(head.init)(jax.random.key(0), self.EMBEDDING)["params"]

    @pytest.mark.parametrize("kind", ["joint", "grouped", "attention"])
    def test_a_scale_goes_into_the_output_layer(self, kind):
        head, params = self.head(kind=kind, uncertain=True)
        mean, std = (
            RNG.uniform(0.3, 0.7, 19).astype(np.float32),
            RNG.uniform(0.1, 0.2, 19).astype(np.float32),
        )
        apply = jax.jit(
            lambda params: head.apply({"params": params}, self.EMBEDDING, method="distribution")
        )
        before, after = apply(params), apply(heads.in_rating_units(params, kind, mean, std))
        before, after = ([np.asarray(part) for part in found] for found in (before, after))
        np.testing.assert_allclose(after[0], mean + std * before[0], atol=1e-5)
        np.testing.assert_allclose(np.exp(0.5 * after[1]), std * np.exp(0.5 * before[1]), rtol=1e-4)
        zero = apply(heads.standardised(params, kind))
        assert np.abs(zero[0]).max() < 0.5 and np.abs(zero[1]).max() < 0.5

    def test_mean_pooling_does_not_see_deviations(self):
        head, params = self.head(pooling="mean", kind="attention")
        other = self.EMBEDDING.copy()
        other[:, 24:] += 1
        np.testing.assert_array_equal(
            *(head.apply({"params": params}, x) for x in (self.EMBEDDING, other))
        )

    def test_groups_hear_one_another(self):
        """What moves the tokens of one group alone moves the ratings of another by attention, and
        else not."""
        head, params = self.head(kind="attention")
        queries = params["attention"]["queries"]
        moved = params | {"attention": params["attention"] | {"queries": queries.at[0, 0].add(2.0)}}
        change = np.abs(
            head.apply({"params": moved}, self.EMBEDDING)
            - head.apply({"params": params}, self.EMBEDDING)
        )
        assert list(HEAD_GROUPS)[0] == "timing" and all(
            change[:, i].max() > 1e-5 for i in range(len(KEYS))
        )

    def test_a_width_that_heads_do_not_divide_is_refused(self):
        with pytest.raises(InputError, match="a hidden width of 6 is not divisible by 4 heads"):
            heads.RatingHead(hidden=6, bands=4, kind="attention").init(
                jax.random.key(0), self.EMBEDDING
            )


class TestCalibration:
    def test_each_fold_is_calibrated_by_the_others(self):
        fold = np.repeat([0, 1, 2, -1], 400)
        true = np.array([0.1, 0.2, 0.2, 9.0])[fold][:, None]
        errors = RNG.normal(size=(1600, 19)) * true
        found = finetuning.calibrated(np.full((1600, 19), 0.05), errors, fold)
        np.testing.assert_allclose(found[fold == 0], 0.2, rtol=0.05)
        np.testing.assert_allclose(found[fold == 1], np.sqrt((0.01 + 0.04) / 2), rtol=0.05)
        assert np.isnan(found[fold < 0]).all()

    def test_the_temperature_makes_errors_standard(self):
        deviations = RNG.uniform(0.05, 0.2, (4000, 1))
        errors = RNG.normal(size=(4000, 1)) * deviations * 1.7
        assert finetuning.temperature(errors, deviations) == pytest.approx(1.7, rel=0.05)

    def test_it_stands_in_the_predictions_table_beside_the_prediction(self):
        clips = np.array(["a", "a", "b"])  # two renderings of one clip
        run = ("ast-test-scratch", "content", 0)
        uncertainty = np.repeat([[0.1], [0.3], [0.5]], 19, axis=1)
        found = predictions.to_table(run, {"a": 0, "b": 1}, clips, TRUE[:3], RATED[:3], uncertainty)
        assert found.columns[-1] == "uncertainty" and len(found) == 2 * 19
        np.testing.assert_allclose(found.groupby("clip")["uncertainty"].mean(), [0.2, 0.5])
        assert (
            "uncertainty"
            not in predictions.to_table(run, {"a": 0, "b": 1}, clips, TRUE[:3], RATED[:3]).columns
        )
