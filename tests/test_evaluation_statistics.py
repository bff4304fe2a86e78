"""Do the intervals cover and do the tests keep their level: simulations with PercePiano's own group
sizes.

Cost: 4 s; the slow ones, which give the figures in the docstrings of ``intervals`` and
``significance``, 2 min.
"""

import itertools

import numpy as np
import pandas as pd
import pytest
from predictions import make_index, make_predictions, scored, value
from scipy import stats

from percepiano_ast.dimensions import KEYS
from percepiano_ast.evaluation import compare, intervals, metrics
from percepiano_ast.evaluation.predictions import load_index, runs


def group_sizes():
    """Clips in each of PercePiano's 47 content groups."""
    return load_index().groupby("content_group").size().to_numpy()


def noise(rng, sizes, within, columns):
    """Standard normal (clips, columns), correlated by ``within`` in each group."""
    shared = rng.normal(size=(len(sizes), columns)).repeat(sizes, axis=0)
    return np.sqrt(within) * shared + np.sqrt(1 - within) * rng.normal(size=shared.shape)


def simulate(rng, sizes, within, r, columns):
    """Ratings and the predictions of a calibrated model with that true correlation, (clips,
    columns) each."""
    rating = noise(rng, sizes, within, columns)
    return rating, r * r * rating + r * np.sqrt(1 - r * r) * noise(rng, sizes, within, columns)


def truth(r):
    """The true values of ``simulate``'s metrics."""
    unexplained = np.sqrt(1 - r * r)
    return {
        "pearson": r,
        "spearman": 6 / np.pi * np.arcsin(r / 2),
        "r2": r * r,
        "mae": np.sqrt(2 / np.pi) * unexplained,
        "ccc": 2 * r * r / (1 + r * r),
    }


def sums_of(sizes, x, y, kind):
    """Sums of features by group, (8, groups, columns)."""
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    return np.add.reduceat(metrics.terms(*metrics.prepared(x, y, kind)), starts, axis=1)


def jackknifed(sizes, x, y, metric):
    """Values of a metric of all groups, then without each, (1 + groups, columns)."""
    return metrics.from_sums(
        metric, intervals.leave_one_out(sums_of(sizes, x, y, metrics.kind_of(metric)))
    )


def bootstraps(sizes, x, y, metric, rng, n=1000):
    """95 % percentile and BCa intervals over groups, {method: (low, high)} (Efron & Tibshirani
    1993, ch. 13 and 14)."""
    sums, without = sums_of(sizes, x, y, metrics.kind_of(metric)), jackknifed(sizes, x, y, metric)
    weights = rng.multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), n).astype(float)
    drawn = np.sort(metrics.from_sums(metric, weights @ sums), axis=0)
    below = stats.norm.ppf(np.clip((drawn < without[0]).mean(axis=0), 1 / n, 1 - 1 / n))
    pull = without[1:].mean(axis=0) - without[1:]
    acceleration = (pull**3).sum(axis=0) / (6 * (pull**2).sum(axis=0) ** 1.5)
    ends = []
    for quantile in (0.025, 0.975):
        z = below + stats.norm.ppf(quantile)
        place = stats.norm.cdf(below + z / (1 - acceleration * z))
        ends.append(drawn[np.clip((place * n).astype(int), 0, n - 1), np.arange(drawn.shape[1])])
    return {"percentile": tuple(np.quantile(drawn, [0.025, 0.975], axis=0)), "BCa": tuple(ends)}


def covered(low, high, value):
    """Share of intervals that hold the value, in %."""
    return 100 * np.mean((low <= value) & (value <= high))


def coverage(within, r, columns, seed=0, metric_names=metrics.METRICS, n=1000):
    """{metric: {method: coverage in %}}."""
    rng, sizes = np.random.default_rng(seed), group_sizes()
    x, y = simulate(rng, sizes, within, r, columns)
    found = {}
    for metric in metric_names:
        estimate = intervals.jackknife(jackknifed(sizes, x, y, metric), intervals.SCALES[metric])
        ends = {"jackknife": (estimate.low, estimate.high)}
        if n:
            ends |= bootstraps(sizes, x, y, metric, rng, n)
        found[metric] = {method: covered(*pair, truth(r)[metric]) for method, pair in ends.items()}
    return found


def equal_models(rng, sizes, within, other=None, r=0.6):
    """Sums of standardised features of two models of one true r on the same ratings, each (8,
    groups, 19).

    ``within`` is the correlation in groups of the ratings and of model a's errors, ``other`` that
    of model b's.
    """
    rating, a = simulate(rng, sizes, within, r, len(KEYS))
    own = noise(rng, sizes, within if other is None else other, len(KEYS))
    b = r * r * rating + r * np.sqrt(1 - r * r) * own
    return [sums_of(sizes, rating, y, "standardised") for y in (a, b)]


def level(within, other=None, tables=200, n_permutations=1000, seed=0):
    """What equal models show, in %: p below .05 (dimensions, means), intervals of the difference
    that hold 0 (same)."""
    rng, sizes = np.random.default_rng(seed), group_sizes()
    rejected, held = [], []
    for number in range(tables):
        a, b = equal_models(rng, sizes, within, other)
        swaps, complete = compare.exchanges(len(sizes), n_permutations, number)
        rejected.append(compare.permutation_p(a, b, "pearson", swaps, complete) < 0.05)
        found = compare.difference(
            *(metrics.from_sums("pearson", intervals.leave_one_out(sums)) for sums in (a, b)),
            "pearson",
        )
        held.append((found["low"] < 0) & (found["high"] > 0))
    rejected, held = 100 * np.mean(rejected, axis=0), 100 * np.mean(held, axis=0)
    return rejected[:19].mean(), rejected[-1], held[:19].mean(), held[-1]


# ---------------------------------------------------------------- intervals


def test_jackknife_equals_the_t_interval_of_a_mean():
    """Groups of one clip and a mean: the jackknife is the textbook's standard error."""
    values = np.random.default_rng(0).normal(size=(40, 1))
    sums = intervals.leave_one_out(np.stack([values, np.ones_like(values)]))
    estimate = intervals.jackknife(sums[0] / sums[1])
    assert estimate.error[0] == pytest.approx(stats.sem(values[:, 0]), abs=1e-12)
    d = (values - values.mean()).ravel()
    freedom = 3 * (d**2).sum() ** 2 / (d**4).sum()
    low, high = stats.t.interval(0.95, freedom, values.mean(), stats.sem(values[:, 0]))
    assert (estimate.low[0], estimate.high[0]) == pytest.approx((low, high), abs=1e-9)


def test_scales_come_back_and_keep_intervals_in_range():
    for scale, values in (
        (intervals.FISHER, np.linspace(-0.99, 0.99, 9)),
        (intervals.LOG, np.geomspace(0.01, 5, 9)),
        (intervals.LOG_UNEXPLAINED, np.linspace(-2, 0.99, 9)),
        (intervals.ARCSINE, np.linspace(0, 1, 9)),
    ):
        np.testing.assert_allclose(scale.back(scale.to(values)), values, atol=1e-12)
    near = np.array([[0.999], *[[0.999 - 0.001 * n] for n in range(10)]])
    assert intervals.jackknife(near, intervals.FISHER).high[0] < 1
    assert intervals.jackknife(near, intervals.ARCSINE).high[0] <= 1


def test_an_undefined_value_without_one_group_leaves_no_interval():
    values = np.array([[0.5, 0.5], [0.4, 0.4], [0.6, np.nan], [0.5, 0.5]])
    estimate = intervals.jackknife(values, intervals.FISHER)
    assert np.isfinite(estimate.low[0]) and np.isnan(estimate.low[1]) and np.isnan(estimate.high[1])
    assert np.isnan(intervals.jackknife(values[:2]).low).all()


def test_bootstraps_of_the_simulation_are_scipys():
    """The methods that the jackknife is compared with are what scipy makes of the same groups."""
    sizes, rng = group_sizes(), np.random.default_rng(1)
    x, y = simulate(rng, sizes, 0.2, 0.6, 1)
    sums = sums_of(sizes, x, y, "standardised")[..., 0]

    def statistic(groups, axis=-1):
        return metrics.from_sums("pearson", sums[:, groups].sum(axis=-1))

    ours = bootstraps(sizes, x, y, "pearson", rng, 9999)
    for name, (low, high) in ours.items():
        method = "percentile" if name == "percentile" else "BCa"
        theirs = stats.bootstrap(
            (np.arange(len(sizes)),),
            statistic,
            vectorized=True,
            n_resamples=9999,
            method=method,
            random_state=2,
        ).confidence_interval
        assert (low[0], high[0]) == pytest.approx(tuple(theirs), abs=0.006), name


def test_intervals_cover_quickly():
    """A small run of the slow simulation below."""
    found = coverage(0.2, 0.6, 400, n=0)
    assert all(92 <= methods["jackknife"] <= 98 for methods in found.values()), found


@pytest.mark.slow
@pytest.mark.parametrize("within", [0.2, 0.5])
def test_intervals_cover_as_stated(within):
    """4,000 tables each for a true r of .3, .6, .8: the table in ``intervals``."""
    found = {r: coverage(within, r, 4000) for r in (0.3, 0.6, 0.8)}
    for metric in metrics.METRICS:
        for method in found[0.6][metric]:
            print(
                within, metric, method, [round(float(found[r][metric][method]), 1) for r in found]
            )
        for r in found:
            covers = found[r][metric]
            assert covers["jackknife"] >= max(covers["percentile"], covers["BCa"]), (metric, r)
            assert (91.5 if metric == "mae" else 93.7) <= covers["jackknife"] <= 96.3, (metric, r)


# ---------------------------------------------------------------- permutations


@pytest.mark.parametrize("metric", ["pearson", "r2", "ccc"])
def test_permutation_p_is_scipys(metric):
    """All 2^9 exchanges of nine groups, by scipy's own enumeration; correlations divided by their
    jackknife error."""
    sizes, rng = np.full(9, 5), np.random.default_rng(3)
    rating, a = simulate(rng, sizes, 0.2, 0.5, 19)
    b = a + 0.6 * noise(rng, sizes, 0.2, 19)
    kind = metrics.kind_of(metric)
    of_a, of_b = (sums_of(sizes, rating, y, kind) for y in (a, b))
    both = np.stack([of_a, of_b])[..., 4]  # (2, 8, groups) of one dimension

    def difference(first, second, axis=-1):
        """First and second say, for each group, whose sums they are."""
        groups = np.arange(9)
        one, other = (both[side.astype(int), :, groups].T[..., None] for side in (first, second))
        values = [metrics.from_sums(metric, intervals.leave_one_out(one)) for one in (one, other)]
        change = (values[0] - values[1])[:, 0]
        return (
            change[0] / intervals.spread((change)[:, None])[0][0] if kind != "values" else change[0]
        )

    expected = stats.permutation_test(
        (np.zeros(9), np.ones(9)),
        difference,
        permutation_type="samples",
        vectorized=False,
        n_resamples=np.inf,
    )
    swaps, complete = compare.exchanges(9, 2000, 0)
    assert complete and len(swaps) == 512
    found = compare.permutation_p(of_a, of_b, metric, swaps, complete)[4]
    assert found == pytest.approx(expected.pvalue, abs=1e-12)


def test_random_exchanges_come_near_all_of_them():
    sizes, rng = np.full(11, 6), np.random.default_rng(4)
    a, b = equal_models(rng, sizes, 0.2)
    every = compare.permutation_p(a, b, "pearson", *compare.exchanges(11, 2048, 0))
    some = compare.permutation_p(a, b, "pearson", *compare.exchanges(11, 2000, 0))
    assert compare.exchanges(11, 2048, 0)[1] and not compare.exchanges(11, 2000, 0)[1]
    np.testing.assert_allclose(every, some, atol=0.04)


def test_holm_is_the_step_down_rule():
    assert compare.holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx(
        [0.03, 0.06, 0.06, 0.02]
    )
    assert compare.holm(np.array([0.5, np.nan, 0.9])) == pytest.approx(
        [1.0, np.nan, 1.0], nan_ok=True
    )
    p = np.random.default_rng(0).random(19) ** 3
    ordered, expected = np.sort(p), []
    for rank, one in enumerate(ordered):
        expected.append(min(1.0, max([(19 - rank) * one, *expected])))
    np.testing.assert_allclose(np.sort(compare.holm(p)), np.sort(expected), atol=1e-12)
    statsmodels = pytest.importorskip("statsmodels.stats.multitest")
    np.testing.assert_allclose(
        compare.holm(p), statsmodels.multipletests(p, method="holm")[1], atol=1e-12
    )


@pytest.fixture(scope="module")
def index():
    return make_index(24)


@pytest.fixture(scope="module")
def predictions(index):
    return make_predictions(index, {"ast-micro-ssast": 0.05, "mlp": 0.1})


def test_comparison_is_paired_and_has_its_sizes(index, predictions):
    values = scored(predictions, index)
    compared = compare.paired_tests(runs(predictions, index), n_permutations=999)
    assert list(compared.columns) == compare.TEST_COLUMNS
    row = compared.set_index(["scope", "metric", "dimension"]).loc[("overall", "pearson", "mean")]
    better, worse = (
        value(values, "pearson", dimension="mean", model=m) for m in ("ast-micro-ssast", "mlp")
    )
    assert row["difference"] == pytest.approx(better - worse, abs=1e-12)
    assert row["cohens_q"] == pytest.approx(np.arctanh(better) - np.arctanh(worse), abs=1e-12)
    assert 0 < row["low"] < row["difference"] < row["high"] and row["p"] == row[
        "p_holm"
    ] == pytest.approx(1 / 1000)
    assert 0 < row["detectable"] < row["difference"] and row["effect"] > 1
    dimensions = compared[
        (compared["scope"] == "overall") & (compared["metric"] == "pearson")
    ].head(19)
    np.testing.assert_allclose(dimensions["p_holm"], compare.holm(dimensions["p"].to_numpy()))
    worse_mae = compared.set_index(["scope", "metric", "dimension"]).loc[("overall", "mae", "mean")]
    assert worse_mae["difference"] < 0 and np.isnan(worse_mae["cohens_q"])


def test_a_model_does_not_differ_from_itself(index, predictions):
    one = predictions[predictions["model"] == "mlp"]
    twins = pd.concat([one, one.assign(model="twin")])
    same = compare.paired_tests(runs(twins, index), n_permutations=99)
    assert (same[["difference", "low", "high"]] == 0).all(axis=None) and (
        same[["p", "p_holm"]] == 1
    ).all(axis=None)
    scaled = pd.concat([one, one.assign(model="scaled", prediction=3 * one["prediction"] - 1)])
    same = compare.paired_tests(
        runs(scaled, index), n_permutations=99, names=("pearson", "spearman")
    )
    assert same["difference"].abs().max() < 1e-9 and (same["p"] == 1).all()


def test_comparison_uses_common_clips(index, predictions):
    some = predictions[(predictions["model"] != "mlp") | (predictions["fold"] < 2)]
    common = predictions[predictions["fold"] < 2]
    compared = [
        compare.paired_tests(runs(rows, index), n_permutations=50) for rows in (some, common)
    ]
    pd.testing.assert_frame_equal(*compared)


def test_what_cannot_be_compared_has_no_p(index, predictions):
    flat = (predictions["model"] == "mlp") & (predictions["dimension"] == KEYS[3])
    rows = predictions.assign(prediction=predictions["prediction"].mask(flat, 0.1))
    compared = compare.paired_tests(runs(rows, index), n_permutations=50, names=("pearson",))
    compared = compared.set_index(["scope", "dimension"]).loc["overall"]
    for dimension in (KEYS[3], "sound", "mean"):
        assert compared.loc[dimension, ["difference", "low", "p", "p_holm"]].isna().all()
    assert compared.loc["timing", ["difference", "low", "p"]].notna().all()
    apart = predictions[(predictions["model"] == "mlp") == (predictions["fold"] < 2)]
    none = compare.paired_tests(runs(apart, index), n_permutations=50)
    assert len(none) and none[["difference", "p", "detectable"]].isna().all(axis=None)


def test_the_test_keeps_its_level_quickly():
    """A small run of the slow simulation below; 40 tables of 19 equal pairs."""
    dimensions, _, covers, _ = level(0.5, tables=40, n_permutations=100)
    assert 2 <= dimensions <= 8 and 92 <= covers <= 99


@pytest.mark.slow
@pytest.mark.parametrize(
    "within, other, least, most",
    [(0.0, None, 4, 6), (0.2, None, 4, 6), (0.5, None, 4, 6), (0.2, 0.5, 4, 9), (0.5, 0.0, 4, 9)],
)
def test_the_test_keeps_its_level_as_stated(within, other, least, most):
    """400 tables of 19 pairs each: the figures in ``significance``."""
    found = level(within, other, tables=400, n_permutations=400)
    print(within, other, np.round(found, 1))
    assert least <= found[0] <= most


def test_the_detectable_difference_is_found_in_four_of_five():
    """Model b is worse by what the first tables call detectable; the share of intervals that leave
    0 out."""
    sizes, rng = group_sizes(), np.random.default_rng(5)

    def differences(worse, tables):
        for _ in range(tables):
            rating, a = simulate(rng, sizes, 0.2, 0.6, 19)
            r = 0.6 - worse
            b = r * r * rating + r * np.sqrt(1 - r * r) * noise(rng, sizes, 0.2, 19)
            values = [
                metrics.from_sums(
                    "pearson", intervals.leave_one_out(sums_of(sizes, rating, y, "standardised"))
                )
                for y in (a, b)
            ]
            yield compare.difference(*values, "pearson")

    detectable = np.mean([one["detectable"][:19].mean() for one in differences(0.0, 10)])
    found = np.mean([(one["low"] > 0)[:19].mean() for one in differences(detectable, 20)])
    assert 0.68 < found < 0.9


# ---------------------------------------------------------------- seeds


def seeded(index, spread, seeds, model, rng=9):
    """Runs of one model whose seeds share their errors but for noise of their own."""
    base = make_predictions(index, {model: 0.08}, rng=rng)
    draw = np.random.default_rng(7)
    return [
        base.assign(seed=seed, prediction=base["prediction"] + draw.normal(0, spread, len(base)))
        for seed in range(seeds)
    ]


def test_seeds_are_reported_one_by_one_and_together(index):
    rows = pd.concat(seeded(index, 0.05, 3, "mlp"))
    values = scored(rows, index)
    assert set(values["seed"]) == {0, 1, 2} and compare.paired_tests(runs(rows, index)).empty
    found = compare.over_seeds(runs(rows, index)).set_index(["scope", "metric", "dimension"])
    row = found.loc[("overall", "pearson", KEYS[0])]
    each = [value(values[values["seed"] == seed], "pearson") for seed in range(3)]
    assert row["value"] == pytest.approx(np.mean(each), abs=1e-12) and row["seeds"] == 3
    assert row["seed_sd"] == pytest.approx(np.std(each, ddof=1), abs=1e-12)
    first = values[values["seed"] == 0]
    single = value(first, "pearson", column="high") - value(first, "pearson", column="low")
    wide = pd.concat(
        seeded(index, 0.0, 2, "mlp") + [one.assign(seed=2) for one in seeded(index, 0.3, 1, "mlp")]
    )
    found = compare.over_seeds(runs(wide, index)).set_index(["scope", "metric", "dimension"])
    found = found.loc[("overall", "pearson", KEYS[0])]
    assert found["high"] - found["low"] > 1.5 * single


def test_seeds_make_a_comparison_more_cautious(index):
    rows = pd.concat(seeded(index, 0.1, 2, "mlp") + seeded(index, 0.02, 2, "cnn"))
    found = compare.compare_over_seeds(runs(rows, index)).set_index(
        ["scope", "metric", "dimension"]
    )
    assert (found["seeds_a"] == 2).all() and found.loc[
        ("overall", "pearson", "mean"), "difference"
    ] > 0
    fixed = compare.paired_tests(runs(rows[rows["seed"] == 0], index), n_permutations=50)
    fixed = fixed.set_index(["scope", "metric", "dimension"])
    assert (found["high"] - found["low"]).median() > (fixed["high"] - fixed["low"]).median()
    one = rows[(rows["model"] == "mlp") | (rows["seed"] == 0)]
    assert compare.compare_over_seeds(runs(one, index)).empty and len(
        compare.over_seeds(runs(one, index))
    )


@pytest.mark.slow
def test_seed_comparisons_keep_their_level():
    """Equal models whose three seeds move their mean r by .02: p below .05 in about 5 % of tables,
    not more than 7."""
    big, rejected = make_index(30), []
    for table_of in range(60):
        draw, rows = np.random.default_rng(table_of), []
        base = make_predictions(big, {"none": 0.0}, rng=table_of)
        for model, seed in itertools.product(("a", "b"), range(3)):
            spread = 0.1 * np.exp(draw.normal(0, 0.1))
            rows.append(
                base.assign(
                    model=model,
                    seed=seed,
                    prediction=base["rating"] + draw.normal(0, spread, len(base)),
                )
            )
        found = compare.compare_over_seeds(runs(pd.concat(rows), big), names=("pearson",))
        rejected.append(
            (
                found["p"][(found["scope"] == "overall") & found["dimension"].isin(KEYS)] < 0.05
            ).mean()
        )
    print(100 * np.mean(rejected))
    assert np.mean(rejected) <= 0.07


def test_a_model_that_is_constant_within_segments_is_compared_where_it_varies():
    index = make_index()
    rows = make_predictions(index, {"mlp": 0.1, "identity": 0.1})
    human = rows["clip"].map(index.set_index("clip")["human"])
    fold = rows["fold"] / 1000
    # people and folds alone
    rows["prediction"] = rows["prediction"].where(rows["model"] == "mlp", 0.1 * human + fold)
    found = compare.paired_tests(runs(rows, index), n_permutations=200, names=("pearson",))
    found = found.set_index(["scope", "dimension"])
    assert found.loc[("overall", "mean"), "p"] < 0.05
    assert np.isnan(
        found.loc[("within_segment_humans", "mean"), ["difference", "p"]].to_numpy(float)
    ).all()
