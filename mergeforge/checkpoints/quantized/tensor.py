"""A tensor that is stored quantised, as a way: its rows in the 16-bit dtype that its library would give."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from mergeforge.core.tensor_info import TensorInfo, torch_dtype
from mergeforge.io.disk import InputFile
from mergeforge.tensors.budget import MemoryCost, Worker
from mergeforge.tensors.lazy import Rows, Stats, StatsPass, LazyTensor
from mergeforge.tensors.stored import StoredTensor

if TYPE_CHECKING:
    import torch
    from torch import Tensor


PIECE = 1 << 16  # elements whose temporaries stay in the processor's cache, and in few fresh pages
# (first row, last row + 1) of a block -> parts of it: where in the block they stand, and their float32 values
Pieces = Callable[[int, int], Iterator[tuple[tuple[slice, slice], "Tensor"]]]


def strips(start: int, stop: int, columns: int) -> Iterator[tuple[int, int, tuple[slice, slice]]]:
    """Rows [start, stop) a few at a time, and where these stand in their block."""
    step = max(PIECE // columns, 1)
    for at in range(start, stop, step):
        end = min(at + step, stop)
        yield at, end, (slice(at - start, end - start), slice(None))


def live(temporaries: float, piece: int, info: TensorInfo) -> int:
    """Whole blocks that so many temporaries of a piece's elements take."""
    return math.ceil(temporaries * piece / max(info.block_rows * info.columns, 1))


class Packing(Protocol):
    """How the stored tensors of one group become the rows of one."""

    @property
    def about(self) -> str:
        """The format's name."""

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """Everything that it reads; the codes first."""

    def memory_cost(self, info: TensorInfo) -> MemoryCost:
        """What staging rows and dequantising a block of them, piece by piece, takes."""

    def load(self, info: TensorInfo, rows: range, worker: Worker) -> Pieces:
        """Read what the rows need; the result dequantises blocks of them."""


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """`packing`'s values, rounded to `info`'s dtype; so a merge sees what the dequantised model holds."""

    info: TensorInfo
    packing: Packing

    inputs: tuple[LazyTensor, ...] = ()
    needs_stats: bool = False

    @property
    def file(self) -> InputFile:
        return self.packing.stored[0].file

    @property
    def files(self) -> tuple[InputFile, ...]:
        """Every file that it reads, each once."""
        return tuple({id(one.file): one.file for one in self.packing.stored}.values())

    @property
    def stored_nbytes(self) -> int:
        """Bytes of everything that it reads."""
        return sum(one.info.nbytes for one in self.packing.stored)

    @property
    def memory_cost(self) -> MemoryCost:
        return self.packing.memory_cost(self.info) + MemoryCost(scratch_blocks=1)

    def collect_stats(self, scan: StatsPass) -> Any:
        return None

    def load(self, rows: range, worker: Worker, facts: Stats, dtype: torch.dtype) -> Rows:
        pieces = self.packing.load(self.info, rows, worker)
        rounded = torch_dtype(self.info.dtype)
        slot = worker.next_slot()

        def block(start: int, stop: int) -> Tensor:
            into = worker.scratch(slot, (stop - start, self.info.columns), dtype)
            for where, values in pieces(start, stop):
                into[where].copy_(values.to(rounded))
            return into

        return block
