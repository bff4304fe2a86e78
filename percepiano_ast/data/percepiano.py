"""PercePiano (Park et al. 2024): rated MIDI clips -> rendered log-mel shards with 19 ratings each.

Source: github.com/JonghoKimSNU/PercePiano, MIT licence, in its own layout: ``virtuoso/data/all_2rounds/*.mid`` and the label
JSON at the root. No audio is published, so every clip is rendered with one or several pianos at fixed gain. The index
(clip, segment, performer, content group, folds) is shipped with this package; a folder that brings its own ``index.csv``
is another data set in the same shape, as the demo is.
"""

import functools
import hashlib
import http.client
import json
import shutil
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
import tensorflow_datasets as tfds

from percepiano_ast import audio, synthesis
from percepiano_ast.performance import read_midi, trimmed
from percepiano_ast.config import FrontEnd, InputError, claim_directory
from percepiano_ast.data import build, shards
from percepiano_ast.data.staging import Job
from percepiano_ast.dimensions import KEYS
from percepiano_ast.evaluation import table

LABELS = "label_2round_mean_reg_19_with0_rm_highstd0.json"
MIDI_FOLDER = "virtuoso/data/all_2rounds"
SPLIT = "rated"
_USUAL_SECONDS = 20.0  # of a clip, to spread clips over shards
LICENCE = "PercePiano: MIT, github.com/JonghoKimSNU/PercePiano; audio rendered from its MIDI"
MADE_BY = "notebook 03_finetune_percepiano_gpu or `python -m percepiano_ast preprocess --percepiano FOLDER`"


class PercepianoLogMel(shards.LogMelBuilder, skip_registration=True):
    """Log-mel of whole rendered PercePiano clips with their 19 mean ratings (0 to 1)."""

    name = "percepiano_log_mel"
    CHUNK_FRAMES = 0
    FEATURES = {
        "clip": tfds.features.Text(),
        "synthesizer": tfds.features.Text(),
        "ratings": tfds.features.Tensor(shape=(len(KEYS),), dtype=np.float32),
    }


def load_index(folder: str | Path) -> pd.DataFrame:
    """The folder's own ``index.csv``, or the one shipped for the real PercePiano."""
    own = Path(folder) / "index.csv"
    return table.load_index(own if own.exists() else None)


def is_simulated(folder: str | Path) -> bool:
    """Whether the folder says that its ratings are simulated (``dataset.json``)."""
    path = Path(folder) / "dataset.json"
    return path.exists() and bool(_read_json(path).get("simulated", False))


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged or half written ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} should hold a JSON object, holds {content!r:.40}; fetch it again")
    return content


def read_labels(folder: str | Path) -> dict[str, list]:
    """The label file as it is: values of every clip that it names, surrounding spaces stripped.

    Raises:
        InputError: missing, damaged or half written.
    """
    path = Path(folder) / LABELS
    if not path.is_file():
        raise InputError(
            f"no {LABELS} in {folder}. Give the folder that holds it and {MIDI_FOLDER}/, "
            "a checkout of github.com/JonghoKimSNU/PercePiano"
        )
    return {name.strip(): values for name, values in _read_json(path).items()}


def read_ratings(folder: str | Path, index: pd.DataFrame) -> dict[str, np.ndarray]:
    """Mean ratings of every clip of the index: float32 (19,) in the order of ``KEYS``, 0 to 1.

    Raises:
        InputError: labels missing, half written, of another label file, malformed or out of range.
    """
    path, labels = Path(folder) / LABELS, read_labels(folder)
    lacking = sorted(set(index["clip"]) - set(labels))
    if lacking:
        raise InputError(
            f"{path} rates {len(labels):,} clips, {len(index):,} are expected; {len(lacking)} lack a label, "
            f"{lacking[0]} among them. Use the JSON at the root of PercePiano, not the one in labels/"
        )
    return {clip: _check_ratings(clip, labels[clip], path) for clip in index["clip"]}


def _check_ratings(clip: str, values: list, path: Path) -> np.ndarray:
    # The 20th value is a player token of the original models.
    if not isinstance(values, list) or len(values) not in (len(KEYS), len(KEYS) + 1):
        raise InputError(f"{path}: {clip} should have {len(KEYS)} ratings and a player token, has {values!r:.80}")
    for key, value in zip(KEYS, values):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:  # NaN is not either
            raise InputError(f"{path}: {clip} has {key} = {value!r}; ratings are means divided by 7, from 0 to 1")
    return np.array(values[: len(KEYS)], np.float32)


def find_midi(folder: str | Path) -> dict[str, Path]:
    """MIDI file of every clip; the clip's name is the file's stem without surrounding spaces.

    Raises:
        InputError: no MIDI folder, or an empty one.
    """
    where = Path(folder) / MIDI_FOLDER
    files = {path.stem.strip(): path for path in sorted(where.glob("*.mid"))}
    if not files:
        raise InputError(f"no MIDI files in {where}; the data directory is missing or half written, fetch it again")
    return files


_synthesizer = functools.lru_cache(maxsize=None)(synthesis.make_synthesizer)  # a soundfont takes seconds to load


def _produce(
    item: shards.Item, facts: dict, *, midi: dict[str, Path], front_end: FrontEnd
) -> Iterator[np.ndarray]:
    clip, name = item.fields["clip"], item.fields["synthesizer"]
    if clip not in midi:
        raise InputError(f"no MIDI file {clip}.mid")
    performance = trimmed(read_midi(midi[clip]))
    wave = _synthesizer(name).render(performance, front_end.sample_rate)
    audio.check_waveform(wave, front_end.sample_rate, clip)
    facts |= {"clip": clip, "synthesizer": name, "features": audio.classic_features(wave, front_end.sample_rate)}
    yield audio.quantize(audio.log_mel(wave, front_end), front_end)[0]


def preprocess(
    folder: str | Path, out: str | Path, front_end: FrontEnd, work: build.Work, *, synthesizers: tuple[str, ...]
) -> Path:
    """Render every rated clip with every synthesizer into the data set ``percepiano_log_mel`` below ``out``.

    Beside the shards it writes ``classic_features.csv`` (for the feed-forward baseline), ``index.csv`` and ``skipped.csv``.

    Raises:
        InputError: unusable data, missing synthesizer or soundfont, ``out`` of another configuration.
    """
    index, midi = load_index(folder), find_midi(folder)
    ratings = read_ratings(folder, index)
    settings = {"ratings": _fingerprint(ratings), "synthesizers": list(synthesizers), "front_end": asdict(front_end)}
    if not shards.is_complete(Path(out)):
        for name in synthesizers:
            _synthesizer(name)  # a missing soundfont is said before hours of work and before ``out`` is claimed
    simulated = is_simulated(folder)
    out = claim_directory(out, {**settings, "simulated": simulated})
    if build.is_whole(out, work.log):
        return out
    items = [
        shards.Item(f"{clip}@{name}", SPLIT, {"clip": clip, "synthesizer": name, "ratings": ratings[clip]}, _USUAL_SECONDS)
        for name in synthesizers
        for clip in index["clip"]
    ]
    work.log(f"{len(index)} clips with {', '.join(synthesizers)}: {len(items)} renderings")
    contents = build.Contents(
        items,
        left_out={},
        refused=_not_in_index(index, midi.keys(), read_labels(folder).keys()),
        statistics_of=SPLIT,
        description={"licence": "simulated, made from code" if simulated else LICENCE, "simulated": simulated},
        tables=functools.partial(_tables, index),
    )
    produce = functools.partial(_produce, midi=midi, front_end=front_end)
    build.build(Job(PercepianoLogMel, produce, out, front_end), contents, work)
    return out


def _fingerprint(ratings: dict[str, np.ndarray]) -> str:
    return hashlib.sha256(json.dumps({clip: r.tolist() for clip, r in ratings.items()}).encode()).hexdigest()[:16]


def _not_in_index(index: pd.DataFrame, midi: set[str], labels: set[str]) -> dict[str, str]:
    """Clips that the folder holds a MIDI file or a label of but that cannot be used, with the reason."""
    names = sorted((midi | labels) - set(index["clip"]))
    return {name: "not in the index" if name in labels else "no label" for name in names}


def _tables(index: pd.DataFrame, facts: list[dict]) -> dict[str, pd.DataFrame]:
    features = [{"clip": one["clip"], "synthesizer": one["synthesizer"], **one["features"]} for one in facts]
    return {"index.csv": index, "classic_features.csv": pd.DataFrame(features)}


def fetch(url: str, folder: str | Path, log: Callable[[str], None] = print) -> Path:
    """Download PercePiano's archive and unpack what is needed of it (labels, MIDI, licence) into ``folder``.

    Raises:
        InputError: the address does not answer, or what it sends is no complete zip archive with labels and MIDI.
    """
    folder = Path(folder)
    if folder.exists():
        return folder
    log(f"fetching {url}")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tempfile.TemporaryFile() as file:
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                shutil.copyfileobj(answer, file)
            _unpack(zipfile.ZipFile(file), partial)
        except (OSError, ValueError, http.client.HTTPException, zipfile.BadZipFile, zlib.error) as error:
            raise InputError(f"cannot fetch PercePiano from {url}: {error}. Give a local copy instead") from error
    partial.replace(folder)
    return folder


def _unpack(archive: zipfile.ZipFile, folder: Path) -> None:
    for name in archive.namelist():
        inner = PurePosixPath(name.partition("/")[2])
        # The parent is compared as it is written, so no name leads out of the folder.
        if str(inner) in (LABELS, "LICENSE") or (str(inner.parent) == MIDI_FOLDER and inner.suffix == ".mid"):
            target = folder / inner
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(name))
    find_midi(folder)
    read_labels(folder)
