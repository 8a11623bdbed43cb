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


def angle(look: Look, numel: int, *, t: float) -> float | None:
    """The angle between the whole tensors; None where they are nearly parallel."""
    squares_a, squares_b, products = zip(*look(_dots), strict=True)
    norm_a, norm_b = math.sqrt(math.fsum(squares_a)), math.sqrt(math.fsum(squares_b))
    norm_a = norm_a if norm_a > TINY_NORM else 1.0
    norm_b = norm_b if norm_b > TINY_NORM else 1.0
    cosine = max(-1.0, min(1.0, math.fsum(products) / norm_a / norm_b))
    return math.acos(cosine) if abs(cosine) <= NEARLY_PARALLEL else None


@method("slerp", live=0, inputs=(2, 2), base_is_input=True, facts=angle)
def slerp(models: list[Tensor], facts: float | None, *, t: float) -> Tensor:
    """The point at t (0: the base, 1: the other model) on the arc between two models.

    The angle is the one between the whole tensors; nearly parallel tensors are interpolated on a
    straight line. mergekit 0.1.5's slerp defines the thresholds.
    """
    first, second = models
    if facts is None:
        share = first.new_tensor(t)
        return first.mul_(1 - share).add_(second.mul_(share))
    whole = math.sin(facts)
    return first.mul_(math.sin((1 - t) * facts) / whole).add_(second.mul_(math.sin(t * facts) / whole))
