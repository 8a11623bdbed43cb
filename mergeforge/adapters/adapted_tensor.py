"""A tensor with adapters folded in, and an adapter's delta on its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergeforge.adapters.deltas import LoraDelta, WeightDelta
from mergeforge.core.tensor_info import TensorInfo
from mergeforge.tensors.budget import MemoryCost, Worker
from mergeforge.tensors.lazy import Rows, Stats, StatsPass, LazyTensor

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class AdaptedTensor:
    """W + sum(weight * delta): every low-rank edit in one float32 GEMM, one rounding at the end.

    The sum is over deltas of the same W, so the order of the adapters does not matter.
    """

    base: LazyTensor
    terms: tuple[tuple[float, WeightDelta], ...]

    @property
    def info(self) -> TensorInfo:
        return self.base.info

    @property
    def inputs(self) -> tuple[LazyTensor, ...]:
        return (self.base,)

    @property
    def needs_stats(self) -> bool:
        return any(edit.needs_stats for _, edit in self.terms)

    @property
    def memory_cost(self) -> MemoryCost:
        return sum((edit.memory_cost for _, edit in self.terms), self.base.memory_cost) + MemoryCost(scratch_blocks=1)

    def collect_stats(self, scan: StatsPass) -> Any:
        _learn_edits(scan, self.base, [edit for _, edit in self.terms])

    def load(self, rows: range, worker: Worker, facts: Stats, dtype: torch.dtype) -> Rows:
        whole = self.base.load(rows, worker, facts, dtype)
        factors = _joined(self.terms, rows, worker, dtype)
        others = [
            (weight, edit.needs_base, edit.load(rows, worker, facts, dtype))
            for weight, edit in self.terms
            if not isinstance(edit, LoraDelta)
        ]

        def block(start: int, stop: int) -> Tensor:
            value = whole(start, stop)
            base = value.clone() if factors and any(needs for _, needs, _ in others) else value
            deltas = [(weight, delta(start, stop, base)) for weight, _, delta in others]
            if factors:
                value.addmm_(factors[0][start - rows.start : stop - rows.start], factors[1])
            for weight, change in deltas:
                value.add_(change, alpha=weight)
            return value

        return block


@dataclass(frozen=True, eq=False)
class AdapterDelta:
    """What one adapter adds to a tensor, as a task vector of its own; no edits: zeros."""

    base: LazyTensor
    edits: tuple[WeightDelta, ...]

    @property
    def info(self) -> TensorInfo:
        return self.base.info

    @property
    def inputs(self) -> tuple[LazyTensor, ...]:
        return (self.base,)

    @property
    def needs_stats(self) -> bool:
        return any(edit.needs_stats for edit in self.edits)

    @property
    def memory_cost(self) -> MemoryCost:
        base = self.base.memory_cost if any(edit.needs_base for edit in self.edits) else MemoryCost()
        return sum((edit.memory_cost for edit in self.edits), base) + MemoryCost(scratch_blocks=1)

    def collect_stats(self, scan: StatsPass) -> Any:
        _learn_edits(scan, self.base, self.edits)

    def load(self, rows: range, worker: Worker, facts: Stats, dtype: torch.dtype) -> Rows:
        needs_base = any(edit.needs_base for edit in self.edits)
        whole = self.base.load(rows, worker, facts, dtype) if needs_base else None
        deltas = [edit.load(rows, worker, facts, dtype) for edit in self.edits]
        slot = worker.next_slot()

        def block(start: int, stop: int) -> Tensor:
            base = whole(start, stop) if whole else None
            total = worker.scratch(slot, (stop - start, self.info.columns), dtype).zero_()
            for delta in deltas:
                total.add_(delta(start, stop, base))
            return total

        return block


def _learn_edits(scan: StatsPass, base: LazyTensor, edits: Sequence[WeightDelta]) -> None:
    for edit in edits:
        if edit.needs_stats and id(edit) not in scan.facts:
            scan.facts[id(edit)] = edit.collect_stats(scan, base)


def _joined(
    terms: Sequence[tuple[float, WeightDelta]], rows: range, worker: Worker, dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """All low-rank terms as one product: [w1 s1 L1, w2 s2 L2, ...] [R1; R2; ...]."""
    import torch

    pairs = [edit.factors(rows, worker, dtype, weight) for weight, edit in terms if isinstance(edit, LoraDelta)]
    if not pairs:
        return None
    if len(pairs) == 1:
        return pairs[0]
    return torch.cat([left for left, _ in pairs], dim=1), torch.cat([right for _, right in pairs])
