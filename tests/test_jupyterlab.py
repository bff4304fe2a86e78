"""The notebooks in JupyterLab, in a real browser: opened, "Run All Cells" chosen from the menu,
looked at.

Cost: 7 to 9 minutes on two cores that do other work too. Needs ``pip install jupyterlab
playwright`` and ``apt install chromium``, which nothing else does, and is skipped without.
``JUPYTER_LAB`` names the ``jupyter-lab`` command where it lies in another environment; kernels run
in this one. ``JUPYTER_LAB_SHOTS`` names a folder for pictures of the notebooks as they were on the
screen.
"""

import importlib.util
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import pytest

from percepiano_ast import run_notebooks

REPOSITORY = Path(__file__).resolve().parent.parent
LAB = os.environ.get("JUPYTER_LAB") or shutil.which(
    "jupyter-lab", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
)
CHROMIUM = shutil.which("chromium")
MISSING = {
    "pip install jupyterlab (or set JUPYTER_LAB)": not LAB,
    "pip install playwright": not importlib.util.find_spec("playwright"),
    "apt install chromium": not CHROMIUM,
}
TODO = "; ".join(how for how, missing in MISSING.items() if missing)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(TODO), reason=f"no JupyterLab in a browser here: {TODO}"),
]

TOKEN = secrets.token_hex()  # whoever knows it runs code as who runs this test
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SETTINGS = {
    # else only cells in view are there to be counted
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {
        "fetchNews": "false",
        "checkForUpdates": False,
        "doNotDisturbMode": True,
    },
}
PATIENCE = 45 * 60  # seconds for a notebook, beside other work
OVER = """() => {
  const found = document.querySelectorAll(".jp-CodeCell .jp-InputPrompt");
  const prompts = [...found].map((prompt) => prompt.textContent);
  const idle = document.querySelector(".jp-Notebook-ExecutionIndicator")?.dataset.status === "idle";
  const failed = document.querySelector('[data-mime-type="application/vnd.jupyter.error"]');
  return failed || (idle && prompts.every((text) => /\\[\\d+\\]/.test(text)));
}"""

EXTENT = """(panel) => {
  panel.scrollTo(0, 0);  // below the last cell there is a screenful of nothing
  const bottom = [...panel.querySelectorAll(".jp-Cell")].at(-1).getBoundingClientRect().bottom;
  return [Math.ceil(bottom - panel.getBoundingClientRect().top), panel.clientHeight];
}"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What a clone looks like to a notebook; what it writes goes there. The kernel is this
    environment's Python."""
    clone = tmp_path_factory.mktemp("clone")
    shutil.copytree(
        run_notebooks.FOLDER,
        clone / "notebooks",
        ignore=shutil.ignore_patterns(".ipynb_checkpoints"),
    )
    shutil.copy(REPOSITORY / "colab_setup.sh", clone)
    return clone


@pytest.fixture(scope="module")
def address(clone, tmp_path_factory):
    """Where JupyterLab answers, for somebody who has never used it before."""
    home = tmp_path_factory.mktemp("home")
    command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel = {
        "argv": command,
        "display_name": "Python 3",
        "language": "python",
        "env": {"PYTHONPATH": str(REPOSITORY)},
    }
    files = {home / "jupyter/kernels/python3/kernel.json": kernel}
    files |= {
        home / f"settings/@jupyterlab/{name}.jupyterlab-settings": values
        for name, values in SETTINGS.items()
    }
    for path, content in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    # The test's own settings of Python, JAX and matplotlib are not this user's.
    kept = {
        name: value
        for name, value in os.environ.items()
        if not re.match("PYTHON|JAX_|MPL|JUPYTER|XLA_", name)
    }
    own = {
        "HOME": str(home),
        "JUPYTER_PATH": str(home / "jupyter"),
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        f"--port={port}",
        f"--IdentityProvider.token={TOKEN}",
    ]
    with (home / "log").open("w") as log:
        server = subprocess.Popen(
            [LAB, *options], cwd=clone, env=kept | own, stdout=log, stderr=log
        )
    try:
        _await(f"http://127.0.0.1:{port}", server, home / "log")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(60)


def _await(address: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(120):
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"{address}/api?token={TOKEN}", timeout=10):
                return
        except urllib.error.URLError:
            time.sleep(1)
    pytest.fail(f"JupyterLab does not answer: {log.read_text()}")


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    named = os.environ.get("JUPYTER_LAB_SHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("shots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run_all(page, address: str, name: str) -> None:
    """Open a notebook, as from the list of files, and choose Run > Run All Cells."""
    page.goto(f"{address}/lab/tree/notebooks/{name}.ipynb?reset&token={TOKEN}")
    # Earlier the menu does nothing: the kernel is "Initializing", and what was to be run is
    # forgotten when it is there.
    page.get_by_text(re.compile(r"\| Idle$")).wait_for(timeout=300_000)
    page.locator(".lm-MenuBar-itemLabel", has_text=re.compile("^Run$")).click()
    page.locator(".lm-Menu-itemLabel", has_text=re.compile("^Run All Cells$")).click()
    page.wait_for_function(OVER, timeout=1000 * PATIENCE, polling=1000)


def photograph(page, folder: Path, name: str) -> int:
    """The whole notebook, a PNG a screenful: how many there are."""
    page.mouse.move(0, 0)  # JupyterLab marks what the mouse is on
    panel = page.locator(".jp-WindowedPanel-outer")
    height, seen = panel.evaluate(EXTENT)
    tops = range(0, height, seen)
    for number, top in enumerate(tops):
        panel.evaluate("(panel, top) => panel.scrollTo(0, top)", top)
        page.wait_for_timeout(300)  # until it is painted
        panel.screenshot(path=folder / f"{name}_{number:02d}.png")
    return len(tops)


def shown(page, mime_type: str) -> list[str]:
    """Texts of all outputs of a type."""
    return page.locator(f'.jp-OutputArea-output[data-mime-type="{mime_type}"]').all_inner_texts()


def count(page, selector: str, true: str) -> int:
    """How many elements of the outputs have some extent on the page and fulfil a condition in
    JavaScript."""
    function = (
        f"(all) => all.filter((one) => one.getBoundingClientRect().height > 10 && ({true})).length"
    )
    return page.locator(f".jp-OutputArea-output {selector}").evaluate_all(function)


@pytest.mark.parametrize("name", run_notebooks.NAMES)
def test_a_notebook_runs_and_shows_what_it_promises(browser, address, clone, shots, name):
    """As many figures, tables and texts as the committed notebook shows; sound to hear; nothing
    red."""
    committed = nbformat.read(clone / "notebooks" / f"{name}.ipynb", as_version=4)
    cells = [cell for cell in committed.cells if cell.cell_type == "code"]
    promised = [data for cell in cells for output in cell.outputs if (data := output.get("data"))]
    page = browser.new_page(viewport={"width": 1500, "height": 1300})
    run_all(page, address, name)
    assert photograph(page, shots, name) > 1
    for red in ("error", "stderr"):
        assert shown(page, f"application/vnd.jupyter.{red}") == []
    figures = sum("<img" in data.get("text/html", "") for data in promised)
    assert count(page, "img", "one.naturalWidth > 300 && one.alt.includes('axis: ')") == figures > 0
    assert count(page, "table", "one.rows.length > 1") == sum(
        "<table" in data.get("text/html", "") for data in promised
    )
    assert count(page, "td", "one.innerText.endsWith('...')") == 0  # pandas cuts off what is long
    assert len(list(filter(None, shown(page, "text/markdown")))) == sum(
        "text/markdown" in data for data in promised
    )
    assert count(page, "audio", "one.controls && one.duration > 5") == sum(
        cell.source.count("Audio(") for cell in cells
    )
    page.close()
    _shut_down_kernels(browser, address)


def _shut_down_kernels(browser, address: str) -> None:
    """Each holds a gigabyte."""
    page = browser.new_page()
    for kernel in page.request.get(f"{address}/api/kernels?token={TOKEN}").json():
        page.request.delete(f"{address}/api/kernels/{kernel['id']}?token={TOKEN}")
    page.close()


def test_what_a_run_writes_lies_in_the_folder_of_the_clone(clone):
    assert (clone / "runs/demo/evaluation/report.html").is_file() and (
        clone / "runs/recordings/example.html"
    ).is_file()
