"""PercePiano (Park et al. 2024): rated MIDI clips -> rendered log-mel shards with 19 ratings each.

No audio is published, so every clip is rendered with one or more pianos at fixed gain, or taken
from custom recordings. The index (clip, segment, performer, content group, folds) is part of this
package; a folder with its own ``index.csv`` is another data set in the same format, such as the
demo. `percepiano_files` reads the folder's files, `percepiano_tables` analyses raters and ratings.
"""

import functools
import hashlib
import json
import zlib
from collections.abc import Iterator, Set
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tensorflow_datasets as tfds

from percepiano_ast import audio
from percepiano_ast.config import FrontEnd
from percepiano_ast.data import build, percepiano_tables, shards, variants
from percepiano_ast.data.own_renderings import OWN, OwnRenderings
from percepiano_ast.data.percepiano_files import (
    LABELS,
    MIDI_FOLDER,
    MISNAMED,
    RATERS,
    SCORE_FOLDER,
    fetch,
    find_midi,
    find_scores,
    read_json,
    read_labels,
    same_playing,
)
from percepiano_ast.data.staging import Job
from percepiano_ast.dimensions import KEYS
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation import published, table
from percepiano_ast.files import claim_directory
from percepiano_ast.music.midi import read_midi, trimmed
from percepiano_ast.music.synth import RenderCache, wave_level

__all__ = [
    "LABELS",
    "LICENCE",
    "MADE_BY",
    "MIDI_FOLDER",
    "MISNAMED",
    "RATERS",
    "SCORE_FOLDER",
    "SPLIT",
    "PercepianoLogMel",
    "fetch",
    "find_midi",
    "find_scores",
    "is_simulated",
    "load_index",
    "preprocess",
    "read_labels",
    "read_ratings",
    "same_playing",
]

SPLIT = "rated"
_USUAL_SECONDS = 20.0  # typical length of a clip, to distribute clips over shards
LICENCE = "PercePiano: MIT, github.com/JonghoKimSNU/PercePiano; audio rendered from its MIDI"
MADE_BY = "notebook 03_finetune_percepiano_gpu or `percepiano preprocess --percepiano FOLDER`"


class PercepianoLogMel(shards.LogMelBuilder, skip_registration=True):  # type: ignore[call-arg]  # mypy does not see tfds take it
    """Log-mel of whole rendered PercePiano clips with their 19 mean ratings (0 to 1)."""

    name = "percepiano_log_mel"
    CHUNK_FRAMES = 0
    FEATURES = {
        "clip": tfds.features.Text(),
        "synthesizer": tfds.features.Text(),
        "ratings": tfds.features.Tensor(shape=(len(KEYS),), dtype=np.float32),
    }


def load_index(folder: str | Path) -> pd.DataFrame:
    """The folder's own ``index.csv``, or the package's index of the real PercePiano."""
    own = Path(folder) / "index.csv"
    return table.load_index(own if own.exists() else None)


def is_simulated(folder: str | Path) -> bool:
    """Whether the folder's ratings are simulated, according to its ``dataset.json``."""
    path = Path(folder) / "dataset.json"
    return path.exists() and bool(read_json(path).get("simulated", False))


def read_ratings(folder: str | Path, index: pd.DataFrame) -> dict[str, np.ndarray]:
    """Mean ratings of every clip of the index: float32 (19,) in the order of ``KEYS``, 0 to 1.

    Raises:
        InputError: labels missing, truncated, of another label file, malformed or out of range;
            with the package's index, ratings that differ from the published ones.
    """
    path, labels = Path(folder) / LABELS, read_labels(folder)
    lacking = sorted(set(index["clip"]) - set(labels))
    if lacking:
        raise InputError(
            f"{path} rates {len(labels):,} clips, {len(index):,} are expected; {len(lacking)} lack"
            f" a label, {lacking[0]} among them. Use the JSON at the root of PercePiano, not the"
            " one in labels/."
        )
    ratings = {clip: _check_ratings(clip, labels[clip], path) for clip in index["clip"]}
    if not (Path(folder) / "index.csv").exists():
        _check_published(ratings)
    return ratings


def _check_published(ratings: dict[str, np.ndarray]) -> None:
    """The package's index is valid only for the published ratings."""
    wide = (
        pd.DataFrame.from_dict(ratings, orient="index", columns=list(KEYS))
        .rename_axis("clip")
        .reset_index()
    )
    published.check_ratings(wide.melt("clip", var_name="dimension", value_name="rating"))


def _check_ratings(clip: str, values: list, path: Path) -> np.ndarray:
    # The 20th value is a player token of the original models.
    if not isinstance(values, list) or len(values) not in (len(KEYS), len(KEYS) + 1):
        raise InputError(
            f"{path}: {clip} should have {len(KEYS)} ratings and a player token, has"
            f" {values!r:.80}. Download the data again."
        )
    for key, value in zip(KEYS, values):
        # also rejects NaN
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise InputError(
                f"{path}: {clip} has {key} = {value!r}. Ratings must be means divided by 7, from 0"
                " to 1."
            )
    return np.array(values[: len(KEYS)], np.float32)


@functools.cache
def _renderings(folder: Path, synthesizer: str, sample_rate: int) -> RenderCache:
    """Cached per process: loading and hashing a soundfont takes seconds."""
    return RenderCache(folder, synthesizer, sample_rate)


def _heard(
    clip: str, name: str, midi: Path, sample_rate: int, kept: Path, own: OwnRenderings | None
) -> np.ndarray:
    """The audio of a clip: a synthesizer's rendering, a recording, or a variant of either."""
    piano, variant = variants.named(name)
    performance = trimmed(read_midi(midi))
    if piano == OWN:
        assert own is not None  # `preprocess` asks for both or neither
        wave = own.wave(clip, performance, sample_rate)
    elif variant and variant.playing:
        played = variant.playing(performance, variants.rng_of(clip, variant))
        return _renderings(kept, piano, sample_rate).wave(played, clip)
    else:
        wave = _renderings(kept, piano, sample_rate).wave(performance, clip)
    return variant.sound(wave, sample_rate, variants.rng_of(clip, variant)) if variant else wave


def _produce(
    item: shards.Item,
    facts: dict,
    *,
    midi: dict[str, Path],
    front_end: FrontEnd,
    kept: Path,
    own: OwnRenderings | None,
    one_loudness: bool,
) -> Iterator[np.ndarray]:
    clip, name = item.fields["clip"], item.fields["synthesizer"]
    if clip not in midi:
        raise InputError(f"no MIDI file {clip}.mid")
    wave = _heard(clip, name, midi[clip], front_end.sample_rate, kept, own)
    if one_loudness:
        aside = np.random.default_rng(zlib.crc32(f"{clip} {name} loudness".encode())).uniform(
            -audio.JITTER_DB, audio.JITTER_DB
        )
        wave = audio.levelled(wave, front_end.sample_rate, audio.LOUDNESS + aside)
    facts |= {"clip": clip, "synthesizer": name, "level": wave_level(wave)}
    facts |= {"features": audio.classic_features(wave, front_end.sample_rate)}
    yield audio.quantize(audio.log_mel(wave, front_end), front_end)[0]


def preprocess(
    folder: str | Path,
    out: str | Path,
    front_end: FrontEnd,
    work: build.Work,
    *,
    synthesizers: tuple[str, ...] = (OWN,),
    recordings: str | Path = "",
    partial: bool = False,
    one_loudness: bool = False,
) -> Path:
    """Render every rated clip with every synthesizer into the data set ``percepiano_log_mel`` in
    ``out``.

    Next to the shards it writes ``classic_features.csv`` (for the feed-forward baseline),
    ``levels.csv`` (loudness and peak of each rendering), ``raters.csv`` (number and spread of each
    clip's ratings, if the folder has the rater table), ``index.csv`` and ``skipped.csv``.
    Renderings are cached in ``renderings`` next to ``out``.

    Args:
        synthesizers: names, see `synth.make_synthesizer`, or ``own`` for ``recordings``; a
            suffix selects a variant, such as ``fluidr3mono+room``, see `variants`.
        recordings: a folder with a custom recording of each clip, see `OwnRenderings`.
        partial: whether ``recordings`` may lack clips; they are then listed.
        one_loudness: normalise every rendering to `audio.LOUDNESS`, with a jitter of up to
            `audio.JITTER_DB`, and add a noise bed, for models that rate recordings of any gain;
            playing force is then audible only in the timbre.

    Raises:
        InputError: invalid data, ratings that differ from the published ones with the package's
            index, a missing synthesizer or soundfont, ``recordings`` that lack a clip or are not
            used, ``out`` of another configuration.
    """
    index, midi = load_index(folder), find_midi(folder)
    ratings = read_ratings(folder, index)
    pianos = {variants.named(name)[0] for name in synthesizers}
    if bool(recordings) != (OWN in pianos):
        raise InputError(
            f"synthesizers {', '.join(synthesizers)} with recordings {str(recordings)!r}:"
            f" synthesizer {OWN!r} and a folder of recordings require each other. Give both or"
            " neither."
        )
    own = OwnRenderings(recordings, index["clip"], partial) if recordings else None
    settings: dict[str, Any] = {
        "ratings": _fingerprint(ratings),
        "synthesizers": list(synthesizers),
        "front_end": asdict(front_end),
    }
    settings |= {"recordings": own.fingerprint()} if own else {}
    settings |= (
        {"loudness": [audio.LOUDNESS, audio.JITTER_DB, audio.BED_DB]} if one_loudness else {}
    )
    kept = Path(out).absolute().parent / "renderings"
    if not shards.is_complete(Path(out)):
        for name in sorted(pianos - {OWN}):
            # an unusable soundfont fails here, before hours of work
            _renderings(kept, name, front_end.sample_rate)
    simulated = is_simulated(folder)
    out = claim_directory(out, {**settings, "simulated": simulated})
    if build.is_whole(out, work.log):
        return out
    contents = _contents(folder, index, ratings, synthesizers, own, simulated)
    work.log(f"{len(index)} clips with {', '.join(synthesizers)}: {len(contents.items)} renderings")
    work.log(f"  cached in {Path(out).parent / kept.name}; safe to delete")
    for line in _remarks(folder, own):
        work.log(f"  {line}")
    produce = functools.partial(
        _produce, midi=midi, front_end=front_end, kept=kept, own=own, one_loudness=one_loudness
    )
    build.build(Job(PercepianoLogMel, produce, out, front_end), contents, work)
    _say_levels(out, work)
    return out


def _contents(
    folder,
    index: pd.DataFrame,
    ratings: dict,
    synthesizers: tuple[str, ...],
    own: OwnRenderings | None,
    simulated: bool,
) -> build.Contents:
    """The clips to render, the excluded clips, and the tables of the data set."""
    items: list[shards.Item] = []
    left_out: dict[str, str] = {}
    for name in synthesizers:
        missing = set(own.missing) if own and variants.named(name)[0] == OWN else set()
        left_out |= dict.fromkeys(
            (f"{clip}@{name}" for clip in sorted(missing)), "no recording of this clip"
        )
        for clip in index["clip"][~index["clip"].isin(missing)]:
            fields = {"clip": clip, "synthesizer": name, "ratings": ratings[clip]}
            items.append(
                shards.Item(f"{clip}@{name}", SPLIT, fields, _USUAL_SECONDS, measured=False)
            )
    return build.Contents(
        items,
        left_out=left_out,
        refused=_not_in_index(index, find_midi(folder).keys(), read_labels(folder).keys()),
        statistics_of=SPLIT,
        description={
            "licence": "simulated, made from code" if simulated else LICENCE,
            "simulated": simulated,
        },
        tables=functools.partial(_tables, Path(folder), index),
    )


def _fingerprint(ratings: dict[str, np.ndarray]) -> str:
    return hashlib.sha256(
        json.dumps({clip: r.tolist() for clip, r in ratings.items()}).encode()
    ).hexdigest()[:16]


def _not_in_index(index: pd.DataFrame, midi: Set[str], labels: Set[str]) -> dict[str, str]:
    """Clips with a MIDI file or a label that are not in the index, with the reason."""
    names = sorted((midi | labels) - set(index["clip"]))
    return {name: "not in the index" if name in labels else "no label" for name in names}


def _remarks(folder: str | Path, own: OwnRenderings | None) -> list[str]:
    """Remarks on the data for the log."""
    lines = []
    if groups := same_playing(folder):
        lines.append(
            f"{sum(map(len, groups))} clips share their MIDI file with another, in {len(groups)}"
            f" groups such as {' and '.join(groups[0])}; each has separate ratings"
        )
    if own and own.strangers:
        lines.append(
            f"{len(own.strangers)} recordings match no clip and are ignored:"
            f" {', '.join(own.strangers[:5])}"
        )
    if own and own.missing:
        lines.append(f"{len(own.missing)} clips have no recording; see skipped.csv")
    return lines


def _tables(folder: Path, index: pd.DataFrame, facts: list[dict]) -> dict[str, pd.DataFrame]:
    def of_renderings(what: str) -> pd.DataFrame:
        return pd.DataFrame(
            [{"clip": one["clip"], "synthesizer": one["synthesizer"], **one[what]} for one in facts]
        )

    tables = {
        "index.csv": index,
        "classic_features.csv": of_renderings("features"),
        "levels.csv": of_renderings("level"),
    }
    if (folder / RATERS).is_file():
        tables["raters.csv"] = percepiano_tables.agreement(
            percepiano_tables.raters(folder)
        ).reset_index()
    return tables


def _say_levels(out: Path, work: build.Work) -> None:
    """Log the levels of the renderings, and how many exceed full scale."""
    levels = pd.read_csv(out / "levels.csv")
    for name, part in levels.groupby("synthesizer"):
        over = (part["over"] > 0).sum()
        work.log(
            f"  {name}: {part['level_db'].min():.0f} to {part['level_db'].max():.0f} dB, peaks up"
            f" to {part['peak_db'].max():.1f} dB re full scale; {over} of {len(part)} renderings"
            " exceed it"
        )
