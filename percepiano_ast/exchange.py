"""Conversion of weights between this package's checkpoints, the authors' files and Hugging Face's
folders."""

from pathlib import Path

from percepiano_ast.config import FrontEnd, ModelConfig, Statistics, from_json
from percepiano_ast.errors import InputError
from percepiano_ast.models.weights import Weights, read_weights, write_weights
from percepiano_ast.training.checkpoints import open_latest

# An AST is the same model in both formats. A pre-trained model has no classifier, so there is only
# one format for it.
_FORMS = {"ast": ("ast", "hf_ast"), "hf_ast": ("hf_ast", "ast")}


def convert(source: str | Path, to: str | Path, kind: str = "") -> Path:
    """Read weights from ``source`` and write them to ``to``.

    Args:
        source: directory of a pre-training (``runs/base/pretrain/ssast``), or a path for
            ``weights.read_weights``.
        to: a ``.safetensors`` file, or for the kind ``hf_ast`` a folder.
        kind: ``ast`` or ``hf_ast`` for an AST; by default unchanged.

    Raises:
        InputError: no weights at ``source``, or a kind that they cannot be converted to.
    """
    home = Path(source) / "checkpoints"
    found = from_pretraining(home) if home.is_dir() else read_weights(source)
    forms = _FORMS.get(found.kind, (found.kind,))
    if kind and kind not in forms:
        raise InputError(
            f"{source} holds weights of the kind {found.kind!r}, which cannot be converted to"
            f" {kind!r}. Possible kinds: {', '.join(forms)}"
        )
    return write_weights(to, Weights(**{**vars(found), "kind": kind or found.kind}))


def from_pretraining(checkpoints: str | Path) -> Weights:
    """The weights in the newest intact checkpoint of an SSAST pre-training, its moving average if
    it has one.

    Raises:
        InputError: there is none, or the model has a decoder, unlike SSAST's published form.
    """
    tree, made = open_latest(checkpoints, made_by="`percepiano pretrain`")
    if made["pretrain"]["decoder_depth"]:
        raise InputError(
            f"{checkpoints} holds a model with a decoder, which SSAST's published form does not"
            " have. Use it with `finetune --init visible`"
        )
    state = tree["state"]
    return Weights(
        params=state["ema"] or state["params"],
        config=from_json(ModelConfig, made["model"]),
        kind="ssast_pretrain",
        front_end=FrontEnd(**made["front_end"]),
        statistics=Statistics(**made["statistics"]),
        description={"data": made["data"], "epoch": made["epoch"], "checkpoint": made["sha256"]},
    )
