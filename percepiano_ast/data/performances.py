"""The performances of a data set's recordings: notes and pedals in one file next to the shards.

They are not in the records, which are chunks of five seconds: notes and pedals may be longer.
MAESTRO's seven million notes take some tens of megabytes, so a training run holds all of them in
memory. The file is optional.
"""

import base64
import functools
import io
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from percepiano_ast.errors import InputError
from percepiano_ast.music.midi import NOTE, PEDAL, Performance

FILE = "performances.npz"
TICK = 1e-4  # seconds: the unit of stored times, a hundredth of a frame
_TIME = np.uint32
# Storage format of a performance's structured arrays: columns and their types.
_PACKED = {
    "notes": {"onset": _TIME, "offset": _TIME, "pitch": np.uint8, "velocity": np.uint8},
    "pedals": {"time": _TIME, "number": np.uint8, "value": np.uint8},
}
_TYPES = {"notes": NOTE, "pedals": PEDAL}


def pack(performance: Performance) -> str:
    """Encode one performance as text, for the facts of its recording: the columns of `FILE`."""
    return base64.b64encode(_archive(_columns(performance))).decode()


def _columns(performance: Performance) -> dict[str, np.ndarray]:
    columns = {}
    for kind, types in _PACKED.items():
        rows = getattr(performance, kind)
        for name, dtype in types.items():
            values = np.rint(np.maximum(rows[name], 0) / TICK) if dtype is _TIME else rows[name]
            columns[f"{kind}.{name}"] = values.astype(dtype)
    return columns


def _archive(arrays: dict[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    # uses a fixed date for its members, so the bytes are deterministic
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def join(packed: dict[str, str]) -> bytes:
    """Content of `FILE` for recordings by their keys, each encoded by `pack`."""
    parts = [dict(np.load(io.BytesIO(base64.b64decode(text)))) for text in packed.values()]
    arrays = {"key": np.array(list(packed))}
    for kind, types in _PACKED.items():
        arrays[f"{kind}.count"] = np.array(
            [len(part[f"{kind}.{next(iter(types))}"]) for part in parts]
        )
        arrays |= {
            name: np.concatenate([part[name] for part in parts])
            for name in (f"{kind}.{column}" for column in types)
        }
    return _archive(arrays)


class Performances:
    """Performances by the keys of their recordings.

    Args:
        arrays: of `FILE`.
    """

    def __init__(self, arrays: dict[str, np.ndarray]):
        self._arrays = arrays
        self._row = {key: row for row, key in enumerate(arrays["key"].tolist())}
        self._ends = {kind: np.cumsum(arrays[f"{kind}.count"]) for kind in _PACKED}

    def __contains__(self, key: str) -> bool:
        return key in self._row

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, key: str) -> Performance:
        row = self._row[key]
        return Performance(self._rows("notes", row), self._rows("pedals", row))

    def _rows(self, kind: str, row: int) -> np.ndarray:
        stop = int(self._ends[kind][row])
        part = slice(stop - int(self._arrays[f"{kind}.count"][row]), stop)
        rows = np.empty(part.stop - part.start, _TYPES[kind])
        for name, dtype in _PACKED[kind].items():
            values = self._arrays[f"{kind}.{name}"][part]
            rows[name] = values * TICK if dtype is _TIME else values
        return rows


@functools.lru_cache(maxsize=2)
def open_performances(directory: Path) -> Performances:
    """The performances of the data set in ``directory``.

    Raises:
        InputError: the data set has none, or the file is damaged.
    """
    path = directory / FILE
    if not path.exists():
        raise InputError(
            f"the shards in {directory} have no {FILE}, and transcription is trained on the MIDI of"
            " each recording. Preprocess a source with MIDI, such as MAESTRO, into another"
            " directory, or pre-train with ssast."
        )
    try:
        with np.load(io.BytesIO(path.read_bytes())) as arrays:
            return Performances(dict(arrays))
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} is damaged ({error}). Run preprocess again to restore it."
        ) from error


def require_all(performances: Performances, keys: Iterable[str], split: str) -> None:
    """Check that every recording of a split has a performance.

    Raises:
        InputError: recordings without one; the message has their number and the first.
    """
    without = [key for key in keys if key not in performances]
    if without:
        raise InputError(
            f"{len(without)} recordings of the split {split!r} have no readable MIDI, such as"
            f" {without[0]}; in recordings.csv their column notes is 0. Add their MIDI, preprocess"
            " without them, or pre-train with ssast."
        )
