"""Articulation descriptors, staccato to legato. Key overlap after Bresin and Battel (2000), J. New
Music Research 29(3)."""

import numpy as np

from percepiano_ast.descriptors.view import SHORTEST, Descriptor, View, correlation

TABLE = {
    "held_mean": Descriptor("log s", "mean log key-down time"),
    "held_std": Descriptor("log s", "standard deviation of log key-down time"),
    "held_q10": Descriptor("log s", "0.1 quantile of log key-down time"),
    "held_q90": Descriptor("log s", "0.9 quantile of log key-down time"),
    "legato_mean": Descriptor(
        "", "key-down time relative to the time until the next chord, at most 4, mean"
    ),
    "legato_q10": Descriptor("", "relative key-down time, 0.1 quantile"),
    "legato_q50": Descriptor("", "relative key-down time, median"),
    "legato_q90": Descriptor("", "relative key-down time, 0.9 quantile"),
    "legato_std": Descriptor("", "relative key-down time, standard deviation"),
    "staccato_share": Descriptor(
        "", "share of notes held for less than half the time until the next chord"
    ),
    "overlap_share": Descriptor("", "share of notes still held when the next chord is struck"),
    "legato_melody": Descriptor("", "relative key-down time of the highest notes, median"),
    "force_of_length": Descriptor("", "correlation of velocity and log key-down time"),
}
_MOST = 4.0  # upper limit, reached for example by a held bass note under a run


def measure(view: View) -> dict[str, float]:
    """The descriptors of ``TABLE``."""
    held = np.log(np.maximum(view.offset - view.onset, SHORTEST))
    until = np.append(view.start, view.offset.max())[view.chord + 1] - view.onset
    legato = np.minimum((view.offset - view.onset) / np.maximum(until, SHORTEST), _MOST)
    low, median, high = np.quantile(legato, (0.1, 0.5, 0.9))
    return {
        "held_mean": held.mean(),
        "held_std": held.std(),
        "held_q10": np.quantile(held, 0.1),
        "held_q90": np.quantile(held, 0.9),
        "legato_mean": legato.mean(),
        "legato_q10": low,
        "legato_q50": median,
        "legato_q90": high,
        "legato_std": legato.std(),
        "staccato_share": (legato < 0.5).mean(),
        "overlap_share": (legato > 1.0).mean(),
        "legato_melody": np.median(legato[view.top]),
        "force_of_length": correlation(view.velocity, held),
    }
