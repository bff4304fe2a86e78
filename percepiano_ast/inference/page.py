"""The rating page: ratings, their course over time and the sound in one HTML file that needs no
network and no other file."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile

from percepiano_ast import audio
from percepiano_ast.inference.rating import SHARES, Rating, compare, templates

LONGEST_SOUND = 900.0  # seconds of sound that a page holds, about 7 MB
_SOUND_RATE = 22_050
_MP3_LEVEL = 0.63  # of libsndfile's 0 (160 kbit/s) to 1 (8 kbit/s): 64 kbit/s


def write_page(
    ratings: Sequence[Rating], path: str | Path, sounds: Sequence[bytes] | None = None
) -> Path:
    """Write the page of one or several recordings; two by the bundled model are compared as
    performances of one piece.

    Args:
        sounds: result of `sound` for each; by default they are encoded here.
    """
    sounds = [sound(one.file) for one in ratings] if sounds is None else sounds
    comparable = len(ratings) == 2 and all(one.within for one in ratings)
    text = (
        templates()
        .get_template("rating.html.j2")
        .render(
            recordings=[
                (one, base64.b64encode(encoded).decode())
                for one, encoded in zip(ratings, sounds, strict=True)
            ],
            drawn=[_drawn(one) for one in ratings if one.percentiles],
            longest_minutes=LONGEST_SOUND / 60,
            shares=SHARES,
            differences=compare(*ratings) if comparable else None,
            dimensions=ratings[0].scale.dimensions,
        )
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def sound(file: str | Path) -> bytes:
    """A recording as the page holds it: MP3, which every browser plays, at 22,050 Hz; empty if
    longer than ``LONGEST_SOUND``.

    Raises:
        InputError: it cannot be read, see `audio.Recording`.
    """
    wave = audio.Recording(file).read(_SOUND_RATE, max_seconds=LONGEST_SOUND + 1)
    if len(wave) > LONGEST_SOUND * _SOUND_RATE:
        return b""
    content = io.BytesIO()
    wave = wave / max(float(np.abs(wave).max()), 1.0)
    settings = {"bitrate_mode": "CONSTANT", "compression_level": _MP3_LEVEL}
    soundfile.write(content, wave, _SOUND_RATE, format="MP3", **settings)
    return content.getvalue()


def _drawn(one: Rating) -> dict:
    """What the script draws, on the scale of percentiles."""
    dimensions = one.scale.dimensions
    return {
        "seconds": round(one.seconds, 2),
        "times": [round(float(t), 2) for t in one.times],
        "course": [
            [None if np.isnan(value) else round(float(value), 1) for value in column]
            for column in one.course_percentiles.T
        ],
        "moments": [
            [
                [round(m.start, 2), round(m.stop, 2), round(m.percentile, 1)]
                for m in one.moments(dimension.key)
            ]
            for dimension in dimensions
        ],
        "poles": [[dimension.family, dimension.low, dimension.high] for dimension in dimensions],
        "percentiles": [*one.percentiles.values()],
    }
