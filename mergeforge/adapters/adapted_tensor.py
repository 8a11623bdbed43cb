"""A tensor with adapters folded in, and an adapter's delta as a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergeforge.adapters.deltas import LoraDelta, WeightDelta
from mergeforge.core.tensor_info import TensorInfo
from mergeforge.tensors.budget import MemoryCost
from mergeforge.tensors.lazy import LazyTensor, Rows, Stats, StatsPass
from mergeforge.tensors.worker import Worker

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class AdaptedTensor:
    """W + sum(weight * delta): all LoRA deltas in one float32 GEMM, with one rounding at the end.

    All deltas are relative to the same W, so the order of the adapters does not matter.
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
        return any(delta.needs_stats for _, delta in self.terms)

    @property
    def memory_cost(self) -> MemoryCost:
        return sum((delta.memory_cost for _, delta in self.terms), self.base.memory_cost) + MemoryCost(scratch_blocks=1)

    def collect_stats(self, scan: StatsPass) -> Any:
        _collect_delta_stats(scan, self.base, [delta for _, delta in self.terms])

    def load(self, rows: range, worker: Worker, stats: Stats, dtype: torch.dtype) -> Rows:
        whole = self.base.load(rows, worker, stats, dtype)
        factors = _stack_lora_factors(self.terms, rows, worker, dtype)
        others = [
            (weight, delta.needs_base, delta.load(rows, worker, stats, dtype))
            for weight, delta in self.terms
            if not isinstance(delta, LoraDelta)
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
    """The task vector of one adapter: the sum of its deltas of a tensor; zeros if it has none."""

    base: LazyTensor
    deltas: tuple[WeightDelta, ...]

    @property
    def info(self) -> TensorInfo:
        return self.base.info

    @property
    def inputs(self) -> tuple[LazyTensor, ...]:
        return (self.base,)

    @property
    def needs_stats(self) -> bool:
        return any(delta.needs_stats for delta in self.deltas)

    @property
    def memory_cost(self) -> MemoryCost:
        base = self.base.memory_cost if any(delta.needs_base for delta in self.deltas) else MemoryCost()
        return sum((delta.memory_cost for delta in self.deltas), base) + MemoryCost(scratch_blocks=1)

    def collect_stats(self, scan: StatsPass) -> Any:
        _collect_delta_stats(scan, self.base, self.deltas)

    def load(self, rows: range, worker: Worker, stats: Stats, dtype: torch.dtype) -> Rows:
        needs_base = any(delta.needs_base for delta in self.deltas)
        whole = self.base.load(rows, worker, stats, dtype) if needs_base else None
        deltas = [delta.load(rows, worker, stats, dtype) for delta in self.deltas]
        slot = worker.next_slot()

        def block(start: int, stop: int) -> Tensor:
            base = whole(start, stop) if whole else None
            total = worker.scratch(slot, (stop - start, self.info.columns), dtype).zero_()
            for delta in deltas:
                total.add_(delta(start, stop, base))
            return total

        return block


def _collect_delta_stats(scan: StatsPass, base: LazyTensor, deltas: Sequence[WeightDelta]) -> None:
    for delta in deltas:
        if delta.needs_stats and id(delta) not in scan.stats:
            scan.stats[id(delta)] = delta.collect_stats(scan, base)


def _stack_lora_factors(
    terms: Sequence[tuple[float, WeightDelta]], rows: range, worker: Worker, dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """All LoRA terms as one product: [w1 s1 L1, w2 s2 L2, ...] [R1; R2; ...]."""
    import torch

    pairs = [delta.factors(rows, worker, dtype, weight) for weight, delta in terms if isinstance(delta, LoraDelta)]
    if not pairs:
        return None
    if len(pairs) == 1:
        return pairs[0]
    return torch.cat([left for left, _ in pairs], dim=1), torch.cat([right for _, right in pairs])
