"""ChangeStats: how far a merge moved a tensor's values, and how many of the changes were lost to rounding.

Measured on one eighth of every eighth block, so it costs a few hundredths of a pass and does not depend on the
tiles. Only measured if the base is stored in a file: its rows are loaded already.
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

BLOCK_STEP, ROW_STEP = 8, 8  # every BLOCK_STEP-th block, and of it the first 1 / ROW_STEP of the rows


@dataclass(frozen=True)
class ChangeStats:
    """Sums over the sampled elements: base squared, change squared; the largest change; counts of changed elements.

    `changed`: elements that differ from the base before rounding; `lost_to_rounding`: those of them that equal the
    base after rounding.
    """

    elements: int = 0
    base_square: float = 0.0
    change_square: float = 0.0
    max_change: float = 0.0
    changed: int = 0
    lost_to_rounding: int = 0

    def __add__(self, other: ChangeStats) -> ChangeStats:
        values = [left + right for left, right in zip(astuple(self), astuple(other), strict=True)]
        values[3] = max(self.max_change, other.max_change)
        return ChangeStats(*values)

    @classmethod
    def from_kernel(cls, elements: int, changes: Sequence[float]) -> ChangeStats:
        """From the five numbers that NativeInputs.reduce measures."""
        base_square, change_square, max_change, changed, lost = changes
        return cls(elements, base_square, change_square, max_change, int(changed), int(lost))

    @property
    def as_json(self) -> dict[str, Any]:
        """For the receipt: |D| / |W|, the largest change, and the share of changes that were lost to rounding."""
        relative = math.sqrt(self.change_square / self.base_square) if self.base_square else None
        return {
            "relative": relative,
            "largest": self.max_change,
            "lost_to_rounding": self.lost_to_rounding / self.changed if self.changed else 0.0,
            "elements_sampled": self.elements,
        }


def base_of(tensor: LazyTensor) -> StoredTensor | None:
    """The stored tensor that the change of a tensor is measured against, if there is one."""
    base = tensor.base if isinstance(tensor, AdaptedTensor | MergedTensor) else None
    return base if isinstance(base, StoredTensor) else None


def sampled_rows(plan: TensorPlan, start: int, stop: int) -> int:
    """How many rows of the block [start, stop) are measured, counted from `start`."""
    index = start // plan.info.block_rows
    return max(1, (stop - start) // ROW_STEP) if index % BLOCK_STEP == 0 else 0


def measure_change(info: TensorInfo, base: Tensor, value: Tensor) -> ChangeStats:
    """Compare float32 rows of the base with the merged rows; rounding is to the dtype that is written."""
    import torch

    dtype = torch_dtype(info.dtype)
    change = value - base
    lowest, highest = change.aminmax()
    changed = int(change.count_nonzero())
    differs_rounded = int((value.to(dtype) - base.to(dtype)).count_nonzero())  # equal values stay equal when rounded
    return ChangeStats(
        elements=value.numel(),
        base_square=float(torch.linalg.vector_norm(base, dtype=torch.float64)) ** 2,
        change_square=float(torch.linalg.vector_norm(change, dtype=torch.float64)) ** 2,
        max_change=max(float(highest), -float(lowest)),
        changed=changed,
        lost_to_rounding=changed - differs_rounded,
    )


def total_change(parts: Iterable[ChangeStats]) -> ChangeStats:
    """The sum of the statistics of several parts."""
    return sum(parts, ChangeStats())
