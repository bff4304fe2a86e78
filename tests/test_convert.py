"""Published weights in and out: names, files that we write, Hugging Face's, .pth, foreign
geometries. About 15 s.

Tests marked ``peer`` need PyTorch and transformers.
"""

import dataclasses
import functools
import json
import os
import pickle
import re
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from percepiano_ast.cli import main
from percepiano_ast.config import AUDIOSET, KALDI, MODELS, FrontEnd, LevelStats, ModelConfig
from percepiano_ast.errors import InputError
from percepiano_ast.files import write_tensors
from percepiano_ast.models import ast, ssast, weights

SMALL = ModelConfig("custom", width=64, depth=2, num_heads=1, n_mels=32, n_frames=96)


def shapes_of(kind: str, config: ModelConfig = SMALL, labels: int = 3) -> dict:
    log_mel = jnp.zeros((1, config.n_frames, config.n_mels))
    if kind == "ssast_pretrain":
        arguments = (ssast.SSAST(config), log_mel, jnp.zeros((1, 1), jnp.int32))
    else:
        arguments = (ast.Classifier(config, labels), log_mel)
    return jax.eval_shape(arguments[0].init, jax.random.key(0), *arguments[1:])["params"]


@functools.cache
def params_of(kind: str, config: ModelConfig = SMALL) -> dict:
    """Random parameters; those that the published model of this kind does not have are zero."""
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes_of(kind, config)
    )
    if kind == "hf_ast":
        params["encoder"]["mask_embed"][:] = 0
    return params


def assert_equal(params: dict, expected: dict) -> None:
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}


class TestNames:
    """Dictionaries of arrays."""

    @pytest.mark.parametrize("kind", weights.KINDS)
    def test_round_trip_is_exact(self, kind):
        tensors = weights.to_torch(params_of(kind), kind, SMALL.patch_size)
        assert_equal(weights.from_torch(tensors, kind), params_of(kind))
        again = weights.to_torch(weights.from_torch(tensors, kind), kind, SMALL.patch_size)
        assert again.keys() == tensors.keys()
        assert all(np.array_equal(again[name], tensors[name]) for name in tensors)

    def test_published_form(self):
        tensors = weights.to_torch(params_of("ssast_pretrain"), "ssast_pretrain", SMALL.patch_size)
        blocks = params_of("ssast_pretrain")["encoder"]["blocks"]
        assert tensors["v.patch_embed.proj.weight"].shape == (64, 1, 16, 16)
        np.testing.assert_array_equal(
            tensors["v.blocks.1.attn.qkv.weight"], blocks["attention"]["qkv"]["kernel"][1].T
        )
        unused = {"v.head.weight": np.zeros(1), "p_input_fdim": np.zeros(())}
        parallel = {f"module.{name}": value for name, value in (tensors | unused).items()}
        assert_equal(weights.from_torch(parallel, "ssast_pretrain"), params_of("ssast_pretrain"))

    def test_hugging_face_names_of_version_5_in_memory(self):
        tensors = weights.to_torch(params_of("hf_ast"), "hf_ast", SMALL.patch_size)
        prefix = "audio_spectrogram_transformer."
        assert f"{prefix}encoder.layer.1.attention.attention.key.bias" in tensors
        spelling = {
            "encoder.layer.": "layers.",
            "attention.attention.query": "attention.q_proj",
            "output.dense": "mlp.fc2",
            "attention.attention.key": "attention.k_proj",
            "attention.attention.value": "attention.v_proj",
            "attention.mlp.fc2": "attention.o_proj",
            "intermediate.dense": "mlp.fc1",
        }
        for old, new in spelling.items():
            tensors = {name.replace(old, new): value for name, value in tensors.items()}
        assert f"{prefix}layers.0.attention.o_proj.weight" in tensors
        assert_equal(weights.from_torch(tensors, "hf_ast"), params_of("hf_ast"))

    @pytest.mark.parametrize("kind", ["ssast_finetune", "ast"])
    def test_mask_token_is_zero_where_none_is_published(self, kind):
        tensors = weights.to_torch(params_of(kind), kind, SMALL.patch_size)
        del tensors["mask_embed"]
        assert not weights.from_torch(tensors, kind)["encoder"]["mask_embed"].any()

    def test_wrong_weights_are_refused(self):
        tensors = weights.to_torch(params_of("ssast_pretrain"), "ssast_pretrain", SMALL.patch_size)
        with pytest.raises(InputError, match="missing .'cpredlayer.0.bias'"):
            weights.from_torch(
                {k: v for k, v in tensors.items() if k != "cpredlayer.0.bias"}, "ssast_pretrain"
            )
        with pytest.raises(InputError, match="unknown .'v.rogue'"):
            weights.from_torch(tensors | {"v.rogue": np.zeros(1)}, "ssast_pretrain")
        with pytest.raises(
            InputError, match="v.blocks.1.norm1.bias is .3,. and v.blocks.0.norm1.bias .64,."
        ):
            weights.from_torch(tensors | {"v.blocks.1.norm1.bias": np.zeros(3)}, "ssast_pretrain")
        with pytest.raises(InputError, match="Choose one of"):
            weights.from_torch(tensors, "beats")
        with pytest.raises(InputError, match="missing .'mlp_head"):
            weights.from_torch(
                {k: v for k, v in tensors.items() if not k.startswith("v.blocks")}, "ast"
            )

    def test_models_without_a_published_form_are_refused(self):
        decoder = params_of("ssast_pretrain") | {"decoder": {"mask_token": np.zeros((1, 1, 64))}}
        with pytest.raises(
            InputError, match="unknown .'decoder/mask_token'.*as checkpoints of this package"
        ):
            weights.to_torch(decoder, "ssast_pretrain", SMALL.patch_size)
        with pytest.raises(InputError, match="missing .'head/bias'"):
            weights.to_torch({"encoder": params_of("ast")["encoder"]}, "ast", SMALL.patch_size)


class TestOtherModels:
    """Weights that meet another model."""

    def test_first_differing_leaf_is_named(self):
        like = shapes_of("ast", dataclasses.replace(SMALL, width=32))
        wanted = (
            r"encoder/blocks/attention/proj/bias is \(2, 64\) in old\.pth, but \(2, 32\) in the"
            r" model\. Choose the model"
        )
        with pytest.raises(InputError, match=wanted):
            weights.require_same_shapes(params_of("ast"), like, "old.pth")
        weights.require_same_shapes(params_of("ast"), shapes_of("ast"), "old.pth")
        with pytest.raises(
            InputError, match=r"head/bias is missing in old\.pth, but \(3,\) in the model"
        ):
            weights.require_same_shapes(
                {"encoder": params_of("ast")["encoder"]}, shapes_of("ast"), "old.pth"
            )
        with pytest.raises(
            InputError,
            match=r"discriminative/hidden/bias is \(64,\) in old\.pth, but missing in the",
        ):
            weights.require_same_shapes(params_of("ssast_pretrain"), shapes_of("ast"), "old.pth")

    def test_an_encoder_runs_in_another_window_and_stride(self):
        other = dataclasses.replace(SMALL, stride=(10, 10), n_frames=64)
        fitted = weights.adapt_pos_embed(params_of("ast"), SMALL, other)
        weights.require_same_shapes(fitted, shapes_of("ast", other), "weights")
        expected = ast.resize_pos_embed(
            params_of("ast")["encoder"]["pos_embed"], SMALL.grid, other.grid
        )
        np.testing.assert_array_equal(fitted["encoder"]["pos_embed"], expected)
        assert weights.adapt_pos_embed(params_of("ast"), SMALL, SMALL) is params_of("ast")

    def test_what_no_resizing_makes_alike_is_refused(self):
        tall = dataclasses.replace(SMALL, n_mels=128)
        frames = dataclasses.replace(tall, patch_size=(128, 2), stride=(128, 2))
        assert tall.patch_dim == frames.patch_dim  # shapes do not tell these apart
        with pytest.raises(InputError, match=r"patches of \(128, 2\) .* patches of \(16, 16\)"):
            weights.adapt_pos_embed(params_of("ast"), frames, tall)
        wanted = (
            r"encoder/pos_embed is \(1, 14, 64\) for 32 mel bands in the weights, \(1, 50, 64\) for"
            r" 128 in the"
        )
        with pytest.raises(InputError, match=wanted):
            weights.adapt_pos_embed(params_of("ast"), SMALL, tall)


class TestFiles:
    """`weights` on files that this package wrote."""

    @pytest.mark.parametrize("kind", weights.KINDS)
    def test_what_is_written_is_read(self, kind, tmp_path):
        ours = {"front_end": FrontEnd(), "statistics": LevelStats(-20.1, 12.3, 5, 0.0, 0.1)}
        written = weights.Weights(
            params_of(kind),
            SMALL,
            kind,
            description={"licence": "CC0", "steps": 3},
            norm_epsilon=1e-12,
            **({} if kind == "hf_ast" else ours),
        )
        path = weights.write_weights(
            tmp_path / "new" / ("hf" if kind == "hf_ast" else "w.safetensors"), written
        )
        read = weights.read_weights(path)
        assert_equal(read.params, written.params)
        assert dataclasses.replace(read, params={}) == dataclasses.replace(written, params={})
        assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing partial is left
        if kind == "ssast_pretrain":
            assert (
                load_file(path)["p_input_tdim"].shape == ()
                and load_file(path)["p_input_tdim"] == 96
            )

    def test_a_stem_has_no_published_names(self, tmp_path):
        with pytest.raises(
            InputError,
            match="no names for convolutions before the patches; use this model's checkpoint",
        ):
            weights.write_weights(
                tmp_path / "w.safetensors",
                weights.Weights({}, SMALL.cut(4, (6, 8)), "ssast_pretrain"),
            )

    def test_wrong_files_are_refused(self, tmp_path):
        good = weights.Weights(params_of("ast"), SMALL, "ast")
        path = weights.write_weights(tmp_path / "good.safetensors", good)
        half = tmp_path / "half.safetensors"
        half.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(InputError, match="half.safetensors is damaged"):
            weights.read_weights(half)
        with pytest.raises(InputError, match="no weights at .*absent"):
            weights.read_weights(tmp_path / "absent")
        save_file(load_file(path), tmp_path / "odd.safetensors", {"kind": "ast", "config": "{}"})
        with pytest.raises(InputError, match="has metadata of another version"):
            weights.read_weights(tmp_path / "odd.safetensors")
        save_file({"weight": np.zeros(3)}, tmp_path / "other.safetensors")
        with pytest.raises(InputError, match="not hold the weights of a model of the kind ast"):
            weights.read_weights(tmp_path / "other.safetensors")
        with pytest.raises(InputError, match="end in .safetensors"):
            weights.write_weights(tmp_path / "good.npz", good)
        wide = dataclasses.replace(good, config=dataclasses.replace(SMALL, width=128))
        with pytest.raises(
            InputError, match="encoder/blocks/attention/proj/bias is .2, 64. in the parameters for "
        ):
            weights.write_weights(path, wide)

    def test_a_flipped_bit_anywhere_is_noticed(self, tmp_path):
        thin = dataclasses.replace(SMALL, depth=1)
        known = weights.Weights(params_of("ast", thin), thin, "ast")
        path = weights.write_weights(tmp_path / "w.safetensors", known)
        content = path.read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        key = content.index(b'"sha256"')
        bits = {*range(64), *range(64, 8 * header, 97), *range(8 * key, 8 * key + 160)}
        for bit in sorted(bits | {*range(8 * header, 8 * len(content), 8 * len(content) // 20)}):
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            with pytest.raises(InputError) as refused:
                weights.read_weights(path)
            assert len(str(refused.value).splitlines()) == 1
        path.write_bytes(content)
        assert weights.read_weights(path).config == thin

    def test_a_file_of_an_earlier_version_is_read_with_a_remark(self, tmp_path, logged):
        good = weights.Weights(params_of("ast"), SMALL, "ast")
        path = weights.write_weights(tmp_path / "w.safetensors", good)
        with safe_open(path, "np") as file:
            metadata = file.metadata()
        assert len(metadata.pop("sha256")) == 64 and not logged
        save_file(load_file(path), path, metadata)
        assert_equal(weights.read_weights(path).params, good.params)
        assert logged == [f"{path} has no checksum: an earlier version wrote it"]

    @pytest.mark.parametrize(
        "name, value",
        [
            ("config", "[" * 100_000),
            ("config", '{"name": %s}' % ("9" * 5000)),
            ("config", "[]"),
            ("config", json.dumps(dataclasses.asdict(SMALL) | {"n_frames": 2**40})),
            ("config", json.dumps(dataclasses.asdict(SMALL) | {"depth": 10**9})),
            ("config", json.dumps(dataclasses.asdict(SMALL) | {"num_heads": 0})),
            ("config", json.dumps(dataclasses.asdict(SMALL) | {"stride": [0, 0]})),
            ("config", json.dumps(dataclasses.asdict(SMALL) | {"width": "64"})),
            ("front_end", json.dumps(dataclasses.asdict(KALDI) | {"n_fft": 2**40})),
            ("statistics", json.dumps(dataclasses.asdict(AUDIOSET) | {"std_db": 0.0})),
            ("norm_epsilon", "null"),
            ("kind", "beats"),
            ("surprise", "{}"),
        ],
    )
    def test_metadata_of_others_is_refused_in_one_line(self, tmp_path, name, value):
        good = weights.Weights(params_of("ast"), SMALL, "ast")
        path = weights.write_weights(tmp_path / "w.safetensors", good)
        with safe_open(path, "np") as file:
            metadata = file.metadata()
        write_tensors(path, load_file(path), metadata | {name: value})
        with pytest.raises(InputError) as refused:
            weights.read_weights(path)
        assert len(str(refused.value).splitlines()) == 1 and len(str(refused.value)) < 800

    def test_tensors_of_others_are_refused_in_one_line(self, tmp_path):
        good = weights.Weights(params_of("ast"), SMALL, "ast")
        path = weights.write_weights(tmp_path / "w.safetensors", good)
        tensors = load_file(path)
        with safe_open(path, "np") as file:
            metadata = file.metadata()
        for name, value, message in (
            ("v.norm.bias", np.full(64, np.nan, np.float32), "encoder/norm/bias in .* has NaN or"),
            ("v.norm.bias", np.full(64, 1e300), "encoder/norm/bias in .* has NaN or infinite"),
            ("v.norm.bias", np.zeros((), np.float32), r"encoder/norm/bias is \(\) in"),
            ("v.pos_embed", np.zeros((), np.float32), "does not hold weights as this version"),
            (
                "mlp_head.1.bias",
                np.zeros(0, np.float32),
                r"head/kernel is \(64, 3\) in|does not hold weights",
            ),
            ("v.blocks.99999999999.norm1.bias", np.zeros(0, np.float32), "unknown .'v.blocks.999"),
        ):
            write_tensors(path, tensors | {name: value}, metadata)
            with pytest.raises(InputError, match=message) as refused:
                weights.read_weights(path)
            assert len(str(refused.value).splitlines()) == 1
        # A header of a gigabyte of names; a file without content on the disk
        for header, size in ((2**30, 2**30 + 100), (100, 3 * 10**9)):
            with path.open("wb") as file:
                file.write(header.to_bytes(8, "little"))
                file.truncate(size)
            with pytest.raises(InputError, match="bytes, and at most .* are read"):
                weights.read_weights(path)

    def test_hugging_face_folders_that_lie_are_refused(self, tmp_path):
        good = weights.Weights(params_of("hf_ast"), SMALL, "hf_ast")
        folder = weights.write_weights(tmp_path / "hf", good)
        with pytest.raises(InputError, match="is not empty; choose another folder"):
            weights.write_weights(folder, good)
        with pytest.raises(InputError, match="Write it as kind 'ast'"):
            weights.write_weights(tmp_path / "no", dataclasses.replace(good, front_end=FrontEnd()))
        save_file(
            load_file(folder / "model.safetensors"), folder / "model.safetensors", {"format": "pt"}
        )
        level = {"sampling_rate": 16_000, "mean": -6.845978, "std": 5.5654526}
        (folder / "preprocessor_config.json").write_text(json.dumps(level))
        read = weights.read_weights(folder / "model.safetensors")
        assert read.config == SMALL and read.front_end == KALDI and read.head_epsilon == 1e-6
        assert read.statistics.mean_db == pytest.approx(10 * np.log10(np.exp(-6.845978)))
        config = json.loads((folder / "config.json").read_text())
        for change, message in (
            (
                {"hidden_size": 128, "intermediate_size": 512},
                "proj/bias is .2, 64. in .*, but .2, 128. in the model",
            ),
            ({"num_hidden_layers": 3}, "attention/proj/bias is .2, 64."),
            ({"hidden_act": "relu"}, "hidden_act = 'relu'; an AST needs 'gelu'"),
            ({"max_length": 200}, "encoder/pos_embed is .1, 14, 64."),
            ({"patch_size": None}, "does not describe an AST"),
            ({"max_length": 2**40}, "encoder/pos_embed is .1, 14, 64.* 32 mel bands and 1,099,511"),
            ({"max_length": "96"}, "it.'max_length'. is '96', not int"),
            ({"num_attention_heads": 0}, "does not hold weights as this version"),
            ({"frequency_stride": 0}, "does not hold weights as this version"),
            ({"num_hidden_layers": 10**9}, "does not hold weights as this version"),
        ):
            (folder / "config.json").write_text(json.dumps(config | change))
            with pytest.raises(InputError, match=message):
                weights.read_weights(folder)
        (folder / "config.json").write_text("[" * 100_000)
        with pytest.raises(InputError, match="config.json is damaged .nested too deeply"):
            weights.read_weights(folder)
        del config["time_stride"]
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match="config.json is damaged .it lacks 'time_stride'"):
            weights.read_weights(folder)
        (folder / "config.json").unlink()
        with pytest.raises(InputError, match="config.json is missing"):
            weights.read_weights(folder)


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
    """The authors' files, which do not describe their geometry."""

    @staticmethod
    def write(folder: Path, kind: str, config: ModelConfig, labels: int = 3) -> Path:
        """A file with the authors' names and shapes; zeros of one byte each."""
        blank = jax.tree.map(
            lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes_of(kind, config, labels)
        )
        tensors = {
            f"module.{name}": np.zeros(value.shape, np.uint8)
            for name, value in weights.to_torch(blank, kind, config.patch_size).items()
        }
        if kind == "ast":
            del tensors["module.mask_embed"]
        if kind == "ssast_pretrain":
            tensors["module.p_input_fdim"] = np.array(config.n_mels)
            tensors["module.p_input_tdim"] = np.array(config.n_frames)
        save_file(tensors, folder / "published.safetensors")
        return folder / "published.safetensors"

    @pytest.mark.parametrize("kind, config, grid", GEOMETRIES)
    def test_published_sizes_are_recognised(self, tmp_path, kind, config, grid):
        labels = {128: 35, 512: 50}.get(config.n_frames, 3)  # Speech Commands, ESC-50
        read = weights.read_weights(self.write(tmp_path, kind, config, labels))
        assert (read.kind, read.config, read.config.grid) == (kind, config, grid)
        assert (read.front_end, read.statistics) == (KALDI, AUDIOSET)
        assert len(read.params["encoder"]["blocks"]["norm1"]["scale"]) == config.depth

    @pytest.mark.parametrize(
        "config, message",
        [
            (
                dataclasses.replace(THIN, n_frames=1000),
                "has 496 positions for patches of .16, 16.*stride 16 with 992 to 1,007 frames",
            ),
            (
                dataclasses.replace(THIN, width=100, num_heads=4),
                "the width of .* is 100, not a multiple of 64",
            ),
        ],
    )
    def test_unknown_sizes_are_refused(self, tmp_path, config, message):
        with pytest.raises(InputError, match=message):
            weights.read_weights(self.write(tmp_path, "ast", config))

    # As many positions as another geometry has: 12 x 35 = 10 x 42, 8 x 18 = 12 x 12, ...
    @pytest.mark.parametrize(
        "stride, n_frames, other",
        [
            (10, 360, "stride 12 with 508 to 519"),
            (12, 512, "stride 10 with 356 to 365"),
            (16, 300, "stride 10 with 126 to 135"),
            (14, 230, "stride 10 with 126 to 135"),
            (10, 128, "stride 16 with 288 to 303"),
            (16, 1200, "stride 10 with 506 to 515"),
            (12, 730, "stride 16 with 1,200 to 1,215"),
            (10, 280, "stride 14 with 506 to 519"),
        ],
    )
    def test_a_shared_number_of_positions_is_refused_unless_it_is_stated(
        self, tmp_path, capsys, stride, n_frames, other
    ):
        config = dataclasses.replace(THIN, stride=(stride, stride), n_frames=n_frames)
        path = self.write(tmp_path, "ast", config)
        with pytest.raises(InputError) as refused:
            weights.read_weights(path)
        for words in (other, f"stride {stride} with", "--frames and --stride"):
            assert words in str(refused.value)
        command = ["convert", str(path), "--output", str(tmp_path / "out.safetensors")]
        assert main([*command, "--frames", str(n_frames), "--stride", str(stride)]) == 0
        assert weights.read_weights(tmp_path / "out.safetensors").config == config
        capsys.readouterr()
        # Of the same file, and of one that states its geometry
        for file in (path, tmp_path / "out.safetensors"):
            command = ["convert", str(file), "--output", str(tmp_path / "no.safetensors")]
            assert main([*command, "--frames", "1024", "--stride", "16"]) == 2
            assert re.search("8 x 64 = 512|not .16, 16. and 1,024", capsys.readouterr().err)
        assert not (tmp_path / "no.safetensors").exists()

    @pytest.mark.parametrize(
        "options, message",
        [
            (["--frames", "360"], "a geometry needs both"),
            (["--stride", "10"], "a geometry needs both"),
            (["--frames", "-1", "--stride", "10"], "a geometry needs both"),
            (["--frames", "360", "--stride", "ten"], "--stride ten: give one number, or two"),
            (["--frames", "360", "--stride", "10,0"], "a geometry needs both"),
        ],
    )
    def test_half_a_geometry_is_refused(self, tmp_path, capsys, options, message):
        path = self.write(tmp_path, "ast", THIN)
        assert main(["convert", str(path), "--output", str(tmp_path / "out"), *options]) == 2
        assert message in capsys.readouterr().err

    def test_frequency_and_time_may_have_their_own_strides(self, tmp_path):
        config = dataclasses.replace(THIN, stride=(10, 16), n_frames=600)
        path = self.write(tmp_path, "ast", config)
        assert weights.read_weights(path, ((10, 16), 600)).config == config
        frames = dataclasses.replace(THIN, patch_size=(128, 2), stride=(128, 1), n_frames=513)
        path = self.write(tmp_path, "ast", frames)
        with pytest.raises(
            InputError, match="stride 1 with 513 .* or stride 2 with 1,024 to 1,025"
        ):
            weights.read_weights(path)
        assert weights.read_weights(path, ((128, 1), 513)).config == frames


class Call:
    """Pickles as a call of any function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


class TestTorchFiles:
    """The authors' .pth files, read by PyTorch."""

    @pytest.mark.parametrize("version", [None, "2.5.1"])
    def test_without_a_safe_torch_one_line_says_what_to_do(self, tmp_path, monkeypatch, version):
        path = tmp_path / "SSAST.pth"
        path.write_bytes(b"PK")
        torch = types.ModuleType("torch")
        torch.__version__ = version
        monkeypatch.setitem(sys.modules, "torch", torch if version else None)
        with pytest.raises(InputError) as refused:
            weights.read_weights(path)
        for words in (str(path), "PyTorch 2.6", "pip install torch", ".safetensors"):
            assert words in str(refused.value)
        assert "\n" not in str(refused.value)

    @pytest.mark.peer
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
            tensor = torch.from_numpy(value)
            tensor = tensor.bfloat16() if half and tensor.is_floating_point() else tensor
            module.register_parameter(leaf, torch.nn.Parameter(tensor, requires_grad=False))
        torch.save(torch.nn.DataParallel(model).state_dict(), tmp_path / "SSAST.pth")
        read = weights.read_weights(tmp_path / "SSAST.pth")
        assert (read.kind, read.config) == ("ssast_pretrain", config)
        expected = params_of("ssast_pretrain", config)
        if half:
            expected = jax.tree.map(
                lambda leaf: leaf.astype(jnp.bfloat16).astype(np.float32), expected
            )
        assert_equal(read.params, expected)

    @pytest.mark.peer
    @pytest.mark.parametrize("function", [os.system, eval, getattr, pickle.loads, np.dtype])
    def test_a_pickle_that_calls_is_refused_and_not_run(self, tmp_path, function):
        import torch

        trace = tmp_path / "ran"
        path = tmp_path / "file.pth"
        torch.save({"v.norm.bias": Call(function, f"touch {trace}")}, path)
        wanted = rf"GLOBAL .*{function.__name__}.*no code was executed"
        with pytest.raises(InputError, match=wanted) as refused:
            weights.read_weights(path)
        assert not trace.exists() and "\n" not in str(refused.value)

    @pytest.mark.peer
    def test_other_files_are_refused(self, tmp_path):
        import torch

        zeros, path = torch.zeros(4), tmp_path / "file.pth"
        for content in ({"model": {"a": zeros}, "epoch": 3}, [zeros], torch.nn.Linear(2, 2), 3):
            torch.save(content, path)
            with pytest.raises(InputError, match="finds no state_dict in"):
                weights.read_weights(path)
        torch.save({"a": zeros}, path, _use_new_zipfile_serialization=False)  # before 1.6
        with pytest.raises(InputError, match="mmap can only be used"):
            weights.read_weights(path)
        torch.save({"a": zeros}, path)
        for content in (path.read_bytes()[:-30], b"<html>404</html>", b"", b"\x80\x02}."):
            path.write_bytes(content)
            with pytest.raises(InputError, match="no code was executed. Download it again"):
                weights.read_weights(path)
        torch.save({"a": zeros}, path)
        with pytest.raises(InputError, match="not hold the weights of a model of the kind ast"):
            weights.read_weights(path)


class TestExpanding:
    """.pth files that expand: refused with less than 0.2 GB."""

    pytestmark = pytest.mark.peer

    @staticmethod
    def refused(path: Path, message: str) -> None:
        code = """if True:
            import resource, sys
            from percepiano_ast.errors import InputError
            from percepiano_ast.models import weights
            import torch
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            try:
                weights.read_weights(sys.argv[1])
            except InputError as error:
                print(error)
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        """
        command = [sys.executable, "-c", code, str(path)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        reason, grown = run.stdout.splitlines()
        assert re.search(message, reason) and int(grown) < 2e5, run.stdout

    @staticmethod
    def rewrite(path: Path, name: str, content: bytes, method: int = zipfile.ZIP_STORED) -> None:
        """Replace a member of the archive."""
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: archive.read(info) for info in archive.infolist()}
        with zipfile.ZipFile(path, "w") as archive:
            for member, old in members.items():
                inside = member.endswith(name)
                with archive.open(
                    zipfile.ZipInfo(member) if not inside else _member(member, method), "w"
                ) as file:
                    file.write(content if inside else old)

    @pytest.mark.parametrize("name", ["data.pkl", "data/0"])
    def test_compressed_members(self, tmp_path, name):
        import torch

        path = tmp_path / "file.pth"
        torch.save({"v.norm.bias": torch.zeros(4)}, path)
        self.rewrite(path, name, bytes(5 * 10**8), zipfile.ZIP_DEFLATED)
        assert path.stat().st_size < 2**20
        self.refused(path, f"finds no state_dict in .*{name} is compressed")

    def test_shapes_beyond_the_file(self, tmp_path):
        import torch

        path = tmp_path / "file.pth"
        for value in (
            torch.zeros(1).expand(2**34),
            torch.zeros(1, dtype=torch.float16).expand(2**17, 2**17),
        ):
            torch.save({"v.norm.bias": value}, path)
            self.refused(path, "its tensors have .* bytes, more than the file")
        shared = torch.zeros(2**18)
        torch.save({f"v.blocks.{n}.norm1.bias": shared for n in range(1000)}, path)
        self.refused(path, "its tensors have 1,048,576,000 bytes, more than the file")

    @pytest.mark.parametrize(
        "pickled, message",
        [
            (
                b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x02\x85R.",
                "GLOBAL builtins.bytearray",
            ),
            (b"\x80\x02ctorch\nTensor\n\x8a\x05\0\0\0\0\x02\x85R.", "GLOBAL torch.Tensor"),
            (b"\x80\x02" + b"]" * 2**20 + b".", "its description has 1,048,579 bytes"),
            (b"", "pickle exhausted before seeing STOP"),
            (b"\x80\x02}K\x01K\x02s.", "has no attribute"),
        ],
    )
    def test_descriptions_that_allocate(self, tmp_path, pickled, message):
        import torch

        path = tmp_path / "file.pth"
        torch.save({"v.norm.bias": torch.zeros(4)}, path)
        self.rewrite(path, "data.pkl", pickled)
        self.refused(path, f"finds no state_dict in .*{message}")


def _member(name: str, method: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.compress_type = method
    return info


class TestPeer:
    """transformers' own files and numbers. Run with ``-m peer`` where it is installed."""

    pytestmark = pytest.mark.peer
    CONFIG = dataclasses.replace(SMALL, stride=(10, 10), num_heads=2)

    @staticmethod
    def spectrograms(config: ModelConfig) -> np.ndarray:
        return (
            np.random.default_rng(3)
            .normal(size=(2, config.n_frames, config.n_mels))
            .astype(np.float32)
        )

    @staticmethod
    def logits(read: weights.Weights, log_mel: np.ndarray) -> np.ndarray:
        epsilons = {"norm_epsilon": read.norm_epsilon, "head_epsilon": read.head_epsilon}
        model = ast.Classifier(read.config, len(read.params["head"]["bias"]), **epsilons)
        return np.asarray(jax.jit(model.apply)({"params": read.params}, log_mel)[0])

    @pytest.mark.parametrize("half", [False, True])
    def test_hugging_face_to_us(self, tmp_path, half):
        import torch
        import transformers

        config, log_mel = self.CONFIG, self.spectrograms(self.CONFIG)
        torch.manual_seed(0)
        theirs = transformers.ASTForAudioClassification(
            transformers.ASTConfig(
                hidden_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=256,
                max_length=config.n_frames,
                num_mel_bins=config.n_mels,
                num_labels=5,
                initializer_range=0.2,
            )
        ).eval()
        with torch.no_grad():
            for value in theirs.parameters():
                value += 0.1 * torch.randn_like(value)
            if half:
                theirs = theirs.bfloat16()
            theirs.save_pretrained(tmp_path)
            transformers.ASTFeatureExtractor(
                num_mel_bins=config.n_mels, mean=-6.5, std=5.5
            ).save_pretrained(tmp_path)
            expected = theirs.float()(torch.from_numpy(log_mel)).logits.numpy()
        read = weights.read_weights(tmp_path)
        assert read.config == config and np.ptp(expected) > 1
        np.testing.assert_allclose(self.logits(read, log_mel), expected, atol=1e-5)
        assert read.statistics.mean_db == pytest.approx(-6.5 * 10 / np.log(10))

    def test_us_to_hugging_face(self, tmp_path):
        import torch
        import transformers

        config, log_mel = self.CONFIG, self.spectrograms(self.CONFIG)
        params = jax.tree.map(lambda leaf: leaf * np.float32(0.2), params_of("hf_ast", config))
        ours = weights.Weights(params, config, "hf_ast", norm_epsilon=1e-12, head_epsilon=1e-12)
        folder = weights.write_weights(tmp_path / "hf", ours)
        model, report = transformers.ASTForAudioClassification.from_pretrained(
            folder, output_loading_info=True
        )
        assert not any(
            report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
        )
        with torch.no_grad():
            theirs = model.eval()(torch.from_numpy(log_mel)).logits.numpy()
        np.testing.assert_allclose(self.logits(ours, log_mel), theirs, atol=1e-5)
        extractor = transformers.AutoFeatureExtractor.from_pretrained(folder)
        assert (extractor.mean, extractor.std) == pytest.approx((-4.2677393, 4.5689974), rel=1e-7)
        assert (extractor.max_length, extractor.num_mel_bins) == (config.n_frames, config.n_mels)
