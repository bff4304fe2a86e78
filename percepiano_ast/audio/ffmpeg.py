"""Decode formats that libsndfile does not support, such as M4A, with ffmpeg."""

import re
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from percepiano_ast.errors import InputError


class Decoder:
    """Decode the first audio stream of a file with ffmpeg, in one pass, through a pipe.

    Attributes:
        sample_rate, channels: of the file.
        frames: None, because the declared length of a compressed file is approximate.

    Raises:
        InputError: ffmpeg is not installed, or finds no audio in the file.
    """

    frames = None

    def __init__(self, path: str | Path, name: str):
        self._name = name
        command = [
            _program(name),
            "-v",
            "error",
            *_input(path),
            "-map",
            "0:a:0",
            "-f",
            "au",
            "-c:a",
            "pcm_f32be",
            "-",
        ]
        # A file, because an unread pipe could fill up and block ffmpeg; `close` closes it.
        self._messages = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._messages)
        assert self._process.stdout is not None  # as it is a pipe
        self._sound = self._process.stdout
        header = self._sound.read(24)  # six numbers, followed by samples until the pipe ends
        if len(header) < 24:
            code, message = self._end()
            self.close()
            raise _refusal(name, message or f"ffmpeg ends with code {code}")
        _, start, _, _, self.sample_rate, self.channels = struct.unpack(">6I", header)
        self._sound.read(start - len(header))

    def read(self, frames: int) -> np.ndarray:
        """The next samples: float32 (n, channels), fewer than requested only at the end.

        Raises:
            InputError: at the end, if ffmpeg reported an error, as it does for truncated and
                damaged files.
        """
        content = self._sound.read(4 * frames * self.channels)
        if len(content) < 4 * frames * self.channels:
            code, message = self._end()
            if code or message:
                what = message or f"it ends with code {code}"
                raise InputError(
                    f"{self._name}: damaged or truncated (ffmpeg: {what}). Copy or export it again."
                )
        return np.frombuffer(content, ">f4").astype(np.float32).reshape(-1, self.channels)

    def close(self) -> None:
        """Terminate ffmpeg; repeated calls have no effect."""
        self._process.kill()
        self._sound.close()
        self._process.wait()
        self._messages.close()

    def _end(self) -> tuple[int, str]:
        """Exit code, and the first line of ffmpeg's error output."""
        code = self._process.wait()
        self._messages.seek(0)
        return code, _without_address(self._messages.readline().decode(errors="replace"))


def duration(path: str | Path) -> float:
    """Declared duration of a file in seconds; for raw AAC, which declares none, ffmpeg's estimate
    from the bit rate.

    Raises:
        InputError: ffmpeg is not installed, or finds no audio or no duration in the file.
    """
    run = subprocess.run([_program(str(path)), "-hide_banner", *_input(path)], capture_output=True)
    # the exit code is 1, because no output is requested
    lines = run.stderr.decode(errors="replace").splitlines()
    declared = [
        match for line in lines if (match := re.match(r"  Duration: (\d+):(\d\d):([\d.]+)", line))
    ]
    if not declared or not any("Audio:" in line for line in lines):
        raise _refusal(str(path), _without_address(lines[-1]) if lines else "no output from ffmpeg")
    hours, minutes, seconds = declared[0].groups()
    return 3600 * int(hours) + 60 * int(minutes) + float(seconds)


def _program(name: str) -> str:
    """The system's ffmpeg, else the binary of the package imageio-ffmpeg."""
    if program := shutil.which("ffmpeg"):
        return program
    try:
        import imageio_ffmpeg

        return imageio_ffmpeg.get_ffmpeg_exe()
    except (ImportError, RuntimeError) as error:  # RuntimeError: no binary for this platform
        raise InputError(
            f"{name}: cannot be read as audio without ffmpeg, which was not found. Install it (pip"
            " install imageio-ffmpeg; Debian, Ubuntu: sudo apt-get install -y ffmpeg; macOS: brew"
            " install ffmpeg), or give a WAV, FLAC, OGG or MP3 file."
        ) from error


def _input(path: str | Path) -> list[str]:
    # The prefix and the whitelist prevent network access through a file's name or contents.
    return ["-nostdin", "-protocol_whitelist", "file,pipe", "-i", f"file:{path}"]


def _refusal(name: str, reason: str) -> InputError:
    return InputError(
        f"{name}: cannot be read as audio ({reason.rstrip('.')}). Give a complete recording, or"
        " copy it again."
    )


def _without_address(line: str) -> str:
    """A line of ffmpeg's output without its leading component name: ``[aac @ 0x55fb1cf68f40]``."""
    return re.sub(r"^(\[[^\]]*\] *)+", "", line).strip()
