"""linear: the weighted average of models ("model soups", https://arxiv.org/abs/2203.05482)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeforge.methods import method
from mergeforge.methods._weighted_sum import WeightedSum

if TYPE_CHECKING:
    from torch import Tensor


def check(*, weight: list[float], normalize: bool) -> None:
    if normalize and abs(sum(weight)) < 1e-12:
        raise ValueError("the weights sum to zero, and normalize divides by their sum")


def as_sum(*, weight: list[float], normalize: bool) -> WeightedSum:
    return WeightedSum(weight, normalize, fused=True)


@method("linear", scratch_blocks=0, check=check, as_sum=as_sum)
def linear(models: list[Tensor], *, weight: list[float], normalize: bool = True) -> Tensor:
    """Weighted average of the inputs; with normalize: false, their weighted sum.

    Inputs are added one after another with a fused multiply-add, then divided by the weights' float32 sum, as in
    mergekit 0.1.5's linear. The plan refuses weights that sum to zero.
    """
    return as_sum(weight=weight, normalize=normalize).evaluate(models)
