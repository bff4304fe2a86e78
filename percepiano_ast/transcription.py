"""Listen to whole recordings with a pre-training that hears what is played: notes, pedals, and descriptors to rate by.

Windows overlap by half and are cross-faded, so that every moment is heard with sound on both sides of it.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from percepiano_ast.config import Execution, FrontEnd, InputError, ModelConfig, PretrainConfig, Statistics, from_json, say
from percepiano_ast.data.batches import pad_window, window_starts
from percepiano_ast.decoding import Heard, cross_fade, decode
from percepiano_ast.descriptors import describe
from percepiano_ast.models.heads import patch_validity
from percepiano_ast.models.transcription import STEP, Transcriber
from percepiano_ast.performance import Performance, trimmed
from percepiano_ast.targets import frame_times
from percepiano_ast.training.checkpoints import open_latest
from percepiano_ast.training.state import compute_for, normalise

MADE_BY = "notebook 02_ssast_pretrain_tpu or `python -m percepiano_ast pretrain --pretraining transcription`"
BATCH = 16  # windows at once
_EVERY = 10.0  # seconds between lines of progress


class Described(NamedTuple):
    """`DESCRIPTORS` of what is heard in recordings.

    Attributes:
        values: float32 (clips, descriptors).
        unheard: their mean over the clips in which notes were heard, (descriptors,): it stands for those in which none were.
    """

    values: np.ndarray
    unheard: np.ndarray


class Listener:
    """A trained `Transcriber` and what it expects.

    Args:
        params: with ``encoder`` and ``transcription``.
        model, front_end, statistics: of its pre-training.
        execution: how to compute, on the first device.
    """

    def __init__(
        self, params: dict, model: ModelConfig, front_end: FrontEnd, statistics: Statistics, execution: Execution = Execution()
    ):
        self.model, self.front_end, self.statistics = model, front_end, statistics
        self.params = {name: params[name] for name in ("encoder", "transcription")}
        module = Transcriber(model, compute_for(execution, jax.devices()[0]))

        def hear(params: dict, codes: jax.Array, n_valid: jax.Array) -> dict[str, jax.Array]:
            valid = jnp.arange(model.n_frames)[None, :] < n_valid[:, None]
            log_mel = normalise(codes, front_end, statistics)
            outputs, _ = module.apply({"params": params}, log_mel, patch_validity(valid, model))
            return jax.tree.map(jax.nn.sigmoid, outputs)

        self._hear = jax.jit(hear)

    @classmethod
    def open(cls, pretrained: str | Path, log: Callable[[str], None] = say) -> "Listener":
        """That of the newest checkpoint of a pre-training below ``pretrained``.

        Raises:
            InputError: there is none, or it was not trained to hear what is played.
        """
        tree, made = open_latest(f"{pretrained}/checkpoints", made_by=MADE_BY, log=log)
        objective = from_json(PretrainConfig, made["pretrain"]).objective
        state = tree["state"]
        params = state["ema"] or state["params"]
        if "transcription" not in params:
            raise InputError(
                f"the pre-training in {pretrained} has the objective {objective!r}, which hears no notes: choose one of "
                "transcription, joint"
            )
        model = from_json(ModelConfig, made["model"])
        return cls(params, model, FrontEnd(**made["front_end"]), Statistics(**made["statistics"]))

    def tensors(self) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """Its parameters in half precision and what describes them, for a ``.safetensors`` file."""
        model, front_end, statistics = asdict(self.model), asdict(self.front_end), asdict(self.statistics)
        settings = {"model": model, "front_end": front_end, "statistics": statistics}
        metadata = {name: json.dumps(values) for name, values in settings.items()}
        flat = flatten_dict(jax.device_get(self.params), sep="/")
        return {name: np.ascontiguousarray(values, np.float16) for name, values in flat.items()}, metadata

    @classmethod
    def of_tensors(cls, tensors: dict[str, np.ndarray], metadata: dict[str, str], execution: Execution = Execution()) -> "Listener":
        """What `tensors` gave.

        Raises:
            KeyError, TypeError, ValueError: they are of something else.
        """
        known = {name: json.loads(metadata[name]) for name in ("model", "front_end", "statistics")}
        settings = from_json(ModelConfig, known["model"]), FrontEnd(**known["front_end"]), Statistics(**known["statistics"])
        flat = {name: values.astype(np.float32) for name, values in tensors.items()}
        return cls(unflatten_dict(flat, sep="/"), *settings, execution)

    def write(self, path: str | Path, description: dict) -> Path:
        """Keep it in a ``.safetensors`` file of half precision that describes itself; `read` opens it.

        Args:
            description: what else must be known of it: data, licence, hours.
        """
        tensors, metadata = self.tensors()
        save_file(tensors, path, metadata | {"description": json.dumps(description)})
        return Path(path)

    @classmethod
    def read(cls, path: str | Path, execution: Execution = Execution()) -> "Listener":
        """What `write` kept.

        Raises:
            InputError: no such file, damaged, or another kind of weights.
        """
        try:
            with safe_open(path, "numpy") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
                return cls.of_tensors(tensors, file.metadata(), execution)
        except (OSError, SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path} holds no model that hears notes ({error!r}); give a file that Listener.write made") from error

    def hear(self, codes: np.ndarray) -> Heard:
        """What is heard in a recording, as levels are stored (T, mel): T // `STEP` steps, at least one window's worth of sound
        padded at the floor, whose steps are left out again.
        """
        n_frames = self.model.n_frames
        starts = [start - start % STEP for start in window_starts(len(codes), n_frames)]
        pieces: list[dict[str, np.ndarray]] = []
        for first in range(0, len(starts), BATCH):
            part = starts[first : first + BATCH]
            windows = [codes[start : start + n_frames] for start in part]
            # A batch of one size compiles once; what fills it up is not looked at.
            n_valid = np.array([len(window) for window in windows] + [n_frames] * (BATCH - len(part)))
            stored = np.stack([pad_window(window, n_frames) for window in windows])
            stored = np.concatenate([stored, np.repeat(stored[:1], BATCH - len(part), axis=0)])
            heard = jax.device_get(self._hear(self.params, stored, n_valid))
            pieces += [{name: values[row] for name, values in heard.items()} for row in range(len(part))]
        steps = max(len(codes) // STEP, 1)
        begins = [start // STEP for start in starts]
        joined = {name: cross_fade([piece[name] for piece in pieces], begins, steps) for name in pieces[0]}
        times = frame_times(0, steps * STEP, self.front_end).reshape(-1, STEP).mean(axis=1)
        return Heard(**joined, times=times)

    def listen(self, codes: np.ndarray) -> Performance | None:
        """The performance heard in a recording (T, mel), on its clock; None where no note was."""
        return decode(self.hear(codes))

    def describe(self, codes: np.ndarray) -> np.ndarray | None:
        """`DESCRIPTORS` of what is heard in a recording (T, mel), float32 (descriptors,); None where no note is."""
        performance = self.listen(codes)
        return None if performance is None else np.array(list(describe(trimmed(performance)).values()), np.float32)

    def listen_all(self, clips: Sequence[np.ndarray], log: Callable[[str], None] = say) -> list[Performance | None]:
        """The performance heard in each of many recordings; ``log`` is told how far it is."""
        found = []
        shown = time.monotonic()
        for number, codes in enumerate(clips, 1):
            found.append(self.listen(codes))
            if time.monotonic() - shown > _EVERY:
                shown = time.monotonic()
                log(f"  listened to {number:,} of {len(clips):,} recordings")
        return found


def describe_all(performances: Sequence[Performance | None], log: Callable[[str], None] = say) -> Described:
    """`DESCRIPTORS` of performances that were heard; ``log`` is told in how many recordings no note was.

    Raises:
        InputError: in none of them.
    """
    rows = [None if one is None else list(describe(trimmed(one)).values()) for one in performances]
    heard = np.array([row for row in rows if row is not None], np.float32)
    if not len(heard):
        raise InputError(
            f"no note was heard in any of {len(rows)} recordings: pre-train longer or on more (the demo's twenty minutes are too "
            "few), or rate by the embedding alone"
        )
    unheard = heard.mean(axis=0)
    if silent := len(rows) - len(heard):
        log(f"no note was heard in {silent:,} of {len(rows):,} recordings: the mean of the others stands for them")
    return Described(np.array([unheard if row is None else row for row in rows], np.float32), unheard)
