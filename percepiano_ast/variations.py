"""Controlled variations of a performance: one expressive parameter changed at a time, for
sensitivity tests.

A parameter (loudness, tempo, pedal ...) is changed by a signed strength; everything not listed in
``touches`` is unchanged. So a change of rating has one cause. In collections of recordings
parameters are confounded: players who use more pedal also play softer.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from percepiano_ast.alignment import chord_means, chords, tempo_curve
from percepiano_ast.errors import InputError
from percepiano_ast.performance import PEDAL, SUSTAIN, UNA_CORDA, Performance

DOWN = 64  # controller value from which a pedal is down, as in the MIDI standard and FluidSynth
LOWEST, HIGHEST = 21, 108  # MIDI pitches of the keyboard
_SHORTEST = 0.02  # minimum seconds of a shortened note
_LOCAL = 1.0  # seconds; standard deviation of the Gaussian kernel for local velocity


class CannotVary(InputError):
    """The parameter cannot be changed in this performance; the message has the reason."""


@dataclass(frozen=True)
class Parameter:
    """An expressive parameter of a performance that can be changed separately.

    Attributes:
        name: in tables.
        words: labels of a performance with less and with more of it.
        unit: format string of ``strengths``, with ``{}`` for the number.
        strengths: the amounts, negative for less.
        touches: the fields that may change: ``onset``, ``offset``, ``pitch``, ``velocity`` of
            notes, ``sustain`` and ``una_corda`` (events of that pedal), ``pedal_time`` (times of
            pedal events).
        change: (performance, strength, score) -> performance.
        measure: (performance, score) -> value of the parameter.
        needs_score: whether it requires a metronomic rendering of the score.
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
        """Label of the result: ``softer``, ``more pedal``."""
        return self.parameter.words[self.strength > 0]

    @property
    def label(self) -> str:
        """Name and amount with its unit."""
        return f"{self.name} ({self.parameter.unit.format(self.strength)})"

    def apply(self, performance: Performance, score: Performance | None = None) -> Performance:
        """The performance with the parameter changed; unchanged if the parameter has no instance in
        it.

        Args:
            performance: `performance.trimmed`.
            score: a metronomic rendering of the same passage, for parameters that need one.

        Raises:
            CannotVary: the score is missing or does not match, or the result would exceed the
                keyboard.
        """
        if self.parameter.needs_score and score is None:
            raise CannotVary(
                f"{self.parameter.name} needs a deadpan rendering of the score, and this clip has"
                " none"
            )
        return self.parameter.change(performance, self.strength, score)


def same(one: Performance, other: Performance) -> bool:
    """Whether two performances have equal notes and pedals."""
    return np.array_equal(one.notes, other.notes) and np.array_equal(one.pedals, other.pedals)


# --- Force --------------------------------------------------------------------------------------


def _with_velocity(performance: Performance, velocity: np.ndarray) -> Performance:
    notes = performance.notes.copy()
    notes["velocity"] = np.clip(np.round(velocity), 1, 127)
    return replace(performance, notes=notes)


def _velocity(performance: Performance) -> np.ndarray:
    return performance.notes["velocity"].astype(float)


def _spread_about(centre: Callable[[Performance], np.ndarray]):
    """Scale the deviation of velocity from ``centre`` by (1 + strength)."""

    def change(performance, strength, score):
        middle = centre(performance)
        return _with_velocity(
            performance, middle + (1 + strength) * (_velocity(performance) - middle)
        )

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
    """Whether each note is the highest of its chord, and the number of notes of its chord."""
    numbers = chords(performance.notes)
    pitch = performance.notes["pitch"]
    top = np.zeros(numbers[-1] + 1, dtype=int)
    np.maximum.at(top, numbers, pitch)
    return pitch == top[numbers], np.bincount(numbers)[numbers]


def _bring_out(performance, strength, score):
    """Raise the velocity of each chord's top note over the rest by ``strength``; the chord's mean
    is unchanged."""
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


# --- Time ---------------------------------------------------------------------------------------


def _moved(performance: Performance, clock: Callable[[np.ndarray], np.ndarray]) -> Performance:
    """Map the times of all notes and pedal events by the monotonic function ``clock``."""
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
    """Scale key-down times by (1 + strength), at most up to the next onset of the same key or the
    end of the clip."""
    notes = performance.notes.copy()
    longer = notes["onset"] + (1 + strength) * (notes["offset"] - notes["onset"])
    if strength > 0:
        longer = np.minimum(longer, np.maximum(_next_stroke(notes), notes["offset"]))
    else:
        longer = np.minimum(np.maximum(longer, notes["onset"] + _SHORTEST), notes["offset"])
    notes["offset"] = longer
    return replace(performance, notes=notes)


def _next_stroke(notes: np.ndarray) -> np.ndarray:
    """Time in seconds of the next onset of each note's key; the end of the clip if there is
    none."""
    strokes = np.full(len(notes), notes["offset"].max())
    upcoming: dict[int, float] = {}
    for i in range(len(notes) - 1, -1, -1):
        pitch = int(notes["pitch"][i])
        strokes[i] = upcoming.get(pitch, strokes[i])
        upcoming[pitch] = notes["onset"][i]
    return strokes


def _key_overlap(performance, score) -> float:
    """Median duration of a note relative to the time until the next chord."""
    notes, numbers = performance.notes, chords(performance.notes)
    starts = np.array([notes["onset"][numbers == k].min() for k in range(numbers[-1] + 1)])
    until = np.append(starts, notes["offset"].max())[numbers + 1] - notes["onset"]
    return float(np.median((notes["offset"] - notes["onset"]) / np.maximum(until, _SHORTEST)))


def _change_asynchrony(performance, strength, score):
    """Scale the distance of onsets from their chord's mean by (1 + strength), within the key's
    previous and own release."""
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


# --- Pedals and pitch ---------------------------------------------------------------------------


def _with_pedal(
    performance: Performance, number: int, events: list[tuple[float, int, int]]
) -> Performance:
    """``performance`` with the events of one pedal replaced by ``events`` (time, number, value)."""
    others = performance.pedals[performance.pedals["number"] != number]
    pedals = np.concatenate([others, np.array(events, dtype=PEDAL)])
    return replace(performance, pedals=pedals[np.argsort(pedals["time"], kind="stable")])


def _events(performance: Performance, number: int) -> np.ndarray:
    return performance.pedals[performance.pedals["number"] == number]


def _change_pedal(performance, strength, score):
    """-1: never down. 1: down throughout. Between: released earlier or later, by that share of the
    time it is down or up."""
    if abs(strength) == 1:
        return _with_pedal(performance, SUSTAIN, [(0.0, SUSTAIN, 127)] if strength > 0 else [])
    events = _events(performance, SUSTAIN)
    time, value = events["time"], events["value"]
    # presses and releases in turn
    edges = np.flatnonzero(np.diff(np.concatenate([[0], value >= DOWN])))
    keep, new = np.ones(len(events), dtype=bool), []
    for turn, (start, stop) in enumerate(
        zip(time[edges], np.append(time[edges[1:]], performance.duration))
    ):
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
    """Scale the depth of a pedal that is down, relative to ``DOWN``, by (1 + strength)."""
    events = _events(performance, SUSTAIN).copy()
    deep = events["value"] > DOWN
    events["value"][deep] = np.round(
        DOWN + (1 + strength) * (events["value"][deep].astype(float) - DOWN)
    )
    return _with_pedal(performance, SUSTAIN, events.tolist())


def _change_soft_pedal(performance, strength, score):
    """Una corda down throughout, or never."""
    return _with_pedal(performance, UNA_CORDA, [(0.0, UNA_CORDA, 127)] if strength > 0 else [])


def _held(
    performance: Performance, number: int, weigh: Callable[[np.ndarray], np.ndarray]
) -> float:
    """Mean over time of ``weigh(value)`` of one pedal, 0 before its first event."""
    events = _events(performance, number)
    edges = np.clip(
        np.concatenate([[0], events["time"], [performance.duration]]), 0, performance.duration
    )
    return float(
        np.diff(edges) @ weigh(np.concatenate([[0], events["value"]])) / performance.duration
    )


def _down_share(number: int):
    return lambda performance, score: _held(performance, number, lambda value: value >= DOWN)


def _depth(performance, score) -> float:
    down = _held(performance, SUSTAIN, lambda value: value >= DOWN)
    return (
        _held(performance, SUSTAIN, lambda value: np.where(value >= DOWN, value, 0)) / down
        if down
        else 0.0
    )


def _transpose(performance, strength, score):
    notes = performance.notes.copy()
    pitch = notes["pitch"].astype(int) + int(strength)
    if pitch.min() < LOWEST or pitch.max() > HIGHEST:
        raise CannotVary(
            f"{strength:+g} semitones exceed the keyboard (pitches {pitch.min()} to {pitch.max()})"
        )
    notes["pitch"] = pitch
    return replace(performance, notes=notes)


# --- The table ----------------------------------------------------------------------------------

_HALVES = (-1, -0.5, 0.5, 1)
_SHARE = "{:+.0%}"
_DEVIATION = "deviation {:+.0%}"

PARAMETERS = {
    parameter.name: parameter
    for parameter in (
        Parameter(
            "loudness",
            ("softer", "louder"),
            "{:+g} velocity",
            (-20, -10, 10, 20),
            ("velocity",),
            lambda performance, strength, score: _with_velocity(
                performance, _velocity(performance) + strength
            ),
            lambda performance, score: float(_velocity(performance).mean()),
        ),
        Parameter(
            "tempo",
            ("slower", "faster"),
            _SHARE,
            (-0.25, -0.1, 0.1, 0.25),
            ("onset", "offset", "pedal_time"),
            _change_tempo,
            _chord_rate,
        ),
        Parameter(
            "pedal",
            ("less pedal", "more pedal"),
            _SHARE,
            _HALVES,
            ("sustain",),
            _change_pedal,
            _down_share(SUSTAIN),
        ),
        Parameter(
            "pedal depth",
            ("half pedal", "full pedal"),
            _SHARE,
            (-1,),
            ("sustain",),
            _change_depth,
            _depth,
        ),
        Parameter(
            "soft pedal",
            ("no soft pedal", "soft pedal"),
            _SHARE,
            (-1, 1),
            ("una_corda",),
            _change_soft_pedal,
            _down_share(UNA_CORDA),
        ),
        Parameter(
            "rubato",
            ("less rubato", "more rubato"),
            _SHARE,
            _HALVES,
            ("onset", "offset", "pedal_time"),
            _change_rubato,
            lambda performance, score: _curve(performance, score).rubato,
            needs_score=True,
        ),
        Parameter(
            "dynamics",
            ("flatter dynamics", "wider dynamics"),
            _DEVIATION,
            _HALVES,
            ("velocity",),
            _spread_about(_clip_mean),
            _deviation_from(_clip_mean),
        ),
        Parameter(
            "accents",
            ("fewer accents", "more accents"),
            _DEVIATION,
            (-1, 1),
            ("velocity",),
            _spread_about(_local_mean),
            _deviation_from(_local_mean),
        ),
        Parameter(
            "voicing",
            ("flat voicing", "stronger voicing"),
            _DEVIATION,
            (-1, 1),
            ("velocity",),
            _spread_about(_chord_mean),
            _deviation_from(_chord_mean),
        ),
        Parameter(
            "melody",
            ("melody held back", "melody brought out"),
            "{:+g} velocity",
            (-15, 15),
            ("velocity",),
            _bring_out,
            _melody_lead,
        ),
        Parameter(
            "articulation",
            ("staccato", "legato"),
            "key-down {:+.0%}",
            (-0.6, -0.3, 0.5, 1),
            ("offset",),
            _change_articulation,
            _key_overlap,
        ),
        Parameter(
            "asynchrony",
            ("chords together", "chords spread"),
            _DEVIATION,
            (-1, 1),
            ("onset",),
            _change_asynchrony,
            _asynchrony,
        ),
        Parameter(
            "transposition",
            ("lower", "higher"),
            "{:+g} semitones",
            (-5, -2, 2, 5),
            ("pitch",),
            _transpose,
            lambda performance, score: float(performance.notes["pitch"].mean()),
        ),
    )
}

VARIATIONS = tuple(
    Variation(parameter, strength)
    for parameter in PARAMETERS.values()
    for strength in parameter.strengths
)
