"""The comparison page: all models, differences from a reference model, and published results."""

import pandas as pd

from percepiano_ast import plots
from percepiano_ast.dimensions import KEYS
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation import compare
from percepiano_ast.plots import MOST
from percepiano_ast.report.answers import SURE
from percepiano_ast.report.page import Page
from percepiano_ast.report.sections import SCOPE_TITLES, Results
from percepiano_ast.report.wording import (
    SIGNED,
    hears_audio_alone,
    in_order,
    interval,
    is_encoder,
    leaky,
    number,
    ranged,
    ranking,
)


def reference_of(models: list[str], wanted: str = "") -> str:
    """The reference model: ``wanted``, or the best audio-only model that is not an audio encoder.

    Args:
        models: names, best first.

    Raises:
        InputError: ``wanted`` is not among the models.
    """
    if wanted:
        if wanted not in models:
            raise InputError(
                f"the reference {wanted!r} is not among the models; choose one of"
                f" {', '.join(models)}."
            )
        return wanted
    rivals = [name for name in models if hears_audio_alone(name) and not is_encoder(name)]
    return (rivals or models[1:] or models)[0]


def write(page: Page, results: Results, wanted: str = "") -> None:
    """Fill the page; ``wanted`` is the reference, see `reference_of`."""
    names = in_order(results.tables["summary"]["protocol"])
    _side_by_side(page, results, names)
    primary = names[0]
    models = list(ranking(results.of("summary", primary)).index)
    reference = reference_of(models, wanted)
    chosen = [name for name in models if name != reference]
    if chosen:
        _gains(page, results, primary, reference, chosen)
    _published(page, results)


def _side_by_side(page: Page, results: Results, names: list[str]) -> None:
    page.heading("All models")
    rows = []
    for protocol in names:
        values = results.of("summary", protocol)
        mean = values[values["dimension"] == "mean"].set_index(["model", "scope", "metric"])
        for model in ranking(values).index:
            row = {"protocol": protocol + leaky(protocol), "model": model}
            for scope in ("overall", "within_segment_humans"):
                row[SCOPE_TITLES[scope]] = ranged(mean.loc[(model, scope, "pearson")])
            row["R2"] = ranged(mean.loc[(model, "overall", "r2")])
            row["MAE"] = number(mean.loc[(model, "overall", "mae"), "value"], "z.3f")
            row["share of noise ceiling"] = _share(results, protocol, model)
            rows.append(row | {"seeds": str(mean.loc[(model, "overall", "pearson"), "seeds"])})
    table = pd.DataFrame(rows).set_index("protocol")
    simulated = ", SIMULATED ratings" if results.simulated else ""
    caption = (
        "All models under all protocols: mean over the 19 dimensions, Pearson r with 95 %"
        f" intervals{simulated}"
    )
    page.table("comparison", caption, table)
    if len(names) > 1:
        values = results.tables["summary"]
        best = values[
            (values["metric"] == "pearson")
            & (values["scope"] == "overall")
            & (values["dimension"] == "mean")
        ]
        models = list(best.groupby("model")["value"].max().sort_values(ascending=False).index)
        if len(models) > MOST:
            page.text(
                f"The figure shows the best {MOST} of {len(models)} models; the table lists all."
            )
        ceiling = results.ceiling_of("overall")
        labels = {
            name: name.replace("_", "\n") + ("\n(leaky)" if leaky(name) else "") for name in names
        }
        figure = plots.by_protocol(
            values[values["model"].isin(models[:MOST])],
            labels,
            None if ceiling is None else ceiling.mean(),
        )
        caption = f"Mean Pearson r under each protocol, overall{simulated}"
        figure.suptitle(caption)
        page.figure("protocols", caption, figure)


def _share(results: Results, protocol: str, model: str) -> str:
    if "ceiling_share" not in results.tables:
        return "n/a"
    return ranged(
        results.first_seed(
            "ceiling_share", protocol, model=model, scope="overall", dimension="mean"
        ).iloc[0]
    )


def _gains(page: Page, results: Results, protocol: str, reference: str, models: list[str]) -> None:
    """Difference of each model from the reference per dimension, and its significance after
    correction."""
    page.heading(f"Differences from {reference}")
    page.text(
        f"""Pearson r of each model minus that of `{reference}`, {results.where(protocol)}. Significant means p below
        {SURE} after Holm's correction over the 19 dimensions; p is not corrected for the number of models."""
    )
    pairs = results.of("differences", protocol, scope="overall", metric="pearson")
    each = {model: compare.between(pairs, model, reference) for model in models}
    each = {model: rows for model, rows in each.items() if len(rows)}
    if without := [model for model in models if model not in each]:
        page.text(
            "Not compared because they share no seed with it:"
            f" {', '.join(f'`{name}`' for name in without)}."
        )
    page.list([_what_survives(rows, model, reference) for model, rows in each.items()])
    if not each:
        return
    table = pd.DataFrame(
        {model: [_gain(row) for _, row in _by_key(rows)] for model, rows in each.items()},
        [*KEYS, "mean"],
    )
    caption = (
        f"Differences in Pearson r from {reference} with 95 % intervals; * significant after Holm's"
        " correction"
    )
    page.table(f"{protocol}_gains", f"{caption} ({results.where(protocol)})", table)
    shown = pd.concat(list(each.values())[:MOST], ignore_index=True)
    figure = plots.gains(shown)
    caption = f"Differences in Pearson r from {reference} per dimension ({results.where(protocol)})"
    figure.suptitle(caption, fontsize="medium")
    page.figure(f"{protocol}_gains", caption, figure)


def _by_key(rows: pd.DataFrame):
    return rows.set_index("dimension").loc[[*KEYS, "mean"]].iterrows()


def _gain(row) -> str:
    sure = "*" if row.name in KEYS and row["p_holm"] < SURE else ""
    return f"{number(row['difference'], SIGNED)}{sure} {interval(row, SIGNED)}"


def _what_survives(rows: pd.DataFrame, model: str, reference: str) -> str:
    """A sentence: the dimensions with the largest and smallest difference, and the significant
    differences."""
    of_keys = rows[rows["dimension"].isin(KEYS)].sort_values("difference", ascending=False)
    real = of_keys[of_keys["p_holm"] < SURE]
    said = {
        name: f"`{name}` ({value:{SIGNED}})"
        for name, value in zip(real["dimension"], real["difference"])
    }
    better = [said[name] for name in real["dimension"][real["difference"] > 0]]
    worse = [said[name] for name in real["dimension"][real["difference"] < 0][::-1]]
    most = of_keys.dropna(subset="difference")
    line = f"`{model}`: "
    if most.empty:
        return line + "no dimension can be compared."
    top, bottom = most.iloc[0], most.iloc[-1]
    line += (
        f"largest difference on `{top['dimension']}` ({top['difference']:{SIGNED}}), smallest on"
        f" `{bottom['dimension']}` "
    )
    line += f"({bottom['difference']:{SIGNED}}). "
    if not len(real):
        return line + f"No difference from `{reference}` is significant."
    line += (
        f"Significantly better on {len(better)}"
        + (f": {', '.join(better)}" if better else "")
        + "; "
    )
    return (
        line + f"significantly worse on {len(worse)}" + (f": {', '.join(worse)}." if worse else ".")
    )


def _published(page: Page, results: Results) -> None:
    """Published results, marked as not comparable, and our own R2 under the nearest protocol for
    orientation."""
    page.heading("Published results on PercePiano")
    if results.simulated or results.ceiling is None:
        page.text("No published results apply: the clips of this evaluation are not PercePiano's.")
        return
    page.text(
        """As published, mean R2 over the 19 dimensions. **None of these is comparable** with the results above: each
        differs in its input, its folds or its model selection. The last column gives our own best R2 under the nearest
        protocol, from audio only where theirs is, for orientation only."""
    )
    rows = []
    for theirs in compare.published_results().itertuples():
        ours = results.of(
            "summary", theirs.nearest, scope="overall", metric=theirs.metric, dimension="mean"
        )
        if theirs.hears == "audio":  # compare only with our audio-only models
            ours = ours[ours["model"].map(hears_audio_alone).astype(bool)]
        best = ours.dropna(subset="value").nlargest(1, "value")
        beside = (
            "not evaluated"
            if best.empty
            else f"{theirs.nearest}: {best['model'].iloc[0]} {best['value'].iloc[0]:.3f}"
        )
        rows.append(
            {
                "system": theirs.system,
                "source": theirs.source,
                "input": theirs.hears,
                "protocol": theirs.protocol,
                "R2": f"{theirs.value:.3f}",
                "comparable": "no",
                "why not": theirs.why_not,
                "nearest of ours": beside,
            }
        )
    page.table(
        "published", "Published results, not comparable", pd.DataFrame(rows).set_index("system")
    )
