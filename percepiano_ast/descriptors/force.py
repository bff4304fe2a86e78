"""How hard the keys are struck: level, spread, course over time, voicing. Velocities are MIDI's, 1 to 127.

Voicing after Goebl (2001), "Melody lead in piano performance: expressive device or artifact?", JASA 110(1).
"""

import numpy as np

from percepiano_ast.descriptors.view import Descriptor, View, correlation, mean

_PHRASE = 1.5  # seconds, standard deviation of the bell that the course of force is smoothed by

TABLE = {
    "velocity_mean": Descriptor("velocity", "mean force of the notes"),
    "velocity_std": Descriptor("velocity", "deviation of the notes' force"),
    "velocity_q10": Descriptor("velocity", "force that a tenth of the notes stay below"),
    "velocity_q50": Descriptor("velocity", "median force"),
    "velocity_q90": Descriptor("velocity", "force that a tenth of the notes exceed"),
    "velocity_max": Descriptor("velocity", "force of the hardest note"),
    "velocity_skew": Descriptor("", "skewness of the notes' force; 0 where all are equal"),
    "velocity_contour": Descriptor("velocity", "deviation of the force smoothed over phrases: crescendo, diminuendo"),
    "velocity_contour_range": Descriptor("velocity", "range of the smoothed force"),
    "velocity_trend": Descriptor("velocity", "rise of force from the first to the last note, by a straight line"),
    "velocity_accents": Descriptor("velocity", "deviation of chords' force from the smoothed force"),
    "velocity_steps": Descriptor("velocity", "mean change of force from one chord to the next"),
    "velocity_of_pitch": Descriptor("", "correlation of force and pitch"),
    "voicing_std": Descriptor("velocity", "deviation of force within chords"),
    "voicing_melody": Descriptor("velocity", "force of the highest note of chords over the others; 0 without chords"),
    "voicing_bass": Descriptor("velocity", "force of the lowest note of chords over the others; 0 without chords"),
    "melody_std": Descriptor("velocity", "deviation of the melody's force"),
}


def measure(view: View) -> dict[str, float]:
    """The descriptors of ``TABLE``."""
    velocity, spread = view.velocity, view.velocity.std()
    low, median, high = np.quantile(velocity, (0.1, 0.5, 0.9))
    chord = view.mean_of_chords(velocity)
    course = _smoothed(view.start, chord)
    time = np.linspace(0, 1, len(velocity))
    inner = velocity - chord[view.chord]
    return {
        "velocity_mean": velocity.mean(),
        "velocity_std": spread,
        "velocity_q10": low,
        "velocity_q50": median,
        "velocity_q90": high,
        "velocity_max": velocity.max(),
        "velocity_skew": ((velocity - velocity.mean()) ** 3).mean() / spread**3 if spread > 1e-9 else 0.0,
        "velocity_contour": course.std(),
        "velocity_contour_range": np.ptp(course),
        "velocity_trend": correlation(time, velocity) * spread / time.std() if len(time) > 1 else 0.0,
        "velocity_accents": (chord - course).std(),
        "velocity_steps": mean(np.abs(np.diff(chord))),
        "velocity_of_pitch": correlation(velocity, view.pitch),
        "voicing_std": np.sqrt(mean(inner[view.together] ** 2)),
        "voicing_melody": _over_others(view, view.top),
        "voicing_bass": _over_others(view, view.bottom),
        "melody_std": velocity[view.top].std(),
    }


def _smoothed(time: np.ndarray, values: np.ndarray) -> np.ndarray:
    """``values`` (n,) at ``time`` averaged under a bell."""
    weights = np.exp(-0.5 * ((time[:, None] - time) / _PHRASE) ** 2)
    return weights @ values / weights.sum(axis=1)


def _over_others(view: View, voice: np.ndarray) -> float:
    """Mean force of one voice of chords less that of the rest."""
    return mean(view.velocity[view.together & voice]) - mean(view.velocity[view.together & ~voice])
