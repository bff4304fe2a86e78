"""The section on the decomposition of the errors."""

import pandas as pd

from percepiano_ast import plots
from percepiano_ast.evaluation.analysis import PARTS
from percepiano_ast.report.page import Page
from percepiano_ast.report.sections import Results
from percepiano_ast.report.wording import hears_audio_alone, ranking

_TITLES = {
    "all": "mean squared error",
    "noise": "rater noise",
    "passage": "level of the passage",
    "player": "level of the player",
    "clip": "individual performance",
}
_KINDS = {"people": "human performances", "nobody (deadpan)": "deadpan renderings"}
_MOST = 6


def write(page: Page, results: Results, protocol: str) -> None:
    """Parts of the squared error, the error by kind of clip, and the correlation of the models'
    errors."""
    where = results.where(protocol)
    found = results.first_seed("errors", protocol)
    models = [
        name
        for name in ranking(results.of("summary", protocol)).index
        if name in set(found["model"])
    ]
    mean = found[found["dimension"] == "mean"].set_index("model").loc[models, ["all", *PARTS]]
    page.subheading("Decomposition of the errors")
    best = next((name for name in models if hears_audio_alone(name)), models[0])
    page.text(_in_words(mean.loc[best], best, results.ceiling is not None))
    caption = (
        "Mean squared error in units of the ratings' variance, and its parts, mean over the 19"
        " dimensions"
    )
    page.table(f"{protocol}_errors", f"{caption} ({where})", _shown(mean.rename(columns=_TITLES)))
    figure = plots.parts_of_error(
        found[found["model"] == best], f"Parts of the squared error of {best}\n{where}"
    )
    page.figure(f"{protocol}_errors", f"Parts of the squared error of {best} ({where})", figure)
    kinds = results.first_seed("errors_by_kind", protocol)
    kinds = kinds[kinds["model"].isin(models[:_MOST])]
    names = kinds["value"].replace(_KINDS) + " (" + kinds["clips"].astype(str) + ")"
    wide = (
        kinds.assign(name=names)
        .pivot(index="model", columns="name", values="error")
        .loc[models[:_MOST], list(dict.fromkeys(names))]
    )
    caption = (
        "Root mean squared error in standard deviations of the ratings, by kind of clip, with"
        " numbers of clips"
    )
    page.table(f"{protocol}_errors_by_kind", f"{caption} ({where})", _shown(wide))
    _shared(page, results, protocol, models[:_MOST], where)


def _shared(page: Page, results: Results, protocol: str, models: list[str], where: str) -> None:
    pairs = results.of("shared_errors", protocol)
    pairs = pairs[pairs["model_a"].isin(models) & pairs["model_b"].isin(models)]
    if pairs.empty:
        return
    pairs = pairs[pairs["seed"] == pairs["seed"].min()]
    both = pd.concat([pairs, pairs.rename(columns={"model_a": "model_b", "model_b": "model_a"})])
    wide = both.pivot(index="model_a", columns="model_b", values="correlation")
    names = [name for name in models if name in wide.index]
    wide = wide.loc[names, names].rename_axis(None).rename_axis(None, axis=1)
    caption = (
        "Correlation between the errors of two models, mean over dimensions: near 1, both make the"
        " same errors"
    )
    page.table(f"{protocol}_shared_errors", f"{caption} ({where})", _shown(wide))


def _in_words(row: pd.Series, model: str, known: bool) -> str:
    text = f"`{model}` leaves {row['all']:.2f} of the ratings' variance unexplained"
    if not known:
        return text + "; the share of rater noise is unknown."
    left = row[["passage", "player", "clip"]]
    if not left.sum():
        return text + ", no more than the rater noise."
    shares = 100 * left / left.sum()
    return (
        f"{text}; {row['noise']:.2f} is irreducible rater noise. Of the rest,"
        f" {shares['passage']:.0f} % is the level of held-out passages, {shares['player']:.0f} %"
        f" the level of players, and {shares['clip']:.0f} % the individual performance."
    )


def _shown(table: pd.DataFrame) -> pd.DataFrame:
    return (
        table.map(lambda value: "" if pd.isna(value) else f"{value:.2f}")
        .rename_axis(None)
        .rename_axis(None, axis=1)
    )
