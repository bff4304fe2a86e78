"""Ratings of one's own through the command line: learned, resumed, rated with, refused in words.
Cost: about 30 s."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest
import soundfile
from tiny import FINETUNE, FRONT_END, MODEL, STATISTICS, compiled_once

from percepiano_ast import notebook, pipeline, plots
from percepiano_ast.cli import main
from percepiano_ast.config import PRESETS
from percepiano_ast.dimensions import KEYS, PERCEPIANO, RatingScale
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation import analysis
from percepiano_ast.inference.rate import FoldEnsemble
from percepiano_ast.models.heads import RatingHead
from percepiano_ast.studies.sensitivity import RunRater
from percepiano_ast.training.checkpoints import Checkpoints
from percepiano_ast.training.finetune import Finetuning, fit_heads

RATE = 22_050
DIMENSIONS = ("Loudness", "would go again")


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(tmp_path_factory):
    with compiled_once(tmp_path_factory.getbasetemp() / "compiled"):
        yield


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    """A run with the checkpoint of an encoder, as pre-training leaves it before its first step."""
    root, preset = tmp_path_factory.mktemp("run"), PRESETS["demo"]
    params = Finetuning(preset.model, FINETUNE, FRONT_END, STATISTICS, 1).init(0)
    made = {
        "front_end": dataclasses.asdict(FRONT_END),
        "statistics": dataclasses.asdict(STATISTICS),
    }
    with Checkpoints(root / "pretrain" / "ssast" / "checkpoints") as checkpoints:
        checkpoints.save(1, {"state": {"params": {"encoder": params["encoder"]}, "ema": {}}}, made)
    return root


def write_recordings(home: Path, n: int = 24) -> tuple[Path, Path]:
    """Noises of six pianists, each louder than the one before; how loud is rated from 0 to 100, and
    a matter of taste."""
    folder, rng = home / "takes", np.random.default_rng(0)
    folder.mkdir()
    rows = []
    for number in range(n):
        level = rng.uniform(0, 1)
        soundfile.write(
            folder / f"take {number:02d}.wav",
            10 ** (2 * level - 3) * rng.standard_normal(RATE),
            RATE,
        )
        rated = {"Loudness": round(100 * level), "would go again": rng.integers(1, 6)}
        rows.append({"clip": f"take {number:02d}", "pianist": f"p{number % 6}"} | rated)
    pd.DataFrame(rows).to_csv(home / "ratings.csv", index=False)
    return folder, home / "ratings.csv"


def finetune(root: Path, folder: Path, csv: Path, *options) -> int:
    arguments = [
        "finetune",
        "--out",
        root,
        "--recordings",
        folder,
        "--ratings",
        csv,
        "--group",
        "pianist",
        *options,
    ]
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def material(tmp_path_factory) -> tuple[Path, Path]:
    return write_recordings(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def learned(pretrained, material) -> Path:
    """The run of a finished fine-tuning."""
    assert finetune(pretrained, *material) == 0
    return pretrained / "own" / "ratings"


class TestLearning:
    def test_what_can_be_heard_is_learned_on_held_out_groups(self, learned):
        table = pd.read_csv(learned / "predictions_ast-micro-ssast.csv")
        assert table.groupby("dimension")["clip"].nunique().to_dict() == dict.fromkeys(
            DIMENSIONS, 24
        )
        pianist = table["clip"].str.extract(r"(\d+)")[0].astype(int) % 6
        assert table.groupby(pianist)["fold"].nunique().eq(1).all() and table["fold"].nunique() == 5
        result = pd.read_csv(learned / "result_ast-micro-ssast.csv").set_index("dimension")
        assert (
            tuple(result.index) == DIMENSIONS
            and (result["clips"] == 24).all()
            and (result["groups"] == 6).all()
        )
        loud, taste = result.loc["Loudness"], result.loc["would go again"]
        assert loud["r"] > 0.8 and loud["low"] > 0 and loud["mae"] < 0.6 * loud["mae_of_mean"]
        assert taste["r"] < 0.5 and taste["low"] < 0

    def test_a_second_run_finds_everything_and_says_what_it_is_worth(
        self, learned, material, capsys
    ):
        before = (learned / "predictions_ast-micro-ssast.csv").read_bytes()
        assert finetune(learned.parent.parent, *material) == 0
        printed = capsys.readouterr().out
        assert (
            "epoch" not in printed
            and (learned / "predictions_ast-micro-ssast.csv").read_bytes() == before
        )
        assert (
            "1 of 2 dimensions are predicted above chance on held-out groups (interval of r above"
            " 0): Loudness." in printed
        )
        assert "24 clips in 6 groups" in printed and f"rate FILE --run {learned}" in printed

    def test_other_ratings_under_the_same_name_are_refused(
        self, learned, material, tmp_path, capsys
    ):
        table = pd.read_csv(material[1])
        table.loc[0, "Loudness"] += 1
        table.to_csv(tmp_path / "ratings.csv", index=False)
        assert finetune(learned.parent.parent, material[0], tmp_path / "ratings.csv") == 2
        assert "holds the output of another configuration (ratings: " in capsys.readouterr().err

    def test_status_lists_it(self, learned):
        rows = notebook.status(pipeline.Run(PRESETS["demo"], learned.parent.parent))
        folds = rows[rows["item"].str.startswith("ratings: ast-micro-ssast, fold")]
        assert len(folds) == 5 and set(folds["integrity"]) == {"intact (manifest)"}
        assert "predictions_ast-micro-ssast.csv" in set(rows["item"])

    def test_evaluate_names_the_place_where_they_are_evaluated(self, learned, tmp_path, capsys):
        assert (
            main(
                [
                    "evaluate",
                    str(learned / "predictions_ast-micro-ssast.csv"),
                    "--out",
                    str(tmp_path),
                ]
            )
            == 2
        )
        assert (
            "line 2: dimension is 'Loudness'" in (said := capsys.readouterr().err)
            and "finetune --ratings" in said
        )

    def test_the_unit_of_the_ratings_makes_no_difference(self):
        rng = np.random.default_rng(0)
        embeddings = rng.normal(size=(20, 2 * MODEL.grid[0] * MODEL.width)).astype(np.float32)
        ratings, scale = rng.uniform(0, 1, (20, 2)).astype(np.float32), np.float32([1e4, 1e-7])
        found = []
        for given in (ratings, scale * ratings - 5 * scale):
            asked = RatingScale.own(DIMENSIONS, given.min(axis=0), given.max(axis=0))
            config = dataclasses.replace(FINETUNE, head="joint", rating_scale="dimension")
            run = Finetuning(MODEL, config, FRONT_END, STATISTICS, 12, questionnaire=asked)
            params = {"encoder": {}, "head": run.init_head(0)}
            trained, scaler = fit_heads(run, params, embeddings, ratings=given, train=np.arange(16))
            found.append(run.rate(trained, scaler, embeddings))
        np.testing.assert_allclose(found[1] / scale + 5, found[0], atol=1e-3)
        assert found[0].std(axis=0).min() > 0.01

    @pytest.mark.parametrize("kind", ["joint", "grouped", "attention"])
    def test_every_head_can_be_asked_anything(self, kind):
        asked = RatingScale.own(("a", "b.c", "d/e"), (0, 0, 0), (1, 10, 100))
        head = RatingHead(hidden=8, bands=4, kind=kind, uncertain=True, questionnaire=asked)
        embedding = np.ones((5, 2 * 4 * 6), np.float32)
        make = jax.jit(head.init_with_output, static_argnames="method")
        (means, variances), _ = make(jax.random.key(0), embedding, method="distribution")
        assert means.shape == variances.shape == (5, 3)

    def test_a_questionnaire_comes_back_from_the_settings_of_a_model(self):
        asked = RatingScale.own(DIMENSIONS, (0.0, 1.0), (100.0, 5.0))
        assert (
            RatingScale.from_settings(json.loads(json.dumps({"seed": 0} | asked.as_settings())))
            == asked
        )
        assert (
            PERCEPIANO.as_settings() == {}
            and RatingScale.from_settings({"dimensions": list(KEYS)}) == PERCEPIANO
        )


@pytest.fixture(scope="module")
def heard(tmp_path_factory) -> dict[str, Path]:
    """Recordings that nobody has rated: soft, loud, and a long one."""
    home, rng, found = tmp_path_factory.mktemp("heard"), np.random.default_rng(9), {}
    for name, level, seconds in (("soft", -2.8, 1), ("loud", -1.2, 1), ("long", -2, 3)):
        found[name] = home / f"{name}.wav"
        soundfile.write(found[name], 10**level * rng.standard_normal(seconds * RATE), RATE)
    return found


class TestRating:
    def test_further_recordings_are_rated_in_the_unit_of_the_ratings(self, learned, heard, capsys):
        assert (
            main(["rate", str(heard["soft"]), str(heard["loud"]), "--run", str(learned), "--json"])
            == 0
        )
        soft, loud = json.loads(capsys.readouterr().out)
        assert tuple(soft["ratings"]) == tuple(soft["uncertainty"]) == DIMENSIONS
        assert soft["ratings"]["Loudness"] < 35 and loud["ratings"]["Loudness"] > 65
        assert 1 < soft["ratings"]["would go again"] < 5 and not soft["warnings"]

    def test_the_text_goes_from_the_lowest_rating_to_the_highest(self, learned, heard, capsys):
        assert main(["rate", str(heard["long"]), "--run", str(learned)]) == 0
        _, length, note, loud, taste = capsys.readouterr().out.rstrip().split("\n")
        assert length == "  0:03" and "3 s long; the longest training clip has 1 s" in note
        given = FoldEnsemble(learned).scale
        assert (
            loud.split()[:2] == ["Loudness", f"{given.lowest[0]:g}"]
            and f" {given.highest[0]:g} " in loud
        )
        assert taste.lstrip().startswith("would go again ") and "●" in loud

    def test_beyond_the_scale_is_said_and_not_clipped(self, learned, heard):
        rater = FoldEnsemble(learned)
        asked = rater.scale
        rater.scale = dataclasses.replace(asked, highest=(20.0, asked.highest[1]))
        result = rater.rate(heard["loud"])
        assert result.ratings["Loudness"] > 65
        (warning,) = result.warnings
        assert (
            warning.startswith("Loudness is ")
            and "outside the scale of the training ratings" in warning
        )

    def test_what_knows_percepiano_alone_says_so(self, learned, heard, tmp_path, capsys):
        arguments = [
            "explain",
            heard["soft"],
            "--run",
            learned,
            "--dimension",
            "Loudness",
            "--out",
            tmp_path / "why",
        ]
        assert main([str(argument) for argument in arguments]) == 2
        assert "explain supports only PercePiano's 19 dimensions" in capsys.readouterr().err
        with pytest.raises(
            InputError,
            match=r"custom ratings \(Loudness, would go again\), but sensitivity supports only",
        ):
            RunRater(learned, TestEvaluation.INDEX)


class TestRefused:
    @pytest.fixture
    def made(self, material, tmp_path) -> tuple[Path, Path]:
        shutil.copytree(material[0], tmp_path / "takes")
        shutil.copy(material[1], tmp_path / "ratings.csv")
        return tmp_path / "takes", tmp_path / "ratings.csv"

    def refused(self, capsys, *arguments) -> str:
        assert finetune(*arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        return line

    @pytest.mark.parametrize(
        ("row", "column", "value", "message"),
        [
            (3, "Loudness", "", "line 5: Loudness of 'take 03' is empty. Enter a number"),
            (3, "Loudness", "loud", "line 5: Loudness of 'take 03' is 'loud'. Enter a number"),
            (3, "pianist", "", "line 5: pianist is empty"),
            (3, "clip", "take 02", "line 5: clip 'take 02' has a row already"),
            (3, "clip", "take 99", "1 clips (take 99) are rated in"),
            (slice(None), "pianist", "she", "all clips in one group, 'she'"),
            (slice(None), "Loudness", "3", "Loudness is 3 for every clip"),
        ],
    )
    def test_bad_rows(self, made, tmp_path, capsys, row, column, value, message):
        table = pd.read_csv(made[1], dtype=str)
        table.loc[row, column] = value
        table.to_csv(made[1], index=False)
        assert message in self.refused(capsys, tmp_path / "run", *made)

    def test_recordings_without_ratings_and_too_few(self, made, tmp_path, capsys):
        table = pd.read_csv(made[1])
        table.iloc[1:].to_csv(made[1], index=False)
        assert "1 clips (take 00) are in" in self.refused(capsys, tmp_path / "run", *made)
        for path in sorted(made[0].iterdir())[19:]:
            path.unlink()
        table.iloc[:19].to_csv(made[1], index=False)
        assert "rates 19 clips. Training and testing need at least 20" in self.refused(
            capsys, tmp_path / "run", *made
        )

    def test_silence(self, pretrained, made, tmp_path, capsys):
        shutil.copytree(pretrained / "pretrain", tmp_path / "run" / "pretrain")
        soundfile.write(made[0] / "take 03.wav", np.zeros(RATE), RATE)
        assert "take 03.wav" in self.refused(capsys, tmp_path / "run", *made)

    def test_no_encoder_yet(self, made, tmp_path, capsys):
        assert "Run notebook 02" in self.refused(capsys, tmp_path / "run", *made)

    def test_a_scale_that_units_would_break(self, made, tmp_path, capsys):
        line = self.refused(capsys, tmp_path / "run", *made, "--set", "rating_scale=none")
        assert "rating_scale=none: dimensions of custom ratings may have different units" in line

    @pytest.mark.parametrize(
        "named",
        [["--ratings", "x.csv"], ["--dimensions", "pace"], ["--ratings", "demo", "--group", "x"]],
    )
    def test_half_of_what_is_needed(self, named, tmp_path, capsys):
        assert main(["finetune", "--out", str(tmp_path), *named]) == 2
        assert "folder of recordings" in capsys.readouterr().err.split("missing: ")[1]


def predictions(index: pd.DataFrame, rating: np.ndarray, prediction: np.ndarray) -> pd.DataFrame:
    """A table of the dimensions ``b`` and ``a``, in this order, rows shuffled within each clip's
    fold."""
    parts = [
        pd.DataFrame(
            {
                "model": "x",
                "protocol": "content",
                "seed": 0,
                "fold": index["fold_content"],
                "clip": index["clip"],
                "dimension": name,
                "rating": rating[:, column],
                "prediction": prediction[:, column],
            }
        )
        for column, name in enumerate(("b", "a"))
    ]
    return pd.concat(part.sample(frac=1, random_state=0) for part in parts)


class TestEvaluation:
    INDEX = pd.DataFrame(
        {
            "clip": [f"c{k:02d}" for k in range(20)],
            "segment": [f"g{k // 5}" for k in range(20)],
            "content_group": [f"g{k // 5}" for k in range(20)],
            "human": True,
            "fold_content": np.arange(20) // 10,
        }
    )

    def test_numbers_are_those_of_their_definitions(self):
        rating, prediction = np.random.default_rng(1).uniform(0, 100, (2, 20, 2))
        prediction += rating
        found = analysis.few_shot_table(predictions(self.INDEX, rating, prediction), self.INDEX)
        assert (
            found["dimension"].tolist() == ["b", "a"]
            and list(found.columns) == analysis.FEW_SHOT_COLUMNS
        )
        others = np.where(
            np.arange(20)[:, None] < 10, rating[10:].mean(axis=0), rating[:10].mean(axis=0)
        )
        for column in range(2):
            row = found.iloc[column]
            given, said = rating[:, column], prediction[:, column]
            assert (
                row["r"] == pytest.approx(np.corrcoef(given, said)[0, 1])
                and row["low"] < row["r"] < row["high"]
            )
            assert row["mae"] == pytest.approx(np.abs(given - said).mean())
            assert row["mae_of_mean"] == pytest.approx(np.abs(given - others[:, column]).mean())
            centred = [part - part.reshape(4, 5).mean(axis=1).repeat(5) for part in (given, said)]
            assert row["r_within_groups"] == pytest.approx(np.corrcoef(*centred)[0, 1])

    def test_few_clips_that_say_nothing_have_no_number_and_a_sentence(self):
        index = self.INDEX.assign(content_group=self.INDEX["clip"], segment=self.INDEX["clip"])
        rating = np.random.default_rng(1).uniform(0, 100, (20, 2))
        prediction = rating.copy()
        prediction[:, 1] = 7.3
        found = analysis.few_shot_table(predictions(index, rating, prediction), index)
        assert found["r"].isna().tolist() == [False, True] and found["r_within_groups"].isna().all()
        lines = analysis.few_shot_remarks(found, index)
        assert "a: r is undefined because the predictions are constant." in lines
        assert any(line.startswith("20 groups have fewer") for line in lines)
        assert (
            lines[1]
            == "1 of 2 dimensions have a lower mean absolute error than predicting the mean: b."
        )

    def test_two_groups_are_enough_for_an_interval_and_too_few_to_trust(self):
        index = self.INDEX.assign(content_group=np.where(np.arange(20) < 10, "x", "y"))
        rating, noise = np.random.default_rng(1).uniform(0, 100, (2, 20, 2))
        found = analysis.few_shot_table(predictions(index, rating, rating + noise), index)
        assert (
            (found["groups"] == 2).all()
            and (found["low"] < found["r"]).all()
            and (found["r"] < found["high"]).all()
        )
        assert any(
            line.startswith("20 clips in 2 groups: ")
            for line in analysis.few_shot_remarks(found, index)
        )

    def test_the_mean_of_the_others_is_not_called_a_skill_turned_round(self):
        """What a model says that hears nothing: r is below zero, interval and all."""
        rating = (
            np.random.default_rng(1).uniform(0, 100, (20, 2)) + np.arange(20)[:, None] // 10 * 60
        )
        others = np.where(
            np.arange(20)[:, None] < 10, rating[10:].mean(axis=0), rating[:10].mean(axis=0)
        )
        found = analysis.few_shot_table(predictions(self.INDEX, rating, others), self.INDEX)
        assert (found["high"] < 0).all() and found["mae"].tolist() == pytest.approx(
            found["mae_of_mean"].tolist()
        )
        (line,) = [
            line
            for line in analysis.few_shot_remarks(found, self.INDEX)
            if "the interval of r is below 0" in line
        ]
        assert line.startswith("b, a: ")


def test_a_figure_draws_a_panel_a_dimension_and_says_what_it_leaves_out():
    index, values = TestEvaluation.INDEX, np.random.default_rng(0).uniform(0, 5, (20, 2))
    table = predictions(index, values, values[::-1])
    figure = plots.custom_ratings(table, "Mine")
    assert [axes.get_title() for axes in figure.axes if axes.get_visible()] == ["b", "a"]
    assert figure.axes[0].get_legend_handles_labels()[1] == [
        "held out in fold 0",
        "held out in fold 1",
    ]
    figure = plots.custom_ratings(table, "Mine", most=1)
    assert figure.get_suptitle() == "Mine; 1 more dimensions are not drawn"
    with pytest.raises(InputError, match="cannot draw: .'prediction'. missing"):
        plots.custom_ratings(table.drop(columns="prediction"))


def test_recordings_of_ones_own_are_learned_from_whatever_piano_was_to_be_unseen(tmp_path):
    run = pipeline.Run(PRESETS["demo"], tmp_path).switched(["unseen=timgm6mb"])
    assert (
        run.preset.finetune.held_out_synthesizer == "timgm6mb"
        and pipeline.few_shot_run(run).preset.finetune.held_out_synthesizer == ""
    )
