"""Speed benchmarks against a peer in the same run: ``percepiano bench NAME`` prints JSON lines.

Values are medians of interleaved runs with equal threads. A ratio above 1 means that this package
is faster.
"""

from collections.abc import Iterator

import numpy as np
import scipy.fft
from threadpoolctl import threadpool_limits  # comes with scikit-learn

from percepiano_ast import audio
from percepiano_ast.bench import batches, checkpoint, preprocess
from percepiano_ast.bench.evaluate import evaluation
from percepiano_ast.bench.rate import rate
from percepiano_ast.bench.steps import model, step_function
from percepiano_ast.bench.timing import medians
from percepiano_ast.config import PRESETS, FrontEnd


def log_mel() -> Iterator[dict]:
    """Log-mel of one minute of audio, against librosa with the same settings."""
    front_end = FrontEnd()
    wave = np.random.default_rng(0).normal(0, 0.1, 60 * front_end.sample_rate).astype(np.float32)

    with scipy.fft.set_workers(1), threadpool_limits(1):
        ours, theirs = medians(
            lambda: audio.log_mel(wave, front_end),
            lambda: preprocess.librosa_log_mel(wave, front_end),
        )
    speed = {"name": "log-mel", "value": round(60 / ours), "unit": "x real time"}
    yield speed | {"peer": "librosa.feature.melspectrogram", "ratio": round(theirs / ours, 2)}


def pretrain_step() -> Iterator[dict]:
    """One pre-training step of the demo preset: windows per second on this machine's devices."""
    preset = PRESETS["demo"]
    (seconds,) = medians(step_function(preset.model, preset.pretrain, preset.execution)[1])
    yield {
        "name": "pretrain-step",
        "value": round(preset.pretrain.batch_size / seconds, 1),
        "unit": "windows/s",
    }


BENCHMARKS = {
    "log-mel": log_mel,
    "preprocess": preprocess.preprocess,
    "batches": batches.batches,
    "pretrain-step": pretrain_step,
    "model": model,
    "evaluate": evaluation,
    "checkpoint": checkpoint.checkpoint,
    "rate": rate,
}
