"""Mutated files of every format that people bring end in a result or in the package's own error: no
other exception, no hang over 20 s, no more than 2 GB of memory. Cost: 20 minutes.

``python tests/test_fuzz.py KIND COUNT [FIRST]`` runs one kind by itself.
"""

import io
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
from predictions import make_index, make_predictions

import percepiano_ast
from percepiano_ast import audio
from percepiano_ast.data import custom_ratings
from percepiano_ast.errors import InputError, RunFailed
from percepiano_ast.evaluation.metrics import metric_table
from percepiano_ast.evaluation.predictions import read_predictions, runs
from percepiano_ast.music import midi, performance_features
from percepiano_ast.music.score import read_score

MUTATED, LONGEST, MEMORY = 500, 20, 2_000_000  # files of a kind; seconds; kB
SOUND = {"wav": ("PCM_16", "PCM_24", "FLOAT"), "flac": ("PCM_16",), "ogg": ("VORBIS", "OPUS")}
SOUND |= {"mp3": ("MPEG_LAYER_III",)}
CHANGES = "flip a bit,overwrite,fill,delete,repeat,insert,cut,exchange".split(",")
TEXT_CHANGES = ["number", "line", "number", "line"]
PRINTABLE = b"0123456789,;.-<>/&='e\t\n "
NUMBERS = [b"-1", b"0", b"3", b"0.5", b"1e999", b"nan", b"99999999999", b"9" * 5000, b"1,5", b""]
KINDS = (*SOUND, "mid", "musicxml", "mxl", "ratings", "predictions")

MEASURE = """<measure number="{n}">{first}<note><pitch><step>{step}</step><octave>4</octave></pitch>
<duration>2</duration><voice>1</voice><type>half</type></note><note><rest/><duration>2</duration>
</note></measure>"""
FIRST = """<attributes><divisions>1</divisions><key><fifths>1</fifths></key><time><beats>4</beats>
<beat-type>4</beat-type></time><clef><sign>G</sign><line>2</line></clef></attributes>
<direction><sound tempo="90"/></direction><barline location="left"><repeat direction="forward"/>
</barline>"""
LAST = """<barline location="right"><repeat direction="backward"/></barline></measure>"""


def sound_files(folder: Path, kind: str) -> list[bytes]:
    """A tone with three harmonics in the subtypes of a format."""
    time = np.arange(int(3.6 * 44_100)) / 44_100
    wave = sum(np.sin(2 * np.pi * 220 * k * time) / k for k in (1, 2, 3)) * np.exp(-time) / 8
    found = []
    for subtype in SOUND[kind]:
        rate = 48_000 if subtype == "OPUS" else 44_100
        path = folder / f"{subtype}.{kind}"
        soundfile.write(path, np.stack([wave, 0.5 * wave], axis=1), rate, subtype=subtype)
        found.append(path.read_bytes())
    return found


def score_file(kind: str) -> bytes:
    """Eight bars of MusicXML with a repeat, plain or in an archive."""
    bars = [MEASURE.format(n=n, step="CDEFGAB"[n % 7], first="" if n else FIRST) for n in range(8)]
    bars[-1] = bars[-1].replace("</measure>", LAST)
    text = (
        '<?xml version="1.0" encoding="UTF-8"?><score-partwise version="4.0"><part-list>'
        '<score-part id="P1"><part-name>Piano</part-name></score-part></part-list><part id="P1">'
        f"{''.join(bars)}</part></score-partwise>"
    )
    if kind == "musicxml":
        return text.encode()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        root = '<container><rootfiles><rootfile full-path="a.xml"/></rootfiles></container>'
        archive.writestr("META-INF/container.xml", root)
        archive.writestr("a.xml", text)
    return packed.getvalue()


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """One to three changes: bits, bytes, cuts, insertions, repetitions, exchanged pieces; in text
    also numbers and lines."""
    text = content.isascii()

    def noise(n: int) -> bytes:
        return bytes(rng.choice([*PRINTABLE], n).tolist()) if text else rng.bytes(n)

    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if not content:
            break
        # damage among the first bytes, where headers are, as often as anywhere
        at = int(rng.integers(min(len(content), 256) if rng.random() < 0.5 else len(content)))
        piece = content[at : at + int(2 ** rng.uniform(0, 9))]
        before, after = content[:at], content[at + len(piece) :]
        change = rng.choice(CHANGES + TEXT_CHANGES * text)
        if change == "flip a bit":
            piece = bytes([piece[0] ^ 1 << rng.integers(8)]) + piece[1:]
        elif change == "overwrite":
            piece = noise(len(piece))
        elif change == "fill":
            piece = bytes([rng.choice([0, 0x7F, 0x80, 0xFF])]) * len(piece)
        elif change == "delete":
            piece = b""
        elif change == "repeat":
            piece *= int(rng.integers(2, 50))
        elif change == "insert":
            piece = noise(len(piece)) + piece
        elif change == "cut":
            after = b""
        elif change == "exchange":
            other = int(rng.integers(len(content)))
            piece = content[other : other + len(piece)]
        elif change == "number":
            numbers = [*re.finditer(rb"[0-9.]+", content)]
            found = numbers[rng.integers(len(numbers))] if numbers else re.search(b"", content)
            before, after = content[: found.start()], content[found.end() :]
            piece = rng.choice(NUMBERS)
        elif change == "line":
            lines = content.splitlines(keepends=True)
            row, other = rng.integers(len(lines), size=2)
            lines[row] = lines[other] * int(rng.integers(3))
            before, piece, after = b"", b"".join(lines), b""
        content = before + piece + after
    return content


def reader(kind: str, folder: Path) -> tuple[list[bytes], Callable[[bytes, int], object]]:
    """Whole files of a kind, and the function that reads the n-th mutated one."""
    if kind in SOUND:

        def read_sound(content: bytes, n: int):
            path = folder / f"mutated.{kind}"
            path.write_bytes(content)
            if n % 50 == 0:
                return percepiano_ast.rate(path)
            return len(audio.load(path)), audio.duration(path)

        return sound_files(folder, kind), read_sound
    if kind == "mid":

        def read_midi(content: bytes, n: int):
            performance = midi.trimmed(midi.read_midi(content))
            return performance_features.performance_features(performance)

        packed = io.BytesIO()
        midi.write_midi(example(), packed)
        return [packed.getvalue()], read_midi
    if kind in ("musicxml", "mxl"):

        def read_notes(content: bytes, n: int):
            path = folder / f"mutated.{kind}"
            path.write_bytes(content)
            return read_score(path)

        return [score_file(kind)], read_notes
    if kind == "ratings":
        table, takes = folder / "ratings.csv", folder / "takes"
        takes.mkdir()
        names = [f"tune {n % 4}, take {n}" for n in range(24)]
        for name in names:
            soundfile.write(takes / f"{name}.wav", np.zeros(30_000), 22_050)
        rows = pd.DataFrame({"clip": names, "piece": [name[:6] for name in names]})
        rows["Warmth"], rows["Clarity"] = np.arange(24) % 7, np.arange(24) / 8
        rows.to_csv(table, index=False)

        def read_table(content: bytes, n: int):
            table.write_bytes(content)
            return custom_ratings.read_ratings(takes, table, group="piece")

        return [table.read_bytes()], read_table
    index = make_index(4, 3)
    rows = make_predictions(index, {"a": 0.1})

    def evaluate(content: bytes, n: int):
        path = folder / "predictions.csv"
        path.write_bytes(content)
        return metric_table(runs(read_predictions(path), index))

    return [rows.to_csv(index=False).encode()], evaluate


def example() -> midi.Performance:
    """Scales with the pedal."""
    onset = np.arange(120) / 8
    rows = [(t, t + 0.2, 40 + n % 40, 30 + n % 90) for n, t in enumerate(onset.tolist())]
    pedals = [(t, midi.SUSTAIN, 127 * (n % 2)) for n, t in enumerate(onset[::4].tolist())]
    return midi.Performance(np.array(rows, midi.NOTE), np.array(pedals, midi.PEDAL))


def main(kind: str, count: int, first: int = 0) -> None:
    """Read ``count`` mutated files; prints the faults. A hang ends this process by SIGALRM."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        whole, read = reader(kind, Path(name))
        for content in whole:
            read(content, 0)
        results = 0
        for n in range(first, first + count):
            rng = np.random.default_rng([KINDS.index(kind), n])
            content = mutated(whole[n % len(whole)], rng)
            print(f"{kind} {n}", flush=True)
            signal.alarm(LONGEST)
            try:
                read(content, n)
                results += 1
            except (InputError, RunFailed) as error:
                if "\n" in str(error) or len(str(error)) > 1000:
                    print(f"FAULT a message of {len(str(error))} characters: {error}")
            except BaseException:
                print("FAULT", traceback.format_exc())
            signal.alarm(0)
    used = [resource.getrusage(who).ru_maxrss for who in (0, resource.RUSAGE_CHILDREN)]
    print(f"RESULTS {results} of {count}; {max(used)} kB")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files_end_in_a_result_or_the_packages_own_error(kind):
    command = [sys.executable, __file__, kind, str(MUTATED)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"at {lines[-1:]}: {done.stderr[-2000:]}"
    assert "FAULT" not in done.stdout, done.stdout[done.stdout.index("FAULT") :][:4000]
    used = int(lines[-1].split()[-2])
    assert used < MEMORY and done.stderr == ""


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
