"""linear: the weighted average of models ("model soups", https://arxiv.org/abs/2203.05482)."""

from __future__ import annotations

from mergeforge.methods import Reduction, Statistics, reduction


def check(*, weight: list[float], normalize: bool) -> None:
    if normalize and abs(sum(weight)) < 1e-12:
        raise ValueError("the weights sum to zero, and normalize divides by their sum")


@reduction("linear", scratch_blocks=0, check=check)
def linear(tensor: Statistics, *, weight: list[float], normalize: bool = True) -> Reduction:
    """Weighted average of the inputs; with normalize: false, their weighted sum.

    Inputs are added one after another with a fused multiply-add, then divided by the weights' float32 sum, as in
    mergekit 0.1.5's linear. The plan refuses weights that sum to zero.
    """
    return Reduction(weight, normalize=normalize, fused=True)
