"""Run the notebooks headless, as "Run all" does, and save their outputs for the repository."""

import logging
import os
import re
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from percepiano_ast.errors import InputError, RunFailed

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent.parent / "notebooks"
NAMES = (
    "01_preprocess_maestro",
    "02_ssast_pretrain_tpu",
    "03_finetune_percepiano_gpu",
    "04_evaluate",
    "05_rate_a_recording",
)
OLD_ROWS = {"KEEP_IN": "SAVE_TO"}  # former names of form rows, for `notebooks --set`
_FORM = re.compile(r"^(?P<name>[A-Z_]+) = (?P<value>.+?)(?P<param>\s+#@param.*)$", re.MULTILINE)


def with_form(notebook: nbformat.NotebookNode, values: dict) -> nbformat.NotebookNode:
    """Set the form rows ``NAME = value  #@param`` of a notebook; values without a row are ignored.

    Nothing else in the cells changes.
    """

    def fill(row: re.Match) -> str:
        value = repr(values[row["name"]]) if row["name"] in values else row["value"]
        return f"{row['name']} = {value}{row['param']}"

    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = _FORM.sub(fill, cell.source)
    return notebook


def form_of(notebook: nbformat.NotebookNode) -> dict[str, str]:
    """Names of the form's rows, in order, with the source text of their values."""
    code = (cell.source for cell in notebook.cells if cell.cell_type == "code")
    return {row["name"]: row["value"] for text in code for row in _FORM.finditer(text)}


class _Client(NotebookClient):
    """Logs printed lines while cells run."""

    def process_message(self, message, cell, cell_index):
        content = message["content"]
        if message["msg_type"] == "stream" and content["name"] == "stdout":
            for line in content["text"].splitlines():
                logger.info(f"    {line}")
        return super().process_message(message, cell, cell_index)


def run(
    out: str | Path, values: dict, *, names: tuple[str, ...] = NAMES, save_outputs: bool = False
) -> None:
    """Run notebooks in order; executed copies go to ``out/notebooks``.

    Args:
        values: form values by name (``PRESET``, ``SAVE_TO``, ...); each name must be a row of at
            least one form.
        save_outputs: also save the outputs, cleaned by `tidy`, in the repository's notebooks.

    Raises:
        InputError: a name without a form row, or an InputError raised in a cell.
        RunFailed: a cell raised another error.
    """
    loaded = {name: nbformat.read(FOLDER / f"{name}.ipynb", as_version=4) for name in names}
    rows = set().union(*(form_of(notebook) for notebook in loaded.values()))
    if unknown := sorted(values.keys() - rows):
        raise InputError(
            f"no notebook has a form row {unknown[0]}. Use one of {', '.join(sorted(rows))}"
        )
    copies = Path(out) / "notebooks"
    copies.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    for number, (name, notebook) in enumerate(loaded.items(), start=1):
        logger.info(f"[{number}/{len(loaded)}] {name}")
        sources = [cell.source for cell in notebook.cells]
        client = _Client(
            with_form(notebook, values),
            timeout=None,
            kernel_name="python3",
            resources={"metadata": {"path": str(FOLDER.parent)}},
            # Kernels listen on the local address; recent ones warn that it is not encrypted.
            extra_arguments=["--IPKernelApp.log_level=ERROR"],
        )
        try:
            # The variable suppresses four lines about the debugger in each kernel.
            client.execute(env={**os.environ, "PYDEVD_DISABLE_FILE_VALIDATION": "1"})
        except CellExecutionError as error:
            if error.ename == InputError.__name__:
                raise InputError(error.evalue) from error
            raise RunFailed(f"{error.ename}: {error.evalue}") from error
        finally:
            nbformat.write(notebook, copies / f"{name}.ipynb")
        seconds = time.monotonic() - started
        logger.info(f"[{number}/{len(loaded)}] {name} done, {seconds:.0f} s in total")
        if save_outputs:
            for cell, source in zip(notebook.cells, sources):
                cell.source = source
            nbformat.write(tidy(notebook), FOLDER / f"{name}.ipynb")


def tidy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Remove audio, stderr, widget state, timings and execution counts from the outputs."""
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type != "code":
            continue
        cell.execution_count = None
        cell.outputs = [
            output
            for output in cell.outputs
            if "<audio" not in str(output.get("data", {}).get("text/html", ""))
            and output.get("name") != "stderr"
        ]
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = None
    return notebook
