"""Descriptors of a performance: MIDI statistics of expressive parameters, with names and units.

``describe(performance)`` computes all of them, without score or audio; ``DESCRIPTORS`` documents
each one. They are the input of the MIDI-statistics baseline and explain ratings in musical terms.
All but the tempo descriptors can be computed from a few seconds: ``describe(excerpt, OF_EXCERPTS)``
returns these, which encoders are trained to predict.

All values are finite for any performance that ``read_midi`` accepts. A descriptor without an
instance in a performance (inter-onset intervals of a single chord; velocity of melody over
accompaniment without chords) has the neutral value in its description. All except rates per second
are independent of the clip's boundaries.
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
    """The descriptors ``names`` of a performance, in that order, in the units of ``DESCRIPTORS``.

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
