"""Deltas of expert stacks, and deltas of a range of a tensor's rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergeforge.adapters.deltas import WeightDelta
from mergeforge.adapters.peft.kind import Delta
from mergeforge.tensors.budget import MemoryCost
from mergeforge.tensors.lazy import LazyTensor, Stats, StatsPass
from mergeforge.tensors.stored import StoredTensor
from mergeforge.tensors.worker import ALIGNMENT, Worker

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class ExpertLoraDelta:
    """s * B_e A_e for every expert e: PEFT's target_parameters (peft/tuners/lora/layer.py, ParamWrapper).

    `a` is (experts * r, in), with the ranks of one expert next to each other. `b` is (out, r * experts), with the
    experts of one rank next to each other, or, if `expert_major`, the ranks of one expert (Unsloth's layout). The
    tensor is the stack of all experts, or `expert` alone from row `loaded_start` of B_e A_e. `transposed`: it
    holds (B_e A_e)^T. Computed one expert at a time.
    """

    a: StoredTensor
    b: StoredTensor
    experts: int
    scale: float
    expert_rows: int  # of one expert in the tensor
    expert: int | None = None
    loaded_start: int = 0
    transposed: bool = False
    expert_major: bool = False

    label: str = "LoRA on experts"
    needs_base: bool = False
    needs_stats: bool = False

    @property
    def rank(self) -> int:
        return self.a.info.shape[0] // self.experts

    @property
    def memory_cost(self) -> MemoryCost:
        stored = sum(factor.info.nbytes + ALIGNMENT for factor in (self.a, self.b))
        per_expert = 8 * (self.a.info.numel + self.b.info.numel) // self.experts
        return MemoryCost(fixed_nbytes=stored + per_expert, scratch_blocks=2)

    def collect_stats(self, scan: StatsPass, base: LazyTensor) -> Any:
        return None

    def load(self, rows: range, worker: Worker, stats: Stats, dtype: torch.dtype) -> Delta:
        import torch

        a = self.a.read_all(worker).view(self.experts, self.rank, -1)
        shape = (-1, self.experts, self.rank) if self.expert_major else (-1, self.rank, self.experts)
        b = self.b.read_all(worker).view(shape)

        def expert_rows(expert: int, start: int, stop: int) -> Tensor:
            right = a[expert].to(dtype)
            left = (b[:, expert] if self.expert_major else b[:, :, expert]).to(dtype).mul(self.scale)
            if self.transposed:
                return right.t()[self.loaded_start + start : self.loaded_start + stop] @ left.t()
            return left[self.loaded_start + start : self.loaded_start + stop] @ right

        def delta(start: int, stop: int, base: Any) -> Tensor:
            if self.expert is not None:
                return expert_rows(self.expert, start, stop)
            blocks = []
            for expert in range(start // self.expert_rows, -(-stop // self.expert_rows)):
                begin = expert * self.expert_rows
                blocks.append(expert_rows(expert, max(start - begin, 0), min(stop - begin, self.expert_rows)))
            return torch.cat(blocks)

        return delta


@dataclass(frozen=True, eq=False)
class RowRangeDelta:
    """A delta of rows [start, start + rows) of a tensor, as if these were a separate tensor."""

    delta: WeightDelta
    start: int
    rows: int

    needs_stats: bool = False

    @property
    def label(self) -> str:
        return self.delta.label

    @property
    def needs_base(self) -> bool:
        return self.delta.needs_base

    @property
    def memory_cost(self) -> MemoryCost:
        return self.delta.memory_cost + MemoryCost(scratch_blocks=1)

    def collect_stats(self, scan: StatsPass, base: LazyTensor) -> Any:
        return None

    def load(self, rows: range, worker: Worker, stats: Stats, dtype: torch.dtype) -> Delta:
        begin, end = max(rows.start, self.start), min(rows.stop, self.start + self.rows)
        inner = (
            self.delta.load(range(begin - self.start, end - self.start), worker, stats, dtype) if begin < end else None
        )

        def delta(start: int, stop: int, base: Any) -> Tensor:
            return self._embed_rows(inner, start, stop, base, worker, dtype)

        return delta

    def _embed_rows(
        self, inner: Delta | None, start: int, stop: int, base: Any, worker: Worker, dtype: torch.dtype
    ) -> Tensor:
        """The changed rows among rows of zeros; a (1, 1) zero, which broadcasts, if no row changes."""
        import torch

        begin, end = max(start, self.start), min(stop, self.start + self.rows)
        if inner is None or begin >= end:
            return torch.zeros((1, 1), dtype=dtype, device=worker.device)
        base_rows = base[begin - start : end - start] if base is not None else None
        changed: Tensor = inner(begin - self.start, end - self.start, base_rows)
        if (begin, end) == (start, stop):
            return changed
        block = changed.new_zeros(stop - start, changed.shape[1])
        block[begin - start : end - start] = changed
        return block
