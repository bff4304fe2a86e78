"""Listen to a piano performance and say how it is played: AST, SSAST and PercePiano in JAX."""

import importlib
import os
import warnings
from importlib import metadata

__version__ = "0.1.0"

_MENDED_IN = (0, 8, 2)


def _leave_out_xnnpack() -> None:
    """Have XLA multiply matrices on a CPU without XNNPACK where jaxlib's use of it is wrong (0.7.2 to 0.8.1).

    There it keeps a packed copy of a matrix by its address alone. A weight that a step updates in place, as donated states are,
    is multiplied by as it was some steps ago: training goes wrong without a word. XLA reads the flag when it first computes, so
    this package is imported before anything is computed.
    """
    try:
        version = tuple(int(part) for part in metadata.version("jaxlib").split(".")[:3])
    except (metadata.PackageNotFoundError, ValueError):  # no JAX yet, as in workers that only read; or one built from source
        return
    flags = os.environ.get("XLA_FLAGS", "")
    if version < _MENDED_IN and "xla_cpu_use_xnnpack" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_xnnpack=false".strip()


_leave_out_xnnpack()
# librosa brings tqdm, which warns in red in a notebook without widgets; progress here is text.
warnings.filterwarnings("ignore", message="IProgress not found")

_LATER = {"rate": "rate_file", "Stream": "Stream"}


def __getattr__(name: str):
    """``percepiano_ast.rate`` is `recording.rate_file`, ``Stream`` its live form: loaded when asked for, for they bring JAX."""
    if name in _LATER:
        return getattr(importlib.import_module("percepiano_ast.recording"), _LATER[name])
    raise AttributeError(f"module 'percepiano_ast' has no attribute {name!r}")
