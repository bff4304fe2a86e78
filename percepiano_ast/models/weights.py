"""Published weights in and out: the authors' files of AST and SSAST, and Hugging Face's folders of
``ASTForAudioClassification``.

Published names are those of the authors' ``ast_models.py`` (on timm 0.4.5) or of Hugging Face.
Matrices are transposed there. The patch convolution (O, 1, f, t) is the matrix of the patch
embedding (f * t, O) here. Fused qkv rows are q | k | v in both. Blocks are separate there and
stacked here.
"""

import contextlib
import dataclasses
import json
import logging
import math
import pickletools
import re
import zipfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp  # also registers bfloat16 with NumPy
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open

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
from percepiano_ast.files import (
    MAX_DOWNLOAD,
    check_tensors,
    download,
    one_line,
    read_json,
    sha256_of,
    write_atomic,
    write_json,
    write_tensors,
)
from percepiano_ast.models.ast import Classifier, resize_pos_embed
from percepiano_ast.models.ssast import SSAST

KINDS = ("ssast_pretrain", "ssast_finetune", "ast", "hf_ast")
AUDIOSET_URL = "https://huggingface.co/MIT/ast-finetuned-audioset-10-10-0.4593/resolve/main"
AUDIOSET_FILES = ("config.json", "model.safetensors")

_HF_TYPE, _HF = "audio-spectrogram-transformer", "audio_spectrogram_transformer."
_LAYER = f"{_HF}encoder.layer.{{}}."
# Path here: the authors' name, Hugging Face's (in files; more than one if they are joined here);
# {} is the number of a block.
_TOKENS = {
    "encoder/cls_token": ("v.cls_token", f"{_HF}embeddings.cls_token"),
    "encoder/dist_token": ("v.dist_token", f"{_HF}embeddings.distillation_token"),
    "encoder/pos_embed": ("v.pos_embed", f"{_HF}embeddings.position_embeddings"),
    "encoder/mask_embed": ("mask_embed", "mask_embed"),
}
_QKV = " ".join(f"{_LAYER}attention.attention.{part}" for part in ("query", "key", "value"))
_ENCODER = {
    "encoder/patch_embed": ("v.patch_embed.proj", f"{_HF}embeddings.patch_embeddings.projection"),
    "encoder/norm": ("v.norm", f"{_HF}layernorm"),
    "encoder/blocks/norm1": ("v.blocks.{}.norm1", f"{_LAYER}layernorm_before"),
    "encoder/blocks/attention/qkv": ("v.blocks.{}.attn.qkv", _QKV),
    "encoder/blocks/attention/proj": ("v.blocks.{}.attn.proj", f"{_LAYER}attention.output.dense"),
    "encoder/blocks/norm2": ("v.blocks.{}.norm2", f"{_LAYER}layernorm_after"),
    "encoder/blocks/mlp/in": ("v.blocks.{}.mlp.fc1", f"{_LAYER}intermediate.dense"),
    "encoder/blocks/mlp/out": ("v.blocks.{}.mlp.fc2", f"{_LAYER}output.dense"),
}
_CLASSIFIER = {
    "norm": ("mlp_head.0", "classifier.layernorm"),
    "head": ("mlp_head.1", "classifier.dense"),
}
_PRETRAINING = {
    "discriminative/hidden": ("cpredlayer.0",),
    "discriminative/out": ("cpredlayer.2",),
    "generative/hidden": ("gpredlayer.0",),
    "generative/out": ("gpredlayer.2",),
}
# Hugging Face's names in memory since version 5 of transformers, and in files of all versions.
_HF_IN_MEMORY = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
# In checkpoints, but unused: DeiT's own heads, SSAST's record of its geometry, and after
# fine-tuning the heads of pre-training.
_UNUSED = ("v.head.", "v.head_dist.", "p_input_fdim", "p_input_tdim")
_UNUSED_IN_FINETUNING = ("cpredlayer.", "gpredlayer.")

# The authors' fine-tuned files do not describe their geometry. These numbers of positions and
# labels (0: any) identify a stride and a window. With the authors' strides, no other window has as
# many positions as AudioSet's; the others share theirs (12 x 12 is 9 x 16 and 8 x 18) and need the
# labels of Speech Commands and ESC-50.
_PUBLISHED = {
    (1212, 0): (10, 1024),
    (850, 0): (12, 1024),
    (657, 0): (14, 1024),
    (512, 0): (16, 1024),
    (144, 35): (10, 128),
    (600, 50): (10, 512),
}
_STRIDES, _N_MELS, _HEAD_WIDTH = (10, 12, 14, 16), 128, 64
_MOST_PARAMETERS = 2**28  # of a file; AST base has 87 million
_MOST_PICKLED = 2**20  # bytes of the description in a .pth file; published ones have 0.05 MB
# What the description of a state_dict refers to, as a pattern of "module name".
_PICKLED = r"collections OrderedDict|torch \w+Storage|torch\._utils _rebuild_(tensor_v2|parameter)"
_NEPER = 10 / math.log(10)  # dB of power; Hugging Face's statistics are in natural logarithms

_AGAIN = "Download it again."  # advice for damaged files

Geometry = tuple[tuple[int, int], int]  # stride (frequency, time), frames

logger = logging.getLogger(__name__)


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
        # A shape only: of another's file, it may be of any size.
        shape = (1, self.config.n_frames, self.config.n_mels)
        log_mel: Any = jax.ShapeDtypeStruct(shape, jnp.float32)
        if self.kind == "ssast_pretrain":
            init, inputs = SSAST(self.config).init, [log_mel, jnp.zeros((1, 1), jnp.int32)]
        else:
            init, inputs = Classifier(self.config, len(self.params["head"]["bias"])).init, [log_mel]
        return jax.eval_shape(init, jax.random.key(0), *inputs)["params"]


# --- Read -----------------------------------------------------------------------------------------


class _Stored(NamedTuple):
    """The contents of a file of weights: shapes and ``load(name)``, an array or float32 for
    floating types; ``metadata`` of a safetensors file."""

    shapes: dict[str, tuple[int, ...]]
    load: Callable[[str], np.ndarray]
    metadata: dict[str, str]


def read_weights(path: str | Path, geometry: Geometry | None = None) -> Weights:
    """Read published weights, without executing code from the file.

    Args:
        path: ``.safetensors`` of `write_weights`; Hugging Face's folder, or its
            ``model.safetensors`` beside its ``config.json``; or a ``.pth`` of the authors (needs
            PyTorch), or the same as ``.safetensors``. A published SSAST after fine-tuning is read
            as AST.
        geometry: ((frequency stride, time stride), frames) of the authors' fine-tuned files, which
            do not describe it; by default only published models are recognised.

    Raises:
        InputError: missing, damaged, not such a model, or of an unknown geometry.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "model.safetensors"
    if not path.is_file():
        raise InputError(
            f"no weights at {path}; give a .safetensors or .pth file, or Hugging Face's folder."
        )
    with _open_torch(path) if path.suffix != ".safetensors" else _open_safetensors(path) as stored:
        shapes = stored.shapes
        if (size := sum(map(math.prod, shapes.values()))) > _MOST_PARAMETERS:
            most = f"at most {_MOST_PARAMETERS:,} are read"
            raise InputError(f"{path} states {size:,} parameters, and {most}. Check the file.")
        try:
            if "kind" in stored.metadata:  # by `write_weights`
                kind, known = stored.metadata["kind"], _described(stored.metadata, path)
            elif any(name.startswith(_HF) for name in shapes):
                kind, known = "hf_ast", _hugging_face(path.parent)
            else:
                kind, known = _published(stored, path, geometry)
            _require_names(_plain(shapes), kind, str(path))
            # Before anything of the stated size is computed.
            [[table]] = _layout(1, kind)["encoder/pos_embed"]
            config, table_shape = known["config"], _plain(shapes)[table]
            if config.num_patches != table_shape[1] - 2:
                high, wide = config.grid
                raise InputError(
                    f"encoder/pos_embed is {table_shape} in {path}, {table_shape[1] - 2:,}"
                    f" positions, but {config.n_mels} mel bands and {config.n_frames:,} frames with"
                    f" stride {config.stride} give {high} x {wide} = {config.num_patches:,}. State"
                    " the geometry of these weights."
                )
            if config.depth > len(shapes) or config.stem:
                raise ValueError(f"it states {config.depth:,} blocks or a stem")
            if not known.get("statistics", AUDIOSET).valid:
                raise InputError(f"{path} states {known['statistics']}. Correct mean and std.")
            params = from_torch({name: stored.load(name) for name in shapes}, kind)
            found = Weights(params, kind=kind, **known)
            require_same_shapes(found.params, found.shapes(), str(path))
        except InputError:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise InputError(
                f"{path} does not hold weights as this version writes or reads them"
                f" ({one_line(error)}). Download it again."
            ) from error
    for name, leaf in flatten_dict(found.params, sep="/").items():
        if not np.isfinite(leaf).all():
            raise InputError(f"{name} in {path} has NaN or infinite values. Download it again.")
    return found


@contextlib.contextmanager
def _open_safetensors(path: Path) -> Iterator[_Stored]:
    signed = check_tensors(path, MAX_DOWNLOAD)
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            if "kind" in metadata and not signed:
                logger.warning(f"{path} has no checksum: an earlier version wrote it")
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # no dict
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            yield _Stored(shapes, file.get_tensor, metadata)
    except (SafetensorError, TypeError, OSError) as error:
        raise InputError(
            f"{path} is damaged or not a safetensors file ({one_line(error)}); download it again."
        ) from error


@contextlib.contextmanager
def _open_torch(path: Path) -> Iterator[_Stored]:
    """The tensors of a ``state_dict``. ``mmap`` also excludes the format of torch before 1.6.

    A member that expands, and what a description may allocate or repeat beyond the bytes of the
    file, is refused before PyTorch reads it.
    """
    try:
        import torch

        version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    except ImportError:
        version = (0,)
    if version < (2, 6):  # runs code of TorchScript archives, CVE-2025-32434
        raise InputError(
            f"{path} needs PyTorch 2.6 or newer; pip install torch, or give a .safetensors file."
        )
    try:
        if zipfile.is_zipfile(path):  # otherwise PyTorch says what it is
            with zipfile.ZipFile(path) as archive:
                for member in archive.infolist():
                    if member.compress_type != zipfile.ZIP_STORED:
                        raise ValueError(f"{member.filename:.60} is compressed")
                    if PurePosixPath(member.filename).name != "data.pkl":
                        continue
                    if member.file_size > _MOST_PICKLED:
                        raise ValueError(f"its description has {member.file_size:,} bytes")
                    for code, value, _ in pickletools.genops(archive.read(member)):
                        if code.name == "GLOBAL" and not re.fullmatch(_PICKLED, str(value)):
                            raise ValueError(f"GLOBAL {str(value).replace(' ', '.'):.80}")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        stated = sum(value.numel() * value.element_size() for value in content.values())
        if stated > path.stat().st_size:  # by strides of 0, or shared by several tensors
            raise ValueError(f"its tensors have {stated:,} bytes, more than the file")
        shapes = {str(name): tuple(value.shape) for name, value in content.items()}
    except Exception as error:  # any: the unpickler has no list of its errors
        text = str(error).rpartition("WeightsUnpickler error: ")[2]
        reason = re.findall(r"GLOBAL \S+|^.*", text)[-1]
        raise InputError(
            f"torch.load(weights_only=True) finds no state_dict in {path} ({reason:.200}); no code"
            " was executed. Download it again, or give a .safetensors file."
        ) from error

    def load(name: str) -> np.ndarray:
        value = content[name]
        return (value.float() if value.is_floating_point() else value).numpy()

    yield _Stored(shapes, load, {})


def _described(metadata: dict[str, str], path: Path) -> dict[str, Any]:
    """The fields of `Weights` in the metadata of `write_weights`."""
    schemas = {
        "config": ModelConfig,
        "front_end": FrontEnd,
        "statistics": LevelStats,
        "description": dict,
        "norm_epsilon": float,
        "head_epsilon": float,
    }
    known = {}
    for name in metadata.keys() - {"kind", "format", "sha256"}:
        where = f"{path} has metadata of another version: {name}"
        if name not in schemas:
            raise InputError(f"{where}. Update the package.")
        kind, text = schemas[name], metadata[name].encode()
        value = read_json(text, kind, name=where, advice="Update the package.")
        known[name] = from_json(kind, value) if dataclasses.is_dataclass(kind) else value
    return known


def _hugging_face(folder: Path) -> dict[str, Any]:
    """The fields of `Weights` in ``config.json`` and ``preprocessor_config.json``; without the
    latter, AudioSet's statistics."""
    sizes = (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
        *("patch_size", "frequency_stride", "time_stride", "num_mel_bins", "max_length"),
    )
    schema = dict.fromkeys(sizes, int) | {"layer_norm_eps": float}
    where = f"{folder} does not describe an AST: its config.json"
    theirs = read_json(folder / "config.json", schema, name=where, advice=_AGAIN)
    expected = {"model_type": _HF_TYPE, "hidden_act": "gelu", "qkv_bias": True}
    for key, value in expected.items():
        if theirs.get(key, value) != value:
            raise InputError(
                f"{folder}/config.json has {key} = {theirs[key]!r:.60}; an AST needs {value!r}."
            )
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
    statistics, window = AUDIOSET, folder / "preprocessor_config.json"
    level = read_json(window, advice=_AGAIN) if window.exists() else {}
    # Not its max_length: it pads windows to it, and models have the one of config.json.
    expected = {"sampling_rate": KALDI.sample_rate, "num_mel_bins": config.n_mels}
    for key, value in expected.items():
        if level.get(key, value) != value:
            raise InputError(f"{window} has {key} {level[key]!r:.60}, not {value}. Correct it.")
    if {"mean", "std"} <= level.keys():  # AudioSet's are the extractor's own default
        mean, std = float(level["mean"]), float(level["std"])
        statistics = LevelStats(mean * _NEPER, std * _NEPER, 0, 0.0, 0.0)
    epsilon = float(theirs["layer_norm_eps"])
    known = {"norm_epsilon": epsilon, "head_epsilon": epsilon}
    return {"config": config, "statistics": statistics} | known


def _published(
    stored: _Stored, path: Path, geometry: Geometry | None
) -> tuple[str, dict[str, Any]]:
    """Kind and fields of `Weights` of the authors' files, from names, shapes and ``geometry``."""
    shapes = _plain(stored.shapes)
    kind = "ast"
    if any(name.startswith("cpredlayer.") for name in shapes):
        kind = "ssast_pretrain"
    elif "mask_embed" in shapes:
        kind = "ssast_finetune"
    _require_names(shapes, kind, str(path))
    kernel = shapes["v.patch_embed.proj.weight"]
    if len(kernel) != 4:
        raise InputError(
            f"v.patch_embed.proj.weight in {path} is {kernel}; a convolution has four axes."
        )
    width, patch_size = kernel[0], kernel[2:]
    positions, n_mels = shapes["v.pos_embed"][1] - 2, _N_MELS
    sizes = [name for name in stored.shapes if re.search(r"p_input_[ft]dim$", name)]
    if kind == "ssast_pretrain" and len(sizes) == 2:  # of the window, without overlapping patches
        n_mels, n_frames = (int(stored.load(name)) for name in sorted(sizes))
        geometry = patch_size, n_frames
    elif geometry is None and patch_size == (16, 16):
        labels = shapes.get("mlp_head.1.bias", (0,))[0]
        found = _PUBLISHED.get((positions, labels)) or _PUBLISHED.get((positions, 0))
        geometry = found and ((found[0], found[0]), found[1])
    if geometry is None:
        raise InputError(
            f"{path} has {positions:,} positions for patches of {patch_size}, which are not those"
            f" of a published model: {_candidates(positions, patch_size)}. State its geometry:"
            " percepiano convert with --frames and --stride."
        )
    stride, n_frames = geometry
    config = _named(
        width,
        _count_blocks(shapes),
        _whole(width, _HEAD_WIDTH, f"the width of {path}"),
        mlp_ratio=_whole(shapes["v.blocks.0.mlp.fc1.bias"][0], width, f"mlp.fc1 of {path}"),
        patch_size=patch_size,
        stride=stride,
        n_mels=n_mels,
        n_frames=n_frames,
    )
    return kind, {"config": config}


def _candidates(positions: int, patch_size: tuple[int, int]) -> str:
    """The strides and lengths that have as many positions with `_N_MELS` bands."""
    square = patch_size == (16, 16)
    found = []
    for stride in _STRIDES if square else range(1, patch_size[1] + 1):
        high = (_N_MELS - patch_size[0]) // stride + 1
        if high > 0 and positions % high == 0 and positions:
            first = patch_size[1] + (positions // high - 1) * stride
            found.append(f"stride {stride} with {first:,} to {first + stride - 1:,} frames")
    return " or ".join(found) or f"no usual stride with {_N_MELS} mel bands has them"


def _whole(number: int, divisor: int, what: str) -> int:
    if divisor < 1 or number % divisor or number < divisor:
        raise InputError(f"{what} is {number}, not a multiple of {divisor} as in published models.")
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
            " checkpoint."
        )
    tensors = to_torch(weights.params, weights.kind, config.patch_size)
    require_same_shapes(weights.params, weights.shapes(), f"the parameters for {path}")
    metadata = {"kind": weights.kind} | {
        field.name: json.dumps(getattr(weights, field.name), default=asdict)
        for field in dataclasses.fields(weights)
        if field.name not in ("params", "kind")
    }
    if weights.kind != "hf_ast":
        if weights.kind == "ssast_pretrain":  # the published fine-tuning code needs them
            tensors["p_input_fdim"] = np.array(config.n_mels)
            tensors["p_input_tdim"] = np.array(config.n_frames)
        if path.suffix != ".safetensors":
            raise InputError(f"{path} should end in .safetensors; change the name.")
        write_tensors(path, tensors, metadata)
        return path

    # --- Hugging Face's folder
    if config.patch_size[0] != config.patch_size[1] or weights.front_end != KALDI:
        raise InputError(
            "Hugging Face's AST has square patches and Kaldi's front end. Write it as kind 'ast'."
        )
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} is not empty; choose another folder, or delete this one.")
    labels = {index: f"LABEL_{index}" for index in range(len(weights.params["head"]["bias"]))}
    window = {"num_mel_bins": config.n_mels, "max_length": config.n_frames}
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
        **window,
        "id2label": labels,
        "label2id": {label: index for index, label in labels.items()},
    }
    extractor = {
        "feature_extractor_type": "ASTFeatureExtractor",
        "sampling_rate": KALDI.sample_rate,
        "do_normalize": True,
        **window,
        "mean": weights.statistics.mean_db / _NEPER,
        "std": weights.statistics.std_db / _NEPER,
    }
    partial = path.with_name(path.name + ".partial")
    write_json(partial / "config.json", model)
    write_json(partial / "preprocessor_config.json", extractor)
    write_tensors(partial / "model.safetensors", tensors, {"format": "pt", **metadata})
    partial.replace(path)
    return path


# --- Names ----------------------------------------------------------------------------------------


def _layout(depth: int, kind: str) -> dict[str, list[list[str]]]:
    """Path here -> published names, for each block the names of all parts."""
    column = lookup(dict.fromkeys(KINDS, 0) | {"hf_ast": 1}, kind, "kind of weights")
    layout = {path: [[names[column]]] for path, names in _TOKENS.items()}
    heads = _PRETRAINING if kind == "ssast_pretrain" else _CLASSIFIER
    for path, names in (_ENCODER | heads).items():
        matrix = "scale" if path.rpartition("/")[2].startswith("norm") else "kernel"
        for here, there in ((matrix, "weight"), ("bias", "bias")):
            layout[f"{path}/{here}"] = [
                [f"{part.format(block)}.{there}" for part in names[column].split()]
                for block in range(depth if "/blocks/" in path else 1)
            ]
    return layout


def _count_blocks(names: Collection[str]) -> int:
    found = (re.match(r"(?:v\.blocks|.+\.layer)\.(\d{1,9})\.", name) for name in names)
    # A name of others may have any number.
    return min(1 + max((int(match[1]) for match in found if match), default=-1), len(names))


def _plain(tensors: dict[str, Any]) -> dict[str, Any]:
    """Weights, or their shapes, without the prefix of ``nn.DataParallel``, which published files
    have, and with the names of Hugging Face's files instead of those in memory."""
    if all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): value for name, value in tensors.items()}

    def in_files(match: re.Match) -> str:
        return f"{_HF}encoder.layer.{match[1]}.{_HF_IN_MEMORY.get(match[2], match[2])}."

    layer = re.compile(rf"{_HF}layers\.(\d+)\.(.+)\.(?=weight|bias)")
    return {layer.sub(in_files, name): value for name, value in tensors.items()}


def _require_names(names: Collection[str], kind: str, what: str) -> dict[str, list[list[str]]]:
    """The `_layout` of a kind; InputError for missing or unknown names in ``what``."""
    layout = _layout(max(_count_blocks(names), 1), kind)
    unused = _UNUSED + (_UNUSED_IN_FINETUNING if kind == "ssast_finetune" else ())
    known = {name for blocks in layout.values() for block in blocks for name in block}
    needed = known - (set() if kind == "ssast_pretrain" else {"mask_embed"})
    missing = sorted(needed - set(names))
    surplus = sorted(name for name in set(names) - known if not name.startswith(unused))
    if missing or surplus:
        raise InputError(
            f"{what} does not hold the weights of a model of the kind {kind}: missing"
            f" {missing[:3]}, unknown {surplus[:3]}. Give another file."
        )
    return layout


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
    tensors = _plain(tensors)
    layout = _require_names(tensors, kind, "this file")
    [[cls_token]] = layout["encoder/cls_token"]
    if kind != "ssast_pretrain":
        tensors = {"mask_embed": np.zeros_like(tensors[cls_token])} | tensors
    params = {}
    for path, blocks in layout.items():
        names = [name for block in blocks for name in block]
        with np.errstate(over="ignore"):  # infinite values are refused
            arrays = [np.asarray(tensors[name], np.float32) for name in names]
        for name, array in zip(names, arrays):
            if array.shape != arrays[0].shape:
                raise InputError(
                    f"{name} is {array.shape} and {names[0]} {arrays[0].shape}, but all blocks"
                    " must have equal shapes."
                )
        if (parts := len(blocks[0])) > 1:
            arrays = [np.concatenate(arrays[i : i + parts]) for i in range(0, len(arrays), parts)]
        if path.endswith("/kernel"):
            arrays = [a.reshape(len(a), -1).T if a.ndim > 1 else a for a in arrays]
        params[path] = np.stack(arrays) if "/blocks/" in path else arrays[0]
    return unflatten_dict(params, sep="/")


def to_torch(params: dict, kind: str, patch_size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Inverse of `from_torch`: published name -> float32 array, for ``hf_ast`` without
    ``mask_embed``; InputError for an unknown kind, or parameters of another model."""
    leaves = flatten_dict(params, sep="/")
    layout = _layout(len(leaves.get("encoder/blocks/norm1/scale", ())), kind)
    if leaves.keys() != layout.keys():
        missing = sorted(layout.keys() - leaves.keys())
        surplus = sorted(leaves.keys() - layout.keys())
        raise InputError(
            f"not the parameters of a published {kind} model: missing {missing[:3]}, unknown"
            f" {surplus[:3]}. Use models with decoder or heads as checkpoints of this package."
        )
    tensors: dict[str, np.ndarray] = {}
    for path, blocks in layout.items():
        leaf = np.asarray(leaves[path], np.float32)
        for parts, value in zip(blocks, leaf if "/blocks/" in path else [leaf]):
            # in C order, because safetensors writes raw memory
            value = np.ascontiguousarray(value.T if path.endswith("/kernel") else value)
            if path == "encoder/patch_embed/kernel":
                value = value.reshape(len(value), 1, *patch_size)
            tensors |= zip(parts, np.split(value, len(parts)))
    if kind == "hf_ast":
        del tensors["mask_embed"]
    return tensors


# --- Weights for another model --------------------------------------------------------------------


def require_same_shapes(params: dict, like: dict, what: str) -> None:
    """Compare the shapes of ``params``, read from ``what``, with those ``like`` of the model; the
    InputError names the first difference and both shapes."""
    found, wanted = (
        {path: tuple(leaf.shape) for path, leaf in flatten_dict(tree, sep="/").items()}
        for tree in (params, like)
    )
    for path in sorted(found.keys() | wanted.keys()):
        there, here = found.get(path, "missing"), wanted.get(path, "missing")
        if there != here:
            raise InputError(
                f"{path} is {there} in {what}, but {here} in the model. Choose the model of these"
                " weights (size, patches, mel bands)."
            )


def adapt_pos_embed(params: dict, from_config: ModelConfig, to_config: ModelConfig) -> dict:
    """Params whose ``encoder`` is resized to the window length or stride of another geometry (AST
    section 2.2); InputError for patches of another shape or another number of mel bands."""
    old, new = from_config.patch_size, to_config.patch_size
    # shapes alone do not show it: 128 x 2 and 16 x 16 patches have kernels of equal shape
    if old != new:
        raise InputError(
            f"the weights are for patches of {old} (frequency, time), but the model has patches of"
            f" {new}; choose the same."
        )
    table = params["encoder"]["pos_embed"]
    if from_config.n_mels != to_config.n_mels:
        shape = (1, 2 + to_config.num_patches, to_config.width)
        raise InputError(
            f"encoder/pos_embed is {table.shape} for {from_config.n_mels} mel bands in the weights,"
            f" {shape} for {to_config.n_mels} in the model. Choose the weights' number of bands."
        )
    if from_config.grid == to_config.grid:
        return params
    table = np.asarray(resize_pos_embed(table, from_config.grid, to_config.grid))
    return params | {"encoder": params["encoder"] | {"pos_embed": table}}


# --- Download -------------------------------------------------------------------------------------


def fetch_audioset(folder: str | Path, url: str = AUDIOSET_URL) -> Path:
    """Download the AST fine-tuned on AudioSet (Gong, Chung and Glass 2021, BSD-3-Clause) in Hugging
    Face's format into ``folder``; later calls only verify the files.

    It is AST base with stride 10, 1,024 frames of Kaldi's front end, 527 labels, mAP 0.459.

    Raises:
        InputError: the server does not respond, or the file does not match the server's checksum.
    """
    folder = Path(folder)
    sums = folder / "SHA256SUMS"  # in sha256sum's format
    text = sums.read_text(errors="replace") if sums.is_file() else ""
    pairs = [line.split("  ") for line in text.splitlines()]
    if any(len(pair) != 2 for pair in pairs):
        raise InputError(f"{sums} is damaged. Delete it and run again.")
    known = {name: digest for digest, name in pairs}
    for name in AUDIOSET_FILES:
        path = folder / name
        if path.is_file() and name in known:
            if sha256_of(path) == known[name]:
                logger.info(f"{path} is complete")
                continue
            logger.warning(f"{path} does not match its checksum; downloading it again")
        logger.info(f"downloading {url}/{name}")
        known[name] = download(f"{url}/{name}", path)
        write_atomic(sums, "".join(f"{digest}  {file}\n" for file, digest in known.items()))
    return folder
