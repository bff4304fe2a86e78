"""Edits of a performance for sensitivity tests: one expressive parameter changed at a time."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from percepiano_ast.errors import InputError
from percepiano_ast.music.align import TempoCurve, chord_means, chords, tempo_curve
from percepiano_ast.music.midi import (
    PEDAL,
    PEDAL_DOWN,
    SUSTAIN,
    UNA_CORDA,
    Performance,
    next_onsets,
)

LOWEST, HIGHEST = 21, 108  # MIDI pitches of the keyboard
_SHORTEST = 0.02  # minimum seconds of a shortened note
_LOCAL = 1.0  # seconds; standard deviation of the Gaussian kernel for local velocity


class NotApplicable(InputError):
    """The parameter cannot be changed in this performance; the message has the reason."""


@dataclass(frozen=True)
class Parameter:
    """An expressive parameter of a performance that can be changed separately.

    Attributes:
        words: labels of a performance with less and with more of it.
        unit: format string of ``strengths``, the amounts, negative for less.
        changes: the fields that may change: ``onset``, ``offset``, ``pitch``, ``velocity`` of
            notes, ``sustain`` and ``una_corda`` (events of that pedal), ``pedal_time`` (times of
            pedal events). Everything else is unchanged, so that a change of rating has one cause.
        change: (performance, strength, score) -> performance.
        measure: (performance, score) -> value of the parameter.
        needs_score: whether it requires a metronomic rendering of the score.
    """

    name: str
    words: tuple[str, str]
    unit: str
    strengths: tuple[float, ...]
    changes: tuple[str, ...]
    change: Callable[[Performance, float, Performance | None], Performance]
    measure: Callable[[Performance, Performance | None], float]
    needs_score: bool = False


@dataclass(frozen=True)
class Edit:
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
        """The performance (`midi.trimmed`) with the parameter changed, if it has an instance of it.

        Args:
            score: a metronomic rendering of the same passage, for parameters that need one.

        Raises:
            NotApplicable: the score is missing or does not match, or the result would exceed the
                keyboard.
        """
        if self.parameter.needs_score and score is None:
            raise NotApplicable(
                f"{self.parameter.name} needs a deadpan rendering of the score, and this clip has"
                " none"
            )
        return self.parameter.change(performance, self.strength, score)


def same(one: Performance, other: Performance) -> bool:
    """Whether two performances have equal notes and pedals."""
    return np.array_equal(one.notes, other.notes) and np.array_equal(one.pedals, other.pedals)


# --- Velocity -------------------------------------------------------------------------------------


def _velocity(performance: Performance) -> np.ndarray:
    return performance.notes["velocity"].astype(float)


def _with_velocity(performance: Performance, velocity: np.ndarray) -> Performance:
    notes = performance.notes.copy()
    notes["velocity"] = np.clip(np.round(velocity), 1, 127)
    return replace(performance, notes=notes)


def _mean(performance: Performance) -> np.ndarray:
    return np.full(len(performance.notes), _velocity(performance).mean())


def _local_mean(performance: Performance) -> np.ndarray:
    onset = performance.notes["onset"]
    weights = np.exp(-0.5 * ((onset[:, None] - onset) / _LOCAL) ** 2)
    return weights @ _velocity(performance) / weights.sum(axis=1)


def _chord_mean(performance: Performance) -> np.ndarray:
    return chord_means(_velocity(performance), chords(performance.notes))


def _deviation(name: str, words: tuple[str, str], strengths: tuple[float, ...], centre: Callable):
    """The deviation of velocity from ``centre``, scaled by (1 + strength)."""

    def change(performance, strength, score):
        middle = centre(performance)
        away = _velocity(performance) - middle
        return _with_velocity(performance, middle + (1 + strength) * away)

    def measure(performance, score):
        return float(np.std(_velocity(performance) - centre(performance)))

    return Parameter(name, words, "deviation {:+.0%}", strengths, ("velocity",), change, measure)


def _melody(performance: Performance) -> tuple[np.ndarray, np.ndarray]:
    """Whether each note is the highest of its chord, and the number of notes of its chord."""
    numbers, pitch = chords(performance.notes), performance.notes["pitch"]
    top = np.zeros(numbers[-1] + 1, dtype=int)
    np.maximum.at(top, numbers, pitch)
    return pitch == top[numbers], np.bincount(numbers)[numbers]


def _bring_out(performance, strength, score):
    """Raise the velocity of each chord's top note over the rest by ``strength``; the chord's mean
    is unchanged."""
    top, size = _melody(performance)
    shift = np.where(top, (size - 1) / size, -1 / size) * strength
    return _with_velocity(performance, _velocity(performance) + np.where(size > 1, shift, 0))


def _melody_over_rest(performance, score):
    top, size = _melody(performance)
    top, velocity = top[size > 1], _velocity(performance)[size > 1]
    return float(velocity[top].mean() - velocity[~top].mean()) if len(top) else 0.0


# --- Time -----------------------------------------------------------------------------------------


def _moved(performance: Performance, clock: Callable[[np.ndarray], np.ndarray]) -> Performance:
    """Map the times of all notes and pedal events by the monotonic function ``clock``."""
    notes, pedals = performance.notes.copy(), performance.pedals.copy()
    for part, field in ((notes, "onset"), (notes, "offset"), (pedals, "time")):
        part[field] = clock(part[field])
    return replace(performance, notes=notes, pedals=pedals)


def _chord_rate(performance, score):
    onset = performance.notes["onset"]
    return float(chords(performance.notes)[-1] / max(onset[-1] - onset[0], _SHORTEST))


def _curve(performance, score) -> TempoCurve:
    try:
        return tempo_curve(performance, score)
    except InputError as error:
        raise NotApplicable(str(error)) from error


def _change_rubato(performance, strength, score):
    curve = _curve(performance, score)
    return _moved(performance, lambda times: curve.stretched(times, 1 + strength))


def _change_articulation(performance, strength, score):
    """Scale key-down times by (1 + strength), at most up to the next onset of the same key or the
    end of the clip."""
    notes = performance.notes.copy()
    longer = notes["onset"] + (1 + strength) * (notes["offset"] - notes["onset"])
    if strength > 0:
        limit = next_onsets(notes, notes["offset"].max())
        notes["offset"] = np.minimum(longer, np.maximum(limit, notes["offset"]))
    else:
        shortest = notes["onset"] + _SHORTEST
        notes["offset"] = np.minimum(np.maximum(longer, shortest), notes["offset"])
    return replace(performance, notes=notes)


def _key_overlap(performance, score):
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


def _asynchrony(performance, score):
    onset = performance.notes["onset"]
    return float(np.std(onset - chord_means(onset, chords(performance.notes))))


# --- Pedals and pitch -----------------------------------------------------------------------------


def _with_pedal(performance: Performance, number: int, events: list[tuple]) -> Performance:
    """``performance`` with the events of one pedal replaced by ``events`` (time, number, value)."""
    others = performance.pedals[performance.pedals["number"] != number]
    pedals = np.concatenate([others, np.array(events, dtype=PEDAL)])
    return replace(performance, pedals=pedals[np.argsort(pedals["time"], kind="stable")])


def _change_pedal(performance, strength, score):
    """-1: never down. 1: down throughout. Between: released earlier or later, by that share of the
    time it is down or up."""
    if abs(strength) == 1:
        return _always(performance, SUSTAIN, strength > 0)
    events = performance.pedal(SUSTAIN)
    time, value = events["time"], events["value"]
    # presses and releases in turn
    edges = np.flatnonzero(np.diff(np.concatenate([[0], value >= PEDAL_DOWN])))
    stops = np.append(time[edges[1:]], performance.duration)
    keep, new = np.ones(len(events), dtype=bool), []
    for turn, (start, stop) in enumerate(zip(time[edges], stops)):
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
    """Scale the depth of a pedal that is down, relative to ``PEDAL_DOWN``, by (1 + strength)."""
    events = performance.pedal(SUSTAIN)
    deep = events["value"] > PEDAL_DOWN
    depth = events["value"][deep].astype(float) - PEDAL_DOWN
    events["value"][deep] = np.round(PEDAL_DOWN + (1 + strength) * depth)
    return _with_pedal(performance, SUSTAIN, events.tolist())


def _always(performance: Performance, number: int, down: bool) -> Performance:
    """A pedal down throughout, or never."""
    return _with_pedal(performance, number, [(0.0, number, 127)] if down else [])


def _pedal_over_time(performance: Performance, number: int) -> tuple[float, float]:
    """Share of time for which a pedal is down, and its mean value then (0 if never)."""
    events, end = performance.pedal(number), performance.duration
    edges = np.clip(np.concatenate([[0], events["time"], [end]]), 0, end)
    values = np.concatenate([[0], events["value"]])
    down = values >= PEDAL_DOWN
    share, depth = (float(np.diff(edges) @ part / end) for part in (down, down * values))
    return share, depth / share if share else 0.0


def _transpose(performance, strength, score):
    notes = performance.notes.copy()
    pitch = notes["pitch"].astype(int) + int(strength)
    if pitch.min() < LOWEST or pitch.max() > HIGHEST:
        raise NotApplicable(
            f"{strength:+g} semitones exceed the keyboard (pitches {pitch.min()} to {pitch.max()})"
        )
    notes["pitch"] = pitch
    return replace(performance, notes=notes)


# --- The table ------------------------------------------------------------------------------------

_HALVES, _ALL = (-1, -0.5, 0.5, 1), (-1, 1)
_SHARE = "{:+.0%}"
_TIMES = ("onset", "offset", "pedal_time")

# fmt: off
PARAMETERS = {parameter.name: parameter for parameter in (
    Parameter("loudness", ("softer", "louder"), "{:+g} velocity", (-20, -10, 10, 20),
              ("velocity",), lambda p, strength, score: _with_velocity(p, _velocity(p) + strength),
              lambda p, score: float(_velocity(p).mean())),
    Parameter("tempo", ("slower", "faster"), _SHARE, (-0.25, -0.1, 0.1, 0.25),
              _TIMES, lambda p, strength, score: _moved(p, lambda time: time / (1 + strength)),
              _chord_rate),
    Parameter("pedal", ("less pedal", "more pedal"), _SHARE, _HALVES,
              ("sustain",), _change_pedal, lambda p, score: _pedal_over_time(p, SUSTAIN)[0]),
    Parameter("pedal depth", ("half pedal", "full pedal"), _SHARE, (-1,),
              ("sustain",), _change_depth, lambda p, score: _pedal_over_time(p, SUSTAIN)[1]),
    Parameter("soft pedal", ("no soft pedal", "soft pedal"), _SHARE, _ALL,
              ("una_corda",), lambda p, strength, score: _always(p, UNA_CORDA, strength > 0),
              lambda p, score: _pedal_over_time(p, UNA_CORDA)[0]),
    Parameter("rubato", ("less rubato", "more rubato"), _SHARE, _HALVES,
              _TIMES, _change_rubato, lambda p, score: _curve(p, score).rubato, needs_score=True),
    _deviation("dynamics", ("flatter dynamics", "wider dynamics"), _HALVES, _mean),
    _deviation("accents", ("fewer accents", "more accents"), _ALL, _local_mean),
    _deviation("voicing", ("flat voicing", "stronger voicing"), _ALL, _chord_mean),
    Parameter("melody", ("melody held back", "melody brought out"), "{:+g} velocity", (-15, 15),
              ("velocity",), _bring_out, _melody_over_rest),
    Parameter("articulation", ("staccato", "legato"), "key-down {:+.0%}", (-0.6, -0.3, 0.5, 1),
              ("offset",), _change_articulation, _key_overlap),
    Parameter("asynchrony", ("chords together", "chords spread"), "deviation {:+.0%}", _ALL,
              ("onset",), _change_asynchrony, _asynchrony),
    Parameter("transposition", ("lower", "higher"), "{:+g} semitones", (-5, -2, 2, 5),
              ("pitch",), _transpose, lambda p, score: float(p.notes["pitch"].mean())),
)}
# fmt: on

EDITS = tuple(Edit(one, strength) for one in PARAMETERS.values() for strength in one.strengths)
