"""breadcrumbs and breadcrumbs_ties: drop the largest and the smallest changes, keep the middle.

Davari and Belilovsky, "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks",
https://arxiv.org/abs/2312.06795.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mergeforge.methods import DENSITY, UNIT, Block, Look, method
from mergeforge.methods.consensus import agreeing_sum, weighted_sum
from mergeforge.methods.magnitude import SEARCH_NBYTES, Threshold, largest
from mergeforge.methods.parts import by_elements
from mergeforge.methods.rescale import Rescaled, ratios

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Band:
    """The elements between two thresholds: `outer` keeps the band and what is above it, `inner` what is above."""

    outer: Threshold
    inner: Threshold

    def keep(self, delta: Tensor) -> Tensor:
        """Zero what is outside the band, in place. Blocks must come in the tensor's order."""
        for (part,) in by_elements([delta]):
            above = self.inner.trim(part.clone())
            self.outer.trim(part).sub_(above)
        return delta

    def fresh(self) -> Band:
        """The same band, with no tie counted off yet."""
        return Band(replace(self.outer), replace(self.inner))


def bands(
    look: Look, numel: int, *, density: list[float], gamma: list[float], rescale: bool, **_: object
) -> Rescaled[Band | None]:
    """For each task vector the band of magnitudes: int(density n) elements below the int(gamma n) largest."""
    count = len(density)
    keep: dict[int, int] = {}  # input -> the band and what is above it; input + count -> what is above it
    for at, (share, top) in enumerate(zip(density, gamma, strict=True)):
        if share < 1:
            kept = int(share * numel)
            lowest = max(0, numel - kept - int(top * numel))
            keep |= {at: numel - lowest, at + count: numel - lowest - kept}
    edges = largest(_twice(look), numel, keep)
    found = [Band(edges[at], edges[at + count]) if at in edges else None for at in range(count)]
    if not rescale:
        return Rescaled(found, [1.0] * len(found))
    counting = [band and band.fresh() for band in found]
    return Rescaled(found, ratios(look, lambda deltas, block: _kept(deltas, counting), len(found)))


def _twice(look: Look) -> Any:
    """Looks at every task vector as two inputs, so that both edges of its band are found at once."""

    def looking(see: Callable[[list[Tensor], Block], Any], sample: int = 0) -> Iterator[Any]:
        return look(lambda deltas, block: see([*deltas, *deltas], block), sample)

    return looking


def _kept(deltas: list[Tensor], found: list[Band | None]) -> list[Tensor]:
    return [band.keep(delta) if band else delta for delta, band in zip(deltas, found, strict=True)]


WITHIN = {"density": DENSITY, "gamma": UNIT}


@method("breadcrumbs", live=1, facts=bands, facts_nbytes=2 * SEARCH_NBYTES, within=WITHIN)
def breadcrumbs(
    deltas: list[Tensor],
    facts: Rescaled[Band | None],
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
    left = _kept(deltas, facts.found)
    return weighted_sum(left, weight, normalize, lambda_, facts.ratios)


@method("breadcrumbs_ties", live=4, facts=bands, facts_nbytes=2 * SEARCH_NBYTES, within=WITHIN)
def breadcrumbs_ties(
    deltas: list[Tensor],
    facts: Rescaled[Band | None],
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
    left = _kept(deltas, facts.found)
    return agreeing_sum(left, weight, normalize, lambda_, facts.ratios)
