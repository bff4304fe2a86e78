"""Evaluation results -> a report folder: report, comparison page, figures and tables."""

import base64
import hashlib
import html
import platform
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

import percepiano_ast
from percepiano_ast import plots
from percepiano_ast.dimensions import HEAD_GROUPS, KEYS, PRIMARY
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation import (
    Settings,
    evaluate,
    intervals,
    others,
    reliability,
    remarks,
    significance,
    summary,
    table,
)
from percepiano_ast.evaluation.errors import PARTS
from percepiano_ast.evaluation.metrics import METRICS
from percepiano_ast.evaluation.table import FEWEST_IN_SEGMENT, SCOPES, fold_column
from percepiano_ast.plots import MOST

# What each protocol holds out. In the leaky ones the music of a held-out clip is also in training.
PROTOCOLS = {
    "content": "content groups are held out: training and evaluation share no music (primary)",
    "segment": (
        "**leaky**: segments are held out, but longer segments contain shorter ones and passages"
        " repeat"
    ),
    "performer": (
        "players are held out; performances of the same music by other players are in training"
    ),
    "movement": "movements or variation sets are held out",
    "composition": "compositions are held out",
    "random": (
        "**leaky**: clips are held out at random; performances of the same music by other players"
        " are in training"
    ),
    "upstream_piece": (
        "**leaky** and partial by design: the validation folds of the PercePiano paper's piece"
        " split"
    ),
    "upstream_performer": (
        "partial by design: the validation folds of the PercePiano paper's performer split"
    ),
    "leave_one_out": (
        "**leaky**: one clip is held out at a time; meant for identity baselines, not for models"
    ),
    "leave_player_out": (
        "**leaky**: all clips of one player of a composition are held out; performances by others"
        " are in training"
    ),
}
SIGNED = "+.3f"  # differences; "-0.000" shows on which side of zero a bound is
# Names of models with further inputs, of ensembles and of identity baselines contain one of these.
_NOT_AUDIO_ALONE = ("midi", "score", "ensemble", "identity")


def leaky(protocol: str) -> str:
    """`` (leaky)`` for a leaky protocol, else nothing."""
    return " (leaky)" if "leaky" in PROTOCOLS.get(protocol, "") else ""


def in_order(protocols) -> list[str]:
    """Protocols in the order of ``PROTOCOLS``, the primary one first; unknown protocols follow by
    name."""
    order = list(PROTOCOLS)
    return sorted(
        set(protocols), key=lambda name: (order.index(name) if name in order else len(order), name)
    )


def is_encoder(model: str) -> bool:
    """Whether the name is that of an audio-only ``ast-*`` model."""
    return model.startswith("ast-") and hears_audio_alone(model)


def hears_audio_alone(model: str) -> bool:
    """Whether the name is that of an audio-only model: without MIDI or score, not an ensemble or
    identity baseline."""
    return not any(word in model for word in _NOT_AUDIO_ALONE)


def sees_score(model: str) -> bool:
    """Whether the name is that of a score-informed model."""
    return "+score" in model


def ranking(values: pd.DataFrame) -> pd.DataFrame:
    """Rows of mean r, overall, by model, best first and NaN last. ``values``: of one protocol."""
    rows = values[
        (values["scope"] == "overall")
        & (values["metric"] == "pearson")
        & (values["dimension"] == "mean")
    ]
    return rows.set_index("model").sort_values("value", ascending=False)


def headlines(values: pd.DataFrame, pairs: pd.DataFrame, protocol: str) -> list[str]:
    """Headlines of one protocol: the best model, and the comparison of the audio encoder with its
    baselines.

    The encoder is the best pre-trained ``ast-*``; its baselines are ``mlp`` and every
    ``ast-*-scratch``.

    Args:
        values, pairs: tables ``summary`` and ``differences`` of `evaluation.evaluate`.
    """
    ranked = ranking(values[values["protocol"] == protocol])
    without = [
        f"The mean Pearson r of `{name}` is undefined: see Warnings."
        for name in ranked.index[ranked["value"].isna()]
    ]
    means = ranked.dropna(subset="value")
    where = f"Under the `{protocol}` protocol{leaky(protocol)}"
    if means.empty:
        return [f"{where}, no model can be ranked.", *without]
    best = means.iloc[0]
    of = f"the best of {len(means)} models" if len(means) > 1 else "the only model"
    first = f"{where}, {of} is `{best.name}` with a mean Pearson r of {ranged(best)}{_of(best)}."
    lines = [first, *without]
    encoders = [name for name in means.index if is_encoder(name)]
    pretrained = [name for name in encoders if not name.endswith("-scratch")]
    if not encoders:
        return [*lines, "No model with an audio encoder (`ast-*`) is ranked."]
    encoder = (pretrained or encoders)[0]
    kind = "a pre-trained" if pretrained else "an"
    lines.append(
        f"The best model with {kind} audio encoder is `{encoder}`: {ranged(means.loc[encoder])}."
    )
    rivals = [name for name in ["mlp", *encoders] if name in means.index and name != encoder]
    rivals = [name for name in rivals if name == "mlp" or name.endswith("-scratch")]
    mean = pairs[
        (pairs["protocol"] == protocol)
        & (pairs["metric"] == "pearson")
        & (pairs["scope"] == "overall")
        & (pairs["dimension"] == "mean")
    ]
    lines += [versus(encoder, rival, mean) for rival in rivals]
    if "mlp" not in means.index:
        lines.append("There is no `mlp` baseline to compare the encoder with.")
    if pretrained and not any(name.endswith("-scratch") for name in encoders):
        lines.append("There is no `ast-*-scratch` model, so the effect of pre-training is unknown.")
    return lines


def versus(model: str, rival: str, pairs: pd.DataFrame) -> str:
    """One sentence on the difference of mean r; "beats" only if the interval excludes zero.

    Args:
        pairs: the rows of mean r, overall, of one protocol, of the table ``differences``.
    """
    rows = summary.between(pairs, model, rival)
    if rows.empty or np.isnan(rows["difference"].iloc[0]):
        return (
            f"`{model}` and `{rival}` cannot be compared: they share no clips or seeds, or r is"
            " undefined."
        )
    row = rows.iloc[0]
    evidence = f"difference: 95 % interval {interval(row, SIGNED)}, p {number(row['p'], 'z.3f')}"
    size = f"{abs(row['difference']):.3f} ({evidence})"
    if row["difference"] <= 0:
        reliable = "excludes" if row["high"] < 0 else "includes"
        return (
            f"`{model}` **does not beat** `{rival}`: its mean r is lower by {size}; the interval"
            f" {reliable} zero."
        )
    if row["low"] > 0:
        return f"`{model}` **beats** `{rival}` by {size}."
    return (
        f"`{model}` **does not reliably beat** `{rival}`: its mean r is higher by {size}; the"
        " interval includes zero."
    )


def _of(row) -> str:
    return f", mean of {row['seeds']} seeds" if row["seeds"] > 1 else ""


def number(value: float, form: str = "z.2f") -> str:
    """A number as text, "n/a" for NaN; ``z`` in ``form`` avoids "-0.00"."""
    return "n/a" if np.isnan(value) else f"{value:{form}}"


def interval(row, form: str = "z.2f") -> str:
    """``[low, high]`` of a row."""
    return "no interval" if np.isnan(row["low"]) else f"[{row['low']:{form}}, {row['high']:{form}}]"


def ranged(row, form: str = "z.2f") -> str:
    """``value [low, high]`` of a row."""
    return number(row["value"], form) + ("" if np.isnan(row["low"]) else f" {interval(row, form)}")


STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1, h2, h3 { line-height: 1.25; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; padding-bottom: .3rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .86rem; margin: .4rem 0 1.6rem; }
caption, figcaption { text-align: left; color: #555; font-size: .9rem; padding: .3rem 0; }
th, td { padding: .28rem .7rem; text-align: left; border-bottom: 1px solid #e6e6e6; white-space: nowrap; }
td.words { white-space: normal; min-width: 16rem; }
th { border-bottom: 2px solid #999; } tr:nth-child(even) td { background: #f7f7f7; }
figure { margin: 1.5rem 0; } img { max-width: 100%; } code { background: #f1f1f1; padding: 0 .25em; }
pre { background: #f1f1f1; padding: .6rem .8rem; overflow-x: auto; font-size: .86rem; }
"""
_LONG = 40  # cells with more characters are wrapped
# Reproducible SVG files: by default matplotlib writes a date and random names into them.
_REPEATABLE = {"svg.hashsalt": "percepiano_ast", "svg.fonttype": "none"}


class Block(NamedTuple):
    """``kind`` is title, heading, subheading, text, code, list, table or figure."""

    kind: str
    text: str
    content: Any = None  # list: sentences; table: DataFrame of strings; figure: path from the page


class Page:
    """Blocks in order; adding a table or figure writes its files.

    Args:
        folder: parent of the page, ``figures/`` and ``tables/``.
        title: plain text.
    """

    def __init__(self, folder: Path, title: str):
        self.folder, self.blocks = folder, [Block("title", title)]

    def heading(self, text: str) -> None:
        """A section."""
        self.blocks.append(Block("heading", text))

    def subheading(self, text: str) -> None:
        """A part of a section."""
        self.blocks.append(Block("subheading", text))

    def text(self, text: str) -> None:
        """A paragraph, with `code` and **bold** as in Markdown; line breaks become spaces."""
        self.blocks.append(Block("text", " ".join(text.split())))

    def code(self, text: str) -> None:
        """A code block."""
        self.blocks.append(Block("code", text))

    def list(self, lines: list[str]) -> None:
        """Sentences as a list; an empty list adds nothing."""
        if lines:
            self.blocks.append(Block("list", "", lines))

    def table(self, name: str, caption: str, rows: pd.DataFrame) -> None:
        """A table of strings with its index as first column; also written to ``tables/NAME.csv``
        and ``.tex``."""
        folder = self.folder / "tables"
        folder.mkdir(exist_ok=True)
        plain = (
            rows.rename(index=_plain, columns=_plain)
            .map(_plain)
            .rename_axis(index=rows.index.name or "")
        )
        plain.to_csv(folder / f"{name}.csv", lineterminator="\n")
        flat = plain.reset_index()
        text = flat.to_latex(
            index=False, escape=True, caption=_latex(caption), label=f"tab:{name}", position="htbp"
        )
        (folder / f"{name}.tex").write_text(text, encoding="utf-8")
        self.blocks.append(Block("table", caption, rows))

    def figure(self, name: str, caption: str, figure: Figure) -> None:
        """A figure with a caption, written to ``figures/NAME.png`` and ``.svg``."""
        folder = self.folder / "figures"
        folder.mkdir(exist_ok=True)
        with rc_context(_REPEATABLE):
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            figure.savefig(folder / f"{name}.png", dpi=110)
        self.blocks.append(Block("figure", caption, Path("figures") / f"{name}.png"))

    def write(self, name: str) -> Path:
        """Write ``NAME.md`` and ``NAME.html``; returns the path of the HTML file, which embeds its
        figures."""
        (self.folder / f"{name}.md").write_text(_markdown(self.blocks), encoding="utf-8")
        path = self.folder / f"{name}.html"
        path.write_text(_html(self.blocks, self.folder), encoding="utf-8")
        return path


def _plain(text):
    """Text without Markdown markup."""
    return re.sub(r"\*\*|`", "", text) if isinstance(text, str) else text


def _latex(text: str) -> str:
    """A caption with LaTeX's special characters escaped."""
    return re.sub(r"([%_&#$])", r"\\\1", _plain(text))


def _markdown(blocks: list[Block]) -> str:
    marks = {"title": "# ", "heading": "## ", "subheading": "### ", "text": ""}
    parts = []
    for kind, text, content in blocks:
        if kind == "list":
            parts.append("\n".join(f"- {line}" for line in content))
        elif kind == "code":
            parts.append(f"```\n{text}\n```")
        elif kind == "table":
            rows = [
                [content.index.name or "", *content.columns],
                ["---"] * (1 + len(content.columns)),
            ]
            rows += [
                [name, *cells] for name, cells in zip(content.index, content.to_numpy().tolist())
            ]
            parts.append(f"*{text}*\n\n" + "\n".join(map(_row, rows)))
        elif kind == "figure":
            parts.append(f"![{text}]({content.as_posix()})")
        else:
            parts.append(marks[kind] + text)
    return "\n\n".join(parts) + "\n"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _html(blocks: list[Block], folder: Path) -> str:
    tags = {"title": "h1", "heading": "h2", "subheading": "h3", "text": "p"}
    parts = []
    for kind, text, content in blocks:
        if kind == "list":
            parts.append(
                "<ul>" + "".join(f"<li>{_inline(line)}</li>" for line in content) + "</ul>"
            )
        elif kind == "code":
            parts.append(f"<pre>{html.escape(text)}</pre>")
        elif kind == "table":
            parts.append(_html_table(text, content))
        elif kind == "figure":
            image = base64.b64encode((folder / content).read_bytes()).decode()
            parts.append(
                f'<figure><img alt="{html.escape(text)}" src="data:image/png;base64,{image}">'
                f"<figcaption>{_inline(text)}</figcaption></figure>"
            )
        else:
            parts.append(f"<{tags[kind]}>{_inline(text)}</{tags[kind]}>")
    head = (
        f'<meta charset="utf-8"><title>{html.escape(blocks[0].text)}</title><style>{STYLE}</style>'
    )
    return (
        f'<!doctype html><html lang="en"><head>{head}</head><body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _html_table(caption: str, rows: pd.DataFrame) -> str:
    head = "".join(f"<th>{_inline(name)}</th>" for name in [rows.index.name or "", *rows.columns])
    body = "".join(
        f"<tr>{''.join(map(_cell, [name, *cells]))}</tr>"
        for name, cells in zip(rows.index, rows.to_numpy().tolist())
    )
    table = f"<table><caption>{_inline(caption)}</caption><tr>{head}</tr>{body}</table>"
    return f'<div class="scroll">{table}</div>'


def _cell(text: str) -> str:
    kind = ' class="words"' if len(text) > _LONG else ""
    return f"<td{kind}>{_inline(text)}</td>"


def _inline(text: str) -> str:
    """Escaped text with `code`, **bold** and [links](address) converted from Markdown to HTML."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
    text = re.sub(r"\[([^\]]+)\]\(([\w./-]+)\)", r'<a href="\2">\1</a>', text)
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)


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
        predictions: validated, see `evaluation.table.validate_predictions`.
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
    page.text(agreement(values, results.ceiling))
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
    page.text(dimensions(values))
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
    page.text(differences(results.of("differences", protocol)))
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
    page.text(deadpan(gaps))
    if gaps[gaps["part"] == "gap"]["value"].notna().any():
        figure = plots.deadpan(gaps[gaps["model"].isin(models)])
        _figure(
            page, f"{protocol}_deadpan", "Human minus deadpan, mean over segments", where, figure
        )
    pairs = results.first_seed("pairwise", protocol, scope="within_segment_humans")
    pairs = pairs[pairs["min_difference"] == pairs["min_difference"].max()]
    counts = pairs[pairs["dimension"] == "mean"]["pairs"]
    page.text(pairwise(pairs))
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


def _comparison(page: Page, results: Results, wanted: str = "") -> None:
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
    each = {model: summary.between(pairs, model, reference) for model in models}
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
    for theirs in others.published_results().itertuples():
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


_PART_TITLES = {
    "all": "mean squared error",
    "noise": "rater noise",
    "passage": "level of the passage",
    "player": "level of the player",
    "clip": "individual performance",
}
_KINDS = {"people": "human performances", "nobody (deadpan)": "deadpan renderings"}
_MOST_IN_TABLES = 6


def _errors(page: Page, results: Results, protocol: str) -> None:
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
    page.table(
        f"{protocol}_errors", f"{caption} ({where})", _shown(mean.rename(columns=_PART_TITLES))
    )
    figure = plots.parts_of_error(
        found[found["model"] == best], f"Parts of the squared error of {best}\n{where}"
    )
    page.figure(f"{protocol}_errors", f"Parts of the squared error of {best} ({where})", figure)
    kinds = results.first_seed("errors_by_kind", protocol)
    kinds = kinds[kinds["model"].isin(models[:_MOST_IN_TABLES])]
    names = kinds["value"].replace(_KINDS) + " (" + kinds["clips"].astype(str) + ")"
    wide = (
        kinds.assign(name=names)
        .pivot(index="model", columns="name", values="error")
        .loc[models[:_MOST_IN_TABLES], list(dict.fromkeys(names))]
    )
    caption = (
        "Root mean squared error in standard deviations of the ratings, by kind of clip, with"
        " numbers of clips"
    )
    page.table(f"{protocol}_errors_by_kind", f"{caption} ({where})", _shown(wide))
    _shared(page, results, protocol, models[:_MOST_IN_TABLES], where)


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


LIBRARIES = ("numpy", "scipy", "pandas", "matplotlib")


def _methods(
    page: Page,
    results: Results,
    index: pd.DataFrame,
    settings: Settings,
    command: str,
    files: dict[str, str],
) -> None:
    """The section "Methods".

    Args:
        command: that repeats the evaluation; empty if it was called from Python.
        files: name -> SHA-256 of the predictions files.
    """
    page.heading("Methods")
    for text in (
        _data(results, index),
        _models(results),
        _measures(),
        _inference(settings),
        _ceiling(results),
    ):
        page.text(text)
    if command:
        page.text("Command:")
        page.code(command)
    if files:
        rows = pd.DataFrame(
            {"SHA-256": [f"`{digest[:16]}`" for digest in files.values()]}, list(files)
        )
        page.table(
            "files", "Evaluated predictions, with the first 16 digits of their checksums", rows
        )
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    page.text(
        f"Versions: percepiano_ast {percepiano_ast.__version__}, Python"
        f" {platform.python_version()}, {versions}."
    )


def _data(results: Results, index: pd.DataFrame) -> str:
    clips = index[index["clip"].isin(results.predictions["clip"])]
    people = int(clips["human"].sum())
    protocols = []
    for protocol in in_order(results.predictions["protocol"]):
        folds = index[fold_column(protocol)]
        words = PROTOCOLS.get(protocol, "defined by the index").replace("**", "")
        protocols.append(f"Protocol `{protocol}` ({folds[folds >= 0].nunique()} folds): {words}.")
    names = "; ".join(
        f"{name}: {', '.join(f'`{key}`' for key in keys)}" for name, keys in PRIMARY.items()
    )
    return f"""
        **Data.** {len(clips):,} clips ({people:,} human performances and {len(clips) - people:,} deadpan renderings of the
        score) of {clips["segment"].nunique()} segments in {clips["content_group"].nunique()} content groups (segments that share
        music), each with mean ratings from 0 to 1 on {len(KEYS)} dimensions. {"The ratings are simulated." * results.simulated}
        {" ".join(protocols)} Primary dimensions: {names}. PercePiano does not rate musical expression; two of its
        dimensions represent it."""


def _models(results: Results) -> str:
    seeds = results.predictions.groupby("model")["seed"].nunique()
    names = ", ".join(f"`{model}` ({n} seed{'s' * (n > 1)})" for model, n in seeds.items())
    return f"""
        **Models.** {names}. Every clip is predicted once, by a model that was not trained on its fold; the held-out folds of a
        run are pooled before metrics are computed."""


def _measures() -> str:
    return f"""
        **Metrics.** Pearson's r, Spearman's rho, R2 relative to the mean of the ratings, mean absolute error (unit of the
        ratings) and Lin's concordance correlation, per dimension; `mean` is the plain mean over the 19 dimensions. Scopes: all
        clips; human performances only; within segment, where ratings and predictions are centred on the mean of their segment
        and pooled, over segments of at least {FEWEST_IN_SEGMENT} clips; and within segment for human performances only. The
        correlation of a constant is reported as undefined, never as zero."""


def _inference(settings: Settings) -> str:
    return f"""
        **Inference.** {100 * intervals.LEVEL:.0f} % intervals are from the jackknife over content groups with Satterthwaite's
        degrees of freedom, for correlations on Fisher's z scale. In simulations with PercePiano's group sizes their coverage was
        95.0 to 95.7 % (Pearson's r), 93.0 to 94.4 % (mean absolute error) and 95.0 to 96.3 % (R2); that of a percentile bootstrap
        over groups was 90.0 to 92.8 %. Models are compared on their common clips by a studentised permutation test that exchanges
        entire content groups ({settings.n_permutations:,} exchanges, seed {settings.seed}), with Holm's correction over the 19
        dimensions. In simulations its level was 4.9 to 5.4 % for equally clustered errors and up to 8.1 % otherwise: a p near
        0.05 between very different models is weak evidence. Models with several seeds are compared by a t test whose error
        includes content groups and seeds. The minimum detectable difference is for {100 * significance.POWER:.0f} % power. Pairs
        of performances are compared if their ratings differ by at least {settings.min_difference:.3f}."""


def _ceiling(results: Results) -> str:
    if results.ceiling is None:
        return "**Noise ceiling.** Unknown for these ratings."
    return f"""
        **Noise ceiling.** Square root of the split-half reliability of the mean rating, Spearman-Brown corrected: the raters of a
        clip are split at random into two halves (mean over the dimensions, overall: {results.ceiling["overall"].mean():.2f})."""


def command_of(files: Sequence[str | Path], options: list[str]) -> str:
    """The command line that evaluates these files."""
    return shlex.join(["python", "-m", "percepiano_ast", "evaluate", *map(str, files), *options])


def checksums(files: Sequence[str | Path]) -> dict[str, str]:
    """SHA-256 of files by name."""
    return {Path(file).name: hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files}


# With fewer groups the intervals themselves are uncertain.
FEW_GROUPS = 20


def evaluate_files(
    paths: Sequence[str | Path],
    out: str | Path,
    index: str | Path | None = None,
    partial: bool = False,
    simulated: bool = False,
    settings: Settings = Settings(),
    ceiling: str | Path | None = None,
    reference: str = "",
) -> Path:
    """Evaluate predictions files together and write the report: the command ``evaluate``.

    Without ``index`` the clips must be PercePiano's with the published ratings.

    Args:
        reference: reference model of the comparison page, see `reference_of`.

    Raises:
        InputError: see ``table.read_predictions``, ``table.load_index``,
            ``table.validate_predictions`` and ``reliability.load_ceiling``; an unknown reference.
    """
    if not paths:
        raise InputError("no predictions to evaluate; give at least one predictions CSV.")
    rows = pd.concat([table.read_predictions(path) for path in paths], ignore_index=True)
    facts = table.load_index(index)
    rows = table.validate_predictions(rows, None if index is None else facts, partial=partial)
    known = None if simulated and ceiling is None else reliability.load_ceiling(facts, ceiling)
    options = ["--out", str(out)]
    for name, value in (("index", index), ("ceiling", ceiling), ("reference", reference)):
        options += [f"--{name}", str(value)] if value else []
    standard = Settings()
    for name, flag in (
        ("n_permutations", "permutations"),
        ("seed", "seed"),
        ("min_difference", "min-difference"),
    ):
        value = getattr(settings, name)
        options += [f"--{flag}", str(value)] if value != getattr(standard, name) else []
    command = command_of(paths, options + ["--partial"] * partial)
    return write(
        rows,
        facts,
        out,
        simulated=simulated,
        settings=settings,
        ceiling=known,
        reference=reference,
        command=command,
        files=checksums(paths),
    )


def write(
    predictions: pd.DataFrame,
    index: pd.DataFrame,
    out_dir: str | Path,
    *,
    simulated: bool = False,
    settings: Settings = Settings(),
    ceiling: pd.DataFrame | None = None,
    reference: str = "",
    command: str = "",
    files: dict[str, str] | None = None,
    title: str = "Evaluation of predicted performance ratings",
) -> Path:
    """Evaluate and write report, comparison page, figures and tables into ``out_dir``.

    Files of these names from an earlier report are overwritten; other files in ``out_dir`` are not
    changed.

    Args:
        simulated: whether the ratings are simulated; title, captions and figures are marked.
        ceiling: the noise ceiling (19 dimensions, scopes), None if unknown.
        reference: see `reference_of`.
        command, files: see `write`.

    Returns:
        The path of report.html, which embeds its figures.

    Raises:
        InputError: see ``table.validate_predictions`` (runs may be partial); ``out_dir`` is a file;
            an unknown reference.
    """
    out = Path(out_dir)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a directory for the report.")
    predictions = table.validate_predictions(predictions, index, partial=True)
    if reference:
        reference_of(sorted(predictions["model"].unique()), reference)
    results = Results(
        evaluate(predictions, index, settings, ceiling), predictions, ceiling, simulated
    )
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in results.tables.items():
        rows.to_csv(out / f"{name}.csv", index=False, float_format="%.6f", lineterminator="\n")
    mark = " (simulated ratings)" * simulated
    beside = Page(out, f"Comparison of models{mark}")
    _comparison(beside, results, reference)
    beside.write("comparison")
    page = Page(out, title + mark)
    _summary(page, results, index)
    for number, protocol in enumerate(in_order(predictions["protocol"])):
        protocol_section(page, results, protocol, whole=number == 0)
        if number == 0:
            _errors(page, results, protocol)
    _methods(page, results, index, settings, command, files or {})
    return page.write("report")


def _summary(page: Page, results: Results, index: pd.DataFrame) -> None:
    """Headlines, notes on the numbers, and warnings."""
    predictions, tables = results.predictions, results.tables
    names = in_order(predictions["protocol"])
    if results.simulated:
        page.text(
            "**The ratings are simulated**: the results show that the pipeline works, not how well"
            " models rate real performances."
        )
    page.heading("Summary")
    page.list(
        [
            line
            for name in names
            for line in headlines(tables["summary"], tables["differences"], name)
        ]
    )
    page.text("Comparison of all models, with published results: [html](html).")
    page.heading("Notes")
    groups = index[index["clip"].isin(predictions["clip"])]["content_group"].nunique()
    notes = [
        *(f"Protocol `{name}`: {PROTOCOLS.get(name, 'defined by the index')}." for name in names),
        (
            "Intervals are 95 % over content groups; p is two-sided and not corrected for the"
            " number of models. See Methods for procedures and their simulated coverage."
        ),
    ]
    if groups < FEW_GROUPS:
        notes.append(
            f"With only {groups} content group{'s' * (groups != 1)}, intervals are uncertain or"
            " undefined: interpret differences with care."
        )
    if (tables["summary"]["seeds"] == 1).all():
        notes.append(
            "Single seed: the intervals do not include the variation between training runs."
        )
    if any(model.startswith("identity-") for model in predictions["model"]):
        notes.append(
            "`identity-segment` predicts each clip from the other clips of its segment: if those"
            " are in training, its r within segment is negative by construction and not meaningful."
        )
    page.list(notes + _incomplete(predictions, index))
    if warnings := remarks(predictions, index, tables["metrics"]):
        page.heading("Warnings")
        page.list(warnings)


def _incomplete(predictions: pd.DataFrame, index: pd.DataFrame) -> list[str]:
    """One sentence for each run that does not cover its protocol."""
    lines = []
    for (model, protocol, seed), clips in predictions.groupby(table.RUN)["clip"]:
        of = int((index[table.fold_column(protocol)] >= 0).sum())
        if (n := clips.nunique()) < of:
            lines.append(
                f"**Partial**: `{model}`, `{protocol}`, seed {seed} covers {n} of {of} held-out"
                " clips."
            )
    return lines
