"""Orders of rows: which stored row is which row of a GGUF tensor.

A row order is made by arranging the row *numbers* as the matrix would be, so it costs eight bytes a
row and moves no weight. Layers share theirs: they are kept, and must not be changed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@lru_cache(64)
def interleave_rope_halves(rows: int, heads: int) -> np.ndarray:
    """Rows of rotated heads: HF keeps both halves of a head apart, llama.cpp wants their rows in pairs."""
    return _row_numbers(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


@lru_cache(64)
def deinterleave_qkv(rows: int, groups: int, sizes: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Rows of parts that lie side by side in every group (q, k, v of a head): each part's rows in all groups."""
    import numpy as np

    numbers = _row_numbers(rows).reshape(groups, sum(sizes))
    ends = np.cumsum(sizes)
    return tuple(numbers[:, end - size : end].reshape(-1) for end, size in zip(ends, sizes, strict=True))


def _row_numbers(rows: int) -> np.ndarray:
    import numpy as np

    return np.arange(rows, dtype=np.int64)
