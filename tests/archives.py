"""Small sources of recordings, and runs on them: what the tests of the data wing share."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import soundfile
from conftest import log_lines

from percepiano_ast.config import FrontEnd
from percepiano_ast.data import build, maestro, sources

RATE = 22_050
FRONT_END = FrontEnd()
ROOT = "maestro-v3.0.0"
SECONDS = {"train": [12, 50, 13, 11], "validation": [12], "test": [14]}


def sound(seconds: float, seed: int = 0, rate: int = RATE) -> np.ndarray:
    """Noise with a slow swell, mono float32."""
    n = round(seconds * rate)
    swell = 0.15 + 0.1 * np.sin(np.arange(n) / rate)
    return (swell * np.random.default_rng(seed).normal(size=n)).clip(-0.99, 0.99).astype(np.float32)


def tone(rate: int, seconds: float = 12) -> np.ndarray:
    """1 kHz at half scale."""
    return 0.5 * np.sin(2 * np.pi * 1000 * np.arange(round(seconds * rate)) / rate)


def wav(wave: np.ndarray, rate: int = RATE, subtype: str = "PCM_16") -> bytes:
    """A WAV file."""
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format="WAV", subtype=subtype)
    return file.getvalue()


def row(split: str = "train", title: str = "Sonata", composer: str = "Nobody") -> dict:
    """What ``write_archive`` asks to know of a recording."""
    return {"canonical_composer": composer, "canonical_title": title, "split": split, "year": 2026}


def write_usual_archive(path: Path) -> Path:
    """Six recordings in three splits, and one of a work that PercePiano rates."""
    recordings = [
        (row(split), seconds) for split, lengths in SECONDS.items() for seconds in lengths
    ]
    recordings.append((row("test", "Sonata in B-flat Major, D. 961", "Franz Schubert"), 12))
    parts = (
        (fields, sound(seconds, number), b"MThd")
        for number, (fields, seconds) in enumerate(recordings)
    )
    return maestro.write_archive(path, parts, RATE)


def write_archive_of(
    path: Path, files: dict[str, bytes | None], listed: list[str] | None = None
) -> Path:
    """A deflated archive with a table, in no folder; None for a file that is listed and not
    there."""
    names = list(files) if listed is None else listed
    rows = [
        {**row(), "midi_filename": "none.midi", "audio_filename": name, "duration": 12}
        for name in names
    ]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("odd.csv", pd.DataFrame(rows).to_csv(index=False))
        for name, content in files.items():
            if content is not None:
                archive.writestr(name, content)
    return path


def preprocess(source, out, max_errors: int | None = 0, workers: int = 1, **options) -> list[str]:
    """Make the shards; the lines of the log."""
    how = build.BuildOptions(workers, max_errors)
    with log_lines() as lines:
        maestro.preprocess(str(source), out, options.pop("front_end", FRONT_END), how, **options)
    return lines


def data_set_bytes(out: Path) -> dict[str, bytes]:
    """Every file of a finished data set but its settings, which name the source."""
    files = {str(path.relative_to(out)): path for path in sorted(out.rglob("*")) if path.is_file()}
    return {
        name: path.read_bytes()
        for name, path in files.items()
        if name not in ("settings.json", "manifest.json")
    }


def table_of(archive: Path) -> pd.DataFrame:
    """The table of an archive that ``write_archive`` wrote."""
    with zipfile.ZipFile(archive) as file:
        return pd.read_csv(io.BytesIO(file.read(f"{ROOT}/{ROOT}.csv")))[list(sources.COLUMNS)]
