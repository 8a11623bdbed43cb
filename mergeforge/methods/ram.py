"""ram and ramplus_tl: average the changes that models share, keep those of one model alone in full.

Reinforced Agent Merging, https://arxiv.org/abs/2601.13572.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mergeforge.core.parameters import Interval
from mergeforge.methods import Block, Statistics, method
from mergeforge.methods.statistics import EveryBlock

if TYPE_CHECKING:
    from torch import Tensor

POSITIVE = Interval(0, math.inf)


def _count_changes(deltas: list[Tensor], epsilon: float) -> Tensor:
    """Zero changes of at most epsilon, in place; return the number of models that change each element."""
    import torch

    count = torch.zeros_like(deltas[0])
    for delta in deltas:
        torch.hardshrink(delta, epsilon, out=delta)
        count.add_(delta.sign().abs_())
    return count


@method("ram", scratch_blocks=2, within={"epsilon": POSITIVE})
def ram(deltas: list[Tensor], *, epsilon: float = 1e-5) -> Tensor:
    """base + the sum of the changes above epsilon, divided at each element by the number of models that make one."""
    count = _count_changes(deltas, epsilon)
    total = deltas[0]
    for delta in deltas[1:]:
        total.add_(delta)
    return total.div_(count.clamp_(min=1))


def gains(tensor: Statistics, *, epsilon: float, r: float, alpha: float) -> list[float]:
    """The factor of each task vector's unique changes: the larger, the more changes it shares."""

    def counts(deltas: list[Tensor], block: Block) -> list[tuple[int, int]]:
        is_unique = _count_changes(deltas, epsilon).eq_(1).flatten()
        changed = [delta.sign_().abs_().flatten() for delta in deltas]
        return [(int(changes.sum()), int(changes.dot(is_unique))) for changes in changed]

    factors = []
    for block_counts in zip(*tensor.collect(EveryBlock(counts)), strict=True):
        changed, unique = (sum(column) for column in zip(*block_counts, strict=True))
        factors.append(1 + r * min((changed - unique) / max(unique, epsilon, 1e-30), alpha))
    return factors


@method("ramplus_tl", scratch_blocks=3, stats=gains, within={"epsilon": POSITIVE, "r": POSITIVE, "alpha": POSITIVE})
def ramplus_tl(
    deltas: list[Tensor], stats: list[float], *, epsilon: float = 1e-5, r: float = 0.1, alpha: float = 0.2
) -> Tensor:
    """ram, with each model's unique changes enlarged by up to 1 + r * alpha.

    The factor is 1 + r * (shared / unique changes of the tensor), with the ratio limited to alpha.
    """
    count = _count_changes(deltas, epsilon)
    is_unique = count.clone().eq_(1)
    total = deltas[0].mul_(is_unique.mul(stats[0] - 1).add_(1))
    for delta, gain in zip(deltas[1:], stats[1:], strict=True):
        total.add_(delta.mul_(is_unique.mul(gain - 1).add_(1)))
    return total.div_(count.clamp_(min=1))
