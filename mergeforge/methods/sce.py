"""sce: select elements by variance, calculate weights from them, erase minority signs.

Wan et al., "FuseChat: Knowledge Fusion of Chat Models", https://arxiv.org/abs/2408.07990.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mergeforge.methods import UNIT, Block, BlockScan, method
from mergeforge.methods._kth_largest import SEARCH_NBYTES
from mergeforge.methods._mask_cache import CACHED_ELEMENTS, MASK_CACHE_NBYTES, MaskCache
from mergeforge.methods._sub_blocks import by_elements
from mergeforge.methods._thresholds import SAMPLE_ELEMENTS, Threshold, subsample, threshold_of_largest_fraction
from mergeforge.methods._weighted_sum import fused_weighted_sum
from mergeforge.native import bindings

if TYPE_CHECKING:
    from torch import Tensor

MIN_SUM = 1e-6  # of the weights, and of the divisor


@dataclass
class Selection:
    """The threshold of variance (None: everything is kept) with its masks, and each task vector's weight."""

    threshold: Threshold | None
    masks: MaskCache = field(default_factory=MaskCache)
    weights: list[float] = field(default_factory=list)

    def keep(self, deltas: list[Tensor], block: Block) -> None:
        """Zero what is not selected, in place. Blocks must come in the tensor's order, from the first one on."""
        if self.threshold is not None:
            trim = self.threshold.trim
            self.masks.apply(deltas, block, lambda: trim(variance(deltas), block.start == 0).ne_(0))


def select(scan: BlockScan, numel: int, *, select_topk: float, int8_mask: bool) -> Selection:
    """Keep the `select_topk` fraction of the elements that vary, by variance; weights are mean squares of these."""
    # Either all masks are cached (each block's in whole bytes) or none: a threshold counts ties from the first block.
    capacity = CACHED_ELEMENTS if numel <= CACHED_ELEMENTS * 7 // 8 else 0
    selection = Selection(_threshold(scan, numel, select_topk), MaskCache(capacity))

    def squares(deltas: list[Tensor], block: Block) -> list[float]:
        selection.keep(deltas, block)
        return [float(delta.flatten().dot(delta.flatten())) for delta in deltas]

    means = [math.fsum(column) / numel for column in zip(*scan(squares), strict=True)]
    total = math.fsum(means)
    selection.weights = [mean / total if total >= MIN_SUM else 1 / len(means) for mean in means]
    return selection


def _threshold(scan: BlockScan, numel: int, fraction: float) -> Threshold | None:
    if fraction >= 1 or not numel:
        return None
    return threshold_of_largest_fraction(variance_scan(scan), numel, fraction)


def variance_scan(scan: BlockScan) -> Any:
    """Scan the variance of the task vectors as if it were one task vector."""

    def scan_variance(visit: Callable[[list[Tensor], Block], Any], sample: int = 0) -> Iterator[Any]:
        def block_variance(deltas: list[Tensor]) -> Tensor:
            few = [subsample(delta, delta.numel(), SAMPLE_ELEMENTS) for delta in deltas] if sample else deltas
            return variance(few)

        return scan(lambda deltas, block: visit([block_variance(deltas)], block), sample)

    return scan_variance


def variance(deltas: list[Tensor]) -> Tensor:
    """The variance of each element over the task vectors (divided by their number)."""
    import torch

    result = torch.empty_like(deltas[0])
    if bindings.is_supported(*deltas):
        bindings.kernels().variance(bindings.data_pointers(deltas), len(deltas), result.numel(), result)
        return result
    for first, *rest, out in by_elements([*deltas, result], temporaries=2):
        out.copy_(_float64_variance(first, rest))
    return result


def _float64_variance(first: Tensor, rest: list[Tensor]) -> Tensor:
    """The variance in float64, so that equal variances stay equal; of differences from `first`, to avoid cancellation.

    (torch.var makes sce 17 times slower.)
    """
    import torch

    origin, count = first.double(), len(rest) + 1
    if not rest:
        return torch.zeros_like(origin)
    total = rest[0].to(torch.float64, copy=True).sub_(origin)
    squares = total * total
    for delta in rest[1:]:
        difference = delta.to(torch.float64, copy=True).sub_(origin)
        total.add_(difference)
        squares.addcmul_(difference, difference)
    return squares.mul_(count).addcmul_(total, total, value=-1).mul_(1 / (count * count))


@method(
    "sce",
    scratch_blocks=3,
    stats=select,
    stats_nbytes=SEARCH_NBYTES + MASK_CACHE_NBYTES,
    within={"select_topk": UNIT},
)
def sce(
    deltas: list[Tensor], stats: Selection, block: Block, *, select_topk: float = 1.0, int8_mask: bool = False
) -> Tensor:
    """Select elements by variance, weight task vectors by their mean squares, erase minority signs.

    Mean squares that add up to less than 1e-6 make the weights equal, as in mergekit. int8_mask has
    no effect.
    """
    stats.keep(deltas, block)
    return sign_consensus_mean(deltas, stats.weights)


def sign_consensus_mean(deltas: list[Tensor], weights: list[float]) -> Tensor:
    """The weighted mean of the deltas that have the elected sign at each element, into the first one."""
    import numpy as np
    import torch

    if bindings.is_supported(*deltas):
        pointers, weight_array = bindings.data_pointers(deltas), np.array(weights, np.float32)
        bindings.kernels().sign_consensus_mean(pointers, len(deltas), weight_array, MIN_SUM, deltas[0].numel())
        return deltas[0]
    sign = fused_weighted_sum([deltas[0].clone(), *deltas[1:]], [1.0] * len(deltas))
    sign.ge_(0).mul_(2).sub_(1)
    result, divisor = torch.zeros_like(sign), torch.zeros_like(sign)
    for delta, weight in zip(deltas, weights, strict=True):
        agreeing = delta.mul_(sign).relu_()  # |delta| where its sign is the elected one, else 0
        result.add_(agreeing, alpha=weight)
        divisor.add_(agreeing.sign_(), alpha=weight)
    return result.mul_(sign).div_(divisor.clamp_(min=MIN_SUM))
