"""Render ASAP's MIDI performances into an archive in MAESTRO's format: a small pre-training set
instead of MAESTRO's 108 GB.

Source: the ASAP dataset (Foscarin et al. 2020), github.com/fosfrancesco/asap-dataset, CC BY-NC-SA
4.0. Half of its performances are excerpts of MAESTRO's recordings.
"""

import io
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from percepiano_ast.data import maestro
from percepiano_ast.errors import InputError
from percepiano_ast.music.midi import Performance, read_midi, trimmed, write_midi
from percepiano_ast.music.synth import RenderCache, check_length, n_samples

SAMPLE_RATE = 22_050
COLUMNS = ("composer", "title", "midi_performance")


def _read(midi: Path) -> tuple[pd.DataFrame, dict[str, bytes]]:
    """The table of performances and their MIDI files, from a folder or a tar archive."""
    if midi.is_dir():
        files = {str(path.relative_to(midi)): path.read_bytes() for path in midi.rglob("*.mid")}
        table: Path | io.BytesIO = midi / "metadata.csv"
    elif midi.is_file():
        with tarfile.open(midi) as archive:
            found = ((m.name, archive.extractfile(m)) for m in archive if m.isfile())
            files = {name.partition("/")[2]: content.read() for name, content in found if content}
        table = io.BytesIO(files.get("metadata.csv", b""))
    else:
        raise InputError(f"{midi}: no such folder or archive. Check the path.")
    try:
        rows = pd.read_csv(table)
    except (FileNotFoundError, pd.errors.EmptyDataError) as error:
        raise InputError(
            f"{midi} has no metadata.csv. Give the folder or archive of the ASAP dataset."
        ) from error
    missing = [column for column in COLUMNS if column not in rows]
    if missing:
        raise InputError(
            f"metadata.csv of {midi} lacks the columns {', '.join(missing)}. Use the one of the"
            " ASAP dataset."
        )
    return rows, files


def render_archive(
    midi: str | Path,
    path: str | Path,
    *,
    hours: float,
    synthesizers: list[str],
    workers: int = 1,
    seed: int = 0,
    log: Callable[[str], None] = print,
) -> Path:
    """Render about ``hours`` of performances, pieces in random order, one performance of each piece
    before a second.

    PercePiano's works are excluded. The synthesizers alternate. All performances of a piece share a
    split: one piece in twelve goes to validation, one to test. Renderings are cached in
    ``renderings`` next to the archive, so an interrupted call resumes.

    Args:
        workers: number of rendering processes.

    Raises:
        InputError: no performances, or a missing soundfont.
        RunFailed: a worker was killed; finished renderings are kept.
    """
    table, files = _read(Path(midi))
    kept = {
        name: RenderCache(Path(path).parent / "renderings", name, SAMPLE_RATE)
        for name in synthesizers
    }
    # `preprocess` excludes them too, but here they would use up part of the hours.
    rated = np.array(
        [maestro.is_percepiano_work(*names) for names in zip(table["composer"], table["title"])]
    )
    log(f"  {rated.sum()} performances of PercePiano's works excluded")
    rows = table[~rated].sample(frac=1, random_state=seed).reset_index(drop=True)
    piece = rows["composer"] + rows["title"]
    number_of_piece = {name: number for number, name in enumerate(piece.unique())}
    rows["split"] = piece.map(number_of_piece).map(
        lambda n: {10: "validation", 11: "test"}.get(n % 12, "train")
    )
    rows["turn"] = piece.groupby(piece).cumcount()
    chosen = _chosen(rows.sort_values("turn", kind="stable"), files, hours, log)
    pianos = [kept[synthesizers[number % len(synthesizers)]] for number in range(len(chosen))]
    for piano in kept.values():
        piano.prepare(
            [performance for (_, performance), his in zip(chosen, pianos) if his is piano],
            workers,
            log,
        )
    return maestro.write_archive(path, _recordings(chosen, pianos), SAMPLE_RATE)


def _chosen(rows: pd.DataFrame, files: dict, hours: float, log) -> list[tuple]:
    """The first rows, with their performances, that add up to ``hours``."""
    seconds, skipped, chosen = 0.0, 0, []
    for row in rows.itertuples():
        if seconds >= hours * 3600:
            break
        try:
            performance = _performance(row.midi_performance, files)
        except InputError as error:
            skipped += 1
            log(f"  skipped {row.midi_performance}: {error}")
            continue
        seconds += n_samples(performance, SAMPLE_RATE) / SAMPLE_RATE
        chosen.append((row, performance))
    log(f"  {len(chosen)} performances, {seconds / 3600:.2f} h; {skipped} skipped")
    return chosen


def _recordings(chosen: list[tuple], pianos: list[RenderCache]) -> Iterator[tuple]:
    for (row, performance), piano in zip(chosen, pianos):
        wave = piano.wave(performance, row.midi_performance)
        names = {"canonical_composer": row.composer, "canonical_title": row.title}
        yield (
            {**names, "split": row.split, "year": 2026},
            np.clip(wave, -1, 1),
            _as_midi(performance),
        )


def _performance(name: str, files: dict[str, bytes]) -> Performance:
    if name not in files:
        raise InputError("listed in metadata.csv, but the file is missing")
    performance = trimmed(read_midi(files[name], name))
    check_length(performance, name)
    return performance


def _as_midi(performance: Performance) -> bytes:
    """The performance as MIDI, aligned to its rendering; the source file may start with silence."""
    file = io.BytesIO()
    write_midi(performance, file)
    return file.getvalue()
