"""A page on which recordings are seen and heard: ratings, their course over time under a cursor, and what each says in words.

One HTML file that needs nothing else: no network, no other file. Everything was computed on this machine, and the page says so.
"""

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile

from percepiano_ast import audio
from percepiano_ast.dimensions import DIMENSIONS, KEYS
from percepiano_ast.recording.rating import Rating
from percepiano_ast.recording.tables import compare, in_short

LONGEST_SOUND = 900.0  # seconds of sound that a page holds, about 6 MB
_SOUND_RATE = 22_050
_CODE = Path(__file__).parent


def write(ratings: Sequence[Rating], path: str | Path, sounds: Sequence[bytes] | None = None) -> Path:
    """Write the page of one or several recordings; two are compared as performances of one piece.

    Args:
        sounds: of each what `sound` made, where that is at hand: to encode takes a while that can be spent beside the rating.
    """
    sounds = [sound(one.file) for one in ratings] if sounds is None else sounds
    title = ", ".join(Path(one.file).name for one in ratings[:3]) + (" ..." if len(ratings) > 3 else "")
    parts = [f"<h1>{html.escape(title)}</h1>", _PROMISE]
    if len(ratings) == 2:
        parts.append(_beside(*ratings))
    parts += [_recording(number, one, sounds[number]) for number, one in enumerate(ratings)]
    style, script = ((_CODE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    data = json.dumps([_data(one) for one in ratings]).replace("</", "<\\/")
    body = "\n".join(parts) + f"\n<script>const recordings = {data};\n{script}</script>"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'<!doctype html><html lang="en"><head>{head}<style>{style}</style></head><body>\n{body}\n</body></html>\n',
        encoding="utf-8",
    )
    return path


_PROMISE = (
    "<p>Computed on this machine; the recording did not leave it. A rating is what listeners would say on average, from 0 to 1; "
    "the band is one standard deviation of the error to each side. Percentages compare with 1,202 performances of three works by "
    "Beethoven and Schubert that people rated for PercePiano.</p>"
)


def _recording(number: int, one: Rating, encoded: bytes) -> str:
    warnings = "".join(f'<p class="warning">{html.escape(text)}</p>' for text in one.warnings)
    name = html.escape(Path(one.file).name)
    rows = "".join(_row(number, one, k) for k in range(len(KEYS)))
    return (
        f'<section id="recording{number}"><h2>{name}</h2><p>{in_short(one)}.</p>{warnings}'
        f'{_player(encoded)}<div class="course"><p class="which"></p>'
        f'<svg viewBox="0 0 1000 200" preserveAspectRatio="none" role="img" '
        f'aria-label="course of a rating over time"></svg><p class="moments"></p></div>'
        f'<table><tr><th colspan="2"></th><th class="scale">0 to 1</th><th></th><th>%</th><th>in words</th></tr>{rows}</table>'
        "</section>"
    )


def _row(number: int, one: Rating, k: int) -> str:
    key, family, low, high = DIMENSIONS[k]
    value, spread = one.ratings[key], one.uncertainty[key]
    left, right = (100 * min(max(edge, 0), 1) for edge in (value - spread, value + spread))
    bar = (
        f'<div class="scale"><i style="left:{left:.1f}%;width:{right - left:.1f}%"></i>'
        f'<b style="left:{100 * min(max(value, 0), 1):.1f}%"></b></div>'
    )
    return (
        f'<tr data-dimension="{k}" tabindex="0"><td class="family">{family}</td><td class="low">{html.escape(low)}</td>'
        f"<td>{bar}</td><td>{html.escape(high)}</td><td>{one.percentiles[key]:.0f}</td>"
        f'<td class="words">{html.escape(one.sentence(key).partition(": ")[2])}</td></tr>'
    )


def sound(file: str | Path) -> bytes:
    """A recording as the page holds it, Ogg Vorbis at 22,050 Hz; nothing of one that is longer than ``LONGEST_SOUND``.

    Raises:
        InputError: it cannot be read, see `audio.load`.
    """
    wave = audio.load(file, _SOUND_RATE, max_seconds=LONGEST_SOUND + 1)
    if len(wave) > LONGEST_SOUND * _SOUND_RATE:
        return b""
    wave = wave / max(float(np.abs(wave).max()), 1.0)
    content = io.BytesIO()
    with soundfile.SoundFile(content, "w", _SOUND_RATE, 1, format="OGG", subtype="VORBIS") as ogg:
        for first in range(0, len(wave), _SOUND_RATE):  # libsndfile's encoder overflows the stack on long blocks
            ogg.write(wave[first : first + _SOUND_RATE])
    return content.getvalue()


def _player(encoded: bytes) -> str:
    if not encoded:
        return f"<p>The page holds no sound of recordings longer than {LONGEST_SOUND / 60:.0f} minutes.</p>"
    return f'<audio controls src="data:audio/ogg;base64,{base64.b64encode(encoded).decode()}"></audio>'


def _beside(one: Rating, other: Rating) -> str:
    found = compare(one, other)
    rows = "".join(
        f"<tr><td>{html.escape(f'{low} to {high}')}</td><td>{one.ratings[key]:.2f}</td><td>{other.ratings[key]:.2f}</td>"
        f"<td>{found.difference[key]:+.2f}</td><td>{found.deviation[key]:.2f}</td><td>{html.escape(found.words[key])}</td></tr>"
        for key, _, low, high in DIMENSIONS
    )
    return (
        "<section><h2>Side by side</h2><p>If both play the same music: a difference is told where it is as large as the "
        "standard deviation of its error, and called probable from half of it. Of pairs of PercePiano's performances that lie so "
        "far apart, people's ratings order 92 % and 81 % the same way.</p>"
        "<table><tr><th></th><th>first</th><th>second</th><th>difference</th>"
        f"<th>deviation</th><th></th></tr>{rows}</table></section>"
    )


def _data(one: Rating) -> dict:
    """What the script draws from."""
    course = [[None if np.isnan(value) else round(float(value), 4) for value in column] for column in one.course.T]
    moments = [[[round(m.start, 2), round(m.stop, 2), round(m.rating, 4)] for m in one.moments(key)] for key in KEYS]
    poles = [[dimension.family, dimension.low, dimension.high] for dimension in DIMENSIONS]
    return {
        "seconds": round(one.seconds, 2), "times": [round(float(t), 2) for t in one.times], "course": course, "moments": moments,
        "poles": poles, "ratings": [one.ratings[key] for key in KEYS],
    }  # fmt: skip
