"""One performance, one parameter changed: listening tests by construction.

A parameter (loudness, tempo, pedal ...) is changed by a signed strength, and whatever it does not name under ``touches``
stays as it was played. So a change in a rating has one cause, which no collection of recordings can offer: there,
players who use more pedal also play softer.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from percepiano_ast.alignment import chord_means, chords, tempo_curve
from percepiano_ast.config import InputError
from percepiano_ast.performance import PEDAL, SUSTAIN, UNA_CORDA, Performance

DOWN = 64  # controller value from which a pedal is down: the MIDI standard's, and FluidSynth's
LOWEST, HIGHEST = 21, 108  # MIDI pitches of the keyboard
_SHORTEST = 0.02  # seconds of a note that is shortened
_LOCAL = 1.0  # seconds, standard deviation of the bell that the local loudness is taken over


class CannotVary(InputError):
    """A performance in which this parameter cannot be changed; the message says why."""


@dataclass(frozen=True)
class Parameter:
    """Something about a performance that can be changed by itself.

    Attributes:
        name: in tables.
        words: what a performance is called that has less and that has more of it.
        unit: of ``strengths``; ``{}`` is where the number goes.
        strengths: the amounts, negative for less of it.
        touches: what may change: ``onset``, ``offset``, ``pitch``, ``velocity`` of notes, ``sustain`` and ``una_corda``
            (events of that pedal), ``pedal_time`` (when events of the pedals fall).
        change: (performance, strength, score) -> performance.
        measure: (performance, score) -> how much of it there is.
        needs_score: whether it is told from a metronomic rendition of the score alone.
    """

    name: str
    words: tuple[str, str]
    unit: str
    strengths: tuple[float, ...]
    touches: tuple[str, ...]
    change: Callable[[Performance, float, Performance | None], Performance]
    measure: Callable[[Performance, Performance | None], float]
    needs_score: bool = False


@dataclass(frozen=True)
class Variation:
    """One parameter changed by one amount."""

    parameter: Parameter
    strength: float

    @property
    def name(self) -> str:
        """What the result is called: ``softer``, ``more pedal``."""
        return self.parameter.words[self.strength > 0]

    @property
    def label(self) -> str:
        """Name and amount in words."""
        return f"{self.name} ({self.parameter.unit.format(self.strength)})"

    def apply(self, performance: Performance, score: Performance | None = None) -> Performance:
        """The same playing with the parameter changed; where there is nothing to change, as it was.

        Args:
            performance: `performance.trimmed`.
            score: a metronomic rendition of the same passage, for parameters that need one.

        Raises:
            CannotVary: it needs a score and has none, or would leave the keyboard.
        """
        if self.parameter.needs_score and score is None:
            raise CannotVary(f"{self.parameter.name} is told from a rendition of the score, and there is none of this clip")
        return self.parameter.change(performance, self.strength, score)


def same(one: Performance, other: Performance) -> bool:
    """Whether two performances have equal notes and pedals."""
    return np.array_equal(one.notes, other.notes) and np.array_equal(one.pedals, other.pedals)


# --- Force ------------------------------------------------------------------------------------------------------------


def _with_velocity(performance: Performance, velocity: np.ndarray) -> Performance:
    notes = performance.notes.copy()
    notes["velocity"] = np.clip(np.round(velocity), 1, 127)
    return replace(performance, notes=notes)


def _velocity(performance: Performance) -> np.ndarray:
    return performance.notes["velocity"].astype(float)


def _spread_about(centre: Callable[[Performance], np.ndarray]):
    """Make the deviation of velocity from ``centre`` (1 + strength) times what it is."""

    def change(performance, strength, score):
        middle = centre(performance)
        return _with_velocity(performance, middle + (1 + strength) * (_velocity(performance) - middle))

    return change


def _deviation_from(centre: Callable[[Performance], np.ndarray]):
    return lambda performance, score: float(np.std(_velocity(performance) - centre(performance)))


def _clip_mean(performance: Performance) -> np.ndarray:
    return np.full(len(performance.notes), _velocity(performance).mean())


def _local_mean(performance: Performance) -> np.ndarray:
    onset = performance.notes["onset"]
    weights = np.exp(-0.5 * ((onset[:, None] - onset) / _LOCAL) ** 2)
    return weights @ _velocity(performance) / weights.sum(axis=1)


def _chord_mean(performance: Performance) -> np.ndarray:
    return chord_means(_velocity(performance), chords(performance.notes))


def _melody(performance: Performance) -> tuple[np.ndarray, np.ndarray]:
    """Whether each note is the top of a chord, and how many notes its chord has."""
    numbers = chords(performance.notes)
    pitch = performance.notes["pitch"]
    top = np.zeros(numbers[-1] + 1, dtype=int)
    np.maximum.at(top, numbers, pitch)
    return pitch == top[numbers], np.bincount(numbers)[numbers]


def _bring_out(performance, strength, score):
    """Raise the top note of each chord over the rest by ``strength``; the chord's mean force stays."""
    top, size = _melody(performance)
    shift = np.where(top, (size - 1) / size, -1 / size) * strength
    return _with_velocity(performance, _velocity(performance) + np.where(size > 1, shift, 0))


def _melody_lead(performance, score) -> float:
    top, size = _melody(performance)
    chord = size > 1
    if not chord.any():
        return 0.0
    velocity = _velocity(performance)
    return float(velocity[chord & top].mean() - velocity[chord & ~top].mean())


# --- Time -------------------------------------------------------------------------------------------------------------


def _moved(performance: Performance, clock: Callable[[np.ndarray], np.ndarray]) -> Performance:
    """Every note and pedal at the moment that a rising ``clock`` makes of its own."""
    notes, pedals = performance.notes.copy(), performance.pedals.copy()
    for part, field in ((notes, "onset"), (notes, "offset"), (pedals, "time")):
        part[field] = clock(part[field])
    return replace(performance, notes=notes, pedals=pedals)


def _change_tempo(performance, strength, score):
    return _moved(performance, lambda times: times / (1 + strength))


def _chord_rate(performance, score) -> float:
    onset = performance.notes["onset"]
    return float(chords(performance.notes)[-1] / max(onset[-1] - onset[0], _SHORTEST))


def _change_rubato(performance, strength, score):
    curve = _curve(performance, score)
    return _moved(performance, lambda times: curve.stretched(times, 1 + strength))


def _curve(performance, score):
    try:
        return tempo_curve(performance, score)
    except InputError as error:
        raise CannotVary(str(error)) from error


def _change_articulation(performance, strength, score):
    """Keys held (1 + strength) times as long, at most to the next stroke of the same key or the end of the clip."""
    notes = performance.notes.copy()
    longer = notes["onset"] + (1 + strength) * (notes["offset"] - notes["onset"])
    if strength > 0:
        longer = np.minimum(longer, np.maximum(_next_stroke(notes), notes["offset"]))
    else:
        longer = np.minimum(np.maximum(longer, notes["onset"] + _SHORTEST), notes["offset"])
    notes["offset"] = longer
    return replace(performance, notes=notes)


def _next_stroke(notes: np.ndarray) -> np.ndarray:
    """Seconds at which each note's key is struck again; the end of the clip for the last."""
    strokes = np.full(len(notes), notes["offset"].max())
    upcoming: dict[int, float] = {}
    for i in range(len(notes) - 1, -1, -1):
        pitch = int(notes["pitch"][i])
        strokes[i] = upcoming.get(pitch, strokes[i])
        upcoming[pitch] = notes["onset"][i]
    return strokes


def _key_overlap(performance, score) -> float:
    """Median length of a note relative to the time until the next chord."""
    notes, numbers = performance.notes, chords(performance.notes)
    starts = np.array([notes["onset"][numbers == k].min() for k in range(numbers[-1] + 1)])
    until = np.append(starts, notes["offset"].max())[numbers + 1] - notes["onset"]
    return float(np.median((notes["offset"] - notes["onset"]) / np.maximum(until, _SHORTEST)))


def _change_asynchrony(performance, strength, score):
    """Onsets (1 + strength) times as far from their chord's mean; never before the key is free or after its release."""
    notes = performance.notes.copy()
    middle = chord_means(notes["onset"], chords(notes))
    onset = middle + (1 + strength) * (notes["onset"] - middle)
    free: dict[int, float] = {}
    for i, pitch in enumerate(notes["pitch"].tolist()):
        latest = max(notes["offset"][i] - _SHORTEST, notes["onset"][i])
        notes["onset"][i] = min(max(onset[i], free.get(pitch, 0.0)), latest)
        free[pitch] = notes["offset"][i]
    return replace(performance, notes=notes[np.lexsort((notes["pitch"], notes["onset"]))])


def _asynchrony(performance, score) -> float:
    onset = performance.notes["onset"]
    return float(np.std(onset - chord_means(onset, chords(performance.notes))))


# --- Pedals and pitch -------------------------------------------------------------------------------------------------


def _with_pedal(performance: Performance, number: int, events: list[tuple[float, int, int]]) -> Performance:
    """``performance`` with ``events`` (time, number, value) in place of those of one pedal."""
    others = performance.pedals[performance.pedals["number"] != number]
    pedals = np.concatenate([others, np.array(events, dtype=PEDAL)])
    return replace(performance, pedals=pedals[np.argsort(pedals["time"], kind="stable")])


def _events(performance: Performance, number: int) -> np.ndarray:
    return performance.pedals[performance.pedals["number"] == number]


def _change_pedal(performance, strength, score):
    """-1: never down. 1: down throughout. Between: lifted earlier or later, by that share of how long it is down or up."""
    if abs(strength) == 1:
        return _with_pedal(performance, SUSTAIN, [(0.0, SUSTAIN, 127)] if strength > 0 else [])
    events = _events(performance, SUSTAIN)
    time, value = events["time"], events["value"]
    edges = np.flatnonzero(np.diff(np.concatenate([[0], value >= DOWN])))  # events that put it down and up, in turn
    keep, new = np.ones(len(events), dtype=bool), []
    for turn, (start, stop) in enumerate(zip(time[edges], np.append(time[edges[1:]], performance.duration))):
        if turn % 2 == 0 and strength < 0:
            lifted = stop + strength * (stop - start)
            keep &= (time < lifted) | (time >= stop)
            new.append((lifted, SUSTAIN, 0))
        elif turn % 2 == 1 and strength > 0:
            lifted = start + strength * (stop - start)
            late = (time >= start) & (time < lifted)
            keep &= ~late
            new += [(lifted, SUSTAIN, int(value[late][-1]))] if late.any() else []
    return _with_pedal(performance, SUSTAIN, events[keep].tolist() + new)


def _change_depth(performance, strength, score):
    """A pedal that is down goes (1 + strength) of the way from half pedal, ``DOWN``, to where it was."""
    events = _events(performance, SUSTAIN).copy()
    deep = events["value"] > DOWN
    events["value"][deep] = np.round(DOWN + (1 + strength) * (events["value"][deep].astype(float) - DOWN))
    return _with_pedal(performance, SUSTAIN, events.tolist())


def _change_soft_pedal(performance, strength, score):
    """Una corda down throughout, or never."""
    return _with_pedal(performance, UNA_CORDA, [(0.0, UNA_CORDA, 127)] if strength > 0 else [])


def _held(performance: Performance, number: int, weigh: Callable[[np.ndarray], np.ndarray]) -> float:
    """Mean over time of ``weigh(value)`` of one pedal, 0 before its first event."""
    events = _events(performance, number)
    edges = np.clip(np.concatenate([[0], events["time"], [performance.duration]]), 0, performance.duration)
    return float(np.diff(edges) @ weigh(np.concatenate([[0], events["value"]])) / performance.duration)


def _down_share(number: int):
    return lambda performance, score: _held(performance, number, lambda value: value >= DOWN)


def _depth(performance, score) -> float:
    down = _held(performance, SUSTAIN, lambda value: value >= DOWN)
    return _held(performance, SUSTAIN, lambda value: np.where(value >= DOWN, value, 0)) / down if down else 0.0


def _transpose(performance, strength, score):
    notes = performance.notes.copy()
    pitch = notes["pitch"].astype(int) + int(strength)
    if pitch.min() < LOWEST or pitch.max() > HIGHEST:
        raise CannotVary(f"{strength:+g} semitones lead off the keyboard (pitches {pitch.min()} to {pitch.max()})")
    notes["pitch"] = pitch
    return replace(performance, notes=notes)


# --- The table --------------------------------------------------------------------------------------------------------

_HALVES = (-1, -0.5, 0.5, 1)
_SHARE = "{:+.0%}"
_DEVIATION = "deviation {:+.0%}"

PARAMETERS = {
    parameter.name: parameter
    for parameter in (
        Parameter(
            "loudness", ("softer", "louder"), "{:+g} velocity", (-20, -10, 10, 20), ("velocity",),
            lambda performance, strength, score: _with_velocity(performance, _velocity(performance) + strength),
            lambda performance, score: float(_velocity(performance).mean()),
        ),
        Parameter(
            "tempo", ("slower", "faster"), _SHARE, (-0.25, -0.1, 0.1, 0.25), ("onset", "offset", "pedal_time"),
            _change_tempo, _chord_rate,
        ),
        Parameter("pedal", ("less pedal", "more pedal"), _SHARE, _HALVES, ("sustain",), _change_pedal, _down_share(SUSTAIN)),
        Parameter("pedal depth", ("half pedal", "full pedal"), _SHARE, (-1,), ("sustain",), _change_depth, _depth),
        Parameter(
            "soft pedal", ("no soft pedal", "soft pedal"), _SHARE, (-1, 1), ("una_corda",), _change_soft_pedal,
            _down_share(UNA_CORDA),
        ),
        Parameter(
            "rubato", ("less rubato", "more rubato"), _SHARE, _HALVES, ("onset", "offset", "pedal_time"), _change_rubato,
            lambda performance, score: _curve(performance, score).rubato, needs_score=True,
        ),
        Parameter(
            "dynamics", ("flatter dynamics", "wider dynamics"), _DEVIATION, _HALVES, ("velocity",),
            _spread_about(_clip_mean), _deviation_from(_clip_mean),
        ),
        Parameter(
            "accents", ("fewer accents", "more accents"), _DEVIATION, (-1, 1), ("velocity",),
            _spread_about(_local_mean), _deviation_from(_local_mean),
        ),
        Parameter(
            "voicing", ("flat voicing", "stronger voicing"), _DEVIATION, (-1, 1), ("velocity",),
            _spread_about(_chord_mean), _deviation_from(_chord_mean),
        ),
        Parameter(
            "melody", ("melody held back", "melody brought out"), "{:+g} velocity", (-15, 15), ("velocity",), _bring_out,
            _melody_lead,
        ),
        Parameter(
            "articulation", ("staccato", "legato"), "key-down {:+.0%}", (-0.6, -0.3, 0.5, 1), ("offset",),
            _change_articulation, _key_overlap,
        ),
        Parameter(
            "asynchrony", ("chords together", "chords spread"), _DEVIATION, (-1, 1), ("onset",), _change_asynchrony,
            _asynchrony,
        ),
        Parameter(
            "transposition", ("lower", "higher"), "{:+g} semitones", (-5, -2, 2, 5), ("pitch",), _transpose,
            lambda performance, score: float(performance.notes["pitch"].mean()),
        ),
    )
}  # fmt: skip

VARIATIONS = tuple(Variation(parameter, strength) for parameter in PARAMETERS.values() for strength in parameter.strengths)
