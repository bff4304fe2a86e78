"""Numbers that are told only with the score: how the playing differs from it, and what is written.

``FEATURES`` says what each one is. Like `descriptors.DESCRIPTORS` they are finite for whatever is accepted: what a clip has
no instance of (lead of the melody, of single notes; tempo over the notated one, of a score without) is 0, and ``undefined``
counts how many are. The quantities are differences, correlations, shares and logarithms of ratios, so that 0 is the neutral
value: as written, no relation, none.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from percepiano_ast.alignment import check_share
from percepiano_ast.config import InputError
from percepiano_ast.descriptors.view import Descriptor
from percepiano_ast.performance import Performance
from percepiano_ast.score import piece, tempo, touch
from percepiano_ast.score.matching import match
from percepiano_ast.score.reading import Score
from percepiano_ast.score.view import View

LEAST_STEPS = 4  # moments of the score, far enough apart to tell of tempo, that a performance is described from
FAMILIES = {"tempo": tempo, "touch": touch, "piece": piece}
FEATURES: dict[str, Descriptor] = {name: one for family in FAMILIES.values() for name, one in family.TABLE.items()}
FEATURES["undefined"] = Descriptor("features", "how many of the others have no instance in this clip and are 0")


def describe(performance: Performance, score: Score) -> dict[str, float]:
    """Every feature of a performance of a score, in the order of ``FEATURES``, in the unit that it names.

    Args:
        performance: as a MIDI file has it or decoded from sound; where it is in time does not matter.

    Raises:
        InputError: less than `alignment.LEAST_MATCHED` of its notes are in the score, or it is too short to have a tempo.
    """
    found = match(performance, score)
    check_share(found.share)
    view = View(performance, score, found)
    if (steps := len(view.steps)) < LEAST_STEPS:
        raise InputError(f"{steps} moments of the score are found in it, {LEAST_STEPS} are needed; "
                         "give a longer clip.")  # fmt: skip
    values = tempo.measure(view) | touch.measure(view) | piece.measure(score)
    undefined = [name for name, value in values.items() if not np.isfinite(value)]
    values |= dict.fromkeys(undefined, 0.0) | {"undefined": len(undefined)}
    return {name: float(values[name]) for name in FEATURES}


def table(performances: Mapping[str, Performance], scores: Mapping[str, Score | None]) -> tuple[pd.DataFrame, dict[str, str]]:
    """`describe` of every clip.

    Args:
        performances: by clip: true ones, or decoded from sound.
        scores: by clip; ``None`` or absent where there is none.

    Returns:
        the features, a row a clip, clips as its index; and the clips that are left out -> why, in words.
    """
    rows, left_out = {}, {}
    for clip, performance in performances.items():
        if (score := scores.get(clip)) is None:
            left_out[clip] = "there is no score of it"
            continue
        try:
            rows[clip] = describe(performance, score)
        except InputError as error:
            left_out[clip] = str(error)
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(FEATURES)), left_out
