"""task_arithmetic (fold): base plus a weighted sum of task vectors.

Ilharco et al., "Editing Models with Task Arithmetic", https://arxiv.org/abs/2212.04089.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeforge.methods import method
from mergeforge.methods._weighted_sum import WeightedSum, task_arithmetic_sum

if TYPE_CHECKING:
    from torch import Tensor


def as_sum(*, weight: list[float], normalize: bool, lambda_: float, int8_mask: bool) -> WeightedSum:
    return task_arithmetic_sum(weight, normalize, lambda_)


@method("task_arithmetic", "fold", scratch_blocks=0, as_sum=as_sum)
def task_arithmetic(
    deltas: list[Tensor],
    *,
    weight: list[float],
    normalize: bool = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> Tensor:
    """base + lambda * sum(weight_i * delta_i); with normalize, divided by the sum of the weights.

    With adapters alone this is the fold: W + sum(weight * B A alpha / r). int8_mask has no effect.
    """
    return task_arithmetic_sum(weight, normalize, lambda_).evaluate(deltas)
