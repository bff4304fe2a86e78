"""Renderings are made once, by any process, named by what they depend on, and refused in words.
Cost: 8 s."""

import os
import struct

import numpy as np
import pytest
import soundfile
from test_variations import play

from percepiano_ast.audio import log_mel, quantize
from percepiano_ast.config import FrontEnd
from percepiano_ast.errors import InputError
from percepiano_ast.music import synth
from percepiano_ast.music.synth import RenderCache, wave_level

RATE = 22_050


def test_a_rendering_is_made_once_and_named_by_its_content(tmp_path):
    one, other = play((0.1, 0.5, 60, 80)), play((0.1, 0.5, 60, 81))
    sound = RenderCache(tmp_path, "builtin", RATE)
    sound.prepare([one, other, one], workers=1, log=lambda line: None)
    assert (
        len(
            {sound.path(one), sound.path(other), RenderCache(tmp_path, "builtin", 16_000).path(one)}
        )
        == 3
    )
    expected = synth.BuiltinPiano().render(one, RATE)
    # 24 bits of twice full scale
    np.testing.assert_allclose(sound.wave(one), expected, atol=1.3e-7)
    stamp = sound.path(one).stat().st_mtime_ns
    sound.prepare([one], workers=1, log=lambda line: pytest.fail("rendered twice"))
    assert (
        sound.path(one).stat().st_mtime_ns == stamp
        and soundfile.info(sound.path(one)).samplerate == RATE
    )


def test_what_exceeds_full_scale_is_kept(tmp_path):
    def cluster(step):
        return play(*[(0.1, 0.5, pitch, 127) for pitch in range(40, 90, step)])

    sound = RenderCache(tmp_path, "builtin", RATE)
    assert 1 < np.abs(sound.wave(cluster(4))).max() < 2
    with pytest.raises(InputError, match="builtin renders this performance at .* times full scale"):
        sound.wave(cluster(1))


def test_worker_processes_render_the_same(tmp_path):
    takes = [play((0.1, 0.5, 40 + i, 80)) for i in range(12)]
    RenderCache(tmp_path / "a", "builtin", RATE).prepare(takes, workers=2, log=lambda line: None)
    for take in takes:
        there, here = (RenderCache(tmp_path / name, "builtin", RATE).wave(take) for name in "ab")
        np.testing.assert_array_equal(there, here)


def test_log_mel_of_what_is_kept_is_that_of_what_was_rendered(tmp_path):
    take = play(*[(0.1 + k / 2, 0.5 + k / 2, 40 + 5 * k, 10 + 12 * k) for k in range(8)])
    rendered = synth.BuiltinPiano().render(take, RATE)
    kept = RenderCache(tmp_path, "builtin", RATE).wave(take)
    one, other = (
        quantize(log_mel(wave, FrontEnd()), FrontEnd())[0].astype(int) for wave in (rendered, kept)
    )
    assert (one == other).mean() > 0.99 and np.abs(one - other).max() <= 1


def test_levels_say_how_loud_it_is_and_what_exceeds_full_scale():
    sine = np.sqrt(2) * np.sin(2 * np.pi * 441 * np.arange(RATE) / RATE)
    found = wave_level(sine)
    assert found["level_db"] == 0 and found["peak_db"] == pytest.approx(3.0, abs=0.03)
    assert found["over"] == pytest.approx(RATE / 2, rel=0.05) and wave_level(sine / 2)["over"] == 0
    assert wave_level(np.zeros(10))["level_db"] == -200


@pytest.mark.parametrize(
    ("takes", "message"),
    [
        (
            play((0.1, 0.5, 60, 80), (5_000.0, 5_000.5, 60, 80)),
            "take 3: 1.4 h long; the limit is 1 h",
        ),
        (
            play(*[(0.1, 0.5, pitch, 127) for pitch in range(40, 90)]),
            "builtin renders take 3 at .* times full scale",
        ),
    ],
)
def test_what_cannot_be_rendered_is_refused_by_name(tmp_path, takes, message):
    with pytest.raises(InputError, match=message):
        RenderCache(tmp_path, "builtin", RATE).wave(takes, "take 3")
    assert not list(tmp_path.rglob("*.flac"))


def test_a_damaged_file_is_named(tmp_path):
    take = play((0.1, 0.5, 60, 80))
    sound = RenderCache(tmp_path, "builtin", RATE)
    sound.wave(take)
    sound.path(take).write_bytes(b"fLaC and no more")
    with pytest.raises(InputError, match=f"{sound.path(take).name} is damaged"):
        sound.wave(take)


def test_a_soundfont_that_plays_silence_is_refused(tmp_path):
    """TimGM6mb with its samples set to zero: all of the instrument is there but the sound."""
    try:
        font = synth.make_synthesizer("timgm6mb")
    except InputError as error:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(str(error))
    content = bytearray(font.path.read_bytes())
    at = content.index(b"smpl") + 4
    size = struct.unpack("<I", content[at : at + 4])[0]
    content[at + 4 : at + 4 + size] = bytes(size)
    (tmp_path / "mute.sf2").write_bytes(content)
    with pytest.raises(
        InputError, match="mute.sf2: the soundfont's piano is silent. Choose another one"
    ):
        RenderCache(tmp_path, str(tmp_path / "mute.sf2"), RATE)
