"""colab_setup.sh, pyproject.toml and .ci: what a stranger types first. Cost: 3 s; -m slow
installs for real."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import imageio_ffmpeg
import pytest
from packaging.requirements import Requirement

from percepiano_ast.data import demo

REPOSITORY = Path(__file__).resolve().parent.parent
CONSTRAINTS = REPOSITORY / ".ci" / "colab-versions.txt"


with open(REPOSITORY / "pyproject.toml", "rb") as file:
    PROJECT = tomllib.load(file)["project"]


def required(extra: str = "") -> list[Requirement]:
    """What the package needs, with one of its extras and those that it includes."""
    lines = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    found = []
    for one in map(Requirement, lines):
        included = [required(name) for name in one.extras if one.name == PROJECT["name"]]
        found += sum(included, []) or [one]
    return found


def clean_environment(**extra: str) -> dict[str, str]:
    """This process's environment without what steers the script; ``extra`` on top."""
    steering = {"PYTHON", "PIP_CONSTRAINT", "COLAB_RELEASE_TAG", "COLAB_TPU_ADDR", "TPU_NAME"}
    return {name: value for name, value in os.environ.items() if name not in steering} | extra


def setup(checkout: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """Run the script of a checkout from somewhere else, as nobody at a keyboard."""
    return subprocess.run(
        ["bash", str(checkout / "colab_setup.sh"), *arguments],
        cwd="/",
        env=clean_environment(**environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of the project without its environment and runs."""
    keep_out = shutil.ignore_patterns(
        ".git", ".venv*", "runs", "__pycache__", "*.egg-info", ".pytest_cache"
    )
    return shutil.copytree(REPOSITORY, tmp_path / "checkout with space", ignore=keep_out)


def fake_python(folder: Path, patch: str) -> Path:
    """An interpreter that runs for real but for one line of Python done to it at start."""
    (folder / "patch").mkdir(parents=True)
    (folder / "patch" / "sitecustomize.py").write_text(f"import sys\n{patch}\n")
    path = folder / "python"
    path.write_text(f"#!/bin/sh\nPYTHONPATH='{folder}/patch' exec '{sys.executable}' \"$@\"\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("script", ["colab_setup.sh", ".ci/run"])
def test_scripts_parse_and_stop_at_errors(script):
    path = REPOSITORY / script
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    assert "set -euo pipefail" in path.read_text()


def test_ci_runs_the_users_test_command():
    text = (REPOSITORY / ".ci" / "run").read_text()
    assert re.search(r"^exec bash colab_setup\.sh test\b", text, re.M)
    assert os.access(REPOSITORY / ".ci" / "run", os.X_OK)


def test_help_names_every_mode(checkout):
    run = setup(checkout, "help")
    assert run.returncode == 0
    assert all(mode in run.stdout for mode in ("rate FILE", "demo", "test", "PYTHON="))


@pytest.mark.parametrize("arguments", [["demos"], ["demo", "base"], ["--force"], ["rate"]])
def test_unknown_argument_is_refused_before_anything_is_made(checkout, arguments):
    run = setup(checkout, *arguments)
    assert run.returncode == 2
    assert arguments[-1] in run.stderr and "colab_setup.sh demo" in run.stderr
    assert not (checkout / ".venv").exists()


def test_old_python_is_refused_by_version(checkout, tmp_path):
    old = fake_python(tmp_path / "old", "sys.version_info = (3, 9, 18, 'final', 0)")
    run = setup(checkout, PYTHON=str(old))
    assert run.returncode == 2
    assert "is Python 3.9" in run.stderr and "3.11" in run.stderr
    assert not (checkout / ".venv").exists()


def test_python_that_does_not_run_is_refused(checkout):
    run = setup(checkout, PYTHON="no-such-python")
    assert run.returncode == 2
    assert "no-such-python" in run.stderr


def test_python_without_ensurepip_names_the_package_to_install(checkout, tmp_path):
    bare = fake_python(tmp_path / "bare", "sys.modules['ensurepip'] = None")
    run = setup(checkout, PYTHON=str(bare))
    assert run.returncode == 1
    assert (
        f"apt-get install python{sys.version_info.major}.{sys.version_info.minor}-venv"
        in run.stderr
    )


def test_no_python_at_all_says_so(checkout, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "cat", "dirname", "mktemp", "rm", "sort"):
        (tools / tool).symlink_to(shutil.which(tool))
    run = setup(checkout, PATH=str(tools), HOME=str(tmp_path))
    assert run.returncode == 1
    assert "no Python of 3.11 to 3.13" in run.stderr


def test_an_environment_made_by_somebody_else_is_left_alone(checkout):
    mine = checkout / ".venv" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("precious")
    run = setup(checkout, PYTHON=sys.executable)
    assert run.returncode == 2
    assert "was not made by this script" in run.stderr
    assert mine.read_text() == "precious"


def test_requirements_are_lower_bounds_with_a_reason():
    lines = re.findall(r'^    "(.+)",(.*)$', (REPOSITORY / "pyproject.toml").read_text(), re.M)
    given = {line: comment for line, comment in lines if line in map(str, everything())}
    assert len(given) == len(everything())
    for line, comment in given.items():
        assert comment.strip().startswith("# "), f"{line}: why?"
        assert {part.operator for part in Requirement(line).specifier} == {">="}, (
            f"{line}: a lower bound only"
        )


def everything() -> list[Requirement]:
    """What the tests need, and all that they test."""
    return required() + required("test")


def test_requirements_txt_is_everything():
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["-e .[test]"]


def test_colab_has_what_the_lower_bounds_ask_for():
    colab = {}
    for line in CONSTRAINTS.read_text().splitlines():
        if line.startswith("#"):
            continue
        requirement = Requirement(line)
        colab[requirement.name.lower()] = next(iter(requirement.specifier)).version
        assert str(requirement.marker) == 'python_version == "3.13"', (
            f"{line}: would bind another Python too"
        )
    # what Colab lacks
    absent = {
        "mido",
        "pyfluidsynth",
        "pyloudnorm",
        "gcp-storage-emulator",
        "pytest-xdist",
        "mir_eval",
    }
    for requirement in everything():
        if requirement.name not in absent:
            assert colab[requirement.name.lower()] in requirement.specifier, (
                f"Colab's {requirement.name} is too old"
            )


def test_rating_imports_nothing_that_its_set_up_leaves_out(tmp_path):
    left_out = {one.name for one in everything()} - {one.name for one in required()}
    assert {
        "tensorflow-datasets",
        "grain",
        "array_record",
        "matplotlib",
        "gcsfs",
        "pytest",
        "music21",
    } <= left_out
    modules = {name.replace("-", "_").removeprefix("py") for name in left_out} - {
        "optax",  # of Flax
        "orbax_checkpoint",
        "scikit_learn",
        "etils",
        "absl_py",
    }
    blocked = sorted(modules | {"fluidsynth", "orbax.checkpoint"})
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked!r}))\n"
        "from percepiano_ast.cli import main\n"
        "sys.exit(main(['rate', 'example.wav', '--json', '--html', 'page.html', '--csv', 't.csv']))"
    )
    demo.write_example(tmp_path, "example")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.html").exists() and "timing_stable_unstable" in done.stdout


@pytest.mark.parametrize(
    ("command", "missing", "extra"),
    [("notebooks", "nbformat", "notebooks"), ("finetune", "tensorflow_datasets", "train")],
)
def test_a_command_without_its_packages_names_the_extra(command, missing, extra, tmp_path):
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from percepiano_ast.cli import main\n"
        f"sys.exit(main([{command!r}, '--out', 'run']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    line = f'error: this command needs {missing}. Run pip install "percepiano_ast[{extra}]"'
    assert (done.returncode, done.stderr.strip()) == (2, line)


@pytest.mark.slow
def test_a_recording_is_rated_by_one_command_without_soundfonts_tests_or_ffmpeg(checkout, tmp_path):
    here = tmp_path / "elsewhere"
    here.mkdir()
    wave = demo.write_example(here, "example")
    subprocess.run(
        [
            imageio_ffmpeg.get_ffmpeg_exe(),
            "-v",
            "error",
            "-i",
            wave,
            "-b:a",
            "192k",
            here / "take.m4a",
        ],
        check=True,
    )
    tools = tmp_path / "tools"  # a PATH without ffmpeg
    tools.mkdir()
    for tool in (
        "bash",
        "cat",
        "cksum",
        "dirname",
        "ls",
        "mkdir",
        "mktemp",
        "mv",
        "rm",
        "sed",
        "sort",
        "tail",
    ):
        (tools / tool).symlink_to(shutil.which(tool))
    run = subprocess.run(
        ["bash", checkout / "colab_setup.sh", "rate", "example.wav", "take.m4a", "--json"],
        cwd=here,
        env=clean_environment(PYTHON=sys.executable, PATH=str(tools)),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    rated = json.loads(run.stdout)
    assert (
        max(abs(rated[0]["ratings"][key] - rated[1]["ratings"][key]) for key in rated[0]["ratings"])
        < 0.02
    )
    installed = freeze(checkout / ".venv/bin/python")
    assert not {"pytest", "pyfluidsynth", "tensorflow-datasets", "grain"} & installed.keys()
    command = subprocess.run(
        [checkout / ".venv/bin/percepiano", "--version"], capture_output=True, text=True
    )
    assert command.returncode == 0 and command.stdout.startswith("percepiano ")


def freeze(python: Path) -> dict[str, str]:
    """Versions of everything installed, by name; without the package under test."""
    run = subprocess.run(
        [python, "-m", "pip", "list", "--format=freeze"], capture_output=True, text=True, check=True
    )
    versions = dict(line.split("==") for line in run.stdout.splitlines())
    return {
        name: version for name, version in versions.items() if not name.startswith("percepiano")
    }


@pytest.mark.slow
def test_installs_once_and_repairs_what_a_kill_left(checkout):
    first = setup(checkout, PYTHON=sys.executable)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "all work" in first.stdout
    before = freeze(checkout / ".venv/bin/python")

    start = time.monotonic()
    again = setup(checkout, PYTHON=sys.executable)
    assert again.returncode == 0 and "up to date" in again.stdout, again.stdout + again.stderr
    assert time.monotonic() - start < 30
    assert freeze(checkout / ".venv/bin/python") == before

    # A kill in mid-installation: the process group dies while pip runs, and leaves what it leaves.
    with open(checkout / "pyproject.toml", "a") as file:
        file.write("\n# asks for another installation\n")
    command = ["bash", str(checkout / "colab_setup.sh")]
    environment = clean_environment(PYTHON=sys.executable)
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as run:
        assert "installing" in run.stdout.readline()
        os.killpg(run.pid, 9)
    shutil.rmtree(next((checkout / ".venv").glob("lib/python3*/site-packages/numpy")))
    repaired = setup(checkout, PYTHON=sys.executable)
    assert repaired.returncode == 0, repaired.stdout + repaired.stderr
    assert "rebuilding" in repaired.stdout and "all work" in repaired.stdout


@pytest.mark.slow
@pytest.mark.skipif(
    sys.version_info[:2] != (3, 13), reason="Colab's versions are those of Python 3.13"
)
def test_colab_gets_what_is_missing_and_nothing_moves(checkout, tmp_path):
    base = getattr(sys, "_base_executable", sys.executable)
    subprocess.run([base, "-m", "venv", tmp_path / "colab"], check=True)
    python = tmp_path / "colab/bin/python"
    # with the tensorflow-metadata that Colab has and that does not load
    colab = tmp_path / "colab.txt"
    colab.write_text(
        CONSTRAINTS.read_text().replace(
            "tensorflow-metadata==1.17.2", "tensorflow-metadata==1.21.0"
        )
    )
    have = [
        str(one)
        for one in required() + required("notebooks")
        if one.name not in ("mido", "pyfluidsynth")
    ]
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "-c", colab, *have], check=True, capture_output=True
    )
    before = freeze(python)
    assert before["tensorflow-metadata"] == "1.21.0"

    on_colab = {
        "COLAB_RELEASE_TAG": "release-test",
        "PATH": f"{python.parent}:{os.environ['PATH']}",
    }
    run = setup(checkout, **on_colab)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "tensorflow-metadata by 1.17.2" in run.stdout and "all work" in run.stdout
    after = freeze(python)
    assert "pytest" not in after and "gcp-storage-emulator" not in after
    moved = {name for name in before if after.get(name) != before[name]}
    assert moved == {"tensorflow-metadata"}
    new = set(after) - set(before)
    assert new == {"mido", "pyfluidsynth"}
    assert not (checkout / ".venv").exists()

    again = setup(checkout, **on_colab)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "installing" not in again.stdout and freeze(python) == after


@pytest.mark.slow
def test_a_plain_installation_rates_a_recording_and_no_more(checkout, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "slim"], check=True)
    programs = tmp_path / "slim" / "bin"
    subprocess.run([programs / "pip", "install", "--quiet", checkout], check=True)
    assert not freeze(programs / "python").keys() & {
        "array_record",
        "gcsfs",
        "grain",
        "imageio-ffmpeg",
        "matplotlib",
        "music21",
        "pyfluidsynth",
        "pytest",
        "tensorflow-datasets",
        "tqdm",
    }
    files = tmp_path.glob("slim/lib/python3*/site-packages/**/*")
    megabytes = sum(path.stat().st_size for path in files if path.is_file()) / 1e6
    assert megabytes < 1200, f"{megabytes:.0f} MB"
    wave = demo.write_example(tmp_path, "example")
    environment = clean_environment()
    environment.pop("PYTHONPATH", None)
    here = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    rated = subprocess.run([programs / "percepiano", "rate", wave, "--json"], **here)
    assert rated.returncode == 0, rated.stderr
    code = (
        "import sys, percepiano_ast\n"
        "print(percepiano_ast.rate(sys.argv[1]).ratings['timing_stable_unstable'])"
    )
    again = subprocess.run([programs / "python", "-c", code, wave], **here)
    assert again.returncode == 0, again.stderr
    ratings = json.loads(rated.stdout)[0]["ratings"]
    assert abs(float(again.stdout) - ratings["timing_stable_unstable"]) < 1e-3
    (tmp_path / "score.musicxml").write_text("<score-partwise/>")
    scored = [programs / "percepiano", "rate", wave, "--score", "score.musicxml"]
    refused = subprocess.run(scored, **here)
    assert refused.returncode == 2 and 'pip install "percepiano_ast[formats]"' in refused.stderr


@pytest.mark.slow
def test_a_wheel_rates_a_recording_where_there_is_no_repository(checkout, tmp_path):
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(tmp_path),
        str(checkout),
    ]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("percepiano_ast-*.whl")
    shutil.unpack_archive(wheel, tmp_path / "installed", "zip")
    (information,) = (tmp_path / "installed").glob("*.dist-info")
    metadata = (information / "METADATA").read_text()
    assert "License-Expression: Apache-2.0 AND CC-BY-NC-SA-4.0\n" in metadata
    texts = "".join(path.read_text() for path in (information / "licenses").rglob("LICENSE*"))
    assert "Apache License" in texts and "NonCommercial-ShareAlike 4.0 International" in texts
    needed = re.findall(r"Requires-Dist: ([\w.-]+)(?!.*extra ==)", metadata)
    assert not {"pytest", "nbclient", "ipykernel", "music21", "tensorflow-datasets"} & {*needed}
    code = "from percepiano_ast.data import demo; print(demo.write_example('.', 'example'))"
    here = {
        "cwd": tmp_path,
        "env": clean_environment(PYTHONPATH=str(tmp_path / "installed")),
        "capture_output": True,
        "text": True,
    }
    subprocess.run([sys.executable, "-c", code], check=True, **here)
    command = [
        sys.executable,
        "-m",
        "percepiano_ast",
        "rate",
        "example.wav",
        "--json",
        "--html",
        "page.html",
    ]
    done = subprocess.run(command, check=True, **here)
    assert '"timing_stable_unstable"' in done.stdout and (tmp_path / "page.html").exists()
