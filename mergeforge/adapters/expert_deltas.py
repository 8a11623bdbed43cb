"""Adapters of expert stacks, and edits of some of a tensor's rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergeforge.adapters.deltas import Delta, WeightDelta
from mergeforge.tensors.budget import ALIGNMENT, MemoryCost, Worker
from mergeforge.tensors.lazy import Stats, StatsPass, LazyTensor
from mergeforge.tensors.stored import StoredTensor

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class ExpertLoraDelta:
    """s * B_e A_e for every expert e: PEFT's target_parameters (peft/tuners/lora/layer.py, ParamWrapper).

    `a` (experts * r, in): the ranks of an expert follow one another. `b` (out, r * experts): the experts of a
    rank follow one another; `by_expert`: the ranks of an expert do (Unsloth's layout). The tensor is
    the stack of all experts, or `expert` alone, and then begins at row `first` of B_e A_e. `swapped`: it holds
    (B_e A_e)^T. One expert at a time is computed.
    """

    a: StoredTensor
    b: StoredTensor
    experts: int
    scale: float
    rows: int  # of one expert in the tensor
    expert: int | None = None
    first: int = 0
    swapped: bool = False
    by_expert: bool = False

    label: str = "LoRA on experts"
    needs_base: bool = False
    needs_stats: bool = False

    @property
    def rank(self) -> int:
        return self.a.info.shape[0] // self.experts

    @property
    def memory_cost(self) -> MemoryCost:
        read = sum(one.info.nbytes + ALIGNMENT for one in (self.a, self.b))
        one = 8 * (self.a.info.numel + self.b.info.numel) // self.experts
        return MemoryCost(fixed_nbytes=read + one, scratch_blocks=2)

    def collect_stats(self, scan: StatsPass, base: LazyTensor) -> Any:
        return None

    def load(self, rows: range, worker: Worker, facts: Stats, dtype: torch.dtype) -> Delta:
        import torch

        a = self.a.read_all(worker).view(self.experts, self.rank, -1)
        shape = (-1, self.experts, self.rank) if self.by_expert else (-1, self.rank, self.experts)
        b = self.b.read_all(worker).view(shape)

        def of(expert: int, start: int, stop: int) -> Tensor:
            right = a[expert].to(dtype)
            left = (b[:, expert] if self.by_expert else b[:, :, expert]).to(dtype).mul(self.scale)
            if self.swapped:
                return right.t()[self.first + start : self.first + stop] @ left.t()
            return left[self.first + start : self.first + stop] @ right

        def delta(start: int, stop: int, base: Any) -> Tensor:
            if self.expert is not None:
                return of(self.expert, start, stop)
            pieces = []
            for expert in range(start // self.rows, -(-stop // self.rows)):
                begin = expert * self.rows
                pieces.append(of(expert, max(start - begin, 0), min(stop - begin, self.rows)))
            return torch.cat(pieces)

        return delta


@dataclass(frozen=True, eq=False)
class RowRangeDelta:
    """An edit of rows [first, first + rows) of a tensor, as if these were a tensor of their own."""

    edit: WeightDelta
    first: int
    rows: int

    needs_stats: bool = False

    @property
    def label(self) -> str:
        return self.edit.label

    @property
    def needs_base(self) -> bool:
        return self.edit.needs_base

    @property
    def memory_cost(self) -> MemoryCost:
        return self.edit.memory_cost + MemoryCost(scratch_blocks=1)

    def collect_stats(self, scan: StatsPass, base: LazyTensor) -> Any:
        return None

    def load(self, rows: range, worker: Worker, facts: Stats, dtype: torch.dtype) -> Delta:
        begin, end = max(rows.start, self.first), min(rows.stop, self.first + self.rows)
        inner = (
            self.edit.load(range(begin - self.first, end - self.first), worker, facts, dtype) if begin < end else None
        )

        def delta(start: int, stop: int, base: Any) -> Tensor:
            return self._placed(inner, start, stop, base, worker, dtype)

        return delta

    def _placed(
        self, inner: Delta | None, start: int, stop: int, base: Any, worker: Worker, dtype: torch.dtype
    ) -> Tensor:
        """The inner rows' change among rows that do not change: 0, to which a number of any shape can be added."""
        import torch

        begin, end = max(start, self.first), min(stop, self.first + self.rows)
        if inner is None or begin >= end:
            return torch.zeros((1, 1), dtype=dtype, device=worker.device)
        mine = base[begin - start : end - start] if base is not None else None
        part: Tensor = inner(begin - self.first, end - self.first, mine)
        if (begin, end) == (start, stop):
            return part
        whole = part.new_zeros(stop - start, part.shape[1])
        whole[begin - start : end - start] = part
        return whole
