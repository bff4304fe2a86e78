"""From command to page: rating a long recording with the bundled model."""

import importlib.util
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import soundfile

from bench import medians, result
from percepiano_ast import audio
from percepiano_ast.data import demo
from percepiano_ast.errors import InputError
from percepiano_ast.inference.rate import RatingModelFile
from percepiano_ast.inference.transcribe import BATCH, Transcriber
from percepiano_ast.pipeline import workers

REPOSITORY = Path(__file__).resolve().parents[2]
MINUTES = 10
RUNS = 3
PEER_FRAMES, PEER_MELS, PEER_PATCH = 1024, 128, 16  # 10.24 s
PEER_STRIDES = {10: "as published", 16: "patches that do not overlap"}


def rate() -> Iterator[dict]:
    """The whole command in a separate process, and its encoder against Hugging Face's AST: seconds,
    real-time factor, memory.

    Raises:
        InputError: transformers or PyTorch is missing.
    """
    if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        raise InputError(
            "this benchmark compares with Hugging Face's AST; run `pip install transformers`, and "
            "`pip install torch --index-url https://download.pytorch.org/whl/cpu`."
        )
    with tempfile.TemporaryDirectory() as folder:
        wave, rate = soundfile.read(demo.write_example(Path(folder), "example"), dtype="float32")
        once = np.concatenate([wave, np.zeros(rate // 2, np.float32)])  # repeated with short pauses
        path = Path(folder, "long.wav")
        soundfile.write(path, np.resize(once, 60 * MINUTES * rate), rate)
        command = [sys.executable, "-m", "percepiano_ast", "rate", str(path)]
        command += ["--html", f"{folder}/page.html", "--json"]
        seconds = []
        for _ in range(RUNS):
            started = time.perf_counter()
            done = subprocess.run(
                command, cwd=REPOSITORY, capture_output=True, text=True, check=True
            )
            seconds.append(time.perf_counter() - started)
        assert len(json.loads(done.stdout)) == 1
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        value = round(float(np.median(seconds)), 2)
        yield result("rate, command to page", value, f"s of {MINUTES} min")
        yield result("rate, memory", round(peak), "MB")

        # Transcription from audio, and its encoder from levels, against the peer's encoder.
        model = RatingModelFile.read()
        ear = model.transcriber
        wave = audio.normalize_loudness(audio.load(path, model.sample_rate), model.sample_rate)

    def levels() -> np.ndarray:
        return audio.quantize(audio.log_mel(wave, ear.front_end), ear.front_end)[0]

    codes = levels()
    whole, ours, *theirs = medians(
        lambda: ear.transcribe(levels()),
        lambda: ear.predict(codes),
        *(_peer(ear, stride) for stride in PEER_STRIDES),
        runs=RUNS,
    )
    yield result("rate, transcription", round(60 * MINUTES / whole), "x real time")
    value = round(60 * MINUTES / ours)
    for words, seconds in zip(PEER_STRIDES.values(), theirs):
        peer = {"peer": f"transformers.ASTModel, {words}", "ratio": round(seconds / ours, 2)}
        yield result("rate, encoder", value, "x real time", **peer)


def _peer(ear: Transcriber, stride: int) -> Callable[[], None]:
    """An AST of equal width and depth on the same duration, without overlap; the transcriber's
    windows overlap by half."""
    import torch
    from transformers import ASTConfig, ASTModel

    torch.set_num_threads(workers())
    config = ASTConfig(
        hidden_size=ear.model.width,
        num_hidden_layers=ear.model.depth,
        num_attention_heads=ear.model.num_heads,
        intermediate_size=ear.model.mlp_ratio * ear.model.width,
        patch_size=PEER_PATCH,
        frequency_stride=stride,
        time_stride=stride,
        max_length=PEER_FRAMES,
        num_mel_bins=PEER_MELS,
    )
    peer = ASTModel(config).eval()
    number = math.ceil(60 * MINUTES / (PEER_FRAMES / 100))
    torch.manual_seed(0)
    windows = torch.randn(number, PEER_FRAMES, PEER_MELS)

    def run() -> None:
        with torch.inference_mode():
            for first in range(0, number, BATCH):
                peer(windows[first : first + BATCH])

    return run
