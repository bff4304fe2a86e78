"""All configuration values, in frozen dataclasses; derived values are properties."""

import dataclasses
import difflib
import math
from dataclasses import dataclass, field

from percepiano_ast.errors import InputError


@dataclass(frozen=True)
class FrontEnd:
    """Configuration of the log-mel front end, stored with every data set and model.

    Levels are ``10 log10(max(S, amin))`` dB of mel power, not normalised per clip: loudness is a
    rated quality. ``kind`` is ``slaney`` (librosa) or ``kaldi`` (AST and SSAST, see `KALDI`).

    Raises:
        InputError: values out of range, such as those of a damaged file.
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

    def __post_init__(self) -> None:
        if not (
            1000 <= self.sample_rate <= 10**6
            and 1 <= self.win_length <= self.n_fft <= 2**16
            and 16 <= self.hop_length <= 2**16
            and 1 <= self.n_mels <= 1024
            and 0 <= self.fmin < self.fmax <= self.sample_rate / 2
            and min(self.amin, self.step_db) > 0
            and math.isfinite(self.floor_db)
        ):
            raise InputError(f"{self} is not a valid front end. Correct it.")

    def n_frames(self, n_samples: int) -> int:
        """Frames of a recording of ``n_samples``: frame k is centred on sample ``k * hop_length``
        (``slaney``), or starts there and is complete (``kaldi``)."""
        if self.kind == "kaldi":
            return max(1 + (n_samples - self.win_length) // self.hop_length, 0)
        return 1 + n_samples // self.hop_length

    def seconds(self, n_frames: int) -> float:
        """Duration of ``n_frames`` hops."""
        return n_frames * self.hop_length / self.sample_rate


@dataclass(frozen=True)
class LevelStats:
    """Levels of a training split in dB over all mel bins, and the shares at the ends of the uint8
    range. The model's input is ``(dB - mean) / (2 std)`` (Gong et al. 2021, section 2.1)."""

    mean_db: float
    std_db: float
    count: int
    at_floor: float
    at_ceiling: float

    @property
    def valid(self) -> bool:
        """Whether levels can be normalised by it."""
        return math.isfinite(self.mean_db) and 0 < self.std_db < math.inf


# The front end of AST and SSAST (Gong et al. 2021, section 2.1), required by AudioSet weights:
# Kaldi's fbank at 16 kHz, in dB instead of natural logarithms.
KALDI = FrontEnd(
    kind="kaldi",
    sample_rate=16_000,
    n_fft=512,
    win_length=400,
    hop_length=160,
    fmax=8_000.0,
    amin=1.1920928955078125e-07,
)
# For transcription: windows of 93 ms and bands of 15 Hz below 1 kHz resolve neighbouring keys two
# octaves lower than windows of 25 ms, as is usual (Hawthorne et al. 2018: 2,048 samples, 229
# bands); 224 bands are 14 patches.
FINE = FrontEnd(n_fft=2048, win_length=2048, n_mels=224)
_DB_PER_NEPER = 10 / math.log(10)  # of power
# AudioSet's mean and standard deviation in natural logarithms, as published with AST
# (``ast_models.py``, ``run.py``).
AUDIOSET = LevelStats(-4.2677393 * _DB_PER_NEPER, 4.5689974 * _DB_PER_NEPER, 0, 0.0, 0.0)


@dataclass(frozen=True)
class ModelConfig:
    """Geometry of an AST encoder. ``patch_size`` and ``stride`` are (frequency, time); ``stem``:
    channels of convolutions before patching, see `ast.Stem`, none as published.

    Raises:
        InputError: sizes that do not match.
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
            heads = f"{self.num_heads} heads. Choose another number of heads."
            raise InputError(f"width {self.width} is not divisible by {heads}")
        if self.n_mels < self.patch_size[0] or self.n_frames < self.patch_size[1]:
            raise InputError(
                f"a window of {self.n_mels} bands x {self.n_frames} frames is smaller than a patch"
                f" of {self.patch_size[0]} x {self.patch_size[1]}. Choose a longer window or"
                " smaller patches."
            )
        wide = self.patch_size[1]
        if self.stem and (
            self.patch_size != self.stride
            or self.grid[0] > 1
            or wide & (wide - 1)
            or wide > 2 ** len(self.stem)
        ):
            raise InputError(
                f"a stem of {len(self.stem)} convolutions does not match patches of"
                f" {self.patch_size[0]} x {wide}. Choose non-overlapping patches of all"
                f" {self.n_mels} bands and 1, 2 ... {2 ** len(self.stem)} frames (a power of 2)."
            )

    def cut(self, frames: int = 0, stem: tuple[int, ...] = ()) -> "ModelConfig":
        """The same model with patches of all bands and ``frames`` frames; 0 keeps the patches."""
        if not frames:
            return self
        patch = (self.n_mels, frames)
        return dataclasses.replace(self, patch_size=patch, stride=patch, stem=stem)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along (frequency, time)."""
        sizes = zip((self.n_mels, self.n_frames), self.patch_size, self.stride)
        high, wide = ((size - patch) // stride + 1 for size, patch, stride in sizes)
        return high, wide

    @property
    def num_patches(self) -> int:
        """Number of patch tokens per window."""
        return self.grid[0] * self.grid[1]

    @property
    def patch_dim(self) -> int:
        """Number of values per patch."""
        return self.patch_size[0] * self.patch_size[1]


# tiny, small and base are the published sizes (Gong et al. 2022, table 5); micro is for tests and
# the demo on a CPU, mini trains on two cores in an hour or two, compact in about ten hours.
MODELS = {
    model.name: model
    for model in (
        ModelConfig("micro", width=96, depth=4, num_heads=4),
        ModelConfig("mini", width=192, depth=4, num_heads=4),
        ModelConfig("compact", width=256, depth=4, num_heads=4),
        ModelConfig("tiny", width=192, depth=12, num_heads=3),
        ModelConfig("small", width=384, depth=12, num_heads=6),
        ModelConfig("base", width=768, depth=12, num_heads=12),
    )
}


def lookup(table: dict, name: str, what: str):
    """Look up ``name`` in ``table``.

    Raises:
        InputError: unknown name; the message lists the valid names and suggests the closest one.
    """
    if name in table:
        return table[name]
    near = difflib.get_close_matches(str(name), table, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise InputError(f"unknown {what} {name!r}.{hint} Choose one of: {', '.join(table)}.")


@dataclass(frozen=True)
class PretrainConfig:
    """Configuration of pre-training.

    Attributes:
        objective: ``ssast``, masked patches; ``transcription``, notes and pedals; or ``joint``.
        augment: random room, level, equalisation and noise for every window, see
            `training.pretrain`; off as published.
        mask_ratio, cluster: the paper's 400 of 512 patches, and its C in {3, 4, 5}.
        decoder_depth: 0: the encoder receives mask tokens (Gong et al. 2022). Above 0: only visible
            patches, and a decoder of so many blocks predicts the others (MAE-AST, Baade et al.
            2022, which has 2).
        optimizer: ``adamw``, or ``published``, SSAST's Adam with coupled L2, its betas and decay.
        ema_decay: above 0: a moving average of the parameters, which fine-tuning starts from.
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
        """Number of masked patches per window.

        Raises:
            InputError: no masked or no visible patch.
        """
        masked = round(self.mask_ratio * model.num_patches)
        if not 1 <= masked < model.num_patches:
            raise InputError(
                f"mask ratio {self.mask_ratio:g} masks {masked} of {model.num_patches} patches. "
                f"Choose one from {1 / model.num_patches:.3g} to {1 - 1 / model.num_patches:.3g}."
            )
        return masked


HEADS = ("joint", "grouped", "attention")
POOLINGS = ("mean", "mean_std")
SCALES = ("none", "dimension", "group")
WEIGHTINGS = ("equal", "uncertainty", "dwa")
STRATEGIES = ("frozen", "last", "gradual", "full", "lora")


@dataclass(frozen=True)
class FinetuneConfig:
    """Configuration of rating heads and encoder, for PercePiano or custom ratings.

    Attributes:
        strategy: trained part of the encoder. ``frozen``: none, the heads receive pooled embeddings
            of whole clips; ``last``: its last ``last_blocks`` blocks; ``gradual``: one more block
            every ``unfreeze_epochs`` epochs (ULMFiT, Howard and Ruder 2018, section 3.3); ``full``:
            all of it; ``lora``: adapters of rank ``lora_rank`` on the attention's q, k, v and o,
            scaled by ``lora_alpha / lora_rank`` (Hu et al. 2022, equation 3).
        encoder_rate: learning rate of the encoder's top block relative to the heads'.
        layer_decay: learning rate of each block relative to the one above it (MAE, He et al. 2022,
            table 9).
        max_windows: maximum number of windows per clip in a training batch.
        head: ``joint``: one hidden layer for all dimensions; ``grouped``: one for each of
            ``dimensions.HEAD_GROUPS``; ``attention``: see `heads.CrossTaskAttention`.
        pooling: statistics over time that the heads receive.
        transcription_features: the heads also receive `performance_features` of the clip's
            transcription; needs a frozen encoder pre-trained to transcribe.
        rating_scale: ratings are standardised over the fold's training clips, per ``dimension`` or
            per ``group``, or not at all.
        weighting: of the groups' losses, see `training.finetune`.
        weigh_by_raters: weight clips by their number of raters.
        predict_uncertainty: the heads also predict a standard deviation for every rating (Nix and
            Weigend 1994).
        mask_bands, mask_frames, mixup, gain_db: augmentation of the encoder's training windows, see
            ``data/augment.py``.
        held_out_synthesizer: its renderings are excluded from training, and predicted in a separate
            table, to measure the loss on an unknown piano.
    """

    batch_size: int
    epochs: int
    learning_rate: float
    strategy: str = "frozen"
    last_blocks: int = 2
    unfreeze_epochs: int = 2
    lora_rank: int = 8
    lora_alpha: float = 16.0
    encoder_rate: float = 0.1
    layer_decay: float = 0.75
    max_windows: int = 2
    head: str = "grouped"
    pooling: str = "mean_std"
    transcription_features: bool = False
    rating_scale: str = "none"
    weighting: str = "equal"
    dwa_temperature: float = 2.0
    weigh_by_raters: bool = False
    predict_uncertainty: bool = False
    mask_bands: int = 0
    mask_frames: int = 0
    mixup: float = 0.0
    gain_db: float = 0.0
    weight_decay: float = 1.0
    betas: tuple[float, float] = (0.9, 0.98)
    clip_norm: float = 1.0
    warmup_steps: int = 20
    hidden: int = 128
    dropout: float = 0.5
    held_out_synthesizer: str = ""
    protocol: str = "content"
    seed: int = 0

    @property
    def trains_encoder(self) -> bool:
        """Whether any part of the encoder is trained."""
        return self.strategy != "frozen"


@dataclass(frozen=True)
class ComputeConfig:
    """How a training step is computed. This changes results only by rounding, so a run can be
    resumed on other hardware with other options."""

    # float32, bfloat16, float16 (with loss scaling) or auto, the fastest on the device. Parameters,
    # LayerNorm statistics, softmax and losses are always float32.
    precision: str = "auto"
    accum_steps: int = 1  # micro-batches per batch; their gradients are averaged
    remat: bool = False  # recompute each block in the backward pass instead of storing activations
    # xla, cudnn (fused, Ampere or later, 16-bit), heads (one at a time, for CPUs) or auto
    attention: str = "auto"
    fsdp: bool = False  # shard parameters and optimiser state over the devices, too


MAESTRO_URL = (
    "https://storage.googleapis.com/magentadata/datasets/maestro/v3.0.0/maestro-v3.0.0.zip"
)
PERCEPIANO_URL = "https://github.com/JonghoKimSNU/PercePiano/archive/e672299b8661f63802cd5cd73bb3c76218a13029.zip"


@dataclass(frozen=True)
class Preset:
    """A PRESET of the notebooks; ``maestro`` and ``percepiano`` are the default sources."""

    name: str
    model: ModelConfig
    pretrain: PretrainConfig
    finetune: FinetuneConfig
    maestro: str = MAESTRO_URL
    percepiano: str = PERCEPIANO_URL
    synthesizers: tuple[str, ...] = ("fluidr3mono", "musescore-small")
    front_end: FrontEnd = field(default_factory=FrontEnd)
    compute: ComputeConfig = field(default_factory=ComputeConfig)


# Pre-training variants: name in tables -> changes of the preset's pre-training, and arguments of
# `ModelConfig.cut`. ``ssast`` is as published.
PRETRAININGS: dict[str, tuple[dict, dict]] = {
    "ssast": ({}, {}),
    "ssast15": ({"mask_ratio": 0.15}, {}),
    "ssastframe": ({}, {"frames": 2}),
    "visible": ({"decoder_depth": 2}, {}),
    # Patches of two frames and all bands: as many tokens as with 16 x 16, each of 20 ms. In the
    # joint form the masked part encodes only visible patches, in a third of the time.
    "transcription": ({"objective": "transcription", "augment": True}, {"frames": 2}),
    "joint": ({"objective": "joint", "augment": True, "decoder_depth": 2}, {"frames": 2}),
    # Convolutions resolve details shorter than a patch, so half as many tokens suffice.
    "transcriptionstem": (
        {"objective": "transcription", "augment": True},
        {"frames": 4, "stem": (16, 32, 48)},
    ),
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
            "compact",
            # Windows of five seconds show what the pedal keeps sounding.
            dataclasses.replace(MODELS["compact"], n_mels=FINE.n_mels, n_frames=512),
            PretrainConfig(
                batch_size=16, epochs=24, learning_rate=1e-3, warmup_steps=500, ema_decay=0.999
            ),
            FinetuneConfig(batch_size=32, epochs=30, learning_rate=1e-3),
            front_end=FINE,
        ),
        Preset(
            "small",
            MODELS["small"],
            PretrainConfig(batch_size=128, epochs=20, learning_rate=5e-4, warmup_steps=1000),
            FinetuneConfig(batch_size=32, epochs=30, learning_rate=1e-3, strategy="full"),
            compute=ComputeConfig(remat=True),  # required for batch 128 on a 16 GB device
        ),
        Preset(
            "base",
            MODELS["base"],
            PretrainConfig(batch_size=128, epochs=40, learning_rate=5e-4, warmup_steps=1000),
            FinetuneConfig(batch_size=32, epochs=30, learning_rate=1e-3, strategy="full"),
            compute=ComputeConfig(remat=True),  # required for batch 128 on a 16 GB device
        ),
    )
}


def from_json(kind: type, values: dict):
    """A configuration of ``kind`` from JSON values, with lists converted to tuples."""
    tuples = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return kind(**values | tuples)
