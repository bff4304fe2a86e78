"""Rating recordings with the folds of a fine-tuned run. About 25 s."""

import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
from tiny import CLIPS, FINETUNE, FRONT_END, STATISTICS, compiled_once, embed, finetuning, fold_to

from percepiano_ast import audio
from percepiano_ast.dimensions import DIMENSIONS, KEYS
from percepiano_ast.errors import InputError
from percepiano_ast.files import write_signed_json
from percepiano_ast.inference.rate import FoldEnsemble, load_model, rate_files
from percepiano_ast.inference.rating import to_text
from percepiano_ast.models.cnn import CNNConfig
from percepiano_ast.studies.explain import model_functions
from percepiano_ast.training.checkpoints import Checkpoints, open_latest
from percepiano_ast.training.finetune import Finetuning


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(tmp_path_factory):
    with compiled_once(tmp_path_factory.getbasetemp() / "compiled"):
        yield


@pytest.fixture(scope="module")
def start() -> tuple[dict, np.ndarray]:
    """Untrained parameters and the embeddings of all clips by them."""
    params = finetuning().init(0)
    return params, embed(finetuning(), params, CLIPS)


@pytest.fixture(scope="module")
def finetuned(start, tmp_path_factory) -> Path:
    """A run of two folds, as the fine-tuning step leaves it."""
    root = tmp_path_factory.mktemp("run")
    for fold in range(2):
        directory = root / "finetune" / "ast-test-ssast" / f"fold_{fold}"
        fold_to(directory, start, finetuning(seed=fold), init="ssast", fold=fold)
    return root


def write_wav(path: Path, seconds: float, gain: float = 0.4) -> Path:
    """Sine bursts, two a second."""
    time = np.arange(int(seconds * 22_050)) / 22_050
    pitch = 220 * 2 ** ((np.floor(time * 2) % 12) / 12)
    wave = gain * np.sin(2 * np.pi * pitch * time) * np.exp(-6 * (time * 2 % 1))
    soundfile.write(path, wave, 22_050, subtype="FLOAT")
    return path


@pytest.fixture(scope="module")
def wav(tmp_path_factory) -> Path:
    return write_wav(tmp_path_factory.mktemp("wav") / "bursts.wav", 3)


class TestRating:
    def test_rates_a_recording_on_all_dimensions(self, finetuned, wav):
        result = FoldEnsemble(finetuned).rate(wav)
        assert result.file == str(wav)
        assert tuple(result.ratings) == KEYS == tuple(result.uncertainty)
        assert all(0 < value < 1 and len(str(value)) <= 6 for value in result.ratings.values())
        assert load_model(finetuned).rate(wav).as_json() == result.as_json()
        assert set(result.as_json()) == {"file", "ratings", "uncertainty", "warnings"}
        assert FoldEnsemble(finetuned).folds == [0, 1]
        assert len(result.warnings) == 1 and "simulated ratings" in result.warnings[0]

    def test_uncertainty_is_the_deviation_of_the_folds(self, finetuned, wav, tmp_path):
        each = []
        for fold in ("fold_0", "fold_1"):
            model = Path("finetune") / "ast-test-ssast" / fold
            shutil.copytree(finetuned / model, tmp_path / fold / model)
            each.append(list(FoldEnsemble(tmp_path / fold).rate(wav).ratings.values()))
        both = FoldEnsemble(finetuned).rate(wav)
        np.testing.assert_allclose(list(both.ratings.values()), np.mean(each, axis=0), atol=2e-4)
        np.testing.assert_allclose(list(both.uncertainty.values()), np.std(each, axis=0), atol=2e-4)
        assert max(both.uncertainty.values()) > 0.001

    def test_the_rating_is_that_of_the_fold_model(self, finetuned, start):
        """Frozen encoder: rating from the stored model alone equals rating the embedding that it
        trained on."""
        directory = finetuned / "finetune" / "ast-test-ssast" / "fold_1"
        params, scaler = fold_to(directory, start, finetuning(seed=1), init="ssast", fold=1)
        expected = finetuning().rate(params, scaler, start[1][2:3])[0]
        np.testing.assert_allclose(
            FoldEnsemble(finetuned).models[1].rate(CLIPS[2]), expected, atol=1e-5
        )

    def test_a_long_recording_is_rated_with_a_note(self, finetuned, tmp_path):
        result = FoldEnsemble(finetuned).rate(write_wav(tmp_path / "long.wav", 103))
        assert "103 s long" in result.warnings[-1]
        assert np.isfinite(list(result.ratings.values())).all()

    def test_levels_beyond_the_scale_are_noted(self, finetuned, tmp_path):
        result = FoldEnsemble(finetuned).rate(write_wav(tmp_path / "loud.wav", 2, gain=30_000.0))
        assert any("above the model's loudest level" in warning for warning in result.warnings)

    def test_an_unfinished_fold_is_noted(self, finetuned, wav, tmp_path):
        shutil.copytree(finetuned, tmp_path / "run")
        for marker in (tmp_path / "run").glob("finetune/*/fold_1/model/*.json"):
            marker.unlink()
        assert any(
            "fold_1" in w and "not finished" in w
            for w in FoldEnsemble(tmp_path / "run").rate(wav).warnings
        )

    def test_a_model_trained_anew_is_the_one_that_rates(self, finetuned, start, wav, tmp_path):
        shutil.copytree(finetuned, tmp_path / "run")
        first = FoldEnsemble(tmp_path / "run").rate(wav)
        directory = tmp_path / "run/finetune/ast-test-ssast/fold_0"
        shutil.rmtree(directory)
        fold_to(directory, start, finetuning(seed=9), init="ssast", fold=0)
        assert FoldEnsemble(tmp_path / "run").rate(wav).ratings != first.ratings

    def test_a_predicted_uncertainty_joins_that_between_folds(self, start, wav, tmp_path):
        """Of two folds: the calibrated predicted variances' mean, and the variance of the folds'
        ratings."""
        home = tmp_path / "finetune" / "ast-test-ssast"
        for fold in range(2):
            run = finetuning(seed=fold, predict_uncertainty=True, rating_scale="dimension")
            begin = start[0] | {"head": run.init_head(fold)}, start[1]
            fold_to(home / f"fold_{fold}", begin, run, init="ssast", fold=fold)
        rater = FoldEnsemble(tmp_path)
        codes = audio.quantize(audio.log_mel(audio.load(wav, 22_050)))[0]
        rated, predicted = np.stack([model.distribution(codes) for model in rater.models], axis=1)
        # on the scale of the ratings, not of standardised ones
        assert (predicted > 0.02).all() and (predicted < 1).all()
        expected = np.sqrt(np.square(predicted).mean(axis=0) + rated.var(axis=0))
        result = rater.rate(wav)
        np.testing.assert_allclose(list(result.uncertainty.values()), expected, atol=2e-4)
        assert any("not calibrated" in warning for warning in result.warnings)
        (home / "temperature.json").write_text('{"temperature": 1.5}')
        result = FoldEnsemble(tmp_path).rate(wav)
        expected = np.sqrt(np.square(1.5 * predicted).mean(axis=0) + rated.var(axis=0))
        np.testing.assert_allclose(list(result.uncertainty.values()), expected, atol=2e-4)
        assert not any("not calibrated" in warning for warning in result.warnings)

    @pytest.mark.parametrize(
        "content",
        [
            '{"temperature": 1.5, "manifest_sha256": "%s"}' % ("0" * 64),
            '{"temperature": 1.5, "manifest_sha257": "0"}',
            '{"temperature": NaN}',
            '{"temperature": -1}',
            '{"temperature": "1.5"}',
            '{"temperature": %s}' % ("9" * 5000),
            '{"temperature": 1.5',
            "[1.5]",
            "[" * 100_000,
            "",
        ],
    )
    def test_a_damaged_temperature_is_refused(self, finetuned, tmp_path, content):
        shutil.copytree(finetuned, tmp_path / "run")
        (home,) = (tmp_path / "run" / "finetune").iterdir()
        (home / "temperature.json").write_text(content)
        with pytest.raises(
            InputError, match="temperature.json.*Delete it and run `percepiano"
        ) as e:
            FoldEnsemble(tmp_path / "run")
        assert len(str(e.value).splitlines()) == 1

    def test_a_changed_digit_of_the_temperature_is_noticed(self, finetuned, tmp_path):
        shutil.copytree(finetuned, tmp_path / "run")
        (home,) = (tmp_path / "run" / "finetune").iterdir()
        write_signed_json(home / "temperature.json", {"temperature": 1.53})
        assert FoldEnsemble(tmp_path / "run").temperature == 1.53
        content = (home / "temperature.json").read_text()
        (home / "temperature.json").write_text(content.replace("1.53", "1.73"))
        with pytest.raises(InputError, match="temperature.json is damaged .its checksum differs"):
            FoldEnsemble(tmp_path / "run")

    def test_the_convolutional_baseline_rates_but_has_no_attention_to_explain(self, wav, tmp_path):
        config = dataclasses.replace(FINETUNE, strategy="full", encoder_rate=1.0)
        run = Finetuning(
            CNNConfig(channels=(4, 8, 8, 8), n_frames=64), config, FRONT_END, STATISTICS, 6
        )
        params = run.init(0)
        fold_to(
            tmp_path / "finetune" / "cnn" / "fold_0",
            (params, embed(run, params, CLIPS)),
            run,
            init="cnn",
            fold=0,
        )
        rater = FoldEnsemble(tmp_path)
        assert rater.name == "cnn" and np.isfinite(list(rater.rate(wav).ratings.values())).all()
        with pytest.raises(
            InputError, match="cnn has no attention, which explanations need; choose an ast-"
        ):
            model_functions(run)

    def test_a_model_of_other_settings_is_refused(self, finetuned, tmp_path):
        shutil.copytree(finetuned, tmp_path / "run")
        (marker,) = (tmp_path / "run").glob("finetune/*/fold_1/model/*.json")
        tree, made = open_latest(marker.parent, made_by="")
        made["finetune"]["train_encoder"] = False
        shutil.rmtree(marker.parent)
        with Checkpoints(marker.parent, keep=1) as model:
            names = ("model", "finetune", "front_end", "statistics", "simulated")
            model.save(6, tree, {name: made[name] for name in names})
        with pytest.raises(
            InputError, match="with other settings .train_encoder.. Run notebook 03"
        ):
            FoldEnsemble(tmp_path / "run")

    def test_as_text_is_for_people(self, finetuned, wav):
        lines = to_text(FoldEnsemble(finetuned).rate(wav)).split("\n")
        assert lines[0] == str(wav) and lines[1] == "  0:03"
        assert lines[2].startswith("  Note: ") and max(map(len, lines[2:])) <= 80
        rows = [line for line in lines if re.search(r"[·─│]*●[·─│]* .* 0\.\d\d±0\.\d\d$", line)]
        for line, dimension in zip(rows, DIMENSIONS, strict=True):
            assert dimension.family in lines and dimension.low in line and dimension.high in line

    def test_repr_and_card_are_short_and_complete(self, finetuned, wav):
        result = FoldEnsemble(finetuned).rate(wav)
        assert len(repr(result).splitlines()) == 5
        assert "simulated ratings" in repr(result).splitlines()[-1]
        card = result._repr_html_()
        assert card.count('class="row"') == 19 and "simulated ratings" in card
        assert "<script" not in card and "that of the ratings in training" in card

    def test_a_file_that_cannot_be_rated_is_explained(self, finetuned, wav, tmp_path):
        (tmp_path / "text.wav").write_text("no sound")
        shown = []
        files = [tmp_path / "text.wav", tmp_path / "none.wav", wav]
        results = rate_files(files, run=finetuned, show=shown.append)
        for result, why in zip(results, ("cannot be read as audio", "no such file")):
            assert set(result) == {"file", "error"} and why in result["error"]
        assert results[2].file == str(wav) and shown == results

    def test_a_table_and_a_page_are_made_of_a_run_too(self, finetuned, wav, tmp_path):
        made = tmp_path / "a.csv", tmp_path / "a.html"
        rate_files([wav, wav], run=finetuned, csv=made[0], html=made[1])
        table = pd.read_csv(made[0])
        assert len(table) == 38 and table["percentile"].isna().all()
        text = made[1].read_text()
        assert text.count("<audio controls") == 2 and text.count('class="row"') == 38
        assert "<script" not in text and "compared" not in text

    def test_a_score_is_refused(self, finetuned, wav):
        with pytest.raises(InputError, match="score a.mid: this model rates from audio alone"):
            rate_files([wav], run=finetuned, score="a.mid")

    def test_which_model_is_asked_for(self, finetuned, tmp_path):
        shutil.copytree(finetuned, tmp_path / "run")
        home = tmp_path / "run" / "finetune"
        shutil.copytree(home / "ast-test-ssast", home / "ast-test-scratch")
        assert FoldEnsemble(tmp_path / "run").name == "ast-test-ssast"
        assert FoldEnsemble(tmp_path / "run", "ast-test-scratch").name == "ast-test-scratch"
        with pytest.raises(
            InputError, match="unknown model 'ast-tset-ssast'. Did you mean 'ast-test-ssast'"
        ):
            FoldEnsemble(tmp_path / "run", "ast-tset-ssast")
        (home / "ast-big-ssast").mkdir()
        with pytest.raises(
            InputError,
            match="several models: ast-big-ssast, ast-test-ssast. Choose one with --model",
        ):
            FoldEnsemble(tmp_path / "run")
        with pytest.raises(
            InputError, match="no fold in .* is finished. Run notebook 03.* to resume"
        ):
            FoldEnsemble(tmp_path / "run", "ast-big-ssast")

    def test_no_run(self, tmp_path):
        with pytest.raises(InputError, match="no model in .*missing.finetune. Run notebook 03"):
            FoldEnsemble(tmp_path / "missing")
