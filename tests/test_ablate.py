"""The study of switches: a difference that is there is found, one that is not is called noise.
About 20 s."""

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tiny import FINETUNE, FRONT_END, MODEL, STATISTICS, compiled_once

from percepiano_ast.config import PRESETS
from percepiano_ast.data import percepiano
from percepiano_ast.data.batches import RatedClips
from percepiano_ast.dimensions import KEYS
from percepiano_ast.errors import InputError
from percepiano_ast.pipeline import ablate
from percepiano_ast.pipeline.run import EncoderInit, Run
from percepiano_ast.pipeline.steps import CrossValidation


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(tmp_path_factory):
    with compiled_once(tmp_path_factory.getbasetemp() / "compiled"):
        yield


@pytest.fixture(scope="module")
def material() -> CrossValidation:
    """Eight content groups in four folds; what the ratings follow lies in the deviations over time
    alone."""
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(8), 12)
    names = np.array([f"clip{number:03d}" for number in range(96)])
    hidden = rng.normal(size=(96, 4))
    embeddings = rng.normal(size=(96, 2 * MODEL.grid[0] * MODEL.width)).astype(np.float32)
    embeddings[:, -40:] = hidden @ rng.normal(size=(4, 40)) + 0.1 * embeddings[:, -40:]
    ratings = np.clip(0.5 + 0.1 * hidden @ rng.normal(size=(4, 19)), 0.02, 0.98).astype(np.float32)
    index = pd.DataFrame(
        {
            "clip": names,
            "segment": [f"s{k}" for k in group],
            "content_group": group,
            "human": True,
            "fold_content": group % 4,
        }
    )
    config = dataclasses.replace(FINETUNE, batch_size=24, epochs=12, hidden=16)
    run = Run(dataclasses.replace(PRESETS["demo"], model=MODEL), Path("nowhere"))
    start = EncoderInit("ast-test", MODEL, FRONT_END, STATISTICS)
    clips = RatedClips([], names, np.full(96, "builtin"), ratings)
    found = CrossValidation(run, start, config, clips, FRONT_END, index)
    found.__dict__["embeddings"] = embeddings
    return found


@pytest.fixture(scope="module")
def studied(material) -> pd.DataFrame:
    with pytest.MonkeyPatch.context() as patch:
        few = {
            name: ablate.SWITCHES[name]
            for name in (("heads", "joint"), ("pooling", "mean"), ("rater weights", "on"))
        }
        patch.setattr(ablate, "SWITCHES", few)
        yield ablate.predict_variants(material, 2)


def folds_of(material) -> dict[str, int]:
    return percepiano.fold_of_clip(material.index, "content")


def test_a_study_tells_an_effect_from_noise(material, studied, tmp_path):
    found = ablate.ablation_table(studied, material.index).set_index("switch")
    assert found.loc["reference", "r"] > 0.6 and found.loc["pooling", "verdict"] == "worse"
    row = found.loc["pooling"]
    assert row["low"] < row["difference"] < row["high"] < 0 and row["difference"] < -0.3
    assert found.loc["heads", "verdict"] == "noise" and "rater weights" not in found.index
    path = ablate.write_ablations(found.reset_index(), studied, tmp_path / "study", "A study")
    lines = path.read_text().splitlines()
    assert (
        lines[0] == "# A study"
        and sum(line.startswith("| pooling | mean |") for line in lines) == 1
    )
    assert list(pd.read_csv(path.with_suffix(".csv")).columns) == ablate.COLUMNS


def test_predictions_are_out_of_fold_and_of_every_clip(material, studied):
    for (_, _), run in studied.groupby(["model", "seed"]):
        assert len(run) == 96 * len(KEYS) and not run["prediction"].isna().any()
    assert (studied["fold"] == studied["clip"].str[4:].astype(int) // 12 % 4).all()


def test_the_same_seed_predicts_the_same(material, studied):
    config = dataclasses.replace(material.config, seed=1)
    again = ablate.cross_validate_heads(material, config, "reference", folds_of(material))
    first = studied[(studied["model"] == "reference") & (studied["seed"] == 1)]
    assert again["prediction"].tolist() == first["prediction"].tolist()


def test_an_inner_study_leaves_the_outer_fold_alone(material):
    """Its clips are neither predicted nor learned from: other ratings there change nothing."""
    inner = {clip: fold for clip, fold in folds_of(material).items() if fold != 2}
    outer, ratings = material.folds_of("content") == 2, material.clips.ratings
    changed = np.where(outer[:, None], 0.9, ratings).astype(np.float32)
    other = dataclasses.replace(
        material, clips=dataclasses.replace(material.clips, ratings=changed)
    )
    other.__dict__["embeddings"] = material.embeddings
    one, two = (ablate.cross_validate_heads(m, m.config, "x", inner) for m in (material, other))
    assert (
        set(one["fold"]) == {0, 1, 3} and one["prediction"].tolist() == two["prediction"].tolist()
    )


def test_what_cannot_be_studied_is_refused(material):
    with pytest.raises(InputError, match="1 seed: to compare variants, use at least 2"):
        ablate.predict_variants(material, 1)
    with pytest.raises(InputError, match="unknown outer fold '7'. Choose one of: 0, 1, 2, 3"):
        ablate.predict_variants(material, inner=7)
    with pytest.raises(
        InputError, match="trains the encoder; choose 'frozen' to fit the heads only"
    ):
        ablate.cross_validate_heads(
            material, dataclasses.replace(material.config, strategy="full"), "x", folds_of(material)
        )
