"""sce: select what varies, calculate weights from it, erase minority signs.

Wan et al., "FuseChat: Knowledge Fusion of Chat Models", https://arxiv.org/abs/2408.07990.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mergeforge.methods import UNIT, Block, Look, method
from mergeforge.methods.consensus import weighted_sum
from mergeforge.methods.magnitude import SEARCH_NBYTES, Threshold, largest
from mergeforge.methods.parts import by_elements

if TYPE_CHECKING:
    from torch import Tensor

TINY = 1e-6  # of the weights' sum, and of the divisor


@dataclass
class Selection:
    """The threshold of variance (None: everything is kept), and each task vector's weight."""

    threshold: Threshold | None
    weights: list[float]


def select(look: Look, numel: int, *, select_topk: float, int8_mask: bool) -> Selection:
    """Keep the `select_topk` share of the elements that vary, by variance; weights are mean squares of what is kept."""
    threshold = None
    if select_topk < 1:
        varying = sum(look(lambda deltas, block: int(_variance(deltas).count_nonzero())))
        threshold = largest(_of_variance(look), numel, {0: int(varying * select_topk)})[0]
    counting = threshold and replace(threshold)

    def squares(deltas: list[Tensor], block: Block) -> list[float]:
        _keep(deltas, counting)
        return [float(delta.flatten().dot(delta.flatten())) for delta in deltas]

    means = [math.fsum(column) / numel for column in zip(*look(squares), strict=True)]
    total = math.fsum(means)
    return Selection(threshold, [one / total if total >= TINY else 1 / len(means) for one in means])


def _of_variance(look: Look) -> Any:
    """Looks at the variance of the task vectors as if it were one task vector."""

    def looking(see: Callable[[list[Tensor], Block], Any], sample: int = 0) -> Iterator[Any]:
        return look(lambda deltas, block: see([_variance(deltas)], block), sample)

    return looking


def _variance(deltas: list[Tensor]) -> Tensor:
    """Of each element over the task vectors, divided by their number."""
    import torch

    result = torch.empty_like(deltas[0])
    for *part, place in by_elements([*deltas, result]):
        place.copy_(_spread(part))
    return result


def _spread(part: list[Tensor]) -> Tensor:
    """The variance in float64, rounded once: what is equal stays equal. (torch.var makes sce 17 times slower.)"""
    import torch

    rows = torch.stack(part).double()
    return rows.sub_(rows.mean(dim=0)).square_().mean(dim=0).to(part[0].dtype)


def _keep(deltas: list[Tensor], threshold: Threshold | None) -> None:
    """Zero what is not selected, in place. Blocks must come in the tensor's order."""
    if threshold is not None:
        for part in by_elements(deltas):
            mask = threshold.trim(_spread(part)).ne_(0)
            for delta in part:
                delta.mul_(mask)


@method("sce", live=3, facts=select, facts_nbytes=SEARCH_NBYTES, within={"select_topk": UNIT})
def sce(deltas: list[Tensor], facts: Selection, *, select_topk: float = 1.0, int8_mask: bool = False) -> Tensor:
    """Select elements by variance, weigh task vectors by their mean squares, erase what disagrees in sign.

    Mean squares that add up to less than 1e-6 make the weights equal, as in mergekit. int8_mask has
    no effect.
    """
    import torch

    _keep(deltas, facts.threshold)
    sign = weighted_sum([deltas[0].clone(), *deltas[1:]], [1.0] * len(deltas), False)
    sign.ge_(0).mul_(2).sub_(1)
    result, divisor = torch.zeros_like(sign), torch.zeros_like(sign)
    for delta, weight in zip(deltas, facts.weights, strict=True):
        agreeing = delta.mul_(sign).relu_()  # |delta| where its sign is the elected one, else 0
        result.add_(agreeing, alpha=weight)
        divisor.add_(agreeing.sign_(), alpha=weight)
    return result.mul_(sign).div_(divisor.clamp_(min=TINY))
