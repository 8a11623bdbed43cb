"""slerp: spherical linear interpolation between two models (Shoemake 1985)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mergeforge.methods import Block, Look, method

if TYPE_CHECKING:
    from torch import Tensor

NEARLY_PARALLEL = 0.9995  # beyond this |cosine| the arc is a straight line, as in mergekit
TINY_NORM = 1e-8


def _dots(models: list[Tensor], block: Block) -> tuple[float, float, float]:
    first, second = (model.flatten() for model in models)
    return float(first.dot(first)), float(second.dot(second)), float(first.dot(second))


def coefficients(look: Look, numel: int, *, t: float) -> tuple[float, float]:
    """How much of each of the two models: from the angle between the whole tensors."""
    squares_a, squares_b, products = zip(*look(_dots), strict=True)
    norm_a, norm_b = math.sqrt(math.fsum(squares_a)), math.sqrt(math.fsum(squares_b))
    norm_a = norm_a if norm_a > TINY_NORM else 1.0
    norm_b = norm_b if norm_b > TINY_NORM else 1.0
    cosine = max(-1.0, min(1.0, math.fsum(products) / norm_a / norm_b))
    if abs(cosine) > NEARLY_PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


@method("slerp", live=1, inputs=(2, 2), base_is_input=True, facts=coefficients)
def slerp(models: list[Tensor], facts: tuple[float, float], *, t: float) -> Tensor:
    """The point at t (0: the base, 1: the other model) on the arc between two models.

    The angle is the one between the whole tensors; nearly parallel tensors are interpolated on a
    straight line. mergekit 0.1.5's slerp defines the thresholds.
    """
    first, second = models
    return first.mul_(facts[0]).add_(second, alpha=facts[1])
