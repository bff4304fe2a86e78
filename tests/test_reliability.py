"""Agreement of raters: textbook values, simulated raters whose agreement is known, PercePiano's
own. Cost: 6 s."""

import numpy as np
import pandas as pd
import pytest

from percepiano_ast.cli import main
from percepiano_ast.data.percepiano import read_labels
from percepiano_ast.dimensions import KEYS
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation import predictions, reliability

# Shrout & Fleiss (1979), table 2: six targets, four judges; the correlations are those of their
# table 4.
SHROUT_FLEISS = np.array(
    [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]], float
)
PUBLISHED = {"icc1": 0.17, "icc2": 0.29, "icc3": 0.71, "icc1k": 0.44, "icc2k": 0.62, "icc3k": 0.91}


def long(values):
    """Values (clips, raters) as ratings, clips and raters."""
    clips, raters = np.indices(values.shape)
    return values.ravel(), clips.ravel(), raters.ravel()


def shrout_fleiss(values):
    """The six correlations of complete data by the mean squares, as their paper has them."""
    n, k = values.shape
    rows, columns = values.mean(axis=1), values.mean(axis=0)
    of_rows, of_columns = k * rows.var(ddof=1), n * columns.var(ddof=1)
    within = ((values - rows[:, None]) ** 2).sum() / (n * (k - 1))
    rest = ((values - rows[:, None] - columns + values.mean()) ** 2).sum() / ((n - 1) * (k - 1))
    return {
        "icc1": (of_rows - within) / (of_rows + (k - 1) * within),
        "icc2": (of_rows - rest) / (of_rows + (k - 1) * rest + k * (of_columns - rest) / n),
        "icc3": (of_rows - rest) / (of_rows + (k - 1) * rest),
        "icc1k": (of_rows - within) / of_rows,
        "icc2k": (of_rows - rest) / (of_rows + (of_columns - rest) / n),
        "icc3k": (of_rows - rest) / of_rows,
    }


def simulated(rng, index, raters=12, playing=1.0):
    """Ratings of every clip by every rater: clip variance 1 + 1 (music, playing), noise 4."""
    segments = pd.factorize(index["segment"])[0]
    rows = []
    true = rng.normal(size=(segments.max() + 1, 19))[segments] + playing * rng.normal(
        size=(len(index), 19)
    )
    for rater in range(raters):
        values = 20 + true + 2 * rng.normal(size=true.shape)
        rows.append(
            pd.DataFrame(values, columns=list(KEYS)).assign(
                rater=rater, clip=index["clip"].to_numpy()
            )
        )
    return pd.concat(rows, ignore_index=True)


@pytest.fixture(scope="module")
def index():
    names = [(f"s{s}c{c}", f"s{s}", c > 0) for s in range(40) for c in range(10)]
    return pd.DataFrame(names, columns=["clip", "segment", "human"])


def test_icc_of_the_textbook():
    found = reliability.icc(*long(SHROUT_FLEISS))
    for name, number in PUBLISHED.items():
        assert round(found[name], 2) == number
    assert found["k"] == 4


@pytest.mark.parametrize("shape", [(6, 4), (200, 12), (3, 2)])
def test_icc_equals_the_formulas_on_complete_data(shape):
    rng = np.random.default_rng(0)
    values = rng.normal(size=shape) + rng.normal(size=(shape[0], 1)) + rng.normal(size=shape[1])
    found, expected = reliability.icc(*long(values)), shrout_fleiss(values)
    for name, number in expected.items():
        assert found[name] == pytest.approx(number, abs=1e-9), name


def test_icc_equals_pingouin_on_complete_data():
    pingouin = pytest.importorskip("pingouin")
    values, clips, raters = long(
        np.random.default_rng(1).normal(size=(30, 5)) + np.arange(30)[:, None] / 10
    )
    frame = pd.DataFrame({"values": values, "clips": clips, "raters": raters})
    table_of = pingouin.intraclass_corr(frame, targets="clips", raters="raters", ratings="values")
    found = reliability.icc(values, clips, raters)
    names = ["icc1", "icc2", "icc3", "icc1k", "icc2k", "icc3k"]
    np.testing.assert_allclose([found[name] for name in names], table_of["ICC"], atol=1e-9)


def test_icc_of_incomplete_data_finds_the_variances():
    """Clips of variance 1, raters of .5, noise of 2: every rater rates a third of the clips, some
    twice."""
    rng = np.random.default_rng(2)
    n, k = 3000, 40
    values = (
        rng.normal(size=(n, 1))
        + np.sqrt(0.5) * rng.normal(size=k)
        + np.sqrt(2) * rng.normal(size=(n, k))
    )
    values[rng.random(values.shape) < 2 / 3] = np.nan
    ratings, clips, raters = (np.concatenate([one, one[:9000]]) for one in long(values))
    # repeats have noise of their own as well
    ratings[len(values.ravel()) :] += np.sqrt(2) * rng.normal(size=9000)
    found = reliability.icc(*long(values))
    assert found["icc3"] == pytest.approx(1 / 3, abs=0.02) and found["icc2"] == pytest.approx(
        1 / 3.5, abs=0.05
    )
    assert np.isfinite(list(reliability.icc(ratings, clips, raters).values())).all()
    with pytest.raises(InputError, match="needs two of each"):
        reliability.icc(np.ones(3), np.arange(3), np.arange(3))


def test_split_half_finds_the_known_reliability(index):
    """Twelve raters, noise 4: of the mean 1/3. Overall 2 / (2 + 1/3); within segment 1 / (1 +
    1/3)."""
    rng = np.random.default_rng(3)
    found = reliability.split_half(simulated(rng, index), index, n_splits=20).mean()
    assert found["overall"] == pytest.approx(6 / 7, abs=0.02) and found[
        "humans_only"
    ] == pytest.approx(6 / 7, abs=0.02)
    assert found["within_segment"] == pytest.approx(0.75, abs=0.02)
    assert found["within_segment_humans"] == pytest.approx(0.75, abs=0.02)
    music_alone = reliability.split_half(simulated(rng, index, playing=0.0), index, n_splits=20)
    assert abs(music_alone["within_segment"].mean()) < 0.05
    assert (reliability.noise_ceiling(music_alone) >= 0).all(axis=None)


def test_split_half_is_repeatable_and_keeps_a_rater_on_one_side(index):
    rows = simulated(np.random.default_rng(4), index, raters=2)
    # repeats change nothing: each half is one rater
    twice = pd.concat([rows, rows, rows[rows["rater"] == 0]])
    one, other = (reliability.split_half(part, index, n_splits=3, seed=1) for part in (rows, twice))
    pd.testing.assert_frame_equal(one, other)
    x, y = (rows[rows["rater"] == rater][KEYS[0]].to_numpy() for rater in (0, 1))
    r = np.corrcoef(x, y)[0, 1]
    # which rater is first is dealt anew
    assert one.loc[KEYS[0], "overall"] == pytest.approx(2 * r / (1 + r), abs=0.01)


@pytest.fixture
def rater_csv(tmp_path):
    """Three raters, two clips; one value missing, one row blank, one row out of range."""
    questions = [f"Question_{number}" for number in range(20)]
    rows = [
        [1, " a.wav", *[3] * 20],
        [1, "b.wav", *[5] * 20],
        [2, "a.wav", *[4] * 20],
        [2, "b.wav", 0, *[2] * 19],
        [3, "a.wav", *[""] * 20],
        [3, "b.wav", *[8] * 20],
    ]
    path = tmp_path / "raters.csv"
    pd.DataFrame(rows, columns=["user", "filename", *questions]).to_csv(path, index=False)
    return path


def test_raters_are_cleaned_as_the_published_labels_were(rater_csv):
    found = reliability.read_raters(rater_csv)
    assert found[["rater", "clip"]].to_numpy().tolist() == [
        ["1", "a"],
        ["1", "b"],
        ["2", "a"],
        ["2", "b"],
    ]
    means = reliability.mean_ratings(found)
    assert means.loc["a"].tolist() == [0.5] * 19
    assert means.loc["b"].tolist() == [5 / 7, *[0.5] * 18]


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("user", "person", "lacks user, filename"),
        ("Question_0", "Q", "19 Question_ columns"),
        ("4,4", "4,x", "line 4: Question_"),
        ("3,3", "3,-3", "is '-3'"),
    ],
)
def test_bad_rater_tables_are_refused(rater_csv, old, new, message):
    text = rater_csv.read_text().replace(old, new, 1)
    if old == "Question_0":
        text = text.replace("Question_1,", "R,")
    rater_csv.write_text(text)
    with pytest.raises(InputError, match=message):
        reliability.read_raters(rater_csv)


def test_a_ceiling_is_read_checked_and_never_borrowed(tmp_path, index):
    assert list(reliability.load_ceiling(predictions.load_index()).columns) == list(
        predictions.SCOPES
    )
    assert reliability.load_ceiling(index) is None
    path = tmp_path / "ceiling.csv"
    own = pd.DataFrame({"dimension": KEYS, "overall": 0.9})
    own.to_csv(path, index=False)
    assert reliability.load_ceiling(index, path).shape == (19, 1)
    own.assign(overall=1.2).to_csv(path, index=False)
    with pytest.raises(InputError, match="not from 0 to 1"):
        reliability.load_ceiling(index, path)
    own.head(3).to_csv(path, index=False)
    with pytest.raises(InputError, match="a row of the 19"):
        reliability.load_ceiling(index, path)


@pytest.mark.real_data
def test_percepiano_raters_give_labels_and_shipped_ceiling(percepiano_dir, tmp_path, capsys):
    raters = reliability.read_raters(percepiano_dir)
    assert (
        len(raters) == 14_642
        and raters["clip"].nunique() == 1202
        and raters["rater"].nunique() == 63
    )
    labels = pd.DataFrame(
        {clip: values[:19] for clip, values in read_labels(percepiano_dir).items()},
        index=list(KEYS),
    ).T
    means = reliability.mean_ratings(raters)
    np.testing.assert_allclose(
        means.to_numpy(), labels.loc[means.index].to_numpy(float), atol=1e-12
    )
    assert main(["reliability", str(percepiano_dir), "--out", str(tmp_path)]) == 0
    found = pd.read_csv(tmp_path / "ceiling.csv", index_col="dimension")
    shipped = reliability.load_ceiling(predictions.load_index())
    np.testing.assert_allclose(found, shipped, atol=1.5e-4)
    # The published analysis: mean .86, within segment and humans only .59.
    assert shipped["overall"].mean() == pytest.approx(0.862, abs=0.01)
    assert shipped["within_segment_humans"].mean() == pytest.approx(0.585, abs=0.01)
    icc = pd.read_csv(tmp_path / "icc.csv", index_col="dimension")
    assert icc["icc1"].mean() == pytest.approx(0.2582, abs=1e-3) and icc[
        "icc1k"
    ].mean() == pytest.approx(0.7544, abs=1e-3)
