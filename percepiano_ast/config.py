"""Every number that is a choice, in frozen dataclasses; derived numbers are properties, never typed twice."""

import dataclasses
import difflib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from etils import epath

from percepiano_ast.finetune_config import FinetuneConfig


class InputError(ValueError):
    """Bad input or usage. The message names the value and the next action; the command line exits with 2."""


class RunFailed(RuntimeError):
    """A run failed for a reason that the message tells whole; the command line exits with 1, without a traceback."""


@dataclass(frozen=True)
class FrontEnd:
    """Log-mel front end: stored with every shard and every model.

    Levels are ``10 log10(max(S, amin))`` dB of mel power, without normalisation per clip: loudness is a label.
    ``kind`` is ``slaney``, librosa's centred STFT and mel bands, or ``kaldi``, the papers' filter bank (`KALDI`).
    """

    kind: str = "slaney"
    sample_rate: int = 22_050
    n_fft: int = 1024
    win_length: int = 551  # 25 ms, AST's window
    hop_length: int = 220  # 9.98 ms, AST's hop: 1,024 frames are 10.2 s
    n_mels: int = 128
    fmin: float = 20.0
    fmax: float = 11_025.0
    amin: float = 1e-10
    floor_db: float = -80.0  # uint8 code 0
    step_db: float = 0.5

    def n_frames(self, n_samples: int) -> int:
        """Frames of a recording of ``n_samples``.

        ``slaney``: frame k is centred on sample ``k * hop_length``. ``kaldi``: whole windows only, frame k starts there.
        """
        if self.kind == "kaldi":
            return max(1 + (n_samples - self.win_length) // self.hop_length, 0)
        return 1 + n_samples // self.hop_length

    def seconds(self, n_frames: int) -> float:
        """Duration of ``n_frames`` hops."""
        return n_frames * self.hop_length / self.sample_rate


@dataclass(frozen=True)
class Statistics:
    """Level of a training split in dB over all its mel bins, and the shares of values at the ends of the uint8 range.

    The model sees ``(dB - mean) / (2 std)`` (Gong et al. 2021, section 2.1).
    """

    mean_db: float
    std_db: float
    count: int
    at_floor: float
    at_ceiling: float


# The front end of AST and SSAST (Gong et al. 2021, section 2.1), which AudioSet weights need: Kaldi's fbank at 16 kHz.
# Its natural logarithms are kept in dB, so that shards and statistics have one unit.
KALDI = FrontEnd(
    kind="kaldi",
    sample_rate=16_000,
    n_fft=512,
    win_length=400,
    hop_length=160,
    fmax=8_000.0,
    amin=1.1920928955078125e-07,
)
# For hearing notes: windows of 93 ms and bands of 15 Hz below 1 kHz tell the partials of neighbouring keys apart two octaves
# lower than windows of 25 ms do.
# Transcription is used to such (Hawthorne et al. 2018: 2,048 samples, 229 bands); these are 14 patches of 16 bands.
FINE = FrontEnd(n_fft=2048, win_length=2048, n_mels=224)
_DB_PER_NEPER = 10 / math.log(10)  # of power
# AudioSet's mean and deviation in natural logarithms, as published with AST (``ast_models.py``, ``run.py``).
AUDIOSET = Statistics(-4.2677393 * _DB_PER_NEPER, 4.5689974 * _DB_PER_NEPER, 0, 0.0, 0.0)


@dataclass(frozen=True)
class ModelConfig:
    """Geometry of an AST encoder. ``patch_size`` and ``stride`` are (frequency, time).

    ``stem``: channels of the convolutions that look at a spectrogram before it is cut into patches, see `ast.Stem`; none as
    published.

    Raises:
        InputError: heads that do not divide the width, a window smaller than a patch, or a stem that does not suit the patches.
    """

    name: str
    width: int
    depth: int
    num_heads: int
    mlp_ratio: int = 4
    patch_size: tuple[int, int] = (16, 16)
    stride: tuple[int, int] = (16, 16)
    n_mels: int = 128
    n_frames: int = 1024
    stem: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise InputError(f"{self.num_heads} heads do not divide a width of {self.width}; choose a number of heads that does.")
        if self.n_mels < self.patch_size[0] or self.n_frames < self.patch_size[1]:
            raise InputError(
                f"a window of {self.n_mels} bands x {self.n_frames} frames is smaller than a patch of "
                f"{self.patch_size[0]} x {self.patch_size[1]}; choose a longer window or smaller patches."
            )
        wide = self.patch_size[1]
        if self.stem and (self.patch_size != self.stride or self.grid[0] > 1 or wide & (wide - 1) or wide > 2 ** len(self.stem)):
            raise InputError(
                f"a stem of {len(self.stem)} convolutions before patches of {self.patch_size[0]} x {wide}: it needs patches of all "
                f"{self.n_mels} bands, side by side, of 1, 2 ... {2 ** len(self.stem)} frames."
            )

    def cut(self, frames: int = 0, stem: tuple[int, ...] = ()) -> "ModelConfig":
        """The same with patches of all bands and so many frames, behind a stem or not; 0 keeps the patches."""
        if not frames:
            return self
        patch = (self.n_mels, frames)
        return dataclasses.replace(self, patch_size=patch, stride=patch, stem=stem)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along (frequency, time)."""
        sizes = (self.n_mels, self.n_frames)
        high, wide = ((size - patch) // stride + 1 for size, patch, stride in zip(sizes, self.patch_size, self.stride))
        return high, wide

    @property
    def num_patches(self) -> int:
        """Patch tokens of one window."""
        return self.grid[0] * self.grid[1]

    @property
    def patch_dim(self) -> int:
        """Values in one patch."""
        return self.patch_size[0] * self.patch_size[1]


# tiny, small and base are the published sizes (Gong et al. 2022, table 5); micro is for tests and the demo on a CPU, mini is
# what two cores train in an hour or two.
MODELS = {
    model.name: model
    for model in (
        ModelConfig("micro", width=96, depth=4, num_heads=4),
        ModelConfig("mini", width=192, depth=4, num_heads=4),
        ModelConfig("tiny", width=192, depth=12, num_heads=3),
        ModelConfig("small", width=384, depth=12, num_heads=6),
        ModelConfig("base", width=768, depth=12, num_heads=12),
    )
}


def choose(table: dict, name: str, what: str):
    """Look ``name`` up in ``table`` or say which names there are.

    Raises:
        InputError: unknown name, with the nearest known ones.
    """
    if name in table:
        return table[name]
    near = difflib.get_close_matches(str(name), table, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise InputError(f"unknown {what} {name!r}.{hint} Choose one of: {', '.join(table)}.")


@dataclass(frozen=True)
class PretrainConfig:
    """What is learned before rating, and how.

    ``objective``: ``ssast``, masked patches; ``transcription``, what is played (`models.transcription`); or ``joint``, both by
    one encoder. ``augment``: other levels, equalisation and noise for every window (`training.augment`), so that a piano that
    was not heard in training is heard too; for masked patches alone it is off, as published.

    Of masked patches: ``mask_ratio`` is the paper's 400 of 512 patches; ``cluster`` its C in {3, 4, 5}.

    ``decoder_depth`` 0: the encoder sees masked patches as mask tokens (Gong et al. 2022). Above 0: it sees visible
    patches alone, and a decoder of so many blocks predicts the others (MAE-AST, Baade et al. 2022, which has 2).
    ``optimizer``: ``adamw``, or ``published``, SSAST's Adam with coupled L2 (betas and decay are its own then).
    ``ema_decay`` above 0 keeps a moving average of the parameters, which fine-tuning then starts from.
    """

    batch_size: int
    epochs: int
    learning_rate: float
    warmup_steps: int
    objective: str = "ssast"
    augment: bool = False
    mask_ratio: float = 400 / 512
    cluster: tuple[int, int] = (3, 5)
    generative_weight: float = 10.0
    softmax_over: str = "targets"
    decoder_depth: int = 0
    optimizer: str = "adamw"
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    clip_norm: float = 1.0
    ema_decay: float = 0.0
    seed: int = 0

    def num_masked(self, model: ModelConfig) -> int:
        """Masked patches of one window.

        Raises:
            InputError: none would be masked, or none visible.
        """
        masked = round(self.mask_ratio * model.num_patches)
        if not 1 <= masked < model.num_patches:
            raise InputError(
                f"mask ratio {self.mask_ratio:g} masks {masked} of {model.num_patches} patches: "
                f"choose one from {1 / model.num_patches:.3g} to {1 - 1 / model.num_patches:.3g}."
            )
        return masked


@dataclass(frozen=True)
class Execution:
    """How a training step is computed. Nothing here changes what is learned but for rounding, so a run may be resumed
    with another one on other hardware.

    Attributes:
        precision: ``float32``, ``bfloat16``, ``float16`` (with loss scaling) or ``auto``, the fastest that the device has.
            Parameters, LayerNorm statistics, softmax and losses are float32 always.
        accumulate: micro-batches that a batch is cut into; their gradients are averaged.
        remat: recompute each block in the backward pass instead of keeping its activations.
        attention: ``xla``, ``cudnn`` (fused, Ampere and newer, 16-bit), ``heads`` (one at a time, for a CPU) or ``auto``, the
            fastest of them.
        shard_params: spread parameters and optimiser state over the devices, not only the batch.
    """

    precision: str = "auto"
    accumulate: int = 1
    remat: bool = False
    attention: str = "auto"
    shard_params: bool = False


MAESTRO_URL = "https://storage.googleapis.com/magentadata/datasets/maestro/v3.0.0/maestro-v3.0.0.zip"
PERCEPIANO_URL = "https://github.com/JonghoKimSNU/PercePiano/archive/e672299b8661f63802cd5cd73bb3c76218a13029.zip"


@dataclass(frozen=True)
class Preset:
    """What one choice of PRESET in the notebooks means. ``maestro`` and ``percepiano`` are the default sources."""

    name: str
    model: ModelConfig
    pretrain: PretrainConfig
    finetune: FinetuneConfig
    maestro: str = MAESTRO_URL
    percepiano: str = PERCEPIANO_URL
    synthesizers: tuple[str, ...] = ("fluidr3mono", "musescore-small")
    front_end: FrontEnd = field(default_factory=FrontEnd)
    execution: Execution = field(default_factory=Execution)


# What can be pre-trained: name in tables -> changes of the preset's pre-training and how its model is `ModelConfig.cut`.
# ``ssast`` is the paper's.
PRETRAININGS: dict[str, tuple[dict, dict]] = {
    "ssast": ({}, {}),
    "ssast15": ({"mask_ratio": 0.15}, {}),
    "ssastframe": ({}, {"frames": 2}),
    "visible": ({"decoder_depth": 2}, {}),
    # Two frames of all bands for a patch: as many tokens as of 16 x 16, each of 20 ms, which is the grid of onsets. Visible-only
    # in the joint form: its masked part then costs a third of what it would beside a full pass that listens.
    "transcription": ({"objective": "transcription", "augment": True}, {"frames": 2}),
    "joint": ({"objective": "joint", "augment": True, "decoder_depth": 2}, {"frames": 2}),
    # Convolutions see what is shorter than a patch, so that half as many tokens do.
    "transcriptionstem": ({"objective": "transcription", "augment": True}, {"frames": 4, "stem": (16, 32, 48)}),
}

PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "demo",
            dataclasses.replace(MODELS["micro"], n_frames=256),
            PretrainConfig(batch_size=32, epochs=12, learning_rate=2e-3, warmup_steps=20),
            FinetuneConfig(batch_size=32, epochs=20, learning_rate=1e-3),
            maestro="demo",
            percepiano="demo",
            synthesizers=("builtin",),
        ),
        Preset(
            "micro",
            dataclasses.replace(MODELS["micro"], n_mels=FINE.n_mels, n_frames=256),
            PretrainConfig(batch_size=32, epochs=4, learning_rate=2e-3, warmup_steps=200),
            FinetuneConfig(batch_size=32, epochs=30, learning_rate=1e-3),
            front_end=FINE,
        ),
        Preset(
            "mini",
            dataclasses.replace(MODELS["mini"], n_mels=FINE.n_mels, n_frames=256),
            PretrainConfig(batch_size=32, epochs=8, learning_rate=1e-3, warmup_steps=300),
            FinetuneConfig(batch_size=32, epochs=30, learning_rate=1e-3),
            front_end=FINE,
        ),
        Preset(
            "small",
            MODELS["small"],
            PretrainConfig(batch_size=128, epochs=20, learning_rate=5e-4, warmup_steps=1000),
            FinetuneConfig(batch_size=32, epochs=30, learning_rate=1e-3, strategy="full"),
            execution=Execution(remat=True),  # batch 128 needs it on a chip of 16 GB
        ),
        Preset(
            "base",
            MODELS["base"],
            PretrainConfig(batch_size=128, epochs=40, learning_rate=5e-4, warmup_steps=1000),
            FinetuneConfig(batch_size=32, epochs=30, learning_rate=1e-3, strategy="full"),
            execution=Execution(remat=True),  # batch 128 needs it on a chip of 16 GB
        ),
    )
}


def say(line: str) -> None:
    """Print a line in one piece, also where several threads do."""
    print(f"{line}\n", end="", flush=True)


def as_path(place: str | Path) -> Path:
    """A path on this machine, or what behaves like one at ``gs://``.

    Raises:
        InputError: an address of another kind.
    """
    scheme, there, _ = str(place).partition("://")
    if there and scheme != "gs":
        raise InputError(f"cannot write to {place}: give a directory of this machine, or gs://")
    return epath.Path(place) if there else Path(place)


def claim_directory(directory: str | Path, settings: dict) -> Path:
    """Make ``directory`` the home of one configuration, or find that it already is.

    The settings are kept in ``settings.json``; a second run with the same ones resumes, with others it is refused.

    Raises:
        InputError: the directory holds the output of another configuration, or cannot be written to.
    """
    directory = as_path(directory)
    wanted = json.loads(json.dumps(settings))
    path = directory / "settings.json"
    if path.exists():
        try:
            found = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise InputError(f"{path} is damaged ({error}). Choose another output directory, or delete this one") from error
        if changed := difference(found, wanted):
            raise InputError(
                f"{directory} holds the output of another configuration ({changed}). "
                "Choose another output directory, or delete this one to start over."
            )
        return directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(path, wanted)
    except OSError as error:
        raise InputError(f"cannot write to {directory} ({error}). Choose another output directory") from error
    return directory


def difference(found: dict, wanted: dict) -> str:
    """What differs between the settings that were found and those asked for, as JSON has them; empty if nothing does."""
    found, wanted = json.loads(json.dumps([found, wanted]))
    changed = sorted(key for key in wanted.keys() | found.keys() if wanted.get(key) != found.get(key))
    return "; ".join(f"{key}: {_short(found.get(key))} there, {_short(wanted.get(key))} asked" for key in changed)


def _short(value) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def from_json(kind: type, values: dict):
    """A configuration of ``kind`` from what JSON made of it: lists where it has tuples."""
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def write_json(path: Path, value) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)
