"""Baselines that learn no hearing: arithmetic that is known, tables that resume, and the floor on
real data. A minute."""

import dataclasses
import os

import mido
import numpy as np
import pandas as pd
import pytest

from percepiano_ast import pipeline
from percepiano_ast.cli import main
from percepiano_ast.config import PRESETS
from percepiano_ast.data import demo, percepiano
from percepiano_ast.dimensions import KEYS
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation.predictions import (
    fold_column,
    load_index,
    protocols,
    read_predictions,
    validate_predictions,
)
from percepiano_ast.inference import regressors
from percepiano_ast.music import synth
from percepiano_ast.pipeline import baselines

# The research's baselines.csv: mean r of the average of ridge, support vectors and trees, from
# other code on the same folds.
RESEARCH = {
    "audio-stats": {
        "random": 0.731,
        "segment": 0.662,
        "performer": 0.678,
        "content": 0.602,
        "movement": 0.434,
        "composition": 0.388,
    },
    "midi-stats": {
        "random": 0.771,
        "segment": 0.730,
        "performer": 0.722,
        "content": 0.701,
        "movement": 0.546,
        "composition": 0.516,
    },
    "midi-stats+score": {"content": 0.727},  # from another blend of regressors
}
IDENTITY = {
    ("identity-segment", "leave_player_out"): 0.53,
    ("identity-segment-deadpan", "leave_player_out"): 0.64,
    ("identity-additive", "leave_one_out"): 0.756,
    ("identity-additive", "random"): 0.745,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The embedded data in PercePiano's shape."""
    return demo.write_percepiano(tmp_path_factory.mktemp("demo") / "percepiano", performers=2)


def mean_r(predictions: pd.DataFrame) -> float:
    """Mean over dimensions of Pearson's r over clips."""
    return (
        predictions.groupby("dimension")[["rating", "prediction"]]
        .apply(lambda part: np.corrcoef(part["rating"], part["prediction"])[0, 1])
        .mean()
    )


# --- Who plays what -----------------------------------------------------------------------------


def grid(passages=4, players=5):
    """An index of every player in every passage, and ratings that are the sum of a passage's and a
    player's."""
    index = pd.DataFrame(
        [
            {
                "clip": f"{s}_{p}",
                "composition": "c",
                "player": p,
                "segment": f"s{s}",
                "content_group": f"s{s}",
                "human": p > 0,
                "fold_random": (s + p) % 2,
                "fold_content": s % 2,
                "fold_performer": p % 2,
            }
            for s in range(passages)
            for p in range(players)
        ]
    )
    rng = np.random.default_rng(0)
    of_passage, of_player = rng.normal(size=(passages, 19)), rng.normal(size=(players, 19))
    ratings = np.array(
        [of_passage[s] + of_player[p] for s in range(passages) for p in range(players)]
    )
    return baselines.with_exhaustive(index), ratings


def folds_of(index, protocol):
    return index[fold_column(protocol)].to_numpy()


def test_leave_one_out_is_what_the_formula_says_and_never_sees_the_clip():
    index, ratings = grid()
    rated = baselines.predict_identity(
        "identity-segment", index, folds_of(index, "leave_one_out"), ratings
    )
    spoilt = ratings.copy()
    spoilt[7] += 100
    again = baselines.predict_identity(
        "identity-segment", index, folds_of(index, "leave_one_out"), spoilt
    )
    np.testing.assert_allclose(again[7], rated[7])
    assert (np.abs(again[[5, 6, 8, 9]] - rated[[5, 6, 8, 9]]) > 1).all()
    # Direct: 19 clips, an intercept, and effects with one pseudo-clip of shrinkage.
    others = np.arange(20) != 7
    design = np.hstack(
        [np.ones((20, 1)), (index["segment"].to_numpy()[:, None] == np.unique(index["segment"]))]
    )
    normal = design[others].T @ design[others] + np.diag([0, 1, 1, 1, 1])
    np.testing.assert_allclose(
        rated[7], design[7] @ np.linalg.solve(normal, design[others].T @ ratings[others])
    )


def test_additive_finds_what_is_additive_as_far_as_the_protocol_tells_it():
    index, ratings = grid(passages=30, players=30)
    spread = ratings.std(axis=0).mean()

    def error(name, protocol):
        rated = baselines.predict_identity(name, index, folds_of(index, protocol), ratings)
        return np.sqrt(np.mean((rated - ratings) ** 2)) / spread

    assert error("identity-additive", "leave_one_out") < 0.1
    assert error("identity-additive", "random") < 0.2
    assert error("identity-player", "content") > 0.5
    assert error("identity-additive", "content") == pytest.approx(
        error("identity-player", "content"), abs=0.01
    )
    assert error("identity-additive", "performer") == pytest.approx(
        error("identity-segment", "performer"), abs=0.01
    )


def test_protocols_that_hold_out_all_that_is_known_are_refused():
    index, ratings = grid()
    with pytest.raises(
        baselines.BaselineUndefined, match="no segment of a held-out clip is in the training data"
    ):
        baselines.predict_identity("identity-segment", index, folds_of(index, "content"), ratings)
    with pytest.raises(baselines.BaselineUndefined, match="identity-player"):
        baselines.predict_identity("identity-player", index, folds_of(index, "performer"), ratings)


def test_an_index_without_players_has_the_other_baselines():
    index, ratings = grid()
    unknown = index.drop(columns=["player", "fold_leave_player_out"])
    assert baselines.with_exhaustive(unknown).columns.equals(unknown.columns)
    with pytest.raises(InputError, match="lacks player"):
        baselines.predict_identity("identity-player", unknown, folds_of(index, "random"), ratings)
    assert np.isfinite(
        baselines.predict_identity("identity-segment", unknown, folds_of(index, "random"), ratings)
    ).all()


def test_clips_of_no_fold_are_neither_learned_from_nor_predicted():
    index, ratings = grid()
    folds = folds_of(index, "random").copy()
    folds[:5] = -1
    rated = baselines.predict_identity("identity-player", index, folds, ratings)
    spoilt = ratings.copy()
    spoilt[:5] = 1e6
    np.testing.assert_array_equal(
        baselines.predict_identity("identity-player", index, folds, spoilt), rated
    )
    assert np.isnan(rated[:5]).all() and np.isfinite(rated[5:]).all()


# --- Statistics ---------------------------------------------------------------------------------


def problem(n=60, seed=0):
    """Features of which three matter, ratings of two dimensions, content groups of five clips."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 10)) * np.logspace(-3, 3, 10)
    y = (
        0.5
        + 0.1 * (x / np.logspace(-3, 3, 10))[:, :3] @ rng.normal(size=(3, 2))
        + 0.02 * rng.normal(size=(n, 2))
    )
    return x, y, np.arange(n) // 5


@pytest.fixture(scope="module")
def fitted():
    x, y, groups = problem()
    return regressors.fit(x[:45], y[:45], seed=0)


def test_regressors_predict_and_are_averaged(fitted):
    x, y, _ = problem()
    each = fitted.predict_each(x[45:])
    assert set(each) == set(regressors.REGRESSORS)
    for values in each.values():
        assert np.corrcoef(values[:, 0], y[45:, 0])[0, 1] > 0.6
    np.testing.assert_allclose(fitted.predict(x[45:]), np.mean(list(each.values()), axis=0))


def test_a_seed_gives_the_same_ratings_and_a_unit_none_other(fitted):
    x, y, groups = problem()
    again = regressors.fit(x[:45] * 1000, y[:45], seed=0)
    np.testing.assert_allclose(again.predict(x[45:] * 1000), fitted.predict(x[45:]), rtol=1e-6)


def test_what_hardly_varied_in_training_moves_little_where_its_deviation_has_a_floor():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 4)), rng.normal(size=(60, 2))
    x[:, 3] *= 0.01
    shifted = x + np.array([0, 0, 0, 0.2])
    small = {"n_estimators": 5}
    free, held = (
        regressors.fit(x, y, seed=0, forest=small, least=least)
        for least in (None, np.array([0, 0, 0, 1.0]))
    )
    moved = [
        np.abs(one.predict_each(shifted)["kernel"] - one.predict_each(x)["kernel"]).max()
        for one in (free, held)
    ]
    assert moved[1] < 0.1 * moved[0] and (held.feature_std[:3] == free.feature_std[:3]).all()


def test_the_kernel_grows_with_the_number_of_features():
    from sklearn.kernel_ridge import KernelRidge

    x, y, _ = problem()
    x = x / x.std(axis=0)
    ours = regressors.gaussian_ridge(10, alpha=0.5, width=2.0).fit(x, y).predict(x[:7])
    theirs = KernelRidge(alpha=0.5, kernel="rbf", gamma=1 / (2.0 * 10)).fit(x, y).predict(x[:7])
    np.testing.assert_allclose(ours, theirs)


def test_bad_tables_are_named(fitted):
    x, y, groups = problem()
    spoilt = x.copy()
    spoilt[3, 4] = np.nan
    with pytest.raises(InputError, match="row 3, column 4"):
        regressors.fit(spoilt, y, seed=0)
    with pytest.raises(InputError, match="59 of ratings"):
        regressors.fit(x, y[1:], seed=0)
    with pytest.raises(InputError, match="1 content group"):
        regressors.inner_error(x, y, np.zeros(60), seed=0)
    with pytest.raises(InputError, match="9 features per clip, but the baseline was fitted on 10"):
        fitted.predict(x[:, 1:])


# --- Networks -----------------------------------------------------------------------------------


def table(seed: int, clips: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Features with a constant column, and ratings of three dimensions that depend on them."""
    rng = np.random.default_rng(seed)
    features = 50 + 20 * rng.normal(size=(clips, 12))
    features[:, 3] = 7.0
    weights = np.random.default_rng(0).normal(size=(12, 3))
    ratings = 0.5 + 0.1 * np.tanh((features - 50) / 20 @ weights / 3)
    return features, ratings + 0.02 * rng.normal(size=(clips, 3))


def test_a_network_learns_and_repeats():
    new, truth = table(2)
    predicted = baselines.predict_mlp(*table(1), new, seed=0)
    assert np.diag(np.corrcoef(predicted.T, truth.T)[:3, 3:]).min() > 0.8
    np.testing.assert_array_equal(baselines.predict_mlp(*table(1), new, seed=0), predicted)
    assert (baselines.predict_mlp(*table(1), new, seed=1) != predicted).any()


def test_bad_tables_of_a_network_are_refused():
    features, ratings = table(1, clips=40)
    spoilt = features.copy()
    spoilt[5, 2] = np.nan
    with pytest.raises(InputError, match="row 5, column 2"):
        baselines.predict_mlp(spoilt, ratings, features, seed=0)
    with pytest.raises(InputError, match="row 5, column 2"):
        baselines.predict_mlp(features, ratings, spoilt, seed=0)
    with pytest.raises(InputError, match="39 of ratings"):
        baselines.predict_mlp(features, ratings[:39], features, seed=0)
    with pytest.raises(InputError, match="11 features"):
        baselines.predict_mlp(features, ratings, features[:, :11], seed=0)


def test_single_task_networks_are_those_of_each_dimension():
    features, ratings = table(1, clips=40)
    folds = np.arange(40) % 2
    both = baselines.fold_by_fold("mlp-single", features, ratings, folds, 3)["mlp-single"]
    second = baselines.fold_by_fold("mlp", features, ratings[:, [1]], folds, 3)["mlp"]
    assert both.shape == (40, 3)
    np.testing.assert_array_equal(both[:, [1]], second)


@pytest.mark.parametrize("baseline", ["mlp", "midi-stats"])
def test_a_fold_is_predicted_without_its_ratings_and_its_statistics(baseline, monkeypatch):
    monkeypatch.setitem(regressors.FOREST, "n_estimators", 3)
    features, ratings = table(1, clips=40)
    folds = np.arange(40) % 2
    folds[:4] = -1
    fitted = baselines.fold_by_fold(baseline, features, ratings, folds, 0)[baseline]
    spoilt, moved = ratings.copy(), features.copy()
    spoilt[(folds == 0) | (folds < 0)] += 100
    moved[np.flatnonzero(folds == 0)[1:]] += 1e3
    moved[folds < 0] = 1e6
    again = baselines.fold_by_fold(baseline, moved, spoilt, folds, 0)[baseline]
    first = np.flatnonzero(folds == 0)[0]
    np.testing.assert_allclose(again[first], fitted[first], rtol=1e-5)
    assert np.isnan(again[:4]).all() and np.isfinite(again[4:]).all()
    assert (again[folds == 1] != fitted[folds == 1]).any()


# --- Tables -------------------------------------------------------------------------------------


def test_tables_resume_and_are_never_stale(folder, tmp_path, monkeypatch, logged):
    midi = dict(list(percepiano.find_midi(folder).items())[:6])
    first = baselines.midi_table(midi, tmp_path, 1)
    assert list(first.index) == list(midi) and np.isfinite(first.to_numpy()).all()
    kept = pd.read_csv(tmp_path / "midi.csv")
    kept.drop(index=[1]).to_csv(tmp_path / "midi.csv", index=False)
    asked = []
    hear = baselines.midi_statistics
    monkeypatch.setattr(baselines, "midi_statistics", lambda path: asked.append(path) or hear(path))
    logged.clear()
    again = baselines.midi_table(midi, tmp_path, 1)
    assert asked == [list(midi.values())[1]] and "(5 cached)" in logged[0]
    pd.testing.assert_frame_equal(again, first)
    names = list(midi)
    exchanged = midi | {names[0]: midi[names[2]]}  # another file under the same name
    assert (
        baselines.midi_table(exchanged, tmp_path, 1)
        .loc[names[0]]
        .equals(first.loc[names[2]].rename(names[0]))
    )
    (tmp_path / "midi.csv").write_text("")
    with pytest.raises(InputError, match="delete it"):
        baselines.midi_table(midi, tmp_path, 1)


def test_a_clip_that_does_not_play_its_score_is_listed_and_the_others_kept(
    folder, tmp_path, logged
):
    midi, scores = (
        dict(list(percepiano.find_midi(folder).items())[:4]),
        percepiano.find_scores(folder),
    )
    names = list(midi)
    given = {clip: scores[percepiano.ClipName.of(clip).passage] for clip in names[:3]}
    empty = tmp_path / "empty.mid"
    mido.MidiFile().save(empty)
    found, left_out = baselines.score_table(midi, given | {names[1]: empty}, tmp_path, 1)
    assert list(found.index) == [names[0], names[2]] and np.isfinite(found.to_numpy()).all()
    assert left_out.keys() == {names[1], names[3]} and left_out[names[3]] == "it has no score"
    assert "no notes in this score" in left_out[names[1]]
    logged.clear()
    again, same = baselines.score_table(midi, given | {names[1]: empty}, tmp_path, 1)
    pd.testing.assert_frame_equal(again, found)
    assert same == left_out and not logged  # the refused row is kept as well
    moved, _ = baselines.score_table(
        midi, given | {names[0]: given[names[2]], names[1]: empty}, tmp_path, 1
    )
    # another score, another row
    assert "(3 cached)" not in "".join(logged) and names[2] in moved.index


# --- The whole ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    """Two protocols on the embedded data, by the command; and what it said."""
    out = tmp_path_factory.mktemp("baselines")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setitem(regressors.FOREST, "n_estimators", 10)
    call = [
        "baselines",
        "--percepiano",
        str(folder),
        "--out",
        str(out),
        "--synthesizers",
        "builtin",
        "--workers",
        "1",
    ]
    call += [
        "--baselines",
        "identity-segment-deadpan",
        "audio-stats",
        "mlp",
        "--protocol",
        "content",
    ]
    assert main(call) == 0
    yield out, call
    monkeypatch.undo()


def test_predictions_are_evaluated_like_any_others(made, folder):
    out, _ = made
    paths = sorted(out.glob("predictions_*.csv.gz"))
    assert {
        path.name.removeprefix("predictions_").removesuffix("_content.csv.gz") for path in paths
    } == {
        "audio-stats",
        "audio-stats-extratrees",
        "audio-stats-kernel",
        "audio-stats-ridge",
        "identity-segment-deadpan",
        "mlp",
    }
    index = load_index(out / "index.csv")
    assert {"leave_one_out", "leave_player_out"} < set(protocols(index))
    joined = validate_predictions(pd.concat([read_predictions(path) for path in paths]), index)
    assert joined.groupby("model").size().eq(len(index) * len(KEYS)).all()
    rated = percepiano.read_ratings(folder, index)
    truth = np.array(
        [
            rated[clip][KEYS.index(key)]
            for clip, key in zip(joined["clip"], joined["dimension"], strict=True)
        ]
    )
    np.testing.assert_allclose(joined["rating"], truth, atol=1e-6)
    scores = {model: mean_r(part) for model, part in joined.groupby("model")}
    assert scores["audio-stats"] > 0.3 and min(scores.values()) > -0.2


def test_the_same_command_continues_and_another_seed_is_refused(made, capsys):
    out, call = made
    (out / "predictions_identity-segment-deadpan_content.csv.gz").unlink()
    assert main(call) == 0
    said = capsys.readouterr().out
    assert (
        "audio-stats, content: already done" in said
        and "identity-segment-deadpan, content: done" in said
    )
    assert main([*call, "--seed", "1"]) == 2
    assert "another configuration (seed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--baselines", "guess"], "unknown baseline 'guess'"),
        (["--protocol", "nobody"], "no protocol 'nobody'"),
        (["--baselines", "identity-segment"], "identity-segment is undefined"),
        (["--baselines", "mlp", "--protocol", "leave_one_out"], "folds, too many"),
    ],
)
def test_what_cannot_be_made_is_said_in_one_line(made, change, message, capsys):
    _, call = made
    assert main(call + change) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_score_is_a_baseline_beside_the_playing_alone(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(regressors, "REGRESSORS", ("ridge",))
    wrong = next(iter(percepiano.find_midi(folder)))
    scores = percepiano.find_scores(folder)
    stranger = next(
        path for passage, path in scores.items() if passage != percepiano.ClipName.of(wrong).passage
    )
    known = scores | {percepiano.ClipName.of(wrong).passage: stranger}
    monkeypatch.setattr(percepiano, "find_scores", lambda _: known)
    baselines.run_baselines(
        folder,
        tmp_path,
        baselines.BaselineOptions(("content",), ("midi-stats", "midi-stats+score")),
    )
    alone, informed = (
        read_predictions(tmp_path / f"predictions_{name}_content.csv.gz")
        for name in ("midi-stats", "midi-stats+score")
    )
    left_out = pd.read_csv(tmp_path / "without_score.csv")
    assert (
        wrong in set(left_out["clip"])
        and left_out["reason"].str.contains("of the notes are in the score").all()
    )
    assert set(alone["clip"]) - set(informed["clip"]) == set(left_out["clip"])
    assert informed["prediction"].notna().all()


def test_what_says_nothing_is_listed(folder, tmp_path):
    settings = baselines.BaselineOptions(baselines=("identity-segment", "identity-additive"))
    baselines.run_baselines(folder, tmp_path, settings)
    listed = pd.read_csv(tmp_path / "left_out.csv")
    assert set(listed.loc[listed["baseline"] == "identity-segment", "protocol"]) >= {"content"}
    assert (tmp_path / "predictions_identity-segment_leave_one_out.csv.gz").exists()


# --- Real data ----------------------------------------------------------------------------------


@pytest.mark.real_data
def test_identity_baselines_are_those_of_the_research(percepiano_dir, tmp_path):
    for (baseline, protocol), r in IDENTITY.items():
        baselines.run_baselines(
            percepiano_dir, tmp_path, baselines.BaselineOptions((protocol,), (baseline,))
        )
        made = read_predictions(tmp_path / f"predictions_{baseline}_{protocol}.csv.gz")
        assert mean_r(made) == pytest.approx(r, abs=0.01), (baseline, protocol)


@pytest.mark.real_data
@pytest.mark.slow
def test_statistics_reach_the_floor_under_every_protocol(percepiano_dir, tmp_path):
    settings = baselines.BaselineOptions(
        tuple(RESEARCH["midi-stats"]), baselines.STATISTICS, workers=2
    )
    baselines.run_baselines(percepiano_dir, tmp_path, settings)
    for baseline, row in RESEARCH.items():
        for protocol, r in row.items():
            made = read_predictions(tmp_path / f"predictions_{baseline}_{protocol}.csv.gz")
            assert mean_r(made) > r - 0.02, (baseline, protocol)


@pytest.mark.slow
def test_of_an_unseen_piano_the_floor_of_a_run_learns_nothing_and_rates_nothing(folder, tmp_path):
    try:
        synth.make_synthesizer("timgm6mb")
    except InputError as reason:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(reason))
    demo_run = pipeline.Run(PRESETS["demo"], tmp_path)
    pipeline.preprocess_percepiano(demo_run, str(folder), ("builtin", "timgm6mb"))
    path = demo_run.percepiano / "classic_features.csv"

    def said(**config) -> bytes:
        finetune = dataclasses.replace(demo_run.preset.finetune, **config)
        changed = dataclasses.replace(
            demo_run, preset=dataclasses.replace(demo_run.preset, finetune=finetune)
        )
        pipeline.predict_baselines(changed, lambda line: None)
        return demo_run.predictions("audio-stats").read_bytes()

    both, without = said(), said(held_out_synthesizer="timgm6mb")
    heard = pd.read_csv(path)
    heard.loc[heard["synthesizer"] == "timgm6mb", heard.columns[2:]] = 0.0
    heard.to_csv(path, index=False)
    assert both != without == said(held_out_synthesizer="timgm6mb")
