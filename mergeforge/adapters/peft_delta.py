"""A PEFT method's formula as a WeightDelta: its factors are read whole, W's rows only as they are needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergeforge.adapters.peft.kind import Formula
from mergeforge.tensors.budget import MemoryCost
from mergeforge.tensors.lazy import LazyTensor, Rows, Stats, StatsPass
from mergeforge.tensors.stored import StoredTensor
from mergeforge.tensors.worker import ALIGNMENT, Worker

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class PeftDelta:
    """One formula on one tensor. `base`: W itself, read in whole row groups if the formula needs them.

    `rows_per_output`: rows of W per row of the formula; a Conv1d (out, in, width) is stored as out * in rows.
    `weight`: the weight next to a bias, if W is a bias whose formula depends on it.
    """

    formula: Formula
    factors: Mapping[str, StoredTensor]
    base: LazyTensor
    rows_per_output: int = 1
    weight: LazyTensor | None = None

    @property
    def needs_stats(self) -> bool:
        return self.formula.statistic is not None

    @property
    def label(self) -> str:
        return self.formula.label

    @property
    def needs_base(self) -> bool:
        return self.formula.needs_base and self._row_group == 1

    @property
    def _row_group(self) -> int:
        """W's rows are read in whole groups of this many."""
        return self.formula.row_group * self.rows_per_output

    @property
    def memory_cost(self) -> MemoryCost:
        stored = sum(factor.info.nbytes + 4 * factor.info.numel + ALIGNMENT for factor in self.factors.values())
        own = MemoryCost(fixed_nbytes=stored + self.formula.scratch_nbytes, scratch_blocks=self.formula.scratch_blocks)
        if self.weight is not None and self.needs_stats:
            info, cost = self.weight.info, self.weight.memory_cost
            block = 4 * info.block_rows * info.columns * (cost.scratch_blocks + 1)
            own += MemoryCost(fixed_nbytes=cost.fixed_nbytes + cost.row_nbytes * info.block_rows + block)
        if self._row_group == 1:
            return own
        ends = (
            2
            * self._row_group
            * self.base.info.columns
            * (self.base.info.bits // 8 + 4 * (1 + self.formula.scratch_blocks))
        )
        return (
            own
            + self.base.memory_cost
            + MemoryCost(
                fixed_nbytes=ends, scratch_blocks=self.base.memory_cost.scratch_blocks + self.formula.scratch_blocks
            )
        )

    def collect_stats(self, scan: StatsPass, base: LazyTensor) -> Any:
        if self.formula.statistic is None:
            return None
        factors = {role: _read_factor(factor, scan.worker, scan.dtype).clone() for role, factor in self.factors.items()}

        def weight_pass() -> Iterator[tuple[int, Tensor]]:
            if self.weight is not None:
                return _blocks_of(self.weight, scan)
            staged = scan(lambda rows: base.load(rows, scan.worker, scan.stats, scan.dtype))
            return ((start, whole(start, stop)) for whole, start, stop in staged)

        return self.formula.statistic(factors, weight_pass)

    def load(self, rows: range, worker: Worker, stats: Stats, dtype: torch.dtype) -> Any:
        factors = {role: _read_factor(factor, worker, dtype) for role, factor in self.factors.items()}
        delta = self.formula.prepare({**factors, **stats[id(self)]} if self.needs_stats else factors)
        if self._row_group == 1:
            return delta
        wide = range(self._round_down(rows.start), min(self._round_up(rows.stop), self.base.info.rows))
        whole = self.base.load(wide, worker, stats, dtype) if self.formula.needs_base else None
        return self._grouped(delta, whole)

    def _round_down(self, row: int) -> int:
        return row // self._row_group * self._row_group

    def _round_up(self, row: int) -> int:
        return -(-row // self._row_group) * self._row_group

    def _grouped(self, delta: Any, whole: Rows | None) -> Any:
        def grouped(start: int, stop: int, base: Any) -> Tensor:
            first, last = self._round_down(start), min(self._round_up(stop), self.base.info.rows)
            wide = whole(first, last).reshape((last - first) // self.rows_per_output, -1) if whole else None
            changed: Tensor = delta(first // self.rows_per_output, last // self.rows_per_output, wide)
            return changed.reshape(last - first, -1)[start - first : stop - first]

        return grouped


def _blocks_of(tensor: LazyTensor, scan: StatsPass) -> Iterator[tuple[int, Tensor]]:
    """The blocks of another tensor than the one that the pass is over, each read for itself."""
    for start in range(0, tensor.info.rows, tensor.info.block_rows):
        stop = min(start + tensor.info.block_rows, tensor.info.rows)
        scan.worker.clear()
        yield start, tensor.load(range(start, stop), scan.worker, scan.stats, scan.dtype)(start, stop)


def _read_factor(stored: StoredTensor, worker: Worker, dtype: torch.dtype) -> Tensor:
    """Read a whole factor in its shape: floats in the dtype of the computation, indices as they are stored."""
    import torch

    if stored.info.numel == 0:
        return torch.empty(stored.info.shape, dtype=dtype, device=worker.device)
    value = stored.read_all(worker).view(stored.info.shape)
    return value.to(dtype) if value.is_floating_point() else value.clone()
