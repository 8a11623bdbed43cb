"""ram and ramplus_tl: changes that models share are averaged, those of one model alone are kept whole.

Reinforced Agent Merging, https://arxiv.org/abs/2601.13572.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mergeforge.core.parameters import Interval
from mergeforge.methods import Block, Look, method

if TYPE_CHECKING:
    from torch import Tensor

POSITIVE = Interval(0, math.inf)


def _changes(deltas: list[Tensor], epsilon: float) -> Tensor:
    """Zero what a task vector changes by epsilon at most, in place; count at each element the others."""
    import torch

    count = torch.zeros_like(deltas[0])
    for delta in deltas:
        torch.hardshrink(delta, epsilon, out=delta)
        count.add_(delta.sign().abs_())
    return count


@method("ram", live=2, within={"epsilon": POSITIVE})
def ram(deltas: list[Tensor], *, epsilon: float = 1e-5) -> Tensor:
    """base + the sum of the changes above epsilon, divided at each element by the number of models that make one."""
    count = _changes(deltas, epsilon)
    total = deltas[0]
    for delta in deltas[1:]:
        total.add_(delta)
    return total.div_(count.clamp_(min=1))


def gains(look: Look, numel: int, *, epsilon: float, r: float, alpha: float) -> list[float]:
    """What each task vector's unique changes are multiplied by: more, the more of them it shares."""

    def counts(deltas: list[Tensor], block: Block) -> list[tuple[int, int]]:
        alone = _changes(deltas, epsilon).eq_(1).flatten()
        changed = [delta.sign_().abs_().flatten() for delta in deltas]
        return [(int(one.sum()), int(one.dot(alone))) for one in changed]

    found = []
    for parts in zip(*look(counts), strict=True):
        changed, unique = (sum(column) for column in zip(*parts, strict=True))
        found.append(1 + r * min((changed - unique) / max(unique, epsilon, 1e-30), alpha))
    return found


@method("ramplus_tl", live=3, facts=gains, within={"epsilon": POSITIVE, "r": POSITIVE, "alpha": POSITIVE})
def ramplus_tl(
    deltas: list[Tensor], facts: list[float], *, epsilon: float = 1e-5, r: float = 0.1, alpha: float = 0.2
) -> Tensor:
    """ram, with each model's unique changes enlarged by up to 1 + r * alpha.

    By 1 + r * (shared / unique changes of the tensor), the ratio at most alpha.
    """
    count = _changes(deltas, epsilon)
    alone = count.clone().eq_(1)
    total = deltas[0].mul_(alone.mul(facts[0] - 1).add_(1))
    for delta, gain in zip(deltas[1:], facts[1:], strict=True):
        total.add_(delta.mul_(alone.mul(gain - 1).add_(1)))
    return total.div_(count.clamp_(min=1))
