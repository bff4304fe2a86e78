"""Recordings to log-mel spectrograms: decode, check, resample, log-mel, 8-bit codes.

Levels are absolute (dB of full-scale power), never normalised per recording: loudness is a rated
quality. There are two front ends: librosa's, and Kaldi's, which the published AST and SSAST models
were trained with.

Recordings of any length are processed in bounded memory:
``log_mel_blocks(Recording(file).blocks(rate))``.
"""

# ruff: noqa: F401

from percepiano_ast.audio.effects import (
    BED_DB,
    JITTER_DB,
    LOUDNESS,
    estimate_tuning,
    loudness,
    normalize_loudness,
    retune,
)
from percepiano_ast.audio.features import audio_feature_names, audio_features
from percepiano_ast.audio.io import SILENCE_DB, Recording, check_waveform, duration, load
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
