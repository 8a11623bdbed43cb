"""Bindings of kernels.c, a C library that is compiled at installation if there is a C compiler.

It is a shared library behind ctypes, which releases the GIL, so importing this module costs nothing. Without the
library, torch computes the same bytes.
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
    """An argument that is a contiguous numpy array or tensor; alive while C reads or writes it."""

    @classmethod
    def from_param(cls, value: Any) -> ctypes.c_void_p:
        return ctypes.c_void_p(value.data_ptr() if hasattr(value, "data_ptr") else value.ctypes.data)


class _OptionalArray(_Array):
    """An array or None."""

    @classmethod
    def from_param(cls, value: Any) -> ctypes.c_void_p:
        return ctypes.c_void_p(None) if value is None else super().from_param(value)


class _Struct(ctypes.Structure):
    """Numbers and arrays for C."""

    def keep_alive(self, **arrays: Any) -> None:
        """Point fields to numpy arrays, which live as long as this struct; an empty array becomes a null pointer."""
        self.arrays = arrays
        for name, array in arrays.items():
            setattr(self, name, array.ctypes.data if len(array) else None)


class ReductionArgs(_Struct):
    """struct reduction of kernels.c."""

    _fields_: ClassVar = [
        ("inputs", ctypes.c_int64),
        ("has_base", ctypes.c_int64),
        ("fused", ctypes.c_int64),
        ("is_nearswap", ctypes.c_int64),
        ("element", ctypes.c_int64),
        ("factors", ctypes.c_void_p),
        ("masks", ctypes.c_void_p),
        ("ranges", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("products", ctypes.c_void_p),
        ("normalize", ctypes.c_int64),
        ("divisor", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("nearswap_t", ctypes.c_float),
    ]


class RankMaskArgs(_Struct):
    """struct rank_mask of kernels.c."""

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


_INT64, _REDUCTION = ctypes.c_int64, ctypes.POINTER(ReductionArgs)
_READING = [_INT64, _Array, _Array]  # elements per read, read buffer, input pointers
_FUNCTIONS: dict[str, list[Any]] = {  # argument types
    "weighted_sum": [
        _Array,
        _REDUCTION,
        _INT64,
        _INT64,
        _Array,
        ctypes.POINTER(ctypes.c_uint32),
        _OptionalArray,
        *_READING,
    ],
    "l1_norms": [_Array, _REDUCTION, _INT64, _Array, *_READING],
    "difference": [_Array, _INT64, _INT64, _Array, *_READING],
    "split_inputs": [_Array, _INT64, _INT64, _INT64, _Array, _INT64, *_READING],
    "split": [_Array, _INT64, ctypes.c_int32, ctypes.c_int32, _Array, ctypes.POINTER(_INT64)],
    "sign_consensus_sum": [_Array, _INT64, _Array, _Array, _INT64, ctypes.c_float, _INT64],
    "variance": [_Array, _INT64, _INT64, _Array],
    "sign_consensus_mean": [_Array, _INT64, _Array, ctypes.c_float, _INT64],
    "ranked_mask": [_Array, ctypes.POINTER(RankMaskArgs), _INT64, _INT64, _Array],
    "importance": [_Array, _Array, _Array, _INT64, _INT64, _Array],
    "important": [_Array, _Array, _Array, _INT64, _INT64, ctypes.c_float],
    "inner_products": [_Array, _INT64, _INT64, _INT64, _Array, _Array, *_READING],
}
CHUNK, PRODUCT_CHUNK = 2048, 512  # elements that kernels, and inner products, process at a time (kernels.c)


def is_available() -> bool:
    """Whether the C library is compiled and can be loaded."""
    return load_library() is not None


def kernels() -> ctypes.CDLL:
    """The C library. Raises RuntimeError if there is none; check is_available() first."""
    library = load_library()
    if library is None:
        raise RuntimeError("kernels.c is not compiled")
    return library


def data_pointers(tensors: Sequence[Tensor]) -> NDArray[np.int64]:
    """The addresses of the tensors' elements, for kernels that take several."""
    import numpy as np

    return np.array([tensor.data_ptr() for tensor in tensors], np.int64)


def is_supported(*tensors: Tensor) -> bool:
    """Whether kernels can take these tensors: float32, on the CPU, contiguous."""
    return is_available() and all(
        tensor.device.type == "cpu" and str(tensor.dtype) == "torch.float32" and tensor.is_contiguous()
        for tensor in tensors
    )


@cache
def load_library() -> ctypes.CDLL | None:
    for suffix in EXTENSION_SUFFIXES:
        path = Path(__file__).with_name(f"_kernels{suffix}")
        if path.exists():
            try:
                library = ctypes.CDLL(str(path))
                for name, arguments in _FUNCTIONS.items():
                    function = getattr(library, name)
                    function.argtypes, function.restype = arguments, ctypes.c_int64
                return library if _matches_source(library) else None
            except (OSError, AttributeError, ValueError):  # for another system, or of another version
                return None
    return None


def _matches_source(library: ctypes.CDLL) -> bool:
    """Whether the library was compiled from the kernels.c next to it, if there is one (wheels have none)."""
    source = Path(__file__).with_name("kernels.c")
    compiled = (ctypes.c_char * 65).in_dll(library, "kernels_source").value
    return not source.exists() or compiled == hashlib.sha256(source.read_bytes()).hexdigest().encode()
