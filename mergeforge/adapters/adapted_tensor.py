"""A tensor with adapters folded in, and an adapter's delta on its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergeforge.adapters.deltas import Edit, LowRank
from mergeforge.core.tensor_info import TensorInfo
from mergeforge.tensors.budget import Need, Worker
from mergeforge.tensors.lazy import Facts, Rows, Scan, Way

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Adapted:
    """W + sum(weight * delta): every low-rank edit in one float32 GEMM, one rounding at the end.

    The sum is over deltas of the same W, so the order of the adapters does not matter.
    """

    base: Way
    terms: tuple[tuple[float, Edit], ...]

    @property
    def info(self) -> TensorInfo:
        return self.base.info

    @property
    def parts(self) -> tuple[Way, ...]:
        return (self.base,)

    @property
    def learns(self) -> bool:
        return any(edit.learns for _, edit in self.terms)

    @property
    def need(self) -> Need:
        return sum((edit.need for _, edit in self.terms), self.base.need) + Need(live=1)

    def learn(self, scan: Scan) -> Any:
        _learn_edits(scan, self.base, [edit for _, edit in self.terms])

    def stage(self, rows: range, worker: Worker, facts: Facts, dtype: torch.dtype) -> Rows:
        whole = self.base.stage(rows, worker, facts, dtype)
        factors = _joined(self.terms, rows, worker, dtype)
        others = [
            (weight, edit.needs_base, edit.stage(rows, worker, facts, dtype))
            for weight, edit in self.terms
            if not isinstance(edit, LowRank)
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

    base: Way
    edits: tuple[Edit, ...]

    @property
    def info(self) -> TensorInfo:
        return self.base.info

    @property
    def parts(self) -> tuple[Way, ...]:
        return (self.base,)

    @property
    def learns(self) -> bool:
        return any(edit.learns for edit in self.edits)

    @property
    def need(self) -> Need:
        base = self.base.need if any(edit.needs_base for edit in self.edits) else Need()
        return sum((edit.need for edit in self.edits), base) + Need(live=1)

    def learn(self, scan: Scan) -> Any:
        _learn_edits(scan, self.base, self.edits)

    def stage(self, rows: range, worker: Worker, facts: Facts, dtype: torch.dtype) -> Rows:
        needs_base = any(edit.needs_base for edit in self.edits)
        whole = self.base.stage(rows, worker, facts, dtype) if needs_base else None
        deltas = [edit.stage(rows, worker, facts, dtype) for edit in self.edits]
        slot = worker.slot()

        def block(start: int, stop: int) -> Tensor:
            base = whole(start, stop) if whole else None
            total = worker.scratch(slot, (stop - start, self.info.columns), dtype).zero_()
            for delta in deltas:
                total.add_(delta(start, stop, base))
            return total

        return block


def _learn_edits(scan: Scan, base: Way, edits: Sequence[Edit]) -> None:
    for edit in edits:
        if edit.learns and id(edit) not in scan.facts:
            scan.facts[id(edit)] = edit.learn(scan, base)


def _joined(
    terms: Sequence[tuple[float, Edit]], rows: range, worker: Worker, dtype: torch.dtype
) -> tuple[Tensor, Tensor] | None:
    """All low-rank terms as one product: [w1 s1 L1, w2 s2 L2, ...] [R1; R2; ...]."""
    import torch

    pairs = [edit.factors(rows, worker, dtype, weight) for weight, edit in terms if isinstance(edit, LowRank)]
    if not pairs:
        return None
    if len(pairs) == 1:
        return pairs[0]
    return torch.cat([left for left, _ in pairs], dim=1), torch.cat([right for _, right in pairs])
