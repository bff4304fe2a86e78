"""From audio to stored codes, against librosa, with one and two processes; and the quantisation
error of the codes."""

import io
import multiprocessing
from collections.abc import Iterator

import librosa
import numpy as np
import scipy.fft
import soundfile
from threadpoolctl import threadpool_limits  # comes with scikit-learn

from bench import medians, result
from percepiano_ast import audio
from percepiano_ast.config import FrontEnd
from percepiano_ast.music.midi import NOTE, PEDAL, SUSTAIN, Performance
from percepiano_ast.music.synth import BuiltinPiano

SECONDS, SOURCE_RATE = 120, 44_100
RECORDINGS = 40  # for one or two processes: some seconds of work


def log_mel() -> Iterator[dict]:
    """Log-mel of one minute of audio, against librosa with the same settings."""
    front_end = FrontEnd()
    wave = np.random.default_rng(0).normal(0, 0.1, 60 * front_end.sample_rate).astype(np.float32)
    with scipy.fft.set_workers(1), threadpool_limits(1):
        ours, theirs = medians(
            lambda: audio.log_mel(wave, front_end), lambda: _librosa_log_mel(wave, front_end)
        )
    peer = {"peer": "librosa.feature.melspectrogram", "ratio": round(theirs / ours, 2)}
    yield result("log-mel", round(60 / ours), "x real time", **peer)


def preprocess() -> Iterator[dict]:
    """Two minutes of rendered piano, 44.1 kHz stereo 16 bit, from the bytes of a WAV file to uint8
    codes."""
    front_end, content = FrontEnd(), _wav()

    def librosa_levels() -> np.ndarray:
        wave, _ = librosa.load(io.BytesIO(content), sr=front_end.sample_rate)
        return _librosa_log_mel(wave, front_end).T

    with scipy.fft.set_workers(1), threadpool_limits(1):
        ours, theirs = medians(
            lambda: _codes(content, front_end), lambda: audio.quantize(librosa_levels(), front_end)
        )
    levels = audio.log_mel(audio.load(io.BytesIO(content), front_end.sample_rate), front_end)
    peer = librosa_levels()
    yield result(
        "preprocess",
        round(SECONDS / ours),
        "x real time",
        peer="librosa.load, librosa.feature.melspectrogram",
        ratio=round(theirs / ours, 2),
        max_error_db=float(np.abs(levels - peer)[peer >= front_end.floor_db].max()),
    )

    context = multiprocessing.get_context("spawn")
    with (
        context.Pool(1, _keep, (content, front_end)) as single,
        context.Pool(2, _keep, (content, front_end)) as pair,
    ):
        one, two = medians(
            lambda: list(single.imap_unordered(_work, range(RECORDINGS))),
            lambda: list(pair.imap_unordered(_work, range(RECORDINGS))),
        )
        for pool in (single, pair):
            pool.close()
            pool.join()
    yield result("preprocess-two-processes", round(one / two, 2), "x one process")

    error = audio.dequantize(audio.quantize(levels, front_end)[0], front_end) - levels
    error = error[levels >= front_end.floor_db]
    largest, rms = float(np.abs(error).max()), float(np.sqrt(np.mean(error**2)))
    yield result("uint8-error", round(largest, 4), "dB", rms=round(rms, 4))


def _librosa_log_mel(wave: np.ndarray, front_end: FrontEnd) -> np.ndarray:
    """The peer with the front end's settings: float32 (n_mels, n_frames) in dB."""
    names = ("n_fft", "win_length", "hop_length", "n_mels", "fmin", "fmax")
    settings = {name: getattr(front_end, name) for name in names}
    power = librosa.feature.melspectrogram(
        y=wave, sr=front_end.sample_rate, pad_mode="constant", **settings
    )
    return librosa.power_to_db(power, amin=front_end.amin, top_db=None)


def _wav() -> bytes:
    """A WAV file of random chords with pedal; the right channel is delayed and softer."""
    rng = np.random.default_rng(0)
    notes = [
        (onset, onset + rng.uniform(0.1, 1.5), rng.integers(28, 100), rng.integers(20, 120))
        for onset in np.sort(rng.uniform(0, SECONDS - 4, 8 * SECONDS))
    ]
    pedals = [(float(beat), SUSTAIN, 127 * (beat % 4 > 0)) for beat in range(SECONDS)]
    performance = Performance(np.array(notes, dtype=NOTE), np.array(pedals, dtype=PEDAL))
    left = BuiltinPiano().render(performance, SOURCE_RATE)[: SECONDS * SOURCE_RATE]
    left = left / (2 * np.abs(left).max())
    stereo = np.zeros((SECONDS * SOURCE_RATE, 2), dtype=np.float32)
    stereo[: len(left)] = np.stack([left, 0.8 * np.roll(left, 20)], axis=1)
    file = io.BytesIO()
    soundfile.write(file, stereo, SOURCE_RATE, format="WAV", subtype="PCM_16")
    return file.getvalue()


_kept: tuple[bytes, FrontEnd]  # of a worker, set when it starts


def _keep(content: bytes, front_end: FrontEnd) -> None:
    global _kept
    _kept = content, front_end


def _work(_: int) -> int:
    return len(_codes(*_kept))


def _codes(content: bytes, front_end: FrontEnd) -> np.ndarray:
    blocks = audio.Recording(io.BytesIO(content)).blocks(front_end.sample_rate)
    levels = audio.log_mel_blocks(blocks, front_end)
    return np.concatenate([audio.quantize(block, front_end)[0] for block in levels])
