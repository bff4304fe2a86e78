"""Tables of the sensitivity test: effects of changes to the playing and to the recording on the
ratings.

Three tables:

* ``sensitivity``: mean change of each rating with each variation of the playing, in standard
  deviations of the same model's ratings of the original clips, which makes models of any scale
  comparable; with the sign that musicians expect. The intervals treat this standard deviation as
  exact.
* ``robustness``: change of each rating with each recording condition, ideally none, and the
  correlation with the ratings of the original recordings.
* ``experts``: correlation of people's ratings with the same parameters over real clips. Players
  vary many parameters together, so a correlation may differ from the effect of one parameter; the
  column ``differs`` marks these cases.

Intervals are 95 % jackknife intervals over content groups, see `intervals`.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from percepiano_ast.dimensions import KEYS
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation import intervals, metrics
from percepiano_ast.evaluation.scores import by_group
from percepiano_ast.music.edits import Edit

UNHEARD, UNCLEAR, YES, NO = "unheard", "unclear", "yes", "no"
CLEAR = 0.2  # |r| from which experts' ratings are said to correlate with a parameter

# Expected effect of more of a parameter: 1 towards the second pole of the dimension, -1 towards the
# first. Listed only where musicians would agree for any piece. Sources: force raises loudness,
# brightness and hardness of touch (Askenfelt & Jansson 1991; Goebl et al. 2014); fast and high
# music is brighter in mood, slow and low music darker (Gabrielsson & Lindstroem 2010); the pedal
# connects, blurs and enriches (Repp 1996); tempo variation, dynamic contrast and voiced chords are
# what teachers call expression (Palmer 1997).
EXPECTED: dict[str, dict[str, int]] = {
    "loudness": {
        "articulation_soft_hard": 1,
        "timbre_bright_dark": -1,
        "timbre_soft_loud": 1,
        "dynamics_mellow_raw": 1,
        "mood_low_high_energy": 1,
    },
    "tempo": {
        "articulation_short_long": -1,
        "music_fast_slow": -1,
        "music_flat_spacious": -1,
        "mood_optimistic_dark": -1,
        "mood_low_high_energy": 1,
    },
    "pedal": {
        "articulation_short_long": 1,
        "pedal_dry_wet": 1,
        "pedal_clean_blurred": 1,
        "timbre_shallow_rich": 1,
        "music_flat_spacious": 1,
    },
    "pedal depth": {"pedal_dry_wet": 1, "pedal_clean_blurred": 1},
    "soft pedal": {
        "articulation_soft_hard": -1,
        "timbre_bright_dark": 1,
        "timbre_soft_loud": -1,
        "dynamics_mellow_raw": -1,
    },
    "rubato": {
        "timing_stable_unstable": 1,
        "music_flat_spacious": 1,
        "music_pure_dramatic": 1,
        "mood_honest_imaginative": 1,
    },
    "dynamics": {
        "timbre_even_colorful": 1,
        "dynamics_little_large_range": 1,
        "music_pure_dramatic": 1,
    },
    "accents": {"timbre_even_colorful": 1, "dynamics_little_large_range": 1},
    "voicing": {"timbre_even_colorful": 1, "music_flat_spacious": 1},
    "melody": {"timbre_even_colorful": 1, "music_flat_spacious": 1},
    "articulation": {
        "articulation_short_long": 1,
        "articulation_soft_hard": -1,
        "pedal_dry_wet": 1,
    },
    "asynchrony": {"timing_stable_unstable": 1},
    "transposition": {"timbre_bright_dark": -1, "mood_optimistic_dark": -1},
}


@dataclass(frozen=True, eq=False)
class Comparison:
    """Ratings of the same clips, original and with one change.

    Attributes:
        before, after: (n, 19) in the order of ``KEYS``; NaN in ``after`` if the change does not
            apply to a clip.
        alike: bool (n,), True where the model's input did not change, for example a soft pedal that
            the synthesizer ignores.
    """

    before: np.ndarray
    after: np.ndarray
    alike: np.ndarray

    @property
    def changed(self) -> np.ndarray:
        """Bool (n,), the clips to which the change applies."""
        return np.isfinite(self.after).all(axis=1)


def sensitivity(model: str, groups: np.ndarray, found: dict[Edit, Comparison]) -> pd.DataFrame:
    """One row per variation and dimension, see the module docstring.

    ``clips`` is the number of clips to which the variation applies, ``alike`` the number of these
    whose model input did not change. ``agrees`` is ``yes`` or ``no`` if the interval excludes 0,
    ``unclear`` if it does not, `unheard` if all inputs are unchanged, and empty if no sign is
    expected.

    Args:
        groups: (n,) content group of each clip.

    Raises:
        InputError: a variation that applies to no clip, or constant ratings.
    """
    return pd.concat([_effect(model, groups, *item) for item in found.items()], ignore_index=True)


def _effect(model: str, groups: np.ndarray, variation: Edit, found: Comparison) -> pd.DataFrame:
    kept = _checked(model, variation.label, found)
    change, unit = (found.after - found.before)[kept], found.before[kept].std(axis=0)
    n, total = intervals.leave_one_out(
        by_group(groups[kept], np.stack([np.ones_like(change), change]))
    )
    estimate = intervals.jackknife(total / np.where(n > 0, n, np.nan) / unit)
    sign = np.sign(variation.strength)
    expected = np.array([sign * EXPECTED[variation.parameter.name].get(key, 0) for key in KEYS])
    return pd.DataFrame(
        {
            "model": model,
            "parameter": variation.parameter.name,
            "variation": variation.name,
            "strength": float(variation.strength),
            "label": variation.label,
            "dimension": KEYS,
            "clips": int(kept.sum()),
            "alike": int(found.alike[kept].sum()),
            "change": change.mean(axis=0),
            "change_sd": change.std(axis=0),
            "standardised": estimate.value,
            "low": estimate.low,
            "high": estimate.high,
            "expected": expected.astype(int),
            "agrees": _agreement(expected, estimate, found.alike[kept].all()),
        }
    )


def _agreement(expected: np.ndarray, estimate: intervals.Estimate, unheard: bool) -> np.ndarray:
    if unheard:
        return np.where(expected == 0, "", UNHEARD)
    seen = np.where(estimate.low > 0, 1, np.where(estimate.high < 0, -1, 0))
    answer = np.where(seen == 0, UNCLEAR, np.where(seen == expected, YES, NO))
    return np.where(expected == 0, "", answer)


def robustness(model: str, groups: np.ndarray, found: dict[str, Comparison]) -> pd.DataFrame:
    """One row per condition and dimension: ``change`` (mean), ``absolute`` (mean), ``standardised``
    (absolute in standard deviations of the ratings over clips), and ``pearson`` with the ratings of
    the original clips, ``low`` to ``high``.

    Args:
        groups: (n,) content group of each clip.

    Raises:
        InputError: see ``sensitivity``.
    """
    tables = []
    for label, comparison in found.items():
        kept = _checked(model, label, comparison)
        before, after = comparison.before[kept], comparison.after[kept]
        sums = by_group(
            groups[kept], metrics.features(*metrics.prepared(before, after, "standardised"))
        )
        r = intervals.jackknife(
            metrics.from_sums("pearson", intervals.leave_one_out(sums)), intervals.FISHER
        )
        absolute = np.abs(after - before).mean(axis=0)
        tables.append(
            pd.DataFrame(
                {
                    "model": model,
                    "condition": label,
                    "dimension": KEYS,
                    "clips": int(kept.sum()),
                    "change": (after - before).mean(axis=0),
                    "absolute": absolute,
                    "standardised": absolute / before.std(axis=0),
                    "pearson": r.value,
                    "low": r.low,
                    "high": r.high,
                }
            )
        )
    return pd.concat(tables, ignore_index=True)


def _checked(model: str, label: str, found: Comparison) -> np.ndarray:
    kept = found.changed
    if not kept.any():
        raise InputError(
            f"{label}: this change applies to no clip; give other clips or omit the variation."
        )
    constant = np.ptp(found.before[kept], axis=0) == 0
    if constant.any():
        which = KEYS[int(np.argmax(constant))]
        raise InputError(
            f"{model} gives all {kept.sum()} clips the same rating of {which}: a change cannot be"
            " standardised. Give more clips or another model."
        )
    return kept


def experts(measures: pd.DataFrame, ratings: np.ndarray, segments: np.ndarray) -> pd.DataFrame:
    """Correlation of people's ratings with each parameter: one row per parameter and dimension.

    ``r`` is over all clips; ``r_within`` is the same with both centred on their segment, which
    removes the music. ``differs`` is True where ``r_within`` is at least ``CLEAR`` in size and has
    the opposite sign of ``expected``.

    Args:
        measures: one row per clip, one column per parameter; NaN if it could not be measured.
        ratings: (n, 19), mean ratings.
        segments: (n,).
    """
    tables = []
    for parameter in measures:
        known = measures[parameter].notna().to_numpy()
        values = pd.DataFrame(ratings[known], columns=KEYS).assign(
            measure=measures[parameter].to_numpy()[known]
        )
        within = values - values.groupby(segments[known]).transform("mean")
        expected = np.array([EXPECTED[parameter].get(key, 0) for key in KEYS])
        r, r_within = (
            np.array([_r(one["measure"], one[key]) for key in KEYS]) for one in (values, within)
        )
        tables.append(
            pd.DataFrame(
                {
                    "parameter": parameter,
                    "dimension": KEYS,
                    "clips": int(known.sum()),
                    "r": r,
                    "r_within": r_within,
                    "expected": expected,
                    "differs": (expected * r_within) <= -CLEAR,
                }
            )
        )
    return pd.concat(tables, ignore_index=True)


def _r(x: pd.Series, y: pd.Series) -> float:
    """Pearson r; NaN if one is constant."""
    return (
        float(metrics.pearson(x.to_numpy()[:, None], y.to_numpy()[:, None])[0])
        if np.ptp(x) and np.ptp(y)
        else np.nan
    )


def summary(table: pd.DataFrame) -> list[str]:
    """Sensitivity of each model compared with the signs that musicians expect, a few sentences
    each."""
    lines = []
    for model, part in table[table["expected"] != 0].groupby("model", sort=False):
        counts = part["agrees"].value_counts()
        judged = sum(counts.get(answer, 0) for answer in (YES, NO, UNCLEAR))
        lines.append(
            f"{model}: of {judged} signs that musicians expect, {counts.get(YES, 0)} are found,"
            f" {counts.get(NO, 0)} are reversed and {counts.get(UNCLEAR, 0)} are unclear (the"
            " interval includes 0)."
        )
        heard = part[part["agrees"] != UNHEARD]
        found = [
            f"{name} {(one['agrees'] == YES).sum()}/{len(one)}"
            for name, one in heard.groupby("parameter", sort=False)
        ]
        lines.append(f"  found: {', '.join(found)}")
        if len(unheard := part[part["agrees"] == UNHEARD]):
            names = ", ".join(unheard["label"].unique())
            lines.append(f"  no change in the sound, not counted ({len(unheard)} signs): {names}")
        for label, one in part[part["agrees"] == NO].groupby("label", sort=False):
            cells = ", ".join(
                f"{row.dimension} {row.standardised:+.2f} SD" for row in one.itertuples()
            )
            lines.append(f"  reversed, {label}: {cells}")
    return lines


def robustness_summary(table: pd.DataFrame) -> list[str]:
    """The conditions that change the ratings of each model most and least, one sentence each."""
    lines = []
    for model, part in table.groupby("model", sort=False):
        by_condition = (
            part.groupby("condition")[["standardised", "pearson"]]
            .median()
            .sort_values("standardised")
        )
        words = [
            f"{row.Index} ({row.standardised:.2f} SD, r {row.pearson:.2f})"
            for row in by_condition.itertuples()
        ]
        lines.append(
            f"{model}, other recording conditions (median over dimensions of the mean absolute"
            " change, and r with the ratings of the original recordings): smallest change"
            f" {', '.join(words[:2])}; largest {', '.join(words[:-4:-1])}."
        )
    return lines
