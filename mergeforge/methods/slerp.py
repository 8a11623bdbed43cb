"""slerp: spherical linear interpolation between two models (Shoemake 1985)."""

from __future__ import annotations

import math

from mergeforge.methods import Reduction, Statistics, reduction
from mergeforge.methods.statistics import InnerProducts, norms

NEARLY_PARALLEL = 0.9995  # beyond this |cosine| the arc is a straight line, as in mergekit
MIN_NORM = 1e-8


def angle(tensor: Statistics) -> float | None:
    """The angle between the whole tensors; None where they are nearly parallel."""
    products = tensor.collect(InnerProducts())
    if not len(products):
        return None
    first, second = (norm if norm > MIN_NORM else 1.0 for norm in norms(products))
    cosine = max(-1.0, min(1.0, float(products[0, 1] / first / second)))
    return math.acos(cosine) if abs(cosine) <= NEARLY_PARALLEL else None


@reduction("slerp", scratch_blocks=1, inputs=(2, 2), base_is_input=True, needs_stats=True)
def slerp(tensor: Statistics, *, t: float) -> Reduction:
    """The point at t (0: the base, 1: the other model) on the arc between two models.

    The angle is the one between the whole tensors; nearly parallel tensors are interpolated on a straight line, with
    1 - t and t rounded to the dtype of the computation. The thresholds are those of mergekit 0.1.5's slerp.
    """
    import numpy as np

    between = angle(tensor)
    if between is None:
        share = np.float64(t) if tensor.compute == "F64" else np.float32(t)
        return Reduction([float(1 - share), float(share)])
    whole = math.sin(between)
    return Reduction([math.sin((1 - t) * between) / whole, math.sin(t * between) / whole])
