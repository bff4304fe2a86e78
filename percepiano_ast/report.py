"""Evaluation results -> metrics.csv, comparisons.csv, report.md, report.html and figures.

The report is one list of blocks, rendered twice. Every sentence about a model is made from the numbers.
"""

import base64
import html
import re
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from percepiano_ast import plots
from percepiano_ast.config import InputError
from percepiano_ast.dimensions import KEYS, PRIMARY
from percepiano_ast.evaluation import metrics, significance

# What each protocol holds out. In the leaky ones the music of a held-out clip is heard in training.
PROTOCOLS = {
    "content": "whole content groups are held out: no music is shared with training (primary)",
    "segment": "**leaky**: segments are held out, but longer segments contain shorter ones and passages repeat",
    "performer": "players are held out, their music is not: it is heard in training from other players",
    "movement": "whole movements or variation sets are held out",
    "composition": "whole compositions are held out",
    "random": "**leaky**: clips are held out at random; the same music from other players is in training",
    "upstream_piece": "**leaky** and partial by design: the validation folds of the PercePiano paper's piece split",
    "upstream_performer": "partial by design: the validation folds of the PercePiano paper's performer split",
}
# Clustered bootstraps are too narrow with few groups. Between equal models, intervals of the difference of one
# dimension's r left out zero in 10 % (6 groups), 9 % (12), 8 % (24) and 7 % (47) of simulated tables, not in 5 %.
FEW_GROUPS = 20
SIGNED = "+.3f"  # differences; "-0.000" tells on which side of zero a bound lies
_NOT_AUDIO_ALONE = ("midi", "score", "ensemble")  # such models say so in their name

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1, h2, h3 { line-height: 1.25; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; padding-bottom: .3rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .86rem; margin: .4rem 0 1.6rem; }
caption, figcaption { text-align: left; color: #555; font-size: .9rem; padding: .3rem 0; }
th, td { padding: .28rem .7rem; text-align: left; border-bottom: 1px solid #e6e6e6; white-space: nowrap; }
th { border-bottom: 2px solid #999; } tr:nth-child(even) td { background: #f7f7f7; }
figure { margin: 1.5rem 0; } img { max-width: 100%; } code { background: #f1f1f1; padding: 0 .25em; }
"""


class Block(NamedTuple):
    """One piece of the report: ``kind`` is title, heading, text, list, table or figure."""

    kind: str
    text: str
    content: object = None  # list: sentences; table: DataFrame; figure: path from the report


def evaluate_files(
    paths: list[str | Path], out: str | Path, index: str | Path | None = None, partial: bool = False,
    simulated: bool = False, n_bootstrap: int = 1000, seed: int = 0,
) -> Path:  # fmt: skip
    """Evaluate predictions files together and write the report: the command ``evaluate``.

    Raises:
        InputError: see ``metrics.read_predictions``, ``metrics.load_index`` and ``metrics.validate_predictions``.
    """
    if not paths:
        raise InputError("no predictions to evaluate; name at least one predictions CSV.")
    table = pd.concat([metrics.read_predictions(path) for path in paths], ignore_index=True)
    facts = metrics.load_index(index)
    table = metrics.validate_predictions(table, facts, partial=partial)
    return write(table, facts, out, simulated=simulated, n_bootstrap=n_bootstrap, seed=seed)


def write(
    predictions: pd.DataFrame, index: pd.DataFrame, out_dir: str | Path, *, simulated: bool = False,
    n_bootstrap: int = 1000, seed: int = 0, title: str = "How well are piano performances rated?",
) -> Path:  # fmt: skip
    """Evaluate and write metrics.csv, comparisons.csv, report.md, report.html and figures/ into ``out_dir``.

    Files of these names from an earlier report are overwritten; nothing else in ``out_dir`` is touched.

    Args:
        simulated: the ratings do not come from people: title, captions and figures say so.

    Returns:
        The path of report.html, which holds its figures and can be sent as it is.

    Raises:
        InputError: see ``metrics.validate_predictions`` (coverage is not asked for here); ``out_dir`` is a file.
    """
    out = Path(out_dir)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; name a directory for the report.")
    predictions = metrics.validate_predictions(predictions, index, partial=True)
    values = metrics.evaluate(predictions, index, n_bootstrap=n_bootstrap, seed=seed)
    pairs = significance.compare(predictions, index, n_bootstrap=n_bootstrap, seed=seed)
    (out / "figures").mkdir(parents=True, exist_ok=True)
    for table, name in ((values, "metrics.csv"), (pairs, "comparisons.csv")):
        table.to_csv(out / name, index=False, float_format="%.6f", lineterminator="\n")
    if simulated:
        title += " (simulated ratings)"
    blocks = [Block("title", title), *_summary(predictions, index, values, pairs, simulated, n_bootstrap)]
    for protocol, run_seed in _experiments(values):
        blocks += _experiment(protocol, run_seed, predictions, index, values, pairs, simulated, out)
    (out / "report.md").write_text(_markdown(blocks), encoding="utf-8")
    (out / "report.html").write_text(_html(blocks, out), encoding="utf-8")
    return out / "report.html"


def headlines(values: pd.DataFrame, pairs: pd.DataFrame, protocol: str, seed: int) -> list[str]:
    """What the numbers of one protocol and seed say: the best model; does the audio encoder beat its rivals?

    The encoder is the best pre-trained ``ast-*``; its rivals are ``mlp`` and every ``ast-*-scratch``.
    """
    means = _part(values, protocol, seed, scope="overall", metric="pearson", dimension="mean").set_index("model")
    undefined = means.index[means["value"].isna()]
    without = [f"`{name}` has no mean Pearson r: see the warnings." for name in undefined]
    means = means.dropna(subset="value").sort_values("value", ascending=False)
    where = f"Under the `{protocol}` protocol{_leaky(protocol)} (seed {seed})"
    if means.empty:
        return [f"{where} no model can be ranked.", *without]
    best = means.iloc[0]
    first = f"{where} the best of {len(means)} model(s) is `{best.name}` with a mean Pearson r of {_ranged(best)}."
    lines = [first, *without]
    encoders = [name for name in means.index if _is_encoder(name)]
    pretrained = [name for name in encoders if not name.endswith("-scratch")]
    if not encoders:
        return [*lines, "No audio encoder (`ast-*`) is among the ranked models."]
    encoder = (pretrained or encoders)[0]
    lines.append(f"The best {'pre-trained ' if pretrained else ''}audio encoder is `{encoder}`: "
                 f"{_ranged(means.loc[encoder])}.")
    rivals = [name for name in ["mlp", *encoders] if name in means.index and name != encoder]
    rivals = [name for name in rivals if name == "mlp" or name.endswith("-scratch")]
    lines += [_versus(encoder, rival, _part(pairs, protocol, seed)) for rival in rivals]
    if "mlp" not in means.index:
        lines.append("There is no `mlp` baseline to compare it with.")
    if pretrained and not any(name.endswith("-scratch") for name in encoders):
        lines.append("There is no `ast-*-scratch` model: what pre-training is worth is not known.")
    return lines


def _versus(model: str, rival: str, pairs: pd.DataFrame) -> str:
    """One sentence on the paired difference of mean r; "beats" only where the interval leaves out zero."""
    rows = pairs[(pairs["scope"] == "overall") & (pairs["dimension"] == "mean")]
    turned = rows.rename(columns={"model_a": "model_b", "model_b": "model_a"})
    turned = turned.assign(difference=-rows["difference"], low=-rows["high"], high=-rows["low"])
    both = pd.concat([rows, turned]).set_index(["model_a", "model_b"])
    row = both.loc[(model, rival)]
    if np.isnan(row["difference"]):
        return f"`{model}` and `{rival}` cannot be compared: no common clips, or r is undefined."
    evidence = f"difference: 95 % interval {_interval(row, SIGNED)}, p {_number(row['p'], 'z.3f')}"
    size = f"{abs(row['difference']):.3f} ({evidence})"
    if row["difference"] <= 0:
        reliable = ", reliably so" if row["high"] < 0 else ", within the noise"
        return f"`{model}` **does not beat** `{rival}`: it is behind by {size}{reliable}."
    if row["low"] > 0:
        return f"`{model}` **beats** `{rival}` by {size}."
    return f"`{model}` **does not reliably beat** `{rival}`: it is ahead by {size}, within the noise."


def _summary(predictions, index, values, pairs, simulated: bool, n_bootstrap: int) -> list[Block]:
    """Headlines and what must be known to read the numbers."""
    experiments = _experiments(values)
    lines = [line for experiment in experiments for line in headlines(values, pairs, *experiment)]
    blocks = [Block("heading", "In short"), Block("list", "", lines)]
    if simulated:
        blocks.insert(0, Block("text", "**The ratings are simulated**, not given by people: the figures show that the "
                               "pipeline works, not how well anything rates real performances."))  # fmt: skip
    clips = index[index["clip"].isin(predictions["clip"])]
    groups = clips["content_group"].nunique()
    notes = [
        f"{len(clips)} clips ({int((~clips['human']).sum())} deadpan score renderings), "
        f"{clips['segment'].nunique()} segments, {groups} content groups, {len(KEYS)} dimensions.",
        f"Intervals are 95 % percentile bootstraps over content groups ({n_bootstrap} resamples); p is two-sided and "
        "not corrected for the number of comparisons.",
        *(f"Protocol `{name}`: {PROTOCOLS.get(name, 'defined by the index')}."
          for name in dict.fromkeys(protocol for protocol, _ in experiments)),
        "Primary dimensions: " + "; ".join(f"{name}: {', '.join(f'`{key}`' for key in keys)}" for name, keys
                                           in PRIMARY.items()) + ". Musical expression is no column of PercePiano; "
        "these two dimensions stand for it.",
    ]  # fmt: skip
    if groups < FEW_GROUPS:
        notes.append(f"With only {groups} content group(s), intervals are too narrow or absent and p too small (twice "
                     "the nominal error at 6 to 12 groups): read differences with care.")
    if len({seed for _, seed in experiments}) == 1:
        notes.append("Single seed: the spread between training runs is not known and not in the intervals.")
    notes += _incomplete(predictions, index)
    blocks += [Block("heading", "How to read this"), Block("list", "", notes)]
    if warnings := metrics.undefined(values):
        blocks += [Block("heading", "Warnings"), Block("list", "", warnings)]
    return blocks


def _incomplete(predictions: pd.DataFrame, index: pd.DataFrame) -> list[str]:
    """One sentence for each run that does not cover its protocol."""
    lines = []
    for (model, protocol, seed), clips in predictions.groupby(metrics.RUN)["clip"]:
        of = int((index[metrics.fold_column(protocol)] >= 0).sum())
        if (n := clips.nunique()) < of:
            lines.append(f"**Partial**: `{model}`, `{protocol}`, seed {seed} covers {n} of {of} held-out clips.")
    return lines


def _experiment(protocol, seed, predictions, index, values, pairs, simulated: bool, out: Path) -> list[Block]:
    """Tables and figures of one protocol and seed."""
    where = f"{protocol} protocol{_leaky(protocol)}, seed {seed}" + (", SIMULATED ratings" if simulated else "")
    part, ceiling = _part(values, protocol, seed), None if simulated else _ceiling(index)
    rows = predictions[(predictions["protocol"] == protocol) & (predictions["seed"] == seed)]
    paired = _part(pairs, protocol, seed, dimension="mean", scope="overall")
    blocks = [Block("heading", where[0].upper() + where[1:]), *_tables(part, _ranking(part), ceiling, paired, where)]
    figures = {
        "pearson": ("Pearson r per dimension", plots.pearson_by_dimension(part, "overall", _of(ceiling, "overall"))),
        "pearson_within_segment": (
            "Pearson r within segment: the playing apart from the music",
            plots.pearson_by_dimension(part, "within_segment", _of(ceiling, "within_segment")),
        ),
        "heatmap": ("Pearson r, models side by side", plots.heatmap(part)),
    }
    for name, keys in PRIMARY.items():
        for key in keys:
            figures[f"scatter_{key}"] = (f"{name}: rating and prediction of {key}", plots.scatter(rows, key))
    for name, (caption, figure) in figures.items():
        path = Path("figures") / f"{protocol}_seed{seed}_{name}.png"
        figure.suptitle(f"{caption}\n{where}", fontsize="medium")
        figure.savefig(out / path, dpi=110)
        blocks.append(Block("figure", f"{caption} ({where})", path))
    return blocks


def _tables(part, models, ceiling, pairs, where) -> list[Block]:
    mean = part[part["dimension"] == "mean"].set_index(["model", "scope", "metric"])
    scopes = pd.DataFrame({s: [_ranged(mean.loc[(m, s, "pearson")]) for m in models] for s in metrics.SCOPES}, models)
    others = pd.DataFrame(
        {k: [_number(mean.loc[(m, "overall", k), "value"], "z.3f") for m in models] for k in metrics.METRICS}, models
    )
    overall = part[(part["scope"] == "overall") & (part["metric"] == "pearson")].set_index(["model", "dimension"])
    rows = [*KEYS, "mean"]
    each = pd.DataFrame({m: [_ranged(overall.loc[(m, row)]) for row in rows] for m in models}, rows)
    if ceiling is not None:
        each["noise ceiling"] = [*(f"{value:.2f}" for value in ceiling["overall"]), f"{ceiling['overall'].mean():.2f}"]
    primary = {key for keys in PRIMARY.values() for key in keys}
    each.index = [f"**{key}**" if key in primary else key for key in each.index]
    blocks = [
        Block("table", f"Mean Pearson r over the 19 dimensions by scope ({where})", scopes),
        Block("table", f"Every metric, overall, mean over the 19 dimensions ({where})", others),
        Block("table", f"Pearson r per dimension, overall; primary dimensions in bold ({where})", each),
    ]
    if len(pairs):
        table = pd.DataFrame({
            "model b": pairs["model_b"], "r of a minus r of b": [_number(d, SIGNED) for d in pairs["difference"]],
            "95 % interval": [_interval(row, SIGNED) for _, row in pairs.iterrows()],
            "p": [_number(p, "z.3f") for p in pairs["p"]],
        }).set_index(pairs["model_a"].rename("model a"))  # fmt: skip
        blocks.append(Block("table", f"Paired differences in mean Pearson r, overall ({where})", table))
    return blocks


def _ceiling(index: pd.DataFrame) -> pd.DataFrame | None:
    """PercePiano's noise ceiling by dimension and scope; None for other clips.

    Highest r against the mean rating that the raters' agreement allows: square root of the split-half reliability over
    raters (Spearman-Brown corrected).
    """
    if not set(index["clip"]) <= set(metrics.load_index()["clip"]):
        return None
    path = resources.files("percepiano_ast") / "data" / "percepiano_noise_ceiling.csv"
    return pd.read_csv(path, index_col="dimension").loc[list(KEYS)]


def _of(ceiling: pd.DataFrame | None, scope: str) -> pd.Series | None:
    return None if ceiling is None else ceiling[scope]


def _experiments(values: pd.DataFrame) -> list[tuple[str, int]]:
    """Protocols and seeds, in the order of ``PROTOCOLS``: the primary one first."""
    found = values[["protocol", "seed"]].drop_duplicates().itertuples(index=False, name=None)
    order = list(PROTOCOLS)
    return sorted(found, key=lambda pair: (order.index(pair[0]) if pair[0] in order else len(order), *pair))


def _part(table: pd.DataFrame, protocol: str, seed: int, **equal) -> pd.DataFrame:
    for name, value in {"protocol": protocol, "seed": seed, **equal}.items():
        table = table[table[name] == value]
    return table


def _ranking(part: pd.DataFrame) -> list[str]:
    """Models by overall mean r, best first; without one, last."""
    rows = part[(part["scope"] == "overall") & (part["metric"] == "pearson") & (part["dimension"] == "mean")]
    return list(rows.sort_values("value", ascending=False)["model"])


def _is_encoder(model: str) -> bool:
    """An ``ast-*`` model that hears audio alone."""
    return model.startswith("ast-") and not any(word in model for word in _NOT_AUDIO_ALONE)


def _leaky(protocol: str) -> str:
    return " (leaky)" if "leaky" in PROTOCOLS.get(protocol, "") else ""


def _number(value: float, form: str = "z.2f") -> str:
    return "n/a" if np.isnan(value) else f"{value:{form}}"  # z: no "-0.00"


def _interval(row, form: str = "z.2f") -> str:
    return "no interval" if np.isnan(row["low"]) else f"[{row['low']:{form}}, {row['high']:{form}}]"


def _ranged(row) -> str:
    return _number(row["value"]) if np.isnan(row["low"]) else f"{_number(row['value'])} {_interval(row)}"


def _markdown(blocks: list[Block]) -> str:
    parts = []
    for kind, text, content in blocks:
        if kind == "list":
            parts.append("\n".join(f"- {line}" for line in content))
        elif kind == "table":
            rows = [[content.index.name or "", *content.columns], ["---"] * (1 + len(content.columns))]
            rows += [[name, *cells] for name, cells in zip(content.index, content.to_numpy().tolist())]
            parts.append(f"*{text}*\n\n" + "\n".join(map(_row, rows)))
        elif kind == "figure":
            parts.append(f"![{text}]({content.as_posix()})")
        else:
            parts.append({"title": "# ", "heading": "## ", "text": ""}[kind] + text)
    return "\n\n".join(parts) + "\n"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _html(blocks: list[Block], out: Path) -> str:
    """One self-contained page: figures are embedded."""
    parts = []
    for kind, text, content in blocks:
        if kind == "list":
            parts.append("<ul>" + "".join(f"<li>{_inline(line)}</li>" for line in content) + "</ul>")
        elif kind == "table":
            head = "".join(f"<th>{_inline(name)}</th>" for name in [content.index.name or "", *content.columns])
            rows = ([name, *cells] for name, cells in zip(content.index, content.to_numpy().tolist()))
            body = "".join(f"<tr>{''.join(f'<td>{_inline(cell)}</td>' for cell in row)}</tr>" for row in rows)
            table = f"<table><caption>{_inline(text)}</caption><tr>{head}</tr>{body}</table>"
            parts.append(f'<div class="scroll">{table}</div>')
        elif kind == "figure":
            image = base64.b64encode((out / content).read_bytes()).decode()
            parts.append(f'<figure><img alt="{html.escape(text)}" src="data:image/png;base64,{image}">'
                         f"<figcaption>{_inline(text)}</figcaption></figure>")
        else:
            tag = {"title": "h1", "heading": "h2", "text": "p"}[kind]
            parts.append(f"<{tag}>{_inline(text)}</{tag}>")
    head = f'<meta charset="utf-8"><title>{html.escape(blocks[0].text)}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _inline(text: str) -> str:
    """Escaped text with Markdown's `code` and **bold** as HTML."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)
