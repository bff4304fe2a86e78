"""What an encoder hears in every rated clip, kept: embeddings, and the notes and pedals of every rendering."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from percepiano_ast import transcription
from percepiano_ast.config import say, write_json
from percepiano_ast.data import performances
from percepiano_ast.data.percepiano_files import read_json
from percepiano_ast.performance import NOTE, PEDAL, Performance
from percepiano_ast.suite.rated import Rated

_NOTHING = Performance(np.zeros(0, NOTE), np.zeros(0, PEDAL))


@dataclass(frozen=True, eq=False)
class HeardClips:
    """Of every rendering, in the order of the clips.

    Attributes:
        embeddings: float32 (n, 2 F' D), or None where they were not asked for.
        played: what was decoded of it; None where no note was heard.
        key: of everything that was heard, and what heard it.
    """

    key: str
    embeddings: np.ndarray | None
    played: list[Performance | None]

    def described(self, log: Callable[[str], None] = say) -> transcription.Described:
        """`DESCRIPTORS` of what was heard."""
        return transcription.describe_all(self.played, log)


def hear(rated: Rated, embed: bool = True) -> HeardClips:
    """Listen to all renderings once: what is kept in ``heard/<model>`` holds as long as encoder and clips are the same.

    Args:
        embed: whether embeddings are wanted too, which take as long again.

    Raises:
        InputError: the encoder was not pre-trained to hear notes.
    """
    home = rated.run.root / "heard" / rated.start.name
    key, listener = _key(rated), rated.listener
    if not (home / "heard.json").exists() or read_json(home / "heard.json")["key"] != key:
        home.mkdir(parents=True, exist_ok=True)
        for name in ("heard.json", "embeddings.npy"):
            (home / name).unlink(missing_ok=True)
        rated.log(f"{rated.start.name}: listening to {len(rated.clips.codes):,} renderings")
        _write(home / performances.FILE, listener.listen_all(rated.clips.codes, rated.log))
        write_json(home / "heard.json", {"key": key})
    if embed and not (home / "embeddings.npy").exists():
        rated.log(f"{rated.start.name}: embedding them")
        partial = home / "embeddings.partial.npy"
        np.save(partial, rated.embed(rated.params, np.arange(len(rated.clips.codes))))
        partial.replace(home / "embeddings.npy")
    with np.load(home / performances.FILE) as arrays:
        found = performances.Performances(dict(arrays))
    played = [found[str(row)] for row in range(len(found))]
    embeddings = np.load(home / "embeddings.npy") if embed else None
    return HeardClips(key, embeddings, [one if len(one.notes) else None for one in played])


def _write(path: Path, played: list[Performance | None]) -> None:
    packed = {str(row): performances.pack(one or _NOTHING) for row, one in enumerate(played)}
    path.write_bytes(performances.join(packed))


def _key(rated: Rated) -> str:
    """Of everything that is heard, and what hears it."""
    content = hashlib.sha256(f"{rated.start.weights} {rated.start.model} {rated.front_end} {rated.start.statistics}".encode())
    for clip, synthesizer, codes in zip(rated.clips.clip, rated.clips.synthesizer, rated.clips.codes, strict=True):
        content.update(f"{clip} {synthesizer}".encode())
        content.update(np.ascontiguousarray(codes).data)
    return content.hexdigest()
