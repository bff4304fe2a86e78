"""What the bundled model's page and card state of real pianos and of learners, measured. Cost: 4
minutes.

Needs MAPS excerpts (Emiya, Badeau, David 2010: FLAC files, each with its notes as TSV of onset,
offset, pitch, velocity) in ``REAL_PIANO_DIR`` or ../shared/real_piano/maps, and learners'
performances (Jiang 2023: midi/ and ratings.csv) in ``LEARNERS_DIR`` or ../shared/learners. Neither
may be redistributed.
"""

import os
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from percepiano_ast import inference
from percepiano_ast.music import synth
from percepiano_ast.music.midi import read_midi, trimmed

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"
REAL_PIANO = Path(os.environ.get("REAL_PIANO_DIR", SHARED / "real_piano" / "maps"))
LEARNERS = Path(os.environ.get("LEARNERS_DIR", SHARED / "learners"))
TOLERANCE = 0.05  # seconds, as in mir_eval.transcription
RATE = 22_050

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model():
    return inference.load_model()


def matched(played: np.ndarray, found: np.ndarray) -> int:
    """Largest number of pairs of onsets of one pitch within the tolerance; both (n, 2): onset,
    pitch."""
    count = 0
    for pitch in np.unique(played[:, 1]):
        ours, theirs = (np.sort(notes[notes[:, 1] == pitch, 0]) for notes in (played, found))
        i = j = 0
        while i < len(ours) and j < len(theirs):
            if abs(ours[i] - theirs[j]) <= TOLERANCE:
                count, i, j = count + 1, i + 1, j + 1
            elif ours[i] < theirs[j]:
                i += 1
            else:
                j += 1
    return count


@pytest.mark.skipif(not REAL_PIANO.is_dir(), reason="no MAPS excerpts; set REAL_PIANO_DIR")
def test_onset_f1_on_a_real_disklavier(model):
    scores = []
    for path in sorted(REAL_PIANO.glob("*.flac")):
        played = np.loadtxt(path.with_suffix(".tsv"), skiprows=1)[:, [0, 2]]
        notes = model.rate(path).performance.notes
        found = np.column_stack([notes["onset"], notes["pitch"]]).astype(float)
        # The notes of MAPS precede the sound by some hundredths of a second, which differ between
        # excerpts.
        lagged = [matched(played + [lag, 0], found) for lag in np.arange(-0.1, 0.11, 0.01)]
        scores.append(2 * max(lagged) / (len(played) + len(found)))
    print(f"onset F1 on {len(scores)} excerpts: {np.mean(scores):.3f}")
    assert np.mean(scores) == pytest.approx(0.74, abs=0.03)


@pytest.mark.skipif(not LEARNERS.is_dir(), reason="no learners' performances; set LEARNERS_DIR")
def test_convincing_does_not_order_learners_by_quality(model):
    means = pd.read_csv(LEARNERS / "ratings.csv").groupby("clip")["rating"].mean().rename(str.lower)
    piano, said = synth.make_synthesizer("fluidr3mono"), {}
    for path in sorted((LEARNERS / "midi").glob("*.mid")):
        wave = piano.render(trimmed(read_midi(path)), RATE).astype(np.float32)
        rated = model.rate_wave(wave, with_course=False)
        said[path.stem.lower()] = rated.ratings["interpretation_doubtful_convincing"]
    pairs = [
        (said[a] - said[b]) * (means[a] - means[b]) > 0
        for a, b in combinations(said, 2)
        if a.split("-")[0] == b.split("-")[0] and abs(means[a] - means[b]) >= 0.5
    ]
    print(
        f"pairs of {len(said)} performances in the order of their ratings: {np.mean(pairs):.3f} of"
        f" {len(pairs)}"
    )
    assert 0.4 < np.mean(pairs) < 0.6
