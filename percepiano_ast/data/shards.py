"""Log-mel shards: what a packed data set looks like, and how it is opened. `staging` makes them.

A data set is a TFDS data set of ArrayRecord files that no TensorFlow is needed to read:
``tfds.builder_from_directory(DIR).as_data_source()``. Its records are in order: the recordings of a split as planned, the
chunks of a recording one after the other. Which recording lies in which file follows from the plan alone, so files
can be made one by one, in any order and by any machine, and come out the same.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from percepiano_ast.config import FrontEnd, InputError, Statistics

VERSION = "2.0.0"
MANIFEST = "manifest.json"  # written last: where it is, the data set is complete
WRITER_OPTIONS = "group_size:1"  # one record a group, as random access wants it
SHARD_SECONDS = 7200  # 92 MB of uint8 codes: MAESTRO makes a hundred files, which Drive can bear

# 5.1 s: small enough that a crop reads little beside itself, large enough to be read in one piece.
CHUNK_FRAMES = 512
DTYPES: dict[str, type[np.number]] = {"uint8": np.uint8, "float16": np.float16}


@dataclass(frozen=True)
class Item:
    """One recording on its way to the shards.

    Attributes:
        fields: travel into every example made from it.
        seconds: its expected length.
        measured: whether that is its own, not what is usual.
    """

    key: str
    split: str
    fields: dict
    seconds: float
    measured: bool = True


@dataclass(frozen=True)
class Shard:
    """One file of a data set: number ``number`` of the ``count`` files of a split, and what goes into it."""

    split: str
    number: int
    count: int
    items: tuple[Item, ...]

    @property
    def name(self) -> str:
        """Such as ``train-00003-of-00080``."""
        return f"{self.split}-{self.number:05d}-of-{self.count:05d}"


def plan(items: list[Item]) -> list[Shard]:
    """Spread items over shards of about ``SHARD_SECONDS`` each, in their order; nothing but the items decides."""
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
    """TFDS builder of a data set whose shards are made by `staging`. Subclasses give name and features.

    Args:
        data_dir: the data set lies in ``data_dir/NAME/VERSION``.
        stored: ``uint8`` codes of the front end's range, or ``float16`` levels in dB.
        metadata: kept in the data set; `open_shards` needs ``front_end``, ``statistics``, ``n_frames``, ``chunk_frames``.
    """

    VERSION = tfds.core.Version(VERSION)
    pkg_dir_path = epath.Path(__file__).parent
    FEATURES: dict = {}
    CHUNK_FRAMES = CHUNK_FRAMES  # of an example; 0 where it is a whole recording

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
            description=self.__doc__,
            features=self.features_of(self._stored, self._metadata["front_end"]["n_mels"]),
            metadata=tfds.core.MetadataDict(self._metadata),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        raise NotImplementedError("shards are made by percepiano_ast.data.staging, which can be interrupted")

    def _generate_examples(self):
        raise NotImplementedError("shards are made by percepiano_ast.data.staging, which can be interrupted")

    @classmethod
    def home(cls, directory: Path) -> Path:
        """Where the files of the data set below ``directory`` lie."""
        return directory / cls.name / VERSION

    @classmethod
    def file_of(cls, directory: Path, shard: Shard) -> Path:
        """File of one shard, under TFDS's name for it."""
        numbers = f"{shard.number:05d}-of-{shard.count:05d}"
        return cls.home(directory) / f"{cls.name}-{shard.split}.array_record-{numbers}"

    def write_info(self, lengths: dict[str, list[int]], num_bytes: dict[str, int]) -> None:
        """Write what makes the files a TFDS data set, given the records of every shard of every split."""
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
    """Cut a recording, given in blocks (time, mel), into chunks of ``size`` frames: ``(start frame, chunk)``.

    The last one takes the rest, so every chunk of a recording of at least ``size`` frames holds at least as many. A
    ``size`` of 0 keeps the recording whole.
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
    """How many chunks `chunks` makes of a recording of ``n_frames``."""
    return max(n_frames // size, 1) if size else 1


class Levels:
    """What is known of the stored levels of one recording, gathered block by block; exact for uint8 codes."""

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
        """As JSON has it; `level_statistics` joins those of many recordings."""
        names = {"count": self.count, "at_floor": self.at_floor, "at_ceiling": self.at_ceiling}
        return names | {"sum_db": self.sums[0], "sum_squared_db": self.sums[1]}


def level_statistics(facts: Iterable[dict]) -> Statistics:
    """Mean and standard deviation of the level in dB over recordings; the same in whatever order they come."""
    facts = list(facts)
    count = sum(one["count"] for one in facts)
    mean = math.fsum(one["sum_db"] for one in facts) / count
    variance = math.fsum(one["sum_squared_db"] for one in facts) / count - mean**2
    at_floor, at_ceiling = (sum(one[end] for one in facts) / count for end in ("at_floor", "at_ceiling"))
    return Statistics(mean, math.sqrt(max(variance, 0.0)), count, at_floor, at_ceiling)


def size_of(path: Path) -> int:
    """Bytes of a file, here or at ``gs://``."""
    stat = path.stat()
    return stat.st_size if isinstance(path, Path) else stat.length


def is_complete(directory: Path) -> bool:
    """Whether the data set below ``directory`` was finished."""
    return (directory / MANIFEST).exists()


@dataclass(frozen=True)
class ShardSet:
    """One split of a packed data set: random access to examples, and what the shards say of themselves.

    Attributes:
        examples: decoded examples; a recording's chunks follow one another.
        n_frames: int64 (recordings,), frames of each recording in the order of the examples.
        chunk_frames: frames of an example but a recording's last, which takes the rest; 0: an example is a recording.
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
    """Open a split of the data set below ``directory``.

    Raises:
        InputError: nothing complete is there (the message names ``made_by``, the step that writes it), or no such split.
    """
    directory = Path(directory)
    if not is_complete(directory):
        state = "is incomplete" if directory.exists() else "does not exist"
        raise InputError(f"the shards {directory} {state}. Run {made_by} first; it continues where it stopped.")
    homes = [path.parent for path in directory.glob(f"*/{VERSION}/dataset_info.json")]
    if len(homes) != 1:
        raise InputError(f"{directory} should hold one data set, holds {len(homes)}. Delete it, run {made_by} again.")
    home = homes[0]
    builder = tfds.builder_from_directory(home)
    if split not in builder.info.splits:
        raise InputError(f"{home} has no split {split!r}, only {', '.join(sorted(builder.info.splits))}")
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
