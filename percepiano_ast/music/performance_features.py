"""Features of a performance without its score; names, units and meanings are in ``features.csv``.

Voicing, asynchrony and melody lead: Goebl (2001), "Melody lead in piano performance: expressive
device or artifact?", JASA 110(1). nPVI: Grabe and Low (2002). Key overlap: Bresin and Battel
(2000), J. New Music Research 29(3). Pedal: Liang, Fazekas and Sandler (2019), "Piano sustain-pedal
detection". Key: Krumhansl-Schmuckler, see `audio.features.key_fit`.
"""

import csv
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.special import entr

from percepiano_ast.audio.features import key_fit
from percepiano_ast.music.align import chords
from percepiano_ast.music.midi import PEDAL_DOWN, SUSTAIN, UNA_CORDA, Performance

_SHORTEST = 0.02  # seconds; lower limit of times in ratios and logarithms
_PHRASE = 1.5  # seconds; standard deviation of the Gaussian kernel for the velocity contour
_ALIKE = 0.35  # octaves: successive intervals closer than this are taken as the same written value
_RATIOS = np.log2([1 / 3, 1 / 2, 1, 2, 3])
_PACE_WINDOW = 2.0  # seconds; window of the local onset rate
_SPREAD = 0.01  # seconds: a chord with a larger spread counts as spread
_END = 0.2  # share of a clip that counts as its beginning or end
_LONGEST_HELD = 4.0  # relative to the next chord, reached by a held bass note under a run
_HALF = (20, 107)  # between these values (half pedal) the dampers touch the strings partially
_GRID = 0.05  # seconds; time grid for pedal values and sounding notes
_RING = 4.0  # seconds; an undamped string is assumed to be inaudible afterwards
_BLOCK = 512  # rows of a matrix that are computed at once
_FEWEST_CHORDS = 5  # for the tempo features; with fewer they are 0


class Feature(NamedTuple):
    """Family, unit (empty for shares, ratios and correlations) and meaning of a feature."""

    family: str
    unit: str
    words: str


def read_features(of: str) -> dict[str, Feature]:
    """Name -> `Feature` of the features of a ``performance`` or of a ``score``, in order."""
    with Path(__file__).with_name("features.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["of"] == of]
    return {row["name"]: Feature(row["family"], row["unit"], row["words"]) for row in rows}


PERFORMANCE_FEATURES = read_features("performance")
# All but the tempo can be computed from a few seconds: encoders are trained to predict these.
WINDOW_FEATURES = {name: one for name, one in PERFORMANCE_FEATURES.items() if one.family != "tempo"}


# --- Statistics of finite values; NaN where undefined ---------------------------------------------


def mean(values: np.ndarray) -> float:
    """The mean of finite values."""
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else np.nan


def std(values: np.ndarray) -> float:
    """The standard deviation of at least two finite values."""
    values = values[np.isfinite(values)]
    return float(values.std()) if len(values) > 1 else np.nan


def quantile(values: np.ndarray, share: float) -> float:
    """The quantile of finite values."""
    values = values[np.isfinite(values)]
    return float(np.quantile(values, share)) if len(values) else np.nan


def statistics(names: str, values: np.ndarray) -> dict[str, float]:
    """The features ``names``, separated by spaces: standard deviation (``..._std``), quantile
    (``..._q90``) or else mean of ``values``."""
    found = {}
    for name in names.split():
        *_, ending = name.split("_")
        if ending == "std":
            found[name] = std(values)
        elif ending[0] == "q" and ending[1:].isdecimal():
            found[name] = quantile(values, int(ending[1:]) / 100)
        else:
            found[name] = mean(values)
    return found


def over_rest(values: np.ndarray, which: np.ndarray) -> float:
    """Mean of ``values`` selected by ``which``, minus that of the rest."""
    return mean(values[which]) - mean(values[~which])


def correlation(x: np.ndarray, y: np.ndarray, least: int = 2) -> float:
    """Pearson's r of at least ``least`` finite pairs, neither constant."""
    both = np.isfinite(x) & np.isfinite(y)
    if both.sum() < least or np.ptp(x[both]) < 1e-9 or np.ptp(y[both]) < 1e-9:
        return np.nan
    return float(np.corrcoef(x[both], y[both])[0, 1])


def smoothed(
    where: np.ndarray,
    at: np.ndarray,
    values: np.ndarray,
    width: float,
    weights: np.ndarray | None = None,
    least: float = 0.0,
) -> np.ndarray:
    """Means of ``values`` at ``at`` (ascending), weighted by a Gaussian kernel of standard
    deviation ``width`` around each of ``where`` plus ``least``, times ``weights``."""
    weights = np.ones(len(at)) if weights is None else weights
    found = [np.zeros(0)]
    for first in range(0, len(where), _BLOCK):
        block = where[first : first + _BLOCK]
        # Farther away the kernel is 0 in double precision.
        near = slice(*np.searchsorted(at, (block.min() - 39 * width, block.max() + 39 * width)))
        kernel = np.exp(-0.5 * ((block[:, None] - at[near]) / width) ** 2) * weights[near]
        total = kernel @ values[near] + least * (weights @ values)
        found.append(total / (kernel.sum(axis=1) + least * weights.sum()))
    return np.concatenate(found)


def entropy(counts: np.ndarray) -> float:
    """Entropy in bits of a distribution given by ``counts``."""
    return float(entr(counts / counts.sum()).sum() / np.log(2))


# --- Features -------------------------------------------------------------------------------------


def pedalling(performance: Performance) -> tuple[np.ndarray, np.ndarray]:
    """Release and press times of the sustain pedal, one of each per pedalling; it is released at
    the end at the latest."""
    events = performance.pedal(SUSTAIN)
    turns = np.diff(np.concatenate([[0], (events["value"] >= PEDAL_DOWN).astype(int)]))
    downs, ups = events["time"][turns > 0], events["time"][turns < 0]
    return np.append(ups, performance.duration)[: len(downs)], downs


def performance_features(
    performance: Performance, names: Collection[str] = PERFORMANCE_FEATURES
) -> dict[str, float]:
    """The features ``names`` of a performance, in that order.

    All are finite: a feature without an instance (inter-onset intervals of a single chord, velocity
    of the melody over its accompaniment without chords) is 0. All except rates per second are
    independent of the clip's boundaries.

    Args:
        performance: ``trimmed``; silence at either end would count as time without pedal.
        names: of features, such as ``WINDOW_FEATURES``; by default all.
    """
    notes = performance.notes
    onset, offset = notes["onset"], notes["offset"]
    pitch, velocity = notes["pitch"].astype(float), notes["velocity"].astype(float)
    seconds = float(offset.max() - onset.min())

    # --- Chords and voices ---
    chord = chords(notes)
    size = np.bincount(chord)  # notes of each chord
    order, begins = np.argsort(chord, kind="stable"), np.concatenate([[0], np.cumsum(size)[:-1]])

    def of_chords(reduce: np.ufunc, values: np.ndarray) -> np.ndarray:
        return reduce.reduceat(values[order], begins)

    start = of_chords(np.minimum, onset)
    melody, bass = of_chords(np.maximum, pitch), of_chords(np.minimum, pitch)
    top, together = pitch == melody[chord], size[chord] > 1
    steps = np.maximum(np.diff(start) if len(start) > 1 else np.array([seconds]), _SHORTEST)

    # --- Dynamics ---
    spread = velocity.std()
    of_chord = of_chords(np.add, velocity) / size
    contour = smoothed(start, start, of_chord, _PHRASE)
    rank = np.linspace(0, 1, len(velocity))
    inner = velocity - of_chord[chord]
    values = {
        **statistics("velocity_mean velocity_q10 velocity_q50 velocity_q90", velocity),
        "velocity_std": spread,
        "velocity_max": velocity.max(),
        "velocity_skew": mean((velocity - velocity.mean()) ** 3) / spread**3
        if spread > 1e-9
        else 0.0,
        "velocity_contour": contour.std(),
        "velocity_contour_range": np.ptp(contour),
        "velocity_trend": correlation(rank, velocity) * spread / rank.std(),
        "velocity_accents": (of_chord - contour).std(),
        "velocity_steps": mean(np.abs(np.diff(of_chord))),
        "velocity_of_pitch": correlation(velocity, pitch),
        "voicing_std": np.sqrt(mean(inner[together] ** 2)),
        "voicing_melody": over_rest(velocity[together], top[together]),
        "voicing_bass": over_rest(velocity[together], (pitch == bass[chord])[together]),
        "melody_std": velocity[top].std(),
    }

    # --- Timing: inter-onset intervals between chords ---
    # Without a score the tempo is unknown: their spread mixes rhythm and rubato, their local
    # variability less so.
    log = np.log(steps)
    ratios = np.diff(log) / np.log(2)
    late = start[: len(log)] >= start[-1] - _END * (start[-1] - start[0])
    mixed = late.any() and not late.all()
    # half-overlapping windows
    edges = np.arange(start[0], start[-1] - _PACE_WINDOW, _PACE_WINDOW / 2)
    counts = np.searchsorted(start, edges + _PACE_WINDOW) - np.searchsorted(start, edges)
    away = onset - (of_chords(np.add, onset) / size)[chord]
    width = (of_chords(np.maximum, onset) - start)[size > 1]
    values |= {
        "chord_rate": len(start) / seconds,
        "note_rate": len(onset) / seconds,
        **statistics("ioi_log_std ioi_log_q10 ioi_log_q50 ioi_log_q90", log),
        "ioi_npvi": mean(np.abs(np.tanh(np.diff(log) / 2)) * 2),  # 2 |a - b| / (a + b)
        "rubato": np.sqrt(mean((ratios[np.abs(ratios) < _ALIKE] * np.log(2)) ** 2)),
        "grid_deviation": mean(np.abs(ratios[:, None] - _RATIOS).min(axis=1)),
        "pace_std": np.log(counts + 1.0).std() if len(edges) > 2 else 0.0,
        "final_slowing": np.median(log[late]) - np.median(log[~late]) if mixed else 0.0,
        "asynchrony": np.sqrt(mean(away[together] ** 2)),
        **statistics("asynchrony_spread asynchrony_q90", width),
        "spread_share": mean(width > _SPREAD),
        "melody_lead": over_rest((onset - start[chord])[together], ~top[together]),
    }

    # --- Articulation ---
    held = np.log(np.maximum(offset - onset, _SHORTEST))
    until = np.append(start, offset.max())[chord + 1] - onset
    legato = np.minimum((offset - onset) / np.maximum(until, _SHORTEST), _LONGEST_HELD)
    values |= {
        **statistics("held_mean held_std held_q10 held_q90", held),
        **statistics("legato_mean legato_std legato_q10 legato_q50 legato_q90", legato),
        "staccato_share": (legato < 0.5).mean(),
        "overlap_share": (legato > 1.0).mean(),
        "legato_melody": np.median(legato[top]),
        "force_of_length": correlation(velocity, held),
    }

    # --- Pedal ---
    time = np.arange(onset.min(), offset.max(), _GRID)
    value, soft = (performance.pedal_at(number, time) for number in (SUSTAIN, UNA_CORDA))
    down, half = value >= PEDAL_DOWN, (value > _HALF[0]) & (value < _HALF[1])
    not_up = (value > _HALF[0]).mean()
    ups, downs = pedalling(performance)
    before = start[np.maximum(np.searchsorted(start, downs) - 1, 0)]
    # the pedalling in which each key is released, if any
    pressed = np.concatenate([[-np.inf], ups])[np.searchsorted(downs, offset, side="right")]
    end = np.minimum(np.maximum(offset, pressed), onset + _RING)
    sounding = np.zeros((128, len(time)), dtype=bool)
    spans = np.searchsorted(time, (onset, end))
    for key, first, last in zip(pitch.astype(int), *spans, strict=True):
        sounding[key, first:last] = True
    clashes = sum(int((sounding[step:] & sounding[:-step]).sum()) for step in (1, 2))
    values |= {
        "pedal_share": down.mean(),
        **statistics("pedal_mean pedal_std", value),
        "pedal_depth": mean(value[down]),
        "half_pedal_share": half.mean(),
        "half_pedal_of_down": half.mean() / not_up if not_up else 0.0,
        "pedal_changes": len(downs) / seconds,
        "pedal_movement": np.abs(np.diff(value)).sum() / seconds,
        "pedal_held": mean(ups - downs),
        "pedal_lag": mean(np.clip(downs - before, 0.0, 1.0)),
        "pedalled_notes": (performance.pedal_at(SUSTAIN, onset) >= PEDAL_DOWN).mean(),
        "una_corda_share": (soft >= PEDAL_DOWN).mean(),
        "una_corda_mean": soft.mean(),
        "ringing_mean": np.log(np.maximum(end - onset, _GRID)).mean(),
        "ringing_notes": sounding.sum(axis=0).mean(),
        "blur": clashes / max(int(sounding.sum()), 1),
    }

    # --- Music: register, texture, key; ratings depend on the music too ---
    intervals = np.diff(melody)
    lengths = np.minimum(offset - onset, 1.0)
    classes = np.bincount(pitch.astype(int) % 12, weights=lengths, minlength=12)
    clarity, majorness = key_fit(classes / classes.sum())
    by_pitch = np.lexsort((pitch, chord))
    inside = np.diff(pitch[by_pitch])[np.diff(chord[by_pitch]) == 0] % 12
    values |= {
        **statistics("pitch_mean pitch_std", pitch),
        "pitch_melody": melody.mean(),
        "pitch_bass": bass.mean(),
        "pitch_highest": quantile(pitch, 0.95),
        "pitch_lowest": quantile(pitch, 0.05),
        "melody_steps": mean(np.abs(intervals)),
        "melody_pitch_std": melody.std(),
        **statistics("chord_size chord_size_std", size),
        "single_share": (size == 1).mean(),
        "chord_width": mean((melody - bass)[size > 1]),
        "repeated_share": mean(intervals == 0),
        "majorness": majorness,
        "key_clarity": clarity,
        "pitch_classes": entropy(classes),
        # seconds, sevenths and their compounds
        "seconds_share": mean((inside == 1) | (inside == 2) | (inside >= 10)),
    }

    # --- Tempo ---
    values |= dict.fromkeys(PERFORMANCE_FEATURES.keys() - WINDOW_FEATURES.keys(), 0.0)
    if len(start) >= _FEWEST_CHORDS and not WINDOW_FEATURES.keys() >= set(names):
        pace, note_value, likelihood = estimate_tempo(steps)
        weight = steps / steps.sum()
        middle = np.cumsum(weight) - weight / 2  # of each step, as a share of the clip
        changes = np.abs(np.diff(pace))
        values |= {
            "tempo_std": np.sqrt(weight @ (pace - weight @ pace) ** 2),
            "tempo_jumps": np.quantile(changes, 0.9),
            "tempo_travel": np.sum(changes) / np.sum(steps),
            "tempo_first": over_rest(pace, middle < _END),
            "tempo_final": over_rest(pace, middle > 1 - _END),
            "rhythm_likelihood": likelihood / len(steps),
            "rhythm_variety": entr(np.bincount(note_value) / len(note_value)).sum(),
            "rhythm_repeats": np.mean(note_value[1:] == note_value[:-1]),
        }
    found = {name: float(values[name]) for name in names}
    return {name: value if np.isfinite(value) else 0.0 for name, value in found.items()}


# --- Tempo without a score ------------------------------------------------------------------------

# note values in units of the tempo, and the rarity of each relative to the unit
NOTE_VALUES = np.log([1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 3 / 4, 1, 1.5, 2, 3, 4, 6, 8])
_RARE = np.array([4, 2.5, 3, 1.2, 3.5, 3, 0, 2, 0.8, 2, 1.5, 3, 3])
_PRIOR, _AGAIN = 0.8, 0.24  # cost of rarity in nats at the first step, and at every later step
# cost of an initial unit that differs from the median interval, times the squared log ratio
_NEAR = 0.3
_DOUBLED, _OTHER = 0.9, 1.6  # cost of a change of value by a power of two; cost of any other change
_LEVEL = 0.03  # spacing of log tempo levels
_FARTHEST = 40  # maximum distance in levels of the tempo from one unit per median interval
_JUMP = 10  # maximum change in levels per step
_WANDER = 0.06  # mean change of log tempo in a quarter of a second
_LOOSE, _JITTER = 0.1, 0.012  # standard deviation of a step: relative, and per onset in seconds
_OUTLIER = 30.0  # upper limit of squared deviations
# cost of a transition between note values, (values, values)
_OCTAVES = np.abs(NOTE_VALUES[:, None] - NOTE_VALUES) / np.log(2)
_WHOLE = np.abs(_OCTAVES - np.round(_OCTAVES)) < 1e-6
_CHANGE = np.where(_OCTAVES < 1e-6, 0.0, np.where(_WHOLE, _DOUBLED, _OTHER)) + _AGAIN * _RARE


class TempoEstimate(NamedTuple):
    """Estimated log tempo (``pace``, units per second) and note value (index in ``NOTE_VALUES``) of
    each step, (n,), and the log-likelihood of the path."""

    pace: np.ndarray
    value: np.ndarray
    likelihood: float


def estimate_tempo(steps: np.ndarray) -> TempoEstimate:
    """The most likely tempo and note values of steps in seconds between chords, (n,), n at least 2.

    A longer interval may be a longer note or a slower tempo. A hidden Markov model estimates both
    jointly, after Raphael (2002), Artificial Intelligence 137 ("A hybrid graphical model for
    rhythmic parsing"). Tempo changes little from step to step; note values repeat or change by
    simple ratios, and simple values are more likely. The Viterbi algorithm finds the most likely
    path. Values are relative: a half at double tempo is a quarter. The constants were chosen by
    their agreement with score-informed tempo on PercePiano, without using ratings.
    """
    levels = _LEVEL * np.arange(-_FARTHEST, _FARTHEST + 1)
    period = np.median(np.log(steps)) + levels  # log of seconds per unit

    def fit_of(step: float) -> np.ndarray:
        """Log-likelihood of a step with every note value at every tempo, (values, levels)."""
        deviation = np.sqrt(_LOOSE**2 + 2 * (_JITTER / step) ** 2)
        away = (np.log(step) - period - NOTE_VALUES[:, None]) / deviation
        return -np.minimum(away**2, _OUTLIER) / 2 - np.log(deviation)

    # Costs of tempo changes by -_JUMP to _JUMP levels
    between = np.clip((steps[1:] + steps[:-1]) / 2 / 0.25, 0.3, 4)
    wander = _WANDER * np.sqrt(between)[:, None]
    jumps = np.abs(np.arange(-_JUMP, _JUMP + 1)) * _LEVEL / wander + np.log(2 * wander)

    # Best path to every state
    best = [fit_of(steps[0]) - _PRIOR * _RARE[:, None] - _NEAR * levels**2]
    for step, jump in zip(steps[1:], jumps, strict=True):
        valued = (best[-1][:, None] - _CHANGE[:, :, None]).max(axis=0)
        padded = np.pad(valued, ((0, 0), (_JUMP, _JUMP)), constant_values=-np.inf)
        shifted = np.lib.stride_tricks.sliding_window_view(padded, len(levels), axis=1)
        best.append((shifted - jump[:, None]).max(axis=1) + fit_of(step))

    # Backwards: the previous state on the best path to a note value and tempo level
    path = [np.unravel_index(best[-1].argmax(), best[-1].shape)]
    for reached, jump in zip(best[-2::-1], jumps[::-1], strict=True):
        value, level = path[-1]
        first = max(level - _JUMP, 0)
        near = reached[:, first : level + _JUMP + 1]
        ways = near - _CHANGE[:, value, None] - jump[first - level + _JUMP :][: near.shape[1]]
        previous, distance = np.unravel_index(ways.argmax(), ways.shape)
        path.append((previous, first + distance))
    values, chosen = np.array(path[::-1]).T
    return TempoEstimate(-period[chosen], values, float(best[-1].max()))
