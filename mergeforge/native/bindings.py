"""Loading the C library, which is compiled at installation if there is a C compiler.

Without it, torch computes the same bytes, more slowly. module.c lists the functions and their arguments.
"""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from types import ModuleType

INTERFACE = 3  # of the functions in module.c; a library with another one is refused
CHUNK = 2048  # elements that kernels take through all steps at once (floats.h)
REINSTALL = "install mergeforge again"


def is_available() -> bool:
    """Whether the C library is compiled and can be loaded."""
    return load_library() is not None


def kernels() -> ModuleType:
    """The C library. Raises RuntimeError if there is none; check is_available() first."""
    library = load_library()
    if library is None:
        raise RuntimeError(f"the C library {why_unavailable()}")
    return library


def load_library() -> ModuleType | None:
    return _load()[0]


def why_unavailable() -> str:
    """Why there is no C library, and what to do: the end of a sentence. Empty if there is one."""
    return _load()[1]


@cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        library = importlib.import_module("mergeforge.native._kernels")
    except ModuleNotFoundError:
        return None, f"is missing; install a C compiler, then {REINSTALL}"
    except ImportError as error:  # for another system or Python
        return None, f"does not load ({error}); {REINSTALL}"
    if getattr(library, "INTERFACE", None) != INTERFACE:
        return None, f"is of another version; {REINSTALL}"
    if _is_outdated(Path(str(library.__file__))):
        return None, "is older than its source; run tools/build_native"
    return library, ""


def _is_outdated(library: Path) -> bool:
    """Whether a C file next to the library, as in a checkout, was changed after it was compiled."""
    compiled = library.stat().st_mtime
    sources = [*library.parent.glob("*.c"), *library.parent.glob("*.h")]
    return any(source.stat().st_mtime > compiled for source in sources)
