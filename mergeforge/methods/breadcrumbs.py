"""breadcrumbs and breadcrumbs_ties: drop the largest and the smallest changes, keep the middle.

Davari and Belilovsky, "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks",
https://arxiv.org/abs/2312.06795.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mergeforge.methods import DENSITY, UNIT, Block, BlockScan, method
from mergeforge.methods._kth_largest import SEARCH_NBYTES
from mergeforge.methods._magnitude_range import MagnitudeRange, MagnitudeRanges
from mergeforge.methods._rescale import Rescaled
from mergeforge.methods._thresholds import thresholds_of_largest
from mergeforge.methods._weighted_sum import (
    WeightedSum,
    sign_consensus_sum,
    sign_consensus_terms,
    task_arithmetic_sum,
    weighted_sum,
)

if TYPE_CHECKING:
    from torch import Tensor


def magnitude_ranges(
    scan: BlockScan, numel: int, *, density: list[float], gamma: list[float], rescale: bool, **_: object
) -> Rescaled[MagnitudeRanges]:
    """The range of magnitudes of each task vector: int(density n) elements below the int(gamma n) largest."""
    count = len(density)
    counts: dict[int, int] = {}  # input -> elements in the range and above; input + count -> elements above it
    for index, (fraction, top_fraction) in enumerate(zip(density, gamma, strict=True)):
        if fraction < 1:
            kept = int(fraction * numel)
            smallest = max(0, numel - kept - int(top_fraction * numel))
            counts |= {index: numel - smallest, index + count: numel - smallest - kept}
    thresholds = thresholds_of_largest(
        scan if hasattr(scan, "split_magnitudes") else _doubled_scan(scan), numel, counts
    )
    ranges = [
        MagnitudeRange(thresholds[index], thresholds[index + count]) if index in thresholds else None
        for index in range(count)
    ]
    return MagnitudeRanges(ranges).rescaled(scan, rescale)


def _doubled_scan(scan: BlockScan) -> Any:
    """Scan every task vector as two inputs, so that one scan finds both thresholds of its range."""

    def scan_doubled(visit: Callable[[list[Tensor], Block], Any], sample: int = 0) -> Iterator[Any]:
        return scan(lambda deltas, block: visit([*deltas, *deltas], block), sample)

    return scan_doubled


def as_sum(
    stats: Rescaled[MagnitudeRanges],
    compute: str,
    *,
    weight: list[float],
    normalize: bool,
    lambda_: float,
    **_: object,
) -> WeightedSum:
    terms = task_arithmetic_sum(weight, normalize, lambda_, stats.ratios, compute)
    return replace(terms, magnitude_ranges=stats.selection.native_table)


def as_sign_consensus_sum(
    stats: Rescaled[MagnitudeRanges], *, weight: list[float], normalize: bool, lambda_: float, **_: object
) -> WeightedSum:
    terms = sign_consensus_terms(weight, normalize, lambda_, stats.ratios)
    return replace(terms, magnitude_ranges=stats.selection.native_table)


TWO_SEARCHES_NBYTES = 2 * SEARCH_NBYTES
WITHIN = {"density": DENSITY, "gamma": UNIT}


@method(
    "breadcrumbs",
    scratch_blocks=1,
    stats=magnitude_ranges,
    stats_nbytes=TWO_SEARCHES_NBYTES,
    native_stats_nbytes=TWO_SEARCHES_NBYTES,
    within=WITHIN,
    as_sum=as_sum,
)
def breadcrumbs(
    deltas: list[Tensor],
    stats: Rescaled[MagnitudeRanges],
    block: Block,
    *,
    weight: list[float],
    density: list[float] = 1.0,  # type: ignore[assignment]  # one default for every input
    gamma: list[float] = 0.01,  # type: ignore[assignment]
    normalize: bool = False,
    rescale: bool = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> Tensor:
    """Drop each delta's `gamma` largest elements, keep `density` of all below, add up. int8_mask has no effect."""
    return weighted_sum(stats.selection.keep(deltas, block), weight, normalize, lambda_, stats.ratios)


@method(
    "breadcrumbs_ties",
    scratch_blocks=4,
    stats=magnitude_ranges,
    stats_nbytes=TWO_SEARCHES_NBYTES,
    native_stats_nbytes=TWO_SEARCHES_NBYTES,
    within=WITHIN,
    as_sum=as_sign_consensus_sum,
)
def breadcrumbs_ties(
    deltas: list[Tensor],
    stats: Rescaled[MagnitudeRanges],
    block: Block,
    *,
    weight: list[float],
    density: list[float] = 1.0,  # type: ignore[assignment]  # one default for every input
    gamma: list[float] = 0.01,  # type: ignore[assignment]
    normalize: bool = False,
    rescale: bool = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> Tensor:
    """breadcrumbs, adding only elements that have the elected sign (TIES). int8_mask has no effect."""
    return sign_consensus_sum(stats.selection.keep(deltas, block), weight, normalize, lambda_, stats.ratios)
