"""Retry policy for HTTP requests: which errors to retry, and how long to wait."""

import email.utils
import http.client
import ssl
import time
import urllib.error

ATTEMPTS = 6  # without a byte of progress
FIRST_WAIT = 1.0  # seconds, doubled with every attempt
LONGEST_WAIT = 60.0  # seconds, even if a server asks for more
TIMEOUT = 60.0  # seconds without a response or a byte
BROKEN = (
    urllib.error.URLError,
    http.client.HTTPException,
    ConnectionError,
    TimeoutError,
    ssl.SSLError,
)
_TRY_AGAIN = {408, 425, 429}  # and every 5xx


def is_final(error: Exception) -> bool:
    """Whether retrying one of ``BROKEN`` is pointless: a refusal, or an invalid URL."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code < 500 and error.code not in _TRY_AGAIN
    return isinstance(error, http.client.InvalidURL)


class Patience:
    """Counts the failures of one transfer since its last byte of progress."""

    def __init__(self) -> None:
        self.failures = 0

    def wait_after(self, error: Exception, *, progress: bool) -> float | None:
        """Seconds to wait before the next attempt, or as long as the server asks for, within
        limits; None to give up.

        Args:
            progress: whether a byte was received since the last failure.
        """
        self.failures = 1 if progress else self.failures + 1
        if self.failures >= ATTEMPTS:
            return None
        return min(max(FIRST_WAIT * 2 ** (self.failures - 1), _asked_for(error)), LONGEST_WAIT)


def _asked_for(error: Exception) -> float:
    """The seconds of a ``Retry-After`` header, which has a number or a date; 0 without one."""
    value = (
        error.headers.get("Retry-After", "") if isinstance(error, urllib.error.HTTPError) else ""
    )
    if value.isdecimal():
        return float(value)
    date = email.utils.parsedate_tz(value)
    return email.utils.mktime_tz(date) - time.time() if date else 0.0
