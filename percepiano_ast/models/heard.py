"""Transcription scores of a `Transcriber`, from counts that are summed over batches on the device.

Onsets are matched as in mir_eval's note onsets, but on the grid of steps: within `TOLERANCE` steps
of an onset of the same key.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

from percepiano_ast.models.transcription import PEDALS, on_steps
from percepiano_ast.music.piano_roll import HELD_FROM, ONSET_FROM, FrameTargets

TOLERANCE = 2  # steps, 40 ms; mir_eval uses 50 ms
SCORES = (
    "onset_f1",
    "onset_precision",
    "onset_recall",
    "down_f1",
    "sounding_f1",
    "velocity_mae",
    "sustain_mae",
    "sustain_r",
    "una_corda_mae",
    "una_corda_r",
    "descriptors_r2",
)


def peaks(onset: jax.Array) -> jax.Array:
    """Onset activations, float (B, steps, 88) -> Bool, True at local maxima above `ONSET_FROM`."""
    padded = jnp.pad(onset, ((0, 0), (1, 1), (0, 0)))
    return (onset >= ONSET_FROM) & (onset >= padded[:, :-2]) & (onset > padded[:, 2:])


def counts(
    outputs: dict[str, jax.Array], targets: FrameTargets, descriptors: jax.Array | None = None
) -> dict[str, jax.Array]:
    """Counts of a batch, float32 scalars, to be summed over batches for `scores`; arguments as in
    `transcription.losses`."""
    wanted = on_steps(targets)
    heard = {name: nn.sigmoid(logits) for name, logits in outputs.items() if name != "descriptors"}
    struck, found = wanted["struck"] > 0, peaks(heard["onset"])
    total: dict[str, jax.Array | float] = {"struck": struck.sum(), "found": found.sum()}
    total |= {
        "struck_and_found": (struck & _within(found)).sum(),
        "found_and_struck": (found & _within(struck)).sum(),
    }
    for name in ("down", "sounding"):
        is_held, seems_held = wanted[name] > 0, heard[name] >= HELD_FROM
        total |= {
            f"{name}_both": (is_held & seems_held).sum(),
            f"{name}_either": is_held.sum() + seems_held.sum(),
        }
    total["velocity_error"] = jnp.where(
        struck, 127 * jnp.abs(heard["velocity"] - wanted["velocity"]), 0.0
    ).sum()
    for name in PEDALS:
        x, y = heard[name], wanted[name]
        moments = {"error": jnp.abs(x - y), "x": x, "y": y, "xx": x * x, "yy": y * y, "xy": x * y}
        total |= {f"{name}_{key}": values.sum() for key, values in moments.items()}
    total["steps"] = wanted["sustain"].size
    total["descriptors_left"] = total["descriptors_all"] = 0.0
    if "descriptors" in outputs and descriptors is not None:
        known = ~jnp.isnan(descriptors)
        there = jnp.where(known, descriptors, 0.0)
        total["descriptors_left"] = jnp.square(
            jnp.where(known, outputs["descriptors"] - there, 0.0)
        ).sum()
        total["descriptors_all"] = jnp.square(there).sum()
    return {name: jnp.asarray(value, jnp.float32) for name, value in total.items()}


def _within(marks: jax.Array) -> jax.Array:
    """Bool (B, steps, 88): whether there is a mark of the same key within `TOLERANCE` steps."""
    width = 2 * TOLERANCE + 1
    return nn.max_pool(marks.astype(jnp.float32), (width,), padding="SAME") > 0


def scores(total: dict[str, float]) -> dict[str, float]:
    """``SCORES`` from summed `counts`.

    F1, precision and recall of onsets; F1 of keys and strings per step; mean absolute error of
    velocity at onsets in MIDI units; mean absolute error of the pedals as a share of their travel,
    and their correlation over all steps (0 if a pedal never moves); explained variance of the
    descriptors (0 without descriptors).
    """
    precision = total["found_and_struck"] / max(total["found"], 1)
    recall = total["struck_and_found"] / max(total["struck"], 1)
    values = {"onset_f1": 2 * precision * recall / max(precision + recall, 1e-9)}
    values |= {"onset_precision": precision, "onset_recall": recall}
    values |= {
        f"{name}_f1": 2 * total[f"{name}_both"] / max(total[f"{name}_either"], 1)
        for name in ("down", "sounding")
    }
    values["velocity_mae"] = total["velocity_error"] / max(total["struck"], 1)
    n = total["steps"]
    for name in PEDALS:
        x, y, xx, yy, xy = (total[f"{name}_{key}"] / n for key in ("x", "y", "xx", "yy", "xy"))
        spread = max(xx - x * x, 0.0) * max(yy - y * y, 0.0)
        values[f"{name}_mae"] = total[f"{name}_error"] / n
        values[f"{name}_r"] = (xy - x * y) / spread**0.5 if spread > 1e-12 else 0.0
    left, everything = total["descriptors_left"], total["descriptors_all"]
    values["descriptors_r2"] = 1 - left / everything if everything else 0.0
    return {name: float(values[name]) for name in SCORES}
