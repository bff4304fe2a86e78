"""Transcription of whole recordings by a pre-trained model: notes, pedals and features of them."""

import json
import logging
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

from percepiano_ast.audio.mel import pad_window, window_starts
from percepiano_ast.config import (
    ComputeConfig,
    FrontEnd,
    LevelStats,
    ModelConfig,
    PretrainConfig,
    from_json,
)
from percepiano_ast.errors import InputError
from percepiano_ast.files import check_tensors, one_line, read_json, write_tensors
from percepiano_ast.models.ast import PREFIX_TOKENS
from percepiano_ast.models.heads import patch_validity
from percepiano_ast.models.transcription import STEP, TranscriptionModel
from percepiano_ast.models.weights import require_same_shapes
from percepiano_ast.music.midi import Performance, trimmed
from percepiano_ast.music.performance_features import PERFORMANCE_FEATURES, performance_features
from percepiano_ast.music.piano_roll import (
    FramePredictions,
    crossfade,
    frame_times,
    frames_to_notes,
)
from percepiano_ast.training.state import compute_for, normalise

MADE_BY = "notebook 02_ssast_pretrain_tpu or `percepiano pretrain --pretraining transcription`"
BATCH = 16  # windows per batch, at most
# What reading a file of another kind raises.
NOT_A_MODEL = (
    *(ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError),
    SafetensorError,
)
METADATA = ("model", "front_end", "statistics", "description")  # of a file of `Transcriber.write`
_EVERY = 10.0  # seconds between lines of progress

logger = logging.getLogger(__name__)


class Transcriber:
    """A trained `TranscriptionModel`, on the first device: ``params`` with ``encoder`` and
    ``transcription``, and the settings of its pre-training."""

    def __init__(
        self,
        params: dict,
        model: ModelConfig,
        front_end: FrontEnd,
        statistics: LevelStats,
        compute: ComputeConfig = ComputeConfig(),
    ):
        require_current_head(params["transcription"])
        self.model, self.front_end, self.statistics = model, front_end, statistics
        self.params = {name: params[name] for name in ("encoder", "transcription")}
        module = TranscriptionModel(model, compute_for(compute, jax.devices()[0]))

        def predict(params: dict, codes: jax.Array, n_valid: jax.Array) -> dict[str, jax.Array]:
            valid = jnp.arange(model.n_frames)[None, :] < n_valid[:, None]
            log_mel = normalise(codes, front_end, statistics)
            outputs, _ = module.apply({"params": params}, log_mel, patch_validity(valid, model))
            return jax.tree.map(jax.nn.sigmoid, outputs)

        self._predict = jax.jit(predict)

    @classmethod
    def open(cls, pretrained: str | Path) -> Self:
        """The model in the newest checkpoint of the pre-training in ``pretrained``.

        Raises:
            InputError: there is none, or it was not trained to transcribe.
        """
        from percepiano_ast.training.checkpoints import open_latest  # rating needs none of it

        tree, made = open_latest(f"{pretrained}/checkpoints", made_by=MADE_BY)
        params = tree["state"]["ema"] or tree["state"]["params"]
        if "transcription" not in params:
            objective = from_json(PretrainConfig, made["pretrain"]).objective
            raise InputError(
                f"the pre-training in {pretrained} has the objective {objective!r}, which does not"
                " include transcription. Choose one with the objective transcription or joint"
            )
        model = from_json(ModelConfig, made["model"])
        return cls(params, model, FrontEnd(**made["front_end"]), LevelStats(**made["statistics"]))

    def tensors(self) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """Parameters in half precision and their metadata, for a ``.safetensors`` file."""
        flat = flatten_dict(jax.device_get(self.params), sep="/")
        tensors = {name: np.ascontiguousarray(values, np.float16) for name, values in flat.items()}
        settings = ("model", "front_end", "statistics")
        return tensors, {name: json.dumps(asdict(getattr(self, name))) for name in settings}

    @classmethod
    def from_tensors(cls, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> Self:
        """The inverse of `tensors`; raises one of ``NOT_A_MODEL`` for those of another kind."""
        kinds = {"model": ModelConfig, "front_end": FrontEnd, "statistics": LevelStats}
        model, front_end, statistics = (
            from_json(kind, read_json(metadata[name].encode(), kind, name=name, advice=""))
            for name, kind in kinds.items()
        )
        # Before anything of the stated size is computed.
        stated = model.num_patches, model.depth, model.n_mels
        found = (
            tensors["encoder/pos_embed"].shape[1] - PREFIX_TOKENS,
            len(tensors["encoder/blocks/norm1/scale"]),
            front_end.n_mels,
        )
        if not statistics.valid:
            raise ValueError(f"{statistics} is not valid")
        if len(model.stem) > len(tensors):
            raise ValueError(f"a stem of {len(model.stem):,} convolutions is stated")
        if stated != found:
            raise ValueError(f"{stated} patches, blocks and mel bands are stated, {found} found")
        window = jax.ShapeDtypeStruct((1, model.n_frames, model.n_mels), jnp.float32)
        like = jax.eval_shape(TranscriptionModel(model).init, jax.random.key(0), window)["params"]
        flat = {name: values.astype(np.float32) for name, values in tensors.items()}
        params = unflatten_dict(flat, sep="/")
        require_current_head(params["transcription"])
        require_same_shapes(params, like, "the file")
        return cls(params, model, front_end, statistics)

    def write(self, path: str | Path, description: dict) -> Path:
        """Save the model as a ``.safetensors`` file, which `read` loads; ``description`` is further
        metadata: data, licence, hours."""
        tensors, metadata = self.tensors()
        write_tensors(path, tensors, metadata | {"description": json.dumps(description)})
        return Path(path)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Load a file of `write`.

        Raises:
            InputError: missing, damaged, or another kind of weights.
        """
        signed = check_tensors(path)
        try:
            return cls.from_tensors(*read_tensors(path, METADATA, signed))
        except NOT_A_MODEL as error:
            wrong = f"{path} does not hold a transcription model ({one_line(error)})"
            raise InputError(f"{wrong}; give a file of Transcriber.write") from error

    def predict(self, codes: np.ndarray) -> FramePredictions:
        """Activations for a recording of stored levels (T, mel): T // `STEP` steps.

        Windows overlap by half and are cross-faded, so that every frame has context on both sides.
        A recording shorter than a window is padded with the lowest level; the steps of the padding
        are removed again.
        """
        n_frames = self.model.n_frames
        starts = [start - start % STEP for start in window_starts(len(codes), n_frames)]
        # Batches of few sizes compile few times; the outputs of padding windows are ignored.
        size = min(BATCH, 1 << (len(starts) - 1).bit_length())
        pieces: list[dict[str, np.ndarray]] = []
        for first in range(0, len(starts), size):
            windows = [codes[start : start + n_frames] for start in starts[first : first + size]]
            padding = size - len(windows)
            n_valid = np.array([len(window) for window in windows] + [n_frames] * padding)
            stored = np.stack([pad_window(window, n_frames) for window in windows])
            stored = np.concatenate([stored, np.repeat(stored[:1], padding, axis=0)])
            found = jax.device_get(self._predict(self.params, stored, n_valid))
            pieces += [
                {name: values[row] for name, values in found.items()} for row in range(len(windows))
            ]
        steps = max(len(codes) // STEP, 1)
        begins = [start // STEP for start in starts]
        joined = {
            name: crossfade([piece[name] for piece in pieces], begins, steps) for name in pieces[0]
        }
        times = frame_times(0, steps * STEP, self.front_end).reshape(-1, STEP).mean(axis=1)
        return FramePredictions(**joined, times=times)

    def transcribe(self, codes: np.ndarray) -> Performance | None:
        """The transcription of a recording (T, mel), in the recording's time; None if no note is
        detected."""
        return frames_to_notes(self.predict(codes))

    def transcribe_all(self, clips: Sequence[np.ndarray]) -> list[Performance | None]:
        """The transcription of each recording."""
        found, shown = [], time.monotonic()
        for number, codes in enumerate(clips, 1):
            found.append(self.transcribe(codes))
            if time.monotonic() - shown > _EVERY:
                shown = time.monotonic()
                logger.info(f"  transcribed {number:,} of {len(clips):,} recordings")
        return found


def require_current_head(params: dict) -> None:
    """InputError if the parameters of a transcription head are those of an earlier version."""
    if "hidden" in params:
        raise InputError(
            "the transcription head is of version 0.1.0, which had no offsets and one hidden layer"
            " for everything. Pre-train again with this version, or use that one"
        )


def read_tensors(
    path: str | Path, names: Collection[str], signed: bool
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata, ``names``, of a ``.safetensors`` file, after `check_tensors`; raises
    one of ``NOT_A_MODEL``."""
    with safe_open(path, "numpy") as file:
        metadata = file.metadata() or {}
        # A damaged name of the checksum, too, is an unknown one.
        if unknown := metadata.keys() - {*names, "sha256"}:
            raise ValueError(f"unknown metadata {min(unknown)!r:.60}")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    for name, values in tensors.items():
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise ValueError(f"{name} has NaN or infinite values")
    if not signed:
        logger.warning(f"{path} has no checksum: an earlier version wrote it")
    return tensors, metadata


def transcription_features(
    performance: Performance, names: Collection[str] = PERFORMANCE_FEATURES
) -> np.ndarray:
    """`performance_features` of a transcription, float32 (features,)."""
    return np.array(list(performance_features(trimmed(performance), names).values()), np.float32)


class TranscriptionFeatures(NamedTuple):
    """`transcription_features` of recordings, (clips, features), and their mean over those with
    detected notes, (features,), which the others have."""

    values: np.ndarray
    mean: np.ndarray


def features_of(performances: Sequence[Performance | None]) -> TranscriptionFeatures:
    """`transcription_features` of transcriptions.

    Raises:
        InputError: there are no notes in any of them.
    """
    rows = [None if one is None else transcription_features(one) for one in performances]
    with_notes = np.array([row for row in rows if row is not None], np.float32)
    if not len(with_notes):
        raise InputError(
            f"no notes were detected in any of {len(rows)} recordings. Pre-train longer or on more"
            " data (the demo's twenty minutes are too few), or rate from the embedding only"
        )
    mean = with_notes.mean(axis=0)
    if silent := len(rows) - len(with_notes):
        logger.info(
            f"no notes were detected in {silent:,} of {len(rows):,} recordings; the mean of the"
            " others is used for them"
        )
    values = np.array([mean if row is None else row for row in rows], np.float32)
    return TranscriptionFeatures(values, mean)
