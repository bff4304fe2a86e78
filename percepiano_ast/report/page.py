"""A page of a report, written as Markdown and as HTML with embedded figures."""

import base64
import html
import re
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

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
