"""Alternative encoders that can replace the AST before pooling and heads, and their interface.

To add an encoder, add a row to `ENCODERS`: a frozen dataclass that implements `Geometry` and
``beside``, and a module that turns a spectrogram into columns over time. ``finetune --init``,
folds, checkpoints and ``rate --run`` then support it.
"""

from typing import Any, ClassVar, NamedTuple, Protocol

from flax import linen as nn

from percepiano_ast.config import ModelConfig
from percepiano_ast.models.cnn import CNN, CNNConfig


class Geometry(Protocol):
    """The part of an encoder's configuration, a dataclass, that pooling and heads use;
    `config.ModelConfig` is one."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str:
        """Name of the encoder; its key in `ENCODERS` if it is listed there."""

    @property
    def width(self) -> int:
        """Width of an output, D."""

    @property
    def n_mels(self) -> int:
        """Mel bands of a window, F."""

    @property
    def n_frames(self) -> int:
        """Frames of a window, T."""

    @property
    def patch_size(self) -> tuple[int, int]:
        """Size of the input of an output, (bands, frames)."""

    @property
    def stride(self) -> tuple[int, int]:
        """Distance between outputs, (bands, frames)."""

    @property
    def grid(self) -> tuple[int, int]:
        """Number of outputs along (frequency, time), (F', T')."""


class Comparable(Geometry, Protocol):
    """A `Geometry` that can be matched to an AST for a comparison."""

    @classmethod
    def beside(cls, model: ModelConfig) -> Geometry:
        """The geometry with the AST's window and width."""


class Alternative(NamedTuple):
    """An encoder that replaces the AST. All of it is trained from scratch.

    Attributes:
        label: its name in the notebooks' form.
        config: its `Geometry` class.
        module: ``module(config, dtype)`` maps (B, T, F), normalised, to columns (B, T', D) and a
            dict of intermediates.
    """

    label: str
    config: type[Comparable]
    module: type[nn.Module]


ENCODERS = {"cnn": Alternative("a CNN from scratch", CNNConfig, CNN)}
