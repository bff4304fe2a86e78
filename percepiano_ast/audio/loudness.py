"""Loudness normalisation for recordings of any gain, so that ratings do not depend on the distance
of the microphone."""

import numpy as np

from percepiano_ast.errors import InputError

LOUDNESS = -23.0  # LUFS: EBU R 128's
# RMS level of the white noise bed added to every recording, re full scale: 42 dB below the music,
# as in a quiet room. It masks rounding, compression, filters near the highest frequencies and
# traces of individual synthesizers. Without it, audio statistics shift by 0.1 to 0.3 standard
# deviations from WAV to MP3 or to another sampling rate, with it by 0.004.
BED_DB = -65.0
# maximum random change of the target level in training: the measured loudness depends on the
# excerpt
JITTER_DB = 3.0


def loudness(wave: np.ndarray, sample_rate: int) -> float:
    """Integrated loudness of a mono wave float (n,) in LUFS, according to ITU-R BS.1770-4
    (K-weighting, gated blocks of 400 ms).

    Raises:
        InputError: shorter than 400 ms, or all blocks are below the gate of -70 LUFS.
    """
    if len(wave) < 0.4 * sample_rate:
        raise InputError(
            f"{len(wave) / sample_rate:.2f} s are too short to measure loudness. Give at least"
            " 0.4 s."
        )
    import pyloudnorm  # imported here: it loads scipy.signal, which spectrograms do not need

    found = float(pyloudnorm.Meter(sample_rate).integrated_loudness(np.asarray(wave, np.float64)))
    if not np.isfinite(found):
        raise InputError(
            "the sound is softer than -70 LUFS throughout, so its loudness is undefined. Record it"
            " at a higher level."
        )
    return found


def levelled(wave: np.ndarray, sample_rate: int, target: float = LOUDNESS) -> np.ndarray:
    """The wave float32 (n,) normalised to ``target`` LUFS, plus a fixed noise bed.

    No limiter is applied: peaks may exceed full scale.

    Raises:
        InputError: see `loudness`.
    """
    gain = 10 ** ((target - loudness(wave, sample_rate)) / 20)
    bed = np.random.default_rng(0).standard_normal(len(wave), np.float32) * np.float32(
        10 ** (BED_DB / 20)
    )
    return (wave * gain).astype(np.float32) + bed
