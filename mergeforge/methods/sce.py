"""sce: select what varies, calculate weights from it, erase minority signs.

Wan et al., "FuseChat: Knowledge Fusion of Chat Models", https://arxiv.org/abs/2408.07990.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mergeforge.methods import UNIT, Block, Look, method
from mergeforge.methods._mask_cache import KEPT, MASKS_NBYTES, Masks
from mergeforge.methods._sub_blocks import by_elements
from mergeforge.methods._thresholds import SAMPLE_ELEMENTS, SEARCH_NBYTES, Threshold, largest_share, some
from mergeforge.methods._weighted_sum import combined
from mergeforge.native import bindings

if TYPE_CHECKING:
    from torch import Tensor

TINY = 1e-6  # of the weights' sum, and of the divisor


@dataclass
class Selection:
    """The threshold of variance (None: everything is kept) with its masks, and each task vector's weight."""

    threshold: Threshold | None
    masks: Masks = field(default_factory=Masks)
    weights: list[float] = field(default_factory=list)

    def keep(self, deltas: list[Tensor], block: Block) -> None:
        """Zero what is not selected, in place. Blocks must come in the tensor's order, from the first one on."""
        if self.threshold is not None:
            trim = self.threshold.trim
            self.masks.apply(deltas, block, lambda: trim(_variance(deltas), block.start == 0).ne_(0))


def select(look: Look, numel: int, *, select_topk: float, int8_mask: bool) -> Selection:
    """Keep the `select_topk` share of the elements that vary, by variance; weights are mean squares of what is kept."""
    # All masks are kept (each block's in whole bytes) or none: a threshold counts off ties from the first block on.
    found = Selection(_threshold(look, numel, select_topk), Masks(KEPT if numel <= KEPT * 7 // 8 else 0))

    def squares(deltas: list[Tensor], block: Block) -> list[float]:
        found.keep(deltas, block)
        return [float(delta.flatten().dot(delta.flatten())) for delta in deltas]

    means = [math.fsum(column) / numel for column in zip(*look(squares), strict=True)]
    total = math.fsum(means)
    found.weights = [one / total if total >= TINY else 1 / len(means) for one in means]
    return found


def _threshold(look: Look, numel: int, share: float) -> Threshold | None:
    if share >= 1 or not numel:
        return None
    return largest_share(_of_variance(look), numel, share)


def _of_variance(look: Look) -> Any:
    """Looks at the variance of the task vectors as if it were one task vector."""

    def looking(see: Callable[[list[Tensor], Block], Any], sample: int = 0) -> Iterator[Any]:
        def variance(deltas: list[Tensor]) -> Tensor:
            few = [some(delta, delta.numel(), SAMPLE_ELEMENTS) for delta in deltas] if sample else deltas
            return _variance(few)

        return look(lambda deltas, block: see([variance(deltas)], block), sample)

    return looking


def _variance(deltas: list[Tensor]) -> Tensor:
    """Of each element over the task vectors, divided by their number."""
    import torch

    result = torch.empty_like(deltas[0])
    if bindings.is_supported(*deltas):
        bindings.kernels().variance(bindings.data_pointers(deltas), len(deltas), result.numel(), result)
        return result
    for first, *others, place in by_elements([*deltas, result], made=2):
        place.copy_(_spread(first, others))
    return result


def _spread(first: Tensor, others: list[Tensor]) -> Tensor:
    """The variance in float64: what is equal stays equal. Of distances from the first, so that no digit cancels.

    (torch.var makes sce 17 times slower.)
    """
    import torch

    origin, count = first.double(), len(others) + 1
    if not others:
        return torch.zeros_like(origin)
    total = others[0].to(torch.float64, copy=True).sub_(origin)
    squares = total * total
    for other in others[1:]:
        apart = other.to(torch.float64, copy=True).sub_(origin)
        total.add_(apart)
        squares.addcmul_(apart, apart)
    return squares.mul_(count).addcmul_(total, total, value=-1).mul_(1 / (count * count))


@method("sce", live=3, facts=select, facts_nbytes=SEARCH_NBYTES + MASKS_NBYTES, within={"select_topk": UNIT})
def sce(
    deltas: list[Tensor], facts: Selection, block: Block, *, select_topk: float = 1.0, int8_mask: bool = False
) -> Tensor:
    """Select elements by variance, weigh task vectors by their mean squares, erase what disagrees in sign.

    Mean squares that add up to less than 1e-6 make the weights equal, as in mergekit. int8_mask has
    no effect.
    """
    facts.keep(deltas, block)
    return _agreeing_mean(deltas, facts.weights)


def _agreeing_mean(deltas: list[Tensor], weights: list[float]) -> Tensor:
    """The weighted mean of the deltas that have the elected sign at each element, into the first one."""
    import numpy as np
    import torch

    if bindings.is_supported(*deltas):
        places, given = bindings.data_pointers(deltas), np.array(weights, np.float32)
        bindings.kernels().agreeing_mean(places, len(deltas), given, TINY, deltas[0].numel())
        return deltas[0]
    sign = combined([deltas[0].clone(), *deltas[1:]], [1.0] * len(deltas))
    sign.ge_(0).mul_(2).sub_(1)
    result, divisor = torch.zeros_like(sign), torch.zeros_like(sign)
    for delta, weight in zip(deltas, weights, strict=True):
        agreeing = delta.mul_(sign).relu_()  # |delta| where its sign is the elected one, else 0
        result.add_(agreeing, alpha=weight)
        divisor.add_(agreeing.sign_(), alpha=weight)
    return result.mul_(sign).div_(divisor.clamp_(min=TINY))
