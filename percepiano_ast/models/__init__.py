"""Encoders, heads and baselines: arrays in, ``(output, intermediates)`` out, without audio, files
or training loops."""
