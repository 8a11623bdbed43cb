"""RowwiseLayout: formats stored row by row: FP8, int8, NVFP4, compressed-tensors' packed integers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeforge.checkpoints.quantized.tensor import CHUNK_ELEMENTS, DequantizedChunks, row_chunks, scratch_blocks
from mergeforge.core.tensor_info import TensorInfo
from mergeforge.tensors.budget import MemoryCost
from mergeforge.tensors.stored import StoredTensor
from mergeforge.tensors.worker import ALIGNMENT, Worker

if TYPE_CHECKING:
    from torch import Tensor

# (rows of each rowwise tensor, the shared tensors, first row, last row + 1) -> float32 rows
DequantizeRows = Callable[[Sequence["Tensor"], Sequence["Tensor"], int, int], "Tensor"]


@dataclass(frozen=True, eq=False)
class RowwiseLayout:
    """`rowwise`: tensors with a row per row of the result, the codes first; `shared`: small ones that are read whole.

    `temporaries`: how many copies of a chunk's elements exist at once while it is dequantized and rounded.
    """

    label: str
    rowwise: tuple[StoredTensor, ...]
    shared: tuple[StoredTensor, ...]
    dequantize: DequantizeRows
    temporaries: float

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        return (*self.rowwise, *self.shared)

    def memory_cost(self, info: TensorInfo) -> MemoryCost:
        row_nbytes = sum(stored.info.row_nbytes for stored in self.rowwise)
        fixed_nbytes = sum(stored.info.nbytes for stored in self.shared) + ALIGNMENT * len(self.stored)
        return MemoryCost(
            row_nbytes=row_nbytes,
            fixed_nbytes=fixed_nbytes,
            scratch_blocks=scratch_blocks(self.temporaries, max(CHUNK_ELEMENTS, info.columns), info),
        )

    def load(self, info: TensorInfo, rows: range, worker: Worker) -> DequantizedChunks:
        rowwise = [stored.read(rows, worker) for stored in self.rowwise]
        shared = [stored.read_all(worker).view(stored.info.shape) for stored in self.shared]

        def chunks(start: int, stop: int) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
            for first, last, position in row_chunks(start, stop, info.columns):
                chunk = [tensor[first - rows.start : last - rows.start] for tensor in rowwise]
                yield position, self.dequantize(chunk, shared, first, last)

        return chunks
