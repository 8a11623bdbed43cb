"""linear: the weighted average of models ("model soups", https://arxiv.org/abs/2203.05482)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeforge.methods import method

if TYPE_CHECKING:
    from torch import Tensor


def check(*, weight: list[float], normalize: bool) -> None:
    if normalize and abs(sum(weight)) < 1e-12:
        raise ValueError("the weights sum to zero, and normalize divides by their sum")


@method("linear", live=1, check=check)
def linear(models: list[Tensor], *, weight: list[float], normalize: bool = True) -> Tensor:
    """Weighted average of the inputs; with normalize: false, their weighted sum.

    Added one after another with a fused multiply-add, then divided by the weights' float32 sum, as
    mergekit 0.1.5's linear does. The plan refuses weights that sum to zero.
    """
    weights = models[0].new_tensor(weight)
    total = models[0].new_zeros(models[0].shape)
    for model, one in zip(models, weights, strict=True):
        total.addcmul_(model, one)
    if normalize:
        total.div_(weights.sum())
    return total
