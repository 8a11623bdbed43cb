"""An embedding or output head with more rows than the base's: an adapter adds rows for new tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergeforge.core.tensor_info import TensorInfo
from mergeforge.tensors.budget import MemoryCost
from mergeforge.tensors.lazy import LazyTensor, Rows, Stats, StatsPass
from mergeforge.tensors.stored import StoredTensor, same_content
from mergeforge.tensors.worker import ALIGNMENT, Worker

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class ResizedEmbedding:
    """The base's rows, followed by those rows of `new_rows` (rows, columns) that `row_order` lists."""

    base: LazyTensor
    new_rows: StoredTensor
    row_order: tuple[int, ...]

    inputs: tuple[LazyTensor, ...] = ()
    needs_stats: bool = False

    @property
    def info(self) -> TensorInfo:
        base = self.base.info
        return TensorInfo(base.name, base.dtype, (base.rows + len(self.row_order), *base.shape[1:]))

    @property
    def memory_cost(self) -> MemoryCost:
        trained = self.new_rows.info
        return self.base.memory_cost + MemoryCost(
            fixed_nbytes=trained.nbytes + 8 * trained.numel + ALIGNMENT, scratch_blocks=1
        )

    def collect_stats(self, scan: StatsPass) -> Any:
        return None

    def load(self, rows: range, worker: Worker, stats: Stats, dtype: torch.dtype) -> Rows:
        old = self.base.info.rows
        inside = range(rows.start, min(rows.stop, old))
        whole = self.base.load(inside, worker, stats, dtype) if inside else None
        new = self.new_rows.read_all(worker).to(dtype)[list(self.row_order)]
        slot = worker.next_slot()

        def block(start: int, stop: int) -> Tensor:
            block_rows = worker.scratch(slot, (stop - start, self.info.columns), dtype)
            edge = min(max(old - start, 0), stop - start)
            if edge and whole is not None:
                block_rows[:edge] = whole(start, start + edge)
            if start + edge < stop:
                block_rows[edge:] = new[start + edge - old : stop - old]
            return block_rows

        return block


def same_rows(first: LazyTensor, second: LazyTensor) -> bool:
    """Whether two tensors from adapters, whole or with new rows, have the same content."""
    if isinstance(first, StoredTensor) and isinstance(second, StoredTensor):
        return same_content(first, second)
    if not isinstance(first, ResizedEmbedding) or not isinstance(second, ResizedEmbedding):
        return False
    return first.row_order == second.row_order and same_content(first.new_rows, second.new_rows)
