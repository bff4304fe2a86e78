"""Fixed-length windows of a clip, as the encoder takes them. NumPy alone: rating a recording needs
no more of ``data``."""

import numpy as np


def pad_window(codes: np.ndarray, n_frames: int) -> np.ndarray:
    """Pad (time, mel) codes at the end with code 0 (the lowest level) up to ``n_frames``."""
    return np.pad(codes, ((0, n_frames - len(codes)), (0, 0)))


def window_starts(length: int, n_frames: int) -> list[int]:
    """First frames of the windows of a clip of ``length`` frames: the hop is half a window, the
    last window ends with the clip."""
    last = max(length - n_frames, 0)
    return list(range(0, last, n_frames // 2)) + [last]
