"""Encoders that can stand in the AST's place below pooling and heads, and what is asked of one.

Another encoder is a row in `ENCODERS`: a frozen dataclass that is a `Geometry` and has ``beside``, and a module that makes
columns over time of a spectrogram. Everything else finds it there: ``finetune --init``, folds, checkpoints, ``rate --run``.
"""

from typing import Any, ClassVar, NamedTuple, Protocol

from flax import linen as nn

from percepiano_ast.config import ModelConfig
from percepiano_ast.models.cnn import CNN, CNNConfig


class Geometry(Protocol):
    """What pooling and heads ask of an encoder's configuration, a dataclass; `config.ModelConfig` is one."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def name(self) -> str:
        """Of the encoder; where it is in `ENCODERS`, its key there."""

    @property
    def width(self) -> int:
        """Numbers per output, D."""

    @property
    def n_mels(self) -> int:
        """Bands of a window, F."""

    @property
    def n_frames(self) -> int:
        """Frames of a window, T."""

    @property
    def patch_size(self) -> tuple[int, int]:
        """What an output stands for, (bands, frames)."""

    @property
    def stride(self) -> tuple[int, int]:
        """From one output to the next, (bands, frames)."""

    @property
    def grid(self) -> tuple[int, int]:
        """Outputs along (frequency, time), (F', T')."""


class Comparable(Geometry, Protocol):
    """A `Geometry` that can be chosen to compare with an AST."""

    @classmethod
    def beside(cls, model: ModelConfig) -> Geometry:
        """The one to compare with: its window and its width."""


class Alternative(NamedTuple):
    """An encoder in the AST's place. It is trained from scratch, all of it.

    Attributes:
        label: what the notebooks' form calls it.
        config: its kind of `Geometry`.
        module: ``module(config, dtype)`` makes of (B, T, F), normalised, the columns (B, T', D) and a dict of intermediates.
    """

    label: str
    config: type[Comparable]
    module: type[nn.Module]


ENCODERS = {"cnn": Alternative("a CNN from scratch", CNNConfig, CNN)}
