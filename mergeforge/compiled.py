"""Kernels: functions on numpy arrays that numba compiles when they are first called.

    @kernel
    def nearest(value: float) -> int: ...

A kernel is written as a plain function of its module, calls other kernels by their names, and finds
numpy as `np` without importing it: so no module needs numba or numpy to be imported. Compiled code is
kept on disk by numba. Its name there ends with a digest of the sources of all kernels in the same folder,
because numba itself would not notice that a kernel in another file has changed.

Rounding is C's: no fastmath, so that nothing is reordered or contracted to fused multiply-adds, but for sums
that say so (`reordering_kernel`) and products that call `fma`. The GIL is released, and kernels hold no state:
every call makes its own few buffers.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from threading import RLock
from types import FunctionType
from typing import TYPE_CHECKING, Any, TypeVar, cast

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Halves = NDArray[np.uint16]

F = TypeVar("F", bound=Callable[..., Any])
_LOCK = RLock()  # two threads would both compile


class Kernel:
    """A function that is compiled on its first call."""

    def __init__(self, function: FunctionType, *, reorders: bool = False) -> None:
        self.function = function
        self.reorders = reorders
        self._compiled: Any = None

    def __call__(self, *arguments: Any) -> Any:
        return (self._compiled or self.compiled())(*arguments)

    def compiled(self) -> Any:
        """numba's dispatcher, with the kernels that this one calls inside."""
        with _LOCK:
            if self._compiled is None:
                self._compiled = _dispatcher(self.function, self.reorders)
            return self._compiled


def kernel(function: F) -> F:
    """Declare a kernel."""
    return cast(F, Kernel(cast(FunctionType, function)))


def reordering_kernel(function: F) -> F:
    """Declare a kernel whose sums may be added up in any order: for float64 sums that nobody compares bit for bit."""
    return cast(F, Kernel(cast(FunctionType, function), reorders=True))


def fma(one: float, two: float, three: float) -> float:
    """one * two + three of float32 numbers, rounded once; for kernels alone."""
    raise TypeError("for kernels alone")


def float_of(bits: Any) -> float:
    """The float32 number that has these bits (an uint32); for kernels alone."""
    raise TypeError("for kernels alone")


def floats_at(address: int, count: int) -> Floats:
    """The float32 numbers at an address, which stays valid while the kernel runs; for kernels alone."""
    raise TypeError("for kernels alone")


def halves_at(address: int, count: int) -> Halves:
    """The 16-bit numbers at an address, as their bits; for kernels alone."""
    raise TypeError("for kernels alone")


@cache
def available() -> bool:
    """Whether numba is installed, and works with the numpy that is."""
    try:
        importlib.import_module("numba")
    except ImportError:
        return False
    return True


def _dispatcher(function: FunctionType, reorders: bool) -> Any:
    import numba
    import numpy as np

    names: dict[str, Any] = {"__name__": __name__, "__builtins__": __builtins__, "np": np}
    for name in function.__code__.co_names:
        found = function.__globals__.get(name)
        if found in _MADE:
            names[name] = _MADE[found]()
        elif found is not None:
            names[name] = found.compiled() if isinstance(found, Kernel) else found
    copy = FunctionType(function.__code__, names, function.__name__)
    copy.__qualname__ = f"{function.__name__}_{_digest(Path(function.__code__.co_filename).parent)}"
    fastmath = {"reassoc", "contract"} if reorders else False
    options: Any = {"fastmath": fastmath, "error_model": "numpy", "nogil": True}
    try:
        return numba.njit(cache=True, **options)(copy)
    except RuntimeError:  # no folder can be written in: not this package's, nor the user's cache
        return numba.njit(**options)(copy)


@cache
def _fma() -> Any:
    from numba.core import types
    from numba.extending import intrinsic

    def instruction(typing: Any, one: Any, two: Any, three: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.fma(*arguments)

        return types.float32(types.float32, types.float32, types.float32), generate

    return intrinsic(instruction)


@cache
def _float_of() -> Any:
    from llvmlite import ir  # type: ignore[import-untyped]
    from numba.core import types
    from numba.extending import intrinsic

    def instruction(typing: Any, bits: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.bitcast(arguments[0], ir.FloatType())

        return types.float32(types.uint32), generate

    return intrinsic(instruction)


def _array_at(dtype: str) -> Any:
    import numpy as np
    from numba import carray, njit  # type: ignore[attr-defined]
    from numba.core import types
    from numba.extending import intrinsic

    def instruction(typing: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

        return types.voidptr(types.int64), generate

    kind, pointer = np.dtype(dtype), cast(Any, intrinsic(instruction))

    @njit
    def array_at(address, count):  # type: ignore[no-untyped-def]
        return carray(pointer(address), (count,), kind)

    return array_at


_MADE: dict[Any, Callable[[], Any]] = {
    fma: _fma,
    float_of: _float_of,
    floats_at: cache(partial(_array_at, "float32")),
    halves_at: cache(partial(_array_at, "uint16")),
}


@cache
def _digest(folder: Path) -> str:
    sources = [Path(__file__).read_bytes(), *(path.read_bytes() for path in sorted(folder.glob("*.py")))]
    return hashlib.sha256(b"".join(source for source in sources if b"kernel" in source)).hexdigest()[:12]
