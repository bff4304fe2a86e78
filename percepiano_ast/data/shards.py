"""The format of a data set of log-mel shards, and random access to it; `build` makes them.

It is a TFDS data set of ArrayRecord files, ``tfds.builder_from_directory(DIR).as_data_source()``,
in the order of the plan: the recordings of a split, the chunks of a recording one after the other.
Notes and pedals are in one optional file next to the shards, ``performances.npz``.
"""

import base64
import functools
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from percepiano_ast.config import FrontEnd, LevelStats
from percepiano_ast.errors import InputError
from percepiano_ast.files import as_path, read_npz, read_signed_json, sha256_of
from percepiano_ast.music.midi import NOTE, PEDAL, Performance

VERSION = "2.0.0"
MANIFEST = "manifest.json"  # written last: a data set with this file is complete
WRITER_OPTIONS = "group_size:1"  # one record per group, for random access
SHARD_SECONDS = 7200  # 92 MB of uint8 codes: a hundred files for MAESTRO, few enough for Drive

# 5.1 s: a compromise between few reads per crop and few unused frames.
CHUNK_FRAMES = 512
DTYPES: dict[str, type[np.number]] = {"uint8": np.uint8, "float16": np.float16}


@dataclass(frozen=True)
class Item:
    """One recording to be written to the shards: ``fields`` are copied into all of its examples,
    ``seconds`` is its expected length (``measured``, or else a typical value)."""

    key: str
    split: str
    fields: dict
    seconds: float
    measured: bool = True


@dataclass(frozen=True)
class Shard:
    """File ``number`` of the ``count`` files of a split, and its recordings."""

    split: str
    number: int
    count: int
    items: tuple[Item, ...]

    @property
    def name(self) -> str:
        """Such as ``train-00003-of-00080``."""
        return f"{self.split}-{self.number:05d}-of-{self.count:05d}"


def plan(items: list[Item]) -> list[Shard]:
    """Distribute items, in their order, over shards of about `SHARD_SECONDS`."""
    parts: dict[str, list[list[Item]]] = {}
    for item in items:
        of_split = parts.setdefault(item.split, [[]])
        if of_split[-1] and sum(other.seconds for other in of_split[-1]) >= SHARD_SECONDS:
            of_split.append([])
        of_split[-1].append(item)
    return [
        Shard(split, number, len(of_split), tuple(part))
        for split, of_split in parts.items()
        for number, part in enumerate(of_split)
    ]


class LogMelBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]  # mypy does not see tfds take it
    """TFDS builder of a data set in ``data_dir/NAME/VERSION`` whose shards `build` makes;
    subclasses define name and features. ``dtype``: ``uint8`` codes of the front end's range, or
    ``float16`` levels in dB."""

    VERSION = tfds.core.Version(VERSION)
    pkg_dir_path = epath.Path(__file__).parent
    FEATURES: dict = {}
    CHUNK_FRAMES = CHUNK_FRAMES  # of an example; 0 if it is a whole recording

    def __init__(self, *, data_dir: str | Path, metadata: dict, dtype: str = "uint8"):
        self._dtype, self._metadata = dtype, metadata
        super().__init__(data_dir=str(data_dir), file_format="array_record")

    @classmethod
    def features_of(cls, dtype: str, n_mels: int) -> tfds.features.FeaturesDict:
        """Features of an example; ``encoding='bytes'`` reads 14 times faster than the default."""
        log_mel = tfds.features.Tensor(shape=(None, n_mels), dtype=DTYPES[dtype], encoding="bytes")
        return tfds.features.FeaturesDict({"log_mel": log_mel, **cls.FEATURES})

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description=" ".join((self.__doc__ or "").split()),
            features=self.features_of(self._dtype, self._metadata["front_end"]["n_mels"]),
            metadata=tfds.core.MetadataDict(self._metadata),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        raise NotImplementedError("percepiano_ast.data.build makes the shards")

    _generate_examples = _split_generators

    @classmethod
    def home(cls, directory: Path) -> Path:
        """Directory of the data set's files within ``directory``."""
        return directory / cls.name / VERSION

    @classmethod
    def file_of(cls, directory: Path, shard: Shard) -> Path:
        """File of one shard, named by TFDS's convention."""
        numbers = f"{shard.number:05d}-of-{shard.count:05d}"
        return cls.home(directory) / f"{cls.name}-{shard.split}.array_record-{numbers}"

    def write_info(self, lengths: dict[str, list[int]], num_bytes: dict[str, int]) -> None:
        """Write TFDS's metadata, given the records of each shard and the bytes of each split."""
        splits = [
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=counts,
                num_bytes=num_bytes[split],
                filename_template=self._get_filename_template(split_name=split),
            )
            for split, counts in lengths.items()
        ]
        self.info.set_splits(tfds.core.splits.SplitDict(splits))
        self.info.write_to_directory(self.data_dir)


def chunks(blocks: Iterable[np.ndarray], size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Cut a recording, given in blocks (time, mel), into chunks ``(start frame, chunk)`` of
    ``size`` frames; the last includes the remainder. A ``size`` of 0 makes one chunk."""
    held: list[np.ndarray] = []
    frames = start = 0
    for block in blocks:
        held.append(block)
        frames += len(block)
        if not size or frames < 2 * size:
            continue
        joined = np.concatenate(held)
        while len(joined) >= 2 * size:
            yield start, joined[:size]
            joined, start = joined[size:], start + size
        held, frames = [joined], len(joined)
    yield start, np.concatenate(held)


def chunk_count(n_frames: int, size: int) -> int:
    """Number of chunks that `chunks` makes from a recording of ``n_frames``."""
    return max(n_frames // size, 1) if size else 1


def level_facts(stored: np.ndarray, front_end: FrontEnd) -> dict:
    """Sums over uint8 codes or float16 dB (time, mel) for `level_statistics`; exact for codes."""
    floor, step = front_end.floor_db, front_end.step_db
    if stored.dtype == np.uint8:
        histogram = np.bincount(stored.ravel(), minlength=256)
        levels, low, high = floor + step * np.arange(256), histogram[0], histogram[255]
    else:
        levels, histogram = stored.astype(np.float64).ravel(), np.ones(1, int)
        low, high = np.sum(levels <= floor), np.sum(levels >= floor + 255 * step)
    return {
        "count": stored.size,
        "at_floor": int(low),
        "at_ceiling": int(high),
        "sum_db": float((histogram * levels).sum()),
        "sum_squared_db": float((histogram * levels**2).sum()),
    }


def level_statistics(facts: Iterable[dict]) -> LevelStats:
    """Mean and standard deviation of the level in dB over recordings, in any order."""
    facts = list(facts)
    count = sum(one["count"] for one in facts)
    mean = math.fsum(one["sum_db"] for one in facts) / count
    variance = math.fsum(one["sum_squared_db"] for one in facts) / count - mean**2
    at_floor, at_ceiling = (
        sum(one[end] for one in facts) / count for end in ("at_floor", "at_ceiling")
    )
    return LevelStats(mean, math.sqrt(max(variance, 0.0)), count, at_floor, at_ceiling)


def serialise(features: tfds.features.FeaturesDict, example: dict) -> bytes:
    """Serialise an example deterministically; by default protobuf's feature order differs between
    processes."""
    serialised = tf_example_pb2.Example.FromString(features.serialize_example(example))
    return serialised.SerializeToString(deterministic=True)


# --- Random access --------------------------------------------------------------------------------


def is_complete(directory: Path) -> bool:
    """Whether the data set in ``directory`` is complete."""
    return (directory / MANIFEST).exists()


def is_shard(name: str) -> bool:
    """Whether a file of a data set is one of its shards, which may have gigabytes; ArrayRecord
    verifies each record that is read."""
    return ".array_record-" in name


def read_manifest(directory: Path | str, content: bytes | None = None) -> dict:
    """The manifest of a complete data set: ``data_set``, ``version``, and ``files``, ``{name:
    {"bytes", "sha256"}}``.

    Args:
        content: of the manifest, if it has been read already.

    Raises:
        InputError: it is missing, damaged, or lists an invalid file.
    """
    path = as_path(directory) / MANIFEST
    if content is None and not path.exists():
        raise InputError(
            f"{directory} has no {MANIFEST}: the data set is incomplete. Run notebook 01 or"
            " `percepiano preprocess` to resume."
        )
    schema = {"data_set": str, "version": str, "files": {str: {"bytes": int, "sha256": str}}}
    advice = "Run preprocess again to restore it, or copy it again."
    source = path if content is None else content
    manifest = read_signed_json(source, schema, name=str(path), advice=advice, unsigned=True)

    def valid(name: str, known: dict) -> bool:
        # Untrusted input: a name must stay inside the directory, a length must be a valid number.
        parts = PurePosixPath(name).parts
        inside = parts and ".." not in parts and not name.startswith("/") and "\\" not in name
        return bool(inside) and known["bytes"] >= 0

    if odd := [name for name, known in manifest["files"].items() if not valid(name, known)]:
        what = f"{odd[0]!r}, which is not a valid file of a data set"
        raise InputError(f"{path} lists {what}. Do not use this data set.")
    return manifest


def check_tables(directory: Path, made_by: str) -> None:
    """Compare the small files of a data set, which describe its shards and clips, with its
    manifest.

    Raises:
        InputError: one is missing or differs.
    """
    for name, known in read_manifest(directory)["files"].items():
        # records are for resuming; hidden files are those of other programs
        if is_shard(name) or name.startswith("records/") or PurePosixPath(name).name[0] == ".":
            continue
        path = directory / name
        if not path.is_file() or sha256_of(path) != known["sha256"]:
            state = "does not match" if path.is_file() else "is missing, but is in"
            raise InputError(f"{path} {state} {MANIFEST}. Run {made_by} again to restore it.")


@dataclass(frozen=True)
class ShardSet:
    """One split of a data set, and the data set's metadata.

    Attributes:
        examples, raw: random access to decoded and to serialised examples.
        n_frames: int64 (recordings,), in the order of the examples.
        chunk_frames: frames per example, see `chunks`; 0: one example per recording.
    """

    examples: Sequence[dict]
    front_end: FrontEnd
    statistics: LevelStats
    metadata: dict
    n_frames: np.ndarray
    chunk_frames: int
    raw: Sequence[bytes]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict:
        return self.examples[index]


def open_shards(directory: str | Path, split: str, *, made_by: str) -> ShardSet:
    """Open a split of the data set in ``directory``.

    Raises:
        InputError: no complete data set (``made_by`` names the step that makes it), a damaged
            one, or no such split.
    """
    directory = Path(directory)
    if not is_complete(directory):
        state = "is incomplete" if directory.exists() else "does not exist"
        advice = f"Run {made_by} first; an interrupted run resumes."
        raise InputError(f"the data set {directory} {state}. {advice}")
    check_tables(directory, made_by)  # before TFDS reads them
    homes = [path.parent for path in directory.glob(f"*/{VERSION}/dataset_info.json")]
    if len(homes) != 1:
        advice = f"Delete it and run {made_by} again."
        raise InputError(f"{directory} should hold one data set, holds {len(homes)}. {advice}")
    builder = tfds.builder_from_directory(homes[0])
    if split not in builder.info.splits:
        known = ", ".join(sorted(builder.info.splits))
        raise InputError(f"{homes[0]} has no split {split!r}. Choose one of: {known}.")
    metadata = dict(builder.info.metadata)
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    return ShardSet(
        builder.as_data_source(split=split),
        FrontEnd(**metadata["front_end"]),
        LevelStats(**metadata["statistics"]),
        metadata,
        np.array(metadata["n_frames"][split], np.int64),
        metadata["chunk_frames"],
        builder.as_data_source(split=split, deserialize_method=raw),
    )


_REMEDY = "Run `percepiano preprocess --verify` to list all damage."


class Chunk(NamedTuple):
    """Part of a recording from frame ``start`` on: ``levels`` (time, mel), uint8 codes or float16
    dB, read-only."""

    recording: str
    start: int
    levels: np.ndarray


def parse(record: bytes, dtype: np.dtype, n_mels: int) -> Chunk:
    """Parse a serialised example without a copy of its levels, or raise InputError. TFDS's own
    decoding converts every feature through a list."""
    try:
        features = tf_example_pb2.Example.FromString(record).features.feature
        # Protobuf returns an empty list for a missing feature, which fails to unpack.
        (log_mel,) = features["log_mel"].bytes_list.value
        (recording,) = features["recording"].bytes_list.value
        (start,) = features["start_frame"].int64_list.value if "start_frame" in features else (0,)
        return Chunk(recording.decode(), start, np.frombuffer(log_mel, dtype).reshape(-1, n_mels))
    except (DecodeError, ValueError) as error:
        raise InputError(f"not an example of a log-mel chunk ({error})") from error


class Recordings:
    """Random access to frames of the recordings of an opened split, across chunks; InputError if
    the number of chunks does not match the recordings. ``dtype, n_mels``: of the stored levels."""

    def __init__(self, shards: ShardSet):
        self.n_frames, self.n_mels = shards.n_frames, shards.front_end.n_mels
        self.dtype = np.dtype(DTYPES[shards.metadata["stored"]])
        self._raw, self._chunk_frames = shards.raw, shards.chunk_frames
        self._counts = [chunk_count(int(frames), shards.chunk_frames) for frames in shards.n_frames]
        # record number of each recording's first chunk
        self._first = np.cumsum([0, *self._counts]).tolist()
        if self._first[-1] != len(shards.raw):
            raise InputError(
                f"the split's {len(self.n_frames)} recordings have {self._first[-1]} chunks, its"
                f" shards hold {len(shards.raw)}. {_REMEDY}"
            )

    def keys(self) -> list[str]:
        """Keys of the recordings, in their order; InputError if a chunk is damaged."""
        return [self._chunk(recording, 0).recording for recording in range(len(self.n_frames))]

    def read(self, recording: int, start: int, out: np.ndarray) -> str:
        """Fill ``out`` (time, mel) with the frames of a recording from ``start`` on; returns the
        recording's key. InputError if a chunk is damaged, or not the expected one."""
        filled = number = 0
        if self._chunk_frames:
            number = min(start // self._chunk_frames, self._counts[recording] - 1)
        while filled < len(out):
            chunk = self._chunk(recording, number)
            skipped = start + filled - chunk.start
            piece = chunk.levels[skipped : skipped + len(out) - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            number += 1
        return chunk.recording

    def _chunk(self, recording: int, number: int) -> Chunk:
        position = self._first[recording] + number
        name = f"record {position} of the shards"
        try:
            chunk = parse(self._raw[position], self.dtype, self.n_mels)
        except (InputError, RuntimeError) as error:  # array_record's, as on a wrong checksum
            raise InputError(f"{name} cannot be read: {error}. {_REMEDY}") from error
        start = number * self._chunk_frames
        last = number + 1 == self._counts[recording]
        frames = int(self.n_frames[recording]) - start if last else self._chunk_frames
        if (chunk.start, len(chunk.levels)) != (start, frames):
            raise InputError(
                f"{name} holds {len(chunk.levels)} frames of {chunk.recording} from frame"
                f" {chunk.start}, expected {frames} from frame {start}. {_REMEDY}"
            )
        return chunk


# --- Performances ---------------------------------------------------------------------------------

PERFORMANCES = "performances.npz"
TICK = 1e-4  # seconds: the unit of stored times, a hundredth of a frame
_TIME = np.uint32
# Storage format of a performance's structured arrays: columns and their types.
_PACKED = {
    "notes": {"onset": _TIME, "offset": _TIME, "pitch": np.uint8, "velocity": np.uint8},
    "pedals": {"time": _TIME, "number": np.uint8, "value": np.uint8},
}


def _npz(arrays: dict[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)  # deterministic: the date of its members is fixed
    return file.getvalue()


def pack_performance(performance: Performance) -> str:
    """Encode one performance as text, for the facts of its recording."""
    columns = {}
    for kind, types in _PACKED.items():
        rows = getattr(performance, kind)
        for name, dtype in types.items():
            values = np.rint(np.maximum(rows[name], 0) / TICK) if dtype is _TIME else rows[name]
            columns[f"{kind}.{name}"] = values.astype(dtype)
    return base64.b64encode(_npz(columns)).decode()


def join_performances(packed: dict[str, str]) -> bytes:
    """Content of `PERFORMANCES`, from key -> performance encoded by `pack_performance`."""
    parts = [read_npz(base64.b64decode(text), name=key) for key, text in packed.items()]
    arrays = {"key": np.array(list(packed))}
    for kind, types in _PACKED.items():
        names = [f"{kind}.{column}" for column in types]
        arrays[f"{kind}.count"] = np.array([len(part[names[0]]) for part in parts])
        arrays |= {name: np.concatenate([part[name] for part in parts]) for name in names}
    return _npz(arrays)


class Performances:
    """Performances by the keys of their recordings, from a file `PERFORMANCES`; InputError if it
    is damaged, with ``advice``."""

    def __init__(self, path: Path, advice: str):
        self._arrays = arrays = read_npz(path, advice=advice)
        try:
            self._row = {key: row for row, key in enumerate(arrays["key"].tolist())}
            self._ends = {kind: np.cumsum(arrays[f"{kind}.count"]) for kind in _PACKED}
            whole = all(
                arrays[f"{kind}.count"].shape == (len(self._row),)
                and (arrays[f"{kind}.count"] >= 0).all()
                and arrays[f"{kind}.{name}"].shape == (arrays[f"{kind}.count"].sum(),)
                and arrays[f"{kind}.{name}"].dtype == stored
                for kind, types in _PACKED.items()
                for name, stored in types.items()
            )
        except (KeyError, TypeError):
            whole = False
        if not whole:
            raise InputError(f"{path} is damaged (its arrays do not fit together). {advice}")

    def __contains__(self, key: str) -> bool:
        return key in self._row

    def __len__(self) -> int:
        return len(self._row)

    def __getitem__(self, key: str) -> Performance:
        return Performance(
            self._rows("notes", NOTE, self._row[key]), self._rows("pedals", PEDAL, self._row[key])
        )

    def _rows(self, kind: str, dtype: np.dtype, row: int) -> np.ndarray:
        stop = int(self._ends[kind][row])
        part = slice(stop - int(self._arrays[f"{kind}.count"][row]), stop)
        rows = np.empty(part.stop - part.start, dtype)
        for name, stored in _PACKED[kind].items():
            values = self._arrays[f"{kind}.{name}"][part]
            rows[name] = values * TICK if stored is _TIME else values
        return rows


@functools.lru_cache(maxsize=2)
def open_performances(directory: Path) -> Performances:
    """The performances of a data set; InputError if there are none, or the file is damaged."""
    path = directory / PERFORMANCES
    if not path.exists():
        raise InputError(
            f"the shards in {directory} have no {PERFORMANCES}, and transcription is trained on the"
            " MIDI of each recording. Preprocess a source with MIDI, such as MAESTRO, into another"
            " directory, or pre-train with ssast."
        )
    advice = "Run preprocess again to restore it."
    if sha256_of(path) != read_manifest(directory)["files"].get(PERFORMANCES, {}).get("sha256"):
        raise InputError(f"{path} does not match {MANIFEST}. {advice}")
    return Performances(path, advice)


def require_performances(performances: Performances, keys: Iterable[str], split: str) -> None:
    """Raise InputError unless every recording of a split has a performance."""
    without = [key for key in keys if key not in performances]
    if without:
        raise InputError(
            f"{len(without)} recordings of the split {split!r} have no readable MIDI, such as"
            f" {without[0]}; in recordings.csv their column notes is 0. Add their MIDI, preprocess"
            " without them, or pre-train with ssast."
        )
