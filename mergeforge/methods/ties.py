"""ties: trim, elect sign, merge (Yadav et al., https://arxiv.org/abs/2306.01708)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mergeforge.methods import DENSITY, Block, BlockScan, method
from mergeforge.methods._kth_largest import SEARCH_NBYTES
from mergeforge.methods._magnitude_range import MagnitudeRange, MagnitudeRanges
from mergeforge.methods._rescale import Rescaled
from mergeforge.methods._thresholds import density_thresholds
from mergeforge.methods._weighted_sum import WeightedSum, sign_consensus_sum, sign_consensus_terms

if TYPE_CHECKING:
    from torch import Tensor


def magnitude_ranges(
    scan: BlockScan, numel: int, *, density: list[float], rescale: bool, **_: object
) -> Rescaled[MagnitudeRanges]:
    """The largest elements of each task vector, and with rescale the ratio that restores its L1 norm."""
    thresholds = density_thresholds(scan, numel, density)
    ranges = MagnitudeRanges([MagnitudeRange(threshold) if threshold else None for threshold in thresholds])
    return ranges.rescaled(scan, rescale)


def as_sum(
    stats: Rescaled[MagnitudeRanges], *, weight: list[float], normalize: bool, lambda_: float, **_: object
) -> WeightedSum:
    terms = sign_consensus_terms(weight, normalize, lambda_, stats.ratios)
    return replace(terms, magnitude_ranges=stats.selection.native_table)


@method(
    "ties",
    scratch_blocks=4,
    stats=magnitude_ranges,
    stats_nbytes=SEARCH_NBYTES,
    native_stats_nbytes=SEARCH_NBYTES,
    within={"density": DENSITY},
    as_sum=as_sum,
)
def ties(
    deltas: list[Tensor],
    stats: Rescaled[MagnitudeRanges],
    block: Block,
    *,
    weight: list[float],
    density: list[float] = 1.0,  # type: ignore[assignment]  # one default for every input
    normalize: bool = True,
    rescale: bool = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> Tensor:
    """Keep each task vector's largest `density` fraction, elect a sign, average those that agree.

    Exactly max(1, int(density * n)) elements of a tensor are kept; among equal magnitudes at the
    threshold the first ones. int8_mask has no effect.
    """
    return sign_consensus_sum(stats.selection.keep(deltas, block), weight, normalize, lambda_, stats.ratios)
