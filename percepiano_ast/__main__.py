"""Command line: ``python -m percepiano_ast COMMAND``. Exit codes: 0 done, 2 bad input or usage, 1 the run failed."""

import argparse
import sys

from percepiano_ast.commands import results, steps, tools
from percepiano_ast.config import InputError, RunFailed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m percepiano_ast",
        description="Listen to a piano performance and say how it is played.",
        epilog="Steps in order: preprocess, pretrain, preprocess --percepiano, finetune, evaluate. Each resumes.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name, function, text):
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(function=function)
        return command

    for part in (steps, results, tools):
        part.add_commands(add)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parsed = _parser().parse_args(arguments)
    try:
        return parsed.function(parsed) or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return 1
    except (FloatingPointError, OSError, RunFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
