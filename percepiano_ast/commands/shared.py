"""Options shared by several commands."""

from percepiano_ast.config import PRESETS, lookup
from percepiano_ast.files import as_path


def run_of(arguments):
    """The run given by ``--preset``, ``--out`` and ``--store``."""
    from percepiano_ast.suite import Run

    preset = lookup(PRESETS, arguments.preset, "preset")
    return Run(
        preset,
        as_path(arguments.out or f"runs/{preset.name}"),
        store=getattr(arguments, "store", ""),
    )


def add_run(parser) -> None:
    """Options ``--preset`` and ``--out``."""
    parser.add_argument(
        "--preset", default="demo", help=f"size and schedule: {', '.join(PRESETS)} (default: demo)"
    )
    parser.add_argument(
        "--out", default="", metavar="DIR", help="directory of the run (default: runs/PRESET)"
    )


def add_store(command) -> None:
    """Option ``--store``."""
    text = (
        "storage location of checkpoints: a folder or gs://BUCKET/PREFIX (default: the directory of"
        " the run)"
    )
    command.add_argument("--store", default="", metavar="LOCATION", help=text)


def add_set(command, such_as: str) -> None:
    """Option ``--set``."""
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help=f"setting of fine-tuning, such as {such_as}; repeatable; see config.FinetuneConfig",
    )
