"""Other rooms, microphones and levels for a window whose notes stay the same: what a frame says of the playing survives.

A network that hears one piano at one level hears no other (a model of one soundfont loses a quarter of its correlation on
another). Applied to normalised levels on the device, from the step's key: pure, and free beside a training step.
"""

import jax
import jax.numpy as jnp

from percepiano_ast.config import Statistics

GAIN_DB = 6.0  # either way; beyond it, force is no longer told from the level of the recording
EQ_DB = 4.0  # of each of `EQ_WAVES` cosines over the mel axis: tilt, a dip, two
EQ_WAVES = 3
NOISE_DB = (-80.0, -45.0)  # level of noise in every band
AS_RECORDED = 0.25  # share of the clips that nothing is done to: a clean recording is a case of its own


def draw(rng: jax.Array, batch: int) -> dict[str, jax.Array]:
    """What is done to each clip of a batch: arrays of ``batch`` rows."""
    keys = jax.random.split(rng, 5)
    return {
        "gain": jax.random.uniform(keys[0], (batch,), minval=-GAIN_DB, maxval=GAIN_DB),
        "eq": jax.random.uniform(keys[1], (batch, EQ_WAVES), minval=-EQ_DB, maxval=EQ_DB),
        "noise": jax.random.uniform(keys[2], (batch,), minval=NOISE_DB[0], maxval=NOISE_DB[1]),
        "seed": jax.random.bits(keys[3], (batch,)),
        "changed": ~jax.random.bernoulli(keys[4], AS_RECORDED, (batch,)),
    }


def apply(log_mel: jax.Array, drawn: dict[str, jax.Array], statistics: Statistics) -> jax.Array:
    """(B, T, F) normalised levels -> the same playing through another microphone, louder or softer, in some noise."""
    bands = log_mel.shape[2]
    waves = jnp.cos(jnp.pi * jnp.arange(1, EQ_WAVES + 1)[:, None] * (jnp.arange(bands)[None, :] + 0.5) / bands)
    change = drawn["gain"][:, None] + drawn["eq"] @ waves
    scale = 2 * statistics.std_db
    heard = log_mel + change[:, None, :] / scale
    # Power of narrow-band noise is exponentially distributed.
    power = jax.vmap(lambda seed: jax.random.exponential(jax.random.key(seed), log_mel.shape[1:]))(drawn["seed"])
    level = drawn["noise"][:, None, None] + 10 * jnp.log10(power + 1e-6)
    nepers = scale * jnp.log(10.0) / 10  # per unit of normalised level
    heard = jnp.logaddexp(heard * nepers, (level - statistics.mean_db) / scale * nepers) / nepers
    return jnp.where(drawn["changed"][:, None, None], heard, log_mel)
