"""An adapter kind's formula as an edit: its factors are read whole, W's rows come as they are needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergeforge.adapters.peft.kind import Formula
from mergeforge.tensors.budget import ALIGNMENT, MemoryCost, Worker
from mergeforge.tensors.lazy import Rows, Stats, StatsPass, LazyTensor
from mergeforge.tensors.stored import StoredTensor

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class PeftDelta:
    """One formula on one tensor. `base`: W itself, read in whole groups of rows where the formula reaches over blocks.

    `inner`: rows of W for each row of the formula's: a Conv1d's (out, in, width) is stored as out * in rows.
    """

    formula: Formula
    factors: Mapping[str, StoredTensor]
    base: LazyTensor
    inner: int = 1

    needs_stats: bool = False

    @property
    def label(self) -> str:
        return self.formula.about

    @property
    def needs_base(self) -> bool:
        return self.formula.needs_base and self._group == 1

    @property
    def _group(self) -> int:
        """W's rows are taken in whole groups of so many."""
        return self.formula.reach * self.inner

    @property
    def memory_cost(self) -> MemoryCost:
        read = sum(one.info.nbytes + 4 * one.info.numel + ALIGNMENT for one in self.factors.values())
        own = MemoryCost(fixed_nbytes=read + self.formula.fixed, scratch_blocks=self.formula.live)
        if self._group == 1:
            return own
        ends = 2 * self._group * self.base.info.columns * (self.base.info.bits // 8 + 4 * (1 + self.formula.live))
        return (
            own
            + self.base.memory_cost
            + MemoryCost(fixed_nbytes=ends, scratch_blocks=self.base.memory_cost.scratch_blocks + self.formula.live)
        )

    def collect_stats(self, scan: StatsPass, base: LazyTensor) -> Any:
        return None

    def load(self, rows: range, worker: Worker, facts: Stats, dtype: torch.dtype) -> Any:  # sources.edits.Delta
        delta = self.formula.prepare({role: _read(one, worker, dtype) for role, one in self.factors.items()})
        if self._group == 1:
            return delta
        wide = range(self._down(rows.start), min(self._up(rows.stop), self.base.info.rows))
        whole = self.base.load(wide, worker, facts, dtype) if self.formula.needs_base else None
        return self._grouped(delta, whole)

    def _down(self, row: int) -> int:
        return row // self._group * self._group

    def _up(self, row: int) -> int:
        return -(-row // self._group) * self._group

    def _grouped(self, delta: Any, whole: Rows | None) -> Any:
        def grouped(start: int, stop: int, base: Any) -> Tensor:
            first, last = self._down(start), min(self._up(stop), self.base.info.rows)
            wide = whole(first, last).reshape((last - first) // self.inner, -1) if whole else None
            changed: Tensor = delta(first // self.inner, last // self.inner, wide)
            return changed.reshape(last - first, -1)[start - first : stop - first]

        return grouped


def _read(stored: StoredTensor, worker: Worker, dtype: torch.dtype) -> Tensor:
    """All of a factor in its shape: floats in the dtype of the computation, indices as they are."""
    value = stored.read_all(worker).view(stored.info.shape)
    return value.to(dtype) if value.is_floating_point() else value.clone()
