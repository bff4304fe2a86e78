"""Pre-training by masked patches, transcription, or both, on any device."""

import collections
import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

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
from percepiano_ast.training.checkpoints import (
    SAVE_MINUTES,
    check_disk_space,
    saved_settings,
    shown,
    size_of,
)
from percepiano_ast.training.lock import Lock
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


class Objective(NamedTuple):
    """What a model is pre-trained for.

    Attributes:
        names: of the losses, ``loss`` first.
        module: the Flax module; for the joint objective, the SSAST. Its parameters hold the encoder
            as ``encoder``.
        init: rng, one window (1, T, F) -> parameters.
        draw: rng, number of clips -> random values for each clip, to be added to the batch.
        losses: parameters, normalised windows (B, T, F), batch -> the losses ``names``, float32.
        measure: as ``losses``, of a validation batch, with further scalars; to be summed.
        scores: these sums, number of batches -> validation scores, means of the losses first.
    """

    names: tuple[str, ...]
    module: nn.Module
    init: Callable[[jax.Array, jax.Array], dict]
    draw: Callable[[jax.Array, int], dict]
    losses: Callable[[dict, jax.Array, dict], dict]
    measure: Callable[[dict, jax.Array, dict], dict]
    scores: Callable[[dict, int], dict]


def masked_objective(
    model: ModelConfig, config: PretrainConfig, compute: Compute, num_descriptors: int
) -> Objective:
    """SSAST (Gong et al. 2022), see `models.ssast`: ``mask``, int32 (batch, masked), is drawn."""
    names, masked = ("loss", "nce", "mse", "accuracy"), config.num_masked(model)
    module = ssast.SSAST(model, compute, config.decoder_depth)

    def draw(rng: jax.Array, batch: int) -> dict:
        return {"mask": ssast.sample_mask_index(rng, batch, model.grid, masked, config.cluster)}

    def losses(params: dict, log_mel: jax.Array, batch: dict) -> dict:
        outputs, _ = module.apply({"params": params}, log_mel, batch["mask"])
        weight, over = config.generative_weight, config.softmax_over
        return ssast.losses(outputs, generative_weight=weight, softmax_over=over)

    return Objective(
        names,
        module,
        lambda rng, log_mel: module.init(rng, log_mel, jnp.arange(masked)[None, :])["params"],
        draw,
        losses,
        losses,
        lambda total, batches: {name: total[name] / batches for name in names},
    )


def transcription_objective(
    model: ModelConfig, config: PretrainConfig, compute: Compute, num_descriptors: int
) -> Objective:
    """Onsets, keys, strings, velocity, pedals and descriptors, see `models.transcription`: reads
    the batch's ``targets`` and ``descriptors``, and is scored by `transcription.METRICS` too.

    Raises:
        InputError: unsuitable patches.
    """
    transcription.steps_of(model)
    module = transcription.TranscriptionModel(model, compute, num_descriptors)

    def losses(params: dict, log_mel: jax.Array, batch: dict) -> dict:
        outputs, _ = module.apply({"params": params}, log_mel)
        return transcription.losses(outputs, batch["targets"], batch["descriptors"])

    def measure(params: dict, log_mel: jax.Array, batch: dict) -> dict:
        outputs, _ = module.apply({"params": params}, log_mel)
        known = batch["targets"], batch["descriptors"]
        counts = transcription.metric_counts(outputs, *known)
        return transcription.losses(outputs, *known) | _prefixed("count_", counts)

    def scores(total: dict, batches: int) -> dict:
        means = {name: total[name] / batches for name in transcription.LOSSES}
        return means | transcription.metrics(_without_prefix("count_", total))

    return Objective(
        transcription.LOSSES,
        module,
        lambda rng, log_mel: module.init(rng, log_mel)["params"],
        lambda rng, batch: {},
        losses,
        measure,
        scores,
    )


def joint_objective(
    model: ModelConfig, config: PretrainConfig, compute: Compute, num_descriptors: int
) -> Objective:
    """Both objectives on one encoder: it encodes the masked window and the complete one, and the
    losses are added."""
    given = model, config, compute, num_descriptors
    masked, notes = masked_objective(*given), transcription_objective(*given)

    # the prefixes are those of columns in existing histories
    def joined(one: dict, other: dict) -> dict:
        total = {"loss": one["loss"] + other["loss"]}
        return total | _prefixed("masked_", one) | _prefixed("heard_", other)

    def scores(total: dict, batches: int) -> dict:
        one = masked.scores(_without_prefix("masked_", total), batches)
        return joined(one, notes.scores(_without_prefix("heard_", total), batches))

    return Objective(
        tuple(joined(dict.fromkeys(masked.names, 0), dict.fromkeys(notes.names, 0))),
        masked.module,
        lambda *inputs: notes.init(*inputs) | masked.init(*inputs),
        masked.draw,
        lambda *inputs: joined(masked.losses(*inputs), notes.losses(*inputs)),
        lambda *inputs: joined(masked.measure(*inputs), notes.measure(*inputs)),
        scores,
    )


OBJECTIVES = {
    "ssast": masked_objective,
    "transcription": transcription_objective,
    "joint": joint_objective,
}


def _prefixed(prefix: str, values: dict) -> dict:
    return {f"{prefix}{name}": value for name, value in values.items()}


def _without_prefix(prefix: str, values: dict) -> dict:
    """The values whose names have this prefix, named without it."""
    names = [name for name in values if name.startswith(prefix)]
    return {name.removeprefix(prefix): values[name] for name in names}


# --- Augmentation by room, microphone, level and noise ------------------------------------------
# The notes and their frames do not change. A model that is trained on one soundfont without
# augmentation loses a quarter of its correlation on another; one that is trained on dry pianos
# mistakes reverberation for the pedal. A pure function of normalised levels and the step's key.

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
        num_descriptors: number of descriptors of a window to predict along with the notes.
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
        make = lookup(OBJECTIVES, self.config.objective, "objective")
        compute = compute_for(self.compute, self.layout.device, self.layout.size)
        return make(self.model, self.config, compute, self.num_descriptors)

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
        drawn = self.objective.draw(rng, batch)
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
        accum_steps, config = self.compute.accum_steps, self.config
        self.layout.check_batch(config.batch_size, accum_steps)

        def objective(params, part):
            losses = self.objective.losses(params, self.inputs(part), part)
            return losses["loss"], losses

        def step(state: TrainState, batch: dict):
            rng = jax.random.fold_in(jax.random.key(config.seed), state.step)
            batch = batch | self.draw(rng, len(batch["codes"]))
            return train_step(
                state,
                batch,
                objective,
                self.optimizer,
                accum_steps=accum_steps,
                half=self.module.compute.dtype == jnp.float16,
                ema_decay=config.ema_decay,
            )

        states = self.layout.of_state(self.abstract_state)
        return jax.jit(
            step,
            donate_argnums=0,
            in_shardings=(states, self.layout.sharding(mesh.DATA)),
            out_shardings=(states, self.layout.sharding()),
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
    """Pre-train with a checkpoint per epoch, or resume; returns the history.

    Writes ``history.csv`` (one row per epoch), ``steps.csv`` (one row every few steps) and
    ``checkpoints`` to ``directory``, the checkpoints to ``store`` if it is given.

    Args:
        batches: ``batches(k)`` yields the batches of steps k, k + 1, ... as dicts: this process's
            rows of ``codes`` (batch, time, mel), uint8 or float16 dB, their names ``clip``, and
            further inputs of the objective.
        validation: yields the validation batches, the same ones every time.
        description: saved with every checkpoint (source, licence, ...).
        store: another folder for the checkpoints, or ``gs://BUCKET/PREFIX``.
        save_minutes: minutes between checkpoints within a long epoch.
        compute: how to compute; may differ when a run is resumed.
        num_descriptors: number of columns of the batches' ``descriptors``; 0 for none.

    Raises:
        InputError: ``directory`` holds a run of another configuration, or one in progress, or the
            batch cannot be divided as requested.
        RunFailed: the batch does not fit into the device's memory; see `loop.fit`.
        FloatingPointError, StorageError: see `loop.fit`.
    """
    settings: dict = {"model": asdict(model), "pretrain": asdict(config)}
    settings |= {"front_end": asdict(front_end), "statistics": asdict(statistics), **description}
    settings |= {"steps_per_epoch": steps_per_epoch}
    place = f"{store or directory}/checkpoints"
    saved = functools.partial(saved_settings, place)
    if mesh.is_lead():
        lock_config(directory, settings, saved)
    mesh.wait_for_all("directory claimed")
    # the other processes compare with the first one's file
    directory = lock_config(directory, settings, saved)
    layout = mesh.Layout.over(fsdp=compute.fsdp)
    steps = config.epochs * steps_per_epoch
    run = Pretraining(model, config, front_end, statistics, steps, compute, layout, num_descriptors)
    step, one = run.step, size_of(run.abstract_state)  # an indivisible batch raises an error here
    check_disk_space(place, one, f"{shown(4 * one)} (the last 2, the best, one being saved)")
    kind, dtype = layout.device.device_kind, run.module.compute.dtype
    size = sum(leaf.size for leaf in jax.tree.leaves(run.abstract_state.params))
    logger.info(
        f"{config.objective} {model.name}: {size:,} parameters, {steps} steps on {layout.size} x"
        f" {kind} in {jnp.dtype(dtype).name}"
    )
    flops, peak = pretrain_flops(model, config), layout.size * matrix_peak(dtype, layout.device)
    started = time.monotonic()

    def compile_step(state: TrainState, batch: dict) -> Callable:
        start = time.monotonic()
        compiled = step.lower(state, batch).compile()
        logger.info(f"  compiled the training step in {time.monotonic() - start:.0f} s")
        return compiled

    def measure(number: int, seconds: float) -> dict[str, float]:
        speed = config.batch_size / seconds
        rate = float(run.schedule(number - 1))
        return {"learning_rate": rate, "clips_per_second": speed, "mfu": speed * flops / peak}

    def validate(params: dict) -> dict[str, float]:
        scores = run.validate(params, validation())
        return scores | {"seconds": round(time.monotonic() - started, 1)}

    lock = Lock(store or directory) if mesh.is_lead() else None
    try:
        with lock or contextlib.nullcontext():
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
                lock=lock,
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
    """FLOPs of one training clip, forward and backward (3 x forward), without remat; 2 per
    multiply-add. Norms and the descriptor head are negligible."""

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
        hidden = len(transcription.BRANCHES) * model.grid[0] * model.width
        forward += encoder(patches)
        forward += 2 * steps * transcription.HIDDEN * (hidden + outputs)
    return 3.0 * forward


def matrix_peak(dtype: jnp.dtype, device: jax.Device) -> float:
    """Measured FLOP/s of ``device`` in a large matrix product of ``dtype``: the denominator of the
    model FLOPs utilisation (MFU)."""
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
    """Original, masked and reconstructed windows in dB, each (batch, time, mel).

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
