"""The values of encoded blocks: by the gguf package's dequantizers (gguf/quants.py), here for types that it lacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Dequantize = Callable[[NDArray[np.uint8]], NDArray[np.float32]]

# Types that the gguf package dequantizes.
GGUF_PY_TYPES = frozenset(
    (
        *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
        *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
        *("TQ1_0", "TQ2_0", "MXFP4", "NVFP4"),
    )
)


def dequantize(encoded: NDArray[np.uint8], ggml_type: str) -> NDArray[np.float32]:
    """Rows of blocks (rows x bytes) as float32 values, rows x columns."""
    import gguf

    if ggml_type in OWN_TYPES:
        return OWN_TYPES[ggml_type](encoded).reshape(len(encoded), -1)
    values: NDArray[np.float32] = gguf.quants.dequantize(encoded, gguf.GGMLQuantizationType[ggml_type])
    return values


def _q1_0(encoded: NDArray[np.uint8]) -> NDArray[np.float32]:
    """A scale, and one bit each: set for +1, else -1."""
    import numpy as np

    scale, packed = _scale_first(encoded, 18)
    return np.where(np.unpackbits(packed, axis=1, bitorder="little") == 1, scale, -scale)


def _q2_0(encoded: NDArray[np.uint8]) -> NDArray[np.float32]:
    """A scale, and two bits each: -1 to 2, plus 1."""
    import numpy as np

    scale, packed = _scale_first(encoded, 18)
    level = packed[:, :, None] >> np.array([0, 2, 4, 6], np.uint8) & 3
    values: NDArray[np.float32] = (level.reshape(len(packed), -1).astype(np.float32) - np.float32(1)) * scale
    return values


def _scale_first(encoded: NDArray[np.uint8], nbytes: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """The scale of each block, blocks x 1, and its other bytes."""
    import numpy as np

    blocks = np.ascontiguousarray(encoded).reshape(-1, nbytes)
    return blocks[:, :2].copy().view(np.float16).astype(np.float32), blocks[:, 2:]


OWN_TYPES: Mapping[str, Dequantize] = {"Q1_0": _q1_0, "Q2_0": _q2_0}
