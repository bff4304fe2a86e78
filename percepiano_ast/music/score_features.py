"""Score-informed features: deviations of the performance from the score, and properties of the
score; names, units and meanings are in ``features.csv``.

Timing is measured relative to the smooth tempo after Desain and Honing (1993), "Tempo curves
considered harmful". Final slowing: Friberg and Sundberg (1999), JASA 105(3). Melody lead: Goebl
(2001), JASA 110(1). Long-short contrast: Gabrielsson (1987). Articulation as played relative to
notated duration: Bresin and Battel (2000), J. New Music Research 29(3). Accents by metre and
melody: Sloboda (1983), QJEP 35A; Palmer (1997), Annual Review of Psychology 48.
"""

import functools
from collections.abc import Mapping

import numpy as np
import pandas as pd

from percepiano_ast.audio.features import key_fit
from percepiano_ast.errors import InputError
from percepiano_ast.music.align import align, check_share, spaced
from percepiano_ast.music.midi import Performance
from percepiano_ast.music.performance_features import (
    correlation,
    entropy,
    mean,
    over_rest,
    pedalling,
    quantile,
    read_features,
    smoothed,
    statistics,
    std,
)
from percepiano_ast.music.score import Score

FEWEST_STEPS = 4  # minimum number of matched score onsets, spaced widely enough for a tempo
_LOCAL, _FINE = 4.0, 1.5  # quarters; standard deviations of the Gaussian kernels for smooth tempo
_STEP = 0.2  # quarters; minimum distance of onsets used for tempo: closer ones are ornaments
_SLACK = 0.05  # quarters: notes that end this shortly after an onset do not count as sounding
_SHORTEST = 0.02  # seconds; lower limit before taking logarithms
_LEAST_LENGTH = 1 / 16  # quarters; the same for notated durations
_ON_BEAT = 0.02  # beats: maximum distance of an onset on a beat
_END = 0.2  # share of a clip that counts as its beginning or end
# seconds: spread of an audibly asynchronous chord, and of an arpeggio
_SPREAD, _ARPEGGIO = 0.03, 0.08
_RUN = 0.5  # quarters: maximum note value of a run
_GRACE = 0.15  # quarters: shorter intervals are ornaments, whose notated length is a convention
_SHORT, _LONG = 0.5, 1.0  # quarters: maximum length of a short note, minimum length of a long note
_MIDDLE_C = 60
_NEAR = 0.25  # quarters: maximum distance of a pedal change from its beat or harmony
# seconds: a chord struck this shortly before a pedal change belongs to the next pedalling
_CATCH = 0.1
_SLIP = 0.1  # seconds: a shorter extra note counts as brushed
_CLOSE = 0.3  # seconds: maximum distance in time of an extra note from a neighbouring key
# quarters: sixteenths and shorter; quarters (written to nine tenths in MIDI) and longer
_SIXTEENTH, _QUARTER = 0.3, 0.9
# pitch classes of C major; a minor key uses those of its relative major
_SCALE = np.array([0, 2, 4, 5, 7, 9, 11])

SCORE_FEATURES = read_features("score")
_correlation = functools.partial(correlation, least=4)


def _fit(x: np.ndarray, y: np.ndarray, degree: int) -> float:
    """Highest coefficient of a polynomial fit of ``y`` over ``x`` scaled to -1 to 1; NaN for fewer
    than ``degree`` + 2 points or constant ``x``."""
    both = np.isfinite(x) & np.isfinite(y)
    if both.sum() < degree + 2 or np.ptp(x[both]) < 1e-9:
        return np.nan
    scaled = 2 * (x[both] - x[both].min()) / np.ptp(x[both]) - 1
    return float(np.polyfit(scaled, y[both], degree)[0])


def _bar_pattern(bars: np.ndarray, values: np.ndarray, beats: np.ndarray) -> float:
    """Share of the variance of ``values`` explained by the position in at least two bars."""
    ok = np.isfinite(values)
    if len(np.unique(bars[ok])) < 2 or np.ptp(values[ok]) < 1e-9:
        return np.nan
    numbers = np.unique(np.round(beats[ok], 2), return_inverse=True)[1]
    means = np.bincount(numbers, values[ok]) / np.bincount(numbers)
    return float(means[numbers].var() / values[ok].var())


def score_features(performance: Performance, score: Score) -> dict[str, float]:
    """All features of a performance of a score, in the order and units of ``SCORE_FEATURES``.

    They are differences, correlations, shares and log ratios, so 0 is the neutral value. A feature
    without an instance (melody lead without chords) is 0, and ``undefined`` counts these.

    Args:
        performance: from a MIDI file or a transcription; an offset in time has no effect.

    Raises:
        InputError: less than `align.LEAST_MATCHED` of its notes are in the score, or it is too
            short for a tempo.
    """
    found = align(performance, score)
    check_share(found.share)

    # --- Matched notes in score order, without grace notes, which have no duration ---
    is_plain = ~score.notes["grace"]
    plain = score.notes[is_plain]
    order = np.argsort(found.written, kind="stable")
    order = order[is_plain[found.written[order]]]
    played, written = performance.notes[found.played[order]], score.notes[found.written[order]]
    at, length, staff = written["onset"], written["duration"], written["staff"].astype(int)
    onset = played["onset"]
    down = np.maximum(played["offset"] - onset, _SHORTEST)  # seconds
    pitch, velocity = played["pitch"].astype(float), played["velocity"].astype(float)
    notated = written["velocity"].astype(float)

    # --- Matched onsets of the score: as notated and as played (mean of the notes) ---
    quarters, moment = np.unique(at, return_inverse=True)

    def of_moments(values: np.ndarray, which: np.ndarray | bool = True) -> np.ndarray:
        """Mean at each onset over the notes selected by ``which``; NaN without notes."""
        which = np.broadcast_to(which, moment.shape)
        count = np.bincount(moment, which, len(quarters))
        return np.bincount(moment, values * which, len(quarters)) / np.where(count, count, np.nan)

    def over_chord(values: np.ndarray, voice: np.ndarray) -> np.ndarray:
        """Mean of the notes of each chord in ``voice``, minus that of the others."""
        return of_moments(values, together & voice) - of_moments(values, together & ~voice)

    seconds, size = of_moments(onset), np.bincount(moment)
    together = size[moment] > 1
    bars, beats = score.position(quarters)
    downbeat, on_beat = beats < _ON_BEAT, np.abs(beats - np.round(beats)) < _ON_BEAT
    # highest and lowest notes in the score at each onset: melody and bass
    index = np.cumsum(is_plain)[found.written[order]] - 1
    starts = np.flatnonzero(np.r_[True, np.diff(plain["onset"]) > 0])
    group = np.searchsorted(starts, index, side="right") - 1
    top = pitch == np.maximum.reduceat(plain["pitch"], starts)[group]
    bottom = pitch == np.minimum.reduceat(plain["pitch"], starts)[group]
    # lowest pitch in the score that sounds at each onset
    bass = np.full(len(quarters), np.inf)
    for key in np.unique(plain["pitch"])[::-1]:
        notes = plain[plain["pitch"] == key]
        latest = np.maximum.accumulate(np.append(-np.inf, notes["onset"] + notes["duration"]))
        before = np.searchsorted(notes["onset"], quarters, side="right")
        begins = np.append(-np.inf, notes["onset"])[before] == quarters
        bass[(latest[before] > quarters + _SLACK) | begins] = key

    # --- Local tempo: log of quarters per second between onsets ---
    latest = np.maximum.accumulate(seconds)
    rising = np.r_[True, seconds[1:] > latest[:-1]]
    steps = spaced(np.stack([seconds[rising], quarters[rising]], axis=1), _STEP)
    if len(steps) < FEWEST_STEPS:
        raise InputError(
            f"{len(steps)} onsets of the score match the performance, {FEWEST_STEPS} are needed."
            " Give a longer clip."
        )
    step_seconds, step_quarters = np.diff(steps, axis=0).T
    pace, middle = np.log(step_quarters / step_seconds), (steps[1:, 1] + steps[:-1, 1]) / 2

    def smooth(where: np.ndarray, width: float = _LOCAL) -> np.ndarray:
        """Log tempo at ``where`` quarters: mean under a Gaussian kernel, weighted by duration."""
        # far from all steps, use the overall mean
        return smoothed(where, middle, pace, width, step_quarters, least=1e-12)

    relative = (middle - middle[0]) / max(middle[-1] - middle[0], 1e-9)
    median = float(np.median(pace))
    whole = float(np.log((steps[-1, 1] - steps[0, 1]) / (steps[-1, 0] - steps[0, 0])))
    changes = np.abs(np.diff(pace))
    local = smooth(middle)
    values = {
        "tempo_mean": whole,
        "tempo_of_notated": whole - np.log(score.tempo / 60) if score.tempo else np.nan,
        "tempo_std": std(pace),
        "tempo_low": quantile(pace, 0.1) - median,
        "tempo_high": quantile(pace, 0.9) - median,
        "tempo_drift": 2 * _fit(middle, pace, 1),
        "tempo_arch": -_fit(middle, pace, 2),
        "tempo_first": over_rest(pace, relative <= _END),
        "tempo_final": over_rest(pace, relative >= 1 - _END),
        "tempo_last_step": float(pace[-1]) - median,
        **statistics("tempo_changes tempo_changes_q90", changes),
        "tempo_memory": _correlation(pace[1:], pace[:-1]),
        "smooth_std": std(local),
        "smooth_range": np.ptp(local),
        "irregular_std": std(pace - local),
        "irregular_q90": quantile(np.abs(pace - local), 0.9),
        "irregular_fine": std(pace - smooth(middle, _FINE)),
    }

    # --- Tempo of beats and bars ---
    def grid(of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the onsets selected by ``of``, and log tempo from each to the next (NaN for
        intervals of 0.1 s or less)."""
        chosen = np.flatnonzero(of)
        if len(chosen) < 3:
            return chosen[:0], np.zeros(0)
        between, lengths = np.diff(seconds[chosen]), np.diff(quarters[chosen])
        tempo = np.full(len(between), np.nan)
        tempo[between > 0.1] = np.log(lengths[between > 0.1] / between[between > 0.1])
        return chosen[:-1], tempo

    (which, beat), (_, bar) = grid(on_beat), grid(downbeat)
    its_bar, position = bars[which], np.round(beats[which])
    first = position == 0
    last = np.r_[np.diff(its_bar) > 0, True] if len(which) else np.zeros(0, bool)
    changes = np.abs(np.diff(beat))
    values |= {
        "beat_std": std(beat),
        "beat_changes": mean(changes),
        "beat_worst": quantile(changes, 1.0),
        "bar_std": std(bar),
        "bar_changes": mean(np.abs(np.diff(bar))),
        "bar_pattern": _bar_pattern(its_bar, beat, position),
        "first_beat": over_rest(beat, first),
        "last_beat": mean(beat[last & ~first]) - mean(beat[~last]),
    }

    # --- Deviations from the integral of the smooth tempo, and from interpolated beats ---
    expected = np.diff(quarters) * np.exp(-smooth((quarters[1:] + quarters[:-1]) / 2))
    away = seconds - seconds[0] - np.concatenate([[0], np.cumsum(expected)])
    away -= np.median(away)
    line = np.full(len(quarters), np.nan)
    if on_beat.any():
        beat_quarters, beat_seconds, between = quarters[on_beat], seconds[on_beat], ~on_beat
        line[between] = np.interp(quarters[between], beat_quarters, beat_seconds, np.nan, np.nan)
    local = smooth(quarters)
    values |= {
        "deviation_std": std(away),
        "deviation_q90": quantile(np.abs(away), 0.9),
        "deviation_quarters": std(away * np.exp(local)),
        "deviation_beats": std(seconds - line),
        "offbeat_late": mean((seconds - line) * np.exp(local)),
    }

    # --- Successive inter-onset intervals: equal ones in runs, and unequal ones ---
    asked, taken = np.diff(quarters), np.diff(seconds)
    ok = (taken[1:] > 0.02) & (taken[:-1] > 0.02)
    asked_ratio = np.log(asked[1:] / asked[:-1])[ok]
    ratio = np.log(taken[1:][ok] / taken[:-1][ok])
    equal = (np.abs(asked_ratio) < 0.01) & (asked[1:][ok] <= _RUN)
    unequal = (np.abs(asked_ratio) > 0.5) & (np.minimum(asked[1:], asked[:-1])[ok] > _GRACE)
    contrast = (ratio - asked_ratio)[unequal] * np.sign(asked_ratio[unequal])
    values |= {"run_uneven": std(ratio[equal]), **statistics("contrast contrast_std", contrast)}

    # --- Asynchrony of chords ---
    late = onset - seconds[moment]
    earliest, latest = (np.full(len(quarters), value) for value in (np.inf, -np.inf))
    np.minimum.at(earliest, moment, onset)
    np.maximum.at(latest, moment, onset)
    is_chord = size > 1
    width = (latest - earliest)[is_chord]
    melody_lead, bass_lead = over_chord(late, ~top), over_chord(late, ~bottom)
    hands = of_moments(late, staff > 1) - of_moments(late, staff == 1)
    values |= {
        "async_std": np.sqrt(mean(late[together] ** 2)),
        **statistics("async_spread async_q90", width),
        "async_share": mean(width > _SPREAD),
        "async_varies": std(width),
        "arpeggio_share": mean((width > _ARPEGGIO) & (bass_lead[is_chord] > 0)),
        **statistics("melody_lead melody_lead_std", melody_lead),
        "melody_lead_share": mean(melody_lead[np.isfinite(melody_lead)] > 0.01),
        "bass_lead": mean(bass_lead),
        **statistics("hands_apart hands_apart_std", hands),
    }

    # --- Articulation: key-down time relative to the notated duration at the smooth tempo ---
    log_length = np.log(np.maximum(length, _LEAST_LENGTH))
    held = np.log(down) - log_length + smooth(at)
    end = quarters[-1] - _END * np.ptp(quarters)
    melody_held = held[top][np.argsort(at[top], kind="stable")]
    # overlap of melody notes whose notated end reaches the next melody note
    starts_at, begins, lasts = at[top], onset[top], (onset + down)[top]
    between = np.diff(begins)
    reaching = (at + length)[top][:-1] >= starts_at[1:] - 0.26
    reaching &= (between > 0.05) & (np.diff(starts_at) > 0)
    overlap = np.clip((lasts[:-1] - begins[1:])[reaching] / between[reaching], -1, 1)
    values |= {
        **statistics("held held_std held_q10 held_q50 held_q90", held),
        "held_melody": over_rest(held, top),
        "held_bass": over_rest(held, bottom),
        "held_low": over_rest(held, pitch < _MIDDLE_C),
        "held_short": mean(held[length <= _SHORT + 0.02]),
        "held_long": mean(held[length >= _LONG - 0.1]),
        "held_of_length": _correlation(held, log_length),
        "held_of_pitch": _correlation(held, pitch),
        "held_final": over_rest(held, at >= end),
        "held_changes": mean(np.abs(np.diff(melody_held))),
        "detached_share": mean(held < np.log(0.5)),
        "overheld_share": mean(held > np.log(1.1)),
        **statistics("melody_overlap melody_overlap_std", overlap),
    }

    # --- Dynamics: accents by metre and voice, and the course over the clip ---
    force, melody = of_moments(velocity), over_chord(velocity, top)
    hands = of_moments(velocity, staff == 1) - of_moments(velocity, staff > 1)
    bar_number = np.unique(bars, return_inverse=True)[1]
    bar_force = np.bincount(bar_number, force) / np.bincount(bar_number)
    values |= {
        "force_downbeat": over_rest(force, downbeat),
        "force_beat": over_rest(force, on_beat),
        "force_bar_pattern": _bar_pattern(bars, force, beats),
        **statistics("force_melody force_melody_std", melody),
        "force_bass": mean(over_chord(velocity, bottom)),
        "force_hands": mean(hands),
        "force_melody_varies": std(velocity[top]),
        "force_rest_varies": std(velocity[~top]),
        "force_of_pitch": _correlation(velocity, pitch),
        "force_of_melody": _correlation(velocity[top], pitch[top]),
        "force_of_length": _correlation(velocity, log_length),
        "force_of_notated": _correlation(velocity, notated),
        "force_notated_range": 2 * _fit(notated, velocity, 1),
        "force_trend": 2 * _fit(quarters, force, 1),
        "force_arch": -_fit(quarters, force, 2),
        "force_final": over_rest(force, quarters >= end),
        "force_bars": std(bar_force),
        "force_bar_changes": mean(np.abs(np.diff(bar_force))),
        "force_within_bars": std(force - bar_force[bar_number]),
        "force_of_tempo": _correlation(force, smooth(quarters)),
        "force_of_held": _correlation(velocity, held),
    }

    # --- Extra and missing notes ---
    extra, missing = performance.notes[found.extra], score.notes[found.missing]
    by_time = np.argsort(onset, kind="stable")
    near = np.searchsorted(onset[by_time], extra["onset"][:, None] + (-_CLOSE, _CLOSE))
    beside = sum(
        bool((np.abs(pitch[by_time[first:last]] - float(key)) <= 2).any())
        for (first, last), key in zip(near, extra["pitch"], strict=True)
    )
    # sorted by pitch within an onset: the lowest notes
    lowest = np.flatnonzero(np.r_[True, np.diff(score.notes["onset"]) > 0])
    brushed = np.sum(extra["offset"] - extra["onset"] < _SLIP)
    values |= {
        "extra_share": len(extra) / len(performance.notes),
        "extra_brushed": brushed / len(performance.notes),
        "extra_beside": beside / len(performance.notes),
        "missing_share": len(missing) / len(score.notes),
        "missing_bass": mean(np.isin(lowest, found.missing)),
        "missing_grace": mean(missing["grace"]),
    }

    # --- Pedal presses relative to the metre and the harmony ---
    ups, downs = pedalling(performance)
    presses = np.interp(downs, steps[:, 0], steps[:, 1], np.nan, np.nan)  # in quarters
    presses = presses[np.isfinite(presses)]
    position = score.position(presses)[1]
    _, per_bar, unit = score.metres[-1]
    near_beat = np.abs(position - np.round(position)) * unit < _NEAR
    before = quarters[np.maximum(np.searchsorted(quarters, presses, side="right") - 1, 0)]
    new = quarters[1:][np.diff(bass) != 0]
    # of each harmony to the nearest press
    ends = np.concatenate([[-np.inf], presses, [np.inf]])
    after = np.searchsorted(presses, new)
    distance = np.minimum(new - ends[after], ends[after + 1] - new)
    harmonies = [
        len(np.unique(bass[(seconds >= press - _CATCH) & (seconds < up - _CATCH)]))
        for up, press in zip(ups, downs, strict=True)
    ]
    after = seconds + 0.1
    sounding = (np.searchsorted(downs, after) > np.searchsorted(ups, after)).astype(float)
    first_bar, last_bar = score.position(steps[[0, -1], 1])[0]
    values |= {
        "pedal_per_beat": len(presses) / max((steps[-1, 1] - steps[0, 1]) / unit, 1.0),
        "pedal_per_bar": len(presses) / max(last_bar - first_bar, 1.0),
        "pedal_on_beats": mean(near_beat),
        "pedal_on_bars": mean(near_beat & (np.round(position) % max(per_bar, 1) == 0)),
        "pedal_late": mean(np.clip(presses - before, 0, 1)),
        "pedal_of_harmony": mean(distance < _NEAR) if len(presses) else np.nan,
        "pedal_harmonies": mean(np.array(harmonies, float)),
        "pedal_downbeats": over_rest(sounding, downbeat),
    }
    values |= _features_of_score(score)
    undefined = [name for name, value in values.items() if not np.isfinite(value)]
    values |= dict.fromkeys(undefined, 0.0) | {"undefined": len(undefined)}
    return {name: float(values[name]) for name in SCORE_FEATURES}


def _features_of_score(score: Score) -> dict[str, float]:
    """Features of the score alone: key, metre, tempo, register, texture and rhythm."""
    notes, pitch = score.notes, score.notes["pitch"].astype(int)
    velocity = notes["velocity"].astype(float)
    clarity, major = key_fit(np.bincount(pitch % 12, weights=notes["duration"], minlength=12))
    sharps = score.keys[0][1] if score.keys else np.nan
    scale = (_SCALE + 7 * score.keys[0][1]) % 12 if score.keys else _SCALE
    chromatic = mean(~np.isin(pitch % 12, scale)) if score.keys else np.nan
    _, beats, unit = score.metres[-1]
    moments = np.unique(notes["onset"])
    quarters = max((notes["onset"] + notes["duration"]).max() - moments[0], 1 / 16)
    between = np.unique(np.round(np.diff(moments) * 24), return_counts=True)[1]
    position = score.position(moments)[1]
    length = np.log2(np.maximum(notes["duration"], _LEAST_LENGTH))
    starts = np.flatnonzero(np.r_[True, np.diff(notes["onset"]) > 0])
    melody, bass = np.maximum.reduceat(pitch, starts), np.minimum.reduceat(pitch, starts)
    intervals = np.diff(melody)
    return {
        "written_sharps": sharps,
        "written_major": major,
        "written_key_clarity": clarity,
        "written_chromatic": chromatic,
        "written_classes": entropy(np.bincount(pitch % 12)),
        "written_beats": beats,
        "written_triple": beats % 3 == 0,
        "written_bar": np.log2(beats * unit),
        "written_tempo": np.log(score.tempo / 60) if score.tempo else np.nan,
        "written_quarters": np.log(quarters),
        **statistics("written_pitch written_pitch_std", pitch),
        "written_melody": mean(melody),
        "written_bass": mean(bass),
        "written_intervals": mean(np.abs(intervals)),
        "written_repeats": mean(intervals == 0),
        "written_rise": melody[-1] - melody[0],
        "written_density": len(notes) / quarters,
        "written_moments": len(starts) / quarters,
        "written_chord": len(notes) / len(starts),
        "written_sounding": notes["duration"].sum() / quarters,
        **statistics("written_length written_length_std", length),
        "written_rhythm": entropy(between) if len(between) else np.nan,
        "written_short": mean(notes["duration"] <= _SIXTEENTH),
        "written_long": mean(notes["duration"] >= _QUARTER),
        "written_offbeat": mean(np.abs(position - np.round(position)) > _ON_BEAT),
        **statistics("written_force written_force_std", velocity),
    }


def score_feature_table(
    performances: Mapping[str, Performance], scores: Mapping[str, Score | None]
) -> tuple[pd.DataFrame, dict[str, str]]:
    """`score_features` of every clip.

    Returns:
        the features, one row per clip, indexed by clip; and the excluded clips -> reason.
    """
    rows, excluded = {}, {}
    for clip, performance in performances.items():
        if (score := scores.get(clip)) is None:
            excluded[clip] = "no score"
            continue
        try:
            rows[clip] = score_features(performance, score)
        except InputError as error:
            excluded[clip] = str(error)
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(SCORE_FEATURES)), excluded
