"""della and della_linear: drop elements at random, the larger ones less often, and rescale the rest.

Deep et al., "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling",
https://arxiv.org/abs/2406.11617.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeforge.methods import DENSITY, UNIT, Block, Look, method
from mergeforge.methods.consensus import agreeing_sum, weighted_sum
from mergeforge.methods.random_mask import random_mask
from mergeforge.methods.rescale import ratios

if TYPE_CHECKING:
    from torch import Tensor


def kept(deltas: list[Tensor], block: Block, density: list[float], epsilon: list[float]) -> list[Tensor]:
    """Each delta's block, in place, with elements kept with a probability that grows with their rank in the row."""
    return [
        delta if share >= 1 else delta.mul_(random_mask(delta, block, at, _probability(delta, block, share, width)))
        for at, (delta, share, width) in enumerate(zip(deltas, density, epsilon, strict=True))
    ]


def _probability(delta: Tensor, block: Block, density: float, epsilon: float) -> Tensor:
    """From density - epsilon for a row's smallest element to density + epsilon for its largest."""
    import torch

    rows = delta.view(1, -1) if block.is_vector else delta
    columns = rows.shape[1]
    if columns == 1:
        return torch.full_like(delta, density, dtype=torch.float32)
    order = rows.float().abs().sort(dim=1, stable=True).indices
    steps = torch.arange(columns, dtype=torch.float32, device=delta.device).mul_(2 * epsilon / (columns - 1))
    steps = steps.add_(density - epsilon).expand(rows.shape)
    return torch.empty(rows.shape, device=delta.device).scatter_(1, order, steps).view(delta.shape)


def check(*, density: list[float], epsilon: list[float], **_: object) -> None:
    for share, width in zip(density, epsilon, strict=True):
        if share < 1 and not (share - width > 0 and share + width < 1):
            raise ValueError(f"density {share:g} -+ epsilon {width:g} leaves (0, 1): give a smaller epsilon")


def facts(
    look: Look, numel: int, *, density: list[float], epsilon: list[float], rescale: bool, **_: object
) -> list[float]:
    """The ratio that restores each task vector's mass."""
    if not rescale or all(one >= 1 for one in density):
        return [1.0] * len(density)
    return ratios(look, lambda deltas, block: kept(deltas, block, density, epsilon), len(density))


WITHIN = {"density": DENSITY, "epsilon": UNIT}


@method("della_linear", live=4, facts=facts, check=check, within=WITHIN)
def della_linear(
    deltas: list[Tensor],
    facts: list[float],
    block: Block,
    *,
    weight: list[float],
    density: list[float] = 1.0,  # type: ignore[assignment]  # one default for every input
    epsilon: list[float] = 0.15,  # type: ignore[assignment]
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> Tensor:
    """Drop by magnitude ranks within rows, restore the mass, add up with weights. int8_mask has no effect."""
    left = [one.mul_(ratio) for one, ratio in zip(kept(deltas, block, density, epsilon), facts, strict=True)]
    return weighted_sum(left, weight, normalize).mul_(lambda_)


@method("della", live=4, facts=facts, check=check, within=WITHIN)
def della(
    deltas: list[Tensor],
    facts: list[float],
    block: Block,
    *,
    weight: list[float],
    density: list[float] = 1.0,  # type: ignore[assignment]  # one default for every input
    epsilon: list[float] = 0.15,  # type: ignore[assignment]
    normalize: bool = True,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> Tensor:
    """della_linear, and only elements that have the elected sign (TIES' election). int8_mask has no effect."""
    left = [one.mul_(ratio) for one, ratio in zip(kept(deltas, block, density, epsilon), facts, strict=True)]
    return agreeing_sum(left, weight, normalize).mul_(lambda_)
