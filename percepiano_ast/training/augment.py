"""Augmentation of windows by room, microphone, level and noise; the notes and their frames do not
change.

Without augmentation a network does not generalise: a model trained on one soundfont loses a quarter
of its correlation on another, and a model trained on dry pianos mistakes reverberation for the
pedal. Augmentation is a pure function of normalised levels and the step's key. It runs on the
device, at a small fraction of the cost of a training step.
"""

import jax
import jax.numpy as jnp

from percepiano_ast.config import Statistics

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


def draw(rng: jax.Array, batch: int) -> dict[str, jax.Array]:
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


def apply(
    log_mel: jax.Array, drawn: dict[str, jax.Array], statistics: Statistics, frame_seconds: float
) -> jax.Array:
    """Apply reverberation, equalisation, gain and noise to normalised levels (B, T, F); same
    shape."""
    bands = log_mel.shape[2]
    waves = jnp.cos(
        jnp.pi * jnp.arange(1, EQ_WAVES + 1)[:, None] * (jnp.arange(bands)[None, :] + 0.5) / bands
    )
    change = drawn["gain"][:, None] + drawn["eq"] @ waves
    scale = 2 * statistics.std_db
    nepers = scale * jnp.log(10.0) / 10  # per unit of normalised level
    heard = _in_room(log_mel * nepers, drawn, frame_seconds) / nepers + change[:, None, :] / scale
    # Power of narrow-band noise is exponentially distributed.
    power = jax.vmap(lambda seed: jax.random.exponential(jax.random.key(seed), log_mel.shape[1:]))(
        drawn["seed"]
    )
    level = drawn["noise"][:, None, None] + 10 * jnp.log10(power + 1e-6)
    heard = jnp.logaddexp(heard * nepers, (level - statistics.mean_db) / scale * nepers) / nepers
    return jnp.where(drawn["changed"][:, None, None], heard, log_mel)


def _in_room(power: jax.Array, drawn: dict[str, jax.Array], frame_seconds: float) -> jax.Array:
    """Add a diffuse reverberation tail to log power (B, T, F), in nepers.

    Polack's model (1988): late reverberation is noise whose power decays exponentially, so that
    powers add. The direct sound does not change. The tail of a steady sound has ``room`` dB more
    energy than the sound.
    """
    bands = power.shape[2]
    seconds = drawn["room_seconds"][:, None] * (
        1 - ROOM_DULL * jnp.arange(bands)[None, :] / (bands - 1)
    )
    # decay of the power per frame: 60 dB in ``seconds``
    kept = 10 ** (-6 * frame_seconds / seconds)
    gain = (1 - kept) * 10 ** (drawn["room"][:, None] / 10)
    sound = jnp.exp(power)

    def joined(earlier, later):
        return earlier[0] * later[0], earlier[1] * later[0] + later[1]

    # The tail at a frame is the decayed sum of all earlier frames.
    _, tail = jax.lax.associative_scan(
        joined, (jnp.broadcast_to(kept[:, None, :], sound.shape), sound), axis=1
    )
    tail = jnp.pad(tail[:, :-1], ((0, 0), (1, 0), (0, 0)))
    return jnp.log(sound + gain[:, None, :] * tail)
