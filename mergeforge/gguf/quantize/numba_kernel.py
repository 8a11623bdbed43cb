"""Kernels: functions on numpy arrays that numba compiles when they are first called.

    @kernel
    def nearest(value: float) -> int: ...

A kernel is a plain function of its module. It calls other kernels by name and uses numpy as `np` without an import, so
importing these modules needs neither numba nor numpy. numba caches compiled code on disk. The cached name ends with a
digest of all kernels' sources, because numba does not notice when a kernel in another file changes.

Rounding is C's: without fastmath nothing is reordered or contracted to fused multiply-adds. Kernels release the GIL and
have no state; every call allocates its own few buffers.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from threading import RLock
from types import FunctionType
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])
_LOCK = RLock()  # so that two threads do not both compile


class Kernel:
    """A function that numba compiles on its first call."""

    def __init__(self, function: FunctionType) -> None:
        self.function = function
        self._compiled: Any = None

    def __call__(self, *arguments: Any) -> Any:
        return (self._compiled or self.compiled())(*arguments)

    def compiled(self) -> Any:
        """numba's dispatcher; the kernels that this one calls are compiled too."""
        with _LOCK:
            if self._compiled is None:
                self._compiled = _dispatcher(self.function)
            return self._compiled


def kernel(function: F) -> F:
    """Declare a kernel (decorator)."""
    return cast(F, Kernel(cast(FunctionType, function)))


@cache
def available() -> bool:
    """Whether numba is installed and works with the installed numpy."""
    try:
        importlib.import_module("numba")
    except ImportError:
        return False
    return True


def _dispatcher(function: FunctionType) -> Any:
    import numba
    import numpy as np

    names: dict[str, Any] = {"__name__": __name__, "__builtins__": __builtins__, "np": np}
    for name in function.__code__.co_names:
        value = function.__globals__.get(name)
        if value is not None:
            names[name] = value.compiled() if isinstance(value, Kernel) else value
    copy = FunctionType(function.__code__, names, function.__name__)
    copy.__qualname__ = f"{function.__name__}_{_digest()}"
    options: Any = {"fastmath": False, "error_model": "numpy", "nogil": True}
    try:
        return numba.njit(cache=True, **options)(copy)
    except RuntimeError:  # no writable cache folder, neither in this package nor in the user's home
        return numba.njit(**options)(copy)


@cache
def _digest() -> str:
    sources = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256(b"".join(source for source in sources if b"@kernel" in source)).hexdigest()[:12]
