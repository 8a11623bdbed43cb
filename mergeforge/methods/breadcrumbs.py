"""breadcrumbs and breadcrumbs_ties: drop the largest and the smallest changes, keep the middle.

Davari and Belilovsky, "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks",
https://arxiv.org/abs/2312.06795.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mergeforge.methods import DENSITY, UNIT, Block, Look, method
from mergeforge.methods._magnitude_range import Band, Bands
from mergeforge.methods._rescale import Rescaled
from mergeforge.methods._thresholds import SEARCH_NBYTES, largest
from mergeforge.methods._weighted_sum import (
    WeightedSum,
    agreeing_sum,
    agreeing_terms,
    task_arithmetic_sum,
    weighted_sum,
)

if TYPE_CHECKING:
    from torch import Tensor


def bands(
    look: Look, numel: int, *, density: list[float], gamma: list[float], rescale: bool, **_: object
) -> Rescaled[Bands]:
    """For each task vector the band of magnitudes: int(density n) elements below the int(gamma n) largest."""
    count = len(density)
    keep: dict[int, int] = {}  # input -> the band and what is above it; input + count -> what is above it
    for at, (share, top) in enumerate(zip(density, gamma, strict=True)):
        if share < 1:
            kept = int(share * numel)
            lowest = max(0, numel - kept - int(top * numel))
            keep |= {at: numel - lowest, at + count: numel - lowest - kept}
    edges = largest(look if hasattr(look, "split") else _twice(look), numel, keep)
    found = Bands([Band(edges[at], edges[at + count]) if at in edges else None for at in range(count)])
    return found.rescaled(look, rescale)


def _twice(look: Look) -> Any:
    """Looks at every task vector as two inputs, so that both edges of its band are found at once."""

    def looking(see: Callable[[list[Tensor], Block], Any], sample: int = 0) -> Iterator[Any]:
        return look(lambda deltas, block: see([*deltas, *deltas], block), sample)

    return looking


def as_sum(
    facts: Rescaled[Bands], compute: str, *, weight: list[float], normalize: bool, lambda_: float, **_: object
) -> WeightedSum:
    terms = task_arithmetic_sum(weight, normalize, lambda_, facts.ratios, compute)
    return replace(terms, bands=facts.found.table)


def as_agreeing_sum(
    facts: Rescaled[Bands], *, weight: list[float], normalize: bool, lambda_: float, **_: object
) -> WeightedSum:
    return replace(agreeing_terms(weight, normalize, lambda_, facts.ratios), bands=facts.found.table)


EDGES_NBYTES = 2 * SEARCH_NBYTES
WITHIN = {"density": DENSITY, "gamma": UNIT}


@method(
    "breadcrumbs", live=1, facts=bands, facts_nbytes=EDGES_NBYTES, sum_nbytes=EDGES_NBYTES, within=WITHIN, as_sum=as_sum
)
def breadcrumbs(
    deltas: list[Tensor],
    facts: Rescaled[Bands],
    block: Block,
    *,
    weight: list[float],
    density: list[float] = 1.0,  # type: ignore[assignment]  # one default for every input
    gamma: list[float] = 0.01,  # type: ignore[assignment]
    normalize: bool = False,
    rescale: bool = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> Tensor:
    """Keep `density` of the elements after leaving out the `gamma` largest, and add up. int8_mask has no effect."""
    return weighted_sum(facts.found.keep(deltas, block), weight, normalize, lambda_, facts.ratios)


@method(
    "breadcrumbs_ties",
    live=4,
    facts=bands,
    facts_nbytes=EDGES_NBYTES,
    sum_nbytes=EDGES_NBYTES,
    within=WITHIN,
    as_sum=as_agreeing_sum,
)
def breadcrumbs_ties(
    deltas: list[Tensor],
    facts: Rescaled[Bands],
    block: Block,
    *,
    weight: list[float],
    density: list[float] = 1.0,  # type: ignore[assignment]  # one default for every input
    gamma: list[float] = 0.01,  # type: ignore[assignment]
    normalize: bool = False,
    rescale: bool = False,
    lambda_: float = 1.0,
    int8_mask: bool = False,
) -> Tensor:
    """breadcrumbs, and only elements that have the elected sign (TIES' election). int8_mask has no effect."""
    return agreeing_sum(facts.found.keep(deltas, block), weight, normalize, lambda_, facts.ratios)
