"""Published PyTorch weights into this package's parameters, and back.

Names are those of the published AST and SSAST code (``ast_models.py`` on timm 0.4.5) and of Hugging Face's
``ASTForAudioClassification``. Matrices are transposed; the patch convolution (O, 1, f, t) becomes the matrix of the
patch embedding (f * t, O); fused qkv rows are q | k | v in both worlds.
"""

import numpy as np

from percepiano_ast.config import InputError

KINDS = ("ssast_pretrain", "ssast_finetune", "ast", "hf_ast")

# (published name, path here) inside one block; each stands for a weight and a bias.
_BLOCK = (
    ("norm1", ("norm1",)),
    ("attn.qkv", ("attention", "qkv")),
    ("attn.proj", ("attention", "proj")),
    ("norm2", ("norm2",)),
    ("mlp.fc1", ("mlp_in",)),
    ("mlp.fc2", ("mlp_out",)),
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
# In checkpoints, but no part of what is computed: DeiT's own heads, SSAST's record of its geometry, and in fine-tuning
# the heads of pre-training.
_UNUSED = ("v.head.", "v.head_dist.", "p_input_fdim", "p_input_tdim")
_UNUSED_IN_FINETUNING = ("cpredlayer.", "gpredlayer.")

_HF_PREFIX = "audio_spectrogram_transformer."
_HF_NAMES = {
    "embeddings.cls_token": "v.cls_token",
    "embeddings.distillation_token": "v.dist_token",
    "embeddings.position_embeddings": "v.pos_embed",
    "embeddings.patch_embeddings.projection": "v.patch_embed.proj",
    "layernorm": "v.norm",
}
_HF_BLOCK = {
    "layernorm_before": "norm1",
    "attention.o_proj": "attn.proj",
    "layernorm_after": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def _layout(depth: int, kind: str) -> dict[str, tuple[str, ...]]:
    """Published name -> path of the parameter here, for a model of ``depth`` blocks."""
    modules = [("v.patch_embed.proj", ("encoder", "patch_embed")), ("v.norm", ("encoder", "norm"))]
    for index in range(depth):
        modules += [(f"v.blocks.{index}.{name}", ("encoder", f"block{index}", *path)) for name, path in _BLOCK]
    modules += _HEADS["ssast_pretrain" if kind == "ssast_pretrain" else "classifier"]
    layout = {f"v.{name}": ("encoder", name) for name in ("cls_token", "dist_token", "pos_embed")}
    layout["mask_embed"] = ("encoder", "mask_embed")
    for name, path in modules:
        is_norm = path[-1].startswith("norm")
        layout[f"{name}.weight"] = (*path, "scale" if is_norm else "kernel")
        layout[f"{name}.bias"] = (*path, "bias")
    return layout


def _depth(names) -> int:
    """Number of blocks that published ``names`` speak of."""
    return 1 + max((int(name.split(".")[2]) for name in names if name.startswith("v.blocks.")), default=-1)


def from_torch(weights: dict[str, np.ndarray], kind: str) -> dict:
    """Published weights -> ``params``.

    Args:
        weights: torch name -> array.
        kind: ``ssast_pretrain`` -> params of `ssast.SSAST`; ``ssast_finetune``, ``ast`` and ``hf_ast`` -> params of
            `ast.Classifier`. ``mask_embed`` is zero where the published model has none (``ast``, ``hf_ast``). The
            position table keeps its grid: fit it with `ast.resize_positions`.

    Raises:
        InputError: unknown kind; a weight is missing or one too many.
    """
    if kind not in KINDS:
        raise InputError(f"unknown kind of weights {kind!r}. Choose one of: {', '.join(KINDS)}.")
    if kind == "hf_ast":
        weights = _from_hugging_face(weights)
    if kind in ("ast", "hf_ast") and "v.cls_token" in weights:
        weights = {"mask_embed": np.zeros_like(weights["v.cls_token"])} | weights
    layout = _layout(_depth(weights), kind)
    unused = _UNUSED + (_UNUSED_IN_FINETUNING if kind == "ssast_finetune" else ())
    missing = sorted(set(layout) - set(weights))
    surplus = sorted(name for name in set(weights) - set(layout) if not name.startswith(unused))
    if missing or surplus:
        raise InputError(f"not the weights of a {kind} model: missing {missing[:3]}, unknown {surplus[:3]}.")
    params: dict = {}
    for name, path in layout.items():
        node = params
        for part in path[:-1]:
            node = node.setdefault(part, {})
        value = np.asarray(weights[name], np.float32)
        node[path[-1]] = value.reshape(len(value), -1).T if path[-1] == "kernel" else value
    return params


def to_torch(params: dict, kind: str, patch_size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Inverse of `from_torch`, in the published names (``kind`` as there, without ``hf_ast``)."""
    depth = sum(name.startswith("block") for name in params["encoder"])
    weights = {}
    for name, path in _layout(depth, kind).items():
        value = params
        for part in path:
            value = value[part]
        value = np.asarray(value)
        weights[name] = value.T if path[-1] == "kernel" else value
    convolution = weights["v.patch_embed.proj.weight"]
    weights["v.patch_embed.proj.weight"] = convolution.reshape(len(convolution), 1, *patch_size)
    return weights


def _from_hugging_face(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Hugging Face names -> published names; query, key and value become one matrix. Unknown names stay as they are."""
    names = {_HF_PREFIX + theirs: ours for theirs, ours in _HF_NAMES.items()}
    names |= {"classifier.layernorm": "mlp_head.0", "classifier.dense": "mlp_head.1"}
    depth = 1 + max((int(n.split(".")[2]) for n in weights if n.startswith(f"{_HF_PREFIX}layers.")), default=-1)
    for index in range(depth):
        block = f"{_HF_PREFIX}layers.{index}."
        names |= {block + theirs: f"v.blocks.{index}.{ours}" for theirs, ours in _HF_BLOCK.items()}
    leaves = ("", ".weight", ".bias")
    renamed = {theirs + leaf: ours + leaf for theirs, ours in names.items() for leaf in leaves}
    weights = dict(weights)
    fused = {}
    for index in range(depth):
        for leaf in ("weight", "bias"):
            parts = [f"{_HF_PREFIX}layers.{index}.attention.{part}_proj.{leaf}" for part in "qkv"]
            if all(part in weights for part in parts):
                fused[f"v.blocks.{index}.attn.qkv.{leaf}"] = np.concatenate([weights.pop(part) for part in parts])
    return fused | {renamed.get(name, name): value for name, value in weights.items()}
