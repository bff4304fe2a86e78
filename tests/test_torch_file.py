"""Files of PyTorch, read without it: what is in them, what they may not ask for, published
geometries. About 8 s.

Tests marked ``peer`` read what ``torch.save`` wrote.
"""

import collections
import dataclasses
import io
import os
import pickle
import sys
import types
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_convert import assert_equal, params_of, shapes_of

from percepiano_ast.config import AUDIOSET, KALDI, MODELS, ModelConfig
from percepiano_ast.errors import InputError
from percepiano_ast.models import torch_file, weights


class Tensor:
    """Pickles as a tensor in torch's form: a view of storage ``key`` of ``count`` values."""

    def __init__(
        self,
        key: str,
        count: int,
        shape: tuple,
        strides: tuple,
        kind: str = "FloatStorage",
        offset: int = 0,
    ):
        self.key, self.count, self.kind = key, count, kind
        self.view = (offset, shape, strides, False, collections.OrderedDict())

    def __reduce__(self):
        return sys.modules["torch._utils"]._rebuild_tensor_v2, (
            Storage(self.key, self.count, self.kind),
            *self.view,
        )


@dataclasses.dataclass
class Storage:
    """What a tensor lies in."""

    key: str
    count: int
    kind: str


class Pickler(pickle.Pickler):
    """Refers to storages as torch does."""

    def persistent_id(self, item):
        if isinstance(item, Storage):
            return (
                "storage",
                getattr(sys.modules["torch"], item.kind),
                item.key,
                "cuda:0",
                item.count,
            )
        return None


@pytest.fixture
def write_torch(tmp_path, monkeypatch):
    """Writes files as torch.save does, without torch: names of its functions are all that goes into
    a file."""
    utils, torch = types.ModuleType("torch._utils"), types.ModuleType("torch")
    for module, names in (
        (utils, ["_rebuild_tensor_v2"]),
        (torch, ["FloatStorage", "HalfStorage", "LongStorage"]),
    ):
        for name in names:
            setattr(module, name, type(name, (), {"__module__": module.__name__}))
        monkeypatch.setitem(sys.modules, module.__name__, module)

    def write(content, storages: dict[str, np.ndarray], name: str = "file.pth") -> Path:
        pickled = io.BytesIO()
        Pickler(pickled, protocol=2).dump(content)
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("archive/data.pkl", pickled.getvalue())
            for key, values in storages.items():
                archive.writestr(f"archive/data/{key}", values.tobytes())
        return tmp_path / name

    return write


class Call:
    """Pickles as a call of any function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


class TestTorchFile:
    """The reader of .pth that runs nothing."""

    def test_views_of_storages(self, write_torch):
        values = np.arange(24, dtype=np.float32)
        content = collections.OrderedDict(
            whole=Tensor("0", 24, (4, 6), (6, 1)),
            transposed=Tensor("0", 24, (6, 4), (1, 6)),
            inner=Tensor("0", 24, (2, 3), (12, 2), offset=3),
            expanded=Tensor("0", 24, (5, 2), (0, 1)),
            empty=Tensor("0", 24, (0, 3), (3, 1)),
            half=Tensor("1", 2, (2,), (1,), "HalfStorage"),
            count=Tensor("2", 1, (), (), "LongStorage"),
        )
        storages = {"0": values, "1": np.float16([0.5, -2]), "2": np.array([128])}
        read = torch_file.read(write_torch(content, storages))
        np.testing.assert_array_equal(read["whole"], values.reshape(4, 6))
        np.testing.assert_array_equal(read["transposed"], values.reshape(4, 6).T)
        np.testing.assert_array_equal(read["inner"], [[3, 5, 7], [15, 17, 19]])
        np.testing.assert_array_equal(read["expanded"], [[0, 1]] * 5)
        assert read["empty"].shape == (0, 3) and read["count"] == 128
        assert read["half"].dtype == np.float16 and read["half"].tolist() == [0.5, -2]

    @pytest.mark.parametrize(
        "function, name",
        [
            (os.system, "system"),
            (eval, "eval"),
            (getattr, "getattr"),
            (pickle.loads, "loads"),
            (np.dtype, "dtype"),
        ],
    )
    def test_a_pickle_that_calls_is_refused_and_not_run(
        self, write_torch, tmp_path, function, name
    ):
        trace = tmp_path / "ran"
        path = write_torch({"v.norm.bias": Call(function, f"touch {trace}")}, {})
        with pytest.raises(InputError, match=rf"asks for \w+\.{name}, .*no code was executed"):
            torch_file.read(path)
        with pytest.raises(InputError, match=f"asks for .*{name}"):
            weights.read_weights(path)
        assert not trace.exists()

    @pytest.mark.parametrize(
        "tensor",
        [
            Tensor("0", 4, (5,), (1,)),
            Tensor("0", 4, (2, 2), (3, 1)),
            Tensor("0", 4, (2,), (-1,), offset=3),
            Tensor("0", 4, (1,), (1,), offset=4),
            Tensor("0", 4, (10**30,), (0,)),
        ],
    )
    def test_no_tensor_reaches_out_of_its_storage(self, write_torch, tensor):
        with pytest.raises(InputError, match="download it again"):
            torch_file.read(write_torch({"a": tensor}, {"0": np.zeros(4, np.float32)}))

    def test_a_view_is_no_storage(self, write_torch):
        class View(Tensor):
            """A view of an expanded view, which NumPy would let reach anywhere."""

            def __reduce__(self):
                function, (_, *view) = super().__reduce__()
                return function, (Tensor("0", 1, (10**6,), (0,)), *view)

        with pytest.raises(InputError, match="damaged"):
            torch_file.read(
                write_torch({"a": View("0", 1, (10**6,), (1,))}, {"0": np.zeros(1, np.float32)})
            )

    def test_a_pickle_that_asks_for_memory_is_refused(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "file.pth", "w") as archive:
            # a memo of 2**31 places
            archive.writestr("archive/data.pkl", b"\x80\x02}r\xff\xff\xff\x7f.")
        with pytest.raises(
            InputError, match="damaged or not written by torch.save .memo 2147483647"
        ):
            torch_file.read(tmp_path / "file.pth")

    def test_other_files_are_refused(self, write_torch, tmp_path):
        zeros = {"0": np.zeros(4, np.float32)}
        tensor = Tensor("0", 4, (4,), (1,))
        for content, storages, message in (
            ({"a": tensor}, {"0": zeros["0"][:2]}, "holds 2 values instead of 4"),
            ({"a": tensor}, {}, "damaged"),
            ({"model": {"a": tensor}, "epoch": 3}, zeros, "'model' is not a tensor"),
            ([tensor], zeros, "holds a list"),
        ):
            with pytest.raises(InputError, match=message):
                torch_file.read(write_torch(content, storages))
        path = tmp_path / "other.pth"
        for content, message in (
            (
                b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
                "format of torch before 1.6.*weights_only=True",
            ),
            (b"<html>404</html>", "incomplete or not written by torch.save"),
            (b"", "incomplete or not written by torch.save"),
            (
                write_torch({"a": tensor}, zeros).read_bytes()[:-30],
                "incomplete or not written by torch.save",
            ),
        ):
            path.write_bytes(content)
            with pytest.raises(InputError, match=message):
                torch_file.read(path)
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("word/document.xml", "")
        with pytest.raises(InputError, match="is a zip archive, but not written by torch.save"):
            torch_file.read(path)


BASE = MODELS["base"]
THIN = dataclasses.replace(BASE, depth=1, name="custom")
GEOMETRIES = [
    ("ast", dataclasses.replace(BASE, stride=(10, 10)), (12, 101)),
    ("ast", dataclasses.replace(THIN, stride=(12, 12)), (10, 85)),
    ("ast", dataclasses.replace(THIN, stride=(14, 14)), (9, 73)),
    ("ast", THIN, (8, 64)),
    ("ast", dataclasses.replace(THIN, n_frames=128, stride=(10, 10)), (12, 12)),
    ("ast", dataclasses.replace(THIN, n_frames=512, stride=(10, 10)), (12, 50)),
    ("ssast_finetune", dataclasses.replace(MODELS["tiny"], stride=(10, 10)), (12, 101)),
    ("ssast_pretrain", MODELS["small"], (8, 64)),
    ("ssast_pretrain", dataclasses.replace(THIN, patch_size=(128, 2), stride=(128, 2)), (1, 512)),
    ("ssast_pretrain", dataclasses.replace(MODELS["tiny"], n_frames=256), (8, 16)),
]


class TestGeometry:
    """Published files, which say nothing of their geometry."""

    @staticmethod
    def write(write_torch, kind: str, config: ModelConfig) -> Path:
        """A file of the size that the authors publish, but all of its tensors lie in one zero."""
        blank = jax.tree.map(
            lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes_of(kind, config)
        )
        shapes = {
            name: value.shape
            for name, value in weights.to_torch(blank, kind, config.patch_size).items()
        }
        if kind == "ast":
            del shapes["mask_embed"]
        content = {
            f"module.{name}": Tensor("0", 1, shape, (0,) * len(shape))
            for name, shape in shapes.items()
        }
        storages = {"0": np.zeros(1, np.float32)}
        if kind == "ssast_pretrain":
            for name, size in (("p_input_fdim", config.n_mels), ("p_input_tdim", config.n_frames)):
                content[f"module.{name}"] = Tensor(name, 1, (), (), "LongStorage")
                storages[name] = np.array([size])
        return write_torch(content, storages)

    @pytest.mark.parametrize("kind, config, grid", GEOMETRIES)
    def test_published_sizes_are_recognised(self, write_torch, kind, config, grid):
        read = weights.read_weights(self.write(write_torch, kind, config))
        assert (read.kind, read.config, read.config.grid) == (kind, config, grid)
        assert (read.front_end, read.statistics) == (KALDI, AUDIOSET)
        assert len(read.params["encoder"]["blocks"]["norm1"]["scale"]) == config.depth

    @pytest.mark.parametrize(
        "config, message",
        [
            (dataclasses.replace(THIN, n_frames=1000), "has 496 positions for patches of .16, 16."),
            (
                dataclasses.replace(THIN, width=100, num_heads=4),
                "the width of .* is 100, not a multiple of 64",
            ),
        ],
    )
    def test_what_cannot_be_told_is_refused(self, write_torch, config, message):
        with pytest.raises(InputError, match=message):
            weights.read_weights(self.write(write_torch, "ast", config))


class TestPeer:
    """PyTorch's own files. Run with ``-m peer`` where it is installed."""

    pytestmark = pytest.mark.peer

    def test_files_of_torch(self, tmp_path):
        import torch

        base = torch.arange(24.0).reshape(4, 6)
        tensors = {
            "transposed": base.T,
            "shared": base[1:3, ::2],
            "whole": base,
            "half": base.half(),
            "bf16": base.bfloat16(),
            "count": torch.tensor(128),
            "double": base.double(),
            "bool": base > 3,
            "expanded": base[0].expand(3, 6),
            "parameter": torch.nn.Parameter(base[2]),
            "empty": base[:0],
        }
        torch.save(tensors, tmp_path / "t.pth")
        read = torch_file.read(tmp_path / "t.pth")
        assert read.keys() == tensors.keys()
        for name, value in tensors.items():
            np.testing.assert_array_equal(
                np.float64(read[name]), value.detach().double().numpy(), strict=True
            )
        assert read["half"].dtype == np.float16 and read["bf16"].dtype == jnp.bfloat16
        torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
        with pytest.raises(InputError, match="before 1.6"):
            torch_file.read(tmp_path / "old.pth")
        torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
        with pytest.raises(InputError, match="asks for torch.nn.modules.linear.Linear"):
            torch_file.read(tmp_path / "module.pth")

    @pytest.mark.parametrize("half", [False, True])
    def test_a_published_checkpoint(self, tmp_path, half):
        """A module of the published names, saved through nn.DataParallel as its authors do."""
        import torch

        config = dataclasses.replace(MODELS["tiny"], depth=2, name="custom")
        tensors = weights.to_torch(
            params_of("ssast_pretrain", config), "ssast_pretrain", config.patch_size
        )
        sizes = {"p_input_fdim": np.array(config.n_mels), "p_input_tdim": np.array(config.n_frames)}
        model = torch.nn.Module()
        for name, value in (tensors | sizes).items():
            *parts, leaf = name.split(".")
            module = model
            for part in parts:
                if part not in module._modules:
                    module.add_module(part, torch.nn.Module())
                module = module._modules[part]
            tensor = torch.from_numpy(np.asarray(value, order="C"))
            tensor = tensor.half() if half and tensor.is_floating_point() else tensor
            module.register_parameter(leaf, torch.nn.Parameter(tensor, requires_grad=False))
        torch.save(torch.nn.DataParallel(model).state_dict(), tmp_path / "SSAST.pth")
        read = weights.read_weights(tmp_path / "SSAST.pth")
        assert (read.kind, read.config) == ("ssast_pretrain", config)
        expected = params_of("ssast_pretrain", config)
        if half:
            expected = jax.tree.map(
                lambda leaf: leaf.astype(np.float16).astype(np.float32), expected
            )
        assert_equal(read.params, expected)
