"""The two errors that the command line reports in one line."""


class InputError(ValueError):
    """Bad input or usage. The message names the value, the problem and the next action; the command
    line exits with 2."""


class RunFailed(RuntimeError):
    """A run failed for a known reason, which the message states; the command line exits with 1,
    without a traceback."""
