"""Changes of a recording's sound: loudness, tuning, recording conditions, and the effects of
augmentation and robustness tests."""

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import scipy
import soundfile
import soxr

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


# --- What a recording does to the sound -----------------------------------------------------------

# Direct-to-reverberant ratio in dB by reverberation time in seconds: small room, hall, church
_DIRECT = {0.4: 6.0, 1.2: 3.0, 2.5: 0.0}
_PERIOD = 2**21  # samples after which noise repeats: 95 s at 22,050 Hz
_GAPLESS = 1105  # samples: delay of an MP3 encoder (576) and decoder (529), if not compensated


def _room(wave, sample_rate, seconds, rng, direct_db, pre_delay=0.012, reflections=0):
    """Reverberation that decays by 60 dB in ``seconds``, faster for high frequencies (Polack's
    model: decaying noise), after ``pre_delay`` seconds; the direct sound is unchanged.
    ``reflections``: number of discrete ones in the first 30 ms."""
    time = np.arange(max(round(seconds * sample_rate), 1)) / sample_rate
    tail = rng.standard_normal(len(time)) * np.exp(-np.log(1000) * time / seconds)
    dull = scipy.signal.lfilter([0.3], [1, -0.7], tail)
    fade = np.exp(-3 * time / seconds)  # high frequencies decay first
    tail = fade * tail + (1 - fade) * dull
    tail *= 10 ** (-direct_db / 20) / np.linalg.norm(tail)
    response = np.concatenate([np.zeros(round(pre_delay * sample_rate)), tail])
    if reflections:
        at = rng.uniform(0.001, 0.03, reflections)
        early = rng.choice((-1, 1), reflections) * 0.005 / (at + 0.005)  # spherical waves
        np.add.at(response, (at * sample_rate).astype(int) % len(response), early)
        response *= 10 ** (-direct_db / 20) / np.linalg.norm(response)
    return wave + scipy.signal.oaconvolve(wave, response)[: len(wave)]


def _shoebox(wave, sample_rate, seconds, rng):
    """An empty room of drawn size, with walls that absorb alike and a decay of about ``seconds`` by
    Eyring's formula, by the image-source method (Allen and Berkley 1979, equation 9), with delays
    to an eighth of a sample; the direct sound is unchanged."""
    size = rng.uniform((4, 3, 2.4), (8, 6, 3.5))
    piano, toward = rng.uniform(0.2, 0.8, 3) * size, rng.standard_normal(3)
    microphone = piano + toward / np.linalg.norm(toward) * rng.uniform(0.3, 1)
    microphone = np.clip(microphone, 0.1, size - 0.1)
    volume, surface = size.prod(), 2 * (size * np.roll(size, 1)).sum()
    seconds *= rng.uniform(0.7, 1.3)
    reflected = np.exp(-0.161 * volume / (2 * surface * seconds))  # share of pressure
    farthest = 340 * 0.75 * seconds  # m: to -45 dB
    direct = float(np.linalg.norm(piano - microphone))
    fine = 8  # grid points per sample
    response = np.zeros(int(farthest / 340 * sample_rate * fine) + 1)
    spans = [
        np.arange(-int(farthest / edge / 2) - 1, int(farthest / edge / 2) + 2) for edge in size
    ]
    for mirrored in np.ndindex(2, 2, 2):
        along = [
            ((1 - 2 * q) * x + 2 * n * edge - y, np.abs(n - q) + np.abs(n))
            for q, x, y, n, edge in zip(mirrored, piano, microphone, spans, size, strict=True)
        ]
        (x, i), (y, j), (z, k) = along
        distance = np.sqrt(x[:, None, None] ** 2 + y[:, None] ** 2 + z**2)
        walls = i[:, None, None] + j[:, None] + k
        within = (distance < farthest) & (walls > 0)
        strength = reflected ** walls[within] * direct / distance[within]
        at = np.round((distance[within] - direct) / 340 * sample_rate * fine).astype(int)
        response += np.bincount(np.maximum(at, 0), strength, minlength=len(response))
    response = fine * scipy.signal.resample_poly(response, 1, fine)
    # images all have the same sign: without this, low frequencies add up
    above = scipy.signal.butter(2, 80, "high", fs=sample_rate, output="sos")
    response = scipy.signal.sosfilt(above, response)
    return wave + scipy.signal.oaconvolve(wave, response)[: len(wave)]


def _microphone(wave, sample_rate, low_cut, high_cut, resonance_hz, resonance_db):
    """Band limits in Hz (-3 dB; 12 and 24 dB per octave; 0: none) and a peak, by minimum-phase
    filters, which start without delay."""
    sections = []
    if low_cut:
        sections.append(scipy.signal.butter(2, low_cut, "high", fs=sample_rate, output="sos"))
    if 0 < high_cut < 0.48 * sample_rate:
        sections.append(scipy.signal.butter(4, high_cut, fs=sample_rate, output="sos"))
    if resonance_db and resonance_hz < 0.48 * sample_rate:  # peaking equaliser (Bristow-Johnson)
        angle, gain = 2 * np.pi * resonance_hz / sample_rate, 10 ** (resonance_db / 40)
        width, middle = np.sin(angle) / 3, -2 * np.cos(angle)
        peak = [1 + width * gain, middle, 1 - width * gain, 1 + width / gain, middle]
        sections.append(np.array([[*peak, 1 - width / gain]]) / peak[3])
    return scipy.signal.sosfilt(np.concatenate(sections), wave) if sections else wave


def _coloured(length, sample_rate, rng, slope=-3.0):
    """Noise whose power falls by ``slope`` dB per octave above 20 Hz; -3 is pink, as from rooms and
    ventilation. It repeats after `_PERIOD` samples."""
    n = min(length, _PERIOD)
    spectrum = np.fft.rfft(rng.standard_normal(n))
    spectrum /= np.maximum(np.arange(len(spectrum)), 20 * n / sample_rate) ** (-slope / 6)
    return np.resize(np.fft.irfft(spectrum, n), length)


def _at_snr(noise, wave, snr):
    """``noise`` at a mean power ``snr`` dB below that of the wave."""
    return noise * np.sqrt(np.mean(wave**2) / max(np.mean(noise**2), 1e-30) / 10 ** (snr / 10))


def _noise(wave, sample_rate, snr, rng):
    """Pink noise, ``snr`` dB below the clip's mean power."""
    return wave + _at_snr(_coloured(len(wave), sample_rate, rng), wave, snr)


def _hum(length, sample_rate, mains, rng):
    """Mains hum: harmonics of ``mains`` Hz that fall by about 6 dB per octave."""
    angle = 2 * np.pi * mains / sample_rate * np.arange(length)
    return sum(rng.uniform(0.3, 1) / k * np.sin(k * angle + rng.uniform(0, 6)) for k in range(1, 9))


def _automatic_gain(wave, sample_rate, ratio, attack, release):
    """Level differences are divided by ``ratio``, down to 25 dB below the mean level. The level is
    the larger one of two that follow the sound in ``attack`` and in ``release`` seconds, so it
    rises fast and falls slowly."""
    hop = max(round(0.002 * sample_rate), 1)
    starts = np.arange(0, len(wave), hop)
    power = np.add.reduceat(wave**2, starts) / hop
    mean = power.mean() + 1e-20
    level = np.zeros(len(power))
    for seconds in (attack, release):
        keep = np.exp(-hop / (seconds * sample_rate))
        start = np.array([keep * mean])
        level = np.maximum(level, scipy.signal.lfilter([1 - keep], [1, -keep], power, zi=start)[0])
    decibel = np.maximum(10 * np.log10(level / mean + 1e-20), -25)
    gain = 10 ** (-decibel * (1 - 1 / ratio) / 20)
    return wave * np.interp(np.arange(len(wave)), starts + hop / 2, gain)


def _mp3(wave, sample_rate, kbit, rng):
    """Encode and decode at a constant bit rate."""
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
    found = soundfile.read(file, dtype="float32")[0]
    # low bit rates write no length, so that nothing is cut
    return found if len(found) == len(wave) else found[_GAPLESS:][: len(wave)]


def _vorbis(wave, sample_rate, kbit, rng):
    """Encode and decode with a variable bit rate of about ``kbit`` at 22,050 Hz, 30 to 75."""
    file, level = io.BytesIO(), float(np.clip(1 - (kbit - 28) / 46, 0, 1))
    options = {"format": "OGG", "subtype": "VORBIS", "compression_level": level}
    with soundfile.SoundFile(file, "w", sample_rate, 1, **options) as encoder:
        for start in range(0, len(wave), sample_rate):  # libsndfile fails on long blocks
            encoder.write(wave[start : start + sample_rate])
    file.seek(0)
    return soundfile.read(file, dtype="float32")[0][: len(wave)]


def _gain(wave, sample_rate, decibel, rng):
    return np.clip(wave * 10 ** (decibel / 20), -1, 1)  # clipped at full scale, as in a file


def _tuning(wave, sample_rate, cents, rng):
    return retune(wave, sample_rate, cents)


def _silence(wave, sample_rate, seconds, rng):
    return np.concatenate([np.zeros(round(seconds * sample_rate), dtype=wave.dtype), wave])


# --- Recording conditions -------------------------------------------------------------------------


@dataclass(frozen=True)
class RecordingConditions:
    """How a piano is recorded: what the room, the microphone, the recorder and the file do to its
    sound, in this order. The default leaves the sound as it is. Nothing moves onsets but
    ``cents``.

    Attributes:
        cents: tuning by a faster recorder; times in the result are those of the input divided by
            `speed`.
        rt60: reverberation time, s (0: no room); high frequencies decay faster.
        direct_db: direct-to-reverberant energy ratio, dB.
        pre_delay: time from the direct sound to the diffuse reverberation, s.
        reflections: number of discrete early reflections.
        low_cut, high_cut: band of the microphone, Hz (0: no limit).
        resonance_hz, resonance_db: frequency and height of its peak.
        snr: mean power of the sound re noise in dB; None: no noise.
        noise_slope: colour of the noise, dB per octave (0: white, -3: pink).
        hum: share of hum in the noise's power, 0 to 1; ``mains``: its frequency, 50 or 60 Hz.
        agc_ratio: automatic gain: input level differences per output level difference (1: none);
            ``attack`` and ``release``: its time constants, s.
        drive: level of the peak re the saturation level of soft clipping (tanh), dB; None: none.
        peak_db: level of the result's peak, dB of full scale; None: as it is, at most full scale.
        offset: DC offset, share of full scale.
        codec: ``mp3``, ``vorbis``, or empty; ``kbit``: its bit rate, kbit/s.
    """

    cents: float = 0.0
    rt60: float = 0.0
    direct_db: float = 0.0
    pre_delay: float = 0.012
    reflections: int = 0
    low_cut: float = 0.0
    high_cut: float = 0.0
    resonance_hz: float = 3200.0
    resonance_db: float = 0.0
    snr: float | None = None
    noise_slope: float = -3.0
    hum: float = 0.0
    mains: int = 50
    agc_ratio: float = 1.0
    attack: float = 0.005
    release: float = 0.3
    drive: float | None = None
    peak_db: float | None = None
    offset: float = 0.0
    codec: str = ""
    kbit: int = 64

    @property
    def speed(self) -> float:
        """Seconds of the input per second of the result."""
        return 2 ** (self.cents / 1200)

    def apply(self, wave: np.ndarray, sample_rate: int, seed: int) -> np.ndarray:
        """``wave`` float32 (n,) recorded in this way, float32 (n / `speed`,); the same seed gives
        the same room and noise.

        Raises:
            InputError: MP3 at a sampling rate other than 16,000, 22,050 or 24,000 Hz, or libsndfile
                cannot write it.
        """
        if not len(wave):
            return np.zeros(0, np.float32)
        rng = np.random.default_rng(seed)
        wave = retune(np.asarray(wave, np.float32), sample_rate, self.cents).astype(np.float64)
        if self.rt60:
            wave = _room(
                wave, sample_rate, self.rt60, rng, self.direct_db, self.pre_delay, self.reflections
            )
        microphone = (self.low_cut, self.high_cut, self.resonance_hz, self.resonance_db)
        wave = _microphone(wave, sample_rate, *microphone)
        if self.snr is not None:
            noise = _coloured(len(wave), sample_rate, rng, self.noise_slope)
            noise = _microphone(noise, sample_rate, *microphone)
            noise /= np.std(noise) + 1e-30
            if self.hum:  # of the electronics, behind the microphone
                hum = _hum(len(wave), sample_rate, self.mains, rng)
                hum /= np.std(hum) + 1e-30
                noise = np.sqrt(1 - self.hum) * noise + np.sqrt(self.hum) * hum
            wave = wave + _at_snr(noise, wave, self.snr)
        if self.agc_ratio > 1:
            wave = _automatic_gain(wave, sample_rate, self.agc_ratio, self.attack, self.release)
        peak = np.abs(wave).max() + 1e-30
        if self.drive is not None:
            strength = 10 ** (self.drive / 20)
            wave = peak * np.tanh(strength / peak * wave) / np.tanh(strength)
        goal = min(peak, 1.0) if self.peak_db is None else 10 ** (self.peak_db / 20)
        if peak > 1e-20:
            wave = wave * (goal / peak)
        wave = np.clip(wave + self.offset, -1, 1).astype(np.float32)
        if self.codec:
            wave = {"mp3": _mp3, "vorbis": _vorbis}[self.codec](wave, sample_rate, self.kbit, rng)
        return np.ascontiguousarray(wave, np.float32)


# A phone in a living room
PHONE = RecordingConditions(
    rt60=0.5,
    direct_db=0.0,
    reflections=5,
    low_cut=150.0,
    high_cut=8500.0,
    resonance_db=6.0,
    snr=28.0,
    agc_ratio=2.5,
    drive=3.0,
    peak_db=-3.0,
    codec="mp3",
    kbit=64,
)


def draw_phone(rng: np.random.Generator, cents: float = 0.0) -> RecordingConditions:
    """A phone in a room, drawn around `PHONE`; tuning within ``cents``."""
    return RecordingConditions(
        cents=rng.uniform(-cents, cents),
        rt60=0.5 * 2 ** rng.uniform(-1, 1),
        direct_db=rng.uniform(-5, 6),
        pre_delay=rng.uniform(0.002, 0.02),
        reflections=int(rng.integers(0, 9)),
        low_cut=rng.uniform(80, 300),
        high_cut=rng.uniform(5500, 10_500),
        resonance_hz=rng.uniform(1800, 5000),
        resonance_db=rng.uniform(0, 9),
        snr=rng.uniform(16, 40),
        noise_slope=rng.uniform(-5, -1),
        hum=max(rng.uniform(-0.5, 0.5), 0.0),
        mains=int(rng.choice((50, 60))),
        agc_ratio=rng.uniform(1.2, 4),
        attack=0.005 * 2 ** rng.uniform(-2, 2),
        release=0.3 * 2 ** rng.uniform(-1.5, 1.5),
        drive=rng.uniform(-6, 9),
        peak_db=rng.uniform(-12, -0.5),
        offset=rng.normal(0, 0.005),
        codec=("", "mp3", "vorbis")[rng.choice(3, p=(0.2, 0.5, 0.3))],
        kbit=int(rng.choice((48, 56, 64, 80, 96))),
    )


def draw_room(rng: np.random.Generator, cents: float = 0.0) -> RecordingConditions:
    """A good microphone in any room, from a studio to a church, near or far; tuning within
    ``cents``."""
    seconds = 0.15 * 20 ** rng.uniform(0, 1)
    return RecordingConditions(
        cents=rng.uniform(-cents, cents),
        rt60=seconds,
        # the longer it lasts, the less of it is near the piano
        direct_db=rng.uniform(0, 14) if seconds < 0.4 else rng.uniform(-4, 10),
        pre_delay=rng.uniform(0.001, 0.03),
        reflections=int(rng.integers(0, 9)),
        low_cut=rng.uniform(20, 80),
        high_cut=rng.uniform(9000, 16_000),
        resonance_hz=rng.uniform(500, 6000),
        resonance_db=rng.uniform(-4, 4),
        snr=rng.uniform(35, 70),
        noise_slope=rng.uniform(-6, 0),
        hum=max(rng.uniform(-0.5, 0.3), 0.0),
        mains=int(rng.choice((50, 60))),
        peak_db=rng.uniform(-20, -0.5),
        codec=("", "mp3")[rng.choice(2, p=(0.6, 0.4))],
        kbit=int(rng.choice((64, 80, 96, 128, 160))),
    )


def draw_conditions(rng: np.random.Generator, cents: float = 0.0) -> RecordingConditions:
    """A recording in the mixture of training: 20 % are as they are, 40 % `draw_room`, 40 %
    `draw_phone`; tuning within ``cents``."""
    share = rng.uniform()
    if share < 0.2:
        return RecordingConditions(cents=rng.uniform(-cents, cents))
    return draw_room(rng, cents) if share < 0.6 else draw_phone(rng, cents)


# --- Effects ------------------------------------------------------------------------------------


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
            InputError: see `RecordingConditions.apply`.
        """
        changed = self.change(wave, sample_rate, self.amount, np.random.default_rng(seed))
        return np.ascontiguousarray(changed, dtype=np.float32)


def _some_room(wave, sample_rate, seconds, rng):
    return _room(wave, sample_rate, seconds, rng, _DIRECT[seconds])


def _phone(wave, sample_rate, seconds, rng):
    return replace(PHONE, rt60=seconds).apply(wave, sample_rate, int(rng.integers(2**31)))


EFFECTS = tuple(
    Effect(kind, amount, unit, change)
    for kind, unit, change, amounts in (
        ("room", "RT60 {:g} s", _some_room, (0.4, 1.2, 2.5)),
        ("phone", "RT60 {:g} s", _phone, (PHONE.rt60,)),
        ("noise", "SNR {:g} dB", _noise, (40, 20)),
        ("mp3", "{:g} kbit/s", _mp3, (80, 32)),
        ("gain", "{:+g} dB", _gain, (-12, 12)),
        ("tuning", "{:+g} cents", _tuning, (-20, 20)),
        ("silence", "{:g} s before", _silence, (1, 3)),
    )
    for amount in amounts
)
# Of another kind than those of training and augmentation, for tests only
HELD_OUT_ROOM = Effect("room", 0.7, "RT60 {:g} s", _shoebox)
