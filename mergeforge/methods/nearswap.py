"""nearswap: move the base towards another model where the two are near.

By Alchemonaut, https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mergeforge.core.parameters import Interval
from mergeforge.methods import method
from mergeforge.methods._weighted_sum import WeightedSum

if TYPE_CHECKING:
    from torch import Tensor

MIN_DISTANCE = 1e-6


def as_sum(*, t: float) -> WeightedSum:
    return WeightedSum([0.0, 0.0], nearswap_t=t)


@method(
    "nearswap", scratch_blocks=1, inputs=(2, 2), base_is_input=True, within={"t": Interval(0, math.inf)}, as_sum=as_sum
)
def nearswap(models: list[Tensor], *, t: float) -> Tensor:
    """base + w * (other - base), w = t / |other - base| and at most 1: elements nearer than t are swapped.

    A distance counts as 1e-6 at least.
    """
    base, other = models
    share = (base - other).abs_().clamp_(min=MIN_DISTANCE)
    share = share.reciprocal_().mul_(t).clamp_(max=1)
    other.mul_(share)
    return share.neg_().add_(1).mul_(base).add_(other)
