"""Run the notebooks headless, as a person would with "Run all", and keep them as the project ships them."""

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from percepiano_ast.config import InputError, RunFailed

FOLDER = Path(__file__).parent.parent / "notebooks"
NAMES = (
    "01_preprocess_maestro", "02_ssast_pretrain_tpu", "03_finetune_percepiano_gpu", "04_evaluate", "05_rate_a_recording"
)  # fmt: skip
_FORM = re.compile(r"^(?P<name>[A-Z_]+)(?P<middle> = )(?P<value>.+?)(?P<param>\s+#@param.*)$", re.MULTILINE)


def with_form(notebook: nbformat.NotebookNode, values: dict) -> nbformat.NotebookNode:
    """The notebook with form rows ``NAME = value  #@param`` set to ``values``; rows it does not have are left out.

    Cells are otherwise untouched: what runs is what a person runs after filling in the form.
    """
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = _FORM.sub(lambda row: _fill(row, values), cell.source)
    return notebook


def _fill(row: re.Match, values: dict) -> str:
    value = repr(values[row["name"]]) if row["name"] in values else row["value"]
    return f"{row['name']}{row['middle']}{value}{row['param']}"


def form_of(notebook: nbformat.NotebookNode) -> dict[str, str]:
    """Names and source text of the form's values, in order."""
    rows = [row for cell in notebook.cells if cell.cell_type == "code" for row in _FORM.finditer(cell.source)]
    return {row["name"]: row["value"] for row in rows}


def run(
    out: str | Path,
    values: dict,
    *,
    names: tuple[str, ...] = NAMES,
    keep: bool = False,
    log: Callable[[str], None] = print,
) -> None:
    """Run notebooks one after the other; executed copies go to ``out/notebooks``.

    Args:
        values: of the form, by name (``PRESET``, ``KEEP_IN``, ...); every name must be a row of some notebook's form.
        keep: also put the outputs, without sound and clutter, into the notebooks that are shipped.

    Raises:
        InputError: a value that no form has a row for, or one raised in a cell.
        RunFailed: a cell raised anything else.
    """
    loaded = {name: nbformat.read(FOLDER / f"{name}.ipynb", as_version=4) for name in names}
    rows = set().union(*(form_of(notebook) for notebook in loaded.values()))
    if unknown := sorted(values.keys() - rows):
        raise InputError(f"no notebook has a form row {unknown[0]}; rows are {', '.join(sorted(rows))}")
    copies = Path(out) / "notebooks"
    copies.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    for number, (name, notebook) in enumerate(loaded.items(), start=1):
        log(f"[{number}/{len(loaded)}] {name}")
        shipped = [cell.source for cell in notebook.cells]
        try:
            _execute(with_form(notebook, values), log)
        finally:
            nbformat.write(notebook, copies / f"{name}.ipynb")
        log(f"[{number}/{len(loaded)}] {name} done, {time.monotonic() - started:.0f} s in all")
        if keep:
            for cell, source in zip(notebook.cells, shipped):
                cell.source = source
            nbformat.write(tidy(notebook), FOLDER / f"{name}.ipynb")


class _Client(NotebookClient):
    """Passes on what cells print while they run, not when they end."""

    say: Callable[[str], None] = print

    def process_message(self, message, cell, cell_index):
        content = message["content"]
        if message["msg_type"] == "stream" and content["name"] == "stdout":
            for line in content["text"].splitlines():
                self.say(f"    {line}")
        return super().process_message(message, cell, cell_index)


def _execute(notebook: nbformat.NotebookNode, log: Callable[[str], None]) -> None:
    resources = {"metadata": {"path": str(FOLDER.parent)}}
    # Kernels on this machine's own address: newer ones warn that the connection is not encrypted.
    quiet = ["--IPKernelApp.log_level=ERROR"]
    client = _Client(notebook, timeout=None, kernel_name="python3", resources=resources, extra_arguments=quiet)
    client.say = log
    try:
        # The variable spares every kernel four lines about its debugger.
        client.execute(env={**os.environ, "PYDEVD_DISABLE_FILE_VALIDATION": "1"})
    except CellExecutionError as error:
        if error.ename == InputError.__name__:
            raise InputError(error.evalue) from error
        raise RunFailed(f"{error.ename}: {error.evalue}") from error


def tidy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Outputs fit to be committed: no sound, no warnings, no widget state, no timings, no counts."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        cell.execution_count = None
        cell.outputs = [output for output in cell.outputs if not _is_sound(output) and output.get("name") != "stderr"]
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = None
    return notebook


def _is_sound(output: nbformat.NotebookNode) -> bool:
    return "<audio" in str(output.get("data", {}).get("text/html", ""))
