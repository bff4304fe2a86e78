"""How long a rendering is, how it ends, and which performance is too long for one."""

import numpy as np

from percepiano_ast.config import InputError
from percepiano_ast.performance import Performance

TAIL = 1.5  # seconds rendered after the last key release
LONGEST = 3600.0  # seconds: a recital's half; more is a wrong tempo or a stray event, and would fill the memory
_FADE = 0.05  # seconds at the very end, so that a pedalled last chord is not cut with a click


def n_samples(performance: Performance, sample_rate: int) -> int:
    """Samples of a rendering."""
    return int(np.ceil((performance.duration + TAIL) * sample_rate))


def faded(wave: np.ndarray, sample_rate: int) -> np.ndarray:
    """``wave`` with a linear fade over its last ``_FADE`` seconds, in place."""
    fade = round(_FADE * sample_rate)
    wave[-fade:] *= np.linspace(1, 0, fade, dtype=np.float32)
    return wave


def check_length(performance: Performance, name: str) -> None:
    """Refuse to render a performance of more than ``LONGEST`` seconds.

    Raises:
        InputError: it is longer; ``name`` is what the message calls it.
    """
    if performance.duration > LONGEST:
        raise InputError(
            f"{name}: {performance.duration / 3600:.1f} h long; at most {LONGEST / 3600:g} h are rendered. Is its tempo right, "
            "or does a stray note stand far behind the others? Cut it."
        )
