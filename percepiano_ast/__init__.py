"""Rate how a piano performance is played: AST, SSAST and PercePiano in JAX.

``percepiano_ast.load_model().rate("take.m4a")`` rates a recording by the bundled model.
"""

import importlib
import os
import warnings
from importlib import metadata

__version__ = "0.1.0"

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

_LATER = {"rate": "rate_file", "load_model": "load_model", "Stream": "Stream", "Rating": "Rating"}


def __getattr__(name: str):
    """``rate``, ``load_model``, ``Stream``, ``Rating``: from `inference`, on first use because it
    imports JAX."""
    if name in _LATER:
        return getattr(importlib.import_module("percepiano_ast.inference"), _LATER[name])
    raise AttributeError(f"module 'percepiano_ast' has no attribute {name!r}")
