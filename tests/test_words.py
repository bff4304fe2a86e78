"""Phrases that must not come back, in README, docs, notebooks, and in the messages, help and
docstrings of the package."""

import ast
import json
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A reader who knows librosa, Flax and mir_eval learns no private vocabulary here.
PHRASES = r"""
comes? along
(is|are|was|were) told
\bhears?\b
\bheard\b
(?<!there )(?<!There )\b(is|are) no (?!longer)
at hand\b
stands? in\b
nothing (was |is |has )?learn
sees the score
all the same\b
nobody (has|knows|can)
strangers?\b
\bpaint(s|ed|ing)?\b
told from
\bfloors?\b (of|for)
\bown ratings\b
cannot be used
\ba (row|line|block|file|column) an? \w
\banew\b
without a word
in silence\b
\bears?\b
\bno numbers?\b
what is where
(is|are) whole\b
who plays
speaks against
nothing is left
what is played
judged? by\b
\bjudges\b
gave way to
\b(lie|lies) (where|there|beside|in|at)\b
(is|are|was) said of\b
\bdeaf\b
\b(courier|parcel|litter)s?\b
young encoder
led astray
to the letter
of one's own
""".split("\n")[1:-1]
FORBIDDEN = re.compile("|".join(f"(?:{phrase})" for phrase in PHRASES), re.IGNORECASE)


def prose_of_markdown(text: str) -> list[tuple[int, str]]:
    """Numbered lines without code blocks and spans."""
    text = re.sub(r"```.*?```", lambda block: "\n" * block[0].count("\n"), text, flags=re.DOTALL)
    return [
        (number, re.sub(r"``.*?``|`[^`]*`", "", line))
        for number, line in enumerate(text.splitlines(), 1)
    ]


def prose_of_module(path: Path) -> list[tuple[int, str]]:
    """Comments, docstrings and other strings that hold a space, numbered by line."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            found += [
                (node.lineno + more, line) for more, line in enumerate(node.value.splitlines())
            ]
    with open(path, "rb") as file:
        found += [
            (token.start[0], token.string)
            for token in tokenize.tokenize(file.readline)
            if token.type == tokenize.COMMENT
        ]
    return [(number, re.sub(r"``.*?``|`[^`]*`", "", line)) for number, line in found]


def prose_of_notebook(path: Path) -> list[tuple[int, str]]:
    """Markdown and printed text of the cells, numbered by cell."""
    return [
        (number, line)
        for number, cell in enumerate(json.loads(path.read_text())["cells"])
        for _, line in prose_of_markdown("".join(cell["source"]))
    ]


FILES = {
    **dict.fromkeys(sorted((ROOT / "percepiano_ast").rglob("*.py")), prose_of_module),
    **{
        path: lambda path: prose_of_markdown(path.read_text())
        for path in [
            ROOT / "README.md",
            *sorted((ROOT / "docs").glob("*.md")),
            *sorted((ROOT / "notebooks" / "results").glob("*.md")),
            *sorted((ROOT / "percepiano_ast" / "weights").glob("*.md")),
            *sorted((ROOT / "percepiano_ast" / "templates").glob("*.j2")),
        ]
    },
    **dict.fromkeys(sorted((ROOT / "notebooks").glob("*.ipynb")), prose_of_notebook),
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_words_are_those_of_the_field(path):
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {found[0]!r} in: {line.strip()}"
        for number, line in FILES[path](path)
        for found in FORBIDDEN.finditer(line)
    ]
    assert not wrong, "\n".join(wrong)
