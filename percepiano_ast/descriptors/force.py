"""Velocity descriptors: level, spread, contour over time, voicing. MIDI velocities, 1 to 127.

Voicing: Goebl (2001), "Melody lead in piano performance: expressive device or artifact?", JASA
110(1).
"""

import numpy as np

from percepiano_ast.descriptors.view import Descriptor, View, correlation, mean

_PHRASE = 1.5  # seconds; standard deviation of the Gaussian kernel for the velocity contour

TABLE = {
    "velocity_mean": Descriptor("velocity", "mean velocity"),
    "velocity_std": Descriptor("velocity", "standard deviation of velocity"),
    "velocity_q10": Descriptor("velocity", "0.1 quantile of velocity"),
    "velocity_q50": Descriptor("velocity", "median velocity"),
    "velocity_q90": Descriptor("velocity", "0.9 quantile of velocity"),
    "velocity_max": Descriptor("velocity", "maximum velocity"),
    "velocity_skew": Descriptor("", "skewness of velocity; 0 if constant"),
    "velocity_contour": Descriptor(
        "velocity",
        "standard deviation of the velocity smoothed over phrases (crescendo, diminuendo)",
    ),
    "velocity_contour_range": Descriptor("velocity", "range of the smoothed velocity"),
    "velocity_trend": Descriptor(
        "velocity", "change of velocity from the first to the last note, linear fit"
    ),
    "velocity_accents": Descriptor(
        "velocity", "standard deviation of chord velocity minus smoothed velocity"
    ),
    "velocity_steps": Descriptor(
        "velocity", "mean absolute change of velocity from one chord to the next"
    ),
    "velocity_of_pitch": Descriptor("", "correlation of velocity and pitch"),
    "voicing_std": Descriptor("velocity", "standard deviation of velocity within chords"),
    "voicing_melody": Descriptor(
        "velocity",
        "velocity of the highest notes of chords minus that of the others; 0 without chords",
    ),
    "voicing_bass": Descriptor(
        "velocity",
        "velocity of the lowest notes of chords minus that of the others; 0 without chords",
    ),
    "melody_std": Descriptor("velocity", "standard deviation of the melody's velocity"),
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
        "velocity_skew": (
            ((velocity - velocity.mean()) ** 3).mean() / spread**3 if spread > 1e-9 else 0.0
        ),
        "velocity_contour": course.std(),
        "velocity_contour_range": np.ptp(course),
        "velocity_trend": (
            correlation(time, velocity) * spread / time.std() if len(time) > 1 else 0.0
        ),
        "velocity_accents": (chord - course).std(),
        "velocity_steps": mean(np.abs(np.diff(chord))),
        "velocity_of_pitch": correlation(velocity, view.pitch),
        "voicing_std": np.sqrt(mean(inner[view.together] ** 2)),
        "voicing_melody": _over_others(view, view.top),
        "voicing_bass": _over_others(view, view.bottom),
        "melody_std": velocity[view.top].std(),
    }


def _smoothed(time: np.ndarray, values: np.ndarray) -> np.ndarray:
    """``values`` (n,) at ``time`` averaged with a Gaussian kernel."""
    weights = np.exp(-0.5 * ((time[:, None] - time) / _PHRASE) ** 2)
    return weights @ values / weights.sum(axis=1)


def _over_others(view: View, voice: np.ndarray) -> float:
    """Mean velocity of one voice of chords minus that of the other notes."""
    return mean(view.velocity[view.together & voice]) - mean(view.velocity[view.together & ~voice])
