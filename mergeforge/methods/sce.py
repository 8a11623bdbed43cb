"""sce: select elements by variance, calculate weights from them, erase minority signs.

Wan et al., "FuseChat: Knowledge Fusion of Chat Models", https://arxiv.org/abs/2408.07990.
"""

from __future__ import annotations

import math

from mergeforge.methods import UNIT, Reduction, Statistics, reduction
from mergeforge.methods.keep import Keep, KeepVarying, KeepWhole
from mergeforge.methods.kth_largest import SEARCH_NBYTES
from mergeforge.methods.reduction import Combine
from mergeforge.methods.statistics import KeptSquares, KthVariance

MIN_SUM = 1e-6  # of the weights, and of the divisor


@reduction(
    "sce",
    on_deltas=True,
    scratch_blocks=3,
    needs_stats=True,
    stats_nbytes=SEARCH_NBYTES,
    uses_position=True,
    within={"select_topk": UNIT},
)
def sce(tensor: Statistics, *, select_topk: float = 1.0, int8_mask: bool = False) -> Reduction:
    """Select elements by variance, weight task vectors by their mean squares, erase minority signs.

    Keeps the `select_topk` fraction of the elements that vary; the mean squares are those of what is kept. Mean squares
    that add up to less than 1e-6 make the weights equal, as in mergekit. int8_mask has no effect.
    """
    selects = select_topk < 1 and tensor.numel
    keep: Keep = KeepVarying(tensor.collect(KthVariance(select_topk))) if selects else KeepWhole()
    means = [squares / max(tensor.numel, 1) for squares in tensor.collect(KeptSquares(keep))]
    total = math.fsum(means)
    weights = [mean / total if total >= MIN_SUM else 1 / len(means) for mean in means]
    return Reduction(weights, Combine.CONSENSUS_MEAN, keep, min_divisor=MIN_SUM)
