"""Evaluation of tables: what is refused and named, every table of results, and figures. Cost: 10
s."""

import gzip
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from predictions import make_index, make_predictions

from percepiano_ast import plots
from percepiano_ast.config import FrontEnd
from percepiano_ast.dimensions import KEYS
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation import EvaluationOptions, evaluate, metrics, reliability, remarks
from percepiano_ast.evaluation.predictions import (
    HELD_OUT_MUSIC,
    SCOPES,
    check_protocol,
    check_ratings,
    fold_column,
    load_index,
    protocols,
    read_predictions,
    runs,
    validate_predictions,
    write,
)
from percepiano_ast.studies import report

FEW = EvaluationOptions(n_permutations=50)


@pytest.fixture(scope="module")
def index():
    return make_index()


@pytest.fixture(scope="module")
def predictions(index):
    return make_predictions(index, {"ast-micro-ssast": 0.05, "mlp": 0.1})


def test_shipped_index_is_the_fold_table_without_ratings():
    index = load_index()
    assert (
        len(index) == 1202
        and index["content_group"].nunique() == 47
        and (~index["human"]).sum() == 129
    )
    assert not set(index.columns) & {"rating", *KEYS}
    assert set(protocols(index)) <= set(report.PROTOCOLS)
    for protocol in protocols(index):
        folds = check_protocol(index, protocol)
        crossing = folds.groupby("content_group")[fold_column(protocol)].nunique().max()
        assert crossing == 1 or protocol not in HELD_OUT_MUSIC


def test_every_table_has_its_columns(index, predictions):
    both = pd.concat(
        [predictions, predictions.assign(seed=1, prediction=predictions["prediction"] * 0.9 + 0.01)]
    )
    ceiling = pd.DataFrame(0.8, index=list(KEYS), columns=list(SCOPES))
    results = evaluate(both.assign(uncertainty=0.1), index, FEW, ceiling)
    start = ["model", "protocol", "seed"]
    pairs = ["model_a", "model_b", "protocol"]
    end = ["dimension", "value", "low", "high"]
    assert {name: list(result.columns) for name, result in results.items()} == {
        "metrics": [*start, "scope", "metric", *end],
        "head_groups": [*start, "scope", "metric", *end],
        "folds": [*start, "fold", "scope", "metric", "dimension", "value", "clips"],
        "comparisons": [
            *pairs,
            "seed",
            "scope",
            "metric",
            "dimension",
            "difference",
            "low",
            "high",
            "p",
            "p_holm",
            "effect",
            "cohens_q",
            "detectable",
        ],
        "seeds": [
            "model",
            "protocol",
            "scope",
            "metric",
            "dimension",
            "seeds",
            "value",
            "seed_sd",
            "low",
            "high",
        ],
        "seed_comparisons": [
            *pairs,
            "scope",
            "metric",
            "dimension",
            "seeds_a",
            "seeds_b",
            "difference",
            "low",
            "high",
            "p",
            "p_holm",
            "detectable",
        ],
        "deadpan": [*start, "part", "metric", *end],
        "pairwise": [
            *start,
            "scope",
            "min_difference",
            "dimension",
            "pairs",
            "value",
            "low",
            "high",
        ],
        "calibration": [*start, "metric", *end],
        "errors": [*start, "dimension", "all", "noise", "passage", "player", "clip"],
        "errors_by_kind": [*start, "kind", "value", "clips", "error"],
        "shared_errors": ["protocol", "seed", "model_a", "model_b", "correlation"],
        "ceiling_share": [*start, "scope", "ceiling", *end],
        "summary": [
            "model",
            "protocol",
            "scope",
            "metric",
            "dimension",
            "seeds",
            "value",
            "seed_sd",
            "low",
            "high",
        ],
        "differences": [
            *pairs,
            "scope",
            "metric",
            "dimension",
            "seeds",
            "difference",
            "low",
            "high",
            "p",
            "p_holm",
            "detectable",
        ],
    }
    assert set(results["metrics"]["dimension"]) == {*KEYS, "mean"}
    assert set(results["head_groups"]["dimension"]) == {"timing", "sound", "music"}
    alone = evaluate(predictions[predictions["model"] == "mlp"], index, FEW)
    for name in ("comparisons", "seeds", "seed_comparisons", "calibration", "shared_errors"):
        assert alone[name].empty and list(alone[name].columns) == list(results[name].columns)


BROKEN = {
    "a column less": (lambda t: t.drop(columns="fold"), "lack the columns ['fold']"),
    "no rows": (lambda t: t.head(0), "no rows"),
    "rating of 1 to 7": (lambda t: t.assign(rating=t["rating"] * 7), "divide raw ratings by 7"),
    "text as a number": (
        lambda t: t.astype({"prediction": object}).replace(
            {"prediction": {t["prediction"][4]: "x"}}
        ),
        "row 4: prediction is 'x'",
    ),
    "NaN": (
        lambda t: t.assign(prediction=t["prediction"].mask(t.index == 7)),
        "row 7: prediction is nan",
    ),
    "prediction of another unit": (
        lambda t: t.assign(prediction=-1e200),
        "row 0: prediction is -1e+200; ratings are 0 to 1: give the same unit",
    ),
    "negative uncertainty": (lambda t: t.assign(uncertainty=-0.1), "row 0: uncertainty is -0.1"),
    "half a fold": (lambda t: t.assign(fold=t["fold"] + 0.5), "fold is 0.5"),
    "unknown dimension": (
        lambda t: t.replace({"dimension": {KEYS[0]: "timing"}}),
        "row 0: dimension is 'timing'",
    ),
    "dimension missing": (
        lambda t: t.drop(index=3),
        f"lacks 1 of 19 dimensions, first '{KEYS[3]}'",
    ),
    "twice": (lambda t: pd.concat([t, t.head(1)]), f"{KEYS[0]} is predicted twice"),
    "two folds": (
        lambda t: pd.concat([t, t.head(19).assign(fold=2)]),
        "has predictions in 2 folds",
    ),
    "fold of another table": (
        lambda t: t.assign(fold=(t["fold"] + 1) % 4),
        "is in fold 1, but in fold 0 of the index",
    ),
    "unknown clip": (
        lambda t: t.assign(clip=t["clip"].replace("g00s0p0", "g99")),
        "'g99' is not in the index",
    ),
    "unknown protocol": (
        lambda t: t.assign(protocol="contents"),
        "no protocol 'contents'; choose one of content",
    ),
    "uncertainty here and there": (
        lambda t: t.assign(uncertainty=np.where(t.index == 5, np.nan, 0.1)),
        "has an uncertainty in some rows only",
    ),
    "other labels": (
        lambda t: t.assign(rating=t["rating"].where(t["model"] == "mlp", 0.5)),
        "differ by",
    ),
    "a clip less": (
        lambda t: t[(t["clip"] != "g03s1p2") | (t["model"] == "mlp")],
        "covers 143 of 144 held-out clips",
    ),
}


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
        read_predictions(name)
    assert not Path("boom").exists()


def test_a_bomb_is_not_inflated(tmp_path):
    with gzip.open(tmp_path / "predictions.csv.gz", "wb", compresslevel=1) as file:
        for _ in range(2**9):
            file.write(bytes(2**20))
    with pytest.raises(InputError, match="more than 268,435,456 bytes"):
        read_predictions(tmp_path / "predictions.csv.gz")


@pytest.mark.parametrize("case", BROKEN)
def test_bad_predictions_are_refused(case, index, predictions):
    damage, message = BROKEN[case]
    with pytest.raises(InputError, match=re.escape(message)):
        validate_predictions(damage(predictions), index)


def test_folds_that_leak_are_refused_where_unheard_music_is_promised(index, predictions):
    crossing = index.assign(fold_content=index["fold_content"].where(index["clip"] != "g01s0p0", 2))
    moved = predictions.assign(fold=predictions["fold"].where(predictions["clip"] != "g01s0p0", 2))
    with pytest.raises(
        InputError, match="content group 'g01' is in folds 1 and 2 of protocol 'content'"
    ):
        validate_predictions(moved, crossing)
    # known to leak, and shown as such
    assert len(check_protocol(index, "random")) == len(index)
    with pytest.raises(InputError, match=r"has 1 fold in the index"):
        validate_predictions(predictions.assign(fold=0), index.assign(fold_content=0))


def test_one_fold_and_small_segments_are_named(index, predictions):
    some = predictions[
        (predictions["fold"] == 2) & ~predictions["clip"].isin(["g02s0p0", "g02s0p1"])
    ]
    values = metrics.metric_table(runs(some, index))
    lines = "\n".join(remarks(some, index, values))
    assert "ast-micro-ssast, protocol content, seed 0 and 1 more: only fold 2 (34 clips)" in lines
    few = predictions[~predictions["clip"].isin([f"g02s0p{player}" for player in range(4)])]
    lines = "\n".join(remarks(few, index, metrics.metric_table(runs(few, index))))
    assert (
        "1 segments have fewer than 3 clips and are excluded from within_segment, for example"
        " 'g02s0'" in lines
    )


def test_ratings_of_another_label_file_are_refused():
    index = load_index()
    rows = make_predictions(index, {"mlp": 0.1})
    with pytest.raises(
        InputError, match="of 1202 clips differ from those that PercePiano published"
    ):
        validate_predictions(rows)
    # a named index is a data set of its own
    assert len(validate_predictions(rows, index)) == len(rows)


@pytest.mark.real_data
def test_published_ratings_pass_with_few_digits_and_one_changed_rating_does_not(percepiano_dir):
    ratings = reliability.mean_ratings(reliability.read_raters(percepiano_dir)).reindex(
        load_index()["clip"]
    )
    rows = (
        ratings.rename_axis("clip")
        .melt(ignore_index=False, var_name="dimension", value_name="rating")
        .reset_index()
    )
    check_ratings(rows)
    check_ratings(rows.round(3))
    rows.loc[100, "rating"] += 0.1
    with pytest.raises(
        InputError, match=f"ratings of 1 of 1202 clips.*'{rows['clip'][100]}' the most"
    ):
        check_ratings(rows)


def test_partial_and_out_of_range_predictions_are_allowed(index, predictions):
    some = predictions[predictions["fold"] == 1].assign(
        prediction=lambda t: t["prediction"] * 3 - 1
    )
    assert len(validate_predictions(some, index, partial=True)) == len(some)
    upstream = make_predictions(index, {"mlp": 0.1}, protocol="upstream_piece")
    # its folds below 0 are not asked for
    assert len(validate_predictions(upstream, index)) < len(index) * 19


def test_files_round_trip_and_name_the_line(index, predictions, tmp_path):
    path = tmp_path / "predictions.csv.gz"
    predictions.to_csv(path, index=False)
    pd.testing.assert_frame_equal(read_predictions(path), predictions)
    text = gzip.decompress(path.read_bytes()).decode().splitlines()
    plain = tmp_path / "predictions.csv"
    for lines, message in (
        ([*text[:4], text[4].replace("content,0,", "content,x,")], "line 5: seed is 'x'"),
        ([*text[:4], text[4] + ",1"], "not a readable CSV"),
        ([*text[:4], text[4][:10]], "line 5"),
        ([], "not a readable CSV"),
    ):
        plain.write_text("\n".join(lines))
        with pytest.raises(InputError, match=message):
            read_predictions(plain)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match="not a readable CSV"):
        read_predictions(path)
    with pytest.raises(InputError, match="no predictions file"):
        read_predictions(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace(",", ";").replace(".", ","), ""),
        (lambda text: text.replace("\n", "\r"), ""),
        (lambda text: text.replace("mlp", "NA"), ""),
        (lambda text: text.replace(",", "\t").encode("utf-16"), ""),
        (lambda text: text.replace("mlp", "M\u00fcller").encode("cp1252"), ""),
        (lambda text: text.replace("\n", ",\n,,,,,,,,\n\n"), ""),
        (lambda text: text.replace(".", ","), "line 2: 10 cells, but the header has 8"),
        (lambda text: text.replace(",content,0", ",content,1e999", 1), "line 2: seed is '1e999'"),
        (
            lambda text: text.replace(",content,0", f",content,{'9' * 5000}", 1),
            "line 2: seed is '99",
        ),
        (lambda text: text.replace("\nmlp", "\n\n\nmlp", 1).replace(",0,", ",0_0,", 1), "line 4"),
        (lambda text: text.replace("mlp", "m" * 201), "model is .*; write a name of at most 200"),
        (lambda text: text.replace("dimension", "rating", 1), "has 2 columns named 'rating'"),
    ],
)
def test_predictions_of_spreadsheets(change, message, index, tmp_path):
    rows = make_predictions(index, {"mlp": 0.1}).iloc[: 19 * 3]
    rows = rows.assign(rating=rows["rating"].round(4), prediction=rows["prediction"].round(4))
    changed, path = change(rows.to_csv(index=False)), tmp_path / "predictions.csv"
    path.write_bytes(changed if isinstance(changed, bytes) else changed.encode())
    if message:
        with pytest.raises(InputError, match=message) as refused:
            read_predictions(path)
        assert len(str(refused.value)) < 300 and "\n" not in str(refused.value)
    else:
        found = read_predictions(path)
        assert found["model"].nunique() == 1 and found["model"][0] in ("mlp", "NA", "M\u00fcller")
        pd.testing.assert_frame_equal(found.assign(model="mlp"), rows.reset_index(drop=True))


def test_missing_uncertainties_have_many_names(index, tmp_path):
    rows = make_predictions(index, {"mlp": 0.1}).iloc[:19].assign(uncertainty="NA")
    rows.to_csv(tmp_path / "predictions.csv", index=False)
    assert read_predictions(tmp_path / "predictions.csv")["uncertainty"].isna().all()


def test_names_of_models_come_back(index, tmp_path):
    names = ["=1+1", "-take", "@x", "'=1", "NA", "001", "a\nb", "$x_{$", "\u00e9"]
    rows = pd.concat(make_predictions(index, {"m": 0.1}).iloc[:19].assign(model=n) for n in names)
    write(rows, path := tmp_path / "predictions.csv.gz")
    assert read_predictions(path)["model"].unique().tolist() == names
    assert not re.search(rb"(?m)^[=@-]", gzip.decompress(path.read_bytes()))


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            lambda t: t.rename(columns={"fold_random": "fold_../../x"}),
            "has the protocol '../../x'; name it with letters",
        ),
        (lambda t: t.assign(fold_content=10.0**30), "fold_content is '1e+30'"),
        (lambda t: t.drop(columns="segment"), "lacks the columns ['segment']"),
        (lambda t: t[["clip", "segment", "content_group", "human"]], "fold_<protocol>"),
        (lambda t: pd.concat([t, t.head(1)]), "lists clip 'g00s0p0' twice"),
        (lambda t: t.assign(human="yes"), "human is 'yes'"),
        (lambda t: t.assign(fold_content="a"), "fold_content is 'a'"),
        (lambda t: t.assign(segment=t["segment"].mask(t.index == 2)), "line 4: a value is empty"),
        (lambda t: t.assign(segment="s"), "is in 12 content groups"),
    ],
)
def test_bad_index_is_refused(damage, message, index, tmp_path):
    damage(index).to_csv(tmp_path / "index.csv", index=False)
    with pytest.raises(InputError, match=re.escape(message)):
        load_index(tmp_path / "index.csv")


def test_an_index_that_a_spreadsheet_has_saved_is_the_same(index, tmp_path):
    text = index.to_csv(index=False).replace("True", "TRUE").replace("False", "FALSE")
    (tmp_path / "index.csv").write_text(text)
    pd.testing.assert_frame_equal(load_index(tmp_path / "index.csv"), index)


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
    history = pd.DataFrame(
        {"step": [1, 2, 3], "loss": [3.0, 2.0, 1.0], "val_loss": [3.0, np.nan, 2.0]}
    )
    assert [len(axes.lines[0].get_xdata()) for axes in plots.training_curves(history).axes] == [
        3,
        2,
    ]
    table = pd.DataFrame(
        {"split": ["train"] * 9 + ["test"], "seconds": [60.0 * n for n in range(1, 11)]}
    )
    table = table.assign(
        composer=["Bach", "Liszt"] * 5, year=[2004, 2018] * 5, shard=["a"] * 9 + ["b"]
    )
    by_composer, _, by_length = plots.collection(table).axes
    assert "train: 9 recordings, 45 min" in by_length.get_legend().texts[0].get_text()
    names = [label.get_text() for label in by_composer.get_yticklabels()]
    widths = [
        sum(
            bar.get_width()
            for bar in by_composer.patches
            if bar.get_y() < k + 0.5 < bar.get_y() + 1
        )
        for k in (0, 1)
    ]
    assert dict(zip(names, widths)) == pytest.approx({"Bach": 25 / 60, "Liszt": 30 / 60})
    assert [
        len(blocks.get_paths()) for blocks in plots.shard_layout(table).axes[0].collections
    ] == [9, 1]
    ratings = dict(zip(KEYS, np.linspace(0, 1, 19)))
    bars = plots.rating_profile(ratings, dict.fromkeys(KEYS, 0.1)).axes[0].patches
    assert [bar.get_x() + bar.get_width() for bar in bars] == pytest.approx(list(ratings.values()))
    for bad in (
        lambda: plots.training_curves(history[["loss"]]),
        lambda: plots.scatter(predictions, "timing"),
        lambda: plots.rating_profile({}),
    ):
        with pytest.raises(InputError):
            bad()


def test_figures_of_ratings_tell_people_from_deadpan(index, predictions):
    ratings = predictions[predictions["model"] == "mlp"].pivot(
        index="clip", columns="dimension", values="rating"
    )
    human = index.set_index("clip")["human"]
    axes = plots.rating_distributions(ratings, human).axes[0]
    assert len(axes.patches) == 2 * len(KEYS)
    figure = plots.rating_distributions(ratings[human.loc[ratings.index].to_numpy()], human)
    assert [text.get_text() for text in figure.legends[0].texts] == [
        "human performances (120 clips)"
    ]
    axes = plots.correlations(ratings[list(KEYS)].corr()).axes[0]
    assert len(axes.texts) == len(KEYS) ** 2 and axes.texts[0].get_text() == "1.0"
