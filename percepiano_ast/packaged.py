"""`piano-rater`, the bundled model: transcribes a recording and rates it by regressors on the
transcription and the sound.

One ``.safetensors`` file, nothing in it is executed: the transcriber (`transcription.Listener`),
two sets of regressors (one uses the score too), people's ratings that a rating is ranked among, the
measured error, and a description. ``package`` makes it.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from percepiano_ast import audio
from percepiano_ast.baselines.portable import Regressors
from percepiano_ast.errors import InputError
from percepiano_ast.files import download, sha256_of
from percepiano_ast.music.midi import Performance, trimmed
from percepiano_ast.music.performance_features import PERFORMANCE_FEATURES, performance_features
from percepiano_ast.music.piano_roll import ONSET_FROM, frames_to_notes
from percepiano_ast.music.score import Score
from percepiano_ast.music.score_features import score_features
from percepiano_ast.transcription import Listener

NAME = "piano-rater"  # the bundled model in file, card, help and tables
CACHE = Path.home() / ".cache" / "percepiano_ast"
SHIPPED = Path(__file__).parent / "weights" / f"{NAME}.safetensors"
NEIGHBOURS = 10  # nearest training clips that a recording's distance is measured to
_EAR, _JUDGE, _REGRESSORS = "ear/", "judge/", "regressors/"


class Said(NamedTuple):
    """Ratings of n recordings, or of n stretches of one.

    Attributes:
        ratings: float32 (n, 19), 0 to 1.
        novelty: distance from the training clips, (n,); 1 is the 99th percentile of held-out clips.
    """

    ratings: np.ndarray
    novelty: np.ndarray


@dataclass(frozen=True, eq=False)
class Judge:
    """Regressors with their calibration, and what their ratings are compared with.

    Attributes:
        regressors: on features of a recording.
        calibration: intercept and slope, (2, 19): rating = intercept + slope * mean of the
            regressors. Fitted on people's ratings of performances of works that were left out of
            training.
        reference: mean ratings by people of PercePiano's human performances, ascending for each
            dimension, (performances, 19).
        deviation: standard deviation of the errors for works, a soundfont and a room that were left
            out of training, (19,).
        within: standard deviation of the errors among performances of one passage, (19,): errors
            that two performances share cancel in their difference.
        farthest: distance from the training clips that one in a hundred held-out clips exceeds.
    """

    regressors: Regressors
    calibration: np.ndarray
    reference: np.ndarray
    deviation: np.ndarray
    within: np.ndarray
    farthest: float

    def rate(self, features: np.ndarray) -> Said:
        """Ratings of rows of features (n, n_features)."""
        predicted = self.regressors.predict(features).mean(axis=0)
        ratings = self.calibration[0] + self.calibration[1] * predicted
        return Said(ratings.astype(np.float32), distance(self.regressors, features) / self.farthest)

    def percentiles(self, ratings: np.ndarray) -> np.ndarray:
        """Percentage of PercePiano's human performances that people rated lower, (..., 19) -> (...,
        19)."""
        return 100 * (self.reference < np.asarray(ratings)[..., None, :]).mean(axis=-2)

    def tensors(self) -> dict[str, np.ndarray]:
        """Tensors of a file, which `of_tensors` reads."""
        own = {
            name: getattr(self, name).astype(np.float32)
            for name in ("calibration", "reference", "deviation", "within")
        }
        own["farthest"] = np.array([self.farthest], np.float32)
        return own | {_REGRESSORS + name: values for name, values in self.regressors.arrays.items()}

    @classmethod
    def of_tensors(cls, tensors: dict[str, np.ndarray]) -> "Judge":
        """The inverse of `tensors`."""
        own = {name: tensors[name] for name in ("calibration", "reference", "deviation", "within")}
        return cls(
            Regressors(_below(tensors, _REGRESSORS)), **own, farthest=float(tensors["farthest"][0])
        )


@dataclass(frozen=True, eq=False)
class Packaged:
    """A rating model in one file.

    Attributes:
        listener: the transcriber of notes and pedals.
        unheard: descriptors that are used when no note is transcribed, (descriptors,).
        ``judges``: two sets of regressors; ``alone``: on descriptors of the transcription, then
            statistics of the sound; ``score``: on these and on features of the transcription
            aligned with the score.
        description: data, protocol, figures, licence; ``descriptors``: names of the descriptors
            that are features.
    """

    listener: Listener
    unheard: np.ndarray
    judges: dict[str, Judge]
    description: dict

    @property
    def limits(self) -> str:
        """What the bundled model was validated on and what it must not be used for, in two
        sentences; empty for other models."""
        if self.description["model"] != NAME:
            return ""
        known, works = (self.description[name]["mean"] for name in ("r", "r_works"))
        return (
            "The model was trained on renderings of three works by Beethoven and Schubert: its"
            f" mean correlation with people's ratings is {known:.2f} on held-out passages of these"
            f" works and {works:.2f} on works left out of training, and the onset F1 of its"
            " transcription of a real Disklavier is 0.74. It does not measure quality (on 83"
            " learners' performances rated by ten people each, “doubtful to convincing” ordered"
            " better from worse at chance) and is not for judging people."
        )

    def level(self, wave: np.ndarray) -> np.ndarray:
        """The wave at the loudness that the model was trained on.

        Raises:
            InputError: too soft or too short to have one.
        """
        return audio.normalize_loudness(wave, self.listener.front_end.sample_rate)

    def hear(self, wave: np.ndarray) -> tuple[Performance | None, float]:
        """Transcribe a wave float32 (n,) that `level` returned.

        Returns:
            notes and pedals, or None if no note is detected; and the mean onset probability of the
            detected onsets, 0 to 1: about 0.6 for pianos, below 0.5 for other instruments.
        """
        front_end = self.listener.front_end
        heard = self.listener.hear(audio.quantize(audio.log_mel(wave, front_end), front_end)[0])
        onsets = heard.onset[heard.onset >= ONSET_FROM]
        return frames_to_notes(heard), float(onsets.mean()) if len(onsets) else 0.0

    def features(
        self, performance: Performance | None, wave: np.ndarray, written: Score | None = None
    ) -> np.ndarray:
        """Features of a recording or a stretch of it, float32 (n_features,).

        Args:
            performance: its transcription; None if no note was detected.
            wave: float32 (n,) as `level` returned it.
            written: its score, for the score-informed regressors.

        Raises:
            InputError: the transcription does not match the score.
        """
        notes = self.unheard
        if performance is not None:
            notes = np.array(
                list(
                    performance_features(
                        trimmed(performance), self.description["descriptors"]
                    ).values()
                ),
                np.float32,
            )
        sound = audio.audio_features(wave, self.listener.front_end.sample_rate)
        parts = [notes, np.array(list(sound.values()), np.float32)]
        if written is not None:
            if performance is None:
                raise InputError(
                    "no notes were detected, so it cannot be aligned with the score. Rate it"
                    " without the score"
                )
            # found
            parts.append(
                np.array([*score_features(performance, written).values(), 0.0], np.float32)
            )
        return np.concatenate(parts)

    def write(self, path: str | Path) -> Path:
        """Save as a ``.safetensors`` file, which `read` loads."""
        ear, metadata = self.listener.tensors()
        tensors = {_EAR + name: values for name, values in ear.items()} | {
            "unheard": self.unheard.astype(np.float32)
        }
        for name, judge in self.judges.items():
            tensors |= {f"{_JUDGE}{name}/{key}": values for key, values in judge.tensors().items()}
        # safetensors writes an array's memory as it is, whatever its strides are.
        tensors = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_file(
            tensors,
            path,
            metadata
            | {"description": json.dumps(self.description), "judges": json.dumps([*self.judges])},
        )
        return Path(path)

    @classmethod
    def read(cls, path: str | Path = SHIPPED) -> Self:
        """Load a file that `write` saved, by default the bundled model.

        Raises:
            InputError: no such file, a damaged one, another kind of model, or one of another
                version.
        """
        try:
            with safe_open(path, "numpy") as file:
                metadata = file.metadata()
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
            judges = {
                name: Judge.of_tensors(_below(tensors, f"{_JUDGE}{name}/"))
                for name in json.loads(metadata["judges"])
            }
            listener, description = (
                Listener.of_tensors(_below(tensors, _EAR), metadata),
                json.loads(metadata["description"]),
            )
            if unknown := [
                name for name in description["descriptors"] if name not in PERFORMANCE_FEATURES
            ]:
                raise ValueError(
                    f"made by another version, with the descriptors {', '.join(unknown)}"
                )
            return cls(listener, tensors["unheard"], judges, description)
        except (OSError, SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path}: not a rating model of this version ({error!r}). Give a file made by this"
                " version's `percepiano package`"
            ) from error


def fetched(place: str, cache: str | Path = CACHE) -> Path:
    """Path of a model file; one at ``https://...#sha256=...`` is downloaded into ``cache`` once.

    Raises:
        InputError: a URL without a checksum, or a file with another one.
    """
    if "://" not in place:
        return Path(place)
    url, _, wanted = place.partition("#sha256=")
    if not re.fullmatch(r"[0-9a-f]{64}", wanted):
        raise InputError(
            f"{place}: a URL without a checksum. Append #sha256= and the file's 64-digit SHA-256"
        )
    path = Path(cache) / f"{wanted[:16]}.safetensors"
    if path.exists() and sha256_of(path) == wanted:
        return path
    if (found := download(url, path)) != wanted:
        path.unlink()
        raise InputError(
            f"{url}: its SHA-256 is {found}, not {wanted}, so it was deleted. Check the URL and the"
            " checksum"
        )
    return path


def _below(tensors: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {
        name.removeprefix(prefix): values
        for name, values in tensors.items()
        if name.startswith(prefix)
    }


def distance(regressors: Regressors, features: np.ndarray) -> np.ndarray:
    """Mean distance of standardised features (n, n_features) from their nearest training clips, in
    standard deviations, (n,)."""
    x = regressors.standardised(features)
    nearest = np.partition(regressors.distances(x), NEIGHBOURS - 1, axis=1)[:, :NEIGHBOURS]
    return np.sqrt(nearest / x.shape[1]).mean(axis=1)
