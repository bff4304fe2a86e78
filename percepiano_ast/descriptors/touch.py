"""How long keys are held: staccato to legato. Key overlap after Bresin and Battel (2000), J. New Music Research 29(3)."""

import numpy as np

from percepiano_ast.descriptors.view import SHORTEST, Descriptor, View, correlation

TABLE = {
    "held_mean": Descriptor("log s", "mean logarithm of how long keys are held"),
    "held_std": Descriptor("log s", "deviation of that logarithm"),
    "held_q10": Descriptor("log s", "logarithm of the time that a tenth of the keys are held for less"),
    "held_q90": Descriptor("log s", "logarithm of the time that a tenth of the keys are held for more"),
    "legato_mean": Descriptor("", "time a key is held relative to the time until the next chord, at most 4; mean"),
    "legato_q10": Descriptor("", "the same, what a tenth of the notes stay below"),
    "legato_q50": Descriptor("", "the same, median"),
    "legato_q90": Descriptor("", "the same, what a tenth of the notes exceed"),
    "legato_std": Descriptor("", "the same, deviation"),
    "staccato_share": Descriptor("", "share of notes held for less than half the time until the next chord"),
    "overlap_share": Descriptor("", "share of notes still held when the next chord is struck"),
    "legato_melody": Descriptor("", "legato of the highest notes, median"),
    "force_of_length": Descriptor("", "correlation of force and of the time a key is held"),
}
_MOST = 4.0  # a held bass note under a run tells no more than this


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
