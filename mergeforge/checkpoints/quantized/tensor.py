"""QuantizedTensor: a tensor that is stored quantized, read in the 16-bit dtype that its library would give."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from mergeforge.core.tensor_info import TensorInfo, torch_dtype
from mergeforge.io.disk import InputFile
from mergeforge.tensors.budget import MemoryCost
from mergeforge.tensors.lazy import LazyTensor, Rows, Stats, StatsPass
from mergeforge.tensors.stored import StoredTensor
from mergeforge.tensors.worker import Worker

if TYPE_CHECKING:
    import torch
    from torch import Tensor


CHUNK_ELEMENTS = 1 << 16  # elements whose temporaries stay in the CPU cache and touch few new pages
# (first row, last row + 1) of a block -> chunks of it: their position in the block, and their float32 values
DequantizedChunks = Callable[[int, int], Iterator[tuple[tuple[slice, slice], "Tensor"]]]


def row_chunks(start: int, stop: int, columns: int) -> Iterator[tuple[int, int, tuple[slice, slice]]]:
    """Split rows [start, stop) of a block into chunks: (first row, last row + 1, position in the block)."""
    step = max(CHUNK_ELEMENTS // columns, 1)
    for first in range(start, stop, step):
        last = min(first + step, stop)
        yield first, last, (slice(first - start, last - start), slice(None))


def scratch_blocks(temporaries: float, chunk: int, info: TensorInfo) -> int:
    """The number of blocks that `temporaries` copies of a chunk's elements take, rounded up."""
    return math.ceil(temporaries * chunk / max(info.block_rows * info.columns, 1))


class QuantLayout(Protocol):
    """How a group of stored tensors is dequantized to one tensor."""

    @property
    def label(self) -> str:
        """The format's name."""

    @property
    def stored(self) -> tuple[StoredTensor, ...]:
        """Every tensor that it reads, the codes first."""

    def memory_cost(self, info: TensorInfo) -> MemoryCost:
        """The memory for loading rows and dequantizing a block of them, chunk by chunk."""

    def load(self, info: TensorInfo, rows: range, worker: Worker) -> DequantizedChunks:
        """Read what the rows need; the returned function dequantizes blocks of them."""


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """The layout's values, rounded to the dtype of `info`, so that a merge sees what a dequantized model would hold."""

    info: TensorInfo
    layout: QuantLayout

    inputs: tuple[LazyTensor, ...] = ()
    needs_stats: bool = False

    @property
    def file(self) -> InputFile:
        return self.layout.stored[0].file

    @property
    def files(self) -> tuple[InputFile, ...]:
        """Every file that it reads, each once."""
        return tuple({id(stored.file): stored.file for stored in self.layout.stored}.values())

    @property
    def stored_nbytes(self) -> int:
        """Bytes of everything that it reads."""
        return sum(stored.info.nbytes for stored in self.layout.stored)

    @property
    def memory_cost(self) -> MemoryCost:
        return self.layout.memory_cost(self.info) + MemoryCost(scratch_blocks=1)

    def collect_stats(self, scan: StatsPass) -> Any:
        return None

    def load(self, rows: range, worker: Worker, stats: Stats, dtype: torch.dtype) -> Rows:
        chunks = self.layout.load(self.info, rows, worker)
        stored_dtype = torch_dtype(self.info.dtype)
        slot = worker.next_slot()

        def block(start: int, stop: int) -> Tensor:
            out = worker.scratch(slot, (stop - start, self.info.columns), dtype)
            for position, values in chunks(start, stop):
                out[position].copy_(values.to(stored_dtype))
            return out

        return block
