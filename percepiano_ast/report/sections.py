"""The sections of a report: one per protocol, complete for the first, shorter for the others."""

from dataclasses import dataclass

import pandas as pd

from percepiano_ast import plots
from percepiano_ast.dimensions import HEAD_GROUPS, KEYS, PRIMARY
from percepiano_ast.evaluation.metrics import METRICS
from percepiano_ast.evaluation.predictions import SCOPES
from percepiano_ast.plots import MOST
from percepiano_ast.report import answers
from percepiano_ast.report.page import Page
from percepiano_ast.report.wording import (
    SIGNED,
    interval,
    leaky,
    number,
    ranged,
    ranking,
    sees_score,
)

METRIC_NAMES = {
    "pearson": "Pearson r",
    "spearman": "Spearman rho",
    "r2": "R2",
    "mae": "MAE",
    "ccc": "CCC",
}
SCOPE_TITLES = {
    "overall": "overall",
    "within_segment": "within segment",
    "humans_only": "humans only",
    "within_segment_humans": "within segment, humans only",
}


@dataclass(frozen=True)
class Results:
    """Results of an evaluation and their context.

    Attributes:
        tables: of `evaluation.evaluate`.
        predictions: validated, see `evaluation.predictions.validate_predictions`.
        ceiling: noise ceiling (19 dimensions, scopes), None if unknown.
        simulated: whether the ratings are simulated.
    """

    tables: dict[str, pd.DataFrame]
    predictions: pd.DataFrame
    ceiling: pd.DataFrame | None
    simulated: bool

    def of(self, name: str, protocol: str, **equal) -> pd.DataFrame:
        """The rows of a table with this protocol and these column values."""
        table = self.tables[name]
        for column, value in {"protocol": protocol, **equal}.items():
            table = table[table[column] == value]
        return table

    def where(self, protocol: str) -> str:
        """Protocol and marks for captions."""
        return f"{protocol} protocol{leaky(protocol)}" + (
            ", SIMULATED ratings" if self.simulated else ""
        )

    def ceiling_of(self, scope: str) -> pd.Series | None:
        """Noise ceiling of the 19 dimensions in a scope, None if unknown."""
        return None if self.ceiling is None or scope not in self.ceiling else self.ceiling[scope]

    def first_seed(self, name: str, protocol: str, **equal) -> pd.DataFrame:
        """The rows of each model's lowest seed, for tables with one row per seed."""
        rows = self.of(name, protocol, **equal)
        return rows[rows["seed"] == rows.groupby("model")["seed"].transform("min")]


def protocol_section(page: Page, results: Results, protocol: str, whole: bool) -> None:
    """The section of one protocol; ``whole`` adds the parts for the primary protocol."""
    where = results.where(protocol)
    page.heading(where[0].upper() + where[1:])
    models = list(ranking(results.of("summary", protocol)).index)
    _agreement(page, results, protocol, models)
    _dimensions(page, results, protocol, models, whole)
    _differences(page, results, protocol)
    if whole:
        _performers(page, results, protocol)
        _uncertainty(page, results, protocol)
        _spread(page, results, protocol)
        _clouds(page, results, protocol, models)


def _drawn(page: Page, values: pd.DataFrame, models: list[str]) -> pd.DataFrame:
    """The rows of the best models; the page says so if some are not drawn."""
    if len(models) <= MOST:
        return values
    page.text(
        f"Figures show the best {MOST} of {len(models)} models by mean Pearson r; tables list all."
    )
    return values[values["model"].isin(models[:MOST])]


def _agreement(page: Page, results: Results, protocol: str, models: list[str]) -> None:
    where, values = results.where(protocol), results.of("summary", protocol)
    page.subheading("Agreement with the ratings")
    page.text(answers.agreement(values, results.ceiling))
    mean = values[values["dimension"] == "mean"].set_index(["model", "scope", "metric"])
    rows = {}
    for model in models:
        row = {"seeds": str(mean.loc[(model, "overall", "pearson"), "seeds"])}
        row |= {
            SCOPE_TITLES[scope]: ranged(mean.loc[(model, scope, "pearson")]) for scope in SCOPES
        }
        row |= {
            METRIC_NAMES[name]: number(mean.loc[(model, "overall", name), "value"], "z.3f")
            for name in METRICS[1:]
        }
        rows[model] = row
    table = pd.DataFrame.from_dict(rows, orient="index")
    if results.ceiling is not None:
        above = {
            SCOPE_TITLES[scope]: f"{results.ceiling[scope].mean():.2f}"
            for scope in SCOPES
            if scope in results.ceiling
        }
        table.loc["noise ceiling"] = {name: above.get(name, "") for name in table.columns}
    caption = (
        "Mean over the 19 dimensions: Pearson r in each scope with 95 % intervals, the other"
        " metrics overall"
    )
    page.table(f"{protocol}_agreement", f"{caption} ({where})", table)
    if informed := [model for model in models if sees_score(model)]:
        page.text(
            f"{', '.join(f'`{model}`' for model in informed)}: score-informed. Models without the"
            " score have less information and are not directly comparable."
        )
    drawn = _drawn(page, values, models)
    figure = plots.by_scope(drawn, results.ceiling)
    _figure(page, f"{protocol}_scopes", "Mean Pearson r by scope", where, figure)


def _dimensions(
    page: Page, results: Results, protocol: str, models: list[str], whole: bool
) -> None:
    where, values = results.where(protocol), results.of("summary", protocol)
    page.subheading("Agreement per dimension")
    page.text(answers.dimensions(values))
    overall = values[(values["scope"] == "overall") & (values["metric"] == "pearson")].set_index(
        ["model", "dimension"]
    )
    keys = [*KEYS, *HEAD_GROUPS, "mean"]
    each = pd.DataFrame(
        {model: [ranged(overall.loc[(model, key)]) for key in keys] for model in models}, keys
    )
    if (ceiling := results.ceiling_of("overall")) is not None:
        best = {key: overall.loc[(models[0], key), "value"] for key in KEYS}
        blank = [""] * len(HEAD_GROUPS)
        each["noise ceiling"] = [
            *(f"{value:.2f}" for value in ceiling),
            *blank,
            f"{ceiling.mean():.2f}",
        ]
        shares = [
            number(best[key] / ceiling[key] if ceiling[key] > 0 else float("nan")) for key in KEYS
        ]
        share = results.first_seed(
            "ceiling_share", protocol, scope="overall", dimension="mean", model=models[0]
        )
        each["share of ceiling, first model"] = [*shares, *blank, ranged(share.iloc[0])]
    primary = {key for keys in PRIMARY.values() for key in keys}
    groups = {name: f"head group {name}" for name in HEAD_GROUPS}
    each.index = [f"**{key}**" if key in primary else groups.get(key, key) for key in keys]
    caption = "Pearson r per dimension, overall; primary dimensions in bold"
    page.table(f"{protocol}_dimensions", f"{caption} ({where})", each)
    drawn = values[values["model"].isin(models[:MOST])]
    scopes = {"overall": "Pearson r per dimension"}
    if whole:
        scopes["within_segment_humans"] = "Pearson r per dimension within segment, humans only"
    for scope, words in scopes.items():
        figure = plots.pearson_by_dimension(drawn, scope, results.ceiling_of(scope))
        _figure(page, f"{protocol}_pearson_{scope}", words, where, figure)
    if whole:
        _figure(
            page,
            f"{protocol}_heatmap",
            "Pearson r per dimension and model",
            where,
            plots.heatmap(drawn),
        )


def _differences(page: Page, results: Results, protocol: str) -> None:
    pairs = results.of("differences", protocol, scope="overall", metric="pearson", dimension="mean")
    if pairs.empty:
        return
    where = results.where(protocol)
    page.subheading("Differences between models")
    page.text(answers.differences(results.of("differences", protocol)))
    rows = pd.DataFrame(
        {
            "model b": pairs["model_b"],
            "seeds": pairs["seeds"],
            "r of a minus r of b": [number(value, SIGNED) for value in pairs["difference"]],
            "95 % interval": [interval(row, SIGNED) for _, row in pairs.iterrows()],
            "p": [number(value, "z.3f") for value in pairs["p"]],
            "minimum detectable": [number(value, "z.3f") for value in pairs["detectable"]],
        }
    ).set_index(pairs["model_a"].rename("model a"))
    caption = (
        "Paired differences in mean Pearson r, overall; minimum detectable difference at 80 % power"
    )
    page.table(f"{protocol}_differences", f"{caption} ({where})", rows)


def _performers(page: Page, results: Results, protocol: str) -> None:
    where, gaps = results.where(protocol), results.first_seed("deadpan", protocol)
    page.subheading("Human versus deadpan, and pairs of performances")
    models = _best_of(gaps, results, protocol)
    page.text(answers.deadpan(gaps))
    if gaps[gaps["part"] == "gap"]["value"].notna().any():
        figure = plots.deadpan(gaps[gaps["model"].isin(models)])
        _figure(
            page, f"{protocol}_deadpan", "Human minus deadpan, mean over segments", where, figure
        )
    pairs = results.first_seed("pairwise", protocol, scope="within_segment_humans")
    pairs = pairs[pairs["min_difference"] == pairs["min_difference"].max()]
    counts = pairs[pairs["dimension"] == "mean"]["pairs"]
    page.text(answers.pairwise(pairs))
    if pairs["value"].notna().any():
        least = pairs["min_difference"].iloc[0]
        words = "Correctly ordered pairs of human performances of the same segment"
        words += f"; {counts.max():,} pairs over 19 dimensions, ratings at least {least:.3f} apart"
        figure = plots.pairwise(pairs[pairs["model"].isin(models)])
        _figure(page, f"{protocol}_pairwise", words, where, figure)


def _uncertainty(page: Page, results: Results, protocol: str) -> None:
    found = results.first_seed("calibration", protocol)
    if found.empty:
        return
    where, names = results.where(protocol), list(dict.fromkeys(found["metric"]))
    page.subheading("Calibration of the uncertainty")
    mean = found[found["dimension"] == "mean"].set_index(["model", "metric"])
    models = list(dict.fromkeys(found["model"]))
    rows = pd.DataFrame(
        {name: [ranged(mean.loc[(model, name)]) for model in models] for name in names}, models
    )
    page.table(
        f"{protocol}_calibration", f"Calibration, mean over the 19 dimensions ({where})", rows
    )
    figure = plots.calibration(found[found["model"].isin(_best_of(found, results, protocol))])
    _figure(page, f"{protocol}_calibration", "Coverage of prediction intervals", where, figure)


def _spread(page: Page, results: Results, protocol: str) -> None:
    where = results.where(protocol)
    page.subheading("Variation over folds and seeds")
    folds = results.first_seed(
        "folds", protocol, scope="overall", metric="pearson", dimension="mean"
    )
    wide = folds.pivot(index="model", columns="fold", values="value")
    rows = wide.map(number).rename(columns=lambda fold: f"fold {fold}").rename_axis(None)
    caption = (
        "Mean Pearson r of each held-out fold; folds differ in their music, so the spread does not"
        " estimate the error"
    )
    page.table(f"{protocol}_folds", f"{caption} ({where})", rows)
    several = results.of("summary", protocol, scope="overall", metric="pearson", dimension="mean")
    several = several[several["seeds"] > 1]
    if len(several):
        rows = pd.DataFrame(
            {
                "seeds": several["seeds"].astype(str),
                "mean Pearson r": [ranged(row, "z.3f") for _, row in several.iterrows()],
                "SD between seeds": [number(value, "z.4f") for value in several["seed_sd"]],
            }
        ).set_index(several["model"].rename(None))
        page.table(f"{protocol}_seeds", f"Models trained with several seeds ({where})", rows)


def _clouds(page: Page, results: Results, protocol: str, models: list[str]) -> None:
    page.subheading("Predictions against ratings")
    where, rows = results.where(protocol), results.predictions
    rows = rows[(rows["protocol"] == protocol) & rows["model"].isin(models[:MOST])]
    rows = rows[rows["seed"] == rows.groupby("model")["seed"].transform("min")]
    for name, keys in PRIMARY.items():
        for key in keys:
            words = f"{name}: predictions against ratings of {key}"
            _figure(page, f"{protocol}_scatter_{key}", words, where, plots.scatter(rows, key))


def _best_of(table: pd.DataFrame, results: Results, protocol: str) -> list[str]:
    """The best models of a table, at most as many as a figure shows."""
    return [
        name
        for name in ranking(results.of("summary", protocol)).index
        if name in set(table["model"])
    ][:MOST]


def _figure(page: Page, name: str, caption: str, where: str, figure) -> None:
    figure.suptitle(f"{caption}\n{where}", fontsize="medium")
    page.figure(name, f"{caption} ({where})", figure)
