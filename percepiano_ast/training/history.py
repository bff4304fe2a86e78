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


def read(path: Path) -> list[dict]:
    """The rows written so far, numbers as float; none when there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
