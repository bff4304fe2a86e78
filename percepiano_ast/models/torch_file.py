"""Tensors out of a PyTorch file (``.pth``) without PyTorch, and without running anything that the file asks for.

A file of torch 1.6 or newer is a zip archive of ``data.pkl``, a pickle that describes the tensors, and one raw member
for every storage that they lie in. A pickle may name any function and have it called; this reader knows the few names
that a dictionary of tensors needs, each of which builds an array, and refuses every other one.
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

from percepiano_ast.config import InputError

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


def read(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a saved ``state_dict`` by name, read-only, in the types and strides that they were saved with.

    Raises:
        InputError: no file of torch 1.6 or newer, damaged, no dictionary of tensors, or one that names anything but
            what tensors are made of; nothing of it is run then.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            tensors = _Unpickler(archive, path).load()
    except zipfile.BadZipFile as error:
        raise InputError(_not_a_zip(path, error)) from error
    except (OSError, EOFError, pickle.UnpicklingError, zlib.error, *_OF_A_BROKEN_PICKLE) as error:
        if isinstance(error, InputError):  # it is a ValueError
            raise
        raise InputError(f"{path} is damaged or not written by torch.save ({error}); fetch it again.") from error
    if not isinstance(tensors, dict):
        raise InputError(f"{path} holds a {type(tensors).__name__}; give a file with a state_dict, names and tensors.")
    others = [name for name, value in tensors.items() if not isinstance(value, np.ndarray)]
    if others:
        raise InputError(f"{path} is no state_dict alone, {others[0]!r} in it is no tensor: save the dictionary of weights itself.")
    return dict(tensors)


# What the unpickler raises on bytes that make no sense (documentation of ``pickle.UnpicklingError``).
_OF_A_BROKEN_PICKLE = (AttributeError, LookupError, TypeError, ValueError, OverflowError, MemoryError, RuntimeError)


def _not_a_zip(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        is_pickle = file.read(1) == b"\x80"
    if is_pickle:
        return (
            f"{path} is in the format of torch before 1.6. Save it anew with a newer one: "
            "torch.save(torch.load(old, weights_only=True), new)."
        )
    return f"{path} is no file of torch.save, or half written ({error}); fetch it again."


def _check_sizes(pickled: bytes) -> None:
    """Refuse, with a ValueError, sizes that unpickling would allocate and the pickle does not fill."""
    for opcode, argument, _ in pickletools.genops(pickled):  # checks the lengths of strings itself
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and argument is not None and argument > len(pickled):
            raise ValueError(f"memo {argument} in a pickle of {len(pickled)} bytes")


class _Unpickler(pickle.Unpickler):
    """Unpickler that hands out methods and names only: nothing that a pickle may set on those changes what runs."""

    def __init__(self, archive: zipfile.ZipFile, path: Path):
        roots = [name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise InputError(f"{path} is a zip archive, but torch.save did not write it: it holds no single data.pkl.")
        self._archive, self._root, self._path = archive, roots[0], path
        if f"{self._root}byteorder" in archive.namelist() and archive.read(f"{self._root}byteorder") != b"little":
            raise InputError(f"{path} was written on a big-endian machine; save it anew on another one.")
        self._storages: dict[str, np.ndarray] = {}
        pickled = archive.read(f"{self._root}data.pkl")
        _check_sizes(pickled)
        super().__init__(io.BytesIO(pickled))

    def find_class(self, module: str, name: str):
        """The harmless stand-in for a global that the pickle names."""
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
            f"{self._path} asks for {module}.{name}, which a dictionary of tensors does not need. It was refused and "
            "nothing was run; get the weights from a source that you trust, or as .safetensors."
        )

    def persistent_load(self, pid: tuple) -> str:
        """Read a storage, ``("storage", type, key, device, values)``. The pickle gets its key, never its memory."""
        _, kind, key, _, count = pid
        if key not in self._storages:
            values = np.frombuffer(self._archive.read(f"{self._root}data/{key}"), _STORAGES[kind])
            if len(values) != count:
                raise InputError(f"{self._path}: storage {key} holds {len(values)} values of {count}; fetch it again.")
            self._storages[key] = values
        return key

    def _rebuild_tensor(self, key: str, offset: int, shape: tuple, strides: tuple, *_requires_grad_and_hooks) -> np.ndarray:
        """A view of a storage. Strides count values; what they reach is checked, for NumPy does not."""
        storage = self._storages[key]
        reach = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if min((offset, *shape, *strides)) < 0 or (0 not in shape and reach >= len(storage)):
            raise InputError(f"{self._path}: a tensor of shape {shape} reaches out of its storage; fetch it again.")
        if 0 in shape:
            return np.empty(shape, storage.dtype)
        in_bytes = tuple(stride * storage.itemsize for stride in strides)
        return np.lib.stride_tricks.as_strided(storage[offset:], shape, in_bytes, writeable=False)

    def _rebuild_parameter(self, data: np.ndarray, *_requires_grad_and_hooks) -> np.ndarray:
        """A parameter is its tensor."""
        return data
