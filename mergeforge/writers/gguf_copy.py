"""Copies a tensor of one GGUF file to another, as the bytes that it is stored in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeforge.core.tensor_info import TensorInfo
from mergeforge.io.file_layout import Extent
from mergeforge.writers.encoder import ByteRange

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class GGUFCopyEncoder:
    """Places the bytes of a tensor. `info`: the tensor as rows of bytes; `label`: its type."""

    key: str
    label: str
    info: TensorInfo
    extent: Extent

    float_dtype: str = ""
    scratch_nbytes: int = 0

    @property
    def file(self) -> str:
        return self.extent.file

    @property
    def chunk_rows(self) -> int:
        return self.info.block_rows

    @property
    def row_nbytes(self) -> int:
        return self.info.row_nbytes

    def chunk_nbytes(self, start: int, stop: int) -> int:
        return (stop - start) * self.info.row_nbytes

    def byte_ranges(self, start: int, stop: int) -> list[ByteRange]:
        return [(self.extent.offset + start * self.info.row_nbytes, self.chunk_nbytes(start, stop))]

    def encode(self, rows: Tensor, start: int, into: Tensor) -> None:
        into.copy_(rows.view(-1))

    def overflows(self, magnitude: float) -> bool:
        return False
