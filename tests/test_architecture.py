"""The house rules that a machine can hold: import floors, sizes, docstrings, one repository
address. Cost: 5 s."""

import ast
import collections
import graphlib
import json
import re
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = "percepiano_ast"
FILES = sorted((REPOSITORY / PACKAGE).rglob("*.py"))
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))

# A room is a module or a folder of the package; it imports from lower floors only. "" is the
# package's __init__.
FLOORS = {
    "": 0,
    "config": 0,
    "dimensions": 0,
    "errors": 0,
    "files": 0,
    "tables": 0,
    "audio": 1,
    "music": 2,
    "evaluation": 2,
    "plots": 3,
    "data": 4,
    "models": 5,
    "training": 6,
    "inference": 7,
    "studies": 8,
    "pipeline": 9,
    "colab": 10,
    "notebook": 10,
    "run_notebooks": 2,
    "cli": 12,
    "__main__": 13,
}
# The only rooms that look across on their own floor: who -> whom.
NEIGHBOURS = {("config", "errors"), ("files", "errors"), ("tables", "errors")}
# What models/ and training/ do without, so that they run on a TPU host that has only the JAX stack.
HEAVY = {"librosa", "tensorflow", "tensorflow_datasets", "grain", "sklearn", "pandas", "matplotlib"}
BADGE = r"colab\.research\.google\.com/github/([^/\s]+/[^/\s]+)/blob/main/([^\s)\"']+)"


def module_name(path: Path) -> str:
    """Dotted name of a package file."""
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): ast.parse(path.read_text(), str(path)) for path in FILES}


def imports(name: str, tree: ast.AST) -> list[tuple[int, str]]:
    """``(line, dotted name)`` of every import in a module, those inside functions too, relative
    ones resolved."""
    found = []
    is_package = (REPOSITORY.joinpath(*name.split(".")) / "__init__.py").exists()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".")
                above = parts[: len(parts) - node.level + is_package]
                base = ".".join(above + ([node.module] if node.module else []))
            # `from package import x` may name a module: take that reading where such a module
            # exists.
            found += [
                (node.lineno, full if (full := f"{base}.{alias.name}") in MODULES else base)
                for alias in node.names
            ]
    return found


def room(name: str) -> str:
    """The room of a dotted module name inside the package."""
    return (name.split(".") + [""])[1]


def test_imports_go_downward():
    wrong = []
    for name, tree in MODULES.items():
        here = room(name)
        assert here in FLOORS, (
            f"{name}: a new room; give {here!r} a floor in this test and say why in the change"
        )
        for line, target in imports(name, tree):
            there = room(target)
            if target.split(".")[0] != PACKAGE or there == here or (here, there) in NEIGHBOURS:
                continue
            if FLOORS.get(there, 99) >= FLOORS[here]:
                wrong.append(
                    f"{name}:{line} (floor {FLOORS[here]}) imports {target} (floor"
                    f" {FLOORS.get(there)})"
                )
    assert not wrong, "\n".join(wrong)


def test_no_import_cycles():
    graph = {
        name: {t for _, t in imports(name, tree) if t in MODULES and t != name}
        for name, tree in MODULES.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def test_models_and_training_name_no_heavy_package():
    wrong = [
        f"{name}:{line} imports {target}"
        for name, tree in MODULES.items()
        if room(name) in ("models", "training")
        for line, target in imports(name, tree)
        if target.split(".")[0] in HEAVY
    ]
    assert not wrong, "\n".join(wrong)


def test_models_and_training_import_without_heavy_packages():
    wings = [name for name in MODULES if room(name) in ("models", "training")]
    code = (
        f"import importlib, sys\nsys.modules.update(dict.fromkeys({sorted(HEAVY)!r}))\n"
        f"for name in {wings!r}: importlib.import_module(name)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_google_colab_is_imported_in_functions_of_colab_py_alone():
    for name, tree in MODULES.items():
        lines = {
            line for line, target in imports(name, tree) if re.match(r"google\.colab\b", target)
        }
        if name != f"{PACKAGE}.colab":
            assert not lines, f"{name}:{lines} imports google.colab; only colab.py may"
        inside = {
            node.lineno
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
            for node in ast.walk(function)
            if isinstance(node, ast.Import | ast.ImportFrom)
        }
        assert lines <= inside, f"{name}:{lines - inside} imports google.colab outside a function"


def test_a_name_means_one_thing():
    """No public class and no file name stands twice; only folders share `__init__`."""
    classes, files = collections.defaultdict(set), collections.defaultdict(set)
    for path, (name, tree) in zip(FILES, MODULES.items(), strict=True):
        files[path.name].add(name)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                classes[node.name].add(name)
    del files["__init__.py"]
    assert not {word: found for word, found in (classes | files).items() if len(found) > 1}


def reused_quotes(path: Path) -> list[int]:
    """Lines of strings inside f-strings that hold the quotes of the f-string, which Python 3.11
    cannot read."""
    lines, within = [], []
    with open(path, "rb") as file:
        for token in tokenize.tokenize(file.readline):
            name = tokenize.tok_name[token.type]
            if name == "FSTRING_END":
                within.pop()
            elif name in ("FSTRING_START", "STRING"):
                quotes = token.string.lstrip("rRbBuUfF")
                quote = quotes[:3] if quotes[:3] in ('"""', "'''") else quotes[:1]
                if any(outer in token.string for outer in within):
                    lines.append(token.start[0])
                if name == "FSTRING_START":
                    within.append(quote)
    return lines


@pytest.mark.skipif(
    sys.version_info < (3, 12),
    reason="before Python 3.12 f-strings are single tokens, and the import fails",
)
def test_the_oldest_python_can_read_every_file():
    assert {path.name: lines for path in FILES if (lines := reused_quotes(path))} == {}


def undocumented(owner: str, body: list[ast.stmt]) -> list[str]:
    """Public functions and classes without a docstring; Flax's ``setup`` hook is documented by
    Flax."""
    missing = []
    for node in body:
        if not isinstance(
            node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        ) or node.name.startswith("_"):
            continue
        if ast.get_docstring(node) is None and node.name != "setup":
            missing.append(f"{owner}.{node.name}")
        if isinstance(node, ast.ClassDef):
            missing += undocumented(f"{owner}.{node.name}", node.body)
    return missing


def test_everything_public_has_a_docstring():
    missing = [name for name, tree in MODULES.items() if ast.get_docstring(tree) is None]
    for name, tree in MODULES.items():
        missing += undocumented(name, tree.body)
    assert not missing, "no docstring: " + ", ".join(missing)


def notebook_sources(path: Path) -> str:
    """All cells of a notebook, without outputs."""
    return "\n".join("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"])


def test_one_repository_address():
    with open(REPOSITORY / "pyproject.toml", "rb") as file:
        address = tomllib.load(file)["project"]["urls"]["Repository"]
    slug = address.removeprefix("https://github.com/")
    readme = REPOSITORY / "README.md"
    texts = {path.name: notebook_sources(path) for path in NOTEBOOKS}
    texts |= {"README.md": readme.read_text()} if readme.exists() else {}
    for name, text in texts.items():
        for there, target in re.findall(BADGE, text):
            assert there == slug, f"{name}: the badge opens {there}, pyproject.toml says {slug}"
            assert (REPOSITORY / target).exists(), (
                f"{name}: the badge opens {target}, which does not exist"
            )
        for cloned in re.findall(r"git clone [^\n]*?(https://[^\s\"']+)", text):
            assert cloned.removesuffix(".git") == address, (
                f"{name}: clones {cloned}, pyproject.toml says {address}"
            )
    for path in NOTEBOOKS:
        assert f"github/{slug}/blob/main/notebooks/{path.name}" in texts[path.name], (
            f"{path.name}: no badge of its own"
        )
        assert re.search(r"git clone [^\n]*" + re.escape(address), texts[path.name]), (
            f"{path.name}: no clone cell"
        )


def tracked_texts() -> list[Path]:
    """The project's own text files, as a clone has them."""
    suffixes = {".py", ".ipynb", ".md", ".txt", ".toml", ".sh", ".csv", ".json", ""}
    folders = [REPOSITORY / name for name in (PACKAGE, "tests", "notebooks", ".ci")]
    found = [path for path in REPOSITORY.iterdir() if path.is_file()]
    found += [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return [path for path in found if path.suffix in suffixes and "__pycache__" not in path.parts]


@pytest.mark.parametrize("machine", ["work", "tmp/w", "root", "home/[a-z]+"])
def test_no_path_of_one_machine(machine):
    pattern = re.compile(rf"(?<![\w.~}}]){'/'}{machine}/")
    wrong = []
    for path in tracked_texts():
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if pattern.search(line) and "image/png" not in line:
                wrong.append(f"{path.relative_to(REPOSITORY)}:{number}")
    assert not wrong, f"a path below /{machine} in {', '.join(wrong)}"
