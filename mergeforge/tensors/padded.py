"""PaddedTensor: a tensor followed by zeros."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergeforge.core.tensor_info import TensorInfo
from mergeforge.tensors.budget import MemoryCost
from mergeforge.tensors.lazy import LazyTensor, Rows, Stats, StatsPass
from mergeforge.tensors.worker import Worker

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class PaddedTensor:
    """`tensor` with zeros up to the shape of `info`: a bias for the tokens of a vocabulary that grew."""

    tensor: LazyTensor
    info: TensorInfo

    needs_stats: bool = False

    @property
    def inputs(self) -> tuple[LazyTensor, ...]:
        return (self.tensor,)

    @property
    def memory_cost(self) -> MemoryCost:
        return self.tensor.memory_cost + MemoryCost(row_nbytes=8 * self.info.columns, scratch_blocks=1)

    def collect_stats(self, scan: StatsPass) -> Any:
        return None

    def load(self, rows: range, worker: Worker, stats: Stats, dtype: torch.dtype) -> Rows:
        old = self.tensor.info
        inside = range(rows.start, min(rows.stop, old.rows))
        stored = self.tensor.load(inside, worker, stats, dtype) if inside else None
        slot = worker.next_slot()

        def block(start: int, stop: int) -> Tensor:
            padded = worker.scratch(slot, (stop - start, self.info.columns), dtype).zero_()
            edge = min(max(old.rows - start, 0), stop - start)
            if edge and stored is not None:
                padded[:edge, : old.columns] = stored(start, start + edge)
            return padded

        return block
