"""Recordings to log-mel spectrograms, ``log_mel_blocks(Recording(file).blocks(rate))``, and to
features. Levels are absolute (dB of full-scale power): loudness is a rated quality."""

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
from percepiano_ast.audio.formats import NO_RECORDING, SUFFIXES, find_recordings, is_audio, stem
from percepiano_ast.audio.io import (
    SILENCE_DB,
    OffsetFilter,
    Recording,
    check_waveform,
    duration,
    load,
)
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
