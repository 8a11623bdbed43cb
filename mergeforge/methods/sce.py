"""sce: select what varies, calculate weights from it, erase minority signs.

Wan et al., "FuseChat: Knowledge Fusion of Chat Models", https://arxiv.org/abs/2408.07990.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mergeforge.methods import UNIT, Block, Look, method
from mergeforge.methods.consensus import weighted_sum
from mergeforge.methods.magnitude import SEARCH_NBYTES, Threshold, largest, sample, survey
from mergeforge.methods.masks import KEPT, MASKS_NBYTES, Masks
from mergeforge.methods.parts import by_elements

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
        """Zero what is not selected, in place. Blocks must come in the tensor's order."""
        if self.threshold is not None:
            trim = self.threshold.trim
            self.masks.apply(deltas, block, lambda: trim(_variance(deltas)).ne_(0))


def select(look: Look, numel: int, *, select_topk: float, int8_mask: bool) -> Selection:
    """Keep the `select_topk` share of the elements that vary, by variance; weights are mean squares of what is kept."""
    # All masks are kept (each block's in whole bytes) or none: a threshold counts off ties from the first block on.
    found = Selection(_threshold(look, numel, select_topk), Masks(KEPT if numel <= KEPT * 7 // 8 else 0))
    learning = replace(found, threshold=found.threshold and replace(found.threshold))

    def squares(deltas: list[Tensor], block: Block) -> list[float]:
        learning.keep(deltas, block)
        return [float(delta.flatten().dot(delta.flatten())) for delta in deltas]

    means = [math.fsum(column) / numel for column in zip(*look(squares), strict=True)]
    total = math.fsum(means)
    found.weights = [one / total if total >= TINY else 1 / len(means) for one in means]
    return found


def _threshold(look: Look, numel: int, share: float) -> Threshold | None:
    if share >= 1 or not numel:
        return None
    variances = look(lambda deltas, block: _variance(deltas))
    varying, seen = survey(variances, numel, lambda variance: int(variance.sign_().sum()))
    return largest(_of_variance(look), numel, {0: int(varying * share)}, {0: sample(seen, 1, 1)})[0]


def _of_variance(look: Look) -> Any:
    """Looks at the variance of the task vectors as if it were one task vector."""

    def looking(see: Callable[[list[Tensor], Block], Any], sample: int = 0) -> Iterator[Any]:
        return look(lambda deltas, block: see([_variance(deltas)], block), sample)

    return looking


def _variance(deltas: list[Tensor]) -> Tensor:
    """Of each element over the task vectors, divided by their number."""
    import torch

    result = torch.empty_like(deltas[0])
    for first, *others, place in by_elements([*deltas, result]):
        place.copy_(_spread(first, others))
    return result


def _spread(first: Tensor, others: list[Tensor]) -> Tensor:
    """The variance in float64: what is equal stays equal. Of distances from the first, so that no digit cancels.

    (torch.var makes sce 17 times slower.)
    """
    origin, count = first.double(), len(others) + 1
    if not others:
        return origin.zero_()
    apart = [other.double().sub_(origin) for other in others]
    total, squares = apart[0].clone(), apart[0].mul_(apart[0])
    for one in apart[1:]:
        total.add_(one)
        squares.addcmul_(one, one)
    return squares.mul_(count).addcmul_(total, total, value=-1).div_(count * count)


@method("sce", live=3, facts=select, facts_nbytes=SEARCH_NBYTES + MASKS_NBYTES, within={"select_topk": UNIT})
def sce(
    deltas: list[Tensor], facts: Selection, block: Block, *, select_topk: float = 1.0, int8_mask: bool = False
) -> Tensor:
    """Select elements by variance, weigh task vectors by their mean squares, erase what disagrees in sign.

    Mean squares that add up to less than 1e-6 make the weights equal, as in mergekit. int8_mask has
    no effect.
    """
    import torch

    facts.keep(deltas, block)
    sign = weighted_sum([deltas[0].clone(), *deltas[1:]], [1.0] * len(deltas), False)
    sign.ge_(0).mul_(2).sub_(1)
    result, divisor = torch.zeros_like(sign), torch.zeros_like(sign)
    for delta, weight in zip(deltas, facts.weights, strict=True):
        agreeing = delta.mul_(sign).relu_()  # |delta| where its sign is the elected one, else 0
        result.add_(agreeing, alpha=weight)
        divisor.add_(agreeing.sign_(), alpha=weight)
    return result.mul_(sign).div_(divisor.clamp_(min=TINY))
