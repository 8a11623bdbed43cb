"""multislerp: the weighted mean of many directions, on the sphere."""

from __future__ import annotations

import math

from mergeforge.core.parameters import Interval
from mergeforge.methods import Reduction, Statistics, reduction
from mergeforge.methods.statistics import InnerProducts, norms


def factors(tensor: Statistics, weight: list[float], normalize_weights: bool, eps: float) -> list[float]:
    """The factor of each input in the result.

    By definition the result is the mean of the directions plus a step in the tangent space, by the
    weighted mean of the directions there. That step is s - (s.m) m for s the weighted sum and m = s / |s|,
    which is zero: it is left out.

    Raises ArithmeticError where the directions cancel.
    """
    import numpy as np

    products = tensor.collect(InnerProducts())
    if len(products) <= 1:
        return [1.0] * len(weight)
    share = np.array(weight) / (sum(weight) if normalize_weights else 1)
    lengths = norms(products)
    scale = 1 / (lengths + eps)
    length = math.sqrt(max(float(share @ (products * np.outer(scale, scale)) @ share), 0))
    if length >= eps:
        return [float(value) for value in share * scale * (lengths @ share) / length]
    if len(weight) > 2 and float(lengths.max()) > eps:
        raise ArithmeticError("the directions cancel: their weighted mean has no length")
    return [float(value) for value in share]


def check(*, weight: list[float], normalize_weights: bool, eps: float) -> None:
    if normalize_weights and len(weight) > 1 and abs(sum(weight)) < 1e-12:
        raise ValueError("the weights sum to zero, and normalize_weights divides by their sum")


@reduction(
    "multislerp",
    scratch_blocks=1,
    optional_base=True,
    needs_stats=True,
    check=check,
    within={"eps": Interval(0, 1, open_low=True)},
)
def multislerp(
    tensor: Statistics, *, weight: list[float], normalize_weights: bool = True, eps: float = 1e-8
) -> Reduction:
    """The weighted mean of the models' directions (with a base: their task vectors'), at their mean length.

    mergekit's method (https://goddard.blog/posts/multislerp-wow-what-a-cool-idea). A single input is returned as it is.
    """
    return Reduction(factors(tensor, weight, normalize_weights, eps), fused=True)
