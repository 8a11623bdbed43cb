"""A tensor as it lies in a file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergeforge.core.tensor_info import TensorInfo
from mergeforge.io.disk import InputFile
from mergeforge.tensors.budget import MemoryCost, Worker, view_rows
from mergeforge.tensors.lazy import Rows, Stats, StatsPass, LazyTensor

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor

    Bytes = NDArray[np.uint8]

PIECE = 1 << 18  # elements that a comparison reads at a time


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """Contiguous bytes of one file."""

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

    def load(self, rows: range, worker: Worker, facts: Stats, dtype: torch.dtype) -> Rows:
        raw = self.read(rows, worker)
        slot = worker.next_slot()

        def block(start: int, stop: int) -> Tensor:
            into = worker.scratch(slot, (stop - start, self.info.columns), dtype)
            return into.copy_(raw[start - rows.start : stop - rows.start])

        return block

    def read(self, rows: range, worker: Worker, *, keep: bool = False) -> Tensor:
        """The rows in the stored dtype, in the worker's staging buffer."""
        nbytes = self.info.row_nbytes
        raw = worker.read(self.file, self.offset + rows.start * nbytes, len(rows) * nbytes, keep=keep)
        return view_rows(raw, self.info.dtype, self.info.columns)

    def bytes(self, rows: range, worker: Worker) -> Bytes:
        """The rows' bytes in the staging buffer, on the host of a worker without a device."""
        nbytes = self.info.row_nbytes
        return worker.read(self.file, self.offset + rows.start * nbytes, len(rows) * nbytes).numpy()

    def read_all(self, worker: Worker) -> Tensor:
        """All of a small tensor that every tile needs."""
        return self.read(range(self.info.rows), worker, keep=True)

    def pieces(self) -> Iterator[Tensor]:
        """All of it as flat float64 tensors, in small pieces; for comparisons while planning."""
        import torch

        size = self.info.bits // 8
        for start in range(0, self.info.numel, PIECE):
            raw = bytearray(min(PIECE, self.info.numel - start) * size)
            self.file.read_into(memoryview(raw), self.offset + start * size)
            yield view_rows(torch.frombuffer(raw, dtype=torch.uint8), self.info.dtype, 1).flatten().double()

    def whole(self) -> Tensor:
        """All of a small tensor in float64, in its shape."""
        import torch

        return torch.cat(list(self.pieces())).view(self.info.shape)


def same_content(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two stored tensors hold the same numbers, be it in different dtypes."""
    import torch

    if one.info.shape != other.info.shape:
        return False
    return all(torch.equal(mine, theirs) for mine, theirs in zip(one.pieces(), other.pieces(), strict=True))
