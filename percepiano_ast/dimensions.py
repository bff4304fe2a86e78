"""The 19 perceptual dimensions of PercePiano, in label order, and their groups; and custom
dimensions.

Source: PercePiano (Park et al. 2024), ``labels/``. Each label is the mean rating divided by 7, from
0 to 1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Dimension(NamedTuple):
    """One rating scale: its key in all tables, its family in the questionnaire, and its two
    poles."""

    key: str
    family: str
    low: str
    high: str


DIMENSIONS = (
    Dimension("timing_stable_unstable", "Timing", "stable", "unstable"),
    Dimension("articulation_short_long", "Articulation", "short", "long"),
    Dimension("articulation_soft_hard", "Articulation", "soft/cushioned", "hard/solid"),
    Dimension("pedal_dry_wet", "Pedal", "sparse/dry", "saturated/wet"),
    Dimension("pedal_clean_blurred", "Pedal", "clean", "blurred"),
    Dimension("timbre_even_colorful", "Timbre", "even", "colorful"),
    Dimension("timbre_shallow_rich", "Timbre", "shallow", "rich"),
    Dimension("timbre_bright_dark", "Timbre", "bright", "dark"),
    Dimension("timbre_soft_loud", "Timbre", "soft", "loud"),
    Dimension("dynamics_mellow_raw", "Dynamics", "sophisticated/mellow", "raw/crude"),
    Dimension("dynamics_little_large_range", "Dynamics", "little range", "large range"),
    Dimension("music_fast_slow", "Music making", "fast paced", "slow paced"),
    Dimension("music_flat_spacious", "Music making", "flat", "spacious"),
    Dimension("music_disproportioned_balanced", "Music making", "disproportioned", "balanced"),
    Dimension("music_pure_dramatic", "Music making", "pure", "dramatic/expressive"),
    Dimension("mood_optimistic_dark", "Emotion and mood", "optimistic/pleasant", "dark"),
    Dimension("mood_low_high_energy", "Emotion and mood", "low energy", "high energy"),
    Dimension("mood_honest_imaginative", "Emotion and mood", "honest", "imaginative"),
    Dimension(
        "interpretation_doubtful_convincing",
        "Interpretation",
        "unsatisfactory/doubtful",
        "convincing",
    ),
)

KEYS = tuple(dimension.key for dimension in DIMENSIONS)

# The three head groups: each family belongs to exactly one.
HEAD_GROUPS = {
    "timing": ("Timing",),
    "sound": ("Articulation", "Pedal", "Timbre", "Dynamics"),
    "music": ("Music making", "Emotion and mood", "Interpretation"),
}

# The project's primary dimensions. PercePiano has no column "Musical expression"; two dimensions
# represent it.
PRIMARY = {
    "Timing": ("timing_stable_unstable",),
    "Dynamics": ("dynamics_mellow_raw", "dynamics_little_large_range"),
    "Musical expression": ("music_pure_dramatic", "interpretation_doubtful_convincing"),
}


def group_indices() -> dict[str, tuple[int, ...]]:
    """Positions in ``KEYS`` of the dimensions of each head group."""
    return {
        group: tuple(i for i, dimension in enumerate(DIMENSIONS) if dimension.family in families)
        for group, families in HEAD_GROUPS.items()
    }


@dataclass(frozen=True)
class RatingScale:
    """The dimensions that a model rates, stored with its training data and its weights.

    Attributes:
        dimensions: in the order of all rating arrays.
        lowest, highest: end points of each scale, in the unit of the ratings.
        groups: head groups: name and positions in ``dimensions``.
    """

    dimensions: tuple[Dimension, ...]
    lowest: tuple[float, ...]
    highest: tuple[float, ...]
    groups: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def own(
        cls, names: Sequence[str], lowest: Sequence[float], highest: Sequence[float]
    ) -> "RatingScale":
        """The questionnaire of custom ratings: ``lowest`` and ``highest`` are the ends of the given
        ratings.

        All dimensions are in one group, because a grouping cannot be inferred from few clips.
        """
        dimensions = tuple(
            Dimension(name, name, f"{low:g}", f"{high:g}")
            for name, low, high in zip(names, lowest, highest)
        )
        every = ("all", tuple(range(len(dimensions))))
        return cls(dimensions, tuple(map(float, lowest)), tuple(map(float, highest)), (every,))

    @property
    def names(self) -> tuple[str, ...]:
        """Keys of the dimensions."""
        return tuple(dimension.key for dimension in self.dimensions)

    def as_settings(self) -> dict:
        """Entries for a model's settings; empty for `PERCEPIANO`, the default."""
        if self == PERCEPIANO:
            return {}
        return {
            "dimensions": list(self.names),
            "lowest": list(self.lowest),
            "highest": list(self.highest),
        }

    @classmethod
    def from_settings(cls, settings: dict) -> "RatingScale":
        """The questionnaire described by ``settings``, see `as_settings`."""
        if "lowest" not in settings:
            return PERCEPIANO
        return cls.own(settings["dimensions"], settings["lowest"], settings["highest"])


PERCEPIANO = RatingScale(
    DIMENSIONS, (0.0,) * len(KEYS), (1.0,) * len(KEYS), tuple(group_indices().items())
)
