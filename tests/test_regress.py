"""Regressors on what an encoder hears. Cost: 40 s, most of it compiling and fitting."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file, save_file
from tiny import FINETUNE, FRONT_END, MODEL, STATISTICS, codes_of

from percepiano_ast.config import PRESETS
from percepiano_ast.data.batches import RatedClips
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation import predictions
from percepiano_ast.evaluation.predictions import COLUMNS
from percepiano_ast.inference import regressors, transcribe
from percepiano_ast.music.midi import NOTE, PEDAL, Performance
from percepiano_ast.music.performance_features import PERFORMANCE_FEATURES
from percepiano_ast.pipeline import regress, steps
from percepiano_ast.pipeline.run import INITS, EncoderInit, Run, transcribes

CLIPS, PIANOS = 24, ("builtin", "other")
QUIET = dataclasses.replace(FINETUNE, held_out_synthesizer="other")


class Listener:
    """Hears one note more in every clip, and none in the third; counts how often it was asked."""

    asked = 0

    def transcribe_all(self, clips):
        self.asked += 1
        played = []
        for number in range(len(clips)):
            notes = [
                (0.5 * k, 0.5 * k + 0.3, 50 + (7 * k + number) % 20, 40 + number)
                for k in range(5 + number)
            ]
            played.append(
                None if number == 2 else Performance(np.array(notes, NOTE), np.zeros(0, PEDAL))
            )
        return played


@dataclasses.dataclass(frozen=True, eq=False)
class Hearing(steps.CrossValidation):
    ear: Listener = dataclasses.field(default_factory=Listener)

    @property
    def transcriber(self):
        return self.ear


def make_rated(root) -> Hearing:
    clips = np.repeat([f"clip {k}" for k in range(CLIPS)], 2)
    ratings = np.repeat(
        np.linspace(0.2, 0.8, CLIPS)[:, None] + np.linspace(0, 0.1, 19)[None, :], 2, axis=0
    ).astype(np.float32)
    codes = [codes_of(row // 2, 64)[0] for row in range(2 * CLIPS)]
    index = pd.DataFrame(
        {
            "clip": clips[::2],
            "content_group": np.arange(CLIPS) // 2,
            "human": True,
            "segment": "a",
            "fold_content": np.arange(CLIPS) // 2 % 2,
        }
    )
    run = Run(dataclasses.replace(PRESETS["demo"], model=MODEL), root)
    start = EncoderInit("ast-test-transcription", MODEL, FRONT_END, STATISTICS, None, "sum", {})
    found = Hearing(
        run,
        start,
        QUIET,
        RatedClips(codes, clips, np.tile(PIANOS, CLIPS), ratings),
        FRONT_END,
        index,
    )
    found.__dict__["params"] = found.trainer(1).init(0)
    return found


@pytest.fixture(scope="module")
def listened(tmp_path_factory):
    found = make_rated(tmp_path_factory.mktemp("judged"))
    return found, regress.transcribe_clips(found)


def test_what_was_heard_is_kept_as_long_as_encoder_and_clips_are_the_same(listened):
    found, first = listened
    again = regress.transcribe_clips(found)
    assert found.ear.asked == 1
    np.testing.assert_array_equal(again.embeddings, first.embeddings)
    assert regress.transcribe_clips(found, embed=False).embeddings is None
    assert first.played[2] is None and [len(one.notes) for one in first.played[3:6]] == [8, 9, 10]
    other = dataclasses.replace(found, start=dataclasses.replace(found.start, weights="another"))
    other.__dict__["params"] = found.params
    regress.transcribe_clips(other)
    assert found.ear.asked == 2
    regress.transcribe_clips(found)
    assert found.ear.asked == 3


def test_descriptors_are_those_of_what_was_heard(listened):
    found, what = listened
    values = transcribe.features_of(what.played).values
    assert values.shape == (2 * CLIPS, len(PERFORMANCE_FEATURES)) and np.isfinite(values).all()
    np.testing.assert_allclose(values[2], np.delete(values, 2, axis=0).mean(axis=0), rtol=1e-4)


@pytest.fixture(scope="module")
def predicted(listened, tmp_path_factory):
    found, what = listened
    rng, home = np.random.default_rng(0), tmp_path_factory.mktemp("predictions")
    truth = found.clips.ratings[:, :1]
    noise = lambda *shape: rng.normal(size=shape)  # noqa: E731
    # The notes tell the ratings; sound, embedding and score are noise. The unseen piano turns them
    # round.
    parts = {
        "notes": np.column_stack(
            [np.where(found.unseen[:, None], 1 - truth, truth), noise(2 * CLIPS, 2)]
        )
    }
    parts |= {
        "sound": noise(2 * CLIPS, 30),
        "embedding": noise(2 * CLIPS, 40),
        "score": noise(2 * CLIPS, 3),
    }
    groups = np.repeat(found.index["content_group"].to_numpy(), 2)
    material = regress.RegressionData(
        parts, found.clips.ratings.astype(float), groups, found.unseen
    )
    given = found, material, home, "content"
    return home, given, regress.regress_protocol(*given)


def test_what_was_chosen_is_evaluated_beside_the_heads(tmp_path):
    names = ["notes", "judged", "judged+score", "judged@other"]
    made = [
        f"judged/ast-a/predictions_ast-a-{name}_{protocol}.csv.gz"
        for name in names
        for protocol in ("content", "segment")
    ]
    for name in ["predictions_ast-a.csv", *made]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [path.name for path in steps.predicted(Run(PRESETS["demo"], tmp_path))]
    assert found == [
        "predictions_ast-a.csv",
        *sorted(f"predictions_ast-a-{name}_content.csv.gz" for name in names[1:]),
    ]


def test_only_what_learned_to_hear_notes_is_judged():
    heard = {init for init in INITS if transcribes(init)}
    assert heard == {"transcription", "joint", "transcriptionstem"}


def test_every_set_and_the_choice_are_predicted_for_seen_and_unseen_pianos(predicted):
    home, given, paths = predicted
    models = {
        path.name.removeprefix("predictions_ast-test-transcription-").removesuffix(
            "_content.csv.gz"
        )
        for path in paths
    }
    names = {*regress.FEATURE_SETS, regress.JUDGED, "judged+score"}
    assert models == names | {f"{name}@other" for name in names}
    for path in paths:
        table = pd.read_csv(path)
        assert (
            list(table.columns) == COLUMNS
            and len(table) == CLIPS * 19
            and table["clip"].nunique() == CLIPS
        )
    assert regress.regress_protocol(*given) == paths


def test_the_choice_is_made_by_the_training_clips_and_the_unseen_piano_teaches_nothing(predicted):
    home, _, paths = predicted
    assert set(pd.read_json(home / "chosen_content.json").loc["chosen"]) == {"notes"}
    r = {path.name: pd.read_csv(path)[["rating", "prediction"]].corr().iloc[0, 1] for path in paths}
    assert r["predictions_ast-test-transcription-judged_content.csv.gz"] > 0.6
    assert r["predictions_ast-test-transcription-judged@other_content.csv.gz"] < 0
    assert r["predictions_ast-test-transcription-embedding_content.csv.gz"] < 0.5


def test_of_several_pianos_each_is_predicted_by_itself_too(listened, tmp_path):
    found = dataclasses.replace(
        listened[0], config=dataclasses.replace(QUIET, held_out_synthesizer="")
    )
    noise = np.random.default_rng(4).normal(size=(2 * CLIPS, 3))
    groups = np.repeat(found.index["content_group"].to_numpy(), 2)
    parts = dict.fromkeys(("notes", "sound", "embedding", "score"), noise)
    material = regress.RegressionData(
        parts, found.clips.ratings.astype(float), groups, found.unseen
    )
    paths = regress.regress_protocol(found, material, tmp_path, "content")
    said = {
        path.name.split("transcription-")[1]: pd.read_csv(path)["prediction"]
        for path in paths
        if "-judged" in path.name
    }
    names = ["judged", "judged@builtin", "judged@other"]
    assert set(said) == {f"{name}_content.csv.gz" for name in ["judged+score", *names]}
    both, *each = (said[f"{name}_content.csv.gz"] for name in names)
    np.testing.assert_allclose((each[0] + each[1]) / 2, both, atol=2e-4)
    assert (each[0] - each[1]).abs().max() > 1e-3


def test_an_ensemble_is_the_mean_of_all_seeds_of_a_model():
    def said(model, seed, *values):
        run = {
            "model": model,
            "protocol": "content",
            "seed": seed,
            "fold": 0,
            "dimension": "pedal_dry_wet",
            "rating": 0.5,
        }
        return pd.DataFrame(
            [run | {"clip": f"clip {k}", "prediction": value} for k, value in enumerate(values)]
        )[COLUMNS]

    rows = pd.concat(
        [
            said("a-judged@b", 1, 0.2, 0.3),
            said("a-judged@b", 2, 0.4, 0.6),
            said("a-judged", 1, 0.1, 0.1),
        ]
    )
    made = predictions.ensemble(rows, "judged")
    assert made.columns.to_list() == COLUMNS and made["prediction"].to_list() == pytest.approx(
        [0.3, 0.45]
    )
    assert set(made["model"]) == {"a-judged-ensemble@b"} and set(made["seed"]) == {1}
    with pytest.raises(InputError, match="a-judged, content: clip 1 is not rated by all 2 seeds"):
        predictions.ensemble(pd.concat([rows, said("a-judged", 2, 0.1)]), "judged")
    assert predictions.ensemble(rows[rows["seed"] == 1], "judged").empty


def test_an_encoder_that_hears_no_notes_is_refused(listened):
    found, _ = listened
    deaf = steps.CrossValidation(
        found.run,
        dataclasses.replace(found.start, transcription=None),
        found.config,
        found.clips,
        FRONT_END,
        found.index,
    )
    with pytest.raises(InputError, match="was not pre-trained to transcribe"):
        regress.transcribe_clips(deaf)


def test_the_inner_error_tells_which_features_are_worth_more():
    rng = np.random.default_rng(1)
    ratings, groups = rng.normal(size=(60, 2)), np.arange(60) // 6
    good = regressors.inner_error(ratings + 0.3 * rng.normal(size=(60, 2)), ratings, groups, seed=0)
    bad = regressors.inner_error(rng.normal(size=(60, 2)), ratings, groups, seed=0)
    assert good < 0.5 < bad


@pytest.fixture(scope="module")
def fitted():
    rng = np.random.default_rng(2)
    features = rng.normal(size=(120, 12))
    ratings = 0.5 + 0.1 * np.stack(
        [features[:, 0], np.tanh(features[:, 1]), features[:, 2] * features[:, 3]], axis=1
    )
    return regressors.fit(features, ratings, seed=0), rng.normal(size=(300, 12))


def test_what_is_packed_rates_as_it_did_before(fitted, tmp_path):
    model, features = fitted
    arrays = {name: np.ascontiguousarray(values) for name, values in regressors.pack(model).items()}
    save_file(arrays, tmp_path / "model.safetensors")
    each = regressors.RegressorEnsemble(load_file(tmp_path / "model.safetensors")).predict(features)
    for ours, (name, theirs) in zip(each, model.predict_each(features).items(), strict=True):
        error = np.abs(ours - theirs) / model.rating_std
        assert error.max() < 0.03 and error.mean() < 2e-3, name


def test_a_packed_model_refuses_other_features(fitted):
    model, features = fitted
    with pytest.raises(InputError, match="11 features per clip, but the model was fitted on 12"):
        regressors.RegressorEnsemble(regressors.pack(model)).predict(features[:, 1:])


def test_a_small_forest_is_as_asked(fitted):
    rng = np.random.default_rng(3)
    features = rng.normal(size=(60, 3))
    small = regressors.fit(
        features, features[:, :2], seed=0, forest={"n_estimators": 7, "min_samples_leaf": 9}
    )
    (trees,) = small.models["extratrees"]
    assert (
        len(trees.estimators_) == 7
        and min(tree.tree_.n_node_samples.min() for tree in trees.estimators_) >= 9
    )


def test_more_passages_to_learn_from_are_worth_more_where_each_has_its_own_level(tmp_path):
    found, rng = make_rated(tmp_path), np.random.default_rng(0)
    x = rng.normal(size=(2 * CLIPS, 6))
    ratings = (x @ rng.normal(size=(6, 19)) + 0.1 * rng.normal(size=(2 * CLIPS, 19))) / 10 + 0.5
    groups = found.index.set_index("clip").loc[found.clips.clip, "content_group"].to_numpy()
    found = dataclasses.replace(found, clips=dataclasses.replace(found.clips, ratings=ratings))
    material = regress.RegressionData({"notes": x, "sound": x}, ratings, groups, found.unseen)
    whole = regress.curve_point(found, material, groups, 1.0, 0)
    few = [
        regress.curve_point(found, material, groups, 0.25, draw) for draw in range(regress.DRAWS)
    ]
    assert np.mean(few) < whole < 1.0 and len(set(few)) > 1
    assert few == [
        regress.curve_point(found, material, groups, 0.25, draw) for draw in range(regress.DRAWS)
    ]
