"""slerp: spherical linear interpolation between two models (Shoemake 1985)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mergeforge.core.tensor_info import dtype_name
from mergeforge.methods import BlockScan, method
from mergeforge.methods._inner_products import gram, lengths
from mergeforge.methods._weighted_sum import WeightedSum

if TYPE_CHECKING:
    from torch import Tensor

NEARLY_PARALLEL = 0.9995  # beyond this |cosine| the arc is a straight line, as in mergekit
MIN_NORM = 1e-8


def angle(scan: BlockScan, numel: int, *, t: float) -> float | None:
    """The angle between the whole tensors; None where they are nearly parallel."""
    products = gram(scan)
    if not len(products):
        return None
    first, second = (norm if norm > MIN_NORM else 1.0 for norm in lengths(products))
    cosine = max(-1.0, min(1.0, float(products[0, 1] / first / second)))
    return math.acos(cosine) if abs(cosine) <= NEARLY_PARALLEL else None


def as_sum(stats: float | None, compute: str, *, t: float) -> WeightedSum:
    """Weights 1 - t and t on a straight line, ratios of sines on an arc.

    1 - t and t are rounded to the dtype of the computation, as in mergekit.
    """
    import numpy as np

    if stats is None:
        share = np.float64(t) if compute == "F64" else np.float32(t)
        return WeightedSum([float(1 - share), float(share)])
    whole = math.sin(stats)
    return WeightedSum([math.sin((1 - t) * stats) / whole, math.sin(t * stats) / whole])


@method("slerp", scratch_blocks=1, inputs=(2, 2), base_is_input=True, stats=angle, as_sum=as_sum)
def slerp(models: list[Tensor], stats: float | None, *, t: float) -> Tensor:
    """The point at t (0: the base, 1: the other model) on the arc between two models.

    The angle is the one between the whole tensors; nearly parallel tensors are interpolated on a
    straight line. The thresholds are those of mergekit 0.1.5's slerp.
    """
    return as_sum(stats, dtype_name(models[0].dtype), t=t).evaluate(models)
