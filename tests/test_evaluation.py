"""Evaluation: numbers against scipy and scikit-learn, intervals that cover, bad tables refused, honest reports."""

import gzip
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import mean_absolute_error, r2_score

from percepiano_ast import plots, report
from percepiano_ast.config import FrontEnd, InputError
from percepiano_ast.dimensions import KEYS
from percepiano_ast.evaluation import metrics, significance


def make_index(n_groups=12, players=6):
    """A small index: two segments a group; the last player of each segment is a deadpan rendering."""
    rows = [
        {"clip": f"g{g:02d}s{s}p{p}", "segment": f"g{g:02d}s{s}", "content_group": f"g{g:02d}",
         "human": p < players - 1, "fold_content": g % 4, "fold_random": (g + p) % 4, "upstream_piece": g % 4 - 1}
        for g in range(n_groups) for s in range(2) for p in range(players)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def make_predictions(index, noise, protocol="content", seed=0, rng=0):
    """One run per entry of ``noise`` (model -> noise of its predictions), on the same ratings."""
    draw = np.random.default_rng(rng)
    music = draw.normal(size=(index["segment"].nunique(), len(KEYS)))[pd.factorize(index["segment"])[0]]
    playing = draw.normal(size=music.shape) - 1.0 * (~index["human"].to_numpy())[:, None]
    rating = np.clip(0.5 + 0.08 * music + 0.08 * playing, 0, 1)
    tables = []
    for model, scale in noise.items():
        prediction = rating + scale * draw.normal(size=rating.shape)
        table = pd.DataFrame({
            "model": model, "protocol": protocol, "seed": seed,
            "fold": np.repeat(index[metrics.fold_column(protocol)], len(KEYS)),
            "clip": np.repeat(index["clip"], len(KEYS)),
            "dimension": list(KEYS) * len(index), "rating": rating.ravel(), "prediction": prediction.ravel(),
        })  # fmt: skip
        tables.append(table[table["fold"] >= 0])
    return pd.concat(tables, ignore_index=True)


@pytest.fixture
def index():
    return make_index()


@pytest.fixture
def predictions(index):
    return make_predictions(index, {"ast-micro-ssast": 0.05, "mlp": 0.1})


def value(table, metric, scope="overall", dimension=KEYS[0], column="value", model="mlp"):
    rows = table[(table["model"] == model) & (table["metric"] == metric) & (table["scope"] == scope)]
    return rows.set_index("dimension").loc[dimension, column]


def pair(predictions, dimension=KEYS[0], model="mlp"):
    rows = predictions[(predictions["model"] == model) & (predictions["dimension"] == dimension)]
    return rows["rating"].to_numpy(), rows["prediction"].to_numpy()


def test_shipped_index_is_the_fold_table_without_ratings():
    index = metrics.load_index()
    assert len(index) == 1202 and index["content_group"].nunique() == 47 and (~index["human"]).sum() == 129
    assert not set(index.columns) & {"rating", *KEYS}
    crossing = index.groupby("content_group")[["fold_content", "fold_movement"]].nunique()
    assert (crossing["fold_content"] == 1).all()
    for protocol in report.PROTOCOLS:
        assert metrics.fold_column(protocol) in index.columns


def test_values_match_scipy_and_sklearn(index, predictions):
    table = metrics.evaluate(predictions, index, n_bootstrap=10)
    for dimension in KEYS[::6]:
        x, y = pair(predictions, dimension)
        ccc = 2 * np.cov(x, y, ddof=0)[0, 1] / (x.var() + y.var() + (x.mean() - y.mean()) ** 2)
        expected = {
            "pearson": stats.pearsonr(x, y).statistic, "spearman": stats.spearmanr(x, y).statistic,
            "r2": r2_score(x, y), "mae": mean_absolute_error(x, y), "ccc": ccc,
        }  # fmt: skip
        for metric, number in expected.items():
            assert value(table, metric, dimension=dimension) == pytest.approx(number, abs=1e-10), metric
    each = [value(table, "pearson", dimension=key) for key in KEYS]
    assert value(table, "pearson", dimension="mean") == pytest.approx(np.mean(each), abs=1e-12)


def test_bootstrap_from_sums_equals_resampled_rows(index, predictions):
    run = metrics.runs(predictions, index)[1]
    names, weights = metrics.resample(run.content_group, 3, seed=5)
    table = metrics.scores(run, "overall", names, weights)
    for draw, counts in enumerate(weights):
        drawn = np.repeat(names, counts.astype(int))
        rows = np.concatenate([np.flatnonzero(run.content_group == group) for group in drawn])
        x, y = run.rating[rows, 0], run.prediction[rows, 0]
        assert table["pearson"][draw, 0] == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-10)
        assert table["r2"][draw, 0] == pytest.approx(r2_score(x, y), abs=1e-10)
        ccc = 2 * np.cov(x, y, ddof=0)[0, 1] / (x.var() + y.var() + (x.mean() - y.mean()) ** 2)
        assert table["ccc"][draw, 0] == pytest.approx(ccc, abs=1e-10)


def test_correlations_ignore_an_affine_change_of_the_prediction(index, predictions):
    before = metrics.evaluate(predictions, index, n_bootstrap=20)
    after = metrics.evaluate(predictions.assign(prediction=7 * predictions["prediction"] - 40), index, n_bootstrap=20)
    same = before["metric"].isin(["pearson", "spearman"])
    columns = ["value", "low", "high"]
    np.testing.assert_allclose(before.loc[same, columns], after.loc[same, columns], atol=1e-9)
    assert value(after, "mae") > 30


def test_within_segment_sees_nothing_of_the_segment(index, predictions):
    shift = dict(zip(index["segment"].unique(), np.random.default_rng(1).normal(size=index["segment"].nunique())))
    segment = predictions["clip"].map(index.set_index("clip")["segment"])
    moved = metrics.evaluate(predictions.assign(prediction=predictions["prediction"] + segment.map(shift)), index)
    table = metrics.evaluate(predictions, index)
    within = table["scope"].str.startswith("within")
    np.testing.assert_allclose(table.loc[within, "value"], moved.loc[within, "value"], atol=1e-9)
    assert value(moved, "pearson") < value(table, "pearson") - 0.2
    x, y = pair(predictions)
    codes = index["segment"].to_numpy()
    x, y = (v - pd.Series(v).groupby(codes).transform("mean").to_numpy() for v in (x, y))
    assert value(table, "pearson", "within_segment") == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-10)
    assert value(table, "mae", "within_segment") == pytest.approx(mean_absolute_error(x, y), abs=1e-10)


def test_segment_means_score_nothing_within_segment(index, predictions, caplog):
    segment = predictions["clip"].map(index.set_index("clip")["segment"])
    mean = predictions.groupby(["model", segment, "dimension"])["rating"].transform("mean")
    rounding = np.random.default_rng(0).uniform(-1e-8, 1e-8, len(mean))  # float32 sums in another order
    table = metrics.evaluate(predictions.assign(prediction=mean + rounding), index, n_bootstrap=20)
    assert value(table, "pearson") > 0.6
    assert np.isnan(value(table, "pearson", "within_segment")) and np.isnan(value(table, "spearman", "within_segment"))
    assert "pearson (within_segment) is undefined for all dimensions" in caplog.text


def test_a_clip_alone_in_its_segment_is_left_out_within_segment(index, predictions):
    index.loc[0, "segment"] = "alone"
    table = metrics.evaluate(predictions, index, n_bootstrap=5)
    rest = predictions[predictions["clip"] != index.loc[0, "clip"]]
    expected = metrics.evaluate(rest, index, n_bootstrap=5)
    assert value(table, "mae", "within_segment") == pytest.approx(value(expected, "mae", "within_segment"), abs=1e-12)


def test_humans_only_drops_deadpan(index, predictions):
    x, y = pair(predictions)
    human = index["human"].to_numpy()
    table = metrics.evaluate(predictions, index, n_bootstrap=5)
    expected = stats.pearsonr(x[human], y[human]).statistic
    assert value(table, "pearson", "humans_only") == pytest.approx(expected, abs=1e-10)
    none = metrics.evaluate(predictions, index.assign(human=False), n_bootstrap=5)
    assert none[none["scope"].str.contains("humans")]["value"].isna().all()


def test_constant_prediction_is_undefined_not_zero(index, predictions, caplog):
    flat = (predictions["model"] == "mlp") & (predictions["dimension"] == KEYS[3])
    table = metrics.evaluate(predictions.assign(prediction=predictions["prediction"].mask(flat, 0.1)), index)
    for column in ("value", "low", "high"):
        assert np.isnan(value(table, "pearson", dimension=KEYS[3], column=column))
    assert np.isnan(value(table, "pearson", dimension="mean"))
    assert value(table, "ccc", dimension=KEYS[3]) == 0 and value(table, "r2", dimension=KEYS[3]) < 0
    assert f"mlp, content, seed 0: pearson (overall) is undefined for {KEYS[3]}" in caplog.text
    compared = significance.compare(predictions.assign(prediction=predictions["prediction"].mask(flat, 0.1)), index)
    assert np.isnan(compared.set_index(["scope", "dimension"]).loc[("overall", "mean"), "p"])


def test_interval_covers_and_grows_with_clustering():
    """Clips in 30 groups, true r .6: nine of ten intervals hold it; shared music in a group makes them wider."""
    draw = np.random.default_rng(3)
    groups = np.repeat(np.arange(30), 6).astype(str)

    def run(shared):
        u, v = (np.sqrt(shared) * draw.normal(size=(30, 19)).repeat(6, axis=0)
                + np.sqrt(1 - shared) * draw.normal(size=(180, 19)) for _ in range(2))  # fmt: skip
        clips = np.arange(180).astype(str)
        table = metrics.Run("m", "content", 0, clips, clips, groups, np.ones(180, bool), u, 0.6 * u + 0.8 * v)
        names, weights = metrics.resample(groups, 400, seed=0)
        low, high = metrics.interval(metrics.scores(table, "overall", names, weights)["pearson"][1:, :19])
        return np.mean((low < 0.6) & (high > 0.6)), np.mean(high - low)

    independent, clustered = (np.mean([run(shared) for _ in range(5)], axis=0) for shared in (0.0, 0.9))
    assert independent[0] > 0.88 and clustered[0] > 0.83
    assert clustered[1] > 1.5 * independent[1]


def test_one_content_group_has_no_interval(index, predictions):
    index["content_group"] = "one"
    table = metrics.evaluate(predictions, index, n_bootstrap=50)
    assert np.isfinite(value(table, "pearson")) and table["low"].isna().all() and table["high"].isna().all()


def test_seeds_stay_apart(index):
    both = pd.concat([make_predictions(index, {"mlp": 0.05}, seed=s) for s in (0, 1)])
    assert set(metrics.evaluate(both, index, n_bootstrap=5)["seed"]) == {0, 1}
    assert significance.compare(both, index).empty


def test_comparison_is_paired(index, predictions):
    table = metrics.evaluate(predictions, index)
    compared = significance.compare(predictions, index)
    row = compared.set_index(["scope", "dimension"]).loc[("overall", "mean")]
    better, worse = (value(table, "pearson", dimension="mean", model=m) for m in ("ast-micro-ssast", "mlp"))
    assert row["difference"] == pytest.approx(better - worse, abs=1e-12)
    assert 0 < row["low"] < row["difference"] < row["high"] and row["p"] == pytest.approx(2 / 1001)
    twin = predictions[predictions["model"] == "mlp"].assign(model="twin")
    same = significance.compare(pd.concat([predictions[predictions["model"] == "mlp"], twin]), index)
    assert (same[["difference", "low", "high"]] == 0).all(axis=None) and (same["p"] == 1).all()


def test_comparison_uses_common_clips(index, predictions):
    some = predictions[(predictions["model"] != "mlp") | (predictions["fold"] < 2)]
    common = predictions[predictions["fold"] < 2]
    pd.testing.assert_frame_equal(significance.compare(some, index), significance.compare(common, index))


BROKEN = {
    "a column less": (lambda t: t.drop(columns="fold"), "lack the columns ['fold']"),
    "no rows": (lambda t: t.head(0), "no rows"),
    "rating of 1 to 7": (lambda t: t.assign(rating=t["rating"] * 7), "divide raw ones by 7"),
    "text as a number": (lambda t: t.astype({"prediction": object}).replace({"prediction": {t["prediction"][4]: "x"}}),
                         "row 4: prediction is 'x'"),
    "NaN": (lambda t: t.assign(prediction=t["prediction"].mask(t.index == 7)), "row 7: prediction is nan"),
    "negative uncertainty": (lambda t: t.assign(uncertainty=-0.1), "row 0: uncertainty is -0.1"),
    "half a fold": (lambda t: t.assign(fold=t["fold"] + 0.5), "fold is 0.5"),
    "unknown dimension": (lambda t: t.replace({"dimension": {KEYS[0]: "timing"}}), "row 0: dimension is 'timing'"),
    "dimension missing": (lambda t: t.drop(index=3), f"lacks 1 of 19 dimensions, first '{KEYS[3]}'"),
    "twice": (lambda t: pd.concat([t, t.head(1)]), f"{KEYS[0]} is predicted twice"),
    "two folds": (lambda t: pd.concat([t, t.head(19).assign(fold=2)]), "has predictions in 2 folds"),
    "fold of another table": (lambda t: t.assign(fold=(t["fold"] + 1) % 4), "is in fold 1, but the index says 0"),
    "unknown clip": (lambda t: t.assign(clip=t["clip"].replace("g00s0p0", "g99")), "'g99' is not in the index"),
    "unknown protocol": (lambda t: t.assign(protocol="contents"), "no protocol 'contents'; choose one of content"),
    "other labels": (lambda t: t.assign(rating=t["rating"].where(t["model"] == "mlp", 0.5)), "differ by"),
    "a clip less": (lambda t: t[(t["clip"] != "g03s1p2") | (t["model"] == "mlp")], "covers 143 of 144 held-out clips"),
}  # fmt: skip


class Boom:
    """Its pickle runs a command."""

    def __reduce__(self):
        return os.system, ("touch boom",)


@pytest.mark.parametrize("name", ["predictions.csv", "predictions.csv.gz", "predictions.pkl"])
def test_a_pickle_from_a_stranger_is_no_table(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    content = pickle.dumps(Boom())
    Path(name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(InputError, match="predictions"):
        metrics.read_predictions(name)
    assert not Path("boom").exists()


def test_a_bomb_is_not_inflated(tmp_path):
    with gzip.open(tmp_path / "predictions.csv.gz", "wb", compresslevel=1) as file:
        for _ in range(2**9):
            file.write(bytes(2**20))
    with pytest.raises(InputError, match="more than 268,435,456 bytes"):
        metrics.read_predictions(tmp_path / "predictions.csv.gz")


@pytest.mark.parametrize("case", BROKEN)
def test_bad_predictions_are_refused(case, index, predictions):
    damage, message = BROKEN[case]
    with pytest.raises(InputError, match=re.escape(message)):
        metrics.validate_predictions(damage(predictions), index)


def test_partial_and_out_of_range_predictions_are_allowed(index, predictions):
    some = predictions[predictions["fold"] == 1].assign(prediction=lambda t: t["prediction"] * 3 - 1)
    assert len(metrics.validate_predictions(some, index, partial=True)) == len(some)
    upstream = make_predictions(index, {"mlp": 0.1}, protocol="upstream_piece")
    assert len(metrics.validate_predictions(upstream, index)) < len(index) * 19  # its folds below 0 are not asked for


def test_files_round_trip_and_name_the_line(index, predictions, tmp_path):
    path = tmp_path / "predictions.csv.gz"
    predictions.to_csv(path, index=False)
    pd.testing.assert_frame_equal(metrics.read_predictions(path), predictions)
    text = gzip.decompress(path.read_bytes()).decode().splitlines()
    plain = tmp_path / "predictions.csv"
    for lines, message in (
        ([*text[:4], text[4].replace("content,0,", "content,x,")], "line 5: seed is 'x'"),
        ([*text[:4], text[4] + ",1"], "no readable CSV"),
        ([*text[:4], text[4][:10]], "line 5"),
        ([], "no readable CSV"),
    ):
        plain.write_text("\n".join(lines))
        with pytest.raises(InputError, match=message):
            metrics.read_predictions(plain)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match="no readable CSV"):
        metrics.read_predictions(path)
    with pytest.raises(InputError, match="no predictions file"):
        metrics.read_predictions(tmp_path / "none.csv")


@pytest.mark.parametrize("damage, message", [
    (lambda t: t.drop(columns="segment"), "lacks the columns ['segment']"),
    (lambda t: t[["clip", "segment", "content_group", "human"]], "fold_<protocol>"),
    (lambda t: pd.concat([t, t.head(1)]), "lists clip 'g00s0p0' twice"),
    (lambda t: t.assign(human="yes"), "human is 'yes'"),
    (lambda t: t.assign(fold_content="a"), "fold_content is 'a'"),
    (lambda t: t.assign(segment=t["segment"].mask(t.index == 2)), "line 4: an empty value"),
    (lambda t: t.assign(segment="s"), "lies in 12 content groups"),
])  # fmt: skip
def test_bad_index_is_refused(damage, message, index, tmp_path):
    damage(index).to_csv(tmp_path / "index.csv", index=False)
    with pytest.raises(InputError, match=re.escape(message)):
        metrics.load_index(tmp_path / "index.csv")


def test_report_is_written_labelled_and_repeatable(index, predictions, tmp_path):
    path = report.write(predictions, index, tmp_path / "a", simulated=True, n_bootstrap=50)
    report.write(predictions, index, tmp_path / "b", simulated=True, n_bootstrap=50)
    for name in ("metrics.csv", "comparisons.csv", "report.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    columns = "model,protocol,seed,scope,metric,dimension,value,low,high"
    assert (tmp_path / "a/metrics.csv").read_text().startswith(columns + "\n")
    text = (tmp_path / "a/report.md").read_text()
    assert text.startswith("# How well are piano performances rated? (simulated ratings)")
    captions = re.findall(r"^\*(?!\*)(.*)\*$|^!\[(.*)\]", text, flags=re.MULTILINE)
    assert len(captions) == 12 and all("SIMULATED" in "".join(caption) for caption in captions)
    figures = re.findall(r"\]\((figures/.*png)\)", text)
    assert len(figures) == 8 and all((tmp_path / "a" / figure).stat().st_size > 5000 for figure in figures)
    page = path.read_text()
    assert page.count("data:image/png;base64,") == 8 and 'src="figures' not in page
    assert "only 12 content group(s)" in text and "Single seed" in text
    assert "noise ceiling" not in text  # PercePiano's does not hold for other clips


def test_report_says_whether_the_encoder_beats_its_rivals(index):
    noise = {"ast-micro-ssast": 0.1, "ast-micro-scratch": 0.3, "mlp": 0.05, "ast-small-ensemble": 0.01, "cnn": 0.1}
    table = make_predictions(index, noise)
    values, pairs = metrics.evaluate(table, index), significance.compare(table, index)
    text = "\n".join(report.headlines(values, pairs, "content", 0))
    assert "best of 5 model(s) is `ast-small-ensemble`" in text
    assert "best pre-trained audio encoder is `ast-micro-ssast`" in text  # an ensemble is not the encoder
    assert "`ast-micro-ssast` **does not beat** `mlp`: it is behind by" in text
    assert "`ast-micro-ssast` **beats** `ast-micro-scratch` by" in text
    level = make_predictions(index, {"ast-micro-ssast": 0.0999, "mlp": 0.1}, rng=1)
    text = " ".join(report.headlines(metrics.evaluate(level, index), significance.compare(level, index), "content", 0))
    assert "**beats**" not in text and "within the noise" in text and "no `ast-*-scratch` model" in text


def test_files_to_report_names_leaks_and_gaps(index, tmp_path):
    index.to_csv(tmp_path / "index.csv", index=False)
    for protocol in ("content", "random"):
        part = make_predictions(index, {"mlp": 0.1}, protocol)
        part[part["fold"] < 3].to_csv(tmp_path / f"predictions_{protocol}.csv", index=False)
    files, facts = sorted(tmp_path.glob("predictions_*.csv")), tmp_path / "index.csv"
    with pytest.raises(InputError, match="covers 108 of 144"):
        report.evaluate_files(files, tmp_path / "out", facts)
    report.evaluate_files(files, tmp_path / "out", facts, partial=True, n_bootstrap=20)
    text = (tmp_path / "out/report.md").read_text()
    assert "## Random protocol (leaky), seed 0" in text and "Protocol `random`: **leaky**" in text
    assert "**Partial**: `mlp`, `content`, seed 0 covers 108 of 144" in text
    assert "simulated" not in text.lower()
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        report.evaluate_files(files, tmp_path / "file", facts, partial=True, n_bootstrap=20)


def test_real_index_gets_the_noise_ceiling(tmp_path):
    index = metrics.load_index()
    index = index[index["fold_content"] == 0]
    report.write(make_predictions(index, {"mlp": 0.1}), index, tmp_path, n_bootstrap=20)
    assert "| mean | " in (text := (tmp_path / "report.md").read_text()) and "| noise ceiling |" in text


def test_figures_show_what_they_are_given(predictions):
    front_end = FrontEnd()
    levels = np.linspace(-80, 0, 300 * 128).reshape(300, 128)
    axes = plots.spectrogram(levels, front_end).axes[0]
    assert axes.images[0].get_extent()[1] == pytest.approx(300 * 220 / 22050)
    import librosa

    centres = librosa.mel_frequencies(130, fmin=20, fmax=11025)[1:-1]
    for place, label in zip(axes.get_yticks(), axes.get_yticklabels()):
        hz = np.interp(place, np.arange(128), centres)
        assert hz == pytest.approx(float(label.get_text().replace(",", "")), rel=0.02)
    hidden = np.where(np.arange(300)[:, None] % 32 < 16, np.nan, levels)
    panels = plots.masking(levels, hidden, levels * 0.5, front_end).axes[:3]
    assert len({panel.images[0].get_clim() for panel in panels}) == 1
    history = pd.DataFrame({"step": [1, 2, 3], "loss": [3.0, 2.0, 1.0], "val_loss": [3.0, np.nan, 2.0]})
    assert [len(axes.lines[0].get_xdata()) for axes in plots.training_curves(history).axes] == [3, 2]
    table = pd.DataFrame({"split": ["train"] * 9 + ["test"], "seconds": [60.0 * n for n in range(1, 11)]})
    table = table.assign(composer=["Bach", "Liszt"] * 5, year=[2004, 2018] * 5, shard=["a"] * 9 + ["b"])
    by_composer, _, by_length = plots.collection(table).axes
    assert "train: 9 recordings, 45 min" in by_length.get_legend().texts[0].get_text()
    names = [label.get_text() for label in by_composer.get_yticklabels()]
    widths = [sum(bar.get_width() for bar in by_composer.patches if bar.get_y() < k + 0.5 < bar.get_y() + 1) for k in (0, 1)]
    assert dict(zip(names, widths)) == pytest.approx({"Bach": 25 / 60, "Liszt": 30 / 60})
    assert [len(blocks.get_paths()) for blocks in plots.shard_layout(table).axes[0].collections] == [9, 1]
    ratings = dict(zip(KEYS, np.linspace(0, 1, 19)))
    bars = plots.rating_profile(ratings, dict.fromkeys(KEYS, 0.1)).axes[0].patches
    assert [bar.get_x() + bar.get_width() for bar in bars] == pytest.approx(list(ratings.values()))
    for bad in (lambda: plots.training_curves(history[["loss"]]), lambda: plots.scatter(predictions, "timing"),
                lambda: plots.rating_profile({})):  # fmt: skip
        with pytest.raises(InputError):
            bad()
