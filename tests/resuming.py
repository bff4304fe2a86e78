"""What the environments of `test_versions` run; it needs no more than the JAX stack and
``percepiano_ast.training``.

``resuming.py train DIRECTORY GIVEN [STOP_AT]`` pre-trains, from the newest checkpoint on if there
is one, and is broken off where batch ``STOP_AT`` would be made. ``resuming.py look DIRECTORY``
reads the newest checkpoint. Both print JSON.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import sys
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np

from percepiano_ast.config import FrontEnd, LevelStats, ModelConfig, PretrainConfig, from_json
from percepiano_ast.training.checkpoints import open_latest
from percepiano_ast.training.pretrain import pretrain

STACK = ("jax", "jaxlib", "flax", "optax", "safetensors", "numpy")
KINDS = {
    "model": ModelConfig,
    "config": PretrainConfig,
    "front_end": FrontEnd,
    "statistics": LevelStats,
}


class BrokenOff(Exception):
    """The training was to end here."""


def train(directory: str, given: str, stop_at: str = "") -> dict:
    """Pre-train on the batches in a folder; what was asked for first, what was logged, and the
    history."""
    batches = np.load(Path(given, "batches.npz"))
    settings = json.loads(Path(given, "given.json").read_text())
    first, lines, handler = [], [], logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("percepiano_ast")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)

    def stream(start: int):
        first.append(start)
        for step in itertools.count(start):
            if str(step) == stop_at:
                raise BrokenOff
            yield {
                "codes": batches["train"][step],
                "clip": [f"clip {row} of batch {step}" for row in range(4)],
            }

    arguments = {name: from_json(kind, settings[name]) for name, kind in KINDS.items()}
    rows = []
    with contextlib.suppress(BrokenOff):
        rows = pretrain(
            **arguments,
            batches=stream,
            steps_per_epoch=settings["steps_per_epoch"],
            validation=lambda: [{"codes": codes} for codes in batches["validation"]],
            directory=directory,
            description={"data": "made here"},
        )
    return {"first": first, "log": lines, "history": rows}


def look(directory: str) -> dict:
    """Step and versions, and a checksum of every array of the newest checkpoint."""
    tree, description = open_latest(Path(directory, "checkpoints"), made_by="")
    arrays = {
        jax.tree_util.keystr(path): [
            str(leaf.dtype),
            list(leaf.shape),
            hashlib.sha256(leaf.tobytes()).hexdigest(),
        ]
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    return {
        "step": description["step"],
        "arrays": arrays,
        "versions": {name: version(name) for name in STACK},
    }


if __name__ == "__main__":
    _, what, *arguments = sys.argv
    print(json.dumps({"train": train, "look": look}[what](*arguments)))
