"""Patience: how often, and after which waits, what failed on its way is asked for again."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import TypeVar

from mergeforge.errors import MergeforgeError, SourceError

T = TypeVar("T")

WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0)  # seconds, one after each failure in a row
LONGEST = 120.0  # what a server may ask for with Retry-After
LIBRARIES = ("aiohttp", "botocore", "h11", "h2", "httpcore", "httpcore2", "httpx", "httpx2", "requests", "urllib3")


class Passing(Exception):
    """An answer that another try may mend; `wait`: the seconds that the server asks for."""

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


class Patience:
    """Counts failures in a row of reading one thing; `stopped` ends a wait early."""

    def __init__(self, what: str, stopped: threading.Event) -> None:
        self.what = what
        self.stopped = stopped
        self.failures = 0

    def renew(self) -> None:
        """Something arrived: the next failure is the first one again."""
        self.failures = 0

    def wait(self, error: Exception) -> None:
        """Wait before the next try. Raises SourceError after the last one, or when reading was stopped."""
        if self.failures >= len(WAITS):
            hint = "run the same command again: it goes on where it stopped"
            raise SourceError(f"{self.what} cannot be read: {reason(error)}", hint=hint) from None
        seconds = WAITS[self.failures] * random.uniform(0.5, 1.0)  # workers that failed together come back apart
        seconds = max(seconds, min(getattr(error, "wait", 0.0), LONGEST))
        self.failures += 1
        if self.stopped.wait(seconds):
            raise SourceError(f"reading {self.what} was stopped") from None


def persist(what: str, stopped: threading.Event, action: Callable[[], T]) -> T:
    """Do something with `what` again while it fails on the network. Raises SourceError."""
    patience = Patience(what, stopped)
    while True:
        try:
            return action()
        except MergeforgeError:
            raise
        except Exception as error:
            if not is_passing(error):
                raise SourceError(f"{what} cannot be read: {reason(error)}") from error
            patience.wait(error)


def is_passing(error: Exception) -> bool:
    """Whether an exception is of the network, so that another try may go better."""
    if type(error).__name__ == "OfflineModeIsEnabled":
        return False
    library = type(error).__module__.partition(".")[0]
    closed = isinstance(error, RuntimeError) and "closed" in str(error)  # the shared client, by another thread
    return isinstance(error, Passing | OSError | EOFError) or library in LIBRARIES or closed


def reason(error: Exception) -> str:
    """One line on an error; never the address that was asked, which may hold a signature."""
    text = str(error).strip().splitlines()
    return text[0] if text and "://" not in text[0] else type(error).__name__
