"""Score-informed features: deviations of the performance from the score, and properties of the
score.

``FEATURES`` describes each of them. Like `descriptors.DESCRIPTORS` they are finite for all valid
input: a feature without an instance in the clip (melody lead without chords; tempo relative to the
notated one without a notated tempo) is 0, and ``undefined`` counts these. The features are
differences, correlations, shares and log ratios, so 0 is the neutral value.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from percepiano_ast.alignment import check_share
from percepiano_ast.descriptors.view import Descriptor
from percepiano_ast.errors import InputError
from percepiano_ast.performance import Performance
from percepiano_ast.score import piece, tempo, touch
from percepiano_ast.score.matching import match
from percepiano_ast.score.reading import Score
from percepiano_ast.score.view import View

LEAST_STEPS = 4  # minimum number of matched score onsets, spaced widely enough for a tempo estimate
FAMILIES = {"tempo": tempo, "touch": touch, "piece": piece}
FEATURES: dict[str, Descriptor] = {
    name: one for family in FAMILIES.values() for name, one in family.TABLE.items()
}
FEATURES["undefined"] = Descriptor(
    "features", "number of features that have no instance in this clip and are 0"
)


def describe(performance: Performance, score: Score) -> dict[str, float]:
    """All features of a performance of a score, in the order and units of ``FEATURES``.

    Args:
        performance: from a MIDI file or a transcription; an offset in time has no effect.

    Raises:
        InputError: less than `alignment.LEAST_MATCHED` of its notes are in the score, or it is too
            short for a tempo.
    """
    found = match(performance, score)
    check_share(found.share)
    view = View(performance, score, found)
    if (steps := len(view.steps)) < LEAST_STEPS:
        raise InputError(
            f"{steps} onsets of the score match the performance, {LEAST_STEPS} are needed. "
            "Give a longer clip."
        )
    values = tempo.measure(view) | touch.measure(view) | piece.measure(score)
    undefined = [name for name, value in values.items() if not np.isfinite(value)]
    values |= dict.fromkeys(undefined, 0.0) | {"undefined": len(undefined)}
    return {name: float(values[name]) for name in FEATURES}


def table(
    performances: Mapping[str, Performance], scores: Mapping[str, Score | None]
) -> tuple[pd.DataFrame, dict[str, str]]:
    """`describe` of every clip.

    Args:
        performances: by clip; from MIDI or transcriptions.
        scores: by clip; ``None`` or absent for a clip without a score.

    Returns:
        the features, one row per clip, indexed by clip; and the excluded clips -> reason.
    """
    rows, left_out = {}, {}
    for clip, performance in performances.items():
        if (score := scores.get(clip)) is None:
            left_out[clip] = "no score"
            continue
        try:
            rows[clip] = describe(performance, score)
        except InputError as error:
            left_out[clip] = str(error)
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(FEATURES)), left_out
