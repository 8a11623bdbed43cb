"""python -m mergeforge, and the command `mergeforge`."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import threading
from typing import NoReturn

COLLECT_AFTER = 50_000  # new objects, instead of 700: torch's import makes 150,000 that stay


def main() -> NoReturn:
    """Run a command and exit. Start and end take a third less of time than Python's own way with torch."""
    gc.set_threshold(COLLECT_AFTER)
    from mergeforge.cli import run_command

    code = run_command()
    if "torch" in sys.modules:
        _leave(code)
    sys.exit(code)


def _leave(code: int) -> NoReturn:
    """Exit as Python does (threads, exit functions, streams), but leave the modules to the system, as multiprocessing
    does: taking torch apart lasts a quarter of a second."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):  # nobody reads, or the disk under it is full
        code = code or 1
    os._exit(code)


if __name__ == "__main__":
    main()
