"""Length of a rendering, its final fade, and the maximum length of a performance."""

import numpy as np

from percepiano_ast.errors import InputError
from percepiano_ast.performance import Performance

TAIL = 1.5  # seconds rendered after the last key release
# seconds; more indicates a wrong tempo or a stray event, and would exhaust the memory
LONGEST = 3600.0
_FADE = 0.05  # seconds at the end, to avoid a click if the last chord is pedalled


def n_samples(performance: Performance, sample_rate: int) -> int:
    """Number of samples of a rendering."""
    return int(np.ceil((performance.duration + TAIL) * sample_rate))


def faded(wave: np.ndarray, sample_rate: int) -> np.ndarray:
    """``wave`` with a linear fade over its last ``_FADE`` seconds, in place."""
    fade = round(_FADE * sample_rate)
    wave[-fade:] *= np.linspace(1, 0, fade, dtype=np.float32)
    return wave


def check_length(performance: Performance, name: str) -> None:
    """Refuse to render a performance of more than ``LONGEST`` seconds.

    Raises:
        InputError: it is longer; the message starts with ``name``.
    """
    if performance.duration > LONGEST:
        raise InputError(
            f"{name}: {performance.duration / 3600:.1f} h long; the limit is {LONGEST / 3600:g} h."
            " Check its tempo, and remove stray notes at its end."
        )
