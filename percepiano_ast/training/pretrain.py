"""Pre-training by masked patches, transcription, or both, on any device."""

import collections
import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from percepiano_ast.config import (
    ComputeConfig,
    FrontEnd,
    LevelStats,
    ModelConfig,
    PretrainConfig,
    lookup,
)
from percepiano_ast.errors import InputError, RunFailed
from percepiano_ast.files import lock_config
from percepiano_ast.models import ssast, transcription
from percepiano_ast.models.ast import PREFIX_TOKENS
from percepiano_ast.models.transformer import Compute
from percepiano_ast.music.piano_roll import N_KEYS
from percepiano_ast.training import loop, mesh
from percepiano_ast.training.checkpoints import SAVE_MINUTES, check_disk_space, shown, size_of
from percepiano_ast.training.state import (
    TrainState,
    compute_for,
    learning_rate,
    make_optimizer,
    new_state,
    normalise,
    published_optimizer,
    train_step,
)

logger = logging.getLogger(__name__)

# Folded into a key; steps, batches and clips use small numbers, so this one does not collide.
_OTHER_STREAM = np.uint32(2**32 - 1)

# --- Objectives ---------------------------------------------------------------------------------


class Objective:
    """Base class of `OBJECTIVES`.

    Attributes:
        names: of the losses, ``loss`` first.
        module: the Flax module; for the joint objective, the SSAST. Its parameters hold the encoder
            as ``encoder``.
    """

    names: tuple[str, ...]
    module: nn.Module

    def __init__(
        self, model: ModelConfig, config: PretrainConfig, compute: Compute, num_descriptors: int
    ):
        self.model, self.config = model, config
        self.module = self._build(compute, num_descriptors)

    def _build(self, compute: Compute, num_descriptors: int) -> nn.Module:
        raise NotImplementedError

    def init(self, rng: jax.Array, log_mel: jax.Array) -> dict:
        """Parameters, initialised with one window (1, T, F)."""
        raise NotImplementedError

    def draw(self, rng: jax.Array, batch: int) -> dict[str, jax.Array]:
        """Random values for each clip of a batch, to be added to the batch."""
        return {}

    def losses(self, params: dict, log_mel: jax.Array, batch: dict) -> dict[str, jax.Array]:
        """The losses ``names`` of normalised windows (B, T, F), float32 scalars."""
        raise NotImplementedError

    def measure(self, params: dict, log_mel: jax.Array, batch: dict) -> dict[str, jax.Array]:
        """Float32 scalars of a validation batch, to be summed over batches."""
        return self.losses(params, log_mel, batch)

    def scores(self, total: dict[str, float], batches: int) -> dict[str, float]:
        """Validation scores from the sums over ``batches`` batches: means of the losses first."""
        return {name: total[name] / batches for name in self.names}


class MaskedObjective(Objective):
    """SSAST (Gong et al. 2022), see `models.ssast`."""

    names = ("loss", "nce", "mse", "accuracy")

    def _build(self, compute: Compute, num_descriptors: int) -> nn.Module:
        self.masked = self.config.num_masked(self.model)
        return ssast.SSAST(self.model, compute, self.config.decoder_depth)

    def init(self, rng: jax.Array, log_mel: jax.Array) -> dict:
        """See `Objective`."""
        return self.module.init(rng, log_mel, jnp.arange(self.masked)[None, :])["params"]

    def draw(self, rng: jax.Array, batch: int) -> dict[str, jax.Array]:
        """``mask``: indices of masked patches, int32 (batch, masked)."""
        grid, cluster = self.model.grid, self.config.cluster
        return {"mask": ssast.sample_mask_index(rng, batch, grid, self.masked, cluster)}

    def losses(self, params: dict, log_mel: jax.Array, batch: dict) -> dict[str, jax.Array]:
        """See `Objective`; reads the batch's ``mask``."""
        outputs, _ = self.module.apply({"params": params}, log_mel, batch["mask"])
        config = self.config
        return ssast.losses(
            outputs, generative_weight=config.generative_weight, softmax_over=config.softmax_over
        )


class TranscriptionObjective(Objective):
    """Onsets, keys, strings, velocity, pedals and descriptors, see `models.transcription`."""

    names = transcription.LOSSES

    def _build(self, compute: Compute, num_descriptors: int) -> nn.Module:
        transcription.steps_of(self.model)  # raises an error for unsuitable patches
        return transcription.TranscriptionModel(self.model, compute, num_descriptors)

    def init(self, rng: jax.Array, log_mel: jax.Array) -> dict:
        """See `Objective`."""
        return self.module.init(rng, log_mel)["params"]

    def losses(self, params: dict, log_mel: jax.Array, batch: dict) -> dict[str, jax.Array]:
        """See `Objective`; reads the batch's ``targets`` and ``descriptors``."""
        outputs, _ = self.module.apply({"params": params}, log_mel)
        return transcription.losses(outputs, batch["targets"], batch["descriptors"])

    def measure(self, params: dict, log_mel: jax.Array, batch: dict) -> dict[str, jax.Array]:
        """Losses, and `transcription.metric_counts`."""
        outputs, _ = self.module.apply({"params": params}, log_mel)
        known = batch["targets"], batch["descriptors"]
        counts = transcription.metric_counts(outputs, *known)
        return transcription.losses(outputs, *known) | _prefixed("count_", counts)

    def scores(self, total: dict[str, float], batches: int) -> dict[str, float]:
        """Means of the losses, and `transcription.METRICS`."""
        counts = _without_prefix("count_", total)
        return super().scores(total, batches) | transcription.metrics(counts)


class JointObjective(Objective):
    """Both objectives on one encoder: it encodes the masked window and the complete one, and the
    losses are added."""

    # the prefixes are those of columns in existing histories
    names = (
        "loss",
        *(f"masked_{name}" for name in MaskedObjective.names),
        *(f"heard_{name}" for name in TranscriptionObjective.names),
    )

    def _build(self, compute: Compute, num_descriptors: int) -> nn.Module:
        kinds: dict[str, type[Objective]] = {
            "masked_": MaskedObjective,
            "heard_": TranscriptionObjective,
        }
        self.parts = {
            prefix: kind(self.model, self.config, compute, num_descriptors)
            for prefix, kind in kinds.items()
        }
        return self.parts["masked_"].module

    def init(self, rng: jax.Array, log_mel: jax.Array) -> dict:
        """Parameters of both objectives, with one shared encoder."""
        masked, transcribed = (part.init(rng, log_mel) for part in self.parts.values())
        return transcribed | masked

    def draw(self, rng: jax.Array, batch: int) -> dict[str, jax.Array]:
        """See `MaskedObjective`."""
        return self.parts["masked_"].draw(rng, batch)

    def losses(self, params: dict, log_mel: jax.Array, batch: dict) -> dict[str, jax.Array]:
        """See `Objective`."""
        return self._added(lambda prefix, part: part.losses(params, log_mel, batch))

    def measure(self, params: dict, log_mel: jax.Array, batch: dict) -> dict[str, jax.Array]:
        """The sums of both objectives."""
        return self._added(lambda prefix, part: part.measure(params, log_mel, batch))

    def scores(self, total: dict[str, float], batches: int) -> dict[str, float]:
        """The scores of both objectives."""
        return self._added(lambda name, part: part.scores(_without_prefix(name, total), batches))

    def _added(self, compute: Callable[[str, Objective], dict]) -> dict:
        found = {prefix: compute(prefix, part) for prefix, part in self.parts.items()}
        total = {"loss": found["masked_"]["loss"] + found["heard_"]["loss"]}
        return total | _prefixed("masked_", found["masked_"]) | _prefixed("heard_", found["heard_"])


OBJECTIVES = {
    "ssast": MaskedObjective,
    "transcription": TranscriptionObjective,
    "joint": JointObjective,
}


def _prefixed(prefix: str, values: dict) -> dict:
    return {f"{prefix}{name}": value for name, value in values.items()}


def _without_prefix(prefix: str, values: dict) -> dict:
    """The values whose names have this prefix, named without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in values.items()
        if name.startswith(prefix)
    }


# --- Augmentation by room, microphone, level and noise ------------------------------------------
# The notes and their frames do not change. Without augmentation a model does not generalise: if it
# is trained on one soundfont, it loses a quarter of its correlation on another; if it is trained on
# dry pianos, it mistakes reverberation for the pedal. Augmentation is a pure function of normalised
# levels and the step's key. It runs on the device, at a small fraction of the cost of a step.

GAIN_DB = 6.0  # largest gain, up or down; larger gains would hide the force of the strokes
# largest amplitude of each of `EQ_WAVES` cosines over the mel axis: tilt, one dip, two dips
EQ_DB = 4.0
EQ_WAVES = 3
NOISE_DB = (-80.0, -45.0)  # level of noise in every band
ROOM_SECONDS = (0.2, 2.0)  # reverberation time of the lowest band, log-uniform
ROOM_DULL = 0.6  # the highest band's reverberation time is shorter by this share
# reverberant energy over direct: near the strings, or in the tenth row of a hall
ROOM_DB = (-20.0, 0.0)
IN_A_ROOM = 0.6  # share of the augmented clips that get reverberation
# share of the clips that are not augmented, so that clean recordings stay in the training data
AS_RECORDED = 0.25


def draw_augmentation(rng: jax.Array, batch: int) -> dict[str, jax.Array]:
    """Draw the augmentation of each clip of a batch: arrays of ``batch`` rows."""
    keys = jax.random.split(rng, 8)
    low, high = jnp.log(jnp.array(ROOM_SECONDS))
    return {
        "gain": jax.random.uniform(keys[0], (batch,), minval=-GAIN_DB, maxval=GAIN_DB),
        "eq": jax.random.uniform(keys[1], (batch, EQ_WAVES), minval=-EQ_DB, maxval=EQ_DB),
        "noise": jax.random.uniform(keys[2], (batch,), minval=NOISE_DB[0], maxval=NOISE_DB[1]),
        "room_seconds": jnp.exp(jax.random.uniform(keys[5], (batch,), minval=low, maxval=high)),
        "room": jnp.where(
            jax.random.bernoulli(keys[7], IN_A_ROOM, (batch,)),
            jax.random.uniform(keys[6], (batch,), minval=ROOM_DB[0], maxval=ROOM_DB[1]),
            -jnp.inf,
        ),
        "seed": jax.random.bits(keys[3], (batch,)),
        "changed": ~jax.random.bernoulli(keys[4], AS_RECORDED, (batch,)),
    }


def augment(
    log_mel: jax.Array, drawn: dict[str, jax.Array], statistics: LevelStats, frame_seconds: float
) -> jax.Array:
    """Apply reverberation, equalisation, gain and noise to normalised levels (B, T, F); same
    shape."""
    bands = log_mel.shape[2]
    numbers = jnp.arange(1, EQ_WAVES + 1)[:, None]
    waves = jnp.cos(jnp.pi * numbers * (jnp.arange(bands)[None, :] + 0.5) / bands)
    change = drawn["gain"][:, None] + drawn["eq"] @ waves
    scale = 2 * statistics.std_db
    nepers = scale * jnp.log(10.0) / 10  # per unit of normalised level
    wet = _reverberate(log_mel * nepers, drawn, frame_seconds) / nepers
    wet = wet + change[:, None, :] / scale
    # Power of narrow-band noise is exponentially distributed.
    power = jax.vmap(lambda seed: jax.random.exponential(jax.random.key(seed), log_mel.shape[1:]))(
        drawn["seed"]
    )
    noise = drawn["noise"][:, None, None] + 10 * jnp.log10(power + 1e-6)
    mixed = jnp.logaddexp(wet * nepers, (noise - statistics.mean_db) / scale * nepers) / nepers
    return jnp.where(drawn["changed"][:, None, None], mixed, log_mel)


def _reverberate(power: jax.Array, drawn: dict[str, jax.Array], frame_seconds: float) -> jax.Array:
    """Add a diffuse reverberation tail to log power (B, T, F), in nepers.

    Polack's model (1988): late reverberation is noise whose power decays exponentially, so that
    powers add. The direct sound does not change. The tail of a steady sound has ``room`` dB more
    energy than the sound.
    """
    bands = power.shape[2]
    dulling = 1 - ROOM_DULL * jnp.arange(bands)[None, :] / (bands - 1)
    seconds = drawn["room_seconds"][:, None] * dulling
    # decay of the power per frame: 60 dB in ``seconds``
    kept = 10 ** (-6 * frame_seconds / seconds)
    gain = (1 - kept) * 10 ** (drawn["room"][:, None] / 10)
    sound = jnp.exp(power)

    def joined(earlier, later):
        return earlier[0] * later[0], earlier[1] * later[0] + later[1]

    # The tail at a frame is the decayed sum of all earlier frames.
    decays = jnp.broadcast_to(kept[:, None, :], sound.shape)
    _, tail = jax.lax.associative_scan(joined, (decays, sound), axis=1)
    tail = jnp.pad(tail[:, :-1], ((0, 0), (1, 0), (0, 0)))
    return jnp.log(sound + gain[:, None, :] * tail)


# --- Run ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pretraining:
    """Configuration and functions of a pre-training run.

    Attributes:
        model, config, front_end, statistics, total_steps: determine the training.
        compute, layout: how and where it is computed; by default on all devices.
        num_descriptors: number of descriptors of a window to predict along with the notes; 0 for
            none.
    """

    model: ModelConfig
    config: PretrainConfig
    front_end: FrontEnd
    statistics: LevelStats
    total_steps: int
    compute: ComputeConfig = ComputeConfig()
    layout: mesh.Layout = field(default_factory=mesh.Layout.over)
    num_descriptors: int = 0

    @functools.cached_property
    def objective(self) -> Objective:
        """The objective, computing in the precision chosen for the hardware.

        Raises:
            InputError: an unknown objective, or patches that are incompatible with it.
        """
        kind = lookup(OBJECTIVES, self.config.objective, "objective")
        compute = compute_for(self.compute, self.layout.device, self.layout.size)
        return kind(self.model, self.config, compute, self.num_descriptors)

    @property
    def module(self) -> nn.Module:
        """The objective's Flax module; for the joint objective, the SSAST."""
        return self.objective.module

    @functools.cached_property
    def schedule(self):
        """Learning rate by step: warm-up and cosine over the whole run."""
        return learning_rate(self.config, self.total_steps)

    @functools.cached_property
    def optimizer(self):
        """The optimiser named in the configuration."""
        make = {
            "adamw": lambda: make_optimizer(self.config, self.total_steps),
            "published": lambda: published_optimizer(self.schedule),
        }
        return lookup(make, self.config.optimizer, "optimizer")()

    def _first_state(self) -> TrainState:
        codes = jnp.zeros((1, self.model.n_frames, self.model.n_mels), jnp.uint8)
        log_mel = normalise(codes, self.front_end, self.statistics)
        params = self.objective.init(jax.random.key(self.config.seed), log_mel)
        return new_state(params, self.optimizer, ema=self.config.ema_decay > 0)

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes and types of the state."""
        return jax.eval_shape(self._first_state)

    def init(self) -> TrainState:
        """The state before the first step, initialised from the seed."""
        return jax.jit(self._first_state, out_shardings=self.layout.of_state(self.abstract_state))()

    def inputs(self, batch: dict) -> jax.Array:
        """Normalised windows (B, T, F) of a batch's ``codes``, augmented if the batch has
        ``augment``."""
        log_mel = normalise(batch["codes"], self.front_end, self.statistics)
        if "augment" not in batch:
            return log_mel
        return augment(log_mel, batch["augment"], self.statistics, self.front_end.seconds(1))

    def draw(self, rng: jax.Array, batch: int) -> dict:
        """All random values for the clips of one step."""
        drawn: dict = self.objective.draw(rng, batch)
        if self.config.augment:
            drawn["augment"] = draw_augmentation(jax.random.fold_in(rng, _OTHER_STREAM), batch)
        return drawn

    @functools.cached_property
    def step(self) -> jax.stages.Wrapped:
        """Jitted training step, (state, batch without its ``clip``) -> (state, metrics); the input
        state is donated. Step k draws from ``fold_in(key, k)``.

        Raises:
            InputError: devices and micro-batches do not divide the batch.
        """
        layout, compute = self.layout, self.compute
        layout.check_batch(self.config.batch_size, compute.accum_steps)

        def objective(params, part):
            losses = self.objective.losses(params, self.inputs(part), part)
            return losses["loss"], losses

        def step(state: TrainState, batch: dict):
            rng = jax.random.fold_in(jax.random.key(self.config.seed), state.step)
            batch = batch | self.draw(rng, len(batch["codes"]))
            return train_step(
                state,
                batch,
                objective,
                self.optimizer,
                accum_steps=compute.accum_steps,
                half=self.module.compute.dtype == jnp.float16,
                ema_decay=self.config.ema_decay,
            )

        shardings = layout.of_state(self.abstract_state)
        return jax.jit(
            step,
            donate_argnums=0,
            in_shardings=(shardings, layout.sharding(mesh.DATA)),
            out_shardings=(shardings, layout.sharding()),
        )

    @functools.cached_property
    def measure(self) -> Callable[[dict, dict, jax.Array], dict]:
        """Jitted `Objective.measure` of a batch without augmentation: params, batch, rng -> scalars
        to be summed."""

        def measure(params, batch, rng):
            batch = batch | self.objective.draw(rng, len(batch["codes"]))
            return self.objective.measure(params, self.inputs(batch), batch)

        return jax.jit(measure)

    def validate(self, params: dict, batches: Iterable[dict]) -> dict[str, float]:
        """The objective's scores over validation batches, named ``validation_...``.

        Raises:
            InputError: there are no batches.
        """
        # The random values are the same in every validation, and independent of those in training.
        key = jax.random.fold_in(jax.random.key(self.config.seed), _OTHER_STREAM)
        total: dict[str, float] = collections.defaultdict(float)
        count = 0
        for count, batch in enumerate(batches, 1):
            part = self.measure(params, self.put(batch), jax.random.fold_in(key, count - 1))
            for name, value in part.items():
                total[name] += float(value)
        if not count:
            raise InputError(
                "the validation split does not fill one batch; choose a smaller batch size"
            )
        return _prefixed("validation_", self.objective.scores(total, count))

    def put(self, batch: dict) -> dict:
        """This process's rows of a batch -> the global batch on the devices, without ``clip``."""
        arrays = {name: value for name, value in batch.items() if name != "clip"}
        return jax.tree.map(self.layout.put_batch, arrays)


def pretrain(
    model: ModelConfig,
    config: PretrainConfig,
    front_end: FrontEnd,
    statistics: LevelStats,
    *,
    batches: Callable[[int], Iterator[dict]],
    steps_per_epoch: int,
    validation: Callable[[], Iterable[dict]],
    directory: str | Path,
    description: dict,
    store: str | Path = "",
    save_minutes: float = SAVE_MINUTES,
    compute: ComputeConfig = ComputeConfig(),
    num_descriptors: int = 0,
) -> list[dict]:
    """Pre-train with a checkpoint per epoch, or resume from the newest intact checkpoint; returns
    the history.

    Writes ``history.csv`` (one row per epoch), ``steps.csv`` (one row every few steps) and
    ``checkpoints`` to ``directory``, the checkpoints to ``store`` if it is given.

    Args:
        batches: ``batches(k)`` yields the batches of steps k, k + 1, ...
        validation: yields the validation batches, the same ones every time.
        description: saved with every checkpoint (source, licence, ...).
        store: another folder for the checkpoints, or ``gs://BUCKET/PREFIX``.
        save_minutes: minutes between checkpoints within a long epoch.
        compute: how to compute; may differ when a run is resumed.
        num_descriptors: number of columns of the batches' ``descriptors``; 0 for none.

    Raises:
        InputError: ``directory`` holds a run of another configuration, or the batch cannot be
            divided as requested.
        FloatingPointError: loss, gradient or update is not finite; the message names the step and
            the clips of its batch.
        RunFailed: the batch does not fit into the device's memory.
        StorageError: training is complete, but the last checkpoint or the history could not be
            saved.
    """
    settings = {"model": asdict(model), "pretrain": asdict(config), "front_end": asdict(front_end)}
    settings |= {"statistics": asdict(statistics), **description}
    settings |= {"steps_per_epoch": steps_per_epoch}
    if mesh.is_lead():
        lock_config(directory, settings)
    mesh.wait_for_all("directory claimed")
    # the other processes compare with the first one's file
    directory = lock_config(directory, settings)
    layout = mesh.Layout.over(fsdp=compute.fsdp)
    steps, place = config.epochs * steps_per_epoch, f"{store or directory}/checkpoints"
    run = Pretraining(model, config, front_end, statistics, steps, compute, layout, num_descriptors)
    step, one = run.step, size_of(run.abstract_state)  # an indivisible batch raises an error here
    check_disk_space(place, one, f"{shown(4 * one)} (the last 2, the best, one being saved)")
    kind, dtype = layout.device.device_kind, run.module.compute.dtype
    logger.info(
        f"{config.objective} {model.name}:"
        f" {sum(leaf.size for leaf in jax.tree.leaves(run.abstract_state.params)):,} parameters,"
        f" {steps} steps on {layout.size} x {kind} in {jnp.dtype(dtype).name}"
    )
    flops, peak = pretrain_flops(model, config), layout.size * matrix_peak(dtype, layout.device)
    started = time.monotonic()

    def compile_step(state: TrainState, batch: dict) -> Callable:
        start = time.monotonic()
        compiled = step.lower(state, batch).compile()
        logger.info(f"  compiled the training step in {time.monotonic() - start:.0f} s")
        return compiled

    def measure(step: int, seconds: float) -> dict[str, float]:
        speed = config.batch_size / seconds
        rate = float(run.schedule(step - 1))
        return {"learning_rate": rate, "clips_per_second": speed, "mfu": speed * flops / peak}

    def validate(params: dict) -> dict[str, float]:
        scores = run.validate(params, validation())
        return scores | {"seconds": round(time.monotonic() - started, 1)}

    try:
        return loop.fit(
            run.init,
            compile_step,
            batches,
            lambda batch, history: run.put(batch),
            put_state=layout.put_state,
            epochs=config.epochs,
            steps_per_epoch=steps_per_epoch,
            names=(*run.objective.names, "gradient_norm", "update_norm", "skipped"),
            log_every=loop.LOG_EVERY,
            measure=measure,
            validate=validate,
            directory=directory,
            place=place,
            settings=settings | {"seed": config.seed},
            save_minutes=save_minutes,
        )[1]
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise RunFailed(
            f"a batch of {config.batch_size} in {compute.accum_steps} micro-batches does not fit"
            f" into the memory of {layout.size} x {kind}: choose"
            f" accum_steps={2 * compute.accum_steps}{'' if compute.remat else ' or remat=True'}."
            f" The device reports: {str(error).splitlines()[0][:200]}"
        ) from error


def pretrain_flops(model: ModelConfig, config: PretrainConfig) -> float:
    """FLOPs of one training clip, forward and backward (3 x forward), without the recomputation of
    remat; 2 per multiply-add. Norms and the descriptor head are negligible."""

    def blocks(width: int, depth: int, tokens: int) -> int:
        weights = (4 + 2 * model.mlp_ratio) * width**2
        return depth * tokens * (2 * weights + 4 * tokens * width)

    def encoder(patches: int) -> int:
        embedding = 2 * patches * model.patch_dim * model.width
        return embedding + blocks(model.width, model.depth, PREFIX_TOKENS + patches)

    forward, patches = 0, model.num_patches
    if config.objective != "transcription":
        masked, width = config.num_masked(model), model.width
        visible = patches - masked if config.decoder_depth else patches
        forward += encoder(visible)
        if config.decoder_depth:
            width //= 2
            forward += 2 * (PREFIX_TOKENS + visible) * model.width * width
            forward += blocks(width, config.decoder_depth, PREFIX_TOKENS + patches)
        forward += 2 * 2 * masked * width * (width + model.patch_dim)  # two heads
        forward += 2 * masked**2 * model.patch_dim  # InfoNCE
    if config.objective != "ssast":
        steps = transcription.steps_of(model) * model.grid[1]
        outputs = len(transcription.ROLLS) * N_KEYS + len(transcription.PEDALS)
        forward += encoder(patches)
        forward += 2 * steps * transcription.HIDDEN * (model.grid[0] * model.width + outputs)
    return 3.0 * forward


def matrix_peak(dtype: jnp.dtype, device: jax.Device) -> float:
    """Measured FLOP/s of ``device`` in one large matrix product of ``dtype``, the best of five;
    the denominator of the model FLOPs utilisation (MFU)."""
    side = 1024 if device.platform == "cpu" else 8192  # saturates the device, and is quick
    with jax.default_device(device):
        matrix = jnp.ones((side, side), dtype)
        multiply = jax.jit(lambda x: x @ x).lower(matrix).compile()
        multiply(matrix).block_until_ready()
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            multiply(matrix).block_until_ready()
            best = min(best, time.perf_counter() - start)
    return 2.0 * side**3 / best


def reconstruction(
    run: Pretraining, params: dict, codes: np.ndarray, seed: int = 0
) -> tuple[np.ndarray, ...]:
    """Original, masked and reconstructed windows in dB, each (batch, time, mel), for the figure of
    notebook 02.

    Raises:
        InputError: the objective does not mask patches.
    """
    mask = run.objective.draw(jax.random.key(seed), len(codes)).get("mask")
    if mask is None:
        raise InputError(
            f"pre-training with objective {run.config.objective!r} does not mask patches, so there"
            " is no reconstruction to show. Choose a checkpoint with objective ssast or joint"
        )
    log_mel = normalise(jnp.asarray(codes), run.front_end, run.statistics)
    outputs, _ = jax.jit(run.module.apply)({"params": params}, log_mel, mask)
    masked, rebuilt = ssast.reconstruct(log_mel, outputs["generative"], mask, run.model)
    scale, mean = 2 * run.statistics.std_db, run.statistics.mean_db
    return tuple(
        np.asarray(values, np.float32) * scale + mean for values in (log_mel, masked, rebuilt)
    )
