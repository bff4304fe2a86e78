"""The sentence that answers a question of the results section, made from the numbers whichever way they turned out.

Every function takes tables of `evaluation.evaluate`, of one protocol, and returns plain sentences.
"""

import numpy as np
import pandas as pd

from percepiano_ast.dimensions import KEYS, PRIMARY
from percepiano_ast.report.wording import SIGNED, number, ranged, ranking

SURE = 0.05  # p after Holm's correction below which a difference is called real


def agreement(summary: pd.DataFrame, ceiling: pd.DataFrame | None = None) -> str:
    """How near the best model comes, and what share of the noise ceiling that is."""
    ranked = ranking(summary).dropna(subset="value")
    if ranked.empty:
        return "No model has a mean correlation in this scope."
    best = ranked.iloc[0]
    text = f"`{best.name}` comes nearest: a mean r of {ranged(best)}"
    if ceiling is not None and "overall" in ceiling:
        text += f", where agreement between raters allows {ceiling['overall'].mean():.2f}"
    within = _mean(summary, best.name, "within_segment_humans")
    text += f". Among people's performances of one passage it reaches {ranged(within)}"
    if ceiling is not None and "within_segment_humans" in ceiling:
        text += f" of {ceiling['within_segment_humans'].mean():.2f}"
    floor = [name for name in ranked.index if name.startswith("identity-")]
    if floor:
        text += f". What hears nothing at all (`{floor[0]}`) reaches {ranged(ranked.loc[floor[0]])}"
    return text + "."


def dimensions(summary: pd.DataFrame, scope: str = "overall") -> str:
    """What the best model hears best and worst, and the primary dimensions."""
    ranked = ranking(summary).dropna(subset="value")
    if ranked.empty:
        return "No model has correlations to compare."
    model = ranked.index[0]
    rows = summary[(summary["model"] == model) & (summary["scope"] == scope) & (summary["metric"] == "pearson")]
    values = rows.set_index("dimension")["value"].loc[list(KEYS)].dropna().sort_values(ascending=False)
    if values.empty:
        return f"`{model}` has no correlation in this scope: its predictions do not vary there."
    best = ", ".join(f"`{key}` ({value:z.2f})" for key, value in values.head(3).items())
    worst = ", ".join(f"`{key}` ({value:z.2f})" for key, value in values.tail(3)[::-1].items())
    words = [f"`{key}` {number(values.get(key, np.nan))}" for keys in PRIMARY.values() for key in keys]
    return f"`{model}` follows {best} best, {worst} least. Primary dimensions: {'; '.join(words)}."


def differences(pairs: pd.DataFrame) -> str:
    """How many of the differences in mean r are real."""
    mean = pairs[(pairs["scope"] == "overall") & (pairs["metric"] == "pearson") & (pairs["dimension"] == "mean")]
    mean = mean.dropna(subset="difference")
    if mean.empty:
        return "There are no two models to compare."
    clear = mean[(mean["low"] > 0) | (mean["high"] < 0)]
    text = f"{len(clear)} of {len(mean)} differences in mean r leave out zero"
    size = mean["detectable"].dropna()
    if len(size):
        text += f"; one of {size.min():.3f} to {size.max():.3f}, depending on the pair, is found in 80 % of such experiments"
    return text + "."


def deadpan(table: pd.DataFrame) -> str:
    """Whether people are told from deadpan renderings as clearly as raters tell them."""
    gaps = table[(table["part"] == "gap") & table["dimension"].isin(KEYS)]
    rated = gaps[gaps["metric"] == "rating"].groupby("dimension")["value"].first().dropna()
    if rated.empty:
        return "No passage has both, a performance by people and a deadpan rendering."
    largest = rated.abs().idxmax()
    lines = []
    for model, rows in gaps[gaps["metric"] == "prediction"].groupby("model", sort=False):
        said = rows.set_index("dimension")["value"].loc[rated.index]
        share = (said * rated).sum() / (rated**2).sum()
        lines.append(f"`{model}` {100 * share:.0f} %")
    return (f"People and deadpan renderings of the same passage differ most on `{largest}` ({rated[largest]:{SIGNED}}). Of the "
            f"differences over all dimensions, models predict: {', '.join(lines)}.")  # fmt: skip


def pairwise(table: pd.DataFrame) -> str:
    """How often the better of two performances is told."""
    mean = table[(table["dimension"] == "mean") & (table["scope"] == "within_segment_humans")]
    mean = mean[mean["min_difference"] == mean["min_difference"].max()].dropna(subset="value")
    if mean.empty:
        return "No two performances of a passage by people differ enough in their ratings."
    best = mean.loc[mean["value"].idxmax()]
    value, low, high = (100 * best[name] for name in ("value", "low", "high"))
    return f"`{best['model']}` puts {value:.0f} % [{low:.0f}, {high:.0f}] of the pairs in the right order; chance is 50 %."


def _mean(summary: pd.DataFrame, model: str, scope: str) -> pd.Series:
    rows = summary[(summary["model"] == model) & (summary["scope"] == scope) & (summary["metric"] == "pearson")]
    return rows.set_index("dimension").loc["mean"]
