"""The three recipes of docs/recipes.md, run as written in a copy of the package. Cost: 4
minutes."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from percepiano_ast.data import demo

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
COMMAND = "percepiano "  # run as ``python -m percepiano_ast``, which needs no installation


def recipe(name: str) -> list[str]:
    """The blocks of code that follow the recipe's mark in docs/recipes.md, up to the next
    heading."""
    text = (ROOT / "docs" / "recipes.md").read_text().split(f"<!-- recipe: {name} -->")[1]
    return re.findall(r"```\w+\n(.*?)```", text.split("\n## ")[0], re.DOTALL)


def follow(home: Path, block: str, **values: str) -> list[subprocess.CompletedProcess]:
    """Run the block's commands of the package in ``home``, which imports the copy there."""
    done = []
    for line in (line for line in block.splitlines() if line.startswith(COMMAND)):
        words = [values.get(word, word) for word in line.removeprefix(COMMAND).split()]
        environment = os.environ | {"PYTHONPATH": str(home)}
        call = [sys.executable, "-m", "percepiano_ast", *words]
        done.append(subprocess.run(call, cwd=home, env=environment, capture_output=True, text=True))
        assert done[-1].returncode == 0, f"{line}\n{done[-1].stderr}"
    return done


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """The package, and a run of the demo up to its first pre-training, of one epoch."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(
        ROOT / "percepiano_ast",
        home / "percepiano_ast",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    run = "--preset demo --out runs/demo"
    steps = (
        f"preprocess {run}",
        f"pretrain {run} --epochs 1",
        f"preprocess {run} --percepiano demo",
    )
    follow(home, "\n".join(f"{COMMAND}{step}" for step in steps))
    return home


def test_add_a_dimension(home):
    folder, table = demo.write_ratings(home / "rated", seed=0)
    rated = pd.read_csv(table)
    group, dimension = rated.columns[1], rated.columns[2]
    rated = rated[["clip", group, dimension]].set_axis(["clip", "piece", "swing"], axis=1)
    rated.to_csv(home / "mine.csv", index=False)
    (block,) = recipe("dimension")
    said = json.loads(follow(home, block, FOLDER=str(folder))[-1].stdout)
    assert len(said) == len(rated) and all(list(one["ratings"]) == ["swing"] for one in said)


def test_add_a_data_set(home):
    with zipfile.ZipFile(demo.write_maestro(home / "small.zip", recordings_per_tune=2)) as archive:
        archive.extractall(home / "unpacked")
    (table,) = (home / "unpacked").rglob("*.csv")
    table.rename(table.with_name("corpus.csv"))
    table.parent.rename(home / "corpus")
    (block,) = recipe("data set")
    header = block.splitlines()[1].removeprefix("# ")
    assert header == (home / "corpus" / "corpus.csv").read_text().splitlines()[0], (
        "docs/recipes.md has other columns"
    )
    follow(home, block)
    history = pd.read_csv(home / "runs" / "corpus" / "pretrain" / "transcription" / "history.csv")
    assert np.isfinite(history["loss"]).all() and history["loss"].iloc[-1] < history["loss"].iloc[0]


def test_add_an_encoder(home):
    module, row, command = recipe("encoder")
    (home / "percepiano_ast" / "models" / "gru.py").write_text(module)
    with (home / "percepiano_ast" / "models" / "cnn.py").open("a") as table:
        table.write(row)
    follow(home, command)
    predictions = pd.read_csv(home / "runs" / "demo" / "predictions_gru.csv")
    assert set(predictions["model"]) == {"gru"} and predictions["prediction"].std() > 0
    shown = follow(
        home,
        f"{COMMAND}rate {demo.write_example(home, 'example')} --run runs/demo --model gru --json",
    )
    assert "timing_stable_unstable" in shown[0].stdout
