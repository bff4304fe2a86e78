"""MAESTRO v3 (Hawthorne et al. 2019, https://magenta.tensorflow.org/datasets/maestro), a source in
its format, or a folder of recordings, to log-mel shards."""

import functools
import io
import logging
import re
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
import soundfile
import tensorflow_datasets as tfds

from percepiano_ast import audio
from percepiano_ast.config import FrontEnd, lookup
from percepiano_ast.data import build, shards, sources
from percepiano_ast.errors import InputError
from percepiano_ast.files import as_path, as_text, atomic, summary
from percepiano_ast.music.midi import read_midi

logger = logging.getLogger(__name__)

MADE_BY = "notebook 01_preprocess_maestro or `percepiano preprocess`"
MIN_FRAMES = 1024  # one window of the model
MIN_SAMPLE_RATE = 16_000  # of a recording: below it the upper bands would be empty
MAX_FULL_SCALE = 0.01  # maximum share of samples at full scale: above it a recording is distorted

# PercePiano's works, excluded from pre-training to prevent leakage. MAESTRO's table increments the
# catalogue number over the movements of a sonata: "Sonata in B-flat Major, D. 961" is a movement of
# D. 960, while "D. 960" in A or in C minor is a movement of D. 959 or D. 958.
PERCEPIANO_WORKS = (
    ("Schubert", r"^(?!.*\bin [AC]\b).*D\.?\s*960"),
    ("Schubert", r"\bB(b|.?flat)\b.*D\.?\s*96[123]"),
    # Op. 142 No. 3, and the whole set unless another number is given; ASAP writes op142_3.
    ("Schubert", r"^(?!.*(No\.?\s*|142_|935\s*/\s*)[124]\b).*(D\.?\s*935|Op\.?\s*142)"),
    ("Beethoven", r"WoO\.?\s*80|32 Variations"),
)


class MaestroLogMel(shards.LogMelBuilder, skip_registration=True):  # type: ignore[call-arg]  # mypy does not see tfds take it
    """Log-mel of recordings in chunks of about 5 s: uint8 codes over the front end's range, or
    float16 dB."""

    name = "maestro_log_mel"
    FEATURES = {
        "recording": tfds.features.Text(),
        "composer": tfds.features.Text(),
        "title": tfds.features.Text(),
        "year": np.int32,
        "start_frame": np.int32,
    }


def is_percepiano_work(composer: str, title: str) -> bool:
    """Whether a recording is of a work in PercePiano."""
    return any(
        name in composer and re.search(work, title, re.IGNORECASE)
        for name, work in PERCEPIANO_WORKS
    )


_open = functools.lru_cache(maxsize=1)(sources.open_source)  # one directory read per process


def _produce(
    item: shards.Item,
    facts: dict,
    *,
    where: str,
    root: str,
    midi: dict[str, str],
    front_end: FrontEnd,
    dtype: str,
) -> Iterator[np.ndarray]:
    """One recording in blocks (time, mel) of ``dtype``; ``midi``: recording -> MIDI file of the
    performance, whose notes are added to ``facts``."""
    source, name = _open(where), root + item.key
    facts["source_bytes"] = source.size(name)
    frames, above = 0, 0.0
    with source.open(name) as path:
        recording = audio.Recording(path, name=item.key, min_rate=MIN_SAMPLE_RATE)
        for levels in audio.log_mel_blocks(recording.blocks(front_end.sample_rate), front_end):
            frames += len(levels)
            codes, clipped = audio.quantize(levels, front_end)
            above += clipped * len(levels)
            yield codes if dtype == "uint8" else levels.astype(np.float16)
    if frames < MIN_FRAMES:
        seconds, window = front_end.seconds(frames), front_end.seconds(MIN_FRAMES)
        raise InputError(f"{seconds:.1f} s long, shorter than one window of {window:.1f} s")
    if recording.full_scale > MAX_FULL_SCALE:
        share = f"{100 * recording.full_scale:.1f} % of its samples are at full scale"
        raise InputError(f"clipped: {share}; record or export it at a lower level")
    facts |= {"source_rate": recording.sample_rate, "channels": recording.channels}
    facts |= {"seconds": round(recording.seconds, 3), "full_scale": recording.full_scale}
    remarks = recording.remarks
    if above and dtype == "uint8":
        remarks.append(f"{above / frames:.2%} of its levels are above the highest that is stored")
    if remarks:
        facts["remarks"] = remarks
    facts["notes"] = 0
    if not (name := midi.get(item.key, "")):
        return
    try:
        if wrong := sources.unsafe(name):
            raise InputError(wrong)
        with source.open(root + name) as path:
            performance = read_midi(path, name)
    except InputError as error:  # the audio is still used
        facts["midi_fault"] = str(error)
    else:
        facts["notes"] = len(performance.notes)
        facts["midi_remarks"] = "; ".join(performance.remarks)
        facts["performance"] = shards.pack_performance(performance)


def preprocess(
    where: str,
    out: str | Path,
    front_end: FrontEnd,
    options: build.BuildOptions,
    *,
    max_hours: float = 0.0,
    dtype: str = "uint8",
    simulated: bool = False,
) -> Path:
    """Convert a source of recordings into the data set ``maestro_log_mel`` in ``out``; resumes an
    interrupted run.

    Next to the shards it writes ``recordings.csv`` (included), ``skipped.csv`` (excluded, with
    reasons), ``performances.npz`` (if the source has MIDI), ``records/`` (metadata of every shard
    and recording) and ``manifest.json`` (checksums).

    Args:
        where: archive or folder in MAESTRO's format, or a folder of recordings, see `sources`.
        max_hours: approximate total hours over all splits; 0 for all.
        dtype: of stored levels, ``uint8`` or ``float16``.

    Raises:
        InputError: unusable source, ``out`` of another configuration, or see `build.build`.
        RunFailed: see `build.build`.
    """
    lookup(shards.DTYPES, dtype, "storage format of levels")
    if not isinstance(as_path(out), Path) and not options.beam_runner:
        raise InputError(f"{out}: only --beam-runner can write there. Give a local directory.")
    _open.cache_clear()  # a notebook may run again with another state of the source
    table = sources.read_table(_open(str(where)))
    settings: dict[str, Any] = {
        "source": as_text(Path(where).name),
        "table": table.fingerprint,
        "front_end": asdict(front_end),
    }
    settings |= {"stored": dtype, "limit_hours": max_hours}
    out = build.lock(out, settings)
    if build.check_complete(out):
        return out
    rows = table.rows
    names = zip(rows["canonical_composer"], rows["canonical_title"])
    rated = np.array([is_percepiano_work(*name) for name in names], bool)
    excluded = dict.fromkeys(rows["audio_filename"][rated], "a work of PercePiano")
    rows = sources.limited(rows[~rated], max_hours) if max_hours else rows[~rated]
    line = f"{len(rows)} recordings, {rows['duration'].sum() / 3600:.2f} h;"
    line += f" {len(excluded)} of PercePiano's works excluded"
    if max_hours:
        total = table.rows["duration"].sum() / 3600
        line += f"; limited to about {max_hours:g} h of {total:.2f} h"
    logger.info(line)
    for line in summary(table.others):
        logger.info(f"  {line}")
    if table.licence == sources.OWN_LICENCE:
        others = {name.lower() for name in table.others}
        paths = [PurePosixPath(name) for name in rows["audio_filename"]]
        ends = ".mid", ".midi"
        beside = [p for p in paths if {str(p.with_suffix(end)).lower() for end in ends} & others]
        if beside:
            logger.warning(
                f"{len(beside)} recordings have a MIDI file, such as {beside[0]}: without a table"
                " in MAESTRO's format it is not used, splits are random, and works are known by"
                " the names of files alone."
            )
    items = []
    for row in rows.itertuples():
        fields = {"composer": row.canonical_composer, "title": row.canonical_title}
        fields |= {"year": int(row.year), "recording": row.audio_filename}
        items.append(shards.Item(row.audio_filename, row.split, fields, float(row.duration)))
    midi = dict(zip(rows["audio_filename"], rows["midi_filename"].fillna("")))
    produce = functools.partial(
        _produce, where=str(where), root=table.root, midi=midi, front_end=front_end, dtype=dtype
    )

    def tables(facts: list[dict]) -> dict[str, pd.DataFrame | bytes]:
        columns = ["key", "seconds", "n_frames", "source_rate", "channels", "full_scale"]
        known = pd.DataFrame(facts).reindex(columns=[*columns, "notes", "midi_remarks", "sha256"])
        merged = rows.merge(known, left_on="audio_filename", right_on="key").drop(columns="key")
        for one in [one for one in facts if "midi_fault" in one][:20]:
            logger.info(f"  no MIDI for {one['key']}: {one['midi_fault']}")
        for one in [one for one in facts if "remarks" in one][:20]:
            logger.info(f"  {one['key']}: {'; '.join(one['remarks'])}")
        packed = {one["key"]: one["performance"] for one in facts if "performance" in one}
        if lacking := len(facts) - len(packed):
            what = f"{lacking} of {len(facts)} recordings have no readable MIDI"
            logger.info(f"  {what}; only ssast can use them")
        notes = {shards.PERFORMANCES: shards.join_performances(packed)} if packed else {}
        return {"recordings.csv": merged, **notes}

    licence = "made from code" if simulated else table.licence
    build.build(
        build.Job(MaestroLogMel, produce, out, front_end, dtype),
        items,
        options,
        statistics_of="train",
        description={"licence": licence, "simulated": simulated},
        excluded=excluded,
        refused=table.refused,
        others=table.others,
        tables=tables,
    )
    return out


def write_archive(
    path: str | Path, recordings: Iterable[tuple[dict, np.ndarray, bytes]], sample_rate: int
) -> Path:
    """Write a zip archive in MAESTRO's format from (row, mono wave, MIDI bytes), deterministically;
    the row has ``canonical_composer, canonical_title, split, year``."""
    path = Path(path)
    root, rows = "maestro-v3.0.0", []
    with atomic(path) as partial, zipfile.ZipFile(partial, "w") as archive:

        def add(name: str, content: bytes) -> None:
            # ZipInfo's default date keeps the archive deterministic.
            info = zipfile.ZipInfo(f"{root}/{name}")
            archive.writestr(info, content, zipfile.ZIP_DEFLATED, compresslevel=1)

        for number, (row, wave, midi) in enumerate(recordings):
            stem = f"{row['year']}/recording_{number:04d}"
            names = {"midi_filename": f"{stem}.midi", "audio_filename": f"{stem}.wav"}
            sound = io.BytesIO()
            soundfile.write(sound, wave, sample_rate, format="WAV", subtype="PCM_16")
            add(names["audio_filename"], sound.getvalue())
            add(names["midi_filename"], midi)
            rows.append({**row, **names, "duration": len(wave) / sample_rate})
        table = pd.DataFrame(rows)[list(sources.COLUMNS)]
        add(f"{root}.csv", table.to_csv(index=False).encode())
    return path
