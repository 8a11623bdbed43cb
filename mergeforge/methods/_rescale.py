"""Rescaling: restoring a task vector's L1 norm after some of its elements were dropped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from mergeforge.methods import Block, BlockScan

if TYPE_CHECKING:
    from torch import Tensor

S = TypeVar("S")
MIN_L1_NORM = 1e-7


@dataclass
class Rescaled(Generic[S]):
    """What selects the elements of each input (masks, ranges), and the ratio that rescales the kept ones."""

    selection: S
    ratios: list[float]


def ratios(scan: BlockScan, keep: Callable[[list[Tensor], Block], list[Tensor]], count: int) -> list[float]:
    """sum|delta| / sum|kept| over the whole tensor for each input, in float64; 1 where either sum is below 1e-7.

    `keep` zeroes the dropped elements. It gets magnitudes, so it must decide by magnitude and position alone.
    This is mergekit's L1 rescaling. (DARE's paper divides by the density: equal on average.)
    """

    def l1_norm(magnitudes: Tensor) -> float:
        import torch

        return float(magnitudes.sum(dtype=torch.float64))

    def norms(deltas: list[Tensor], block: Block) -> list[tuple[float, float]]:
        before = [l1_norm(delta.abs_()) for delta in deltas]
        return list(zip(before, map(l1_norm, keep(deltas, block)), strict=True))

    return ratios_from_l1_norms(scan(norms), count)


def ratios_from_l1_norms(block_norms: Iterable[Sequence[tuple[float, float]]], count: int) -> list[float]:
    """The same ratios, from the L1 norms (before, after) of each input in each block."""
    blocks = list(block_norms)
    return [
        _ratio(*(math.fsum(sums) for sums in zip(*(norms[index] for norms in blocks), strict=True)))
        for index in range(count)
    ]


def _ratio(before: float = 0.0, after: float = 0.0) -> float:
    return before / after if before >= MIN_L1_NORM and after >= MIN_L1_NORM else 1.0
