"""ggml's quantizer, called in the xllamacpp wheel (its x86-64 build has no fused multiply-adds)."""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from mergeforge.gguf.quantize import QuantType

WHEEL = pytest.importorskip("xllamacpp", reason="the reference quantizer is in the xllamacpp wheel")
if platform.machine() not in ("x86_64", "AMD64"):
    pytest.skip("ggml rounds differently where it uses fused multiply-adds", allow_module_level=True)


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(next(Path(WHEEL.__file__).parent.glob("xllamacpp*.so"))))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    sizes = [ctypes.c_int64] * 3
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *sizes, ctypes.c_void_p]
    return library


def ggml_quantize(quant_type: QuantType, rows: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """Rows (rows x columns, float32) as ggml_quantize_chunk() writes them: rows x bytes."""
    out = np.zeros((len(rows), quant_type.row_nbytes(rows.shape[1])), np.uint8)
    weights = importance.ctypes.data if importance is not None else None
    assert rows.dtype == np.float32 and rows.flags["C_CONTIGUOUS"]
    if len(rows):
        written = _library().ggml_quantize_chunk(
            quant_type.number, rows.ctypes.data, out.ctypes.data, 0, *rows.shape, weights
        )
        assert written == out.nbytes
    return out


def ggml_dequantize(ggml_type: str, data: bytes, count: int) -> np.ndarray:
    """The values of blocks, `count` of them, by ggml's dequantize_row_NAME()."""
    kind = ggml_type.lower().replace("_k", "_K")
    function = getattr(_library(), f"dequantize_row_{kind}")
    function.argtypes, function.restype = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64], None
    out = np.zeros(count, np.float32)
    function(data, out.ctypes.data, count)
    return out
