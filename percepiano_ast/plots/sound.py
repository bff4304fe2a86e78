"""Spectrograms, masked reconstructions and transcriptions."""

import functools

import numpy as np
from matplotlib.axes import Axes

from percepiano_ast.config import FrontEnd
from percepiano_ast.music.piano_roll import LOWEST, N_KEYS, FrameTargets
from percepiano_ast.plots.style import COLOURS, FREQUENCIES, GREY, Figure, clean


def spectrogram(log_mel_db: np.ndarray, front_end: FrontEnd, title: str = "") -> Figure:
    """A log-mel spectrogram: ``log_mel_db`` is (frames, mels) in dB."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    axes = figure.subplots()
    image = _mel_image(axes, log_mel_db, front_end, _levels(log_mel_db))
    axes.set(title=title, xlabel="time (s)")
    figure.colorbar(image, ax=axes, label="level (dB)", pad=0.01)
    return figure


def masking(
    original: np.ndarray, masked: np.ndarray, reconstructed: np.ndarray, front_end: FrontEnd
) -> Figure:
    """Original, masked input and reconstruction: (frames, mels) arrays in dB; NaN in ``masked`` is
    drawn grey."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True, sharey=True)
    titles = ("original", "masked: input of the encoder", "reconstruction")
    for axes, values, title in zip(panels, (original, masked, reconstructed), titles):
        image = _mel_image(axes, values, front_end, _levels(original))
        axes.set_title(title, loc="left")
    panels[-1].set_xlabel("time (s)")
    figure.colorbar(image, ax=list(panels), label="level (dB)", pad=0.01, aspect=45)
    return figure


def hearing(
    log_mel_db: np.ndarray, played: FrameTargets, heard: dict[str, np.ndarray], front_end: FrontEnd
) -> Figure:
    """A window of a recording, its reference and transcribed keys, and the sustain pedal.

    Args:
        log_mel_db: (T, mels).
        played: ground truth of its frames.
        `heard`: the transcription: ``down`` (S, 88), ``onset`` (S, 88) and ``sustain`` (S,), each 0
            to 1, for S steps of T / S frames.
    """
    figure = Figure(figsize=(9, 8), layout="constrained")
    top, truth, said, pedal = figure.subplots(4, 1, sharex=True, height_ratios=(3, 3, 3, 1))
    figure.colorbar(
        _mel_image(top, log_mel_db, front_end, _levels(log_mel_db)),
        ax=top,
        label="level (dB)",
        pad=0.01,
    )
    top.set_title("recording", loc="left")
    end = front_end.seconds(len(log_mel_db))
    rows = (
        (truth, "reference: keys, onsets brighter", played.down, played.onset),
        (said, "transcription", heard["down"], heard["onset"]),
    )
    for axes, title, down, onset in rows:
        image = axes.imshow(
            (0.5 * down + 0.5 * onset).T,
            origin="lower",
            aspect="auto",
            interpolation="nearest",
            extent=(0, end, LOWEST - 0.5, LOWEST + N_KEYS - 0.5),
            vmin=0,
            vmax=1,
            cmap="magma",
        )
        axes.set_title(title, loc="left")
        axes.set(ylabel="MIDI pitch", yticks=range(24, 109, 12))
        figure.colorbar(image, ax=axes, label="activation", pad=0.01)
    for values, colour, name in (
        (played.sustain, GREY, "reference"),
        (heard["sustain"], COLOURS[1], "transcription"),
    ):
        pedal.plot(
            np.linspace(0, end, len(values), endpoint=False),
            values,
            color=colour,
            label=name,
            drawstyle="steps-post",
        )
    pedal.set(xlabel="time (s)", ylabel="sustain pedal", ylim=(-0.05, 1.05))
    pedal.legend(loc="upper right", ncols=2, fontsize="small")
    clean(pedal)
    return figure


def _mel_image(axes: Axes, values: np.ndarray, front_end: FrontEnd, levels: tuple[float, float]):
    """Draw (frames, mels) with time in seconds and the mel axis labelled in Hz."""
    import librosa  # imported here: it takes a second to load and other figures do not need it

    end = front_end.seconds(len(values))
    image = axes.imshow(
        np.ma.masked_invalid(values.T),
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        extent=(0, end, -0.5, front_end.n_mels - 0.5),
        vmin=levels[0],
        vmax=levels[1],
        cmap="magma",
    )
    axes.set_facecolor(GREY)  # hidden patches
    # band k is centred on point k + 1 of n_mels + 2 equal steps in mel
    to_mel = functools.partial(librosa.hz_to_mel, htk=front_end.kind == "kaldi")
    low, high = np.asarray(to_mel([front_end.fmin, front_end.fmax]))
    ticks = [hz for hz in FREQUENCIES if front_end.fmin < hz < front_end.fmax]
    places = (to_mel(ticks) - low) / (high - low) * (front_end.n_mels + 1) - 1
    axes.set_yticks(places, [f"{hz:,}" for hz in ticks])
    axes.set_ylabel("frequency (Hz)")
    return image


def _levels(values: np.ndarray) -> tuple[float, float]:
    """Colour scale: the top 80 dB of ``values``, or their full range if that is smaller."""
    top = float(np.nanmax(values))
    return max(top - 80.0, float(np.nanmin(values)) - 1e-3), top
