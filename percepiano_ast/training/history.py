"""The record of a run: one CSV row per epoch, rewritten whole so that a resumed run never shows an epoch twice."""

import csv
from pathlib import Path


def write(path: Path, rows: list[dict]) -> None:
    """Write ``rows`` (all with the same keys) as CSV, old file or new one, never half."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)
