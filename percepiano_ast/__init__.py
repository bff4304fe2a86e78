"""Rate how a piano performance is played: AST, SSAST and PercePiano in JAX.

>>> import percepiano_ast
>>> rating = percepiano_ast.rate("take.m4a")  # or a list, a file object, an array and its rate
>>> rating.ratings["timing_stable_unstable"], rating.warnings
>>> print(rating)  # the most distinctive ratings; in a notebook, a card with all
>>> model = percepiano_ast.load_model("runs/mine")  # your own; by default the bundled model
>>> model.rate(["one.wav", "other.wav"])
>>> percepiano_ast.Stream(44_100).push(block)  # live sound, rated every second
"""

import importlib
import os
import warnings
from importlib import metadata

__version__ = "0.2.0"

_MENDED_IN = (0, 8, 2)


def _leave_out_xnnpack() -> None:
    """Have XLA multiply matrices on a CPU without XNNPACK where jaxlib's use of it is wrong (0.7.2
    to 0.8.1).

    XNNPACK there caches a packed copy of a matrix by its address. A weight that is updated in
    place, as donated states are, is then multiplied in an outdated version, and training goes wrong
    without an error. XLA reads the flag at its first computation, so this package must be imported
    before.
    """
    try:
        version = tuple(int(part) for part in metadata.version("jaxlib").split(".")[:3])
    # no JAX, as in workers that only read files; or a build from source
    except (metadata.PackageNotFoundError, ValueError):
        return
    flags = os.environ.get("XLA_FLAGS", "")
    if version < _MENDED_IN and "xla_cpu_use_xnnpack" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_xnnpack=false".strip()


_leave_out_xnnpack()
# librosa imports tqdm, which warns in a notebook without widgets; progress here is text.
warnings.filterwarnings("ignore", message="IProgress not found")

# Imported on first use, because they import JAX.
_LATER = {"Rating": "rating", "Stream": "stream", "load_model": "rate", "rate": "rate"}
__all__ = ["Rating", "Stream", "load_model", "rate"]


def __getattr__(name: str):
    if name in _LATER:
        module = importlib.import_module(f"percepiano_ast.inference.{_LATER[name]}")
        return getattr(module, name)
    raise AttributeError(f"module 'percepiano_ast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
