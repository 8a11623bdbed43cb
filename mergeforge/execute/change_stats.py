"""What a merge did to a tensor's numbers: how far they moved, and how much of that rounding swallowed.

Looked at in an eighth of every eighth block, so it costs a few hundredths of a pass and does not depend on how
the tensor is cut. Only where the base lies in a file: its rows are there already.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any

from mergeforge.adapters.adapted_tensor import AdaptedTensor
from mergeforge.core.tensor_info import TensorInfo, torch_dtype
from mergeforge.planner import TensorPlan
from mergeforge.tensors.lazy import LazyTensor
from mergeforge.tensors.merged import MergedTensor
from mergeforge.tensors.stored import StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

EVERY, SHARE = 8, 8


@dataclass(frozen=True)
class ChangeStats:
    """Sums over the elements looked at: of W squared, of the change squared, its largest; elements that should
    change, and those of them that do not once they are rounded."""

    elements: int = 0
    weight: float = 0.0
    change: float = 0.0
    largest: float = 0.0
    meant: int = 0
    lost_to_rounding: int = 0

    def __add__(self, other: ChangeStats) -> ChangeStats:
        added = [mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)]
        added[3] = max(self.largest, other.largest)
        return ChangeStats(*added)

    @classmethod
    def of(cls, elements: int, found: Sequence[float]) -> ChangeStats:
        """Of what a kernel found (Stack.weighted)."""
        weight, change, largest, meant, swallowed = found
        return cls(elements, weight, change, largest, int(meant), int(swallowed))

    @property
    def facts(self) -> dict[str, Any]:
        """For the receipt: |D| / |W|, the largest change, the share of changes that rounding swallowed."""
        relative = math.sqrt(self.change / self.weight) if self.weight else None
        return {
            "relative": relative,
            "largest": self.largest,
            "swallowed": self.lost_to_rounding / self.meant if self.meant else 0.0,
            "elements_looked_at": self.elements,
        }


def base_of(way: LazyTensor) -> StoredTensor | None:
    """The stored tensor that a way starts from, if its change can be told."""
    base = way.base if isinstance(way, AdaptedTensor | MergedTensor) else None
    return base if isinstance(base, StoredTensor) else None


def sampled_rows(piece: TensorPlan, start: int, stop: int) -> int:
    """How many rows from `start` of a block [start, stop) are looked at."""
    index = start // piece.info.block_rows
    return max(1, (stop - start) // SHARE) if index % EVERY == 0 else 0


def measure_change(info: TensorInfo, base: Tensor, value: Tensor) -> ChangeStats:
    """Compare rows of the base with what they became, in the dtype that is written."""
    import torch

    dtype = torch_dtype(info.dtype)
    change = value - base
    least, most = change.aminmax()
    meant = int(change.count_nonzero())
    return ChangeStats(
        elements=value.numel(),
        weight=float(torch.linalg.vector_norm(base, dtype=torch.float64)) ** 2,
        change=float(torch.linalg.vector_norm(change, dtype=torch.float64)) ** 2,
        largest=max(float(most), -float(least)),
        meant=meant,
        lost_to_rounding=meant
        - int((value.to(dtype) - base.to(dtype)).count_nonzero()),  # rounding makes no change of none
    )


def total(parts: Iterable[ChangeStats]) -> ChangeStats:
    return sum(parts, ChangeStats())
