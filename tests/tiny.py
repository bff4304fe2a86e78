"""A model that trains in seconds, and runs of it: what the tests of training and rating share."""

import contextlib
import dataclasses
import itertools
import os
import signal
import time
from pathlib import Path

import jax
import numpy as np
import tensorflow_datasets as tfds

from percepiano_ast.config import (
    ComputeConfig,
    FinetuneConfig,
    FrontEnd,
    LevelStats,
    ModelConfig,
    PretrainConfig,
)
from percepiano_ast.data.batches import clip_windows
from percepiano_ast.data.shards import ShardSet, chunks
from percepiano_ast.training.checkpoints import open_latest
from percepiano_ast.training.finetune import Finetuning, finetune_fold
from percepiano_ast.training.pretrain import pretrain

MODEL = ModelConfig("test", width=16, depth=1, num_heads=2, n_frames=64)
FRONT_END, STATISTICS = FrontEnd(), LevelStats(-20.0, 12.0, 1, 0.0, 0.0)
PRETRAIN = PretrainConfig(
    batch_size=4, epochs=3, learning_rate=1e-2, warmup_steps=2, cluster=(2, 3)
)
STEPS = 20


def bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def codes_of(step: int, frames: int = MODEL.n_frames, batch: int = 4) -> np.ndarray:
    """Harmonic stripes whose pitch and rhythm change from clip to clip: uint8 (batch, frames,
    mel)."""
    pitch, beat = np.random.default_rng(step).uniform(0, 1.5, (2, batch, 1, 1))
    time, mel = np.arange(frames)[None, :, None], np.arange(MODEL.n_mels)[None, None, :]
    return np.uint8(120 + 60 * np.sin(mel / 5 + pitch) + 30 * np.sin(time / 7 + beat))


def batch_of(step: int, batch: int = 4) -> dict:
    return {
        "codes": codes_of(step, batch=batch),
        "clip": [f"clip {row} of batch {step}" for row in range(batch)],
    }


def stream(start: int, stop_at: int | None = None, stop=None):
    """Batches from step ``start`` on; ``stop()`` is called instead of making batch ``stop_at``."""
    for step in itertools.count(start):
        if step == stop_at:
            stop()
        yield batch_of(step)


def validation_batches() -> list[dict]:
    return [batch_of(1000), batch_of(1001)]


def shard_set(recordings: dict[str, np.ndarray], chunk_frames: int) -> ShardSet:
    """An opened split of these recordings, (time, mel) each, as TFDS would serialise it."""
    dtype = next(iter(recordings.values())).dtype
    features = tfds.features.FeaturesDict(
        {
            "log_mel": tfds.features.Tensor(shape=(None, 128), dtype=dtype, encoding="bytes"),
            "recording": tfds.features.Text(),
            "year": np.int32,
            "start_frame": np.int32,
        }
    )
    raw = [
        features.serialize_example(
            {"log_mel": chunk, "recording": key, "year": 2004, "start_frame": start}
        )
        for key, codes in recordings.items()
        for start, chunk in chunks([codes], chunk_frames)
    ]
    examples = [features.deserialize_example_np(record) for record in raw]
    n_frames = np.array([len(codes) for codes in recordings.values()])
    return ShardSet(
        examples, FRONT_END, STATISTICS, {"stored": dtype.name}, n_frames, chunk_frames, raw
    )


def pretrain_to(
    directory,
    config=PRETRAIN,
    *,
    batches=stream,
    statistics=STATISTICS,
    validation=validation_batches,
    steps=STEPS,
    compute=ComputeConfig(),
    **options,
) -> list[dict]:
    return pretrain(
        MODEL,
        config,
        FRONT_END,
        statistics,
        batches=batches,
        steps_per_epoch=steps,
        validation=validation,
        directory=directory,
        description={"data": "made here"},
        compute=compute,
        **options,
    )


def be_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def wait_until_arrived(directory: Path, step: int):
    """Until the checkpoint of ``step``, which is written while training goes on, has arrived."""
    while not list(Path(directory).glob(f"checkpoints/step_{step:08d}.????????.json")):
        time.sleep(0.01)


def be_killed_after(directory: Path, step: int):
    """Once the checkpoint of ``step`` has arrived."""
    wait_until_arrived(directory, step)
    be_killed()


def be_interrupted():
    raise KeyboardInterrupt


def without_seconds(rows: list[dict]) -> list[dict]:
    """Rows without what no two runs have alike."""
    timed = ("seconds", "clips_per_second", "mfu", "input_wait")
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


def pretrained_bits(directory) -> list[bytes]:
    """Parameters, optimiser state and step of the newest checkpoint."""
    return bits(open_latest(directory / "checkpoints", made_by="")[0])


@contextlib.contextmanager
def compiled_once(folder: Path):
    """Within, equal functions are compiled once, and fast; so they are in child processes with the
    variables it yields.

    Compiling is nearly all that these tests do; what the code means is the same at every level of
    optimisation.
    """
    wanted = {  # and JAX's defaults
        "jax_disable_most_optimizations": (True, False),
        "jax_compilation_cache_dir": (str(folder), None),
        "jax_persistent_cache_min_compile_time_secs": (0.0, 1.0),
        "jax_persistent_cache_min_entry_size_bytes": (-1, 0),
    }
    for name, (value, _) in wanted.items():
        jax.config.update(name, value)
    try:
        yield {name.upper(): str(value) for name, (value, _) in wanted.items()}
    finally:
        for name, (_, default) in wanted.items():
            jax.config.update(name, default)


FINETUNE = FinetuneConfig(
    batch_size=4, epochs=3, learning_rate=1e-2, warmup_steps=2, hidden=8, dropout=0.1
)
LENGTHS = (64, 30, 150, 200, 64, 65, 128, 40, 100, 90, 64, 180)
TRAIN = np.arange(10)
CLIPS = [codes_of(100 + k, length, 1)[0] for k, length in enumerate(LENGTHS)]
RATINGS = np.random.default_rng(3).uniform(0.2, 0.8, (12, 19)).astype(np.float32)


def finetuning(**changes) -> Finetuning:
    return Finetuning(MODEL, dataclasses.replace(FINETUNE, **changes), FRONT_END, STATISTICS, 6)


def windows_from(start: int, stop_at: int | None = None):
    for step in itertools.count(start):
        if step == stop_at:
            be_interrupted()
        codes = np.stack([codes_of(step), codes_of(1000 + step)], axis=1)
        n_valid = np.array([[64, 64], [50, 0], [64, 30], [20, 0]], np.int32)
        yield {"codes": codes, "n_valid": n_valid, "clip": (np.arange(4) + step) % 10}


def embed(
    run: Finetuning, params: dict, clips: list[np.ndarray], batch_size: int = 8
) -> np.ndarray:
    return run.embed(params, clip_windows(clips, n_frames=64, batch_size=batch_size), len(clips))


def fold_to(
    directory: Path, start, run: Finetuning, windows=windows_from, *, save_minutes=10, **settings
) -> tuple:
    params, embeddings = start
    return finetune_fold(
        run,
        params,
        embeddings,
        ratings=RATINGS,
        train=TRAIN,
        windows=windows,
        steps_per_epoch=2,
        directory=directory,
        settings={"data": "made here", "simulated": True, **settings},
        save_minutes=save_minutes,
    )
