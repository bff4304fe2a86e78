"""The archive at its real size, slow: hours of recordings, more than 4 GiB, killed over and over.
Run with ``-m slow -s``.

SOAK_HOURS and SOAK_KILLS make it shorter or longer; 20 hours and 20 kills take about 20 minutes and
30 GB of disk.
"""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from archives import ROOT, data_set_bytes
from servers import RangeServer

from percepiano_ast.data import build, demo, sources
from percepiano_ast.data.demo import UNRATED
from percepiano_ast.music.synth import make_synthesizer

HOURS, KILLS = float(os.environ.get("SOAK_HOURS", 20)), int(os.environ.get("SOAK_KILLS", 20))
COMMAND = [sys.executable, "-m", "percepiano_ast", "preprocess", "--workers", "2"]
WORKER_MB = 1000  # so that two workers and the command stay below 2 GB


def _wav_header(frames: int, rate: int) -> bytes:
    """Of 16-bit stereo."""
    size = 4 * frames
    form = np.array([16, 1 + (2 << 16), rate, 4 * rate, 4 + (16 << 16)], "<u4").tobytes()
    return (
        b"RIFF"
        + np.uint32(36 + size).tobytes()
        + b"WAVEfmt "
        + form
        + b"data"
        + np.uint32(size).tobytes()
    )


def _minute(rate: int, seed: int) -> np.ndarray:
    """A minute of the simulated piano in stereo, with a room's noise: int16 (n, 2)."""
    rng = np.random.default_rng(seed)
    style = dict.fromkeys(demo.PARAMETERS, 0.0) | {"loudness": rng.normal(), "pedal": rng.normal()}
    wave = make_synthesizer("builtin").render(
        demo.perform(UNRATED[seed % len(UNRATED)], style, rng), rate
    )
    wave = np.resize(wave, 60 * rate)
    stereo = np.stack([wave, np.roll(wave, rate // 1000)], axis=1) + rng.normal(
        0, 3e-4, (60 * rate, 2)
    )
    return (np.clip(stereo, -1, 1) * 32767).astype("<i2")


def write_long_archive(path: Path, hours: float) -> int:
    """A deflated zip64 archive in MAESTRO's shape, stereo at 44.1 and 48 kHz; bytes of its
    recordings in it."""
    rng, rows, total, number = random.Random(0), [], 0.0, 0
    minutes = {rate: [_minute(rate, seed) for seed in range(6)] for rate in (44_100, 48_000)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        while total < hours * 3600:
            rate, length = rng.choice((44_100, 48_000)), max(1, round(rng.lognormvariate(2.1, 0.5)))
            name = f"20{10 + number % 10}/recording_{number:04d}.wav"
            with archive.open(f"{ROOT}/{name}", "w", force_zip64=True) as member:
                member.write(_wav_header(60 * rate * length, rate))
                for _ in range(length):
                    member.write(
                        np.roll(rng.choice(minutes[rate]), rng.randrange(rate), axis=0).tobytes()
                    )
            split = {8: "validation", 9: "test"}.get(number % 10, "train")
            rows.append(
                (
                    "Nobody",
                    f"Piece {number}",
                    split,
                    2010 + number % 10,
                    "none.midi",
                    name,
                    60 * length,
                )
            )
            total, number = total + 60 * length, number + 1
        table = pd.DataFrame(rows, columns=sources.COLUMNS).to_csv(index=False)
        archive.writestr(f"{ROOT}/{ROOT}.csv", table)
    with zipfile.ZipFile(path) as archive:
        return sum(info.compress_size for info in archive.infolist())


def _memory_mb(group: int) -> float:
    """The largest resident memory that a process of the group has had."""
    peaks = []
    listed = subprocess.run(["ps", "-e", "-o", "pgid=,pid="], capture_output=True, text=True).stdout
    for pgid, pid in (line.split() for line in listed.splitlines()):
        status = Path(f"/proc/{pid}/status")
        if pgid == str(group) and status.exists():
            peaks += [
                int(line.split()[1]) / 1024
                for line in status.read_text().splitlines()
                if line.startswith("VmHWM")
            ]
    return max(peaks, default=0.0)


def _run(url: str, out: Path, kill_after: float | None = None) -> tuple[int, float, str]:
    """Exit code, largest memory of a process in MB, and what was printed; killed after so many
    seconds, if given."""
    log = out.with_suffix(".log")
    with log.open("a") as file:
        process = subprocess.Popen(
            [*COMMAND, "--source", url, "--out", str(out)],
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        began, memory = time.monotonic(), 0.0
        while process.poll() is None:
            memory = max(memory, _memory_mb(process.pid))
            if kill_after is not None and time.monotonic() - began > kill_after:
                os.killpg(process.pid, signal.SIGKILL)
            time.sleep(0.2)
    return process.returncode, memory, log.read_text()


@pytest.mark.slow
def test_hours_from_a_server_killed_over_and_over(tmp_path):
    archive, rng = tmp_path / "maestro.zip", random.Random(1)
    members = write_long_archive(archive, HOURS)
    assert members > 2**32 or HOURS < 10
    report = {"hours": HOURS, "archive_gb": round(archive.stat().st_size / 1e9, 2)}
    with RangeServer(archive) as server:
        began = time.monotonic()
        code, memory, printed = _run(server.url, tmp_path / "whole")
        assert code == 0, printed[-2000:]
        seconds = time.monotonic() - began
        report |= {
            "seconds": round(seconds),
            "x_real_time": round(HOURS * 3600 / seconds),
            "worker_mb": round(memory),
        }
        report["fetched_per_byte"] = round(server.sent / members, 4)
        server.sent, kills, done = 0, 0, False
        while not done:
            # From the command's start to some way into its work, so that the work lasts for all of
            # them.
            moment = rng.uniform(3, 6 + seconds / KILLS) if kills < KILLS else None
            code, peak, printed = _run(server.url, tmp_path / "killed", moment)
            memory, done = max(memory, peak), code == 0
            kills += code == -signal.SIGKILL
            assert code in (0, -signal.SIGKILL), printed[-2000:]
        report |= {"kills": kills, "fetched_per_byte_when_killed": round(server.sent / members, 4)}
    whole, killed = tmp_path / "whole" / "maestro", tmp_path / "killed" / "maestro"
    assert data_set_bytes(killed) == data_set_bytes(whole)
    assert build.verify(killed) == []
    report["shards_gb"] = round(
        sum(p.stat().st_size for p in whole.rglob("*array_record*")) / 1e9, 3
    )
    print(json.dumps(report))
    assert kills == KILLS and memory < WORKER_MB and report["fetched_per_byte"] <= 1.05


def test_the_header_that_the_soak_writes_is_one(tmp_path):
    import soundfile

    sound = _wav_header(480, 48_000) + bytes(4 * 480)
    with soundfile.SoundFile(io.BytesIO(sound)) as file:
        assert (file.samplerate, file.channels, file.frames, file.subtype) == (
            48_000,
            2,
            480,
            "PCM_16",
        )
