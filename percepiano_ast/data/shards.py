"""Log-mel shards: recordings are staged one by one, then packed as a TFDS data set of ArrayRecord files.

Staging makes the work resumable: each finished recording is one file that appears whole or not at all. Packing is a pure
function of the staged files, so an interrupted run ends with the same shards as an uninterrupted one. Shards need no
TensorFlow to read: ``tfds.builder_from_directory(DIR).as_data_source()``.
"""

import contextlib
import csv
import io
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from percepiano_ast.config import FrontEnd, InputError, Statistics, write_json

VERSION = "1.0.0"


@dataclass(frozen=True)
class Item:
    """One recording on its way to the shards; ``fields`` travel into every example made from it."""

    key: str
    split: str
    fields: dict

    @property
    def file_name(self) -> str:
        """Name of its staged file."""
        return self.key.replace("/", "__") + ".npz"


class LogMelBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """TFDS builder over examples that are already computed. Subclasses give name and features."""

    VERSION = tfds.core.Version(VERSION)
    pkg_dir_path = epath.Path(__file__).parent
    FEATURES: dict = {}

    def __init__(self, *, data_dir: Path, examples: dict[str, Callable[[], Iterator]], metadata: dict):
        self._examples = examples
        self._metadata = metadata
        super().__init__(data_dir=str(data_dir), file_format="array_record")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(self.FEATURES),
            metadata=tfds.core.MetadataDict(self._metadata),
        )

    def _split_generators(self, dl_manager):
        return {split: make() for split, make in self._examples.items()}

    def _generate_examples(self):
        raise NotImplementedError("examples come from _split_generators")


def log_mel_feature(n_mels: int = 128):
    """uint8 (time, mel) codes. ``encoding='bytes'`` reads 14 times faster than the default."""
    return tfds.features.Tensor(shape=(None, n_mels), dtype=np.uint8, encoding="bytes")


def stage(
    items: list[Item],
    produce: Callable[[Item], dict[str, np.ndarray]],
    directory: Path,
    *,
    workers: int,
    log: Callable[[str], None] = print,
) -> list[tuple[Item, str]]:
    """Compute every item that is not staged yet; returns the items that could not be read, with the reason.

    Args:
        produce: module-level function (it runs in worker processes); its arrays are kept. An ``InputError`` that it
            raises lists the item as skipped; anything else ends the run.
    """
    directory.mkdir(parents=True, exist_ok=True)
    todo = [item for item in items if not (directory / item.file_name).exists()]
    if len(todo) < len(items):
        log(f"  {len(items) - len(todo)} of {len(items)} were ready already")
    skipped, started, shown = [], None, 0.0
    # Fork is unsafe beside JAX's threads; spawned workers import only what the front end needs.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, max(len(todo), 1)), mp_context=context) as pool:
        results = pool.map(_attempt, [produce] * len(todo), todo, [directory] * len(todo))
        for done, (item, reason) in enumerate(zip(todo, results), start=1):
            if reason is not None:
                skipped.append((item, reason))
            started = started or time.monotonic()  # the first result also waited for the workers to start
            elapsed = time.monotonic() - started
            if elapsed - shown > 5 or done == len(todo):
                shown = elapsed
                left = elapsed / max(done - 1, 1) * (len(todo) - done)
                log(f"  {done}/{len(todo)} in {elapsed:.0f} s, about {left:.0f} s left")
    return skipped


def _attempt(produce, item: Item, directory: Path) -> str | None:
    try:
        arrays = produce(item)
    except InputError as error:
        return str(error)
    partial = directory / (item.file_name + ".partial")
    with partial.open("wb") as file:
        np.savez(file, **arrays)
    partial.replace(directory / item.file_name)
    return None


def report_skipped(skipped: list[tuple[Item, str]], total: int, path: Path, log: Callable[[str], None]) -> None:
    """Count and list what was left out, on the log and in a CSV file.

    Raises:
        InputError: nothing was left.
    """
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["key", "split", "reason"])
        writer.writerows((item.key, item.split, reason) for item, reason in skipped)
    for item, reason in skipped[:20]:
        log(f"  skipped {item.key}: {reason}")
    if skipped:
        log(f"  {len(skipped)} of {total} recordings skipped, all listed in {path}")
    if len(skipped) == total:
        raise InputError(f"none of the {total} recordings could be read; the reasons are in {path}")


def read_staged(directory: Path, item: Item) -> dict[str, np.ndarray]:
    """The arrays that ``produce`` made for ``item``."""
    with np.load(directory / item.file_name) as arrays:
        return dict(arrays)


def level_statistics(codes: Iterable[np.ndarray], front_end: FrontEnd) -> Statistics:
    """Mean and standard deviation of the level in dB, exact whatever the order, from the histogram of uint8 codes."""
    histogram = np.zeros(256, np.int64)
    for array in codes:
        histogram += np.bincount(array.ravel(), minlength=256)
    levels = front_end.floor_db + front_end.step_db * np.arange(256)
    total = histogram.sum()
    mean = float((histogram * levels).sum() / total)
    std = float(np.sqrt((histogram * (levels - mean) ** 2).sum() / total))
    return Statistics(mean, std, int(total), float(histogram[0] / total), float(histogram[255] / total))


def pack(
    builder: type[LogMelBuilder],
    directory: Path,
    staged: Path,
    examples: dict[str, Callable[[], Iterator]],
    *,
    front_end: FrontEnd,
    statistics: Statistics,
    description: dict,
) -> Path:
    """Write the data set below ``directory`` and remove what was staged; returns the data set's own directory."""
    metadata = {"front_end": asdict(front_end), "statistics": asdict(statistics), **description}
    tfds.disable_progress_bar()
    # What a killed run left half packed; the builder would take a version that is there already for its own.
    shutil.rmtree(directory / builder.name, ignore_errors=True)
    made = builder(data_dir=directory, examples=examples, metadata=metadata)
    with contextlib.redirect_stdout(io.StringIO()):  # it speaks of downloading; nothing is downloaded
        made.download_and_prepare()
    # TFDS leaves an empty download cache; the marker below is what says that the data set is complete.
    shutil.rmtree(directory / "downloads", ignore_errors=True)
    write_json(directory / "complete.json", {"data_set": builder.name, "version": VERSION})
    shutil.rmtree(staged)
    return Path(made.data_dir)


def is_complete(directory: Path) -> bool:
    """Whether packing below ``directory`` ended."""
    return (directory / "complete.json").exists()


@dataclass(frozen=True)
class ShardSet:
    """One split of a packed data set: random access to examples, and what the shards say of themselves."""

    examples: Sequence[dict]
    front_end: FrontEnd
    statistics: Statistics
    metadata: dict

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
    return ShardSet(
        builder.as_data_source(split=split),
        FrontEnd(**metadata["front_end"]),
        Statistics(**metadata["statistics"]),
        metadata,
    )
