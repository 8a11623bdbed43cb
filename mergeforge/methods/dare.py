"""dare_linear and dare_ties: drop elements of the task vectors at random and rescale the rest.

Yu et al., "Language Models are Super Mario", https://arxiv.org/abs/2311.03099.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mergeforge.methods import DENSITY, Block, Look, method
from mergeforge.methods._mask_cache import KEPT, MASKS_NBYTES, Masks
from mergeforge.methods._random_mask import drawing, masked
from mergeforge.methods._rescale import Rescaled, ratios, ratios_of
from mergeforge.methods._weighted_sum import (
    WeightedSum,
    agreeing_sum,
    agreeing_terms,
    task_arithmetic_sum,
    weighted_sum,
)

if TYPE_CHECKING:
    from torch import Tensor


def facts(look: Look, numel: int, *, density: list[float], rescale: bool, **_: object) -> Rescaled[list[Masks]]:
    """The masks, and the ratio that restores each task vector's mass."""
    count = len(density)
    if not rescale or all(one >= 1 for one in density):
        return Rescaled([Masks() for _ in density], [1.0] * count)
    if masses := getattr(look, "masses", None):
        return Rescaled([Masks() for _ in density], ratios_of(masses(density=density), count))
    masks = [Masks(KEPT) for _ in density]
    found = ratios(look, lambda deltas, block: masked(deltas, block, density, masks), count)
    return Rescaled(masks, found)


def as_sum(
    facts: Rescaled[list[Masks]],
    block: Block,
    compute: str,
    *,
    weight: list[float],
    density: list[float],
    normalize: bool,
    lambda_: float,
    **_: object,
) -> WeightedSum:
    return _drawn(task_arithmetic_sum(weight, normalize, lambda_, facts.ratios, compute), block, density)


def as_agreeing_sum(
    facts: Rescaled[list[Masks]],
    block: Block,
    *,
    weight: list[float],
    density: list[float],
    normalize: bool,
    lambda_: float,
    **_: object,
) -> WeightedSum:
    return _drawn(agreeing_terms(weight, normalize, lambda_, facts.ratios), block, density)


def _drawn(terms: WeightedSum, block: Block, density: Sequence[float]) -> WeightedSum:
    return replace(terms, kept=[drawing(block, at, one) for at, one in enumerate(density)])


WITHIN = {"density": DENSITY}


@method("dare_linear", live=1, facts=facts, facts_nbytes=MASKS_NBYTES, within=WITHIN, as_sum=as_sum)
def dare_linear(
    deltas: list[Tensor],
    facts: Rescaled[list[Masks]],
    block: Block,
    *,
    weight: list[float],
    density: list[float] = 1.0,  # type: ignore[assignment]  # one default for every input
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> Tensor:
    """Keep each element with probability `density`, restore the mass, add up with weights.

    The mask depends on random_seed, the tensor's name and the element's place only. int8_mask has
    no effect.
    """
    left = masked(deltas, block, density, facts.found)
    return weighted_sum(left, weight, normalize, lambda_, facts.ratios)


@method("dare_ties", live=4, facts=facts, facts_nbytes=MASKS_NBYTES, within=WITHIN, as_sum=as_agreeing_sum)
def dare_ties(
    deltas: list[Tensor],
    facts: Rescaled[list[Masks]],
    block: Block,
    *,
    weight: list[float],
    density: list[float] = 1.0,  # type: ignore[assignment]  # one default for every input
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> Tensor:
    """As dare_linear, but only elements that have the elected sign are added (TIES' election).

    int8_mask has no effect.
    """
    left = masked(deltas, block, density, facts.found)
    return agreeing_sum(left, weight, normalize, lambda_, facts.ratios)
