"""Descriptors of a performance: what its MIDI says about how it is played, as named numbers with units.

``describe(performance)`` gives them all, without score and without sound; ``DESCRIPTORS`` says what each one is. They are the
input of the MIDI-statistics baseline, and a vocabulary for whoever wants to know what a rating goes with. A few seconds tell
all of them but the tempo: ``describe(excerpt, OF_EXCERPTS)`` gives the others, which encoders learn to predict.

Every number is finite for any performance that ``read_midi`` accepts: a quantity that a performance has no instance of (time
between chords, of a single chord; force of a melody over its accompaniment, of single notes) takes the neutral value that its
description names. All but the counts per second are independent of where a clip was cut.
"""

from collections.abc import Collection

from percepiano_ast.descriptors import force, music, pedals, tempo, timing, touch
from percepiano_ast.descriptors.view import Descriptor, View
from percepiano_ast.performance import Performance

_OF_EXCERPTS = (force, timing, touch, pedals, music)
FAMILIES = (*_OF_EXCERPTS, tempo)


def _named(families) -> dict[str, Descriptor]:
    return {name: one for family in families for name, one in family.TABLE.items()}


OF_EXCERPTS = _named(_OF_EXCERPTS)
DESCRIPTORS = _named(FAMILIES)

__all__ = ["DESCRIPTORS", "FAMILIES", "OF_EXCERPTS", "Descriptor", "describe"]


def describe(performance: Performance, names: Collection[str] = DESCRIPTORS) -> dict[str, float]:
    """The descriptors of a performance in ``names``, in that order, in the unit that each names.

    Args:
        performance: ``trimmed``; silence at either end would count as time without pedal.
        names: of descriptors, such as ``OF_EXCERPTS``; by default all.
    """
    view = View(performance)
    values: dict[str, float] = {}
    for family in FAMILIES:
        if not family.TABLE.keys().isdisjoint(names):
            values |= family.measure(view)
    return {name: float(values[name]) for name in names}
