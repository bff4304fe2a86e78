"""A training goes on in an environment with other versions: from this one to the newest of
everything, and back.

Slow: the newest versions get an environment of their own, half a minute of installation; all takes
three minutes.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import (
    FRONT_END,
    MODEL,
    PRETRAIN,
    STATISTICS,
    STEPS,
    batch_of,
    validation_batches,
    without_seconds,
)

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIG = dataclasses.replace(PRETRAIN, ema_decay=0.9)
BROKEN_OFF = 2 * STEPS  # steps: after the second of three epochs
LOSSES = (
    "loss",
    "nce",
    "mse",
    "gradient_norm",
    "validation_loss",
    "validation_nce",
    "validation_mse",
)
# Other versions of XLA compute the same sums in another order, and steps of Adam let the difference
# grow.
CLOSE = {"rtol": 1e-3}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def newest(tmp_path_factory) -> Path:
    """An interpreter with the newest versions of what ``training`` imports, and nothing else."""
    place = tmp_path_factory.mktemp("newest")
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    python = place / "bin" / "python"
    environment = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    wanted = ["jax", "flax", "optax", "safetensors", "numpy", "mido", "tenacity"]
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--upgrade", *wanted],
        check=True,
        env=environment,
    )
    return python


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """Configurations and batches, for children that cannot import `tiny`."""
    place = tmp_path_factory.mktemp("given")
    configs = {"model": MODEL, "config": CONFIG, "front_end": FRONT_END, "statistics": STATISTICS}
    settings = {name: dataclasses.asdict(config) for name, config in configs.items()}
    (place / "given.json").write_text(json.dumps(settings | {"steps_per_epoch": STEPS}))
    train = [batch_of(step)["codes"] for step in range(CONFIG.epochs * STEPS)]
    np.savez(
        place / "batches.npz",
        train=train,
        validation=[batch["codes"] for batch in validation_batches()],
    )
    return place


def child(python: Path | str, *arguments) -> dict:
    """What ``resuming.py`` prints when this interpreter runs it."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [python, Path(__file__).with_name("resuming.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("forward", [True, False], ids=["to the newest", "from the newest"])
def test_a_run_goes_on_with_other_versions(forward, newest, given, tmp_path):
    first, second = (sys.executable, newest) if forward else (newest, sys.executable)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = child(first, "train", whole, given)
    begun = child(first, "train", broken, given, BROKEN_OFF)
    assert expected["first"] == begun["first"] == [0] and not begun["history"]
    saved, found = child(first, "look", broken), child(second, "look", broken)
    print(f"from {saved['versions']} to {found['versions']}")
    assert saved["step"] == found["step"] == BROKEN_OFF
    assert saved["arrays"] == found["arrays"]  # bit for bit
    assert {name.split("']['")[1].split("'")[0] for name in found["arrays"]} >= {
        "params",
        "opt_state",
        "ema",
        "step",
    }

    done = child(second, "train", broken, given)
    assert done["first"] == [BROKEN_OFF]
    assert "  resuming after epoch 2" in done["log"] and not any(
        "damaged" in line for line in done["log"]
    )
    rows, others = without_seconds(done["history"]), without_seconds(expected["history"])
    assert rows[:2] == others[:2] and [row["epoch"] for row in rows] == [1, 2, 3]
    for name in LOSSES:
        print(f"{name} of epoch 3: {rows[2][name]}, uninterrupted {others[2][name]}")
        np.testing.assert_allclose(rows[2][name], others[2][name], **CLOSE, err_msg=name)
    assert child(first, "look", broken) == child(second, "look", broken) | {
        "versions": saved["versions"]
    }
