"""Read tensors from a PyTorch file (``.pth``) without PyTorch, and without executing code from the
file.

A file of torch 1.6 or newer is a zip archive of ``data.pkl``, a pickle that describes the tensors,
and one raw member per storage. A pickle can call any function by name; this reader allows only the
few names of a dictionary of tensors, and maps them to functions that build arrays.
"""

import io
import pickle
import pickletools
import zipfile
import zlib
from collections import OrderedDict
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from percepiano_ast.errors import InputError

_STORAGES: dict[str, np.dtype] = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}
# Exceptions of the unpickler on invalid bytes (documentation of ``pickle.UnpicklingError``).
_BROKEN = (AttributeError, LookupError, TypeError, ValueError, OverflowError, MemoryError)


def read(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a saved ``state_dict`` by name, read-only, with their saved types and strides.

    Raises:
        InputError: not a file of torch 1.6 or newer, damaged, not a dictionary of tensors, or a
            pickle with other names than those of tensors; its code is not executed.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            tensors = _Unpickler(archive, path).load()
    except zipfile.BadZipFile as error:
        with path.open("rb") as file:
            is_pickle = file.read(1) == b"\x80"
        raise InputError(
            f"{path} is in the format of torch before 1.6. Save it again with a newer version: "
            "torch.save(torch.load(old, weights_only=True), new)."
            if is_pickle
            else f"{path} is incomplete or not written by torch.save ({error}); download it again."
        ) from error
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, zlib.error, *_BROKEN) as error:
        if isinstance(error, InputError):  # it is a ValueError
            raise
        raise InputError(
            f"{path} is damaged or not written by torch.save ({error}); download it again."
        ) from error
    if not isinstance(tensors, dict):
        raise InputError(
            f"{path} holds a {type(tensors).__name__}; give a file with a state_dict of names and"
            " tensors."
        )
    others = [name for name, value in tensors.items() if not isinstance(value, np.ndarray)]
    if others:
        raise InputError(
            f"{path} is not a plain state_dict: {others[0]!r} is not a tensor. Save only the"
            " dictionary of weights."
        )
    return dict(tensors)


class _Unpickler(pickle.Unpickler):
    """Unpickler that exposes only methods and names, so that attributes set by a pickle cannot
    change the executed code."""

    def __init__(self, archive: zipfile.ZipFile, path: Path):
        names = archive.namelist()
        roots = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise InputError(
                f"{path} is a zip archive, but not written by torch.save: it does not hold exactly"
                " one data.pkl."
            )
        self._archive, self._root, self._path = archive, roots[0], path
        byteorder = f"{self._root}byteorder"
        if byteorder in names and archive.read(byteorder) != b"little":
            raise InputError(
                f"{path} was written on a big-endian machine; save it again on a little-endian one."
            )
        self._storages: dict[str, np.ndarray] = {}
        pickled = archive.read(f"{self._root}data.pkl")
        for opcode, argument, _ in pickletools.genops(pickled):  # checks the lengths of strings
            is_memo = opcode.name in ("PUT", "BINPUT", "LONG_BINPUT")
            if is_memo and argument is not None and argument > len(pickled):
                # unpickling would allocate it
                raise ValueError(f"memo {argument} in a pickle of {len(pickled)} bytes")
        super().__init__(io.BytesIO(pickled))

    def find_class(self, module: str, name: str):
        """The safe replacement for a global named in the pickle."""
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): self._rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): self._rebuild_parameter,
        }
        if (module, name) in known:
            return known[module, name]
        if module == "torch" and name in _STORAGES:
            return name
        raise InputError(
            f"{self._path} asks for {module}.{name}, which a dictionary of tensors does not need."
            " It was rejected and no code was executed; get the weights from a trusted source, or"
            " as .safetensors."
        )

    def persistent_load(self, pid: tuple) -> str:
        """Read a storage, ``("storage", type, key, device, values)``. The pickle gets its key, not
        its memory."""
        _, kind, key, _, count = pid
        if key not in self._storages:
            values = np.frombuffer(self._archive.read(f"{self._root}data/{key}"), _STORAGES[kind])
            if len(values) != count:
                raise InputError(
                    f"{self._path}: storage {key} holds {len(values)} values instead of {count};"
                    " download it again."
                )
            self._storages[key] = values
        return key

    def _rebuild_tensor(
        self, key: str, offset: int, shape: tuple, strides: tuple, *_requires_grad_and_hooks
    ) -> np.ndarray:
        """A view of a storage, with strides in values. Bounds are checked here, because NumPy does
        not check them."""
        storage = self._storages[key]
        reach = offset + sum(
            (size - 1) * stride for size, stride in zip(shape, strides, strict=True)
        )
        if min((offset, *shape, *strides)) < 0 or (0 not in shape and reach >= len(storage)):
            raise InputError(
                f"{self._path}: a tensor of shape {shape} exceeds its storage; download it again."
            )
        if 0 in shape:
            return np.empty(shape, storage.dtype)
        in_bytes = tuple(stride * storage.itemsize for stride in strides)
        return np.lib.stride_tricks.as_strided(storage[offset:], shape, in_bytes, writeable=False)

    def _rebuild_parameter(self, data: np.ndarray, *_requires_grad_and_hooks) -> np.ndarray:
        """The parameter's tensor."""
        return data
