"""ties: trim, elect sign, merge (Yadav et al., https://arxiv.org/abs/2306.01708)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergeforge.methods import DENSITY, Look, method
from mergeforge.methods.consensus import agreeing_sum
from mergeforge.methods.magnitude import SEARCH_NBYTES, Threshold, thresholds, trimmed
from mergeforge.methods.rescale import Rescaled, ratios

if TYPE_CHECKING:
    from torch import Tensor


def facts(look: Look, numel: int, *, density: list[float], rescale: bool, **_: object) -> Rescaled[Threshold | None]:
    """The magnitude threshold of each task vector, and with rescale what restores its mass."""
    found = thresholds(look, numel, density)
    if not rescale:
        return Rescaled(found, [1.0] * len(density))
    counting = [Threshold(one.bits, one.ties_kept, one.ties) if one else None for one in found]
    return Rescaled(found, ratios(look, lambda deltas, block: list(trimmed(deltas, counting)), len(density)))


@method("ties", live=4, facts=facts, facts_nbytes=SEARCH_NBYTES, within={"density": DENSITY})
def ties(
    deltas: list[Tensor],
    facts: Rescaled[Threshold | None],
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
    left = list(trimmed(deltas, facts.found))
    return agreeing_sum(left, weight, normalize, lambda_, facts.ratios)
