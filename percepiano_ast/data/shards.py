"""Log-mel shards: the format of a packed data set, and how to open it. `staging` makes them.

A data set is a TFDS data set of ArrayRecord files that can be read without TensorFlow:
``tfds.builder_from_directory(DIR).as_data_source()``. Its records are in order: the recordings of a
split as planned, the chunks of a recording one after the other. The plan alone determines which
recording is in which file, so files can be made in any order and on any machine with the same
result.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from percepiano_ast.config import FrontEnd, Statistics
from percepiano_ast.errors import InputError

VERSION = "2.0.0"
MANIFEST = "manifest.json"  # written last: a data set with this file is complete
WRITER_OPTIONS = "group_size:1"  # one record per group, for random access
SHARD_SECONDS = 7200  # 92 MB of uint8 codes: a hundred files for MAESTRO, few enough for Drive

# 5.1 s: a compromise between few reads per crop and few unused frames.
CHUNK_FRAMES = 512
DTYPES: dict[str, type[np.number]] = {"uint8": np.uint8, "float16": np.float16}


@dataclass(frozen=True)
class Item:
    """One recording to be written to the shards.

    Attributes:
        fields: copied into every example of the recording.
        seconds: its expected length.
        measured: whether that length is measured rather than a typical value.
    """

    key: str
    split: str
    fields: dict
    seconds: float
    measured: bool = True


@dataclass(frozen=True)
class Shard:
    """One file of a data set: number ``number`` of the ``count`` files of a split, and its
    recordings."""

    split: str
    number: int
    count: int
    items: tuple[Item, ...]

    @property
    def name(self) -> str:
        """Such as ``train-00003-of-00080``."""
        return f"{self.split}-{self.number:05d}-of-{self.count:05d}"


def plan(items: list[Item]) -> list[Shard]:
    """Distribute items over shards of about ``SHARD_SECONDS`` each, in their order; a function of
    the items alone."""
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
    """TFDS builder of a data set whose shards are made by `staging`. Subclasses define name and
    features.

    Args:
        data_dir: the data set is in ``data_dir/NAME/VERSION``.
        stored: ``uint8`` codes of the front end's range, or ``float16`` levels in dB.
        metadata: stored in the data set; `open_shards` needs ``front_end``, ``statistics``,
            ``n_frames``, ``chunk_frames``.
    """

    VERSION = tfds.core.Version(VERSION)
    pkg_dir_path = epath.Path(__file__).parent
    FEATURES: dict = {}
    CHUNK_FRAMES = CHUNK_FRAMES  # of an example; 0 if it is a whole recording

    def __init__(self, *, data_dir: str | Path, metadata: dict, stored: str = "uint8"):
        self._stored = stored
        self._metadata = metadata
        super().__init__(data_dir=str(data_dir), file_format="array_record")

    @classmethod
    def features_of(cls, stored: str, n_mels: int) -> tfds.features.FeaturesDict:
        """Features of an example; ``encoding='bytes'`` reads 14 times faster than the default."""
        log_mel = tfds.features.Tensor(shape=(None, n_mels), dtype=DTYPES[stored], encoding="bytes")
        return tfds.features.FeaturesDict({"log_mel": log_mel, **cls.FEATURES})

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description=" ".join((self.__doc__ or "").split()),
            features=self.features_of(self._stored, self._metadata["front_end"]["n_mels"]),
            metadata=tfds.core.MetadataDict(self._metadata),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        raise NotImplementedError(
            "shards are made by percepiano_ast.data.staging, which can resume"
        )

    def _generate_examples(self):
        raise NotImplementedError(
            "shards are made by percepiano_ast.data.staging, which can resume"
        )

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
        """Write TFDS's metadata, given the number of records per shard and the bytes of each
        split."""
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
    """Cut a recording, given in blocks (time, mel), into chunks of ``size`` frames: ``(start frame,
    chunk)``.

    The last chunk includes the remainder, so all chunks of a recording of at least ``size`` frames
    have at least ``size`` frames. A ``size`` of 0 keeps the recording whole.
    """
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


class Levels:
    """Statistics of the stored levels of one recording, accumulated block by block; exact for uint8
    codes."""

    def __init__(self, front_end: FrontEnd):
        self.front_end = front_end
        self.count = self.at_floor = self.at_ceiling = 0
        self.sums = [0.0, 0.0]  # of the level in dB and of its square

    def add(self, stored: np.ndarray) -> None:
        """Count one block (time, mel) of uint8 codes or float16 levels."""
        floor, step = self.front_end.floor_db, self.front_end.step_db
        if stored.dtype == np.uint8:
            histogram = np.bincount(stored.ravel(), minlength=256)
            levels, low, high = floor + step * np.arange(256), histogram[0], histogram[255]
        else:
            levels, histogram = stored.astype(np.float64).ravel(), np.ones(1, int)
            low, high = np.sum(levels <= floor), np.sum(levels >= floor + 255 * step)
        self.count += stored.size
        self.at_floor += int(low)
        self.at_ceiling += int(high)
        self.sums[0] += float((histogram * levels).sum())
        self.sums[1] += float((histogram * levels**2).sum())

    def facts(self) -> dict:
        """As a JSON object; `level_statistics` combines those of many recordings."""
        names = {"count": self.count, "at_floor": self.at_floor, "at_ceiling": self.at_ceiling}
        return names | {"sum_db": self.sums[0], "sum_squared_db": self.sums[1]}


def level_statistics(facts: Iterable[dict]) -> Statistics:
    """Mean and standard deviation of the level in dB over recordings, independent of their
    order."""
    facts = list(facts)
    count = sum(one["count"] for one in facts)
    mean = math.fsum(one["sum_db"] for one in facts) / count
    variance = math.fsum(one["sum_squared_db"] for one in facts) / count - mean**2
    at_floor, at_ceiling = (
        sum(one[end] for one in facts) / count for end in ("at_floor", "at_ceiling")
    )
    return Statistics(mean, math.sqrt(max(variance, 0.0)), count, at_floor, at_ceiling)


def size_of(path: Path) -> int:
    """Size of a local file or one at ``gs://`` in bytes."""
    stat = path.stat()
    return stat.st_size if isinstance(path, Path) else stat.length


def is_complete(directory: Path) -> bool:
    """Whether the data set in ``directory`` is complete."""
    return (directory / MANIFEST).exists()


@dataclass(frozen=True)
class ShardSet:
    """One split of a packed data set: random access to examples, and the data set's metadata.

    Attributes:
        examples: decoded examples; the chunks of a recording are consecutive.
        n_frames: int64 (recordings,), frames of each recording in the order of the examples.
        chunk_frames: frames per example, except a recording's last, which includes the remainder;
            0: one example per recording.
        raw: the serialised examples.
    """

    examples: Sequence[dict]
    front_end: FrontEnd
    statistics: Statistics
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
        InputError: no complete data set (the message names ``made_by``, the step that writes it),
            or no such split.
    """
    directory = Path(directory)
    if not is_complete(directory):
        state = "is incomplete" if directory.exists() else "does not exist"
        raise InputError(
            f"the data set {directory} {state}. Run {made_by} first; an interrupted run resumes."
        )
    homes = [path.parent for path in directory.glob(f"*/{VERSION}/dataset_info.json")]
    if len(homes) != 1:
        raise InputError(
            f"{directory} should hold one data set, holds {len(homes)}. Delete it and run {made_by}"
            " again."
        )
    home = homes[0]
    builder = tfds.builder_from_directory(home)
    if split not in builder.info.splits:
        raise InputError(
            f"{home} has no split {split!r}. Choose one of:"
            f" {', '.join(sorted(builder.info.splits))}."
        )
    metadata = dict(builder.info.metadata)
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    return ShardSet(
        builder.as_data_source(split=split),
        FrontEnd(**metadata["front_end"]),
        Statistics(**metadata["statistics"]),
        metadata,
        np.array(metadata["n_frames"][split], np.int64),
        metadata["chunk_frames"],
        builder.as_data_source(split=split, deserialize_method=raw),
    )
