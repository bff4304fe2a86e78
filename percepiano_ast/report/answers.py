"""Generated sentences for the questions of the results section.

Every function takes tables of `evaluation.evaluate` for one protocol and returns plain sentences.
"""

import numpy as np
import pandas as pd

from percepiano_ast.dimensions import KEYS, PRIMARY
from percepiano_ast.report.wording import SIGNED, number, ranged, ranking

SURE = 0.05  # significance level of p after Holm's correction


def agreement(summary: pd.DataFrame, ceiling: pd.DataFrame | None = None) -> str:
    """Agreement of the best model with the ratings, compared with the noise ceiling."""
    ranked = ranking(summary).dropna(subset="value")
    if ranked.empty:
        return "No model has a mean correlation in this scope."
    best = ranked.iloc[0]
    text = f"`{best.name}` has the highest mean r: {ranged(best)}"
    if ceiling is not None and "overall" in ceiling:
        text += f" (noise ceiling {ceiling['overall'].mean():.2f})"
    within = _mean(summary, best.name, "within_segment_humans")
    text += f". Within segment, humans only, its mean r is {ranged(within)}"
    if ceiling is not None and "within_segment_humans" in ceiling:
        text += f" (noise ceiling {ceiling['within_segment_humans'].mean():.2f})"
    floor = [name for name in ranked.index if name.startswith("identity-")]
    if floor:
        text += (
            f". The best identity baseline (`{floor[0]}`), which uses no audio, has"
            f" {ranged(ranked.loc[floor[0]])}"
        )
    return text + "."


def dimensions(summary: pd.DataFrame, scope: str = "overall") -> str:
    """The best and worst predicted dimensions of the best model, and the primary dimensions."""
    ranked = ranking(summary).dropna(subset="value")
    if ranked.empty:
        return "No model has a mean correlation in this scope."
    model = ranked.index[0]
    rows = summary[
        (summary["model"] == model) & (summary["scope"] == scope) & (summary["metric"] == "pearson")
    ]
    values = (
        rows.set_index("dimension")["value"].loc[list(KEYS)].dropna().sort_values(ascending=False)
    )
    if values.empty:
        return f"`{model}` has no correlation in this scope because its predictions are constant."
    best = ", ".join(f"`{key}` ({value:z.2f})" for key, value in values.head(3).items())
    worst = ", ".join(f"`{key}` ({value:z.2f})" for key, value in values.tail(3)[::-1].items())
    words = [
        f"`{key}` {number(values.get(key, np.nan))}" for keys in PRIMARY.values() for key in keys
    ]
    return (
        f"`{model}` predicts {best} best and {worst} worst (Pearson r). Primary dimensions:"
        f" {'; '.join(words)}."
    )


def differences(pairs: pd.DataFrame) -> str:
    """Number of differences in mean r that are significant, and the minimum detectable
    difference."""
    mean = pairs[
        (pairs["scope"] == "overall")
        & (pairs["metric"] == "pearson")
        & (pairs["dimension"] == "mean")
    ]
    mean = mean.dropna(subset="difference")
    if mean.empty:
        return "There are no two models to compare."
    clear = mean[(mean["low"] > 0) | (mean["high"] < 0)]
    text = f"The intervals of {len(clear)} of {len(mean)} differences in mean r exclude zero."
    size = mean["detectable"].dropna()
    if len(size):
        text += (
            f" Minimum detectable difference at 80 % power: {size.min():.3f} to {size.max():.3f},"
            " depending on the pair."
        )
    return text


def deadpan(table: pd.DataFrame) -> str:
    """Human versus deadpan: predicted differences compared with rated ones."""
    gaps = table[(table["part"] == "gap") & table["dimension"].isin(KEYS)]
    rated = gaps[gaps["metric"] == "rating"].groupby("dimension")["value"].first().dropna()
    if rated.empty:
        return "No segment has both a human performance and a deadpan rendering."
    largest = rated.abs().idxmax()
    lines = []
    for model, rows in gaps[gaps["metric"] == "prediction"].groupby("model", sort=False):
        said = rows.set_index("dimension")["value"].loc[rated.index]
        share = (said * rated).sum() / (rated**2).sum()
        lines.append(f"`{model}` {100 * share:.0f} %")
    return (
        "The ratings of human performances and deadpan renderings of the same segment differ most"
        f" on `{largest}` ({rated[largest]:{SIGNED}}). Predicted share of the differences over all"
        f" dimensions: {', '.join(lines)}."
    )


def pairwise(table: pd.DataFrame) -> str:
    """Share of pairs of performances in the order of their ratings."""
    mean = table[(table["dimension"] == "mean") & (table["scope"] == "within_segment_humans")]
    mean = mean[mean["min_difference"] == mean["min_difference"].max()].dropna(subset="value")
    if mean.empty:
        return "No two human performances of a segment differ enough in their ratings."
    best = mean.loc[mean["value"].idxmax()]
    value, low, high = (100 * best[name] for name in ("value", "low", "high"))
    return (
        f"`{best['model']}` orders {value:.0f} % [{low:.0f}, {high:.0f}] of the pairs correctly;"
        " chance is 50 %."
    )


def _mean(summary: pd.DataFrame, model: str, scope: str) -> pd.Series:
    rows = summary[
        (summary["model"] == model) & (summary["scope"] == scope) & (summary["metric"] == "pearson")
    ]
    return rows.set_index("dimension").loc["mean"]
