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
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


class _Array:
    """An argument that is an array of numpy or a tensor, contiguous: held while C reads or writes it."""

    @classmethod
    def from_param(cls, value: Any) -> ctypes.c_void_p:
        return ctypes.c_void_p(value.data_ptr() if hasattr(value, "data_ptr") else value.ctypes.data)


class _OptionalArray(_Array):
    """The same, or None."""

    @classmethod
    def from_param(cls, value: Any) -> ctypes.c_void_p:
        return ctypes.c_void_p(None) if value is None else super().from_param(value)


class _Struct(ctypes.Structure):
    """Some numbers and arrays for C."""

    def keep_alive(self, **arrays: Any) -> None:
        """Point fields to arrays of numpy, which live as long as this; an empty one is none."""
        self.held = arrays
        for name, one in arrays.items():
            setattr(self, name, one.ctypes.data if len(one) else None)


class ReductionArgs(_Struct):
    """struct sum of kernels.c."""

    _fields_: ClassVar = [
        ("inputs", ctypes.c_int64),
        ("based", ctypes.c_int64),
        ("fused", ctypes.c_int64),
        ("swaps", ctypes.c_int64),
        ("element", ctypes.c_int64),
        ("factors", ctypes.c_void_p),
        ("masks", ctypes.c_void_p),
        ("bands", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("products", ctypes.c_void_p),
        ("normalize", ctypes.c_int64),
        ("divisor", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("near", ctypes.c_float),
    ]


class RankMaskArgs(_Struct):
    """struct ranking of kernels.c."""

    _fields_: ClassVar = [
        ("element", ctypes.c_int64),
        ("mask", ctypes.c_uint32 * 5),
        ("lowest", ctypes.c_float),
        ("step", ctypes.c_float),
        ("buckets", ctypes.c_int64),
        ("room", ctypes.c_int64),
        ("members", ctypes.c_void_p),
        ("ranks", ctypes.c_void_p),
        ("sure", ctypes.c_void_p),
        ("possible", ctypes.c_void_p),
        ("bucket", ctypes.c_void_p),
        ("draws", ctypes.c_void_p),
        ("before", ctypes.c_void_p),
        ("sorted", ctypes.c_void_p),
    ]


_NUMBER, _SUM = ctypes.c_int64, ctypes.POINTER(ReductionArgs)
_FETCHED = [_NUMBER, _Array, _Array]  # numbers of a step, room for them, their places
_FUNCTIONS: dict[str, list[Any]] = {  # each takes its inputs first
    "weighted_sum": [
        _Array,
        _SUM,
        _NUMBER,
        _NUMBER,
        _Array,
        ctypes.POINTER(ctypes.c_uint32),
        _OptionalArray,
        *_FETCHED,
    ],
    "masses": [_Array, _SUM, _NUMBER, _Array, *_FETCHED],
    "difference": [_Array, _NUMBER, _NUMBER, _Array, *_FETCHED],
    "split_inputs": [_Array, _NUMBER, _NUMBER, _NUMBER, _Array, _NUMBER, *_FETCHED],
    "split": [_Array, _NUMBER, ctypes.c_int32, ctypes.c_int32, _Array, ctypes.POINTER(_NUMBER)],
    "agreeing_sum": [_Array, _NUMBER, _Array, _Array, _NUMBER, ctypes.c_float, _NUMBER],
    "variance": [_Array, _NUMBER, _NUMBER, _Array],
    "agreeing_mean": [_Array, _NUMBER, _Array, ctypes.c_float, _NUMBER],
    "ranked_mask": [_Array, ctypes.POINTER(RankMaskArgs), _NUMBER, _NUMBER, _Array],
    "importance": [_Array, _Array, _Array, _NUMBER, _NUMBER, _Array],
    "important": [_Array, _Array, _Array, _NUMBER, _NUMBER, ctypes.c_float],
    "inner_products": [_Array, _NUMBER, _NUMBER, _NUMBER, _Array, _Array, *_FETCHED],
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


def data_pointers(tensors: Sequence[Tensor]) -> NDArray[np.int64]:
    """Where the numbers of tensors are, for kernels that take several."""
    import numpy as np

    return np.array([one.data_ptr() for one in tensors], np.int64)


def is_supported(*tensors: Tensor) -> bool:
    """Whether there are kernels for these tensors: float32, on the CPU, contiguous."""
    return available() and all(
        one.device.type == "cpu" and str(one.dtype) == "torch.float32" and one.is_contiguous() for one in tensors
    )


@cache
def _library() -> ctypes.CDLL | None:
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_kernels{suffix}")
        if path.exists():
            try:
                library = ctypes.CDLL(str(path))
                for name, arguments in _FUNCTIONS.items():
                    function = getattr(library, name)
                    function.argtypes, function.restype = arguments, ctypes.c_int64
                return library if _is_of_this_source(library) else None
            except (OSError, AttributeError, ValueError):  # for another system, or of another version
                return None
    return None


def _is_of_this_source(library: ctypes.CDLL) -> bool:
    """Whether it was compiled from the kernels.c beside, where there is one (wheels bring none)."""
    source = Path(__file__).with_name("kernels.c")
    compiled = (ctypes.c_char * 65).in_dll(library, "kernels_source").value
    return not source.exists() or compiled == hashlib.sha256(source.read_bytes()).hexdigest().encode()
