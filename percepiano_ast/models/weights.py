"""Read and write files of published weights: AST, SSAST, and Hugging Face's
``ASTForAudioClassification``.

Geometry that is missing from a file is inferred from its shapes. Files that do not match a complete
model are rejected. No code in a file is executed (`torch_file`).
"""

import dataclasses
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp  # also registers bfloat16 with NumPy
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from percepiano_ast.config import (
    AUDIOSET,
    KALDI,
    MODELS,
    FrontEnd,
    ModelConfig,
    Statistics,
    from_json,
)
from percepiano_ast.errors import InputError
from percepiano_ast.files import write_json
from percepiano_ast.models import convert, torch_file
from percepiano_ast.models.ast import Classifier
from percepiano_ast.models.ssast import SSAST

_HEAD_WIDTH = 64  # of an attention head, in every published size
# Strides and window lengths of the published models: AudioSet, ESC-50, Speech Commands. The number
# of patches identifies each.
_STRIDES, _LENGTHS, _N_MELS = (10, 12, 14, 16), (1024, 512, 128), 128
_HF_TYPE = "audio-spectrogram-transformer"
# dB of power; Hugging Face's statistics are in nepers, natural logarithms
_NEPER = 10 / math.log(10)


@dataclass(frozen=True)
class Weights:
    """A published model, or a model of this package in a published form.

    Attributes:
        params: float32; of `ssast.SSAST` for the kind ``ssast_pretrain``, else of `ast.Classifier`.
        config: geometry, including that of the position table.
        kind: one of `convert.KINDS`.
        front_end, statistics: computation and normalisation of its spectrograms.
        description: further information, such as data and licence.
        norm_epsilon, head_epsilon: of the LayerNorms in the encoder and in the classifier's head.
    """

    params: dict
    config: ModelConfig
    kind: str
    front_end: FrontEnd = KALDI
    statistics: Statistics = AUDIOSET
    description: dict = dataclasses.field(default_factory=dict)
    norm_epsilon: float = 1e-6
    head_epsilon: float = 1e-5

    def shapes(self) -> dict:
        """Shapes of the parameters of the model described by ``kind`` and ``config``."""
        log_mel = jnp.zeros((1, self.config.n_frames, self.config.n_mels))
        if self.kind == "ssast_pretrain":
            init, inputs = SSAST(self.config).init, [log_mel, jnp.zeros((1, 1), jnp.int32)]
        else:
            init, inputs = Classifier(self.config, len(self.params["head"]["bias"])).init, [log_mel]
        return jax.eval_shape(init, jax.random.key(0), *inputs)["params"]


def read_weights(path: str | Path) -> Weights:
    """Read published weights.

    Args:
        path: ``.safetensors`` of `write_weights`; Hugging Face's folder, or its
            ``model.safetensors`` with ``config.json`` in the same folder; or a ``.pth`` of the
            authors of AST or SSAST, or the same as ``.safetensors``. The authors' files do not
            describe their geometry: only the published sizes are recognised. A published SSAST
                after fine-tuning has the names of an AST and is read as one; the encoders are the
                same.

    Raises:
        InputError: missing, damaged, not such a model, or of an unknown geometry.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise InputError(
            f"no weights at {path}; give a .safetensors or .pth file, or a folder with"
            " model.safetensors."
        )
    tensors, metadata = (
        _read_safetensors(path) if path.suffix == ".safetensors" else (torch_file.read(path), {})
    )
    if "kind" in metadata:
        found = _described(tensors, metadata, path)
    elif any(name.startswith("audio_spectrogram_transformer.") for name in tensors):
        found = _hugging_face(tensors, path.parent)
    else:
        found = _inferred(tensors, path)
    convert.require_same_shapes(found.params, found.shapes(), str(path))
    return found


def write_weights(path: str | Path, weights: Weights) -> Path:
    """Write weights under their published names: a ``.safetensors`` file with its description in
    the metadata.

    The kind ``hf_ast`` is written as a folder that ``transformers`` loads, with the same metadata
    for `read_weights`. It has only one LayerNorm epsilon, ``norm_epsilon``.

    Raises:
        InputError: parameters that do not match kind and geometry, a model with a stem, a folder
            that is not empty, or a model that ``transformers`` does not support.
    """
    path = Path(path)
    if weights.config.stem:
        raise InputError(
            "published formats have no names for convolutions before the patches; use this model's"
            " checkpoint instead."
        )
    tensors = convert.to_torch(weights.params, weights.kind, weights.config.patch_size)
    convert.require_same_shapes(weights.params, weights.shapes(), f"the parameters for {path}")
    metadata = {"kind": weights.kind} | {
        field.name: json.dumps(getattr(weights, field.name), default=asdict)
        for field in dataclasses.fields(weights)
        if field.name not in ("params", "kind")
    }
    if weights.kind == "hf_ast":
        return _write_folder(path, tensors, metadata, weights)
    if weights.kind == "ssast_pretrain":  # the published fine-tuning code needs them
        tensors |= {
            "p_input_fdim": np.array(weights.config.n_mels),
            "p_input_tdim": np.array(weights.config.n_frames),
        }
    if path.suffix != ".safetensors":
        raise InputError(f"{path} should end in .safetensors; change the name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    _save(path, tensors, metadata)
    return path


def _save(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write the file atomically. safetensors writes raw memory, so transposed views are copied
    first."""
    partial = path.with_name(path.name + ".partial")
    save_file(
        {name: np.asarray(value, order="C") for name, value in tensors.items()}, partial, metadata
    )
    partial.replace(path)


def _write_folder(folder: Path, tensors: dict, metadata: dict[str, str], weights: Weights) -> Path:
    if weights.config.patch_size[0] != weights.config.patch_size[1] or weights.front_end != KALDI:
        raise InputError(
            "Hugging Face's AST has square patches and Kaldi's front end at 16 kHz, unlike this"
            " model. Write it as kind 'ast'."
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not empty; choose another folder, or delete this one.")
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    write_json(partial / "config.json", _hf_config(weights))
    window = {"num_mel_bins": weights.config.n_mels, "max_length": weights.config.n_frames}
    level = {"mean": weights.statistics.mean_db / _NEPER, "std": weights.statistics.std_db / _NEPER}
    extractor = {
        "feature_extractor_type": "ASTFeatureExtractor",
        "sampling_rate": KALDI.sample_rate,
    }
    write_json(
        partial / "preprocessor_config.json", extractor | {"do_normalize": True} | window | level
    )
    _save(partial / "model.safetensors", tensors, {"format": "pt", **metadata})
    partial.replace(folder)
    return folder


def _hf_config(weights: Weights) -> dict:
    config = weights.config
    labels = {index: f"LABEL_{index}" for index in range(len(weights.params["head"]["bias"]))}
    return {
        "architectures": ["ASTForAudioClassification"],
        "model_type": _HF_TYPE,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.mlp_ratio * config.width,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "layer_norm_eps": weights.norm_epsilon,
        "patch_size": config.patch_size[0],
        "frequency_stride": config.stride[0],
        "time_stride": config.stride[1],
        "num_mel_bins": config.n_mels,
        "max_length": config.n_frames,
        "id2label": labels,
        "label2id": {label: index for index, label in labels.items()},
    }


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118  # not a dict
    except (SafetensorError, TypeError, OSError) as error:
        raise InputError(
            f"{path} is damaged or not a safetensors file ({error}); download it again."
        ) from error


def _described(tensors: dict, metadata: dict[str, str], path: Path) -> Weights:
    """Weights described by the metadata of `write_weights`."""
    try:
        known = {
            key: json.loads(value)
            for key, value in metadata.items()
            if key not in ("kind", "format")
        }
        known["config"] = from_json(ModelConfig, known["config"])
        known["front_end"] = FrontEnd(**known["front_end"])
        known["statistics"] = Statistics(**known["statistics"])
        return Weights(
            convert.from_torch(tensors, metadata["kind"]), kind=metadata["kind"], **known
        )
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise InputError(
            f"{path} has metadata that this version cannot read ({error!r}). Update the package."
        ) from error


def _hugging_face(tensors: dict, folder: Path) -> Weights:
    """Weights described by ``config.json`` and ``preprocessor_config.json``; without the latter,
    AudioSet's statistics."""
    theirs = _read_json(folder / "config.json")
    expected = {"model_type": _HF_TYPE, "hidden_act": "gelu", "qkv_bias": True}
    for key, value in expected.items():
        if theirs.get(key, value) != value:
            raise InputError(
                f"{folder}/config.json has {key} = {theirs[key]!r}; an AST needs {value!r}."
            )
    try:
        width = theirs["hidden_size"]
        config = _named(
            width,
            theirs["num_hidden_layers"],
            theirs["num_attention_heads"],
            mlp_ratio=_whole(theirs["intermediate_size"], width, "intermediate_size"),
            patch_size=(theirs["patch_size"],) * 2,
            stride=(theirs["frequency_stride"], theirs["time_stride"]),
            n_mels=theirs["num_mel_bins"],
            n_frames=theirs["max_length"],
        )
        epsilon = float(theirs["layer_norm_eps"])
        statistics = _hf_statistics(folder / "preprocessor_config.json")
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{folder} does not describe an AST: {error!r}. Download its JSON files again."
        ) from error
    params = convert.from_torch(tensors, "hf_ast")
    return Weights(
        params, config, "hf_ast", statistics=statistics, norm_epsilon=epsilon, head_epsilon=epsilon
    )


def _hf_statistics(path: Path) -> Statistics:
    if not path.exists():
        return AUDIOSET
    theirs = _read_json(path)
    if theirs.get("sampling_rate", KALDI.sample_rate) != KALDI.sample_rate:
        raise InputError(
            f"{path} has a sampling_rate of {theirs['sampling_rate']}; only {KALDI.sample_rate} is"
            " supported."
        )
    if not {"mean", "std"} <= theirs.keys():
        return AUDIOSET  # the extractor's own default
    return Statistics(theirs["mean"] * _NEPER, theirs["std"] * _NEPER, 0, 0.0, 0.0)


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{path} is missing; weights in Hugging Face's format need it. Download the complete"
            " folder."
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged ({error}); download it again.") from error
    if not isinstance(content, dict):
        raise InputError(
            f"{path} should hold a JSON object, but holds {content!r:.40}; download it again."
        )
    return content


def _inferred(tensors: dict, path: Path) -> Weights:
    """Weights whose geometry is inferred from names and shapes; published sizes only."""
    kind = "ssast_pretrain" if any("cpredlayer." in name for name in tensors) else "ast"
    named = convert.published_names(tensors, kind)
    if kind == "ast" and "mask_embed" in named:
        kind = "ssast_finetune"
    params = convert.from_torch(tensors, kind)
    kernel = named["v.patch_embed.proj.weight"]
    if kernel.ndim != 4:
        raise InputError(
            f"v.patch_embed.proj.weight in {path} is {kernel.shape}, but a convolution has four"
            " axes."
        )
    width, patch_size = kernel.shape[0], kernel.shape[2:]
    num_patches = named["v.pos_embed"].shape[1] - 2
    if kind == "ssast_pretrain" and {"p_input_fdim", "p_input_tdim"} <= named.keys():
        windows = [(patch_size, named["p_input_fdim"].item(), named["p_input_tdim"].item())]
    else:
        strides = (
            [(stride, stride) for stride in _STRIDES] if patch_size == (16, 16) else [patch_size]
        )
        windows = [(stride, _N_MELS, n_frames) for stride in strides for n_frames in _LENGTHS]
    for stride, n_mels, n_frames in windows:
        config = _named(
            width,
            convert.count_blocks(named),
            _whole(width, _HEAD_WIDTH, f"the width of {path}"),
            mlp_ratio=_whole(len(named["v.blocks.0.mlp.fc1.bias"]), width, f"mlp.fc1 of {path}"),
            patch_size=patch_size,
            stride=stride,
            n_mels=n_mels,
            n_frames=n_frames,
        )
        if config.num_patches == num_patches:
            return Weights(params, config, kind)
    raise InputError(
        f"{path} has {num_patches} positions for patches of {patch_size}, unlike every published"
        " model, so its stride and window are unknown. Give the file from before fine-tuning, or"
        " the model in Hugging Face's format."
    )


def _whole(number: int, divisor: int, what: str) -> int:
    if number % divisor or number < divisor:
        raise InputError(
            f"{what} is {number}, not a multiple of {divisor}; published models have no such size."
        )
    return number // divisor


def _named(width: int, depth: int, num_heads: int, **geometry) -> ModelConfig:
    """A model with the name of its size in `MODELS`, or ``custom``."""
    sizes = {(model.width, model.depth, model.num_heads): model.name for model in MODELS.values()}
    return ModelConfig(
        sizes.get((width, depth, num_heads), "custom"), width, depth, num_heads, **geometry
    )
