"""A way under another name or dtype: a head that is its embedding, a layer of a stack, an earlier merge's result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergeforge.core.tensor_info import TensorInfo
from mergeforge.tensors.budget import MemoryCost, Worker
from mergeforge.tensors.lazy import Rows, Stats, StatsPass, LazyTensor

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class AliasTensor:
    """`way`'s values; `info` is what they are called. Its shape is the way's."""

    way: LazyTensor
    info: TensorInfo

    needs_stats: bool = False

    @property
    def inputs(self) -> tuple[LazyTensor, ...]:
        return (self.way,)

    @property
    def memory_cost(self) -> MemoryCost:
        return self.way.memory_cost

    def collect_stats(self, scan: StatsPass) -> Any:
        return None

    def load(self, rows: range, worker: Worker, facts: Stats, dtype: torch.dtype) -> Rows:
        return self.way.load(rows, worker, facts, dtype)
