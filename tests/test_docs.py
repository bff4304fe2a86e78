"""README, docs, cards and notebooks: links and anchors resolve, documented commands parse, sizes
hold. Cost: 5 s."""

import json
import re
import shlex
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest
import reproduce
import typer
from bench import BENCHMARKS

from percepiano_ast import cli
from percepiano_ast.config import PRESETS, PRETRAININGS

ROOT = Path(__file__).resolve().parent.parent
README, RESULTS = ROOT / "README.md", ROOT / "notebooks" / "results" / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
CARDS = sorted((ROOT / "percepiano_ast" / "weights").glob("*.md"))
PROGRAM, SCRIPT = typer.main.get_command(cli.app), typer.main.get_command(reproduce.app)
NOTEBOOKS = sorted((ROOT / "notebooks").rglob("*.ipynb"))
PAGES = [README, *DOCS, *sorted(RESULTS.parent.glob("*.md")), *CARDS, *NOTEBOOKS]
# a page of this repository by its address
SELF = "https://github.com/percepiano-ast/percepiano-ast/blob/main/"
FENCE = re.compile(r"^(```|~~~)(\w*)\n(.*?)^\1[ ]*$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(`+)(.+?)\1", re.DOTALL)
FOREIGN_OPTIONS = {"--gpus-per-task", "--check"}  # of SLURM, of tests/test_content_groups.py


def markdown(path: Path) -> str:
    """A page's Markdown; of a notebook that of its Markdown cells."""
    if path.suffix != ".ipynb":
        return path.read_text()
    cells = json.loads(path.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def without_code(text: str) -> str:
    """Markdown without code blocks, code spans and comments."""
    return SPAN.sub("", re.sub(r"<!--.*?-->", "", FENCE.sub("", text), flags=re.DOTALL))


def slug(heading: str) -> str:
    """GitHub's anchor of a heading: lower case, hyphens for spaces, no other punctuation."""
    text = re.sub(r"!?\[([^\]]*)\](\([^)]*\)|\[[^\]]*\])", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", text.replace("`", "").strip().lower()).replace(" ", "-")


def anchors(text: str) -> set[str]:
    """Anchors of all headings, numbered where a heading is repeated, and of explicit ids."""
    found: dict[str, int] = {}
    names = set(re.findall(r"<\w+[^>]*\b(?:id|name)=\"([^\"]+)\"", text))
    for heading in re.findall(
        r"^ {0,3}#{1,6}[ \t]+(.+?)[ \t]*#*[ \t]*$", FENCE.sub("", text), re.MULTILINE
    ):
        name = slug(heading)
        names.add(f"{name}-{found[name]}" if name in found else name)
        found[name] = found.get(name, 0) + 1
    return names


def links(text: str) -> list[str]:
    """Targets of inline links and images, reference definitions and HTML attributes."""
    text = without_code(text)
    inline = re.findall(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)", text)
    return (
        inline
        + re.findall(r"^ {0,3}\[[^\]]+\]:\s*(\S+)", text, re.MULTILINE)
        + re.findall(r"\b(?:href|src)=\"([^\"]+)\"", text)
    )


def broken(page: Path) -> list[str]:
    """Links of a page to files or anchors of this repository that do not exist."""
    wrong = []
    for link in links(markdown(page)):
        home, target = (
            (ROOT, link.removeprefix(SELF)) if link.startswith(SELF) else (page.parent, link)
        )
        if re.match(r"[a-z][a-z0-9+.-]*:", target, re.IGNORECASE):
            continue
        place, _, anchor = unquote(target).partition("#")
        path = (home / place).resolve() if place else page
        if not path.exists() or not path.is_relative_to(ROOT):
            wrong.append(f"{link}: no such file")
        elif anchor and anchor not in anchors(markdown(path)):
            wrong.append(f"{link}: no heading has this anchor")
    return wrong


def test_slugs_follow_the_rule_of_github():
    text = (
        "# Two words\n## `percepiano rate`: a file\n## Two words\n## May [maps](x.md) be"
        " *trusted*?\n```\n# no heading\n```\n"
    )
    assert anchors(text) == {
        "two-words",
        "percepiano-rate-a-file",
        "two-words-1",
        "may-maps-be-trusted",
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_anchors_resolve(page):
    wrong = broken(page)
    assert not wrong, f"{page.relative_to(ROOT)}: " + "; ".join(wrong)


def test_a_broken_link_is_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "other.md").write_text("# There\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md#there) [b](other.md#here) ![c](no.png) [d](#e) `[f](g)`"
        f" [h]({SELF}other.md#there) [i](../j)"
    )
    assert [line.split(":")[0] for line in broken(page)] == [
        "other.md#here",
        "no.png",
        "#e",
        "../j",
    ]


@pytest.mark.parametrize(
    ("pages", "limit"),
    [([README], 10_000), (DOCS, 30_000), ([RESULTS], 20_000)],
    ids=["README", "docs", "results"],
)
def test_pages_stay_short(pages, limit):
    size = sum(len(page.read_bytes()) for page in pages)
    assert size <= limit, f"{size:,} bytes, at most {limit:,}"


def test_images_of_the_readme_have_alt_text():
    text = without_code(README.read_text())
    images = re.findall(r"!\[([^\]]*)\][(\[]", text)
    assert len(images) >= 3
    assert all(len(alt.strip()) >= 10 for alt in images) and "<img" not in text


def blocks(text: str) -> list[str]:
    """Lines of shell code, with continued ones joined."""
    return [
        line
        for _, name, block in FENCE.findall(text)
        if name == "bash"
        for line in block.replace("\\\n", " ").splitlines()
    ]


def commands(page: Path) -> list[str]:
    """Documented command lines of the package, without the program's name."""
    text = page.read_text()
    shell = [
        re.search(r"(?:^|srun |&& )(?:\.venv/bin/)?percepiano (?P<rest>[^'|]+)", line)
        for line in blocks(text)
    ]
    spans = [
        re.fullmatch(r"percepiano (?P<rest>[^|]+)", span)
        for _, span in SPAN.findall(FENCE.sub("", text))
    ]
    return [
        found["rest"].strip()
        for found in (*shell, *spans)
        if found and not found["rest"].startswith("COMMAND")
    ]


def parse(line: str) -> dict:
    """Options of a documented command line; none of those that print and exit, or of a command's
    bare name."""
    name, *words = cli.current_names(shlex.split(line, comments=True), PROGRAM)
    if name.startswith("-"):
        return {}
    assert name in PROGRAM.commands, f"percepiano {line}: no such command"
    if not words or "--help" in words:
        return {}
    return PROGRAM.commands[name].make_context(name, words).params


@pytest.mark.parametrize(
    "page", [README, *DOCS, *CARDS, RESULTS], ids=lambda page: str(page.relative_to(ROOT))
)
def test_documented_commands_parse(page, capsys):
    for line in commands(page):
        parsed = parse(line)
        for name, known in (("preset", PRESETS), ("pretraining", PRETRAININGS)):
            value = parsed.get(name)
            assert value is None or value.isupper() or value in known, (
                f"percepiano {line}: no {name} {value!r}"
            )


def scripts(page: Path, name: str) -> list[str]:
    """Arguments of a script of this repository in the documented commands."""
    text = page.read_text()
    code = [*blocks(text), *(span for _, span in SPAN.findall(FENCE.sub("", text)))]
    found = (
        re.search(rf"(?:^|\d )(?:python )?{re.escape(name)} (?P<rest>[^|]+)", line) for line in code
    )
    return [line["rest"] for line in found if line]


@pytest.mark.parametrize(
    "page", [README, *DOCS, *CARDS, RESULTS], ids=lambda page: str(page.relative_to(ROOT))
)
def test_documented_scripts_parse(page):
    for line in scripts(page, "tests/bench"):
        (name,) = shlex.split(line, comments=True)
        assert name in BENCHMARKS or name == "NAME", f"tests/bench {line}: no such benchmark"
    for line in scripts(page, "notebooks/results/reproduce.py"):
        name, *words = cli.current_names(shlex.split(line, comments=True), SCRIPT)
        SCRIPT.commands[name].make_context(name, words)


def test_scripts_are_documented():
    names = ("tests/bench", "notebooks/results/reproduce.py")
    assert all(any(scripts(page, name) for page in DOCS) for name in names)


def test_every_command_is_documented():
    text = (ROOT / "docs" / "command-line.md").read_text()
    missing = [name for name in PROGRAM.commands if f"percepiano {name} " not in text]
    assert not missing, f"not in docs/command-line.md: {', '.join(missing)}"


@pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: page.name)
def test_documented_options_exist(page):
    known = {
        option
        for one in (PROGRAM, *PROGRAM.commands.values(), *SCRIPT.commands.values())
        for param in one.params
        for option in param.opts
    }
    spans = [span for _, span in SPAN.findall(FENCE.sub("", page.read_text()))]
    named = {option for span in spans for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", span)}
    assert named <= known | {"--help"} | FOREIGN_OPTIONS, (
        f"no command has {', '.join(named - known)}"
    )


def test_modes_of_the_setup_script_exist():
    script = ROOT / "colab_setup.sh"
    usage = subprocess.run(
        ["bash", str(script), "help"], capture_output=True, text=True, check=True
    ).stdout
    named = {
        mode
        for page in (README, *DOCS)
        for mode in re.findall(r"bash colab_setup\.sh ([a-z]+)", page.read_text())
    }
    assert {"rate", "demo", "test"} <= named
    wrong = [mode for mode in sorted(named) if f"bash colab_setup.sh {mode}" not in usage]
    assert not wrong, f"colab_setup.sh has no {', '.join(wrong)}"
