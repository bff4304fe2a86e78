"""Listening tests by construction, the tables: what a change in the playing does to ratings, and what a change in the
recording does.

Three tables:

* ``sensitivity``: mean change of each rating with each variation of the playing, in standard deviations of the same
  model's ratings over the untouched clips (a unit, taken as it is), so that models of any scale compare; with the sign that
  a musician expects.
* ``robustness``: change of each rating with each condition of the recording, which no rating should hear, and the
  correlation with the ratings of the untouched recordings.
* ``experts``: how people's ratings go with the same parameters over real clips. Players change many things at once, so a
  correlation may differ from what the parameter does by itself; where it does, the table says so.

Intervals are 95 % jackknife intervals over content groups, see `intervals`.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from percepiano_ast.config import InputError
from percepiano_ast.dimensions import KEYS
from percepiano_ast.evaluation import intervals, metrics
from percepiano_ast.evaluation.scores import by_group
from percepiano_ast.variations import Variation

UNHEARD, UNCLEAR, YES, NO = "unheard", "unclear", "yes", "no"
CLEAR = 0.2  # |r| from which experts' ratings go with a parameter

# What more of a parameter does to a rating, 1 towards the second word of the dimension's name, -1 towards the first. Only
# where musicians would agree whatever the piece; blank elsewhere. Grounds: force is loudness, brightness and hardness of
# touch (Askenfelt & Jansson 1991; Goebl et al. 2014); fast and high music sounds brighter in mood, slow and low music
# darker (Gabrielsson & Lindstroem 2010); the pedal joins, blurs and enriches (Repp 1996); a tempo that gives, loud against
# soft and voiced chords are what teachers call expression (Palmer 1997).
EXPECTED: dict[str, dict[str, int]] = {
    "loudness": {
        "articulation_soft_hard": 1, "timbre_bright_dark": -1, "timbre_soft_loud": 1, "dynamics_mellow_raw": 1,
        "mood_low_high_energy": 1,
    },
    "tempo": {
        "articulation_short_long": -1, "music_fast_slow": -1, "music_flat_spacious": -1, "mood_optimistic_dark": -1,
        "mood_low_high_energy": 1,
    },
    "pedal": {
        "articulation_short_long": 1, "pedal_dry_wet": 1, "pedal_clean_blurred": 1, "timbre_shallow_rich": 1,
        "music_flat_spacious": 1,
    },
    "pedal depth": {"pedal_dry_wet": 1, "pedal_clean_blurred": 1},
    "soft pedal": {
        "articulation_soft_hard": -1, "timbre_bright_dark": 1, "timbre_soft_loud": -1, "dynamics_mellow_raw": -1,
    },
    "rubato": {
        "timing_stable_unstable": 1, "music_flat_spacious": 1, "music_pure_dramatic": 1, "mood_honest_imaginative": 1,
    },
    "dynamics": {"timbre_even_colorful": 1, "dynamics_little_large_range": 1, "music_pure_dramatic": 1},
    "accents": {"timbre_even_colorful": 1, "dynamics_little_large_range": 1},
    "voicing": {"timbre_even_colorful": 1, "music_flat_spacious": 1},
    "melody": {"timbre_even_colorful": 1, "music_flat_spacious": 1},
    "articulation": {"articulation_short_long": 1, "articulation_soft_hard": -1, "pedal_dry_wet": 1},
    "asynchrony": {"timing_stable_unstable": 1},
    "transposition": {"timbre_bright_dark": -1, "mood_optimistic_dark": -1},
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Comparison:
    """Ratings of the same clips untouched and changed in one way.

    Attributes:
        before, after: (n, 19) in the order of ``KEYS``; NaN in ``after`` where a clip could not be changed so.
        alike: bool (n,), where the model was given exactly the same, as of a soft pedal that a synthesizer does not have.
    """

    before: np.ndarray
    after: np.ndarray
    alike: np.ndarray

    @property
    def changed(self) -> np.ndarray:
        """Bool (n,), the clips that could be changed so."""
        return np.isfinite(self.after).all(axis=1)


def sensitivity(model: str, groups: np.ndarray, found: dict[Variation, Comparison]) -> pd.DataFrame:
    """A row a variation and dimension, see the module's text and the columns' names.

    ``clips`` counts those that could be changed so, ``alike`` those of them that sounded the same to the model.
    ``agrees`` is ``yes`` or ``no`` where the interval leaves 0 out, ``unclear`` where it does not, ``unheard`` where all are
    alike, and empty where no sign is expected.

    Args:
        groups: (n,) content group of each clip.

    Raises:
        InputError: a variation that no clip could be changed by, or ratings that do not differ between clips.
    """
    return pd.concat([_effect(model, groups, *item) for item in found.items()], ignore_index=True)


def _effect(model: str, groups: np.ndarray, variation: Variation, found: Comparison) -> pd.DataFrame:
    kept = _checked(model, variation.label, found)
    change, unit = (found.after - found.before)[kept], found.before[kept].std(axis=0)
    n, total = intervals.leave_one_out(by_group(groups[kept], np.stack([np.ones_like(change), change])))
    estimate = intervals.jackknife(total / np.where(n > 0, n, np.nan) / unit)
    sign = np.sign(variation.strength)
    expected = np.array([sign * EXPECTED[variation.parameter.name].get(key, 0) for key in KEYS])
    return pd.DataFrame({
        "model": model, "parameter": variation.parameter.name, "variation": variation.name,
        "strength": float(variation.strength), "label": variation.label, "dimension": KEYS,
        "clips": int(kept.sum()), "alike": int(found.alike[kept].sum()),
        "change": change.mean(axis=0), "change_sd": change.std(axis=0), "standardised": estimate.value,
        "low": estimate.low, "high": estimate.high, "expected": expected.astype(int),
        "agrees": _agreement(expected, estimate, found.alike[kept].all()),
    })  # fmt: skip


def _agreement(expected: np.ndarray, estimate: intervals.Estimate, unheard: bool) -> np.ndarray:
    if unheard:
        return np.where(expected == 0, "", UNHEARD)
    seen = np.where(estimate.low > 0, 1, np.where(estimate.high < 0, -1, 0))
    answer = np.where(seen == 0, UNCLEAR, np.where(seen == expected, YES, NO))
    return np.where(expected == 0, "", answer)


def robustness(model: str, groups: np.ndarray, found: dict[str, Comparison]) -> pd.DataFrame:
    """A row a condition and dimension: ``change`` (mean), ``absolute`` (mean), ``standardised`` (absolute in standard
    deviations of the ratings over clips), and ``pearson`` with the ratings of the untouched clips, ``low`` to ``high``.

    Args:
        groups: (n,) content group of each clip.

    Raises:
        InputError: see ``sensitivity``.
    """
    tables = []
    for label, comparison in found.items():
        kept = _checked(model, label, comparison)
        before, after = comparison.before[kept], comparison.after[kept]
        sums = by_group(groups[kept], metrics.features(*metrics.prepared(before, after, "standardised")))
        r = intervals.jackknife(metrics.from_sums("pearson", intervals.leave_one_out(sums)), intervals.FISHER)
        absolute = np.abs(after - before).mean(axis=0)
        tables.append(pd.DataFrame({
            "model": model, "condition": label, "dimension": KEYS, "clips": int(kept.sum()),
            "change": (after - before).mean(axis=0), "absolute": absolute,
            "standardised": absolute / before.std(axis=0), "pearson": r.value, "low": r.low, "high": r.high,
        }))  # fmt: skip
    return pd.concat(tables, ignore_index=True)


def _checked(model: str, label: str, found: Comparison) -> np.ndarray:
    kept = found.changed
    if not kept.any():
        raise InputError(f"{label}: no clip could be changed so; give clips that can, or leave this variation out.")
    constant = np.ptp(found.before[kept], axis=0) == 0
    if constant.any():
        which = KEYS[int(np.argmax(constant))]
        raise InputError(
            f"{model} rates {which} alike in all {kept.sum()} clips: there is no spread to measure a change by. "
            "Give more clips, or a model that tells them apart."
        )
    return kept


def experts(measures: pd.DataFrame, ratings: np.ndarray, segments: np.ndarray) -> pd.DataFrame:
    """How people's ratings go with how much there is of each parameter: a row a parameter and dimension.

    ``r`` is over all clips; ``r_within`` with both centred on their segment, so that the music is left out. ``differs`` is
    whether ``r_within`` is at least ``CLEAR`` in size and of the sign that ``expected`` does not have.

    Args:
        measures: a row a clip, a column a parameter; NaN where it could not be measured.
        ratings: (n, 19), mean ratings.
        segments: (n,).
    """
    tables = []
    for parameter in measures:
        known = measures[parameter].notna().to_numpy()
        values = pd.DataFrame(ratings[known], columns=KEYS).assign(measure=measures[parameter].to_numpy()[known])
        within = values - values.groupby(segments[known]).transform("mean")
        expected = np.array([EXPECTED[parameter].get(key, 0) for key in KEYS])
        r, r_within = (np.array([_r(one["measure"], one[key]) for key in KEYS]) for one in (values, within))
        tables.append(pd.DataFrame({
            "parameter": parameter, "dimension": KEYS, "clips": int(known.sum()), "r": r, "r_within": r_within,
            "expected": expected, "differs": (expected * r_within) <= -CLEAR,
        }))  # fmt: skip
    return pd.concat(tables, ignore_index=True)


def _r(x: pd.Series, y: pd.Series) -> float:
    """Pearson r; NaN where one does not vary."""
    return float(metrics.pearson(x.to_numpy()[:, None], y.to_numpy()[:, None])[0]) if np.ptp(x) and np.ptp(y) else np.nan


def summary(table: pd.DataFrame) -> list[str]:
    """What the sensitivity of each model says about the signs that musicians expect, a few sentences each."""
    lines = []
    for model, part in table[table["expected"] != 0].groupby("model", sort=False):
        counts = part["agrees"].value_counts()
        judged = sum(counts.get(answer, 0) for answer in (YES, NO, UNCLEAR))
        lines.append(
            f"{model}: of {judged} signs that musicians expect, {counts.get(YES, 0)} are found, {counts.get(NO, 0)} are "
            f"found reversed and {counts.get(UNCLEAR, 0)} are unclear (the interval holds 0)."
        )
        heard = part[part["agrees"] != UNHEARD]
        found = [f"{name} {(one['agrees'] == YES).sum()}/{len(one)}" for name, one in heard.groupby("parameter", sort=False)]
        lines.append(f"  found: {', '.join(found)}")
        if len(unheard := part[part["agrees"] == UNHEARD]):
            names = ", ".join(unheard["label"].unique())
            lines.append(f"  not in the sound, so not counted ({len(unheard)} signs): {names} change nothing here")
        for label, one in part[part["agrees"] == NO].groupby("label", sort=False):
            cells = ", ".join(f"{row.dimension} {row.standardised:+.2f} SD" for row in one.itertuples())
            lines.append(f"  reversed, {label}: {cells}")
    return lines


def robustness_summary(table: pd.DataFrame) -> list[str]:
    """The conditions that change the ratings of each model most and least, a sentence each."""
    lines = []
    for model, part in table.groupby("model", sort=False):
        by_condition = part.groupby("condition")[["standardised", "pearson"]].median().sort_values("standardised")
        words = [f"{row.Index} ({row.standardised:.2f} SD, r {row.pearson:.2f})" for row in by_condition.itertuples()]
        lines.append(
            f"{model}, recorded otherwise (median over dimensions of the mean absolute change, and r with the untouched "
            f"recordings): least {', '.join(words[:2])}; most {', '.join(words[:-4:-1])}."
        )
    return lines
