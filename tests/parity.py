"""Compare the models with stored numbers of the published PyTorch implementations.

    python tests/parity.py FILE.npz...

One JSON line per file: ``{"case": ..., "errors": {quantity: largest absolute error}}``. Every stored quantity is
compared; a file that holds anything else gives ``{"case": ..., "error": ...}`` and exit code 2. Judging the errors is
the tests' work.
"""

import json
import math
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

from percepiano_ast.config import InputError, ModelConfig  # noqa: E402
from percepiano_ast.models import convert, ssast  # noqa: E402
from percepiano_ast.models.ast import Classifier, resize_positions  # noqa: E402

HUGGING_FACE_EPSILON = 1e-12


class Stored:
    """The quantities of a file; remembers which have been read, so that none is passed over."""

    def __init__(self, path: Path):
        try:
            with open(path, "rb") as file, np.load(file) as archive:
                self._values = dict(archive)
            self.meta = json.loads(str(self._values.pop("meta_json")))
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
        return {name[len(prefix) :]: self.read(name) for name in list(self._values) if name.startswith(prefix)}

    def compare(self, name: str, value, stored=None) -> None:
        """Note the largest absolute error of ``value`` against what is stored (NaN counts as infinite)."""
        stored, value = np.asarray(self.read(name) if stored is None else stored), np.asarray(value)
        if stored.shape != value.shape:
            raise InputError(f"{name} is stored with shape {stored.shape}, computed with shape {value.shape}.")
        error = float(np.abs(value.astype(np.float64) - stored).max(initial=0.0))
        self.errors[name] = math.inf if math.isnan(error) else error

    def finish(self) -> dict[str, float]:
        """The errors. Raises InputError when something stored was not compared."""
        if self._unread:
            raise InputError(f"stored quantities that nothing compares: {sorted(self._unread)[:5]}.")
        return self.errors


def weights_by_recipe(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Random weights that torch name and shape determine, as the files without stored weights use them."""
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
        blank = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), jax.eval_shape(init)["params"])
        shapes = {name: value.shape for name, value in convert.to_torch(blank, kind, config.patch_size).items()}
        weights = weights_by_recipe(shapes)
        if kind == "ast":
            del weights["mask_embed"]  # the supervised model has none
    return convert.from_torch(weights, kind)


def compare_activations(stored: Stored, intermediates: dict[str, jax.Array]) -> None:
    """``act/*``: whole activations, or in full-size cases a corner of the last and the norms of the others."""
    for name in stored.under("act/"):
        if name == "final_norm_slice":
            shape = stored.read(f"act/{name}").shape
            value = np.asarray(intermediates["tokens"])[:, : shape[1], : shape[2]]
        elif name == "block_norms":
            blocks = [key for key in intermediates if key.startswith("block")]
            value = [np.linalg.norm(np.asarray(intermediates[key], np.float64)) for key in blocks]
        else:
            value = intermediates["tokens" if name == "final_norm" else name]
        stored.compare(f"act/{name}", value)


def compare_gradients(stored: Stored, grads: dict, kind: str, patch_size: tuple[int, int]) -> None:
    """``g/*``, and ``grad_norms`` of the metadata."""
    ours = convert.to_torch(jax.device_get(grads), kind, patch_size)
    for name in stored.under("g/"):
        stored.compare(f"g/{name}", ours[name])
    for name, norm in stored.meta.get("grad_norms", {}).items():
        stored.compare(f"grad_norms/{name}", np.linalg.norm(ours[name].astype(np.float64)), stored=norm)


def accuracy_interval(outputs: dict, softmax_over: str) -> tuple[float, float]:
    """Lowest and highest accuracy that some order among tied patches gives; identical patches make ties."""
    logits = np.einsum("bid,bjd->bij", outputs["target"], outputs["discriminative"], dtype=np.float64)
    if softmax_over == "predictions":
        logits = np.asarray(jax.nn.log_softmax(logits.astype(np.float32), axis=2))
    own = np.diagonal(logits, axis1=1, axis2=2)[:, None, :]
    margin = 1e-4 * (1 + np.abs(own))
    rivals = ~np.eye(logits.shape[1], dtype=bool)[None]
    beaten, tied = ((rivals & (logits > own + sign * margin)).any(axis=1) for sign in (1, -1))
    return float(1 - tied.mean()), float(1 - beaten.mean())


def clamp_ties(stored: Stored, accuracy: float, expected: float, outputs: dict, softmax_over: str) -> float:
    """``accuracy``, or where patches tie the value nearest to ``expected`` that some order among them gives."""
    if not stored.meta["acc_has_ties"]:
        return float(accuracy)
    return float(np.clip(expected, *accuracy_interval(jax.device_get(outputs), softmax_over)))


def compare_pretraining(stored: Stored) -> None:
    """Both losses, predictions, activations, gradients and the optimiser's trajectory of SSAST."""
    meta = stored.meta
    config = _config(meta, (meta["input_fdim"], meta["input_tdim"]), (meta["fshape"], meta["tshape"]))
    model = ssast.SSAST(config)
    log_mel, mask_index = jnp.asarray(stored.read("input")), jnp.asarray(stored.read("mask_index"))
    params = load_params(
        stored, meta["kind"], config, lambda: model.init(jax.random.key(0), log_mel[:1], mask_index[:1])
    )

    @jax.jit
    def loss_and_grad(params: dict):
        def objective(params: dict):
            outputs, intermediates = model.apply({"params": params}, log_mel, mask_index)
            code = ssast.losses(outputs, softmax_over="predictions")
            return code["loss"], (code, ssast.losses(outputs), outputs, intermediates)

        return jax.value_and_grad(objective, has_aux=True)(params)

    (_, (code, paper, outputs, intermediates)), grads = loss_and_grad(params)
    for name in ("mse", "loss"):
        stored.compare(name, code[name])
    for name, values, axis in (("code", code, "predictions"), ("paper", paper, "targets")):
        stored.compare(f"nce_{name}", values["nce"])
        expected = float(stored.read(f"acc_{name}"))
        stored.compare(f"acc_{name}", clamp_ties(stored, values["accuracy"], expected, outputs, axis))
    for name, output in (("pred_c", "discriminative"), ("pred_g", "generative"), ("target", "target")):
        stored.compare(name, np.asarray(outputs[output])[:, : stored.read(name).shape[1]])
    compare_activations(stored, intermediates)
    compare_gradients(stored, grads, meta["kind"], config.patch_size)
    trajectory = stored.read("traj")
    if trajectory.size:
        compare_trajectory(stored, trajectory, params, loss_and_grad)


def compare_trajectory(stored: Stored, trajectory: np.ndarray, params: dict, loss_and_grad: Callable) -> None:
    """``traj`` (steps, 4): accuracy, InfoNCE, MSE and loss before each step of the published optimiser."""
    adam = stored.meta["adam"]
    optimizer = optax.chain(
        optax.add_decayed_weights(adam["weight_decay_l2"]),
        optax.scale_by_adam(adam["b1"], adam["b2"], adam["eps"]),
        optax.scale(-stored.meta["lr"]),
    )
    opt_state = jax.jit(optimizer.init)(params)

    @jax.jit
    def step(grads: dict, opt_state: tuple, params: dict):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    rows = []
    for expected in trajectory:
        (_, (code, _, outputs, _)), grads = loss_and_grad(params)
        accuracy = clamp_ties(stored, code["accuracy"], expected[0], outputs, "predictions")
        rows.append([accuracy, *(float(code[name]) for name in ("nce", "mse", "loss"))])
        params, opt_state = step(grads, opt_state, params)
    stored.compare("traj", rows)


def compare_finetuning(stored: Stored) -> None:
    """Resized position tables and the logits of both poolings, for every input length and stride."""
    meta = stored.meta
    before = _config(meta, (meta["pre"]["F"], meta["pre"]["T"]), (meta["pre"]["stride"],) * 2)
    shape = (1, before.n_frames, before.n_mels)
    params = load_params(
        stored, meta["kind"], before, lambda: Classifier(before, 1).init(jax.random.key(0), jnp.zeros(shape))
    )
    classes = len(params["head"]["bias"])
    for case in meta["cases"]:
        key = case["key"]
        log_mel = stored.read(f"{key}/input")
        config = _config(meta, (log_mel.shape[2], case["T"]), (case["stride"],) * 2)
        table = resize_positions(params["encoder"]["pos_embed"], before.grid, tuple(case["grid"]))
        stored.compare(f"{key}/pos_embed", table)
        resized = {"params": params | {"encoder": params["encoder"] | {"pos_embed": table}}}
        models = {"avgtok": Classifier(config, classes, "mean"), "cls": Classifier(config, classes, "prefix")}
        both = jax.jit(lambda x, params, models=models: {name: models[name].apply(params, x)[0] for name in models})
        for name, logits in both(log_mel, resized).items():
            stored.compare(f"{key}/{name}", logits)


def compare_classifier(stored: Stored) -> None:
    """Supervised AST: logits, activations, binary cross-entropy and its gradients."""
    meta = stored.meta
    strides = (meta["fstride"], meta["tstride"])
    config = _config(meta, (meta["input_fdim"], meta["input_tdim"]), strides, (meta["fshape"], meta["tshape"]))
    model = Classifier(
        config, meta["label_dim"], norm_epsilon=meta["ln_eps_blocks"], head_epsilon=meta["ln_eps_head"]
    )
    log_mel = jnp.asarray(stored.read("input"))
    params = load_params(stored, meta["kind"], config, lambda: model.init(jax.random.key(0), log_mel[:1]))
    labels = jnp.asarray(stored.read("labels")) if "labels" in stored else jnp.zeros((len(log_mel), meta["label_dim"]))

    @jax.jit
    def loss_and_grad(params: dict):
        def objective(params: dict):
            logits, intermediates = model.apply({"params": params}, log_mel)
            return optax.sigmoid_binary_cross_entropy(logits, labels).mean(), (logits, intermediates)

        return jax.value_and_grad(objective, has_aux=True)(params)

    (loss, (logits, intermediates)), grads = loss_and_grad(params)
    stored.compare("logits", logits)
    if "bce" in stored:
        stored.compare("bce", loss)
    if "pooled" in stored:
        stored.compare("pooled", intermediates["pooled"])
    compare_activations(stored, intermediates)
    compare_gradients(stored, grads, meta["kind"], config.patch_size)


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
    params = convert.from_torch(stored.under("w/"), "hf_ast")
    epsilons = {"norm_epsilon": theirs["layer_norm_eps"], "head_epsilon": HUGGING_FACE_EPSILON}
    model = Classifier(config, len(params["head"]["bias"]), **epsilons)
    logits, intermediates = jax.jit(model.apply)({"params": params}, stored.read("input"))
    stored.compare("logits", logits)
    stored.compare("last_hidden_state", intermediates["tokens"])
    stored.compare("pooled", intermediates["pooled"])
    states = [intermediates["with_pos"], *(intermediates[f"block{index}"] for index in range(config.depth))]
    for index, state in enumerate(states):
        stored.compare(f"act/hidden{index}", state)


def _config(meta: dict, size: tuple[int, int], stride: tuple[int, int], patch_size=(16, 16)) -> ModelConfig:
    """Geometry from a file's metadata; ``size``, ``stride`` and ``patch_size`` are (frequency, time)."""
    widths = (meta["embed"], meta["depth"], meta["heads"])
    return ModelConfig("parity", *widths, patch_size=patch_size, stride=stride, n_mels=size[0], n_frames=size[1])


COMPARISONS = {
    "ssast_pretrain": compare_pretraining,
    "ssast_finetune": compare_finetuning,
    "ast": compare_classifier,
    "hf_ast": compare_hugging_face,
}


def errors_of(path: Path) -> dict[str, float]:
    """Largest absolute error of every quantity stored in a parity file.

    Raises:
        InputError: not a parity file, a kind that is not covered, or a quantity that nothing compares.
    """
    stored = Stored(path)
    kind = stored.meta.get("kind")
    if kind not in COMPARISONS:
        raise InputError(f"no comparison for files of kind {kind!r} yet; there are: {', '.join(COMPARISONS)}.")
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
