"""What a model's errors are made of. Cost: 2 s."""

import numpy as np
import pandas as pd
import pytest
from predictions import make_index, make_predictions

from percepiano_ast.dimensions import KEYS
from percepiano_ast.evaluation import analysis, predictions


@pytest.fixture(scope="module")
def index():
    """Twenty groups, each player in all of them."""
    index = make_index(n_groups=20, players=10)
    return index.assign(
        player=index["clip"].str.split("p").str[1],
        composition=np.where(index["content_group"] < "g05", "A", "B"),
    )


def runs_with(index, added):
    """A run that is right but for what is added, in standard deviations of the ratings,
    (clips,)."""
    rows = make_predictions(index, {"mlp": 0.0})
    spread = rows.groupby("dimension")["rating"].transform(lambda values: values.std(ddof=0))
    return predictions.runs(
        rows.assign(prediction=rows["rating"] + np.repeat(added, len(KEYS)) * spread), index
    )


def levels(index, column, size=1.0):
    """One number of this size, up or down, a group or player."""
    return size * (-1.0) ** pd.factorize(index[column])[0]


@pytest.mark.parametrize(("column", "part"), [("content_group", "passage"), ("player", "player")])
def test_errors_that_a_passage_or_a_player_shares_are_found_as_such(index, column, part):
    found = (
        analysis.error_components(runs_with(index, levels(index, column, 0.5)), index)
        .set_index("dimension")
        .loc["mean"]
    )
    assert found["all"] == pytest.approx(0.25) and found[part] == pytest.approx(0.25, abs=1e-6)
    assert found[["noise", "passage", "player", "clip"]].sum() == pytest.approx(0.25, abs=1e-6)


def test_what_is_drawn_for_each_clip_is_neither_passages_nor_players_though_they_are_few(index):
    draw = np.random.default_rng(0).normal(size=len(index))
    found = (
        analysis.error_components(runs_with(index, draw), index).set_index("dimension").loc["mean"]
    )
    assert (
        found["clip"] == pytest.approx(1.0, abs=0.12)
        and found["passage"] < 0.05
        and found["player"] < 0.05
    )


def test_disagreement_between_raters_is_taken_out_of_the_clips_share(index):
    ceiling = pd.DataFrame({"overall": 0.8}, index=list(KEYS))
    draw = np.random.default_rng(0).normal(size=len(index))
    with_noise, without = (
        analysis.error_components(runs_with(index, draw), index, known).iloc[0]
        for known in (ceiling, None)
    )
    assert with_noise["noise"] == pytest.approx(0.36) and with_noise["clip"] == pytest.approx(
        without["clip"] - 0.36
    )


def test_without_players_theirs_is_in_the_clips_share(index):
    runs = runs_with(index, levels(index, "player"))
    found = analysis.error_components(runs, index.drop(columns="player")).iloc[0]
    assert found["player"] == 0 and found["clip"] == pytest.approx(1.0, abs=0.1)


def test_kinds_of_clips_have_the_error_of_their_own(index):
    added = np.where(index["composition"] == "A", 2.0, 0.5)
    found = analysis.errors_by_kind(runs_with(index, added), index).set_index("value")
    assert found.loc["A", "error"] == pytest.approx(2.0) and found.loc[
        "B", "error"
    ] == pytest.approx(0.5)
    assert (
        found.loc["A", "clips"] == (index["composition"] == "A").sum() and "people" in found.index
    )


def test_models_that_lack_the_same_share_their_errors(index):
    draw = np.random.default_rng(1)
    a, other = draw.normal(size=(2, len(index)))
    three = [
        run._replace(model=name)
        for name, added in {"a": a, "b": 2 * a, "c": other}.items()
        for run in runs_with(index, added)
    ]
    found = analysis.shared_errors(three).set_index(["model_a", "model_b"])["correlation"]
    assert found["a", "b"] == pytest.approx(1.0) and abs(found["a", "c"]) < 0.15
