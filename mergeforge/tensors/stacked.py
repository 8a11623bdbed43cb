"""StackedTensor: stored tensors whose rows follow each other, as the experts of a fused tensor do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from mergeforge.core.tensor_info import TensorInfo
from mergeforge.io.disk import InputFile
from mergeforge.tensors.budget import MemoryCost
from mergeforge.tensors.lazy import LazyTensor, Rows, Stats, StatsPass
from mergeforge.tensors.stored import StoredTensor
from mergeforge.tensors.worker import Worker, view_rows

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class StackedTensor:
    """The rows of all `parts`, in their order, in the shape of `info`; they have its dtype and number of columns."""

    parts: tuple[StoredTensor, ...]
    info: TensorInfo

    needs_stats: bool = False

    @property
    def files(self) -> tuple[InputFile, ...]:
        """The files of all parts, each once."""
        return tuple({id(part.file): part.file for part in self.parts}.values())

    @property
    def inputs(self) -> tuple[LazyTensor, ...]:
        return self.parts

    @property
    def memory_cost(self) -> MemoryCost:
        return MemoryCost(row_nbytes=self.info.row_nbytes, scratch_blocks=1)

    def collect_stats(self, scan: StatsPass) -> Any:
        return None

    def load(self, rows: range, worker: Worker, stats: Stats, dtype: torch.dtype) -> Rows:
        raw = view_rows(
            worker.cached((id(self), rows), lambda: self._read(rows, worker)), self.info.dtype, self.info.columns
        )
        slot = worker.next_slot()

        def block(start: int, stop: int) -> Tensor:
            out = worker.scratch(slot, (stop - start, self.info.columns), dtype)
            return out.copy_(raw[start - rows.start : stop - rows.start])

        return block

    def _read(self, rows: range, worker: Worker) -> Tensor:
        """The bytes of the rows, on the worker's device."""
        host, on_device = worker.allocate_tensor(len(rows) * self.info.row_nbytes)
        buffer, done = host.numpy().data, 0
        for part, own in self._pieces(rows):
            nbytes = len(own) * part.info.row_nbytes
            offset = part.offset + own.start * part.info.row_nbytes
            part.file.read_into(buffer[done : done + nbytes], offset, keep=worker.will_reread)
            done += nbytes
        return host if on_device is host else on_device.copy_(host, non_blocking=True)

    def _pieces(self, rows: range) -> Iterator[tuple[StoredTensor, range]]:
        """The parts that hold the rows, each with its own rows of them."""
        ends = list(accumulate(part.info.rows for part in self.parts))
        for part, end in zip(self.parts, ends, strict=True):
            first = end - part.info.rows
            own = range(max(rows.start - first, 0), min(rows.stop - first, part.info.rows))
            if own:
                yield part, own
