"""PercePiano (Park et al. 2024, github.com/JonghoKimSNU/PercePiano, MIT licence): rated MIDI clips.

No audio is published: every clip is rendered with one or more pianos at fixed gain, or taken from
custom recordings. The index (clip, segment, performer, content group, folds) is part of this
package; a folder with its own ``index.csv`` is another data set in the same format, as the demo.
"""

import functools
import json
import logging
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import tensorflow_datasets as tfds

from percepiano_ast import audio
from percepiano_ast.audio.effects import EFFECTS, HELD_OUT_ROOM, draw_phone, draw_room
from percepiano_ast.config import PERCEPIANO_URL, FrontEnd, lookup
from percepiano_ast.data import build, shards
from percepiano_ast.dimensions import KEYS
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation import predictions
from percepiano_ast.evaluation.reliability import RATERS, read_raters
from percepiano_ast.files import download, matching, printable, read_json, sha256_of, summary
from percepiano_ast.music.edits import HIGHEST, LOWEST, PARAMETERS
from percepiano_ast.music.midi import LEAD, Performance, read_midi, trimmed
from percepiano_ast.music.synth import TAIL, RenderCache, wave_level
from percepiano_ast.tables import clean_name, read_own

logger = logging.getLogger(__name__)

LABELS = "label_2round_mean_reg_19_with0_rm_highstd0.json"
MIDI_FOLDER = "virtuoso/data/all_2rounds"
SCORE_FOLDER = "virtuoso/data/score_midi"
COMMIT = PurePosixPath(PERCEPIANO_URL).stem
# Of the pinned commit, see `fingerprints`.
PUBLISHED = {
    LABELS: (1, "9efbf1ada5615d51f6b146bf57af3258d7ce684bef18bb9c860826e681cf47d9"),
    RATERS: (1, "f7ce432e33f4fb7e04fcf00aa7ae6501095f835ad6c6a1f852fb68ddfffda774"),
    MIDI_FOLDER: (1202, "2fa81fe9eacdb75f602521c13deffa4f752465aaceb7925dec1a4d119f8ad496"),
    SCORE_FOLDER: (261, "5d051fc3628c0c8b3d9d5f0f82db157356de3620044d6ea96a1e4b578b78aebe"),
}
# Misnamed clip -> the passage that it contains. 36 % of this clip's notes match the score of its
# name, 99 % match this one. Its ratings are of the audio that was presented, so they remain valid.
MISNAMED = {"Beethoven_WoO80_var25_8bars_19_14": "Beethoven_WoO80_var24_8bars_0"}

MAX_UNPACKED = 2**29  # bytes of the files that are kept of the archive
SPLIT = "rated"
OWN = "own"  # a custom recording, in place of a synthesizer's name
KEY = ["clip", "synthesizer"]  # of a rendering, in tables
SEPARATOR = "+"  # between synthesizer and augmentation, as in fluidr3mono+room
LICENCE = "PercePiano: MIT, github.com/JonghoKimSNU/PercePiano; audio rendered from its MIDI"
MADE_BY = "notebook 03_finetune_percepiano_gpu or `percepiano preprocess --percepiano FOLDER`"

_FASTER = 0.05  # maximum tempo change of an augmentation as a share, up or down
_HIGHER = 1  # maximum transposition of an augmentation in semitones, up or down


# --- Files ----------------------------------------------------------------------------------------


class ClipName(NamedTuple):
    """The fields of a clip's name; the README of PercePiano swaps the last two.

    Attributes:
        piece: with the number of bars, such as ``Schubert_D960_mv3_8bars``.
        player: a number, or ``Score`` and ``Score2`` for deadpan renderings.
        segment: number of the passage within the piece, as written (``1`` or ``01``).
    """

    piece: str
    player: str
    segment: str

    @classmethod
    def of(cls, name: str) -> "ClipName":
        """Parse a clip's name or a file's stem; InputError if it has fewer than three fields."""
        fields = name.strip().rsplit("_", 2)
        if len(fields) < 3 or not all(fields):
            form = "The format is PIECE_PLAYER_SEGMENT."
            raise InputError(f"{name!r} is not a valid clip name. {form}")
        return cls(*fields)

    @property
    def passage(self) -> str:
        """Piece and segment, which identify the bars of a clip."""
        return f"{self.piece}_{self.segment}"

    @property
    def deadpan(self) -> bool:
        """Whether the clip is a deadpan rendering."""
        return self.player.startswith("Score")


def _unique(pairs: Iterable[tuple[str, Any]], where: str | Path) -> dict[str, Any]:
    """Names without surrounding spaces (one published file has one) -> values."""
    found: dict = {}
    for name, value in pairs:
        if (name := clean_name(name)) in found:
            what = f"{name!r} twice (spaces around a name are ignored)"
            raise InputError(f"{where} has {what}. Keep one of them.")
        found[name] = value
    return found


def read_labels(folder: str | Path) -> dict[str, list]:
    """The values of every clip in the label file; InputError if it is missing or damaged."""
    path = Path(folder) / LABELS
    if not path.is_file():
        raise InputError(
            f"no {LABELS} in {folder}. Give the folder with this file and {MIDI_FOLDER}/, a"
            " checkout of github.com/JonghoKimSNU/PercePiano."
        )
    return _unique(read_json(path, advice="Download it again.").items(), path)


def find_midi(folder: str | Path) -> dict[str, Path]:
    """MIDI file of every clip; InputError if there is none, or two files of one clip."""
    where = Path(folder) / MIDI_FOLDER
    files = _unique(((path.stem, path) for path in matching(where, "*.mid")), where)
    if not files:
        what = f"no MIDI files in {where}: the data directory is missing or incomplete"
        raise InputError(f"{what}. Download it again.")
    return files


def find_scores(folder: str | Path) -> dict[str, Path]:
    """Score of every passage as MIDI, ``ClipName.passage`` -> file; InputError if there is none."""
    paths = matching(Path(folder) / SCORE_FOLDER, "*_Score_*.mid")
    if not paths:
        advice = "Download PercePiano again, which includes them."
        raise InputError(f"no scores in {Path(folder) / SCORE_FOLDER}. {advice}")
    return {ClipName.of(path.stem).passage: path for path in paths}


def identical_midi(folder: str | Path) -> list[list[str]]:
    """Clips with identical MIDI files, as sorted groups of two or more.

    PercePiano has 21 such groups, of repeated passages and of files that were stored twice. They
    were rated separately, so each remains a clip; a group is in one content group.
    """
    groups: dict[str, list[str]] = {}
    for clip, path in find_midi(folder).items():
        groups.setdefault(sha256_of(path), []).append(clip)
    return sorted(sorted(clips) for clips in groups.values() if len(clips) > 1)


def fingerprints(folder: str | Path) -> dict[str, tuple[int, str]]:
    """Number of files and one SHA-256 of names and contents, for each part of the data."""
    found = {}
    for part in PUBLISHED:
        path = Path(folder) / part
        files = [path] * path.is_file() or matching(path, "*.mid")
        lines = [f"{sha256_of(file)}  {file.name}\n" for file in files]
        found[part] = len(lines), sha256_of(*lines)
    return found


def check_published(folder: str | Path) -> None:
    """Raise InputError unless the unpacked files are those of the pinned commit; GitHub's archives
    are not reproducible."""
    for part, found in fingerprints(folder).items():
        if found != PUBLISHED[part]:
            count, expected = found[0], PUBLISHED[part][0]
            what = f"{count:,} of {expected:,} files" if count != expected else "different contents"
            raise InputError(
                f"{part} in {folder} has {what}: it is not PercePiano at commit {COMMIT[:7]}. "
                "Delete the folder and download it again."
            )


def fetch(url: str, folder: str | Path) -> Path:
    """Download PercePiano's archive and unpack labels, rater table, MIDI, scores and licence into
    ``folder``. The files of a URL of the pinned commit are verified, also of an earlier download.

    Raises:
        InputError: the server does not respond, the download is not a complete zip archive with
            labels and MIDI, or its files differ from those of the pinned commit.
    """
    folder, pinned = Path(folder), COMMIT in url
    if folder.exists():
        if pinned:
            check_published(folder)
        return folder
    logger.info(f"downloading {url}")
    partial, room = folder.with_name(folder.name + ".partial"), MAX_UNPACKED
    shutil.rmtree(partial, ignore_errors=True)
    packed = folder.with_name(folder.name + ".zip")
    download(url, packed)
    try:
        with zipfile.ZipFile(packed) as archive:
            for name in archive.namelist():
                inner = PurePosixPath(name.partition("/")[2])
                # The parent equals one of two fixed folders: no name can escape the target.
                in_folder = str(inner.parent) in (MIDI_FOLDER, SCORE_FOLDER)
                single = str(inner) in (LABELS, RATERS, "LICENSE")
                if single or in_folder and inner.suffix == ".mid":
                    (partial / inner).parent.mkdir(parents=True, exist_ok=True)
                    with archive.open(name) as file:
                        content = file.read(room + 1)
                    if (room := room - len(content)) < 0:
                        raise ValueError(f"it expands to more than {MAX_UNPACKED:,} bytes")
                    (partial / inner).write_bytes(content)
        find_midi(partial)
        read_labels(partial)
        if pinned:
            check_published(partial)
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        reason = str(error).rstrip(".")
        message = f"cannot download PercePiano from {url}: {reason}. Give a local copy."
        raise InputError(message) from error
    finally:
        packed.unlink(missing_ok=True)
    if not pinned:
        commit = f"{COMMIT[:7]}, which the results refer to"
        logger.info(f"  files not compared: this is not commit {commit}")
    partial.replace(folder)
    return folder


# --- Index and ratings ----------------------------------------------------------------------------


def load_index(folder: str | Path) -> pd.DataFrame:
    """The folder's own ``index.csv``, or the package's index of the real PercePiano."""
    own = Path(folder) / "index.csv"
    return predictions.load_index(own if own.exists() else None)


def fold_of_clip(index: pd.DataFrame, protocol: str) -> dict[str, int]:
    """Fold of every clip that the protocol evaluates (fold >= 0), from the index.

    ``content`` is the primary protocol: no content group (clips that share music) is split.
    ``random`` and ``segment`` leak music between folds, for comparison only.

    Raises:
        InputError: unknown protocol, fewer than two folds, or a content group in two folds of a
            protocol with held-out music.
    """
    folds = predictions.check_protocol(index, protocol)
    return dict(zip(folds["clip"], folds[predictions.fold_column(protocol)].astype(int)))


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
    if lacking := sorted(set(index["clip"]) - set(labels)):
        raise InputError(
            f"{path} rates {len(labels):,} clips, {len(index):,} are expected; {len(lacking)} lack"
            f" a label, {lacking[0]} among them. Use the JSON at the root of PercePiano, not the"
            " one in labels/."
        )
    ratings = {}
    for clip in index["clip"]:
        values = labels[clip]
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
                    f"{path}: {clip} has {key} = {value!r}. Ratings must be means divided by 7,"
                    " from 0 to 1."
                )
        ratings[clip] = np.array(values[: len(KEYS)], np.float32)
    if not (Path(folder) / "index.csv").exists():
        # The package's index is valid only for the published ratings.
        wide = pd.DataFrame.from_dict(ratings, orient="index", columns=list(KEYS))
        wide = wide.rename_axis("clip").reset_index()
        predictions.check_ratings(wide.melt("clip", var_name="dimension", value_name="rating"))
    return ratings


def rater_agreement(raters: pd.DataFrame) -> pd.DataFrame:
    """One row per clip of `reliability.read_raters`: ``n_ratings``, ``n_raters`` (12.2 and 9.2 on
    average: many rated a clip more than once), and for each dimension the standard deviation of the
    ratings in units of the labels (0 to 1; NaN for a single rating)."""
    by_clip = raters.groupby("clip")
    found = by_clip[list(KEYS)].std(ddof=1) / 7
    found.insert(0, "n_raters", by_clip["rater"].nunique())
    found.insert(0, "n_ratings", by_clip.size())
    return found


# --- Recordings and augmentations -----------------------------------------------------------------


def recordings_in(folder: str | Path) -> tuple[dict[str, Path], dict[Path, str]]:
    """Clip -> recording, named after the clip, and what is left out of the folder, see
    `audio.find_recordings`. InputError: no such folder, or two recordings of one clip."""
    folder = Path(folder)
    if not folder.is_dir():
        advice = "Give one with one recording per clip, named after the clip."
        raise InputError(f"{folder}: no such folder of recordings. {advice}")
    paths, left = audio.find_recordings(folder)
    found: dict[str, Path] = {}
    for path in paths:
        if (clip := clean_name(audio.stem(printable(path.name)))) in found:
            both = " and ".join(printable(p.relative_to(folder)) for p in (found[clip], path))
            what = f"{both} in {folder} are both of clip {clip!r}"
            raise InputError(f"{what}. Keep one of them.")
        found[clip] = path
    return found, left


class RenderingAugmentation(NamedTuple):
    """A changed rendering of a clip. If the MIDI is known, it is changed and rendered again,
    without artefacts; recordings are stretched and shifted by librosa.

    Attributes:
        edit: (performance, rng) -> performance, or None if only the sound changes.
        effect: (wave, sample_rate, rng) -> wave.
    """

    edit: Callable[[Performance, np.random.Generator], Performance] | None
    effect: Callable[[np.ndarray, int, np.random.Generator], np.ndarray]


def _transposed(performance: Performance, rng: np.random.Generator) -> Performance:
    """Up or down at random; near the ends of the keyboard only in the possible direction."""
    pitch = performance.notes["pitch"].astype(int)
    low, high = int(LOWEST - pitch.min()), int(HIGHEST - pitch.max())
    steps = [step for step in (-_HIGHER, _HIGHER) if low <= step <= high]
    if not steps:
        return performance
    return PARAMETERS["transposition"].change(performance, int(rng.choice(steps)), None)


def _stretched(wave: np.ndarray, sample_rate: int, rng: np.random.Generator) -> np.ndarray:
    import librosa

    return librosa.effects.time_stretch(wave, rate=1 + float(rng.uniform(-_FASTER, _FASTER)))


def _shifted(wave: np.ndarray, sample_rate: int, rng: np.random.Generator) -> np.ndarray:
    import librosa

    steps = float(rng.choice((-_HIGHER, _HIGHER)))
    return librosa.effects.pitch_shift(wave, sr=sample_rate, n_steps=steps)


def _one_of(*effects):
    """Apply one of these effects, at random."""

    def effect(wave: np.ndarray, sample_rate: int, rng: np.random.Generator) -> np.ndarray:
        chosen = effects[rng.integers(len(effects))]
        return chosen.apply(wave, sample_rate, int(rng.integers(2**31)))

    return effect


def _recorded(draw):
    """Record in drawn conditions, detuned by up to 15 cents, at the level of the rendering."""

    def effect(wave: np.ndarray, sample_rate: int, rng: np.random.Generator) -> np.ndarray:
        conditions = replace(draw(rng, cents=15), peak_db=None)
        return conditions.apply(wave, sample_rate, int(rng.integers(2**31)))

    return effect


AUGMENTATIONS = {
    "stretch": RenderingAugmentation(
        lambda performance, rng: PARAMETERS["tempo"].change(
            performance, float(rng.uniform(-_FASTER, _FASTER)), None
        ),
        _stretched,
    ),
    "transpose": RenderingAugmentation(_transposed, _shifted),
    "room": RenderingAugmentation(None, _recorded(draw_room)),
    "phone": RenderingAugmentation(None, _recorded(draw_phone)),
    "livingroom": RenderingAugmentation(None, _one_of(HELD_OUT_ROOM)),
    "noise": RenderingAugmentation(None, _one_of(*(one for one in EFFECTS if one.kind == "noise"))),
}


def split_augmentation(synthesizer: str) -> tuple[str, str]:
    """Split ``fluidr3mono+room`` into synthesizer and augmentation, empty for a plain synthesizer;
    InputError for an unknown one."""
    synthesizer, _, augmentation = synthesizer.partition(SEPARATOR)
    if augmentation:
        lookup(AUGMENTATIONS, augmentation, "augmentation")
    return synthesizer, augmentation


def augmentation_rng(clip: str, augmentation: str) -> np.random.Generator:
    """Random generator of a clip's augmentation, the same for every synthesizer."""
    return np.random.default_rng([0, zlib.crc32(f"{clip} {augmentation}".encode())])


def without_augmentation(synthesizers: np.ndarray) -> np.ndarray:
    """The synthesizer of each rendering, without the augmentation, (n,)."""
    return np.array([name.split(SEPARATOR)[0] for name in synthesizers])


def is_plain(synthesizers: np.ndarray) -> np.ndarray:
    """Mask of renderings without an augmentation, bool (n,): held-out clips are rated on these."""
    return np.array([SEPARATOR not in name for name in synthesizers], bool)


# --- Shards ---------------------------------------------------------------------------------------


class PercepianoLogMel(shards.LogMelBuilder, skip_registration=True):  # type: ignore[call-arg]  # mypy does not see tfds take it
    """Log-mel of whole rendered PercePiano clips with their 19 mean ratings (0 to 1)."""

    name = "percepiano_log_mel"
    CHUNK_FRAMES = 0
    FEATURES = {
        "clip": tfds.features.Text(),
        "synthesizer": tfds.features.Text(),
        "ratings": tfds.features.Tensor(shape=(len(KEYS),), dtype=np.float32),
    }


# Cached per process: loading and hashing a soundfont takes seconds.
_renderings = functools.cache(RenderCache)


def aligned_recording(path: Path, performance: Performance, sample_rate: int) -> np.ndarray:
    """A recording float32 (n,) at its own gain, aligned like a rendering: it starts `LEAD` seconds
    before the first sound and ends `TAIL` seconds after the last key release. InputError if it is
    unreadable, silent, or its duration does not match the clip's performance."""
    wave = audio.load(path, sample_rate)
    # Sound that is 50 dB below the peak and before the first onset is background noise.
    loud = np.flatnonzero(np.abs(wave) > np.abs(wave).max() * 10 ** (-50 / 20))
    sounding, playing = (loud[-1] - loud[0]) / sample_rate, performance.duration - LEAD
    if not 0.8 * playing <= sounding <= playing + 10:
        raise InputError(
            f"{path}: {sounding:.1f} s of sound, but the performance of {path.stem.strip()} lasts"
            f" {playing:.1f} s. Check that it is the right clip and not cut off."
        )
    first = loud[0] - round(LEAD * sample_rate)
    wave = np.concatenate([np.zeros(max(-first, 0), np.float32), wave[max(first, 0) :]])
    return wave[: int(np.ceil((performance.duration + TAIL) * sample_rate))]


def _produce(
    item: shards.Item,
    facts: dict,
    *,
    midi: dict[str, Path],
    front_end: FrontEnd,
    cache: Path,
    recordings: dict[str, Path],
    normalize_loudness: bool,
) -> Iterator[np.ndarray]:
    """The codes of one clip: a synthesizer's rendering or a recording, augmented or not."""
    clip, name, rate = item.fields["clip"], item.fields["synthesizer"], front_end.sample_rate
    if clip not in midi:
        raise InputError(f"no MIDI file {clip}.mid")
    piano, augmentation = split_augmentation(name)
    performance, rng = trimmed(read_midi(midi[clip])), augmentation_rng(clip, augmentation)
    facts["midi_remarks"] = "; ".join(performance.remarks)
    edit, effect = AUGMENTATIONS.get(augmentation, (None, None))
    if piano == OWN:
        wave = aligned_recording(recordings[clip], performance, rate)
    else:
        if edit:
            performance, effect = edit(performance, rng), None
        wave = _renderings(cache, piano, rate).wave(performance, clip)
    if effect:
        wave = effect(wave, rate, rng)
    if normalize_loudness:
        rng = np.random.default_rng(zlib.crc32(f"{clip} {name} loudness".encode()))
        jitter = rng.uniform(-audio.JITTER_DB, audio.JITTER_DB)
        wave = audio.normalize_loudness(wave, rate, audio.LOUDNESS + jitter)
    facts |= {"clip": clip, "synthesizer": name, "level": wave_level(wave)}
    facts |= {"features": audio.audio_features(wave, rate)}
    yield audio.quantize(audio.log_mel(wave, front_end), front_end)[0]


def preprocess(
    folder: str | Path,
    out: str | Path,
    front_end: FrontEnd,
    options: build.BuildOptions,
    *,
    synthesizers: tuple[str, ...] = (OWN,),
    recordings: str | Path = "",
    partial: bool = False,
    normalize_loudness: bool = False,
) -> Path:
    """Render every rated clip with every synthesizer into the data set ``percepiano_log_mel`` in
    ``out``; renderings are cached in ``renderings`` next to ``out``.

    Next to the shards it writes ``classic_features.csv`` (for the feed-forward baseline),
    ``levels.csv`` (of each rendering), ``raters.csv`` (see `rater_agreement`; if the folder has the
    rater table), ``index.csv`` and ``skipped.csv``.

    Args:
        synthesizers: names, see `synth.make_synthesizer`, or ``own`` for ``recordings``; a
            suffix selects one of `AUGMENTATIONS`, such as ``fluidr3mono+room``.
        recordings: a folder with a custom recording of each clip, see `recordings_in`.
        partial: whether ``recordings`` may lack clips; they are then listed.
        normalize_loudness: of every rendering to `audio.LOUDNESS`, up to `audio.JITTER_DB`, with a
            noise bed, for models that rate recordings of any gain.

    Raises:
        InputError: invalid data, ratings that differ from the published ones with the package's
            index, a missing synthesizer or soundfont, ``recordings`` that lack a clip or are not
            used, ``out`` of another configuration.
    """
    index, midi = load_index(folder), find_midi(folder)
    ratings, simulated = read_ratings(folder, index), is_simulated(folder)
    pianos = {split_augmentation(name)[0] for name in synthesizers}
    settings: dict[str, Any] = {
        "ratings": sha256_of(json.dumps({clip: r.tolist() for clip, r in ratings.items()}))[:16],
        "synthesizers": list(synthesizers),
        "front_end": asdict(front_end),
    }

    # --- Custom recordings
    if bool(recordings) != (OWN in pianos):
        raise InputError(
            f"synthesizers {', '.join(synthesizers)} with recordings {str(recordings)!r}:"
            f" synthesizer {OWN!r} and a folder of recordings require each other. Give both or"
            " neither."
        )
    files: dict[str, Path] = {}
    others: dict[str, str] = {}
    missing: list[str] = []
    if recordings:
        clips, (found, left) = set(index["clip"]), recordings_in(recordings)
        files = {clip: path for clip, path in found.items() if clip in clips}
        missing, unmatched = sorted(clips - set(found)), sorted(set(found) - clips)
        left |= {found[clip]: "recordings match no clip and are ignored" for clip in unmatched}
        others = {printable(path.relative_to(recordings)): what for path, what in left.items()}
        for line in summary(others):
            logger.info(f"  {line}")
        if not files:
            advice = f"Name each file after its clip, such as {min(clips, default='CLIP')}.wav."
            raise InputError(
                f"{recordings} has no recording of any of {len(clips):,} clips. {advice}"
            )
        if missing and not partial:
            raise InputError(
                f"{recordings} lacks recordings of {len(missing):,} of {len(clips):,} clips:"
                f" {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}. Add them, or allow"
                " partial renderings; missing clips are then listed."
            )
        lines = (f"{clip} {sha256_of(path)}" for clip, path in sorted(files.items()))
        settings["recordings"] = sha256_of(*lines)[:16]
    if normalize_loudness:
        settings["loudness"] = [audio.LOUDNESS, audio.JITTER_DB, audio.BED_DB]

    # --- Output directory
    cache = Path(out).absolute().parent / "renderings"
    if not shards.is_complete(Path(out)):
        for name in sorted(pianos - {OWN}):
            # an unusable soundfont fails here, before hours of work
            _renderings(cache, name, front_end.sample_rate)
    settings["simulated"] = simulated
    out = build.lock(out, settings)
    if build.check_complete(out):
        return out

    # --- Renderings
    items: list[shards.Item] = []
    excluded: dict[str, str] = {}
    for name in synthesizers:
        lacking = missing if split_augmentation(name)[0] == OWN else []
        excluded |= {f"{clip}@{name}": "no recording of this clip" for clip in lacking}
        for clip in index["clip"][~index["clip"].isin(lacking)]:
            key, fields = f"{clip}@{name}", {"clip": clip, "synthesizer": name}
            fields |= {"ratings": ratings[clip]}
            # 20 s are typical, to distribute clips over shards
            items.append(shards.Item(key, SPLIT, fields, 20.0, measured=False))
    labels = read_labels(folder)
    refused = {
        clip: "not in the index" if clip in labels else "no label"
        for clip in sorted((midi.keys() | labels.keys()) - set(index["clip"]))
    }

    def tables(facts: list[dict]) -> dict[str, pd.DataFrame]:
        found = {"index.csv": index}
        for name, part in (("classic_features.csv", "features"), ("levels.csv", "level")):
            rows = [{key: one[key] for key in KEY} | one[part] for one in facts]
            found[name] = pd.DataFrame(rows)
        if (Path(folder) / RATERS).is_file():
            found["raters.csv"] = rater_agreement(read_raters(folder)).reset_index()
        return found

    logger.info(f"{len(index)} clips with {', '.join(synthesizers)}: {len(items)} renderings")
    logger.info(f"  cached in {Path(out).parent / cache.name}; safe to delete")
    if groups := identical_midi(folder):
        logger.info(
            f"  {sum(map(len, groups))} clips share their MIDI file with another, in {len(groups)}"
            f" groups such as {' and '.join(groups[0])}; each has separate ratings"
        )
    if missing:
        logger.info(f"  {len(missing)} clips have no recording; see skipped.csv")
    produce = functools.partial(
        _produce,
        midi=midi,
        front_end=front_end,
        cache=cache,
        recordings=files,
        normalize_loudness=normalize_loudness,
    )
    licence = "simulated, made from code" if simulated else LICENCE
    build.build(
        build.Job(PercepianoLogMel, produce, out, front_end),
        items,
        options,
        statistics_of=SPLIT,
        description={"licence": licence, "simulated": simulated},
        excluded=excluded,
        refused=refused,
        others=others,
        tables=tables,
    )

    # --- Levels of the renderings, and how many exceed full scale
    for name, part in read_own(out / "levels.csv", KEY).groupby("synthesizer"):
        low, high, peak = part["level_db"].min(), part["level_db"].max(), part["peak_db"].max()
        logger.info(
            f"  {name}: {low:.0f} to {high:.0f} dB, peaks up to {peak:.1f} dB re full scale;"
            f" {(part['over'] > 0).sum()} of {len(part)} renderings exceed it"
        )
    return out
