"""nearswap: move the base towards another model where the two are near.

By Alchemonaut, https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001.
"""

from __future__ import annotations

import math

from mergeforge.core.parameters import Interval
from mergeforge.methods import Reduction, Statistics, reduction
from mergeforge.methods.reduction import Combine


@reduction("nearswap", scratch_blocks=1, inputs=(2, 2), base_is_input=True, within={"t": Interval(0, math.inf)})
def nearswap(tensor: Statistics, *, t: float) -> Reduction:
    """base + w * (other - base), w = t / |other - base| and at most 1: elements nearer than t are swapped.

    A distance counts as 1e-6 at least.
    """
    return Reduction([1.0, 1.0], Combine.NEARSWAP, t=t)
