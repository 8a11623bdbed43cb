"""Formats whose rows lie as the rows of the tensor: FP8, int8, NVFP4, compressed-tensors' packed integers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergeforge.checkpoints.quantized.tensor import PIECE, Pieces, live, strips
from mergeforge.core.tensor_info import TensorInfo
from mergeforge.tensors.budget import ALIGNMENT, MemoryCost, Worker
from mergeforge.tensors.stored import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

# (rows of each tensor that has one for each row, all of the small ones, first row, last row + 1) -> float32 rows
Values = Callable[[Sequence["Tensor"], Sequence["Tensor"], int, int], "Tensor"]


@dataclass(frozen=True, eq=False)
class ByRow:
    """`each` holds a row for every row of the tensor, the codes first; `whole` are small and read at once.

    `temporaries`: how many times the elements of a piece exist at once while `values` works, and with their rounding.
    """

    about: str
    each: tuple[StoredTensor, ...]
    whole: tuple[StoredTensor, ...]
    values: Values
    temporaries: float

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        return (*self.each, *self.whole)

    def memory_cost(self, info: TensorInfo) -> MemoryCost:
        row = sum(one.info.row_nbytes for one in self.each)
        fixed = sum(one.info.nbytes for one in self.whole) + ALIGNMENT * len(self.stored)
        return MemoryCost(
            row_nbytes=row, fixed_nbytes=fixed, scratch_blocks=live(self.temporaries, max(PIECE, info.columns), info)
        )

    def load(self, info: TensorInfo, rows: range, worker: Worker) -> Pieces:
        each = [one.read(rows, worker) for one in self.each]
        whole = [one.read_all(worker).view(one.info.shape) for one in self.whole]

        def pieces(start: int, stop: int) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
            for at, end, where in strips(start, stop, info.columns):
                here = [one[at - rows.start : end - rows.start] for one in each]
                yield where, self.values(here, whole, at, end)

        return pieces
