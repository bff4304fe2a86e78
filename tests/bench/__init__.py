"""Speed benchmarks against a peer in the same run: ``python tests/bench NAME`` prints JSON lines.

Values are medians of interleaved runs with equal threads. A ratio above 1 means that the package is
faster.
"""

import argparse
import json
import pkgutil
import statistics
import time
from collections.abc import Callable

from percepiano_ast.config import lookup
from percepiano_ast.errors import exit_code

BENCHMARKS = {
    "log-mel": "preprocess:log_mel",
    "preprocess": "preprocess:preprocess",
    "batches": "batches:batches",
    "pretrain-step": "steps:pretrain_step",
    "model": "steps:model",
    "evaluate": "evaluate:evaluation",
    "checkpoint": "checkpoint:checkpoint",
    "rate": "rate:rate",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one benchmark; returns the exit code: 0 done, 2 bad input or usage, 1 it failed."""
    text = "Measure a speed and that of a peer in the same run; prints JSON lines."
    parser = argparse.ArgumentParser(prog="python tests/bench", description=text)
    parser.add_argument("name", metavar="NAME", help=", ".join(BENCHMARKS))
    name = parser.parse_args(arguments).name

    def run() -> None:
        function = pkgutil.resolve_name(f"bench.{lookup(BENCHMARKS, name, 'benchmark')}")
        for line in function():
            print(json.dumps(line), flush=True)

    return exit_code(run)


def medians(*functions: Callable[[], object], runs: int = 7) -> list[float]:
    """Median seconds of each of ``functions``, run in turn after a warm-up, so that drifts in the
    machine's speed affect all of them equally."""
    times: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    for _ in range(runs):
        for mine, function in zip(times, functions):
            start = time.perf_counter()
            function()
            mine.append(time.perf_counter() - start)
    return [statistics.median(mine) for mine in times]


def result(name: str, value: float, unit: str, **more) -> dict:
    """One line of the output."""
    return {"name": name, "value": value, "unit": unit, **more}
