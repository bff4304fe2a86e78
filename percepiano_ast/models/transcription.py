"""An AST for transcription: onsets, keys, strings, velocity and pedals from its tokens, descriptors
from the pooled tokens.

The outputs are those of Onsets and Frames (Hawthorne et al. 2018, arXiv 1710.11153). Onsets and
offsets are regressed as in Kong et al. 2021 (arXiv 2010.01815, section III-B): the target falls
linearly from 1 at the exact time to 0 at `REACH`, so that times can be estimated more finely than
the steps. Pedal targets are values between 0 and 1, at whose expected value the cross-entropy is
minimal.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from percepiano_ast.config import ModelConfig
from percepiano_ast.errors import InputError
from percepiano_ast.models.ast import PREFIX_TOKENS, Encoder
from percepiano_ast.models.transformer import Compute, gelu, layer_norm, per_token
from percepiano_ast.music.piano_roll import HELD_FROM, N_KEYS, ONSET_FROM, FrameTargets

STEP = 2  # frames of the front end: 20 ms, less than half the onset tolerance of 50 ms
REACH = 5  # frames on either side of an onset or offset, Kong et al.'s J: 50 ms
TOLERANCE = 2  # steps between matched onsets, 40 ms; mir_eval uses 50 ms
HIDDEN = 256
# Output biases: log-odds of an onset, an offset, a held key and a sounding string in a cell (Lin et
# al. 2017, arXiv 1708.02002, section 4.1).
ROLLS = {"onset": -4.6, "offset": -4.6, "frame": -3.0, "sustained": -2.0, "velocity": 0.0}
PEDALS = ("sustain", "una_corda")
# Outputs by hidden layer: velocity and pedals have capacity of their own.
BRANCHES = {
    "notes": ("onset", "offset", "frame", "sustained"),
    "velocity": ("velocity",),
    "pedals": PEDALS,
}
# Onsets are rarest, the sustain pedal is hardest to transcribe, and one window in four has
# descriptors. Losses of rolls are sums over 88 keys, that of the velocity is a mean over notes,
# those of pedals single values.
WEIGHTS = {"onset": 2.0, "offset": 1.0, "frame": 1.0, "sustained": 0.5, "velocity": 6.0}
WEIGHTS |= {"sustain": 6.0, "una_corda": 1.0, "descriptors": 4.0}
_COLUMN = {"frame": "down", "sustained": "sounding"}  # in histories
LOSSES = ("loss", *(_COLUMN.get(name, name) for name in WEIGHTS))
# fmt: off
METRICS = ("onset_f1", "onset_precision", "onset_recall", "down_f1", "sounding_f1", "velocity_mae",
           "sustain_mae", "sustain_r", "una_corda_mae", "una_corda_r", "descriptors_r2")
# fmt: on


def steps_of(model: ModelConfig) -> int:
    """Number of steps of `STEP` frames per column of patches; InputError if patches overlap in
    time, or their width is not a multiple of `STEP`."""
    width = model.stride[1]
    if model.patch_size[1] != width or width % STEP:
        raise InputError(
            f"patches of {model.patch_size[1]} frames every {width} frames: transcription needs"
            f" adjacent patches without overlap, with a width that is a multiple of {STEP} frames"
        )
    return width // STEP


class TranscriptionHead(nn.Module):
    """All patches of a column -> its steps: Linear - GELU - LayerNorm - Linear for each of
    ``BRANCHES``, shared by all columns and all steps. Without the norm, training diverges."""

    config: ModelConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, patches: jax.Array) -> dict[str, jax.Array]:
        """(B, F' * T', D) -> float32 logits (B, T' * steps, 88) of ``ROLLS`` and (B, T' * steps) of
        ``PEDALS``."""
        batch, tokens, width = patches.shape
        bands, steps = self.config.grid[0], steps_of(self.config)
        columns = patches.reshape(batch, bands, tokens // bands, width).swapaxes(1, 2)
        columns = columns.reshape(batch, tokens // bands, bands * width)
        outputs: dict[str, jax.Array] = {}
        for branch, names in BRANCHES.items():
            layer = nn.Dense(steps * HIDDEN, dtype=self.dtype, name=f"{branch}_hidden")
            hidden = gelu(per_token(layer, columns)).reshape(batch, -1, HIDDEN)
            hidden = layer_norm(1e-6, self.dtype, f"{branch}_norm")(hidden)
            sizes = [N_KEYS if name in ROLLS else 1 for name in names]
            rates = np.repeat([ROLLS.get(name, 0.0) for name in names], sizes)

            def base_rates(rng, shape, dtype=jnp.float32, rates=rates) -> jax.Array:
                return jnp.asarray(rates, dtype)

            layer = nn.Dense(
                len(rates), dtype=self.dtype, bias_init=base_rates, name=f"{branch}_out"
            )
            out = per_token(layer, hidden).astype(jnp.float32)
            parts = jnp.split(out, np.cumsum(sizes)[:-1], axis=-1)
            outputs |= dict(zip(names, parts, strict=True))
        return outputs | {name: outputs[name][..., 0] for name in PEDALS}


class DescriptorHead(nn.Module):
    """Mean and standard deviation of a window's patches -> LayerNorm - Linear - GELU - Linear."""

    num_descriptors: int

    @nn.compact
    def __call__(self, patches: jax.Array) -> jax.Array:
        """(B, N, D) -> float32 (B, num_descriptors)."""
        patches = patches.astype(jnp.float32)
        spread = jnp.sqrt(patches.var(axis=1) + 1e-6)  # the gradient of the root is infinite at 0
        pooled = jnp.concatenate([patches.mean(axis=1), spread], axis=-1)
        pooled = layer_norm(1e-6, jnp.float32, "norm")(pooled)
        hidden = gelu(nn.Dense(HIDDEN, name="hidden")(pooled))
        return nn.Dense(self.num_descriptors, name="out")(hidden)


class TranscriptionModel(nn.Module):
    """Encoder, transcription head, and a head for ``num_descriptors`` descriptors of a window."""

    config: ModelConfig
    compute: Compute = Compute()
    num_descriptors: int = 0

    @nn.compact
    def __call__(
        self, log_mel: jax.Array, patch_valid: jax.Array | None = None
    ) -> tuple[dict[str, jax.Array], dict]:
        """(B, T, F), normalised, and ``patch_valid`` of `Encoder` -> logits of `TranscriptionHead`
        and ``descriptors`` (B, num_descriptors), standardised; and the encoder's intermediates with
        ``tokens``."""
        encoder = Encoder(self.config, self.compute, name="encoder")
        tokens, intermediates = encoder(log_mel, patch_valid=patch_valid)
        patches = tokens[:, PREFIX_TOKENS:]
        outputs = TranscriptionHead(self.config, self.compute.dtype, name="transcription")(patches)
        if self.num_descriptors:
            head = DescriptorHead(self.num_descriptors, name="descriptors")
            outputs["descriptors"] = head(patches)
        return outputs, intermediates | {"tokens": tokens}


def on_steps(targets: FrameTargets) -> dict[str, jax.Array]:
    """Targets of T frames -> float32 targets of T // `STEP` steps, all 0 to 1.

    ``onset`` and ``offset`` are Kong et al.'s slopes around the exact times, ``velocity`` that of
    the notes with an onset within `REACH`, and ``struck`` marks the steps of the onsets. Keys and
    strings are active if they are in any frame of a step; pedals are averaged over a step.
    """
    frames = targets.onset.shape[1] // STEP * STEP

    def paired(x):
        return x[:, :frames].reshape(x.shape[0], -1, STEP, *x.shape[2:])

    padding = ((0, 0), (REACH, REACH), (0, 0))
    near = {
        name: jnp.pad(getattr(targets, name).astype(jnp.float32), padding, constant_values=value)
        for name, value in {"onset": jnp.nan, "offset": jnp.nan, "velocity": 0.0}.items()
    }
    shape = (targets.onset.shape[0], frames // STEP, targets.onset.shape[2])
    steps = {name: jnp.zeros(shape, jnp.float32) for name in near}
    for shift in range(-REACH, STEP + REACH):
        there = slice(REACH + shift, REACH + shift + frames - STEP + 1, STEP)
        for name in ("onset", "offset"):
            away = jnp.abs(shift + near[name][:, there] - (STEP - 1) / 2) / REACH
            steps[name] = jnp.fmax(steps[name], 1 - away)  # NaN: none there
        level = jnp.where(steps["onset"] > 0, near["velocity"][:, there], 0.0)
        steps["velocity"] = jnp.maximum(steps["velocity"], level)
    steps["struck"] = paired(~jnp.isnan(targets.onset)).max(axis=2).astype(jnp.float32)
    for name in _COLUMN:
        steps[name] = paired(getattr(targets, name)).max(axis=2).astype(jnp.float32)
    for name in PEDALS:
        steps[name] = paired(getattr(targets, name)).mean(axis=2, dtype=jnp.float32)
    return steps


def losses(
    outputs: dict[str, jax.Array], targets: FrameTargets, descriptors: jax.Array | None = None
) -> dict[str, jax.Array]:
    """Cross-entropies of `TranscriptionModel`'s outputs, and their sum weighted by ``WEIGHTS``.

    Rolls are summed over the keys. The velocity loss counts only near onsets (Hawthorne et al.,
    section 3.3; Kong et al., equation 5, weighted by the onset's slope). Descriptors have a Huber
    loss, because some have long tails. Every loss is a mean over clips, so that micro-batches add
    up to the batch.

    Args:
        targets: of B windows, with the model's number of frames.
        descriptors: (B, num_descriptors), standardised; NaN rows if they are unknown.

    Returns:
        float32 scalars ``LOSSES``; ``descriptors`` is 0 without any.
    """
    wanted = on_steps(targets)

    def entropy(name):
        return optax.sigmoid_binary_cross_entropy(outputs[name], wanted[name])

    parts = {name: entropy(name).sum(axis=-1).mean() for name in BRANCHES["notes"]}
    struck = jnp.maximum(wanted["onset"].sum(axis=(1, 2)), 1.0)
    parts["velocity"] = ((entropy("velocity") * wanted["onset"]).sum(axis=(1, 2)) / struck).mean()
    parts |= {name: entropy(name).mean() for name in PEDALS}
    parts["descriptors"] = jnp.zeros(())
    if "descriptors" in outputs and descriptors is not None:
        known = ~jnp.isnan(descriptors)
        errors = optax.huber_loss(outputs["descriptors"], jnp.where(known, descriptors, 0.0))
        parts["descriptors"] = jnp.where(known, errors, 0.0).mean()
    total = sum(WEIGHTS[name] * part for name, part in parts.items())
    return {"loss": total} | {_COLUMN.get(name, name): part for name, part in parts.items()}


# --- Metrics on the device ------------------------------------------------------------------------


def metric_counts(
    outputs: dict[str, jax.Array], targets: FrameTargets, descriptors: jax.Array | None = None
) -> dict[str, jax.Array]:
    """Counts of a batch, float32 scalars, to be summed over batches for `metrics`; arguments as in
    `losses`.

    Onsets are matched as in mir_eval, but on the grid of steps: within `TOLERANCE` steps of an
    onset of the same key.
    """
    wanted = on_steps(targets)
    detected = {name: nn.sigmoid(x) for name, x in outputs.items() if name != "descriptors"}
    onset, struck = detected["onset"], wanted["struck"] > 0
    padded = jnp.pad(onset, ((0, 0), (1, 1), (0, 0)))
    found = (onset >= ONSET_FROM) & (onset >= padded[:, :-2]) & (onset > padded[:, 2:])  # maxima

    def near(marks):
        window = (2 * TOLERANCE + 1,)
        return nn.max_pool(marks.astype(jnp.float32), window, padding="SAME") > 0

    total: dict[str, jax.Array | float] = {"struck": struck.sum(), "found": found.sum()}
    total["struck_and_found"] = (struck & near(found)).sum()
    total["found_and_struck"] = (found & near(struck)).sum()
    for name in _COLUMN:
        is_active, is_detected = wanted[name] > 0, detected[name] >= HELD_FROM
        total[f"{name}_both"] = (is_active & is_detected).sum()
        total[f"{name}_either"] = is_active.sum() + is_detected.sum()
    errors = 127 * jnp.abs(detected["velocity"] - wanted["velocity"])
    total["velocity_error"] = jnp.where(struck, errors, 0.0).sum()
    for name in PEDALS:
        x, y = detected[name], wanted[name]
        moments = {"error": jnp.abs(x - y), "x": x, "y": y, "xx": x * x, "yy": y * y, "xy": x * y}
        total |= {f"{name}_{key}": values.sum() for key, values in moments.items()}
    total["steps"] = wanted["sustain"].size
    total["descriptors_left"] = total["descriptors_all"] = 0.0
    if "descriptors" in outputs and descriptors is not None:
        known = ~jnp.isnan(descriptors)
        true = jnp.where(known, descriptors, 0.0)
        left = jnp.where(known, outputs["descriptors"] - true, 0.0)
        total["descriptors_left"] = jnp.square(left).sum()
        total["descriptors_all"] = jnp.square(true).sum()
    return {name: jnp.asarray(value, jnp.float32) for name, value in total.items()}


def metrics(total: dict[str, float]) -> dict[str, float]:
    """``METRICS`` from summed `metric_counts`.

    Onsets: F1, precision, recall. Keys and strings: F1 per step. Velocity: mean absolute error at
    onsets in MIDI units. Pedals: mean absolute error as a share of their travel, and correlation
    over all steps (0 if a pedal never moves). Descriptors: explained variance (0 without any).
    """
    precision = total["found_and_struck"] / max(total["found"], 1)
    recall = total["struck_and_found"] / max(total["struck"], 1)
    values = {"onset_f1": 2 * precision * recall / max(precision + recall, 1e-9)}
    values |= {"onset_precision": precision, "onset_recall": recall}
    for name, column in _COLUMN.items():
        values[f"{column}_f1"] = 2 * total[f"{name}_both"] / max(total[f"{name}_either"], 1)
    values["velocity_mae"] = total["velocity_error"] / max(total["struck"], 1)
    n = total["steps"]
    for name in PEDALS:
        x, y, xx, yy, xy = (total[f"{name}_{key}"] / n for key in ("x", "y", "xx", "yy", "xy"))
        spread = max(xx - x * x, 0.0) * max(yy - y * y, 0.0)
        values[f"{name}_mae"] = total[f"{name}_error"] / n
        values[f"{name}_r"] = (xy - x * y) / spread**0.5 if spread > 1e-12 else 0.0
    left, everything = total["descriptors_left"], total["descriptors_all"]
    values["descriptors_r2"] = 1 - left / everything if everything else 0.0
    return {name: float(values[name]) for name in METRICS}
