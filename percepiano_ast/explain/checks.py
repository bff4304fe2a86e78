"""Checks of attribution maps: deletion curves and weight randomisation, each with a verdict in
words.

**Deletion** (Samek et al. 2017; Petsiuk, Das and Saenko 2018): cells of the spectrogram, as large
as the model's patches, are replaced by the baseline, most relevant cells first, and the recording
is rated again. A faithful map moves the rating towards the baseline's rating faster than a random
order. Insertion, which restores cells into the baseline, is the curve of the opposite order read
from its end.

**Randomised weights** (Adebayo et al. 2018): a map that does not change when the weights are
randomised reflects the spectrogram, not the model.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.ndimage
import scipy.stats

from percepiano_ast.dimensions import KEYS
from percepiano_ast.explain.maps import METHODS, Excerpt, Explainer, Explanation
from percepiano_ast.models import attribution

# of the cells replaced; symmetric
SHARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95, 0.98, 1.0)
ORDERS = 5  # number of random orders
# with random weights: the order of cells converges before the sums do
STEPS = attribution.STEPS // 2
ALIKE = 0.5  # rank correlation above which the map of random weights counts as unchanged
LEVEL = 0.95
# minimum number of recordings for a verdict: bootstrap intervals of fewer are too narrow
FEWEST = 5
_RESAMPLES = 2000


@dataclass(frozen=True, eq=False)
class Checks:
    """Results of the checks over recordings.

    Attributes:
        deletion: ``recording, dimension, method, order`` (``most relevant first``, ``random``,
            ``least relevant first``), ``share`` of the cells replaced, ``moved``: change of the
            rating towards that of the baseline, and ``size``: its absolute change. Random orders
                are means over `ORDERS`.
        randomisation: ``recording, dimension, stage, spearman, spearman_size, ssim``: similarity to
            the map of the trained model by rank correlation of cells, of their absolute values, and
            by structural similarity.
        verdicts: ``dimension, check, method, value, low, high, recordings, sentence``.
    """

    deletion: pd.DataFrame
    randomisation: pd.DataFrame
    verdicts: pd.DataFrame


def run(explainer: Explainer, explained: Iterable[list[Explanation]], seed: int = 0) -> Checks:
    """Both checks: deletion for all maps, randomised weights for integrated gradients.

    Cost per recording and fold model: 11 shares x (2 orders x maps x dimensions + 5 random orders)
    x windows forward passes, and six times integrated gradients of `STEPS` steps.

    Args:
        explained: explanations by ``explainer``, a list with the same dimensions and methods for
            each recording.
        seed: for the random orders, the random weights and the bootstrap.
    """
    deletions, likenesses = [], []
    for number, explanations in enumerate(explained):
        deletions.append(_deletion(explainer, explanations, np.random.default_rng([seed, number])))
        likenesses.append(_likeness(explainer, explanations, seed))
    deletion, randomisation = (
        pd.concat(deletions, ignore_index=True),
        pd.concat(likenesses, ignore_index=True),
    )
    return Checks(deletion, randomisation, _verdicts(deletion, randomisation, seed))


# --- Deletion -----------------------------------------------------------------------------------


def cells(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Sums of (T, F) over cells of ``size`` = (bands, frames): (ceil(T / frames), ceil(F /
    bands))."""
    bands, frames = size
    rows = np.add.reduceat(values, np.arange(0, values.shape[0], frames), axis=0, dtype=np.float64)
    return np.add.reduceat(rows, np.arange(0, values.shape[1], bands), axis=1)


def _deletion(
    explainer: Explainer, explanations: list[Explanation], rng: np.random.Generator
) -> pd.DataFrame:
    size = explainer.models[0].run.model.patch_size
    recording = explanations[0].recording
    shape = cells(recording.level, size).shape
    orders: list[tuple[str, str | None, np.ndarray]] = [
        ("random", None, rng.permutation(shape[0] * shape[1])) for _ in range(ORDERS)
    ]
    for explanation in explanations:
        towards = 1 if explanation.rating >= explanation.baseline else -1
        for method, values in explanation.maps.items():
            # Attention has no sign.
            relevance = cells(values, size).ravel() * (towards if method == "gradients" else 1)
            most = np.argsort(-relevance, kind="stable")
            orders += [
                (explanation.dimension, method, most),
                (explanation.dimension, method, most[::-1]),
            ]
    ratings = explainer.rate(
        _replaced(explainer, recording, size, shape, [order for *_, order in orders])
    )
    curves = ratings.reshape(len(orders), len(SHARES), -1)
    return pd.concat(_deletion_rows(explanations, orders, curves), ignore_index=True)


def _replaced(explainer, recording, size, shape, orders) -> Iterator[np.ndarray]:
    """Levels with the first cells of each order replaced by the baseline, for each share in
    turn."""
    baseline = explainer.baseline_of(recording.level)
    for order in orders:
        for share in SHARES:
            gone = np.zeros(len(order), bool)
            gone[order[: round(share * len(order))]] = True
            points = np.repeat(np.repeat(gone.reshape(shape), size[1], axis=0), size[0], axis=1)
            frames, bands = recording.level.shape
            yield np.where(points[:frames, :bands], baseline, recording.level)


def _deletion_rows(
    explanations: list[Explanation], orders: list[tuple], curves: np.ndarray
) -> Iterator[pd.DataFrame]:
    for explanation in explanations:
        rated = curves[:, :, KEYS.index(explanation.dimension)]
        towards = np.sign(rated[0, 0] - rated[0, -1])
        moved = towards * (rated[:, :1] - rated)
        facts = {
            "recording": explanation.recording.name,
            "dimension": explanation.dimension,
            "share": SHARES,
        }
        for method in explanation.maps:
            most, least = [
                i for i, order in enumerate(orders) if order[:2] == (explanation.dimension, method)
            ]
            named = {
                "most relevant first": [most],
                "random": range(ORDERS),
                "least relevant first": [least],
            }
            for order, members in named.items():
                part = moved[list(members)]
                means = {"moved": part.mean(axis=0), "size": np.abs(part).mean(axis=0)}
                yield pd.DataFrame({**facts, "method": method, "order": order, **means})


def areas(deletion: pd.DataFrame, values: str = "moved") -> pd.DataFrame:
    """Area under every curve of ``values``: index ``dimension, method, recording``, one column per
    order."""
    keys = ["dimension", "method", "recording", "order"]
    area = deletion.groupby(keys).apply(
        lambda part: np.trapezoid(part[values], part["share"]), include_groups=False
    )
    return area.unstack("order")


# --- Randomised weights -------------------------------------------------------------------------


def _likeness(explainer: Explainer, explanations: list[Explanation], seed: int) -> pd.DataFrame:
    size, recording = explainer.models[0].run.model.patch_size, explanations[0].recording
    dimensions = [explanation.dimension for explanation in explanations]
    rows = []
    for stage, other in explainer.randomised(seed, STEPS):
        for trained, random in zip(
            explanations, other.explain(recording, dimensions, methods=("gradients",))
        ):
            a, b = cells(trained.map, size), cells(random.map, size)
            rows.append(
                {
                    "recording": recording.name,
                    "dimension": trained.dimension,
                    "stage": stage,
                    "spearman": _spearman(a, b),
                    "spearman_size": _spearman(np.abs(a), np.abs(b)),
                    "ssim": ssim(*(one / max(np.abs(one).max(), 1e-12) for one in (a, b))),
                }
            )
    return pd.DataFrame(rows)


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return 0.0  # a constant map correlates with no other
    return float(scipy.stats.spearmanr(a.ravel(), b.ravel()).statistic)


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Mean structural similarity of two images with values from -1 to 1 (Wang et al. 2004, equation
    13).

    Gaussian windows with a standard deviation of 1.5, K1 = 0.01, K2 = 0.03 and a range of 2.
    """

    def blurred(image):
        return scipy.ndimage.gaussian_filter(image, 1.5, truncate=3.5)

    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    mean_a, mean_b = blurred(a), blurred(b)
    var_a, var_b = blurred(a * a) - mean_a**2, blurred(b * b) - mean_b**2
    both = blurred(a * b) - mean_a * mean_b
    index = (
        (2 * mean_a * mean_b + c1)
        * (2 * both + c2)
        / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    )
    return float(index.mean())


# --- Verdicts -----------------------------------------------------------------------------------


def _verdicts(deletion: pd.DataFrame, randomisation: pd.DataFrame, seed: int) -> pd.DataFrame:
    rows = []
    # Random orders count any movement: holes in a spectrogram can move a rating beyond both end
    # points.
    both = areas(deletion)[["most relevant first"]].assign(random=areas(deletion, "size")["random"])
    for (dimension, method), part in both.groupby(["dimension", "method"]):
        most, random = part["most relevant first"].to_numpy(), part["random"].to_numpy()
        value, low, high = _interval(_ratio, (most, random), seed)
        facts = {
            "dimension": dimension,
            "check": "deletion",
            "method": method,
            "value": value,
            "low": low,
            "high": high,
        }
        rows.append(
            {
                **facts,
                "recordings": len(part),
                "sentence": deletion_verdict(value, low, high, len(part)),
            }
        )
    for dimension, part in randomisation[randomisation["stage"] == "everything"].groupby(
        "dimension"
    ):
        like = part["spearman"].to_numpy()
        value, low, high = _interval(np.mean, (like,), seed)
        facts = {
            "dimension": dimension,
            "check": "randomisation",
            "method": "gradients",
            "value": value,
        }
        facts |= {"low": low, "high": high, "recordings": len(part)}
        rows.append({**facts, "sentence": randomisation_verdict(value, low, high, len(part))})
    table = pd.DataFrame(rows)
    order = table["method"].map(METHODS.index)
    return (
        table.assign(order=order)
        .sort_values(["dimension", "check", "order"], kind="stable")
        .drop(columns="order")
    )


def _ratio(most: np.ndarray, random: np.ndarray) -> float:
    """Ratio of the areas, summed over recordings; 1 if the random order does not move the
    rating."""
    return float(most.sum() / random.sum()) if random.sum() > 0 else 1.0


def _interval(statistic, columns: tuple[np.ndarray, ...], seed: int) -> tuple[float, float, float]:
    """Value and percentile bootstrap interval of ``statistic(*columns)`` over recordings, (n,)
    each; NaN for one."""
    value, n = float(statistic(*columns)), len(columns[0])
    if n < 2:
        return value, np.nan, np.nan
    rng = np.random.default_rng([seed, n])
    draws = (rng.integers(n, size=n) for _ in range(_RESAMPLES))
    drawn = [float(statistic(*(column[rows] for column in columns))) for rows in draws]
    return value, *np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])


def deletion_verdict(value: float, low: float, high: float, recordings: int) -> str:
    """Verdict on the ratio of areas, most relevant first to random."""
    numbers = (
        f"deletion moves the rating {value:.1f} times as fast as random order"
        f" ({_range(low, high, recordings, '.1f')})"
    )
    if recordings < FEWEST:
        return f"no verdict from fewer than {FEWEST} recordings: {numbers}"
    if low > 1:
        return f"maps are faithful: {numbers}"
    if high < 1:
        return f"maps are not faithful: {numbers}"
    return f"inconclusive whether maps are faithful: {numbers}"


def randomisation_verdict(value: float, low: float, high: float, recordings: int) -> str:
    """Verdict on the similarity of the maps of trained and random weights."""
    numbers = f"the rank correlation of maps of random and trained weights is {value:.2f}"
    numbers += f" ({_range(low, high, recordings, '.2f')}; 1: identical, 0: unrelated)"
    if recordings < FEWEST:
        return f"no verdict from fewer than {FEWEST} recordings: {numbers}"
    if high < ALIKE:
        return f"maps depend on the trained weights: {numbers}"
    if low > ALIKE:
        return f"maps do not depend on the trained weights: {numbers}"
    return f"inconclusive whether maps depend on the trained weights: {numbers}"


def _range(low: float, high: float, recordings: int, digits: str) -> str:
    if recordings < 2:
        return "one recording, no interval"
    return f"95 % interval {low:{digits}} to {high:{digits}}, {recordings} recordings"


# --- The excerpt --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Silenced:
    """Effect of replacing an excerpt by the baseline, compared with other excerpts of the same
    length.

    Attributes:
        moved: rating minus the rating without the excerpt.
        others: median absolute value of the same for all other excerpts, half a length apart; NaN
            if there are none.
        rank: 1 if no other excerpt moves the rating more.
        stretches: number of compared excerpts, including this one.
    """

    moved: float
    others: float
    rank: int
    stretches: int

    def sentence(self) -> str:
        """The result in words."""
        if self.stretches == 1:
            return (
                f"without it the rating changes by {-self.moved:+.3f}; there is no other excerpt to"
                " compare with"
            )
        place = "the largest change"
        if self.rank > 1:
            place = f"rank {self.rank}"
        return (
            f"without it the rating changes by {-self.moved:+.3f}, {place} of {self.stretches}"
            f" excerpts of this length (median of the others {self.others:.3f})"
        )


def silence_excerpt(explainer: Explainer, explanation: Explanation, excerpt: Excerpt) -> Silenced:
    """Rate again without the excerpt, and without other excerpts of its length that overlap it by
    less than half."""
    recording = explanation.recording
    per_second = recording.front_end.sample_rate / recording.front_end.hop_length
    n = round((excerpt.stop - excerpt.start) * per_second)
    first = round(excerpt.start * per_second)
    step = max(n // 2, 1)
    others = [k for k in range(0, len(recording.level) - n + 1, step) if abs(k - first) > n // 2]
    baseline = explainer.baseline_of(recording.level)

    def variants():
        yield recording.level
        for start in [first, *others]:
            level = recording.level.copy()
            level[start : start + n] = baseline[start : start + n]
            yield level

    rated = explainer.rate(variants())[:, KEYS.index(explanation.dimension)]
    moved = rated[0] - rated[1:]
    rank = 1 + int((np.abs(moved[1:]) > np.abs(moved[0])).sum())
    return Silenced(
        float(moved[0]), float(np.median(np.abs(moved[1:]))) if others else np.nan, rank, len(moved)
    )
