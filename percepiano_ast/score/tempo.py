"""Timing relative to the score: tempo, timing deviations, asynchrony of chords.

The tempo curve and its smooth part follow Desain and Honing (1993), "Tempo curves considered
harmful": note timing is measured relative to the smooth tempo. Final slowing: Friberg and Sundberg
(1999), JASA 105(3). Melody lead: Goebl (2001), JASA 110(1). Long-short contrast: Gabrielsson
(1987).
"""

import numpy as np

from percepiano_ast.descriptors.view import Descriptor
from percepiano_ast.score.view import View, arch, correlation, mean, pattern, quantile, slope, std

_FINAL = 0.2  # share of a clip that counts as its beginning or end
# seconds: spread of an audibly asynchronous chord, and of an arpeggio
_SPREAD, _ARPEGGIO = 0.03, 0.08
_RUN = 0.5  # quarters: maximum note value of a run
_GRACE = 0.15  # quarters: shorter intervals are ornaments, whose notated length is a convention

TABLE = {
    "tempo_mean": Descriptor("log 1/s", "log of quarters per second over the whole clip"),
    "tempo_of_notated": Descriptor(
        "log", "tempo relative to the notated one; 0 without a notated tempo"
    ),
    "tempo_std": Descriptor("log", "standard deviation of local tempo"),
    "tempo_low": Descriptor("log", "0.1 quantile of local tempo relative to the median"),
    "tempo_high": Descriptor("log", "0.9 quantile of local tempo relative to the median"),
    "tempo_drift": Descriptor("log", "change of tempo from beginning to end, linear fit"),
    "tempo_arch": Descriptor("log", "tempo in the middle relative to the ends, quadratic fit"),
    "tempo_first": Descriptor("log", "tempo of the first fifth relative to the rest"),
    "tempo_final": Descriptor("log", "tempo of the last fifth relative to the rest"),
    "tempo_last_step": Descriptor("log", "tempo of the last step relative to the median"),
    "tempo_changes": Descriptor("log", "mean absolute change of tempo from step to step"),
    "tempo_changes_q90": Descriptor(
        "log", "0.9 quantile of the absolute change of tempo from step to step"
    ),
    "tempo_memory": Descriptor("", "correlation of the tempo of successive steps"),
    "smooth_std": Descriptor("log", "standard deviation of the tempo smoothed over phrases"),
    "smooth_range": Descriptor("log", "range of the tempo smoothed over phrases"),
    "irregular_std": Descriptor("log", "standard deviation of local minus smooth tempo"),
    "irregular_q90": Descriptor(
        "log", "0.9 quantile of the absolute difference of local and smooth tempo"
    ),
    "irregular_fine": Descriptor(
        "log", "standard deviation of local tempo minus tempo smoothed over 1.5 quarters"
    ),
    "beat_std": Descriptor("log", "standard deviation of the tempo of beats"),
    "beat_changes": Descriptor("log", "mean absolute change of tempo from beat to beat"),
    "beat_worst": Descriptor("log", "largest change of tempo from beat to beat"),
    "bar_std": Descriptor("log", "standard deviation of the tempo of bars"),
    "bar_changes": Descriptor("log", "mean absolute change of tempo from bar to bar"),
    "bar_pattern": Descriptor(
        "", "share of the variance of beat tempo explained by the position in the bar"
    ),
    "first_beat": Descriptor("log", "tempo of first beats relative to other beats"),
    "last_beat": Descriptor("log", "tempo of last beats relative to other beats"),
    "deviation_std": Descriptor("s", "standard deviation of onsets from the smooth tempo's onsets"),
    "deviation_q90": Descriptor(
        "s", "0.9 quantile of the absolute deviation from the smooth tempo's onsets"
    ),
    "deviation_quarters": Descriptor("quarters", "the standard deviation in quarters"),
    "deviation_beats": Descriptor(
        "s", "standard deviation of onsets between beats from interpolated beats"
    ),
    "offbeat_late": Descriptor(
        "quarters", "mean delay of onsets between beats relative to interpolated beats"
    ),
    "run_uneven": Descriptor(
        "log", "standard deviation of the log ratio of successive intervals in runs of equal notes"
    ),
    "contrast": Descriptor(
        "log", "mean exaggeration of the long-short ratio of successive unequal notes"
    ),
    "contrast_std": Descriptor("log", "standard deviation of this exaggeration"),
    "async_std": Descriptor("s", "standard deviation of onsets from their chord's mean"),
    "async_spread": Descriptor("s", "mean time from first to last note of a chord"),
    "async_q90": Descriptor("s", "0.9 quantile of the time from first to last note of a chord"),
    "async_share": Descriptor("", "share of chords spread by more than 30 ms"),
    "async_varies": Descriptor("s", "standard deviation of the spread over chords"),
    "arpeggio_share": Descriptor(
        "", "share of chords spread by more than 80 ms with the bass first"
    ),
    "melody_lead": Descriptor("s", "mean lead of the melody over the rest of its chord"),
    "melody_lead_std": Descriptor("s", "standard deviation of the melody lead"),
    "melody_lead_share": Descriptor("", "share of chords with a melody lead of more than 10 ms"),
    "bass_lead": Descriptor("s", "mean lead of the bass over the rest of its chord"),
    "hands_apart": Descriptor("s", "mean lead of the upper over the lower staff"),
    "hands_apart_std": Descriptor("s", "standard deviation of the lead of the upper staff"),
}


def measure(view: View) -> dict[str, float]:
    """The features of ``TABLE``; NaN for features without an instance in this clip."""
    return (
        _tempo(view)
        | _smooth(view)
        | _beats(view)
        | _deviations(view)
        | _rhythm(view)
        | _chords(view)
    )


def _tempo(view: View) -> dict[str, float]:
    pace, middle = view.pace, view.middle
    place = (middle - middle[0]) / max(middle[-1] - middle[0], 1e-9)
    first, final, median = place <= _FINAL, place >= 1 - _FINAL, float(np.median(pace))
    whole = float(
        np.log((view.steps[-1, 1] - view.steps[0, 1]) / (view.steps[-1, 0] - view.steps[0, 0]))
    )
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
    """Onsets selected by ``of``: indices, and log tempo from each to the next (NaN for intervals of
    0.1 s or less)."""
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
    """Deviation of onsets from the integral of the smooth tempo, and of onsets between beats from
    interpolated beats."""
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
    """Successive inter-onset intervals: equal ones in runs, and unequal ones."""
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
        "arpeggio_share": mean(
            ((width > _ARPEGGIO) & (bass > 0))[np.isfinite(width)].astype(float)
        ),
        "melody_lead": mean(melody),
        "melody_lead_std": std(melody),
        "melody_lead_share": mean((melody[known] > 0.01).astype(float)),
        "bass_lead": mean(bass),
        "hands_apart": mean(hands),
        "hands_apart_std": std(hands),
    }
