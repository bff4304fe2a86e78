"""Numbers against scipy, scikit-learn, and the same thing written plainly; scopes, contrasts,
calibration. Cost: 6 s."""

import numpy as np
import pandas as pd
import pytest
from predictions import make_index, make_predictions, pair, scored, value
from scipy import integrate, stats
from sklearn.metrics import mean_absolute_error, r2_score

from percepiano_ast.dimensions import KEYS, group_indices
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation import analysis, metrics
from percepiano_ast.evaluation.predictions import runs


@pytest.fixture(scope="module")
def index():
    return make_index()


@pytest.fixture(scope="module")
def predictions(index):
    return make_predictions(index, {"ast-micro-ssast": 0.05, "mlp": 0.1})


@pytest.fixture(scope="module")
def values(index, predictions):
    return scored(predictions, index)


def expected_metrics(x, y):
    """The five metrics by scipy, scikit-learn and Lin's formula."""
    ccc = 2 * np.cov(x, y, ddof=0)[0, 1] / (x.var() + y.var() + (x.mean() - y.mean()) ** 2)
    return {
        "pearson": stats.pearsonr(x, y).statistic,
        "spearman": stats.spearmanr(x, y).statistic,
        "r2": r2_score(x, y),
        "mae": mean_absolute_error(x, y),
        "ccc": ccc,
    }


@pytest.mark.parametrize(
    "n, scale, shift", [(5, 1, 0), (300, 1, 0.3), (1202, 0.1, 40), (50, 1e4, -3)]
)
def test_point_metrics_equal_scipy_and_sklearn(n, scale, shift):
    rng = np.random.default_rng(n)
    x = rng.normal(size=(n, 7))
    y = shift + scale * (0.5 * x + rng.normal(size=x.shape))
    x[:, 0], y[:, 0] = np.round(x[:, 0]), np.round(y[:, 0] / scale)  # ties
    found = metrics.evaluate(x, y)
    for column in range(x.shape[1]):
        for name, number in expected_metrics(x[:, column], y[:, column]).items():
            assert found[name][column] == pytest.approx(number, abs=1e-9, rel=1e-9), name
            assert getattr(metrics, name)(x, y)[column] == found[name][column]


@pytest.mark.parametrize(
    "x, y, message",
    [
        (np.zeros((3, 2)), np.zeros((3, 1)), "prediction \\(3, 1\\)"),
        (np.zeros(3), np.zeros(3), "rating has shape \\(3,\\)"),
        (np.zeros((1, 2)), np.zeros((1, 2)), "at least two clips"),
        (
            np.zeros((3, 2)),
            np.array([[0, 1], [np.nan, 1], [1, 1]]),
            "prediction, row 1, column 0 is nan",
        ),
    ],
)
def test_bad_arrays_are_refused(x, y, message):
    with pytest.raises(InputError, match=message):
        metrics.evaluate(x, y)


def test_tables_hold_the_point_metrics_and_their_means(predictions, values):
    for dimension in KEYS[::6]:
        for metric, number in expected_metrics(*pair(predictions, dimension)).items():
            assert value(values, metric, dimension=dimension) == pytest.approx(number, abs=1e-9), (
                metric
            )
    each = np.array([value(values, "pearson", dimension=key) for key in KEYS])
    assert value(values, "pearson", dimension="mean") == pytest.approx(each.mean(), abs=1e-12)
    for group, which in group_indices().items():
        assert value(values, "pearson", dimension=group) == pytest.approx(
            each[list(which)].mean(), abs=1e-12
        )


def test_leaving_a_group_out_of_the_sums_equals_leaving_its_clips_out(index, predictions):
    run = runs(predictions, index)[1]
    found = metrics.without_each_group(run, "overall", ("pearson", "r2", "mae", "ccc"))
    for row, group in enumerate(np.unique(run.content_group), start=1):
        kept = run.content_group != group
        expected = expected_metrics(run.rating[kept, 3], run.prediction[kept, 3])
        for metric, numbers in found.items():
            assert numbers[row, 3] == pytest.approx(expected[metric], abs=1e-9)


def test_folds_are_the_metrics_of_their_own_clips(index, predictions):
    folds = metrics.fold_table(runs(predictions, index))
    part = predictions[predictions["fold"] == 2]
    row = value(folds[folds["fold"] == 2], "ccc", column="value")
    assert row == pytest.approx(expected_metrics(*pair(part))["ccc"], abs=1e-9)
    assert value(folds[folds["fold"] == 2], "ccc", "humans_only", column="clips") == 30


def test_correlations_ignore_an_affine_change_of_the_prediction(index, predictions, values):
    after = scored(predictions.assign(prediction=7 * predictions["prediction"] - 40), index)
    same, columns = values["metric"].isin(["pearson", "spearman"]), ["value", "low", "high"]
    np.testing.assert_allclose(values.loc[same, columns], after.loc[same, columns], atol=1e-9)
    assert value(after, "mae") > 30


def test_within_segment_sees_nothing_of_the_segment(index, predictions, values):
    shift = dict(
        zip(
            index["segment"].unique(),
            np.random.default_rng(1).normal(size=index["segment"].nunique()),
        )
    )
    segment = predictions["clip"].map(index.set_index("clip")["segment"])
    moved = scored(
        predictions.assign(prediction=predictions["prediction"] + segment.map(shift)), index
    )
    within = values["scope"].str.startswith("within")
    np.testing.assert_allclose(values.loc[within, "value"], moved.loc[within, "value"], atol=1e-9)
    assert value(moved, "pearson") < value(values, "pearson") - 0.2
    codes = index["segment"].to_numpy()
    x, y = (v - pd.Series(v).groupby(codes).transform("mean").to_numpy() for v in pair(predictions))
    assert value(values, "pearson", "within_segment") == pytest.approx(
        stats.pearsonr(x, y).statistic, abs=1e-10
    )
    assert value(values, "mae", "within_segment") == pytest.approx(
        mean_absolute_error(x, y), abs=1e-10
    )


def test_segment_means_score_nothing_within_segment(index, predictions):
    segment = predictions["clip"].map(index.set_index("clip")["segment"])
    mean = predictions.groupby(["model", segment, "dimension"])["rating"].transform("mean")
    # float32 sums in another order
    rounding = np.random.default_rng(0).uniform(-1e-8, 1e-8, len(mean))
    found = scored(predictions.assign(prediction=mean + rounding), index)
    assert value(found, "pearson") > 0.6
    assert np.isnan(value(found, "pearson", "within_segment")) and np.isnan(
        value(found, "spearman", "within_segment")
    )
    assert any(
        "pearson (within_segment) is undefined for all dimensions" in line
        for line in metrics.undefined_metrics(found)
    )


@pytest.mark.parametrize("left", [1, 2])
def test_a_segment_of_fewer_than_three_clips_is_left_out_within_segment(index, predictions, left):
    gone = [f"g00s0p{player}" for player in range(left, 6)]
    some = predictions[~predictions["clip"].isin(gone)]
    none = predictions[~predictions["clip"].str.startswith("g00s0")]
    found, expected = scored(some, index), scored(none, index)
    for metric in metrics.METRICS:
        assert value(found, metric, "within_segment") == pytest.approx(
            value(expected, metric, "within_segment"), abs=1e-12
        )
    assert value(found, "mae") != value(expected, "mae")


def test_humans_only_drops_deadpan(index, predictions, values):
    x, y = pair(predictions)
    human = index["human"].to_numpy()
    expected = stats.pearsonr(x[human], y[human]).statistic
    assert value(values, "pearson", "humans_only") == pytest.approx(expected, abs=1e-10)
    none = scored(predictions, index.assign(human=False))
    assert none[none["scope"].str.contains("humans")]["value"].isna().all()


def test_constant_prediction_is_undefined_not_zero(index, predictions):
    flat = (predictions["model"] == "mlp") & (predictions["dimension"] == KEYS[3])
    found = scored(predictions.assign(prediction=predictions["prediction"].mask(flat, 0.1)), index)
    for column in ("value", "low", "high"):
        assert np.isnan(value(found, "pearson", dimension=KEYS[3], column=column))
    assert np.isnan(value(found, "pearson", dimension="mean")) and np.isnan(
        value(found, "pearson", dimension="sound")
    )
    assert np.isfinite(value(found, "pearson", dimension="timing"))
    assert value(found, "ccc", dimension=KEYS[3]) == 0 and value(found, "r2", dimension=KEYS[3]) < 0
    assert any(
        line.startswith(f"mlp, content, seed 0: pearson (overall) is undefined for {KEYS[3]}:")
        for line in metrics.undefined_metrics(found)
    )


def test_one_content_group_has_no_interval(index, predictions):
    one = index.assign(content_group="one", fold_random=index["fold_content"])
    # a single group cannot be held out under "content"
    found = scored(predictions.assign(protocol="random"), one)
    assert (
        np.isfinite(value(found, "pearson"))
        and found["low"].isna().all()
        and found["high"].isna().all()
    )


# ---------------------------------------------------------------- contrasts


def test_deadpan_and_humans_apart(index, predictions):
    found = analysis.deadpan_gap(runs(predictions, index)).query("model == 'mlp'")
    found = found.set_index(["part", "metric", "dimension"])
    x, y = pair(predictions)
    human = index["human"].to_numpy()
    for part, rows in (("humans", human), ("deadpan", ~human)):
        for metric, number in expected_metrics(x[rows], y[rows]).items():
            assert found.loc[(part, metric, KEYS[0]), "value"] == pytest.approx(number, abs=1e-9)
    for name, one in (("rating", x), ("prediction", y)):
        means = pd.Series(one).groupby([index["segment"], index["human"]]).mean().unstack()
        expected = (means[True] - means[False]).mean()
        row = found.loc[("gap", name, KEYS[0])]
        assert (
            row["value"] == pytest.approx(expected, abs=1e-12)
            and row["low"] < expected < row["high"]
        )
    none = analysis.deadpan_gap(runs(predictions, index.assign(human=True)))
    assert none[none["part"] != "humans"]["value"].isna().all()


def test_pairwise_accuracy_counts_pairs_of_one_segment(index, predictions):
    rounded = predictions.assign(
        rating=predictions["rating"].round(2), prediction=predictions["prediction"].round(1)
    )
    found = analysis.pairwise_accuracy(runs(rounded, index), 0.05).query("model == 'mlp'")
    found = found.set_index(["scope", "min_difference", "dimension"])
    x, y = pair(rounded)
    for scope, part in (
        ("within_segment", index),
        ("within_segment_humans", index[index["human"]]),
    ):
        for least in (0.0, 0.05):
            right, pairs = 0.0, 0
            for rows in part.groupby("segment").indices.values():
                rows = part.index.to_numpy()[rows]
                for i, one in enumerate(rows):
                    for other in rows[i + 1 :]:
                        difference = round(x[one] - x[other], 9)
                        if difference == 0 or abs(difference) < least:
                            continue
                        pairs += 1
                        right += (
                            0.5
                            if y[one] == y[other]
                            else float((y[one] > y[other]) == (difference > 0))
                        )
            row = found.loc[(scope, least, KEYS[0])]
            assert row["pairs"] == pairs and row["value"] == pytest.approx(right / pairs, abs=1e-12)
    with pytest.raises(InputError, match="minimum difference is -1"):
        analysis.pairwise_accuracy([], -1)


def test_share_of_the_ceiling_leaves_out_what_has_none(index, predictions, values):
    ceiling = pd.DataFrame({"overall": np.linspace(0.5, 0.9, 19)}, index=list(KEYS))
    ceiling.iloc[7] = 0.0
    found = (
        analysis.ceiling_share(runs(predictions, index), ceiling)
        .query("model == 'mlp'")
        .set_index("dimension")
    )
    assert found.loc[KEYS[0], "value"] == pytest.approx(value(values, "pearson") / 0.5, abs=1e-12)
    assert np.isnan(found.loc[KEYS[7], "value"])
    kept = [key for key in KEYS if key != KEYS[7]]
    r = np.mean([value(values, "pearson", dimension=key) for key in kept])
    assert found.loc["mean", "value"] == pytest.approx(
        r / ceiling.loc[kept, "overall"].mean(), abs=1e-12
    )
    assert found.loc["mean", "low"] < found.loc["mean", "value"] < found.loc["mean", "high"]


# ---------------------------------------------------------------- calibration


def test_crps_is_the_integral_and_nll_scipys():

    def gap(x, rating, prediction, spread):
        return (stats.norm.cdf(x, prediction, spread) - (x >= rating)) ** 2

    for rating, prediction, spread in ((0.3, 0.5, 0.1), (0.9, 0.1, 0.3), (0.5, 0.5, 0.05)):
        expected = sum(
            integrate.quad(gap, *ends, args=(rating, prediction, spread))[0]
            for ends in ((-3, rating), (rating, 4))
        )
        arrays = [np.array([number]) for number in (rating, prediction, spread)]
        assert analysis.crps(*arrays)[0] == pytest.approx(expected, abs=1e-8)
        assert analysis.nll(*arrays)[0] == pytest.approx(
            -stats.norm.logpdf(rating, prediction, spread), abs=1e-12
        )
    certain = [np.array([number]) for number in (0.3, 0.5, 0.0)]
    assert analysis.crps(*certain)[0] == pytest.approx(0.2) and np.isnan(analysis.nll(*certain)[0])


def test_honest_uncertainty_covers_and_follows_the_error(index):
    index = make_index(40, 12)
    rows = make_predictions(index, {"mlp": 0.0})
    rng = np.random.default_rng(0)
    spread = rng.choice([0.02, 0.2], len(rows))
    rows = rows.assign(
        prediction=rows["rating"] + spread * rng.normal(size=len(rows)), uncertainty=spread
    )
    both = pd.concat([rows, rows.assign(model="silent", uncertainty=np.nan)])
    found = analysis.calibration(runs(both, index))
    assert set(found["model"]) == {"mlp"}
    means = found[found["dimension"] == "mean"].set_index("metric")
    for share in analysis.SHARES:
        assert means.loc[f"coverage_{100 * share:.0f}", "value"] == pytest.approx(share, abs=0.01)
    x, y = pair(rows)
    expected = stats.pearsonr(np.abs(x - y), spread[rows["dimension"] == KEYS[0]]).statistic
    first = found[found["dimension"] == KEYS[0]].set_index("metric")
    assert first.loc["error_correlation", "value"] == pytest.approx(expected, abs=1e-9)
    assert first.loc["error_correlation", "low"] < expected < first.loc["error_correlation", "high"]
    same = analysis.calibration(runs(rows.assign(uncertainty=0.1), index)).set_index("metric")
    assert same.loc["error_correlation", "value"].isna().all()
