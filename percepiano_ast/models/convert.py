"""Conversion of published PyTorch weights to this package's parameters and back, as dictionaries of
arrays (files: `weights`).

Names are those of the published AST and SSAST code (``ast_models.py`` on timm 0.4.5) and of Hugging
Face's ``ASTForAudioClassification``. Matrices are transposed. The patch convolution (O, 1, f, t)
becomes the matrix of the patch embedding (f * t, O). Fused qkv rows are q | k | v in both formats.
Blocks are separate in PyTorch and stacked here.
"""

import re
from typing import Any

import jax
import numpy as np

from percepiano_ast.config import ModelConfig
from percepiano_ast.errors import InputError
from percepiano_ast.models.ast import resize_positions

KINDS = ("ssast_pretrain", "ssast_finetune", "ast", "hf_ast")

# (published name, path here) within one block; each has a weight and a bias.
_BLOCK = (
    ("norm1", ("norm1",)),
    ("attn.qkv", ("attention", "qkv")),
    ("attn.proj", ("attention", "proj")),
    ("norm2", ("norm2",)),
    ("mlp.fc1", ("mlp", "in")),
    ("mlp.fc2", ("mlp", "out")),
)
_HEADS = {
    "ssast_pretrain": (
        ("cpredlayer.0", ("discriminative", "hidden")),
        ("cpredlayer.2", ("discriminative", "out")),
        ("gpredlayer.0", ("generative", "hidden")),
        ("gpredlayer.2", ("generative", "out")),
    ),
    "classifier": (("mlp_head.0", ("norm",)), ("mlp_head.1", ("head",))),
}
# In checkpoints, but unused: DeiT's own heads, SSAST's record of its geometry, and after
# fine-tuning the heads of pre-training.
_UNUSED = ("v.head.", "v.head_dist.", "p_input_fdim", "p_input_tdim")
_UNUSED_IN_FINETUNING = ("cpredlayer.", "gpredlayer.")
_PARALLEL = "module."  # prefix of all names saved by nn.DataParallel, as in the published files

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
# Names in files, for all versions of transformers; below, those of a model in memory since version
# 5.
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

_Names = tuple[str, ...]
_Layout = list[tuple[_Names, _Names]]


def _layout(depth: int, kind: str) -> _Layout:
    """The published names of every parameter (one per block if it is stacked), and its path
    here."""
    modules: _Layout = [
        (("v.patch_embed.proj",), ("encoder", "patch_embed")),
        (("v.norm",), ("encoder", "norm")),
    ]
    for name, path in _BLOCK:
        names = tuple(f"v.blocks.{index}.{name}" for index in range(depth))
        modules.append((names, ("encoder", "blocks", *path)))
    heads = _HEADS["ssast_pretrain" if kind == "ssast_pretrain" else "classifier"]
    modules += [((name,), path) for name, path in heads]
    layout: _Layout = [
        ((f"v.{name}",), ("encoder", name)) for name in ("cls_token", "dist_token", "pos_embed")
    ]
    layout.append((("mask_embed",), ("encoder", "mask_embed")))
    for names, place in modules:
        matrix = "scale" if place[-1].startswith("norm") else "kernel"
        layout.append((tuple(f"{name}.weight" for name in names), (*place, matrix)))
        layout.append((tuple(f"{name}.bias" for name in names), (*place, "bias")))
    return layout


def count_blocks(names) -> int:
    """Number of transformer blocks in published ``names``."""
    found = (re.match(r"v\.blocks\.(\d+)\.", name) for name in names)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def published_names(weights: dict[str, np.ndarray], kind: str) -> dict[str, np.ndarray]:
    """Stored weights of ``kind``, renamed to the published names of AST and SSAST.

    The prefix of ``nn.DataParallel`` is removed. Hugging Face's query, key and value are joined
    into one matrix. Unknown names do not change.
    """
    if all(name.startswith(_PARALLEL) for name in weights):
        weights = {name.removeprefix(_PARALLEL): value for name, value in weights.items()}
    return _from_hugging_face(weights) if kind == "hf_ast" else weights


def from_torch(weights: dict[str, np.ndarray], kind: str) -> dict:
    """Published weights -> ``params``, float32.

    Args:
        weights: torch name -> array, of any floating type.
        kind: ``ssast_pretrain`` -> params of `ssast.SSAST`; ``ssast_finetune``, ``ast`` and
            ``hf_ast`` -> params of `ast.Classifier`. ``mask_embed`` is zero if the weights have
            none (any kind but ``ssast_pretrain``). The position table keeps its grid; resize it
            with `fit_positions`.

    Raises:
        InputError: unknown kind, a missing or unknown weight, or blocks with different shapes.
    """
    if kind not in KINDS:
        raise InputError(f"unknown kind of weights {kind!r}. Choose one of: {', '.join(KINDS)}.")
    weights = published_names(weights, kind)
    if kind != "ssast_pretrain" and "v.cls_token" in weights:
        weights = {"mask_embed": np.zeros_like(weights["v.cls_token"])} | weights
    layout = _layout(max(count_blocks(weights), 1), kind)
    unused = _UNUSED + (_UNUSED_IN_FINETUNING if kind == "ssast_finetune" else ())
    known = {name for names, _ in layout for name in names}
    missing = sorted(known - set(weights))
    surplus = sorted(name for name in set(weights) - known if not name.startswith(unused))
    if missing or surplus:
        raise InputError(
            f"not the weights of a {kind} model: missing {missing[:3]}, unknown {surplus[:3]}."
        )
    params: dict = {}
    for names, path in layout:
        node = params
        for part in path[:-1]:
            node = node.setdefault(part, {})
        values = [_to_leaf(weights[name], path[-1]) for name in names]
        node[path[-1]] = _stack(names, values) if "blocks" in path else values[0]
    return params


def _to_leaf(value: np.ndarray, leaf: str) -> np.ndarray:
    value = np.asarray(value, np.float32)
    return value.reshape(len(value), -1).T if leaf == "kernel" and value.ndim > 1 else value


def _stack(names: tuple[str, ...], values: list[np.ndarray]) -> np.ndarray:
    for name, value in zip(names, values):
        if value.shape != values[0].shape:
            raise InputError(
                f"{name} is {value.shape} and {names[0]} {values[0].shape}, but all blocks must"
                " have equal shapes."
            )
    return np.stack(values)


def to_torch(params: dict, kind: str, patch_size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Inverse of `from_torch`: torch name -> float32 array, for ``hf_ast`` with Hugging Face's
    names.

    ``mask_embed`` is written for every kind but ``hf_ast``. Published models without masking ignore
    it with ``strict=False``, which DeiT's unused heads require in any case.

    Raises:
        InputError: unknown kind, or parameters of another model, for example with a decoder, which
            no published model has.
    """
    if kind not in KINDS:
        raise InputError(f"unknown kind of weights {kind!r}. Choose one of: {', '.join(KINDS)}.")
    leaves = _leaves(params)
    depth = len(leaves.get("encoder/blocks/norm1/scale", ()))
    layout = {"/".join(path): names for names, path in _layout(depth, kind)}
    if leaves.keys() != layout.keys():
        missing, surplus = (
            sorted(layout.keys() - leaves.keys()),
            sorted(leaves.keys() - layout.keys()),
        )
        raise InputError(
            f"not the parameters of a published {kind} model: missing {missing[:3]}, unknown"
            f" {surplus[:3]}. Save models with a decoder or rating heads as checkpoints of this"
            " package."
        )
    weights = {}
    for path, names in layout.items():
        value = np.asarray(leaves[path], np.float32)
        for name, one in zip(names, value if "/blocks/" in path else [value]):
            weights[name] = one.T if path.endswith("/kernel") else one
    convolution = weights["v.patch_embed.proj.weight"]
    weights["v.patch_embed.proj.weight"] = convolution.reshape(len(convolution), 1, *patch_size)
    return _to_hugging_face(weights) if kind == "hf_ast" else weights


def _from_hugging_face(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    renamed = {_from_hf_name(name): value for name, value in weights.items()}
    for index in range(count_blocks(renamed)):
        for leaf in ("weight", "bias"):
            parts = [f"v.blocks.{index}.attn.{part}.{leaf}" for part in _QKV]
            shapes = {renamed[part].shape if part in renamed else None for part in parts}
            if len(shapes) == 1 and None not in shapes:
                renamed[f"v.blocks.{index}.attn.qkv.{leaf}"] = np.concatenate(
                    [renamed.pop(part) for part in parts]
                )
    return renamed


def _from_hf_name(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    if name in _HF_NAMES or module in _HF_MODULES:
        return _HF_NAMES.get(name) or f"{_HF_MODULES[module]}.{leaf}"
    layer = _HF_LAYER.fullmatch(name)
    if layer and (ours := (_HF_BLOCK | _HF_BLOCK_IN_MEMORY).get(layer[2])):
        return f"v.blocks.{layer[1]}.{ours}.{layer[3]}"
    return name


def _to_hugging_face(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    names = {ours: theirs for theirs, ours in _HF_NAMES.items()}
    modules = {ours: theirs for theirs, ours in _HF_MODULES.items()}
    for index in range(count_blocks(weights)):
        block = f"{_HF_PREFIX}encoder.layer.{index}."
        modules |= {
            f"v.blocks.{index}.{ours}": block + theirs for theirs, ours in _HF_BLOCK.items()
        }
        for leaf in ("weight", "bias"):
            fused = weights.pop(f"v.blocks.{index}.attn.qkv.{leaf}")
            weights |= {
                f"v.blocks.{index}.attn.{part}.{leaf}": value
                for part, value in zip(_QKV, np.split(fused, 3))
            }
    del weights["mask_embed"]
    for name in list(weights):
        module, _, leaf = name.rpartition(".")
        weights[names.get(name) or f"{modules[module]}.{leaf}"] = weights.pop(name)
    return weights


def _leaves(tree: dict) -> dict[str, Any]:
    """Path -> leaf of nested dictionaries."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def require_same_shapes(params: dict, like: dict, what: str) -> None:
    """Compare the shapes of ``params``, read from ``what``, with the parameters (or shapes)
    ``like`` of the model.

    Raises:
        InputError: a leaf differs, is missing or is superfluous; the message names the first one
            and both shapes.
    """
    found = {path: tuple(leaf.shape) for path, leaf in _leaves(params).items()}
    wanted = {path: tuple(leaf.shape) for path, leaf in _leaves(like).items()}
    for path in sorted(found.keys() | wanted.keys()):
        there, here = found.get(path, "missing"), wanted.get(path, "missing")
        if there != here:
            raise InputError(
                f"{path} is {there} in {what}, but {here} in the model. Choose the model of these"
                " weights (size, patches, mel bands), or weights of this model."
            )


def fit_positions(params: dict, from_config: ModelConfig, to_config: ModelConfig) -> dict:
    """Params whose ``encoder`` is resized to the window length or stride of another geometry (AST
    section 2.2).

    Raises:
        InputError: patches of another shape, or another number of mel bands, which cannot be
            resized.
    """
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
    table = np.asarray(resize_positions(table, from_config.grid, to_config.grid))
    return params | {"encoder": params["encoder"] | {"pos_embed": table}}
