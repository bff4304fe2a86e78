"""PercePiano's files: paths, naming scheme, download and verification against the published files.

Source: github.com/JonghoKimSNU/PercePiano (Park et al. 2024, MIT licence) in its own layout. The
commit is pinned in ``config.PERCEPIANO_URL``; the checksums here are of its files. GitHub's
archives are not reproducible byte by byte, so the unpacked files are compared.
"""

import hashlib
import http.client
import json
import shutil
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from percepiano_ast.config import PERCEPIANO_URL
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation.reliability import RATERS

LABELS = "label_2round_mean_reg_19_with0_rm_highstd0.json"
MIDI_FOLDER = "virtuoso/data/all_2rounds"
SCORE_FOLDER = "virtuoso/data/score_midi"
# Misnamed clip -> the passage that it contains. 36 % of this clip's notes match the score of its
# name, 99 % match this one. Its ratings are of the audio that was presented, so they remain valid.
MISNAMED = {"Beethoven_WoO80_var25_8bars_19_14": "Beethoven_WoO80_var24_8bars_0"}
COMMIT = PurePosixPath(PERCEPIANO_URL).stem

# Files and SHA-256 of each part of the data at the pinned commit, see `fingerprints`.
PUBLISHED = {
    LABELS: (1, "9efbf1ada5615d51f6b146bf57af3258d7ce684bef18bb9c860826e681cf47d9"),
    RATERS: (1, "f7ce432e33f4fb7e04fcf00aa7ae6501095f835ad6c6a1f852fb68ddfffda774"),
    MIDI_FOLDER: (1202, "2fa81fe9eacdb75f602521c13deffa4f752465aaceb7925dec1a4d119f8ad496"),
    SCORE_FOLDER: (261, "5d051fc3628c0c8b3d9d5f0f82db157356de3620044d6ea96a1e4b578b78aebe"),
}


class ClipName(NamedTuple):
    """The fields of a clip's name: ``{piece}_{N}bars_{player}_{segment}``.

    The upstream README swaps the last two fields; upstream's code and files use player, then
    segment.

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
        """Parse a clip's name or a file's stem; surrounding spaces are ignored (one published name
        has them).

        Raises:
            InputError: fewer than three fields.
        """
        fields = name.strip().rsplit("_", 2)
        if len(fields) < 3 or not all(fields):
            raise InputError(
                f"{name!r} is not a valid clip name. The format is PIECE_PLAYER_SEGMENT."
            )
        return cls(*fields)

    @property
    def passage(self) -> str:
        """Piece and segment, which identify the bars of a clip."""
        return f"{self.piece}_{self.segment}"

    @property
    def deadpan(self) -> bool:
        """Whether the clip is a deadpan rendering rather than a human performance."""
        return self.player.startswith("Score")


def read_json(path: Path) -> dict:
    """Read a JSON object and strip its names; duplicated names are an error.

    Raises:
        InputError: damaged, truncated, not an object, or a duplicated name.
    """

    def unique(pairs: list[tuple]) -> dict:
        return _once(((name.strip(), value) for name, value in pairs), str(path))

    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged or truncated ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise InputError(
            f"{path} should hold a JSON object, holds {content!r:.40}. Download it again."
        )
    return content


def _once(pairs: Iterable[tuple], where: str) -> dict:
    found: dict = {}
    for name, value in pairs:
        if name in found:
            raise InputError(
                f"{where} has {name!r} twice (spaces around a name are ignored). Keep one of them."
            )
        found[name] = value
    return found


def read_labels(folder: str | Path) -> dict[str, list]:
    """Read the label file: the values of every clip, with surrounding spaces stripped from clip
    names.

    Raises:
        InputError: missing, damaged, truncated, or with a duplicated clip.
    """
    path = Path(folder) / LABELS
    if not path.is_file():
        raise InputError(
            f"no {LABELS} in {folder}. Give the folder with this file and {MIDI_FOLDER}/, "
            "a checkout of github.com/JonghoKimSNU/PercePiano."
        )
    return read_json(path)


def find_midi(folder: str | Path) -> dict[str, Path]:
    """MIDI file of every clip; a clip's name is the file's stem without surrounding spaces.

    Raises:
        InputError: no MIDI folder, an empty one, or two files of one clip.
    """
    where = Path(folder) / MIDI_FOLDER
    files = _once(((path.stem.strip(), path) for path in sorted(where.glob("*.mid"))), str(where))
    if not files:
        raise InputError(
            f"no MIDI files in {where}: the data directory is missing or incomplete. Download it"
            " again."
        )
    return files


def find_scores(folder: str | Path) -> dict[str, Path]:
    """Score of every passage as MIDI: ``ClipName.passage`` -> file of the ``Score`` rendering.

    Raises:
        InputError: no scores in the folder.
    """
    scores = {}
    for path in sorted((Path(folder) / SCORE_FOLDER).glob("*_Score_*.mid")):
        scores[ClipName.of(path.stem).passage] = path
    if not scores:
        raise InputError(
            f"no scores in {Path(folder) / SCORE_FOLDER}. Download PercePiano again, which includes"
            " them."
        )
    return scores


def same_playing(folder: str | Path) -> list[list[str]]:
    """Clips with identical MIDI files under different names, as sorted groups of two or more.

    PercePiano has 21 such groups: deadpan renderings of repeated passages are identical, and a few
    human performances were stored twice. They were rated separately, so each remains a clip; all
    clips of a group are in one content group.
    """
    groups: dict[str, list[str]] = {}
    for clip, path in find_midi(folder).items():
        groups.setdefault(_sha256(path), []).append(clip)
    return sorted(sorted(clips) for clips in groups.values() if len(clips) > 1)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fingerprints(folder: str | Path) -> dict[str, tuple[int, str]]:
    """For each part of the data, the number of files and one SHA-256 over their names and
    contents."""
    folder = Path(folder)
    parts = {
        LABELS: [folder / LABELS],
        RATERS: [folder / RATERS],
        MIDI_FOLDER: sorted((folder / MIDI_FOLDER).glob("*.mid")),
        SCORE_FOLDER: sorted((folder / SCORE_FOLDER).glob("*.mid")),
    }
    found = {}
    for part, paths in parts.items():
        lines = [f"{_sha256(path)}  {path.name}\n" for path in paths if path.is_file()]
        found[part] = len(lines), hashlib.sha256("".join(lines).encode()).hexdigest()
    return found


def check_published(folder: str | Path) -> None:
    """Compare the files of a folder with those of the pinned commit.

    Raises:
        InputError: a part is missing or differs; the message names it.
    """
    for part, (count, checksum) in fingerprints(folder).items():
        if (count, checksum) != PUBLISHED[part]:
            expected = PUBLISHED[part][0]
            what = f"{count:,} of {expected:,} files" if count != expected else "different contents"
            raise InputError(
                f"{part} in {folder} has {what}: it is not PercePiano at commit {COMMIT[:7]}. "
                "Delete the folder and download it again."
            )


def fetch(url: str, folder: str | Path, log: Callable[[str], None] = print) -> Path:
    """Download PercePiano's archive and unpack labels, rater table, MIDI, scores and licence into
    ``folder``.

    A URL of the pinned commit must deliver the files of that commit, and a folder downloaded
    earlier must still have them. For any other URL the log states that the files were not compared.

    Raises:
        InputError: the server does not respond, the download is not a complete zip archive with
            labels and MIDI, or its files differ from those of the pinned commit.
    """
    folder, pinned = Path(folder), COMMIT in url
    if folder.exists():
        if pinned:
            check_published(folder)
        return folder
    log(f"downloading {url}")
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tempfile.TemporaryFile() as file:
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                shutil.copyfileobj(answer, file)
            _unpack(zipfile.ZipFile(file), partial)
            if pinned:
                check_published(partial)
        except (
            OSError,
            ValueError,
            http.client.HTTPException,
            zipfile.BadZipFile,
            zlib.error,
        ) as error:
            raise InputError(
                f"cannot download PercePiano from {url}: {str(error).rstrip('.')}. Give a local"
                " copy."
            ) from error
    if not pinned:
        log(f"  files not compared: this is not commit {COMMIT[:7]}, which the results refer to")
    partial.replace(folder)
    return folder


def _unpack(archive: zipfile.ZipFile, folder: Path) -> None:
    for name in archive.namelist():
        inner = PurePosixPath(name.partition("/")[2])
        # The parent must equal one of two fixed folders, so no name can escape the target folder.
        is_midi = str(inner.parent) in (MIDI_FOLDER, SCORE_FOLDER) and inner.suffix == ".mid"
        if is_midi or str(inner) in (LABELS, RATERS, "LICENSE"):
            target = folder / inner
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(archive.read(name))
    find_midi(folder)
    read_labels(folder)
