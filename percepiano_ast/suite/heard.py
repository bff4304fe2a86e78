"""An encoder's output for every rated clip, cached: embeddings, and the transcription of every
rendering."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from percepiano_ast.data import shards
from percepiano_ast.data.percepiano import read_json
from percepiano_ast.files import echo, write_json
from percepiano_ast.inference import transcribe
from percepiano_ast.music.midi import NOTE, PEDAL, Performance
from percepiano_ast.suite.rated import Rated

_NOTHING = Performance(np.zeros(0, NOTE), np.zeros(0, PEDAL))


@dataclass(frozen=True, eq=False)
class HeardClips:
    """Embeddings and transcriptions of all renderings, in the order of the clips.

    Attributes:
        embeddings: float32 (n, 2 F' D), or None if they were not requested.
        played: transcription of each rendering; None if no note was detected.
        key: checksum of the renderings and the encoder.
    """

    key: str
    embeddings: np.ndarray | None
    played: list[Performance | None]

    def described(self, log: Callable[[str], None] = echo) -> transcribe.TranscriptionFeatures:
        """`PERFORMANCE_FEATURES` of the transcriptions."""
        return transcribe.features_of(self.played, log)


def hear(rated: Rated, embed: bool = True) -> HeardClips:
    """Transcribe all renderings once. The cached result is valid as long as encoder and clips do
    not change.

    Args:
        embed: whether to compute embeddings too, which doubles the time.

    Raises:
        InputError: the encoder was not pre-trained to transcribe.
    """
    home = rated.run.root / "heard" / rated.start.name
    key, listener = _key(rated), rated.listener
    if not (home / "heard.json").exists() or read_json(home / "heard.json")["key"] != key:
        home.mkdir(parents=True, exist_ok=True)
        for name in ("heard.json", "embeddings.npy"):
            (home / name).unlink(missing_ok=True)
        rated.log(f"{rated.start.name}: transcribing {len(rated.clips.codes):,} renderings")
        _write(home / shards.PERFORMANCES, listener.transcribe_all(rated.clips.codes, rated.log))
        write_json(home / "heard.json", {"key": key})
    if embed and not (home / "embeddings.npy").exists():
        rated.log(f"{rated.start.name}: embedding {len(rated.clips.codes):,} renderings")
        partial = home / "embeddings.partial.npy"
        np.save(partial, rated.embed(rated.params, np.arange(len(rated.clips.codes))))
        partial.replace(home / "embeddings.npy")
    with np.load(home / shards.PERFORMANCES) as arrays:
        found = shards.Performances(dict(arrays))
    played = [found[str(row)] for row in range(len(found))]
    embeddings = np.load(home / "embeddings.npy") if embed else None
    return HeardClips(key, embeddings, [one if len(one.notes) else None for one in played])


def _write(path: Path, played: list[Performance | None]) -> None:
    packed = {str(row): shards.pack_performance(one or _NOTHING) for row, one in enumerate(played)}
    path.write_bytes(shards.join_performances(packed))


def _key(rated: Rated) -> str:
    """Checksum of the renderings and the encoder."""
    content = hashlib.sha256(
        f"{rated.start.weights} {rated.start.model} {rated.front_end}"
        f" {rated.start.statistics}".encode()
    )
    for clip, synthesizer, codes in zip(
        rated.clips.clip, rated.clips.synthesizer, rated.clips.codes, strict=True
    ):
        content.update(f"{clip} {synthesizer}".encode())
        content.update(np.ascontiguousarray(codes).data)
    return content.hexdigest()
