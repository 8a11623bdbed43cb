"""Selecting elements of task vectors by magnitude: the largest ones, or those between two thresholds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from mergeforge.methods import Block, BlockScan
from mergeforge.methods._rescale import Rescaled, ratios, ratios_from_l1_norms
from mergeforge.methods._sub_blocks import by_elements
from mergeforge.methods._thresholds import Threshold

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    Integers = NDArray[np.int64]

UNBOUNDED = 0x7FFFFFFF  # bits that no magnitude exceeds


@dataclass
class MagnitudeRange:
    """The elements that reach the `lower` threshold, except those that reach the `upper` one, if there is one."""

    lower: Threshold
    upper: Threshold | None = None

    def keep(self, delta: Tensor, block: Block) -> Tensor:
        """Zero what is outside the range, in place. Blocks must come in the tensor's order, from the first one on."""
        is_first = block.start == 0
        if self.upper is None:
            return self.lower.trim(delta, is_first)
        for (part,) in by_elements([delta]):
            above = self.upper.trim(part.clone(), is_first)
            self.lower.trim(part, is_first).sub_(above)
            is_first = False
        return delta


@dataclass
class MagnitudeRanges:
    """The range of each task vector; None keeps all of it."""

    ranges: list[MagnitudeRange | None]

    def keep(self, deltas: list[Tensor], block: Block) -> list[Tensor]:
        """Zero what is outside each delta's range, in place, as MagnitudeRange does."""
        return [
            magnitudes.keep(delta, block) if magnitudes else delta
            for delta, magnitudes in zip(deltas, self.ranges, strict=True)
        ]

    @cached_property
    def native_table(self) -> Integers:
        """`struct band` of kernels.c for each task vector. The native library counts off ties in it."""
        import numpy as np

        return np.array([_native_row(magnitudes) for magnitudes in self.ranges], np.int64)

    def rescaled(self, scan: BlockScan, rescale: bool) -> Rescaled[MagnitudeRanges]:
        """The ranges with the ratio that restores each task vector's L1 norm; 1 without `rescale`."""
        count = len(self.ranges)
        if not rescale:
            return Rescaled(self, [1.0] * count)
        if l1_norms := getattr(scan, "l1_norms", None):
            return Rescaled(self, ratios_from_l1_norms(l1_norms(ranges=self.native_table), count))
        return Rescaled(self, ratios(scan, self.keep, count))


def _native_row(magnitudes: MagnitudeRange | None) -> list[int]:
    if magnitudes is None:
        return [-1, 0, 0, UNBOUNDED, 0, 0]
    lower, upper = magnitudes.lower, magnitudes.upper
    return [lower.bits, lower.ties_kept, 0, *([upper.bits, upper.ties_kept, 0] if upper else [UNBOUNDED, 0, 0])]
