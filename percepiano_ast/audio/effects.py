"""Changes of a recording's sound: loudness, tuning, and the effects of augmentation and robustness
tests."""

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy
import soundfile
import soxr

from percepiano_ast.config import lookup
from percepiano_ast.errors import InputError

# --- Loudness -----------------------------------------------------------------------------------

LOUDNESS = -23.0  # LUFS: EBU R 128's
# RMS level of the white noise bed added to every recording, re full scale: 42 dB below the music,
# as in a quiet room. It masks rounding, compression and traces of individual synthesizers. Without
# it, audio statistics shift by 0.1 to 0.3 standard deviations from WAV to MP3, with it by 0.004.
BED_DB = -65.0
# Maximum random change of the target in training: the measured loudness depends on the excerpt.
JITTER_DB = 3.0


def loudness(wave: np.ndarray, sample_rate: int) -> float:
    """Integrated loudness of a wave float (n,) in LUFS by ITU-R BS.1770-4 (K-weighting, gated
    blocks of 400 ms).

    Raises:
        InputError: shorter than 400 ms, or all blocks are below the gate of -70 LUFS.
    """
    if len(wave) < 0.4 * sample_rate:
        seconds = f"{len(wave) / sample_rate:.2f} s"
        raise InputError(f"{seconds} are too short to measure loudness. Give at least 0.4 s.")
    import pyloudnorm  # imported here: it loads scipy.signal, which spectrograms do not need

    found = float(pyloudnorm.Meter(sample_rate).integrated_loudness(np.asarray(wave, np.float64)))
    if not np.isfinite(found):
        raise InputError("the sound is softer than -70 LUFS throughout. Record at a higher level.")
    return found


def normalize_loudness(wave: np.ndarray, sample_rate: int, target: float = LOUDNESS) -> np.ndarray:
    """The wave float32 (n,) at ``target`` LUFS, plus a fixed noise bed. No limiter is applied:
    peaks may exceed full scale.

    Raises:
        InputError: see `loudness`.
    """
    gain = 10 ** ((target - loudness(wave, sample_rate)) / 20)
    bed = np.random.default_rng(0).standard_normal(len(wave), np.float32)
    return (wave * gain).astype(np.float32) + bed * np.float32(10 ** (BED_DB / 20))


# --- Tuning -------------------------------------------------------------------------------------


def estimate_tuning(wave: np.ndarray, sample_rate: int) -> float:
    """Tuning of a wave float (n,) in cents relative to A4 = 440 Hz, from -50 to 50; 0 if no tone is
    found. A piano that is a semitone off counts as transposed, with a tuning of 0.

    The most frequent deviation of spectral peaks from equal temperament
    (`librosa.estimate_tuning`) over at most two minutes; the error at 22,050 Hz is up to 5 cents.
    """
    import librosa

    length = round(10 * sample_rate)
    if len(wave) > 12 * length:  # twelve excerpts
        starts = np.linspace(0, len(wave) - length, 12).astype(int)
        wave = np.concatenate([wave[start : start + length] for start in starts])
    with warnings.catch_warnings():  # the result is 0, as documented
        warnings.filterwarnings("ignore", "Trying to estimate tuning from empty|n_fft=")
        # shorter FFTs resolve low tones worse
        return 100 * float(librosa.estimate_tuning(y=wave, sr=sample_rate, n_fft=4096))


def retune(wave: np.ndarray, sample_rate: int, cents: float) -> np.ndarray:
    """The wave float32 (n,) resampled to sound higher by ``cents``, which shortens it."""
    if not cents:
        return wave
    return soxr.resample(wave, sample_rate * 2 ** (cents / 1200), sample_rate, quality="HQ")


# --- Effects ------------------------------------------------------------------------------------

# Direct-to-reverberant ratio in dB by reverberation time in seconds: small room, hall, church.
_DIRECT = {0.4: 6.0, 1.2: 3.0, 2.5: 0.0}


@dataclass(frozen=True)
class Effect:
    """An effect of an ``amount`` in ``unit``; ``change``: (wave, rate, amount, rng) -> wave."""

    kind: str
    amount: float
    unit: str
    change: Callable[[np.ndarray, int, float, np.random.Generator], np.ndarray]

    @property
    def label(self) -> str:
        """Kind and amount with its unit."""
        return f"{self.kind} {self.unit.format(self.amount)}"

    def apply(self, wave: np.ndarray, sample_rate: int, seed: int) -> np.ndarray:
        """``wave`` float32 (n,) with this effect, float32 (m,); the same seed gives the same noise
        and room.

        Raises:
            InputError: MP3 at a sampling rate other than 16,000, 22,050 or 24,000 Hz, or libsndfile
                cannot write it.
        """
        changed = self.change(wave, sample_rate, self.amount, np.random.default_rng(seed))
        return np.ascontiguousarray(changed, dtype=np.float32)


def _room(wave, sample_rate, seconds, rng):
    """Reverberation that decays by 60 dB in ``seconds``, faster for high frequencies; the direct
    sound is unchanged."""
    time = np.arange(round(seconds * sample_rate)) / sample_rate
    tail = rng.standard_normal(len(time)) * np.exp(-np.log(1000) * time / seconds)
    dull = scipy.signal.lfilter([0.3], [1, -0.7], tail)
    fade = np.exp(-3 * time / seconds)  # high frequencies decay first
    tail = fade * tail + (1 - fade) * dull
    tail *= 10 ** (-_DIRECT[seconds] / 20) / np.linalg.norm(tail)
    response = np.concatenate([np.zeros(round(0.012 * sample_rate)), tail])  # 12 ms of pre-delay
    return wave + scipy.signal.oaconvolve(wave, response)[: len(wave)]


def _shoebox(wave, sample_rate, seconds, rng):
    """A rectangular room of drawn size by its image sources (Allen and Berkley 1979), with as much
    reverberant as direct sound; the reverberation time above 3 kHz is halved. The direct sound is
    unchanged."""
    size = rng.uniform((3.5, 3.0, 2.4), (6.0, 5.0, 3.0))
    source, microphone = size * rng.uniform(0.15, 0.35, 3), size * rng.uniform(0.6, 0.85, 3)
    orders = [np.arange(-count, count + 1) for count in np.ceil(343 * seconds / (2 * size))]
    image = np.stack(np.meshgrid(*orders, indexing="ij"), axis=-1).reshape(-1, 1, 3)
    mirrored = np.stack(np.meshgrid(*[[0, 1]] * 3), axis=-1).reshape(1, -1, 3)
    away = (1 - 2 * mirrored) * source + 2 * image * size - microphone
    distance = np.linalg.norm(away, axis=-1).ravel()
    hits = (np.abs(image - mirrored) + np.abs(image)).sum(axis=-1).ravel()
    direct = np.linalg.norm(source - microphone)
    at = np.rint((distance - direct) / 343 * sample_rate).astype(int)
    within = (hits > 0) & (at < seconds * sample_rate)
    surface = 2 * (size[0] * size[1] + size[0] * size[2] + size[1] * size[2])
    # Eyring's formula: the loss of energy at each wall
    kept = np.exp(-0.161 * np.prod(size) / surface / np.array([seconds, seconds / 2]))
    low, high = (
        np.bincount(at[within], (direct / distance * share ** (hits / 2))[within]) for share in kept
    )
    treble = scipy.signal.butter(2, 3000, "high", fs=sample_rate, output="sos")
    response = low + scipy.signal.sosfiltfilt(treble, high - low)
    # all images have the same sign, walls do not: without their sum at 0 Hz
    response -= scipy.ndimage.uniform_filter1d(response, round(0.02 * sample_rate))
    response[0] = 0.0
    response /= np.linalg.norm(response)
    return wave + scipy.signal.oaconvolve(wave, response)[: len(wave)]


def _noise(wave, sample_rate, snr, rng):
    """Pink noise (-3 dB per octave above 20 Hz, as from rooms and ventilation), ``snr`` dB below
    the clip's mean power."""
    spectrum = np.fft.rfft(rng.standard_normal(len(wave)))
    spectrum /= np.sqrt(np.maximum(np.arange(len(spectrum)), 20 * len(wave) / sample_rate))
    noise = np.fft.irfft(spectrum, len(wave))
    return wave + noise * np.sqrt(np.mean(wave**2) / np.mean(noise**2) / 10 ** (snr / 10))


def _mp3(wave, sample_rate, kbit, rng):
    """Encode and decode at a constant bit rate; low rates add a delay of some ten milliseconds."""
    rates = (16_000, 22_050, 24_000)  # those of MPEG-2 layer III, 8 to 160 kbit/s
    if sample_rate not in rates or "MP3" not in soundfile.available_formats():
        raise InputError(
            f"cannot write MP3 at {sample_rate} Hz with libsndfile"
            f" {soundfile.__libsndfile_version__}: it needs version 1.1 or later and one of"
            f" {', '.join(map(str, rates))} Hz. Run: pip install -U soundfile"
        )
    file, options = io.BytesIO(), {"compression_level": 1 - (kbit - 8) / (160 - 8)}
    soundfile.write(file, wave, sample_rate, format="MP3", bitrate_mode="CONSTANT", **options)
    file.seek(0)
    return soundfile.read(file, dtype="float32")[0]


def _gain(wave, sample_rate, decibel, rng):
    return np.clip(wave * 10 ** (decibel / 20), -1, 1)  # clipped at full scale, as in a file


def _tuning(wave, sample_rate, cents, rng):
    return retune(wave, sample_rate, cents)


def _silence(wave, sample_rate, seconds, rng):
    return np.concatenate([np.zeros(round(seconds * sample_rate), dtype=wave.dtype), wave])


EFFECTS = tuple(
    Effect(kind, amount, unit, change)
    for kind, unit, change, amounts in (
        ("room", "RT60 {:g} s", _room, (0.4, 1.2, 2.5)),
        ("noise", "SNR {:g} dB", _noise, (40, 20)),
        ("mp3", "{:g} kbit/s", _mp3, (80, 32)),
        ("gain", "{:+g} dB", _gain, (-12, 12)),
        ("tuning", "{:+g} cents", _tuning, (-20, 20)),
        ("silence", "{:g} s before", _silence, (1, 3)),
    )
    for amount in amounts
)
# A kind of room that no training uses.
HELD_OUT_ROOM = Effect("room", 0.6, "RT60 {:g} s, shoebox", _shoebox)

# --- Recording conditions -------------------------------------------------------------------------

_BANDS = (0.0, 300.0, 1000.0, 3000.0, np.inf)  # Hz, edges of the bands that decay differently
_KINDS = {"studio": 0.3, "room": 0.35, "phone": 0.35}
_MP3_DELAY = 4000  # samples: more than any encoder and decoder delay together


@dataclass(frozen=True)
class RecordingConditions:
    """Room, microphone and device of a recording.

    Attributes:
        rt60: reverberation time in seconds below 300 Hz; 0 for no room.
        direct_db: direct sound over reverberation in dB.
        dullness: share by which the reverberation time is shorter above 3 kHz.
        low_hz, high_hz: band of the microphone (-3 dB).
        resonance_hz, resonance_db: a peak or dip an octave wide.
        snr_db: level of the sound over that of pink noise; infinite for none.
        hum: share of the noise's power that is hum of the mains.
        agc: ratio of the automatic gain control, 1 for none; ``agc_seconds``, its time constant.
        drive: amplitude of the peaks at the input of a soft clipper (tanh); 0 for none.
        kbit: bit rate of an MP3 file in kbit/s; 0 for none.
        offset: constant added to the samples (DC).
        cents: tuning, by playing faster: times of events are divided by ``speed``.
    """

    rt60: float = 0.0
    direct_db: float = 20.0
    dullness: float = 0.5
    low_hz: float = 20.0
    high_hz: float = 20_000.0
    resonance_hz: float = 1000.0
    resonance_db: float = 0.0
    snr_db: float = np.inf
    hum: float = 0.0
    agc: float = 1.0
    agc_seconds: float = 0.3
    drive: float = 0.0
    kbit: float = 0.0
    offset: float = 0.0
    cents: float = 0.0

    @property
    def speed(self) -> float:
        """How many times faster the recording plays."""
        return 2 ** (self.cents / 1200)

    def apply(self, wave: np.ndarray, sample_rate: int, seed: int) -> np.ndarray:
        """``wave`` float32 (n,) under these conditions, float32 (n / speed,), with a peak of 0.9;
        the same seed gives the same room and noise. Events do not move but for ``speed``.

        Raises:
            InputError: see `Effect.apply`; ``kbit`` needs one of its sampling rates.
        """
        rng = np.random.default_rng(seed)
        wave = retune(wave, sample_rate, self.cents)
        if self.rt60:
            response = self._room(sample_rate, rng)
            wave = wave + scipy.signal.oaconvolve(wave, response)[: len(wave)]

        # Filters have no phase, so that onsets stay where they are.
        size = scipy.fft.next_fast_len(len(wave), real=True)
        hertz = np.fft.rfftfreq(size, 1 / sample_rate) + 1e-3
        octaves = np.log2(hertz / self.resonance_hz)
        response = 10 ** (self.resonance_db / 20 * np.exp(-2 * octaves**2))
        response /= np.sqrt((1 + (self.low_hz / hertz) ** 4) * (1 + (hertz / self.high_hz) ** 8))
        wave = _filtered(wave, response, size)
        power = np.mean(wave**2) + 1e-12

        if np.isfinite(self.snr_db):
            pink = response / np.sqrt(np.maximum(hertz, 20.0))
            noise = _filtered(rng.standard_normal(len(wave), np.float32), pink, size)
            noise *= np.sqrt((1 - self.hum) / np.mean(noise**2))
            if self.hum:
                mains = rng.choice([50, 60]) * np.arange(len(wave)) / sample_rate
                phases = 2 * np.pi * rng.random(4)
                harmonics = zip((1, 2, 3, 5), phases, strict=True)
                hum = sum(np.sin(2 * np.pi * mains * k + phase) / k for k, phase in harmonics)
                noise = noise + hum * np.sqrt(self.hum / np.mean(hum**2))
            wave = wave + noise * np.sqrt(power) * 10 ** (-self.snr_db / 20)

        if self.agc > 1:
            kept = np.exp(-1 / (self.agc_seconds * sample_rate))
            level = [kept * power]
            level = scipy.signal.lfilter([1 - kept], [1, -kept], wave**2, zi=level)[0] / power
            wave = wave * np.maximum(level, 1e-3) ** (0.5 * (1 / self.agc - 1))
        wave = 0.9 * wave / max(np.abs(wave).max(), 1e-9)
        if self.drive:
            wave = 0.9 * np.tanh(self.drive * wave) / np.tanh(self.drive)
        if self.kbit:
            wave = _without_delay(_mp3(wave, sample_rate, self.kbit, rng), wave, sample_rate)
        return np.ascontiguousarray(wave + self.offset, np.float32)

    def _room(self, sample_rate: int, rng: np.random.Generator) -> np.ndarray:
        """Impulse response of the room without the direct sound: six early reflections, and noise
        that decays exponentially, faster in high bands (Polack 1988)."""
        times = np.arange(round(1.2 * self.rt60 * sample_rate)) / sample_rate
        spectrum = np.fft.rfft(rng.standard_normal(len(times)))
        hertz = np.fft.rfftfreq(len(times), 1 / sample_rate)
        tail = np.zeros(len(times))
        for number, (low, high) in enumerate(zip(_BANDS, _BANDS[1:])):
            band = np.fft.irfft(np.where((hertz >= low) & (hertz < high), spectrum, 0), len(times))
            seconds = self.rt60 * (1 - self.dullness * number / (len(_BANDS) - 2))
            tail += band * np.exp(-np.log(1000) * times / seconds)
        delay = round(rng.uniform(0.002, 0.02) * sample_rate)
        response = np.concatenate([np.zeros(delay), tail])
        early = np.abs(tail[:200]).mean()
        at = np.minimum(rng.uniform(0.002, 0.04, 6) * sample_rate, len(response) - 1).astype(int)
        response[at] += rng.choice([-1, 1], 6) * rng.uniform(2, 12, 6) * early
        return response * 10 ** (-self.direct_db / 20) / np.linalg.norm(response)


def _filtered(wave: np.ndarray, response: np.ndarray, size: int) -> np.ndarray:
    """The wave with the magnitudes of its FFT of ``size`` multiplied by ``response``."""
    spectrum = scipy.fft.rfft(wave, size) * response.astype(np.float32)
    return scipy.fft.irfft(spectrum, size)[: len(wave)]


def _without_delay(wave: np.ndarray, original: np.ndarray, sample_rate: int) -> np.ndarray:
    """The wave shifted and cut or padded to match the original; the delay is the lag of the highest
    cross-correlation of the first ten seconds."""
    length = min(len(original), len(wave), 10 * sample_rate)
    size = scipy.fft.next_fast_len(2 * length, real=True)
    spectra = [scipy.fft.rfft(values[:length], size) for values in (wave, original)]
    lag = int(np.argmax(scipy.fft.irfft(spectra[0] * spectra[1].conj(), size)[:_MP3_DELAY]))
    wave = wave[lag : lag + len(original)]
    return np.pad(wave, (0, len(original) - len(wave)))


# A phone in a living room.
PHONE = RecordingConditions(
    rt60=0.5,
    direct_db=0.0,
    low_hz=150.0,
    high_hz=8500.0,
    resonance_hz=3200.0,
    resonance_db=6.0,
    snr_db=28.0,
    agc=2.5,
    drive=1.0,
    kbit=64.0,
)


def draw_conditions(rng: np.random.Generator, kind: str = "") -> RecordingConditions:
    """Draw conditions of a ``kind``, ``studio``, ``room`` or ``phone`` (in a room, or a like
    device); by default three in ten are of a studio, the others of rooms, half of these by phones.
    Slightly mistuned."""

    def between(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    def ratio(low: float, high: float) -> float:
        return float(np.exp(rng.uniform(np.log(low), np.log(high))))

    kind = kind or rng.choice(list(_KINDS), p=list(_KINDS.values()))
    lookup(_KINDS, kind, "kind of conditions")
    drawn = {
        "rt60": ratio(0.2, 1.5) if rng.random() < 0.7 else 0.0,
        "direct_db": between(5, 20),
        "dullness": between(0.2, 0.8),
        "low_hz": ratio(15, 60),
        "resonance_hz": ratio(500, 5000),
        "resonance_db": between(-4, 4),
        "snr_db": between(45, 75),
        "cents": float(np.clip(rng.normal(0, 10), -35, 35)),
    }
    if kind != "studio":
        drawn |= {
            "rt60": ratio(0.2, 2.5),
            "direct_db": between(-4, 12),
            "low_hz": ratio(20, 120),
            "high_hz": ratio(6000, 20_000),
            "snr_db": between(25, 60),
            "hum": between(0, 0.5) if rng.random() < 0.3 else 0.0,
        }
    if kind == "phone":
        drawn |= {
            "direct_db": between(-5, 6),
            "low_hz": ratio(60, 300),
            "high_hz": ratio(4000, 11_000),
            "resonance_hz": ratio(1500, 5000),
            "resonance_db": between(0, 9),
            "snr_db": between(15, 45),
            "agc": between(1, 4),
            "agc_seconds": ratio(0.05, 1),
            "drive": between(0.2, 2) if rng.random() < 0.6 else 0.0,
            "kbit": ratio(24, 96) if rng.random() < 0.6 else 0.0,
            "offset": float(rng.normal(0, 0.003)),
        }
    return RecordingConditions(**drawn)
