"""Encoders, heads and baselines: arrays in, ``(output, intermediates)`` out. No audio, no files, no training loop."""
