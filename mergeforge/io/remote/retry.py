"""RetryPolicy: how often, and after which waits, a failed request is repeated."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import TypeVar

from mergeforge.errors import MergeforgeError, SourceError

T = TypeVar("T")

WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)  # seconds, one after each consecutive failure
MAX_RETRY_AFTER = 120.0  # seconds that a server may demand with Retry-After
LIBRARIES = ("aiohttp", "botocore", "h11", "h2", "httpcore", "httpcore2", "httpx", "httpx2", "requests", "urllib3")


class TransientError(Exception):
    """A failure that may be temporary; `wait`: the seconds that the server demands."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


class RetryPolicy:
    """Counts consecutive failures of reading `what`; `stopped` ends a wait early."""

    def __init__(self, what: str, stopped: threading.Event) -> None:
        self.what = what
        self.stopped = stopped
        self.failures = 0

    def reset(self) -> None:
        """Reset the count after data has arrived."""
        self.failures = 0

    def wait(self, error: Exception) -> None:
        """Wait before the next attempt. Raises SourceError after the last one, or if reading was stopped."""
        if self.failures >= len(WAITS):
            hint = "run the same command again to resume"
            raise SourceError(f"{self.what} cannot be read: {reason(error)}", hint=hint) from None
        seconds = WAITS[self.failures] * random.uniform(
            0.5, 1.0
        )  # so that workers that failed together do not retry together
        seconds = max(seconds, min(getattr(error, "wait", 0.0), MAX_RETRY_AFTER))
        self.failures += 1
        if self.stopped.wait(seconds):
            raise SourceError(f"reading {self.what} was stopped") from None


def retry(what: str, stopped: threading.Event, action: Callable[[], T]) -> T:
    """Repeat an action on `what` while it fails with network errors. Raises SourceError."""
    policy = RetryPolicy(what, stopped)
    while True:
        try:
            return action()
        except MergeforgeError:
            raise
        except Exception as error:
            if not is_transient(error):
                raise SourceError(f"{what} cannot be read: {reason(error)}") from error
            policy.wait(error)


def is_transient(error: Exception) -> bool:
    """Whether an exception is a network error, so that another attempt may succeed."""
    if type(error).__name__ == "OfflineModeIsEnabled":
        return False
    library = type(error).__module__.partition(".")[0]
    closed = isinstance(error, RuntimeError) and "closed" in str(error)  # another thread closed the shared client
    return isinstance(error, TransientError | OSError | EOFError) or library in LIBRARIES or closed


def reason(error: Exception) -> str:
    """The first line of an error's message, but never a URL, which may contain a signature."""
    text = str(error).strip().splitlines()
    return text[0] if text and "://" not in text[0] else type(error).__name__
