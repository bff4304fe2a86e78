"""Read untrusted CSV files as text with a size limit."""

import gzip
from pathlib import Path

LARGEST = 2**28  # bytes of a table; 1,202 clips and 100 models take half of it


def content_of(path: str | Path) -> bytes:
    """The bytes of a CSV file, decompressed if its name ends in ``.gz``.

    Raises:
        OSError: it cannot be read or is not a gzip file.
        ValueError: it has more than ``LARGEST`` bytes; decompression stops there.
    """
    opened = gzip.open if str(path).endswith(".gz") else open
    with opened(path, "rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"it has more than {LARGEST:,} bytes, the limit for a table")
    return content
