"""`python tests/bench NAME` in a clone without an installation. Cost: 10 s a core."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent / "bench"


@pytest.mark.parametrize("name, code", [("nothing", 2), ("log-mel", 0)])
def test_a_benchmark_prints_json_lines_or_one_line_of_error(tmp_path, name, code):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    call = [sys.executable, str(BENCH), name]
    done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    if code:
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ") and "Choose one of: log-mel" in line
    else:
        (line,) = map(json.loads, done.stdout.splitlines())
        assert list(line) == ["name", "value", "unit", "peer", "ratio"]
        assert line["name"] == "log-mel" and line["value"] > 0 and line["ratio"] > 0
