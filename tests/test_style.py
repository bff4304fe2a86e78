"""Lint, format and types: ruff over the repository, mypy over the package. Cost: half a minute.

`colab_setup.sh test` installs both; of another release that happens to be there, the findings would
be others.
"""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parent.parent
SETUP = (REPOSITORY / "colab_setup.sh").read_text()


def wanted(tool: str) -> Requirement:
    """What `colab_setup.sh test` installs of a tool."""
    return Requirement(re.search(rf"'({tool}>=[^']+)'", SETUP)[1])


def lacking(*requirements: Requirement) -> str:
    """The first of these that is missing here or of another version, in words; empty where all are
    there."""
    for requirement in requirements:
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            return f"{requirement} is not installed; `colab_setup.sh test` does that"
        if found not in requirement.specifier:
            return f"made for {requirement}, here is {found}"
    return ""


def needs(*requirements: Requirement):
    """A mark that skips without these, and says why."""
    return pytest.mark.skipif(bool(why := lacking(*requirements)), reason=why)


def run(*command: str) -> None:
    """Run a tool of this environment over the repository; what it says is shown when it finds
    something."""
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs(wanted("ruff"))
@pytest.mark.parametrize("command", ["check", "format --check"])
def test_ruff_finds_nothing(command):
    run("ruff", *command.split(), "--no-cache", ".")


def annotated() -> list[Requirement]:
    """Colab's versions of the libraries whose annotations, which differ from release to release,
    the package is held against."""
    lines = (REPOSITORY / ".ci" / "colab-versions.txt").read_text().splitlines()
    found = [
        Requirement(line)
        for line in lines
        if re.match(r"(numpy|jax|flax|optax|matplotlib|librosa|music21|scipy)=", line)
    ]
    assert len(found) == 8
    return found


@needs(wanted("mypy"), *annotated())
def test_types_agree(tmp_path):
    run("mypy", "--cache-dir", str(tmp_path), "--python-executable", sys.executable)
