"""One loudness for recordings of any gain, so that a rating does not depend on how far a microphone was away."""

import numpy as np

from percepiano_ast.config import InputError

LOUDNESS = -23.0  # LUFS: EBU R 128's
# Level of the white noise that every recording is laid on, re full scale, RMS: 42 dB below the music, as in a quiet room. What
# lies beneath it are rounding, compression, filters near the highest frequencies and what tells one synthesizer from another:
# without it statistics of the sound move by .1 to .3 standard deviations from WAV to MP3 or another rate, with it by .004.
BED_DB = -65.0
JITTER_DB = 3.0  # that a model hears more or less of it in training: a loudness is measured on more or less of the music


def loudness(wave: np.ndarray, sample_rate: int) -> float:
    """Integrated loudness of a mono wave float (n,) in LUFS, after ITU-R BS.1770-4 (filters K, gated blocks of 400 ms).

    Raises:
        InputError: under 400 ms, or too soft for any block to pass the gate of -70 LUFS.
    """
    if len(wave) < 0.4 * sample_rate:
        raise InputError(f"{len(wave) / sample_rate:.2f} s are too short for a loudness; give 0.4 s at least")
    import pyloudnorm  # here, as it brings scipy.signal along, which spectrograms do not need

    found = float(pyloudnorm.Meter(sample_rate).integrated_loudness(np.asarray(wave, np.float64)))
    if not np.isfinite(found):
        raise InputError("it is softer than -70 LUFS throughout, which has no loudness; record it louder")
    return found


def levelled(wave: np.ndarray, sample_rate: int, target: float = LOUDNESS) -> np.ndarray:
    """The wave float32 (n,) at a loudness of ``target`` LUFS, on a bed of noise that is always the same.

    It is not limited: peaks may exceed full scale.

    Raises:
        InputError: see `loudness`.
    """
    gain = 10 ** ((target - loudness(wave, sample_rate)) / 20)
    bed = np.random.default_rng(0).standard_normal(len(wave), np.float32) * np.float32(10 ** (BED_DB / 20))
    return (wave * gain).astype(np.float32) + bed
