"""Recordings to log-mel spectrograms: decode, check, resample, log-mel, 8-bit codes.

Levels are absolute (dB of full-scale power), never normalised per recording: loudness is a rated
quality. There are two front ends: librosa's, and Kaldi's, which the published AST and SSAST models
were trained with.

Recordings of any length are processed in bounded memory:
``log_mel_blocks(Recording(file).blocks(rate))``.
"""

from percepiano_ast.audio.decode import (
    MIN_SECONDS,
    SILENCE_DB,
    Recording,
    check_waveform,
    duration,
    load,
)
from percepiano_ast.audio.features import classic_feature_names, classic_features
from percepiano_ast.audio.loudness import BED_DB, JITTER_DB, LOUDNESS, levelled, loudness
from percepiano_ast.audio.mel import (
    band_centres,
    dequantize,
    fbank,
    kaldi_mel_bank,
    log_mel,
    log_mel_blocks,
    quantize,
    slaney_mel_bank,
)
from percepiano_ast.audio.tuning import retuned, tuning

__all__ = [
    "BED_DB",
    "JITTER_DB",
    "LOUDNESS",
    "MIN_SECONDS",
    "SILENCE_DB",
    "Recording",
    "band_centres",
    "check_waveform",
    "classic_feature_names",
    "classic_features",
    "dequantize",
    "duration",
    "fbank",
    "kaldi_mel_bank",
    "levelled",
    "load",
    "log_mel",
    "log_mel_blocks",
    "loudness",
    "quantize",
    "retuned",
    "slaney_mel_bank",
    "tuning",
]
