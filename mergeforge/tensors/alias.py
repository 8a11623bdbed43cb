"""A way under another name or dtype: a head that is its embedding, a layer of a stack, an earlier merge's result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergeforge.core.tensor_info import TensorInfo
from mergeforge.tensors.budget import Need, Worker
from mergeforge.tensors.lazy import Facts, Rows, Scan, Way

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Renamed:
    """`way`'s values; `info` is what they are called. Its shape is the way's."""

    way: Way
    info: TensorInfo

    learns: bool = False

    @property
    def parts(self) -> tuple[Way, ...]:
        return (self.way,)

    @property
    def need(self) -> Need:
        return self.way.need

    def learn(self, scan: Scan) -> Any:
        return None

    def stage(self, rows: range, worker: Worker, facts: Facts, dtype: torch.dtype) -> Rows:
        return self.way.stage(rows, worker, facts, dtype)
