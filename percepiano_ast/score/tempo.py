"""When the notes are played against when they are written: tempo, timing of notes, chords that are not together.

Tempo curve and its smooth part after Desain and Honing (1993), "Tempo curves considered harmful": what notes do around the
smooth tempo is told apart from it. Final slowing: Friberg and Sundberg (1999), JASA 105(3). Melody lead: Goebl (2001), JASA
110(1). Long-short contrast: Gabrielsson (1987).
"""

import numpy as np

from percepiano_ast.descriptors.view import Descriptor
from percepiano_ast.score.view import View, arch, correlation, mean, pattern, quantile, slope, std

_FINAL = 0.2  # share of a clip that may slow down at the end
_SPREAD, _ARPEGGIO = 0.03, 0.08  # seconds: heard as not together; played as an arpeggio
_RUN = 0.5  # quarters: notes that are at most this long are a run
_GRACE = 0.15  # quarters: shorter times are ornaments, whose written length is a convention

TABLE = {
    "tempo_mean": Descriptor("log 1/s", "logarithm of quarters per second, whole clip"),
    "tempo_of_notated": Descriptor("log", "tempo over the notated one; 0 where none is notated"),
    "tempo_std": Descriptor("log", "deviation of local tempo"),
    "tempo_low": Descriptor("log", "tempo that a tenth of the steps stay below, under the median"),
    "tempo_high": Descriptor("log", "tempo that a tenth of the steps exceed, over the median"),
    "tempo_drift": Descriptor("log", "change of tempo from beginning to end, by a straight line"),
    "tempo_arch": Descriptor("log", "how much faster the middle is than the ends, by a parabola"),
    "tempo_first": Descriptor("log", "tempo of the first fifth over the rest"),
    "tempo_final": Descriptor("log", "tempo of the last fifth over the rest"),
    "tempo_last_step": Descriptor("log", "the last step's tempo over the median"),
    "tempo_changes": Descriptor("log", "mean change of tempo from step to step"),
    "tempo_changes_q90": Descriptor("log", "change of tempo that a tenth of the steps exceed"),
    "tempo_memory": Descriptor("", "correlation of successive steps' tempo"),
    "smooth_std": Descriptor("log", "deviation of the tempo smoothed over phrases"),
    "smooth_range": Descriptor("log", "range of the tempo smoothed over phrases"),
    "irregular_std": Descriptor("log", "deviation of local from smooth tempo"),
    "irregular_q90": Descriptor("log", "distance of local from smooth tempo that a tenth exceed"),
    "irregular_fine": Descriptor("log", "the same deviation from a tempo smoothed over a quarter and a half"),
    "beat_std": Descriptor("log", "deviation of the tempo of beats"),
    "beat_changes": Descriptor("log", "mean change of tempo from beat to beat"),
    "beat_worst": Descriptor("log", "greatest change of tempo from beat to beat"),
    "bar_std": Descriptor("log", "deviation of the tempo of bars"),
    "bar_changes": Descriptor("log", "mean change of tempo from bar to bar"),
    "bar_pattern": Descriptor("", "share of the variance of beats' tempo that their place in the bar explains"),
    "first_beat": Descriptor("log", "tempo of first beats over the other beats"),
    "last_beat": Descriptor("log", "tempo of last beats over the other beats"),
    "deviation_std": Descriptor("s", "deviation of moments from where the smooth tempo puts them"),
    "deviation_q90": Descriptor("s", "distance from there that a tenth of the moments exceed"),
    "deviation_quarters": Descriptor("quarters", "deviation from there in quarters"),
    "deviation_beats": Descriptor("s", "deviation of moments between beats from the line between the beats"),
    "offbeat_late": Descriptor("quarters", "how late moments between beats are on that line"),
    "run_uneven": Descriptor("log", "deviation of successive times in runs of equal notes"),
    "contrast": Descriptor("log", "how much long to short is exaggerated in successive unequal notes"),
    "contrast_std": Descriptor("log", "deviation of that"),
    "async_std": Descriptor("s", "deviation of notes from the mean of their chord"),
    "async_spread": Descriptor("s", "mean time from first to last note of a chord"),
    "async_q90": Descriptor("s", "time that a tenth of the chords exceed"),
    "async_share": Descriptor("", "share of chords spread by more than 30 ms"),
    "async_varies": Descriptor("s", "deviation of that spread over chords"),
    "arpeggio_share": Descriptor("", "share of chords spread by more than 80 ms, the bass first"),
    "melody_lead": Descriptor("s", "how much earlier the melody is than the rest of its chord"),
    "melody_lead_std": Descriptor("s", "deviation of that"),
    "melody_lead_share": Descriptor("", "share of chords in which it is more than 10 ms early"),
    "bass_lead": Descriptor("s", "how much earlier the bass is than the rest of its chord"),
    "hands_apart": Descriptor("s", "how much earlier the upper staff is than the lower"),
    "hands_apart_std": Descriptor("s", "deviation of that"),
}


def measure(view: View) -> dict[str, float]:
    """The features of ``TABLE``; NaN for what this clip has no instance of."""
    return _tempo(view) | _smooth(view) | _beats(view) | _deviations(view) | _rhythm(view) | _chords(view)


def _tempo(view: View) -> dict[str, float]:
    pace, middle = view.pace, view.middle
    place = (middle - middle[0]) / max(middle[-1] - middle[0], 1e-9)
    first, final, median = place <= _FINAL, place >= 1 - _FINAL, float(np.median(pace))
    whole = float(np.log((view.steps[-1, 1] - view.steps[0, 1]) / (view.steps[-1, 0] - view.steps[0, 0])))
    notated = view.score.tempo
    return {
        "tempo_mean": whole,
        "tempo_of_notated": whole - np.log(notated / 60) if notated else np.nan,
        "tempo_std": std(pace),
        "tempo_low": quantile(pace, 0.1) - median,
        "tempo_high": quantile(pace, 0.9) - median,
        "tempo_drift": slope(middle, pace),
        "tempo_arch": arch(middle, pace),
        "tempo_first": mean(pace[first]) - mean(pace[~first]),
        "tempo_final": mean(pace[final]) - mean(pace[~final]),
        "tempo_last_step": float(pace[-1]) - median,
        "tempo_changes": mean(np.abs(np.diff(pace))),
        "tempo_changes_q90": quantile(np.abs(np.diff(pace)), 0.9),
        "tempo_memory": correlation(pace[1:], pace[:-1]),
    }


def _smooth(view: View) -> dict[str, float]:
    smooth = view.smooth(view.middle)
    away = view.pace - smooth
    return {
        "smooth_std": std(smooth),
        "smooth_range": float(np.ptp(smooth)),
        "irregular_std": std(away),
        "irregular_q90": quantile(np.abs(away), 0.9),
        "irregular_fine": std(view.pace - view.smooth(view.middle, 1.5)),
    }


def _grid(view: View, of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Moments in ``of`` that are among the steps of tempo or as far apart: indices, and log tempo from each to the next."""
    chosen = np.flatnonzero(of)
    if len(chosen) < 3:
        return chosen[:0], np.zeros(0)
    seconds, quarters = np.diff(view.seconds[chosen]), np.diff(view.quarters[chosen])
    pace = np.full(len(seconds), np.nan)
    pace[seconds > 0.1] = np.log(quarters[seconds > 0.1] / seconds[seconds > 0.1])
    return chosen[:-1], pace


def _beats(view: View) -> dict[str, float]:
    at, beat = _grid(view, view.on_beat)
    _, bar = _grid(view, view.downbeat)
    bars, places = view.beats[0][at], np.round(view.beats[1][at])
    last = np.r_[np.diff(bars) > 0, True] if len(at) else np.zeros(0, bool)
    first, changes = places == 0, np.abs(np.diff(beat))
    return {
        "beat_std": std(beat),
        "beat_changes": mean(changes),
        "beat_worst": quantile(changes, 1.0),
        "bar_std": std(bar),
        "bar_changes": mean(np.abs(np.diff(bar))),
        "bar_pattern": pattern(bars, beat, places),
        "first_beat": mean(beat[first]) - mean(beat[~first]),
        "last_beat": mean(beat[last & ~first]) - mean(beat[~last]),
    }


def _deviations(view: View) -> dict[str, float]:
    """Moments against the running sum of the smooth tempo, and those between beats against the line between the beats."""
    grid = view.quarters
    middles = (grid[1:] + grid[:-1]) / 2
    expected = np.concatenate([[0], np.cumsum(np.diff(grid) * np.exp(-view.smooth(middles)))])
    away = view.seconds - view.seconds[0] - expected
    away -= np.median(away)
    between = ~view.on_beat
    beats = np.flatnonzero(view.on_beat)
    line = np.full(len(grid), np.nan)
    if len(beats) > 1:
        inside = between & (grid > grid[beats[0]]) & (grid < grid[beats[-1]])
        line[inside] = np.interp(grid[inside], grid[beats], view.seconds[beats])
    off = view.seconds - line
    return {
        "deviation_std": std(away),
        "deviation_q90": quantile(np.abs(away), 0.9),
        "deviation_quarters": std(away * np.exp(view.smooth(grid))),
        "deviation_beats": std(off),
        "offbeat_late": mean(off * np.exp(view.smooth(grid))),
    }


def _rhythm(view: View) -> dict[str, float]:
    """Successive times between moments: of equal length in runs, and of unequal."""
    written, played = np.diff(view.quarters), np.diff(view.seconds)
    ok = (played[1:] > 0.02) & (played[:-1] > 0.02)
    asked = np.log(written[1:] / written[:-1])[ok]
    ratio = np.log(played[1:][ok] / played[:-1][ok])
    equal = (np.abs(asked) < 0.01) & (written[1:][ok] <= _RUN)
    unequal = (np.abs(asked) > 0.5) & (np.minimum(written[1:], written[:-1])[ok] > _GRACE)
    contrast = (ratio - asked)[unequal] * np.sign(asked[unequal])
    return {
        "run_uneven": std(ratio[equal]),
        "contrast": mean(contrast),
        "contrast_std": std(contrast),
    }


def _chords(view: View) -> dict[str, float]:
    late, together = view.late, view.together
    first, last = (np.full(len(view.quarters), value) for value in (np.inf, -np.inf))
    np.minimum.at(first, view.moment, view.onset)
    np.maximum.at(last, view.moment, view.onset)
    width = np.where(view.size > 1, last - first, np.nan)
    chord = width[np.isfinite(width)]

    def lead(voice: np.ndarray) -> np.ndarray:
        return view.of_moments(late, together & ~voice) - view.of_moments(late, together & voice)

    melody, bass = lead(view.top), lead(view.bottom)
    hands = view.of_moments(late, view.staff > 1) - view.of_moments(late, view.staff == 1)
    known = np.isfinite(melody)
    return {
        "async_std": np.sqrt(mean(late[together] ** 2)),
        "async_spread": mean(chord),
        "async_q90": quantile(chord, 0.9),
        "async_share": mean((chord > _SPREAD).astype(float)),
        "async_varies": std(chord),
        "arpeggio_share": mean(((width > _ARPEGGIO) & (bass > 0))[np.isfinite(width)].astype(float)),
        "melody_lead": mean(melody),
        "melody_lead_std": std(melody),
        "melody_lead_share": mean((melody[known] > 0.01).astype(float)),
        "bass_lead": mean(bass),
        "hands_apart": mean(hands),
        "hands_apart_std": std(hands),
    }
