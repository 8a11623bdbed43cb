"""TensorInfo, Tile and the dtype table.

Every tensor is seen as a matrix of rows. It is divided into *blocks* of about half a million elements, a number of rows
that follows from the shape alone. One computation sees one block, and a checksum covers one, so output bytes cannot
depend on the memory or the threads of a run. A *tile* is a run of whole blocks: the unit of reading, writing and
resuming, and the only thing whose size follows the budget.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BLOCK_ELEMENTS = 1 << 19  # 2 MB of float32: small enough for the cache, large enough for a fast GEMM
TILE_NBYTES = 16 << 20  # no larger tile is faster, and two of this size keep the page cache bounded

# safetensors name -> (bits per element, torch name; "" if torch has none), in the order in which safetensors
# writes them: by falling alignment (safetensors/src/tensor.rs, enum Dtype).
DTYPES: dict[str, tuple[int, str]] = {
    "U64": (64, "uint64"),
    "I64": (64, "int64"),
    "F64": (64, "float64"),
    "C64": (64, "complex64"),
    "F32": (32, "float32"),
    "U32": (32, "uint32"),
    "I32": (32, "int32"),
    "BF16": (16, "bfloat16"),
    "F16": (16, "float16"),
    "U16": (16, "uint16"),
    "I16": (16, "int16"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "I8": (8, "int8"),
    "U8": (8, "uint8"),
    "F6_E3M2": (6, ""),
    "F6_E2M3": (6, ""),
    "F4": (4, ""),
    "BOOL": (8, "bool"),
}
DTYPE_ORDER = {name: order for order, name in enumerate(DTYPES)}
FLOATS = frozenset({"F64", "F32", "BF16", "F16"})  # dtypes that merging can compute with


@dataclass(frozen=True)
class TensorInfo:
    """Name, safetensors dtype and shape of a tensor, seen as a matrix of rows.

    A 1-D tensor has one element per row; a 3-D tensor is a stack of matrices (experts); any other tensor has its first
    dimension as rows (a row of a convolution is one output channel).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @cached_property
    def numel(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def columns(self) -> int:
        columns = 1 if len(self.shape) < 2 else self.shape[2] if len(self.shape) == 3 else math.prod(self.shape[1:])
        return columns if columns * self.bits % 8 == 0 else self.numel  # rows that are not whole bytes cannot be split

    @cached_property
    def rows(self) -> int:
        return self.numel // self.columns if self.columns else 0

    @property
    def bits(self) -> int:
        return DTYPES[self.dtype][0]

    @property
    def nbytes(self) -> int:
        return self.numel * self.bits // 8

    @cached_property
    def row_nbytes(self) -> int:
        return self.columns * self.bits // 8

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOATS

    @cached_property
    def block_rows(self) -> int:
        """Rows per block; a function of the shape alone."""
        rows = BLOCK_ELEMENTS // max(self.columns, 1)
        rows = round(rows / 16) * 16 if rows >= 16 else rows
        return max(1, min(rows, self.rows))

    def with_dtype(self, dtype: str) -> TensorInfo:
        return self if dtype == self.dtype else replace(self, dtype=dtype)

    def renamed(self, name: str) -> TensorInfo:
        return self if name == self.name else replace(self, name=name)


@dataclass(frozen=True)
class Tile:
    """Rows [start, stop) of one tensor: whole blocks, except at the end of the tensor."""

    name: str
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


def split_into_tiles(info: TensorInfo, rows: int, chunk_rows: int = 0) -> list[Tile]:
    """Tiles of at most `rows` rows that cover the tensor, in order.

    A tile is a multiple of `chunk_rows` (0: of a block), and at least one of it.
    """
    chunk_rows = chunk_rows or info.block_rows
    step = max(1, rows // chunk_rows) * chunk_rows
    return [Tile(info.name, start, min(start + step, info.rows)) for start in range(0, info.rows, step)]


def blocks(tile: Tile, info: TensorInfo) -> Iterator[tuple[int, int]]:
    """Row ranges of the blocks of a tile."""
    for start in range(tile.start, tile.stop, info.block_rows):
        yield start, min(start + info.block_rows, tile.stop)


def sample_blocks(info: TensorInfo, count: int) -> list[tuple[int, int]]:
    """Row ranges of about `count` evenly spaced blocks, including the first and the last."""
    starts = range(0, info.rows, info.block_rows)
    chosen = sorted({starts[index * (len(starts) - 1) // max(count - 1, 1)] for index in range(count)})
    return [(start, min(start + info.block_rows, info.rows)) for start in chosen]


def torch_dtype(name: str) -> torch.dtype | None:
    """The torch dtype of a safetensors dtype name, or None if this version of torch has none."""
    import torch

    dtype = getattr(torch, DTYPES[name][1], None) if DTYPES[name][1] else None
    return dtype if isinstance(dtype, torch.dtype) else None


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype."""
    return next(name for name, (_, torch_name) in DTYPES.items() if f"torch.{torch_name}" == str(dtype))
