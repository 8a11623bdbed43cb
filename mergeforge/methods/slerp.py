"""slerp: spherical linear interpolation between two models (Shoemake 1985)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mergeforge.core.tensor_info import dtype_name
from mergeforge.methods import Look, method
from mergeforge.methods._inner_products import gram, lengths
from mergeforge.methods._weighted_sum import WeightedSum

if TYPE_CHECKING:
    from torch import Tensor

NEARLY_PARALLEL = 0.9995  # beyond this |cosine| the arc is a straight line, as in mergekit
TINY_NORM = 1e-8


def angle(look: Look, numel: int, *, t: float) -> float | None:
    """The angle between the whole tensors; None where they are nearly parallel."""
    products = gram(look)
    if not len(products):
        return None
    first, second = (one if one > TINY_NORM else 1.0 for one in lengths(products))
    cosine = max(-1.0, min(1.0, float(products[0, 1] / first / second)))
    return math.acos(cosine) if abs(cosine) <= NEARLY_PARALLEL else None


def as_sum(facts: float | None, compute: str, *, t: float) -> WeightedSum:
    """t and 1 - t on a straight line, each rounded to what is computed in as in mergekit; shares of the sines on an
    arc."""
    import numpy as np

    if facts is None:
        share = np.float64(t) if compute == "F64" else np.float32(t)
        return WeightedSum([float(1 - share), float(share)])
    whole = math.sin(facts)
    return WeightedSum([math.sin((1 - t) * facts) / whole, math.sin(t * facts) / whole])


@method("slerp", live=1, inputs=(2, 2), base_is_input=True, facts=angle, as_sum=as_sum)
def slerp(models: list[Tensor], facts: float | None, *, t: float) -> Tensor:
    """The point at t (0: the base, 1: the other model) on the arc between two models.

    The angle is the one between the whole tensors; nearly parallel tensors are interpolated on a
    straight line. mergekit 0.1.5's slerp defines the thresholds.
    """
    return as_sum(facts, dtype_name(models[0].dtype), t=t).of(models)
