"""StoredTensor: contiguous bytes of one file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergeforge.core.tensor_info import TensorInfo
from mergeforge.io.disk import InputFile
from mergeforge.tensors.budget import MemoryCost
from mergeforge.tensors.lazy import LazyTensor, Rows, Stats, StatsPass
from mergeforge.tensors.worker import Worker, view_rows

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    Bytes = NDArray[np.uint8]

CHUNK_ELEMENTS = 1 << 18  # elements that a comparison reads at a time


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor as it is stored in a file, from byte `offset` on."""

    info: TensorInfo
    file: InputFile
    offset: int

    inputs: tuple[LazyTensor, ...] = ()
    needs_stats: bool = False

    @property
    def memory_cost(self) -> MemoryCost:
        return MemoryCost(row_nbytes=self.info.row_nbytes, scratch_blocks=1)

    def collect_stats(self, scan: StatsPass) -> Any:
        return None

    def load(self, rows: range, worker: Worker, stats: Stats, dtype: torch.dtype) -> Rows:
        raw = self.read(rows, worker)
        slot = worker.next_slot()

        def block(start: int, stop: int) -> Tensor:
            out = worker.scratch(slot, (stop - start, self.info.columns), dtype)
            return out.copy_(raw[start - rows.start : stop - rows.start])

        return block

    def read(self, rows: range, worker: Worker, *, keep: bool = False) -> Tensor:
        """The rows in the stored dtype, in the worker's staging buffer (on its device)."""
        nbytes = self.info.row_nbytes
        raw = worker.read(self.file, self.offset + rows.start * nbytes, len(rows) * nbytes, keep=keep)
        return view_rows(raw, self.info.dtype, self.info.columns)

    def read_bytes(self, rows: range, worker: Worker) -> Bytes:
        """The bytes of the rows in the staging buffer of a CPU worker."""
        nbytes = self.info.row_nbytes
        return worker.read(self.file, self.offset + rows.start * nbytes, len(rows) * nbytes).numpy()

    def read_all(self, worker: Worker) -> Tensor:
        """The whole of a small tensor that every tile needs."""
        return self.read(range(self.info.rows), worker, keep=True)

    def float64_chunks(self) -> Iterator[Tensor]:
        """The whole tensor as flat float64 chunks of CHUNK_ELEMENTS, for comparisons during planning."""
        import torch

        size = self.info.bits // 8
        for start in range(0, self.info.numel, CHUNK_ELEMENTS):
            raw = bytearray(min(CHUNK_ELEMENTS, self.info.numel - start) * size)
            self.file.read_into(memoryview(raw), self.offset + start * size)
            yield view_rows(torch.frombuffer(raw, dtype=torch.uint8), self.info.dtype, 1).flatten().double()

    def read_float64(self) -> Tensor:
        """A small tensor as float64, in its shape."""
        import torch

        return torch.cat(list(self.float64_chunks())).view(self.info.shape)


def same_content(first: StoredTensor, second: StoredTensor) -> bool:
    """Whether two stored tensors hold the same numbers, possibly in different dtypes."""
    import torch

    if first.info.shape != second.info.shape:
        return False
    chunks = zip(first.float64_chunks(), second.float64_chunks(), strict=True)
    return all(torch.equal(left, right) for left, right in chunks)
