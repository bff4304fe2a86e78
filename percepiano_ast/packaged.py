"""The model that comes along: hears notes and sound in a recording of any gain, and rates by regressors on both.

One ``.safetensors`` file that nothing is run from: the ear (`transcription.Listener`), two judges, one of them for recordings
whose score is at hand, what they said of PercePiano's clips while those were held out, and a description. ``package`` makes it.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from percepiano_ast import audio, score
from percepiano_ast.baselines.portable import Regressors
from percepiano_ast.config import InputError
from percepiano_ast.data import download
from percepiano_ast.decoding import decode
from percepiano_ast.descriptors import DESCRIPTORS, describe
from percepiano_ast.performance import Performance, trimmed
from percepiano_ast.targets import ONSET_FROM
from percepiano_ast.transcription import Listener

CACHE = Path.home() / ".cache" / "percepiano_ast"
SHIPPED = Path(__file__).parent / "weights" / "ast-mini-judged.safetensors"
NEIGHBOURS = 10  # nearest training clips that a recording's distance is measured to
_EAR, _JUDGE, _REGRESSORS = "ear/", "judge/", "regressors/"


class Said(NamedTuple):
    """What is said of n recordings, or stretches of one.

    Attributes:
        ratings: float32 (n, 19), 0 to 1.
        deviations: standard deviations of them, (n, 19).
        strangeness: how far each is from all that was trained on, (n,); 1 is as far as one in a hundred held-out clips.
    """

    ratings: np.ndarray
    deviations: np.ndarray
    strangeness: np.ndarray


@dataclass(frozen=True, eq=False)
class Judge:
    """Rates what is heard.

    Attributes:
        regressors: on features of a recording.
        known: what was said of PercePiano's clips while they were held out, ascending for each dimension, (clips, 19).
        spread: variance of a rating is ``spread[0] + spread[1]`` times the variance between the regressors, (2, 19).
        within: standard deviation of the errors among performances of one passage, (19,): what two of them have in common to be
            misjudged by does not part them.
        farthest: distance that one in a hundred held-out clips exceeds.
    """

    regressors: Regressors
    known: np.ndarray
    spread: np.ndarray
    within: np.ndarray
    farthest: float

    def rate(self, features: np.ndarray) -> Said:
        """What is said of rows of features (n, n_features)."""
        each = self.regressors.predict(features)
        deviations = np.sqrt(self.spread[0] + self.spread[1] * each.var(axis=0))
        return Said(each.mean(axis=0), deviations, distance(self.regressors, features) / self.farthest)

    def percentiles(self, ratings: np.ndarray) -> np.ndarray:
        """Percentage of PercePiano's clips that are rated lower, (19,) -> (19,)."""
        return 100 * (self.known < ratings).mean(axis=0)

    def tensors(self) -> dict[str, np.ndarray]:
        """What `of_tensors` reads."""
        own: dict[str, np.ndarray] = {
            "known": self.known.astype(np.float16),
            "spread": self.spread.astype(np.float32),
            "within": self.within.astype(np.float32),
        }
        own["farthest"] = np.array([self.farthest], np.float32)
        return own | {_REGRESSORS + name: values for name, values in self.regressors.arrays.items()}

    @classmethod
    def of_tensors(cls, tensors: dict[str, np.ndarray]) -> "Judge":
        """What `tensors` gave."""
        return cls(
            Regressors(_below(tensors, _REGRESSORS)), tensors["known"].astype(np.float32), tensors["spread"],
            tensors["within"], float(tensors["farthest"][0]),
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Packaged:
    """A model of one file.

    Attributes:
        listener: what hears notes and pedals.
        unheard: stands for the descriptors of notes where none is heard, (descriptors,).
        judges: ``alone``, on what is heard of notes, then statistics of the sound; ``score``, on these and what they tell beside
            the score.
        description: data, protocol, figures, licence; ``descriptors``: names of those that the judges are given.
    """

    listener: Listener
    unheard: np.ndarray
    judges: dict[str, Judge]
    description: dict

    def level(self, wave: np.ndarray) -> np.ndarray:
        """The wave at the loudness that the model was trained on.

        Raises:
            InputError: too soft or too short to have one.
        """
        return audio.levelled(wave, self.listener.front_end.sample_rate)

    def hear(self, wave: np.ndarray) -> tuple[Performance | None, float]:
        """What is heard in a wave float32 (n,) that `level` made.

        Returns:
            notes and pedals, or None where no note is heard; and how clearly strokes are heard, 0 to 1: the mean height of the
            onsets that count as such. Pianos are about .6, other instruments below .5.
        """
        front_end = self.listener.front_end
        heard = self.listener.hear(audio.quantize(audio.log_mel(wave, front_end), front_end)[0])
        onsets = heard.onset[heard.onset >= ONSET_FROM]
        return decode(heard), float(onsets.mean()) if len(onsets) else 0.0

    def features(self, performance: Performance | None, wave: np.ndarray, written: score.Score | None = None) -> np.ndarray:
        """What a judge is given of a recording or a stretch of it, float32 (n_features,).

        Args:
            performance: heard in it, on its clock; None where no note was.
            wave: float32 (n,) as `level` made it.
            written: its score, for the judge that is told of it.

        Raises:
            InputError: it does not play this score.
        """
        notes = self.unheard
        if performance is not None:
            told = describe(trimmed(performance), self.description["descriptors"])
            notes = np.array(list(told.values()), np.float32)
        sound = audio.classic_features(wave, self.listener.front_end.sample_rate)
        parts = [notes, np.array(list(sound.values()), np.float32)]
        if written is not None:
            if performance is None:
                raise InputError("no note is heard in it, so that it cannot be laid beside the score; rate it without")
            parts.append(np.array([*score.features.describe(performance, written).values(), 0.0], np.float32))  # found
        return np.concatenate(parts)

    def write(self, path: str | Path) -> Path:
        """Keep it in a ``.safetensors`` file; `read` opens it."""
        ear, metadata = self.listener.tensors()
        tensors = {_EAR + name: values for name, values in ear.items()} | {"unheard": self.unheard.astype(np.float32)}
        for name, judge in self.judges.items():
            tensors |= {f"{_JUDGE}{name}/{key}": values for key, values in judge.tensors().items()}
        # safetensors writes the memory of an array as it lies, whatever its strides say.
        tensors = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata | {"description": json.dumps(self.description), "judges": json.dumps([*self.judges])})
        return Path(path)

    @classmethod
    def read(cls, path: str | Path = SHIPPED) -> "Packaged":
        """What `write` kept, by default the model that comes along.

        Raises:
            InputError: no such file, damaged, or another kind of model.
        """
        try:
            with safe_open(path, "numpy") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
            judges = {name: Judge.of_tensors(_below(tensors, f"{_JUDGE}{name}/")) for name in json.loads(metadata["judges"])}
            listener, description = Listener.of_tensors(_below(tensors, _EAR), metadata), json.loads(metadata["description"])
            if strangers := [name for name in description["descriptors"] if name not in DESCRIPTORS]:
                raise ValueError(f"of another version, which knew the descriptors {', '.join(strangers)}")
            return cls(listener, tensors["unheard"], judges, description)
        except (OSError, SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} holds no model that rates ({error!r}); give a file that `package` made") from error


def fetched(place: str, cache: str | Path = CACHE) -> Path:
    """A model file here, or fetched from ``https://...#sha256=...`` into ``cache``, where it is found again.

    Raises:
        InputError: an address without a checksum, or what came is something else.
    """
    if "://" not in place:
        return Path(place)
    url, _, wanted = place.partition("#sha256=")
    if not re.fullmatch(r"[0-9a-f]{64}", wanted):
        raise InputError(
            f"{place}: write #sha256= and the 64 digits of the file's checksum behind the address, so that it is known"
        )
    path = Path(cache) / f"{wanted[:16]}.safetensors"
    if path.exists() and download.sha256_of(path) == wanted:
        return path
    if (found := download.download(url, path)) != wanted:
        path.unlink()
        raise InputError(f"{url} has the SHA-256 {found}, not {wanted}: it is another file than was meant, and was not kept")
    return path


def _below(tensors: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): values for name, values in tensors.items() if name.startswith(prefix)}


def distance(regressors: Regressors, features: np.ndarray) -> np.ndarray:
    """Mean distance of standardised features (n, n_features) from their nearest training clips, in standard deviations, (n,)."""
    x = regressors.standardised(features)
    nearest = np.partition(regressors.distances(x), NEIGHBOURS - 1, axis=1)[:, :NEIGHBOURS]
    return np.sqrt(nearest / x.shape[1]).mean(axis=1)
