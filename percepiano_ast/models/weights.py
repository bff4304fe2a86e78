"""Published weights in and out: the authors' files of AST and SSAST, and Hugging Face's folders of
``ASTForAudioClassification``.

Published names are those of the authors' ``ast_models.py`` (on timm 0.4.5) or of Hugging Face.
Matrices are transposed there. The patch convolution (O, 1, f, t) is the matrix of the patch
embedding (f * t, O) here. Fused qkv rows are q | k | v in both. Blocks are separate there and
stacked here.
"""

import dataclasses
import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp  # also registers bfloat16 with NumPy
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from percepiano_ast.config import (
    AUDIOSET,
    KALDI,
    MODELS,
    FrontEnd,
    LevelStats,
    ModelConfig,
    from_json,
    lookup,
)
from percepiano_ast.errors import InputError
from percepiano_ast.files import atomic, download, sha256_of, write_atomic, write_json
from percepiano_ast.models import torch_file
from percepiano_ast.models.ast import Classifier, resize_pos_embed
from percepiano_ast.models.ssast import SSAST

KINDS = ("ssast_pretrain", "ssast_finetune", "ast", "hf_ast")
AUDIOSET_URL = "https://huggingface.co/MIT/ast-finetuned-audioset-10-10-0.4593/resolve/main"
AUDIOSET_FILES = ("config.json", "model.safetensors")

# Path here: published name, of the modules of one block and of the heads.
_BLOCK = {
    "norm1": "norm1",
    "attention/qkv": "attn.qkv",
    "attention/proj": "attn.proj",
    "norm2": "norm2",
    "mlp/in": "mlp.fc1",
    "mlp/out": "mlp.fc2",
}
_CLASSIFIER = {"norm": "mlp_head.0", "head": "mlp_head.1"}
_PRETRAINING = {
    "discriminative/hidden": "cpredlayer.0",
    "discriminative/out": "cpredlayer.2",
    "generative/hidden": "gpredlayer.0",
    "generative/out": "gpredlayer.2",
}
# In checkpoints, but unused: DeiT's own heads, SSAST's record of its geometry, and after
# fine-tuning the heads of pre-training.
_UNUSED = ("v.head.", "v.head_dist.", "p_input_fdim", "p_input_tdim")
_UNUSED_IN_FINETUNING = ("cpredlayer.", "gpredlayer.")
_PARALLEL = "module."  # prefix of all names saved by nn.DataParallel, as in the published files

_HF_TYPE = "audio-spectrogram-transformer"
_HF_PREFIX = "audio_spectrogram_transformer."
_HF_NAMES = {
    f"{_HF_PREFIX}embeddings.cls_token": "v.cls_token",
    f"{_HF_PREFIX}embeddings.distillation_token": "v.dist_token",
    f"{_HF_PREFIX}embeddings.position_embeddings": "v.pos_embed",
}
_HF_MODULES = {
    f"{_HF_PREFIX}embeddings.patch_embeddings.projection": "v.patch_embed.proj",
    f"{_HF_PREFIX}layernorm": "v.norm",
    "classifier.layernorm": "mlp_head.0",
    "classifier.dense": "mlp_head.1",
}
# Names in files of every version of transformers; below, those in memory since version 5.
_HF_BLOCK = {
    "layernorm_before": "norm1",
    "attention.attention.query": "attn.query",
    "attention.attention.key": "attn.key",
    "attention.attention.value": "attn.value",
    "attention.output.dense": "attn.proj",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
_HF_BLOCK_IN_MEMORY = {
    "attention.q_proj": "attn.query",
    "attention.k_proj": "attn.key",
    "attention.v_proj": "attn.value",
    "attention.o_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_HF_LAYER = re.compile(
    rf"{re.escape(_HF_PREFIX)}(?:encoder\.layer|layers)\.(\d+)\.(.+)\.(weight|bias)"
)
_QKV = ("query", "key", "value")

# Published models (AudioSet, ESC-50, Speech Commands); the number of patches identifies each.
_STRIDES, _LENGTHS, _N_MELS, _HEAD_WIDTH = (10, 12, 14, 16), (1024, 512, 128), 128, 64
_NEPER = 10 / math.log(10)  # dB of power; Hugging Face's statistics are in natural logarithms


@dataclass(frozen=True)
class Weights:
    """A published model, or a model of this package in a published form.

    Attributes:
        params: float32; of `ssast.SSAST` for the kind ``ssast_pretrain``, else of `ast.Classifier`.
        config: geometry, including that of the position table.
        kind: one of `KINDS`.
        front_end, statistics: computation and normalisation of its spectrograms.
        description: such as data and licence.
        norm_epsilon, head_epsilon: of the LayerNorms in the encoder and in the classifier's head.
    """

    params: dict
    config: ModelConfig
    kind: str
    front_end: FrontEnd = KALDI
    statistics: LevelStats = AUDIOSET
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


# --- Read -----------------------------------------------------------------------------------------


def read_weights(path: str | Path) -> Weights:
    """Read published weights, without executing code from the file.

    Args:
        path: ``.safetensors`` of `write_weights`; Hugging Face's folder, or its
            ``model.safetensors`` beside its ``config.json``; or a ``.pth`` of the authors, or the
            same as ``.safetensors``, which does not describe its geometry: only the published sizes
            are recognised. A published SSAST after fine-tuning is read as an AST.

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
    metadata: dict[str, str] = {}
    if path.suffix != ".safetensors":
        tensors = torch_file.read(path)
    else:
        try:
            with safe_open(path, framework="np") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
                metadata = file.metadata() or {}
        except (SafetensorError, TypeError, OSError) as error:
            raise InputError(
                f"{path} is damaged or not a safetensors file ({error}); download it again."
            ) from error
    if "kind" in metadata:
        found = _described(tensors, metadata, path)
    elif any(name.startswith(_HF_PREFIX) for name in tensors):
        found = _hugging_face(tensors, path.parent)
    else:
        found = _inferred(tensors, path)
    require_same_shapes(found.params, found.shapes(), str(path))
    return found


def _described(tensors: dict, metadata: dict[str, str], path: Path) -> Weights:
    """Weights described by the metadata of `write_weights`."""
    try:
        kind = metadata["kind"]
        known = {k: json.loads(v) for k, v in metadata.items() if k not in ("kind", "format")}
        known["config"] = from_json(ModelConfig, known["config"])
        known["front_end"] = FrontEnd(**known["front_end"])
        known["statistics"] = LevelStats(**known["statistics"])
        return Weights(from_torch(tensors, kind), kind=kind, **known)
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
    statistics, window = AUDIOSET, folder / "preprocessor_config.json"
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
        level = _read_json(window) if window.exists() else {}
        if level.get("sampling_rate", KALDI.sample_rate) != KALDI.sample_rate:
            raise InputError(
                f"{window} has a sampling_rate of {level['sampling_rate']}; only"
                f" {KALDI.sample_rate} is supported."
            )
        if {"mean", "std"} <= level.keys():  # AudioSet's are the extractor's own default
            statistics = LevelStats(level["mean"] * _NEPER, level["std"] * _NEPER, 0, 0.0, 0.0)
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{folder} does not describe an AST: {error!r}. Download its JSON files again."
        ) from error
    params = from_torch(tensors, "hf_ast")
    return Weights(
        params, config, "hf_ast", statistics=statistics, norm_epsilon=epsilon, head_epsilon=epsilon
    )


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
    named = _published_names(tensors, kind)
    if kind == "ast" and "mask_embed" in named:
        kind = "ssast_finetune"
    params = from_torch(tensors, kind)
    kernel = named["v.patch_embed.proj.weight"]
    if kernel.ndim != 4:
        raise InputError(
            f"v.patch_embed.proj.weight in {path} is {kernel.shape}, but a convolution has four"
            " axes."
        )
    width, patch_size = len(kernel), kernel.shape[2:]
    num_patches = named["v.pos_embed"].shape[1] - 2
    if kind == "ssast_pretrain" and {"p_input_fdim", "p_input_tdim"} <= named.keys():
        windows = [(patch_size, named["p_input_fdim"].item(), named["p_input_tdim"].item())]
    else:
        strides = [(side, side) for side in _STRIDES] if patch_size == (16, 16) else [patch_size]
        windows = [(stride, _N_MELS, n_frames) for stride in strides for n_frames in _LENGTHS]
    for stride, n_mels, n_frames in windows:
        config = _named(
            width,
            _count_blocks(named),
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
    name = sizes.get((width, depth, num_heads), "custom")
    return ModelConfig(name, width, depth, num_heads, **geometry)


# --- Write ----------------------------------------------------------------------------------------


def write_weights(path: str | Path, weights: Weights) -> Path:
    """Write weights under their published names: a ``.safetensors`` file with its description in
    the metadata.

    The kind ``hf_ast`` is written as a folder that ``transformers`` loads, with the same metadata
    for `read_weights`. It has only one LayerNorm epsilon, ``norm_epsilon``.

    Raises:
        InputError: parameters that do not match kind and geometry, a model with a stem, a folder
            that is not empty, or a model that ``transformers`` does not support.
    """
    path, config = Path(path), weights.config
    if config.stem:
        raise InputError(
            "published formats have no names for convolutions before the patches; use this model's"
            " checkpoint instead."
        )
    tensors = to_torch(weights.params, weights.kind, config.patch_size)
    require_same_shapes(weights.params, weights.shapes(), f"the parameters for {path}")
    metadata = {"kind": weights.kind} | {
        field.name: json.dumps(getattr(weights, field.name), default=asdict)
        for field in dataclasses.fields(weights)
        if field.name not in ("params", "kind")
    }
    if weights.kind == "hf_ast":
        return _write_folder(path, tensors, metadata, weights)
    if weights.kind == "ssast_pretrain":  # the published fine-tuning code needs them
        tensors["p_input_fdim"] = np.array(config.n_mels)
        tensors["p_input_tdim"] = np.array(config.n_frames)
    if path.suffix != ".safetensors":
        raise InputError(f"{path} should end in .safetensors; change the name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as partial:
        _save(partial, tensors, metadata)
    return path


def _save(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    # safetensors writes raw memory, so transposed views are copied first
    contiguous = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    save_file(contiguous, path, metadata)


def _write_folder(folder: Path, tensors: dict, metadata: dict[str, str], weights: Weights) -> Path:
    config, statistics = weights.config, weights.statistics
    if config.patch_size[0] != config.patch_size[1] or weights.front_end != KALDI:
        raise InputError(
            "Hugging Face's AST has square patches and Kaldi's front end at 16 kHz, unlike this"
            " model. Write it as kind 'ast'."
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not empty; choose another folder, or delete this one.")
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    labels = {index: f"LABEL_{index}" for index in range(len(weights.params["head"]["bias"]))}
    model = {
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
    extractor = {
        "feature_extractor_type": "ASTFeatureExtractor",
        "sampling_rate": KALDI.sample_rate,
        "do_normalize": True,
        "num_mel_bins": config.n_mels,
        "max_length": config.n_frames,
        "mean": statistics.mean_db / _NEPER,
        "std": statistics.std_db / _NEPER,
    }
    write_json(partial / "config.json", model)
    write_json(partial / "preprocessor_config.json", extractor)
    _save(partial / "model.safetensors", tensors, {"format": "pt", **metadata})
    partial.replace(folder)
    return folder


# --- Names ----------------------------------------------------------------------------------------


def _layout(depth: int, kind: str) -> dict[str, list[str]]:
    """Path here: published names of every parameter, one per block if it is stacked."""
    layout = {f"encoder/{name}": [f"v.{name}"] for name in ("cls_token", "dist_token", "pos_embed")}
    layout["encoder/mask_embed"] = ["mask_embed"]
    modules = {"encoder/patch_embed": ["v.patch_embed.proj"], "encoder/norm": ["v.norm"]}
    for path, name in _BLOCK.items():
        modules[f"encoder/blocks/{path}"] = [f"v.blocks.{n}.{name}" for n in range(depth)]
    heads = _PRETRAINING if kind == "ssast_pretrain" else _CLASSIFIER
    modules |= {path: [name] for path, name in heads.items()}
    for path, names in modules.items():
        matrix = "scale" if path.rpartition("/")[2].startswith("norm") else "kernel"
        layout[f"{path}/{matrix}"] = [f"{name}.weight" for name in names]
        layout[f"{path}/bias"] = [f"{name}.bias" for name in names]
    return layout


def _count_blocks(names) -> int:
    found = (re.match(r"v\.blocks\.(\d+)\.", name) for name in names)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def _published_names(tensors: dict[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    """Stored weights of ``kind`` under the authors' names, with Hugging Face's query, key and value
    joined; unknown names do not change."""
    if all(name.startswith(_PARALLEL) for name in tensors):
        tensors = {name.removeprefix(_PARALLEL): value for name, value in tensors.items()}
    if kind != "hf_ast":
        return tensors
    named = {}
    for name, value in tensors.items():
        module, _, leaf = name.rpartition(".")
        layer = _HF_LAYER.fullmatch(name)
        if name in _HF_NAMES or module in _HF_MODULES:
            name = _HF_NAMES.get(name) or f"{_HF_MODULES[module]}.{leaf}"
        elif layer and (ours := (_HF_BLOCK | _HF_BLOCK_IN_MEMORY).get(layer[2])):
            name = f"v.blocks.{layer[1]}.{ours}.{layer[3]}"
        named[name] = value
    for index in range(_count_blocks(named)):
        for leaf in ("weight", "bias"):
            parts = [f"v.blocks.{index}.attn.{part}.{leaf}" for part in _QKV]
            shapes = {named[part].shape if part in named else None for part in parts}
            if len(shapes) == 1 and None not in shapes:
                joined = np.concatenate([named.pop(part) for part in parts])
                named[f"v.blocks.{index}.attn.qkv.{leaf}"] = joined
    return named


def from_torch(tensors: dict[str, np.ndarray], kind: str) -> dict:
    """Published weights -> ``params``, float32.

    Args:
        tensors: published name -> array, of any floating type.
        kind: ``ssast_pretrain`` -> params of `ssast.SSAST`; ``ssast_finetune``, ``ast`` and
            ``hf_ast`` -> params of `ast.Classifier`. ``mask_embed`` is zero if the weights have
            none (any kind but ``ssast_pretrain``). The position table keeps its grid; resize it
            with `adapt_pos_embed`.

    Raises:
        InputError: unknown kind, a missing or unknown weight, or blocks with different shapes.
    """
    lookup(dict.fromkeys(KINDS), kind, "kind of weights")
    tensors = _published_names(tensors, kind)
    if kind != "ssast_pretrain" and "v.cls_token" in tensors:
        tensors = {"mask_embed": np.zeros_like(tensors["v.cls_token"])} | tensors
    layout = _layout(max(_count_blocks(tensors), 1), kind)
    unused = _UNUSED + (_UNUSED_IN_FINETUNING if kind == "ssast_finetune" else ())
    known = {name for names in layout.values() for name in names}
    missing = sorted(known - set(tensors))
    surplus = sorted(name for name in set(tensors) - known if not name.startswith(unused))
    if missing or surplus:
        raise InputError(
            f"not the weights of a {kind} model: missing {missing[:3]}, unknown {surplus[:3]}."
        )
    params = {}
    for path, names in layout.items():
        values = [np.asarray(tensors[name], np.float32) for name in names]
        if path.endswith("/kernel"):
            values = [v.reshape(len(v), -1).T if v.ndim > 1 else v for v in values]
        for name, value in zip(names, values):
            if value.shape != values[0].shape:
                raise InputError(
                    f"{name} is {value.shape} and {names[0]} {values[0].shape}, but all blocks"
                    " must have equal shapes."
                )
        params[path] = np.stack(values) if "/blocks/" in path else values[0]
    return unflatten_dict(params, sep="/")


def to_torch(params: dict, kind: str, patch_size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Inverse of `from_torch`: published name -> float32 array, for ``hf_ast`` with Hugging Face's
    names and without ``mask_embed``, which published models without masking ignore with
    ``strict=False``.

    Raises:
        InputError: unknown kind, or parameters of another model, for example with a decoder.
    """
    lookup(dict.fromkeys(KINDS), kind, "kind of weights")
    leaves = flatten_dict(params, sep="/")
    depth = len(leaves.get("encoder/blocks/norm1/scale", ()))
    layout = _layout(depth, kind)
    if leaves.keys() != layout.keys():
        missing = sorted(layout.keys() - leaves.keys())
        surplus = sorted(leaves.keys() - layout.keys())
        raise InputError(
            f"not the parameters of a published {kind} model: missing {missing[:3]}, unknown"
            f" {surplus[:3]}. Save models with a decoder or rating heads as checkpoints of this"
            " package."
        )
    tensors = {}
    for path, names in layout.items():
        value = np.asarray(leaves[path], np.float32)
        for name, one in zip(names, value if "/blocks/" in path else [value]):
            tensors[name] = one.T if path.endswith("/kernel") else one
    convolution = tensors["v.patch_embed.proj.weight"]
    tensors["v.patch_embed.proj.weight"] = convolution.reshape(len(convolution), 1, *patch_size)
    if kind != "hf_ast":
        return tensors
    singles = {ours: theirs for theirs, ours in _HF_NAMES.items()}
    modules = {ours: theirs for theirs, ours in _HF_MODULES.items()}
    for index in range(depth):
        block, theirs_block = f"v.blocks.{index}.", f"{_HF_PREFIX}encoder.layer.{index}."
        modules |= {block + ours: theirs_block + theirs for theirs, ours in _HF_BLOCK.items()}
        for leaf in ("weight", "bias"):
            parts = np.split(tensors.pop(f"{block}attn.qkv.{leaf}"), 3)
            tensors |= {f"{block}attn.{part}.{leaf}": one for part, one in zip(_QKV, parts)}
    del tensors["mask_embed"]
    for name in list(tensors):
        module, _, leaf = name.rpartition(".")
        tensors[singles.get(name) or f"{modules[module]}.{leaf}"] = tensors.pop(name)
    return tensors


# --- Weights for another model --------------------------------------------------------------------


def require_same_shapes(params: dict, like: dict, what: str) -> None:
    """Compare the shapes of ``params``, read from ``what``, with the parameters (or shapes)
    ``like`` of the model; the InputError names the first difference and both shapes."""
    found, wanted = (
        {path: tuple(leaf.shape) for path, leaf in flatten_dict(tree, sep="/").items()}
        for tree in (params, like)
    )
    for path in sorted(found.keys() | wanted.keys()):
        there, here = found.get(path, "missing"), wanted.get(path, "missing")
        if there != here:
            raise InputError(
                f"{path} is {there} in {what}, but {here} in the model. Choose the model of these"
                " weights (size, patches, mel bands), or weights of this model."
            )


def adapt_pos_embed(params: dict, from_config: ModelConfig, to_config: ModelConfig) -> dict:
    """Params whose ``encoder`` is resized to the window length or stride of another geometry (AST
    section 2.2); InputError for patches of another shape or another number of mel bands."""
    old, new = from_config.patch_size, to_config.patch_size
    # shapes alone do not show it: 128 x 2 and 16 x 16 patches have kernels of equal shape
    if old != new:
        raise InputError(
            f"the weights are for patches of {old} (frequency, time), but the model has patches of"
            f" {new}; choose weights and a model with the same patches."
        )
    table = params["encoder"]["pos_embed"]
    if from_config.n_mels != to_config.n_mels:
        shape = (1, 2 + to_config.num_patches, to_config.width)
        raise InputError(
            f"encoder/pos_embed is {table.shape} for {from_config.n_mels} mel bands in the weights,"
            f" {shape} for {to_config.n_mels} in the model. Choose a front end with the number of"
            " bands of the weights."
        )
    if from_config.grid == to_config.grid:
        return params
    table = np.asarray(resize_pos_embed(table, from_config.grid, to_config.grid))
    return params | {"encoder": params["encoder"] | {"pos_embed": table}}


# --- Download -------------------------------------------------------------------------------------


def fetch_audioset(
    folder: str | Path, url: str = AUDIOSET_URL, *, log: Callable[[str], None] = print
) -> Path:
    """Download the AST fine-tuned on AudioSet (Gong, Chung and Glass 2021, BSD-3-Clause) in Hugging
    Face's format into ``folder``; later calls only verify the files.

    It is AST base with stride 10, 1,024 frames of Kaldi's front end, 527 labels, mAP 0.459.

    Raises:
        InputError: the server does not respond, or the file does not match the server's checksum.
    """
    folder = Path(folder)
    sums = folder / "SHA256SUMS"  # in sha256sum's format
    pairs = [line.split("  ") for line in sums.read_text().splitlines()] if sums.is_file() else []
    if any(len(pair) != 2 for pair in pairs):
        raise InputError(
            f"{sums} is damaged. Delete it and run again: the weights are downloaded and verified"
            " again."
        )
    known = {name: digest for digest, name in pairs}
    for name in AUDIOSET_FILES:
        path = folder / name
        if path.is_file() and name in known:
            if sha256_of(path) == known[name]:
                log(f"{path} is complete")
                continue
            log(f"{path} does not match its checksum; downloading it again")
        log(f"downloading {url}/{name}")
        known[name] = download(f"{url}/{name}", path)
        write_atomic(sums, "".join(f"{digest}  {file}\n" for file, digest in known.items()))
    return folder
