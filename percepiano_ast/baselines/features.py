"""Cached feature tables for the statistics baselines, one row per clip, computed on all cores.

Each row has a hash of everything that it depends on (the MIDI file, the soundfont, the code), so
that outdated rows are detected and an interrupted run can resume.
"""

import functools
import hashlib
import multiprocessing
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pandas as pd

from percepiano_ast import audio
from percepiano_ast.errors import InputError, RunFailed
from percepiano_ast.files import end_with_parent
from percepiano_ast.music import align, midi, performance_features, score, score_features
from percepiano_ast.music.synth import RenderCache

SAMPLE_RATE = 22_050
_FEW = 8  # up to this number of clips, no worker processes are started
_EVERY = 10.0  # seconds between lines of progress, and between saves
_READING = [midi, audio.features]
_CODE = [*_READING, align, performance_features]


def midi_statistics(path: Path) -> dict[str, float]:
    """`performance_features` of one clip."""
    return performance_features.performance_features(midi.trimmed(midi.read_midi(path)))


def audio_statistics(renderings: RenderCache, path: Path) -> dict[str, float]:
    """Statistics of one rendered clip, see `audio.audio_features`."""
    wave = renderings.wave(midi.trimmed(midi.read_midi(path)), path.name)
    return audio.audio_features(wave, renderings.sample_rate)


def midi_table(
    midi: dict[str, Path], folder: Path, workers: int, log: Callable[[str], None] = print
) -> pd.DataFrame:
    """`midi_statistics` of every clip, a table with clips as its index."""
    files = {clip: (path,) for clip, path in midi.items()}
    return _table(
        folder / "midi.csv",
        files,
        midi_statistics,
        tuple(performance_features.PERFORMANCE_FEATURES),
        _key(_CODE),
        workers,
        log,
    )


def score_statistics(played: Path, written: Path) -> dict[str, float]:
    """`score_features` of one clip.

    Raises:
        InputError: a file is unreadable, or the clip does not match this score.
    """
    return score_features.score_features(midi.read_midi(played), score.read_score(written))


def _score_statistics_or_nan(played: Path, written: Path) -> dict[str, float]:
    """As `score_statistics`, but NaN after an InputError, so that one clip does not stop the
    others."""
    try:
        return score_statistics(played, written)
    except InputError:
        return dict.fromkeys(score_features.SCORE_FEATURES, np.nan)


def score_table(
    midi: dict[str, Path],
    scores: dict[str, Path],
    folder: Path,
    workers: int,
    log: Callable[[str], None] = print,
) -> tuple[pd.DataFrame, dict[str, str]]:
    """`score_statistics` of every clip that has a score and matches it.

    Args:
        midi, scores: files by clip; a clip without a score is absent from ``scores``.

    Returns:
        the table, with clips as its index; and excluded clips -> reason.
    """
    left_out = {clip: "it has no score" for clip in midi if clip not in scores}
    files = {clip: (path, scores[clip]) for clip, path in midi.items() if clip in scores}
    code = [*_CODE, score, score_features]
    names = tuple(score_features.SCORE_FEATURES)
    table = _table(
        folder / "score.csv", files, _score_statistics_or_nan, names, _key(code), workers, log
    )
    for clip in table.index[table.isna().any(axis=1)]:
        try:
            score_statistics(*files[clip])
        except InputError as reason:
            left_out[clip] = str(reason)
    return table.drop(index=[clip for clip in left_out if clip in files]), left_out


def audio_table(
    midi: dict[str, Path],
    synthesizer: str,
    folder: Path,
    workers: int,
    log: Callable[[str], None] = print,
) -> pd.DataFrame:
    """`audio_statistics` of every clip with one synthesizer, a table with clips as its index.

    Raises:
        InputError: the synthesizer is unknown or not installed, or a MIDI file is unreadable or
            silent.
        RunFailed: a worker was killed; completed rows are saved.
    """
    renderings = RenderCache(folder / "renderings", synthesizer, SAMPLE_RATE)
    key = _key(_READING, renderings.key.encode())
    hear = functools.partial(audio_statistics, renderings)
    path, files = (
        folder / f"audio_{Path(synthesizer).stem}.csv",
        {clip: (path,) for clip, path in midi.items()},
    )
    return _table(path, files, hear, audio.audio_feature_names(), key, workers, log)


def _key(modules: list, more: bytes = b"") -> bytes:
    """Hash of everything that all rows of a table depend on."""
    content = hashlib.sha256(more)
    for name in sorted({module.__file__ for module in modules}):
        content.update(Path(name).read_bytes())
    return content.digest()


def _table(
    path, files: Mapping[str, tuple[Path, ...]], hear, names, key: bytes, workers: int, log
) -> pd.DataFrame:
    """The table in ``path``, with missing and outdated rows computed."""
    keys = {
        clip: hashlib.sha256(b"".join([key, *(one.read_bytes() for one in given)])).hexdigest()[:16]
        for clip, given in files.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = _kept(path, keys, names)
    todo = [clip for clip in files if clip not in rows]
    if todo:
        log(
            f"{path.stem}: computing {len(names)} statistics of {len(todo):,} clips ({len(rows):,}"
            " cached)"
        )
        saved = started = time.monotonic()
        for count, _ in enumerate(_made(todo, files, hear, names, rows, workers), 1):
            if (now := time.monotonic()) - saved > _EVERY or count == len(todo):
                saved = now
                _save(path, rows, keys, names)
                left = (now - started) / count * (len(todo) - count)
                log(f"  {count:,} of {len(todo):,}, about {left:.0f} s left")
    # Always read back, so that new and cached rows have the same rounding.
    return pd.DataFrame.from_dict(_kept(path, keys, names), orient="index", columns=names).loc[
        list(files)
    ]


def _kept(path: Path, keys: dict[str, str], names: tuple[str, ...]) -> dict[str, tuple]:
    """clip -> values, for rows with a valid key."""
    if not path.exists():
        return {}
    try:
        table = pd.read_csv(path, dtype={"clip": str, "key": str} | dict.fromkeys(names, float))
    except ValueError as error:  # includes errors of pandas
        raise InputError(
            f"{path} is not a readable table ({error}); delete it to recompute it."
        ) from error
    if list(table.columns) != ["clip", "key", *names]:
        return {}
    valid = table["clip"].map(keys) == table["key"]
    return {row[0]: row[2:] for row in table[valid].itertuples(index=False, name=None)}


def _save(path: Path, rows: dict[str, tuple], keys: dict[str, str], names: tuple[str, ...]) -> None:
    table = pd.DataFrame.from_dict(rows, orient="index", columns=names)
    table.insert(0, "key", [keys[clip] for clip in rows])
    partial = path.with_name(path.name + ".partial")
    table.rename_axis("clip").to_csv(partial, float_format="%.7g", lineterminator="\n")
    partial.replace(path)


def _made(
    todo: list[str],
    files: Mapping[str, tuple[Path, ...]],
    hear: Callable,
    names,
    rows: dict[str, tuple],
    workers: int,
):
    """Compute missing rows and add them to ``rows``; yields each clip when it is done."""
    columns = list(zip(*(files[clip] for clip in todo), strict=True))
    if len(todo) <= _FEW or workers == 1:
        for clip, values in zip(todo, map(hear, *columns), strict=True):
            rows[clip] = tuple(values[name] for name in names)
            yield clip
        return
    # Forking is unsafe with JAX's threads.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent) as pool:
            for clip, values in zip(todo, pool.map(hear, *columns, chunksize=_FEW), strict=True):
                rows[clip] = tuple(values[name] for name in names)
                yield clip
    except BrokenProcessPool as error:
        raise RunFailed(
            f"a worker process was killed ({error}), perhaps for lack of memory. Run again to"
            " resume"
        ) from error
