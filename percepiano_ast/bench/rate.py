"""From the command to the page: rating a long recording with the model that comes along."""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile

from percepiano_ast import audio
from percepiano_ast.data import demo
from percepiano_ast.packaged import Packaged

MINUTES = 10
RUNS = 3


def rate() -> Iterator[dict]:
    """The whole command in a process of its own, and the model alone; seconds, times real time, and memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = _long_recording(Path(folder))
        command = [sys.executable, "-m", "percepiano_ast", "rate", str(path), "--html", f"{folder}/page.html", "--json"]
        seconds = []
        for _ in range(RUNS):
            started = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds.append(time.perf_counter() - started)
        assert len(json.loads(done.stdout)) == 1
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        yield {"name": "rate, command to page", "value": round(float(np.median(seconds)), 2), "unit": f"s of {MINUTES} min"}
        yield {"name": "rate, memory", "value": round(peak), "unit": "MB"}
        yield _model_alone(path)


def _model_alone(path: Path) -> dict:
    model = Packaged.read()
    wave = model.level(audio.load(path, model.listener.front_end.sample_rate))
    model.hear(wave[: 20 * model.listener.front_end.sample_rate])  # compiles
    seconds = []
    for _ in range(RUNS):
        started = time.perf_counter()
        model.hear(wave)
        seconds.append(time.perf_counter() - started)
    return {"name": "rate, hearing", "value": round(60 * MINUTES / float(np.median(seconds))), "unit": "x real time"}


def _long_recording(folder: Path) -> Path:
    """The example over and over, with a breath between."""
    wave, rate = soundfile.read(demo.write_example(folder, "example"), dtype="float32")
    once = np.concatenate([wave, np.zeros(rate // 2, np.float32)])
    path = folder / "long.wav"
    soundfile.write(path, np.resize(once, 60 * MINUTES * rate), rate)
    return path
