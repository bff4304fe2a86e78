"""MAESTRO v3 and anything shaped like it: archive or folder -> log-mel shards.

Source: Hawthorne et al. 2019, https://magenta.tensorflow.org/datasets/maestro, CC BY-NC-SA 4.0. The archive holds one CSV
(``canonical_composer, canonical_title, split, year, midi_filename, audio_filename, duration``) and the WAV and MIDI files
that it names. Members are read one at a time, straight out of the archive, local or remote; no WAV is stored.
"""

import functools
import hashlib
import io
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import fsspec
import numpy as np
import pandas as pd
import soundfile
import tensorflow_datasets as tfds

from percepiano_ast import audio
from percepiano_ast.config import FrontEnd, InputError, claim_directory
from percepiano_ast.data import shards

COLUMNS = ("canonical_composer", "canonical_title", "split", "year", "midi_filename", "audio_filename", "duration")
SPLITS = ("train", "validation", "test")
LICENCE = "MAESTRO v3: CC BY-NC-SA 4.0, https://magenta.tensorflow.org/datasets/maestro"
MADE_BY = "notebook 01_preprocess_maestro or `python -m percepiano_ast preprocess`"

# 20.4 s: two windows of the model, small enough to be read whole for one crop.
CHUNK_FRAMES = 2048
MIN_FRAMES = 1024  # one window of the model

# PercePiano's own works: a model that is evaluated on PercePiano must not have heard them in pre-training.
# MAESTRO's table counts the catalogue number up over the movements of a sonata: "Sonata in B-flat Major, D. 961" is a
# movement of D. 960, while "D. 960" in A or in C minor is one of D. 959 or D. 958.
PERCEPIANO_WORKS = (
    ("Schubert", r"^(?!.*\bin [AC]\b).*D\.?\s*960"),
    ("Schubert", r"\bB(b|.?flat)\b.*D\.?\s*96[123]"),
    # Op. 142 No. 3, and the set unless another number is named; ASAP writes op142_3.
    ("Schubert", r"^(?!.*(No\.?\s*|142_|935\s*/\s*)[124]\b).*(D\.?\s*935|Op\.?\s*142)"),
    ("Beethoven", r"WoO\.?\s*80|32 Variations"),
)


class MaestroLogMel(shards.LogMelBuilder, skip_registration=True):
    """Log-mel of MAESTRO recordings in chunks of about 20 s, uint8 over the front end's range."""

    name = "maestro_log_mel"
    FEATURES = {
        "log_mel": shards.log_mel_feature(),
        "recording": tfds.features.Text(),
        "composer": tfds.features.Text(),
        "title": tfds.features.Text(),
        "year": np.int32,
        "start_frame": np.int32,
    }


class Source:
    """A MAESTRO-shaped zip archive (path, ``https://`` or ``gs://``) or unpacked folder.

    Raises:
        InputError: nothing there, not a complete archive, no CSV or not MAESTRO's columns and values.
    """

    def __init__(self, where: str):
        self.where = str(where)
        self._zip = None
        self._folder = Path(self.where)
        if "://" in self.where or self._folder.is_file():
            self._open_zip()
        elif not self._folder.is_dir():
            raise InputError(f"no MAESTRO archive or folder at {self.where!r}; give a path, https:// or gs:// address")
        names = self._zip.namelist() if self._zip else [p.name for p in self._folder.glob("*.csv")]
        tables = [name for name in names if name.endswith(".csv") and name.count("/") <= 1]
        if len(tables) != 1:
            raise InputError(f"{self.where} should hold one CSV table like maestro-v3.0.0.csv, found {tables or 'none'}")
        self._root = tables[0].rpartition("/")[0]
        self.table = self._read_table(tables[0])

    def _open_zip(self) -> None:
        try:
            # Small blocks: reading ahead by megabytes would fetch members twice over.
            file = fsspec.open(self.where, "rb", **({"block_size": 2**16} if "://" in self.where else {})).open()
            self._zip = zipfile.ZipFile(file)
        except zipfile.BadZipFile as error:
            raise InputError(f"{self.where} is not a complete zip archive ({error}); download it again") from error
        except Exception as error:  # the network stack's own exception types are open-ended
            raise InputError(f"cannot open {self.where} ({_what(error)}); give another address or a copy") from error

    def _read_table(self, name: str) -> pd.DataFrame:
        content = self._read(name)
        self.fingerprint = hashlib.sha256(content).hexdigest()[:16]
        text = ("canonical_composer", "canonical_title", "split", "midi_filename", "audio_filename")
        try:
            table = pd.read_csv(io.BytesIO(content), dtype=dict.fromkeys(text, str))
        except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
            raise InputError(f"{name} in {self.where} is no readable CSV table ({error}); fetch it again") from error
        _check_table(table, f"{name} in {self.where}")
        return table

    def _read(self, name: str) -> bytes:
        """The bytes of a file of the archive or folder; raises like ``open``."""
        try:
            return self._zip.read(name) if self._zip else (self._folder / name).read_bytes()
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise InputError(f"{name} is damaged in {self.where}: {error}") from error
        except Exception as error:  # the network stack's own exception types are open-ended
            if isinstance(error, KeyError if self._zip else FileNotFoundError):
                raise InputError(f"{name} is listed but not in {self.where}") from error
            # A broken connection must end the run, not pass for a damaged recording; and some of the network stack's
            # exceptions do not survive the way from a worker process.
            what = f"reading {name} from {self.where} failed ({_what(error)})"
            raise OSError(f"{what}; run again, it continues") from error

    def open(self, audio_filename: str) -> io.BytesIO:
        """One recording, read once from front to back.

        Raises:
            InputError: the archive lacks it, or its bytes are damaged.
            OSError: the source stopped answering.
        """
        return io.BytesIO(self._read(f"{self._root}/{audio_filename}" if self._root else audio_filename))


def _what(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _check_table(table: pd.DataFrame, name: str) -> None:
    missing = [column for column in COLUMNS if column not in table]
    if missing:
        raise InputError(f"{name} lacks the columns {', '.join(missing)}; MAESTRO v3 has them")
    if table.empty:
        raise InputError(f"{name} lists no recordings; fetch it again")
    numbers = table[["year", "duration"]].apply(pd.to_numeric, errors="coerce")
    for column in ("canonical_composer", "canonical_title", "split", "audio_filename", "year", "duration"):
        bad = (numbers if column in numbers else table)[column].isna()
        if bad.any():
            raise InputError(f"{name}, line {bad.idxmax() + 2}: {column} is {table[column][bad.idxmax()]!r}")
    unknown = sorted(set(table["split"]) - set(SPLITS))
    if unknown:
        raise InputError(f"{name}: split {unknown[0]!r} is none of {', '.join(SPLITS)}")
    repeated = table["audio_filename"].duplicated()
    if repeated.any():
        raise InputError(f"{name} lists {table['audio_filename'][repeated].iloc[0]} twice; keep one line of each")


_open = functools.lru_cache(maxsize=1)(Source)  # one directory read per worker process


def is_percepiano_work(composer: str, title: str) -> bool:
    """Whether a recording is of a work that PercePiano rates."""
    return any(name in composer and re.search(work, title, re.IGNORECASE) for name, work in PERCEPIANO_WORKS)


def _produce(item: shards.Item, *, where: str, front_end: FrontEnd) -> dict[str, np.ndarray]:
    wave = audio.load(_open(where).open(item.key), front_end.sample_rate)
    codes, clipped = audio.quantize(audio.log_mel(wave, front_end), front_end)
    if len(codes) < MIN_FRAMES:
        seconds = front_end.seconds(len(codes))
        raise InputError(f"{seconds:.1f} s long, shorter than one window of {front_end.seconds(MIN_FRAMES):.1f} s")
    return {"log_mel": codes, "clipped": np.float32(clipped)}


def _examples(items: list[shards.Item], staged: Path) -> Iterator[tuple[str, dict]]:
    for item in items:
        codes = shards.read_staged(staged, item)["log_mel"]
        # The last chunk takes the rest, so every chunk holds at least one window.
        for number in range(max(len(codes) // CHUNK_FRAMES, 1)):
            start = number * CHUNK_FRAMES
            last = number + 1 >= len(codes) // CHUNK_FRAMES
            chunk = codes[start:] if last else codes[start : start + CHUNK_FRAMES]
            yield f"{item.key}@{start}", {"log_mel": chunk, "start_frame": start, "recording": item.key, **item.fields}


def preprocess(
    where: str,
    out: str | Path,
    front_end: FrontEnd,
    *,
    workers: int,
    simulated: bool = False,
    log: Callable[[str], None] = print,
) -> Path:
    """Turn a MAESTRO-shaped source into the data set ``maestro_log_mel`` below ``out``; continues an interrupted run.

    Beside the shards it writes ``recordings.csv`` (what is in), ``skipped.csv`` (what is not, and why).

    Raises:
        InputError: unusable source, ``out`` of another configuration, or no readable recording.
    """
    source = Source(where)
    settings = {"source": Path(where).name, "table": source.fingerprint, "front_end": asdict(front_end)}
    out = claim_directory(out, settings)
    if shards.is_complete(out):
        log(f"shards in {out} are complete")
        return out
    rows = source.table.sort_values("audio_filename")
    rated = [is_percepiano_work(c, t) for c, t in zip(rows["canonical_composer"], rows["canonical_title"])]
    items = [_item(row) for row in rows[~np.array(rated)].itertuples()]
    left_out = [(_item(row), "a work that PercePiano rates") for row in rows[rated].itertuples()]
    hours = rows["duration"][~np.array(rated)].sum() / 3600
    log(f"{len(items)} recordings, {hours:.2f} h; {len(left_out)} left out as PercePiano's works")
    staged = out / "staged"
    produce = functools.partial(_produce, where=str(where), front_end=front_end)
    skipped = shards.stage(items, produce, staged, workers=workers, log=log)
    shards.report_skipped(left_out + skipped, len(rows), out / "skipped.csv", log)
    failed = {item.key for item, _ in skipped}
    kept = [item for item in items if item.key not in failed]
    _pack(kept, rows, out, staged, front_end, simulated)
    return out


def _item(row) -> shards.Item:
    fields = {"composer": row.canonical_composer, "title": row.canonical_title, "year": int(row.year)}
    return shards.Item(row.audio_filename, row.split, fields)


def _pack(kept: list[shards.Item], rows, out: Path, staged: Path, front_end: FrontEnd, simulated: bool) -> None:
    by_split = {split: [item for item in kept if item.split == split] for split in SPLITS}
    if not by_split["train"]:
        raise InputError("no readable recording in the training split: there is nothing to learn from")
    arrays = (shards.read_staged(staged, item) for item in by_split["train"])
    statistics = shards.level_statistics((a["log_mel"] for a in arrays), front_end)
    listing = rows[rows["audio_filename"].isin([item.key for item in kept])]
    listing.to_csv(out / "recordings.csv", index=False)
    examples = {split: functools.partial(_examples, part, staged) for split, part in by_split.items() if part}
    description = {"licence": "made from code" if simulated else LICENCE, "simulated": simulated}
    shards.pack(
        MaestroLogMel, out, staged, examples, front_end=front_end, statistics=statistics, description=description
    )


def write_archive(path: str | Path, recordings: Iterable[tuple[dict, np.ndarray, bytes]], sample_rate: int) -> Path:
    """Write a zip archive in MAESTRO's shape from (row without file names, mono wave, MIDI bytes).

    The row gives ``canonical_composer, canonical_title, split, year``; the rest follows from the audio. The same input
    gives the same bytes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    root, rows = "maestro-v3.0.0", []
    partial = path.with_name(path.name + ".partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for number, (row, wave, midi) in enumerate(recordings):
            stem = f"{row['year']}/recording_{number:04d}"
            names = {"midi_filename": f"{stem}.midi", "audio_filename": f"{stem}.wav"}
            sound = io.BytesIO()
            soundfile.write(sound, wave, sample_rate, format="WAV", subtype="PCM_16")
            # ZipInfo's default date keeps the archive's bytes free of the clock.
            _add(archive, f"{root}/{names['audio_filename']}", sound.getvalue())
            _add(archive, f"{root}/{names['midi_filename']}", midi)
            rows.append({**row, **names, "duration": len(wave) / sample_rate})
        _add(archive, f"{root}/{root}.csv", pd.DataFrame(rows)[list(COLUMNS)].to_csv(index=False).encode())
    partial.replace(path)
    return path


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED, compresslevel=1)
