"""Command line: ``percepiano COMMAND``. Exit codes: 0 done, 2 bad input or usage, 1 the run
failed."""

import argparse
import sys

from percepiano_ast import __version__
from percepiano_ast.commands import results, steps, tools
from percepiano_ast.commands.shared import option_of
from percepiano_ast.errors import exit_code


def _parser() -> argparse.ArgumentParser:
    text = "Rate how a piano performance is played, and train and evaluate models that do."
    steps_in_order = "preprocess, pretrain, preprocess --percepiano, finetune, evaluate"
    epilog = f"Training, in order: {steps_in_order}. Each step resumes."
    parser = argparse.ArgumentParser(prog="percepiano", description=text, epilog=epilog)
    parser.add_argument("--version", action="version", version=f"percepiano {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name, function, text, example=""):
        epilog = f"Example: {example}" if example else None
        command = commands.add_parser(name, help=text, description=text, epilog=epilog)
        command.set_defaults(function=function)
        return option_of(command)

    for part in (steps, results, tools):
        part.add_commands(add)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parsed = _parser().parse_args(arguments)
    return exit_code(lambda: parsed.function(parsed))


if __name__ == "__main__":
    sys.exit(main())
