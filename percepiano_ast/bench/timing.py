"""Timing by medians of interleaved runs, so that drifts in the machine's speed affect all
candidates equally."""

import statistics
import time
from collections.abc import Callable

RUNS = 7


def medians(*functions: Callable[[], object], runs: int = RUNS) -> list[float]:
    """Median seconds of each of ``functions``, run in turn after a warm-up."""
    times: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    for _ in range(runs):
        for mine, function in zip(times, functions):
            start = time.perf_counter()
            function()
            mine.append(time.perf_counter() - start)
    return [statistics.median(mine) for mine in times]
