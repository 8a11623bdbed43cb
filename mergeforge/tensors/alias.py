"""AliasTensor: a tensor under another name or dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergeforge.core.tensor_info import TensorInfo
from mergeforge.tensors.budget import MemoryCost
from mergeforge.tensors.lazy import LazyTensor, Rows, Stats, StatsPass
from mergeforge.tensors.worker import Worker

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class AliasTensor:
    """The values of `tensor` under the name and dtype of `info`, which has the same shape.

    Used for a head tied to its embedding, a layer of a layer stack and the result of an earlier merge.
    """

    tensor: LazyTensor
    info: TensorInfo

    needs_stats: bool = False

    @property
    def inputs(self) -> tuple[LazyTensor, ...]:
        return (self.tensor,)

    @property
    def memory_cost(self) -> MemoryCost:
        return self.tensor.memory_cost

    def collect_stats(self, scan: StatsPass) -> Any:
        return None

    def load(self, rows: range, worker: Worker, stats: Stats, dtype: torch.dtype) -> Rows:
        return self.tensor.load(rows, worker, stats, dtype)
