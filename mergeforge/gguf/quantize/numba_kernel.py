"""Kernels: functions on numpy arrays that numba compiles when they are first called.

    @kernel
    def nearest(value: float) -> int: ...

A kernel is written as a plain function of its module, calls other kernels by their names, and finds
numpy as `np` without importing it: so no module needs numba or numpy to be imported. Compiled code is
kept on disk by numba. Its name there ends with a digest of all kernels' sources, because numba itself
would not notice that a kernel in another file has changed.

Rounding is C's: no fastmath, so that nothing is reordered or contracted to fused multiply-adds. The GIL
is released, and kernels hold no state: every call makes its own few buffers.
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
_LOCK = RLock()  # two threads would both compile


class Kernel:
    """A function that is compiled on its first call."""

    def __init__(self, function: FunctionType) -> None:
        self.function = function
        self._compiled: Any = None

    def __call__(self, *arguments: Any) -> Any:
        return (self._compiled or self.compiled())(*arguments)

    def compiled(self) -> Any:
        """numba's dispatcher, with the kernels that this one calls inside."""
        with _LOCK:
            if self._compiled is None:
                self._compiled = _dispatcher(self.function)
            return self._compiled


def kernel(function: F) -> F:
    """Declare a kernel."""
    return cast(F, Kernel(cast(FunctionType, function)))


@cache
def available() -> bool:
    """Whether numba is installed, and works with the numpy that is."""
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
        found = function.__globals__.get(name)
        if found is not None:
            names[name] = found.compiled() if isinstance(found, Kernel) else found
    copy = FunctionType(function.__code__, names, function.__name__)
    copy.__qualname__ = f"{function.__name__}_{_digest()}"
    options: Any = {"fastmath": False, "error_model": "numpy", "nogil": True}
    try:
        return numba.njit(cache=True, **options)(copy)
    except RuntimeError:  # no folder can be written in: not this package's, nor the user's cache
        return numba.njit(**options)(copy)


@cache
def _digest() -> str:
    sources = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256(b"".join(source for source in sources if b"@kernel" in source)).hexdigest()[:12]
