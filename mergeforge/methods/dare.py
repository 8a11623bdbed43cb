"""dare_linear and dare_ties: drop elements of the task vectors at random and rescale the rest.

Yu et al., "Language Models are Super Mario", https://arxiv.org/abs/2311.03099.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mergeforge.methods import DENSITY, Block, BlockScan, method
from mergeforge.methods._mask_cache import CACHED_ELEMENTS, MASK_CACHE_NBYTES, MaskCache
from mergeforge.methods._random_mask import apply_random_masks, mask_key
from mergeforge.methods._rescale import Rescaled, ratios, ratios_from_l1_norms
from mergeforge.methods._weighted_sum import (
    WeightedSum,
    sign_consensus_sum,
    sign_consensus_terms,
    task_arithmetic_sum,
    weighted_sum,
)

if TYPE_CHECKING:
    from torch import Tensor


def collect_stats(
    scan: BlockScan, numel: int, *, density: list[float], rescale: bool, **_: object
) -> Rescaled[list[MaskCache]]:
    """The masks, and the ratio that restores each task vector's L1 norm."""
    count = len(density)
    if not rescale or all(probability >= 1 for probability in density):
        return Rescaled([MaskCache() for _ in density], [1.0] * count)
    if l1_norms := getattr(scan, "l1_norms", None):
        return Rescaled([MaskCache() for _ in density], ratios_from_l1_norms(l1_norms(density=density), count))
    masks = [MaskCache(CACHED_ELEMENTS) for _ in density]
    return Rescaled(masks, ratios(scan, lambda deltas, block: apply_random_masks(deltas, block, density, masks), count))


def as_sum(
    stats: Rescaled[list[MaskCache]],
    block: Block,
    compute: str,
    *,
    weight: list[float],
    density: list[float],
    normalize: bool,
    lambda_: float,
    **_: object,
) -> WeightedSum:
    return _with_masks(task_arithmetic_sum(weight, normalize, lambda_, stats.ratios, compute), block, density)


def as_sign_consensus_sum(
    stats: Rescaled[list[MaskCache]],
    block: Block,
    *,
    weight: list[float],
    density: list[float],
    normalize: bool,
    lambda_: float,
    **_: object,
) -> WeightedSum:
    return _with_masks(sign_consensus_terms(weight, normalize, lambda_, stats.ratios), block, density)


def _with_masks(terms: WeightedSum, block: Block, density: Sequence[float]) -> WeightedSum:
    return replace(terms, mask_keys=[mask_key(block, index, value) for index, value in enumerate(density)])


WITHIN = {"density": DENSITY}


@method(
    "dare_linear", scratch_blocks=1, stats=collect_stats, stats_nbytes=MASK_CACHE_NBYTES, within=WITHIN, as_sum=as_sum
)
def dare_linear(
    deltas: list[Tensor],
    stats: Rescaled[list[MaskCache]],
    block: Block,
    *,
    weight: list[float],
    density: list[float] = 1.0,  # type: ignore[assignment]  # one default for every input
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> Tensor:
    """Keep each element with probability `density`, restore the L1 norm, add up with weights.

    The mask depends only on random_seed, the tensor's name and the element's position. int8_mask has
    no effect.
    """
    masked = apply_random_masks(deltas, block, density, stats.selection)
    return weighted_sum(masked, weight, normalize, lambda_, stats.ratios)


@method(
    "dare_ties",
    scratch_blocks=4,
    stats=collect_stats,
    stats_nbytes=MASK_CACHE_NBYTES,
    within=WITHIN,
    as_sum=as_sign_consensus_sum,
)
def dare_ties(
    deltas: list[Tensor],
    stats: Rescaled[list[MaskCache]],
    block: Block,
    *,
    weight: list[float],
    density: list[float] = 1.0,  # type: ignore[assignment]  # one default for every input
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> Tensor:
    """dare_linear, adding only elements that have the elected sign (TIES).

    int8_mask has no effect.
    """
    masked = apply_random_masks(deltas, block, density, stats.selection)
    return sign_consensus_sum(masked, weight, normalize, lambda_, stats.ratios)
