"""Speed from WAV files to stored codes, against librosa, with one and two processes; and
quantisation error of the codes."""

import io
import multiprocessing
from collections.abc import Iterator

import librosa
import numpy as np
import scipy.fft
import soundfile
from threadpoolctl import threadpool_limits  # comes with scikit-learn

from percepiano_ast import audio
from percepiano_ast.bench.timing import medians
from percepiano_ast.config import FrontEnd
from percepiano_ast.music.midi import NOTE, PEDAL, SUSTAIN, Performance
from percepiano_ast.music.synth import BuiltinPiano

_SECONDS = 120
_SOURCE_RATE = 44_100
_RECORDINGS = 40  # for one or two processes: some seconds of work
_RUNS = 7  # of the processes


def preprocess() -> Iterator[dict]:
    """Two minutes of rendered piano, 44.1 kHz stereo 16 bit, from the bytes of a WAV file to uint8
    codes."""
    front_end, content = FrontEnd(), _wav(_SECONDS)
    with scipy.fft.set_workers(1), threadpool_limits(1):
        ours, theirs = medians(
            lambda: _codes(content, front_end), lambda: _librosa_codes(content, front_end)
        )
    levels = audio.log_mel(audio.load(io.BytesIO(content), front_end.sample_rate), front_end)
    peer = _librosa_levels(content, front_end)
    stored = peer >= front_end.floor_db
    yield {
        "name": "preprocess",
        "value": round(_SECONDS / ours),
        "unit": "x real time",
        "peer": "librosa.load, librosa.feature.melspectrogram",
        "ratio": round(theirs / ours, 2),
        "max_error_db": float(np.abs(levels - peer)[stored].max()),
    }
    one, two = _processes(content, front_end)
    yield {
        "name": "preprocess-two-processes",
        "value": round(one / two, 2),
        "unit": "x one process",
    }
    error = (audio.dequantize(audio.quantize(levels, front_end)[0], front_end) - levels)[
        levels >= front_end.floor_db
    ]
    largest, rms = float(np.abs(error).max()), float(np.sqrt(np.mean(error**2)))
    yield {"name": "uint8-error", "value": round(largest, 4), "unit": "dB", "rms": round(rms, 4)}


def _codes(content: bytes, front_end: FrontEnd) -> np.ndarray:
    blocks = audio.Recording(io.BytesIO(content)).blocks(front_end.sample_rate)
    return np.concatenate(
        [audio.quantize(levels, front_end)[0] for levels in audio.log_mel_blocks(blocks, front_end)]
    )


def librosa_log_mel(wave: np.ndarray, front_end: FrontEnd) -> np.ndarray:
    """The peer: librosa's log-mel spectrogram with the front end's settings, float32 (n_mels,
    n_frames) in dB."""
    power = librosa.feature.melspectrogram(
        y=wave,
        sr=front_end.sample_rate,
        n_fft=front_end.n_fft,
        win_length=front_end.win_length,
        hop_length=front_end.hop_length,
        n_mels=front_end.n_mels,
        fmin=front_end.fmin,
        fmax=front_end.fmax,
        pad_mode="constant",
    )
    return librosa.power_to_db(power, amin=front_end.amin, top_db=None)


def _librosa_levels(content: bytes, front_end: FrontEnd) -> np.ndarray:
    wave, _ = librosa.load(io.BytesIO(content), sr=front_end.sample_rate)
    return librosa_log_mel(wave, front_end).T


def _librosa_codes(content: bytes, front_end: FrontEnd) -> np.ndarray:
    return audio.quantize(_librosa_levels(content, front_end), front_end)[0]


def _wav(seconds: float) -> bytes:
    """A WAV file of random chords with pedal; the right channel is delayed and softer."""
    rng = np.random.default_rng(0)
    onsets = np.sort(rng.uniform(0, seconds - 4, round(8 * seconds)))
    notes = [
        (onset, onset + rng.uniform(0.1, 1.5), rng.integers(28, 100), rng.integers(20, 120))
        for onset in onsets
    ]
    pedals = [(float(beat), SUSTAIN, 127 * (beat % 4 > 0)) for beat in range(round(seconds))]
    performance = Performance(np.array(notes, dtype=NOTE), np.array(pedals, dtype=PEDAL))
    left = BuiltinPiano().render(performance, _SOURCE_RATE)
    stereo = np.zeros((round(seconds * _SOURCE_RATE), 2), dtype=np.float32)
    left = left[: len(stereo)] / (2 * np.abs(left).max())
    stereo[: len(left), 0] = left
    stereo[: len(left), 1] = 0.8 * np.roll(left, 20)
    file = io.BytesIO()
    soundfile.write(file, stereo, _SOURCE_RATE, format="WAV", subtype="PCM_16")
    return file.getvalue()


def _processes(content: bytes, front_end: FrontEnd) -> tuple[float, float]:
    """Median seconds for the same recordings with one and with two processes."""
    context = multiprocessing.get_context("spawn")
    with (
        context.Pool(1, _keep, (content, front_end)) as one,
        context.Pool(2, _keep, (content, front_end)) as two,
    ):
        times = medians(*(lambda pool=pool: _all(pool) for pool in (one, two)), runs=_RUNS)
        for pool in (one, two):
            pool.close()
            pool.join()
    return times[0], times[1]


def _all(pool) -> None:
    for _ in pool.imap_unordered(_work, range(_RECORDINGS)):
        pass


_kept: tuple[bytes, FrontEnd]  # of a worker, set when it starts


def _keep(content: bytes, front_end: FrontEnd) -> None:
    global _kept
    _kept = content, front_end


def _work(_: int) -> int:
    return len(_codes(*_kept))
