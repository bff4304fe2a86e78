"""Encoders that can replace the AST before pooling and heads: a convolutional baseline.

Source: CNN6 of Kong et al. 2020 (PANNs, arXiv 1912.10211, table 1): four layers of convolution,
normalisation, ReLU and 2 x 2 average pooling, each with twice the channels of the previous one,
then the mean over frequency. Differences: kernels are 3 x 3; LayerNorm over the channels (as in
ConvNeXt, Liu et al. 2022) replaces BatchNorm, whose statistics depend on the padding in a batch;
pooling over time is that of the AST.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from percepiano_ast.config import ModelConfig
from percepiano_ast.models.transformer import layer_norm


@dataclass(frozen=True)
class CNNConfig:
    """Geometry of the baseline, with the properties of `ModelConfig` that pooling and heads use."""

    name: str = "cnn"
    channels: tuple[int, ...] = (32, 64, 128, 256)
    n_mels: int = 128
    n_frames: int = 1024

    @classmethod
    def beside(cls, model: ModelConfig) -> "CNNConfig":
        """The baseline for an AST: the same window, and the same width in the last layer."""
        channels = tuple(model.width // 2**layer for layer in (3, 2, 1, 0))
        return cls(channels=channels, n_mels=model.n_mels, n_frames=model.n_frames)

    @property
    def width(self) -> int:
        """Channels of the last layer."""
        return self.channels[-1]

    @property
    def patch_size(self) -> tuple[int, int]:
        """Bands and frames per output: all bands, and the frames that are pooled together."""
        return self.n_mels, 2 ** len(self.channels)

    @property
    def stride(self) -> tuple[int, int]:
        """Columns do not overlap."""
        return self.patch_size

    @property
    def grid(self) -> tuple[int, int]:
        """Number of outputs along (frequency, time)."""
        return 1, self.n_frames // self.patch_size[1]


class CNN(nn.Module):
    """The convolutions; ``dtype`` is that of activations, parameters and statistics are float32."""

    config: CNNConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, log_mel: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(B, T, F), normalised -> (B, T // 2^layers, D), and ``layer0`` ..."""
        x, intermediates = log_mel[..., None].astype(self.dtype), {}
        for number, channels in enumerate(self.config.channels):
            x = nn.Conv(channels, (3, 3), use_bias=False, dtype=self.dtype, name=f"conv{number}")(x)
            x = layer_norm(1e-6, self.dtype, f"norm{number}")(x)
            x = intermediates[f"layer{number}"] = nn.avg_pool(nn.relu(x), (2, 2), strides=(2, 2))
        return x.mean(axis=2), intermediates


class Alternative(NamedTuple):
    """An encoder that replaces the AST. All of it is trained from scratch.

    Attributes:
        label: its name in the notebooks' form.
        config: its geometry, a frozen dataclass with the members of `CNNConfig`.
        module: ``module(config, dtype)`` maps (B, T, F), normalised, to columns (B, T', D) and a
            dict of intermediates.
    """

    label: str
    config: type[CNNConfig]
    module: type[nn.Module]


# To add an encoder, add a row here under its ``config.name``, and its configuration to `Geometry`.
# ``finetune --init``, folds, checkpoints and ``rate --run`` then support it.
ENCODERS = {"cnn": Alternative("a CNN from scratch", CNNConfig, CNN)}
Geometry = ModelConfig | CNNConfig  # of an encoder
