"""The two errors that the command line reports in one line."""

import re
import sys
from collections.abc import Callable

# What would break a line or change its order or colour: control characters, the separators of lines
# and paragraphs, and the marks of direction.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """A text with its control characters as in ``\\n``."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def _line(message: object) -> str:
    """A text in one line: names in it, and messages of libraries, may have more."""
    return visible(" ".join(str(message).splitlines()))


class InputError(ValueError):
    """Bad input or usage. The message, one line, names the value, the problem and the next action;
    the command line exits with 2."""

    def __init__(self, message: object):
        super().__init__(_line(message))


class RunFailed(RuntimeError):
    """A run failed for a known reason, which the message states in one line; the command line exits
    with 1, without a traceback."""

    def __init__(self, message: object):
        super().__init__(_line(message))


def exit_code(command: Callable[[], int | None]) -> int:
    """Run a command: 0 or what it returns; 2 for bad input and 1 for a run that failed or was
    interrupted, with the reason in one line on standard error."""
    try:
        return command() or 0
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:  # a plain installation only rates recordings
        if not error.name or error.name.startswith("percepiano_ast"):
            raise
        extra = "notebooks" if error.name.startswith("nb") else "train"
        advice = f'Run pip install "percepiano_ast[{extra}]"'
        print(f"error: this command needs {error.name}. {advice}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted. The same command continues", file=sys.stderr)
        return 1
    except (FloatingPointError, OSError, RunFailed) as error:
        print(f"error: {_line(error)}", file=sys.stderr)
        return 1
