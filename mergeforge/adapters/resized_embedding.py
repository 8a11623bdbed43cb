"""A tensor with more rows than the base's: an embedding or head whose new tokens an adapter brings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergeforge.core.tensor_info import TensorInfo
from mergeforge.tensors.budget import ALIGNMENT, MemoryCost, Worker
from mergeforge.tensors.lazy import Rows, Stats, StatsPass, LazyTensor
from mergeforge.tensors.stored import StoredTensor, same_content

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class ResizedEmbedding:
    """The base's rows, then those of `trained` (rows, columns) that `order` names."""

    base: LazyTensor
    trained: StoredTensor
    order: tuple[int, ...]

    inputs: tuple[LazyTensor, ...] = ()
    needs_stats: bool = False

    @property
    def info(self) -> TensorInfo:
        base = self.base.info
        return TensorInfo(base.name, base.dtype, (base.rows + len(self.order), *base.shape[1:]))

    @property
    def memory_cost(self) -> MemoryCost:
        trained = self.trained.info
        return self.base.memory_cost + MemoryCost(
            fixed_nbytes=trained.nbytes + 8 * trained.numel + ALIGNMENT, scratch_blocks=1
        )

    def collect_stats(self, scan: StatsPass) -> Any:
        return None

    def load(self, rows: range, worker: Worker, facts: Stats, dtype: torch.dtype) -> Rows:
        old = self.base.info.rows
        inside = range(rows.start, min(rows.stop, old))
        whole = self.base.load(inside, worker, facts, dtype) if inside else None
        new = self.trained.read_all(worker).to(dtype)[list(self.order)]
        slot = worker.next_slot()

        def block(start: int, stop: int) -> Tensor:
            into = worker.scratch(slot, (stop - start, self.info.columns), dtype)
            edge = min(max(old - start, 0), stop - start)
            if edge and whole is not None:
                into[:edge] = whole(start, start + edge)
            if start + edge < stop:
                into[edge:] = new[start + edge - old : stop - old]
            return into

        return block


def same_rows(one: LazyTensor, other: LazyTensor) -> bool:
    """Whether two tensors that adapters bring, whole or with new rows, are the same."""
    if isinstance(one, StoredTensor) and isinstance(other, StoredTensor):
        return same_content(one, other)
    if not isinstance(one, ResizedEmbedding) or not isinstance(other, ResizedEmbedding):
        return False
    return one.order == other.order and same_content(one.trained, other.trained)
