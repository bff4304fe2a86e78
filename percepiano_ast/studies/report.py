"""Evaluation results -> a report folder; all sentences about models are generated from numbers."""

import base64
import dataclasses
import html
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from importlib import resources
from importlib.metadata import version
from pathlib import Path

import markdown
import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from percepiano_ast import __version__, plots
from percepiano_ast.dimensions import HEAD_GROUPS, KEYS, PRIMARY
from percepiano_ast.errors import InputError
from percepiano_ast.evaluation import EvaluationOptions, evaluate, reliability, remarks
from percepiano_ast.evaluation.compare import POWER, between, published_results
from percepiano_ast.evaluation.intervals import LEVEL
from percepiano_ast.evaluation.predictions import (
    MIN_IN_SEGMENT,
    SCOPES,
    fold_column,
    load_index,
    read_predictions,
    validate_predictions,
)
from percepiano_ast.files import sha256_of
from percepiano_ast.plots.results import ERROR_PARTS, SCOPE_NAMES
from percepiano_ast.plots.style import MOST, save
from percepiano_ast.tables import to_csv

# What each protocol holds out. In the leaky ones the music of a held-out clip is also in training.
PROTOCOLS = pd.read_csv(
    resources.files("percepiano_ast") / "templates" / "protocols.csv", index_col="protocol"
)["held_out"].to_dict()
SIGNED = "+.3f"  # differences; "-0.000" shows on which side of zero a bound is
SURE = 0.05  # significance level of p after Holm's correction
FEW_GROUPS = 20  # with fewer content groups the intervals themselves are uncertain
PRIMARY_KEYS = [key for keys in PRIMARY.values() for key in keys]
METRIC_NAMES = {"spearman": "Spearman rho", "r2": "R2", "mae": "MAE", "ccc": "CCC"}
SCOPE_TITLES = {scope: SCOPE_NAMES[scope].replace("\n", " ") for scope in SCOPES}
_PART_TITLES = {"all": "mean squared error"} | {key: name for key, (_, name) in ERROR_PARTS.items()}
_KINDS = {"people": "human performances", "nobody (deadpan)": "deadpan renderings"}
_IN_ERROR_TABLES = 6  # models


def evaluate_files(
    paths: Sequence[str | Path],
    out: str | Path,
    index: str | Path | None = None,
    partial: bool = False,
    simulated: bool = False,
    settings: EvaluationOptions = EvaluationOptions(),
    ceiling: str | Path | None = None,
    reference: str = "",
) -> Path:
    """Evaluate predictions files together and write the report: the command ``evaluate``. Without
    ``index`` the clips must be PercePiano's with the published ratings.

    Raises:
        InputError: see ``evaluation.predictions`` (``read_predictions``, ``load_index``,
            ``validate_predictions``) and ``reliability.load_ceiling``; an unknown reference.
    """
    if not paths:
        raise InputError("no predictions to evaluate; give at least one predictions CSV.")
    predictions = pd.concat([read_predictions(path) for path in paths], ignore_index=True)
    facts = load_index(index)
    predictions = validate_predictions(predictions, facts if index else None, partial=partial)
    known = None if simulated and ceiling is None else reliability.load_ceiling(facts, ceiling)
    options = {"--out": out, "--index": index, "--ceiling": ceiling, "--reference": reference}
    for field in dataclasses.fields(settings):
        if (value := getattr(settings, field.name)) != field.default:
            options["--" + field.name.removeprefix("n_").replace("_", "-")] = value
    command = ["python", "-m", "percepiano_ast", "evaluate", *map(str, paths)]
    for option, value in options.items():
        command += [option, str(value)] if value not in (None, "") else []
    return write(
        predictions,
        facts,
        out,
        simulated=simulated,
        settings=settings,
        ceiling=known,
        reference=reference,
        command=shlex.join(command + ["--partial"] * partial).replace("\n", "'$'\\n''"),
        files={Path(path).name: sha256_of(Path(path)) for path in paths},
    )


def write(
    predictions: pd.DataFrame,
    index: pd.DataFrame,
    out_dir: str | Path,
    *,
    simulated: bool = False,
    settings: EvaluationOptions = EvaluationOptions(),
    ceiling: pd.DataFrame | None = None,
    reference: str = "",
    command: str = "",
    files: dict[str, str] | None = None,
) -> Path:
    """Evaluate and write into ``out_dir``: ``report.md`` and the self-contained ``report.html``,
    ``comparison.md`` and ``.html``, ``figures/`` as SVG and PNG, ``tables/`` with every table of
    the pages as CSV and LaTeX, and every complete table of results as a CSV; returns the path of
    report.html. Other files in ``out_dir`` are not changed.

    Args:
        simulated: whether the ratings are simulated; title, captions and figures are marked.
        ceiling: the noise ceiling (19 dimensions, scopes), None if unknown.
        reference: see `reference_of`.
        command: that repeats the evaluation.
        files: name -> SHA-256 of the predictions files.

    Raises:
        InputError: see ``predictions.validate_predictions`` (runs may be partial); ``out_dir``
            is a file; an unknown reference.
    """
    out = Path(out_dir)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; give a directory for the report.")
    predictions = validate_predictions(predictions, index, partial=True)
    if reference:
        reference_of(sorted(predictions["model"].unique()), reference)
    tables = evaluate(predictions, index, settings, ceiling)
    out.mkdir(parents=True, exist_ok=True)
    for name, found in tables.items():
        (out / f"{name}.csv").write_bytes(to_csv(found, "%.6f"))
    marks, mark = ", SIMULATED ratings" * simulated, " (simulated ratings)" * simulated
    parts = [
        _protocol(tables | {"predictions": predictions}, protocol, ceiling, marks)
        for protocol in in_order(predictions["protocol"])
    ]
    folds = {part["name"]: index[fold_column(part["name"])] for part in parts}
    digests = [f"`{digest[:16]}`" for digest in (files or {}).values()]
    libraries = {name: version(name) for name in ("numpy", "scipy", "pandas", "matplotlib")}
    context = {
        "title": f"Evaluation of predicted performance ratings{mark}",
        "parts": parts,
        "tables": tables,
        "predictions": predictions,
        "clips": index[index["clip"].isin(predictions["clip"])],
        "folds": {name: fold[fold >= 0] for name, fold in folds.items()},
        "warnings": remarks(predictions, index, tables["metrics"]),
        "ceiling": ceiling,
        "limits": {scope: None if ceiling is None else ceiling.get(scope) for scope in SCOPES},
        "simulated": simulated,
        "marks": marks,
        "settings": settings,
        "level": LEVEL,
        "power": POWER,
        "fewest_in_segment": MIN_IN_SEGMENT,
        "command": command,
        "files": pd.DataFrame({"SHA-256": digests}, [*(files or {})]),
        "versions": {"percepiano_ast": __version__, "Python": platform.python_version()}
        | libraries,
    }
    compared = _compared(tables, parts, reference) | {"title": f"Comparison of models{mark}"}
    _page(out, "comparison", context | compared)
    return _page(out, "report", context)


# --- Tables of the pages --------------------------------------------------------------------------


def _protocol(
    tables: dict[str, pd.DataFrame], protocol: str, ceiling: pd.DataFrame | None, marks: str
) -> dict:
    """What the report shows of one protocol: the tables of `evaluation.evaluate` (rows of the
    protocol, of the lowest seed of each model) under their names, tables of text under ``shown``,
    ``models``, best first, and ``where``, the protocol with its marks, for captions."""
    part: dict = {"name": protocol, "where": f"{protocol} protocol{leaky(protocol)}{marks}"}
    for name, found in tables.items():
        part[name] = rows(found, protocol=protocol)
        if {"model", "seed"} <= set(found):
            lowest = part[name].groupby("model")["seed"].transform("min")
            part[name] = part[name][part[name]["seed"] == lowest]
    models = part["models"] = list(ranking(part["summary"]).index)
    part["informed"] = ", ".join(code(model) for model in models if "+score" in model)
    shown = part["shown"] = {}

    # Agreement of each model, and the same for the comparison page
    r = ranking(part["summary"])
    mean = _text(rows(part["summary"], dimension="mean"))
    mean = mean.pivot(index="model", columns=["scope", "metric"]).loc[models]
    text, values = mean["text"], mean["value"]["overall"]
    lines = {"seeds": r["seeds"].astype(str)}
    lines |= {name: text[scope]["pearson"] for scope, name in SCOPE_TITLES.items()}
    for metric, name in METRIC_NAMES.items():
        lines[name] = pd.Series([number(value, "z.3f") for value in values[metric]], models)
    shown["agreement"] = pd.DataFrame(lines).rename_axis(None)
    if ceiling is not None:
        limits = {SCOPE_TITLES[scope]: f"{ceiling[scope].mean():.2f}" for scope in ceiling}
        shown["agreement"].loc["noise ceiling"] = [limits.get(name, "") for name in lines]
        shares = _text(rows(part["ceiling_share"], scope="overall", dimension="mean"))
        shares = shares.set_index("model")["text"].loc[models]
    part["side_by_side"] = pd.DataFrame(
        {
            "protocol": protocol + leaky(protocol),
            "model": models,
            "overall": text["overall"]["pearson"],
            "within segment, humans only": text["within_segment_humans"]["pearson"],
            "R2": text["overall"]["r2"],
            "MAE": lines["MAE"],
            "share of noise ceiling": "n/a" if ceiling is None else shares,
            "seeds": lines["seeds"],
        }
    ).set_index("protocol")

    # Dimensions by models
    overall = _text(rows(part["summary"], scope="overall", metric="pearson"))
    overall = overall.pivot(index="dimension", columns="model")
    keys, blank = [*KEYS, *HEAD_GROUPS, "mean"], [""] * len(HEAD_GROUPS)
    each = overall["text"].loc[keys, models]
    if ceiling is not None and "overall" in ceiling:
        limit, best_r = ceiling["overall"].loc[list(KEYS)], overall["value"][models[0]]
        of_keys = [f"{value:.2f}" for value in limit]
        each["noise ceiling"] = [*of_keys, *blank, f"{limit.mean():.2f}"]
        of_keys = [number(best_r[key] / limit[key] if limit[key] > 0 else np.nan) for key in KEYS]
        each["share of ceiling, first model"] = [*of_keys, *blank, shares[models[0]]]
    names = {key: f"**{key}**" for key in PRIMARY_KEYS}
    names |= {name: f"head group {name}" for name in HEAD_GROUPS}
    shown["dimensions"] = each.rename(index=names).rename_axis(None)

    # Differences between models
    pairs = rows(part["differences"], scope="overall", metric="pearson", dimension="mean")
    columns = {
        "model b": pairs["model_b"],
        "seeds": pairs["seeds"],
        "r of a minus r of b": [number(value, SIGNED) for value in pairs["difference"]],
        "95 % interval": [interval(row, SIGNED) for _, row in pairs.iterrows()],
        "p": [number(value, "z.3f") for value in pairs["p"]],
        "minimum detectable": [number(value, "z.3f") for value in pairs["detectable"]],
    }
    shown["differences"] = pd.DataFrame(columns).set_index(pairs["model_a"].rename("model a"))

    # Pairs of performances, at the largest minimum difference
    pairs = rows(part["pairwise"], scope="within_segment_humans")
    part["pairwise"] = rows(pairs, min_difference=pairs["min_difference"].max())

    # Calibration of the uncertainty, folds, and seeds
    found = part["calibration"]
    text = _text(rows(found, dimension="mean"))
    text = text.pivot(index="model", columns="metric", values="text").rename_axis(None)
    shown["calibration"] = text.loc[found["model"].unique(), found["metric"].unique()]
    folds = rows(part["folds"], scope="overall", metric="pearson", dimension="mean")
    folds = folds.pivot(index="model", columns="fold", values="value").map(number)
    shown["folds"] = folds.rename(columns="fold {}".format).rename_axis(None)
    several = _text(r[r["seeds"] > 1].sort_index(), "z.3f")
    columns = {"seeds": several["seeds"].astype(str), "mean Pearson r": several["text"]}
    columns["SD between seeds"] = [number(value, "z.4f") for value in several["seed_sd"]]
    shown["seeds"] = pd.DataFrame(columns).rename_axis(None)

    # Errors: their parts, by kind of clip, and shared by two models
    models = [name for name in models if name in set(part["errors"]["model"])]
    mean = rows(part["errors"], dimension="mean").set_index("model")
    mean = part["error_parts"] = mean.loc[models, [*_PART_TITLES]]
    part["explained"] = next((name for name in models if is_audio_only(name)), models[0])
    models = models[:_IN_ERROR_TABLES]
    kinds = part["errors_by_kind"][part["errors_by_kind"]["model"].isin(models)]
    names = kinds["value"].replace(_KINDS) + " (" + kinds["clips"].astype(str) + ")"
    kinds = kinds.assign(name=names).pivot(index="model", columns="name", values="error")
    shared = part["shared_errors"]
    shared = shared[shared["model_a"].isin(models) & shared["model_b"].isin(models)]
    shared = rows(shared, seed=shared["seed"].min())
    both = pd.concat([shared, shared.rename(columns={"model_a": "model_b", "model_b": "model_a"})])
    both = both.pivot(index="model_a", columns="model_b", values="correlation")
    sharing = [name for name in models if name in both.index]
    for name, numbers in {
        "errors": mean.rename(columns=_PART_TITLES),
        "errors_by_kind": kinds.loc[models, list(dict.fromkeys(names))],
        "shared_errors": both.loc[sharing, sharing],
    }.items():
        text = numbers.map(lambda value: "" if pd.isna(value) else f"{value:.2f}")
        shown[name] = text.rename_axis(None)
    return part


def best(part: dict, name: str) -> pd.DataFrame:
    """The rows of a table of one protocol that a figure shows: of its best models, at most MOST."""
    models = [model for model in part["models"] if model in set(part[name]["model"])]
    return part[name][part[name]["model"].isin(models[:MOST])]


def _compared(tables: dict[str, pd.DataFrame], parts: list[dict], wanted: str) -> dict:
    """What the comparison page shows: all models, differences from the reference, published
    results. ``wanted``: the reference, see `reference_of`."""
    overall = rows(tables["summary"], metric="pearson", scope="overall", dimension="mean")
    overall = overall.groupby("model")["value"].max().sort_values(ascending=False)

    # Differences from the reference, per dimension
    reference = reference_of(parts[0]["models"], wanted)
    chosen = [name for name in parts[0]["models"] if name != reference]
    pairs = rows(parts[0]["differences"], scope="overall", metric="pearson")
    gains = {model: between(pairs, model, reference) for model in chosen}
    gains = {model: found for model, found in gains.items() if len(found)}
    gained_text = pd.DataFrame(index=[*KEYS, "mean"])
    for model, found in gains.items():
        by_key = found.set_index("dimension").loc[gained_text.index]
        stars = ["*" if key in KEYS and p < SURE else "" for key, p in by_key["p_holm"].items()]
        gained_text[model] = [
            f"{number(row['difference'], SIGNED)}{star} {interval(row, SIGNED)}"
            for star, (_, row) in zip(stars, by_key.iterrows())
        ]

    # Published results, with our own R2 under the nearest protocol
    theirs, nearest = published_results(), []
    for row in theirs.itertuples():
        at = {"protocol": row.nearest, "metric": row.metric, "scope": "overall"}
        ours = rows(tables["summary"], dimension="mean", **at).dropna(subset="value")
        if row.hears == "audio":  # compare only with our audio-only models
            ours = ours[ours["model"].map(is_audio_only).astype(bool)]
        first = [
            f"{best.model} {best.value:.3f}" for best in ours.nlargest(1, "value").itertuples()
        ]
        nearest.append(f"{row.nearest}: {first[0]}" if first else "not evaluated")
    theirs = theirs.assign(R2=theirs["value"].map("{:.3f}".format), comparable="no")
    theirs = theirs.rename(columns={"hears": "input", "why_not": "why not"}).set_index("system")
    theirs["nearest of ours"] = nearest
    columns = ["source", "input", "protocol", "R2", "comparable", "why not", "nearest of ours"]
    return {
        "side_by_side": pd.concat(part["side_by_side"] for part in parts),
        "models": list(overall.index),
        "labels": {
            part["name"]: part["name"].replace("_", "\n") + leaky(part["name"]).replace(" ", "\n")
            for part in parts
        },
        "reference": reference,
        "chosen": chosen,
        "not_compared": ", ".join(code(name) for name in chosen if name not in gains),
        "gains": gains,
        "gains_drawn": pd.concat(list(gains.values())[:MOST]) if gains else None,
        "gained_text": gained_text,
        "published": theirs[columns],
    }


# --- Sentences ------------------------------------------------------------------------------------


def headlines(values: pd.DataFrame, pairs: pd.DataFrame, protocol: str) -> list[str]:
    """Headlines of one protocol: the best model, and the comparison of the audio encoder with its
    baselines. A model "beats" another only if the interval of the difference excludes zero.

    The encoder is the best pre-trained ``ast-*``; its baselines are ``mlp`` and every
    ``ast-*-scratch``.

    Args:
        values, pairs: tables ``summary`` and ``differences`` of `evaluation.evaluate`.
    """
    return sentences("evaluation", "headlines", values, pairs, protocol)


def agreement(values: pd.DataFrame, ceiling: pd.DataFrame | None = None) -> str:
    """Agreement of the best model with the ratings, compared with the noise ceiling; ``values``:
    the table ``summary`` of one protocol."""
    return " ".join(sentences("evaluation", "agreement", values, ceiling))


def dimensions(values: pd.DataFrame, scope: str = "overall") -> str:
    """The best and worst predicted dimensions of the best model, and the primary dimensions;
    ``values``: the table ``summary`` of one protocol."""
    return " ".join(sentences("evaluation", "dimensions", values, scope))


def differences(pairs: pd.DataFrame) -> str:
    """Number of differences in mean r that are significant, and the minimum detectable
    difference; ``pairs``: the table ``differences`` of one protocol."""
    return " ".join(sentences("evaluation", "differences", pairs))


def deadpan(found: pd.DataFrame) -> str:
    """Human versus deadpan: predicted differences compared with rated ones; ``found``: the table
    ``deadpan`` of one protocol and seed."""
    return " ".join(sentences("evaluation", "deadpan", found))


def pairwise(found: pd.DataFrame) -> str:
    """Share of pairs of performances in the order of their ratings; ``found``: the table
    ``pairwise`` of one protocol and seed."""
    return " ".join(sentences("evaluation", "pairwise", found))


def sentences(study: str, macro: str, *about) -> list[str]:
    """The lines of a macro of ``templates/STUDY_sentences.md.j2``, in Markdown."""
    template = TEMPLATES.get_template(f"{study}_sentences.md.j2")
    text = getattr(template.module, macro)(*about)
    return [line.rstrip() for line in text.splitlines() if line.strip()]


# --- Models and numbers ---------------------------------------------------------------------------


def reference_of(models: list[str], wanted: str = "") -> str:
    """The reference among ``models`` (best first): ``wanted``, or the best audio-only model that is
    not an audio encoder. InputError: ``wanted`` is not among them."""
    if wanted and wanted not in models:
        raise InputError(
            f"the reference {wanted!r} is not among the models; choose one of {', '.join(models)}."
        )
    rivals = [name for name in models if is_audio_only(name) and not is_encoder(name)]
    return wanted or (rivals or models[1:] or models)[0]


def is_audio_only(model: str) -> bool:
    """Whether the name is that of an audio-only model: without MIDI or score, not an ensemble or
    identity baseline."""
    return not any(word in model for word in ("midi", "score", "ensemble", "identity"))


def is_encoder(model: str) -> bool:
    """Whether the name is that of an audio-only ``ast-*`` model."""
    return model.startswith("ast-") and is_audio_only(model)


def leaky(protocol: str) -> str:
    """`` (leaky)`` for a leaky protocol, else nothing."""
    return " (leaky)" if "leaky" in PROTOCOLS.get(protocol, "") else ""


def in_order(protocols) -> list[str]:
    """Protocols in the order of ``PROTOCOLS``; unknown protocols follow by name."""
    order = {name: place for place, name in enumerate(PROTOCOLS)}
    return sorted(set(protocols), key=lambda name: (order.get(name, len(order)), name))


def rows(found: pd.DataFrame, **equal) -> pd.DataFrame:
    """The rows of a table with these values in these columns."""
    for column, value in equal.items():
        found = found[found[column] == value]
    return found


def ranking(values: pd.DataFrame, scope: str = "overall") -> pd.DataFrame:
    """Rows of mean r by model, best first and NaN last. ``values``: of one protocol."""
    mean = rows(values, scope=scope, metric="pearson", dimension="mean")
    return mean.set_index("model").sort_values("value", ascending=False)


def number(value: float, form: str = "z.2f") -> str:
    """A number as text, "n/a" for NaN; ``z`` in ``form`` avoids "-0.00"."""
    return "n/a" if np.isnan(value) else f"{value:{form}}"


def interval(row, form: str = "z.2f") -> str:
    """``[low, high]`` of a row."""
    return "no interval" if np.isnan(row["low"]) else f"[{row['low']:{form}}, {row['high']:{form}}]"


def ranged(row, form: str = "z.2f") -> str:
    """``value [low, high]`` of a row."""
    return number(row["value"], form) + ("" if np.isnan(row["low"]) else f" {interval(row, form)}")


def _text(found: pd.DataFrame, form: str = "z.2f") -> pd.DataFrame:
    """A table with the column ``text``: `ranged` of each row."""
    return found.assign(text=[ranged(row, form) for _, row in found.iterrows()])


# --- Names in Markdown and LaTeX ------------------------------------------------------------------


# Not the stars of numbers, underscores within words, or intervals.
_MARKUP = re.compile(
    r"[\\`~$]|(?<![0-9])\*|\*(?! |$)|(?<!\w)_|_(?!\w)"
    r"|\[(?![-+.\d]+, [-+.\d]+\](?![(\[:]))|(?<=\])[(\[:]"
)


def escaped(text: str) -> str:
    """Text in Markdown, on one line: characters of HTML and of markup as entities."""
    plain = html.escape(" ".join(text.split()), quote=False)
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", plain)


def code(name: str) -> str:
    """A name as a code span of Markdown, or `escaped` if it has characters that end one, or HTML,
    which is shown as it stands there."""
    return escaped(name) if re.search(r"[`<>&\\$]|\s\s|[^\S ]", name) else f"`{name}`"


def latex(text: str) -> str:
    """Text in LaTeX."""
    words = {"\\": "textbackslash", "~": "textasciitilde", "^": "textasciicircum"}
    return re.sub(
        r"[\\~^%_&#${}]",
        lambda found: f"\\{words[found[0]]}{{}}" if found[0] in words else f"\\{found[0]}",
        text,
    )


# --- Pages ----------------------------------------------------------------------------------------

TEMPLATES = Environment(
    loader=PackageLoader("percepiano_ast"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters["paragraph"] = lambda text: " ".join(text.split())
TEMPLATES.filters |= {"number": number, "code": code, "escaped": escaped}
TEMPLATES.tests |= {"encoder": is_encoder, "starting": str.startswith, "ending": str.endswith}
TEMPLATES.globals |= {"report": sys.modules[__name__], "plots": plots, "len": len}


def _page(folder: Path, name: str, context: dict) -> Path:
    """Write ``NAME.md`` and a self-contained ``NAME.html`` from ``templates/NAME.md.j2``, and the
    files of the tables and figures that the template names."""

    def table(name: str, caption: str, shown: pd.DataFrame, part: dict | None = None) -> str:
        """A table of text with its index as first column; CSV and LaTeX go to ``tables/``."""
        if part:
            name, caption = f"{part['name']}_{name}", f"{caption} ({part['where']})"
        plain = shown.rename(index=_plain, columns=_plain).map(_plain)
        plain = plain.rename_axis(index=shown.index.name or "")
        path = folder / "tables" / f"{name}.csv"
        path.parent.mkdir(exist_ok=True)
        plain = plain.reset_index()
        path.write_bytes(to_csv(plain))
        options = {"index": False, "escape": True, "caption": latex(caption), "position": "htbp"}
        text = plain.to_latex(label=f"tab:{name}", **options)
        path.with_suffix(".tex").write_text(text, encoding="utf-8")
        lines = [[shown.index.name or "", *shown.columns], ["---"] * (1 + len(shown.columns))]
        lines += [[key, *row] for key, row in zip(shown.index, shown.to_numpy().tolist())]
        cells = [[_cell(str(cell)) for cell in line] for line in lines]
        return f"*{escaped(caption)}*\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in cells)

    def figure(name: str, caption: str, drawn: Figure, part: dict | None = None) -> str:
        """A figure as SVG and PNG in ``figures/``, titled by its caption unless it has a title."""
        words = caption
        if part:
            name, caption = f"{part['name']}_{name}", f"{caption} ({part['where']})"
            words += f"\n{part['where']}"
        if not drawn.get_suptitle():
            drawn.suptitle(words, fontsize="medium")
        path = folder / "figures" / name
        path.parent.mkdir(exist_ok=True)
        save(drawn, path, dpi=110)
        return f"![{escaped(caption)}](figures/{name}.png)"

    template = TEMPLATES.get_template(f"{name}.md.j2")
    text = template.render(context | {"table": table, "figure": figure})
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    (folder / f"{name}.md").write_text(text, encoding="utf-8")

    # Names from predictions files are text, never HTML; `html.escape` escapes their entities once
    # more, as `markdown` does in code spans.
    body = html.escape(text, quote=False)
    body = markdown.markdown(body, extensions=["tables", "fenced_code"])
    body = re.sub(r"&amp;#(\d+);", lambda found: chr(int(found[1])), body)
    body = re.sub(r"&amp;(amp|lt|gt);", r"&\1;", body)

    def embedded(found: re.Match) -> str:
        data = base64.b64encode((folder / found[2]).read_bytes()).decode()
        image = f'<img alt="{found[1]}" src="data:image/png;base64,{data}">'
        return f"<figure>{image}<figcaption>{found[1]}</figcaption></figure>"

    body = re.sub(r'<p><img alt="(.*?)" src="(figures/[^"]+)" /></p>', embedded, body)
    table_start = r'<div class="scroll"><table><caption>\1</caption>'
    body = re.sub(r"<p><em>(.*)</em></p>\n<table>", table_start, body)
    body = body.replace("</table>", "</table></div>")
    body = re.sub(r"<td>(?=[^<]{41})", '<td class="words">', body)  # long cells are wrapped
    path = folder / f"{name}.html"
    page = TEMPLATES.get_template("page.html.j2").render(title=context["title"], body=body)
    path.write_text(page, encoding="utf-8")
    return path


_MARKED = re.compile(r"\*\*(\w+)\*\*|`([0-9a-f]{16})`")  # dimensions and checksums in tables


def _plain(cell):
    """A cell without our Markdown markup."""
    found = _MARKED.fullmatch(cell) if isinstance(cell, str) else None
    return found[1] or found[2] if found else cell


def _cell(text: str) -> str:
    """A cell of a table in Markdown."""
    return text if _MARKED.fullmatch(text) else escaped(text).replace("|", "\\|")
