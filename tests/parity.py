"""Compare the models with stored numbers of the published PyTorch implementations.

    python tests/parity.py FILE.npz...

One JSON line per file: ``{"case": ..., "errors": {quantity: largest absolute error}}``. Every
stored quantity is compared; a file that holds anything else gives ``{"case": ..., "error": ...}``
and exit code 2. Judging the errors is the tests' work.
"""

import dataclasses
import json
import math
import re
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone that is not installed

from percepiano_ast import audio
from percepiano_ast.config import KALDI, FrontEnd, ModelConfig
from percepiano_ast.errors import InputError
from percepiano_ast.models import ssast
from percepiano_ast.models.ast import Classifier
from percepiano_ast.models.weights import adapt_pos_embed, from_torch, to_torch
from percepiano_ast.training.state import published_optimizer

HUGGING_FACE_EPSILON = 1e-12


class Meta(dict):
    """Metadata of a file; asks for what is not there in words."""

    def __missing__(self, name: str):
        raise InputError(f"the file's metadata have no {name!r}.")


class Stored:
    """The quantities of a file; remembers which have been read, so that none is passed over."""

    def __init__(self, path: Path):
        try:
            with open(path, "rb") as file, np.load(file) as archive:
                self._values = dict(archive)
            self.meta = json.loads(str(self._values.pop("meta_json")), object_hook=Meta)
        except (OSError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise InputError(f"{path} is no parity file: {error}.") from error
        self._unread = set(self._values)
        self.errors: dict[str, float] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def read(self, name: str) -> np.ndarray:
        """A stored input. Raises InputError when there is none of that name."""
        if name not in self._values:
            raise InputError(f"the file stores no {name!r}.")
        self._unread.discard(name)
        return self._values[name]

    def under(self, prefix: str) -> dict[str, np.ndarray]:
        """All stored arrays below ``prefix``, by the rest of their names."""
        return {name[len(prefix) :]: self.read(name) for name in self.names(prefix)}

    def names(self, prefix: str) -> list[str]:
        """Names of all stored arrays that begin with ``prefix``; they count as unread."""
        return [name for name in self._values if name.startswith(prefix)]

    def compare(self, name: str, value, stored=None) -> None:
        """Note the largest absolute error of ``value`` against what is stored (NaN counts as
        infinite)."""
        stored, value = np.asarray(self.read(name) if stored is None else stored), np.asarray(value)
        if stored.shape != value.shape:
            raise InputError(
                f"{name} is stored with shape {stored.shape}, computed with shape {value.shape}."
            )
        error = float(np.abs(value.astype(np.float64) - stored).max(initial=0.0))
        self.errors[name] = math.inf if math.isnan(error) else error

    def compare_present(self, values: dict) -> None:
        """`compare` those of ``values`` that the file stores: full-size cases hold fewer."""
        for name, value in values.items():
            if name in self:
                self.compare(name, value)

    def finish(self) -> dict[str, float]:
        """The errors. Raises InputError when something stored was not compared."""
        if self._unread:
            raise InputError(
                f"stored quantities that nothing compares: {sorted(self._unread)[:5]}."
            )
        if not self.errors:
            raise InputError("the file stores no result to compare with.")
        return self.errors


def weights_by_recipe(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Random weights that torch name and shape determine, as the files without stored weights use
    them."""
    weights = {}
    for name, shape in shapes.items():
        noise = np.random.RandomState(zlib.crc32(name.encode()) & 0x7FFFFFFF).randn(*shape)
        module, leaf = name.rpartition(".")[::2]
        if leaf == "bias":
            value = 0.05 * noise
        elif module.rpartition(".")[2] in ("norm1", "norm2", "norm") or module == "mlp_head.0":
            value = 1 + 0.1 * noise
        elif leaf == "weight":
            value = noise / math.sqrt(math.prod(shape[1:]))
        else:  # position table, cls, distillation and mask token
            value = 0.2 * noise
        weights[name] = value.astype(np.float32)
    return weights


def load_params(stored: Stored, kind: str, config: ModelConfig, init: Callable[[], dict]) -> dict:
    """Stored weights, or those by recipe in the shapes of ``init``, as parameters."""
    weights = stored.under("w/")
    if not weights:
        blank = jax.tree.map(
            lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), jax.eval_shape(init)["params"]
        )
        shapes = {
            name: value.shape for name, value in to_torch(blank, kind, config.patch_size).items()
        }
        weights = weights_by_recipe(shapes)
    return from_torch(weights, kind)


def compare_activations(stored: Stored, intermediates: dict[str, jax.Array]) -> None:
    """``act/*``: whole activations, or in full-size cases a corner of the last and the norms of the
    others."""
    for name in (name.removeprefix("act/") for name in stored.names("act/")):
        if name == "final_norm_slice":
            shape = stored.read(f"act/{name}").shape
            value = np.asarray(intermediates["tokens"])[:, : shape[1], : shape[2]]
        elif name == "block_norms":
            blocks = range(sum(key.startswith("block") for key in intermediates))
            value = [
                np.linalg.norm(np.asarray(intermediates[f"block{index}"], np.float64))
                for index in blocks
            ]
        elif name == "final_norm":
            value = intermediates["tokens"]
        elif name in intermediates:
            value = intermediates[name]
        else:
            continue  # stays unread, and is told so in the end
        stored.compare(f"act/{name}", value)


def compare_gradients(stored: Stored, grads: dict, kind: str, patch_size: tuple[int, int]) -> None:
    """``g/*``, and ``grad_norms`` of the metadata."""
    ours = to_torch(jax.device_get(grads), kind, patch_size)
    for name in stored.names("g/"):
        stored.compare(name, _gradient(ours, name.removeprefix("g/")))
    for name, norm in stored.meta.get("grad_norms", {}).items():
        stored.compare(
            f"grad_norms/{name}",
            np.linalg.norm(_gradient(ours, name).astype(np.float64)),
            stored=norm,
        )


def _gradient(grads: dict[str, np.ndarray], name: str) -> np.ndarray:
    if name not in grads:
        raise InputError(f"the file stores a gradient of {name!r}, which is no parameter here.")
    return grads[name]


def has_gradients(stored: Stored) -> bool:
    """Whether a file holds gradients or their norms; a full-size model goes forward only
    otherwise."""
    return bool(stored.names("g/") or stored.meta.get("grad_norms"))


def evaluate(
    stored: Stored, objective: Callable, params: dict, config: ModelConfig
) -> tuple[jax.Array, tuple]:
    """``objective(params)``, a loss and what else it returns; compares the loss's gradients where
    there are any."""
    if not has_gradients(stored):
        return jax.jit(objective)(params)
    results, grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(params)
    compare_gradients(stored, grads, stored.meta["kind"], config.patch_size)
    return results


def accuracy_interval(outputs: dict, softmax_over: str) -> tuple[float, float]:
    """Lowest and highest accuracy that some order among tied patches gives; identical patches make
    ties."""
    logits = np.einsum(
        "bid,bjd->bij", outputs["target"], outputs["discriminative"], dtype=np.float64
    )
    if softmax_over == "predictions":
        logits = np.asarray(jax.nn.log_softmax(logits.astype(np.float32), axis=2))
    own = np.diagonal(logits, axis1=1, axis2=2)[:, None, :]
    margin = 1e-4 * (1 + np.abs(own))
    rivals = ~np.eye(logits.shape[1], dtype=bool)[None]
    beaten, tied = ((rivals & (logits > own + sign * margin)).any(axis=1) for sign in (1, -1))
    return float(1 - tied.mean()), float(1 - beaten.mean())


def clamp_ties(
    stored: Stored, accuracy: float, expected: float, outputs: dict, softmax_over: str
) -> float:
    """``accuracy``, or where patches tie the value nearest to ``expected`` that some order among
    them gives."""
    if not stored.meta.get("acc_has_ties", False):
        return float(accuracy)
    return float(np.clip(expected, *accuracy_interval(jax.device_get(outputs), softmax_over)))


def compare_pretraining(stored: Stored) -> None:
    """Both losses, predictions, activations, gradients and the optimiser's trajectory of SSAST."""
    meta = stored.meta
    patch_size = (meta.get("fshape", 16), meta.get("tshape", 16))
    config = _config(
        meta, (meta["input_fdim"], meta["input_tdim"]), patch_size, _stride(meta, patch_size)
    )
    model = ssast.SSAST(config)
    log_mel, mask_index = jnp.asarray(stored.read("input")), jnp.asarray(stored.read("mask_index"))
    params = load_params(
        stored,
        meta["kind"],
        config,
        lambda: model.init(jax.random.key(0), log_mel[:1], mask_index[:1]),
    )

    def objective(params: dict) -> tuple[jax.Array, tuple]:
        outputs, intermediates = model.apply({"params": params}, log_mel, mask_index)
        code = ssast.losses(outputs, softmax_over="predictions")
        return code["loss"], (code, ssast.losses(outputs), outputs, intermediates)

    _, (code, paper, outputs, intermediates) = evaluate(stored, objective, params, config)
    stored.compare_present({"mse": code["mse"], "loss": code["loss"]})
    stored.compare_present({"nce_code": code["nce"], "nce_paper": paper["nce"]})
    for name, values, axis in (("acc_code", code, "predictions"), ("acc_paper", paper, "targets")):
        if name in stored:
            expected = float(stored.read(name))
            stored.compare(name, clamp_ties(stored, values["accuracy"], expected, outputs, axis))
    for name, output in (
        ("pred_c", "discriminative"),
        ("pred_g", "generative"),
        ("target", "target"),
    ):
        if name in stored:
            stored.compare(name, np.asarray(outputs[output])[:, : stored.read(name).shape[1]])
    compare_activations(stored, intermediates)
    if "traj" in stored and stored.read("traj").size:
        compare_trajectory(stored, objective, params)


def compare_trajectory(stored: Stored, objective: Callable, params: dict) -> None:
    """``traj`` (steps, 4): accuracy, InfoNCE, MSE and loss before each step of the published
    optimiser."""
    adam = stored.meta["adam"]
    optimizer = published_optimizer(
        stored.meta["lr"],
        b1=adam["b1"],
        b2=adam["b2"],
        eps=adam["eps"],
        weight_decay=adam["weight_decay_l2"],
    )
    loss_and_grad = jax.jit(jax.value_and_grad(objective, has_aux=True))
    opt_state = jax.jit(optimizer.init)(params)

    @jax.jit
    def step(grads: dict, opt_state: tuple, params: dict):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    rows = []
    for expected in stored.read("traj"):
        (_, (code, _, outputs, _)), grads = loss_and_grad(params)
        accuracy = clamp_ties(stored, code["accuracy"], expected[0], outputs, "predictions")
        rows.append([accuracy, *(float(code[name]) for name in ("nce", "mse", "loss"))])
        params, opt_state = step(grads, opt_state, params)
    stored.compare("traj", rows)


def compare_finetuning(stored: Stored) -> None:
    """Resized position tables and the logits of both poolings, for every input length and
    stride."""
    meta, pre = stored.meta, stored.meta["pre"]
    patch_size = (meta.get("fshape", 16), meta.get("tshape", 16))
    before = _config(meta, (pre["F"], pre["T"]), patch_size, _stride(pre, patch_size))
    shape = (1, before.n_frames, before.n_mels)
    classes = stored.read(f"{meta['cases'][0]['key']}/avgtok").shape[-1]
    params = load_params(
        stored,
        meta["kind"],
        before,
        lambda: Classifier(before, classes).init(jax.random.key(0), jnp.zeros(shape)),
    )
    for case in meta["cases"]:
        key = case["key"]
        log_mel = stored.read(f"{key}/input")
        config = _config(
            meta, (log_mel.shape[2], log_mel.shape[1]), patch_size, _stride(case, patch_size)
        )
        stored.compare(f"{key}/grid", config.grid, stored=case["grid"])
        resized = adapt_pos_embed(params, before, config)
        stored.compare(f"{key}/pos_embed", resized["encoder"]["pos_embed"])
        models = {
            "avgtok": Classifier(config, classes, "mean"),
            "cls": Classifier(config, classes, "prefix"),
        }
        both = jax.jit(
            lambda x, params, models=models: {
                name: models[name].apply(params, x)[0] for name in models
            }
        )
        for name, logits in both(log_mel, {"params": resized}).items():
            stored.compare(f"{key}/{name}", logits)


def compare_classifier(stored: Stored) -> None:
    """Supervised AST: logits, activations, binary cross-entropy and its gradients."""
    meta = stored.meta
    patch_size = (meta["fshape"], meta["tshape"])
    config = _config(
        meta, (meta["input_fdim"], meta["input_tdim"]), patch_size, _stride(meta, patch_size)
    )
    model = Classifier(
        config,
        meta["label_dim"],
        norm_epsilon=meta["ln_eps_blocks"],
        head_epsilon=meta["ln_eps_head"],
    )
    log_mel = jnp.asarray(stored.read("input"))
    params = load_params(
        stored, meta["kind"], config, lambda: model.init(jax.random.key(0), log_mel[:1])
    )
    # Where the file has nothing of the loss, the labels are no matter.
    needed = "labels" in stored or "bce" in stored or has_gradients(stored)
    labels = (
        jnp.asarray(stored.read("labels"))
        if needed
        else jnp.zeros((len(log_mel), meta["label_dim"]))
    )

    def objective(params: dict) -> tuple[jax.Array, tuple]:
        logits, intermediates = model.apply({"params": params}, log_mel)
        return optax.sigmoid_binary_cross_entropy(logits, labels).mean(), (logits, intermediates)

    loss, (logits, intermediates) = evaluate(stored, objective, params, config)
    stored.compare_present({"logits": logits, "bce": loss, "pooled": intermediates["pooled"]})
    compare_activations(stored, intermediates)


def compare_hugging_face(stored: Stored) -> None:
    """Hugging Face's AST: logits, pooled output, hidden states."""
    theirs = stored.meta["config"]
    config = ModelConfig(
        "parity",
        theirs["hidden_size"],
        theirs["num_hidden_layers"],
        theirs["num_attention_heads"],
        mlp_ratio=theirs["intermediate_size"] // theirs["hidden_size"],
        patch_size=(theirs["patch_size"],) * 2,
        stride=(theirs["frequency_stride"], theirs["time_stride"]),
        n_mels=theirs["num_mel_bins"],
        n_frames=theirs["max_length"],
    )
    params = from_torch(stored.under("w/"), "hf_ast")
    epsilons = {"norm_epsilon": theirs["layer_norm_eps"], "head_epsilon": HUGGING_FACE_EPSILON}
    model = Classifier(config, len(params["head"]["bias"]), **epsilons)
    logits, intermediates = jax.jit(model.apply)({"params": params}, stored.read("input"))
    stored.compare_present(
        {
            "logits": logits,
            "last_hidden_state": intermediates["tokens"],
            "pooled": intermediates["pooled"],
        }
    )
    states = [
        intermediates["with_pos"],
        *(intermediates[f"block{index}"] for index in range(config.depth)),
    ]
    stored.compare_present({f"act/hidden{index}": state for index, state in enumerate(states)})


def compare_fbank(stored: Stored) -> None:
    """Kaldi's filter bank, ``wav_<rate>`` into ``fbank_<rate>``, and ``melbank_<rate>``, at every
    rate in the file."""
    meta = stored.meta
    for name, ours in (
        ("preemph", 0.97),
        ("remove_dc", True),
        ("pow2", True),
        ("snip_edges", True),
    ):
        if meta.get(name, ours) != ours:
            raise InputError(
                f"a filter bank with {name} {meta[name]} is not covered, only with {ours}."
            )
    for suffix in (name.removeprefix("wav_") for name in stored.names("wav_")):
        rate = re.match(r"\d+", suffix)
        if not rate:
            raise InputError(f"'wav_{suffix}' names no sampling rate.")
        front_end = _kaldi(meta, int(rate[0]), stored.read(f"fbank_{suffix}").shape[-1])
        stored.compare(f"fbank_{suffix}", audio.fbank(stored.read(f"wav_{suffix}"), front_end))
        stored.compare_present({f"melbank_{suffix}": audio.kaldi_mel_bank(front_end)})


def _kaldi(meta: dict, rate: int, n_mels: int) -> FrontEnd:
    """AST's filter bank at another sampling rate: windows of 25 ms every 10 ms, up to Nyquist."""
    win_length, high = int(rate * 0.025), meta.get("high", "nyquist")
    return dataclasses.replace(
        KALDI,
        sample_rate=rate,
        n_fft=1 << (win_length - 1).bit_length(),
        win_length=win_length,
        hop_length=int(rate * 0.010),
        n_mels=n_mels,
        fmin=float(meta.get("low", KALDI.fmin)),
        fmax=rate / 2 if high == "nyquist" else float(high),
        amin=meta.get("eps", KALDI.amin),
    )


def _config(
    meta: dict, size: tuple[int, int], patch_size: tuple[int, int], stride: tuple[int, int]
) -> ModelConfig:
    """Geometry from a file's metadata; ``size``, ``patch_size`` and ``stride`` are (frequency,
    time)."""
    widths = (meta["embed"], meta["depth"], meta["heads"])
    return ModelConfig(
        "parity", *widths, patch_size=patch_size, stride=stride, n_mels=size[0], n_frames=size[1]
    )


def _stride(meta: dict, patch_size: tuple[int, int]) -> tuple[int, int]:
    """``fstride`` and ``tstride``, or one ``stride`` for both axes, or the patch size: no
    overlap."""
    both = meta.get("stride")
    return tuple(
        meta.get(name, both or size) for name, size in zip(("fstride", "tstride"), patch_size)
    )


COMPARISONS = {
    "ssast_pretrain": compare_pretraining,
    "ssast_finetune": compare_finetuning,
    "ast": compare_classifier,
    "hf_ast": compare_hugging_face,
    "fbank": compare_fbank,
}


def errors_of(path: Path) -> dict[str, float]:
    """Largest absolute error of every quantity stored in a parity file.

    Raises:
        InputError: not a parity file, a kind that is not covered, or a quantity that nothing
            compares.
    """
    stored = Stored(path)
    # The filter bank's file tells its source only.
    kind = "fbank" if "kaldi.fbank" in stored.meta.get("src", "") else stored.meta.get("kind")
    if kind not in COMPARISONS:
        raise InputError(
            f"no comparison for files of kind {kind!r} yet; there are: {', '.join(COMPARISONS)}."
        )
    with jax.default_matmul_precision("highest"):
        COMPARISONS[kind](stored)
    return stored.finish()


def main(paths: list[str]) -> int:
    """Print a JSON line per file; 2 when one could not be compared in full."""
    if not paths:
        print("usage: python tests/parity.py FILE.npz...", file=sys.stderr)
        return 2
    code = 0
    for path in map(Path, paths):
        try:
            line = {"case": path.stem, "errors": errors_of(path)}
        except InputError as error:
            line, code = {"case": path.stem, "error": str(error)}, 2
        print(json.dumps(line), flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
