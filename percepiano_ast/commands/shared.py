"""Options shared by several commands."""

import argparse
from collections.abc import Callable

from percepiano_ast.config import PRESETS, lookup
from percepiano_ast.files import as_path


def option_of(command: argparse.ArgumentParser) -> Callable[..., None]:
    """``add_argument`` with a help text second and a type that follows from the default: False is a
    flag, a list takes one value or more."""

    def option(name: str, text: str, metavar: str = "", default="", **more) -> None:
        if default is False:
            more["action"] = "store_true"
        elif isinstance(default, list) and "action" not in more:
            more.setdefault("nargs", "+")
        elif default is not None and "action" not in more:
            more.setdefault("type", type(default))
        if metavar:
            more["metavar"] = metavar
        command.add_argument(name, help=text, default=default, **more)

    return option


def run_of(arguments):
    """The run given by ``--preset``, ``--out`` and ``--store``."""
    from percepiano_ast.pipeline import Run

    preset = lookup(PRESETS, arguments.preset, "preset")
    out = as_path(arguments.out or f"runs/{preset.name}")
    return Run(preset, out, store=getattr(arguments, "store", ""))


def add_run(option) -> None:
    """Options ``--preset`` and ``--out``."""
    names = ", ".join(PRESETS)
    option("--preset", f"size and schedule: {names} (default: demo)", default="demo")
    option("--out", "directory of the run (default: runs/PRESET)", "DIR")


def add_store(option) -> None:
    """Option ``--store``."""
    option(
        "--store",
        "storage location of checkpoints: a folder or gs://BUCKET/PREFIX (default: the directory of"
        " the run)",
        "LOCATION",
    )


def add_set(option, such_as: str) -> None:
    """Option ``--set``."""
    text = f"setting of fine-tuning, such as {such_as}; repeatable; see config.FinetuneConfig"
    option("--set", text, "NAME=VALUE", [], action="append")
