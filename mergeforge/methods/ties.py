"""ties: trim, elect sign, merge (Yadav et al., https://arxiv.org/abs/2306.01708)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mergeforge.methods import DENSITY, Block, Look, method
from mergeforge.methods._magnitude_range import Band, Bands
from mergeforge.methods._rescale import Rescaled
from mergeforge.methods._thresholds import SEARCH_NBYTES, thresholds
from mergeforge.methods._weighted_sum import WeightedSum, agreeing_sum, agreeing_terms

if TYPE_CHECKING:
    from torch import Tensor


def facts(look: Look, numel: int, *, density: list[float], rescale: bool, **_: object) -> Rescaled[Bands]:
    """The largest elements of each task vector, and with rescale what restores its mass."""
    found = Bands([Band(one) if one else None for one in thresholds(look, numel, density)])
    return found.rescaled(look, rescale)


def as_sum(facts: Rescaled[Bands], *, weight: list[float], normalize: bool, lambda_: float, **_: object) -> WeightedSum:
    return replace(agreeing_terms(weight, normalize, lambda_, facts.ratios), bands=facts.found.table)


@method(
    "ties",
    live=4,
    facts=facts,
    facts_nbytes=SEARCH_NBYTES,
    sum_nbytes=SEARCH_NBYTES,
    within={"density": DENSITY},
    as_sum=as_sum,
)
def ties(
    deltas: list[Tensor],
    facts: Rescaled[Bands],
    block: Block,
    *,
    weight: list[float],
    density: list[float] = 1.0,  # type: ignore[assignment]  # one default for every input
    normalize: bool = True,
    rescale: bool = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> Tensor:
    """Keep each task vector's largest `density` share, elect a sign, average those that agree.

    Exactly max(1, int(density * n)) elements of a tensor are kept; among equal magnitudes at the
    threshold the first ones. int8_mask has no effect.
    """
    return agreeing_sum(facts.found.keep(deltas, block), weight, normalize, lambda_, facts.ratios)
