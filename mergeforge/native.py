"""kernels.c: loops over numbers in C, which is compiled when mergeforge is installed where there is a C compiler.

A shared library behind ctypes, which lets go of the GIL: importing it takes nothing. Where there is none, torch does
the same.
"""

from __future__ import annotations

import ctypes
import hashlib
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any


class _Array:
    """An argument that is an array of numpy or a tensor, contiguous: held while C reads or writes it."""

    @classmethod
    def from_param(cls, value: Any) -> ctypes.c_void_p:
        return ctypes.c_void_p(value.data_ptr() if hasattr(value, "data_ptr") else value.ctypes.data)


_NUMBER, _FLOAT = ctypes.c_int64, ctypes.c_float
_INPUTS = [_Array, _Array, _NUMBER, _NUMBER]  # their places and kinds, how many, whether a base comes after them
_FUNCTIONS: dict[str, list[Any]] = {
    "weighted_sum": [*_INPUTS, _Array, _NUMBER, _FLOAT, _FLOAT, _NUMBER, _Array],
    "difference": [_Array, _Array, _NUMBER, _NUMBER, _Array],
    "inner_products": [*_INPUTS, _NUMBER, _Array, _Array],
}
CHUNK, PRODUCT_CHUNK = 2048, 512  # numbers that kernels, and inner products, take at a time (kernels.c)


def available() -> bool:
    """Whether the kernels were compiled, and load here."""
    return _library() is not None


def kernels() -> ctypes.CDLL:
    """The library. Raises RuntimeError where there is none: ask available() first."""
    library = _library()
    if library is None:
        raise RuntimeError("kernels.c is not compiled")
    return library


@cache
def _library() -> ctypes.CDLL | None:
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_kernels{suffix}")
        if path.exists():
            try:
                library = ctypes.CDLL(str(path))
                for name, arguments in _FUNCTIONS.items():
                    function = getattr(library, name)
                    function.argtypes, function.restype = arguments, None
                return library if _is_of_this_source(library) else None
            except (OSError, AttributeError, ValueError):  # for another system, or of another version
                return None
    return None


def _is_of_this_source(library: ctypes.CDLL) -> bool:
    """Whether it was compiled from the kernels.c beside, where there is one (wheels bring none)."""
    source = Path(__file__).with_name("kernels.c")
    compiled = (ctypes.c_char * 65).in_dll(library, "kernels_source").value
    return not source.exists() or compiled == hashlib.sha256(source.read_bytes()).hexdigest().encode()
