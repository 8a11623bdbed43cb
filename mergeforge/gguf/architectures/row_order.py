"""Row orders: which stored row is which row of a GGUF tensor.

A row order is computed by rearranging the row *numbers*, so it takes eight bytes per row and moves no weight. Layers
share the cached arrays, which must not be changed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@lru_cache(64)
def interleave_rope_halves(rows: int, heads: int) -> np.ndarray:
    """Rows of rotated heads: HF stores the two halves of a head one after the other, llama.cpp interleaves them."""
    return _row_numbers(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


@lru_cache(64)
def deinterleave_qkv(rows: int, groups: int, sizes: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Rows of parts that are adjacent in every group (q, k, v of a head): for each part, its rows of all groups."""
    import numpy as np

    numbers = _row_numbers(rows).reshape(groups, sum(sizes))
    ends = np.cumsum(sizes)
    return tuple(numbers[:, end - size : end].reshape(-1) for end, size in zip(ends, sizes, strict=True))


def _row_numbers(rows: int) -> np.ndarray:
    import numpy as np

    return np.arange(rows, dtype=np.int64)
