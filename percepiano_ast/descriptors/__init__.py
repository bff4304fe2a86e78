"""Descriptors of a performance: what its MIDI says about how it is played, as named numbers with units.

``describe(performance)`` gives them all, without score and without sound; ``DESCRIPTORS`` says what each one is. They are the
input of the MIDI-statistics baseline, and a vocabulary for whoever wants to know what a rating goes with.

Every number is finite for any performance that ``read_midi`` accepts: a quantity that a performance has no instance of (time
between chords, of a single chord; force of a melody over its accompaniment, of single notes) takes the neutral value that its
description names. All but the counts per second are independent of where a clip was cut.
"""

from percepiano_ast.descriptors import force, music, pedals, timing, touch
from percepiano_ast.descriptors.view import Descriptor, View
from percepiano_ast.performance import Performance

FAMILIES = {"force": force, "timing": timing, "touch": touch, "pedals": pedals, "music": music}
DESCRIPTORS: dict[str, Descriptor] = {name: one for family in FAMILIES.values() for name, one in family.TABLE.items()}

__all__ = ["DESCRIPTORS", "FAMILIES", "Descriptor", "describe"]


def describe(performance: Performance) -> dict[str, float]:
    """Every descriptor of a performance, in the order of ``DESCRIPTORS``, in the unit that it names.

    Args:
        performance: ``trimmed``; silence at either end would count as time without pedal.
    """
    view = View(performance)
    values = {name: float(value) for family in FAMILIES.values() for name, value in family.measure(view).items()}
    return {name: values[name] for name in DESCRIPTORS}
