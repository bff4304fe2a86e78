"""Tables come from strangers: what is read of them is bounded, and only ever text."""

import gzip
from pathlib import Path

LARGEST = 2**28  # bytes of a table; 1,202 clips by a hundred models have half as many


def content_of(path: str | Path) -> bytes:
    """The bytes of a CSV file, inflated where its name ends in ``.gz``.

    Raises:
        OSError: it cannot be read, or is no gzip file.
        ValueError: there are more than ``LARGEST``; a bomb is not inflated.
    """
    opened = gzip.open if str(path).endswith(".gz") else open
    with opened(path, "rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"it has more than {LARGEST:,} bytes, no table of ours has so many")
    return content
